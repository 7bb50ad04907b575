"""What a training run is: its folder, its processes, its log, and how it is stopped and resumed.

    model.pt    the model at its best validation loss: what others load
    train.pt    the model of the last step, the optimizer's state, the settings: what --resume reads
    log.jsonl   a line of JSON for each log line and each evaluation
    steps/N/    with --keep_every, the model after step N
"""

import json
import math
import os
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist

from minisa import checkpoint
from minisa.files import write_file

class Processes:
    """The processes that train one model: this one alone, or those that torchrun started."""

    def __init__(self, device):
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.device = device
        if self.world > 1:
            if device.type == "cuda":
                self.device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}")
                torch.cuda.set_device(self.device)
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    def say(self, *text):
        if self.rank == 0:
            print(*text, flush=True)

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
    """The folder of a run; only process 0 writes. saved: what train.pt held, if it goes on."""

    def __init__(self, folder, resume, overwrite):
        self.folder, self.saved, self.lines = Path(folder), None, []
        self.step, self.best, self.seconds, self.evaluated = 0, math.inf, 0.0, None
        self.signal, self.begun = None, time.perf_counter()
        if resume:
            if not (self.folder / "train.pt").is_file():
                raise ValueError(f"{self.folder}: holds no run to --resume; name one by --out_dir")
            self.saved = checkpoint.read(self.folder / "train.pt")
            for name in ("step", "best", "seconds", "evaluated"):
                setattr(self, name, self.saved["progress"][name])
            self.lines = [line for line in read_log(self.folder) if line["step"] <= self.step]
        elif (self.folder / "train.pt").exists() and not overwrite:
            raise ValueError(f"{self.folder} already holds a run: --resume goes on with it, "
                             "--overwrite replaces it, --out_dir=FOLDER leaves it alone")

    def begin(self, processes, model, data, optimizer, settings):
        """From now on write, and note Ctrl-C and kill. An old run goes: the new one is in order."""
        self.processes, self.begun = processes, time.perf_counter()
        self.model, self.data, self.optimizer, self.settings = model, data, optimizer, settings
        if processes.rank == 0 and not self.saved:
            write_file(self.folder / "log.jsonl", b"")         # refused now if it cannot be written
            for old in (*self.folder.glob("steps/*/model.pt"), self.folder / "train.pt",
                        self.folder / "model.pt"):
                old.unlink(missing_ok=True)

        def stop(signum, _):
            self.signal = signum
            signal.signal(signum, signal.SIG_DFL)       # a second one stops at once

        signal.signal(signal.SIGINT, stop)
        signal.signal(signal.SIGTERM, stop)

    def elapsed(self):
        """Seconds of training, those before a resume included."""
        return self.seconds + time.perf_counter() - self.begun

    def record(self, **line):
        """Add a line to the log."""
        self.lines.append(line)
        if self.processes.rank == 0:
            text = "".join(json.dumps(line) + "\n" for line in self.lines)
            write_file(self.folder / "log.jsonl", text.encode())

    def save(self, name, loss=None, bpb=None, **more):
        """Write the model as FOLDER/name, for others to load."""
        if self.processes.rank == 0:
            info = {"step": self.step, "val_loss": loss, "val_bpb": bpb,
                    "data": str(self.data.folder), "seconds": self.elapsed()}
            checkpoint.save(self.folder / name, self.model, self.data.tokenizer, info, **more)

    def save_last(self):
        """Write train.pt, from which the run can go on."""
        progress = {"step": self.step, "best": self.best, "seconds": self.elapsed(),
                    "evaluated": self.evaluated}
        self.save("train.pt", optimizer=self.optimizer.state_dict(), settings=self.settings,
                  progress=progress)

    def stop(self):
        """Save and say so if any process was sent a signal. → the exit status then, else 0."""
        sent = int(self.processes.maximum(self.signal or 0))
        if sent:
            self.save_last()
            self.processes.say(f"stopped at step {self.step} and saved; go on with: "
                               f"python train.py --resume --out_dir={self.folder}")
        return 128 + sent if sent else 0

    def refuse_nan(self, loss):
        if not math.isfinite(loss):
            raise ValueError(f"the loss is {loss} at step {self.step}; {self.folder} keeps its "
                             "last good checkpoint. Try a lower --learning_rate, or --grad_clip=1")

def read_log(folder):
    """The lines of a run's log, as dicts."""
    file = Path(folder) / "log.jsonl"
    try:
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    except ValueError as error:
        raise ValueError(f"{file}: no log of minisa ({error}); delete it to go on") from None

class Meter:
    """Losses and tokens between two log lines."""

    def __init__(self, first_step, last_step):
        self.first, self.last, self.begun = first_step, last_step, time.perf_counter()
        self.restart()

    def restart(self):
        self.losses, self.tokens, self.marked = [], 0, time.perf_counter()

    def pause(self, work, *args):
        """work(*args), whose time does not count as training."""
        started = time.perf_counter()
        result = work(*args)
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
