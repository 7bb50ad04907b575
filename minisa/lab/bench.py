"""How fast models train, prefill and decode on this machine, beside each other and the machine's limit.

    python -m minisa.lab.bench                          full attention and both kinds of sharing, three shapes
    python -m minisa.lab.bench --shapes=long --rounds=9
    python -m minisa.lab.bench smollm2 out/mixed        models from files: load, prefill, decode
    python -m minisa.lab.bench smollm2 --share=26-28    and zero-shot sharing
    python -m minisa.lab.bench smollm2 --squeeze=614    decoding with squeezed caches

Every figure is a median over rounds, in each of which all modes run in turn, so that a machine that gets
slower or faster meanwhile is the same for all. A decode step must read all weights and the whole cache once;
the limit is the time which that takes at the speed at which this machine reads a large tensor, measured in
the same rounds.
"""

import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F

from minisa import checkpoint, pretrained
from minisa.axes.squeeze import POLICIES, read, squeeze
from minisa.cli import Parser, at_least, command, count, device
from minisa.cost import predict
from minisa.fast import for_decoding
from minisa.lab.scan import mean_loss
from minisa.model import GPT, GPTConfig, KVCache

MODES = {"full": {}, "weights": {"share_kind": "weights"}, "kv": {"share_kind": "kv"}}
#         config, batch of a training step (None: not trained), batch and context of a decode step
SHAPES = {
    "small": ({"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 128}, 16, 1, 128),
    "large": ({"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256}, 8, 1, 256),
    "long": ({"n_layer": 6, "n_head": 2, "n_embd": 128, "block_size": 8192}, None, 1, 8192),
}                           # in the last, the cache is ten times the weights
MACHINE = "machine", "read"

# ---- measuring ----

def timed(f, where, at_least=0.05):
    """Seconds that f() takes on the device `where`, from as many calls as fill at_least seconds."""
    calls, begun = 0, time.perf_counter()
    while True:
        f()
        if where.type == "cuda":
            torch.cuda.synchronize()
        elif where.type == "mps":
            torch.mps.synchronize()
        calls += 1
        if (elapsed := time.perf_counter() - begun) >= at_least:
            return elapsed / calls

def medians(work, rounds, title):
    """work: {key: a function → seconds}, which run in turn, each once a round → {key: median}. One more
    round, before the others, warms up."""
    seconds = {key: [] for key in work}
    for i in range(rounds + 1):
        for key, measure in work.items():
            doing = key if isinstance(key, str) else " ".join(key)
            print(f"\r\033[K{title}: round {i} of {rounds}, {doing}", end="", file=sys.stderr, flush=True)
            elapsed = measure()
            if i > 0:
                seconds[key].append(elapsed)
    print("\r\033[K", end="", file=sys.stderr, flush=True)
    return {key: statistics.median(values) for key, values in seconds.items()}

def reader(where):
    """→ a function that measures how long this machine reads a byte, in seconds."""
    ballast = torch.ones(2**26, device=where)               # 256 MB: more than any cache of a processor
    return lambda: timed(ballast.sum, where) / ballast.nbytes

def table(rows):
    """Print rows of text, the first one being the header, in columns."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for first, *others in rows:
        cells = [text.rjust(width) for text, width in zip(others, widths[1:])]
        print(first.ljust(widths[0]), *cells, sep="  ")

# ---- what is measured ----

def trainer(model, batch_size, T):
    """→ a function that does one training step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    idx = torch.randint(model.config.vocab_size, (batch_size, T + 1), device=model.embed.weight.device)

    def step():
        model(idx[:, :-1], idx[:, 1:])[1].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step

def prefiller(model, T):
    """→ a function that reads a prompt of T tokens, in chunks, into a new cache."""
    idx = torch.randint(model.config.vocab_size, (1, T), device=model.embed.weight.device)
    return lambda: model.generate(idx, 1)

def decode_step(model, cache, batch_size):
    """→ a function that makes the next token of each sequence in a cache."""
    idx = torch.randint(model.config.vocab_size, (batch_size, 1), device=model.embed.weight.device)

    @torch.inference_mode()
    def step():
        model.head(model.hidden(idx, cache)[:, -1]).argmax(-1)
    return step

def decoder(model, batch_size, context):
    """→ a function that makes one token per sequence, of which each sees `context` keys."""
    like = model.embed.weight
    cache = KVCache(model, batch_size, context, like.dtype, like.device)
    for t in cache.k + cache.v:
        t.zero_()
    cache.length = context                                  # full: every new token overwrites the oldest
    return decode_step(model, cache, batch_size)

# ---- shapes: models without training ----

def shape_models(shape, plain):
    """→ {mode: config}, of a shape; with `plain`, full attention a second time."""
    fields = SHAPES[shape][0]
    share = f"1-{fields['n_layer'] - 1}"
    configs = {mode: GPTConfig(**fields, **sharing, share=share if sharing else "")
               for mode, sharing in MODES.items()}
    return {**configs, "plain": configs["full"]} if plain else configs

def bench_shape(shape, rounds, where, plain=False):
    """Measure one shape and print its table."""
    _, train_batch, batch, context = SHAPES[shape]
    configs, work, prompt = shape_models(shape, plain), {}, min(context, 2048)
    for mode, config in configs.items():
        model = GPT(config).to(where).eval()
        model = model if mode == "plain" else for_decoding(model)
        if train_batch:
            step = trainer(GPT(config).to(where), train_batch, config.block_size)
            work[mode, "train"] = partial(timed, step, where)
        work[mode, "prefill"] = partial(timed, prefiller(model, prompt), where)
        work[mode, "decode"] = partial(timed, decoder(model, batch, context), where)
    work[MACHINE] = reader(where)
    seconds = medians(work, rounds, shape)
    costs = {mode: predict(config, context, batch) for mode, config in configs.items()}
    full, millions = configs["full"], costs["full"].params / 1e6
    print(f"{shape}: {full.n_layer} layers, {full.n_embd} wide, {millions:.1f} M parameters; "
          f"training batch {train_batch or '-'} × {full.block_size}; decoding batch {batch} at context "
          f"{context}; this machine reads {1e-9 / seconds[MACHINE]:.1f} GB/s")
    tokens = {"train": (train_batch or 0) * full.block_size, "prefill": prompt, "decode": batch}
    table(shape_rows(seconds, tokens, costs))
    for mode in ("weights", "kv"):
        saved = 1 - costs[mode].cache_bytes / costs["full"].cache_bytes
        faster = 1 - seconds[mode, "decode"] / seconds["full", "decode"]
        print(f"{mode}: a decode step takes {faster:.0%} less time, for {saved:.0%} fewer cache bytes "
              f"({faster / saved:.2f})")
    print(flush=True)

def shape_rows(seconds, tokens, costs):
    """seconds: {(mode, what): median}; tokens: {what: tokens made at once}; costs: {mode: Cost}"""
    rows = [["mode"]]
    for what in tokens:
        rows[0] += [f"{what} tok/s", "÷ full"]
    rows[0] += ["÷ limit", "MB read/step"]
    for mode, cost in costs.items():
        row = [mode]
        for what, n in tokens.items():
            took = seconds.get((mode, what))
            row += [f"{n / took:,.0f}", f"{seconds['full', what] / took:.2f}"] if took else ["-", "-"]
        read = 4 * cost.params + cost.cache_bytes           # bytes of float32
        row += [f"{read * seconds[MACHINE] / seconds[mode, 'decode']:.2f}", f"{read / 1e6:.1f}"]
        rows.append(row)
    return rows

# ---- models from files ----

def streamed(stream):
    """Seconds per token of an iterator over tokens, the first one (and so the prompt) not counted."""
    next(stream)
    begun, tokens = time.perf_counter(), 0
    for token in stream:
        int(token)                                          # waits for a GPU
        tokens += 1
    return (time.perf_counter() - begun) / tokens

def token_seconds(model, idx, n):
    """Seconds per token of n tokens, after a prompt idx (1, T) and the first one."""
    return streamed(model.stream(idx, n + 1, 0))

def first_token(model, idx):
    """Seconds from a prompt idx (1, T) to its first token."""
    begun = time.perf_counter()
    int(next(iter(model.stream(idx, 1, 0))))
    return time.perf_counter() - begun

class Clock:
    """A streamer for transformers' generate that notes when each token comes; first, the prompt."""

    def __init__(self):
        self.times = []

    def put(self, _):
        self.times.append(time.perf_counter())

    def end(self):
        pass

class Transformers:
    """The model of a .gguf file in Hugging Face transformers, in float32."""

    def __init__(self, library, source, where):
        path = pretrained.fetch() if source == "smollm2" else Path(source)
        loader = library.AutoModelForCausalLM
        loaded = loader.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        self.model = loaded.eval().to(where)

    def decode(self, idx, n):
        """Seconds per token, of n after the first."""
        clock = Clock()
        self.model.generate(idx, max_new_tokens=n + 1, min_new_tokens=n + 1, do_sample=False,
                            streamer=clock, pad_token_id=0)
        return (clock.times[-1] - clock.times[1]) / n

    @torch.inference_mode()
    def first_token(self, idx):
        begun = time.perf_counter()
        int(self.model(idx, use_cache=True, logits_to_keep=1).logits[0, -1].argmax())
        return time.perf_counter() - begun

    @torch.inference_mode()
    def loss(self, idx):
        return F.cross_entropy(self.model(idx[:, :-1]).logits[0].float(), idx[0, 1:]).item()

def variants(source, share, plain, where):
    """A model and others made of it → {name: model}, the first in float32; and the seconds from its file to
    its first token."""
    begun = time.perf_counter()
    model, _, _ = checkpoint.load(source, device=where)
    before = checkpoint.reconfigure(model)                  # the same memory, as it was stored
    for_decoding(model)
    first_token(model, torch.zeros(1, min(128, model.config.block_size // 4), dtype=torch.long, device=where))
    seconds = time.perf_counter() - begun
    half = checkpoint.load(source, device=where, dtype=torch.bfloat16)[0]
    models = {f"{source}, float32": model, f"{source}, bfloat16": half}
    if plain:
        models[f"{source}, float32, plain"] = before
    if share:
        shared = {f"share {share}, {kind}": for_decoding(checkpoint.reconfigure(full, share=share))
                  for kind, full in (("float32", model), ("bfloat16", half))}
        models |= shared
    return models, seconds

def bench_models(sources, share, plain, rounds, library, where):
    """Measure models from files, beside each other and beside transformers, and print a table."""
    models, loading = {}, []
    for source in sources:
        made, seconds = variants(source, share if source == sources[0] else None, plain, where)
        models |= made
        loading.append(f"{source} {seconds:.1f} s")
    first = next(iter(models.values()))
    size, vocabulary = (min(getattr(model.config, name) for model in models.values())
                        for name in ("block_size", "vocab_size"))
    n, prompt, T = 32, min(128, size // 4), min(2048, size // 2)
    short, long, text = (torch.randint(vocabulary, (1, length), device=where)
                         for length in (prompt, T, min(513, size)))
    work, losses = {MACHINE: reader(where)}, ""
    for name, model in models.items():
        work[name, "decode"] = partial(token_seconds, model, short, n)
        if "bfloat16" not in name:
            work[name, "prefill"] = partial(first_token, model, long)
    if library:
        begun = time.perf_counter()
        theirs = Transformers(library, sources[0], where)
        theirs.first_token(short)
        loading.append(f"transformers {time.perf_counter() - begun:.1f} s")
        losses = (f"loss on {text.size(1) - 1} random tokens: {mean_loss(first, text):.5f} nats; "
                  f"transformers {theirs.loss(text):.5f}\n")
        work["transformers", "decode"] = partial(theirs.decode, short, n)
        work["transformers", "prefill"] = partial(theirs.first_token, long)
    seconds = medians(work, rounds, "models")
    print(f"{sources[0]}: {predict(first, 1).params / 1e6:.1f} M parameters; decoding after a prompt of "
          f"{prompt} tokens, prefill of {T}; this machine reads {1e-9 / seconds[MACHINE]:.1f} GB/s")
    print(f"from the file to the first token: {', '.join(loading)}\n{losses}", end="")
    table(model_rows(models, seconds, T, prompt + n // 2))

def model_rows(models, seconds, T, context):
    """seconds: {(name, what): median}. T: tokens of the prefill. context: of a decode step, in the mean."""
    names = [name for name, what in seconds if what == "decode"]
    rows = [["", "decode tok/s", "÷ first", "÷ limit", "prefill tok/s", "÷ first"]]
    for name in names:
        took, limit = seconds[name, "decode"], "-"
        if name in models:
            model = models[name]
            cost = predict(model, context, bytes_per_number=model.embed.weight.element_size())
            read = sum(p.nbytes for p in model.parameters()) + cost.cache_bytes
            limit = f"{read * seconds[MACHINE] / took:.2f}"
        row = [name, f"{1 / took:.1f}", f"{seconds[names[0], 'decode'] / took:.2f}", limit]
        prefill = seconds.get((name, "prefill"))
        if prefill:
            row += [f"{T / prefill:,.0f}", f"{seconds[names[0], 'prefill'] / prefill:.2f}"]
        rows.append(row if prefill else [*row, "-", "-"])
    return rows

# ---- squeezed caches ----

def bench_squeeze(source, budget, batch, context, rounds, where):
    """Decode with a full cache and with caches squeezed to `budget` tokens, by each policy; print a table."""
    model, _, _ = checkpoint.load(source, device=where)
    for_decoding(model)
    if budget > context or context > model.config.block_size:
        raise ValueError(f"--squeeze={budget}: must be at most --context={context}, "
                         f"and that at most {model.config.block_size}")
    print(f"reading {batch} prompts of {context} random tokens", file=sys.stderr, flush=True)
    prompt = read(model, torch.randint(model.config.vocab_size, (batch, context), device=where))
    full, sizes = "full cache", {"full cache": prompt[0].nbytes}
    work = {full: partial(timed, decoder(model, batch, context), where, 0.5)}
    for policy in POLICIES:
        for cut in (1, 0.5):
            name = f"{policy}, " + ("equal budgets" if cut == 1 else f"cut {cut}")
            cache = squeeze(*prompt, budget, policy, cut)
            step, sizes[name] = decode_step(model, cache, batch), cache.nbytes
            work[name] = partial(timed, step, where, 0.5)
    seconds = medians(work, rounds, "squeeze")
    print(f"{source}: decoding {batch} sequences at context {context}, {budget} tokens kept")
    rows = [["", "cache MB", "÷ full", "tokens/s", "÷ full"]]
    for name, took in seconds.items():
        rows.append([name, f"{sizes[name] / 1e6:.1f}", f"{sizes[name] / sizes[full]:.2f}",
                     f"{batch / took:.1f}", f"{seconds[full] / took:.2f}"])
    table(rows)

# ---- the command ----

def read_args():
    parser = Parser(__doc__, usage="python -m minisa.lab.bench [MODEL ...] [--FLAG=VALUE ...]")
    parser.add_argument("models", nargs="*", metavar="MODEL", help="runs' or models' folders, .gguf files, "
                        "or smollm2, beside each other (default none: shapes)")
    parser.flag("shapes", default=",".join(SHAPES), help="without MODEL: which shapes to measure")
    parser.switch("plain", "also without what minisa/fast.py does")
    parser.flag("share", help="with MODEL: spans that share, zero-shot, beside the first one", shown="none")
    parser.switch("beside_transformers", "with MODEL: also Hugging Face transformers, if installed, from the "
                  "first model, a .gguf file")
    parser.flag("squeeze", at_least(int, 8), help="with one MODEL: only decode, with a full cache and with "
                "caches of so many tokens per layer", shown="none")
    parser.flag("batch_size", count, 8, "with --squeeze: sequences")
    parser.flag("context", at_least(int, 8), 2048, "with --squeeze: tokens of the full cache")
    parser.flag("rounds", count, 7, "measurements of each figure")
    parser.flag("device", device, "cpu", "cpu, cuda, cuda:1 or mps")
    return parser.parse_intermixed_args()

def import_transformers(source):
    """→ the library. Raises ValueError if it is missing, or cannot read the source."""
    if not source.endswith((".gguf", "smollm2")):
        raise ValueError(f"--beside_transformers: transformers reads .gguf files; {source} is none")
    try:
        import accelerate  # noqa: F401 (transformers needs it for .gguf files)
        import transformers
    except ImportError:
        raise ValueError("--beside_transformers: needs transformers and accelerate; install them with: "
                         "pip install transformers accelerate") from None
    return transformers

def main():
    args = read_args()
    if args.squeeze and len(args.models) != 1:
        raise ValueError("--squeeze: goes with one model, as in: "
                         "python -m minisa.lab.bench smollm2 --squeeze=614")
    if args.squeeze:
        sizes = args.squeeze, args.batch_size, args.context
        return bench_squeeze(args.models[0], *sizes, args.rounds, args.device)
    if args.models:
        library = import_transformers(args.models[0]) if args.beside_transformers else None
        return bench_models(args.models, args.share, args.plain, args.rounds, library, args.device)
    if args.share or args.beside_transformers:
        raise ValueError("--share and --beside_transformers: go with a model, as in: "
                         "python -m minisa.lab.bench smollm2 --share=26-28")
    shapes = args.shapes.split(",")
    for shape in shapes:
        if shape not in SHAPES:
            raise ValueError(f"--shapes={args.shapes}: '{shape}' is none of {', '.join(SHAPES)}")
    for shape in shapes:
        bench_shape(shape, args.rounds, args.device, args.plain)

if __name__ == "__main__":
    command(main)
