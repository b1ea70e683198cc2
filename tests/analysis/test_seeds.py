"""Trainings that differ in their seed are taken together: means, intervals and differences as scipy has them."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from maedistill.analysis import pages
from maedistill.analysis.concepts import COURSE_METRICS, METRICS, summarize
from maedistill.analysis.entropies import EntropySpec
from maedistill.analysis.knowledge import KnowledgeSpec, quantify
from maedistill.analysis.seeds import group_seeds, over_seeds
from maedistill.analysis.states import find_states
from maedistill.escaping import markdown
from tests.analysis.test_knowledge import CONTEXT

FOREGROUND = np.tile(np.arange(16) < 6, (9, 1))  # 9 images of 16 cells
KINDS = METRICS.keys() - {"concepts"}


def network(number: int, steps=(5, 10), *, without: bool = False) -> dict:
    """A summary of random entropies; without: no concept at all."""
    entropies = np.random.default_rng(number).normal(-2.8, 0.3, (len(steps), 9, 16)) - FOREGROUND * 0.2
    distances = [0.0, 1.0 + number, 9.0][: len(steps)]
    return summarize(
        np.full_like(entropies, -2.8) if without else entropies, FOREGROUND, steps=steps, distances=distances
    )[0]


def test_names_that_differ_in_a_seed_folder_alone_are_one_group():
    names = ["kd/seed_0/tuned", "kd/seed_1/tuned", "mae/seed_0/tuned", "seed_3", "seed_04", "seed_4", "timm:resnet18"]
    names += ["kd/seed_x/tuned", "kd/tuned/seed_0", "seed_0/seed_1", "seed_0/seed_2", "run:seed_0/a", "run:seed_1/a"]
    assert group_seeds(names) == {
        "kd/seed_*/tuned": {"0": "kd/seed_0/tuned", "1": "kd/seed_1/tuned"},
        "seed_*": {"3": "seed_3", "04": "seed_04", "4": "seed_4"},
        "run:seed_*/a": {"0": "run:seed_0/a", "1": "run:seed_1/a"},
    }


def test_a_network_s_name_keeps_the_folders_that_tell_trainings_apart():
    for paths, names in (
        (["runs/a/seed_0", "runs/b/seed_1"], ["a/seed_0", "b/seed_1"]),
        (["runs/a/seed_0/tuned", "runs/a/seed_1/tuned/"], ["seed_0/tuned", "seed_1/tuned"]),
        (["runs/a/one", "runs/b/two"], ["one", "two"]),
    ):
        assert [state.name for state in find_states(paths)] == names


def test_means_and_differences_have_intervals_over_seeds():
    """The groups share seeds 1 and 2, in another order."""
    seeds = {"a": (0, 1, 2), "b": (2, 1, 3)}
    networks = {f"{name}/seed_{k}": network(10 * ord(name) + k) for name in "ab" for k in seeds[name]}
    found = over_seeds(networks)["b/seed_*"]
    each = {name: {k: networks[f"{name}/seed_{k}"] for k in seeds[name]} for name in "ab"}
    for kind in KINDS:
        values = {name: {k: one["metrics"][kind]["value"] for k, one in each[name].items()} for name in "ab"}
        differences = [values["b"][k] - values["a"][k] for k in (1, 2)]
        for entry, expected in ((found, [*values["b"].values()]), (found["difference"], differences)):
            metric, interval = entry["metrics"][kind], stats.ttest_1samp(expected, 0).confidence_interval()
            assert metric["value"] == pytest.approx(np.mean(expected)) and metric["seeds"] == len(expected)
            assert [metric["low"], metric["high"]] == pytest.approx([interval.low, interval.high], rel=1e-3)
    assert found["difference"]["to"] == "a/seed_*" and found["seeds"] == ["2", "1", "3"]
    states = [one["checkpoints"][1] for one in each["b"].values()]
    assert found["checkpoints"][1]["step"] == 10
    assert found["checkpoints"][1]["weight_distance"] == np.mean([state["weight_distance"] for state in states])
    assert found["checkpoints"][1]["ratio"]["value"] == pytest.approx(
        np.mean([one["ratio"]["value"] for one in states])
    )


def test_what_depends_on_the_checkpoints_is_compared_between_the_same_ones_only():
    steps = {"a": [(5, 10)] * 2, "b": [(5, 11)] * 2, "c": [(5, 10), (5, 7, 10)]}
    networks = {f"{name}/seed_{k}": network(k, steps[name][k]) for name in "abc" for k in range(2)}
    found = over_seeds(networks)
    assert found["b/seed_*"]["metrics"].keys() == KINDS
    for metrics in (found["b/seed_*"]["difference"]["metrics"], found["c/seed_*"]["metrics"]):
        assert metrics.keys() == KINDS - {*COURSE_METRICS}
    assert "checkpoints" not in found["c/seed_*"]


def test_a_seed_without_a_value_is_left_out_of_the_mean():
    networks = {f"{name}/seed_{k}": network(k, without=name == "b" and k < 2) for name in "ab" for k in range(3)}
    found = over_seeds(networks)["b/seed_*"]
    assert found["metrics"]["background"]["seeds"] == 3 and found["metrics"]["ratio"]["seeds"] == 1
    assert found["metrics"]["ratio"]["value"] == networks["b/seed_2"]["metrics"]["ratio"]["value"]
    assert np.isnan(found["metrics"]["ratio"]["low"]) and found["difference"]["metrics"]["ratio"]["value"] == 0


def test_the_command_writes_and_draws_groups(mae, tuned, shards: Path, tmp_path, monkeypatch):
    networks = []
    for name, run in (
        ("labels/seed_0", mae.run),
        ("kd/seed_0", tuned.run),
        ("labels/seed_1", mae.run),
        ("kd/seed_1", tuned.run),
    ):
        networks.append(str(tmp_path / "study" / name / "run"))
        shutil.copytree(run, networks[-1])
    shutil.copytree(mae.run, tmp_path / "study/other/run")
    drawn = {}
    for function in (pages.draw_metrics, pages.draw_course, pages.draw_maps):

        def note(result, path, *, function=function, **given):
            drawn[path.name] = [*given.get("maps", result)]
            function(result, path, **given)

        monkeypatch.setattr(pages, function.__name__, note)
    noise = EntropySpec(steps=1, draws=2)
    spec = KnowledgeSpec(networks, f"{shards}/val-*.tar", tmp_path / "out", count=4, foreground="none", noise=noise)
    result = quantify(spec, CONTEXT)
    groups = ["labels/seed_*/run", "kd/seed_*/run"]
    assert list(result["networks"]) == [f"{name}/seed_{seed}/run" for seed in range(2) for name in ("labels", "kd")]
    value = result["networks"]["kd/seed_0/run"]["metrics"]["rho"]["value"]
    assert result["seeds"][groups[1]]["metrics"]["rho"] == {"value": value, "low": value, "high": value, "seeds": 2}
    page = (spec.out / "knowledge.md").read_text()
    rows = [groups[0], f"{groups[1]} - {groups[0]}", "kd/seed_1/run"]
    assert sorted(rows, key=lambda row: page.index(f"| {markdown(row)} |")) == rows
    firsts = ["labels/seed_0/run", "kd/seed_0/run"]
    assert drawn == {"metrics.png": groups, "course.png": groups, "maps.png": firsts}
    assert {path.name for path in spec.out.glob("*.png")} == drawn.keys()
    more = replace(spec, networks=[*networks, str(tmp_path / "study/other/run")], out=tmp_path / "more")
    assert quantify(more, CONTEXT)["seeds"].keys() == {*groups}
    assert drawn["course.png"] == [*groups, "other/run"] and drawn["maps.png"] == [*firsts, "other/run"]
    alone = quantify(replace(spec, networks=networks[:1], out=tmp_path / "alone"), CONTEXT)
    assert alone["seeds"] == {} and list(alone["networks"]) == ["run"]
