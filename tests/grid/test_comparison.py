"""Statistics and pages on run folders that are written by hand, so that every number to be shown is known."""

import json
import math
import re
from pathlib import Path

import pytest
from PIL import Image

from maedistill.config.finetune import FinetuneConfig
from maedistill.config.loader import load_config
from maedistill.config.render import config_yaml
from maedistill.data.index import open_index
from maedistill.errors import ConfigError
from maedistill.grid import comparison
from maedistill.grid.comparison import Network, accuracy_table, write_comparison, write_results
from maedistill.grid.file import Grid
from maedistill.grid.finished import is_done, is_scored
from maedistill.grid.results import collect, statistics, summarize

NETWORK = {
    "name": "vit_tiny_patch16_224",
    "arguments": {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3},
}
GRID = {
    "out": "x",
    "seeds": (0, 1, 2),
    "teacher": {"config": "t.yaml"},
    "finetune_teacher": True,
    "students": {"scratch": {"shape_of": "mae"}, "mae": {"config": "m.yaml"}, "dmae": {"config": "d.yaml"}},
    "finetune": {"config": "f.yaml"},
}
# Correct of 200, by seed.
TOP1 = {"scratch": (100, 110, None), "mae": (120, 124, 128), "dmae": (126, 126, 140)}


def made(folder: Path, config, *, shards: Path, top1: int | None = None, pixels: float = 0.5, finished=True) -> None:
    """A run folder as the stages leave it, without checkpoints."""
    prints = {"images": 96, "fingerprint": open_index(f"{shards}/train-*.tar").fingerprint()}
    validation = {"images": 24, "fingerprint": open_index(f"{shards}/val-*.tar").fingerprint()}
    stage = "finetune" if isinstance(config, FinetuneConfig) else "pretrain"
    facts = {"stage": stage, "network": NETWORK, "data": prints, "validation": validation, "init": None}
    last = {"step": 8, "epoch": 1.0, "loss": 1.0, "images_per_second": 50.0, "trained_seconds": 75.0}
    records = [last | ({"pixels": pixels} if stage == "pretrain" else {})]
    if top1 is not None:
        records.append({"step": 8, "epoch": 1.0, "top1": top1, "top5": 200, "images": 200, "val_loss": 1.0})
    else:
        records.append({"step": 8, "epoch": 1.0, "knn": 0.25})
    (folder / "pictures").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(folder / "pictures/step_000000008.png")
    (folder / "config.yaml").write_text(config_yaml(config))
    (folder / "run.json").write_text(json.dumps(facts | {"starts": [{"command": "python x"}]}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if finished:
        (folder / "exit.json").write_text(json.dumps({"exit_code": 0, "reason": "finished", "step": 8}))


@pytest.fixture
def configs(shards, pretraining, tmp_path):
    """A config of each stage for a run folder."""
    recipe = tmp_path / "finetune.yaml"
    recipe.write_text("data: {image_size: 32}\noptim: {epochs: 1, warmup_epochs: 0, global_batch: 8}\n")
    data = [f"data.train={shards}/train-*.tar", f"data.val={shards}/val-*.tar"]

    def config(stage: str, run: Path, *more: str):
        if stage == "pretrain":
            return load_config(pretraining.config, [*data, "method=mae", f"run={run}", *more]).config
        return load_config(recipe, [*data, "init.source=run:x", f"run={run}", *more], root=FinetuneConfig).config

    return config


@pytest.fixture
def grid_folder(configs, shards, tmp_path):
    """A grid whose runs are finished, but for the fine-tuning of `scratch` with seed 2, which is under way."""
    out = tmp_path / "out"
    for name, counts in TOP1.items():
        for seed, top1 in enumerate(counts):
            run = out / name / f"seed_{seed}"
            if name != "scratch":
                pixels = 0.5 + seed / 10
                made(run / "pretrain", configs("pretrain", run / "pretrain"), shards=shards, pixels=pixels)
            config = configs("finetune", run / "finetune")
            made(run / "finetune", config, shards=shards, top1=top1, finished=top1 is not None)
    made(out / "teacher", configs("pretrain", out / "teacher"), shards=shards)
    return out


def test_statistics_against_numbers_worked_out_by_hand() -> None:
    assert statistics([]) == {"n": 0, "mean": None, "sd": None}
    assert statistics([0.3]) == {"n": 1, "mean": 0.3, "sd": None}
    found = statistics([2, 4, 4, 4, 5, 5, 7, 9])
    assert found["mean"] == 5 and found["sd"] == pytest.approx(math.sqrt(32 / 7), rel=1e-12)


def test_differences_are_paired_by_seed() -> None:
    runs = {seed: {"finetune": {"accuracy": value}} for seed, value in {"0": 0.5, "1": 0.7, "3": 0.9}.items()}
    baseline = {seed: {"finetune": {"accuracy": value}} for seed, value in {"0": 0.4, "1": 0.5, "2": 0.1}.items()}
    difference = summarize(runs, baseline)["difference"]
    assert difference["n"] == 2 and difference["mean"] == pytest.approx(0.15)
    assert difference["sd"] == pytest.approx(0.05 * math.sqrt(2))


def test_a_grid_s_results_are_those_of_its_finished_runs(grid_folder) -> None:
    results = collect(Grid.model_validate(GRID), grid_folder, [0, 1, 2])
    networks = {name: network["summary"] for name, network in results["networks"].items()}
    assert list(networks) == ["teacher", "scratch", "mae", "dmae"]
    assert networks["mae"]["accuracy"] == {"n": 3, "mean": pytest.approx(0.62), "sd": pytest.approx(0.02)}
    assert networks["scratch"]["each"] == {"0": 0.5, "1": 0.55} and networks["teacher"]["accuracy"]["n"] == 0
    assert networks["dmae"]["difference"]["mean"] == pytest.approx((6 + 2 + 12) / 3 / 200)
    assert networks["scratch"]["difference"]["n"] == 2 and networks["mae"]["difference"]["n"] == 0
    assert networks["dmae"]["pixels"]["mean"] == pytest.approx(0.6) and networks["scratch"]["pixels"]["n"] == 0
    assert networks["mae"]["parameters"] == 32_323 and networks["mae"]["pretrain_images"] == 96
    unfinished = {run["run"]: run["epochs"] for run in results["unfinished"]}
    assert unfinished == {"teacher_finetune": 0.0, "scratch/seed_2/finetune": 1.0}
    page = write_results(results, grid_folder, title="Three", command="python tools/grid.py g.yaml").read_text()
    lines = page.splitlines()
    assert "| dmae | 3 | 65.33 ± 4.04 % | 0: 63.00, 1: 63.00, 2: 70.00 | +3.33 ± 2.52 | - |" in lines
    assert "| scratch | 2 | 52.50 ± 3.54 % | 0: 50.00, 1: 55.00 | -8.50 ± 2.12 | - |" in lines
    assert "| mae | 0.03 M | 3 epochs x 96 | 0.6000 | 25.0 % | 1m15s | 1 epochs x 96 | 1m15s |" in lines
    assert "| teacher | 0.03 M | 3 epochs x 96 | 0.5000 | 25.0 % | 1m15s | - | - |" in lines
    assert "scratch/seed_2/finetune (at epoch 1.0)" in page and "Command: `python tools/grid.py g.yaml`" in page
    assert "do not compare" not in page and (grid_folder / "results.png").is_file()
    saved = json.loads((grid_folder / "results.json").read_text())
    assert saved["networks"]["dmae"]["runs"]["2"]["finetune"]["top1"] == 140


def test_one_seed_has_no_spread_and_a_test_set_its_column(grid_folder) -> None:
    (grid_folder / "mae/seed_0/finetune/test.json").write_text(json.dumps({"top1": 30, "images": 40}))
    results = collect(Grid.model_validate(GRID), grid_folder, [0])
    assert accuracy_table(results["networks"])[4] == "| mae | 1 | 60.00 % | 0: 60.00 | - | 75.00 % |"


def test_a_run_is_done_by_the_same_settings_on_the_same_images_only(configs, shards, tmp_path) -> None:
    run = tmp_path / "run"
    config = configs("finetune", run)
    assert not is_done(config)
    made(run, config, shards=shards, top1=1, finished=False)
    assert not is_done(configs("finetune", run, "optim.epochs=9")), "before its first checkpoint a run binds nobody"
    (run / "exit.json").write_text(json.dumps({"exit_code": 0, "reason": "finished", "step": 8}))
    assert is_done(config) and is_done(configs("finetune", run, "log.every=7"))
    refusals = {
        "optim.epochs=9": "optim.epochs: 1.0 there, 9.0 now",
        f"data.train={shards}/val-*.tar": "was run on other images than .*val",
        f"data.val={shards}/train-*.tar": "was run on other images than .*train",
    }
    for setting, cause in refusals.items():
        with pytest.raises(ConfigError, match=cause):
            is_done(configs("finetune", run, setting))
    with pytest.raises(ConfigError, match="stage: 'fine-tuning' there, 'pre-training' now"):
        is_done(configs("pretrain", run))


def test_a_scorecard_counts_for_its_own_shards_only(shards, tmp_path) -> None:
    file, val = tmp_path / "test.json", f"{shards}/val-*.tar"
    assert not is_scored(file, val)
    file.write_text(json.dumps({"fingerprint": open_index(val).fingerprint()}))
    assert is_scored(file, val) and not is_scored(file, f"{shards}/train-*.tar")


@pytest.fixture
def networks(grid_folder) -> dict[str, Network]:
    """`scratch` and `dmae` of seed 0, exported and scored."""
    found = {}
    for i, name in enumerate(("scratch", "dmae")):
        run = grid_folder / name / "seed_0"
        (run / "export").mkdir()
        (run / "export/model.safetensors").write_bytes(bytes(1_234_000))
        score = {"top1": TOP1[name][0], "images": 200, "parameters": 450_000, "latency_ms": 1.25 + i}
        (run / "score.json").write_text(json.dumps(score | {"images_per_second": 700.4, "device": "CPU, 2 threads"}))
        pretrain = run / "pretrain" if name == "dmae" else None
        found[name] = Network(pretrain, run / "finetune", run / "export", run / "score.json")
    return found


def test_the_page_of_networks_shows_size_accuracy_speed_and_what_they_learnt(networks, grid_folder) -> None:
    report = write_comparison(networks, grid_folder, title="Two", notes=["A note.", "Another."])
    page = report.read_text()
    assert page.startswith("# Two\n\nA note.\n\nAnother.\n")
    assert "| scratch | 50.00 % (100 of 200) | 0.45 M | 1.23 | 1.25 ms | 700 | - | 1m15s |" in page
    assert "| dmae | 63.00 % (126 of 200) | 0.45 M | 1.23 | 2.25 ms | 700 | 1m15s | 1m15s |" in page
    assert re.search(r"\| dmae \| mae \| .* \| 0\.5000 \|", page) and "CPU, 2 threads" in page
    links = re.findall(r"!\[[^]]*\]\(([^)]+)\)", page)
    assert links == ["networks.png", "curves.png", "dmae/seed_0/pretrain/pictures/step_000000008.png"]
    for link in links:
        assert (report.parent / link).read_bytes().startswith(b"\x89PNG"), link


def test_pages_do_without_matplotlib(networks, grid_folder, monkeypatch) -> None:
    for chart in ("accuracy_chart", "latency_chart", "draw_curves"):
        monkeypatch.setattr(comparison, chart, lambda *_: None)
    page = write_comparison(networks, grid_folder, title="Two").read_text()
    assert re.findall(r"!\[[^]]*\]\(([^)]+)\)", page) == ["dmae/seed_0/pretrain/pictures/step_000000008.png"]
    results = collect(Grid.model_validate(GRID), grid_folder, [0])
    assert "![" not in write_results(results, grid_folder, title="x", command="y").read_text()
