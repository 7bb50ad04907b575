"""Which spans of a trained model can share? Every short span is made to share, without training.

    python -m minisa.lab.scan smollm2                           the loss of every span, and the best sets
    python -m minisa.lab.scan smollm2 --heads=mix --refit       with the anchor's heads mixed for each head

The price of a span is its divergence: the mean over tokens of KL(p‖q), in nats, where p and q are what full
attention and the model that shares predict next. Unlike a difference of losses it is never negative, and on a
short text it varies far less. The best sets of spans are those whose prices add up to the least.

Ctrl-C stops a scan, and the same command goes on with it. It writes, for weights and heads mix,
scan-weights-mix.csv and .png (each span) and sets-weights-mix.csv (the best sets).
"""

import csv
import statistics
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F

from minisa import checkpoint
from minisa.axes.common import walk
from minisa.axes.heads import head_products, refit, share
from minisa.cli import at_least, command, count
from minisa.cost import layer_flops, predict
from minisa.files import sha256
from minisa.lab import plot
from minisa.lab.similarity import open_model, parser, write_csv
from minisa.model import SHARE_KINDS
from minisa.picture import pyplot

FULL = (-1, -1)             # the "span" of full attention in a .csv file

@torch.inference_mode()
def mean_loss(model, windows):
    """windows (N, T + 1) → mean cross-entropy of their last T tokens, in nats."""
    losses = [model(window[None, :-1], window[None, 1:])[1].item() for window in windows]
    return sum(losses) / len(losses)

# ---- the search ----

@dataclass
class Window:
    """A window of text on its way through the model with full attention."""
    below: list             # the input (1, T, C) of each layer
    step: object            # the Step of its tokens
    targets: torch.Tensor   # (T,)
    log_p: torch.Tensor     # (T, V): what full attention predicts

def predictions(model, x, step, first):
    """The input x (1, T, C) of layer `first` → log probabilities (T, V)."""
    for block in model.blocks[first:]:
        x, _ = block(x, step)
    return F.log_softmax(model.head(model.norm(x))[0].float(), dim=-1)

def prepare(model, window):
    """window (T + 1,) → Window"""
    steps = list(walk(model, window[None, :-1]))            # (block, x, step, shared) of each layer
    below, step = [x for _, x, _, _ in steps], steps[0][2]
    return Window(below, step, window[1:], predictions(model, below[-1], step, len(below) - 1))

@torch.inference_mode()
def scan(model, windows, longest, share_kind="weights", heads="same", products=None, skip=()):
    """windows (N, T + 1). Yield (a, b, loss, divergence), in nats, for every span a..b of at most `longest`
    layers that is not in skip; see the top of this file. How they share: as of axes.heads.share().

    What lies below a span is computed once for all spans, and what lies inside once for all spans with the
    same anchor.
    """
    L, texts = model.config.n_layer, [prepare(model, window) for window in windows]
    for a in range(L - 1):
        ends = range(a + 1, min(a + longest, L))
        if all((a, b) in skip for b in ends):
            continue
        blocks = share(model, f"{a}-{ends[-1]}", heads, products, share_kind).blocks
        inside = [blocks[a](text.below[a], text.step) for text in texts]    # (x, what the anchor hands up)
        for b in ends:
            inside = [blocks[b](x, text.step, handed) for (x, handed), text in zip(inside, texts)]
            if (a, b) not in skip:
                prices = [price(model, x, text, b + 1) for (x, _), text in zip(inside, texts)]
                yield a, b, *(sum(column) / len(texts) for column in zip(*prices))

def price(model, x, text, first):
    """A Window whose x (1, T, C) at layer `first` is another → its loss, and its divergence."""
    log_q = predictions(model, x, text.step, first)
    divergence = F.kl_div(log_q, text.log_p, log_target=True, reduction="batchmean")
    return F.nll_loss(log_q, text.targets).item(), divergence.item()

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

@dataclass
class Scan:
    """What has been found, {(a, b): (loss, divergence)}, and the file that holds it."""
    file: Path
    settings: list          # model, windows and context, as text: all rows of a file have the same
    found: dict

    @classmethod
    def read(cls, file, settings):
        """What an earlier scan wrote, or nothing yet. Raises ValueError if it had other settings."""
        try:
            rows = list(csv.reader(file.read_text().splitlines()))[1:] if file.exists() else []
            if any(row[:3] != settings for row in rows):
                raise ValueError("it is of another model, text, --windows or --context")
            found = {(int(row[3]), int(row[4])): (float(row[5]), float(row[7])) for row in rows}
        except (IndexError, ValueError, OSError) as error:
            raise ValueError(f"{file}: cannot be continued ({error}); "
                             "delete it, or take another --out_dir") from None
        return cls(file, settings, found)

    def write(self):
        columns = ["model", "windows", "context", "anchor", "last", "loss", "percent", "divergence"]
        rows = [[*self.settings, *span, loss, round(self.percent(loss), 3), divergence]
                for span, (loss, divergence) in self.found.items()]
        write_csv(self.file, columns, rows)

    def percent(self, loss):
        """A loss, as percent over that of full attention."""
        return 100 * (loss / self.found[FULL][0] - 1)

    def spans(self):
        return {span: values for span, values in self.found.items() if span != FULL}

def run_scan(scanned, model, windows, longest, **sharing):
    """Find what is missing in a Scan, and print and write it span by span. sharing: as of scan()."""
    L, T, found = model.config.n_layer, windows.size(1) - 1, scanned.found
    layer = layer_flops(model.blocks[0], T, T)
    head = 2 * model.config.n_embd * model.config.vocab_size * T
    left = {(a, b): (L - b) * layer + head for a in range(L - 1) for b in range(a + 1, min(a + longest, L))
            if (a, b) not in found}                                     # FLOPs, nearly
    work, begun = sum(left.values()), time.perf_counter()
    try:
        for a, b, loss, divergence in scan(model, windows, longest, **sharing, skip=found):
            found[a, b] = loss, divergence
            scanned.write()
            left.pop((a, b))
            ahead = sum(left.values())
            seconds = int((time.perf_counter() - begun) / (work - ahead) * ahead)
            print(f"span {f'{a}-{b}':>6}  loss {loss:.4f}  {scanned.percent(loss):+8.2f} %  "
                  f"divergence {divergence:.4f}   {len(left)} spans, "
                  f"{seconds // 60}m{seconds % 60:02d}s left", flush=True)
    except KeyboardInterrupt:
        raise ValueError(f"stopped; {scanned.file} holds {len(found) - 1} spans, "
                         "and the same command goes on from there") from None
    scanned.write()

# ---- what it shows ----

def print_spans(scanned, model, sharer, T):
    """For each number of reuse layers, the median span and the best. sharer: spans → a model."""
    print("\nfor each number of reuse layers, the loss over full attention in the median over all spans, and "
          "the span of least divergence")
    print(f"reuse layers       median    best span      loss   cache saved   FLOPs saved at context {T}")
    spans, whole = scanned.spans(), predict(model, T)
    for r in sorted({b - a for a, b in spans}):
        alike = [span for span in spans if span[1] - span[0] == r]
        percent = {span: scanned.percent(spans[span][0]) for span in alike}
        best = min(alike, key=lambda span: spans[span][1])
        name = spans_text([best])
        less = predict(sharer(name), T)
        median = statistics.median(percent.values())
        print(f"{r:>12}   {median:>+8.2f} %   {name:>10} {percent[best]:>+7.2f} %"
              f"{1 - less.cache_bytes / whole.cache_bytes:>14.1%}"
              f"{1 - less.decode_flops / whole.decode_flops:>14.1%}")

def measure_sets(scanned, model, sharer, held_out, refit_on, most):
    """Print the best sets, measured on held_out (N, T + 1), and if refit_on (N, T) is given, refitted on it.
    → rows: reuse layers, spans, sum of divergences, percent (and percent refitted), part of the cache saved.
    """
    refits = refit_on is not None
    print("\nthe best sets of spans, if their divergences add up; loss over full attention, on "
          f"{len(held_out)} windows of the validation part")
    print("reuse layers       measured" + "     refitted" * refits + "   cache saved   spans")
    T, full, rows = held_out.size(1) - 1, mean_loss(model, held_out), []
    whole = predict(model, T).cache_bytes
    prices = {span: divergence for span, (_, divergence) in scanned.spans().items()}
    for r, (total, spans) in best_sets(prices, model.config.n_layer, most).items():
        shared = sharer(spans_text(spans))
        losses = [mean_loss(shared, held_out)]
        if refits:
            refit(shared, model, refit_on)
            losses.append(mean_loss(shared, held_out))
        percent = [100 * (loss / full - 1) for loss in losses]
        saved = 1 - predict(shared, T).cache_bytes / whole
        rows.append([r, spans_text(spans), total, *percent, saved])
        print(f"{r:>12}   " + "".join(f"   {value:>+7.2f} %" for value in percent)
              + f"   {saved:>11.1%}   {spans_text(spans)}", flush=True)
    return rows

# ---- the command ----

def read_args():
    flags = parser(__doc__, "scan")
    flags.flag("share_kind", default="weights", choices=list(SHARE_KINDS),
               help="what spans share: weights (Shared Attention) or kv (Cross-Layer Attention)")
    flags.flag("heads", default="same", choices=["same", "match", "mix"],
               help="whose weights a head of a reuse layer takes: those of the anchor's same head, of the "
               "most alike, or a mixture of all")
    flags.switch("refit", "measure the best sets with refitted output projections too")
    flags.flag("longest", at_least(int, 2), 5, "length of the longest span, in layers")
    flags.flag("most", count, 8, "largest number of reuse layers to look for a set of spans for")
    flags.flag("windows", count, 4, "windows of text for fitting heads, as many others for the spans, and "
               "twice as many for the sets")
    return flags.parse_args()

def find(args, model, data, out):
    """Scan all spans, then look for the best sets of them; print, draw and write both."""
    T = min(args.context, model.config.block_size)
    windows = data.windows("train", 2 * args.windows, T).to(args.device)
    fit, search = windows[::2, :-1], windows[1::2]
    name = args.share_kind if args.heads == "same" else f"{args.share_kind}-{args.heads}"
    version = sha256(checkpoint.source_file(args.model))[:8]            # trained anew, it is another model
    settings = [f"{args.model} {version}", f"{args.windows} of {data.name}", str(T)]
    scanned = Scan.read(out / f"scan-{name}.csv", settings)
    sharing = {"share_kind": args.share_kind, "heads": args.heads, "products": None}
    if args.heads != "same":
        print(f"comparing heads on {args.windows} windows", file=sys.stderr, flush=True)
        sharing["products"] = head_products(model, fit)

    full = mean_loss(model, search)
    scanned.found[FULL] = full, 0.0
    run_scan(scanned, model, search, args.longest, **sharing)
    percent = {span: scanned.percent(loss) for span, (loss, _) in scanned.spans().items()}
    title = f"loss of each span, zero-shot, {name.replace('-', ', heads ')}"
    plot.span_map(percent, model.config.n_layer, title, out / f"scan-{name}.png")
    print(f"wrote {scanned.file} and scan-{name}.png; full attention: {full:.4f} nats per token")

    sharer = partial(share, model, **sharing)
    print_spans(scanned, model, sharer, T)
    held_out = data.windows("val", 2 * args.windows, T).to(args.device)
    refit_on = data.windows("train", 12, T).to(args.device)[:, :-1] if args.refit else None
    rows = measure_sets(scanned, model, sharer, held_out, refit_on, args.most)
    columns = ["reuse_layers", "spans", "divergence_sum", "percent_measured",
               *["percent_refitted"] * args.refit, "cache_saved"]
    write_csv(out / f"sets-{name}.csv", columns, rows)

def main():
    args = read_args()
    pyplot("minisa.lab.scan")
    model, data, out = open_model(args)
    if model.config.share:
        raise ValueError(f"{args.model}: already shares {model.config.share}; scan a model that was trained "
                         "with full attention")
    share(model, "0-1", args.heads, share_kind=args.share_kind)         # raises if its layers cannot
    find(args, model, data, out)

if __name__ == "__main__":
    command(main)
