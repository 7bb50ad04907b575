"""The same GPT as it writes: one token at a time, on a CPU, in numpy. And what a KV cache is.

The keys and values of a token stay the same while the text grows, so they are computed once and
stored: that is the KV cache. A step computes q, k and v of the newest token only, stores its k and
v, and lets its q attend to all that is stored. A reuse layer of Shared Attention has no q and no k,
and stores v alone.

model.py does the same, for training, GPUs and batches. In a step, every matrix meets just a vector,
so most of the time goes into reading: the matrices (see by_columns) and the cache. The rest goes
into starting operations, and numpy starts one in a tenth of the time that torch takes.

Shapes: S visible tokens, the newest included; H query heads, G key/value heads, D head dim, C = H·D
width of the model, M width of the MLP, V vocabulary.
"""

import math
from types import SimpleNamespace

import numpy as np

# ---- attention of the newest token ----

def rotate(heads, turn):
    """RoPE: heads (n, D) → (n, D). Each pair of neighbours is one complex number, and turn (D/2,)
    holds the numbers of length 1 by which the pairs of this position are multiplied."""
    return (heads.view(np.complex64) * turn).view(np.float32)

def attention_weights(q, k):
    """q (H, D), k (G, S, D) → P (G, H/G, S): the heads that share a key stand together."""
    G, S, D = k.shape
    q = q.reshape(G, -1, D) / math.sqrt(D)
    scores = k @ q.swapaxes(1, 2)                           # (G, S, H/G)
    P = np.ascontiguousarray(scores.swapaxes(1, 2))
    P -= np.maximum.reduce(P, axis=-1, keepdims=True)       # so that exp() cannot overflow
    np.exp(P, out=P)
    P /= np.add.reduce(P, axis=-1, keepdims=True)
    return P

def weighted_sum(P, v):
    """P (G, H/G, S), v (G, S, D) → y (C,)."""
    return (P @ v).reshape(-1)

# A function for each kind of layer. It takes the Decoder, the layer, x (C,), and what the layer
# below handed up; it returns y (C,) and what it hands up, the P, k and v that it attended with.

def full_attention(now, layer, x, below):
    """A full layer, or an anchor: makes q, k and v, and stores k and v."""
    heads = (layer.qkv @ x).reshape(-1, now.D)              # (H + G + G, D): q, k, v
    G, slot, S = len(layer.k), now.slot, now.S
    turned = rotate(heads[:-G], now.turn)                   # (H + G, D): q, k
    layer.k[:, slot] = turned[-G:]
    layer.v[:, slot] = heads[-G:]
    k, v = layer.k[:, :S], layer.v[:, :S]                   # (G, S, D)
    P = attention_weights(turned[:-G], k)
    return weighted_sum(P, v), (P, k, v)

def shared_attention(now, layer, x, below):
    """A reuse layer of Shared Attention: makes v and stores v; P comes from below."""
    P, k, v = below
    layer.v[:, now.slot] = (layer.qkv @ x).reshape(-1, now.D)
    return weighted_sum(P, layer.v[:, :now.S]), below

def cross_layer_attention(now, layer, x, below):
    """A reuse layer of Cross-Layer Attention: makes q, stores nothing; k and v come from below."""
    P, k, v = below
    q = rotate((layer.qkv @ x).reshape(-1, now.D), now.turn)
    P = attention_weights(q, k)
    return weighted_sum(P, v), below

# ---- the whole model ----

def rms_norm(x, eps):
    """x (C,) → (C,)."""
    mean_square = x.dot(x) / len(x)
    return x / math.sqrt(mean_square + eps)

def mlp(layer, x):
    """SwiGLU: x (C,) → (C,)."""
    gate, up = (layer.gate_up @ x).reshape(2, -1)           # (M,) each
    up *= gate
    up /= 1 + np.exp(-gate)                                 # up · gate · sigmoid(gate)
    return layer.down @ up

class Decoder:
    """Decoder(model, cache).step(token) → logits (V,): a model goes on from a cache.

    model: a GPT in eval mode, in float32 on the CPU. cache: its KVCache of one sequence, empty or
    not. Its memory is used, so that model.py can go on from what a Decoder leaves.
    Raises ValueError if they are anything else: see handles().
    """

    def __init__(self, model, cache):
        if not handles(model, cache):
            raise ValueError("Decoder takes a GPT in eval mode, in float32 on the CPU, and its "
                             "cache of one sequence; for anything else use model.generate()")
        self.cache, self.weights = cache, prepare(model)
        self.D, self.eps = model.config.head_dim, model.config.norm_eps
        self.frequencies = model.config.rope_base ** (-np.arange(0, self.D, 2) / self.D)    # (D/2,)
        self.positions = cache.where.view(-1).numpy()       # (size,): slot → position
        self.layers = [SimpleNamespace(**vars(layer), k=k[0].numpy(), v=v[0].numpy())
                       for layer, k, v in zip(self.weights.layers, cache.k, cache.v)]

    @np.errstate(over="ignore")                             # 1 / (1 + inf) is 0, and right
    def step(self, token):
        """The newest token's id → logits (V,) of the next one."""
        position, size = self.cache.length, self.cache.size
        self.slot = position % size                         # when full, that of the oldest token
        self.S = min(position + 1, size)
        self.turn = np.exp(1j * position * self.frequencies).astype(np.complex64)
        self.positions[self.slot] = position

        x = self.weights.embed[token].copy()                # (C,)
        handed_up = None
        for layer in self.layers:
            y, handed_up = layer.attention(self, layer, rms_norm(x, self.eps), handed_up)
            x += layer.out @ y
            x += mlp(layer, rms_norm(x, self.eps))

        self.cache.length = position + 1
        return self.weights.unembed @ (rms_norm(x, self.eps) * self.weights.gain)

def draw(logits, temperature, top_k, u):
    """logits (V,) → a token's id: the same as model.py's draw() with the same u."""
    if temperature < 1e-6:
        return int(logits.argmax())
    if top_k:
        top_k = min(top_k, len(logits))
        least = np.partition(logits, -top_k)[-top_k]
        logits = np.where(logits < least, -np.inf, logits)
    p = np.exp((logits - logits.max()) / temperature)
    total = p.cumsum(dtype=np.float64)
    return np.count_nonzero(total <= u * total[-1])

# ---- what is decoded here, and its weights as arrays ----

def handles(model, cache):
    """Whether Decoder can go on from this cache with this model. What a layer computes, its class
    says itself, by in_numpy: one that only inherits that may compute something else."""
    like, G = model.embed.weight, model.config.n_kv_head
    parts, shapes = [model, cache], []
    for block in model.blocks:
        parts += [block, block.attn, block.mlp]
        shapes += [(1, G, cache.size, n // G) for n in block.attn.widths[1:]]
    known = all("in_numpy" in vars(type(part)) for part in parts)
    watched = any(part._forward_hooks or "forward" in vars(part) for part in model.modules())
    here = like.device.type == "cpu" and str(like.dtype) == "torch.float32"
    fits = shapes == [t.shape for pair in zip(cache.k, cache.v) for t in pair]
    fits = fits and (cache.k[0].device, cache.k[0].dtype) == (like.device, like.dtype)
    return known and not watched and not model.training and here and fits

def by_columns(matrix):
    """A matrix with more rows than columns is read fastest column after column, as each is added to
    all of y; so a copy of it is stored that way. Any other array stays what and where it is."""
    return np.asfortranarray(matrix) if len(matrix) > matrix.shape[-1] else matrix

def checksum(array):
    """The sum of its bits, as whole numbers: a fused optimizer does not tell what it changed."""
    return np.add.reduce(array.reshape(-1).view(np.int32), dtype=np.int32)

def prepare(model):
    """→ the model's weights. They are kept with it, and made anew once its numbers have changed."""
    tensors = model.state_dict()
    state = [(t.data_ptr(), t._version, checksum(t.numpy())) for t in tensors.values()]
    if getattr(model, "prepared_of", None) != state:
        embed = tensors["embed.weight"].numpy()             # (V, C)
        unembed = tensors["unembed.weight"].numpy() if "unembed.weight" in tensors else embed
        layers = [prepare_layer(block) for block in model.blocks]
        model.prepared = SimpleNamespace(embed=embed, layers=layers, unembed=by_columns(unembed),
                                         gain=tensors["norm.weight"].numpy())
        model.prepared_of = state
    return model.prepared

def prepare_layer(block):
    """→ a layer's weights: those of its attention by their names, as qkv and out, and the MLP's."""
    attn = {name.removesuffix(".weight"): by_columns(tensor.numpy())
            for name, tensor in block.attn.state_dict().items()}
    gate, up, down = (tensor.numpy() for tensor in block.mlp.state_dict().values())
    gate_up = by_columns(np.concatenate((gate, up)))        # (2·M, C): one product in place of two
    return SimpleNamespace(attention=type(block.attn).in_numpy, **attn, gate_up=gate_up, down=down)
