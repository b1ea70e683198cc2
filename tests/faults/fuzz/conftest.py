"""One sandbox per fuzzer."""

from collections.abc import Iterator

import pytest

from tests.faults.fuzz.sandbox import Sandbox


@pytest.fixture(scope="module")
def sandbox(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    """A child process that runs `check` of the test's module; what it has seen is printed at the end."""
    box = Sandbox(request.path, tmp_path_factory.mktemp(request.path.stem))
    yield box
    box.close()
    print(f"\n{request.path.stem}: {box.summary()}")
