"""A number that is told early and asked for at the end."""

import csv
import itertools

import pytest
import torch

from minisa.axes import squeeze
from minisa.kit import checkpoint
from minisa.kit.data import Data, tokenize
from minisa.lab import recall
from minisa.model import GPT, GPTConfig

@pytest.fixture(scope="module")
def folder(text, tmp_path_factory):
    """A folder with a run, "run", whose model is small and random, and its data."""
    folder = tmp_path_factory.mktemp("recall")
    data = tokenize(text, vocab_size=300, folder=folder / "data")
    torch.manual_seed(0)
    config = GPTConfig(block_size=160, vocab_size=300, n_layer=3, n_head=2, n_embd=16)
    info = {**checkpoint.UNKNOWN, "data": str(data.folder)}
    checkpoint.save(folder / "run", GPT(config), data.tokenizer, info)
    return folder

@pytest.fixture
def model(folder, monkeypatch):
    """The model of "run" in the working folder, and its data."""
    monkeypatch.chdir(folder)
    model, _, info = checkpoint.load("run")
    return model, Data(info["data"])

def test_the_number_stands_early_and_is_asked_for_at_the_end(model):
    _, data = model
    idx, answers = recall.make_prompts(data, 5, 100, seed=1)
    assert idx.shape == (5, 100) and len({tuple(row) for row in idx.tolist()}) == 5
    for row, answer in zip(idx.tolist(), answers.tolist()):
        text, number = data.tokenizer.decode(row), data.tokenizer.decode(answer)
        assert number.strip().isdigit() and len(number) == 5
        assert text.count(f"The secret number is{number}.") == 1 and text.endswith("The secret number is")
        assert data.tokenizer.decode(row[:40]).count("The secret number is") == 1       # early

def test_an_answer_is_right_if_all_its_tokens_are_the_likeliest(model, monkeypatch):
    net, data = model
    idx, answers = recall.make_prompts(data, 11, 70, seed=1)
    said = torch.cat([net.generate(row[None], answers.size(1), 0)[:, 70:] for row in idx])
    some = torch.where(torch.arange(11)[:, None] < 4, said, (said + 1) % 300)
    def right(expected):
        return recall.right_answers(net, idx, expected, [squeeze.Whole()])[0]
    assert right(said) == 11 and right(some) == 4
    some[0, -1] = (some[0, -1] + 1) % 300                   # one digit off
    assert right(some) == 3

@pytest.mark.parametrize("length, size", [(70, 74), (158, 160), (160, 160)])
def test_a_cache_has_room_for_the_answer_but_for_no_more_than_the_context(model, length, size):
    net, data = model
    stream, sizes = net.stream, []

    def spy(*args, cache, **more):
        sizes.append(cache.size)
        return stream(*args, cache=cache, **more)
    net.stream = spy
    idx, answers = recall.make_prompts(data, 2, length, seed=1)
    recall.right_answers(net, idx, answers, [squeeze.Whole()])
    assert sizes == [size] and answers.size(1) == 5         # length - 1 are read, then 5 go in

def test_all_caches_of_one_reading_answer_as_each_would_alone(model):
    net, data = model
    for block in net.blocks:                                # else it repeats the last token, come what may
        block.attn.out.weight.data *= 100
    idx, answers = recall.make_prompts(data, 16, 70, seed=1)
    equal = 1                                               # other budgets depend on what is read together
    ways = [squeeze.Whole(), squeeze.Squeezing(12, "heavy", equal), squeeze.Squeezing(12, "window", equal)]
    given = []
    for way in ways:
        rest, cache = way.begin(net, idx)
        given.append(torch.cat([*net.stream(rest, answers.size(1), temperature=0, cache=cache)], dim=1))
    assert not given[0].equal(given[2])                     # what is forgotten shows
    for expected in given:
        agree = [(tokens == expected).all(1).sum().item() for tokens in given]
        assert 16 in agree and recall.right_answers(net, idx, expected, ways) == agree

def test_every_model_length_and_cache_is_a_row_of_its_own(run, model, tmp_path):
    status, out, _ = run(recall.main, "run", "--lengths=64,96", "--prompts=3", "--share=1-2",
                         "--share_kind=kv", "--squeeze=16", "--cache_bits=8", f"--csv={tmp_path}/new.csv")
    rows = list(csv.DictReader(open(tmp_path / "new.csv")))
    assert status == 0 and out.count("%") == 2 * len(rows)
    assert list(rows[0])[:10] == [
        "model", "share", "share_kind", "policy", "budget", "cut", "bits", "length", "prompts", "right"]
    found = [tuple(row.values())[1:8] for row in rows]
    caches = ("", "", "", ""), ("", "", "", "8"), ("heavy", "16", "0.5", "8")
    expected = itertools.product((("", ""), ("1-2", "kv")), ("64", "96"), caches)
    assert found == [(*share, *cache, length) for share, length, cache in expected]
    assert all(row["model"] == "run" and row["prompts"] == "3" for row in rows)
    assert all(0 <= int(row["right"]) <= 3 for row in rows)

def test_the_standard_error_is_that_of_two_right_and_two_wrong_answers_more():
    assert recall.share_of(98, 196) == "50.0% ± 3.5%"       # (98 + 2) / 200, and √(0.5 · 0.5 / 200)
    assert recall.share_of(0, 196) == "0.0% ± 0.7%"         # 2 / 200

@pytest.mark.parametrize("flags, message", [
    (["--lengths=64,5"], "--lengths: 5 is not a number from 64 up"), (["--lengths=x"], "--lengths"),
    (["--lengths=64,200"], "200 tokens are more than the context of run, 160"),
    (["--prompts=0"], "--prompts"), (["--lengths=64", "--text=none.txt"], "none.txt: No such file"),
    (["--lengths=64,96", "--squeeze=65"], "--squeeze=65: must be from 8 to the context of 64"),
], ids=str)
def test_wrong_flags_get_one_line_and_status_2(run, model, flags, message):
    status, _, err = run(recall.main, "run", "--prompts=2", *flags)
    errors = [line for line in err.splitlines() if "error" in line]
    assert status == 2 and len(errors) == 1 and message in errors[0]

def test_numbers_of_different_lengths_in_tokens_are_left_out(tmp_path):
    from minisa.kit.tokenizer import Tokenizer
    tokenizer = Tokenizer([*(bytes([b]) for b in range(256)), *(b"%d" % n for n in range(10, 100, 2))])
    numbers, answers = recall.draw_numbers(tokenizer.encode, 30, seed=1)
    assert answers.dim() == 2 and len(numbers) == len(answers) == 30
    for number, answer in zip(numbers, answers.tolist()):
        assert tokenizer.decode(answer) == f" {number}"

def test_a_length_without_room_for_the_fact_is_refused_with_the_least(run, folder, monkeypatch):
    monkeypatch.setattr(recall, "FACT", "\n\nThe secret number, which nobody must ever tell, is {0}.\n\n" * 2)
    status, _, err = run(recall.main, folder / "run", "--lengths=64")
    assert status == 2 and "--lengths=64: fact and question take" in err and err.count("\n") == 1
