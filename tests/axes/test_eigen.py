"""Narrower keys and values: exact where nothing is lost, as good as predicted where something is."""

import plain_reuse
import pytest
import torch
from plain_reuse import close

import train
from minisa import cost, load
from minisa.axes import eigen, heads, lowrank
from minisa.axes.common import walk
from minisa.axes.heads import refit
from minisa.kit.checkpoint import change, changes, empty, reconfigure
from minisa.model import GPT, GPTConfig, KVCache
from minisa.plain import rope

WINDOWS = torch.randint(50, (6, 48), generator=torch.Generator().manual_seed(1))
SHARING = [dict(), dict(share="1-3"), dict(share="0-1,2-3"), dict(share="1-3", share_kind="kv"),
           dict(share="0-3", heads="mix"), dict(share="0-2", heads="match"), dict(share="0-2", rank=4)]
sharings = pytest.mark.parametrize("mode", SHARING, ids=str)

def make(heads=None, rank=None, **mode):
    """A model far from its small initial values: its reuse layers with such heads, or such a correction."""
    torch.manual_seed(0)
    sizes = dict(block_size=48, vocab_size=50, n_layer=4, n_head=4, n_kv_head=2, n_embd=64)
    model = GPT(GPTConfig(**{**sizes, **mode})).eval()
    model = change(model, "heads", heads=heads) if heads else model
    model = change(model, "lowrank", rank=rank) if rank else model
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    for block in model.blocks if heads == "match" else []:
        if hasattr(block.attn, "source"):
            block.attn.source = torch.tensor([1, 1, 3, 0])
    return model

def make_flat(model, r):
    """Let the keys and values of every head lie in r dimensions."""
    D, G = model.config.head_dim, model.config.n_kv_head
    for block in model.blocks:
        q, k, v = block.attn.qkv.weight.data.split(block.attn.widths)
        for part in (k, v):
            for rows in part.view(G, D, -1) if len(part) == G * D else []:
                rows.copy_(torch.randn(D, r) / r @ rows[:r])
    return model

def compress(model, rank):
    return eigen.compress(model, WINDOWS, rank=rank)

# ---- models ----

@sharings
def test_what_is_of_low_rank_is_compressed_without_loss(mode):
    model = make_flat(make(**mode), 5)
    with torch.no_grad():
        exact = model(WINDOWS)[0]
        torch.testing.assert_close(compress(model, 5)(WINDOWS)[0], exact, atol=1e-4, rtol=1e-3)
        assert (compress(model, 3)(WINDOWS)[0] - exact).abs().max() > 0.05

@sharings
def test_at_full_rank_nothing_changes_and_nothing_is_copied(mode):
    model = make(**mode)
    whole = compress(model, 16)
    with torch.no_grad():
        assert torch.equal(whole(WINDOWS)[0], model(WINDOWS)[0])
    assert all(t.data_ptr() == model.state_dict()[name].data_ptr() for name, t in whole.state_dict().items())

@sharings
def test_logits_and_attention_weights_are_those_of_the_plain_formulation(mode):
    small = compress(make(**mode), 6)
    with torch.no_grad():
        assert close(small(WINDOWS[:2])[0], plain_reuse.logits(small, WINDOWS[:2]))
        seen, plain = small.attention_weights(WINDOWS[:1]), plain_reuse.sequence(small, WINDOWS[0])[1]
    assert all(close(P[0], expected) for P, expected in zip(seen, plain))

@pytest.mark.parametrize("mode", [SHARING[i] for i in (0, 1, 3)], ids=str)
def test_gradients_are_those_of_the_plain_formulation(mode):
    small, idx = compress(make(**mode), 6), WINDOWS[:1]
    got, plain = (plain_reuse.gradients(small, logits, idx.flip(1)) for logits in
                  (small(idx)[0], plain_reuse.logits(small, idx)))
    assert all(close(got[name], plain[name], 1e-3) for name in got)

@pytest.mark.parametrize("ranks", [[5, 16], [16, 5], [5, 4]], ids=str)
def test_what_a_layer_makes_may_be_an_odd_number_of_numbers(ranks):
    small = change(make(n_kv_head=1), "eigen", ranks=[ranks] * 4)
    with torch.no_grad():
        for p in small.parameters():
            p.add_(torch.randn_like(p) * 0.1)
        assert close(small(WINDOWS[:2])[0], plain_reuse.logits(small, WINDOWS[:2]))

def test_a_reuse_layer_has_only_values_to_compress():
    small = compress(make(share="1-3"), 6)
    cache = KVCache(small, 1, 10)
    assert [(k.size(3), v.size(3)) for k, v in zip(cache.k, cache.v)] == [(6, 6), (6, 6), (0, 6), (0, 6)]
    assert [hasattr(block.attn, "restore") for block in small.blocks] == [True, True, False, False]
    corrected = KVCache(compress(make(share="1-3", rank=4), 6), 1, 10)
    assert [k.size(3) for k in corrected.k] == [6, 6, 4, 4]

def test_keys_or_values_alone_can_be_narrower():
    torch.manual_seed(0)
    small = change(make(share="1-3", share_kind="kv"), "eigen", ranks=[[16, 5], [5, 16], [5, 16], [5, 16]])
    with torch.no_grad():
        for p in small.parameters():
            p.add_(torch.randn_like(p) * 0.1)
        assert close(small(WINDOWS[:1])[0], plain_reuse.logits(small, WINDOWS[:1]))
    assert small.blocks[0].attn.restore is None and small.blocks[1].attn.restore.shape == (2, 5, 16)

@sharings
@pytest.mark.parametrize("chunks", [[48], [1] * 48, [20, 1, 27]], ids=lambda c: f"{len(c)} chunks")
def test_cached_logits_are_the_uncached_ones_and_survive_wrapping(mode, chunks):
    small, idx = compress(make(**mode), 7), WINDOWS[:2]
    cache, ring = KVCache(small, 2, 48), KVCache(small, 2, 48)
    long = torch.cat((idx, idx.flip(1)), 1)                     # 96 tokens, 48 slots
    with torch.no_grad():
        cached = torch.cat([small(part, cache=cache)[0] for part in idx.split(chunks, dim=1)], 1)
        assert close(cached, small(idx)[0])
        wrapped = torch.cat([small(part, cache=ring)[0] for part in long.split(chunks * 2, dim=1)], 1)
        assert close(wrapped, plain_reuse.logits(small, long, window=48))

def test_keys_are_rotated_by_the_positions_that_a_cache_tells():
    small = compress(make(), 7)
    plain, told, idx = KVCache(small, 2, 48), KVCache(small, 2, 48), WINDOWS[:2, :9]
    told.key_positions = lambda layer: told.positions.expand(2, 1, -1)
    with torch.no_grad():
        for part in idx.split(1, dim=1):
            torch.testing.assert_close(small(part, cache=told)[0], small(part, cache=plain)[0])

@sharings
@pytest.mark.parametrize("ranks", [[[3, 5], [8, 2], [1, 8], [8, 8]], [[8, 8]] + [[4, 2]] * 3], ids=str)
def test_predictions_equal_measurements(mode, ranks):
    if mode.get("share_kind") == "kv":
        ranks = [ranks[0]] + [ranks[1]] * 3                     # a span of CLA has one rank
    small = change(make(block_size=300, n_embd=32, **mode), "eigen", ranks=ranks)
    for context, batch_size in ((1, 1), (260, 1), (9, 3)):      # 260: more than a chunk
        assert cost.predict(small, context, batch_size) == cost.measure(small, context, batch_size)

def test_the_bill_of_a_narrow_layer_by_hand():
    full = make(n_layer=1, n_embd=32)                           # C = 32, H = 4, G = 2, D = 8
    small = change(make(n_layer=1, n_embd=32), "eigen", ranks=[[3, 5]])
    was, bill = cost.predict(full, 40), cost.predict(small, 40)
    saved = 2 * (5 + 3) * 32 + 3 * 4 * 32                       # rows of k and v, columns of out
    assert was.params - bill.params == saved - 2 * 3 * 8        # but restore
    assert bill.cache_bytes_per_token == (3 + 5) * 2 * 4
    sums = 2 * 4 * 3 * 40                                       # the weighted sum of fewer numbers
    assert was.decode_flops - bill.decode_flops == 2 * saved + sums - 2 * 2 * 3 * 8 * 40

def test_layers_are_rebuilt_from_what_was_recorded():
    small = compress(make(share="0-2", heads="mix"), 6)
    assert [step["by"] for step in changes(small)] == ["heads", "eigen"]
    again = empty(small.config, changes(small))
    again.load_state_dict(small.state_dict(), assign=True)
    assert torch.equal(again.eval()(WINDOWS)[0], small(WINDOWS)[0])

def test_heads_and_corrections_can_come_after():
    small = compress(make(share="0-2"), 6)
    for changed in (heads.share(small, "0-2", "mix"), lowrank.correct(small, "0-2", 4)):
        with torch.no_grad():
            assert close(changed(WINDOWS)[0], small(WINDOWS)[0])
            assert close(changed(WINDOWS[:1])[0], plain_reuse.logits(changed, WINDOWS[:1]))

def test_it_works_in_bfloat16():
    model = make(share="1-2")
    small = compress(model.bfloat16(), 8)
    assert small(WINDOWS)[0].dtype == torch.bfloat16 and small(WINDOWS)[0].isfinite().all()

# ---- which numbers ----

def test_the_basis_is_the_best_of_its_rank_in_its_metric():
    torch.manual_seed(0)
    x = torch.randn(2, 500, 6, dtype=torch.float64) * torch.tensor([5, 1, 3, .1, 2, 1])
    a = torch.randn(2, 9, 6, dtype=torch.float64)
    E, F, errors = eigen.basis(x.mT @ x, a.mT @ a)

    def error(P):                                               # Σ |a (x − P x)|²
        return ((x - x @ P.mT) @ a.mT).square().sum().item()

    for r in range(1, 6):
        P = F[:, :r].mT @ E[:, :r]
        predicted = errors[:, r:].sum().item()
        assert error(P) == pytest.approx(predicted, rel=1e-2, abs=1e-6 * errors.sum().item())
        for _ in range(20):                                     # no other projection of that rank is better
            Q = torch.linalg.qr(P + 0.3 * torch.randn_like(P)).Q[..., :r]
            assert error(Q @ torch.linalg.pinv(Q)) >= error(P) * (1 - 1e-2)

def test_the_metric_beats_plain_singular_vectors(monkeypatch):
    model, plain = make(), eigen.basis
    with torch.no_grad():
        exact = model(WINDOWS)[0]
        ours = (compress(model, 8)(WINDOWS)[0] - exact).square().mean()
        monkeypatch.setattr(eigen, "basis", lambda S, M: plain(S, torch.eye(16, dtype=S.dtype).expand_as(M)))
        theirs = (compress(model, 8)(WINDOWS)[0] - exact).square().mean()
    assert ours < theirs

def rope_at(x, position):
    """x (T, D), all of them rotated as at one position, float64."""
    late = torch.zeros(position + 1, x.size(1), dtype=torch.float64)
    rows = []
    for row in x:
        late[-1] = row
        rows.append(rope(late, 10000.0)[-1])
    return torch.stack(rows)

def test_moments_are_the_sums_that_they_stand_for():
    model = make(n_layer=1)
    block, x, step, below = next(walk(model, WINDOWS[:2]))
    attn, (N, T), H, G, D = block.attn, (2, 48), 4, 2, 16
    with torch.no_grad():
        (S_k, M_k), (S_v, M_v) = eigen.moments(model, WINDOWS[:2])[0]
        y, P = attn(block.norm(x), step)[0].double(), model.attention_weights(WINDOWS[:2])[0].double()
        q, k, v = (part.view(N, T, -1, D).double() for part in attn.qkv(block.norm(x)).split(attn.widths, 2))
    W, u = attn.out.weight.detach().double().view(64, H, D), 1 / (x + y).square().sum(-1)
    plain = torch.zeros(4, G, D, D, dtype=torch.float64)
    total = torch.zeros(G, dtype=torch.float64)
    for n in range(N):
        for h in range(H):
            g = h * G // H
            z = P[n, h] @ v[n, :, g]                            # (T, D)
            plain[2, g] += (z * u[n, :, None]).T @ z
            plain[3, g] += W[:, h].T @ W[:, h] * G / H
            apart = (v[n, None, :, g] - z[:, None]) @ W[:, h].T         # (T, S, C)
            w = u[n, :, None] * P[n, h].square() * apart.square().sum(-1)
            total[g] += w.sum()
            plain[0, g] += torch.einsum("ts,sd,se->de", w, k[n, :, g], k[n, :, g])
            for back in range(T):                               # a query turned by its distance to the key
                rows = rope_at(q[n, back:, h], back) * w.diagonal(-back)[:, None].sqrt()
                plain[1, g] += rows.T @ rows / D
    assert close(S_k / S_k.norm(), plain[0] / S_k.norm()) and close(S_v, plain[2])
    assert close(M_v, plain[3] / N)
    M = plain[1] / total[:, None, None]
    assert (M_k - M).norm() < 0.1 * M.norm()                    # from samples

def test_the_error_of_the_first_layer_is_about_what_was_allowed():
    model = make(n_layer=1)
    block, x, step, below = next(walk(model, WINDOWS))
    with torch.no_grad():
        y = block.attn(block.norm(x), step)[0]
        for allowed in (0.05, 0.1, 0.2):
            small = eigen.compress(model, WINDOWS, error=allowed)
            off = small.blocks[0].attn(block.norm(x), step)[0] - y
            error = (off.square().sum(-1) / (x + y).square().sum(-1)).mean().sqrt().item()
            assert 0.4 * allowed < error < 1.5 * allowed, (allowed, changes(small))

def test_what_an_anchor_drops_of_its_keys_counts_in_all_layers_of_its_span():
    model = make(share="0-2")                                   # and layer 3, which shares nothing
    moments, allowed = eigen.moments(model, WINDOWS), 0.2**2 * WINDOWS.numel()
    errors_k = [keys and eigen.basis(*keys)[2].sum(0) for keys, _ in moments]
    errors_v = [eigen.basis(*values)[2].sum(0) for _, values in moments]
    ranks = changes(eigen.compress(model, WINDOWS, error=0.2))[0]["settings"]["ranks"]

    def error(layer, k, v):                                     # of a layer that keeps so many
        n_layers, keys = {0: (3, 0), 1: (1, 0), 2: (1, 0), 3: (1, 3)}[layer]
        return n_layers * errors_k[keys][k:].sum() + errors_v[layer][v:].sum()
    for layer, (k, v) in enumerate(ranks):
        k = ranks[0][0] if layer in (1, 2) else k               # a reuse layer has no keys
        assert error(layer, k, v) <= allowed < error(layer, k, v - 1), layer
    assert allowed < error(0, ranks[0][0] - 1, ranks[0][1])

def test_the_cheapest_numbers_are_dropped_first():
    k, v = torch.tensor([9.0, 2.0, 0.5, 0.1]), torch.tensor([8.0, 1.0, 0.2, 0.0])
    for budget, kept in {0.0: [4, 3], 0.31: [3, 2], 0.85: [2, 2], 1e9: [1, 1]}.items():
        assert eigen.numbers_to_keep(k, v, budget) == kept

def test_all_layers_of_a_cla_span_keep_the_same_values():
    small = eigen.compress(make(share="1-3", share_kind="kv"), WINDOWS, error=0.1)
    ranks = changes(small)[0]["settings"]["ranks"]
    assert ranks[1] == ranks[2] == ranks[3] and min(ranks[1]) < 16
    assert [block.attn.out.in_features for block in small.blocks[1:]] == [4 * ranks[1][1]] * 3

def test_a_smaller_error_keeps_more():
    kept = [sum(map(sum, changes(eigen.compress(make(), WINDOWS, error=error))[0]["settings"]["ranks"]))
            for error in (0.01, 0.1, 0.3)]
    assert kept[0] > kept[1] > kept[2]

# ---- refit ----

@pytest.mark.parametrize("mode", [SHARING[i] for i in (0, 1, 4)], ids=str)
def test_refitting_brings_a_compressed_model_nearer_to_the_one_that_it_came_from(mode):
    model = make(**mode)
    small = compress(model, 8)
    with torch.no_grad():
        exact = model(WINDOWS)[0]
        before = (small(WINDOWS)[0] - exact).square().mean()
        refit(small, model, WINDOWS, ridge=0.01)
        assert (small(WINDOWS)[0] - exact).square().mean() < before
        assert torch.equal(model(WINDOWS)[0], exact)

def test_what_shares_and_is_narrower_can_be_refitted_to_full_attention():
    model = make()
    small = compress(reconfigure(model, share="1-3"), 8)
    with torch.no_grad():
        exact = model(WINDOWS)[0]
        before = (small(WINDOWS)[0] - exact).square().mean()
        refit(small, model, WINDOWS)
        assert (small(WINDOWS)[0] - exact).square().mean() < before

# ---- what is refused ----

def test_what_cannot_be_compressed_is_refused():
    small = compress(make(), 8)
    with pytest.raises(ValueError, match="--rank, --error: the model is compressed already"):
        compress(small, 4)
    with pytest.raises(ValueError, match="--rank: must be from 1 to 16, the width of a head"):
        compress(make(), 17)
    for ranks in ([[1, 2]], [[1, 2]] * 3 + [[0, 2]], [[1, 2]] * 3 + [[1, 17]]):
        with pytest.raises(ValueError, match="--rank: must be from 1 to 16|shorter"):
            change(make(), "eigen", ranks=ranks)

def test_a_compressed_model_is_written_loaded_and_trained_on(run, text, tmp_path):
    files = [f"--text={text}", f"--data_dir={tmp_path}/data"]
    short = ["--batch_size=4", "--warmup_iters=2", "--device=cpu", *files]
    shape = ["--n_layer=3", "--n_head=2", "--n_embd=32", "--block_size=16", "--vocab_size=300"]
    assert run(train.main, *short, *shape, "--max_iters=0", "--out_dir=full")[0] == 0
    assert run(heads.main, "full", "--share=1-2", "--heads=mix", "--refit", "--out=mixed")[0] == 0
    for name, flags in {"a": ["full", "--rank=5"], "b": ["full", "--error=0.2", "--refit"],
                        "c": ["mixed", "--rank=5", "--refit"]}.items():
        status, out, err = run(eigen.main, *flags, f"--out={name}")
        assert status == 0 and f"wrote {name}" in out, err
        assert load(name)[0].generate(torch.zeros(1, 1, dtype=torch.long), 20).shape == (1, 21)
    assert KVCache(load("c")[0], 1, 9).nbytes == 9 * (4 * 5 * 2 + 2 * 5) * 4
    assert run(train.main, *short, "--init_from=c", "--max_iters=2", "--out_dir=tuned")[0] == 0
    before, after = (load(name)[0].blocks[1].attn.restore for name in ("c", "tuned"))
    assert not torch.equal(before, after)
    for flags, reason in {("full",): "--rank, --error: give one", ("full", "--rank=0"): "--rank",
                          ("full", "--rank=3", "--error=0.1"): "--rank, --error: give one",
                          ("full", "--error=0"): "--error",
                          ("full", "--rank=17"): "--rank: must be from 1 to 16",
                          ("a", "--rank=3"): "compressed already",
                          ("a", "--error=0.1"): "compressed already"}.items():
        status, _, err = run(eigen.main, *flags, "--out=x")
        assert status == 2 and err.count("\n") == 1 and reason in err, (flags, err)
