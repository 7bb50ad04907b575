"""The tables of the pages are those of their results."""

import csv
import sys

import pytest

pytest.importorskip("pandas", reason="needs pandas: pip install pandas")
from minisa.lab import tables  # noqa: E402
from minisa.lab.experiments import STUDIES, TRAININGS  # noqa: E402
from minisa.lab.tables import (  # noqa: E402
    at_best,
    check_pages,
    interval,
    make,
    markdown,
    percent,
    read,
    renew,
    share_of,
)

@pytest.fixture
def write(tmp_path, monkeypatch):
    """write(name, rows, **same): rows, dicts, as a file of results of a checkout of the test; `same` is so in
    every row."""
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "pages", lambda: [tmp_path / "README.md"])

    def write(name, rows, **same):
        file = tmp_path / "assets" / "results" / f"{name}.csv"
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("w", newline="") as opened:
            writer = csv.DictWriter(opened, dict.fromkeys(key for row in rows for key in row) | same, "")
            writer.writeheader()
            writer.writerows(same | row for row in rows)
        return file
    return write

COST = {"steps": 9, "warmup_iters": 5, "cache_bytes_per_token": 4000, "flops": 80, "parameters": 7}

def run(mode, rate, seed, bpb, **more):
    return {"mode": mode, "learning_rate": rate, "seed": seed, "val_bpb": bpb, **more}

RUNS = [run("full", 0.001, 1, 2.0), run("full", 0.001, 2, 4.0), run("full", 0.002, 1, 3.0),
        run("SA", 0.002, 1, 2.1), run("SA", 0.002, 2, 4.0), run("SA", 0.001, 1, 9.9)]

def runs(losses, **more):
    """{mode: [a loss for each seed]} → rows."""
    return [run(mode, 0.001, seed, bpb, **more) for mode, each in losses.items()
            for seed, bpb in enumerate(each, start=1)]

def test_all_tables_of_all_pages_are_those_of_their_results():
    assert check_pages() == []
    marked = [name for page in tables.pages() for _, name, _ in tables.MARK.findall(page.read_text("utf-8"))]
    assert sorted(marked) == sorted(tables.TABLES)

def test_modes_are_compared_at_their_own_best_seed_by_seed(write):
    write("sharing", RUNS, **COST)
    best = at_best(read("sharing"))
    assert best["mode"].tolist() == ["full", "full", "SA", "SA"] and best["seed"].tolist() == [1, 2, 1, 2]
    assert best["learning_rate"].tolist() == [0.001, 0.001, 0.002, 0.002]
    assert best["percent"].tolist() == pytest.approx([0, 0, 5, 0])
    head, full, shared = make("sharing")
    assert full == ["full", "0.001", "5", "3.0000", "", "4,000", "80", "7"]
    assert shared[:5] == ["SA", "0.002", "5", "3.0500", "+2.50 ± 3.54 %"]
    assert len(head) == len(full)

def test_the_reference_is_full_attention_whatever_ended_first(write):
    write("sharing", RUNS[::-1], **COST)
    assert [row[0] for row in make("sharing")[1:]] == ["full", "SA"]
    assert make("sharing")[2][4] == "+2.50 ± 3.54 %"

def test_equal_time_and_parameters_are_over_full_attention_trained_alike(write):
    modes = "SA 1-3", "SA 2-3", "SA 0-3", "CLA 1-3", "GQA 2", "MQA", "SA 1-3, MQA", "CLA 1-3, MQA"
    write("sharing", runs({"full": [2, 2], **dict.fromkeys(modes, [2.2, 2.2])}), **COST)
    timed = runs({"full": [4, 4], **dict.fromkeys(modes, [3, 3])}, equal="time", steps=2500)
    wide = runs(dict.fromkeys(modes, [5, 5]), equal="parameters")
    write("fair", timed + wide, **COST)
    assert make("fair")[1:] == [
        [mode, "+10.00 ± 0.00 %", "−25.00 ± 0.00 %", "2,500", "+25.00 ± 0.00 %"] for mode in modes]

# ---- ten seeds ----

SHAPES = {"full": ("", "", 4), "SA 1-3": ("1-3", "weights", 4), "CLA 1-3, MQA": ("1-3", "kv", 1)}

def of_seeds(losses, minutes=1.0, **more):
    """{mode: [a loss for each seed]} → rows of the study seeds."""
    return [dict(zip(tables.SHAPE, SHAPES[mode])) | {"seed": seed, "report_bpb": bpb, "val_bpb": bpb + 1,
                                                     "minutes": minutes} | more
            for mode, each in losses.items() for seed, bpb in enumerate(each, start=1)]

AS_USUAL = {"equal": "steps", "max_iters": 2000, "learning_rate": 0.002, "warmup_iters": 500,
            "dtype": "bfloat16", "cache_bytes_per_token": 3072}
LOSSES = {"full": [2.00, 2.10, 2.05, 2.01], "SA 1-3": [2.01, 2.08, 2.06, 2.03],
          "CLA 1-3, MQA": [2.11, 2.17, 2.16, 2.13]}

def test_losses_of_ten_seeds_have_an_interval_from_the_spread_of_all_modes(write):
    write("seeds", of_seeds(LOSSES), **AS_USUAL)
    head, full, *others = make("seeds")
    mean = {mode: sum(each) / 4 for mode, each in LOSSES.items()}
    of_seed = [sum(each[seed] for each in LOSSES.values()) / 3 for seed in range(4)]
    rest = [each[seed] - mean[mode] - of_seed[seed] + sum(of_seed) / 4
            for mode, each in LOSSES.items() for seed in range(4)]
    error = (sum(x * x for x in rest) / (3 * 2) * 2 / 4)**0.5 / mean["full"] * 100
    each, together = 2.4469 * error, 2.9687 * error         # t of 6 degrees of freedom at 5 and 2.5 %
    assert full == ["2,000 steps: full", "2,000", "4", "0.002, 500", "2.0400", "3.0400", "", "0.00 %", "",
                    "", "3,072", "1.00"]
    for row, mode in zip(others, ("SA 1-3", "CLA 1-3, MQA"), strict=True):
        assert row[0] == f"2,000 steps: {mode}" and row[4] == f"{mean[mode]:.4f}"
        difference = 100 * mean[mode] / mean["full"] - 100
        assert row[6] == f"{difference:+.2f} ± {each:.2f} %" and row[8] == f"± {together:.2f} %"
    own = [100 * a / b - 100 for a, b in zip(LOSSES["SA 1-3"], LOSSES["full"])]
    assert others[0][7] == f"{(sum((x - sum(own) / 4)**2 for x in own) / 3)**0.5:.2f} %"
    assert [row[9] for row in others] == ["open", "higher"]

def test_the_quantile_is_students():
    for freedom, p, t in ((5, 0.975, 2.571), (9, 0.975, 2.262), (9, 0.995, 3.250), (45, 0.975, 2.014),
                          (30, 0.9975, 3.030), (60, 0.999, 3.232)):     # as printed in any table of t
        assert tables.quantile(p, freedom) == pytest.approx(t, abs=0.004)

@pytest.mark.parametrize("low, high, says", [
    (-0.4, 0.3, "equal within 0.5 %"), (-0.6, 0.1, "open"), (-0.1, 0.5, "open"), (0.1, 0.6, "higher"),
    (0.1, 0.4, "higher, by less than 0.5 %"), (-0.4, -0.1, "lower, by less than 0.5 %"), (-2, -1, "lower")])
def test_equality_is_claimed_only_within_the_margin(low, high, says):
    assert tables.verdict(low, high) == says

def test_only_seeds_that_all_modes_have_run_are_compared(write):
    begun = of_seeds({"full": [2, 2, 2], "SA 1-3": [2, 2, 2], "CLA 1-3, MQA": [2.2, 2.2]}, **AS_USUAL)
    unreported = [row | {"seed": 0, "report_bpb": 9} for row in begun if row["seed"] == 1]
    longer = of_seeds({"full": [1, 1], "SA 1-3": [1]}, **AS_USUAL | {"max_iters": 6000})
    in_float32 = of_seeds({"full": [3, 3]}, **AS_USUAL | {"dtype": "float32"})
    write("seeds", unreported + begun + longer + in_float32)
    assert [row[0] for row in make("seeds")[1:]] == [
        "2,000 steps: full", "2,000 steps: SA 1-3", "2,000 steps: CLA 1-3, MQA"]
    assert {row[2] for row in make("seeds")[1:]} == {"2"} and make("seeds")[3][6] == "+10.00 ± 0.00 %"

def test_a_seed_is_compared_in_the_one_format_that_all_modes_have(write):
    half = of_seeds({mode: [2, 2] for mode in SHAPES}, **AS_USUAL)
    whole = of_seeds({"full": [8, 8, 3, 3], "SA 1-3": [9, 9, 3, 3], "CLA 1-3, MQA": [0, 0, 6, 6]},
                     **AS_USUAL | {"dtype": "float32"})
    write("seeds", half + [row for row in whole if row["report_bpb"]])
    full, shared, cla = make("seeds")[1:]
    assert full[2] == "4" and full[4] == shared[4] == "2.5000" and cla[4] == "4.0000"

@pytest.mark.parametrize("n, shown", [(2, False), (3, True)])
def test_a_comparison_needs_half_as_many_seeds_as_the_largest(write, n, shown):
    most = of_seeds({mode: 6 * bpb[:1] for mode, bpb in LOSSES.items()}, **AS_USUAL)
    longer = of_seeds({mode: n * bpb[:1] for mode, bpb in LOSSES.items()}, **AS_USUAL | {"max_iters": 6000})
    write("seeds", most + longer)
    names = ["2,000 steps"] * 3 + ["6,000 steps"] * 3 * shown
    assert [row[0].split(":")[0] for row in make("seeds")[1:]] == names

@pytest.mark.parametrize("n", range(2))
def test_fewer_than_two_seeds_make_no_table(write, n):
    chosen = of_seeds({mode: [2] for mode in SHAPES}, **AS_USUAL | {"seed": 0})
    write("seeds", chosen + of_seeds({mode: [2] * n for mode in SHAPES}, **AS_USUAL))
    with pytest.raises(ValueError, match="not all there .*two seeds of each mode.*experiments seeds$"):
        make("seeds")

def test_at_equal_time_modes_are_over_full_attention_of_the_first_comparison(write):
    same = of_seeds({mode: [2, 2] for mode in SHAPES}, **AS_USUAL)
    timed = of_seeds({"SA 1-3": [1.8, 1.8], "CLA 1-3, MQA": [1.9, 1.9]}, **AS_USUAL | {"equal": "time"})
    for row in timed:
        row["max_iters"] = 1990 if row["share_kind"] == "kv" else 2100      # one of them is slower
    write("seeds", same + timed)
    rows = {row[0]: row for row in make("seeds")[1:]}
    assert rows["equal time: SA 1-3"][1] == "2,100" and rows["equal time: CLA 1-3, MQA"][1] == "1,990"
    assert rows["equal time: SA 1-3"][6] == "−10.00 ± 0.00 %" and rows["equal time: full"][4] == "2.0000"

def test_times_are_paired_by_seed_with_an_interval_of_the_sign_test(write):
    shared = [0.90, 0.80, 0.99, 0.91, 0.89, 0.70, 0.92, 0.88, 0.93, 1.50]
    rows = of_seeds({mode: [2 if mode == "full" else 2.1] * 10 for mode in SHAPES}, **AS_USUAL)
    for row in rows:
        pace = row["seed"]                                  # the machine was never equally fast
        row["minutes"] = pace * (shared[pace - 1] if row["share_kind"] == "weights" else 1)
    write("seeds", rows)
    times = {row[0]: row[-1] for row in make("seeds")[1:]}
    assert times["2,000 steps: SA 1-3"] == "0.91 (0.80 to 0.99)"        # without the two extremes: 97.9 %
    assert times["2,000 steps: CLA 1-3, MQA"] == "1.00 (1.00 to 1.00)"

def test_float32_is_over_bfloat16_with_the_same_seeds(write):
    half = of_seeds({"full": [2, 2, 2], "SA 1-3": [2, 1, 2]}, **AS_USUAL)
    whole = of_seeds({"full": [2.02, 2.04, 2.03], "SA 1-3": [2, 1, 2]}, **AS_USUAL | {"dtype": "float32"})
    write("seeds", half + whole)
    assert make("formats")[1:] == [["full", "3", "2.0300", "+1.50 ± 0.50 %"], ["SA 1-3", "3", "1.6667", ""]]

def test_a_minus_is_a_minus_and_one_seed_has_no_spread():
    assert percent(-0.001) == "+0.00 %" and percent(0.0) == ""
    assert percent(-1.234) == "−1.23 %" and percent(2.0, 1.4142) == "+2.00 ± 1.41 %"

def test_a_table_that_differs_is_named_and_written_anew(write, tmp_path):
    write("sharing", RUNS, **COST)
    page = tmp_path / "README.md"
    right = f"# x\n\n<!-- table: sharing -->\n{markdown(make('sharing'))}\nEnd.\n"
    page.write_text(right, encoding="utf-8", newline="\n")
    assert check_pages() == []
    page.write_text(right.replace("3.0500", "3.0400"), encoding="utf-8", newline="\n")
    assert check_pages() == ["README.md: sharing"] == check_pages(update=True)
    assert page.read_text(encoding="utf-8") == right

def test_a_mark_without_a_table_is_filled():
    text, differ = renew("<!-- table: squeeze -->\n\ntext\n")
    assert differ == ["squeeze"] and "| `window`: the last tokens |" in text and text.endswith("\n\ntext\n")

def test_a_table_that_nobody_knows_is_refused():
    with pytest.raises(ValueError, match="no table is named nonsense; there are preset"):
        renew("<!-- table: nonsense -->\n")

@pytest.mark.parametrize("name, study", [("preset", "preset"), ("scan", "scan"),
                                         ("sets", "search"), ("recall", "recall"), ("eigen", "axes")])
def test_a_table_without_all_its_results_names_its_study(write, name, study):
    with pytest.raises(ValueError, match=f"continue with: python -m minisa.lab.experiments {study}$"):
        make(name)

@pytest.mark.parametrize("rows", [[run("full", 0.001, 1, 2.0)], [], [{"x": 1}]], ids=str)
def test_neither_is_a_table_made_of_a_part_of_them(write, rows):
    write("preset", rows, **COST)
    with pytest.raises(ValueError, match="not all there"):
        make("preset")

def test_a_damaged_file_is_named(write):
    file = write("sharing", RUNS, **COST)
    for text in (file.read_text() + "full,1\n", "", "mode,seed\nfull,one\nfull,1\n", "a,a\n1,2\n"):
        file.write_text(text)
        with pytest.raises(ValueError, match="sharing.csv: damaged") as error:
            read("sharing")
        assert "delete" not in str(error.value)             # what was measured in hours

def test_a_column_may_hold_words(write):
    write("sharing", [{"mode": "full", "task": "copy", "seed": 1}, {"mode": "SA", "task": "", "seed": 2}])
    rows = read("sharing")
    assert rows["task"].tolist() == ["copy", ""] and rows["seed"].tolist() == [1, 2]

WRONG = {
    "a column": ({"columns": {"loss": "{val_bp}"}}, "val_bp"),
    "a row": ({"rows": {"mode == 'ful'": "misspelt"}}, "misspelt"),
    "a name in a condition": ({"rows": {"mod == 'full'": "x"}}, "'mod'"),
    "a function": ({"derive": "at_bets"}, "at_bets"),
    "a format": ({"columns": {"loss": "{val_bpb:.4q}"}}, "sharing: cannot be made"),
    "a condition": ({"rows": {"mode == (": "x"}}, "sharing: cannot be made"),
    "a file": ({"files": ["sharing", "sharign"]}, "sharign.csv"),
}

@pytest.mark.parametrize("what", WRONG)
def test_what_is_misspelt_in_a_table_is_named(write, monkeypatch, what):
    write("sharing", RUNS, **COST)
    change, named = WRONG[what]
    monkeypatch.setitem(tables.TABLES, "sharing", tables.TABLES["sharing"] | change)
    with pytest.raises(ValueError, match="table sharing: ") as error:
        make("sharing")
    assert named in str(error.value)

def test_the_study_of_each_table_exists():
    assert {table["study"] for table in tables.TABLES.values()} <= {*STUDIES, *TRAININGS}

def test_the_interval_is_that_of_agresti_and_coull_and_wider_for_more_comparisons():
    z = 1.959964                                            # of 95 %
    near, n = (90 + z**2 / 2) / (100 + z**2), 100 + z**2
    half = z * (near * (1 - near) / n)**0.5
    assert interval(90, 100) == pytest.approx((near - half, near + half), abs=1e-6)
    assert share_of(90, 100) == "90% (82 to 95)" and share_of(90, 100, 50) == "90% (75 to 97)"
    assert interval(0, 5)[0] == 0 and interval(5, 5)[1] == 1

def test_right_answers_are_pooled_over_depths(write, recall_rows):
    write("recall-policies", recall_rows)
    write("recall-models", recall_rows[:7])                 # again: they count once
    rows = tables.answers(read("recall-policies", "recall-models"))
    assert rows.groupby("needles")["right"].unique().to_dict() == {1: [14], 4: [16]}
    assert set(rows["prompts"]) == {20}
    line = next(row for row in make("recall") if row[0] == "full, `snap`")
    assert line[1:] == [share_of(right, 20, len(rows)) for right in (14, 16) for _ in range(4)]

def test_loss_and_divergence_have_intervals_that_hold_together(write, recall_rows):
    names = "model", "bits", "policy", "ratio"
    cases = dict.fromkeys(tuple(row[name] for name in names) for row in recall_rows)
    rows = [dict(zip(names, case)) for case in cases]
    measured = {"difference": -0.1, "error": 0.01, "divergence": 0.5, "divergence_error": 0.02}
    about = dict.fromkeys(set(tables.CASE) - set(names) - {"question"}, 1)
    write("recall-policies-text", rows, **about, **measured)
    write("recall-models-text", rows[:3], **about, **measured)              # again: they count once
    z = tables.half_width(1, 2 * len(rows))
    expected = [f"−0.10 ± {z * 0.01:.2f}"] * 3 + [f"0.50 ± {z * 0.02:.2f}"] * 3
    assert all(row[1:] == expected for row in make("recall-text")[1:])

def test_measures_have_their_difference_from_the_first_model_and_its_interval(write):
    right = {"task": "lambada", "measure": "right"}
    nats = {"task": "lambada", "measure": "nats"}
    write("lambada", [
        {"model": "smollm2", **right, "value": 0.281},
        {"model": "smollm2", **nats, "value": 3.9},
        {"model": "out/eight", **right, "value": 0.256, "difference": -0.025, "half_width": 0.012,
         "lost": 300, "won": 171},
        {"model": "out/eight", **nats, "value": 4.25, "difference": 0.35, "half_width": 0.03},
        {"model": "out/healed", **right, "value": 0.281, "difference": -0.0000001, "half_width": 0.01,
         "lost": 9, "won": 9},
        {"model": "out/healed", **nats, "value": 3.95, "difference": 0.05, "half_width": 0.02},
        {"model": "out/healed-long", **right, "value": 0.289, "difference": 0.008, "half_width": 0.01,
         "lost": 0, "won": 41},
        {"model": "out/healed-long", **nats, "value": 3.9, "difference": 0.0, "half_width": 0.02}])
    assert [row[1:] for row in make("lambada")[1:]] == [
        ["28.1 %", "", "3.900"], ["25.6 % (−2.5 ± 1.2)", "300, 171", "4.250 (+0.350 ± 0.030)"],
        ["28.1 % (+0.0 ± 1.0)", "9, 9", "3.950 (+0.050 ± 0.020)"],
        ["28.9 % (+0.8 ± 1.0)", "0, 41", "3.900 (+0.000 ± 0.020)"]]

def test_a_divergence_is_a_difference_already(write):
    rows = [{"measure": "divergence", "value": 0.0, "difference": "", "half_width": ""},
            {"measure": "divergence", "value": 0.158, "difference": 0.158, "half_width": 0.012}]
    write("benchmarks", rows)
    assert tables.three_measures(read("benchmarks"))["shown"].tolist() == ["0.000", "0.158 ± 0.012"]

def test_a_policy_is_over_the_whole_cache(write):
    rows = [{"policy": policy, "cut": cut, "val_bpb": 2.2} for policy in ("heavy", "sinks", "window")
            for cut in (1, 0.7, 0.5)]
    write("squeeze", [{"policy": "", "cut": "", "val_bpb": 2.0}, *rows], share="")
    assert [row[1:] for row in make("squeeze")[1:]] == [["2.2000 (+10.00 %)"] * 3] * 3

MODES = "", "weights", "kv"

def speed(model, kind, work, tokens_per_s, engine="torch"):
    return {"model": model, "share": "1-3" if kind else "", "share_kind": kind, "work": work,
            "engine": engine, "tokens_per_s": tokens_per_s}

def test_speeds_are_ratios_of_what_was_measured_together(write):
    rows = [speed("small", kind, "train", each) for kind, each in zip(MODES, (100, 125, 90))]
    rows += [speed("long", kind, "decode", each, "numpy") for kind, each in zip(MODES, (50, 75, 60))]
    rows += [speed("small", kind, "decode", 40, "numpy") for kind in MODES]
    rows += [speed(model, kind, "decode", 20) for model in ("small", "long", "large") for kind in MODES]
    rows += [speed("large", kind, "prefill", 7) for kind in MODES]
    write("speed", rows)
    found = {tuple(row[:2]): row[2:] for row in make("speed")[1:]}
    small, long = "small: 4 layers, 128 wide, context 256", "long: 6 layers, 128 wide, context 8,192"
    assert found[small, "full attention"] == ["1.00", "", "1.00", "2.0"]
    assert found[small, "Shared Attention"] == ["1.25", "", "1.00", "2.0"]
    assert found[small, "Cross-Layer Attention"] == ["0.90", "", "1.00", "2.0"]
    assert found[long, "Shared Attention"] == ["", "", "1.50", "3.8"]

def test_a_latency_is_set_beside_what_its_bytes_predict(write):
    def point(model, context, kind, read, ms, limit=""):
        return {"model": model, "context": context, "share_kind": kind, "share": kind, "read_bytes": read,
                "ms_per_token": ms, "limit_ms_per_token": limit}
    shapes = [("small", 256), ("large", 256), ("long", 8192)]
    write("latency-shapes", [point(*shape, kind, 4_000_000 if not kind else 2_000_000, 0.25 if kind else 0.4)
                             for shape in shapes for kind in MODES])
    write("latency", [point("smollm2", context, kind, 8_000_000, 40, 20)
                      for context in (128, 512, 2048, 8192) for kind in MODES])
    rows = make("latency")
    assert rows[1] == ["4 × 128", "256", "full attention", "4.0", "0.4", "1.00", "1.00", "in cache"]
    assert rows[2] == ["4 × 128", "256", "Shared Attention", "2.0", "0.25", "1.60", "2.00", "in cache"]
    assert rows[-3] == ["SmolLM2", "8,192", "full attention", "8.0", "40", "1.00", "1.00", "50 %"]

def test_without_pandas_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ValueError, match="read with pandas; install it with: pip install pandas$"):
        read("sharing")
