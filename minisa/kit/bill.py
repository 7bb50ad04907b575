"""The bill: what each model costs, predicted and measured, as a table of text, CSV or a picture."""

import json
import math
import time

import torch

from minisa.cost import measure, predict
from minisa.decode import handles
from minisa.kit import files
from minisa.kit.checkpoint import changes
from minisa.kit.picture import pyplot, save
from minisa.model import KVCache

COLUMNS = ["model", "sharing", "parameters", "val bpb", "cache B/token", "context", "cache B",
           "read B/token", "FLOPs/token", "tokens/s", "of limit", "engine"]
WORDS = COLUMNS[:2]                                 # the other columns are numbers, but the last
PANELS = ["val bpb", "cache B/token", "FLOPs/token", "tokens/s"]

def sharing(model):
    """What the layers of a model share, and what changed them since, in words."""
    config = model.config
    parts = [f"{config.share_kind} {config.share}" if config.share else "none"]
    for change in changes(model):
        words = [change["by"], *change["settings"].values()]
        parts.append(" ".join(str(word) for word in words if isinstance(word, (str, int))))
    return ", ".join(parts)

# ---- speed, and the most that this machine's memory allows ----

SMALL = 2**22           # bytes that the cache of any processor holds
LARGE = 2**28           # bytes, more than the cache of nearly any processor
IN_CACHE = 2.0          # what is read so many times as fast as main memory lies in the cache

def timed(f, where, at_least=0.05):
    """Seconds that f() takes on the device `where`, from as many calls as fill at_least seconds."""
    calls, elapsed, begun = 0, 0.0, time.perf_counter()
    while elapsed < at_least:
        f()
        if where.type != "cpu":
            torch.accelerator.synchronize(where)
        calls, elapsed = calls + 1, time.perf_counter() - begun
    return elapsed / calls

def reader(where, n_bytes=LARGE):
    """→ a function that reads the same n_bytes on a device each time it is called."""
    return torch.ones(n_bytes // 4, device=where).sum

def in_cache(n_bytes, where):
    """Whether so many bytes, read over and over, come from the processor's cache."""
    if not SMALL < n_bytes < LARGE:                     # reading less would time starting to read
        return n_bytes <= SMALL
    speed, memory = (max(n / timed(reader(where, n), where, 0.03) for _ in range(3))
                     for n in (n_bytes, LARGE))
    return speed > IN_CACHE * memory

def share_of_limit(read_bytes, seconds, where):
    """Of the seconds that a step took, the part in which main memory could have delivered what it
    read; None if the processor's cache holds that."""
    if in_cache(read_bytes, where):
        return None
    return read_bytes / LARGE * timed(reader(where), where) / seconds

# ---- the table ----

def engine_of(model, cache=None):
    """What GPT.stream() decodes with: "numpy" (decode.py) or "torch" (model.py)."""
    weight = model.embed.weight
    cache = cache or KVCache(model, 1, 1, weight.dtype, weight.device)
    return "numpy" if handles(model, cache) else "torch"

def both(predicted, measured):
    """One number if prediction and measurement agree, else both."""
    if predicted == measured:
        return f"{predicted:,}"
    return f"ERROR: predicted {predicted:,}, measured {measured:,}"

def row(name, model, bpb, speed, context, cache=None, of_limit=None):
    """→ a row of the bill, as a dict of text, and whether every prediction was met.

    bpb: bits per byte on the validation text, or None. speed: decoded tokens per second, or None.
    of_limit: share_of_limit() of that, or None. context: tokens in the cache; at most block_size
    count. cache: one of another kind than KVCache that holds context - 1 tokens, and says in .rooms
    how many each layer has room for.
    """
    if bpb is not None and not math.isfinite(bpb):
        raise ValueError(f"{name}: its loss is {bpb}: its weights are damaged; make it again")
    context = min(context, model.config.block_size)
    rooms = cache.rooms if cache else None
    size, engine = model.embed.weight.element_size(), engine_of(model, cache)
    p = predict(model, context, bytes_per_number=size, kept=rooms)
    m = measure(model, context, cache_of=(lambda _: cache) if cache else None, engine=engine)
    values = [name, sharing(model), both(p.params, m.params),
              "?" if bpb is None else f"{bpb:.4f}",
              both(p.cache_bytes_per_token, m.cache_bytes_per_token), f"{context:,}",
              both(p.cache_bytes, m.cache_bytes), both(p.read_bytes, m.read_bytes),
              both(p.decode_flops, m.decode_flops), "" if speed is None else f"{speed:,.0f}",
              "" if of_limit is None else f"{of_limit:.2f}", engine]
    return dict(zip(COLUMNS, values)), p == m

def print_table(rows, words=1):
    """Print rows of text, the first one the header: so many columns of words to the left, numbers
    to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        cells = [text.rjust(width) for text, width in zip(row, widths)]
        cells[:words] = [text.ljust(width) for text, width in zip(row, widths[:words])]
        print("  ".join(cells).rstrip())

def show(rows):
    print_table([COLUMNS, *(row.values() for row in rows)], len(WORDS))

def write_csv(rows, file):
    """Write rows as CSV, numbers without commas."""
    files.write_csv(file, COLUMNS, [[value if column in WORDS else value.replace(",", "")
                                     for column, value in row.items()] for row in rows])

def as_json(rows, right):
    """All of the bill in one line of JSON: numbers as numbers, null where one is not known."""
    def value(column, text):
        if column in WORDS or not text[:1].isdigit():
            return text if text not in ("", "?") else None
        number = float(text.replace(",", ""))
        return int(number) if number.is_integer() and "." not in text else number
    bill = [{column: value(column, text) for column, text in row.items()} for row in rows]
    return json.dumps({"bill": bill, "predictions_met": right})

def draw(rows, file):
    """Draw rows as bars, a panel for each column of PANELS."""
    plt = pyplot("--plot")
    names = [f"{row['model']}\nsharing {row['sharing']}" for row in rows]
    size = (13, 1.2 + 0.6 * len(rows))
    figure, axes = plt.subplots(1, len(PANELS), figsize=size, sharey=True, layout="constrained")
    for axis, panel in zip(axes, PANELS):
        texts = [row[panel] for row in rows]
        values = [float(text.replace(",", "")) if text[:1].isdigit() else 0.0 for text in texts]
        bars = axis.barh(range(len(rows)), values, color="#4878a8")
        axis.bar_label(bars, texts, padding=3, fontsize=8)
        axis.set_title(panel, fontsize=9)
        axis.set_xlim(0, 1.35 * max(values) or 1)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(rows)), names)
    axes[0].invert_yaxis()
    save(figure, file)
