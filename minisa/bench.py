"""How fast each kind of sharing trains, prefills and decodes on this machine, beside full attention and the machine's limit.

    python -m minisa.bench                  all shapes, a few minutes on a laptop
    python -m minisa.bench --shapes=long --rounds=9
    python -m minisa.bench --model=smollm2 --share=26-28        a real LLM: load, prefill, decode
    python -m minisa.bench --model=smollm2 --squeeze=614        decoding with squeezed caches

Every figure is a median over rounds, in each of which all modes run in turn, so that a machine that gets slower or faster
meanwhile is the same for all. A decode step must read all weights and the whole cache once; the limit is the time which
that takes at the speed that this machine reads a large tensor at, measured in the same rounds.
"""

import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch

from minisa import Parser, at_least, checkpoint, command, count, device, pretrained, similarity
from minisa.cost import cost
from minisa.model import GPT, GPTConfig, KVCache
from minisa.squeeze import POLICIES, read, squeeze

MODES = {"full": dict(), "weights": dict(share_kind="weights"), "kv": dict(share_kind="kv")}
#         config, batch of a training step, batch and context of a decode step
SHAPES = {
    "small": (dict(n_layer=4, n_head=4, n_embd=128, block_size=128), 16, 1, 128),
    "large": (dict(n_layer=6, n_head=6, n_embd=384, block_size=256), 8, 1, 256),
    "long": (dict(n_layer=6, n_head=2, n_embd=128, block_size=8192), None, 1, 8192),     # the cache is ten times the weights
}


def timed(f, where, at_least=0.05):
    """Seconds that f() takes, from as many calls as fill at_least seconds."""
    def wait():
        if where.type != "cpu":
            torch.cuda.synchronize() if where.type == "cuda" else torch.mps.synchronize()
    calls, begun = 0, time.perf_counter()
    while True:
        f()
        wait()
        calls += 1
        if (elapsed := time.perf_counter() - begun) >= at_least:
            return elapsed / calls


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


def decoder(model, batch_size, context):
    """→ a function that makes one token per sequence, of which each sees `context` keys."""
    cache = KVCache(model.config, batch_size, context, model.embed.weight.dtype, model.embed.weight.device)
    for t in cache.k + cache.v:
        t.zero_()
    idx = torch.randint(model.config.vocab_size, (batch_size, 1), device=model.embed.weight.device)

    @torch.inference_mode()
    def step():
        cache.length = 2 * context - 1          # a full ring
        model.head(model.hidden(idx, cache)[:, -1]).argmax(-1)
    return step


def bench(shape, rounds, where):
    """Measure one shape and print its table."""
    fields, train_batch, batch, context = SHAPES[shape]
    work, configs = {}, {}
    for mode, sharing in MODES.items():
        config = configs[mode] = GPTConfig(**fields, **sharing, share=f"1-{fields['n_layer'] - 1}" if sharing else "")
        model = GPT(config).to(where)
        if train_batch:
            work[mode, "train"] = trainer(GPT(config).to(where), train_batch, config.block_size)
        work[mode, "prefill"] = prefiller(model.eval(), min(context, 2048))
        work[mode, "decode"] = decoder(model, batch, context)
    ballast = torch.ones(2**26, device=where)                                          # 256 MB: larger than any cache
    work["machine", "read"] = ballast.sum

    seconds = {key: [] for key in work}
    for i in range(rounds + 1):
        for key, f in work.items():
            print(f"\r{shape}: round {i} of {rounds}, {key[0]} {key[1]}" + " " * 20, end="", flush=True)
            elapsed = timed(f, where)
            if i > 0:                                                                   # the first warms up
                seconds[key].append(elapsed)
    median = {key: statistics.median(values) for key, values in seconds.items()}
    bandwidth = ballast.nbytes / median["machine", "read"]

    params, full = cost(configs["full"], context, batch), configs["full"]
    print(f"\r{shape}: {full.n_layer} layers, {full.n_embd} wide, {params.params / 1e6:.1f} M parameters; training batch {train_batch or '-'} × {full.block_size}; "
          f"decoding batch {batch} at context {context}; this machine reads {bandwidth / 1e9:.1f} GB/s")
    print(f"{'mode':10}{'train tok/s':>14}{'÷ full':>8}{'prefill tok/s':>16}{'÷ full':>8}{'decode tok/s':>15}{'÷ full':>8}{'÷ limit':>9}{'MB read/step':>14}")
    read = {}
    for mode, config in configs.items():
        predicted = cost(config, context, batch)
        read[mode] = 4 * predicted.params + predicted.cache_bytes
        row = f"{mode:10}"
        for what, tokens in (("train", (train_batch or 0) * config.block_size), ("prefill", min(context, 2048)), ("decode", batch)):
            width = {"train": 14, "prefill": 16, "decode": 15}[what]
            row += f"{tokens / median[mode, what]:>{width},.0f}{median['full', what] / median[mode, what]:>8.2f}" if (mode, what) in median else f"{'-':>{width}}{'-':>8}"
        print(row + f"{read[mode] / bandwidth / median[mode, 'decode']:>9.2f}{read[mode] / 1e6:>14.1f}")
    for mode in ("weights", "kv"):
        saved = 1 - cost(configs[mode], context, batch).cache_bytes / params.cache_bytes
        faster = 1 - median[mode, "decode"] / median["full", "decode"]
        print(f"{mode}: a decode step takes {faster:.0%} less time, for {saved:.0%} fewer cache bytes ({faster / saved:.2f})")
    print(flush=True)


def streamed(stream):
    """Seconds per token of an iterator over tokens, the first one (and so the prompt) not counted."""
    next(stream)
    begun, tokens = time.perf_counter(), 0
    for token in stream:
        int(token)                              # waits for a GPU
        tokens += 1
    return (time.perf_counter() - begun) / tokens


class Clock:
    """A streamer for transformers' generate that notes when each token comes."""

    def __init__(self):
        self.times = []

    def put(self, _):
        self.times.append(time.perf_counter())

    def end(self):
        pass


def bench_model(source, share, rounds, beside, where):
    """Measure a pretrained model and print its table: float32, bfloat16, sharing, and transformers from the same file."""
    begun = time.perf_counter()
    model, tokenizer, _ = checkpoint.load(source, device=where)
    n, prompt, T = 33, min(128, model.config.block_size // 4), min(2048, model.config.block_size // 2)
    idx = torch.randint(model.config.vocab_size, (1, prompt), device=where)
    next(iter(model.stream(idx, 1, 0)))
    seconds_to_first = time.perf_counter() - begun
    models = {"full, float32": model, "full, bfloat16": checkpoint.load(source, device=where, dtype=torch.bfloat16)[0]}
    if share:
        models |= {name.replace("full", f"share {share}"): similarity.share(full, replace(full.config, share=share)) for name, full in models.items()}
    theirs = None
    if beside:
        path = pretrained.fetch() if source == "smollm2" else Path(source)
        begun = time.perf_counter()
        theirs = beside.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval().to(where)
        theirs.generate(idx, max_new_tokens=1, do_sample=False, pad_token_id=0)
        their_seconds = time.perf_counter() - begun
        random = torch.randint(model.config.vocab_size, (1, min(513, model.config.block_size)), device=where)
        with torch.inference_mode():
            loss = model(random[:, :-1], random[:, 1:])[1].item()
            their_loss = torch.nn.functional.cross_entropy(theirs(random[:, :-1]).logits[0], random[0, 1:]).item()
    long = torch.randint(model.config.vocab_size, (1, T), device=where)
    ballast = torch.ones(2**26, device=where)
    decode, prefill, read = {name: [] for name in (*models, "transformers")}, {name: [] for name in (*models, "transformers")}, []
    for i in range(rounds):
        for name, ours in models.items():
            print(f"\rround {i + 1} of {rounds}: {name}" + " " * 20, end="", flush=True)
            decode[name].append(streamed(ours.stream(idx, n, 0)))
            if "bfloat16" not in name:
                begun = time.perf_counter()
                int(next(iter(ours.stream(long, 1, 0))))
                prefill[name].append(time.perf_counter() - begun)
        if theirs:
            clock = Clock()
            theirs.generate(idx, max_new_tokens=n, min_new_tokens=n, do_sample=False, streamer=clock, pad_token_id=0)
            decode["transformers"].append((clock.times[-1] - clock.times[1]) / (n - 1))      # the first put() is the prompt
            with torch.inference_mode():
                begun = time.perf_counter()
                int(theirs(long, use_cache=True, logits_to_keep=1).logits[0, -1].argmax())
                prefill["transformers"].append(time.perf_counter() - begun)
        read.append(timed(ballast.sum, where))
    bandwidth = ballast.nbytes / statistics.median(read)
    print(f"\r{source}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters; decoding after a prompt of {prompt} tokens, prefill of {T}; this machine reads {bandwidth / 1e9:.1f} GB/s")
    print(f"from the file to the first token: {seconds_to_first:.1f} s" + (f"; transformers {their_seconds:.1f} s" if theirs else ""))
    if theirs:
        print(f"loss on {random.size(1) - 1} random tokens: {loss:.5f} nats; transformers {their_loss:.5f}")
    print(f"{'':34}{'decode tok/s':>14}{'÷ full':>8}{'÷ limit':>9}{'prefill tok/s':>15}{'÷ full':>8}")
    first = "full, float32"
    for name in decode:
        if decode[name]:
            seconds = statistics.median(decode[name])
            row = f"{name:34}{1 / seconds:>14.1f}{statistics.median(decode[first]) / seconds:>8.2f}"
            if name in models:
                ours = models[name]
                size = ours.embed.weight.element_size()
                n_bytes = sum(p.nbytes for p in ours.parameters()) + cost(ours.config, prompt + n // 2, bytes_per_number=size).cache_bytes
                row += f"{n_bytes / bandwidth / seconds:>9.2f}"
            else:
                row += f"{'-':>9}"
            if prefill[name]:
                row += f"{T / statistics.median(prefill[name]):>15,.0f}{statistics.median(prefill[first]) / statistics.median(prefill[name]):>8.2f}"
            print(row)


def bench_squeeze(source, budget, batch, context, rounds, where):
    """Decode with a full cache and with caches squeezed to `budget` tokens, by each policy, and print a table."""
    model, _, _ = checkpoint.load(source, device=where)
    if budget > context or context > model.config.block_size:
        raise ValueError(f"--squeeze={budget}: must be at most --context={context}, and that at most {model.config.block_size}")
    print(f"reading {batch} prompts of {context} random tokens", flush=True)
    prompt = read(model, torch.randint(model.config.vocab_size, (batch, context), device=where))
    idx = torch.randint(model.config.vocab_size, (batch, 1), device=where)
    work, size = {"full cache": decoder(model, batch, context)}, {"full cache": prompt[0].nbytes}

    def steps(cache):
        @torch.inference_mode()
        def step():
            model.head(model.hidden(idx, cache)[:, -1]).argmax(-1)
        return step

    for policy in POLICIES:
        for cut in (1, 0.5):
            name = f"{policy}, " + ("equal budgets" if cut == 1 else f"cut {cut}")
            cache = squeeze(*prompt, budget, policy, cut)
            work[name], size[name] = steps(cache), cache.nbytes
    seconds = {name: [] for name in work}
    for i in range(rounds + 1):
        for name, step in work.items():
            print(f"\rround {i} of {rounds}: {name}" + " " * 20, end="", flush=True)
            elapsed = timed(step, where, 0.5)
            if i > 0:
                seconds[name].append(elapsed)
    print(f"\r{source}: decoding {batch} sequences at context {context}, {budget} tokens kept" + " " * 20)
    print(f"{'':24}{'cache MB':>10}{'÷ full':>8}{'tokens/s':>10}{'÷ full':>8}")
    full = statistics.median(seconds["full cache"])
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"{name:24}{size[name] / 1e6:>10.1f}{size[name] / size['full cache']:>8.2f}{batch / median:>10.1f}{full / median:>8.2f}")


def main():
    parser = Parser(__doc__, usage="python -m minisa.bench [--FLAG=VALUE ...]")
    parser.add_argument("--shapes", metavar="STR", default="small,large,long", help="which of small, large and long (default small,large,long)")
    parser.add_argument("--model", metavar="STR", help="instead of shapes: a .gguf file, smollm2 or a run's folder (default none)")
    parser.add_argument("--share", metavar="STR", help="with --model: spans to share beside full attention, with the same heads (default none)")
    parser.add_argument("--beside_transformers", action="store_true", help="with --model: also Hugging Face transformers, from the same .gguf file, if installed (default off)")
    parser.add_argument("--squeeze", metavar="INT", type=at_least(int, 8), help="with --model: only decode, with a full cache and with caches of so many tokens per layer (default none)")
    parser.add_argument("--batch_size", metavar="INT", type=count, default=8, help="with --squeeze: sequences (default 8)")
    parser.add_argument("--context", metavar="INT", type=at_least(int, 8), default=2048, help="with --squeeze: tokens of the full cache (default 2048)")
    parser.add_argument("--rounds", metavar="INT", type=count, default=7, help="measurements of each figure (default 7)")
    parser.add_argument("--device", metavar="STR", type=device, default="cpu", help="cpu, cuda or mps (default cpu)")
    args = parser.parse_args()
    if args.squeeze and args.model:
        return bench_squeeze(args.model, args.squeeze, args.batch_size, args.context, args.rounds, args.device)
    if args.model:
        beside = None
        if args.beside_transformers and not args.model.endswith((".gguf", "smollm2")):
            raise ValueError(f"--beside_transformers: transformers reads .gguf files; {args.model} is none")
        if args.beside_transformers:
            try:
                import accelerate
                import transformers as beside
            except ImportError:
                raise ValueError("--beside_transformers: needs transformers and accelerate; install them with: pip install transformers accelerate") from None
        return bench_model(args.model, args.share, args.rounds, beside, args.device)
    if args.share or args.beside_transformers or args.squeeze:
        raise ValueError("--share, --squeeze and --beside_transformers: go with --model")
    for shape in args.shapes.split(","):
        if shape not in SHAPES:
            raise ValueError(f"--shapes={args.shapes}: '{shape}' is none of {', '.join(SHAPES)}")
    for shape in args.shapes.split(","):
        bench(shape, args.rounds, args.device)


if __name__ == "__main__":
    command(main)
