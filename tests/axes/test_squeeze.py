"""Squeezed caches against a plain simulation with Python sets of tokens."""

import functools
import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from minisa import cost
from minisa.axes import eigen, heads, lowrank, squeeze
from minisa.axes.heads import Matched, Mixed
from minisa.axes.lowrank import Corrected
from minisa.axes.squeeze import POLICIES, Floats, Snap, Squeezing, Whole, budgets, loss, read, units
from minisa.axes.top import TopAttention
from minisa.kit import cli
from minisa.kit.data import tokenize
from minisa.kit.tokenizer import Tokenizer
from minisa.model import GPT, GPTConfig, KVCache, rope_angles, rotate

IDX = torch.randint(50, (2, 40), generator=torch.Generator().manual_seed(1))

def stir(model):
    """Move the numbers of a model far from their small initial values."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.25)
    return model

def make(**mode):
    torch.manual_seed(0)
    shape = dict(block_size=64, vocab_size=50, n_layer=5, n_head=4, n_embd=32, n_hidden=48)
    return stir(GPT(GPTConfig(**shape | mode)).eval())

def mixed():
    return stir(heads.share(make(n_kv_head=2), "0-2", "mix"))

def matched():
    model = heads.share(make(), "1-3", "match")
    for layer in (2, 3):
        model.blocks[layer].attn.source = torch.tensor([2, 0, 0, 3])
    return model

MODELS = {
    "full": make,
    "gqa": lambda: make(n_kv_head=2),
    "weights": lambda: make(share="1-3"),
    "two spans, one kv head": lambda: make(share="1-2,3-4", n_kv_head=1),
    "kv": lambda: make(share="1-3", share_kind="kv"),
    "kv, gqa": lambda: make(share="0-1,2-4", share_kind="kv", n_kv_head=2),
    "top": lambda: make(share="1-3", share_kind="top-4", n_kv_head=2),
    "match": matched,
    "mix": mixed,
    "lowrank": lambda: stir(lowrank.correct(make(n_kv_head=2), "1-3", 2)),
}
models = pytest.mark.parametrize("kind", MODELS)
policies = pytest.mark.parametrize("policy", POLICIES)

SINKS = 4
OBSERVERS = 6                   # in place of 32, so that a short prompt has tokens before them

@pytest.fixture
def few_observers(monkeypatch):
    monkeypatch.setattr(Snap, "OBSERVERS", OBSERVERS)

class Plain:
    """One sequence through a model, token by token. After `prompt` tokens each unit u keeps rooms[u], by sets
    of positions."""

    def __init__(self, model, prompt, policy, rooms):
        self.model, self.config = model, model.config
        self.prompt, self.policy, self.rooms = prompt, policy, rooms
        self.units, L = units(model.config), model.config.n_layer
        self.k, self.v = [{} for _ in range(L)], [{} for _ in range(L)]     # position → (G, d)
        self.kept, self.got = [set() for _ in self.units], [{} for _ in self.units]

    def evict(self, u, length, room):
        kept, got = self.kept[u], self.got[u]
        first = self.prompt - (8 if self.policy == "distinct" else OBSERVERS)
        while len(kept) > room:
            if self.policy == "heavy":
                old = [p for p in kept if p < length - self.rooms[u] // 2]
                kept.remove(min(old, key=lambda p: got[p]))
            elif self.policy == "snap" and min(kept) < first:
                pooled = {p: max(got[near] for near in range(max(0, p - 3), min(p + 4, first)))
                          for p in sorted(kept) if p < first}      # of two alike, the older goes
                kept.remove(min(pooled, key=pooled.get))
            elif self.policy == "distinct" and min(kept) < first:
                unlike = self.unlike
                kept.remove(min((p for p in sorted(kept) if p < first), key=unlike.__getitem__))
            else:
                kept.remove(min(p for p in kept if self.policy != "sinks" or p >= SINKS))

    @functools.cached_property
    def unlike(self):
        """How unlike the prompt's mean the passage around each of its tokens is, by all layers."""
        alone = [0.0] * self.prompt
        for values in filter(None, self.v):
            of_heads = torch.stack([values[p] for p in range(self.prompt)], dim=1)  # (G, T, D)
            for x in of_heads:
                x = x / x.norm(dim=1, keepdim=True)
                mean = x.mean(0)
                for p in range(self.prompt):
                    alone[p] -= (x[p] @ mean / mean.norm()).item() / len(of_heads)
        near = [alone[max(0, p - 3):p + 4] for p in range(self.prompt)]
        return [sum(passage) / len(passage) for passage in near]

    def rotated(self, x, n, t):
        """x (n·d,) of position t → (n, d), turned by every (D/d)-th of RoPE's angles."""
        stride = self.config.head_dim * n // len(x)
        rope = rope_angles(self.config, torch.tensor(t))[::stride]
        return rotate(x.view(1, n, 1, -1), rope).view(n, -1)

    def scores(self, q, layer, places):
        """q (H, d) against the keys of a layer → (H, S)."""
        H, G = self.config.n_head, self.config.n_kv_head
        keys = torch.stack([self.k[layer][p] for p in places])              # (S, G, d)
        return torch.stack([keys[:, h * G // H] @ q[h] for h in range(H)]) / math.sqrt(q.size(1))

    def weights(self, attn, q, layer, anchor, places):
        """What the layer attends with, (H, S)."""
        if layer == anchor:
            self.anchor_scores = self.scores(q, layer, places)
            return self.anchor_scores.softmax(-1)
        if isinstance(attn, Corrected):
            return (self.anchor_scores + self.scores(q, layer, places)).softmax(-1)
        if isinstance(attn, TopAttention):
            G = self.config.n_kv_head
            weights = self.anchor_scores.softmax(-1).view(G, -1, len(places)).sum(1)        # (G, S)
            few = weights.topk(min(attn.k, len(places))).indices
            hidden = torch.ones_like(weights).scatter(1, few, 0).repeat_interleave(len(q) // G, dim=0)
            return self.scores(q, layer, places).masked_fill(hidden.bool(), -math.inf).softmax(-1)
        if q is not None:                                                   # CLA
            return self.scores(q, anchor, places).softmax(-1)
        P = self.anchor_scores.softmax(-1)
        if isinstance(attn, Mixed):
            return attn.mix @ P
        return P[attn.source] if isinstance(attn, Matched) else P

    def attend(self, layer, u, x, t, places):
        """x (C,) → the stream after a layer."""
        H, G = self.config.n_head, self.config.n_kv_head
        block, anchor = self.model.blocks[layer], self.units[u][0]
        q, k, v = (block.attn.qkv.weight @ block.norm(x)).split(block.attn.widths)
        if len(k):
            self.k[layer][t] = self.rotated(k, G, t)
        if len(v):
            self.v[layer][t] = v.view(G, -1)
        P = self.weights(block.attn, self.rotated(q, H, t) if len(q) else None, layer, anchor, places)
        if self.policy == "heavy" or self.prompt - OBSERVERS <= t < self.prompt:
            for p, weight in zip(places, P.sum(0).tolist()):
                self.got[u][p] += weight
        source = layer if len(v) else anchor
        values = torch.stack([self.v[source][p] for p in places])           # (S, G, D)
        y = torch.cat([P[h] @ values[:, h * G // H] for h in range(H)])
        x = x + block.attn.out.weight @ y
        return x + block.mlp(block.norm(x))

    def logits(self, tokens):
        """→ (T, V)"""
        out = []
        for t, token in enumerate(tokens.tolist()):
            x = self.model.embed.weight[token]
            for u, unit in enumerate(self.units):
                if t >= self.prompt:
                    self.evict(u, t, self.rooms[u] - 1)
                self.kept[u].add(t)
                self.got[u][t] = 0.0
                for layer in unit:
                    x = self.attend(layer, u, x, t, sorted(self.kept[u]))
            for u, room in enumerate(self.rooms):
                if t == self.prompt - 1:
                    self.evict(u, self.prompt, room)
            out.append(self.model.head(self.model.norm(x)))
        return torch.stack(out)

def squeezed(model, idx, *settings):
    """→ a cache that has read idx (B, T)."""
    way = Squeezing(*settings)
    return way.of(read(model, idx, [way]))

def one_by_one(model, cache, idx):
    """Logits (B, T, V) of idx (B, T), a token at a time."""
    return torch.cat([model(token, cache=cache)[0] for token in idx.split(1, dim=1)], 1)

# ---- what it attends to ----

@models
@policies
@torch.no_grad()
def test_a_squeezed_cache_attends_to_what_the_policy_keeps(kind, policy, few_observers):
    model, idx = MODELS[kind](), IDX[:, :32]
    cache = squeezed(model, idx[:, :20], 10, policy, 0.5)
    rooms = [kept.where.size(1) for kept in cache.units]
    got = one_by_one(model, cache, idx[:, 20:])
    for row, tokens in zip(got, idx):
        expected = Plain(model, 20, policy, rooms).logits(tokens)[20:]
        torch.testing.assert_close(row, expected, atol=2e-3, rtol=1e-3)

@models
@torch.no_grad()
def test_with_room_for_all_nothing_changes(kind):
    model = MODELS[kind]()
    cache = squeezed(model, IDX[:, :20], 40, "heavy", 1)
    got = one_by_one(model, cache, IDX[:, 20:])
    torch.testing.assert_close(got, model(IDX)[0][:, 20:], atol=1e-3, rtol=1e-3)

@policies
@pytest.mark.parametrize("mode", [{}, dict(share="2-4"), dict(share="2-4", share_kind="kv")], ids=str)
@torch.no_grad()
def test_it_goes_on_with_narrow_keys_that_are_rotated_when_read(policy, mode):
    model = eigen.compress(make(**mode), IDX, rank=5)
    cache = squeezed(model, IDX[:, :25], 40, policy, 1)
    got = one_by_one(model, cache, IDX[:, 25:])
    torch.testing.assert_close(got, model(IDX)[0][:, 25:], atol=1e-3, rtol=1e-3)

@policies
@torch.no_grad()
def test_narrow_keys_keep_their_positions_when_others_go(policy):
    full = make(share="2-4", n_kv_head=2)
    exact = eigen.compress(full, IDX, rank=8)                   # all of a head: the same model
    expected, got = (one_by_one(model, squeezed(model, IDX[:, :25], 12, policy), IDX[:, 25:])
                     for model in (full, exact))
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)
    narrow = eigen.compress(full, IDX, rank=7)
    rooms = squeezed(narrow, IDX[:, :25], 12, policy).rooms
    assert min(rooms) == 6 and len(set(rooms)) == 2

@torch.no_grad()
def test_several_tokens_go_through_one_at_a_time():
    model = make()
    caches = [squeezed(model, IDX[:, :20], 12) for _ in range(2)]
    one_by_one(model, caches[0], IDX[:, 20:30])
    expected = model.generate(IDX[:, 30:31], 5, temperature=0, cache=caches[0])[:, 1:]
    got = model.generate(IDX[:, 20:31], 5, temperature=0, cache=caches[1])[:, 11:]
    assert torch.equal(got, expected)
    with pytest.raises(ValueError, match="2 tokens at once are more than the 1"):
        model(IDX[:, :2], cache=caches[0])

def test_generation_goes_on_past_the_prompt_and_the_budget():
    model = make()
    cache = squeezed(model, IDX[:, :-1], 12)
    out = model.generate(IDX[:, -1:], 50, temperature=0, cache=cache)
    assert out.shape == (2, 51) and cache.length == 39 + 50

@policies
@pytest.mark.parametrize("n", [0, 1, 5])
def test_a_prompt_may_be_shorter_than_the_budget(n, policy):
    model = make(share="1-3")
    cache = squeezed(model, IDX[:, :n], 24, policy)     # at least 12 in each layer
    got = model.generate(IDX[:, n:n + 1], 4, temperature=0, cache=cache)
    assert torch.equal(got, model.generate(IDX[:, :n + 1], 4, temperature=0)[:, n:])

@policies
def test_attention_weights_are_formed_and_handed_over_only_where_the_policy_needs_them(policy, monkeypatch):
    model, calls, handed = make(), [], []
    fused, receive = F.scaled_dot_product_attention, squeeze.SqueezedCache.receive
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or fused(*a, **k))
    monkeypatch.setattr(squeeze.SqueezedCache, "receive", lambda *a: handed.append(1) or receive(*a))
    cache = squeezed(model, IDX, 12, policy)
    of_prompt = not calls
    model(IDX[:, :1], cache=cache)                          # of a single token, they are always formed
    asked = POLICIES[policy].watches_prompt, POLICIES[policy].watches_new
    assert (of_prompt, bool(handed)) == asked

def test_a_policy_may_build_on_another():
    class Older(Snap):
        pass

    class Oldest(Older):
        pass

    assert {Snap, Older, Oldest} <= {*squeeze.subclasses(squeeze.Policy)}

class Halves(Floats):
    """Another storage: the first and the second half of the numbers, apart."""

    def __init__(self, tokens, room):
        B, G, _, d = tokens.shape
        self.tensors = [tokens.new_zeros(room, B, G, len(range(half, d, 2))) for half in (0, 1)]
        for half, t in enumerate(self.tensors):
            t[:tokens.size(2)] = tokens[..., half::2].permute(2, 0, 1, 3)

    def put(self, sequences, places, new):
        for half, t in enumerate(self.tensors):
            t[places, sequences] = new[..., half::2]

    def first(self, count):
        even, odd = (t[:count].permute(1, 2, 0, 3) for t in self.tensors)
        both = even.new_empty(*even.shape[:3], even.size(3) + odd.size(3))
        both[..., 0::2], both[..., 1::2] = even, odd
        return both

@models
@policies
@torch.no_grad()
def test_another_storage_combines_with_every_policy_and_model(kind, policy):
    model = MODELS[kind]()
    floats, halves = (squeezed(model, IDX[:, :25], 12, policy, 0.5, storage) for storage in (Floats, Halves))
    expected, got = (one_by_one(model, cache, IDX[:, 25:32]) for cache in (floats, halves))
    torch.testing.assert_close(got, expected)
    assert halves.nbytes == floats.nbytes

# ---- budgets ----

def test_the_layers_of_a_span_are_one_unit():
    assert units(GPTConfig(n_layer=6, share="1-2,4-5")) == [(0,), (1, 2), (3,), (4, 5)]
    assert units(GPTConfig(n_layer=2)) == [(0,), (1,)]

def test_layers_that_change_the_stream_least_are_cut_and_the_bytes_stay():
    groups = [(0,), (1,), (2,), (3,), (4,), (5, 6, 7)]
    cosines = [0.5, 0.6, 0.9, 0.91, 0.99, 0.995, 0.995, 0.995]
    sizes = [2, 2, 2, 2, 2, 2, 1, 1]                            # k and v; the reuse layers v only
    found = budgets(groups, cosines, sizes, 100, 0.4)
    assert found[4] == found[5] == 40 and len(set(found[:4])) == 1
    size = [2, 2, 2, 2, 2, 4]                                   # the span holds k once and v three times
    total = sum(n * s for n, s in zip(found, size))
    assert 100 * sum(size) - sum(size) < total <= 100 * sum(size)

def test_the_layers_that_are_cut_are_the_highest_of_the_best_three_groups():
    import itertools
    import statistics
    generator = torch.Generator().manual_seed(0)
    uneven = [0.0, 5.0, 5.1, 5.2, 5.3, 5.4, 9.0]
    for values in (uneven, *torch.rand(4, 7, generator=generator, dtype=torch.float64).tolist()):
        def squares(labels, values=values):
            groups = [[v for v, label in zip(values, labels) if label == g] for g in range(3)]
            if not all(groups):
                return math.inf
            return sum((v - statistics.fmean(group))**2 for group in groups for v in group)
        labels = min(itertools.product(range(3), repeat=7), key=squares)        # of all ways to group them
        highest = labels[values.index(max(values))]
        least = min(v for v, label in zip(values, labels) if label == highest)
        assert squeeze.third_group(torch.tensor(values, dtype=torch.float64)) == least

def test_a_squeezed_cache_holds_no_memory_but_what_it_says():
    model, way = make(block_size=256), Squeezing(60, "window", 1)
    cache = way.of(read(model, torch.randint(50, (2, 200)), [way]))
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in cache.tensors}
    assert sum(held.values()) == cache.nbytes

@pytest.mark.parametrize("cosines, cut", [([0.1, 0.5, 0.9], 1), ([0.5] * 3, 0.4)])
def test_without_a_cut_or_a_difference_all_budgets_are_the_same(cosines, cut):
    assert budgets([(0,), (1,), (2,)], cosines, [2, 2, 2], 100, cut) == [100] * 3

def test_memory_is_freed_and_the_same_for_equal_and_unequal_budgets():
    model = make(block_size=256)
    idx = torch.randint(50, (3, 200))
    ways = [Squeezing(60, "sinks", cut) for cut in (1, 0.5)]
    reading = read(model, idx, ways)
    equal, unequal = (way.of(reading) for way in ways)
    assert equal.nbytes == reading.cache.nbytes * 60 // 200
    assert 0.97 * equal.nbytes < unequal.nbytes <= equal.nbytes
    assert len(set(unequal.rooms)) == 2
    before = unequal.nbytes
    for _ in range(5):
        model(idx[:, :1], cache=unequal)
    assert unequal.nbytes == before and unequal.length == 205

@models
@policies
def test_the_bill_of_a_squeezed_cache_is_predicted(kind, policy):
    model = MODELS[kind]()
    cache = squeezed(model, torch.zeros(2, 49, dtype=torch.long), 20, policy)
    measured = cost.measure(model, 50, batch_size=2, cache=cache)
    assert cost.predict(model, 50, batch_size=2, kept=cache.rooms) == measured

def test_the_bill_of_a_squeezed_cache_with_narrow_keys_is_predicted():
    model = eigen.compress(make(share="2-4"), IDX, rank=5)
    cache = squeezed(model, torch.zeros(1, 49, dtype=torch.long), 20)
    measured = cost.measure(model, 50, cache=cache)
    assert cache.predict(model, 50) == measured

# ---- what it looks at ----

@torch.no_grad()
def test_importance_is_the_cosine_before_and_after_attention():
    model = make(block_size=300, n_kv_head=2)
    idx = torch.randint(50, (2, 290))                           # more than one chunk
    expected, (x, step), P = [], model.start(idx), model.attention_weights(idx)
    for block in model.blocks:
        after = x + block.attn(block.norm(x), step)[0]
        expected.append(F.cosine_similarity(x, after, dim=-1).mean().item())
        x = after + block.mlp(block.norm(after))
    reading = read(model, idx, [Squeezing(8, "heavy")])
    assert reading.cosines == pytest.approx(expected, abs=1e-5) and reading.cache.length == 290
    received = reading.received[POLICIES["heavy"]]
    for layer in range(5):
        torch.testing.assert_close(received[layer,], P[layer].sum((1, 2)), atol=1e-3, rtol=1e-4)
    again = read(model, idx, [Whole(), Squeezing(8, "sinks")])
    assert again.cosines == pytest.approx(expected, abs=1e-5)

def test_a_span_receives_the_weights_of_all_its_layers():
    model = make(share="1-3", share_kind="kv")
    reading = read(model, IDX, [Squeezing(8, "heavy")])
    P, received = model.attention_weights(IDX), reading.received[POLICIES["heavy"]]
    assert list(received) == [(0,), (1, 2, 3), (4,)]
    torch.testing.assert_close(received[1, 2, 3], sum(P[1:4]).sum((1, 2)))

@torch.no_grad()
def test_snap_keeps_the_last_32_and_the_neighborhoods_that_these_attend_to():
    model, T, room = make(block_size=300), 270, 50              # two chunks; both hold some of the last 32
    idx = torch.randint(50, (2, T), generator=torch.Generator().manual_seed(2))
    way = Squeezing(room, "snap", 1)
    cache = way.of(read(model, idx, [way, Squeezing(room, "heavy", 1)]))
    for kept, P in zip(cache.units, model.attention_weights(idx)):
        for row, got in zip(kept.where, P[:, :, -32:].sum((1, 2)).tolist()):
            got = got[:T - 32]
            pooled = [max(got[max(0, p - 3):p + 4]) for p in range(T - 32)]
            least = sorted(pooled)[-(room - 32)]
            before = [p for p in row.tolist() if p < T - 32]
            assert row.tolist()[-32:] == [*range(T - 32, T)] and len(before) == room - 32
            assert min(pooled[p] for p in before) > least - 1e-4
            assert max(pooled[p] for p in {*range(T - 32)} - {*before}) < least + 1e-4

@torch.no_grad()
def test_distinct_keeps_the_passage_whose_values_differ():
    model, idx = make(block_size=100), torch.full((1, 90), 7)
    idx[:, 30:40] = torch.arange(20, 30)                        # the only other words
    cache = squeezed(model, idx, 30, "distinct", 1)
    assert {*range(31, 39), *range(82, 90)} <= {*cache.units[0].where[0].tolist()}      # layer 0 sees words

@torch.no_grad()
def test_tokens_read_at_once_are_seen_as_one_by_one():
    for mode in ({}, dict(share="1-3", n_kv_head=2), dict(share="1-3", share_kind="kv")):
        model, way = make(**mode), Squeezing(20, "snap")        # unequal budgets
        seen = read(model, IDX[:, :30], [way])
        at_once = squeeze.read_at_once(model, way.of(seen, free=6), IDX[:, 30:36])
        cache = way.of(seen, free=6)
        expected = torch.cat([model.hidden(token, cache) for token in IDX[:, 30:36].split(1, dim=1)], dim=1)
        torch.testing.assert_close(at_once, expected, atol=1e-4, rtol=1e-4)
        assert all(kept.count == kept.room and kept.length == 36 for kept in cache.units)

@torch.no_grad()
def test_one_reading_serves_prompts_that_end_at_different_places():
    model, ways = make(share="1-3"), [Squeezing(12, name, 1) for name in POLICIES]
    cache = KVCache(model, 2, 30)
    short, long = (squeeze.start_reading(model, cache, 2, T, ways) for T in (20, 30))
    squeeze.read_on(model, IDX[:, :20], [short, long])
    other = long.again()
    squeeze.read_on(model, IDX[:, 25:35], [other])              # another end, then
    cache.length = 20
    squeeze.read_on(model, IDX[:, 20:30], [long])
    for reading, T in ((short, 20), (long, 30)):
        for way in ways:
            alone = way.of(read(model, IDX[:, :T], [way]))
            got = way.of(reading)
            for a, b in zip(got.tensors, alone.tensors):
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)

@torch.no_grad()
def test_snap_lets_new_tokens_go_last():
    model = make(block_size=100)
    idx = torch.randint(50, (1, 90), generator=torch.Generator().manual_seed(3))
    cache = squeezed(model, idx[:, :50], 40, "snap", 1)
    one_by_one(model, cache, idx[:, 50:58])                     # the 8 that stayed from before the last 32 go
    assert all(sorted(kept.where[0].tolist()) == [*range(18, 58)] for kept in cache.units)
    one_by_one(model, cache, idx[:, 58:])                       # then the 32; all that stays is new
    assert all(sorted(kept.where[0].tolist()) == [*range(50, 90)] for kept in cache.units)

@pytest.mark.parametrize("room", [8, 31, 32, 33])
def test_snap_keeps_the_newest_of_the_32_if_there_is_room_for_fewer(room):
    cache, n = squeezed(make(block_size=100), torch.randint(50, (2, 60)), room, "snap", 1), min(room, 32)
    assert all(kept.where[0].tolist()[-n:] == [*range(60 - n, 60)] for kept in cache.units)

# ---- loss ----

@torch.no_grad()
def test_loss_is_that_of_the_tokens_after_the_prompt():
    model, windows = make(), torch.randint(50, (3, 41))
    logits = model(windows[:, :-1])[0][:, 30:]
    expected = F.cross_entropy(logits.flatten(0, 1), windows[:, 31:].flatten()).item()
    ways = Whole(), Squeezing(40, "heavy", 1), Squeezing(10, "heavy")
    reading = read(model, windows[:, :30], ways)
    whole, wide, narrow = (loss(model, way, windows, reading) for way in ways)
    assert whole == pytest.approx(expected, abs=1e-4) and wide == pytest.approx(expected, abs=1e-3)
    assert narrow != pytest.approx(expected, abs=1e-3)

BYTES = Tokenizer([bytes([b]) for b in range(256)])

@pytest.fixture
def data(text, tmp_path):
    return tokenize(text, tokenizer=BYTES, folder=tmp_path)

def test_bits_per_byte_are_those_of_the_last_quarters_of_windows(data):
    model = make(vocab_size=256)
    windows = data.windows("val", 4, 64)
    nats = model(windows[:, :-1], windows[:, 1:].where(torch.arange(64) >= 48, -100))[1].item()
    full, = squeeze.bits_per_byte(model, data, 1000, 64, [Whole()])
    assert full == pytest.approx(nats / math.log(2), abs=1e-4)
    wide, narrow = squeeze.bits_per_byte(model, data, 64, 64, [Squeezing(n, cut=1) for n in (64, 8)])
    assert wide == pytest.approx(nats / math.log(2), abs=1e-3) and narrow != pytest.approx(wide, abs=1e-3)

def test_a_prompt_is_read_once_for_all_settings(data, monkeypatch):
    model, calls = make(vocab_size=256), []
    args = SimpleNamespace(squeeze=20, squeeze_policy=["sinks", "window"], squeeze_cut=[1.0, 0.5],
                           cache_bits=None, context=64)
    ways = squeeze.ways_of(args, model)
    monkeypatch.setattr(squeeze, "read", lambda *args: calls.append(1) or read(*args))
    assert len(list(squeeze.bits_per_byte(model, data, 64, 64, ways))) == 5
    assert len(calls) == 1 and [way.name("m") for way in ways] == [
        "m", "m, squeeze 20 sinks equal", "m, squeeze 20 sinks 0.5", "m, squeeze 20 window equal",
        "m, squeeze 20 window 0.5"]
    assert ways[0].facts == {"policy": "", "budget": "", "cut": "", "bits": ""}
    assert ways[2].facts == {"policy": "sinks", "budget": 20, "cut": 0.5, "bits": ""}

def test_the_cache_for_the_bill_holds_all_but_a_token_of_the_context(data):
    model = make(vocab_size=256)
    cache = Squeezing(20, "sinks").for_bill(model, lambda: data, 64)
    assert cache.length == 63 and max(cache.rooms) < 63
    assert Whole().for_bill(model, None, 64) is None            # needs no text

@torch.no_grad()
def test_any_way_begins_a_text_that_stream_continues():
    model = make()
    for way in (Whole(), Squeezing(12), Squeezing(64, "window", 1)):
        rest, cache = way.begin(model, IDX)
        got = torch.cat((IDX, *model.stream(rest, 9, 0, cache=cache)), dim=1)
        if way != Squeezing(12):                                # which forgets
            assert torch.equal(got, model.generate(IDX, 9, 0))
    long = torch.cat((IDX, IDX), dim=1)                         # 80 tokens; the context is 64
    assert Squeezing(12).begin(model, long)[1].length == 63

# ---- flags ----

def parse(*flags):
    parser = cli.Parser("", "x")
    squeeze.add_flags(parser)
    return parser.parse_args(flags)

def test_the_help_tells_what_each_policy_keeps(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert all(f"{name} ({policy.__doc__})" in text for name, policy in POLICIES.items())

def test_several_policies_and_cuts_may_be_given():
    args = parse("--squeeze=8", "--squeeze_policy=sinks,heavy", "--squeeze_cut=1,0.5")
    assert (args.squeeze, args.squeeze_policy, args.squeeze_cut) == (8, ["sinks", "heavy"], [1.0, 0.5])
    args = parse()
    assert (args.squeeze, args.squeeze_policy, args.squeeze_cut) == (None, ["heavy"], [0.5])

WRONG = {"--squeeze=7": "7 is not a number from 8 up",
         "--squeeze_policy=oldest": f"invalid choice: 'oldest' .choose from {', '.join(POLICIES)}",
         "--squeeze_policy=snap,": "invalid choice: ''",
         "--squeeze_policy=policy": "invalid choice: 'policy'",
         "--squeeze_cut=0": "0 is not a number from 0.01 up", "--squeeze_cut=half": "invalid float value",
         "--squeeze_cut=0.5,2": "2 is more than 1", "--squeeze_cut=nan": "nan is not a number"}

@pytest.mark.parametrize("flag", WRONG)
def test_a_wrong_flag_is_refused_by_name(flag):
    with pytest.raises(ValueError, match=f"{flag.split('=')[0]}.*{WRONG[flag]}"):
        parse(flag)

def test_a_budget_above_the_context_is_refused():
    args = SimpleNamespace(squeeze=65, squeeze_policy=["heavy"], squeeze_cut=[0.5], cache_bits=None,
                           context=1000)
    with pytest.raises(ValueError, match="--squeeze=65: must be from 8 to the context of 64 tokens"):
        squeeze.ways_of(args, make())
