"""A small GPT (the Llama architecture) in which layers can share attention. The whole model.

Shared Attention (Liao & Vargas 2024, arXiv:2407.12866): the first layer of a span, its anchor,
makes attention weights P; the others reuse them over values of their own, and cache values only.
Cross-Layer Attention (CLA, arXiv:2405.12981), the rival: the others make a q and a P of their own,
over the k and v of the anchor. They cache nothing.

Shapes: B batch, T new tokens, S visible tokens (cached and new), H query heads, G key/value heads,
D head dim, C = H·D width of the model, M width of the MLP, V vocabulary.
"""

import importlib.util
import re
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F

from minisa import decode

PREFILL_CHUNK = 256     # tokens of a prompt read at once, so that P is (B, H, 256, S) at most

SIZES = ("block_size", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "n_hidden",
         "rope_base", "norm_eps")       # of a GPTConfig

@dataclass
class GPTConfig:
    block_size: int = 256           # most tokens that a token can see, itself included
    vocab_size: int = 1024          # V
    n_layer: int = 4
    n_head: int = 4                 # H
    n_kv_head: int | None = None    # G: None = H; fewer is GQA (arXiv:2305.13245), 1 is MQA
    n_embd: int = 128               # C
    n_hidden: int | None = None     # M: None = 8/3 C, rounded up to a multiple of 32
    dropout: float = 0.0
    rope_base: float = 10000.0
    norm_eps: float = 1e-5
    tied: bool = True               # the output head is the token embedding
    share: str = ""                 # spans of layers, as "1-3,5-7"; the first of each is its anchor
    share_kind: str = "weights"     # what they share: a key of SHARE_KINDS

    def __post_init__(self):
        if self.n_kv_head is None:
            self.n_kv_head = self.n_head
        if self.n_hidden is None:
            self.n_hidden = (self.n_embd * 8 // 3 + 31) // 32 * 32
        self.spans = parse_spans(self.share)        # "1-3,5-7" → [(1, 3), (5, 7)]
        check(self)
        self.head_dim = self.n_embd // self.n_head  # D

def parse_spans(share):
    return [(int(a), int(b)) for a, b in re.findall(r"(\d+)-(\d+)", share)]

def check(config):
    """Raises ValueError, which names the flag, unless a config's sizes fit together."""
    def must(holds, name, rule):
        if not holds:
            raise ValueError(f"--{name}={getattr(config, name)}: {rule}")

    for name in SIZES:
        must(0 < getattr(config, name) < 2**29, name, "must be above 0, and below 2^29")
    H = config.n_head
    must(config.n_embd % (2 * H) == 0, "n_embd", f"must be a multiple of 2 · {H} (n_head)")
    must(H % config.n_kv_head == 0, "n_kv_head", f"must divide {H} (n_head)")
    must(0 <= config.dropout < 1, "dropout", "must be at least 0 and below 1")
    sharing_kind(config.share_kind)             # raises if there is no such kind
    layers = [layer for span in config.spans for layer in span]
    written = ",".join(f"{a}-{b}" for a, b in config.spans)
    rising = layers == sorted(set(layers))
    must(written == config.share and rising, "share", "write rising spans, as in 1-3 or 1-3,5-7")
    last = config.n_layer - 1
    must(max(layers, default=0) <= last, "share", f"the layers of this model are 0 to {last}")

def rope_angles(config, positions):
    """positions (...) → RoPE's rotations (..., D/2): complex numbers of length 1, for rotate()."""
    dtype = torch.float32 if positions.device.type == "mps" else torch.float64      # MPS has no 64
    i = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=dtype)
    angle = positions.to(dtype)[..., None] * config.rope_base**-(i / config.head_dim)
    return torch.complex(angle.cos().float(), angle.sin().float())

def rotate(x, rope):
    """RoPE (arXiv:2104.09864): turn each pair (x[2i], x[2i+1]) of x (B, heads, T, D) by an angle
    that grows with the position. q · k then depends on the two positions only by their distance."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))             # (B, heads, T, D/2)
    return torch.view_as_real(pairs * rope).flatten(-2).type_as(x)

def split_heads(x, n):
    return x.view(*x.shape[:2], n, -1).transpose(1, 2)          # (B, T, n·D) → (B, n, T, D)

def merge_heads(x):
    return x.transpose(1, 2).flatten(2)                         # (B, n, T, D) → (B, T, n·D)

@dataclass
class Step:
    """What all layers must know of the T tokens that are being processed, and how they attend."""
    rope: torch.Tensor              # (T, D/2), the rotations of their positions
    mask: torch.Tensor | None       # (T, S): 0 where a token may look, else -inf; None: everywhere
    causal: bool                    # the mask is the usual one, which fused kernels know
    cache: "KVCache | None" = None
    watch: object = None            # shown every P, layer after layer; None: P need not be formed

    def remember(self, name, layer, new):
        """Cache a layer's new k or v ("k", "v") (B, G, T, D) → it and the cached (B, G, S, D)."""
        return self.cache.remember(name, layer, new) if self.cache else new

    def attention_weights(self, q, k):
        """q (B, H, T, D), k (B, G, S, D) → P (B, H, T, S)."""
        B, H, T, D = q.shape
        # the rows of all heads that share a k, one below the other: (B, G, H/G·T, D)
        q = (q * D**-0.5).reshape(B, k.size(1), -1, D)
        scores = (q @ k.transpose(2, 3)).view(B, H, T, -1)
        if self.mask is not None:
            scores = scores + self.mask.type_as(scores)
        return scores.softmax(-1).type_as(q)

    def weighted_sum(self, P, v):
        """P (B, H, T, S), v (B, G, S, D) → P v (B, H, T, D)."""
        if self.watch:
            self.watch(P)
        B, H, T, S = P.shape
        P = P.view(B, v.size(1), -1, S)                         # (B, G, H/G·T, S)
        return (P @ v).view(B, H, T, -1)

    def fused(self, q, k, v):
        """weighted_sum(attention_weights(q, k), v), by a kernel that never forms P: a "fused" one,
        which computes both steps for a few rows of P at a time."""
        if self.watch:
            return self.weighted_sum(self.attention_weights(q, k), v)
        causal = self.causal and not q.is_mps                   # the kernel for MPS needs a mask
        mask = None if causal else self.mask
        gqa = k.size(1) < q.size(1)
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=gqa)

class Widths(NamedTuple):
    """How many numbers of q, of k and of v a layer computes for each token."""
    q: int
    k: int
    v: int

class Attention(nn.Module):
    """A full layer, in no span, and the base of the other kinds: they differ from it in heads(),
    and in what they make."""
    makes = "qkv"                   # what it computes itself: its widths, the shape of qkv, what
                                    # the cache stores and what the layer costs follow from this
    in_numpy = decode.full_attention    # the same for one token, on a CPU: see decode.known()

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

    def forward(self, x, step, below=None):
        """x (B, T, C), and what the layer below hands up → y (B, T, C), and what this one does."""
        z, handed_up = self.heads(x, step, below)
        return self.out(merge_heads(z)), handed_up

    def heads(self, x, step, below):
        """→ z (B, H, T, D), each head's weighted sum of values, and what this layer hands up."""
        q, k, v = self.project(x, step)
        return step.fused(q, k, v), None

    def project(self, x, step):
        """x (B, T, C) → q (B, H, T, D), and the visible k and v (B, G, S, D)."""
        H, G = self.H, self.G
        heads = split_heads(self.qkv(x), H + 2 * G)             # (B, H + 2·G, T, D)
        qk, v = heads.split_with_sizes((H + G, G), dim=1)
        qk = rotate(qk, step.rope)
        q, k = qk.split_with_sizes((H, G), dim=1)
        k = step.remember("k", self.layer, k)
        v = step.remember("v", self.layer, v)
        return q, k, v

    # what a layer of minisa/axes may say instead

    restores_keys = False           # True: it computes its keys from what the cache holds

    def extra_cost(self, T, S):
        """→ its parameters beside qkv and out, and their FLOPs for T tokens that see S."""
        return 0, 0

    def tokens_read(self, T, S):
        """→ with how many of the S visible tokens each of T new ones is multiplied."""
        return S

    def check(self):
        """Raises ValueError if numbers that were loaded from a file cannot be this layer's."""

class Anchor(Attention):
    """The first layer of a span of Shared Attention: it forms P (so: not fused), hands it up."""
    in_numpy = decode.full_attention

    def heads(self, x, step, below):
        q, k, v = self.project(x, step)
        P = step.attention_weights(q, k)                        # (B, H, T, S)
        return step.weighted_sum(P, v), P

class SharedAttention(Attention):
    """A reuse layer, as in the paper: the anchor's P over values of its own. No q and no k, so
    nothing to rotate; and nothing to mask, as P is 0 wherever a token must not look."""
    makes = "v"
    in_numpy = decode.shared_attention

    def heads(self, x, step, P):
        v = split_heads(self.qkv(x), self.G)                    # qkv is v only here: (B, G, T, D)
        v = step.remember("v", self.layer, v)                   # (B, G, S, D)
        return step.weighted_sum(P, v), P                       # P goes on up as it came

class KVAnchor(Attention):
    """The first layer of a span of Cross-Layer Attention: it hands up k and v."""
    in_numpy = decode.full_attention

    def heads(self, x, step, below):
        q, k, v = self.project(x, step)
        return step.fused(q, k, v), (k, v)

class CrossLayerAttention(Attention):
    """A reuse layer of the rival: the anchor's k and v under a q of its own."""
    makes = "q"
    in_numpy = decode.cross_layer_attention

    def heads(self, x, step, kv):
        k, v = kv
        q = split_heads(self.qkv(x), self.H)                    # qkv is q only here: (B, H, T, D)
        q = rotate(q, step.rope)
        return step.fused(q, k, v), kv

# what a span shares → the classes of its anchor and its reuse layers
# (.github/CONTRIBUTING.md says how to add a kind)
SHARE_KINDS = {
    "weights": (Anchor, SharedAttention),
    "kv": (KVAnchor, CrossLayerAttention),
}

def sharing_kind(name):
    """The name of a kind of sharing → the same; the kind is then in SHARE_KINDS. One that is not
    there yet is added by minisa/axes/NAME.py, which is imported by its name, as the core must not
    depend on an axis. It adds NAME itself; for NAME-SETTING, its with_setting("SETTING") returns
    the two classes. Raises ValueError if there is none."""
    axis, _, setting = name.partition("-")
    file = f"minisa.axes.{axis}"
    if name not in SHARE_KINDS and axis.isidentifier() and importlib.util.find_spec(file):
        module = importlib.import_module(file)
        if setting and hasattr(module, "with_setting"):
            SHARE_KINDS[name] = module.with_setting(setting)
    if name not in SHARE_KINDS:
        raise ValueError(f"--share_kind={name}: must be {' or '.join(SHARE_KINDS)}")
    return name

class KVCache:
    """The keys and values that each layer made of the last `size` tokens of B sequences.

    It is a ring: position p has slot p mod size, so a new token replaces the oldest. The order of
    slots does not matter to a sum, and only distances count in RoPE, so rotated keys stay valid
    however far generation goes. A ring of four slots, by the positions that they hold:

        new tokens    slots before    slots after    visible to the new tokens
        0 1 2         - - - -         0 1 2 -        0 1 2
        3             0 1 2 -         0 1 2 3        0 1 2 3
        4             0 1 2 3         4 1 2 3        4 1 2 3            it sees itself, not 0
        5 6           4 1 2 3         4 5 6 3        4 1 2 3 5 6        5 sees 2, whose slot 6 takes

    The mask hides from a token what is later, or `size` and more back: above, 6 and 1 from 5.
    """
    watch = None                    # a cache that must see every P has a function here: see Step
    in_numpy = True                 # decode.py can go on from it. A subclass must say so itself

    def __init__(self, model, batch_size, size):
        like = model.embed.weight                               # its dtype and device

        def slots(width):                                       # 0 wide if a layer makes none
            G = model.config.n_kv_head
            return like.new_empty(batch_size, G, size, width // G)

        widths = [block.attn.widths for block in model.blocks]
        self.k = [slots(n_k) for _, n_k, _ in widths]           # (B, G, size, D) for each layer
        self.v = [slots(n_v) for _, _, n_v in widths]
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
        self.positions = self.replace(self.where, positions.view(1, 1, -1, 1)).view(-1)
        return self.positions

    def key_positions(self, layer):
        """The positions (S,) of the keys that a layer sees."""
        return self.positions

    def remember(self, name, layer, new):
        """Store a layer's new k or v ("k", "v") (B, G, T, D) → all visible ones (B, G, S, D)."""
        return self.replace(getattr(self, name)[layer], new)

    def replace(self, stored, new):
        """Write the T newest tokens, which self.length counts already, into their slots. → all that
        is visible to one of them."""
        T = new.size(2)
        if T == 1 or self.length <= self.size:
            stored.index_copy_(2, self.slots, new)
            return stored[:, :, :min(self.length, self.size)]
        # the last of them overwrite what the first still see: so copy, and overwrite after that
        before = stored[:, :, :self.length - T]
        visible = torch.cat((before, new), dim=2)
        stored.index_copy_(2, self.slots, new)
        return visible

class MLP(nn.Module):
    """SwiGLU (arXiv:2002.05202)."""
    in_numpy = True

    def __init__(self, config):
        super().__init__()
        C, M = config.n_embd, config.n_hidden
        self.gate = nn.Linear(C, M, bias=False)
        self.up = nn.Linear(C, M, bias=False)
        self.down = nn.Linear(M, C, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))     # (B, T, M) inside

class Block(nn.Module):
    in_numpy = True

    def __init__(self, config, layer, kind):
        super().__init__()
        self.attn = kind(config, layer)
        self.mlp = MLP(config)
        self.eps, self.dropout = config.norm_eps, config.dropout

    def norm(self, x):
        return F.rms_norm(x, x.shape[-1:], eps=self.eps)        # without a gain: the columns of
                                                                # the next matrix can hold it

    def forward(self, x, step, shared=None):
        y, shared = self.attn(self.norm(x), step, shared)
        x = x + F.dropout(y, self.dropout, self.training)
        y = self.mlp(self.norm(x))
        return x + F.dropout(y, self.dropout, self.training), shared

class GPT(nn.Module):
    in_numpy = True

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.watch = None                                       # see Step
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        if not config.tied:
            self.unembed = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.drop = nn.Dropout(config.dropout)
        kinds = [Attention] * config.n_layer
        anchor, reuse = SHARE_KINDS[config.share_kind]
        for a, b in config.spans:                               # "1-3": layers 1, 2 and 3
            kinds[a:b + 1] = [anchor] + [reuse] * (b - a)
        self.blocks = nn.ModuleList(Block(config, i, kind) for i, kind in enumerate(kinds))
        self.norm = nn.RMSNorm(config.n_embd, config.norm_eps)
        for name, p in self.named_parameters():                 # as in GPT-2
            adds_to_x = name.endswith(("out.weight", "down.weight"))
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02 / (2 * config.n_layer)**0.5 if adds_to_x else 0.02)

    def start(self, idx, cache=None, watch=None):
        """Token ids idx (B, T) → their embeddings (B, T, C), and the Step that all layers get.
        watch: see Step."""
        T = idx.size(1)
        length, size = (cache.length, cache.size) if cache else (0, self.config.block_size)
        if T > size:
            raise ValueError(f"{T} tokens at once are more than the {size} that fit: crop them")
        positions = torch.arange(length, length + T, device=idx.device)
        key_positions = cache.advance(positions) if cache else positions        # (S,)
        x = self.drop(self.embed(idx))
        mask, causal = None, False
        if T > 1:                                               # a single token sees all there is
            distance = positions[:, None] - key_positions       # (T, S)
            visible = (distance >= 0) & (distance < size)
            mask = torch.where(visible, 0.0, -torch.inf).to(x.dtype)
            causal = len(key_positions) == T
        watch = watch or (cache and cache.watch) or self.watch
        return x, Step(rope_angles(self.config, positions), mask, causal, cache, watch)

    def hidden(self, idx, cache=None, watch=None):
        """idx (B, T) → the last hidden states (B, T, C), which head() turns into logits."""
        (x, step), shared = self.start(idx, cache, watch), None
        for block in self.blocks:                               # shared: None, P, or (k, v)
            x, shared = block(x, step, shared)
        return self.norm(x)

    def head(self, x):
        weight = self.embed.weight if self.config.tied else self.unembed.weight
        return F.linear(x, weight)                              # (..., C) → (..., V)

    def forward(self, idx: Tensor, targets: Tensor | None = None, cache: KVCache | None = None):
        """idx (B, T) int64 → logits (B, T, V), and the loss in nats per token if targets (B, T) are
        given. With a cache, idx continues it. ValueError if T > block_size, or its size."""
        logits = self.head(self.hidden(idx, cache))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

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
        """Continue idx (B, T ≥ 1), past block_size by forgetting the oldest: yield each next token
        (B, 1), drawn from softmax(logits / temperature) among the top_k; at 0 the likeliest. The
        prompt is read here; what follows is written by decode.py, where it can, with the weights of
        that moment."""
        B, device = len(idx), idx.device
        if cache is None:
            cache = KVCache(self, B, self.config.block_size)
        randoms, decoder = uniform(B, generator, device), None
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
    if temperature < 1e-6:                                      # so small a divisor would overflow
        return logits.argmax(-1, keepdim=True)
    if top_k:
        least = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    total = (logits / temperature).softmax(-1).cumsum(-1)       # (B, V)
    return (total <= u * total[:, -1:]).sum(-1, keepdim=True)
