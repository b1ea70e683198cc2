"""What a run will take: arithmetic by hand, and a real measurement with shards and without."""

import json
import subprocess
import sys

import pytest

from maedistill.benchmark.communication import AnalyticModel
from maedistill.benchmark.cost import IMAGENET_IMAGES, LOADER, STEP, Speed, cost_report, expected_number, measure_cost
from maedistill.benchmark.timing import Rates
from maedistill.config.loader import load_config
from maedistill.errors import ConfigError

SETTINGS = """\
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
    path.write_text(SETTINGS)
    return lambda *overrides: load_config(path, overrides, to_run=False).config


def speed(*, loader, shared=False, compute=0.1, reduce=0.0, cores=4):
    """4 devices that take 100 images each in an update."""
    return Speed(AnalyticModel(4, 100, compute, reduce), loader, cores=cores, shared=shared)


@pytest.mark.parametrize(
    ("given", "images_per_second", "limit"),
    [
        (speed(loader=None), 1000, "step"),
        (speed(loader=500), 1000, "step"),  # 2000 from the loader
        (speed(loader=200), 800, "loader"),
        (speed(loader=500, reduce=0.1), 500, "step"),
        (speed(loader=500, reduce=0.15), 400, "exchange of gradients"),
        (speed(loader=250, shared=True), 500, "step"),  # half of the cores' time for each
        (speed(loader=100, shared=True), 1 / (1 / 1000 + 1 / 400), "loader"),
    ],
)
def test_the_slowest_part_sets_the_speed(given, images_per_second, limit):
    assert given.images_per_second == pytest.approx(images_per_second) and given.limit == limit
    if given.loader is not None:
        assert given.cores_needed == pytest.approx(given.step / given.loader)


def test_hours_are_epochs_times_images_by_speed(config):
    given = speed(loader=200)  # 800 images/s
    rates = {STEP: Rates((1000.0,)), LOADER: Rates((200.0,))}
    report = cost_report(config(), given, rates, batch=12, images=7200)
    ours, imagenet = report.tables["10 epochs"]
    assert (ours["images"], ours["GPU-hours"]) == (72_000, pytest.approx(72_000 / 800 / 3600))
    assert ours["hours on 4"] == pytest.approx(ours["GPU-hours"] / 4)
    assert imagenet["images"] == 10 * IMAGENET_IMAGES
    assert report.remarks[:2] == ["loader limits", "one GPU keeps 5 loader cores busy; counted on are 4"]


def test_without_shards_the_loader_is_taken_to_keep_up(config):
    report = cost_report(config(), speed(loader=None), {STEP: Rates((1000.0,))}, batch=12, images=None)
    _, run, hours = report.tables.values()
    assert [row["data"] for row in hours] == ["ImageNet-1K"] and run[0]["loader cores to keep up"] == "-"
    assert any("not measured" in remark for remark in report.remarks)


def test_a_config_is_measured_on_its_shards(config, shards, root, tmp_path):
    """In a process of its own: DeepSpeed joins a process group once."""
    config()
    command = [sys.executable, "tools/benchmark.py", "cost", "--rounds=1", "--gpus=2", f"--json={tmp_path}/cost.json"]
    overrides = [f"data.train={shards}/train-*.tar", "data.views_per_image=3"]
    ended = subprocess.run([*command, f"{tmp_path}/tiny.yaml", *overrides], cwd=root, capture_output=True, text=True)
    assert ended.returncode == 0 and "limits" in ended.stdout, ended.stderr
    measured, run, hours, model = json.loads((tmp_path / "cost.json").read_text())["tables"].values()
    assert [row["what"] for row in measured] == [STEP, LOADER]
    assert all(row["speed"]["median"] > 0 for row in measured)
    assert run[0]["images per update of each"] == 48 and [row["images"] for row in hours] == [960]
    assert model[-1]["what"] == "all" and model[-1]["kernels"] == sum(row["kernels"] for row in model[:-1])
    assert "no paper's number is known" in ended.stdout


def test_the_paper_s_number_is_the_header_s(root):
    assert expected_number(f"{root}/configs/imagenet/dmae_vit_b.yaml").startswith("84.0 %, ImageNet-1K top-1")
    assert expected_number(f"{root}/configs/cifar10/dmae.yaml") is None


def test_devices_that_cannot_share_the_batch_are_refused_at_once(config):
    with pytest.raises(ConfigError, match="7 ranks"):
        measure_cost(config(), gpus=7, rounds=1)
