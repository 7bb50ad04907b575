"""Eigen Attention (Saxena et al. 2024, arXiv:2408.05646): fewer numbers per head in the KV cache.

    python -m minisa.axes.eigen smollm2 --error=0.025 --refit --out=out/small

The keys of a head, D numbers each, lie near a subspace of r < D dimensions, and so do its values.
With E (r, D) and F (r, D), cache the r numbers c = E k instead of k, and restore k ≈ Fᵀ c when it
is read. The same holds for v. Both fold into the weights of a trained model:

    values    c = (E W_v) x    P c (r numbers) goes into W_out Fᵀ: nothing to restore
    keys      c = (E W_k) x    k = Fᵀ c is restored, then rotated (RoPE), for all visible tokens:
                               2·G·r·D·S FLOPs; none in a reuse layer of Shared Attention

Which subspace? The paper takes that of the largest singular values. But an error of k matters only
along the queries that meet it, and an error of v only as far as W_out lets it through. So each has
a metric M (D, D). With S = E[k kᵀ] and the r largest eigenvectors U (D, r) of M^½ S M^½, the
subspace that minimizes E|M^½ (k − Fᵀ E k)|² is

    E = Uᵀ M^½        Fᵀ = M^-½ U        error: the sum of the other eigenvalues

A head sums z_t = Σ_s P_ts v_s for the query of token t over keys s; its part W_h of W_out makes
W_h z_t of it; y_t is the sum of that over the heads, which the layer adds to the stream x_t. To
first order, an error δk_s of a key changes W_h z_t by Σ_s W_h (v_s − z_t) P_ts q_tsᵀ δk_s / √D,
where q_ts is q_t rotated by t − s. Hence, as the stream is normalized wherever it is read,

    weights   w_ts = u_t P_ts² |W_h (v_s − z_t)|²    u_t = 1 / |x_t + y_t|²
    keys      S = Σ_ts w_ts k_s k_sᵀ    M = Σ_ts w_ts q_ts q_tsᵀ / (D Σ_ts w_ts), from samples of s
    values    S = Σ_t u_t z_t z_tᵀ      M = W_hᵀ W_h

summed over all heads that share the keys and values; the values' M is their mean instead. Both
errors are then fractions of the stream, and comparable. So numbers are dropped in the order of
their eigenvalues, keys and values of a layer together, while the mean over t of
|δy_t|² / |x_t + y_t|² stays within error². All heads of a layer keep equally many. Errors of two
keys, or of two heads, are taken as independent. An error of an anchor's keys is in the weights of
its reuse layers too: in the anchor it counts once for each layer of the span, and a reuse layer's
values may add only what it leaves of error².
"""

from collections import Counter
from dataclasses import replace

import torch
import torch.nn as nn

from minisa.axes.common import (
    add_calibration,
    anchors,
    fill,
    parser,
    rebuilt,
    resize,
    rewrite,
    run_main,
    walk,
)
from minisa.axes.heads import refit
from minisa.kit import checkpoint
from minisa.kit.cli import at_least, count
from minisa.model import (
    Anchor,
    Attention,
    CrossLayerAttention,
    KVAnchor,
    SharedAttention,
    merge_heads,
    rope_angles,
    rotate,
    split_heads,
)

SAMPLES = 4     # keys drawn for each query of each head

# ---- layers ----

class Narrow:
    """What a layer with keys becomes: its cache holds k_rank numbers of each key, not rotated, and
    v_rank of each value. `restore` (G, k_rank, D) is F; None if the keys are whole."""

    def __init__(self, config, layer, k_rank):
        super().__init__(config, layer)
        D = config.head_dim
        self.config = config
        self.widths = self.widths._replace(k=self.G * k_rank)
        self.restores_keys = k_rank < D
        restore = torch.zeros(self.G, k_rank, D)
        self.restore = nn.Parameter(restore) if self.restores_keys else None

    def project(self, h, step):
        """h (B, T, C) → q (B, H, T, D), and the visible k (B, G, S, D) and v (B, G, S, v_rank)."""
        q, k, v = self.qkv(h).split(self.widths, dim=2)
        q = split_heads(q.contiguous(), self.H)                 # rotate() needs rows of even length
        k = split_heads(k.contiguous(), self.G)
        v = split_heads(v, self.G)
        v = step.remember("v", self.layer, v)
        if self.restores_keys:
            k = step.remember("k", self.layer, k)                       # (B, G, S, k_rank)
            k = rotate(k @ self.restore, self.rope_of_keys(step))       # (B, G, S, D)
        else:
            k = step.remember("k", self.layer, rotate(k, step.rope))
        return rotate(q, step.rope), k, v

    def rope_of_keys(self, step):
        """RoPE's (S, D/2), or (B, 1, S, D/2), of the positions of the visible keys."""
        if step.cache is None:
            return step.rope
        positions = step.cache.key_positions(self.layer)
        known, rope = getattr(step, "rope_of_keys", (None, None))       # of the layer below
        if known is not positions:
            rope = rope_angles(self.config, positions)
            step.rope_of_keys = positions, rope
        return rope

    def extra_cost(self, T, S):
        restoring = self.restore.numel() if self.restores_keys else 0
        return restoring, 2 * restoring * S

NARROW = {
    kind: type(f"Narrow{kind.__name__}", (Narrow, kind), {})
    for kind in (Attention, Anchor, KVAnchor)
}

def rebuild(model, ranks):
    """Give all layers keys and values of fewer numbers.

    ranks: for each layer how many numbers per head, [of a key, of a value]; for what it does not
    make, any. Raises ValueError if they do not fit, or layers that cannot be compressed.
    """
    config, D = model.config, model.config.head_dim
    if not all(1 <= rank <= D for pair in ranks for rank in pair):
        raise ValueError(f"--rank: must be from 1 to {D}, the width of a head of this model")
    if any(change["by"] == "eigen" for change in checkpoint.changes(model)):
        raise ValueError("--rank, --error: the model is compressed already; "
                         "compress the one that it came from")
    for block, (k_rank, v_rank) in zip(model.blocks, ranks, strict=True):
        attn, kind = block.attn, type(block.attn)
        if kind in NARROW:
            attn = block.attn = NARROW[kind](config, attn.layer, k_rank)
        elif not issubclass(kind, (SharedAttention, CrossLayerAttention)):
            raise ValueError(f"--rank, --error: cannot compress layers of the kind {kind.__name__};"
                             " take a model of another --share_kind")
        widths = attn.widths._replace(v=attn.widths.v * v_rank // D)
        resize(attn, widths, attn.H * v_rank)

# ---- what is lost in which direction: S and M ----

def outer_sum(rows, G):
    """rows (N, H, …, D) → Σ row rowᵀ of all in each group of heads, (G, D, D), in float64."""
    rows = rows.reshape(len(rows), G, -1, rows.size(-1))
    of_windows = rows.mT @ rows                                 # (N, G, D, D)
    return of_windows.cpu().double().sum(0)

def layer_moments(config, block, x, step, below, generator):
    """A block and what it is given, as walk() yields it → (S, M) of its keys, None if it makes
    none, and (S, M) of its values; (G, D, D) each, in float64."""
    attn, seen = block.attn, []
    H, G = attn.H, attn.G
    h = block.norm(x)
    watching = replace(step, watch=seen.append)
    z, _ = attn.heads(h, watching, below)                       # (N, H, T, D)
    y = attn.out(merge_heads(z))                                # (N, T, C)
    length = (x + y).float().norm(dim=-1)                       # (N, T): u^-½
    length = length[:, None, :, None]
    z = z.float()
    W = attn.out.weight.float()
    W = W.unflatten(1, (H, -1)).transpose(0, 1)                 # (H, C, D)
    S = outer_sum(z / length, G)
    M = outer_sum(W[None], G) * G / H
    if type(attn) not in NARROW:
        return None, (S, M)
    heads = split_heads(attn.qkv(h).float(), H + 2 * G)         # all are D wide
    q, k, v = heads.split((H, G, G), dim=1)                     # (N, H or G, T, D)
    k = k.repeat_interleave(H // G, dim=1)                      # (N, H, S, D)
    v = v.repeat_interleave(H // G, dim=1)
    apart = torch.cdist(z @ W.mT, v @ W.mT)                     # (N, H, T, S)
    P = seen[0].float()
    w = (P * apart / length).square()
    w += 1e-20 * step.mask.exp()                                # no row may be all zeros
    return key_moments(config, q, k, w, generator), (S, M)

def key_moments(config, q, k, w, generator):
    """q, k (N, H, T, D), not rotated, w (N, H, T, S = T) → S and M of the keys."""
    (N, H, T, D), G = q.shape, config.n_kv_head
    of_query = w.sum(3).sqrt()[..., None]                       # (N, H, T, 1)
    of_key = w.sum(2).sqrt()[..., None]                         # (N, H, S, 1)
    rows = w.flatten(0, 2).cpu()
    s = torch.multinomial(rows, SAMPLES, replacement=True, generator=generator)
    s = s.view(N, H, T, SAMPLES).to(q.device)
    t = torch.arange(T, device=q.device)[:, None]
    weighted = (q * of_query)[:, :, :, None]                    # (N, H, T, 1, D)
    turned = rotate(weighted, rope_angles(config, t - s))       # (N, H, T, SAMPLES, D)
    total = SAMPLES * D * outer_sum(of_query, G)                # (G, 1, 1)
    return outer_sum(k * of_key, G), outer_sum(turned, G) / total

def moments(model, windows):
    """windows (N, T) of a calibration text → layer_moments() of all layers. In a span of CLA, all
    layers get the same, as they read the same values, in one basis."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    found = [layer_moments(config, *given, generator) for given in walk(model, windows)]
    spans = config.spans if config.share_kind == "kv" else []
    for a, b in spans:
        keys, _ = found[a]
        _, values = zip(*found[a:b + 1])
        S, M = zip(*values)
        n = len(values)
        found[a:b + 1] = [(keys, (sum(S), sum(M) / n))] * n
    return found

# ---- the best subspaces ----

def basis(S, M):
    """S, M (G, D, D) → E and F (G, D, D), of which the first r rows are the best of rank r, and the
    eigenvalues (G, D), falling."""
    values, U = torch.linalg.eigh(M)
    least = 1e-4 * values.amax(-1, keepdim=True)                # for directions that M does not see
    values = values.clamp(min=0) + least
    scale = values.sqrt()[:, None]
    root = (U * scale) @ U.mT
    inverse = (U / scale) @ U.mT
    errors, U = torch.linalg.eigh(root @ S @ root)
    errors = errors.flip(-1).clamp(min=0)
    U = U.flip(-1)
    return U.mT @ root, U.mT @ inverse, errors

def numbers_to_keep(errors_k, errors_v, budget):
    """What dropping each number of a key and of a value costs, (D,) each, falling → how many of
    either to keep, at least one, so that those dropped cost no more together than the budget."""
    D = len(errors_v)
    errors, order = torch.cat((errors_k, errors_v)).sort()
    kept = order[errors.cumsum(0) > budget]
    n_k = (kept < D).sum().item()
    n_v = len(kept) - n_k
    return [max(n_k, 1), max(n_v, 1)]

def fold(E, W):
    """E (G, r, D), the rows W (G·D, C) of G heads → E W of each head (G·r, C)."""
    W = W.view(len(E), -1, W.size(1))
    folded = E.to(W) @ W
    return folded.flatten(0, 1)

def narrow_tensors(attn, k_rank, v_rank, keys, values):
    """A layer's tensors that change, by name. keys, values: their basis(); keys may be None."""
    q, k, v = attn.qkv.weight.split(attn.widths)                # (n, C) each
    E, F, _ = values
    D, tensors = E.size(2), {}
    if v_rank < D:
        v = fold(E[:, :v_rank], v) if len(v) else v
        W = attn.out.weight.unflatten(1, (attn.G, -1, D))       # (C, G, H/G, D)
        F = F[:, :v_rank].to(W)
        out = torch.einsum("cghd,grd->cghr", W, F)
        tensors["out.weight"] = out.flatten(1)                  # (C, H·r)
    if type(attn) in NARROW and k_rank < D:
        E, F, _ = keys
        k = fold(E[:, :k_rank], k)
        tensors["restore"] = F[:, :k_rank].to(k)
    made = torch.cat((q, k, v))
    if len(made) < sum(attn.widths):
        tensors["qkv.weight"] = made
    return tensors

@torch.no_grad()
def compress(model, windows, rank=None, error=None):
    """A model → one that caches fewer numbers per head, in eval mode, in the same memory where it
    can. Raises ValueError as rebuild().

    windows (N, T): of a calibration text. rank: how many numbers each head keeps of each key and
    value; or error: how far the stream after a layer's attention may be off, in the root mean
    square over tokens of |y' − y| / |x + y|, as predicted above; each layer keeps what that takes.
    """
    D, ranks, tensors = model.config.head_dim, [], {}
    shares_weights = model.config.share_kind == "weights"       # for CLA, see moments()
    anchor_of = anchors(model.config) if shares_weights else {}
    n_reuse = Counter(anchor_of.values())                       # of each anchor
    lost = {}               # layer → the error of its dropped key numbers, in this layer alone
    for layer, (keys, values) in enumerate(moments(model, windows)):
        keys = keys and basis(*keys)
        values = basis(*values)
        k_rank = v_rank = rank
        if error:
            errors_k = keys[2].sum(0) if keys else torch.zeros(D)
            errors_v = values[2].sum(0)
            errors_of_span = (1 + n_reuse[layer]) * errors_k
            inherited = lost.get(anchor_of.get(layer), 0.0)     # with the anchor's weights
            budget = error**2 * windows.numel() - inherited
            k_rank, v_rank = numbers_to_keep(errors_of_span, errors_v, budget)
            lost[layer] = errors_k[k_rank:].sum().item()
        k_rank = k_rank if keys else D
        ranks.append([k_rank, v_rank])
        attn = model.blocks[layer].attn
        changed = narrow_tensors(attn, k_rank, v_rank, keys, values)
        tensors |= {f"blocks.{layer}.attn.{name}": t for name, t in changed.items()}
    new = rebuilt(model, "eigen", ranks=ranks)
    return fill(new, model, tensors)

# ---- command ----

def main():
    flags = parser(__doc__, "eigen")
    flags.flag("rank", count, None, "numbers that each head keeps per key and per value", "none")
    flags.flag("error", at_least(float, 1e-6), None, "give this or --rank: how far a layer's "
               "output may be off, as a fraction of the stream it goes into; each layer keeps what "
               "that takes", "none")
    flags.switch("refit", "refit the output projections to what the layers of MODEL put out")
    add_calibration(flags)
    args = flags.parse_args()
    if (args.rank is None) == (args.error is None):
        raise ValueError("--rank, --error: give one of them")

    def technique(model, windows):
        any_rank = args.rank or 1
        ranks = [[any_rank, any_rank]] * model.config.n_layer
        rebuilt(model, "eigen", ranks=ranks)                    # refused early, if at all
        idx = windows()
        small = compress(model, idx[::3], args.rank, args.error)
        return refit(small, model, idx) if args.refit else small

    rewrite(args, technique)

if __name__ == "__main__":
    run_main("eigen")
