"""decode.py beside model.py and plain.py: the same logits, the same cache, the same text."""

import copy
import pickle

import numpy as np
import pytest
import torch

from minisa import decode
from minisa.axes import heads, lowrank
from minisa.cost import measure, predict
from minisa.kit.checkpoint import reconfigure
from minisa.model import GPT, GPTConfig, KVCache, draw
from tests.core.test_model import close, make, modes, plainly, tokens

def filled(model, idx, size=12):
    """A cache of `size` that has read idx, by torch."""
    cache = KVCache(model, 1, size)
    model.read(idx, cache)
    return cache

def on_torch(model):
    """The same model, of a class that decode.py does not know."""
    other = copy.copy(model)
    other.__class__ = type("Other", (GPT,), {})
    return other

# ---- logits and caches ----

@modes
@pytest.mark.parametrize("n_prompt", [1, 30], ids=str)
def test_logits_are_those_of_the_plain_formulation_past_the_rings_end(mode, n_prompt):
    model, idx = make(**mode), tokens(1, 45)
    cache = filled(model, idx[:, :n_prompt])
    decoder = decode.Decoder(model, cache)
    logits = np.stack([decoder.step(token) for token in idx[0, n_prompt:].tolist()])
    with torch.no_grad():
        expected = plainly(model, idx, window=12)[0][0, n_prompt:]
    assert logits.dtype == np.float32 and close(torch.from_numpy(logits), expected, 1e-5)

@pytest.mark.parametrize("shape", [dict(n_head=2, n_embd=4, n_kv_head=1), dict(n_head=1, n_embd=34),
                                   dict(n_head=16, n_embd=32, n_kv_head=2, tied=False, n_hidden=7)], ids=str)
@pytest.mark.parametrize("share", ["", "0-4"])
def test_any_shape_of_heads_and_widths(shape, share):
    model, idx = make(share=share, **shape), tokens(1, 20)
    decoder = decode.Decoder(model, KVCache(model, 1, 12))
    logits = np.stack([decoder.step(token) for token in idx[0].tolist()])
    with torch.no_grad():
        assert close(torch.from_numpy(logits), plainly(model, idx, window=12)[0][0], 1e-5)

@modes
def test_torch_and_numpy_go_on_from_each_others_cache(mode):
    model, idx = make(**mode), tokens(1, 40)
    alone, together = KVCache(model, 1, 12), KVCache(model, 1, 12)
    with torch.inference_mode():
        for n, token in enumerate(idx[0]):
            expected = model.read(token.view(1, 1), alone)[0]
            if n % 7 < 3:
                logits = model.read(token.view(1, 1), together)[0]
            else:
                logits = torch.from_numpy(decode.Decoder(model, together).step(token.item()))
            assert close(logits, expected)
    assert together.length == alone.length == 40 and torch.equal(together.where, alone.where)
    for ours, theirs in zip(together.k + together.v, alone.k + alone.v):
        assert close(ours, theirs) if ours.numel() else theirs.numel() == 0

def test_the_cache_is_used_where_it_lies_and_a_reuse_layer_has_no_keys():
    model = make(share="1-3")
    cache = KVCache(model, 1, 12)
    decoder = decode.Decoder(model, cache)
    for layer, k, v in zip(decoder.layers, cache.k, cache.v):
        assert layer.v.ctypes.data == v.data_ptr() and (k.numel() == 0 or layer.k.ctypes.data == k.data_ptr())
    decoder.step(3)
    assert [layer.k.size for layer in decoder.layers] == [384, 384, 0, 0, 384]

def test_far_positions_are_as_good_as_near_ones():
    model, idx = make(), tokens(1, 1)
    logits = []
    for length in (0, 12 * 10**8):                      # a multiple of the size: the same slot
        cache = KVCache(model, 1, 12)
        cache.length = length
        cache.k = [torch.zeros_like(k) for k in cache.k]
        cache.v = [torch.zeros_like(v) for v in cache.v]
        expected = model.read(idx, copy.deepcopy(cache))[0]
        logits.append(torch.from_numpy(decode.Decoder(model, cache).step(idx.item())))
        assert close(logits[-1], expected, 1e-5)

# ---- text ----

@modes
@pytest.mark.parametrize("how", [dict(temperature=0), dict(temperature=0.8, top_k=5), dict(temperature=1.3)],
                         ids=str)
def test_text_is_the_same_as_on_torch(mode, how):
    model, idx = make(**mode), tokens(1, 5)
    made = [each.generate(idx, 60, generator=torch.Generator().manual_seed(2), **how)
            for each in (model, on_torch(model))]
    assert decode.handles(model, KVCache(model, 1, 12)) and torch.equal(*made)
    assert len(set(made[0][0, 5:].tolist())) > 2

@pytest.mark.parametrize("temperature, top_k", [(0, None), (1e-40, None), (0.7, None), (1e9, 3), (1.0, 500)])
def test_both_draws_give_the_token_whose_share_of_the_line_u_falls_into(temperature, top_k):
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(2000, 40, generator=generator)
    u = torch.rand(2000, 1, generator=generator)
    drawn = draw(logits, temperature, top_k, u)
    ours = [decode.draw(row, temperature, top_k, x.item()) for row, x in zip(logits.numpy(), u)]
    assert drawn[:, 0].tolist() == ours
    for row, x, token in zip(logits[:50].tolist(), u[:50, 0].tolist(), ours):     # in plain Python
        if temperature < 1e-6:
            assert token == row.index(max(row))
            continue
        kept = sorted(row)[-(top_k or 40):]
        weights = [np.exp((value - max(row)) / temperature) if value in kept else 0.0 for value in row]
        sums = np.cumsum(weights) / sum(weights)
        assert token == next(i for i, end in enumerate(sums) if x < end)

def test_u_at_the_ends_of_its_range_draws_a_token_that_can_come():
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]])
    for u, token in ((0.0, 1), (1 - 2**-24, 2)):
        assert draw(logits, 1.0, None, torch.tensor([[u]])).item() == token
        assert decode.draw(logits[0].numpy(), 1.0, None, u) == token

def test_no_torch_thread_works_for_a_token(monkeypatch):
    # the large operations of a step are numpy's: torch makes random numbers, and a tensor of one token
    model, seen = make(), []
    stream = model.stream(tokens(1, 5), 9)
    next(stream)

    class Numbers(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            made = operation(*args, **kwargs or {})
            seen.append(max([t.numel() for t in (made if isinstance(made, (list, tuple)) else [made])
                             if isinstance(t, torch.Tensor)], default=0))
            return made

    next(stream)                                        # looks at the weights, once
    with Numbers():
        for _ in range(5):
            next(stream)
    assert max(seen) <= 64

# ---- weights ----

@pytest.mark.parametrize("optimizer", [dict(fused=True), dict(foreach=True), dict(foreach=False)], ids=str)
def test_what_is_generated_after_a_step_of_an_optimizer_is_of_the_new_weights(optimizer):
    model, idx = make(share="1-3"), tokens(1, 5)
    adam = torch.optim.AdamW(model.parameters(), lr=0.1, **optimizer)
    before = model.generate(idx, 30, 0)
    model(idx, idx)[1].backward()
    adam.step()
    after = model.generate(idx, 30, 0)
    assert torch.equal(after, on_torch(model).generate(idx, 30, 0)) and not torch.equal(before, after)

def change_in_place(model):
    with torch.no_grad():
        weight = model.blocks[0].attn.qkv.weight
        weight.copy_(weight.flip(0))                    # the same numbers, elsewhere

def change_by_data(model):
    model.blocks[1].mlp.up.weight.data[3, 4] += 2

def flip_signs(model):
    model.blocks[1].mlp.gate.weight.data.neg_()

def double(model):
    model.blocks[0].attn.qkv.weight.data.mul_(2)

def reorder(model):
    model.embed.weight.data.copy_(model.embed.weight.flip(0))

def change_a_column(model):
    with torch.no_grad():
        model.blocks[1].attn.qkv.weight[:, 0] = 9.0

def exchange(model):
    model.blocks[0].mlp.down = model.blocks[1].mlp.down

def replace_tensors(model):
    model.load_state_dict({name: t.flip(0) for name, t in model.state_dict().items()}, assign=True)

@pytest.mark.parametrize("change", [change_in_place, change_by_data, flip_signs, double, reorder,
                                    change_a_column, exchange, replace_tensors])
def test_a_change_of_the_weights_is_noticed_and_else_nothing_is_made_anew(change):
    model = make()
    first = decode.prepare(model)
    assert decode.prepare(model) is first
    change(model)
    cache = KVCache(model, 1, 12)
    logits = decode.Decoder(model, cache).step(7)
    assert close(torch.from_numpy(logits), model(torch.tensor([[7]]))[0][0, 0].detach(), 1e-5)
    assert decode.prepare(model) is not first

def test_only_matrices_with_more_rows_than_columns_are_copied_and_the_models_stay_as_they_are():
    model = make(share="1-3")
    before = {name: (t.data_ptr(), t.stride()) for name, t in model.state_dict().items()}
    weights = decode.prepare(model)
    for block, layer in zip(model.blocks, weights.layers):
        assert layer.out.ctypes.data == block.attn.out.weight.data_ptr()
        assert layer.down.ctypes.data == block.mlp.down.weight.data_ptr()
        tall, copied = len(layer.qkv) > 32, layer.qkv.ctypes.data != block.attn.qkv.weight.data_ptr()
        assert tall == copied == layer.qkv.flags.f_contiguous
    assert {name: (t.data_ptr(), t.stride()) for name, t in model.state_dict().items()} == before

# ---- the bill ----

@modes
@pytest.mark.parametrize("context", [1, 7, 12])
def test_products_cache_and_bytes_read_are_those_that_are_billed(mode, context):
    model = make(**mode)
    assert measure(model, context, engine="numpy") == predict(model, context) == measure(model, context)

def test_a_product_more_would_be_counted(monkeypatch):
    model, mlp = make(), decode.mlp
    monkeypatch.setattr(decode, "mlp", lambda layer, x: mlp(layer, x + 0 * (layer.out @ x)))
    more, cost = measure(model, 5, engine="numpy"), predict(model, 5)
    assert more.decode_flops - cost.decode_flops == 5 * 2 * 32 * 32
    assert more.read_bytes - cost.read_bytes == 5 * 4 * 32 * 32

# ---- axes ----

def mixed(model, how):
    shared = heads.share(model, "1-3", how)
    with torch.no_grad():
        for block in shared.blocks[2:4]:
            if how == "mix":
                block.attn.mix.copy_(torch.rand(4, 4).softmax(-1))
            else:
                block.attn.source.copy_(torch.tensor([2, 0, 3, 3]))
    return shared

@pytest.mark.parametrize("how", ["match", "mix"])
@pytest.mark.parametrize("G", [4, 2, 1])
def test_matched_and_mixed_heads_are_decoded_and_billed(how, G):
    model, idx = mixed(make(n_kv_head=G), how), tokens(1, 5)
    assert decode.handles(model, KVCache(model, 1, 12))
    assert torch.equal(model.generate(idx, 40, 0), on_torch(model).generate(idx, 40, 0))
    assert measure(model, 9, engine="numpy") == predict(model, 9) == measure(model, 9)

def test_layers_of_other_axes_run_on_torch():
    model = lowrank.correct(make(), "1-3", 4)
    assert not decode.handles(model, KVCache(model, 1, 12))
    assert model.generate(tokens(1, 5), 20, 0).shape == (1, 25)

# ---- what is refused ----

def watched(model):
    model.blocks[2].register_forward_hook(lambda *_: None)
    return model

def replaced(model):
    attn = model.blocks[2].attn
    attn.forward = attn.forward
    return model

def untie(model):
    model.unembed = torch.nn.Linear(32, 50, False)      # config.tied says that it is not used
    return model

def test_the_head_is_the_one_that_torch_takes():
    model, idx = untie(make()), tokens(1, 5)
    assert torch.equal(model.generate(idx, 20, 0), on_torch(model).generate(idx, 20, 0))

def test_a_model_is_pickled_and_copied_without_what_was_prepared():
    model = make()
    size = len(pickle.dumps(model))
    model.generate(tokens(1, 5), 5)
    assert len(pickle.dumps(model)) == len(pickle.dumps(copy.deepcopy(model))) == size

def with_its_own(part, name):
    setattr(part, name, getattr(part, name))
    return part

def reordered(model):
    model.blocks[0], model.blocks[1] = model.blocks[1], model.blocks[0]
    return model

def partly_training(model):
    model.blocks[1].train()
    return model

class OtherCache(KVCache):
    pass

def with_pre_hook(model):
    model.blocks[2].mlp.register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    return model

class Adapted(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1

def with_another(model, linear):
    model.blocks[1].attn.out = linear
    return model

def with_norm(model, norm):
    model.blocks[1].norm = norm.eval()
    return model

def watching(part):
    part.watch = lambda P: None
    return part

REFUSED = {
    "another class": lambda model: (on_torch(model), KVCache(model, 1, 12)),
    "another cache": lambda model: (model, OtherCache(model, 1, 12)),
    "a batch": lambda model: (model, KVCache(model, 2, 12)),
    "a cache in bfloat16": lambda model: (model, KVCache(make().bfloat16(), 1, 12)),
    "bfloat16": lambda model: (model.bfloat16(), KVCache(model, 1, 12)),
    "meta": lambda model: (model.to("meta"), KVCache(model, 1, 12)),
    "a cache of another model": lambda model: (model, KVCache(reconfigure(model, share="1-3"), 1, 12)),
    "fewer layers": lambda model: (model, KVCache(make(n_layer=4), 1, 12)),
    "other heads": lambda model: (model, KVCache(make(n_head=2, n_kv_head=2), 1, 12)),
    "training": lambda model: (model.train(), KVCache(model, 1, 12)),
    "a hook": lambda model: (watched(model), KVCache(model, 1, 12)),
    "a hook before": lambda model: (with_pre_hook(model), KVCache(model, 1, 12)),
    "a subclass of Linear": lambda model: (with_another(model, Adapted(32, 32, False)),
                                           KVCache(model, 1, 12)),
    "a bias": lambda model: (with_another(model, torch.nn.Linear(32, 32)), KVCache(model, 1, 12)),
    "no matrix": lambda model: (with_another(model, torch.nn.Identity()), KVCache(model, 1, 12)),
    "float64 in one place": lambda model: (with_another(model, torch.nn.Linear(32, 32, False).double()),
                                           KVCache(model, 1, 12)),
    "a cache that watches": lambda model: (model, watching(KVCache(model, 1, 12))),
    "a model that watches": lambda model: (watching(model), KVCache(model, 1, 12)),
    "a head of its own": lambda model: (with_its_own(model, "head"), KVCache(model, 1, 12)),
    "a norm of its own": lambda model: (with_its_own(model.blocks[1].norm, "forward") and model,
                                        KVCache(model, 1, 12)),
    "a norm with a gain": lambda model: (with_norm(model, torch.nn.RMSNorm(32)), KVCache(model, 1, 12)),
    "another order": lambda model: (reordered(model), KVCache(model, 1, 12)),
    "a layer in training": lambda model: (partly_training(model), KVCache(model, 1, 12)),
    "a forward of its own": lambda model: (replaced(model), KVCache(model, 1, 12)),
}

@pytest.mark.parametrize("case", REFUSED)
def test_what_it_does_not_handle_is_refused_in_one_line_that_says_what_does(case):
    model, cache = REFUSED[case](make())
    with pytest.raises(ValueError, match="^[^\n]*model.generate[^\n]*$"):
        decode.Decoder(model, cache)

def test_a_hook_sees_every_token_that_is_generated():
    model, seen = make(), []
    model.blocks[0].register_forward_hook(lambda *_: seen.append(1))
    model.generate(tokens(1, 3), 9, 0)
    assert len(seen) == 9

def test_a_fresh_cache_needs_no_prompt():
    model = make(share="1-3", share_kind="kv")
    logits = decode.Decoder(model, KVCache(model, 1, 12)).step(9)
    assert close(torch.from_numpy(logits), model(torch.tensor([[9]]))[0][0, 0].detach(), 1e-5)

def test_large_logits_and_activations_stay_finite():
    model = GPT(GPTConfig(block_size=12, vocab_size=50, n_layer=2, n_head=4, n_embd=32)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3e3)
    logits = torch.from_numpy(decode.Decoder(model, KVCache(model, 1, 12)).step(9))
    assert logits.isfinite().all() and close(logits, model(torch.tensor([[9]]))[0][0, 0].detach())
