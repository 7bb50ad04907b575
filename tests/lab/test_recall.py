"""A number that is told early and asked for at the end."""

import csv

import pytest
import torch

from minisa.axes import squeeze
from minisa.kit import checkpoint
from minisa.kit.data import Data, tokenize
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
    checkpoint.save("run", GPT(config), data.tokenizer, info)
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
    def right(expected):
        return sum(recall.right_answers(net, idx, expected, [squeeze.Whole()]).values())
    assert right(said) == 11 and right(some) == 4
    some[0, -1] = (some[0, -1] + 1) % 300                   # one digit off
    assert right(some) == 3

@pytest.mark.parametrize("length, size", [(70, 74), (158, 160), (160, 160)])
def test_a_cache_has_room_for_the_answer_but_for_no_more_than_the_context(model, monkeypatch, length, size):
    net, data = model
    read, sizes = squeeze.read, []

    def spy(*args):
        reading = read(*args)
        sizes.append(reading.cache.size)
        return reading
    monkeypatch.setattr(squeeze, "read", spy)
    idx, answers = recall.prompts(data, data.tokenizer, 2, length, seed=1)
    recall.right_answers(net, idx, answers, [squeeze.Whole()])
    assert sizes == [size] and answers.size(1) == 5         # length - 1 are read, then 5 go in

def test_all_caches_of_one_reading_answer_as_each_would_alone(model):
    net, data = model
    for block in net.blocks:                                # else it repeats the last token, come what may
        block.attn.out.weight.data *= 100
    idx, answers = recall.prompts(data, data.tokenizer, 30, 70, seed=1)
    equal = 1                                               # other budgets depend on what is read together
    whole, *others = squeeze.Whole(), *(
        squeeze.Squeezing(*way, equal) for way in ((12, "heavy"), (12, "window"), (70, "heavy")))
    said, ways = {}, [whole, *others]
    for way in ways:
        rest, cache = way.begin(net, idx)
        said[way] = torch.cat([*net.stream(rest, answers.size(1), temperature=0, cache=cache)], dim=1)
    assert not said[whole].equal(said[others[1]])           # what is forgotten shows
    for way in ways:
        together = recall.right_answers(net, idx, said[way], ways)
        assert together[way] == 30
        assert together == {each: (said[each] == said[way]).all(1).sum().item() for each in ways}

def test_models_lengths_and_caches_are_rows_and_columns(run, model):
    status, out, _ = run(recall.main, "run", "--lengths=64,96", "--prompts=3", "--share=1-2", "--squeeze=16",
                         "--csv=new.csv")
    names = ["run", "run, squeeze 16 heavy 0.5", "run, share 1-2", "run, share 1-2, squeeze 16 heavy 0.5"]
    rows = list(csv.DictReader(open("new.csv")))
    assert status == 0 and "64 tokens" in out and all(name in out for name in names)
    asked = sorted((row["model"], row["tokens"]) for row in rows)
    assert asked == sorted((name, length) for name in names for length in ("64", "96"))
    assert all(row["prompts"] == "3" and 0 <= int(row["right"]) <= 3 for row in rows)

@pytest.mark.parametrize("flags, message", [
    (["--lengths=64,5"], "5 is not a number from 64 up"), (["--lengths=x"], "invalid int value"),
    (["--lengths=64,200"], "200 tokens are more than the context of run, 160"),
    (["--prompts=0"], "--prompts"), (["--lengths=64", "--text=none.txt"], "--text=none.txt"),
    (["--lengths=64,96", "--squeeze=65"], "--squeeze=65: must be from 8 to the context of 64"),
], ids=str)
def test_wrong_flags_get_one_line_and_status_2(run, model, flags, message):
    status, _, err = run(recall.main, "run", "--prompts=2", *flags)
    errors = [line for line in err.splitlines() if "error" in line]
    assert status == 2 and len(errors) == 1 and message in errors[0]
