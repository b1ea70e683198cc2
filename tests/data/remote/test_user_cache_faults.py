"""The cache folder of a user without a home, as a container has one that is started with a bare user id."""

import os
import pwd
import shutil
import stat
import tempfile
from functools import partial
from pathlib import Path

import pytest

from maedistill.data.remote.user_cache import ensure_home, user_cache
from maedistill.data.shards.open_index import open_index
from maedistill.errors import ConfigError, DataError
from tests.data.tar_files import write_split
from tests.support.forked import exit_code, fork

STRANGER = 12345  # a user id that no password file has


def no_entry(*_):
    raise KeyError("no such user")


@pytest.fixture
def homeless(tmp_path, monkeypatch):
    """A user without HOME and without an entry in the password file. Returns where the temporary home would be."""
    monkeypatch.setattr(pwd, "getpwuid", no_entry)
    for name in ("HOME", "XDG_CACHE_HOME", "MAEDISTILL_CACHE"):
        monkeypatch.setenv(name, "")  # so that monkeypatch puts back what the test sets
        monkeypatch.delenv(name)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"maedistill-{os.geteuid()}"


def test_a_user_without_a_home_gets_a_private_one(homeless, capsys):
    assert user_cache() == homeless / ".cache" / "maedistill"
    assert os.environ["HOME"] == str(homeless) and stat.S_IMODE(homeless.stat().st_mode) == 0o700
    assert "HOME" in capsys.readouterr().err
    ensure_home()
    assert not capsys.readouterr().err  # said once


@pytest.mark.parametrize(("home", "refused"), [("/", os.W_OK), ("closed", os.X_OK), ("mine", None)])
def test_a_home_counts_only_if_one_may_be_in_it(homeless, monkeypatch, tmp_path, home, refused):
    home = str(tmp_path / home)  # "/" stays "/"
    os.makedirs(home, exist_ok=True)
    monkeypatch.setenv("HOME", home)
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: access(path, mode) and (path, mode) != (home, refused))
    ensure_home()
    assert os.environ["HOME"] == (home if refused is None else str(homeless))


def test_named_cache_folders_come_first(homeless, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert user_cache() == tmp_path / "xdg" / "maedistill"
    monkeypatch.setenv("MAEDISTILL_CACHE", str(tmp_path / "own"))
    assert user_cache() == tmp_path / "own"
    monkeypatch.setenv("MAEDISTILL_CACHE", "s3://bucket/shards")
    with pytest.raises(ConfigError, match="MAEDISTILL_CACHE"):
        user_cache()


def test_a_temporary_home_of_somebody_else_is_refused(homeless, monkeypatch):
    homeless.mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: STRANGER)
    homeless.rename(homeless.with_name(f"maedistill-{STRANGER}"))
    with pytest.raises(ConfigError, match="set HOME"):
        ensure_home()
    assert "HOME" not in os.environ


def index_as_a_stranger(folder: Path) -> None:
    os.setgroups([])
    os.setgid(STRANGER)
    os.setuid(STRANGER)
    for name in ("HOME", "XDG_CACHE_HOME", "MAEDISTILL_CACHE"):
        os.environ.pop(name, None)
    open_index(str(folder / "train-*.tar"))


def test_read_only_shards_are_scanned_for_a_user_who_does_not_exist(monkeypatch):
    """For real: another user id, no home, shards without an index in a folder that is not its own."""
    if os.geteuid():
        pytest.skip("becoming another user needs root")
    folder = Path(tempfile.mkdtemp(prefix="read-only-"))  # not tmp_path, which is closed to other users
    try:
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        write_split(folder)
        (folder / f"maedistill-{STRANGER}").mkdir(mode=0o700)
        os.chown(folder / f"maedistill-{STRANGER}", STRANGER, STRANGER)
        folder.chmod(0o755)
        code = exit_code(fork(partial(index_as_a_stranger, folder)))
        kept = list(folder.glob("maedistill-*/.cache/maedistill/index/*.index.safetensors"))
    finally:
        shutil.rmtree(folder)
    assert code == 0 and len(kept) == 1


def test_a_remote_index_that_cannot_be_kept_names_the_variable(homeless, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MAEDISTILL_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr("maedistill.data.shards.open_index.read_small", lambda url: b"an index")
    with pytest.raises(DataError, match="MAEDISTILL_CACHE"):
        open_index("http://h/a-{000..001}.tar")
