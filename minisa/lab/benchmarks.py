"""What sharing costs a real LLM, by three measures: right answers, divergence, loss.

    python -m minisa.lab.benchmarks smollm2 out/eight --questions=300       side by side
    python -m minisa.lab.benchmarks smollm2 out/eight --tasks=lambada       all of its 5,153 questions

Right answers to seven standard benchmarks, zero-shot. Of the continuations of a context, the model picks the
one with the highest log probability, divided by its characters where the benchmark says so; LAMBADA's answer
is right if the model would write just that word. "Nats" is the mean of -log p of the right continuation.

Loss and divergence (KL, from the first model, in nats per token) on two held-out texts: the plays, and
passages of an encyclopedia, stories, science (minisa/lab/questions.py).

All models get the same questions and windows, so differences from the first model are paired. Their
intervals hold together: 95 % for all that are printed (Bonferroni). Answers are kept in --out_dir, where a
stopped run continues.
"""

import json
import math
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F

from minisa.kit.checkpoint import described, load
from minisa.kit.cli import (
    Parser,
    add_device,
    add_dtype,
    add_models,
    command,
    count,
    one_of,
    several,
    table,
    whole,
)
from minisa.kit.data import tokenize
from minisa.kit.files import lock, read_file, reading, write_file
from minisa.kit.machine import choose_dtype, keep_memory
from minisa.kit.results import print_table, write_results
from minisa.lab.questions import TASKS, prepare, questions
from minisa.model import KVCache

TEXTS = {"plays": None, "passages": "passages.txt"}      # their held-out parts
KEPT_EVERY = 50             # answers, or windows
LEVEL = 0.95                # of all intervals together

# ---- one question ----

def common_length(rows):
    """How many first tokens all rows have in common."""
    n = 0
    for column in zip(*rows):
        if len(set(column)) > 1:
            break
        n += 1
    return n

def copies(cache, model, n):
    """A cache of one sequence → one of n sequences that hold the same."""
    wider = KVCache(model, n, cache.size)
    for new, old in zip(wider.tensors, cache.tensors):
        new.copy_(old)                                          # (1, G, S, D) → (n, G, S, D)
    wider.where.copy_(cache.where)
    wider.length = cache.length
    return wider

def cut(row, start, most):
    """A row of tokens whose continuation begins at `start` → its last `most` + 1 tokens, and where it
    begins there. One token of the context remains."""
    dropped = max(0, len(row) - most - 1)
    return row[dropped:], max(1, start - dropped)

@torch.inference_mode()
def log_probabilities(model, rows):
    """rows: n pairs (tokens, where the continuation begins). → for each, the sum of log p of the
    continuation's tokens, and whether the model would write them, greedily. What all rows begin with is read
    once."""
    device, size = model.embed.weight.device, model.config.block_size
    rows, starts = zip(*(cut(row, start, size) for row, start in rows))
    longest = max(map(len, rows)) - 1
    cache = KVCache(model, 1, longest)
    first = min(common_length(rows), min(starts) - 1)
    if first > 0:
        model.read(torch.tensor([rows[0][:first]], device=device), cache)
    rests = [row[first:] + [0] * (longest + 1 - len(row)) for row in rows]
    rests = torch.tensor(rests, device=device)                          # (n, T + 1)
    logits, _ = model(rests[:, :-1], cache=copies(cache, model, len(rows)))
    found = []
    for row, start, rest, row_logits in zip(rows, starts, rests, logits):
        begin, end = start - first, len(row) - first                    # of the continuation
        log_p = row_logits[begin - 1:end - 1].float().log_softmax(-1)
        targets = rest[begin:end]
        total = -F.nll_loss(log_p, targets, reduction="sum").item()
        found.append((total, bool((log_p.argmax(-1) == targets).all())))
    return found

def answer(model, encode, task, question):
    """→ (is it right, nats of the right continuation). question: as in questions.py."""
    texts = list(zip(question["contexts"], question["continuations"]))
    rows = [(encode(context + continuation), len(encode(context))) for context, continuation in texts]
    found = log_probabilities(model, rows)
    right = question["right"]
    nats = -found[right][0]
    if task.last_word:
        return found[right][1], nats
    scores = [total for total, _ in found]
    if task.per_character:
        scores = [total / (len(text) - 1) for total, (_, text) in zip(scores, texts)]   # without its space
    return scores.index(max(scores)) == right, nats

# ---- all questions of a task, or all windows of a text, kept on disk ----

def kept_pairs(file):
    """→ the pairs of numbers that an earlier run kept: for each question, whether the answer is right (1.0 or
    0.0), and the nats of the right continuation; for each window of text, the loss and the divergence."""
    if not file.exists():
        return []
    with reading(file, "not answers that this command wrote", "delete it"):
        return [(float(a), float(b)) for a, b in json.loads(read_file(file))]

class Progress:
    """Reports on stderr, at most every five seconds, how far a long piece of work has come. before: how much
    of it an earlier run did."""

    def __init__(self, what, total, before=0):
        self.what, self.total, self.before = what, total, before
        self.begun = self.said = time.perf_counter()

    def say(self, done):
        now = time.perf_counter()
        if now - self.said < 5:
            return
        self.said = now
        each = (now - self.begun) / (done - self.before)
        minutes = each * (self.total - done) / 60
        print(f"{self.what}: {done} of {self.total}, {minutes:.1f} minutes left", file=sys.stderr, flush=True)

def measure_all(measure_one, items, file, label):
    """→ the pair of numbers that measure_one() returns for each item; those that the file keeps are not
    measured again."""
    pairs = kept_pairs(file)
    progress = Progress(label, len(items), len(pairs))
    for item in items[len(pairs):]:
        pairs.append(measure_one(item))
        if len(pairs) % KEPT_EVERY == 0 or len(pairs) == len(items):
            write_file(file, json.dumps(pairs).encode())
        progress.say(len(pairs))
    return pairs

# ---- differences ----

def half_width(error, comparisons):
    """Of the interval around a difference with this standard error, so that all of them hold at LEVEL."""
    return statistics.NormalDist().inv_cdf(1 - (1 - LEVEL) / 2 / comparisons) * error

def lost_and_won(before, after):
    """Right answers (0 or 1) to the same questions → how many were lost, and how many won."""
    pairs = list(zip(before, after))
    return pairs.count((1, 0)), pairs.count((0, 1))

def paired_proportions(before, after):
    """Right answers (0 or 1) to the same questions → the difference of their fractions and its standard
    error, by Agresti and Min (2005): half a question is added to each cell of the table."""
    lost, won = (cell + 0.5 for cell in lost_and_won(before, after))
    n = len(before) + 2
    error = math.sqrt(lost + won - (won - lost)**2 / n) / n
    return statistics.fmean(after) - statistics.fmean(before), error

def mean_and_error(values):
    """→ the mean of some numbers, and its standard error."""
    if len(values) < 2:
        return statistics.fmean(values), math.inf
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))

def paired_means(before, after):
    """→ the mean difference of two lists of numbers, and its standard error."""
    return mean_and_error([b - a for a, b in zip(before, after)])

def mcnemar(lost, won):
    """Exact two-sided McNemar test: the probability of a split at least as uneven, if each of the changed
    answers is as likely to be lost as won."""
    n = lost + won
    tail = sum(math.comb(n, i) for i in range(min(lost, won) + 1)) / 2**n
    return min(1.0, 2 * tail)

# ---- all measures of all models ----

@torch.inference_mode()
def loss_and_divergence(model, original, windows):
    """windows (N, T + 1) → two means over their last T tokens, in nats per token: the loss of a model, and
    its KL divergence from the original."""
    inputs, targets = windows[:, :-1], windows[:, 1:]
    log_q = model(inputs)[0].float().log_softmax(-1)            # (N, T, V)
    log_p = log_q if original is model else original(inputs)[0].float().log_softmax(-1)
    loss = F.nll_loss(log_q.flatten(0, 1), targets.flatten())
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    return loss.item(), divergence.item()

def measure(args, source, first=None):
    """→ the model with its tokenizer, and {(task or text, measure): a number for each question or window}.
    first: the model with its tokenizer that it diverges from; None: it is that. Raises ValueError if their
    tokens differ."""
    model, tokenizer, _ = load(source, device=args.device, dtype=getattr(torch, args.dtype))
    original, its_tokenizer = first or (model, tokenizer)
    if args.windows and tokenizer.identity != its_tokenizer.identity:
        raise ValueError(f"{source}: its tokens are not those of {args.models[0]}, so there is no divergence "
                         "from it; take --windows=0")
    (_, sha256), (_, its_sha256) = model.origin, original.origin
    folder, ending = Path(args.out_dir), f"{args.dtype}-{sha256[:16]}"
    measured = {}
    for name in args.tasks:
        asked = questions(name, args.questions)
        kept = folder / f"{name}-{len(asked)}-{ending}.json"
        ask = partial(answer, model, tokenizer.encode, TASKS[name])
        answers = measure_all(ask, asked, kept, f"{source}, {name}")
        measured[name, "right"], measured[name, "nats"] = zip(*answers)
    texts = TEXTS if args.windows else {}
    for name, file in texts.items():
        data = tokenize(file and prepare() / file, tokenizer=tokenizer)
        T = min(512, model.config.block_size)
        windows = data.windows("val", args.windows, T).to(args.device)
        kept = folder / f"{name}-{args.windows}-{ending}-{its_sha256[:16]}.json"
        measure_window = partial(loss_and_divergence, model, original)
        pairs = measure_all(measure_window, windows.split(1), kept, f"{source}, windows of {name}")
        measured[name, "loss"], measured[name, "divergence"] = zip(*pairs)
    return (model, tokenizer), measured

def compare(known, measured, first, comparisons):
    """Yield a row for a CSV file for each measure of a model, beside the first model's (None: it is that).
    known: the columns that say which model it is."""
    for (task, name), values in measured.items():
        row = {
            **known,
            "task": task,
            "measure": name,
            "questions": len(values),
            "value": statistics.fmean(values),
        }
        if first is not None:
            before = first[task, name]
            paired = paired_proportions if name == "right" else paired_means
            difference, error = paired(before, values)
            row |= {"difference": difference, "half_width": half_width(error, comparisons)}
        if first is not None and name == "right":
            lost, won = lost_and_won(before, values)
            row |= {"lost": lost, "won": won, "p": mcnemar(lost, won)}
        yield row

def over_all(known, measured, first, comparisons):
    """The row of the mean over the tasks, each of the same weight."""
    tasks = [task for task, name in measured if name == "right"]
    row = {
        **known,
        "task": "all",
        "measure": "right",
        "questions": sum(len(measured[task, "right"]) for task in tasks),
        "value": statistics.fmean(statistics.fmean(measured[task, "right"]) for task in tasks),
    }
    if first is not None:
        pairs = [paired_proportions(first[task, "right"], measured[task, "right"]) for task in tasks]
        differences, errors = zip(*pairs)
        error = math.sqrt(sum(error**2 for error in errors)) / len(tasks)
        row |= {
            "difference": statistics.fmean(differences),
            "half_width": half_width(error, comparisons),
        }
    return row

def as_text(row):
    """A row as it is printed."""
    is_right = row["measure"] == "right"
    scale, unit, digits = (100, " %", 1) if is_right else (1, "", 4)
    value = f"{row['value'] * scale:.{digits}f}{unit}"
    cells = [row["model"], row["task"], row["measure"], f"{row['questions']:,}", value]
    if "difference" in row:
        cells.append(f"{row['difference'] * scale:+.{digits}f} ± {row['half_width'] * scale:.{digits}f}")
        cells.append(f"{row['lost']} lost, {row['won']} won, p {row['p']:.2g}" if "lost" in row else "")
    else:
        cells += ["", ""]
    return cells

def rows_of(args):
    """→ the rows of all models, printed as they come."""
    measures = 2 * len(args.tasks) + bool(args.tasks)           # right answers, nats; the mean of all
    if args.windows:
        measures += 2 * len(TEXTS)                              # loss, divergence
    comparisons = measures * max(1, len(args.models) - 1)
    first_model, first = None, None
    rows = []
    for source in args.models:
        model, measured = measure(args, source, first_model)
        known = {"model": source, **described(model[0])}
        found = list(compare(known, measured, first, comparisons))
        if args.tasks:
            found.append(over_all(known, measured, first, comparisons))
        head = ["model", "task", "measure", "questions", "value", "difference from the first", ""]
        print_table([head, *map(as_text, found)], words=3)
        rows += found
        if first is None:
            first_model, first = model, measured
    return rows

# ---- the command ----

def main():
    parser = Parser(__doc__, usage="python -m minisa.lab.benchmarks MODEL [MODEL ...] [--FLAG=VALUE ...]")
    add_models(parser)
    parser.flag("tasks", several(one_of(*TASKS, "none")), ",".join(TASKS), "benchmarks, with commas between "
                "them; or none")
    parser.flag("questions", count, None, "how many questions of each benchmark, evenly spaced", "all")
    parser.flag("windows", whole, 48, "windows of 512 tokens of each text, for loss and divergence; 0: none")
    parser.flag("out_dir", str, "out/benchmarks", "folder to keep the answers in")
    parser.flag("csv", table, None, "file to write the results to, as .csv", "none")
    add_dtype(parser, "number format of the weights", None, "the faster one here")
    add_device(parser)
    args = parser.parse_intermixed_args()
    keep_memory()
    args.dtype = args.dtype or choose_dtype(args.device)
    args.tasks = [name for name in args.tasks if name != "none"]
    if not args.tasks and not args.windows:
        raise ValueError("--tasks=none, --windows=0: leave nothing to measure; give one of them")
    with lock(args.out_dir):
        rows = rows_of(args)
    if args.csv:
        write_results(args.csv, rows)

if __name__ == "__main__":
    command(main)
