"""SqueezeAttention (Wang & Gan 2024, arXiv:2404.04793): the cache keeps fewer tokens, and not as
many in every layer.

A policy says which tokens a layer keeps within its budget, and which one goes for a new token when
the budget is used up:

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
from dataclasses import dataclass, field

import torch
from torch.nn import functional as F

from minisa.axes.common import walk
from minisa.cli import at_least
from minisa.model import PREFILL_CHUNK, KVCache

POLICIES = ("window", "sinks", "heavy")
SINKS = 4

# ---- how much, and which ----

def units(config):
    """The layers that keep the same tokens: [(0,), (1, 2, 3), (4,)] with share="1-3"."""
    spans = [tuple(range(a, b + 1)) for a, b in config.spans]
    alone = set(range(config.n_layer)) - {layer for span in spans for layer in span}
    return sorted(spans + [(layer,) for layer in alone])

def third_group(values):
    """The least value of the highest of three groups of numbers on a line: the three with the least
    squares of distances from their means, of all ways to cut the line."""
    ordered, n = values.sort().values, len(values)

    def squares(group):
        return (group - group.mean()).square().sum().item()

    ways = []
    for i, j in itertools.combinations(range(1, n), 2):
        total = squares(ordered[:i]) + squares(ordered[i:j]) + squares(ordered[j:])
        ways.append((total, ordered[j].item()))
    return min(ways)[1]

def budgets(groups, cosines, sizes, budget, cut):
    """→ how many tokens each unit keeps, when all take the bytes of `budget` tokens in every layer.

    groups: the units(). cosines, sizes: (L,), of each layer its cosine_l, and how many numbers it
    caches of a token. cut: None or 1 gives all the same, and so do cosines that are all the same.
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

    @property
    def room(self):
        return self.where.size(1)

    def admit(self, positions, policy, length):
        """A place for the token at positions (1,), in each sequence: a free one, or that of a token
        which then goes."""
        B, device = len(self.where), self.where.device
        if self.count < self.room:
            places = torch.full((B,), self.count, device=device)
            self.count += 1
        else:
            places = priority(policy, self.where, self.received, length, self.room).argmin(1)
        self.newest = torch.arange(B, device=device), places
        self.where[self.newest] = positions
        self.received[self.newest] = 0.0

class SqueezedCache(KVCache):
    """A KVCache in which each layer has its own budget of tokens. Made by squeeze().

    It takes one token at a time, as another may have to go for each.
    """
    size = 1

    def __init__(self, n_layer, policy, length):
        self.policy, self.length = policy, length
        self.units = []                                         # a Kept for each unit
        self.kept = [None] * n_layer                            # for each layer, that of its unit
        self.k, self.v = [None] * n_layer, [None] * n_layer     # (B, G, room, d) each

    @property
    def rooms(self):
        """How many tokens each layer has room for, as cost.predict(kept=...) takes it."""
        return [kept.room for kept in self.kept]

    def open(self, positions):
        """Make room for a token at positions (1,). → the positions (S,) then visible to the unit
        that holds most tokens, in the first sequence."""
        for kept in self.units:
            kept.admit(positions, self.policy, self.length)
        self.length += 1
        self.watched = 0                                        # layers whose P came since
        most = max(self.units, key=lambda kept: kept.count)
        return most.where[0, :most.count]

    def write(self, name, layer, new):
        """A layer's new k or v (B, G, 1, d) → all that it keeps (B, G, S, d)."""
        stored, kept = getattr(self, name)[layer], self.kept[layer]
        sequences, places = kept.newest
        stored[sequences, :, places] = new[:, :, 0]
        return stored[:, :, :kept.count]

    def key_positions(self, layer):
        """The positions (B, 1, S) of the keys that write() gives for a layer."""
        kept = self.kept[layer]
        return kept.where[:, None, :kept.count]

    @property
    def watch(self):
        """The policy "heavy" must see every P. For the others none need be formed."""
        return self.add_up if self.policy == "heavy" else None

    def add_up(self, P):
        """P (B, H, 1, S), of one layer after the other: what each token received of it."""
        kept = self.kept[self.watched]
        kept.received[:, :kept.count] += P.detach().sum((1, 2))
        self.watched += 1

# ---- to read a prompt, and to squeeze its cache ----

class Probe:
    """What read() notes, layer by layer, of a prompt idx (B, T)."""

    def __init__(self, config, idx):
        self.tokens = idx.numel()
        self.cosines = [0.0] * config.n_layer
        self.received = {unit: torch.zeros(idx.shape, device=idx.device) for unit in units(config)}
        self.of_layer = {layer: got for unit, got in self.received.items() for layer in unit}

    def before(self, block, x):
        """x (B, T, C) is the stream before a block, which is run next."""
        self.layer, self.x = block.attn.layer, x

    def watch(self, P):
        self.of_layer[self.layer][:, :P.size(3)] += P.sum((1, 2))       # (B, H, T, S) → (B, S)

    def attended(self, norm2, given):
        """A hook on the norm after attention, which is given the stream x + attention(x)."""
        cosine = F.cosine_similarity(self.x.float(), given[0].float(), dim=2)       # (B, T)
        self.cosines[self.layer] += cosine.sum().item() / self.tokens

@torch.no_grad()
def read(model, idx, weights=True):
    """Read a prompt idx (B, T) into a KVCache, and look. → the cache; cosine_l of each layer (L,);
    and {unit: the attention weight (B, T) that each token received}, zeros unless `weights`."""
    (B, T), like = idx.shape, model.embed.weight
    cache, probe = KVCache(model, B, max(T, 1), like.dtype, like.device), Probe(model.config, idx)
    hooks = [block.norm2.register_forward_pre_hook(probe.attended) for block in model.blocks]
    try:
        for chunk in idx.split(PREFILL_CHUNK, dim=1) if T else ():
            for block, x, _, _ in walk(model, chunk, cache, probe.watch if weights else None):
                probe.before(block, x)
    finally:
        for hook in hooks:
            hook.remove()
    return cache, probe.cosines, probe.received

def pick(t, best, room):
    """The tokens best (B, n) of t (B, G, T, d) → (B, G, room, d), where those after n are 0."""
    out = t.new_zeros(*t.shape[:2], room, t.size(3))
    index = best[:, None, :, None].expand(*t.shape[:2], best.size(1), t.size(3))
    out[:, :, :best.size(1)] = t.gather(2, index)
    return out

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
        B, T = got.shape
        where = torch.arange(T, device=got.device).expand(B, T)
        n = min(room, T)
        best = priority(policy, where, got, T, room).topk(n).indices.sort().values      # (B, n)
        where, got = (pick(t[:, None, :, None], best, room)[:, 0, :, 0] for t in (where, got))
        small.units.append(Kept(where, got, n))
        for layer in unit:
            small.kept[layer] = small.units[-1]
            small.k[layer] = pick(cache.k[layer], best, room)
            small.v[layer] = pick(cache.v[layer], best, room)
    return small

# ---- what it costs in loss ----

@torch.inference_mode()
def loss_after(model, windows, prompt, reading=None, **squeezing):
    """windows (N, T + 1) → mean cross-entropy in nats of the tokens after the first prompt + 1.

    reading: what read() gave for the first `prompt` tokens. Each later token then sees what a cache
    that squeeze(*reading, **squeezing) made holds; without, it sees all before it.
    """
    targets = windows[:, prompt + 1:]
    if reading is None:
        rows = ((model.hidden(window[None, :-1])[0, prompt:], target)
                for window, target in zip(windows, targets))
    else:
        cache = squeeze(*reading, **squeezing)
        steps = range(prompt, windows.size(1) - 1)
        rows = ((model.hidden(windows[:, t:t + 1], cache)[:, 0], windows[:, t + 1]) for t in steps)
    losses = [F.cross_entropy(model.head(x).float(), target).item() for x, target in rows]
    return sum(losses) / len(losses)

@dataclass
class Squeezing:
    """One way to squeeze: a budget in tokens, a policy, a cut."""
    budget: int
    policy: str = "heavy"
    cut: float = 0.5
    readings: dict = field(default_factory=dict, repr=False)    # of prompts that were read already

    def __str__(self):
        cut = f"{self.cut:g}" if self.cut < 1 else "equal"
        return f"squeeze {self.budget} {self.policy} {cut}"

    @property
    def arguments(self):
        return {"budget": self.budget, "policy": self.policy, "cut": self.cut}

    def cache_of(self, model):
        """→ a function from a prompt (B, T) to a SqueezedCache that has read it."""
        def read_and_squeeze(idx):
            return squeeze(*read(model, idx, self.policy == "heavy"), **self.arguments)
        return read_and_squeeze

    def cache_for_bill(self, model, data, context):
        """→ a cache that has read context - 1 tokens of a minisa.data.Data, for bill.row()."""
        context = min(context, model.config.block_size)
        window = data.windows("val", 1, context).to(model.embed.weight.device)
        return self.cache_of(model)(window[:, :context - 1])

def bits_per_byte(model, data, context, eval_tokens, squeezing=None):
    """The loss on the last quarters of validation windows of `context` tokens, about eval_tokens in
    all, when the rest of each window is a prompt that is squeezed; or is not, with None.

    Raises ValueError if the text is shorter than a window.
    """
    context = min(context, model.config.block_size)
    said = max(1, context // 4)
    windows = data.windows("val", max(1, eval_tokens // said), context)
    windows, prompt = windows.to(model.embed.weight.device), context - said
    if squeezing is None:
        nats = loss_after(model, windows, prompt)
    else:
        key = data.name, windows.shape
        if key not in squeezing.readings:
            squeezing.readings[key] = read(model, windows[:, :prompt])
        nats = loss_after(model, windows, prompt, squeezing.readings[key], **squeezing.arguments)
    targets = windows[:, prompt + 1:].flatten().tolist()
    return nats / math.log(2) * len(targets) / len(data.tokenizer.decode_bytes(targets))

# ---- flags ----

def policies(text):
    """A type for a flag: policies with commas between them."""
    names = text.split(",")
    if not set(names) <= set(POLICIES):
        raise argparse.ArgumentTypeError(f"{text} must be window, sinks or heavy, or several of "
                                         "them with commas")
    return names

def cuts(text):
    """A type for a flag: numbers above 0 and at most 1, with commas between them."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = [0.0]
    if not all(0 < value <= 1 for value in values):
        raise argparse.ArgumentTypeError(f"{text} must be above 0 and at most 1, or several such "
                                         "numbers with commas")
    return values

def add_flags(parser):
    """Give a minisa.cli.Parser the flags that settings() reads."""
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
    """The flags → a Squeezing for each policy and cut, to be used with this model only.

    Raises ValueError if the budget is more than the context.
    """
    context, readings = min(args.context, model.config.block_size), {}
    if args.squeeze > context:
        raise ValueError(f"--squeeze={args.squeeze}: must be from 8 to the context of {context} "
                         "tokens")
    ways = itertools.product(args.squeeze_policy, args.squeeze_cut)
    return [Squeezing(args.squeeze, policy, cut, readings) for policy, cut in ways]
