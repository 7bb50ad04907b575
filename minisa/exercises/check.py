"""How answers are graded: each by cases, against a plain formulation in numpy and float64.

An answer runs in a process of its own, so a wrong, hanging or crashing one costs only its own points.
"""

import contextlib
import importlib.util
import multiprocessing
import os
import sys
from pathlib import Path

import numpy as np
import torch

SECONDS = 20                    # of one exercise
POINTS = {"attention_row": 8, "reuse_layer": 12, "decode": 8, "roles": 6, "cache_bytes": 8,
          "decode_flops": 12, "similarity": 8, "best_source": 6, "mixture": 6, "refit": 12, "keep": 8,
          "bits_per_byte": 6}

# ---- plain formulations, and what is tried ----

def softmax(scores):
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()

def random_weights(rng, H, T):
    """Attention weights (H, T, T), as of a real layer: rows sum to 1, nobody looks ahead."""
    P = np.zeros((H, T, T))
    for h in range(H):
        for t in range(T):
            P[h, t, :t + 1] = softmax(3 * rng.normal(size=t + 1))
    return P

def tensor(array):
    return torch.from_numpy(np.array(array)).float()

def attention_row(rng):
    """Yield (arguments, what is expected); so do all below."""
    for T, D, t, scale in ((1, 4, 0, 1), (6, 4, 3, 1), (6, 8, 5, 1), (5, 4, 2, 60)):
        q, k = scale * rng.normal(size=(T, D)), scale * rng.normal(size=(T, D))
        weights = softmax(k[:t + 1] @ q[t] / np.sqrt(D))
        yield (q.tolist(), k.tolist(), t), [*weights, *[0.0] * (T - t - 1)]

def summed(P, v):
    """P (H, T, S), v (G, S, D) → (H, T, D), head by head."""
    return np.stack([P[h] @ v[h * len(v) // len(P)] for h in range(len(P))])

def reuse_layer(rng):
    for H, G, D, T in ((2, 2, 4, 5), (4, 2, 3, 6), (4, 1, 2, 4)):
        P, x = random_weights(rng, H, T), rng.normal(size=(T, H * D))
        W_v, W_out = rng.normal(size=(G * D, H * D)), rng.normal(size=(H * D, H * D))
        v = np.stack([x @ W_v[g * D:(g + 1) * D].T for g in range(G)])
        y = np.concatenate(list(summed(P, v)), axis=1) @ W_out.T
        yield tuple(map(tensor, (P, x, W_v, W_out))), y

def decode(rng):
    for H, G, D, S in ((2, 2, 4, 1), (4, 2, 3, 5)):
        P, v = random_weights(rng, H, S)[:, -1], rng.normal(size=(S, G, D))
        y = summed(P[:, None], v.transpose(1, 0, 2))[:, 0]
        yield ([tensor(old) for old in v[:-1]], tensor(P), tensor(v[-1])), y

def growing(answer, rng):
    """decode() token by token → whether the cache grew by each token's values, and by nothing else."""
    values, added = [], tensor(rng.normal(size=(4, 2, 3)))
    for S, v in enumerate(added, start=1):
        answer(values, tensor(random_weights(rng, 2, S)[:, -1]), v)
        if len(values) != S:
            return False
    return all(map(torch.equal, values, added))

def roles(rng):
    for share, n_layer, expected in (
        ("", 3, "fff"), ("1-3", 4, "farr"), ("0-1,2-3", 4, "arar"), ("2-4,6-7", 9, "ffarrfarf"),
        ("0-11", 12, "arrrrrrrrrrr"), ("3-1", 4, None), ("1-1", 4, None), ("1-4", 4, None),
        ("1-2,2-3", 4, None), ("1-3 ", 4, None), ("2-3,0-1", 4, None), ("1", 4, None), ("1-2,", 4, None),
    ):
        words = {"f": "full", "a": "anchor", "r": "reuse"}
        yield (share, n_layer), ValueError if expected is None else [words[letter] for letter in expected]

SHAPES = ["full full full".split(), "full anchor reuse reuse".split(), "anchor reuse anchor reuse".split()]

def cache_bytes(rng):
    from minisa.model import GPT, GPTConfig, KVCache
    modes = [*zip(SHAPES, ["", "1-3", "0-1,2-3"])] * 2
    for (layers, share), kind, G in zip(modes, ["weights", "kv"] * 3, [4, 4, 2, 1, 2, 4]):
        config = GPTConfig(n_layer=len(layers), n_embd=64, n_kv_head=G, share=share, share_kind=kind)
        for tokens, dtype in ((1, torch.float32), (700, torch.bfloat16)):
            held = KVCache(GPT(config).to(dtype), 1, tokens).nbytes    # what a real cache takes
            yield (layers, kind, 4, G, 64, tokens, dtype.itemsize), held

def decode_flops(rng):
    from minisa.cost import measure
    from minisa.model import GPT, GPTConfig
    for keys, G, M in ((5, 4, 96), (40, 2, 64)):
        shape = {"block_size": 64, "n_embd": 32, "n_kv_head": G, "n_hidden": M, "vocab_size": 8}
        head, full = 2 * 32 * 8, None
        for role, kind, share in (("full", "kv", ""), ("reuse", "weights", "0-1"), ("reuse", "kv", "0-1"),
                                  ("anchor", "weights", "0-1"), ("anchor", "kv", "0-1")):
            model = GPT(GPTConfig(n_layer=2, share=share, share_kind=kind, **shape))
            both = measure(model, keys).decode_flops - head         # counted while it runs
            full = both // 2 if not share else full                 # an anchor takes what a full layer does
            yield (role, kind, 4, G, 32, M, keys), both - full if role == "reuse" else full

def similarity(rng):
    for H, T in ((1, 4), (3, 6)):
        P, Q = random_weights(rng, H, T), random_weights(rng, H, T)
        rows = [P[h, t] @ Q[h, t] / np.linalg.norm(P[h, t]) / np.linalg.norm(Q[h, t])
                for h in range(H) for t in range(T)]
        yield (tensor(P), tensor(Q)), np.mean(rows)
        yield (tensor(P), tensor(P)), 1.0

def best_source(rng):
    for H in (2, 5):
        anchor, order = random_weights(rng, H, 6), rng.permutation(H)
        P = 0.7 * anchor[order] + 0.3 * random_weights(rng, H, 6)
        cosine = [[np.sum(p * a) / np.linalg.norm(p) / np.linalg.norm(a) for a in anchor] for p in P]
        yield (tensor(P), tensor(anchor)), np.argmax(cosine, axis=1)
    sharp, wide = np.eye(6)[None], np.tril(np.ones((1, 6, 6))) / np.arange(1, 7)[None, :, None]
    both = np.concatenate((wide, sharp))                            # a large product is not a large cosine
    yield (tensor(np.concatenate((wide, 0.8 * wide + 0.2 * sharp))), tensor(both)), [0, 0]

def mixture(rng):
    for H in (2, 4):
        P, w = random_weights(rng, H, 5), rng.dirichlet(np.ones(H), size=H)
        yield (tensor(P), tensor(w)), [sum(w[h, g] * P[g] for g in range(H)) for h in range(H)]

def refit(rng):
    for N, n, C, ridge in ((40, 3, 2, 0.5), (30, 4, 3, 5.0), (2, 4, 3, 1.0)):
        Z, Y, W = rng.normal(size=(N, n)), rng.normal(size=(N, C)), rng.normal(size=(C, n))
        rows = np.concatenate((Z, np.sqrt(ridge) * np.eye(n)))      # the ridge as n more tokens
        wanted = np.concatenate((Y, np.sqrt(ridge) * W.T))
        yield (*map(tensor, (Z, Y, W)), ridge), np.linalg.lstsq(rows, wanted, rcond=None)[0].T

def keep(rng):
    for received, budget in (([5, 1, 4, 2, 3, 0], 4), ([5, 1, 4, 2, 3, 0], 5), ([9, 9, 1, 1, 1, 1], 4),
                             ([2, 2, 2, 2, 2, 2], 4), ([1, 2, 3], 3), (rng.random(20).round(3).tolist(), 9)):
        recent = budget // 2
        older = sorted((value, i) for i, value in enumerate(received[:len(received) - recent]))
        stay = [i for _, i in older[len(older) - (budget - recent):]]
        yield ([float(value) for value in received], budget), sorted([*stay, *range(len(received))[-recent:]])

def bits_per_byte(rng):
    for nats, tokens, text in ((2.0, 10, "To be, or not to be"), (3.5, 7, "caffè: 日本"), (0.7, 3, "é")):
        yield (nats, tokens, text), nats * tokens / np.log(2) / len(text.encode())

# ---- grading ----

def close(got, expected):
    """Is an answer what was expected? Numbers may be rounded as float32 rounds them."""
    if isinstance(expected, list) and expected and isinstance(expected[0], str):
        return got == expected
    expected = np.asarray(expected, dtype=np.float64)
    with torch.no_grad():
        got = np.asarray(got.tolist() if isinstance(got, torch.Tensor) else got, dtype=np.float64)
    return got.shape == expected.shape and np.allclose(got, expected, rtol=1e-4, atol=1e-5)

def shown(value):
    """A value in a few words."""
    if value is ValueError:
        return "a ValueError"
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return f"{tuple(value.shape)}: {shown(np.asarray(value.tolist()).ravel().tolist())}"
    if isinstance(value, (list, tuple)) and len(value) > 4:
        return f"{shown(list(value)[:4])[:-1]}, ...]"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(shown, value))}]"
    if isinstance(value, (float, np.floating)):
        return f"{value:.5g}"
    return repr(value)[:80]

def attempt(answer, arguments, expected):
    """Try one case → None if it is right, else what was expected and what came."""
    try:
        got = answer(*arguments)
        right = expected is not ValueError and close(got, expected)
        came = shown(got)
    except NotImplementedError:
        return "not answered yet"
    except Exception as error:
        right = expected is ValueError and isinstance(error, ValueError)
        came = f"{type(error).__name__}: {error}"[:120]
    if not right:
        given = ", ".join(map(shown, arguments))[:160]
        return f"for ({given}): expected {shown(expected)}, got {came}"

def grade(name, answer):
    """Try an exercise on all cases → None if all are right, else what is wrong with the first that is not."""
    for case in globals()[name](np.random.default_rng(0)):
        if wrong := attempt(answer, *case):
            return wrong
    if name == "decode" and not growing(answer, np.random.default_rng(1)):
        return "after some steps, the cache does not hold each token's values once"

def read_answers(file):
    """Run a file of answers → its functions, as a module."""
    spec = importlib.util.spec_from_file_location("answers", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

def in_process(file, name, pipe):
    """What the child does: grade one exercise of a file, and send the result."""
    os.dup2(2, 1)                                           # what answers print is no result
    torch.set_num_threads(1)
    try:
        result = grade(name, getattr(read_answers(file), name))
    except BaseException as error:                          # also SystemExit
        result = f"{Path(file).name} does not run: {type(error).__name__}: {error}"[:200]
    pipe.send(result)

def grade_file(file):
    """Yield (exercise, points got, points there are, what is wrong or None) of a file of answers."""
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    for name, points in POINTS.items():
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(target=in_process, args=(str(file), name, sender), daemon=True)
        child.start()
        sender.close()
        wrong = f"took more than {SECONDS} seconds"
        if receiver.poll(SECONDS):
            wrong = "it ended Python"
            with contextlib.suppress(EOFError):
                wrong = receiver.recv()
        child.kill()
        child.join()
        yield name, 0 if wrong else points, points, wrong
