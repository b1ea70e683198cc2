"""Codistillation: runs that train at the same time learn from weights that they publish for each other.

    before step 100     weights -> RUN/published/step_000000100     the peers' weights of step 100 -> frozen copies
    steps 100 to 149    the copies predict on this run's own images (Anil et al., ICLR 2018)

A period of `every_steps` steps begins with an exchange, so the step alone says which weights of its peers it sees.
Weights stay for as long as the oldest checkpoint of any peer may need them, so a peer that was killed finds the weights
that it saw. A run that goes back itself removes what it published of later steps, and publishes it again. A peer that
was left out stays so, which RUN/codistillation.json records before the step.

Runs begin when each has met the other (meeting.py): when each has noted this start of it, or an earlier one where a
checkpoint says that it is the same run. What a peer's files say of an earlier start is no reason to refuse it.

K peers   B batch   C classes   s image side
"""

import hashlib
import json
import os
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from maedistill.config.distill import CodistillationConfig
from maedistill.config.keys import result_values
from maedistill.config.plan import Plan
from maedistill.config.schema import Triple
from maedistill.errors import ConfigError, PeerError, UserError
from maedistill.escaping import say
from maedistill.finetuning import meeting
from maedistill.finetuning.meeting import State, describe_peer, entry_of, folder_of, last_saved, read_state, start_state
from maedistill.finetuning.outputs import Outputs, RequestedOutputs, is_plain_vit
from maedistill.finetuning.teacher import OutputTeacher
from maedistill.processes import distributed
from maedistill.runs.checkpoint import checkpoint_steps
from maedistill.runs.history import size_text
from maedistill.runs.published import publish, read_published, remove_published
from maedistill.runs.run import Run
from maedistill.training.compilation import compile_module
from maedistill.weights.class_names import shared_classes
from maedistill.weights.license import combined_license
from maedistill.weights.network import Network
from maedistill.weights.open_network import unloaded_run
from maedistill.weights.state_dict import weights_fingerprint

_POLL_SECONDS, _FIRST_SECONDS, _SAY_SECONDS = 0.2, 5.0, 60.0  # between looks; until the wait is said; said again
_KEY, _LEAVE_OUT = "distill.codistillation", "distill.codistillation.missing=leave_out"


@dataclass(eq=False, kw_only=True)
class Codistillation:
    """The peers of a run, their frozen copies and the steps of the exchanges. All methods are collective.

    kept_steps: how far the run's checkpoints go back. classes: names of the student's, empty if unknown. mean, std: of
    its images. dtype: of the copies, which are compiled if `compiles` is set before they exist.
    """

    section: CodistillationConfig
    seed: int
    plan: Plan
    kept_steps: float
    classes: tuple[str, ...]
    num_classes: int
    mean: Triple
    std: Triple
    dtype: torch.dtype
    device: torch.device
    compiles: bool = False

    def __post_init__(self) -> None:
        """Tabulate the periods."""
        self._counts = [self.section.weight_at(self.plan.epoch_at(step)) > 0 for step in range(self.plan.steps)]
        steps = [step for step, counts in enumerate(self._counts) if counts]
        self._periods = sorted({self._period_of(step) for step in steps})
        if not steps:
            raise ConfigError(f"{_KEY}.start_epoch: no step is left to learn from peers", "begin earlier")
        self._copies: dict[str, OutputTeacher] = {}  # by folder as the config names it, without those left out
        self._state = State("", "", "", met={}, left_out={}, licenses={})
        self._now: int | None = None  # the period whose weights the copies have

    def entry(self, license_text: str) -> dict[str, Any]:
        """Return what run.json says to the peers. license_text: of this run's own sources."""
        peers = [os.path.realpath(os.path.expanduser(peer)) for peer in self.section.peers]
        steps = {"every": self.section.every_steps, "first": self._periods[0], "last": self._periods[-1]}
        return {"peers": peers, **steps, "seed": self.seed, "license": license_text}

    def summary_lines(self, vit: nn.Module) -> list[str]:
        """Describe peers, periods and the disk that they need. vit: the network whose weights are published."""
        every, first, last = self.section.every_steps, self._periods[0], self._periods[-1]
        size = sum(value.nbytes for value in vit.state_dict().values())
        most = min(len(self._periods), int(self.kept_steps // every) + 2)
        steps = f"every {every} steps from {first} to {last}; about {most} x {size_text(size)} of published weights"
        lines = [f"peers    {', '.join(self.section.peers)}, {steps}"]
        if first == last and (counted := sum(self._counts)) > 1:
            cause = f"{every} leaves one exchange: the peers' weights of step {first} teach in all {counted:,} steps"
            lines.append(f"warning  {_KEY}.every_steps: {cause}; use a smaller one, e.g. {max(1, counted // 10)}")
        absent = [peer for peer in self.section.peers if describe_peer(folder_of(peer)) == meeting.NO_FOLDER]
        wait = f"it is waited for, up to {self.section.wait_seconds} s: check the path"
        return lines + [f"warning  {peer}: {meeting.NO_FOLDER} yet, {wait}" for peer in absent]

    def rehearse(self, vit: nn.Module, *, size: int, run: Path) -> list[str]:
        """Build copies for a dry run; return a line for each peer that `vit` stands for, or that does not fit as it is.

        size: of the run's images; run: its folder.
        """
        lines = []
        for peer in self.section.peers:
            try:
                network = unloaded_run(folder_of(peer))
            except UserError as error:
                self._build(peer, Network(deepcopy(vit), peer, size, "", num_classes=self.num_classes))
                lines.append(f"note     {peer} counts as a copy of the student: {error.cause}")
                continue
            try:
                self._build(peer, network)
                if problem := meeting.why_no_pair(peer, run) or meeting.why_incompatible(peer, self.entry("")):
                    lines.append(f"warning  {problem.cause}: {problem.remedy}, or start that run over")
            except ConfigError as error:
                lines.append(f"warning  {error.cause}: {error.remedy}")
        return lines

    def meet(self, run: Run) -> None:
        """Wait until each peer has met this run, check that the runs fit, and build a copy of its network.

        Raises ConfigError for a peer of other classes, steps, the same seed, or that does not name this run; PeerError
        if one does not come.
        """
        self._state = distributed.on_main(lambda: start_state(run.folder.path, run.step, _settings(run)))
        own = distributed.on_main(lambda: run.folder.metadata()["codistillation"]["license"])
        for peer in self.section.peers if run.step < self.plan.steps else ():
            if self._is_left_out(peer, self._period_of(run.step)):
                if distributed.is_main():
                    say(f"{peer} stays left out, from step {self._state.left_out[peer]} on")
            elif self._wait(run, peer, partial(self._has_met, run, peer), "it has not met this run"):
                distributed.main_first(partial(self._open, peer))
        distributed.on_main(lambda: self._state.write(run.folder.path))
        licenses = [own, *self._state.licenses.values()]
        distributed.on_main(lambda: run.folder.amend(license=combined_license(licenses), left_out=self._state.left_out))

    def exchange(self, run: Run) -> None:
        """At the start of a period, publish weights and wait for those of the peers; after a restart, read them again.

        Raises PeerError if a peer's do not come, with a checkpoint written; Preempted if a signal ends the wait.
        """
        period = self._period_of(run.step)
        if run.step == period:
            distributed.on_main(partial(self._note, run))  # a peer may be waiting that was started again
        if period == self._now or period not in self._periods:
            return
        if run.step == period:
            weights: dict[str, Tensor] = {}
            vit: Any = run.module.vit
            for name, value in vit.state_dict().items():
                distributed.copy_to_main(weights, name, value)
            distributed.on_main(lambda: publish(run.folder.path, period, weights))
        for peer in list(self._copies):
            if self._is_left_out(peer, period) or not self._take(run, peer, period):
                del self._copies[peer]
        self._now = period
        distributed.on_main(lambda: self._prune(run.folder.path))

    def outputs(self, images: Tensor, step: int) -> Outputs:
        """Return the peers' logits on images [B, 3, s, s] as `peers`, [K, B, C]; nothing while the term rests."""
        if not self._counts[step] or not self._copies:
            return {}
        return {"peers": torch.stack([copy(images)["logits"].float() for copy in self._copies.values()])}

    # Peers

    def _take(self, run: Run, peer: str, period: int) -> bool:
        """Wait for a peer's weights of a period and copy them. Return whether they came."""
        copy = self._copies[peer].network.state_dict()
        shapes = {name: tuple(value.shape) for name, value in copy.items()}
        weights: dict[str, Tensor] = {}

        def are_there() -> bool:
            weights.update(read_published(folder_of(peer), period, shapes) or {})
            self._look_at(run, peer, is_there=bool(weights))
            return bool(weights)

        if not self._wait(run, peer, are_there, f"its weights of step {period} are not there"):
            return False
        for name, value in copy.items():
            value.copy_(distributed.broadcast_tensor(weights.get(name), shapes[name]))
        return True

    def _open(self, peer: str) -> None:
        """Check a peer, build its copy and note its license, unless that is done."""
        if peer in self._copies:
            return
        if problem := meeting.why_incompatible(peer, self.entry("")):
            raise problem
        self._build(peer, unloaded_run(folder_of(peer)))
        self._state.licenses[peer] = entry_of(peer)["license"]

    def _build(self, peer: str, network: Network) -> None:
        try:
            classes = shared_classes(network, self.classes, num_classes=self.num_classes)
        except ConfigError as error:
            cause = error.cause.removeprefix("distill.teachers: ")
            raise ConfigError(f"{_KEY}.peers: {cause}", "let runs on the same classes learn from each other") from None
        copy = OutputTeacher(
            network,
            requested=RequestedOutputs(logits=True),
            student_mean=self.mean,
            student_std=self.std,
            student_grid=1,
            classes=classes,
            dtype=self.dtype,
        ).to(self.device)
        if self.compiles and is_plain_vit(copy.network):
            compile_module(copy)
        self._copies[peer] = copy

    def _note(self, run: Run) -> dict[str, State | None]:
        """Note the peers' marks, all of them, as each may be waiting for another; return their states. Rank 0 only."""
        others = {peer: read_state(folder_of(peer)) for peer in self.section.peers}
        for peer, other in others.items():
            met = self._state.met.get(peer, [])
            is_new = not met or (run.step == 0 and peer not in self._copies)  # this run has not learned from it
            if other is not None and met != other.mark and (is_new or met[0] == other.id):
                self._state.met[peer] = other.mark
                self._state.write(run.folder.path)
        return others

    def _look_at(self, run: Run, peer: str, *, is_there: bool = True) -> State | None:
        """Note the peers; return the state of one. is_there: whether its weights are. Rank 0 only.

        Raises PeerError if nothing more will come of it: it was started over, or has left this run out for good.
        """
        theirs = self._note(run)[peer]
        if theirs is None:
            return None
        remedy = f"start all these runs over (--fresh), or continue without it: {_LEAVE_OUT}"
        if theirs.id != self._state.met[peer][0]:
            raise PeerError(f"{peer} was started over, or with other settings, after this run had met it", remedy)
        since = theirs.left_out_since(run.folder.path, self._state.id)
        is_over = since is not None and (not is_there or self._period_of(run.step) >= since)
        if is_over and last_saved(folder_of(peer)):  # before its first checkpoint it may be started anew, with this run
            raise PeerError(f"{peer} has left this run out permanently, from step {since} on", remedy)
        return theirs

    def _has_met(self, run: Run, peer: str) -> bool:
        """Return whether a peer has met this run and fits; its copy is then there. Rank 0 only."""
        theirs = self._look_at(run, peer)
        if theirs is None:
            return False
        if problem := meeting.why_no_pair(peer, run.folder.path):
            if (folder_of(peer) / "exit.json").exists():
                return False  # its next start may name this run
            raise problem
        is_heard, ids = self._state.mark in theirs.met.values(), [mark[0] for mark in theirs.met.values()]
        if is_heard or (last_saved(folder_of(peer)) and self._state.id in ids):
            try:
                self._open(peer)
            except ConfigError:
                if is_heard:
                    raise  # otherwise its next start may fit
        return peer in self._copies

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

        with run.watch.paused():
            try:
                while (news := distributed.on_main(look)) == "wait":
                    time.sleep(_POLL_SECONDS)
                    run.preempted = run.stop.agreed()
                    if run.preempted is not None:
                        run.save()
                        run.raise_if_preempted()
                if news == "there":
                    return True
                state = distributed.on_main(lambda: describe_peer(folder_of(peer)))
                first = "check the path, or start it" if state == meeting.NO_FOLDER else "start it again"
                raise PeerError(
                    f"{peer}: {missing} after {self.section.wait_seconds} s ({state})",
                    f"{first} and then this run, or continue without it: {_LEAVE_OUT}",
                )
            except PeerError as error:
                if self.section.missing == "stop":
                    if run.step:
                        run.save()
                    raise
                cause = error.cause
        self._state.left_out[peer] = self._period_of(run.step)
        distributed.on_main(lambda: self._state.write(run.folder.path))
        distributed.on_main(lambda: run.folder.amend(left_out=self._state.left_out))
        if distributed.is_main():
            say(f"{cause}; from step {run.step} on without it")
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


def _settings(run: Run) -> str:
    """Return a digest of what decides the weights that a run publishes before its first checkpoint."""
    metadata, vit = run.folder.metadata(), cast(nn.Module, run.module.vit)
    values = [result_values(run.config), *(metadata[name] for name in ("input", "data", "teacher_weights"))]
    values.append("" if run.step else weights_fingerprint(vit))
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()
