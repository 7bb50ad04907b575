"""Shared Attention for a model that was trained without: which head takes over which, and refit.

    python -m minisa.axes.heads smollm2 --share=26-28 --heads=mix --refit --out=out/mixed
    python -m minisa.axes.heads out/weights-1-3 --heads=mix --out=out/mix   for train.py to learn

P_l[h] (T, T) is what head h of layer l attends with on a window of T tokens, and ⟨A, B⟩ = Σ A·B
over all entries. Head h of a reuse layer can take one of these of its anchor a:

    --heads=same     P_a[h]
    --heads=match    P_a[g], with the largest cosine ⟨P_l[h], P_a[g]⟩ / |P_l[h]| |P_a[g]|
    --heads=mix      Σ_g w_g P_a[g], with the w ≥ 0, Σ w = 1, of least |P_l[h] − Σ_g w_g P_a[g]|²

A mixture costs a layer H² numbers, and 2·H²·S FLOPs per token; a match costs nothing.

--refit: under other weights P, the values z_t that the heads of a layer sum up for token t differ
from those that its output projection W was trained on. The W' of least

    Σ_t |W' z_t − y_t|² + λ |W' − W|²

takes W's place, where y_t is what the layer puts out in the model that it came from. This costs
nothing when the model runs.
"""

import torch
import torch.nn as nn

from minisa.axes.common import calibration, parser, rewrite, run_main, walk
from minisa.decode import shared_attention
from minisa.kit import checkpoint
from minisa.model import SHARE_KINDS, CrossLayerAttention, SharedAttention

# ---- layers ----

def matched_in_numpy(now, layer, x, below):
    """decode.shared_attention() with P[source]."""
    P, keys, values = below                                     # P (G, H/G, S)
    chosen = P.reshape(len(layer.source), -1)[layer.source]     # (H, S)
    y, _ = shared_attention(now, layer, x, (chosen.reshape(P.shape), keys, values))
    return y, below

def mixed_in_numpy(now, layer, x, below):
    """decode.shared_attention() with mix · P."""
    P, keys, values = below                                     # P (G, H/G, S)
    mixed = layer.mix @ P.reshape(len(layer.mix), -1)           # (H, S)
    y, _ = shared_attention(now, layer, x, (mixed.reshape(P.shape), keys, values))
    return y, below

class Matched(SharedAttention):
    """A reuse layer in which head h takes P of the anchor's head source[h]."""
    in_numpy = matched_in_numpy

    def forward(self, x, step, P):
        return super().forward(x, step, P[:, self.source])[0], P

    def check(self):
        if not 0 <= self.source.min() <= self.source.max() < self.H:
            raise ValueError(f"a head takes over one that is not among 0 to {self.H - 1}")

class Mixed(SharedAttention):
    """A reuse layer in which head h takes Σ_g mix[h, g] · P of the anchor's head g."""
    in_numpy = mixed_in_numpy

    def forward(self, x, step, P):
        mixed = (self.mix @ P.flatten(2)).view_as(P)            # (B, H, T, S)
        return super().forward(x, step, mixed)[0], P

    def extra_cost(self, T, S):
        return self.H**2, 2 * self.H**2 * S * T

def plain_reuse_layers(model, flag):
    """The reuse layers of a model. Raises ValueError, naming the flag, unless it has some, and they
    are those of plain Shared Attention."""
    attns = [block.attn for block in model.blocks if isinstance(block.attn, SharedAttention)]
    if not attns:
        raise ValueError(f"--{flag}: is about layers that share attention weights; "
                         "give --share, and --share_kind=weights")
    if any(type(attn) is not SharedAttention for attn in attns):
        changed = ", ".join(change["by"] for change in checkpoint.changes(model))
        raise ValueError(f"--{flag}: the reuse layers of this model were changed already, by "
                         f"{changed}; take the model that it came from")
    return attns

def rebuild(model, heads):
    """Make all reuse layers Matched ("match") or Mixed ("mix"), in place; each head starts with its
    anchor's own. Raises ValueError if `heads` is neither, or as plain_reuse_layers()."""
    if heads not in ("match", "mix"):
        raise ValueError(f"--heads={heads}: must be match or mix")
    for attn in plain_reuse_layers(model, f"heads={heads}"):
        like = attn.out.weight
        if heads == "match":
            attn.__class__ = Matched
            attn.register_buffer("source", torch.arange(attn.H, device=like.device))
        else:
            attn.__class__ = Mixed
            attn.mix = nn.Parameter(torch.eye(attn.H, dtype=like.dtype, device=like.device))

# ---- which head takes over which ----

@torch.no_grad()
def head_products(model, windows):
    """windows (N, T) → (L, H, L, H) in float64: ⟨P_l[h], P_m[g]⟩, summed over the windows."""
    L, H = model.config.n_layer, model.config.n_head
    total = torch.zeros(L * H, L * H, dtype=torch.float64)
    for window in windows:
        P = torch.stack(model.attention_weights(window[None]))          # (L, 1, H, T, T)
        rows = P.view(L * H, -1).float()
        total += (rows @ rows.mT).cpu()
    return total.view(L, H, L, H)

def nearest_on_simplex(v):
    """v (R, H) → for each row the nearest w with w ≥ 0, Σ w = 1 (Duchi et al. 2008, figure 1)."""
    falling = v.sort(dim=1, descending=True).values
    # if only the k largest stay above 0, each of them must give up this much
    excess = (falling.cumsum(1) - 1) / torch.arange(1, v.size(1) + 1)
    k = (falling > excess).sum(1, keepdim=True)
    return (v - excess.gather(1, k - 1)).clamp(min=0)

def nearest_mixture(among, between, steps=1000):
    """For each row b of `between` (R, H), the w with w ≥ 0, Σ w = 1 that minimises w A wᵀ − 2 w·b,
    where A is `among` (H, H), by projected gradient descent with momentum (FISTA, Beck & Teboulle
    2009). → (R, H)"""
    rate = 1 / torch.linalg.matrix_norm(among, 2)
    w = ahead = torch.full_like(between, 1 / len(among))
    momentum = 1.0
    for _ in range(steps):
        new = nearest_on_simplex(ahead - rate * (ahead @ among - between))
        following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead = new + (momentum - 1) / following * (new - w)
        w, momentum = new, following
    return w

def share(model, spans, heads="same", products=None, share_kind="weights"):
    """A model → one whose spans, as "1-3,5-7", share zero-shot, in eval mode, in the same memory.

    heads: "same", "match" or "mix". products: head_products() of the model on a calibration text,
    by which the heads are chosen; None: each starts with the same head.
    Raises ValueError if the model cannot share that way.
    """
    shared = checkpoint.reconfigure(model, share=spans, share_kind=share_kind)
    if heads == "same":
        return shared
    checkpoint.change(shared, "heads", heads=heads)
    for a, b in shared.config.spans if products is not None else []:
        among = products[a, :, a]                                       # (H, H)
        for layer in range(a + 1, b + 1):
            attn, between = shared.blocks[layer].attn, products[layer, :, a]
            if heads == "match":
                attn.source.copy_((between / among.diagonal().sqrt()).argmax(1))
            else:
                attn.mix.data = nearest_mixture(among, between).to(attn.mix)
    return shared

# ---- refit ----

def head_outputs(block, x, step, below):
    """What a block, given what walk() yields, has its heads sum up, before attn.out: (B, T, n)."""
    out, block.attn.out = block.attn.out, nn.Identity()
    try:
        return block.attn(block.norm(x), step, below)[0]
    finally:
        block.attn.out = out

@torch.no_grad()
def refit(shared, model, windows, ridge=0.1):
    """Refit the output projections of `shared`, which was made of `model`, on windows (N, T) of a
    calibration text, in place: of its reuse layers, and of all whose keys or values are narrower.

    The layers are taken in turn, each on what it sees in `shared`, refitted below it. ridge: λ, in
    means of the diagonal of Σ z zᵀ. Raises ValueError if `model` shares, and not as `shared` does.
    """
    have, want = ((m.config.share, m.config.share_kind) for m in (model, shared))
    if have[0] and have != want:
        raise ValueError("--refit: needs the outputs of full attention, but the model already "
                         f"shares {have[0]}")
    reuses = (SharedAttention, CrossLayerAttention)
    for (full, x, *rest), (block, *given) in zip(walk(model, windows), walk(shared, windows)):
        out = block.attn.out
        if isinstance(block.attn, reuses) or block.attn.widths != full.attn.widths:
            y, _ = full.attn(full.norm(x), *rest)                      # (N, T, C)
            z = head_outputs(block, *given)                             # (N, T, n)
            missing, z = (y - out(z)).float(), z.float()
            zz, zm = ((z.mT @ other).cpu().double().sum(0) for other in (z, missing))
            zz.diagonal().add_(ridge * zz.diagonal().mean())
            more = torch.linalg.solve(zz, zm).mT.to(out.weight)         # (C, n)
            out.weight = nn.Parameter(out.weight + more)    # not in place: `model` may use it too
    return shared

# ---- command ----

def main():
    flags = parser(__doc__, "heads")
    flags.flag("share", str, "", "spans of layers that are to share, as 1-3 or 1-3,5-7",
               shown="those that the model shares already")
    flags.flag("share_kind", str, "weights", "what they share: weights (Shared Attention) or kv "
               "(Cross-Layer Attention), which needs --heads=same", choices=[*SHARE_KINDS])
    flags.flag("heads", str, "same", "what a head of a reuse layer takes: the anchor's head of the "
               "same number, the one that is most alike, or a mixture",
               choices=["same", "match", "mix"])
    flags.switch("refit", "refit the output projections of reuse layers")
    args = flags.parse_args()

    def technique(model, data):
        own = model.config.share
        spans, kind = args.share or own, args.share_kind if args.share else model.config.share_kind
        if not spans:
            raise ValueError("--share: name the spans that are to share, as --share=26-28")
        if spans == own and (args.heads != "mix" or args.refit):
            raise ValueError(f"--share: the model shares {own} already, with no full attention "
                             "there to be fitted to; only --heads=mix is possible, for train.py "
                             "to learn")
        shared = share(model, spans, args.heads, share_kind=kind)       # or refused, before work
        if spans == own or (args.heads == "same" and not args.refit):
            return shared
        windows = calibration(model, data())
        if args.heads != "same":
            shared = share(model, spans, args.heads, head_products(model, windows[::3]), kind)
        return refit(shared, model, windows) if args.refit else shared

    rewrite(args, technique)

if __name__ == "__main__":
    run_main("heads")
