"""The tables of the pages are those of their results."""

import pytest

from minisa.lab import tables
from minisa.lab.tables import as_it_should_be, at_best, check_pages, markdown, over, percent

HEAD = "mode,steps,learning_rate,warmup_iters,seed,val_bpb,cache B/token,FLOPs/token,parameters\n"
RUNS = HEAD + """full,9,0.001,5,1,2.0,40,80,7
full,9,0.001,5,2,4.0,40,80,7
full,9,0.002,5,1,3.0,40,80,7
SA,9,0.002,5,1,2.1,30,60,6
SA,9,0.002,5,2,4.0,30,60,6
SA,9,0.001,5,1,9.9,30,60,6
"""

@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "pages", lambda: [tmp_path / "README.md"])
    (tmp_path / "sharing.csv").write_text(RUNS)
    return tmp_path

def test_all_tables_of_all_pages_are_those_of_their_results():
    assert check_pages() == []
    marked = {name for page in tables.pages() for _, name, _ in tables.MARK.findall(page.read_text("utf-8"))}
    assert marked >= {"preset", "learned", "all", "eigen", "spans", "squeeze", "smollm2", "scan", "sets",
                      "tuned", "sharing", "depth", "fair", "standing-out", "speed",
                      "speed-smollm2", "speed-nanogpt", "recall"}

def test_modes_are_compared_at_their_own_best_seed_by_seed(results):
    runs = at_best(tables.read("sharing"))
    assert [row["learning_rate"] for row in runs["full"] + runs["SA"]] == ["0.001"] * 2 + ["0.002"] * 2
    assert over(runs["SA"], runs["full"]) == pytest.approx([5.0, 0.0])
    table = tables.make("sharing")
    assert table[1][3:5] == ["3.0000", ""] and table[2][3:5] == ["3.0500", "+2.50 ± 3.54 %"]

def test_the_reference_is_full_attention_whatever_ended_first(results):
    head, *runs = RUNS.splitlines(keepends=True)
    (results / "sharing.csv").write_text(head + "".join(runs[::-1]))
    assert [row[0] for row in tables.make("sharing")[1:]] == ["full", "SA"]
    assert tables.make("sharing")[2][4] == "+2.50 ± 3.54 %"

@pytest.fixture
def write(results):
    """write(study, {mode: [a loss for each seed]})"""
    def write(study, losses):
        runs = (f'"{mode}",9,0.001,5,{seed},{loss},40,80,7\n' for mode, each in losses.items()
                for seed, loss in enumerate(each, start=1))
        (results / f"{study}.csv").write_text(RUNS.splitlines(keepends=True)[0] + "".join(runs))
    return write

def test_equal_time_and_parameters_are_over_full_attention_trained_alike(write):
    write("sharing", {"full": [2, 2], "SA": [2.2, 2.2]})
    write("fair", {"full, equal time": [4, 4], "SA, equal time": [3, 3], "SA, equal parameters": [5, 5]})
    assert tables.make("fair")[1:] == [["SA", "+10.00 ± 0.00 %", "−25.00 ± 0.00 %", "9", "+25.00 ± 0.00 %"]]

def test_what_stands_out_from_the_luck_of_seeds_is_listed_the_clearest_first(write):
    write("sharing", {"SA": [2.02, 2.04, 2.03], "full": [2, 2, 2], "lucky": [2, 2.1, 1.96]})
    write("fair", {"full, equal time": [4, 4, 4], "SA, equal time": [3.8, 3.804, 3.796]})
    write("depth", {"8 layers, full": [1, 1, 1], "8 layers, SA": [1, 1.1, 1]})
    assert tables.make("standing-out")[1:] == [["SA, equal time", "−5.00 ± 0.10 %", "50.0"],
                                               ["SA, equal steps", "+1.50 ± 0.50 %", "3.0"]]

def test_a_minus_is_a_minus_and_one_seed_has_no_spread():
    assert percent([-0.001]) == "+0.00 %"
    assert percent([-1.234]) == "−1.23 %" and percent([1, 3], 1) == "+2.0 ± 1.4 %"

def test_a_table_that_differs_is_named_and_written_anew(results):
    page = results / "README.md"
    right = f"# x\n\n<!-- table: sharing -->\n{markdown(tables.make('sharing'))}\nEnd.\n"
    page.write_text(right)
    assert check_pages() == []
    page.write_text(right.replace("3.0500", "3.0400"))
    assert check_pages() == ["README.md: sharing"] == check_pages(update=True)
    assert page.read_text() == right

def test_a_mark_without_a_table_is_filled():
    empty = "<!-- table: squeeze -->\n\ntext\n"
    text, wrong = as_it_should_be(empty)
    assert wrong == ["squeeze"] and "| `window`: the last tokens |" in text and text.endswith("\n\ntext\n")

def test_a_table_that_nobody_knows_is_refused():
    with pytest.raises(ValueError, match="no table is named nonsense; there are preset"):
        as_it_should_be("<!-- table: nonsense -->\n")

@pytest.mark.parametrize("name, study", [("preset", "preset"), ("spans", "spans"), ("scan", "scan"),
                                         ("sets", "scan"), ("recall", "recall"), ("eigen", "axes")])
def test_a_table_without_all_its_results_names_its_study(results, name, study):
    with pytest.raises(ValueError, match=f"go on with: python -m minisa.lab.experiments {study}$"):
        tables.make(name)

def test_a_damaged_file_is_named(results):
    (results / "sharing.csv").write_text(RUNS + "full,1\n")
    with pytest.raises(ValueError, match="sharing.csv: a line has another number of cells"):
        tables.read("sharing")

def test_spans_are_given_over_full_attention_best_mixture_first(results):
    ways = {"same": 2.2, "match": 2.1, "mix": 2.06, "kv": 3.0}
    rows = [("smollm2", 2.0)] + [(f"out/spans/{way}-1-2,5-7", loss) for way, loss in ways.items()]
    rows += [(f"out/spans/{way}-3-4", 2.02) for way in ways]
    (results / "spans.csv").write_text("model,val bpb\n" + "".join(f'"{m}",{loss}\n' for m, loss in rows))
    assert tables.make("spans")[1:] == [["3-4", "1"] + ["+1.00 %"] * 4,
                                        ["1-2,5-7", "3", "+10.00 %", "+5.00 %", "+3.00 %", "+50.00 %"]]

def test_right_answers_have_their_standard_error(results):
    (results / "recall").mkdir()
    for length in tables.LENGTHS:
        squeezed = f"smollm2, squeeze {length} heavy 0.5"
        (results / "recall" / f"{length}.csv").write_text(
            f'model,tokens,prompts,right\nsmollm2,{length},196,98\n"{squeezed}",{length},196,0\n')
    half, none = tables.make("recall")[1:]                  # (98 + 2) / 200, and 2 / 200
    assert half == ["smollm2"] + ["50.0% ± 3.5%"] * 4       # √(0.5 · 0.5 / 200)
    assert none == ["smollm2, squeezed to 60 %"] + ["0.0% ± 0.7%"] * 4

def test_what_training_gives_back_is_over_full_attention_trained_alike(results):
    losses = {"smollm2-0": 2.0, "eight-0": 2.1, "six-0": 2.2,
              "smollm2-60": 1.0, "eight-60": 1.1, "six-60": 1.2}
    (results / "tuned.csv").write_text(
        "model,val bpb\n" + "".join(f"out/tuned/{model},{loss}\n" for model, loss in losses.items()))
    assert [row[1:] for row in tables.make("tuned")[1:]] == [
        ["2.0000", "1.0000"], ["2.1000 (+5.00 %)", "1.1000 (+10.00 %)"],
        ["2.2000 (+10.00 %)", "1.2000 (+20.00 %)"]]

def test_speeds_are_ratios_of_what_was_measured_together(results):
    rows = [("small, bfloat16", "full", "train", 100), ("small, bfloat16", "weights", "train", 125),
            ("small, bfloat16", "kv", "train", 90), ("long, bfloat16", "full", "decode", 50),
            ("long, bfloat16", "weights", "decode", 75), ("long, bfloat16", "kv", "decode", 60)]
    rows += [("small, bfloat16", mode, "decode", 40) for mode in ("full", "weights", "kv")]
    rows += [(f"{shape}, bfloat16", f"{mode}, torch", "decode", 20) for shape in ("small", "long")
             for mode in ("full", "weights", "kv")]
    (results / "speed.csv").write_text("measured,mode,work,tokens/s\n" + "".join(
        f'"{measured}","{mode}",{work},{speed}\n' for measured, mode, work, speed in rows))
    assert tables.make("speed")[1:] == [
        ["small: 4 layers, 128 wide, context 256", "full attention", "1.00", "", "1.00", "2.0"],
        ["", "Shared Attention", "1.25", "", "1.00", "2.0"],
        ["", "Cross-Layer Attention", "0.90", "", "1.00", "2.0"],
        ["long: 6 layers, 128 wide, context 8,192", "full attention", "", "", "1.00", "2.5"],
        ["", "Shared Attention", "", "", "1.50", "3.8"], ["", "Cross-Layer Attention", "", "", "1.20", "3.0"]]

def test_a_latency_is_set_beside_what_its_bytes_predict(results):
    head = "model,mode,context,batch size,cache bytes,bytes read,ms per token,ms at the limit\n"
    (results / "latency-shapes.csv").write_text(head + "small,full,256,1,9,4000000,0.4,\n"
                                                "small,weights,256,1,9,2000000,0.25,\n")
    (results / "latency.csv").write_text(head + "smollm2,full,8192,1,9,8000000,40,20\n")
    assert tables.make("latency")[1:] == [
        ["4 × 128", "256", "full attention", "4.0", "0.4", "", "", "in cache"],
        ["", "", "Shared Attention", "2.0", "0.25", "1.60", "2.00", "in cache"],
        ["SmolLM2", "8,192", "full attention", "8.0", "40", "", "", "50 %"]]
