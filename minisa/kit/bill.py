"""The bill: what each model costs, predicted and measured, as a table of text, CSV or a picture."""

import json
import math

from minisa.cost import measure, predict
from minisa.decode import handles
from minisa.kit import files
from minisa.kit.checkpoint import changes
from minisa.kit.picture import pyplot, save
from minisa.kit.results import print_table
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

# ---- the table ----

def engine_of(model, cache=None):
    """What GPT.stream() decodes with: "numpy" (decode.py) or "torch" (model.py)."""
    cache = cache or KVCache(model, 1, 1)
    return "numpy" if handles(model, cache) else "torch"

def predicted(model, context, cache=None):
    """→ the Cost of a token in the model's dtype, with a KVCache or a cache of another kind."""
    if cache:
        return cache.predict(model, context)
    return predict(model, context, bytes_per_number=model.embed.weight.element_size())

def both(predicted, measured):
    """One number if prediction and measurement agree, else both."""
    if predicted == measured:
        return f"{predicted:,}"
    return f"ERROR: predicted {predicted:,}, measured {measured:,}"

def row(name, model, bpb, speed, context, cache=None, of_limit=None):
    """→ a row of the bill, as a dict of text, and whether every prediction was met.

    bpb: bits per byte on the validation text, or None. speed: decoded tokens per second, or None.
    of_limit: share_of_limit() of that, or None. context: tokens in the cache; at most block_size
    count. cache: as of the for_bill() of a way to keep it (minisa.axes.squeeze), or None.
    """
    if bpb is not None and not math.isfinite(bpb):
        raise ValueError(f"{name}: its loss is {bpb}: its weights are damaged; make it again")
    context = min(context, model.config.block_size)
    engine, p = engine_of(model, cache), predicted(model, context, cache)
    m = measure(model, context, cache_of=(lambda _: cache) if cache else None, engine=engine)
    values = [name, sharing(model), both(p.params, m.params),
              "?" if bpb is None else f"{bpb:.4f}",
              both(p.cache_bytes_per_token, m.cache_bytes_per_token), f"{context:,}",
              both(p.cache_bytes, m.cache_bytes), both(p.read_bytes, m.read_bytes),
              both(p.decode_flops, m.decode_flops), "" if speed is None else f"{speed:,.0f}",
              "" if of_limit is None else f"{of_limit:.2f}", engine]
    return dict(zip(COLUMNS, values)), p == m

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
