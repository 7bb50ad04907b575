"""A chat in the terminal: python sample.py smollm2 --chat [--store=DIR]

A conversation is one growing list of tokens, in the format that the model was trained on (ChatML):

    <|im_start|>user\\n … <|im_end|>\\n<|im_start|>assistant\\n … <|im_end|>\\n

Each turn, the store gives the cache of what was read before, and the model reads the rest.
"""

import hashlib
import json
import os
import sys
import time

import torch

from minisa.checkpoint import write_file
from minisa.store import Damaged

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
HELP = "/reset starts anew, /undo takes the last turn back, /bill shows the cache, Ctrl-D ends"


def said(tokenizer, role, text):
    """A message → its tokens. What looks like a special token in the text stays text."""
    start, end = special(tokenizer)
    return [start, *tokenizer.encode(f"{role}\n{text}"), end, *tokenizer.encode("\n")]


def special(tokenizer):
    """The ids of <|im_start|> and <|im_end|>. Raises ValueError if the tokenizer has none."""
    ids = {tokenizer.decode([i]): i for i in tokenizer.description.get("special", [])}
    if "<|im_start|>" not in ids or "<|im_end|>" not in ids:
        raise ValueError("--chat: this model has no chat format with <|im_start|> and <|im_end|>; take smollm2")
    return ids["<|im_start|>"], ids["<|im_end|>"]


def answer(model, tokens, store, stop, args, generator):
    """Yield the tokens of an answer to `tokens`, which grow by it; then keep the cache. Yields first how many tokens were reused."""
    while True:
        cache = store.load(tokens)
        reused, made, whole = cache.length, [], True
        ids = torch.tensor([tokens[reused:]], device=model.embed.weight.device)
        try:
            for token in model.stream(ids, args.max_new_tokens, args.temperature, args.top_k, generator, cache):
                if not made:
                    yield reused, cache
                made.append(token.item())
                if made[-1] == stop:
                    break
                yield made[-1]
            break
        except Damaged:                                     # before the first token: the next try finds less
            continue
        except KeyboardInterrupt:                           # perhaps between two layers
            whole = False
            raise
        finally:
            tokens += made if made and made[-1] == stop else made + [stop] * bool(made)
            if made and whole:
                store.save(tokens, cache)


class History:
    """The tokens of the conversation, and where its turns begin; in a file of the store's folder, if it has one. Of two chats in one
    folder, it holds the one that was said something in last."""

    def __init__(self, store, tokenizer):
        self.file = store.folder and store.folder / "chat.json"
        self.tokenizer = hashlib.sha256(json.dumps(tokenizer.description).encode()).hexdigest()
        self.first = said(tokenizer, "system", SYSTEM)
        self.reset()
        try:
            saved = json.loads(self.file.read_text()) if self.file and self.file.exists() else None
            if saved is not None:
                tokens, turns = saved["tokens"], saved["turns"]
                if type(tokens) is not list or type(turns) is not list or not tokens:
                    raise ValueError("it is damaged")
                if saved["tokenizer"] != self.tokenizer:
                    raise ValueError("it is of a model with another tokenizer")
                if not all(type(n) is int and 0 <= n < tokenizer.vocab_size for n in tokens) or not all(type(n) is int and 0 < n <= len(tokens) for n in turns):
                    raise ValueError("it is damaged")
                self.tokens, self.turns = tokens, turns
        except (OSError, ValueError, KeyError, TypeError) as error:
            print(f"{self.file} cannot be continued ({error}); it is kept as {self.file}.old, and this is a new conversation", file=sys.stderr)
            os.replace(self.file, f"{self.file}.old")

    def reset(self):
        self.tokens, self.turns = list(self.first), []

    def undo(self):
        if self.turns:
            del self.tokens[self.turns.pop():]

    def save(self, store):
        if self.file:
            try:
                write_file(self.file, json.dumps({"tokenizer": self.tokenizer, "tokens": self.tokens, "turns": self.turns}).encode())
            except OSError as error:
                store.trouble = str(error)


def chat(model, tokenizer, store, args, bill):
    """Talk until Ctrl-D. bill: a function (cache) that prints what the cache costs."""
    start, stop = special(tokenizer)
    history = History(store, tokenizer)
    print(HELP)
    if history.turns:
        print(f"going on with a conversation of {len(history.turns)} turns, {len(history.tokens):,} tokens")
    generator, cache = torch.Generator(model.embed.weight.device).manual_seed(args.seed), store.fresh()
    while True:
        try:
            text = input("\n> " if sys.stdin.isatty() else "").strip()
            text.encode()
        except EOFError:
            print()
            break
        except UnicodeError:
            print("not UTF-8 text", file=sys.stderr)
            continue
        if text in ("/reset", "/undo"):
            getattr(history, text[1:])()
            history.save(store)
            cache = store.fresh()
            print(f"{len(history.turns)} turns, {len(history.tokens):,} tokens")
        elif text == "/bill":
            bill(cache)
        elif text.startswith("/"):
            print(HELP)
        elif text:
            history.turns.append(len(history.tokens))
            history.tokens += said(tokenizer, "user", text) + [start, *tokenizer.encode("assistant\n")]
            n, began, reused = len(history.tokens), time.perf_counter(), 0
            first = began
            tokens = answer(model, history.tokens, store, stop, args, generator)
            try:
                reused, cache = next(tokens)
                first = time.perf_counter()
                for text in tokenizer.decode_stream(tokens):
                    print(text, end="", flush=True)
            except KeyboardInterrupt:                       # stops the answer, not the chat
                tokens.close()
            seconds, made = time.perf_counter() - first, len(history.tokens) - n
            if not made:                                    # stopped before the first token: nothing was said
                history.undo()
                print("\n[stopped]")
                continue
            history.tokens += tokenizer.encode("\n")
            history.save(store)
            print(f"\n[first token after {first - began:.2f} s, {reused:,} of {n:,} tokens reused, {made / max(seconds, 1e-9):.0f} tokens/s{', cut at --max_new_tokens' * (made > args.max_new_tokens)}]", flush=True)
            if store.trouble:
                print(f"the store does not save: {store.trouble}", file=sys.stderr)
                store.trouble = None
    store.close()
