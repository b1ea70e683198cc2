"""Names and numbers as text."""

import pytest

from maedistill.report.formatting import short_names


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["runs/a", "runs/b/"], ["a", "b"]),
        (["runs/x/a/tuned", "runs/y/a/tuned", "end"], ["x/a/tuned", "y/a/tuned", "end"]),
        (["timm:a/b", "timm:a/b"], ["b", "b"]),
        (["a", "b/a"], ["a", "b/a"]),
        ([], []),
    ],
)
def test_short_names_tell_all_apart(paths, names):
    assert short_names(paths) == names
