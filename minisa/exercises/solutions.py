"""Right answers, for the teacher: made from minisa's own code, 100 of 100.

    python -m minisa.exercises solutions                    in solutions.py
    python -m minisa.exercises solutions --out=FILE

The file holds functions of minisa, word for word, and below them the answers that stand here. An answer
only leads from an exercise to the code that minisa runs, so nothing here goes stale, and nothing leaks that a
reader of minisa does not see anyway. Where that code is a line of a longer function, the line stands here.

Students can run this, as they can read minisa. You may delete this file from the copy that they get: only the
tests of the course need it.
"""

import inspect
import math
import textwrap
from types import SimpleNamespace

import torch

from minisa import model
from minisa.axes.heads import Mixed, head_products, ridge_regression
from minisa.axes.squeeze import Heavy
from minisa.cost import layer_flops
from minisa.kit.cli import Parser, command
from minisa.kit.files import write_file
from minisa.lab.similarity import layer_similarity
from minisa.model import GPTConfig, Widths, check, sharing_kind
from minisa.plain import attention_weights, project, shared_attention, weighted_sum

# what a span shares → what its anchor and its reuse layers make
SHARE_KINDS = {kind: tuple(layer.makes for layer in model.SHARE_KINDS[kind]) for kind in ("weights", "kv")}

recombine = Mixed.recombine
score = Heavy.score

# ---- the answers ----

def attention_row(q, k, t):
    row = torch.tensor(q[t:t + 1]).double()                         # one row, of one head
    [P] = attention_weights([row], [torch.tensor(k[:t + 1]).double()], mask=0)
    return P[0].tolist() + [0.0] * (len(k) - t - 1)

def reuse_layer(P, x, W_v, W_out):
    config = SimpleNamespace(head_dim=W_out.size(1) // len(P))
    y, _ = shared_attention(x, W_v, config, mask=None, below=(P, None, None))
    return y @ W_out.T

def decode(values, P, v):
    values.append(v)
    y = weighted_sum(P[:, None], torch.stack(values, dim=1))        # (H, 1, S), (G, S, D) → (1, C)
    return y.view(len(P), -1)

def roles(share, n_layer):
    config = GPTConfig(n_layer=n_layer, share=share)                # check() refuses
    found = ["full"] * n_layer
    for a, b in config.spans:                                       # as in GPT.__init__()
        found[a:b + 1] = ["anchor"] + ["reuse"] * (b - a)
    return found

def widths(role, kind, n_head, n_kv_head, n_embd):
    """As in Attention.__init__()."""
    anchor, reuse = SHARE_KINDS[kind]
    makes = reuse if role == "reuse" else anchor
    kv = n_kv_head * (n_embd // n_head)
    return Widths(
        q=n_embd if "q" in makes else 0,
        k=kv if "k" in makes else 0,
        v=kv if "v" in makes else 0)

def cache_bytes(roles, kind, n_head, n_kv_head, n_embd, tokens, bytes_per_number):
    made = [widths(role, kind, n_head, n_kv_head, n_embd) for role in roles]
    return tokens * sum(bytes_per_number * (n.k + n.v) for n in made)       # as in predict()

def decode_flops(role, kind, n_head, n_kv_head, n_embd, n_hidden, keys):
    matrix = SimpleNamespace(in_features=n_embd)
    attn = SimpleNamespace(qkv=matrix, out=matrix, widths=widths(role, kind, n_head, n_kv_head, n_embd),
                           extra_cost=lambda T, S: (0, 0), tokens_read=lambda T, S: S)
    mlp = SimpleNamespace(down=SimpleNamespace(in_features=n_hidden))
    return layer_flops(SimpleNamespace(attn=attn, mlp=mlp), 1, keys)

def similarity(P, Q):
    two_layers = SimpleNamespace(attention_weights=lambda idx: [P, Q])
    return layer_similarity(two_layers, None)[0, 1].item()

def best_source(P, anchor):
    config = SimpleNamespace(n_layer=2, n_head=len(P))
    two_layers = SimpleNamespace(config=config, attention_weights=lambda idx: [anchor, P])
    products = head_products(two_layers, torch.zeros(1, 1))         # (2, H, 2, H)
    among, between = products[0, :, 0], products[1, :, 0]
    cosines = between / among.diagonal().sqrt()                     # as in share()
    return cosines.argmax(1).tolist()

def mixture(P, w):
    return recombine(SimpleNamespace(mix=w), P.flatten(1)).view_as(P)

def refit(Z, Y, W, ridge):
    missing = Y - Z @ W.T                                           # as in refit() of minisa
    ridge_in_means = ridge / Z.double().square().sum(0).mean()
    return W + ridge_regression(Z[None], missing[None], ridge_in_means).float()

def keep(received, budget):
    where = torch.arange(len(received))
    got = torch.tensor(received).double()
    scores = score(None, SimpleNamespace(where=where, received=got, length=len(received), room=budget))
    best = sorted(where.tolist(), key=lambda i: (scores[i], i))[-budget:]
    return sorted(best)

def bits_per_byte(nats_per_token, tokens, text):
    return nats_per_token * tokens / math.log(2) / len(text.encode())       # as in Data.evaluate()

# ---- the file ----

TOP = '''"""Right answers to the exercises, made from minisa's code. Not for students."""

import importlib.util
import math
import re
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch.nn import functional as F
'''
CONSTANTS = {"POSITIVE": model.POSITIVE, "SHARE_KINDS": SHARE_KINDS}
OF_MINISA = (project, attention_weights, weighted_sum, shared_attention, GPTConfig, check,
             sharing_kind, Widths, layer_flops, layer_similarity, head_products, recombine, ridge_regression,
             score)
ANSWERS = {answer.__name__: answer for answer in (
    attention_row, reuse_layer, decode, roles, cache_bytes, decode_flops,
    similarity, best_source, mixture, refit, keep, bits_per_byte)}

def text_of_file():
    """→ a file of answers that needs nothing of minisa."""
    parts = [TOP.strip()]
    parts += [f"{name} = {value!r}" for name, value in CONSTANTS.items()]
    module = None
    for piece in (*OF_MINISA, widths, *ANSWERS.values()):
        if piece.__module__ != module:
            module = piece.__module__
            parts.append(f"# ---- from {module} ----")
        parts.append(textwrap.dedent(inspect.getsource(piece)).strip())
    return "\n\n".join(parts) + "\n"

def main():
    parser = Parser(__doc__, usage="python -m minisa.exercises solutions [--out=FILE]")
    parser.flag("out", default="solutions.py", help="Python file to write")
    args = parser.parse_args()
    write_file(args.out, text_of_file().encode(), named=True)
    print(f"wrote {args.out}: python -m minisa.exercises --answers={args.out}")

if __name__ == "__main__":
    command(main)
