"""The Python API: nothing heavy is imported early, docs/python.md runs, objects restart exactly and are checked."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn

import maedistill
from maedistill import api
from maedistill.config.finetune import FinetuneConfig
from maedistill.config.loader import load_config
from maedistill.config.pretrain import PretrainConfig
from maedistill.errors import ConfigError
from maedistill.finetuning.setup import open_finetuning
from maedistill.pretraining.setup import open_pretraining
from maedistill.runs.objects import Objects, python_name, trainable
from tests.conftest import SCRATCH
from tests.data.loading.test_dataset import Squares
from tests.support.launch import ROOT


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import sys, maedistill; print(sorted({'torch', 'timm', 'numpy', 'pydantic', 'deepspeed'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_every_public_name_exists_and_has_a_docstring():
    assert all(getattr(maedistill, name).__doc__ for name in maedistill.__all__)
    assert {*maedistill.__all__} <= {*dir(maedistill)}
    with pytest.raises(AttributeError):
        maedistill.nothing  # noqa: B018


def test_paths_in_lists_are_settings_and_numbers_of_other_kinds_are_not(pretraining):
    """The functions return paths, and teachers are a list."""
    settings = {"distill.teachers": [Path("run:a"), "run:b"], "distill.logits.weight": 1.0, "init.source": "run:c"}
    loaded = load_config("quickstart/finetune", settings, root=FinetuneConfig, to_run=False).config
    assert loaded.distill.teachers == ("run:a", "run:b")
    for wrong in ([np.int64(8)], {"a": [np.int64(8)]}, [["x", b"y"]]):
        with pytest.raises(ConfigError, match=r"^align\.student.* is not a setting"):
            load_config(pretraining.config, {"align.student": wrong}, root=PretrainConfig, to_run=False)


def test_shards_of_other_tools_can_be_evaluated(monkeypatch):
    monkeypatch.setattr(api, "open_context", lambda **_: None)
    monkeypatch.setattr(api, "score", lambda spec, *_, **files: spec)
    spec = maedistill.evaluate("runs/a", "x.tar", image_key="input.jpg", label_key="output.cls")
    assert spec.members == ("input.jpg", "output.cls")


def test_the_page_about_python_runs(tmp_path):
    pytest.importorskip("sklearn", reason="needs scikit-learn: pip install 'maedistill[demo]'")
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/python.md").read_text(), re.M | re.S)
    checks = """
assert scorecard["images"] == 797 and (folder / "config.json").is_file()
assert backbone(torch.zeros(2, 3, 32, 32)).shape == (2, 96)
assert any(row.get("size", 0) > 0 for row in maedistill.read_metrics("runs/small"))
assert mixer(torch.zeros(1, 3, 32, 32))[0].shape == (1, 64, 64)
cosines = [row["cosine/2"] for row in maedistill.read_metrics("runs/cosine") if "loss" in row]
assert cosines and all(0 < abs(cosine) < 1 for cosine in cosines), cosines
import json
from pathlib import Path
from maedistill.runs.history import RESERVED
for run in ("runs/mae", "runs/cosine"):
    names = {name for row in maedistill.read_metrics(run) for name in row}
    assert names - RESERVED == {"loss", "pixels"} | ({"cosine/2"} if "cosine" in run else set()), names
made = json.loads(Path("runs/small/run.json").read_text())
assert (made["method_class"], made["method_arguments"]) == ("__main__.SmallFeaturesMAE", {"weight": "0.02"})
card = (maedistill.export("runs/small") / "README.md").read_text()
assert card.count("`__main__.SmallFeaturesMAE(weight=0.02)`") == 2 and ", size " in card and "MAE, He" not in card
class Steps(SmallFeaturesMAE):
    def forward(self, images, split, target=None):
        return {**super().forward(images, split), "step": torch.zeros(())}
for method, run in ((SmallFeaturesMAE, "runs/small"), (Steps, "runs/steps")):
    try:
        maedistill.pretrain("quickstart/mae", data | short | {"run": run}, method=method)
    except maedistill.ConfigError as error:
        assert {"runs/small": "weight=0.02", "runs/steps": "__main__.Steps"}[run] in error.cause, error
    else:
        raise SystemExit(run)
assert not Path("runs/steps/metrics.jsonl").read_text()
try:
    maedistill.load_backbone("runs/mixer")
except maedistill.DataError as error:
    assert "student=" in error.remedy
"""
    assert len(blocks) == 8
    (tmp_path / "page.py").write_text("\n".join([*blocks, checks]))
    done = subprocess.run([sys.executable, "page.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_wrong_objects_are_refused_before_training(pretraining):
    """Each with one line of cause: no items, wrong targets, another class, a wrong shape, no encoder."""

    class NoItems:
        pass

    class WrongTargets(Squares):
        def __init__(self):
            super().__init__()
            self.targets = [0]

        def __len__(self):
            return 20

    class Flat(maedistill.Encoder):
        width, depth, num_prefix, patch_size, grid = 8, 1, 0, 8, 4

        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(1))

        def forward(self, images, ids=None, *, taps=()):
            return images, {}

    config = load_config(pretraining.config, ["run=runs/a", "method=mae"], root=PretrainConfig).config

    def refused(**objects):
        with pytest.raises(maedistill.UserError) as error:
            open_pretraining(config, world_size=1, device=torch.device("cpu"), objects=Objects(**objects))
        assert error.value.remedy and "\n" not in error.value.cause
        return error.value.cause

    assert "NoItems has no length" in refused(dataset=NoItems())
    assert "20 items" in refused(dataset=WrongTargets())
    assert "Identity, not a MAE" in refused(method=lambda *parts, **more: nn.Identity())
    assert "tokens" in refused(student=Flat())
    assert "a Linear, whose patches" in refused(student=nn.Linear(2, 2))


def test_a_caller_s_student_trains_in_training_mode_and_full_precision():
    student = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval().bfloat16()
    assert trainable(student) is student and student.training and student[0].weight.dtype == torch.float32
    double = trainable(nn.Linear(2, 2).double())
    assert double.weight.dtype == torch.float64
    student[0].bias.requires_grad_(False)
    with pytest.raises(maedistill.ConfigError) as error:
        trainable(student)
    assert "0.bias" in error.value.cause


MUTUAL = 'distill.mutual={weight: 1, students: [""]}'


@pytest.mark.parametrize("setting", ["engine.activation_checkpointing=true", MUTUAL])
def test_a_module_of_the_caller_s_is_not_changed_as_a_vit(finetuning, setting):
    given = ["run=runs/own", "student.model=null", "init.source=python:torch.nn.Flatten", setting]
    config = load_config(finetuning.config, given, root=FinetuneConfig, to_run=False).config
    with pytest.raises(maedistill.ConfigError) as error:
        open_finetuning(config, world_size=1, device=torch.device("cpu"), objects=Objects(nn.Flatten()))
    assert error.value.cause.startswith(setting.partition("=")[0]) and "leave" in error.value.remedy


def test_a_teacher_of_the_caller_s_can_teach_again(pretraining, finetuning):
    """Two starts of a program in bf16: neither finds another teacher than the first, nor changes the caller's."""
    vit = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3}
    teacher, cpu = timm.create_model("vit_tiny_patch16_224", **vit), torch.device("cpu")
    settings = ["run=runs/a", "method=dmae", "align.student=[1]", "align.teacher=[1]", "teacher.precision=bf16"]
    given = {"teacher.source": python_name(teacher)}
    first = load_config(pretraining.config, settings, root=PretrainConfig, given=given).config
    settings = ["run=runs/b", *SCRATCH, "distill.logits.weight=1", "distill.precision=bf16"]
    given = {"distill.teachers": [python_name(teacher)]}
    second = load_config(finetuning.config, settings, root=FinetuneConfig, given=given).config

    def opened():
        pretrains = open_pretraining(first, world_size=1, device=cpu, objects=Objects(teachers=(teacher,)))
        finetunes = open_finetuning(second, world_size=1, device=cpu, objects=Objects(teachers=(teacher,)))
        frozen = [pretrains.teachers[0].teacher.network, finetunes.frozen[0].network]
        assert {parameter.dtype for one in frozen for parameter in one.parameters()} == {torch.bfloat16}
        return pretrains.metadata["teacher_weights"], finetunes.metadata["teacher_weights"]

    assert opened() == opened()
    assert {(p.dtype, p.requires_grad) for p in teacher.parameters()} == {(torch.float32, True)} and teacher.training


def test_an_object_and_an_override_for_one_thing_are_refused(pretraining):
    with pytest.raises(maedistill.ConfigError, match=r"data\.train is set"):
        maedistill.pretrain(pretraining.config, {"data.train": "shards", "run": "runs/a"}, dataset=Squares())
    of_shards = {"data.index": "a", "data.shuffle_window": 1}
    for key, value in ({"student.width": 8, "student.drop_path": 0.1} | of_shards).items():
        with pytest.raises(maedistill.ConfigError, match=rf"{key} is set"):
            given = {key: value, "run": "runs/a"}
            maedistill.pretrain(pretraining.config, given, student=nn.Flatten(), dataset=Squares())


def test_metrics_of_no_run_are_refused(pretraining):
    with pytest.raises(maedistill.DataError):
        maedistill.read_metrics(pretraining.folder / "nowhere")


def test_a_run_of_python_objects_is_refused_from_the_command_line(pretraining):
    ended = pretraining("python", "method=mae", f"data.train={python_name(Squares)}", code=2)
    assert "dataset=" in ended.err


PROGRAM = """
import os, signal, sys
import numpy as np
import maedistill
from tests.data.loading.test_dataset import Squares
from torch import nn

class Student(maedistill.Encoder):
    width, depth, num_prefix, patch_size, grid = 16, 1, 0, 8, 2

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(192, 16)
        self.drop = nn.Dropout(0.5)

    def forward(self, images, ids=None, *, taps=()):
        x = images.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
        x = self.drop(self.embed(x))
        x = x if ids is None else x.gather(1, ids[..., None].expand(-1, -1, 16))
        return x, {tap: x for tap in taps}

class Kill(maedistill.Callback):
    def on_step(self, run):
        if len(sys.argv) > 2 and run.step == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)

settings = {
    "method": "mae", "run": sys.argv[1], "data": {"image_size": 16, "workers": 1, "max_bad_fraction": 1.0},
    "masks.student_keep_ratio": 0.5, "decoder": {"width": 16, "depth": 1, "num_heads": 2},
    "optim": {"epochs": 4, "warmup_epochs": 1, "global_batch": 5}, "log": {"every_steps": 1, "save_every_epochs": 0.5},
}
import torch
torch.manual_seed(0)
maedistill.pretrain(settings, dataset=Squares(), student=Student(), callbacks=[Kill()])
"""


@pytest.mark.faults
def test_a_killed_run_of_objects_repeats_every_bit(tmp_path, launcher):
    (tmp_path / "program.py").write_text(PROGRAM)

    def start(run, *arguments):
        return launcher.start(tmp_path / run, [tmp_path / "program.py", tmp_path / run, *arguments])

    whole, killed = start("whole"), start("killed", "7")
    whole, killed = whole.finish(), killed.finish(-signal.SIGKILL)
    again = start("killed").finish()
    assert "continues at step" in again.out
    last = "checkpoints/step_000000016/model.safetensors"
    assert (whole.run / last).read_bytes() == (again.run / last).read_bytes()
    assert "Squares[7]" in (whole.run / "bad_samples.txt").read_text()


AGAIN = """
import signal, sys
import torch
import maedistill

class Stop(maedistill.Callback):
    def on_step(self, run):
        seen.append((torch.are_deterministic_algorithms_enabled(), signal.getsignal(signal.SIGINT) is theirs))
        if run.step == 2:
            signal.raise_signal(signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background has its children ignore it
seen, theirs = [], signal.getsignal(signal.SIGINT)
torch.set_num_threads(3)
state = 3, torch.backends.cuda.flash_sdp_enabled()
settings = {"run": sys.argv[2], "method": "mae", "optim.epochs": 1, "engine.deterministic": True, "threads": 1}
settings |= {"engine.precision": "bf16"}
try:
    maedistill.pretrain(sys.argv[1], settings, callbacks=[Stop()])
except maedistill.Preempted:
    seen.append("stopped")
assert (torch.get_num_threads(), torch.backends.cuda.flash_sdp_enabled()) == state
assert seen == [(True, False)] * 3 + ["stopped"] and not torch.are_deterministic_algorithms_enabled()
assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == [theirs, signal.SIG_DFL]
try:
    signal.raise_signal(signal.SIGINT)  # to this thread: os.kill may reach another, and Python acts later
    raise SystemExit("nobody stopped")
except KeyboardInterrupt:
    pass
maedistill.pretrain(sys.argv[1], settings)
"""


def test_a_run_that_was_stopped_leaves_a_program_its_signals_and_kernels(pretraining, launcher, tmp_path):
    (tmp_path / "program.py").write_text(AGAIN)
    launcher.start(tmp_path / "run", [tmp_path / "program.py", pretraining.config, tmp_path / "run"]).finish()
    assert (tmp_path / "run/checkpoints/step_000000008/COMPLETE").is_file()
