"""Charts of networks and curves: pictures with everything that they should show, and one color per network."""

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex
from PIL import Image

from maedistill.report import charts, curves
from maedistill.report.charts import (
    Accuracy,
    Timed,
    Trained,
    accuracy_chart,
    latency_chart,
    length_chart,
    network_colors,
)
from maedistill.report.curves import draw_curves, find_panels, mean_metric
from maedistill.report.intervals import of_count, of_seeds

ORDER = ["teacher", "a", "b", "c"]


@pytest.fixture
def figures(monkeypatch) -> list:
    """The figures of the pictures that a test draws."""
    drawn = []
    for module in (charts, curves):
        original = module.new_canvas

        def new_canvas(*, figsize, original=original) -> FigureCanvasAgg:
            drawn.append((canvas := original(figsize=figsize)).figure)
            return canvas

        monkeypatch.setattr(module, "new_canvas", new_canvas)
    return drawn


def records(steps: int = 40) -> list[dict]:
    """A run whose first loss is far above the others."""
    rows = []
    for step in range(1, steps + 1):
        loss = {
            "pixels": 100.0 if step == 1 else 1 / step,
            "align/1": 0.5,
            "align/2": 1.5,
            "lr": 1e-3,
            "grad_norm": 2.0,
        }
        rows.append({"step": step, "epoch": step / 4, "trained_seconds": 30.0 * step, "images_per_second": 9.0, **loss})
    return [*rows, {"step": steps, "epoch": steps / 4, "knn": 0.8, "images": 100}]


def test_pictures_are_written(tmp_path) -> None:
    rows = {name: Timed(of_count(90, 100), 450_000, latency) for name, latency in (("a", 1.5), ("b", 1.5), ("c", 3.0))}
    seeds = {"a": Accuracy([0.5], of_count(50, 100)), "b": Accuracy([0.4, 0.6], of_seeds([0.4, 0.6]))}
    paths = [
        latency_chart(rows, tmp_path / "l.png", order=ORDER),
        accuracy_chart(seeds, tmp_path / "a.png", order=ORDER),
        draw_curves(records(), tmp_path / "c.png"),
        draw_curves(records(), tmp_path / "d.png", restarts=[20]),
    ]
    for path in paths:
        with Image.open(path) as picture:
            assert len(picture.convert("RGB").getcolors(1 << 20)) > 20
            assert picture.convert("RGBA").getpixel((0, 0)) == (255, 255, 255, 255), "legible on a dark page"
    for chart in (latency_chart, accuracy_chart):
        assert chart({}, tmp_path / "none.png", order=ORDER) is None and not (tmp_path / "none.png").exists()


def test_a_network_has_one_color_in_every_panel_and_picture(figures, tmp_path) -> None:
    colors = {name: to_hex(color) for name, color in network_colors(ORDER).items()}
    assert len(set(colors.values())) == 4 and len(set(network_colors([*map(str, range(30))]).values())) == 30
    rows = {name: Timed(of_count(90, 100), 450_000, 1.5) for name in ("b", "c")}
    latency_chart(rows, tmp_path / "l.png", order=ORDER)
    accuracy_chart({name: Accuracy([0.9], of_count(90, 100)) for name in ("b", "c")}, tmp_path / "a.png", order=ORDER)
    both = {colors["b"], colors["c"]}
    # Accuracies have discs only where a network has several runs.
    for figure, of_discs in zip(figures, (both, set()), strict=True):
        lines = [to_hex(line.get_color()) for axes in figure.axes for line in axes.get_lines()]
        discs = [
            to_hex(disc.get_facecolor()[0])
            for axes in figure.axes
            for disc in axes.collections
            if len(disc.get_facecolor())
        ]
        assert both <= set(lines) <= {*both, "#000000"}, lines
        assert set(discs) == of_discs


def test_networks_of_one_latency_stand_side_by_side_with_their_intervals(figures, tmp_path) -> None:
    rows = {name: Timed(of_count(k, 100), 450_000, 2.0) for name, k in (("a", 90), ("b", 90), ("c", 80))}
    latency_chart(rows, tmp_path / "l.png", order=ORDER)
    (axes,) = figures[0].axes
    places = [float(disc.get_offsets()[0][0]) for disc in axes.collections if isinstance(disc, PathCollection)]
    assert len(set(places)) == 3 and sum(places) / 3 == pytest.approx(2.0) and max(places) - min(places) < 0.2
    bars = [bar.get_segments()[0][:, 1].tolist() for bar in axes.collections if hasattr(bar, "get_segments")]
    assert bars[0] == pytest.approx([100 * of_count(90, 100).low, 100 * of_count(90, 100).high])


def test_the_rows_of_a_line_are_joined_over_epochs_and_over_minutes(figures, tmp_path) -> None:
    one, three = Accuracy([0.5], of_count(50, 100)), Accuracy([0.6, 0.7, 0.8], of_seeds([0.6, 0.7, 0.8]))
    lines = {"a": [Trained(three, 100, 80.0), Trained(one, 10, 9.0)], "b": [Trained(one, 33, 70.0)]}
    length_chart(lines, tmp_path / "lines.png")
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["a", "b"]
    for axes, unit, x in zip(figures[0].axes, ("epochs", "minutes"), ([10, 100], [9, 80]), strict=True):
        assert axes.get_xlabel().startswith(unit) and axes.get_xscale() == "log"
        line, (low, high) = axes.containers[0].lines[0], axes.containers[0].lines[2][0].get_segments()[1][:, 1]
        assert list(line.get_xdata()) == x and list(line.get_ydata()) == pytest.approx([50, 70])
        assert (low, high) == pytest.approx((100 * three.interval.low, 100 * three.interval.high))
        seeds = [dots.get_offsets().tolist() for dots in axes.collections if isinstance(dots, PathCollection)]
        assert seeds == [[[x[1], pytest.approx(value)] for value in (60, 70, 80)]]


def test_panels_have_units_and_the_first_loss_does_not_stretch_the_axis(figures, tmp_path) -> None:
    draw_curves(records(), tmp_path / "c.png", restarts=[20])
    panels = {axes.get_title(): axes for axes in figures[0].axes if axes.get_title()}
    assert list(panels) == [
        "pixel loss (start cut off)",
        "direct alignment",
        "kNN top-1",
        "learning rate",
        "gradient norm",
        "throughput",
    ]
    assert all(axes.get_ylabel() and axes.get_xlabel() == "epoch" for axes in panels.values())
    assert panels["pixel loss (start cut off)"].get_ylim()[1] < 1
    low, high = panels["kNN top-1"].get_ylim()
    assert 60 < low < 80 < high < 100, "a single point has the axis of its interval"
    marks = [line.get_xdata()[0] for line in panels["throughput"].get_lines() if line.get_linestyle() == ":"]
    assert marks == [5.0]
    top = [axis for axis in panels["throughput"].child_axes if axis.get_xlabel() == "minutes"]
    assert len(top) == 1


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("norm", "scale"), [(0.0, "linear"), (2.0, "log")])
def test_gradients_that_are_all_0_are_drawn_on_a_linear_scale(figures, tmp_path, norm, scale) -> None:
    draw_curves([record | {"grad_norm": norm} for record in records()[:-1]], tmp_path / "c.png")
    assert {axes.get_title(): axes.get_yscale() for axes in figures[0].axes}["gradient norm"] == scale


def test_a_picture_that_the_disk_refuses_is_left_out(tmp_path, capsys) -> None:
    (tmp_path / "none").write_text("a file in the place of the folder")
    assert draw_curves(records(), tmp_path / "none" / "c.png") is None
    assert accuracy_chart({"a": Accuracy([0.9], of_count(90, 100))}, tmp_path / "none" / "a.png", order=["a"]) is None
    assert capsys.readouterr().err.count("is left out") == 2


def test_every_term_of_a_loss_has_a_panel() -> None:
    peers = {"mutual": 0.2, "peer1/mutual": 0.3, "peer1/cross_entropy": 2.0, "weight/mutual": 1.0}
    distilled = {"loss": 1.0, "hints/3": 1.0, "hints/7": 2.0, "logits": 0.5, "epoch": 1.0, "eta_seconds": 60.0}
    runs = [[{"step": 1, **distilled}, {"step": 1, "ema_top1": 0.5, "ema_images": 9}], [{"loss": 1.0, **peers}]]
    names = [panel.name for panel in find_panels(runs)]
    assert names == ["loss", "hints/", "logits", "mutual", "peer1/mutual", "peer1/cross_entropy", "ema_top1"]


@pytest.mark.parametrize(("total", "names"), [(0.5, ["cross_entropy"]), (0.4, ["loss", "cross_entropy"])])
def test_a_sum_of_one_term_has_no_panel(total, names) -> None:
    runs = [[{"loss": 0.5, "cross_entropy": 0.5}], [{"loss": total, "cross_entropy": 0.5}, {"val_loss": 1.0}]]
    assert [panel.name for panel in find_panels(runs)] == [*names, "val_loss"]


def test_a_metric_is_its_own_and_a_group_is_a_mean() -> None:
    record = {"top1": 0.5, "top1_correct": 50, "align/1": 1.0, "align/2": 2.0, "align/3": None}
    assert mean_metric(record, "top1") == 0.5 and mean_metric(record, "align/") == 1.5
    record |= {"align/teacher2/8": 5.0, "align/teacher2/9": 7.0}
    assert mean_metric(record, "align/") == 1.5 and mean_metric(record, "align/teacher2/") == 6.0
    names = [panel.name for panel in find_panels([[{"loss": 1.0, **record}]])]
    assert [name for name in names if name.startswith("align")] == ["align/", "align/teacher2/"]
    assert mean_metric(record, "knn") is mean_metric({}, "align/") is None
