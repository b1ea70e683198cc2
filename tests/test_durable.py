"""What is synced, and in which order."""

import errno
import json
import os
from pathlib import Path

import pytest

from maedistill.data.shards import index, write
from maedistill.durable import make_folder, write_durably
from maedistill.exporting import folder as exporting


@pytest.fixture
def events(tmp_path, monkeypatch) -> list[str]:
    """What was synced or renamed, in order, from tmp_path on."""
    seen, sync, replace, rename = [], os.fsync, os.replace, os.rename

    def note(real, path_of):
        def call(*arguments):
            real(*arguments)
            seen.append(path_of(arguments))

        return call

    def place(path) -> str:
        return str(Path(path).relative_to(tmp_path)).replace(f".{os.getpid()}.tmp", "")

    monkeypatch.setattr(os, "fsync", note(sync, lambda given: place(os.readlink(f"/proc/self/fd/{given[0]}"))))
    for name, real in (("replace", replace), ("rename", rename)):
        monkeypatch.setattr(os, name, note(real, lambda given: f"-> {place(given[1])}"))
    return seen


def test_a_file_is_synced_then_renamed_then_its_folder_is_synced(tmp_path, events):
    write_durably(tmp_path / "a", b"one")
    write_durably(tmp_path / "a", b"two")
    assert events == [".a", "-> a", "."] * 2
    assert (tmp_path / "a").read_bytes() == b"two" and os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_file_that_the_disk_refuses_stays_as_it_was(tmp_path, monkeypatch, call):
    (tmp_path / "a").write_bytes(b"one")

    def refuse(*_):
        raise OSError(errno.EIO, "")

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(OSError):
        write_durably(tmp_path / "a", b"two")
    assert (tmp_path / "a").read_bytes() == b"one" and os.listdir(tmp_path) == ["a"]


def test_a_folder_is_made_with_its_parents_each_synced(tmp_path, events):
    make_folder(tmp_path / "a/b/c")
    make_folder(tmp_path / "a/b/c")
    assert events == [".", "a", "a/b"]
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        make_folder(tmp_path / "file/a")


def test_indexes_reports_and_exports_go_through_the_same_door(tmp_path, events):
    index.write_whole(tmp_path / "i/x.index", b"1")
    write._write_json(tmp_path / "report.json", {})
    assert events == [".", "i/.x.index", "-> i/x.index", "i", ".report.json", "-> report.json", "."]
    assert json.loads((tmp_path / "report.json").read_text()) == {}
    events.clear()
    exporting._replace(tmp_path / "export", lambda folder: (folder / "config.json").write_text("{}"))
    assert events == ["export.tmp/config.json", "export.tmp", "-> export", "."]
