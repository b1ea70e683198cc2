"""Wrong inputs to tools/pretrain.py, in real processes: two lines on stderr, the right exit code, never a traceback."""

import io
import json
import os
import shutil
import tarfile
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image

from maedistill.config.loader import load_config
from maedistill.config.pretrain import PretrainConfig
from maedistill.data.shards.open_index import open_index
from maedistill.models.vits import build_vit
from maedistill.runs.folder import RunFolder
from maedistill.runs.lock import FolderLock

TAPS = ["method=dmae", "align.student=[1]", "align.teacher=[1]"]
FILE = [*TAPS, "teacher.model=vit_tiny_patch16_224", "teacher.width=32", "teacher.depth=2", "teacher.num_heads=2"]
FIVE = {"WORLD_SIZE": "5"}
# Arguments, environment, exit code, and what the lines of cause and remedy name. {made} is the folder of `made` below.
SETTINGS = {
    "no key of that name": (["optim.epoch=3"], {}, 2, "optim.epoch", "optim.epochs"),
    "wrong type": (["optim.epochs=many"], {}, 2, "optim.epochs=many", "optim.epochs"),
    "tap past the student": (
        ["method=dmae", "teacher.source=random:vit_tiny_patch16_224", "align.student=[2]", "align.teacher=[3]"],
        {}, 2, "align.student=[2]: block 2 does not exist, the student has 2", "0 to 1",
    ),
    "batch for 5 ranks": ([], FIVE, 2, "12 samples cannot be shared evenly by 5 ranks", "4 or 6"),
    "batch for 5 ranks, dry": (["--dry-run"], FIVE, 2, "12 samples cannot be shared evenly by 5 ranks", "4 or 6"),
    "half a launcher": ([], {"RANK": "0"}, 2, "WORLD_SIZE", "torchrun"),
    "no such config": (["nothing.yaml"], {}, 2, "nothing.yaml", ""),
}  # fmt: skip
INPUTS = {
    "relative positions": (["student.model=vit_relpos_small_patch16_224"], {}, 2, "vit_relpos_", "vit_small_patch16"),
    "no such file": (
        [*FILE, "teacher.source=file:{made}/none.pth", f"teacher.sha256={'0' * 64}"], {}, 3, "none.pth", "path",
    ),
    "no such run": ([*TAPS, "teacher.source=run:{made}/none"], {}, 3, "holds no run", "run folder"),
    "tap past the teacher": (
        ["method=dmae", "align.student=[1]", "align.teacher=[5]", "teacher.source=local-dir:{made}/saved"],
        {}, 2, "align.teacher: block 5 does not exist, the teacher has 2", "0 to 1",
    ),
    "a folder of several sets": (["data.train={made}"], {}, 2, "no shards train-*.tar, but bad, bare", "/bare-*.tar"),
    "a folder of images": (["data.train={made}/photos"], {}, 2, "a folder of images", "maedistill shards "),
    "all images bad": (["data.train={made}/bad.tar", "data.val=null", "data.workers=1"], {}, 3, "bad.tar:", "--verify"),
    "a tenth bad": (
        ["data.train={made}/tenth.tar", "data.val=null", "data.max_bad_fraction=1e-4"],
        {}, 3, "max_bad_fraction", "bad_samples.txt",
    ),
    "learning rate far too high": (["optim.lr=1e18"], {}, 4, "not finite, 6 in a row", "optim.base_lr"),
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of files that are wrong in one way each."""
    folder = tmp_path_factory.mktemp("made")
    vit = build_vit("vit_tiny_patch16_224", image_size=32, width=32, depth=2, num_heads=2, patch_size=8)
    state = vit.state_dict()
    torch.save(state, (folder / "saved").mkdir() or folder / "saved" / "pytorch_model.bin")
    arguments = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8, "img_size": 32}
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 0, "model_args": arguments, "pretrained_cfg": {}}
    (folder / "saved" / "config.json").write_text(json.dumps(config))
    picture = io.BytesIO()
    Image.new("RGB", (32, 32)).save(picture, "PNG")
    (folder / "photos").mkdir()
    (folder / "photos" / "a.png").write_bytes(picture.getvalue())
    for name, bad in (("bare", 0), ("bad", 20), ("tenth", 2), ("labelled", 20)):
        with tarfile.open(folder / f"{name}.tar", "w") as tar:
            for i in range(20):
                members = {"png": b"no image" if i < bad else picture.getvalue()}
                for end, data in (members | ({"cls": b"0"} if name == "labelled" else {})).items():
                    info = tarfile.TarInfo(f"{i:03d}.{end}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        open_index(str(folder / f"{name}.tar"))  # a scan would show its progress on stderr
    return folder


@pytest.fixture(scope="module")
def endings(pretraining, made, shards):
    """How each case ends, two at a time."""

    def start(item):
        name, (arguments, variables, *_) = item
        method = [] if "method=dmae" in arguments else ["method=mae"]
        filled = [argument.format(made=made, shards=shards) for argument in arguments]
        ended = pretraining(f"wrong {name}", *method, *filled, code=None, **variables)
        return ended.code, ended.err

    cases = SETTINGS | INPUTS
    with ThreadPoolExecutor(2) as two:
        return dict(zip(cases, two.map(start, cases.items()), strict=True))


@pytest.mark.parametrize("case", SETTINGS | INPUTS)
def test_a_mistake_costs_two_lines_and_an_exit_code(endings, case):
    _, _, code, cause, remedy = (SETTINGS | INPUTS)[case]
    returned, err = endings[case]
    *earlier, error, fix = err.splitlines()
    assert returned == code and all(line.endswith("its loss or gradient is not finite") for line in earlier), err
    assert error.startswith("error: ") and fix.startswith("  fix: ")
    assert cause in error and remedy in fix


def test_a_run_that_is_refused_leaves_no_folder(pretraining, endings):
    left = {case for case in endings if (pretraining.folder / f"wrong {case}").exists()}
    assert left == {"all images bad", "a tenth bad", "learning rate far too high"}, "these had begun"


def test_a_probe_that_fails_costs_no_training(pretraining, made, shards):
    """The checkpoint is written before it, and the same command then probes what it had trained."""
    once = ["method=mae", "optim.epochs=1", "log.knn_every_epochs=1"]
    failed = pretraining("mended probe", *once, f"data.val={made}/labelled.tar", code=3)
    assert "labelled.tar:" in failed.err and failed.last_checkpoint().name == "step_000000008"
    again = pretraining("mended probe", *once, f"data.val={shards}/val-*.tar")
    assert "continues at step 8 of 8" in again.out and len(again.metrics()) == 8
    assert [record["step"] for record in again.records() if "knn" in record] == [8]


def test_an_end_is_recorded_with_what_could_not_be_read(pretraining, endings):
    run = pretraining.folder / "wrong a tenth bad"
    end = json.loads((run / "exit.json").read_text())
    assert end["exit_code"] == 3 and "max_bad_fraction" in end["reason"]
    assert f"error: {end['reason']}" in endings["a tenth bad"][1]
    lines = (run / "bad_samples.txt").read_text().splitlines()
    assert 1 <= len(lines) <= 4 and all(line.split("tenth.tar:")[1][:5] in ("000: ", "001: ") for line in lines)


def test_a_start_that_failed_binds_nobody(pretraining, endings):
    """A run that ended before its first checkpoint may be started again with other settings."""
    folder = RunFolder(pretraining.folder / "wrong a tenth bad")
    corrected = load_config(folder.config, ["optim.lr=1e-4"], root=PretrainConfig).config
    folder.open(corrected, folder.metadata(), execution={}, fresh=False, extend=False)
    assert folder.load_config().optim.lr == 1e-4


def test_a_folder_in_use_is_refused_and_its_records_stay(pretraining, settings, mae):
    run = shutil.copytree(mae.run, pretraining.folder / "in use")  # others read the run itself
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    lock = FolderLock(run)
    try:
        ended = pretraining(str(run), *settings["mae"], "optim.epochs=5", code=2)
    finally:
        lock.release()
    assert f"{run} is in use by process {os.getpid()} on " in ended.err
    assert {path: path.read_bytes() for path in run.iterdir() if path.is_file() and path.name != "lock"} == {
        path: content for path, content in before.items() if path.name != "lock"
    }
