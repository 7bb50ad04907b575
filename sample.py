"""Write text with trained models, and bill each: parameters, loss, cache, FLOPs, speed; predicted and measured.

    python sample.py                          every run in out/
    python sample.py out/full out/weights-1-3 --prompt="ROMEO:" --temperature=0.8
    python sample.py out/full --share=1-3     weights trained with full attention, made to share (zero-shot)
    python sample.py smollm2 --share=26-28 --heads=mix --prompt="Once upon a time"
"""

import csv
import io
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from data.prepare import prepare
from minisa import Parser, amount, at_least, checkpoint, command, count, device, plot, similarity
from minisa.cost import cost, measure
from minisa.data import Data, tokenize

COLUMNS = ["model", "sharing", "parameters", "val bpb", "cache B/token", "context", "cache B", "FLOPs/token", "tokens/s"]


def parse_args():
    parser = Parser(__doc__, usage="python sample.py [RUN ...] [--FLAG=VALUE ...]")
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUN", help="run folders, .gguf files, or smollm2, which is downloaded once (default every run in out/)")
    add("--share", metavar="STR", help="spans to share in models trained with full attention; each is then billed both ways (default as trained)")
    add("--share_kind", metavar="STR", help="with --share: weights (Shared Attention) or kv (Cross-Layer Attention) (default weights)")
    add("--heads", metavar="STR", help="with --share: whose weights a head of a reuse layer takes: same (the anchor's same head), match (the most alike) or mix (a mixture), fitted on the training text (default same)")
    add("--refit", action="store_true", help="with --share: refit the output projections of reuse layers on the training text (default off)")
    add("--prompt", metavar="STR", default="\n", help="text to go on from; - is standard input, FILE:NAME the text of a file (default a line end)")
    add("--num_samples", metavar="INT", type=count, default=1, help="texts per model (default 1)")
    add("--max_new_tokens", metavar="INT", type=count, default=200, help="length of a text, in tokens (default 200)")
    add("--temperature", metavar="FLOAT", type=amount, default=0.8, help="0 takes the likeliest token, 1 the model's own distribution (default 0.8)")
    add("--top_k", metavar="INT", type=count, help="draw from the top_k likeliest tokens only (default from all)")
    add("--seed", metavar="INT", type=at_least(int, 0), default=1337, help="of the sampling: same seed, same text (default 1337)")
    add("--device", metavar="STR", type=device, default="cpu", help="cpu, cuda, cuda:1 or mps (default cpu)")
    add("--context", metavar="INT", type=count, default=1024, help="tokens in the cache that the bill is for, at most block_size (default 1024)")
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


def write(model, tokenizer, prompt, args):
    """Stream the texts to stdout. → decoded tokens per second, the prompt's time not counted."""
    ids = torch.tensor([tokenizer.encode(prompt)], device=model.embed.weight.device)
    tokens, seconds = 0, 0.0
    for sample in range(args.num_samples):
        generator = torch.Generator(ids.device).manual_seed(args.seed + sample)
        first = None

        def stream():
            nonlocal first
            for token in model.stream(ids, args.max_new_tokens, args.temperature, args.top_k, generator):
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


def bill(name, model, bpb, speed, context):
    """→ a row of the bill, as a dict of text; and whether every prediction was met."""
    config = model.config
    context = min(context, config.block_size)
    predicted = cost(config, context, bytes_per_number=model.embed.weight.element_size())
    measured = measure(model, context)
    row = [name, config.sharing or "none", both(predicted.params, measured.params), "?" if bpb is None else f"{bpb:.4f}",
           both(predicted.cache_bytes_per_token, measured.cache_bytes_per_token), f"{context:,}", both(predicted.cache_bytes, measured.cache_bytes),
           both(predicted.decode_flops, measured.decode_flops), f"{speed:,.0f}"]
    return dict(zip(COLUMNS, row)), predicted == measured


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
    """Yield model, tokenizer, validation loss (bits per byte, or None) and name of a run as it is; then sharing, if --share is given."""
    model, tokenizer, info = checkpoint.load(run, device=args.device, dtype=getattr(torch, args.dtype))
    if args.share and (args.runs or not model.config.share):
        config = replace(model.config, share=args.share, share_kind=args.share_kind or "weights", heads=args.heads or "same")    # raises if it cannot be
    data, tokens = None, None
    if info["data"] is None:                                # a downloaded model: no text is its own
        data, tokens = Data(tokenize(prepare(), tokenizer=tokenizer)), args.eval_tokens
    elif Path(info["data"]).is_dir():
        data = Data(info["data"])

    def evaluate(model):
        if tokens:
            print(f"measuring the loss on {tokens:,} tokens of {data.name}", file=sys.stderr, flush=True)
        return data.evaluate(model, tokens=tokens)[1] if data else None

    already = args.share and not args.runs and model.config.share
    bpb = evaluate(model) if info["val_bpb"] is None or args.share and not already else info["val_bpb"]      # both by the same measure
    yield model, tokenizer, bpb, run
    if already:
        print(f"{run} shares already, and stays as it is", file=sys.stderr, flush=True)
    elif args.share:
        if (config.heads != "same" or args.refit) and not data:
            raise ValueError(f"--heads and --refit need the text that {run} was trained on; {info['data']} is missing")
        model = similarity.share_fitted(model, config, data, args.refit) if data else similarity.share(model, config)
        yield model, tokenizer, evaluate(model), run + (", refitted" if args.refit else "")


def main():
    args = parse_args()
    if args.plot:
        plot.pyplot("--plot")
        if Path(args.plot).suffix not in (".png", ".svg", ".pdf"):
            raise ValueError(f"--plot={args.plot}: must end in .png, .svg or .pdf")
    for flag, file in (("csv", args.csv), ("plot", args.plot)):
        if file and (file.endswith("/") or Path(file).is_dir()):
            raise ValueError(f"--{flag}={file}: is a folder; name a file in it")
    for flag in ("share_kind", "heads", "refit"):
        if getattr(args, flag) and not args.share:
            raise ValueError(f"--{flag}: is about the layers of --share; give --share too")
    if args.dtype not in ("float32", "bfloat16"):
        raise ValueError(f"--dtype={args.dtype}: must be float32 or bfloat16")
    prompt = read_prompt(args.prompt)
    runs = args.runs or sorted(str(path.parent) for path in Path("out").glob("*/model.pt"))
    if not runs:
        raise ValueError("there is no trained model in out/; train one with: python train.py")

    rows, right = [], True
    for run in runs:
        for model, tokenizer, bpb, name in models(run, args):
            print(f"{name}, sharing {model.config.sharing or 'nothing'}\n" + "-" * 80)
            row, met = bill(name, model, bpb, write(model, tokenizer, prompt, args), args.context)
            rows.append(row)
            right = right and met

    widths = [max(len(row[column]) for row in [dict(zip(COLUMNS, COLUMNS)), *rows]) for column in COLUMNS]
    for row in [dict(zip(COLUMNS, COLUMNS)), *rows]:
        print("  ".join(row[column].ljust(width) if column in COLUMNS[:2] else row[column].rjust(width) for column, width in zip(COLUMNS, widths)))
    print("Parameters, cache and FLOPs were predicted in closed form, and counted on a real decode step: " + ("they agree." if right else "THEY DIFFER."))
    if args.csv:
        text = io.StringIO()
        table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows({column: value.replace(",", "") for column, value in row.items()} for row in rows)
        checkpoint.write_file(args.csv, text.getvalue().encode())
    if args.plot:
        draw(rows, args.plot)
    return 0 if right else 1


if __name__ == "__main__":
    command(main)
