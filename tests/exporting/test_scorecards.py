"""Runs and exports side by side: a row for each, a line for each network, a panel for what was measured alike."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from matplotlib.collections import PathCollection

from maedistill.errors import DataError
from maedistill.exporting.scorecards import read_rows
from maedistill.report import charts

HERE = {"processor": "Xeon", "device": "CPU, 2 threads"}
SCORE = {"top1_correct": 80, "images": 100, "parameters": 250_000, "precision": "fp32", "fingerprint": "ab" * 32}
SCORE |= {"latency_ms": 2.0, "images_per_second": 700.0, **HERE}


def write(folder: Path, name: str = "scorecard.json", **changed: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(SCORE | changed))
    return folder / name


def write_export(folder: Path, network: str, *, kinds: tuple[str, ...] = ("timm", "int8"), peer: int = 0) -> Path:
    """An export of a checkpoint, in fp32 and int8, with files of 1.0 and 0.25 MB."""
    for kind in kinds:
        write(folder, f"scorecard_{kind}.json", latency_ms=1.0 if kind == "int8" else 2.0, precision=kind)
    (folder / "model.safetensors").write_bytes(bytes(1_000_000))
    (folder / "model_int8.onnx").write_bytes(bytes(250_000))
    (folder / "export.json").write_text(json.dumps({"network": network, "peer": peer, "weights": "model"}))
    return folder


@pytest.fixture
def tool(monkeypatch, run_command, tmp_path) -> Callable[..., SimpleNamespace]:
    """`maedistill compare`: its exit code, what it printed and drew, its page and its JSON."""
    drawn = []
    new_canvas = charts.new_canvas
    monkeypatch.setattr(charts, "new_canvas", lambda **size: drawn.append(new_canvas(**size)) or drawn[-1])

    def start(*given: Any) -> SimpleNamespace:
        out = tmp_path / "out"
        ended = run_command("compare", *given, "--out", out)
        if not ended.code:
            ended.page = (out / "comparison.md").read_text()
            ended.rows = json.loads((out / "comparison.json").read_text())["rows"]
            ended.panels = drawn[-1].figure.axes if any(row["latency_ms"] for row in ended.rows) else []
        return ended

    return start


def discs(axes: Any) -> list[PathCollection]:
    return [one for one in axes.collections if isinstance(one, PathCollection)]


def test_every_scorecard_is_a_row_with_a_name_of_its_own(tmp_path, tool):
    write_export(tmp_path / "a/run/export", "1")
    write_export(tmp_path / "a/run/export_exit5", "1", kinds=("timm",))
    write_export(tmp_path / "a/run/export_exit5.tmp", "1")  # of a killed export
    write_export(tmp_path / "b/run/export", "2")
    write(tmp_path / "b/run")
    write(tmp_path / "b/run timm")
    link = write(tmp_path / "b", "run.json")
    ended = tool(tmp_path / "a/run", tmp_path / "b/run/export", *(tmp_path / "b").glob("run*"), link)
    names = [row["name"] for row in ended.rows]
    assert sorted(names) == [
        "a/run/export int8", "a/run/export timm", "a/run/export_exit5 timm",
        "b/run", "b/run timm", "b/run.json", "b/run/export int8", "b/run/export timm",
    ]  # fmt: skip
    for name in names:
        assert f"\n| {name} | 80.00 % (80 of 100) |" in ended.page
        assert re.search(rf"^{name} +80.00 % \(80 of 100\) +71.1 to 86.7 ", ended.out, re.MULTILINE)
    assert len(discs(ended.panels[0])) == 8 and "![" in ended.page


def test_names_that_would_collide_are_told_apart(tmp_path):
    write(tmp_path / "res timm")
    write_export(tmp_path / "res", "1", kinds=("timm",))
    assert [row.name for row in read_rows([str(tmp_path / "res"), str(tmp_path / "res timm")])] == [
        "res timm",
        "res timm (2)",
    ]


def test_a_line_joins_the_files_of_one_network_and_areas_are_sizes(tmp_path, tool):
    write_export(tmp_path / "run/export", "1")
    write_export(tmp_path / "run/export_exit2", "1", kinds=("timm",))
    write_export(tmp_path / "run/export_peer1", "1", kinds=("timm",), peer=1)
    write_export(tmp_path / "other/export", "2", kinds=("timm",))
    exits = [{"name": name, **SCORE, "latency_ms": ms} for name, ms in (("exit 2", 1.0), ("end", 3.0), ("beside", 5.0))]
    write(tmp_path, "exits.json", exits=exits)
    ended = tool(tmp_path / "run", tmp_path / "other/export", tmp_path / "exits.json")
    (axes,) = ended.panels
    by_name = {row["name"]: row["network"] for row in ended.rows}
    groups = [{name for name in by_name if by_name[name] == network} for network in dict.fromkeys(by_name.values())]
    assert groups[0] == {"run/export timm", "run/export int8", "run/export_exit2 timm"}
    assert sorted(map(sorted, groups[1:])) == [
        ["exits.json beside"], ["exits.json end", "exits.json exit 2"],
        ["other/export timm"], ["run/export_peer1 timm"],
    ]  # fmt: skip
    lines = [len(line.get_xdata()) for line in axes.get_lines() if line.get_color() == "gray"]
    assert sorted(lines) == [2, 3]
    sizes = dict(zip((row["name"] for row in ended.rows), (float(d.get_sizes()[0]) for d in discs(axes)), strict=True))
    assert sizes["run/export timm"] == pytest.approx(4 * sizes["run/export int8"])
    assert not any(disc.get_linewidths()[0] for disc in discs(axes)), "a border would change the areas"


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"processor": "EPYC"}, "Not all latencies compare"),
        ({"device": "CPU, 4 threads"}, "Not all latencies compare"),
        ({"processor": ""}, "Not all latencies compare"),
        ({"fingerprint": "cd" * 32}, "Not all accuracies compare"),
    ],
)
def test_what_was_not_measured_alike_has_a_panel_of_its_own(tmp_path, tool, other, said):
    ended = tool(write(tmp_path / "a"), write(tmp_path / "b", **other), write(tmp_path / "c"))
    assert said in ended.page and said in ended.out
    assert [len(discs(panel)) for panel in ended.panels] == [2, 1]
    alike = tool(tmp_path / "a", tmp_path / "c")
    assert "Not all" not in alike.page and len(alike.panels) == 1


def test_rows_without_a_processor_are_apart_and_rows_without_latency_are_named(tmp_path, tool):
    old = [write(tmp_path / name, processor="") for name in "ab"]
    assert len(tool(*old).panels) == 2
    ended = tool(write(tmp_path / "c", latency_ms=None))
    assert "not in the picture: c." in ended.out and "![" not in ended.page and "| - | 700 |" in ended.page
    assert not (tmp_path / "out/comparison.png").exists(), "the one of the rows before"


def test_nine_machines_and_long_names_are_drawn(tmp_path, tool):
    names = [f"{i}{'long ' * 45}" for i in range(9)]
    entry = [{"name": "x" * 4000, **SCORE, "processor": ""}]
    ended = tool(*(write(tmp_path / name, exits=entry) for name in names))
    assert ended.code == 0 and len(ended.panels) == 8 and f"not in the picture: {names[8]}" in ended.out
    assert max(ended.panels[0].figure.get_size_inches()) < 100


def test_names_are_text_in_table_and_picture(tmp_path, tool):
    hostile = ["_x", "a$_{b}$c|d", "*e*", "<b>f"]
    ended = tool(*(write(tmp_path / name, device="GPU |$x$", processor="") for name in hostile))
    labels = [text.get_text() for text in ended.panels[0].figure.legends[0].get_texts()]
    assert len(labels) == 4 and labels[0].strip().startswith("_x: 80.0 %") and labels[1].startswith(r"a\$_{b}\$c|d")
    assert charts.plain("_x") == " _x", "a legend leaves out what an underscore begins"
    table = [line for line in ended.page.splitlines() if line.startswith("| ")]
    assert {line.count(" | ") for line in table} == {9} and not [
        line for line in table if "<b>" in line or "*e*" in line
    ]


@pytest.mark.parametrize(
    "text",
    [
        "{", "[]", '{"a": NaN}', "[" * 100_000, "\xff",
        *(json.dumps(SCORE | wrong) for wrong in (
            {"latency_ms": float("inf")}, {"latency_ms": -1.0}, {"images": 0}, {"top1_correct": 101},
            {"parameters": 1e5}, {"images": 10**400}, {"device": None}, {"top1_correct": True}, {"exits": 5},
            {"exits": [5]}, {"device": "x" * 201}, {"processor": "x" * 201}, {"precision": "x" * 201},
            {"fingerprint": ""},
        )),
        json.dumps(SCORE).replace("2.0", "1e999"),
    ],
)  # fmt: skip
def test_what_is_no_scorecard_is_refused(tmp_path, text):
    file = tmp_path / "s.json"
    file.write_text(text, encoding="latin-1")
    with pytest.raises(DataError, match=r"s\.json is not a scorecard: .*\n.*again: maedistill export RUN --val"):
        read_rows([str(file)])


def test_without_a_scorecard_the_error_says_how_one_is_written(tmp_path, tool):
    for given, cause in (
        (tmp_path, "holds no scorecard"),
        (tmp_path / "none", "there is no "),
        ("x" * 5000, "there is no "),
    ):
        ended = tool(given)
        error, fix = ended.err.splitlines()
        assert ended.code == 3 and cause in error and "evaluate MODEL SHARDS --json" in fix
    assert not (tmp_path / "out").exists()
