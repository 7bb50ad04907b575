"""What makes some machines faster, and nothing else. Nobody needs it to understand the model.

One token's time is that of reading the weights, and BLAS reads a matrix for one token with one
thread. Cut into as many parts as there are threads, all of them read. A matrix with many more rows
than columns is read fastest when it is stored by columns. `python -m minisa.lab.bench smollm2
--plain` shows the gain: 1.44 times the tokens/s on two cores of a Zen 3, none on a Sapphire Rapids.
"""

import ctypes
import sys
import time
import warnings
from functools import partial

import torch
import torch.nn as nn
from torch.nn import functional as F

LARGE = 2**17      # numbers, 0.5 MB: a smaller matrix comes from the processor's own cache anyway

def faster_dtype():
    """"bfloat16" if this machine's CPU multiplies it 1.4 times as fast as float32, else "float32".
    One product is timed in each; the best of several, as other programs may be running."""
    seconds = {"float32": [], "bfloat16": []}
    for name in [*seconds] * 5:
        x = torch.ones(256, 256, dtype=getattr(torch, name))
        begun = time.perf_counter()
        x @ x
        seconds[name].append(time.perf_counter() - begun)
    return "bfloat16" if 1.4 * min(seconds["bfloat16"]) < min(seconds["float32"]) else "float32"

def number_format(model, dtype):
    """Make a model ready to train in "float32" or "bfloat16" → the context to run it in."""
    device = next(model.parameters()).device.type
    if device == "cuda":
        torch.set_float32_matmul_precision("high")      # TF32, where the card has it
    model.fuse = dtype == "float32" or device != "cpu"  # a CPU's fused bfloat16 kernel is slow
    return torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")

def compiled(model, idx, targets, autocast):
    """→ the model compiled, by a first step on a batch, and the seconds which that took. Raises
    ValueError if torch.compile lacks what it needs."""
    warnings.filterwarnings("ignore", message=".*code generation for complex operators")
    forward, begun = torch.compile(model), time.perf_counter()
    try:
        with autocast:
            forward(idx, targets)[1].backward()
    except RuntimeError as error:
        why = " ".join(str(error).split())[:80]
        raise ValueError("--compile: torch.compile needs a C++ compiler, such as g++, and Python's "
                         f"headers; install them, or drop the flag ({why})") from None
    model.zero_grad(set_to_none=True)
    return forward, time.perf_counter() - begun

def multiply(weight, x):
    """x (..., in), weight (out, in) → x weightᵀ (..., out); one token on a CPU goes in parts."""
    n_out, n_in = weight.shape
    if x.numel() > n_in or torch.is_grad_enabled():
        return F.linear(x, weight)
    n, shape = torch.get_num_threads(), x.shape[:-1]
    if weight.stride(0) == 1 and n_in % n == 0:                     # by columns: parts of the input
        parts = torch.bmm(x.view(n, 1, -1), weight.mT.view(n, -1, n_out))
        return parts.sum(0).view(*shape, n_out)
    if weight.stride(1) == 1 and n_out % n == 0:                      # by rows: parts of the output
        parts = weight.view(n, -1, n_in).mT
        return torch.bmm(x.view(1, 1, -1).expand(n, -1, -1), parts).view(*shape, n_out)
    return F.linear(x, weight)

@torch.no_grad()
def for_decoding(model):
    """Store and multiply the large matrices of a GPT, in place, as decodes fastest. → the model

    Changes no result but by rounding. Does nothing on a GPU, or in another format than float32.
    """
    if model.embed.weight.device.type != "cpu" or model.embed.weight.dtype != torch.float32:
        return model
    for part in model.modules():
        large = isinstance(part, (nn.Linear, nn.Embedding)) and part.weight.numel() >= LARGE
        if large and part.weight.size(0) > 2 * part.weight.size(1):
            part.weight.data = part.weight.data.mT.contiguous().mT
        if large and isinstance(part, nn.Linear):
            part.forward = partial(multiply, part.weight)
    top = model.embed if model.config.tied else model.unembed
    if top.weight.numel() >= LARGE:
        model.head = partial(multiply, top.weight)
    return model

def keep_memory():
    """Ask glibc to keep freed memory. It returns large blocks to Linux and gets them anew in every
    step otherwise, which costs a fifth of the time on a CPU."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        ctypes.CDLL(None).mallopt(-3, 32 << 20)     # M_MMAP_THRESHOLD: up to 32 MB from the heap
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)    # M_TRIM_THRESHOLD: which is kept
