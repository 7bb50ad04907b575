"""The oracle of the axes that change layers: plain.py once more, in float64, with heads that a reuse layer
takes from others, mixes or corrects, and keys and values that are narrower than a head."""

import math

import torch
from torch.nn import functional as F

from minisa.plain import rms_norm, rope

def scores(q, k, base):
    """q, k (T, d) → (T, T)."""
    return rope(q, base) @ rope(k, base).T / math.sqrt(q.size(-1))

def of_reuse_layer(attn, anchor_scores, anchor_P, q, k, config):
    """P of each head, from what its anchor has, and from q and k (T, R) of its own, if any."""
    heads = range(config.n_head)
    if "source" in attn:
        return [anchor_P[g] for g in attn["source"].tolist()]
    if "mix" in attn:
        return [sum(attn["mix"][h, g] * anchor_P[g] for g in heads) for h in heads]
    if q:
        G, base = config.n_kv_head, config.rope_base
        return [(anchor_scores[h] + scores(q[h], k[h * G // len(heads)], base)).softmax(-1) for h in heads]
    return anchor_P

def tensors(model):
    """The float64 tensors of a model, by name. Where they want gradients, so do these."""
    parts = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    return {name: t.double() if t.is_floating_point() else t for name, t in parts.items()}

def sequence(model, idx, window=None):
    """idx (T,) → logits (T, V), and P (H, T, T) of every layer."""
    w, config = tensors(model), model.config
    H, G, base = config.n_head, config.n_kv_head, config.rope_base
    t = torch.arange(len(idx))
    distance = t[:, None] - t
    hidden = (distance < 0) | (distance >= (window or len(idx)))
    x, every_P, v, anchor_k, S, anchor_P = w["embed.weight"][idx], [], None, None, None, None
    for layer, block in enumerate(model.blocks):
        name, reuses = f"blocks.{layer}.", any(a < layer <= b for a, b in config.spans)
        attn = {key: w[f"{name}attn.{key}"] for key in block.attn.state_dict()}
        made = (rms_norm(x, config.norm_eps) @ attn["qkv.weight"].T)
        made = made.split(block.attn.widths, dim=-1)
        q, k, own_v = (part.chunk(n, dim=-1) if part.size(1) else () for part, n in zip(made, (H, G, G)))
        v = own_v or v                                          # CLA: those of the anchor
        if "restore" in attn:
            k = [k[g] @ attn["restore"][g] for g in range(G)]
        if reuses and config.share_kind == "weights":
            P = of_reuse_layer(attn, S, anchor_P, q, k, config)
        else:
            anchor_k = k or anchor_k                            # CLA again
            S = [scores(q[h], anchor_k[h * G // H], base).masked_fill(hidden, -math.inf) for h in range(H)]
            P = anchor_P = [row.softmax(-1) for row in S]
        every_P.append(torch.stack(list(P)))
        y = torch.cat([P[h] @ v[h * G // H] for h in range(H)], dim=-1)
        x = x + y @ attn["out.weight"].T
        h = rms_norm(x, config.norm_eps)
        gate, up = h @ w[name + "mlp.gate.weight"].T, h @ w[name + "mlp.up.weight"].T
        x = x + (gate * gate.sigmoid() * up) @ w[name + "mlp.down.weight"].T
    return (rms_norm(x, config.norm_eps) * w["norm.weight"]) @ w["embed.weight"].T, every_P

def logits(model, idx, window=None):
    """idx (B, T) → (B, T, V)."""
    return torch.stack([sequence(model, row, window)[0] for row in idx])

def close(a, b, tolerance=1e-4):
    """Whether two tensors differ by no more than the tolerance, of the largest number if that is above 1."""
    return (a.double() - b.double()).abs().max() <= tolerance * max(1.0, b.abs().max().item())

def gradients(model, logits, targets):
    """The gradients of a model's parameters, by name."""
    model.zero_grad()
    F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}
