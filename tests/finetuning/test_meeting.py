"""Runs that meet: whichever is started first, whatever an earlier start left in a folder, and whoever does not come."""

import json
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch

from maedistill.config.auto import with_values
from maedistill.config.distill import CodistillationConfig
from maedistill.config.finetune import FinetuneConfig
from maedistill.config.loader import load_config
from maedistill.config.plan import BatchPlan, Plan
from maedistill.durable import write_durably
from maedistill.errors import ConfigError, PeerError
from maedistill.finetuning.codistillation import Codistillation
from maedistill.finetuning.meeting import read_state
from maedistill.runs.published import remove_published
from maedistill.weights.from_run import describe_network

CONFIG = load_config("finetune/vit_small", ["data.train=a", "data.val=b", "run=c"], root=FinetuneConfig).config
SHAPE = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 3}
HALF = (0.5, 0.5, 0.5)
LONG = 20  # seconds that a run waits where it should be told at once


class Side:
    """A run without its training: its folder, its weights, and what `Codistillation` asks of a run."""

    def __init__(self, path: Path, *peers: Path) -> None:
        path.mkdir()
        self.path, self.peers, self.saved = path, peers, []

    def start(
        self, *, seed: int, step: int = 0, steps: int = 12, epochs: float = 1.5, wait: int = 30, missing="stop"
    ) -> "Side":
        """Begin as a start does: run.json is written, exit.json removed, and no peer met yet."""
        names = tuple(map(str, self.peers))
        section = CodistillationConfig(weight=1.0, every_steps=3, peers=names, wait_seconds=wait, missing=missing)
        plan = Plan(BatchPlan(12, 1), 1, 96, steps, 1)
        cpu = torch.device("cpu")
        given = {"kept_steps": 8.0, "classes": (), "num_classes": 3, "mean": HALF, "std": HALF}
        given |= {"dtype": torch.float32, "device": cpu}
        self.codistillation = Codistillation(section=section, seed=seed, plan=plan, **given)
        torch.manual_seed(seed)
        vit = timm.create_model("vit_tiny_patch16_224", **SHAPE)
        metadata = {
            "stage": "finetune",
            "network": describe_network(vit),
            "input": {"size": 32, "mean": HALF, "std": HALF, "crop": 1.0},
            "license": "mit",
            "data": {"images": 96, "fingerprint": "f"},
            "teacher_weights": [],
            "codistillation": self.codistillation.entry("mit"),
        }
        write_durably(self.path / "run.json", json.dumps(metadata).encode())
        (self.path / "exit.json").unlink(missing_ok=True)
        folder = SimpleNamespace(path=self.path, metadata=lambda: metadata, amend=lambda **entries: None)
        self.run = SimpleNamespace(
            step=step,
            config=with_values(CONFIG, {"seed": seed, "optim.epochs": epochs}),
            module=SimpleNamespace(vit=vit),
            folder=folder,
            watch=SimpleNamespace(paused=nullcontext),
            stop=SimpleNamespace(agreed=lambda: None),
            save=lambda: self.saved.append(self.run.step),
        )
        return self

    def meet(self) -> "Side":
        self.codistillation.meet(self.run)
        return self

    def exchange(self, step: int) -> "Side":
        self.run.step = step
        self.codistillation.exchange(self.run)
        return self

    def save(self, step: int) -> None:
        (self.path / "checkpoints" / f"step_{step:09d}").mkdir(parents=True)

    def end(self) -> None:
        (self.path / "exit.json").write_text(json.dumps({"exit_code": 0, "reason": "finished"}))

    def weights_of(self, peer: "Side") -> torch.Tensor:
        return self.codistillation._copies[str(peer.path)].network.head.weight


@pytest.fixture
def pool():
    with ThreadPoolExecutor(3) as pool:
        yield pool


@pytest.fixture
def pair(tmp_path) -> tuple[Side, Side]:
    a, b = tmp_path / "a", tmp_path / "b"
    return Side(a, b), Side(b, a)


def begin(pool, *sides: Side) -> None:
    """Runs meet, publish the weights of step 0 and read each other's."""
    list(pool.map(lambda side: side.meet().exchange(0), sides))


def waits(future: Future) -> bool:
    """Whether it is still not done after some looks."""
    with pytest.raises(NotYet):
        future.result(timeout=0.8)
    return True


@pytest.mark.parametrize("seeds", [(2, 3), (0, 3)], ids=["both are changed", "the later one is changed"])
def test_the_weights_of_an_earlier_start_are_not_believed(pool, pair, seeds):
    """Both are killed before a checkpoint and start again, one first, with other settings."""
    a, b = pair
    begin(pool, a.start(seed=0), b.start(seed=1))
    first = pool.submit(lambda: a.start(seed=seeds[0]).meet().exchange(0))
    assert waits(first)
    b.start(seed=seeds[1]).meet().exchange(0)
    first.result()
    for one, other in ((a, b), (b, a)):
        assert torch.equal(one.weights_of(other), other.run.module.vit.head.weight)


def test_the_same_settings_make_the_same_run_of_it(pool, pair):
    """A run that is killed before its first checkpoint meets a peer that has gone on, and sees what it saw."""
    a, b = pair
    begin(pool, a.start(seed=0), b.start(seed=1))
    identity, seen = read_state(a.path).id, a.weights_of(b).clone()
    later = pool.submit(b.exchange, 3)
    assert waits(later)
    a.start(seed=0).meet().exchange(0)
    assert read_state(a.path).id == identity and torch.equal(a.weights_of(b), seen)
    a.exchange(3)
    later.result()


def test_a_restart_is_noted_where_no_weights_are_exchanged(pool, pair):
    """During the burn-in a peer looks at the start of each period."""
    a, b = pair
    list(pool.map(Side.meet, (a.start(seed=0), b.start(seed=1))))
    b.codistillation._periods = []
    again = pool.submit(lambda: a.start(seed=0).meet())
    assert waits(again)
    b.exchange(3)
    again.result()


def test_a_finished_pair_is_made_longer_in_either_order(pool, pair):
    a, b = pair
    begin(pool, a.start(seed=0), b.start(seed=1))
    for side, seed in ((a, 0), (b, 1)):
        side.save(12)
        side.start(seed=seed, step=12).meet()  # again, at its end: it meets nobody
        side.end()
    first = pool.submit(lambda: a.start(seed=0, step=12, steps=18, epochs=2.25).meet())
    assert waits(first)
    b.start(seed=1, step=12, steps=18, epochs=2.25).meet()
    first.result()


def test_two_that_run_and_do_not_fit_both_end(pool, pair):
    ends = [pool.submit(side.meet) for side in (pair[0].start(seed=0), pair[1].start(seed=1, steps=18))]
    for end in ends:
        with pytest.raises(ConfigError, match="every 3 steps"):
            end.result()


def test_who_names_another_run_is_refused_unless_it_has_ended(pool, pair, tmp_path):
    a, b = pair
    begin(pool, a.start(seed=0), b.start(seed=1))
    b.peers = (tmp_path / "c",)
    b.start(seed=1)
    with pytest.raises(ConfigError, match="does not name this run"):
        a.start(seed=0).meet()
    b.end()
    first = pool.submit(lambda: a.start(seed=0).meet())
    assert waits(first)
    b.peers = (a.path,)
    b.start(seed=1).meet()
    first.result()


def test_a_run_says_at_once_which_peer_is_not_there_and_how_to_go_on(pair):
    a, b = pair
    lines = a.start(seed=0, wait=1).codistillation.summary_lines(a.run.module.vit)
    assert len(lines) == 1  # the peer's folder is there
    b.path.rmdir()
    lines = a.codistillation.summary_lines(a.run.module.vit)
    assert lines[1:] == [f"warning  {b.path}: there is no such folder yet, it is waited for, up to 1 s: check the path"]
    with pytest.raises(PeerError) as late:
        a.meet()
    assert late.value.remedy.startswith("check the path, or start it and then this run")


def test_one_exchange_for_a_whole_run_is_warned_of(pair):
    few, more = (pair[0].start(seed=0, steps=steps).codistillation for steps in (3, 4))
    vit = pair[0].run.module.vit
    told = "every_steps: 3 leaves one exchange: the peers' weights of step 0 teach in all 3 steps; use a smaller one"
    assert told in few.summary_lines(vit)[1] and len(more.summary_lines(vit)) == 1


def test_a_dry_run_says_what_does_not_fit_yet(pair, tmp_path):
    a, b = pair
    b.start(seed=0)
    rehearse = partial(a.start(seed=0).codistillation.rehearse, a.run.module.vit, size=32)
    assert ["the same seed, 0" in line for line in rehearse(run=a.path)] == [True]
    assert "does not name this run" in rehearse(run=tmp_path / "c")[0]
    b.start(seed=1, steps=9)
    assert "every 3 steps from 0 to 6" in rehearse(run=a.path)[0]
    b.start(seed=1)
    assert rehearse(run=a.path) == []


@pytest.mark.parametrize("met", [True, False])
def test_a_run_that_was_left_out_is_told_at_once(pool, pair, met):
    a, b = pair
    if met:
        begin(pool, a.start(seed=0), b.start(seed=1))
    else:
        a.start(seed=0, wait=1, missing="leave_out").meet().exchange(0)
    state = read_state(a.path)
    state.left_out = {str(b.path): 6 if met else 0}
    state.write(a.path)
    a.save(6)
    remove_published(a.path, before=6)
    began, step = time.monotonic(), 3 if met else 0
    with pytest.raises(
        PeerError, match=f"a has left this run out permanently, from step {6 if met else 0}.*\n.*--fresh"
    ):
        b.start(seed=1, step=step, wait=LONG).meet().exchange(step)  # of step 3 nothing is left
    if met:
        assert b.saved == [3]
        with pytest.raises(PeerError, match="left this run out"):
            b.start(seed=1, step=6, wait=LONG).meet()
    b.start(seed=1, step=step, wait=LONG, missing="leave_out").meet().exchange(step)
    assert not b.codistillation._copies and read_state(b.path).left_out == {str(a.path): step}
    assert time.monotonic() - began < LONG / 2


def test_a_new_run_in_the_folder_was_never_left_out(pool, pair):
    """Both are started over (--fresh), the one that was left out first."""
    a, b = pair
    begin(pool, a.start(seed=0), b.start(seed=1))
    state = read_state(a.path)
    state.left_out = {str(b.path): 6}
    state.write(a.path)
    a.save(6)
    (b.path / "codistillation.json").unlink()
    first = pool.submit(lambda: b.start(seed=1).meet())
    assert waits(first)
    shutil.rmtree(a.path / "checkpoints")
    (a.path / "codistillation.json").unlink()
    a.start(seed=0).meet()
    first.result()


def test_a_peer_that_was_started_over_is_another_run(pool, pair):
    a, b = pair
    begin(pool, a.start(seed=0), b.start(seed=1))
    b.save(3)
    shutil.rmtree(a.path / "published")
    (a.path / "codistillation.json").unlink()
    alone = pool.submit(lambda: a.start(seed=0, wait=2).meet())
    began = time.monotonic()
    assert waits(alone)
    b.codistillation.section = b.codistillation.section.model_copy(update={"wait_seconds": LONG})
    with pytest.raises(PeerError, match="a was started over"):
        b.exchange(3)
    with pytest.raises(PeerError, match="a was started over"):
        b.start(seed=1, step=3, wait=LONG).meet()
    assert time.monotonic() - began < LONG / 2 and b.saved == [3, 3]
    with pytest.raises(PeerError, match="it has not met this run after 2 s"):
        alone.result()
