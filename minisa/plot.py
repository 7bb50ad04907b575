"""Pictures, by matplotlib, which is needed for nothing else."""

import io
from pathlib import Path

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
    """percent: {(a, b): Δ loss in percent} → a triangle, anchors across, last layers up; the colour is on a log scale."""
    plt = pyplot("the picture")
    from matplotlib.colors import LogNorm
    import numpy as np
    grid = np.full((n_layer, n_layer), np.nan)
    for (a, b), value in percent.items():
        grid[b, a] = max(value, 0.1)
    figure, axis = plt.subplots(figsize=(0.22 * n_layer + 3, 0.2 * n_layer + 2), layout="constrained")
    image = axis.imshow(grid, norm=LogNorm(0.1, 100), cmap="viridis_r", origin="lower")
    axis.set(xlabel="anchor a", ylabel="last layer b of the span a-b", title=title)
    if n_layer <= 12:
        for (a, b), value in percent.items():
            axis.text(a, b, f"{value:+.1f}", ha="center", va="center", fontsize=7, color="white" if value > 5 else "black")
    figure.colorbar(image, ax=axis, label="loss over full attention, % (0.1 or less: lightest)", shrink=0.8)
    save(figure, file)
