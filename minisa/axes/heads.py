"""Shared Attention for a model trained without it: which head reuses which, and refit.

    python -m minisa.axes.heads smollm2 --share=26-28 --heads=mix --refit --out=out/mixed
    python -m minisa.axes.heads out/weights-1-3 --heads=mix --out=out/mix   train.py then learns it

P_l[h] (T, T) are the attention weights of head h of layer l on a window of T tokens, and
⟨A, B⟩ = Σ A·B over all entries. Head h of a reuse layer can attend with one of these of its
anchor a:

    --heads=same     P_a[h]
    --heads=match    P_a[g], with the largest cosine ⟨P_l[h], P_a[g]⟩ / |P_l[h]| |P_a[g]|
    --heads=mix      Σ_g w_g P_a[g], with the w ≥ 0, Σ w = 1, of least |P_l[h] − Σ_g w_g P_a[g]|²

A mixture costs a layer H² numbers, and 2·H²·S FLOPs per token; a match costs nothing.

--refit: under other weights P, the weighted sums z_t of a layer's heads for token t differ from
those that its output projection W was trained on. So W is replaced by the W' that minimizes

    Σ_t |W' z_t − y_t|² + λ |W' − W|²

where y_t is the output of the same layer in the original model. This costs nothing at run time.
"""

import torch
import torch.nn as nn

from minisa.axes.common import (
    add_calibration,
    anchors,
    fill,
    parser,
    rebuilt,
    replace_reuse_layers,
    rewrite,
    run_main,
    walk,
)
from minisa.decode import shared_attention
from minisa.kit import checkpoint
from minisa.model import SharedAttention, merge_heads

# ---- layers ----

def in_numpy_by(recombine):
    """The recombine() of a layer → the layer's attention, for minisa/decode.py."""

    def attention(decoder, layer, h, below):
        P, keys, values = below                                 # P (G, H/G, S)
        heads = P.reshape(-1, P.shape[-1])                      # (H, S)
        recombined = recombine(layer, heads).reshape(P.shape)
        y, _ = shared_attention(decoder, layer, h, (recombined, keys, values))
        return y, below
    return attention

class Recombined(SharedAttention):
    """A reuse layer that attends with recombine(P), where P (..., H, n) is the anchor's. The method
    works in torch and in numpy. A new layer recombines nothing, even if it is built on the meta
    device: hence device="cpu" below."""

    def heads(self, h, step, below):
        P = below
        recombined = self.recombine(P.flatten(2))               # (B, H, T·S)
        y, _ = super().heads(h, step, recombined.view_as(P))
        return y, below

class Matched(Recombined):
    """Head h reuses P of the anchor's head source[h]."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.register_buffer("source", torch.arange(self.H, device="cpu"))

    def recombine(self, P):
        return P[..., self.source, :]

    def check(self):
        if not 0 <= self.source.min() <= self.source.max() < self.H:
            raise ValueError(f"a head reuses one that is not among 0 to {self.H - 1}")

    in_numpy = in_numpy_by(recombine)

class Mixed(Recombined):
    """Head h reuses Σ_g mix[h, g] · P_g over the anchor's heads g."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.mix = nn.Parameter(torch.eye(self.H, device="cpu"))

    def recombine(self, P):
        return self.mix @ P

    def extra_cost(self, T, S):
        return self.H**2, 2 * self.H**2 * S * T

    in_numpy = in_numpy_by(recombine)

def rebuild(model, heads):
    """Make all reuse layers Matched ("match") or Mixed ("mix"). Raises ValueError if `heads` is
    neither, or as replace_reuse_layers()."""
    if heads not in ("match", "mix"):
        raise ValueError(f"--heads={heads}: must be match or mix")
    kind = Matched if heads == "match" else Mixed
    replace_reuse_layers(model, kind, f"heads={heads}")

# ---- which head reuses which ----

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
    counts = torch.arange(1, v.size(1) + 1)
    excess = (falling.cumsum(1) - 1) / counts
    k = (falling > excess).sum(1, keepdim=True)
    of_k = excess.gather(1, k - 1)
    return (v - of_k).clamp(min=0)

def nearest_mixture(among, between):
    """For each row b of `between` (R, H), the w with w ≥ 0, Σ w = 1 that minimizes w A wᵀ − 2 w·b,
    where A is `among` (H, H), by projected gradient descent with momentum (FISTA, Beck & Teboulle
    2009). → (R, H)"""
    rate = 1 / torch.linalg.matrix_norm(among, 2)
    w = ahead = torch.full_like(between, 1 / len(among))
    momentum = 1.0
    for _ in range(1000):
        new = nearest_on_simplex(ahead - rate * (ahead @ among - between))
        following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead = new + (momentum - 1) / following * (new - w)
        w, momentum = new, following
    return w

def share(model, spans, heads="same", products=None, share_kind="weights"):
    """A model → one whose spans, as "1-3,5-7", share zero-shot, in eval mode, in the same memory.

    heads: "same", "match" or "mix". products: head_products() of the model on a calibration text,
    by which the heads are chosen; None: each starts with the anchor's head of its own number.
    Raises ValueError if the model cannot share that way.
    """
    shared = checkpoint.reconfigure(model, share=spans, share_kind=share_kind)
    if heads == "same":
        return shared
    new, tensors = rebuilt(shared, "heads", heads=heads), {}
    choices = anchors(shared.config) if products is not None else {}
    for layer, anchor in choices.items():
        among = products[anchor, :, anchor]                             # (H, H)
        between = products[layer, :, anchor]
        name = f"blocks.{layer}.attn."
        if heads == "match":
            cosines = between / among.diagonal().sqrt()         # of each row, up to a factor
            tensors[name + "source"] = cosines.argmax(1)
        else:
            tensors[name + "mix"] = nearest_mixture(among, between)
    return fill(new, shared, tensors)

# ---- refit ----

@torch.no_grad()
def attention_outputs(model, windows, layers):
    """windows (N, T) → {layer: y (N, T, C), the output of its attention}, for some layers."""
    found = {}
    for block, x, step, below in walk(model, windows):
        layer = block.attn.layer
        if layer in layers:
            found[layer], _ = block.attn(block.norm(x), step, below)
    return found

@torch.no_grad()
def refit(shared, model, windows, ridge=0.1, outputs=None):
    """Refit the output projections of `shared`, which was made from `model`, on windows (N, T) of a
    calibration text, in place: of its reuse layers, and of all whose keys or values are narrower.

    The layers are taken in turn, each on what it sees in `shared`, refitted below it. ridge: λ, in
    means of the diagonal of Σ z zᵀ. outputs: attention_outputs() of `model`, if they are known.
    Raises ValueError if `model` shares, and not as `shared` does.
    """
    own, new = model.config, shared.config
    if own.share and (own.share, own.share_kind) != (new.share, new.share_kind):
        raise ValueError("--refit: needs the outputs of full attention, but the model already "
                         f"shares {own.share}")
    pairs = zip(model.blocks, shared.blocks)
    layers = {after.attn.layer for before, after in pairs
              if after.attn.layer in anchors(new) or after.attn.widths != before.attn.widths}
    outputs = outputs or attention_outputs(model, windows, layers)
    for block, x, step, below in walk(shared, windows):
        attn = block.attn
        if attn.layer in layers:
            z, _ = attn.heads(block.norm(x), step, below)       # (N, H, T, d)
            z = merge_heads(z)                                  # (N, T, n)
            missing = (outputs[attn.layer] - attn.out(z)).float()
            more = ridge_regression(z.float(), missing, ridge)  # (C, n)
            W = attn.out.weight
            attn.out.weight = nn.Parameter(W + more.to(W))      # `model` may use the old one too
    return shared

def ridge_regression(z, y, ridge):
    """z (N, T, n), y (N, T, C) → the W (C, n) of least Σ |W z − y|² + λ |W|²; ridge: as above."""
    zz = (z.mT @ z).cpu().double().sum(0)                       # (n, n)
    zy = (z.mT @ y).cpu().double().sum(0)                       # (n, C)
    zz.diagonal().add_(ridge * zz.diagonal().mean())
    return torch.linalg.solve(zz, zy).mT

# ---- command ----

def main():
    flags = parser(__doc__, "heads")
    flags.flag("share", str, "", "spans of layers that will share, as 1-3 or 1-3,5-7",
               shown="the model's own spans")
    checkpoint.add_share_kind(flags)
    flags.flag("heads", str, "same", "what a head of a reuse layer reuses: the anchor's head of "
               "the same number; or, of weights, its most similar head, or a mixture",
               choices=["same", "match", "mix"])
    flags.switch("refit", "refit the output projections of reuse layers")
    add_calibration(flags)
    args = flags.parse_args()

    def technique(model, windows):
        own = model.config.share
        spans = args.share or own
        kind = args.share_kind if args.share else model.config.share_kind
        if not spans:
            raise ValueError("--share: name the spans that are to share, as --share=26-28")
        if spans == own and (args.heads != "mix" or args.refit):
            raise ValueError(f"--share: the model shares {own} already, so there is no full "
                             "attention to fit to; only --heads=mix is possible, for train.py to "
                             "learn")
        shared = share(model, spans, args.heads, share_kind=kind)       # refused early, if at all
        if spans == own or (args.heads == "same" and not args.refit):
            return shared
        idx = windows()
        if args.heads != "same":
            products = head_products(model, idx[::3])
            shared = share(model, spans, args.heads, products, kind)
        return refit(shared, model, idx) if args.refit else shared

    rewrite(args, technique)

if __name__ == "__main__":
    run_main("heads")
