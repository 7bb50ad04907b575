"""Training from the command line, small: what it saves, how it stops and goes on, what it refuses."""

import csv
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import sample
import train
from minisa.kit import checkpoint
from minisa.kit.cli import command
from minisa.kit.data import Data
from minisa.kit.files import lock
from minisa.kit.run import LOG, STATE, read_state

ROOT = Path(__file__).resolve().parent.parent.parent
TINY = ["--n_layer=3", "--n_head=2", "--n_embd=16", "--n_hidden=32", "--block_size=16", "--batch_size=4",
        "--vocab_size=300", "--max_iters=12", "--eval_interval=5", "--log_interval=3", "--warmup_iters=2",
        "--device=cpu", "--dtype=float32", "--data_dir=data"]

def bill(file):
    return list(csv.DictReader(Path(file).read_text().splitlines()))

def log(folder, key):
    lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line[key] for line in lines if key in line}

def weights(folder):
    """Those of the last step."""
    return read_state(folder).model.state_dict()

def best(folder):
    """Those that others load."""
    return checkpoint.load(folder)[0].state_dict()

def stored_step(folder="."):
    return read_state(Path(folder) / "out/full").progress.step

def same(a, b, tolerance=0.0):
    return a.keys() == b.keys() and all((a[name] - b[name]).abs().max() <= tolerance for name in a)

@pytest.fixture(scope="module")
def finished(tmp_path_factory, text):
    """A folder with the out/ and data/ of a run."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["train.py", *TINY, f"--text={text}"])
        command(train.main)
    return folder

@pytest.fixture
def trained(finished, tmp_path):
    """A copy of that run, in the folder that tests run in."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)

RUNS = [([], "out/full"), (["--share=0-2"], "out/weights-0-2"),
        (["--share=1-2", "--share_kind=kv", "--n_kv_head=1"], "out/kv-1-2-kv1")]

@pytest.mark.parametrize("flags, folder", RUNS)
def test_a_run_is_saved_under_the_name_of_its_mode_and_learns(run, text, flags, folder):
    longer = ["--max_iters=60", "--learning_rate=1e-2"]
    status, out, err = run(train.main, *TINY, f"--text={text}", *flags, *longer)
    assert (status, err) == (0, "")
    assert "tokens/s" in out and "left" in out and "bits per byte" in out
    assert out.endswith(f"Next: python sample.py {folder}\n")
    losses = log(folder, "val_loss")
    assert list(losses) == [*range(5, 61, 5)] and losses[60] < losses[5] - 0.3
    model, tokenizer, info = checkpoint.load(folder)
    assert info["step"] == min(losses, key=losses.get) and info["val_loss"] == min(losses.values())
    assert log(folder, "loss").keys() == {*range(3, 61, 3)}
    assert tokenizer.vocab_size == model.config.vocab_size == 300

@pytest.mark.parametrize("flags", [[], ["--eval_tokens=64"]], ids=["all", "as told"])
def test_the_loss_of_a_finished_run_is_of_all_validation_text_unless_told(run, text, monkeypatch, flags):
    monkeypatch.setattr(train, "EVAL_TOKENS", 64)
    status, out, err = run(train.main, *TINY, f"--text={text}", *flags)
    model, _, info = checkpoint.load("out/full")
    data = Data(Path("data") / Path(info["data"]).name)
    whole, part = data.evaluate(model), data.evaluate(model, 64)
    assert (status, err) == (0, "") and abs(whole[0] - part[0]) > 1e-3
    assert (info["val_loss"], info["val_bpb"]) == pytest.approx(part if flags else whole, rel=1e-6)
    assert log("out/full", "val_loss")[info["step"]] == pytest.approx(part[0], rel=1e-6)
    assert ("On all validation text" in out) == (not flags)

def test_the_model_with_the_least_validation_loss_is_kept(run, text, monkeypatch):
    losses = iter([3.0, 2.0, 4.0, 2.0])                     # at steps 5, 10 and 12; of the best, in the end
    monkeypatch.setattr(Data, "evaluate", lambda *_: (next(losses), 1.0))
    status, out, err = run(train.main, *TINY, f"--text={text}", "--keep_every=5")
    assert status == 0 and "the best model, of step 10," in out, err
    assert same(best("out/full"), best("out/full/steps/00000010"))
    assert not same(best("out/full"), weights("out/full"))

STOPS = [([], 7, "stopped"), (["--dropout=0.3", "--share=0-2"], 7, "stopped"),
         ([], 4, "stopped"), ([], 7, "killed")]

@pytest.mark.parametrize("flags, at, how", STOPS, ids=str)
def test_a_stopped_run_goes_on_to_the_very_same_weights(run, text, monkeypatch, flags, at, how):
    """Stopped between evaluations, just before one (step 4 makes step 5), or killed, so that the last
    evaluation's checkpoint is what is left."""
    flags = [*TINY, f"--text={text}", *flags]
    run(train.main, *flags, "--out_dir=out/whole")

    batch = Data.batch
    def stop(self, step, *args, **kwargs):
        if step == at:
            if how == "killed":
                raise KeyboardInterrupt
            signal.raise_signal(signal.SIGINT)
        return batch(self, step, *args, **kwargs)
    with monkeypatch.context() as patch:
        patch.setattr(Data, "batch", stop)
        status, out, _ = run(train.main, *flags, "--out_dir=out/stopped")
    assert status == 130
    if how == "stopped":
        assert f"stopped at step {at + 1} " in out and "--resume --out_dir=out/stopped" in out

    steps = []
    def noted(self, step, *args):
        steps.append(step)
        return batch(self, step, *args)
    monkeypatch.setattr(Data, "batch", noted)
    again = flags if at == 4 else []                        # the whole command, or what the message says
    status, out, err = run(train.main, *again, "--resume", "--out_dir=out/stopped")
    assert (status, err) == (0, "") and steps == [*range(5 if how == "killed" else at + 1, 12)]
    for those in (weights, best):
        assert same(those("out/whole"), those("out/stopped"))
    assert log("out/whole", "val_loss") == log("out/stopped", "val_loss")

def start(folder, *flags):
    """A training process, once it has written its first checkpoint."""
    command = [sys.executable, ROOT / "train.py", *TINY, "--max_iters=1000000", "--eval_interval=20", *flags]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, cwd=folder, env=env, **pipes)
    until = time.time() + 300                               # on a busy machine, torch is imported slowly
    while not (folder / "out/full" / STATE).exists() and process.poll() is None and time.time() < until:
        time.sleep(0.05)
    return process

def test_a_run_is_alone_in_its_folder_and_goes_on_when_killed(run, text, tmp_path, monkeypatch):
    process = start(tmp_path, f"--text={text}")
    status, _, err = run(train.main, *TINY, f"--text={text}", "--overwrite")
    process.kill()
    process.communicate()
    assert status == 2 and "out/full: another program is writing there" in err and err.count("\n") == 1
    at = stored_step(tmp_path)
    assert at >= 20 and at % 20 == 0
    status, _, err = run(train.main, "--resume", "--learning_rate=0.5")
    assert status == 2 and "--learning_rate=0.5: the run in out/full was started with" in err
    batch = Data.batch
    def stop_soon(self, step, *args, **kwargs):
        if step == at + 3:
            signal.raise_signal(signal.SIGTERM)
        return batch(self, step, *args, **kwargs)
    monkeypatch.setattr(Data, "batch", stop_soon)
    status, out, _ = run(train.main, "--resume")
    assert status == 143 and f"stopped at step {at + 4}" in out and stored_step() == at + 4

@pytest.mark.skipif(os.name == "nt", reason="needs signals between processes")
def test_ctrl_c_saves_and_says_how_to_go_on(text, tmp_path):
    process = start(tmp_path, f"--text={text}")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err == ""
    step = int(out.split("stopped at step ")[1].split()[0])
    assert stored_step(tmp_path) == step
    assert "python train.py --resume --out_dir=out/full" in out

def test_a_nan_stops_the_run_and_keeps_the_last_good_checkpoint(run, text, monkeypatch):
    flags = [*TINY, f"--text={text}"]
    step_of = torch.optim.AdamW.step
    def poison(self, *args, **kwargs):
        step_of(self, *args, **kwargs)
        self.count = getattr(self, "count", 0) + 1
        if self.count == 7:
            self.param_groups[0]["params"][0].data.fill_(float("nan"))
    monkeypatch.setattr(torch.optim.AdamW, "step", poison)
    status, _, err = run(train.main, *flags)
    assert status == 2 and "the loss is nan at step 9" in err and "last good checkpoint" in err
    assert stored_step() == 5 and all(w.isfinite().all() for w in weights("out/full").values())

def run_by_torchrun():
    """What torchrun --standalone --nproc_per_node=2 does, but without importing torch three times."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch
    torchrun = LaunchConfig(1, 1, 2, run_id="two", rdzv_backend="c10d", rdzv_endpoint="127.0.0.1:0",
                            start_method="fork", max_restarts=0, monitor_interval=0.1)
    assert elastic_launch(torchrun, train.main)() == {0: 0, 1: 0}

@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that start as copies of this one")
def test_micro_batches_and_processes_do_not_change_the_result(run, text, monkeypatch):
    run(train.main, *TINY, f"--text={text}", "--out_dir=out/one")
    run(train.main, *TINY, f"--text={text}", "--out_dir=out/four", "--gradient_accumulation_steps=4")
    monkeypatch.setattr(sys, "argv", ["train.py", *TINY, f"--text={text}", "--out_dir=out/two"])
    process = multiprocessing.get_context("fork").Process(target=run_by_torchrun)
    process.start()
    process.join(timeout=120)
    assert process.exitcode == 0
    for other in ("out/four", "out/two"):
        assert same(weights("out/one"), weights(other), 2e-4), other
        assert log(other, "loss") == pytest.approx(log("out/one", "loss"), abs=1e-4)
        assert log(other, "val_loss") == pytest.approx(log("out/one", "val_loss"), abs=1e-4)

def test_micro_batches_add_up_to_the_gradient_of_the_batch_and_a_long_one_is_clipped(run, text, monkeypatch):
    rows, batch, norms, step = [], Data.batch, [], torch.optim.AdamW.step

    def read(self, *args):
        x, y = batch(self, *args)
        rows.append(len(x))
        return x, y

    def noted(self, *args, **kwargs):
        grads = [p.grad.norm() for group in self.param_groups for p in group["params"]]
        norms.append(torch.stack(grads).norm().item())
        return step(self, *args, **kwargs)
    monkeypatch.setattr(Data, "batch", read)
    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    flags = [*TINY, f"--text={text}", "--max_iters=2", "--overwrite", "--grad_clip=0"]
    for flag in "--gradient_accumulation_steps=1", "--gradient_accumulation_steps=4", "--grad_clip=0.01":
        status, _, err = run(train.main, *flags, flag)
        assert status == 0, err
    assert rows == [4, 4, *[1] * 8, 4, 4]                   # of a batch of 4, in two steps each
    assert norms[2:4] == pytest.approx(norms[:2], rel=1e-3) and min(norms[:2]) > 0.02
    assert norms[4:] == pytest.approx([0.01, 0.01], rel=1e-3)

def test_fine_tuning_starts_from_the_weights_of_a_run(run, text):
    run(train.main, *TINY, f"--text={text}", "--max_iters=40", "--learning_rate=1e-2")
    flags = [f"--text={text}", "--data_dir=data", "--device=cpu", "--batch_size=4", "--eval_interval=5"]
    status, out, _ = run(train.main, *flags, "--init_from=out/full", "--share=0-2", "--max_iters=10",
                         "--learning_rate=0")
    assert status == 0
    tuned = weights("out/weights-0-2-from-full")
    assert torch.equal(tuned["embed.weight"], best("out/full")["embed.weight"])
    assert tuned["blocks.2.attn.qkv.weight"].shape == (16, 16)
    assert log("out/weights-0-2-from-full", "val_loss")[10] < 5.2           # random weights have ln 300 = 5.7

AT_WORK = ["--dropout=0.3", "--learning_rate=1e-3", "--min_lr=1e-3", "--warmup_iters=5", "--weight_decay=0",
           "--beta1=0.5", "--beta2=0.5", "--grad_clip=0.01", "--seed=2", "--batch_size=2", "--rope_base=100",
           "--norm_eps=0.1", "--dtype=bfloat16"]

@pytest.mark.parametrize("flag", AT_WORK)
def test_a_flag_changes_what_is_learned(run, text, trained, flag):
    status, _, err = run(train.main, *TINY, f"--text={text}", flag, "--out_dir=out/other")
    assert status == 0, err
    assert not same(weights("out/full"), weights("out/other"))

def test_matrices_decay_and_neither_gains_nor_mixtures_do():
    config = train.GPTConfig(n_layer=3, n_head=2, n_embd=16, tied=False, share="1-2")
    model = checkpoint.change(train.GPT(config), "heads", heads="mix")
    optimizer = train.make_optimizer(train.Settings(weight_decay=0.2), model)
    decays = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        assert decays[p] == (0.0 if name == "norm.weight" or name.endswith(".mix") else 0.2), name

def test_a_gpu_has_a_preset_of_its_own_and_flags_change_it():
    for device, width in (("cpu", 128), ("cuda", 384), ("mps", 384)):
        settings = train.settle({"n_layer": 2}, torch.device(device))
        assert (settings.n_layer, settings.n_embd) == (2, width)
    assert train.settle({"preset": "cpu"}, torch.device("cuda")).n_embd == 128

def test_the_learning_rate_rises_then_falls_along_a_cosine():
    args = SimpleNamespace(learning_rate=1.0, min_lr=0.1, warmup_iters=10, max_iters=110)
    rates = [train.learning_rate(step, args) for step in range(111)]
    assert rates[0] == 0.1 and rates[9] == rates[10] == 1.0
    assert rates[60] == pytest.approx(0.55) and rates[110] == pytest.approx(0.1)

@pytest.mark.parametrize("dtype, other", [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_the_format_that_was_chosen_is_trained_in_told_and_kept(run, text, monkeypatch, dtype, other):
    head, seen = train.GPT.head, set()
    def noted(self, x):
        logits = head(self, x)
        if self.training:
            seen.add(logits.dtype)
        return logits
    monkeypatch.setattr(train.GPT, "head", noted)
    monkeypatch.setattr(train.machine, "choose_dtype", lambda *_: dtype)
    flags = [flag for flag in TINY if not flag.startswith("--dtype")]
    _, out, _ = run(train.main, *flags, f"--text={text}", "--max_iters=2")
    assert seen == {getattr(torch, dtype)}
    monkeypatch.setattr(train.machine, "choose_dtype", lambda *_: other)        # a busier machine, say
    _, again, _ = run(train.main, "--resume", "--out_dir=out/full", "--data_dir=data")
    assert f"cpu, {dtype}\n" in out and f"cpu, {dtype}\n" in again

def test_steps_run_the_compiled_model_and_evaluations_the_other(run, text, monkeypatch):
    calls = []
    def compiled(model, idx, targets, autocast):
        return lambda *args: calls.append(model.training) or model(*args), 1.0
    monkeypatch.setattr(train.machine, "compiled", compiled)
    status, out, err = run(train.main, *TINY, f"--text={text}", "--compile")
    assert status == 0 and "compiled in 0m01s" in out, err
    assert calls == [True] * 12                             # one for each step

WRONG = {
    "--n_layer=abc": "--n_layer: invalid int value: 'abc'",
    "--n_layer=0": "--n_layer: 0 is not a number from 1 up",
    "--n_head=3": "--n_embd=16: must be a multiple of 2 · 3",
    "--n_kv_head=5": "--n_kv_head=5: must divide 2",
    "--share=2-1": "--share=2-1: give spans in increasing order",
    "--share=0-9": "--share=0-9: the layers of this model are 0 to 2",
    "--share=0-1,1-2": "--share=0-1,1-2: give spans in increasing order",
    "--share=x": "--share=x: give spans in increasing order",
    "--share_kind=both": "--share_kind: both: must be weights or kv",
    "--dropout=1": "--dropout=1.0: must be",
    "--dropout=-1": "-1 is not a number from 0.0 up",
    "--learning_rate=nan": "nan is not a number",
    "--max_iters=-1": "-1 is not a number from 0 up",
    "--max_iters=1.5": "invalid int value",
    "--gradient_accumulation_steps=3": "must be a multiple of processes",
    "--vocab_size=100": "--vocab_size=100: must be at least 256",
    "--text=none.txt": "error: none.txt: No such file",
    "--text=.": ".: Permission denied" if os.name == "nt" else "error: .: Is a directory",
    "--tokenizer=words": "--tokenizer: invalid choice: 'words'",
    "--device=tpu": "--device: tpu is not on this machine",
    "--device=cuda:9": "--device: cuda:9 is not on this machine",
    "--preset=tpu": "--preset: invalid choice: 'tpu'",
    "--dtype=int8": "--dtype: invalid choice: 'int8'",
    "--block_size=100000": "--block_size=100000: the training text has only",
    "--nlayer=4": "unrecognized arguments: --nlayer=4",
    "--n_lay=4": "unrecognized arguments: --n_lay=4",
    "stray": "unrecognized arguments: stray",
    "--resume": "out/full: holds no run to --resume",
    "--init_from=out/none": "out/none: no such model",
    "--seed=-1": "-1 is not a number from 0 up",
    "--beta1=2": "--beta1=2.0: must be below 1",
    "--rope_base=0": "--rope_base=0.0: must be above 0",
}

@pytest.mark.parametrize("flag", WRONG)
def test_a_wrong_flag_gets_one_line_and_status_2_and_leaves_no_folder_and_no_lock(run, text, flag):
    status, _, err = run(train.main, *TINY, f"--text={text}", flag)
    assert status == 2 and WRONG[flag] in err and err.count("\n") == 1
    assert not Path("out").exists()

def test_a_run_is_not_overwritten_unless_told(run, text, trained):
    flags = [*TINY, f"--text={text}"]
    before = weights("out/full")
    status, _, err = run(train.main, *flags, "--seed=2")
    assert status == 2 and "out/full already holds a run" in err and "--overwrite" in err
    assert same(before, weights("out/full"))
    status, _, err = run(train.main, *flags, "--overwrite", "--share=9-9", "--out_dir=out/full")
    assert status == 2 and same(before, weights("out/full")) and not Path("out/full.old").exists()
    for n, old in enumerate(("out/full.old", "out/full.old2")):
        status, out, _ = run(train.main, *flags, "--overwrite", f"--seed={n + 2}")
        assert status == 0 and f"out/full is now {old}" in out
    assert same(before, weights("out/full.old")) and not same(before, weights("out/full.old2"))

def test_a_damaged_checkpoint_and_a_changed_text_are_not_resumed(run, text, tmp_path):
    mine = tmp_path / "mine.txt"
    mine.write_text(text.read_text())
    run(train.main, *TINY, f"--text={mine}", "--out_dir=out/a")
    mine.write_text(text.read_text() * 2)
    status, _, err = run(train.main, "--resume", "--out_dir=out/a", "--data_dir=data")
    assert status == 2 and "the text is not the one" in err
    file = Path("out/a") / STATE
    file.write_bytes(file.read_bytes()[:1000])
    status, _, err = run(train.main, "--resume", "--out_dir=out/a")
    assert status == 2 and "damaged" in err and err.count("\n") == 1

def test_an_output_folder_that_cannot_be_written_is_refused(run, text):
    Path("taken").write_text("a file, not a folder")
    status, _, err = run(train.main, *TINY, f"--text={text}", "--out_dir=taken/run")
    assert status == 2 and "taken" in err and err.count("\n") == 1
    assert Path("taken").read_text() == "a file, not a folder"

def test_a_full_disk_is_reported_and_the_last_checkpoint_kept(run, text, monkeypatch):
    write, written = checkpoint.write_file, []
    def full(path, data):
        written.append(path)
        if sum(Path(p).name == STATE for p in written) > 1:
            raise OSError(28, "No space left on device", str(path))
        write(path, data)
    monkeypatch.setattr(checkpoint, "write_file", full)
    status, _, err = run(train.main, *TINY, f"--text={text}")
    assert status == 2 and "No space left on device" in err and err.count("\n") == 1
    assert stored_step() == 5

def test_models_of_single_steps_are_kept_and_an_untrained_one_can_be_saved(run, text):
    flags = [*TINY, f"--text={text}"]
    assert run(train.main, *flags, "--keep_every=5", "--out_dir=out/a")[0] == 0
    kept = sorted(path.name for path in Path("out/a/steps").iterdir())
    assert kept == ["00000000", "00000005", "00000010", "00000012"]
    assert same(best("out/a/steps/00000012"), weights("out/a"))
    assert run(train.main, *flags, "--max_iters=0", "--out_dir=out/b")[0] == 0
    assert same(best("out/b"), best("out/a/steps/00000000"))
    status, _, _ = run(train.main, *flags, "--init_from=out/b", "--out_dir=out/c")
    assert status == 2                                              # it brings a shape of its own
    flags = [f"--text={text}", "--batch_size=4", "--max_iters=12", "--warmup_iters=2", "--eval_interval=5"]
    run(train.main, *flags, "--data_dir=data", "--device=cpu", "--init_from=out/b", "--out_dir=out/c")
    assert same(weights("out/c"), weights("out/a"))                 # as if it had never been saved

def test_help_names_every_flag_with_its_default(run):
    status, out, _ = run(train.main, "--help")
    names = [field.name for field in fields(train.Settings)]
    assert status == 0 and all(f"--{name} " in out for name in names)
    assert len(re.findall(r"\(default:\s", out)) == len(names) and "None" not in out

@pytest.mark.parametrize("flags, share", [([], "1-3"), (["--share="], ""), (["--share=2-3"], "2-3")])
def test_a_preset_sets_what_was_not_given(run, text, flags, share):
    small = [f"--text={text}", "--vocab_size=300", "--max_iters=0", "--n_hidden=32", "--data_dir=data"]
    status, _, _ = run(train.main, "--preset=tinyshakespeare", *small, "--out_dir=run", *flags)
    config = checkpoint.load("run")[0].config
    assert status == 0 and (config.n_embd, config.n_hidden, config.share) == (160, 32, share)

@pytest.mark.skipif(os.name == "nt", reason="there, torch looks for another compiler")
def test_to_compile_without_a_compiler_is_refused_in_one_line(run, text, monkeypatch, tmp_path):
    from torch._inductor import config
    monkeypatch.setattr(config.cpp, "cxx", (None, "/no/such/compiler"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    torch._dynamo.reset()
    status, _, err = run(train.main, *TINY, f"--text={text}", "--n_layer=1", "--compile")
    assert status == 2 and "--compile: torch.compile needs a C++ compiler" in err and err.count("\n") == 1
    assert not Path("out").exists()

# ---- nothing lost, nothing believed ----

def contents(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}

@pytest.mark.skipif(not hasattr(os, "sysconf"), reason="needs a system that tells its memory")
def test_a_run_that_fails_before_its_first_step_leaves_the_one_that_it_was_to_replace(run, text):
    tiny = [*TINY, f"--text={text}"]
    run(train.main, *tiny, "--keep_every=5")
    before = contents("out/full")
    status, _, err = run(train.main, *tiny, "--overwrite", "--batch_size=4000000")
    assert status == 2 and err.count("\n") == 1 and contents("out/full") == before

def test_a_run_that_fails_later_has_set_the_former_one_aside(run, text):
    tiny = [*TINY, f"--text={text}"]
    run(train.main, *tiny, "--keep_every=5")
    before = contents("out/full")
    status, _, err = run(train.main, *tiny, "--overwrite", "--learning_rate=1e18", "--grad_clip=0")
    assert status == 2 and err.count("\n") == 1 and "nothing was saved yet" in err
    assert {str(path).replace("full.old", "full"): data for path, data in contents("out/full.old").items()} \
        == {str(path): data for path, data in before.items()}

def test_a_run_that_is_replaced_leaves_nothing_in_the_new_one(run, text):
    tiny = [*TINY, f"--text={text}"]
    run(train.main, *tiny, "--keep_every=1")
    Path("out/full/mine.txt").write_text("mine")
    run(train.main, *tiny, "--overwrite", "--keep_every=6", "--max_iters=6", "--seed=2")
    run(train.main, *tiny, "--keep_every=6", "--max_iters=6", "--seed=2", "--out_dir=out/new")
    steps = sorted(path.parent.name for path in Path("out/full/steps").glob("*/config.json"))
    assert steps == ["00000000", "00000006"] and Path("out/full.old/mine.txt").read_text() == "mine"
    assert same(weights("out/full"), weights("out/new")) and log("out/full", "loss") == log("out/new", "loss")

@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json", STATE, "log.jsonl"])
def test_a_folder_that_holds_any_part_of_a_run_is_not_overwritten_unless_told(run, text, file):
    Path("out/full").mkdir(parents=True)
    Path("out/full", file).write_text("mine")
    status, _, err = run(train.main, *TINY, f"--text={text}")
    assert status == 2 and "--overwrite" in err and Path("out/full", file).read_text() == "mine"

def flipped(data, at):
    """Bytes with one bit changed."""
    data = bytearray(data)
    data[at] ^= 4
    return bytes(data)

def change_saved(change):
    def harm(file):
        tensors, state, _ = checkpoint.unpack(file.read_bytes())
        change(state, tensors)
        file.write_bytes(checkpoint.pack(tensors, None, state))
    return harm

def setting(flag):
    return change_saved(lambda state, _: state["settings"].append(flag))

def wrong_optimizer(state, tensors):
    tensors["optimizer.0.exp_avg"] = torch.zeros(3)         # a fused step would write beyond its end

HARMS = {
    "a model": lambda file: file.write_bytes((file.parent / "model.safetensors").read_bytes()),
    "an optimizer of another shape": change_saved(wrong_optimizer),
    "a tensor too few": change_saved(lambda _, tensors: tensors.pop("optimizer.1.step")),
    "a step past the end": change_saved(lambda state, _: state["progress"].update(step=99)),
    "a step before the first": change_saved(lambda state, _: state["progress"].update(step=-1)),
    "no log": change_saved(lambda state, _: state["progress"].update(log=None)),
    "a setting out of range": setting("--log_interval=0"),
    "a setting of another type": setting("--batch_size=x"),
    "a setting that is not known": setting("--more=1"),
    "settings that are not flags": change_saved(lambda state, _: state.update(settings={"seed": 1})),
    "a flipped bit": lambda file: file.write_bytes(flipped(file.read_bytes(), -9)),
}

@pytest.mark.parametrize("name", HARMS)
def test_what_is_no_state_of_a_run_is_not_resumed(run, trained, name):
    file = Path("out/full") / STATE
    HARMS[name](file)
    before = contents("out/full")
    status, _, err = run(train.main, "--resume", "--out_dir=out/full", "--data_dir=data")
    assert status == 2 and STATE in err and err.count("\n") == 1 and contents("out/full") == before

def test_going_on_with_other_threads_is_said_to_change_the_last_bits(run, text, monkeypatch):
    run(train.main, *TINY, f"--text={text}", "--max_iters=4", "--eval_interval=4")
    assert "last bit" not in run(train.main, "--resume", "--out_dir=out/full", "--data_dir=data")[1]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    out = run(train.main, "--resume", "--out_dir=out/full", "--data_dir=data")[1]
    assert "begun with 1 threads" in out and "now 7 threads" in out and "last bit" in out

@pytest.mark.skipif(os.name == "nt", reason="Windows reports a closed pipe as it likes")
def test_a_reader_that_leaves_stops_the_run_as_ctrl_c_does(text, tmp_path):
    process = start(tmp_path, f"--text={text}")
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert (process.wait(timeout=60), err) == (130, "") and stored_step(tmp_path) >= 20

@pytest.mark.skipif(os.name == "nt", reason="needs signals between processes")
def test_ctrl_c_while_torch_is_imported_is_quiet(tmp_path):
    command = [sys.executable, "-X", "importtime", ROOT / "train.py"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if line.rstrip().endswith("torch._utils"):          # torch is half there
            process.send_signal(signal.SIGINT)
            break
    rest = [line for line in process.stderr if not line.startswith("import time:")]
    process.stderr.close()
    assert process.wait(timeout=60) in (-signal.SIGINT, 130) and rest == []

# ---- moved, shared, disturbed ----

def test_a_run_that_is_moved_still_knows_its_text_and_goes_on(run, text, tmp_path):
    flags = [*TINY[:-1], f"--text={text}", "--data_dir=one/data", "--out_dir=one/out/full"]
    run(train.main, *flags)
    before = best("one/out/full")
    os.rename("one", "two")
    for file in Path("two/out/full").glob("*.json"):
        assert str(tmp_path) not in file.read_text(encoding="utf-8")
    assert same(best("two/out/full"), before)
    status, _, err = run(sample.main, "two/out/full", "--share=1-2", "--max_new_tokens=3", "--csv=bill.csv")
    assert status == 0 and "not known" not in err
    assert all(row["val_bpb"] for row in bill("bill.csv"))      # its loss was measured
    more = ["--resume", "--out_dir=two/out/full", "--data_dir=two/data"]
    assert run(train.main, *more)[0] == 0

def test_a_text_that_moved_can_be_named_and_another_is_refused(run, text, tmp_path):
    (tmp_path / "a.txt").write_text(text.read_text())
    run(train.main, *TINY, "--text=a.txt")
    os.rename("a.txt", "b.txt")
    assert run(train.main, "--resume", "--out_dir=out/full", "--data_dir=data")[0] == 2
    assert run(train.main, "--resume", "--out_dir=out/full", "--data_dir=data", "--text=b.txt")[0] == 0
    (tmp_path / "b.txt").write_text(text.read_text()[::-1])
    status, _, err = run(train.main, "--resume", "--out_dir=out/full", "--data_dir=data", "--text=b.txt")
    assert status == 2 and "--text=FILE" in err

def test_tokens_of_another_tokenizer_are_not_taken_for_a_models_own(run, text, trained):
    where = next(Path("data").iterdir())
    run(train.main, *TINY, f"--text={text}", "--vocab_size=280", "--data_dir=other", "--out_dir=out/b")
    other = next(Path("other").iterdir())
    for path in other.iterdir():
        (where / path.name).write_bytes(path.read_bytes())
    status, out, err = run(sample.main, "out/full", "--share=1-2", "--max_new_tokens=3", "--csv=bill.csv")
    assert status == 0 and "not known" in err
    assert bill("bill.csv")[1]["val_bpb"] == ""

def test_a_run_is_locked_before_its_state_is_read(run, text, monkeypatch):
    run(train.main, *TINY, f"--text={text}", "--max_iters=4", "--eval_interval=2")
    before = contents("out")
    monkeypatch.setattr("minisa.kit.run.read_state", None)      # it must not come to this
    with lock("out/full"):
        status, _, err = run(train.main, "--resume", "--out_dir=out/full", "--data_dir=data")
    assert status == 2 and "another program is writing there" in err and contents("out") == before

def train_as(rank, port, flags):
    """What a process of torchrun does; its errors go to a file."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", RANK=str(rank))
    os.dup2(os.open(f"errors{rank}", os.O_WRONLY | os.O_CREAT), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    sys.argv = ["train.py", *flags]
    command(train.main)

@pytest.mark.parametrize("flags", [["--resume", "--out_dir=out/full"], ["--share=9-12"]], ids=str)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that start as copies of this one")
def test_what_the_first_process_refuses_ends_the_others_quietly(text, tmp_path, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    copies = multiprocessing.get_context("fork")
    flags = [*TINY, f"--text={text}", *flags]
    with lock("out/full"):
        both = [copies.Process(target=train_as, args=(rank, port, flags)) for rank in range(2)]
        for process in both:
            process.start()
        for process in both:
            process.join(timeout=60)
    assert all(process.exitcode for process in both)
    errors = "".join(Path(f"errors{rank}").read_text() for rank in range(2))
    ours = [line for line in errors.splitlines() if line.startswith("train.py: error: ")]
    assert len(set(ours)) == 1
    assert "Connection closed" not in errors and 'File "' + str(ROOT) not in errors

def test_what_a_killed_run_left_half_written_goes(run, text):
    run(train.main, *TINY, f"--text={text}", "--max_iters=4", "--eval_interval=2")
    left = [Path("out/full") / f"{name}.0123abcd" for name in (STATE, "model.safetensors", LOG)]
    mine = [Path("out/full") / name for name in (f"{STATE}.original", "notes.0123abcd")]
    for path in left + mine:
        path.write_bytes(b"half")
    half = [Path("out/full/steps/.00000007.0123abcd"), Path("out/.full.0123abcd")]      # folders
    for folder in half:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    run(train.main, "--resume", "--out_dir=out/full", "--data_dir=data")
    assert not any(path.exists() for path in left + half) and all(path.exists() for path in mine)

def test_a_full_disk_under_what_is_printed_saves_the_run(run, text, monkeypatch):
    printed = []
    def full(*words, **more):
        printed.append(words)
        if len(printed) == 4:                               # of the run, step 3, an evaluation, step 6
            raise OSError(28, "No space left on device")
    monkeypatch.setattr("minisa.kit.run.print", full, raising=False)
    monkeypatch.setattr("minisa.kit.run.silence", lambda: None)
    assert run(train.main, *TINY, f"--text={text}")[0] == 130 and stored_step() == 6

def test_a_disk_that_is_full_from_the_start_is_no_traceback(text, tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    command = [sys.executable, ROOT / "train.py", *TINY, f"--text={text}", "--max_iters=100000"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True)
    assert "Traceback" not in done.stderr and done.returncode in (2, 130)

@pytest.mark.parametrize("rank, world", [("abc", "1"), ("0", "0"), ("2", "2"), ("-1", "2")])
def test_what_torchrun_does_not_set_is_refused(run, text, monkeypatch, rank, world):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    status, _, err = run(train.main, *TINY, f"--text={text}")
    assert status == 2 and "torchrun" in err and err.count("\n") == 1

@pytest.mark.skipif(not hasattr(os, "sysconf"), reason="needs a system that tells its memory")
def test_attention_weights_that_do_not_fit_into_memory_are_refused(run, text):
    status, _, err = run(train.main, *TINY, f"--text={text}", "--block_size=38000", "--n_layer=12",
                         "--n_head=8", "--batch_size=8", "--share=1-11")
    assert status == 2 and "--block_size=38000" in err and err.count("\n") == 1
