"""How alike the layers of a model attend; which spans can share; and which head takes over which.

    python -m minisa.similarity out/full                    how alike, how spread: two maps
    python -m minisa.similarity smollm2 --scan              the loss of every span, made to share without training
    python -m minisa.similarity smollm2 --scan --heads=mix --refit      with the anchor's heads mixed for each head

P_l[h] (T, T) is what head h of layer l attends with on a window of T tokens (a row per query), and ⟨A, B⟩ = Σ A·B over all entries.

Similarity of two layers: sim(l, m) = mean over windows, heads h and rows t of the cosine of P_l[h, t] and P_m[h, t].

Spread of a layer (the isotropy of Liao & Vargas 2024, section 3): var(l) = mean over windows, heads and rows t ≥ 1 of the variance
of the t+1 weights that the row gives to the tokens it can see. 0 is a layer that looks at all tokens alike; the largest
that row t can have, all weight on one token, is t / (t+1)².

Heads of a reuse layer l with anchor a: "match" takes for each head h the head g of the anchor with the largest
cosine ⟨P_l[h], P_a[g]⟩ / |P_l[h]| |P_a[g]|. "mix" takes Σ_g w_g P_a[g], with the w ≥ 0, Σ w = 1, that minimise
|P_l[h] − Σ_g w_g P_a[g]|². Both need only the inner products of all heads of all layers: see gram().

Refitting (--refit): with other weights P, the values z_t that the heads of a reuse layer sum up for token t differ from those that
its output projection W was trained on. The W' that minimises Σ_t |W' z_t − y_t|² + λ |W' − W|², where y_t is what the layer put out
with full attention, takes W's place. It costs nothing when the model runs: see refit().
"""

import csv
import io
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn import functional as F

from minisa import Parser, at_least, checkpoint, command, count, device, plot
from minisa.cost import cost
from minisa.data import Data, tokenize
from minisa.model import GPT, causal_mask, rope_angles


def layer_similarity(model, idx):
    """idx (B, T) → (L, L): how alike each two layers attend, 1 on the diagonal; see sim(l, m) above."""
    rows = torch.stack([F.normalize(P, dim=-1).flatten() for P in model.attention_weights(idx)])        # (L, B·H·T·T)
    return rows @ rows.mT / (idx.numel() * model.config.n_head)


def spread(model, idx):
    """idx (B, T ≥ 2) → (L,): var(l) above."""
    n = torch.arange(1, idx.size(1) + 1, device=idx.device, dtype=torch.float32)                        # tokens that row t sees
    return torch.stack([((P * P).sum(-1) / n - 1 / n**2)[..., 1:].mean() for P in model.attention_weights(idx)])


@torch.no_grad()
def gram(model, windows):
    """windows (N, T) → (L, H, L, H) in float64: the inner products ⟨P_l[h], P_m[g]⟩, summed over the windows."""
    L, H = model.config.n_layer, model.config.n_head
    total = torch.zeros(L * H, L * H, dtype=torch.float64)
    for window in windows:
        rows = torch.stack(model.attention_weights(window[None])).flatten(0, 2).flatten(1)              # (L·H, T·T)
        total += (rows @ rows.mT).cpu()
    return total.view(L, H, L, H)


def nearest_mixture(A, b, steps=1000):
    """For each row of b (R, H), the w (H,) ≥ 0 with Σ w = 1 that minimises w A wᵀ − 2 w·b. → (R, H).

    Projected gradient descent with momentum (FISTA, Beck & Teboulle 2009); the projection on the simplex as in Duchi et al. 2008.
    """
    H = A.size(0)
    w = z = torch.full_like(b, 1 / H)
    rate, t = 1 / torch.linalg.matrix_norm(A, 2), 1.0
    for _ in range(steps):
        v = z - rate * (z @ A - b)
        ordered = v.sort(dim=1, descending=True).values
        excess = (ordered.cumsum(1) - 1) / torch.arange(1, H + 1)                                       # if the k largest stay
        kept = (ordered > excess).sum(1, keepdim=True)
        new = (v - excess.gather(1, kept - 1)).clamp(min=0)
        t_new = (1 + (1 + 4 * t * t)**0.5) / 2
        w, z, t = new, new + (t - 1) / t_new * (new - w), t_new
    return w


def share(model, config, products=None):
    """A model → one with another config, which differs in what it shares, zero-shot. It uses the same weights, not copies, but for the v of reuse layers.

    products: gram(model, windows of a calibration text), for config.heads "match" and "mix".
    Raises ValueError if the model has no weights for what the config says.
    """
    with torch.device("meta"):
        shared = GPT(config)
    checkpoint.load_weights(shared, model.state_dict(), model.config)
    for a, b in config.spans if products is not None and config.heads != "same" else []:
        for layer in range(a + 1, b + 1):
            among, between = products[a, :, a], products[layer, :, a]                                   # (H, H) each
            attention = shared.blocks[layer].attn
            if config.heads == "match":
                attention.source = (between / among.diagonal().sqrt()).argmax(1)
            else:
                attention.mix.data = nearest_mixture(among, between).to(attention.mix)
    return shared.to(model.embed.weight.device).eval()


@torch.no_grad()
def refit(shared, model, windows, ridge=0.1):
    """Refit the output projections of the reuse layers of share(model, …), in place, on windows (N, T) of a calibration text.

    The layers are taken in turn, each on what it sees in the model that shares, refitted below it.
    λ is ridge · the mean of the diagonal of Σ z zᵀ. Raises ValueError if the model shares otherwise than `shared`.
    """
    if model.config.share != shared.config.share and model.config.share:
        raise ValueError(f"--refit: needs the outputs of full attention, but the model already shares {model.config.share}")
    T, C = windows.size(1), model.config.n_embd

    def changed(attn):
        return attn.role == "reuse" or shared.config.ranks

    positions = torch.arange(T, device=windows.device)
    angles = rope_angles(model.config, positions)
    x_full = [model.embed(window[None]) for window in windows]                                          # (1, T, C) each
    x, passed, passed_full, mask = list(x_full), [None] * len(windows), [None] * len(windows), causal_mask(positions, positions, T, like=x_full[0])
    for block, full in zip(shared.blocks, model.blocks):
        zz, zy = (torch.zeros(block.attn.out.weight.size(1), n, dtype=torch.float64) for n in (block.attn.out.weight.size(1), C))
        out, block.attn.out = block.attn.out, torch.nn.Identity()                                       # so that attn() gives z
        for i in range(len(windows)):
            y, passed_full[i] = full.attn(full.norm1(x_full[i]), angles, mask, passed_full[i])
            if changed(block.attn):
                z = block.attn(block.norm1(x[i]), angles, mask, passed[i])[0][0]                          # (T, C)
                zz += (z.mT.float() @ z.float()).cpu()
                zy += (z.mT.float() @ (y[0] - out(z)).float()).cpu()
            x_full[i] = x_full[i] + y
            x_full[i] = x_full[i] + full.mlp(full.norm2(x_full[i]))
        block.attn.out = out
        if changed(block.attn):
            zz.diagonal().add_(ridge * zz.diagonal().mean())
            out.weight = torch.nn.Parameter(out.weight + torch.linalg.solve(zz, zy).mT.to(out.weight))  # another tensor: model keeps its own
        for i in range(len(windows)):
            x[i], passed[i] = block(x[i], angles, mask, passed[i])
    return shared


def calibration(model, data):
    """Twelve windows (12, T ≤ 512) of the training part of a minisa.data.Data."""
    return data.windows("train", 12, min(512, model.config.block_size)).to(model.embed.weight.device)[:, :-1]


def share_fitted(model, config, data, refit_outputs=False):
    """share(), fitted on the training part of a minisa.data.Data: heads on four windows, and output projections, if wanted, on twelve."""
    windows = calibration(model, data)
    products = None
    if config.heads != "same":
        print(f"comparing the heads of all layers on {data.name}", file=sys.stderr, flush=True)
        products = gram(model, windows[::3])
    shared = share(model, config, products)
    if refit_outputs:
        print(f"refitting the output projections of reuse layers on {data.name}", file=sys.stderr, flush=True)
        refit(shared, model, windows)
    return shared


@torch.inference_mode()
def loss(model, windows):
    """windows (N, T + 1) → mean cross-entropy of their last T tokens, in nats."""
    return sum(F.cross_entropy(model.head(model.hidden(w[None, :-1]))[0].float(), w[1:]).item() for w in windows) / len(windows)


@torch.inference_mode()
def scan(model, windows, longest, share_kind="weights", heads="same", products=None, skip=()):
    """Yield (a, b, loss, divergence) for every span a..b of at most `longest` layers that is not in skip, shared zero-shot.

    loss: as loss(). divergence: the mean over tokens of KL(p‖q), in nats, where p and q are what full attention and the shared
    model predict next. Unlike a difference of losses it is never negative, and on a short text it varies far less.
    What lies below a span is computed once for all spans, and what lies inside once for all spans with the same anchor.
    """
    L, T = model.config.n_layer, windows.size(1) - 1
    positions = torch.arange(T, device=windows.device)
    angles = rope_angles(model.config, positions)
    below = [[model.embed(w[None, :-1]) for w in windows]]                                              # the input of each layer
    mask = causal_mask(positions, positions, T, like=below[0][0])
    for block in model.blocks[:-1]:
        below.append([block(x, angles, mask)[0] for x in below[-1]])

    def logits(x, blocks):                                                                              # (1, T, C) → (T, V)
        for block in blocks:
            x, _ = block(x, angles, mask)
        return model.head(model.norm(x))[0].float()

    full = [F.log_softmax(logits(x, model.blocks[-1:]), dim=-1) for x in below[-1]]
    for a in range(L - 1):
        last = min(a + longest, L) - 1
        if all((a, b) in skip for b in range(a + 1, last + 1)):
            continue
        blocks = share(model, replace(model.config, share=f"{a}-{last}", share_kind=share_kind, heads=heads), products).blocks
        inside = [blocks[a](x, angles, mask) for x in below[a]]                                           # (x, shared) of each window
        for b in range(a + 1, last + 1):
            inside = [blocks[b](x, angles, mask, shared) for x, shared in inside]
            if (a, b) not in skip:
                nats = divergence = 0.0
                for (x, _), w, log_p in zip(inside, windows, full):
                    log_q = F.log_softmax(logits(x, model.blocks[b + 1:]), dim=-1)
                    nats += F.nll_loss(log_q, w[1:]).item() / len(windows)
                    divergence += F.kl_div(log_q, log_p, log_target=True, reduction="batchmean").item() / len(windows)
                yield a, b, nats, divergence


def best_sets(prices, n_layer, most):
    """prices: {(a, b): divergence} of single spans → {r: (sum, spans)}: for each number r ≤ most of reuse layers, the spans without
    overlap whose prices add up to the least. Dynamic programming over the layers; that prices add up is an assumption."""
    best = [{0: (0.0, ())}]                                     # best[i][r]: r reuse layers among layers 0..i-1
    for i in range(1, n_layer + 1):
        here = dict(best[-1])
        for (a, b), price in prices.items():
            if b == i - 1:
                for r, (total, spans) in best[a].items():
                    r += b - a
                    if r <= most and (r not in here or total + price < here[r][0]):
                        here[r] = (total + price, (*spans, (a, b)))
        best.append(here)
    return {r: best[-1][r] for r in sorted(best[-1]) if r}


def spans_text(spans):
    return ",".join(f"{a}-{b}" for a, b in spans)


def write_csv(file, columns, rows):
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(columns)
    table.writerows(rows)
    checkpoint.write_file(file, text.getvalue().encode())


def read_scan(file, settings):
    """The rows of an earlier scan with the same settings → {(a, b): (loss, divergence)}, (-1, -1) for full attention."""
    try:
        rows = list(csv.reader(file.read_text().splitlines()))[1:] if file.exists() else []
        if any(row[:3] != settings for row in rows):
            raise ValueError("it is of another model, text, --windows or --context")
        return {(int(row[3]), int(row[4])): (float(row[5]), float(row[7])) for row in rows}
    except (IndexError, ValueError, OSError) as error:
        raise ValueError(f"{file}: cannot be continued ({error}); delete it, or take another --out_dir") from None


def draw_history(run, out):
    """The similarity maps that train.py --similarity_every=N logged, as one picture."""
    try:
        lines = [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]
    except (OSError, ValueError):
        raise ValueError(f"{run}/log.jsonl: no readable log; train with: python train.py --similarity_every=100") from None
    maps = {f"step {line['step']}": torch.tensor(line["similarity"]) for line in lines if "similarity" in line}
    if not maps:
        raise ValueError(f"{run}/log.jsonl: holds no maps; train with: python train.py --similarity_every=100")
    plot.similarity_maps(maps, out / "history.png")
    print(f"wrote {out}/history.png: {len(maps)} maps")


def maps(model, windows, out):
    """Print and draw how alike the layers attend, and how spread."""
    L = model.config.n_layer
    alike, variance = torch.zeros(L, L), torch.zeros(L)
    for i, window in enumerate(windows):
        print(f"\rattention weights of window {i + 1} of {len(windows)}", end="", flush=True)
        alike += layer_similarity(model, window[None]).cpu() / len(windows)
        variance += spread(model, window[None]).cpu() / len(windows)
    print("\n\nmean cosine of the attention weights of two layers, in hundredths:")
    print("layer " + "".join(f"{layer:>4}" for layer in range(L)))
    for layer in range(L):
        print(f"{layer:>5} " + "".join(f"{round(100 * value):>4}" for value in alike[layer].tolist()))
    print("\nlayer   like the next   spread (variance of the weights)")
    for layer in range(L):
        following = f"{alike[layer, layer + 1]:.3f}" if layer + 1 < L else ""
        print(f"{layer:>5}   {following:>13}   {variance[layer]:.6f}")
    write_csv(out / "similarity.csv", ["layer", *range(L)], [[layer, *row] for layer, row in enumerate(alike.tolist())])
    write_csv(out / "spread.csv", ["layer", "variance"], enumerate(variance.tolist()))
    plot.similarity_maps({"how alike the layers attend": alike}, out / "similarity.png")
    plot.by_layer(variance.tolist(), "variance of attention weights", out / "spread.png")
    print(f"wrote {out}/similarity.csv, similarity.png, spread.csv, spread.png", flush=True)


def run_scan(model, fit, search, held_out, refit_on, settings, args, out):
    """Scan all spans, print and draw them, and look for the best sets of spans."""
    L, T, kind, heads = model.config.n_layer, search.size(1) - 1, args.share_kind, args.heads
    name = f"scan-{kind}" + (f"-{heads}" if heads != "same" else "")
    file = out / f"{name}.csv"
    found = read_scan(file, settings)
    products = None
    if heads != "same":
        print(f"comparing heads on {len(fit)} windows", flush=True)
        products = gram(model, fit[:, :-1])
    full = loss(model, search)
    found[-1, -1] = full, 0.0

    def save():
        write_csv(file, ["model", "windows", "context", "anchor", "last", "loss", "percent", "divergence"],
                  [[*settings, a, b, nats, round(100 * (nats / full - 1), 3), divergence] for (a, b), (nats, divergence) in found.items()])

    C, M, V = model.config.n_embd, model.config.n_hidden, model.config.vocab_size
    left = {(a, b): (L - b) * (4 * C * C + 3 * C * M) + V * C                   # work
            for a in range(L - 1) for b in range(a + 1, min(a + args.longest, L)) if (a, b) not in found}
    work, begun = sum(left.values()), time.perf_counter()
    try:
        for a, b, nats, divergence in scan(model, search, args.longest, kind, heads, products, skip=found):
            found[a, b] = nats, divergence
            save()
            left.pop((a, b))
            seconds = (time.perf_counter() - begun) / (work - sum(left.values())) * sum(left.values())
            print(f"span {f'{a}-{b}':>6}  loss {nats:.4f}  {100 * (nats / full - 1):+8.2f} %  divergence {divergence:.4f}   {len(left)} spans, {int(seconds) // 60}m{int(seconds) % 60:02d}s left", flush=True)
    except KeyboardInterrupt:
        raise ValueError(f"stopped; {file} holds {len(found) - 1} spans, and the same command goes on from there") from None
    save()
    del found[-1, -1]
    percent = {span: 100 * (nats / full - 1) for span, (nats, _) in found.items()}
    prices = {span: divergence for span, (_, divergence) in found.items()}
    plot.span_map(percent, L, f"zero-shot, {kind}" + (f", heads {heads}" if heads != "same" else ""), out / f"{name}.png")
    print(f"wrote {file} and {name}.png; full attention: {full:.4f} nats per token")

    print(f"\nfor each number of reuse layers, the loss over full attention in the median over all spans, and the span of least divergence")
    print(f"reuse layers       median    best span      loss   cache saved   FLOPs saved at context {T}")
    for r in range(1, args.longest):
        spans = [span for span in percent if span[1] - span[0] == r]
        if spans:
            best = min(spans, key=prices.get)
            config = replace(model.config, share=spans_text([best]), share_kind=kind, heads=heads)
            less, whole = cost(config, T), cost(model.config, T)
            print(f"{r:>12}   {statistics.median(percent[span] for span in spans):>+8.2f} %   {spans_text([best]):>10} {percent[best]:>+7.2f} %"
                  f"{1 - less.cache_bytes / whole.cache_bytes:>14.1%}{1 - less.decode_flops / whole.decode_flops:>14.1%}")

    print(f"\nthe best sets of spans, if their divergences add up; loss over full attention, on {len(held_out)} windows of the validation part")
    print("reuse layers       measured" + ("     refitted" if args.refit else "") + "   cache saved   spans")
    held_out_full = loss(model, held_out)
    rows = []
    for r, (total, spans) in best_sets(prices, L, args.most).items():
        text = spans_text(spans)
        shared = share(model, replace(model.config, share=text, share_kind=kind, heads=heads), products)
        measured = [100 * (loss(shared, held_out) / held_out_full - 1)]
        if args.refit:
            measured.append(100 * (loss(refit(shared, model, refit_on), held_out) / held_out_full - 1))
        part = 1 - cost(replace(model.config, share=text, share_kind=kind), T).cache_bytes / cost(model.config, T).cache_bytes
        rows.append([r, text, total, *measured, part])
        print(f"{r:>12}   " + "".join(f"   {percent:>+7.2f} %" for percent in measured) + f"   {part:>11.1%}   {text}", flush=True)
    columns = ["reuse_layers", "spans", "divergence_sum", "percent_measured", *["percent_refitted"] * args.refit, "cache_saved"]
    write_csv(out / f"{name.replace('scan', 'sets')}.csv", columns, rows)


def main():
    parser = Parser(__doc__, usage="python -m minisa.similarity MODEL [--FLAG=VALUE ...]")
    add = parser.add_argument
    add("model", metavar="MODEL", help="a run's folder, a .gguf file, or smollm2")
    add("--scan", action="store_true", help="measure the loss of every span, and look for the best sets of spans (default off)")
    add("--history", action="store_true", help="draw the maps that train.py --similarity_every logged in this run (default off)")
    add("--share_kind", metavar="STR", default="weights", help="what the scanned spans share: weights (Shared Attention) or kv (Cross-Layer Attention) (default weights)")
    add("--heads", metavar="STR", default="same", help="whose weights a head of a reuse layer takes: same, match or mix (default same)")
    add("--refit", action="store_true", help="with --scan: measure the best sets with refitted output projections too (default off)")
    add("--longest", metavar="INT", type=at_least(int, 2), default=5, help="length of the longest span scanned, in layers (default 5)")
    add("--most", metavar="INT", type=count, default=8, help="largest number of reuse layers to look for a set of spans for (default 8)")
    add("--windows", metavar="INT", type=count, default=4, help="windows of text for the maps and for fitting heads, as many others for the scan, and twice as many for the sets (default 4)")
    add("--context", metavar="INT", type=at_least(int, 2), default=512, help="length of a window, in tokens (default 512, or block_size if that is less)")
    add("--text", metavar="FILE", help="UTF-8 text (default the one that the run was trained on, or nine plays of Shakespeare)")
    add("--out_dir", metavar="DIR", help="where pictures and .csv files go (default MODEL for a run, else out/similarity-NAME)")
    add("--device", metavar="STR", type=device, default="cpu", help="cpu, cuda, cuda:1 or mps (default cpu)")
    args = parser.parse_args()
    plot.pyplot("minisa.similarity")
    out = Path(args.out_dir or (args.model if Path(args.model).is_dir() else f"out/similarity-{Path(args.model).stem}"))
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out_dir={out}: is a file; name a folder")
    if args.history:
        return draw_history(args.model, out)
    model, tokenizer, info = checkpoint.load(args.model, device=args.device)
    if args.scan:
        if model.config.share:
            raise ValueError(f"{args.model}: already shares {model.config.share}; --scan needs a model that was trained with full attention")
        replace(model.config, share="0-1", share_kind=args.share_kind, heads=args.heads)    # raises for a wrong kind
    data = Data(info["data"]) if info["data"] and Path(info["data"]).exists() and not args.text else Data(tokenize(args.text or plays(), tokenizer=tokenizer))
    T = min(args.context, model.config.block_size)
    windows = data.windows("train", 2 * args.windows, T).to(args.device)
    if args.scan:
        version = f" {info['step']} {info['val_loss']}" if info["step"] is not None else ""     # a run trained anew is another model
        settings = [str(args.model) + version, f"{args.windows} of {data.name}", str(T)]
        held_out, refit_on = data.windows("val", 2 * args.windows, T).to(args.device), data.windows("train", 12, T).to(args.device)[:, :-1]
        run_scan(model, windows[::2], windows[1::2], held_out, refit_on, settings, args, out)
    else:
        maps(model, windows[::2, :-1], out)


def plays():
    from data.prepare import prepare
    return prepare()


if __name__ == "__main__":
    command(main)
