"""How many samples fit: a GPU of known size, whose trials take a known number of bytes."""

from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch

from maedistill.config.plan import batch_plans
from maedistill.machine import GPU_JOBS_VARIABLE
from maedistill.runs.dry_run import forward_backward
from maedistill.training import memory_fit
from maedistill.training.memory_fit import fit_to_memory

GIB = 2**30
DEVICE = torch.device("cuda", 0)
PLANS = batch_plans(4096, world_size=8)  # 512, 256, 128, ... samples of each rank


class CardOfKnownSize:
    """`fixed` bytes and `each` per sample; from `bends` samples on a trial takes `more` than the straight line.

    A quarter of `fixed` are gradients: the first trial makes them at its end, the later ones begin with them.
    """

    def __init__(self, size: float, *, fixed: float, each: float, bends: int = 10**9, more: float = 0.0) -> None:
        self.size, self.fixed, self.each, self.bends, self.more = size, fixed, each, bends, more
        self.trials: list[int] = []

    def trial(self, count: int) -> None:
        gradients = self.fixed / 4 if self.trials else 0
        self.trials.append(count)
        self.peak = int(self.fixed * 3 / 4 + gradients + self.each * count + (self.more if count >= self.bends else 0))
        if self.peak > self.size:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    def fit(self, monkeypatch: pytest.MonkeyPatch, *, later: float = 0.0) -> int:
        cuda = memory_fit.torch.cuda
        monkeypatch.setattr(cuda, "mem_get_info", lambda device: (self.size - GIB, self.size))
        monkeypatch.setattr(cuda, "memory_reserved", lambda device: GIB)
        monkeypatch.setattr(cuda, "empty_cache", lambda: None)
        monkeypatch.setattr(cuda, "reset_peak_memory_stats", lambda device: None)
        monkeypatch.setattr(cuda, "max_memory_allocated", lambda device: self.peak)
        return fit_to_memory(PLANS, self.trial, device=DEVICE, later_bytes=int(later)).micro_batch


def test_the_largest_share_that_fits_is_taken_after_one_step_of_it(monkeypatch):
    for size, later, expected in ((80, 0, 512), (30, 0, 256), (30, 14, 128), (8, 0, 64)):
        card = CardOfKnownSize(size * GIB, fixed=2 * GIB, each=0.05 * GIB)
        assert card.fit(monkeypatch, later=later * GIB) == expected
        assert card.trials == [8, 8, 16, expected]


def test_a_share_that_takes_more_than_foreseen_gives_way_to_a_smaller_one(monkeypatch):
    above = CardOfKnownSize(40 * GIB, fixed=2 * GIB, each=0.05 * GIB, bends=512, more=30 * GIB)  # does not fit at all
    assert above.fit(monkeypatch) == 256
    # fits, with too little left over
    near = CardOfKnownSize(40 * GIB, fixed=2 * GIB, each=0.05 * GIB, bends=512, more=10 * GIB)
    assert near.fit(monkeypatch) == 256


def test_what_never_fits_is_an_error_of_memory(monkeypatch):
    for fixed, later in ((3, 0), (0.4, 1.7)):  # no trial fits; one sample does, but not beside what comes later
        with pytest.raises(torch.OutOfMemoryError):
            CardOfKnownSize(2 * GIB, fixed=fixed * GIB, each=0.5 * GIB).fit(monkeypatch, later=later * GIB)


def test_where_16_samples_do_not_fit_trials_of_1_and_2_are_measured(monkeypatch):
    card = CardOfKnownSize(4 * GIB, fixed=GIB, each=0.3 * GIB)
    assert card.fit(monkeypatch) == 8  # 3.4 of 3.68 GiB
    assert card.trials == [8, 8, 16, 1, 1, 2, 8]


def test_jobs_that_share_a_card_share_its_memory(monkeypatch):
    for jobs, expected in (("1", 512), ("2", 256), ("4", 128), ("", 512)):
        monkeypatch.setenv(GPU_JOBS_VARIABLE, jobs)
        assert CardOfKnownSize(40 * GIB, fixed=2 * GIB, each=0.05 * GIB).fit(monkeypatch) == expected


def test_all_ranks_take_what_fits_on_each_of_them_or_none(monkeypatch):
    """The other rank, which is asked through a collective, fits a smaller share or nothing."""
    others: list[int] = []
    monkeypatch.setattr(memory_fit.distributed, "gather_objects", lambda number: [number, others[0]])
    others[:] = [2]
    assert CardOfKnownSize(80 * GIB, fixed=2 * GIB, each=0.05 * GIB).fit(monkeypatch) == 128
    others[:] = [len(PLANS)]
    with pytest.raises(torch.OutOfMemoryError):
        CardOfKnownSize(80 * GIB, fixed=2 * GIB, each=0.05 * GIB).fit(monkeypatch)
    others[:] = [0]
    with pytest.raises(torch.OutOfMemoryError):  # this rank asks, too, before it raises
        CardOfKnownSize(2 * GIB, fixed=3 * GIB, each=0.5 * GIB).fit(monkeypatch)


@pytest.mark.parametrize("size", [8, 64])
def test_a_trial_leaves_a_module_s_buffers_as_they_were(size):
    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.BatchNorm1d(3)

        def forward(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
            loss = self.norm(rows).square().mean()
            if len(rows) > 8:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return {"loss": loss}

    module = Module()
    engine = SimpleNamespace(precision="fp32")
    asked: list[object] = []
    stage = SimpleNamespace(device=torch.device("cpu"), config=SimpleNamespace(engine=engine), module=module)
    stage.require_losses = asked.append
    before = {name: value.clone() for name, value in module.named_buffers()}
    with suppress(torch.OutOfMemoryError):
        forward_backward(stage, (torch.arange(3.0 * size).view(size, 3),))
    assert all(torch.equal(value, before[name]) for name, value in module.named_buffers())
    assert len(asked) == (size == 8), "before the backward pass"
