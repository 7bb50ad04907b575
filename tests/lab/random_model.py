"""A small model whose heads attend differently."""

import torch

from minisa.model import GPT, GPTConfig

def random_model(seed=3, **fields):
    torch.manual_seed(seed)
    config = GPTConfig(**{"block_size": 32, "vocab_size": 50, "n_layer": 4, "n_head": 4, "n_kv_head": 2,
                          "n_embd": 32, **fields})
    model = GPT(config).eval()
    for p in model.parameters():
        p.data *= 6 if p.dim() == 2 else 1
    return model
