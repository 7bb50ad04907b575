"""Models on disk: saved by training, derived from other models, loaded by everyone.

A model is a folder with a file model.pt:

    config      the fields of its GPTConfig
    changes     what axes/ did to its layers: [{"by": "heads", "settings": {...}}, …], in order
    model       its tensors; of a derived model just those that differ from its parent's
    parent      None, or {"source", "size", "sha256"} of the file that it was derived from
    tokenizer   None in a derived model, which has its parent's
    info        what is known of it: step, val_loss, val_bpb, data, seconds

Files hold tensors, numbers and text only: torch.load(weights_only=True) runs nothing of them. What
they hold is checked before it is used: see SHAPE, read_parts() and build().
"""

import importlib
import importlib.util
import io
import os
import warnings
import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode

from minisa import pretrained
from minisa.files import check, open_file, sha256, write_file
from minisa.model import GPT, GPTConfig
from minisa.tokenizer import Tokenizer

UNKNOWN = dict.fromkeys(("step", "val_loss", "val_bpb", "data", "seconds"))
SHAPE = {                                               # of a file, as files.check() takes it
    "config": GPTConfig.__annotations__,
    "changes": [{"by": str, "settings": dict}],
    "model": dict,
    "parent": dict | None,
    "tokenizer": dict | None,
    "info": {"step": int | None, "val_loss": float | None, "val_bpb": float | None,
             "data": str | None, "seconds": float | None},
}

# ---- changes that axes make ----

def change(model, by, **settings):
    """Let minisa/axes/BY.py rebuild the layers of a model, in place, and record it. → the model

    That file's rebuild(model, **settings) gives the layers their new classes and shapes, not their
    numbers. Raises ValueError if there is no such file, or the settings do not fit.
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

def save(path, model, tokenizer, info, **more):
    """Write a model whole. info: a dict of numbers and text. more: other tensors, numbers, text."""
    known = {"tokenizer": tokenizer.description, "parent": None}
    write(path, model, model.state_dict(), info, **known, **more)

def derive(folder, model, parent, source, info):
    """Write a model as what differs from its parent, a model that was loaded from `source`."""
    known = {name: t.data_ptr() for name, t in parent.state_dict().items()}
    own = {name: t for name, t in model.state_dict().items() if t.data_ptr() != known.get(name)}
    file = source_file(source)
    named = os.path.relpath(file.resolve(), Path(folder).resolve())
    named = source if source == "smollm2" else named
    info = {**info, "val_loss": None, "val_bpb": None}
    write(Path(folder) / "model.pt", model, own, info, tokenizer=None,
          parent={"source": str(named), "size": file.stat().st_size, "sha256": sha256(file)})

def write(path, model, tensors, info, **more):
    tensors = {name: t.contiguous() for name, t in tensors.items()}
    tensors = {name: t.clone() if t.nbytes < t.untyped_storage().nbytes() else t
               for name, t in tensors.items()}      # a part of a tensor would be saved as the whole
    state = {"config": asdict(model.config), "changes": changes(model), "model": tensors}
    buffer = io.BytesIO()
    torch.save({**state, "info": info, **more}, buffer)
    write_file(path, buffer.getbuffer())

# ---- loading ----

def source_file(source):
    """A source, as load() takes it → its file. Raises ValueError if it is not there."""
    if str(source) == "smollm2":
        return pretrained.fetch()
    path = Path(source)
    path = path / "model.pt" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{path}: no such model; train one with python train.py, "
                         "or give a .gguf file or smollm2")
    return path

def read(path, more=None):
    """The dict in a file that save() or derive() wrote, on the CPU. more: the shapes of what was
    saved besides. Raises ValueError if it is damaged, or another shape than SHAPE says."""
    try:
        with open_file(path) as file, zipfile.ZipFile(file) as parts:
            damaged = parts.testzip()                   # compares the CRC-32 of each
            if damaged or any(part.compress_type for part in parts.infolist()):
                raise ValueError(f"{damaged} is not as it was written")
        with warnings.catch_warnings(action="ignore"):
            state = torch.load(path, "cpu", weights_only=True, mmap=True)   # stays inside the file
        shape = {**SHAPE, **(more or {})}
        missing = shape.keys() - state.keys()
        for name in shape.keys() - missing:
            check(state[name], shape[name], name)
        for name in ("model", "optimizer"):
            state[name] = copies(state.get(name, {}), os.path.getsize(path))
    except OSError:
        raise
    except Exception as error:                          # torch raises many kinds for a damaged file
        ours = type(error) is ValueError
        raise ValueError(f"{path}: damaged, or no checkpoint of minisa "
                         f"({error if ours else type(error).__name__}); make it again") from None
    if missing:
        raise ValueError(f"{path}: no checkpoint of minisa, it lacks {', '.join(sorted(missing))}")
    return state

def copies(tensors, most):
    """Tensors that lie in a file of `most` bytes → the same in memory, if all are plain ones."""
    if not all(isinstance(t, torch.Tensor) and t.layout == torch.strided and t.device.type == "cpu"
               and t.is_contiguous() for t in tensors.values()):
        raise ValueError("not plain tensors")
    if sum(t.nbytes for t in tensors.values()) > most:
        raise ValueError("tensors that overlap")
    return {name: t.detach().clone() for name, t in tensors.items()}

def check_tensors(found, expected):
    """Raises ValueError unless tensors have the names, shapes and types of those that are expected,
    and finite numbers."""
    if found.keys() != expected.keys():
        raise ValueError("its tensors are not those of its config")
    for name, like in expected.items():
        t = found[name]
        if (t.shape, t.dtype) != (like.shape, like.dtype):
            raise ValueError(f"its tensor {name} does not fit its config")
        if not t.sum().isfinite():
            raise ValueError(f"its tensor {name} has numbers that are not finite")

def build(path, state, device="cpu", dtype=torch.float32):
    """What read() gave → model in eval mode, tokenizer, info. Raises ValueError if it is not what
    its config says, or its parent is missing or another."""
    inherited, parent = {}, state["parent"]
    if parent:
        check(parent, {"source": str, "size": int, "sha256": str}, f"{path}: its parent")
        source = parent["source"]
        source = source if source == "smollm2" else Path(path).parent / source
        if source != "smollm2" and not Path(source).is_file():
            raise ValueError(f"{path}: was derived from {source}, which is missing; bring it back")
        file = source_file(source)
        if file.stat().st_size != parent["size"] or sha256(file) != parent["sha256"]:
            raise ValueError(f"{path}: was derived from {source}, which has changed since; "
                             "derive it again")
        above, tokenizer, _ = load(source, device=device, dtype=dtype)
        inherited = above.state_dict()
    try:
        config = GPTConfig(**state["config"])
        tokenizer = tokenizer if parent else Tokenizer.load(state["tokenizer"])
        if tokenizer.vocab_size != config.vocab_size:
            raise ValueError(f"its tokenizer has {tokenizer.vocab_size} tokens")
        model = fill(empty(config, state["changes"]), state["model"], inherited, device, dtype)
    except (ValueError, RuntimeError, LookupError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: damaged, or of another version of minisa ({reason}); "
                         "make it again") from None
    return model, tokenizer, state["info"]

def fill(model, tensors, inherited, device, dtype):
    """Give a model of empty() its numbers: tensors from a file, and those that are inherited."""
    whole = {name: t for name, t in inherited.items() if name not in tensors}
    expected = model.state_dict()
    check_tensors(tensors, {name: t for name, t in expected.items() if name not in whole})
    for name, t in tensors.items():
        whole[name] = t.to(device, dtype if t.is_floating_point() else None)
    model.load_state_dict({name: whole[name] for name in expected}, assign=True)
    for block in model.blocks:
        if hasattr(block.attn, "check"):                # an axis knows what its numbers must be
            block.attn.check()
    logits, _ = model.eval()(torch.zeros(1, 1, dtype=torch.long, device=device))
    if not logits.isfinite().all():
        raise ValueError("what it computes is not finite")
    return model

def load(source, share=None, share_kind="weights", device="cpu", dtype=torch.float32):
    """A model → model in eval mode, tokenizer, info (a dict; its values are None where not known).

    source: a run's or model's folder, a .gguf file of a model of the Llama architecture, or
    "smollm2", which is downloaded once. share: spans that are to share though the weights were
    trained without (zero-shot), as "1-3"; share_kind: "weights" or "kv". Raises ValueError if the
    source cannot be read, or cannot share that way.
    """
    path = source_file(source)
    if path.suffix == ".gguf":
        tensors, config, tokenizer = pretrained.load_gguf(path)
        try:
            model, info = fill(empty(config), tensors, {}, device, dtype), dict(UNKNOWN)
        except ValueError as error:
            raise ValueError(f"{path}: {error}; download it again") from None
    else:
        model, tokenizer, info = build(path, read(path), device, dtype)
    if share:
        model = reconfigure(model, share=share, share_kind=share_kind)
        info = {**info, "val_loss": None, "val_bpb": None}      # these were without sharing
    return model, tokenizer, info
