"""From text to token files, batches and the validation loss."""

import json
import math
import os

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from minisa.kit import files
from minisa.kit.data import Data, data_of, tokenize
from minisa.model import GPT, GPTConfig

def test_the_split_is_nine_tenths_and_the_tokens_come_from_the_first_part_only(tmp_path):
    file = tmp_path / "t.txt"
    first, rest = "abab abab " * 90, "xyxy xyxy " * 10
    file.write_text(first + rest)
    data = tokenize(file, vocab_size=300, folder=tmp_path)
    assert data.tokenizer.decode(data.train) == first and data.tokenizer.decode(data.val) == rest
    assert len(data.train) < 900 and len(data.val) > 90 and data.val_bytes == 99

def test_token_files_are_made_once_and_anew_for_a_changed_text(tmp_path):
    file = tmp_path / "t.txt"
    file.write_text("some text, " * 50)
    first = tokenize(file, vocab_size=260, folder=tmp_path).folder
    written = (first / "train.npy").stat().st_mtime_ns
    assert tokenize(file, vocab_size=260, folder=tmp_path).folder == first
    assert (first / "train.npy").stat().st_mtime_ns == written
    assert tokenize(file, vocab_size=261, folder=tmp_path).folder != first
    file.write_text("other text, " * 50)
    assert tokenize(file, vocab_size=260, folder=tmp_path).folder != first
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]

def test_token_files_may_be_larger_than_a_text(tmp_path, monkeypatch):
    monkeypatch.setattr(files.read_file, "__defaults__", (10_000,))
    monkeypatch.setattr("minisa.kit.data.MOST", 10_000)
    (tmp_path / "t.txt").write_text("some text " * 900)
    data = tokenize(tmp_path / "t.txt", vocab_size=256, folder=tmp_path)        # a token for each byte
    assert (data.folder / "train.npy").stat().st_size > 10_000 and len(data.train) == 8100

UNUSABLE = [(None, "No such file"), (b"caf\xe9 " * 50, "not UTF-8"),
            (b"too short", "too short"), (b"", "too short")]

@pytest.mark.parametrize("content, message", UNUSABLE)
def test_a_text_that_cannot_be_used_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "t.txt").write_bytes(content)
    with pytest.raises((ValueError, OSError), match=message):
        tokenize(tmp_path / "t.txt", folder=tmp_path)

@pytest.fixture
def data(text, tmp_path):
    return tokenize(text, vocab_size=300, folder=tmp_path)

HARMS = [
    ("train.npy", lambda raw: raw[:len(raw) // 2]), ("val.npy", lambda raw: b""),
    ("val.npy", lambda raw: b"junk" + raw), ("meta.json", lambda raw: raw[:50]),
    ("meta.json", lambda raw: b"{}"), ("train.npy", lambda raw: raw[:128] + b"\xff" * (len(raw) - 128)),
    ("train.npy", None),
]

@pytest.mark.parametrize("file, harm", HARMS, ids=range(len(HARMS)))
def test_damaged_token_files_are_refused(text, tmp_path, file, harm):
    folder = tokenize(text, vocab_size=300, folder=tmp_path).folder
    raw = (folder / file).read_bytes()
    (folder / file).unlink()
    if harm:
        (folder / file).write_bytes(harm(raw))
    with pytest.raises(ValueError, match="damaged|No such file.*delete that folder"):
        Data(folder)

def test_a_batch_is_a_pure_function_of_seed_and_step_and_processes_share_it(data):
    x, y = data.batch(5, 1, batch_size=8, block_size=16)
    assert x.shape == y.shape == (8, 16) and x.dtype == torch.int64 and torch.equal(x[:, 1:], y[:, :-1])
    for row, target in zip(x, y):
        windows = np.lib.stride_tricks.sliding_window_view(data.train, 17)
        assert (windows == np.append(row.numpy(), target[-1])).all(1).any()
    assert torch.equal(data.batch(5, 1, 8, 16)[0], x)
    halves = [data.batch(5, 1, 8, 16, rows=slice(start, start + 4))[0] for start in (0, 4)]
    assert torch.equal(torch.cat(halves), x)
    assert not torch.equal(data.batch(6, 1, 8, 16)[0], x) and not torch.equal(data.batch(5, 2, 8, 16)[0], x)

def test_the_validation_loss_is_that_of_every_token_of_the_split_read_in_windows(data):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=24, vocab_size=300, n_layer=2, n_head=2, n_embd=16, dropout=0.5)).train()
    per_token, per_byte = data.evaluate(model)
    assert model.training
    model.eval()
    ids, nats = torch.tensor(data.val.astype(np.int64)), 0.0
    for start in range(0, len(ids) - 1, 24):
        window = ids[start:start + 25]
        nats += F.cross_entropy(model(window[None, :-1])[0][0].double(), window[1:], reduction="sum").item()
    assert per_token == pytest.approx(nats / (len(ids) - 1), rel=1e-5)
    n_bytes = len(data.tokenizer.decode(ids[1:].tolist()).encode())
    assert per_byte == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)

def test_a_large_model_is_evaluated_on_windows_spread_over_the_split(data):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=24, vocab_size=300, n_layer=2, n_head=2, n_embd=16)).eval()
    per_token, per_byte = data.evaluate(model, tokens=100)
    windows = data.windows("val", 4, 24)
    assert windows.shape == (4, 25) and windows[0, 0] == data.val[0] and windows[-1, -1] == data.val[-1]
    nats = sum(F.cross_entropy(model(w[None, :-1])[0][0].double(), w[1:]).item() for w in windows) / 4
    assert per_token == pytest.approx(nats, rel=1e-5)
    n_bytes = sum(len(data.tokenizer.decode_bytes(w[1:].tolist())) for w in windows)
    assert per_byte == pytest.approx(nats * 4 * 24 / math.log(2) / n_bytes, rel=1e-5)
    with pytest.raises(ValueError, match="need more text"):
        data.windows("val", 1, 10**6)

def test_the_data_of_a_model_are_those_it_was_trained_on_or_another_text(text, data, tmp_path, monkeypatch):
    info = {"data": str(data.folder)}
    assert data_of(info, data.tokenizer).folder == data.folder
    monkeypatch.setattr("minisa.kit.data.data_folder", lambda: tmp_path)
    other = data_of(info, data.tokenizer, text)
    assert other.folder != data.folder and np.array_equal(other.val, data.val)      # same tokens, own folder
    with pytest.raises(ValueError, match="the text that the model was trained on, is missing"):
        data_of({"data": str(tmp_path / "gone")}, data.tokenizer)

def test_tokens_of_another_text_are_not_taken_for_those_of_the_model(data, tmp_path, monkeypatch):
    monkeypatch.setattr("minisa.kit.data.data_folder", lambda: tmp_path / "elsewhere")
    info = {"data": str(data.folder), "data_digest": data.digest}
    assert data_of(info, data.tokenizer).folder == data.folder
    with pytest.raises(ValueError, match="is missing, or of another text; bring it back"):
        data_of({**info, "data_digest": "0" * 64}, data.tokenizer)

@pytest.mark.skipif(os.name == "nt", reason="needs pipes, and files with holes")
def test_a_text_that_is_no_file_or_too_large_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "huge.txt").touch()
    os.truncate(tmp_path / "huge.txt", 10**12)
    unreadable = {"pipe": "is not a regular file", "huge.txt": "is larger than", "": "Is a directory"}
    for name, why in unreadable.items():
        with pytest.raises(OSError, match=why) as raised:
            tokenize(tmp_path / name, folder=tmp_path / "data")
        assert raised.value.filename == str(tmp_path / name)

def reorder(folder):
    meta = json.loads((folder / "meta.json").read_text())
    vocab = meta["tokenizer"]["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (folder / "meta.json").write_text(json.dumps(meta))

def exchange(folder):
    (folder / "train.npy").rename(folder / "x")
    (folder / "val.npy").rename(folder / "train.npy")
    (folder / "x").rename(folder / "val.npy")

def flip(folder):
    data = bytearray((folder / "train.npy").read_bytes())
    data[-40] ^= 1
    (folder / "train.npy").write_bytes(data)

@pytest.mark.parametrize("harm", [reorder, exchange, flip])
def test_token_files_that_are_not_as_they_were_made_are_refused(text, tmp_path, harm):
    folder = tokenize(text, vocab_size=300, folder=tmp_path).folder
    harm(folder)
    with pytest.raises(ValueError, match="not as they were made"):
        Data(folder)

def test_a_full_disk_while_tokenizing_is_named_and_leaves_nothing(text, tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="could not be written.*No space left on device.*; free some space"):
        tokenize(text, vocab_size=300, folder=tmp_path)
    assert not list(tmp_path.iterdir())

def test_a_text_that_becomes_a_single_token_is_refused_and_leaves_nothing(tmp_path):
    (tmp_path / "a.txt").write_text("a" * 20)
    with pytest.raises(ValueError, match="--text: the text is too short"):
        tokenize(tmp_path / "a.txt", folder=tmp_path / "data")
    assert not (tmp_path / "data").exists()
