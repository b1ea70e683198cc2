"""What a run says before it starts: every promise of --dry-run, and that it writes nothing."""

import os
import re

import torch

from maedistill.config.loader import load_config
from maedistill.config.pretrain import PretrainConfig
from maedistill.pretraining.setup import dry_run


def test_dry_run_tells_everything_and_writes_nothing(pretraining, settings, trio):
    said = pretraining("planned", *settings["amd"], "--dry-run").out
    assert not (pretraining.folder / "planned").exists()
    lines = {line.split()[0]: line for line in said.splitlines()}
    assert set(lines) == {
        *("method", "teacher", "sees", "student", "data", "val", "batch", "steps", "lr", "warning", "disk"),
        *("run", "flops", "decoded", "speed", "memory", "time", "nothing"),
    }
    assert "student sees 4 of 16 patches, teacher 8 (nested)" in lines["method"]
    assert "run:" in lines["teacher"] and "keys loaded" in lines["teacher"] and "license" in lines["teacher"]
    assert "4 x 4 patches, as the student" in lines["sees"]
    assert "96 images in 4 shards" in lines["data"] and "12 = 1 ranks x 1 x 12" in lines["batch"]
    total = trio["amd"].metrics()[-1]["step"]
    assert f"{total} = floor(" in lines["steps"]
    assert re.search(r"total [\d.]+ GFLOP per image", lines["flops"])
    for key in ("speed", "memory", "time"):
        assert re.search(r"\d", lines[key]), key


def test_a_rank_has_its_share_of_the_machine_s_cores(shards, tmp_path, monkeypatch, capsys):
    """Of 32 ranks on machines of 8 GPUs and 16 cores each has two, of two ranks each eight."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    data = {"train": f"{shards}/train-*.tar", "image_size": 32}
    student = {"model": "vit_tiny_patch16_224", "width": 32, "depth": 2, "num_heads": 2, "patch_size": 8}
    given = {"method": "mae", "data": data, "student": student, "run": str(tmp_path / "run")}
    given |= {"decoder": {"width": 16, "depth": 1, "num_heads": 2}, "optim": {"epochs": 2, "warmup_epochs": 1}}
    for ranks, workers in ((32, 2), (2, 8)):
        monkeypatch.setenv("WORLD_SIZE", str(ranks))
        dry_run(load_config(given | {"optim": given["optim"] | {"global_batch": 32}}, root=PretrainConfig).config)
        assert f"per worker, {workers} workers" in capsys.readouterr().out


def test_a_dry_run_of_what_has_begun_finds_its_own_settings(pretraining, settings, mae):
    command = [*settings["mae"], "optim.epochs=5", "--dry-run"]
    assert "nothing was started" in pretraining(mae.run, *command).out
    assert "nothing was started" in pretraining(mae.run, *command, "optim.epochs=6", "--extend").out
    refused = pretraining(mae.run, *command, "engine.precision=bf16", code=2).err
    assert "engine.precision: 'fp32' there, 'bf16' now" in refused


def test_print_config_and_explain_need_no_run(pretraining, settings, run_command):
    printed = pretraining("printed", *settings["mae"], "--print-config", "optim.clip=0.5").out
    assert re.search(r"clip: 0.5 +# command line", printed) and re.search(r"seed: .*# ", printed)
    assert not (pretraining.folder / "printed").exists()
    explained = run_command("pretrain", "--explain", "align.normalize").out
    assert explained.startswith("align.normalize:") and "one of none, l2, whiten" in explained
    assert "  masks " in run_command("pretrain", "--explain").out
