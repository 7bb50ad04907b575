"""What a model costs: parameters, cache bytes and FLOPs, in closed form; and the same, measured.

A multiply-add is 2 FLOPs; only matrix products count, as in torch.utils.flop_counter. For one token
that sees S keys, a layer spends

    q 2·C·H·D    k 2·C·G·D    v 2·C·G·D    scores 2·H·D·S    weighted sum 2·H·D·S    out 2·H·D·C
    MLP 6·C·M

and the model 2·C·V once, for the logits. Each layer caches, per token, G·D·b bytes for k and G·D·b
for v, with b bytes per number. Terms for what a layer does not compute drop out: q, k and scores in
a reuse layer of Shared Attention, k and v in one of Cross-Layer Attention.

A decode step also reads: each weight matrix once, and for each sequence S keys and S values in a
full layer. A reuse layer of Shared Attention reads S values. One of Cross-Layer Attention stores
nothing, but re-reads the anchor's S keys and S values.
"""

from copy import copy
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from minisa.decode import Decoder
from minisa.model import GPT, PREFILL_CHUNK, GPTConfig, KVCache

@dataclass
class Cost:
    params: int                 # numbers
    cache_bytes_per_token: int  # bytes for one token of one sequence, all layers
    cache_bytes: int            # bytes for `context` tokens of `batch_size` sequences
    read_bytes: int             # bytes of weights and cache read by a decode step's products
    decode_flops: int           # for one more token of each sequence, which sees `context` keys
    prefill_flops: int          # for reading a prompt of `context` tokens and predicting the next

def layer_params(block):
    """Parameters of a block: attention, MLP."""
    attn = block.attn
    C, M = attn.qkv.in_features, block.mlp.down.in_features
    more, _ = attn.extra_cost(0, 0)                 # of layers of minisa/axes
    return C * sum(attn.widths) + C * attn.out.in_features + 3 * C * M + more

def layer_flops(block, T, S):
    """FLOPs of a block for T tokens of one sequence, each against S keys, including masked ones."""
    attn = block.attn
    C, M = attn.qkv.in_features, block.mlp.down.in_features
    n_y = attn.out.in_features                      # numbers per token that the weighted sum gives
    projections = 2 * C * sum(attn.widths) + 2 * n_y * C
    n_read = attn.tokens_read(T, S)                 # S, or fewer in layers of minisa/axes
    products = 2 * (attn.widths.q + n_y) * n_read   # scores, and weighted sum
    _, more = attn.extra_cost(T, S)
    return T * (projections + products + 6 * C * M) + more

def numbers_read(blocks, tokens_seen):
    """Numbers that a decode step reads of a sequence's cache. tokens_seen: how many each layer
    sees. For each of these tokens, with g = G·D,

        a full layer or an anchor reads     its own k and v         g + g
        SharedAttention                     its own v               g       no q, so it needs no k
        CrossLayerAttention                 the anchor's k and v    g + g
    """
    total = 0
    anchor_keys = anchor_values = 0                 # numbers per token
    for block, n_seen in zip(blocks, tokens_seen):
        attn, made = block.attn, block.attn.widths
        keys = made.k or anchor_keys                # its own, or those of the anchor below
        values = made.v or anchor_values
        if made.q == 0:                             # no q: P is handed up, and no key is read
            keys = 0
        total += attn.tokens_read(1, n_seen) * (keys + values)
        if made.k:                                  # axes: restored keys are handed up, not reread
            anchor_keys = 0 if attn.restores_keys else made.k
        if made.v:
            anchor_values = made.v
    return total

def predict(model_or_config: GPT | GPTConfig, context: int, batch_size: int = 1,
            bytes_per_number: int = 4, kept: list[int] | None = None) -> Cost:
    """→ the Cost of a model or config, with `context` tokens in the cache.

    kept: how many tokens the cache of each layer can hold; default: all.
    Raises ValueError unless 1 ≤ context ≤ block_size.
    """
    with torch.device("meta"):
        model = model_or_config if isinstance(model_or_config, GPT) else GPT(model_or_config)
    config, blocks = model.config, model.blocks
    if not 1 <= context <= config.block_size:
        raise ValueError(f"--context={context}: must be from 1 to block_size = {config.block_size}")
    C, V = config.n_embd, config.vocab_size
    logits = 2 * C * V
    kept = kept or [context] * len(blocks)
    tokens_seen = [min(n, context) for n in kept]
    matrices = V * C + sum(map(layer_params, blocks))
    made = [block.attn.widths for block in blocks]
    cached = [bytes_per_number * (n.k + n.v) for n in made]     # bytes per token
    starts = range(0, context, PREFILL_CHUNK)
    chunks = [(start, min(start + PREFILL_CHUNK, context)) for start in starts]
    decode = sum(layer_flops(block, 1, n_seen) for block, n_seen in zip(blocks, tokens_seen))
    prefill = sum(layer_flops(block, end - start, end) for block in blocks for start, end in chunks)
    return Cost(
        params=matrices + C + (0 if config.tied else V * C),
        cache_bytes_per_token=sum(cached),
        cache_bytes=batch_size * sum(size * n for size, n in zip(cached, kept)),
        read_bytes=bytes_per_number * (matrices + batch_size * numbers_read(blocks, tokens_seen)),
        decode_flops=batch_size * (decode + logits),
        prefill_flops=batch_size * (prefill + logits))

class Reads(TorchFunctionMode):
    """Within it, adds up the bytes of weights and cache that enter matrix products, or are gathered
    or converted for one."""

    def __init__(self, tensors):
        super().__init__()
        self.places = {t.untyped_storage().data_ptr() for t in tensors if t.numel()}
        self.bytes = 0

    def itemsize(self, t):
        """Bytes per number of t if it is of weights or cache, else 0."""
        return t.itemsize * (t.untyped_storage().data_ptr() in self.places)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function.__name__ in ("matmul", "__matmul__", "linear"):
            self.bytes += sum(t.numel() * self.itemsize(t) for t in args[:2])
        result = function(*args, **kwargs or {})
        if function.__name__ in ("gather", "take_along_dim", "index_select", "to"):
            self.bytes += result.numel() * self.itemsize(args[0])
        return result

@torch.inference_mode()
def measure(model: GPT, context: int, batch_size: int = 1, cache=None,
            engine: str = "torch") -> Cost:
    """→ the same figures, measured: parameters, the cache's storage, the products of a real run.

    cache: one of another kind to measure, which has read `context` - 1 tokens; its tensors are
    (B, heads, tokens, any). None: a KVCache.
    engine: what decodes, "torch" (model.py) or "numpy" (decode.py).
    """
    explicit = copy(model)
    explicit.watch = lambda P: None                 # the counter can't see into fused kernels

    def run(cache, tokens):
        """FLOPs and bytes read of what GPT.read() does."""
        reads = Reads([*model.parameters(), *cache.tensors])
        with FlopCounterMode(display=False) as counter, reads:
            explicit.read(tokens, cache)
        return counter.get_total_flops(), reads.bytes

    tokens = torch.zeros(batch_size, context, dtype=torch.long, device=model.embed.weight.device)
    usual = KVCache(model, batch_size, context)
    prefill, _ = run(usual, tokens)
    if cache is None:
        cache = usual
        cache.length = context - 1                  # drop the last token and decode it again
    per_token = sum(t[:, :, 0].nbytes for t in cache.tensors) // batch_size
    last = tokens[:, -1:]
    decode, read = run(cache, last) if engine == "torch" else run_in_numpy(Decoder(model, cache))
    params = sum(p.numel() for p in model.parameters())
    return Cost(params, per_token, cache.nbytes, read, decode, prefill)

def run_in_numpy(decoder):
    """FLOPs and bytes read of a Decoder's step. Its arrays are replaced by ones that count, but for
    the embedding: a step only copies a row of it."""
    class Counted(np.ndarray):
        flops = read = 0

        def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
            plain = [np.asarray(array) for array in inputs]
            result = getattr(ufunc, method)(*plain, **kwargs)
            if ufunc is np.matmul:
                Counted.flops += 2 * result.size * plain[0].shape[-1]
                Counted.read += sum(array.nbytes for array in inputs if isinstance(array, Counted))
            return result

    def counted(parts):
        return SimpleNamespace(**{
            name: part.view(Counted) if isinstance(part, np.ndarray) and name != "embed" else part
            for name, part in vars(parts).items()})

    decoder.layers = [counted(layer) for layer in decoder.layers]
    decoder.weights = counted(decoder.weights)
    decoder.step(0)
    return Counted.flops, Counted.read
