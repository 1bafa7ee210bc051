"""What a set of shards holds: one gzipped file of JSON lines, the first about the set, then one for each sample.

Shards are tar files that WebDataset reads too: the members of a sample share a name, which is a number, and end in `json` (what
its line here says), `x.npy` or `x.b2nd` (the array, as the cache has it) and the same of each companion. The index knows at
which byte of which shard each array begins, so that a window is read without unpacking.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import re
import shlex
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from meristem.errors import DataError
from meristem.modalities.base import Modality
from meristem.modalities.documents import MISSHAPEN
from meristem.modalities.objects import Objects, Raster
from meristem.platform.data.cache import fingerprint, later
from meristem.platform.data.manifest import Manifest, Problem, Row
from meristem.platform.data.samples import Entry
from meristem.platform.data.shards.remote import Remote

FORMAT = 1
NAME = "index.jsonl.gz"
NAMES = ("class_names", "mask_names", "object_names", "channel_names")  # of a manifest


@dataclass(frozen=True)
class Shard:
    """A tar file: its name, bytes and sha256."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Index:
    """modality: name. options: as asked for, and as the data settled them. digest: of the file; 12 hex digits."""

    modality: str
    options: tuple[Mapping[str, Any], Mapping[str, Any]]
    manifest: Manifest
    entries: Mapping[int, Entry]
    shards: tuple[Shard, ...]
    quarantine: tuple[Problem, ...]
    digest: str

    def settled(self, modality: Modality) -> Modality:
        """The modality that a recipe asks for, with what it leaves open as it was settled when these samples were decoded.

        Raises DataError where it wants them read in another way.
        """
        kind = type(modality)
        if modality.name != self.modality:
            raise DataError("modality", f"the shards hold {self.modality} data, the recipe is for {modality.name}",
                            f"Take a recipe of `meristem recipes list --modality {self.modality}`.")
        asked, settled = (kind(kind.Options.model_validate(options)) for options in self.options)
        if fingerprint(modality) == fingerprint(settled):
            return modality
        if fingerprint(modality) == fingerprint(asked):
            return kind(settled.options.model_copy(update={name: getattr(modality.options, name) for name in later(modality)}))
        wanted, here = (m.options.model_dump(mode="json") for m in (modality, asked))
        other = [key for key in wanted if key not in later(modality) and wanted[key] != here[key]]
        given = " ".join(shlex.quote(f"modality.{self.modality}.{key}={json.dumps(here[key], separators=(',', ':'))}")
                         for key in other)
        raise DataError("options", f"the shards were decoded with other options than the recipe's: {', '.join(other)}"
                        if other else "the shards were decoded by another version of the reader",
                        f"Set {given}, or write the data again with the recipe's." if other else
                        "Write the data again with `meristem data shard`.")


def head(asked: Modality, settled: Modality, manifest: Manifest) -> dict[str, Any]:
    """What the first line says of a set whatever its shards."""
    return {"format": FORMAT, "modality": asked.name, "options": [m.options.model_dump(mode="json") for m in (asked, settled)],
            "manifest": {key: getattr(manifest, key) for key in ("hash", "key_id", *NAMES)}}


def line(row: Row, entry: Entry | None) -> dict[str, Any]:
    """A sample: pseudonyms, labels, split; no name, no path, none of the data's other columns. entry: None if it is lost; it
    is told of all the same, since the split is of all.
    """
    said = {key: getattr(row, key) for key in ("index", "case", "subject", "labels", "split", "rank", "fold", "partners")}
    return {"row": {**said, "fields": sorted(row.fields), "objects": _dump_objects(row.objects)},
            "entry": entry and entry.dump()}


def problem(found: Problem) -> dict[str, Any]:
    return {key: value for key, value in asdict(found).items() if key != "local"}


def text(said: Any) -> bytes:
    """One line."""
    return json.dumps(said, default=lambda v: v.tolist() if hasattr(v, "tolist") else str(v)).encode()


def packed(lines: Sequence[Any]) -> bytes:
    """A file of lines; the same lines give the same bytes."""
    return gzip.compress(b"\n".join(map(text, lines)), mtime=0)


def unpacked(data: bytes, name: str) -> Iterator[Any]:
    """Raises DataError."""
    try:
        yield from map(json.loads, gzip.decompress(data).splitlines())
    except (OSError, EOFError, ValueError, zlib.error):
        raise _damaged(name) from None


def _damaged(name: str) -> DataError:
    return DataError("truncated", f"{name} is cut or damaged", "The same `meristem data shard` writes it again.")


def kind(url: str) -> str:
    """Of which modality shards are. Raises DataError."""
    with gzip.open(io.BytesIO(Remote(url).read(NAME))) as file:
        try:
            return str(json.loads(file.readline())["modality"])
        except (OSError, EOFError, ValueError, KeyError, zlib.error):
            raise _damaged(NAME) from None


def load(url: str) -> Index:
    """Raises DataError, also for what is not as `data shard` writes it: somebody else may have written it."""
    remote = Remote(url)
    data = remote.read(NAME)
    about, *lines = unpacked(data, NAME)
    try:
        if about["format"] != FORMAT:
            raise DataError("format", f"the shards at {remote.where} are of format {about['format']}, not {FORMAT}",
                            "Write them again, or read them with the version that wrote them.")
        return _index(about, lines, hashlib.sha256(data).hexdigest()[:12])
    except MISSHAPEN:
        raise _damaged(NAME) from None


def _index(about: Mapping[str, Any], lines: Sequence[Any], made: str) -> Index:
    shards = tuple(Shard(**s) for s in about["shards"])
    rows = sorted((_row(each["row"]) for each in lines), key=lambda row: row.index)
    entries = {each["row"]["index"]: Entry.load(each["entry"]) for each in lines if each["entry"]}
    sizes = {shard.name: shard.size for shard in shards}
    names = [*sizes, *(row.case for row in rows), *(row.subject for row in rows), *(e.content for e in entries.values())]
    if not entries or not all(re.fullmatch(r"[\w-]+(\.tar)?", name) for name in names):  # they become names of files here
        raise ValueError("names")
    for block in (block for entry in entries.values() for block in entry.blocks().values()):
        end = sizes[block.file] - (0 if block.chunked else block.nbytes)
        if not 0 <= block.offset <= end or np.dtype(block.dtype).hasobject:
            raise ValueError("blocks")
    known: dict[str, Any] = {key: tuple(value) if key in NAMES else value for key, value in about["manifest"].items()}
    known["layout"] = "shards"  # what is beside the files of a layout, as KITTI's calibration, is not in them
    quarantine = tuple(Problem(**p) for p in about["quarantine"])
    asked, settled = about["options"]
    return Index(about["modality"], (asked, settled), Manifest(tuple(rows), **known, problems=quarantine), entries, shards,
                 quarantine, made)


def _row(said: Mapping[str, Any]) -> Row:
    """Its case stands for its name; there are no paths."""
    return Row(said["index"], said["case"], said["subject"], (), said["case"], dict.fromkeys(said["fields"], Path()),
               said["labels"], said["split"], rank=said["rank"], fold=said["fold"], objects=_load_objects(said["objects"]),
               partners=tuple(said["partners"]))


def ranked(rows: Sequence[Row]) -> dict[int, Row]:
    """By index, `rank` saying where each stands in the order of true names, by which subjects are divided."""
    return {row.index: replace(row, rank=place) for place, row in enumerate(sorted(rows, key=lambda r: (r.rank, r.local)))}


def _dump_objects(objects: Objects | None) -> dict[str, Any] | None:
    if objects is None:
        return None
    masks = [{"shape": m.cells.shape, "start": m.start, "cells": base64.b64encode(np.packbits(m.cells).tobytes()).decode()}
             for m in objects.masks]
    return {"box": objects.box.tolist(), "columns": objects.box.shape[1], "label": objects.label.tolist(),
            "ignore": objects.ignore.tolist(), "level": objects.level.tolist(), "masks": masks}


def _load_objects(data: Mapping[str, Any] | None) -> Objects | None:
    if data is None:
        return None
    masks = []
    for m in data["masks"]:
        bits = np.unpackbits(np.frombuffer(base64.b64decode(m["cells"]), np.uint8))
        masks.append(Raster(bits[:int(np.prod(m["shape"]))].reshape(m["shape"]).astype(bool), tuple(m["start"])))
    return Objects(np.array(data["box"], float).reshape(-1, data["columns"]), np.array(data["label"], np.int64),
                   np.array(data["ignore"], bool), np.array(data["level"], np.int64), masks)
