"""Codistillation: runs that train at the same time learn from weights that they publish for each other.

    before step 100     weights -> RUN/published/step_000000100     the peers' weights of step 100 -> frozen copies
    steps 100 to 149    the copies predict on this run's own images (Anil et al., ICLR 2018)

A period of `every_steps` steps begins with an exchange, so the step alone says which weights of its peers it sees. All
weights stay that the oldest checkpoint of a peer may go back to: a peer that is killed finds again what it saw. A run
that goes back itself removes what it published of later steps, and publishes it again. A peer that was left out stays
so, which RUN/codistillation.json records before the step.

Runs begin when each has met the other (meeting.py).

K peers   B batch   C classes   s image side
"""

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maedistill.config.finetune import FinetuneConfig
from maedistill.config.plan import Plan
from maedistill.config.schema import Triple
from maedistill.errors import ConfigError, PeerError
from maedistill.escaping import say
from maedistill.finetuning.meeting import State, describe_peer, folder_of, named_by, read_state, start_state
from maedistill.finetuning.outputs import Outputs, RequestedOutputs, is_plain_vit
from maedistill.finetuning.teacher import OfflineTeacher
from maedistill.machine import DTYPES, precision
from maedistill.processes import distributed
from maedistill.runs.checkpoint import checkpoint_steps
from maedistill.runs.published import publish, read_published, remove_published
from maedistill.runs.run import Run
from maedistill.training.compilation import compile_module
from maedistill.weights.class_names import shared_classes
from maedistill.weights.license import combined_license
from maedistill.weights.network import unloaded_run

_POLL_SECONDS, _FIRST_SECONDS, _SAY_SECONDS = 0.2, 5.0, 60.0  # between looks; until the wait is said; said again
_KEY = "distill.codistillation"


class Codistillation:
    """The peers of a run, their frozen copies and the steps of the exchanges. All methods are collective."""

    def __init__(
        self,
        config: FinetuneConfig,
        *,
        plan: Plan,
        classes: tuple[str, ...],
        num_classes: int,
        mean: Triple,
        std: Triple,
        device: torch.device,
    ) -> None:
        """Tabulate the periods. classes: names of the student's, empty if unknown. mean, std: of its images."""
        self.section, self.config, self.plan = config.distill.codistillation, config, plan
        self._classes, self._num_classes, self._mean, self._std = classes, num_classes, mean, std
        self._device, self._compiles = device, False
        self._counts = [self.section.weight_at(plan.epoch_at(step)) > 0 for step in range(plan.steps)]
        steps = [step for step, counts in enumerate(self._counts) if counts]
        self._periods = sorted({self._period_of(step) for step in steps})
        if not steps:
            raise ConfigError(f"{_KEY}.start_epoch: no step is left to learn from peers", "begin earlier")
        self._copies: dict[str, OfflineTeacher] = {}  # by folder as the config names it, without those left out
        self._state = State(id="", met={}, left_out={}, licenses={})
        self._now: int | None = None  # the period whose weights the copies have

    def entry(self, license_text: str) -> dict[str, Any]:
        """Return what run.json says to the peers. license_text: of this run's own sources."""
        peers = [os.path.realpath(os.path.expanduser(peer)) for peer in self.section.peers]
        steps = {"every": self.section.every_steps, "first": self._periods[0], "last": self._periods[-1]}
        return {"peers": peers, **steps, "seed": self.config.seed, "license": license_text}

    def summary_lines(self, vit: nn.Module) -> list[str]:
        """Describe peers, periods and the disk that they need. vit: the network whose weights are published."""
        every, saved = self.section.every_steps, self.plan.steps_in(self.config.log.save_every_epochs)
        size = sum(value.nbytes for value in vit.state_dict().values()) / 1e6
        most = min(len(self._periods), int(saved * self.config.log.keep // every) + 2)
        return [
            f"peers    {', '.join(self.section.peers)}, every {every} steps from {self._periods[0]} to "
            f"{self._periods[-1]}; about {most} x {size:,.1f} MB of published weights"
        ]

    def compile(self) -> None:
        """Compile the copies once they exist."""
        self._compiles = True

    def meet(self, run: Run) -> None:
        """Wait until each peer has met this run, check that the runs fit, and build a copy of its network.

        Raises ConfigError for a peer of other classes, steps, the same seed, or that does not name this run; PeerError
        if one does not come.
        """
        self._state = distributed.on_main(lambda: start_state(run.folder.path, run.step))
        own = distributed.on_main(lambda: run.folder.metadata()["codistillation"]["license"])
        for peer in self.section.peers if run.step < self.plan.steps else ():
            if self._is_left_out(peer, self._period_of(run.step)):
                if distributed.is_main():
                    say(f"{peer} stays left out, from step {self._state.left_out[peer]} on")
            elif self._wait(run, peer, partial(self._has_met, run.folder.path, peer), "it has not met this run"):
                self._state.licenses[peer] = distributed.main_first(partial(self._open, peer))
        distributed.on_main(lambda: self._state.write(run.folder.path))
        licenses = [own, *self._state.licenses.values()]
        distributed.on_main(lambda: run.folder.amend(license=combined_license(licenses)))

    def exchange(self, run: Run) -> None:
        """At the start of a period, publish weights and wait for those of the peers; after a restart, read them again.

        Raises PeerError if a peer's do not come, with a checkpoint written; Preempted if a signal ends the wait.
        """
        period = self._period_of(run.step)
        if period == self._now or period not in self._periods:
            return
        if run.step == period:
            weights: dict[str, Tensor] = {}
            vit: Any = run.module.vit
            for name, value in vit.state_dict().items():
                distributed.copy_to_main(weights, name, value)
            distributed.on_main(lambda: publish(run.folder.path, period, weights))
        for peer, copy in list(self._copies.items()):
            weights, missing = {}, f"its weights of step {period} are not there"
            shapes = {name: tuple(value.shape) for name, value in copy.network.state_dict().items()}

            def read(peer: str = peer, shapes: Any = shapes, weights: dict[str, Tensor] = weights) -> bool:
                weights.update(read_published(folder_of(peer), period, shapes) or {})
                return bool(weights)

            if not self._is_left_out(peer, period) and self._wait(run, peer, read, missing):
                for name, value in copy.network.state_dict().items():
                    value.copy_(distributed.broadcast_tensor(weights.get(name), shapes[name]))
            else:
                del self._copies[peer]
        self._now = period
        distributed.on_main(lambda: self._prune(run.folder.path))

    def outputs(self, images: Tensor, step: int) -> Outputs:
        """Return the peers' logits on images [B, 3, s, s] as `peers`, [K, B, C]; nothing while the term rests."""
        if not self._counts[step] or not self._copies:
            return {}
        return {"peers": torch.stack([copy(images)["logits"].float() for copy in self._copies.values()])}

    # Peers

    def _open(self, peer: str) -> str:
        """Check a peer and build its copy; return its license."""
        network, metadata = unloaded_run(str(folder_of(peer)))
        entry, own = metadata["codistillation"], self.entry("")
        if any(entry[name] != own[name] for name in ("every", "first", "last")):
            theirs, mine = (f"every {e['every']} steps from {e['first']} to {e['last']}" for e in (entry, own))
            raise ConfigError(
                f"{_KEY}: {peer} exchanges weights {theirs}, this run {mine}",
                "give both the same every_steps and schedule, and as many steps per epoch",
            )
        if entry["seed"] == own["seed"]:
            raise ConfigError(
                f"{_KEY}: {peer} has the same seed, {own['seed']}: equal students teach each other nothing",
                "give each run a seed of its own",
            )
        classes = shared_classes(network, self._classes, num_classes=self._num_classes)
        copy = OfflineTeacher(
            network,
            requested=RequestedOutputs(logits=True),
            student_mean=self._mean,
            student_std=self._std,
            student_grid=1,
            classes=classes,
            dtype=DTYPES[precision(self.config.distill.precision, self._device)],
        ).to(self._device)
        if self._compiles and is_plain_vit(copy.network):
            compile_module(copy)
        self._copies[peer] = copy
        return entry["license"]

    def _has_met(self, run: Path, peer: str) -> bool:
        """Note a peer's identity; return whether it has noted that of this run. Rank 0 only."""
        for one in self.section.peers:  # all of them: each may be waiting for another
            other = read_state(folder_of(one))
            if other is not None and self._state.met.get(one) != other.id:
                self._state.met[one] = other.id
                self._state.write(run)
        theirs = read_state(folder_of(peer))
        if theirs is None:
            return False
        if os.path.realpath(run) not in (named := named_by(peer)):
            cause = f"{_KEY}.peers: {peer} does not name this run, {run}, but {', '.join(named) or 'none'}"
            raise ConfigError(cause, "let the runs name each other")
        return self._state.id in theirs.met.values()

    def _is_left_out(self, peer: str, step: int) -> bool:
        return peer in self._state.left_out and step >= self._state.left_out[peer]

    def _wait(self, run: Run, peer: str, is_there: Callable[[], bool], missing: str) -> bool:
        """Wait until `is_there`; return whether it is. If not, the peer is left out from now on, or the run ends.

        missing: what is not there, for the log. While it waits, no rank counts as hung, and a signal ends the run.
        """
        began = time.monotonic()
        said = began - _SAY_SECONDS + _FIRST_SECONDS

        def look() -> str:
            nonlocal said
            if is_there():
                return "there"
            now = time.monotonic()
            if now - began > self.section.wait_seconds:
                return "late"
            if now - said > _SAY_SECONDS:
                say(f"waiting for {peer}: {missing} ({describe_peer(folder_of(peer))})")
                said = now
            return "wait"

        with run.peers.paused():
            while (news := distributed.on_main(look)) == "wait":
                time.sleep(_POLL_SECONDS)
                run.preempted = run.stop.agreed()
                if run.preempted is not None:
                    run.save()
                    run.raise_if_preempted()
            if news == "there":
                return True
            if self.section.missing == "stop":
                if run.step:
                    run.save()
                state = distributed.on_main(lambda: describe_peer(folder_of(peer)))
                raise PeerError(
                    f"{peer}: {missing} after {self.section.wait_seconds} s ({state})",
                    f"start it again and then this run, or go on without it: {_KEY}.missing=leave_out",
                )
        self._state.left_out[peer] = self._period_of(run.step)
        distributed.on_main(lambda: self._state.write(run.folder.path))
        if distributed.is_main():
            say(f"{peer} is left out from step {run.step} on: {missing} ({describe_peer(folder_of(peer))})")
        return False

    # Weights

    def _period_of(self, step: int) -> int:
        """Return the first step of the period that a step is in."""
        return step // self.section.every_steps * self.section.every_steps

    def _prune(self, run: Path) -> None:
        """Remove weights that no peer can go back to."""
        oldest = [
            min((step for step, _ in checkpoint_steps(folder_of(peer) / "checkpoints")), default=0)
            for peer in self._copies
        ]
        remove_published(run, before=min(map(self._period_of, oldest), default=self._now or 0))
