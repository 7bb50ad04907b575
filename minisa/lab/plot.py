"""The pictures of the lab.

    python -m minisa.lab.plot BILL.csv ... --file=axes.png      loss against cache, a point for each row
                                                                of bills that sample.py --csv wrote
"""

import csv
import itertools
import math
import statistics
import textwrap

from minisa.kit.cli import Parser, command, picture
from minisa.kit.files import read_file
from minisa.kit.picture import pyplot, save

RED, GREEN, BLUE, GREY = "#c04040", "#589060", "#4878a8", "#909090"

# ---- maps of layers and of spans ----

def similarity_maps(maps):
    """maps: {title: (L, L) tensor} → a figure with a heat map of each."""
    plt = pyplot("the picture")
    columns = min(len(maps), 6)
    rows = -(-len(maps) // columns)
    size = 5.5 if len(maps) == 1 else 2.6                                       # inches
    shape = (columns * size + 0.8, max(rows * size, 3.2))
    figure, axes = plt.subplots(rows, columns, figsize=shape, squeeze=False, layout="constrained")
    for axis in axes.flat[len(maps):]:
        axis.set_axis_off()
    for axis, (title, values) in zip(axes.flat, maps.items()):
        image = axis.imshow(values.numpy(), vmin=0, vmax=1, cmap="magma", origin="lower")
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("layer", fontsize=8)
        axis.set_ylabel("layer", fontsize=8)
        axis.locator_params(integer=True)
        axis.tick_params(labelsize=7)
    figure.colorbar(image, ax=axes, label="mean cosine of attention weights", shrink=0.8)
    return figure

def attention_maps(models, tokens, first, file):
    """models: {name: [P (T, T) of neighbouring layers, from layer `first` on]} → a picture with a row for
    each model. tokens: T texts, which label queries (down) and keys (across)."""
    plt = pyplot("the picture")
    n, side = len(next(iter(models.values()))), max(2.4, 0.17 * len(tokens))
    figure, axes = plt.subplots(len(models), n, figsize=(n * side + 1.4, len(models) * (side + 0.8)),
                                squeeze=False, layout="constrained")
    for (name, layers), row in zip(models.items(), axes):
        for i, (P, axis) in enumerate(zip(layers, row)):
            image = axis.imshow(P.numpy(), norm=plt.matplotlib.colors.PowerNorm(0.5, 0, 1), cmap="magma")
            axis.set_title(f"{name}\nlayer {first + i}" if i == 0 else f"layer {first + i}", fontsize=9)
            axis.set_xticks(range(len(tokens)), tokens, rotation=90, fontsize=7)
            axis.set_yticks(range(len(tokens)), tokens if i == 0 else [], fontsize=7)
    figure.colorbar(image, ax=axes, label="attention weight, mean over heads", ticks=[0, 0.1, 0.5, 1])
    save(figure, file)

def by_layer(values, title, file):
    """values (L,): a number for each layer, as a line."""
    plt = pyplot("the picture")
    figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
    axis.plot(range(len(values)), values, marker="o", markersize=3, color=BLUE)
    axis.set(xlabel="layer", ylabel=title, ylim=(0, None))
    axis.locator_params("x", integer=True)
    save(figure, file)

def span_map(percent, n_layer, title, file):
    """percent: {(a, b): loss of span a..b over full attention, in percent} → a map, anchors across,
    reuse layers up. The colour is on a log scale from 0.1 to 100; the number is in the square."""
    plt = pyplot("the picture")
    most = max(b - a for a, b in percent)
    grid = [[float("nan")] * (n_layer - 1) for _ in range(most)]
    shape = (max(0.42 * n_layer + 1.8, 5), max(0.3 * most + 1.4, 2.6))
    figure, axis = plt.subplots(figsize=shape, layout="constrained")
    for (a, b), value in percent.items():
        grid[b - a - 1][a] = max(value, 0.1)
        text = f"{value:.1f}" if value < 10 else f"{value:.0f}" if value < 1000 else f"{value:.0e}"
        axis.text(a, b - a - 1, text.replace("e+0", "e").replace("-0.0", "0.0"), fontsize=7,
                  ha="center", va="center", color="white" if value > 3 else "black")
    image = axis.imshow(grid, norm=plt.matplotlib.colors.LogNorm(0.1, 100), cmap="viridis_r",
                        origin="lower", aspect="auto")
    axis.set(xlabel="anchor (first layer of the span)", ylabel="reuse layers", xticks=range(n_layer - 1),
             yticks=range(most), yticklabels=range(1, most + 1))
    axis.set_title(title, fontsize=9)
    axis.tick_params(labelsize=7)
    bar = figure.colorbar(image, ax=axis, label="loss over full\nattention, %",
                          ticks=[0.1, 1, 10, 100], format="%g", extend="both")
    bar.minorticks_off()
    save(figure, file)

# ---- loss against cache ----

def points_of(rows):
    """Rows of bills, dicts of text → {label: (cache bytes per token of the context, bits per byte)}, the
    reference first: of the rows with the largest cache, that of least loss."""
    points, plain = {}, set()
    for row in rows:
        name = ", ".join(part for part in (row["model"], *row["sharing"].split(", ")) if part != "none")
        points[name] = int(row["cache B"]) / int(row["context"]), float(row["val bpb"])
        if row["sharing"] == "none":
            plain.add(name)
    reference = min(points, key=lambda name: (-points[name][0], points[name][1]))
    named = {f"full attention ({reference})" if reference in plain else reference: points.pop(reference)}
    return named | {name.removeprefix(f"{reference}, "): point for name, point in points.items()}

def place_numbers(axis, points):
    """Number the points [(x, y), ...] from 1, each beside its point where nothing is written yet."""
    axis.figure.canvas.draw()                               # from now on the layout is known
    pixels = [tuple(axis.transData.transform(point)) for point in points]
    taken, sides = list(pixels), (16, -16, 30, -30, 45, -45, 60, -60)
    offsets = sorted(itertools.product(sides, range(-60, 61, 3)), key=lambda at: at[0]**2 + 2 * at[1]**2)
    for number, (point, (x, y)) in enumerate(zip(points, pixels), start=1):
        free = (offset for offset in offsets if all(
            abs(x + offset[0] - a) > 15 or abs(y + offset[1] - b) > 11 for a, b in taken))
        right, up = next(free, offsets[0])
        taken.append((x + right, y + up))
        axis.annotate(str(number), point, xytext=(right, up), textcoords="offset pixels", fontsize=7,
                      ha="center", va="center", bbox={"color": "white", "pad": 0.5},
                      arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.6, "shrinkB": 3})

def loss_against_cache(rows, file):
    """Rows of bills → a numbered point for each, full attention's as a line; and what the numbers mean."""
    plt = pyplot("the picture")
    points = points_of(rows)
    reference = next(iter(points))
    largest, full = points[reference]
    names = sorted(points, key=lambda name: points[name][::-1], reverse=True)   # as they are drawn
    key = ["loss over the dashed line; green: a squeezed cache\n"]
    for number, name in enumerate(names, start=1):
        wrapped = textwrap.fill(name, 48, subsequent_indent=" " * 14)
        key.append(f"{number:>2}  {points[name][1] / full - 1:>+8.1%}  {wrapped}")
    height = max(5.5, 0.16 * sum(text.count("\n") + 1 for text in key))     # inches
    figure, (axis, beside) = plt.subplots(1, 2, figsize=(12, height), dpi=100, width_ratios=(7, 4),
                                          layout="constrained")
    axis.axhline(full, color=RED, linewidth=0.8, linestyle="--", zorder=0)
    for name, point in points.items():
        colour = RED if name == reference else GREEN if "squeeze" in name else BLUE
        axis.plot(*point, "o", color=colour, markersize=6, zorder=4)
    axis.margins(y=0.1)
    axis.set(xlabel="cache, bytes per token of the context", xlim=(0, 1.05 * largest), yscale="log",
             ylabel=f"loss, bits per byte (log scale); dashed: {reference}")
    losses = [loss for _, loss in points.values()]
    least, ratio = min(losses), max(losses) / min(losses)
    axis.set_yticks([least * ratio**(i / 6) for i in range(7)])     # can be read however near the losses are
    axis.yaxis.set_minor_locator(plt.NullLocator())
    axis.yaxis.set_major_formatter("{x:.4g}")
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.spines[["top", "right"]].set_visible(False)
    beside.set_axis_off()
    beside.text(0, 1, "\n".join(key), va="top", fontsize=7.5, family="monospace")
    place_numbers(axis, [points[name] for name in names])
    save(figure, file)

# ---- studies of trained models ----

def frontier(points, file):
    """points: {mode: (cache bytes per token, FLOPs per token, [bits per byte of each seed])} → the loss, with
    its standard deviation, against both; a line joins the modes that no other beats in both."""
    plt = pyplot("the picture")
    figure, (*axes, beside) = plt.subplots(1, 3, figsize=(13, 5.5), width_ratios=(5, 5, 1.4),
                                           layout="constrained")
    axes[1].sharey(axes[0])
    names = sorted(points, key=lambda name: statistics.fmean(points[name][2]))
    for column, (axis, title) in enumerate(zip(axes, ("cache, bytes per token", "FLOPs per token"))):
        places = {name: (points[name][column], statistics.fmean(points[name][2])) for name in names}
        for name, (x, y) in places.items():
            colour = RED if name == "full" else BLUE if name.startswith("SA") else GREEN
            spread = statistics.stdev(points[name][2]) if len(points[name][2]) > 1 else 0
            axis.errorbar(x, y, spread, fmt="o", color=colour, markersize=5, linewidth=0.8, capsize=2)
        best = [place for place in sorted(places.values())
                if all(place[1] < y for x, y in places.values() if x <= place[0] and (x, y) != place)]
        axis.step(*zip(*best), where="post", color=GREY, linewidth=0.8, linestyle="--", zorder=0)
        axis.set_xlabel(title)
        axis.xaxis.set_major_locator(plt.MaxNLocator(5))
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.spines[["top", "right"]].set_visible(False)
        place_numbers(axis, [places[name] for name in names])
    axes[0].set_ylabel("bits per byte, mean and standard deviation")
    text = "\n".join(f"{n:>2}  {name}" for n, name in enumerate(names, start=1))
    beside.set_axis_off()
    beside.text(0, 1, text, va="top", fontsize=8, family="monospace")
    save(figure, file)

def learning(rows, file):
    """rows: mode, seed, step, seconds, val_bpb as text → the loss over steps and over seconds: a line for
    each seed."""
    plt = pyplot("the picture")
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    for mode, colour in zip(modes, (RED, BLUE, GREY, GREEN)):
        for seed in sorted({row["seed"] for row in rows if row["mode"] == mode}):
            run = [row for row in rows if (row["mode"], row["seed"]) == (mode, seed)]
            label = mode.replace("`", "") if seed == min(row["seed"] for row in rows) else None
            for axis, x in zip(axes, ("step", "seconds")):
                axis.plot([float(row[x]) for row in run], [float(row["val_bpb"]) for row in run],
                          color=colour, linewidth=1, label=label)
    for axis, title in zip(axes, ("steps", "seconds, two runs at a time, one thread each")):
        axis.set_xlabel(title)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("bits per byte")
    axes[0].legend(frameon=False, fontsize=8)
    save(figure, file)

# ---- what a token costs ----

def token_times(rows, over, file):
    """rows of bench.py → ms per token over the context or batch size, and over the cache, with the machine's
    limit as dashed lines. over: "context" or "batch_size"."""
    plt = pyplot("the picture")
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), sharey=True, layout="constrained")
    modes = {}
    for row in rows:
        mode = f"{row['model']} {row['share_kind']} {row['share']}"
        modes.setdefault(mode, []).append(row)
    for colour, (mode, points) in zip((RED, BLUE, GREEN, GREY, "black"), modes.items()):
        ms = [point["ms_per_token"] for point in points]
        limit = [point["limit_ms_per_token"] or math.nan for point in points]
        caches = [point["cache_bytes"] / point["batch_size"] / 1e6 for point in points]     # MB of a sequence
        for axis, xs in zip(axes, ([point[over] for point in points], caches)):
            axis.plot(xs, ms, marker="o", markersize=4, color=colour, label=mode)
            axis.plot(xs, limit, linestyle="--", linewidth=0.8, color=colour)
    for axis, title in zip(axes, (over.replace("_", " "), "cache of a sequence, MB")):
        axis.set(xscale="log", yscale="log", xlabel=title)
    axes[0].set_ylabel("ms per token (dashed: the limit)")
    axes[0].legend(frameon=False, fontsize=8)
    save(figure, file)

def read_bill(bill):
    """A file that sample.py --csv wrote → its rows. Raises ValueError if it is none."""
    try:
        rows = list(csv.DictReader(read_file(bill, 2**20).decode().splitlines()))
        if not rows:
            raise ValueError("it has no rows")
        if len(rows) > 100 or max(len(row["model"] + row["sharing"]) for row in rows) > 500:
            raise ValueError("it has more rows, or longer names, than can be drawn")
        if not all(0 < number < math.inf for point in points_of(rows).values() for number in point):
            raise ValueError("a number is not above 0")
    except (OSError, KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError, csv.Error) as error:
        error = getattr(error, "strerror", None) or error
        raise ValueError(f"{bill}: is no bill with losses ({error}); "
                         f"write one with: python sample.py MODEL --csv={bill}") from None
    return rows

def main():
    parser = Parser(__doc__, usage="python -m minisa.lab.plot BILL.csv ... --file=PICTURE")
    parser.add_argument("bills", nargs="+", metavar="BILL.csv", help="what sample.py --csv wrote, all with "
                        "the same measure of loss (--squeeze, --context, --eval_tokens)")
    parser.flag("file", picture, shown="none, must be given", help="the picture to write, .png, .svg or .pdf")
    args = parser.parse_args()
    if not args.file:
        raise ValueError("--file: name the picture to write, as in --file=axes.png")
    pyplot("minisa.lab.plot")
    rows = [row for bill in args.bills for row in read_bill(bill)]
    loss_against_cache(rows, args.file)
    print(f"wrote {args.file}: {len(rows)} rows of {len(args.bills)} bills")

if __name__ == "__main__":
    command(main)
