"""SqueezeAttention (Wang & Gan 2024, arXiv:2404.04793): the cache keeps fewer tokens, and layers
that matter less keep fewer than others.

A policy says which tokens a layer keeps within its budget; see the classes below. The layers have
different budgets. A layer matters little if its attention hardly turns the stream:

    cosine_l = mean over the prompt's tokens of cos(x, x + attention_l(x))    1 = it changes nothing

The layers are clustered into three groups. Those with the highest cosines get `cut` times the
budget. All others share what that frees, so the bytes stay the same, rounded down to whole tokens:
Σ_l bytes_l · budget_l = budget · Σ_l bytes_l. The paper clusters the cosines; here it is
-log(1 - cosine_l). A few layers of a small model (its first two, and one that writes the first
token's large numbers) are such outliers that the cosines alone would give them everything.

The layers of a span attend alike, so they keep the same tokens. They are one unit, with the mean of
their cosines, the sum of what their attention weights give each token, and one budget. A layer in
no span is a unit too. Unlike in H2O and SnapKV, all heads of a layer keep the same tokens. Unlike
in StreamingLLM, keys keep their original positions. The prompt is read whole, then squeezed, so
memory use peaks just before.
"""

import itertools
import math
import statistics
from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F

from minisa import cost
from minisa.axes.bits import Int8
from minisa.kit.cli import at_least, one_of, several
from minisa.model import PREFILL_CHUNK, KVCache, Step, rope_angles

# ---- policies: which tokens stay ----

class Policy:
    """A rule that says which tokens stay. Each subclass is one: its name in lower case is its value
    of --squeeze_policy, its docstring the help. It sees one unit of layers at a time."""
    watches_prompt = False          # must receive() see the attention weights of the prompt?
    watches_new = False             # and those of every new token?

    def receive(self, received, P, after):
        """How much attention each token has received so far (B, S), 0 at first → the same after T
        more queries, whose attention weights are P (B, H, T, S). after (T,): how many tokens of the
        prompt follow each query; below 0 for a new token. Called once per layer of the unit and
        chunk of the prompt; S is what was read so far."""
        return received + P.sum((1, 2), dtype=torch.float32)

    def finish(self, received, values):
        """received: {unit: what each token received from the whole prompt (B, T)}; values: those
        (B, G, T, d) of each layer that has some → the same dict, of what score() should see."""
        return received

    def score(self, tokens):
        """A Kept → a number for each of its tokens (B, S): the one with the lowest goes first."""

class Window(Policy):
    """the last"""

    def score(self, tokens):
        return tokens.where

class Sinks(Policy):
    """the first 4 and the last"""          # StreamingLLM, arXiv:2309.17453: whatever the first
    SINKS = 4                               # tokens are, much weight falls on them

    def score(self, tokens):
        most = torch.iinfo(tokens.where.dtype).max
        return tokens.where.masked_fill(tokens.where < self.SINKS, most)

class Heavy(Policy):
    """half of them the last, half those with most attention weight so far"""
    watches_prompt = watches_new = True     # H2O, arXiv:2306.14048: summed over queries and heads

    def score(self, tokens):
        newest = tokens.where >= tokens.length - tokens.room // 2
        return tokens.received.masked_fill(newest, torch.inf)

class Snap(Policy):
    """all new tokens, the last 32 of the prompt, and those that these 32 attend to most"""
    watches_prompt = True                   # SnapKV, arXiv:2404.14469
    OBSERVERS = 32                          # a prompt often ends with the question
    POOLED = 7                              # a token stays with its neighbors, not in scraps

    def receive(self, received, P, after):
        by_observers = P[:, :, after < self.OBSERVERS]
        return super().receive(received, by_observers, after)

    def finish(self, received, values):
        pooled = {}
        for unit, before in received.items():
            before[:, -self.OBSERVERS:] = 0.0       # they stay anyway
            pooled[unit] = F.max_pool1d(before, self.POOLED, stride=1, padding=self.POOLED // 2)
        return pooled

    def score(self, tokens):
        last = tokens.where >= tokens.prompt - self.OBSERVERS
        above_all = 1e6 + tokens.where              # of the last ones, the oldest goes first
        return torch.where(last, above_all, tokens.received)

class Distinct(Snap):
    """all new tokens, the last 8 of the prompt, and passages that are least like the rest of it"""
    watches_prompt = False                  # after KeyDiff, arXiv:2504.15364, which compares keys,
    OBSERVERS = 8                           # in each layer. Here, all layers keep the same tokens

    def finish(self, received, values):
        unlike = 0.0
        for v in values:
            direction = F.normalize(v.float(), dim=3)               # (B, G, T, d)
            mean = direction.mean(2, keepdim=True)
            unlike -= F.cosine_similarity(direction, mean, dim=3).mean(1)
        smooth = F.avg_pool1d(unlike, self.POOLED, 1, self.POOLED // 2, count_include_pad=False)
        return dict.fromkeys(received, smooth)

def subclasses(kind):
    """→ the classes below a class, those of its subclasses too."""
    return [each for sub in kind.__subclasses__() for each in (sub, *subclasses(sub))]

POLICIES = {kind.__name__.lower(): kind() for kind in subclasses(Policy)}

# ---- budgets: how many stay in each layer ----

def units(config):
    """The layers that keep the same tokens: [(0,), (1, 2, 3), (4,)] with share="1-3"."""
    groups = {layer: (layer,) for layer in range(config.n_layer)}
    for a, b in config.spans:
        for layer in range(a + 1, b + 1):
            groups[a] += groups.pop(layer)
    return list(groups.values())

def third_group(values):
    """The least value of the highest of three groups of numbers on a line: of all ways to cut the
    line, the one with the least sum of squared distances from the groups' means."""
    ordered = values.sort().values

    def squares(cuts):
        groups = ordered.tensor_split(cuts)
        return sum((group - group.mean()).square().sum() for group in groups)

    pairs = itertools.combinations(range(1, len(values)), 2)
    _, second = min(pairs, key=squares)
    return ordered[second]

def budgets(groups, cosines, sizes, budget, cut):
    """→ how many tokens each unit keeps, when all take the bytes of `budget` tokens in every layer.

    groups: the units(). cosines, sizes: of each layer its cosine_l, and how many numbers it caches
    of a token. cut: 1 gives all the same, and so do cosines that are all the same.
    """
    means = [statistics.fmean(cosines[layer] for layer in unit) for unit in groups]
    size = torch.tensor([sum(sizes[layer] for layer in unit) for unit in groups])
    turns = 1 - torch.tensor(means, dtype=torch.float64)
    calm = -turns.clamp(min=1e-9).log()
    alike = len(groups) < 3 or calm.min() == calm.max()
    if cut == 1 or alike:
        return [budget] * len(groups)
    small = calm >= third_group(calm)
    low = max(1, int(cut * budget))
    freed = size[small].sum() * (budget - low)
    high = budget + freed // size[~small].sum()
    return torch.where(small, low, high).tolist()

# ---- the cache: a storage times a policy ----

class Floats:
    """How the keys or the values of a layer are stored: as they are. Another storage is a class
    with the same methods; it combines with every policy. See Int8 in bits.py.

    tokens (B, G, n, d): those of the prompt. room: for how many there is a place.
    """
    bits = ""                       # of a number, if that is not the model's dtype
    bytes_per_token = None          # or a function: n numbers of a token in some heads → their
                                    # bytes, all of which are converted, once, in every step

    def __init__(self, tokens, room):
        free = room - tokens.size(2)
        self.numbers = F.pad(tokens, (0, 0, 0, free))           # (B, G, room, d)
        self.tensors = [self.numbers]                   # all that it holds: (B, G, room, any)

    def put(self, sequences, places, new):
        """Store new (B, T, G, d) at places (B, T) of sequences (B, 1)."""
        self.numbers[sequences, :, places] = new

    def first(self, count):
        """→ the numbers (B, G, count, d) in the first places."""
        return self.numbers[:, :, :count]

class Kept:
    """The tokens that the layers of a unit keep, in places of which the first `count` are taken.
    This is what a Policy sees:

        where (B, S)        the position of each token
        received (B, S)     what the policy's receive() made of the weights that it received
        prompt, length      how many tokens the prompt has, and how many were read in all
        room                how many tokens may stay
    """

    def __init__(self, policy, received, room, free=0):
        (B, T), device = received.shape, received.device
        self.policy, self.room = policy, room
        self.prompt = self.length = T
        self.where = torch.arange(T, device=device).expand(B, T)
        self.received = received
        self.count = min(room - free, T)
        rising = policy.score(self).argsort(stable=True)        # of two alike, the older goes first
        best = rising[:, T - self.count:].sort().values         # (B, count)
        places = 0, room - self.count
        self.where = F.pad(best, places)
        self.received = F.pad(self.received.gather(1, best), places)
        self.sequences = torch.arange(B, device=device)[:, None]

    def admit(self, positions):
        """Give the tokens at positions (T,) free places; or one alone that of a token which then
        goes."""
        T = len(positions)
        if self.count + T <= self.room:
            free = torch.arange(self.count, self.count + T, device=positions.device)
            self.places = free.expand(len(self.sequences), T)               # (B, T)
            self.count += T
        else:
            self.places = self.policy.score(self).argmin(1, keepdim=True)
        self.where.scatter_(1, self.places, positions.expand_as(self.places))
        self.received.scatter_(1, self.places, 0.0)
        self.after = self.prompt - 1 - positions
        self.length += T

    def receive(self, P):
        """P (B, H, 1, S): what the token just admitted attends with in one of the layers."""
        so_far = self.received[:, :self.count]
        received = self.policy.receive(so_far, P.detach(), self.after)
        so_far.copy_(received)

class SqueezedCache:
    """What a GPT takes in place of a KVCache, which says what the methods do. Here each unit has a
    budget of tokens of its own. Made by Squeezing."""
    size = 1                        # tokens at once, as another may have to go for each

    def __init__(self, length, storage):
        self.length, self.storage = length, storage
        self.units = []                             # a Kept for each unit
        self.kept, self.k, self.v = [], [], []      # for each layer its unit's Kept, its storages

    @property
    def watch(self):
        policy = self.units[0].policy
        return self.receive if policy.watches_new else None

    @property
    def tensors(self):
        return [t for storage in self.k + self.v for t in storage.tensors]

    @property
    def nbytes(self):
        return sum(t.nbytes for t in self.tensors)

    @property
    def rooms(self):
        """How many tokens each layer has room for."""
        return [kept.room for kept in self.kept]

    def predict(self, model, context):
        """→ the Cost of a token of a model after `context` - 1 others, as cost.predict()."""
        itemsize = model.embed.weight.element_size()
        bill = cost.predict(model, context, bytes_per_number=itemsize, kept=self.rooms)
        return self.converted(bill, model, context) if self.storage.bytes_per_token else bill

    def converted(self, bill, model, context):
        """→ the Cost for a storage that converts its numbers, given the Cost for floats."""
        stored = []                                             # bytes per token of each layer
        for block in model.blocks:
            attn = block.attn
            _, k, v = (self.storage.bytes_per_token(n, attn.G) for n in attn.widths)
            stored.append(k + v)
        seen = [min(room, context) for room in self.rooms]
        floats = model.embed.weight.element_size() * cost.numbers_read(model.blocks, seen)
        held, read = (sum(n * size for n, size in zip(tokens, stored))
                      for tokens in (self.rooms, seen))
        return replace(bill, cache_bytes_per_token=sum(stored), cache_bytes=held,
                       read_bytes=bill.read_bytes - floats + read)

    def advance(self, positions):
        for kept in self.units:
            kept.admit(positions)
        self.length += len(positions)
        self.receiving = iter(self.kept)                        # the layers whose P is yet to come

    def remember(self, name, layer, new):
        """A layer's new k or v (B, G, T, d) → all that it keeps (B, G, S, d)."""
        storage, kept = getattr(self, name)[layer], self.kept[layer]
        storage.put(kept.sequences, kept.places, new.transpose(1, 2))
        return storage.first(kept.count)

    def key_positions(self, layer):
        """The positions (B, 1, S) of the keys that remember() gives for a layer."""
        kept = self.kept[layer]
        return kept.where[:, None, :kept.count]

    def receive(self, P):
        """P (B, H, 1, S), of one layer after the other."""
        next(self.receiving).receive(P)

@torch.no_grad()
def read_at_once(model, cache, idx):
    """Read idx (B, T) into a SqueezedCache whose layers all have T free places, so that no token
    has to go → the last hidden states (B, T, C)."""
    T, dtype = idx.size(1), model.embed.weight.dtype
    positions = torch.arange(cache.length, cache.length + T, device=idx.device)
    cache.advance(positions)
    rope = rope_angles(model.config, positions)
    later = torch.full((T, T), -torch.inf, dtype=dtype, device=idx.device).triu(1)
    x, handed_up = model.embed(idx), None
    for block, kept in zip(model.blocks, cache.kept):
        mask = F.pad(later, (kept.count - T, 0))                # (T, S): all before is visible
        step = Step(rope, mask, causal=False, cache=cache)
        x, handed_up = block(x, step, handed_up)
    return model.norm(x)

# ---- to read a prompt ----

@dataclass
class Reading:
    """What was seen of a prompt (B, T) while a model read it."""
    length: int                     # T: later tokens are not looked at
    cache: KVCache                  # which reads it
    cosines: list                   # cosine_l of each layer
    received: dict                  # Policy → unit → what each token received (B, T)

    def turned(self, layer, x, y):
        """A layer adds y to the stream x (B, T, C)."""
        cosine = F.cosine_similarity(x.float(), (x + y).float(), dim=2)
        self.cosines[layer] += cosine.sum().item() / (len(x) * self.length)

    def receive(self, unit, positions, P):
        """P (B, H, T, S): what the tokens at positions (T,) attend with in a layer of a unit."""
        after = self.length - 1 - positions
        for policy, received in self.received.items():
            if policy.watches_prompt:
                so_far = received[unit][:, :P.size(3)]
                so_far.copy_(policy.receive(so_far, P, after))

    def finish(self):
        """All T tokens were read."""
        values = [v[:, :, :self.length] for v in self.cache.v if v.size(3)]
        self.received = {policy: policy.finish(received, values)
                         for policy, received in self.received.items()}

    def again(self):
        """→ a copy that may see other tokens next, in the same cache."""
        received = {policy: {unit: t.clone() for unit, t in of_units.items()}
                    for policy, of_units in self.received.items()}
        return replace(self, cosines=[*self.cosines], received=received)

def start_reading(model, cache, B, T, ways):
    """→ the Reading of a prompt (B, T), for several ways to keep it."""
    groups, device = units(model.config), model.embed.weight.device
    policies = {way.keeps for way in ways} - {None}
    received = {policy: {unit: torch.zeros(B, T, device=device) for unit in groups}
                for policy in policies}
    return Reading(T, cache, [0.0] * len(model.blocks), received)

@torch.no_grad()
def read_on(model, idx, readings):
    """Let a model read idx (B, n), the next tokens of prompts that may end at different places, in
    one cache for all."""
    cache = readings[0].cache
    unit_of = [unit for unit in units(model.config) for _ in unit]      # of each layer
    watching = any(policy.watches_prompt for reading in readings for policy in reading.received)
    seen = []                                                   # P of one layer at a time
    for start in range(0, idx.size(1), PREFILL_CHUNK):
        chunk = idx[:, start:start + PREFILL_CHUNK]
        positions = cache.length + torch.arange(chunk.size(1), device=idx.device)
        x, step = model.start(chunk, cache, seen.append if watching else None)
        handed_up = None
        for layer, block in enumerate(model.blocks):            # as Block.forward(), and look
            y, handed_up = block.attn(block.norm(x), step, handed_up)
            for reading in readings:
                reading.turned(layer, x, y)
                for P in seen:
                    reading.receive(unit_of[layer], positions, P)
            seen.clear()
            x = x + y
            x = x + block.mlp(block.norm(x))
    for reading in readings:
        if cache.length == reading.length > 0:                  # of no tokens, nothing was seen
            reading.finish()

def read(model, idx, ways):
    """Read a prompt idx (B, T) once for several ways to keep it. → a Reading"""
    B, T = idx.shape
    cache = KVCache(model, B, max(T, 1))
    reading = start_reading(model, cache, B, T, ways)
    read_on(model, idx, [reading])
    return reading

# ---- ways to keep a cache: what programs ask of each ----

class Whole:
    """The usual way: the cache keeps all tokens."""
    keeps = None                    # the Policy that says which tokens, if not all
    facts = {"policy": "", "budget": "", "cut": "", "bits": ""}     # columns of a table of results

    def name(self, source):
        """The name of a model with such a cache. source: that of the model alone."""
        return source

    def of(self, reading, free=0):
        """→ the cache that keeps of a Reading what it should. free: how many of its places in each
        layer are for later tokens."""
        return reading.cache

    def begin(self, model, ids):
        """Read a prompt ids (B, T) → what GPT.stream() needs to continue it: the tokens that it
        should still read, at least one, and the cache; None for a new KVCache."""
        return ids, None

    def continuations(self, model, windows, reading):
        """windows (N, T + 1), of which a Reading has read the first tokens. Yield, part by part,
        the last hidden states (n, C) of those after it, given what is kept, and the next tokens
        (n,)."""
        prompt = reading.cache.length
        for window in windows:
            x = model.hidden(window[None, :-1])
            yield x[0, prompt:], window[prompt + 1:]

    def for_bill(self, model, data, context):
        """→ None, or a cache of another kind than KVCache, which has read context - 1 tokens of
        data(), a minisa.kit.data.Data."""

@dataclass(frozen=True)
class Squeezing(Whole):
    """The cache keeps the bytes of `budget` tokens in every layer, and for each token of a unit 12
    bytes more: its position and the weight that it received."""
    budget: int
    policy: str = "heavy"           # a key of POLICIES
    cut: float = 0.5                # of the budget, for the layers that matter least; 1: all equal
    storage: type = Floats

    @property
    def keeps(self):
        return POLICIES[self.policy]

    @property
    def facts(self):
        return {"policy": self.policy, "budget": self.budget, "cut": self.cut,
                "bits": self.storage.bits}

    def name(self, source):
        cut = "equal" if self.cut == 1 else f"{self.cut:g}"
        bits = f", {self.storage.bits} bits" if self.storage.bits else ""
        return f"{source}, squeeze {self.budget} {self.policy} {cut}{bits}"

    @torch.no_grad()
    def of(self, reading, free=0):
        whole, received = reading.cache, reading.received[self.keeps]
        small = SqueezedCache(reading.length, self.storage)
        pairs = zip(whole.k, whole.v)
        sizes = [k.size(3) + v.size(3) for k, v in pairs]
        rooms = budgets([*received], reading.cosines, sizes, self.budget, self.cut)
        for unit, room in zip(received, rooms):
            kept = Kept(self.keeps, received[unit], room, free)
            best = kept.where[:, None, :kept.count, None]       # (B, 1, n, 1)
            small.units.append(kept)
            for layer in unit:
                k = whole.k[layer].take_along_dim(best, 2)      # (B, G, n, d)
                v = whole.v[layer].take_along_dim(best, 2)
                small.kept.append(kept)
                small.k.append(self.storage(k, room))
                small.v.append(self.storage(v, room))
        return small

    def begin(self, model, ids):
        ids = ids[:, -model.config.block_size:]
        reading = read(model, ids[:, :-1], [self])
        return ids[:, -1:], self.of(reading)

    def continuations(self, model, windows, reading):
        cache = self.of(reading)
        tokens = windows[:, cache.length:].split(1, dim=1)      # (N, 1) each
        for token, following in itertools.pairwise(tokens):
            x = model.hidden(token, cache)
            yield x[:, 0], following[:, 0]

    def for_bill(self, model, data, context):
        window = data().windows("val", 1, context)
        ids = window[:, :context].to(model.embed.weight.device)
        way = replace(self, budget=min(self.budget, context))
        _, cache = way.begin(model, ids)
        return cache

class Stored(Squeezing):
    """The cache keeps all tokens, in another storage. Its budget should be the model's block_size,
    or as many tokens as there will be; its policy "window" and its cut 1, so that only tokens
    beyond the budget go."""

    @property
    def facts(self):
        return Whole.facts | {"bits": self.storage.bits}

    def name(self, source):
        return f"{source}, {self.storage.bits} bits"

@torch.inference_mode()
def loss(model, way, windows, reading):
    """→ the mean cross-entropy in nats of what a way's continuations() should predict."""
    losses = []
    for x, following in way.continuations(model, windows, reading):
        logits = model.head(x).float()
        losses.append(F.cross_entropy(logits, following).item())
    return statistics.fmean(losses)

def bits_per_byte(model, data, context, eval_tokens, ways):
    """Yield the loss with each of some ways to keep the cache: on the last quarters of validation
    windows of `context` tokens, about eval_tokens in all. The rest of each window is a prompt,
    which is read once for all.

    Raises ValueError if the text is shorter than a window.
    """
    context = min(context, model.config.block_size)
    said = max(1, context // 4)
    prompt = context - said
    windows = data.windows("val", max(1, eval_tokens // said), context)
    targets = windows[:, prompt + 1:].flatten().tolist()
    per_byte = len(targets) / len(data.tokenizer.decode_bytes(targets))
    windows = windows.to(model.embed.weight.device)
    reading = read(model, windows[:, :prompt], ways)
    for way in ways:
        yield loss(model, way, windows, reading) / math.log(2) * per_byte

# ---- flags ----

def add_flags(parser):
    """Give a minisa.kit.cli.Parser the flags that ways_of() reads."""
    stay = ", ".join(f"{name} ({policy.__doc__ or name})" for name, policy in POLICIES.items())
    parser.flag("squeeze", at_least(int, 8), None, "tokens that a layer's cache keeps on average, "
                "at most --context; the loss is then measured on the last quarter of the context",
                "all")
    policies, cuts = several(one_of(*POLICIES)), several(at_least(float, 0.01, 1))
    parser.flag("squeeze_policy", policies, "heavy", "with --squeeze: which tokens are kept: "
                f"{stay}; or several, as sinks,heavy, a row each", "heavy")
    parser.flag("squeeze_cut", cuts, "0.5", "with --squeeze: fraction of the budget given to the "
                "least important layers, 1 for equal budgets; or several, as 1,0.5, a row each",
                "0.5")
    parser.flag("cache_bits", int, None, "8: cached numbers are int8, with a scale per token and "
                "head (minisa/axes/bits.py); the loss is then measured as with --squeeze",
                "as the model computes", choices=[8])

def ways_of(args, model):
    """The flags → all ways to keep the cache: Whole, with --cache_bits a Stored, and with --squeeze
    a Squeezing for each policy and cut. Raises ValueError if the budget is more than the context.
    """
    ways, storage = [Whole()], Floats
    if args.cache_bits:
        storage = Int8
        ways.append(Stored(model.config.block_size, "window", 1, storage))
    if not args.squeeze:
        return ways
    context = min(args.context, model.config.block_size)
    if args.squeeze > context:
        raise ValueError(f"--squeeze={args.squeeze}: must be from 8 to the context of {context} "
                         "tokens")
    pairs = itertools.product(args.squeeze_policy, args.squeeze_cut)
    squeezings = [Squeezing(args.squeeze, policy, cut, storage) for policy, cut in pairs]
    return ways + squeezings
