"""A loss or gradient that is not finite, in real runs: it never reaches the weights, and what follows is as configured.

witness.py makes the image at one position nan. An epoch is 8 steps of 12 samples, with a checkpoint at its end.
"""

import json
import shutil

import pytest
from safetensors.torch import load_file

from maedistill.data.index import open_index
from maedistill.data.reader import sample_name
from maedistill.training.seal import COMPLETE, MANIFEST, seal

BAD = 10  # the batch, counted from 0, that holds the broken image; checkpoints stand at 0, 8, 16 and 24
NAN = {"WITNESS_NAN": str(12 * BAD + 5)}


def batches(run):
    """Which batches the network was given, in order."""
    return [json.loads(line)["positions"][0] // 12 for line in (run / "witness-0.jsonl").read_text().splitlines()]


def notes(run):
    return [json.loads(line) for line in (run / "nonfinite.jsonl").read_text().splitlines()]


def state(checkpoint):
    return json.loads((checkpoint / "state.json").read_text())


@pytest.mark.parametrize("layout", [[], ["engine.zero=1"]])
def test_an_update_that_is_skipped_leaves_no_trace(pretraining, settings, shards, layout):
    ranks = 1 + len(layout)
    launcher = "torchrun" if layout else "bare"
    name = f"skip {ranks}"
    ended = pretraining(name, *settings["mae"], *layout, ranks=ranks, launcher=launcher, witness=True, **NAN)
    assert ended.err.count("step 11 is not applied: its loss or gradient is not finite") == 1
    found = notes(ended.run)
    assert [note["step"] for note in found] == [BAD + 1]
    seen = [json.loads(line) for file in ended.run.glob("witness-*") for line in file.read_text().splitlines()]
    bad = {sample for note in seen if note["positions"][0] // 12 == BAD for sample in note["samples"]}
    assert found[0]["samples"] == [sample_name(open_index(f"{shards}/train-*.tar"), sample) for sample in sorted(bad)]
    assert all(value.isfinite().all() for value in load_file(ended.last_checkpoint() / "model.safetensors").values())
    after = state(ended.last_checkpoint())
    assert after["engine"]["updates"] == 23 and (after["loop"]["nonfinite"], after["loop"]["nonfinite_in_a_row"]) == (
        1,
        0,
    )
    losses = [record["loss"] for record in ended.metrics()]
    assert [step for step, loss in enumerate(losses) if loss is None] == ([BAD] if ranks == 1 else [])


def test_a_return_to_the_checkpoint_goes_on_behind_the_batch(pretraining, settings):
    """The oracle is the checkpoint of step 8, told by hand that three batches are left out."""
    command = [*settings["mae"], "engine.nonfinite=rollback", "log.keep=9"]
    ended = pretraining("rollback", *command, witness=True, **NAN)
    assert "continues at step 8 of 24" in ended.out and [note["step"] for note in notes(ended.run)] == [BAD + 1]
    assert batches(ended.run) == [*range(BAD + 2), *range(BAD + 1, 24 + 3)]  # noticed one step late
    assert len(ended.metrics()) == 24
    by_hand = pretraining.folder / "by hand"
    shutil.copytree(ended.run, by_hand, ignore=shutil.ignore_patterns("step_*16", "step_*24"))
    start = by_hand / "checkpoints/step_000000008"
    document = state(start)
    document["loop"]["shift"] = 3
    (start / "state.json").write_text(json.dumps(document))
    for name in (MANIFEST, COMPLETE):
        (start / name).unlink()
    seal(start)
    expected = pretraining("by hand", *command).last_checkpoint()
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (ended.last_checkpoint() / name).read_bytes() == (expected / name).read_bytes()


def test_returns_end_somewhere(pretraining, settings):
    variables = {"WITNESS_NAN": f"{12 * BAD},{12 * (BAD + 2)}"}
    command = [*settings["mae"], "engine.nonfinite=rollback", "engine.most_nonfinite=1"]
    ended = pretraining("again and again", *command, witness=True, code=4, **variables)
    assert "engine.nonfinite=rollback" in ended.err and "nonfinite.jsonl names its samples" in ended.err
    assert [note["step"] for note in notes(ended.run)] == [BAD + 1, 10]


def test_a_run_that_stops_leaves_a_sound_checkpoint(pretraining, settings):
    ended = pretraining("stop", *settings["mae"], "engine.nonfinite=stop", witness=True, code=4, **NAN)
    assert ended.last_checkpoint().name == "step_000000008"
    assert json.loads((ended.run / "exit.json").read_text())["exit_code"] == 4
    assert pretraining("stop", *settings["mae"]).metrics()[-1]["step"] == 24
