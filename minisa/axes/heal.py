"""Healing: train a model that shares, briefly, to predict what its teacher predicts.

    python -m minisa.axes.heal out/eight --teacher=smollm2 --out=out/healed --text=passages.txt

Sharing makes a model's predictions drift from those of the model it was made from. Distillation
(arXiv:1503.02531) takes some of that back: the loss is the KL divergence of the model's prediction
from its teacher's, at every token of a text. --train says what learns: all layers, the reuse
layers, or their attention alone. A few hundred steps help, at rates so small that the model
does not learn the text by heart.

Ctrl-C saves what --resume continues, with the same result as without a stop.
"""

import math
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F

from minisa.axes.common import add_text, anchors, parser, run_main
from minisa.kit import checkpoint
from minisa.kit.cli import amount, at_least, count, whole
from minisa.kit.data import data_of
from minisa.kit.files import lock, refuse_taken
from minisa.kit.machine import choose_dtype, number_format
from minisa.kit.run import Signals, restore_optimizer

STATE = "heal.safetensors"
PARTS = "all", "reuse", "attention"
SETTINGS = (                # which --resume must find the same
    "model", "sha256", "teacher", "train", "max_iters", "learning_rate", "reuse_learning_rate",
    "batch_size", "block_size", "seed", "dtype")
PROGRESS = {"step": int, "seconds": float, "text": str}         # text: a digest
WARMUP = 0.1                # of the steps
HELD_OUT = 16               # windows to report the divergence on

# ---- a step ----

def divergence(model, teacher, idx):
    """idx (B, T) → the mean KL divergence of the model's predictions from the teacher's, in nats
    per token."""
    with torch.no_grad():
        log_p = teacher(idx)[0].float().log_softmax(-1).flatten(0, 1)       # (B T, V)
    log_q = model(idx)[0].float().log_softmax(-1).flatten(0, 1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)

def schedule(step, args):
    """→ the fraction of the peak learning rate: a short rise in a straight line, then half a cosine
    down to 0."""
    warmup = max(1, round(WARMUP * args.max_iters))
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / (args.max_iters - warmup)          # 0 to 1
    return (1 + math.cos(math.pi * done)) / 2

def train_step(model, teacher, optimizer, data, args, step):
    """One step on --batch_size sequences, one at a time, to save memory. → the mean divergence"""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * schedule(step, args)
    idx, _ = data.batch(step, args.seed, args.batch_size, args.block_size)
    total = 0.0
    for row in idx.to(args.device).split(1):
        loss = divergence(model, teacher, row) / args.batch_size
        loss.backward()
        total += loss.item()
    if not math.isfinite(total):
        raise ValueError(f"the divergence is {total} at step {step}; take a lower --learning_rate")
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return total

# ---- what learns ----

def parameter_groups(model, args):
    """Let only args.train of a model learn ("all", "reuse", "attention"), in memory of its own →
    two groups of parameters for an optimizer, each with its `peak` learning rate: those of the
    reuse layers, and all others. Raises ValueError if there are no reuse layers to train alone."""
    reuse_layers = anchors(model.config)
    if args.train != "all" and not reuse_layers:
        raise ValueError(f"--train={args.train}: the model shares nothing, so it has no reuse "
                         "layers")
    model.requires_grad_(args.train == "all")
    of_reuse = []
    for layer in reuse_layers:
        block = model.blocks[layer]
        learns = block.attn if args.train == "attention" else block
        of_reuse += learns.requires_grad_().parameters()
    learning = [p for p in model.parameters() if p.requires_grad]
    for p in learning:
        p.data = p.data.clone()                                 # the parent keeps its numbers
    known = set(of_reuse)
    others = [p for p in learning if p not in known]
    return [{"params": of_reuse, "peak": args.reuse_learning_rate},
            {"params": others, "peak": args.learning_rate}]

# ---- the whole ----

@torch.inference_mode()
def held_out_divergence(model, teacher, data, args):
    """On windows of the held-out part of the text, in nats per token."""
    windows = data.windows("val", HELD_OUT, args.block_size).to(args.device)
    inputs = windows[:, :-1].split(1)                           # (1, T) each, to save memory
    return statistics.fmean(divergence(model, teacher, idx).item() for idx in inputs)

def heal(model, teacher, data, tokenizer, args, autocast):
    """Train, saving every --save_interval steps. → the exit status: not 0 if it was stopped"""
    groups = parameter_groups(model, args)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, betas=(0.9, 0.95))
    state = Path(args.out, STATE)
    settings = {name: getattr(args, name) for name in SETTINGS}
    begun, step = time.perf_counter(), 0
    if args.resume:
        progress = continue_run(model, optimizer, state, settings, data)
        step = progress["step"]
        begun -= progress["seconds"]

    def save():
        progress = {"step": step, "seconds": time.perf_counter() - begun, "text": data.digest}
        checkpoint.save_training(state, model, tokenizer, optimizer, settings=settings,
                                 progress=progress)

    first, started = step, time.perf_counter()
    signals = Signals()
    while step < args.max_iters:
        with autocast:
            loss = train_step(model, teacher, optimizer, data, args, step)
        step += 1
        if step % args.log_interval == 0 or step == args.max_iters:
            each = (time.perf_counter() - started) / (step - first)
            speed = args.batch_size * args.block_size / each
            minutes = each * (args.max_iters - step) / 60
            print(f"step {step}/{args.max_iters}  divergence {loss:.4f}  {speed:,.0f} tokens/s"
                  f"  {minutes:.0f} minutes left", flush=True)
        if signals.sent or step % args.save_interval == 0:
            save()
        if signals.sent:
            print(f"stopped at step {step} and saved; continue with --resume", flush=True)
            return 128 + signals.sent
    return 0

def continue_run(model, optimizer, file, settings, data):
    """Put what save_training() wrote into a model and an optimizer. → its PROGRESS. Raises
    ValueError if that is of another model, text or setting."""
    saved, _, moments, known = checkpoint.read_training(file, {"progress": PROGRESS})
    if known.get("settings") != settings or known["progress"]["text"] != data.digest:
        raise ValueError(f"{file}: was begun with another model, other flags or another text; "
                         "give the same, or another --out")
    model.load_state_dict(saved.state_dict())
    restore_optimizer(optimizer, moments, file)
    return known["progress"]

def main():
    flags = parser(__doc__, "heal")
    flags.add_argument("--teacher", metavar="MODEL", required=True,
                       help="the model to learn from: a folder, a .gguf file, or smollm2")
    add_text(flags, "learn on")
    flags.flag("train", str, "all", "what learns: all layers, the reuse layers, or their attention",
               choices=PARTS)
    flags.flag("max_iters", count, 160, "number of steps")
    flags.flag("learning_rate", amount, 3e-5, "peak learning rate; it falls to 0")
    flags.flag("reuse_learning_rate", amount, 1e-4, "peak learning rate of the reuse layers, "
               "which have more to learn")
    flags.flag("batch_size", count, 8, "sequences per step")
    flags.flag("block_size", at_least(int, 2), 256, "tokens per sequence")
    flags.flag("seed", whole, 1337, "random seed for the batches")
    flags.flag("log_interval", count, 5, "steps between lines of progress")
    flags.flag("save_interval", count, 20, "steps between what --resume can continue")
    flags.flag("dtype", str, None, "number format of the products", "the faster one here",
               choices=("float32", "bfloat16"))
    flags.switch("resume", "continue what was stopped; give the same flags")
    args = flags.parse_args()
    args.dtype = args.dtype or choose_dtype(args.device)
    with lock(args.out):
        if not args.resume:
            refuse_taken(args.out)
        return heal_model(args)

def heal_model(args):
    """Load both models, heal one, and write it. → the exit status"""
    parent, tokenizer, info = checkpoint.load(args.model, device=args.device)
    teacher, its_tokenizer, _ = checkpoint.load(args.teacher, device=args.device)
    if its_tokenizer.identity != tokenizer.identity:
        raise ValueError(f"--teacher={args.teacher}: has other tokens than {args.model}; name the "
                         "model that it was made from")
    longest = min(parent.config.block_size, teacher.config.block_size)
    if args.block_size > longest:
        raise ValueError(f"--block_size={args.block_size}: the context of these models is "
                         f"{longest} tokens; take at most that")
    data = data_of(info, tokenizer, args.text)
    _, args.sha256 = parent.origin                              # MODEL made anew is another one
    model = checkpoint.reconfigure(parent)                      # the same, in the same memory
    autocast = number_format(model, args.dtype)
    number_format(teacher, args.dtype)
    print(f"learning from {args.teacher} on {data.name}", file=sys.stderr, flush=True)
    before = held_out_divergence(parent, teacher, data, args)
    status = heal(model, teacher, data, tokenizer, args, autocast)
    if status:
        return status
    after = held_out_divergence(model, teacher, data, args)
    print(f"divergence on held-out text: {before:.4f} before, {after:.4f} after", flush=True)
    checkpoint.derive(args.out, model, parent, info)
    Path(args.out, STATE).unlink(missing_ok=True)           # several times as large as the model
    print(f"wrote {args.out}; next: python sample.py {args.model} {args.out}")
    return 0

if __name__ == "__main__":
    run_main("heal")
