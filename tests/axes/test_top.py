"""--share_kind=top-K against plain.py with a reuse layer in plain Python: sorted lists of places."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import minisa
from minisa import decode, plain
from minisa.axes import eigen
from minisa.axes.squeeze import Squeezing, read
from minisa.cost import measure, predict
from minisa.kit import checkpoint
from minisa.kit.tokenizer import Tokenizer
from minisa.model import GPTConfig, KVCache
from tests.core.test_decode import on_torch
from tests.core.test_model import close, make, plainly, tokens

K = 3
MODES = [dict(share=share, n_kv_head=G) for G in (4, 2, 1) for share in ("1-3", "0-1,2-4")]
modes = pytest.mark.parametrize("mode", MODES, ids=str)

def few_places(weights, mask, k):
    """weights (T, T) → (T, T): 0 at the k visible places of each row that weigh most, else -inf."""
    hidden = torch.full_like(mask, -math.inf)
    for t, row in enumerate(weights.tolist()):
        visible = [s for s in range(len(row)) if mask[t, s] == 0]
        hidden[t, sorted(visible, key=lambda s: row[s])[-k:]] = 0.0
    return hidden

def plain_top(h, W, config, mask, below):
    """A reuse layer, as in plain.py; below: what the anchor handed up."""
    anchor_P, _, _ = below
    H, G = config.n_head, config.n_kv_head
    heads = plain.project(h, W, config.head_dim)
    q, k = ([plain.rope(head, config.rope_base) for head in part] for part in (heads[:H], heads[H:H + G]))
    P = []
    for g in range(G):
        of_group = range(g * H // G, (g + 1) * H // G)
        hidden = few_places(sum(anchor_P[h] for h in of_group), mask, int(config.share_kind[4:]))
        P += plain.attention_weights([q[h] for h in of_group], [k[g]], hidden)
    return plain.weighted_sum(P, heads[H + G:]), below

@pytest.fixture(autouse=True)
def known_to_plain(monkeypatch):
    for k in (1, K, 12, 100):
        monkeypatch.setitem(plain.REUSE, f"top-{k}", plain_top)

def top(k=K, **mode):
    return make(share_kind=f"top-{k}", **mode)

@modes
@pytest.mark.parametrize("k", [1, K])
def test_logits_and_gradients_are_those_of_the_plain_formulation(mode, k):
    model, idx, targets = top(k, **mode), tokens(2, 12), tokens(2, 12).flip(0)
    def gradients(logits):
        model.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}
    logits, expected = model(idx)[0], plainly(model, idx)[0]
    assert close(logits, expected) and not close(logits, make(**mode | {"share": ""})(idx)[0], 1e-2)
    got, wanted = gradients(logits), gradients(expected)
    assert all(close(got[name], wanted[name], 1e-3) for name in got)

@modes
@pytest.mark.parametrize("chunks", [[1] * 40, [12, 12, 12, 4], [7, 7, 1, 1, 7, 7, 7, 3]], ids=str)
@torch.no_grad()
def test_cached_logits_are_those_of_the_plain_formulation_past_the_rings_end(mode, chunks):
    model, idx = top(**mode), tokens(2, 40)
    cache = KVCache(model, 2, 12)
    cached = torch.cat([model(part, cache=cache)[0] for part in idx.split(chunks, dim=1)], 1)
    assert close(cached, plainly(model, idx, window=12)[0])

@modes
@torch.no_grad()
def test_numpy_decodes_the_same_past_the_rings_end(mode):
    model, idx = top(**mode), tokens(1, 45)
    cache = KVCache(model, 1, 12)
    model.read(idx[:, :20], cache)
    decoder = decode.Decoder(model, cache)
    logits = np.stack([decoder.step(token) for token in idx[0, 20:].tolist()])
    assert close(torch.from_numpy(logits), plainly(model, idx, window=12)[0][0, 20:])
    made = [each.generate(idx[:, :5], 60, 0) for each in (model, on_torch(model))]
    assert torch.equal(*made)

@modes
@pytest.mark.parametrize("k", [12, 100])
@torch.no_grad()
def test_with_k_of_the_whole_context_it_is_full_attention(mode, k):
    model, idx = top(k, **mode), tokens(1, 30)
    full = checkpoint.reconfigure(model, share="")
    assert close(model(idx[:, :12])[0], full(idx[:, :12])[0])
    caches = KVCache(model, 1, 12), KVCache(full, 1, 12)
    for token in idx[0]:
        ours, theirs = (each.read(token.view(1, 1), cache) for each, cache in zip((model, full), caches))
        assert close(ours, theirs)

@modes
def test_those_who_watch_see_weights_of_all_tokens_few_of_them_above_0(mode):
    model, idx, seen = top(**mode), tokens(2, 12), []
    whole = model.attention_weights(idx)
    cache = KVCache(model, 2, 12)
    model.read(idx[:, :-1], cache)
    with torch.no_grad():
        model.hidden(idx[:, -1:], cache, watch=seen.append)
    reuse = [layer for a, b in model.config.spans for layer in range(a + 1, b + 1)]
    for layer, (P, last) in enumerate(zip(whole, seen)):
        assert P.shape == (2, 4, 12, 12) and close(last, P[:, :, -1:])
        counts = (P > 0).sum(-1)
        assert counts.max() == (K if layer in reuse else 12) and counts[:, :, 0].max() == 1

@modes
@pytest.mark.parametrize("context", [1, 2, 7, 12])
@pytest.mark.parametrize("k", [1, K, 12])
def test_products_cache_and_bytes_read_are_those_that_are_billed(mode, context, k):
    model = top(k, **mode)
    bill = predict(model, context)
    assert measure(model, context, engine="numpy") == bill == measure(model, context)
    assert predict(model, context, 3) == measure(model, context, 3)
    full = predict(make(n_kv_head=mode["n_kv_head"]), context)
    n_reuse = sum(b - a for a, b in model.config.spans)
    unread = n_reuse * (context - min(k, context))              # tokens, each with k and v of G · D numbers
    assert full.read_bytes - bill.read_bytes == unread * 2 * mode["n_kv_head"] * 8 * 4
    assert full.decode_flops - bill.decode_flops == unread * 4 * 4 * 8
    assert (bill.cache_bytes, bill.params) == (full.cache_bytes, full.params)

def test_a_prompt_that_ends_in_a_chunk_of_one_token_is_billed():
    model = top(block_size=300, share="1-3")
    assert predict(model, 257) == measure(model, 257)

def test_a_squeezed_cache_reads_few_of_what_it_kept():
    model = top(block_size=64, share="1-3", n_kv_head=2)
    way = Squeezing(20, "heavy")
    cache = way.of(read(model, tokens(1, 49), [way]))
    measured = measure(model, 50, cache=cache)
    assert cache.predict(model, 50) == measured and cache.length == 50

def test_it_is_saved_loaded_and_shared_zero_shot(tmp_path):
    info, model, idx = dict(checkpoint.UNKNOWN), top(share="1-3"), tokens(1, 9)
    tokenizer = Tokenizer([bytes([b]) for b in range(50)])
    checkpoint.save(tmp_path / "top", model, tokenizer, info)
    assert torch.equal(minisa.load(tmp_path / "top")[0](idx)[0], model(idx)[0])
    checkpoint.save(tmp_path / "full", make(), tokenizer, info)
    zero_shot, _, _ = minisa.load(tmp_path / "full", "1-3", f"top-{K}")
    assert close(zero_shot(idx)[0], plainly(zero_shot, idx)[0])

@pytest.mark.parametrize("name", ["top", "top-", "top-0", "top-x", "top--3", "top-99999999999"])
def test_a_setting_that_is_no_number_is_refused_by_name(name):
    with pytest.raises(ValueError, match="^--share_kind=top-.*: give a number from 1 up, as in top-64$"):
        GPTConfig(share_kind=name)

def test_narrow_keys_refuse_it_in_one_line():
    with pytest.raises(ValueError, match="--rank, --error: .* take a model of another --share_kind"):
        eigen.compress(top(share="1-3"), tokens(1, 12), rank=4)
