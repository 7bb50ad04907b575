"""Folders of a LlamaForCausalLM: theirs open here, ours open there, and what is no such model is refused."""

import json
import random
import re

import numpy as np
import pytest
import safetensors.torch
import torch
from torch.nn import functional as F

import minisa
import sample
from minisa.axes import heads
from minisa.kit import checkpoint, export
from minisa.kit.tokenizer import PATTERNS, Tokenizer, from_json, learn, to_json
from minisa.model import GPT, GPTConfig

NEEDS = "needs transformers, for this comparison only: pip install transformers"
V, L, H, G, C, M = 300, 3, 4, 2, 32, 48

def tokenizer(text):
    return Tokenizer(learn(text.read_text(), V))

def tensors(tied=False):
    """Random weights under their names in a Llama, gains of norms far from 1."""
    torch.manual_seed(0)
    D, shapes = C // H, {"model.embed_tokens": (V, C), "model.norm": (C,)}
    if not tied:
        shapes["lm_head"] = (V, C)
    for i in range(L):
        at = f"model.layers.{i}."
        shapes |= {f"{at}input_layernorm": (C,), f"{at}post_attention_layernorm": (C,),
                   f"{at}self_attn.q_proj": (C, C), f"{at}self_attn.k_proj": (G * D, C),
                   f"{at}self_attn.v_proj": (G * D, C), f"{at}self_attn.o_proj": (C, C),
                   f"{at}mlp.gate_proj": (M, C), f"{at}mlp.up_proj": (M, C), f"{at}mlp.down_proj": (C, M)}
    gains = {name: 1 + 0.3 * torch.randn(shape) for name, shape in shapes.items() if len(shape) == 1}
    matrices = {name: torch.randn(shape) / shape[1]**0.5 for name, shape in shapes.items() if len(shape) == 2}
    return {f"{name}.weight": weight for name, weight in (gains | matrices).items()}

def plain_llama(w, ids, eps, base):
    """Llama as Hugging Face computes it: number i of a head turns with number i + D/2; float64."""
    w, D, T = {name: t.double() for name, t in w.items()}, C // H, len(ids)
    angle = torch.outer(torch.arange(T).double(), base ** (-torch.arange(0, D, 2).double() / D))

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * w[name + ".weight"]

    def turned(x):                                              # (T, D)
        a, b = x[:, :D // 2], x[:, D // 2:]
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), 1)

    x, mask = w["model.embed_tokens.weight"][ids], torch.full((T, T), -torch.inf).triu(1).double()
    for i in range(L):
        at = f"model.layers.{i}."
        h = norm(x, f"{at}input_layernorm")
        q, k, v = (h @ w[f"{at}self_attn.{name}_proj.weight"].T for name in "qkv")
        y = []
        for head in range(H):
            own, group = slice(head * D, head * D + D), slice(head // (H // G) * D, head // (H // G) * D + D)
            P = (turned(q[:, own]) @ turned(k[:, group]).T / D**0.5 + mask).softmax(-1)
            y.append(P @ v[:, group])
        x = x + torch.cat(y, 1) @ w[f"{at}self_attn.o_proj.weight"].T
        h = norm(x, f"{at}post_attention_layernorm")
        gate, up = (h @ w[f"{at}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (F.silu(gate) * up) @ w[f"{at}mlp.down_proj.weight"].T
    return norm(x, "model.norm") @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T

FIELDS = {"model_type": "llama", "vocab_size": V, "hidden_size": C, "intermediate_size": M,
          "num_hidden_layers": L, "num_attention_heads": H, "num_key_value_heads": G,
          "max_position_embeddings": 64, "rope_theta": 5000.0, "is_llama_config": True,
          "rope_interleaved": False, "transformers_version": "4.42.3"}

def write(folder, w, text, fields=FIELDS, shards=1, tied=False):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**fields, "tie_word_embeddings": tied}))
    (folder / "tokenizer.json").write_text(json.dumps(to_json(tokenizer(text))))
    if shards == 1:
        safetensors.torch.save_file(w, folder / "model.safetensors")
        return folder
    parts = [dict(list(w.items())[n::shards]) for n in range(shards)]
    names = [f"model-{n + 1:05d}-of-{shards:05d}.safetensors" for n in range(shards)]
    for name, part in zip(names, parts):
        safetensors.torch.save_file(part, folder / name)
    where = {tensor: name for name, part in zip(names, parts) for tensor in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder

@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("rope", [{"rope_theta": 5000.0}, {"rope_theta": 5000}, {
    "rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}], ids=str)
def test_a_folder_computes_what_llama_computes(tmp_path, text, tied, shards, rope):
    w = tensors(tied)
    fields = {name: value for name, value in {**FIELDS, **rope}.items() if value is not None}
    model, read, info = minisa.load(write(tmp_path / "x", w, text, fields, shards, tied))
    ids = torch.randint(V, (12,))
    expected = plain_llama(w, ids, 1e-6, 5000.0)                # the default of a LlamaConfig
    torch.testing.assert_close(model(ids[None])[0][0].double(), expected, atol=1e-4, rtol=1e-4)
    assert read.encode("To be") == tokenizer(text).encode("To be") and info == checkpoint.UNKNOWN

@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_numbers_of_half_the_width_are_read(tmp_path, text, dtype):
    w = {name: t.to(dtype) for name, t in tensors().items()}
    model, _, _ = minisa.load(write(tmp_path / "x", w, text))
    ids = torch.randint(V, (12,))
    expected = plain_llama(w, ids, 1e-6, 5000.0)
    torch.testing.assert_close(model(ids[None])[0][0].double(), expected, atol=1e-4, rtol=1e-4)

def test_a_folder_is_sampled_shared_and_changed_by_an_axis(tmp_path, text, run, monkeypatch):
    import csv

    from minisa.kit import data
    monkeypatch.setattr(data, "data_folder", lambda: tmp_path / "data")
    monkeypatch.setattr(data.shakespeare, "prepare", lambda folder: (text, text))       # and no download
    write(tmp_path / "x", tensors(), text)
    status, out, err = run(sample.main, "x", "--prompt=To be", "--max_new_tokens=5", "--share=1-2",
                           "--eval_tokens=64", "--csv=bill.csv")
    assert status == 0 and "weights 1-2" in out and "they agree" in out, err
    rows, plays = (tmp_path / "bill.csv").read_text().splitlines(), data.tokenize(tokenizer=tokenizer(text))
    for row, share in zip(csv.DictReader(rows), ("", "1-2"), strict=True):
        model, _, _ = minisa.load(tmp_path / "x", share)
        assert float(row["val_bpb"]) == pytest.approx(plays.evaluate(model, 64)[1])
    status, _, err = run(heads.main, "x", "--share=1-2", "--heads=mix", f"--text={text}", "--out=mixed")
    config = json.loads((tmp_path / "mixed/config.json").read_text())
    assert status == 0 and config["model_type"] == "minisa" and config["minisa"]["parent"]["source"] == "../x"
    assert minisa.load(tmp_path / "mixed")[0].blocks[2].attn.mix.shape == (H, H)

def drop(name):
    return lambda folder: rewrite(folder, lambda w: w.pop(name))

def rewrite(folder, change):
    w = safetensors.torch.load_file(folder / "model.safetensors")
    change(w)
    safetensors.torch.save_file(w, folder / "model.safetensors")

def config(**fields):
    def change(folder):
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**content, **fields}))
    return change

def cutter(change):
    def harm(folder):
        content = json.loads((folder / "tokenizer.json").read_text())
        change(content)
        (folder / "tokenizer.json").write_text(json.dumps(content))
    return harm

REFUSED = {
    "another model": (config(model_type="mistral"), "model_type is mistral"),
    "no model": (config(model_type=None), "model_type is None"),
    "scaled RoPE": (config(rope_scaling={"rope_type": "llama3", "factor": 8.0}), "RoPE is scaled .llama3"),
    "scaled RoPE, as older files say it": (config(rope_scaling={"type": "linear"}), "RoPE is scaled .linear"),
    "scaled RoPE, as newer files say it": (config(rope_parameters={"rope_type": "yarn"}), "scaled .yarn"),
    "biases of attention": (config(attention_bias=True), "biases"),
    "biases of the MLP": (config(mlp_bias=True), "biases"),
    "another activation": (config(hidden_act="gelu"), "activation is gelu"),
    "a quantized model": (config(quantization_config={"bits": 4}), "quantized"),
    "another width of heads": (config(head_dim=16), "head_dim is 16"),
    "a tensor too few": (drop("model.layers.1.mlp.up_proj.weight"), "lacks the tensor model.layers.1.mlp.up"),
    "a norm too few": (drop("model.layers.1.input_layernorm.weight"), "lacks the tensor model.layers.1"),
    "a tensor of another shape": (config(intermediate_size=40), "gate_proj.weight has the shape"),
    "a tensor of another type": (lambda folder: rewrite(folder, lambda w: w.update({
        "model.norm.weight": w["model.norm.weight"].to(torch.int8)})), "of the type torch.int8"),
    "a bias that config.json does not tell of": (lambda folder: rewrite(folder, lambda w: w.update({
        "model.layers.0.self_attn.q_proj.bias": torch.zeros(C)})), "no place for"),
    "a tokenizer of words": (cutter(lambda content: content["model"].update(type="WordPiece")), "WordPiece"),
    "a tokenizer with bytes of last resort": (cutter(lambda content: content["model"].update(
        byte_fallback=True)), "byte-level BPE"),
    "another way to cut text": (cutter(lambda content: content.update(pre_tokenizer={
        "type": "Whitespace"})), "cuts text"),
    "a normalizer": (cutter(lambda content: content.update(normalizer={"type": "NFC"})), "byte-level BPE"),
    "a suffix of words": (cutter(lambda content: content["model"].update(end_of_word_suffix="</w>")), "BPE"),
    "merges left to chance": (cutter(lambda content: content["model"].update(dropout=0.5)), "BPE"),
    "an added token that is text": (cutter(lambda content: content["added_tokens"].append(
        {"id": V, "content": "Hello", "special": False})), "stand for text"),
    "a token that no merge makes": (cutter(lambda content: content["model"].update(
        ignore_merges=False, merges=content["model"]["merges"][:-1])), "no merge makes"),
    "a width of heads that is text": (config(head_dim="x" * 1000, num_attention_heads=2000000), "head_dim"),
    "an endless base": (config(rope_theta=10**400), "too large"),
    "whole numbers": (lambda folder: rewrite(folder, lambda w: w.update({
        "model.layers.0.mlp.up_proj.weight": torch.zeros(M, C, dtype=torch.int64)})), "type torch.int64"),
    "merges out of order": (cutter(lambda content: content["model"]["merges"].reverse()), "do not rise"),
}

@pytest.mark.parametrize("name", REFUSED)
def test_what_this_gpt_is_not_is_refused_by_name(tmp_path, text, run, name):
    harm, message = REFUSED[name]
    harm(write(tmp_path / "x", tensors(), text))
    status, _, err = run(sample.main, "x")
    assert status == 2 and re.search(message, err) and err.count("\n") == 1, err

@pytest.mark.parametrize("name", ["model-00002-of-00003.safetensors", "../x.safetensors"])
def test_a_missing_shard_is_named(tmp_path, text, run, name):
    folder = write(tmp_path / "x", tensors(), text, shards=3)
    if name.startswith(".."):
        (tmp_path / "x.safetensors").write_bytes((folder / "model-00001-of-00003.safetensors").read_bytes())
        index = folder / "model.safetensors.index.json"
        index.write_text(index.read_text().replace("model-00001-of-00003.safetensors", name))
    else:
        (folder / name).unlink()
    status, _, err = run(sample.main, "x")
    assert status == 2 and f"lacks the file {name}" in err and err.count("\n") == 1

# ---- out ----

def ours(text, **mode):
    torch.manual_seed(1)
    shape = dict(block_size=64, vocab_size=V, n_layer=L, n_head=H, n_embd=C, n_hidden=M)
    model = GPT(GPTConfig(**shape, **mode)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model

MODES = [dict(n_kv_head=G), dict(n_kv_head=G, tied=False), dict(n_kv_head=G, rope_base=777.0, norm_eps=1e-3)]

@pytest.mark.parametrize("mode", MODES, ids=str)
def test_what_is_written_is_a_llama(tmp_path, text, mode):
    model, ids = ours(text, **mode), torch.randint(V, (12,))
    checkpoint.save(tmp_path / "x", model, tokenizer(text), checkpoint.UNKNOWN)
    w = safetensors.torch.load_file(tmp_path / "x/model.safetensors")
    fields = json.loads((tmp_path / "x/config.json").read_text())
    assert fields["model_type"] == "llama" and set(tensors(model.config.tied)) == set(w)
    expected = plain_llama(w, ids, fields["rms_norm_eps"], fields["rope_theta"])
    torch.testing.assert_close(model(ids[None])[0][0].double(), expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(minisa.load(tmp_path / "x")[0](ids[None])[0], model(ids[None])[0])

def test_where_a_text_ends_is_kept(tmp_path, text, run):
    write(tmp_path / "x", tensors(), text, {**FIELDS, "bos_token_id": 5, "eos_token_id": [6, 7]})
    assert run(export.main, "x", "--out=y")[0] == 0
    checkpoint.save(tmp_path / "z", ours(text), tokenizer(text), checkpoint.UNKNOWN)
    y, z = (json.loads((tmp_path / name / "config.json").read_text()) for name in "yz")
    assert (y["bos_token_id"], y["eos_token_id"]) == (5, [6, 7]) and z["eos_token_id"] is None

def test_a_model_that_shares_does_not_say_that_it_is_a_llama(tmp_path, text):
    for n, mode in enumerate((dict(share="1-2"), dict(share="1-2", share_kind="kv"))):
        model = ours(text, **mode)
        checkpoint.save(tmp_path / str(n), model, tokenizer(text), checkpoint.UNKNOWN)
        fields = json.loads((tmp_path / f"{n}/config.json").read_text())
        assert fields["model_type"] == "minisa"
        ids = torch.randint(V, (1, 12))
        assert torch.equal(minisa.load(tmp_path / str(n))[0](ids)[0], model(ids)[0])

@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_derived_model_is_exported_whole(tmp_path, text, run, dtype):
    checkpoint.save(tmp_path / "one", ours(text, n_kv_head=G), tokenizer(text), checkpoint.UNKNOWN)
    assert run(heads.main, "one", "--share=1-2", "--heads=mix", f"--text={text}", "--out=two")[0] == 0
    status, out, err = run(export.main, "two", "--out=three", f"--dtype={dtype}")
    assert status == 0 and "wrote three, of type minisa" in out, err
    ids = torch.randint(V, (1, 12))
    two, three = (minisa.load(tmp_path / name)[0](ids)[0] for name in ("two", "three"))
    assert (two - three).abs().max() <= {"float32": 0, "float16": 0.02, "bfloat16": 0.2}[dtype]
    stored = safetensors.torch.load_file(tmp_path / "three/model.safetensors")
    assert {str(t.dtype) for t in stored.values()} == {f"torch.{dtype}"}
    status, _, err = run(export.main, "two", "--out=three")
    assert status == 2 and "--out=three: is there already" in err

def test_an_export_that_fails_leaves_nothing(tmp_path, run):
    for flags in (["none", "--out=x"], ["none"], ["none", "--out=x", "--dtype=int8"]):
        status, _, err = run(export.main, *flags)
        assert status == 2 and err.count("\n") == 1 and not (tmp_path / "x").exists()

# ---- tokenizers ----

MIXED = ("It's 1999, isn't it? We'll pay $1,234.56 — or 78%…\n\n"
         "\tdef f(x):\n        return x**2  # 4  spaces   here 5\n"
         "Ça va, Zoë? naïve façade; ГОСТ 12345; 日本語のテキスト、한국어 텍스트; العربية ١٢٣; ½ Ⅻ ²\n"
         "👩‍👩‍👧‍👦 🇫🇷 e\u0301 \u00a0 \u2003|\r\n   \n \t x\u200by  12 345   6\n"
         "<html>&amp;</html> foo_bar.baz(qux=[1, 2, 3]) ''' \"\"\" 's 'S")

@pytest.mark.parametrize("words", PATTERNS)
def test_a_tokenizer_json_gives_the_tokens_of_hugging_faces_library_and_comes_back(text, words):
    tokenizers = pytest.importorskip("tokenizers", reason=NEEDS)
    learned = learn(text.read_text() + MIXED * 3, 700)
    ours = Tokenizer([*learned, b"<|im_start|>", b"<|im_end|>"], [700, 701], words)
    content = json.loads(json.dumps(to_json(ours)))
    theirs, draw = tokenizers.Tokenizer.from_str(json.dumps(content)), random.Random(0)
    ranges = [(32, 127), (160, 0x3000), (0x1f300, 0x1f700), (32, 33), (10, 11)]
    texts = [MIXED, text.read_text()]
    texts += ["".join(chr(draw.randrange(*draw.choice(ranges))) for _ in range(300)) for _ in range(60)]
    for some in texts:
        assert theirs.encode(some).ids == ours.encode(some)
        assert theirs.decode(ours.encode(some)) == some
    assert theirs.encode("<|im_end|>").ids == [701] and 701 not in ours.encode("<|im_end|>")
    again = from_json(content)
    assert again.identity == ours.identity

def test_a_model_with_more_rows_than_tokens_is_read(text):
    content = to_json(tokenizer(text))
    more = from_json(content, V + 20)
    assert more.vocab_size == V + 20 and more.encode("To be") == tokenizer(text).encode("To be")

# ---- beside transformers ----

@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kv, dtype, size", [(4, "float32", "1GB"), (2, "bfloat16", "40KB")])
def test_a_llama_that_transformers_made_has_the_same_logits_here(tmp_path, text, tied, kv, dtype, size):
    transformers = pytest.importorskip("transformers", reason=NEEDS)
    torch.manual_seed(2)
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=C, intermediate_size=M, num_hidden_layers=L, num_attention_heads=H,
        num_key_value_heads=kv, max_position_embeddings=64, tie_word_embeddings=tied)
    theirs = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(0.15 * torch.randn_like(p) + (p.dim() == 1))
    theirs.to(getattr(torch, dtype)).save_pretrained(tmp_path / "x", max_shard_size=size)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "x", dtype=torch.float32).eval()
    assert (size == "1GB") == (tmp_path / "x/model.safetensors").exists()
    (tmp_path / "x/tokenizer.json").write_text(json.dumps(to_json(tokenizer(text))))
    model, _, _ = minisa.load(tmp_path / "x")
    ids = torch.randint(V, (2, 40))
    with torch.inference_mode():
        assert (model(ids)[0] - theirs(ids).logits).abs().max() < 1e-4

@pytest.mark.parametrize("mode", [{}, dict(n_kv_head=G), dict(n_kv_head=1, tied=False)], ids=str)
def test_what_we_write_opens_in_transformers_with_equal_logits_and_ids(tmp_path, text, mode):
    transformers = pytest.importorskip("transformers", reason=NEEDS)
    model, own = ours(text, **mode), tokenizer(text)
    checkpoint.save(tmp_path / "x", model, own, checkpoint.UNKNOWN)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "x").eval()
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "x")
    ids = torch.randint(V, (2, 40))
    with torch.inference_mode():
        assert (model(ids)[0] - theirs(ids).logits).abs().max() < 1e-4
    for some in (MIXED, text.read_text()):
        assert loaded(some)["input_ids"] == own.encode(some)
        assert loaded.decode(own.encode(some)) == some
    assert np.isclose(theirs.config.rms_norm_eps, 1e-5)

@pytest.mark.parametrize("share", ["weights", "kv"])
def test_a_model_that_shares_is_refused_by_transformers(tmp_path, text, share):
    transformers = pytest.importorskip("transformers", reason=NEEDS)
    model = ours(text, share="1-2", share_kind=share)
    checkpoint.save(tmp_path / "x", model, tokenizer(text), checkpoint.UNKNOWN)
    with pytest.raises((ValueError, KeyError), match="minisa"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "x")
