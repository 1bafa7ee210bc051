"""What training and tasks ask of stored samples, wherever their files are."""

from __future__ import annotations

import csv
import math
import os
import secrets
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from meristem.modalities.base import Draw, Header, raw_pad
from meristem.modalities.rng import Rng
from meristem.platform.data.manifest import Problem

TABLE = "table-"  # before a table's name in a sample's arrays
HANDLES = 64  # files and chunked arrays one process keeps open


@dataclass(frozen=True)
class Block:
    """Where an array lies: raw or chunked (blosc2), from a byte of a file on; without a name, in the sample's own files."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int = 0
    chunked: bool = False

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Entry:
    """One stored sample. content: sha256 of its image files. tables: arrays off the lattice. counts: field -> value -> elements
    that have it. fingerprint: by which copies of it are known again, in base64.
    """

    key: str
    content: str
    header: Header
    array: Block
    fields: Mapping[str, Block]
    tables: Mapping[str, Block]
    counts: Mapping[str, Mapping[int, int]]
    fingerprint: str = ""

    @classmethod
    def of(cls, key: str, content: str, header: Header, blocks: Mapping[str, Block], counts: Mapping[str, Mapping[int, int]],
           fingerprint: str) -> Entry:
        """Of its blocks by name: '' the array, those with `TABLE` in front tables, the others fields."""
        fields = {name: b for name, b in blocks.items() if name and not name.startswith(TABLE)}
        tables = {name.removeprefix(TABLE): b for name, b in blocks.items() if name.startswith(TABLE)}
        return cls(key, content, header, blocks[""], fields, tables, counts, fingerprint)

    def stored(self, blocks: Mapping[str, Block]) -> Entry:
        """The same sample with its blocks, of these names, elsewhere."""
        return self.of(self.key, self.content, self.header, blocks, self.counts, self.fingerprint)

    def blocks(self) -> dict[str, Block]:
        """By name, as `of` takes them."""
        return {"": self.array, **self.fields, **{TABLE + name: b for name, b in self.tables.items()}}

    def dump(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def load(cls, data: Mapping[str, Any]) -> Entry:
        h = data["header"]
        header = Header(tuple(h["shape"]), tuple(tuple(row) for row in h["affine"]), tuple(h["spacing"]), tuple(h["scale"]),
                        tuple(h["offset"]), tuple(h["pad"]), h["source"], tuple(tuple(a) for a in h["anchors"]))

        def block(b: Mapping[str, Any]) -> Block:
            return Block(b["file"], b["dtype"], tuple(b["shape"]), b["offset"], b["chunked"])

        fields, tables = ({k: block(b) for k, b in data[name].items()} for name in ("fields", "tables"))
        return cls(data["key"], data["content"], header, block(data["array"]), fields, tables,
                   {name: {int(v): n for v, n in counts.items()} for name, counts in data["counts"].items()},
                   data["fingerprint"])


class Order(NamedTuple):
    """How an epoch goes through n rows. place: (n,) the row that comes next. lane: (n,) of each place in turn, what lies
    together: of a batch, rows of neighbouring lanes go to one rank.
    """

    place: Tensor
    lane: Tensor


class Samples(ABC):
    """The stored samples of a manifest, by row index. Opens files on first use in each process, so it may be forked and sent.

    directory: where what is made of the samples may be kept. quarantine: rows and files that cannot be used, with the reason.
    """

    def __init__(self, directory: Path, entries: Mapping[int, Entry], quarantine: Sequence[Problem] = ()) -> None:
        self.directory, self.entries = directory, dict(entries)
        self.quarantine: tuple[Problem, ...] = tuple(quarantine)
        self._handles: OrderedDict[tuple[int, str, int], Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": OrderedDict()}

    @abstractmethod
    def _file(self, name: str) -> Path:
        """The local path of a file that blocks lie in. Raises DataError."""

    @abstractmethod
    def _outside(self, row: int, draws: Sequence[Draw]) -> list[np.ndarray]:
        """The windows of a sample whose array stayed in its own files. Raises DataError."""

    # ---- who comes when

    @property
    def ordering(self) -> str:
        """What `order` depends on beside its arguments: runs that differ in it do not see the same batches; '' nothing."""
        return ""

    def order(self, rows: Sequence[int], seed: int, epoch: int, window: int) -> Order:
        """Every place of `rows` (sample indices) once, in an order drawn from (seed, epoch). window: shards that are mixed."""
        return Order(Rng.of(seed, epoch, "epoch").permutation("rows", len(rows))[0], torch.zeros(len(rows), dtype=torch.int64))

    def ahead(self, rows: Sequence[int]) -> int:
        """How many rows before their turn `expect` should hear of them."""
        return 0

    def expect(self, rows: Sequence[int]) -> None:
        """These samples will be asked for soon."""
        return

    # ---- what they are

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, row: int) -> bool:
        return row in self.entries

    @property
    def rows(self) -> tuple[int, ...]:
        """Indices of the manifest rows that can be used, ascending."""
        return tuple(sorted(self.entries))

    @property
    def nbytes(self) -> int:
        """Of all stored arrays, before compression."""
        return sum(b.nbytes for e in self.entries.values() for b in e.blocks().values() if b.file)

    def header(self, row: int) -> Header:
        """Without tables."""
        return self.entries[row].header

    def aim(self, row: int, anchors: tuple[tuple[int, ...], ...]) -> None:
        """Let crops of a row that must hold something labelled be drawn about these stored positions."""
        if anchors:
            entry = self.entries[row]
            self.entries[row] = replace(entry, header=replace(entry.header, anchors=anchors))

    def tables(self, row: int) -> dict[str, np.ndarray]:
        """What is stored beside the lattice, by name; not copied where it is mapped into memory."""
        return {name: self._open(block)[...] for name, block in self.entries[row].tables.items()}

    def content(self, row: int) -> str:
        """sha256 of the sample's image files, for the leakage audit."""
        return self.entries[row].content

    def fingerprint(self, row: int) -> str:
        """By which copies of the sample are known again (`Modality.likeness`), in base64; '' where there is none."""
        return self.entries[row].fingerprint

    def fields(self, row: int) -> tuple[str, ...]:
        """Names of the companions that are stored for a row."""
        return tuple(self.entries[row].fields)

    def counts(self, row: int, name: str = "mask") -> dict[int, int]:
        """Label value -> number of elements, of a stored field; empty where the row has none."""
        return dict(self.entries[row].counts.get(name, {}))

    def volume(self, row: int, name: str = "mask") -> float:
        """Foreground (values above 0) of a field in source units, e.g. mm³."""
        elements = sum(n for value, n in self.counts(row, name).items() if value > 0)
        return elements * math.prod(self.header(row).spacing)

    def array(self, row: int) -> np.ndarray:
        """The whole array (C, *S), integers."""
        entry = self.entries[row]
        if not entry.array.file:
            size = entry.header.shape[1:]
            return self.windows(row, [Draw((0,) * len(size), size, size)])[0]
        return np.array(self._open(entry.array)[...])

    def field(self, row: int, name: str) -> np.ndarray:
        """A whole stored companion (*S), integers."""
        return np.array(self._open(self.entries[row].fields[name])[...])

    def windows(self, row: int, draws: Sequence[Draw]) -> list[np.ndarray]:
        """What each look at a sample reads, (C, *size); outside the lattice the integer nearest to the header's pad."""
        entry = self.entries[row]
        if not entry.array.file:
            return self._outside(row, draws)
        stored, pad = self._open(entry.array), partial(raw_pad, entry.header, entry.array.dtype)
        return [_window(stored, entry.array, draw, pad) for draw in draws]

    def field_window(self, row: int, name: str, draw: Draw) -> np.ndarray:
        """What a look at a companion reads, (*size); outside the lattice 0."""
        block = self.entries[row].fields[name]
        return _window(self._open(block), block, draw, partial(np.zeros, 1, block.dtype))

    def write_quarantine(self, path: Path) -> Path:
        """A CSV of case, reason and message; no true names."""
        temporary = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
        with temporary.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("case", "reason", "message"))
            writer.writerows((p.case, p.reason, p.message) for p in self.quarantine)
        temporary.replace(path)
        return path

    def _open(self, block: Block) -> Any:
        """Something that slices like an array."""
        key = (os.getpid(), block.file, block.offset if block.chunked else -1)
        handle = self._handles.get(key)
        if handle is None:
            path = self._file(block.file)
            if block.chunked:  # one thread: a pool does not survive a fork, and loaders have many processes
                import blosc2  # which small samples need not wait for

                handle = blosc2.open(str(path), mode="r", offset=block.offset, mmap_mode="r", dparams={"nthreads": 1})
            else:
                handle = np.asarray(np.memmap(path, np.uint8, "r"))  # slices of a memmap take six times as long to make
            self._handles[key] = handle
            if len(self._handles) > HANDLES:
                self._handles.popitem(last=False)
        self._handles.move_to_end(key)
        if block.chunked:
            return handle
        return handle[block.offset:block.offset + block.nbytes].view(block.dtype).reshape(block.shape)


def _window(stored: Any, block: Block, draw: Draw, pad: Callable[[], np.ndarray]) -> np.ndarray:
    """What a look reads. pad: what lies outside, for each channel; most looks need not ask."""
    if draw.index:
        shown = np.array(draw.index)
        if (shown < 0).all():
            raise ValueError("a look shows nothing")
        first, last = int(shown[shown >= 0].min()), int(shown.max())
        span = Draw((first, *draw.start[1:]), (last - first + 1, *draw.size[1:]), draw.shape)
        axis = len(block.shape) - len(draw.size)
        window = _window(stored, block, span, pad).take(np.maximum(shown - first, 0), axis)
        if (shown < 0).any():
            np.moveaxis(window, axis, 0)[shown < 0] = pad().reshape(-1, *[1] * (len(draw.size) - 1)) if axis else pad()[0]
        return window
    lead = block.shape[:len(block.shape) - len(draw.size)]
    inside, place = [], []
    for a, n, whole in zip(draw.start, draw.size, block.shape[len(lead):], strict=True):
        low, high = max(a, 0), min(a + n, whole)
        inside.append(slice(low, max(low, high)))
        place.append(slice(low - a, max(low, high) - a))
    empty = any(s.stop <= s.start for s in inside)
    if not empty and tuple(s.stop - s.start for s in inside) == tuple(draw.size):
        return np.array(stored[(slice(None),) * len(lead) + tuple(inside)])
    out = np.empty((*lead, *draw.size), block.dtype)
    out[...] = pad().reshape(-1, *[1] * len(draw.size)) if lead else pad()[0]
    if not empty:
        out[(slice(None),) * len(lead) + tuple(place)] = stored[(slice(None),) * len(lead) + tuple(inside)]
    return out
