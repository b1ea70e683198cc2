"""The pretend card refuses what a GPU would wait for or refuse, lets the rest through, and says who asked."""

import numpy as np
import pytest
import torch
from torch import nn

from tests.device.pretend_card import CARD, Card, MixesDevices, OnCard, Waits, value_of

WAITS = {
    "item": lambda x: x[0, 0].item(),
    "float": lambda x: float(x[0, 0]),
    "int": lambda x: int(x[0, 0]),
    "bool": lambda x: bool(x[0, 0] > 0),
    "index": lambda x: [0, 1, 2][x[0, 0].long()],
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "to cpu": lambda x: x.to("cpu", non_blocking=True),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "mask of values": lambda x: x.index_put_((x > 0,), x[0, :1].expand(12)),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "bincount": lambda x: x.long().flatten().bincount(),
    "repeat_interleave": lambda x: x.repeat_interleave(x[:, 0].long(), dim=0),
    "one_hot": lambda x: nn.functional.one_hot(x.long()),
    "equal": lambda x: torch.equal(x, x),
    "allclose": lambda x: torch.allclose(x, x),
    "inverse": lambda x: torch.linalg.inv(x[:, :3]),
    "tensor": lambda x: torch.tensor([1.0], device=x.device),
    "as_tensor": lambda x: torch.as_tensor([1.0], device="cpu:1"),
    "new_tensor": lambda x: x.new_tensor([1.0]),
    "to card": lambda x: torch.ones(4).to(x.device, non_blocking=True),
    "copy_": lambda x: x.copy_(torch.ones(3, 4)),
    "copy_ of a number": lambda x: x[0, 0].copy_(torch.tensor(1.0)),
}
MIXES = {
    "sum": lambda x: x + torch.ones(4),
    "stack": lambda x: torch.stack([x[0, 0], torch.tensor(1.0)]),
    "ids": lambda x: x[torch.tensor([0, 1])],
    "gather": lambda x: x.gather(1, torch.zeros(3, 1, dtype=torch.long)),
    "matrix": lambda x: x @ torch.ones(4, 2),
    "where": lambda x: torch.where(torch.ones(3, 4) > 0, x, x),
    "target": lambda x: nn.functional.cross_entropy(x, torch.zeros(3, dtype=torch.long)),
    "in place": lambda x: torch.ones(3, 4).add_(x),
    "in place, a number": lambda x: torch.tensor(1.0).add_(x[0, 0]),
}
ALLOWED = {
    "number": lambda x: x * torch.tensor(2.0) + 1,
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "mask of one value": lambda x: x.clone().index_put_((x > 0,), torch.zeros((), device=CARD)),
    "ids": lambda x: x[torch.arange(2, device=x.device)],
    "slice": lambda x: x[1:, None].mT.contiguous(),
    "made there": lambda x: torch.cat([x, torch.zeros(1, 4, device=CARD), x.new_ones(1, 4)]),
    "in place": lambda x: x.clone().mul_(2).sub_(1)[0].fill_(3),
}


@pytest.mark.parametrize(("calls", "error"), [(WAITS, Waits), (MIXES, MixesDevices)])
def test_what_waits_or_mixes_raises(calls, error):
    with Card() as card:
        for name, call in calls.items():
            x = torch.arange(1.0, 13).view(3, 4).to(CARD)
            with pytest.raises(error), card.step():
                call(x)
                pytest.fail(f"{name} went through")
        with pytest.raises(TypeError), card.step():
            np.asarray(x)


def test_what_a_gpu_takes_without_waiting_goes_through():
    with Card() as card:
        for call in ALLOWED.values():
            x = (torch.arange(12.0).view(3, 4) - 5).to(CARD)
            with card.step():
                found = call(x)
            assert isinstance(found, OnCard) and found.device == CARD


def test_outside_of_a_step_reads_are_counted_by_the_function_that_asks():
    with Card() as card:
        x = torch.ones(3).to(CARD)
        assert x.sum().item() == 3 and x.tolist() == [1, 1, 1] and x.cpu().device.index is None
    assert [operation for _, operation in card.waits] == ["_to_copy", "_local_scalar_dense", "_to_copy", "_to_copy"]


def test_a_module_moves_with_its_gradients_and_keeps_its_parameters():
    module = nn.Linear(3, 2)
    before = list(module.parameters())
    with Card() as card:
        module.to(CARD)
        assert all(one is other for one, other in zip(before, module.parameters(), strict=True))
        rows = torch.ones(4, 3).to(CARD)
        with card.step():
            module(rows).sum().backward()
    assert value_of(module.bias.grad).tolist() == [4, 4]


def test_a_copy_to_pinned_memory_comes_late():
    with Card() as card:
        x, target = torch.tensor(True).to(CARD), torch.empty((), dtype=torch.bool, pin_memory=True)
        with card.step():
            target.copy_(x, non_blocking=True)
        assert not target
        card.catch_up()
        assert target
