"""The tables of the pages, made of the files in assets/results, so that a page and its results cannot part.

A page has `<!-- table: NAME -->` above each such table. experiments.py --check compares them, and --update
writes them anew.
"""

import csv
import re
import statistics
from pathlib import Path

from minisa.kit.files import read_file, write_file

ROOT = Path(__file__).resolve().parent.parent.parent
ASSETS = ROOT / "assets"
RESULTS = ASSETS / "results"
LENGTHS = 256, 512, 1024, 1536                # tokens of the prompts of the study `recall`
MARK = re.compile(r"(<!-- table: ([\w-]+) -->\n)((?:\|.*\n)*)")

# ---- reading ----

def read(name):
    """The rows of assets/results/NAME.csv, dicts of text. Raises ValueError if it is none."""
    file = RESULTS / f"{name}.csv"
    try:
        rows = list(csv.DictReader(read_file(file).decode().splitlines()))
    except FileNotFoundError:
        return []
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{file}: damaged ({error}); delete it, or fetch it again") from None
    if any(None in row or None in row.values() for row in rows):
        raise ValueError(f"{file}: a line has another number of cells than its head; delete it")
    return rows

def percent(over, digits=2):
    """Differences in percent, one or of several seeds → their mean and standard deviation, as text."""
    text = f"{statistics.fmean(over):+z.{digits}f}".replace("-", "−")       # z: never −0.00
    spread = f" ± {statistics.stdev(over):.{digits}f}" if len(over) > 1 else ""
    return f"{text}{spread} %"

def number(text):
    return f"{int(text):,}"

def markdown(table):
    """A table, rows of text, as Markdown; the first row is its head."""
    head, *rows = [f"| {' | '.join(row)} |\n" for row in table]
    return "".join([head, "|" + " --- |" * len(table[0]) + "\n", *rows])

# ---- studies of trained models ----

SETTINGS = ["mode", "steps", "learning_rate", "warmup_iters", "seed"]
FULL_AMONG_FAIR = "full, equal time"

def best(rows, mode, **fixed):
    """Of the runs of a mode with the first seed, the one of least loss; None if there is none."""
    fixed = {"mode": mode, "seed": 1, **fixed}
    mine = [row for row in rows if all(row[name] == str(value) for name, value in fixed.items())]
    return min(mine, key=lambda row: float(row["val_bpb"]), default=None)

def at_best(rows):
    """→ {mode: [its runs at its best settings, a row for each seed]}"""
    found = {}
    for mode in dict.fromkeys(row["mode"] for row in rows):
        chosen = best(rows, mode)
        same = SETTINGS[1:-1]
        runs = [row for row in rows if row["mode"] == mode and chosen
                and [row[name] for name in same] == [chosen[name] for name in same]]
        found[mode] = sorted(runs, key=lambda row: row["seed"])
    return found

def losses(runs):
    """Runs of a mode → {seed: bits per byte}"""
    return {row["seed"]: float(row["val_bpb"]) for row in runs}

def over(runs, reference):
    """The differences of runs from those of a reference with the same seed, in percent."""
    theirs = losses(reference)
    return [100 * (loss / theirs[seed] - 1) for seed, loss in losses(runs).items() if seed in theirs]

def seeds_table(name, modes):
    """These modes' losses for each seed, and what they cost; the first one is the reference."""
    found = at_best(read(name))
    reference = found[modes[0]]
    table = [["model", *(f"seed {row['seed']}" for row in reference), "over full attention", "cache, B/token",
              "FLOPs/token"]]
    for mode in modes:
        runs = found[mode]
        difference = percent(over(runs, reference)) if runs is not reference else ""
        table.append([mode, *(f"{loss:.4f}" for loss in losses(runs).values()), difference,
                      number(runs[0]["cache B/token"]), number(runs[0]["FLOPs/token"])])
    return table

def modes_table(name, reference):
    """Each mode at its best settings: mean loss, difference from full attention, which is the mode
    `reference`, and cost; the reference first, then by loss."""
    found = at_best(read(name))
    mean = {mode: statistics.fmean(losses(runs).values()) for mode, runs in found.items() if runs}
    reference = found[reference]
    table = [["mode", "learning rate", "warm-up", "bits per byte", "over full attention", "cache, B/token",
              "FLOPs/token", "parameters"]]
    for mode in sorted(mean, key=lambda mode: (found[mode] is not reference, mean[mode])):
        runs = found[mode]
        difference = percent(over(runs, reference)) if runs is not reference else ""
        costs = [number(runs[0][column]) for column in ("cache B/token", "FLOPs/token", "parameters")]
        table.append([mode, runs[0]["learning_rate"], runs[0]["warmup_iters"], f"{mean[mode]:.4f}",
                      difference, *costs])
    return table

def fair_table():
    """What a mode costs over full attention after as many steps, as much time, with as many parameters. The
    runs of `fair` are compared with full attention trained among them, with the same flags."""
    steps, rest = at_best(read("sharing")), at_best(read("fair"))
    reference = rest[FULL_AMONG_FAIR]
    modes = dict.fromkeys(name.partition(", equal")[0] for name in rest if not name.startswith("full"))
    table = [["mode", "equal steps", "equal time", "steps then", "equal parameters"]]
    for mode in modes:
        time, wide = rest[f"{mode}, equal time"], rest[f"{mode}, equal parameters"]
        table.append([mode, percent(over(steps[mode], steps["full"])), percent(over(time, reference)),
                      number(time[0]["steps"]), percent(over(wide, reference))])
    return table

def standing_out_table():
    """The differences from full attention that are 2.5 times their standard deviation or more, of the studies
    `sharing`, `fair` and `depth`; the clearest first."""
    rows = []
    for study, full in {"sharing": "full", "fair": FULL_AMONG_FAIR, "depth": "8 layers, full"}.items():
        found = at_best(read(study))
        for mode, runs in found.items():
            differences = over(runs, found[full])
            if len(differences) < 2:
                raise KeyError(mode)                        # it has not run with all seeds
            times = abs(statistics.fmean(differences)) / (statistics.stdev(differences) or 1)
            if times >= 2.5:
                name = mode if study == "fair" else f"{mode}, equal steps"
                rows.append((times, [name, percent(differences), f"{times:.1f}"]))
    head = ["what", "over full attention", "times its standard deviation"]
    return [head, *(row for _, row in sorted(rows, reverse=True))]

# ---- bills of sample.py, and others ----

def bill_table(name, models):
    """These rows of a bill, {model: how it is named}."""
    rows = {row["model"]: row for row in read(name)}
    table = [["model", "parameters", "bits per byte", "cache, B/token", "cache, B at 1,024 tokens",
              "FLOPs/token"]]
    for model, shown in models.items():
        row = rows[model]
        table.append([shown, number(row["parameters"]), row["val bpb"], number(row["cache B/token"]),
                      number(row["cache B"]), number(row["FLOPs/token"])])
    return table

def spans_table():
    """Spans of SmolLM2, zero-shot, for each way to take over heads."""
    rows = {row["model"]: float(row["val bpb"]) for row in read("spans")}
    full = rows.pop("smollm2")
    ways = {"same": "same head", "match": "matched", "mix": "mixed", "kv": "CLA"}
    table = [["spans", "reuse layers", *ways.values()]]
    names = {name.removeprefix("out/spans/").partition("-")[2] for name in rows}
    for spans in sorted(names, key=lambda spans: rows[f"out/spans/mix-{spans}"]):
        ends = [map(int, span.split("-")) for span in spans.split(",")]
        cells = [percent([100 * (rows[f"out/spans/{way}-{spans}"] / full - 1)]) for way in ways]
        table.append([spans, str(sum(b - a for a, b in ends)), *cells])
    return table

def squeeze_table():
    """Policies and cuts: bits per byte, and over the full cache."""
    rows = {row["model"]: float(row["val bpb"]) for row in read("squeeze")}
    full, policies = rows.pop("smollm2"), {
        "heavy": "`heavy`: what got most attention, and the last tokens "
                 "([H2O](https://arxiv.org/abs/2306.14048))",
        "sinks": "`sinks`: the first four tokens, and the last "
                 "([StreamingLLM](https://arxiv.org/abs/2309.17453))",
        "window": "`window`: the last tokens"}
    table = [["policy: what stays", "equal budgets (cut 1)", "cut 0.7", "cut 0.5"]]
    for policy, shown in policies.items():
        values = [rows[f"smollm2, squeeze 307 {policy} {cut}"] for cut in ("equal", "0.7", "0.5")]
        table.append([shown, *(f"{loss:.4f} ({percent([100 * (loss / full - 1)])})" for loss in values)])
    return table

def scan_table():
    """For each number of reuse layers, the median span and the best one."""
    table = [["reuse layers", "median span, same head", "median span, mixed", "best span, mixed", "its loss",
              "cache saved", "FLOPs saved at 512 tokens"]]
    for same, row in zip(read("scan/spans-weights"), read("scan/spans-weights-mix")):
        table.append([row["reuse layers"], same["median"], row["median"], row["best span"], row["loss"],
                      row["cache saved"], row["FLOPs saved at context 512"]])
    return table

def sets_table():
    """The best sets of spans of the scan."""
    table = [["reuse layers", "loss", "refitted", "cache saved", "spans"]]
    for row in read("scan/sets-weights-mix"):
        table.append([row["reuse_layers"], percent([float(row["percent_measured"])]),
                      percent([float(row["percent_refitted"])]), f"{float(row['cache_saved']):.1%}",
                      row["spans"]])
    return table

def tuned_table():
    """What training gives back: bits per byte before and after, and over full attention."""
    bpb = {row["model"].removeprefix("out/tuned/"): float(row["val bpb"]) for row in read("tuned")}
    names = {"smollm2": "full attention", "eight": "eight reuse layers, mixed and refitted",
             "six": "six reuse layers, mixed"}
    table = [["model", "before", "after 60 steps"]]
    for name, shown in names.items():
        cells = []
        for steps in (0, 60):
            loss, full = bpb[f"{name}-{steps}"], bpb[f"smollm2-{steps}"]
            cells.append(f"{loss:.4f}" + f" ({percent([100 * (loss / full - 1)])})" * (name != "smollm2"))
        table.append([shown, *cells])
    return table

def ratios(name, over):
    """Speeds that bench.py wrote → {(measured, mode, work): its speed over that of the mode `over`}"""
    speeds = {tuple(row.values())[:3]: float(row["tokens/s"]) for row in read(name)}
    return {(measured, mode, work): speed / speeds[measured, over, work]
            for (measured, mode, work), speed in speeds.items() if (measured, over, work) in speeds}

def speed_table():
    """What sharing does to speed: a model's shape by a kind of work, over full attention; and what numpy
    does to decoding, over torch."""
    speeds = {tuple(row.values())[:3]: float(row["tokens/s"]) for row in read("speed")}
    shapes = {"small": "4 layers, 128 wide, context 256", "large": "6 layers, 384 wide, context 256",
              "long": "6 layers, 128 wide, context 8,192"}
    modes = {"full": "full attention", "weights": "Shared Attention", "kv": "Cross-Layer Attention"}
    table = [["shape", "mode", "training", "prefill", "decode", "decode, numpy over torch"]]
    for measured in dict.fromkeys(key[0] for key in speeds):
        shape = measured.partition(",")[0]
        for mode, shown in modes.items():
            cells = []
            for work in ("train", "prefill", "decode"):
                speed = speeds.get((measured, mode, work))
                cells.append(f"{speed / speeds[measured, 'full', work]:.2f}" if speed else "")
            engines = speeds[measured, mode, "decode"] / speeds[measured, f"{mode}, torch", "decode"]
            title = f"{shape}: {shapes[shape]}" if mode == "full" else ""
            table.append([title, shown, *cells, f"{engines:.1f}"])
    return table

def latency_table():
    """What a token takes: milliseconds, over full attention and as the bytes that are read predict."""
    names = {"full": "full attention", "weights": "Shared Attention", "kv": "Cross-Layer Attention"}
    models = {"small": "4 × 128", "large": "6 × 384", "long": "6 × 128", "smollm2": "SmolLM2"}
    table = [["model", "visible tokens", "attention", "MB read", "ms per token", "over full attention",
              "as bytes predict", "of the limit"]]
    for row in read("latency-shapes") + read("latency"):
        ms, n_bytes = float(row["ms per token"]), int(row["bytes read"])
        if row["mode"] == "full":
            full_ms, full_bytes = ms, n_bytes
        limit = float(row["ms at the limit"]) / ms if row["ms at the limit"] else None
        over = ["", ""] if row["mode"] == "full" else [f"{full_ms / ms:.2f}", f"{full_bytes / n_bytes:.2f}"]
        model = [models[row["model"]], f"{int(row['context']):,}"] if row["mode"] == "full" else ["", ""]
        table.append([*model, names[row["mode"]], f"{n_bytes / 1e6:.1f}", f"{ms:.3g}", *over,
                      f"{100 * limit:.0f} %" if limit else "in cache"])
    return table

def speed_smollm2_table():
    """A real LLM and what is made of it, over full attention in float32."""
    found = ratios("speed-smollm2", "smollm2, float32")
    eight = next(mode for _, mode, _ in found if mode.startswith("share ")).rpartition(", ")[0]
    names = {"smollm2, bfloat16": "full, bfloat16",
             "smollm2, float32, torch": "full, float32, decoded in torch",
             f"{eight}, float32": "eight reuse layers, float32",
             f"{eight}, bfloat16": "eight reuse layers, bfloat16", "transformers": "transformers, float32"}
    table = [["", "decode", "prefill of 2,048 tokens"]]
    for mode, shown in names.items():
        cells = [found.get(("smollm2", mode, work)) for work in ("decode", "prefill")]
        table.append([shown, *(f"{cell:.2f}" if cell else "" for cell in cells)])
    return table

def nanogpt_table():
    """Training and decoding over nanoGPT's speed, which trains in float32 on a CPU."""
    found = {dtype: ratios(f"speed-nanogpt-{dtype}", "nanoGPT") for dtype in ("float32", "bfloat16")}
    kinds = {("small", "train"): "training: small, on 8 × 128 tokens",
             ("recipe", "train"): "training: recipe, nanoGPT's for a CPU, 12 × 64 characters",
             ("large", "train"): "training: large, on 8 × 256 tokens",
             ("small", "decode"): "decoding at context 256: small",
             ("recipe", "decode"): "decoding at context 256: recipe",
             ("large", "decode"): "decoding at context 256: large"}
    table = [["", *(f"{mode}, {dtype}" for dtype in found for mode in ("full", "Shared Attention"))]]
    for (shape, work), shown in kinds.items():
        cells = [found[dtype][f"{shape}, {dtype}", mode, work]
                 for dtype in found for mode in ("full", "weights")]
        if work == "decode":                                # is in float32 whatever the training is in
            cells = [f"{cell:.1f}" for cell in cells[:2]] + ["", ""]
        table.append([shown, *(cell if isinstance(cell, str) else f"{cell:.2f}" for cell in cells)])
    return table

def share_of(right, n):
    """How many of n are right → their share and its standard error, as by Agresti and Coull, as text."""
    near = (right + 2) / (n + 4)
    return f"{right / n:.1%} ± {(near * (1 - near) / (n + 4))**0.5:.1%}"

def recall_table():
    """The share of right answers at each length."""
    rows = [row for length in LENGTHS for row in read(f"recall/{length}")]
    table = [["model", *(f"{length:,} tokens" for length in LENGTHS)]]
    shown = {row["model"]: re.sub(r"squeeze \d+ heavy 0.5", "squeezed to 60 %", row["model"]) for row in rows}
    for model in dict.fromkeys(shown.values()):
        table.append([model, *(share_of(int(row["right"]), int(row["prompts"]))
                               for row in rows if shown[row["model"]] == model)])
    return table

FULL, CLA = "full attention", "Cross-Layer Attention, `--share=1-3`"
SA_1, SA_0 = "Shared Attention, `--share=1-3`", "Shared Attention, `--share=0-3`"
TABLES = {
    "preset": lambda: seeds_table("preset", [FULL, SA_1, SA_0, CLA]),
    "sharing": lambda: modes_table("sharing", "full"),
    "depth": lambda: modes_table("depth", "8 layers, full"),
    "learned": lambda: seeds_table("preset", [FULL, SA_1, "`--share=1-3`, mixed", SA_0,
                                              "`--share=0-3`, `--share_rank=4`"]),
    "fair": fair_table,
    "standing-out": standing_out_table,
    "smollm2": lambda: bill_table("smollm2", {"smollm2": "smollm2", "out/mixed-26-28": "out/mixed-26-28"}),
    "all": lambda: bill_table("all", {
        "smollm2": "smollm2", "smollm2, squeeze 614 heavy 0.5": "smollm2, squeezed to 614 tokens",
        "out/mixed": "out/mixed", "out/small": "out/small",
        "out/small, squeeze 614 heavy 0.5": "out/small, squeezed to 614 tokens"}),
    "eigen": lambda: bill_table("eigen", {
        "smollm2": "smollm2", "out/narrow": "out/narrow",
        "out/narrow, squeeze 614 heavy 0.5": "out/narrow, squeezed to 614 tokens"}),
    "spans": spans_table,
    "squeeze": squeeze_table,
    "scan": scan_table,
    "sets": sets_table,
    "tuned": tuned_table,
    "recall": recall_table,
    "speed": speed_table,
    "speed-smollm2": speed_smollm2_table,
    "speed-nanogpt": nanogpt_table,
    "latency": latency_table,
}

STUDY = {"learned": "preset", "standing-out": "depth", "all": "axes", "eigen": "axes", "squeeze": "axes",
         "sets": "scan", "speed-smollm2": "speed", "speed-nanogpt": "peers"}

def make(name):
    """The table of this name. Raises ValueError if there is none, or its results are not all there."""
    if name not in TABLES:
        raise ValueError(f"no table is named {name}; there are {', '.join(TABLES)}")
    try:
        table = TABLES[name]()
    except (KeyError, IndexError, StopIteration):           # a row is missing
        table = []
    if len(table) < 2:
        raise ValueError(f"table {name}: its results are not all there; go on with: "
                         f"python -m minisa.lab.experiments {STUDY.get(name, name)}")
    return table

# ---- pages ----

def pages():
    return [ROOT / "README.md", *sorted((ROOT / "minisa").glob("*/README.md"))]

def as_it_should_be(text):
    """The text of a page, its marked tables made anew → text, names of those that differ."""
    wrong = []

    def replace(match):
        head, name, stands = match.groups()
        table = markdown(make(name))
        if table != stands:
            wrong.append(name)
        return head + table
    return MARK.sub(replace, text), wrong

def check_pages(update=False):
    """Compare all tables of all pages with their results; update: write what differs. → what differed."""
    differ = []
    for page in pages():
        text, wrong = as_it_should_be(page.read_text(encoding="utf-8"))
        differ += [f"{page.relative_to(ROOT)}: {name}" for name in wrong]
        if update and wrong:
            write_file(page, text.encode())
    return differ
