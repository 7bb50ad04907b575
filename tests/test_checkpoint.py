"""Checkpoints come back the same, are written all or nothing, and run nothing."""

import os
import pickle

import pytest
import torch

from minisa import checkpoint
from minisa.model import GPT, GPTConfig
from minisa.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_tokens([bytes([b]) for b in range(256)])


def make(**mode):
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=16, vocab_size=256, n_layer=4, n_head=4, n_embd=32, **mode)).eval()


@pytest.fixture
def run(tmp_path):
    checkpoint.save(tmp_path / "model.pt", make(), TOKENIZER, {"step": 7, "val_bpb": 2.5})
    return tmp_path


def test_a_run_comes_back_the_same(run):
    model, tokenizer, info = checkpoint.load(run)
    idx = torch.tensor([tokenizer.encode("To be")])
    same = make()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), same.state_dict().values(), strict=True))
    torch.testing.assert_close(model(idx)[0], same(idx)[0])
    assert info == {"step": 7, "val_bpb": 2.5} and tokenizer.decode(idx[0].tolist()) == "To be" and not model.training


def test_full_weights_can_be_loaded_to_share(run):
    model, _, _ = checkpoint.load(run, share="1-3")
    assert model.config.share == "1-3" and model.blocks[2].attn.made == (0, 0, 32)
    assert checkpoint.load(run, share="1-3", share_kind="kv")[0].blocks[2].attn.made == (32, 0, 0)
    checkpoint.save(run / "model.pt", model, TOKENIZER, {})
    with pytest.raises(ValueError, match="--share=: layer 2 was trained with --share=1-3"):
        checkpoint.load(run, share="")


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(ValueError, match="out/none.*no such checkpoint"):
        checkpoint.load(tmp_path / "out/none")


@pytest.mark.parametrize("harm", [lambda raw: raw[:len(raw) // 2], lambda raw: b"", lambda raw: b"not a checkpoint", lambda raw: raw[:-30],
                                  lambda raw: pickle.dumps([1, 2]), lambda raw: bytes(300) + raw[300:]], ids=str)
def test_a_damaged_checkpoint_is_refused_in_one_line(run, harm):
    (run / "model.pt").write_bytes(harm((run / "model.pt").read_bytes()))
    with pytest.raises(ValueError, match="model.pt: damaged") as error:
        checkpoint.load(run)
    assert "\n" not in str(error.value)


def test_other_peoples_files_are_refused(tmp_path):
    torch.save({"weights": torch.zeros(3)}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="no checkpoint of minisa"):
        checkpoint.load(tmp_path)


def test_nothing_in_a_checkpoint_is_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "trapped"),)
    torch.save({"config": Trap(), "tokenizer": {}, "model": {}, "info": {}}, tmp_path / "model.pt")
    with pytest.raises(ValueError):
        checkpoint.load(tmp_path)
    assert not (tmp_path / "trapped").exists()


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_behind(run, monkeypatch):
    before = (run / "model.pt").read_bytes()
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="model.pt: could not be written .No space left"):
        checkpoint.save(run / "model.pt", make(), TOKENIZER, {"step": 8})
    assert (run / "model.pt").read_bytes() == before and os.listdir(run) == ["model.pt"]
