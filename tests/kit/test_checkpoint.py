"""Models come back the same, are written all or nothing, derive from others, and run nothing."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

import minisa
from minisa.kit import checkpoint
from minisa.kit.tokenizer import Tokenizer
from minisa.model import GPT, GPTConfig

TOKENIZER = Tokenizer([bytes([b]) for b in range(256)])
IDX = torch.randint(256, (2, 10), generator=torch.Generator().manual_seed(1))
INFO = {"step": 7, "val_loss": 3.0, "val_bpb": 2.5, "data": None, "data_digest": None, "seconds": 1.0}

def make(**mode):
    torch.manual_seed(0)
    config = GPTConfig(block_size=16, vocab_size=256, n_layer=4, n_head=4, n_kv_head=2, n_embd=32, **mode)
    return GPT(config).eval()

@pytest.fixture
def folder(tmp_path):
    checkpoint.save(tmp_path / "run", make(), TOKENIZER, INFO)
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
    with pytest.raises(ValueError, match="trained with --share=1-3"):
        checkpoint.reconfigure(make(share="1-3"), **other)

def derived(folder, change, name="small"):
    """A model derived from the one in folder: shared, and a tensor changed."""
    parent, _, info = minisa.load(folder)
    model = checkpoint.reconfigure(parent, share="2-3")
    if change:
        model.blocks[3].attn.out.weight = torch.nn.Parameter(model.blocks[3].attn.out.weight + change)
    checkpoint.derive(folder.parent / name, model, parent, info)
    return model

def stored(folder):
    return safetensors.torch.load_file(folder / "model.safetensors")

def test_a_derived_model_holds_what_differs_and_comes_back_the_same(folder, monkeypatch):
    model, at = derived(folder, 0.5), "model.layers.3.self_attn"
    assert sorted(stored(folder.parent / "small")) == [f"{at}.o_proj.weight", f"{at}.v_proj.weight"]
    monkeypatch.chdir("/")                                      # the parent is found from anywhere
    again, tokenizer, info = minisa.load(folder.parent / "small")
    assert torch.equal(again(IDX)[0], model(IDX)[0]) and again.config == model.config
    assert info["val_loss"] is None and info["step"] == 7 and tokenizer.vocab_size == 256

def test_a_parent_that_changed_or_is_missing_is_refused_by_name(folder):
    derived(folder, 0.5)
    other = make()
    other.norm.weight.data += 1
    checkpoint.save(folder, other, TOKENIZER, INFO)
    with pytest.raises(ValueError, match="small: was derived from .*run, which has changed since"):
        minisa.load(folder.parent / "small")
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match="small: was derived from .*run, which is missing"):
        minisa.load(folder.parent / "small")

def test_what_is_known_of_a_model_may_change_and_its_children_stay(folder):
    model = derived(folder, 0.5)
    checkpoint.save(folder, make(), TOKENIZER, {**INFO, "step": 8, "seconds": 99.0})
    assert torch.equal(minisa.load(folder.parent / "small")[0](IDX)[0], model(IDX)[0])

def test_parent_and_child_can_be_moved_together(folder, tmp_path):
    model = derived(folder, 0.5)
    shutil.copytree(tmp_path, tmp_path / "elsewhere" / "far", ignore=shutil.ignore_patterns("elsewhere"))
    shutil.rmtree(folder)
    assert torch.equal(minisa.load(tmp_path / "elsewhere/far/small")[0](IDX)[0], model(IDX)[0])
    assert str(tmp_path) not in (tmp_path / "elsewhere/far/small/config.json").read_text()

def test_a_parent_that_is_replaced_while_its_child_is_made_makes_the_child_refused(folder):
    parent, _, info = minisa.load(folder)
    other = make()
    other.norm.weight.data += 1
    checkpoint.save(folder, other, TOKENIZER, INFO)             # another program, meanwhile
    checkpoint.derive(folder.parent / "small", checkpoint.reconfigure(parent, share="2-3"), parent, info)
    with pytest.raises(ValueError, match="has changed since"):
        minisa.load(folder.parent / "small")

def test_a_chain_of_derived_models_loads_and_a_longer_one_is_refused(folder, monkeypatch):
    below = folder
    monkeypatch.setattr(checkpoint, "LONGEST_CHAIN", 7)
    for n in range(checkpoint.LONGEST_CHAIN + 1):
        parent, _, info = minisa.load(below)
        below = folder.parent / f"derived-{n}"
        checkpoint.derive(below, checkpoint.reconfigure(parent), parent, info)
        if n == 5:
            assert torch.equal(minisa.load(below)[0](IDX)[0], make()(IDX)[0])
        if n == checkpoint.LONGEST_CHAIN:
            with pytest.raises(ValueError, match="derived in more than"):
                minisa.load(below)

def test_a_model_that_is_its_own_parent_is_refused(folder):
    derived(folder, 0.5)
    small = folder.parent / "small"
    change_json(small, ours(parent={"source": ".", "sha256": "0"}))
    rewrite(small, lambda tensors: None)
    with pytest.raises(ValueError, match="derived in more than"):
        minisa.load(folder.parent / "small")

def test_a_parent_in_a_folder_of_the_name_of_the_download_is_that_folder(folder):
    folder.rename(folder.parent / "smollm2")
    parent, _, info = minisa.load(folder.parent / "smollm2")
    checkpoint.derive(folder.parent / "out", checkpoint.reconfigure(parent, share="2-3"), parent, info)
    checkpoint.derive(folder.parent, checkpoint.reconfigure(parent, share="2-3"), parent, info)
    for child in (folder.parent / "out", folder.parent):
        assert minisa.load(child)[0].config.share == "2-3"

def change_json(folder, change, name="config.json"):
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))

def test_a_change_that_nobody_knows_is_refused(folder):
    for name in ("none", "os.path", "common"):
        change_json(folder, ours(changes=[{"by": name, "settings": {}}]))
        with pytest.raises(ValueError, match="run: damaged"):
            minisa.load(folder)

def test_a_missing_model_is_named(tmp_path):
    for name in ("out/none", "none.gguf"):
        with pytest.raises(ValueError, match=f"{name}.*no such model"):
            minisa.load(tmp_path / name)

HARMS = [lambda raw: raw[:len(raw) // 2], lambda raw: b"", lambda raw: b"not a model", lambda raw: raw[:-30],
         lambda raw: raw + b"x", lambda raw: bytes(300) + raw[300:]]

@pytest.mark.parametrize("harm", HARMS, ids=range(len(HARMS)))
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_damaged_file_is_refused_in_one_line(folder, harm, name):
    (folder / name).write_bytes(harm((folder / name).read_bytes()))
    with pytest.raises(ValueError, match="run: damaged") as error:
        minisa.load(folder)
    assert "\n" not in str(error.value)

@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"{name}: "):
        minisa.load(folder)

def test_a_failed_write_keeps_the_old_files_and_leaves_nothing_behind(folder, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="could not be written .No space left"):
        checkpoint.save(folder, make(share="1-2"), TOKENIZER, INFO)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before

@pytest.mark.parametrize("steps", range(5))
def test_whatever_moment_a_writer_is_killed_at_the_old_or_the_new_model_is_there(folder, monkeypatch, steps):
    write, done = checkpoint.write_file, []
    def killed(path, data):
        if len(done) == steps:
            raise KeyboardInterrupt
        done.append(path)
        write(path, data)
    monkeypatch.setattr(checkpoint, "write_file", killed)
    other = make()
    other.norm.weight.data += 1
    try:
        checkpoint.save(folder, other, TOKENIZER, {**INFO, "step": 8})
    except KeyboardInterrupt:
        assert steps < 4
    model, _, info = minisa.load(folder)
    assert info["step"] == (8 if steps == 4 else 7)
    assert torch.equal(model(IDX)[0], (other if steps == 4 else make())(IDX)[0])

def test_a_new_model_is_there_whole_or_not_at_all(folder, monkeypatch):
    rename = os.rename
    def killed(*names):
        raise KeyboardInterrupt
    monkeypatch.setattr(os, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(folder.parent / "new", make(), TOKENIZER, INFO)
    assert os.listdir(folder.parent) == ["run"]
    monkeypatch.setattr(os, "rename", rename)
    checkpoint.save(folder.parent / "new", make(), TOKENIZER, INFO)
    assert torch.equal(minisa.load(folder.parent / "new")[0](IDX)[0], make()(IDX)[0])

def test_a_reader_beside_a_writer_gets_the_old_or_the_new_model(folder):
    code = ("import torch\nfrom tests_of_a_writer import write\nwrite()")
    script = folder.parent / "tests_of_a_writer.py"
    script.write_text(f"""
import sys, torch
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_checkpoint import INFO, TOKENIZER, checkpoint, make
def write():
    models = [make(), make()]
    models[1].norm.weight.data += 1
    print("ready", flush=True)
    for n in range(10**6):
        checkpoint.save({str(folder)!r}, models[n % 2], TOKENIZER, {{**INFO, "step": n % 2}})
""")
    other = make()
    other.norm.weight.data += 1
    expected = [make()(IDX)[0], other(IDX)[0]]
    writer = subprocess.Popen([sys.executable, "-c", code], cwd=folder.parent, stdout=subprocess.PIPE,
                              env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    try:
        assert writer.stdout.readline() == b"ready\n"
        seen = set()
        for _ in range(20):
            model, _, info = minisa.load(folder)
            seen.add(info["step"])
            assert info["step"] == 7 or torch.equal(model(IDX)[0], expected[info["step"]])
    finally:
        writer.kill()
        writer.wait()
    assert {0, 1} <= seen

def test_the_package_works_outside_the_checkout_and_loads_without_torchs_compiler(tmp_path):
    root = Path(minisa.__file__).parent
    checkpoint.save(tmp_path / "run", make(), TOKENIZER, INFO)
    shutil.copytree(root, tmp_path / "site" / "minisa", ignore=shutil.ignore_patterns("__pycache__"))
    code = ("import minisa; from minisa import load; from minisa.kit.files import data_folder; "
            "import minisa.axes.eigen, minisa.lab.scan; print(minisa.__file__, data_folder()); "
            "import sys; load('run'); print('torch._dynamo' in sys.modules)")
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    found = [str(tmp_path / "site/minisa/__init__.py"), str(tmp_path / "cache/minisa"), "False"]
    assert done.stdout.split() == found, done.stderr

def test_a_folder_that_cannot_be_made_is_refused_with_what_to_do(tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(OSError, match="taken/run: could not be written .*choose another name or folder"):
        checkpoint.save(tmp_path / "taken" / "run", make(), TOKENIZER, INFO)
    assert (tmp_path / "taken").read_text() == "a file"

def field(**fields):
    return lambda config: config.update(fields)

def ours(**fields):
    return lambda config: config["minisa"].update(fields)

ODD = {
    "a number for a bool": field(tie_word_embeddings=1),
    "a bool for a number": field(num_hidden_layers=True),
    "a billion layers": field(num_hidden_layers=10**9),
    "2^70 wide": field(hidden_size=2**70),
    "half a head": field(num_attention_heads=2.5),
    "another width": field(hidden_size=64),
    "an epsilon of text": field(rms_norm_eps="small"),
    "a vocabulary of another size": field(vocab_size=255),
    "an unknown field of ours": ours(more=1),
    "a kind of ours that there is not": ours(share_kind="nonsense"),
    "layers that there are not": ours(share="1-9"),
    "another width of context": field(max_position_embeddings=8),
    "another base": field(rope_theta=500.0),
    "a change by nobody": ours(changes=[{"by": 3, "settings": {}}]),
    "settings that do not fit": ours(changes=[{"by": "heads", "settings": {"x": 1}}]),
    "a parent without a hash": ours(parent={"source": "x"}),
    "no object": lambda config: config.update(minisa=[1]),
}

def is_refused(folder):
    """In one line."""
    with pytest.raises(ValueError, match="run: damaged") as error:
        minisa.load(folder)
    return "\n" not in str(error.value)

@pytest.mark.parametrize("name", ODD)
def test_a_config_that_does_not_fit_is_refused_in_one_line(folder, name):
    change_json(folder, ODD[name])
    assert is_refused(folder)
    if "another" not in name:                                   # it is found even if the hash is right
        rewrite(folder, lambda tensors: None)
        assert is_refused(folder)

def test_a_field_that_is_missing_takes_its_default(folder):
    def without(config):
        for name in ("dropout", "changes", "parent"):
            del config["minisa"][name]
    change_json(folder, without)
    rewrite(folder, lambda tensors: None)
    assert torch.equal(minisa.load(folder)[0](IDX)[0], make()(IDX)[0])

def rewrite(folder, change, info=INFO):
    """Change the tensors of a model, and what is known of it, and say the right hash."""
    tensors = stored(folder)
    change(tensors)
    config = json.loads((folder / "config.json").read_text())
    (folder / "model.safetensors").write_bytes(checkpoint.pack(tensors, config, info))

def test_what_is_known_of_a_model_has_its_types(folder):
    for wrong in ({"val_bpb": "good"}, {"more": 1}, [1]):
        rewrite(folder, lambda tensors: None, {**INFO, **wrong} if isinstance(wrong, dict) else wrong)
        assert is_refused(folder)

EMBED, UP = "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"
TENSORS = {
    "another shape": lambda tensors: tensors.update({EMBED: tensors[EMBED][:-1].clone()}),
    "another type": lambda tensors: tensors.update({EMBED: tensors[EMBED].double()}),
    "not a number": lambda tensors: tensors[UP][2].fill_(float("nan")),
    "a tensor too many": lambda tensors: tensors.update(more=torch.zeros(2)),
    "a tensor too few": lambda tensors: tensors.pop(UP),
    "the key of a layer that shares": lambda tensors: tensors.pop("model.layers.2.self_attn.k_proj.weight"),
}

@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_do_not_fit_are_refused_in_one_line(folder, name):
    rewrite(folder, TENSORS[name])
    assert is_refused(folder)

def test_no_flipped_bit_changes_a_model_in_silence(folder):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    for at in range(0, len(data), len(data) // 60):
        path.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1:])
        with pytest.raises(ValueError, match="run: damaged"):
            minisa.load(folder)

def test_a_matched_head_is_one_of_the_anchors(folder):
    parent, _, info = minisa.load(folder)
    shared = checkpoint.change(checkpoint.reconfigure(parent, share="1-2"), "heads", heads="match")
    shared.blocks[2].attn.source[0] = 7
    checkpoint.derive(folder.parent / "matched", shared, parent, info)
    with pytest.raises(ValueError, match="not among 0 to 3"):
        minisa.load(folder.parent / "matched")
