"""Decoding faster gives the same."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from minisa import fast
from minisa.fast import for_decoding, multiply
from minisa.model import GPT, GPTConfig

@pytest.fixture(autouse=True)
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)

@pytest.mark.parametrize("n_out, n_in", [(24, 16), (64, 16), (7, 16), (24, 9), (7, 9)])
@pytest.mark.parametrize("by_columns", [False, True])
def test_one_token_is_multiplied_the_same_however_the_weight_is_stored(n_out, n_in, by_columns):
    torch.manual_seed(0)
    weight, x = torch.randn(n_out, n_in), torch.randn(1, 1, n_in)
    stored = weight.mT.contiguous().mT if by_columns else weight
    with torch.inference_mode():
        y = multiply(stored, x)
        assert y.shape == (1, 1, n_out)
        torch.testing.assert_close(y.double(), x.double() @ weight.double().T, atol=1e-5, rtol=1e-5)

@pytest.mark.parametrize("tied", [True, False])
def test_no_output_changes(tied, monkeypatch):
    monkeypatch.setattr(fast, "LARGE", 0)
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=100, block_size=32, n_layer=3, n_head=2, n_embd=32, tied=tied, share="1-2")
    model = GPT(config).eval()
    idx = torch.randint(100, (1, 9))
    logits, tokens, names = model(idx)[0], model.generate(idx, 40, 0), list(model.state_dict())
    for_decoding(model)
    top = model.embed if tied else model.unembed
    assert top.weight.stride(0) == model.blocks[0].mlp.gate.weight.stride(0) == 1
    torch.testing.assert_close(model(idx)[0], logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(model.generate(idx, 40, 0), tokens) and list(model.state_dict()) == names

@pytest.mark.parametrize("seconds, expected", [(0.4, "bfloat16"), (0.9, "float32"), (3.0, "float32")])
def test_the_format_is_the_one_whose_product_took_less_time(seconds, expected, monkeypatch):
    def times():                                        # when each product began and ended
        now = 0.0
        for took in [1.0, seconds] * 5:
            yield now
            now += took
            yield now
    monkeypatch.setattr(fast, "time", SimpleNamespace(perf_counter=partial(next, times())))
    assert fast.faster_dtype() == expected

@pytest.mark.parametrize("share", ["", "1-2"])
def test_forming_P_in_bfloat16_gives_what_float32_gives_but_for_its_rounding(share):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=100, block_size=32, n_layer=3, n_head=2, n_embd=32, share=share))
    idx = torch.randint(100, (4, 33))
    model(idx[:, :-1], idx[:, 1:])[1].backward()
    exact = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.fuse = False
    with torch.autocast("cpu", torch.bfloat16):
        model(idx[:, :-1], idx[:, 1:])[1].backward()
    for name, p in model.named_parameters():
        assert (p.grad - exact[name]).norm() < 0.03 * exact[name].norm(), name
