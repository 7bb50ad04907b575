"""Studies: what a table or figure of a page needs is run, written line by line, and printed as Markdown.

    python -m minisa.lab.experiments                    which studies there are, and how far each is
    python -m minisa.lab.experiments sharing            run it, or go on with it where it was stopped
    python -m minisa.lab.experiments sharing --jobs=2   two trainings at a time, with one thread each
    python -m minisa.lab.experiments --check            compare the tables of all pages with their results

A study that trains models writes assets/results/NAME.csv: a line for each run, with its settings, seed, loss,
time and versions. What is there is not run again. Other studies are lists of commands: each is printed, and
not run again while the file or folder that it writes is there. --again sets the results aside first.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import count as count_up
from pathlib import Path
from typing import NamedTuple

import torch

from minisa.cost import predict
from minisa.kit import checkpoint
from minisa.kit.cli import Parser, command, count
from minisa.kit.files import lock, read_file, write_csv
from minisa.kit.machine import choose_dtype
from minisa.kit.picture import pyplot
from minisa.kit.results import print_table
from minisa.lab import plot, tables
from minisa.lab.tables import ASSETS, RESULTS, ROOT, SETTINGS, TABLES, at_best, best, check_pages, losses

SEEDS = 1, 2, 3
RATES = 1e-3, 2e-3, 3e-3, 4e-3
WARMUPS = 500, 1000             # the first one while learning rates are swept
STEPS = 2000
CPU = 6000, 2.5e-3, 1000        # steps, learning rate, warm-up of train.py's preset
MEASURED = ["val_loss", "val_bpb", "minutes", "parameters", "cache B/token", "FLOPs/token", "dtype",
            "torch", "machine"]
COLUMNS = SETTINGS + MEASURED

# ---- modes: name → flags of train.py, and of an axis that changes the model before it is trained ----

class Mode(NamedTuple):
    flags: list = []
    axis: list = []

MODES = {
    "full": Mode(),
    "SA 2-3": Mode(["--share=2-3"]),
    "SA 1-3": Mode(["--share=1-3"]),
    "SA 0-3": Mode(["--share=0-3"]),
    "SA 0-1,2-3": Mode(["--share=0-1,2-3"]),
    "SA 1-3, mixed": Mode(axis=["heads", "--share=1-3", "--heads=mix"]),
    "SA 0-3, rank 4": Mode(axis=["lowrank", "--share=0-3", "--share_rank=4"]),
    "SA 0-3, rank 8": Mode(axis=["lowrank", "--share=0-3", "--share_rank=8"]),
    "CLA 1-3": Mode(["--share=1-3", "--share_kind=kv"]),
    "CLA 0-1,2-3": Mode(["--share=0-1,2-3", "--share_kind=kv"]),
    "GQA 2": Mode(["--n_kv_head=2"]),
    "MQA": Mode(["--n_kv_head=1"]),
    "SA 1-3, GQA 2": Mode(["--share=1-3", "--n_kv_head=2"]),
    "SA 1-3, MQA": Mode(["--share=1-3", "--n_kv_head=1"]),
    "CLA 1-3, MQA": Mode(["--share=1-3", "--share_kind=kv", "--n_kv_head=1"]),
}
PRESET = {
    "full attention": Mode(),
    "Shared Attention, `--share=1-3`": Mode(["--share=1-3"]),
    "Shared Attention, `--share=0-3`": Mode(["--share=0-3"]),
    "Cross-Layer Attention, `--share=1-3`": Mode(["--share=1-3", "--share_kind=kv"]),
    "`--share=0-3`, `--share_rank=4`": MODES["SA 0-3, rank 4"],
    "`--share=1-3`, mixed": MODES["SA 1-3, mixed"],
}
DEPTH = {
    "8 layers, full": Mode(["--n_layer=8"]),
    "8 layers, SA 6-7": Mode(["--n_layer=8", "--share=6-7"]),
    "8 layers, SA 4-7": Mode(["--n_layer=8", "--share=4-7"]),
    "8 layers, SA 1-7": Mode(["--n_layer=8", "--share=1-7"]),
}
# What a mode frees, given to the MLP: a width with which it has as many parameters as full attention.
WIDER = {"SA 2-3": 373, "SA 1-3": 395, "SA 0-3": 416, "CLA 1-3": 395, "GQA 2": 395, "MQA": 416,
         "SA 1-3, MQA": 443, "CLA 1-3, MQA": 427}
FAIR = {f"{name}, equal time": MODES[name] for name in ("full", *WIDER)} | {
    f"{name}, equal parameters": Mode([*MODES[name].flags, f"--n_hidden={width}"])
    for name, width in WIDER.items()}

# ---- plans: the rows so far → the settings of the runs that are next, [] if all is done ----

def missing(rows, wanted):
    """Of settings, in the order of SETTINGS, those that no row has, as dicts."""
    have = set(map(key, rows))
    wanted = [dict(zip(SETTINGS, settings)) for settings in wanted]
    return [row for row in wanted if key(row) not in have]

def key(row):
    """The settings of a run, as text: those of two runs are equal if it is."""
    return tuple(str(row[name]) for name in SETTINGS)

def plan_sweep(rows, modes):
    """A sweep of learning rates for each mode, then of warm-ups at the best of them, then other seeds at
    the best of both."""
    first = SEEDS[0]
    stages = [
        [(mode, STEPS, rate, WARMUPS[0], first) for rate in RATES for mode in modes],
        [(mode, STEPS, run["learning_rate"], warmup, first) for warmup in WARMUPS for mode in modes
         if (run := best(rows, mode, warmup_iters=WARMUPS[0]))],
        [(mode, STEPS, run["learning_rate"], run["warmup_iters"], seed) for seed in SEEDS for mode in modes
         if (run := best(rows, mode))]]
    return next((left for stage in stages if (left := missing(rows, stage))), [])

def plan_preset(rows, modes):
    """The CPU preset as it is, with each seed."""
    return missing(rows, [(mode, *CPU, seed) for seed in SEEDS for mode in modes])

def plan_fair(rows, modes):
    """Modes at their best settings of the study `sharing`; but as long as full attention took, or wider."""
    swept, wanted = tables.read("sharing"), []
    if plan_sweep(swept, MODES):
        raise ValueError("the study sharing comes first: python -m minisa.lab.experiments sharing")
    minutes = {mode: statistics.median(float(row["minutes"]) for row in swept if row["mode"] == mode)
               for mode in MODES}
    for seed in SEEDS:
        for mode in modes:
            base = mode.partition(", equal")[0]
            run, steps = best(swept, base), STEPS
            if mode.endswith("time"):
                steps = round(STEPS * minutes["full"] / minutes[base])
            wanted.append((mode, steps, run["learning_rate"], run["warmup_iters"], seed))
    return missing(rows, wanted)

# ---- one run ----

def python(folder, *words):
    """Run a Python command of minisa. Raises ValueError with its last line if it fails."""
    done = subprocess.run([sys.executable, *map(str, words)], cwd=folder, env=environment(), text=True,
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise ValueError(f"{' '.join(map(str, words))[:200]}: {last}")

def environment():
    others = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *[others] * bool(others)])}

def folder_of(row):
    """Where the run of a row's settings lies."""
    return Path("out/experiments") / "-".join(key(row)).replace(" ", "").replace("`", "").replace(",", "+")

def train(row, flags, modes, folder, dtype):
    """Train the model that a row's settings describe → the row with its results."""
    mode, out, script = modes[row["mode"]], Path(folder) / folder_of(row), ROOT / "train.py"
    flags = ["--preset=cpu", "--device=cpu", *flags, *(f"--{name}={row[name]}" for name in SETTINGS[2:]),
             f"--max_iters={row['steps']}", f"--dtype={dtype}", *mode.flags]
    begun = time.perf_counter()
    if mode.axis:                                           # random weights, changed, then trained
        first, changed = f"{out}-random", f"{out}-changed"
        python(folder, script, *flags, "--max_iters=0", f"--out_dir={first}", "--overwrite")
        if not Path(changed).exists():
            python(folder, "-m", f"minisa.axes.{mode.axis[0]}", first, *mode.axis[1:], f"--out={changed}")
        shape = "--n_layer", "--n_head", "--n_embd", "--n_hidden", "--vocab_size"
        flags = [flag for flag in flags if not flag.startswith(shape)]
        flags += [f"--init_from={changed}", f"--block_size={checkpoint.load(first)[0].config.block_size}"]
    python(folder, script, *flags, f"--out_dir={out}", "--overwrite")
    minutes = (time.perf_counter() - begun) / 60
    model, _, info = checkpoint.load(out)
    cost = predict(model, model.config.block_size)
    values = [f"{info['val_loss']:.4f}", f"{info['val_bpb']:.4f}", f"{minutes:.2f}", cost.params,
              cost.cache_bytes_per_token, cost.decode_flops, dtype, torch.__version__, platform.machine()]
    return {**row, **dict(zip(MEASURED, values))}

def run_trainings(name, plan, measure, jobs):
    """Run what plan(rows) asks for until it asks for nothing, `jobs` at a time; write each run as it ends.
    → the rows of assets/results/NAME.csv"""
    rows, done, begun = tables.read(name), 0, time.perf_counter()
    if any(row.keys() != set(COLUMNS) for row in rows):
        raise ValueError(f"{RESULTS / name}.csv: is not of this study; move it away")
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
                    write_csv(RESULTS / f"{name}.csv", COLUMNS, ([row[c] for c in COLUMNS] for row in rows))
                    done += 1
                    seconds = int((time.perf_counter() - begun) / done * (len(left) - n))
                    print(f"stage {stage}, {n} of {len(left)}: {', '.join(key(row))}: {row['val_bpb']} bits "
                          f"per byte; {seconds // 60}m{seconds % 60:02d}s left in this stage", flush=True)
            finally:
                for future in futures:                      # after Ctrl-C or an error: no more
                    future.cancel()

# ---- studies that are lists of commands; @ is the folder assets ----

EIGHT, SIX = "5-6,12-13,14-15,20-22,24-25,27-29", "3-4,5-6,14-15,20-22,28-29"
HEADS = "python -m minisa.axes.heads smollm2"
SAMPLE = "python sample.py smollm2"
RECALL = "python -m minisa.lab.recall smollm2 out/eight out/narrow out/small"
MIXED = f"{HEADS} --heads=mix"
ALONE = "--max_new_tokens=40 --temperature=0"
SPANS = ["26-28", "3-5", "3-7", "22-28", "3-7,24-28"]
LOOK = "--look='To be, or not to be: that is the question'"
TUNE = ("--warmup_iters=10 --learning_rate=1e-4 --batch_size=4 --block_size=256 --eval_interval=60 "
        "--eval_tokens=4096 --overwrite")
SMALL = [f"{MIXED} --share=14-15,20-22,27-29 --refit --out=out/mixed",
         "python -m minisa.axes.eigen out/mixed --error=0.025 --refit --out=out/small",
         "python -m minisa.axes.eigen smollm2 --error=0.025 --refit --out=out/narrow"]
BILLS = ["all", "eigen", "kv", "squeeze"]
COMMANDS = {
    "smollm2": [
        f"{MIXED} --share=26-28 --out=out/mixed-26-28",
        f"{SAMPLE} out/mixed-26-28 --prompt='Once upon a time' {ALONE} --csv=@/results/smollm2.csv"],
    "scan": [
        "python -m minisa.lab.scan smollm2 --heads=mix --refit --out_dir=@/results/scan",
        "python -m minisa.lab.scan smollm2 --heads=same --most=1 --out_dir=@/results/scan"],
    "spans": [
        *(f"{HEADS} --share={spans} --heads={heads} --out=out/spans/{heads}-{spans}"
          for spans in SPANS for heads in ("same", "match", "mix")),
        *(f"{HEADS} --share={spans} --share_kind=kv --out=out/spans/kv-{spans}" for spans in SPANS),
        f"{SAMPLE} out/spans/* --max_new_tokens=1 --csv=@/results/spans.csv"],
    "axes": [
        *SMALL,
        f"{SAMPLE} out/mixed out/small --squeeze=614 {ALONE} --csv=@/results/all.csv",
        f"{SAMPLE} out/narrow --squeeze=614 {ALONE} --csv=@/results/eigen.csv",
        f"{SAMPLE} --share=26-28 --share_kind=kv --squeeze=614 {ALONE} --csv=@/results/kv.csv",
        f"{SAMPLE} --squeeze=307 --squeeze_policy=heavy,sinks,window --squeeze_cut=1,0.7,0.5 "
        f"{ALONE} --csv=@/results/squeeze.csv",
        f"python -m minisa.lab.plot {' '.join(f'@/results/{name}.csv' for name in BILLS)} --file=@/axes.png"],
    "tuned": [
        f"{MIXED} --share={EIGHT} --refit --out=out/eight",
        f"{MIXED} --share={SIX} --out=out/six",
        *(f"python train.py --init_from={model} --max_iters={steps} {TUNE} "
          f"--out_dir=out/tuned/{Path(model).name}-{steps}"
          for model in ("smollm2", "out/eight", "out/six") for steps in (0, 60)),
        "python sample.py out/tuned/* --max_new_tokens=1 --csv=@/results/tuned.csv"],
    "pictures": [
        "python train.py --preset=cpu --device=cpu --keep_every=500 --out_dir=out/kept --overwrite",
        "python -m minisa.lab.similarity out/kept --history --out_dir=@/toy",
        f"python -m minisa.lab.similarity out/kept {LOOK} --share=1-3 --out_dir=@/toy",
        "python -m minisa.lab.similarity smollm2 --out_dir=@/smollm2",
        f"python -m minisa.lab.similarity smollm2 {LOOK} --share=26-28 --out_dir=@/smollm2"],
    "speed": [
        "python -m minisa.lab.bench --shapes=small,large,long --torch --rounds=15 --csv=@/results/speed.csv",
        f"python -m minisa.lab.bench smollm2 --share={EIGHT} --torch --beside_transformers --rounds=5 "
        "--csv=@/results/speed-smollm2.csv",
        *(f"python -m minisa.lab.bench --sweep={what} --rounds=5 --csv=@/results/{what}.csv "
          f"--plot=@/{what}.png" for what in ("context", "batch_size"))],
    "latency": [
        "python -m minisa.lab.bench --sweep=shapes --rounds=15 --csv=@/results/latency-shapes.csv",
        f"python -m minisa.lab.bench smollm2 --share={EIGHT} --sweep=context --csv=@/results/latency.csv "
        "--plot=@/latency.png"],
    "peers": [                                              # with nanoGPT's folder on PYTHONPATH
        *(f"python -m minisa.lab.bench --shapes=small,recipe,large --beside_nanogpt --dtype={dtype} "
          f"--csv=@/results/speed-nanogpt-{dtype}.csv" for dtype in ("float32", "bfloat16"))],
    "recall": [
        *SMALL,
        f"{MIXED} --share={EIGHT} --refit --out=out/eight",
        *(f"{RECALL} --lengths={length} --squeeze={round(0.6 * length)} --dtype=bfloat16 "
          f"--csv=@/results/recall/{length}.csv"
          for length in tables.LENGTHS)],
}

def parse(line):
    """A command of a study → its words, and its flags as {"--csv": "…/axes.csv"}."""
    words = [word.replace("@", str(ASSETS)) for word in shlex.split(line)]
    return words, dict(word.partition("=")[::2] for word in words)

def run_commands(name):
    """Run the commands of a study one after the other; what one has written is not made again."""
    for line in COMMANDS[name]:
        print(f"$ {line.replace('@', 'assets')}", flush=True)
        words, flags = parse(line)
        target = flags.get("--csv") or flags.get("--out")
        if run := flags.get("--out_dir"):
            target = f"{run}/config.json"
        if target and Path(target).exists():
            print(f"{target} is there", flush=True)
            continue
        words = [part for word in words for part in
                 (sorted(map(str, Path().glob(word))) if word.endswith("/*") else [word])]
        done = subprocess.run([sys.executable, *words[1:]], env=environment())
        if done.returncode:
            raise ValueError(f"the last command ended with status {done.returncode}; the same study goes on")

def set_aside(name):
    """Rename the results of a study, to measure them anew."""
    files = {RESULTS / f"{name}.csv"}
    for _, flags in map(parse, COMMANDS.get(name, [])):
        if "--csv" in flags:
            files.add(Path(flags["--csv"]))
        if "--out_dir" in flags:                            # a scan goes on with the tables in its folder
            files |= set(Path(flags["--out_dir"]).glob("*.csv"))
    for file in sorted(files):
        if file.exists():
            os.replace(file, f"{file}.old")
            print(f"{file} is now {file.name}.old")

# ---- figures ----

def curves(rows, folder):
    """Rows of the study `preset` → rows of learning.csv: what the runs of modes without an axis logged, in
    the order of PRESET; [] if one is gone."""
    table = []
    for row in sorted(rows, key=lambda row: ([*PRESET].index(row["mode"]), row["seed"])):
        if PRESET[row["mode"]].axis:
            continue
        log = Path(folder) / folder_of(row) / "log.jsonl"
        if not log.exists():
            return []
        for line in map(json.loads, read_file(log).decode().splitlines()):
            if "val_bpb" in line:
                seconds, bpb = f"{line['seconds']:.1f}", f"{line['val_bpb']:.4f}"
                table.append([row["mode"], row["seed"], line["step"], seconds, bpb])
    return table

DRAWN = "preset", "sharing"

def draw(name, rows, folder):
    """The figure of a study, if it has one."""
    if name == "sharing" and rows:
        points = {mode: (int(runs[0]["cache B/token"]), int(runs[0]["FLOPs/token"]), [*losses(runs).values()])
                  for mode, runs in at_best(rows).items()}
        plot.frontier(points, ASSETS / "frontier.png")
    if name == "preset" and rows:
        if table := curves(rows, folder):
            write_csv(RESULTS / "learning.csv", ["mode", "seed", "step", "seconds", "val_bpb"], table)
        plot.learning(tables.read("learning"), ASSETS / "learning.png")

# ---- the command ----

TRAININGS = {"preset": (PRESET, plan_preset), "sharing": (MODES, plan_sweep), "depth": (DEPTH, plan_sweep),
             "fair": (FAIR, plan_fair)}

def show_all():
    for name in TRAININGS:
        print(f"{name}: {len(tables.read(name))} runs")
    for name, lines in COMMANDS.items():
        print(f"{name}: {len(lines)} commands")

def compare(update):
    """Compare all pages with their results, or write them anew. → an exit status"""
    differ = check_pages(update)
    for name in differ:
        print(f"{name}: {'written' if update else 'differs'}")
    if not differ:
        print("all tables are as their results")
    return 1 if differ and not update else 0

def words(text):
    """A type for a flag: words as a shell reads them."""
    try:
        return shlex.split(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: a quotation mark is not closed") from None

def main():
    parser = Parser(__doc__, usage="python -m minisa.lab.experiments [STUDY] [--FLAG=VALUE ...]")
    names = [*TRAININGS, *COMMANDS]
    parser.add_argument("study", nargs="?", choices=names, metavar="STUDY",
                        help=f"{', '.join(names)} (default none: list them)")
    parser.flag("jobs", count, 1, "trainings at a time; more than 1 gives each one thread")
    parser.flag("dtype", choices=["float32", "bfloat16"], help="to train in", shown="the faster one here")
    parser.flag("train_flags", words, [], "further flags of train.py, in quotes", "none")
    parser.switch("again", "set the results of this study aside, as .csv.old, and measure anew")
    parser.switch("table", "only print the table, and draw the figure, of what was run")
    parser.switch("check", "compare the tables of all pages with assets/results; status 1 if any differs")
    parser.switch("update", "write the tables into the pages")
    args = parser.parse_args()
    for one, other in (("check", "update"), ("again", "table")):
        if getattr(args, one) and getattr(args, other):
            raise ValueError(f"--{one}, --{other}: give one of them")
    if args.check or args.update:
        return compare(args.update)
    if not args.study:
        return show_all()
    if args.again:
        set_aside(args.study)
    run_study(args)
    if args.study in TABLES:
        table = tables.make(args.study)
        print_table(table)
        print("\n" + tables.markdown(table))

def run_study(args):
    """Run what the flags ask for, and draw its figure."""
    folder = Path.cwd()
    if args.study in COMMANDS:
        return None if args.table else run_commands(args.study)
    modes, plan = TRAININGS[args.study]
    if args.study in DRAWN:
        pyplot("the figure of this study")                  # refused before the work if it is missing
    flags, rows = args.train_flags, tables.read(args.study)
    dtype = args.dtype or choose_dtype(torch.device("cpu"), None)
    if args.jobs > 1:
        os.environ["OMP_NUM_THREADS"] = "1"
    if not args.table:
        with lock(folder / "out" / "experiments"):
            rows = run_trainings(args.study, lambda rows: plan(rows, modes),
                                 lambda row: train(row, flags, modes, folder, dtype), args.jobs)
    draw(args.study, rows, folder)

if __name__ == "__main__":
    command(main)
