"""Shared Attention on one page: a whole GPT, for one sequence, one head at a time, without a cache.

Slow and plain: read it first. model.py computes the same, fast; the tests hold the two together.
Shapes: T tokens, C width of the model, H query heads, G key/value heads, D = C / H, M width of the
MLP, V vocabulary.
"""

import math

import torch

def rms_norm(x, eps):
    """x (T, C) → (T, C): each row divided by its root mean square (arXiv:1910.07467)."""
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()

def rope(x, base):
    """x (T, D) → (T, D): the numbers 2i and 2i + 1 of row t are a point in a plane; turn it by the
    angle t · base^(-2i/D). How two rows match then depends on their distance (arXiv:2104.09864)."""
    T, D = x.shape
    angle = torch.outer(torch.arange(T).double(), base ** (-torch.arange(0, D, 2).double() / D))
    a, b = x[:, 0::2], x[:, 1::2]                           # (T, D/2) each
    turned = (a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos())
    return torch.stack(turned, dim=-1).flatten(1).to(x.dtype)

def attention_weights(q, k, visible):
    """q: H heads (T, D), k: G heads (T, D) → P: H matrices (T, T). Row t says where token t looks,
    and sums to 1."""
    P = []
    for i in range(len(q)):
        scores = q[i] @ k[i * len(k) // len(q)].T / math.sqrt(q[i].size(-1))
        P.append(scores.masked_fill(~visible, -math.inf).softmax(dim=-1))
    return P

def gpt(w, config, idx, window=None):
    """Token ids idx (T,) → logits (T, V), and P (H, T, T) of every layer.

    w: the tensors of model.py by name. window: most tokens that each one sees, if fewer than T.
    """
    H, G, D = config.n_head, config.n_kv_head, config.n_embd // config.n_head
    t = torch.arange(len(idx))
    distance = t[:, None] - t                               # (T, T): from a query back to a key
    visible = (distance >= 0) & (distance < (window or len(idx)))
    x, every_P = w["embed.weight"][idx], []                 # x (T, C): the residual stream
    q = k = v = P = ()                                      # lists of heads; stay until replaced
    for layer in range(config.n_layer):
        name, reuse = f"blocks.{layer}.", any(a < layer <= b for a, b in config.spans)
        h = rms_norm(x, config.norm_eps)
        made = (h @ w[name + "attn.qkv.weight"].T).split(D, dim=-1)     # (T, D) each

        if reuse and config.share_kind == "weights":        # Shared Attention: values of its own,
            v = made                                        # and P is still the anchor's
        elif reuse:                                         # Cross-Layer Attention: queries of its
            q = [rope(head, config.rope_base) for head in made]     # own; k and v are the anchor's
            P = attention_weights(q, k, visible)
        else:                                               # a full layer, or the anchor of a span
            q = [rope(head, config.rope_base) for head in made[:H]]
            k = [rope(head, config.rope_base) for head in made[H:H + G]]
            v = made[H + G:]
            P = attention_weights(q, k, visible)

        every_P.append(torch.stack(P))
        y = torch.cat([P[i] @ v[i * G // H] for i in range(H)], dim=-1)         # (T, C)
        x = x + y @ w[name + "attn.out.weight"].T
        h = rms_norm(x, config.norm_eps)
        gate, up = (h @ w[name + f"mlp.{part}.weight"].T for part in ("gate", "up"))    # (T, M)
        x = x + (gate * gate.sigmoid() * up) @ w[name + "mlp.down.weight"].T    # SwiGLU
    h = rms_norm(x, config.norm_eps) * w["norm.weight"]
    return h @ w["embed.weight" if config.tied else "unembed.weight"].T, every_P
