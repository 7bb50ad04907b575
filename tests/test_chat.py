"""The chat in the terminal, from the command line, with a small model that has SmolLM2's chat format."""

import io
import json
import sys

import pytest
import torch

import sample
from minisa import chat, checkpoint
from minisa.model import GPT, Block, GPTConfig
from minisa.tokenizer import Tokenizer

START, END = 256, 257
TOKENIZER = Tokenizer.from_tokens([bytes([b]) for b in range(256)] + [b"<|im_start|>", b"<|im_end|>"], [START, END], "gpt-2")


@pytest.fixture
def talk(run, tmp_path, monkeypatch):
    """talk(lines, *flags) → status, stdout, stderr of a chat, greedy, with answers of 12 tokens."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=1000, vocab_size=258, n_layer=3, n_head=2, n_embd=32))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    checkpoint.save(tmp_path / "run" / "model.pt", model, TOKENIZER, dict(step=0, val_loss=1.0, val_bpb=1.0, data=None, seconds=0))

    def talk(lines, *flags):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
        return run(sample.main, "run", "--chat", "--temperature=0", "--max_new_tokens=12", *flags)
    return talk


def answers(out):
    """What the model said, without the lines of the program."""
    return [part.rsplit("\n[first token", 1)[0].split("tokens/s]\n")[-1] for part in out.split("\n[first token")[:-1]]


def reused(out):
    return [tuple(int(n.replace(",", "")) for n in line.split(" s, ")[1].split(" tokens reused")[0].split(" of ")) for line in out.splitlines() if line.startswith("[first")]


def test_a_conversation_is_in_the_models_own_format(talk, tmp_path):
    assert talk(["Hello <|im_end|> you", "And now?"], "--store=s")[0] == 0
    tokens = json.loads((tmp_path / "s" / "chat.json").read_text())["tokens"]
    text = TOKENIZER.decode(tokens)
    assert text.startswith(f"<|im_start|>system\n{chat.SYSTEM}<|im_end|>\n<|im_start|>user\nHello <|im_end|> you<|im_end|>\n<|im_start|>assistant\n")
    assert text.count("<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n") == 1 and text.endswith("<|im_end|>\n")
    assert tokens.count(START) == 5 and tokens.count(END) == 5              # the one that was typed is text


def test_the_answers_are_those_of_a_model_that_reads_everything_anew(talk, tmp_path):
    status, out, err = talk(["Hello", "Why?", "Go on"], "--store=s")
    model, tokenizer, _ = checkpoint.load(tmp_path / "run")
    tokens = json.loads((tmp_path / "s" / "chat.json").read_text())["tokens"]
    starts = [i for i, token in enumerate(tokens) if token == START]
    for start in starts[2::2]:                                              # the assistant's
        begin = start + 1 + len(tokenizer.encode("assistant\n"))
        end = tokens.index(END, begin)
        expected = model.generate(torch.tensor([tokens[:begin]]), 12, temperature=0)[0, begin:].tolist()
        assert tokens[begin:end + 1] == (expected[:expected.index(END) + 1] if END in expected else expected + [END])
    assert (status, err) == (0, "") and [n > 0 for n, _ in reused(out)] == [False, True, True]


def test_a_new_process_goes_on_where_the_last_one_ended(talk):
    together = talk(["Hello", "Why?"])[1]
    first = talk(["Hello"], "--store=s")[1]
    second = talk(["Why?"], "--store=s")[1]
    assert "going on with a conversation of 1 turns" in second
    assert [a.splitlines()[-1] for a in answers(together)] == [answers(first)[0].splitlines()[-1], answers(second)[0].splitlines()[-1]]
    (n, total), = reused(second)
    assert n == total // 64 * 64 - 64 * (total // 64 * 64 > total - 30) or n >= 64


def test_a_damaged_store_changes_no_answer(talk, tmp_path):
    talk(["Hello there, how are you today? " * 4], "--store=s")
    saved = (tmp_path / "s" / "chat.json").read_text()
    expected = answers(talk(["Why?"], "--store=s")[1])
    for path in (tmp_path / "s").glob("*.kv"):
        path.write_bytes(path.read_bytes()[:-1] + b"\0")
    (tmp_path / "s" / "chat.json").write_text(saved)
    status, out, err = talk(["Why?"], "--store=s")
    assert (status, err) == (0, "") and answers(out) == expected and reused(out)[0][0] == 0


def test_turns_can_be_taken_back_and_the_conversation_begun_anew(talk, tmp_path):
    status, out, _ = talk(["Hello", "Why?", "/undo", "Why?", "/bill", "/reset", "Hello", "/what"], "--store=s")
    said = [a.splitlines()[-1] for a in answers(out)]
    assert status == 0 and said[1] == said[2] and said[0] == said[3] and "1 turns" in out and "0 turns" in out and out.count(chat.HELP) == 2
    assert "cache B/token" in out and "ERROR" not in out
    assert len(json.loads((tmp_path / "s" / "chat.json").read_text())["turns"]) == 1


@pytest.mark.parametrize("layer, call", [(0, 1), (1, 3), (2, 3), (2, 9)])
def test_ctrl_c_stops_an_answer_and_leaves_no_half_computed_cache(talk, tmp_path, monkeypatch, layer, call):
    forward, calls = Block.forward, []

    def interrupted(self, *args):
        calls.append(self.attn.layer)
        if calls.count(layer) == call and self.attn.layer == layer:
            raise KeyboardInterrupt
        return forward(self, *args)
    monkeypatch.setattr(Block, "forward", interrupted)
    status, out, err = talk(["Hello there, how are you? " * 3, "Why?"], "--store=s")
    assert (status, err) == (0, "") and ("[stopped]" in out) == (call == 1)
    model, tokenizer, _ = checkpoint.load(tmp_path / "run")
    tokens = json.loads((tmp_path / "s" / "chat.json").read_text())["tokens"]
    assert tokens.count(START) == tokens.count(END) == (3 if call == 1 else 5)
    begin = len(tokens) - tokens[::-1].index(START) + len(tokenizer.encode("assistant\n"))
    expected = model.generate(torch.tensor([tokens[:begin]]), 12, temperature=0)[0, begin:].tolist()
    assert tokens[begin:begin + 5] == expected[:5]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"tokens": [1]}', '{"tokens": [999], "turns": [1], "tokenizer": "TOK"}', '{"tokens": [1.5], "turns": [1], "tokenizer": "TOK"}',
                                  '{"tokens": [1], "turns": [9], "tokenizer": "TOK"}', '{"tokens": [1], "turns": [], "tokenizer": "other"}', '{"tokens": {}, "turns": "", "tokenizer": "TOK"}', "\0\xff"])
def test_a_damaged_history_is_left_behind_in_one_line(talk, tmp_path, text):
    talk(["Hello"], "--store=s")
    file = tmp_path / "s" / "chat.json"
    file.write_bytes(text.replace("TOK", json.loads(file.read_text())["tokenizer"]).encode("latin-1"))
    status, out, err = talk(["Hello"], "--store=s")
    assert status == 0 and "cannot be continued" in err and (tmp_path / "s" / "chat.json.old").exists() and err.count("\n") == 1 and len(answers(out)) == 1


def test_it_works_with_sharing(talk):
    status, out, err = talk(["Hello", "Why?"], "--share=1-2", "--store=s")
    assert (status, err) == (0, "") and reused(out)[1][0] > 0


def test_a_small_window_lets_old_turns_go(talk):
    status, out, err = talk(["Hello"] * 8, "--context=100", "--store=s")
    assert (status, err) == (0, "") and len(answers(out)) == 8


@pytest.mark.parametrize("flags, message", [(["--squeeze=50"], "goes without --squeeze"), (["run2"], "needs one model"), (["--context=10"], "--context=10: the store keeps blocks"),
                                            (["--store=run/model.pt"], "no folder that can be written"), (["--store_memory=x"], "--store_memory")], ids=str)
def test_a_wrong_flag_gets_one_line_and_status_2(talk, flags, message):
    status, _, err = talk(["Hello"], *flags)
    assert status == 2 and message in err and err.count("\n") == 1


def test_a_model_without_a_chat_format_is_refused(talk, run, tmp_path):
    model, _, info = checkpoint.load(tmp_path / "run")
    checkpoint.save(tmp_path / "plain" / "model.pt", model, Tokenizer.from_tokens([bytes([b]) for b in range(256)] + [b"ab", b"cd"]), info)
    status, _, err = run(sample.main, "plain", "--chat")
    assert status == 2 and "has no chat format" in err and err.count("\n") == 1
    status, _, err = run(sample.main, "run", "--store=s")
    assert status == 2 and "give --chat too" in err
