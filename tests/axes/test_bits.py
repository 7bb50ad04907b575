"""The int8 cache against a plain one that rounds number by number, and its bill against what is counted."""

import math

import numpy as np
import pytest
import torch
from test_squeeze import IDX, MODELS, Plain, few_observers, make, one_by_one  # noqa: F401 (a fixture)

from minisa import cost
from minisa.axes import eigen, squeeze
from minisa.axes.bits import Int8, quantize
from minisa.axes.squeeze import POLICIES, Squeezing, Stored, Whole, read
from minisa.kit import cli
from minisa.kit.data import tokenize
from minisa.kit.tokenizer import Tokenizer

def narrow():
    return eigen.compress(make(share="2-4", n_kv_head=2), IDX, rank=5)

def stored(model):
    return Stored(model.config.block_size, "window", 1, Int8)

def begun(model, idx, way):
    return way.of(read(model, idx, [way]))

# ---- numbers ----

def rounded(x):
    """x (G, d) → what int8 makes of it, number by number."""
    out = torch.zeros_like(x)
    for g, head in enumerate(x.float().numpy()):
        largest = max(abs(head))
        scale = np.float32(torch.tensor(largest / 127).bfloat16().item())
        for i, number in enumerate(head):
            n = max(-127, min(127, round(number / scale))) if largest else 0       # float32, as there
            out[g, i] = n * float(scale)
    return out

@pytest.mark.parametrize("dtype, size", [(torch.float32, 1.0), (torch.float32, 1e-20), (torch.float32, 1e20),
                                         (torch.bfloat16, 1.0)])
def test_numbers_are_off_by_half_a_step_of_127_at_most(dtype, size):
    x = size * torch.randn(2, 3, 50, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    x[0, 0, 7] = 0.0
    numbers, scales = quantize(x)
    assert (numbers.dtype, scales.dtype, scales.shape) == (torch.int8, torch.bfloat16, (2, 3, 50, 1))
    step = x.float().abs().amax(-1, keepdim=True) / 127
    apart = (numbers * scales.float() - x.float()).abs()
    assert (apart <= 0.76 * step).all()             # the largest one may be off by 127 · 2⁻⁹ steps more
    assert (apart <= 0.502 * step).float().mean() > 0.95 and (numbers[0, 0, 7] == 0).all()
    kept = Int8(x, 60).first(50)
    torch.testing.assert_close(kept, (numbers * scales.float()).to(dtype))
    for row in range(50):
        torch.testing.assert_close(kept[1, :, row].float(), rounded(x[1, :, row].float()),
                                   atol=1.01 * step.max().item() * (dtype == torch.bfloat16), rtol=1e-2)

class PlainInt8(Plain):
    """A Plain whose numbers are rounded: those of the prompt when all of it is read, new ones at once."""

    def __init__(self, model, prompt, policy, rooms):
        super().__init__(model, prompt, policy, rooms)
        class Rounding(dict):
            def __setitem__(self, position, x):
                super().__setitem__(position, rounded(x) if position >= prompt else x)
        self.k, self.v = ([Rounding() for _ in each] for each in (self.k, self.v))

    def evict(self, u, length, room):
        super().evict(u, length, room)
        if room == self.rooms[u]:                               # at the end of the prompt
            for layer in self.units[u]:
                for numbers in (self.k[layer], self.v[layer]):
                    numbers.update({p: rounded(x) for p, x in numbers.items()})

@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("policy", [*POLICIES, None])
@torch.no_grad()
def test_it_attends_to_rounded_numbers_of_what_the_policy_keeps(kind, policy, few_observers):  # noqa: F811
    model, idx = MODELS[kind]().double(), IDX[:, :32]       # so that hardly any number is nearly halfway
    way = Squeezing(10, policy, 0.5, Int8) if policy else stored(model)
    floats = Squeezing(way.budget, way.policy, way.cut)
    cache, exact = (begun(model, idx[:, :20], each) for each in (way, floats))
    got, unrounded = (one_by_one(model, each, idx[:, 20:]) for each in (cache, exact))
    rooms = [kept.room for kept in cache.units]
    for row, other, tokens in zip(got, unrounded, idx):
        expected = PlainInt8(model, 20, way.policy, rooms).logits(tokens)[20:]
        assert (row - expected).abs().max() < 1e-3 < (row - other).abs().max()

# ---- the whole cache ----

@torch.no_grad()
def test_without_a_policy_all_tokens_stay_and_text_goes_on_past_the_context():
    model = make(block_size=24)
    way = stored(model)
    rest, cache = way.begin(model, IDX)                 # 40 tokens: the last 23 are read, one is left
    assert cache.length == 23 and cache.rooms == [24] * 5
    text = model.generate(rest, 50, 0, cache=cache)
    assert text.shape == (2, 51) and cache.length == 73 and cache.rooms == [24] * 5
    assert all(sorted(kept.where[0].tolist()) == [*range(49, 73)] for kept in cache.units)

@torch.no_grad()
def test_narrow_keys_and_their_positions_are_kept_in_int8():
    model = narrow()
    cache = begun(model, IDX[:, :20], stored(model))
    got, exact = one_by_one(model, cache, IDX[:, 20:]), model(IDX)[0][:, 20:]
    assert 0 < (got - exact).abs().mean() < 0.05 * exact.std()

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_model_may_be_of_any_dtype(dtype):
    model = make(share="1-3").to(dtype)
    rest, cache = stored(model).begin(model, IDX)
    assert model.generate(rest, 5, 0, cache=cache).shape == (2, 6)
    bill = cache.predict(model, 40)
    assert bill.cache_bytes_per_token == 8 * 4 * (8 + 2)        # 5 layers of v, 3 of k; 4 heads of 8 numbers

# ---- the bill ----

@pytest.mark.parametrize("kind", [*MODELS, "narrow"])
@pytest.mark.parametrize("policy", ["heavy", None])
@torch.no_grad()
def test_the_bill_is_predicted(kind, policy):
    model = narrow() if kind == "narrow" else MODELS[kind]()
    way = Squeezing(20, policy, 0.5, Int8) if policy else stored(model)
    cache = begun(model, torch.zeros(1, 49, dtype=torch.long), way)
    bill = cache.predict(model, 50)
    assert bill == cost.measure(model, 50, cache=cache)
    held = 0
    for storage in cache.k + cache.v:
        _, G, room, d = storage.first(storage.numbers.size(2)).shape
        held += G * room * (d + 2) if d else 0
    assert bill.cache_bytes == held and bill.params == cost.predict(model, 50).params

def test_it_reads_a_byte_in_place_of_four_and_the_scales():
    model = make()
    cache = begun(model, IDX[:1], stored(model))
    whole, small = cost.predict(model, 41), cache.predict(model, 41)
    assert whole.read_bytes - small.read_bytes == 41 * 5 * 2 * 4 * (8 * 4 - (8 + 2))
    assert small.decode_flops == whole.decode_flops

BYTES = Tokenizer([bytes([b]) for b in range(256)])

@pytest.fixture
def data(text, tmp_path):
    return tokenize(text, tokenizer=BYTES, folder=tmp_path)

def test_the_cache_for_the_bill_has_room_for_the_context(data):
    model = make(vocab_size=256)
    cache = stored(model).for_bill(model, lambda: data, 40)
    assert cache.length == 39 and cache.rooms == [40] * 5
    assert cache.predict(model, 40) == cost.measure(model, 40, cache=cache)

@torch.no_grad()
def test_the_loss_is_that_of_the_rounded_cache(data):
    model = make(vocab_size=256)
    whole, eight = squeeze.bits_per_byte(model, data, 64, 64, [Whole(), stored(model)])
    windows = data.windows("val", 4, 64)
    losses = []
    for window in windows:                              # 16 tokens after a prompt of 48
        plain = PlainInt8(model, 48, "window", [64] * 5).logits(window[:-1])[48:]
        losses.append(torch.nn.functional.cross_entropy(plain, window[49:]).item())
    per_byte = sum(losses) / len(losses) / math.log(2)
    assert eight == pytest.approx(per_byte, abs=1e-4) and abs(eight - whole) > 5e-4

# ---- flags ----

def ways(model, *flags):
    parser = cli.Parser("", "x")
    squeeze.add_flags(parser)
    args = parser.parse_args(flags)
    args.context = 64
    return squeeze.ways_of(args, model)

def test_a_flag_chooses_it_alone_and_with_every_policy():
    model = make()
    assert [type(way) for way in ways(model)] == [Whole]
    whole, alone = ways(model, "--cache_bits=8")
    assert (whole.name("m"), alone.name("m")) == ("m", "m, 8 bits")
    assert whole.facts == {"policy": "", "budget": "", "cut": "", "bits": ""}
    assert alone.facts == {"policy": "", "budget": "", "cut": "", "bits": 8}
    _, _, squeezed = ways(model, "--cache_bits=8", "--squeeze=8", "--squeeze_policy=snap")
    assert squeezed.name("m") == "m, squeeze 8 snap 0.5, 8 bits"
    assert squeezed.facts == {"policy": "snap", "budget": 8, "cut": 0.5, "bits": 8}

@pytest.mark.parametrize("flag", ["--cache_bits=4", "--cache_bits=int8", "--cache_bits="])
def test_other_bits_are_refused_by_name(flag):
    with pytest.raises(ValueError, match="--cache_bits: invalid"):
        ways(make(), flag)
