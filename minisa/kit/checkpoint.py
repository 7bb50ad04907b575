"""Models on disk: written by training and by the axes, read by everyone.

A model is a folder, as Hugging Face's libraries have it:

    config.json             the fields of a LlamaConfig (minisa/kit/llama.py); ours under "minisa"
    model.safetensors       its tensors; of a derived model just those that differ from its parent's
    tokenizer.json          its tokenizer, with tokenizer_config.json; a derived model has its parent's

Any folder of a LlamaForCausalLM can be read, and what is a Llama can be read by others. A model that
shares, was changed by an axis, or has a parent, says model_type: minisa, so that others refuse it.

Under "minisa" stand share, share_kind and dropout of GPTConfig, and

    changes     what axes/ did to its layers: [{"by": "heads", "settings": {...}}, …], in order
    parent      None, or {"source", "sha256"} of the model that it was derived from: see identity()
    states      {sha256 of model.safetensors: what is known of it: step, val_loss, data, …}

The tensors are renamed into place between two versions of config.json: the first knows the old
tensors and the new, the second the new. So at every moment the folder is whole.
"""

import hashlib
import importlib
import importlib.util
import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import safetensors.torch
import torch
from torch.overrides import TorchFunctionMode

from minisa.kit import llama, pretrained
from minisa.kit.files import check, read_file, refuse_too_much, write_file
from minisa.kit.llama import Refused
from minisa.kit.tokenizer import Tokenizer, from_json, to_json
from minisa.model import GPT, GPTConfig

INFO = {"step": int | None, "val_loss": float | None, "val_bpb": float | None, "data": str | None,
        "data_digest": str | None, "seconds": float | None}
UNKNOWN = dict.fromkeys(INFO)
OURS = {"share": str, "share_kind": str, "dropout": float, "changes": [{"by": str, "settings": dict}],
        "parent": dict | None, "states": dict}              # under "minisa", as files.check() takes it
DEFAULTS = {"share": "", "share_kind": "weights", "dropout": 0.0, "changes": [], "parent": None,
            "states": {}}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
CONFIG, TENSORS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
FILES = CONFIG, TENSORS, TOKENIZER, "tokenizer_config.json"     # of a model; the first makes it one
LONGEST_CHAIN = 64      # models derived from each other
# what a file can raise that is not as it should be
DAMAGE = ValueError, RuntimeError, LookupError, TypeError, AttributeError, RecursionError

# ---- changes that axes make ----

def change(model, by, **settings):
    """Let minisa/axes/BY.py replace layers of a model, and record it. → the model

    That file's rebuild(model, **settings) puts new layers in their place, without numbers. Raises
    ValueError if there is no such file, or the settings do not fit.
    """
    name = f"minisa.axes.{by}"
    if not str(by).isidentifier() or importlib.util.find_spec(name) is None:
        raise ValueError(f"it was changed by '{by}', which this version of minisa does not have")
    importlib.import_module(name).rebuild(model, **settings)
    model.changes = [*changes(model), {"by": by, "settings": settings}]
    return model

def changes(model):
    return getattr(model, "changes", [])

class Unfilled(TorchFunctionMode):
    """Within it, nn.init fills nothing. (On the meta device there is nothing to fill, but to draw
    from a normal distribution there makes torch import its compiler, for a second or more.)"""
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"]
        return function(*args, **kwargs or {})

def empty(config, changed=()):
    """A model on the meta device, without numbers. Raises ValueError if it would never end."""
    if config.n_layer > 1000:
        raise ValueError(f"n_layer={config.n_layer}: more than 1000")
    with torch.device("meta"), Unfilled():
        model = GPT(config)
        for step in changed:
            change(model, step["by"], **step["settings"])
    return model

def reconfigure(model, **fields):
    """A model → one with other fields of GPTConfig, such as share="1-3", in eval mode. Zero-shot:
    the same numbers in the same memory, but for the q, k and v of layers that now borrow some.

    Raises ValueError if a layer lacks what it must now make itself.
    """
    config = replace(model.config, **fields)
    otherwise = config.spans != model.config.spans or config.share_kind != model.config.share_kind
    if changes(model) and otherwise:
        raise ValueError(f"--share={config.share}: the layers of this model were changed already, "
                         f"by {changes(model)[-1]['by']}; share the model that it came from")
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
            state[name] = torch.cat([rows for rows, n in parts if n])
    new.load_state_dict(state, assign=True)
    return new.eval()

# ---- saving ----

def save(folder, model, tokenizer, info):
    """Write a model whole. info: a dict of what is known of it, as INFO."""
    write(folder, model, info, tokenizer=tokenizer)

def derive(folder, model, parent, info):
    """Write a model as what differs from its parent, a model that load() gave."""
    known = {name: t.data_ptr() for name, t in parent.state_dict().items()}
    own = [name for name, t in model.state_dict().items() if t.data_ptr() != known.get(name)]
    source, sha256 = parent.origin
    if source != "smollm2":
        source = relative(source, folder)
    info = {**info, "val_loss": None, "val_bpb": None}
    write(folder, model, info, own, {"source": source, "sha256": sha256})

def relative(path, folder):
    """A path as it is stored in a folder, so that both can be moved together."""
    try:
        stored = Path(os.path.relpath(Path(path).resolve(), Path(folder).resolve())).as_posix()
        return f"./{stored}" if stored == "smollm2" else stored     # a folder, not the download
    except ValueError:                                      # another drive of Windows
        return str(Path(path).resolve())

def write(folder, model, info, own=None, parent=None, tokenizer=None):
    """Write the files of a model's folder; own: the names of the tensors that are written, None for
    all."""
    folder, config = Path(folder), model.config
    fields = {**llama.write_config(config), **getattr(model, "ends", {})}
    fields["torch_dtype"] = str(model.embed.weight.dtype).removeprefix("torch.")
    if config.share or changes(model) or parent:
        fields |= {"model_type": "minisa", "architectures": ["MinisaForCausalLM"]}
    if info["data"]:
        info = {**info, "data": relative(info["data"], folder)}
    data = safetensors.torch.save(llama.write_tensors(model, own), {"format": "pt"})
    sha256 = hashlib.sha256(data).hexdigest()
    ours = {"share": config.share, "share_kind": config.share_kind, "dropout": config.dropout,
            "changes": changes(model), "parent": parent, "states": {sha256: info}}
    if tokenizer:
        content = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
                   "model_max_length": config.block_size}
        write_json(folder / TOKENIZER, to_json(tokenizer))
        write_json(folder / FILES[3], content)
    write_json(folder / CONFIG, {**fields, "minisa": {**ours, "states": {
        **former_states(folder), sha256: info}}})
    write_file(folder / TENSORS, data)
    write_json(folder / CONFIG, {**fields, "minisa": ours})

def refuse_taken(folder):
    """Raises ValueError if a model, or a file that would be in its way, is in a folder that is given as
    --out. What a killed command of minisa left there is no model: it has no tensors yet."""
    folder = Path(folder)
    taken = [name for name in FILES if os.path.lexists(folder / name)]
    if taken and ((folder / TENSORS).exists() or not former_states(folder)):
        raise ValueError(f"--out={folder}: holds a model already ({taken[0]}); delete it, or name another")

def former_states(folder):
    """What is known of the model that is in a folder, if any."""
    try:
        states = json.loads(read_file(folder / CONFIG))["minisa"]["states"]
        return states if isinstance(states, dict) else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}

def write_json(path, content):
    write_file(path, json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n")

# ---- loading ----

def load(source, share=None, share_kind="weights", device="cpu", dtype=torch.float32):
    """A model → model in eval mode, tokenizer, info (a dict; its values are None where not known).

    source: the folder of a run, or of any LlamaForCausalLM; a .gguf file of one; or "smollm2", which
    is downloaded once. share: spans that are to share though the weights were trained without
    (zero-shot), as "1-3"; share_kind: "weights" or "kv". Raises ValueError if the source cannot be
    read, or cannot share that way.
    """
    chain, at, seen = [], source, set()                     # from the model to its oldest ancestor
    while Path(at).is_dir() and at != "smollm2":
        here = os.stat(at)
        if (here.st_dev, here.st_ino) in seen:
            raise ValueError(f"{source}: was derived from itself; make it again")
        seen.add((here.st_dev, here.st_ino))
        chain.append(read(at))
        parent = chain[-1]["ours"]["parent"]
        if not parent:
            break
        if len(chain) > LONGEST_CHAIN:
            raise ValueError(f"{source}: was derived in more than {LONGEST_CHAIN} steps; write one of those "
                             "before it whole, with python -m minisa.kit.export")
        at = parent["source"] if parent["source"] == "smollm2" else Path(at) / parent["source"]
        if at != "smollm2" and not Path(at).exists():
            raise ValueError(f"{chain[-1]['folder']}: was derived from {at}, which is missing; bring it back")
    model = tokenizer = None
    if not chain or chain[-1]["ours"]["parent"]:
        model, tokenizer = load_file(at, device, dtype)
    for found in reversed(chain):
        model, tokenizer = build(found, model, tokenizer, device, dtype)
    info = dict(chain[0]["info"] if chain else UNKNOWN)
    if share:
        model = reconfigure(model, share=share, share_kind=share_kind)
        info |= {"val_loss": None, "val_bpb": None}         # these were without sharing
    return model, tokenizer, info

def load_file(source, device, dtype):
    """The model of a .gguf file, or smollm2 → model, tokenizer."""
    path = pretrained.fetch() if str(source) == "smollm2" else Path(source)
    if not path.is_file():
        raise ValueError(f"{path}: no such model; train one with python train.py, or give a .gguf file, a "
                         "folder with config.json and model.safetensors, or smollm2")
    state, config, tokenizer, sha256 = pretrained.load_gguf(path)
    model = empty(config)
    try:
        check_tensors(state, model.state_dict())
    except ValueError as error:
        raise ValueError(f"{path}: {error}; download it again") from None
    model.load_state_dict({name: t.to(device, dtype) for name, t in state.items()}, assign=True)
    model.origin = str(source), sha256
    return model.eval(), tokenizer

def read(folder):
    """The files of a model's folder → {"folder", "fields", "ours", "info", "tensors", "sha256"} (that of
    identity()). The tensors are those of which config.json holds the hash. Raises ValueError if the
    folder cannot be read."""
    folder = Path(folder)
    try:
        for _ in range(3):                                  # another program may be writing it
            fields = json.loads(read_file(folder / CONFIG))
            ours = settings_of(fields)
            raw = [read_large(file) for file in tensor_files(folder)]
            sha256 = hashlib.sha256(b"".join(raw) if len(raw) > 1 else raw[0]).hexdigest()
            if sha256 in ours["states"] or "minisa" not in fields:
                break
        else:
            raise Refused(f"{TENSORS} is not the file that {CONFIG} describes")
        tensors = {}
        for data in raw:
            tensors |= safetensors.torch.load(data)
        info = {**UNKNOWN, **ours["states"].get(sha256, {})}
        check(info, INFO, "minisa.states")
        if info["data"]:
            info["data"] = str(folder / info["data"])
        return {"folder": folder, "fields": fields, "ours": ours, "info": info, "tensors": tensors,
                "sha256": identity(fields, sha256)}
    except FileNotFoundError as error:
        raise ValueError(f"{error.filename}: no such model; train one with python train.py, or give a .gguf "
                         "file, a folder with config.json and model.safetensors, or smollm2") from None
    except OSError as error:
        raise ValueError(f"{error.filename or folder}: {error.strerror or error}") from None
    except Refused as error:
        raise ValueError(f"{folder}: damaged, or not a model of this kind ({error})") from None
    except (*DAMAGE, safetensors.SafetensorError) as error:
        raise ValueError(f"{folder}: damaged, or not a model of this kind ({one_line(error)})") from None

def identity(fields, sha256):
    """A hash of a model: its config but for what is known of it, and the sha256 of its tensors."""
    ours = {name: value for name, value in fields.get("minisa", {}).items() if name != "states"}
    text = json.dumps({**fields, "minisa": ours}, sort_keys=True)
    return hashlib.sha256(f"{text} {sha256}".encode()).hexdigest()

def read_large(file):
    """→ the bytes of a file of tensors. Raises ValueError if memory would not hold them twice."""
    size = os.stat(file).st_size
    refuse_too_much(2 * size, str(file))
    return read_file(file, size)

def one_line(error):
    return " ".join(str(error).split())[:200]

def settings_of(fields):
    """config.json → what stands under "minisa", with defaults for what is missing."""
    check(fields, dict, CONFIG)
    ours = fields.get("minisa", {})
    check(ours, dict, "minisa")
    unknown = ours.keys() - OURS.keys()
    if unknown:
        raise Refused(f"minisa.{min(unknown)} is of another version of minisa")
    ours = {**DEFAULTS, **ours}
    check(ours, OURS, "minisa")
    if ours["parent"]:
        check(ours["parent"], {"source": str, "sha256": str}, "minisa.parent")
    return ours

def tensor_files(folder):
    """The files in which the tensors of a folder are."""
    index = folder / f"{TENSORS}.index.json"
    if (folder / TENSORS).exists() or not index.exists():
        return [folder / TENSORS]
    names = json.loads(read_file(index)).get("weight_map", {})
    check(names, dict, "weight_map")
    shards = sorted({str(name) for name in names.values()})
    missing = [name for name in shards if Path(name).name != name or not (folder / name).is_file()]
    if missing or not shards:
        raise Refused(f"lacks the file {(missing or [TENSORS])[0]}")
    return [folder / name for name in shards]

def build(found, parent, tokenizer, device, dtype):
    """What read() gave, and its parent, if it has one → model, tokenizer."""
    folder, fields, ours = found["folder"], found["fields"], found["ours"]
    try:
        if parent and ours["parent"]["sha256"] != parent.origin[1]:
            raise ValueError(f"{folder}: was derived from {ours['parent']['source']}, which has changed "
                             "since; derive it again")
        shape = llama.read_config(fields)
        config = GPTConfig(**shape, **{name: ours[name] for name in ("share", "share_kind", "dropout")})
        model = empty(config, ours["changes"])
        inherited = parent.state_dict() if parent else {}
        state = llama.read_tensors(found["tensors"], model, inherited, dtype)
        model.load_state_dict({name: t.to(device) for name, t in state.items()}, assign=True)
        for block in model.blocks:
            block.attn.check()                              # an axis knows what its numbers must be
        if not parent:
            content = json.loads(read_file(folder / TOKENIZER))
            tokenizer = from_json(content, config.vocab_size)
        if tokenizer.vocab_size != config.vocab_size:
            raise Refused(f"its tokenizer has {tokenizer.vocab_size} tokens")
    except OSError as error:
        raise ValueError(f"{folder / TOKENIZER}: {error.strerror}; bring it back") from None
    except (Refused, *DAMAGE) as error:
        if str(error).startswith(f"{folder}: "):
            raise
        raise ValueError(f"{folder}: damaged, or not a model of this kind ({one_line(error)})") from None
    model.origin = str(folder), found["sha256"]
    model.ends = {name: fields[name] for name in llama.ENDS if name in fields}
    return model.eval(), tokenizer

# ---- the state of a training run ----

def save_training(file, model, tokenizer, optimizer, **more):
    """Write what --resume needs: a model, its tokenizer, the state of its optimizer, and `more` that
    JSON can hold, in one file."""
    tensors = {f"model.{name}": t for name, t in model.state_dict().items()}
    for i, parts in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{name}": t for name, t in parts.items()}
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    known = {"config": asdict(model.config), "changes": changes(model),
             "tokenizer": tokenizer.description, **more}
    text = json.dumps(known)
    data = safetensors.torch.save(tensors, {"minisa": text, "sha256": digest(text, tensors)})
    write_file(file, data)

def digest(text, tensors):
    """A hash of a text and tensors."""
    h = hashlib.sha256(text.encode())
    for name, t in sorted(tensors.items()):
        h.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        h.update(t.flatten().view(torch.uint8).numpy())
    return h.hexdigest()

def read_training(file, shape):
    """What save_training() wrote → the model, the tokenizer, the optimizer's tensors as {"0.exp_avg": t,
    …}, and the rest, which must be of this shape (as files.check() takes it). Raises ValueError."""
    try:
        data = read_large(file)
        tensors = safetensors.torch.load(data)
        head = json.loads(data[8:8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        if head.keys() != {"minisa", "sha256"} or head["sha256"] != digest(head["minisa"], tensors):
            raise ValueError("it is not as it was written")
        known = json.loads(head["minisa"])
        check(known, {"config": dict, "changes": OURS["changes"], "tokenizer": dict, **shape}, "its state")
        model = empty(GPTConfig(**known.pop("config")), known.pop("changes"))
        parts = {"model": {}, "optimizer": {}}
        for name, t in tensors.items():
            kind, _, name = name.partition(".")
            parts[kind][name] = t
        check_tensors(parts["model"], model.state_dict())
        model.load_state_dict(parts["model"], assign=True)
        return model, Tokenizer.load(known.pop("tokenizer")), parts["optimizer"], known
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror or error}") from None
    except Exception as error:                              # a damaged file can make anything fail
        raise ValueError(f"{file}: damaged, or no state of a training run ({one_line(error)}); start a new "
                         "run") from None

def check_tensors(found, expected):
    """Raises ValueError unless tensors have the names, shapes and types of those that are expected,
    and finite numbers."""
    if found.keys() != expected.keys():
        raise ValueError("its tensors are not those of its config")
    for name, like in expected.items():
        if (found[name].shape, found[name].dtype) != (like.shape, like.dtype):
            raise ValueError(f"its tensor {name} does not fit its config")
        if not found[name].sum().isfinite():
            raise ValueError(f"its tensor {name} has numbers that are not finite")
