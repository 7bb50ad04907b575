"""Every cell of the notebook runs, at small size, in a checkout of its own."""

import contextlib
import io
import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
LESSON = json.loads((ROOT / "minisa/exercises/lesson.ipynb").read_text(encoding="utf-8"))
CODE = ["".join(cell["source"]) for cell in LESSON["cells"] if cell["cell_type"] == "code"]
TEMPLATE = (ROOT / "minisa/exercises/answers.py").read_text(encoding="utf-8")

class Here:
    """What stands in for subprocess.Popen: it runs a command in this process, where torch is loaded."""

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

def test_every_cell_runs(tmp_path, text, monkeypatch, capsys):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    checkout = tmp_path / "checkout"
    (checkout / "minisa/exercises").mkdir(parents=True)
    for file in "train.py", "sample.py", "minisa/exercises/answers.py":
        shutil.copy(ROOT / file, checkout / file)
    tiny = ["--n_layer=4", "--n_head=2", "--n_embd=16", "--n_hidden=32", "--block_size=16", "--batch_size=4",
            "--vocab_size=300", "--max_iters=20", "--eval_interval=20", f"--text={text}",
            f"--data_dir={tmp_path}/data"]
    monkeypatch.chdir(checkout / "minisa/exercises")
    monkeypatch.setenv("MINISA_TRAIN", " ".join(tiny))
    monkeypatch.setenv("MINISA_LLM", "out/lesson-full")
    monkeypatch.setattr(subprocess, "Popen", Here)
    monkeypatch.setattr(pyplot, "show", pyplot.close)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", [*sys.argv])
    names = {}
    for code in CODE:
        exec(code, names)
    out, _ = capsys.readouterr()
    assert out.count("they agree") == 2
    for name, _ in to_write():
        assert re.search(rf"^{name} +0 of +\d+   not answered yet$", out, re.M)
    assert "trained to share" in out and "--share=2-3" in out
    assert (checkout / "mine.py").read_text(encoding="utf-8") == TEMPLATE
    assert names["comparable"](names["FULL"], names["SHARED"])
    longer = shutil.copytree(checkout / names["SHARED"], tmp_path / "longer")
    with (longer / "log.jsonl").open("a", encoding="utf-8") as log:
        log.write('{"step": 40}\n')
    assert not names["comparable"](names["FULL"], longer)
    assert not names["comparable"](names["FULL"], tmp_path / "none")
