"""Studies: everything that a table needs is run, written line by line, and printed as Markdown.

    python -m minisa.lab.experiments                    which studies there are, and how far each is
    python -m minisa.lab.experiments sharing            run it, or go on with it where it was stopped
    python -m minisa.lab.experiments sharing --jobs=2   two runs at a time, with one thread each

A study writes assets/results/NAME.csv: a line per run, with its settings, seed, loss, time and versions. What
is there is not run again. Differences are of equal seeds; what is within their spread is called equal.
"""

import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import count as count_up
from pathlib import Path

import torch

from minisa import checkpoint
from minisa.bill import print_table
from minisa.cli import Parser, command, count
from minisa.cost import predict
from minisa.files import lock, read_file, write_csv

ROOT = Path(__file__).resolve().parent.parent.parent
SEEDS = 1, 2, 3
RATES = 1e-3, 2e-3, 3e-3, 4e-3
WARMUPS = 100, 250, 500
#        name → flags of train.py; of an axis that changes the model before it is trained
MODES = {
    "full": ([], None),
    "SA 2-3": (["--share=2-3"], None),
    "SA 1-3": (["--share=1-3"], None),
    "SA 0-3": (["--share=0-3"], None),
    "SA 0-1,2-3": (["--share=0-1,2-3"], None),
    "SA 1-3, mixed": ([], ["heads", "--share=1-3", "--heads=mix"]),
    "SA 0-3, rank 4": ([], ["lowrank", "--share=0-3", "--share_rank=4"]),
    "SA 0-3, rank 8": ([], ["lowrank", "--share=0-3", "--share_rank=8"]),
    "CLA 1-3": (["--share=1-3", "--share_kind=kv"], None),
    "CLA 0-1,2-3": (["--share=0-1,2-3", "--share_kind=kv"], None),
    "GQA 2": (["--n_kv_head=2"], None),
    "MQA": (["--n_kv_head=1"], None),
    "SA 1-3, GQA 2": (["--share=1-3", "--n_kv_head=2"], None),
    "SA 1-3, MQA": (["--share=1-3", "--n_kv_head=1"], None),
    "CLA 1-3, MQA": (["--share=1-3", "--share_kind=kv", "--n_kv_head=1"], None),
}
DEEP = {name: (["--n_layer=8", *flags], None) for name, flags in {
    "8 layers, full": [], "8 layers, SA 6-7": ["--share=6-7"], "8 layers, SA 4-7": ["--share=4-7"],
    "8 layers, SA 1-7": ["--share=1-7"]}.items()}
SETTINGS = ["mode", "learning_rate", "warmup_iters", "seed"]
RESULTS = ["steps", "val_loss", "val_bpb", "minutes", "parameters", "cache B/token", "FLOPs/token", "torch",
           "machine"]

# ---- rows ----

def csv_file(study):
    return ROOT / "assets" / "results" / f"{study}.csv"

def read_rows(file, columns):
    """What a study wrote → its rows, dicts of text. Raises ValueError if they are another study's."""
    if not file.exists():
        return []
    try:
        rows = list(csv.DictReader(read_file(file).decode().splitlines()))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{file}: damaged ({error}); delete it, or fetch it again") from None
    if any(row.keys() != set(columns) or None in row.values() for row in rows):
        raise ValueError(f"{file}: is not of this study; move it away")
    return rows

def key(row):
    """The settings of a run, as text: those of two runs are equal if it is."""
    return tuple(str(row[name]) for name in SETTINGS)

# ---- one run ----

def python(folder, *words):
    """Run a Python command of minisa with one line of output kept. Raises ValueError if it fails."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *map(str, words)], cwd=folder, env=env, text=True,
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise ValueError(f"{' '.join(map(str, words))[:200]}: {last}")

def train(row, flags, modes, folder):
    """Train the model that a row's settings describe → the row with its results."""
    of_mode, axis = modes[row["mode"]]
    name = "-".join(key(row)).replace(" ", "").replace(",", "+")
    out, script = Path(folder) / "out" / "experiments" / name, ROOT / "train.py"
    flags = [*flags, *(f"--{setting}={row[setting]}" for setting in SETTINGS[1:])]
    begun = time.perf_counter()
    if axis:                                                # random weights, changed, then trained
        first, changed = f"{out}-random", f"{out}-changed"
        if not Path(changed).exists():
            python(folder, script, *flags, *of_mode, "--max_iters=0", f"--out_dir={first}", "--overwrite")
            python(folder, "-m", f"minisa.axes.{axis[0]}", first, *axis[1:], f"--out={changed}")
        shape = "--n_layer", "--n_head", "--n_embd", "--n_hidden", "--vocab_size"
        flags = [flag for flag in flags if not flag.startswith(shape)]
        flags += [f"--init_from={changed}", f"--block_size={checkpoint.load(first)[0].config.block_size}"]
    python(folder, script, *flags, *of_mode, f"--out_dir={out}", "--overwrite")
    minutes = (time.perf_counter() - begun) / 60
    model, _, info = checkpoint.load(out)
    cost = predict(model, model.config.block_size)
    losses = f"{info['val_loss']:.4f}", f"{info['val_bpb']:.4f}"
    values = [info["step"], *losses, f"{minutes:.2f}", cost.params, cost.cache_bytes_per_token,
              cost.decode_flops, torch.__version__, platform.machine()]
    return {**row, **dict(zip(RESULTS, values))}

# ---- the study of sharing ----

def best(rows, mode, seed, **fixed):
    """Of the runs of a mode and seed, the one of least loss."""
    fixed = {"mode": mode, "seed": seed, **fixed}
    mine = [row for row in rows if all(row[name] == str(value) for name, value in fixed.items())]
    return min(mine, key=lambda row: float(row["val_bpb"]), default=None)

def plan_sharing(rows, modes):
    """What is to be run next, given the rows so far: a sweep of learning rates for each mode, then of
    warm-ups at the best of them, then other seeds at the best of both. → settings, [] if all is done"""
    have, first = set(map(key, rows)), SEEDS[0]
    stages = [
        [(mode, rate, WARMUPS[-1], first) for rate in RATES for mode in modes],
        [(mode, run["learning_rate"], warmup, first) for warmup in WARMUPS for mode in modes
         if (run := best(rows, mode, first, warmup_iters=WARMUPS[-1]))],
        [(mode, run["learning_rate"], run["warmup_iters"], seed) for seed in SEEDS for mode in modes
         if (run := best(rows, mode, first))]]
    for stage in stages:
        wanted = [dict(zip(SETTINGS, settings)) for settings in stage]
        if left := [row for row in wanted if key(row) not in have]:
            return left
    return []

def table_sharing(rows, modes):
    """Rows → a table: each mode at its best settings, and its difference from full attention."""
    table, losses = [["mode", "learning rate", "warm-up", "bits per byte", "over full", "cache B/token",
                      "FLOPs/token", "parameters"]], {}
    for mode in modes:
        if not (run := best(rows, mode, SEEDS[0])):
            continue
        mine = {row["seed"]: float(row["val_bpb"]) for row in rows if row["mode"] == mode and
                (row["learning_rate"], row["warmup_iters"]) == (run["learning_rate"], run["warmup_iters"])}
        losses[mode] = mine
        reference = losses.get(next(iter(modes)), {})
        over = [100 * (loss / reference[seed] - 1) for seed, loss in mine.items() if seed in reference]
        spread = f" ± {statistics.stdev(over):.2f}" if len(over) > 1 else ""
        mean = f"{statistics.fmean(mine.values()):.4f}"
        table.append([mode, run["learning_rate"], run["warmup_iters"], mean,
                      f"{statistics.fmean(over):+.2f}{spread} %" if over else "", run["cache B/token"],
                      run["FLOPs/token"], run["parameters"]])
    return table

def markdown(table):
    """A table as Markdown, as it stands on a page."""
    head, *rows = [f"| {' | '.join(row)} |" for row in table]
    return "\n".join([head, "|" + " --- |" * len(table[0]), *rows])

# ---- running ----

def run_study(file, plan, measure, jobs):
    """Run what plan(rows) asks for until it asks for nothing, `jobs` at a time; write each run as it ends."""
    columns, begun, done = SETTINGS + RESULTS, time.perf_counter(), 0
    rows = read_rows(file, columns)
    for stage in count_up(1):
        left = plan(rows)
        if not left:
            return rows
        with ThreadPoolExecutor(jobs) as pool:
            futures = [pool.submit(measure, settings) for settings in left]
            try:
                for n, future in enumerate(as_completed(futures), start=1):
                    row = {name: str(value) for name, value in future.result().items()}
                    rows.append(row)
                    write_csv(file, columns, ([row[name] for name in columns] for row in rows))
                    done += 1
                    seconds = int((time.perf_counter() - begun) / done * (len(left) - n))
                    print(f"stage {stage}, {n} of {len(left)}: {', '.join(key(row))}: {row['val_bpb']} bits "
                          f"per byte; {seconds // 60}m{seconds % 60:02d}s left in this stage", flush=True)
            finally:
                for future in futures:                      # after Ctrl-C or an error: no more
                    future.cancel()

STUDIES = {"sharing": MODES, "depth": DEEP}

def main():
    parser = Parser(__doc__, usage="python -m minisa.lab.experiments [STUDY] [--FLAG=VALUE ...]")
    parser.add_argument("study", nargs="?", choices=[*STUDIES], metavar="STUDY",
                        help=f"{', '.join(STUDIES)} (default none: list them)")
    parser.flag("jobs", count, 1, "runs at a time; more than 1 gives each one thread")
    parser.flag("train_flags", default="[]", help="further flags of train.py, as a list in JSON")
    parser.switch("table", "only print the table of what was run")
    args = parser.parse_args()
    if not args.study:
        for study in STUDIES:
            print(f"{study}: {len(read_rows(csv_file(study), SETTINGS + RESULTS))} runs in {csv_file(study)}")
        return
    if args.jobs > 1:
        os.environ["OMP_NUM_THREADS"] = "1"
    modes, file = STUDIES[args.study], csv_file(args.study)
    flags = json.loads(args.train_flags)
    if args.table:
        rows = read_rows(file, SETTINGS + RESULTS)
    else:
        with lock(Path("out") / "experiments"):
            rows = run_study(file, lambda rows: plan_sharing(rows, modes),
                             lambda row: train(row, flags, modes, Path.cwd()), args.jobs)
    print_table(table_sharing(rows, modes))
    print("\n" + markdown(table_sharing(rows, modes)))

if __name__ == "__main__":
    command(main)
