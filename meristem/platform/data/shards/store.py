"""Fetched files on this machine's disk, within a bound: the one that was not used for longest goes first."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Store:
    """The files of one data set, in a folder of `root`, whose folders hold at most `room` bytes together.

    Several processes may share it: one fetches a file, the others wait for it. A file is whole or absent. What a process has
    open stays readable when another removes it.
    """

    root: Path
    name: str
    room: int

    @property
    def home(self) -> Path:
        return self.root / self.name

    def get(self, file: str, size: int, fetch: Callable[[Path], None]) -> Path:
        """The local path of a file of `size` bytes; where it is not here yet, `fetch` writes it to the path it is given."""
        path, part = self.home / file, self.home / f".{file}.{size}"
        if not self.use(file):
            with _locked(self._lock(file)):
                if not self.use(file):
                    while not self._reserved(part, size):
                        time.sleep(0.05)  # others are fetching: room comes when they are done
                    try:
                        fetch(part)
                        part.replace(path)
                    finally:
                        part.unlink(missing_ok=True)
        return path

    def use(self, file: str) -> bool:
        """Whether a file is here; it then is the last to go."""
        try:
            os.utime(self.home / file)
            return True
        except FileNotFoundError:
            return False

    def _lock(self, file: str, home: Path | None = None) -> Path:
        return (home or self.home) / ".locks" / file

    def _reserved(self, part: Path, size: int) -> bool:
        """Make room for a file that is about to be written, and an empty beginning of it that says so."""
        self._lock("").mkdir(parents=True, exist_ok=True)
        with _locked(self.root / ".lock"):
            found = [f for f in self.root.glob("*/*") if f.is_file()]
            writing = [f for f in found if f.name.startswith(".")]
            whole = sorted((f for f in found if f not in writing), key=lambda f: f.stat().st_mtime_ns)
            for f in [*writing]:
                if f != part and self._forsaken(f):
                    f.unlink()
                    writing.remove(f)
            held = sum(int(f.name.rpartition(".")[2]) for f in writing if f != part) + sum(f.stat().st_size for f in whole)
            for f in whole:
                if held + size <= self.room:
                    break
                held -= f.stat().st_size
                f.unlink()
            if held + size > self.room and writing:
                return False
            part.touch()
            return True

    def _forsaken(self, part: Path) -> bool:
        """Whether nobody is writing a beginning: its process ended."""
        lock = self._lock(part.name[1:].rpartition(".")[0], part.parent)
        with lock.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
