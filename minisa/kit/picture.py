"""Pictures: matplotlib, an optional package, and how a figure becomes a file."""

import io
from pathlib import Path

from minisa.kit.files import write_file

def pyplot(what):
    """→ matplotlib.pyplot. Raises ValueError, naming what needs it, if matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError(f"{what}: needs matplotlib; install it with: "
                         "pip install matplotlib") from None
    matplotlib.use("agg")                                   # works without a screen
    import matplotlib.pyplot as plt
    plt.rcParams["text.parse_math"] = False                 # names may contain a $
    return plt

def encode(figure, kind, dpi=120):
    """Close a figure → its bytes as a picture of this kind, such as "png"."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=dpi)
    pyplot("the picture").close(figure)
    return buffer.getvalue()

def save(figure, file):
    """Close a figure, and write it in the format that the file's name ends in."""
    kind = Path(file).suffix[1:]
    write_file(file, encode(figure, kind), named=True)

def save_film(figures, file):
    """Close figures of one size, and write them as an animated .gif of two frames per second."""
    from PIL import Image  # comes with matplotlib
    frames = [Image.open(io.BytesIO(encode(figure, "png", dpi=80))) for figure in figures]
    buffer = io.BytesIO()
    frames[0].save(buffer, format="gif", save_all=True, append_images=frames[1:], duration=500, loop=0)
    write_file(file, buffer.getvalue(), named=True)
