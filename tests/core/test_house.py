"""How the house is built: who may import whom, and how long files, lines and functions may be.

    python tests/core/test_house.py         how many tokens of code there are, and how many on a line
"""

import ast
import io
import subprocess
import token
import tokenize
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent

def python_files():
    """The .py files that git does not ignore; in a copy without git, those in our folders."""
    if (ROOT / ".git").exists():
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "*.py"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    else:
        paths = [*ROOT.glob("*.py"), *ROOT.glob("data/*.py"), *ROOT.glob("minisa/**/*.py"),
                 *ROOT.glob("tests/**/*.py")]
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
            for path in sorted(paths) if path.exists()}

TEXTS = python_files()                                  # file → its text
TREES = {file: ast.parse(text) for file, text in TEXTS.items()}
PRODUCT = [file for file in TEXTS if not file.startswith("tests/")]
MODULES = {file.removesuffix(".py").removesuffix("/__init__").replace("/", "."): file for file in PRODUCT}

# ---- imports ----

def imports(file):
    """What a file imports, at its top or in a function, as ["torch", "minisa.model.GPT", …]."""
    found = []
    for node in ast.walk(TREES[file]):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: name a module in full, as in from minisa.model import GPT"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found

LAB, SCRIPTS = ("minisa.lab", "minisa.exercises"), ("train", "sample", "data.prepare", "prepare")
ABOVE = {"minisa": ("minisa.kit", "minisa.axes", *LAB, *SCRIPTS),
         "minisa/kit": ("minisa.axes", *LAB, *SCRIPTS), "minisa/axes": (*LAB, *SCRIPTS),
         "minisa/lab": SCRIPTS, "minisa/exercises": SCRIPTS}      # folder → what it must not know of

@pytest.mark.parametrize("file", [file for file in PRODUCT if file.startswith("minisa/") and
                                  file != "minisa/__init__.py"])        # which offers load() to all
def test_imports_point_from_scripts_to_lab_to_axes_to_kit_to_core(file):
    above = tuple(f"{name}." for name in ABOVE[file.rpartition("/")[0]])
    wrong = [name for name in imports(file) if f"{name}.".startswith(above)]
    assert not wrong, f"{file} is below {wrong}"

def test_decoding_imports_numpy_alone():
    assert set(imports("minisa/decode.py")) == {
        "math", "types.SimpleNamespace", "weakref.WeakKeyDictionary", "numpy"}

@pytest.mark.parametrize("file", ["minisa/kit/cli.py", "minisa/kit/files.py", "minisa/plain.py"])
def test_the_lowest_files_import_nothing_of_minisa_but_files(file):
    wrong = [name for name in imports(file) if f"{name}.".startswith("minisa.")]
    wrong = [name for name in wrong if not name.startswith("minisa.kit.files") or file != "minisa/kit/cli.py"]
    assert not wrong, f"{file} imports {wrong}"

def test_no_modules_import_each_other_in_a_circle():
    def module(name):                                   # minisa.model.GPT → minisa.model
        return name if name in MODULES else name.rpartition(".")[0]
    needs = {name: {module(other) for other in imports(file)} & MODULES.keys()
             for name, file in MODULES.items()}
    assert "minisa.model" in needs["minisa.cost"]
    TopologicalSorter(needs).prepare()                  # raises CycleError, which names the circle

# ---- lengths ----

BUDGETS = {"train.py": 2470, "sample.py": 1780, "minisa/plain.py": 910, "minisa/decode.py": 1810,
           "minisa/model.py": 3500, "minisa/cost.py": 1355}    # tokens of code

def docstrings(tree):
    """The numbers of the lines that docstrings fill."""
    lines = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node):
            lines |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines

def code_of(file):
    """The numbers of the lines on which the tokens of a file's code begin, one for each token."""
    code, skip = (token.OP, token.NAME, token.NUMBER, token.STRING), docstrings(TREES[file])
    found = tokenize.generate_tokens(io.StringIO(TEXTS[file]).readline)
    return [part.start[0] for part in found if part.type in code and part.start[0] not in skip]

@pytest.mark.parametrize("file", BUDGETS)
def test_what_is_read_in_one_evening_stays_short(file):
    count = len(code_of(file))
    assert count <= BUDGETS[file], f"{file} has {count} tokens; at most {BUDGETS[file]}"

def test_the_readme_stays_a_lesson():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200

@pytest.mark.parametrize("file", TEXTS)
def test_lines_are_at_most_100_characters_in_core_and_axes_and_110_elsewhere(file):
    core = "plain", "decode", "model", "cost"
    most = 100 if file.startswith("minisa/axes/") or file in [f"minisa/{name}.py" for name in core] else 110
    wide = [number for number, line in enumerate(TEXTS[file].splitlines(), 1) if len(line) > most]
    assert not wide, f"{file}: lines {wide} have more than {most} characters"

FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)

def lines(node):
    return node.end_lineno - node.lineno + 1

@pytest.mark.parametrize("file", PRODUCT)
def test_a_function_fits_on_a_screen(file):
    functions = [node for node in ast.walk(TREES[file]) if isinstance(node, FUNCTION)]
    long = {node.name: lines(node) for node in functions if lines(node) > 50}
    assert not long, f"{file}: {long}, in lines; at most 50"

def attention_classes():
    """The classes of model.py that are an Attention."""
    found = []
    for node in TREES["minisa/model.py"].body:
        if isinstance(node, ast.ClassDef):
            bases = {base.id for base in node.bases if isinstance(base, ast.Name)}
            if node.name == "Attention" or bases & {known.name for known in found}:
                found.append(node)
    return found

CONDITIONS = (ast.If, ast.IfExp, ast.While, ast.Match, ast.BoolOp)

@pytest.mark.parametrize("kind", attention_classes(), ids=[node.name for node in attention_classes()])
def test_an_attention_reads_as_a_formula_not_as_a_tree_of_cases(kind):
    for method in kind.body:
        if isinstance(method, FUNCTION) and method.name in ("forward", "heads"):
            conditions = [node for node in ast.walk(method) if isinstance(node, CONDITIONS)]
            assert lines(method) <= 15 and len(conditions) <= 2

def test_there_is_a_class_of_attention_for_each_role():
    roles = {"Attention", "Anchor", "SharedAttention", "KVAnchor", "CrossLayerAttention"}
    assert roles <= {kind.name for kind in attention_classes()}

if __name__ == "__main__":
    starts = {file: code_of(file) for file in PRODUCT}
    n_tokens, n_lines = sum(map(len, starts.values())), sum(len(set(lines)) for lines in starts.values())
    print(f"{n_tokens:,} tokens of code on {n_lines:,} lines, {n_tokens / n_lines:.1f} a line")
