"""The card of an exported network: it tells what the run's files say, and no more."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from maedistill.exporting.folder import export
from maedistill.weights.open_network import open_network
from tests.exporting.imitation import CROP, LISTED, MEAN, METADATA, START, STD, imitate, random_vit


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pre-trained student's run, exported."""
    run = imitate(tmp_path_factory.mktemp("run"), random_vit())
    export(run)
    return run


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fine-tuned network's run, exported."""
    run = imitate(tmp_path_factory.mktemp("run"), random_vit(num_classes=3, global_pool="avg"), "finetune")
    export(run)
    return run


def card(run: Path) -> tuple[dict[str, Any], str]:
    """The front matter and the rest of a run's card."""
    _, front, text = (run / "export/README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


def test_the_card_of_a_student_says_what_its_run_says(student):
    front, text = card(student)
    assert front == {
        "library_name": "timm", "license": "cc-by-nc-4.0", "pipeline_tag": "image-feature-extraction",
        "tags": ["timm", "vision-transformer", "dmae", "knowledge-distillation"],
    }  # fmt: skip
    for part in (
        f"Teacher: {LISTED}.",
        "whose license applies to them as well: **cc-by-nc-4.0**. It forbids commercial use.",
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


def test_the_card_of_a_fine_tuned_network_says_how_good_it_is_and_where_it_comes_from(classifier):
    front, text = card(classifier)
    assert front["pipeline_tag"] == "image-classification" and "dmae" in front["tags"]
    for part in (
        "**Top-1 81.20 % (812 of 1000)**, top-5 99.00 % (990 of 1000), cross-entropy 0.6789 on the 1,000 validation",
        "Start: run:runs/dmae",
        "pre-trained by distillation of a teacher's features (DMAE",
        "on 54,321 images (fingerprint aaaabbbbcccc)",
        f"Teacher: {LISTED}.",
        "**cc-by-nc-4.0**. It forbids commercial use.",
        "mixup 0.2, cutmix 0",
        "times 0.85 a layer",
        "3 logits",
    ):
        assert part in text, part
    export(classifier, classifier / "averaged", weights="ema")
    averaged = (classifier / "averaged/README.md").read_text()
    assert "**Top-1 82.30 % (823 of 1000)**" in averaged and "81.20" not in averaged


def test_the_card_says_that_targets_are_means_and_weights_rise(tmp_path):
    run = imitate(tmp_path / "run", random_vit())
    settings = (run / "config.yaml").read_text()
    settings = settings.replace("align: {", "align: {last_blocks: 10, warmup_share: 0.25, weight: 2, ")
    (run / "config.yaml").write_text(settings)
    export(run)
    text = " ".join(card(run)[1].split())
    assert "target the mean of 10 blocks up to the named one, weight 2, rising from 0 in the first 25% of" in text


def test_a_method_of_the_caller_s_own_is_named_and_no_loss_is_made_up(tmp_path):
    made = {"method_class": "page.Own", "method_arguments": {"weight": "0.1"}}
    run = imitate(tmp_path / "run", random_vit(), **made)
    record = {"step": 7, "loss": 0.75, "size": 0.5, "lr": 0.1, "images_per_second": 9.0, "epoch": 13.0}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
    export(run)
    front, text = card(run)
    assert front["tags"] == ["timm", "vision-transformer", "knowledge-distillation"]
    assert "Pre-trained by `page.Own(weight=0.1)`" in text and "- Losses: those of `page.Own(weight=0.1)`.\n" in text
    assert "by epoch 13.0: loss 0.7500, size 0.5000.\n" in text
    assert "DMAE" not in text and "norm_patch" not in text and "l1" not in text
    origin = METADATA["finetune"]["origin"] | made
    tuned = imitate(tmp_path / "tuned", random_vit(num_classes=3, global_pool="avg"), "finetune", origin=origin)
    export(tuned)
    front, text = card(tuned)
    assert "dmae" not in front["tags"] and "knowledge-distillation" in front["tags"]
    assert "That start was pre-trained by `page.Own(weight=0.1)`" in text
    assert open_network(f"run:{run}", "encoder").origin["method_class"] == "page.Own"


def test_what_the_run_does_not_say_the_card_says_is_missing(tmp_path):
    bare = {"method": None, "teacher": None, "data": None, "starts": [], "license": "not stated (set teacher.license)"}
    run = imitate(tmp_path / "run", random_vit(), **bare)
    (run / "config.yaml").unlink()
    (run / "metrics.jsonl").unlink()
    export(run)
    front, text = card(run)
    assert (front["license"], front["license_name"]) == ("other", "not-stated-set-teacher.license")
    for part in (
        "by a method that is not recorded",
        "Teacher: none.",
        "License: **not stated**",
        "Data: not recorded",
        "The settings are missing",
        "Command and software versions are not recorded",
        "No measurement is recorded",
    ):
        assert part in text, part
    tuned = {"init": None, "origin": None, "classes": None, "license": "yours: no other weights were used"}
    run = imitate(tmp_path / "tuned", random_vit(num_classes=3, global_pool="avg"), "finetune", **tuned)
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


@pytest.mark.parametrize(("name", "outputs"), [("student", 32), ("classifier", 3)])
def test_the_card_s_own_example_runs(request, name, outputs):
    run = request.getfixturevalue(name)
    _, text = card(run)
    code = text.split("```python\n")[1].split("```")[0].replace("THIS_FOLDER", f"{run}/export")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    scope: dict[str, Any] = {"image": Image.fromarray(pixels)}
    exec(code, scope)
    assert scope["output"].shape == (1, outputs)


def test_photographs_are_turned_upright_where_the_run_turned_them(tmp_path):
    view = {"size": 32, "mean": MEAN, "std": STD, "crop": CROP, "exif": "apply"}
    run = imitate(tmp_path / "run", random_vit(num_classes=3, global_pool="avg"), "finetune", input=view)
    out = export(run, formats=("timm", "torch_export"))
    assert open_network(f"local-dir:{out}", "classifier").exif == "apply"
    code = card(run)[1].split("```python\n")[1].split("```")[0].replace("THIS_FOLDER", str(out))
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6  # the orientation
    Image.fromarray(pixels).save(tmp_path / "photo.png", exif=turned)
    scope: dict[str, Any] = {"image": Image.open(tmp_path / "photo.png")}
    exec(code, scope)
    upright = scope["transform"](Image.fromarray(np.rot90(pixels, -1)))[None]
    assert torch.equal(scope["output"], scope["model"](upright))
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"exif": ["apply"]}))
    assert open_network(f"local-dir:{out}", "classifier").exif == "ignore"
