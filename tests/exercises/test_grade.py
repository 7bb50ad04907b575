"""Grading in a process of its own: what hangs, ends, prints or cheats costs its own points. The command."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from minisa.exercises import check, grade
from minisa.exercises.__main__ import main

ROOT = Path(__file__).resolve().parents[2]

ODD = """
import os, sys, time
def attention_row(q, k, t): os._exit(0)
def reuse_layer(P, x, W_v, W_out): time.sleep(1000)
def decode(values, P, v): raise SystemExit
def roles(share, n_layer): print("noise"); input()
def cache_bytes(*given): os.fork()
def decode_flops(*given):
    for fd in range(3, 9):
        try: os.write(fd, b'no JSON\\n')
        except OSError: pass
def similarity(P, Q): return None
def best_source(P, anchor): os.kill(os.getppid(), 9)
def mixture(P, w):
    y = 0
    return 1 / y
def refit(Z, Y, W, ridge): return refit(Z, Y, W, ridge)
def bits_per_byte(nats, tokens, text):
    import math
    return nats * tokens / math.log(2) / len(text.encode())
"""

@pytest.fixture
def light(monkeypatch, tmp_path):
    """Answers that need no tensors start at once: what stands in for torch is there at once."""
    (tmp_path / "light").mkdir()
    (tmp_path / "light/torch.py").write_text("""float32 = None
def set_num_threads(n): pass
class tensor:
    def __init__(self, numbers, dtype): self.numbers = numbers
    def view(self, shape): return self
""")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "light"))

def graded(tmp_path, text, **more):
    file = tmp_path / "mine.py"
    file.write_text(text)
    return {result.name: result for result in grade.grade_file(file, quiet=True, **more)}

def test_a_right_file_has_all_points_and_is_imported_once(right, tmp_path):
    mark = f"open({str(tmp_path / 'imported')!r}, 'a').write('x')\n"
    results = graded(tmp_path, mark + right.read_text())
    assert sum(result.points for result in results.values()) == 100
    assert list(results) == check.NAMES and (tmp_path / "imported").read_text() == "x"

def test_what_ends_hangs_crashes_or_prints_costs_only_its_own_points(light, tmp_path, monkeypatch):
    monkeypatch.setattr(grade, "SECONDS", 1)
    results = graded(tmp_path, ODD)
    assert results.pop("bits_per_byte").points == 6
    assert {result.points for result in results.values()} == {0}
    said = {"attention_row": "it ended Python", "reuse_layer": "more than 1 seconds", "decode": "SystemExit",
            "roles": "EOFError",
            "cache_bytes": "must not start or stop programs (os.fork) in line 7 of mine.py",
            "decode_flops": "wrote into the grader's pipe", "similarity": "got None",
            "best_source": "(os.kill)",
            "mixture": "ZeroDivisionError: division by zero in line 16 of mine.py: "
            "return 1 / y", "refit": "RecursionError", "keep": "not answered yet"}
    for name, why in said.items():
        assert why in results[name].wrong, name
    assert all("\n" not in result.wrong for result in results.values())

@pytest.mark.parametrize("text, why", [
    ("def attention_row(:", "SyntaxError: invalid syntax in line 1 of mine.py: def attention_row(:"),
    ("import time\ntime.sleep(1000)", "took more than 1 seconds"),
    ("import os\nos._exit(0)", "it ended Python"),
    ("x = 1\nimport none_such", "No module named 'none_such' in line 2 of mine.py: import none_such")],
    ids=["syntax", "hangs", "exits", "import"])
def test_a_file_that_does_not_run_has_no_points_and_says_why_once(text, why, light, tmp_path, monkeypatch):
    monkeypatch.setattr(grade, "SECONDS", 1)
    results = graded(tmp_path, text, only="mixture")
    assert results["mixture"].points == 0 and why in results["mixture"].wrong

# ---- cheats ----

CHEATS = {
    "the caller's frame": """
        import sys
        frame = sys._getframe()
        while frame := frame.f_back:
            for value in frame.f_locals.values():
                if hasattr(value, "expected"): return value.expected
            assert "expected" not in frame.f_locals and "case" not in frame.f_locals""",
    "an object in memory": """
        import gc
        return [o.expected for o in gc.get_objects() if type(o).__name__ == "Case"][0]""",
    "a module in memory": """
        import sys
        assert any(name.startswith("minisa") for name in sys.modules)""",
    "minisa's model": "from minisa.model import GPT",
    "an axis": "import importlib; importlib.import_module('minisa.axes.heads')",
    "the reference solutions": "from minisa.exercises import solutions; return solutions.mixture(P, w)",
    "the file of the cases": f"return exec(open({str(ROOT / 'minisa/exercises/check.py')!r}).read())",
    "a link to it": f"""
        import os, tempfile
        link = tempfile.mktemp()
        os.symlink({str(ROOT / 'minisa/exercises/check.py')!r}, link)
        return open(link).read()""",
    "another program": "import subprocess; subprocess.run(['python', '-c', ''])",
    "overwriting the grader": f"open({str(ROOT / 'minisa/exercises/none.py')!r}, 'w')",
    "a result that agrees with all": """
        class Same(float):
            shape = tolist = property(lambda self: self)
            def __eq__(self, other): return True
            def __array__(self, *args): return self
        return Same(0)""",
    "code in the result": """
        class Bomb:
            def __reduce__(self): return (exit, ())
        return Bomb()""",
}

def test_no_cheat_has_points(tmp_path):
    names = check.NAMES
    for start in range(0, len(CHEATS), len(names)):
        bodies = list(CHEATS.values())[start:start + len(names)]
        text = "".join(f"def {name}(P=None, w=None, *more):\n        {body}\n"
                       for name, body in zip(names, bodies))
        for name, result in graded(tmp_path, text).items():
            assert result.points == 0, (name, result)
    assert not (ROOT / "minisa/exercises/none.py").exists()

def test_cheats_are_told_that_they_do_not_count(light, tmp_path):
    text = ("def mixture(P, w):\n    from minisa.axes import heads\n"
            f"def keep(r, b):\n    open({str(ROOT / 'minisa/exercises/solutions.py')!r})\n")
    results = graded(tmp_path, text)
    assert "importing minisa does not count as an answer in line 2 of mine.py" in results["mixture"].wrong
    assert "reading solutions.py does not count as an answer in line 4" in results["keep"].wrong

# ---- the command ----

def command(*flags):
    words = [sys.executable, "-m", "minisa.exercises", *flags]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)

def test_the_last_line_says_how_many_of_a_hundred_and_nothing_else_is_printed(right, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("print('noise')\n" + right.read_text().replace("/ math.log(2) / len", "/ len"))
    done = command(f"--answers={file}", "--strict")
    lines = done.stdout.splitlines()
    assert done.returncode == 1 and len(lines) == 13 and lines[-1].split() == ["in", "all", "94", "of", "100"]
    assert "noise" in done.stderr

def test_one_exercise_is_graded_alone_and_its_cases_are_printed(right, run, tmp_path):
    status, out, _ = run(main, f"--answers={right}", "--only=keep", "--json", "--results=r/results.json")
    assert status == 0 and out == (tmp_path / "r/results.json").read_text() + "\n"
    tests = json.loads((tmp_path / "r/results.json").read_text())["tests"]
    assert len(tests) == 2
    assert tests[0] == {"name": "keep: all different", "score": 5, "max_score": 5, "output": "right"}
    status, out, _ = run(main, "--only=keep", "--case=2")
    assert status == 0 and out.startswith("# keep, case 2 (all different): ")
    assert "yours = keep(received, budget)" in out

def test_a_folder_of_files_becomes_a_table_and_results_for_a_course_system(right, run, tmp_path):
    folder = tmp_path / "answers"
    (folder / "folder.py").mkdir(parents=True)
    (folder / "ada.py").write_bytes(right.read_bytes())
    (folder / "bob.py").write_text("def keep(:")
    (folder / "notes.txt").write_text("no answers")
    os.symlink(folder / "none", folder / "gone.py")
    os.symlink(folder / "loop.py", folder / "loop.py")
    status, out, _ = run(main, f"--all={folder}", "--csv=points.csv", "--results=results", "--strict")
    rows = {row["file"]: row for row in csv.DictReader((tmp_path / "points.csv").open())}
    assert status == 1 and list(rows) == ["ada.py", "bob.py", "folder.py", "gone.py", "loop.py"]
    assert rows["ada.py"]["total"] == rows["ada.py"]["of"] == "100" and rows["ada.py"]["wrong"] == ""
    assert rows["ada.py"]["refit"] == "12" and rows["bob.py"]["total"] == rows["gone.py"]["total"] == "0"
    assert rows["loop.py"]["total"] == "0"
    assert "attention_row: bob.py does not run: SyntaxError" in rows["bob.py"]["wrong"]
    tests = json.loads((tmp_path / "results/ada.json").read_text())["tests"]
    assert sum(test["score"] for test in tests) == sum(test["max_score"] for test in tests) == 100

def test_the_reference_solutions_are_written_whole_and_word_for_word(run, tmp_path):
    status, out, _ = run(main, "solutions", "--out=reference.py")
    text = (tmp_path / "reference.py").read_text(encoding="utf-8")
    assert status == 0 and out.startswith("wrote reference.py") and "import minisa" not in text
    for file, start in {"plain": "def shared_attention(", "cost": "def layer_flops(",
                        "axes/heads": "def ridge_regression("}.items():
        source = (ROOT / f"minisa/{file}.py").read_text(encoding="utf-8")
        function = source[source.index(start):].partition("\n\n")[0]
        assert function in text
    status, _, err = run(main, "solutions", f"--out={tmp_path}")
    assert status == 2 and "could not be written" in err and err.count("\n") == 1

def test_the_template_answers_nothing_and_wrong_flags_are_refused(light, run, tmp_path):
    status, out, _ = run(main)
    assert status == 0 and out.count("not answered yet") == 12 and out.split()[-4:] == ["all", "0", "of",
                                                                                        "100"]
    for flags, why in {("--answers=none.py",): "no such file", ("--only=none",): "is none of attention_row",
                       ("--case=1",): "goes with --only", ("--csv=a.csv",): "goes with --all",
                       ("--only=keep", "--case=99"): "has cases 1 to",
                       (f"--all={tmp_path}",): "holds no .py files"}.items():
        status, _, err = run(main, *flags)
        assert status == 2 and why in err and err.count("\n") == 1
