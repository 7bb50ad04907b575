"""Training from the command line, at a small size: what it saves, how it resumes and stops, and what it refuses."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train
from minisa import checkpoint

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--n_layer=3", "--n_head=2", "--n_embd=16", "--n_hidden=32", "--block_size=16", "--batch_size=4", "--vocab_size=300", "--max_iters=12",
        "--eval_interval=5", "--log_interval=3", "--warmup_iters=2", "--device=cpu", "--data_dir=data"]


def log(folder, key):
    return {line["step"]: line[key] for line in map(json.loads, (Path(folder) / "log.jsonl").read_text().splitlines()) if key in line}


def weights(folder, file="train.pt"):
    return checkpoint.read(Path(folder) / file)["model"]


def same(a, b, tolerance=0.0):
    return a.keys() == b.keys() and all((a[name] - b[name]).abs().max() <= tolerance for name in a)


@pytest.mark.parametrize("flags, folder", [([], "out/full"), (["--share=0-2"], "out/weights-0-2"), (["--share=1-2", "--share_kind=kv", "--n_kv_head=1"], "out/kv-1-2-kv1")])
def test_a_run_is_saved_under_the_name_of_its_mode_and_learns(run, text, flags, folder):
    status, out, err = run(train.main, *TINY, f"--text={text}", *flags, "--max_iters=60", "--learning_rate=1e-2")
    assert (status, err) == (0, "")
    assert "tokens/s" in out and "left" in out and "bits per byte" in out
    losses = log(folder, "val_loss")
    assert list(losses) == [*range(5, 61, 5)] and losses[60] < losses[5] - 0.3
    model, tokenizer, info = checkpoint.load(folder)
    assert info["step"] == min(losses, key=losses.get) and info["val_loss"] == min(losses.values())
    assert log(folder, "loss").keys() == {*range(3, 61, 3)} and tokenizer.vocab_size == model.config.vocab_size == 300


@pytest.mark.parametrize("flags, at, how", [([], 7, "stopped"), (["--dropout=0.3", "--share=0-2"], 7, "stopped"), ([], 4, "stopped"), ([], 7, "killed")], ids=str)
def test_a_stopped_run_goes_on_to_the_very_same_weights(run, text, monkeypatch, flags, at, how):
    """Stopped between evaluations, just before one (step 4 makes step 5), or killed, so that the last evaluation's checkpoint is what is left."""
    flags = [*TINY, f"--text={text}", *flags]
    run(train.main, *flags, "--out_dir=out/whole")

    batch = train.Data.batch
    def stop(self, step, *args, **kwargs):
        if step == at:
            if how == "killed":
                raise KeyboardInterrupt
            signal.raise_signal(signal.SIGINT)
        return batch(self, step, *args, **kwargs)
    with monkeypatch.context() as patch:
        patch.setattr(train.Data, "batch", stop)
        status, out, _ = run(train.main, *flags, "--out_dir=out/stopped")
    assert status == 130 and (how == "killed" or f"stopped at step {at + 1}" in out and "--resume --out_dir=out/stopped" in out)

    status, out, err = run(train.main, "--resume", "--out_dir=out/stopped")
    assert (status, err) == (0, "")
    assert same(weights("out/whole"), weights("out/stopped")) and same(weights("out/whole", "model.pt"), weights("out/stopped", "model.pt"))
    assert log("out/whole", "val_loss") == log("out/stopped", "val_loss")


def start(folder, *flags):
    """A training process, once it has written its first checkpoint."""
    process = subprocess.Popen([sys.executable, ROOT / "train.py", *TINY, "--max_iters=1000000", "--eval_interval=20", *flags], cwd=folder,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    until = time.time() + 60
    while not (folder / "out/full/train.pt").exists() and process.poll() is None and time.time() < until:
        time.sleep(0.05)
    return process


def test_a_killed_run_leaves_a_checkpoint_that_can_be_read_and_gone_on_with(run, text, tmp_path, monkeypatch):
    process = start(tmp_path, f"--text={text}")
    process.kill()
    process.wait()
    at = checkpoint.read(tmp_path / "out/full/train.pt")["info"]["step"]
    assert at >= 20 and at % 20 == 0
    status, _, err = run(train.main, "--resume", "--learning_rate=0.5")
    assert status == 2 and "--learning_rate=0.5: the run in out/full was started with" in err
    batch = train.Data.batch
    def stop_soon(self, step, *args, **kwargs):
        if step == at + 3:
            signal.raise_signal(signal.SIGTERM)
        return batch(self, step, *args, **kwargs)
    monkeypatch.setattr(train.Data, "batch", stop_soon)
    status, out, _ = run(train.main, "--resume")
    assert status == 143 and f"stopped at step {at + 4}" in out and checkpoint.read("out/full/train.pt")["info"]["step"] == at + 4


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_kill_save_and_say_how_to_go_on(text, tmp_path, signum):
    process = start(tmp_path, f"--text={text}")
    process.send_signal(signum)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signum and err == ""
    step = int(out.split("stopped at step ")[1].split()[0])
    assert checkpoint.read(tmp_path / "out/full/train.pt")["info"]["step"] == step
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
    saved = checkpoint.read("out/full/train.pt")
    assert saved["info"]["step"] == 5 and all(w.isfinite().all() for w in saved["model"].values())


def test_micro_batches_and_processes_do_not_change_the_result(run, text, tmp_path):
    run(train.main, *TINY, f"--text={text}", "--out_dir=out/one")
    run(train.main, *TINY, f"--text={text}", "--out_dir=out/four", "--gradient_accumulation_steps=4")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "train.py", *TINY, f"--text={text}", "--out_dir=out/two"],
                          cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for other in ("out/four", "out/two"):
        assert same(weights("out/one"), weights(other), 2e-4), other
        assert log(other, "loss") == pytest.approx(log("out/one", "loss"), abs=1e-4)
        assert log(other, "val_loss") == pytest.approx(log("out/one", "val_loss"), abs=1e-4)


def test_fine_tuning_starts_from_the_weights_of_a_run(run, text):
    run(train.main, *TINY, f"--text={text}", "--max_iters=40", "--learning_rate=1e-2")
    status, out, _ = run(train.main, f"--text={text}", "--data_dir=data", "--device=cpu", "--init_from=out/full", "--share=0-2", "--max_iters=10", "--eval_interval=5",
                         "--learning_rate=0", "--batch_size=4")
    assert status == 0
    tuned = weights("out/weights-0-2-from-full")
    assert torch.equal(tuned["embed.weight"], weights("out/full", "model.pt")["embed.weight"])
    assert tuned["blocks.2.attn.qkv.weight"].shape == (16, 16)
    assert log("out/weights-0-2-from-full", "val_loss")[10] < 5.2           # random weights have ln 300 = 5.7


def test_the_learning_rate_rises_then_falls_along_a_cosine():
    from types import SimpleNamespace
    args = SimpleNamespace(learning_rate=1.0, min_lr=0.1, warmup_iters=10, max_iters=110)
    rates = [train.learning_rate(step, args) for step in range(111)]
    assert rates[0] == 0.1 and rates[9] == rates[10] == 1.0 and rates[60] == pytest.approx(0.55) and rates[110] == pytest.approx(0.1)


WRONG = {
    "--n_layer=abc": "--n_layer: invalid int value: 'abc'", "--n_layer=0": "--n_layer: 0 is not a number from 1 up", "--n_head=3": "--n_embd=16: must be a multiple",
    "--n_kv_head=5": "--n_kv_head=5: must divide", "--share=2-1": "--share=2-1: span 2-1 must name two layers", "--share=0-9": "there is no layer 9", "--share=0-1,1-2": "must start after layer 1",
    "--share=x": "is not a span", "--share_kind=both": "--share_kind=both: must be", "--dropout=1": "--dropout=1.0: must be", "--dropout=-1": "-1 is not a number from 0.0 up",
    "--learning_rate=nan": "nan is not a number", "--learning_rate=-1": "-1 is not a number", "--max_iters=0": "0 is not a number from 1 up", "--max_iters=1.5": "invalid int value",
    "--batch_size=0": "0 is not a number", "--gradient_accumulation_steps=3": "must be a multiple of processes", "--vocab_size=100": "--vocab_size=100: must be at least 256",
    "--text=none.txt": "--text=none.txt: No such file", "--text=.": "--text=.: Is a directory", "--tokenizer=words": "--tokenizer=words: must be bpe or gpt2", "--device=tpu": "--device: tpu is not on this machine",
    "--device=cuda:9": "--device: cuda:9 is not on this machine", "--dtype=int8": "--dtype=int8: must be", "--block_size=100000": "--block_size=100000: the training text has only",
    "--nlayer=4": "unrecognized arguments: --nlayer=4", "--n_lay=4": "unrecognized arguments: --n_lay=4", "stray": "unrecognized arguments: stray", "--resume": "out/full/train.pt: no such checkpoint",
    "--init_from=out/none": "no such checkpoint", "--seed=-1": "-1 is not a number from 0 up", "--beta1=2": "--beta1=2.0: must be below 1", "--rope_base=0": "--rope_base=0.0: must be above 0",
}


@pytest.mark.parametrize("flag", WRONG)
def test_a_wrong_flag_gets_one_line_and_status_2_and_leaves_no_run(run, text, flag):
    status, _, err = run(train.main, *TINY, f"--text={text}", flag)
    assert status == 2 and WRONG[flag] in err and err.count("\n") == 1
    assert not Path("out").exists()


def test_a_run_is_not_overwritten_unless_told(run, text):
    flags = [*TINY, f"--text={text}"]
    run(train.main, *flags)
    before = weights("out/full")
    status, _, err = run(train.main, *flags, "--seed=2")
    assert status == 2 and "out/full already holds a run" in err and "--overwrite" in err and same(before, weights("out/full"))
    status, _, err = run(train.main, *flags, "--overwrite", "--share=9-9")
    assert status == 2 and same(before, weights("out/full"))
    assert run(train.main, *flags, "--overwrite", "--seed=2")[0] == 0 and not same(before, weights("out/full"))


def test_a_damaged_checkpoint_and_a_changed_text_are_not_resumed(run, text, tmp_path):
    mine = tmp_path / "mine.txt"
    mine.write_text(text.read_text())
    run(train.main, *TINY, f"--text={mine}", "--out_dir=out/a")
    mine.write_text(text.read_text() * 2)
    status, _, err = run(train.main, "--resume", "--out_dir=out/a", "--data_dir=data")
    assert status == 2 and "the text is not the one" in err
    file = Path("out/a/train.pt")
    file.write_bytes(file.read_bytes()[:1000])
    status, _, err = run(train.main, "--resume", "--out_dir=out/a")
    assert status == 2 and "damaged" in err and err.count("\n") == 1


def test_an_output_folder_that_cannot_be_written_is_refused(run, text):
    Path("taken").write_text("a file, not a folder")
    status, _, err = run(train.main, *TINY, f"--text={text}", "--out_dir=taken/run")
    assert status == 2 and "taken" in err and err.count("\n") == 1 and Path("taken").read_text() == "a file, not a folder"


def test_a_full_disk_is_reported_and_the_last_checkpoint_kept(run, text, monkeypatch):
    write, written = checkpoint.write_file, []
    def full(path, data):
        written.append(path)
        if sum(Path(p).name == "train.pt" for p in written) > 1:
            raise OSError(28, "No space left on device", str(path))
        write(path, data)
    monkeypatch.setattr(checkpoint, "write_file", full)
    status, _, err = run(train.main, *TINY, f"--text={text}")
    assert status == 2 and "No space left on device" in err and err.count("\n") == 1
    assert checkpoint.read("out/full/train.pt")["info"]["step"] == 5


def test_help_names_every_flag_with_its_default(run):
    status, out, _ = run(train.main, "--help")
    assert status == 0 and all(f"--{name} " in out for name, *_ in train.FLAGS) and out.count("(default") == len(train.FLAGS) + 4
