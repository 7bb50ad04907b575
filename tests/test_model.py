"""The model against a plain float64 formulation of the same mathematics, written with loops over heads."""

import math

import pytest
import torch
from torch.nn import functional as F

from minisa.checkpoint import for_decoding, load_weights
from minisa.model import GPT, GPTConfig, KVCache, linear, rope_angles, weighted_sum

MODES = [dict(share=share, share_kind=kind, n_kv_head=G)
         for G in (4, 2, 1)
         for share, kind in (("", "weights"), ("1-3", "weights"), ("1-3", "kv"), ("0-1,2-4", "weights"), ("0-1,2-4", "kv"))]
RANKED = [dict(share=share, share_kind="weights", n_kv_head=G, share_rank=R) for share, G, R in (("1-3", 4, 2), ("0-1,2-4", 2, 4))]
modes = pytest.mark.parametrize("mode", MODES + RANKED, ids=lambda m: f"{m['share_kind']}{m['share']}-kv{m['n_kv_head']}-rank{m.get('share_rank', 0)}")


def make(block_size=12, **mode):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=block_size, vocab_size=50, n_layer=5, n_head=4, n_embd=32, n_hidden=48, **mode)).eval()
    with torch.no_grad():
        for p in model.parameters():            # far from its small initial values, so that attention is far from uniform
            p.add_(torch.randn_like(p) * 0.25)
    return model


def tokens(B, T):
    return torch.randint(50, (B, T), generator=torch.Generator().manual_seed(1))


def plain(model, idx, window=None):
    """→ logits (B, T, V) and the attention weights of every layer. A token sees itself and the window - 1 tokens before."""
    config = model.config
    w = {name: p.double() for name, p in model.named_parameters()}
    H, G, D = config.n_head, config.n_kv_head, config.n_embd // config.n_head
    B, T = idx.shape
    t = torch.arange(T)
    visible = (t[:, None] >= t) & (t[:, None] - t < (window or T))
    R = config.share_rank

    def rms(x, gain):
        return x / (x.pow(2).mean(-1, keepdim=True) + config.norm_eps).sqrt() * gain

    def rope(x):                                # (B, T, D): numbers i and i + D/2 are the two parts of a complex number
        half = x.size(-1) // 2
        angle = torch.outer(t.double(), config.rope_base ** -(torch.arange(half).double() / half))
        z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat((z.real, z.imag), -1)

    x, every_P = w["embed.weight"][idx], []
    for layer in range(config.n_layer):
        span = next(((a, b) for a, b in config.spans if a < layer <= b), None)      # reuse layers only
        n_q, n_k, n_v = (H, G, G) if span is None or R else (0, 0, G) if config.share_kind == "weights" else (H, 0, 0)
        narrow = R if span and R else D
        made = (rms(x, w[f"blocks.{layer}.norm1.weight"]) @ w[f"blocks.{layer}.attn.qkv.weight"].T).split([narrow] * (n_q + n_k) + [D] * n_v, dim=-1)
        q, new_k, new_v = [rope(h) for h in made[:n_q]], [rope(h) for h in made[n_q:n_q + n_k]], made[n_q + n_k:]
        k, v = new_k or k, new_v or v           # borrowed ones stay those of the layer below
        if q:
            scores = [q[h] @ k[h * G // H].mT / math.sqrt(narrow) for h in range(H)]
            anchor = scores if span is None else anchor
            P = [(scores[h] + (anchor[h] if span and R else 0)).masked_fill(~visible, -math.inf).softmax(-1) for h in range(H)]
        every_P.append(torch.stack(P, 1))
        y = torch.cat([P[h] @ v[h * G // H] for h in range(H)], -1)
        x = x + y @ w[f"blocks.{layer}.attn.out.weight"].T
        gate, up = (rms(x, w[f"blocks.{layer}.norm2.weight"]) @ w[f"blocks.{layer}.mlp.gate_up.weight"].T).chunk(2, -1)
        x = x + (gate * gate.sigmoid() * up) @ w[f"blocks.{layer}.mlp.down.weight"].T
    return rms(x, w["norm.weight"]) @ w["embed.weight"].T, every_P


def close(a, b, tolerance=1e-4):
    return (a.double() - b.double()).abs().max() <= tolerance * max(1.0, b.abs().max().item())


@modes
def test_logits_and_loss_are_those_of_the_plain_formulation(mode):
    model, idx, targets = make(**mode), tokens(2, 12), tokens(2, 12).flip(0)
    with torch.no_grad():
        logits, loss = model(idx, targets)
        expected, _ = plain(model, idx)
    assert close(logits, expected)
    assert loss.item() == pytest.approx(F.cross_entropy(expected.flatten(0, 1), targets.flatten()).item(), abs=1e-4)


@modes
def test_gradients_are_those_of_the_plain_formulation(mode):
    model, idx, targets = make(**mode), tokens(2, 12), tokens(2, 12).flip(0)
    model(idx, targets)[1].backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    F.cross_entropy(plain(model, idx)[0].flatten(0, 1), targets.flatten()).backward()
    for name, p in model.named_parameters():
        assert close(got[name], p.grad, 1e-3), name


@modes
@pytest.mark.parametrize("chunks", [[12], [1] * 12, [5, 1, 4, 2]], ids=str)
def test_cached_logits_are_the_uncached_ones(mode, chunks):
    model, idx = make(**mode), tokens(3, 12)
    cache = KVCache(model.config, 3, 12)
    with torch.inference_mode():
        cached = torch.cat([model(part, cache=cache)[0] for part in idx.split(chunks, dim=1)], 1)
        uncached, _ = model(idx)
    assert close(cached, uncached) and close(cached, plain(model, idx)[0])


@modes
@pytest.mark.parametrize("chunks", [[1] * 40, [12, 12, 12, 4], [7, 7, 1, 1, 7, 7, 7, 3], [11, 2, 12, 1, 14 - 2, 2]], ids=str)
def test_after_wrapping_each_layer_attends_to_the_last_block_size_keys(mode, chunks):
    model, idx = make(**mode), tokens(2, 40)
    cache = KVCache(model.config, 2, 12)
    with torch.inference_mode():
        cached = torch.cat([model(part, cache=cache)[0] for part in idx.split(chunks, dim=1)], 1)
    assert cache.length == 40
    assert close(cached, plain(model, idx, window=12)[0])


def test_a_reuse_layer_has_no_query_and_key_weights_and_a_borrowing_cla_layer_no_key_and_value_weights():
    shapes = lambda **mode: [tuple(block.attn.qkv.weight.shape) for block in make(**mode).blocks]
    assert shapes(n_kv_head=2) == [(64, 32)] * 5
    assert shapes(n_kv_head=2, share="1-3") == [(64, 32), (64, 32), (16, 32), (16, 32), (64, 32)]
    assert shapes(n_kv_head=2, share="1-3", share_kind="kv") == [(64, 32), (64, 32), (32, 32), (32, 32), (64, 32)]


def test_a_reuse_layer_stores_values_only():
    def numbers(**mode):
        cache = KVCache(make(n_kv_head=2, **mode).config, batch_size=3, size=7)
        return [(k.numel(), v.numel()) for k, v in zip(cache.k, cache.v)], cache.nbytes
    one = 3 * 2 * 7 * 8                         # B · G · size · D
    assert numbers() == ([(one, one)] * 5, 10 * one * 4)
    assert numbers(share="1-3") == ([(one, one), (one, one), (0, one), (0, one), (one, one)], 8 * one * 4)
    assert numbers(share="1-3", share_kind="kv") == ([(one, one), (one, one), (0, 0), (0, 0), (one, one)], 6 * one * 4)


@modes
def test_attention_weights_sum_to_one_and_a_reuse_layers_are_its_anchors(mode):
    model, idx = make(**mode), tokens(2, 12)
    found = model.attention_weights(idx)
    for P, expected in zip(found, plain(model, idx)[1]):
        assert close(P, expected) and close(P.sum(-1), torch.ones(2, 4, 12))
    if mode["share"] == "1-3" and mode["share_kind"] == "weights" and "share_rank" not in mode:
        assert torch.equal(found[1], found[2]) and torch.equal(found[1], found[3])
        assert not close(found[0], found[1], 1e-2) and not close(found[3], found[4], 1e-2)


@pytest.mark.parametrize("mode", RANKED, ids=str)
def test_a_correction_starts_at_nothing_and_can_be_learned(mode):
    full, plain_sharing, ranked = make(n_kv_head=mode["n_kv_head"]), make(**{**mode, "share_rank": 0}), make(**mode)
    for model in (plain_sharing, ranked):
        load_weights(model, full.state_dict(), full.config)
    idx = tokens(2, 12)
    assert close(ranked(idx)[0], plain_sharing(idx)[0])
    ranked(idx, idx)[1].backward()
    n_q = ranked.blocks[3].attn.made[0]
    assert n_q == 4 * mode["share_rank"] and ranked.blocks[3].attn.qkv.weight.grad[:n_q].abs().max() > 1e-6


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode["share"]], ids=str)
def test_full_attention_weights_load_into_a_model_that_shares(mode):
    full, shared = make(n_kv_head=mode["n_kv_head"]), make(**mode)
    load_weights(shared, full.state_dict(), full.config)
    for layer, (old, new) in enumerate(zip(full.blocks, shared.blocks)):
        rows = old.attn.qkv.weight.split([n * 8 for n in (4, mode["n_kv_head"], mode["n_kv_head"])])
        kept = [part for part, n in zip(rows, new.attn.made) if n]
        assert torch.equal(torch.cat(kept), new.attn.qkv.weight), layer
    assert torch.equal(full.embed.weight, shared.embed.weight) and torch.equal(full.blocks[2].mlp.down.weight, shared.blocks[2].mlp.down.weight)


def test_weights_trained_to_share_do_not_load_into_a_model_that_shares_less_or_otherwise():
    shared = make(share="1-3")
    for other in (make(), make(share="1-2"), make(share="1-3", share_kind="kv")):
        with pytest.raises(ValueError, match="--share"):
            load_weights(other, shared.state_dict(), shared.config)


@modes
def test_greedy_text_is_the_argmax_of_the_plain_formulation_past_block_size(mode):
    model, idx = make(**mode), tokens(2, 5)
    got = model.generate(idx, 20, temperature=0)
    for _ in range(20):
        idx = torch.cat((idx, plain(model, idx, window=12)[0][:, -1:].argmax(-1)), 1)
    assert torch.equal(got, idx)


def test_a_prompt_longer_than_block_size_is_read_whole():
    model, idx = make(share="1-3"), tokens(1, 30)
    assert model.generate(idx, 1, temperature=0)[0, -1] == plain(model, idx, window=12)[0][0, -1].argmax()


def test_the_same_seed_gives_the_same_text_and_another_seed_another():
    model, idx = make(), tokens(1, 3)
    draw = lambda seed: model.generate(idx, 30, generator=torch.Generator().manual_seed(seed)).tolist()
    assert draw(5) == draw(5) != draw(6)


def test_temperature_and_top_k_shape_the_distribution_that_is_drawn_from():
    model, idx = make(), tokens(1, 3).expand(4000, 3)
    logits = plain(model, idx[:1])[0][0, -1]
    allowed = logits.topk(5).indices
    expected = torch.zeros(50, dtype=torch.float64)
    expected[allowed] = (logits[allowed] / 2.5).softmax(-1)
    drawn = model.generate(idx, 1, temperature=2.5, top_k=5, generator=torch.Generator().manual_seed(0))[:, -1]
    assert (drawn.bincount(minlength=50) / 4000 - expected).abs().max() < 0.04
    assert set(drawn.tolist()) == set(allowed.tolist())
    assert torch.equal(model.generate(idx[:1], 9, top_k=1), model.generate(idx[:1], 9, temperature=0))


def test_a_later_token_changes_nothing_before_it():
    for mode in MODES:
        model, idx = make(**mode), tokens(1, 12)
        changed = idx.clone()
        changed[0, 7] = (changed[0, 7] + 1) % 50
        before, after = model(idx)[0], model(changed)[0]
        assert torch.equal(before[:, :7], after[:, :7]) and not close(before[:, 7:], after[:, 7:])


def test_positions_far_away_are_as_good_as_near_ones():
    model, idx = make(), tokens(1, 12)
    near, far = KVCache(model.config, 1, 12), KVCache(model.config, 1, 12)
    with torch.inference_mode():
        for token in tokens(1, 12).split(1, 1):
            model(token, cache=near)
        far.k, far.v, far.length = [k.clone() for k in near.k], [v.clone() for v in near.v], 12
        shift = 12 * 10**8                      # a multiple of the cache's size: rotate its keys as if read there
        cos, sin = rope_angles(model.config, torch.tensor([shift]))
        from minisa.model import rotate
        far.k, far.length = [rotate(k, (cos, sin)) for k in far.k], 12 + shift
        assert close(model(idx[:, :1], cache=far)[0], model(idx[:, :1], cache=near)[0], 1e-3)


def test_linear_and_weighted_sum_are_plain_matrix_products():
    x, weight = torch.randn(1, 1, 48), torch.randn(64, 48)
    with torch.no_grad():
        assert close(linear(x, weight), x @ weight.T) and linear(x, weight).shape == (1, 1, 64)
        assert close(linear(x, weight[:63]), x @ weight[:63].T)                     # not divisible among the threads
    P, v = torch.rand(2, 6, 3, 5), torch.randn(2, 2, 5, 4)
    assert close(weighted_sum(P, v), torch.stack([P[:, h] @ v[:, h // 3] for h in range(6)], 1))


@pytest.mark.parametrize("wrong, flag", [
    (dict(share="3-1"), "--share=3-1"), (dict(share="2-2"), "--share=2-2"), (dict(share="1-5"), "--share=1-5"), (dict(share="1"), "--share=1"),
    (dict(share="1-2,2-4"), "--share=1-2,2-4"), (dict(share="3-4,0-1"), "--share=3-4,0-1"), (dict(share="a-b"), "--share=a-b"), (dict(share="1-2,"), "--share=1-2,"),
    (dict(share="-1-2"), "--share=-1-2"), (dict(share_kind="keys"), "--share_kind=keys"), (dict(n_embd=30), "--n_embd=30"),
    (dict(n_embd=36), "--n_embd=36"), (dict(n_kv_head=3), "--n_kv_head=3"), (dict(n_layer=0), "--n_layer=0"), (dict(dropout=1.0), "--dropout=1.0"),
    (dict(share="1-2", share_rank=3), "--share_rank=3"), (dict(share="1-2", share_rank=16), "--share_rank=16"), (dict(share="1-2", share_rank=-2), "--share_rank=-2"),
    (dict(share_rank=2), "--share_rank=2"), (dict(share="1-2", share_kind="kv", share_rank=2), "--share_rank=2"), (dict(share="1-2", heads="mix", share_rank=2), "--share_rank=2"),
], ids=str)
def test_a_wrong_config_is_refused_by_the_name_of_its_flag(wrong, flag):
    with pytest.raises(ValueError, match="^" + flag):
        GPTConfig(**{**dict(n_layer=5, n_head=4, n_embd=32), **wrong})


def test_too_many_tokens_at_once_are_refused():
    model = make()
    with pytest.raises(ValueError, match="13 tokens"):
        model(tokens(1, 13))
    with pytest.raises(ValueError, match="8 tokens"):
        model(tokens(1, 8), cache=KVCache(model.config, 1, 7))


@pytest.mark.parametrize("n_out, n_in", [(24, 16), (64, 16), (7, 16), (24, 9), (7, 9)])
@pytest.mark.parametrize("by_columns", [False, True])
def test_one_token_is_multiplied_the_same_however_the_weight_is_stored(n_out, n_in, by_columns):
    torch.manual_seed(0)
    weight, x = torch.randn(n_out, n_in), torch.randn(1, 1, n_in)
    stored = weight.mT.contiguous().mT if by_columns else weight
    with torch.inference_mode():
        assert linear(x, stored).shape == (1, 1, n_out)
        torch.testing.assert_close(linear(x, stored).double(), x.double() @ weight.double().T, atol=1e-5, rtol=1e-5)


def test_storing_for_decoding_changes_no_output():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=100, block_size=32, n_layer=2, n_head=2, n_embd=32, tied=False)).eval()
    idx = torch.randint(100, (1, 9))
    logits, tokens = model(idx)[0], model.generate(idx, 40, 0)
    for_decoding(model)
    assert model.embed.weight.stride(0) == model.unembed.weight.stride(0) == model.blocks[0].mlp.gate_up.weight.stride(0) == 1 != model.blocks[0].attn.out.weight.stride(0)
    torch.testing.assert_close(model(idx)[0], logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(model.generate(idx, 40, 0), tokens)
