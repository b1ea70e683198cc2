"""From the command to the first step: every second belongs to one part, a real start is followed to its first step."""

import time

import pytest

from maedistill.benchmark.start import measure_start, start_report
from maedistill.benchmark.stopwatch import Stopwatch
from maedistill.errors import ConfigError, DataError

CONFIG = """\
method: mae
data: {{train: {shards}/train-*.tar, image_size: 32, workers: 1}}
student: {{model: vit_tiny_patch16_224, width: 32, depth: 1, num_heads: 2, patch_size: 8}}
decoder: {{width: 16, depth: 1, num_heads: 2}}
optim: {{epochs: 10, warmup_epochs: 0, global_batch: 12, lr: 1e-3}}
log: {{tensorboard: false, knn_every_epochs: null}}
"""


def test_the_stopwatch_gives_each_instant_to_the_innermost_part(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([1.0, 3.0, 6.0, 10.0, 15.0, 21.0, 28.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    watch = Stopwatch(0.0, around="before")
    watch.around("rest")  # at 1
    with watch.part("outer"):  # at 3
        with watch.part("inner"):  # at 6
            pass  # ends at 10
        with pytest.raises(KeyError), watch.part("inner"):  # at 15
            raise KeyError  # at 21, a part that fails ends as well
    # at 28
    assert watch.seconds == {"before": 1, "rest": 2, "outer": 3 + 5 + 7, "inner": 4 + 6}


def test_a_real_start_ends_after_its_first_step_and_leaves_nothing(shards, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    config = tmp_path / "tiny.yaml"
    config.write_text(CONFIG.format(shards=shards))
    before = time.monotonic()
    report = measure_start(str(config), (), rounds=1)
    spent = time.monotonic() - before
    parts, packages = report.tables.values()
    seconds = {row["part"]: row["seconds"].median for row in parts}
    assert sum(value for part, value in seconds.items() if part != "all") == pytest.approx(seconds["all"])
    assert seconds["all"] < spent, "one of two starts"
    expected = {"imports", "interpreter", "settings", "process group", "data index", "student and teacher"}
    assert seconds.keys() == expected | {"run folder and engine", "first batch", "first step", "all"}
    assert all(value > 0 for value in seconds.values())
    assert packages[0]["part"] == "torch" and packages[-1]["seconds"] == parts[0]["seconds"]
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


def test_what_keeps_the_tool_from_its_first_step_is_an_error(tmp_path, capfd) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(CONFIG.format(shards=tmp_path))
    with pytest.raises(ConfigError, match="epochs"):
        measure_start(str(config), ["optim.epochs=-1"], rounds=1)
    with pytest.raises(DataError, match="exit code 3"):
        measure_start(str(config), (), rounds=1)
    assert "train-*.tar" in capfd.readouterr().err, "the tool's own words"


def test_the_tables_say_medians_and_shares() -> None:
    starts = [{"import torch": 2.0 * k, "import x": 1.0 * k, "first step": 3.0 * k} for k in (1, 3, 2)]
    report = start_report({"import torch": 40.0}, starts)
    parts, packages = report.tables.values()
    assert [(row["part"], row["seconds"].median, row["share"]) for row in parts] == [
        ("imports", 6.0, "50%"),
        ("first step", 6.0, "50%"),
        ("all", 12.0, "100%"),
    ]
    assert [(row["part"], row["share"]) for row in packages] == [
        ("torch", "67%"),
        ("x", "33%"),
        ("others", "0%"),
        ("all", "100%"),
    ]
    assert "took 40.0 s" in report.remarks[0]
