"""Studies: the commands behind the tables and figures of the pages.

    python -m minisa.lab.experiments                    list the studies, and how far each has come
    python -m minisa.lab.experiments sharing            run one, or continue it where it stopped
    python -m minisa.lab.experiments sharing --jobs=2   train two models at a time, with one thread each
    python -m minisa.lab.experiments --check            compare the tables of all pages with their results

A study is a list of commands, each with the files that it makes, in studies.toml. A command is printed, and
runs if one of its files is missing. Studies under [trainings] train models with several settings and seeds,
and add a row to assets/results/NAME.csv for each run; settings that have a row are not trained again. A run
that was interrupted has no row, and starts over. All commands run in the folder of the checkout.

The study seeds chooses the settings of each mode with seed 0, on two of the four held-out plays; what it
reports is the loss on the two others, of sixteen other seeds, or ten.
"""

import argparse
import copy
import csv
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path

import numpy as np
import torch

from minisa.cost import predict
from minisa.kit import checkpoint
from minisa.kit.cli import Parser, add_dtype, command, count
from minisa.kit.data import data_of
from minisa.kit.files import lock, read_file, set_aside
from minisa.kit.machine import choose_dtype
from minisa.kit.picture import pyplot
from minisa.kit.results import print_table, write_results
from minisa.kit.shakespeare import two_and_two
from minisa.lab import tables
from minisa.lab.tables import SHAPE, best, best_unreported, named, read, result, time_ratios

STUDIES = tomllib.loads(Path(__file__).with_name("studies.toml").read_text(encoding="utf-8"))
TRAININGS = STUDIES.pop("trainings")        # modes → flags
AXES, WIDER = TRAININGS.pop("axes"), TRAININGS.pop("wider")
SEEDS = 1, 2, 3
RATES = 1e-3, 2e-3, 3e-3, 4e-3
WARMUPS = 500, 1000             # the first one while learning rates are swept
STEPS = 2000
TEN = range(1, 11)              # the study seeds: those of every comparison; it chooses with seed 0
SIXTEEN = range(1, 17)          # those of its first comparison, in the end
HIGHER = 6e-3                   # its rate for modes that do best at the last one of RATES
FIGURES = {
    "preset": "python -m minisa.lab.plot assets/results/learning.csv --file=assets/learning.png",
    "sharing": "python -m minisa.lab.plot assets/results/sharing.csv --file=assets/frontier.png",
    "seeds": "python -m minisa.lab.plot assets/results/seeds.csv --file=assets/seeds.png",
}

# ---- plans: stages of runs, as their settings; each needs the results of those before it ----

def sweep(runs, modes):
    """Learning rates for each mode, then warm-ups at the best rate, then other seeds at the best of both."""
    first, warmup = {"seed": SEEDS[0]}, {"warmup_iters": WARMUPS[0]}
    chosen = best(runs)
    swept = best(runs.query(f"warmup_iters == {WARMUPS[0]}")) if chosen else {}
    yield [{"mode": mode, "steps": STEPS, "learning_rate": rate, **warmup, **first}
           for rate in RATES for mode in modes]
    yield [{"mode": mode, **swept[mode], "warmup_iters": iters, **first}
           for iters in WARMUPS for mode in modes if mode in swept]
    yield [{"mode": mode, **chosen[mode], "seed": seed}
           for seed in SEEDS for mode in modes if mode in chosen]

def preset(runs, modes):
    """train.py's preset `long` as it is, with each seed."""
    settings = {"steps": 6000, "learning_rate": 2.5e-3, "warmup_iters": 1000}
    yield [{"mode": mode, **settings, "seed": seed} for seed in SEEDS for mode in modes]

def fair(runs, modes):
    """The best settings of `sharing`, but for as long as full attention took, or with a wider MLP."""
    swept = read("sharing")
    if missing("sharing", swept):
        raise ValueError("the study sharing comes first: python -m minisa.lab.experiments sharing")
    chosen, minutes = best(swept), swept.groupby("mode")["minutes"].median()
    steps = (STEPS * minutes["full"] / minutes).round()
    for seed in SEEDS:
        yield [{"mode": mode, "equal": "time", **chosen[mode], "steps": int(steps[mode]), "seed": seed}
               for mode in modes]
        yield [{"mode": mode, "equal": "parameters", **chosen[mode], "seed": seed} for mode in WIDER]

def flags_of(shape, rate, warmup, seed, steps=STEPS, dtype="bfloat16", equal="steps"):
    """The settings of a run of the study seeds, under the names of train.py's flags."""
    return {**shape, "equal": equal, "max_iters": steps, "learning_rate": rate, "warmup_iters": warmup,
            "seed": seed, "dtype": dtype}

def selection(runs, modes):
    """With seed 0: learning rates, a higher one for modes that do best at the last, and another warm-up."""
    first = WARMUPS[0]
    yield [flags_of(modes[mode], rate, first, 0) for rate in RATES for mode in modes]
    chosen = best_unreported(runs.query(f"warmup_iters == {first}"))
    rates = {mode: rate for mode, (rate, _) in chosen.items()}
    yield [flags_of(modes[mode], HIGHER, first, 0) for mode in modes if rates[mode] >= RATES[-1]]
    yield [flags_of(modes[mode], rates[mode], iters, 0) for iters in WARMUPS[1:] for mode in modes]

def in_turn(modes):
    """→ pairs of mode and seed, seed by seed. Another mode is the first each time, so that none is always
    trained beside the same other."""
    order, turns = [*modes], []
    for seed in SIXTEEN:
        order = order[1:] + order[:1]
        turns += [(mode, seed) for mode in order]
    return turns

def seeds(runs, modes):
    """The selection; then two modes in float32, and all modes: for as many steps, and for as long as full
    attention takes; then six more seeds of the former; and three times as many steps, all modes of a seed
    in the format that is faster on the machine that began with it."""
    yield from selection(runs, modes)
    chosen = best_unreported(runs)
    sixteen = [(seed, mode, modes[mode], *chosen[mode]) for mode, seed in in_turn(modes)]
    ten = [turn for turn in sixteen if turn[0] in TEN]
    yield [flags_of(*settings, seed, dtype="float32") for seed, mode, *settings in ten
           if mode in ("full", "SA 1-3") and seed in SEEDS]
    yield [flags_of(*settings, seed) for seed, _, *settings in ten]
    same = runs.query(f"0 < seed <= {TEN[-1]} and max_iters == {STEPS} and equal == 'steps' "
                      "and dtype == 'bfloat16'")
    steps = (STEPS / time_ratios(same).median()).round()
    yield [flags_of(*settings, seed, int(steps[mode]), equal="time") for seed, mode, *settings in ten
           if mode != "full"]
    yield [flags_of(*settings, seed) for seed, _, *settings in sixteen]
    begun = runs.query(f"max_iters == {3 * STEPS}").drop_duplicates("seed").set_index("seed")["dtype"]
    faster = choose_dtype(torch.device("cpu"))
    yield [flags_of(*settings, seed, 3 * STEPS, dtype=begun.get(seed, faster)) for seed, _, *settings in ten]

def missing(name, runs):
    """The runs without a row in the first stage that is not complete; [] if all are done."""
    own = [*SHAPE, "select_bpb"] if name == "seeds" else ["mode", "steps"]
    if len(runs) and not {*own, "learning_rate", "warmup_iters", "seed", "val_bpb"} <= {*runs}:
        raise ValueError(f"{result(name)}: is not of this study; move it away")
    if name == "seeds" and len(runs):
        runs = named(runs)
    plans = {"preset": preset, "fair": fair, "seeds": seeds}
    plan = plans.get(name, sweep)
    for stage in plan(runs, TRAININGS[name]):
        columns = [*stage[0]] if stage else []
        done = set(runs.reindex(columns=columns).itertuples(index=False, name=None))
        left = [settings for settings in stage if tuple(settings.values()) not in done]
        if left:
            return left
    return []

# ---- trainings ----

def commands_of(name, settings, flags):
    """The commands that train a run, and its folder. A mode with an axis: an untrained model is changed, and
    then trained."""
    mode = settings["mode"]
    words = "-".join(map(str, [name, *settings.values()]))
    out = f"out/experiments/{words.replace(' ', '').replace(',', '+')}"
    shape = TRAININGS[name][mode]
    if settings.get("equal") == "parameters":
        shape += f" {WIDER[mode]}"
    train = f"python train.py --preset=cpu --device=cpu --seed={settings['seed']} {flags}"
    rates = (f"--max_iters={settings['steps']} --learning_rate={settings['learning_rate']} "
             f"--warmup_iters={settings['warmup_iters']} --out_dir={out}/trained")
    if mode not in AXES:
        return out, [f"{train} {shape} {rates}"]
    return out, [f"{train} {shape} --max_iters=0 --out_dir={out}/untrained",
                 f"python -m minisa.axes.{AXES[mode]} --out={out}/changed {out}/untrained",
                 f"{train} --init_from={out}/changed {rates}"]

def train(name, settings, flags, dtype):
    """Train one run from its beginning → its row, and rows of learning.csv."""
    out, lines = commands_of(name, settings, f"--dtype={dtype} {flags}")
    folder, begun = tables.ROOT / out / "trained", time.perf_counter()
    shutil.rmtree(folder.parent, ignore_errors=True)        # what an interrupted one left
    for line in lines:
        run(line, stdout=subprocess.DEVNULL)
    minutes = (time.perf_counter() - begun) / 60
    model, _, info = checkpoint.load(folder)
    row = {
        **settings,
        "val_loss": f"{info['val_loss']:.4f}",
        "val_bpb": f"{info['val_bpb']:.4f}",
        "minutes": f"{minutes:.2f}",
        **bill(model),
        "dtype": dtype,
    }
    log = map(json.loads, read_file(folder / "log.jsonl").decode().splitlines())
    curve = [{"mode": settings["mode"], "seed": settings["seed"], "step": line["step"],
              "seconds": f"{line['seconds']:.1f}", "val_bpb": f"{line['val_bpb']:.4f}"}
             for line in log if "val_bpb" in line]
    return row, curve

def bill(model):
    cost = predict(model, model.config.block_size)
    return {"parameters": cost.params, "cache_bytes_per_token": cost.cache_bytes_per_token,
            "flops": cost.decode_flops}

def train_seed(settings, flags):
    """Train one run of the study seeds from its beginning → its row, and no curve. minutes: of its steps, and
    of one evaluation on 20,000 tokens."""
    out = "out/experiments/" + "-".join(map(str, ["seeds", *settings.values()]))
    shutil.rmtree(tables.ROOT / out, ignore_errors=True)    # what an interrupted one left
    given = {name: value for name, value in settings.items() if name != "equal" and value != ""}
    # evaluated once, at the end: no play chooses the step whose model is saved
    given |= {"eval_interval": settings["max_iters"], "out_dir": out}
    line = " ".join(f"--{name}={value}" for name, value in given.items())
    run(f"python train.py --preset=cpu --device=cpu {line} {flags}", stdout=subprocess.DEVNULL)
    model, tokenizer, info = checkpoint.load(tables.ROOT / out)
    select, report = on_two_and_two(model, data_of(info, tokenizer))
    row = {
        **settings,
        "val_bpb": f"{info['val_bpb']:.5f}",
        "select_bpb": f"{select:.5f}",
        "report_bpb": f"{report:.5f}",
        "minutes": f"{info['seconds'] / 60:.3f}",
        **bill(model),
    }
    return row, []

def on_two_and_two(model, data):
    """→ the bits per byte of the first two held-out plays, and of the last two"""
    plays = data.tokenizer.decode(data.val.tolist())
    losses = []
    for text in two_and_two(plays):
        part = copy.copy(data)
        part.val = np.array(data.tokenizer.encode(text))
        part.val_bytes = len(data.tokenizer.decode_bytes(part.val[1:].tolist()))    # all that are predicted
        losses.append(part.evaluate(model)[1])
    return losses

def add_rows(name, new):
    """Append rows to a file of results."""
    file, rows = result(name), []
    if file.exists():
        rows = list(csv.DictReader(read_file(file).decode().splitlines()))
    write_results(file, rows + new)

def run_trainings(name, measure, jobs):
    """Run what is missing of a study, `jobs` at a time. measure: settings → as train()."""
    while left := missing(name, read(name)):
        begun = time.perf_counter()
        with ThreadPoolExecutor(jobs) as pool:
            futures = [pool.submit(measure, settings) for settings in left]
            try:
                for n, future in enumerate(as_completed(futures), start=1):
                    row, curve = future.result()
                    if curve and name == "preset" and row["mode"] not in AXES:
                        add_rows("learning", curve)
                    add_rows(name, [row])
                    minutes = (time.perf_counter() - begun) / n * (len(left) - n) / 60
                    print(f"{n} of {len(left)} runs of this stage; {minutes:.0f} minutes left", flush=True)
            finally:
                for future in futures:                      # after Ctrl-C or an error: no more
                    future.cancel()

# ---- commands ----

def run(line, stdout=None):
    """Print a command, and run it in the checkout. Raises ValueError if it does not end with status 0."""
    print(f"$ {line}", flush=True)
    words = [sys.executable, *shlex.split(line)[1:]]
    done = subprocess.run(words, cwd=tables.ROOT, stdout=stdout)
    if done.returncode:
        raise ValueError(f"a command ended with status {done.returncode}; run the study again to continue "
                         f"with it: {line}")

def is_done(step):
    return all((tables.ROOT / name).exists() for name in step["makes"])

def run_steps(steps):
    """Run the commands of a study whose files do not all exist yet."""
    for step in steps:
        *_, last = step["makes"]
        if is_done(step):
            print(f"{last} is there", flush=True)
            continue
        run(step["run"])
        if last.endswith("/done"):
            (tables.ROOT / last).touch()
        if not is_done(step):
            raise ValueError(f"a command did not make what studies.toml says, {', '.join(step['makes'])}: "
                             f"{step['run']}")

def begin_again(name):
    """Set aside what a study makes in assets and out, so that it is made again: of a model, its folder."""
    made = [Path(file) for step in STUDIES.get(name, []) for file in step["makes"]]
    files = [tables.ROOT / file for file in made if file.parts[0] == "assets"]
    files += [tables.ROOT / file.parent for file in made if file.parts[0] == "out"]
    trained = [result(name), result("learning")] if name == "preset" else [result(name)]
    for file in files or trained:
        if file.exists():
            print(f"{file} is now {set_aside(file).name}")

def run_study(name, args):
    if name in STUDIES and (args.jobs > 1 or args.dtype or args.train_flags):
        raise ValueError(f"--jobs, --dtype, --train_flags: are for {', '.join(TRAININGS)}; drop them")
    if name == "seeds" and args.dtype:
        raise ValueError("--dtype: the study seeds trains in bfloat16, and some runs in float32; drop it")
    with lock(tables.ROOT / "out" / "experiments"):         # in the checkout, as the results are
        if args.again:
            begin_again(name)
        if name in STUDIES:
            return run_steps(STUDIES[name])
        if args.jobs > 1:
            os.environ["OMP_NUM_THREADS"] = "1"
            torch.set_num_threads(1)                        # models are also evaluated here
        if name == "seeds":
            measure = partial(train_seed, flags=args.train_flags)
        else:
            dtype = args.dtype or choose_dtype(torch.device("cpu"))
            measure = partial(train, name, flags=args.train_flags, dtype=dtype)
        run_trainings(name, measure, args.jobs)

# ---- main ----

def list_studies():
    for name in TRAININGS:
        print(f"{name}: {len(read(name))} runs")
    for name, steps in STUDIES.items():
        print(f"{name}: {sum(map(is_done, steps))} of {len(steps)} commands are done")

def compare(update):
    """Compare all pages with their results, or write them again. → an exit status"""
    differ = tables.check_pages(update)
    for name in differ:
        print(f"{name}: {'written' if update else 'differs'}")
    if not differ:
        print("all tables agree with their results")
    return 1 if differ and not update else 0

def words(text):
    """A type for a flag: words as a shell reads them."""
    try:
        shlex.split(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: a quotation mark is not closed") from None
    return text

def main():
    parser = Parser(__doc__, usage="python -m minisa.lab.experiments [STUDY] [--FLAG=VALUE ...]")
    names = [*TRAININGS, *STUDIES]
    parser.add_argument("study", nargs="?", choices=names, metavar="STUDY",
                        help=f"{', '.join(names)} (default: list them)")
    parser.flag("jobs", count, 1, "trainings at a time; more than 1 gives each one thread")
    add_dtype(parser, "number format to train in", None, "the faster one here")
    parser.flag("train_flags", words, "", "further flags of train.py, in quotes", "none")
    parser.switch("again", "set what this study made aside, as NAME.old, and make it again")
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
        return list_studies()

    if args.study in FIGURES:
        pyplot("the figure of this study")                  # refused before the work if it is missing
    if not args.table:
        run_study(args.study, args)
    if args.study in tables.TABLES:
        table = tables.make(args.study)
        print_table(table)
        print("\n" + tables.markdown(table))
    if args.study in FIGURES:
        run(FIGURES[args.study])

if __name__ == "__main__":
    command(main)
