"""How fast models train, read a prompt and decode on this machine.

    python -m minisa.lab.bench modes --shapes=small,large,long      full attention and both kinds of sharing
    python -m minisa.lab.bench model smollm2 --share=26-28          a model from a file, as it is and sharing
    python -m minisa.lab.bench sweep --over=context                 as the context grows from 256 to 32,768
    python -m minisa.lab.bench sweep --share_kind=weights,kv,top-64     and beside another kind of sharing

`python -m minisa.lab.bench COMMAND --help` lists the flags of each. minisa/lab/peers.py measures nanoGPT and
Hugging Face transformers in the same way.

Each figure is a median over rounds. In a round everything is timed in turn, so that a machine that slows down
or speeds up meanwhile affects all figures alike. Tokens are generated as generate() does it: in numpy where
minisa/decode.py can, in torch elsewhere; --torch adds rows that decode in torch. The limit of a decode step
is the time in which main memory delivers what the step reads (`read_bytes` of minisa/cost.py), at the speed
at which this machine reads a large tensor, measured in the same rounds. What fits into the processor's cache
has no limit.
"""

import math
import statistics
import sys
import time
from functools import partial
from inspect import getdoc

import torch

from minisa.cost import predict
from minisa.decode import handles
from minisa.kit.checkpoint import add_share_kind, kind, load, reconfigure
from minisa.kit.cli import Parser, add_device, add_dtype, add_models, command, count, one_of, several, table
from minisa.kit.machine import choose_dtype, keep_memory, number_format
from minisa.kit.results import print_table, write_results
from minisa.kit.timing import LARGE, in_cache, reader, timed
from minisa.model import GPT, GPTConfig, KVCache

SHAPES = {                  # the config; batch size and tokens of a training step (None: not trained)
    "small": ({"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 256}, (8, 128)),
    "large": ({"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256}, (8, 256)),
    "long": ({"n_layer": 6, "n_head": 2, "n_embd": 128, "block_size": 8192}, None),
    "recipe": ({"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 256, "vocab_size": 65}, (12, 64)),
}
GROWING = {"n_layer": 6, "n_head": 4, "n_embd": 256, "block_size": 2**15}      # 5 M parameters
SWEPT = {                                                   # (context, batch size) of each point
    "context": [(2**i, 1) for i in range(8, 16)],
    "batch_size": [(1024, 2**i) for i in range(7)],
}
SWEPT_FILES = SWEPT | {"context": [(128, 1), (512, 1), (2048, 1), (8192, 1)]}
DECODED = 32            # tokens after a prompt that are timed
LONG_ENOUGH = 0.25      # seconds of decoding in a round: at first, caches are cold and threads asleep
PAUSE = 0.1             # seconds in which the waiting threads of torch and numpy go to sleep

# ---- results: a row says what was measured, and how fast it was ----

COLUMNS = ("model library share share_kind dtype engine work context batch_size "
           "tokens_per_s ms_per_token limit_ms_per_token cache_bytes read_bytes").split()
HIDDEN = "cache_bytes"                                      # in the terminal

def row_of(name, model, work, context, batch_size=1, library="minisa"):
    """→ a row without speed. context: for work = "train" or "prefill" the tokens of a sequence, for "decode"
    those that each new token sees. model: a GPT, or another library's."""
    dtype = next(model.parameters()).dtype
    row = dict.fromkeys(COLUMNS, "")
    row |= {
        "model": name,
        "library": library,
        "dtype": str(dtype).removeprefix("torch."),
        "engine": "torch",
        "work": work,
        "context": context,
        "batch_size": batch_size,
    }
    if library != "minisa":
        return row
    if model.config.share:
        row["share"] = model.config.share
        row["share_kind"] = model.config.share_kind
    if work == "decode":
        cost = predict(model, context, batch_size, dtype.itemsize)
        row["cache_bytes"] = cost.cache_bytes
        row["read_bytes"] = cost.read_bytes
        if handles(model, KVCache(model, batch_size, 1)):
            row["engine"] = "numpy"
    return row

def medians(clocks, rounds, title):
    """clocks: functions → seconds. They run in turn, each once a round → the median of each. One more round,
    before the others, warms up."""
    seconds = [[] for _ in clocks]
    for i in range(rounds + 1):
        print(f"\r\033[K{title}: round {i} of {rounds}", end="", file=sys.stderr, flush=True)
        for clock, measured in zip(clocks, seconds):
            time.sleep(PAUSE)
            measured.append(clock())
    print("\r\033[K", end="", file=sys.stderr, flush=True)
    return [statistics.median(measured[1:]) for measured in seconds]

def measure(title, works, rounds, where):
    """works: [(row, a function → seconds)], timed in turn. Print and → the rows, with their speeds."""
    rows, clocks = zip(*works)
    read_memory = partial(timed, reader(where), where)
    memory, *seconds = medians([read_memory, *clocks], rounds, title)
    for row, took in zip(rows, seconds):
        each = 1 if row["work"] == "decode" else row["context"]
        tokens = row["batch_size"] * each
        row["tokens_per_s"] = round(tokens / took, 2)
        row["ms_per_token"] = round(1e3 * took / tokens, 6)
        read_bytes = row["read_bytes"]
        if read_bytes and not in_cache(read_bytes, where):
            limit = read_bytes / LARGE * memory
            row["limit_ms_per_token"] = round(1e3 * limit / tokens, 6)
    print(f"{title}; this machine reads {1e-9 * LARGE / memory:.1f} GB/s")
    show(rows)
    return rows

def show(rows):
    """Print rows as a table. "÷ first": speed over that of the first row that does the same work."""
    shown = [name for name in COLUMNS if name != HIDDEN]
    lines, first = [[*shown, "÷ first"]], {}
    for row in rows:
        speed = row["tokens_per_s"]
        over_first = speed / first.setdefault(row["work"], speed)
        cells = [str(row[name]) for name in shown]
        lines.append([*cells, f"{over_first:.2f}"])
    print_table(lines, words=7)
    print(flush=True)

# ---- work: what is timed, as (row, a function → seconds) ----

def train_work(name, model, training, dtype, where, library="minisa", optimizer=None):
    """Steps of training in a number format."""
    batch_size, T = training
    row = row_of(name, model, "train", T, batch_size, library)
    row["dtype"] = dtype
    if not optimizer:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    shape = 2, batch_size, T
    x, y = torch.randint(model.config.vocab_size, shape, device=where)
    autocast = number_format(model, dtype)

    def step():
        with autocast:
            loss = model(x, y)[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return row, partial(timed, step, where)

def prompt(model, T, batch_size=1):
    """→ a prompt of token 1 repeated (batch size, T). Not 0, which transformers takes for padding."""
    device = next(model.parameters()).device
    return torch.ones(batch_size, T, dtype=torch.long, device=device)

def decoder(model, context, batch_size):
    """→ a function that generates one token per sequence, which sees `context` keys, as generate() does."""
    cache = KVCache(model, batch_size, context)
    for t in cache.tensors:
        t.normal_()
    cache.length = context                                  # full: a new token overwrites the oldest
    idx = prompt(model, 1, batch_size)
    stream = model.stream(idx, 2**62, temperature=0.8, cache=cache)
    next(stream)                                            # the prompt, read by torch
    return partial(next, stream)

def decode_work(name, model, context, batch_size, where):
    """Decoding with a full cache."""
    row = row_of(name, model, "decode", context, batch_size)
    step = decoder(model, context, batch_size)
    return row, partial(timed, step, where, LONG_ENOUGH)

class OnTorch(GPT):
    """A GPT of the same layers as another, which decodes in torch: decode.py does not know this class."""

    def __init__(self, model):
        vars(self).update(vars(model))

def token_times(model, T, n):
    """→ the times at which a prompt of T tokens was ready, and each of n tokens after it, in seconds."""
    idx, times = prompt(model, T), [time.perf_counter()]
    for token in model.stream(idx, n, 0):
        int(token)                                          # waits for a GPU
        times.append(time.perf_counter())
    return times

def first_token(model, T, times=token_times):
    """Seconds from a prompt to its first token. times: token_times(), or another library's."""
    begin, first = times(model, T, 1)
    return first - begin

def per_token(model, T, n, times=token_times):
    """Seconds per token of n tokens, after a prompt and two: the second step makes the weights ready."""
    _, _, second, *_, last = times(model, T, n + 2)
    return (last - second) / n

def text_works(models, size, times=token_times, library="minisa"):
    """models: [(name, model), ...], with contexts of at least `size` tokens. Decoding after a short prompt,
    and, in float32, prefill of a long one."""
    short = min(128, math.ceil(size / 4))
    long = min(2048, math.ceil(size / 2))
    context = min(short + DECODED // 2, size)               # of the token in the middle
    works = []
    for name, model in models:
        row = row_of(name, model, "decode", context, library=library)
        works.append((row, partial(per_token, model, short, DECODED, times)))
        if row["dtype"] == "float32":
            row = row_of(name, model, "prefill", long, library=library)
            works.append((row, partial(first_token, model, long, times)))
    return works

# ---- modes: models of random weights ----

def kinds_flag(parser):
    parser.flag("share_kind", several(kind), "weights,kv", "kinds of sharing that are timed beside full "
                "attention; several with commas, as weights,kv,top-64", "weights,kv")

def modes_of(full, kinds, share):
    """A model → it, and models that share in each of these kinds, made from it, zero-shot."""
    kinds = kinds if share else []
    shared = [reconfigure(full, share=share, share_kind=kind) for kind in kinds]
    return [full, *shared]

def random_modes(where, kinds, share=None, **fields):
    """The same for random weights. All layers from 1 on share if share is None."""
    config = GPTConfig(**fields)
    share = share or f"1-{config.n_layer - 1}"
    return modes_of(GPT(config).to(where).eval(), kinds, share)

def shape_works(shape, args):
    """What is timed of a shape."""
    fields, training = SHAPES[shape]
    context, where = fields["block_size"], args.device
    T = min(context, 2048)                                  # of the prompt
    reading, decoding = [], []
    for model in random_modes(where, args.share_kind, **fields):
        if training:
            dtype = args.dtype or choose_dtype(where)
            trained = GPT(model.config).to(where)
            reading.append(train_work(shape, trained, training, dtype, where))
        row = row_of(shape, model, "prefill", T)
        prefill = partial(first_token, model, T)
        reading.append((row, partial(timed, prefill, where)))
        for each in [model, OnTorch(model)] if args.torch else [model]:
            decoding.append(decode_work(shape, each, context, 1, where))
    return reading + decoding

def torch_flag(parser):
    parser.switch("torch", "also decode in torch (minisa/model.py), where numpy (minisa/decode.py) does it")

def shape_flags(parser):
    names = several(one_of(*SHAPES))
    parser.flag("shapes", names, list(SHAPES), "which shapes to measure", shown=",".join(SHAPES))
    kinds_flag(parser)
    add_dtype(parser, "number format to train in", None, "the faster one here")
    torch_flag(parser)

def modes(args):
    """Time training, prefill and decoding: full attention and kinds of sharing.

    The shapes are small (4 layers, 128 wide, context 256), large (6 layers, 384 wide, context 256), long (6
    layers, 128 wide, context 8,192: the cache is ten times the weights, and nothing is trained), and recipe
    (as small, with the vocabulary and the batch of nanoGPT's recipe for a CPU).
    """
    for shape in args.shapes:
        yield shape, shape_works(shape, args)

# ---- model: models from files ----

def open_models(source, sharing, torch_too, where):
    """→ [(source, model), ...]: a model, the first in float32, and others made of it."""
    begun = time.perf_counter()
    model, _, _ = load(source, device=where)
    first_token(model, 16)
    print(f"{source}: {time.perf_counter() - begun:.1f} s from the file to the first token")
    half, _, _ = load(source, device=where, dtype=torch.bfloat16)
    models = [model, half]
    if sharing:
        models += [reconfigure(full, **sharing) for full in models]
    if torch_too:
        models.append(OnTorch(model))
    return [(source, model) for model in models]

def model_flags(parser):
    add_models(parser)
    parser.flag("share", help="spans that share, zero-shot, beside the first model", shown="none")
    add_share_kind(parser)
    torch_flag(parser)

def model(args):
    """Time prefill and decoding of models from files, side by side, in float32 and bfloat16."""
    first, *others = args.models
    sharing = {"share": args.share, "share_kind": args.share_kind} if args.share else {}
    models = open_models(first, sharing, args.torch, args.device)
    for source in others:
        models += open_models(source, {}, args.torch, args.device)
    shortest = min(model.config.block_size for _, model in models)
    yield "models", text_works(models, shortest)

# ---- sweep: what a token costs as context or batch grow ----

def growing_models(args):
    """→ [(name, model), ...]: full attention and sharing, of a file or of random weights."""
    if args.model:
        full, _, _ = load(args.model, device=args.device)
        return [(args.model, model) for model in modes_of(full, args.share_kind, args.share)]
    kinds, first = args.share_kind, args.share_kind[:1]
    heads = random_modes(args.device, kinds, args.share, **GROWING)
    groups = random_modes(args.device, first, args.share, **GROWING, n_kv_head=1)
    named = [("6 × 256", model) for model in heads]
    return named + [("6 × 256, GQA", model) for model in groups]

def points(args):
    """Yield (context, batch size, [(name, model), ...]) of each point of a sweep."""
    if args.over == "shapes":
        for shape in "small", "large", "long":
            fields, _ = SHAPES[shape]
            models = random_modes(args.device, args.share_kind, **fields)
            yield fields["block_size"], 1, [(shape, model) for model in models]
        return
    models = growing_models(args)
    longest = models[0][1].config.block_size
    swept = SWEPT_FILES if args.model else SWEPT
    fitting = [point for point in swept[args.over] if point[0] <= longest]
    for context, batch_size in fitting or [(longest, 1)]:
        yield context, batch_size, models

def sweep_flags(parser):
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a run's or model's folder, a .gguf file, "
                        "or smollm2 (default: random weights, 6 layers, 256 wide, with and without GQA)")
    parser.flag("over", choices=["context", "batch_size", "shapes"], default="context", help="what grows; "
                "shapes: a decode step of each shape of `bench modes`, without MODEL")
    parser.flag("share", help="spans that share beside it in each kind, zero-shot",
                shown="none with MODEL, else 1-5")
    kinds_flag(parser)

def sweep(args):
    """Time a decode step as the context or the batch grows: full attention and sharing."""
    if args.over == "shapes" and (args.model or args.share):
        raise ValueError("--over=shapes: goes without MODEL and --share; drop them")
    for context, batch_size, models in points(args):
        title = f"context {context:,}, batch size {batch_size}"
        works = [decode_work(*named, context, batch_size, args.device) for named in models]
        yield title, works

# ---- the command ----

def run(doc, name, commands):
    """commands: {word: (a function that adds its flags to a parser, one that yields titles and works)}. Run
    the one that the first word names, and write its rows."""
    usage = f"python -m minisa.lab.{name}"
    parser = Parser(doc, f"{usage} COMMAND [--FLAG=VALUE ...]")
    parser.add_argument("command", choices=commands)
    word = parser.parse_args(sys.argv[1:2]).command
    add_flags, works_of = commands[word]
    parser = Parser(getdoc(works_of), f"{usage} {word} [--FLAG=VALUE ...]")
    add_flags(parser)
    parser.flag("csv", table, help="file to write the results to as CSV; minisa.lab.plot draws a sweep",
                shown="none")
    parser.flag("rounds", count, 7, "measurements of each figure")
    add_device(parser)
    args, rows = parser.parse_intermixed_args(sys.argv[2:]), []
    keep_memory()
    for title, works in works_of(args):
        rows += measure(title, works, args.rounds, args.device)
    if args.csv:
        write_results(args.csv, rows)

def main():
    run(__doc__, "bench", {
        "modes": (shape_flags, modes),
        "model": (model_flags, model),
        "sweep": (sweep_flags, sweep),
    })

if __name__ == "__main__":
    command(main)
