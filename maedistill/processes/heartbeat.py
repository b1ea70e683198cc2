"""Heartbeats: every rank publishes its status in a store, and a rank that is stuck finds the ranks to blame.

    main thread: beat(step) -> Heartbeat, once a round -> store <- the Heartbeats of the others
    no beat for 15 s -> find ranks that are certainly gone (diagnosis.py) -> two lines, exit 5
    no beat for too long, or a collective failed -> read all Heartbeats twice -> diagnose -> two lines, exit 5

gloo reports a lost rank at once. NCCL does not: the host waits for a device that waits for the lost rank. The
check after 15 s covers this case. A long step (the first one may compile) costs only these checks.

Each rank runs two small threads. One talks to the store that the process group was opened with (torchrun's, else rank
0's) and blocks when the store does. The other never blocks: if the main thread has not moved for the time allowed, it
dumps all stacks, names the ranks that are silent or behind, and ends the process. The main thread cannot do so while it
is stuck in a collective. Clocks of different machines are never compared.
"""

import faulthandler
import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import timedelta

import torch.distributed as dist

from maedistill.errors import Preempted, UserError, device_error, print_error
from maedistill.processes import distributed
from maedistill.processes.diagnosis import (
    Diagnosis,
    Heartbeat,
    diagnose,
    diagnose_store,
    failure_of,
    find_lost,
    peer_error,
    peer_errors,
    pid_space,
    thread_position,
)

_DIAGNOSIS_SECONDS = 5.0  # five rounds or more: a busy machine may not run a thread of a living rank for seconds
_SPARE_ROUNDS = 5  # to notice an error of another rank, and to end before the time-out of a collective
_STUCK_SECONDS = 15.0  # without a beat, until this rank checks whether another one is gone
_RECORD_SECONDS = 10.0  # limit for `on_loss`, because its disk may be what hangs


class RankWatch:
    """Watches this rank and the others during its `with` block. Collective.

    A failure of torch.distributed in the block becomes a PeerError that names the lost ranks; on entry, one that names
    none. A failure of this rank's GPU becomes the error of `device_error`. Any other error is sent to the other ranks,
    which end with its exit code.
    The watch starts with the first `beat`. After that, `timeout_seconds` without a beat (pauses excluded) end the
    process with exit code 5 and all stacks on stderr. A rank that is certainly gone does the same within about 20 s,
    and a machine that is lost within about 75 s.

    on_loss: records why the run ended when no exception reports it. It is called on rank 0 before this class ends the
    process, or on the lowest remaining rank if rank 0 is lost.
    before_leaving: waits for what must not be cut off when this class ends the process.
    """

    def __init__(self, *, timeout_seconds: float, on_loss: Callable[[UserError], None]) -> None:
        self._timeout, self._on_loss = timeout_seconds, on_loss
        self.before_leaving: Callable[[], None] = lambda: None
        self._round = min(max(timeout_seconds / 40, 0.1), 1.0)  # seconds between Heartbeats
        self._spare_seconds = _SPARE_ROUNDS * self._round
        self._patience = timeout_seconds - self._spare_seconds  # without a beat
        if distributed.world_size() > 1:
            self._patience -= _DIAGNOSIS_SECONDS
        self._main = threading.get_ident()
        self._own_beat = Heartbeat(distributed.rank(), platform.node(), os.getpid(), pid_space=pid_space())
        self._step = self._moves = 0
        self._last_move, self._watched = time.monotonic(), False
        self._snapshot_requested, self._ended = threading.Event(), threading.Event()
        self._snapshots: list[list[Heartbeat]] = []  # of all ranks, one per round since `_snapshot_requested` was set
        self._diagnosing = threading.Lock()  # both threads may diagnose, each from snapshots of its own
        self._stuck = threading.Event()  # this rank does not move, so the exchanger keeps `_latest` current
        self._latest: list[Heartbeat] = []
        self._heard_from: dict[int, tuple[int, float]] = {}  # rounds of each rank, and when they last increased
        self._own_failure: Diagnosis | None = None  # why this rank fails, to send to the others
        self._remote_failure: Diagnosis | None = None  # why the first other rank failed
        self._store: dist.Store | None = None
        self._exchanger = threading.Thread(target=self._exchange, name="ranks-talk", daemon=True)

    def __enter__(self) -> "RankWatch":
        if distributed.world_size() > 1:
            with peer_errors():  # no Heartbeats yet: nobody knows which rank is lost
                self._connect()
            self._exchanger.start()
        threading.Thread(target=self._watch, name="ranks-watch", daemon=True).start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._watched = False
        lost, broken = None, device_error(error) if error is not None else None
        if error is not None and (translated := peer_error(error)) is not None:
            self._own_failure = lost = self._diagnose(translated.cause)
        elif error is not None and not isinstance(error, Preempted):
            self._own_failure = failure_of(self._own_beat, broken or error)
        self._ended.set()
        if self._store is not None:
            self._exchanger.join(self._spare_seconds)
            self._linger()
        if lost is not None:
            if not distributed.is_main():  # on rank 0, the code that catches the error records it
                self._record(lost)
            raise lost.error from error
        if broken is not None:
            raise broken from error

    def beat(self, step: int) -> None:
        """Report progress with `step` steps done: call it at the end of each step and where ranks may drift apart."""
        self._step, self._moves, self._last_move, self._watched = step, self._moves + 1, time.monotonic(), True

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude a block, such as saving or evaluating, from the watch. The process group's timeout still applies."""
        watched, self._watched = self._watched, False
        yield
        self._last_move, self._watched = time.monotonic(), watched

    def _connect(self) -> None:
        """Open a connection of its own to the process group's store, with a prefix unique to this start. Collective."""
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=60))
        self._store = dist.PrefixStore(f"peers/{distributed.broadcast_object(uuid.uuid4().hex)}", store)
        self._publish()
        distributed.barrier()  # from here on every rank has a Heartbeat

    def _exchange(self) -> None:
        """Exchange Heartbeats and failures with the store until it stops answering. Runs in a thread."""
        assert self._store is not None
        keys, ended = [f"beat/{rank}" for rank in range(distributed.world_size())], False
        try:
            while not ended:
                ended = self._ended.wait(self._round)
                self._publish(left=ended and self._own_failure is None)
                requested = self._snapshot_requested.is_set()
                if requested or self._stuck.is_set():
                    beats = self._latest = [Heartbeat(**json.loads(text)) for text in self._store.multi_get(keys)]
                    now = time.monotonic()
                    for beat in beats:
                        if self._heard_from.get(beat.rank, (-1, now))[0] != beat.rounds:
                            self._heard_from[beat.rank] = (beat.rounds, now)
                    if requested:
                        self._snapshots.append(beats)
                if self._store.check(["failed"]):
                    self._remote_failure = Diagnosis.from_text(self._store.get("failed"))
                elif self._own_failure is not None:
                    self._store.set("failed", self._own_failure.to_text())
        except (dist.DistError, ValueError, TypeError):  # the store is gone, or holds what no rank of ours has said
            return  # `_diagnose` then has no snapshots and blames the store

    def _publish(self, *, left: bool = False) -> None:
        place, waits = thread_position(self._main)
        beat = self._own_beat
        self._own_beat = replace(
            beat, rounds=beat.rounds + 1, moves=self._moves, step=self._step, place=place, waits=waits, left=left
        )
        if self._store is not None:
            self._store.set(f"beat/{self._own_beat.rank}", json.dumps(asdict(self._own_beat)))

    def _watch(self) -> None:
        """End the process when the main thread is stuck. Runs in a thread."""
        while not self._ended.wait(self._round):
            if self._remote_failure is not None:
                time.sleep(self._spare_seconds)  # gives the main thread time to notice and end normally
                self._leave(self._remote_failure)
            moved = self._last_move
            self._check_for_lost(moved)
            if self._watched and time.monotonic() - moved > self._patience:
                diagnosis = self._diagnose(f"no step for {self._timeout:g} s")
                if self._last_move == moved and self._watched:
                    self._leave(diagnosis)

    def _check_for_lost(self, moved: float) -> None:
        """End the process if the main thread does not move and another rank is certainly gone."""
        if self._store is None or not self._moves:
            return
        if time.monotonic() - moved < _STUCK_SECONDS:
            self._stuck.clear()
            self._latest, self._heard_from = [], {}
            return
        self._stuck.set()
        lost = None
        if not self._exchanger.is_alive():
            lost = diagnose_store()
        elif self._latest:
            beats, now = self._latest, time.monotonic()
            silent = {beat.rank: now - self._heard_from.get(beat.rank, (0, now))[1] for beat in beats}
            # A rank that does not see its own Heartbeats is cut off from the store, so it cannot tell who else is gone.
            if silent[self._own_beat.rank] < self._spare_seconds:
                lost = find_lost(beats, silent, pid_space=self._own_beat.pid_space)
        if lost is not None and self._last_move == moved:
            self._leave(lost)

    def _diagnose(self, why: str) -> Diagnosis:
        """Find the ranks to blame when this rank cannot continue for the reason `why`. Takes 5 s."""
        if self._store is None:
            before = self._own_beat
            self._publish()
            return diagnose([before], [self._own_beat], why=why)
        with self._diagnosing:
            self._snapshots = []
            self._snapshot_requested.set()
            end = time.monotonic() + _DIAGNOSIS_SECONDS
            while self._remote_failure is None and time.monotonic() < end:
                time.sleep(self._round)
            if self._remote_failure is not None:  # known before: no round is lost, since `_leave` waits for only one
                return self._remote_failure
            self._snapshot_requested.clear()
            if len(self._snapshots) < 2:
                return diagnose_store()
            return diagnose(self._snapshots[0], self._snapshots[-1], why=why)

    def _leave(self, diagnosis: Diagnosis) -> None:
        """End the process, unless the main thread does."""
        self.before_leaving()
        if self._ended.wait(self._round):  # the main thread may have waited for the same
            return
        self._own_failure = diagnosis
        faulthandler.dump_traceback(2)  # stderr, all threads
        print_error(diagnosis.error)
        self._record(diagnosis)
        self._linger()
        os._exit(diagnosis.error.exit_code)

    def _record(self, diagnosis: Diagnosis) -> None:
        """Call `on_loss` with a time limit if this is the lowest rank that is not lost."""
        if self._own_beat.rank == min(set(range(distributed.world_size())) - set(diagnosis.lost), default=0):
            record = threading.Thread(target=self._on_loss, args=(diagnosis.error,), daemon=True)
            record.start()
            record.join(_RECORD_SECONDS)

    def _linger(self) -> None:
        """Keep rank 0 alive until all ranks can have read why it ends, because its process may host the store."""
        if self._own_failure is not None and self._store is not None and distributed.is_main():
            time.sleep(2 * self._round)
