"""SqueezeAttention (Wang & Gan 2024, arXiv:2404.04793): the cache keeps fewer tokens, and not as many in every layer.

A policy says which tokens a layer keeps within its budget, and which one goes when a new token comes and the budget is used up:

    window    the last ones
    sinks     the first 4 and the last ones (StreamingLLM, arXiv:2309.17453): much weight falls on the first tokens, whatever they are
    heavy     half the budget the last ones, half those that got most attention weight so far, summed over queries and heads
              (heavy hitters: H2O, arXiv:2306.14048)

SqueezeAttention gives the layers different budgets. A layer matters little if its attention hardly turns the residual stream:

    cosine_l = mean over the prompt's tokens of cos(x, x + attention_l(x))        1 = it changes nothing

The layers are clustered into three groups. Those of the highest cosines get `cut` times the budget, and what that frees goes to all
others, so that the bytes stay the same, rounded down to tokens: Σ_l bytes_l · budget_l = budget · Σ_l bytes_l. The paper clusters the cosines themselves; here
it is log(1 − cosine_l), since a few layers of a small model (its first two, and one that writes the first token's large
numbers) lie so far from all others that the cosines alone would give them everything.

The layers of a shared span attend alike, so they keep the same tokens: a span has one budget, the mean of its layers' cosines, and the
sum of their attention weights. Keys keep the positions that they had (StreamingLLM counts them anew). The prompt is read whole, then squeezed: memory is at its
highest just before. Unlike H2O, all heads of a layer keep the same tokens.
"""

import torch
from torch.nn import functional as F

from minisa.model import PREFILL_CHUNK, KVCache, causal_mask, rope_angles, widths

POLICIES = ("window", "sinks", "heavy")
SINKS = 4


def units(config):
    """The layers that keep the same tokens: [(0,), (1, 2, 3), …]."""
    spans = {a: b for a, b in config.spans}
    return [tuple(range(layer, spans.get(layer, layer) + 1)) for layer in range(config.n_layer) if config.role(layer) != "reuse"]


def budgets(config, cosines, budget, cut):
    """cosines (L,) → how many tokens each unit keeps, when all together take the bytes of `budget` tokens in every layer.
    cut None, or no difference to be seen: the same budget for all."""
    groups = units(config)
    means = torch.tensor([sum(cosines[layer] for layer in unit) / len(unit) for unit in groups], dtype=torch.float64)
    means = -(1 - means).clamp(min=1e-9).log()                                          # high = matters little
    ordered, n = means.sort().values, len(groups)
    if cut in (None, 1) or n < 3 or ordered[0] == ordered[-1]:
        return [budget] * n

    def scatter(values):
        return ((values - values.mean())**2).sum().item()

    _, least = min((scatter(ordered[:i]) + scatter(ordered[i:j]) + scatter(ordered[j:]), ordered[j].item())
                   for i in range(1, n - 1) for j in range(i + 1, n))                   # 3-means of numbers on a line: all ways to cut it
    size = [sum(sum(widths(config, layer)[1:]) for layer in unit) for unit in groups]
    low = max(1, int(cut * budget))
    freed = sum(s * (budget - low) for s, mean in zip(size, means) if mean >= least)
    more = int(freed / sum(s for s, mean in zip(size, means) if mean < least))
    return [low if mean >= least else budget + more for mean in means]


def priority(policy, where, scores, length, budget):
    """Which tokens to keep: where (B, S) are their positions, scores (B, S) the attention weight they got. → (B, S), high = keep."""
    if policy == "heavy":
        return scores.masked_fill(where >= length - budget // 2, torch.inf)
    return where.masked_fill(where < SINKS, torch.iinfo(torch.long).max) if policy == "sinks" else where


class SqueezedCache(KVCache):
    """A KVCache in which every layer has its own budget of tokens. It takes one new token at a time. Made by squeeze()."""

    def __init__(self, config, policy, length):
        self.config, self.policy, self.size, self.length = config, policy, config.block_size, length
        self.units = units(config)
        self.unit_of = {layer: u for u, unit in enumerate(self.units) for layer in unit}
        self.k, self.v = [None] * config.n_layer, [None] * config.n_layer
        self.where, self.scores, self.counts, self.slots = [], [], [], [None] * len(self.units)     # of each unit
        self.seen = [] if policy == "heavy" else None

    @property
    def rooms(self):
        """How many tokens each layer has room for."""
        return [self.where[self.unit_of[layer]].size(1) for layer in range(len(self.k))]

    def open(self, positions):
        if len(positions) > 1:
            raise ValueError("a squeezed cache takes one token at a time")
        for u, unit in enumerate(self.units):
            where, scores, count = self.where[u], self.scores[u], self.counts[u]
            if self.seen:                                                               # P of the token before, which was not known when it was added
                for layer in unit:
                    scores[:, :count] += self.seen[layer].sum((1, 2))
            if count < where.size(1):
                self.counts[u], slots = count + 1, torch.full((len(where),), count, device=where.device)
            else:
                slots = priority(self.policy, where, scores, self.length, count).argmin(1)
            self.slots[u] = torch.arange(len(where), device=where.device), slots
            where[self.slots[u]] = positions
            scores[self.slots[u]] = 0.0
        if self.seen:
            self.seen.clear()
        self.length += 1
        return positions

    def write(self, layer, tensors, new):
        u = self.unit_of[layer]
        rows, slots = self.slots[u]
        tensors[layer][rows, :, slots] = new[:, :, 0]
        return tensors[layer][:, :, :self.counts[u]]

    def key_angles(self, layer):
        u = self.unit_of[layer]
        return rope_angles(self.config, self.where[u][:, None, :self.counts[u]])               # (B, 1, S, D)


@torch.no_grad()
def read(model, idx, weights=True):
    """Read a prompt idx (B, T) into a KVCache, and look. → the cache; cosines (L,); for each unit the attention weight (B, T) that
    each token got, if `weights`, else zeros."""
    config, (B, T) = model.config, idx.shape
    cache = KVCache(config, B, max(T, 1), model.embed.weight.dtype, idx.device)
    cosines, scores = [0.0] * config.n_layer, [torch.zeros(B, T, device=idx.device) for _ in units(config)]
    unit_of = {layer: u for u, unit in enumerate(units(config)) for layer in unit}
    for chunk in idx.split(PREFILL_CHUNK, dim=1) if T else []:
        positions = torch.arange(cache.length, cache.length + chunk.size(1), device=idx.device)
        keys, x, shared = cache.open(positions), model.embed(chunk), None
        angles, mask = rope_angles(config, positions), causal_mask(positions, keys, T, like=x)
        for layer, block in enumerate(model.blocks):
            seen = [] if weights else None
            y, shared = block.attn(block.norm1(x), angles, mask, shared, cache, seen)
            if weights:
                scores[unit_of[layer]][:, :len(keys)] += seen[0].sum((1, 2))
            cosines[layer] += F.cosine_similarity(x.float(), (x + y).float(), dim=2).sum().item() / (B * T)
            x = x + y
            x = x + block.mlp(block.norm2(x))
    return cache, cosines, scores


@torch.no_grad()
def squeeze(cache, cosines, scores, budget, policy="heavy", cut=0.5):
    """What read() gave → a SqueezedCache of the bytes of `budget` tokens in every layer. (Positions and scores take 12 more per token
    of a unit.)

    cut: the fraction of the budget that the least important layers keep, None for equal budgets. The given cache stays as it is.
    """
    small = SqueezedCache(cache.config, policy, cache.length)
    for u, limit in enumerate(budgets(cache.config, cosines, budget, cut)):
        B, T = scores[u].shape
        where = torch.arange(T, device=scores[u].device).expand(B, T)
        n = min(limit, T)
        kept = priority(policy, where, scores[u], T, limit).topk(n).indices.sort().values           # (B, n)

        def take(t):                                                                    # (B, ..., T, d) → (B, ..., limit, d)
            out = t.new_zeros(*t.shape[:-2], limit, t.size(-1))
            index = kept.view(B, *[1] * (t.dim() - 3), n, 1).expand(*t.shape[:-2], n, t.size(-1))
            out[..., :n, :] = t.gather(-2, index)
            return out

        small.where.append(take(where[..., None])[..., 0])
        small.scores.append(take(scores[u][..., None])[..., 0])
        small.counts.append(n)
        for layer in small.units[u]:
            small.k[layer], small.v[layer] = take(cache.k[layer]), take(cache.v[layer])
    return small


@torch.inference_mode()
def loss(model, windows, prompt, got=None, budget=None, policy="heavy", cut=0.5):
    """windows (N, T + 1) → mean cross-entropy in nats of the tokens after the first prompt + 1. With got, what read() gave for the
    first `prompt` tokens, each of them sees what a cache squeezed to `budget` tokens then holds; without, all before it."""
    if got is None:
        logits = [model.head(model.hidden(w[None, :-1])[0, prompt:]).float() for w in windows]
        return sum(F.cross_entropy(row, w[prompt + 1:]).item() for row, w in zip(logits, windows)) / len(windows)
    cache, steps = squeeze(*got, budget, policy, cut), range(prompt, windows.size(1) - 1)
    return sum(F.cross_entropy(model(windows[:, t:t + 1], cache=cache)[0][:, 0].float(), windows[:, t + 1]).item() for t in steps) / len(steps)
