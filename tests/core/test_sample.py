"""Sampling and the bill, from the command line, with models trained on a real text at a small size."""

import csv
import io
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

import minisa
import sample
import train
from minisa import cost
from minisa.kit import timing
from minisa.kit.data import Data

FLAGS = ["--n_layer=3", "--n_head=2", "--n_embd=16", "--n_hidden=32", "--block_size=16", "--batch_size=4",
         "--vocab_size=300", "--max_iters=30", "--eval_interval=30", "--learning_rate=1e-2", "--device=cpu"]

@pytest.fixture(scope="session")
def trained(text, tmp_path_factory):
    """A folder with two trained runs, full and shared."""
    folder = tmp_path_factory.mktemp("trained")
    for name, *flags in (["full"], ["weights-0-2", "--share=0-2"]):
        where = [f"--text={text}", f"--data_dir={folder}/data", f"--out_dir={folder}/out/{name}"]
        sys.argv = ["train.py", *FLAGS, *where, *flags]
        train.main()
    return folder

@pytest.fixture
def runs(trained, tmp_path):
    for name in ("out", "data"):
        shutil.copytree(trained / name, tmp_path / name)

def table(file):
    return list(csv.DictReader(io.StringIO(Path(file).read_text())))

def test_every_run_is_sampled_and_billed(run, runs):
    status, out, err = run(sample.main, "--max_new_tokens=12", "--csv=bill.csv")
    assert (status, err) == (0, "") and "they agree" in out
    full, shared = table("bill.csv")
    assert [full["model"], shared["model"]] == ["out/full", "out/weights-0-2"]
    assert [full["share"], shared["share"], shared["share_kind"]] == ["", "0-2", "weights"]
    assert full["date"] and full["torch"] == torch.__version__
    assert int(full["cache_bytes_per_token"]) == 3 * 2 * 16 * 4
    assert int(shared["cache_bytes_per_token"]) == 4 * 16 * 4
    assert int(full["cache_bytes"]) == 16 * 384
    for row in (full, shared):
        model, _, info = minisa.load(row["model"])
        assert int(row["parameters"]) == sum(p.numel() for p in model.parameters())
        assert float(row["val_bpb"]) == pytest.approx(info["val_bpb"], abs=1e-4)
        assert int(row["flops"]) == cost.measure(model, 16).decode_flops
        assert float(row["tokens_per_s"]) > 0

def test_the_text_is_what_the_model_generates(run, runs):
    status, out, _ = run(sample.main, "out/full", "--prompt=def f", "--temperature=0", "--max_new_tokens=40")
    model, tokenizer, _ = minisa.load("out/full")
    idx = torch.tensor([tokenizer.encode("def f")])
    assert status == 0 and tokenizer.decode(model.generate(idx, 40, temperature=0)[0].tolist()) in out

def test_of_a_long_prompt_what_no_layer_can_see_is_left_out_and_changes_nothing(run, runs, text):
    model, tokenizer, _ = minisa.load("out/full")
    prompt = text.read_text()[:2000].strip()
    idx = torch.tensor([tokenizer.encode(prompt)])
    assert idx.size(1) > 5 * model.config.n_layer * model.config.block_size
    Path("long.txt").write_text(prompt)
    status, out, _ = run(sample.main, "out/full", "--prompt=FILE:long.txt", "--temperature=0",
                         "--max_new_tokens=20")
    said = tokenizer.decode(model.generate(idx, 20, temperature=0)[0].tolist())     # reads all of it
    assert status == 0 and said in out and len(said) > len(prompt)

def test_the_same_seed_writes_the_same_text(run, runs):
    def texts(seed):
        _, out, _ = run(sample.main, "out/full", f"--seed={seed}", "--num_samples=2", "--max_new_tokens=50")
        return out.split("-" * 80)[1:3]
    one, again, two = texts(1), texts(1), texts(2)
    assert one == again != two and one[0] != one[1] and one[1] == two[0]

def test_zero_shot_sharing_is_billed_beside_full_attention_with_its_own_loss(run, runs):
    flags = ["out/full", "--share=0-2", "--max_new_tokens=5", "--csv=bill.csv"]
    assert run(sample.main, *flags)[0] == 0
    full, shared = table("bill.csv")
    assert [full["share"], shared["share"], shared["share_kind"]] == ["", "0-2", "weights"]
    model, _, info = minisa.load("out/full", share="0-2")
    loss = Data(info["data"]).evaluate(model)[1]
    assert float(shared["val_bpb"]) == pytest.approx(loss, abs=1e-4)
    shutil.move("data", "moved")
    run(sample.main, *flags)
    assert table("bill.csv")[1]["val_bpb"] == ""            # the text is gone

def test_a_prediction_that_misses_is_an_error_in_the_table(run, runs, monkeypatch):
    true = cost.measure
    def off_by_one(model, context, **more):
        found = true(model, context, **more)
        found.decode_flops += 1
        return found
    monkeypatch.setattr(cost, "measure", off_by_one)
    status, out, _ = run(sample.main, "out/full", "--max_new_tokens=5")
    assert status == 1 and "ERROR: predicted" in out and "THEY DIFFER" in out

def test_squeezed_caches_are_rows_of_the_bill(run, runs):
    squeezing = ["--squeeze=8", "--squeeze_policy=sinks,window", "--squeeze_cut=1,0.5"]
    flags = ["out/weights-0-2", *squeezing, "--max_new_tokens=30", "--eval_tokens=64", "--csv=bill.csv"]
    status, out, err = run(sample.main, *flags)
    assert status == 0, err
    full, *others = table("bill.csv")
    ways = [("sinks", "8", 1.0), ("sinks", "8", 0.5), ("window", "8", 1.0), ("window", "8", 0.5)]
    assert [(row["policy"], row["budget"], float(row["cut"])) for row in others] == ways
    assert full["policy"] == "" and {row["model"] for row in others} == {"out/weights-0-2"}
    assert "out/weights-0-2, squeeze 8 sinks equal" in out
    sizes = [int(row["cache_bytes"]) for row in others]
    assert sizes[0] == sizes[2] == int(full["cache_bytes"]) // 2 and sizes[1] <= sizes[0]
    assert all(int(row["flops"]) < int(full["flops"]) for row in others)
    assert len({row["val_bpb"] for row in others}) >= 2 and "they agree" in out

def test_caches_in_int8_are_rows_of_the_bill(run, runs):
    flags = ["--cache_bits=8", "--squeeze=8", "--max_new_tokens=30", "--eval_tokens=64", "--csv=bill.csv"]
    status, out, err = run(sample.main, "out/weights-0-2", *flags)
    assert status == 0 and "they agree" in out and "out/weights-0-2, 8 bits" in out, err
    rows = table("bill.csv")
    assert [(row["policy"], row["budget"], row["bits"]) for row in rows] == [
        ("", "", ""), ("", "", "8"), ("heavy", "8", "8")]
    per_token, sizes = ([int(row[name]) for row in rows] for name in ("cache_bytes_per_token", "cache_bytes"))
    assert per_token[0] > 2 * per_token[1] and per_token[1] == per_token[2]
    assert sizes[:2] == [16 * per_token[0], 16 * per_token[1]] and sizes[2] <= 8 * per_token[1]
    assert int(rows[1]["read_bytes"]) < int(rows[0]["read_bytes"]) and rows[1]["flops"] == rows[0]["flops"]

def test_the_bill_for_programs_is_the_last_line(run, runs):
    status, out, _ = run(sample.main, "--max_new_tokens=12", "--json", "--csv=bill.csv")
    content = json.loads(out.splitlines()[-1])
    assert status == 0 and content["predictions_met"] is True and len(content["bill"]) == 2
    for row, text in zip(content["bill"], table("bill.csv")):
        assert row.keys() < text.keys() and row["engine"] == "numpy" and row["tokens_per_s"] > 0
        assert row["share_of_limit"] is None and timing.in_cache(2**20, torch.device("cpu"))
        model, _, info = minisa.load(row["model"])
        assert row["read_bytes"] == cost.measure(model, 16).read_bytes == int(text["read_bytes"])
        assert row["val_bpb"] == info["val_bpb"] and row["parameters"] == int(text["parameters"])

def test_the_share_of_the_limit_is_that_of_the_bytes_read(monkeypatch):
    seconds = iter([1.0] * 3 + [4.0] * 3 + [0.5])               # it, main memory; then memory once more
    monkeypatch.setattr(timing, "timed", lambda f, where, at_least=0.05: next(seconds))
    read = timing.LARGE // 8
    # 2^25 bytes in a second, 2^28 in four: memory is twice as fast, so they do not lie in the cache
    assert timing.share_of_limit(read, 0.25, torch.device("cpu")) == 0.5 / 8 / 0.25
    seconds = iter([0.1] * 3 + [4.0] * 3)
    assert timing.share_of_limit(read, 0.25, torch.device("cpu")) is None

@pytest.mark.parametrize("flags, engines", [
    ([], ["numpy"]), (["--dtype=bfloat16"], ["torch"]),
    (["--squeeze=8", "--eval_tokens=64"], ["numpy", "torch"])], ids=str)
def test_the_engine_of_the_bill_is_the_one_that_wrote_the_text(run, runs, monkeypatch, flags, engines):
    from minisa.decode import Decoder
    steps, step = [], Decoder.step
    monkeypatch.setattr(Decoder, "step", lambda self, token: steps.append(token) or step(self, token))
    status, _, err = run(sample.main, "out/full", *flags, "--max_new_tokens=5", "--csv=bill.csv")
    assert status == 0, err
    assert [row["engine"] for row in table("bill.csv")] == engines
    assert len(steps) == 5 * engines.count("numpy")         # four tokens, and one that is counted

def test_a_text_is_written_with_the_cache_that_its_row_bills(run, runs, monkeypatch):
    caches, stream = [], sample.GPT.stream
    def noted(self, *args):
        caches.append(args[-1])
        return stream(self, *args)
    monkeypatch.setattr(sample.GPT, "stream", noted)
    flags = ["--squeeze=8", "--squeeze_cut=1", "--cache_bits=8", "--max_new_tokens=5", "--eval_tokens=64"]
    status, _, err = run(sample.main, "out/full", *flags)
    assert status == 0, err
    whole, eight, squeezed = caches
    assert whole is None                                    # a KVCache, which stream() makes
    assert (eight.storage.bits, eight.rooms) == (8, [16] * 3)
    assert (squeezed.storage.bits, squeezed.rooms) == (8, [8] * 3)

def test_the_speed_is_that_of_the_tokens_after_the_second_of_each_text(run, runs, monkeypatch):
    import itertools
    took = [50.0, 50.0, *[0.5] * 10]                        # seconds for each of twelve tokens
    clock = itertools.chain(itertools.accumulate(took * 2), itertools.repeat(0.0))
    monkeypatch.setattr(sample.time, "perf_counter", lambda: next(clock))
    run(sample.main, "out/full", "--num_samples=2", "--max_new_tokens=12", "--csv=bill.csv")
    assert float(table("bill.csv")[0]["tokens_per_s"]) == 2.0

def test_of_the_most_likely_token_alone_nothing_else_is_sampled(run, runs):
    hows = ["--temperature=0"], ["--temperature=9", "--top_k=1"], ["--temperature=9"]
    greedy, one, any_of_them = (
        run(sample.main, "out/full", *how, "--max_new_tokens=40")[1].split("-" * 80)[1] for how in hows)
    assert greedy == one != any_of_them

def test_the_bill_is_for_the_context_that_is_asked_for(run, runs):
    run(sample.main, "out/full", "--context=5", "--max_new_tokens=3", "--csv=bill.csv")
    row, = table("bill.csv")
    assert (row["context"], row["cache_bytes"]) == ("5", str(5 * 3 * 2 * 16 * 4))

def test_two_tokens_are_too_few_to_tell_a_speed(run, runs):
    for n in (1, 2):
        assert run(sample.main, "out/full", f"--max_new_tokens={n}", "--csv=bill.csv")[0] == 0
        assert table("bill.csv")[0]["tokens_per_s"] == ""

def test_a_model_in_bfloat16_is_decoded_and_billed_by_torch(run, runs):
    status, out, _ = run(sample.main, "out/full", "--dtype=bfloat16", "--max_new_tokens=5", "--csv=bill.csv")
    row, = table("bill.csv")
    assert status == 0 and "they agree" in out and row["engine"] == "torch"

def test_prompts_come_from_files_and_standard_input(run, runs, monkeypatch):
    Path("prompt.txt").write_text("import os, 日本\n", encoding="utf-8", newline="\n")
    _, out, _ = run(sample.main, "out/full", "--prompt=FILE:prompt.txt", "--max_new_tokens=3")
    assert "import os, 日本\n" in out
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("from stdin ".encode())))
    assert "from stdin " in run(sample.main, "out/full", "--prompt=-", "--max_new_tokens=3")[1]

WRONG = {
    "out/none": "out/none: no such model",
    "--share=0-9": "--share=0-9: the layers of this model are 0 to 2",
    "--share=x": "--share=x: give spans in increasing order",
    "--share_kind=nonsense": "--share_kind: nonsense: must be weights or kv",
    "--squeeze=7": "7 is not a number from 8 up",
    "--squeeze=17": "--squeeze=17: must be from 8 to the context of 16",
    "--squeeze_policy=oldest": "--squeeze_policy: ",
    "--squeeze_cut=0": "--squeeze_cut: ",
    "--squeeze_cut=half": "--squeeze_cut: ",
    "--dtype=int8": "--dtype: invalid choice: 'int8'",
    "--context=0": "0 is not a number",
    "--prompt=": "--prompt: has 0 characters",
    "--prompt=FILE:none.txt": "No such file",
    "--prompt=FILE:out": "Permission denied" if os.name == "nt" else "Is a directory",
    "--temperature=-1": "-1 is not a number",
    "--top_k=0": "0 is not a number",
    "--max_new_tokens=0": "0 is not a number",
    "--num_samples=x": "invalid int value",
    "--device=tpu": "--device: tpu is not on this machine",
    "--csv=out": "out must end in .csv",
    "--colour=red": "unrecognized arguments",
}

@pytest.mark.parametrize("flag", WRONG)
def test_a_wrong_flag_gets_one_line_and_status_2(run, runs, flag):
    status, _, err = run(sample.main, "out/full", "--max_new_tokens=2", flag)
    assert status == 2 and WRONG[flag] in err and err.count("\n") == 1

def test_wrong_files_get_one_line_and_status_2(run, runs):
    Path("latin.txt").write_bytes("né".encode("latin-1"))
    assert "not UTF-8" in run(sample.main, "out/full", "--prompt=FILE:latin.txt")[2]
    status, _, err = run(sample.main, "out/weights-0-2", "--share=0-1")
    assert status == 2 and "layer 2 has no k q of its own, as the model was trained with --share=0-2" in err
    Path("out/full/model.safetensors").write_bytes(b"junk")
    status, _, err = run(sample.main)
    assert status == 2 and "out/full: damaged" in err
    shutil.rmtree("out")
    status, _, err = run(sample.main)
    assert status == 2 and "python train.py" in err
