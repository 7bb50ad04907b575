"""Pictures of the lab: each is written whole, holds every point, and says what is wrong in one line."""

import pytest
import torch

from minisa.kit import picture
from minisa.lab import plot, tables

pytest.importorskip("matplotlib", reason="needs matplotlib: pip install matplotlib")
pytest.importorskip("pandas", reason="needs pandas: pip install pandas")

HEAD = "model,share,share_kind,changes,policy,budget,cut,val_bpb,context,cache_bytes\n"
FULL = "smollm2,,,,,,,1.5,10,400\n"
SMALL = 'out/small,"1-2,4-5",weights,eigen,,,,1.6,10,200\n'
SQUEEZED = "smollm2,,,,heavy,5,0.5,1.7,10,200\n"

@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved, still open."""
    saved = []
    monkeypatch.setattr(plot, "save", lambda figure, file: saved.append(figure))
    return saved

def labels(axis):
    return [label.get_text() for label in axis.get_yticklabels()]

def texts_of(figure):
    """Every text of a figure that is drawn, with its place in pixels."""
    figure.canvas.draw()
    texts = []
    for axis in figure.axes:
        texts += [axis.xaxis.label, axis.yaxis.label]
        for side, ends in ((axis.xaxis, axis.get_xlim()), (axis.yaxis, axis.get_ylim())):
            texts += [tick.label1 for tick in side.get_major_ticks()
                      if min(ends) <= tick.get_loc() <= max(ends)]
    return [(text.get_text(), text.get_window_extent()) for text in texts
            if text.get_text() and text.get_visible()]

def is_legible(figure):
    """No text is over another, and none is cut off; small ones are none."""
    shown, page = texts_of(figure), figure.bbox
    for i, (text, box) in enumerate(shown):
        assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1, text
        assert not any(box.overlaps(other) for _, other in shown[:i]), text
    assert min(min(box.width, box.height) for _, box in shown) > 8
    return True

@pytest.mark.parametrize("kind, start", [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_bills_are_drawn_from_their_files(run, tmp_path, kind, start):
    (tmp_path / "a.csv").write_text(HEAD + FULL + SMALL)
    (tmp_path / "b.csv").write_text(HEAD + SQUEEZED)
    status, out, err = run(plot.main, "a.csv", "b.csv", f"--file=axes.{kind}")
    assert (status, err) == (0, "") and f"wrote axes.{kind}" in out
    assert (tmp_path / f"axes.{kind}").read_bytes().startswith(start)

def test_each_row_of_a_bill_is_a_dot_beside_its_name_the_least_loss_first(figures, tmp_path):
    (tmp_path / "a.csv").write_text(HEAD + SQUEEZED + SMALL + FULL + FULL + "smollm2,1-2,kv,,,,,6.0,10,300\n")
    plot.draw(plot.read_results([tmp_path / "a.csv"]), "x.png")
    loss, cache = figures[0].axes
    assert labels(loss) == ["smollm2", "out/small, eigen", "smollm2, heavy 5, cut 0.5", "smollm2, kv 1-2"]
    (bottom, top) = loss.get_ylim()
    assert bottom > top                                     # the first name is the highest
    assert loss.lines[0].get_xdata() == pytest.approx([0, 100 / 15, 200 / 15, 300])
    assert cache.lines[0].get_xdata().tolist() == [40, 20, 20, 30]
    low, high = loss.get_xlim()
    assert low < 0 and high > 300 and cache.get_xlim()[0] == 0

FIGURES = ["frontier", "seeds", "axes", "learning", "latency", "context", "batch_size"]

@pytest.mark.parametrize("name", FIGURES)
def test_the_figures_of_the_pages_are_legible(figures, name):
    files = {"frontier": ["sharing"], "axes": ["all", "eigen", "kv", "squeeze"]}.get(name, [name])
    plot.draw(plot.read_results([tables.result(file) for file in files]), "x.png")
    assert is_legible(figures[0])

@pytest.mark.parametrize("flags, message", [
    (["none.csv", "--file=x.png"], "none.csv"),
    (["bad.csv", "--file=x.png"], "bad.csv: cannot be drawn"),
    (["lost.csv", "--file=x.png"], "lost.csv: cannot be drawn (could not convert string"),
    (["empty.csv", "--file=x.png"], "empty.csv: cannot be drawn (it has no rows"),
    (["a.csv", "--file=x.doc"], "must end in .png"),
    (["a.csv"], "--file"),
], ids=str)
def test_what_cannot_be_drawn_gets_one_line_and_status_2(run, tmp_path, flags, message):
    (tmp_path / "a.csv").write_text(HEAD + FULL)
    (tmp_path / "empty.csv").write_text(HEAD)
    (tmp_path / "bad.csv").write_text("x,y\n1,2\n")
    (tmp_path / "lost.csv").write_text(HEAD + FULL.replace("1.5", "?"))
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

@pytest.mark.parametrize("row", ["smollm2,,,,,,,nan,10,400", "smollm2,,,,,,,1.5,0,400", "smollm2,",
                                 "smollm2,,,,,,,1.5,10,-400", '"' + "x" * 200_000, "smollm2,,,,,,,1.5,10,",
                                 "x" * 600 + ",,,,,,,1.5,10,400", f"smollm2,,,,,,,{'9' * 400},10,400"],
                         ids=range(8))
def test_odd_rows_are_refused(run, tmp_path, row):
    (tmp_path / "a.csv").write_text(HEAD + row + "\n")
    status, _, err = run(plot.main, "a.csv", "--file=x.svg")
    assert status == 2 and "a.csv: " in err and err.count("\n") == 1 and len(err) < 1000

def test_a_dollar_in_a_name_is_drawn_as_it_is(run, tmp_path):
    (tmp_path / "a.csv").write_text(HEAD + FULL.replace("smollm2", "$\\frac$"))
    assert run(plot.main, "a.csv", "--file=x.svg")[0] == 0

def rows(columns, *lines):
    return tables.pandas().DataFrame(lines, columns=columns.split())

def test_each_mode_has_a_dot_with_its_spread_and_its_costs(figures):
    costs = {"full": (40, 80), "SA": (30, 60), "MQA": (10, 75)}
    losses = {"full": (2.0, 2.0), "SA": (2.02, 2.04), "MQA": (1.98, 2.0)}
    plot.frontier(rows(
        "file mode steps learning_rate warmup_iters seed val_bpb cache_bytes_per_token flops",
        *(["x", mode, 9, 0.1, 5, seed, bpb, *costs[mode]] for mode in costs
          for seed, bpb in enumerate(losses[mode], start=1))), "x.png")
    loss, cache, flops = figures[0].axes
    assert labels(loss) == ["full", "MQA", "SA"]            # full attention, then the least loss
    assert loss.lines[0].get_xdata() == pytest.approx([0, -0.5, 1.5])
    assert cache.lines[0].get_xdata().tolist() == [40, 10, 30]
    assert flops.lines[0].get_xdata() == pytest.approx([80e-6, 75e-6, 60e-6])
    bars = loss.containers[0].lines[2][0].get_segments()
    assert bars[2][:, 0] == pytest.approx([1.5 - 0.5**0.5, 1.5 + 0.5**0.5])     # of 1 and 2 percent

def test_modes_with_ten_seeds_have_a_dot_and_the_interval_of_the_table(figures):
    plot.draw(plot.read_results([tables.result("seeds")]), "x.png")
    loss, cache = figures[0].axes
    head, *table = tables.make("seeds")
    shown = [dict(zip(head, row)) for row in table if row[head.index("all together")]]
    assert labels(loss) == [row["compared: mode"] for row in shown]     # full attention is the dashed line
    found = zip(shown, loss.lines[0].get_xdata(), loss.containers[0].lines[2][0].get_segments(), strict=True)
    for row, x, bar in found:
        difference, _ = row["over full attention"].replace("−", "-").split(" ± ")
        half = float(row["all together"].strip("± %"))
        assert x == pytest.approx(float(difference), abs=0.006)
        assert bar[:, 0] == pytest.approx([x - half, x + half], abs=0.006)
    assert [f"{x:,}" for x in cache.lines[0].get_xdata()] == [row["cache, B/token"] for row in shown]

def test_right_answers_have_a_curve_for_each_method_in_each_panel(figures, recall_rows):
    plot.draw(tables.pandas().DataFrame(recall_rows).replace({"bits": {"": float("nan"), "8": 8}}), "x.png")
    panels = {axis.get_title(): axis for axis in figures[0].axes}
    for title, axis in panels.items():
        expected = 70 if "one needle" in title else 80
        methods = [name.replace("`", "") for name in tables.TABLES["recall"]["rows"].values()]
        assert [bar.get_label() for bar in axis.containers] == methods
        for bars in axis.containers:
            line, (_, _), (spread,) = bars
            assert line.get_ydata() == pytest.approx([expected] * len(line.get_xdata()))
            low, high = spread.get_segments()[0][:, 1]
            assert 25 < low < expected < high <= 100
    known = panels["four needles, question known"]
    assert known.containers[2][0].get_xdata().tolist() == [25, 40, 60, 100]
    assert known.containers[5][0].get_xdata().tolist() == [25, 40, 53]
    assert is_legible(figures[0])

def test_learning_has_a_line_for_each_mode_and_its_seeds_on_both_sides(figures):
    plot.learning(rows("mode seed step seconds val_bpb", *(
        [mode, seed, step, 3.0 * step + seed, 2.5 + seed / 10] for mode in ("full", "SA") for seed in (1, 3)
        for step in (10, 20))), "x.png")
    steps, seconds = figures[0].axes
    assert steps.lines[0].get_xdata().tolist() == [10, 20]
    assert seconds.lines[0].get_xdata().tolist() == [32, 62]
    for axis in (steps, seconds):
        assert [line.get_ydata() for line in axis.lines] == [
            pytest.approx([bpb] * 2) for _ in ("full", "SA") for bpb in (2.7, 2.6, 2.8)]
    assert [text.get_text() for text in steps.get_legend().get_texts()] == ["full", "SA"]

def test_a_sweep_has_a_line_for_each_mode_and_its_limit(figures):
    def point(context, ms, limit, share_kind="", model="6 × 256"):
        return {"model": model, "share_kind": share_kind, "context": context, "batch_size": 1,
                "ms_per_token": ms, "limit_ms_per_token": limit, "cache_bytes": 1000 * context}
    nan = float("nan")
    plot.token_times(tables.pandas().DataFrame([
        point(256, 1.0, nan), point(256, 0.5, nan, "weights"), point(512, 2.0, 1.5),
        point(512, 0.75, 0.5, "weights"), point(512, 0.25, nan, "", "6 × 256, GQA")]), "x.png")
    context, cache = figures[0].axes
    names = [text.get_text() for text in context.get_legend().get_texts()]
    assert names == ["full attention", "Shared Attention", "full attention, GQA"]
    assert context.lines[0].get_xydata().tolist() == [[256, 1.0], [512, 2.0]]
    assert context.lines[1].get_ydata()[1] == 1.5 and context.lines[1].get_linestyle() == "--"
    assert cache.lines[2].get_xydata().tolist() == [[0.256, 0.5], [0.512, 0.75]]
    assert context.get_xscale() == context.get_yscale() == "log"
