"""Statistics and pages on run folders that are written by hand, so that every number to be shown is known."""

import argparse
import json
import os
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
from PIL import Image

from maedistill.commands.study import report
from maedistill.config.finetune import FinetuneConfig
from maedistill.config.loader import load_config
from maedistill.config.pretrain import PretrainConfig
from maedistill.config.render import config_yaml
from maedistill.data.shards.open_index import open_index
from maedistill.errors import ConfigError, DataError
from maedistill.exporting.scorecards import read_rows
from maedistill.report.formatting import markdown_table
from maedistill.study import quickstart, results_page, study_page
from maedistill.study.completion import is_done, is_scored
from maedistill.study.results import collect, statistics, summarize
from maedistill.study.results_page import accuracy_cells, write_results
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
        score = {"top1": top1 / 200, "top1_correct": top1, "top5": 1.0, "top5_correct": 200, "images": 200}
        records.append({"step": 8, "epoch": 1.0, **score, "val_loss": 1.0})
    else:
        records.append({"step": 8, "epoch": 1.0, "knn": 0.25, "images": 24})
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
    runs, baseline = ({seed: {"finetune": {"top1": v}} for seed, v in row.items()} for row in (one, other))
    differences = np.array([one[seed] - other[seed] for seed in "015"])
    found = summarize(runs, baseline)["difference"]
    assert found["n"] == 3 and found["mean"] == pytest.approx(np.mean(differences))
    assert found["sd"] == pytest.approx(np.std(differences, ddof=1))
    half = 4.3027 * np.std(differences, ddof=1) / np.sqrt(3)  # Student's t with 2 degrees of freedom
    assert (found["low"], found["high"]) == pytest.approx((np.mean(differences) - half, np.mean(differences) + half))
    assert found["interval"] == "seeds"


def test_rows_that_share_a_pre_training_show_the_same_of_it(study_folder) -> None:
    tuned = study_folder / "again/seed_0/finetune"
    shutil.copytree(study_folder / "mae/seed_0/finetune", tuned)
    students = STUDY["students"] | {"again": {"init_from": "mae"}, "never": {"init_from": "mae"}}
    study = Study.model_validate(STUDY | {"students": students, "baseline": None})
    results = collect(study, study_folder, [0, 1, 2])
    again = results["networks"]["again"]["summary"]
    assert again["each"] == {"0": 0.6} and again["pixels"] == results["networks"]["mae"]["summary"]["pixels"]
    page = write_results(results, study_folder, title="x", command="y").read_text()
    assert "| again | 1 | 60.00 % | 53.08 to 66.54 | 0: 60.00 |" in page
    waiting = "large/seed_0/finetune, again/seed_1/finetune, again/seed_2/finetune, never/seed_0/finetune, never/seed_1"
    assert f"not begun: {waiting}/finetune and 1 more.**" in page


def test_without_a_baseline_there_are_no_differences(study_folder) -> None:
    results = collect(Study.model_validate(STUDY | {"baseline": None}), study_folder, [0, 1, 2])
    assert all(network["summary"]["difference"]["n"] == 0 for network in results["networks"].values())
    assert "against" not in write_results(results, study_folder, title="x", command="y").read_text()


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
    found = networks["mae"]["top1"]
    assert (found["n"], found["mean"], found["sd"]) == (3, pytest.approx(0.62), pytest.approx(0.02))
    assert networks["scratch"]["each"] == {"0": 0.5, "1": 0.55} and networks["large"]["top1"]["n"] == 0
    assert networks["dmae"]["difference"]["mean"] == pytest.approx((6 + 2 + 12) / 3 / 200)
    assert networks["scratch"]["difference"]["n"] == 2 and networks["mae"]["difference"]["n"] == 0
    assert networks["dmae"]["pixels"]["mean"] == pytest.approx(0.6) and networks["scratch"]["pixels"]["n"] == 0
    assert networks["mae"]["parameters"] == 32_323 and networks["mae"]["pretrain_images"] == 96
    unfinished = {run["run"]: run["epochs"] for run in results["unfinished"]}
    assert unfinished == {"large/seed_0/finetune": 0.0, "scratch/seed_2/finetune": 1.0}
    assert [run["ended"] for run in results["unfinished"]] == [None, None]
    page = write_results(results, study_folder, title="Three", command="python tools/study.py g.yaml").read_text()
    lines = page.splitlines()
    each = "0: 63.00, 1: 63.00, 2: 70.00"
    assert f"| dmae | 3 | 65.33 ± 4.04 % | 55.29 to 75.37 | {each} | +3.33 ± 2.52 (-2.92 to +9.59) |" in lines
    assert any(
        line.startswith("| scratch | 2 | 52.50 ± 3.54 % | ") and "| -8.50 ± 2.12 (-27.56" in line for line in lines
    )
    assert "| mae | 0.03 M | 3 epochs x 96 | 0.6000 | 25.0 % | 1m15s | 1 epochs x 96 | 1m15s |" in lines
    assert "| small | 0.03 M | 3 epochs x 96 | 0.5000 | 25.0 % | 1m15s | - | - |" in lines
    assert "not counted: scratch/seed_2/finetune (at epoch 1.0); not begun: large/seed_0/finetune.**" in page
    assert "`against mae`: mean" in page and "Command: `python tools/study.py g.yaml`" in page
    assert "cannot be compared" not in page and (study_folder / "results.png").is_file()
    assert not (study_folder / "lines.png").exists()
    saved = json.loads((study_folder / "results.json").read_text())
    assert saved["networks"]["dmae"]["runs"]["2"]["finetune"]["top1_correct"] == 140


def test_lines_are_drawn_over_what_both_stages_took(study_folder, monkeypatch) -> None:
    drawn, draw = {}, results_page.length_chart
    monkeypatch.setattr(results_page, "length_chart", lambda lines, path: drawn.update(lines) or draw(lines, path))
    students = STUDY["students"] | {"never": {"init_from": "mae"}}
    lines = {"taught": ("dmae",), "alone": ("scratch", "mae"), "nothing": ("never",)}

    def page(**changes) -> str:
        study = Study.model_validate(STUDY | {"students": students} | changes)
        return write_results(collect(study, study_folder, [0, 1, 2]), study_folder, title="x", command="y").read_text()

    assert "](lines.png)" in page(lines=lines) and (study_folder / "lines.png").stat().st_size > 5000
    assert [(one.epochs, one.minutes) for one in drawn["alone"]] == [(1, 1.25), (4, 2.5)] and drawn["nothing"] == []
    assert [one.accuracy.interval.value for one in drawn["taught"]] == [pytest.approx(196 / 3 / 100)]
    for seed in range(3):
        shutil.rmtree(study_folder / f"mae/seed_{seed}/pretrain")
        page(lines=lines)  # a run whose pre-training is gone has no length
        assert [one.epochs for one in drawn["alone"]] == ([1, 4] if seed < 2 else [1])
    assert "lines.png" not in page() and not (study_folder / "lines.png").exists()


def test_one_seed_has_no_spread_and_a_test_set_its_column(study_folder) -> None:
    (study_folder / "mae/seed_0/finetune/test.json").write_text(
        json.dumps({"top1": 0.75, "top1_correct": 30, "images": 40})
    )
    results = collect(Study.model_validate(STUDY), study_folder, [0])
    summaries = {name: network["summary"] for name, network in results["networks"].items()}
    rows = markdown_table(*accuracy_cells(summaries, "mae"))
    assert rows[5] == "| mae | 1 | 60.00 % | 53.08 to 66.54 | 0: 60.00 | - | 75.00 % | 59.81 to 85.81 |"
    # Newcombe's interval of 126 and 120 of 200: no predictions say which images.
    assert summaries["dmae"]["difference"]["interval"] == "images"
    assert rows[6].startswith("| dmae | 1 | 63.00 % | 56.12 to 69.39 | 0: 63.00 | +3.00 (-6.49 to +12.41) |")


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
        with pytest.raises(DataError, match=f"the run {re.escape(str(run))}: .*no file matches 'nowhere/x-"):
            is_done(configs("finetune", run, f"{key}=nowhere/x-*.tar"))
    with pytest.raises(DataError, match=r"1 of 1 shards are missing: .*test\.tar"):
        is_scored(run / "test.json", "test.tar")


def test_a_folder_need_hold_its_own_split_only(configs, shards, tmp_path) -> None:
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        for file in shards.glob(f"{split}-*.tar"):
            shutil.copy(file, tmp_path / split)
    settings = [f"data.train={tmp_path / 'train'}", f"data.val={tmp_path / 'val'}"]
    assert not is_done(configs("finetune", tmp_path / "run", *settings))
    assert not is_scored(tmp_path / "test.json", str(tmp_path / "val"))


def test_a_scorecard_counts_for_its_own_shards_only(shards, tmp_path) -> None:
    file, val = tmp_path / "test.json", f"{shards}/val-*.tar"
    assert not is_scored(file, val)
    file.write_text(json.dumps({"fingerprint": open_index(val).fingerprint()}))
    assert is_scored(file, val) and not is_scored(file, f"{shards}/train-*.tar")
    whole = file.read_text()
    file.write_text(whole[:9])
    with pytest.raises(DataError, match=re.escape(str(file))):
        is_scored(file, val)
    file.write_text(whole)
    (tmp_path / "exit.json").write_text("{}")
    os.utime(file, ns=(0, (tmp_path / "exit.json").stat().st_mtime_ns - 1))
    assert not is_scored(file, val), "the run has gone on since"


@pytest.fixture
def differences(study_folder):
    """The summary of `dmae` against `mae` with seed 0; `paired`: with predictions of the same images."""

    def difference(*, paired: bool) -> dict:
        for i, name in enumerate(("mae", "dmae")):
            run, correct, first = study_folder / name / "seed_0/finetune", TOP1[name][0], 10 * i
            text = "".join(f"{k},1,{int(first <= k < first + correct)}\n" for k in range(200))
            (run / "predictions.csv").unlink(missing_ok=True)
            if paired:
                (run / "predictions.csv").write_text(f"id,label,top1\n{text}")
        return collect(Study.model_validate(STUDY), study_folder, [0])["networks"]["dmae"]["summary"]["difference"]

    return difference


def test_one_seed_is_compared_on_the_same_images_where_predictions_are_there(differences) -> None:
    """Both are right on 110 images, mae alone on 10, dmae alone on 16."""
    paired, alone = differences(paired=True), differences(paired=False)
    assert (paired["interval"], alone["interval"]) == ("paired images", "images")
    assert paired["mean"] == alone["mean"] == pytest.approx(0.03)
    assert alone["low"] < paired["low"] < 0 < paired["high"] < alone["high"]


def test_the_quickstart_says_what_it_measured(tmp_path) -> None:
    rows = []
    for name, correct, parameters in (("teacher", 160, 1_220_000), ("scratch", 100, 450_000), ("dmae", 126, 450_000)):
        score = {"top1_correct": correct, "images": 200, "parameters": parameters, "fingerprint": 12 * "f"}
        measured = {"latency_ms": 1.25, "precision": "fp32", "device": "CPU, 2 threads"}
        (tmp_path / f"{name}.json").write_text(json.dumps(score | measured))
        [row] = read_rows([str(tmp_path / f"{name}.json")])
        rows.append(replace(row, name=name))
    gain = {"mean": 0.13, "low": 0.065, "high": 0.193, "interval": "paired images"}
    none = {"mean": None, "low": None, "high": None, "interval": None}
    summaries = {name: {"difference": gain if name == "dmae" else none} for name in ("teacher", "scratch", "dmae")}
    table = quickstart._table(rows, summaries)
    cells = ("dmae", "63.0 % (126 of 200)", "56.1 to 69.4", "+13.0 (+6.5 to +19.3)", "0.45 M", "1.25 ms")
    assert tuple(re.split("  +", table[3])) == cells and len({line.find("%") for line in table[1:]}) == 1
    text = quickstart.headline(rows, summaries)
    assert "0.37 of the teacher's) has 63.0 % top-1, 79 % of the teacher's 80.0 %; +13.0 points" in text
    assert "(95 % interval of the difference +6.5 to +19.3, paired images)" in text and "includes 0" not in text
    assert "includes 0" in quickstart.headline(rows, {"dmae": {"difference": gain | {"low": -0.01}}})


def test_a_study_in_which_nothing_ran_is_refused(study_folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["maedistill", "study", "x", "--report"])
    study, given = Study.model_validate(STUDY), argparse.Namespace(study="x", report=True)
    assert not report(study, tmp_path / "none", [0], given) and not (tmp_path / "none").exists()
    assert report(study, study_folder, [0], given) and (study_folder / "results.md").is_file()
    page = study_folder / study_page.PAGE
    assert not page.exists()
    (study_folder / "results.json").write_text("[")  # damaged: it is written anew
    page.touch()
    assert report(study, study_folder, [0], given) and page.stat().st_size > 1e6, "made again, because it was there"


def test_a_page_does_without_matplotlib(study_folder, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # its import then fails
    results = collect(Study.model_validate(STUDY), study_folder, [0])
    page = write_results(results, study_folder, title="x", command="y", notes=["A [link](z).", "B."]).read_text()
    assert "![" not in page and page.startswith("# x\n\nA [link](z).\n\nB.\n\n")


def test_the_html_page_of_a_study_has_its_tables_runs_and_chart(study_folder):
    results = collect(Study(**STUDY | {"lines": {"taught": ("mae", "dmae")}}), study_folder, [0, 1, 2])
    write_results(results, study_folder, title="<b>Three</b>", command="maedistill study x")
    (study_folder / "dmae/seed_0/finetune/scorecard.json").write_text(json.dumps({"latency_ms": 1.5}))
    discs = study_page._discs(study_folder, results["networks"])
    assert {disc["name"]: disc["latency"] for disc in discs} == {"scratch": 1.5, "mae": 1.5, "dmae": 1.5}
    assert [disc["place"] for disc in discs] == [list(results["networks"]).index(disc["name"]) for disc in discs]
    text = study_page.write_study_page(study_folder, study_folder / study_page.PAGE).read_text()
    assert "&lt;b&gt;Three&lt;/b&gt;" in text and "<b>Three" not in text and "scratch/seed_2/finetune" in text
    for heading in ("Accuracy, size and latency", "Curves of pre-training", "Settings of fine-tuning"):
        assert f"<h2>{heading}</h2>" in text
    assert "<h2>Accuracy over the length of training</h2>" in text and '<img class="chart" width="' in text
    assert f"{100 * 124 / 200:.2f}" in text and text.count("data-root-id=") > 5
    file = study_folder / "results.json"
    file.write_text(file.read_text().replace('"dmae": {', '"../dmae": {', 1))
    with pytest.raises(DataError, match="another folder"):
        study_page.write_study_page(study_folder, study_folder / study_page.PAGE)


def test_the_quickstart_ends_with_a_page(tmp_path, monkeypatch, capsys):
    """Its steps are left out: `make quickstart` runs them."""
    for name in ("run_steps", "StudyPlan", "collect", "write_results", "read_rows", "write_page"):
        monkeypatch.setattr(quickstart, name, MagicMock())
    for name in ("_table", "headline"):
        monkeypatch.setattr(quickstart, name, lambda *_: "")
    monkeypatch.setattr(quickstart, "write_study_page", lambda out, page: page.touch())
    quickstart.run_quickstart(tmp_path, epochs=None)
    assert (tmp_path / study_page.PAGE).is_file() and "results.html\n" in capsys.readouterr().out
