"""Train a GPT on Shakespeare, with or without shared attention.

    python train.py                     full attention, saved in out/full
    python train.py --share=1-3         Shared Attention, saved in out/weights-1-3
    python train.py --resume            go on with an interrupted run (with --out_dir, or the flags that it was started with)
    torchrun --standalone --nproc_per_node=2 train.py

Without other flags it takes a preset for this machine: about 3 minutes on a laptop's CPU, or a larger model on a GPU.
"""

import ctypes
import json
import math
import os
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from data.prepare import prepare
from minisa import Parser, amount, at_least, checkpoint, command, count, device, similarity
from minisa.data import FOLDER, Data, tokenize
from minisa.model import GPT, GPTConfig


# name, type, default (or CPU preset and GPU preset), what it is
FLAGS = [
    ("share", str, "", "spans of layers that share attention, as 1-3 or 1-3,5-7; '' for none"),
    ("share_kind", str, "weights", "what they share: weights (Shared Attention) or kv (Cross-Layer Attention)"),
    ("heads", str, "same", "whose weights a head of a reuse layer takes: same (its anchor's same head) or mix (a learned mixture of them); with --init_from also match (the most alike)"),
    ("share_rank", at_least(int, 0), 0, "width of the query and key, in numbers per head, with which a reuse layer corrects its anchor's scores; 0 for none"),
    ("n_layer", count, (4, 6), "number of layers"),
    ("n_head", count, (4, 6), "number of query heads"),
    ("n_kv_head", count, None, "number of key/value heads, None for as many as query heads"),
    ("n_embd", count, (128, 384), "width of the model, in numbers per token"),
    ("n_hidden", count, None, "width of the MLP, in numbers per token, None for about 8/3 n_embd"),
    ("block_size", count, (128, 256), "context, in tokens; with --init_from that of the model, but 512 at most unless given"),
    ("dropout", amount, (0.0, 0.2), "fraction of activations dropped in training"),
    ("rope_base", amount, 10000.0, "base of RoPE's wavelengths"),
    ("norm_eps", amount, 1e-5, "what RMSNorm adds to the mean square"),
    ("text", str, "", "UTF-8 file to train on, '' for nine plays of Shakespeare, fetched if missing"),
    ("tokenizer", str, "bpe", "bpe, learned on the text, or gpt2, which tiktoken downloads"),
    ("vocab_size", count, 1024, "number of tokens that bpe makes; 256 for single bytes"),
    ("init_from", str, "", "run folder, .gguf file or smollm2 (downloaded once) to take model and tokenizer from, '' for random weights"),
    ("batch_size", count, (8, 64), "sequences per step, over all processes and micro-batches together"),
    ("gradient_accumulation_steps", count, 1, "micro-batches that a step is cut into, to save memory"),
    ("max_iters", count, (2000, 5000), "number of steps"),
    ("learning_rate", amount, (2e-3, 1e-3), "highest learning rate, per step"),
    ("min_lr", amount, 0.0, "learning rate of the last step"),
    ("warmup_iters", count, (500, 100), "steps in which the learning rate rises"),
    ("weight_decay", amount, 0.1, "AdamW's, for matrices"),
    ("beta1", amount, 0.9, "AdamW's decay of the mean gradient, per step"),
    ("beta2", amount, (0.95, 0.99), "AdamW's decay of its mean square, per step"),
    ("grad_clip", amount, 1.0, "largest norm of the gradient, 0 for any"),
    ("seed", at_least(int, 0), 1337, "of weights, batches and dropout"),
    ("dtype", str, None, "float32 or bfloat16, None for bfloat16 on CUDA and float32 elsewhere"),
    ("device", device, None, "cpu, cuda, cuda:1 or mps, None for the fastest there is"),
    ("out_dir", str, None, "folder of the run, None for out/MODE"),
    ("data_dir", str, str(FOLDER), "folder of the token files"),
    ("eval_interval", count, (400, 250), "steps between evaluations, which also save the run"),
    ("eval_tokens", at_least(int, 0), 0, "validation tokens that an evaluation reads, in windows spread evenly, 0 for all"),
    ("log_interval", count, 50, "steps between log lines"),
    ("similarity_every", at_least(int, 0), 0, "steps between maps of how alike the layers attend, for python -m minisa.similarity RUN --history; 0 for none"),
]
MODEL_FLAGS = [f.name for f in fields(GPTConfig) if f.name not in ("vocab_size", "tied", "ranks")]
FREE_ON_RESUME = {"device", "out_dir", "data_dir", "eval_interval", "eval_tokens", "log_interval", "similarity_every"}        # all others belong to the run


def parse_args():
    parser = Parser(__doc__, usage="python train.py [--FLAG=VALUE ...]")
    for name, kind, default, text in FLAGS:
        shown = f"{default[0]}, on a GPU {default[1]}" if isinstance(default, tuple) else repr(default)
        parser.add_argument(f"--{name}", type=kind, metavar=kind.__name__.upper(), help=f"{text} (default {shown})")
    parser.add_argument("--refit", action="store_true", help="with --init_from and --share: begin with refitted output projections of reuse layers (default off)")
    parser.add_argument("--compile", action="store_true", help="compile the model with torch.compile (default off)")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint of out_dir (default off)")
    parser.add_argument("--overwrite", action="store_true", help="replace a run that is in out_dir (default off)")
    return parser.parse_args()


def settle(args):
    """Fill in what was not given. Raises ValueError for what cannot be."""
    args.device = args.device or torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    on_gpu = args.device.type != "cpu"
    for name, _, default, _ in FLAGS:
        if getattr(args, name) is None:
            setattr(args, name, default[on_gpu] if isinstance(default, tuple) else default)
    args.dtype = args.dtype or ("bfloat16" if args.device.type == "cuda" else "float32")
    if args.dtype not in ("float32", "bfloat16"):
        raise ValueError(f"--dtype={args.dtype}: must be float32 or bfloat16")
    if args.tokenizer not in ("bpe", "gpt2"):
        raise ValueError(f"--tokenizer={args.tokenizer}: must be bpe or gpt2")
    for name in ("beta1", "beta2"):
        if getattr(args, name) >= 1:
            raise ValueError(f"--{name}={getattr(args, name)}: must be below 1")
    return args


def learning_rate(step, args):
    """Warm-up in a straight line, then half a cosine down to min_lr."""
    if step < args.warmup_iters:
        return args.learning_rate * (step + 1) / args.warmup_iters
    done = (step - args.warmup_iters) / max(1, args.max_iters - args.warmup_iters)
    return args.min_lr + (args.learning_rate - args.min_lr) * (1 + math.cos(math.pi * done)) / 2


def clock(seconds):
    return f"{int(seconds) // 60}m{int(seconds) % 60:02d}s"


def open_run(args, given):
    """Settle where the run is saved. → its folder, and its last checkpoint if it goes on from one."""
    mode = f"{args.share_kind}-{args.share}" if args.share else "full"
    mode += f"-{args.heads}" if args.heads != "same" else ""
    mode += f"-rank{args.share_rank}" if args.share_rank else ""
    mode += "-refit" if args.refit else ""
    mode += f"-kv{args.n_kv_head}" if args.n_kv_head else ""
    mode += f"-from-{Path(args.init_from).stem}" if args.init_from else ""
    out = Path(args.out_dir or f"out/{mode}")
    if not args.resume:
        if (out / "train.pt").exists() and not args.overwrite:
            raise ValueError(f"{out} already holds a run: --resume goes on with it, --overwrite replaces it, --out_dir=FOLDER leaves it alone")
        return out, None
    saved = checkpoint.read(out / "train.pt")
    for name, value in saved["args"].items():
        if name in given - FREE_ON_RESUME and getattr(args, name) != value:
            raise ValueError(f"--{name}={getattr(args, name)}: the run in {out} was started with {value!r}; drop the flag, or start a new run without --resume")
        if name not in given | {"out_dir"}:
            setattr(args, name, value)
    return out, saved


def keep_memory():
    """glibc gives large blocks back to Linux and gets them anew in every step, which costs a fifth of the time on a CPU."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        ctypes.CDLL(None).mallopt(-3, 32 << 20)         # M_MMAP_THRESHOLD: blocks up to 32 MB come from the heap
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)        # M_TRIM_THRESHOLD: and the heap is kept


def main():
    args = parse_args()
    given = {name for name, *_ in FLAGS if getattr(args, name) is not None}
    settle(args)
    out, saved = open_run(args, given)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))      # torchrun sets them
    if args.refit and not (args.init_from and args.share):
        raise ValueError("--refit: is about reuse layers of trained weights; give --init_from and --share too")
    parts = world * args.gradient_accumulation_steps
    if args.batch_size % parts:
        raise ValueError(f"--batch_size={args.batch_size}: must be a multiple of processes × gradient_accumulation_steps = {parts}")
    where = torch.device(f"cuda:{os.environ['LOCAL_RANK']}") if args.device.type == "cuda" and world > 1 else args.device
    if world > 1:
        dist.init_process_group("nccl" if where.type == "cuda" else "gloo")
        if where.type == "cuda":
            torch.cuda.set_device(where)
    say = print if rank == 0 else lambda *_, **__: None
    keep_memory()

    # ---- model, data, optimizer ----
    torch.manual_seed(args.seed)
    model, tokenizer = None, None
    if saved:
        model, tokenizer, info = checkpoint.build(saved, where)
    elif args.init_from:
        model, tokenizer, _ = checkpoint.load(args.init_from, device=where)
        clash = sorted(given & {*MODEL_FLAGS, "tokenizer", "vocab_size"} - {"share", "share_kind", "heads", "share_rank", "dropout", "block_size"})
        if clash:
            raise ValueError(f"--{clash[0]}: {args.init_from} brings its own; drop the flag")
        block_size = args.block_size if "block_size" in given else min(model.config.block_size, 512)
        config = replace(model.config, share=args.share or model.config.share, share_kind=args.share_kind if args.share else model.config.share_kind,
                         heads=args.heads if args.share else model.config.heads,
                         share_rank=args.share_rank if args.share else model.config.share_rank, dropout=args.dropout, block_size=block_size)
    else:
        config = GPTConfig(vocab_size=args.vocab_size, **{name: getattr(args, name) for name in MODEL_FLAGS})
    if rank > 0:
        dist.barrier()                                  # while process 0 makes the token files
    folder = tokenize(args.text or prepare(), args.tokenizer, args.vocab_size, tokenizer if args.init_from else None, args.data_dir)
    if world > 1 and rank == 0:
        dist.barrier()
    data = Data(folder)
    if saved and folder.name != Path(info["data"]).name:
        raise ValueError(f"the text is not the one that {out} was trained on ({info['data']}); bring it back, or start a new run without --resume")
    if saved:
        config = model.config
    elif args.init_from:
        model = similarity.share_fitted(model, config, data, args.refit) if args.share else similarity.share(model, config)
    else:
        if args.heads == "match":
            raise ValueError("--heads=match: chooses heads of a trained model; give --init_from, or take --heads=mix, which is learned")
        config.vocab_size = data.tokenizer.vocab_size
        model = GPT(config).to(where)
    model.train()
    if len(data.train) <= config.block_size:
        raise ValueError(f"--block_size={config.block_size}: the training text has only {len(data.train)} tokens; take a smaller one, or more text")
    matrices = {name for name, p in model.named_parameters() if p.dim() == 2 and not name.endswith("mix")}
    decay = [[p for name, p in model.named_parameters() if (name in matrices) == wanted] for wanted in (True, False)]
    optimizer = torch.optim.AdamW([{"params": decay[0], "weight_decay": args.weight_decay}, {"params": decay[1], "weight_decay": 0.0}],
                                  betas=(args.beta1, args.beta2), fused=True)
    start, best, seconds = 0, math.inf, 0.0
    if saved:
        optimizer.load_state_dict(saved["optimizer"])
        start, best, seconds = saved["info"]["step"], saved["best"], saved["info"]["seconds"]
    forward = torch.compile(model) if args.compile else model
    forward = DistributedDataParallel(forward) if world > 1 else forward
    autocast = torch.autocast(where.type, torch.bfloat16) if args.dtype == "bfloat16" else nullcontext()

    say(f"{out}: {config.n_layer} layers, {config.n_embd} wide, context {config.block_size}, sharing {config.sharing or 'nothing'}; "
        f"{sum(p.numel() for p in model.parameters()):,} parameters; {len(data.train):,} training tokens; {where.type}, {args.dtype}", flush=True)

    # ---- log, save, stop ----
    log = []
    if rank == 0:
        if saved and (out / "log.jsonl").exists():
            log = [line for line in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if line["step"] <= start]
        out.mkdir(parents=True, exist_ok=True)
        if not saved:                                   # an old run, if any, goes now that nothing can be wrong with the new one
            for name in ("train.pt", "model.pt"):
                (out / name).unlink(missing_ok=True)

    def record(**line):
        log.append(line)
        if rank == 0:
            checkpoint.write_file(out / "log.jsonl", "".join(json.dumps(line) + "\n" for line in log).encode())

    def save(name, step, loss=None, bpb=None):
        if rank == 0:
            info = {"step": step, "val_loss": loss, "val_bpb": bpb, "data": str(folder), "seconds": seconds + time.perf_counter() - begun}
            more = {} if name == "model.pt" else {"optimizer": optimizer.state_dict(), "best": best, "args": {flag: getattr(args, flag) for flag, *_ in FLAGS if flag != "device"}}
            checkpoint.save(out / name, model, data.tokenizer, info, **more)

    def check(loss, step):
        if not math.isfinite(loss):
            raise ValueError(f"the loss is {loss} at step {step}; {out} keeps its last good checkpoint. Try a lower --learning_rate, or --grad_clip=1")

    stopped = []

    def stop(signum, _):
        stopped.append(signum)
        signal.signal(signum, signal.SIG_DFL)           # a second one stops at once

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)

    def everywhere(value, op):
        """A number that all processes agree on: the mean or the maximum of theirs."""
        if world > 1:
            value = torch.tensor(float(value), device=where)
            dist.all_reduce(value, op)
            value = value / world if op == dist.ReduceOp.SUM else value
        return float(value)

    if args.similarity_every:
        alike = data.windows("val", 2, min(config.block_size, len(data.val) - 1)).to(where)[:, :-1]

    # ---- train ----
    begun = time.perf_counter()
    losses, marked = [], begun
    for step in range(start, args.max_iters + 1):
        due = step % args.eval_interval == 0 or step == args.max_iters
        if due and (step > start or saved and step > 0 and saved["info"]["val_loss"] is None):      # the latter: stopped just before it
            loss, bpb = data.evaluate(model, autocast, args.eval_tokens)
            check(loss, step)
            say(f"step {step:5d}/{args.max_iters}  validation loss {loss:.4f} nats per token, {bpb:.4f} bits per byte", flush=True)
            record(step=step, val_loss=loss, val_bpb=bpb, seconds=seconds + time.perf_counter() - begun)
            if loss < best:
                best = loss
                save("model.pt", step, loss, bpb)
            save("train.pt", step, loss, bpb)
            marked = time.perf_counter()
        if args.similarity_every and (step > start or not saved) and (step % args.similarity_every == 0 or step == args.max_iters) and rank == 0:
            record(step=step, similarity=[[round(value, 4) for value in row] for row in similarity.layer_similarity(model.eval(), alike).tolist()])
            model.train()
            marked = time.perf_counter()
        if step == args.max_iters:
            break

        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        if config.dropout:
            torch.manual_seed(((args.seed << 40) + (step << 12) + rank) % 2**63)
        per_part = args.batch_size // parts
        for micro in range(args.gradient_accumulation_steps):
            part = rank * args.gradient_accumulation_steps + micro
            x, y = data.batch(step, args.seed, args.batch_size, config.block_size, rows=slice(part * per_part, (part + 1) * per_part))
            last = micro == args.gradient_accumulation_steps - 1
            with autocast, nullcontext() if world == 1 or last else forward.no_sync():
                _, loss = forward(x.to(where), y.to(where))
                (loss / args.gradient_accumulation_steps).backward()
            losses.append(loss.detach())
        if args.grad_clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1

        stop_now = world == 1 and stopped
        if step % args.log_interval == 0 or step == args.max_iters or stop_now:
            loss = everywhere(sum(losses) / len(losses), dist.ReduceOp.SUM)
            now = time.perf_counter()
            speed = len(losses) * per_part * world * config.block_size / (now - marked)
            left = (args.max_iters - step) * (now - begun) / (step - start)
            say(f"step {step:5d}/{args.max_iters}  loss {loss:.4f}  {speed:,.0f} tokens/s  {clock(left)} left", flush=True)
            record(step=step, loss=loss, tokens_per_s=round(speed))
            losses, marked = [], now
            check(loss, step)
            if everywhere(len(stopped), dist.ReduceOp.MAX):
                save("train.pt", step)
                say(f"stopped at step {step} and saved; go on with: python train.py --resume --out_dir={out}", flush=True)
                return 128 + (stopped or [signal.SIGINT])[0]

    say(f"done in {clock(seconds + time.perf_counter() - begun)}; {out}/model.pt has the best validation loss, {best:.4f} nats per token. "
        f"Next: python sample.py", flush=True)
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    command(main)
