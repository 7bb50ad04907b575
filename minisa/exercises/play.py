"""Your answers in a real model: it generates text, and its reuse layers are yours.

    python -m minisa.exercises play --answers=mine.py                      out/weights-1-3, or out/full
    python -m minisa.exercises play out/full --share=1-3 --answers=mine.py
    python -m minisa.exercises play smollm2 --answers=mine.py --prompt="Once upon a time"

roles() says which layers are yours. reuse_layer() reads the prompt there, and decode() writes one token after
the other, with the cache that it fills. The rest of the model is minisa's.

A text looks plausible however wrong the code is. So below it a table compares yours with minisa's: how many
tokens are the same, with the same seed; the loss on a passage of a held-out play, half of it read, half of it
decoded; and the bill by cache_bytes() and decode_flops(), beside what minisa counts.
"""

import sys
from itertools import takewhile, tee
from pathlib import Path

import torch
from torch.nn import functional as F

from minisa.cost import measure
from minisa.exercises.child import describe, read_answers
from minisa.kit.checkpoint import changes, load, reconfigure
from minisa.kit.cli import Parser, amount, command, count, prompt, whole
from minisa.kit.results import print_table
from minisa.model import PREFILL_CHUNK, KVCache, SharedAttention

ROLES = {"Attention": "full", "Anchor": "anchor", "SharedAttention": "reuse"}       # by their classes

def read_flags():
    parser = Parser(__doc__, usage="python -m minisa.exercises play [MODEL] [--FLAG=VALUE ...]")
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a run's folder, or smollm2 (default "
                        "out/weights-1-3, or out/full if that is not there)")
    parser.flag("answers", default="mine.py", help="Python file with your answers")
    parser.flag("share", default="", help="layers to share in a model trained without, zero-shot",
                shown="26-28 in smollm2, else all but the first")
    parser.flag("prompt", prompt, "ROMEO:", "text to continue; the end of it, if it is long")
    parser.flag("max_new_tokens", count, 200, "length of the text, in tokens")
    parser.flag("temperature", amount, 0.8, "0 takes the likeliest token, 1 the model's own distribution")
    parser.flag("seed", whole, 1337, "random seed for sampling: same seed, same text")
    return parser.parse_intermixed_args()

# ---- your functions ----

class Yours:
    """The functions of a file of answers. An error in one is a ValueError that names its line."""

    def __init__(self, file):
        if not Path(file).is_file():
            raise ValueError(f"--answers={file}: no such file; copy minisa/exercises/answers.py")
        self.file = str(Path(file).resolve())
        self.module = self.run("the file", read_answers, self.file)

    def run(self, name, function, *arguments):
        try:
            return function(*arguments)
        except NotImplementedError:
            raise ValueError(f"{Path(self.file).name}: {name} is not answered yet") from None
        except (Exception, SystemExit) as error:
            raise ValueError(f"{Path(self.file).name}: {name}: {describe(error, self.file)}") from None

    def call(self, name, *arguments):
        if not hasattr(self.module, name):
            raise ValueError(f"{Path(self.file).name}: has no function {name}; take it from "
                             "minisa/exercises/answers.py")
        return self.run(name, getattr(self.module, name), *arguments)

    def tensor(self, name, shape, *arguments):
        """call() what must give a tensor of this shape."""
        y = self.call(name, *arguments)
        if not isinstance(y, torch.Tensor) or y.shape != shape:
            came = tuple(y.shape) if isinstance(y, torch.Tensor) else type(y).__name__
            raise ValueError(f"{Path(self.file).name}: {name} gave {came}, expected {tuple(shape)}")
        return y.to(torch.float32)

class YourLayer(SharedAttention):
    """A reuse layer that computes as the answers do, with a cache of their making."""
    yours = None

    def forward(self, x, step, P):
        """x (1, T, C), P (1, H, T, S) → y (1, T, C), and P."""
        x, T, H = x[0], x.size(1), self.H
        W_v, W_out = self.qkv.weight.detach(), self.out.weight.detach()
        v = (x @ W_v.T).view(T, self.G, -1)                         # (T, G, D)
        if step.cache.length == T:                                  # the prompt
            self.values = list(v)
            y = self.yours.tensor("reuse_layer", x.shape, P[0], x, W_v, W_out)
            return y[None], P
        by_age = step.cache.positions.argsort()                     # the cache of minisa is a ring
        if len(self.values) == step.cache.size:
            del self.values[0]
        shape = H, v.size(2)
        z = self.yours.tensor("decode", shape, self.values, P[0, :, 0, by_age], v[0])
        if len(self.values) != len(by_age):
            raise ValueError(f"decode left {len(self.values)} tokens in the cache, expected {len(by_age)}")
        return (z.reshape(1, -1) @ W_out.T)[None], P

def put_in(model, yours):
    """→ the model, with reuse layers that the answers compute, and the roles of its layers. Raises ValueError
    if roles() gives others."""
    model = reconfigure(model)
    config = model.config
    roles = yours.call("roles", config.share, config.n_layer)
    expected = [ROLES[type(block.attn).__name__] for block in model.blocks]
    if roles != expected:
        raise ValueError(f"roles({config.share!r}, {config.n_layer}) gave {str(roles)[:200]}, "
                         f"expected {expected}")
    for layer, (block, role) in enumerate(zip(model.blocks, roles)):
        if role == "reuse":
            mine = YourLayer(config, layer)
            mine.load_state_dict(block.attn.state_dict())
            mine.yours = yours
            block.attn = mine.eval()
    return model, roles

def open_model(args):
    """→ a model that shares attention weights, its tokenizer, and its name."""
    default = "out/weights-1-3" if Path("out/weights-1-3").exists() else "out/full"
    source = args.model or default
    model, tokenizer, _ = load(source)
    last = model.config.n_layer - 1
    share = args.share or model.config.share or ("26-28" if source == "smollm2" else f"1-{last}")
    model = reconfigure(model, share=share)
    if changes(model) or model.config.share_kind != "weights":
        raise ValueError(f"{source}: shares in another way than Shared Attention; take out/weights-1-3")
    return model, tokenizer, source

# ---- text, loss and bill ----

# the first lines of Twelfth Night, which is held out of the training text
PASSAGE = """DUKE ORSINO:
If music be the food of love, play on;
Give me excess of it, that, surfeiting,
The appetite may sicken, and so die.
That strain again! it had a dying fall:
O, it came o'er my ear like the sweet sound,
That breathes upon a bank of violets,
Stealing and giving odour! Enough; no more:
'Tis not so sweet now as it was before.
"""

def stream(model, tokens, args):
    """Yield the ids of the tokens that follow."""
    cache = KVCache(model, 1, model.config.block_size)
    generator = torch.Generator().manual_seed(args.seed)
    ids = torch.tensor([tokens[-min(cache.size, PREFILL_CHUNK):]])
    for token in model.stream(ids, args.max_new_tokens, args.temperature, None, generator, cache):
        yield token.item()

@torch.inference_mode()
def loss(model, ids):
    """→ nats per token of ids (1, T): the first half is read, the rest decoded one by one."""
    T = ids.size(1)
    cache, half = KVCache(model, 1, T), T // 2
    parts = [ids[:, :half], *ids[:, half:-1].split(1, dim=1)]
    logits = torch.cat([model(part, cache=cache)[0] for part in parts], dim=1)
    return F.cross_entropy(logits[0], ids[0, 1:]).item()

def bill(config, roles, yours, context, counted):
    """→ rows of a table: what the answers predict, and the Cost that minisa counted on a real step."""
    heads = config.n_head, config.n_kv_head, config.n_embd

    def predicted(function):
        try:
            return f"{function():,}"
        except (ValueError, TypeError) as error:
            return str(error)

    def flops():
        total = 2 * config.n_embd * config.vocab_size               # the logits
        for role in roles:
            total += yours.call("decode_flops", role, "weights", *heads, config.n_hidden, context)
        return total

    def size():
        return yours.call("cache_bytes", roles, "weights", *heads, context, 4)

    return [[f"cache of {context:,} tokens, in bytes", predicted(size), f"{counted.cache_bytes:,}"],
            ["FLOPs of one more token", predicted(flops), f"{counted.decode_flops:,}"]]

def main():
    args = read_flags()
    yours = Yours(args.answers)
    model, tokenizer, source = open_model(args)
    tokens = tokenizer.encode(args.prompt)
    if not tokens:
        raise ValueError("--prompt: this model has no token for any of it; take another text")
    context = min(len(tokens) + args.max_new_tokens, model.config.block_size)
    counted = measure(model, context)
    mine, roles = put_in(model, yours)
    print(f"{source}, layers {model.config.share} share; those that reuse are yours\n", file=sys.stderr)
    print(args.prompt, end="", flush=True)
    written, again = tee(stream(mine, tokens, args))
    for text in tokenizer.decode_stream(written):
        print(text, end="", flush=True)
    print("\n")
    same = takewhile(lambda pair: pair[0] == pair[1], zip(again, stream(model, tokens, args)))
    passage = torch.tensor([tokenizer.encode(PASSAGE)[:model.config.block_size]])
    losses = [f"{loss(each, passage):.4f}" for each in (mine, model)]
    print_table([["", "yours", "minisa's"],
                 ["tokens until the first that differs", f"{len(list(same)):,}", f"{args.max_new_tokens:,}"],
                 ["loss on a passage, in nats per token", *losses],
                 *bill(model.config, roles, yours, context, counted)])

if __name__ == "__main__":
    command(main)
