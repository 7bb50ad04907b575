"""What a configuration costs: parameters, cache bytes and FLOPs, in closed form; and the same, measured.

A multiply-add is 2 FLOPs; only matrix products count, as in torch.utils.flop_counter. For one token that sees S keys, a layer spends

    q 2·C·H·D    k 2·C·G·D    v 2·C·G·D    scores 2·H·D·S    weighted sum 2·H·D·S    output 2·H·D·C    MLP 6·C·M

and the model 2·C·V once, for the logits. Cached per token and layer, with b bytes per number: k and v, G·D·b each.
What a layer borrows from its anchor falls away: q, k and the scores in Shared Attention, k and v in Cross-Layer Attention.
A mixture of the anchor's heads costs a reuse layer 2·H²·S, and H² parameters.
"""

from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from minisa.model import PREFILL_CHUNK, KVCache, heads_made


@dataclass
class Cost:
    params: int                 # numbers
    cache_bytes_per_token: int  # bytes for one token of one sequence, all layers
    cache_bytes: int            # bytes for `context` tokens of `batch_size` sequences
    decode_flops: int           # to make one more token in each sequence, which then sees `context` keys, its own included
    prefill_flops: int          # to read a prompt of `context` tokens and make the first token after it


def cost(config, context, batch_size=1, bytes_per_number=4):
    """Predict the Cost of a GPTConfig with `context` ≤ block_size tokens in the cache. Raises ValueError outside of that."""
    if not 1 <= context <= config.block_size:
        raise ValueError(f"context={context}: must be from 1 to block_size={config.block_size}")
    C, D, M, V, L = config.n_embd, config.head_dim, config.n_hidden, config.vocab_size, config.n_layer
    made = [heads_made(config, layer) for layer in range(L)]            # (query, key, value) heads of each layer

    mixing = 2 * config.n_head**2 if config.heads == "mix" else 0       # FLOPs of a reuse layer per key

    def layers(T, S):                                                   # FLOPs of T tokens that are each multiplied with S keys
        return T * sum(2 * C * D * (n_q + n_k + n_v)                    # projections
                       + (2 * C * S if n_q else mixing * S)             # scores; H·D = C
                       + 2 * C * S + 2 * C * C + 6 * C * M              # weighted sum, output, MLP
                       for n_q, n_k, n_v in made)

    head = 2 * C * V
    ends = [*range(PREFILL_CHUNK, context, PREFILL_CHUNK), context]     # how many keys each chunk of the prompt is multiplied with
    per_token = sum(n_k + n_v for _, n_k, n_v in made) * D * bytes_per_number
    return Cost(
        params=V * C * (1 if config.tied else 2) + C
               + sum(2 * C + C * D * (n_q + n_k + n_v) + C * C + 3 * C * M + (0 if n_q else mixing // 2) for n_q, n_k, n_v in made),
        cache_bytes_per_token=per_token,
        cache_bytes=per_token * context * batch_size,
        decode_flops=batch_size * (layers(1, context) + head),
        prefill_flops=batch_size * (sum(layers(end - start, end) for start, end in zip([0, *ends], ends)) + head),
    )


@torch.inference_mode()
def measure(model, context, batch_size=1):
    """The same Cost, counted while the model runs: its parameters, its cache's storage, its matrix products."""
    config, weight = model.config, model.embed.weight

    def run(cache, tokens):                                             # what stream() does for each token
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):      # the counter can't see into fused kernels
            for chunk in tokens.split(PREFILL_CHUNK, dim=1):
                x = model.hidden(chunk, cache)
            model.head(x[:, -1])
        return counter.get_total_flops()

    tokens = torch.zeros(batch_size, context, dtype=torch.long, device=weight.device)
    cache = KVCache(config, batch_size, context, weight.dtype, weight.device)
    prefill = run(cache, tokens)
    cache.length = context - 1                                          # forget the last token, and decode it once more
    decode = run(cache, tokens[:, -1:])
    return Cost(sum(p.numel() for p in model.parameters()), cache.nbytes // (context * batch_size), cache.nbytes, decode, prefill)
