"""The BPE trainer against the textbook one, and the tokenizer's round trips."""

import json
import random
from collections import Counter

import pytest
import regex
import tiktoken

from minisa.kit.tokenizer import PATTERN, Tokenizer, from_json, learn, to_json

TEXT = """First Citizen:
Before we proceed any further, hear me speak.

All:
Speak, speak.

First Citizen:
You are all resolved rather to die than to famish?

All:
Resolved. resolved.

First Citizen:
First, you know Caius Marcius is chief enemy to the people.
""" * 3
MIXED = ("Zwölf Boxkämpfer, señor!  42 + 1234567 = ?\t\r\n 日本語のテキスト 🎭👩‍👩‍👧 e\u0301 "
         "\x00\x7f  trailing  \n\n\n'tis I'll we've \u2028")

def textbook(text, vocab_size):
    """BPE as its definition says: count all pairs anew for every merge."""
    words = Counter(tuple(bytes([b]) for b in word.encode()) for word in regex.findall(PATTERN, text))
    tokens = [bytes([b]) for b in range(256)]
    while len(tokens) < vocab_size:
        pairs = Counter()
        for word, n in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += n
        ids = {token: i for i, token in enumerate(tokens)}
        a, b = max(pairs, key=lambda pair: (pairs[pair], ids[pair[0]], ids[pair[1]]))
        tokens.append(a + b)
        merged = Counter()
        for word, n in words.items():
            new = []
            for token in word:
                if new and new[-1] == a and token == b:
                    new[-1] = a + b
                else:
                    new.append(token)
            merged[tuple(new)] += n
        words = merged
    return tokens

def test_the_trainer_learns_what_the_textbook_one_learns():
    assert learn(TEXT, 330) == textbook(TEXT, 330)
    overlapping = "aaaa aaaaa aaaaaaa baaab " * 5
    assert learn(overlapping, 260) == textbook(overlapping, 260)

def test_it_stops_when_nothing_is_left_to_merge():
    tokens = learn("abc abc", 1000)
    assert len(tokens) < 265 and b" abc" in tokens and len(set(tokens)) == len(tokens)

@pytest.mark.parametrize("vocab_size", [256, 300, 366])
def test_any_text_and_any_bytes_come_back(vocab_size):
    tokenizer = Tokenizer(learn(TEXT, vocab_size))
    for text in ("", TEXT, MIXED, "<|endoftext|>"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    noise, latin = random.Random(0).randbytes(5000), "né".encode("latin-1")
    for raw in (bytes(range(256)), noise, b"\xff\xfe ok \xe2\x82", latin):
        ids = tokenizer.encode(raw.decode("utf-8", "surrogateescape"))
        assert tokenizer.decode_bytes(ids) == raw and max(ids) < tokenizer.vocab_size == vocab_size

def test_encoding_applies_the_merges_in_the_order_they_were_learned():
    tokens = learn(TEXT, 330)
    tokenizer = Tokenizer(tokens)
    for word in regex.findall(PATTERN, TEXT):
        parts = [bytes([b]) for b in word.encode()]
        for token in tokens[256:]:
            i = 0
            while i < len(parts) - 1:
                if parts[i] + parts[i + 1] == token:
                    parts[i:i + 2] = [token]
                i += 1
        assert [tokens[i] for i in tokenizer.encode(word)] == parts

def test_256_tokens_are_the_bytes_and_more_tokens_make_texts_shorter():
    lengths = [len(Tokenizer(learn(TEXT, size)).encode(TEXT)) for size in (256, 280, 330)]
    assert lengths[0] == len(TEXT.encode()) > lengths[1] > lengths[2]

def test_a_stream_gives_whole_characters_and_the_same_text():
    tokenizer = Tokenizer(learn(TEXT, 256))
    pieces = list(tokenizer.decode_stream(tokenizer.encode(MIXED)))
    assert "".join(pieces) == MIXED and "\ufffd" not in "".join(pieces)
    assert "".join(tokenizer.decode_stream(tokenizer.encode("ok \udce2\udc82"))) == "ok \ufffd"

def test_it_is_stored_as_json():
    tokenizer = Tokenizer(learn(TEXT, 330))
    again = from_json(json.loads(json.dumps(to_json(tokenizer))))
    assert again.encode(MIXED) == tokenizer.encode(MIXED) and again.decode(again.encode(MIXED)) == MIXED
    assert again.identity == tokenizer.identity != Tokenizer(learn(TEXT, 331)).identity

def test_too_few_tokens_are_refused():
    with pytest.raises(ValueError, match="--vocab_size=255"):
        learn(TEXT, 255)

def test_gpt2_offline_is_refused_by_name(monkeypatch, tmp_path):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))                     # nothing downloaded before
    for name in ("http_proxy", "https_proxy", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")                          # no one listens there
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    tiktoken.registry.ENCODINGS.pop("gpt2", None)
    with pytest.raises(ValueError, match="--tokenizer=gpt2.*--tokenizer=bpe"):
        Tokenizer.gpt2()

@pytest.mark.parametrize("odd", ["\n" * 10**6, " " * 10**6 + "x", "a" * 10**6, "é日" * 10**5],
                         ids=["\\n", " ", "a", "é日"])
def test_a_text_of_one_endless_word_is_learned_and_comes_back(odd):
    tokenizer = Tokenizer(learn(odd, 300))
    ids = tokenizer.encode(odd)
    assert tokenizer.decode(ids) == odd and len(ids) < len(odd.encode()) / 2

def test_letters_without_a_space_are_learned_in_bounded_work():
    rng = random.Random(0)
    text = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=300_000))
    tokens = learn(text, 300)
    counts = Counter(map("".join, zip(text, text[1:])))
    assert len(tokens) == 300 and counts[tokens[256].decode()] > 1.05 * sum(counts.values()) / 26**2
