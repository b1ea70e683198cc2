"""The fork server of this folder's tests."""

import pytest
from starts import Forks


@pytest.fixture(scope="session")
def forks(tmp_path_factory):
    """Starts tools by fork; see starts.py."""
    forks = Forks(tmp_path_factory.mktemp("forks"))
    yield forks
    forks.close()
