"""Which head takes over which, and refitted projections: against plain formulations."""

import itertools

import plain_reuse
import pytest
import torch
from torch.nn import functional as F

import train
from minisa import cost, load
from minisa.axes import heads
from minisa.axes.heads import head_products, nearest_mixture, refit, share
from minisa.kit import checkpoint
from minisa.kit.checkpoint import change, empty, reconfigure
from minisa.model import GPT, GPTConfig, KVCache

@pytest.fixture
def model():
    torch.manual_seed(3)
    model = GPT(GPTConfig(block_size=32, vocab_size=50, n_layer=4, n_head=4, n_kv_head=2, n_embd=32)).eval()
    for p in model.parameters():
        p.data *= 6 if p.dim() == 2 else 1                      # so that heads attend differently
    return model

@pytest.fixture
def idx():
    torch.manual_seed(4)
    return torch.randint(50, (3, 20))

# ---- which head takes over which ----

def test_products_are_the_inner_products_of_heads(model, idx):
    P = torch.stack(model.attention_weights(idx)).double()      # (L, B, H, T, T)
    plain = torch.einsum("lbhts,mbgts->lhmg", P, P)
    torch.testing.assert_close(head_products(model, idx), plain, atol=1e-4, rtol=1e-5)

def test_the_nearest_mixture_is_the_best_of_all_supports():
    torch.manual_seed(0)
    X, Y = torch.rand(40, 5, dtype=torch.float64), torch.rand(40, 6, dtype=torch.float64)
    found = nearest_mixture(X.T @ X, Y.T @ X)
    assert (found >= 0).all() and torch.allclose(found.sum(1), torch.ones(6).double())
    supports = [list(s) for n in range(1, 6) for s in itertools.combinations(range(5), n)]
    for row, y in zip(found, Y.T):
        best = min(plain_fit(X[:, support], y) for support in supports)
        assert (X @ row - y).pow(2).sum().item() == pytest.approx(best, rel=1e-6)

def plain_fit(X, y):
    """The least squared distance of y from X w with Σ w = 1, or infinity if that w is negative somewhere."""
    n = X.size(1)
    system = torch.block_diag(X.T @ X, torch.zeros(1, 1, dtype=X.dtype))
    system[:n, n] = system[n, :n] = 1
    w = torch.linalg.solve(system, torch.cat((X.T @ y, torch.ones(1, dtype=X.dtype))))[:n]
    return (X @ w - y).pow(2).sum().item() if (w >= -1e-12).all() else float("inf")

def test_a_head_takes_over_the_most_alike_head_of_the_anchor(model, idx):
    P = [each.transpose(0, 1).flatten(1) for each in model.attention_weights(idx)]     # (H, B·T·T) each
    shared = share(model, "1-3", "match", head_products(model, idx))
    for layer in (2, 3):
        cosines = F.cosine_similarity(P[layer][:, None], P[1][None], dim=2)            # (H, H)
        assert torch.equal(shared.blocks[layer].attn.source, cosines.argmax(1))
    seen = shared.attention_weights(idx)
    torch.testing.assert_close(seen[2], seen[1][:, shared.blocks[2].attn.source])

def test_a_mixture_is_nearer_than_a_match_and_that_than_the_same_head(model, idx):
    products, away, target = head_products(model, idx), {}, model.attention_weights(idx)[3]
    for which in ("same", "match", "mix"):
        seen = share(model, "2-3", which, products).attention_weights(idx)
        away[which] = (seen[3] - target).pow(2).sum().item()
        torch.testing.assert_close(seen[3].sum(-1), torch.ones(3, 4, 20))
    assert away["mix"] < away["match"] <= away["same"]

# ---- layers ----

@pytest.fixture(params=["match", "mix"])
def taking(request, model):
    """A model of any taken heads, with two reuse layers above another and a span below."""
    which = request.param
    shared = change(reconfigure(model, share="0-1,2-3"), "heads", heads=which)
    for block in (shared.blocks[1], shared.blocks[3]):
        if which == "match":
            block.attn.source = torch.tensor([3, 3, 0, 1])
        else:
            block.attn.mix.data = torch.rand(4, 4).softmax(1)
    return shared

@pytest.mark.parametrize("which", ["match", "mix"])
def test_all_reuse_layers_of_a_span_take_from_the_anchor(model, idx, which):
    shared = share(model, "1-3", which, head_products(model, idx))
    with torch.no_grad():
        assert plain_reuse.close(shared(idx)[0], plain_reuse.logits(shared, idx))

def test_taken_heads_are_those_of_the_plain_formulation_with_and_without_a_cache(taking, idx):
    plain, cache = plain_reuse.logits(taking, idx), KVCache(taking, 3, 32)
    with torch.no_grad():
        parts = idx.split([7, 1, 1, 5, 6], dim=1)
        pieces = torch.cat([taking(part, cache=cache)[0] for part in parts], dim=1)
        assert plain_reuse.close(taking(idx)[0], plain) and plain_reuse.close(pieces, plain)
        seen, expected = taking.attention_weights(idx), plain_reuse.sequence(taking, idx[1])[1]
        assert all(plain_reuse.close(P[1], row) for P, row in zip(seen, expected))

def test_gradients_of_taken_heads_are_those_of_the_plain_formulation(taking, idx):
    got, plain = (plain_reuse.gradients(taking, logits, idx.flip(0)) for logits in
                  (taking(idx)[0], plain_reuse.logits(taking, idx)))
    assert all(plain_reuse.close(got[name], plain[name], 1e-3) for name in got)

def test_a_mixture_is_billed_and_a_match_is_free(taking):
    plain = cost.predict(taking.config, 20, batch_size=2)
    more = 16 if hasattr(taking.blocks[1].attn, "mix") else 0   # H² numbers in each of two layers
    assert cost.predict(taking, 20, batch_size=2) == cost.measure(taking, 20, batch_size=2)
    assert cost.measure(taking, 20).params - plain.params == 2 * more
    assert cost.measure(taking, 20, batch_size=2).decode_flops - plain.decode_flops == 2 * 2 * (2 * more * 20)

@pytest.mark.parametrize("which", ["match", "mix"])
def test_taken_heads_work_in_bfloat16(model, idx, which):
    shared = share(model.bfloat16(), "1-3", which, head_products(model, idx))
    assert shared(idx)[0].dtype == torch.bfloat16
    if which == "mix":
        torch.testing.assert_close(shared.blocks[2].attn.mix.float().sum(1), torch.ones(4), atol=0.02, rtol=0)

def test_without_products_heads_start_as_plain_sharing(model, idx):
    plain = reconfigure(model, share="1-3")(idx)[0]
    for which in ("same", "match", "mix"):
        torch.testing.assert_close(share(model, "1-3", which)(idx)[0], plain)

def test_sharing_uses_the_same_memory_and_leaves_the_model_alone(model, idx):
    before, kinds = model(idx)[0], [type(block.attn) for block in model.blocks]
    shared = share(model, "1-3", "mix", head_products(model, idx))
    assert shared.embed.weight.data_ptr() == model.embed.weight.data_ptr()
    assert shared.blocks[0].mlp.down.weight.data_ptr() == model.blocks[0].mlp.down.weight.data_ptr()
    assert torch.equal(model(idx)[0], before) and kinds == [type(block.attn) for block in model.blocks]

def test_layers_are_rebuilt_from_what_was_recorded(taking, idx):
    again = empty(taking.config, checkpoint.changes(taking))
    again.load_state_dict(taking.state_dict(), assign=True)
    assert torch.equal(again.eval()(idx)[0], taking(idx)[0])

@pytest.mark.parametrize("sharing, which, reason", [
    ("", "mix", "--heads=mix: is about layers that share attention weights; give --share"),
    ("kv", "mix", "--heads=mix: .*--share_kind=weights"), ("weights", "other", "--heads=other: must be"),
    ("weights", "same", "--heads=same: must be")])
def test_what_cannot_take_heads_is_refused(model, sharing, which, reason):
    shared = reconfigure(model, share="0-1", share_kind=sharing) if sharing else model
    with pytest.raises(ValueError, match=reason):
        change(shared, "heads", heads=which)

def test_heads_are_chosen_once(taking):
    with pytest.raises(ValueError, match="changed already, by heads; take the model that it came from"):
        change(taking, "heads", heads="mix")

# ---- refit ----

@pytest.mark.parametrize("kind, which", [("weights", "same"), ("kv", "same"), ("weights", "mix")])
def test_a_refitted_projection_is_the_least_squares_solution_and_leaves_the_model_alone(model, kind, which):
    torch.manual_seed(6)
    windows, before = torch.randint(50, (4, 20)), [p.clone() for p in model.parameters()]
    products = head_products(model, windows)
    shared = share(model, "1-3", which, products, kind)
    assert refit(shared, model, windows, ridge=0.05) is shared
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))
    seen = {}

    def keep(key, value):
        seen[key] = value

    for layer in (2, 3):
        out, full = shared.blocks[layer].attn.out, model.blocks[layer].attn.out
        out.register_forward_pre_hook(lambda _, args, layer=layer: keep(("z", layer), args[0]))
        full.register_forward_hook(lambda _, args, y, layer=layer: keep(("y", layer), y))
    with torch.no_grad():
        shared(windows), model(windows)
    for layer in (2, 3):
        z, y = seen["z", layer].flatten(0, 1).double(), seen["y", layer].flatten(0, 1).double()
        old, new = (m.blocks[layer].attn.out.weight.double() for m in (model, shared))
        # λ |W' − W|² as rows of an ordinary least squares problem
        pull = (0.05 * (z * z).sum(0).mean()).sqrt() * torch.eye(32).double()
        plain = torch.linalg.lstsq(torch.cat((z, pull)), torch.cat((y, pull @ old.T))).solution.T
        torch.testing.assert_close(new, plain, atol=1e-4, rtol=1e-3)
        assert (z @ new.T - y).norm() < (z @ old.T - y).norm()
    for layer in (0, 1):                                        # no reuse layers
        ours, theirs = (m.blocks[layer].attn.out.weight for m in (shared, model))
        assert ours.data_ptr() == theirs.data_ptr()

def test_outputs_are_refitted_to_full_attention_or_the_same_sharing_only(model, idx):
    shared = share(model, "1-3")
    for spans, kind in (("1-2", "weights"), ("1-3", "kv")):
        with pytest.raises(ValueError, match="--refit: needs .* already shares 1-3"):
            refit(share(model, spans, share_kind=kind), shared, idx)
    refit(share(shared, "1-3", "mix"), shared, idx)

# ---- the command ----

SHAPE = ["--n_layer=3", "--n_head=2", "--n_embd=32", "--block_size=16", "--vocab_size=300"]
SHORT = ["--batch_size=4", "--max_iters=12", "--eval_interval=12", "--warmup_iters=2", "--device=cpu"]

@pytest.fixture
def trained(run, text, tmp_path):
    """A function: flags of a training run → its exit status and stderr."""
    def trained(*flags):
        shape = [] if any("init_from" in flag for flag in flags) else SHAPE
        files = [f"--text={text}", f"--data_dir={tmp_path}/data"]
        status, _, err = run(train.main, *SHORT, *shape, *files, *flags)
        return status, err
    return trained

def test_heads_are_fitted_stored_loaded_and_trained_on(run, trained):
    assert trained("--out_dir=full")[0] == 0
    full = load("full")[0]
    idx = torch.arange(16)[None]
    for name, flags in {"match": ["--heads=match"], "mix": ["--heads=mix", "--refit"], "same": ["--refit"],
                        "plain": [], "kv": ["--share_kind=kv", "--refit"]}.items():
        status, out, err = run(heads.main, "full", "--share=0-2", *flags, f"--out={name}")
        assert status == 0 and f"wrote {name}" in out, err
        model, _, info = load(name)
        assert model.config.share == "0-2" and info["val_loss"] is None
        assert not torch.equal(model(idx)[0], full(idx)[0])
    assert load("match")[0].blocks[1].attn.source.dtype == torch.int64
    assert load("mix")[0].blocks[2].attn.mix.shape == (2, 2)
    assert torch.equal(load("plain")[0](idx)[0], reconfigure(full, share="0-2")(idx)[0])
    status, err = trained("--init_from=mix", "--max_iters=2", "--out_dir=tuned")
    assert status == 0, err
    old, new = (load(name)[0].blocks[1].attn.mix for name in ("mix", "tuned"))
    assert not torch.equal(old, new) and torch.allclose(old, new, atol=0.1)

def test_a_mixture_is_learned_from_scratch(run, trained):
    assert trained("--max_iters=0", "--share=0-2", "--out_dir=none")[0] == 0
    assert run(heads.main, "none", "--heads=mix", "--out=start")[0] == 0
    assert torch.equal(load("start")[0].blocks[1].attn.mix, torch.eye(2))
    status, err = trained("--init_from=start", "--learning_rate=0.01", "--out_dir=learned")
    assert status == 0, err
    mix = load("learned")[0].blocks[1].attn.mix
    assert not torch.equal(mix, torch.eye(2)) and torch.allclose(mix, torch.eye(2), atol=0.5)

def test_wrong_use_gets_one_line_and_status_2(run, trained):
    assert trained("--max_iters=0", "--out_dir=full")[0] == 0
    assert trained("--max_iters=0", "--share=0-2", "--out_dir=sa")[0] == 0
    for flags, reason in {
            ("full",): "--out", ("full", "--out=x"): "--share: name the spans",
            ("none", "--out=x"): "no such model", ("full", "--share=0-9", "--out=x"): "--share=0-9",
            ("full", "--share=0-9", "--heads=mix", "--refit", "--out=x"): "--share=0-9",
            ("sa", "--share=0-2", "--share_kind=kv", "--out=x"): "--share",
            ("full", "--share=0-2", "--heads=one", "--out=x"): "--heads",
            ("full", "--share=0-2", "--share_kind=kv", "--heads=mix", "--out=x"): "--share_kind=weights",
            ("sa", "--out=x"): "shares 0-2 already",
            ("sa", "--heads=match", "--out=x"): "only --heads=mix is possible",
            ("sa", "--heads=mix", "--refit", "--out=x"): "only --heads=mix is possible",
            ("full", "--share=0-2", "--out=sa"): "is there already"}.items():
        status, _, err = run(heads.main, *flags)
        assert status == 2 and err.count("\n") == 1 and reason in err, (flags, err)
