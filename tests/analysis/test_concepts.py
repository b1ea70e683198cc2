"""What is counted of concepts: a table of 3 checkpoints, 4 images and 4 cells whose numbers were computed by hand."""

import numpy as np
import pytest

from maedistill.analysis.concepts import MARGIN, find_concepts, metrics, per_image, reasons_to_leave_out, summarize
from maedistill.analysis.pages import draw_metrics

FOREGROUND = np.array([[True, True, False, False]] * 4)
C, N = -3.0, -2.1  # a concept, and one that is not by 0.1: the background's mean is -2
INSIDE = [  # checkpoint, image, cell
    [[C, N], [N, N], [N, N], [C, C]],
    [[C, C], [N, N], [N, N], [C, C]],
    [[N, C], [N, C], [N, N], [C, N]],
]
OUTSIDE = [[-2.0, -2.0], [-2.5, -1.5], [-2.0, -2.0], [-2.0, -2.0]]  # of each image: one concept, in the second
TABLE = np.array([[[*inside, *OUTSIDE[i]] for i, inside in enumerate(images)] for images in INSIDE])
DISTANCES = [0.0, 0.3, 0.7]
EACH = {
    "foreground": [1, 1, 0, 1],
    "background": [0, 1, 0, 0],
    "ratio": [1, 0.5, np.nan, 1],
    "distance": [0.3, 0.7, np.nan, 0.0],  # of most concepts: the 2nd, the 3rd, never, the first of two equals
    "rho": [0.5, 1, np.nan, 0.5],
}


def test_the_hand_made_table():
    result, values, maps = summarize(TABLE, FOREGROUND, steps=[10, 20, 30], distances=DISTANCES)
    assert values.keys() == EACH.keys()
    for name, expected in EACH.items():
        np.testing.assert_allclose(values[name], expected, err_msg=name)
    found = {name: (round(one["value"], 5), one["images"]) for name, one in result["metrics"].items()}
    assert found == {
        "foreground": (0.75, 4),
        "background": (0.25, 4),
        "ratio": (0.83333, 3),
        "d_mean": (0.33333, 3),
        "d_std": (0.28674, 3),
        "rho": (0.66667, 3),
    }
    assert [one["foreground"]["value"] for one in result["checkpoints"]] == [0.75, 1.0, 0.75]
    assert [one["step"] for one in result["checkpoints"]] == [10, 20, 30]
    np.testing.assert_allclose([one["background_entropy"] for one in result["checkpoints"]], [-2] * 3)
    np.testing.assert_allclose(maps[0, 0], [1.0, 0.1, 0, 0])


def test_without_foreground_every_cell_counts_and_is_background_too():
    concepts, baseline = find_concepts(TABLE, None)
    np.testing.assert_allclose(baseline, TABLE.mean((1, 2)))
    values = per_image(concepts, None, np.array(DISTANCES))
    assert values.keys() == {"concepts", "distance", "rho"}
    assert values["concepts"].tolist() == ((baseline[-1] - TABLE[-1]) > MARGIN).sum(1).tolist()


def test_one_checkpoint_has_neither_distance_nor_rho():
    assert per_image(TABLE[:1] < -2.2, FOREGROUND, np.zeros(1)).keys() == {"foreground", "background", "ratio"}


def test_images_that_do_not_count_for_one_network_count_for_none():
    changes = [np.ones((3, 4)), np.ones((4, 4))]
    other = np.concatenate([TABLE, TABLE[-1:]])  # 4 checkpoints, of which the last two are late
    for k, image in ((0, 1), (2, 3)):
        other[k, image, :2] = -1.0  # the foreground is discarded more: early, and late
    changes[1][0, 2] = 0.0
    foreground = FOREGROUND.copy()
    foreground[0] = True
    reasons = reasons_to_leave_out([TABLE, other], changes, foreground)
    assert {name: one.tolist() for name, one in reasons.items()} == {
        "no_response": [False, False, True, False],
        "one_sided": [True, False, False, False],
        "foreground_discarded": [False, False, False, True],
    }
    assert reasons_to_leave_out([TABLE, other], changes, None).keys() == {"no_response"}
    assert not reasons_to_leave_out([TABLE], changes[:1], FOREGROUND)["foreground_discarded"].any()


def test_intervals_are_over_images_and_differences_over_pairs_of_them():
    draws = np.random.default_rng(0)
    values = {"foreground": draws.normal(20, 5, 100), "distance": draws.normal(1, 0.2, 100)}
    found = metrics(values)
    half = 1.96 * 5 / 10  # of the mean of 100 images
    low, high = found["foreground"]["low"], found["foreground"]["high"]
    assert low == pytest.approx(found["foreground"]["value"] - half, abs=0.2) and high - low < 2.4 * half

    others = {"foreground": values["foreground"] + 3, "distance": values["distance"] * 2, "ratio": values["distance"]}
    others["foreground"][:10] = np.nan
    found = metrics(others, values)
    difference = found["foreground"]
    assert (difference["value"], difference["images"]) == (pytest.approx(3), 90)
    assert difference["low"] == pytest.approx(3) == difference["high"], "the same images in each resampling"
    assert found["d_std"]["value"] == pytest.approx(np.std(values["distance"])) and "ratio" not in found


def test_one_image_has_no_interval_and_none_has_no_value():
    one, none = (metrics({"foreground": np.array(values)})["foreground"] for values in ([2.0], [np.nan]))
    assert one["value"] == 2 and np.isnan([one["low"], one["high"], none["value"]]).all() and none["images"] == 0
    alone = metrics({"distance": np.array([2.0])})
    assert alone["d_mean"]["value"] == 2 and np.isnan(alone["d_std"]["value"]), "one image has no deviation"


def test_a_bar_whose_spread_rounding_made_negative_is_drawn(tmp_path):
    value = 0.3
    metric = {"value": value, "low": np.nextafter(value, 1), "high": np.nextafter(value, 0)}
    none = {"value": None, "low": None, "high": None}
    networks = {"a": {"metrics": {"rho": metric, "ratio": none}}, "b": {"metrics": {"rho": metric, "ratio": metric}}}
    draw_metrics(networks, tmp_path / "metrics.png")
    assert (tmp_path / "metrics.png").stat().st_size > 1000
