"""Trainings that differ in their seed are taken together: means, intervals and differences as scipy has them."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from maedistill.analysis.concepts import METRICS, summarize
from maedistill.analysis.entropies import EntropySpec
from maedistill.analysis.knowledge import KnowledgeSpec, quantify
from maedistill.analysis.seeds import group_seeds, over_seeds
from tests.analysis.test_knowledge import CONTEXT

FOREGROUND = np.tile(np.arange(16) < 6, (9, 1))  # 9 images of 16 cells


def network(number: int, steps=(5, 10)) -> dict:
    entropies = np.random.default_rng(number).normal(-2.8, 0.3, (len(steps), 9, 16)) - FOREGROUND * 0.2
    return summarize(entropies, FOREGROUND, steps=steps, distances=[0.0, 1.0 + number][: len(steps)])[0]


def test_names_that_differ_in_a_seed_alone_are_one_group():
    names = ["kd/seed_0/tuned", "kd/seed_1/tuned", "mae/seed_0/tuned", "seed_3", "seed_4", "timm:resnet18", "seed_x"]
    groups = group_seeds(names)
    assert groups == {"kd/tuned": {0: names[0], 1: names[1]}, "all seeds": {3: "seed_3", 4: "seed_4"}}


def test_means_and_differences_have_intervals_over_seeds():
    networks = {
        f"{name}/seed_{seed}": network(3 * place + seed) for place, name in enumerate("ab") for seed in range(3)
    }
    found = over_seeds(networks)
    for kind in METRICS.keys() - {"concepts"}:
        ours, theirs = (
            np.array([networks[f"{name}/seed_{seed}"]["metrics"][kind]["value"] for seed in range(3)]) for name in "ba"
        )
        for entry, values in ((found["b"], ours), (found["b"]["difference"], ours - theirs)):
            metric, expected = entry["metrics"][kind], stats.ttest_1samp(values, 0).confidence_interval()
            assert metric["value"] == pytest.approx(values.mean()) and metric["seeds"] == 3
            assert [metric["low"], metric["high"]] == pytest.approx([expected.low, expected.high], rel=1e-3)
    assert found["b"]["difference"]["to"] == "a" and "difference" not in found["a"]
    state = found["b"]["checkpoints"][1]
    assert state["weight_distance"] == pytest.approx(5) and state["step"] == 10
    each = [networks[f"b/seed_{seed}"]["checkpoints"][1]["foreground"]["value"] for seed in range(3)]
    assert state["foreground"]["value"] == pytest.approx(np.mean(each))


def test_what_depends_on_the_checkpoints_is_compared_between_the_same_ones_only():
    steps = {"a": (5, 10), "b": (5, 11)}
    networks = {f"{name}/seed_{seed}": network(seed, steps[name]) for name in "ab" for seed in range(2)}
    found = over_seeds(networks)["b"]
    assert "rho" in found["metrics"]
    assert found["difference"]["metrics"].keys() == {"foreground", "background", "ratio"}


def test_the_command_writes_and_draws_groups(mae, tuned, shards: Path, tmp_path):
    networks = []
    for name, run in (("labels", mae.run), ("kd", tuned.run)):
        for seed in range(2):
            networks.append(str(tmp_path / "study" / name / f"seed_{seed}" / "run"))
            shutil.copytree(run, networks[-1])
    noise = EntropySpec(steps=1, draws=2)
    spec = KnowledgeSpec(networks, f"{shards}/val-*.tar", tmp_path / "out", count=4, foreground="none", noise=noise)
    result = quantify(spec, CONTEXT)
    assert list(result["networks"]) == [f"{name}/seed_{seed}/run" for name in ("labels", "kd") for seed in range(2)]
    value = result["networks"]["kd/seed_0/run"]["metrics"]["rho"]["value"]
    assert result["seeds"]["kd/run"]["metrics"]["rho"] == {"value": value, "low": value, "high": value, "seeds": 2}
    page = (spec.out / "knowledge.md").read_text()
    assert page.index("| labels/run |") < page.index("| kd/run - labels/run |") < page.index("| kd/seed_1/run |")
    assert {path.name for path in spec.out.glob("*.png")} == {"metrics.png", "course.png", "maps.png"}
    alone = quantify(replace(spec, networks=networks[:1], out=tmp_path / "alone"), CONTEXT)
    assert alone["seeds"] == {} and list(alone["networks"]) == ["run"]
