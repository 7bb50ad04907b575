"""Train a GPT on Shakespeare, with or without shared attention.

    python train.py                         full attention, saved in out/full
    python train.py --share=1-3             Shared Attention, saved in out/weights-1-3
    python train.py --share=1-3 --resume    continue that run, if it was interrupted
    torchrun --standalone --nproc_per_node=2 train.py       two processes, half of each batch for each

Without other flags it uses the preset for your hardware: a model that trains in one or two minutes on a
laptop's CPU, or a larger one on a GPU. --preset=long trains the CPU's model three times as long.
"""

import minisa  # isort: skip  # noqa: F401 (before torch, as it sees to Ctrl-C)
import math
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel

from minisa.kit import checkpoint, cli, machine
from minisa.kit.cli import amount, command, count, whole
from minisa.kit.data import tokenize
from minisa.kit.files import reading
from minisa.kit.run import STATE, Processes, Progress, Run, clock, open_run, restore_optimizer
from minisa.model import GPT, GPTConfig

# ---- settings ----

@dataclass
class Settings:
    """Each field is a flag, as --n_layer=6, and its comment is the help text. A `count` is an int from 1
    up, `whole` an int from 0 up, an `amount` a float from 0 up. The defaults are the preset for a CPU: a
    minute or two on two cores. The other presets, in PRESETS, change some of them."""
    preset: Literal["cpu", "gpu", "long", "tinyshakespeare"] = None # preset to start from; default: by device

    # the model: heads of 32 numbers, and with 4 layers a million parameters
    n_layer: count = 4                      # number of layers
    n_head: count = 4                       # number of query heads
    n_kv_head: count = None                 # number of key/value heads; default: as many as query heads
    n_embd: count = 128                     # width of the model, in numbers per token
    n_hidden: count = None                  # width of the MLP, in numbers per token; default: 8/3 n_embd
    block_size: count = 128                 # context, in tokens; with --init_from at most 512 unless given
    share: str = ""                         # spans that share attention, as 1-3 or 1-3,5-7; default: none
    share_kind: checkpoint.kind = "weights" # weights (Shared Attention), kv (Cross-Layer), top-64 or your own
    dropout: amount = 0.0                   # fraction of activations dropped in training
    rope_base: amount = 10000.0             # base of RoPE's wavelengths
    norm_eps: amount = 1e-5                 # epsilon added to the mean square in RMSNorm
    init_from: str = ""                     # folder, .gguf or smollm2 to start from; default: random weights

    # the text
    text: str = ""                          # UTF-8 file to train on; default: plays of Shakespeare
    tokenizer: Literal["bpe", "gpt2"] = "bpe"   # bpe is learned on the text, gpt2 is downloaded
    vocab_size: count = 1024                # number of tokens that bpe learns; 256 means raw bytes

    # training: in a short run, many small steps work best; a high rate needs a long warm-up, and noisy
    # gradients need longer averaging (beta2)
    batch_size: count = 8                   # sequences per step, over all processes and micro-batches
    gradient_accumulation_steps: count = 1  # micro-batches, the parts a batch is read in to save memory
    max_iters: whole = 2000                 # number of steps; 0 saves the untrained model
    learning_rate: amount = 2e-3            # peak learning rate
    min_lr: amount = 0.0                    # learning rate that it falls to at the end
    warmup_iters: count = 500               # warm-up steps, in which the learning rate rises
    weight_decay: amount = 0.3              # AdamW weight decay, matrices only
    beta1: amount = 0.9                     # AdamW decay rate of the gradient average, per step
    beta2: amount = 0.99                    # AdamW decay rate of the squared-gradient average, per step
    grad_clip: amount = 1.0                 # largest norm of the gradient; 0: no clipping
    seed: whole = 1337                      # random seed for weights, batches and dropout

    # the machine
    dtype: Literal["float32", "bfloat16"] = None # number format for matrix products; default: faster one here
    device: cli.device = None               # cpu, cuda, cuda:1 or mps; default: the fastest there is
    compile: bool = False                   # compile the model with torch.compile

    # the run
    out_dir: str = None                     # folder of the run; default: named for its settings, as out/full
    data_dir: str = None                    # folder where the tokenized text is kept; default: data/
    eval_interval: count = 500              # steps between evaluations, which also save the run
    eval_tokens: whole = None               # validation tokens read, 0: all; default: 20,000, at the end all
    log_interval: count = 50                # steps between log lines
    keep_every: whole = 0                   # also keep a model every N steps, in out_dir/steps; 0: none
    resume: bool = False                    # continue a run: repeat its command with --resume
    overwrite: bool = False                 # rename an existing out_dir to out_dir.old and start over

PRESETS = {
    "cpu": {},                      # the defaults above
    "gpu": {                        # the shape of nanoGPT's Shakespeare recipe
        "n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256,
        "dropout": 0.2,             # each token is seen fifteen times
        "batch_size": 64, "max_iters": 1500, "eval_interval": 250,
        "learning_rate": 1e-3, "warmup_iters": 100, "weight_decay": 0.1},
    # three times as many steps, for the tables of the pages: each token is seen four times
    "long": {"max_iters": 6000, "learning_rate": 2.5e-3, "warmup_iters": 1000},
    # With --text=FILE, the original Tiny Shakespeare: on two cores, reaches a lower loss than nanoGPT's
    # 1.4697 nats per character (three minutes on an A100) in two to five minutes.
    "tinyshakespeare": {
        "n_layer": 4, "n_head": 5,  # heads of 32 numbers
        "n_embd": 160,              # as good as 6 layers of 144 after as many steps, in 5/6 of the time
        "block_size": 128,
        "share": "1-3",             # faster; for what this costs a similar model, see the lab
        "dropout": 0.1,             # each token is seen eight times
        "batch_size": 8,            # batches of 16 for half the steps do worse
        "max_iters": 3000, "eval_interval": 1000,
        "learning_rate": 2e-3, "warmup_iters": 300, "weight_decay": 0.1,
        "beta2": 0.95},             # forgets old gradients sooner
}
EVAL_TOKENS = 20_000        # per evaluation during training; then Run.finish() reads all for the best model

# the settings that are fields of a GPTConfig, and those that the model of --init_from has settled
SHAPE = ["n_layer", "n_head", "n_kv_head", "n_embd", "n_hidden", "block_size", "share", "share_kind",
         "dropout", "rope_base", "norm_eps"]
FIXED_BY_MODEL = {*SHAPE, "tokenizer", "vocab_size"} - {"share", "share_kind", "dropout", "block_size"}

# ---- data and model ----

def read_parent(settings, given):
    """→ the model of --init_from, with the settings that it leaves free, and its tokenizer."""
    model, tokenizer, _ = checkpoint.load(settings.init_from)
    clash = sorted(given.keys() & FIXED_BY_MODEL)
    if clash:
        raise ValueError(f"--{clash[0]}: {settings.init_from} brings its own; drop the flag")
    changed = {"dropout": settings.dropout, "block_size": settings.block_size}
    if "block_size" not in given:
        changed["block_size"] = min(model.config.block_size, 512)
    if settings.share:
        changed |= {"share": settings.share, "share_kind": settings.share_kind}
    return checkpoint.reconfigure(model, **changed), tokenizer

def make_model(settings, given, saved, processes):
    """→ the model, and the Data that it is trained on."""
    model = tokenizer = None
    if saved:
        model, tokenizer = saved.model, saved.tokenizer
    elif settings.init_from:
        model, tokenizer = read_parent(settings, given)
    else:                                               # a wrong shape is refused before the download
        shape = {name: getattr(settings, name) for name in SHAPE}
        config = GPTConfig(vocab_size=settings.vocab_size, **shape)
    own = tokenizer if settings.init_from else None     # None: a new one, see --tokenizer
    with processes.first():
        data = tokenize(settings.text, settings.tokenizer, settings.vocab_size, own, settings.data_dir)
    if saved and data.digest != saved.info["data_digest"]:
        raise ValueError(f"the text is not the one that the run was trained on ({saved.info['data']}); give "
                         "it with --text=FILE, or start a new run without --resume")
    torch.manual_seed(settings.seed)
    if model is None:
        config.vocab_size = data.tokenizer.vocab_size   # gpt2 has 50,257; bpe may learn fewer on a short text
        machine.refuse_too_large(config, rows_of(settings, processes), processes.device, settings.dtype)
        model = GPT(config)
    if len(data.train) <= model.config.block_size:
        raise ValueError(f"--block_size={model.config.block_size}: the training text has only "
                         f"{len(data.train)} tokens; take a smaller one, or more text")
    return model.to(processes.device).train(), data

def rows_of(settings, processes):
    """→ how many sequences of a batch a process reads at once."""
    parts = processes.world * settings.gradient_accumulation_steps
    if settings.batch_size % parts:
        raise ValueError(f"--batch_size={settings.batch_size}: must be a multiple of "
                         f"processes × gradient_accumulation_steps = {parts}")
    return settings.batch_size // parts

# ---- optimizer ----

def make_optimizer(settings, model):
    """AdamW, with weight decay for the matrices of Linear and Embedding only."""
    decayed = {part.weight for part in model.modules() if isinstance(part, (nn.Linear, nn.Embedding))}
    matrices = [p for p in model.parameters() if p in decayed]
    others = [p for p in model.parameters() if p not in decayed]
    groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    betas = settings.beta1, settings.beta2
    return torch.optim.AdamW(groups, betas=betas, weight_decay=settings.weight_decay, fused=True)

def learning_rate(step, settings):
    """Warm-up in a straight line, then half a cosine down to min_lr."""
    if step < settings.warmup_iters:
        return settings.learning_rate * (step + 1) / settings.warmup_iters
    done = (step - settings.warmup_iters) / (settings.max_iters - settings.warmup_iters)    # 0 to 1
    falling = (1 + math.cos(math.pi * done)) / 2        # from 1 to 0
    return settings.min_lr + (settings.learning_rate - settings.min_lr) * falling

# ---- loop ----

def evaluate(settings, run):
    """Log the loss on --eval_tokens of validation text and save the run; if it is the best, the model too."""
    tokens = EVAL_TOKENS if settings.eval_tokens is None else settings.eval_tokens
    loss, bpb = run.data.evaluate(run.model, tokens)
    run.refuse_nan(loss)
    progress = run.progress
    run.processes.say(f"step {progress.step:5d}/{settings.max_iters}  validation loss {loss:.4f} nats per "
                      f"token, {bpb:.4f} bits per byte")
    run.record(val_loss=loss, val_bpb=bpb, seconds=run.elapsed())
    progress.evaluated = progress.step
    if progress.best is None or loss < progress.best:
        progress.best = loss
        run.save_model(loss, bpb)
    run.save_state()

def train_step(settings, run, forward, autocast):
    """One step of the optimizer, on this process's part of the batch, in micro-batches."""
    step, processes = run.progress.step, run.processes
    rows, n_micro = rows_of(settings, processes), settings.gradient_accumulation_steps
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(step, settings)
    if settings.dropout:                                        # after --resume, the same is dropped
        seed = (settings.seed << 40) + (step << 12) + processes.rank    # rank: the number of this process
        torch.manual_seed(seed % 2**63)
    for micro in range(n_micro):
        first = rows * (processes.rank * n_micro + micro)
        x, y = run.data.batch(step, settings.seed, settings.batch_size, run.model.config.block_size,
                              slice(first, first + rows))       # (rows, block_size) each
        more = processes.world > 1 and micro + 1 < n_micro      # gradients are not complete yet
        with autocast, forward.no_sync() if more else nullcontext():
            _, loss = forward(x.to(processes.device), y.to(processes.device))
            (loss / n_micro).backward()
        run.meter.add(loss.detach(), tokens=x.numel() * processes.world)
    if settings.grad_clip:
        nn.utils.clip_grad_norm_(run.model.parameters(), settings.grad_clip)
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.progress.step += 1

def save_if_due(settings, run):
    """Evaluate and save every eval_interval steps and at the end; likewise keep a model every keep_every."""
    step = run.progress.step
    at_end = step == settings.max_iters
    due = at_end or (step > 0 and step % settings.eval_interval == 0)
    with run.meter.paused():
        if due and run.progress.evaluated != step:              # not once more after --resume
            evaluate(settings, run)
        if settings.keep_every and (at_end or step % settings.keep_every == 0):
            run.save_model(name=f"steps/{step:08d}")

def train(settings, run, forward, autocast):
    """Step, log, evaluate and save until the last step, or a signal. → an exit status"""
    progress, last_step, alone = run.progress, settings.max_iters, run.processes.world == 1
    status = 0
    while not status:
        save_if_due(settings, run)
        if progress.step == last_step:
            break
        train_step(settings, run, forward, autocast)
        to_log = progress.step % settings.log_interval == 0 or progress.step == last_step
        if to_log or (run.signals.sent and alone):              # several processes check only at log lines
            run.meter.log(run, last_step)
            status = run.stop()
    return status

# ---- the whole run: its settings, what it continues, and its parts in order ----

NOT_SAVED = {"device", "compile", "resume", "overwrite"}
FREE = NOT_SAVED | {        # what may differ when a run is continued
    "out_dir", "text", "data_dir", "eval_interval", "eval_tokens", "log_interval", "keep_every"}

def settle(given, device):
    """Merge defaults, preset, and what was given. → Settings"""
    preset = given.get("preset") or ("cpu" if device.type == "cpu" else "gpu")
    settings = Settings(**{**PRESETS[preset], **given})
    settings.preset, settings.device = preset, device
    for name in ("beta1", "beta2"):
        if getattr(settings, name) >= 1:
            raise ValueError(f"--{name}={getattr(settings, name)}: must be below 1")
    return settings

def folder_of(settings, given):
    """The folder of a run, by default named for its settings: out/weights-1-3 with --share=1-3."""
    if settings.out_dir:
        return Path(settings.out_dir)
    parts = [f"{settings.share_kind}-{settings.share}" if settings.share else "full"]
    if settings.n_kv_head:
        parts.append(f"kv{settings.n_kv_head}")
    if settings.init_from:
        parts.append(f"from-{Path(settings.init_from).resolve().name.removesuffix('.gguf')}")
    if "preset" in given:
        parts.append(settings.preset)
    return Path("out", "-".join(parts))

def flags_of(settings):
    """Settings → the flags that --resume reads again."""
    return [f"--{name}={value}" for name, value in asdict(settings).items()
            if name not in NOT_SAVED and value is not None]

def continued(given, saved, folder):
    """Merge the flags of this command with those Saved in a run's folder. Raises ValueError if they
    conflict."""
    with reading(folder / STATE, "not the state of a run", "start a new run"):
        before = cli.read_settings(Settings, [*saved.settings])
        if not 0 <= saved.progress.step <= before["max_iters"]:
            raise ValueError(f"step {saved.progress.step}")
    for name in given.keys() - FREE:
        if given[name] != before.get(name):
            raise ValueError(f"--{name}={given[name]}: the run in {folder} was started with "
                             f"{before.get(name)!r}; drop the flag, or start a new run without --resume")
    return {**before, **given}

def prepare(settings, model, data, processes):
    """→ the callable that computes the loss, and the context to run it in."""
    # on a CPU in bfloat16, this also makes every layer form P: its fused kernel is slow
    autocast = machine.number_format(model, settings.dtype)
    forward = model
    if settings.compile:
        batch = data.batch(0, settings.seed, rows_of(settings, processes), model.config.block_size)
        forward, seconds = machine.compiled(model, *(part.to(processes.device) for part in batch), autocast)
        processes.say(f"compiled in {clock(seconds)}")
    if processes.world > 1:
        forward = DistributedDataParallel(forward)
    return forward, autocast

def describe(settings, folder, model, data, processes):
    config, n_params = model.config, sum(p.numel() for p in model.parameters())
    shared = f"{config.share_kind} {config.share}" if config.share else "nothing"
    processes.say(f"{folder}: {config.n_layer} layers, {config.n_embd} wide, context {config.block_size}, "
                  f"sharing {shared}; {n_params:,} parameters; {len(data.train):,} training tokens; "
                  f"{processes.device.type}, {settings.dtype}")

def main():
    # what was asked for, and where it runs
    usage = "python train.py [--FLAG=VALUE ...]"
    given = cli.read_settings(Settings, None, __doc__, usage, PRESETS["gpu"])
    device, no_gpu = (given["device"], "") if "device" in given else machine.choose_device()
    processes = Processes(device)                           # one, or several started by torchrun
    settings = settle(given, device)
    folder = folder_of(settings, given)
    with open_run(folder, processes, settings.resume, settings.overwrite) as saved:

        # settings are merged again with those saved, which can be read only once the folder is known
        if saved:
            settings = settle(continued(given, saved, folder), device)
        settings.dtype = settings.dtype or machine.choose_dtype(device, settings.init_from)
        rows_of(settings, processes)                        # fail early

        # what is trained, on what, and by what
        model, data = make_model(settings, given, saved, processes)
        optimizer = make_optimizer(settings, model)
        if saved:
            restore_optimizer(optimizer, saved.moments, folder / STATE)
        forward, autocast = prepare(settings, model, data, processes)

        # the run; before this, nothing was written to its folder
        describe(settings, folder, model, data, processes)
        if no_gpu:
            processes.say(f"on the CPU, as no GPU can be used: {no_gpu}")
        progress = saved.progress if saved else Progress()
        run = Run(folder, processes, model, data, optimizer, flags_of(settings), progress)
        run.begin(new=not saved)
        status = train(settings, run, forward, autocast)
        if status == 0 and processes.rank == 0:
            run.finish(whole=settings.eval_tokens is None)
    processes.close()
    return status

if __name__ == "__main__":
    command(main)
