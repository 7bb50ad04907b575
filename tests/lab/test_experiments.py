"""Studies run what is missing, in stages, and continue where they were stopped; nothing measured is lost."""

import csv
import multiprocessing
import os
import random
import shlex
import signal
import sys
import time

import pytest
import torch

pytest.importorskip("pandas", reason="needs pandas: pip install pandas")
import train  # noqa: E402
from minisa.axes import heads  # noqa: E402
from minisa.kit import checkpoint, shakespeare  # noqa: E402
from minisa.kit.cli import command  # noqa: E402
from minisa.kit.files import lock  # noqa: E402
from minisa.lab import experiments, tables  # noqa: E402
from minisa.lab.experiments import HIGHER, RATES, SEEDS, STEPS, TRAININGS, WARMUPS, WIDER  # noqa: E402
from minisa.model import GPT, GPTConfig  # noqa: E402

@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """The folder of a checkout of the test, in which `x` is a study of trainings with two modes."""
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setitem(experiments.TRAININGS, "x", {"full": "", "SA": "--share=0-1"})
    (tmp_path / "assets" / "results").mkdir(parents=True)
    return tmp_path

@pytest.fixture
def steps(checkout, monkeypatch):
    """steps((code, file), ...): let `x` be a study of commands that run Python code, each to make a file."""
    def steps(*commands):
        made = [{"run": shlex.join(["python", "-c", code]), "makes": [file]} for code, file in commands]
        monkeypatch.setitem(experiments.STUDIES, "x", made)
        return made
    return steps

def rows_of(checkout, name):
    with (checkout / "assets" / "results" / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))

# ---- trainings ----

def loss_of(settings):
    """Full attention likes 3e-3 and a warm-up of 500; SA 1e-3 and 1000."""
    full = settings["mode"] == "full"
    off = (abs(settings["learning_rate"] - (3e-3 if full else 1e-3)) * 10
           + abs(settings["warmup_iters"] - (500 if full else 1000)) / 1e4)
    return 2 + off + 0.01 * settings["seed"] + 0.1 * (not full)

def measure(settings):
    return {**settings, "val_bpb": loss_of(settings), "minutes": 2.0}, []

def test_each_mode_is_swept_then_run_with_all_seeds_at_its_own_best(checkout):
    asked = []
    while left := experiments.missing("x", tables.read("x")):
        random.Random(len(asked)).shuffle(left)             # a stage is one whatever its order
        asked.append(len(left))
        experiments.add_rows("x", [measure(settings)[0] for settings in left])
    assert asked == [len(RATES) * 2, (len(WARMUPS) - 1) * 2, (len(SEEDS) - 1) * 2]
    rows = rows_of(checkout, "x")
    assert len({tuple(row.values()) for row in rows}) == len(rows) == sum(asked)
    last = {(row["mode"], row["learning_rate"], row["warmup_iters"]) for row in rows if row["seed"] == "3"}
    assert last == {("full", "0.003", "500"), ("SA", "0.001", "1000")}

def test_what_was_run_is_not_run_again(checkout):
    ran = []

    def stopped(settings):
        ran.append(settings)
        if len(ran) == 5:
            raise ValueError("stopped")
        return measure(settings)

    with pytest.raises(ValueError, match="stopped"):
        experiments.run_trainings("x", stopped, 1)
    before = rows_of(checkout, "x")
    assert 4 <= len(before) <= 8
    experiments.run_trainings("x", measure, 2)
    after = rows_of(checkout, "x")
    assert len(after) == 14 and after[:len(before)] == before
    experiments.run_trainings("x", None, 1)                 # nothing is left

def test_a_row_says_when_it_was_measured_and_older_rows_keep_what_they_say(checkout):
    old = "mode,seed,val_bpb,commit,processor,torch,date\nfull,1,2.1500,,an old one,1.0,\n"
    (checkout / "assets" / "results" / "y.csv").write_text(old)
    experiments.add_rows("y", [{"mode": "SA", "seed": 1, "val_bpb": 2}])
    text = (checkout / "assets" / "results" / "y.csv").read_text()
    assert text.startswith(old) and rows_of(checkout, "y")[1]["torch"] == torch.__version__

def test_a_file_of_something_else_is_refused(checkout):
    (checkout / "assets" / "results" / "x.csv").write_text("mode,seed\nfull,2\n")
    with pytest.raises(ValueError, match="x.csv: is not of this study"):
        experiments.run_trainings("x", None, 1)

def test_equal_time_takes_more_steps_for_a_mode_that_is_faster(checkout):
    while left := experiments.missing("sharing", tables.read("sharing")):
        rows = [measure(settings)[0] for settings in left]
        for row in rows:
            row["minutes"] = 2 if row["mode"] == "full" else 1.6
        experiments.add_rows("sharing", rows)
    planned = [settings for stage in experiments.fair(None, TRAININGS["fair"]) for settings in stage]
    assert len(planned) == (1 + 2 * len(WIDER)) * len(SEEDS)
    steps = {(row["mode"] == "full", row["equal"]): row["steps"] for row in planned}
    assert steps == {(True, "time"): 2000, (False, "time"): 2500, (False, "parameters"): 2000}

def test_equal_time_waits_for_the_sweep(checkout):
    with pytest.raises(ValueError, match="the study sharing comes first"):
        experiments.run_trainings("fair", measure, 1)

def parameters(flags):
    shape = {name: getattr(train.Settings, name) for name in ("n_layer", "n_head", "n_embd", "block_size")}
    given = dict(flag.removeprefix("--").split("=") for flag in flags.split())
    shape |= {name: int(value) if value.isdigit() else value for name, value in given.items()}
    with torch.device("meta"):
        return sum(p.numel() for p in GPT(GPTConfig(vocab_size=1024, **shape)).parameters())

@pytest.mark.parametrize("mode", WIDER)
def test_equal_parameters_are_as_many_as_those_of_full_attention(mode):
    flags = TRAININGS["fair"][mode]
    wide = parameters(f"{flags} {WIDER[mode]}")
    assert wide == pytest.approx(parameters(""), rel=1e-3) and wide > 1.02 * parameters(flags)

def test_equal_parameters_train_the_wider_model():
    settings = {"mode": "MQA", "equal": "parameters", "steps": 9, "learning_rate": 1e-3, "warmup_iters": 5,
                "seed": 1}
    out, [line] = experiments.commands_of("fair", settings, "")
    assert "--n_kv_head=1 --n_hidden=416 " in line and f"--out_dir={out}" in line
    assert "n_hidden" not in experiments.commands_of("fair", settings | {"equal": "time"}, "")[1][0]

@pytest.mark.parametrize("mode", TRAININGS["sharing"])
def test_a_run_is_trained_with_the_settings_that_its_row_says(mode):
    from minisa.kit import cli
    settings = {"mode": mode, "steps": 9, "learning_rate": 0.003, "warmup_iters": 5, "seed": 7}
    out, lines = experiments.commands_of("sharing", settings, "--dtype=float32 --batch_size=3")
    read = [cli.read_settings(train.Settings, shlex.split(line)[2:]) for line in lines if "train.py" in line]
    shape = cli.read_settings(train.Settings, shlex.split(TRAININGS["sharing"][mode]))
    assert shape.items() <= read[0].items()
    always = {"preset": "cpu", "seed": 7, "dtype": "float32", "batch_size": 3}
    assert all(always.items() <= each.items() for each in read)
    trained = {"max_iters": 9, "learning_rate": 0.003, "warmup_iters": 5, "out_dir": f"{out}/trained"}
    assert trained.items() <= read[-1].items()
    if mode in experiments.AXES:                            # what is changed before was not trained
        assert read[0]["max_iters"] == 0 and read[-1]["init_from"] == f"{out}/changed"

def test_two_jobs_train_at_the_same_time(checkout):
    import threading
    both = threading.Barrier(2)

    def waits(settings):
        both.wait(20)                                       # for the other one
        return measure(settings)
    experiments.run_trainings("x", waits, 2)
    assert len(rows_of(checkout, "x")) == 14

# ---- ten seeds ----

def seed_of(settings):
    """On the plays that choose, with seed 0, MQA likes 8e-3, the others 2e-3, and SA 0-3 a long warm-up; all
    else says the opposite. MQA takes 4/5 of full attention's time: seeds 1 to 5 less, the others more."""
    mqa = settings["n_kv_head"] == 1 and not settings["share"]
    off = abs(settings["learning_rate"] - (8e-3 if mqa else 2e-3))
    long = settings["warmup_iters"] > WARMUPS[0]
    off += 1e-4 * (long != (settings["share"] == "0-3"))
    select = 2 + off if settings["seed"] == 0 else 2 - off
    time = 1 if not mqa else 0.7 if settings["seed"] <= 5 else 0.9
    minutes = time * settings["max_iters"] / 1000 * (1 + settings["seed"] / 100)
    return {**settings, "select_bpb": select, "report_bpb": 4 - select, "val_bpb": 2, "minutes": minutes}

@pytest.fixture
def stages(checkout):
    """The stages of the study seeds, each asked for when the one before it has its rows."""
    stages = []
    while left := experiments.missing("seeds", tables.read("seeds")):
        stages.append(left)
        random.Random(len(stages)).shuffle(rows := [seed_of(settings) for settings in left])
        experiments.add_rows("seeds", rows)
    return stages

def test_settings_are_chosen_with_a_seed_that_is_not_reported(stages):
    rates, higher, warmups, *reported = stages
    assert {run["seed"] for stage in (rates, higher, warmups) for run in stage} == {0}
    assert len(rates) == 6 * len(RATES) and len(warmups) == 6
    assert [(run["n_kv_head"], run["share"], run["learning_rate"]) for run in higher] == [(1, "", HIGHER)]
    found = {(run["n_kv_head"], run["share"], run["share_kind"], run["learning_rate"], run["warmup_iters"])
             for stage in reported for run in stage}
    assert found == {(4, "", "", 2e-3, 500), (4, "1-3", "weights", 2e-3, 500),
                     (4, "0-3", "weights", 2e-3, 1000), (1, "", "", HIGHER, 500),
                     (1, "1-3", "weights", 2e-3, 500), (1, "1-3", "kv", 2e-3, 500)}

def test_seeds_are_run_one_by_one_with_all_modes_in_turn(stages):
    *_, in_float32, steps, timed, more, longer = stages
    for stage in steps, longer:
        assert [run["seed"] for run in stage] == [seed for seed in range(1, 11) for _ in range(6)]
        shapes = [tuple(run[name] for name in tables.SHAPE) for run in stage]
        turns = [shapes[n:n + 6] for n in range(0, 60, 6)]
        assert all(len(set(turn)) == 6 for turn in turns)
        assert {turn[0] for turn in turns} == set(shapes)   # each is the first of a seed
    assert {run["max_iters"] for run in steps} == {STEPS} and {run["max_iters"] for run in longer} == {6000}
    assert sorted((run["share"], run["seed"]) for run in in_float32) == [
        (share, seed) for share in ("", "1-3") for seed in (1, 2, 3)]
    assert len(timed) == 50 and {run["equal"] for run in timed} == {"time"}
    assert [run["seed"] for run in more] == [seed for seed in range(11, 17) for _ in range(6)]
    assert {run["max_iters"] for run in more} == {STEPS} and {run["equal"] for run in more} == {"steps"}
    assert {(run["n_kv_head"], run["share"]): run["max_iters"] for run in timed} == {
        (4, "1-3"): 2000, (4, "0-3"): 2000, (1, ""): 2500, (1, "1-3"): 2000}

def test_the_longest_runs_of_a_seed_have_one_format_on_whatever_machine(stages, checkout, monkeypatch):
    *_, longer = stages
    rows = [row for row in rows_of(checkout, "seeds") if row["max_iters"] != "6000"]
    tables.result("seeds").unlink()
    done = [seed_of(run | {"dtype": "float32"}) for run in longer[:8]]      # of seed 1, and two of seed 2
    experiments.add_rows("seeds", rows + done)
    for faster in "bfloat16", "float32":
        monkeypatch.setattr(experiments, "choose_dtype", lambda _, dtype=faster: dtype)
        left = experiments.missing("seeds", tables.read("seeds"))
        assert len(left) == 52
        assert {run["dtype"] for run in left if run["seed"] <= 2} == {"float32"}
        assert {run["dtype"] for run in left if run["seed"] > 2} == {faster}

def test_modes_of_the_ten_seeds_are_named_for_their_flags(checkout):
    modes = TRAININGS["seeds"]
    experiments.add_rows("seeds", [{**shape, "seed": 1} for shape in modes.values()])
    assert tables.named(tables.read("seeds"))["mode"].tolist() == [*modes]

def test_two_plays_choose_and_two_others_report(text, checkout, monkeypatch):
    monkeypatch.setattr(shakespeare, "THIRD", "CALIBAN:\nWhen Prospero")    # near the end of tests/text.txt
    monkeypatch.setattr(experiments, "run", in_this_process)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    tiny = "--n_layer=2 --n_head=2 --n_embd=16 --n_hidden=32 --block_size=16 --vocab_size=300 --batch_size=4"
    flags = f"{tiny} --text={text.as_posix()} --data_dir={checkout.as_posix()}/data"
    shape = {"share": "0-1", "share_kind": "kv", "n_kv_head": 1}
    settings = experiments.flags_of(shape, 1e-3, 2, seed=3, steps=4, dtype="float32")
    monkeypatch.chdir(checkout)
    row, _ = experiments.train_seed(settings, flags)
    assert {name: row[name] for name in settings} == settings and row["cache_bytes_per_token"] == 2 * 8 * 4

    folder, = (file.parent for file in (checkout / "out").glob("*/*/config.json"))
    model, tokenizer, info = checkpoint.load(folder)
    val = text.read_text()[int(0.9 * len(text.read_text())):]
    cut = val.index("CALIBAN:\nWhen Prospero")
    for part, column in ((val[:cut], "select_bpb"), (val[cut:], "report_bpb"), (val, "val_bpb")):
        ids = torch.tensor(tokenizer.encode(part))
        nats = 0.0
        for begin in range(0, len(ids) - 1, 16):            # each window by itself, without padding
            x, y = ids[begin:begin + 16], ids[begin + 1:begin + 17]
            logits, _ = model(x[None, :len(y)])
            nats -= logits[0].log_softmax(-1)[range(len(y)), y].sum().item()
        n_bytes = len(part.encode()) - len(tokenizer.decode_bytes([ids[0].item()]))
        assert float(row[column]) == pytest.approx(nats / n_bytes / 0.6931472, abs=1e-4)
    assert info["step"] == 4
    from minisa.kit.run import read_state
    given = {f"--{name}={value}" for name, value in settings.items() if name != "equal"}
    assert given | {"--eval_interval=4"} <= {*read_state(folder).settings}      # evaluated once, at the end

def test_another_text_than_the_plays_has_no_halves():
    assert shakespeare.two_and_two("a\n\nMaster:\nBoatswain!\nb") == ("a\n\n", "Master:\nBoatswain!\nb")
    with pytest.raises(ValueError, match="not the four held-out plays; train on the plays, without --text"):
        shakespeare.two_and_two("To be, or not to be")

def test_the_format_of_the_ten_seeds_is_not_a_choice(run, checkout):
    status, _, err = run(experiments.main, "seeds", "--dtype=float32")
    assert status == 2 and err.startswith("minisa: error: --dtype: the study seeds trains in bfloat16")

def in_this_process(line, stdout=None):
    """A command of a study, without waiting for torch."""
    _, *sys.argv = shlex.split(line)
    if sys.argv[0] == "-m":
        del sys.argv[0]
    (heads if sys.argv[0] == "minisa.axes.heads" else train).main()

def test_a_study_trains_what_it_says(run, text, checkout, monkeypatch):
    tiny = "--n_layer=3 --n_head=2 --n_embd=16 --n_hidden=32 --block_size=16 --vocab_size=300"
    deep = tiny.replace("n_layer=3", "n_layer=4")
    monkeypatch.setitem(experiments.TRAININGS, "depth", {"full": deep, "mixed": tiny})
    monkeypatch.setitem(experiments.AXES, "mixed", "heads --share=1-2 --heads=mix")
    for name, value in {"RATES": (1e-3,), "WARMUPS": (2,), "SEEDS": (1,), "STEPS": 4}.items():
        monkeypatch.setattr(experiments, name, value)
    changed = checkout / "out" / "experiments" / "depth-mixed-4-0.001-2-1" / "changed"
    changed.mkdir(parents=True)                             # what a stopped one left
    flags = f"--batch_size=4 --text={text.as_posix()} --data_dir={checkout.as_posix()}/data"
    monkeypatch.setattr(experiments, "run", in_this_process)
    monkeypatch.setattr(signal, "signal", lambda *_: None)      # only the main thread may set one
    status, out, err = run(experiments.main, "depth", "--dtype=float32", f"--train_flags={flags}")
    assert status == 0 and "| 8 layers, mixed | 0.001 | 2 |" in out, err
    rows = {row["mode"]: row for row in rows_of(checkout, "depth")}
    assert rows.keys() == {"full", "mixed"} and {row["steps"] for row in rows.values()} == {"4"}
    caches = {mode: int(row["cache_bytes_per_token"]) for mode, row in rows.items()}
    assert caches == {"full": 512, "mixed": 320}
    saved = int(rows["full"]["parameters"]) - int(rows["mixed"]["parameters"])
    layer = 4 * 16 * 16 + 3 * 16 * 32
    assert saved == layer + 2 * 16 * 16 - 2 * 2             # and W_q and W_k, but a mixture of two heads
    assert all(row["dtype"] == "float32" and row["date"] for row in rows.values())

def test_a_training_that_was_interrupted_has_no_row_and_starts_anew(checkout, monkeypatch):
    (checkout / "train.py").write_text("""if True:
        import pathlib, sys
        out = pathlib.Path(sys.argv[-1].removeprefix("--out_dir="))
        assert not out.exists()
        out.mkdir(parents=True)
        (out / "config.json").touch()
        sys.exit(130)
    """)
    settings = experiments.missing("x", tables.read("x"))[0]
    for _ in range(2):
        with pytest.raises(ValueError, match="a command ended with status 130"):
            experiments.run_trainings("x", lambda _: experiments.train("x", settings, "", "float32"), 1)
    assert not tables.result("x").exists()

# ---- commands ----

def append(file):
    return f"open('{file}', 'a').write('ran')"

def test_a_study_of_commands_runs_them_once_and_says_which(checkout, steps, capfd):
    made = steps((append("assets/results/a.csv"), "assets/results/a.csv"))
    experiments.run_steps(made)
    experiments.run_steps(made)
    assert (checkout / "assets" / "results" / "a.csv").read_text() == "ran"
    out = capfd.readouterr().out
    assert out.count("$ python -c") == 1 and "assets/results/a.csv is there" in out

def test_a_training_counts_only_when_it_ended_with_status_0(checkout, steps, capfd):
    stopped = "import pathlib; pathlib.Path('out/kept').mkdir(parents=True, exist_ok=True); "
    stopped += append("out/kept/config.json")
    steps_of = [(f"{stopped}; raise SystemExit(130)", "out/kept/done"), (append("picture"), "picture")]
    for _ in range(2):
        with pytest.raises(ValueError, match="status 130"):
            experiments.run_steps(steps(*steps_of))
    assert (checkout / "out" / "kept" / "config.json").read_text() == "ranran"
    assert not (checkout / "picture").exists()
    for _ in range(2):
        experiments.run_steps(steps((stopped, "out/kept/done"), steps_of[1]))
    assert (checkout / "out" / "kept" / "config.json").read_text() == "ran" * 3
    assert (checkout / "picture").read_text() == "ran"

def test_a_command_that_does_not_make_what_the_study_says_is_named(checkout, steps):
    with pytest.raises(ValueError, match="did not make what studies.toml says, assets/b: python -c"):
        experiments.run_steps(steps((append("assets/a"), "assets/b")))

def test_flags_of_trainings_are_refused_for_commands(run, checkout, steps):
    steps((append("a"), "a"))
    for flag in "--jobs=2", "--dtype=float32", "--train_flags=--n_layer=3":
        status, _, err = run(experiments.main, "x", flag)
        assert status == 2 and flag.partition("=")[0] in err and not (checkout / "a").exists()

def test_trainings_of_studies_are_marked_when_done():
    for name, made in experiments.STUDIES.items():
        for step in made:
            is_training = step["run"].startswith("python train.py")
            assert is_training == step["makes"][-1].endswith("/done"), (name, step)
            assert not is_training or "--overwrite" in step["run"]

def test_setting_aside_twice_keeps_both(run, checkout, steps):
    file = "assets/results/a.csv"
    steps((append(file), file), (append("assets/b.png"), "assets/b.png"), (append("model"), "model"))
    (checkout / "assets" / "results" / "other.csv").write_text("x")
    for first in ("first", "second"):
        (checkout / file).write_text(first)
        assert run(experiments.main, "x", "--again")[0] == 0
    old = [(checkout / f"{file}.{ending}").read_text() for ending in ("old", "old2")]
    assert old == ["first", "second"] and (checkout / file).read_text() == "ran"
    assert (checkout / "assets" / "b.png.old").read_text() == "ran"
    assert (checkout / "model").read_text() == "ran"        # outside assets: not made again
    assert (checkout / "assets" / "results" / "other.csv").exists()

def test_models_of_a_study_are_set_aside_with_it(run, checkout, steps):
    old = checkout / "out" / "new"
    old.mkdir(parents=True)
    (old / "model.safetensors").write_text("old")
    make = "import pathlib; pathlib.Path('out/new').mkdir(); " + append("out/new/model.safetensors")
    steps((make, "out/new/model.safetensors"))
    assert run(experiments.main, "x", "--again")[0] == 0
    assert (old / "model.safetensors").read_text() == "ran"
    assert (checkout / "out" / "new.old" / "model.safetensors").read_text() == "old"

def test_beside_a_running_study_none_starts_and_nothing_is_moved(run, checkout, steps, tmp_path, monkeypatch):
    file = "assets/results/a.csv"
    steps((append(file), file))
    (checkout / file).write_text("measured")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with lock(checkout / "out" / "experiments"):
        monkeypatch.chdir(elsewhere)
        status, _, err = run(experiments.main, "x", "--again")
    assert status == 2 and "another program is writing there" in err and err.count("\n") == 1
    assert (checkout / file).read_text() == "measured"
    assert [path.name for path in (checkout / "assets" / "results").iterdir()] == ["a.csv"]

@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_two_studies_at_once_lose_no_row(checkout, monkeypatch):
    def train(name, settings, flags, dtype):
        time.sleep(0.1)
        return {**settings, "val_bpb": 2, "cache_bytes_per_token": 1, "flops": 1}, []

    def study(errors):
        sys.stdout, sys.stderr = open(os.devnull, "w"), errors.open("w")
        command(experiments.main)

    monkeypatch.setattr(experiments, "FIGURES", {})
    monkeypatch.setitem(experiments.TRAININGS, "preset", {"full": ""})
    monkeypatch.setattr(experiments, "train", train)
    monkeypatch.setattr(sys, "argv", ["experiments", "preset", "--dtype=float32"])
    fork, errors = multiprocessing.get_context("fork"), [checkout / "first", checkout / "second"]
    processes = [fork.Process(target=study, args=(file,)) for file in errors]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert "another program is writing there" in "".join(file.read_text() for file in errors)
    assert len(rows_of(checkout, "preset")) == len(SEEDS)

# ---- flags ----

def test_a_table_without_results_is_refused(run, checkout):
    status, _, err = run(experiments.main, "sharing", "--table")
    assert status == 2 and err.count("\n") == 1 and "its results are not all there" in err

def test_flags_that_exclude_each_other_are_refused(run):
    assert run(experiments.main, "--check", "--update")[0] == 2
    status, _, err = run(experiments.main, "fair", "--train_flags='--n_layer=3")
    assert status == 2 and err.count("\n") == 1 and "a quotation mark is not closed" in err

def test_studies_are_listed_with_how_far_they_are(run, checkout, steps):
    steps((append("a"), "a"), (append("b"), "b"))
    (checkout / "a").touch()
    status, out, _ = run(experiments.main)
    assert status == 0 and "sharing: 0 runs" in out and "x: 1 of 2 commands are done" in out

def test_the_study_of_the_preset_trains_what_train_py_calls_long():
    long = train.PRESETS["long"]
    settings, = {tuple(run[name] for name in ("steps", "learning_rate", "warmup_iters"))
                 for run in next(experiments.preset(None, ["full"]))}
    assert settings == (long["max_iters"], long["learning_rate"], long["warmup_iters"])
