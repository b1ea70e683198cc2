"""Shared by all tests: one thread per process, so that results do not depend on the machine's cores."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real images that the developers have beside the checkout; users do not."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("needs real images in ../shared, which only the developers' checkouts have")
    return folder
