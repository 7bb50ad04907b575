"""Sampling and the bill, from the command line, with models trained on a real text at a small size."""

import csv
import io
import shutil
import sys
from pathlib import Path

import pytest
import torch

import sample
import train
from minisa import checkpoint, cost

FLAGS = ["--n_layer=3", "--n_head=2", "--n_embd=16", "--n_hidden=32", "--block_size=16", "--batch_size=4", "--vocab_size=300", "--max_iters=30",
         "--eval_interval=30", "--learning_rate=1e-2", "--device=cpu"]


@pytest.fixture(scope="session")
def trained(text, tmp_path_factory):
    """A folder with two trained runs, full and shared."""
    folder = tmp_path_factory.mktemp("trained")
    for flags in (["full"], ["weights-0-2", "--share=0-2"]):
        sys.argv = ["train.py", *FLAGS, f"--text={text}", f"--data_dir={folder}/data", f"--out_dir={folder}/out/{flags[0]}", *flags[1:]]
        train.main()
    return folder


@pytest.fixture
def runs(trained, tmp_path):
    shutil.copytree(trained / "out", tmp_path / "out")


def table(file):
    return list(csv.DictReader(io.StringIO(Path(file).read_text())))


def test_every_run_is_sampled_and_billed(run, runs):
    status, out, err = run(sample.main, "--max_new_tokens=12", "--csv=bill.csv")
    assert (status, err) == (0, "") and "they agree" in out
    full, shared = table("bill.csv")
    assert [full["model"], shared["model"]] == ["out/full", "out/weights-0-2"] and [full["sharing"], shared["sharing"]] == ["none", "weights 0-2"]
    assert int(full["cache B/token"]) == 3 * 2 * 16 * 4 and int(shared["cache B/token"]) == 4 * 16 * 4
    assert int(full["cache B"]) == 16 * 384
    for row in (full, shared):
        model, _, info = checkpoint.load(row["model"])
        assert int(row["parameters"]) == sum(p.numel() for p in model.parameters()) and float(row["val bpb"]) == pytest.approx(info["val_bpb"], abs=1e-4)
        assert int(row["FLOPs/token"]) == cost.measure(model, 16).decode_flops and float(row["tokens/s"]) > 0


def test_the_text_is_what_the_model_generates(run, runs):
    status, out, _ = run(sample.main, "out/full", "--prompt=def f", "--temperature=0", "--max_new_tokens=40")
    model, tokenizer, _ = checkpoint.load("out/full")
    expected = tokenizer.decode(model.generate(torch.tensor([tokenizer.encode("def f")]), 40, temperature=0)[0].tolist())
    assert status == 0 and expected in out


def test_the_same_seed_writes_the_same_text(run, runs):
    texts = [run(sample.main, "out/full", f"--seed={seed}", "--num_samples=2")[1].split("-" * 80)[1:3] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2] and texts[0][0] != texts[0][1] and texts[0][1] == texts[2][0]


def test_zero_shot_sharing_is_billed_beside_full_attention_with_its_own_loss(run, runs, trained):
    status, out, _ = run(sample.main, "out/full", "--share=0-2", "--max_new_tokens=5", "--csv=bill.csv")
    full, shared = table("bill.csv")
    assert status == 0 and [full["sharing"], shared["sharing"]] == ["none", "weights 0-2"]
    model, _, info = checkpoint.load("out/full", share="0-2")
    assert float(shared["val bpb"]) == pytest.approx(sample.Data(info["data"]).evaluate(model)[1], abs=1e-4)
    shutil.move(trained / "data", trained / "moved")
    run(sample.main, "out/full", "--share=0-2", "--max_new_tokens=5", "--csv=bill.csv")
    shutil.move(trained / "moved", trained / "data")
    assert [row["val bpb"] for row in table("bill.csv")][1] == "?"


def test_a_prediction_that_misses_is_an_error_in_the_table(run, runs, monkeypatch):
    true = sample.measure
    def off_by_one(model, context, **more):
        found = true(model, context, **more)
        found.decode_flops += 1
        return found
    monkeypatch.setattr(sample, "measure", off_by_one)
    status, out, _ = run(sample.main, "out/full", "--max_new_tokens=5")
    assert status == 1 and "ERROR: predicted" in out and "THEY DIFFER" in out


def test_each_axis_of_the_cache_is_a_row_of_the_bill(run, runs):
    flags = ["--share=0-1", "--heads=mix", "--refit", "--eigen_error=0.1", "--squeeze=8", "--squeeze_policy=sinks,window", "--squeeze_cut=1,0.5"]
    status, out, err = run(sample.main, "out/full", *flags, "--max_new_tokens=30", "--eval_tokens=64", "--csv=bill.csv")
    assert status == 0, err
    rows = table("bill.csv")
    assert [row["model"].split(", ", 1)[1:] for row in rows] == [[], ["refitted"], ["refitted, eigen 0.1"]] + [[f"refitted, eigen 0.1, squeeze 8 {kind}"] for kind in
        ("sinks equal", "sinks 0.5", "window equal", "window 0.5")]
    sizes = [int(row["cache B"]) for row in rows]
    assert sizes[0] > sizes[1] > sizes[2] > sizes[3] and sizes[3] == sizes[5] == sizes[2] // 2 and sizes[4] <= sizes[3]
    assert int(rows[3]["FLOPs/token"]) < int(rows[2]["FLOPs/token"]) and len({row["val bpb"] for row in rows}) >= 3
    assert len(out.split("tokens/s")[0].split("-" * 80)) == 2 * len(rows) + 1


def test_prompts_come_from_files_and_standard_input(run, runs, monkeypatch):
    Path("prompt.txt").write_text("import os, 日本\n")
    assert "import os, 日本\n" in run(sample.main, "out/full", "--prompt=FILE:prompt.txt", "--max_new_tokens=3")[1]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("from stdin ".encode())))
    assert "from stdin " in run(sample.main, "out/full", "--prompt=-", "--max_new_tokens=3")[1]


def test_the_bill_can_be_drawn(run, runs):
    pytest.importorskip("matplotlib", reason="the pictures need matplotlib")
    for file, start in (("bill.png", b"\x89PNG"), ("bill.svg", b"<?xml")):
        assert run(sample.main, "--max_new_tokens=3", f"--plot={file}")[0] == 0
        assert Path(file).read_bytes().startswith(start)
    status, _, err = run(sample.main, "--plot=bill.doc")
    assert status == 2 and "--plot=bill.doc: must end in .png" in err


def test_a_missing_matplotlib_is_named(run, runs, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, _, err = run(sample.main, "--plot=bill.png")
    assert status == 2 and "pip install matplotlib" in err


WRONG = {
    "out/none": "no such checkpoint", "--share=0-9": "there is no layer 9", "--share=x": "is not a span", "--share_kind=kv": "give --share too", "--heads=mix": "give --share too", "--refit": "give one of them too", "--squeeze=7": "must be from 8 to the context of 16", "--squeeze=17": "must be from 8 to the context of 16",
    "--squeeze_policy=oldest": "must be window, sinks or heavy", "--squeeze_cut=0": "must be above 0 and at most 1", "--squeeze_cut=half": "must be above 0 and at most 1",
    "--eigen_rank=9": "--eigen_rank=9: a head of this model is only 8 wide", "--dtype=int8": "must be float32 or bfloat16", "--context=0": "0 is not a number", "--prompt=": "--prompt: is empty",
    "--prompt=FILE:none.txt": "No such file", "--prompt=FILE:out": "Is a directory", "--temperature=-1": "-1 is not a number", "--top_k=0": "0 is not a number",
    "--max_new_tokens=0": "0 is not a number", "--num_samples=x": "invalid int value", "--device=tpu": "--device: tpu is not on this machine", "--csv=out": "--csv=out: is a folder",
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
    assert status == 2 and "layer 2 was trained with --share=0-2" in err
    Path("out/full/model.pt").write_bytes(b"junk")
    status, _, err = run(sample.main)
    assert status == 2 and "out/full/model.pt: damaged" in err
    shutil.rmtree("out")
    status, _, err = run(sample.main)
    assert status == 2 and "python train.py" in err
