"""A model that shares learns to predict what its teacher predicts."""

import pytest
import torch

from minisa.axes import heal
from minisa.kit import checkpoint
from minisa.kit.data import tokenize
from minisa.kit.tokenizer import Tokenizer
from minisa.model import GPT, GPTConfig

FLAGS = "--block_size=16", "--batch_size=2", "--dtype=float32", "--save_interval=2", "--log_interval=1"

@pytest.fixture
def folder(tmp_path, text):
    """A folder with a teacher, "full", and "shared", the same with shared attention."""
    data = tokenize(text, vocab_size=300, folder=tmp_path / "data")
    torch.manual_seed(0)
    full = GPT(GPTConfig(block_size=32, vocab_size=300, n_layer=4, n_head=2, n_embd=16))
    for parameter in full.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    info = {**checkpoint.UNKNOWN, "data": str(data.folder), "data_digest": data.digest}
    checkpoint.save(tmp_path / "full", full, data.tokenizer, info)
    parent, _, info = checkpoint.load(tmp_path / "full")
    shared = checkpoint.reconfigure(parent, share="1-3")
    checkpoint.derive(tmp_path / "shared", shared, parent, info)
    return tmp_path

def test_the_divergence_is_that_of_its_definition():
    torch.manual_seed(0)
    model, teacher = (GPT(GPTConfig(block_size=8, vocab_size=50, n_layer=1, n_head=1, n_embd=8))
                      for _ in range(2))
    idx = torch.randint(50, (2, 7))
    p, q = teacher(idx)[0].double().softmax(-1), model(idx)[0].double().softmax(-1)
    expected = (p * (p / q).log()).sum(-1).mean().item()
    assert heal.divergence(model, teacher, idx).item() == pytest.approx(expected, rel=1e-3)

@pytest.mark.parametrize("part,learns", [
    ("all", lambda name: True),
    ("reuse", lambda name: name.startswith(("blocks.2.", "blocks.3."))),
    ("attention", lambda name: name.startswith(("blocks.2.attn.", "blocks.3.attn.")))])
def test_only_the_named_part_learns(folder, run, part, learns):
    status, _, err = run(heal.main, "shared", "--teacher=full", "--out=healed", f"--train={part}",
                         "--max_iters=2", "--learning_rate=0.01", *FLAGS)
    assert status == 0, err
    before, _, _ = checkpoint.load("shared")
    after, _, _ = checkpoint.load("healed")
    changed = {name for name, t in after.state_dict().items() if not t.equal(before.state_dict()[name])}
    assert changed == {name for name in after.state_dict() if learns(name)}
    if part != "all":                                           # the rest is the parent's, on disk too
        written = checkpoint.read("healed").tensors
        assert all(name.startswith(("model.layers.2.", "model.layers.3.")) for name in written)
    assert after.config.share == "1-3"

def test_healing_brings_the_predictions_back(folder, run):
    status, out, err = run(heal.main, "shared", "--teacher=full", "--out=healed", "--max_iters=60",
                           "--learning_rate=0.001", "--reuse_learning_rate=0.001", *FLAGS, "--batch_size=8")
    assert status == 0, err
    words = out.splitlines()[-2].split()
    before, after = float(words[4]), float(words[6])
    assert after < 0.93 * before

def test_reuse_layers_have_a_rate_of_their_own(folder, run):
    flags = "shared", "--teacher=full", "--max_iters=1", "--learning_rate=5e-5", *FLAGS
    for out, rate in ("slow", 0.001), ("fast", 0.002):
        status, _, err = run(heal.main, *flags, f"--out={out}", f"--reuse_learning_rate={rate}")
        assert status == 0, err
    before, slow, fast = (checkpoint.load(name)[0].state_dict() for name in ("shared", "slow", "fast"))
    for name, start in before.items():
        ratio = 2 if name.startswith(("blocks.2.", "blocks.3.")) else 1
        moved = slow[name] - start
        assert moved.abs().max() > 0
        torch.testing.assert_close(fast[name] - start, ratio * moved, rtol=1e-2, atol=1e-6)

@pytest.fixture
def stopped(monkeypatch):
    """stopped(n) lets the next command be stopped during its step number n."""
    step = heal.train_step

    def stop_at(n):
        def one(model, teacher, optimizer, data, args, i):
            if i + 1 == n:
                import signal
                signal.raise_signal(signal.SIGINT)
            return step(model, teacher, optimizer, data, args, i)
        monkeypatch.setattr(heal, "train_step", one)
    return stop_at

def test_a_stopped_run_continues_to_the_same_numbers(folder, run, stopped):
    flags = "shared", "--teacher=full", "--max_iters=6", "--learning_rate=0.01", *FLAGS
    assert run(heal.main, *flags, "--out=whole")[0] == 0
    stopped(3)
    status, out, _ = run(heal.main, *flags, "--out=parts")
    assert status == 130 and "stopped at step 3" in out
    stopped(0)
    status, out, err = run(heal.main, *flags, "--out=parts", "--resume")
    assert status == 0, err
    steps = [line.split()[1] for line in out.splitlines() if line.startswith("step ")]
    assert steps == ["4/6", "5/6", "6/6"]
    (one, _, _), (other, _, _) = checkpoint.load("whole"), checkpoint.load("parts")
    assert not (folder / "parts" / heal.STATE).exists()         # nobody needs it now
    for name, tensor in one.state_dict().items():
        assert tensor.equal(other.state_dict()[name]), name

def test_other_flags_cannot_continue_it(folder, run, stopped):
    flags = "shared", "--teacher=full", "--max_iters=6", "--out=parts", *FLAGS
    stopped(2)
    assert run(heal.main, *flags)[0] == 130
    stopped(0)
    status, _, err = run(heal.main, *flags, "--resume", "--learning_rate=0.5")
    assert status == 2 and "other flags" in err.splitlines()[-1]
    model, tokenizer, info = checkpoint.load("shared")
    model.norm.weight.data *= 2                                 # made anew, it is another model
    checkpoint.save("shared", model, tokenizer, info)
    status, _, err = run(heal.main, *flags, "--resume")
    assert status == 2 and "another model" in err.splitlines()[-1]

@pytest.mark.parametrize("flags,message", [
    ((), "--teacher"),
    (("--teacher=nowhere",), "nowhere"),
    (("--teacher=full", "--train=heads"), "heads"),
    (("--teacher=full", "--max_iters=0"), "from 1 up"),
    (("--teacher=full", "--block_size=64"), "--block_size=64"),
    (("--teacher=full", "--resume"), "parts"),
    (("--teacher=full", "--out=full"), "is there already")])
def test_wrong_flags_are_refused(folder, run, flags, message):
    status, _, err = run(heal.main, "shared", "--out=parts", *FLAGS, *flags)
    assert status == 2 and message in err.splitlines()[-1]

def test_it_learns_on_the_text_and_in_the_format_that_are_named(folder, run, text, monkeypatch):
    monkeypatch.setattr("minisa.kit.data.data_folder", lambda: folder / "tokens")
    (folder / "other.txt").write_text(text.read_text()[::-1])
    formats, step = [], heal.train_step
    def noted(*args):
        formats.append(torch.is_autocast_enabled("cpu"))
        return step(*args)
    monkeypatch.setattr(heal, "train_step", noted)
    flags = "shared", "--teacher=full", "--max_iters=1", *FLAGS
    for out, more in ("a", []), ("b", ["--text=other.txt"]), ("c", ["--dtype=bfloat16"]):
        status, _, err = run(heal.main, *flags, f"--out={out}", *more)
        assert status == 0 and ("on other-" in err) == (out == "b"), err
    assert formats == [False, False, True]
    one, other = (checkpoint.load(name)[0].state_dict()["embed.weight"] for name in "ab")
    assert not one.equal(other)

def test_the_rate_rises_for_a_tenth_of_the_steps_then_falls_to_nothing():
    from types import SimpleNamespace
    args = SimpleNamespace(max_iters=100)
    rates = [heal.schedule(step, args) for step in range(101)]
    assert rates[:10] == pytest.approx([n / 10 for n in range(1, 11)])
    assert [rates[10], rates[55], rates[100]] == pytest.approx([1, 0.5, 0], abs=1e-9)

def test_a_teacher_has_the_same_tokens(folder, run, text):
    other = tokenize(text, vocab_size=300, folder=folder / "others").tokenizer
    swapped = [*other.tokens[:-2], other.tokens[-1] + b"x", other.tokens[-2]]       # as many, but others
    model, _, _ = checkpoint.load(folder / "full")
    checkpoint.save(folder / "other", model, Tokenizer(swapped), checkpoint.UNKNOWN)
    status, _, err = run(heal.main, "shared", "--out=parts", "--teacher=other", *FLAGS)
    assert status == 2 and "other tokens" in err and not (folder / "parts").exists()

def test_a_model_without_reuse_layers_has_none_to_train(folder, run):
    status, _, err = run(heal.main, "full", "--teacher=full", "--out=healed", "--train=reuse", *FLAGS)
    assert status == 2 and "shares nothing" in err
