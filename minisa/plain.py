"""Shared Attention in plain code: a whole GPT, for one sequence, one head at a time, with no cache.

Slow but simple, so read it first. decode.py and model.py compute the same thing faster; tests check
that they agree. The weights and their sizes are those of a model.py GPT. After `import torch`:

    from minisa import model, plain
    small = model.GPT(model.GPTConfig(n_layer=4, share="1-3"))
    logits, every_P = plain.gpt(small.state_dict(), small.config, torch.tensor([5, 3, 8]))

Shapes: T tokens, C width of the model, H query heads, G key/value heads, D = C / H, M width of the
MLP, V vocabulary. With fewer key/value heads than query heads (grouped-query attention), each
key/value head serves H / G query heads.
"""

import math

import torch

# ---- attention ----

def rope(x, base):
    """RoPE (arXiv:2104.09864): x (T, D) → (T, D). The numbers 2i and 2i + 1 of row t are a point in
    a plane; turn it by the angle t · base^(-2i/D). The product of a query and a key then depends
    on their two positions only through the distance between them."""
    T, D = x.shape
    t = torch.arange(T).double()
    exponents = -torch.arange(0, D, 2).double() / D         # 0, -2/D, -4/D, … (D/2,)
    angle = torch.outer(t, base ** exponents)               # (T, D/2)
    cos = angle.cos()
    sin = angle.sin()
    a = x[:, 0::2]                                          # (T, D/2)
    b = x[:, 1::2]
    turned_a = a * cos - b * sin
    turned_b = a * sin + b * cos
    pairs = torch.stack((turned_a, turned_b), dim=-1)       # (T, D/2, 2)
    return pairs.flatten(1).to(x.dtype)

def project(h, W, D):
    """h (T, C), W (n·D, C) → n heads (T, D). W stacks those of W_q, W_k and W_v that the layer has,
    in this order; each D rows of it make one head."""
    return (h @ W.T).split(D, dim=-1)

def attention_weights(q, k, mask):
    """q: H heads (T, D), k: G heads (T, D) → P: H matrices (T, T). Row t says where token t looks,
    and sums to 1."""
    P = []
    D = q[0].size(1)
    served = len(q) // len(k)                               # query heads that share a k: H / G
    for i in range(len(q)):
        products = q[i] @ k[i // served].T
        scores = products / math.sqrt(D) + mask
        P.append(scores.softmax(dim=-1))
    return P

def weighted_sum(P, v):
    """P: H matrices (T, T), v: G heads (T, D) → y (T, C)."""
    y = []
    served = len(P) // len(v)
    for i in range(len(P)):
        y.append(P[i] @ v[i // served])
    return torch.cat(y, dim=-1)

# ---- the kinds of layers ----

# In a span a-b, layer a, its anchor, computes what a full layer does; the others are reuse layers.
# Each kind is a function: h (T, C) → y (T, C), and the P, k and v that it hands up for reuse.
# below: the P, k and v handed up by the layer below; a full layer ignores them.
# W: the layer's matrix, see project(). config: see gpt(). mask (T, T): 0 where a token may look,
# else -inf.

def full_attention(h, W, config, mask, below):
    """A full layer, or the anchor of a span: queries, keys and values of its own."""
    H = config.n_head
    G = config.n_kv_head
    heads = project(h, W, config.head_dim)                  # H + G + G
    q = [rope(head, config.rope_base) for head in heads[:H]]
    k = [rope(head, config.rope_base) for head in heads[H:H + G]]
    v = heads[H + G:]
    P = attention_weights(q, k, mask)
    return weighted_sum(P, v), (P, k, v)

def shared_attention(h, W, config, mask, below):
    """A reuse layer of Shared Attention: the anchor's P, applied to its own values."""
    P, _, _ = below
    v = project(h, W, config.head_dim)                      # G heads
    return weighted_sum(P, v), below

def cross_layer_attention(h, W, config, mask, below):
    """A reuse layer of Cross-Layer Attention: its own queries, over the anchor's k and v."""
    _, k, v = below
    heads = project(h, W, config.head_dim)                  # H
    q = [rope(head, config.rope_base) for head in heads]
    P = attention_weights(q, k, mask)                       # for gpt() only: nobody reuses it
    return weighted_sum(P, v), (P, k, v)

REUSE = {"weights": shared_attention, "kv": cross_layer_attention}      # share_kind → a reuse layer

# ---- the whole model ----

def rms_norm(x, eps):
    """x (T, C) → (T, C): each row divided by its root mean square (arXiv:1910.07467). There is no
    gain to multiply by, as the next matrix can absorb it. Only the last norm, in gpt(), has one:
    the matrix after it may be the embedding, which also serves at the input."""
    mean_square = x.pow(2).mean(-1, keepdim=True)
    return x / (mean_square + eps).sqrt()

def mlp(h, w, name):
    """SwiGLU (arXiv:2002.05202): h (T, C) → (T, C). w: see gpt(). name: of this MLP, in w."""
    gate = h @ w[f"{name}.gate.weight"].T                   # (T, M)
    up = h @ w[f"{name}.up.weight"].T
    silu = gate * gate.sigmoid()
    return (silu * up) @ w[f"{name}.down.weight"].T

def gpt(w, config, idx, window=None):
    """Token ids idx (T,) → logits (T, V), and P (H, T, T) of every layer.

    w: the weights by name, a GPT's state_dict(). config: a GPTConfig, of which this uses n_layer,
    n_head (H), n_kv_head (G), head_dim (D), rope_base, norm_eps, spans ("1-3" is [(1, 3)]),
    share_kind (a key of REUSE) and tied (the embedding also makes the logits).
    window: the maximum number of tokens visible to each token, itself included (default T).
    """
    T = len(idx)
    t = torch.arange(T)
    distance = t[:, None] - t                               # (T, T): from a query back to a key
    visible = (distance >= 0) & (distance < (window or T))
    mask = torch.where(visible, 0.0, -math.inf)

    x = w["embed.weight"][idx]          # (T, C): the residual stream; every layer adds to it
    handed_up = None
    every_P = []
    for layer in range(config.n_layer):
        name = f"blocks.{layer}"
        reuses = any(a < layer <= b for a, b in config.spans)
        attention = REUSE[config.share_kind] if reuses else full_attention

        h = rms_norm(x, config.norm_eps)
        y, handed_up = attention(h, w[f"{name}.attn.qkv.weight"], config, mask, handed_up)
        x = x + y @ w[f"{name}.attn.out.weight"].T
        h = rms_norm(x, config.norm_eps)
        x = x + mlp(h, w, f"{name}.mlp")
        P, _, _ = handed_up
        every_P.append(torch.stack(P))

    h = rms_norm(x, config.norm_eps) * w["norm.weight"]
    unembed = w["embed.weight"] if config.tied else w["unembed.weight"]
    return h @ unembed.T, every_P
