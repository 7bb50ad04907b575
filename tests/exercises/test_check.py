"""The grader takes right answers and refuses wrong ones, however plausible, and survives what they do.

Where minisa has code of its own for an exercise, that is the right answer.
"""

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from minisa.axes import heads, squeeze
from minisa.axes.heads import Mixed
from minisa.cost import layer_flops
from minisa.exercises import check
from minisa.exercises.__main__ import main
from minisa.lab.similarity import layer_similarity
from minisa.model import GPT, GPTConfig, KVCache, SharedAttention, Step, split_heads

ROOT = Path(__file__).resolve().parent.parent.parent

def step(cache=None):
    return Step(None, None, False, cache)

# ---- right answers ----

def attention_row(q, k, t):
    row = step().attention_weights(*(torch.tensor(x).double()[None, None] for x in (q[t:t + 1], k[:t + 1])))
    return [*row.flatten().tolist(), *[0.0] * (len(q) - t - 1)]

def layer(H, G, W_v, W_out, kind=SharedAttention):
    """A reuse layer with these matrices."""
    attn = kind(GPTConfig(n_head=H, n_kv_head=G, n_embd=2 * H), 0)      # any width will do
    for part, weight in ((attn.qkv, W_v), (attn.out, W_out)):
        part.weight = torch.nn.Parameter(weight)
    return attn

def reuse_layer(P, x, W_v, W_out):
    D = x.size(1) // len(P)
    attn = layer(len(P), len(W_v) // D, W_v, W_out)
    return attn(x[None], step(), P[None])[0][0]

def decode(values, P, v):
    values.append(v)
    return step().weighted_sum(P[None, :, None], torch.stack(values, 1)[None])[0, :, 0]

def roles(share, n_layer):
    config = GPTConfig(n_layer=n_layer, n_embd=8, vocab_size=2, share=share)
    if any(a >= b for a, b in config.spans):
        raise ValueError
    words = {"Attention": "full", "Anchor": "anchor", "SharedAttention": "reuse"}
    return [words[type(block.attn).__name__] for block in GPT(config).blocks]

def of_roles(roles):
    """Roles → share."""
    starts = [i for i, role in enumerate(roles) if role == "anchor"]
    after = [*roles, "end"]
    ends = [next(j for j in range(i + 1, len(after)) if after[j] != "reuse") - 1 for i in starts]
    return ",".join(f"{a}-{b}" for a, b in zip(starts, ends))

def cache_bytes(roles, kind, n_head, n_kv_head, n_embd, tokens, bytes_per_number):
    config = GPTConfig(n_layer=len(roles), n_head=n_head, n_kv_head=n_kv_head, n_embd=n_embd,
                       share=of_roles(roles), share_kind=kind)
    return KVCache(GPT(config), 1, tokens).nbytes * bytes_per_number // 4

def decode_flops(role, kind, n_head, n_kv_head, n_embd, n_hidden, keys):
    share = "" if role == "full" else "0-1"
    config = GPTConfig(n_layer=2, n_head=n_head, n_kv_head=n_kv_head, n_embd=n_embd, n_hidden=n_hidden,
                       share=share, share_kind=kind)
    return layer_flops(GPT(config).blocks[1 if role == "reuse" else 0], 1, keys)

class Probe:
    """As much of a GPT as layer_similarity() and head_products() look at."""
    def __init__(self, *every_P):
        self.config = SimpleNamespace(n_head=every_P[0].size(0), n_layer=len(every_P))
        self.every_P = [P[None] for P in every_P]

    def attention_weights(self, idx):
        return self.every_P

def similarity(P, Q):
    return layer_similarity(Probe(P, Q), torch.zeros(1, P.size(1)))[0, 1].item()

def best_source(P, anchor):
    products = heads.head_products(Probe(anchor, P), torch.zeros(1, P.size(1)))
    return (products[1, :, 0] / products[0, :, 0].diagonal().sqrt()).argmax(1).tolist()

def mixture(P, w):
    seen, attn = [], layer(len(P), len(P), torch.eye(len(P)), torch.eye(len(P)), Mixed)
    attn.mix = torch.nn.Parameter(w)
    attn(torch.zeros(1, P.size(1), len(P)), Step(None, None, False, watch=seen.append), P[None])
    return seen[0][0].detach()

def refit(Z, Y, W, ridge):
    zz = Z.T @ Z + ridge * torch.eye(Z.size(1))                         # as in axes.heads.refit()
    return W + torch.linalg.solve(zz, Z.T @ (Y - Z @ W.T)).T

def keep(received, budget):
    T = len(received)
    got = torch.tensor([received]).double() + 1e-9 * torch.arange(T)    # of two alike, the later
    scores = squeeze.POLICIES["heavy"].score(torch.arange(T)[None], got, T, budget)
    best = scores.topk(budget).indices
    return sorted(best[0].tolist())

def bits_per_byte(nats, tokens, text):
    return nats * tokens / torch.tensor(2.0).log().item() / len(text.encode())

NAMES = [cases.__name__ for cases in check.POINTS]

def grade(name, answer):
    return check.grade(getattr(check, name), answer)

@pytest.mark.parametrize("name", NAMES)
def test_a_right_answer_is_taken_whatever_the_seed(name, monkeypatch):
    for seed in range(2):
        monkeypatch.setattr(check, "SEED", seed)
        assert grade(name, globals()[name]) is None

@pytest.mark.parametrize("name", NAMES)
def test_another_seed_makes_new_cases(name):
    def inputs(seed):
        return [repr(arguments) for arguments, _ in getattr(check, name)(np.random.default_rng(seed))]
    one, other = inputs(0), inputs(1)
    assert len(one) == len(other) and len(set(other) - set(one)) >= len(one) / 2

# ---- wrong ones ----

def unscaled(q, k, t):
    return attention_row([[x * len(row)**0.5 for x in row] for row in q], k, t)

def overflowing(q, k, t):
    """The largest score is not subtracted, in float64."""
    scores = [sum(a * b for a, b in zip(q[t], row)) / len(row)**0.5 for row in k[:t + 1]]
    exponentials = torch.tensor(scores, dtype=torch.float64).exp()
    return [*(exponentials / exponentials.sum()).tolist(), *[0.0] * (len(q) - t - 1)]

def overflowing_in_python(q, k, t):
    scores = [math.exp(sum(a * b for a, b in zip(q[t], row)) / len(row)**0.5) for row in k[:t + 1]]
    return [*(score / sum(scores) for score in scores), *[0.0] * (len(q) - t - 1)]

def interleaved(P, x, W_v, W_out):
    """Heads take the values of group h mod G."""
    D = x.size(1) // len(P)
    v = split_heads(F.linear(x, W_v)[None], len(W_v) // D)[0]
    return F.linear(torch.cat([P[h] @ v[h % len(v)] for h in range(len(P))], 1), W_out)

def decode_forgets(values, P, v):
    return decode(list(values), P, v)

def decode_twice(values, P, v):
    y = decode(values, P, v)
    values.append(v)
    return y

def without_zeros(share, n_layer):
    """Takes 01-3 for 1-3."""
    return roles(re.sub(r"\b0+(?=\d)", "", share), n_layer)

def best_by(measure):
    """Picks heads by a measure (H, H) of two layers."""
    return lambda P, anchor: measure(P, anchor).argmax(1).tolist()

def row_cosines(P, anchor):
    return F.cosine_similarity(P[:, None], anchor[None], dim=3).mean(2)

def quiet_roles(share, n_layer):
    try:
        return roles(share, n_layer)
    except ValueError:
        return ["full"] * n_layer

def other(name, **changes):
    """The right answer to other arguments."""
    def answer(*arguments):
        code = globals()[name].__code__
        given = dict(zip(code.co_varnames, arguments))
        return globals()[name](**{key: changes.get(key, lambda old: old)(old) for key, old in given.items()})
    return answer

WRONG = {
    "attention_row": [unscaled, overflowing, overflowing_in_python,
                      lambda q, k, t: attention_row(q, k, len(q) - 1),
                      lambda q, k, t: attention_row(q, k, t)[:t + 1], lambda q, k, t: attention_row(k, q, t)],
    "reuse_layer": [interleaved, lambda P, x, v, o: reuse_layer(P.mT, x, v, o),
                    lambda P, x, v, o: reuse_layer(P, x, v, o.T),
                    lambda P, x, v, o: reuse_layer(P, x, v, o) + x,
                    lambda P, x, v, o: reuse_layer(P.roll(1, 0), x, v, o)],
    "decode": [decode_forgets, decode_twice, lambda values, P, v: decode(values, P.flip(1), v),
               lambda values, P, v: decode(values, torch.full_like(P, 1 / P.size(1)), v)],
    "roles": [quiet_roles, lambda s, n: [role.replace("anchor", "reuse") for role in roles(s, n)],
              lambda s, n: roles(s.strip(" "), n), lambda s, n: roles(s.strip(","), n), without_zeros,
              lambda s, n: roles(s.removesuffix("\n"), n), lambda s, n: roles(s.removeprefix("+"), n)],
    "cache_bytes": [other("cache_bytes", kind=lambda _: "weights"), other("cache_bytes", kind=lambda _: "kv"),
                    other("cache_bytes", n_kv_head=lambda _: 4),
                    other("cache_bytes", bytes_per_number=lambda _: 4),
                    other("cache_bytes", roles=lambda roles: ["full"] * len(roles))],
    "decode_flops": [other("decode_flops", kind=lambda _: "weights"),
                     other("decode_flops", keys=lambda n: n - 1),
                     other("decode_flops", n_kv_head=lambda _: 4),
                     other("decode_flops", role=lambda _: "full"),
                     lambda *given: decode_flops(*given) // 2,
                     other("decode_flops", n_hidden=lambda M: 2 * M // 3)],
    "similarity": [lambda P, Q: 1.0,
                   lambda P, Q: F.cosine_similarity(P.flatten(), Q.flatten(), dim=0).item(),
                   lambda P, Q: F.cosine_similarity(P, Q, dim=1).mean().item(),
                   lambda P, Q: (P * Q).sum(-1).mean().item()],
    "best_source": [lambda P, A: list(range(len(P))), lambda P, A: best_source(A, P),
                    best_by(lambda P, A: torch.einsum("hts,gts->hg", P, A)), best_by(row_cosines),
                    best_by(lambda P, A: -torch.cdist(P.flatten(1), A.flatten(1))),
                    lambda P, A: [(g + 1) % len(P) for g in best_source(P, A)]],
    "mixture": [lambda P, w: mixture(P, w.T), lambda P, w: P, lambda P, w: mixture(P, w).softmax(-1),
                lambda P, w: mixture(P, w)[None], lambda P, w: mixture(P, w / w.sum(1, keepdim=True))],
    "refit": [lambda Z, Y, W, r: refit(Z, Y, 0 * W, r), lambda Z, Y, W, r: refit(Z, Y, W, 0.1),
              lambda Z, Y, W, r: refit(Z, Y, W, r).T, lambda Z, Y, W, r: W,
              lambda Z, Y, W, r: refit(Z, Y, W, r * len(Z))],
    "keep": [lambda got, n: sorted(range(len(got)), key=lambda i: -got[i])[:n],
             lambda got, n: sorted(sorted(range(len(got)), key=lambda i: (-got[i], -i))[:n]),
             lambda got, n: list(range(len(got)))[-n:], lambda got, n: keep(got, n)[::-1],
             lambda got, n: keep([-value for value in got], n),
             lambda got, n: sorted(sorted(range(len(got) - n // 2), key=lambda i: -got[i])[:n - n // 2]
                                   + list(range(len(got)))[-(n // 2):])],
    "bits_per_byte": [lambda nats, n, text: nats * n / len(text.encode()),
                      lambda nats, n, text: bits_per_byte(nats, n, "x" * len(text)),
                      lambda nats, n, text: bits_per_byte(nats, 1, text)],
}

@pytest.mark.parametrize("name, i", [(name, i) for name in WRONG for i in range(len(WRONG[name]))])
def test_a_plausible_wrong_answer_is_refused_whatever_the_seed(name, i, monkeypatch):
    for seed in range(2):
        monkeypatch.setattr(check, "SEED", seed)
        assert grade(name, WRONG[name][i]) is not None, seed

def test_every_exercise_has_at_least_three_wrong_answers_and_all_points_are_a_hundred():
    assert list(WRONG) == NAMES and min(map(len, WRONG.values())) >= 3
    assert sum(check.POINTS.values()) == 100

# ---- what it says ----

def failing(P, w):
    def inner():
        return 1 / 0                                        # the line to look at
    return inner()

def test_a_failed_case_says_its_number_its_inputs_and_both_values():
    said = grade("mixture", lambda P, w: P)
    assert re.fullmatch(r"case 1: expected \(2, 5, 5\) \[.*\], got \(2, 5, 5\) \[.*\], "
                        r"for P=\(2, 5, 5\) \[.*\], w=\(2, 2\) \[.*\]", said)
    assert "got ZeroDivisionError: division by zero in line " in grade("mixture", failing)
    assert ": return 1 / 0" in grade("mixture", failing)
    said = grade("roles", lambda share, n_layer: roles(share.removesuffix("\n"), n_layer))
    assert "expected a ValueError, got ['full'" in said and "\\n', n_layer=" in said
    assert "the cache does not hold each token's values once" in grade("decode", decode_forgets)

@pytest.mark.parametrize("odd", [None, "text", [[1], [2, 3]], object(), {}, float("nan"), torch.ones(9)],
                         ids=range(7))
def test_whatever_an_answer_returns_is_a_wrong_answer(odd):
    for name in NAMES:
        assert grade(name, lambda *arguments: odd).startswith("case 1: expected")

# ---- the command ----

ODD = """
import os, time
def attention_row(q, k, t): os._exit(0)
def reuse_layer(P, x, W_v, W_out): time.sleep(1000)
def decode(values, P, v): raise SystemExit
def roles(share, n_layer): print("noise"); raise ValueError("no")
def similarity(P, Q): return None
def mixture(P, w): return 1 / 0
def bits_per_byte(nats, tokens, text):
    import math
    return nats * tokens / math.log(2) / len(text.encode())
"""

def graded(file, *flags):
    command = [sys.executable, "-m", "minisa.exercises", f"--answers={file}", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)

def test_what_ends_hangs_or_crashes_costs_only_its_own_points(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(ODD)
    monkeypatch.setattr(check, "SECONDS", 1)
    results = {name: (got, wrong) for name, got, _, wrong in check.grade_file(tmp_path / "mine.py")}
    assert results.pop("bits_per_byte") == (6, None)
    assert {got for got, _ in results.values()} == {0}
    for name, wrong in {"attention_row": "ended Python", "reuse_layer": "more than 1 seconds",
                        "decode": "SystemExit", "roles": "expected [", "similarity": "got None",
                        "mixture": "ZeroDivisionError", "keep": "AttributeError"}.items():
        assert wrong in results[name][1], name

def test_the_command_prints_points_or_json_for_a_program(tmp_path):
    (tmp_path / "mine.py").write_text(ODD.replace("time.sleep(1000)", "return x"))
    done = graded(tmp_path / "mine.py", "--json")
    result = json.loads(done.stdout)
    assert done.returncode == 0 and (result["points"], result["of"]) == (6, 100)
    assert [entry["exercise"] for entry in result["exercises"]] == NAMES

def test_the_file_as_it_stands_answers_nothing_and_what_is_no_file_is_refused(run, tmp_path):
    status, out, _ = run(main)
    assert status == 0 and out.count("not answered yet") == len(check.POINTS)
    status, _, err = run(main, f"--answers={tmp_path}/none.py")
    assert status == 2 and "no such file" in err and err.count("\n") == 1
    (tmp_path / "mine.py").write_text("def attention_row(:")
    first = next(iter(check.grade_file(tmp_path / "mine.py")))
    assert first[1] == 0 and "does not run: SyntaxError" in first[3]
