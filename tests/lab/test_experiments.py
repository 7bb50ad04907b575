"""Studies run what is missing, in stages, and go on where they were stopped."""

import csv
import json
import random

import pytest

from minisa.lab import experiments
from minisa.lab.experiments import RATES, RESULTS, SEEDS, SETTINGS, WARMUPS, key, plan_sharing, run_study

MODES = {"full": ([], None), "SA": (["--share=0-1"], None)}

def result(settings, bpb):
    row = {**settings, **dict.fromkeys(RESULTS, 1), "val_bpb": bpb}
    return {name: str(value) for name, value in row.items()}

def loss_of(settings):
    """Full attention likes 3e-3 and a warm-up of 250; SA 1e-3 and 100."""
    full = settings["mode"] == "full"
    rate, warmup = float(settings["learning_rate"]), int(settings["warmup_iters"])
    off = abs(rate - (3e-3 if full else 1e-3)) * 10 + abs(warmup - (250 if full else 100)) / 1e4
    return 2 + off + 0.01 * int(settings["seed"]) + 0.1 * (not full)

def test_each_mode_is_swept_then_run_with_all_seeds_at_its_own_best():
    rows, asked = [], []
    while left := plan_sharing(rows, MODES):
        random.Random(len(rows)).shuffle(left)              # a stage is one whatever its order
        asked.append(len(left))
        rows += [result(settings, loss_of(settings)) for settings in left]
    assert asked == [len(RATES) * 2, (len(WARMUPS) - 1) * 2, (len(SEEDS) - 1) * 2]
    assert len(set(map(key, rows))) == len(rows)
    last = {(row["mode"], row["learning_rate"], row["warmup_iters"]) for row in rows if row["seed"] == "3"}
    assert last == {("full", "0.003", "250"), ("SA", "0.001", "100")}

def test_the_table_pairs_seeds_and_shows_their_spread():
    rows, add = [], {"1": 0.0, "2": 0.02, "3": 0.04}
    for seed in SEEDS:
        for mode, loss in (("full", 2.0 + 0.1 * seed), ("SA", (2.0 + 0.1 * seed) * (1.01 + add[str(seed)]))):
            settings = {"mode": mode, "learning_rate": 1e-3, "warmup_iters": 100, "seed": seed}
            rows.append(result(settings, loss))
    table = experiments.table_sharing(rows, MODES)
    assert table[1][4] == "+0.00 ± 0.00 %" and table[2][4] == "+3.00 ± 2.00 %"
    assert table[1][3] == "2.2000" and experiments.markdown(table).count("\n") == 3

def test_what_was_run_is_not_run_again(tmp_path):
    file, ran = tmp_path / "x.csv", []

    def measure(settings):
        ran.append(key(settings))
        if len(ran) == 5:
            raise ValueError("stopped")
        return result(settings, loss_of(settings))

    with pytest.raises(ValueError, match="stopped"):
        run_study(file, lambda rows: plan_sharing(rows, MODES), measure, 1)
    stopped_at = len(list(csv.DictReader(file.open())))
    assert 4 <= stopped_at <= 8
    rows = run_study(file, lambda rows: plan_sharing(rows, MODES), measure, 2)
    assert len(rows) == 16 and len(set(map(key, rows))) == 16
    assert list(csv.DictReader(file.open())) == rows
    run_study(file, lambda rows: plan_sharing(rows, MODES), None, 1)        # nothing is left

def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="x.csv: is not of this study"):
        run_study(tmp_path / "x.csv", None, None, 1)

@pytest.mark.slow
def test_a_study_trains_what_it_says(run, text, tmp_path, monkeypatch):
    modes = MODES | {"mixed": ([], ["heads", "--share=1-2", "--heads=mix"])}
    monkeypatch.setattr(experiments, "STUDIES", {"sharing": modes})
    monkeypatch.setattr(experiments, "RATES", (1e-3,))
    monkeypatch.setattr(experiments, "WARMUPS", (2,))
    monkeypatch.setattr(experiments, "SEEDS", (1,))
    monkeypatch.setattr(experiments, "csv_file", lambda study: tmp_path / f"{study}.csv")
    tiny = ["--n_layer=3", "--n_head=2", "--n_embd=16", "--n_hidden=32", "--block_size=16", "--batch_size=4",
            "--vocab_size=300", "--max_iters=4", "--device=cpu", "--dtype=float32", f"--text={text}",
            f"--data_dir={tmp_path}/data"]
    status, out, err = run(experiments.main, "sharing", f"--train_flags={json.dumps(tiny)}")
    assert (status, err) == (0, "") and "| SA | 0.001 | 2 |" in out
    rows = {row["mode"]: row for row in csv.DictReader((tmp_path / "sharing.csv").open())}
    assert rows.keys() == modes.keys() and {row["steps"] for row in rows.values()} <= {"4"}
    caches = {mode: int(row["cache B/token"]) for mode, row in rows.items()}
    assert caches == {"full": 384, "SA": 320, "mixed": 320}
    assert int(rows["mixed"]["parameters"]) == int(rows["SA"]["parameters"]) + 4
    assert all(row.keys() == {*SETTINGS, *RESULTS} for row in rows.values())
