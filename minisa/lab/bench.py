"""How fast models train, prefill and decode on this machine, beside each other and the machine's limit.

    python -m minisa.lab.bench                          full attention and both kinds of sharing, three shapes
    python -m minisa.lab.bench --shapes=long --rounds=9
    PYTHONPATH=../nanoGPT python -m minisa.lab.bench --shapes=small,recipe,large --beside_nanogpt
    python -m minisa.lab.bench smollm2 out/mixed        models from files: load, prefill, decode
    python -m minisa.lab.bench smollm2 --share=26-28    and zero-shot sharing
    python -m minisa.lab.bench --sweep=context          what a token costs at a context of 256 to 32,768
    python -m minisa.lab.bench smollm2 --share=26-28 --sweep=context        and one of a model from a file

Every figure is a median over rounds, in each of which all modes run in turn, so that a machine that gets
slower or faster meanwhile is the same for all. Tokens are made as generate() makes them: by numpy where
minisa/decode.py can, by torch elsewhere; --torch adds rows that decode in torch. The limit of a decode step
is the time that main memory takes to deliver what it reads (`read_bytes` of minisa/cost.py), at the speed at
which this machine reads a large tensor, measured in the same rounds. What the processor's cache holds has no
limit.
"""

import statistics
import sys
import time
from contextlib import redirect_stdout
from copy import copy
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.nn import functional as F

from minisa.cost import predict
from minisa.kit import checkpoint, pretrained
from minisa.kit.cli import Parser, command, count, device, picture, table
from minisa.kit.files import write_csv
from minisa.kit.machine import choose_dtype, keep_memory, number_format
from minisa.kit.picture import pyplot
from minisa.kit.results import print_table
from minisa.kit.timing import LARGE, in_cache, reader, timed
from minisa.lab import plot
from minisa.lab.scan import mean_loss
from minisa.model import GPT, SHARE_KINDS, GPTConfig, KVCache

#         config, batch and tokens of a training step (None: not trained), batch of a decode step
SHAPES = {
    "small": ({"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 256}, (8, 128), 1),
    "large": ({"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256}, (8, 256), 1),
    "long": ({"n_layer": 6, "n_head": 2, "n_embd": 128, "block_size": 8192}, None, 1),
    "recipe": ({"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 256, "vocab_size": 65}, (12, 64), 1),
}                           # long: the cache is ten times the weights; recipe: nanoGPT's for a CPU
SWEEP = {"n_layer": 6, "n_head": 4, "n_embd": 256}          # 5 M parameters, heads of 64 numbers
SWEPT = {                                                   # (context, batch size) of each point
    "context": [(2**i, 1) for i in range(8, 16)],
    "batch_size": [(1024, 2**i) for i in range(7)],
}
SWEPT_MODEL = 128, 512, 2048, 8192                          # contexts
SWEEP_MODES = {
    "full": {},
    "SA": {"share": "1-5"},
    "CLA": {"share": "1-5", "share_kind": "kv"},
    "GQA": {"n_kv_head": 1},
    "SA, GQA": {"share": "1-5", "n_kv_head": 1},
}
MACHINE = "machine", "read"
LONG_ENOUGH = 0.25      # seconds of decoding in a round: at first, caches are cold and threads asleep
PAUSE = 0.1     # seconds, in which the waiting threads of torch and numpy fall asleep

# ---- measuring ----

def medians(work, rounds, title):
    """work: {(name, what): a function → seconds}, which run in turn, each once a round → {key: median}. One
    more round, before the others, warms up."""
    seconds = {key: [] for key in work}
    for i in range(rounds + 1):
        for key, measure in work.items():
            print(f"\r\033[K{title}: round {i} of {rounds},", *key, end="", file=sys.stderr, flush=True)
            time.sleep(PAUSE)
            seconds[key].append(measure())
    print("\r\033[K", end="", file=sys.stderr, flush=True)
    return {key: statistics.median(values[1:]) for key, values in seconds.items()}

def print_speeds(seconds, tokens, must_read):
    """seconds: {(name, what): median}; tokens: {what: tokens made at once}; must_read: {name: to_read(),
    if known}."""
    print(f"this machine reads {1e-9 * LARGE / seconds[MACHINE]:.1f} GB/s")
    names = [name for name, what in seconds if what == "decode"]
    titles = [title for what in tokens for title in (f"{what} tok/s", "÷ first")]
    rows = [["", *titles, "÷ limit", "MB read/step"]]
    for name in names:
        row, limit = [name], ["-", "-"]
        for what, n in tokens.items():
            first, took = (seconds.get((other, what)) for other in (names[0], name))
            row += [f"{n / took:,.1f}" if took else "-", f"{first / took:.2f}" if first and took else "-"]
        if name in must_read:
            n_bytes, cached = must_read[name]
            share = n_bytes / LARGE * seconds[MACHINE] / seconds[name, "decode"]
            limit = ["-" if cached else f"{share:.2f}", f"{n_bytes / 1e6:.1f}"]
        rows.append(row + limit)
    print_table(rows)

SPEEDS = ["measured", "mode", "work", "tokens/s"]

def speeds(title, seconds, tokens):
    """As of print_speeds() → rows of a CSV file."""
    return [[title, name, what, f"{tokens[what] / took:.2f}"]
            for (name, what), took in seconds.items() if what in tokens]

# ---- what is measured ----

def tokens_for(model, *shape):
    return torch.randint(model.config.vocab_size, shape, device=next(model.parameters()).device)

def trainer(model, batch_size, T, dtype):
    """→ a function that does one training step, in a number format. model: a GPT, or nanoGPT's."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    if hasattr(model, "configure_optimizers"):              # nanoGPT's own
        where = next(model.parameters()).device
        optimizer = model.configure_optimizers(0.1, 1e-4, (0.9, 0.99), where.type)
    idx = tokens_for(model, batch_size, T + 1)
    x, y = idx[:, :-1].contiguous(), idx[:, 1:].contiguous()
    autocast = number_format(model, dtype)

    def step():
        with autocast:
            loss = model(x, y)[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step

def full_cache(model, batch_size, context):
    """→ a cache in which every new token overwrites the oldest."""
    cache = KVCache(model, batch_size, context)
    for t in cache.k + cache.v:
        t.normal_()
    cache.length = context
    return cache

def decoder(model, batch_size, context):
    """→ a function that makes one token per sequence, of which each sees `context` keys, as generate()."""
    first, cache = tokens_for(model, batch_size, 1), full_cache(model, batch_size, context)
    stream = model.stream(first, 2**62, temperature=0.8, cache=cache)
    next(stream)                                            # the prompt, read by torch
    return partial(next, stream)

class OnTorch(GPT):
    """A GPT of which decode.py knows nothing, so that it decodes in torch on every machine."""

def on_torch(model):
    """→ the same model, in the same memory, which decodes in torch."""
    other = copy(model)
    other.__class__ = OnTorch
    return other

def token_times(model, idx, n):
    """→ when a prompt idx (1, T) was there, and when each of n tokens after it, in seconds. model: a GPT, or
    one of Hugging Face transformers."""
    times = []

    def note(_):
        times.append(time.perf_counter())

    if hasattr(model, "stream"):
        note(idx)
        for token in model.stream(idx, n, 0):
            note(int(token))                                # int() waits for a GPU
    else:
        model.generate(idx, max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0,
                       streamer=SimpleNamespace(put=note, end=lambda: None))
    return times

def first_token(model, idx):
    """Seconds from a prompt to its first token."""
    prompt, first = token_times(model, idx, 1)
    return first - prompt

def per_token(model, idx, n):
    """Seconds per token of n tokens, after a prompt and two: the second step makes the weights ready."""
    _, _, second, *_, last = token_times(model, idx, n + 2)
    return (last - second) / n

def to_read(model, context, batch_size=1):
    """Bytes that a decode step reads, and whether the processor's cache holds them all."""
    weight = model.embed.weight
    read = predict(model, context, batch_size, weight.element_size()).read_bytes
    return read, in_cache(read, weight.device)

# ---- shapes: models without training ----

def nanogpt(config):
    """→ nanoGPT's model in the shape of a config. Raises ValueError if Python does not find it."""
    try:
        import model as peer  # its file has this name
        names = "n_layer", "n_head", "n_embd", "block_size", "vocab_size"
        shape = {name: getattr(config, name) for name in names}
        return peer.GPT(peer.GPTConfig(**shape, dropout=0.0, bias=False))
    except (ImportError, AttributeError):
        raise ValueError("--beside_nanogpt: where is nanoGPT? Say it as in: "
                         "PYTHONPATH=../nanoGPT python -m minisa.lab.bench --beside_nanogpt") from None

def nanogpt_work(config, training, where):
    """→ what to time of nanoGPT: {(name, what): a function → seconds}."""
    work, model = {}, nanogpt(config).to(where).eval()
    if training:                                            # its train.py uses float32 on a CPU
        dtype = "float32" if where.type == "cpu" else choose_dtype(where, None)
        step = trainer(nanogpt(config).to(where), *training, dtype)
        work["nanoGPT", "train"] = partial(timed, step, where)
    one_token = partial(model.generate, tokens_for(model, 1, config.block_size), 1)
    work["nanoGPT", "decode"] = partial(timed, one_token, where)
    return work

def bench_shape(shape, rounds, where, dtype, torch_too=False, beside_nanogpt=False):
    """Measure one shape and print its table; torch_too: each mode also decodes in torch. → rows for CSV"""
    fields, training, batch = SHAPES[shape]
    context, (train_batch, length) = fields["block_size"], training or (0, 0)
    T, work, models = min(context, 2048), {MACHINE: partial(timed, reader(where), where)}, {}
    if beside_nanogpt:
        with redirect_stdout(sys.stderr):                   # it prints how large it is
            work |= nanogpt_work(GPTConfig(**fields), training, where)
    for mode in ("full", *SHARE_KINDS):
        config = GPTConfig(**fields, **sharing_of(mode, fields))
        models[mode] = model = GPT(config).to(where).eval()
        if training:
            step = trainer(GPT(config).to(where), train_batch, length, dtype)
            work[mode, "train"] = partial(timed, step, where)
        prefill = partial(first_token, model, tokens_for(model, 1, T))
        work[mode, "prefill"] = partial(timed, prefill, where)
        if torch_too:
            models[f"{mode}, torch"] = on_torch(model)
    for mode, model in models.items():
        work[mode, "decode"] = partial(timed, decoder(model, batch, context), where, LONG_ENOUGH)
    seconds = medians(work, rounds, shape)
    trained = f"training on {train_batch} × {length} tokens in {dtype}; " if training else ""
    print(f"{shape}: {config.n_layer} layers, {config.n_embd} wide, "
          f"{predict(models['full'], context).params / 1e6:.1f} M parameters; {trained}"
          f"decoding batch {batch} at context {context}")
    tokens = {"train": train_batch * length, "prefill": T, "decode": batch}
    print_speeds(seconds, tokens, {mode: to_read(model, context, batch) for mode, model in models.items()})
    print(flush=True)
    return speeds(f"{shape}, {dtype}", seconds, tokens)

def sharing_of(mode, fields):
    """Full attention, or a kind of sharing, in all layers from 1 on → fields of its GPTConfig."""
    last = fields["n_layer"] - 1
    return {"share": f"1-{last}", "share_kind": mode} if mode in SHARE_KINDS else {}

# ---- models from files ----

def transformers_model(source, where):
    """A .gguf file → its model in Hugging Face transformers, in float32, and the seconds from the file to its
    first token. Raises ValueError if that is not installed, or cannot read the source."""
    if not source.endswith((".gguf", "smollm2")):
        raise ValueError(f"--beside_transformers: transformers reads .gguf files; {source} is none")
    try:
        import accelerate  # noqa: F401 (transformers needs it for .gguf files)
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise ValueError("--beside_transformers: needs transformers and accelerate; install them with: "
                         "pip install transformers accelerate") from None
    path, begun = pretrained.fetch() if source == "smollm2" else Path(source), time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    first_token(model.eval().to(where), torch.zeros(1, 16, dtype=torch.long, device=where))
    return model, time.perf_counter() - begun

def variants(source, share, torch_too, where):
    """A model and others made of it → {name: model}, the first in float32; and the seconds from its file to
    its first token."""
    begun = time.perf_counter()
    model, _, _ = checkpoint.load(source, device=where)
    first_token(model, tokens_for(model, 1, min(128, model.config.block_size // 4)))
    seconds = time.perf_counter() - begun
    half, _, _ = checkpoint.load(source, device=where, dtype=torch.bfloat16)
    models = {f"{source}, float32": model, f"{source}, bfloat16": half}
    if torch_too:
        models[f"{source}, float32, torch"] = on_torch(model)
    if share:
        for dtype, full in (("float32", model), ("bfloat16", half)):
            models[f"share {share}, {dtype}"] = checkpoint.reconfigure(full, share=share)
    return models, seconds

def bench_models(sources, share, torch_too, beside_transformers, rounds, where):
    """Measure models from files, beside each other and beside transformers, and print a table. → rows for
    CSV"""
    models, theirs, loading = {}, {}, []
    if beside_transformers:
        theirs["transformers"], seconds = transformers_model(sources[0], where)
        loading.append(f"transformers {seconds:.1f} s")
    for source in sources:
        made, seconds = variants(source, share if source == sources[0] else None, torch_too, where)
        models |= made
        loading.append(f"{source} {seconds:.1f} s")
    first = next(iter(models.values()))
    size = min(model.config.block_size for model in models.values())
    n, prompt, T = 32, max(1, min(128, size // 4)), max(1, min(2048, size // 2))
    fewest = min(models.values(), key=lambda model: model.config.vocab_size)    # all know its tokens
    short, long, text = (tokens_for(fewest, 1, length) for length in (prompt, T, min(513, size)))
    work = {MACHINE: partial(timed, reader(where), where)}
    for name, model in (models | theirs).items():
        work[name, "decode"] = partial(per_token, model, short, n)
        if "bfloat16" not in name:
            work[name, "prefill"] = partial(first_token, model, long)
    seconds = medians(work, rounds, "models")
    print(f"{sources[0]}: {predict(first, 1).params / 1e6:.1f} M parameters; decoding after a prompt of "
          f"{prompt} tokens, prefill of {T}\nfrom the file to the first token: {', '.join(loading)}")
    for model in theirs.values():
        with torch.inference_mode():
            loss = F.cross_entropy(model(text[:, :-1]).logits[0], text[0, 1:])
        print(f"loss on {text.size(1) - 1} random tokens: {mean_loss(first, text):.5f} nats; "
              f"transformers {loss:.5f}")
    seen = min(prompt + n // 2, size)                       # keys, in the mean
    must_read = {name: to_read(model, seen) for name, model in models.items()}
    tokens = {"decode": 1, "prefill": T}
    print_speeds(seconds, tokens, must_read)
    return speeds(sources[0], seconds, tokens)

# ---- sweeps: what a token costs as context or batch grow ----

SWEEP_COLUMNS = ["model", "mode", "context", "batch size", "cache bytes", "bytes read", "ms per token",
                 "ms at the limit"]

def sweep_shapes():
    """Yield (name, context, batch size, {mode: model}): the shapes, each full and sharing."""
    for shape, (fields, _, batch) in SHAPES.items():
        if shape != "recipe":
            yield shape, fields["block_size"], batch, {
                mode: GPT(GPTConfig(**fields, **sharing_of(mode, fields))) for mode in ("full", *SHARE_KINDS)}

def sweep_modes(what):
    """Yield the same for one shape in five modes, while the context or the batch grows."""
    for context, batch in SWEPT[what]:
        yield "6 × 256", context, batch, {mode: GPT(GPTConfig(**SWEEP, **fields, block_size=context))
                                          for mode, fields in SWEEP_MODES.items()}

def sweep_model(source, share, where):
    """Yield the same for a model from a file, full and zero-shot, while the context grows."""
    full, _, _ = checkpoint.load(source, device=where)
    models = {"full": full} | {kind: checkpoint.reconfigure(full, share=share, share_kind=kind)
                               for kind in SHARE_KINDS if share}
    contexts = [context for context in SWEPT_MODEL if context <= full.config.block_size]
    if not contexts:
        raise ValueError(f"--sweep=context: starts at {SWEPT_MODEL[0]} tokens, but {source} has a context of "
                         f"{full.config.block_size}; take another model")
    for context in contexts:
        yield source, context, 1, models

def bench_sweep(points, rounds, where):
    """Time a decode step of each mode at each point. → the header and the rows of a table."""
    rows = [SWEEP_COLUMNS]
    for name, context, batch, models in points:
        work = {MACHINE: partial(timed, reader(where), where)}
        for mode, model in models.items():
            step = decoder(model.to(where).eval(), batch, context)
            work[mode, "decode"] = partial(timed, step, where, LONG_ENOUGH)
        seconds = medians(work, rounds, f"{name}, context {context}, batch size {batch}")
        for mode, model in models.items():
            n_bytes, cached = to_read(model, context, batch)
            ms = 1e3 * seconds[mode, "decode"] / batch
            limit = 1e3 * n_bytes / LARGE * seconds[MACHINE] / batch
            cache = predict(model, context, batch).cache_bytes
            rows.append([name, mode, *map(str, (context, batch, cache, n_bytes)), f"{ms:.4f}",
                         "" if cached else f"{limit:.4f}"])
    return rows

# ---- the command ----

def read_args():
    parser = Parser(__doc__, usage="python -m minisa.lab.bench [MODEL ...] [--FLAG=VALUE ...]")
    parser.add_argument("models", nargs="*", metavar="MODEL", help="runs' or models' folders, .gguf files, "
                        "or smollm2, beside each other (default none: shapes)")
    parser.flag("shapes", help="without MODEL: which shapes to measure", shown=",".join(SHAPES))
    parser.switch("torch", "also decoded in torch (minisa/model.py), where numpy (minisa/decode.py) does it")
    parser.flag("dtype", choices=["float32", "bfloat16"], help="without MODEL: to train in",
                shown="the faster one")
    parser.switch("beside_nanogpt", "without MODEL: also nanoGPT, whose model.py is on PYTHONPATH, first")
    parser.flag("share", help="with MODEL: spans that share, zero-shot, beside the first one", shown="none")
    parser.switch("beside_transformers", "with MODEL: also Hugging Face transformers, if installed, from the "
                  "first model, a .gguf file")
    parser.flag("sweep", choices=["shapes", *SWEPT], help="time decoding while this grows; with MODEL only "
                "context: full attention and, with --share, both kinds of sharing", shown="none")
    parser.flag("csv", table, help="file to write the speeds to as CSV", shown="none")
    parser.flag("plot", picture, help="with --sweep: file to draw it in, as .png, .svg or .pdf; needs "
                "matplotlib", shown="none")
    parser.flag("rounds", count, 7, "measurements of each figure")
    parser.flag("device", device, "cpu", "cpu, cuda, cuda:1 or mps")
    return parser.parse_intermixed_args()

def refuse(args):
    """Raises ValueError for flags that do not go together."""
    for wrong, rule in (
        ((args.share or args.beside_transformers) and not args.models,
         "--share and --beside_transformers: go with a model, as in: "
         "python -m minisa.lab.bench smollm2 --share=26-28"),
        (args.plot and args.sweep not in SWEPT or args.models[1:] and args.sweep
         or args.models and args.sweep not in (None, "context"),
         "--sweep: goes without a model, or with one as --sweep=context; --plot goes with it, as in: "
         "python -m minisa.lab.bench --sweep=context --plot=context.png"),
        (args.sweep and (args.torch or args.beside_transformers),
         "--torch and --beside_transformers: go without --sweep; drop one of them"),
        (args.shapes and (args.models or args.sweep),
         "--shapes: goes without a model and without --sweep; drop one of them"),
        ((args.dtype or args.beside_nanogpt) and (args.models or args.sweep),
         "--dtype and --beside_nanogpt: go with shapes, without a model and without --sweep, as in: "
         "python -m minisa.lab.bench --dtype=float32"),
    ):
        if wrong:
            raise ValueError(rule)

def sweep(args):
    if args.plot:
        pyplot("--plot")                                    # refused before the work if it is missing
    if args.models:
        points = sweep_model(args.models[0], args.share, args.device)
    else:
        points = sweep_shapes() if args.sweep == "shapes" else sweep_modes(args.sweep)
    columns, *rows = bench_sweep(points, args.rounds, args.device)
    print_table([columns, *rows])
    if args.plot:
        plot.token_times(rows, args.sweep, args.plot)
    return columns, rows

def main():
    args = read_args()
    refuse(args)
    keep_memory()
    shapes, where, columns = (args.shapes or ",".join(SHAPES)).split(","), args.device, SPEEDS
    if args.sweep:
        columns, rows = sweep(args)
    elif args.models:
        rows = bench_models(args.models, args.share, args.torch, args.beside_transformers, args.rounds, where)
    elif unknown := set(shapes) - set(SHAPES):
        raise ValueError(f"--shapes={args.shapes}: '{min(unknown)}' is none of {', '.join(SHAPES)}")
    else:
        dtype = args.dtype or choose_dtype(where, None)
        rows = [row for shape in shapes for row in
                bench_shape(shape, args.rounds, where, dtype, args.torch, args.beside_nanogpt)]
    if args.csv:
        write_csv(args.csv, columns, rows)

if __name__ == "__main__":
    command(main)
