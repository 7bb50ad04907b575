"""Loss against cache, drawn from bills."""

import pytest

from minisa import plot

HEAD = "model,sharing,parameters,val bpb,cache B/token,context,cache B,FLOPs/token,tokens/s\n"


def test_each_row_of_the_bills_is_a_point(run, tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install matplotlib")
    (tmp_path / "a.csv").write_text(HEAD + 'smollm2,none,1,1.5,40,10,400,1,1\n"smollm2, eigen 0.02","weights 1-2,4-5",1,1.6,20,10,200,1,1\n')
    (tmp_path / "b.csv").write_text(HEAD + '"smollm2, squeeze 5 heavy 0.5",none,1,1.7,40,10,200,1,1\n')
    for kind in ("png", "svg", "pdf"):
        status, out, err = run(plot.main, "a.csv", "b.csv", f"--file=axes.{kind}")
        assert (status, err) == (0, "") and "3 rows of 2 bills" in out and (tmp_path / f"axes.{kind}").stat().st_size > 1000


@pytest.mark.parametrize("flags, message", [(["none.csv", "--file=x.png"], "none.csv: is no bill"), (["a.csv", "--file=x.doc"], "must end in .png"), (["a.csv"], "--file"),
                                            (["bad.csv", "--file=x.png"], "bad.csv: is no bill"), (["lost.csv", "--file=x.png"], "lost.csv: is no bill")], ids=str)
def test_what_is_no_bill_gets_one_line_and_status_2(run, tmp_path, flags, message):
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install matplotlib")
    (tmp_path / "a.csv").write_text(HEAD)
    (tmp_path / "bad.csv").write_text("x,y\n1,2\n")
    (tmp_path / "lost.csv").write_text(HEAD + "smollm2,none,1,?,40,10,400,1,1\n")
    status, _, err = run(plot.main, *flags)
    assert status == 2 and message in err and err.count("\n") == 1
