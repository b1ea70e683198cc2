"""Resuming with real engines, bit for bit: what one set of processes saved, another one loads."""

import itertools
import shutil

import pytest
import torch

from maedistill.training.engine import MOMENTS, TrainingState
from tests.training.scenarios import ROUNDS


def equal(a: TrainingState, b: TrainingState) -> bool:
    return (
        a.scalars == b.scalars
        and all(torch.equal(a.weights[name], b.weights[name]) for name in a.weights | b.weights)
        and all(torch.equal(a.moments[m][name], b.moments[m][name]) for m in MOMENTS for name in a.moments[m])
    )


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("precision", "accumulation"), ROUNDS)
def test_three_steps_saved_and_three_more_are_six_bit_for_bit(runs, ranks, precision, accumulation):
    for zero in range(4):
        straight = runs["first", ranks][0][f"{precision}/{accumulation}/{zero}"]
        resumed = runs["second", ranks][0][f"{ranks}/{precision}/{accumulation}/{zero}/{zero}"]
        assert equal(resumed["half"], straight["half"])
        assert equal(resumed["final"], straight["final"])
        assert resumed["norms"] == straight["norms"][3:]
        assert straight["final"].scalars["updates"] == 6
        assert (zero == 3) == (straight["ema"] is None)
        for name, value in (straight["ema"] or {}).items():
            assert torch.equal(resumed["ema"][name], value)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("saved_by", [1, 2])
def test_any_rank_count_and_stage_loads_what_any_other_saved(runs, ranks, saved_by):
    for zero, target in itertools.product(range(4), range(4)):
        straight = runs["first", saved_by][0][f"fp32/3/{zero}"]
        resumed = runs["second", ranks][0][f"{saved_by}/fp32/3/{zero}/{target}"]
        assert equal(resumed["half"], straight["half"]), (zero, target)  # nothing lost on the way
        for name, value in straight["final"].weights.items():
            if name != "calls":  # counts micro-batches
                assert torch.allclose(resumed["final"].weights[name], value, rtol=0, atol=1e-6), (zero, target, name)


def test_every_rank_hears_that_nothing_is_intact(runs):
    first, second = runs["failures", 2]
    assert first[-1] == second[-1] and "is intact: step_000000001" in first[-1]


@pytest.mark.faults
def test_every_saved_item_bears_weight(run_scenario, pretraining, tmp_path):
    # Without any one of them the run is refused, with another value it ends otherwise. None is saved in vain.
    shutil.copy(pretraining.config, tmp_path / "tiny.yaml")
    (found,) = run_scenario("mutations", tmp_path, ranks=1)
    saved, matter = set(), set()
    for endings in found.values():
        uninterrupted, continued = endings.pop("uninterrupted"), endings.pop("continued")
        assert uninterrupted.split()[0] == continued.split()[0]
        saved |= endings.keys()
        matter |= {item for item, ending in endings.items() if ending != continued}
        gone = {item: ending for item, ending in endings.items() if item.endswith(" gone")}
        assert [item for item, ending in gone.items() if not ending.startswith("refused: ")] == []
    assert saved - matter == set()
    assert {f"{kind}.safetensors gone" for kind in ("model", "optimizer", "ema")} | {"state.json gone"} <= saved
    for value in ("engine/updates", "engine/scale", "loop/step", "loop/bad_samples", "loop/trained_seconds"):
        assert f"state.json {value} changed" in saved
