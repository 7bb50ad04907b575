"""The settings of a training run: the flags of train.py, and a preset for each kind of machine."""

import argparse
import time
import warnings

import torch

from minisa.kit.cli import Parser, amount, at_least, count, device
from minisa.model import share_kind

# ---- presets: a flag given on the command line wins ----

CPU = {                         # a laptop: three minutes on two cores
    "n_layer": 4,               # the fewest in which a span leaves a full layer below it: 1-3
    "n_head": 4,
    "n_embd": 128,              # heads of 32 numbers; with 4 layers a million parameters
    "block_size": 128,          # some 330 characters: a speech
    "batch_size": 8,            # 1,024 tokens: small steps, and many, learn most in three minutes
    "max_iters": 6000,
    "dropout": 0.0,             # each token is seen four times: too few to learn by heart
    "learning_rate": 2.5e-3,
    "warmup_iters": 1000,       # long, as the rate is high
    "weight_decay": 0.3,
    "beta2": 0.99,              # small steps have noisy gradients: a mean over more of them
    "eval_interval": 500,
}
GPU = {                         # one GPU: the shape of nanoGPT's Shakespeare recipe
    "n_layer": 6,
    "n_head": 6,
    "n_embd": 384,
    "block_size": 256,
    "batch_size": 64,
    "max_iters": 1500,
    "dropout": 0.2,             # each token is seen sixty times
    "learning_rate": 1e-3,
    "warmup_iters": 100,
    "weight_decay": 0.1,
    "beta2": 0.99,
    "eval_interval": 250,
}
# With --text=FILE, the original Tiny Shakespeare: on two cores in two to five minutes below the
# 1.4697 nats per character that nanoGPT's recipe reaches on an A100 in three.
TINYSHAKESPEARE = {
    "n_layer": 4,
    "n_head": 5,                # heads of 32 numbers
    "n_embd": 160,              # as good as 6 layers of 144 after as many steps, in 5/6 of the time
    "share": "1-3",             # layers 1 to 3 attend with the same weights: faster, see the lab
    "block_size": 128,
    "batch_size": 8,            # half as many steps of 16 learn less
    "max_iters": 3000,
    "dropout": 0.1,             # each token is seen eight times
    "learning_rate": 2e-3,
    "warmup_iters": 300,
    "weight_decay": 0.1,
    "beta2": 0.95,              # forgets old gradients sooner
    "eval_interval": 1000,
}
PRESETS = {"cpu": CPU, "gpu": GPU, "tinyshakespeare": TINYSHAKESPEARE}

# ---- flags ----

PRESET = "the preset's"         # the default of a flag that all presets set
WHOLE = at_least(int, 0)
FLAGS = [                       # name, type or choices, default, what it is
    ("preset", [*PRESETS], None, "settings to start from; None: gpu where there is one, else cpu"),
    ("share", str, "", "spans of layers that share attention, as 1-3 or 1-3,5-7; '' for none"),
    ("share_kind", share_kind, "weights", "weights, kv (Cross-Layer Attention), or a kind in minisa/axes"),
    ("n_layer", at_least(int, 1, 1000), PRESET, "number of layers"),
    ("n_head", count, PRESET, "number of query heads"),
    ("n_kv_head", count, None, "number of key/value heads, None for as many as query heads"),
    ("n_embd", count, PRESET, "width of the model, in numbers per token"),
    ("n_hidden", count, None, "width of the MLP, in numbers per token, None for about 8/3 n_embd"),
    ("block_size", count, PRESET, "context, in tokens; with --init_from at most 512 unless given"),
    ("dropout", amount, PRESET, "fraction of activations dropped in training"),
    ("rope_base", amount, 10000.0, "base of RoPE's wavelengths"),
    ("norm_eps", amount, 1e-5, "what RMSNorm adds to the mean square"),
    ("text", str, "", "UTF-8 file to train on, '' for plays of Shakespeare, fetched if missing"),
    ("tokenizer", ["bpe", "gpt2"], "bpe", "bpe is learned on the text, gpt2 is downloaded"),
    ("vocab_size", count, 1024, "number of tokens that bpe makes; 256 for single bytes"),
    ("init_from", str, "", "folder, .gguf file or smollm2 to start from; '' for random weights"),
    ("batch_size", count, PRESET, "sequences per step, over all processes and micro-batches"),
    ("gradient_accumulation_steps", count, 1, "micro-batches of a step, to save memory"),
    ("max_iters", WHOLE, PRESET, "number of steps; 0 saves the untrained model"),
    ("learning_rate", amount, PRESET, "highest learning rate, per step"),
    ("min_lr", amount, 0.0, "learning rate of the last step"),
    ("warmup_iters", count, PRESET, "steps in which the learning rate rises"),
    ("weight_decay", amount, PRESET, "AdamW's, for matrices"),
    ("beta1", amount, 0.9, "AdamW's decay of the mean gradient, per step"),
    ("beta2", amount, PRESET, "AdamW's decay of its mean square, per step"),
    ("grad_clip", amount, 1.0, "largest norm of the gradient, 0 for any"),
    ("seed", WHOLE, 1337, "of weights, batches and dropout"),
    ("dtype", ["float32", "bfloat16"], None, "to multiply in, None for the faster one here"),
    ("device", device, None, "cpu, cuda, cuda:1 or mps, None for the fastest there is"),
    ("out_dir", str, None, "folder of the run, None for out/MODE"),
    ("data_dir", str, None, "folder of the token files, None for data/"),
    ("eval_interval", count, PRESET, "steps between evaluations, which also save the run"),
    ("eval_tokens", WHOLE, None, "validation tokens read, 0: all; None: 20,000, then all at last"),
    ("log_interval", count, 50, "steps between log lines"),
    ("keep_every", WHOLE, 0, "steps between models that are kept in out_dir/steps, 0 for none"),
]

def read_flags(doc):
    parser = Parser(doc, usage="python train.py [--FLAG=VALUE ...]")
    for name, kind, default, text in FLAGS:
        shown = repr(default)
        if default is PRESET:
            shown = f"{CPU[name]}, on a GPU {GPU[name]}"
        choices = kind if isinstance(kind, list) else None
        parser.flag(name, str if choices else kind, None, text, shown, choices)
    parser.switch("compile", "compile the model with torch.compile")
    parser.switch("resume", "go on from the last checkpoint of out_dir")
    parser.switch("overwrite", "replace a run that is in out_dir")
    return parser.parse_args()

def choose_device():
    """→ the fastest device that works here, and what is wrong with the others."""
    wrong = []
    with warnings.catch_warnings(record=True) as told:          # of a driver that is too old, say
        warnings.simplefilter("always")
        for name, backend in (("cuda", torch.cuda), ("mps", torch.backends.mps)):
            try:
                if backend.is_available():
                    return device(name), ""
            except argparse.ArgumentTypeError as error:
                wrong.append(str(error))
    wrong += [str(warning.message).partition("\n")[0] for warning in told]
    return torch.device("cpu"), "; ".join(wrong)

def faster_dtype():
    """"bfloat16" if this machine's CPU multiplies it 1.4 times as fast as float32, else "float32".
    One product is timed in each; the best of several, as other programs may be running."""
    seconds = {"float32": [], "bfloat16": []}
    for name in [*seconds] * 5:
        x = torch.ones(256, 256, dtype=getattr(torch, name))
        begun = time.perf_counter()
        x @ x
        seconds[name].append(time.perf_counter() - begun)
    return "bfloat16" if 1.4 * min(seconds["bfloat16"]) < min(seconds["float32"]) else "float32"

def choose_dtype(device, init_from):
    """→ the number format that trains faster; on a CPU, float32 for a model to go on from."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if fast else "float32"
    return faster_dtype() if device.type == "cpu" and not init_from else "float32"

def settle(args):
    """Fill in what was not given. → the names of the flags that were."""
    given = {name for name, *_ in FLAGS if getattr(args, name) is not None}
    args.no_gpu = ""
    if args.device is None:
        args.device, args.no_gpu = choose_device()
    args.preset = args.preset or ("cpu" if args.device.type == "cpu" else "gpu")
    for name, _, default, _ in FLAGS:
        if getattr(args, name) is None:
            setattr(args, name, PRESETS[args.preset].get(name, default))
    args.dtype = args.dtype or choose_dtype(args.device, args.init_from)
    for name in ("beta1", "beta2"):
        if getattr(args, name) >= 1:
            raise ValueError(f"--{name}={getattr(args, name)}: must be below 1")
    return given

def saved_settings(args):
    """What --resume must find again."""
    return {name: getattr(args, name) for name, *_ in FLAGS if name != "device"}

def check_settings(saved, file):
    """Raises ValueError unless saved settings are what flags could have said."""
    for name, kind, default, _ in FLAGS:
        value = saved.get(name)
        try:
            if name == "device":
                good = name not in saved
            elif value is None:
                good = default is None
            else:
                good = value in kind if isinstance(kind, list) else kind(str(value)) == value
        except (ValueError, argparse.ArgumentTypeError):
            good = False
        if not good:
            raise ValueError(f"{file}: damaged (its --{name} is {str(value)[:50]}); "
                             "start a new run")
