"""A recipe so small that a step takes milliseconds."""

from pathlib import Path

import pytest

TINY = """\
method: mae
data: {image_size: 32}
student: {model: vit_tiny_patch16_224, width: 32, depth: 1, num_heads: 2, patch_size: 8}
decoder: {width: 16, depth: 1, num_heads: 2}
optim: {epochs: 10, warmup_epochs: 0, global_batch: 96, lr: 1e-3}
engine: {micro_batch: 12}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """The file of the recipe, alone in its folder."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path
