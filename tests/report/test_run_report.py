"""Reports of real tiny runs: they name what they should, link what exists, and repeat the numbers of the metrics."""

import builtins
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from maedistill.config.finetune import FinetuneConfig
from maedistill.config.loader import load_config
from maedistill.config.pretrain import PretrainConfig
from maedistill.errors import DataError
from maedistill.report.run_report import next_commands, summary, write_finetune_report, write_run_report
from maedistill.runs.folder import RunFolder
from tests.exporting.imitation import START, imitate, random_vit


def links(report) -> list[str]:
    """The files that a Markdown page shows, checked to be there and to be pictures."""
    found = re.findall(r"!\[[^]]*\]\(([^)]+)\)", report.read_text())
    for link in found:
        assert (report.parent / link).read_bytes().startswith(b"\x89PNG"), link
    return found


def table(report) -> dict[str, dict[str, str]]:
    """The page's table: {method: {column: cell}}."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in report.read_text().splitlines()
        if line.startswith("|")
    ]
    return {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[2:]}


@pytest.mark.parametrize("method", ["mae", "dmae", "amd"])
def test_a_run_s_report_says_what_it_was_and_what_came_of_it(trio, method):
    ended = trio[method]
    text, last = (ended.run / "report.md").read_text(), ended.metrics()[-1]
    knn = [record["knn"] for record in ended.records() if "knn" in record][-1]
    row = table(ended.run / "report.md")[method]
    assert row["method"] == method
    assert row["student"] == "vit_tiny_patch16_224 (width 32, depth 2, num_heads 2, patch_size 8)"
    scores = [f"{last['loss']:.4f}", f"{last['pixels']:.4f}", f"{knn:.1%}"]
    assert [row[name] for name in ("loss", "pixels", "kNN")] == scores
    pairs = {"mae": (), "dmae": (1,), "amd": (0, 1)}[method]
    for term in ("align", "generate"):
        values = [last[f"{term}/{block}"] for block in pairs if f"{term}/{block}" in last]
        assert row[term] == (f"{sum(values) / len(values):.4f}" if values else "-")
    assert links(ended.run / "report.md") == ["curves.png", f"pictures/step_{last['step']:09d}.png"]
    for part in (
        f"{last['step']} steps",
        "96 images",
        "global batch 12",
        "lr 0.003",
        "tiny.yaml",
        "a trend, not a forecast",
    ):
        assert part in text, part
    assert ("teacher: none" in text) == (method == "mae")
    assert method == "mae" or str(trio["mae"].run) in text
    command = shlex.split(text.rstrip().splitlines()[-1])
    assert command[:2] == ["maedistill", "finetune"] and f"init.source=run:{ended.run}" in command


IMAGES = {"image_key": "in.png", "label_key": "fine.cls", "exif": "apply", "eval_crop": 1.0, "index": "a.safetensors"}


def test_the_next_commands_see_the_run_s_images(tmp_path):
    """In the members that it chose, upright as it saw them, and by its index."""
    data = {"train": "a.tar", "val": "b.tar"} | IMAGES
    config = load_config({"method": "mae", "data": data}, root=PretrainConfig, to_run=False).config
    (words,) = next_commands(tmp_path, config, {})
    following = load_config(words[2], words[3:], root=FinetuneConfig).config
    assert {key: getattr(following.data, key) for key in data} == data
    exit_words = next_commands(tmp_path, following, {"exits": [2]})[2]
    assert exit_words[-4:] == ["--image-key", "in.png", "--label-key", "fine.cls"]


def test_losses_of_a_further_teacher_are_not_averaged_with_the_first_one_s(tmp_path):
    run = imitate(tmp_path / "run", random_vit())
    record = {"step": 7, "epoch": 2.5, "loss": 1.0, "pixels": 0.5, "align/1": 0.02, "align/teacher2/1": 1.0}
    record |= {"images_per_second": 1.0, "trained_seconds": 1.0}
    (run / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    assert table(write_run_report(RunFolder(run)))["dmae"]["align"] == "0.0200"


def test_a_report_does_without_matplotlib_and_without_pictures(trio, tmp_path, monkeypatch):
    run = RunFolder(tmp_path / "run")
    shutil.copytree(trio["dmae"].run, run.path)
    (run.path / "curves.png").unlink()
    shutil.rmtree(run.pictures)
    original = builtins.__import__

    def without(name, *args, **keywords):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *args, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    assert links(write_run_report(run)) == [] and "dmae" in table(run.report)
    lines = (run.path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run.path / "metrics.jsonl").write_text("".join(line for line in lines if '"knn"' not in line))
    assert "kNN on frozen" not in write_run_report(run).read_text()


def test_a_summary_averages_rates_over_time_and_keeps_the_last_values():
    step = {"loss": 2.0, "images_per_second": 10.0, "trained_seconds": 10.0, "step": 1}
    records = [
        step,
        {"step": 1, "knn": 0.5},
        step | {"loss": 1.0, "images_per_second": 40.0, "trained_seconds": 12.5, "step": 2},
    ]
    last = summary(records, Path("x"))
    assert (last["loss"], last["knn"], last["step"], last["seconds"]) == (1.0, 0.5, 2, 12.5)
    assert last["rate"] == pytest.approx(200 / 12.5)  # 100 images in 10 s, 100 in 2.5 s
    assert summary([step], Path("x"))["knn"] is None
    with pytest.raises(DataError, match=r"x/metrics\.jsonl"):
        summary(records[1:2], Path("x"))


def test_a_fine_tuned_run_names_its_exits_and_peers_and_their_commands(tmp_path):
    score = {"top1": 0.5, "top1_correct": 2, "top5": 1.0, "top5_correct": 4, "images": 4, "val_loss": 1.0}
    for name, part, told in (("exits", [2, 5], "exit5"), ("peers", [{}, {}], "peer2")):
        vit = random_vit(num_classes=3, global_pool="avg")
        run = imitate(tmp_path / name, vit, "finetune", starts=[START], **{name: part})
        step = {"loss": 1.0, "images_per_second": 1.0, "trained_seconds": 1.0}
        records = [step, score, {f"{told}_top1_correct": 3, f"{told}_images": 4}]
        (run / "metrics.jsonl").write_text(
            "".join(json.dumps({"step": 7, "epoch": 2.5} | record) + "\n" for record in records)
        )
        text = write_finetune_report(RunFolder(run)).read_text()
        assert f"- {told[:4]} {told[4:]}: top-1 75.00 % (3 of 4), 95 % interval 30.06 to 95.44 %" in text
        first = f"--{told[:4]} {1 if name == 'peers' else 2}"
        assert f"maedistill export {run} {first}\n" in text and f"evaluate {run} val.tar {first}\n" in text
        assert ("maedistill evaluate exits" in text) == (name == "exits")
