"""Pictures of the lab: each is written whole, holds every point, and says what is wrong in one line."""

import pytest
import torch

from minisa.kit import picture
from minisa.lab import plot

pytest.importorskip("matplotlib", reason="needs matplotlib: pip install matplotlib")

HEAD = "model,sharing,parameters,val bpb,cache B/token,context,cache B,FLOPs/token,tokens/s\n"
FULL = "smollm2,none,1,1.5,40,10,400,1,1\n"
SMALL = '"smollm2, eigen 0.02","weights 1-2,4-5",1,1.6,20,10,200,1,1\n'

@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved, still open."""
    saved = []
    monkeypatch.setattr(plot, "save", lambda figure, file: saved.append(figure))
    return saved

def bill(bpb, cache, model="m", sharing="none"):
    return {"model": model, "sharing": sharing, "val bpb": str(bpb), "context": "10",
            "cache B": str(10 * cache)}

@pytest.mark.parametrize("kind, start", [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_each_row_of_the_bills_is_a_point(run, tmp_path, kind, start):
    (tmp_path / "a.csv").write_text(HEAD + FULL + SMALL)
    (tmp_path / "b.csv").write_text(HEAD + '"smollm2, squeeze 5 heavy 0.5",none,1,1.7,40,10,200,1,1\n')
    status, out, err = run(plot.main, "a.csv", "b.csv", f"--file=axes.{kind}")
    assert (status, err) == (0, "") and "3 rows of 2 bills" in out
    assert (tmp_path / f"axes.{kind}").read_bytes().startswith(start)

def test_every_loss_is_inside_one_plain_axis_beside_that_of_full_attention(figures):
    losses = [1.5, 1.49, 1.52, 40.0]
    rows = [bill(bpb, cache, f"m{cache}") for bpb, cache in zip(losses, (40, 30, 20, 10))]
    plot.loss_against_cache(rows, "x.png")
    axis = figures[0].axes[0]
    low, high = axis.get_ylim()
    line, *points = axis.lines
    assert axis.get_yscale() == "log" and low < 1.49 and 40 < high and "log scale" in axis.get_ylabel()
    assert list(line.get_ydata()) == [1.5, 1.5] and "full attention (m40)" in axis.get_ylabel()
    assert {tuple(point.get_xydata()[0]) for point in points} == set(zip((40, 30, 20, 10), losses))
    key = figures[0].axes[1].texts[0].get_text().splitlines()
    assert [line.split() for line in key if "m30" in line] == [["4", "-0.7%", "m30"]]

def test_a_point_is_named_by_its_model_and_what_it_shares():
    rows = [bill(1.5, 40, "smollm2"), bill(1.6, 20, "out/mixed", "weights 1-2,4-5, heads mix"),
            bill(1.7, 20, "out/small", "none, eigen"), bill(1.8, 20, "smollm2, squeeze 5 heavy")]
    assert list(plot.points_of(rows[::-1])) == [
        "full attention (smollm2)", "squeeze 5 heavy", "out/small, eigen",
        "out/mixed, weights 1-2,4-5, heads mix"]

def test_numbers_beside_equal_points_do_not_overlap(figures):
    plot.loss_against_cache([bill(1.5, 40, f"m{i}") for i in range(12)], "x.png")
    axis = figures[0].axes[0]
    boxes = [text.get_position() for text in axis.texts]
    assert len(boxes) == 12 and all(abs(a[0] - b[0]) > 10 or abs(a[1] - b[1]) > 10
                                    for i, a in enumerate(boxes) for b in boxes[:i])

@pytest.mark.parametrize("flags, message", [
    (["none.csv", "--file=x.png"], "none.csv: is no bill"),
    (["bad.csv", "--file=x.png"], "bad.csv: is no bill"),
    (["lost.csv", "--file=x.png"], "lost.csv: is no bill"),
    (["empty.csv", "--file=x.png"], "empty.csv: is no bill with losses (it has no rows)"),
    (["a.csv", "--file=x.doc"], "must end in .png"),
    (["a.csv"], "--file"),
], ids=str)
def test_what_is_no_bill_gets_one_line_and_status_2(run, tmp_path, flags, message):
    (tmp_path / "a.csv").write_text(HEAD + FULL)
    (tmp_path / "empty.csv").write_text(HEAD)
    (tmp_path / "bad.csv").write_text("x,y\n1,2\n")
    (tmp_path / "lost.csv").write_text(HEAD + "smollm2,none,1,?,40,10,400,1,1\n")
    status, _, err = run(plot.main, *flags)
    assert status == 2 and message in err and err.count("\n") == 1

def test_there_is_a_map_for_each_title_with_whole_layers_on_its_axes(figures):
    figure = plot.similarity_maps({f"step {i}": torch.full((3, 3), i / 10) for i in range(7)})
    shown = [axis for axis in figure.axes if axis.get_title()]
    assert [axis.get_title() for axis in shown] == [f"step {i}" for i in range(7)]
    assert all((axis.images[0].get_array() == axis.images[0].get_array()[0, 0]).all() for axis in shown)
    assert all(tick == int(tick) for tick in shown[0].get_xticks())

def test_attention_is_drawn_layer_by_layer_with_tokens_as_labels_and_models_below_each_other(figures):
    P = torch.rand(5, 5).tril()
    plot.attention_maps({"a": [P, P / 2], "b": [P / 4, P / 8]}, list("to be"), 3, "x.png")
    shown = [axis for axis in figures[0].axes if axis.get_title()]
    assert [axis.get_title() for axis in shown] == ["a\nlayer 3", "layer 4", "b\nlayer 3", "layer 4"]
    for axis, scale in zip(shown, (1, 2, 4, 8)):
        assert (axis.images[0].get_array() == P.numpy() / scale).all() and axis.images[0].origin == "upper"
        assert [label.get_text() for label in axis.get_xticklabels()] == list("to be")
    assert [label.get_text() for label in shown[0].get_yticklabels()] == list("to be")

def test_a_film_shows_its_pictures_one_after_the_other(tmp_path):
    from PIL import Image, ImageChops
    figures = (plot.similarity_maps({f"step {i}": torch.full((3, 3), i / 3)}) for i in range(3))
    picture.save_film(figures, tmp_path / "x.gif")
    film, frames = Image.open(tmp_path / "x.gif"), []
    for i in range(film.n_frames):
        film.seek(i)
        frames.append(film.convert("RGB"))
    assert len(frames) == 3 and all(ImageChops.difference(a, b).getbbox() for a, b in zip(frames, frames[1:]))

def test_a_span_has_its_number_in_its_square(figures):
    plot.span_map({(0, 1): -0.02, (0, 2): 3.14, (1, 2): 1234567.0}, 3, "title", "x.png")
    axis = figures[0].axes[0]
    assert {text.get_position(): text.get_text() for text in axis.texts} == {
        (0, 0): "0.0", (0, 1): "3.1", (1, 0): "1e6"}

def test_a_number_for_each_layer(figures):
    plot.by_layer([0.5, 0.25, 1.0], "variance", "x.png")
    assert figures[0].axes[0].lines[0].get_xydata().tolist() == [[0, 0.5], [1, 0.25], [2, 1.0]]

def test_without_matplotlib_it_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ValueError, match="--plot: needs matplotlib; install it with: pip install matplotlib"):
        picture.pyplot("--plot")

def test_a_saved_figure_is_closed(tmp_path):
    plt = picture.pyplot("a test")
    figure, _ = plt.subplots()
    picture.save(figure, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG" and figure.number not in plt.get_fignums()

@pytest.mark.parametrize("row", ["smollm2,none,1,nan,40,10,400,1,1", "smollm2,none,1,1.5,40,0,400,1,1",
                                 "smollm2,none", "smollm2,none,1,1.5,40,10,-400,1,1", '"' + "x" * 200_000,
                                 "x" * 600 + ",none,1,1.5,40,10,400,1,1"], ids=range(6))
def test_odd_rows_are_no_bill(run, tmp_path, row):
    (tmp_path / "a.csv").write_text(HEAD + row + "\n")
    status, _, err = run(plot.main, "a.csv", "--file=x.svg")
    assert status == 2 and "a.csv: is no bill" in err and err.count("\n") == 1 and len(err) < 1000

def test_a_dollar_in_a_name_is_drawn_as_it_is(run, tmp_path):
    (tmp_path / "a.csv").write_text(HEAD + FULL.replace("smollm2", "$\\frac$"))
    assert run(plot.main, "a.csv", "--file=x.svg")[0] == 0

def test_the_frontier_joins_what_no_other_mode_beats(figures):
    points = {"full": (40, 80, [2.0, 2.2]), "SA": (30, 60, [2.1, 2.1]), "CLA": (30, 70, [2.3, 2.5]),
              "MQA": (10, 75, [2.2, 2.2])}
    plot.frontier(points, "x.png")
    cache, flops, key = figures[0].axes
    assert key.texts[0].get_text().splitlines() == [" 1  full", " 2  SA", " 3  MQA", " 4  CLA"]
    joined = [sorted({tuple(map(float, point)) for point in axis.lines[-1].get_xydata()})
              for axis in (cache, flops)]
    assert joined == [[(10, 2.2), (30, 2.1)], [(60, 2.1)]]  # full is as good as SA, and dearer
    spreads = [bars.get_segments()[0] for line in cache.containers for bars in line.lines[2]]
    assert any(abs(low[1] - (2.1 - 0.02**0.5)) < 1e-9 for low, high in spreads)
    assert len(cache.texts) == len(points)

def test_learning_has_a_line_for_each_seed_over_steps_and_seconds(figures):
    rows = [{"mode": mode, "seed": seed, "step": str(step), "seconds": str(3 * step), "val_bpb": "2.5"}
            for mode in ("full", "SA") for seed in "12" for step in (10, 20)]
    plot.learning(rows, "x.png")
    steps, seconds = figures[0].axes
    assert len(steps.lines) == len(seconds.lines) == 4
    assert {tuple(line.get_xdata()) for line in steps.lines} == {(10, 20)}
    assert {tuple(line.get_xdata()) for line in seconds.lines} == {(30, 60)}
    assert [text.get_text() for text in steps.get_legend().get_texts()] == ["full", "SA"]
