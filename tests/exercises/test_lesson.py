"""Every cell of the notebook runs, at small size, in a copy of the repository."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
LESSON = json.loads((ROOT / "minisa/exercises/lesson.ipynb").read_text(encoding="utf-8"))
CODE = ["".join(cell["source"]) for cell in LESSON["cells"] if cell["cell_type"] == "code"]

# What stands in for subprocess.Popen: it runs a command in this process, so that torch is imported once. The
# last command of the notebook still gets a process of its own.
HERE = """
import contextlib, io, runpy, subprocess, sys

class Here:
    def __init__(self, words, **more):
        _, *sys.argv = words
        self.returncode = 0
        printed = io.TextIOWrapper(io.BytesIO(), write_through=True)
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            try:
                if sys.argv[0] == "-m":
                    del sys.argv[0]
                    runpy.run_module(sys.argv[0], run_name="__main__")
                else:
                    runpy.run_path(sys.argv[0], run_name="__main__")
            except SystemExit as stop:
                self.returncode = stop.code or 0
        self.stdout = printed.buffer.getvalue().decode().splitlines(keepends=True)

    def wait(self):
        return self.returncode

process = subprocess.Popen
subprocess.Popen = lambda words, **more: (process if "minisa.exercises" in words else Here)(words, **more)
"""

def test_the_notebook_is_stored_without_output():
    for cell in LESSON["cells"]:
        assert cell.get("outputs", []) == [] and cell.get("execution_count") is None

@pytest.mark.slow
def test_every_cell_runs(tmp_path, text):
    checkout = tmp_path / "checkout"
    shutil.copytree(ROOT / "minisa", checkout / "minisa", ignore=shutil.ignore_patterns("__pycache__"))
    for script in "train.py", "sample.py":
        shutil.copy(ROOT / script, checkout)
    tiny = ["--n_layer=4", "--n_head=2", "--n_embd=16", "--n_hidden=32", "--block_size=16", "--batch_size=4",
            "--vocab_size=300", "--max_iters=20", "--eval_interval=20", "--device=cpu", f"--text={text}",
            f"--data_dir={tmp_path}/data"]
    env = {**os.environ, "MINISA_TRAIN": " ".join(tiny), "MINISA_LLM": "out/lesson-full"}
    script = HERE + "\n\n".join(f"print('cell', {i})\n{code}" for i, code in enumerate(CODE))
    done = subprocess.run([sys.executable, "-c", script], cwd=checkout / "minisa" / "exercises", env=env,
                          capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    assert f"cell {len(CODE) - 1}" in done.stdout and done.stdout.count("they agree") == 2
    assert "trained to share" in done.stdout and (checkout / "out/lesson-full/attention.png").exists()
    assert "100" in done.stdout and "in all           0 of 100" in done.stdout
