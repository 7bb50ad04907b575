"""Write text with trained models, and bill each: parameters, loss, cache, FLOPs, speed; predicted and measured.

    python sample.py                          every run in out/
    python sample.py out/full out/weights-1-3 --prompt="ROMEO:" --temperature=0.8
    python sample.py out/full --share=1-3     weights trained with full attention, made to share (zero-shot)
    python sample.py smollm2 --share=26-28 --heads=mix --prompt="Once upon a time"
    python sample.py smollm2 --eigen_error=0.02 --squeeze=307      narrower keys and values, then fewer tokens
    python sample.py smollm2 --chat --store=out/chat               a chat that goes on where it was left
"""

import csv
import io
import itertools
import math
import sys
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

from data.prepare import prepare
from minisa import Parser, amount, at_least, checkpoint, command, count, device, eigen, plot, similarity, squeeze
from minisa.chat import chat
from minisa.cost import cost, measure
from minisa.data import Data, tokenize
from minisa.store import Store

COLUMNS = ["model", "sharing", "parameters", "val bpb", "cache B/token", "context", "cache B", "FLOPs/token", "tokens/s"]


def parse_args():
    parser = Parser(__doc__, usage="python sample.py [RUN ...] [--FLAG=VALUE ...]")
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUN", help="run folders, .gguf files, or smollm2, which is downloaded once (default every run in out/)")
    add("--share", metavar="STR", help="spans to share in models trained with full attention; each is then billed both ways (default as trained)")
    add("--share_kind", metavar="STR", help="with --share: weights (Shared Attention) or kv (Cross-Layer Attention) (default weights)")
    add("--heads", metavar="STR", help="with --share: whose weights a head of a reuse layer takes: same (the anchor's same head), match (the most alike) or mix (a mixture), fitted on the training text (default same)")
    add("--refit", action="store_true", help="refit the output projections of the layers that --share and --eigen change, on the training text (default off)")
    add("--eigen_rank", metavar="INT", type=count, help="Eigen Attention: numbers that each head keeps of each key and value (default all)")
    add("--eigen_error", metavar="FLOAT", type=amount, help="the same, but the least that leaves each layer's output this close to what it was, as a fraction (default off)")
    add("--squeeze", metavar="INT", type=count, help="SqueezeAttention: tokens that a layer keeps on average; the loss is then that of the last quarter of --context, the prompt being the rest (default all)")
    add("--squeeze_policy", metavar="STR", default="heavy", help="with --squeeze: which tokens stay: window (the last), sinks (the first 4 and the last) or heavy (those with most attention weight, and the last); or several, as sinks,heavy, a row each (default heavy)")
    add("--squeeze_cut", metavar="FLOAT", default="0.5", help="with --squeeze: the part of the budget that the least important layers keep; 1 for equal budgets; or several, as 1,0.5, a row each (default 0.5)")
    add("--chat", action="store_true", help="talk with one model, in its chat format; /reset, /undo, /bill, Ctrl-D (default off)")
    add("--store", metavar="DIR", help="with --chat: folder in which the conversation and its KV cache stay (default in memory only)")
    add("--store_memory", metavar="INT", type=count, default=1024, help="with --chat: KV caches of past turns kept in memory, in MB (default 1024)")
    add("--store_disk", metavar="INT", type=count, default=4096, help="with --store: KV caches kept on disk, in MB (default 4096)")
    add("--prompt", metavar="STR", default="\n", help="text to go on from; - is standard input, FILE:NAME the text of a file (default a line end)")
    add("--num_samples", metavar="INT", type=count, default=1, help="texts per model (default 1)")
    add("--max_new_tokens", metavar="INT", type=count, default=200, help="length of a text, in tokens (default 200)")
    add("--temperature", metavar="FLOAT", type=amount, default=0.8, help="0 takes the likeliest token, 1 the model's own distribution (default 0.8)")
    add("--top_k", metavar="INT", type=count, help="draw from the top_k likeliest tokens only (default from all)")
    add("--seed", metavar="INT", type=at_least(int, 0), default=1337, help="of the sampling: same seed, same text (default 1337)")
    add("--device", metavar="STR", type=device, default="cpu", help="cpu, cuda, cuda:1 or mps (default cpu)")
    add("--context", metavar="INT", type=count, help="tokens in the cache that the bill is for, and with --chat the window, at most block_size (default 1024, with --chat block_size)")
    add("--eval_tokens", metavar="INT", type=count, default=4096, help="tokens of validation text for the loss of a downloaded model (default 4096)")
    add("--dtype", metavar="STR", default="float32", help="of weights and cache: float32 or bfloat16 (default float32)")
    add("--csv", metavar="FILE", help="also write the bill as CSV (default no)")
    add("--plot", metavar="FILE", help="also draw the bill, as .png, .svg or .pdf; needs matplotlib (default no)")
    return parser.parse_intermixed_args()


def read_prompt(text):
    """--prompt → str. Raises ValueError if it is empty or no readable UTF-8 text."""
    try:
        if text == "-":
            text = sys.stdin.buffer.read().decode()
        elif text.startswith("FILE:"):
            text = Path(text[5:]).read_text(encoding="utf-8")
        text.encode()                                       # a flag can hold bytes that are no UTF-8
    except OSError as error:
        raise ValueError(f"--prompt={text}: {error.strerror}; name a readable file") from None
    except UnicodeError:
        raise ValueError("--prompt: not UTF-8 text; convert it first, for instance with iconv") from None
    if not text:
        raise ValueError("--prompt: is empty; give at least one character")
    return text


def write(model, tokenizer, prompt, args, squeezed=None):
    """Stream the texts to stdout. → decoded tokens per second, the prompt's time not counted."""
    ids = torch.tensor([tokenizer.encode(prompt)], device=model.embed.weight.device)
    tokens, seconds = 0, 0.0
    for sample in range(args.num_samples):
        generator = torch.Generator(ids.device).manual_seed(args.seed + sample)
        first = None

        def stream():
            nonlocal first
            cache = squeezed(ids[:, :-1]) if squeezed else None
            for token in model.stream(ids[:, -1:] if squeezed else ids, args.max_new_tokens, args.temperature, args.top_k, generator, cache):
                token = token.item()                        # waits for a GPU
                first = first or time.perf_counter()
                yield token

        print(prompt, end="", flush=True)
        for text in tokenizer.decode_stream(stream()):
            print(text, end="", flush=True)
        print("\n" + "-" * 80, flush=True)
        seconds += time.perf_counter() - first
        tokens += args.max_new_tokens - 1
    return tokens / seconds if tokens else float("nan")


def both(predicted, measured):
    """A figure of the bill: one number if prediction and measurement agree, else both."""
    return f"{predicted:,}" if predicted == measured else f"ERROR: predicted {predicted:,}, measured {measured:,}"


def bill(name, model, bpb, speed, context, squeezed=None):
    """→ a row of the bill, as a dict of text; and whether every prediction was met."""
    config, rooms = model.config, []
    context = min(context, config.block_size)

    def note(_):                                            # predictions for a squeezed cache start from the budgets that were chosen
        cache = squeezed(None)
        rooms.extend(cache.rooms)
        return cache

    measured = measure(model, context, squeezed=note if squeezed else None)
    predicted = cost(config, context, bytes_per_number=model.embed.weight.element_size(), kept=rooms)
    row = [name, config.sharing or "none", both(predicted.params, measured.params), "?" if bpb is None else f"{bpb:.4f}",
           both(predicted.cache_bytes_per_token, measured.cache_bytes_per_token), f"{context:,}", both(predicted.cache_bytes, measured.cache_bytes),
           both(predicted.decode_flops, measured.decode_flops), "" if speed is None else f"{speed:,.0f}"]
    return dict(zip(COLUMNS, row)), predicted == measured


def table(rows):
    widths = [max(len(row[column]) for row in [dict(zip(COLUMNS, COLUMNS)), *rows]) for column in COLUMNS]
    for row in [dict(zip(COLUMNS, COLUMNS)), *rows]:
        print("  ".join(row[column].ljust(width) if column in COLUMNS[:2] else row[column].rjust(width) for column, width in zip(COLUMNS, widths)))


def draw(rows, file):
    """The bill as bars, a panel per column."""
    plt = plot.pyplot("--plot")
    names = [f"{row['model']}\nsharing {row['sharing']}" for row in rows]
    panels = ["val bpb", "cache B/token", "FLOPs/token", "tokens/s"]
    figure, axes = plt.subplots(1, len(panels), figsize=(13, 1.2 + 0.6 * len(rows)), sharey=True, layout="constrained")
    for axis, panel in zip(axes, panels):
        values = [float(row[panel].replace(",", "")) if row[panel][0].isdigit() else 0.0 for row in rows]
        axis.bar_label(axis.barh(names, values, color="#4878a8"), [row[panel] for row in rows], padding=3, fontsize=8)
        axis.set_title(panel, fontsize=9)
        axis.set_xlim(0, 1.35 * max(values) or 1)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    plot.save(figure, file)


def models(run, args):
    """Yield model, tokenizer, name, a function that measures its validation loss (→ bits per byte, or None), and a function that reads a
    prompt (None: a text as long as the bill's context) into a squeezed cache (or None), of a run as it is, and then with each step that the flags ask for, one after the other: sharing, Eigen Attention, squeezing."""
    model, tokenizer, info = checkpoint.load(run, device=args.device, dtype=getattr(torch, args.dtype))
    config, name, full = None, run, model
    if args.share and (args.runs or not model.config.share):
        config = replace(model.config, share=args.share, share_kind=args.share_kind or "weights", heads=args.heads or "same")    # raises if it cannot be
    eigens = args.eigen_rank or args.eigen_error
    if info["data"] and not Path(info["data"]).is_dir() and (args.heads or args.refit or eigens or args.squeeze):
        raise ValueError(f"--heads, --refit, --eigen and --squeeze need the text that {run} was trained on; {info['data']} is missing")

    @cache
    def data():
        if info["data"] is None:                            # a downloaded model: no text is its own
            return Data(tokenize(prepare(), tokenizer=tokenizer))
        return Data(info["data"]) if Path(info["data"]).is_dir() else None

    context = min(args.context, model.config.block_size)
    prompt = context - max(1, context // 4)
    if args.squeeze and not 8 <= args.squeeze <= context:
        raise ValueError(f"--squeeze={args.squeeze}: must be from 8 to the context of {context} tokens")
    if args.eigen_rank and args.eigen_rank > model.config.head_dim:
        raise ValueError(f"--eigen_rank={args.eigen_rank}: a head of this model is only {model.config.head_dim} wide")
    known = None if config or eigens or args.squeeze else info["val_bpb"]      # all rows by the same measure

    @cache
    def windows():                                          # the prompt, then what is predicted, for --squeeze
        return data().windows("val", max(1, args.eval_tokens // (context - prompt)), context).to(args.device)

    @cache
    def prompts():
        return squeeze.read(model, windows()[:, :prompt])

    def evaluator(model, **squeezing):
        def evaluate():
            if known is not None or not data():
                return known
            if args.squeeze:
                said = windows()[:, prompt + 1:]
                print(f"measuring the loss on {said.numel():,} tokens of {data().name}, each after {prompt:,} or more", file=sys.stderr, flush=True)
                nats = squeeze.loss(model, windows(), prompt, prompts() if squeezing else None, **squeezing)
                return nats / math.log(2) * said.numel() / len(tokenizer.decode_bytes(said.flatten().tolist()))
            tokens = None if info["data"] else args.eval_tokens
            if tokens:
                print(f"measuring the loss on {tokens:,} tokens of {data().name}", file=sys.stderr, flush=True)
            return data().evaluate(model, tokens=tokens)[1]
        return evaluate

    yield model, tokenizer, name, evaluator(model), None
    if args.share and not config:
        print(f"{run} shares already, and stays as it is", file=sys.stderr, flush=True)
    if config:
        fitted = config.heads != "same" or args.refit
        model = similarity.share_fitted(model, config, data(), args.refit) if fitted else similarity.share(model, config)
        name += ", refitted" if args.refit else ""
        yield model, tokenizer, name, evaluator(model), None
    if eigens:
        print(f"looking for the directions of keys and values on {data().name}", file=sys.stderr, flush=True)
        calibration = similarity.calibration(model, data())
        model = eigen.compress(model, calibration[::3], args.eigen_rank, args.eigen_error)
        name += f", eigen {eigens}" + (", refitted" if args.refit and not config else "")
        if args.refit:
            similarity.refit(model, full, calibration)
        yield model, tokenizer, name, evaluator(model), None
    for policy, cut in itertools.product(args.squeeze_policy.split(","), args.squeeze_cut) if args.squeeze else []:
        squeezing = dict(budget=args.squeeze, policy=policy, cut=cut)
        yield (model, tokenizer, f"{name}, squeeze {args.squeeze} {policy}" + (f" {cut:g}" if cut < 1 else " equal"), evaluator(model, **squeezing),
               lambda idx: squeeze.squeeze(*squeeze.read(model, windows()[:1, :context - 1] if idx is None else idx, policy == "heavy"), **squeezing))


def talk(run, args):
    """--chat: with the last of the models() that the flags ask for."""
    *_, (model, tokenizer, name, _, _) = models(run, args)
    store = Store(model, args.store, args.store_memory * 2**20, args.store_disk * 2**20, min(args.window or model.config.block_size, model.config.block_size))

    def show(cache):
        row, _ = bill(name, model, None, None, max(1, min(cache.length, cache.size)))
        table([row])

    chat(model, tokenizer, store, args, show)


def main():
    args = parse_args()
    if args.plot:
        plot.pyplot("--plot")
        if Path(args.plot).suffix not in (".png", ".svg", ".pdf"):
            raise ValueError(f"--plot={args.plot}: must end in .png, .svg or .pdf")
    for flag, file in (("csv", args.csv), ("plot", args.plot)):
        if file and (file.endswith("/") or Path(file).is_dir()):
            raise ValueError(f"--{flag}={file}: is a folder; name a file in it")
    for flag in ("share_kind", "heads"):
        if getattr(args, flag) and not args.share:
            raise ValueError(f"--{flag}: is about the layers of --share; give --share too")
    if args.eigen_error == 0:
        raise ValueError("--eigen_error=0: must be above 0; without the flag all numbers are kept")
    if args.eigen_rank and args.eigen_error:
        raise ValueError("--eigen_rank and --eigen_error: give one of them")
    if args.refit and not (args.share or args.eigen_rank or args.eigen_error):
        raise ValueError("--refit: is about the layers that --share, --eigen_rank or --eigen_error change; give one of them too")
    if not set(args.squeeze_policy.split(",")) <= set(squeeze.POLICIES):
        raise ValueError(f"--squeeze_policy={args.squeeze_policy}: must be window, sinks or heavy, or several of them with commas")
    try:
        args.squeeze_cut = [float(cut) for cut in args.squeeze_cut.split(",")]
        assert all(0 < cut <= 1 for cut in args.squeeze_cut)
    except (ValueError, AssertionError):
        raise ValueError(f"--squeeze_cut={args.squeeze_cut}: must be above 0 and at most 1, or several such numbers with commas") from None
    if args.chat and (args.squeeze or len(args.runs) != 1):
        raise ValueError("--chat: needs one model, as in: python sample.py smollm2 --chat; and goes without --squeeze, as a later turn may need what it drops")
    if args.store and not args.chat:
        raise ValueError("--store: keeps the caches of a chat; give --chat too")
    args.window, args.context = args.context, args.context or 1024
    if args.dtype not in ("float32", "bfloat16"):
        raise ValueError(f"--dtype={args.dtype}: must be float32 or bfloat16")
    if args.chat:
        return talk(args.runs[0], args)
    prompt = read_prompt(args.prompt)
    runs = args.runs or sorted(str(path.parent) for path in Path("out").glob("*/model.pt"))
    if not runs:
        raise ValueError("there is no trained model in out/; train one with: python train.py")

    rows, right = [], True
    for run in runs:
        for model, tokenizer, name, evaluate, squeezed in models(run, args):
            bpb = evaluate()
            print(f"{name}, sharing {model.config.sharing or 'nothing'}\n" + "-" * 80)
            row, met = bill(name, model, bpb, write(model, tokenizer, prompt, args, squeezed), args.context, squeezed)
            rows.append(row)
            right = right and met

    table(rows)
    print("Parameters, cache and FLOPs were predicted in closed form, and counted on a real decode step: " + ("they agree." if right else "THEY DIFFER."))
    if args.csv:
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({column: value if column in COLUMNS[:2] else value.replace(",", "") for column, value in row.items()} for row in rows)
        checkpoint.write_file(args.csv, text.getvalue().encode())
    if args.plot:
        draw(rows, args.plot)
    return 0 if right else 1


if __name__ == "__main__":
    command(main)
