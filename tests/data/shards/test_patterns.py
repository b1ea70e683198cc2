"""Patterns of shards: what they name, what is missing, what cannot be meant."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maedistill.data.shards.patterns import describe_shards, expand_braces, find_shards, split_name
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


def make(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()
    return str(folder)


def names_of(shards, split="train"):
    return [os.path.basename(path) for path in find_shards(shards, split=split)]


def test_a_folder_means_the_shards_of_its_split(tmp_path):
    both = make(tmp_path / "both", "train-000000.tar", "train-000001.tar", "val-000000.tar", "classes.json")
    assert names_of(both) == ["train-000000.tar", "train-000001.tar"] and names_of(both + "/", "val") == [
        "val-000000.tar"
    ]
    assert describe_shards(both, find_shards(both)) == f"{both} (train-000000.tar to train-000001.tar)"
    pattern = f"{both}/train-*.tar"
    assert describe_shards(pattern, find_shards(pattern)) == pattern
    assert names_of(make(tmp_path / "valid", "train-0.tar", "validation-0.tar"), "val") == ["validation-0.tar"]
    plain = make(tmp_path / "plain", "000.tar", "001.tar")
    assert names_of(plain) == names_of(plain, "val") == ["000.tar", "001.tar"]

    for folder, split in (
        (make(tmp_path / "only", "train-0.tar"), "val"),
        (make(tmp_path / "sets", "in1k-train-0.tar", "in1k-validation-0.tar"), "train"),
    ):
        with pytest.raises(ConfigError, match=rf"no shards {split}-\*\.tar, but .*train"):
            find_shards(folder, split=split)
    make(tmp_path / "my photos" / "cat", "a.JFIF")
    photos = str(tmp_path / "my photos")
    with pytest.raises(ConfigError, match=rf"images.*\n.*maedistill shards '{photos}' 'shards/my photos'; then name"):
        find_shards(photos)
    with pytest.raises(ConfigError, match="holds no shards"):
        find_shards(make(tmp_path / "empty", "notes.txt"))


@pytest.mark.parametrize("name", ["[v2] photos", "set{a}", "{0..3}", "what?", "a*b"])
def test_a_folder_that_exists_is_taken_as_it_is_written(tmp_path, monkeypatch, name):
    shards = ["train-000000.tar", "train-000001.tar"]
    folder = make(tmp_path / name, *shards)
    monkeypatch.chdir(tmp_path)
    for written in (folder, f"./{name}"):
        for pattern in ("", "/train-*.tar", "/train-{000000..000001}.tar", "/train-00000[01].tar"):
            assert names_of(written + pattern) == shards
        assert names_of(f"{written}/train-000001.tar") == shards[1:]
    assert {os.path.dirname(path) for path in find_shards(folder)} == {folder}


@given(first=st.integers(0, 999), count=st.integers(1, 30), width=st.integers(1, 6))
def test_brace_ranges_count_as_written(first, count, width):
    last = first + count - 1
    width = max(width, len(str(last)))
    names = expand_braces(f"a-{{{first:0{width}d}..{last:0{width}d}}}.tar")
    assert names == [f"a-{number:0{width}d}.tar" for number in range(first, last + 1)]
    assert split_name(tuple(names)) == "a"
    assert len(expand_braces(f"{{x,y,z}}{{{first}..{last}}}")) == 3 * count


def test_a_folder_that_is_not_there_is_named_with_one_like_it(tmp_path):
    (tmp_path / "classes").mkdir()
    with pytest.raises(DataError) as missing:
        find_shards(str(tmp_path / "clases"))
    assert "no folder" in missing.value.cause and missing.value.remedy == f"did you mean {tmp_path / 'classes'}?"
