"""A reuse layer that corrects its anchor's attention weights, by a small query and key of its own.

    python -m minisa.axes.lowrank out/full --share=1-3 --share_rank=4 --out=out/rank
    python train.py --init_from=out/rank

With q̃ and k̃ of R numbers per head, where a head is D wide, and S_a the scores of the anchor, a
reuse layer attends with

    softmax(S_a + C), where C = q̃ k̃ᵀ / √R
    = P_a · exp(C), normalized over each row
    = P_a · softmax(C), normalized over each row

so the anchor need only hand up P_a, as in plain Shared Attention. The layer also caches k̃, G·R
numbers per token. q̃ starts at zero, which is plain sharing, and train.py learns it.
"""

import torch

from minisa.axes.common import (
    anchors,
    fill,
    parser,
    rebuilt,
    replace_reuse_layers,
    rewrite,
    run_main,
)
from minisa.kit import checkpoint
from minisa.kit.cli import count, whole
from minisa.model import SharedAttention, rotate, split_heads

class Corrected(SharedAttention):
    """A reuse layer with a query and a key of R numbers per head, and the usual values."""
    makes = "qkv"

    def heads(self, h, step, below):
        P = below
        q, k, v = self.qkv(h).split(self.widths, dim=2)
        q = split_heads(q, self.H)                              # (B, H, T, R)
        k = split_heads(k, self.G)                              # (B, G, T, R)
        v = split_heads(v, self.G)                              # (B, G, T, D)
        every = 2 * step.rope.size(1) // q.size(3)
        rope = step.rope[:, ::every]                            # R/2 of the D/2 angles
        k = step.remember("k", self.layer, rotate(k, rope))     # (B, G, S, R)
        v = step.remember("v", self.layer, v)
        correction = step.attention_weights(rotate(q, rope), k)
        product = P.float() * correction                        # (B, H, T, S); 0 where P is
        total = product.sum(-1, keepdim=True)
        smallest = torch.finfo(product.dtype).tiny
        corrected = product / total.clamp(min=smallest)
        return step.weighted_sum(corrected.type_as(P), v), below

def rebuild(model, rank):
    """Make all reuse layers Corrected. Raises ValueError if R = rank does not fit, or as
    replace_reuse_layers()."""
    config, D = model.config, model.config.head_dim
    if rank < 1 or rank % 2 or D % rank:
        raise ValueError(f"--share_rank={rank}: must be even, and divide the width of a head, {D}")
    q, k = config.n_head * rank, config.n_kv_head * rank
    replace_reuse_layers(model, Corrected, f"share_rank={rank}", q=q, k=k)

@torch.no_grad()
def correct(model, spans, rank, seed=1337):
    """A model → one whose spans share, each reuse layer with a correction of R = rank that is still
    zero, in eval mode, in the same memory where it can.

    k̃ starts as the first R numbers of the layer's own k, or random if it has none.
    Raises ValueError if the model cannot share so, or R does not fit.
    """
    shared = checkpoint.reconfigure(model, share=spans, share_kind="weights")
    new = rebuilt(shared, "lowrank", rank=rank)
    tensors = {}
    generator = torch.Generator().manual_seed(seed)
    for layer in anchors(shared.config):
        own = model.blocks[layer].attn
        v = shared.blocks[layer].attn.qkv.weight                # (G·D, C)
        _, k, _ = own.qkv.weight.split(own.widths)              # (G·D, C), or none
        C = v.size(1)
        if len(k):
            of_heads = k.view(own.G, -1, C)
            k = of_heads[:, :rank].flatten(0, 1)
        else:
            k = 0.02 * torch.randn(own.G * rank, C, generator=generator)
        q = v.new_zeros(own.H * rank, C)
        tensors[f"blocks.{layer}.attn.qkv.weight"] = torch.cat((q, k.to(v), v))
    return fill(new, shared, tensors)

def main():
    flags = parser(__doc__, "lowrank")
    flags.flag("share", str, "", "spans of layers that will share, as 1-3 or 1-3,5-7",
               shown="the model's own spans")
    flags.flag("share_rank", count, 4, "numbers per head of the correction's query and key; even, "
               "and a divisor of the width of a head")
    flags.flag("seed", whole, 1337, "random seed for the keys of layers that had none")
    args = flags.parse_args()

    def technique(model, windows):
        spans = args.share or model.config.share
        return correct(model, spans, args.share_rank, args.seed)

    rewrite(args, technique)

if __name__ == "__main__":
    run_main("lowrank")
