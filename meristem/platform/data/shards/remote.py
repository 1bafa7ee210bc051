"""A folder at a URL of any file system that fsspec knows: tried again where the network fails, and never named with secrets."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import re
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

from meristem.errors import DataError

TRIES = 6
PAUSE = 0.5  # seconds before the second try, twice as long before each further one: 15 in all
EXTRAS = {"s3": "s3", "s3a": "s3"}  # scheme -> extra of this package that brings what it needs
Found = TypeVar("Found")


def is_url(place: str | Path) -> bool:
    """Whether this is a URL (`s3://bucket/folder`) and not a path."""
    return re.match(r"[a-z][a-z0-9+.-]+(://|::)", str(place)) is not None


def masked(url: str) -> str:
    """Without user, password and query, which may hold keys."""
    return re.sub(r"\?\S*", "?***", re.sub(r"//[^/\s]*@", "//***@", url))


class Remote:
    """A folder at a URL, connected to on first use in each process. Raises DataErrors alone, which loader workers can send."""

    def __init__(self, url: str) -> None:
        self.url, self.where = url.rstrip("/"), masked(url.rstrip("/"))

    def __reduce__(self) -> tuple[type[Remote], tuple[str]]:
        return Remote, (self.url,)

    @cached_property
    def _folder(self) -> tuple[Any, str]:
        import fsspec
        from fsspec.registry import known_implementations

        scheme = re.split(r"://|::", self.url)[0]
        try:
            return fsspec.url_to_fs(self.url)
        except ImportError:
            package = re.search(r"[Ii]nstall ([\w-]+)", known_implementations.get(scheme, {}).get("err", ""))
            wanted = f"meristem[{EXTRAS[scheme]}]" if scheme in EXTRAS else package[1] if package else f"what reads {scheme}://"
            raise DataError("package", f"a package that reads {scheme}:// is not installed", f"pip install {wanted}") from None
        except ValueError as error:
            raise DataError("url", f"{self.where} is no address that can be read: {self._said(error)}",
                            "E.g. s3://bucket/folder, https://host/folder or file:///folder.") from None

    def _at(self, name: str) -> tuple[Any, str]:
        """The file system, and a file's path in it; of an address with a query, before that."""
        fs, root = self._folder
        path, mark, query = root.partition("?") if "://" in root else (root, "", "")
        return fs, f"{path.rstrip('/')}/{name}{mark}{query}"

    def size(self, name: str) -> int | None:
        """Bytes of a file, None where there is none."""
        def look() -> int | None:
            fs, path = self._at(name)
            fs.invalidate_cache()
            try:
                return int(fs.info(path)["size"])
            except FileNotFoundError:
                return None

        return self._persist(name, look)

    def read(self, name: str) -> bytes:
        """A whole small file. Raises DataError (missing, permission, network, truncated)."""
        def get() -> bytes:
            fs, path = self._at(name)
            data: bytes = fs.cat_file(path)
            if (size := fs.info(path)["size"]) is not None and len(data) != size:
                raise DataError("truncated", f"of {name} at {self.where} come {len(data):,} of {size:,} bytes", "Try again.")
            return data

        return self._persist(name, get)

    def fetch(self, name: str, size: int, sha256: str, into: Path) -> None:
        """A file onto this machine, checked. Raises DataError (also truncated, checksum, disk)."""
        def get() -> None:
            fs, path = self._at(name)
            fs.get_file(path, str(into))
            if (got := into.stat().st_size) != size:
                raise DataError("truncated", f"{name} at {self.where} has {got:,} bytes, its index says {size:,}",
                                "Write it again with `meristem data shard`.")
            with into.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                    raise DataError("checksum", f"{name} at {self.where} is not what its index says: another checksum",
                                    "Write it again with `meristem data shard`.")

        self._persist(name, get)

    def put(self, path: Path, name: str) -> str:
        """Store a file of this machine, and read it back. Returns its sha256."""
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()

        def give() -> None:
            fs, there = self._at(name)
            fs.makedirs(there.rpartition("/")[0], exist_ok=True)
            fs.put_file(str(path), there)
            with fs.open(there, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                    raise DataError("checksum", f"{name} at {self.where} came back changed", "Is the storage sound?")

        self._persist(name, give)
        return sha256

    def write(self, data: bytes, name: str) -> None:
        """Store a small file."""
        def give() -> None:
            fs, there = self._at(name)
            fs.makedirs(there.rpartition("/")[0], exist_ok=True)
            fs.pipe_file(there, data)

        self._persist(name, give)

    def remove(self, name: str) -> None:
        def take() -> None:
            fs, path = self._at(name)
            if fs.exists(path):
                fs.rm_file(path)

        self._persist(name, take)

    def _persist(self, name: str, once: Callable[[], Found]) -> Found:
        """What `once` returns, at one of several tries. Raises DataError, at once where another try cannot help."""
        for attempt in range(1, TRIES + 1):
            try:
                return once()
            except Exception as error:  # each file system has errors of its own
                final = self._hopeless(name, error)
                if final is None and attempt == TRIES:
                    final = error if isinstance(error, DataError) else DataError(
                        "network", f"{name} at {self.where} cannot be reached in {TRIES} tries: {self._said(error)}",
                        "Check the address and the network; the same command, a run with --resume, goes on.")
                if final is not None:
                    raise final from None
            time.sleep(PAUSE * 2 ** (attempt - 1) * random.SystemRandom().uniform(0.5, 1))  # not the run's numbers
        raise AssertionError

    def _hopeless(self, name: str, error: Exception) -> DataError | None:
        """What to raise of an error that another try would meet again; None of one that may pass."""
        status, kind = getattr(error, "status", None), type(error).__name__
        if isinstance(error, DataError):
            return None if error.reason in ("truncated", "checksum") else error
        if isinstance(error, PermissionError) or status in (401, 403) or "Credentials" in kind:
            return DataError("permission", f"{name} at {self.where} may not be read or written: {self._said(error)}",
                             "Give credentials as the storage's own tools want them, e.g. AWS_PROFILE; see docs/streaming.md.")
        if isinstance(error, FileNotFoundError) or status in (404, 410):
            return DataError("missing", f"there is no {name} at {self.where}",
                             "Check the address: it is the folder that `meristem data shard --out` wrote.")
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            return DataError("disk", f"{name} cannot be stored: {os.strerror(error.errno)}",
                             "Give another place with --cache, or a smaller --room.")
        if isinstance(error, NotImplementedError):
            return DataError("url", f"{self.where} is of a kind that cannot be written", "Write to s3://, gs:// or file://.")
        return None

    def _said(self, error: Exception) -> str:
        """An error's own words, without what the URL has of secrets."""
        text = f"{type(error).__name__} {error}".strip().splitlines()[0]
        secrets = re.findall(r"//([^/]*)@", self.url) + re.findall(r"\?(.*)", self.url)
        parts = {part for secret in secrets for part in (secret, *re.split(r"[:&=]", secret)) if len(part) > 2}
        for part in sorted(parts | {unquote(part) for part in parts}, key=len, reverse=True):
            text = text.replace(part, "***")
        return masked(text)
