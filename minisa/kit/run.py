"""What a training run is: its folder, its processes, its log, and how it is stopped and resumed.

    config.json, …      the model at its best validation loss, as minisa/kit/checkpoint.py has it
    train.safetensors   the model of the last step, the optimizer's state, the settings: what
                        --resume reads
    log.jsonl           a line of JSON for each log line and each evaluation
    steps/N/            with --keep_every, the model after step N

With --overwrite, what a former run left stays until the new run's first train.safetensors is in its
place.
"""

import ctypes
import json
import math
import os
import shlex
import signal
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

from minisa.cost import predict
from minisa.kit import checkpoint
from minisa.kit.cli import silence
from minisa.kit.files import clean, refuse_too_much, refuse_unwritable, write_file
from minisa.kit.settings import check_settings

STATE = "train.safetensors"
SAVED = {                       # in it, besides model, tokenizer and optimizer
    "info": checkpoint.INFO,
    "settings": dict,
    "progress": {"step": int, "best": float | None, "seconds": float, "evaluated": int | None,
                 "log": str, "machine": str},
}

class Processes:
    """The processes that train one model: this one alone, or those that torchrun started."""

    def __init__(self, device):
        rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
            raise ValueError(f"RANK={rank}, WORLD_SIZE={world}: are not what torchrun sets; unset both, or "
                             "start with torchrun")
        self.rank, self.world = int(rank), int(world)
        self.device = device
        if self.world > 1:
            if device.type == "cuda":
                self.device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}")
                torch.cuda.set_device(self.device)
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    def say(self, *text):
        try:
            if self.rank == 0:
                print(*text, flush=True)
        except OSError:                                 # nobody reads on, or a full disk: as Ctrl-C
            silence()
            signal.raise_signal(signal.SIGINT)

    def machine(self):
        """What the last bits of a result depend on, in words."""
        return (f"{torch.get_num_threads()} threads, {self.world} processes, {self.device.type}, "
                f"torch {torch.__version__}")

    def first_then_all(self, make):
        """make() in process 0, then in the others, which find what it wrote."""
        if self.rank > 0:
            dist.barrier()
        made = make()
        if self.rank == 0 and self.world > 1:
            dist.barrier()
        return made

    def mean(self, value):
        return self.reduce(value, dist.ReduceOp.SUM) / self.world

    def maximum(self, value):
        return self.reduce(value, dist.ReduceOp.MAX)

    def reduce(self, value, how):
        if self.world == 1:
            return float(value)
        value = torch.tensor(float(value), device=self.device)
        dist.all_reduce(value, how)
        return float(value)

    def close(self):
        if self.world > 1:
            dist.destroy_process_group()

class Run:
    """The folder of a run; only process 0 writes. saved: its state, if it goes on."""

    def __init__(self, folder, resume, overwrite):
        self.folder, self.saved, self.overwrite = Path(folder), None, overwrite
        self.step, self.best, self.seconds, self.evaluated = 0, math.inf, 0.0, None
        self.log, self.former = "", []
        self.signal, self.begun = None, time.perf_counter()
        refuse_unwritable(self.folder / STATE)
        if resume:
            self.restore(self.folder / STATE)
        else:
            self.find_former()

    def restore(self, file):
        if not file.is_file():
            raise ValueError(f"{self.folder}: holds no run to --resume; name one by --out_dir")
        self.read = stamp(file)
        self.restored_model, self.tokenizer, self.moments, self.saved = checkpoint.read_training(file, SAVED)
        progress, settings = self.saved["progress"], self.saved["settings"]
        check_settings(settings, file)
        if not 0 <= progress["step"] <= settings["max_iters"]:
            raise ValueError(f"{file}: damaged (step {progress['step']}); start a new run")
        for name in ("step", "seconds", "evaluated", "log"):
            setattr(self, name, progress[name])
        self.best = math.inf if progress["best"] is None else progress["best"]

    def restore_optimizer(self, optimizer):
        """Give a new optimizer its restored state. Raises ValueError if it is not of its shapes."""
        params = [p for group in optimizer.param_groups for p in group["params"]]
        found, state, like = self.moments, {}, {"step": torch.zeros(())}
        expected = {f"{i}.{name}": t for i, p in enumerate(params)
                    for name, t in (like | {"exp_avg": p, "exp_avg_sq": p}).items()}
        try:
            checkpoint.check_tensors(found, expected if found else {})      # empty before step 1
        except ValueError as error:
            raise ValueError(f"{self.folder / STATE}: damaged ({error}); start a new run") from None
        for name, t in found.items():
            i, _, name = name.partition(".")
            state.setdefault(int(i), {})[name] = t
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})

    def find_former(self):
        """Note what a former run left. Raises ValueError if it is not to be replaced."""
        files = checkpoint.FILES
        names = [*files, STATE, "log.jsonl", *(f"steps/*/{name}" for name in files)]
        self.former = [path for name in names for path in self.folder.glob(name)]
        if self.former and not self.overwrite:
            raise ValueError(f"{self.folder} already holds a run or a model: --resume goes on with "
                             "it, --overwrite replaces it, --out_dir=FOLDER leaves it alone")

    def begin(self, processes, model, data, optimizer, settings):
        """From now on write, and note Ctrl-C and kill."""
        self.processes, self.begun = processes, time.perf_counter()
        self.model, self.data, self.optimizer, self.settings = model, data, optimizer, settings
        if not self.saved and processes.rank == 0:
            self.find_former()                          # once more, as the folder is locked now
        if self.saved and stamp(self.folder / STATE) != self.read:
            raise ValueError(f"{self.folder}: the run went on meanwhile, in another program; "
                             "--resume again")
        before = self.saved and self.saved["progress"]["machine"]
        if before and before != processes.machine():
            processes.say(f"begun with {before}; now {processes.machine()}: the result will not be "
                          "the same to the last bit")

        def stop(signum, _):
            self.signal = signum
            signal.signal(signum, signal.SIG_DFL)       # a second one stops at once

        for folder in (self.folder, *self.folder.glob("steps/*")) if processes.rank == 0 else ():
            clean(folder, [*checkpoint.FILES, STATE, "log.jsonl"])
        signal.signal(signal.SIGINT, stop)
        signal.signal(signal.SIGTERM, stop)

    def replace_former(self):
        """Put this run in the place of a former one: first its state, then the former goes."""
        former, self.former = self.former, []
        if former and self.processes.rank == 0:
            self.save_last()
            former.sort(key=lambda path: path.name != checkpoint.CONFIG)        # which makes it a model
            for path in former:
                if path.name != STATE:
                    path.unlink(missing_ok=True)
            self.write_log()

    def elapsed(self):
        """Seconds of training, those before a resume included."""
        return self.seconds + time.perf_counter() - self.begun

    def record(self, **line):
        """Add a line to the log."""
        self.log += json.dumps(line) + "\n"
        if self.processes.rank == 0 and not self.former:
            self.write_log()

    def write_log(self):
        write_file(self.folder / "log.jsonl", self.log.encode())

    def info(self, loss=None, bpb=None):
        """What is known of the model by now."""
        return {"step": self.step, "val_loss": loss, "val_bpb": bpb, "data": str(self.data.folder),
                "data_digest": self.data.digest, "seconds": self.elapsed()}

    def save(self, loss=None, bpb=None, name=""):
        """Write the model for others to load, into the folder `name` of this one."""
        self.replace_former()
        if self.processes.rank == 0:
            checkpoint.save(self.folder / name, self.model, self.data.tokenizer, self.info(loss, bpb))

    def save_last(self):
        """Write the state from which the run can go on."""
        self.replace_former()
        if self.processes.rank > 0:
            return
        progress = {"step": self.step, "best": self.best if self.best < math.inf else None,
                    "seconds": self.elapsed(), "evaluated": self.evaluated, "log": self.log,
                    "machine": self.processes.machine()}
        info = self.info()
        info["data"] = checkpoint.relative(info["data"], self.folder)
        checkpoint.save_training(self.folder / STATE, self.model, self.data.tokenizer, self.optimizer,
                                 info=info, settings=self.settings, progress=progress)

    def finish(self, whole):
        """Say where the best model is; whole: note in it its loss on all of the validation text."""
        model, tokenizer, info = checkpoint.load(self.folder, device=self.processes.device)
        if whole:
            info["val_loss"], info["val_bpb"] = self.data.evaluate(model)
            checkpoint.save(self.folder, model, tokenizer, info)
        text = "all validation text" if whole else "the validation text that was read"
        print(f"done in {clock(self.elapsed())}; the best model, of step {info['step']}, is in "
              f"{self.folder}. On {text}: {info['val_loss']:.4f} nats per token, "
              f"{info['val_bpb']:.4f} bits per byte. Next: python sample.py", flush=True)

    def stop(self):
        """Save and say so if any process was sent a signal. → the exit status then, else 0."""
        sent = int(self.processes.maximum(self.signal or 0))
        if sent:
            self.save_last()
            self.processes.say(f"stopped at step {self.step} and saved; go on with: "
                               f"python train.py --resume --out_dir={shlex.quote(str(self.folder))}")
        return 128 + sent if sent else 0

    def refuse_nan(self, loss):
        if not math.isfinite(loss):
            raise ValueError(f"the loss is {loss} at step {self.step}; {self.folder} keeps its "
                             "last good checkpoint. Try a lower --learning_rate, or --grad_clip=1")

def refuse_too_large(args, config):
    """Raises ValueError if what training needs at the very least is more than there is."""
    if args.device.type == "cpu":
        sequences = args.batch_size // args.gradient_accumulation_steps
        logits = sequences * config.block_size * config.vocab_size
        refuse_too_much(16 * predict(config, 1).params, "training a model of this shape")
        refuse_too_much(8 * logits, f"--batch_size={args.batch_size}")
        anchors = len(config.spans) if args.dtype == "float32" else config.n_layer     # that form P
        P = anchors * sequences * config.n_head * config.block_size**2
        refuse_too_much(8 * P, f"--block_size={config.block_size}: attention weights of this size")

def number_format(model, dtype):
    """Make a model ready to train in "float32" or "bfloat16" → the context to run it in."""
    device = next(model.parameters()).device.type
    if device == "cuda":
        torch.set_float32_matmul_precision("high")      # TF32, where the card has it
    model.fuse = dtype == "float32" or device != "cpu"  # a CPU's fused bfloat16 kernel is slow
    return torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")

def compiled(model, idx, targets, autocast):
    """→ the model compiled, by a first step on a batch, and the seconds which that took. Raises
    ValueError if torch.compile lacks what it needs."""
    warnings.filterwarnings("ignore", message=".*code generation for complex operators")
    forward, begun = torch.compile(model), time.perf_counter()
    try:
        with autocast:
            forward(idx, targets)[1].backward()
    except RuntimeError as error:
        why = " ".join(str(error).split())[:80]
        raise ValueError("--compile: torch.compile needs a C++ compiler, such as g++, and Python's "
                         f"headers; install them, or drop the flag ({why})") from None
    model.zero_grad(set_to_none=True)
    return forward, time.perf_counter() - begun

def keep_memory():
    """Ask glibc to keep freed memory. It returns large blocks to Linux and gets them anew in every
    step otherwise, which costs a fifth of the time on a CPU."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        ctypes.CDLL(None).mallopt(-3, 32 << 20)     # M_MMAP_THRESHOLD: up to 32 MB from the heap
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)    # M_TRIM_THRESHOLD: which is kept

def stamp(file):
    """What tells a file from another of its name."""
    status = os.stat(file)
    return status.st_ino, status.st_mtime_ns, status.st_size

class Meter:
    """Losses and tokens between two log lines."""

    def __init__(self, first_step, last_step):
        self.first, self.last, self.begun = first_step, last_step, time.perf_counter()
        self.restart()

    def restart(self):
        self.losses, self.tokens, self.marked = [], 0, time.perf_counter()

    def pause(self, work, *args, **more):
        """work(*args, **more), whose time does not count as training."""
        started = time.perf_counter()
        result = work(*args, **more)
        self.marked += time.perf_counter() - started
        return result

    def add(self, loss, tokens):
        self.losses.append(loss)
        self.tokens += tokens

    def log(self, run):
        """Print and log the mean loss and the speed since the last log line."""
        now, loss = time.perf_counter(), sum(self.losses) / len(self.losses)
        loss, speed = run.processes.mean(loss), self.tokens / (now - self.marked)
        left = (now - self.begun) / (run.step - self.first) * (self.last - run.step)
        run.processes.say(f"step {run.step:5d}/{self.last}  loss {loss:.4f}  "
                          f"{speed:,.0f} tokens/s  {clock(left)} left")
        run.record(step=run.step, loss=loss, tokens_per_s=round(speed))
        run.refuse_nan(loss)
        self.restart()

def clock(seconds):
    return f"{int(seconds) // 60}m{int(seconds) % 60:02d}s"
