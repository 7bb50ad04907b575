"""The tables of the pages, made from the files in assets/results, so that a page always agrees with them.

A page has `<!-- table: NAME -->` above each such table. experiments.py --check compares all of them with
their results, and --update writes them again. A table is data, in tables.toml; pivot() makes it.
"""

import csv
import math
import re
import tomllib
from pathlib import Path
from statistics import NormalDist

from minisa.kit.files import read_file, write_file
from minisa.lab.benchmarks import half_width

ROOT = Path(__file__).resolve().parents[2]
MARK = re.compile(r"(<!-- table: ([\w-]+) -->\n)((?:\|.*\n)*)")
TEXT = ("mode equal model share share_kind changes policy library dtype engine work windows spans best_span "
        "refitted task measure question commit processor torch date").split()   # columns of words

# ---- reading ----

def pandas():
    """→ the library pandas. Raises ValueError if it is missing."""
    try:
        import pandas
    except ImportError:
        raise ValueError("results are read with pandas; install it with: pip install pandas") from None
    return pandas

def result(name):
    return ROOT / "assets" / "results" / f"{name}.csv"

def load(file):
    """A CSV file of results → a DataFrame, with NaN for numbers that were not measured. A column in which no
    cell is a number holds words. Raises ValueError if the file is damaged, OSError if it cannot be read."""
    library = pandas()
    try:
        text = read_file(file, 2**20).decode()
        head, *lines = csv.reader(text.splitlines())
        if any(len(line) != len(set(head)) for line in lines):
            raise ValueError("a line does not have as many cells as there are columns")
        rows = library.DataFrame(lines, columns=head)
        parsed = rows.apply(library.to_numeric, errors="coerce")
        words = parsed.isna().all() & (rows != "").any()        # which columns hold no number
        numbers = rows.columns[~words].difference(TEXT)
        rows[numbers] = rows[numbers].apply(library.to_numeric)
    except (ValueError, csv.Error) as error:
        reason = str(error)[:200]
        raise ValueError(f"{file}: damaged ({reason}); repair that line, or restore the file") from error
    return rows

def read(*names):
    """The rows of files of assets/results, with a column `file` that says which; none if none is there."""
    files = {name: result(name) for name in names}
    frames = [load(file).assign(file=name) for name, file in files.items() if file.exists()]
    if not frames:
        return pandas().DataFrame()
    return pandas().concat(frames, ignore_index=True)

# ---- trainings ----

SETTINGS = ["steps", "learning_rate", "warmup_iters"]
MODE = ["file", "mode", "equal"]

def over(rows, value, reference, pair):
    """The value of each row, divided by that of the row that meets the condition `reference`, among the rows
    that agree with it in the columns `pair`."""
    base = rows.query(reference).drop_duplicates(pair).set_index(pair)
    of_each = base[value].reindex(rows.set_index(pair).index)
    return rows[value] / of_each.to_numpy()

def percent(mean, deviation=math.nan):
    """A difference in percent, as text; nothing for 0, where full attention is compared to itself."""
    text = f"{mean:+z.2f}".replace("-", "−")                                # z: never −0.00
    spread = "" if math.isnan(deviation) else f" ± {deviation:.2f}"
    return f"{text}{spread} %" if mean else ""

def best_first(runs):
    """The runs with the first seed, in the order of their loss."""
    return runs.query("seed == 1").sort_values("val_bpb", kind="stable")

def best(runs):
    """→ {mode: its settings that are best with the first seed}"""
    if runs.empty:
        return {}
    first = best_first(runs).drop_duplicates("mode")
    return first.set_index("mode")[SETTINGS].to_dict("index")

def at_best(rows):
    """Training runs → those of each mode with the settings that are best with the first seed: full attention
    first, then by mean loss. percent: over full attention with the same seed."""
    equal = rows["equal"].fillna("steps") if "equal" in rows else "steps"
    rows = rows.assign(equal=equal)
    first = best_first(rows).drop_duplicates(MODE)
    best = rows.merge(first[[*MODE, *SETTINGS]])

    ratio = over(best, "val_bpb", "mode == 'full'", ["file", "seed"])
    best["percent"] = 100 * ratio - 100
    best["shares"] = best["mode"] != "full"
    modes = best.groupby(MODE)
    best["mean"] = modes["val_bpb"].transform("mean")
    best["difference"] = modes["percent"].transform("mean")
    best["deviation"] = modes["percent"].transform("std")
    best["over"] = list(map(percent, best["difference"], best["deviation"]))

    depth = best["file"].map({"depth": "8 layers, "}).fillna("")
    best["name"] = depth + best["mode"]
    return best.sort_values(["shares", "mean", "seed"])

# ---- ten seeds ----

SHAPE = ["share", "share_kind", "n_kv_head"]

def named(runs):
    """Runs of the study seeds, with a column `mode`, as "SA 1-3, MQA"."""
    kind = runs["share_kind"].map({"": "", "weights": "SA ", "kv": "CLA "})
    heads = runs["n_kv_head"].map({1: "MQA"}).fillna("")
    names = (kind + runs["share"] + ", " + heads).str.strip(", ")
    return runs.assign(mode=names.replace("", "full"))

def best_unreported(runs):
    """→ {mode: its learning rate and warm-up} that are best with seed 0, on the two plays that choose."""
    first = runs.query("seed == 0").sort_values("select_bpb", kind="stable").drop_duplicates("mode")
    return {run.mode: (run.learning_rate, run.warmup_iters) for run in first.itertuples()}

def by_seed(runs, value):
    """Runs → a row for each seed that all modes have run in one number format, a column for each mode."""
    return runs.pivot(index=["seed", "dtype"], columns="mode", values=value).dropna()

def time_ratios(runs):
    """→ for each seed and mode, the time of a run over that of full attention"""
    minutes = by_seed(runs, "minutes")
    return minutes.div(minutes["full"], axis=0)

def quantile(p, freedom):
    """→ the quantile of Student's t: the expansion of Abramowitz and Stegun, 26.7.5."""
    z = NormalDist().inv_cdf(p)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3

def compare(runs):
    """Runs → a row for each mode, full attention first: means over the seeds that all modes have run, the
    difference from full attention in percent, and its standard error.

    A loss is modeled as the sum of an effect of its mode, an effect of its seed, and a residual. The error
    follows from the standard deviation of the residual, pooled over modes.
    """
    losses = by_seed(runs, "report_bpb")
    full, (n, n_modes) = losses["full"], losses.shape
    of_mode = losses.sub(losses.mean(axis=1), axis=0)       # without the effect of the seed
    residual = of_mode - of_mode.mean()
    freedom = (n - 1) * (n_modes - 1)
    pooled = math.sqrt((residual**2).to_numpy().sum() / freedom)
    rows = runs.drop_duplicates("mode", keep="last").set_index("mode").assign(
        seeds=n, freedom=freedom, bpb=losses.mean(), four_bpb=by_seed(runs, "val_bpb").mean(),
        difference=100 * losses.mean() / full.mean() - 100,
        error=100 * pooled * math.sqrt(2 / n) / full.mean(),
        deviation=losses.div(full / 100, axis=0).std(),
        time=time_ratios(runs).apply(median_interval))
    rows.loc["full", "difference"] = -math.inf              # comes first
    return rows.sort_values("difference").reset_index()

def median_interval(values):
    """→ the median, and an interval for it that holds at 95 % by the sign test, as text."""
    n, ordered = len(values), sorted(values)
    outside = [2 * sum(math.comb(n, i) for i in range(k)) / 2**n for k in range(1, n)]
    k = sum(part <= 0.05 for part in outside)               # the k-th smallest and the k-th largest
    interval = f" ({ordered[k - 1]:.2f} to {ordered[-k]:.2f})" if k else ""
    return f"{values.median():.2f}{interval}"

MARGIN = 0.5            # percent: a difference that is surely smaller is called equal

def verdict(low, high):
    """What an interval says about a difference from full attention."""
    small = -MARGIN < low and high < MARGIN
    if low <= 0 <= high:
        return f"equal within {MARGIN} %" if small else "open"
    return ("higher" if low > 0 else "lower") + (f", by less than {MARGIN} %" if small else "")

def ten_seeds(rows):
    """Runs of the study seeds → their comparisons with full attention: at equal steps, at equal time, and
    with more steps. Each needs two seeds, and half as many as the one that has most: fewer say too little."""
    runs = named(rows).query("seed > 0")
    same = runs.query("equal == 'steps'")
    groups = {f"{steps:,} steps": part for steps, part in same.groupby("max_iters")}
    if groups:
        first = [*groups.values()][0].query("mode == 'full'")
        groups["equal time"] = pandas().concat([runs.query("equal == 'time'"), first])
    modes = runs["mode"].nunique()
    seeds = {name: len(by_seed(part, "report_bpb")) for name, part in groups.items()
             if part["mode"].nunique() == modes}
    found = [compare(groups[name]).assign(group=name) for name, n in seeds.items()
             if n > 1 and 2 * n >= max(seeds.values())]
    if not found:
        raise KeyError("two seeds of each mode")
    table = pandas().concat(found, ignore_index=True)
    comparisons = (table["mode"] != "full").sum()

    table["together"] = [quantile(1 - 0.025 / comparisons, row.freedom) * row.error
                         for row in table.itertuples()]     # half-widths that hold at once
    cells = []
    for row in table.itertuples():
        each = quantile(0.975, row.freedom) * row.error
        says = verdict(row.difference - row.together, row.difference + row.together)
        shown = percent(row.difference, each), f"± {row.together:.2f} %", says
        cells.append(shown if row.mode != "full" else ("", "", ""))
    table[["over", "at_once", "verdict"]] = cells
    return table.assign(name=table["group"] + ": " + table["mode"])

def formats(rows):
    """Runs of the study seeds in float32, over the same in bfloat16."""
    runs = named(rows).query("seed > 0")
    ratio = over(runs, "report_bpb", "dtype == 'bfloat16'", ["mode", "equal", "max_iters", "seed"])
    runs = runs.assign(percent=100 * ratio - 100).query("dtype == 'float32'").dropna(subset="percent")
    modes = runs.groupby("mode")
    mean, deviation = modes["percent"].transform("mean"), modes["percent"].transform("std")
    return runs.assign(
        bpb=modes["report_bpb"].transform("mean"), seeds=modes["seed"].transform("count"),
        over=list(map(percent, mean, deviation)))

# ---- bills ----

def over_whole(rows):
    """Rows of a bill, with the loss of each over that of full attention with its whole cache, in brackets."""
    ratio = over(rows, "val_bpb", "share == '' and policy == ''", ["file"])
    differences = [percent(100 * value - 100) for value in ratio]
    shown = [f" ({difference})" if difference else "" for difference in differences]
    return rows.assign(in_brackets=shown)

# ---- speeds and answers ----

ATTENTION = {"": "full attention", "weights": "Shared Attention", "kv": "Cross-Layer Attention"}
SPEED = "tokens_per_s"

def speeds(rows):
    return rows.assign(
        attention=rows["share_kind"].replace(ATTENTION),
        over=over(rows, SPEED, "share == ''", ["model", "engine", "work"]),
        over_torch=over(rows, SPEED, "engine == 'torch'", ["model", "share_kind", "work"]))

def speeds_smollm2(rows):
    reference = "library == 'minisa' and share == '' and (engine == 'numpy' or work == 'prefill')"
    rows = rows.assign(over=over(rows, SPEED, reference, ["file", "work"]))
    return rows.query("file == 'speed-smollm2' or library == 'transformers'")

def speeds_nanogpt(rows):
    ratio = over(rows, SPEED, "library == 'nanoGPT'", ["file", "model", "work"])
    shown = [f"{value:.2f}" if value < 10 else f"{value:.1f}" for value in ratio]
    return rows.assign(over=shown)

def latencies(rows):
    pair = ["model", "context"]
    part = rows["limit_ms_per_token"] / rows["ms_per_token"]
    return rows.assign(
        attention=rows["share_kind"].replace(ATTENTION),
        megabytes=rows["read_bytes"] / 1e6,
        over=1 / over(rows, "ms_per_token", "share == ''", pair),
        predicted=1 / over(rows, "read_bytes", "share == ''", pair),
        limit=["in cache" if math.isnan(value) else f"{100 * value:.0f} %" for value in part])

def three_measures(rows):
    """Rows of benchmarks.py, with the value of each and its difference from the first model as text."""
    shown = []
    for row in rows.itertuples():
        right = row.measure == "right"
        scale, digits = (100, 1) if right else (1, 3)
        text = f"{scale * row.value:.{digits}f}" + (" %" if right else "")
        half_width = f"{scale * row.half_width:.{digits}f}"
        if row.measure == "divergence" and row.value:           # the first model's is 0
            text += f" ± {half_width}"
        elif row.measure != "divergence" and not math.isnan(row.difference):
            text += f" ({scale * row.difference:+z.{digits}f} ± {half_width})"
        shown.append(text.replace("-", "−"))
    return rows.assign(shown=shown)

def interval(right, n, comparisons=1):
    """How many of n are right → the ends of the interval around their fraction after Agresti and Coull, so
    wide that as many of them as there are comparisons all hold with 95 %."""
    z = half_width(1, comparisons)
    near = (right + z**2 / 2) / (n + z**2)
    half = z * (near * (1 - near) / (n + z**2))**0.5
    return max(0.0, near - half), min(1.0, near + half)

def share_of(right, n, comparisons=1):
    """How many of n are right → the fraction and its interval(), as text."""
    low, high = interval(right, n, comparisons)
    return f"{right / n:.0%} ({100 * low:.0f} to {100 * high:.0f})"

def refitted(rows):
    return rows.query("refitted == 'yes'")

CASE = ["model", "share_kind", "policy", "bits", "length", "ratio", "cache_bytes", "full_bytes", "question"]

def answers(rows):
    """Rows of recall.py → one for each case and count of needles, with the answers for all depths together.
    What two files hold counts once."""
    rows = rows.drop_duplicates([*CASE, "needles", "depth"])
    cases = rows.groupby([*CASE, "needles"], dropna=False, sort=False)
    pooled = cases[["right", "prompts"]].sum().reset_index()
    counts = pooled["right"], pooled["prompts"], [len(pooled)] * len(pooled)
    low, high = zip(*map(interval, *counts))
    return pooled.assign(
        low=low,
        high=high,
        answers=list(map(share_of, *counts)),
        percent=100 * pooled["cache_bytes"] / pooled["full_bytes"])

def followed(rows):
    """Rows of recall.py on text, with 95 % intervals for all of them together. What two files hold counts
    once."""
    rows = rows.drop_duplicates([name for name in CASE if name in rows])
    width = half_width(1, 2 * len(rows))

    def shown(value, error, form):
        return [f"{value:{form}} ± {width * error:.2f}" for value, error in zip(rows[value], rows[error])]
    return rows.assign(
        loss=shown("difference", "error", "+z.2f"),
        kl=shown("divergence", "divergence_error", ".2f"))

# ---- the tables ----

TABLES = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))

def pivot(rows, table):
    """Results → the rows of a table, text, the first one its header."""
    names = table["rows"]
    if isinstance(names, str):
        values = rows[names].unique().tolist()
        names = {f"{names} == {value!r}": str(value) for value in values}
    columns = table["columns"]
    lines = [[table["head"], *columns]]
    for condition, name in names.items():
        chosen = rows.query(condition)
        cells = [fill(chosen, column) for column in columns.values()]
        lines.append([name, *cells])
    return lines

def fill(rows, column):
    """The text of a cell: the format, of the last of the rows that meet its condition."""
    form, *conditions = [column] if isinstance(column, str) else column
    for condition in conditions:
        rows = rows.query(condition)
    text = form.format_map(rows.iloc[-1]) if len(rows) else ""
    return re.sub("^-", "−", text)

def make(name):
    """The table of this name, rows of text. Raises ValueError if there is none, if its results are not all
    there, or if what tables.toml says of it is wrong."""
    if name not in TABLES:
        raise ValueError(f"no table is named {name}; there are {', '.join(TABLES)}")
    table = TABLES[name]
    missing = [str(result(file)) for file in table["files"] if not result(file).exists()]
    cells, rows = [], read(*table["files"])
    try:
        if not missing:
            derive = globals()[table["derive"]] if "derive" in table else pandas().DataFrame
            cells = pivot(derive(rows), table)
    except (KeyError, NameError) as error:                  # a column, or a run, is missing
        missing = [str(error)]
    except Exception as error:                              # a condition or a format is anything
        raise ValueError(f"table {name}: cannot be made ({error!r}); see tables.toml") from error
    missing += [row[0] for row in cells if not any(row[1:])]
    missing += [head for head, *column in zip(*cells) if not any(column)]
    if missing:
        raise ValueError(f"table {name}: its results are not all there ({', '.join(missing)}); continue "
                         f"with: python -m minisa.lab.experiments {table['study']}")
    return cells

# ---- pages ----

def pages():
    return [ROOT / "README.md", *sorted((ROOT / "minisa").glob("*/README.md"))]

def markdown(table):
    """A table, rows of text, as Markdown; the first row is its header."""
    lines = [f"| {' | '.join(row)} |\n" for row in table]
    lines.insert(1, "|" + " --- |" * len(table[0]) + "\n")
    return "".join(lines)

def renew(text):
    """The text of a page → the same with its tables made again, and the names of those that differ."""
    differ = []

    def replace(match):
        mark, name, old = match.groups()
        new = markdown(make(name))
        if new != old:
            differ.append(name)
        return mark + new
    return MARK.sub(replace, text), differ

def check_pages(update=False):
    """Compare all tables of all pages with their results → those that differ; update: write these again."""
    found = []
    for page in pages():
        text, differ = renew(page.read_text(encoding="utf-8"))
        found += [f"{page.relative_to(ROOT)}: {name}" for name in differ]
        if update and differ:
            write_file(page, text.encode())
    return found
