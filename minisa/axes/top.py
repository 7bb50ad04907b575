"""Layers that share places: --share_kind=top-64. The anchor of a span attends to all tokens. Its
reuse layers have a q, k and v of their own, and attend to the 64 tokens that weigh most in the
anchor.

After Kascade (arXiv:2512.16391), IndexCache (arXiv:2603.12201) and HySparse (arXiv:2602.03560):
what a token attends to is much the same in neighboring layers, even where the weights are not. For
query t and key/value head g, the anchor hands up the places of the k largest

    w_g[s] = Σ P_h[t, s]    over the query heads h that share g

The heads of a group share places, since they share keys: each head with places of its own would
read H/G times as many. If no more than k tokens are visible, all are read.

A reuse layer stores all its keys and values, but a decode step reads only k of them. That saves
time when the context is long. In a prompt and in training, the rest is computed, then masked.
"""

from dataclasses import replace

import numpy as np
import torch

from minisa import decode
from minisa.model import Attention

# ---- in torch ----

class TopAnchor(Attention):
    """The first layer of a span: it hands up places (B, G, T, n), where n = min(k, S)."""
    k: int                          # set by with_setting()

    def heads(self, h, step, below):
        q, k, v = self.project(h, step)
        P = step.attention_weights(q, k)                        # (B, H, T, S)
        weights = P.unflatten(1, (self.G, -1)).sum(2)           # (B, G, T, S)
        if step.mask is not None:
            weights = weights + step.mask                       # a hidden token is always the last
        places = weights.topk(min(self.k, k.size(2))).indices
        return step.weighted_sum(P, v), places

class TopAttention(Attention):
    """A reuse layer: it attends to the places handed up."""
    k: int

    def heads(self, h, step, places):
        q, k, v = self.project(h, step)
        attend = self.to_few if h.size(1) == 1 else self.to_masked
        return attend(step, q, k, v, places), places

    def to_few(self, step, q, k, v, places):
        """One new token: gather keys and values. Who watches sees P of all tokens."""
        rows = places.mT                                        # (B, G, n, 1)
        keys = k.take_along_dim(rows, 2)                        # (B, G, n, D)
        values = v.take_along_dim(rows, 2)
        P = step.attention_weights(q, keys)                     # (B, H, 1, n)
        if step.watch:
            nothing = q.new_zeros(*P.shape[:3], k.size(2))
            of_all = nothing.scatter(3, self.of_heads(places), P)
            step.watch(of_all)
        unwatched = replace(step, watch=None)
        return unwatched.weighted_sum(P, values)

    def to_masked(self, step, q, k, v, places):
        """Several new tokens: all other places are masked."""
        T, S = step.mask.shape
        chosen = step.mask.new_full((len(q), self.G, T, S), -torch.inf)
        chosen = chosen.scatter(3, places, 0.0)
        mask = self.of_heads(chosen + step.mask)                # (B, H, T, S)
        masked = replace(step, mask=mask, causal=False)
        return masked.fused(q, k, v)

    def of_heads(self, groups):
        """(B, G, T, any) → (B, H, T, any)"""
        served = self.H // self.G
        return groups.repeat_interleave(served, dim=1)

    def tokens_read(self, T, S):
        return min(self.k, S) if T == 1 else S

# ---- one new token, in numpy: see minisa/decode.py ----

def anchor_in_numpy(n):
    """→ the attention of an anchor that hands up n places, or all. They are rows of the cache,
    whose G heads lie one after the other."""

    def attention(decoder, layer, h, below):
        y, (P, _, _) = decode.full_attention(decoder, layer, h, below)
        weights = np.add.reduce(P, axis=1)                      # (G, S)
        G, S = weights.shape
        few = min(n, S)
        places = np.argpartition(weights, -few)[:, -few:]       # (G, few)
        heads = np.arange(G)[:, None]
        return y, places + heads * layer.k.shape[1]
    return attention

def few_in_numpy(decoder, layer, h, rows):
    """The attention of a reuse layer."""
    q, _, _ = decode.project(decoder, layer, h)
    all_keys = layer.k.reshape(-1, decoder.D)                   # (G·size, D)
    all_values = layer.v.reshape(-1, decoder.D)
    keys = all_keys.take(rows, axis=0)                          # (G, few, D)
    values = all_values.take(rows, axis=0)
    P = decode.attention_weights(q, keys)
    return decode.weighted_sum(P, values), rows

# ---- the kind ----

def with_setting(text):
    """"64" → the classes of --share_kind=top-64. Raises ValueError unless it is an int above 0."""
    if not text.isdecimal() or not 0 < int(text) < 2**29:
        raise ValueError(f"--share_kind=top-{text}: give a number from 1 up, as in top-64")

    class AnchorOfTop(TopAnchor):
        k = int(text)
        in_numpy = anchor_in_numpy(k)

    class ReuseOfTop(TopAttention):
        k = int(text)
        in_numpy = few_in_numpy

    return AnchorOfTop, ReuseOfTop
