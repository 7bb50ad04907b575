"""A small GPT (the Llama architecture) in which layers can share attention. The whole model.

Shared Attention (Liao & Vargas 2024, arXiv:2407.12866): the first layer of a span, its anchor,
forms attention weights P; the others apply them to their own values, and cache only values.
Cross-Layer Attention (CLA, arXiv:2405.12981), the rival: the others compute their own q and P, over
the k and v of the anchor. They cache nothing. Each of these is a kind of sharing. minisa/axes holds
axes, which change a trained model or its cache, or add a kind; the lines here for them say so.

Shapes: B batch, T new tokens, S visible tokens (cached and new), H query heads, G key/value heads,
D head dim, C = H·D width of the model, M width of the MLP, V vocabulary.
"""

import re
from dataclasses import dataclass
from importlib import import_module, util
from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F

from minisa import decode

PREFILL_CHUNK = 256     # tokens of a prompt read at once, so that P is (B, H, 256, S) at most

POSITIVE = ("block_size", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "n_hidden",
            "rope_base", "norm_eps")    # fields of a GPTConfig

@dataclass
class GPTConfig:
    block_size: int = 256           # maximum number of tokens visible to each, itself included
    vocab_size: int = 1024          # V
    n_layer: int = 4
    n_head: int = 4                 # H
    n_kv_head: int | None = None    # G: None = H; fewer is grouped-query attention
    n_embd: int = 128               # C
    n_hidden: int | None = None     # M: None = 8/3 C, rounded up to a multiple of 32
    dropout: float = 0.0
    rope_base: float = 10000.0
    norm_eps: float = 1e-5
    tied: bool = True               # the token embedding also serves as the output matrix
    share: str = ""                 # spans of layers, as "1-3,5-7"; the first of each is its anchor
    share_kind: str = "weights"     # what they share, see sharing_kind()

    def __post_init__(self):
        if self.n_kv_head is None:
            self.n_kv_head = self.n_head
        if self.n_hidden is None:
            self.n_hidden = (self.n_embd * 8 // 3 + 31) // 32 * 32
        pairs = re.findall(r"(\d+)-(\d+)", self.share)
        self.spans = [(int(a), int(b)) for a, b in pairs]       # "1-3,5-7" → [(1, 3), (5, 7)]
        check(self)
        self.head_dim = self.n_embd // self.n_head  # D

def check(config):
    """Raises a ValueError naming the flag if the fields of a config do not fit together."""
    def must(holds, name, rule):
        if not holds:
            raise ValueError(f"--{name}={getattr(config, name)}: {rule}")

    for name in POSITIVE:
        must(0 < getattr(config, name) < 2**29, name, "must be above 0, and below 2^29")
    must(config.n_layer <= 1000, "n_layer", "must be at most 1000")
    H = config.n_head
    must(config.n_embd % (2 * H) == 0, "n_embd", f"must be a multiple of 2 · {H} (n_head)")
    must(H % config.n_kv_head == 0, "n_kv_head", f"must divide {H} (n_head)")
    must(0 <= config.dropout < 1, "dropout", "must be at least 0 and below 1")
    sharing_kind(config.share_kind)             # imports its axis, or raises
    layers = [layer for span in config.spans for layer in span]
    written = ",".join(f"{a}-{b}" for a, b in config.spans)
    rising = layers == sorted(set(layers))
    must(written == config.share and rising, "share", "give spans in increasing order, as 1-3,5-7")
    last = config.n_layer - 1
    must(max(layers, default=0) <= last, "share", f"the layers of this model are 0 to {last}")

def rope_angles(config, positions):
    """positions (...) → RoPE's rotations (..., D/2): complex numbers of length 1, for rotate()."""
    dtype = torch.float32 if positions.device.type == "mps" else torch.float64  # MPS has no float64
    even = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=dtype)  # 0, 2, 4, …
    frequencies = config.rope_base**-(even / config.head_dim)       # (D/2,)
    angle = positions.to(dtype)[..., None] * frequencies
    return torch.complex(angle.cos().float(), angle.sin().float())

def rotate(x, rope):
    """RoPE (arXiv:2104.09864): turn each pair (x[2i], x[2i+1]) of x (B, heads, T, D) by its number
    in rope (T, D/2). q · k then depends on positions only through their distance."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))             # (B, heads, T, D/2)
    return torch.view_as_real(pairs * rope).flatten(-2).type_as(x)

def split_heads(x, n):
    return x.view(*x.shape[:2], n, -1).transpose(1, 2)          # (B, T, n·D) → (B, n, T, D)

def merge_heads(x):
    return x.transpose(1, 2).flatten(2)                         # (B, n, T, D) → (B, T, n·D)

@dataclass
class Step:
    """What every layer needs to know about the T tokens being processed, and how they attend."""
    rope: Tensor                    # (T, D/2), the rotations of their positions
    mask: Tensor | None             # (T, S): 0 where a token may look, else -inf; None: everywhere
    causal: bool                    # the mask is the standard causal mask, built into fused kernels
    cache: "KVCache | None" = None
    watch: object = None            # a function called with each P, layer after layer; also a
                                    # switch: with any function here, nothing is fused

    def remember(self, name, layer, new):
        """Cache new (B, G, T, D), a layer's k or v (see name) → all visible ones (B, G, S, D)."""
        return self.cache.remember(name, layer, new) if self.cache else new

    def attention_weights(self, q, k):
        """q (B, H, T, D), k (B, G, S, D) → P (B, H, T, S)."""
        B, H, T, D = q.shape
        # the rows of all heads that share a k, stacked: (B, G, H/G·T, D)
        q = (q * D**-0.5).reshape(B, k.size(1), -1, D)
        scores = (q @ k.transpose(2, 3)).view(B, H, T, -1)
        if self.mask is not None:
            scores = scores + self.mask.type_as(scores)
        return scores.softmax(-1).type_as(q)

    def weighted_sum(self, P, v):
        """P (B, H, T, S), v (B, G, S, D) → P v (B, H, T, D). P always has H heads and is grouped
        by the G heads of v here, so a reuse layer needs nothing special for GQA."""
        if self.watch:
            self.watch(P)
        B, H, T, S = P.shape
        P = P.view(B, v.size(1), -1, S)                         # (B, G, H/G·T, S)
        return (P @ v).view(B, H, T, -1)

    def fused(self, q, k, v):
        """weighted_sum(attention_weights(q, k), v), by a "fused" kernel, which computes both for
        a few rows of P at a time and never forms it whole. If watched, P is formed after all. That
        of a single token is formed, too: it is one row per head, for which these kernels are slow
        in bfloat16 and at long contexts."""
        if self.watch or q.size(2) == 1:
            return self.weighted_sum(self.attention_weights(q, k), v)
        mask = None if self.causal else self.mask
        gqa = k.size(1) < q.size(1)
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=self.causal, enable_gqa=gqa)

class Widths(NamedTuple):
    """How many numbers of q, of k and of v a layer computes for each token."""
    q: int
    k: int
    v: int

class Attention(nn.Module):
    """A full layer, not part of a span; also the base class of the others: all override heads(),
    and reuse layers also `makes` and in_numpy."""
    makes = "qkv"                   # what it computes itself: its widths, the shape of qkv, what
                                    # the cache stores and what the layer costs follow from this
    in_numpy = decode.full_attention    # its function in decode.py; reuse layers name another

    def __init__(self, config, layer):
        super().__init__()
        C, H, G, D = config.n_embd, config.n_head, config.n_kv_head, config.head_dim
        self.layer, self.H, self.G = layer, H, G
        q = H * D if "q" in self.makes else 0
        k = G * D if "k" in self.makes else 0
        v = G * D if "v" in self.makes else 0
        self.widths = Widths(q, k, v)
        self.qkv = nn.Linear(C, q + k + v, bias=False)          # rows of q, of k, of v
        self.out = nn.Linear(C, C, bias=False)

    def forward(self, h, step, below=None):
        """h (B, T, C), what the layer below hands up → (B, T, C) to add, what this one hands up."""
        y, handed_up = self.heads(h, step, below)
        return self.out(merge_heads(y)), handed_up

    def heads(self, h, step, below):
        """→ y (B, H, T, D), each head's weighted sum of values, and what this layer hands up."""
        q, k, v = self.project(h, step)
        return step.fused(q, k, v), None

    def project(self, h, step):
        """h (B, T, C) → q (B, H, T, D), and the visible k and v (B, G, S, D)."""
        H, G = self.H, self.G
        heads = split_heads(self.qkv(h), H + 2 * G)             # (B, H + 2·G, T, D)
        qk, v = heads.split_with_sizes((H + G, G), dim=1)
        qk = rotate(qk, step.rope)
        q, k = qk.split_with_sizes((H, G), dim=1)
        k = step.remember("k", self.layer, k)
        v = step.remember("v", self.layer, v)
        return q, k, v

    # what a layer of minisa/axes may override

    restores_keys = False           # True: it computes its keys from shorter ones in the cache

    def extra_cost(self, T, S):
        """→ its parameters besides qkv and out, and their FLOPs for T tokens that see S."""
        return 0, 0

    def tokens_read(self, T, S):
        """→ how many of the S visible tokens each of T new ones attends to."""
        return S

    def check(self):
        """Raises ValueError if numbers loaded from a file are invalid for this layer."""

class Anchor(Attention):
    """The first layer of a span of Shared Attention: it forms P, so it cannot be fused, and hands
    it up."""

    def heads(self, h, step, below):
        q, k, v = self.project(h, step)
        P = step.attention_weights(q, k)                        # (B, H, T, S)
        return step.weighted_sum(P, v), P

class SharedAttention(Attention):
    """A reuse layer, as in the paper: the anchor's P, applied to its own values. No q and no k, so
    nothing to rotate; and nothing to mask, as P is 0 wherever a token must not look."""
    makes = "v"
    in_numpy = decode.shared_attention

    def heads(self, h, step, below):
        P = below                                               # of the anchor: (B, H, T, S)
        v = split_heads(self.qkv(h), self.G)                    # qkv is v only here: (B, G, T, D)
        v = step.remember("v", self.layer, v)                   # (B, G, S, D)
        return step.weighted_sum(P, v), below

class KVAnchor(Attention):
    """The first layer of a span of Cross-Layer Attention: it hands up k and v."""

    def heads(self, h, step, below):
        q, k, v = self.project(h, step)
        return step.fused(q, k, v), (k, v)

class CrossLayerAttention(Attention):
    """A reuse layer of the rival: the anchor's k and v, with its own q."""
    makes = "q"
    in_numpy = decode.cross_layer_attention

    def heads(self, h, step, below):
        k, v = below                                            # of the anchor: (B, G, S, D)
        q = split_heads(self.qkv(h), self.H)                    # qkv is q only here: (B, H, T, D)
        q = rotate(q, step.rope)
        return step.fused(q, k, v), below

# a kind of sharing, named for what a span shares → the classes of its anchor and its reuse layers
# (.github/CONTRIBUTING.md says how to add a kind)
SHARE_KINDS = {
    "weights": (Anchor, SharedAttention),
    "kv": (KVAnchor, CrossLayerAttention),
}

def sharing_kind(name):
    """Checks the name of a kind of sharing, importing its axis if needed → the same name, which is
    then in SHARE_KINDS. minisa/axes/NAME.py is imported by its name, as the core must not depend on
    an axis. It adds NAME itself; for NAME-SETTING, its with_setting("SETTING") returns the two
    classes. Raises ValueError if there is no such kind."""
    axis, _, setting = name.partition("-")
    if name not in SHARE_KINDS:
        path = f"minisa.axes.{axis}"
        if axis.isidentifier() and util.find_spec(path):
            module = import_module(path)
            if name not in SHARE_KINDS and hasattr(module, "with_setting"):
                SHARE_KINDS[name] = module.with_setting(setting)
    if name not in SHARE_KINDS:
        raise ValueError(f"--share_kind={name}: must be {' or '.join(SHARE_KINDS)} in this version")
    return name

class KVCache:
    """The keys and values that each layer computed for the last `size` tokens of B sequences.

    It is a ring of `size` slots, or places: position p has slot p mod size, so a new token replaces
    the oldest. That is sliding-window attention: the logits are those of plain.gpt(window=size), up
    to rounding, however far generation goes. For the order of slots does not affect a sum, and in
    RoPE only distances count, so stored keys need not be rotated again. It is not what rereading
    the last `size` tokens gives: the keys and values kept by upper layers still carry what
    forgotten tokens put into them. A ring of four slots, by the positions that they hold:

        new tokens    slots before    slots after    visible to the new tokens
        0 1 2         - - - -         0 1 2 -        0 1 2
        3             0 1 2 -         0 1 2 3        0 1 2 3
        4             0 1 2 3         4 1 2 3        4 1 2 3         4 sees itself, not 0
        5 6           4 1 2 3         4 5 6 3        4 1 2 3 5 6     5 sees 2, whose slot 6 takes

    The mask hides later tokens and those at least `size` back: above, 5 does not see 6 or 1.
    """
    watch = None                    # set by caches that need P: see Step

    def __init__(self, model, batch_size, size):
        like = model.embed.weight                               # its dtype and device

        def slots(width):                                       # width 0 if the layer has none
            G = model.config.n_kv_head
            return like.new_empty(batch_size, G, size, width // G)

        widths = [block.attn.widths for block in model.blocks]
        self.k = [slots(made.k) for made in widths]             # (B, G, size, D) for each layer
        self.v = [slots(made.v) for made in widths]
        self.where = like.new_zeros(1, 1, size, 1, dtype=torch.long)    # slot → position
        self.size = size
        self.length = 0             # tokens seen so far

    @property
    def tensors(self):
        return self.k + self.v

    @property
    def nbytes(self):
        """Bytes of storage held for keys and values."""
        return sum(t.untyped_storage().nbytes() for t in self.tensors)

    def advance(self, positions):
        """Before T tokens at positions (T,) run through the layers: give them their slots. → the
        positions (S,) of all keys that remember() will then return."""
        self.slots = positions % self.size
        self.length += len(positions)
        # positions go through the same ring as keys, so that the two line up
        visible = self.replace(self.where, positions.view(1, 1, -1, 1))
        self.positions = visible.view(-1)
        return self.positions

    def key_positions(self, layer):
        """For axes: the positions (S,) of the keys that a layer sees. Here, all see the same."""
        return self.positions

    def remember(self, name, layer, new):
        """Store new (B, G, T, D), a layer's k or v (see name) → all visible ones (B, G, S, D)."""
        return self.replace(getattr(self, name)[layer], new)

    def replace(self, stored, new):
        """Write new (B, G, T, any), of the T new tokens, into its slots of stored (B, G, size, any)
        → all that is visible to any of them (B, G, S, any). self.length counts them already."""
        T = new.size(2)
        if T == 1 or self.length <= self.size:                  # nothing visible is overwritten
            stored.index_copy_(2, self.slots, new)
            return stored[:, :, :min(self.length, self.size)]
        # the last of them overwrite what the first ones still see (5 6 in the table): copy first
        before = self.length - T        # tokens before these; if above size, the slice takes all
        visible = torch.cat((stored[:, :, :before], new), dim=2)
        stored.index_copy_(2, self.slots, new)
        return visible

class MLP(nn.Module):
    """SwiGLU (arXiv:2002.05202)."""

    def __init__(self, config):
        super().__init__()
        C, M = config.n_embd, config.n_hidden
        self.gate = nn.Linear(C, M, bias=False)
        self.up = nn.Linear(C, M, bias=False)
        self.down = nn.Linear(M, C, bias=False)

    def forward(self, h):
        return self.down(F.silu(self.gate(h)) * self.up(h))     # (B, T, M) inside

class Block(nn.Module):
    def __init__(self, config, layer, attention_class):
        super().__init__()
        self.attn = attention_class(config, layer)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(config.dropout)
        # no gain: it can be folded into the next matrix, see plain.rms_norm()
        self.norm = nn.RMSNorm(config.n_embd, config.norm_eps, elementwise_affine=False)

    def forward(self, x, step, below=None):
        added, handed_up = self.attn(self.norm(x), step, below)
        x = x + self.drop(added)
        added = self.mlp(self.norm(x))
        return x + self.drop(added), handed_up

class GPT(nn.Module):
    watch = None                    # see Step; with its own, a GPT generates without decode.py

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        if not config.tied:
            self.unembed = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.drop = nn.Dropout(config.dropout)
        classes = [Attention] * config.n_layer
        anchor, reuse = SHARE_KINDS[config.share_kind]
        for a, b in config.spans:                               # "1-3": layers 1, 2 and 3
            classes[a:b + 1] = [anchor] + [reuse] * (b - a)
        self.blocks = nn.ModuleList(Block(config, i, which) for i, which in enumerate(classes))
        self.norm = nn.RMSNorm(config.n_embd, config.norm_eps)
        for name, p in self.named_parameters():                 # as in GPT-2
            std = 0.02
            if name.endswith(("out.weight", "down.weight")):    # what adds to x, 2 L times
                std /= (2 * config.n_layer)**0.5
            if p.dim() == 2:
                nn.init.normal_(p, std=std)

    def start(self, idx, cache=None, watch=None):
        """Token ids idx (B, T) → their embeddings (B, T, C), and the Step that all layers get.
        watch: see Step; else the cache's, else the model's own."""
        T = idx.size(1)
        length, size = (cache.length, cache.size) if cache else (0, self.config.block_size)
        if T > size:
            raise ValueError(f"{T} tokens at once are more than the {size} that fit: crop them")
        positions = torch.arange(length, length + T, device=idx.device)
        key_positions = cache.advance(positions) if cache else positions        # (S,)
        x = self.drop(self.embed(idx))
        mask, causal = None, False
        if T > 1:                                               # a single token sees everything
            distance = positions[:, None] - key_positions       # (T, S)
            visible = (distance >= 0) & (distance < size)
            mask = torch.where(visible, 0.0, -torch.inf).to(x.dtype)
            # if nothing was cached before; on MPS, the kernel needs the mask itself
            causal = len(key_positions) == T and not x.is_mps
        watch = watch or (cache and cache.watch) or self.watch
        return x, Step(rope_angles(self.config, positions), mask, causal, cache, watch)

    def hidden(self, idx, cache=None, watch=None):
        """idx (B, T) → the last hidden states (B, T, C), which head() turns into logits."""
        x, step = self.start(idx, cache, watch)
        handed_up = None                                        # by each kind: None, P or (k, v)
        for block in self.blocks:
            x, handed_up = block(x, step, handed_up)
        return self.norm(x)

    def head(self, x):
        weight = self.embed.weight if self.config.tied else self.unembed.weight
        return F.linear(x, weight)                              # (..., C) → (..., V)

    def forward(self, idx: Tensor, targets: Tensor | None = None, cache: KVCache | None = None):
        """idx (B, T) int64 → logits (B, T, V), and the loss in nats per token if targets (B, T) are
        given. With a cache, idx continues it. Raises ValueError if T exceeds block_size or, with a
        cache, cache.size."""
        logits = self.head(self.hidden(idx, cache))
        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        return logits, loss

    @torch.no_grad()
    def attention_weights(self, idx: Tensor) -> list[Tensor]:
        """idx (B, T) → what each layer attends with: a list of P (B, H, T, T)."""
        seen = []
        self.hidden(idx, watch=seen.append)
        return seen

    @torch.inference_mode()
    def read(self, idx, cache):
        """Read idx (B, T ≥ 1) into a cache → logits (B, V) of the token after it."""
        for chunk in idx.split(min(PREFILL_CHUNK, cache.size), dim=1):
            x = self.hidden(chunk, cache)
        return self.head(x[:, -1]).float()

    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, generator=None, cache=None):
        """Continue idx (B, T ≥ 1), forgetting the oldest tokens beyond the cache's size (default:
        block_size): yield each next token (B, 1), drawn from softmax(logits / temperature) among
        the top_k; temperature 0 picks the most likely. The prompt is read here; the rest is
        generated by decode.py where it can, with the weights as they are at the second token."""
        B, device = len(idx), idx.device
        if cache is None:
            cache = KVCache(self, B, self.config.block_size)
        randoms = uniform(B, generator, device)
        decoder = None
        for n in range(max_new_tokens):
            if n == 1 and decode.handles(self, cache):
                decoder = decode.Decoder(self, cache)
            if decoder:
                logits = decoder.step(idx.item())
                token = decode.draw(logits, temperature, top_k, next(randoms).item())
                idx = torch.tensor([[token]], device=device)
            else:
                idx = draw(self.read(idx, cache), temperature, top_k, next(randoms))
            yield idx

    def generate(self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0,
                 top_k: int | None = None, generator: torch.Generator | None = None,
                 cache: KVCache | None = None) -> Tensor:
        """idx (B, T) → idx and what stream() adds to it, (B, T + max_new_tokens)."""
        new = self.stream(idx, max_new_tokens, temperature, top_k, generator, cache)
        return torch.cat((idx, *new), dim=1)

def uniform(B, generator, device):
    """Yield random numbers (B, 1) for draw(), made 64 at a time to save calls."""
    while True:
        yield from torch.rand(64, B, 1, generator=generator, device=device)

def draw(logits, temperature, top_k, u):
    """logits (B, V) → tokens (B, 1). u (B, 1) is random, uniform in [0, 1): the token drawn is the
    first at which the sum of all probabilities up to it exceeds u."""
    if temperature < 1e-6:              # dividing by so small a number would overflow
        return logits.argmax(-1, keepdim=True)
    if top_k:
        least = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    sums = (logits / temperature).softmax(-1).cumsum(-1)        # (B, V)
    return (sums <= u * sums[:, -1:]).sum(-1, keepdim=True)
