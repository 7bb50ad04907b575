"""The cases take right answers and refuse wrong ones, however plausible.

The right answers are those of solutions.py, made from minisa's plain code; and where model.py computes an
exercise in another way, that must be right too.
"""

import math
import os
import re
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from minisa.axes.heads import Mixed
from minisa.cost import layer_flops, measure
from minisa.exercises import check, grade, judge
from minisa.exercises.solutions import (
    ANSWERS,
    attention_row,
    best_source,
    bits_per_byte,
    decode,
    decode_flops,
    keep,
    mixture,
    refit,
    reuse_layer,
    roles,
)
from minisa.model import GPT, GPTConfig, KVCache, SharedAttention, Step, split_heads

SEEDS = int(os.environ.get("MINISA_SEEDS", 2))         # MINISA_SEEDS=60 takes a minute

# ---- right answers, by model.py ----

STEP = Step(None, None, False)

def row_of_step(q, k, t):
    row = STEP.attention_weights(*(torch.tensor(x).double()[None, None] for x in (q[t:t + 1], k[:t + 1])))
    return [*row.flatten().tolist(), *[0.0] * (len(q) - t - 1)]

def layer(H, G, W_v, W_out, kind=SharedAttention):
    """A reuse layer with these matrices."""
    attn = kind(GPTConfig(n_head=H, n_kv_head=G, n_embd=2 * H), 0)      # any width will do
    for part, weight in ((attn.qkv, W_v), (attn.out, W_out)):
        part.weight = torch.nn.Parameter(weight)
    return attn

def output_of_layer(P, x, W_v, W_out):
    D = W_out.size(1) // len(P)
    attn = layer(len(P), len(W_v) // D, W_v, W_out)
    return attn(x[None], STEP, P[None])[0][0]

def sum_of_step(values, P, v):
    values.append(v)
    return STEP.weighted_sum(P[None, :, None], torch.stack(values, 1)[None])[0, :, 0]

def roles_of_gpt(share, n_layer):
    words = {"Attention": "full", "Anchor": "anchor", "SharedAttention": "reuse"}
    blocks = GPT(GPTConfig(n_layer=n_layer, n_embd=8, vocab_size=2, share=share)).blocks
    return [words[type(block.attn).__name__] for block in blocks]

def share_of(roles):
    starts = [i for i, role in enumerate(roles) if role == "anchor"]
    after = [*roles, "end"]
    ends = [next(j for j in range(i + 1, len(after)) if after[j] != "reuse") - 1 for i in starts]
    return ",".join(f"{a}-{b}" for a, b in zip(starts, ends))

def bytes_of_cache(roles, kind, n_head, n_kv_head, n_embd, tokens, bytes_per_number):
    config = GPTConfig(n_layer=len(roles), n_head=n_head, n_kv_head=n_kv_head, n_embd=n_embd,
                       share=share_of(roles), share_kind=kind)
    return KVCache(GPT(config), 1, tokens).nbytes * bytes_per_number // 4

def flops_of_gpt(role, kind, n_head, n_kv_head, n_embd, n_hidden, keys):
    share = "" if role == "full" else "0-1"
    config = GPTConfig(n_layer=2, n_head=n_head, n_kv_head=n_kv_head, n_embd=n_embd, n_hidden=n_hidden,
                       share=share, share_kind=kind)
    return layer_flops(GPT(config).blocks[1 if role == "reuse" else 0], 1, keys)

def weights_of_layer(P, w):
    seen, attn = [], layer(len(P), len(P), torch.eye(len(P)), torch.eye(len(P)), Mixed)
    attn.mix = torch.nn.Parameter(w)
    attn(torch.zeros(1, P.size(1), len(P)), Step(None, None, False, watch=seen.append), P[None])
    return seen[0][0].detach()

BY_MODEL = {
    "attention_row": row_of_step,
    "reuse_layer": output_of_layer,
    "decode": sum_of_step,
    "roles": roles_of_gpt,
    "cache_bytes": bytes_of_cache,
    "decode_flops": flops_of_gpt,
    "mixture": weights_of_layer,
}

NAMES = check.NAMES

def result(name, answer):
    return grade.grade(getattr(check, name), grade.here(answer))

def full(name, answer):
    found = result(name, answer)
    return found.points == found.of

@pytest.fixture
def seeds(monkeypatch):
    """Yield, with each of some seeds set."""
    def each():
        for seed in range(SEEDS):
            monkeypatch.setattr(check, "SEED", seed)
            yield seed
    return each

@pytest.mark.parametrize("name", NAMES)
def test_a_right_answer_is_taken_whatever_the_seed(name, seeds):
    for seed in seeds():
        for answer in ANSWERS[name], BY_MODEL.get(name, ANSWERS[name]):
            assert result(name, answer).wrong is None, seed

@pytest.mark.parametrize("name", NAMES)
def test_another_seed_makes_new_cases(name, monkeypatch):
    def inputs(seed):
        monkeypatch.setattr(check, "SEED", seed)
        return [repr(case.arguments) for case in check.cases(getattr(check, name))]
    one, other = inputs(0), inputs(1)
    assert len(one) == len(other) and len(set(other) - set(one)) >= len(one) / 2

def test_flops_are_those_that_are_counted_on_a_real_model():
    for case in list(check.cases(check.decode_flops))[::5]:
        role, kind, H, G, C, M, keys = case.values
        shape = {"n_layer": 2, "vocab_size": 8, "n_head": H, "n_kv_head": G, "n_embd": C, "n_hidden": M}
        counted = [measure(GPT(GPTConfig(share=share, share_kind=kind, **shape)), keys).decode_flops - 16 * C
                   for share in ("", "0-1")]
        assert case.expected == (counted[1] - counted[0] // 2 if role == "reuse" else counted[0] // 2)

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
    D = W_out.size(1) // len(P)
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
        given = dict(zip(ANSWERS[name].__code__.co_varnames, arguments))
        return ANSWERS[name](**{key: changes.get(key, lambda old: old)(old) for key, old in given.items()})
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

def changed(name, after):
    """The right answer, and then something done to it."""
    return lambda *given: after(ANSWERS[name](*given))

def softmax_by(shift):
    """Subtracts something else than the largest score that t may see."""
    def answer(q, k, t):
        scores = [sum(a * b for a, b in zip(q[t], row)) / len(row)**0.5 for row in k]
        seen = torch.tensor(scores[:t + 1], dtype=torch.float64)
        e = (seen - shift(torch.tensor(scores, dtype=torch.float64), seen, t)).exp()
        return [*(e / e.sum()).tolist(), *[0.0] * (len(q) - t - 1)]
    return answer

def parsed(pattern, strip=str):
    """Reads spans by a regular expression that is too kind."""
    def answer(share, n_layer):
        spans = strip(share)
        if spans and not re.match(pattern, spans):
            raise ValueError
        return roles(re.sub(r"\b0+(?=\d)", "", ",".join(
            f"{int(a)}-{int(b)}" for a, b in re.findall(r"(\d+)-(\d+)", spans))), n_layer)
    return answer

def unmixed(P, w):
    return torch.stack([P[g] for g in w.argmax(1)])

def forgetful():
    """Keeps a cache of its own."""
    kept = []
    def answer(values, P, v):
        kept.append(v)
        return decode([*values], P, v)
    return answer

def late(values, P, v):
    """Attends first, then adds its values."""
    y = decode([*values[:-1]], P[:, :len(values)], values[-1]) if values else torch.zeros(len(P), v.size(1))
    values.append(v)
    return y

def spread(P, A):
    return P[:, None] - A

MORE = {
    "attention_row": [softmax_by(lambda all, seen, t: seen.mean()), softmax_by(lambda all, seen, t: seen[t]),
                      softmax_by(lambda all, seen, t: seen.min()), softmax_by(lambda all, seen, t: all.max()),
                      softmax_by(lambda all, seen, t: seen[0]), softmax_by(lambda all, seen, t: 700.0),
                      lambda q, k, t: attention_row(q, k, t - 1),
                      lambda q, k, t: attention_row([[x / 2 for x in row] for row in q], k, t),
                      changed("attention_row", lambda row: row[::-1]),
                      changed("attention_row", lambda row: [row]),
                      lambda q, k, t: [1 / (t + 1)] * (t + 1) + [0.0] * (len(q) - t - 1)],
    "reuse_layer": [lambda P, x, v, o: reuse_layer(P, x, v, torch.eye(len(o))),
                    lambda P, x, v, o: reuse_layer(torch.eye(len(x)).expand_as(P), x, v, o),
                    lambda P, x, v, o: reuse_layer(P.mean(0, keepdim=True).expand_as(P), x, v, o),
                    lambda P, x, v, o: reuse_layer(P.softmax(-1), x, v, o),
                    lambda P, x, v, o: reuse_layer(P.tril(-1), x, v, o),
                    lambda P, x, v, o: reuse_layer(P.flip(0), x, v, o),
                    lambda P, x, v, o: reuse_layer(P, x.flip(0), v, o),
                    lambda P, x, v, o: reuse_layer(P, F.rms_norm(x, x.shape[-1:]), v, o),
                    changed("reuse_layer", lambda y: y[None]), changed("reuse_layer", lambda y: y.T),
                    changed("reuse_layer", lambda y: y[-1])],
    "decode": [forgetful(), late, lambda values, P, v: decode(values, P, v * 2),
               lambda values, P, v: decode(values, P.flip(0), v), changed("decode", torch.flatten),
               changed("decode", lambda y: y.T), lambda values, P, v: decode(values, P.softmax(-1), v),
               lambda values, P, v: [decode(values, P, v), values.insert(0, values.pop())][0],
               lambda values, P, v: [decode(values, P, v), values.clear()][0],
               lambda values, P, v: [decode(values, P, v), values.pop(0)][0],
               lambda values, P, v: v.repeat_interleave(len(P) // len(v), 0)],
    "roles": [parsed(r"\d+-\d+(,\d+-\d+)*$"), parsed(r"\d+-\d+"), parsed(".*", str.strip),
              lambda s, n: roles(s.replace(" ", ""), n), lambda s, n: roles(s.replace(",,", ","), n),
              lambda s, n: roles(",".join(sorted(s.split(","))), n), lambda s, n: roles(s, n + 1),
              lambda s, n: roles(s.replace("_", ""), n + 999)[:n], lambda s, n: roles(s.replace("+",
                                                                                                      ""), n),
              lambda s, n: [role.upper() for role in roles(s, n)],
              lambda s, n: ["full"] * n if s.endswith("9") else roles(s, n)[::-1]],
    "cache_bytes": [changed("cache_bytes", lambda n: n + 1), changed("cache_bytes", lambda n: n // 2),
                    changed("cache_bytes", lambda n: 2 * n), changed("cache_bytes", str),
                    other("cache_bytes", tokens=lambda n: n - 1), other("cache_bytes", tokens=lambda n: 256),
                    other("cache_bytes", n_kv_head=lambda _: 1),
                    other("cache_bytes", n_embd=lambda n: 2 * n),
                    other("cache_bytes", bytes_per_number=lambda _: 2),
                    other("cache_bytes", roles=lambda r: [*r, "full"]),
                    lambda r, kind, H, G, C, n, b: 2 * len(r) * C * n * b],
    "decode_flops": [changed("decode_flops", lambda n: 2 * n), changed("decode_flops", lambda n: n + 1),
                     other("decode_flops", n_kv_head=lambda _: 1), other("decode_flops",
                                                                         keys=lambda n: n + 1),
                     other("decode_flops", keys=lambda _: 1), other("decode_flops", n_hidden=lambda _: 32),
                     other("decode_flops", role=lambda _: "anchor"),
                     other("decode_flops", kind=lambda kind: "kv" if kind == "weights" else "weights"),
                     lambda role, kind, H, G, C, M, S: decode_flops(role, kind, H, H, C, M, S),
                     lambda role, kind, H, G, C, M, S: decode_flops(role, kind, H, G, C, M, S) - 2 * C * S,
                     lambda role, kind, H, G, C, M, S: 2 * (4 * C * C + 3 * C * M + 2 * C * S)],
    "similarity": [lambda P, Q: (P * Q).sum(-1).max().item(),
                   lambda P, Q: F.cosine_similarity(P[:, 1:], Q[:, 1:], dim=2).mean().item(),
                   lambda P, Q: F.cosine_similarity(P[:, -1], Q[:, -1], dim=1).mean().item(),
                   lambda P, Q: F.cosine_similarity(P.flatten(1), Q.flatten(1), dim=1).mean().item(),
                   lambda P, Q: F.cosine_similarity(P.mean(0), Q.mean(0), dim=1).mean().item() - 0.01,
                   lambda P, Q: 1 - (P - Q).abs().sum(2).mean().item() / 2,
                   lambda P, Q: F.cosine_similarity(P.softmax(-1), Q.softmax(-1), dim=2).mean().item(),
                   lambda P, Q: F.cosine_similarity(P, Q, dim=2).sum().item(),
                   lambda P, Q: F.cosine_similarity(P, Q, dim=2).median().item(),
                   lambda P, Q: F.cosine_similarity(P, Q, dim=2), lambda P, Q: 0.5],
    "best_source": [lambda P, A: best_source(P.softmax(-1), A.softmax(-1)),
                    best_by(lambda P, A: -spread(P, A).abs().sum((2, 3))),
                    best_by(lambda P, A: torch.minimum(P[:, None], A[None]).sum((2, 3))),
                    best_by(lambda P, A: F.cosine_similarity(P[:, None], A[None], dim=2).mean(2)),
                    best_by(lambda P, A: F.cosine_similarity(P[:, None, -1], A[None, :, -1], dim=2)),
                    best_by(lambda P, A: spread(P, A).abs().sum((2, 3))),
                    lambda P, A: best_source(A, A), lambda P, A: [0] * len(P),
                    changed("best_source", lambda best: best[::-1]), changed("best_source",
                                                                             lambda best: best[:1]),
                    changed("best_source", lambda best: [g + 1 for g in best])],
    "mixture": [lambda P, w: mixture(P, w.abs()), lambda P, w: mixture(P, w.clamp(0, 1)), unmixed,
                lambda P, w: mixture(P, w.softmax(1)), lambda P, w: mixture(P.mT, w),
                lambda P, w: mixture(P, w.relu()), lambda P, w: mixture(P, w).sum(0),
                lambda P, w: mixture(P, w) + P, lambda P, w: mixture(P, torch.diag(w.diagonal())),
                lambda P, w: mixture(P, w) / mixture(P, w).sum(-1, keepdim=True),
                lambda P, w: mixture(P, w.flip(1))],
    "refit": [lambda Z, Y, W, r: refit(Z, Y, W, 2 * r), lambda Z, Y, W, r: refit(Z, Y, W, r**0.5),
              lambda Z, Y, W, r: refit(Z, Y, W, 1e-6), lambda Z, Y, W, r: refit(Z, Y, -W, r),
              lambda Z, Y, W, r: refit(Z, Y, W, r / len(Z)), lambda Z, Y, W, r: refit(Z, Y, W, r) - W,
              lambda Z, Y, W, r: refit(Z, Y - Z @ W.T, W, r), lambda Z, Y, W, r: (torch.linalg.pinv(Z) @ Y).T,
              lambda Z, Y, W, r: refit(Z - Z.mean(0), Y, W, r), lambda Z, Y, W, r: 2 * refit(Z, Y, W, r) - W,
              lambda Z, Y, W, r: refit(Z, Y, W, r)[None]],
    "keep": [lambda got, n: keep(got, n - 1), lambda got, n: list(range(n)), lambda got, n: keep(got[::-1],
                                                                                                 n),
             lambda got, n: sorted(range(len(got)), key=lambda i: (got[i], i))[-n:],
             lambda got, n: sorted(sorted(range(len(got)), key=lambda i: (got[i], i))[-n:]),
             lambda got, n: [i + 1 for i in keep(got, n)], lambda got, n: [got[i] for i in keep(got, n)],
             lambda got, n: sorted({*keep(got, n), 0}), lambda got, n: keep(got, n)[1:],
             lambda got, n: len(keep(got, n)),
             lambda got, n: sorted(sorted(range(len(got) - 1), key=lambda i: (got[i],
                                                                              i))[1 - n:] + [len(got) - 1])],
    "bits_per_byte": [lambda nats, n, text: nats * n / math.log(10) / len(text.encode()),
                      lambda nats, n, text: nats * n * math.log(2) / len(text.encode()),
                      lambda nats, n, text: nats / math.log(2),
                      lambda nats, n, text: bits_per_byte(nats, n, text) / n,
                      lambda nats, n, text: bits_per_byte(nats, n + 1, text),
                      lambda nats, n, text: bits_per_byte(nats, n, text + "x"),
                      lambda nats, n, text: nats * n / math.log(2) / len(text.encode("utf-16-le")),
                      lambda nats, n, text: nats * n / math.log(2) / len(text.encode("latin-1",
                                                                                     "ignore") + b"x"),
                      lambda nats, n, text: nats * n / math.log(2) / len(text),
                      lambda nats, n, text: -bits_per_byte(nats, n, text),
                      lambda nats, n, text: bits_per_byte(nats, n, text) * 8],
}
for _name, _answers in MORE.items():
    WRONG[_name] += _answers

@pytest.mark.parametrize("name, i", [(name, i) for name in WRONG for i in range(len(WRONG[name]))])
def test_a_plausible_wrong_answer_is_refused_whatever_the_seed(name, i, seeds):
    for seed in seeds():
        assert not full(name, WRONG[name][i]), seed

def test_every_exercise_has_at_least_thirteen_wrong_answers_and_all_points_are_a_hundred():
    assert list(WRONG) == NAMES and min(map(len, WRONG.values())) >= 13
    assert sum(sum(groups.values()) for groups in check.EXERCISES.values()) == 100

@pytest.mark.parametrize("same", [0, 1.0, [], ["full", "full"], ["full", "anchor", "reuse"], ValueError,
                                  None],
                         ids=range(7))
def test_an_answer_that_is_always_the_same_has_no_points(same):
    def answer(*arguments):
        if same is ValueError:
            raise ValueError
        return same
    assert [result(name, answer).points for name in NAMES] == [0] * len(NAMES)

def earlier_stays(received, budget):
    """Of two that received the same, the earlier one."""
    first = len(received) - budget // 2
    heavy = sorted(range(first), key=lambda i: (-received[i], i))[:budget - budget // 2]
    return [*sorted(heavy), *range(first, len(received))]

def test_a_group_of_cases_earns_its_own_points():
    found = result("reuse_layer", interleaved)
    assert [(group.name, group.points) for group in found.groups] == [
        ("a group per head", 6), ("heads share groups", 0)]
    assert result("decode", decode_forgets).points == 5 and result("keep", earlier_stays).points == 5

def full_width(name):
    """Takes no heads to share keys and values."""
    return lambda *given: ANSWERS[name](*given[:3], given[2], *given[4:])

def without_groups(values, P, v):
    values.append(v)
    return (P.T[..., None] * torch.stack(values)).sum(0)

@pytest.mark.parametrize("name, answer, points", [
    ("decode", without_groups, 6),
    ("cache_bytes", full_width("cache_bytes"), 6),
    ("decode_flops", full_width("decode_flops"), 9),
    ("refit", lambda Z, Y, W, ridge: (torch.linalg.pinv(Z) @ Y).T, 4),
    ("refit", lambda Z, Y, W, ridge: refit(Z, Y, 0 * W, ridge), 4),
], ids=range(5))
def test_half_an_idea_has_its_points(name, answer, points, seeds):
    for seed in seeds():
        assert result(name, answer).points == points, seed

@pytest.mark.parametrize("wrong", [lambda P, x, v, o: reuse_layer(P, x, v.T, o),
                                   lambda P, x, v, o: reuse_layer(P, x, v, o.T)], ids=["W_v", "W_out"])
def test_a_matrix_the_wrong_way_round_is_an_error_of_shapes(wrong):
    for group in result("reuse_layer", wrong).groups:
        assert "Error: " in group.wrong and group.points == 0

PAGES = Path(check.__file__).parent

def test_the_sheet_and_the_rubric_say_the_points_and_the_minutes_fill_the_labs():
    sheet = (PAGES / "README.md").read_text(encoding="utf-8")
    rubric = (PAGES / "teacher/rubric.md").read_text(encoding="utf-8")
    plan = (PAGES / "teacher/README.md").read_text(encoding="utf-8")
    exercises = re.findall(r"\*\*(\d+)\. .*?\*\* \(`(\w+)`, (\d+) minutes, (\d+) points\)", sheet)
    assert [name for _, name, _, _ in exercises] == NAMES
    for (number, name, minutes, points), groups in zip(exercises, check.EXERCISES.values()):
        assert int(points) == sum(groups.values())
        said = ", ".join(f"{group} {of}" for group, of in groups.items())
        assert f"| `{name}` | {said} |" in rubric
        assert re.search(rf"\| {number} [^|]*\| {minutes} \|", plan), name
    minutes = [int(entry[2]) for entry in exercises]
    assert sum(minutes[:6]) == sum(minutes[6:]) == 70

# ---- what it says ----

def failing(P, w):
    def inner():
        return 1 / 0                                        # the line to look at
    return inner()

def test_a_failed_case_says_its_number_its_inputs_by_name_and_both_values():
    def said(name, answer):
        return result(name, answer).wrong
    shape = r"a tensor of shape \(2, 4, 4\): \[\.\.\., \[.*\]\]"
    first = r" \(first at \[0, 0, 0\]: 1.8, not 1\)"
    assert re.fullmatch(rf"case 1 \(some of each\): expected {shape}, got {shape}{first}, for P={shape}, "
                        "w=a .*", said("mixture", lambda P, w: P))
    assert "got ZeroDivisionError: division by zero" in said("mixture", failing)
    newline = said("roles", lambda share, n_layer: roles(share.removesuffix("\n"), n_layer))
    assert "expected a ValueError, got ['full'" in newline and "\\n', n_layer=" in newline
    assert "(its cache): afterward, values does not hold" in said("decode", decode_forgets)

@pytest.mark.parametrize("name, wrong, said", [
    ("roles", lambda share, n: roles(share, n)[:-1] + ["full"], r"\(first at \[\d\]: 'reuse', not 'full'\)"),
    ("attention_row", lambda q, k, t: attention_row(q, k, t)[:t + 1], r"\(of size 4, not 6\), for"),
    ("attention_row", lambda q, k, t: [attention_row(q, k, t)], r"\(of size 1 × 1, not 1\), for"),
    ("keep", lambda got, n: keep(got, n)[:-1], r"received=\[([\d.]+, ){11}[\d.]+\], budget=2"),
    ("similarity", lambda P, Q: 0.5, r"expected ([\d.]+), got 0.5 \([\d.]+ too (much|little)\)"),
    ("decode_flops", lambda *given: decode_flops(*given) - 2048, r"\(2,048 too little\)"),
    ("mixture", lambda P, w: P * w.sum(1)[:, None, None], r"\(first at \[0, 1, 0\]: \S+, not \S+\)"),
], ids=range(7))
def test_a_failed_case_says_where_it_differs_first_and_by_how_much(name, wrong, said):
    assert re.search(said, result(name, wrong).wrong)

@pytest.mark.parametrize("name", ["similarity", "best_source", "mixture", "reuse_layer"])
def test_what_is_shown_of_P_is_more_than_the_token_that_sees_itself_alone(name):
    shown = [judge.shown(case.arguments["P"]) for case in check.cases(getattr(check, name))]
    trivial = [text for text in shown if re.search(r"\[1(, 0)+(, \.\.\.)?\]+$", text)]
    assert len(trivial) < len(shown) / 2

def test_a_loop_without_end_is_interrupted_in_a_notebook_and_errors_name_the_line_of_the_cell(monkeypatch):
    names = {}
    exec(compile("def keep(r, n):\n    while True:\n        pass\n"
                 "def mixture(P, w):\n    return P @ 1\n", "<cell>", "exec"), names)
    assert "in line 5 of this cell: " in result("mixture", names["mixture"]).wrong
    monkeypatch.setattr(grade, "SECONDS", 0.2)
    assert result("keep", names["keep"]).wrong == "was interrupted; a case may take 0.2 seconds"

@pytest.mark.parametrize("name", NAMES)
def test_a_case_can_be_pasted_whole_and_compares(name, capsys):
    def wrong(*given):
        raise AssertionError
    for number, case in enumerate(check.cases(getattr(check, name)), start=1):
        pasted = judge.pasted(getattr(check, name), number)
        assert len(pasted.splitlines()) < 16 and len(pasted) < 2000
        exec(pasted, {name: wrong, "__name__": "answers"})              # nothing, while it is graded
        names = {name: ANSWERS[name], "__name__": "__main__"}
        exec(pasted, names)
        said = capsys.readouterr().out
        differ = re.search("largest difference: (.*)", said)
        assert float(differ[1]) < 1e-3 if differ else said.endswith("\nright: True\n")
        for given, value in case.arguments.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(names[given], value)
        assert case.expected is ValueError or judge.is_right(names["expected"], case.expected)
    with pytest.raises(ValueError, match="has cases 1 to"):
        judge.pasted(getattr(check, name), number + 1)

LOOP = []
LOOP.append(LOOP)

class Agreeable:
    def __eq__(self, other):
        return True

    def __repr__(self):
        raise KeyError

@pytest.mark.parametrize("odd", [None, "text", [[1], [2, 3]], object(), {}, float("nan"), torch.ones(9), LOOP,
                                 10**5000, 10**400, Agreeable(), {"numbers": 1}, torch.zeros(400, 400),
                                 torch.ones(2, dtype=torch.complex64), 1j, b"x", [Agreeable()]],
                                 ids=range(17))
def test_whatever_an_answer_returns_is_a_wrong_answer(odd):
    for name in NAMES:
        found = result(name, lambda *arguments: odd)
        assert found.points == 0 and found.wrong.startswith("case 1 ("), name
