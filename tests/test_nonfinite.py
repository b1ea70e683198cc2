"""A loss or gradient that is not finite, in real runs: it never reaches the weights, and what follows is as configured.

witness.py makes the image at one position nan. An epoch is 8 steps of 12 samples, with a checkpoint at its end.
"""

import json

import pytest
from safetensors.torch import load_file

from maedistill.data.shards.open_index import open_index

pytestmark = pytest.mark.faults

BAD = 10  # the batch, counted from 0, that holds the broken image; checkpoints stand at 8, 16 and 24
NAN = {"WITNESS_NAN": str(12 * BAD + 5)}


def notes(run):
    return [json.loads(line) for line in (run / "nonfinite.jsonl").read_text().splitlines()]


def state(checkpoint):
    return json.loads((checkpoint / "state.json").read_text())


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_update_that_is_skipped_leaves_no_trace(pretraining, settings, shards, ranks):
    layout = ["engine.zero=1"] if ranks == 2 else []
    ended = pretraining(f"skip {ranks}", *settings["mae"], *layout, ranks=ranks, witness=True, **NAN)
    assert ended.err.count("step 11 is not applied: its loss or gradient is not finite") == 1
    found = notes(ended.run)
    assert [note["step"] for note in found] == [BAD + 1]
    seen = [json.loads(line) for file in ended.run.glob("witness-*") for line in file.read_text().splitlines()]
    bad = {sample for note in seen if note["positions"][0] // 12 == BAD for sample in note["samples"]}
    index = open_index(f"{shards}/train-*.tar")
    assert found[0]["samples"] == [index.sample_name(sample) for sample in sorted(bad)]
    assert all(value.isfinite().all() for value in load_file(ended.last_checkpoint() / "model.safetensors").values())
    after = state(ended.last_checkpoint())
    assert after["engine"]["updates"] == 23
    assert (after["loop"]["nonfinite"], after["loop"]["nonfinite_in_a_row"]) == (1, 0)
    losses = [record["loss"] for record in ended.metrics()]
    # of two ranks, the other one's loss is finite
    assert [step for step, loss in enumerate(losses) if loss is None] == ([BAD] if ranks == 1 else [])


def test_skipping_ends_when_too_many_are_skipped_in_a_row(pretraining, settings):
    variables = {"WITNESS_NAN": f"{12 * BAD},{12 * (BAD + 1)},{12 * (BAD + 3)}"}
    command = [*settings["mae"], "engine.max_nonfinite=1"]
    ended = pretraining("two in a row", *command, witness=True, code=4, **variables)
    assert "2 in a row" in ended.err and "nonfinite.jsonl" in ended.err
    assert [note["step"] for note in notes(ended.run)] == [BAD + 1, BAD + 2]


def test_a_run_that_stops_leaves_a_sound_checkpoint(pretraining, settings):
    ended = pretraining("stop", *settings["mae"], "engine.max_nonfinite=0", witness=True, code=4, **NAN)
    assert ended.last_checkpoint().name == "step_000000008"
    assert json.loads((ended.run / "exit.json").read_text())["exit_code"] == 4
    assert pretraining("stop", *settings["mae"]).metrics()[-1]["step"] == 24
