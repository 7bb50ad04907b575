"""Models on disk: saved by training, derived from other models, loaded by everyone.

A model is a folder with a file model.pt:

    config      the fields of its GPTConfig
    changes     what axes/ did to its layers: [{"by": "heads", "settings": {...}}, …], in order
    model       its tensors; of a derived model just those that differ from its parent's
    parent      None, or {"source": …, "sha256": …} of the model that it was derived from
    tokenizer   None in a derived model, which has its parent's
    info        what is known of it: step, val_loss, val_bpb, data, seconds

Files hold tensors, numbers and text only: torch.load(weights_only=True) runs nothing of them.
"""

import importlib
import importlib.util
import io
import os
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import torch

from minisa import pretrained
from minisa.files import sha256, write_file
from minisa.model import GPT, GPTConfig
from minisa.tokenizer import Tokenizer

UNKNOWN = dict.fromkeys(("step", "val_loss", "val_bpb", "data", "seconds"))
PARTS = {"config", "changes", "model", "parent", "tokenizer", "info"}

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

def empty(config, changed=()):
    """A model on the meta device, without numbers."""
    with torch.device("meta"):
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
          parent={"source": str(named), "sha256": sha256(file)})

def write(path, model, tensors, info, **more):
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

def read(path, device="cpu"):
    """The dict in a file that save() or derive() wrote. Raises ValueError if it is not one."""
    try:
        with warnings.catch_warnings(action="ignore"):
            state = torch.load(path, map_location=device, weights_only=True)
        missing = PARTS - state.keys()
    except Exception as error:                          # torch raises many kinds for a damaged file
        raise ValueError(f"{path}: damaged, or no checkpoint of minisa ({type(error).__name__}); "
                         "make it again") from None
    if missing:
        raise ValueError(f"{path}: no checkpoint of minisa, it lacks {', '.join(sorted(missing))}")
    return state

def build(path, state, device="cpu", dtype=torch.float32):
    """What read() gave → model in eval mode, tokenizer, info."""
    tensors = {name: t.to(device=device, dtype=dtype if t.is_floating_point() else None)
               for name, t in state["model"].items()}
    if state["parent"]:
        source, expected = state["parent"]["source"], state["parent"]["sha256"]
        source = source if source == "smollm2" else Path(path).parent / source
        if source != "smollm2" and not Path(source).is_file():
            raise ValueError(f"{path}: was derived from {source}, which is missing; bring it back")
        if sha256(source_file(source)) != expected:
            raise ValueError(f"{path}: was derived from {source}, which has changed since; "
                             "derive it again")
        parent, tokenizer, _ = load(source, device=device, dtype=dtype)
    try:
        model = empty(GPTConfig(**state["config"]), state["changes"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if state["parent"]:
        inherited = parent.state_dict()
        tensors = {name: tensors.get(name, inherited.get(name)) for name in model.state_dict()}
    else:
        tokenizer = Tokenizer.load(state["tokenizer"])
    model.load_state_dict(tensors, assign=True)
    return model.eval(), tokenizer, state["info"]

def load(source, share=None, share_kind="weights", device="cpu", dtype=torch.float32):
    """A model → model in eval mode, tokenizer, info (a dict; its values are None where not known).

    source: a run's or model's folder, a .gguf file of a model of the Llama architecture, or
    "smollm2", which is downloaded once. share: spans that are to share though the weights were
    trained without (zero-shot), as "1-3"; share_kind: "weights" or "kv". Raises ValueError if the
    source cannot be read, or cannot share that way.
    """
    path = source_file(source)
    try:
        if path.suffix == ".gguf":
            state, config, tokenizer = pretrained.load_gguf(path, dtype)
            model, info = empty(config), dict(UNKNOWN)
            model.load_state_dict(state, assign=True)
            model.to(device).eval()
        else:
            model, tokenizer, info = build(path, read(path, device), device, dtype)
    except (RuntimeError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: damaged, or of another version of minisa "
                         f"({type(error).__name__}: {reason}); make it again") from None
    if share:
        model = reconfigure(model, share=share, share_kind=share_kind)
        info = {**info, "val_loss": None, "val_bpb": None}      # these were without sharing
    return model, tokenizer, info
