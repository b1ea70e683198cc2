"""Exports of imitated and real runs: a stranger's timm gives the run's outputs back, or nothing gets the name."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.data import create_transform, resolve_model_data_config
from timm.models.vision_transformer import VisionTransformer

from maedistill.exporting import folder as module
from maedistill.exporting.folder import export, read_record
from maedistill.models.encoder import MaskedEncoder
from maedistill.models.vits import build_vit
from maedistill.runs.manifest import write_manifest
from maedistill.runs.restore import newest_intact, read_weights
from maedistill.weights.open_network import open_network
from maedistill.weights.state_dict import ConvertedStateDict, load_encoder
from tests.exporting.imitation import CROP, MEAN, STD, TINY, imitate, random_vit


@dataclass
class Case:
    """An export, and the outputs of the network that went in."""

    stage: str
    vit: VisionTransformer
    global_pool: str | None
    folder: Path

    def images(self) -> torch.Tensor:
        size = self.vit.patch_embed.img_size[0]
        return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))

    @torch.no_grad()
    def expected(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and output of the network in this process.

        Training embeds patches by a matrix product, timm by a convolution: on some CPUs they round differently.
        """
        tokens = self.vit.forward_features(self.images())  # [B, P + N, D]
        torch.testing.assert_close(MaskedEncoder(self.vit)(self.images())[0], tokens, rtol=1e-4, atol=1e-4)
        if self.stage == "finetune":
            return tokens, self.vit(self.images())
        prefix = self.vit.num_prefix_tokens
        return tokens, tokens[:, 0] if self.global_pool == "token" else tokens[:, prefix:].mean(1)


CASES: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "class token": ("pretrain", None, {"pos_embed": "sincos2d"}),
    "class token, pooled by it": ("pretrain", "token", {"pos_embed": "sincos2d"}),
    "no class token": ("pretrain", None, {"pos_embed": "sincos1d", "class_token": False}),
    "registers, learned positions": ("pretrain", "avg", {"register_tokens": 3}),
    "registers, pooled by the class token": ("pretrain", "token", {"register_tokens": 3}),
    "other shape": ("pretrain", None, {"width": 48, "depth": 3, "num_heads": 4, "patch_size": 4, "size": 24}),
    "LayerScale, attention pooling": ("pretrain", None, {"model": "test_vit3"}),
    "RMSNorm, any size": ("pretrain", None, {"model": "test_vit4"}),
    "qk-norm, parallel blocks": ("pretrain", "token", {"model": "vit_base_patch16_xp_224"}),
    "gap model": ("pretrain", None, {"model": "vit_medium_patch16_reg4_gap_256"}),
    "fine-tuned": ("finetune", None, {"num_classes": 3, "global_pool": "avg"}),
    "fine-tuned, asked for as it is": ("finetune", "avg", {"num_classes": 3, "global_pool": "avg"}),
    "fine-tuned class token": ("finetune", None, {"num_classes": 3, "global_pool": "token", "register_tokens": 1}),
    "fine-tuned without class token": (
        "finetune",
        None,
        {"num_classes": 5, "global_pool": "avg", "class_token": False},
    ),
    "fine-tuned gap model": ("finetune", None, {"model": "test_vit4", "num_classes": 3, "global_pool": "avg"}),
}
STRANGER = """
import sys, timm, torch
for line in sys.stdin.read().splitlines():
    model = timm.create_model(f"local-dir:{line}/export", pretrained=True).eval()
    with torch.no_grad():
        images = torch.load(f"{line}/images.pt")
        torch.save((model.forward_features(images), model(images)), f"{line}/outputs.pt")
assert not [name for name in sys.modules if name.startswith("maedistill")]
"""


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """All exports; a process that has only timm and torch has written what they give for the case's images."""
    cases = {}
    for name, (stage, global_pool, shape) in CASES.items():
        vit, folder = random_vit(**shape), tmp_path_factory.mktemp("run")
        out = export(imitate(folder, vit, stage), global_pool=global_pool)
        assert out == folder / "export"
        cases[name] = Case(stage, vit, global_pool, folder)
        torch.save(cases[name].images(), folder / "images.pt")
    folders = "\n".join(str(case.folder) for case in cases.values())
    away = tmp_path_factory.mktemp("away")
    subprocess.run([sys.executable, "-c", STRANGER], input=folders, cwd=away, text=True, check=True)
    return cases


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return imitate(tmp_path / "run", random_vit())


@pytest.fixture
def tool(run_command) -> Callable[..., SimpleNamespace]:
    """`maedistill export` in this process."""
    return partial(run_command, "export")


@pytest.mark.parametrize("name", CASES)
def test_timm_alone_gives_the_outputs_of_the_run_to_the_last_bit(cases, name):
    case = cases[name]
    tokens, output = torch.load(case.folder / "outputs.pt")
    expected_tokens, expected = case.expected()
    assert torch.equal(tokens, expected_tokens) and torch.equal(output, expected)
    assert output.std() > 0.01
    assert set(load_file(case.folder / "export/model.safetensors")) == set(case.vit.state_dict())


@pytest.mark.parametrize("name", ["other shape", "fine-tuned"])
def test_timm_prepares_images_as_the_run_did(cases, name):
    case = cases[name]
    size = case.vit.patch_embed.img_size[0]
    model = timm.create_model(f"local-dir:{case.folder}/export", pretrained=True)
    assert resolve_model_data_config(model) == {
        "input_size": (3, size, size), "interpolation": "bicubic", "crop_pct": CROP, "crop_mode": "center",
        "mean": MEAN, "std": STD,
    }  # fmt: skip
    known = model.pretrained_cfg
    assert known["license"] == "cc-by-nc-4.0"
    assert not known.keys() & {"tag", "description", "paper_ids", "origin_url"}  # of timm's own weights
    assert known.get("label_names") == (["ant", "bee", "cat"] if case.vit.num_classes == 3 else None)


def test_the_moving_average_is_exported_where_asked_for(run):
    plain, averaged = (load_file(export(run, weights=weights) / "model.safetensors") for weights in ("model", "ema"))
    assert plain.keys() == averaged.keys() and all(torch.equal(plain[name], -averaged[name]) for name in plain)
    assert read_record(run / "export")["weights"] == "ema"
    assert "the moving average of the weights" in (run / "export/README.md").read_text()


def test_the_tool_says_where_it_went_how_exact_it_is_and_how_to_load_it(run, tool, tmp_path):
    ended = tool(run, "--out", tmp_path / "out", "--global-pool", "token")
    assert ended.code == 0 and ended.err == ""
    assert f"exported step_000000007 of run to {tmp_path}/out (model, token pooling)" in ended.out
    assert "max difference 0.0 over 1,152 values" in ended.out  # 2 images x (17 tokens + 1 output) x 32
    assert "license  cc-by-nc-4.0" in ended.out
    of_timm = {"config.json", "model.safetensors", "README.md", "export.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == of_timm
    scope: dict[str, Any] = {}
    exec("\n".join(ended.out.splitlines()[-2:]), scope)
    assert scope["model"].global_pool == "token" and not (run / "export").exists()


def old_metadata(run: Path) -> None:
    (run / "run.json").write_text('{"license": "mit"}')


@pytest.mark.parametrize(
    ("spoil", "code", "cause"),
    [
        (lambda run: run.rename(run.parent / "elsewhere"), 3, "there is no such folder"),
        (old_metadata, 3, "its run.json does not say its stage, network, input"),
        (lambda run: (run / "export").mkdir() or (run / "export/config.json").touch(), 2, "(config.json)"),
        (lambda run: (run / "export.tmp").touch(), 3, "cannot be written"),
    ],
)
def test_a_mistake_costs_one_line_of_cause_one_of_remedy_and_leaves_nothing(run, tool, spoil, code, cause):
    """More of them are in tests/faults/bad_inputs.py."""
    spoil(run)
    before = sorted(path for path in run.parent.rglob("*"))
    ended = tool(run)
    error, fix = ended.err.splitlines()
    assert ended.code == code and cause in error and error.startswith("error: ") and fix.startswith("  fix: ")
    assert sorted(path for path in run.parent.rglob("*")) == before


def test_pooling_that_a_network_cannot_have_is_refused(tool, tmp_path):
    bare = imitate(tmp_path / "bare", random_vit(class_token=False))
    tuned = imitate(tmp_path / "tuned", random_vit(num_classes=3, global_pool="avg"), "finetune")
    for run, cause in ((bare, "no class token"), (tuned, "was fine-tuned with avg pooling")):
        ended = tool(run, "--global-pool", "token")
        assert ended.code == 2 and cause in ended.err and not (run / "export").exists()


def wrong_weights(vit: VisionTransformer, folder: str, **keywords: Any) -> None:
    save_for_hf(vit, folder, **keywords)
    path = Path(folder) / "model.safetensors"
    weights = load_file(path)
    weights["blocks.1.mlp.fc2.bias"] += 1e-6
    save_file(weights, path)


def wrong_norm(vit: VisionTransformer, folder: str, **keywords: Any) -> None:
    save_for_hf(vit, folder, **keywords)
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text())
    config["model_args"]["global_pool"] = "token"
    path.write_text(json.dumps(config))


def interrupted(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


save_for_hf = module.save_for_hf


@pytest.mark.parametrize("failing", [wrong_weights, wrong_norm, interrupted])
@pytest.mark.parametrize("replacing", [False, True])
def test_what_is_wrong_or_interrupted_never_gets_the_name(run, tool, monkeypatch, failing, replacing):
    if replacing:
        export(run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    monkeypatch.setattr(module, "save_for_hf", failing)
    ended = tool(run)
    assert ended.code == (130 if failing is interrupted else 3)
    assert failing is interrupted or "does not reproduce the outputs" in ended.err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert (run / "export").exists() == replacing


def test_an_earlier_export_and_what_a_kill_left_are_replaced(run):
    export(run)
    (run / "export.tmp").mkdir()
    (run / "export.tmp/config.json").touch()
    (run / "export.old.tmp").mkdir()
    export(run, global_pool="token")
    assert read_record(run / "export")["global_pool"] == "token"
    assert {path.name for path in run.iterdir() if path.name.startswith("export")} == {"export"}


def test_an_export_that_a_kill_left_without_its_name_is_not_lost(run, tool, monkeypatch):
    export(run, global_pool="token")
    (run / "export").rename(run / "export.old.tmp")  # killed between the two renames
    monkeypatch.setattr(module, "save_for_hf", wrong_weights)
    assert tool(run).code == 3
    assert read_record(run / "export")["global_pool"] == "token" and not (run / "export.old.tmp").exists()


def test_a_checkpoint_is_exported_under_any_name_but_not_into_itself(run, tool, tmp_path, monkeypatch):
    checkpoint = run / "checkpoints/step_000000007"
    shutil.copy(run / "run.json", checkpoint)  # as a real one has it
    for name in ("manifest.json", "COMPLETE"):
        (checkpoint / name).unlink()
    write_manifest(checkpoint)
    for out in ([], ["--out", checkpoint / "mine"]):
        assert tool(checkpoint, *out).code == 2
    best = tmp_path / "best"
    shutil.copytree(checkpoint, best)
    monkeypatch.chdir(best)
    for given, out in ((checkpoint, "a"), (best, "b"), (".", "c")):
        assert tool(given, "--out", tmp_path / out).code == 0
        assert read_record(tmp_path / out)["checkpoint"] == ("best" if given != checkpoint else checkpoint.name)
        assert "after step 7" in (tmp_path / out / "README.md").read_text()


@pytest.mark.parametrize(("method", "weights"), [("mae", "model"), ("amd", "ema")])
def test_a_real_run_goes_out_as_its_checkpoint_has_it(trio, method, weights, tmp_path):
    run = trio[method].run
    out = export(run, tmp_path / "out", weights=weights)
    model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    vit = build_vit("vit_tiny_patch16_224", image_size=32, pos_embed="sincos2d", **TINY).eval()
    checkpoint = newest_intact(run / "checkpoints")
    load_encoder(vit, ConvertedStateDict(read_weights(checkpoint, weights)), name="the checkpoint")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model.forward_features(images), vit.forward_features(images))
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    assert transform.transforms[-1].mean.tolist() == [0.5] * 3 and transform.transforms[-1].std.tolist() == [0.25] * 3
    again = open_network(f"local-dir:{out}", "encoder", grid=4)  # as a teacher, or to fine-tune from
    assert again.license == "yours: no other weights were used" and again.mean == (0.5, 0.5, 0.5)
    text = (out / "README.md").read_text()
    assert f"{trio[method].metrics()[-1]['loss']:.4f}" in text and "96 images" in text
    assert f"pretrain PATH run=PATH method={method}" in text and str(run.parent) not in text
