"""Wrong inputs to tools/finetune.py: two lines on stderr, the right exit code, never a traceback."""

import io
import json
import shutil
import tarfile
from concurrent.futures import ThreadPoolExecutor

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

TWO = {"WORLD_SIZE": "2"}
# Arguments, environment, exit code, and what the lines of cause and remedy name. {made} is the folder of `made` below.
PROCESSES = {
    "no start": (["init.source=null"], {}, 2, "neither weights nor student.model are named", "init.source=run:"),
    "no validation": (["data.val=null"], {}, 2, "no labelled shards to evaluate on are named", "data.val="),
    "odd batch": (["optim.global_batch=9"], {}, 2, "9 images cannot be mixed in pairs", "augment.mixup=0"),
    "odd batches of 2 ranks": (
        ["optim.global_batch=6"], TWO, 2, "6 samples in groups of 2 cannot be shared evenly by 2 ranks", "4 or 8",
    ),
    "average of cut weights": (["engine.zero=3"], {}, 2, "ZeRO 3 partitions", "engine.zero=2"),
    "damaged validation image": (
        ["data.val={made}/damaged.tar", "optim.epochs=1", "data.max_bad_fraction=0"], {}, 3,
        "damaged.tar:004", "repair",
    ),
    "folder of a pre-training run": ([], {}, 2, "holds a run of pre-training, not of fine-tuning", "another run="),
    "folder of another run": (["optim.layer_decay=0.9"], {}, 2, "optim.layer_decay: 0.5 there, 0.9 now", "restore"),
}  # fmt: skip
# What is refused when data and weights are opened: arguments, exit code, cause, remedy.
OPENING = {
    "no such source": (["init.source=run:{made}/none"], 3, "{made}/none holds no run", "run folder"),
    "a recipe of another size": (["student.model=vit_small_patch16_224"], 2, "has width 32", "student.model=null"),
    "a size that patches do not tile": (
        ["data.image_size=36"], 2, "patches of 8 pixels, which do not divide images of 36", "data.image_size=32",
    ),
    "no validation shards": (["data.val={made}/none-*.tar"], 3, "{made}/none-*.tar", "maedistill shards"),
    "no validation labels": (["data.val={made}/bare.tar"], 3, "5 of 5 samples have no label", "labelled shards"),
    "labels without output": (
        ["data.val={made}/beyond.tar"], 3, "validation labels go up to 4, training shards have 3", "data.num_classes",
    ),
    "a label that is a slip": (["data.train={made}/slip.tar"], 3, "labels go up to 99,999, first", "correct the label"),
    "other classes": (["data.val={made}/other/train-*.tar"], 3, "other classes (3 and 2)", "one data set"),
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of shards with 5 images that are wrong in one way each."""
    folder, picture = tmp_path_factory.mktemp("made"), io.BytesIO()
    Image.new("RGB", (32, 32)).save(picture, "PNG")
    for name in ("bare", "beyond", "damaged", "slip"):
        with tarfile.open(folder / f"{name}.tar", "w") as tar:
            for i in range(5):
                label = 99_999 if (name, i) == ("slip", 4) else i if name == "beyond" else i % 3
                pixels = picture.getvalue()[: 60 if name == "damaged" and i == 4 else None]
                members = {"png": pixels} | ({} if name == "bare" else {"cls": str(label).encode()})
                for suffix, data in members.items():
                    info = tarfile.TarInfo(f"{i:03d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        open_index(str(folder / f"{name}.tar"))  # a scan would show its progress on stderr
    for name in "xy":
        (folder / "pictures" / "train" / name).mkdir(parents=True)
        (folder / "pictures" / "train" / name / "0.png").write_bytes(picture.getvalue())
    make_shards(open_folder(folder / "pictures"), folder / "other")
    return folder


@pytest.fixture(scope="module")
def endings(finetuning, mae, tuned, made):
    """How each case ends, two at a time; the last two in folders that hold a run, which they must leave as it is."""
    shutil.copytree(mae.run, finetuning.folder / "wrong folder of a pre-training run")
    shutil.copytree(tuned.run, finetuning.folder / "wrong folder of another run")

    def start(item):
        name, (arguments, variables, *_) = item
        filled = [argument.format(made=made) for argument in arguments]
        source = [] if "init.source=null" in filled else [f"init.source=run:{mae.run}"]
        ended = finetuning(f"wrong {name}", *source, *filled, code=None, **variables)
        return ended.code, ended.err

    with ThreadPoolExecutor(2) as two:
        return dict(zip(PROCESSES, two.map(start, PROCESSES.items()), strict=True))


@pytest.mark.parametrize("case", PROCESSES)
def test_a_mistake_costs_two_lines_and_an_exit_code(endings, case):
    _, _, code, cause, remedy = PROCESSES[case]
    returned, err = endings[case]
    assert (returned, err.count("\n")) == (code, 2), err
    error, fix = err.splitlines()
    assert error.startswith("error: ") and fix.startswith("  fix: ")
    assert cause in error and remedy in fix


@pytest.mark.parametrize("case", OPENING)
def test_what_cannot_be_opened_is_named_before_anything_starts(finetuning, mae, made, case):
    arguments, code, cause, remedy = OPENING[case]
    filled = [argument.format(made=made) for argument in arguments]
    source = [] if filled[0].startswith("init.source") else [f"init.source=run:{mae.run}"]
    config = load_config(finetuning.config, [*source, *filled, "run=nowhere"], root=FinetuneConfig).config
    with pytest.raises(UserError) as raised:
        open_finetuning(config, world_size=1, device=torch.device("cpu"))
    error = raised.value
    assert error.exit_code == code and "\n" not in error.cause + error.remedy
    assert cause.format(made=made) in error.cause and remedy in error.remedy


def test_a_refused_start_leaves_the_run_that_lives_there(finetuning, endings, mae, tuned):
    for name, run in (("a pre-training", mae.run), ("another", tuned.run)):
        copy = finetuning.folder / f"wrong folder of {name} run"
        files = {path.relative_to(run): path.read_bytes() for path in run.rglob("*") if path.is_file()}
        assert files == {path.relative_to(copy): path.read_bytes() for path in copy.rglob("*") if path.is_file()}


def test_an_end_is_recorded(finetuning, endings):
    end = json.loads((finetuning.folder / "wrong damaged validation image" / "exit.json").read_text())
    assert end["exit_code"] == 3 and f"error: {end['reason']}" in endings["damaged validation image"][1]


def test_an_evaluation_that_fails_costs_no_training(finetuning, mae, made):
    """The checkpoint is written before it, and the same command then evaluates what it had trained."""
    arguments = [f"init.source=run:{mae.run}", "optim.epochs=1"]
    failed = finetuning("mended", *arguments, f"data.val={made}/damaged.tar", "data.max_bad_fraction=0", code=3)
    assert failed.last_checkpoint().name == "step_000000008"
    again = finetuning("mended", *arguments)
    assert "continues at step 8 of 8" in again.out and len(again.metrics()) == 8
    assert [record["step"] for record in again.records() if "top1" in record] == [8]
    assert finetuning("mended", *arguments).records() == again.records()  # nothing is evaluated twice
