"""Models come back the same, are written all or nothing, derive from others, and run nothing."""

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import minisa
from minisa import checkpoint
from minisa.model import GPT, GPTConfig
from minisa.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_tokens([bytes([b]) for b in range(256)])
IDX = torch.randint(256, (2, 10), generator=torch.Generator().manual_seed(1))
INFO = {"step": 7, "val_loss": 3.0, "val_bpb": 2.5, "data": None, "seconds": 1.0}

def make(**mode):
    torch.manual_seed(0)
    config = GPTConfig(block_size=16, vocab_size=256, n_layer=4, n_head=4, n_kv_head=2, n_embd=32, **mode)
    return GPT(config).eval()

@pytest.fixture
def folder(tmp_path):
    checkpoint.save(tmp_path / "run" / "model.pt", make(), TOKENIZER, INFO)
    return tmp_path / "run"

def test_a_model_comes_back_the_same(folder):
    model, tokenizer, info = minisa.load(folder)
    same = make().state_dict()
    assert all(torch.equal(t, same[name]) for name, t in model.state_dict().items())
    assert not model.training
    assert torch.equal(model(IDX)[0], make()(IDX)[0])
    assert info == INFO and tokenizer.decode(tokenizer.encode("To be")) == "To be"

@pytest.mark.parametrize("kind", ["weights", "kv"])
def test_full_weights_can_be_loaded_to_share(folder, kind):
    model, _, info = minisa.load(folder, share="1-3", share_kind=kind)
    full = make()
    for layer, (old, new) in enumerate(zip(full.blocks, model.blocks)):
        rows = dict(zip("qkv", old.attn.qkv.weight.split([32, 16, 16])))
        made = "qkv" if layer < 2 else {"weights": "v", "kv": "q"}[kind]
        assert torch.equal(torch.cat([rows[name] for name in made]), new.attn.qkv.weight)
        assert torch.equal(old.mlp.down.weight, new.mlp.down.weight)
    assert info["val_bpb"] is None and info["step"] == 7        # that loss was without sharing

def test_sharing_uses_the_same_memory():
    model = make()
    shared = checkpoint.reconfigure(model, share="1-3")
    assert shared.embed.weight.data_ptr() == model.embed.weight.data_ptr()
    assert shared.blocks[0].mlp.down.weight.data_ptr() == model.blocks[0].mlp.down.weight.data_ptr()

@pytest.mark.parametrize("other", [dict(share=""), dict(share="1-2"), dict(share="1-3", share_kind="kv")])
def test_weights_trained_to_share_do_not_load_into_a_model_that_shares_less_or_otherwise(other):
    with pytest.raises(ValueError, match="--share=.*trained with --share=1-3"):
        checkpoint.reconfigure(make(share="1-3"), **other)

def derived(folder, change):
    """A model derived from the one in folder: shared, and a tensor changed."""
    parent, _, info = minisa.load(folder)
    model = checkpoint.reconfigure(parent, share="2-3")
    if change:
        model.blocks[3].attn.out.weight = torch.nn.Parameter(model.blocks[3].attn.out.weight + change)
    checkpoint.derive(folder.parent / "small", model, parent, str(folder), info)
    return model

def test_a_derived_model_holds_what_differs_and_comes_back_the_same(folder, monkeypatch):
    model = derived(folder, 0.5)
    stored = checkpoint.read(folder.parent / "small" / "model.pt")["model"]
    assert sorted(stored) == ["blocks.3.attn.out.weight", "blocks.3.attn.qkv.weight"]
    monkeypatch.chdir("/")                                      # the parent is found from anywhere
    again, tokenizer, info = minisa.load(folder.parent / "small")
    assert torch.equal(again(IDX)[0], model(IDX)[0]) and again.config == model.config
    assert info["val_loss"] is None and info["step"] == 7 and tokenizer.vocab_size == 256

def test_a_parent_that_changed_or_is_missing_is_refused_by_name(folder):
    derived(folder, 0.5)
    checkpoint.save(folder / "model.pt", make(), TOKENIZER, {**INFO, "step": 8})
    with pytest.raises(ValueError, match="small/model.pt: was derived from .*run.*, which has changed since"):
        minisa.load(folder.parent / "small")
    (folder / "model.pt").unlink()
    with pytest.raises(ValueError, match="small/model.pt: was derived from .*run.*, which is missing"):
        minisa.load(folder.parent / "small")

def test_a_change_that_nobody_knows_is_refused(folder):
    state = checkpoint.read(folder / "model.pt")
    for name in ("none", "os.path", "common"):
        torch.save({**state, "changes": [{"by": name, "settings": {}}]}, folder / "model.pt")
        with pytest.raises(ValueError, match="model.pt"):
            minisa.load(folder)

def test_a_missing_model_is_named(tmp_path):
    with pytest.raises(ValueError, match="out/none.*no such model"):
        minisa.load(tmp_path / "out/none")

HARMS = [lambda raw: raw[:len(raw) // 2], lambda raw: b"", lambda raw: b"not a checkpoint",
         lambda raw: raw[:-30], lambda raw: pickle.dumps([1, 2]), lambda raw: bytes(300) + raw[300:]]

@pytest.mark.parametrize("harm", HARMS, ids=range(len(HARMS)))
def test_a_damaged_checkpoint_is_refused_in_one_line(folder, harm):
    (folder / "model.pt").write_bytes(harm((folder / "model.pt").read_bytes()))
    with pytest.raises(ValueError, match="model.pt: damaged") as error:
        minisa.load(folder)
    assert "\n" not in str(error.value)

def test_other_peoples_files_are_refused(tmp_path):
    torch.save({"weights": torch.zeros(3)}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="no checkpoint of minisa, it lacks"):
        minisa.load(tmp_path)

def test_nothing_in_a_checkpoint_is_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "trapped"),)
    torch.save({"config": Trap(), "tokenizer": {}, "model": {}, "info": {}}, tmp_path / "model.pt")
    with pytest.raises(ValueError):
        minisa.load(tmp_path)
    assert not (tmp_path / "trapped").exists()

def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_behind(folder, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")
    before = (folder / "model.pt").read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="model.pt: could not be written .No space left"):
        checkpoint.save(folder / "model.pt", make(), TOKENIZER, INFO)
    assert (folder / "model.pt").read_bytes() == before and os.listdir(folder) == ["model.pt"]

def test_the_package_works_outside_the_checkout_and_loads_without_torchs_compiler(tmp_path):
    root = Path(minisa.__file__).parent
    checkpoint.save(tmp_path / "run" / "model.pt", make(), TOKENIZER, INFO)
    shutil.copytree(root, tmp_path / "site" / "minisa", ignore=shutil.ignore_patterns("__pycache__"))
    code = ("import minisa; from minisa import load; from minisa.files import data_folder; "
            "import minisa.axes.eigen, minisa.lab.scan; print(minisa.__file__, data_folder()); "
            "import sys; load('run'); print('torch._dynamo' in sys.modules)")
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    found = [f"{tmp_path}/site/minisa/__init__.py", f"{tmp_path}/cache/minisa", "False"]
    assert done.stdout.split() == found, done.stderr

def test_a_folder_that_cannot_be_made_is_refused_with_what_to_do(tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(OSError, match="taken/run/model.pt: could not be written .*choose another folder"):
        checkpoint.save(tmp_path / "taken" / "run" / "model.pt", make(), TOKENIZER, INFO)
    assert (tmp_path / "taken").read_text() == "a file"

def change_config(**fields):
    return lambda state: state["config"].update(fields)

def change_tensor(change):
    def harm(state):
        state["model"]["embed.weight"] = change(state["model"]["embed.weight"])
    return harm

def overlapping(state):
    whole = torch.zeros(256 * 32)                           # all tensors are parts of one
    state["model"] = {name: whole[:t.numel()].view(t.shape) for name, t in state["model"].items()}

ODD = {
    "a config with a number for a bool": change_config(tied=1),
    "a config with a bool for a number": change_config(n_layer=True),
    "a billion layers": change_config(n_layer=10**9),
    "2^70 wide": change_config(n_embd=2**70),
    "half a head": change_config(n_head=2.5),
    "a field too many": change_config(more=1),
    "a field too few": lambda state: state["config"].pop("share"),
    "another shape": change_tensor(lambda t: t[:-1]),
    "another type": change_tensor(lambda t: t.double()),
    "one number for all": change_tensor(lambda t: torch.zeros(()).expand(t.shape)),
    "no numbers": change_tensor(lambda t: t.to("meta")),
    "a sparse tensor": change_tensor(lambda t: t.to_sparse()),
    "not a number": change_tensor(lambda t: t * float("nan")),
    "numbers too large": change_tensor(lambda t: torch.full_like(t, 3e38)),
    "no tensor": change_tensor(lambda t: t.tolist()),
    "overlapping tensors": overlapping,
    "a tensor too many": lambda state: state["model"].update(more=torch.zeros(2)),
    "a tensor too few": lambda state: state["model"].pop("embed.weight"),
    "another vocabulary": lambda state: state["tokenizer"]["tokens"].pop(),
    "a loss that is text": lambda state: state["info"].update(val_bpb="good"),
    "a change by nobody": lambda state: state["changes"].append({"by": 3, "settings": {}}),
    "settings that do not fit": lambda state: state["changes"].append({"by": "heads", "settings": {"x": 1}}),
    "a parent without a hash": lambda state: state.update(parent={"source": "x"}),
}

@pytest.mark.parametrize("name", ODD)
def test_what_loads_but_does_not_fit_is_refused_in_one_line(folder, name):
    state = torch.load(folder / "model.pt", weights_only=True)
    ODD[name](state)
    torch.save(state, folder / "model.pt")
    with pytest.raises(ValueError, match="model.pt: ") as error:
        minisa.load(folder)
    assert "\n" not in str(error.value)

def test_no_flipped_bit_changes_a_model_in_silence(folder):
    data, expected = (folder / "model.pt").read_bytes(), minisa.load(folder)[0](IDX)[0]
    for at in range(0, len(data), len(data) // 60):
        (folder / "model.pt").write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1:])
        try:
            assert torch.equal(minisa.load(folder)[0](IDX)[0], expected)    # it was padding
        except ValueError:
            pass

def test_a_matched_head_is_one_of_the_anchors(folder):
    parent, _, info = minisa.load(folder)
    shared = checkpoint.change(checkpoint.reconfigure(parent, share="1-2"), "heads", heads="match")
    shared.blocks[2].attn.source[0] = 7
    checkpoint.derive(folder.parent / "matched", shared, parent, str(folder), info)
    with pytest.raises(ValueError, match="not among 0 to 3"):
        minisa.load(folder.parent / "matched")
