"""Which method remembers, at how many bytes? A text states numbers; at its end, one of them is asked for.

    python -m minisa.lab.recall smollm2 out/eight --csv=recall.csv
    python -m minisa.lab.recall smollm2 --squeeze_policy=snap --ratios=50

A prompt of 512 tokens is a text that says "The secret number is 4829." at one of three depths, or four such
sentences of different things, as "The secret number of the tower is 4829."; then comes a question, and
"Answer: The secret number is". The answer is right if its digits are the most likely next tokens. The cache
is squeezed either when the question has been read, all but its last token, or before, when it is unknown.

A case is a model, a storage (--cache_bits) and a policy (--squeeze_policy). Cases are compared at equal
bytes: --ratios are percentages of what prompt and answer take in a bfloat16 cache of the first model. If all
tokens fit, all stay. Otherwise as many stay as fit, with room left for what is still to be read.

--text_csv: the loss of the 32 tokens that follow a squeezed text, and the divergence (KL, in nats per token)
from the first model with its whole cache; with standard errors. A case that --csv or --text_csv holds, with
the same weights, number format, --text and --seed, is not measured again.
"""

import csv
import itertools
import random
import statistics
from collections import Counter
from pathlib import Path

import torch

from minisa.axes import squeeze
from minisa.axes.bits import Int8
from minisa.axes.squeeze import Floats, Squeezing, Stored
from minisa.kit.checkpoint import described, load
from minisa.kit.cli import (
    Parser,
    add_device,
    add_dtype,
    add_models,
    at_least,
    command,
    count,
    one_of,
    several,
    table,
    whole,
)
from minisa.kit.data import data_of
from minisa.kit.files import read_file, reading
from minisa.kit.machine import choose_dtype, keep_memory
from minisa.kit.results import print_table, provenance, write_results
from minisa.lab.benchmarks import Progress, mean_and_error, paired_means
from minisa.lab.tables import share_of
from minisa.model import KVCache

FACT = "\n\nThe secret number{} is {}.\n\n"
QUESTION = "\n\nQuestion: What is the secret number{0}?\nAnswer: The secret number{0} is"
THINGS = ["abbey", "cabin", "field", "house", "lodge", "manor", "river", "tower", "villa", "woods"]
DEPTHS = 10, 50, 85         # where a number that is asked for stands, in percent of the text
NOT_ASKED = 30              # where one stands that is never asked for
BEFORE = 8                  # tokens of text before the first fact, at least
BATCH = 4                   # prompts read at once
FOLLOWING = 32              # tokens of a text that follow the squeezed ones
LEAST = 8                   # tokens of a text that a cache keeps, at least
STORAGES = {"16": Floats, "8": Int8}
WHEN = "known", "unknown"   # the question, when the cache is squeezed
ANSWERED = "cache_bytes", "right"                               # columns that are measured
FOLLOWED = "cache_bytes", "loss", "difference", "error", "divergence", "divergence_error"

# ---- prompts ----

def of_one_length(encode, words):
    """words: {word: text} → {word: tokens}, of those that have the most frequent number of tokens."""
    tokens = {word: encode(text) for word, text in words.items()}
    counts = Counter(map(len, tokens.values()))
    (length, _), = counts.most_common(1)
    return {word: ids for word, ids in tokens.items() if len(ids) == length}

def insert(text, facts, length):
    """text: tokens. facts: {depth in percent: tokens} → `length` tokens, text with the facts in it. Raises
    ValueError if there is no room for both."""
    room = length - sum(map(len, facts.values()))
    if room * min(facts) < 100 * BEFORE:
        raise ValueError("--lengths: facts and question leave too few tokens for the text; take a larger one")
    row, begin = [], 0
    for depth, fact in sorted(facts.items()):
        end = room * depth // 100
        row += text[begin:end] + fact
        begin = end
    return row + text[begin:room]

def hide(encode, draw, texts, depths, questions, numbers, length):
    """Hide a number at each of some depths of each text. → contexts (n, T), T = length, and
    {depth: (questions (n, q), answers (n, D))}.

    questions, numbers: {what is asked: tokens}, {number: tokens}, from which draw, a random.Random, chooses.
    """
    contexts = []
    asked = {depth: ([], []) for depth in depths}
    for text in texts:
        facts = {}
        things = draw.sample(list(questions), len(depths))
        chosen = draw.sample(list(numbers), len(depths))
        for depth, thing, number in zip(depths, things, chosen):
            facts[depth] = encode(FACT.format(thing, number))
            asked[depth][0].append(questions[thing])
            asked[depth][1].append(numbers[number])
        contexts.append(insert(text, facts, length))
    tensors = {depth: tuple(map(torch.tensor, pair)) for depth, pair in asked.items()}
    return torch.tensor(contexts), tensors

def make_prompts(data, n, length, needles, seed):
    """→ pairs as of hide(), in which a context and a question have `length` tokens. One needle: a pair for
    each depth; four: one for all depths. Raises ValueError if the length has no room for the facts, or if the
    tokenizer does not split four of the questions alike."""
    encode, draw = data.tokenizer.encode, random.Random(seed)
    some = draw.sample(range(1000, 10000), 2000)
    numbers = of_one_length(encode, {number: f" {number}" for number in some})
    things = [f" of the {thing}" for thing in THINGS] if needles > 1 else [""]
    questions = of_one_length(encode, {thing: QUESTION.format(thing) for thing in things})
    if len(questions) < needles:
        raise ValueError("--needles=4: the tokenizer of this model splits the questions too differently")
    groups = [[*DEPTHS, NOT_ASKED]] if needles > 1 else [[depth] for depth in DEPTHS]
    texts = data.windows("val", n, length).tolist()
    rest = length - len(next(iter(questions.values())))
    return [hide(encode, draw, texts, group, questions, numbers, rest) for group in groups]

# ---- right answers ----

@torch.inference_mode()
def ask(model, context, asked, ways):
    """context (B, T), asked: {depth: (questions (B, q), answers (B, D))} → {(way, depth, one of WHEN): (how
    many answers are right, bytes of the cache of one prompt)}. The context is read once for all."""
    B, T = context.shape
    q = max(question.size(1) for question, _ in asked.values())
    cache = KVCache(model, B, T + q)
    unknown = squeeze.start_reading(model, cache, B, T, ways)
    begun = squeeze.start_reading(model, cache, B, T + q - 1, ways)
    squeeze.read_on(model, context, [unknown, begun])
    found = {}
    for depth, (question, answer) in asked.items():
        cache.length = T                            # what follows takes the place of the last question
        known = begun.again()
        squeeze.read_on(model, question[:, :-1], [known])
        rest = torch.cat((question, answer[:, :-1]), dim=1)     # if a token is wrong, so is the answer
        for when, seen, said in ("known", known, rest[:, q - 1:]), ("unknown", unknown, rest):
            for way in ways:
                small = way.of(seen, free=said.size(1))
                x = squeeze.read_at_once(model, small, said)
                given = model.head(x[:, -answer.size(1):]).argmax(-1)
                right = (given == answer).all(dim=1).sum().item()
                found[way, depth, when] = right, small.nbytes // B
    return found

def count_right(model, prompts, ways, label):
    """→ as ask(), for all prompts, as of make_prompts()."""
    device = model.embed.weight.device
    batches = sum(len(contexts.split(BATCH)) for contexts, _ in prompts)
    progress, done = Progress(label, batches), 0
    right, n_bytes = Counter(), {}
    for contexts, asked in prompts:
        asked = {depth: pair for depth, pair in asked.items() if depth in DEPTHS}
        for start in range(0, len(contexts), BATCH):
            here = slice(start, start + BATCH)
            batch = {depth: [t[here].to(device) for t in pair] for depth, pair in asked.items()}
            found = ask(model, contexts[here].to(device), batch, ways)
            for key, (number, size) in found.items():
                right[key] += number
                n_bytes[key] = size
            done += 1
            progress.say(done)
    return {key: (right[key], n_bytes[key]) for key in n_bytes}

# ---- loss and divergence ----

def predicted(model, x, targets):
    """Last hidden states x (B, n, C) → log probabilities (B, n, V) of the next tokens, and the loss of each
    sequence (B,), given the true ones, targets (B, n)."""
    log_p = model.head(x).float().log_softmax(-1)
    return log_p, -log_p.gather(2, targets[..., None]).mean((1, 2))

@torch.inference_mode()
def follow(model, first, windows, ways, label):
    """windows (N, T + 1): all tokens but the last FOLLOWING are read and squeezed. → for each way three
    lists: of each window the loss and the divergence of those that follow, and the bytes of its cache; and
    the losses of the first model, which keeps all."""
    prompt = windows.size(1) - 1 - FOLLOWING
    progress = Progress(label, len(windows))
    found, original = {way: ([], [], []) for way in ways}, []
    for batch in windows.to(model.embed.weight.device).split(BATCH):
        targets = batch[:, prompt + 1:]
        x = first.hidden(batch[:, :-1])[:, prompt:]
        log_p, loss = predicted(first, x, targets)
        original += loss.tolist()
        seen = squeeze.read(model, batch[:, :prompt], ways)
        for way, (losses, divergences, sizes) in found.items():
            cache = way.of(seen, free=FOLLOWING)
            x = squeeze.read_at_once(model, cache, batch[:, prompt:-1])
            log_q, loss = predicted(model, x, targets)
            divergence = (log_p.exp() * (log_p - log_q)).sum(-1).mean(1)
            losses += loss.tolist()
            divergences += divergence.tolist()
            sizes.append(cache.nbytes // len(batch))
        progress.say(len(original))
    return found, original

# ---- cases: ways to keep a model's cache, at equal bytes ----

def bytes_per_token(model, storage):
    """Of a cache of one sequence, in all layers."""
    way = Stored(8, "window", 1, storage)
    tokens = torch.zeros(1, 8, dtype=torch.long, device=model.embed.weight.device)
    return way.of(squeeze.read(model, tokens, [way])).nbytes // 8

def cases(args, source, model, per_token, length, tokens, rest):
    """→ {way: rows}: the ways to keep a model's cache, and what results say of each at each of its ratios.
    tokens: how many there are to keep, the `rest` of which are read after the squeeze, and must stay.
    per_token: bytes in the first model's cache."""
    _, sha256 = model.origin                                # a model trained anew is another one
    origin = {
        "origin": f"sha256 {sha256[:8]}",
        "dtype": str(model.embed.weight.dtype).removeprefix("torch."),
        "text": args.text or "",
        "seed": args.seed,
    }
    found = {}
    for ratio, bits in itertools.product(args.ratios, args.cache_bits):
        storage = STORAGES[bits]
        n_bytes = int(ratio / 100 * per_token * tokens)
        budget = n_bytes // bytes_per_token(model, storage)
        if budget >= tokens:
            ways = [Stored(tokens, "window", 1, storage)]
        elif budget < rest + LEAST:
            raise ValueError(f"--ratios={ratio:g}: too few bytes for {rest + LEAST} tokens; take more")
        else:
            ways = [Squeezing(budget, policy, 1, storage) for policy in args.squeeze_policy]
        for way in ways:
            about = {"model": source, **described(model), **way.facts, **origin, "length": length}
            row = {**about, "ratio": ratio, "full_bytes": per_token * tokens}
            found.setdefault(way, []).append(row)
    return found

# ---- results, which a stopped run continues ----

class Results:
    """The rows of a CSV file, which is written again with each batch of new ones. `measured` are the columns
    that do not say what a row is about. Raises ValueError if the file holds another table, or half a row."""

    def __init__(self, file, measured):
        self.file, self.measured, self.rows = file, {*measured, *provenance()}, []
        if file and Path(file).is_file():
            with reading(file, "not a table of results", "name another file, or delete it"):
                self.rows = [*csv.DictReader(read_file(file).decode().splitlines())]
                if not all(map(self.is_whole, self.rows)):
                    raise ValueError("it has other columns, or half a row")

    def is_whole(self, row):
        """For csv, columns that a row lacks have the value None, and surplus cells the name None."""
        return None not in row and None not in row.values() and self.measured <= row.keys()

    def key(self, row):
        return frozenset((name, str(value)) for name, value in row.items() if name not in self.measured)

    def missing(self, rows):
        """→ those of these rows that are not there yet, whatever was measured."""
        known = {self.key(row) for row in self.rows}
        return [row for row in rows if self.key(row) not in known]

    def add(self, rows):
        self.rows += self.missing(rows)
        if self.file and self.rows:
            write_results(self.file, self.rows)

def answers(args, results, source, model, data, per_token):
    """Add the rows on right answers that are missing. per_token: bytes in the first model's cache."""
    for length, needles in itertools.product(args.lengths, map(int, args.needles)):
        prompts = make_prompts(data, args.prompts, length, needles, args.seed)
        contexts, pairs = prompts[0]
        _, digits = next(iter(pairs.values()))
        tokens = length + digits.size(1) - 1                    # the last digit is not read
        rest = tokens - contexts.size(1)
        rows = {}
        for way, known in cases(args, source, model, per_token, length, tokens, rest).items():
            rows[way] = [
                {**row, "needles": needles, "depth": depth, "question": when, "prompts": args.prompts}
                for row, depth, when in itertools.product(known, DEPTHS, WHEN)]
        missing = [way for way in rows if results.missing(rows[way])]
        if not missing:
            continue
        label = f"{source}, {length} tokens, needles: {needles}"
        found = count_right(model, prompts, missing, label)
        for way in missing:
            for row in rows[way]:
                row["right"], row["cache_bytes"] = found[way, row["depth"], row["question"]]
            results.add(rows[way])
        print_answers(label, [row for way in missing for row in rows[way]])

def case_name(row):
    """What a row says of a cache, as it is printed."""
    size = 100 * row["cache_bytes"] / row["full_bytes"]
    kept = f"{row['policy']} {row['budget']}" if row["policy"] else "all tokens"
    bits = f", {row['bits']} bits" if row["bits"] else ""
    return f"{row['ratio']:g} %: {kept}{bits}, {size:.1f} %"

def print_answers(label, rows):
    """The rows of a model, with all depths together."""
    lines = [[label, *WHEN]]
    for case, group in itertools.groupby(rows, case_name):
        group = list(group)
        cells = []
        for when in WHEN:
            chosen = [row for row in group if row["question"] == when]
            right = sum(row["right"] for row in chosen)
            asked = sum(row["prompts"] for row in chosen)
            cells.append(share_of(right, asked))
        lines.append([case, *cells])
    print_table(lines)
    print(flush=True)

def print_losses(label, rows):
    lines = [[label, "loss", "difference", "divergence"]]
    for row in rows:
        difference = f"{row['difference']:+.3f} ± {row['error']:.3f}"
        divergence = f"{row['divergence']:.3f} ± {row['divergence_error']:.3f}"
        lines.append([case_name(row), f"{row['loss']:.3f}", difference, divergence])
    print_table(lines)
    print(flush=True)

def texts(args, results, source, model, first, data, per_token):
    """Add the rows on loss and divergence that are missing."""
    for length in args.lengths:
        windows = data.windows("val", args.windows, length)
        rows = {}
        for way, known in cases(args, source, model, per_token, length, length, FOLLOWING).items():
            rows[way] = [{**row, "windows": args.windows} for row in known]
        missing = [way for way in rows if results.missing(rows[way])]
        if not missing:
            continue
        label = f"{source}, {length} tokens, windows of text"
        found, original = follow(model, first, windows, missing, label)
        for way in missing:
            losses, divergences, sizes = found[way]
            difference, error = paired_means(original, losses)
            divergence, divergence_error = mean_and_error(divergences)
            measured = {
                "cache_bytes": sizes[0],
                "loss": statistics.fmean(losses),
                "difference": difference,
                "error": error,
                "divergence": divergence,
                "divergence_error": divergence_error,
            }
            for row in rows[way]:
                row |= measured
            results.add(rows[way])
        print_losses(label, [row for way in missing for row in rows[way]])

def measure(args):
    """Measure all that is missing of all models, and compare each with the first."""
    if args.csv and args.csv == args.text_csv:
        raise ValueError(f"--text_csv={args.text_csv}: is the file of --csv, too; name another")
    answered, followed = Results(args.csv, ANSWERED), Results(args.text_csv, FOLLOWED)
    dtype = getattr(torch, args.dtype or choose_dtype(args.device))
    first = None
    for source in args.models:
        model, tokenizer, info = load(source, device=args.device, dtype=dtype)
        longest = model.config.block_size - FOLLOWING
        if max(args.lengths) > longest:
            raise ValueError(f"--lengths={max(args.lengths)}: too long for the context of {source}; "
                             f"take at most {longest}")
        if first is None:
            first, identity = model, tokenizer.identity
            data = data_of(info, tokenizer, args.text)
            data.windows("val", max(args.prompts, args.windows), max(args.lengths))     # is there enough?
            per_token = 2 * sum(k + v for _, k, v in (block.attn.widths for block in model.blocks))
        if tokenizer.identity != identity:
            raise ValueError(f"{source}: its tokens are not those of {args.models[0]}; compare models "
                             "with the same tokenizer")
        answers(args, answered, source, model, data, per_token)
        if args.windows:
            texts(args, followed, source, model, first, data, per_token)

# ---- the command ----

def main():
    parser = Parser(__doc__, usage="python -m minisa.lab.recall MODEL [MODEL ...] [--FLAG=VALUE ...]")
    add_models(parser)
    policies = ",".join(squeeze.POLICIES)
    parser.flag("lengths", several(at_least(int, 64)), "512", "lengths of the prompts, in tokens")
    parser.flag("ratios", several(at_least(float, 1, 100)), "100,60,40,25", "sizes of caches, in percent of "
                "a bfloat16 cache of the first model")
    parser.flag("squeeze_policy", several(one_of(*squeeze.POLICIES)), policies, "which tokens are kept where "
                "not all fit")
    parser.flag("cache_bits", several(one_of(*STORAGES)), ",".join(STORAGES), "8: int8; 16: as --dtype")
    parser.flag("needles", several(one_of("1", "4")), "1,4", "numbers in a prompt")
    parser.flag("prompts", count, 100, "prompts for each length, depth and count of needles")
    parser.flag("windows", whole, 64, "windows of text, for loss and divergence; 0: none")
    parser.flag("text", help="UTF-8 file to hide the numbers in",
                shown="what the first model was trained on, or the plays")
    parser.flag("seed", whole, 1337, "random seed for the numbers")
    parser.flag("csv", table, None, "file to write the answers to, as .csv", "none")
    parser.flag("text_csv", table, None, "file to write loss and divergence to, as .csv", "none")
    add_dtype(parser, "number format of weights and cache", None, "the faster one here")
    add_device(parser)
    args = parser.parse_intermixed_args()
    keep_memory()
    measure(args)

if __name__ == "__main__":
    command(main)
