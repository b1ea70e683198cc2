"""Charts of networks are pictures, with everything that they should name."""

from PIL import Image

from maedistill.report.charts import accuracy_chart, latency_chart


def test_pictures_are_written(tmp_path) -> None:
    row = {"top1": 90, "images": 100, "latency_ms": 1.5, "parameters": 450_000}
    rows = {name: row | {"latency_ms": latency} for name, latency in (("a", 1.5), ("b", 1.5), ("teacher", 3.0))}
    seeds = {"a": [0.5], "b": [0.4, 0.6]}
    for path in (latency_chart(rows, tmp_path / "l.png"), accuracy_chart(seeds, tmp_path / "a.png")):
        with Image.open(path) as picture:
            assert len(picture.convert("RGB").getcolors(1 << 20)) > 20
    for chart in (latency_chart, accuracy_chart):
        assert chart({}, tmp_path / "none.png") is None and not (tmp_path / "none.png").exists()
