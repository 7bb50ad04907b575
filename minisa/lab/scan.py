"""Which spans of a trained model can share? Every short span is made to share, without training.

    python -m minisa.lab.scan smollm2                           the loss of every span, and the best sets
    python -m minisa.lab.scan smollm2 --heads=mix --refit       heads of the anchor mixed for each head

A span is judged by its divergence: the mean over tokens of KL(p‖q), in nats, where p is what the model with
full attention predicts next, and q what the model that shares predicts. Unlike a difference of losses it is
never negative, and it varies far less on a short text. The best sets of spans are those with the smallest sum
of divergences.

Ctrl-C stops a scan, and the same command continues it. For --heads=mix it writes scan-weights-mix.csv and
.png (each span), spans-weights-mix.csv (by number of reuse layers) and sets-weights-mix.csv (the best sets).
"""

import itertools
import math
import os
import statistics
import sys
import time
from functools import partial

import torch
from torch.nn import functional as F

from minisa.axes.common import calibration, walk
from minisa.axes.heads import head_products, refit, share
from minisa.cost import predict
from minisa.kit.checkpoint import add_share_kind
from minisa.kit.cli import add_dtype, at_least, command, count
from minisa.kit.files import reading
from minisa.kit.results import print_table, write_results
from minisa.lab import plot
from minisa.lab.benchmarks import mean_and_error, paired_means
from minisa.lab.similarity import open_data, parser
from minisa.lab.tables import load

FULL = (-1, -1)             # the "span" of full attention in a .csv file

def percent(loss, full):
    """By how much a loss exceeds that of full attention."""
    return 100 * (loss / full - 1)

# ---- what models predict ----

def prediction(logits, window):
    """logits (T, V): after each of the first T tokens of a window (T + 1,). → the loss in nats, and log
    probabilities (T, V) of the next token."""
    log_p = logits.float().log_softmax(-1)
    return F.nll_loss(log_p, window[1:]).item(), log_p

@torch.inference_mode()
def predictions(model, windows):
    """Yield the prediction() of a model in each of windows (N, T + 1)."""
    for window in windows:
        logits, _ = model(window[None, :-1])
        yield prediction(logits[0], window)

def from_outputs(model, outputs, windows):
    """The same, given the outputs (N, T, C) of the last block."""
    for x, window in zip(outputs, windows):
        logits = model.head(model.norm(x))
        yield prediction(logits, window)

def losses_and_divergences(shared, full):
    """The predictions() of a model that shares, and of full attention, in the same windows → two lists, of
    each window a mean over its tokens: the loss of the model that shares, and its divergence."""
    losses, divergences = [], []
    for (loss, log_q), (_, log_p) in zip(shared, full):
        divergence = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
        losses.append(loss)
        divergences.append(divergence.item())
    return losses, divergences

# ---- the search ----

@torch.inference_mode()
def scan(model, sharing, windows, spans):
    """Yield (a, b, loss, divergence), in nats, for each of these spans. sharing: a function from spans, as
    "1-3", to a model that shares them. windows: (N, T + 1)."""
    layers = list(walk(model, windows[:, :-1]))
    inputs = [x for _, x, _, _ in layers]                       # (N, T, C) for each layer
    step = layers[0][2]
    outputs, _ = model.blocks[-1](inputs[-1], step)
    full = list(from_outputs(model, outputs, windows))
    for a, b in spans:
        x, handed_up = inputs[a], None                          # below the anchor, nothing changes
        for block in sharing(f"{a}-{b}").blocks[a:]:
            x, handed_up = block(x, step, handed_up)
        losses, divergences = losses_and_divergences(from_outputs(model, x, windows), full)
        yield a, b, statistics.fmean(losses), statistics.fmean(divergences)

def best_sets(divergences, n_layer, most):
    """divergences: {(a, b): that of a span alone} → {r: (sum, spans)}: for each number r ≤ most of reuse
    layers, the spans without overlap whose divergences have the smallest sum. That they add up is assumed.

    Dynamic programming: best[n][r] is the best set of r reuse layers among the first n layers.
    """
    best = [{0: (0.0, ())}]
    for last in range(n_layer):
        sets = dict(best[last])
        for (a, b), divergence in divergences.items():
            if b == last:
                for r, (total, spans) in best[a].items():
                    longer = total + divergence, (*spans, (a, b))
                    r += b - a
                    sets[r] = min(longer, sets.get(r, longer))
        best.append(sets)
    return {r: sets[r] for r in sorted(sets) if 0 < r <= most}

def spans_text(spans):
    """[(1, 3), (5, 7)] → "1-3,5-7"."""
    return ",".join(f"{a}-{b}" for a, b in spans)

# ---- results on disk, which a stopped run continues ----

def read_earlier(file, origin, key, numbers, known=None):
    """→ {what the columns `key` hold: row} of an earlier run; {} if there was none. Raises ValueError unless
    all rows begin with `origin`, the columns that say what was measured, and have finite `numbers` and keys
    that are among those `known` (None: any)."""
    if not os.path.lexists(file):
        return {}
    what = "of another model, text or flag: it cannot be continued"
    with reading(file, what, "move it away, or take another --out_dir"):
        rows = load(file)
        keys = [*rows[key].itertuples(index=False, name=None)]
        same = rows[[*origin]] == [*origin.values()]
        finite = rows[numbers].abs() < math.inf
        is_known = known is None or known.issuperset(keys)
        if not (same.all(axis=None) and finite.all(axis=None) and is_known):
            raise ValueError("it has other rows")
    return dict(zip(keys, rows.to_dict("records")))

def continue_scan(rows, file, origin, model, sharing, windows, spans):
    """Measure the spans that are missing from rows, {(a, b): row}; print and write them one by one."""
    def add(a, b, loss, divergence):
        rows[a, b] = {**origin, "anchor": a, "last": b, "loss": loss, "divergence": divergence}

    if FULL not in rows:
        loss = statistics.fmean(loss for loss, _ in predictions(model, windows))
        add(*FULL, loss, 0.0)
    missing = [span for span in spans if span not in rows]
    begun, found = time.perf_counter(), scan(model, sharing, windows, missing)
    for n, (a, b, loss, divergence) in enumerate(found, start=1):
        add(a, b, loss, divergence)
        write_results(file, [*rows.values()])
        left = len(missing) - n
        minutes = (time.perf_counter() - begun) / n * left / 60         # at most: later spans take less
        over = percent(loss, rows[FULL]["loss"])
        print(f"span {a}-{b}: loss {loss:.4f} ({over:+.2f} %), divergence {divergence:.4f}; "
              f"{left} spans left, at most {minutes:.0f} minutes", flush=True)

# ---- what it shows ----

def saved(model, shared, context):
    """→ the fractions of the cache, and of the FLOPs of a decode step, that sharing saves."""
    full = predict(model, context)
    less = predict(shared, context)
    return 1 - less.cache_bytes / full.cache_bytes, 1 - less.decode_flops / full.decode_flops

def summarize(percents, divergences, model, sharing, context):
    """→ a row for each number of reuse layers: the median of its spans, and the one with least divergence.
    percents: {(a, b): by how much the loss exceeds that of full attention}."""
    rows = []
    for r in sorted({b - a for a, b in percents}):
        spans = [(a, b) for a, b in percents if b - a == r]
        best = min(spans, key=divergences.get)
        name = spans_text([best])
        cache_saved, flops_saved = saved(model, sharing(name), context)
        rows.append({
            "reuse_layers": r,
            "median_percent": statistics.median(percents[span] for span in spans),
            "best_span": name,
            "best_percent": percents[best],
            "median_divergence": statistics.median(divergences[span] for span in spans),
            "best_divergence": divergences[best],
            "cache_saved": cache_saved,
            "flops_saved": flops_saved,
        })
    return rows

def measure(shared, full, held_out):
    """→ columns: by how many percent the loss of a model that shares exceeds that of full attention, and its
    divergence, on windows (N, T + 1), each with its standard error over the windows. full: the predictions()
    of full attention, in a list."""
    losses, divergences = losses_and_divergences(predictions(shared, held_out), full)
    before = [loss for loss, _ in full]
    difference, error = paired_means(before, losses)
    divergence, divergence_error = mean_and_error(divergences)
    of_loss = 100 / statistics.fmean(before)
    return {
        "percent": of_loss * difference,
        "percent_error": of_loss * error,
        "divergence": divergence,
        "divergence_error": divergence_error,
    }

def measure_sets(sets, model, sharing, held_out, refit_on=None):
    """sets: {reuse layers: spans}. → rows for each, as measured on held_out (N, T + 1), and again after a
    refit on refit_on (N, T)."""
    full = list(predictions(model, held_out))
    rows = []
    for r, spans in sets.items():
        print(f"measuring {spans}", file=sys.stderr, flush=True)
        shared = sharing(spans)
        cache_saved, _ = saved(model, shared, held_out.size(1) - 1)
        known = {"reuse_layers": r, "spans": spans, "cache_saved": cache_saved}
        rows.append({**known, "refitted": "no", **measure(shared, full, held_out)})
        if refit_on is not None:
            refit(shared, model, refit_on)
            rows.append({**known, "refitted": "yes", **measure(shared, full, held_out)})
    return rows

def report(rows, file):
    """Print rows as a table, and write them."""
    table = [list(rows[0])]
    for row in rows:
        cells = [f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row.values()]
        table.append(cells)
    print_table(table)
    write_results(file, rows)

# ---- the command ----

def read_args():
    flags = parser(__doc__, "scan")
    add_share_kind(flags)
    flags.flag("heads", default="same", choices=["same", "match", "mix"],
               help="whose weights a head of a reuse layer reuses: those of the anchor's same head, of the "
               "most similar, or a mixture of all")
    flags.switch("refit", "also measure the best sets with refitted output projections")
    flags.flag("longest", at_least(int, 2), 5, "length of the longest span, in layers")
    flags.flag("most", count, 8, "largest number of reuse layers for which to look for the best set of spans")
    flags.flag("windows", count, 4, "windows of text for fitting heads, as many others for the spans, and "
               "twice as many for the sets")
    add_dtype(flags, "number format of the weights")
    return flags.parse_args()

def open_full(args):
    """As open_data(), the model in --dtype; and the columns that say what is measured. Raises ValueError if
    the model shares already."""
    model, data, folder, T = open_data(args)
    if model.config.share:
        raise ValueError(f"{args.model}: already shares {model.config.share}; take a model that was trained "
                         "with full attention")
    model.to(getattr(torch, args.dtype))
    _, sha256 = model.origin                                # a model trained anew is another one
    origin = {
        "model": f"{args.model} {sha256[:8]}",
        "windows": f"{args.windows} of {data.name}",
        "context": T,
        "dtype": args.dtype,
    }
    return model, data, folder, T, origin

def main():
    args = read_args()
    model, data, folder, T, origin = open_full(args)
    L = model.config.n_layer
    sharing = partial(share, model, heads=args.heads, share_kind=args.share_kind)
    sharing("0-1")                                          # raises if its layers cannot
    name = args.share_kind if args.heads == "same" else f"{args.share_kind}-{args.heads}"
    file = folder / f"scan-{name}.csv"
    pairs = [*itertools.combinations(range(L), 2)]
    numbers = ["loss", "divergence"]
    earlier = read_earlier(file, origin, ["anchor", "last"], numbers, known={FULL, *pairs})
    rows = {(int(a), int(b)): row for (a, b), row in earlier.items()}

    windows = data.windows("train", 2 * args.windows, T).to(args.device)
    if args.heads != "same":
        products = head_products(model, windows[::2, :-1])
        sharing = partial(sharing, products=products)
    spans = [(a, b) for a, b in pairs if b - a < args.longest]
    continue_scan(rows, file, origin, model, sharing, windows[1::2], spans)
    full = rows.pop(FULL)["loss"]
    percents = {span: percent(row["loss"], full) for span, row in rows.items()}
    divergences = {span: row["divergence"] for span, row in rows.items()}
    plot.span_map(percents, L, f"loss of each span, zero-shot, {name}", file.with_suffix(".png"))
    print(f"wrote {file} and scan-{name}.png; full attention: {full:.4f} nats per token")

    print("\nloss over full attention, in percent, and divergence: the median of all spans, and the best")
    rows = summarize(percents, divergences, model, sharing, T)
    report(rows, folder / f"spans-{name}.csv")
    best = best_sets(divergences, L, args.most)
    sets = {r: spans_text(spans) for r, (_, spans) in best.items()}
    held_out = data.windows("val", 2 * args.windows, T).to(args.device)
    refit_on = calibration(model, data) if args.refit else None
    print(f"\nthe best sets, if divergences add up, on {len(held_out)} windows of the validation part")
    rows = measure_sets(sets, model, sharing, held_out, refit_on)
    report(rows, folder / f"sets-{name}.csv")

if __name__ == "__main__":
    command(main)
