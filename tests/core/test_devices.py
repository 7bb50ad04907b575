"""Nothing is made on another device than the model's, so that a GPU works though these tests have none.

The tensors are on the device meta: they hold no numbers, and to mix them with others is an error. And
torch.compile reads the model as one graph; its front end needs no C++ compiler.
"""

import pytest
import torch

from minisa import model as model_file
from minisa.axes.squeeze import POLICIES, Reading, Squeezing, units
from minisa.kit.checkpoint import empty
from minisa.model import GPT, GPTConfig, KVCache

MODES = [{}, {"share": "1-3"}, {"share": "1-3", "share_kind": "kv"}, {"share": "1-3", "n_kv_head": 2}]
modes = pytest.mark.parametrize("mode", MODES, ids=str)

def config(**mode):
    return GPTConfig(block_size=12, vocab_size=50, n_layer=5, n_head=4, n_embd=32, **mode)

def tokens(T):
    return torch.zeros(2, T, dtype=torch.long, device="meta")

@modes
def test_text_is_generated_where_the_model_is(mode):
    model = empty(config(**mode)).eval()                    # on the device meta
    text = model.generate(tokens(5), 20, top_k=5)           # goes past block_size
    assert text.shape == (2, 25) and text.is_meta
    logits, loss = model(tokens(5), tokens(5))
    assert logits.is_meta and loss.is_meta and all(P.is_meta for P in model.attention_weights(tokens(5)))

@modes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_cache_is_where_the_model_is_and_as_precise(mode, dtype):
    model = empty(config(**mode)).to(dtype).eval()
    cache = KVCache(model, 2, 12)
    model.generate(tokens(5), 3, cache=cache)
    assert all(t.is_meta and t.dtype == dtype for t in cache.k + cache.v) and cache.length == 7

@pytest.mark.parametrize("policy", POLICIES)
def test_a_squeezed_cache_decodes_where_the_model_is(policy):
    model = empty(config(share="1-3")).eval()
    cache = KVCache(model, 2, 12)
    with torch.no_grad():
        model.hidden(tokens(12), cache)
    received = {unit: torch.zeros(2, 12, device="meta") for unit in units(model.config)}
    reading = Reading(12, cache, [0.9, 0.5, 0.4, 0.3, 0.2], {POLICIES[policy]: received})
    small = Squeezing(8, policy).of(reading)
    assert model.generate(tokens(1), 9, cache=small).is_meta and all(t.is_meta for t in small.tensors)

def test_a_tensor_on_another_device_would_be_found(monkeypatch):
    angles = model_file.rope_angles
    monkeypatch.setattr(model_file, "rope_angles", lambda config, at: angles(config, torch.arange(len(at))))
    with pytest.raises(RuntimeError, match="device"):
        empty(config()).eval().generate(tokens(5), 2)

AXES = [("heads", {"heads": "mix"}), ("lowrank", {"rank": 4})]

@pytest.mark.parametrize("mode", [*MODES, *AXES], ids=str)
def test_all_that_training_makes_is_where_the_model_is(mode):
    name, settings = mode if type(mode) is tuple else (None, {})
    changes = [{"by": name, "settings": settings}] if name else []
    model = empty(config(**({"share": "1-3"} if name else mode)), changes).to("meta").train()
    idx = tokens(12)
    optimizer = torch.optim.AdamW(model.parameters())
    model(idx, idx)[1].backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    assert all(p.grad.is_meta for p in model.parameters())

class Graphs(list):
    """A backend of torch.compile that runs each graph as it is."""

    def __call__(self, graph, inputs):
        self.append(graph)
        return graph

def two_layers(mode):
    torch._dynamo.reset()
    return GPT(GPTConfig(block_size=12, vocab_size=50, n_layer=2, n_head=4, n_embd=32, **mode))

SHARING = [{}, {"share": "0-1"}, {"share": "0-1", "share_kind": "kv", "n_kv_head": 2}]

@pytest.mark.parametrize("mode", SHARING, ids=str)
def test_training_compiles_once_as_one_graph(mode):
    graphs, model, idx = Graphs(), two_layers(mode).train(), torch.zeros(2, 12, dtype=torch.long)
    forward = torch.compile(model, backend=graphs, fullgraph=True)
    for _ in range(3):
        forward(idx, idx)[1].backward()
        with torch.inference_mode():
            model.eval()(idx)                               # an evaluation is not compiled
        model.train()
    assert len(graphs) == 1

def test_decoding_compiles_once_each_for_an_empty_a_filling_and_a_full_cache():
    graphs, model = Graphs(), two_layers({"share": "0-1"}).eval()
    hidden, cache = torch.compile(model.hidden, backend=graphs, dynamic=True), KVCache(model, 1, 12)
    with torch.no_grad():
        for _ in range(30):                                 # not once for each length
            hidden(torch.zeros(1, 1, dtype=torch.long), cache)
    assert len(graphs) == 3
