"""Exports of imitated and real runs: a stranger's timm gives the run's outputs back, and the card tells no more than
the run's files.

An imitated run is a run folder as the tools leave it: run.json, config.yaml, metrics.jsonl and a checkpoint with the
random weights of a network that the test still has.
"""

import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import create_transform, resolve_model_data_config
from timm.models.vision_transformer import VisionTransformer

from maedistill.export import folder as module
from maedistill.export.card import forward_gflop
from maedistill.export.folder import FILES, export, read_record
from maedistill.export.licence import hub_licence
from maedistill.models.encoder import MaskedEncoder, build_vit
from maedistill.models.saved import describe_network
from maedistill.models.source import open_source
from maedistill.models.weights import Imported, load_encoder
from maedistill.training.checkpoint import take_snapshot, write_snapshot
from maedistill.training.restore import newest_intact, read_weights
from maedistill.training.state import MOMENTS, TrainingState

TINY = {"width": 32, "depth": 2, "heads": 2, "patch_size": 8}
MEAN, STD, CROP = [0.5, 0.4, 0.3], [0.25, 0.2, 0.1], 0.9
SETTINGS = {
    "pretrain": """\
method: dmae
student: {model: vit_tiny_patch16_224}
teacher: {source: "timm:vit_large_patch16_224.mae"}
masks: {student_visible: 0.25}
align: {student: [1], teacher: [17]}
optim: {epochs: 100, global_batch: 512, base_lr: 1.0e-4, warmup_epochs: 20}
log: {knn_images: 777}
""",
    "finetune": """\
init: {source: "run:runs/dmae"}
data: {val: val.tar}
augment: {mixup: 0.2, cutmix: 0.0}
optim: {epochs: 30, layer_decay: 0.85}
""",
}
LISTED = "timm:vit_large_patch16_224.mae, 1024 x 24, 303.3 M, 294 keys loaded by timm, licence cc-by-nc-4.0"
TEACHER = "timm:vit_large_patch16_224.mae  1024 x 24, 303.3 M  294 keys loaded by timm  licence cc-by-nc-4.0"
START = {
    "command": "python tools/pretrain.py tiny.yaml run=runs/dmae",
    "host": "secret-host",
    "versions": {"python": "3.11.7", "torch": "2.99.1"},
}
FACTS = {
    "pretrain": {"method": "dmae", "teacher": TEACHER},
    "finetune": {
        "init": "run:runs/dmae  32 x 2, 0.1 M",
        "classes": ["ant", "bee", "cat"],
        "validation": {"images": 1000, "fingerprint": "fedcba9876543210"},
        "origin": {
            "stage": "pretrain", "method": "dmae", "teacher": TEACHER, "licence": "cc-by-nc-4.0",
            "data": {"images": 54321, "fingerprint": "aaaabbbbccccdddd"},
        },
    },
}  # fmt: skip
RECORDS = {
    "pretrain": [
        {"step": 6, "loss": 0.75, "pixels": 0.5, "align/1": 0.25, "epoch": 12.5},
        {"step": 6, "knn": 0.3141, "epoch": 12.5},
        {"step": 8, "loss": 0.1111, "pixels": 0.1111, "epoch": 99.0},  # of weights that no checkpoint holds
    ],
    "finetune": [
        {"step": 4, "epoch": 1.0, "top1": 1, "top5": 2, "images": 1000, "val_loss": 9.0},
        {"step": 7, "epoch": 2.5, "top1": 812, "top5": 990, "images": 1000, "val_loss": 0.6789},
        {"step": 7, "epoch": 2.5, "ema_top1": 823, "ema_top5": 995, "ema_images": 1000, "ema_val_loss": 0.5678},
        {"step": 9, "epoch": 3.0, "top1": 999, "top5": 999, "images": 1000, "val_loss": 0.1},
    ],
}


def random_vit(
    model: str = "vit_tiny_patch16_224", *, size: int = 32, seed: int = 0, **shape: Any
) -> VisionTransformer:
    """A network of which every tensor matters: norms, tokens and positions are random as well."""
    vit = build_vit(model, image_size=size, **TINY | shape).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in vit.state_dict().items():
            value.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.3, generator=generator)
    return vit


def imitate(folder: Path, vit: VisionTransformer, stage: str = "pretrain", **changed: Any) -> Path:
    """A run folder of `stage` that holds `vit`, and as its moving average the same weights times -1."""
    prefix = {"pretrain": "encoder.vit.", "finetune": "vit."}[stage]
    weights = {prefix + name: value.clone() for name, value in vit.state_dict().items()}
    averaged = SimpleNamespace(state_dict=lambda: {name: -value for name, value in weights.items()})
    if stage == "pretrain":  # what is left behind
        weights |= {name: torch.ones(3) for name in ("decoder.norm.weight", "projections.0.bias", "mean")}
    engine = SimpleNamespace(state=lambda: TrainingState(weights, {kind: {} for kind in MOMENTS}, {}))
    snapshot = take_snapshot(step=7, engine=engine, state={}, ema=SimpleNamespace(module=averaged))
    write_snapshot(folder / "checkpoints", snapshot, keep=1)
    facts = {
        "stage": stage,
        "network": describe_network(vit),
        "input": {"size": vit.patch_embed.img_size[0], "mean": MEAN, "std": STD, "crop": CROP},
        "data": {"images": 12345, "fingerprint": "0123456789abcdef"},
        "licence": "cc-by-nc-4.0",
        "starts": [START, START],
    }
    (folder / "run.json").write_text(json.dumps(facts | FACTS[stage] | changed))
    (folder / "config.yaml").write_text(f"run: {folder}\n{SETTINGS[stage]}".replace("data: {", "data: {train: a.tar, "))
    if stage == "pretrain":
        with (folder / "config.yaml").open("a") as file:
            file.write("data: {train: a.tar}\n")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS[stage]))
    return folder


@dataclass
class Case:
    """An export, and the outputs of the network that went in."""

    stage: str
    vit: VisionTransformer
    pooling: str | None
    folder: Path

    def images(self) -> torch.Tensor:
        size = self.vit.patch_embed.img_size[0]
        return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))

    @torch.no_grad()
    def expected(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and output, as training computed them: by our own walk, or by the fine-tuned network."""
        if self.stage == "finetune":
            return self.vit.forward_features(self.images()), self.vit(self.images())
        tokens, _ = MaskedEncoder(self.vit)(self.images())  # [B, P + N, D]
        prefix = self.vit.num_prefix_tokens
        return tokens, tokens[:, 0] if self.pooling == "token" else tokens[:, prefix:].mean(1)


CASES: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "class token": ("pretrain", None, {"positions": "sincos2d"}),
    "class token, pooled by it": ("pretrain", "token", {"positions": "sincos2d"}),
    "no class token": ("pretrain", None, {"positions": "sincos1d", "class_token": False}),
    "registers, learned positions": ("pretrain", "avg", {"register_tokens": 3}),
    "registers, pooled by the class token": ("pretrain", "token", {"register_tokens": 3}),
    "other shape": ("pretrain", None, {"width": 48, "depth": 3, "heads": 4, "patch_size": 4, "size": 24}),
    "LayerScale, attention pooling": ("pretrain", None, {"model": "test_vit3"}),
    "RMSNorm, any size": ("pretrain", None, {"model": "test_vit4"}),
    "qk-norm, parallel blocks": ("pretrain", "token", {"model": "vit_base_patch16_xp_224"}),
    "gap model": ("pretrain", None, {"model": "vit_medium_patch16_reg4_gap_256"}),
    "fine-tuned": ("finetune", None, {"num_classes": 3, "pooling": "avg"}),
    "fine-tuned, asked for as it is": ("finetune", "avg", {"num_classes": 3, "pooling": "avg"}),
    "fine-tuned class token": ("finetune", None, {"num_classes": 3, "pooling": "token", "register_tokens": 1}),
    "fine-tuned without class token": ("finetune", None, {"num_classes": 5, "pooling": "avg", "class_token": False}),
    "fine-tuned gap model": ("finetune", None, {"model": "test_vit4", "num_classes": 3, "pooling": "avg"}),
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
    for name, (stage, pooling, shape) in CASES.items():
        vit, folder = random_vit(**shape), tmp_path_factory.mktemp("run")
        out = export(imitate(folder, vit, stage), pooling=pooling)
        assert out == folder / "export"
        cases[name] = Case(stage, vit, pooling, folder)
        torch.save(cases[name].images(), folder / "images.pt")
    folders = "\n".join(str(case.folder) for case in cases.values())
    away = tmp_path_factory.mktemp("away")
    subprocess.run([sys.executable, "-c", STRANGER], input=folders, cwd=away, text=True, check=True)
    return cases


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return imitate(tmp_path / "run", random_vit())


@pytest.fixture
def tool(root: Path, monkeypatch, capsys) -> Callable[..., SimpleNamespace]:
    """tools/export.py with some arguments, in this process: its exit code and what it printed."""

    def start(*arguments: Any) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(root / "tools/export.py"), run_name="__main__")
        return SimpleNamespace(code=ended.value.code, **capsys.readouterr()._asdict())

    return start


@pytest.mark.parametrize("name", CASES)
def test_timm_alone_gives_the_outputs_of_the_run_to_the_last_bit(cases, name):
    case = cases[name]
    tokens, output = torch.load(case.folder / "outputs.pt")
    wanted_tokens, wanted = case.expected()
    assert torch.equal(tokens, wanted_tokens) and torch.equal(output, wanted)
    assert output.std() > 0.01
    assert set(load_file(case.folder / "export/model.safetensors")) == set(case.vit.state_dict())


@pytest.mark.parametrize("name", ["class token", "other shape", "fine-tuned", "RMSNorm, any size"])
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
    ended = tool(run, "--out", tmp_path / "out", "--pool", "token")
    assert ended.code == 0 and ended.err == ""
    assert f"exported step_000000007 of run to {tmp_path}/out (model, token pooling)" in ended.out
    assert "max difference 0.0 over 1,152 values" in ended.out  # 2 images x (17 tokens + 1 output) x 32
    assert "licence  cc-by-nc-4.0" in ended.out and {path.name for path in (tmp_path / "out").iterdir()} == FILES
    scope: dict[str, Any] = {}
    exec("\n".join(ended.out.splitlines()[-2:]), scope)
    assert scope["model"].global_pool == "token" and not (run / "export").exists()


def truncate(run: Path) -> None:
    weights = run / "checkpoints/step_000000007/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])


def drop_average(run: Path) -> None:
    imitate(run, random_vit())
    engine = SimpleNamespace(
        state=lambda: TrainingState({"encoder.vit.x": torch.ones(1)}, {k: {} for k in MOMENTS}, {})
    )
    write_snapshot(run / "checkpoints", take_snapshot(step=8, engine=engine, state={}), keep=1)


def old_facts(run: Path) -> None:
    (run / "run.json").write_text('{"licence": "mit"}')


@pytest.mark.parametrize(
    ("spoil", "arguments", "code", "cause"),
    [
        (lambda run: (run / "run.json").unlink(), [], 3, "its run.json is not there"),
        (old_facts, [], 3, "its run.json does not say its stage, network, input"),
        (lambda run: (run / "checkpoints").rename(run / "elsewhere"), [], 3, "holds no checkpoint"),
        (truncate, [], 3, "is intact: step_000000007"),
        (drop_average, ["--ema"], 3, "kept no moving average"),
        (lambda run: (run / "export").mkdir() or (run / "export/thesis.tex").touch(), [], 2, "(thesis.tex)"),
        (lambda run: (run / "export").touch(), [], 2, "holds something else"),
        (lambda run: (run / "export").mkdir() or (run / "export/config.json").touch(), [], 2, "(config.json)"),
        (lambda run: (run / "export.tmp").touch(), [], 3, "cannot be written"),
        (lambda run: None, ["--out", "."], 2, "the working directory"),
    ],
)
def test_a_mistake_costs_one_line_of_cause_one_of_remedy_and_leaves_nothing(
    run, tool, monkeypatch, spoil, arguments, code, cause
):
    spoil(run)
    monkeypatch.chdir(run.parent)
    before = sorted(path for path in run.parent.rglob("*"))
    ended = tool(run, *arguments)
    error, fix = ended.err.splitlines()
    assert ended.code == code and cause in error and error.startswith("error: ") and fix.startswith("  fix: ")
    assert sorted(path for path in run.parent.rglob("*")) == before


def test_pooling_that_a_network_cannot_have_is_refused(tool, tmp_path):
    bare = imitate(tmp_path / "bare", random_vit(class_token=False))
    tuned = imitate(tmp_path / "tuned", random_vit(num_classes=3, pooling="avg"), "finetune")
    for run, cause in ((bare, "no class token"), (tuned, "was fine-tuned with avg pooling")):
        ended = tool(run, "--pool", "token")
        assert ended.code == 2 and cause in ended.err and not (run / "export").exists()
    assert tool(tmp_path / "nowhere").code == 3


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
    assert failing is interrupted or "does not give the outputs" in ended.err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert (run / "export").exists() == replacing


def test_an_earlier_export_and_what_a_kill_left_are_replaced(run):
    export(run)
    (run / "export.tmp").mkdir()
    (run / "export.tmp/config.json").touch()
    (run / "export.old.tmp").mkdir()
    export(run, pooling="token")
    assert read_record(run / "export")["pooling"] == "token"
    assert {path.name for path in run.iterdir() if path.name.startswith("export")} == {"export"}


def card(folder: Path) -> tuple[dict[str, Any], str]:
    """The front matter and the rest of a card."""
    _, front, text = (folder / "export/README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


def test_the_card_of_a_student_says_what_its_run_says(cases):
    front, text = card(cases["class token"].folder)
    assert front == {
        "library_name": "timm", "license": "cc-by-nc-4.0", "pipeline_tag": "image-feature-extraction",
        "tags": ["timm", "vision-transformer", "dmae", "knowledge-distillation"],
    }  # fmt: skip
    for part in (
        f"Teacher: {LISTED}.",
        "whose licence applies to them as well: **cc-by-nc-4.0**. It forbids commercial use.",
        "12,345 images (fingerprint 0123456789ab)",
        "Training shards: `a.tar`",
        "the student sees 4 of 16 patches, the teacher the same",
        "counted from 0: 1 with 17 (l1, normalisation l2, weight 1)",
        "100 epochs, 512 images a step",
        "peak learning rate 0.0002 after 20 epochs",
        "step 7.",
        f"Command: `{START['command']}`, started 2 time(s).",
        "python 3.11.7, torch 2.99.1",
        "by epoch 12.5: loss 0.7500, pixels 0.5000, align/1 0.2500",
        "kNN accuracy at epoch 12.5: 31.4%, compared to at most 777 training images. kNN on frozen features is a trend",
        "32 wide, 2 blocks, with a class token, on images of 32 px in patches of 8 px",
        "The output is 32 features, from the mean of the patch tokens",
        "mean (0.5, 0.4, 0.3) and deviation (0.25, 0.2, 0.1)",
        "no classifier",
    ):
        assert part in text, part
    assert "0.1111" not in text and "secret-host" not in text and "None" not in text


def test_the_card_of_a_fine_tuned_network_says_how_good_it_is_and_where_it_comes_from(cases):
    front, text = card(cases["fine-tuned"].folder)
    assert front["pipeline_tag"] == "image-classification" and "dmae" in front["tags"]
    for part in (
        "**Top-1 81.20 % (812 of 1000)**, top-5 99.00 % (990 of 1000), cross-entropy 0.6789 on the 1,000 validation",
        "Start: run:runs/dmae",
        "pre-trained by distilling a masked autoencoder (DMAE",
        "on 54,321 images (fingerprint aaaabbbbcccc)",
        f"Teacher: {LISTED}.",
        "**cc-by-nc-4.0**. It forbids commercial use.",
        "mixup 0.2, cutmix 0",
        "times 0.85 a layer",
        "3 logits",
    ):
        assert part in text, part
    export(cases["fine-tuned"].folder, cases["fine-tuned"].folder / "averaged", weights="ema")
    averaged = (cases["fine-tuned"].folder / "averaged/README.md").read_text()
    assert "**Top-1 82.30 % (823 of 1000)**" in averaged and "81.20" not in averaged


def test_what_the_run_does_not_say_the_card_says_is_missing(tmp_path):
    bare = {"method": None, "teacher": None, "data": None, "starts": [], "licence": "not stated (set teacher.licence)"}
    run = imitate(tmp_path / "run", random_vit(), **bare)
    (run / "config.yaml").unlink()
    (run / "metrics.jsonl").unlink()
    export(run)
    front, text = card(run)
    assert (front["license"], front["license_name"]) == ("other", "not-stated-set-teacher.licence")
    for part in (
        "by a method that is not recorded",
        "Teacher: none.",
        "Licence: **not stated**",
        "Data: not recorded",
        "The settings are missing",
        "Command and software versions are not recorded",
        "No measurement is recorded",
    ):
        assert part in text, part
    tuned = {"init": None, "origin": None, "classes": None, "licence": "yours: no other weights were used"}
    run = imitate(tmp_path / "tuned", random_vit(num_classes=3, pooling="avg"), "finetune", **tuned)
    (run / "metrics.jsonl").unlink()
    export(run)
    _, text = card(run)
    for part in (
        "Start: from scratch, no other weights.",
        "it is the choice of who trained these",
        "No evaluation of these weights is recorded",
        "The names of the classes are not recorded",
    ):
        assert part in text, part
    assert "Teacher" not in text and "label_names" not in (run / "export/config.json").read_text()


@pytest.mark.parametrize("name", ["class token", "fine-tuned"])
def test_the_card_s_own_example_runs(cases, name):
    case = cases[name]
    _, text = card(case.folder)
    code = text.split("```python\n")[1].split("```")[0].replace("THIS_FOLDER", f"{case.folder}/export")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    scope: dict[str, Any] = {"image": Image.fromarray(pixels)}
    exec(code, scope)
    assert scope["output"].shape == (1, case.vit.num_classes or 32)


@pytest.mark.parametrize(
    ("text", "identifier", "name"),
    [
        ("cc-by-nc-4.0", "cc-by-nc-4.0", None),
        ("CC BY-NC 4.0", "cc-by-nc-4.0", None),
        ("code Apache-2.0, weights CC-BY-NC-SA-4.0", "cc-by-nc-sa-4.0", None),
        ("Apache-2.0", "apache-2.0", None),
        ("mit, but ask first", "other", "mit-but-ask-first"),
        ("yours: no other weights were used", "other", "to-be-chosen-by-who-trained-it"),
    ],
)
def test_a_licence_is_never_called_freer_than_it_is(text, identifier, name):
    assert hub_licence(text) == (identifier, name)


def test_flops_are_those_of_the_formula():
    vit = build_vit("vit_small_patch16_224", image_size=224)
    tokens, width = 197, 384
    block = 24 * tokens * width**2 + 4 * tokens**2 * width  # projections and MLP, attention
    assert forward_gflop(vit) == pytest.approx((12 * block + 2 * 196 * 768 * width) / 1e9, rel=1e-9)


@pytest.mark.parametrize(("method", "weights"), [("mae", "model"), ("amd", "ema")])
def test_a_real_run_goes_out_as_its_checkpoint_has_it(trio, method, weights, tmp_path):
    run = trio[method].run
    out = export(run, tmp_path / "out", weights=weights)
    model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    vit = build_vit("vit_tiny_patch16_224", image_size=32, positions="sincos2d", **TINY).eval()
    checkpoint = newest_intact(run / "checkpoints")
    load_encoder(vit, Imported(read_weights(checkpoint, weights)), name="the checkpoint")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model.forward_features(images), MaskedEncoder(vit)(images)[0])
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    assert transform.transforms[-1].mean.tolist() == [0.5] * 3 and transform.transforms[-1].std.tolist() == [0.25] * 3
    again = open_source(f"local-dir:{out}", grid=4)  # as a teacher, or to fine-tune from
    assert again.licence == "yours: no other weights were used" and again.mean == (0.5, 0.5, 0.5)
    text = (out / "README.md").read_text()
    assert f"{trio[method].metrics()[-1]['loss']:.4f}" in text and "tiny.yaml" in text and "96 images" in text
