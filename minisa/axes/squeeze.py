"""SqueezeAttention (Wang & Gan 2024, arXiv:2404.04793): the cache keeps fewer tokens, and not as
many in every layer. A policy says which tokens a layer keeps within its budget:

    window    the last ones
    sinks     the first 4 and the last ones (StreamingLLM, arXiv:2309.17453): much weight falls on
              the first tokens, whatever they are
    heavy     half the budget the last ones, half those that received most attention weight so far,
              summed over queries and heads (heavy hitters: H2O, arXiv:2306.14048)

The layers have different budgets. A layer matters little if its attention hardly turns the stream:

    cosine_l = mean over the prompt's tokens of cos(x, x + attention_l(x))    1 = it changes nothing

The layers are clustered into three groups. Those of the highest cosines get `cut` times the budget.
What that frees goes to all others, so that the bytes stay the same, rounded down to whole tokens:
Σ_l bytes_l · budget_l = budget · Σ_l bytes_l. The paper clusters the cosines; here it is
-log(1 - cosine_l). A few layers of a small model (its first two, and one that writes the first
token's large numbers) lie so far from all others that the cosines alone would give them everything.

The layers of a span attend alike, so they keep the same tokens. They are one unit, with the mean of
their cosines, the sum of what their attention weights give each token, and one budget. A layer in
no span is a unit too. Unlike H2O, all heads of a layer keep the same tokens. Unlike StreamingLLM,
keys keep the positions that they had. The prompt is read whole, then squeezed, so memory is at its
highest just before.
"""

import argparse
import itertools
import math
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn import functional as F

from minisa.axes.common import walk
from minisa.kit.cli import at_least
from minisa.model import PREFILL_CHUNK, KVCache

POLICIES = ("window", "sinks", "heavy")
SINKS = 4

def units(config):
    """The layers that keep the same tokens: [(0,), (1, 2, 3), (4,)] with share="1-3"."""
    spans = [tuple(range(a, b + 1)) for a, b in config.spans]
    alone = set(range(config.n_layer)) - {layer for span in spans for layer in span}
    return sorted(spans + [(layer,) for layer in alone])

def third_group(values):
    """The least value of the highest of three groups of numbers on a line: the three with the least
    squares of distances from their means, of all ways to cut the line."""
    ordered, ways = values.sort().values, []
    for places in itertools.combinations(range(1, len(values)), 2):
        groups = ordered.tensor_split(places)
        squares = sum((group - group.mean()).square().sum().item() for group in groups)
        ways.append((squares, groups[2][0].item()))
    return min(ways)[1]

def budgets(groups, cosines, sizes, budget, cut):
    """→ how many tokens each unit keeps, when all take the bytes of `budget` tokens in every layer.

    groups: the units(). cosines, sizes: of each layer its cosine_l, and how many numbers it caches
    of a token. cut: None or 1 gives all the same, and so do cosines that are all the same.
    """
    means = [sum(cosines[layer] for layer in unit) / len(unit) for unit in groups]
    calm = -(1 - torch.tensor(means, dtype=torch.float64)).clamp(min=1e-9).log()    # 0 = turns most
    if cut in (None, 1) or len(groups) < 3 or calm.min() == calm.max():
        return [budget] * len(groups)
    least = third_group(calm)
    small, low = [value >= least for value in calm], max(1, int(cut * budget))
    size = [sum(sizes[layer] for layer in unit) for unit in groups]
    freed = sum(n * (budget - low) for n, is_small in zip(size, small) if is_small)
    high = budget + freed // sum(n for n, is_small in zip(size, small) if not is_small)
    return [low if is_small else high for is_small in small]

def priority(policy, where, received, length, budget):
    """Which of a unit's tokens to keep, after `length` tokens in all. → (B, S), high = keep.

    where (B, S): their positions. received (B, S): the attention weight that they received.
    """
    if policy == "heavy":
        return received.masked_fill(where >= length - budget // 2, torch.inf)
    if policy == "sinks":
        return where.masked_fill(where < SINKS, torch.iinfo(where.dtype).max)
    return where

# ---- the cache ----

@dataclass
class Kept:
    """The tokens that the layers of a unit keep, in places of which the first `count` are taken."""
    where: torch.Tensor             # (B, room): their positions
    received: torch.Tensor          # (B, room): the attention weight that they received so far
    count: int
    newest: tuple = None            # sequences (B,) and the places (B,) of their newest tokens

    def admit(self, positions, policy, length):
        """Give the token at positions (1,) a free place, or that of a token which then goes."""
        B, room = self.where.shape
        if self.count < room:
            places = torch.full((B,), self.count, device=self.where.device)
            self.count += 1
        else:
            places = priority(policy, self.where, self.received, length, room).argmin(1)
        self.newest = torch.arange(B, device=self.where.device), places
        self.where.scatter_(1, places[:, None], positions.expand(B, 1))
        self.received.scatter_(1, places[:, None], 0.0)

class SqueezedCache(KVCache):
    """A KVCache in which each layer has its own budget of tokens. Made by squeeze()."""
    size = 1                        # tokens at once, as another may have to go for each

    def __init__(self, n_layer, policy, length):
        self.policy, self.length = policy, length
        self.units = []                                         # a Kept for each unit
        self.kept = [None] * n_layer                            # for each layer, that of its unit
        self.k, self.v = [None] * n_layer, [None] * n_layer     # (B, G, room, d) each
        self.rooms = [0] * n_layer                              # as cost.predict(kept=...) takes it

    @property
    def watch(self):
        return self.add_up if self.policy == "heavy" else None  # for others no P need be formed

    def advance(self, positions):
        """Make room for a token at positions (1,). → the positions (S,) then visible to the unit
        that holds most tokens, in the first sequence."""
        for kept in self.units:
            kept.admit(positions, self.policy, self.length)
        self.length += 1
        self.watched = 0                                        # layers whose P came since
        most = max(self.units, key=lambda kept: kept.count)
        return most.where[0, :most.count]

    def remember(self, name, layer, new):
        """A layer's new k or v (B, G, 1, d) → all that it keeps (B, G, S, d)."""
        stored, kept = getattr(self, name)[layer], self.kept[layer]
        sequences, places = kept.newest
        stored[sequences, :, places] = new[:, :, 0]
        return stored[:, :, :kept.count]

    def key_positions(self, layer):
        """The positions (B, 1, S) of the keys that remember() gives for a layer."""
        kept = self.kept[layer]
        return kept.where[:, None, :kept.count]

    def add_up(self, P):
        """P (B, H, 1, S), of one layer after the other: what each token received of it."""
        kept = self.kept[self.watched]
        kept.received[:, :kept.count] += P.detach().sum((1, 2), dtype=torch.float32)
        self.watched += 1

# ---- to read a prompt, and to squeeze its cache ----

@torch.no_grad()
def read(model, idx, weights=True, room=0):
    """Read a prompt idx (B, T) into a KVCache with room for more tokens, and look. → the cache;
    cosine_l of each layer (L,); and {unit: the attention weight (B, T) that each token received},
    zeros unless `weights`."""
    (B, T), like = idx.shape, model.embed.weight
    cache = KVCache(model, B, max(T + room, 1))
    cosines = [0.0] * model.config.n_layer
    received = {unit: torch.zeros(B, T, device=idx.device) for unit in units(model.config)}
    of_layer = {layer: got for unit, got in received.items() for layer in unit}

    def watch(P):                                               # (B, H, T, S)
        of_layer[layer][:, :P.size(3)] += P.sum((1, 2), dtype=torch.float32)

    def attended(attn, given, gave):                            # gave y (B, T, C), and more
        after = before + gave[0]
        cosine = F.cosine_similarity(before.float(), after.float(), dim=2)          # (B, T)
        cosines[layer] += cosine.sum().item() / idx.numel()

    with ExitStack() as hooks:
        for block in model.blocks:
            hooks.enter_context(block.attn.register_forward_hook(attended))
        for chunk in idx.split(PREFILL_CHUNK, dim=1) if T else ():
            for block, x, _, _ in walk(model, chunk, cache, watch if weights else None):
                layer, before = block.attn.layer, x             # it runs next, and the two look
    return cache, cosines, received

def pick(t, best, room):
    """The tokens best (B, n) of t (B, G, T, d) → (B, G, room, d), where those after n are 0."""
    index = best[:, None, :, None].expand(-1, t.size(1), -1, t.size(3))
    return F.pad(t.gather(2, index), (0, 0, 0, room - best.size(1)))

@torch.no_grad()
def squeeze(cache, cosines, received, budget, policy="heavy", cut=0.5):
    """What read() gave → a SqueezedCache of the bytes of `budget` tokens in every layer. Positions
    and received weights take 12 bytes more per token of a unit. The given cache stays as it is.

    policy: one of POLICIES; else ValueError. cut: the fraction of the budget that the layers which
    matter least keep; None or 1: equal budgets.
    """
    if policy not in POLICIES:
        raise ValueError(f"--squeeze_policy={policy}: must be one of {', '.join(POLICIES)}")
    small = SqueezedCache(len(cache.k), policy, cache.length)
    sizes = [k[0, :, 0].numel() + v[0, :, 0].numel() for k, v in zip(cache.k, cache.v)]
    rooms = budgets(list(received), cosines, sizes, budget, cut)
    for (unit, got), room in zip(received.items(), rooms):
        (B, T), n = got.shape, min(room, got.size(1))
        where = torch.arange(T, device=got.device).expand(B, T)
        best = priority(policy, where, got, T, room).topk(n).indices.sort().values      # (B, n)
        free = 0, room - n
        kept = Kept(F.pad(best, free), F.pad(got.gather(1, best), free), n)
        small.units.append(kept)
        for layer in unit:
            small.kept[layer], small.rooms[layer] = kept, room
            small.k[layer] = pick(cache.k[layer], best, room)
            small.v[layer] = pick(cache.v[layer], best, room)
    return small

@torch.inference_mode()
def loss_after(model, windows, prompt, cache=None):
    """windows (N, T + 1) → mean cross-entropy in nats of the tokens after the first prompt + 1.

    Each sees all before it; with a cache that has read the first `prompt`, what that holds.
    """
    if cache is None:
        rows = ((model.hidden(window[None, :-1])[0, prompt:], window[prompt + 1:])
                for window in windows)
    else:
        steps = range(prompt, windows.size(1) - 1)
        rows = ((model.hidden(windows[:, t:t + 1], cache)[:, 0], windows[:, t + 1]) for t in steps)
    losses = [F.cross_entropy(model.head(x).float(), target).item() for x, target in rows]
    return sum(losses) / len(losses)

class Squeezing(NamedTuple):
    """One way to squeeze, as of squeeze()."""
    budget: int
    policy: str = "heavy"
    cut: float = 0.5

    def __str__(self):
        cut = f"{self.cut:g}" if self.cut < 1 else "equal"
        return f"squeeze {self.budget} {self.policy} {cut}"

    def cache_of(self, model, idx):
        """→ a SqueezedCache that has read a prompt idx (B, T)."""
        return squeeze(*read(model, idx, self.policy == "heavy"), *self)

    def cache_for_bill(self, model, data, context):
        """→ a cache that has read context - 1 tokens of a minisa.kit.data.Data, for bill.row()."""
        context = min(context, model.config.block_size)
        window = data.windows("val", 1, context).to(model.embed.weight.device)
        return self.cache_of(model, window[:, :context - 1])

def bits_per_byte(model, data, context, eval_tokens, ways):
    """Yield the loss with each of some Squeezings, or with the full cache for None: on the last
    quarters of validation windows of `context` tokens, about eval_tokens in all. The rest of each
    window is a prompt, which is read once for all and squeezed.

    Raises ValueError if the text is shorter than a window.
    """
    context = min(context, model.config.block_size)
    said = max(1, context // 4)
    windows, prompt = data.windows("val", max(1, eval_tokens // said), context), context - said
    targets = windows[:, prompt + 1:].flatten().tolist()
    per_byte = len(targets) / len(data.tokenizer.decode_bytes(targets))
    windows = windows.to(model.embed.weight.device)
    reading = read(model, windows[:, :prompt])
    for way in ways:
        cache = squeeze(*reading, *way) if way else None
        yield loss_after(model, windows, prompt, cache) / math.log(2) * per_byte

def policies(text):
    """A type for a flag: policies with commas between them."""
    names = text.split(",")
    if not set(names) <= set(POLICIES):
        raise argparse.ArgumentTypeError(f"{text} must be window, sinks or heavy, with commas "
                                         "between several")
    return names

def cuts(text):
    """A type for a flag: numbers above 0 and at most 1, with commas between them."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = [0.0]
    if not all(0 < value <= 1 for value in values):
        raise argparse.ArgumentTypeError(f"{text} must be above 0 and at most 1, with commas "
                                         "between several")
    return values

def add_flags(parser):
    """Give a minisa.kit.cli.Parser the flags that settings() reads."""
    parser.flag("squeeze", at_least(int, 8), None, "tokens that a layer's cache keeps on average, "
                "at most --context; the loss is then that of the last quarter of --context, after "
                "the rest", "all")
    parser.flag("squeeze_policy", policies, "heavy", "with --squeeze: which tokens stay, window "
                "(the last), sinks (the first 4 and the last) or heavy (the last, and those with "
                "most attention weight); or several, as sinks,heavy, a row each", "heavy")
    parser.flag("squeeze_cut", cuts, "0.5", "with --squeeze: the fraction of it that the layers "
                "which matter least keep, 1 for equal budgets; or several, as 1,0.5, a row each",
                "0.5")

def settings(args, model):
    """The flags → a Squeezing for each policy and cut. Raises ValueError if the budget is more than
    the context."""
    context = min(args.context, model.config.block_size)
    if args.squeeze > context:
        raise ValueError(f"--squeeze={args.squeeze}: must be from 8 to the context of {context} "
                         "tokens")
    ways = itertools.product(args.squeeze_policy, args.squeeze_cut)
    return [Squeezing(args.squeeze, *way) for way in ways]
