"""How alike layers attend, and how spread: against plain formulations; and the command."""

import csv
import itertools

import pytest
import torch
from random_model import random_model
from torch.nn import functional as F

from minisa.kit import checkpoint
from minisa.kit.data import Data, tokenize
from minisa.lab import similarity
from minisa.lab.similarity import layer_similarity, spread

@pytest.fixture
def model():
    return random_model()

@pytest.fixture
def idx():
    return torch.randint(50, (3, 20), generator=torch.Generator().manual_seed(4))

def test_similarity_is_the_mean_cosine_of_rows_of_the_same_head(model, idx):
    P = model.attention_weights(idx)
    alike = layer_similarity(model, idx)
    rows = list(itertools.product(range(3), range(4), range(20)))
    for l, m in itertools.product(range(4), repeat=2):
        cosines = [F.cosine_similarity(P[l][row], P[m][row], dim=0) for row in rows]
        torch.testing.assert_close(alike[l, m], torch.stack(cosines).mean(), atol=1e-5, rtol=1e-5)

def test_layers_that_share_are_exactly_alike(model, idx):
    alike = layer_similarity(checkpoint.reconfigure(model, share="1-3"), idx)
    torch.testing.assert_close(alike[1:, 1:], torch.ones(3, 3))
    assert alike[0, 1] < 0.99

def test_spread_is_the_variance_over_the_tokens_that_a_row_sees(model, idx):
    for P, value in zip(model.attention_weights(idx), spread(model, idx)):
        rows = [P[b, h, t, :t + 1] for b in range(3) for h in range(4) for t in range(1, 20)]
        plain = torch.stack([row.var(correction=0) for row in rows]).mean()
        torch.testing.assert_close(value, plain, atol=1e-6, rtol=1e-4)

def test_both_work_in_bfloat16(model, idx):
    half = random_model().bfloat16()
    torch.testing.assert_close(layer_similarity(half, idx), layer_similarity(model, idx), atol=0.05, rtol=0)
    torch.testing.assert_close(spread(half, idx), spread(model, idx), atol=0.01, rtol=0.1)

# ---- the command ----

@pytest.fixture
def trained(text, tmp_path):
    """The folder of a run that kept three of its steps. Nothing was trained: each step is another model."""
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install matplotlib")
    folder = tokenize(text, vocab_size=300, folder=tmp_path / "data")
    tokenizer, info = Data(folder).tokenizer, {**checkpoint.UNKNOWN, "data": str(folder)}
    for seed, path in enumerate(("steps/00000200", "steps/00000400", "steps/00010000", ".")):
        model = random_model(seed, vocab_size=tokenizer.vocab_size, n_layer=3)
        checkpoint.save(tmp_path / "run" / path, model, tokenizer, info)
    return tmp_path / "run"

def read_csv(file):
    return [[float(cell) for cell in row] for row in list(csv.reader(file.open()))[1:]]

def is_png(file):
    return file.read_bytes()[:4] == b"\x89PNG"

def maps_of(folder, n, T):
    """The mean maps of a model, over n of the 2n windows spread over the training text."""
    model, _, info = checkpoint.load(folder)
    windows = Data(info["data"]).windows("train", 2 * n, T)[::2, :-1]
    each = [(layer_similarity(model, window[None]), spread(model, window[None])) for window in windows]
    return [torch.stack(values).mean(0) for values in zip(*each)]

def test_maps_are_printed_written_and_drawn(run, trained):
    status, out, _ = run(similarity.main, trained, "--windows=2", "--context=20")
    alike, variance = maps_of(trained, 2, 20)
    assert status == 0 and "mean cosine" in out
    assert f"{alike[0, 1]:.3f}" in out and f"{variance[2]:.6f}" in out
    rows = torch.tensor(read_csv(trained / "similarity.csv"))               # (3, 4)
    torch.testing.assert_close(rows, torch.cat((torch.arange(3)[:, None], alike), dim=1))
    torch.testing.assert_close(torch.tensor(read_csv(trained / "spread.csv"))[:, 1], variance)
    assert is_png(trained / "similarity.png") and is_png(trained / "spread.png")

def test_maps_over_training_are_those_of_the_kept_steps_in_order(run, trained):
    status, out, _ = run(similarity.main, trained, "--history", "--windows=2", "--out_dir=maps")
    out_dir = trained.parent / "maps"
    assert status == 0 and "3 maps" in out and is_png(out_dir / "history.png")
    assert (out_dir / "history.gif").read_bytes()[:6] == b"GIF89a"
    rows = read_csv(out_dir / "history.csv")
    expected = [(step, layer) for step in (200, 400, 10000) for layer in range(3)]
    assert [(step, layer) for step, layer, *_ in rows] == expected
    alike = maps_of(trained / "steps" / "00000400", 2, 32)[0]
    torch.testing.assert_close(torch.tensor(rows)[3:6, 2:], alike)

def test_the_attention_of_a_text_is_drawn_and_below_it_that_of_sharing_layers(run, trained, monkeypatch):
    drawn = {}
    def note(models, tokens, first, file):
        drawn.update(models=models, tokens=tokens, first=first)
    monkeypatch.setattr(similarity.plot, "attention_maps", note)
    status, out, _ = run(similarity.main, trained, "--look=To be,\nor not", "--share=1-2", "--out_dir=maps")
    model, tokenizer, _ = checkpoint.load(trained)
    idx = torch.tensor([tokenizer.encode("To be,\nor not")])
    expected = [P[0].mean(0) for P in model.attention_weights(idx)]
    assert status == 0 and "attention.png: layers 0 to 2" in out
    full, shared = drawn["models"].values()
    assert all(map(torch.equal, full, expected)) and torch.equal(shared[1], shared[2])
    assert torch.equal(shared[1], full[1]) and not torch.equal(full[1], full[2])
    assert "".join(drawn["tokens"]) == "To be,\\nor not"

def test_another_text_can_be_read(run, trained, monkeypatch, tmp_path):
    monkeypatch.setattr("minisa.kit.data.data_folder", lambda: tmp_path / "elsewhere")
    (tmp_path / "other.txt").write_text("to be or not to be " * 200)
    assert run(similarity.main, trained, "--windows=2", "--text=other.txt")[0] == 0
    made = Data(next((tmp_path / "elsewhere").glob("other-*")))
    assert made.tokenizer.vocab_size == Data(next((tmp_path / "data").iterdir())).tokenizer.vocab_size

@pytest.mark.parametrize("flags, message", [
    (["nowhere"], "nowhere: no such model"),
    (["run", "--longest=3"], "--longest"),
    (["run", "--windows=0"], "--windows"),
    (["run", "--look="], "--look"),
    (["run", "--look=To be", "--history"], "--history, --look: give one of them"),
    (["run", "--look=" + "a b " * 100], "--look: these are"),
    (["run", "--share=1-2"], "--share: goes with --look"),
    (["run", "--context=1"], "--context"),
    (["run", "--out_dir=run/config.json"], "is a file; name a folder"),
    (["run", "--device=none"], "none is not on this machine"),
    (["run", "--text=none.txt"], "--text=none.txt"),
    (["run/steps/00000200", "--history"], "--keep_every"),
    ([], "MODEL"),
], ids=str)
def test_wrong_use_gets_one_line_and_status_2(run, trained, flags, message):
    status, out, err = run(similarity.main, *flags)
    assert status == 2 and message in err and err.count("\n") == 1
