"""Generate text with trained models, and print a table of what each costs, the bill: parameters, loss,
cache, FLOPs, speed.

    python sample.py                          every run in out/
    python sample.py out/full out/weights-1-3 --prompt="ROMEO:" --temperature=0.8
    python sample.py out/full --share=1-3     weights trained with full attention, made to share
    python sample.py smollm2 --share=26-28 --prompt="Once upon a time"
    python sample.py smollm2 --squeeze=307    caches that keep 307 tokens a layer (minisa/axes/squeeze.py)
    python sample.py smollm2 --cache_bits=8   caches in int8 (minisa/axes/bits.py)
"""

import minisa  # isort: skip  # noqa: F401 (before torch, as it sees to Ctrl-C)
import json
import math
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from minisa import cost
from minisa.axes import squeeze
from minisa.decode import handles
from minisa.kit.checkpoint import add_share_kind, described, load, reconfigure
from minisa.kit.cli import (
    Parser,
    add_device,
    add_dtype,
    amount,
    command,
    count,
    prompt,
    table,
    whole,
)
from minisa.kit.data import data_of
from minisa.kit.results import print_table, write_results
from minisa.kit.timing import share_of_limit
from minisa.model import GPT, KVCache

def read_flags():
    parser = Parser(__doc__, usage="python sample.py [MODEL ...] [--FLAG=VALUE ...]")
    parser.add_argument("models", nargs="*", metavar="MODEL", help="folders of runs or models, .gguf files, "
                        "or smollm2, which is downloaded once (default: every run in out/)")
    flag = parser.flag
    flag("share", str, "", "spans to share, zero-shot (with no more training), in models trained without: "
         "each is reported with and without sharing", "none")
    add_share_kind(parser)
    flag("prompt", prompt, "\n", "text to continue; - is standard input, FILE:NAME the text of a file")
    flag("num_samples", count, 1, "texts per model")
    flag("max_new_tokens", count, 200, "length of a text, in tokens")
    flag("temperature", amount, 0.8, "0 picks the most likely token; 1 samples unmodified")
    flag("top_k", count, None, "sample only from the N most likely tokens", "all")
    flag("seed", whole, 1337, "random seed for sampling: same seed, same text")
    flag("context", count, 1024, "context length for the bill, in tokens; capped at block_size")
    flag("eval_tokens", count, 4096, "validation tokens used to measure the loss of a downloaded model, or "
         "with --squeeze or --cache_bits")
    squeeze.add_flags(parser)
    add_dtype(parser)
    add_device(parser)
    flag("csv", table, None, "file to write the bill to, as .csv; python -m minisa.lab.plot draws it", "none")
    parser.switch("json", "also print the bill as one line of JSON, the last")
    return parser.parse_intermixed_args()

# ---- what is sampled: models, each with one or more ways to keep its cache ----

# A way says what a model's cache keeps. By default there is one, squeeze.Whole: all tokens. With --squeeze
# there is also a squeeze.Squeezing for each policy, a rule that says which tokens to keep, and with
# --cache_bits a squeeze.Stored: all tokens, in fewer bits.

@dataclass
class Case:
    """A row of the bill."""
    source: str
    model: GPT
    tokenizer: object
    way: squeeze.Whole          # what the cache keeps: all (Whole), some (Squeezing), fewer bits (Stored)
    val_bpb: float | None       # loss in bits per byte of validation text; None: not known
    context: int                # tokens in the cache that is billed
    cache: object               # the cache to bill; None: an ordinary KVCache

    @property
    def name(self):
        return self.way.name(self.source)

def sources(args):
    """The models that the flags name, or every run in out/."""
    runs = [file.parent.as_posix() for file in Path("out").glob("*/config.json")]
    found = args.models or sorted(runs)
    if not found:
        raise ValueError("there is no trained model in out/; train one with: python train.py")
    return found

def cases(args):
    """Yield a Case for each model, as it is and with --share, and each way to keep its cache."""
    for source in sources(args):
        dtype = getattr(torch, args.dtype)
        model, tokenizer, info = load(source, device=args.device, dtype=dtype)
        models = [(model, info)]
        if args.share and (args.models or not model.config.share):      # of out/, only what shares nothing
            shared = reconfigure(model, share=args.share, share_kind=args.share_kind)
            models.append((shared, {**info, "val_bpb": None}))
        for model, info in models:
            context = min(args.context, model.config.block_size)
            ways = squeeze.ways_of(args, model)
            all_bpb = losses(source, model, tokenizer, info, args, ways)
            for way, bpb in zip(ways, all_bpb):
                if bpb is not None and not math.isfinite(bpb):
                    raise ValueError(f"{source}: its loss is {bpb}, so its weights are damaged; train or "
                                     "convert it again")
                cache = way.for_bill(model, partial(data_of, info, tokenizer), context)
                yield Case(source, model, tokenizer, way, bpb, context, cache)

def losses(source, model, tokenizer, info, args, ways):
    """→ the bits per byte of validation text with each way to keep the cache. If the text that the
    model was trained on is gone: None, or with several ways a ValueError."""
    several = len(ways) > 1
    if info["val_bpb"] and not several:
        return [info["val_bpb"]]
    try:
        data = data_of(info, tokenizer)
    except ValueError as error:
        if several:
            raise
        print(f"the loss of {source} is not known: {error}", file=sys.stderr)
        return [None]
    print(f"measuring the loss of {source} on {data.name}", file=sys.stderr, flush=True)
    if several:
        return squeeze.bits_per_byte(model, data, args.context, args.eval_tokens, ways)
    tokens = None if info["data"] else args.eval_tokens
    return [data.evaluate(model, tokens)[1]]

# ---- text ----

def generate(case, args):
    """Stream the texts to stdout. → the length of the prompt in tokens, and seconds from the second token
    of each text to its last, added up. (The first token includes reading the prompt, and the second
    preparing the weights.)"""
    model, tokenizer = case.model, case.tokenizer
    tokens = tokenizer.encode(args.prompt)
    if not tokens:
        raise ValueError("--prompt: this model has no token for any of it; take another text")
    # each layer sees block_size tokens back, and what those saw in the layer below
    farthest = model.config.block_size * len(model.blocks)
    ids = torch.tensor([tokens[-farthest:]], device=args.device)
    seconds = 0.0
    for sample in range(args.num_samples):
        generator = torch.Generator(args.device).manual_seed(args.seed + sample)
        # with squeeze.Whole, all of ids is unread, and cache is None: stream() makes a KVCache
        unread, cache = case.way.begin(model, ids)
        stream = model.stream(unread, args.max_new_tokens, args.temperature, args.top_k, generator, cache)
        times = []
        print(args.prompt, end="", flush=True)
        for text in tokenizer.decode_stream(timed(stream, times)):
            print(text, end="", flush=True)
        print("\n" + "-" * 80, flush=True)
        start = times[:2][-1]                   # that of the second token, or of an only one
        seconds += times[-1] - start
    return ids.size(1), seconds

def timed(stream, times):
    """Yield the ids of a stream of tokens (1, 1), and note when each came."""
    for token in stream:
        token = token.item()                                    # waits for a GPU
        times.append(time.perf_counter())
        yield token

# ---- the bill: facts, speed, costs ----

def facts(case):
    """→ the columns of the bill on what was sampled."""
    return {"model": case.source, **described(case.model), **case.way.facts, "val_bpb": case.val_bpb}

def predict(case, context):
    """→ the Cost of a token with this context, in closed form."""
    if case.cache:
        return case.cache.predict(case.model, context)
    bytes_per_number = case.model.embed.weight.element_size()
    return cost.predict(case.model, context, bytes_per_number=bytes_per_number)

def speed_of(case, args, n_prompt, seconds):
    """→ the columns of the bill on decoding speed, None where it is not known."""
    n_timed = args.max_new_tokens - 2
    if n_timed < 1:
        return {"tokens_per_s": None, "share_of_limit": None}
    visible = [min(n_prompt + n, case.model.config.block_size) for n in range(2, args.max_new_tokens)]
    mean_context = round(sum(visible) / n_timed)
    speed = args.num_samples * n_timed / seconds
    read_bytes = predict(case, mean_context).read_bytes
    return {"tokens_per_s": speed, "share_of_limit": share_of_limit(read_bytes, 1 / speed, args.device)}

COSTS = {       # column → the field of a minisa.cost.Cost
    "parameters": "params",
    "cache_bytes_per_token": "cache_bytes_per_token",
    "cache_bytes": "cache_bytes",
    "read_bytes": "read_bytes",
    "flops": "decode_flops",
}

def costs_of(case):
    """→ the columns of the bill that are predicted and counted; where the two differ, both."""
    context = case.context
    # the engine that generates after the prompt: decode.py in numpy, or model.py in torch
    engine = "numpy" if handles(case.model, case.cache or KVCache(case.model, 1, 1)) else "torch"
    predicted = predict(case, context)
    counted = cost.measure(case.model, context, cache=case.cache, engine=engine)
    row = {"context": context, "engine": engine}
    for column, field in COSTS.items():
        ours, theirs = getattr(predicted, field), getattr(counted, field)
        row[column] = ours if ours == theirs else f"ERROR: predicted {ours:,}, counted {theirs:,}"
    return row

# ---- the table ----

SHOWN = {       # column → its title and format in the terminal
    "parameters": ("parameters", "{:,}"),
    "val_bpb": ("val bpb", "{:.4f}"),
    "cache_bytes_per_token": ("cache B/token", "{:,}"),
    "context": ("context", "{:,}"),
    "cache_bytes": ("cache B", "{:,}"),
    "read_bytes": ("read B/token", "{:,}"),
    "flops": ("FLOPs/token", "{:,}"),
    "tokens_per_s": ("tokens/s", "{:,.0f}"),
    "share_of_limit": ("of limit", "{:.2f}"),
    "engine": ("engine", "{}"),
}

def sharing(row):
    """What a row's model shares, and what changed it, in words."""
    shared = f"{row['share_kind']} {row['share']}" if row["share"] else "none"
    return ", ".join(filter(None, [shared, row["changes"]]))

def show(names, rows):
    """Print the bill as a table."""
    lines = [["model", "sharing", *(title for title, _ in SHOWN.values())]]
    for name, row in zip(names, rows):
        cells = [form(row[column], layout) for column, (_, layout) in SHOWN.items()]
        lines.append([name, sharing(row), *cells])
    print_table(lines, words=2)

def form(value, layout):
    if value is None:
        return "?"
    return value if isinstance(value, str) else layout.format(value)

def main():
    args = read_flags()
    names, rows = [], []
    for case in cases(args):
        row = facts(case)
        print(f"{case.name}, sharing {sharing(row)}\n" + "-" * 80)
        n_prompt, seconds = generate(case, args)
        row |= speed_of(case, args, n_prompt, seconds) | costs_of(case)
        names.append(case.name)
        rows.append(row)
    show(names, rows)
    agree = not any(str(value).startswith("ERROR") for row in rows for value in row.values())
    print("Parameters, cache, bytes read and FLOPs were predicted in closed form, and counted on the real "
          f"model: {'they agree' if agree else 'THEY DIFFER'}.")
    if args.csv:
        write_results(args.csv, rows)
    if args.json:
        print(json.dumps({"bill": rows, "predictions_met": agree}))
    return 0 if agree else 1

if __name__ == "__main__":
    command(main)
