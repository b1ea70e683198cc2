"""The fork server of this folder's tests, and the way to the modules beside them: tests are no package."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from starts import Forks


@pytest.fixture(scope="session")
def forks(tmp_path_factory):
    """Starts tools by fork; see starts.py."""
    forks = Forks(tmp_path_factory.mktemp("forks"))
    yield forks
    forks.close()
