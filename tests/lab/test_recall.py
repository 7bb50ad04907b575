"""A number that is told early and asked for at the end."""

import csv

import pytest
import torch

from minisa import checkpoint
from minisa.data import Data, tokenize
from minisa.lab import recall
from minisa.model import GPT, GPTConfig

@pytest.fixture
def model(text, tmp_path, monkeypatch):
    """A folder "run" with a small random model and its data."""
    monkeypatch.chdir(tmp_path)
    data = Data(tokenize(text, vocab_size=300, folder=tmp_path / "data"))
    torch.manual_seed(0)
    config = GPTConfig(block_size=160, vocab_size=300, n_layer=3, n_head=2, n_embd=16)
    info = {**checkpoint.UNKNOWN, "data": str(data.folder)}
    checkpoint.save("run/model.pt", GPT(config), data.tokenizer, info)
    return checkpoint.load("run")[0], data

def test_the_number_stands_early_and_is_asked_for_at_the_end(model):
    _, data = model
    idx, answers = recall.prompts(data, data.tokenizer, 5, 100, seed=1)
    assert idx.shape == (5, 100) and len({tuple(row) for row in idx.tolist()}) == 5
    for row, answer in zip(idx.tolist(), answers.tolist()):
        text, number = data.tokenizer.decode(row), data.tokenizer.decode(answer)
        assert number.strip().isdigit() and len(number) == 5
        assert text.count(f"The secret number is{number}.") == 1 and text.endswith("The secret number is")
        assert data.tokenizer.decode(row[:40]).count("The secret number is") == 1       # early

def test_an_answer_is_right_if_all_its_tokens_are_the_likeliest(model, monkeypatch):
    net, data = model
    idx, answers = recall.prompts(data, data.tokenizer, 11, 70, seed=1)
    said = torch.cat([net.generate(row[None], answers.size(1), 0)[:, 70:] for row in idx])
    some = torch.where(torch.arange(11)[:, None] < 4, said, (said + 1) % 300)
    assert recall.right_answers(net, idx, said) == 11 and recall.right_answers(net, idx, some) == 4
    some[0, -1] = (some[0, -1] + 1) % 300                   # one digit off
    assert recall.right_answers(net, idx, some) == 3

def test_models_lengths_and_caches_are_rows_and_columns(run, model):
    status, out, _ = run(recall.main, "run", "--lengths=64,96", "--prompts=3", "--share=1-2", "--squeeze=16",
                         "--csv=new.csv")
    names = ["run", "run, squeeze 16 heavy 0.5", "run, share 1-2", "run, share 1-2, squeeze 16 heavy 0.5"]
    rows = list(csv.DictReader(open("new.csv")))
    assert status == 0 and "64 tokens" in out and all(name in out for name in names)
    assert [(row["model"], row["tokens"]) for row in rows] == [(n, t) for n in names for t in ("64", "96")]
    assert all(row["prompts"] == "3" and 0 <= int(row["right"]) <= 3 for row in rows)

@pytest.mark.parametrize("flags, message", [
    (["--lengths=64,5"], "must be numbers from 64 up"), (["--lengths=x"], "must be numbers from 64 up"),
    (["--lengths=64,200"], "200 tokens are more than the context of run, 160"),
    (["--prompts=0"], "--prompts"), (["--lengths=64", "--text=none.txt"], "--text=none.txt"),
    (["--lengths=64,96", "--squeeze=65"], "--squeeze=65: must be from 8 to the context of 64"),
], ids=str)
def test_wrong_flags_get_one_line_and_status_2(run, model, flags, message):
    status, _, err = run(recall.main, "run", "--prompts=2", *flags)
    errors = [line for line in err.splitlines() if "error" in line]
    assert status == 2 and len(errors) == 1 and message in errors[0]
