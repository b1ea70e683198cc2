"""Statistics and pages on run folders that are written by hand, so that every number to be shown is known."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maedistill.config.finetune import FinetuneConfig
from maedistill.config.loader import load_config
from maedistill.config.pretrain import PretrainConfig
from maedistill.config.render import config_yaml
from maedistill.data.shards.index import open_index
from maedistill.errors import ConfigError, DataError
from maedistill.report import comparison
from maedistill.report.comparison import ComparedNetwork, write_comparison
from maedistill.study import results_page
from maedistill.study.completion import is_done, is_scored
from maedistill.study.results import collect, statistics, summarize
from maedistill.study.results_page import accuracy_table, write_results
from maedistill.study.schema import Study

NETWORK = {
    "name": "vit_tiny_patch16_224",
    "arguments": {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3},
}
STUDY = {
    "out": "x",
    "seeds": (0, 1, 2),
    "baseline": "mae",
    "teachers": {"large": {"config": "t.yaml", "finetune": True}, "small": {"config": "t.yaml"}},
    "students": {"scratch": {"same_architecture_as": "mae"}, "mae": {"config": "m.yaml"}, "dmae": {"config": "d.yaml"}},
    "finetune": {"config": "f.yaml"},
}
# Correct of 200, by seed.
TOP1 = {"scratch": (100, 110, None), "mae": (120, 124, 128), "dmae": (126, 126, 140)}


def made(folder: Path, config, *, shards: Path, top1: int | None = None, pixels: float = 0.5, finished=True) -> None:
    """A run folder as the stages leave it, without checkpoints."""
    prints = {"images": 96, "fingerprint": open_index(f"{shards}/train-*.tar").fingerprint()}
    validation = {"images": 24, "fingerprint": open_index(f"{shards}/val-*.tar").fingerprint()}
    stage = "finetune" if isinstance(config, FinetuneConfig) else "pretrain"
    metadata = {"stage": stage, "network": NETWORK, "data": prints, "validation": validation, "init": None}
    last = {"step": 8, "epoch": 1.0, "loss": 1.0, "images_per_second": 50.0, "trained_seconds": 75.0}
    records = [last | ({"pixels": pixels} if stage == "pretrain" else {})]
    if top1 is not None:
        records.append({"step": 8, "epoch": 1.0, "top1": top1, "top5": 200, "images": 200, "val_loss": 1.0})
    else:
        records.append({"step": 8, "epoch": 1.0, "knn": 0.25})
    (folder / "pictures").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(folder / "pictures/step_000000008.png")
    (folder / "config.yaml").write_text(config_yaml(config))
    (folder / "run.json").write_text(json.dumps(metadata | {"starts": [{"command": "python x"}]}))
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
            return load_config(
                pretraining.config, [*data, "method=mae", f"run={run}", *more], root=PretrainConfig
            ).config
        return load_config(recipe, [*data, "init.source=run:x", f"run={run}", *more], root=FinetuneConfig).config

    return config


@pytest.fixture
def study_folder(configs, shards, tmp_path):
    """A study whose runs are finished, but for the fine-tuning of `scratch` with seed 2, which is under way."""
    out = tmp_path / "out"
    for name, counts in TOP1.items():
        for seed, top1 in enumerate(counts):
            run = out / name / f"seed_{seed}"
            if name != "scratch":
                pixels = 0.5 + seed / 10
                made(run / "pretrain", configs("pretrain", run / "pretrain"), shards=shards, pixels=pixels)
            config = configs("finetune", run / "finetune")
            made(run / "finetune", config, shards=shards, top1=top1, finished=top1 is not None)
    for name in ("large", "small"):
        run = out / name / "seed_0/pretrain"
        made(run, configs("pretrain", run), shards=shards)
    return out


def test_statistics_are_numpy_s() -> None:
    assert statistics([]) == {"n": 0, "mean": None, "sd": None}
    assert statistics([0.3]) == {"n": 1, "mean": 0.3, "sd": None}
    for n in (2, 3, 10, 1000):
        values = np.random.default_rng(n).normal(0.6, 0.01, n)
        found = statistics(values.tolist())
        assert found["n"] == n and found["mean"] == pytest.approx(np.mean(values), rel=1e-12)
        assert found["sd"] == pytest.approx(np.std(values, ddof=1), rel=1e-12)


def test_differences_are_paired_by_seed() -> None:
    draws = np.random.default_rng(0).uniform(0.4, 0.9, (2, 4))
    one, other = (dict(zip(seeds, row, strict=True)) for seeds, row in zip(("0135", "0125"), draws, strict=True))
    runs, baseline = ({seed: {"finetune": {"accuracy": v}} for seed, v in row.items()} for row in (one, other))
    differences = np.array([one[seed] - other[seed] for seed in "015"])
    found = summarize(runs, baseline)["difference"]
    assert found["n"] == 3 and found["mean"] == pytest.approx(np.mean(differences))
    assert found["sd"] == pytest.approx(np.std(differences, ddof=1))


def test_rows_that_share_a_pre_training_share_its_facts_and_no_baseline_means_no_differences(study_folder) -> None:
    tuned = study_folder / "again/seed_0/finetune"
    shutil.copytree(study_folder / "mae/seed_0/finetune", tuned)
    students = STUDY["students"] | {"again": {"init_from": "mae"}, "never": {"init_from": "mae"}}
    study = Study.model_validate(STUDY | {"students": students, "baseline": None, "seeds": (0, 1, 2)})
    results = collect(study, study_folder, [0, 1, 2])
    again = results["networks"]["again"]["summary"]
    assert again["each"] == {"0": 0.6} and again["pixels"] == results["networks"]["mae"]["summary"]["pixels"]
    assert all(network["summary"]["difference"]["n"] == 0 for network in results["networks"].values())
    page = write_results(results, study_folder, title="x", command="y").read_text()
    assert "| again | 1 | 60.00 % | 0: 60.00 |" in page and "against" not in page
    waiting = "large/seed_0/finetune, again/seed_1/finetune, again/seed_2/finetune, never/seed_0/finetune, never/seed_1"
    assert f"not begun: {waiting}/finetune and 1 more.**" in page


def test_a_run_that_failed_is_told_from_one_that_waits(study_folder) -> None:
    end = {"exit_code": 2, "reason": "no such teacher", "step": 0}
    (study_folder / "large/seed_0/finetune").mkdir(parents=True)
    (study_folder / "large/seed_0/finetune/exit.json").write_text(json.dumps(end))
    results = collect(Study.model_validate(STUDY), study_folder, [0, 1, 2])
    page = write_results(results, study_folder, title="x", command="y").read_text()
    assert "large/seed_0/finetune (at epoch 0.0, ended: no such teacher)" in page and "not begun" not in page


def test_a_study_s_results_are_those_of_its_finished_runs(study_folder) -> None:
    results = collect(Study.model_validate(STUDY), study_folder, [0, 1, 2])
    networks = {name: network["summary"] for name, network in results["networks"].items()}
    assert list(networks) == ["large", "small", "scratch", "mae", "dmae"]
    assert networks["mae"]["accuracy"] == {"n": 3, "mean": pytest.approx(0.62), "sd": pytest.approx(0.02)}
    assert networks["scratch"]["each"] == {"0": 0.5, "1": 0.55} and networks["large"]["accuracy"]["n"] == 0
    assert networks["dmae"]["difference"]["mean"] == pytest.approx((6 + 2 + 12) / 3 / 200)
    assert networks["scratch"]["difference"]["n"] == 2 and networks["mae"]["difference"]["n"] == 0
    assert networks["dmae"]["pixels"]["mean"] == pytest.approx(0.6) and networks["scratch"]["pixels"]["n"] == 0
    assert networks["mae"]["parameters"] == 32_323 and networks["mae"]["pretrain_images"] == 96
    unfinished = {run["run"]: run["epochs"] for run in results["unfinished"]}
    assert unfinished == {"large/seed_0/finetune": 0.0, "scratch/seed_2/finetune": 1.0}
    assert [run["ended"] for run in results["unfinished"]] == [None, None]
    page = write_results(results, study_folder, title="Three", command="python tools/study.py g.yaml").read_text()
    lines = page.splitlines()
    assert "| dmae | 3 | 65.33 ± 4.04 % | 0: 63.00, 1: 63.00, 2: 70.00 | +3.33 ± 2.52 |" in lines
    assert "| scratch | 2 | 52.50 ± 3.54 % | 0: 50.00, 1: 55.00 | -8.50 ± 2.12 |" in lines
    assert "| mae | 0.03 M | 3 epochs x 96 | 0.6000 | 25.0 % | 1m15s | 1 epochs x 96 | 1m15s |" in lines
    assert "| small | 0.03 M | 3 epochs x 96 | 0.5000 | 25.0 % | 1m15s | - | - |" in lines
    assert "not counted: scratch/seed_2/finetune (at epoch 1.0); not begun: large/seed_0/finetune.**" in page
    assert "`against mae`: mean" in page and "Command: `python tools/study.py g.yaml`" in page
    assert "do not compare" not in page and (study_folder / "results.png").is_file()
    saved = json.loads((study_folder / "results.json").read_text())
    assert saved["networks"]["dmae"]["runs"]["2"]["finetune"]["top1"] == 140


def test_one_seed_has_no_spread_and_a_test_set_its_column(study_folder) -> None:
    (study_folder / "mae/seed_0/finetune/test.json").write_text(json.dumps({"top1": 30, "images": 40}))
    results = collect(Study.model_validate(STUDY), study_folder, [0])
    summaries = {name: network["summary"] for name, network in results["networks"].items()}
    assert accuracy_table(summaries, "mae")[5] == "| mae | 1 | 60.00 % | 0: 60.00 | - | 75.00 % |"


def test_a_run_is_done_by_the_same_settings_on_the_same_images_only(configs, shards, tmp_path) -> None:
    run = tmp_path / "run"
    config = configs("finetune", run)
    assert not is_done(config)
    made(run, config, shards=shards, top1=1, finished=False)
    assert not is_done(configs("finetune", run, "optim.epochs=9")), "before its first checkpoint a run binds nobody"
    (run / "exit.json").write_text(json.dumps({"exit_code": 0, "reason": "finished", "step": 8}))
    assert is_done(config) and is_done(configs("finetune", run, "log.every_steps=7"))
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


def test_shards_that_are_not_there_are_missed_before_the_first_start(configs, shards, tmp_path) -> None:
    run = tmp_path / "run"
    for key in ("data.train", "data.val"):
        with pytest.raises(DataError, match="no file matches 'nowhere/x-"):
            is_done(configs("finetune", run, f"{key}=nowhere/x-*.tar"))
    with pytest.raises(DataError, match=r"1 of 1 shards are missing: .*test\.tar"):
        is_scored(run / "test.json", "test.tar")


def test_a_scorecard_counts_for_its_own_shards_only(shards, tmp_path) -> None:
    file, val = tmp_path / "test.json", f"{shards}/val-*.tar"
    assert not is_scored(file, val)
    file.write_text(json.dumps({"fingerprint": open_index(val).fingerprint()}))
    assert is_scored(file, val) and not is_scored(file, f"{shards}/train-*.tar")


@pytest.fixture
def networks(study_folder) -> dict[str, ComparedNetwork]:
    """`scratch` and `dmae` of seed 0, exported and scored."""
    found = {}
    for i, name in enumerate(("scratch", "dmae")):
        run = study_folder / name / "seed_0"
        (run / "export").mkdir()
        (run / "export/model.safetensors").write_bytes(bytes(1_234_000))
        score = {"top1": TOP1[name][0], "images": 200, "parameters": 450_000, "latency_ms": 1.25 + i}
        (run / "score.json").write_text(json.dumps(score | {"images_per_second": 700.4, "device": "CPU, 2 threads"}))
        pretrain = run / "pretrain" if name == "dmae" else None
        found[name] = ComparedNetwork(pretrain, run / "finetune", run / "export", run / "score.json")
    return found


def test_the_page_of_networks_shows_size_accuracy_speed_and_what_they_learnt(networks, study_folder) -> None:
    report = write_comparison(networks, study_folder, title="Two", notes=["A note.", "Another."])
    page = report.read_text()
    assert page.startswith("# Two\n\nA note.\n\nAnother.\n")
    assert "| scratch | 50.00 % (100 of 200) | 0.45 M | 1.23 | 1.25 ms | 700 | - | 1m15s |" in page
    assert "| dmae | 63.00 % (126 of 200) | 0.45 M | 1.23 | 2.25 ms | 700 | 1m15s | 1m15s |" in page
    assert re.search(r"\| dmae \| mae \| .* \| 0\.5000 \|", page) and "CPU, 2 threads" in page
    links = re.findall(r"!\[[^]]*\]\(([^)]+)\)", page)
    assert links == ["networks.png", "curves.png", "dmae/seed_0/pretrain/pictures/step_000000008.png"]
    for link in links:
        assert (report.parent / link).read_bytes().startswith(b"\x89PNG"), link


def test_pages_do_without_matplotlib(networks, study_folder, monkeypatch) -> None:
    for module, chart in ((results_page, "accuracy_chart"), (comparison, "latency_chart"), (comparison, "draw_curves")):
        monkeypatch.setattr(module, chart, lambda *_: None)
    page = write_comparison(networks, study_folder, title="Two").read_text()
    assert re.findall(r"!\[[^]]*\]\(([^)]+)\)", page) == ["dmae/seed_0/pretrain/pictures/step_000000008.png"]
    results = collect(Study.model_validate(STUDY), study_folder, [0])
    assert "![" not in write_results(results, study_folder, title="x", command="y").read_text()
