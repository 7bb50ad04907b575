"""How alike layers attend, which heads are taken over, which spans are best: against plain formulations."""

import csv
import itertools
import json
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

import sample
import train
from minisa import checkpoint, similarity
from minisa.cost import cost, measure
from minisa.model import GPT, GPTConfig, KVCache
from minisa.similarity import best_sets, gram, layer_similarity, loss, nearest_mixture, refit, scan, share, spread


@pytest.fixture
def model():
    torch.manual_seed(3)
    model = GPT(GPTConfig(block_size=32, vocab_size=50, n_layer=4, n_head=4, n_kv_head=2, n_embd=32)).eval()
    for p in model.parameters():
        p.data *= 6 if p.dim() == 2 else 1                  # so that heads attend differently
    return model


@pytest.fixture
def idx():
    torch.manual_seed(4)
    return torch.randint(50, (3, 20))


def test_similarity_is_the_mean_cosine_of_rows_of_the_same_head(model, idx):
    P = model.attention_weights(idx)
    alike = layer_similarity(model, idx)
    for l, m in itertools.product(range(4), repeat=2):
        plain = sum(F.cosine_similarity(P[l][b, h, t], P[m][b, h, t], dim=0) for b in range(3) for h in range(4) for t in range(20)) / (3 * 4 * 20)
        torch.testing.assert_close(alike[l, m], plain, atol=1e-5, rtol=1e-5)


def test_layers_that_share_are_exactly_alike(model, idx):
    alike = layer_similarity(share(model, replace(model.config, share="1-3")), idx)
    torch.testing.assert_close(alike[1:, 1:], torch.ones(3, 3))
    assert alike[0, 1] < 0.99


def test_spread_is_the_variance_over_the_tokens_that_a_row_sees(model, idx):
    P = model.attention_weights(idx)
    for layer, value in enumerate(spread(model, idx)):
        plain = torch.stack([P[layer][b, h, t, :t + 1].var(correction=0) for b in range(3) for h in range(4) for t in range(1, 20)]).mean()
        torch.testing.assert_close(value, plain, atol=1e-6, rtol=1e-4)


def test_gram_holds_the_inner_products_of_heads(model, idx):
    P = torch.stack(model.attention_weights(idx)).double()                      # (L, B, H, T, T)
    torch.testing.assert_close(gram(model, idx), torch.einsum("lbhts,mbgts->lhmg", P, P), atol=1e-4, rtol=1e-5)


def test_the_nearest_mixture_is_the_best_of_all_supports():
    torch.manual_seed(0)
    X, Y = torch.rand(40, 5, dtype=torch.float64), torch.rand(40, 6, dtype=torch.float64)
    found = nearest_mixture(X.T @ X, Y.T @ X)
    assert (found >= 0).all() and torch.allclose(found.sum(1), torch.ones(6).double())
    for row, y in zip(found, Y.T):
        best = min((plain_fit(X[:, list(support)], y) for n in range(1, 6) for support in itertools.combinations(range(5), n)), default=None)
        assert (X @ row - y).pow(2).sum().item() == pytest.approx(best, rel=1e-6)


def plain_fit(X, y):
    """The least squared distance of y from X w with Σ w = 1, or infinity if that w is negative somewhere."""
    n = X.size(1)
    system = torch.block_diag(X.T @ X, torch.zeros(1, 1, dtype=X.dtype))
    system[:n, n] = system[n, :n] = 1
    w = torch.linalg.solve(system, torch.cat((X.T @ y, torch.ones(1, dtype=X.dtype))))[:n]
    return (X @ w - y).pow(2).sum().item() if (w >= -1e-12).all() else float("inf")


def test_a_head_takes_over_the_most_alike_head_of_the_anchor(model, idx):
    P = model.attention_weights(idx)
    shared = share(model, replace(model.config, share="1-3", heads="match"), gram(model, idx))
    for layer in (2, 3):
        cosines = torch.stack([torch.stack([F.cosine_similarity(P[layer][:, h].flatten(), P[1][:, g].flatten(), dim=0) for g in range(4)]) for h in range(4)])
        assert torch.equal(shared.blocks[layer].attn.source, cosines.argmax(1))
    seen = shared.attention_weights(idx)
    torch.testing.assert_close(seen[2], seen[1][:, shared.blocks[2].attn.source])


def test_a_mixture_is_nearer_than_a_match_and_that_than_the_same_head(model, idx):
    products, away = gram(model, idx), {}
    target = model.attention_weights(idx)[3]
    for heads in ("same", "match", "mix"):
        seen = share(model, replace(model.config, share="2-3", heads=heads), products).attention_weights(idx)
        away[heads] = (seen[3] - target).pow(2).sum().item()
        torch.testing.assert_close(seen[3].sum(-1), torch.ones(3, 4, 20))
    assert away["mix"] < away["match"] <= away["same"]


@pytest.mark.parametrize("heads", ["match", "mix"])
def test_taken_heads_are_the_same_with_and_without_a_cache_and_are_billed(model, idx, heads):
    shared = share(model, replace(model.config, share="1-3", heads=heads), gram(model, idx))
    cache = KVCache(shared.config, 3, 32)
    pieces = torch.cat([shared(part, cache=cache)[0] for part in idx.split([7, 1, 1, 5, 6], dim=1)], dim=1)
    torch.testing.assert_close(pieces, shared(idx)[0], atol=1e-4, rtol=1e-4)
    assert cost(shared.config, 20) == measure(shared, 20)
    plain = cost(replace(shared.config, heads="same"), 20)
    assert cost(shared.config, 20).decode_flops - plain.decode_flops == (2 * 2 * 4 * 4 * 20 if heads == "mix" else 0)


@pytest.mark.parametrize("heads", ["match", "mix"])
def test_taken_heads_work_in_bfloat16(model, idx, heads):
    shared = share(model.bfloat16(), replace(model.config, share="1-3", heads=heads), gram(model, idx))
    assert shared(idx)[0].dtype == torch.bfloat16
    torch.testing.assert_close(shared.blocks[2].attn.mix.float().sum(1) if heads == "mix" else torch.ones(4), torch.ones(4), atol=0.02, rtol=0)


def test_outputs_are_refitted_to_full_attention_only(model, idx):
    shared = share(model, replace(model.config, share="1-3"))
    with pytest.raises(ValueError, match="--refit.*already shares 1-3"):
        refit(share(model, replace(model.config, share="1-2")), shared, idx)


def test_sharing_uses_the_same_memory(model):
    shared = share(model, replace(model.config, share="1-3"))
    assert shared.embed.weight.data_ptr() == model.embed.weight.data_ptr()
    assert shared.blocks[0].mlp.down.weight.data_ptr() == model.blocks[0].mlp.down.weight.data_ptr()


def test_heads_need_shared_attention():
    for wrong in (dict(heads="mix"), dict(heads="mix", share="0-1", share_kind="kv"), dict(heads="other", share="0-1")):
        with pytest.raises(ValueError, match="--heads="):
            GPTConfig(**wrong)


@pytest.mark.parametrize("kind", ["weights", "kv"])
def test_a_refitted_projection_is_the_least_squares_solution_and_leaves_the_model_alone(model, kind):
    torch.manual_seed(6)
    windows = torch.randint(50, (4, 20))
    shared, before = share(model, replace(model.config, share="1-3", share_kind=kind)), [p.clone() for p in model.parameters()]
    refit(shared, model, windows, ridge=0.05)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))
    seen = {}
    for layer in (2, 3):
        shared.blocks[layer].attn.out.register_forward_pre_hook(lambda _, args, layer=layer: seen.update({("z", layer): args[0]}))
        model.blocks[layer].attn.out.register_forward_hook(lambda _, args, y, layer=layer: seen.update({("y", layer): y}))
    shared(windows), model(windows)
    for layer in (2, 3):
        z, y = seen["z", layer].flatten(0, 1).double(), seen["y", layer].flatten(0, 1).double()
        old, new = (m.blocks[layer].attn.out.weight.double() for m in (model, shared))
        pull = (0.05 * (z * z).sum(0).mean()).sqrt() * torch.eye(32).double()   # λ |W' − W|² as rows of an ordinary least squares problem
        plain = torch.linalg.lstsq(torch.cat((z, pull)), torch.cat((y, pull @ old.T))).solution.T
        torch.testing.assert_close(new, plain, atol=1e-4, rtol=1e-3)
        assert (z @ new.T - y).norm() < (z @ old.T - y).norm()


@pytest.mark.parametrize("kind, heads", [("weights", "same"), ("weights", "mix"), ("kv", "same")])
def test_a_scan_finds_the_loss_of_each_model_that_shares(model, kind, heads):
    torch.manual_seed(5)
    windows = torch.randint(50, (3, 21))
    products = gram(model, windows[:, :-1])
    found = {(a, b): values for a, b, *values in scan(model, windows, 3, kind, heads, products, skip={(1, 2)})}
    assert set(found) == {(0, 1), (0, 2), (1, 3), (2, 3)}
    p = torch.softmax(model(windows[:, :-1])[0].double(), -1)
    for (a, b), (value, divergence) in found.items():
        shared = share(model, replace(model.config, share=f"{a}-{b}", share_kind=kind, heads=heads), products)
        plain = F.cross_entropy(shared(windows[:, :-1])[0].flatten(0, 1), windows[:, 1:].flatten()).item()
        assert value == pytest.approx(plain, rel=1e-5) == pytest.approx(loss(shared, windows), rel=1e-5)
        q = torch.softmax(shared(windows[:, :-1])[0].double(), -1)
        assert divergence == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-3)


def test_the_best_sets_are_the_best_of_all_sets():
    torch.manual_seed(0)
    deltas = {(a, b): torch.randn(()).item() for a in range(6) for b in range(a + 1, min(a + 4, 7))}
    found = best_sets(deltas, 7, 4)
    for r in range(1, 5):
        sets = [spans for n in range(1, 4) for spans in itertools.combinations(sorted(deltas), n)
                if sum(b - a for a, b in spans) == r and all(s[1] < t[0] for s, t in zip(spans, spans[1:]))]
        assert found[r][0] == pytest.approx(min(sum(deltas[s] for s in spans) for spans in sets))
        assert sum(b - a for a, b in found[r][1]) == r


# ---- the command ----

TINY = ["--n_layer=3", "--n_head=2", "--n_embd=32", "--block_size=16", "--vocab_size=300", "--batch_size=4", "--max_iters=12", "--eval_interval=12", "--warmup_iters=2", "--device=cpu"]


@pytest.fixture
def trained(run, text, tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install matplotlib")
    assert run(train.main, *TINY, f"--text={text}", f"--data_dir={tmp_path}/data", "--similarity_every=5")[0] == 0
    return tmp_path / "out" / "full"


def test_maps_are_printed_and_drawn(run, trained):
    status, out, _ = run(similarity.main, trained, "--windows=2")
    rows = list(csv.reader((trained / "similarity.csv").open()))
    assert status == 0 and len(rows) == 4 and float(rows[1][1]) == pytest.approx(1, abs=1e-3)
    assert "mean cosine" in out and "100" in out and len(list(csv.reader((trained / "spread.csv").open()))) == 4
    assert (trained / "similarity.png").read_bytes()[:4] == (trained / "spread.png").read_bytes()[:4] == b"\x89PNG"


def test_maps_over_training_are_drawn(run, trained):
    steps = [line["step"] for line in map(json.loads, (trained / "log.jsonl").read_text().splitlines()) if "similarity" in line]
    assert steps == [0, 5, 10, 12]
    status, out, _ = run(similarity.main, trained, "--history")
    assert status == 0 and "4 maps" in out and (trained / "history.png").read_bytes()[:4] == b"\x89PNG"


def test_a_scan_is_written_drawn_and_continued(run, trained, monkeypatch):
    flags = [trained, "--scan", "--heads=match", "--refit", "--windows=2", "--longest=3", "--most=2"]
    whole, seen = similarity.scan, []

    def stops(*args, **more):
        for i, found in enumerate(whole(*args, **more)):
            if i == 1 and not seen:
                seen.append(True)
                raise KeyboardInterrupt
            yield found
    monkeypatch.setattr(similarity, "scan", stops)
    status, out, err = run(similarity.main, *flags)
    assert status == 2 and "holds 1 spans" in err and err.count("\n") == 1
    status, out, err = run(similarity.main, *flags)
    rows = list(csv.DictReader((trained / "scan-weights-match.csv").open()))
    assert status == 0 and sorted((row["anchor"], row["last"]) for row in rows) == [("-1", "-1"), ("0", "1"), ("0", "2"), ("1", "2")]
    assert out.count("\nspan ") == 2                                            # only what was missing
    assert (trained / "scan-weights-match.png").exists() and "best sets" in out
    model, _, info = checkpoint.load(trained)
    sets = list(csv.DictReader((trained / "sets-weights-match.csv").open()))
    assert [row["reuse_layers"] for row in sets] == ["1", "2"] and sets[1]["spans"] == "0-2"
    assert {"percent_measured", "percent_refitted"} <= sets[1].keys()
    assert float(sets[1]["cache_saved"]) == pytest.approx(1 / 3)
    status, _, err = run(similarity.main, trained, "--scan", "--heads=match", "--windows=3")
    assert status == 2 and "cannot be continued" in err


def test_wrong_use_gets_one_line_and_status_2(run, trained, tmp_path):
    assert run(train.main, *TINY, "--share=1-2", f"--text={tmp_path}/none")[0] == 2
    for flags in (["nowhere"], [trained, "--scan", "--heads=other"], [trained, "--scan", "--heads=mix", "--share_kind=kv"], [trained, "--longest=1"],
                  [trained, "--windows=0"], [trained, "--out_dir=" + str(trained / "log.jsonl")], [trained, "--device=none"], [tmp_path, "--history"], []):
        status, _, err = run(similarity.main, *flags)
        assert status == 2 and err.count("\n") == 1 and "Traceback" not in err, flags


# ---- heads in training and sampling ----

def test_heads_are_fitted_by_the_sampler_and_by_fine_tuning_and_stored(run, trained, text, tmp_path):
    status, out, _ = run(sample.main, trained, "--share=0-2", "--heads=mix", "--refit", "--max_new_tokens=3")
    assert status == 0 and "weights 0-2 mix" in out and "they agree" in out
    status, out, err = run(train.main, f"--init_from={trained}", "--share=0-2", "--heads=match", "--refit", f"--text={text}", f"--data_dir={tmp_path}/data", "--max_iters=2", "--device=cpu")
    assert status == 0, err
    model, _, _ = checkpoint.load(tmp_path / "out" / "weights-0-2-match-refit-from-full")
    assert model.config.heads == "match" and model.blocks[1].attn.source.dtype == torch.int64
    assert run(sample.main, tmp_path / "out" / "weights-0-2-match-refit-from-full", "--max_new_tokens=3")[0] == 0
    assert run(sample.main, tmp_path / "out" / "weights-0-2-match-refit-from-full", "--share=0-2", "--heads=mix", "--max_new_tokens=3")[0] == 0


def test_a_mixture_is_learned_from_scratch(run, text, tmp_path):
    status, _, err = run(train.main, *TINY, "--share=0-2", "--heads=mix", f"--text={text}", f"--data_dir={tmp_path}/data", "--learning_rate=0.01")
    assert status == 0, err
    mix = checkpoint.load(tmp_path / "out" / "weights-0-2-mix")[0].blocks[1].attn.mix
    assert not torch.equal(mix, torch.eye(2)) and torch.allclose(mix, torch.eye(2), atol=0.5)
    status, _, err = run(train.main, *TINY, "--share=0-2", "--heads=match", f"--text={text}", f"--data_dir={tmp_path}/data", "--out_dir=out/x")
    assert status == 2 and "--init_from" in err
