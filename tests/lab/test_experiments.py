"""Studies run what is missing, in stages, and go on where they were stopped."""

import csv
import random
import shlex

import pytest
import torch

import train
from minisa.lab import experiments, tables
from minisa.lab.experiments import COLUMNS, MODES, RATES, SEEDS, WARMUPS, WIDER, Mode, key, plan_sweep
from minisa.lab.tables import SETTINGS
from minisa.model import GPT, GPTConfig

TWO = {"full": Mode(), "SA": Mode(["--share=0-1"])}

@pytest.fixture
def results(tmp_path, monkeypatch):
    """assets/results in a folder of the test."""
    monkeypatch.setattr(experiments, "RESULTS", tmp_path)
    monkeypatch.setattr(experiments, "ASSETS", tmp_path)
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    return tmp_path

def result(settings, bpb):
    row = dict.fromkeys(COLUMNS, 1) | settings | {"val_bpb": bpb}
    return {name: str(value) for name, value in row.items()}

def loss_of(settings):
    """Full attention likes 3e-3 and a warm-up of 500; SA 1e-3 and 1000."""
    full = settings["mode"] == "full"
    rate, warmup = float(settings["learning_rate"]), int(settings["warmup_iters"])
    off = abs(rate - (3e-3 if full else 1e-3)) * 10 + abs(warmup - (500 if full else 1000)) / 1e4
    return 2 + off + 0.01 * int(settings["seed"]) + 0.1 * (not full)

def measure(settings):
    return result(settings, loss_of(settings))

def plan(rows):
    return plan_sweep(rows, TWO)

def swept():
    """All rows of a sweep, and how many runs each stage had."""
    rows, asked = [], []
    while left := plan(rows):
        random.Random(len(rows)).shuffle(left)              # a stage is one whatever its order
        asked.append(len(left))
        rows += map(measure, left)
    return rows, asked

def test_each_mode_is_swept_then_run_with_all_seeds_at_its_own_best():
    rows, asked = swept()
    assert asked == [len(RATES) * 2, (len(WARMUPS) - 1) * 2, (len(SEEDS) - 1) * 2]
    assert len(set(map(key, rows))) == len(rows)
    last = {(row["mode"], row["learning_rate"], row["warmup_iters"]) for row in rows if row["seed"] == "3"}
    assert last == {("full", "0.003", "500"), ("SA", "0.001", "1000")}

def test_what_was_run_is_not_run_again(results):
    file, ran = results / "x.csv", []

    def stopped(settings):
        ran.append(key(settings))
        if len(ran) == 5:
            raise ValueError("stopped")
        return measure(settings)

    with pytest.raises(ValueError, match="stopped"):
        experiments.run_trainings("x", plan, stopped, 1)
    stopped_at = len(list(csv.DictReader(file.open())))
    assert 4 <= stopped_at <= 8
    rows = experiments.run_trainings("x", plan, measure, 2)
    assert len(rows) == 14 and len(set(map(key, rows))) == 14
    assert list(csv.DictReader(file.open())) == rows
    experiments.run_trainings("x", plan, None, 1)           # nothing is left

def test_a_file_of_something_else_is_refused(results):
    (results / "x.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="x.csv: is not of this study"):
        experiments.run_trainings("x", plan, None, 1)

def test_equal_time_takes_more_steps_for_a_mode_that_is_faster(results):
    rows = []
    for mode in MODES:
        for left in iter(lambda: plan_sweep(rows, {mode: Mode()}), []):     # noqa: B023
            rows += [measure(row) | {"minutes": "2.0" if mode == "full" else "1.6"} for row in left]
    experiments.write_csv(results / "sharing.csv", COLUMNS, ([row[c] for c in COLUMNS] for row in rows))
    planned = experiments.plan_fair([], experiments.FAIR)
    assert len(planned) == (1 + 2 * len(WIDER)) * len(SEEDS)
    steps = {row["mode"].partition(", equal ")[2]: row["steps"] for row in planned}
    assert steps == {"time": 2500, "parameters": 2000}

def test_equal_time_waits_for_the_sweep(results):
    with pytest.raises(ValueError, match="the study sharing comes first"):
        experiments.plan_fair([], experiments.FAIR)

def parameters(flags):
    shape = {name: getattr(train.Settings, name) for name in ("n_layer", "n_head", "n_embd", "block_size")}
    given = dict(flag.removeprefix("--").split("=") for flag in flags)
    shape |= {name: int(value) if value.isdigit() else value for name, value in given.items()}
    with torch.device("meta"):
        return sum(p.numel() for p in GPT(GPTConfig(vocab_size=1024, **shape)).parameters())

@pytest.mark.parametrize("mode", WIDER)
def test_equal_parameters_are_as_many_as_those_of_full_attention(mode):
    wide = parameters(experiments.FAIR[f"{mode}, equal parameters"].flags)
    assert wide == pytest.approx(parameters([]), rel=1e-3) and wide > 1.02 * parameters(MODES[mode].flags)

@pytest.mark.slow
def test_a_study_trains_what_it_says(run, text, results, monkeypatch):
    modes = {"8 layers, full": Mode(["--n_layer=4"]),
             "mixed": Mode(axis=["heads", "--share=1-2", "--heads=mix"])}
    monkeypatch.setattr(experiments, "TRAININGS", {"depth": (modes, plan_sweep)})
    monkeypatch.setattr(experiments, "RATES", (1e-3,))
    monkeypatch.setattr(experiments, "WARMUPS", (2,))
    monkeypatch.setattr(experiments, "SEEDS", (1,))
    monkeypatch.setattr(experiments, "STEPS", 4)
    tiny = ["--n_layer=3", "--n_head=2", "--n_embd=16", "--n_hidden=32", "--block_size=16", "--batch_size=4",
            "--vocab_size=300", "--device=cpu", "--dtype=float32", f"--text={text}",
            f"--data_dir={results}/data"]
    status, out, err = run(experiments.main, "depth", "--jobs=2", f"--train_flags={shlex.join(tiny)}")
    assert (status, err) == (0, "") and "| mixed | 0.001 | 2 |" in out
    rows = {row["mode"]: row for row in csv.DictReader((results / "depth.csv").open())}
    assert rows.keys() == modes.keys() and {row["steps"] for row in rows.values()} == {"4"}
    caches = {mode: int(row["cache B/token"]) for mode, row in rows.items()}
    assert caches == {"8 layers, full": 512, "mixed": 320}
    saved = int(rows["8 layers, full"]["parameters"]) - int(rows["mixed"]["parameters"])
    layer = 4 * 16 * 16 + 3 * 16 * 32
    assert saved == layer + 2 * 16 * 16 - 2 * 2             # and W_q and W_k, but a mixture of two heads
    assert all([*row] == COLUMNS and row["learning_rate"] == "0.001" for row in rows.values())
    assert SETTINGS == COLUMNS[:len(SETTINGS)]

def test_a_study_of_commands_runs_them_once(results, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    line = "python -c \"import sys; open(sys.argv[1][6:], 'a').write('ran')\" --csv=@/x.csv"
    monkeypatch.setattr(experiments, "COMMANDS", {"x": [line]})
    experiments.run_commands("x")
    experiments.run_commands("x")
    assert (results / "x.csv").read_text() == "ran" and "x.csv is there" in capfd.readouterr().out
    experiments.set_aside("x")
    assert (results / "x.csv.old").read_text() == "ran" and not (results / "x.csv").exists()

def test_a_table_without_results_is_refused(run, results):
    status, out, err = run(experiments.main, "sharing", "--table")
    assert status == 2 and err.count("\n") == 1 and "its results are not all there" in err

def test_flags_that_exclude_each_other_are_refused(run):
    assert run(experiments.main, "--check", "--update")[0] == 2
    status, _, err = run(experiments.main, "fair", "--train_flags='--n_layer=3")
    assert status == 2 and err.count("\n") == 1 and "a quotation mark is not closed" in err

def test_only_results_of_the_study_are_set_aside(results, tmp_path, monkeypatch):
    for name in ("mine.csv", "other.csv", "picture.png"):
        (results / name).write_text("x")
    monkeypatch.setattr(experiments, "COMMANDS", {"x": ["python a.py --csv=@/mine.csv",
                                                        "python b.py @/other.csv --file=@/picture.png"]})
    experiments.set_aside("x")
    assert sorted(path.name for path in results.iterdir()) == ["mine.csv.old", "other.csv", "picture.png"]

def test_a_command_that_fails_stops_its_study(results, monkeypatch):
    monkeypatch.setattr(experiments, "COMMANDS", {"x": ["python -c 'raise SystemExit(2)'"]})
    with pytest.raises(ValueError, match="status 2"):
        experiments.run_commands("x")
