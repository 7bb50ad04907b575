"""What a training run is: its folder, its processes, its log, and how it is stopped and continued.

    config.json, …      the model at its best validation loss, as minisa/kit/checkpoint.py has it
    train.safetensors   the model of the last step, the optimizer's state, the settings: what
                        --resume reads
    log.jsonl           a line of JSON for each log line and each evaluation
    steps/N/            with --keep_every, the model after step N
"""

import json
import math
import os
import shlex
import signal
import sys
import time
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from minisa.kit import checkpoint, llama
from minisa.kit.cli import silence
from minisa.kit.data import Data
from minisa.kit.files import clean, lock, reading, set_aside, write_file

STATE, LOG = "train.safetensors", "log.jsonl"

# ---- processes ----

class Processes:
    """The processes that train one model: this one alone, or those that torchrun started."""

    def __init__(self, device):
        rank = os.environ.get("RANK", "0")
        world = os.environ.get("WORLD_SIZE", "1")
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
        except OSError:                                 # output pipe closed or disk full: treat as Ctrl-C
            silence()
            signal.raise_signal(signal.SIGINT)

    def machine(self):
        """What the last bits of a result depend on, in words."""
        return (f"{torch.get_num_threads()} threads, {self.world} processes, {self.device.type}, "
                f"torch {torch.__version__}")

    @contextmanager
    def first(self):
        """Process 0 runs the block alone, then the others do, and find what it wrote. If it fails in
        process 0, which says why, the others exit too."""
        if self.rank > 0 and self.maximum(0):
            sys.exit(2)
        failed = 1
        try:
            yield
            failed = 0
        finally:
            if self.rank == 0:
                self.maximum(failed)

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

# ---- the folder ----

@dataclass
class Progress:
    """How far a run has come."""
    step: int = 0
    best: float | None = None       # validation loss of the best model so far, in nats per token
    evaluated: int | None = None    # the step that was evaluated last
    seconds: float = 0.0            # of training, before it was continued
    log: str = ""                   # all of log.jsonl
    machine: str = ""               # on which the run was started

SAVED = {"info": checkpoint.INFO, "progress": Progress.__annotations__}

@dataclass
class Saved:
    """What train.safetensors holds."""
    model: torch.nn.Module
    tokenizer: object
    moments: dict                   # the optimizer's tensors
    settings: list                  # as flags of train.py
    progress: Progress
    info: dict

def read_state(folder):
    """→ the Saved run of a folder. Raises ValueError if there is none, or it is damaged."""
    file = Path(folder) / STATE
    if not file.is_file():
        raise ValueError(f"{folder}: holds no run to --resume; repeat the run's command with --resume, or "
                         "name its --out_dir")
    model, tokenizer, moments, known = checkpoint.read_training(file, SAVED)
    progress = Progress(**known["progress"])
    return Saved(model, tokenizer, moments, known["settings"], progress, known["info"])

def restore_optimizer(optimizer, moments, file):
    """Give a new optimizer its saved tensors. Raises ValueError if they are not of its shapes."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    expected, state = {}, {}
    if moments:                                             # none before step 1
        for i, p in enumerate(params):
            expected |= {f"{i}.step": torch.zeros(()), f"{i}.exp_avg": p, f"{i}.exp_avg_sq": p}
    with reading(file, "the state of another run", "start a new run"):
        moments = llama.take_all(moments, expected)
    for name, t in moments.items():
        i, _, name = name.partition(".")
        state.setdefault(int(i), {})[name] = t
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})

@contextmanager
def open_run(folder, processes, resume, overwrite):
    """Keep other programs from writing to a run's folder until the context ends; process 0 holds the lock
    for all. → what is Saved there, to resume it, else None. Raises ValueError if there is no run to
    resume, or something that a new one may not set aside."""
    with ExitStack() as held:
        with processes.first():
            if processes.rank == 0:
                held.enter_context(lock(folder))
            there = os.listdir(folder) if os.path.lexists(folder) else []
            if there and not resume and not overwrite:
                raise ValueError(f"{folder} already holds a run, or other files: --resume continues it, "
                                 "--overwrite sets it aside, --out_dir=FOLDER leaves it alone")
            saved = read_state(folder) if resume else None
        yield saved

class Signals:
    """From when it is made, Ctrl-C and kill are noted, and the program goes on."""

    def __init__(self):
        self.sent = None                                # the signal
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.note)

    def note(self, number, frame):
        self.sent = number
        signal.signal(number, signal.SIG_DFL)           # a second one stops at once

@dataclass
class Run:
    """A run: what is trained, and the folder that process 0 writes."""
    folder: Path
    processes: Processes
    model: torch.nn.Module
    data: Data
    optimizer: torch.optim.Optimizer
    settings: list                  # as flags of train.py
    progress: Progress

    def begin(self, new):
        """Take over the folder: set aside what is in the way of a new run, and clean up after one that
        was killed. From now on, note Ctrl-C and kill instead of ending at once."""
        self.begun = time.perf_counter()
        self.meter = Meter(self.progress.step)
        before, now = self.progress.machine, self.processes.machine()
        if before and before != now:
            self.processes.say(f"begun with {before}; now {now}: the result will not be the same to the "
                               "last bit")
        self.progress.machine = now
        if self.processes.rank == 0:
            if new and self.folder.is_dir() and os.listdir(self.folder):
                print(f"{self.folder} is now {set_aside(self.folder)}", flush=True)
            clean(self.folder, [*checkpoint.FILES, STATE, LOG])
        self.signals = Signals()

    def elapsed(self):
        """Seconds of training, including those before the run was continued."""
        return self.progress.seconds + time.perf_counter() - self.begun

    def record(self, **line):
        """Add a line to the log."""
        line = {"step": self.progress.step, **line}
        self.progress.log += json.dumps(line) + "\n"
        if self.processes.rank == 0:
            write_file(self.folder / LOG, self.progress.log.encode())

    def info(self, loss=None, bpb=None):
        """What is known about the model at this point."""
        return {"step": self.progress.step, "val_loss": loss, "val_bpb": bpb,
                "data": str(self.data.folder), "data_digest": self.data.digest,
                "seconds": self.elapsed()}

    def save_model(self, loss=None, bpb=None, name=""):
        """Write the model for others to load, into the folder `name` of this one."""
        if self.processes.rank == 0:
            info = self.info(loss, bpb)
            checkpoint.save(self.folder / name, self.model, self.data.tokenizer, info)

    def save_state(self):
        """Write what the run can be continued from."""
        if self.processes.rank == 0:
            info = self.info()
            info["data"] = checkpoint.relative(info["data"], self.folder)
            progress = {**asdict(self.progress), "seconds": self.elapsed()}
            checkpoint.save_training(self.folder / STATE, self.model, self.data.tokenizer, self.optimizer,
                                     info=info, settings=self.settings, progress=progress)

    def finish(self, whole):
        """Say where the best model is; whole: store its loss on all of the validation text with it."""
        model, tokenizer, info = checkpoint.load(self.folder, device=self.processes.device)
        if whole:
            info["val_loss"], info["val_bpb"] = self.data.evaluate(model)
            checkpoint.save(self.folder, model, tokenizer, info)
        name = shlex.quote(self.folder.as_posix())
        text = "all validation text" if whole else "the validation text that was read"
        print(f"done in {clock(self.elapsed())}; the best model, of step {info['step']}, is in "
              f"{self.folder}. On {text}: {info['val_loss']:.4f} nats per token, "
              f"{info['val_bpb']:.4f} bits per byte. Next: python sample.py {name}", flush=True)

    def stop(self):
        """If any process was sent a signal, save and say so. → the exit status in that case, else 0."""
        sent = int(self.processes.maximum(self.signals.sent or 0))
        if not sent:
            return 0
        self.save_state()
        self.processes.say(f"stopped at step {self.progress.step} and saved; continue with: "
                           f"python train.py --resume --out_dir={shlex.quote(self.folder.as_posix())}")
        return 128 + sent

    def refuse_nan(self, loss):
        if not math.isfinite(loss):
            kept = "nothing was saved yet"
            if (self.folder / STATE).exists():
                kept = f"{self.folder} keeps its last good checkpoint"
            raise ValueError(f"the loss is {loss} at step {self.progress.step}; {kept}. Try a lower "
                             "--learning_rate, or --grad_clip=1")

# ---- speed ----

class Meter:
    """Losses and tokens between two log lines."""

    def __init__(self, first_step):
        self.first, self.begun = first_step, time.perf_counter()
        self.restart()

    def restart(self):
        self.losses, self.tokens = [], 0
        self.marked = time.perf_counter()

    @contextmanager
    def paused(self):
        """Within it, time does not count as training."""
        started = time.perf_counter()
        yield
        self.marked += time.perf_counter() - started

    def add(self, loss, tokens):
        self.losses.append(loss)
        self.tokens += tokens

    def log(self, run, last_step):
        """Print and log the mean loss and the speed since the last log line."""
        now, step = time.perf_counter(), run.progress.step
        loss = run.processes.mean(sum(self.losses) / len(self.losses))
        speed = self.tokens / (now - self.marked)
        seconds_per_step = (now - self.begun) / (step - self.first)
        left = seconds_per_step * (last_step - step)
        run.processes.say(f"step {step:5d}/{last_step}  loss {loss:.4f}  "
                          f"{speed:,.0f} tokens/s  {clock(left)} left")
        run.record(loss=loss, tokens_per_s=round(speed))
        run.refuse_nan(loss)
        self.restart()

def clock(seconds):
    return f"{int(seconds) // 60}m{int(seconds) % 60:02d}s"
