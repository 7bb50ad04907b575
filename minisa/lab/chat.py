"""A chat in the terminal, which goes on where it was left.

    python -m minisa.lab.chat smollm2
    python -m minisa.lab.chat smollm2 --store=out/chat      the conversation and its cache stay there
    python -m minisa.lab.chat smollm2 --share=26-28         with layers that share, zero-shot

/reset begins anew, /undo takes the last turn back, /bill shows what the cache costs. Ctrl-C stops an answer,
Ctrl-D ends the chat.

A conversation is one growing list of tokens, in the format that the model was trained on (ChatML):

    <|im_start|>user\\n … <|im_end|>\\n<|im_start|>assistant\\n … <|im_end|>\\n

Each turn, the store gives the cache of what was read before, and the model reads the rest.
"""

import hashlib
import json
import os
import sys
import time
from contextlib import nullcontext
from itertools import chain
from itertools import count as count_up

import torch

from minisa.axes.store import Damaged, Store
from minisa.kit import bill
from minisa.kit.checkpoint import load
from minisa.kit.cli import Parser, amount, at_least, command, count, device
from minisa.kit.files import check, lock, read_file, write_file
from minisa.model import share_kind

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
HELP = "/reset begins anew, /undo takes the last turn back, /bill shows the cache, Ctrl-D ends"
MB = 2**20
LONGEST = 2**16         # characters of a line
MOST = 2**20            # tokens of a conversation
SHAPE = {"tokenizer": str, "tokens": [int], "turns": [int]}     # of chat.json

def special(tokenizer):
    """The ids of <|im_start|> and <|im_end|>. Raises ValueError if the tokenizer has none."""
    ids = {tokenizer.decode([i]): i for i in tokenizer.description.get("special", [])}
    if "<|im_start|>" not in ids or "<|im_end|>" not in ids:
        raise ValueError("this model has no chat format with <|im_start|> and <|im_end|>; take smollm2")
    return ids["<|im_start|>"], ids["<|im_end|>"]

def read_line():
    """What the user says next; None at the end."""
    while True:
        print("\n> " if sys.stdin.isatty() else "", end="", flush=True)
        line = rest = sys.stdin.readline(LONGEST)
        while rest and not rest.endswith("\n"):             # of a line that is too long
            rest = sys.stdin.readline(LONGEST)
        try:
            line.encode()                                   # a terminal can send bytes that are no UTF-8
        except UnicodeError:
            print("not UTF-8 text", file=sys.stderr)
        else:
            if len(line) < LONGEST:
                return line.strip() if line else None
            print(f"longer than {LONGEST:,} characters: say it in parts", file=sys.stderr)

class Chat:
    """A conversation with a model in the terminal: its tokens, and where each of its turns begins. They are
    kept in a file of the store's folder.

    args: the flags of main(). Raises ValueError if the model has no chat format, OSError if that file
    cannot be read.
    """

    def __init__(self, name, model, tokenizer, store, args):
        self.name, self.model, self.tokenizer, self.store, self.args = name, model, tokenizer, store, args
        self.start, self.stop = special(tokenizer)
        self.generator = torch.Generator(args.device).manual_seed(args.seed)
        self.identity = hashlib.sha256(json.dumps(tokenizer.description).encode()).hexdigest()
        self.file = store.disk and store.disk.folder / "chat.json"
        self.reset()
        if self.file and os.path.lexists(self.file):
            data = read_file(self.file)                     # or it raises, and stays as it is
            try:
                self.restore(json.loads(data))
            except (ValueError, RecursionError) as error:
                names = (f"{self.file}.old{n or ''}" for n in count_up())
                old = next(name for name in names if not os.path.lexists(name))
                print(f"{self.file} cannot be continued ({error}); it is kept as {old}, and this is a "
                      "new conversation", file=sys.stderr)
                os.rename(self.file, old)

    def restore(self, saved):
        """Take over what save() wrote. Raises ValueError if it cannot be continued."""
        check(saved, SHAPE, "what it holds")
        tokens, turns = saved["tokens"], saved["turns"]
        if saved["tokenizer"] != self.identity:
            raise ValueError("it is of a model with another tokenizer")
        known = 0 < len(tokens) <= MOST and all(0 <= n < self.tokenizer.vocab_size for n in tokens)
        if not known or not all(0 < n <= len(tokens) for n in turns) or turns != sorted(turns):
            raise ValueError("it is damaged")
        self.tokens, self.turns = tokens, turns

    def save(self):
        """Write the file; say so if that, or what the store does in the background, goes wrong."""
        if not self.file:
            return
        trouble, self.store.disk.trouble = self.store.disk.trouble, None
        state = {"tokenizer": self.identity, "tokens": self.tokens, "turns": self.turns}
        try:
            write_file(self.file, json.dumps(state).encode(), private=True)
        except OSError as error:
            trouble = error
        if trouble:
            print(f"the store does not save: {trouble}", file=sys.stderr)

    def reset(self):
        self.tokens, self.turns, self.cache = self.message("system", SYSTEM), [], None

    def undo(self):
        if self.turns:
            del self.tokens[self.turns.pop():]
        self.cache = None

    def run(self):
        """Talk until Ctrl-D."""
        commands = {"/reset": self.reset, "/undo": self.undo}
        print(HELP)
        if self.turns:
            print(f"going on with a conversation of {len(self.turns)} turns, {len(self.tokens):,} tokens")
        while (text := read_line()) is not None:
            if text in commands:
                commands[text]()
                self.save()
                print(f"{len(self.turns)} turns, {len(self.tokens):,} tokens")
            elif text == "/bill":                           # of the cache of the last answer
                context = min(self.cache.length, self.cache.size) if self.cache else 1
                bill.show([bill.row(self.name, self.model, None, None, context)[0]])
            elif text.startswith("/"):
                print(HELP)
            elif text:
                self.turn(text)
        print()
        self.store.close()

    def message(self, role, text):
        """→ its tokens. What looks like a special token in the text stays text."""
        encode = self.tokenizer.encode
        return [self.start, *encode(f"{role}\n{text}"), self.stop, *encode("\n")]

    def turn(self, text):
        """Say something, print the answer as it comes, and what it took."""
        began, message = time.perf_counter(), self.message("user", text)
        if len(message) > self.store.size or len(self.tokens) + len(message) > MOST:
            print(f"{len(message):,} tokens do not fit into the window of {self.store.size:,}, or the "
                  f"conversation of at most {MOST:,}: say it in parts, or /reset", file=sys.stderr)
            return
        self.turns.append(len(self.tokens))
        self.tokens += message
        self.tokens += [self.start, *self.tokenizer.encode("assistant\n")]
        n, answer = len(self.tokens), self.answer()
        try:
            for piece in self.tokenizer.decode_stream(answer):
                print(piece, end="", flush=True)
        except KeyboardInterrupt:                           # stops the answer, not the chat
            answer.close()
        made = len(self.tokens) - n
        if not made:                                        # stopped before the first token
            self.undo()
            print("\n[stopped]")
            return
        self.tokens += self.tokenizer.encode("\n")
        speed = made / max(time.perf_counter() - self.first, 1e-9)
        cut = ", cut at --max_new_tokens" if made > self.args.max_new_tokens else ""
        print(f"\n[first token after {self.first - began:.2f} s, {self.reused:,} of {n:,} tokens reused, "
              f"{speed:.0f} tokens/s{cut}]", flush=True)
        self.save()

    def answer(self):
        """Yield the tokens of an answer, by which the conversation grows; then store its cache."""
        args, first, made, whole = self.args, None, [], True
        while first is None:
            self.cache = self.store.load(self.tokens)
            self.reused = self.cache.length
            ids = torch.tensor([self.tokens[self.reused:]], device=args.device)
            stream = self.model.stream(ids, args.max_new_tokens, args.temperature, args.top_k, self.generator,
                                       self.cache)
            try:
                first = next(stream).item()
            except Damaged:                                 # the next finds less
                pass
        self.first = time.perf_counter()
        try:
            for token in chain([first], map(int, stream)):
                made.append(token)
                if token == self.stop:
                    break
                yield token
        except KeyboardInterrupt:                           # perhaps between two layers of the cache
            whole = False
            raise
        finally:
            self.tokens += made if made[-1:] == [self.stop] else [*made, self.stop]
            if whole:
                self.store.save(self.tokens, self.cache)

def read_flags():
    parser = Parser(__doc__, usage="python -m minisa.lab.chat MODEL [--FLAG=VALUE ...]")
    parser.add_argument("model", metavar="MODEL", help="a run's or model's folder, a .gguf file, or smollm2, "
                        "which is downloaded once")
    flag = parser.flag
    flag("store", str, None, "folder in which the conversation and its KV cache stay", "none, in memory only")
    flag("store_memory", count, 1024, "KV caches of past turns kept in memory, in MB")
    flag("store_disk", count, 4096, "with --store: KV caches kept on disk, in MB")
    flag("context", count, None, "tokens in the window, from 64 to block_size", "block_size")
    flag("max_new_tokens", count, 200, "tokens of an answer at most")
    flag("temperature", amount, 0.8, "0 takes the likeliest token, 1 the model's own distribution")
    flag("top_k", count, None, "draw from so many likeliest tokens only", "all")
    flag("seed", at_least(int, 0), 1337, "of the sampling")
    flag("device", device, "cpu", "cpu, cuda, cuda:1 or mps")
    flag("dtype", str, "float32", "of weights and cache", choices=["float32", "bfloat16"])
    flag("share", str, "", "spans to share in a model trained without, zero-shot", "as trained")
    flag("share_kind", share_kind, "weights", "with --share: weights (Shared Attention), kv (Cross-Layer "
         "Attention) or the NAME of a kind in minisa/axes")
    return parser.parse_args()

def main():
    args = read_flags()
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")     # odd bytes cost their line, not all input
    dtype = getattr(torch, args.dtype)
    model, tokenizer, _ = load(args.model, args.share, args.share_kind, args.device, dtype)
    block_size = model.config.block_size
    store = Store(model, args.store, args.store_memory * MB, args.store_disk * MB,
                  min(args.context or block_size, block_size))
    with lock(args.store) if args.store else nullcontext():
        Chat(args.model, model, tokenizer, store, args).run()

if __name__ == "__main__":
    command(main)
