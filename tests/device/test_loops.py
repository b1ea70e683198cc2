"""The loops themselves on the pretend card: `train` of both stages, with the real engine, update, average and verdict.

Nothing may wait from a batch's arrival to the end of its step, the moving average and the verdict on the update
included. DeepSpeed is a stand-in here (conftest.py); what it does itself is seen in test_deepspeed.py, on the CPU.
"""

import json
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from maedistill.config.finetune import FinetuneConfig
from maedistill.config.loader import load_config
from maedistill.config.pretrain import PretrainConfig
from maedistill.finetuning import loop as finetune
from maedistill.finetuning.setup import open_finetuning
from maedistill.pretraining import loop as pretrain
from maedistill.pretraining.setup import open_pretraining
from maedistill.runs import run as run_file
from maedistill.runs.folder import RunFolder
from maedistill.runs.metrics import Averages
from maedistill.runs.nonfinite import LateFlags
from maedistill.runs.run import Run
from maedistill.runs.start import start_run
from tests.device.pretend_card import CARD, Card, OnCard

SHORT = ["optim.epochs=0.375", "optim.warmup_epochs=0.1", "log.every_steps=2", "engine.precision=bf16", "optim.clip=1"]
PRETRAIN = ["method=amd", "teacher.source=random:vit_tiny_patch16_224", "teacher.width=32", "teacher.depth=2"]
PRETRAIN += ["teacher.num_heads=2", "teacher.patch_size=8", "masks.teacher_keep_ratio=0.5", "align.student=[1]"]
PRETRAIN += ["align.teacher=[1]", "generate.depth=1", "student.drop_path=0.1", "optim.ema=0.9"]
PRETRAIN += ["engine.micro_batch=6", "log.knn_images=24"]
FINETUNE = ["student.model=vit_tiny_patch16_224", "student.width=32", "student.depth=2", "student.num_heads=2"]
FINETUNE += ["student.patch_size=8"]
# The modules in which the host meets the card outside of steps: batches come, losses and weights and pictures go.
BOTH = {"batch", "distributed", "run", "engine", "full_pass", "pictures", "sheet"}
READERS = {"pretrain": BOTH | {"knn", "loop"}, "finetune": BOTH | {"setup"}}
STAGES = {
    "pretrain": (pretrain, PretrainConfig, open_pretraining, PRETRAIN),
    "finetune": (finetune, FinetuneConfig, open_finetuning, FINETUNE),
}


class Event:
    """An event of the card: what was copied before it is there once it is waited for."""

    card: Card
    made: ClassVar[list["Event"]] = []

    def __init__(self, **_: Any) -> None:
        self.waited = False
        self.made.append(self)

    def record(self) -> None:
        """Stand in the card's queue."""

    def synchronize(self) -> None:
        """Wait: here copies end."""
        self.waited = True
        self.card.catch_up()


@pytest.fixture
def card(monkeypatch) -> Iterator[Card]:
    """The card of this process, which the package takes for a GPU where it asks a tensor."""
    monkeypatch.setattr(OnCard, "is_cuda", True, raising=False)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    with Card() as card:
        Event.card = card
        Event.made.clear()
        yield card


@pytest.fixture
def loop(card, engine_on_card, monkeypatch, pretraining, finetuning, tmp_path):
    """Return a function that runs a stage's loop to its end: metrics.jsonl's records, number of micro-batches."""
    load, end_step = run_file.training_batches, Run.end_step
    steps = []

    def batches(*args: Any, **keywords: Any) -> Iterator[Any]:
        loaded = load(*args, **keywords)
        while True:
            with card.step(strict=False):
                batch = next(loaded)
            steps.append(batch)
            card._in_step = len(steps) > 1  # what is made once, at first need, is listed below
            yield batch

    def end(run: Run) -> None:
        end_step(run)
        card._in_step = False

    def go(name: str) -> tuple[list[dict[str, Any]], int]:
        stage, root, open_parts, settings = STAGES[name]
        tool = {"pretrain": pretraining, "finetune": finetuning}[name]
        given = [f"run={tmp_path / name}", *SHORT, *settings]
        config = load_config(tool.config, given, root=root).config
        monkeypatch.setattr(run_file, "training_batches", batches)
        monkeypatch.setattr(Run, "end_step", end)
        parts, folder = open_parts(config, world_size=1, device=CARD), RunFolder(config.run)
        watch = SimpleNamespace(beat=lambda step: None, paused=nullcontext)
        with start_run(parts, folder, watch, fresh=False, extend=False) as run, run.resume():
            card.waits.clear()
            stage.train(run, parts)
        lines = (folder.path / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines], len(steps)

    return go


@pytest.mark.parametrize("stage", STAGES)
def test_the_loop_waits_for_the_card_only_where_it_logs_and_evaluates(loop, card, stage):
    records, batches = loop(stage)
    assert batches == 6  # 3 steps of 2 micro-batches
    assert [record["step"] for record in records if "loss" in record] == [2, 3]
    assert all(record["loss"] > 0 and record["grad_norm"] > 0 for record in records if "loss" in record)
    assert all(record["nonfinite"] == 0 for record in records if "loss" in record)
    assert {function.partition(".")[0] for function, _ in card.waits} == READERS[stage]


def test_a_verdict_is_read_one_step_late(card):
    """Whoever read it before its copy has ended would read the opposite here."""
    flags, values = LateFlags(), [torch.tensor(value).to(CARD) for value in (False, True, False, True)]
    known = []
    with card.step():
        for step, flag in enumerate(values):
            known.append(flags.push(step, flag) + (flags.read() if step == 3 else []))
            assert [event.waited for event in Event.made] == [True] * step + [step == 3]
    assert known == [[], [(0, False)], [(1, True)], [(2, False), (3, True)]]


def test_an_average_is_kept_on_the_card_until_it_is_read(card):
    averages, losses = Averages(), [torch.tensor(value).to(CARD) for value in (1.0, torch.nan, 4.0)]
    with card.step():
        for loss in losses:
            averages.add({"loss": loss})
    card.waits.clear()
    assert averages.read() == {"loss": 2.5}
    assert card.waits == [("distributed.all_reduce_sum", "_to_copy")]
