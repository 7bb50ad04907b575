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
from torch.nn import functional as F

from minisa import decode

PREFILL_CHUNK = 256     # tokens of a prompt read at once, so that P is (B, H, 256, S) at most

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
        H, L, M = self.n_head, self.n_layer, (self.n_embd * 8 // 3 + 31) // 32 * 32
        self.n_kv_head = H if self.n_kv_head is None else self.n_kv_head
        self.n_hidden = M if self.n_hidden is None else self.n_hidden
        self.spans = [(int(a), int(b)) for a, b in re.findall(r"(\d+)-(\d+)", self.share)]
        layers = [layer for span in self.spans for layer in span]
        read, rising = ",".join(f"{a}-{b}" for a, b in self.spans), layers == sorted(set(layers))
        sizes = "block_size vocab_size n_layer n_head n_kv_head n_embd n_hidden rope_base norm_eps"
        for name, holds, rule in (      # checks only: skip them when you read this first
            *((n, 0 < getattr(self, n) < 2**29, "must be above 0, < 2^29") for n in sizes.split()),
            ("n_embd", H and self.n_embd % (2 * H) == 0, f"must be a multiple of 2 · {H} (n_head)"),
            ("n_kv_head", self.n_kv_head and H % self.n_kv_head == 0, f"must divide {H} (n_head)"),
            ("dropout", 0 <= self.dropout < 1, "must be at least 0 and below 1"),
            ("share", read == self.share and rising, "write rising spans, as in 1-3 or 1-3,5-7"),
            ("share", max(layers, default=0) < L, f"the layers of this model are 0 to {L - 1}"),
        ):
            if not holds:
                raise ValueError(f"--{name}={getattr(self, name)}: {rule}")
        share_kind(self.share_kind)                             # raises if there is no such kind
        self.head_dim = self.n_embd // H

def rope_angles(config, positions):
    """positions (...) → RoPE's rotations (..., D/2): complex numbers of length 1, for rotate()."""
    dtype = torch.float32 if positions.device.type == "mps" else torch.float64      # MPS has no 64
    i = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=dtype)
    angle = positions.to(dtype)[..., None] * config.rope_base**-(i / config.head_dim)
    return torch.complex(angle.cos().float(), angle.sin().float())

def rotate(x, rope):
    """RoPE (arXiv:2104.09864): turn each pair (x[2i], x[2i+1]) of x (B, heads, T, D) by an angle
    that grows with the position. Of two positions, q · k then depends on their distance alone."""
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
    causal: bool                    # it is the usual mask, which fused kernels (but MPS's) know
    cache: "KVCache | None" = None
    fuse: bool = True               # False: all layers form P, also those that need not
    watch: object = None            # a function that is shown every P, layer after layer

    def visible(self, name, layer, new):
        """Cache a layer's new k or v ("k", "v") (B, G, T, D) → it and the cached (B, G, S, D)."""
        return self.cache.write(name, layer, new) if self.cache else new

    def attention_weights(self, q, k):
        """q (B, H, T, D), k (B, G, S, D) → P (B, H, T, S)."""
        B, H, T, D = q.shape
        stacked = (q * D**-0.5).reshape(B, k.size(1), -1, D)    # (B, G, H/G·T, D): heads by their k
        scores = (stacked @ k.transpose(2, 3)).view(B, H, T, -1)
        scores = scores if self.mask is None else scores + self.mask.type_as(scores)
        return scores.softmax(-1).type_as(q)

    def weighted_sum(self, P, v):
        """P (B, H, T, S), v (B, G, S, D) → P v (B, H, T, D)."""
        if self.watch:
            self.watch(P)
        B, H, T, S = P.shape
        return (P.view(B, v.size(1), -1, S) @ v).view(B, H, T, -1)      # heads by their v

    def fused(self, q, k, v):
        """weighted_sum(attention_weights(q, k), v), by a kernel that never forms P."""
        if self.watch or not self.fuse:
            return self.weighted_sum(self.attention_weights(q, k), v)
        mask, gqa = None if self.causal else self.mask, k.size(1) < q.size(1)
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=self.causal, enable_gqa=gqa)

class Widths(NamedTuple):
    """How many numbers of q, of k and of v a layer computes for each token."""
    q: int
    k: int
    v: int

class Attention(nn.Module):
    """A full layer: in no span. The other layers differ from it in heads(), and in what they
    make."""
    makes = "qkv"                   # what it computes itself. Of that, the cache holds k and v
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
        k = step.visible("k", self.layer, k)
        v = step.visible("v", self.layer, v)
        return q, k, v

    # what a layer of minisa/axes may say instead

    restores_keys = False           # True: it computes its keys from what the cache holds

    def extra_cost(self, T, S):
        """→ its parameters beside qkv and out, and their FLOPs for T tokens that see S."""
        return 0, 0

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
        v = step.visible("v", self.layer, v)                    # (B, G, S, D)
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

def share_kind(name):
    """The name of a kind of sharing → the same; the kind is then in SHARE_KINDS. One that is not
    there yet is added by minisa/axes/NAME.py, which is imported by its name, as the core must not
    depend on an axis. (It adds NAME, or NAME-SETTING.) Raises ValueError if there is none."""
    axis = name.partition("-")[0]
    file = f"minisa.axes.{axis}"
    if name not in SHARE_KINDS and axis.isidentifier() and importlib.util.find_spec(file):
        importlib.import_module(file)
    if name not in SHARE_KINDS:
        raise ValueError(f"--share_kind={name}: must be {' or '.join(SHARE_KINDS)}")
    return name

class KVCache:
    """The keys and values of the last `size` tokens of B sequences; 0 wide if a layer makes none.
    A ring: position p lives in slot p mod size, so a new token overwrites the oldest. Keys are kept
    rotated; as only distances count in RoPE, they stay valid however far generation goes."""
    watch = None                    # a cache that must see every P has a function here: see Step
    in_numpy = True                 # decode.py can go on from it. A subclass must say so itself

    def __init__(self, model, batch_size, size, dtype=torch.float32, device="cpu"):
        G = model.config.n_kv_head
        self.k, self.v = ([torch.empty(batch_size, G, size, block.attn.widths[i] // G, dtype=dtype,
                                       device=device) for block in model.blocks] for i in (1, 2))
        self.where = torch.zeros(1, 1, size, 1, dtype=torch.long, device=device)  # slot → position
        self.size, self.length = size, 0                        # length: tokens seen so far

    @property
    def nbytes(self):
        """Bytes of storage held for keys and values."""
        return sum(t.untyped_storage().nbytes() for t in self.k + self.v)

    def open(self, positions):
        """Make room for tokens at positions (T,), once for all layers → all visible ones (S,)."""
        T = len(positions)
        self.slots = positions % self.size
        self.overflows = T > 1 and self.length + T > self.size  # first see what last erase
        self.held = min(self.length if self.overflows else self.length + T, self.size)
        self.length += T
        self.positions = self.put(self.where, positions.view(1, 1, T, 1)).view(-1)
        return self.positions

    def key_positions(self, layer):
        """The positions of the keys that a layer sees, as open() told them: (S,)."""
        return self.positions

    def write(self, name, layer, new):
        return self.put(getattr(self, name)[layer], new)        # (B, G, T, D) → (B, G, S, D)

    def put(self, stored, new):
        if self.overflows:                                      # copy first, then overwrite
            visible = torch.cat((stored[:, :, :self.held], new), dim=2)
            stored.index_copy_(2, self.slots, new)
            return visible
        return stored.index_copy_(2, self.slots, new)[:, :, :self.held]

class MLP(nn.Module):
    """SwiGLU (arXiv:2002.05202)."""
    in_numpy = True

    def __init__(self, config):
        super().__init__()
        C, M = config.n_embd, config.n_hidden
        self.gate, self.up = nn.Linear(C, M, bias=False), nn.Linear(C, M, bias=False)
        self.down = nn.Linear(M, C, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))     # (B, T, M) inside

class Block(nn.Module):
    in_numpy = True

    def __init__(self, config, layer, kind):
        super().__init__()
        self.attn, self.mlp = kind(config, layer), MLP(config)
        self.eps, self.dropout = config.norm_eps, config.dropout

    def norm(self, x):
        return F.rms_norm(x, x.shape[-1:], eps=self.eps)        # no gain: the next matrix can

    def forward(self, x, step, shared=None):
        y, shared = self.attn(self.norm(x), step, shared)
        x = x + F.dropout(y, self.dropout, self.training)
        y = self.mlp(self.norm(x))
        return x + F.dropout(y, self.dropout, self.training), shared

class GPT(nn.Module):
    in_numpy = True

    def __init__(self, config):
        super().__init__()
        self.config, self.fuse = config, True                   # fuse: see Step
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        if not config.tied:
            self.unembed = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.drop = nn.Dropout(config.dropout)
        kinds, (anchor, reuse) = [Attention] * config.n_layer, SHARE_KINDS[config.share_kind]
        for a, b in config.spans:
            kinds[a:b + 1] = [anchor] + [reuse] * (b - a)
        self.blocks = nn.ModuleList(Block(config, i, kind) for i, kind in enumerate(kinds))
        self.norm = nn.RMSNorm(config.n_embd, config.norm_eps)
        for name, p in self.named_parameters():
            if p.dim() == 2:                                    # as in GPT-2
                last = name.endswith(("out.weight", "down.weight"))     # what is added to x
                nn.init.normal_(p, std=0.02 / (2 * config.n_layer)**0.5 if last else 0.02)

    def start(self, idx, cache=None, watch=None):
        """Token ids idx (B, T) → their embeddings (B, T, C), and the Step that all layers get."""
        T = idx.size(1)
        length, size = (cache.length, cache.size) if cache else (0, self.config.block_size)
        if T > size:
            raise ValueError(f"{T} tokens at once are more than the {size} that fit: crop them")
        positions = torch.arange(length, length + T, device=idx.device)
        keys = cache.open(positions) if cache else positions    # (S,)
        x, mask = self.drop(self.embed(idx)), None
        if T > 1:                                               # a single token sees all there is
            distance = positions[:, None] - keys                # (T, S)
            mask = torch.where((distance >= 0) & (distance < size), 0.0, -torch.inf).to(x.dtype)
        rope, watch = rope_angles(self.config, positions), watch or (cache and cache.watch)
        return x, Step(rope, mask, 1 < T == len(keys) and not idx.is_mps, cache, self.fuse, watch)

    def hidden(self, idx, cache=None, watch=None):
        """idx (B, T) → the last hidden states (B, T, C), which head() turns into logits."""
        (x, step), shared = self.start(idx, cache, watch), None
        for block in self.blocks:                               # shared: None, P, or (k, v)
            x, shared = block(x, step, shared)
        return self.norm(x)

    def head(self, x):
        weight = self.embed.weight if self.config.tied else self.unembed.weight
        return F.linear(x, weight)                              # (..., C) → (..., V)

    def forward(self, idx, targets=None, cache=None):
        """idx (B, T) int64 → logits (B, T, V), and the loss in nats per token if targets (B, T) are
        given. With a cache, idx goes on from it. ValueError if T > block_size, or its size."""
        logits = self.head(self.hidden(idx, cache))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    @torch.no_grad()
    def attention_weights(self, idx):
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
            cache = KVCache(self, B, self.config.block_size, self.embed.weight.dtype, device)
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

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, generator=None,
                 cache=None):
        """idx (B, T) → idx and what stream() adds to it, (B, T + max_new_tokens)."""
        new = self.stream(idx, max_new_tokens, temperature, top_k, generator, cache)
        return torch.cat((idx, *new), dim=1)

def uniform(B, generator, device):
    """Yield random numbers (B, 1) for draw(), 64 made at once: starting takes most of the time."""
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
