"""What fits into this machine's memory is told before any work is done."""

import os

import pytest
import torch

from minisa.kit import machine
from minisa.model import GPT, GPTConfig

if not hasattr(os, "sysconf"):
    pytest.skip("needs a system that tells its memory", allow_module_level=True)
CPU = torch.device("cpu")

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

@pytest.mark.parametrize("what, sizes, sequences", [
    ("--batch_size", {}, 4_000_000), ("--block_size", {"block_size": 2**20, "share": "1-3"}, 8)])
def test_a_batch_and_a_context_that_cannot_fit_are_named(what, sizes, sequences):
    with pytest.raises(ValueError, match=f"{what}.* takes .* GB of memory"):
        machine.refuse_too_large(GPTConfig(**sizes), sequences, CPU, "float32")
