"""The pictures of the lab.

    python -m minisa.lab.plot assets/results/sharing.csv --file=frontier.png

draws what the files hold: bills of sample.py --csv (loss beside cache), sweeps of minisa.lab.bench --csv
(milliseconds per token), right answers of minisa.lab.recall --csv (over cache), or runs of
minisa.lab.experiments (loss beside cache and FLOPs, or over steps).
"""

import itertools
import math
from contextlib import contextmanager

import numpy as np

from minisa.kit.cli import Parser, command, picture
from minisa.kit.picture import pyplot, save
from minisa.lab.tables import ATTENTION, TABLES, answers, at_best, load, pandas, ten_seeds

BLUE = "#0072b2"

@contextmanager
def style(name):
    """A context in which a style sheet of this folder applies → matplotlib.pyplot."""
    plt = pyplot("the picture")
    with plt.style.context(f"minisa.lab.{name}"):
        yield plt

# ---- maps of layers and of spans ----

def similarity_maps(maps):
    """maps: {title: (L, L) tensor} → a figure with a heat map of each."""
    n = len(maps)
    columns = min(n, 6)
    rows = math.ceil(n / columns)
    size = 5.5 if n == 1 else 2.6                                       # inches
    width = columns * size + 0.8
    height = max(rows * (size + 0.4), 3.2)
    with style("maps") as plt:
        figure = plt.figure(figsize=(width, height))
        for place, title in enumerate(maps, start=1):
            axis = figure.add_subplot(rows, columns, place)
            image = axis.imshow(maps[title].numpy(), vmin=0, vmax=1, origin="lower")
            axis.set(title=title, xlabel="layer", ylabel="layer")
            axis.locator_params(integer=True)
        figure.colorbar(image, ax=figure.axes, label="mean cosine of attention weights", shrink=0.8)
    return figure

def attention_maps(models, tokens, first, file):
    """models: {name: [P (T, T) of neighboring layers, from layer `first` on]} → a picture with a row for
    each model. tokens: T texts, which label queries (down) and keys (across)."""
    n_layer = len(next(iter(models.values())))
    side = max(2.4, 0.17 * len(tokens))                                         # inches
    width = n_layer * side + 1.4
    height = len(models) * (side + 0.8)
    places = range(len(tokens))
    with style("maps") as plt:
        scale = plt.matplotlib.colors.PowerNorm(0.5, 0, 1)
        figure, axes = plt.subplots(
            len(models), n_layer, figsize=(width, height), squeeze=False, sharey=True)
        for (name, layers), row in zip(models.items(), axes):
            for layer, (P, axis) in enumerate(zip(layers, row), start=first):
                image = axis.imshow(P.numpy(), norm=scale)
                axis.set_title(f"layer {layer}")
                axis.set_xticks(places, tokens, rotation=90)
            row[0].set_title(f"{name}\nlayer {first}")
            row[0].set_yticks(places, tokens)
        bar = figure.colorbar(image, ax=axes, label="attention weight, mean over heads")
        bar.set_ticks([0, 0.1, 0.5, 1])
        save(figure, file)

def by_layer(values, title, file):
    """values (L,): a number for each layer, as a line."""
    with style("maps") as plt:
        figure, axis = plt.subplots(figsize=(6, 3))
        axis.plot(values, "o-", color=BLUE)
        axis.set(xlabel="layer", ylabel=title, ylim=(0, None))
        axis.locator_params("x", integer=True)
        save(figure, file)

def span_map(percent, n_layer, title, file):
    """percent: {(a, b): loss of span a..b over full attention, in percent} → a map, anchors across, reuse
    layers up. The color is on a log scale from 0.1 to 100; the number is in the square."""
    most = max(b - a for a, b in percent)
    grid = np.full((most, n_layer - 1), math.nan)
    width = max(0.42 * n_layer + 1.8, 5)                                        # inches
    height = max(0.3 * most + 1.4, 2.6)
    with style("maps") as plt:
        figure, axis = plt.subplots(figsize=(width, height))
        for (a, b), value in percent.items():
            row = b - a - 1
            grid[row, a] = max(value, 0.1)
            digits = "z.1f" if value < 10 else ".0f" if value < 1000 else ".0e"
            text = format(value, digits).replace("e+0", "e")
            color = "white" if value > 3 else "black"
            axis.text(a, row, text, fontsize=7, ha="center", va="center", color=color)
        scale = plt.matplotlib.colors.LogNorm(0.1, 100)
        image = axis.imshow(grid, norm=scale, cmap="viridis_r", origin="lower", aspect="auto")
        axis.set(title=title, xlabel="anchor (first layer of the span)", ylabel="reuse layers")
        axis.set_xticks(range(n_layer - 1))
        axis.set_yticks(range(most), range(1, most + 1))
        bar = figure.colorbar(image, label="loss over full\nattention, %", format="%g", extend="both")
        bar.set_ticks([0.1, 1, 10, 100])
        bar.minorticks_off()
        save(figure, file)

# ---- studies ----

LOSS = "loss over full attention, %"

def dot_plot(names, panels, spread, file):
    """A row for each name, a panel for each of panels: {title: a value for each name}. The first one is LOSS,
    with a bar of `spread` to each side, if known; the others are costs."""
    places = range(len(names))
    width = 5 + 4 * len(panels)                                                 # inches
    height = 1.6 + 0.45 * len(names)
    with style("projector") as plt:
        figure, axes = plt.subplots(1, len(panels), figsize=(width, height), sharey=True)
        loss, *costs = axes
        for axis, title in zip(axes, panels):
            axis.plot(panels[title], places, "o", color=BLUE)
            axis.set_xlabel(title)
        for axis in costs:
            axis.set_xlim(0)
            axis.locator_params("x", nbins=5)
        loss.errorbar(panels[LOSS], places, xerr=spread, fmt="none", color=BLUE)
        loss.axvline(0, color="black", linestyle="--")
        if max(panels[LOSS]) > 5:
            loss.set_xscale("symlog", linthresh=1)
            loss.set_xticks([0, 1, 2, 5, 10, 30])
        for axis in axes:
            axis.xaxis.set_major_formatter("{x:,g}")
        loss.set_yticks(places, names)
        loss.invert_yaxis()
        save(figure, file)

def line_plot(rows, y, thin, titles, y_title, file, scale="linear"):
    """A line for each `name` of rows: column y over each of the columns titles: {column: title}. The columns
    `thin` are thin and dashed."""
    with style("projector") as plt:
        figure, axes = plt.subplots(1, len(titles), figsize=(14, 6.5), sharey=True)
        for axis, (x, title) in zip(axes, titles.items()):
            for name, points in rows.groupby("name", sort=False):
                line, = axis.plot(points[x], points[y], label=name)
                thin_lines = axis.plot(points[x], points[thin], "--", color=line.get_color())
                plt.setp(thin_lines, marker="", linewidth=1)
            axis.set(xscale=scale, yscale=scale, xlabel=title)
            axis.xaxis.set_major_formatter("{x:,g}")
            if scale == "log":
                axis.xaxis.set_minor_formatter("")
                axis.yaxis.set_minor_formatter("")
                axis.yaxis.set_major_formatter("{x:g}")
                axis.yaxis.set_major_locator(plt.LogLocator(subs=[1, 2, 3, 5]))
        first, *_ = axes
        if scale == "log":
            swept, *_ = titles
            first.set_xticks(rows[swept].unique())
        first.set_ylabel(y_title)
        first.legend()
        save(figure, file)

def frontier(rows, file):
    """Training runs → the loss of each mode at its best settings, its spread over seeds, and its cost."""
    modes = at_best(rows).drop_duplicates("mode")
    panels = {
        LOSS: modes["difference"],
        "cache, bytes per token": modes["cache_bytes_per_token"],
        "million FLOPs per token": modes["flops"] / 1e6,
    }
    dot_plot(modes["mode"], panels, modes["deviation"], file)

def seeds(rows, file):
    """Runs of the study seeds → the loss of each mode, with intervals that hold together, and its cache."""
    shared = ten_seeds(rows).query("mode != 'full'")
    panels = {LOSS: shared["difference"], "cache, bytes per token": shared["cache_bytes_per_token"]}
    dot_plot(shared["name"], panels, shared["together"], file)

def learning(rows, file):
    """Rows of learning.csv → the mean loss of each mode over steps and over seconds; thin: the lowest and
    highest loss among its seeds."""
    points = rows.rename(columns={"mode": "name"}).groupby(["name", "step"], sort=False)
    means = points[["seconds", "val_bpb"]].mean()
    means["least"] = points["val_bpb"].min()
    means["largest"] = points["val_bpb"].max()
    titles = {"step": "steps", "seconds": "seconds, two runs at a time, one thread each"}
    thin = ["least", "largest"]
    line_plot(means.reset_index(), "val_bpb", thin, titles, "bits per byte", file)

def loss_against_cache(rows, file):
    """Rows of bills → the loss of each over that of the largest cache, lowest first, and its cache."""
    names = [bill_name(row) for row in rows.to_dict("records")]
    rows = rows.assign(name=names).drop_duplicates("name").sort_values("val_bpb")
    cache, loss = rows["cache_bytes"] / rows["context"], rows["val_bpb"]
    over = 100 * loss / loss[cache.idxmax()] - 100
    panels = {LOSS: over, "cache, bytes per token": cache}
    dot_plot(rows["name"], panels, None, file)

def answers_against_bytes(rows, file):
    """Rows of recall.py → a curve of right answers over the bytes of the cache for each method of the table
    "recall", with its 95 % intervals: questions known on the left, unknown on the right; one needle above,
    four below."""
    rows = answers(rows)
    methods = {name: rows.query(condition) for condition, name in TABLES["recall"]["rows"].items()}
    with style("projector") as plt:
        figure, axes = plt.subplots(2, 2, figsize=(16, 13), sharex=True, sharey=True)
        cases = itertools.product({1: "one needle", 4: "four needles"}.items(), ("known", "unknown"))
        for axis, ((needles, words), question) in zip(axes.flat, cases):
            for name, points in methods.items():
                chosen = (points["needles"] == needles) & (points["question"] == question)
                draw_answers(axis, name, points[chosen])
            axis.set(title=f"{words}, question {question}", xlabel="cache, % of the bytes in bfloat16",
                     ylabel="right answers, %", ylim=(-2, 102))
            axis.label_outer()
        handles = axes[0, 0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=3)
        save(figure, file)

def draw_answers(axis, name, points):
    """A curve of the full model: a line in bfloat16, dashes in int8; of another model: dots."""
    points = points.sort_values("percent").drop_duplicates("percent")       # all tokens, at several ratios
    share = 100 * points["right"] / points["prompts"]
    ends = [share - 100 * points["low"], 100 * points["high"] - share]
    of_full = "--" if "int8" in name else "-"
    line = of_full if name.startswith("full") else ":"
    label = name.replace("`", "")
    axis.errorbar(points["percent"], share, ends, linestyle=line, elinewidth=1, label=label)

def bill_name(row):
    """A row of a bill → its model, what changed that or what it shares zero-shot, and what its cache
    keeps."""
    parts = [row["model"]]
    if row["changes"]:
        parts.append(row["changes"])
    elif row["share"]:
        parts.append(f"{row['share_kind']} {row['share']}")
    if row["policy"]:
        parts.append(f"{row['policy']} {row['budget']:g}, cut {row['cut']:g}")
    if row.get("bits", 0) > 0:                              # not in all files; NaN where floats are kept
        parts.append(f"{row['bits']:g} bits")
    return ", ".join(parts)

def token_times(rows, file):
    """Rows of minisa.lab.bench → ms per token over what grows, the context or the batch, and over the cache;
    thin: the machine's limit."""
    over = "context" if rows["context"].nunique() > 1 else "batch_size"
    first = rows["model"][0]
    variants = [name.removeprefix(first) for name in rows["model"]]             # such as ", GQA"
    rows["name"] = rows["share_kind"].replace(ATTENTION) + variants
    rows["cache"] = rows["cache_bytes"] / 1e6
    titles = {over: over.replace("_", " "), "cache": "cache, MB"}
    y_title = "ms per token (thin: the limit)"
    line_plot(rows, "ms_per_token", ["limit_ms_per_token"], titles, y_title, file, "log")

# ---- the command ----

def draw(rows, file):
    """Draw rows of results, as their columns require."""
    if "ms_per_token" in rows:
        token_times(rows, file)
    elif "right" in rows:
        answers_against_bytes(rows, file)
    elif "step" in rows:
        learning(rows, file)
    elif "report_bpb" in rows:
        seeds(rows, file)
    elif "seed" in rows:
        frontier(rows, file)
    else:
        loss_against_cache(rows, file)

def read_results(files):
    """CSV files of results → their rows. Raises ValueError if they cannot be drawn."""
    frames = [load(file).assign(file=file) for file in files]
    rows = pandas().concat(frames, ignore_index=True)
    numbers = rows.filter(["val_bpb", "ms_per_token", "cache_bytes", "context"]).astype(float)
    positive = (numbers > 0) & (numbers < math.inf)
    if numbers.empty or not positive.all(axis=None):
        raise ValueError("it has no rows of results, or a number that is not above 0")
    names = rows.filter(["mode", "model", "changes"]).sum(axis=1).astype(str)
    if names.str.len().max() > 100:
        raise ValueError("it has longer names than can be drawn")
    return rows

def main():
    parser = Parser(__doc__, usage="python -m minisa.lab.plot RESULTS.csv ... --file=PICTURE")
    parser.add_argument("results", nargs="+", metavar="RESULTS.csv", help="files of one kind; bills: with "
                        "the same measure of loss (--squeeze, --context, --eval_tokens)")
    parser.add_argument("--file", type=picture, required=True, metavar="PICTURE",
                        help="the picture to write, .png, .svg or .pdf")
    args = parser.parse_args()
    pyplot("minisa.lab.plot")
    try:
        draw(read_results(args.results), args.file)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        why = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{args.results[0]}: cannot be drawn ({why}); --help names the commands whose "
                         "results can be") from error
    print(f"wrote {args.file}")

if __name__ == "__main__":
    command(main)
