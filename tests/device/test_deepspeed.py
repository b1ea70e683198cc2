"""The loops with the real DeepSpeed at stage 0, on the CPU: nobody reads a value in a step.

    python tests/device/test_deepspeed.py tools/pretrain.py CONFIG run=RUN ...

starts the tool under observation; RUN/reads.json gets [operation, file, function] of each read in a step. Here a read
costs nothing, so it must be looked for; what mixes devices, only the pretend card shows.
"""

import importlib
import json
import os
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

AMD = ["method=amd", "teacher.source=random:vit_tiny_patch16_224", "teacher.width=32", "teacher.depth=2"]
AMD += ["teacher.num_heads=2", "teacher.patch_size=8", "masks.teacher_keep_ratio=0.5", "align.student=[1]"]
AMD += ["align.teacher=[1]", "generate.depth=1", "optim.ema=0.9", "engine.precision=bf16", "engine.micro_batch=6"]
TINY = [
    f"student.{key}" for key in ("model=vit_tiny_patch16_224", "width=32", "depth=2", "num_heads=2", "patch_size=8")
]
SHORT = ["optim.epochs=0.375", "optim.warmup_epochs=0.1", "optim.clip=1", "log.pictures_every_epochs=null"]
SHORT += ["log.knn_every_epochs=null"]
READS = {Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.nonzero, Tensor.__bool__, Tensor.__float__}
READS |= {Tensor.__int__, Tensor.__index__, Tensor.__array__, torch.nonzero, torch.equal, torch.allclose}


def test_no_value_is_read_in_a_step(launcher, pretraining, finetuning, tmp_path):
    both = {pretraining: [*AMD, *SHORT], finetuning: [*TINY, *SHORT[:-2], "log.eval_every_epochs=10"]}
    for tool, settings in both.items():
        run = tmp_path / Path(tool.tool).stem
        launcher.start(run, [__file__, tool.tool, tool.config, f"run={run}", *settings]).finish()
        found = json.loads((run / "reads.json").read_text())
        assert found["steps"] == 6  # 3 of 2 micro-batches
        assert found["reads"] == []
        assert found["between"] > 0, "logging reads, and is seen"


class Calls(TorchFunctionMode):
    """What Python asks of a tensor."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS:
            note(func)
        return func(*args, **kwargs or {})


class Operations(TorchDispatchMode):
    """What kernels are asked for, also by C++."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(tag in func.tags for tag in (torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output)):
            note(func)
        return func(*args, **kwargs or {})


# between: how many reads there were outside of steps
seen: dict[str, Any] = {"in_step": False, "steps": 0, "reads": [], "between": 0}


def note(func: Any) -> None:
    """Remember a read in a step, and who did it."""
    seen["between"] += not seen["in_step"]
    frame = sys._getframe(2)
    while f"{os.sep}torch{os.sep}" in frame.f_code.co_filename:
        frame = frame.f_back
    site = [getattr(func, "__name__", str(func)), frame.f_code.co_filename, frame.f_code.co_name]
    if seen["in_step"] and site not in seen["reads"]:
        seen["reads"].append(site)


def watch(stage: Any) -> None:
    """Put a mark where a step begins and ends."""
    from maedistill.runs import run as run_file
    from maedistill.runs.run import Run

    load, end_step = run_file.training_batches, Run.end_step

    def batches(*args: Any, **keywords: Any) -> Iterator[Any]:
        for batch in load(*args, **keywords):
            seen["in_step"], seen["steps"] = True, seen["steps"] + 1
            yield batch
            seen["in_step"] = False

    def end(run: Run) -> None:
        seen["in_step"] = False
        (run.folder.path / "reads.json").write_text(json.dumps(seen))
        end_step(run)

    train = stage.train

    def observed(*args: Any) -> bool:
        with Calls(), Operations():
            return train(*args)

    run_file.training_batches, stage.train, Run.end_step = batches, observed, end


if __name__ == "__main__":
    tool = sys.argv.pop(1)
    stages = {"pretrain": "maedistill.pretraining.loop", "finetune": "maedistill.finetuning.loop"}
    watch(importlib.import_module(stages[Path(tool).stem]))
    runpy.run_path(tool, run_name="__main__")
