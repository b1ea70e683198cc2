"""The results of scenarios.py, each run once for all tests of this folder: about a minute together."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def run_scenario() -> Callable[..., list[Any]]:
    """See `run_scenario` in ranks.py."""
    spec = importlib.util.spec_from_file_location("ranks", Path(__file__).with_name("ranks.py"))
    ranks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ranks)
    return ranks.run_scenario


@pytest.fixture(scope="session")
def runs(
    run_scenario: Callable[..., list[Any]], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, int], list[Any]]:
    """{(scenario, ranks): what it returned on each rank}, each number of ranks with another launcher."""
    folder = tmp_path_factory.mktemp("scenarios")
    # `second` continues in new processes what `first` saved with 1 and with 2 ranks.
    plan = [("first", 1, "bare"), ("first", 2, "torchrun"), ("second", 1, "bare"), ("second", 2, "slurm")]
    plan.append(("failures", 2, "torchrun"))
    return {(name, n): run_scenario(name, folder, ranks=n, launcher=launcher) for name, n, launcher in plan}
