"""What more processes bring: the model against sums by hand, the tables, and two real processes."""

import os

import pytest

from maedistill.benchmark.communication import on_paper, reduce_seconds
from maedistill.benchmark.scale import measure_scale, paper_clusters, scale_report
from maedistill.config.loader import load_config
from maedistill.errors import ConfigError, PeerError
from maedistill.pretraining.build import build_encoder, build_method
from maedistill.pretraining.flops import count_flops
from maedistill.training.engine import PERSISTENCE_THRESHOLD

CONFIG = """\
method: mae
data: {image_size: 32}
student: {model: vit_tiny_patch16_224, width: 32, depth: 1, num_heads: 2, patch_size: 8}
decoder: {width: 16, depth: 1, num_heads: 2}
optim: {epochs: 10, warmup_epochs: 0, global_batch: 96, lr: 1e-3}
engine: {micro_batch: 12}
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG)
    return path


def ring_bytes(ranks: int, numbers: int) -> int:
    """What one rank of a ring sends: the sum goes round in `ranks` pieces, then the result does."""
    piece = numbers // ranks * 4
    return sum(piece for _ in range(ranks - 1)) + sum(piece for _ in range(ranks - 1))


@pytest.mark.parametrize("ranks", [1, 2, 8, 64])
def test_the_model_counts_what_a_ring_sends(ranks):
    numbers, bandwidth = 64 * 1000, 1e9
    seconds = reduce_seconds(ranks, numbers, zero=0, bandwidth=bandwidth)
    assert seconds == pytest.approx(ring_bytes(ranks, numbers) / bandwidth)
    assert reduce_seconds(ranks, numbers, zero=3, bandwidth=bandwidth) == pytest.approx(1.5 * seconds)
    cluster = on_paper(ranks, images=10, images_per_second=50, parameters=numbers, zero=0, bandwidth=bandwidth)
    assert cluster.compute == pytest.approx(0.2)
    assert cluster.images_per_second == pytest.approx(ranks * 50 * cluster.efficiency)
    assert (cluster.efficiency == 1) == (ranks == 1)


def test_on_paper_the_batch_is_kept_where_it_can_be_shared_then_the_micro_batch(config):
    settings = load_config(config, to_run=False).config
    clusters = paper_clusters(settings, parameters=10**6, images_per_second=100)
    shares = [(cluster.ranks, cluster.images) for cluster in clusters]
    assert shares == [(8, 12), (64, 12), (512, 12)], "96 images are 12 for each of 8; 64 cannot share them"
    settings = load_config(config, ["optim.global_batch=1024"], to_run=False).config
    shares = [(c.ranks, c.images) for c in paper_clusters(settings, parameters=1, images_per_second=1)]
    assert shares == [(8, 128), (64, 16), (512, 2), (8, 12), (64, 12), (512, 12)]


def test_the_tables_compare_within_a_round(config):
    settings = load_config(config, to_run=False).config
    ready = {"batch": 12, "parameters": 10**6, "gflop": 0.5}
    found = {
        count: [{"images_per_second": r, "exchange_seconds": exchange, "busy_cores": 0.5} for r in rates]
        for count, exchange, rates in ((1, 0.0, (100.0, 10.0, 50.0)), (2, 0.002, (180.0, 18.0, 90.0)))
    }
    for has_gpu, alone in ((True, 50), (False, 250e12 / 0.5e9)):
        report = scale_report(settings, ready, found, cores=1, has_gpu=has_gpu)
        measured, *busy, paper = report.tables.values()
        assert [row["images per busy core-second"].median for table in busy for row in table] == [100, 90] * (
            not has_gpu
        )
        assert [row["efficiency"].median for row in measured] == pytest.approx([1, 0.9])
        assert measured[1]["efficiency"].low == measured[1]["efficiency"].high, "every round had the same ratio"
        assert [row["of it gradients"].median for row in measured] == [0, 2]
        assert [row["ms per step"].median for row in measured] == pytest.approx([1e3 * 12 / 50, 1e3 * 12 / 45])
        eight = on_paper(8, images=12, images_per_second=alone, parameters=10**6, zero=0)
        assert paper[0]["images/s"] == round(eight.images_per_second)


def test_two_real_processes_train_and_say_how_fast(config, monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores")
    report = measure_scale(str(config), (), processes=2, rounds=2)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]
    measured = next(iter(report.tables.values()))
    assert [row["processes"] for row in measured] == [1, 2]
    assert measured[0]["efficiency"].median == 1 and 0 < measured[1]["efficiency"].median < 3
    assert measured[0]["of it gradients"].median == 0 < measured[1]["of it gradients"].median


def test_zero_3_is_measured_and_counts_the_whole_network(config):
    """At this width ZeRO 3 cuts the weights up: what a rank still holds of them is no parameter and no FLOP."""
    wide = ["student.width=256", "student.num_heads=4"]
    settings = load_config(config, wide, to_run=False).config
    method = build_method(settings, build_encoder(settings), None)
    sizes = [parameter.numel() for parameter in method.parameters()]
    assert max(sizes) > PERSISTENCE_THRESHOLD
    gflop = count_flops(method, None, num_student=4, num_teacher=4)["total"]
    report = measure_scale(str(config), [*wide, "engine.zero=3"], processes=1, rounds=1)
    paper = next(remark for remark in report.remarks if remark.startswith("on paper"))
    assert f"({sum(sizes) / 1e6:.1f} M parameters)" in paper and f"from {gflop:.4g} GFLOP" in paper
    assert next(iter(report.tables.values()))[0]["images/s"].median > 0


def test_what_cannot_be_started_is_said(config, capfd):
    with pytest.raises(ConfigError, match="--processes: 4096"):
        measure_scale(str(config), (), processes=4096, rounds=1)
    with pytest.raises(PeerError, match="one of 1 training processes"):
        measure_scale(
            str(config), ["method=dmae", "teacher.source=run:/nowhere", "align.student=[0]", "align.teacher=[0]"],
            processes=1, rounds=1,
        )  # fmt: skip
    assert "/nowhere" in capfd.readouterr().err
