"""Squeezed caches against a plain simulation with Python sets of tokens."""

import math

import pytest
import torch
from torch.nn import functional as F

from minisa.eigen import compress
from minisa.model import GPT, GPTConfig, rope_angles, rotate
from minisa.squeeze import POLICIES, SINKS, budgets, loss, read, squeeze, units

MODES = [dict(), dict(n_kv_head=2), dict(share="1-3"), dict(share="1-2,3-4", n_kv_head=1), dict(share="1-3", share_kind="kv"), dict(share="0-2", heads="mix"),
         dict(share="1-3", share_rank=2)]
modes = pytest.mark.parametrize("mode", MODES, ids=str)
IDX = torch.randint(50, (2, 40), generator=torch.Generator().manual_seed(1))


def make(**mode):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**dict(block_size=64, vocab_size=50, n_layer=5, n_head=4, n_embd=32, n_hidden=48), **mode})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.25)
    return model


def plain(model, tokens, prompt, policy, rooms):
    """Logits (T, V) of one sequence, token by token. After `prompt` tokens each unit u keeps rooms[u], by sets of positions."""
    config = model.config
    H, G, D, R = config.n_head, config.n_kv_head, config.head_dim, config.share_rank
    groups = units(config)
    k, v = [[{} for _ in range(config.n_layer)] for _ in range(2)]
    kept, got, out = [set() for _ in groups], [{} for _ in groups], []

    def evict(u, length, room):
        while len(kept[u]) > room:
            if policy == "heavy":
                old = [p for p in kept[u] if p < length - rooms[u] // 2]
                kept[u].remove(min(old, key=lambda p: got[u][p]))
            else:
                kept[u].remove(min(p for p in kept[u] if policy == "window" or p >= SINKS))

    for t, token in enumerate(tokens.tolist()):
        x = model.embed.weight[token]
        for u, unit in enumerate(groups):
            if t >= prompt:
                evict(u, t, rooms[u] - 1)
            kept[u].add(t)
            got[u][t] = 0.0
            places = sorted(kept[u])
            for layer in unit:
                block = model.blocks[layer]
                attn, h = block.attn, block.norm1(x)
                made = attn.qkv.weight @ h
                n_q, n_k, n_v = attn.made

                def turned(x, n):
                    angles = [a[::D * n // len(x)] for a in rope_angles(config, torch.tensor(t))]
                    return rotate(x.view(1, n, 1, -1), angles).view(n, -1)
                if n_k:
                    k[layer][t] = turned(made[n_q:n_q + n_k], G)
                v[layer][t] = made[n_q + n_k:]
                source = unit[0] if config.share_kind == "kv" else layer
                if n_q:
                    queries, keys = turned(made[:n_q], H), torch.stack([k[source][p] for p in places])      # (H, D), (S, G, D)
                    scores = torch.stack([keys[:, g * G // H] @ queries[g] for g in range(H)]) / math.sqrt(n_q // H)
                    base = scores if layer == unit[0] else base
                    P = (scores + base if R and layer != unit[0] else scores).softmax(-1)
                    P_anchor = P if layer == unit[0] else P_anchor
                else:
                    P = attn.mix @ P_anchor if config.heads == "mix" else P_anchor
                for p, weight in zip(places, P.sum(0).tolist()):
                    got[u][p] += weight
                values = torch.stack([v[source][p].view(G, D) for p in places])             # (S, G, D)
                y = torch.cat([P[g] @ values[:, g * G // H] for g in range(H)])
                x = x + attn.out.weight @ y
                x = x + block.mlp(block.norm2(x))
            if t == prompt - 1:
                evict(u, prompt, rooms[u])
        out.append(model.head(model.norm(x)))
    return torch.stack(out)


@modes
@pytest.mark.parametrize("policy", POLICIES)
def test_a_squeezed_cache_attends_to_what_the_policy_keeps(mode, policy):
    model = make(**mode)
    with torch.no_grad():
        cache = squeeze(*read(model, IDX[:, :25]), 12, policy, 0.5)
        rooms = [where.size(1) for where in cache.where]
        got = torch.stack([model(IDX[:, t:t + 1], cache=cache)[0][:, 0] for t in range(25, 40)], 1)
        for row, expected in zip(got, [plain(model, tokens, 25, policy, rooms) for tokens in IDX]):
            torch.testing.assert_close(row, expected[25:], atol=2e-3, rtol=1e-3)


@modes
def test_with_room_for_all_nothing_changes(mode):
    model = make(**mode)
    with torch.no_grad():
        cache = squeeze(*read(model, IDX[:, :20]), 40, "heavy", None)
        got = torch.cat([model(IDX[:, t:t + 1], cache=cache)[0] for t in range(20, 40)], 1)
        torch.testing.assert_close(got, model(IDX)[0][:, 20:], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("policy", POLICIES)
def test_it_goes_on_with_narrow_keys_that_are_rotated_when_read(policy):
    model = compress(make(share="2-4"), IDX, rank=8)            # full rank: the same model
    small = compress(make(share="2-4"), IDX, rank=5)
    for m in (model, small):
        with torch.no_grad():
            kept = squeeze(*read(m, IDX[:, :25]), 40, policy, None)
            got = torch.cat([m(IDX[:, t:t + 1], cache=kept)[0] for t in range(25, 40)], 1)
            torch.testing.assert_close(got, m(IDX)[0][:, 25:], atol=1e-3, rtol=1e-3)


def test_memory_is_freed_and_the_same_for_equal_and_unequal_budgets():
    model = make(block_size=256)
    idx = torch.randint(50, (3, 200))
    full, cosines, scores = read(model, idx)
    equal, unequal = (squeeze(full, cosines, scores, 60, "sinks", cut) for cut in (None, 0.5))
    assert equal.nbytes == full.nbytes * 60 // 200 and 0.97 * equal.nbytes < unequal.nbytes <= equal.nbytes
    assert len({where.size(1) for where in unequal.where}) == 2
    before = unequal.nbytes
    for _ in range(5):
        model(idx[:, :1], cache=unequal)
    assert unequal.nbytes == before and unequal.length == 205


def test_layers_that_change_the_stream_least_are_cut_and_the_bytes_stay():
    config = GPTConfig(n_layer=8, share="5-7")
    cosines = [0.5, 0.6, 0.9, 0.91, 0.99, 0.995, 0.995, 0.995]
    found = budgets(config, cosines, 100, 0.4)
    assert found[4] == found[5] == 40 and len(set(found[:4])) == 1
    size = [2, 2, 2, 2, 2, 4]                                   # the span holds k once and v three times
    total = sum(n * s for n, s in zip(found, size))
    assert 100 * sum(size) - sum(size) < total <= 100 * sum(size)
    assert budgets(config, cosines, 100, None) == budgets(config, cosines, 100, 1) == budgets(config, [0.5] * 8, 100, 0.4) == [100] * 6


def test_importance_is_the_cosine_before_and_after_attention():
    model = make(block_size=300, n_kv_head=2)
    idx = torch.randint(50, (2, 290))                           # more than one chunk
    before, after = {}, {}
    for layer, block in enumerate(model.blocks):
        block.norm1.register_forward_pre_hook(lambda _, args, layer=layer: before.update({layer: args[0]}))
        block.norm2.register_forward_pre_hook(lambda _, args, layer=layer: after.update({layer: args[0]}))
    with torch.no_grad():
        P = model.attention_weights(idx)
        expected = [F.cosine_similarity(before[layer], after[layer], dim=-1).mean().item() for layer in range(5)]
        cache, cosines, scores = read(model, idx)
    assert cosines == pytest.approx(expected, abs=1e-5)
    for u in range(5):
        torch.testing.assert_close(scores[u], P[u].sum((1, 2)), atol=1e-3, rtol=1e-4)


def test_loss_is_that_of_the_tokens_after_the_prompt():
    model = make()
    windows = torch.randint(50, (3, 41))
    with torch.no_grad():
        expected = F.cross_entropy(model(windows[:, :-1])[0][:, 30:].flatten(0, 1), windows[:, 31:].flatten()).item()
    assert loss(model, windows, 30) == pytest.approx(expected, abs=1e-4)
    got = read(model, windows[:, :30])
    assert loss(model, windows, 30, got, budget=40, cut=None) == pytest.approx(expected, abs=1e-3)
    assert loss(model, windows, 30, got, budget=10) != pytest.approx(expected, abs=1e-3)


def test_a_squeezed_cache_takes_one_token_at_a_time():
    model = make()
    with pytest.raises(ValueError, match="one token at a time"):
        model(IDX[:, :2], cache=squeeze(*read(model, IDX), 20))


def test_generation_goes_on_past_the_prompt_and_the_budget():
    model = make()
    cache = squeeze(*read(model, IDX[:, :-1]), 12)
    out = model.generate(IDX[:, -1:], 50, temperature=0, cache=cache)
    assert out.shape == (2, 51) and cache.length == 39 + 50
