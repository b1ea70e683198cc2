"""Wrong inputs to tools/pretrain.py that only a process shows; tests/faults/bad_inputs.py has all others."""

import json
import os
import shutil

import pytest
import torch
from PIL import Image

from maedistill.config.loader import load_config
from maedistill.config.pretrain import PretrainConfig
from maedistill.data.shards.open_index import open_index
from maedistill.errors import ConfigError
from maedistill.pretraining.setup import open_pretraining
from maedistill.runs.folder import RunFolder
from maedistill.runs.lock import FolderLock
from tests.conftest import two_at_a_time
from tests.data.pictures import encode
from tests.data.tar_files import write_tar

FIVE = {"WORLD_SIZE": "5"}
# Arguments, environment, exit code, and what the lines of cause and remedy name. {made} is the folder of `made` below.
CASES = {
    "batch for 5 ranks": ([], FIVE, 2, "12 samples cannot be shared evenly by 5 ranks", "4 or 6"),
    "batch for 5 ranks, dry": (["--dry-run"], FIVE, 2, "12 samples cannot be shared evenly by 5 ranks", "4 or 6"),
    "a tenth bad": (
        ["data.train={made}/tenth.tar", "data.val=null", "data.max_bad_fraction=1e-4"],
        {}, 3, "max_bad_fraction", "bad_samples.txt",
    ),
    "learning rate far too high": (["optim.lr=1e18"], {}, 4, "not finite, 6 in a row", "optim.base_lr"),
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Shards of 20 images, of which a tenth or all are none, and a folder of images."""
    folder = tmp_path_factory.mktemp("made")
    picture = encode(Image.new("RGB", (32, 32)), "PNG")
    (folder / "photos").mkdir()
    (folder / "photos" / "a.png").write_bytes(picture)
    for name, bad in (("tenth", 2), ("labelled", 20)):
        members = {}
        for i in range(20):
            members |= {f"{i:03d}.png": b"no image" if i < bad else picture}
            members |= {f"{i:03d}.cls": b"0"} if name == "labelled" else {}
        open_index(str(write_tar(folder / f"{name}.tar", members)))  # a scan would show its progress on stderr
    return folder


@pytest.fixture(scope="module")
def endings(pretraining, made):
    """How each case ends, two at a time."""

    def start(name):
        arguments, variables, *_ = CASES[name]
        filled = [argument.format(made=made) for argument in arguments]
        ended = pretraining(f"wrong {name}", "method=mae", *filled, code=None, **variables)
        return ended.code, ended.err

    return two_at_a_time(start, CASES)


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_costs_two_lines_and_an_exit_code(endings, case):
    _, _, code, cause, remedy = CASES[case]
    returned, err = endings[case]
    *earlier, error, fix = err.splitlines()
    assert returned == code and all(line.endswith("its loss or gradient is not finite") for line in earlier), err
    assert error.startswith("error: ") and fix.startswith("  fix: ")
    assert cause in error and remedy in fix


def test_a_run_that_is_refused_leaves_no_folder(pretraining, endings):
    left = {case for case in endings if (pretraining.folder / f"wrong {case}").exists()}
    assert left == {"a tenth bad", "learning rate far too high"}, "these had begun"


@pytest.mark.parametrize(
    ("folder", "cause", "remedy"),
    [
        ("", "no shards train-*.tar, but labelled, tenth", "/labelled-*.tar"),
        ("/photos", "a folder of images", "shards "),
    ],
)
def test_a_folder_without_training_shards_is_refused_with_what_is_in_it(pretraining, made, folder, cause, remedy):
    settings = ["method=mae", f"data.train={made}{folder}", "run=nowhere"]
    config = load_config(pretraining.config, settings, root=PretrainConfig).config
    with pytest.raises(ConfigError) as refused:
        open_pretraining(config, world_size=1, device=torch.device("cpu"))
    assert cause in refused.value.cause and remedy in refused.value.remedy


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
