"""What the axes share: how to go through a model layer by layer, and how to write a new one."""

import importlib
import sys
from dataclasses import replace

import torch.nn as nn

from minisa.kit import checkpoint
from minisa.kit.cli import Parser, add_device, add_model, command, count
from minisa.kit.data import data_of
from minisa.kit.files import lock, refuse_taken
from minisa.model import SharedAttention

# ---- models ----

def walk(model, idx):
    """Run a model on idx (B, T); before each block, yield it and its inputs: (block, x (B, T, C),
    step, below). Changes made to the block meanwhile take effect."""
    x, step = model.start(idx)
    handed_up = None
    for block in model.blocks:
        yield block, x, step, handed_up
        x, handed_up = block(x, step, handed_up)

def anchors(config):
    """→ {a reuse layer: its anchor}, for all spans of a GPTConfig."""
    return {layer: a for a, b in config.spans for layer in range(a + 1, b + 1)}

def resize(attn, widths, n_z):
    """Give a layer new matrices, still without numbers, for other Widths of q, k and v, and for
    n_z numbers per token in the weighted sums of all heads."""
    C = attn.qkv.in_features
    attn.widths = widths
    attn.qkv = nn.Linear(C, sum(widths), bias=False)
    attn.out = nn.Linear(n_z, C, bias=False)

def replace_reuse_layers(model, kind, flag, **widths):
    """Put layers of another kind in the place of all reuse layers of plain Shared Attention, as
    wide as those but for the Widths given. Raises ValueError, naming the flag, if there are none,
    or they were changed before."""
    config = model.config
    if not config.spans or config.share_kind != "weights":
        raise ValueError(f"--{flag}: is about layers that share attention weights; "
                         "give --share, and --share_kind=weights")
    for layer in anchors(config):
        block, old = model.blocks[layer], model.blocks[layer].attn
        if type(old) is not SharedAttention:
            changed = ", ".join(change["by"] for change in checkpoint.changes(model))
            raise ValueError(f"--{flag}: the reuse layers of this model were changed already, by "
                             f"{changed}; take the model that it came from")
        block.attn = kind(config, layer)
        wanted = old.widths._replace(**widths)
        resize(block.attn, wanted, old.out.in_features)

def rebuilt(model, by, **settings):
    """→ a copy of a model on the meta device, rebuilt by minisa/axes/BY.py. Raises ValueError if
    that file's rebuild() does."""
    step = {"by": by, "settings": settings}
    return checkpoint.empty(replace(model.config), [*checkpoint.changes(model), step])

def fill(new, model, tensors):
    """Give a rebuilt() model its numbers: these tensors, by name; else those of the original model,
    in the same memory; else those it was built with. → the new model, in eval mode. Raises
    RuntimeError, naming the tensor, if one has no numbers, or another shape."""
    state = new.state_dict() | model.state_dict() | tensors
    unfilled = [name for name, t in state.items() if t.is_meta]
    if unfilled:
        raise RuntimeError(f"fill() was given no numbers for {', '.join(unfilled)}")
    new.load_state_dict(state, assign=True)
    return new.to(model.embed.weight).eval()

def calibration(model, data, n=12):
    """n windows (n, T ≤ 512) of the training part of a minisa.kit.data.Data."""
    T = min(512, model.config.block_size)
    windows = data.windows("train", n, T)
    return windows[:, :-1].to(model.embed.weight.device)

# ---- commands ----

def parser(doc, name):
    """A Parser with the flags of a command that reads a model and writes a model."""
    usage = f"python -m minisa.axes.{name} MODEL --out=FOLDER [--FLAG=VALUE ...]"
    parser = Parser(doc, usage)
    add_model(parser)
    parser.add_argument("--out", metavar="FOLDER", required=True, help="where to write the model")
    add_device(parser)
    return parser

def add_text(parser, purpose):
    parser.flag("text", help=f"UTF-8 file to {purpose}",
                shown="the text that the model was trained on, or the plays")

def add_calibration(parser):
    """The flags that the `windows` of rewrite() need."""
    add_text(parser, "calibrate on")
    parser.flag("windows", count, 12, "windows of 512 tokens to calibrate on")

def rewrite(args, technique):
    """Load args.model, let technique(model, windows) make another one of it, and write that to
    args.out. Raises ValueError.

    windows: a function that reads the calibration text → --windows of tokens (n, T ≤ 512).
    """
    with lock(args.out):
        refuse_taken(args.out)
        parent, tokenizer, info = checkpoint.load(args.model, device=args.device)

        def windows():
            data = data_of(info, tokenizer, args.text)
            print(f"calibrating on {data.name}", file=sys.stderr, flush=True)
            return calibration(parent, data, args.windows)

        checkpoint.derive(args.out, technique(parent, windows), parent, info)
        checkpoint.load(args.out, device=args.device)           # does the axis write what is read?
    print(f"wrote {args.out}; next: python sample.py {args.model} {args.out}")

def run_main(name):
    """Run the command of minisa/axes/NAME.py, from the module of that name: checkpoint.change()
    knows its classes, and not those of the copy that Python runs as __main__."""
    command(importlib.import_module(f"minisa.axes.{name}").main)
