"""Decoded samples on disk: integers in chunks, so that a random window does not decode a file.

Small samples are packed raw into shared files and memory-mapped; a large one is a blosc2 array of its own. Entries are named
by what they were made of (content of the files × options of the modality × version of the reader), so they are valid or
absent, never stale; data is written under a temporary name, synced and renamed, and its index file after it.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from meristem.errors import DataError, MeristemError
from meristem.modalities import npy
from meristem.modalities.base import Draw, Modality, Sample, member_files, split_element
from meristem.platform.data.manifest import Manifest, Problem, Row, pseudonym, user_key
from meristem.platform.data.samples import TABLE, Block, Entry, Samples
from meristem.platform.data.workers import DEATH, killed, lose_nothing, notice_deaths_where_waited

LAYOUT = 4  # of the files in a cache; another number, another folder
LARGE = 4 << 20  # bytes above which a sample gets a chunked file: below, reading it raw is cheaper than opening one
CHUNK, BLOCK = 1 << 18, 1 << 15  # elements (64³, 32³): a crop unpacks only the blocks it touches
MUCH = 16 << 20  # bytes of files from which on starting processes to decode them pays
TOGETHER = 16  # samples that a process hands over at once, where there are many: each time has its price
SHARD_BYTES, SHARD_SECONDS = 64 << 20, 30.0  # an interruption loses at most this much work on small samples
FREE = (0.05, 2 << 30)  # what is left free: a share of the disk, at most so many bytes
Progress = Callable[[int, int], None]


class Cache(Samples):
    """Samples that were decoded into files of this machine.

    modality, sources: who decodes, and from where, the samples that stayed in their own files. reused: entries that were there
    before the build.
    """

    def __init__(self, directory: Path, entries: Mapping[int, Entry], modality: Modality,
                 sources: Mapping[int, Sequence[Path]] = {}, quarantine: Sequence[Problem] = (), reused: int = 0) -> None:
        super().__init__(directory, entries, quarantine)
        self._modality, self._sources, self.reused = modality, dict(sources), reused

    @classmethod
    def build(cls, manifest: Manifest, modality: Modality, directory: Path | None = None,
              progress: Progress | None = None, workers: int | None = None) -> Cache:
        """Decode the rows that are not yet stored.

        directory: where caches live (default $XDG_CACHE_HOME/meristem); each set of modality options has its own folder in
        it. progress: called with (rows done, rows). workers: processes that decode (0: this one; None: as many as pay).
        A row that cannot be read, or whose images equal an earlier row's, is quarantined and the rest goes on; of equal rows
        the one in test is kept before val before train, and the labelled before the unlabelled. Raises MeristemError when
        the disk would run full, DataError when nothing can be read.
        """
        made_by = fingerprint(modality)
        home = (directory or user_cache()) / f"{modality.name}-{made_by}"
        with _locked(home):
            known = _stored(home)
            problems = list(manifest.problems)
            digests = contents(manifest.rows, problems, workers or 0, home / "digests.json", modality.members,
                               getattr(modality, "beside", None))
            kept = distinct([r for r in manifest.rows if r.index in digests], digests, problems)
            keys = {r.index: key(digests[r.index], made_by) for r in kept}
            todo = [r for r in kept if keys[r.index] not in known]
            done, reused = len(manifest) - len(todo), len(kept) - len(todo)
            if progress:
                progress(done, len(manifest))
            decoding = Decoding(todo, [digests[r.index][0] for r in todo], [keys[r.index] for r in todo], modality, home)
            shard = _Shard(home)
            try:
                for result in each(decoding, processes(todo) if workers is None else workers):
                    if isinstance(result, Problem):
                        problems.append(result)
                    else:
                        entry, arrays = result
                        known[entry.key] = entry if arrays is None else shard.add(entry, arrays)
                    done += 1
                    if progress:
                        progress(done, len(manifest))
                    if shard.full:
                        _leave_room(home)
                        shard.write()
            finally:
                shard.write()
            entries = {i: known[key] for i, key in keys.items() if key in known}
            sources = {r.index: r.paths for r in kept if r.index in entries and not entries[r.index].array.file}
            cache = cls(home, entries, modality, sources, sorted(problems, key=lambda p: p.case), reused)
            cache.write_quarantine(home / "quarantine.csv")
        if not entries:
            reasons = ", ".join(sorted({p.reason for p in problems}))
            raise DataError("empty", f"none of {len(manifest)} samples can be used ({reasons})",
                            "`meristem data check --names` names each file and what is wrong with it.")
        return cache

    def windows(self, row: int, draws: Sequence[Draw]) -> list[np.ndarray]:
        """As `Samples.windows`. Raises DataError where a file that was there is no longer."""
        try:
            return super().windows(row, draws)
        except (DataError, OSError) as error:
            reason, what = (error.reason, error.what) if isinstance(error, DataError) else ("unreadable", error.strerror)
            raise DataError(reason, f"sample {row}, read before, cannot be read now: {what}",
                            "Put its file back as it was, or start a run without it; --resume goes on.") from None

    def _file(self, name: str) -> Path:
        return self.directory / name

    def _outside(self, row: int, draws: Sequence[Draw]) -> list[np.ndarray]:
        return self._modality.fetch(self._sources[row], self.entries[row].header, draws)


def user_cache() -> Path:
    """Where decoded samples are kept unless somebody says otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "meristem"


def later(modality: Modality) -> set[str]:
    """The options that only say what becomes of samples once they are read."""
    cut = getattr(modality.options, "tokens", "") == "patch"  # those of channels let files have fewer
    return {*getattr(modality, "later", ()), *(["tokens"] if cut else [])}


def fingerprint(modality: Modality) -> str:
    """Of all that decides what a decoded file looks like: options, version of the reader, layout of the cache."""
    options = {name: x for name, x in modality.options.model_dump(mode="json").items() if name not in later(modality)}
    made_by = [modality.name, options, getattr(modality, "version", 0), LAYOUT]
    return hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:12]


def decode(row: Row, modality: Modality) -> Sample | Problem:
    """Read a row and check what was read; what is wrong comes back as a Problem without true names."""
    try:
        sample = modality.read(row.paths, row.fields)
        shape = tuple(sample.header.shape)
        if sample.array is not None and sample.array.shape != shape:
            raise DataError("shape", f"the reader gave shape {sample.array.shape} but announced {shape}",
                            "Report it: the reader is wrong.")
        for name, companion in sample.fields.items():
            if companion.shape != shape[1:]:
                raise DataError("shape", f"{name} has shape {companion.shape}, the image {shape[1:]}",
                                "Both must lie on one lattice.")
            sample.fields[name] = _smallest(companion)
        return sample
    except DataError as error:
        return Problem(row.case, error.reason, _anonymous(error.what, row), error.remedy, row.local)
    except MemoryError:
        return Problem(row.case, "memory", "does not fit into memory", "Use fewer workers, or a coarser spacing.", row.local)
    except Exception as error:  # a decoder may raise anything on a broken file; it is reported, never dropped
        message = f"cannot be decoded ({type(error).__name__})"  # what it says may quote the file
        return Problem(row.case, "unreadable", message, "Export the file again.", row.local)


def _anonymous(message: str, row: Row) -> str:
    """The message without any part of the row's true names."""
    paths = [*row.paths, *row.fields.values()]
    names = {str(p) for p in paths} | {str(p.parent) for p in paths} | {p.name for p in paths}
    names |= {p.name.split(".")[0] for p in paths} | set(Path(row.local).parts)
    for name in sorted((n for n in names if len(n) > 1), key=len, reverse=True):
        message = re.sub(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])", row.case, message)
    return message


# ---- building

Result = Problem | tuple[Entry, dict[str, np.ndarray] | None]


class Decoding(Dataset[Result | MeristemError]):
    """Row -> its entry and arrays; None for arrays that were written where they were decoded, because they are large. An error
    that ends the building is handed over too: torch would put a traceback of its process into it."""

    def __init__(self, rows: Sequence[Row], contents: Sequence[str], keys: Sequence[str], modality: Modality,
                 home: Path) -> None:
        self.rows, self.contents, self.keys, self.modality, self.home = rows, contents, keys, modality, home

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Result | MeristemError:
        try:
            return self._decoded(i)
        except MeristemError as error:
            return error

    def _decoded(self, i: int) -> Result:
        row, key = self.rows[i], self.keys[i]
        sample = decode(row, self.modality)
        if isinstance(sample, Problem):
            return sample
        tables = {f"{TABLE}{name}": x for name, x in sample.tables.items()}
        arrays = {name: np.ascontiguousarray(x) for name, x in {"": sample.array, **sample.fields, **tables}.items()
                  if x is not None}
        counts = {name: {int(v): int(n) for v, n in zip(*np.unique(x, return_counts=True), strict=True)}
                  for name, x in sample.fields.items()}
        large = max((x.nbytes for x in arrays.values()), default=0) > LARGE
        blocks = {"": Block("", "|u1", tuple(sample.header.shape))}
        for name, x in arrays.items():
            file = f"{key}{'.' + name if name else ''}.b2nd" if large else ""
            blocks[name] = Block(file, x.dtype.str, x.shape, chunked=large)
            if large:
                _leave_room(self.home)
                _write_chunked(self.home / file, x, x.ndim if name.startswith(TABLE) else len(sample.header.shape) - 1)
        entry = Entry.of(key, self.contents[i], sample.header, blocks, counts, base64.b64encode(sample.fingerprint).decode())
        if large:
            _write_index(self.home / f"{key}.json", [entry])
            return entry, None
        return entry, arrays


def processes(rows: Sequence[Row]) -> int:
    """How many processes decode some rows: one for each core where there is enough to do for all, else this one alone."""
    cores = os.cpu_count() or 1
    size = sum(file.stat().st_size for row in rows for path in row.paths
               for file in (path.iterdir() if path.is_dir() else (path,)) if file.is_file())  # an element of a file is none
    return cores if cores > 1 and len(rows) >= 2 * cores and size >= MUCH else 0


def each(decoding: Decoding, workers: int) -> Iterator[Result]:
    """What becomes of each row, in order. Raises MeristemError where a process that decodes is killed."""
    if not len(decoding):
        return
    # a generator of its own: DataLoader would draw a seed from the global one and shift everything after it
    together = min(max(len(decoding) // (8 * workers), 1), TOGETHER) if workers else 1
    stream = iter(DataLoader(decoding, together, num_workers=workers, collate_fn=_same, generator=torch.Generator(),
                             worker_init_fn=_leave_interrupts_to_the_parent))
    if workers:
        notice_deaths_where_waited()
    try:
        for results in stream:
            for result in results:
                if isinstance(result, MeristemError):
                    raise result
                yield result
    except DEATH as error:
        if not killed(error):
            raise
        raise MeristemError("a process that decodes files was killed", "Memory may be short: close other programs, or decode "
                            "on a larger machine. What was decoded is kept: start again.") from None


def _leave_interrupts_to_the_parent(worker: int) -> None:
    lose_nothing()
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _same(x: Any) -> Any:
    return x


class _Shard:
    """Small samples gathered in memory until they are written as one packed file and its index."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self._clear()

    def _clear(self) -> None:
        self.name = f"packed-{secrets.token_hex(8)}"
        self.parts: list[bytes] = []
        self.entries: list[Entry] = []
        self.nbytes, self.began = 0, time.monotonic()

    @property
    def full(self) -> bool:
        return bool(self.entries) and (self.nbytes >= SHARD_BYTES or time.monotonic() - self.began >= SHARD_SECONDS)

    def add(self, entry: Entry, arrays: Mapping[str, np.ndarray]) -> Entry:
        entry = entry.stored({"": entry.array} | {name: self._append(x) for name, x in arrays.items()})
        self.entries.append(entry)
        return entry

    def _append(self, x: np.ndarray) -> Block:
        block = Block(f"{self.name}.bin", x.dtype.str, x.shape, self.nbytes)
        data = x.tobytes()
        data += bytes(-len(data) % 64)  # aligned to cache lines
        self.parts.append(data)
        self.nbytes += len(data)
        return block

    def write(self) -> None:
        if self.entries:
            if self.parts:
                _write(self.home / f"{self.name}.bin", self.parts)
            _write_index(self.home / f"{self.name}.json", self.entries)
        self._clear()


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A temporary name, which becomes the file's own once all is on disk. Raises MeristemError where that does not take it."""
    temporary = path.with_name(f".{secrets.token_hex(4)}-{path.name}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # blosc2 has its own word
        temporary.unlink(missing_ok=True)
        raise _unwritable(error) from None


def _unwritable(error: OSError | RuntimeError) -> MeristemError:
    why = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else "the disk takes no more"
    return MeristemError(f"the cache cannot be written: {why}", "Make room on the disk, or give another place with --cache; "
                         "what is stored stays valid.")


def _write(path: Path, parts: Iterable[bytes]) -> None:
    with _whole(path) as temporary, temporary.open("wb") as file:
        file.writelines(parts)


def _write_index(path: Path, entries: Sequence[Entry]) -> None:
    def plain(x: Any) -> Any:
        return x.tolist() if hasattr(x, "tolist") else str(x)

    _write(path, [json.dumps([e.dump() for e in entries], default=plain).encode()])


def _write_chunked(path: Path, x: np.ndarray, dims: int) -> None:
    """LZ4: measured, a crop comes twice as fast as with ZSTD, for a sixth more space."""
    import blosc2

    lead = (1,) * (x.ndim - dims)  # the channel axis, where there is one

    def tile(elements: int) -> tuple[int, ...]:
        edge = 1 << round(math.log2(elements) / dims)
        return lead + tuple(min(edge, n) for n in x.shape[len(lead):])

    settings = {"codec": blosc2.Codec.LZ4, "clevel": 5, "filters": [blosc2.Filter.SHUFFLE], "nthreads": 1}
    with _whole(path) as temporary:
        stored = blosc2.empty(x.shape, x.dtype, urlpath=str(temporary), mode="w", chunks=tile(CHUNK), blocks=tile(BLOCK),
                              cparams=settings)
        stored[...] = x  # the bytes of blosc2.asarray, which goes chunk by chunk in Python, in two thirds of its time


def _smallest(x: np.ndarray) -> np.ndarray:
    """Labels as uint8, or int16 where they do not fit. Raises DataError for values that fit neither."""
    if x.dtype in (np.uint8, np.int16):
        return x
    if not np.array_equal(x, np.rint(x)):
        raise DataError("label", "label values are not whole numbers", "Export the labels without interpolation.")
    low, high = (int(x.min()), int(x.max())) if x.size else (0, 0)
    for kind in (np.uint8, np.int16):
        if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
            return x.astype(kind)
    raise DataError("label", f"label values from {low} to {high} do not fit 16 bits", "Number the classes from 0.")


def _stored(home: Path) -> dict[str, Entry]:
    """All entries of a folder whose data is there; leftovers of an interrupted write are cleared away."""
    for leftover in home.glob(".*"):
        if leftover.name != ".lock":
            leftover.unlink(missing_ok=True)
    sizes = {f.name: f.stat().st_size for f in home.iterdir()}
    known = {}
    for index in sorted(home.glob("*.json")):
        if index.name == "digests.json":
            continue
        for data in json.loads(index.read_text()):
            entry = Entry.load(data)
            stored = [b for b in entry.blocks().values() if b.file]
            if all(b.file in sizes and (b.chunked or b.offset + b.nbytes <= sizes[b.file]) for b in stored):
                known[entry.key] = entry
    return known


@contextmanager
def _locked(home: Path) -> Iterator[None]:
    """One process builds, others wait and then find its entries. Raises MeristemError where nothing can be written."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        opened = (home / ".lock").open("w")
    except OSError as error:
        raise _unwritable(error) from None
    with opened as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _leave_room(home: Path) -> None:
    disk = shutil.disk_usage(home)
    share, most = FREE
    if disk.free < min(share * disk.total, most):
        raise MeristemError(f"the cache would fill the disk: {disk.free / 2**30:.1f} of {disk.total / 2**30:.1f} GiB are left",
                            "Give another place with --cache, or remove old folders of the cache; what is stored stays valid.")


# ---- contents

Digest = tuple[str, tuple[str, ...]]  # of the images together, of each companion


def contents(rows: Sequence[Row], problems: list[Problem], workers: int = 0, memory: Path | None = None,
             members: Sequence[str] = (), beside: Callable[[Path], Sequence[Path]] | None = None,
             progress: Progress | None = None) -> dict[int, Digest]:
    """Row index -> hashes of its files; what cannot be read is added to `problems`.

    memory: a file in which hashes are kept; a data file whose size and time of change are in it is not read again. members:
    suffixes of the files that count where a path is a folder. beside: the other files that one is read with.
    """
    remembered: dict[str, str] = json.loads(memory.read_text()) if memory and memory.is_file() else {}
    secret = user_key()

    def one(path: Path) -> str:
        element = split_element(path)
        file = element[0] if element else path
        inside = member_files(file, members)
        if beside and not inside and (others := [f for f in beside(file) if f.is_file()]):
            inside = [file, *others]
        place = "|".join(f"{f}|{s.st_size}|{s.st_mtime_ns}" for f in inside or [file] for s in [f.stat()])
        name = pseudonym("file", f"{path}|{place}", secret)
        if name not in remembered:
            remembered[name] = (_element_digest(place, *element) if element and file.suffix == ".npz" else
                                hashlib.sha256(f"{one(file)}|{element[1:]}".encode()).hexdigest() if element else
                                _folder_digest(inside) if inside else _file_digest(file))
        return remembered[name]

    def all_of(row: Row) -> Digest | Problem:
        try:
            images = [one(p) for p in row.paths]
            content = images[0] if len(images) == 1 else hashlib.sha256("|".join(images).encode()).hexdigest()
            return content, tuple(f"{name}:{one(p)}" for name, p in sorted(row.fields.items()))
        except DataError as error:
            return Problem(row.case, error.reason, _anonymous(error.what, row), error.remedy, row.local)
        except (OSError, ValueError, KeyError, IndexError) as error:
            message = f"cannot be read ({type(error).__name__}: {_anonymous(getattr(error, 'strerror', None) or '', row)})"
            return Problem(row.case, "unreadable", message, "Check the file and its permissions.", row.local)

    found = []
    with ThreadPoolExecutor(workers + 1) as pool:
        for done, digest in enumerate(pool.map(all_of, rows), 1):
            found.append(digest)
            if progress:
                progress(done, len(rows))
    problems += [f for f in found if isinstance(f, Problem)]
    if memory:
        _write(memory, [json.dumps(remembered).encode()])
    return {row.index: f for row, f in zip(rows, found, strict=True) if not isinstance(f, Problem)}


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _folder_digest(files: Sequence[Path]) -> str:
    """Of names and contents, in the order given: frames shown in another order are another sample."""
    return hashlib.sha256("|".join(f"{f.name}:{_file_digest(f)}" for f in files).encode()).hexdigest()


def _element_digest(place: str, file: Path, key: str, index: int) -> str:
    return hashlib.sha256(_member(place, file, key)[index].tobytes()).hexdigest()


@lru_cache(maxsize=4)
def _member(place: str, file: Path, key: str) -> np.ndarray:
    """A whole array of an npz; `place` changes when the file does."""
    return npy.read(file, key)


def distinct(rows: Sequence[Row], digests: Mapping[int, Digest], problems: list[Problem]) -> list[Row]:
    """One row per content, the others quarantined. Test and validation sets stay whole: training loses its copies."""
    first: dict[str, Row] = {}
    order = {"test": 0, "val": 1}
    for row in sorted(rows, key=lambda r: (order.get(r.split, 2), not r.labelled, r.index)):
        content = digests[row.index][0]
        if content in first:
            problems.append(Problem(row.case, "duplicate", f"holds the same bytes as {first[content].case}",
                                    "Remove one of them.", row.local))
        else:
            first[content] = row
    return sorted(first.values(), key=lambda r: r.index)


def key(digest: Digest, made_by: str) -> str:
    return hashlib.sha256("|".join((digest[0], *digest[1], made_by)).encode()).hexdigest()[:32]
