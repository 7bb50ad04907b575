"""Kills at random moments of training, replacing a run, chatting and compressing.

    python tests/kill.py 200                so many kills

Afterwards every file must be whole, a run must continue to the very same weights, a former run must be
there, if under another name, and a conversation must go on.
"""

import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import fuzz
from fuzz import CHAT, TINY, checkpoint, must, run, torch

from minisa.kit.run import SAVED

LONG = [*TINY, "--max_iters=12", "--keep_every=3", "--dropout=0.2", "--share=1-2"]

def weights(path):
    """Those of a model's folder, or of the state of a run."""
    path = Path(path)
    model = checkpoint.load(path)[0] if path.is_dir() else checkpoint.read_training(path, SAVED)[0]
    return model.state_dict()

def same(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)

def killed(seconds, *words, stdin=""):
    """Run a command in a new process, and kill it after so many seconds. → whether it was still running"""
    pid = os.fork()
    if not pid:
        run(*words, stdin=stdin)
        os._exit(0)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])

def whole():
    """Every model that is there can be loaded; but for one whose parent is replaced, and folders that are
    not there yet."""
    for path in Path(".").rglob("config.json"):
        unfinished = path.parent.name.startswith(".")
        if "mixed" not in str(path) and not unfinished and path.with_name("model.safetensors").exists():
            checkpoint.load(path.parent)
    for path in Path(".").rglob("train.safetensors"):
        weights(path)

def train(rng):
    was = killed(rng.uniform(0, 0.2), "train", *LONG, "--out_dir=out/new")
    whole()
    resume = ["--resume"] if Path("out/new/train.safetensors").exists() else [*LONG, "--overwrite"]
    must("train", *resume, "--out_dir=out/new", "--data_dir=data")
    assert same("out/new/train.safetensors", "../whole/train.safetensors") and same("out/new", "../whole")
    assert not [*Path("out/new").rglob(".*")]                   # nor is anything half written left
    return was

def overwrite(rng):
    before = fuzz.files()
    was = killed(rng.uniform(0, 0.2), "train", *LONG, "--out_dir=out/full", "--overwrite")
    whole()
    after, former = fuzz.files(), "out/full"
    if Path("out/full.old").exists():
        former = "out/full.old"
        again = ["--resume"] if Path("out/full/train.safetensors").exists() else [*LONG, "--overwrite"]
        must("train", *again, "--out_dir=out/full", "--data_dir=data")
        assert same("out/full/train.safetensors", "../whole/train.safetensors")
        assert same("out/full", "../whole")
    for path, content in before.items():
        if path.startswith("out/full/"):
            assert after[path.replace("out/full", former)] == content
    return was

def talk(rng):
    was = killed(rng.uniform(0, 0.08), "chat", *CHAT, stdin="And now?\nWhy?\n" * 3)
    status, out, err = run("chat", *CHAT, stdin="Go on\n")
    assert (status, err) == (0, "") and "continuing a conversation" in out, (out, err)
    return was

def compress(rng):
    words = rng.choice([("heads", "out/full", "--share=1-2", "--heads=mix", "--refit"),
                        ("eigen", "out/full", "--error=0.1"), ("lowrank", "out/full", "--share=1-2")])
    was = killed(rng.uniform(0, 0.06), *words, "--out=out/new")
    whole()
    if Path("out/new").exists():                                # it is there whole, or not at all
        words = "heads", "out/full", "--share=1-2"
        shutil.rmtree("out/new")
    must(*words, "--out=out/new")
    checkpoint.load("out/new")
    assert not [path for path in Path("out").glob(".new.*") if path.suffix != ".lock"]
    return was

def main():
    times, rng, found = int(sys.argv[1]), random.Random(0), Counter()
    with tempfile.TemporaryDirectory() as folder:
        world = Path(folder) / "world"
        world.mkdir()
        os.chdir(world)
        fuzz.make_world()
        must("train", *LONG, "--out_dir=../whole")
        while found.total() < times:
            os.chdir(folder)
            shutil.rmtree("case", ignore_errors=True)
            shutil.copytree("world", "case")
            os.chdir("case")
            work = rng.choice([train, overwrite, talk, compress])
            found[work.__name__] += work(rng)                   # not if it had ended already
        os.chdir(fuzz.ROOT)
    print(f"{times} kills, nothing lost: {dict(found)}")

if __name__ == "__main__":
    main()
