"""The GPT of plain.py, generating text one token at a time, in numpy. Also explains the KV cache.

The keys and values of a token stay the same while the text grows, as no token sees a later one. So
they are computed once and stored: that is the KV cache. A step computes q, k and v of the newest
token only, stores its k and v, and lets its q attend to all stored keys; q is needed only once. In
a reuse layer of Shared Attention, q and k would have no use: they only serve to form the attention
weights P, which are handed up by the layer below. Such a layer computes and stores only v.

model.py does the same for training, GPUs and batches, and its class KVCache holds the arrays used
here. In a step every matrix is multiplied by a single vector, so most of the time is spent reading
memory: the matrices (see by_columns) and the cache. The rest is the overhead of each call, which in
numpy is a tenth of what it is in torch.

Shapes: S visible tokens, the newest included; H query heads, G key/value heads, D head dim, C = H·D
width of the model, M width of the MLP, V vocabulary.
"""

import math
from types import SimpleNamespace
from weakref import WeakKeyDictionary

import numpy as np

# ---- attention of the newest token ----

def rotate(heads, turn):
    """RoPE: heads (n, D) → (n, D). Each pair of neighbors is read as one complex number; a product
    with one of length 1 turns it. turn (D/2,) holds those for the newest token's position."""
    return (heads.view(np.complex64) * turn).view(np.float32)

def attention_weights(q, keys):
    """q (H, D), keys (G, S, D) → P (G, H/G, S): heads that share keys are grouped."""
    G, S, D = keys.shape
    q = q.reshape(G, -1, D) / math.sqrt(D)                  # (G, H/G, D)
    scores = keys @ q.swapaxes(1, 2)                        # (G, S, H/G): faster in this order
    P = np.ascontiguousarray(scores.swapaxes(1, 2))         # (G, H/G, S); then softmax, in place
    P -= np.maximum.reduce(P, axis=-1, keepdims=True)       # so that exp() cannot overflow
    np.exp(P, out=P)
    P /= np.add.reduce(P, axis=-1, keepdims=True)
    return P

def weighted_sum(P, values):
    """P (G, H/G, S), values (G, S, D) → y (C,)."""
    return (P @ values).reshape(-1)

# After project(), a function for each kind of layer: h (C,) → y (C,), and the (P, keys, values)
# that it hands up for reuse. below: those handed up by the layer below. decoder: the Decoder, see
# further down. It knows S, the turn for rotate(), and the newest token's slot, its place in the
# cache of `size` slots.
# layer.qkv holds those of W_q, W_k and W_v that the layer has; layer.k and layer.v (G, size, D) are
# its cache (a reuse layer has no k, and in CLA no v). The newest k and v are stored before they are
# used, as a token attends to itself too.

def project(decoder, layer, h):
    """h (C,) → q (H, D), and all keys and values (G, S, D); stores the newest."""
    heads = (layer.qkv @ h).reshape(-1, decoder.D)          # (H + G + G, D)
    G = len(layer.k)
    qk, v = heads[:-G], heads[-G:]
    qk = rotate(qk, decoder.turn)
    q, k = qk[:-G], qk[-G:]
    layer.k[:, decoder.slot] = k
    layer.v[:, decoder.slot] = v
    return q, layer.k[:, :decoder.S], layer.v[:, :decoder.S]

def full_attention(decoder, layer, h, below):
    """A full layer, or an anchor: computes q, k and v, and stores k and v."""
    q, keys, values = project(decoder, layer, h)
    P = attention_weights(q, keys)
    return weighted_sum(P, values), (P, keys, values)

def shared_attention(decoder, layer, h, below):
    """A reuse layer of Shared Attention: computes and stores v. P is the anchor's."""
    P, _, _ = below
    v = layer.qkv @ h                                       # qkv is W_v alone: (G·D, C)
    layer.v[:, decoder.slot] = v.reshape(-1, decoder.D)
    values = layer.v[:, :decoder.S]
    return weighted_sum(P, values), below

def cross_layer_attention(decoder, layer, h, below):
    """A reuse layer of Cross-Layer Attention: computes q, stores nothing. Keys and values are the
    anchor's."""
    _, keys, values = below
    q = layer.qkv @ h                                       # qkv is W_q alone: (C, C)
    q = rotate(q.reshape(-1, decoder.D), decoder.turn)      # (H, D)
    P = attention_weights(q, keys)                          # not handed up: nobody reuses it
    return weighted_sum(P, values), below

# ---- the whole model ----

def rms_norm(x, eps):
    """x (C,) → (C,)."""
    mean_square = x.dot(x) / len(x)
    return x / math.sqrt(mean_square + eps)

def mlp(layer, h):
    """SwiGLU: h (C,) → (C,)."""
    gate, up = (layer.gate_up @ h).reshape(2, -1)           # (M,) each
    gate /= 1 + np.exp(-gate)           # silu; if exp overflows to inf, it correctly becomes 0
    return layer.down @ (gate * up)

class Decoder:
    """Decoder(model, cache).step(token) → logits (V,), continuing the text that a cache holds.

    model: a GPT in eval mode, in float32 on the CPU. cache: its KVCache (see model.py) of one
    sequence, empty or not. The cache arrays here are the tensors' own memory, so model.py can go
    on from what a Decoder leaves. Raises ValueError if model or cache is anything else (see
    handles()).
    """

    def __init__(self, model, cache):
        if not handles(model, cache):
            raise ValueError("Decoder takes a GPT in eval mode, in float32 on the CPU, and its "
                             "cache of one sequence; for anything else use model.generate()")
        self.cache = cache
        self.weights = prepare(model)
        self.eps = model.norm.eps
        self.D = model.config.head_dim
        exponents = -np.arange(0, self.D, 2) / self.D
        self.frequencies = model.config.rope_base ** exponents          # (D/2,)
        self.where = cache.where.view(-1).numpy()           # (size,): slot → position
        self.layers = []
        for prepared, k, v in zip(self.weights.layers, cache.k, cache.v):
            layer = SimpleNamespace(**vars(prepared))       # a copy, to which the cache is added
            layer.k = k[0].numpy()                          # of sequence 0: (G, size, D)
            layer.v = v[0].numpy()
            self.layers.append(layer)

    @np.errstate(over="ignore")                             # of exp() in mlp()
    def step(self, token: int) -> np.ndarray:
        """The newest token's id → logits (V,) of the next one.

        The cache is a ring: when it is full, a new token takes the oldest one's slot. All else can
        stay as it is: the order of slots does not affect a sum, and as each key was rotated by its
        position, q·k depends only on the distance between two tokens. The logits are those of
        plain.gpt(window=size), up to rounding: see KVCache.
        """
        position = self.cache.length
        size = self.cache.size
        self.slot = position % size
        self.S = min(position + 1, size)
        angles = position * self.frequencies
        self.turn = np.exp(1j * angles).astype(np.complex64)
        self.where[self.slot] = position                    # used only by model.py

        x = self.weights.embed[token].copy()                # (C,), to which the layers add
        handed_up = None
        for layer in self.layers:                           # .attention: one of those above
            h = rms_norm(x, layer.eps)
            y, handed_up = layer.attention(self, layer, h, handed_up)
            x += layer.out @ y
            h = rms_norm(x, layer.eps)
            x += mlp(layer, h)

        self.cache.length = position + 1
        x = rms_norm(x, self.eps) * self.weights.gain
        return self.weights.unembed @ x

def draw(logits, temperature, top_k, u):
    """logits (V,) → a token's id: the first at which the sum of all probabilities up to it exceeds
    u, a random number in [0, 1). Same as model.py's draw() with that u, up to rounding."""
    if temperature < 1e-6:
        return int(logits.argmax())
    if top_k:
        top_k = min(top_k, len(logits))
        least = np.partition(logits, -top_k)[-top_k]
        logits = np.where(logits < least, -np.inf, logits)
    p = np.exp((logits - logits.max()) / temperature)
    sums = p.cumsum(dtype=np.float64)   # p is not divided by its sum: u is multiplied by it
    return np.count_nonzero(sums <= u * sums[-1])

# ---- skip on a first reading: which models are handled here, and their weights as arrays ----

TORCH = "Linear", "Embedding", "Dropout", "RMSNorm", "ModuleList"
MLP_WEIGHTS = ["mlp.gate.weight", "mlp.up.weight", "mlp.down.weight"]

def known(part):
    """Whether this file has a numpy counterpart for a part of a model, or a cache. Its class must
    be one of model.py or in TORCH, or name the counterpart in an in_numpy of its own: an inherited
    one does not count, as a subclass may compute something else."""
    kind = type(part)
    if vars(part).keys() & dir(kind):                       # a forward() or watch of its own
        return False
    if kind.__module__ == "minisa.model" or "in_numpy" in vars(kind):
        return True
    return kind.__module__.startswith("torch.nn.modules.") and kind.__name__ in TORCH

def watched(part):
    """Whether a hook or dropout would see or change what a part computes."""
    return part.training or part._forward_hooks or part._forward_pre_hooks

def in_float32(tensor):
    """Whether a tensor is on the CPU and in float32, or in int64, as the indices of an axis are."""
    return tensor.is_cpu and str(tensor.dtype) in ("torch.float32", "torch.int64")

def fits(index, block, cache):
    """Whether a block is layer `index`, and the cache, of one sequence, has its shapes."""
    G, made = block.attn.G, block.attn.widths               # numbers for one token
    k_shape = (1, G, cache.size, made.k // G)
    v_shape = (1, G, cache.size, made.v // G)
    rest = [name for name in block.state_dict() if not name.startswith("attn.")]
    expected = block.attn.layer == index and rest == MLP_WEIGHTS
    return expected and cache.k[index].shape == k_shape and cache.v[index].shape == v_shape

def handles(model, cache):
    """Whether Decoder can continue this cache with this model."""
    parts, weights = list(model.modules()), model.state_dict()
    if not all(map(known, [cache, *parts])) or len(cache.k) != len(model.blocks):
        return False
    tensors = [*weights.values(), *cache.k, *cache.v]
    return (not any(map(watched, parts))
            and "norm.weight" in weights
            and not any(name.endswith("bias") for name in weights)
            and all(map(in_float32, tensors))
            and all(fits(index, block, cache) for index, block in enumerate(model.blocks)))

def by_columns(matrix):
    """A matrix with more rows than columns is multiplied by a vector fastest if it is stored column
    by column, so a copy is. Any other array is returned unchanged."""
    return np.asfortranarray(matrix) if len(matrix) > matrix.shape[-1] else matrix

def fingerprint(array):
    """An array's product with a vector. If it is as before, the array almost certainly is too."""
    array = np.atleast_1d(array)
    numbers = np.arange(1, array.shape[-1] + 1, dtype=np.float32)
    return (array @ np.sqrt(numbers)).tobytes()

PREPARED = WeakKeyDictionary()      # model → its weights, and what they were made of

def prepare(model):
    """→ the weights of a model, cached for its lifetime, and rebuilt when they have changed."""
    tensors = model.state_dict()
    state = [(t.data_ptr(), fingerprint(t.numpy())) for t in tensors.values()]
    weights, made_of = PREPARED.get(model, (None, None))
    if made_of == state:
        return weights
    top = "embed.weight" if model.config.tied else "unembed.weight"
    weights = SimpleNamespace()
    weights.embed = tensors["embed.weight"].numpy()         # (V, C)
    weights.unembed = by_columns(tensors[top].numpy())      # (V, C)
    weights.gain = tensors["norm.weight"].numpy()           # (C,)
    weights.layers = [prepare_layer(block) for block in model.blocks]
    PREPARED[model] = weights, state
    return weights

def prepare_layer(block):
    """→ a layer's weights: those of its attention by their names, as qkv and out, and the MLP's."""
    layer = SimpleNamespace()
    layer.eps = block.norm.eps
    layer.attention = type(block.attn).in_numpy
    for name, tensor in block.attn.state_dict().items():
        name = name.removesuffix(".weight")
        setattr(layer, name, by_columns(tensor.numpy()))
    gate, up, down = (tensor.numpy() for tensor in block.mlp.state_dict().values())
    both = np.concatenate((gate, up))                       # (2·M, C): one product in place of two
    layer.gate_up = by_columns(both)
    layer.down = by_columns(down)
    return layer
