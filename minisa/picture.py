"""Pictures: matplotlib, which nothing else needs, and how a picture becomes a file."""

import io
from pathlib import Path

from minisa.files import write_file

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

def save(figure, file):
    """Write a figure as the kind of picture that the file's name ends in, and close it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=Path(file).suffix[1:], dpi=120)
    write_file(file, buffer.getvalue(), named=True)
    pyplot("the picture").close(figure)
