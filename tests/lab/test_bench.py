"""The benchmark measures what it says, on tiny models and with a clock that always says the same."""

import csv
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from minisa.cost import measure
from minisa.kit import bill, checkpoint, timing
from minisa.kit.tokenizer import Tokenizer
from minisa.lab import bench
from minisa.model import GPT, GPTConfig

TINY = {"n_layer": 3, "n_head": 2, "n_embd": 16, "vocab_size": 64, "block_size": 32}
CPU = torch.device("cpu")

@pytest.fixture
def half_a_second(monkeypatch):
    """Whatever is timed is done once, and took half a second."""
    for file in (bench, timing):
        monkeypatch.setattr(file, "timed", lambda f, where, at_least=0.05: (f(), 0.5)[1])
    monkeypatch.setattr(bench, "PAUSE", 0)
    token_times = bench.token_times
    monkeypatch.setattr(bench, "token_times", lambda model, idx, n: [
        i / 2 for i, _ in enumerate(token_times(model, idx, n))])

def save_model(folder, **fields):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**TINY, "vocab_size": 256, "block_size": 64, **fields}))
    tokenizer = Tokenizer([bytes([b]) for b in range(256)])
    checkpoint.save(folder, model, tokenizer, dict(checkpoint.UNKNOWN))
    return model

def rows_of(out, *names):
    """{name: the cells after it} of the lines of a table that begin with these names."""
    return {name: line.removeprefix(name).split() for line in out.splitlines() for name in names
            if line.startswith(name + "  ")}

# ---- measuring ----

def test_timing_repeats_until_it_is_long_enough():
    calls = []
    seconds = bench.timed(lambda: calls.append(1), CPU, at_least=0.01)
    assert seconds * len(calls) > 0.0099 and len(calls) > 1

def test_a_median_leaves_out_the_first_round_and_all_take_turns():
    turns, clock = [], iter([9.0, 8.0, 1.0, 3.0, 7.0, 4.0, 2.0, 5.0])       # of a and b in turn
    work = {name: lambda name=name: (turns.append(name), next(clock))[1] for name in ("a", "b")}
    assert bench.medians(work, 3, "title") == {"a": 2.0, "b": 4.0} and turns == ["a", "b"] * 4

class Streamed:
    """A GPT to bench, that gives tokens without a model."""

    def stream(self, idx, n, temperature):
        yield from range(n)

class Generated:
    """As Streamed, but a model of transformers."""

    def generate(self, idx, max_new_tokens, min_new_tokens, do_sample, streamer, pad_token_id):
        assert max_new_tokens == min_new_tokens and not do_sample
        for token in range(max_new_tokens + 1):             # the first is the prompt
            streamer.put(token)
        streamer.end()

@pytest.mark.parametrize("model", [Streamed(), Generated()])
def test_the_prompt_and_the_first_token_are_not_counted_as_decoding(monkeypatch, model):
    def perf_counter(times):
        monkeypatch.setattr(bench.time, "perf_counter", lambda: next(times))
    perf_counter(iter((0.0, 10.0, 15.0, 16.0, 17.0, 18.0)))     # the prompt, then 5 tokens
    assert bench.per_token(model, None, 3) == 1.0
    perf_counter(iter((0.0, 10.0)))
    assert bench.first_token(model, None) == 10.0

@pytest.mark.parametrize("share", ["", "0-2"])
def test_a_decode_step_sees_a_full_cache(share):
    model = bench.on_torch(GPT(GPTConfig(**TINY, share=share)).eval())
    step = bench.decoder(model, 1, 32)
    for _ in range(3):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            step()
        assert counter.get_total_flops() == measure(model, 32).decode_flops

def test_a_training_step_trains():
    model = GPT(GPTConfig(**TINY))
    before = [p.clone() for p in model.parameters()]
    bench.trainer(model, 2, 32, "float32")()
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before))

# ---- shapes ----

def test_it_prints_a_row_for_each_mode(run, monkeypatch, half_a_second):
    monkeypatch.setattr(bench, "SHAPES", {"tiny": (TINY, (2, 32), 2)})
    status, out, err = run(bench.main, "--shapes=tiny", "--rounds=2", "--torch", "--dtype=float32",
                           "--csv=speed.csv")
    rows = rows_of(out, "full", "weights", "kv", "full, torch", "kv, torch")
    assert status == 0 and "round 2 of 2" in err and out.count("÷ first") == 3
    assert rows["full"][:5] == ["128.0", "1.00", "64.0", "1.00", "4.0"]   # 2 · 32 tokens in half a second
    assert len(rows) == 5 and all(row[5] == "1.00" for row in rows.values())
    assert rows["full, torch"][:4] == ["-"] * 4             # training and prefill are torch's anyway
    header, *lines = Path("speed.csv").read_text().splitlines()
    assert header == "measured,mode,work,tokens/s" and len(lines) == 3 * 3 + 3
    assert '"tiny, float32",full,train,128.00' in lines and '"tiny, float32",kv,decode,4.00' in lines
    full = measure(GPT(GPTConfig(**TINY)), 32, 2)
    assert rows["full"][-1] == rows["full, torch"][-1] == f"{full.read_bytes / 1e6:.1f}"
    assert rows["full"][-2] == "-"                          # it lies in the processor's cache
    monkeypatch.setattr(timing, "SMALL", 0)
    monkeypatch.setattr(bench, "LARGE", 2**20)
    _, out, _ = run(bench.main, "--shapes=tiny", "--rounds=1", "--dtype=float32")
    assert rows_of(out, "full")["full"][-2] == f"{full.read_bytes / 2**20:.2f}"     # both took half a second

def test_a_shape_that_is_not_trained_has_no_figure_for_it(run, monkeypatch, half_a_second):
    monkeypatch.setattr(bench, "SHAPES", {"tiny": (TINY, None, 1)})
    status, out, _ = run(bench.main, "--shapes=tiny", "--rounds=1")
    assert status == 0 and rows_of(out, "kv")["kv"][:5] == ["-", "-", "64.0", "1.00", "2.0"]

def test_nanogpt_comes_first_and_speeds_are_over_its(run, monkeypatch, half_a_second):
    class Peer(GPT):
        def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
            return torch.optim.AdamW(self.parameters(), learning_rate, betas, weight_decay=weight_decay)
    peer = SimpleNamespace(GPT=Peer, GPTConfig=lambda bias, **shape: GPTConfig(**shape))
    monkeypatch.setitem(sys.modules, "model", peer)                 # what bench uses of nanoGPT
    monkeypatch.setattr(bench, "SHAPES", {"tiny": (TINY, (2, 32), 1)})
    status, out, _ = run(bench.main, "--shapes=tiny", "--rounds=1", "--beside_nanogpt", "--dtype=float32")
    rows = rows_of(out, "nanoGPT", "full")
    assert status == 0 and "training on 2 × 32 tokens in float32; decoding" in out
    assert rows["nanoGPT"] == ["128.0", "1.00", "-", "-", "2.0", "1.00", "-", "-"]
    assert rows["full"][:6] == ["128.0", "1.00", "64.0", "-", "2.0", "1.00"]

# ---- models ----

def test_models_are_timed_beside_each_other_as_they_are_and_shared(run, tmp_path, half_a_second):
    save_model(tmp_path / "one")
    save_model(tmp_path / "two", share="0-1", n_head=4)
    status, out, _ = run(bench.main, "one", "two", "--share=1-2", "--torch", "--rounds=1")
    rows = rows_of(out, "one, float32", "one, bfloat16", "one, float32, torch", "share 1-2, float32",
                   "share 1-2, bfloat16", "two, float32", "two, bfloat16", "two, float32, torch")
    assert status == 0 and len(rows) == 8 and "decoding after a prompt of 16 tokens, prefill of 32" in out
    assert rows["two, float32"][:4] == ["2.0", "1.00", "64.0", "1.00"]
    assert rows["two, bfloat16"][2:4] == ["-", "-"]
    assert [line.split()[0] for line in out.splitlines() if line.startswith("from the file")] == ["from"]

def test_variants_decode_what_the_model_does(tmp_path):
    model = save_model(tmp_path / "one").eval()
    models, seconds = bench.variants(str(tmp_path / "one"), "1-2", True, CPU)
    idx = torch.randint(256, (1, 9), generator=torch.Generator().manual_seed(1))
    shared = checkpoint.reconfigure(model, share="1-2")
    for name, made in models.items():
        expected = (shared if "share" in name else model).generate(idx, 1, 0)
        logits = (shared if "share" in name else model)(idx)[0]
        if "bfloat16" not in name:
            torch.testing.assert_close(made(idx)[0], logits, atol=1e-5, rtol=1e-4)
            assert torch.equal(made.generate(idx, 1, 0), expected)
    assert seconds > 0 and [name for name, model in models.items() if bill.engine_of(model) == "torch"] == [
        name for name in models if "bfloat16" in name or "torch" in name]

class FakeTransformers:
    """What bench uses of the library, with a minisa model in it."""

    def __init__(self, model):
        self.model = model

    def from_pretrained(self, folder, gguf_file, dtype):
        assert (folder / gguf_file).is_file() and dtype == torch.float32
        return self

    def eval(self):
        return self

    def to(self, where):
        return self

    def __call__(self, idx):
        return SimpleNamespace(logits=self.model(idx)[0])

    def generate(self, idx, max_new_tokens, min_new_tokens, do_sample, streamer, pad_token_id):
        assert max_new_tokens == min_new_tokens and not do_sample
        streamer.put(idx)
        for token in self.model.stream(idx, max_new_tokens, 0):
            streamer.put(token)
        streamer.end()

def test_transformers_are_timed_beside_and_their_loss_is_compared(run, tmp_path, monkeypatch, half_a_second):
    tiny_gguf = pytest.importorskip("tiny_gguf", reason="needs the gguf package: pip install gguf")
    path = tiny_gguf.write(tmp_path / "x.gguf", tiny_gguf.tensors())
    fake = SimpleNamespace(AutoModelForCausalLM=FakeTransformers(checkpoint.load(path)[0]))
    monkeypatch.setitem(sys.modules, "transformers", fake)
    monkeypatch.setitem(sys.modules, "accelerate", fake)
    monkeypatch.setattr(bench.pretrained, "fetch", lambda: path)
    status, out, _ = run(bench.main, "smollm2", "--beside_transformers", "--rounds=1")
    assert status == 0 and "to the first token: transformers 0." in out and ", smollm2 0." in out
    words = next(line for line in out.splitlines() if line.startswith("loss on 63 random")).split()
    assert float(words[5]) == pytest.approx(float(words[-1]), abs=1e-4)
    assert rows_of(out, "transformers")["transformers"] == ["2.0", "1.00", "64.0", "1.00", "-", "-"]

# ---- sweeps ----

def test_a_sweep_bills_each_mode_at_each_point(run, tmp_path, monkeypatch, half_a_second):
    monkeypatch.setattr(bench, "SWEEP", {"n_layer": 6, "n_head": 2, "n_embd": 16, "vocab_size": 64})
    monkeypatch.setattr(bench, "SWEPT", {"context": [(16, 1), (32, 1)], "batch_size": [(16, 1), (16, 4)]})
    for what, last in (("context", ("32", "1")), ("batch_size", ("16", "4"))):
        status, _, _ = run(bench.main, f"--sweep={what}", "--rounds=1", "--csv=sweep.csv", "--plot=sweep.png")
        header, *rows = csv.reader(Path("sweep.csv").read_text().splitlines())
        modes = [row[1] for row in rows[5:]]
        assert status == 0 and modes == ["full", "SA", "CLA", "GQA", "SA, GQA"] and len(rows) == 10
        full, *others = [int(row[header.index("cache bytes")]) for row in rows[5:]]
        context, batch = map(int, last)
        assert full == 6 * 2 * 16 * 4 * context * batch             # 6 layers, k and v of 16 numbers
        assert [other / full for other in others] == [8 / 12, 4 / 12, 6 / 12, 4 / 12]
        assert all(row[2:4] == [*last] and float(row[6]) == 500 / batch for row in rows[5:])
        assert Path("sweep.png").stat().st_size > 5000

def test_shapes_and_a_model_from_a_file_are_swept_full_and_sharing(run, tmp_path, monkeypatch, half_a_second):
    monkeypatch.setattr(bench, "SHAPES", {"tiny": (TINY, None, 1), "recipe": (TINY, None, 1)})
    monkeypatch.setattr(bench, "SWEPT_MODEL", (16, 64, 128))            # 128: more than its context
    save_model(tmp_path / "one")
    swept = {"--sweep=shapes": [("tiny", "32")], "--sweep=context": [("one", "16"), ("one", "64")]}
    for flag, points in swept.items():
        flags = ["one", "--share=1-2"] if flag == "--sweep=context" else []
        status, _, _ = run(bench.main, *flags, flag, "--rounds=1", "--csv=sweep.csv")
        rows = list(csv.DictReader(Path("sweep.csv").read_text().splitlines()))
        assert status == 0 and [(row["model"], row["context"], row["mode"]) for row in rows] == [
            (*point, mode) for point in points for mode in ("full", "weights", "kv")]
        full, weights, kv = (int(row["bytes read"]) for row in rows[-3:])
        assert full > kv > weights              # CLA reads the anchor's keys and values again

def test_a_step_of_a_sweep_sees_all_of_its_context():
    model = bench.on_torch(GPT(GPTConfig(**TINY, n_kv_head=1)).eval())
    step = bench.decoder(model, 3, 32)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        step()
    assert counter.get_total_flops() == measure(model, 32, 3).decode_flops

# ---- wrong use ----

@pytest.mark.parametrize("flags, message", [
    (["--shapes=huge"], "'huge' is none of small, large, long, recipe"),
    (["--rounds=0"], "0 is not a number"),
    (["--device=tpu"], "tpu is not on this machine"),
    (["--share=1-2"], "go with a model"),
    (["--beside_transformers"], "go with a model"),
    (["--beside_nanogpt"], "--beside_nanogpt: where is nanoGPT?"),
    (["run", "--beside_nanogpt"], "--dtype and --beside_nanogpt: go with shapes"),
    (["--sweep=context", "--dtype=float32"], "--dtype and --beside_nanogpt: go with shapes"),
    (["run", "--sweep=batch_size"], "--sweep: goes without a model"),
    (["run", "run", "--sweep=context"], "--sweep: goes without a model"),
    (["--sweep=shapes", "--plot=some.png"], "--sweep: goes without a model"),
    (["run", "--sweep=context"], "starts at 128 tokens"),
    (["run", "--shapes=small"], "--shapes: goes without a model"),
    (["--sweep=context", "--torch"], "go without --sweep"),
    (["--plot=some.png"], "--plot goes with it"),
    (["--sweep=context", "--plot=some.txt"], "some.txt must end in .png"),
    (["run", "--beside_transformers"], "transformers reads .gguf files; run is none"),
    (["run", "--share=5-9"], "--share=5-9"),
    (["none.gguf"], "none.gguf: no such model"),
], ids=str)
def test_wrong_use_gets_one_line_and_status_2(run, tmp_path, flags, message):
    save_model(tmp_path / "run")
    status, out, err = run(bench.main, *flags)
    assert status == 2 and message in err.splitlines()[-1] and "Traceback" not in err and out == ""

def test_missing_transformers_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ValueError, match="pip install transformers accelerate"):
        bench.transformers_model("smollm2", CPU)
