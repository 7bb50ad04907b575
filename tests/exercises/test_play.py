"""play, rank and handout, on tiny models."""

import csv
import json
import os
import shutil
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train
from minisa.exercises import handout, play, rank
from minisa.kit.checkpoint import load, save
from minisa.kit.cli import command

TINY = ("--n_layer=3 --n_head=4 --n_kv_head=2 --n_embd=16 --n_hidden=32 --block_size=16 --batch_size=4 "
        "--vocab_size=300 --max_iters=12 --warmup_iters=2 --eval_interval=12 --eval_tokens=500 "
        "--device=cpu").split()

@pytest.fixture(scope="module")
def runs(tmp_path_factory, text):
    """A folder with two tiny runs, full and shared."""
    folder = tmp_path_factory.mktemp("runs")
    monkeypatch = pytest.MonkeyPatch()
    for name, flag in {"full": "--seed=1", "shared": "--share=0-2"}.items():
        flags = *TINY, flag, f"--text={text}", f"--data_dir={folder}/.data", f"--out_dir={folder}/{name}"
        monkeypatch.setattr(sys, "argv", ["train", *flags])
        with pytest.raises(SystemExit) as stop:
            command(train.main)
        assert not stop.value.code
    monkeypatch.undo()
    return folder

# ---- play ----

@pytest.mark.parametrize("name, share", [("full", "1-2"), ("shared", "")])
@pytest.mark.parametrize("prompt", ["ROMEO:", "R", "Two households, both alike in dignity, in fair Verona"])
def test_right_answers_write_the_text_of_minisa_past_the_context_too(name, share, prompt, right, runs, run):
    share_flag = [f"--share={share}"] if share else []
    status, out, _ = run(play.main, runs / name, f"--answers={right}", *share_flag, f"--prompt={prompt}",
                         "--max_new_tokens=40", "--temperature=0")
    model, tokenizer, _ = load(runs / name, share=share or None)
    ids = tokenizer.encode(prompt)[-16:]
    tokens = model.generate(torch.tensor([ids]), 40, temperature=0)[0, len(ids):].tolist()
    assert status == 0 and out.startswith(prompt + "".join(tokenizer.decode_stream(tokens)) + "\n")
    rows = [line.split() for line in out.splitlines()[-4:]]
    assert all(row[-1] == row[-2] for row in rows) and rows[2][:4] == ["cache", "of", "16", "tokens,"]
    assert rows[0][-1] == "40"

WRONG = {
    "no .T": ("return y @ W_out.T", "return y @ W_out"),
    "other heads": ("    values.append(v)", "    values.append(v)\n    P = P.flip(0)"),
}

@pytest.mark.parametrize("wrong", WRONG)
def test_code_that_is_wrong_writes_other_tokens_and_has_another_loss(wrong, right, runs, run, tmp_path):
    old, new = WRONG[wrong]
    text, file = right.read_text(), tmp_path / "mine.py"
    assert old in text
    file.write_text(text.replace(old, new))
    status, out, _ = run(play.main, larger(runs / "shared"), f"--answers={file}", "--max_new_tokens=40")
    same, loss, *bill = [line.split() for line in out.splitlines()[-4:]]
    assert status == 0 and int(same[-2]) < 40 == int(same[-1]) and loss[-2] != loss[-1]
    assert all(row[-1] == row[-2] for row in bill)

def larger(folder):
    """The model with larger matrices in attention, as if trained for more than twelve steps."""
    model, tokenizer, info = load(folder)
    grown = folder.with_name(f"{folder.name}-larger")
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight *= 20
            block.attn.out.weight *= 20
    save(grown, model, tokenizer, {"data": info["data"]})
    return grown

def test_the_loss_of_play_is_that_of_the_whole_passage_read_at_once(runs):
    model, tokenizer, _ = load(runs / "full")
    ids = torch.tensor([tokenizer.encode(play.PASSAGE)[:16]])
    _, expected = model(ids[:, :-1], ids[:, 1:])
    assert play.loss(model, ids) == pytest.approx(expected.item(), abs=1e-4)

def test_answers_that_fail_are_named_with_their_line(right, runs, run, tmp_path):
    text, file = right.read_text(), tmp_path / "mine.py"
    appends = 1 + text.splitlines().index("    values.append(v)")
    for old, new, why in (
        ("    values.append(v)", "    values.add(v)",
         "decode: AttributeError: 'list' object has no attribute 'add' "
         f"in line {appends} of mine.py: values.add(v)"),
        ("    values.append(v)", "    values = [*values, v]",
         "decode left 6 tokens in the cache, expected 7"),
        ("return y @ W_out.T", "return y[:1]", "reuse_layer gave (1, 16), expected (6, 16)"),
        ('["reuse"]', '["anchor"]', "expected ['anchor', 'reuse', 'reuse']"),
        ("    found = [", "    raise SystemExit\n    found = [", "roles: SystemExit"),
        ("    found = [", "    raise NotImplementedError\n    found = [", "roles is not answered yet"),
        ("def roles", "def rolls", "has no function roles"),
        ("import math\n", "import math(\n", "SyntaxError"),
    ):
        assert old in text
        file.write_text(text.replace(old, new))
        status, _, err = run(play.main, runs / "shared", f"--answers={file}", "--prompt=ROMEO:")
        assert status == 2 and why in err.splitlines()[-1], err
    file.write_text(text.replace("    matrix =", "    raise NotImplementedError\n    matrix ="))
    status, out, _ = run(play.main, runs / "shared", f"--answers={file}", "--max_new_tokens=3")
    assert status == 0 and "decode_flops is not answered yet" in out

def test_what_cannot_be_played_is_refused(right, runs, run):
    for flags, why in {(runs / "none",): "no such model", (runs / "full",
                                                           "--share=5-9"): "layers of this model",
                       (runs / "full", "--answers=none.py"): "no such file"}.items():
        status, _, err = run(play.main, f"--answers={right}", *flags)
        assert status == 2 and why in err and err.count("\n") == 1

# ---- rank ----

def edited(folder, **settings):
    """Change the settings that a run's train.safetensors holds, and sign it anew, as a cheat would."""
    from minisa.kit import checkpoint
    file = folder / "train.safetensors"
    tensors, known, _ = checkpoint.unpack(file.read_bytes())
    known["settings"] = [flag for flag in known["settings"] if flag[2:].partition("=")[0] not in settings]
    known["settings"] += [f"--{name}={value}" for name, value in settings.items()]
    file.write_bytes(checkpoint.pack(tensors, None, known))

@pytest.fixture
def entries(runs, tmp_path, text):
    """A folder of entries with anything in it."""
    folder = tmp_path / "entries"
    for name in "full", "shared":
        shutil.copytree(runs / name, folder / name)
    for name in ("damaged", "fine-tuned", "swapped", "odd", "other-text", "state-only", "less-than-nothing",
                 "huge"):
        shutil.copytree(runs / "shared", folder / name)
    tensors = folder / "damaged/model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-40])
    for name in "config.json", "model.safetensors", "tokenizer.json":
        (folder / "swapped" / name).write_bytes((folder / "full" / name).read_bytes())
    (folder / "state-only/model.safetensors").unlink()
    edited(folder / "fine-tuned", init_from="smollm2")
    edited(folder / "other-text", text="mine.txt")
    edited(folder / "odd", batch_size="many\x1b[31m")
    edited(folder / "less-than-nothing", batch_size="-5")
    edited(folder / "huge", batch_size="9" * 400)
    (folder / "notes.txt").write_text("hello")
    (folder / "empty").mkdir()
    (folder / "two\nlines").mkdir()
    os.symlink("loop", folder / "loop")
    return folder

def table(file):
    return {row["name"]: row for row in csv.DictReader(Path(file).open())}

def test_entries_are_ranked_by_their_loss_and_each_that_is_not_says_why(entries, run, text):
    status, out, _ = run(rank.main, entries, f"--text={text}", "--csv=ranking.csv")
    rows = table("ranking.csv")
    assert status == 0 and len(rows) == 14
    good = [row for row in rows.values() if row["place"]]
    assert {row["name"] for row in good} == {"full", "shared"}
    assert [row["place"] for row in good] == ["1", "2"] and good[0]["val_bpb"] <= good[1]["val_bpb"]
    per_layer = 2 * 4 * 4                       # G · D numbers of 4 bytes: of k, or of v
    assert rows["full"]["cache_bytes_per_token"] == str(6 * per_layer)
    assert rows["shared"]["cache_bytes_per_token"] == str(4 * per_layer)
    C, M, V, T = 16, 32, load(entries / "full")[0].config.vocab_size, 16
    token = 3 * (2 * C * (C + 8 + 8 + C) + 4 * C * T + 6 * C * M) + 2 * C * V
    assert rows["full"]["training_flops"] == str(3 * token * 12 * 4 * T)
    for name, why in {
        "damaged": "damaged",
        "fine-tuned": "--init_from",
        "swapped": "not the one",
        "odd": r"batch_size=many\x1b[31m",
        "less-than-nothing": "not a number above 0",
        "huge": "not a number above 0",
        "loop": "holds no train.safetensors",
        "other-text": "another text",
        "state-only": "model.safetensors",
        "notes.txt": "holds no train.safetensors",
        "empty": "holds no train.safetensors",
    }.items():
        assert why in rows[name]["problem"] and f"disqualified: {name}: " in out
    assert r"disqualified: two\x0alines: " in out

def test_what_keeps_or_trained_too_much_is_disqualified(entries, run, text, monkeypatch):
    monkeypatch.setattr(rank, "CACHE_BYTES", 150)
    edited(entries / "shared", batch_size=10**9)
    run(rank.main, entries, f"--text={text}", "--csv=ranking.csv")
    rows = table("ranking.csv")
    assert rows["full"]["problem"] == "keeps 192 bytes per token; at most 150"
    assert "FLOPs to train; at most 2e+13" in rows["shared"]["problem"] and not rows["shared"]["place"]

def in_this_process(words, **more):
    """What subprocess.run() does with train.py, without importing torch once more."""
    program, script, *flags = words
    assert program == sys.executable and Path(script).samefile(train.__file__)
    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(SystemExit) as stop:
        monkeypatch.setattr(sys, "argv", [script, *flags])
        command(train.main)
    return SimpleNamespace(returncode=stop.value.code or 0, stderr="")

def test_the_first_are_trained_again_and_compared(runs, run, text, tmp_path, monkeypatch):
    monkeypatch.setattr(rank, "subprocess", SimpleNamespace(run=in_this_process, PIPE=-1))
    for name in "full", "shared":
        shutil.copytree(runs / name, tmp_path / "entries" / name)
    edited(tmp_path / "entries/shared", learning_rate=0.0)
    status, out, _ = run(rank.main, tmp_path / "entries", f"--text={text}", "--retrain", "--csv=ranking.csv")
    rows = table("ranking.csv")
    assert rows["full"]["problem"] == ""
    assert rows["full"]["retrained_bpb"] == rows["full"]["val_bpb"] and rows["full"]["place"] == "1"
    assert "trained again, it reaches" in rows["shared"]["problem"]

def test_a_folder_that_holds_no_entries_is_refused(run, tmp_path):
    for folder, why in {tmp_path: "holds no entries", tmp_path / "none": "is not a folder"}.items():
        status, _, err = run(rank.main, folder)
        assert status == 2 and why in err and err.count("\n") == 1

# ---- handout ----

def test_the_handout_opens_and_its_models_are_as_they_were(runs, run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/bill.csv").write_text("model\n")
    status, out, _ = run(handout.main, runs / "full", runs / "shared", "--out=a.zip")
    with zipfile.ZipFile("a.zip") as archive:
        names = archive.namelist()
        assert archive.testzip() is None and all(name.isascii() and "\\" not in name for name in names)
        archive.extractall(tmp_path / "unpacked")
    assert status == 0 and "wrote a.zip" in out
    assert not any("solutions" in name or name.endswith("train.safetensors") for name in names)
    for name in ("HANDOUT.txt", "out/bill.csv", "assets/axes.png", "assets/smollm2/attention.png",
                 "minisa/exercises/README.md", "minisa/exercises/lesson.ipynb",
                 "minisa/exercises/answers.py"):
        assert name in names
    assert json.loads((tmp_path / "unpacked/minisa/exercises/lesson.ipynb").read_text())
    here, there = (load(folder)[0] for folder in (runs / "full", tmp_path / "unpacked/out/full"))
    assert all(map(torch.equal, here.parameters(), there.parameters()))

def test_the_handout_is_written_whole_or_not_at_all(runs, run, tmp_path):
    status, _, err = run(handout.main)
    assert status == 2 and "train it with python train.py" in err
    shutil.copytree(runs / "full", tmp_path / "full")
    (tmp_path / "full/model.safetensors").write_bytes(b"x")
    for flags, why in {(tmp_path / "full",): "damaged", (runs / "full",
                                                         "--out=a.txt"): "must end in .zip"}.items():
        status, _, err = run(handout.main, *flags)
        assert status == 2 and why in err and err.count("\n") == 1
    assert not list(tmp_path.glob("*.zip*"))
