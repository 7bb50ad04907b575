"""Which spans of a trained model can share? Every short span is made to share, without training.

    python -m minisa.lab.scan smollm2                           the loss of every span, and the best sets
    python -m minisa.lab.scan smollm2 --heads=mix --refit       with the anchor's heads mixed for each head

The price of a span is its divergence: the mean over tokens of KL(p‖q), in nats, where p and q are what full
attention and the model that shares predict next. Unlike a difference of losses it is never negative, and on a
short text it varies far less. The best sets of spans are those whose prices add up to the least.

Ctrl-C stops a scan, and the same command goes on with it. It writes, for weights and heads mix,
scan-weights-mix.csv and .png (each span), spans-weights-mix.csv (by length) and sets-weights-mix.csv (the
best sets).
"""

import csv
import os
import statistics
import sys
import time
from functools import partial

import torch
from torch.nn import functional as F

from minisa.axes.common import walk
from minisa.axes.heads import head_products, refit, share
from minisa.cost import layer_flops, predict
from minisa.kit.cli import at_least, command, count
from minisa.kit.files import check, read_file, write_csv
from minisa.kit.results import print_table
from minisa.lab import plot
from minisa.lab.similarity import open_data, parser
from minisa.model import share_kind

FULL = (-1, -1)             # the "span" of full attention in a .csv file

@torch.inference_mode()
def mean_loss(model, windows):
    """windows (N, T + 1) → mean cross-entropy of their last T tokens, in nats."""
    return statistics.fmean(model(window[None, :-1], window[None, 1:])[1].item() for window in windows)

def percent(loss, full):
    """How much a loss is over that of full attention."""
    return 100 * (loss / full - 1)

# ---- the search ----

def predictions(model, x):
    """What the last block gives, x (T, C) → log probabilities (T, V)."""
    return F.log_softmax(model.head(model.norm(x)).float(), dim=-1)

@torch.inference_mode()
def scan(model, windows, longest, share_kind="weights", heads="same", products=None, skip=()):
    """windows (N, T + 1). Yield (a, b, loss, divergence), in nats, for every span a..b of at most `longest`
    layers that is not in skip; see the top of this file. How they share: as of axes.heads.share().

    What lies below a span is computed once for all spans, and what lies inside once for all spans with the
    same anchor.
    """
    L, layers = model.config.n_layer, list(walk(model, windows[:, :-1]))
    below, step = [x for _, x, _, _ in layers], layers[0][2]            # the input (N, T, C) of each layer
    log_p = [predictions(model, x) for x in model.blocks[-1](below[-1], step)[0]]
    for a in range(L - 1):
        ends = range(a + 1, min(a + longest, L))
        if all((a, b) in skip for b in ends):
            continue
        blocks = share(model, f"{a}-{ends[-1]}", heads, products, share_kind).blocks
        inside, handed = blocks[a](below[a], step)
        for b in ends:
            inside, handed = blocks[b](inside, step, handed)
            if (a, b) not in skip:
                x = inside
                for block in model.blocks[b + 1:]:
                    x, _ = block(x, step)
                yield a, b, *price(model, x, log_p, windows)

def price(model, x, log_p, windows):
    """What the last block gives, x (N, T, C) → the loss, and the divergence from log_p, N of (T, V)."""
    prices = []
    for above, expected, window in zip(x, log_p, windows):
        log_q = predictions(model, above)
        divergence = F.kl_div(log_q, expected, log_target=True, reduction="batchmean")
        prices.append((F.nll_loss(log_q, window[1:]).item(), divergence.item()))
    return map(statistics.fmean, zip(*prices))

def best_sets(prices, n_layer, most):
    """prices: {(a, b): price of a span alone} → {r: (sum, spans)}: for each number r ≤ most of reuse layers,
    the spans without overlap whose prices add up to the least. That prices add up is an assumption.

    Dynamic programming: best[i][r] is the best set of r reuse layers among the layers 0..i-1.
    """
    best = [{0: (0.0, ())}]
    for i in range(1, n_layer + 1):
        here = dict(best[-1])
        for (a, b), cost in prices.items():
            if b != i - 1:
                continue
            for r, (total, spans) in best[a].items():
                r, total = r + b - a, total + cost
                if r <= most and (r not in here or total < here[r][0]):
                    here[r] = total, (*spans, (a, b))
        best.append(here)
    return {r: best[-1][r] for r in sorted(best[-1]) if r}

def spans_text(spans):
    """[(1, 3), (5, 7)] → "1-3,5-7"."""
    return ",".join(f"{a}-{b}" for a, b in spans)

# ---- a scan on disk ----

def read_scan(file, origin, n_layer):
    """What an earlier scan wrote → {(a, b): (loss, divergence)}. Raises ValueError if its rows are not of
    this origin: model, windows and context, as text; or not of spans of n_layer layers."""
    try:
        rows = list(csv.reader(read_file(file).decode().splitlines()))[1:] if os.path.lexists(file) else []
        if any(row[:3] != origin for row in rows):
            raise ValueError("it is of another model, text, --windows or --context")
        found = {(int(a), int(b)): (float(loss), float(divergence))
                 for _, _, _, a, b, loss, divergence in rows}
        check([number for pair in found.values() for number in pair], [float], "a number in it")
        if not all(0 <= a < b < n_layer for a, b in found.keys() - {FULL}):
            raise ValueError("it has a span that this model has not")
        return found
    except (IndexError, ValueError, OSError, csv.Error) as error:
        error = getattr(error, "strerror", None) or error
        raise ValueError(f"{file}: cannot be continued ({error}); "
                         "delete it, or take another --out_dir") from None

def run_scan(found, file, origin, model, windows, longest, **sharing):
    """Find what is missing in a scan, and print and write it span by span. sharing: as of scan()."""
    L, T = model.config.n_layer, windows.size(1) - 1
    layer, head = layer_flops(model.blocks[0], T, T), 2 * model.config.n_embd * model.config.vocab_size * T
    left = {(a, b): (L - b) * layer + head for a in range(L - 1) for b in range(a + 1, min(a + longest, L))
            if (a, b) not in found}                                     # FLOPs, nearly
    work, begun = sum(left.values()), time.perf_counter()
    columns = ["model", "windows", "context", "anchor", "last", "loss", "divergence"]
    try:
        for a, b, loss, divergence in scan(model, windows, longest, **sharing, skip=found):
            found[a, b] = loss, divergence
            write_csv(file, columns, ([*origin, *span, *prices] for span, prices in found.items()))
            del left[a, b]
            ahead = sum(left.values())
            seconds = int((time.perf_counter() - begun) / (work - ahead) * ahead)
            print(f"span {f'{a}-{b}':>6}  loss {loss:.4f}  {percent(loss, found[FULL][0]):+8.2f} %  "
                  f"divergence {divergence:.4f}   {len(left)} spans, "
                  f"{seconds // 60}m{seconds % 60:02d}s left", flush=True)
    except KeyboardInterrupt:
        raise ValueError(f"stopped; {file} holds {len(found) - 1} spans, "
                         "and the same command goes on from there") from None

# ---- what it shows ----

def print_spans(prices, over, model, sharer, T):
    """For each number of reuse layers, the median span and the best → a table, which is printed too. prices:
    {(a, b): divergence}; over: {(a, b): loss over full attention, in percent}; sharer: spans → a model."""
    print("\nfor each number of reuse layers, the loss over full attention in the median over all spans, and "
          "the span of least divergence")
    rows, whole = [["reuse layers", "median", "best span", "loss", "cache saved",
                    f"FLOPs saved at context {T}"]], predict(model, T)
    for r in sorted({b - a for a, b in over}):
        alike = [(a, b) for a, b in over if b - a == r]
        best = min(alike, key=prices.get)
        less = predict(sharer(spans_text([best])), T)
        rows.append([str(r), f"{statistics.median(over[span] for span in alike):+.2f} %", spans_text([best]),
                     f"{over[best]:+.2f} %", f"{1 - less.cache_bytes / whole.cache_bytes:.1%}",
                     f"{1 - less.decode_flops / whole.decode_flops:.1%}"])
    print_table(rows)
    return rows

def measure_sets(prices, model, sharer, held_out, refit_on, most):
    """Print the best sets, measured on held_out (N, T + 1), and if refit_on (N, T) is given, refitted on it.
    → rows: reuse layers, spans, percent (and percent refitted), part of the cache saved."""
    print("\nthe best sets of spans, if their divergences add up; loss over full attention, on "
          f"{len(held_out)} windows of the validation part")
    refits = refit_on is not None
    print("reuse layers       measured" + "     refitted" * refits + "   cache saved   spans")
    T, full, rows = held_out.size(1) - 1, mean_loss(model, held_out), []
    for r, (_, spans) in best_sets(prices, model.config.n_layer, most).items():
        name = spans_text(spans)
        shared = sharer(name)
        over = [percent(mean_loss(shared, held_out), full)]
        if refits:
            over.append(percent(mean_loss(refit(shared, model, refit_on), held_out), full))
        saved = 1 - predict(shared, T).cache_bytes / predict(model, T).cache_bytes
        rows.append([r, name, *over, saved])
        percents = "".join(f"   {value:>+7.2f} %" for value in over)
        print(f"{r:>12}   {percents}   {saved:>11.1%}   {name}", flush=True)
    return rows

# ---- the command ----

def read_args():
    flags = parser(__doc__, "scan")
    flags.flag("share_kind", share_kind, "weights", "what spans share: weights (Shared Attention), kv "
               "(Cross-Layer Attention) or the NAME of a kind in minisa/axes")
    flags.flag("heads", default="same", choices=["same", "match", "mix"],
               help="whose weights a head of a reuse layer takes: those of the anchor's same head, of the "
               "most alike, or a mixture of all")
    flags.switch("refit", "measure the best sets with refitted output projections too")
    flags.flag("longest", at_least(int, 2), 5, "length of the longest span, in layers")
    flags.flag("most", count, 8, "largest number of reuse layers to look for a set of spans for")
    flags.flag("windows", count, 4, "windows of text for fitting heads, as many others for the spans, and "
               "twice as many for the sets")
    return flags.parse_args()

def find(args, model, data, out, T):
    """Scan all spans, then look for the best sets of them; print, draw and write both."""
    windows = data.windows("train", 2 * args.windows, T).to(args.device)
    fit, search = windows[::2, :-1], windows[1::2]
    name = args.share_kind if args.heads == "same" else f"{args.share_kind}-{args.heads}"
    file = out / f"scan-{name}.csv"
    version = model.origin[1][:8]                           # trained anew, it is another model
    origin = [f"{args.model} {version}", f"{args.windows} of {data.name}", str(T)]
    found = read_scan(file, origin, model.config.n_layer)
    sharing = {"share_kind": args.share_kind, "heads": args.heads, "products": None}
    if args.heads != "same":
        print(f"comparing heads on {args.windows} windows", file=sys.stderr, flush=True)
        sharing["products"] = head_products(model, fit)

    full = mean_loss(model, search)
    found[FULL] = full, 0.0
    run_scan(found, file, origin, model, search, args.longest, **sharing)
    del found[FULL]
    over = {span: percent(loss, full) for span, (loss, _) in found.items()}
    prices = {span: divergence for span, (_, divergence) in found.items()}
    title = f"loss of each span, zero-shot, {name.replace('-', ', heads ')}"
    plot.span_map(over, model.config.n_layer, title, out / f"scan-{name}.png")
    print(f"wrote {file} and scan-{name}.png; full attention: {full:.4f} nats per token")

    sharer = partial(share, model, **sharing)
    head, *rows = print_spans(prices, over, model, sharer, T)
    write_csv(out / f"spans-{name}.csv", head, rows)
    held_out = data.windows("val", 2 * args.windows, T).to(args.device)
    refit_on = data.windows("train", 12, T).to(args.device)[:, :-1] if args.refit else None
    rows = measure_sets(prices, model, sharer, held_out, refit_on, args.most)
    columns = ["reuse_layers", "spans", "percent_measured", *["percent_refitted"] * args.refit, "cache_saved"]
    write_csv(out / f"sets-{name}.csv", columns, rows)

def main():
    args = read_args()
    model, data, out, T = open_data(args)
    if model.config.share:
        raise ValueError(f"{args.model}: already shares {model.config.share}; scan a model that was trained "
                         "with full attention")
    share(model, "0-1", args.heads, share_kind=args.share_kind)         # raises if its layers cannot
    find(args, model, data, out, T)

if __name__ == "__main__":
    command(main)
