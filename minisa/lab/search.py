"""Which layers should reuse attention weights? Chosen one after the other, by measured divergence.

    python -m minisa.lab.search smollm2 --text=data/benchmarks/passages.txt

minisa.lab.scan measures each span alone, and assumes that divergences add up. This search measures whole
sets. To the layers that reuse already it adds the one with which the divergence from full attention is
smallest, with heads mixed and output projections refitted, on windows that neither was fitted to. A layer
reuses the weights of the nearest layer below it that computes its own.

Not all layers are tried each time. What a layer adds to the divergence seldom falls as others join, so only
those are tried whose last known addition is below the best of this round (lazy greedy search, Minoux 1978,
doi:10.1007/BFb0006528).

Ctrl-C stops a search, and the same command continues it: trials.csv keeps each set that was tried. At the
end, sets.csv has the best set of each size, measured on held-out text.
"""

import math
from functools import partial

import torch

from minisa.axes.heads import attention_outputs, head_products, refit, share
from minisa.kit.cli import add_dtype, command, count
from minisa.kit.machine import choose_dtype, keep_memory
from minisa.kit.results import write_results
from minisa.lab.scan import measure, measure_sets, open_full, predictions, read_earlier, report, spans_text
from minisa.lab.similarity import parser

def spans_of(layers):
    """The spans in which just these layers reuse: {15, 21, 22} → [(14, 15), (20, 22)]."""
    spans = []
    for layer in sorted(layers):
        a, _ = spans.pop() if spans and spans[-1][1] == layer - 1 else (layer - 1, layer)
        spans.append((a, layer))
    return spans

def greedy(n_layer, most, divergence_of):
    """Yield the best set of 1 to `most` reuse layers, as found by lazy greedy search. divergence_of: a
    function of a set."""
    chosen, so_far = set(), 0.0
    adds = dict.fromkeys(range(1, n_layer), -math.inf)          # layer → what it adds, as last measured
    while len(chosen) < most:
        measured = set()
        while (layer := min(adds, key=adds.get)) not in measured:
            adds[layer] = divergence_of(chosen | {layer}) - so_far
            measured.add(layer)
        so_far += adds.pop(layer)
        chosen.add(layer)
        yield {*chosen}

def searcher(model, sharing, fit_on, judge_on, file, origin):
    """→ the divergence of a set of reuse layers, as a function that keeps in a file what it measured.
    fit_on (N, T), judge_on (n, T + 1): windows of text."""
    rows = read_earlier(file, origin, ["spans"], ["divergence"]).values()
    trials = {row["spans"]: row for row in rows}
    outputs = attention_outputs(model, fit_on, range(model.config.n_layer))
    full = list(predictions(model, judge_on))

    def divergence_of(layers):
        spans = spans_text(spans_of(layers))
        if spans not in trials:
            shared = refit(sharing(spans), model, fit_on, outputs=outputs)
            divergence = measure(shared, full, judge_on)["divergence"]
            trials[spans] = {**origin, "spans": spans, "divergence": divergence}
            write_results(file, [*trials.values()])
            print(f"{len(layers)} reuse layers, {spans}: divergence {divergence:.4f}", flush=True)
        return trials[spans]["divergence"]
    return divergence_of

def main():
    flags = parser(__doc__, "search")
    flags.flag("heads", default="mix", choices=["same", "match", "mix"],
               help="whose weights a head of a reuse layer reuses: as in minisa.lab.scan")
    flags.flag("most", count, 8, "largest number of reuse layers")
    flags.flag("windows", count, 4, "windows of text to judge a set on; three times as many to fit it, "
               "twice as many, of held-out text, to measure the best sets")
    add_dtype(flags, "number format of the weights", None, "the faster one here")
    args = flags.parse_args()
    keep_memory()
    args.dtype = args.dtype or choose_dtype(args.device)
    model, data, folder, T, origin = open_full(args)
    origin["heads"] = args.heads
    L = model.config.n_layer
    if args.most >= L:
        raise ValueError(f"--most={args.most}: the model has {L} layers, of which at most {L - 1} can reuse")
    windows = data.windows("train", 4 * args.windows, T).to(args.device)
    is_judge = torch.arange(len(windows)) % 4 == 2
    fit_on = windows[~is_judge, :-1]
    products = head_products(model, fit_on[::3]) if args.heads != "same" else None
    sharing = partial(share, model, heads=args.heads, products=products)
    divergence_of = searcher(model, sharing, fit_on, windows[is_judge], folder / "trials.csv", origin)
    sets = {}
    for layers in greedy(L, args.most, divergence_of):
        sets[len(layers)] = spans_text(spans_of(layers))
        print(f"best: {sets[len(layers)]}", flush=True)
    held_out = data.windows("val", 2 * args.windows, T).to(args.device)
    print(f"\nthe best sets, refitted, on {len(held_out)} windows of the validation part")
    rows = measure_sets(sets, model, sharing, held_out, fit_on)
    report(rows, folder / "sets.csv")

if __name__ == "__main__":
    command(main)
