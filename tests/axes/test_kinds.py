"""A kind of sharing is one file: the example of CONTRIBUTING, as minisa/axes/values.py, used everywhere."""

import re
import sys
from pathlib import Path

import plain_reuse
import pytest
import torch
from plain_reuse import close

import minisa
import minisa.axes
import sample
import train
from minisa import cost
from minisa.axes import eigen, heads, lowrank
from minisa.axes.common import fill, rebuilt
from minisa.kit import checkpoint
from minisa.kit.tokenizer import Tokenizer
from minisa.model import GPT, SHARE_KINDS, CrossLayerAttention, GPTConfig, KVCache, sharing_kind

PAGE = Path(__file__).resolve().parent.parent.parent / ".github" / "CONTRIBUTING.md"
TOKENIZER = Tokenizer([bytes([b]) for b in range(256)])
IDX = torch.randint(256, (2, 12), generator=torch.Generator().manual_seed(1))

@pytest.fixture
def axes_folder(tmp_path, monkeypatch):
    """A folder whose files are modules of minisa.axes, as long as the test runs."""
    folder = tmp_path / "axes"
    folder.mkdir()
    monkeypatch.setattr(minisa.axes, "__path__", [*minisa.axes.__path__, str(folder)])
    kinds = dict(SHARE_KINDS)
    yield folder
    forget(folder, kinds)

def forget(folder, kinds):
    """Unload the modules of the folder, as in a new process."""
    for file in folder.glob("*.py"):
        sys.modules.pop(f"minisa.axes.{file.stem}", None)
        vars(minisa.axes).pop(file.stem, None)
    SHARE_KINDS.clear()
    SHARE_KINDS.update(kinds)

@pytest.fixture
def values(axes_folder):
    """minisa/axes/values.py as CONTRIBUTING has it; → a function that forgets it again."""
    page = PAGE.read_text(encoding="utf-8")
    example, = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "values" in block]
    (axes_folder / "values.py").write_text(example, encoding="utf-8")
    kinds = dict(SHARE_KINDS)
    return lambda: forget(axes_folder, kinds)

def make(**mode):
    torch.manual_seed(0)
    mode = dict(share="1-3", share_kind="values") | mode
    model = GPT(GPTConfig(block_size=12, vocab_size=256, n_layer=5, n_head=4, n_kv_head=2, n_embd=32, **mode))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.25)
    return model.eval()

def test_logits_and_gradients_are_those_of_the_plain_formulation(values):
    model = make()
    logits, plain = model(IDX)[0], plain_reuse.logits(model, IDX)
    assert close(logits, plain)
    got, expected = (plain_reuse.gradients(model, each, IDX.flip(0)) for each in (logits, plain))
    assert all(close(got[name], expected[name], 1e-3) for name in got)

@pytest.mark.parametrize("chunks", [[1] * 30, [7, 7, 1, 1, 7, 7]], ids=str)
def test_cached_logits_are_those_of_the_last_block_size_tokens(values, chunks):
    model, idx = make(), IDX.repeat(1, 3)[:, :30]
    cache = KVCache(model, 2, 12)
    widths = [(k.size(3), v.size(3)) for k, v in zip(cache.k, cache.v)]
    assert widths == [(8, 8), (8, 8), (8, 0), (8, 0), (8, 8)]
    with torch.no_grad():
        cached = torch.cat([model(part, cache=cache)[0] for part in idx.split(chunks, dim=1)], 1)
        assert close(cached, plain_reuse.logits(model, idx, window=12))

def test_text_is_the_argmax_of_the_plain_formulation(values):
    model, idx = make(), IDX[:1, :5]
    got = model.generate(idx, 15, temperature=0)
    for _ in range(15):
        idx = torch.cat((idx, plain_reuse.logits(model, idx, window=12)[:, -1:].argmax(-1)), 1)
    assert torch.equal(got, idx)

@pytest.mark.parametrize("context, batch_size", [(1, 1), (12, 1), (7, 3)])
def test_predictions_equal_measurements(values, context, batch_size):
    model = make()
    bill = cost.predict(model, context, batch_size)
    assert bill == cost.measure(model, context, batch_size)
    full = cost.predict(make(share=""), context, batch_size)
    assert full.cache_bytes_per_token - bill.cache_bytes_per_token == 2 * 2 * 8 * 4     # v, in two layers

def test_a_model_is_saved_and_then_loaded_by_a_process_that_has_not_met_the_kind(values, tmp_path):
    info = dict(checkpoint.UNKNOWN)
    checkpoint.save(tmp_path / "shares", make(), TOKENIZER, info)
    checkpoint.save(tmp_path / "full", make(share="", share_kind="weights"), TOKENIZER, info)
    expected = make()(IDX)[0]
    values()
    assert "values" not in SHARE_KINDS
    assert torch.equal(minisa.load(tmp_path / "shares")[0](IDX)[0], expected)
    values()
    zero_shot, full = (minisa.load(tmp_path / "full", *sharing)[0] for sharing in (("1-3", "values"), ()))
    assert close(zero_shot(IDX)[0], plain_reuse.logits(zero_shot, IDX))
    q_and_k = full.blocks[2].attn.qkv.weight[:48]               # H·D + G·D rows
    assert torch.equal(zero_shot.blocks[2].attn.qkv.weight, q_and_k)

def test_commands_take_it_by_name_and_axes_that_cannot_refuse_it(values, run, text):
    flags = ["--n_layer=3", "--n_head=2", "--n_embd=32", "--block_size=16", "--vocab_size=300",
             "--batch_size=4", "--max_iters=2", "--warmup_iters=1", "--device=cpu", f"--text={text}",
             "--data_dir=data"]
    for sharing in ([], ["--share=0-2", "--share_kind=values"]):
        values()
        status, _, err = run(train.main, *flags, *sharing)
        assert status == 0, err
    assert minisa.load("out/values-0-2")[0].config.share_kind == "values"
    bill = ["--temperature=0", "--max_new_tokens=3", "--context=16"]
    for given in (["out/values-0-2"], ["out/full", "--share=1-2", "--share_kind=values"]):
        values()
        status, out, err = run(sample.main, *given, *bill)
        assert status == 0 and "values" in out, err
    for axis, more in ((heads, ["--share=0-2", "--heads=mix"]), (lowrank, []), (eigen, ["--rank=4"])):
        status, _, err = run(axis.main, "out/values-0-2", *more, "--out=x")
        assert status == 2 and err.count("\n") == 1 and "--" in err, err

NEAREST = """
from minisa.model import SHARE_KINDS, CrossLayerAttention, KVAnchor

class Nearest(CrossLayerAttention):
    '''A reuse layer that, once the prompt is read, attends to n of the anchor's tokens only.'''

    def heads(self, h, step, below):
        if h.size(1) > 1:
            return super().heads(h, step, below)
        k, v = below
        size = min(self.n, k.size(2))
        newest = step.cache.key_positions(self.layer).argsort()[-size:].view(1, 1, -1, 1)
        z, _ = super().heads(h, step, (k.take_along_dim(newest, 2), v.take_along_dim(newest, 2)))
        return z, below

    def tokens_read(self, T, S):
        return min(self.n, S) if T == 1 else S

SHARE_KINDS["nearest"] = KVAnchor, CrossLayerAttention

def with_setting(text):
    if not text.isdecimal() or not int(text):
        raise ValueError(f"--share_kind=nearest-{text}: give a number from 1 up, as in nearest-8")
    return KVAnchor, type("Nearest", (Nearest,), {"n": int(text)})
"""

def test_a_kind_may_have_a_setting_of_any_value(axes_folder):
    (axes_folder / "nearest.py").write_text(NEAREST, encoding="utf-8")
    assert [make(share_kind=f"nearest-{n}").blocks[2].attn.n for n in (8, 3)] == [8, 3]
    assert make(share_kind="nearest-8").config.share_kind == "nearest-8"
    with pytest.raises(ValueError, match="^--share_kind=nearest-x: give a number from 1 up"):
        GPTConfig(share_kind="nearest-x")
    assert type(make(share_kind="nearest").blocks[2].attn) is CrossLayerAttention       # without a setting

@pytest.mark.parametrize("n, context, batch_size", [(3, 12, 1), (3, 2, 3), (12, 12, 2), (5, 7, 2)])
def test_a_layer_that_reads_few_tokens_is_billed_for_those(axes_folder, n, context, batch_size):
    (axes_folder / "nearest.py").write_text(NEAREST, encoding="utf-8")
    model = make(share_kind=f"nearest-{n}")
    bill = cost.predict(model, context, batch_size)
    assert bill == cost.measure(model, context, batch_size)
    all_read = cost.predict(make(share_kind="kv"), context, batch_size)
    unread = context - min(n, context)                          # in two layers; H = 4, G = 2, D = 8
    assert all_read.read_bytes - bill.read_bytes == batch_size * 2 * unread * 2 * 2 * 8 * 4
    assert all_read.decode_flops - bill.decode_flops == batch_size * 2 * unread * 4 * 4 * 8
    assert all_read.cache_bytes == bill.cache_bytes and all_read.prefill_flops >= bill.prefill_flops

NOTHING = """
from minisa.model import SHARE_KINDS, Attention

class Lender(Attention):
    def heads(self, h, step, below):
        z, _ = super().heads(h, step, below)
        return z, z

class Nothing(Attention):
    makes = ""

    def heads(self, h, step, below):
        return below, below

SHARE_KINDS["nothing"] = Lender, Nothing
"""

def test_a_layer_may_make_nothing(axes_folder, tmp_path):
    (axes_folder / "nothing.py").write_text(NOTHING, encoding="utf-8")
    model, info = make(share_kind="nothing"), dict(checkpoint.UNKNOWN)
    checkpoint.save(tmp_path / "shares", model, TOKENIZER, info)
    assert torch.equal(minisa.load(tmp_path / "shares")[0](IDX)[0], model(IDX)[0])
    checkpoint.save(tmp_path / "full", make(share="", share_kind="weights"), TOKENIZER, info)
    full, zero_shot = (minisa.load(tmp_path / "full", *sharing)[0] for sharing in ((), ("1-3", "nothing")))
    assert zero_shot.blocks[2].attn.qkv.weight.shape == (0, 32)
    checkpoint.derive(tmp_path / "derived", zero_shot, full, info)
    assert torch.equal(minisa.load(tmp_path / "derived")[0](IDX)[0], zero_shot(IDX)[0])

HALVED = """
from minisa.axes.common import fill, rebuilt

def rebuild(model):
    pass

def halve(model):
    new = rebuilt(model, "halved")
    return fill(new, model, {name: t / 2 for name, t in model.state_dict().items() if "out" in name})
"""

def test_a_change_of_numbers_alone_leaves_a_model_that_can_share(axes_folder):
    (axes_folder / "halved.py").write_text(HALVED, encoding="utf-8")
    from minisa.axes import halved
    new = halved.halve(make(share="", share_kind="weights"))
    shared = checkpoint.reconfigure(new, share="1-3", share_kind="kv")
    assert shared.blocks[2].attn.out.weight is not None and checkpoint.changes(shared)
    assert torch.equal(shared.blocks[2].attn.out.weight, new.blocks[2].attn.out.weight)

WIDER = """
import torch
from minisa.axes.common import fill, rebuilt

def rebuild(model):
    model.config.dropout = 0.5
    model.blocks[0].attn.scale = torch.nn.Parameter(torch.ones(3))
"""

def test_what_fill_lacks_is_named_and_the_original_keeps_its_config(axes_folder):
    (axes_folder / "wider.py").write_text(WIDER, encoding="utf-8")
    model = make(share_kind="kv")
    new = rebuilt(model, "wider")
    assert (model.config.dropout, new.config.dropout) == (0.0, 0.5)
    with pytest.raises(RuntimeError, match="no numbers for blocks.0.attn.scale$"):
        fill(new, model, {})

MISTAKES = {
    "a missing import": (ModuleNotFoundError, "import nowhere\n"),
    "a misspelt name": (NameError, "SHARE_KIND\n"),
    "a misspelt attribute": (AttributeError, "from minisa import model\nmodel.SHARE_KIND\n"),
}

@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_its_file_is_not_blamed_on_the_model(values, axes_folder, name, tmp_path):
    error, text = MISTAKES[name]
    checkpoint.save(tmp_path / "run", make(), TOKENIZER, dict(checkpoint.UNKNOWN))
    values()
    (axes_folder / "values.py").write_text(text, encoding="utf-8")
    with pytest.raises(error):
        minisa.load(tmp_path / "run")

@pytest.mark.parametrize("name", ["", "heads", "os", "values.x", "../axes/heads", "__init__", "a b", "\0"])
def test_any_other_name_is_refused_and_runs_nothing(name, monkeypatch):
    before = set(sys.modules)
    with pytest.raises(ValueError, match="^--share_kind=.*: must be weights or kv"):
        sharing_kind(name)
    assert {module for module in set(sys.modules) - before if not module.startswith("minisa.axes.")} == set()
