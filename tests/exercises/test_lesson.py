"""Every cell of the notebook runs, at small size, in a copy of the repository."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
LESSON = json.loads((ROOT / "minisa/exercises/lesson.ipynb").read_text(encoding="utf-8"))
CODE = ["".join(cell["source"]) for cell in LESSON["cells"] if cell["cell_type"] == "code"]
TEMPLATE = (ROOT / "minisa/exercises/answers.py").read_text(encoding="utf-8")

# What stands in for subprocess.Popen: it runs a command in this process, so that torch is imported once.
HERE = """
import contextlib, io, runpy, subprocess, sys

class Here:
    def __init__(self, words, **more):
        _, *sys.argv = words
        self.returncode = 0
        printed = io.TextIOWrapper(io.BytesIO(), write_through=True)
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            try:
                runpy.run_path(sys.argv[0], run_name="__main__")
            except SystemExit as stop:
                self.returncode = stop.code or 0
        self.stdout = printed.buffer.getvalue().decode().splitlines(keepends=True)

    def wait(self):
        return self.returncode

subprocess.Popen = Here
"""

def to_write():
    """Yield the name and parameters of each function that the student writes."""
    for code in CODE:
        yield from re.findall(r"^def (\w+)\((.*)\):\n(?:    .*\n)*?    raise NotImplementedError", code, re.M)

def test_the_notebook_is_stored_without_output():
    for cell in LESSON["cells"]:
        assert cell.get("outputs", []) == [] and cell.get("execution_count") is None

def test_the_functions_to_write_are_those_of_the_template():
    functions = list(to_write())
    assert len(functions) == 4
    for name, parameters in functions:
        assert f"def {name}({parameters}):" in TEMPLATE

def test_the_address_to_clone_from_stands_in_one_place():
    assert sum(code.count("REPOSITORY =") for code in CODE) == 1
    assert not re.search(r"github\.com/\w", "\n".join(CODE))

@pytest.mark.slow
def test_every_cell_runs(tmp_path, text):
    checkout = tmp_path / "checkout"
    shutil.copytree(ROOT / "minisa", checkout / "minisa", ignore=shutil.ignore_patterns("__pycache__"))
    for script in "train.py", "sample.py":
        shutil.copy(ROOT / script, checkout)
    tiny = ["--n_layer=4", "--n_head=2", "--n_embd=16", "--n_hidden=32", "--block_size=16", "--batch_size=4",
            "--vocab_size=300", "--max_iters=20", "--eval_interval=20", f"--text={text}",
            f"--data_dir={tmp_path}/data"]
    env = {**os.environ, "MINISA_TRAIN": " ".join(tiny), "MINISA_LLM": "out/lesson-full", "MPLBACKEND": "agg"}
    script = HERE + "\n\n".join(f"print('cell', {i})\n{code}" for i, code in enumerate(CODE))
    done = subprocess.run([sys.executable, "-c", script], cwd=checkout / "minisa" / "exercises", env=env,
                          capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    assert f"cell {len(CODE) - 1}" in done.stdout and done.stdout.count("they agree") == 2
    for name, _ in to_write():
        assert f"{name}: not answered yet" in done.stdout
    assert "trained to share" in done.stdout and "--share=2-3" in done.stdout
    assert (checkout / "mine.py").read_text(encoding="utf-8") == TEMPLATE
