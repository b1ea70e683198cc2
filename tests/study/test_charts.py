"""Pictures of networks: labels never lie on each other, and pictures are pictures."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from maedistill.study.charts import accuracy_chart, latency_chart, spread_apart


@given(st.lists(st.floats(0, 1), max_size=40), st.floats(0.01, 0.3))
def test_places_keep_their_order_and_their_distance_inside_the_picture(values, gap) -> None:
    places = spread_apart(values, gap=gap)
    order = sorted(range(len(values)), key=lambda i: values[i])
    room = min(gap, 1 / max(1, len(values) - 1))
    assert all(-1e-9 <= place <= 1 + 1e-9 for place in places)
    assert all(places[above] - places[below] >= room - 1e-9 for below, above in pairwise(order))


def test_what_is_far_apart_stays_where_it_is() -> None:
    assert spread_apart([0.9, 0.1, 0.5], gap=0.25) == [0.9, 0.1, 0.5]
    assert spread_apart([0.5, 0.5], gap=0.25) == [0.5, 0.75]
    assert spread_apart([], gap=0.2) == []


def test_pictures_are_written(tmp_path) -> None:
    row = {"top1": 90, "images": 100, "latency_ms": 1.5, "parameters": 450_000}
    rows = {name: row | {"latency_ms": latency} for name, latency in (("a", 1.5), ("b", 1.5), ("teacher", 3.0))}
    seeds = {"a": [0.5], "b": [0.4, 0.6]}
    for path in (latency_chart(rows, tmp_path / "l.png"), accuracy_chart(seeds, tmp_path / "a.png")):
        with Image.open(path) as picture:
            assert len(picture.convert("RGB").getcolors(1 << 20)) > 20
    assert accuracy_chart({}, tmp_path / "none.png") is None and not (tmp_path / "none.png").exists()
