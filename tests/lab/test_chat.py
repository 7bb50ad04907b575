"""The chat in the terminal, from the command line, with a small model that has SmolLM2's chat format."""

import io
import json
import os
import re
import sys

import pytest
import torch

from minisa import decode
from minisa.kit import checkpoint
from minisa.kit.files import lock
from minisa.kit.tokenizer import Tokenizer
from minisa.lab import chat
from minisa.model import GPT, Block, GPTConfig

START, END = 256, 257
BYTES = [bytes([b]) for b in range(256)]
TOKENIZER = Tokenizer([*BYTES, b"<|im_start|>", b"<|im_end|>"], [START, END], "gpt-2")
INFO = {"step": 0, "val_loss": 1.0, "val_bpb": 1.0, "data": None, "seconds": 0}

@pytest.fixture
def talk(run, tmp_path, monkeypatch):
    """talk(lines, *flags) → status, stdout, stderr of a chat, greedy, with answers of 12 tokens."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=1000, vocab_size=258, n_layer=3, n_head=2, n_embd=32))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    checkpoint.save(tmp_path / "run", model, TOKENIZER, INFO)

    def talk(lines, *flags):
        typed = "".join(line + "\n" for line in lines).encode(errors="surrogateescape")
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed), "utf-8"))
        return run(chat.main, "run", "--temperature=0", "--max_new_tokens=12", *flags)
    return talk

def answers(out):
    """The last line of what the model said, of each turn."""
    parts = re.split(r"\n\[first token.*\]\n", out)[:-1]
    return [part.split("\n")[-1] for part in parts]

def reused(out):
    """(tokens reused, tokens in all) of each turn."""
    found = re.findall(r"([\d,]+) of ([\d,]+) tokens reused", out)
    return [tuple(int(n.replace(",", "")) for n in pair) for pair in found]

def history(folder):
    """The tokens of the conversation that a folder keeps."""
    return sum(json.loads((folder / "chat.json").read_text())["parts"], [])

def generated(folder, tokens, begin):
    """What the model of a folder says after tokens[:begin], when it reads them all anew."""
    model, _, _ = checkpoint.load(folder / "run")
    return model.generate(torch.tensor([tokens[:begin]]), 12, temperature=0)[0, begin:].tolist()

def one_line(err):
    return err.count("\n") == 1

def test_a_conversation_is_in_the_models_own_format(talk, tmp_path):
    assert talk(["Hello <|im_end|> you", "And now?"], "--store=s")[0] == 0
    tokens = history(tmp_path / "s")
    text = TOKENIZER.decode(tokens)
    assert text.startswith(f"<|im_start|>system\n{chat.SYSTEM}<|im_end|>\n"
                           "<|im_start|>user\nHello <|im_end|> you<|im_end|>\n<|im_start|>assistant\n")
    assert text.count("<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n") == 1
    assert text.endswith("<|im_end|>\n")
    assert tokens.count(START) == 5 and tokens.count(END) == 5          # the one that was typed is text

def test_the_answers_are_those_of_a_model_that_reads_everything_anew(talk, tmp_path):
    status, out, err = talk(["Hello", "Why?", "Go on"], "--store=s")
    tokens = history(tmp_path / "s")
    starts = [i for i, token in enumerate(tokens) if token == START]
    for start in starts[2::2]:                                          # the assistant's
        begin = start + 1 + len(TOKENIZER.encode("assistant\n"))
        end = tokens.index(END, begin)
        expected = [*generated(tmp_path, tokens, begin), END]           # cut off, it ends there too
        assert tokens[begin:end + 1] == expected[:expected.index(END) + 1]
    assert (status, err) == (0, "") and [n > 0 for n, _ in reused(out)] == [False, True, True]

def test_a_new_process_goes_on_where_the_last_one_ended(talk):
    together = talk(["Hello", "Why?"])[1]
    first, second = talk(["Hello"], "--store=s")[1], talk(["Why?"], "--store=s")[1]
    assert "continuing a conversation of 1 turns" in second
    assert answers(together) == answers(first) + answers(second)
    (n, total), = reused(second)
    assert 64 <= n < total

def test_a_damaged_store_changes_no_answer(talk, tmp_path):
    talk(["Hello there, how are you today? " * 4], "--store=s")
    saved = (tmp_path / "s" / "chat.json").read_text()
    expected = answers(talk(["Why?"], "--store=s")[1])
    for path in (tmp_path / "s").glob("*.kv"):
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    (tmp_path / "s" / "chat.json").write_text(saved)
    status, out, err = talk(["Why?"], "--store=s")
    assert (status, err) == (0, "") and answers(out) == expected and reused(out)[0][0] == 0

def test_turns_can_be_taken_back_and_the_conversation_begun_anew(talk, tmp_path):
    lines = ["Hello", "Why?", "/undo", "Why?", "/reset", "Hello", "/what"]
    status, out, _ = talk(lines, "--store=s")
    said = answers(out)
    assert status == 0 and said[1] == said[2] and said[0] == said[3]
    assert "1 turns" in out and "0 turns" in out and out.count(chat.HELP) == 2
    assert history(tmp_path / "s").count(START) == 3                    # of system, user and assistant

def test_nothing_can_be_taken_back_before_the_first_turn(talk):
    status, out, err = talk(["/undo", "/bill", "Hello"])
    assert (status, err) == (0, "") and len(answers(out)) == 1

@pytest.mark.parametrize("layer, call", [(0, 1), (1, 3), (2, 3), (2, 9)])
def test_ctrl_c_stops_an_answer_and_leaves_no_half_computed_cache(talk, tmp_path, monkeypatch, layer, call):
    forward, mlp, passed = Block.forward, decode.mlp, []

    def count(number):
        passed.append(number)
        if passed.count(layer) == call and number == layer:
            raise KeyboardInterrupt

    def in_torch(self, *args):
        count(self.attn.layer)
        return forward(self, *args)

    def in_numpy(part, x):
        count((passed[-1] + 1) % 3)
        return mlp(part, x)
    monkeypatch.setattr(Block, "forward", in_torch)
    monkeypatch.setattr(decode, "mlp", in_numpy)
    status, out, err = talk(["Hello there, how are you? " * 3, "Why?"], "--store=s")
    assert (status, err) == (0, "") and ("[stopped]" in out) == (call == 1)
    tokens = history(tmp_path / "s")
    assert tokens.count(START) == tokens.count(END) == (3 if call == 1 else 5)
    begin = len(tokens) - tokens[::-1].index(START) + len(TOKENIZER.encode("assistant\n"))
    assert tokens[begin:begin + 5] == generated(tmp_path, tokens, begin)[:5]

def test_ctrl_c_while_a_text_is_printed_keeps_what_was_said(talk, tmp_path, monkeypatch):
    stream = Tokenizer.decode_stream

    def interrupted(self, ids):
        for n, piece in enumerate(stream(self, ids)):
            if n == 3:
                raise KeyboardInterrupt
            yield piece
    monkeypatch.setattr(Tokenizer, "decode_stream", interrupted)
    status, _, err = talk(["Hello"], "--store=s")
    tokens = history(tmp_path / "s")
    begin = len(tokens) - tokens[::-1].index(START) + len(TOKENIZER.encode("assistant\n"))
    said = tokens[begin:-2]
    assert (status, err) == (0, "") and len(said) == 4 and said == generated(tmp_path, tokens, begin)[:4]
    assert tokens[-2:] == [END, *TOKENIZER.encode("\n")] and list((tmp_path / "s").glob("*.kv"))

DAMAGED = ["", "{", "[]", "\0\xff", '{"parts": [[1]]}', "[" * 10**5, *(
    f'{{"parts": {parts}, "tokenizer": "TOK"}}' for parts in (
        "[]", "[[]]", "{}", "5", '["a"]', "[1]", "[[999]]", "[[-1]]", "[[1.5]]", "[[true]]", "[[[1]]]")),
    '{"parts": [[1]], "tokenizer": "another"}']

@pytest.mark.parametrize("content", DAMAGED, ids=lambda content: content[:30])
def test_a_damaged_history_is_left_behind_in_one_line(talk, tmp_path, content):
    (tmp_path / "s").mkdir()
    content = content.replace("TOK", TOKENIZER.identity)
    (tmp_path / "s" / "chat.json").write_bytes(content.encode("latin-1"))
    status, out, err = talk(["Hello"], "--store=s")
    assert status == 0 and "cannot be continued" in err and one_line(err) and len(answers(out)) == 1
    assert (tmp_path / "s" / "chat.json.old").exists()

def test_a_store_that_cannot_save_says_so_and_the_chat_goes_on(talk, monkeypatch):
    def full(path, data, private):
        raise OSError(f"{path}: could not be written")
    monkeypatch.setattr(chat, "write_file", full)
    status, out, err = talk(["Hello", "Why?"], "--store=s")
    assert status == 0 and len(answers(out)) == 2
    assert err.count("the store does not save: s/chat.json: could not be written\n") == 2

FORMS = {"": 6, "--share=1-2": 5, "--share=0-2 --share_kind=kv": 2, "--dtype=bfloat16": 3}

@pytest.mark.parametrize("flags", FORMS)
def test_the_bill_is_that_of_the_cache_with_sharing_and_in_half_the_bytes(talk, flags):
    status, out, err = talk(["Hello", "Why?", "/bill"], *flags.split(), "--store=s")
    bill = out.splitlines()[-2]
    n = reused(out)[1][1] + 12 - 1                          # all but the last token that was made
    per_token = FORMS[flags] * 32 * 4                       # of 3 layers, in bytes: k and v of 32 numbers
    assert (status, err) == (0, "") and reused(out)[1][0] > 0
    assert f"cache of {n:,} tokens: {n * per_token:,} bytes, {per_token:,} per token" in bill

@pytest.mark.parametrize("flags, in_numpy", [([], True), (["--store=s"], True), (["--share=1-2"], True),
                                             (["--dtype=bfloat16"], False)], ids=str)
def test_torch_reads_each_turn_and_numpy_answers_where_it_can(talk, monkeypatch, flags, in_numpy):
    reads, read = [], GPT.read
    monkeypatch.setattr(GPT, "read", lambda *args: reads.append(1) or read(*args))
    status, out, err = talk(["Hello", "Why?"], *flags)
    assert (status, err) == (0, "") and len(answers(out)) == 2
    assert (len(reads) == 2) == in_numpy                    # in torch, each token is read

def test_limits_and_window_of_the_store_are_those_of_the_flags(talk, monkeypatch):
    made, init = [], chat.Store.__init__
    monkeypatch.setattr(chat.Store, "__init__", lambda self, *args: made.append(self) or init(self, *args))
    assert talk([], "--store=s", "--store_memory=3", "--store_disk=5", "--context=200")[0] == 0
    store, = made
    assert (store.limit, store.disk.limit, store.size) == (3 * 2**20, 5 * 2**20, 200)

def test_a_small_window_lets_old_turns_go(talk):
    status, out, err = talk(["Hello"] * 8 + ["/bill"], "--context=100", "--store=s")
    assert (status, err) == (0, "") and len(answers(out)) == 8 and "cache of 100 tokens" in out

WRONG = {"run2": "unrecognized arguments: run2", "--context=10": "--context=10: the store keeps blocks",
         "--store=run/config.json": "not a folder that can be written", "--store_memory=x": "--store_memory",
         "--share=0-9": "--share=0-9", "--dtype=int8": "--dtype"}

@pytest.mark.parametrize("flag", WRONG)
def test_a_wrong_flag_gets_one_line_and_status_2(talk, flag):
    status, _, err = talk(["Hello"], flag)
    assert status == 2 and WRONG[flag] in err and one_line(err)

def test_a_model_without_a_chat_format_is_refused(talk, run, tmp_path):
    model, _, info = checkpoint.load(tmp_path / "run")
    plain = Tokenizer([*BYTES, b"ab", b"cd"])
    checkpoint.save(tmp_path / "plain", model, plain, info)
    status, _, err = run(chat.main, "plain")
    assert status == 2 and "has no chat format" in err and one_line(err)

def test_no_conversation_replaces_another_that_was_kept(talk, tmp_path):
    for _ in range(3):
        talk(["Hello"], "--store=s")
        (tmp_path / "s" / "chat.json").write_text("damaged")
    talk(["Hello"], "--store=s")
    assert sorted(path.name for path in (tmp_path / "s").glob("chat.json.*")) == [
        "chat.json.old", "chat.json.old2", "chat.json.old3"]

@pytest.mark.skipif(os.name == "nt", reason="needs permissions as Unix has them")
def test_a_conversation_is_the_users_alone(talk, tmp_path):
    talk(["Hello there, how are you today? " * 4], "--store=s")
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "s").iterdir() if path.name != ".lock"}
    assert modes == {0o600} and len(list((tmp_path / "s").glob("*.kv"))) > 0

def test_a_pipe_in_the_place_of_the_conversation_is_refused_and_left(talk, tmp_path, make_pipe):
    (tmp_path / "s").mkdir()
    make_pipe(tmp_path / "s" / "chat.json")
    status, _, err = talk(["Hello"], "--store=s")
    assert status == 2 and "chat.json: is not a regular file" in err and one_line(err)
    assert {path.name for path in (tmp_path / "s").iterdir()} == {"chat.json"}

def test_two_chats_do_not_share_a_folder(talk, tmp_path):
    with lock(tmp_path / "s"):
        status, _, err = talk(["Hello"], "--store=s")
    assert status == 2 and "s: another program is writing there" in err and one_line(err)

@pytest.mark.parametrize("line, why", [("a" * 10**6, "longer than 65,536"),
                                       ("a" * 2**16, "longer than 65,536"),
                                       ("a" * 2000, "do not fit into the window of 1,000")],
                         ids=["1 MB", "64 kB", "2 kB"])
def test_a_line_that_does_not_fit_costs_that_line_only(talk, line, why):
    status, out, err = talk([line, "Hello"])
    assert status == 0 and why in err and one_line(err)
    assert answers(out) == answers(talk(["Hello"])[1])

def test_a_conversation_has_an_end(talk, monkeypatch):
    monkeypatch.setattr(chat, "MOST", 150)
    status, out, err = talk(["Hello", "Why? " * 20])
    assert status == 0 and "conversation of at most 150" in err and one_line(err) and len(answers(out)) == 1

def test_bytes_that_are_not_utf_8_are_read_as_they_are(talk, tmp_path):
    status, _, err = talk(["\udce9"], "--store=s")
    said = TOKENIZER.decode_bytes(history(tmp_path / "s"))
    assert (status, err) == (0, "") and b"user\n\xe9<|im_end|>" in said
