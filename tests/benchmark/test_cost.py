"""What a run will take: arithmetic by hand, and a real measurement with shards and without."""

import json
import math
import sys

import pytest

from maedistill.benchmark.cost import (
    BANDWIDTH,
    IMAGENET_IMAGES,
    LOADER,
    STEP,
    AnalyticModel,
    cost_report,
    exchange_seconds,
    expected_number,
    measure_cost,
)
from maedistill.benchmark.timing import Rates
from maedistill.commands import benchmark
from maedistill.config.loader import load_config
from maedistill.config.pretrain import PretrainConfig
from maedistill.errors import ConfigError


@pytest.fixture
def config(recipe):
    return lambda *overrides: load_config(recipe, overrides, root=PretrainConfig, to_run=False).config


def model(*, loader=math.inf, shared=False, compute=0.1, exchange=0.0, cores=4):
    """4 devices that take 100 images each in an update."""
    return AnalyticModel(4, 100, compute, exchange, loader, cores=cores, shared=shared)


def rates(**medians):
    return {{"step": STEP, "loader": LOADER}[name]: Rates((rate,), (rate,)) for name, rate in medians.items()}


def ring_bytes(ranks: int, numbers: int) -> int:
    """What one rank of a ring sends: the sum goes round in `ranks` pieces, then the result does."""
    piece = numbers // ranks * 4
    return sum(piece for _ in range(ranks - 1)) + sum(piece for _ in range(ranks - 1))


@pytest.mark.parametrize("ranks", [1, 2, 8, 64])
def test_the_model_counts_what_a_ring_sends(ranks):
    numbers = 64 * 1000
    plain, sharded = (exchange_seconds(ranks, numbers, zero=zero) for zero in (0, 3))
    assert plain == pytest.approx(ring_bytes(ranks, numbers) / BANDWIDTH)
    assert sharded == pytest.approx(1.5 * plain)
    ring = AnalyticModel(ranks, 10, 0.2, 100 * plain)
    assert ring.step == ring.images_per_second == pytest.approx(50 * ring.efficiency)
    assert (ring.efficiency == 1) == (ranks == 1)


@pytest.mark.parametrize(
    ("given", "images_per_second", "limit"),
    [
        (model(), 1000, "step"),
        (model(loader=500), 1000, "step"),  # 2000 from the loader
        (model(loader=200), 800, "loader"),
        (model(loader=500, exchange=0.1), 500, "step"),
        (model(loader=500, exchange=0.15), 400, "exchange of gradients"),
        (model(loader=250, shared=True), 500, "step"),  # half of the cores' time for each
        (model(loader=100, shared=True), 1 / (1 / 1000 + 1 / 400), "loader"),
    ],
)
def test_the_slowest_part_sets_the_speed(given, images_per_second, limit):
    assert given.images_per_second == pytest.approx(images_per_second) and given.limit == limit


def test_hours_are_epochs_times_images_by_speed(config):
    given = model(loader=200)  # 800 images/s
    images = {"data.train": 7200, "ImageNet-1K": IMAGENET_IMAGES}
    report = cost_report(config(), given, rates(step=1000.0, loader=200.0), batch=12, sizes=images)
    ours, imagenet = report.tables["10 epochs"]
    assert (ours["images"], ours["GPU-hours"]) == (72_000, pytest.approx(72_000 / 800 / 3600))
    assert ours["hours on 4"] == pytest.approx(ours["GPU-hours"] / 4)
    assert imagenet["images"] == 10 * IMAGENET_IMAGES
    assert report.remarks[:2] == ["loader limits", "one GPU needs 5 loader cores; 4 are assumed"]


def test_without_shards_the_loader_is_taken_to_keep_up(config):
    report = cost_report(config(), model(), rates(step=1000.0), batch=12, sizes={"ImageNet-1K": IMAGENET_IMAGES})
    _, run, _ = report.tables.values()
    assert run[0]["loader cores to keep up"] == "-"
    assert any("not measured" in remark for remark in report.remarks)


def test_a_config_is_measured_on_its_shards(config, shards, launcher, tmp_path):
    """In a process of its own: DeepSpeed joins a process group once."""
    config()
    words = ["tools/benchmark.py", "cost", "--rounds=1", "--gpus=2", f"--json={tmp_path}/cost.json"]
    overrides = [f"data.train={shards}/train-*.tar", "data.views_per_image=3"]
    ended = launcher.start(tmp_path, [*words, tmp_path / "tiny.yaml", *overrides]).finish()
    assert "limits" in ended.out
    measured, run, hours, model = json.loads((tmp_path / "cost.json").read_text())["tables"].values()
    assert [row["what"] for row in measured] == [STEP, LOADER]
    assert all(row["speed"]["median"] > 0 for row in measured)
    assert run[0]["images per update of each"] == 48 and [row["images"] for row in hours] == [960]
    assert model[-1]["what"] == "all" and model[-1]["kernels"] == sum(row["kernels"] for row in model[:-1])
    assert (
        "no paper's number is known" in ended.out
        and "data.keep_decoded" in ended.out
        and "hours on 2, of which" in ended.out
    )


def test_the_paper_s_number_is_the_header_s(root):
    def number(name: str, *overrides: str) -> str | None:
        file = f"{root}/configs/{name}.yaml"
        return expected_number(file, load_config(file, overrides, root=PretrainConfig, to_run=False).config)

    same = ("data.train=x.tar", "data.label_key=output.cls", "engine.micro_batch=8")
    assert number("imagenet/dmae_vit_b", *same).startswith("84.0 %, ImageNet-1K top-1")
    assert number("imagenet/dmae_vit_b", "optim.epochs=10") is None, "the paper's is of other settings"
    assert number("cifar10/dmae") is None


def test_a_config_that_is_no_text_is_refused(tmp_path, monkeypatch):
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff")
    monkeypatch.setattr(sys, "argv", ["maedistill", "benchmark", "cost", str(tmp_path / "picture.png")])
    with pytest.raises(ConfigError, match=r"picture\.png cannot be read"):
        benchmark.main()


def test_devices_that_cannot_share_the_batch_are_refused_at_once(config):
    with pytest.raises(ConfigError, match="7 ranks"):
        measure_cost(config(), gpus=7, rounds=1)
