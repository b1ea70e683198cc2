"""What a power cut leaves of a folder: a shim that notes what a process had synced at each of its calls.

    Recorder(run, out) in the process that writes `run`: two folders per cut point in `out`
        0007-missing   names that no sync of their folder covers are gone, files that were not synced are empty
        0007-present   every name is there, files that were not synced are empty
        0007.json      {"saved": newest step whose folder was renamed and its parent synced, "op": the call}

Contents are hard links to one copy each: copy a folder before something writes to it. The inodes that were synced are
kept open, so that none is given to another file.
"""

import json
import os
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

_NAME = re.compile(r"step_(\d{9})")


class Recorder:
    """The disk under one run folder. Its names count from the folder that holds the run on."""

    def __init__(self, run: Path, out: Path) -> None:
        self.run, self.out, self.cuts = run, out, 0
        self.contents: dict[int, Path] = {}  # inode of a file -> its content when it was last synced
        self.names: dict[int, dict[str, int]] = {}  # inode of a folder -> its names when it was last synced
        self.held: dict[int, int] = {}
        self.lock = threading.RLock()
        self.real = {name: getattr(os, name) for name in ("open", "fsync", "rename", "replace", "mkdir", "unlink")}
        (out / "contents").mkdir(parents=True)
        self.names[run.parent.stat().st_ino] = {}
        for name in ("rename", "replace", "mkdir", "unlink"):
            setattr(os, name, self._then_cut(name))
        os.fsync = self.fsync

    def fsync(self, descriptor: int) -> None:
        """Sync, and note what is on the disk then."""
        self.real["fsync"](descriptor)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path != self.run.parent and self.run not in (path, *path.parents):
            return
        with self.lock:
            inode = os.fstat(descriptor).st_ino
            if inode not in self.held:
                self.held[inode] = self.real["open"](path, os.O_RDONLY)
            if path.is_dir():
                self.names[inode] = {entry.name: entry.inode() for entry in os.scandir(path)}
            else:
                copy = self.out / "contents" / f"{inode}-{self.cuts}"
                shutil.copyfile(path, copy)
                self.contents[inode] = copy
            self._cut(f"fsync {path.name}")

    def _then_cut(self, name: str) -> Callable[..., Any]:
        def call(path: Any, *rest: Any, **keywords: Any) -> Any:
            result = self.real[name](path, *rest, **keywords)
            if str(path).startswith(str(self.run)):
                with self.lock:
                    self._cut(f"{name} {os.path.basename(path)}")
            return result

        return call

    def _cut(self, op: str) -> None:
        """Write both folders."""
        number, self.cuts = self.cuts, self.cuts + 1
        for kind in ("missing", "present"):
            target = self.out / f"{number:04d}-{kind}"
            self.real["mkdir"](target)
            there = self.names[self.run.parent.stat().st_ino].get(self.run.name)
            if os.path.isdir(self.run) and (kind == "present" or there == self.run.stat().st_ino):
                self._fill(self.run, target, synced=kind == "missing")
        (self.out / f"{number:04d}.json").write_text(json.dumps({"op": op, "saved": self._saved()}))

    def _fill(self, folder: Path, target: Path, *, synced: bool) -> None:
        known = self.names.get(folder.stat().st_ino, {})
        for entry in os.scandir(folder):
            if synced and known.get(entry.name) != entry.inode():
                continue
            if entry.is_dir():
                self.real["mkdir"](target / entry.name)
                self._fill(Path(entry.path), target / entry.name, synced=synced)
            elif content := self.contents.get(entry.inode()):
                os.link(content, target / entry.name)
            else:
                (target / entry.name).touch()

    def _saved(self) -> int:
        """Return the newest checkpoint that is said to be saved: the folder of checkpoints was synced with it."""
        folder = self.run / "checkpoints"
        names = self.names.get(folder.stat().st_ino, {}) if folder.is_dir() else {}
        return max((int(match[1]) for name in names if (match := _NAME.fullmatch(name))), default=0)
