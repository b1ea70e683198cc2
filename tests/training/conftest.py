"""The results of scenarios.py, each run once for all tests of this folder: about a minute together."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from tests.support.launch import Launcher

TIMEOUT = 600  # seconds: on a busy machine too, it only ends what hangs


@pytest.fixture(scope="session")
def run_scenario(launcher: Launcher) -> Callable[..., list[Any]]:
    """What a scenario returned on each rank. The machine has no compiler and no ninja, and stdout must stay ours."""

    def run(name: str, folder: Path, *, ranks: int, by: str = "fork") -> list[Any]:
        results = [folder / f"{name}-of-{ranks}-{rank}.pt" for rank in range(ranks)]
        if all(map(Path.is_file, results)):
            return [torch.load(file, weights_only=False) for file in results]
        extensions, nothing = folder / "extensions", folder / "bin"
        nothing.mkdir(exist_ok=True)
        words = ["-m", "tests.training.scenarios", name, folder]
        start = launcher.start(folder, words, ranks=ranks, by=by, PATH=nothing, TORCH_EXTENSIONS_DIR=extensions)
        ended = start.finish(timeout=TIMEOUT)
        assert ended.out == "", f"something printed to stdout: {ended.out}"
        assert not extensions.exists(), "DeepSpeed compiled something"
        return [torch.load(file, weights_only=False) for file in results]

    return run


@pytest.fixture(scope="session")
def runs(run_scenario: Callable[..., list[Any]], together: Path) -> dict[tuple[str, int], list[Any]]:
    """{(scenario, ranks): what it returned on each rank}; test_pretrain.py goes through the launchers.

    The test processes of one session share the results: the first that needs them makes them.
    """
    folder = together / "scenarios"
    with FileLock(f"{folder}.lock"):
        folder.mkdir(exist_ok=True)
        # `second` continues in new processes what `first` saved with 1 and with 2 ranks.
        plan = [("first", 1), ("first", 2), ("second", 1), ("second", 2), ("failures", 2)]
        return {(name, ranks): run_scenario(name, folder, ranks=ranks) for name, ranks in plan}
