"""How answers are graded: by test cases, against a plain formulation in numpy and float64.

All cases follow from SEED: change it to get new ones. Each answer runs in a process of its own, so one that
is wrong, hangs or crashes costs only its own points.
"""

import contextlib
import importlib.util
import multiprocessing
import os
import sys
import traceback
from pathlib import Path

import numpy as np
import torch

SEED = 0
SECONDS = 20                    # of one exercise

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
            P[h, t, :t + 1] = softmax(sharpness * rng.normal(size=t + 1))
    return P

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
    return torch.from_numpy(np.array(array)).float()

def tensors(**arrays):
    return {name: tensor(array) for name, array in arrays.items()}

# ---- the cases: each function yields arguments by their names, and what is expected ----

def attention_row(rng):
    for T, D, t in ((1, 4, 0), (6, 4, 3), (6, 8, 5)):
        q = rng.normal(size=(T, D))
        k = rng.normal(size=(T, D))
        yield attention_case(q, k, t)
    for added in (1000, -1000):                     # exp(1000) overflows float64, exp(-1000) is 0
        q, k = rng.integers(-2, 3, size=(2, 5, 4)).astype(float)
        q[:, 0] = 50
        k[:, 0] = added / 25                        # D = 4, so this adds 50 · added / 25 / 2 to every score
        yield attention_case(q, k, 3)               # small integers: the scores are exact, in float32 too

def attention_case(q, k, t):
    T, D = q.shape
    scores = k[:t + 1] @ q[t] / np.sqrt(D)
    expected = np.zeros(T)
    expected[:t + 1] = softmax(scores)
    arguments = {"q": q.tolist(), "k": k.tolist(), "t": t}
    return arguments, expected.tolist()

def reuse_layer(rng):
    shapes = (2, 2, 4, 5), (4, 2, 3, 6), (4, 1, 2, 4)
    for H, G, D, T in shapes:
        P = random_weights(rng, H, T)
        x = rng.normal(size=(T, H * D))
        W_v = rng.normal(size=(G * D, H * D))
        W_out = rng.normal(size=(H * D, H * D))
        v = (x @ W_v.T).reshape(T, G, D).transpose(1, 0, 2)         # (G, T, D)
        heads = weighted_sums(P, v).transpose(1, 0, 2)              # (T, H, D)
        y = heads.reshape(T, H * D) @ W_out.T
        yield tensors(P=P, x=x, W_v=W_v, W_out=W_out), y

def decode(rng):
    for H, G, D, S in ((2, 2, 4, 1), (4, 2, 3, 5)):
        P = random_weights(rng, H, S)[:, -1:]                       # (H, 1, S)
        v = rng.normal(size=(S, G, D))
        y = weighted_sums(P, v.transpose(1, 0, 2))                  # (H, 1, D)
        earlier = [tensor(values) for values in v[:-1]]
        yield {"values": earlier, **tensors(P=P[:, 0], v=v[-1])}, y[:, 0]

def grows(answer, rng):
    """decode() token by token → whether the cache grows by each token's values, and by nothing else."""
    values = []
    added = tensor(rng.normal(size=(4, 2, 3)))
    for S, v in enumerate(added, start=1):
        P = random_weights(rng, 2, S)[:, -1]
        answer(values, tensor(P), v)
        if len(values) != S:
            return False
    return all(map(torch.equal, values, added))

def roles(rng):
    n, m = rng.integers(2, 6, size=2).tolist()
    mixed = rng.permutation([1, 1, n, m])
    late = [1] * 9 + [n, m]                                         # in layers of two digits
    for lengths in ([1] * n, [1, n], [n, m], mixed, late):
        share, expected = spans_of(lengths)
        yield {"share": share, "n_layer": len(expected)}, expected
    for share, n_layer in malformed(*rng.integers(1, 9, size=2).tolist()):
        yield {"share": share, "n_layer": n_layer}, ValueError

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
        f"{span} ",
        f"{span}\n",
        f"0{span}",
        f"+{span}",
        f"{a}-0{b}",
        f"{a}--{b}",
    ):
        yield share, n_layer

def cache_bytes(rng):
    from minisa.model import GPT, GPTConfig, KVCache
    for kind, G, lengths in (
        ("weights", 4, [1, 1]),
        ("weights", 2, [2, 2]),
        ("weights", 1, [1, 4]),
        ("kv", 4, [1, 3]),
        ("kv", 2, [1, 2, 3]),
    ):
        share, layers = spans_of(rng.permutation(lengths))
        shape = {"n_head": 4, "n_kv_head": G, "n_embd": 8 * int(rng.integers(2, 9))}
        config = GPTConfig(n_layer=len(layers), share=share, share_kind=kind, **shape)
        for dtype in (torch.float32, torch.bfloat16):
            tokens = int(rng.integers(1, 1000))
            cache = KVCache(GPT(config).to(dtype), 1, tokens)
            size = {"tokens": tokens, "bytes_per_number": dtype.itemsize}
            yield {"roles": layers, "kind": kind, **shape, **size}, cache.nbytes

def decode_flops(rng):
    for G in (4, 2):
        M = 32 * int(rng.integers(2, 6))
        shape = {"n_head": 4, "n_kv_head": G, "n_embd": 32, "n_hidden": M}
        keys = int(rng.integers(2, 60))
        full = counted_flops(shape, keys) // 2
        for kind in ("weights", "kv"):
            both = counted_flops(shape, keys, share="0-1", share_kind=kind)
            expected = {"full": full, "anchor": full, "reuse": both - full}
            for role, flops in expected.items():
                yield {"role": role, "kind": kind, **shape, "keys": keys}, flops

def counted_flops(shape, keys, **sharing):
    """FLOPs of the two layers of a model, counted while it decodes a token."""
    from minisa.cost import measure
    from minisa.model import GPT, GPTConfig
    config = GPTConfig(n_layer=2, vocab_size=8, **shape, **sharing)
    head = 2 * config.n_embd * config.vocab_size
    measured = measure(GPT(config), keys)
    return measured.decode_flops - head

def similarity(rng):
    for H, T in ((1, 4), (3, 6)):
        P = random_weights(rng, H, T)
        Q = random_weights(rng, H, T)
        cosines = (unit_rows(P) * unit_rows(Q)).sum(axis=-1)        # (H, T)
        yield tensors(P=P, Q=Q), cosines.mean()
        yield tensors(P=P, Q=P), 1.0

def unit_rows(P):
    return P / np.linalg.norm(P, axis=-1, keepdims=True)

def best_source(rng):
    for H in (2, 5):
        anchor = random_weights(rng, H, 6)
        shuffled = anchor[rng.permutation(H)]
        P = 0.7 * shuffled + 0.3 * random_weights(rng, H, 6)
        yield tensors(P=P, anchor=anchor), best_cosine(P, anchor)
    for measure in (products, closeness, row_cosines):              # other, wrong measures of similarity
        yield disagreeing_case(rng, measure)

def disagreeing_case(rng, measure):
    """A case in which the heads that are best by a measure are not the right ones."""
    while True:
        P = random_weights(rng, 3, 6)
        anchor = random_weights(rng, 3, 6)
        expected = best_cosine(P, anchor)
        others = measure(P, anchor).argmax(axis=1)
        if np.any(others != expected):
            return tensors(P=P, anchor=anchor), expected

def best_cosine(P, anchor):
    norms = np.linalg.norm(anchor, axis=(1, 2))                     # a head's own norm changes no order
    return (products(P, anchor) / norms).argmax(axis=1)

def products(P, anchor):
    return np.einsum("hts,gts->hg", P, anchor)

def closeness(P, anchor):
    return -np.linalg.norm(P[:, None] - anchor, axis=(2, 3))

def row_cosines(P, anchor):
    return products(unit_rows(P), unit_rows(anchor))

def mixture(rng):
    for H in (2, 4):
        P = random_weights(rng, H, 5)
        w = rng.uniform(0, 2, size=(H, H))                          # its rows do not sum to 1
        mixed = np.zeros_like(P)
        for h in range(H):
            for g in range(H):
                mixed[h] += w[h, g] * P[g]
        yield tensors(P=P, w=w), mixed

def refit(rng):
    shapes = (40, 3, 2, 0.5), (30, 4, 3, 5.0), (2, 4, 3, 1.0)
    for N, n, C, ridge in shapes:
        Z = rng.normal(size=(N, n))
        Y = rng.normal(size=(N, C))
        W = rng.normal(size=(C, n))
        root = np.sqrt(ridge)
        rows = np.concatenate((Z, root * np.eye(n)))                # the ridge as n more tokens
        wanted = np.concatenate((Y, root * W.T))
        fitted, *_ = np.linalg.lstsq(rows, wanted, rcond=None)
        yield {**tensors(Z=Z, Y=Y, W=W), "ridge": ridge}, fitted.T

def keep(rng):
    for budget in (2, 4, 5, 9):
        distinct = rng.random(12).round(3)
        falling = np.sort(distinct)[::-1]                           # the last tokens received least
        tied = rng.integers(3, size=12) / 2
        equal = np.full(12, distinct[0])
        for weights in (distinct, falling, tied, equal, distinct[:budget]):
            received = weights.tolist()
            yield {"received": received, "budget": budget}, kept(received, budget)

def kept(received, budget):
    recent = budget // 2
    first = len(received) - recent                                  # of the recent tokens
    older = sorted(range(first), key=lambda i: (received[i], i))
    heavy = older[recent - budget:]
    return [*sorted(heavy), *range(first, len(received))]

def bits_per_byte(rng):
    for letters in ("To be, or not", "caffè: 日本", "é"):
        length = rng.integers(3, 20)
        text = "".join(rng.choice(list(letters), size=length))
        nats = rng.uniform(0.5, 4)
        tokens = int(rng.integers(2, 20))
        bits = nats * tokens / np.log(2)
        arguments = {"nats_per_token": nats, "tokens": tokens, "text": text}
        yield arguments, bits / len(text.encode())

POINTS = {
    attention_row: 8,
    reuse_layer: 12,
    decode: 8,
    roles: 6,
    cache_bytes: 8,
    decode_flops: 12,
    similarity: 8,
    best_source: 6,
    mixture: 6,
    refit: 12,
    keep: 8,
    bits_per_byte: 6,
}

# ---- grading ----

def is_right(got, expected):
    """Is an answer what was expected? Numbers may be rounded as float32 rounds them."""
    if expected is ValueError:
        return False
    if isinstance(expected, list) and isinstance(expected[0], str):
        return got == expected
    expected = np.asarray(expected, dtype=np.float64)
    try:
        numbers = got.tolist() if isinstance(got, torch.Tensor) else got
        with torch.no_grad():
            numbers = np.asarray(numbers, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError):
        return False
    return numbers.shape == expected.shape and np.allclose(numbers, expected, rtol=1e-4, atol=1e-5)

def shown(value):
    """A value in a few words."""
    if value is ValueError:
        return "a ValueError"
    if isinstance(value, (torch.Tensor, np.ndarray)):
        numbers = np.asarray(value.tolist()).ravel()
        return f"{tuple(value.shape)} {shown(numbers.tolist())}"
    if isinstance(value, (list, tuple)):
        parts = [shown(part) for part in value[:4]]
        more = ["..."] if len(value) > 4 else []
        return f"[{', '.join(parts + more)}]"
    if isinstance(value, (float, np.floating)):
        return f"{value:.5g}"
    return repr(value)[:80]

def line_of(error):
    """The line of the answer in which an error was raised, as text."""
    _, *frames = traceback.extract_tb(error.__traceback__)          # the first is attempt()
    own = [frame for frame in frames if frame.filename == frames[0].filename]
    if not own:
        return ""
    return f" in line {own[-1].lineno}: {own[-1].line}"

def attempt(answer, arguments, expected):
    """Try one case → None if the answer is right, else what was expected, what came, and for what."""
    given = [f"{name}={shown(value)}" for name, value in arguments.items()]
    try:
        got = answer(*arguments.values())
        right = is_right(got, expected)
        came = shown(got)
    except Exception as error:
        if isinstance(error, NotImplementedError):
            raise
        right = expected is ValueError and isinstance(error, ValueError)
        came = f"{type(error).__name__}: {error}"[:120] + line_of(error)
    if right:
        return None
    return f"expected {shown(expected)}, got {came}, for {', '.join(given)}"

def grade(cases, answer):
    """Try an answer on all cases of an exercise → None if all are right, else what is wrong with the first
    that is not."""
    try:
        for number, case in enumerate(cases(np.random.default_rng(SEED)), start=1):
            wrong = attempt(answer, *case)
            if wrong:
                return f"case {number}: {wrong}"
    except NotImplementedError:
        return "not answered yet"
    if cases is decode and not grows(answer, np.random.default_rng(SEED)):
        return "after some steps, the cache does not hold each token's values once"
    return None

def read_answers(file):
    """Run a file of answers → its functions, as a module."""
    spec = importlib.util.spec_from_file_location("answers", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

def in_process(file, cases, pipe):
    """What the child does: grade one exercise of a file, and send the result."""
    os.dup2(2, 1)                                           # what answers print is not part of the result
    torch.set_num_threads(1)
    try:
        answer = getattr(read_answers(file), cases.__name__)
        result = grade(cases, answer)
    except BaseException as error:                          # also SystemExit
        result = f"{Path(file).name} does not run: {type(error).__name__}: {error}"[:200]
    pipe.send(result)

def wrong_with(file, cases, context):
    """Grade one exercise in a process of its own → None if it is right, else what is wrong."""
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=in_process, args=(str(file), cases, sender), daemon=True)
    child.start()
    sender.close()
    wrong = f"took more than {SECONDS} seconds"
    if receiver.poll(SECONDS):
        wrong = "it ended Python"
        with contextlib.suppress(EOFError):
            wrong = receiver.recv()
    child.kill()
    child.join()
    return wrong

def grade_file(file):
    """Yield (exercise, points got, points there are, what is wrong or None) of a file of answers."""
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    for cases, points in POINTS.items():
        wrong = wrong_with(file, cases, context)
        yield cases.__name__, 0 if wrong else points, points, wrong
