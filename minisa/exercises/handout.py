"""Pack what the lecture shows, so that nobody trains during it: a zip that opens anywhere.

    python -m minisa.exercises handout                      out/full and out/weights-1-3, in handout.zip
    python -m minisa.exercises handout out/a out/b --out=models.zip

In it: the models, their maps and bills (.png, .csv and .json in out/), the pictures of assets/, the sheet,
the notebook, and the file for answers. Unpacked into a checkout of minisa, everything is in its place.
"""

import io
import zipfile
from pathlib import Path

from minisa.kit.checkpoint import load
from minisa.kit.cli import Parser, command, output
from minisa.kit.files import read_file, write_file

ROOT = Path(__file__).resolve().parents[2]
COURSE = "README.md", "lesson.ipynb", "answers.py"
PICTURES = ".png", ".svg"
BILLS = ".csv", ".json", ".png"
LARGEST = 2**30                 # bytes of a file
READ_ME = """What the lecture on Shared Attention shows.

Unpack this into a checkout of minisa. Then, for instance:

    python sample.py {models}
    python -m minisa.exercises play {last} --answers=mine.py
"""

def model_files(source):
    """→ {name in the zip: path} of a model's folder. Raises ValueError unless it loads."""
    folder = Path(source)
    if not folder.is_dir():
        hint = {"full": "python train.py", "weights-1-3": "python train.py --share=1-3"}
        raise ValueError(f"{source}: no such model; train it with {hint.get(folder.name, 'train.py')}")
    load(folder)
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    return {f"out/{folder.resolve().name}/{path.relative_to(folder).as_posix()}": path
            for path in paths if path.name != "train.safetensors"}         # which only --resume needs

def pictures_and_bills():
    """→ {name in the zip: path} of the lecture's pictures, and of bills beside the models."""
    files = {}
    for path in sorted((ROOT / "assets").rglob("*")):
        if path.suffix in PICTURES:
            files[path.relative_to(ROOT).as_posix()] = path
    for path in sorted(Path("out").glob("*")):
        if path.suffix in BILLS and path.is_file():
            files[f"out/{path.name}"] = path
    return files

def packed(files, read_me):
    """→ the bytes of a zip of {name: path}. Raises OSError if one cannot be read."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("HANDOUT.txt", read_me)
        for name, path in files.items():
            archive.writestr(name, read_file(path, LARGEST))
    return data.getvalue()

def main():
    parser = Parser(__doc__, usage="python -m minisa.exercises handout [MODEL ...] [--out=FILE]")
    parser.add_argument("models", nargs="*", metavar="MODEL", help="folders of runs or models (default "
                        "out/full and out/weights-1-3)")
    parser.flag("out", output(".zip"), "handout.zip", "zip file to write")
    args = parser.parse_intermixed_args()
    models = args.models or ["out/full", "out/weights-1-3"]
    files = {}
    for source in models:
        files |= model_files(source)
    files |= pictures_and_bills()
    files |= {f"minisa/exercises/{name}": Path(__file__).parent / name for name in COURSE}
    names = [f"out/{Path(source).resolve().name}" for source in models]
    data = packed(files, READ_ME.format(models=" ".join(names), last=names[-1]))
    write_file(args.out, data)
    print(f"wrote {args.out}: {len(files) + 1} files, {len(data) / 1e6:.1f} MB")

if __name__ == "__main__":
    command(main)
