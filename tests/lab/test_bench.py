"""The benchmark measures what it says, on tiny models and with a clock that always says the same."""

import csv
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from minisa.cost import measure
from minisa.kit import checkpoint, timing
from minisa.kit.tokenizer import Tokenizer
from minisa.lab import bench
from minisa.model import GPT, GPTConfig

TINY = {"n_layer": 3, "n_head": 2, "n_embd": 16, "vocab_size": 64, "block_size": 32}
CPU = torch.device("cpu")
FULL, SA, CLA = ("", ""), ("1-2", "weights"), ("1-2", "kv")

def save_model(folder, **fields):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**TINY, "vocab_size": 256, "block_size": 64, **fields}))
    tokenizer = Tokenizer([bytes([b]) for b in range(256)])
    checkpoint.save(folder, model, tokenizer, dict(checkpoint.UNKNOWN))
    return model

@pytest.fixture
def rows_of(run, half_a_second):
    """rows_of(*words) → the rows that the command writes as CSV, and what it prints."""
    def rows_of(*words, main=bench.main):
        status, out, err = run(main, *words, "--rounds=1", "--csv=rows.csv")
        assert status == 0 and "round 1 of 1" in err
        return list(csv.DictReader(Path("rows.csv").read_text(encoding="utf-8").splitlines())), out
    return rows_of

def what(rows, *columns):
    return [tuple(row[column] for column in columns) for row in rows]

# ---- measuring ----

def test_timing_repeats_until_it_is_long_enough():
    calls = []
    seconds = timing.timed(lambda: calls.append(1), CPU, at_least=0.01)
    assert seconds * len(calls) > 0.0099 and len(calls) > 1

def test_a_median_leaves_out_the_first_round_and_all_take_turns(monkeypatch):
    monkeypatch.setattr(bench, "PAUSE", 0)
    turns, clock = [], iter([9.0, 8.0, 1.0, 3.0, 7.0, 4.0, 2.0, 5.0])       # of a and b in turn
    clocks = [lambda name=name: (turns.append(name), next(clock))[1] for name in ("a", "b")]
    assert bench.medians(clocks, 3, "title") == [2.0, 4.0] and turns == ["a", "b"] * 4

class Streamed:
    """A GPT to bench, that gives tokens without a model."""

    def parameters(self):
        return iter([torch.zeros(1)])

    def stream(self, idx, n, temperature):
        assert idx.shape == (1, 7)
        yield from range(n)

def test_the_prompt_and_the_first_token_are_not_counted_as_decoding(monkeypatch):
    def perf_counter(times):
        monkeypatch.setattr(bench.time, "perf_counter", lambda: next(times))
    perf_counter(iter((0.0, 10.0, 15.0, 16.0, 17.0, 18.0)))     # the prompt, then 5 tokens
    assert bench.per_token(Streamed(), 7, 3) == 1.0
    perf_counter(iter((0.0, 10.0)))
    assert bench.first_token(Streamed(), 7) == 10.0

@pytest.mark.parametrize("fields, batch_size", [({}, 1), ({"share": "0-2"}, 1), ({"n_kv_head": 1}, 3)])
def test_a_decode_step_sees_a_full_cache(fields, batch_size):
    model = bench.OnTorch(GPT(GPTConfig(**TINY, **fields)).eval())
    step = bench.decoder(model, 32, batch_size)
    for _ in range(3):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            step()
        assert counter.get_total_flops() == measure(model, 32, batch_size).decode_flops

def test_a_training_step_trains(monkeypatch):
    monkeypatch.setattr(timing.time, "perf_counter", iter(range(99)).__next__)      # one step is enough
    model = GPT(GPTConfig(**TINY))
    before = [p.clone() for p in model.parameters()]
    row, clock = bench.train_work("tiny", model, (2, 32), "float32", CPU)
    assert clock() == 1 and (row["context"], row["batch_size"]) == (32, 2)
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before))

def test_a_row_names_the_engine_that_is_timed(half_a_second, monkeypatch):
    from minisa.decode import Decoder
    steps, step = [], Decoder.step
    monkeypatch.setattr(Decoder, "step", lambda self, token: steps.append(token) or step(self, token))
    full = GPT(GPTConfig(**TINY)).eval()
    models = full, bench.OnTorch(full), checkpoint.reconfigure(full, share="1-2")
    works = [bench.decode_work("x", model, 32, n, CPU) for model in models for n in (1, 2)]
    for model in models:
        works += [work for work in bench.text_works([("x", model)], 32) if work[0]["work"] == "decode"]
    engines = []
    for row, clock in works:
        steps.clear()
        clock()
        engines.append(row["engine"])
        assert (row["engine"] == "numpy") == bool(steps)
    assert engines == ["numpy", "torch", "torch", "torch", "numpy", "torch", "numpy", "torch", "numpy"]

# ---- modes ----

def test_each_mode_and_work_is_a_row(rows_of, monkeypatch):
    monkeypatch.setattr(bench, "SHAPES", {"tiny": (TINY, (2, 32))})
    rows, out = rows_of("modes", "--torch", "--dtype=bfloat16")
    assert list(rows[0]) == [*bench.COLUMNS, "commit", "processor", "torch", "date"]
    assert what(rows, "share", "share_kind", "work", "dtype", "engine") == [
        *((*mode, work, dtype, "torch") for mode in (FULL, SA, CLA)
          for work, dtype in (("train", "bfloat16"), ("prefill", "float32"))),
        *((*mode, "decode", "float32", engine) for mode in (FULL, SA, CLA) for engine in ("numpy", "torch"))]
    assert what(rows[:2], "tokens_per_s", "ms_per_token") == [     # 2 · 32 and 32 tokens in half a second
        ("128.0", "7.8125"), ("64.0", "15.625")]
    costs = [measure(GPT(GPTConfig(**TINY, share=share, share_kind=kind or "kv")), 32)
             for share, kind in (FULL, SA, CLA)]
    assert what(rows[6::2], "tokens_per_s", "cache_bytes", "read_bytes") == what(rows[7::2], *(
        "tokens_per_s", "cache_bytes", "read_bytes")) == [
        ("2.0", str(cost.cache_bytes), str(cost.read_bytes)) for cost in costs]
    lines = [line.split() for line in out.splitlines()]
    assert len(lines) == 15 and {line[-1] for line in lines[2:-1]} == {"1.00"}

@pytest.mark.parametrize("cached", [True, False])
def test_what_the_processor_holds_has_no_limit(rows_of, monkeypatch, cached):
    cost = measure(GPT(GPTConfig(**TINY)), 32)
    monkeypatch.setattr(bench, "SHAPES", {"tiny": (TINY, None)})
    monkeypatch.setattr(bench, "in_cache", lambda n_bytes, where: cached)
    monkeypatch.setattr(bench, "LARGE", 4 * cost.read_bytes)                # read in half a second, too
    rows, _ = rows_of("modes")
    limits = {row["limit_ms_per_token"] for row in rows if what([row], "share", "work") == [("", "decode")]}
    assert limits == {"" if cached else "125.0"}
    assert all(row["limit_ms_per_token"] == "" for row in rows if row["work"] == "prefill")

# ---- model ----

def test_models_are_timed_beside_each_other_as_they_are_and_shared(rows_of, tmp_path):
    save_model(tmp_path / "one")
    save_model(tmp_path / "two", share="0-1", n_head=4)
    rows, out = rows_of("model", "one", "two", "--share=1-2", "--torch")
    decode = [row for row in rows if row["work"] == "decode"]
    assert what(decode, "model", "share", "dtype", "engine") == [
        ("one", "", "float32", "numpy"), ("one", "", "bfloat16", "torch"),
        ("one", "1-2", "float32", "numpy"), ("one", "1-2", "bfloat16", "torch"),
        ("one", "", "float32", "torch"),
        ("two", "0-1", "float32", "numpy"), ("two", "0-1", "bfloat16", "torch"),
        ("two", "0-1", "float32", "torch")]
    assert set(what(decode, "context", "tokens_per_s")) == {("32", "2.0")}      # 16, and half of 32 more
    prefill = [row for row in rows if row["work"] == "prefill"]
    assert len(prefill) == 5 and set(what(prefill, "context", "tokens_per_s")) == {("32", "64.0")}
    assert out.count("s from the file to the first token") == 2

def test_what_is_opened_decodes_as_the_model_does(tmp_path):
    model = save_model(tmp_path / "one").eval()
    opened = bench.open_models(str(tmp_path / "one"), {"share": "1-2"}, True, CPU)
    idx = torch.randint(256, (1, 9), generator=torch.Generator().manual_seed(1))
    shared = checkpoint.reconfigure(model, share="1-2")
    for _, made in opened:
        true = shared if made.config.share else model
        if made.embed.weight.dtype == torch.float32:
            torch.testing.assert_close(made(idx)[0], true(idx)[0], atol=1e-5, rtol=1e-4)
            assert torch.equal(made.generate(idx, 3, 0), true.generate(idx, 3, 0))

# ---- sweep ----

@pytest.mark.parametrize("over, points", [("context", [(16, 1), (32, 1)]),
                                          ("batch_size", [(16, 1), (16, 4)])])
def test_a_sweep_times_each_mode_at_each_point(rows_of, monkeypatch, over, points):
    monkeypatch.setattr(bench, "GROWING", {**TINY, "n_layer": 6})
    monkeypatch.setattr(bench, "SWEPT", {over: points})
    rows, _ = rows_of("sweep", f"--over={over}")
    spans = [("", ""), ("1-5", "weights"), ("1-5", "kv"), ("", ""), ("1-5", "weights")]
    assert what(rows, "share", "share_kind") == 2 * spans
    for (context, batch_size), point in zip(points, (rows[:5], rows[5:])):
        full = 6 * 2 * 16 * 4 * context * batch_size                # 6 layers, k and v of 16 numbers
        cache = [int(row["cache_bytes"]) / full for row in point]
        assert cache == [1, 8 / 12, 4 / 12, 6 / 12, 4 / 12]         # SA keeps all v, CLA the anchor's k and v
        assert set(what(point, "context", "batch_size", "ms_per_token")) == {
            (str(context), str(batch_size), str(500 / batch_size))}

def test_any_kinds_of_sharing_are_timed_in_numpy(rows_of, monkeypatch):
    monkeypatch.setattr(bench, "GROWING", {**TINY, "n_layer": 6})
    monkeypatch.setattr(bench, "SWEPT", {"context": [(32, 1)]})
    monkeypatch.setattr(bench, "SHAPES", {"tiny": (TINY, None)})
    kinds = "--share_kind=kv,top-8"
    rows, out = rows_of("sweep", kinds)
    assert what(rows, "share_kind", "engine") == [(kind, "numpy") for kind in ("", "kv", "top-8", "", "kv")]
    assert all(line.endswith("1.00") for line in out.splitlines()[2:-1])
    rows, _ = rows_of("modes", kinds)
    assert what(rows, "share_kind", "work") == [
        (kind, work) for work in ("prefill", "decode") for kind in ("", "kv", "top-8")]

def test_a_model_from_a_file_is_swept_up_to_its_context(rows_of, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "SWEPT_FILES", {"context": [(16, 1), (64, 1), (128, 1)]})
    save_model(tmp_path / "one")
    rows, _ = rows_of("sweep", "one", "--share=1-2")
    assert what(rows, "model", "context", "share", "share_kind") == [
        ("one", context, *mode) for context in ("16", "64") for mode in (FULL, SA, CLA)]
    full, weights, kv = (int(row["read_bytes"]) for row in rows[-3:])
    assert full > kv > weights                  # CLA reads the anchor's keys and values again
    monkeypatch.setattr(bench, "SWEPT_FILES", {"context": [(128, 1)]})
    rows, _ = rows_of("sweep", "one")
    assert what(rows, "context") == [("64",)]   # all that it has

def test_shapes_are_swept_at_their_full_context(rows_of, monkeypatch):
    sizes = {"small": 8, "large": 16, "long": 32}
    shapes = {name: (TINY | {"block_size": size}, None) for name, size in sizes.items()}
    monkeypatch.setattr(bench, "SHAPES", shapes)
    rows, _ = rows_of("sweep", "--over=shapes")
    assert what(rows, "model", "context", "share", "share_kind") == [
        (name, str(size), *mode) for name, size in sizes.items() for mode in (FULL, SA, CLA)]

# ---- wrong use ----

@pytest.mark.parametrize("words, message", [
    ("", "are required: command"),
    ("all", "invalid choice: 'all'"),
    ("modes --shapes=huge", "--shapes: invalid choice: 'huge' (choose from small, large, long, recipe)"),
    ("modes --rounds=0", "0 is not a number"),
    ("modes --device=tpu", "tpu is not on this machine"),
    ("modes run", "unrecognized arguments: run"),
    ("modes --share=1-2", "unrecognized arguments: --share=1-2"),
    ("model", "are required: MODEL"),
    ("model run --share=5-9", "--share=5-9"),
    ("model none.gguf", "none.gguf: no such model"),
    ("sweep --share_kind=weights,none", "--share_kind: none: must be weights or kv"),
    ("modes --share_kind=top", "--share_kind: top-: give a number from 1 up"),
    ("sweep --torch", "unrecognized arguments: --torch"),
    ("sweep run --over=shapes", "--over=shapes: goes without MODEL"),
    ("sweep --over=shapes --share=1-2", "--over=shapes: goes without MODEL"),
    ("sweep --csv=some.txt", "some.txt must end in .csv"),
])
def test_wrong_use_gets_one_line_and_status_2(run, tmp_path, words, message):
    save_model(tmp_path / "run")
    status, out, err = run(bench.main, *words.split())
    assert status == 2 and message in err.splitlines()[-1] and "Traceback" not in err and "read" not in out

@pytest.mark.parametrize("command", ["modes", "model", "sweep"])
def test_the_help_of_each_command_lists_its_flags(run, command):
    status, out, _ = run(bench.main, command, "--help")
    assert status == 0 and f"bench {command}" in out and "--rounds" in out
    assert ("--over" in out) == (command == "sweep") and ("--shapes" in out) == (command == "modes")
