"""Decoding faster gives the same."""

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
