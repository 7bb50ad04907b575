"""How similarly layers attend, and how unevenly: against plain formulations; and the command."""

import csv
import itertools
import shutil

import pytest
import torch
from random_model import random_model
from torch.nn import functional as F

from minisa.kit import checkpoint
from minisa.kit.data import Data, tokenize
from minisa.lab import similarity
from minisa.lab.similarity import layer_similarity, weight_variance

@pytest.fixture
def model():
    return random_model()

@pytest.fixture
def idx():
    return torch.randint(50, (3, 20), generator=torch.Generator().manual_seed(4))

def test_similarity_is_the_mean_cosine_of_rows_of_the_same_head(model, idx):
    P = model.attention_weights(idx)
    alike = layer_similarity(model, idx)
    for l, m in itertools.product(range(4), repeat=2):
        cosines = F.cosine_similarity(P[l], P[m], dim=3)                # (3, 4, 20)
        torch.testing.assert_close(alike[l, m], cosines.mean(), atol=1e-5, rtol=1e-5)

def test_layers_that_share_are_exactly_alike(model, idx):
    alike = layer_similarity(checkpoint.reconfigure(model, share="1-3"), idx)
    torch.testing.assert_close(alike[1:, 1:], torch.ones(3, 3))
    assert alike[0, 1] < 0.99

def test_the_variance_is_that_over_the_tokens_that_a_row_sees(model, idx):
    for P, value in zip(model.attention_weights(idx), weight_variance(model, idx)):
        rows = [P[b, h, t, :t + 1] for b in range(3) for h in range(4) for t in range(1, 20)]
        plain = torch.stack([row.var(correction=0) for row in rows]).mean()
        torch.testing.assert_close(value, plain, atol=1e-6, rtol=1e-4)

def test_both_work_in_bfloat16(model, idx):
    half = random_model().bfloat16()
    torch.testing.assert_close(layer_similarity(half, idx), layer_similarity(model, idx), atol=0.05, rtol=0)
    torch.testing.assert_close(weight_variance(half, idx), weight_variance(model, idx), atol=0.01, rtol=0.1)

# ---- the command ----

@pytest.fixture(scope="module")
def made(text, tmp_path_factory):
    """A folder with a run that kept three of its steps. Nothing was trained: each step is another model."""
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install matplotlib")
    folder = tmp_path_factory.mktemp("similarity")
    data = tokenize(text, vocab_size=300, folder=folder / "data")
    info = {**checkpoint.UNKNOWN, "data": str(data.folder)}
    for seed, path in enumerate(("steps/00000200", "steps/00000400", "steps/00010000", ".")):
        model = random_model(seed, vocab_size=data.tokenizer.vocab_size, n_layer=3)
        checkpoint.save(folder / "run" / path, model, data.tokenizer, info)
    return folder

@pytest.fixture
def trained(made, tmp_path):
    """A copy of the run."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path / "run"

def read_csv(file):
    return [list(row.values()) for row in csv.DictReader(file.open())]

def matrix(rows, n_layer):
    """Rows of layer, other_layer, cosine, ... → (L, L)"""
    assert [(int(l), int(m)) for l, m, *_ in rows] == [*itertools.product(range(n_layer), repeat=2)]
    return torch.tensor([float(cosine) for _, _, cosine, *_ in rows]).view(n_layer, n_layer)

def is_png(file):
    return file.read_bytes()[:4] == b"\x89PNG"

def maps_of(folder, n, T):
    """The mean maps of a model, over n of the 2n windows spread over the training text."""
    model, _, info = checkpoint.load(folder)
    windows = Data(info["data"]).windows("train", 2 * n, T)[::2, :-1]
    each = [(layer_similarity(model, window[None]), weight_variance(model, window[None]))
            for window in windows]
    return [torch.stack(values).mean(0) for values in zip(*each)]

def test_maps_are_printed_written_and_drawn(run, trained):
    status, out, _ = run(similarity.main, trained, "--windows=2", "--context=20")
    alike, variance = maps_of(trained, 2, 20)
    lines = out.splitlines()[-5:]
    assert status == 0 and "mean cosine" in lines[0]
    for layer, line in enumerate(lines[1:4]):
        hundredths = [f"{100 * cosine:.0f}" for cosine in alike[layer].tolist()]
        assert line.split() == [str(layer), f"{variance[layer]:.6f}", *hundredths]
    torch.testing.assert_close(matrix(read_csv(trained / "similarity.csv"), 3), alike)
    variances = [float(value) for _, value, *_ in read_csv(trained / "variance.csv")]
    torch.testing.assert_close(torch.tensor(variances), variance)
    assert is_png(trained / "similarity.png") and is_png(trained / "variance.png")

def test_maps_over_training_are_those_of_the_kept_steps_in_order(run, trained):
    status, out, _ = run(similarity.main, trained, "--history", "--windows=2", "--out_dir=maps")
    out_dir = trained.parent / "maps"
    assert status == 0 and "3 maps" in out and is_png(out_dir / "history.png")
    assert (out_dir / "history.gif").read_bytes()[:6] == b"GIF89a"
    rows = read_csv(out_dir / "history.csv")
    assert [int(step) for step, *_ in rows] == [200] * 9 + [400] * 9 + [10000] * 9
    alike = maps_of(trained / "steps" / "00000400", 2, 32)[0]
    torch.testing.assert_close(matrix([row[1:] for row in rows[9:18]], 3), alike)

def test_the_attention_of_a_text_is_drawn_and_below_it_that_of_sharing_layers(run, trained, monkeypatch):
    drawn = {}
    def note(models, tokens, first, file):
        drawn.update(models=models, tokens=tokens, first=first)
    monkeypatch.setattr(similarity.plot, "attention_maps", note)
    status, out, _ = run(similarity.main, trained, "--look=To be,\nor not", "--share=1-2", "--out_dir=maps")
    model, tokenizer, _ = checkpoint.load(trained)
    idx = torch.tensor([tokenizer.encode("To be,\nor not")])
    expected = [P[0].mean(0) for P in model.attention_weights(idx)]
    assert status == 0 and "attention.png: 3 layers from 0 on" in out
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
    (["run", "--text=none.txt"], "none.txt: No such file"),
    (["run/steps/00000200", "--history"], "--keep_every"),
    ([], "MODEL"),
], ids=str)
def test_wrong_use_gets_one_line_and_status_2(run, trained, flags, message):
    status, out, err = run(similarity.main, *flags)
    assert status == 2 and message in err and err.count("\n") == 1
