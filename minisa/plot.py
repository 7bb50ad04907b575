"""Pictures, by matplotlib, which is needed for nothing else.

    python -m minisa.plot BILL.csv ... --file=axes.png      loss against cache, a point for each row of bills that sample.py --csv wrote
"""

import csv
import io
from pathlib import Path

from minisa import Parser, command
from minisa.checkpoint import write_file


def pyplot(what):
    """matplotlib.pyplot. Raises ValueError, naming what wants it, if matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError(f"{what}: needs matplotlib; install it with: pip install matplotlib") from None
    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    return plt


def save(figure, file):
    """Write a figure as the kind of picture that the file's name ends in."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=Path(file).suffix[1:], dpi=120)
    write_file(file, buffer.getvalue())
    pyplot("").close(figure)


def similarity_maps(maps, file):
    """maps: {title: (L, L) tensor} → one picture, a heat map each."""
    plt = pyplot("the picture")
    columns = min(len(maps), 6)
    rows = -(-len(maps) // columns)
    size = 5.5 if len(maps) == 1 else 2.6
    figure, axes = plt.subplots(rows, columns, figsize=(columns * size + 0.8, rows * size), squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, (title, values) in zip(axes.flat, maps.items()):
        axis.set_axis_on()
        image = axis.imshow(values.numpy(), vmin=0, vmax=1, cmap="magma", origin="lower")
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("layer", fontsize=8)
        axis.set_ylabel("layer", fontsize=8)
        axis.tick_params(labelsize=7)
    figure.colorbar(image, ax=axes, label="mean cosine of attention weights", shrink=0.8)
    save(figure, file)


def by_layer(values, title, file):
    """A number for each layer."""
    plt = pyplot("the picture")
    figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
    axis.plot(range(len(values)), values, marker="o", markersize=3)
    axis.set(xlabel="layer", ylabel=title, ylim=(0, None))
    axis.spines[["top", "right"]].set_visible(False)
    save(figure, file)


def span_map(percent, n_layer, title, file):
    """percent: {(a, b): Δ loss in percent} → a map, anchors across, reuse layers up; the colour is on a log scale."""
    plt = pyplot("the picture")
    from matplotlib.colors import LogNorm
    import numpy as np
    most = max(b - a for a, b in percent)
    grid = np.full((most, n_layer - 1), np.nan)
    for (a, b), value in percent.items():
        grid[b - a - 1, a] = max(value, 0.1)
    figure, axis = plt.subplots(figsize=(0.42 * n_layer + 1.8, 0.3 * most + 1.4), layout="constrained")
    image = axis.imshow(grid, norm=LogNorm(0.1, 100), cmap="viridis_r", origin="lower", aspect="auto")
    for (a, b), value in percent.items():
        axis.text(a, b - a - 1, f"{value:.1f}" if value < 10 else f"{value:.0f}", ha="center", va="center", fontsize=7, color="white" if value > 3 else "black")
    axis.set(xlabel="anchor (first layer of the span)", ylabel="reuse layers", title=title, xticks=range(n_layer - 1), yticks=range(most), yticklabels=range(1, most + 1))
    axis.tick_params(labelsize=7)
    figure.colorbar(image, ax=axis, label="loss over full, %")
    save(figure, file)


def loss_against_cache(rows, file):
    """rows of bills, dicts of text → a point for each: bytes of cache per token across; loss over that of the largest cache, in percent, up."""
    plt = pyplot("the picture")
    figure, axis = plt.subplots(figsize=(10, 6.5), dpi=100, layout="constrained")
    points = {}
    for row in rows:
        parts = [part for part in row["model"].split(", ")[1:] + [row["sharing"]] if part not in ("none", "refitted")]
        points[", ".join(parts) or f"full attention ({row['model']})"] = int(row["cache B"]) / int(row["context"]), float(row["val bpb"])
    largest = max(size for size, _ in points.values())
    full = min(loss for size, loss in points.values() if size == largest)
    points = {name: (size, 100 * (loss / full - 1)) for name, (size, loss) in points.items()}
    for name, point in points.items():
        axis.plot(*point, "o", color="#c04040" if name.startswith("full") else "#589060" if "squeeze" in name else "#4878a8", markersize=6)
    axis.set_yscale("symlog", linthresh=2)
    axis.set(xlabel="cache, bytes per token of the context", ylabel="loss over full attention, %", xlim=(0, 1.05 * largest), ylim=(min(-0.2, *(loss for _, loss in points.values())), None))
    axis.spines[["top", "right"]].set_visible(False)
    figure.canvas.draw()
    pixels = [axis.transData.transform(point) for point in points.values()]
    taken = [(x - 6, x + 6, y) for x, y in pixels]              # (left, right, y) of the points, then of the labels: each goes up until it is free
    for name, point in sorted(points.items(), key=lambda item: item[1][1]):
        x, y = axis.transData.transform(point)
        width, left = 5 * len(name), point[0] > 0.5 * largest
        start, height = (x - width - 18, y) if left else (x + 18, y)
        while any(start < b and a < start + width and abs(height - h) < 12 for a, b, h in taken):
            height += 1
        taken.append((start, start + width, height))
        axis.annotate(name, point, xytext=(-18 if left else 18, height - y), textcoords="offset pixels", fontsize=7, ha="right" if left else "left", va="center",
                      arrowprops=dict(arrowstyle="-", color="#b0b0b0", linewidth=0.5, shrinkA=0, shrinkB=3))
    save(figure, file)


def main():
    parser = Parser(__doc__, usage="python -m minisa.plot BILL.csv ... --file=PICTURE")
    parser.add_argument("bills", nargs="+", metavar="BILL.csv", help="what sample.py --csv wrote, all with the same measure of loss (--squeeze, --context, --eval_tokens)")
    parser.add_argument("--file", metavar="FILE", required=True, help="the picture to write, as .png, .svg or .pdf")
    args = parser.parse_args()
    pyplot("minisa.plot")
    if Path(args.file).suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--file={args.file}: must end in .png, .svg or .pdf")
    rows = []
    for bill in args.bills:
        try:
            rows += [row for row in csv.DictReader(Path(bill).read_text().splitlines())]
            [(float(row["val bpb"]), int(row["cache B"]), int(row["context"]), row["model"], row["sharing"]) for row in rows]
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{bill}: is no bill with losses ({error}); write one with: python sample.py --csv={bill}") from None
    loss_against_cache(rows, args.file)
    print(f"wrote {args.file}: {len(rows)} rows of {len(args.bills)} bills")


if __name__ == "__main__":
    command(main)
