"""Narrower keys and values: exact where nothing is lost, as good as predicted where something is."""

import pytest
import torch

from minisa import eigen
from minisa.model import GPT, GPTConfig, KVCache, causal_mask, rope_angles
from minisa.similarity import refit


def make(**mode):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**dict(block_size=48, vocab_size=50, n_layer=4, n_head=4, n_kv_head=2, n_embd=64), **mode})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


WINDOWS = torch.randint(50, (6, 48), generator=torch.Generator().manual_seed(1))


def low_rank(model, r):
    """Make the keys and values of every head lie in r dimensions."""
    D, G = model.config.head_dim, model.config.n_kv_head
    for block in model.blocks:
        q, k, v = block.attn.qkv.weight.data.split(block.attn.made)
        for part in (k, v):
            for rows in part.view(G, D, -1) if len(part) else []:
                rows.copy_(torch.randn(D, r) / r @ rows[:r])
    return model


@pytest.mark.parametrize("mode", [dict(), dict(share="1-3"), dict(share="0-1,2-3"), dict(share="1-3", share_kind="kv"), dict(share="0-3", heads="mix")], ids=str)
def test_what_is_of_low_rank_is_compressed_without_loss(mode):
    model = low_rank(make(**mode), 5)
    small = eigen.compress(model, WINDOWS, rank=5)
    with torch.no_grad():
        torch.testing.assert_close(small(WINDOWS)[0], model(WINDOWS)[0], atol=1e-4, rtol=1e-3)
        assert (eigen.compress(model, WINDOWS, rank=3)(WINDOWS)[0] - model(WINDOWS)[0]).abs().max() > 0.05


def test_at_full_rank_nothing_changes():
    model = make(share="1-2")
    with torch.no_grad():
        torch.testing.assert_close(eigen.compress(model, WINDOWS, rank=16)(WINDOWS)[0], model(WINDOWS)[0], atol=1e-4, rtol=1e-4)


def test_a_reuse_layer_has_only_values_to_compress():
    small = eigen.compress(make(share="1-3"), WINDOWS, rank=6)
    cache = KVCache(small.config, 1, 10)
    assert [(k.size(3), v.size(3)) for k, v in zip(cache.k, cache.v)] == [(6, 6), (6, 6), (0, 6), (0, 6)]
    assert [hasattr(block.attn, "restore") for block in small.blocks] == [True, True, False, False]


@pytest.mark.parametrize("mode", [dict(), dict(share="1-3"), dict(share="1-2", share_kind="kv")], ids=str)
@pytest.mark.parametrize("chunks", [[48], [1] * 48, [20, 1, 27]], ids=lambda c: f"{len(c)} chunks")
def test_cached_logits_are_the_uncached_ones_and_survive_wrapping(mode, chunks):
    small = eigen.compress(make(**mode), WINDOWS, rank=7)
    cache = KVCache(small.config, 6, 48)
    with torch.no_grad():
        cached = torch.cat([small(part, cache=cache)[0] for part in WINDOWS.split(chunks, dim=1)], 1)
        torch.testing.assert_close(cached, small(WINDOWS)[0], atol=1e-4, rtol=1e-3)
        ring, long = KVCache(small.config, 6, 48), torch.cat((WINDOWS, WINDOWS), 1)      # 96 tokens, 48 slots
        a = torch.cat([small(part, cache=ring)[0] for part in long.split(chunks * 2, dim=1)], 1)
        ring = KVCache(small.config, 6, 48)
        b = torch.cat([small(part, cache=ring)[0] for part in long.split(1, dim=1)], 1)
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_the_basis_is_the_best_of_its_rank_in_its_metric():
    torch.manual_seed(0)
    x, a = torch.randn(2, 500, 6, dtype=torch.float64) * torch.tensor([5, 1, 3, .1, 2, 1]), torch.randn(2, 9, 6, dtype=torch.float64)
    E, F, errors = eigen.basis(x.mT @ x, a.mT @ a)

    def error(P):                                       # Σ |a (x − P x)|²
        return ((x - x @ P.mT) @ a.mT).square().sum().item()

    for r in range(1, 6):
        P = F[:, :r].mT @ E[:, :r]
        assert error(P) == pytest.approx(errors[:, r:].sum().item(), rel=1e-2, abs=1e-6 * errors.sum().item())
        for _ in range(20):                             # no other projection of that rank is better
            Q = torch.linalg.qr(P + 0.3 * torch.randn_like(P)).Q[..., :r]
            assert error(Q @ torch.linalg.pinv(Q)) >= error(P) * (1 - 1e-2)


def test_the_metric_beats_plain_singular_vectors():
    model = make()
    plain = eigen.basis
    with torch.no_grad():
        exact = model(WINDOWS)[0]
        ours = (eigen.compress(model, WINDOWS, rank=8)(WINDOWS)[0] - exact).square().mean()
        try:
            eigen.basis = lambda S, M: plain(S, torch.eye(S.size(1), dtype=S.dtype).expand_as(M))
            theirs = (eigen.compress(model, WINDOWS, rank=8)(WINDOWS)[0] - exact).square().mean()
        finally:
            eigen.basis = plain
    assert ours < theirs


def test_the_error_of_the_first_layer_is_about_what_was_allowed():
    model = make(n_layer=1)
    positions = torch.arange(48)
    angles, mask  = rope_angles(model.config, positions), causal_mask(positions, positions, 48, torch.zeros(1))
    with torch.no_grad():
        x = model.embed(WINDOWS)
        y = model.blocks[0].attn(model.blocks[0].norm1(x), angles, mask)[0]
        for allowed in (0.05, 0.1, 0.2):
            small = eigen.compress(model, WINDOWS, error=allowed)
            got = small.blocks[0].attn(small.blocks[0].norm1(x), angles, mask)[0]
            error = ((got - y).square().sum(-1) / (x + y).square().sum(-1)).mean().sqrt().item()
            assert 0.4 * allowed < error < 1.5 * allowed, (allowed, small.config.ranks)


def test_the_cheapest_numbers_are_dropped_first():
    k, v = torch.tensor([9.0, 2.0, 0.5, 0.1]), torch.tensor([8.0, 1.0, 0.2, 0.0])
    assert eigen.drop(k, v, 0.0) == (4, 3) and eigen.drop(k, v, 0.31) == (3, 2) and eigen.drop(k, v, 0.85) == (2, 2)
    assert eigen.drop(k, v, 1e9) == (1, 1)


def test_refitting_brings_a_compressed_model_nearer_to_the_full_one():
    model = make()
    small = eigen.compress(model, WINDOWS, rank=8)
    with torch.no_grad():
        exact = model(WINDOWS)[0]
        before = (small(WINDOWS)[0] - exact).square().mean()
        refit(small, model, WINDOWS, ridge=0.01)
        assert (small(WINDOWS)[0] - exact).square().mean() < before
        assert torch.equal(model(WINDOWS)[0], exact)


def test_what_cannot_be_compressed_is_refused():
    small = eigen.compress(make(), WINDOWS, rank=8)
    with pytest.raises(ValueError, match="compressed already"):
        eigen.compress(small, WINDOWS, rank=4)
    with pytest.raises(ValueError, match="--eigen_rank=17: a head of this model is only 16 wide"):
        eigen.compress(make(), WINDOWS, rank=17)
    with pytest.raises(ValueError, match="ranks: must be 4 pairs"):
        GPTConfig(n_layer=4, ranks=[[1, 2]])
