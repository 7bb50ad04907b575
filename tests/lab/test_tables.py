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

def test_modes_are_compared_at_their_own_best_seed_by_seed(results):
    runs = at_best(tables.read("sharing"))
    assert [row["learning_rate"] for row in runs["full"] + runs["SA"]] == ["0.001"] * 2 + ["0.002"] * 2
    assert over(runs["SA"], runs["full"]) == pytest.approx([5.0, 0.0])
    table = tables.modes_table("sharing")
    assert table[1][3:5] == ["3.0000", ""] and table[2][3:5] == ["3.0500", "+2.50 ± 3.54 %"]

def test_a_minus_is_a_minus_and_one_seed_has_no_spread():
    assert percent([-1.234]) == "−1.23 %" and percent([1, 3], 1) == "+2.0 ± 1.4 %"

def test_a_table_that_differs_is_named_and_written_anew(results):
    page = results / "README.md"
    right = f"# x\n\n<!-- table: sharing -->\n{markdown(tables.modes_table('sharing'))}\nEnd.\n"
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

def test_a_damaged_file_is_named(results):
    (results / "sharing.csv").write_text(RUNS + "full,1\n")
    with pytest.raises(ValueError, match="sharing.csv: a line has another number of cells"):
        tables.read("sharing")
