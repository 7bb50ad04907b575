"""Eigen Attention (Saxena et al. 2024, arXiv:2408.05646): fewer numbers per head in the KV cache.

    python -m minisa.axes.eigen smollm2 --error=0.025 --refit --out=out/small

The keys of a head, D numbers each, lie near a subspace of r < D dimensions, and so do its values.
With E (r, D) and F (r, D), cache the r numbers c = E k in the place of k, and restore k ≈ Fᵀ c when
it is read. The same for v. Both fold into the weights of a trained model:

    values    c = (E W_v) x    P c (r numbers) goes into W_out Fᵀ: nothing to restore
    keys      c = (E W_k) x    k = Fᵀ c is restored, then rotated (RoPE), for all visible tokens:
                               2·G·r·D·S FLOPs; none in a reuse layer of Shared Attention

Which subspace? The paper takes that of the largest singular values. But an error of k matters only
along the queries that meet it, and one of v only as far as W_out lets it through. So each has a
metric M (D, D). With S = E[k kᵀ] and the r largest eigenvectors U (D, r) of M^½ S M^½, the subspace
that minimises E|M^½ (k − Fᵀ E k)|² is

    E = Uᵀ M^½        Fᵀ = M^-½ U        error: the sum of the other eigenvalues

A head sums z_t = Σ_s P_ts v_s for the query of token t over keys s; its part W_h of W_out makes
W_h z_t of it; y_t is the sum of that over the heads, which the layer adds to the stream x_t. To
first order, an error δk_s of a key changes W_h z_t by Σ_s W_h (v_s − z_t) P_ts q_tsᵀ δk_s / √D,
where q_ts is q_t rotated by t − s. Hence, as the stream is normalised wherever it is read,

    weights   w_ts = u_t P_ts² |W_h (v_s − z_t)|²    u_t = 1 / |x_t + y_t|²
    keys      S = Σ_ts w_ts k_s k_sᵀ    M = Σ_ts w_ts q_ts q_tsᵀ / (D Σ_ts w_ts), from samples of s
    values    S = Σ_t u_t z_t z_tᵀ      M = W_hᵀ W_h

summed over all heads that share the keys and values, but for the values' M, which is their mean. So
both errors are parts of the stream, and comparable: numbers are dropped in the order of their
eigenvalues, keys and values of a layer together, while the mean over t of |δy_t|² / |x_t + y_t|²
stays within error². All heads of a layer keep as many. Errors of two keys, or of two heads, count
as independent, and what an anchor's error does to the layers that share with it does not count.
"""

from dataclasses import replace

import torch
import torch.nn as nn

from minisa.axes.common import calibration, parser, rewrite, run_main, walk
from minisa.axes.heads import head_outputs, refit
from minisa.kit import checkpoint
from minisa.kit.cli import amount, count
from minisa.model import (
    Anchor,
    Attention,
    CrossLayerAttention,
    KVAnchor,
    SharedAttention,
    rope_angles,
    rotate,
    split_heads,
)

KNOWN = Attention, Anchor, KVAnchor, SharedAttention, CrossLayerAttention     # and those of axes
SAMPLES = 4     # keys drawn for each query and head

# ---- layers ----

class Narrow:
    """What a layer with keys becomes: its cache holds k_rank numbers of each key, not rotated, and
    v_rank of each value. `restore` (G, k_rank, D) is F; None if the keys are whole."""

    def project(self, x, step):
        """x (B, T, C) → q (B, H, T, D), and the visible k (B, G, S, D) and v (B, G, S, v_rank)."""
        q, k, v = self.qkv(x).split(self.widths, dim=2)
        q, k = q.contiguous(), k.contiguous()                   # rotate() needs rows of even length
        q, k = rotate(split_heads(q, self.H), step.rope), split_heads(k, self.G)
        v = step.remember("v", self.layer, split_heads(v, self.G))
        if self.restore is None:
            return q, step.remember("k", self.layer, rotate(k, step.rope)), v
        k = step.remember("k", self.layer, k) @ self.restore    # (B, G, S, D)
        return q, rotate(k, self.rope_of_keys(step)), v

    def rope_of_keys(self, step):
        """RoPE's (S, D/2), or (B, 1, S, D/2), of the positions of the visible keys."""
        if step.cache is None:
            return step.rope
        if hasattr(step.cache, "key_positions"):                # each layer has tokens of its own
            return rope_angles(self.config, step.cache.key_positions(self.layer))
        if not hasattr(step, "rope_of_keys"):                   # the same for all layers
            step.rope_of_keys = rope_angles(self.config, step.cache.positions)
        return step.rope_of_keys

    @property
    def keys_handed_up(self):
        """Numbers of a cached key that a reuse layer of CLA reads: none, if it is restored."""
        return self.widths[1] if self.restore is None else 0

    def extra_cost(self, T, S):
        restoring = 0 if self.restore is None else self.restore.numel()
        return restoring, 2 * restoring * S

NARROW = {kind: type(f"Narrow{kind.__name__}", (Narrow, kind), {})
          for kind in (Attention, Anchor, KVAnchor)}

def rebuild(model, ranks):
    """Give all layers keys and values of fewer numbers, in place.

    ranks: for each layer how many numbers per head, [of a key, of a value]; for what it does not
    make, any. Raises ValueError if they do not fit, or if the model is compressed already.
    """
    config, D = model.config, model.config.head_dim
    refuse(model)
    if len(ranks) != config.n_layer or not all(1 <= r <= D for pair in ranks for r in pair):
        raise ValueError(f"ranks: must be {config.n_layer} pairs of numbers from 1 to {D}")
    like = {"device": model.embed.weight.device, "dtype": model.embed.weight.dtype}
    for block, (k_rank, v_rank) in zip(model.blocks, ranks):
        attn = block.attn
        n_q, n_k, n_v = attn.widths
        if type(attn) in NARROW:
            attn.__class__, attn.config = NARROW[type(attn)], config
            shape, n_k = (attn.G, k_rank, D), attn.G * k_rank
            attn.restore = nn.Parameter(torch.zeros(shape, **like)) if k_rank < D else None
        attn.widths = [n_q, n_k, n_v * v_rank // D]
        attn.qkv = nn.Linear(config.n_embd, sum(attn.widths), bias=False, **like)
        attn.out = nn.Linear(attn.H * v_rank, config.n_embd, bias=False, **like)

def refuse(model, rank=None):
    """Raises ValueError if a model cannot be compressed."""
    D = model.config.head_dim
    if rank and rank > D:
        raise ValueError(f"--rank={rank}: a head of this model is only {D} wide")
    if any(change["by"] == "eigen" for change in checkpoint.changes(model)):
        raise ValueError("--rank, --error: the model is compressed already; "
                         "compress the one that it came from")
    for block in model.blocks:
        kind = type(block.attn)
        if kind not in KNOWN and not kind.__module__.startswith("minisa.axes."):
            raise ValueError(f"--rank, --error: layers of the kind {kind.__name__} are not known "
                             f"here; known are {', '.join(known.__name__ for known in KNOWN)}")

# ---- what is lost in which direction: S and M ----

def outer_sum(rows):
    """rows (N, G, n, D) → Σ row rowᵀ over N and n, (G, D, D), in float64 on the CPU."""
    return (rows.mT @ rows).cpu().double().sum(0)

def key_moments(config, q, k, w, generator):
    """q (N, H, T, D), k (N, G, T, D), not rotated, w (N, H, T, S = T) → S and M of the keys."""
    (N, H, T, D), G = q.shape, k.size(1)
    of_query, of_key = w.sum(3), w.sum(2).view(N, G, -1, T).sum(2)      # (N, H, T), (N, G, S)
    S = outer_sum(k * of_key.sqrt()[..., None])
    s = torch.multinomial(w.flatten(0, 2).cpu(), SAMPLES, replacement=True, generator=generator)
    s = s.view(N, H, T, SAMPLES).to(q.device)
    distance = torch.arange(T, device=q.device)[:, None] - s
    q = rotate(q[:, :, :, None].expand(*s.shape, D), rope_angles(config, distance))
    q = q * (of_query / SAMPLES).sqrt()[..., None, None]                # (N, H, T, SAMPLES, D)
    total = of_query.view(N, G, -1).sum((0, 2)).cpu().double()          # (G,)
    return S, outer_sum(q.reshape(N, G, -1, D)) / (D * total)[:, None, None]

def layer_moments(config, block, x, step, below, generator):
    """A block and what it is given, as walk() yields it → (S, M) of its keys, None if it makes
    none, and (S, M) of its values; (G, D, D) each, in float64."""
    attn, G, H, seen = block.attn, block.attn.G, block.attn.H, []
    z = head_outputs(block, x, replace(step, watch=seen.append), below)         # (N, T, H·D)
    u = (x + attn.out(z)).float().square().sum(-1).reciprocal()[:, None, :, None]   # (N, 1, T, 1)
    z = split_heads(z, H).float()                                               # (N, H, T, D)
    N, D = len(z), z.size(3)
    W = attn.out.weight.view(-1, H, D).transpose(0, 1).float()                  # (H, C, D)
    S_v, M_v = outer_sum((z * u.sqrt()).reshape(N, G, -1, D)), outer_sum(W.reshape(1, G, -1, D))
    values = S_v, M_v * G / H
    if type(attn) not in NARROW:
        return None, values
    parts = attn.qkv(block.norm(x)).float().split(attn.widths, dim=2)
    q, k, v = (split_heads(part, n) for part, n in zip(parts, (H, G, G)))
    out_z = z @ W.mT                                                            # (N, H, T, C)
    out_v = v.repeat_interleave(H // G, 1) @ W.mT                               # (N, H, S, C)
    square_z, square_v = out_z.square().sum(-1)[..., None], out_v.square().sum(-1)[..., None, :]
    apart = square_z - 2 * out_z @ out_v.mT + square_v                          # (N, H, T, S)
    w = u * seen[0].float().square() * apart.clamp(min=0)
    w += 1e-20 * step.mask.exp()                                # no row may be all zeros
    return key_moments(config, q, k, w, generator), values

def moments(model, windows):
    """windows (N, T) of a calibration text → layer_moments() of all layers. In a span of CLA, all
    layers get the same, as they read the same values, in one basis."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    found = [layer_moments(config, *given, generator) for given in walk(model, windows)]
    for a, b in config.spans if config.share_kind == "kv" else []:
        length, keys, values = b - a + 1, found[a][0], [values for _, values in found[a:b + 1]]
        S, M = (sum(part) for part in zip(*values))
        found[a:b + 1] = [(keys, (S, M / length))] * length
    return found

# ---- the best subspaces ----

def basis(S, M):
    """S, M (G, D, D) → E and F (G, D, D), of which the first r rows are the best of rank r, and the
    eigenvalues (G, D), falling."""
    values, U = torch.linalg.eigh(M)
    least = 1e-4 * values.amax(-1, keepdim=True)                # for directions that M does not see
    values = values.clamp(min=0) + least
    root, inverse = (U * values.sqrt()[:, None]) @ U.mT, (U * values.rsqrt()[:, None]) @ U.mT
    errors, U = torch.linalg.eigh(root @ S @ root)
    U = U.flip(-1)
    return U.mT @ root, U.mT @ inverse, errors.flip(-1).clamp(min=0)

def numbers_to_keep(errors_k, errors_v, budget):
    """What dropping each number of a key and of a value costs, (D,) each, falling → how many of
    either to keep, at least one, so that those dropped cost no more together than the budget."""
    D = len(errors_v)
    errors, order = torch.cat((errors_k, errors_v)).sort()
    dropped = order[errors.cumsum(0) <= budget]
    n_k = (dropped < D).sum().item()
    return [D - min(n, D - 1) for n in (n_k, len(dropped) - n_k)]

def narrow_tensors(attn, k_rank, v_rank, keys, values):
    """A layer's tensors that change, by name. keys, values: their basis(); keys may be None."""
    q, k, v = attn.qkv.weight.split(attn.widths)                # (n, C) each
    (E, F, _), D, tensors = values, values[0].size(2), {}

    def fold(E, W):                                             # (G·D, C) → (G·r, C)
        return (E.to(W) @ W.view(len(E), -1, W.size(1))).flatten(0, 1)

    if v_rank < D:
        v = fold(E[:, :v_rank], v) if len(v) else v
        W = attn.out.weight
        by_head = W.view(len(W), attn.G, -1, D)                 # (C, G, H/G, D)
        out = torch.einsum("cghd,grd->cghr", by_head, F[:, :v_rank].to(W))
        tensors["out.weight"] = out.flatten(1)                  # (C, H·r)
    if type(attn) in NARROW and k_rank < D:
        E, F, _ = keys
        k, tensors["restore"] = fold(E[:, :k_rank], k), F[:, :k_rank].to(k)
    if len(q) + len(k) + len(v) < sum(attn.widths):
        tensors["qkv.weight"] = torch.cat((q, k, v))
    return tensors

@torch.no_grad()
def compress(model, windows, rank=None, error=None):
    """A model → one that caches fewer numbers per head, in eval mode, in the same memory where it
    can. Raises ValueError as refuse().

    windows (N, T): of a calibration text. rank: how many numbers each head keeps of each key and
    value; or error: how far the stream after a layer's attention may be off, in the root mean
    square over tokens of |y' − y| / |x + y|, as predicted above; each layer keeps what that takes.
    """
    D = model.config.head_dim
    refuse(model, rank)
    state, ranks = dict(model.state_dict()), []
    for layer, (keys, values) in enumerate(moments(model, windows)):
        keys, values = keys and basis(*keys), basis(*values)
        if rank:
            kept = [rank, rank]
        else:
            errors_k = keys[2].sum(0) if keys else torch.zeros(D)
            kept = numbers_to_keep(errors_k, values[2].sum(0), error**2 * windows.numel())
        ranks.append(kept if keys else [D, kept[1]])
        tensors = narrow_tensors(model.blocks[layer].attn, *ranks[-1], keys, values)
        state.update({f"blocks.{layer}.attn.{name}": t for name, t in tensors.items()})
    small = checkpoint.empty(model.config, checkpoint.changes(model))
    checkpoint.change(small, "eigen", ranks=ranks)
    small.load_state_dict(state, assign=True)
    return small.eval()

# ---- command ----

def main():
    flags = parser(__doc__, "eigen")
    flags.flag("rank", count, None, "numbers that each head keeps of each key and value", "none")
    flags.flag("error", amount, None, "give this or --rank: how far a layer's output may be off, "
               "as a fraction of the stream it goes into; each layer keeps what that takes", "none")
    flags.switch("refit", "refit the output projections to what the layers of MODEL put out")
    args = flags.parse_args()
    if (args.rank is None) == (args.error is None):
        raise ValueError("--rank, --error: give one of them")
    if args.error == 0:
        raise ValueError("--error=0: must be above 0")

    def technique(model, data):
        refuse(model, args.rank)
        windows = calibration(model, data())
        small = compress(model, windows[::3], args.rank, args.error)
        return refit(small, model, windows) if args.refit else small

    rewrite(args, technique)

if __name__ == "__main__":
    run_main("eigen")
