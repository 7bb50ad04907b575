"""The search for reuse layers against plain formulations; and the command, stopped and continued."""

import csv
import itertools

import pytest
from random_model import random_model

from minisa.axes.heads import head_products, refit, share
from minisa.kit import checkpoint
from minisa.kit.data import Data, tokenize
from minisa.lab import search
from minisa.lab.search import greedy, spans_of
from minisa.model import GPTConfig

@pytest.mark.parametrize("layers", [*itertools.chain.from_iterable(
    itertools.combinations(range(1, 6), r) for r in range(1, 6))], ids=str)
def test_just_these_layers_reuse_the_nearest_below_that_does_not(layers):
    share = ",".join(f"{a}-{b}" for a, b in spans_of(layers))
    config = GPTConfig(n_layer=6, share=share)
    anchors = {layer: a for a, b in config.spans for layer in range(a + 1, b + 1)}
    assert anchors == {layer: max(set(range(layer)) - {*layers}) for layer in layers}

def test_the_layer_that_adds_least_joins_each_time():
    cost = {1: 5.0, 2: 1.0, 3: 2.0, 4: 1.5, 5: 9.0}

    def divergence_of(layers):
        neighbors = sum(layer + 1 in layers for layer in layers)
        return sum(cost[layer] for layer in layers) + 2.0 * neighbors

    found, plain = list(greedy(6, 4, divergence_of)), []
    for _ in range(4):                                          # the same, trying all layers each time
        before = plain[-1] if plain else set()
        plain.append(min((before | {layer} for layer in {*cost} - before), key=divergence_of))
    assert found == plain and found[1] == {2, 4}

def test_layers_that_cannot_win_are_not_tried_again():
    tried = []

    def divergence_of(layers):
        tried.append({*layers})
        return float(sum(layers))
    assert list(greedy(6, 3, divergence_of)) == [{1}, {1, 2}, {1, 2, 3}]
    assert len(tried) == 5 + 1 + 1

# ---- the command ----

@pytest.fixture
def folder(text, tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install matplotlib")
    data = tokenize(text, vocab_size=300, folder=tmp_path / "data")
    info = {**checkpoint.UNKNOWN, "data": str(data.folder)}
    model = random_model(vocab_size=data.tokenizer.vocab_size, n_layer=3)
    checkpoint.save(tmp_path / "run", model, data.tokenizer, info)
    checkpoint.save(tmp_path / "shared", checkpoint.reconfigure(model, share="1-2"), data.tokenizer, info)
    return tmp_path

def rows_of(file):
    return list(csv.DictReader(file.open()))

FLAGS = "run", "--windows=2", "--context=20", "--most=2", "--dtype=float32", "--out_dir=found"

def test_sets_are_judged_refitted_on_text_that_they_were_not_fitted_to(run, folder):
    status, out, err = run(search.main, *FLAGS)
    assert status == 0, err
    trials = {row["spans"]: float(row["divergence"]) for row in rows_of(folder / "found/trials.csv")}
    assert {*trials} >= {"0-1", "1-2", "0-2"}
    model, _, info = checkpoint.load("run")
    windows = Data(info["data"]).windows("train", 8, 20)
    judge, fit = windows[[2, 6]], windows[[0, 1, 3, 4, 5, 7], :-1]
    shared = share(model, "1-2", "mix", head_products(model, fit[::3]))
    refit(shared, model, fit)
    p, q = (each(judge[:, :-1])[0].double().softmax(-1) for each in (model, shared))
    assert trials["1-2"] == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-3)
    sets = rows_of(folder / "found/sets.csv")
    best = min(("0-1", "1-2"), key=trials.get)
    assert [row["spans"] for row in sets if row["refitted"] == "yes"] == [best, "0-2"]

def test_a_stopped_search_continues(run, folder, monkeypatch):
    with monkeypatch.context() as patch:
        def stopped(*args, **more):
            if (folder / "found/trials.csv").exists():
                raise KeyboardInterrupt
            return refit(*args, **more)
        patch.setattr(search, "refit", stopped)
        assert run(search.main, *FLAGS)[0] == 130
    file = folder / "found/trials.csv"
    first, = rows_of(file)
    status, out, _ = run(search.main, *FLAGS)
    assert status == 0 and rows_of(file)[0] == first and f"{first['spans']}: divergence" not in out
    status, _, err = run(search.main, *FLAGS, "--windows=3")
    assert status == 2 and "cannot be continued" in err and err.count("\n") == 1

@pytest.mark.parametrize("content", ["", "model", "spans,divergence\n0-1,nan\n", "\0"])
def test_a_damaged_file_of_trials_is_refused(run, folder, content):
    file = folder / "found/trials.csv"
    file.parent.mkdir()
    file.write_text(content)
    status, _, err = run(search.main, *FLAGS)
    assert status == 2 and "cannot be continued" in err and file.read_text() == content

@pytest.mark.parametrize("flags, message", [
    (["run", "--most=3"], "--most=3"), (["run", "--heads=all"], "--heads"), (["nowhere"], "no such model"),
    (["shared"], "already shares 1-2"), ([], "MODEL")], ids=str)
def test_wrong_use_gets_one_line_and_status_2(run, folder, flags, message):
    status, _, err = run(search.main, *flags)
    assert status == 2 and message in err and err.count("\n") == 1
