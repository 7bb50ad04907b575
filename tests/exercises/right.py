"""Right answers, written for the tests: plain torch and Python, as a student writes them."""

import math
import re

import torch

def attention_row(q, k, t):
    D = len(q[0])
    scores = [sum(a * b for a, b in zip(q[t], row)) / math.sqrt(D) for row in k[:t + 1]]
    exponentials = [math.exp(score - max(scores)) for score in scores]
    return [e / sum(exponentials) for e in exponentials] + [0.0] * (len(q) - t - 1)

def reuse_layer(P, x, W_v, W_out):
    H, D = len(P), W_out.shape[1] // len(P)
    v = (x @ W_v.T).split(D, dim=1)
    heads = [P[h] @ v[h * len(v) // H] for h in range(H)]
    return torch.cat(heads, dim=1) @ W_out.T

def decode(values, P, v):
    values.append(v)
    H, G = len(P), len(v)
    return torch.stack([sum(P[h, s] * kept[h * G // H] for s, kept in enumerate(values)) for h in range(H)])

def roles(share, n_layer):
    found = ["full"] * n_layer
    last = -1
    for span in share.split(",") if share else []:
        if not re.fullmatch("(0|[1-9][0-9]*)-(0|[1-9][0-9]*)", span):
            raise ValueError(span)
        a, b = map(int, span.split("-"))
        if not last < a < b < n_layer:
            raise ValueError(span)
        found[a:b + 1] = ["anchor"] + ["reuse"] * (b - a)
        last = b
    return found

def cache_bytes(roles, kind, n_head, n_kv_head, n_embd, tokens, bytes_per_number):
    reuse = {"weights": 1, "kv": 0}[kind]
    tensors = sum(reuse if role == "reuse" else 2 for role in roles)
    return tensors * n_kv_head * (n_embd // n_head) * tokens * bytes_per_number

def decode_flops(role, kind, n_head, n_kv_head, n_embd, n_hidden, keys):
    C, kv = n_embd, n_kv_head * n_embd // n_head
    parts = {"q": C * C, "k": C * kv, "v": C * kv, "scores": C * keys}
    skipped = {"weights": ["q", "k", "scores"], "kv": ["k", "v"]}[kind] if role == "reuse" else []
    done = sum(n for name, n in parts.items() if name not in skipped)
    return 2 * (done + C * keys + C * C + 3 * C * n_hidden)

def similarity(P, Q):
    cosines = (P * Q).sum(2) / P.norm(dim=2) / Q.norm(dim=2)
    return cosines.mean().item()

def best_source(P, anchor):
    best = []
    for head in P:
        cosines = [(head * other).sum() / other.norm() for other in anchor]
        best.append(int(torch.stack(cosines).argmax()))
    return best

def mixture(P, w):
    return torch.einsum("hg,gts->hts", w, P)

def refit(Z, Y, W, ridge):
    squares = Z.T @ Z + ridge * torch.eye(Z.shape[1])
    return W + torch.linalg.solve(squares, Z.T @ (Y - Z @ W.T)).T

def keep(received, budget):
    first = len(received) - budget // 2
    heavy = sorted(range(first), key=lambda i: (-received[i], -i))[:budget - budget // 2]
    return sorted([*heavy, *range(first, len(received))])

def bits_per_byte(nats_per_token, tokens, text):
    return nats_per_token * tokens / math.log(2) / len(text.encode("utf-8"))
