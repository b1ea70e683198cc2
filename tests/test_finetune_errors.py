"""Wrong data for fine-tuning, and an evaluation that fails; tests/faults/bad_inputs.py has other wrong inputs."""

import json

import pytest
import torch
from PIL import Image

from maedistill.config.finetune import FinetuneConfig
from maedistill.config.loader import load_config
from maedistill.data.shards.open_index import open_index
from maedistill.data.shards.sources import open_folder
from maedistill.data.shards.write import make_shards
from maedistill.errors import UserError
from maedistill.finetuning.setup import open_finetuning
from tests.data.pictures import encode
from tests.data.tar_files import write_tar

# What is refused when data and weights are opened: settings, exit code, cause, remedy. {made} is the folder below.
OPENING = {
    "no validation shards": ("data.val={made}/none-*.tar", 3, "{made}/none-*.tar", "maedistill shards"),
    "no validation labels": ("data.val={made}/bare.tar", 3, "5 of 5 samples have no label", "labelled shards"),
    "labels without output": (
        "data.val={made}/beyond.tar", 3, "validation labels go up to 4, training shards have 3", "data.num_classes",
    ),
    "a label that is a slip": ("data.train={made}/slip.tar", 3, "labels go up to 99,999, first", "correct the label"),
    "other classes": ("data.val={made}/other/train-*.tar", 3, "other classes (3 and 2)", "one data set"),
    "pairs for 2 ranks": (
        "optim.global_batch=6", 2, "6 samples in groups of 2 cannot be shared evenly by 2 ranks", "4 or 8",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of shards with 5 images that are wrong in one way each."""
    folder, picture = tmp_path_factory.mktemp("made"), encode(Image.new("RGB", (32, 32)), "PNG")
    labels = {"bare": None, "beyond": range(5), "damaged": (0, 1, 2, 0, 1), "slip": (0, 1, 2, 0, 99_999)}
    for name, given in labels.items():
        members = {f"{i:03d}.png": picture[: 60 if (name, i) == ("damaged", 4) else None] for i in range(5)}
        members |= {f"{i:03d}.cls": str(label).encode() for i, label in enumerate(given or ())}
        open_index(str(write_tar(folder / f"{name}.tar", sorted(members.items()))))  # a scan would show its progress
    for name in "xy":
        (folder / "pictures" / "train" / name).mkdir(parents=True)
        (folder / "pictures" / "train" / name / "0.png").write_bytes(picture)
    make_shards(open_folder(folder / "pictures"), folder / "other")
    return folder


@pytest.mark.parametrize("case", OPENING)
def test_what_cannot_be_opened_is_named_before_anything_starts(finetuning, mae, made, case):
    setting, code, cause, remedy = OPENING[case]
    given = [f"init.source=run:{mae.run}", setting.format(made=made), "run=nowhere"]
    config = load_config(finetuning.config, given, root=FinetuneConfig).config
    with pytest.raises(UserError) as raised:
        open_finetuning(config, world_size=2, device=torch.device("cpu"))
    error = raised.value
    assert error.exit_code == code and "\n" not in error.cause + error.remedy
    assert cause.format(made=made) in error.cause and remedy in error.remedy


def test_an_evaluation_that_fails_costs_no_training(finetuning, mae, made):
    """The checkpoint is written before it, and the same command then evaluates what it had trained."""
    arguments = [f"init.source=run:{mae.run}", "optim.epochs=1"]
    failed = finetuning("mended", *arguments, f"data.val={made}/damaged.tar", "data.max_bad_fraction=0", code=3)
    assert failed.last_checkpoint().name == "step_000000008"
    end, (error, fix) = json.loads((failed.run / "exit.json").read_text()), failed.err.splitlines()
    assert error == f"error: {end['reason']}" and "damaged.tar:004" in error and "repair" in fix
    assert end["exit_code"] == 3
    again = finetuning("mended", *arguments)
    assert "continues at step 8 of 8" in again.out and len(again.metrics()) == 8
    assert [record["step"] for record in again.records() if "top1" in record] == [8]
    assert finetuning("mended", *arguments).records() == again.records()  # nothing is evaluated twice
