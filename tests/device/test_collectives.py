"""What ranks tell each other under NCCL's rule: tensors that travel lie on the card, whole and dense.

Two ranks are two threads of this process, each with a card of its own; torch.distributed's entry points are replaced
by twenty lines that exchange values in rank order and check what they are given.
"""

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
from torch import Tensor, nn

from maedistill.data.loading.evaluation import EvaluationImages, evaluation_transform
from maedistill.data.shards.open_index import open_index
from maedistill.evaluation import linear_probe
from maedistill.evaluation.accuracy import evaluate
from maedistill.evaluation.context import EvalContext
from maedistill.evaluation.full_pass import Predictor
from maedistill.evaluation.knn import knn_counts
from maedistill.evaluation.linear_probe import _SHORT_RATES, _SHORT_RECIPE, fit_heads, score_heads
from maedistill.processes import distributed
from maedistill.runs.metrics import Averages
from maedistill.training.engine import Engine
from tests.device.pretend_card import CARD, Card, MixesDevices, OnCard, value_of


class Ranks:
    """Two ranks, and what they hand each other."""

    def __init__(self) -> None:
        self._place, self._boxes, self._meeting = threading.local(), [None, None], threading.Barrier(2, timeout=30)

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        """What `work` returns on each rank, or the first error."""

        def on_rank(rank: int) -> Any:
            self._place.rank = rank
            try:
                with Card() as self._place.card:
                    return work(rank)
            except BaseException:
                self._meeting.abort()
                raise

        with ThreadPoolExecutor(2) as two:
            ended = [two.submit(on_rank, rank) for rank in range(2)]
        broken = [one.exception() for one in ended if one.exception() is not None]
        if broken:
            raise min(broken, key=lambda error: isinstance(error, threading.BrokenBarrierError))
        return [one.result() for one in ended]

    def rank(self) -> int:
        return self._place.rank

    def card(self) -> Card:
        return self._place.card

    def exchange(self, value: Any) -> list[Any]:
        self._boxes[self.rank()] = value
        self._meeting.wait()
        both = list(self._boxes)
        self._meeting.wait()
        return both

    def broadcast_object_list(self, box: list[Any], *, src: int, device: torch.device) -> None:
        assert device == CARD, "objects travel as tensors of the card"
        box[:] = self.exchange(box)[src]

    def all_gather_object(self, values: list[Any], value: Any) -> None:
        values[:] = self.exchange(value)

    def broadcast(self, tensor: Tensor, *, src: int) -> None:
        sent = self.exchange(travelling(tensor).clone())[src]
        travelling(tensor).copy_(sent)

    def all_reduce(self, tensor: Tensor, *, async_op: bool = False) -> Any:
        parts = self.exchange(travelling(tensor).clone())
        travelling(tensor).copy_(parts[0] + parts[1])
        return SimpleNamespace(wait=lambda: None) if async_op else None

    def all_gather(self, parts: list[Tensor], tensor: Tensor) -> None:
        for part, value in zip(parts, self.exchange(travelling(tensor).clone()), strict=True):
            travelling(part).copy_(value)

    def barrier(self, *, device_ids: list[int]) -> None:
        assert device_ids == [0], "NCCL would guess the card"
        self.exchange(None)


def travelling(tensor: Tensor) -> Tensor:
    """The value of a tensor that NCCL can send."""
    if not isinstance(tensor, OnCard):
        raise MixesDevices(f"NCCL got a tensor of {tensor.device}")
    assert tensor.is_contiguous()
    return tensor.inside


@pytest.fixture
def ranks(monkeypatch) -> Ranks:
    """Two ranks, joined by NCCL as far as the package sees."""
    ranks = Ranks()
    monkeypatch.setattr(distributed, "device", lambda: CARD)
    answers = {"is_initialized": True, "get_world_size": 2, "get_backend": "nccl"}
    for name, answer in answers.items():
        monkeypatch.setattr(dist, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(dist, "get_rank", lambda *_: ranks.rank())
    store = dist.HashStore()
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(distributed, "_counters", itertools.repeat(0))  # each rank counts for itself; these share
    names = ("broadcast_object_list", "all_gather_object", "broadcast", "all_reduce", "all_gather", "barrier")
    for name in names:
        monkeypatch.setattr(dist, name, getattr(ranks, name))
    return ranks


def test_every_collective_sends_tensors_of_the_card(ranks):
    def work(rank: int) -> dict[str, Any]:
        means = {
            "a": torch.full((), rank, device=CARD),
            "b": torch.full((), 1 + 2e-8, dtype=torch.float64, device=CARD),
        }
        rows = torch.arange(6.0, device=CARD).view(3, 2)[: 3 - 2 * rank] + 10 * rank
        distributed.barrier()
        return {
            "sum": distributed.all_reduce_sum(means),
            "rows": value_of(distributed.all_gather_rows(rows)),
            "sparse": value_of(distributed.all_gather_rows(rows.repeat(1, 2)[:, ::3])),  # not contiguous
            "none": value_of(distributed.all_gather_rows(rows[:rank])),
            "tensor": value_of(distributed.broadcast_tensor(torch.arange(3.0) if rank == 0 else None, (3,))),
            "object": distributed.broadcast_object({"rank": rank}),
            "objects": distributed.gather_objects(rank),
            "on_main": distributed.on_main(lambda: rank),
            "main_first": distributed.main_first(lambda: rank),
        }

    first, second = ranks.run(work)
    assert first["sum"] == second["sum"] == {"a": 1.0, "b": 2 * (1 + 2e-8)}  # float64: 2e-8 is lost in float32
    assert first["rows"].tolist() == second["rows"].tolist() == [[0, 1], [2, 3], [4, 5], [10, 11]]
    assert first["sparse"].tolist() == [[0, 1], [2, 3], [4, 5], [10, 11]]
    assert first["none"].tolist() == second["none"].tolist() == [[10, 11]]
    assert first["tensor"].tolist() == second["tensor"].tolist() == [0, 1, 2]
    assert first["object"] == second["object"] == {"rank": 0} and first["objects"] == second["objects"] == [0, 1]
    assert [first["on_main"], second["on_main"], first["main_first"], second["main_first"]] == [0, 0, 0, 1]


@pytest.mark.parametrize("collective", ["all_gather_rows", "all_reduce_sum"])
def test_a_tensor_of_the_host_is_refused(ranks, collective):
    given = {"all_gather_rows": torch.ones(2, 2), "all_reduce_sum": {"a": torch.ones(())}}[collective]
    with pytest.raises(MixesDevices):
        ranks.run(lambda rank: getattr(distributed, collective)(given))


def test_evaluation_and_neighbours_gather_on_the_card(ranks, shards):
    index = open_index(f"{shards}/val-*.tar")
    images = EvaluationImages(index, torch.arange(23), evaluation_transform(size=32, crop=1.0))
    torch.manual_seed(0)
    shape = {"embed_dim": 32, "depth": 1, "num_heads": 2, "patch_size": 8, "img_size": 32, "num_classes": 3}
    networks = [timm.create_model("vit_tiny_patch16_224", **shape).eval() for _ in range(2)]
    networks[1].load_state_dict(networks[0].state_dict())
    bank, queries = torch.randn(20, 4), torch.randn(7, 4)
    truth, labels = torch.arange(20) % 3, torch.arange(7) % 3

    def work(rank: int) -> tuple[Any, list[int]]:
        context = EvalContext(CARD, batch=5, workers=0)
        predictor = Predictor(networks[rank].to(CARD), context, mean=(0.5,) * 3, std=(0.25,) * 3)
        counts = knn_counts((bank, truth), (queries, labels), ks=(3,), device=CARD)
        return evaluate(predictor, images, context).score.metrics(), counts

    (first, counts), (second, others) = ranks.run(work)
    assert first == second and first["images"] == 23 and counts == others


def test_a_probe_in_training_is_divided_among_the_ranks(ranks, monkeypatch):
    rows, labels = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 3
    alone = fit_heads(
        rows, labels, _SHORT_RECIPE.fit_batch(40), rates=_SHORT_RATES, num_classes=3, device=torch.device("cpu")
    )
    expected, fitted = max(score.top1 for score in score_heads(alone, rows, labels)), {}

    def noted(*data: Any, rates: tuple[float, ...], **how: Any) -> Any:
        fitted[ranks.rank()] = rates
        return fit_heads(*data, rates=rates, **how)

    monkeypatch.setattr(linear_probe, "fit_heads", noted)
    found = ranks.run(lambda rank: linear_probe.probe_accuracy((rows, labels), (rows, labels), device=CARD))
    assert found == [expected] * 2 and fitted == {0: _SHORT_RATES[::2], 1: _SHORT_RATES[1::2]}


def test_two_engines_of_the_card_stay_equal_and_take_a_state(ranks, engine_on_card):
    """Gradients are averaged in the backward pass, for which no host waits; statistics and a checkpoint travel, too."""
    inputs = torch.randn(2, 4, 3)

    def work(rank: int) -> tuple[Any, ...]:
        engine = build(rank)
        averages, rows = Averages(), inputs[rank].to(CARD)
        with ranks.card().step():
            for _ in range(2):
                losses = engine(rows)
                engine.backward(losses["loss"])
                engine.step()
                averages.add(losses)
        state, other = engine.state(), build(rank)
        other.load_state(state)
        return value_of(engine.module.state_dict()), value_of(other.module.state_dict()), averages.read()["loss"]

    def build(rank: int) -> Engine:
        module = Squares(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))).to(CARD)
        with torch.no_grad():
            for parameter, value in zip(module.parameters(), (0.5, 0.1, 0.5, 0.5), strict=True):
                parameter.fill_(value)
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, fused=True)
        return Engine(module, optimizer, zero=0, precision="fp32", clip=1.0, micro_batch=4, accumulation=1)

    (mine, loaded, loss), (theirs, theirs_loaded, other_loss) = ranks.run(work)
    for name, value in mine.items():
        assert torch.equal(value, theirs[name]) and torch.equal(value, loaded[name])
        assert torch.equal(value, theirs_loaded[name]) and not (value == 0.5).any()
    assert loss == other_loss > 0


class Squares(nn.Module):
    """A module with a loss."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, rows: Tensor) -> dict[str, Tensor]:
        return {"loss": self.inner(rows).square().mean()}
