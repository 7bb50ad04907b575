"""model.py against plain.py: the same mathematics in float64, one sequence and one head at a time."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from minisa import plain
from minisa.model import GPT, GPTConfig, KVCache, Step, rope_angles, rotate

SHARING = [("", "weights"), ("1-3", "weights"), ("1-3", "kv"), ("0-1,2-4", "weights"), ("0-1,2-4", "kv")]
MODES = [dict(share=share, share_kind=kind, n_kv_head=G) for G in (4, 2, 1) for share, kind in SHARING]
NAMES = [f"{mode['share_kind']}{mode['share']}-kv{mode['n_kv_head']}" for mode in MODES]
modes = pytest.mark.parametrize("mode", MODES, ids=NAMES)

def make(block_size=12, **mode):
    torch.manual_seed(0)
    shape = dict(vocab_size=50, n_layer=5, n_head=4, n_embd=32, n_hidden=48)
    model = GPT(GPTConfig(block_size=block_size, **shape | mode)).eval()
    with torch.no_grad():
        for p in model.parameters():            # far from its small initial values: P far from uniform
            p.add_(torch.randn_like(p) * 0.25)
    return model

def tokens(B, T):
    return torch.randint(50, (B, T), generator=torch.Generator().manual_seed(1))

def plainly(model, idx, window=None):
    """plain.gpt in float64, for a batch → logits (B, T, V), and P (B, H, T, T) of every layer."""
    w = {name: p.double() for name, p in model.named_parameters()}
    logits, every_P = zip(*(plain.gpt(w, model.config, row, window) for row in idx))
    return torch.stack(logits), [torch.stack(P) for P in zip(*every_P)]

def close(a, b, tolerance=1e-4):
    return (a.double() - b.double()).abs().max() <= tolerance * max(1.0, b.abs().max().item())

@modes
def test_logits_and_loss_are_those_of_the_plain_formulation(mode):
    model, idx, targets = make(**mode), tokens(2, 12), tokens(2, 12).flip(0)
    with torch.no_grad():
        logits, loss = model(idx, targets)
        expected, _ = plainly(model, idx)
    assert close(logits, expected)
    expected_loss = F.cross_entropy(expected.flatten(0, 1), targets.flatten()).item()
    assert loss.item() == pytest.approx(expected_loss, abs=1e-4)

@modes
def test_gradients_are_those_of_the_plain_formulation(mode):
    model, idx, targets = make(**mode), tokens(2, 12), tokens(2, 12).flip(0)
    model(idx, targets)[1].backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    F.cross_entropy(plainly(model, idx)[0].flatten(0, 1), targets.flatten()).backward()
    for name, p in model.named_parameters():
        assert close(got[name], p.grad, 1e-3), name

@modes
@pytest.mark.parametrize("chunks", [[12], [1] * 12, [5, 1, 4, 2]], ids=str)
def test_cached_logits_are_the_uncached_ones(mode, chunks):
    model, idx = make(**mode), tokens(3, 12)
    cache = KVCache(model, 3, 12)
    with torch.inference_mode():
        cached = torch.cat([model(part, cache=cache)[0] for part in idx.split(chunks, dim=1)], 1)
        assert close(cached, model(idx)[0]) and close(cached, plainly(model, idx)[0])

WRAPPING = [[1] * 40, [12, 12, 12, 4], [7, 7, 1, 1, 7, 7, 7, 3], [11, 2, 12, 1, 12, 2]]

@modes
@pytest.mark.parametrize("chunks", WRAPPING, ids=str)
def test_after_wrapping_each_layer_attends_to_the_last_block_size_keys(mode, chunks):
    model, idx = make(**mode), tokens(2, 40)
    cache = KVCache(model, 2, 12)
    with torch.inference_mode():
        cached = torch.cat([model(part, cache=cache)[0] for part in idx.split(chunks, dim=1)], 1)
        assert cache.length == 40 and close(cached, plainly(model, idx, window=12)[0])

@modes
def test_rereading_the_last_block_size_tokens_gives_other_logits_than_the_ring(mode):
    model, idx = make(**mode), tokens(1, 40)
    cache = KVCache(model, 1, 12)
    ring, reread = model.read(idx, cache)[0], model(idx[:, -12:])[0][0, -1]
    assert close(ring, plainly(model, idx, window=12)[0][0, -1]) and not close(ring, reread, 1e-2)

RING = [([0, 1, 2], [0, 1, 2], [0, 1, 2]),      # new positions, those in slots afterwards, the visible ones
        ([3], [0, 1, 2, 3], [0, 1, 2, 3]), ([4], [4, 1, 2, 3], [4, 1, 2, 3]),
        ([5, 6], [4, 5, 6, 3], [4, 1, 2, 3, 5, 6])]

def test_a_ring_of_four_slots_fills_and_overflows_as_its_docstring_says():
    cache = KVCache(make(n_layer=1), 1, 4)
    for new, slots, visible in RING:
        assert cache.advance(torch.tensor(new)).tolist() == visible
        numbers = torch.tensor(new).view(1, 1, -1, 1).expand(1, 4, -1, 8).float()
        assert cache.remember("v", 0, numbers)[0, 3, :, 7].tolist() == visible
        assert cache.where.flatten()[:len(slots)].tolist() == slots
        assert cache.v[0][0, 3, :len(slots), 7].tolist() == slots

def test_a_reuse_layer_makes_values_only_and_one_of_cla_queries_only():
    def shapes(**mode):
        return [tuple(block.attn.qkv.weight.shape) for block in make(n_kv_head=2, **mode).blocks]
    assert shapes() == [(64, 32)] * 5
    assert shapes(share="1-3") == [(64, 32), (64, 32), (16, 32), (16, 32), (64, 32)]
    assert shapes(share="1-3", share_kind="kv") == [(64, 32), (64, 32), (32, 32), (32, 32), (64, 32)]

def test_a_reuse_layer_stores_values_only():
    def stored(**mode):
        cache = KVCache(make(n_kv_head=2, **mode), batch_size=3, size=7)
        return [(k.numel(), v.numel()) for k, v in zip(cache.k, cache.v)], cache.nbytes
    n = 3 * 2 * 7 * 8                           # B · G · size · D
    assert stored() == ([(n, n)] * 5, 10 * n * 4)
    assert stored(share="1-3") == ([(n, n), (n, n), (0, n), (0, n), (n, n)], 8 * n * 4)
    assert stored(share="1-3", share_kind="kv") == ([(n, n), (n, n), (0, 0), (0, 0), (n, n)], 6 * n * 4)

@modes
def test_attention_weights_sum_to_one_and_a_reuse_layers_are_its_anchors(mode):
    model, idx = make(**mode), tokens(2, 12)
    found = model.attention_weights(idx)
    with torch.no_grad():
        for P, expected in zip(found, plainly(model, idx)[1]):
            assert close(P, expected) and close(P.sum(-1), torch.ones(2, 4, 12))
    if (mode["share"], mode["share_kind"]) == ("1-3", "weights"):
        assert torch.equal(found[1], found[2]) and torch.equal(found[1], found[3])
        assert not close(found[0], found[1], 1e-2) and not close(found[3], found[4], 1e-2)

@modes
def test_greedy_text_is_the_argmax_of_the_plain_formulation_past_block_size(mode):
    model, idx = make(**mode), tokens(2, 5)
    got = model.generate(idx, 20, temperature=0)
    with torch.no_grad():
        for _ in range(20):
            idx = torch.cat((idx, plainly(model, idx, window=12)[0][:, -1:].argmax(-1)), 1)
    assert torch.equal(got, idx)

def test_a_prompt_longer_than_block_size_is_read_whole():
    model, idx = make(share="1-3"), tokens(1, 30)
    expected = plainly(model, idx, window=12)[0][0, -1].argmax()
    assert model.generate(idx, 1, temperature=0)[0, -1] == expected

def test_the_same_seed_gives_the_same_text_and_another_seed_another():
    def text(seed):
        return make().generate(tokens(1, 3), 30, generator=torch.Generator().manual_seed(seed)).tolist()
    assert text(5) == text(5) != text(6)

def test_temperature_and_top_k_shape_the_distribution_that_is_drawn_from():
    model, idx = make(), tokens(1, 3).expand(4000, 3)
    logits = plainly(model, idx[:1])[0][0, -1].detach()
    allowed = logits.topk(5).indices
    expected = torch.zeros(50, dtype=torch.float64)
    expected[allowed] = (logits[allowed] / 2.5).softmax(-1)
    generator = torch.Generator().manual_seed(0)
    drawn = model.generate(idx, 1, temperature=2.5, top_k=5, generator=generator)[:, -1]
    assert (drawn.bincount(minlength=50) / 4000 - expected).abs().max() < 0.04
    assert set(drawn.tolist()) == set(allowed.tolist())
    greedy = model.generate(idx[:1], 9, temperature=0)
    assert torch.equal(model.generate(idx[:1], 9, top_k=1), greedy)
    assert torch.equal(model.generate(idx[:1], 9, temperature=1e-40), greedy)

@modes
def test_a_later_token_changes_nothing_before_it(mode):
    model, idx = make(**mode), tokens(1, 12)
    changed = idx.clone()
    changed[0, 7] = (changed[0, 7] + 1) % 50
    before, after = model(idx)[0], model(changed)[0]
    assert torch.equal(before[:, :7], after[:, :7]) and not close(before[:, 7:], after[:, 7:])

def test_positions_far_away_are_as_good_as_near_ones():
    model, idx = make(), tokens(1, 12)
    near, far = KVCache(model, 1, 12), KVCache(model, 1, 12)
    with torch.inference_mode():
        for token in idx.split(1, 1):
            model(token, cache=near)
        shift = 12 * 10**8                      # a multiple of the cache's size: keys as if read there
        rope = rope_angles(model.config, torch.tensor([shift]))
        far.k = [rotate(k, rope) for k in near.k]
        far.v = [v.clone() for v in near.v]
        far.length = 12 + shift
        assert close(model(idx[:, :1], cache=far)[0], model(idx[:, :1], cache=near)[0], 1e-3)

def test_the_weighted_sum_takes_the_values_of_each_heads_group():
    P, v = torch.rand(2, 6, 3, 5), torch.randn(2, 2, 5, 4)
    expected = torch.stack([P[:, h] @ v[:, h // 3] for h in range(6)], 1)
    assert close(Step(rope=(), mask=None, causal=False).weighted_sum(P, v), expected)

class Computed(TorchDispatchMode):
    """Counts the operations that compute, and not those that only look at a tensor in another way."""
    LOOKS = ("view", "transpose", "split", "slice", "flatten", "unflatten", "to.dtype", "type_as", "dropout")
    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += not any(look in str(operation) for look in self.LOOKS)
        return operation(*args, **(kwargs or {}))

@torch.inference_mode()
def operations_of_a_token(**mode):
    model = make(block_size=16, **mode)
    cache = KVCache(model, 1, 16)
    model.hidden(tokens(1, 9), cache)
    with Computed() as computed:
        model.hidden(tokens(1, 1), cache)
    return computed.count

def test_a_decoded_token_costs_no_more_operations_per_layer_than_it_must():
    # two norms; q, k, v; rotate; write k, write v; scale, stack, times k, softmax, times v; out; add; gate,
    # up, silu, times, down; add
    full = operations_of_a_token(n_layer=6) - operations_of_a_token(n_layer=5)
    assert full == 19
    reuse = operations_of_a_token(n_layer=6, share="1-5") - operations_of_a_token(n_layer=5, share="1-4")
    assert reuse == full - 6                    # rotates nothing, writes v only, and multiplies by v only
    borrows = dict(share_kind="kv")
    cla = operations_of_a_token(n_layer=6, share="1-5", **borrows)
    assert cla - operations_of_a_token(n_layer=5, share="1-4", **borrows) == full - 2       # writes nothing

def test_the_kernel_makes_the_mask_itself_while_nothing_is_cached_and_leaves_single_tokens(monkeypatch):
    asked, kernel = [], F.scaled_dot_product_attention
    def noted(q, k, v, mask=None, is_causal=False, **more):
        asked.append((mask is None, is_causal))
        return kernel(q, k, v, mask, is_causal=is_causal, **more)
    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    model, idx = make(n_layer=1), tokens(2, 12)
    cache = KVCache(model, 2, 12)
    with torch.inference_mode():
        model(idx)
        for part in idx.split([5, 4, 1, 2], dim=1):
            model(part, cache=cache)
    assert asked == [(True, True), (True, True), (False, False), (False, False)]        # not for the 1

def test_dropout_is_at_work_in_training_and_only_there():
    model, idx = make(dropout=0.5), tokens(2, 12)
    with torch.no_grad():
        assert close(model(idx)[0], plainly(model, idx)[0])
        model.train()
        one, other = model(idx)[0], model(idx)[0]
    assert not close(one, other, 1e-2)

def test_matrices_start_small_and_those_that_add_to_the_stream_smaller():
    torch.manual_seed(0)
    for name, p in GPT(GPTConfig(n_layer=8)).named_parameters():
        if p.dim() == 2:
            adds = name.endswith(("attn.out.weight", "mlp.down.weight"))        # 2 L = 16 times
            assert p.std().item() == pytest.approx(0.02 / 4 if adds else 0.02, rel=0.05), name
        else:
            assert (p == 1).all()

WRONG = [
    dict(share="3-1"), dict(share="2-2"), dict(share="1-5"), dict(share="1"), dict(share="1-2,2-4"),
    dict(share="3-4,0-1"), dict(share="a-b"), dict(share="1-2,"), dict(share="-1-2"),
    dict(share_kind="nonsense"),
    dict(n_embd=30), dict(n_embd=36), dict(n_kv_head=3), dict(n_kv_head=0), dict(n_head=0), dict(n_layer=0),
    dict(dropout=1.0), dict(rope_base=0.0), dict(norm_eps=-1.0), dict(n_hidden=0),
]

@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_a_wrong_config_is_refused_by_the_name_of_its_flag(wrong):
    (name, value), = wrong.items()
    with pytest.raises(ValueError, match=f"^--{name}={value}: "):
        GPTConfig(**{**dict(n_layer=5, n_head=4, n_embd=32), **wrong})

def test_too_many_tokens_at_once_are_refused():
    model = make()
    with pytest.raises(ValueError, match="13 tokens"):
        model(tokens(1, 13))
    with pytest.raises(ValueError, match="8 tokens"):
        model(tokens(1, 8), cache=KVCache(model, 1, 7))
