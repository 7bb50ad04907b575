"""Numbers that a text tells and a question asks for, with caches of equal bytes."""

import csv
import itertools

import pytest
import torch
from torch.nn import functional as F

from minisa.axes import squeeze
from minisa.axes.squeeze import Squeezing, Stored
from minisa.kit import checkpoint
from minisa.kit.data import Data, tokenize
from minisa.lab import recall
from minisa.model import GPT, GPTConfig

LENGTH = 360

@pytest.fixture(scope="module")
def folder(text, tmp_path_factory):
    """A folder with a run, "run", whose model is small and random, and its data."""
    folder = tmp_path_factory.mktemp("recall")
    data = tokenize(text, vocab_size=300, folder=folder / "data")
    torch.manual_seed(0)
    config = GPTConfig(block_size=420, vocab_size=300, n_layer=3, n_head=2, n_embd=16)
    model = GPT(config)
    for block in model.blocks:                              # else it repeats the last token, come what may
        block.attn.out.weight.data *= 100
    info = {**checkpoint.UNKNOWN, "data": str(data.folder)}
    checkpoint.save(folder / "run", model, data.tokenizer, info)
    return folder

@pytest.fixture
def model(folder, monkeypatch):
    """The model of "run" in the working folder, and its data."""
    monkeypatch.chdir(folder)
    model, _, info = checkpoint.load("run")
    return model, Data(info["data"])

# ---- prompts ----

@pytest.mark.parametrize("needles", [1, 4])
def test_a_number_stands_at_each_depth_and_one_is_asked_for(model, needles):
    decode = model[1].tokenizer.decode
    prompts = recall.make_prompts(model[1], 3, LENGTH, needles, seed=1)
    depths = [[*asked] for _, asked in prompts]
    assert depths == ([[10], [50], [85]] if needles == 1 else [[10, 50, 85, 30]])
    for contexts, asked in prompts:
        for depth, (questions, answers) in asked.items():
            assert contexts.size(1) + questions.size(1) == LENGTH
            for context, question, answer in zip(contexts, questions, answers):
                text, question, number = (decode(ids.tolist()) for ids in (context, question, answer))
                *_, told = question.split("Answer: ")
                assert text.count("The secret number") == needles and text.count(told + number + ".") == 1
                assert number.strip().isdigit() and len(number) == 5
                before = decode(context[:LENGTH * depth // 100].tolist())
                assert abs(len(before) - text.index(told)) < 0.2 * len(text)

def test_all_questions_of_a_model_have_equally_many_tokens():
    words = {"a": "x", "b": "yy", "c": "zz", "d": "www"}
    assert recall.of_one_length(list, words) == {"b": ["y", "y"], "c": ["z", "z"]}

# ---- answers ----

def likeliest(net, cache, said, n):
    """The likeliest token (B, n) after each of the last n of said (B, T), read one by one."""
    x = torch.cat([net.hidden(token, cache) for token in said.split(1, dim=1)], dim=1)
    return net.head(x[:, -n:]).argmax(-1)

@pytest.mark.parametrize("needles", [1, 4])
@torch.no_grad()
def test_an_answer_is_right_if_a_cache_squeezed_then_and_there_gives_it(model, needles):
    net, data = model
    ways = Stored(500, "window", 1), Squeezing(200, "snap", 1), Squeezing(200, "distinct", 1)
    contexts, asked = recall.make_prompts(data, 3, LENGTH, needles, seed=1)[0]
    expected, said = {}, dict(asked)
    for way, depth in itertools.product(ways, asked):
        question, answer = asked[depth]
        rest = torch.cat((question, answer[:, :-1]), dim=1)
        for when, early in ("known", torch.cat((contexts, question[:, :-1]), dim=1)), ("unknown", contexts):
            late = rest[:, early.size(1) - contexts.size(1):]
            cache = way.of(squeeze.read(net, early, [way]), free=late.size(1))
            expected[way, depth, when] = likeliest(net, cache, late, answer.size(1))
    for target in expected.values():                        # let each of these be right, in turn
        for depth, (question, _) in asked.items():
            said[depth] = question, target
        assert target.shape == (3, 5)
    found = recall.ask(net, contexts, asked, ways)
    right = {key: (given == asked[key[1]][1]).all(1).sum().item() for key, given in expected.items()}
    assert {key: n for key, (n, _) in found.items()} == right and len(right) == len(found)

@torch.no_grad()
def test_with_all_tokens_it_is_what_the_model_would_write(model):
    net, data = model
    (contexts, asked), *_ = recall.make_prompts(data, 3, LENGTH, 1, seed=1)
    (depth, (question, _)), = asked.items()
    prompt = torch.cat((contexts, question), dim=1)
    written = net.generate(prompt, 5, temperature=0)[:, LENGTH:]
    way = Stored(LENGTH + 4, "window", 1)
    for wrong in (0, 1, 3):
        answer = torch.where(torch.arange(3)[:, None] < wrong, (written + 1) % 300, written)
        found = recall.ask(net, contexts, {depth: (question, answer)}, [way])
        assert [n for n, _ in found.values()] == [3 - wrong] * 2

# ---- the command ----

FLAGS = [f"--lengths={LENGTH}", "--prompts=2", "--windows=3", "--dtype=bfloat16", "--squeeze_policy=sinks",
         "--csv=a.csv", "--text_csv=b.csv"]

def rows_of(file):
    return [*csv.DictReader(open(file))]

def test_a_case_keeps_as_many_tokens_as_its_bytes_allow_and_a_run_is_continued(run, model, monkeypatch):
    status, out, err = run(recall.main, "run", "--needles=1", *FLAGS)
    assert status == 0, err
    rows = rows_of("a.csv")
    per_token = {"": 2 * 3 * 2 * 16, "8": 3 * 2 * (16 + 2 * 2)}         # 3 layers, k and v, 2 heads
    for row in rows:
        allowed, size = float(row["ratio"]) / 100 * int(row["full_bytes"]), per_token[row["bits"]]
        tokens = int(row["full_bytes"]) // per_token[""]
        assert tokens == LENGTH + 4 and int(row["cache_bytes"]) <= allowed
        fits = tokens * size <= allowed
        assert (row["policy"] == "") == fits
        assert int(row["cache_bytes"]) == (tokens if fits else int(allowed) // size) * size
    cases = {(row["policy"], row["bits"], row["ratio"]) for row in rows}
    assert len(rows) == len(cases) * 3 * 2 and len(cases) == 2 * 4
    assert {(row["depth"], row["question"]) for row in rows} == {*itertools.product(
        ("10", "50", "85"), ("known", "unknown"))}

    asked = []
    monkeypatch.setattr(recall, "ask", lambda *args, ask=recall.ask: asked.append(args[3]) or ask(*args))
    assert run(recall.main, "run", "--needles=1", *FLAGS)[0] == 0 and not asked and rows_of("a.csv") == rows
    assert run(recall.main, "run", "--needles=1", *FLAGS, "--squeeze_policy=sinks,window")[0] == 0
    assert {way.policy for ways in asked for way in ways if way.budget < LENGTH} == {"window"}
    assert rows_of("a.csv")[:len(rows)] == rows

@torch.no_grad()
def test_loss_and_divergence_are_those_of_the_tokens_after_the_squeezed_ones(run, model):
    net, data = model
    assert run(recall.main, "run", "--needles=1", *FLAGS[:3], "--dtype=float32", "--text_csv=c.csv",
               "--squeeze_policy=window", "--ratios=100,50")[0] == 0
    windows = data.windows("val", 3, LENGTH)
    log_p = net(windows[:, :-1])[0][:, -32:].log_softmax(-1)
    loss = F.nll_loss(log_p.flatten(0, 1), windows[:, -32:].flatten()).item()
    rows = rows_of("c.csv")
    assert all(float(row["loss"]) - float(row["difference"]) == pytest.approx(loss, abs=1e-4) for row in rows)
    row = next(row for row in rows if row["bits"] == "" and row["policy"])
    way = Squeezing(int(row["budget"]), "window", 1)
    cache = way.of(squeeze.read(net, windows[:, :-33], [way]), free=32)
    log_q = torch.cat([net(token, cache=cache)[0] for token in windows[:, -33:-1].split(1, dim=1)], dim=1)
    log_q = log_q.log_softmax(-1)
    loss = F.nll_loss(log_q.flatten(0, 1), windows[:, -32:].flatten()).item()
    assert float(row["loss"]) == pytest.approx(loss, abs=1e-4)
    assert float(row["divergence"]) == pytest.approx(
        F.kl_div(log_q, log_p, log_target=True, reduction="sum").item() / 96, abs=1e-4)

@pytest.mark.parametrize("flags, message", [
    (["--lengths=64,5"], "--lengths: 5 is not a number from 64 up"), (["--lengths=x"], "--lengths"),
    (["--lengths=400"], "--lengths=400: too long for the context of run; take at most 388"),
    (["--lengths=64"], "--lengths: facts and question leave too few tokens"),
    (["--prompts=0"], "--prompts"), (["--text=none.txt"], "none.txt: No such file"),
    (["--ratios=1"], "--ratios=1: too few bytes"), (["--cache_bits=4"], "--cache_bits"),
    (["--csv=run/config.json"], "must end in .csv"),
], ids=str)
def test_wrong_flags_get_one_line_and_status_2(run, model, flags, message):
    status, _, err = run(recall.main, "run", "--prompts=1", f"--lengths={LENGTH}", *flags)
    errors = [line for line in err.splitlines() if "error" in line]
    assert status == 2 and len(errors) == 1 and message in errors[0]

def test_a_damaged_file_of_results_is_named(run, model):
    open("bad.csv", "wb").write(b"\xff\xfe")
    status, _, err = run(recall.main, "run", "--csv=bad.csv")
    assert status == 2 and "bad.csv: damaged, or not a table of results" in err
