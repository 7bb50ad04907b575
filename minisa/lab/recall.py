"""Does a model still know what it read long ago? A prompt gives a number early and asks for it at the end.

    python -m minisa.lab.recall smollm2 out/mixed               side by side
    python -m minisa.lab.recall smollm2 --share=26-28           and made to share, zero-shot
    python -m minisa.lab.recall smollm2 --squeeze=128           and with caches that keep 128 tokens a layer
    python -m minisa.lab.recall smollm2 --cache_bits=8          and with caches in int8

A prompt of N tokens is: a line of validation text, "The secret number is 4829.", more of the text, and "The
secret number is". The answer is right if the most likely next tokens are the digits. The loss hardly shows
what a cache forgot; this does. The fraction of right answers is followed by its standard error, as given by
Agresti and Coull: with two right and two wrong answers added. For --squeeze, --context is the smallest of
--lengths.
"""

from statistics import mode

import torch

from minisa.axes import squeeze
from minisa.kit.checkpoint import add_share_kind, load, reconfigure
from minisa.kit.cli import Parser, add_device, add_dtype, at_least, command, count, several, table
from minisa.kit.data import data_of
from minisa.kit.machine import keep_memory
from minisa.kit.results import write_results
from minisa.lab.tables import share_of

FACT = "\n\nThe secret number is {}.\n\n"
QUESTION = "\n\nThe secret number is"
BEFORE = 16                 # tokens of text before the fact
BATCH = 4                   # prompts read at once

def draw_numbers(encode, n, seed):
    """→ n numbers of four digits, and the tokens of each (n, D). A tokenizer may have tokens of several
    digits; only numbers of the most frequent count of tokens are taken."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(1000, 10000, (20 * n,), generator=generator).tolist()
    answers = {number: encode(f" {number}") for number in numbers}
    D = mode(len(answers[number]) for number in numbers)
    chosen = [number for number in numbers if len(answers[number]) == D][:n]
    return chosen, torch.tensor([answers[number] for number in chosen])

def make_prompts(data, n, length, seed):
    """→ n prompts of `length` tokens (n, length), and the right answer to each (n, D). Raises ValueError if
    the length has no room for fact and question."""
    encode = data.tokenizer.encode
    numbers, answers = draw_numbers(encode, n, seed)
    texts = data.windows("val", n, length).tolist()
    question = encode(QUESTION)
    prompts = []
    for text, number in zip(texts, numbers):
        fact = encode(FACT.format(number))
        end = length - len(fact) - len(question)
        if end < BEFORE:
            raise ValueError(f"--lengths={length}: fact and question take {length - end} of them in this "
                             f"model's tokens; take at least {length - end + BEFORE}")
        prompts.append(text[:BEFORE] + fact + text[BEFORE:end] + question)
    return torch.tensor(prompts), answers

# ---- questions and answers ----

def right_answers(model, prompts, answers, ways):
    """prompts (n, T), answers (n, D) → for each way to keep the cache, how many of the n answers the model
    gives. The prompts of a batch share their budgets."""
    D = answers.size(1)
    free = model.config.block_size + 1 - prompts.size(1)                # beyond it, the oldest tokens go
    right = [0] * len(ways)
    for batch, expected in zip(prompts.split(BATCH), answers.split(BATCH)):
        batch = batch.to(model.embed.weight.device)
        reading = squeeze.read(model, batch[:, :-1], ways, min(D, free))    # once for all ways
        caches = [way.of(reading) for way in ways]                          # before one goes on
        for i, cache in enumerate(caches):
            stream = model.stream(batch[:, -1:], D, temperature=0, cache=cache)
            given = torch.cat([*stream], dim=1).cpu()                   # (B, D)
            correct = (given == expected).all(dim=1)
            right[i] += correct.sum().item()
    return right

def ask(args, source, model, data):
    """Yield a row for a CSV file for each length and cache."""
    ways = squeeze.ways_of(args, model)
    for length in args.lengths:
        prompts, answers = make_prompts(data, args.prompts, length, args.seed)
        right = right_answers(model, prompts, answers, ways)
        for way, n in zip(ways, right):
            yield {
                "model": source,
                "share": model.config.share,
                "share_kind": model.config.share and model.config.share_kind,
                **way.facts,
                "length": length,
                "prompts": args.prompts,
                "right": n,
            }

def ask_all(args):
    """Yield the rows of all models, each as it is, and made to share."""
    for source in args.models:
        dtype = getattr(torch, args.dtype)
        model, tokenizer, info = load(source, device=args.device, dtype=dtype)
        longest, block_size = max(args.lengths), model.config.block_size
        if longest > block_size:
            raise ValueError(f"--lengths: {longest} tokens are more than the context of {source}, "
                             f"{block_size}")
        data = data_of(info, tokenizer, args.text)
        yield from ask(args, source, model, data)
        if args.share and not model.config.share:
            shared = reconfigure(model, share=args.share, share_kind=args.share_kind)
            yield from ask(args, source, shared, data)

# ---- the command ----

def main():
    parser = Parser(__doc__, usage="python -m minisa.lab.recall MODEL [MODEL ...] [--FLAG=VALUE ...]")
    parser.add_argument("models", nargs="+", metavar="MODEL", help="folders of runs or models, .gguf files, "
                        "or smollm2, which is downloaded once")
    parser.flag("lengths", several(at_least(int, 64)), "256,512,1024,1536",
                "of the prompts, in tokens; several with commas")
    parser.flag("prompts", count, 200, "how many of each length")
    parser.flag("share", str, "", "spans that share, zero-shot, in models trained without", "none")
    add_share_kind(parser)
    squeeze.add_flags(parser)
    parser.flag("text", help="UTF-8 file to hide the number in",
                shown="what the model was trained on, or the plays")
    parser.flag("seed", at_least(int, 0), 1337, "of the numbers")
    parser.flag("csv", table, None, "file to write the counts to, as .csv", "none")
    add_device(parser)
    add_dtype(parser)
    args = parser.parse_intermixed_args()
    args.context = min(args.lengths)                        # the most that a squeezed cache may keep
    keep_memory()
    rows = []
    for row in ask_all(args):
        rows.append(row)
        known = ", ".join(f"{name} {value}" for name, value in row.items() if value != "")
        print(f"{known}: {share_of(row['right'], row['prompts'])}", flush=True)
    if args.csv:
        write_results(args.csv, rows)

if __name__ == "__main__":
    command(main)
