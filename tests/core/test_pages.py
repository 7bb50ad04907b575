"""The pages say what is so: lines of files, numbers of tables, commands, links."""

import re
from pathlib import Path

import pytest

from minisa.kit import checkpoint
from minisa.kit.tokenizer import BYTES, Tokenizer
from minisa.model import GPT, GPTConfig

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = [ROOT / "README.md", ROOT / ".github" / "CONTRIBUTING.md", *sorted(ROOT.glob("minisa/*/README.md")),
         *sorted(ROOT.glob("minisa/exercises/teacher/*.md"))]
README = PAGES[0].read_text(encoding="utf-8")

def length(name):
    return len((ROOT / name).read_text(encoding="utf-8").splitlines())

def test_the_reading_order_gives_the_lines_of_each_file():
    rows = re.findall(r"^\| `([\w/]+\.py)` \| (\d+) \|", README, re.MULTILINE)
    assert [name for name, _ in rows] == [
        "minisa/plain.py", "minisa/decode.py", "minisa/model.py", "minisa/cost.py", "train.py", "sample.py"]
    for name, lines in rows:
        assert int(lines) == length(name), name

def test_the_python_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    model = GPT(GPTConfig(block_size=128, vocab_size=256, n_layer=4, n_head=2, n_embd=16))
    checkpoint.save(tmp_path / "out/full", model, Tokenizer(BYTES), checkpoint.UNKNOWN)
    monkeypatch.chdir(tmp_path)
    code, = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    names = {}
    exec(code, names)
    text = capsys.readouterr().out
    assert text.startswith("ROMEO:") and "params=" in text and names["model"].config.share == "1-3"
    assert [tuple(P.shape) for P in names["weights"]] == [(1, 2, 6, 6)] * 4

def test_the_code_on_the_slides_is_that_of_the_core():
    core = "".join((ROOT / f"minisa/{name}.py").read_text(encoding="utf-8") for name in ("plain", "decode"))
    there = {line.split(" #")[0].strip() for line in core.splitlines()}
    slides = (ROOT / "minisa/exercises/teacher/slides.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", slides, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    for line in "".join(blocks).splitlines():
        assert line.split(" #")[0].strip() in there, line

@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere_and_commands_exist(page):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!http)([^)#]+)[^)]*\)|src=\"([^\"]+)\"", text):
        assert (page.parent / (link[0] or link[1])).exists(), link
    for module in re.findall(r"python -m (minisa[\w.]+)", text):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
    assert "@@" not in text and "<!-- measure" not in text
