"""The benchmark measures what it says, on a tiny shape."""

import pytest
import torch

from minisa import bench, checkpoint
from minisa.cost import measure
from minisa.model import GPT, GPTConfig
from minisa.tokenizer import Tokenizer


def test_it_prints_a_row_for_each_mode(run, monkeypatch):
    monkeypatch.setattr(bench, "SHAPES", {"tiny": (dict(n_layer=3, n_head=2, n_embd=16, vocab_size=64, block_size=32), 2, 2, 32)})
    monkeypatch.setattr(bench, "timed", lambda f, where: (f(), 0.5)[1])
    status, out, err = run(bench.main, "--shapes=tiny", "--rounds=2")
    assert (status, err) == (0, "")
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.split()[:1] in (["full"], ["weights"], ["kv"])}
    assert out.count("÷ full") == 3 and rows["full"][1:6] == ["128", "1.00", "64", "1.00", "4"]      # 2 × 32 tokens in half a second
    assert "17% fewer cache bytes" in out and "33% fewer cache bytes" in out


def test_a_decode_step_sees_a_full_cache():
    config = GPTConfig(n_layer=3, n_head=2, n_embd=16, vocab_size=64, block_size=32, share="0-2")
    model, step_flops = GPT(config).eval(), []
    from torch.utils.flop_counter import FlopCounterMode
    from torch.nn.attention import SDPBackend, sdpa_kernel
    step = bench.decoder(model, 1, 32)
    for _ in range(3):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            step()
        step_flops.append(counter.get_total_flops())
    assert step_flops == [measure(model, 32).decode_flops] * 3


def test_timing_repeats_until_it_is_long_enough():
    calls = []
    assert bench.timed(lambda: calls.append(1), torch.device("cpu"), at_least=0.01) * len(calls) > 0.0099 and len(calls) > 1


def test_squeezed_caches_are_timed_beside_the_full_one(run, tmp_path, monkeypatch):
    model = GPT(GPTConfig(n_layer=3, n_head=2, n_embd=16, vocab_size=256, block_size=64))
    checkpoint.save(tmp_path / "run" / "model.pt", model, Tokenizer.from_tokens([bytes([b]) for b in range(256)]), {})
    monkeypatch.setattr(bench, "timed", lambda f, where, at_least: (f(), 0.5)[1])
    status, out, err = run(bench.main, "--model=run", "--squeeze=16", "--batch_size=2", "--context=64", "--rounds=1")
    rows = [line.rsplit(maxsplit=4) for line in out.splitlines()[-7:]]
    assert (status, err) == (0, "") and [row[0] for row in rows[:3]] == ["full cache", "window, equal budgets", "window, cut 0.5"]
    assert [row[2:] for row in rows[:2]] == [["1.00", "4.0", "1.00"], ["0.25", "4.0", "1.00"]]
    status, _, err = run(bench.main, "--model=run", "--squeeze=100", "--context=64")
    assert status == 2 and "--squeeze=100: must be at most --context=64" in err


@pytest.mark.parametrize("flag, message", [("--shapes=huge", "'huge' is none of small, large, long"), ("--rounds=0", "0 is not a number"), ("--device=tpu", "--device: tpu is not on this machine")])
def test_a_wrong_flag_gets_one_line_and_status_2(run, flag, message):
    status, _, err = run(bench.main, flag)
    assert status == 2 and message in err and err.count("\n") == 1
