"""Exits through the tools: a run trains and scores them, each is evaluated and exported alone."""

import json
import shutil
from functools import partial

import pytest
import timm
import torch
from safetensors.torch import load_file

import maedistill
from maedistill.config.finetune import FinetuneConfig
from maedistill.config.loader import load_config
from maedistill.data.loading.evaluation import EvaluationImages
from maedistill.evaluation.context import open_context
from maedistill.evaluation.exits import score_exits
from maedistill.evaluation.latency import image_seconds, measure_latency
from maedistill.finetuning.outputs import RequestedOutputs, forward_outputs
from maedistill.finetuning.setup import open_finetuning
from maedistill.weights.open_network import open_network
from tests.conftest import SCRATCH

EXITS = [*SCRATCH, "student.depth=3", "optim.epochs=2", "student.exits=[0,1]"]
EXITS += ["distill.exits={weight: 1, feature_weight: 0.5}"]
EXITS += ["distill.self_attention={weight: 0.1, blocks: [0,1,2]}"]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Times are measured for a moment, instead of 2 s a network."""
    monkeypatch.setattr("maedistill.evaluation.exits.image_seconds", partial(image_seconds, seconds=0.05))
    monkeypatch.setattr("maedistill.evaluation.scorecard.measure_latency", partial(measure_latency, seconds=0.05))


@pytest.fixture(scope="module")
def trained(finetuning):
    return finetuning("exits", *EXITS)


def test_a_run_scores_every_exit_and_the_average_of_each(trained):
    last = trained.records()[-6:]
    prefixes = ["", "exit0_", "exit1_", "ema_", "ema_exit0_", "ema_exit1_"]
    assert [f"{prefix}top1" in record for prefix, record in zip(prefixes, last, strict=True)] == [True] * 6
    assert all(record[f"{prefix}images"] == 24 for prefix, record in zip(prefixes, last, strict=True))
    assert json.loads((trained.run / "run.json").read_text())["exits"] == [0, 1]
    parts = {"exits/0/cross_entropy", "exits/1/divergence", "exits/1/features", "self_attention"}
    assert parts <= trained.metrics()[0].keys()


def test_an_exit_is_evaluated_and_exported_alone(trained, shards, tmp_path):
    recorded = trained.records()[-5]
    result = maedistill.evaluate(str(trained.run), f"{shards}/val-*.tar", exit=0, batch=6, workers=0)
    assert result["top1_correct"] == recorded["exit0_top1_correct"]
    assert result["loss"] == pytest.approx(recorded["exit0_val_loss"], rel=1e-5)
    out = maedistill.export(trained.run, tmp_path / "exit", exit=0)
    record = json.loads((out / "export.json").read_text())
    assert record["exit"] == 0 and record["max_difference"] == 0.0
    opened = open_network(f"run:{trained.run}", "classifier", exit=0)
    assert "after block 0" in (out / "README.md").read_text() and "(exit after block 0)" in opened.name


def test_an_exported_exit_gives_the_joint_forward_s_logits(trained, tmp_path):
    """The network with all its exits, as it is trained, and each exit by itself."""
    config = load_config(trained.run / "config.yaml", root=FinetuneConfig).config
    module = open_finetuning(config, world_size=1, device=torch.device("cpu")).module
    module.load_state_dict(load_file(trained.last_checkpoint() / "model.safetensors"))
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        joint = forward_outputs(module.eval().vit, images, RequestedOutputs(logits=True, blocks=(0, 1)))
        for block, head in module.terms["exits"].heads.items():
            exported = maedistill.export(trained.run, tmp_path / block, exit=int(block))
            alone = timm.create_model(f"local-dir:{exported}", pretrained=True).eval()
            assert float((alone(images) - head(joint[f"tokens/{block}"])[1]).abs().max()) == 0.0


def test_exits_with_a_block_of_their_own_are_plain_networks_too(finetuning, tmp_path):
    """One block deeper than where they leave: an export equals the joint forward, which has trained its block."""
    run = finetuning("exits-own", *EXITS, "distill.exits.own_block=true", "optim.epochs=1")
    config = load_config(run.run / "config.yaml", root=FinetuneConfig).config
    module = open_finetuning(config, world_size=1, device=torch.device("cpu")).module
    initial = module.terms["exits"].heads["0"].block.mlp.fc1.weight.clone()
    module.load_state_dict(load_file(run.last_checkpoint() / "model.safetensors"))
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        joint = forward_outputs(module.eval().vit, images, RequestedOutputs(logits=True, blocks=(0, 1)))
        head = module.terms["exits"].heads["0"]
        alone = timm.create_model(f"local-dir:{maedistill.export(run.run, tmp_path / 'own', exit=0)}", pretrained=True)
        assert len(alone.blocks) == 2 and not torch.equal(head.block.mlp.fc1.weight, initial)
        assert torch.equal(alone.eval()(images), head(joint["tokens/0"])[1])
    last = run.records()[-5]
    scored = maedistill.evaluate(str(run.run), config.data.val, exit=0, batch=6, workers=0)
    assert scored["top1_correct"] == last["exit0_top1_correct"]


def test_there_is_no_such_exit(trained, mae):
    for run, number in ((trained.run, 2), (mae.run, 0)):
        with pytest.raises(maedistill.ConfigError, match="--exit"):
            maedistill.load_backbone(run, exit=number)
    with pytest.raises(maedistill.ConfigError, match="no exits"):
        open_network("timm:test_vit", exit=0)


def test_the_curve_goes_from_the_first_exit_to_the_end(trained, shards, tmp_path):
    context = open_context(batch=6, workers=0, threads=1, precision="fp32")
    files = {"picture": tmp_path / "exits.png", "file": tmp_path / "exits.json"}
    result = score_exits(str(trained.run), f"{shards}/val-*.tar", context, beside=[str(trained.run)], **files)
    recorded = trained.records()[-6:-3]
    counts = [record[f"{name}top1_correct"] for name, record in zip(("exit0_", "exit1_"), recorded[1:], strict=True)]
    whole = recorded[0]["top1_correct"]  # and again, as a network beside them
    assert [one["top1_correct"] for one in result["exits"]] == [*counts, whole, whole]
    assert [one["name"] for one in result["exits"]][:3] == ["exit 0", "exit 1", "end"]
    first, last = result["curve"][0], result["curve"][-1]
    assert first["shares"] == (1.0, 0.0, 0.0) and last["shares"] == (0.0, 0.0, 1.0)
    assert first["top1"] * 24 == pytest.approx(counts[0]) and last["top1"] * 24 == recorded[0]["top1_correct"]
    costs, curve = ([one["gflop"] for one in result[name]] for name in ("exits", "curve"))
    assert costs == sorted(costs) and costs[-2] == costs[-1] and curve == pytest.approx(sorted(curve))
    assert (curve[0], curve[-1]) == pytest.approx((costs[0], costs[-1]))
    assert json.loads(files["file"].read_text())["images"] == 24 and files["picture"].stat().st_size > 5000
    report = (trained.run / "report.md").read_text()
    assert f"- exit 1: top-1 {100 * counts[1] / 24:.2f} % ({counts[1]} of 24)" in report
    assert f"maedistill evaluate exits {trained.run} '{shards}/val-" in report
    with pytest.raises(maedistill.ConfigError, match="has no exits"):
        score_exits("timm:test_vit", f"{shards}/val-*.tar", context)


def test_networks_beside_the_exits_match_classes_by_name_and_see_as_in_training(
    trained, shards, tmp_path, monkeypatch, capsys
):
    context, turned = open_context(batch=6, workers=0, threads=1, precision="fp32"), []
    monkeypatch.setattr(EvaluationImages, "__post_init__", _noting(turned, EvaluationImages.__post_init__))

    def beside(name, **changes):
        shutil.copytree(trained.run, tmp_path / name)
        file = tmp_path / name / "run.json"
        metadata = json.loads(file.read_text())
        metadata["input"] |= changes.pop("input", {})
        file.write_text(json.dumps(metadata | changes))
        return score_exits(str(trained.run), f"{shards}/val-*.tar", context, beside=[str(tmp_path / name)])

    beside("upright", input={"exif": "apply"})
    assert list(dict.fromkeys(turned)) == [False, True]
    beside("other", classes=["a", "b", "x"])
    assert "have different class names: label 2 is 'x' in the model, 'c' in " in capsys.readouterr().out
    with pytest.raises(maedistill.DataError, match=r"permuted.*and the shards number their classes differently"):
        beside("permuted", classes=["b", "a", "c"])


def _noting(turned, opened):
    """Note whether photographs are turned upright."""

    def note(images):
        turned.append(images.index.apply_exif)
        opened(images)

    return note
