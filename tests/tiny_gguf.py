"""A small .gguf file with random weights, as llama.cpp's converter would write it."""

import gguf
import torch

from minisa.kit.tokenizer import BYTE

L, H, G, C, M = 3, 4, 2, 32, 64
D = C // H
MERGES = ["t h", "th e", "Ġ the", "Ġ a", "Ġ Ġ"]
TOKENS = ["<|end|>", *BYTE, *(merge.replace(" ", "") for merge in MERGES)]

def tensors(tied=True):
    """Random weights under their names in the file; rows of W_q and W_k as llama.cpp rotates them."""
    torch.manual_seed(0)
    shapes = {"token_embd": (len(TOKENS), C), "output_norm": (C,)}
    if not tied:
        shapes["output"] = (len(TOKENS), C)
    for i in range(L):
        shapes |= {f"blk.{i}.attn_norm": (C,), f"blk.{i}.ffn_norm": (C,), f"blk.{i}.attn_q": (C, C),
                   f"blk.{i}.attn_k": (G * D, C), f"blk.{i}.attn_v": (G * D, C),
                   f"blk.{i}.attn_output": (C, C), f"blk.{i}.ffn_gate": (M, C),
                   f"blk.{i}.ffn_up": (M, C), f"blk.{i}.ffn_down": (C, M)}
    gains = {name: 1 + 0.1 * torch.randn(shape) for name, shape in shapes.items() if len(shape) == 1}
    matrices = {name: torch.randn(shape) / shape[1]**0.5 for name, shape in shapes.items() if len(shape) == 2}
    return {f"{name}.weight": weight for name, weight in (gains | matrices).items()}

def write(path, weights, arch="llama", change=lambda writer: None, kind=None, pre="gpt-2", model="gpt2",
          merges=MERGES):
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(L)
    writer.add_context_length(64)
    writer.add_embedding_length(C)
    writer.add_feed_forward_length(M)
    writer.add_head_count(H)
    writer.add_head_count_kv(G)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] + [1] * (len(TOKENS) - 1))
    writer.add_token_merges(merges)
    change(writer)
    for name, weight in weights.items():
        numbers = weight.numpy()
        if kind and weight.dim() == 2:
            writer.add_tensor(name, gguf.quantize(numbers, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
