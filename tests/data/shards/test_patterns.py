"""Patterns of shards: what they name, what is missing, what cannot be meant."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maedistill.data.shards.patterns import expand_braces, find_shards, split_name
from maedistill.errors import ConfigError, DataError
from tests.data.tar_files import write_split


def test_missing_shards_are_named(tmp_path):
    write_split(tmp_path)
    with pytest.raises(DataError, match=r"7 of 10 shards are missing: .*000003.*000007\.tar and 2 more"):
        find_shards(str(tmp_path / "train-{000000..000009}.tar"))


@pytest.mark.parametrize(
    "pattern",
    ["pipe:cat x.tar", "file:a.tar", "a-{0..9", "a-{x}.tar",
     "a-{9..0}.tar", "a-{00..100}.tar", "a-{0..9999999}.tar",
     "{0..9}{0..9}{0..9}{0..9}{0..9}{0..9}{0..9}", "{0..1}/a", ".",
     "{a,b}" * 20_000, "{0.." + "9" * 5000 + "}", "a\0*.tar", "a\n.tar", "\udcff.tar", "x" * 5000],
)  # fmt: skip
def test_patterns_that_cannot_be_meant_are_refused(pattern, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in "01":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a").touch()
    with pytest.raises(ConfigError):
        find_shards(pattern)


@given(first=st.integers(0, 999), count=st.integers(1, 30), width=st.integers(1, 6))
def test_brace_ranges_count_as_written(first, count, width):
    last = first + count - 1
    width = max(width, len(str(last)))
    names = expand_braces(f"a-{{{first:0{width}d}..{last:0{width}d}}}.tar")
    assert names == [f"a-{number:0{width}d}.tar" for number in range(first, last + 1)]
    assert split_name(tuple(names)) == "a"
    assert len(expand_braces(f"{{x,y,z}}{{{first}..{last}}}")) == 3 * count
