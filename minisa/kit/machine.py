"""What this machine can do: which device and number format train fastest, and what fits."""

import argparse
import ctypes
import os
import sys
import time
import warnings

import torch

from minisa.kit.cli import device

def choose_device():
    """→ the fastest device that works here, and what is wrong with the others."""
    wrong = []
    with warnings.catch_warnings(record=True) as told:          # of a driver that is too old, say
        warnings.simplefilter("always")
        for name, backend in (("cuda", torch.cuda), ("mps", torch.backends.mps)):
            try:
                if backend.is_available():
                    return device(name), ""
            except argparse.ArgumentTypeError as error:
                wrong.append(str(error))
    wrong += [str(warning.message).partition("\n")[0] for warning in told]
    return torch.device("cpu"), "; ".join(wrong)

def choose_dtype(device, init_from=""):
    """→ the number format that trains faster; on a CPU, float32 if training starts from another model."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if fast else "float32"
    return faster_dtype() if device.type == "cpu" and not init_from else "float32"

def faster_dtype():
    """"bfloat16" if this machine's CPU multiplies it 1.4 times as fast as float32, else "float32". A
    product is timed several times in each; the best time counts, since other programs may be running."""
    seconds = {"float32": [], "bfloat16": []}
    for name in [*seconds] * 5:
        x = torch.ones(256, 256, dtype=getattr(torch, name))
        begun = time.perf_counter()
        x @ x
        seconds[name].append(time.perf_counter() - begun)
    return "bfloat16" if 1.4 * min(seconds["bfloat16"]) < min(seconds["float32"]) else "float32"

def keep_memory():
    """Ask glibc to keep freed memory. Otherwise it returns large blocks to Linux and requests them again
    in every step, which costs a fifth of the time on a CPU."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        ctypes.CDLL(None).mallopt(-3, 32 << 20)     # M_MMAP_THRESHOLD: up to 32 MB from the heap
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)    # M_TRIM_THRESHOLD: which is kept

def number_format(model, dtype):
    """Make a model and this machine ready to train in "float32" or "bfloat16" → the context to run the
    model in."""
    keep_memory()
    device = next(model.parameters()).device.type
    if device == "cuda":
        torch.set_float32_matmul_precision("high")      # TF32, where the card has it
    if dtype == "bfloat16" and device == "cpu":
        model.watch = lambda P: None                    # a CPU's fused bfloat16 kernel is slow
    return torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")

def compiled(model, idx, targets, autocast):
    """→ the model, compiled by a first step on a batch, and the seconds that this took. Raises ValueError
    if torch.compile lacks what it needs."""
    warnings.filterwarnings("ignore", message=".*code generation for complex operators")
    forward, begun = torch.compile(model), time.perf_counter()
    try:
        with autocast:
            forward(idx, targets)[1].backward()
    except RuntimeError as error:
        why = " ".join(str(error).split())[:80]
        raise ValueError("--compile: torch.compile needs a C++ compiler, such as g++, and Python's "
                         f"headers; install them, or drop the flag ({why})") from None
    model.zero_grad()
    return forward, time.perf_counter() - begun

# ---- what fits into its memory ----

def refuse_too_much(n_bytes, what):
    """Raises ValueError, before any work is done, if something takes more memory than this machine has."""
    if hasattr(os, "sysconf"):
        has = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if n_bytes > has:
            raise ValueError(f"{what} takes {n_bytes / 1e9:,.0f} GB of memory, this machine has "
                             f"{has / 1e9:,.0f} GB; take a smaller one")

def refuse_too_large(config, sequences, device, dtype):
    """Raises ValueError if training on this many sequences at once needs, by an estimate that leaves most
    things out, more memory than this machine has."""
    if device.type != "cpu":
        return
    C, M, V, T = config.n_embd, config.n_hidden, config.vocab_size, config.block_size
    attention = 2 * C * C + 2 * C * config.n_kv_head * config.head_dim
    params = V * C + config.n_layer * (attention + 3 * C * M)
    anchors = len(config.spans) if dtype == "float32" else config.n_layer      # the layers that form P
    P = anchors * sequences * config.n_head * T**2
    needs = {           # bytes: a parameter's number, gradient and two means; a number and its gradient
        "training a model of this shape": 16 * params,
        f"--batch_size: reading {sequences} sequences at once": 8 * sequences * T * V,
        f"--block_size={T}: forming attention weights of this size": 8 * P,
    }
    most = max(needs, key=needs.get)
    refuse_too_much(needs[most], most)
