"""Mutual learning through the tools: each student is scored, evaluated and exported alone."""

import json

import pytest
import timm
import torch

import maedistill
from maedistill.weights.open_network import open_network
from tests.conftest import SCRATCH

MUTUAL = [*SCRATCH, "optim.epochs=2"]
MUTUAL += ['distill.mutual={weight: 1, warmup_epochs: 1, students: ["", "student.width=48 student.num_heads=3"]}']


@pytest.fixture(scope="module")
def trained(finetuning):
    return finetuning("mutual", *MUTUAL)


def test_every_student_and_all_of_them_together_are_scored(trained):
    assert trained.out.count("peer 1 ") == trained.out.count("peer 2 ") == 1
    names = ["", "peer1_", "peer2_", "ensemble_"]
    last = trained.records()[-8:]
    prefixes = [*names, *(f"ema_{name}" for name in names)]
    assert [f"{prefix}top1" in record for prefix, record in zip(prefixes, last, strict=True)] == [True] * 8
    each = [record[f"{name}top1"] for name, record in zip(names[:3], last, strict=False)]
    assert last[3]["best_top1"] == max(each)
    assert last[3]["mean_top1"] == pytest.approx(sum(each) / 3)
    first = trained.metrics()[0]
    assert {"weight/mutual", "mutual", "peer1/mutual", "peer2/mutual", "peer2/cross_entropy"} <= first.keys()
    assert "ema_best_top1" in last[7]
    report = (trained.run / "report.md").read_text()
    assert f"- peer 2: top-1 {100 * each[2]:.2f} %" in report and "- ensemble" in report
    assert f"maedistill export {trained.run} --peer 1" in report
    peers = json.loads((trained.run / "run.json").read_text())["peers"]
    assert [peer["seed"] for peer in peers] == [1, 2]
    assert [peer["network"]["arguments"]["embed_dim"] for peer in peers] == [32, 48]


def test_a_student_is_evaluated_and_exported_alone(trained, shards, tmp_path):
    recorded = trained.records()[-6]
    result = maedistill.evaluate(str(trained.run), f"{shards}/val-*.tar", peer=2, batch=6, workers=0)
    assert result["top1_correct"] == recorded["peer2_top1_correct"]
    assert result["loss"] == pytest.approx(recorded["peer2_val_loss"], rel=1e-5)
    out = maedistill.export(trained.run, tmp_path / "peer", peer=2)
    record, card = json.loads((out / "export.json").read_text()), (out / "README.md").read_text()
    assert record["peer"] == 2 and record["max_difference"] == 0.0
    assert "student 2 of mutual learning" in card and "; seed 2." in card
    assert f"({recorded['peer2_top1_correct']} of 24)" in card
    alone = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    opened = open_network(f"run:{trained.run}", "classifier", peer=2)
    assert alone.embed_dim == 48 and torch.equal(alone(images), opened.module(images))
    with pytest.raises(maedistill.ConfigError, match="--peer"):
        maedistill.load_backbone(trained.run, peer=3)
