"""The cases of the exercises, made from SEED: change it, and all are new.

What is expected is computed by a plain formulation in numpy and float64, or counted on a real model. grade.py
puts the arguments to an answer, and judge.py compares. A case belongs to a group, which earns points
together; no group is right for an answer that is always the same.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
import torch

SEED = 0
GROUPED = "heads share groups"          # GQA, a group of cases of its own

class Case(NamedTuple):
    group: str
    arguments: dict             # by their names, in order
    expected: object            # a list, an array, a number, or ValueError
    after: list | None = None   # what the first argument must be after the call, if that matters

    @property
    def values(self):
        return list(self.arguments.values())

# ---- parts of cases ----

def softmax(scores):
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()

def random_weights(rng, H, T):
    """Attention weights (H, T, T) like those of a real layer: rows sum to 1, some sharp and some flat, and no
    token attends to a later one."""
    P = np.zeros((H, T, T))
    for h in range(H):
        for t in range(T):
            sharpness = rng.uniform(0, 6)
            row = softmax(sharpness * rng.normal(size=t + 1)).round(2)
            row[row.argmax()] += 1 - row.sum()
            P[h, t, :t + 1] = row
    return P.round(2)

def numbers(rng, *shape):
    """Of few digits, so that a case is short enough to paste."""
    return rng.normal(size=shape).round(1) + 0.0                  # no -0.0

def weighted_sums(P, v):
    """P (H, T, S), v (G, S, D) → (H, T, D), head by head."""
    heads_per_group = len(P) // len(v)
    return np.stack([weights @ v[h // heads_per_group] for h, weights in enumerate(P)])

def spans_of(lengths):
    """Lengths of spans, from the first layer on, where 1 is a full layer → --share, and each layer's role."""
    spans, roles = [], []
    for length in lengths:
        first = len(roles)
        last = first + length - 1
        if length == 1:
            roles.append("full")
            continue
        spans.append(f"{first}-{last}")
        roles.append("anchor")
        roles += ["reuse"] * (length - 1)
    return ",".join(spans), roles

def tensor(array):
    return torch.tensor(array, dtype=torch.float32)

def tensors(**arrays):
    return {name: tensor(array) for name, array in arrays.items()}

# ---- the exercises: each function yields its cases ----

def attention_row(rng):
    for T, D, t in ((1, 4, 0), (6, 4, 3), (6, 8, 5), (5, 9, 2)):
        q = numbers(rng, T, D)
        k = numbers(rng, T, D)
        yield attention_case("small scores", q, k, t)
    above = [1000] * 6                              # exp(1000) overflows float64,
    below = [-1000] * 6                             # exp(-1000) is 0
    apart = [-1500, 1500, 1500, -1500, -1500, 0]    # what is subtracted must be the largest,
    later = [-1000, -1000, -1000, -1000, 0, 3000]   # and of those that t may see
    for added in (above, below, apart, later):
        q, k = rng.integers(-2, 3, size=(2, 6, 4)).astype(float)
        q[:, 0] = 50
        k[:, 0] = np.array(added) / 25              # D = 4, so this is added to the scores
        yield attention_case("large scores", q, k, 3)       # small integers: exact in float32 too

def attention_case(group, q, k, t):
    T, D = q.shape
    scores = k[:t + 1] @ q[t] / np.sqrt(D)
    expected = np.zeros(T)
    expected[:t + 1] = softmax(scores)
    arguments = {"q": q.tolist(), "k": k.tolist(), "t": t}
    return Case(group, arguments, expected.tolist())

def reuse_layer(rng):
    shapes = (2, 2, 3, 4, 5), (3, 3, 2, 4, 7), (4, 2, 2, 3, 6), (4, 1, 2, 4, 3), (6, 2, 2, 3, 5)
    for H, G, D, T, C in shapes:                # C is not H·D: no matrix is square, so each .T counts
        P = random_weights(rng, H, T)
        x = numbers(rng, T, C)
        W_v = numbers(rng, G * D, C)
        W_out = numbers(rng, C, H * D)
        v = (x @ W_v.T).reshape(T, G, D).transpose(1, 0, 2)         # (G, T, D)
        heads = weighted_sums(P, v).transpose(1, 0, 2)              # (T, H, D)
        y = heads.reshape(T, H * D) @ W_out.T
        group = "a group per head" if G == H else GROUPED
        yield Case(group, tensors(P=P, x=x, W_v=W_v, W_out=W_out), y)

def decode(rng):
    shapes = (2, 2, 4, 1), (3, 3, 2, 5), (4, 2, 3, 1), (4, 2, 3, 5), (4, 1, 2, 4)
    for H, G, D, S in shapes:
        group = "a group per head" if G == H else GROUPED
        yield decode_case(group, rng, H, G, D, S)
    for S in range(1, 5):                                           # a cache that grows
        case = decode_case("its cache", rng, 2, 2, 3, S)
        yield case._replace(after=[*case.arguments["values"], case.arguments["v"]])

def decode_case(group, rng, H, G, D, S):
    P = random_weights(rng, H, S)[:, -1:]                           # (H, 1, S)
    v = numbers(rng, S, G, D)
    y = weighted_sums(P, v.transpose(1, 0, 2))                      # (H, 1, D)
    earlier = [tensor(values) for values in v[:-1]]
    return Case(group, {"values": earlier, **tensors(P=P[:, 0], v=v[-1])}, y[:, 0])

def roles(rng):
    n, m = rng.integers(2, 6, size=2).tolist()
    mixed = rng.permutation([1, 1, n, m])
    late = [1] * 9 + [n, m]                                         # in layers of two digits
    for lengths in ([1] * n, [1, n], [n, m], mixed, late):
        share, expected = spans_of(lengths)
        yield Case("spans", {"share": share, "n_layer": len(expected)}, expected)
    share, expected = spans_of([1, m, n])
    yield Case("refused", {"share": share, "n_layer": len(expected)}, expected)
    for share, n_layer in malformed(*rng.integers(1, 9, size=2).tolist()):
        yield Case("refused", {"share": share, "n_layer": n_layer}, ValueError)

def malformed(a, length):
    """Yield --share as it is not written, and a number of layers."""
    b = a + length
    c, d, n_layer = b + 1, b + 2, b + 3
    span = f"{a}-{b}"
    for share in (
        f"{a}",
        f"{a}-{a}",
        f"{b}-{a}",                         # falls
        f"{a}-{n_layer}",                   # does not fit
        f"{span},{b}-{c}",                  # overlap
        f"{c}-{d},{span}",                  # do not rise
        f"{span}-{c}",
        f"{span},",
        f",{span}",
        f"{span},,{c}-{d}",
        f"{span} ",
        f"{span}, {c}-{d}",
        f"{span}\n",
        f"0{span}",
        f"+{span}",
        f"{a}-0{b}",
        f"{a}--{b}",
        f"{a}-+{b}",
        f"-{span}",
    ):
        yield share, n_layer
    yield f"{a}-{b}_0", 200                 # int() takes this
    yield f"{a}-\N{ARABIC-INDIC DIGIT NINE}", 200

def cache_bytes(rng):
    from minisa.model import GPT, GPTConfig, KVCache
    for group, kind, H, G, lengths in (
        ("full layers", "weights", 4, 4, [1, 1]),
        ("full layers", "kv", 6, 6, [1, 1, 1]),
        ("Shared Attention", "weights", 4, 4, [2, 2]),
        ("Shared Attention", "weights", 6, 6, [1, 4]),
        ("Cross-Layer Attention", "kv", 4, 4, [1, 3]),
        ("Cross-Layer Attention", "kv", 6, 6, [1, 2, 3]),
        (GROUPED, "weights", 4, 2, [1, 1]),
        (GROUPED, "weights", 6, 1, [1, 4]),
        (GROUPED, "kv", 6, 2, [1, 2, 3]),
    ):
        share, layers = spans_of(rng.permutation(lengths))
        shape = {"n_head": H, "n_kv_head": G, "n_embd": 2 * H * int(rng.integers(2, 9))}
        config = GPTConfig(n_layer=len(layers), share=share, share_kind=kind, **shape)
        for dtype in (torch.float32, torch.bfloat16):
            tokens = int(rng.integers(1, 1000))
            cache = KVCache(GPT(config).to(dtype), 1, tokens)
            size = {"tokens": tokens, "bytes_per_number": dtype.itemsize}
            yield Case(group, {"roles": layers, "kind": kind, **shape, **size}, cache.nbytes)

def decode_flops(rng):
    from minisa.cost import layer_flops
    from minisa.model import GPT, GPTConfig
    kinds = {"weights": "Shared Attention", "kv": "Cross-Layer Attention"}
    for H, G, C in (4, 4, 32), (6, 6, 48), (6, 2, 48):
        M = 32 * int(rng.integers(2, 6))
        shape = {"n_head": H, "n_kv_head": G, "n_embd": C, "n_hidden": M}
        keys = int(rng.integers(2, 60))
        for kind, name in kinds.items():
            config = GPTConfig(n_layer=3, share="1-2", share_kind=kind, vocab_size=8, **shape)
            for role, block in zip(("full", "anchor", "reuse"), GPT(config).blocks):
                group = name if role == "reuse" else "full layers"
                if G < H:
                    group = GROUPED
                arguments = {"role": role, "kind": kind, **shape, "keys": keys}
                yield Case(group, arguments, layer_flops(block, 1, keys))

def similarity(rng):
    for group, shapes in {"one head": [(1, 4), (1, 7)], "more heads": [(3, 5), (4, 4)]}.items():
        for H, T in shapes:
            P = random_weights(rng, H, T)
            Q = random_weights(rng, H, T)
            norms = np.linalg.norm(P, axis=-1) * np.linalg.norm(Q, axis=-1)
            cosines = (P * Q).sum(axis=-1) / norms                  # (H, T)
            yield Case(group, tensors(P=P, Q=Q), cosines.mean())
        yield Case(group, tensors(P=P, Q=P), 1.0)

def best_source(rng):
    for H in (2, 3):
        anchor = random_weights(rng, H, 5)
        shuffled = anchor[rng.permutation(H)]
        P = (0.7 * shuffled + 0.3 * random_weights(rng, H, 5)).round(3)
        best, _ = best_by_cosine(P, anchor)
        yield Case("clear", tensors(P=P, anchor=anchor), best)
    for _ in range(30):                     # in so many, no other measure finds the same heads
        lead = 0
        while lead < 1e-3:
            P = random_weights(rng, 3, 5)
            anchor = random_weights(rng, 3, 5)
            best, lead = best_by_cosine(P, anchor)
        yield Case("only by the cosine", tensors(P=P, anchor=anchor), best)

def best_by_cosine(P, anchor):
    """→ the best head of the anchor for each head, and by how much the next one is worse, at least."""
    norms = np.linalg.norm(anchor, axis=(1, 2))                     # a head's own norm changes no order
    cosines = np.einsum("hts,gts->hg", P, anchor) / norms
    second, first = np.sort(cosines)[:, -2:].T
    return cosines.argmax(axis=1).tolist(), (first - second).min()

def mixture(rng):
    for group, least in {"some of each": 0, "less than nothing": -1}.items():
        for H in (2, 4):
            P = random_weights(rng, H, 4)
            w = rng.uniform(least, 2, size=(H, H)).round(2)         # its rows do not sum to 1
            w[0, 0] = 1.5 * least + 0.5                             # 0.5 or -1
            mixed = np.zeros_like(P)
            for h in range(H):
                for g in range(H):
                    mixed[h] += w[h, g] * P[g]
            yield Case(group, tensors(P=P, w=w), mixed)

def refit(rng):
    for group, N, n, C, ridge in (
        ("hardly any ridge", 12, 3, 2, 1e-6),                       # so, ordinary least squares
        ("hardly any ridge", 10, 2, 3, 1e-7),
        ("many tokens", 12, 3, 2, 0.5),
        ("many tokens", 10, 4, 3, 5.0),
        ("few tokens", 2, 4, 3, 1.0),
        ("few tokens", 1, 3, 2, 0.25),
    ):
        Z = numbers(rng, N, n)
        Y = numbers(rng, N, C)
        W = numbers(rng, C, n)
        root = np.sqrt(ridge)
        rows = np.concatenate((Z, root * np.eye(n)))                # the ridge as n more tokens
        wanted = np.concatenate((Y, root * W.T))
        fitted, *_ = np.linalg.lstsq(rows, wanted, rcond=None)
        yield Case(group, {**tensors(Z=Z, Y=Y, W=W), "ridge": ridge}, fitted.T)

def keep(rng):
    for group in ("all different", "alike"):
        for budget in (2, 3, 4, 5, 9):
            distinct = (rng.permutation(12) / 100 + rng.random()).round(3)
            falling = np.sort(distinct)[::-1]                       # the last tokens received least
            tied = rng.integers(3, size=12) / 2
            equal = np.full(12, distinct[0])
            different = distinct, falling, distinct[:budget]
            for weights in different if group == "all different" else (tied, equal):
                received = weights.tolist()
                yield Case(group, {"received": received, "budget": budget}, kept(received, budget))

def kept(received, budget):
    recent = budget // 2
    first = len(received) - recent                                  # of the recent tokens
    older = sorted(range(first), key=lambda i: (received[i], i))
    heavy = older[recent - budget:]
    return [*sorted(heavy), *range(first, len(received))]

def bits_per_byte(rng):
    groups = {"ASCII": ["To be, or not", "abc\n"], "other letters": ["caffè: 日本", "é", "𝕊a"]}
    for group, alphabets in groups.items():
        for letters in alphabets:
            length = rng.integers(3, 20)
            text = letters[-1] + "".join(rng.choice(list(letters), size=length))
            nats = round(rng.uniform(0.5, 4), 3)
            tokens = int(rng.integers(2, 20))
            bits = nats * tokens / np.log(2)
            arguments = {"nats_per_token": nats, "tokens": tokens, "text": text}
            yield Case(group, arguments, bits / len(text.encode()))

# an exercise → its groups of cases, and the points of each
EXERCISES = {
    attention_row: {
        "small scores": 5,
        "large scores": 3,
    },
    reuse_layer: {
        "a group per head": 6,
        GROUPED: 6,
    },
    decode: {
        "a group per head": 3,
        GROUPED: 2,
        "its cache": 3,
    },
    roles: {
        "spans": 3,
        "refused": 3,
    },
    cache_bytes: {
        "full layers": 2,
        "Shared Attention": 2,
        "Cross-Layer Attention": 2,
        GROUPED: 2,
    },
    decode_flops: {
        "full layers": 3,
        "Shared Attention": 3,
        "Cross-Layer Attention": 3,
        GROUPED: 3,
    },
    similarity: {
        "one head": 3,
        "more heads": 5,
    },
    best_source: {
        "clear": 3,
        "only by the cosine": 3,
    },
    mixture: {
        "some of each": 4,
        "less than nothing": 2,
    },
    refit: {
        "hardly any ridge": 4,
        "many tokens": 4,
        "few tokens": 4,
    },
    keep: {
        "all different": 5,
        "alike": 3,
    },
    bits_per_byte: {
        "ASCII": 3,
        "other letters": 3,
    },
}
NAMES = [exercise.__name__ for exercise in EXERCISES]

def cases(exercise):
    """→ the cases of an exercise, one group after the other."""
    return cases_of(exercise, SEED)

@cache
def cases_of(exercise, seed):
    order = list(EXERCISES[exercise])
    made = exercise(np.random.default_rng(seed))
    return sorted(made, key=lambda case: order.index(case.group))
