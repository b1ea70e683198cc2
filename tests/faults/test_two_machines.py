"""Two machines, one rank each, started by torchrun: one is cut off, one dies, and the run ends with the same bits.

They are network namespaces (machines.py) with one disk; where those are not permitted, the test is skipped.
"""

import sys
import time
from pathlib import Path

import pytest

from tests.faults.machines import Machines, Unavailable
from tests.faults.notes import logged, losses, same_result
from tests.support.waiting import wait_until

STEPS = 56
PEER_SECONDS = 10  # engine.timeout_seconds: how long a rank waits for one that was cut off
TIMEOUT = 120


@pytest.fixture
def machines():
    try:
        machines = Machines()
    except Unavailable as error:
        pytest.skip(str(error))
    yield machines
    machines.close()


def test_a_machine_that_goes_and_comes_back_changes_nothing(machines, pretraining, settings, mae, root, tmp_path):
    torchrun, run = Path(sys.executable).with_name("torchrun"), tmp_path / "run"
    more = [*settings["amd"], f"optim.epochs={STEPS // 8}", "log.save_every_epochs=0.5"]
    whole = pretraining("one_machine", *more, ranks=2).run

    def start() -> list:
        command = [root / "tools/pretrain.py", pretraining.config, *more, f"engine.timeout_seconds={PEER_SECONDS}"]
        return [machines.torchrun(machine, torchrun, *command, f"run={run}") for machine in (0, 1)]

    def ended(both: list) -> tuple[list[int], str]:
        printed = "".join(process.communicate(timeout=TIMEOUT)[0] for process in both)
        print(printed)  # shown if the test fails
        return [process.returncode for process in both], printed

    assert losses(whole)[-1]["step"] == STEPS
    both = start()
    wait_until(lambda: logged(run) > 10)
    machines.plug(False)
    cut = time.monotonic()
    assert all(ended(both)[0]), "both leave with an error"
    assert time.monotonic() - cut < PEER_SECONDS + 20
    machines.plug(True)

    both = start()
    wait_until(lambda: logged(run) > 30)
    machines.switch_off(1)
    codes, printed = ended(both)
    assert all(codes) and "continues at step" in printed, "the other leaves with an error"

    codes, printed = ended(start())
    assert codes == [0, 0] and "continues at step" in printed
    same_result(run, whole)
