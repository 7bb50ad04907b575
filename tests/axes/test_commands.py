"""The commands of the axes as a user runs them, from a folder to a folder."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import minisa
from minisa import cost
from minisa.axes import eigen, heads, lowrank
from minisa.axes.eigen import Narrow
from minisa.axes.heads import Matched, Mixed
from minisa.axes.lowrank import Corrected
from minisa.kit import checkpoint
from minisa.kit.data import Data, tokenize
from minisa.model import GPT, SHARE_KINDS, Attention, GPTConfig

ROOT = Path(__file__).resolve().parent.parent.parent
SPANS = "--share=1-2"
COMMANDS = {
    "mix": (heads, [SPANS, "--heads=mix", "--refit"], Mixed),
    "match": (heads, [SPANS, "--heads=match"], Matched),
    "lowrank": (lowrank, [SPANS, "--share_rank=4"], Corrected),
    "eigen": (eigen, ["--rank=6"], Narrow),
}

@pytest.fixture(scope="module")
def full(text, tmp_path_factory):
    """The folder of a model whose heads attend differently; its tokens lie beside it."""
    tmp_path = tmp_path_factory.mktemp("full")
    folder = tokenize(text, vocab_size=300, folder=tmp_path).folder
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=300, block_size=32, n_layer=3, n_head=4, n_kv_head=2, n_embd=64))
    for p in model.parameters():
        p.data *= 6 if p.dim() == 2 else 1
    info = {**checkpoint.UNKNOWN, "data": str(folder)}
    checkpoint.save(tmp_path / "full", model, Data(folder).tokenizer, info)
    return tmp_path / "full"

@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_writes_a_model_that_it_has_changed(run, full, tmp_path, name):
    module, flags, kind = COMMANDS[name]
    status, _, err = run(module.main, full, f"--out={tmp_path}/new", *flags)
    assert status == 0, err
    new, _, _ = minisa.load(tmp_path / "new")
    changed = [block.attn for block in new.blocks if isinstance(block.attn, kind)]
    assert changed
    if name == "mix":
        assert not torch.allclose(changed[0].mix, torch.eye(4))
    if name == "match":
        assert changed[0].source.tolist() != [0, 1, 2, 3]

def test_a_command_runs_in_a_process_of_its_own(full, tmp_path):
    command = [sys.executable, "-m", "minisa.axes.eigen", full, "--rank=6", f"--out={tmp_path}/new"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    was, new = (minisa.load(folder)[0].blocks[1].attn for folder in (full, tmp_path / "new"))
    assert new.widths.k < was.widths.k and new.widths.v < was.widths.v

@pytest.mark.parametrize("name", ["mix", "match"])
def test_what_was_changed_decodes_in_numpy_when_it_is_read_from_its_file(run, full, tmp_path, name):
    module, flags, _ = COMMANDS[name]
    assert run(module.main, full, f"--out={tmp_path}/new", *flags)[0] == 0
    new, _, _ = minisa.load(tmp_path / "new")
    assert minisa.decode.handles(new, minisa.model.KVCache(new, 1, 32))

def test_what_is_calibrated_on_is_the_text_and_the_windows_of_the_flags(run, full, tmp_path, monkeypatch):
    seen, products = [], heads.head_products
    monkeypatch.setattr(heads, "head_products", lambda model, idx: seen.append(idx) or products(model, idx))
    monkeypatch.setattr("minisa.kit.data.data_folder", lambda: tmp_path / "data")
    (tmp_path / "other.txt").write_text("To be, or not to be: that is the question. " * 200)
    for name, flags in {"a": [], "b": ["--text=other.txt", "--windows=6"]}.items():
        status, _, err = run(heads.main, full, SPANS, "--heads=mix", *flags, f"--out={name}")
        assert status == 0, err
    own = Data(minisa.load(full)[2]["data"])
    other = Data(next((tmp_path / "data").glob("other-*")))
    assert len(seen) == 2
    for idx, data, n in zip(seen, (own, other), (12, 6)):
        assert torch.equal(idx, data.windows("train", n, 32)[::3, :-1])         # every third window

def test_what_reads_no_text_takes_none(run, full, tmp_path):
    status, _, err = run(lowrank.main, full, f"--out={tmp_path}/new", SPANS, "--share_rank=4",
                         "--text=any.txt")
    assert status == 2 and "unrecognized arguments: --text=any.txt" in err

# ---- every kind of layer with every axis ----

class SlidingAttention(Attention):
    """A kind that no axis has heard of."""

KINDS = {
    "full": {}, "weights": {"share": "1-2"}, "kv": {"share": "1-2", "share_kind": "kv"},
    "gqa": {"n_kv_head": 1}, "unknown": {"share": "1-2", "share_kind": "sliding"},
}

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", COMMANDS)
def test_an_axis_changes_a_kind_or_refuses_it_in_one_line(run, full, tmp_path, kind, name, monkeypatch):
    monkeypatch.setitem(SHARE_KINDS, "sliding", (SlidingAttention, SlidingAttention))
    _, tokenizer, info = minisa.load(full)
    fields = {"n_kv_head": 2, **KINDS[kind]}
    model = GPT(GPTConfig(vocab_size=300, block_size=32, n_layer=3, n_head=4, n_embd=64, **fields))
    checkpoint.save(tmp_path / "kind", model, tokenizer, info)
    module, flags, _ = COMMANDS[name]
    status, _, err = run(module.main, tmp_path / "kind", f"--out={tmp_path}/new", *flags)
    if status == 0:
        made, _, _ = minisa.load(tmp_path / "new")
        logits, _ = made(torch.arange(20)[None])
        assert logits.isfinite().all()
        assert cost.measure(made, 20) == cost.predict(made, 20)
    else:
        assert status == 2 and len(err.splitlines()) <= 2 and "--" in err and "Traceback" not in err
        assert not (tmp_path / "new/config.json").exists()
    assert not (kind == "unknown" and name == "eigen" and status == 0)
