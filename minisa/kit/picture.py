"""Pictures: matplotlib, which nothing else needs, and how a picture becomes a file."""

import io
from pathlib import Path

from minisa.kit.files import write_file

def pyplot(what):
    """→ matplotlib.pyplot. Raises ValueError, naming what wants it, if matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError(f"{what}: needs matplotlib; install it with: "
                         "pip install matplotlib") from None
    matplotlib.use("agg")                                   # draws without a screen
    import matplotlib.pyplot as plt
    plt.rcParams["text.parse_math"] = False                 # a name may have a $ in it
    return plt

def drawn(figure, kind, dpi=120):
    """A figure → the bytes of a picture of this kind, such as "png"; the figure is closed."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=dpi)
    pyplot("the picture").close(figure)
    return buffer.getvalue()

def save(figure, file):
    """Write a figure as the kind of picture that the file's name ends in, and close it."""
    write_file(file, drawn(figure, Path(file).suffix[1:]), named=True)

def save_film(figures, file):
    """Write figures of one size as a moving picture, .gif, half a second each, and close them."""
    from PIL import Image  # comes with matplotlib
    first, *others = [Image.open(io.BytesIO(drawn(figure, "png", 80))) for figure in figures]
    buffer = io.BytesIO()
    first.save(buffer, format="gif", save_all=True, append_images=others, duration=500, loop=0)
    write_file(file, buffer.getvalue(), named=True)
