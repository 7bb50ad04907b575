"""The competition: the fewest bits per byte on the held-out plays, within two limits.

    python -m minisa.exercises rank FOLDER                  each folder in it is an entry: a run of train.py
    python -m minisa.exercises rank FOLDER --retrain        and train the first three again

An entry keeps at most 1,000 bytes per token in its cache (float32), and took at most 2e13 FLOPs to train:
3 × those of a token that sees block_size keys × steps × batch_size × block_size. It was trained from random
weights on the plays. The loss, the bytes and a token's FLOPs are measured here; steps and sizes are read from
the entry's train.safetensors, and --retrain shows whether they are true.
"""

import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from minisa.cost import measure
from minisa.kit.checkpoint import UNKNOWN, load
from minisa.kit.cli import Parser, command, printable, table
from minisa.kit.data import data_of
from minisa.kit.results import print_table, write_results
from minisa.kit.run import read_state

CACHE_BYTES = 1000              # per token, at most
TRAINING_FLOPS = 2e13           # at most
RETRAINED = 3                   # entries
SAME = 0.005                    # bits per byte that another machine may differ by
TRAIN = Path(__file__).resolve().parents[2] / "train.py"
OURS = {"out_dir", "data_dir", "text", "keep_every", "device", "compile", "resume", "overwrite"}

@dataclass
class Entry:
    """What is known of an entry."""
    name: str
    val_bpb: float | None = None
    cache_bytes_per_token: int | None = None
    training_flops: int | None = None
    share: str = ""
    share_kind: str = ""
    n_kv_head: int | None = None
    steps: int | None = None
    retrained_bpb: float | None = None
    problem: str = ""           # why it is disqualified, if it is

# ---- one entry ----

def settings_of(flags):
    """The settings of a run, as train.py stored them → {name: text}."""
    parts = [flag.removeprefix("--").partition("=") for flag in flags]
    return {name: value for name, _, value in parts}

def refuse(model, info, saved, settings, text):
    """Raises ValueError, in words, if an entry breaks a rule that needs no measuring."""
    if settings.get("init_from"):
        raise ValueError("started from another model (--init_from), whose training is not counted")
    if settings.get("text", "") != (text or ""):
        raise ValueError("was trained on another text than the plays (--text)")
    if saved.model.config != model.config:
        raise ValueError("its model is not the one that its train.safetensors was training")
    if (info["step"] or 0) > saved.progress.step:
        raise ValueError("its model is of a later step than its train.safetensors")

def examine(entry, folder, text):
    """Fill in an Entry from its folder. Raises an error if there is none, or it breaks a rule."""
    if not (folder / "train.safetensors").is_file():
        raise ValueError("holds no train.safetensors; an entry is the whole folder of a run of train.py")
    model, tokenizer, info = load(folder)
    saved = read_state(folder)
    settings = settings_of(saved.settings)
    batch_size = settings.get("batch_size", "")
    if not re.fullmatch("[1-9][0-9]{0,9}", batch_size):
        raise ValueError(f"its settings hold --batch_size={batch_size[:40]}, which is not a number above 0")
    config = model.config
    entry.share, entry.n_kv_head, entry.steps = config.share, config.n_kv_head, saved.progress.step
    entry.share_kind = config.share_kind if config.share else ""
    cost = measure(model, config.block_size)
    entry.cache_bytes_per_token = cost.cache_bytes_per_token
    tokens = entry.steps * int(batch_size) * config.block_size
    entry.training_flops = 3 * cost.decode_flops * tokens
    refuse(model, info, saved, settings, text)
    if entry.cache_bytes_per_token > CACHE_BYTES:
        raise ValueError(f"keeps {entry.cache_bytes_per_token:,} bytes per token; at most {CACHE_BYTES:,}")
    if entry.training_flops > TRAINING_FLOPS:
        raise ValueError(f"took {entry.training_flops:.3g} FLOPs to train; at most {TRAINING_FLOPS:.0e}")
    entry.val_bpb = bits_per_byte(model, tokenizer, text)

def bits_per_byte(model, tokenizer, text):
    """The loss on all held-out text. Raises ValueError if it is no number."""
    data = data_of(UNKNOWN, tokenizer, text)                # never the tokens that came with an entry
    _, bpb = data.evaluate(model)
    if not 0 < bpb < 100:
        raise ValueError(f"its loss is {bpb}: its weights are damaged")
    return round(bpb, 4)

def one_line(error):
    line = " ".join(str(error).split())[:160] or type(error).__name__
    return printable(line)

def ranked(folder, text):
    """→ an Entry for each thing in a folder: the best first, the disqualified last."""
    entries = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        entry = Entry(path.name)
        print(f"measuring {path}", file=sys.stderr, flush=True)
        try:
            examine(entry, path, text)
        except Exception as error:              # an entry may hold anything
            entry.problem = one_line(error)
        entries.append(entry)
    return sorted(entries, key=lambda entry: (bool(entry.problem), entry.val_bpb or 0, entry.name))

# ---- training again ----

def retrain(entry, folder, text):
    """Train an entry again from its settings, note its loss, and disqualify it if that is another."""
    settings = settings_of(read_state(folder).settings)
    with tempfile.TemporaryDirectory() as temporary:
        words = [f"--{name}={value}" for name, value in settings.items() if name not in OURS]
        words += [f"--text={text}"] if text else []
        words += [f"--out_dir={temporary}/run", f"--data_dir={temporary}/data", "--device=cpu"]
        print(f"training {entry.name} again", file=sys.stderr, flush=True)
        done = subprocess.run([sys.executable, str(TRAIN), *words], stdout=2, stderr=subprocess.PIPE,
                              text=True)
        if done.returncode:
            entry.problem = "could not be trained again: " + one_line(done.stderr.strip().split("\n")[-1])
            return
        model, tokenizer, _ = load(f"{temporary}/run")
        entry.retrained_bpb = bits_per_byte(model, tokenizer, text)
    if abs(entry.retrained_bpb - entry.val_bpb) > SAME:
        entry.problem = f"trained again, it reaches {entry.retrained_bpb}, not {entry.val_bpb} bits per byte"

def retrain_first(entries, folder, text):
    """Train entries again, the best first, until three are confirmed. → the entries in their new order"""
    confirmed = 0
    for entry in entries:
        if confirmed == RETRAINED or entry.problem:
            break
        try:
            retrain(entry, folder / entry.name, text)
        except Exception as error:              # an entry may hold anything
            entry.problem = one_line(error)
        confirmed += not entry.problem
    return sorted(entries, key=lambda entry: bool(entry.problem))

# ---- the command ----

COLUMNS = {"val_bpb": ("val bpb", "{:.4f}"), "cache_bytes_per_token": ("cache B/token", "{:,}"),
           "training_flops": ("training FLOPs", "{:.3g}"), "retrained_bpb": ("trained again", "{:.4f}")}

def show(entries):
    """Print the table, and a line for each entry that is disqualified."""
    rows = [["place", "entry", "sharing", *(title for title, _ in COLUMNS.values())]]
    for place, entry in enumerate(entries, start=1):
        values = [(getattr(entry, name), layout) for name, (_, layout) in COLUMNS.items()]
        cells = ["" if value is None else layout.format(value) for value, layout in values]
        sharing = f"{entry.share_kind} {entry.share}".strip() or "none"
        rows.append(["-" if entry.problem else str(place), printable(entry.name), sharing, *cells])
    print_table(rows, words=3)
    for entry in entries:
        if entry.problem:
            print(f"disqualified: {printable(entry.name)}: {entry.problem}")

def rows_of(entries):
    """→ rows of the ranking, as dicts."""
    places = enumerate(entries, start=1)
    return [{"place": "" if entry.problem else place, **asdict(entry)} for place, entry in places]

def main():
    parser = Parser(__doc__, usage="python -m minisa.exercises rank FOLDER [--FLAG=VALUE ...]")
    parser.add_argument("folder", metavar="FOLDER", help="folder of entries, each the folder of a run")
    parser.flag("csv", table, help="file to write the ranking to", shown="none")
    parser.flag("text", help="UTF-8 file that the entries were trained on instead of the plays", shown="none")
    parser.switch("retrain", "train the first three again, and compare")
    args = parser.parse_intermixed_args()
    folder = Path(args.folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: is not a folder; name the one that holds the entries")
    if args.retrain and not TRAIN.is_file():
        raise ValueError("--retrain: needs train.py, so run it in a checkout of minisa")
    entries = ranked(folder, args.text)
    if not entries:
        raise ValueError(f"{folder}: holds no entries; put the folders of runs there")
    if args.retrain:
        entries = retrain_first(entries, folder, args.text)
    show(entries)
    if args.csv:
        write_results(args.csv, rows_of(entries))

if __name__ == "__main__":
    command(main)
