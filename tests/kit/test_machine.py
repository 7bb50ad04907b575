"""What this machine does fastest is found out; what its memory does not hold is told before any work."""

import argparse
import itertools
import os

import pytest
import torch

from minisa.kit import machine
from minisa.model import GPT, GPTConfig

CPU = torch.device("cpu")
tells_memory = pytest.mark.skipif(not hasattr(os, "sysconf"), reason="needs a system that tells its memory")

@pytest.mark.parametrize("dtype, fused", [("float32", 2), ("bfloat16", 0)])
def test_a_cpu_computes_in_the_named_format_and_fuses_attention_in_float32_only(monkeypatch, dtype, fused):
    functions, calls = torch.nn.functional, []
    kernel = functions.scaled_dot_product_attention
    monkeypatch.setattr(functions, "scaled_dot_product_attention",
                        lambda *args, **more: calls.append(1) or kernel(*args, **more))
    model, idx = GPT(GPTConfig(n_layer=2)), torch.zeros(1, 9, dtype=torch.long)
    with machine.number_format(model, dtype):
        logits, _ = model(idx)
    assert logits.dtype == getattr(torch, dtype) and len(calls) == fused

@pytest.mark.parametrize("seconds, chosen", [(0.7, "bfloat16"), (0.72, "float32"), (2.0, "float32")])
def test_bfloat16_is_chosen_if_its_best_time_is_1_4_times_as_good(monkeypatch, seconds, chosen):
    took = [9.0, 9.0, 1.0, seconds, *[9.0] * 6]             # in turn, float32 first
    clock = itertools.accumulate(part for each in took for part in (0.0, each))
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(clock))
    assert machine.choose_dtype(CPU) == chosen
    assert machine.choose_dtype(CPU, "smollm2") == "float32"        # and times nothing

@pytest.mark.parametrize("has, chosen", [(True, "bfloat16"), (False, "float32")])
def test_a_card_trains_in_bfloat16_if_it_need_not_emulate_it(monkeypatch, has, chosen):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                        lambda including_emulation: has or including_emulation)
    assert machine.choose_dtype(torch.device("cuda")) == chosen

def test_the_first_device_that_computes_is_chosen_and_what_is_wrong_with_others_is_told(monkeypatch):
    working = []

    def device(name):
        if name not in working:
            raise argparse.ArgumentTypeError(f"{name} is too old")
        return torch.device(name)
    monkeypatch.setattr(machine, "device", device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert machine.choose_device() == (CPU, "cuda is too old; mps is too old")
    for name in "mps", "cuda":
        working.append(name)
        assert machine.choose_device() == (torch.device(name), "")

@tells_memory
def test_more_memory_than_there_is_is_refused():
    machine.refuse_too_much(2**20, "this")
    with pytest.raises(ValueError, match="this takes 1,000,000 GB of memory, this machine has"):
        machine.refuse_too_much(10**15, "this")

@pytest.mark.parametrize("n_kv_head", [1, 4])
def test_the_numbers_of_a_model_are_counted_before_it_is_made(monkeypatch, n_kv_head):
    config = GPTConfig(n_kv_head=n_kv_head)
    params = sum(p.numel() for p in GPT(config).parameters()) - config.n_embd       # but those of a norm
    told = []
    monkeypatch.setattr(machine, "refuse_too_much", lambda n_bytes, what: told.append((n_bytes, what)))
    machine.refuse_too_large(config, 1, CPU, "float32")
    assert told == [(16 * params, "training a model of this shape")]

@tells_memory
@pytest.mark.parametrize("what, sizes, sequences", [
    ("--batch_size", {}, 4_000_000), ("--block_size", {"block_size": 2**20, "share": "1-3"}, 8)])
def test_a_batch_and_a_context_that_cannot_fit_are_named(what, sizes, sequences):
    with pytest.raises(ValueError, match=f"{what}.* takes .* GB of memory"):
        machine.refuse_too_large(GPTConfig(**sizes), sequences, CPU, "float32")
