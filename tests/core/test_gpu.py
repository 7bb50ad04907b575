"""On a CUDA card: training, decoding, the bill and resuming, in all kinds. `pytest -m gpu` runs these alone.

Without a card they skip, and say so; test_devices.py holds what can be held without one.
"""

import json
import sys
from pathlib import Path

import pytest
import torch

import minisa
import sample
import train
from minisa.cost import measure, predict
from minisa.kit.machine import compiled, number_format
from minisa.model import GPT, GPTConfig, KVCache

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")]

MODES = [{}, {"share": "1-3"}, {"share": "1-3", "share_kind": "kv"}, {"share": "1-3", "n_kv_head": 2},
         {"n_kv_head": 1}]
modes = pytest.mark.parametrize("mode", MODES, ids=str)

def make(**mode):
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=64, vocab_size=300, n_layer=4, n_head=4, n_embd=64, **mode))

def tokens(B, T):
    return torch.randint(300, (B, T), generator=torch.Generator().manual_seed(1))

def losses(model, dtype, steps=30):
    """The losses of some steps on one batch."""
    idx = tokens(8, 65).cuda()
    model, autocast = model.cuda().train(), number_format(model, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    found = []
    for _ in range(steps):
        with autocast:
            loss = model(idx[:, :-1], idx[:, 1:])[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found

@modes
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_learns_on_the_card_as_on_the_cpu(mode, dtype):
    found = losses(make(**mode), dtype)
    idx = tokens(8, 65)
    expected = make(**mode)(idx[:, :-1], idx[:, 1:])[1].item()
    assert found[0] == pytest.approx(expected, rel=2e-3) and found[-1] < 0.9 * found[0]

@modes
def test_logits_on_the_card_are_those_of_the_cpu_cached_or_not(mode):
    torch.set_float32_matmul_precision("highest")
    model, idx = make(**mode).eval(), tokens(2, 64)
    with torch.inference_mode():
        expected = model(idx)[0]
        model.cuda()
        cache = KVCache(model, 2, 64)
        cached = torch.cat([model(part.cuda(), cache=cache)[0] for part in idx.split([20, 1, 1, 42], 1)], 1)
        assert (model(idx.cuda())[0].cpu() - expected).abs().max() < 1e-3
        assert (cached.cpu() - expected).abs().max() < 1e-3

@modes
def test_text_is_generated_past_block_size_and_the_same_seed_gives_the_same(mode):
    model, idx = make(**mode).cuda().eval(), tokens(2, 5).cuda()
    one, two = (model.generate(idx, 100, top_k=20, generator=torch.Generator("cuda").manual_seed(3))
                for _ in range(2))
    assert one.shape == (2, 105) and torch.equal(one, two)
    greedy = model.generate(idx, 20, 0)
    assert torch.equal(greedy.cpu(), make(**mode).eval().generate(idx.cpu(), 20, 0))

@modes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bill_is_the_measured_one(mode, dtype):
    model = make(**mode).cuda().to(dtype).eval()
    size = model.embed.weight.element_size()
    assert measure(model, 64, 3) == predict(model, 64, 3, size)

def test_a_compiled_model_trains():
    model, idx = make(share="1-3").cuda().train(), tokens(8, 65).cuda()
    forward, seconds = compiled(model, idx[:, :-1], idx[:, 1:], number_format(model, "bfloat16"))
    with number_format(model, "bfloat16"):
        loss = forward(idx[:, :-1], idx[:, 1:])[1]
    loss.backward()
    assert seconds > 0 and all(p.grad.isfinite().all() for p in model.parameters())

def test_a_run_is_trained_resumed_and_sampled_on_the_card(text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--n_layer=3", "--n_head=2", "--n_embd=32", "--block_size=32", "--batch_size=4", "--share=1-2",
             "--vocab_size=300", "--max_iters=20", "--eval_interval=10", "--eval_tokens=500",
             "--dtype=bfloat16", f"--text={text}", "--data_dir=data", "--device=cuda"]
    commands = [(train, *flags, "--out_dir=out/run"), (train, "--resume", "--out_dir=out/run"),
                (sample, "out/run", "--device=cuda", "--max_new_tokens=20", "--json")]
    for script, *words in commands:
        monkeypatch.setattr(sys, "argv", [script.__name__, *words])
        assert script.main() == 0
    bill = json.loads(capsys.readouterr().out.splitlines()[-1])["bill"]
    assert bill[0]["engine"] == "torch" and bill[0]["tokens_per_s"] > 0
    assert minisa.load(Path("out/run"), device="cuda")[0].embed.weight.is_cuda
