"""1 -> 2 -> 1 -> 3 ranks: a run that is killed and goes on in another layout each time sees and learns the same.

Every start has other numbers of ranks, loader workers and micro-batches, keeps decoded images or does not, begins in
the middle of an epoch and is killed in the middle of another. Samples, crops and masks must be those of the run that
one process did without a break, at every step. Losses differ by the order of sums: 1e-5 holds for 20 steps in fp32; in
float64 throughout, and far closer.
"""

import pytest
from safetensors.torch import load_file

from tests.faults.notes import BATCH, Notes, losses
from tests.support.launch import WITNESS

EPOCH, STEPS = 8, 48
COMMAND = ["optim.epochs=6", "optim.ema=null", "log.save_every_epochs=0.375"]  # saved every 3 steps
COMMAND += ["log.knn_every_epochs=null", "log.pictures_every_epochs=null"]  # fp32 by nature
# ranks, loader workers, largest micro-batch, the micro-batch in which the start is killed (its 7th, 9th, 11th step)
LAYOUTS = [(1, 3, 1, 7 * BATCH), (2, 0, 6, 9), (1, 1, 5, 11 * 3), (3, 2, 2, None)]
KEEPS = ["true", "auto", "false", "true"]  # in these starts; the whole run does not
CLOSE = {"float32": (20, 1e-5), "float64": (STEPS, 1e-10)}  # how many steps, how close their losses are


@pytest.mark.parametrize("dtype", CLOSE)
def test_a_run_may_change_its_layout_at_any_step(dtype, launcher, pretraining, settings, mae, tmp_path):
    widened = {"FAULTS_FLOAT64": 1} if dtype == "float64" else {}
    command = [WITNESS, "tools/pretrain.py", pretraining.config, *settings["amd"], *COMMAND]
    moved, whole = tmp_path / "moved", tmp_path / "whole"
    launcher.start(whole, [*command, "data.keep_decoded=false", f"run={whole}"], **widened).finish()
    notes = Notes(whole)

    for place, (ranks, workers, micro, kill) in enumerate(LAYOUTS):
        layout = [f"data.workers={workers}", f"engine.micro_batch={micro}", f"data.keep_decoded={KEEPS[place]}"]
        end = {"WITNESS_KILL": kill} if kill else {}
        start = launcher.start(moved, [*command, *layout, f"run={moved}"], ranks=ranks, **widened, **end)
        codes = set(start.wait())
        assert -9 in codes and codes <= {-9, 5} if kill else codes == {0}, start.printed()[-3000:]
        steps = notes.check(start)
        assert bool(steps.start % EPOCH) == bool(place), "all but the first begin amid an epoch"
        assert steps.stop == STEPS if not kill else steps.stop % EPOCH, "all but the last are killed amid one"

    for ours, theirs in list(zip(losses(moved), losses(whole), strict=True))[: CLOSE[dtype][0]]:
        assert ours == pytest.approx(theirs, rel=CLOSE[dtype][1], abs=0)
    weights = load_file(max((moved / "checkpoints").glob("step_*")) / "model.safetensors")
    assert {str(value.dtype) for value in weights.values()} == {f"torch.{dtype}"}
