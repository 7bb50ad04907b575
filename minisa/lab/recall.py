"""Does a model still know what it read long ago? A number is told early, and asked for at the end.

    python -m minisa.lab.recall smollm2 out/mixed               beside each other
    python -m minisa.lab.recall smollm2 --share=26-28           and made to share, zero-shot
    python -m minisa.lab.recall smollm2 --squeeze=128           and with caches that keep 128 tokens a layer

A prompt of N tokens is: a line of validation text, "The secret number is 4829.", more of the text, and "The
secret number is". The answer is right if the likeliest next tokens are the digits. A cache that forgot a
little hardly shows in the loss; here it does. After the share of right answers stands its standard error, as
by Agresti and Coull: of two right and two wrong answers more. The --context that --squeeze speaks of is the
shortest of --lengths.
"""

import sys
import time

import torch

from minisa.axes import squeeze
from minisa.kit.checkpoint import load, reconfigure
from minisa.kit.cli import Parser, at_least, command, count, device, several, table
from minisa.kit.data import data_of
from minisa.kit.files import write_csv
from minisa.kit.results import print_table
from minisa.kit.run import keep_memory
from minisa.lab.tables import share_of

FACT, QUESTION = "\n\nThe secret number is {}.\n\n", "\n\nThe secret number is"
BEFORE, BATCH = 16, 4           # tokens of text before the fact; prompts read at once

def prompts(data, tokenizer, n, length, seed):
    """n prompts of `length` tokens (n, length), and what is to be said after each (n, digits)."""
    rng = torch.Generator().manual_seed(seed)
    numbers = torch.randint(1000, 10000, (n,), generator=rng).tolist()
    question, rows = tokenizer.encode(QUESTION), []
    answers = [tokenizer.encode(f" {number}") for number in numbers]
    for text, number in zip(data.windows("val", n, length).tolist(), numbers):
        fact = tokenizer.encode(FACT.format(number))
        rest = length - BEFORE - len(fact) - len(question)
        rows.append(text[:BEFORE] + fact + text[BEFORE:BEFORE + rest] + question)
    return torch.tensor(rows), torch.tensor(answers)

def right_answers(model, idx, answers, ways):
    """idx (n, T), answers (n, D) → {way to keep the cache: how many of the n are said}. BATCH prompts are
    read at once, and once for all ways; they share their budgets."""
    right = dict.fromkeys(ways, 0)
    for rows, expected in zip(idx.split(BATCH), answers.split(BATCH)):
        rows, D = rows.to(model.embed.weight.device), expected.size(1)
        room = min(D, model.config.block_size + 1 - rows.size(1))       # then the oldest tokens go
        reading = squeeze.read(model, rows[:, :-1], ways, room)
        caches = {way: way.of(reading) for way in ways}
        for way, cache in caches.items():
            said = torch.cat([*model.stream(rows[:, -1:], D, temperature=0, cache=cache)], dim=1)
            right[way] += (said.cpu() == expected).all(1).sum().item()
    return right

def variants(args, source):
    """Yield (name, model, tokenizer, info) of what is to be asked."""
    model, tokenizer, info = load(source, device=args.device, dtype=getattr(torch, args.dtype))
    size = model.config.block_size
    if max(args.lengths) > size:
        raise ValueError(f"--lengths: {max(args.lengths)} tokens are more than the context of {source}, "
                         f"{size}")
    models = {source: model}
    if args.share and not model.config.share:
        models[f"{source}, share {args.share}"] = reconfigure(model, share=args.share)
    for name, each in models.items():
        yield name, each, tokenizer, info

def ask(args):
    """Ask all models at all lengths. → rows for a CSV file: name, tokens, prompts, right answers"""
    rows = []
    for source in args.models:
        for name, model, tokenizer, info in variants(args, source):
            data = data_of(info, tokenizer, args.text)
            ways = squeeze.ways_of(args, model)
            for length in args.lengths:
                begun = time.perf_counter()
                idx, answers = prompts(data, tokenizer, args.prompts, length, args.seed)
                right = right_answers(model, idx, answers, ways)
                rows += [[way.name(name), length, args.prompts, n] for way, n in right.items()]
                print(f"{name}, {length} tokens: {', '.join(map(str, right.values()))} of {args.prompts} "
                      f"right, in {time.perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)
    return rows

def table_of(rows):
    """Rows of ask() → a table, a row for each model, a column for each length."""
    tokens = dict.fromkeys(row[1] for row in rows)
    cells = {(name, length): share_of(right, n) for name, length, n, right in rows}
    names = dict.fromkeys(row[0] for row in rows)
    return [["", *(f"{length} tokens" for length in tokens)],
            *([name, *(cells[name, length] for length in tokens)] for name in names)]

def main():
    parser = Parser(__doc__, usage="python -m minisa.lab.recall MODEL [MODEL ...] [--FLAG=VALUE ...]")
    parser.add_argument("models", nargs="+", metavar="MODEL", help="folders of runs or models, .gguf files, "
                        "or smollm2, which is downloaded once")
    parser.flag("lengths", several(at_least(int, 64)), "256,512,1024,1536",
                "of the prompts, in tokens; several with commas")
    parser.flag("prompts", count, 200, "how many of each length")
    parser.flag("share", str, "", "spans that share, zero-shot, in models trained without", "none")
    squeeze.add_flags(parser)
    parser.flag("text", help="UTF-8 file to hide the number in",
                shown="what the model was trained on, or the plays")
    parser.flag("seed", at_least(int, 0), 1337, "of the numbers")
    parser.flag("csv", table, None, "file to write the counts to, as .csv", "none")
    parser.flag("device", device, "cpu", "cpu, cuda, cuda:1 or mps")
    parser.flag("dtype", str, "float32", "of weights and cache", choices=["float32", "bfloat16"])
    args = parser.parse_intermixed_args()
    args.context = min(args.lengths)                        # the most that a squeezed cache may keep
    keep_memory()
    rows = ask(args)
    print_table(table_of(rows))
    if args.csv:
        write_csv(args.csv, ["model", "tokens", "prompts", "right"], rows)

if __name__ == "__main__":
    command(main)
