"""Save and load what a training run makes: one folder, two files.

    model.pt   config, tokenizer, weights with the best validation loss, and what is known of them: what sample.py reads
    train.pt   the same for the last step, with the optimizer's state: what train.py --resume reads

Files are written under another name first and renamed when whole, so a run that is killed, or a disk that is full, leaves
the old file. They hold tensors, numbers and text only: torch.load(weights_only=True) runs nothing that a file contains.
"""

import io
import os
import tempfile
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn as nn

from minisa.model import GPT, GPTConfig, Linear, widths
from minisa.tokenizer import Tokenizer


def write_file(path, data):
    """Write bytes to path, all or nothing. Raises OSError, and then leaves what was there."""
    path = Path(path)
    if path.exists() and not path.is_file():            # a pipe or device, such as /dev/stdout: nothing to keep, nothing to rename
        path.write_bytes(data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name + ".")
    try:
        with os.fdopen(handle, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        os.unlink(temporary)
        if isinstance(error, OSError):
            raise OSError(f"{path}: could not be written ({error.strerror}); free some space or choose another folder, nothing there was changed") from None
        raise


def save(path, model, tokenizer, info, **more):
    """Write a checkpoint. info: a dict of numbers and text; more: further tensors and dicts (the optimizer's state)."""
    buffer = io.BytesIO()
    torch.save({"config": asdict(model.config), "tokenizer": tokenizer.description, "model": model.state_dict(), "info": info, **more}, buffer)
    write_file(path, buffer.getbuffer())


def read(path, device="cpu"):
    """The dict that save() wrote. Raises ValueError if the file is missing, damaged or something else."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such checkpoint; train one with: python train.py")
    try:
        with warnings.catch_warnings(action="ignore"):
            state = torch.load(path, map_location=device, weights_only=True)
        assert {"config", "tokenizer", "model", "info"} <= state.keys()
    except Exception as error:                                                  # torch raises many kinds for a damaged file
        raise ValueError(f"{path}: damaged, or no checkpoint of minisa ({type(error).__name__}); train it again with: python train.py") from None
    return state


def load_weights(model, state, config):
    """Give a model the tensors of a state_dict of a model with this config, which may share less: q, k, v that are now borrowed
    are dropped; of those that share_rank narrows, q starts at zero. All other tensors are taken over, not copied.
    Raises ValueError where the weights lack what the model needs."""
    state, own = dict(state), model.state_dict()
    for layer in range(model.config.n_layer):
        name, have, want = f"blocks.{layer}.attn.qkv.weight", widths(config, layer), widths(model.config, layer)
        if any(w > h for w, h in zip(want, have)):
            raise ValueError(f"--share={model.config.share}: layer {layer} was trained with --share={config.share} "
                             f"--share_kind={config.share_kind} and has no weights of its own for what it must now compute")
        if want != have:
            q, k, v = state[name].split(have)
            q = q if want[0] == have[0] else torch.zeros_like(q[:want[0]])
            k = k.view(config.n_kv_head, -1, k.size(1))[:, :want[1] // config.n_kv_head].flatten(0, 1)
            state[name] = torch.cat((q, k, v[:want[2]]))
    for name in {*own, *state}:
        if name.endswith(("attn.source", "attn.mix")):      # whose heads a layer takes: its own first, unless chosen before
            if name not in own:
                del state[name]
            elif name not in state:
                H = model.config.n_head
                state[name] = torch.eye(H, dtype=state["embed.weight"].dtype) if name.endswith("mix") else torch.arange(H)
    model.load_state_dict(state, assign=True)


def for_decoding(model):
    """Store the matrices with many outputs by columns, which model.linear() reads fastest. → the model"""
    for part in model.modules():
        if isinstance(part, (Linear, nn.Embedding)) and part.weight.size(0) > 2 * part.weight.size(1) and part.weight.dtype == torch.float32:
            part.weight.data = part.weight.data.mT.contiguous().mT
    return model


def build(state, device="cpu", dtype=torch.float32, **changes):
    """The dict that save() wrote → model in eval mode, tokenizer, info. changes: as in load()."""
    trained = GPTConfig(**state["config"])
    model = GPT(GPTConfig(**{**state["config"], **{name: value for name, value in changes.items() if value is not None}}))
    load_weights(model, {name: t.to(device, dtype) if t.is_floating_point() else t.to(device) for name, t in state["model"].items()}, trained)
    return model.to(device).eval(), Tokenizer.load(state["tokenizer"]), state["info"]


def load(source, share=None, device="cpu", dtype=torch.float32, **changes):
    """A model → model in eval mode, tokenizer, info (a dict: step, val_loss, val_bpb, data, seconds; None where not known).

    source: a run's folder, a .gguf file of a model of the Llama architecture, or "smollm2", which is downloaded once.
    share: other spans than it was trained with, as "1-3" for weights trained with full attention (zero-shot).
    changes: other fields of GPTConfig to change, as share_kind or dropout. None changes nothing.
    Raises ValueError if the source cannot be read or cannot share that way.
    """
    if str(source) == "smollm2" or str(source).endswith(".gguf"):
        from minisa import pretrained
        changes = {name: value for name, value in dict(changes, share=share).items() if value is not None}
        model, tokenizer = pretrained.load_gguf(pretrained.fetch() if str(source) == "smollm2" else source, dtype=dtype, **changes)
        return for_decoding(model.to(device)), tokenizer, dict.fromkeys(("step", "val_loss", "val_bpb", "data", "seconds"))
    source = Path(source)
    model, tokenizer, info = build(read(source / "model.pt" if source.is_dir() else source, device), device, dtype, share=share, **changes)
    return for_decoding(model), tokenizer, info
