"""Write text with trained models, and bill each: parameters, loss, cache, FLOPs, speed.

    python sample.py                          every run in out/
    python sample.py out/full out/weights-1-3 --prompt="ROMEO:" --temperature=0.8
    python sample.py out/full --share=1-3     weights trained with full attention, made to share
    python sample.py smollm2 --share=26-28 --prompt="Once upon a time"
    python sample.py smollm2 --squeeze=307    caches that keep 307 tokens a layer (minisa/axes/squeeze.py)
"""

import minisa  # isort: skip  # noqa: F401 (before torch, as it sees to Ctrl-C)
import sys
import time
from pathlib import Path

import torch

from minisa.axes import squeeze
from minisa.cost import predict
from minisa.kit import bill
from minisa.kit.checkpoint import load, reconfigure
from minisa.kit.cli import Parser, amount, at_least, command, count, device, picture, prompt, table
from minisa.kit.data import data_of
from minisa.kit.picture import pyplot
from minisa.kit.timing import share_of_limit
from minisa.model import share_kind

def read_flags():
    parser = Parser(__doc__, usage="python sample.py [MODEL ...] [--FLAG=VALUE ...]")
    parser.add_argument("models", nargs="*", metavar="MODEL", help="folders of runs or models, .gguf files, "
                        "or smollm2, which is downloaded once (default every run in out/)")
    flag = parser.flag
    flag("share", str, "", "spans to share in models trained without: each is billed both ways, zero-shot")
    flag("share_kind", share_kind, "weights", "with --share: weights (Shared Attention), kv (Cross-Layer "
         "Attention) or the NAME of a kind in minisa/axes")
    flag("prompt", prompt, "\n", "text to go on from; - is standard input, FILE:NAME the text of a file")
    flag("num_samples", count, 1, "texts per model")
    flag("max_new_tokens", count, 200, "length of a text, in tokens")
    flag("temperature", amount, 0.8, "0 takes the likeliest token, 1 the model's own distribution")
    flag("top_k", count, None, "draw from so many likeliest tokens only", "all")
    flag("seed", at_least(int, 0), 1337, "of the sampling: same seed, same text")
    flag("context", count, 1024, "tokens in the cache that the bill is for; at most block_size count")
    flag("eval_tokens", count, 4096, "validation tokens for the loss of a downloaded model, or --squeeze")
    squeeze.add_flags(parser)
    flag("dtype", str, "float32", "of weights and cache", choices=["float32", "bfloat16"])
    flag("device", device, "cpu", "cpu, cuda, cuda:1 or mps")
    flag("csv", table, None, "file to write the bill to, as .csv")
    parser.switch("json", "print the bill once more as the last line, as JSON for programs")
    flag("plot", picture, None, "file to draw the bill in, as .png, .svg or .pdf; needs matplotlib")
    return parser.parse_intermixed_args()

def write(model, tokenizer, args, way=None):
    """Stream the texts to stdout. → decoded tokens per second, after the prompt and the first step, which
    makes the weights ready; None for two tokens. And the tokens in the cache meanwhile, in the mean."""
    if not (tokens := tokenizer.encode(args.prompt)):
        raise ValueError("--prompt: this model has no token for any of it; take another text")
    far = model.config.block_size * (1 if way else len(model.blocks))   # back, for all layers together
    ids = torch.tensor([tokens[-far:]], device=args.device)
    times = []

    def timed(stream):
        for token in stream:
            times.append((time.perf_counter(), token.item()))       # item() waits for a GPU
            yield times[-1][1]

    seconds = 0.0
    for sample in range(args.num_samples):
        generator = torch.Generator(args.device).manual_seed(args.seed + sample)
        cache, rest = (way.cache_of(model, ids[:, :-1]), ids[:, -1:]) if way else (None, ids)
        stream = model.stream(rest, args.max_new_tokens, args.temperature, args.top_k, generator, cache)
        print(args.prompt, end="", flush=True)
        for text in tokenizer.decode_stream(timed(stream)):
            print(text, end="", flush=True)
        print("\n" + "-" * 80, flush=True)
        seconds += times[-1][0] - times[-args.max_new_tokens:][:2][-1][0]       # from the second token on
    visible = [min(ids.size(1) + n, model.config.block_size) for n in range(2, args.max_new_tokens)]
    if not visible or not seconds:
        return None, None
    return args.num_samples * len(visible) / seconds, round(sum(visible) / len(visible))

def reached(model, speed, visible, args, cache):
    """→ share_of_limit() of decoding at some speed, or None if that is not known."""
    if speed is None:
        return None
    size, rooms = model.embed.weight.element_size(), cache and cache.rooms
    cost = predict(model, visible, bytes_per_number=size, kept=rooms)
    return share_of_limit(cost.read_bytes, 1 / speed, args.device)

def bits_per_byte(name, model, tokenizer, info, args, ways):
    """→ the loss on validation text with each of some ways to squeeze; None if the text that the model was
    trained on is gone. Raises ValueError if it is, with --squeeze."""
    if info["val_bpb"] and not args.squeeze:
        return [info["val_bpb"]]
    try:
        data = data_of(info, tokenizer)
    except ValueError as error:
        if args.squeeze:
            raise
        print(f"the loss of {name} is not known: {error}", file=sys.stderr)
        return [None]
    print(f"measuring the loss of {name} on {data.name}", file=sys.stderr, flush=True)
    if args.squeeze:
        return squeeze.bits_per_byte(model, data, args.context, args.eval_tokens, ways)
    return [data.evaluate(model, tokens=None if info["data"] else args.eval_tokens)[1]]

def variants(source, args):
    """Yield (name, model, tokenizer, info, way to squeeze, bits per byte) of each row of the bill."""
    model, tokenizer, info = load(source, device=args.device, dtype=getattr(torch, args.dtype))
    models = [(source, model, info)]
    if args.share and (args.models or not model.config.share):
        shared = reconfigure(model, share=args.share, share_kind=args.share_kind)
        models.append((source, shared, {**info, "val_bpb": None}))
    for name, model, info in models:
        ways = [None, *squeeze.settings(args, model)] if args.squeeze else [None]
        for way, bpb in zip(ways, bits_per_byte(name, model, tokenizer, info, args, ways)):
            yield f"{name}, {way}" if way else name, model, tokenizer, info, way, bpb

def main():
    args = read_flags()
    if args.plot:
        pyplot("--plot")                                # refused before the work if it is missing
    found = (path.parent for path in Path("out").glob("*/config.json"))
    sources = args.models or sorted(str(path) for path in found if (path / "model.safetensors").exists())
    if not sources:
        raise ValueError("there is no trained model in out/; train one with: python train.py")
    rows, right = [], True
    for source in sources:
        for name, model, tokenizer, info, way, bpb in variants(source, args):
            print(f"{name}, sharing {bill.sharing(model)}\n" + "-" * 80)
            speed, visible = write(model, tokenizer, args, way)
            cache = way and way.cache_for_bill(model, data_of(info, tokenizer), args.context)
            limit = reached(model, speed, visible, args, cache)
            row, met = bill.row(name, model, bpb, speed, args.context, cache, limit)
            rows.append(row)
            right = right and met
    bill.show(rows)
    verdict = "they agree" if right else "THEY DIFFER"
    print("Parameters, cache, bytes read and FLOPs were predicted in closed form, and counted on a real "
          f"decode step: {verdict}.")
    if args.csv:
        bill.write_csv(rows, args.csv)
    if args.plot:
        bill.draw(rows, args.plot)
    if args.json:
        print(bill.as_json(rows, right))
    return 0 if right else 1

if __name__ == "__main__":
    command(main)
