"""Decoded samples into shards at a URL: each whole or absent, read back once written, gone on with where it was stopped."""

from __future__ import annotations

import hashlib
import io
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from meristem.errors import DataError
from meristem.modalities.base import Modality
from meristem.modalities.rng import Rng
from meristem.platform.data.cache import Decoding, Progress, contents, distinct, each, fingerprint, key, user_cache
from meristem.platform.data.manifest import Manifest, Problem, Row
from meristem.platform.data.samples import Block, Entry
from meristem.platform.data.shards import index
from meristem.platform.data.shards.index import Shard
from meristem.platform.data.shards.remote import Remote


@dataclass
class Written:
    """What there is of a set: the lines of its samples, its shards, what cannot be used. tried: samples that were looked at, in
    the order of writing. reused: shards that were there before.
    """

    lines: list[Any] = field(default_factory=list)
    shards: list[Shard] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    tried: int = 0
    reused: int = 0


def write(path: Path, modality: Modality, url: str, size: int, cache: Path | None = None, progress: Progress | None = None,
          workers: int = 0) -> Written:
    """Shards of `size` bytes or a sample more, and their index.

    This machine holds one shard at a time; `cache` keeps the hashes of files. Samples are dealt to shards at random, so that
    each is a fair sample of the set; those of another declared split, and those with and without labels, go to shards of their
    own, so that who reads some does not fetch the others. A shard counts once the lines of its samples lie beside it, all do
    once the index is there. progress: called with (samples, of all).
    Raises DataError, also where the shards of another set are at the URL.
    """
    manifest = Manifest.discover(path, modality)
    settled = modality.fitted([p for row in manifest.rows for p in row.paths])
    made_by, home, remote = fingerprint(settled), (cache or user_cache()) / "sharding", Remote(url)
    home.mkdir(parents=True, exist_ok=True)
    lost = list(manifest.problems)
    digests = contents(manifest.rows, lost, workers, home / "digests.json", settled.members, getattr(settled, "beside", None))
    kept = distinct([row for row in manifest.rows if row.index in digests], digests, lost)
    order, rows = _dealt(kept), index.ranked(manifest.rows)
    about = index.head(modality, settled, manifest)
    about["made"] = hashlib.sha256(index.text([about, made_by, size, [(r.index, digests[r.index]) for r in order]])).hexdigest()
    done = _found(remote, about["made"])
    if done is not None:
        return done
    done = _begun(remote, about["made"])
    with tempfile.TemporaryDirectory(dir=home) as folder:
        todo = order[done.tried:]
        decoding = Decoding(todo, [digests[row.index][0] for row in todo], [key(digests[row.index], made_by) for row in todo],
                            settled, Path(folder))
        making = _Making(Path(folder), len(done.shards))
        for row, result in zip(todo, each(decoding, workers), strict=True):
            if making.lines and (making.nbytes >= size or _kind(row) != _kind(order[done.tried - 1])):
                _store(remote, done, making, about["made"])
                making = _Making(Path(folder), len(done.shards))
            if isinstance(result, Problem):
                making.problems.append(result)
            else:
                making.add(rows[row.index], *result, modality.name)
            done.tried += 1
            if progress:
                progress(done.tried, len(order))
        if making.lines:
            _store(remote, done, making, about["made"])
    if not done.lines:
        raise DataError("empty", f"none of {len(manifest)} samples can be used",
                        "`meristem data check --names` names each file and what is wrong with it.")
    last = [] if making.lines else making.problems  # of the samples after the last shard
    done.problems = sorted([*lost, *done.problems, *last], key=lambda p: p.case)
    here = {line["row"]["index"] for line in done.lines}
    missing = [index.line(row, None) for i, row in rows.items() if i not in here]
    remote.write(index.packed([{**about, **_told(done.shards, done.problems, done.tried)}, *done.lines, *missing]), index.NAME)
    for number in range(len(done.shards)):
        remote.remove(_beside(number))
    return done


def _kind(row: Row) -> tuple[str, bool]:
    """Samples of two kinds are in no shard together."""
    return row.split, row.labelled


def _dealt(rows: Sequence[Row]) -> list[Row]:
    at = Rng.of(0, 0, "shards").permutation("rows", len(rows))[0].tolist()
    return sorted((rows[i] for i in at), key=_kind)


def _beside(number: int) -> str:
    """Of the lines of a shard, until all are in the index."""
    return f"shard-{number:05d}.jsonl.gz"


def _told(shards: Sequence[Shard], problems: Sequence[Problem], tried: int) -> dict[str, Any]:
    return {"shards": [vars(s) for s in shards], "quarantine": [index.problem(p) for p in problems], "tried": tried}


def _store(remote: Remote, done: Written, making: _Making, made: str) -> None:
    """A shard, then its lines."""
    making.tar.close()
    shard = Shard(making.name, making.path.stat().st_size, remote.put(making.path, making.name))
    about = {"made": made, **_told([shard], making.problems, done.tried)}
    remote.write(index.packed([about, *making.lines]), _beside(len(done.shards)))
    making.path.unlink()
    done.shards.append(shard)
    done.lines += making.lines
    done.problems += making.problems


def _found(remote: Remote, made: str) -> Written | None:
    """A set that is whole; None where there is none."""
    if remote.size(index.NAME) is None:
        return None
    try:
        about, *lines = index.unpacked(remote.read(index.NAME), index.NAME)
    except DataError as error:
        if error.reason == "truncated":  # stopped while it was written
            return None
        raise
    done = _read(remote, about, [line for line in lines if line["entry"]], made)
    if done is None:
        raise DataError("missing", f"shards at {remote.where} are missing or cut",
                        f"Remove {index.NAME} there; the same command then writes the set again.")
    return done


def _begun(remote: Remote, made: str) -> Written:
    """What is left of a set whose writing was stopped; from the first damaged shard on all is written again."""
    done = Written()
    while remote.size(_beside(len(done.shards))) is not None:
        try:
            about, *lines = index.unpacked(remote.read(_beside(len(done.shards))), _beside(len(done.shards)))
        except DataError as error:
            if error.reason != "truncated":
                raise
            break
        part = _read(remote, about, lines, made)
        if part is None:
            break
        done = Written(done.lines + lines, done.shards + part.shards, done.problems + part.problems, part.tried,
                       done.reused + 1)
    return done


def _read(remote: Remote, about: Mapping[str, Any], lines: list[Any], made: str) -> Written | None:
    """None where a shard is not there whole. Raises DataError where it is of another set."""
    if about.get("made") != made:
        raise DataError("other", f"{remote.where} holds shards of other data, or of other settings",
                        "Choose another --out, or empty this one.")
    shards = [Shard(**s) for s in about["shards"]]
    if any(remote.size(s.name) != s.size for s in shards):
        return None
    return Written(lines, shards, [Problem(**p) for p in about["quarantine"]], about["tried"], len(shards))


class _Making:
    """A shard in the making, on this machine."""

    def __init__(self, folder: Path, number: int) -> None:
        self.folder, self.name = folder, f"shard-{number:05d}.tar"
        self.path = folder / self.name
        self.tar = tarfile.TarFile(self.path, "w", format=tarfile.USTAR_FORMAT)
        self.lines: list[Any] = []
        self.problems: list[Problem] = []

    @property
    def nbytes(self) -> int:
        return self.tar.offset

    def add(self, row: Row, entry: Entry, arrays: Mapping[str, np.ndarray] | None, modality: str) -> None:
        """arrays: by the names of the entry's blocks; None where they are chunked files in the folder."""
        if not entry.array.file and "" not in (arrays or {}):
            raise DataError("outside", f"{row.case} stays in its own file, and a shard holds decoded samples",
                            f"Set modality.{modality}.store=decoded, and modality.{modality}.resize to a smaller picture.")
        blocks: dict[str, Block] = {}
        for name, block in entry.blocks().items():
            member = f"{row.index:08d}.{name or 'x'}"
            if block.file:
                stored = self.folder / block.file
                begin = self._append(f"{member}.b2nd", stored.read_bytes())
                blocks[name] = replace(block, file=self.name, offset=begin)
                stored.unlink()
            else:
                assert arrays is not None
                x, buffer = arrays[name], io.BytesIO()
                np.save(buffer, x)
                end = self._append(f"{member}.npy", buffer.getvalue()) + buffer.tell()
                blocks[name] = Block(self.name, x.dtype.str, x.shape, end - x.nbytes)
        self.lines.append(index.line(row, entry.stored(blocks)))
        self._append(f"{row.index:08d}.json", index.text(self.lines[-1]))

    def _append(self, name: str, data: bytes) -> int:
        """Where in the file the data begins."""
        about = tarfile.TarInfo(name)
        about.size = len(data)
        begin = self.tar.offset + tarfile.BLOCKSIZE
        self.tar.addfile(about, io.BytesIO(data))
        return begin
