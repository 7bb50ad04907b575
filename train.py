"""Train a GPT on Shakespeare, with or without shared attention.

    python train.py                     full attention, saved in out/full
    python train.py --share=1-3         Shared Attention, saved in out/weights-1-3
    python train.py --resume            go on with an interrupted run (and its --share or --out_dir)
    torchrun --standalone --nproc_per_node=2 train.py

Without other flags it takes the preset of this machine (minisa/kit/settings.py): about 3 minutes on a
laptop's CPU, or a larger model on a GPU.
"""

import minisa  # isort: skip  # noqa: F401 (before torch, as it sees to Ctrl-C)
import math
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel

from minisa.kit import checkpoint
from minisa.kit.cli import command
from minisa.kit.data import Data, tokenize
from minisa.kit.files import lock
from minisa.kit.run import (
    Meter,
    Processes,
    Run,
    clock,
    compiled,
    keep_memory,
    number_format,
    refuse_too_large,
)
from minisa.kit.settings import read_flags, saved_settings, settle
from minisa.model import GPT, GPTConfig

EVAL_TOKENS = 20_000            # of an evaluation on the way; the last one reads all
SHAPE = [name for name in asdict(GPTConfig()) if name not in ("vocab_size", "tied")]
ALWAYS_FREE = {"device", "out_dir", "text", "data_dir", "eval_interval", "eval_tokens", "log_interval",
               "keep_every"}
FREE_FROM_MODEL = {"share", "share_kind", "dropout", "block_size"}

# ---- settings ----

def open_run(args, given):
    """→ the Run. When it goes on, its settings replace those that were not given."""
    mode = f"{args.share_kind}-{args.share}" if args.share else "full"
    mode += f"-kv{args.n_kv_head}" if args.n_kv_head else ""
    if args.init_from:
        mode += f"-from-{Path(args.init_from).resolve().name.removesuffix('.gguf')}"
    mode += f"-{args.preset}" if "preset" in given else ""
    run = Run(args.out_dir or f"out/{mode}", args.resume, args.overwrite)
    for name, value in run.saved["settings"].items() if run.saved else []:
        if name in given - ALWAYS_FREE and getattr(args, name) != value:
            raise ValueError(f"--{name}={getattr(args, name)}: the run in {run.folder} was started with "
                             f"{value!r}; drop the flag, or start a new run without --resume")
        if name not in given | {"out_dir"}:
            setattr(args, name, value)
    return run

# ---- data and model ----

def make_model(args, given, run, processes):
    """→ the model, and the data that it is trained on."""
    torch.manual_seed(args.seed)
    model = tokenizer = None
    if run.saved:
        model, tokenizer = run.restored_model.to(processes.device), run.tokenizer
    elif args.init_from:
        model, tokenizer, _ = checkpoint.load(args.init_from, device=processes.device)
        clash = sorted(given & {*SHAPE, "tokenizer", "vocab_size"} - FREE_FROM_MODEL)
        if clash:
            raise ValueError(f"--{clash[0]}: {args.init_from} brings its own; drop the flag")
        sharing = {"share": args.share, "share_kind": args.share_kind} if args.share else {}
        size = args.block_size if "block_size" in given else min(model.config.block_size, 512)
        model = checkpoint.reconfigure(model, dropout=args.dropout, block_size=size, **sharing)

    own = tokenizer if args.init_from else None
    folder = processes.first_then_all(
        lambda: tokenize(args.text, args.tokenizer, args.vocab_size, own, args.data_dir))
    data = Data(folder)
    if run.saved and data.digest != run.saved["info"]["data_digest"]:
        raise ValueError(f"the text is not the one that {run.folder} was trained on "
                         f"({run.saved['info']['data']}); name that with --text=FILE, or start a new run "
                         "without --resume")
    if model is None:
        shape = {name: getattr(args, name) for name in SHAPE}
        config = GPTConfig(vocab_size=data.tokenizer.vocab_size, **shape)
        refuse_too_large(args, config)
        model = GPT(config).to(processes.device)
    if len(data.train) <= model.config.block_size:
        raise ValueError(f"--block_size={model.config.block_size}: the training text has only "
                         f"{len(data.train)} tokens; take a smaller one, or more text")
    return model.train(), data

# ---- optimizer ----

def make_optimizer(args, model, run):
    matrices = {part.weight for part in model.modules() if isinstance(part, (nn.Linear, nn.Embedding))}
    others = [p for p in model.parameters() if p not in matrices]
    matrices = [p for p in model.parameters() if p in matrices]
    groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    betas = args.beta1, args.beta2
    optimizer = torch.optim.AdamW(groups, betas=betas, weight_decay=args.weight_decay, fused=True)
    if run.saved:
        run.restore_optimizer(optimizer)
    return optimizer

def learning_rate(step, args):
    """Warm-up in a straight line, then half a cosine down to min_lr."""
    if step < args.warmup_iters:
        return args.learning_rate * (step + 1) / args.warmup_iters
    done = (step - args.warmup_iters) / max(1, args.max_iters - args.warmup_iters)
    return args.min_lr + (args.learning_rate - args.min_lr) * (1 + math.cos(math.pi * done)) / 2

# ---- loop ----

def evaluate(args, run):
    """Measure the validation loss on a part, log it, and save the run; if it is the best, the model too."""
    tokens = EVAL_TOKENS if args.eval_tokens is None else args.eval_tokens
    loss, bpb = run.data.evaluate(run.model, tokens)
    run.refuse_nan(loss)
    run.replace_former()
    run.processes.say(f"step {run.step:5d}/{args.max_iters}  validation loss {loss:.4f} nats per token, "
                      f"{bpb:.4f} bits per byte")
    run.record(step=run.step, val_loss=loss, val_bpb=bpb, seconds=run.elapsed())
    run.evaluated = run.step
    if loss < run.best:
        run.best = loss
        run.save(loss, bpb)
    run.save_last()

def step(args, run, forward, autocast, meter):
    """One step of the optimizer, on the run's part of the batch, in micro-batches."""
    n_micro, rank, world = args.gradient_accumulation_steps, run.processes.rank, run.processes.world
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(run.step, args)
    if args.dropout:
        torch.manual_seed(((args.seed << 40) + (run.step << 12) + rank) % 2**63)
    rows = args.batch_size // (world * n_micro)                 # sequences of a micro-batch
    for micro in range(n_micro):
        first = rows * (rank * n_micro + micro)
        x, y = run.data.batch(run.step, args.seed, args.batch_size, run.model.config.block_size,
                              slice(first, first + rows))
        more = world > 1 and micro + 1 < n_micro                # gradients are not complete yet
        with autocast, forward.no_sync() if more else nullcontext():
            _, loss = forward(x.to(run.processes.device), y.to(run.processes.device))
            (loss / n_micro).backward()
        meter.add(loss.detach(), tokens=x.numel() * world)
    if args.grad_clip:
        nn.utils.clip_grad_norm_(run.model.parameters(), args.grad_clip)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.step += 1

def train(args, run, forward, autocast):
    """Step, log, evaluate and save until the last step, or a signal. → an exit status."""
    meter = Meter(run.step, args.max_iters)
    while True:
        last = run.step == args.max_iters
        due = last or (run.step > 0 and run.step % args.eval_interval == 0)
        if due and run.evaluated != run.step:
            meter.pause(evaluate, args, run)
        if args.keep_every and (last or run.step % args.keep_every == 0):
            meter.pause(run.save, name=f"steps/{run.step:08d}")
        if last:
            return 0
        step(args, run, forward, autocast, meter)
        alone = run.processes.world == 1                        # others hear of a signal when they log
        if run.step % args.log_interval == 0 or run.step == args.max_iters or (alone and run.signal):
            meter.log(run)
            if status := run.stop():
                return status

def main():
    args = read_flags(__doc__)
    given = settle(args)
    run, processes = open_run(args, given), Processes(args.device)
    parts = processes.world * args.gradient_accumulation_steps
    if args.batch_size % parts:
        raise ValueError(f"--batch_size={args.batch_size}: must be a multiple of "
                         f"processes × gradient_accumulation_steps = {parts}")
    keep_memory()
    model, data = make_model(args, given, run, processes)
    optimizer = make_optimizer(args, model, run)
    autocast, forward = number_format(model, args.dtype), model
    if args.compile:
        batch = data.batch(0, args.seed, args.batch_size // parts, model.config.block_size)
        forward, seconds = compiled(model, *(part.to(processes.device) for part in batch), autocast)
        processes.say(f"compiled in {clock(seconds)}")
    forward = DistributedDataParallel(forward) if processes.world > 1 else forward
    config, n_params = model.config, sum(p.numel() for p in model.parameters())
    shared = f"{config.share_kind} {config.share}" if config.share else "nothing"
    processes.say(f"{run.folder}: {config.n_layer} layers, {config.n_embd} wide, "
                  f"context {config.block_size}, sharing {shared}; {n_params:,} parameters; "
                  f"{len(data.train):,} training tokens; {processes.device.type}, {args.dtype}")
    if args.no_gpu:
        processes.say(f"on the CPU, as no GPU can be used: {args.no_gpu}")

    with lock(run.folder) if processes.rank == 0 else nullcontext():
        run.begin(processes, model, data, optimizer, saved_settings(args))
        status = train(args, run, forward, autocast)
        if status == 0 and processes.rank == 0:
            run.finish(whole=args.eval_tokens is None)
    processes.close()
    return status

if __name__ == "__main__":
    command(main)
