"""What the axes have in common: to look into a model layer by layer, and to write another one."""

import importlib
import sys

from minisa.kit import checkpoint
from minisa.kit.cli import Parser, command, device
from minisa.kit.data import data_of
from minisa.kit.files import lock, refuse_taken

def walk(model, idx, cache=None, watch=None):
    """Run a model on idx (B, T); before each block, yield it and what it is about to be given:
    (block, x (B, T, C), step, shared). What is changed in the block meanwhile counts.

    cache, watch: as of GPT.hidden().
    """
    (x, step), shared = model.start(idx, cache, watch), None
    for block in model.blocks:
        yield block, x, step, shared
        x, shared = block(x, step, shared)

def calibration(model, data):
    """Twelve windows (12, T ≤ 512) of the training part of a minisa.kit.data.Data."""
    T = min(512, model.config.block_size)
    return data.windows("train", 12, T).to(model.embed.weight.device)[:, :-1]

def parser(doc, name):
    """A Parser with the flags of a command that reads a model and writes a model."""
    usage = f"python -m minisa.axes.{name} MODEL --out=FOLDER [--FLAG=VALUE ...]"
    parser = Parser(doc, usage)
    parser.add_argument("model", metavar="MODEL", help="a run's or model's folder, a .gguf file, "
                        "or smollm2, which is downloaded once")
    parser.flag("out", shown="none, it must be given", help="folder to write the model to")
    parser.flag("text", default=None, shown="the text that the model was trained on, or the plays",
                help="UTF-8 file to calibrate on")
    parser.flag("device", kind=device, default="cpu", help="cpu, cuda, cuda:1 or mps")
    return parser

def rewrite(args, technique):
    """Load args.model; let technique(model, data) → model make another one; write it to args.out.

    data: a function that gives the minisa.kit.data.Data to calibrate on. Raises ValueError.
    """
    if not args.out:
        raise ValueError("--out: name a folder to write the model to")
    with lock(args.out):
        refuse_taken(args.out, "out")
        change(args, technique)
    print(f"wrote {args.out}; next: python sample.py {args.model} {args.out}")

def change(args, technique):
    """What rewrite() does while it has the folder for itself."""
    parent, tokenizer, info = checkpoint.load(args.model, device=args.device)

    def data():
        found = data_of(info, tokenizer, args.text)
        print(f"calibrating on {found.name}", file=sys.stderr, flush=True)
        return found

    model = technique(parent, data)
    checkpoint.derive(args.out, model, parent, info)

def run_main(name):
    """Run the command of minisa/axes/NAME.py, from the module of that name: checkpoint.change()
    knows its classes, and not those of the copy that Python runs as __main__."""
    command(importlib.import_module(f"minisa.axes.{name}").main)
