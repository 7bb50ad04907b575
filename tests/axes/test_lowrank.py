"""Reuse layers that correct their anchor's attention weights: against a plain formulation with scores."""

import plain_reuse
import pytest
import torch
from plain_reuse import close

import train
from minisa import cost, load
from minisa.axes import lowrank
from minisa.axes.lowrank import correct
from minisa.kit.checkpoint import change, changes, empty, reconfigure
from minisa.model import GPT, GPTConfig, KVCache

MODES = [dict(share="1-3", n_kv_head=4, rank=2), dict(share="0-1,2-4", n_kv_head=2, rank=4)]
modes = pytest.mark.parametrize("mode", MODES, ids=lambda mode: f"{mode['share']} rank {mode['rank']}")

def loud(model):
    """A model far from its small initial values, so that attention is far from uniform."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.25)
    return model

def make(n_kv_head, share="", rank=None):
    torch.manual_seed(0)
    model = loud(GPT(GPTConfig(block_size=12, vocab_size=50, n_layer=5, n_head=4, n_embd=32, n_hidden=48,
                               n_kv_head=n_kv_head)).eval())
    return loud(correct(model, share, rank)) if rank else model

def tokens(B, T):
    return torch.randint(50, (B, T), generator=torch.Generator().manual_seed(1))

@modes
def test_logits_and_attention_weights_are_those_of_the_plain_formulation(mode):
    model, idx = make(**mode), tokens(2, 12)
    with torch.no_grad():
        assert close(model(idx)[0], plain_reuse.logits(model, idx))
        seen, plain = model.attention_weights(idx), plain_reuse.sequence(model, idx[0])[1]
    for P, expected in zip(seen, plain):
        assert close(P[0], expected) and close(P.sum(-1), torch.ones(2, 4, 12))
    assert not close(seen[3], seen[2], 1e-2)                    # the correction is at work

@modes
def test_gradients_are_those_of_the_plain_formulation(mode):
    model, idx = make(**mode), tokens(2, 12)
    got, plain = (plain_reuse.gradients(model, logits, idx.flip(0)) for logits in
                  (model(idx)[0], plain_reuse.logits(model, idx)))
    assert all(close(got[name], plain[name], 1e-3) for name in got)

@modes
@pytest.mark.parametrize("chunks", [[12], [1] * 12, [5, 1, 4, 2]], ids=str)
def test_cached_logits_are_the_uncached_ones(mode, chunks):
    model, idx = make(**mode), tokens(3, 12)
    cache = KVCache(model, 3, 12)
    with torch.no_grad():
        cached = torch.cat([model(part, cache=cache)[0] for part in idx.split(chunks, dim=1)], 1)
        assert close(cached, plain_reuse.logits(model, idx))

@modes
@pytest.mark.parametrize("chunks", [[1] * 40, [12, 12, 12, 4], [7, 7, 1, 1, 7, 7, 7, 3]], ids=str)
def test_after_wrapping_each_layer_attends_to_the_last_block_size_keys(mode, chunks):
    model, idx = make(**mode), tokens(2, 40)
    cache = KVCache(model, 2, 12)
    with torch.no_grad():
        cached = torch.cat([model(part, cache=cache)[0] for part in idx.split(chunks, dim=1)], 1)
        assert close(cached, plain_reuse.logits(model, idx, window=12))

@modes
def test_greedy_text_is_the_argmax_of_the_plain_formulation_past_block_size(mode):
    model, idx = make(**mode), tokens(2, 5)
    got = model.generate(idx, 12, temperature=0)
    for _ in range(12):
        idx = torch.cat((idx, plain_reuse.logits(model, idx, window=12)[:, -1:].argmax(-1)), 1)
    assert torch.equal(got, idx)

@modes
def test_a_correction_starts_at_nothing_and_can_be_learned(mode):
    full, idx = make(mode["n_kv_head"]), tokens(2, 12)
    corrected = correct(full, mode["share"], mode["rank"])
    assert close(corrected(idx)[0], reconfigure(full, share=mode["share"])(idx)[0], 1e-5)
    corrected(idx, idx)[1].backward()
    attn = corrected.blocks[3].attn
    assert attn.widths.q == 4 * mode["rank"] and attn.qkv.weight.grad[:attn.widths.q].abs().max() > 1e-6

@modes
def test_the_keys_start_as_the_first_numbers_of_the_layers_own(mode):
    full, R, G = make(mode["n_kv_head"]), mode["rank"], mode["n_kv_head"]
    corrected = correct(full, mode["share"], R)
    k, own = (m.blocks[3].attn.qkv.weight.split(m.blocks[3].attn.widths)[1] for m in (corrected, full))
    for g in range(G):
        assert torch.equal(k[g * R:(g + 1) * R], own[g * 8:g * 8 + R])
    assert corrected.embed.weight.data_ptr() == full.embed.weight.data_ptr()

def test_where_the_model_shares_already_keys_are_drawn_by_the_seed():
    shared, idx = reconfigure(make(2), share="0-1,2-4"), tokens(2, 12)


    def keys_of(seed):
        attns = [correct(shared, "0-1,2-4", 4, seed).blocks[layer].attn for layer in (1, 3)]
        return [attn.qkv.weight.split(attn.widths)[1] for attn in attns]

    keys = [keys_of(1), keys_of(1), keys_of(2)]
    assert torch.equal(keys[0][0], keys[1][0]) and not torch.equal(keys[0][0], keys[2][0])
    assert not torch.equal(keys[0][0], keys[0][1]) and 0.01 < keys[0][0].std() < 0.03
    assert close(correct(shared, "0-1,2-4", 4)(idx)[0], shared(idx)[0], 1e-5)

def test_an_extreme_correction_does_not_break():
    model, idx = make(**MODES[0]), tokens(2, 12)
    with torch.no_grad():
        for block in model.blocks[1:4]:
            block.attn.qkv.weight *= 30
        logits = model(idx)[0]
        assert logits.isfinite().all() and model.bfloat16()(idx)[0].isfinite().all()

@pytest.mark.parametrize("context, batch_size", [(1, 1), (600, 1), (77, 3)])
def test_predictions_equal_measurements(context, batch_size):
    config = GPTConfig(block_size=600, vocab_size=300, n_layer=4, n_head=4, n_kv_head=2, n_embd=32,
                       share="1-3")
    model = change(GPT(config).eval(), "lowrank", rank=2)
    bill = cost.predict(model, context, batch_size)
    assert bill == cost.measure(model, context, batch_size)
    plain = cost.predict(config, context, batch_size)           # two reuse layers, H = 4, G = 2, C = 32
    assert bill.decode_flops - plain.decode_flops == batch_size * 2 * (2 * 32 * 6 * 2 + 2 * 4 * 2 * context)
    assert bill.cache_bytes_per_token - plain.cache_bytes_per_token == 2 * 2 * 2 * 4
    assert bill.params - plain.params == 2 * 32 * 6 * 2

def test_layers_are_rebuilt_from_what_was_recorded():
    model, idx = make(**MODES[1]), tokens(2, 12)
    again = empty(model.config, changes(model))
    again.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(again.eval()(idx)[0], model(idx)[0])

@pytest.mark.parametrize("rank", [3, 16, 0, -2, 6])
def test_a_rank_that_does_not_fit_is_refused(rank):
    reason = f"--share_rank={rank}: must be even, and divide the width of a head, 8"
    with pytest.raises(ValueError, match=reason):
        correct(make(4), "1-2", rank)

def test_what_has_no_plain_reuse_layers_is_refused():
    for model in (make(4), reconfigure(make(4), share="1-2", share_kind="kv")):
        with pytest.raises(ValueError, match="--share_rank=2: is about layers that share attention weights"):
            change(model, "lowrank", rank=2)
    mixed = change(reconfigure(make(4), share="1-2"), "heads", heads="mix")
    with pytest.raises(ValueError, match="--share_rank=2.*changed already, by heads"):
        correct(mixed, "1-2", 2)

# ---- the command ----

def test_a_correction_is_written_loaded_and_learned(run, text, tmp_path):
    files = [f"--text={text}", f"--data_dir={tmp_path}/data"]
    short = ["--batch_size=4", "--warmup_iters=2", "--device=cpu", *files]
    shape = ["--n_layer=3", "--n_head=2", "--n_embd=32", "--block_size=16", "--vocab_size=300"]
    assert run(train.main, *short, *shape, "--max_iters=0", "--out_dir=full")[0] == 0
    assert run(train.main, *short, *shape, "--max_iters=0", "--share=0-2", "--out_dir=sa")[0] == 0
    for source, flags in {"full": ["--share=0-2"], "sa": []}.items():
        status, _, err = run(lowrank.main, source, *flags, "--share_rank=4", f"--out={source}-4")
        assert status == 0, err
        flags = [f"--init_from={source}-4", "--max_iters=8", f"--out_dir={source}-tuned"]
        status, _, err = run(train.main, *short, *flags)
        assert status == 0, err
        before, after = (load(f"{source}-{name}")[0].blocks[1].attn.qkv.weight[:8] for name in ("4", "tuned"))
        assert (before == 0).all() and after.abs().max() > 1e-4         # q: two heads of 4 numbers
    for flags, reason in {("full",): "give --share", ("sa", "--share_rank=32"): "--share_rank=32",
                          ("full", "--share=0-2", "--share_rank=5"): "--share_rank=5",
                          ("sa", "--seed=-1"): "--seed"}.items():
        status, _, err = run(lowrank.main, *flags, "--out=x")
        assert status == 2 and err.count("\n") == 1 and reason in err, (flags, err)
