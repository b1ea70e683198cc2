"""What more processes bring: the table on known numbers, and two real processes."""

import os

import pytest

from maedistill.benchmark.scale import Measured, measure_scale, scale_report
from maedistill.config.loader import load_config
from maedistill.config.pretrain import PretrainConfig
from maedistill.errors import ConfigError, PeerError
from maedistill.pretraining.build import build_encoder, build_method
from maedistill.training.engine import PERSISTENCE_THRESHOLD


def test_the_table_compares_within_a_round():
    common = {"batch": 12, "parameters": 10**6, "busy_cores": 0.5}
    measured = {
        count: [Measured(images_per_second=rate, exchange_seconds=exchange, **common) for rate in rates]
        for count, exchange, rates in ((1, 0.0, (100.0, 10.0, 50.0)), (2, 0.002, (180.0, 18.0, 90.0)))
    }
    for has_gpu in (True, False):
        (rows,) = scale_report(measured, cores=1, has_gpu=has_gpu).tables.values()
        busy = "images per busy core-second"
        assert [row[busy].median for row in rows if busy in row] == [100, 90] * (not has_gpu)
        assert [row["efficiency"].median for row in rows] == pytest.approx([1, 0.9])
        assert rows[1]["efficiency"].low == rows[1]["efficiency"].high, "every round had the same ratio"
        assert [row["of which gradients"].median for row in rows] == [0, 2]
        assert [row["ms per step"].median for row in rows] == pytest.approx([1e3 * 12 / 50, 1e3 * 12 / 45])


def test_two_real_processes_train_and_say_how_fast(recipe, monkeypatch, tmp_path):
    """Under ZeRO 3, which cuts the weights up at this width: what a rank still holds of them has no size."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores")
    wide = ["student.width=256", "student.num_heads=4"]
    settings = load_config(recipe, wide, root=PretrainConfig, to_run=False).config
    sizes = [parameter.numel() for parameter in build_method(settings, build_encoder(settings), None).parameters()]
    assert max(sizes) > PERSISTENCE_THRESHOLD
    report = measure_scale(str(recipe), [*wide, "engine.zero=3"], processes=2, rounds=1)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]
    assert f"of {sum(sizes) / 1e6:.1f} M parameters" in report.remarks[0]
    one, two = next(iter(report.tables.values()))
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["efficiency"].median == 1
    assert two["efficiency"].median == pytest.approx(two["images/s"].median / (2 * one["images/s"].median))
    assert two["ms per step"].median == pytest.approx(one["ms per step"].median / two["efficiency"].median)
    assert one["of which gradients"].median == 0 < two["of which gradients"].median


def test_what_cannot_be_started_is_said(recipe, capfd):
    with pytest.raises(ConfigError, match="--processes: 4096"):
        measure_scale(str(recipe), (), processes=4096, rounds=1)
    with pytest.raises(PeerError, match="one of 1 training processes"):
        measure_scale(
            str(recipe), ["method=dmae", "teacher.source=run:/nowhere", "align.student=[0]", "align.teacher=[0]"],
            processes=1, rounds=1,
        )  # fmt: skip
    assert "/nowhere" in capfd.readouterr().err
