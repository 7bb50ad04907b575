"""A chat in the terminal, which continues where you left off.

    python -m minisa.lab.chat smollm2
    python -m minisa.lab.chat smollm2 --store=out/chat      the conversation and its cache are kept there
    python -m minisa.lab.chat smollm2 --share=26-28         with layers that share, zero-shot

/reset starts over, /undo takes the last turn back, /bill shows what the cache costs. Ctrl-C stops an answer,
Ctrl-D (on Windows: Ctrl-Z and Enter) ends the chat.

A conversation is one growing list of tokens, in the format that the model was trained on (ChatML):

    <|im_start|>user\\n … <|im_end|>\\n<|im_start|>assistant\\n … <|im_end|>\\n

At each turn the store provides the cache of what was read before, and the model reads the rest.
"""

import json
import os
import sys
import time
from contextlib import nullcontext, suppress
from itertools import chain
from pathlib import Path

import torch

from minisa.axes.store import Damaged, Store
from minisa.cost import predict
from minisa.kit.checkpoint import add_share_kind, load
from minisa.kit.cli import Parser, add_device, add_dtype, add_model, amount, command, count, whole
from minisa.kit.files import lock, read_file, set_aside, write_file

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
END = "Ctrl-Z and Enter" if os.name == "nt" else "Ctrl-D"
HELP = f"/reset starts over, /undo takes the last turn back, /bill shows what the cache costs, {END} ends"
MB = 2**20
LONGEST = 2**16         # characters of a line
MOST = 2**20            # tokens of a conversation

def read_line():
    """→ a line of the input, "" at its end, and "\n" in place of one that is too long."""
    line = rest = sys.stdin.readline(LONGEST)
    while rest and not rest.endswith("\n"):             # skip the rest of such a line
        rest = sys.stdin.readline(LONGEST)
    if len(line) == LONGEST:
        print(f"longer than {LONGEST:,} characters: say it in parts", file=sys.stderr)
        return "\n"
    return line

def special(tokenizer):
    """The ids of <|im_start|> and <|im_end|>. Raises ValueError if the tokenizer has none."""
    ids = {tokenizer.decode([i]): i for i in tokenizer.special}
    try:
        return ids["<|im_start|>"], ids["<|im_end|>"]
    except KeyError:
        raise ValueError("this model has no chat format with <|im_start|> and <|im_end|>; take "
                         "smollm2") from None

class Chat:
    """A conversation in the terminal: the tokens of the system's message, and of each turn.

    args: the flags of main(). Raises ValueError if the model has no chat format, OSError if an earlier
    conversation cannot be read.
    """

    def __init__(self, model, tokenizer, store, args):
        self.model, self.tokenizer, self.store, self.args = model, tokenizer, store, args
        self.start, self.stop = special(tokenizer)
        self.generator = torch.Generator(args.device).manual_seed(args.seed)
        self.identity = tokenizer.identity
        self.parts, self.cache = [self.message("system", SYSTEM)], None
        self.file = Path(args.store, "chat.json") if args.store else None
        if self.file and os.path.lexists(self.file):
            self.open()

    def open(self):
        """Continue the conversation in the file, or rename the file if that is not possible."""
        data = read_file(self.file)                         # or it raises, and stays as it is
        try:
            saved = json.loads(data)
            parts, tokens = saved["parts"], [*chain(*saved["parts"])]
            known = all(type(i) is int and 0 <= i < self.tokenizer.vocab_size for i in tokens)
            if 0 < len(tokens) <= MOST and known and saved["tokenizer"] == self.identity:
                self.parts = parts
                print(f"continuing a conversation of {len(parts) - 1} turns, {len(tokens):,} tokens")
                return
        except (ValueError, LookupError, TypeError, RecursionError):
            pass
        old = set_aside(self.file)
        print(f"{self.file} cannot be continued: it is damaged, or of a model with another tokenizer; it is "
              f"kept as {old}, and this is a new conversation", file=sys.stderr)

    def save(self):
        """Write the file. Say so if that, or what the store does in the background, fails."""
        if not self.file:
            return
        state = {"tokenizer": self.identity, "parts": self.parts}
        trouble, self.store.disk.trouble = self.store.disk.trouble, None
        try:
            write_file(self.file, json.dumps(state).encode(), private=True)
        except OSError as error:
            trouble = error
        if trouble:
            print(f"the store does not save: {trouble}", file=sys.stderr)

    def message(self, role, text):
        """→ its tokens. What looks like a special token in the text stays text."""
        encode = self.tokenizer.encode
        return [self.start, *encode(f"{role}\n{text}"), self.stop, *encode("\n")]

    def run(self):
        """Talk until the input ends."""
        sys.stdin.reconfigure(errors="surrogateescape")     # the tokenizer knows bytes that are not UTF-8
        print(HELP)
        while True:
            print("\n> " if sys.stdin.isatty() else "", end="", flush=True)
            line = read_line()
            if not line:
                break
            text = line.strip()
            if text in ("/reset", "/undo"):
                self.forget(1 if text == "/undo" else len(self.parts))
            elif text == "/bill":
                self.bill()
            elif text.startswith("/"):
                print(HELP)
            elif text:
                self.turn(text)
        print()
        self.store.close()

    def forget(self, n):
        """Take back the last n turns, or all there are."""
        del self.parts[max(1, len(self.parts) - n):]
        self.cache = None
        self.save()
        print(f"{len(self.parts) - 1} turns")

    def bill(self):
        """Print what the cache of the last answer costs."""
        context = min(self.cache.length, self.cache.size) if self.cache else 1
        size = self.model.embed.weight.element_size()
        cost = predict(self.model, context, bytes_per_number=size)
        print(f"{cost.params:,} parameters; cache of {context:,} tokens: {cost.cache_bytes:,} bytes, "
              f"{cost.cache_bytes_per_token:,} per token; {cost.decode_flops:,} FLOPs for the next token")

    def turn(self, text):
        """Send a message; print the answer as it is generated, and the time it took."""
        message, made, began = self.message("user", text), [], time.perf_counter()
        so_far = sum(map(len, self.parts))
        if len(message) > self.store.size or so_far + len(message) > MOST:
            print(f"{len(message):,} tokens do not fit into the window of {self.store.size:,}, or the "
                  f"conversation of at most {MOST:,}: say it in parts, or /reset", file=sys.stderr)
            return
        self.parts.append([*message, self.start, *self.tokenizer.encode("assistant\n")])
        tokens = [*chain(*self.parts)]
        try:
            reused, answer = self.read(tokens)
            first = time.perf_counter()
            for piece in self.tokenizer.decode_stream(self.until_end(answer, made)):
                print(piece, end="", flush=True)
        except KeyboardInterrupt:                           # stops the answer, not the chat
            if not made:
                print("\n[stopped]")
                return self.forget(1)
        speed = len(made) / max(time.perf_counter() - first, 1e-9)
        cut = ", cut at --max_new_tokens" if len(made) == self.args.max_new_tokens else ""
        self.parts[-1] += [*made, self.stop, *self.tokenizer.encode("\n")]
        if self.cache:
            self.store.save(tokens + made, self.cache)
        print(f"\n[first token after {first - began:.2f} s, {reused:,} of {len(tokens):,} tokens reused, "
              f"{speed:.0f} tokens/s{cut}]", flush=True)
        self.save()

    def read(self, tokens):
        """Read the part of the conversation that the store lacks → how many tokens the store had, and an
        iterator over the tokens of the answer, the first of which is ready."""
        args = self.args
        while True:
            self.cache = self.store.load(tokens)
            reused = self.cache.length
            ids = torch.tensor([tokens[reused:]], device=args.device)
            stream = self.model.stream(ids, args.max_new_tokens, args.temperature, args.top_k, self.generator,
                                       self.cache)
            with suppress(Damaged):                         # the next try does without that block
                return reused, chain([int(next(stream))], map(int, stream))

    def until_end(self, answer, made):
        """Yield the tokens of an answer before <|im_end|>, and append them to `made`."""
        try:
            for token in answer:
                if token == self.stop:
                    return
                made.append(token)
                yield token
        except KeyboardInterrupt:                           # perhaps between two layers of the cache
            self.cache = None
            raise

def read_flags():
    parser = Parser(__doc__, usage="python -m minisa.lab.chat MODEL [--FLAG=VALUE ...]")
    add_model(parser)
    flag = parser.flag
    flag("store", str, None, "folder in which the conversation and its KV cache are kept",
         "none, in memory only")
    flag("store_memory", count, 1024, "KV caches of past turns kept in memory, in MB")
    flag("store_disk", count, 4096, "with --store: KV caches kept on disk, in MB")
    flag("context", count, None, "tokens in the window, from 64 to block_size", "block_size")
    flag("max_new_tokens", count, 200, "tokens of an answer at most")
    flag("temperature", amount, 0.8, "0 takes the likeliest token, 1 the model's own distribution")
    flag("top_k", count, None, "draw only from this many likeliest tokens", "all")
    flag("seed", whole, 1337, "random seed for sampling")
    add_device(parser)
    add_dtype(parser)
    flag("share", str, "", "spans to share in a model trained without, zero-shot", "as trained")
    add_share_kind(parser)
    return parser.parse_args()

def main():
    args = read_flags()
    dtype = getattr(torch, args.dtype)
    model, tokenizer, _ = load(args.model, args.share, args.share_kind, args.device, dtype)
    block_size = model.config.block_size
    store = Store(model, args.store, args.store_memory * MB, args.store_disk * MB,
                  min(args.context or block_size, block_size))
    with lock(args.store) if args.store else nullcontext():
        Chat(model, tokenizer, store, args).run()

if __name__ == "__main__":
    command(main)
