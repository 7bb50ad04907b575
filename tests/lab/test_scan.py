"""Which spans can share: the search against plain formulations; and the command, stopped and continued."""

import csv
import itertools
import shutil
from functools import partial

import pytest
import torch
from random_model import random_model
from torch.nn import functional as F

from minisa.axes.heads import head_products, refit, share
from minisa.kit import checkpoint
from minisa.kit.data import Data, tokenize
from minisa.lab import scan as scanning
from minisa.lab.scan import best_sets, predictions, scan, spans_text
from minisa.model import GPTConfig

def plain_loss(model, windows):
    logits = model(windows[:, :-1])[0]
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item()

@pytest.mark.parametrize("kind, heads", [("weights", "same"), ("weights", "match"), ("weights", "mix"),
                                         ("kv", "same")])
def test_a_scan_finds_the_loss_and_the_divergence_of_each_model_that_shares(kind, heads):
    model = random_model()
    windows = torch.randint(50, (3, 21), generator=torch.Generator().manual_seed(5))
    products = head_products(model, windows[:, :-1])
    sharing = partial(share, model, heads=heads, products=products, share_kind=kind)
    spans = [(0, 1), (0, 2), (1, 3), (2, 3)]
    found = {(a, b): measured for a, b, *measured in scan(model, sharing, windows, spans)}
    assert list(found) == spans
    p = model(windows[:, :-1])[0].double().softmax(-1)
    for (a, b), (loss, divergence) in found.items():
        shared = sharing(f"{a}-{b}")
        assert loss == pytest.approx(plain_loss(shared, windows), rel=1e-5)
        losses = [loss for loss, _ in predictions(shared, windows)]
        assert sum(losses) / 3 == pytest.approx(plain_loss(shared, windows), rel=1e-5)
        q = shared(windows[:, :-1])[0].double().softmax(-1)
        assert divergence == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-3)

def test_the_best_sets_are_the_best_of_all_sets():
    generator = torch.Generator().manual_seed(0)
    spans = [(a, b) for a in range(6) for b in range(a + 1, min(a + 4, 7))]
    divergences = {span: torch.randn((), generator=generator).item() for span in spans}
    sets = [chosen for n in range(1, 4) for chosen in itertools.combinations(spans, n)
            if all(s[1] < t[0] for s, t in itertools.pairwise(chosen))]
    found = best_sets(divergences, 7, 4)
    assert list(found) == [1, 2, 3, 4]
    for r, (total, chosen) in found.items():
        least = min(sum(divergences[span] for span in spans) for spans in sets
                    if sum(b - a for a, b in spans) == r)
        assert total == pytest.approx(least) == pytest.approx(sum(divergences[span] for span in chosen))
        assert chosen in sets and sum(b - a for a, b in chosen) == r

# ---- the command ----

@pytest.fixture(scope="module")
def made(text, tmp_path_factory):
    """A folder with two runs, whose models are random."""
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install matplotlib")
    folder = tmp_path_factory.mktemp("scan")
    data = tokenize(text, vocab_size=300, folder=folder / "data")
    info = {**checkpoint.UNKNOWN, "data": str(data.folder)}
    model = random_model(vocab_size=data.tokenizer.vocab_size, n_layer=3)
    checkpoint.save(folder / "run", model, data.tokenizer, info)
    shared = checkpoint.reconfigure(model, share="1-2")
    checkpoint.save(folder / "shared", shared, data.tokenizer, info)
    return folder

@pytest.fixture
def trained(made, tmp_path):
    """A copy of the first run; beside it lies the second one."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path / "run"

def rows_of(file):
    return list(csv.DictReader(file.open()))

def scan_that_stops_after(spans):
    def stops(*args, **more):
        yield from itertools.islice(scan(*args, **more), spans)
        raise KeyboardInterrupt
    return stops

def test_a_scan_is_written_and_continued_where_it_was_stopped(run, trained, monkeypatch):
    flags = [trained, "--heads=match", "--windows=2", "--context=20", "--longest=3", "--most=2"]
    monkeypatch.setattr(scanning, "scan", scan_that_stops_after(1))
    status, _, _ = run(scanning.main, *flags)
    file = trained / "scan-weights-match.csv"
    assert status == 130 and len(rows_of(file)) == 2        # as of any program that Ctrl-C stops
    before = rows_of(file)[1]
    monkeypatch.setattr(scanning, "scan", scan)
    status, out, err = run(scanning.main, *flags)
    rows = rows_of(file)
    assert status == 0 and out.count("\nspan ") + out.startswith("span ") == 2         # only what was missing
    assert sorted((row["anchor"], row["last"]) for row in rows) == [("-1", "-1"), ("0", "1"), ("0", "2"),
                                                                    ("1", "2")]
    assert rows[1] == before and list(before)[:8] == ["model", "windows", "context", "dtype", "anchor",
                                                      "last", "loss", "divergence"]
    assert file.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    status, _, err = run(scanning.main, trained, "--heads=match", "--windows=3", "--context=20")
    assert status == 2 and "cannot be continued" in err and err.count("\n") <= 1

def test_a_model_trained_anew_is_not_taken_for_the_old_one(run, trained):
    flags = [trained, "--windows=2", "--context=20", "--longest=2", "--most=1"]
    assert run(scanning.main, *flags)[0] == 0
    _, tokenizer, info = checkpoint.load(trained)
    model = random_model(vocab_size=tokenizer.vocab_size, n_layer=3, rope_base=500)
    checkpoint.save(trained, model, tokenizer, info)
    status, _, err = run(scanning.main, *flags)
    assert status == 2 and "cannot be continued" in err and "of another model" in err

@pytest.mark.parametrize("kind, heads, saved", [("weights", "mix", 1 / 3), ("kv", "same", 2 / 3)])
def test_the_best_sets_are_measured_on_other_text_and_refitted(run, trained, kind, heads, saved):
    status, out, _ = run(scanning.main, trained, f"--share_kind={kind}", f"--heads={heads}", "--refit",
                         "--windows=2", "--context=20", "--longest=3", "--most=2")
    name = kind if heads == "same" else f"{kind}-{heads}"
    sets = rows_of(trained / f"sets-{name}.csv")
    assert status == 0 and "best sets" in out
    assert [(row["reuse_layers"], row["refitted"]) for row in sets] == [("1", "no"), ("1", "yes"),
                                                                        ("2", "no"), ("2", "yes")]
    *_, before, after = sets
    assert before["spans"] == "0-2" and float(before["cache_saved"]) == pytest.approx(saved)

    model, _, info = checkpoint.load(trained)
    data = Data(info["data"])
    products = head_products(model, data.windows("train", 4, 20)[::2, :-1])
    shared = share(model, "0-2", heads, products, kind)
    held_out = data.windows("val", 4, 20)
    p = model(held_out[:, :-1])[0].double().softmax(-1)
    for row in before, after:
        if row is after:
            refit(shared, model, data.windows("train", 12, 32)[:, :-1])
        full = torch.tensor([plain_loss(model, window[None]) for window in held_out]).double()
        losses = torch.tensor([plain_loss(shared, window[None]) for window in held_out]).double()
        percents = 100 * (losses - full) / full.mean()
        assert float(row["percent"]) == pytest.approx(percents.mean().item(), abs=1e-3)
        assert float(row["percent_error"]) == pytest.approx(percents.std().item() / 2, abs=1e-3)
        q = shared(held_out[:, :-1])[0].double().softmax(-1)
        divergences = (p * (p / q).log()).sum(-1).mean(1)                   # of each window
        assert float(row["divergence"]) == pytest.approx(divergences.mean().item(), rel=1e-3)
        assert float(row["divergence_error"]) == pytest.approx(divergences.std().item() / 2, rel=1e-2)

@pytest.mark.parametrize("flags, message", [
    (["run", "--heads=other"], "--heads"),
    (["run", "--heads=mix", "--share_kind=kv"], "--heads=mix"),
    (["run", "--longest=1"], "--longest"),
    (["shared"], "already shares 1-2"),
    (["nowhere"], "no such model"),
    ([], "MODEL"),
], ids=str)
def test_wrong_use_gets_one_line_and_status_2(run, trained, flags, message):
    status, _, err = run(scanning.main, *flags)
    assert status == 2 and message in err and err.count("\n") == 1

def test_spans_are_written_as_share_reads_them():
    assert GPTConfig(n_layer=8, share=spans_text([(1, 3), (5, 7)])).spans == [(1, 3), (5, 7)]

def test_a_damaged_scan_is_refused(run, trained, tmp_path):
    flags = [trained, "--windows=1", "--context=20", "--longest=2", "--most=1", "--out_dir=maps"]
    assert run(scanning.main, *flags)[0] == 0
    file = tmp_path / "maps" / "scan-weights.csv"
    whole = file.read_text()
    for damaged in (whole.replace("0,1,", "0,9,"), whole.replace("0,1,", "x,1,"), whole + "nan" * 3,
                    whole.replace("0,1,", "0,1,nan,0,"), whole.replace("0,1,", "0,1,nan"), whole + "\0",
                    '"' + "x" * 200_000, whole.replace("anchor", "other"), whole[:-30], ""):
        file.write_text(damaged)
        status, _, err = run(scanning.main, *flags)
        assert status == 2 and "cannot be continued" in err and file.read_text() == damaged
    file.unlink()
    assert run(scanning.main, *flags)[0] == 0
    assert rows_of(file) == list(csv.DictReader(whole.splitlines()))
