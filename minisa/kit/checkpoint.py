"""Models on disk: written by training and by the axes, read by all commands.

A model is a folder, in the layout of Hugging Face's libraries:

    config.json             the fields of a LlamaConfig (minisa/kit/llama.py); ours under "minisa"
    tokenizer.json          its tokenizer, with tokenizer_config.json; a derived model has its parent's
    model.safetensors       its tensors; for a derived model, only those that differ from its parent's

Any folder of a LlamaForCausalLM can be read, and a model that is a Llama can be read by others. A model
that shares, was changed by an axis, or has a parent says model_type: minisa, so that others refuse it.

"minisa" holds share, share_kind and dropout of GPTConfig, and

    changes     what axes did to its layers: [{"by": "heads", "settings": {...}}, …], in order
    parent      None, or {"source", "sha256"} of the model that it was derived from

What changes while a model is trained (its step, its loss) is in the head of model.safetensors, beside a
sha256 of config.json and the tensors. So renaming one file is enough to save a model again.
"""

import argparse
import hashlib
import importlib
import importlib.util
import json
import os
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import safetensors.torch
import torch
from torch.overrides import TorchFunctionMode

from minisa.kit import llama, pretrained
from minisa.kit.files import check, read_file, reading, write_file, write_folder
from minisa.kit.machine import refuse_too_much
from minisa.kit.tokenizer import Tokenizer, from_json, to_json
from minisa.model import GPT, GPTConfig, sharing_kind

INFO = {"step": int | None, "val_loss": float | None, "val_bpb": float | None, "data": str | None,
        "data_digest": str | None, "seconds": float | None}
UNKNOWN = dict.fromkeys(INFO)
OURS = {"share": str, "share_kind": str, "dropout": float, "changes": list, "parent": dict | None}
DEFAULTS = {"share": "", "share_kind": "weights", "dropout": 0.0, "changes": [], "parent": None}
PARENT = {"source": str, "sha256": str}
CONFIG, TOKENIZER, TENSORS = "config.json", "tokenizer.json", "model.safetensors"
FILES = CONFIG, TOKENIZER, "tokenizer_config.json", TENSORS
LONGEST_CHAIN = 64      # models derived from each other
KIND, FIX = "not a model of this kind", "take another, or make it again"

# ---- changes that axes make ----

def change(model, by, **settings):
    """Let minisa/axes/BY.py replace layers of a model, and record the change. → the model

    That file's rebuild(model, **settings) puts new layers in their place, without numbers. Raises
    ValueError if there is no such file, or the settings do not fit.
    """
    name = f"minisa.axes.{by}"
    if not str(by).isidentifier() or importlib.util.find_spec(name) is None:
        raise ValueError(f"it was changed by '{by}', which this version of minisa does not have")
    importlib.import_module(name).rebuild(model, **settings)
    model.changes = [*changes(model), {"by": by, "settings": settings}]
    return model

def kind(name):
    """A type for a flag: what a span shares, a kind of minisa/model.py or of an axis."""
    try:
        return sharing_kind(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("--share_kind=")) from None

def add_share_kind(parser):
    parser.flag("share_kind", kind, "weights", "what a span shares: weights (Shared Attention), kv "
                "(Cross-Layer Attention) or the NAME of a kind in minisa/axes")

def changes(model):
    return getattr(model, "changes", [])

def described(model):
    """→ columns of a table of results: what a model shares, and what axes changed, in words."""
    steps = []
    for change in changes(model):
        settings = [value for value in change["settings"].values() if isinstance(value, (str, int))]
        steps.append(" ".join(map(str, [change["by"], *settings])))
    config = model.config
    return {"share": config.share, "share_kind": config.share and config.share_kind,
            "changes": ", ".join(steps)}

class Unfilled(TorchFunctionMode):
    """Within it, nn.init fills nothing. (On the meta device there is nothing to fill, but to draw
    from a normal distribution there makes torch import its compiler, for a second or more.)"""
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"]
        return function(*args, **kwargs or {})

def empty(config, changed=()):
    """A model on the meta device, without numbers."""
    with torch.device("meta"), Unfilled():
        model = GPT(config)
        for step in changed:
            change(model, step["by"], **step["settings"])
    return model

def layers(model):
    """→ the class and the widths of each layer: what a change that only sets numbers leaves alone."""
    attns = [block.attn for block in model.blocks]
    return [(type(attn), attn.widths, attn.out.in_features) for attn in attns]

def reconfigure(model, **fields):
    """A model → one with other fields of GPTConfig, such as share="1-3", in eval mode. Zero-shot:
    the same numbers in the same memory, except the q, k or v of layers that now borrow them.

    Raises ValueError if a layer lacks what it must now compute itself.
    """
    config = replace(model.config, **fields)
    otherwise = config.spans != model.config.spans or config.share_kind != model.config.share_kind
    if changes(model) and otherwise and layers(model) != layers(empty(model.config)):
        raise ValueError(f"--share={config.share}: the layers of this model were changed already, "
                         f"by {changes(model)[-1]['by']}; share the model that it came from")
    if model.config.share and config.share_kind != model.config.share_kind:
        raise ValueError(f"--share_kind={config.share_kind}: the model was trained with "
                         f"--share={model.config.share}, of the kind {model.config.share_kind}")
    new, state = empty(config, changes(model)), model.state_dict()
    for layer, (old, block) in enumerate(zip(model.blocks, new.blocks)):
        lacks = set(block.attn.makes) - set(old.attn.makes)
        if lacks:
            lacks, before = " ".join(sorted(lacks)), model.config.share
            raise ValueError(f"--share={config.share}: layer {layer} has no {lacks} of its own, "
                             f"as the model was trained with --share={before}")
        if old.attn.widths != block.attn.widths:
            name = f"blocks.{layer}.attn.qkv.weight"
            parts = zip(state[name].split(old.attn.widths), block.attn.widths)
            state[name] = torch.cat([rows[:n] for rows, n in parts])
    new.load_state_dict(state, assign=True)
    return new.eval()

# ---- saving ----

def save(folder, model, tokenizer, info):
    """Write a complete model. info: a dict of what is known about it, as INFO. Raises OSError."""
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
                "model_max_length": model.config.block_size}
    files = {TOKENIZER: as_json(to_json(tokenizer)), "tokenizer_config.json": as_json(settings)}
    write(folder, files, model, info)

def derive(folder, model, parent, info):
    """Write only what differs from the parent, a model that load() returned. Raises OSError."""
    places = {name: t.data_ptr() for name, t in parent.state_dict().items()}
    state = model.state_dict()
    own = [name for name in state if state[name].data_ptr() != places.get(name)]
    source, sha256 = parent.origin
    if source != "smollm2":
        source = relative(source, folder)
    model.ends = getattr(parent, "ends", {})
    info = {**info, "val_loss": None, "val_bpb": None}
    write(folder, {}, model, info, own, {"source": source, "sha256": sha256})

def write(folder, files, model, info, own=None, parent=None):
    """Write a model's folder. files: {name: bytes} of its tokenizer. own: the names of the tensors to
    write, None for all."""
    folder, config = Path(folder), model.config
    fields = {**llama.write_config(config), **getattr(model, "ends", {})}
    fields["torch_dtype"] = str(model.embed.weight.dtype).removeprefix("torch.")
    if config.share or changes(model) or parent:
        fields |= {"model_type": "minisa", "architectures": ["MinisaForCausalLM"]}
    fields["minisa"] = {"share": config.share, "share_kind": config.share_kind, "dropout": config.dropout,
                        "changes": changes(model), "parent": parent}
    if info["data"]:
        info = {**info, "data": relative(info["data"], folder)}
    files[CONFIG] = as_json(fields)
    files[TENSORS] = pack(llama.write_tensors(model, own), fields, info)
    if folder.exists():
        for name, data in files.items():                    # the tensors last
            write_file(folder / name, data)
    else:
        write_folder(folder, files)

def relative(path, folder):
    """A path as it is stored in a folder, so that both can be moved together."""
    path = Path(path).resolve()
    try:
        stored = Path(os.path.relpath(path, Path(folder).resolve())).as_posix()
    except ValueError:                                      # another drive of Windows
        return str(path)
    return f"./{stored}" if stored == "smollm2" else stored         # a folder, not the download

def as_json(content):
    return json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n"

# ---- tensors, what is known of them, and a hash ----

def pack(tensors, config, known):
    """Tensors, and two dicts that JSON can hold → the bytes of a .safetensors file with a hash of the
    tensors, of the config that they belong to, and of what is known about them."""
    metadata = {"format": "pt", "minisa": json.dumps(known)}
    metadata["model"] = digest(config, tensors)
    metadata["sha256"] = digest(metadata["minisa"], {}, metadata["model"])
    return safetensors.torch.save(tensors, metadata)

def unpack(data, config=None):
    """What pack() returned → tensors, what is known about them, and a hash of tensors and config. For a
    file of another program, nothing is known. Raises ValueError if the file was altered."""
    tensors = safetensors.torch.load(data)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + length])
    metadata = header.get("__metadata__") or {}
    sha256 = digest(config, tensors)
    if "minisa" not in metadata:
        return tensors, {}, sha256
    text = metadata["minisa"]
    known = digest(text, {}, sha256)
    if metadata["model"] != sha256 or metadata["sha256"] != known:
        raise ValueError("its tensors are not as they were written")
    return tensors, json.loads(text), sha256

def digest(config, tensors, *more):
    """A hash of what JSON can hold, of tensors, and of texts."""
    text = json.dumps([config, more], sort_keys=True)
    h = hashlib.sha256(text.encode())
    for name, t in sorted(tensors.items()):
        h.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        h.update(t.flatten().view(torch.uint8).numpy())
    return h.hexdigest()

def read_large(file):
    """→ the bytes of a file of tensors. Raises ValueError if memory would not hold them twice."""
    size = os.stat(file).st_size
    refuse_too_much(2 * size, str(file))
    return read_file(file, size)

# ---- loading ----

@dataclass
class Stored:
    """A model as it was read, before anything is built from it."""
    source: str             # a folder, a .gguf file, or smollm2
    fields: dict            # of config.json
    tensors: dict           # under Llama's names
    tokenizer: dict | None  # the content of tokenizer.json; None: its parent's
    sha256: str             # of its config and tensors
    info: dict              # as INFO
    ours: dict              # as OURS

def load(source: str | Path, share: str | None = None, share_kind: str = "weights",
         device: str | torch.device = "cpu",
         dtype: torch.dtype = torch.float32) -> tuple[GPT, Tokenizer, dict]:
    """A model → model in eval mode, tokenizer, info (a dict; its values are None where not known).

    source: the folder of a run, or of any LlamaForCausalLM; a .gguf file of one; or "smollm2", which
    is downloaded once. share: spans, such as "1-3", that are to share although the model was trained
    without sharing (zero-shot); share_kind: see sharing_kind() of model.py. Raises
    ValueError if the source cannot be read, or cannot share that way.
    """
    chain = ancestry(source)
    info = dict(chain[0].info)
    model = tokenizer = None
    while chain:                                            # the oldest first
        model, tokenizer = build(chain.pop(), model, tokenizer, device, dtype)
    if share:
        model = reconfigure(model, share=share, share_kind=share_kind)
        info |= {"val_loss": None, "val_bpb": None}         # these were without sharing
    return model, tokenizer, info

def ancestry(source):
    """→ the Stored model, the one that it was derived from, and so on."""
    chain = [read(source)]
    while parent := chain[-1].ours["parent"]:
        if len(chain) > LONGEST_CHAIN:
            raise ValueError(f"{source}: was derived in more than {LONGEST_CHAIN} steps; write one of those "
                             "before it whole, with python -m minisa.kit.export")
        child, at = chain[-1].source, parent["source"]
        if at != "smollm2":
            at = Path(child) / at
            if not at.exists():
                raise ValueError(f"{child}: was derived from {at}, which is missing; bring it back")
        chain.append(read(at))
    return chain

def read(source):
    """A folder, a .gguf file or smollm2 → Stored. Raises ValueError if it cannot be read."""
    if str(source) == "smollm2":
        file = pretrained.fetch()
    elif Path(source).is_dir():
        with reading(source, KIND, FIX):
            return read_folder(Path(source))
    elif Path(source).exists():
        file = source
    else:
        raise ValueError(f"{source}: no such model; train one with python train.py, or give a .gguf file, a "
                         "folder with config.json and model.safetensors, or smollm2")
    fields, tensors, tokenizer, sha256 = pretrained.read_gguf(file)
    return Stored(str(source), fields, tensors, tokenizer, sha256, UNKNOWN, DEFAULTS)

def read_folder(folder):
    fields = json.loads(read_file(folder / CONFIG))
    ours = {**DEFAULTS, **fields.get("minisa", {})}
    check(ours, OURS, "minisa")
    if ours["parent"]:
        check(ours["parent"], PARENT, "minisa.parent")
    tensors, known, hashes = {}, {}, []
    for file in tensor_files(folder):
        found, known, sha256 = unpack(read_large(file), fields)
        tensors |= found
        hashes.append(sha256)
    info = {**UNKNOWN, **known}
    check(info, INFO, "what is known of it")
    if info["data"]:
        info["data"] = str(folder / info["data"])
    tokenizer = None if ours["parent"] else json.loads(read_file(folder / TOKENIZER))
    sha256 = hashes[0] if len(hashes) == 1 else digest(hashes, {})
    return Stored(str(folder), fields, tensors, tokenizer, sha256, info, ours)

def tensor_files(folder):
    """The files in which the tensors of a folder are."""
    index = folder / f"{TENSORS}.index.json"
    if (folder / TENSORS).exists() or not index.exists():
        return [folder / TENSORS]
    content = json.loads(read_file(index))
    shards = sorted(set(content["weight_map"].values()))
    for name in shards:
        if Path(name).name != name or not (folder / name).is_file():
            raise ValueError(f"lacks the file {name}")
    return [folder / name for name in shards]

def build(stored, parent, tokenizer, device, dtype):
    """A Stored model, and its parent if it has one → model, tokenizer."""
    ours = stored.ours
    if parent and ours["parent"]["sha256"] != parent.origin[1]:
        raise ValueError(f"{stored.source}: was derived from {ours['parent']['source']}, which has changed "
                         "since; derive it again")
    checked = partial(reading, stored.source, KIND, FIX)
    with checked():
        fields = llama.read_config(stored.fields)
    with checked(passes=[AttributeError]):                  # an axis has a mistake, not the file
        sharing = {name: ours[name] for name in ("share", "share_kind", "dropout")}
        config = GPTConfig(**fields, **sharing)
        model = empty(config, ours["changes"])
        inherited = parent.state_dict() if parent else {}
        state = llama.read_tensors(stored.tensors, model, inherited, dtype)
        state = {name: t.to(device) for name, t in state.items()}
        model.load_state_dict(state, assign=True)
        for block in model.blocks:
            block.attn.check()                              # an axis knows what its numbers must be
    with checked():
        if stored.tokenizer:
            tokenizer = from_json(stored.tokenizer, model.config.vocab_size)
        if tokenizer.vocab_size != model.config.vocab_size:
            raise ValueError(f"its tokenizer has {tokenizer.vocab_size} tokens")
    model.origin = stored.source, stored.sha256
    model.ends = {name: stored.fields[name] for name in llama.ENDS if name in stored.fields}
    return model.eval(), tokenizer

# ---- the state of a training run ----

def save_training(file, model, tokenizer, optimizer, **more):
    """Write what --resume needs: a model, its tokenizer, the state of its optimizer, and `more` that
    JSON can hold, in one file."""
    tensors = {f"model.{name}": t for name, t in model.state_dict().items()}
    for i, parts in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{name}": t for name, t in parts.items()}
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    known = {"config": asdict(model.config), "changes": changes(model), "tokenizer": to_json(tokenizer),
             **more}
    write_file(file, pack(tensors, None, known))

def read_training(file, kinds):
    """What save_training() wrote → the model, the tokenizer, the optimizer's tensors as {"0.exp_avg": t,
    …}, and the rest. kinds: of some dicts in the rest what files.check() needs. Raises ValueError."""
    with reading(file, "not the state of a training run", "start a new run"):
        tensors, known, _ = unpack(read_large(file))
        for name in kinds:
            check(known[name], kinds[name], name)
        config = GPTConfig(**known.pop("config"))
        model = empty(config, known.pop("changes"))
        parts = {"model": {}, "optimizer": {}}
        for name, t in tensors.items():
            kind, _, name = name.partition(".")
            parts[kind][name] = t
        state = llama.take_all(parts["model"], model.state_dict())
        model.load_state_dict(state, assign=True)
        return model, from_json(known.pop("tokenizer")), parts["optimizer"], known
