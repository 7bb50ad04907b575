"""A small GPT (the Llama architecture) in which layers can share attention. This file is the whole model.

Attention layer l of a decoder, for one head, over keys and values of all tokens so far:

    P = softmax(q kᵀ / √D)         the attention weights: row t says where token t looks, and sums to 1
    y = P v                        what it sees there

Neighbouring layers often look at the same places. Shared Attention (Liao & Vargas 2024, arXiv:2407.12866)
lets the first layer of a span, its anchor, compute P, and lets the others reuse it:

    anchor layer a:                P = softmax(q_a k_aᵀ / √D)    y_a = P v_a
    reuse layer l of the span:                                   y_l = P v_l    (no q, no k, no softmax)

so a reuse layer caches only v. The rival is Cross-Layer Attention (CLA, arXiv:2405.12981): a reuse layer
keeps its own q and borrows k and v of the anchor, so it caches nothing but computes its own P.

`share="1-3"` makes layers 1..3 (0-based, inclusive) a span with anchor 1. `share_kind` is "weights" for
Shared Attention or "kv" for CLA. Look for `shared` below: it is what travels from an anchor to its reuse layers.

Head h of a reuse layer takes P of the anchor's head h; `heads` lets it take another one, or a mixture of all.

Shapes: B batch, T new tokens, S visible keys, H query heads, G key/value heads, D head dim, C = H·D, M MLP width, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F

PREFILL_CHUNK = 256  # tokens of a prompt processed at once, so that P is never larger than (B, H, 256, S)


def parse_spans(share, n_layer):
    """"1-3,5-7" → [(1, 3), (5, 7)]: spans of layers, 0-based, both ends included. Raises ValueError for any other text."""
    spans = []
    for text in share.split(",") if share else []:
        first, _, last = text.strip().partition("-")
        if not (first.isdecimal() and last.isdecimal()):
            raise ValueError(f"--share={share}: '{text}' is not a span; write first-last, as in --share=1-3 or --share=1-3,5-7")
        a, b = int(first), int(last)
        if a >= b:
            raise ValueError(f"--share={share}: span {text} must name two layers or more, the lower one first, as in --share=1-3")
        if b >= n_layer:
            raise ValueError(f"--share={share}: there is no layer {b}; the layers of this model are 0 to {n_layer - 1}")
        if spans and a <= spans[-1][1]:
            raise ValueError(f"--share={share}: span {text} must start after layer {spans[-1][1]}; list spans in rising order, without overlap")
        spans.append((a, b))
    return spans


@dataclass
class GPTConfig:
    block_size: int = 256           # most tokens a token can see, itself included
    vocab_size: int = 1024
    n_layer: int = 4
    n_head: int = 4                 # query heads, H
    n_kv_head: int | None = None    # key/value heads, G: None = n_head; fewer is GQA; 1 is MQA
    n_embd: int = 128               # C
    n_hidden: int | None = None     # width of the MLP: None = 8/3 n_embd, rounded up to a multiple of 32
    dropout: float = 0.0
    rope_base: float = 10000.0
    norm_eps: float = 1e-5
    tied: bool = True               # the output head is the token embedding
    share: str = ""                 # spans of layers that share, "" = none
    share_kind: str = "weights"     # "weights" = Shared Attention, "kv" = Cross-Layer Attention
    heads: str = "same"             # whose weights head h of a reuse layer takes: "same" = those of its anchor's head h,
                                    # "match" = of one that was chosen for it, "mix" = a weighted sum over the anchor's heads
    share_rank: int = 0             # R: width of a query and key with which a reuse layer corrects its anchor's scores, 0 = none
    ranks: list | None = None       # for each layer, of how many numbers per head its cached keys and values are: None = all D

    def __post_init__(self):
        self.n_kv_head = self.n_head if self.n_kv_head is None else self.n_kv_head
        self.n_hidden = -(-8 * self.n_embd // (3 * 32)) * 32 if self.n_hidden is None else self.n_hidden
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "n_hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name}={getattr(self, name)}: must be at least 1")
        if self.n_embd % (2 * self.n_head):
            raise ValueError(f"--n_embd={self.n_embd}: must be a multiple of 2 × n_head = {2 * self.n_head}, so that every head gets an even width")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"--n_kv_head={self.n_kv_head}: must divide --n_head={self.n_head}, so that every key/value head serves as many query heads")
        for name in ("rope_base", "norm_eps"):
            if getattr(self, name) <= 0:
                raise ValueError(f"--{name}={getattr(self, name)}: must be above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"--dropout={self.dropout}: must be at least 0 and below 1")
        if self.share_kind not in ("weights", "kv"):
            raise ValueError(f"--share_kind={self.share_kind}: must be 'weights' (Shared Attention) or 'kv' (Cross-Layer Attention)")
        if self.heads not in ("same", "match", "mix"):
            raise ValueError(f"--heads={self.heads}: must be 'same', 'match' or 'mix'")
        if self.heads != "same" and (self.share_kind != "weights" or not self.share):
            raise ValueError(f"--heads={self.heads}: only Shared Attention takes over heads; give --share, and --share_kind=weights")
        self.spans = parse_spans(self.share, self.n_layer)
        self.head_dim = self.n_embd // self.n_head                                      # D
        if self.share_rank and (self.share_rank < 0 or self.share_rank % 2 or self.head_dim % self.share_rank):
            raise ValueError(f"--share_rank={self.share_rank}: must be even, and divide the width of a head, {self.head_dim}")
        if self.share_rank and (self.share_kind != "weights" or self.heads != "same" or not self.share):
            raise ValueError(f"--share_rank={self.share_rank}: corrects the scores of Shared Attention; give --share, with --share_kind=weights and --heads=same")
        if self.ranks and (len(self.ranks) != self.n_layer or not all(1 <= rank <= self.head_dim for pair in self.ranks for rank in pair)):
            raise ValueError(f"ranks: must be {self.n_layer} pairs of numbers from 1 to {self.head_dim}")

    def role(self, layer):
        """"full" (in no span), "anchor" (first of its span) or "reuse" (the rest of it)."""
        for a, b in self.spans:
            if a <= layer <= b:
                return "anchor" if layer == a else "reuse"
        return "full"

    @property
    def sharing(self):
        """What it shares in words, as "weights 1-3 mix"; "" for nothing."""
        more = [self.heads] * (self.heads != "same") + [f"rank {self.share_rank}"] * (self.share_rank > 0)
        return " ".join([self.share_kind, self.share, *more]) if self.share else ""

    def rank(self, layer):
        """Numbers per head of the keys and of the values that a layer caches."""
        return self.ranks[layer] if self.ranks else (self.head_dim, self.head_dim)


def linear(x, weight):
    """x (..., in), weight (out, in) → x weightᵀ (..., out)."""
    n, (n_out, n_in) = torch.get_num_threads(), weight.shape
    if x.numel() > n_in or weight.dtype != torch.float32 or x.device.type != "cpu" or torch.is_grad_enabled():
        return F.linear(x, weight)
    # One token on a CPU: the time is that of reading the weight, and BLAS would read it with one thread. Cut into n parts, n do.
    if weight.stride(0) == 1 and n_in % n == 0:                                         # stored by columns: parts of the input
        return torch.bmm(x.view(n, 1, -1), weight.mT.view(n, -1, n_out)).sum(0).view(*x.shape[:-1], n_out)
    if weight.stride(1) == 1 and n_out % n == 0:                                        # stored by rows: parts of the output
        return torch.bmm(x.view(1, 1, -1).expand(n, -1, -1), weight.view(n, -1, n_in).mT).view(*x.shape[:-1], n_out)
    return F.linear(x, weight)


class Linear(nn.Linear):
    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x):
        return linear(x, self.weight)


def rope_angles(config, positions):
    """positions (...) → cos and sin (..., D) of the angles there, for rotate(): in sin the first half is negative."""
    exact = torch.float32 if positions.device.type == "mps" else torch.float64          # positions grow without end
    exponent = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=exact) / config.head_dim
    angle = positions.to(exact)[..., None] * config.rope_base**-exponent
    cos, sin = angle.cos().float(), angle.sin().float()                                 # (..., D/2)
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate(x, rope):
    """RoPE (arXiv:2104.09864): turn each pair (x[i], x[i + D/2]) of x (B, heads, T, D) by an angle that grows with its position.
    The product of a rotated q and a rotated k depends on the distance of their positions alone."""
    cos, sin = rope                                                                     # (T, D) each; in sin the first half is negative
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, -1), sin).type_as(x)


def weighted_sum(P, v):
    """P (B, H, T, S), v (B, G, S, D) → P v (B, H, T, D). The H/G heads that share a v are stacked along time."""
    B, H, T, S = P.shape
    G = v.size(1)
    return (P.view(B, G, H // G * T, S) @ v).view(B, H, T, -1)


def heads(x, n):
    """x (B, T, n·D) → (B, n, T, D)."""
    return x.view(*x.shape[:2], n, -1).transpose(1, 2)


def attention_scores(q, k, mask=None):
    """q (B, H, T, D), k (B, G, S, D), mask (T, S) or None → q kᵀ / √D (B, H, T, S)."""
    B, H, T, D = q.shape
    scores = q.reshape(B, k.size(1), -1, D) @ k.transpose(2, 3)                         # (B, G, H/G·T, S)
    scores = scores.view(B, H, T, -1) * D**-0.5
    return scores if mask is None else scores + mask


def attention_weights(scores):
    """scores (B, H, T, S) → P (B, H, T, S), by a softmax in float32."""
    return torch.softmax(scores, dim=-1, dtype=torch.float32).type_as(scores)


def causal_mask(positions, keys, size, like):
    """(T, S): 0 where a token at one of `positions` (T,) may see a key at one of `keys` (S,), -inf elsewhere."""
    distance = positions[:, None] - keys
    return torch.zeros_like(distance, dtype=like.dtype).masked_fill((distance < 0) | (distance >= size), -torch.inf)


def widths(config, layer):
    """How many numbers per token of q, of k and of v a layer computes itself, all heads together."""
    H, G, D, R = config.n_head, config.n_kv_head, config.head_dim, config.share_rank
    k, v = config.rank(layer)
    if config.role(layer) != "reuse":
        return H * D, G * k, G * v
    return (H * R, G * R, G * v) if config.share_kind == "weights" else (H * D, 0, 0)


class Attention(nn.Module):
    """Causal self-attention of one layer: full, anchor, or reuse."""

    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.role, self.shares_weights = layer, config.role(layer), config.share_kind == "weights"
        self.H, self.G, self.R = config.n_head, config.n_kv_head, config.share_rank
        self.made = widths(config, layer)
        k_rank, v_rank = config.rank(layer)
        self.qkv = Linear(config.n_embd, sum(self.made))                                # rows: q heads, k heads, v heads
        self.out = Linear(self.H * v_rank, config.n_embd)
        self.restores = k_rank < config.head_dim and self.role != "reuse"
        if self.restores:
            self.restore = nn.Parameter(torch.zeros(self.G, k_rank, config.head_dim))   # cached numbers of a key → the key
        self.takes = config.heads if self.role == "reuse" else "same"
        if self.takes == "match":
            self.register_buffer("source", torch.arange(self.H))                        # a head of the anchor for each head
        if self.takes == "mix":
            self.mix = nn.Parameter(torch.eye(self.H))                                  # a row for each head

    def forward(self, x, rope, mask, shared=None, cache=None, seen=None):
        """x (B, T, C) → y (B, T, C), shared. `shared` comes from the layer below and goes to the layer above: P (B, H, T, S), or with
        share_rank the scores before the softmax, or for CLA k and v (B, G, S, D). `seen`, if given, is a list to which the layer adds
        the P that it attends with."""
        H, G = self.H, self.G
        n_q, n_k, n_v = self.made
        qk, v = self.qkv(x).split_with_sizes((n_q + n_k, n_v), dim=2)
        if self.role == "reuse" and self.shares_weights:                                # Shared Attention:
            v = heads(v, G)                                                             # v of this layer, (B, G, T, D),
            v = v if cache is None else cache.write(self.layer, cache.v, v)             # (B, G, S, D)
            P = shared                                                                  # P of the anchor, (B, H, T, S)
            if self.R:                                                                  # its scores, corrected by R more numbers a head
                angles = [a[:, ::a.size(1) // self.R] for a in rope]                    # RoPE for R numbers
                q, k = rotate(heads(qk, H + G), angles).split_with_sizes((H, G), dim=1)
                k = k if cache is None else cache.write(self.layer, cache.k, k)
                P = attention_weights(shared + attention_scores(q, k))
            if self.takes == "match":
                P = P[:, self.source]
            if self.takes == "mix":
                P = (self.mix @ P.flatten(2)).view_as(P)
            y = weighted_sum(P, v)                                                      # (B, H, T, D)
        else:
            if self.restores:                                                           # k as it is cached: narrower, and not rotated
                q, k = (heads(part, n) for part, n in zip(qk.split_with_sizes((n_q, n_k), dim=2), (H, G)))
                q = rotate(q, rope)
            elif self.role == "reuse":                                                  # Cross-Layer Attention: k and v of the anchor
                q, (k, v) = rotate(heads(qk, H), rope), shared
            else:
                q, k = rotate(heads(qk, H + G), rope).split_with_sizes((H, G), dim=1)
            if self.role != "reuse":
                v = heads(v, G)
                if cache is not None:                                                   # (B, G, T, D) → (B, G, S, D)
                    k, v = cache.write(self.layer, cache.k, k), cache.write(self.layer, cache.v, v)
            if self.restores:
                k = rotate(k @ self.restore, rope if cache is None else cache.key_angles(self.layer))
            if self.role == "anchor" and self.shares_weights or seen is not None:
                scores = attention_scores(q, k, mask)                                   # (B, H, T, S)
                P = attention_weights(scores)
                y = weighted_sum(P, v)
            else:                                                                       # the same, by a kernel that never forms P
                causal = q.size(2) == k.size(2)
                y = F.scaled_dot_product_attention(q, k, v, attn_mask=None if causal else mask, is_causal=causal, enable_gqa=G < H)
            if self.role == "anchor" and self.shares_weights:
                shared = scores if self.R else P
            else:
                shared = k, v
        if seen is not None:
            seen.append(P)
        return self.out(y.transpose(1, 2).flatten(2)), shared


class MLP(nn.Module):
    """SwiGLU (arXiv:2002.05202)."""

    def __init__(self, config):
        super().__init__()
        self.gate_up = Linear(config.n_embd, 2 * config.n_hidden)                       # both in one product
        self.down = Linear(config.n_hidden, config.n_embd)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)                                     # (B, T, M) each
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.norm1 = nn.RMSNorm(config.n_embd, config.norm_eps)
        self.attn = Attention(config, layer)
        self.norm2 = nn.RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config)
        self.dropout = config.dropout

    def drop(self, y):
        return F.dropout(y, self.dropout) if self.training and self.dropout else y

    def forward(self, x, rope, mask, shared=None, cache=None, seen=None):
        y, shared = self.attn(self.norm1(x), rope, mask, shared, cache, seen)
        x = x + self.drop(y)
        return x + self.drop(self.mlp(self.norm2(x))), shared


class KVCache:
    """The keys and values of the last `size` tokens of B sequences, of every layer just those that it makes itself:
    k and v, or v only (Shared Attention's reuse layers), or nothing (CLA's). A ring: position p lives in slot p mod size,
    so a new token overwrites the oldest. Keys are kept rotated (narrow ones are rotated when read); RoPE is relative, so they stay valid."""

    seen = None                                                                         # a list, in a cache that wants each layer's P

    def __init__(self, config, batch_size, size, dtype=torch.float32, device="cpu"):
        self.config, self.size, self.length = config, size, 0                           # length: tokens seen so far
        made = [widths(config, layer) for layer in range(config.n_layer)]
        self.k, self.v = ([torch.empty(batch_size, config.n_kv_head, size, n[i] // config.n_kv_head, dtype=dtype, device=device)
                           for n in made] for i in (1, 2))
        self.where = torch.zeros(1, 1, size, 1, dtype=torch.long, device=device)        # the position that each slot holds

    @property
    def nbytes(self):
        """Bytes of storage held for keys and values."""
        return sum(t.untyped_storage().nbytes() for t in self.k + self.v)

    def open(self, positions):
        """Find the slots of new tokens at positions (T,). Call it once for all layers, before they write.
        → the positions (S,) of the keys that write() will return."""
        T = len(positions)
        self.overflows = T > 1 and self.length + T > self.size                          # some new tokens still see what others overwrite
        self.held = min(self.length if self.overflows else self.length + T, self.size)  # slots that are visible
        self.slots = positions % self.size
        self.length += T
        self.keys, self.angles = self.put(self.where, positions.view(1, 1, T, 1)).view(-1), None
        return self.keys

    def write(self, layer, tensors, new):
        """Take the k or v (B, G, T, D) of a layer's new tokens into `tensors`, self.k or self.v; return all that they may see, (B, G, S, D)."""
        return self.put(tensors[layer], new)

    def put(self, old, new):
        if self.overflows:                                                              # copy, then write
            visible = torch.cat((old[:, :, :self.held], new), dim=2)
            old.index_copy_(2, self.slots, new)
            return visible
        return old.index_copy_(2, self.slots, new)[:, :, :self.held]

    def key_angles(self, layer):
        """rope_angles() of the keys that write() returns, the same for all layers."""
        self.angles = self.angles or rope_angles(self.config, self.keys)
        return self.angles


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        if not config.tied:
            self.unembed = Linear(config.n_embd, config.vocab_size)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd, config.norm_eps)
        for name, p in self.named_parameters():
            if p.dim() == 2 and not name.endswith("mix"):                               # GPT-2's: residual branches start small
                nn.init.normal_(p, std=0.02 / (2 * config.n_layer)**0.5 if name.endswith(("out.weight", "down.weight")) else 0.02)

    def hidden(self, idx, cache=None, seen=None):
        """idx (B, T) → last hidden state (B, T, C), which `head` turns into logits. `seen`: a list to fill with each layer's P."""
        B, T = idx.shape
        length, size = (cache.length, cache.size) if cache is not None else (0, self.config.block_size)
        if T > size:
            raise ValueError(f"{T} tokens at once are more than the {size} that fit: crop them, or feed a KVCache in chunks")
        positions = torch.arange(length, length + T, device=idx.device)
        keys, seen = (cache.open(positions), cache.seen) if cache is not None else (positions, seen)
        x = self.drop(self.embed(idx))                                                  # (B, T, C)
        angles = rope_angles(self.config, positions)
        mask = causal_mask(positions, keys, size, like=x) if T > 1 else None            # one token sees every key
        shared = None
        for block in self.blocks:
            x, shared = block(x, angles, mask, shared, cache, seen)
        return self.norm(x)

    def head(self, x):
        return linear(x, (self.embed if self.config.tied else self.unembed).weight)                                           # (..., C) → (..., V)

    def forward(self, idx, targets=None, cache=None):
        """idx (B, T) int64 → logits (B, T, V), and the mean cross-entropy in nats per token if targets (B, T) are given.
        With a cache, idx continues what the cache has seen; without one, T is at most block_size (else ValueError)."""
        logits = self.head(self.hidden(idx, cache))
        loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        return logits, loss

    @torch.no_grad()
    def attention_weights(self, idx):
        """idx (B, T) → L tensors (B, H, T, T): what each layer attends with. A reuse layer's is its anchor's, or as `heads` says."""
        seen = []
        self.hidden(idx, seen=seen)
        return seen

    @torch.inference_mode()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, generator=None, cache=None):
        """Continue idx (B, T ≥ 1), yielding each next token (B, 1) as it is made. Call eval() first. Past block_size it goes on,
        each token seeing the last block_size ones. temperature 0 takes the likeliest token; else one is drawn from
        softmax(logits / temperature), of the top_k likeliest if given."""
        if cache is None:
            cache = KVCache(self.config, idx.size(0), self.config.block_size, self.embed.weight.dtype, idx.device)
        for chunk in idx.split(min(PREFILL_CHUNK, cache.size), dim=1):
            x = self.hidden(chunk, cache)
        for i in range(max_new_tokens):
            logits = self.head(x[:, -1]).float()                                        # (B, V)
            if temperature == 0:
                token = logits.argmax(-1, keepdim=True)
            else:
                if top_k is not None:
                    logits[logits < logits.topk(min(top_k, logits.size(-1))).values[:, -1:]] = -torch.inf
                logits = (logits - logits.max(-1, keepdim=True).values) / temperature       # the likeliest is 0: none can overflow
                token = torch.multinomial(torch.softmax(logits, dim=-1), 1, generator=generator)
            yield token
            if i + 1 < max_new_tokens:
                x = self.hidden(token, cache)

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, generator=None, cache=None):
        """idx (B, T) → idx with max_new_tokens more, (B, T + max_new_tokens). Arguments as for stream()."""
        return torch.cat((idx, *self.stream(idx, max_new_tokens, temperature, top_k, generator, cache)), dim=1)
