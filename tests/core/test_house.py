"""How the house is built: who may import whom, and how long files, lines and functions may be."""

import ast
import subprocess
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
CORE, LAB = ROOT / "minisa", ["minisa.lab", "minisa.exercises"]
SCRIPTS = ["train", "sample", "data.prepare"]

def git_files(pattern):
    """The files that git tracks, or would: those it does not ignore. Without git (a copy of the
    tree), all files."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", pattern]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        return sorted(ROOT.rglob(pattern))
    return sorted(path for path in map(ROOT.joinpath, listed.stdout.splitlines()) if path.exists())

PYTHON = git_files("*.py")
PRODUCT = [path for path in PYTHON if "tests" not in path.relative_to(ROOT).parts]
names = [str(path.relative_to(ROOT)) for path in PYTHON]

def module(path):
    """minisa/axes/heads.py → minisa.axes.heads; minisa/__init__.py → minisa."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")

def imports(path, inside_functions=True):
    """The names that a file imports, as minisa.model or minisa.model.GPT."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = ast.walk(tree) if inside_functions else tree.body
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are written in full"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)

def within(name, packages):
    return any(f"{name}.".startswith(f"{package}.") for package in packages)

FLOORS = {"minisa": ["minisa.axes", *LAB, *SCRIPTS], "minisa/axes": [*LAB, *SCRIPTS],
          "minisa/lab": ["minisa.exercises", *SCRIPTS], "minisa/exercises": SCRIPTS}

@pytest.mark.parametrize("folder", FLOORS)
def test_imports_go_from_axes_and_lab_to_the_core_and_never_back(folder):
    for path in (ROOT / folder).glob("*.py"):
        wrong = [name for name in imports(path) if within(name, FLOORS[folder])]
        assert not wrong, f"{path.relative_to(ROOT)} must not import {wrong}"
