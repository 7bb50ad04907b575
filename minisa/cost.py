"""What a configuration costs: parameters, cache bytes and FLOPs, in closed form; and the same, measured.

A multiply-add is 2 FLOPs; only matrix products count, as in torch.utils.flop_counter. For one token that sees S keys, a layer spends

    q 2·C·H·D    k 2·C·G·D    v 2·C·G·D    scores 2·H·D·S    weighted sum 2·H·D·S    output 2·H·D·C    MLP 6·C·M

and the model 2·C·V once, for the logits. Cached per token and layer, with b bytes per number: k and v, G·D·b each.
What a layer borrows from its anchor falls away: q, k and the scores in Shared Attention, k and v in Cross-Layer Attention.
A mixture of the anchor's heads costs a reuse layer 2·H²·S, and H² parameters. A correction of the anchor's scores (share_rank=R) costs it
2·C·(H+G)·R and 2·H·R·S. Keys and values of fewer numbers (ranks) take their r in the place of D, and to restore keys 2·G·r·D·S.
"""

from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from minisa.model import PREFILL_CHUNK, KVCache, widths


@dataclass
class Cost:
    params: int                 # numbers
    cache_bytes_per_token: int  # bytes for one token of one sequence, all layers
    cache_bytes: int            # bytes for `context` tokens of `batch_size` sequences
    decode_flops: int           # to make one more token in each sequence, which then sees `context` keys, its own included
    prefill_flops: int          # to read a prompt of `context` tokens and make the first token after it


def cost(config, context, batch_size=1, bytes_per_number=4, kept=None):
    """Predict the Cost of a GPTConfig with `context` ≤ block_size tokens in the cache. Raises ValueError outside of that.

    kept: how many tokens each layer (L,) has room for, in a cache that was squeezed after the prompt."""
    if not 1 <= context <= config.block_size:
        raise ValueError(f"context={context}: must be from 1 to block_size={config.block_size}")
    C, D, M, V, L = config.n_embd, config.head_dim, config.n_hidden, config.vocab_size, config.n_layer
    made = [(*widths(config, layer), config.n_head * config.rank(layer)[1]) for layer in range(L)]       # numbers of q, k, v made and summed up
    mixing = 2 * config.n_head**2 if config.heads == "mix" else 0       # FLOPs of a reuse layer per key
    restoring = [2 * n_k * D if n_q and config.rank(layer)[0] < D else 0 for layer, (n_q, n_k, _, _) in enumerate(made)]    # FLOPs per key

    def layers(T, keys):                                                # FLOPs of T tokens that are each multiplied with S keys, in each layer
        return sum(S * restored + T * (
            2 * C * (n_q + n_k + n_v)                                   # projections
            + (2 * n_q * S if n_q else mixing * S)                      # scores
            + 2 * n_y * S + 2 * n_y * C + 6 * C * M)                    # weighted sum, output, MLP
            for S, restored, (n_q, n_k, n_v, n_y) in zip(keys, restoring, made))

    head = 2 * C * V
    ends = [*range(PREFILL_CHUNK, context, PREFILL_CHUNK), context]     # how many keys each chunk of the prompt is multiplied with
    sizes, kept = [(n_k + n_v) * bytes_per_number for _, n_k, n_v, _ in made], kept or [context] * L
    return Cost(
        params=V * C * (1 if config.tied else 2) + C
               + sum(restoring) // 2 + sum(2 * C + C * (n_q + n_k + n_v + n_y) + 3 * C * M + (0 if n_q else mixing // 2) for n_q, n_k, n_v, n_y in made),
        cache_bytes_per_token=sum(sizes),
        cache_bytes=batch_size * sum(size * room for size, room in zip(sizes, kept)),
        decode_flops=batch_size * (layers(1, [min(room, context) for room in kept]) + head),
        prefill_flops=batch_size * (sum(layers(end - start, [end] * L) for start, end in zip([0, *ends], ends)) + head),
    )


@torch.inference_mode()
def measure(model, context, batch_size=1, squeezed=None):
    """The same Cost, counted while the model runs: its parameters, its cache's storage, its matrix products.

    squeezed: a function idx (B, T) → a squeezed cache that holds these tokens; its bytes and its decode step are then measured."""
    config, weight = model.config, model.embed.weight

    def run(cache, tokens):                                             # what stream() does for each token
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):      # the counter can't see into fused kernels
            for chunk in tokens.split(PREFILL_CHUNK, dim=1):
                x = model.hidden(chunk, cache)
            model.head(x[:, -1])
        return counter.get_total_flops()

    tokens = torch.zeros(batch_size, context, dtype=torch.long, device=weight.device)
    cache = KVCache(config, batch_size, context, weight.dtype, weight.device)
    prefill, per_token = run(cache, tokens), cache.nbytes // (context * batch_size)
    if squeezed:
        cache = squeezed(tokens[:, :-1])
    else:
        cache.length = context - 1                                      # forget the last token, and decode it once more
    decode = run(cache, tokens[:, -1:])
    return Cost(sum(p.numel() for p in model.parameters()), per_token, cache.nbytes, decode, prefill)
