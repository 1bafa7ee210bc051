"""Which samples there are: files, subjects, splits and labels, found in the layouts people have, under pseudonyms.

A row's `case` and `subject` are keyed hashes (HMAC-SHA256). The key lies outside every run directory, so an artefact that
names `case-3f9a…` says nothing to whoever lacks it. True names stay in memory; `data check --names` alone shows them.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from meristem.errors import DataError, MeristemError
from meristem.modalities.base import Modality, member_files, split_element
from meristem.modalities.documents import MISSHAPEN
from meristem.modalities.objects import Objects
from meristem.platform.data import lists
from meristem.platform.data.annotated import format_of
from meristem.platform.data.layouts import Search, relative, splits_of
from meristem.platform.data.lists import number
from meristem.platform.data.pairs import partners


@dataclass(frozen=True)
class Row:
    """One sample of a manifest.

    case, subject: pseudonyms. paths: one file or a folder of numbered ones, or one per channel; an element of an array file is
    `file.npz#key/17`. fields: companions by name (mask). labels: class index by name (`class`). split: train | val | test, or
    '' when open. local: the true name relative to the data, for `data check --names` only. meta: other columns of a CSV or of
    `participants.tsv`; they may identify a person, so they are in no table. rank: place of the subject among all by true name,
    where a table names it. fold: of a declared cross-validation, the one that tests it; −1 where none is declared. element:
    number of the part of the sample that is meant (a node), where a task counts parts; −1: all of it. other: that of the second
    of a pair of parts. objects: that are annotated in it, none perhaps; None where nobody looked. partners: indices of rows
    that are pairs of it.
    """

    index: int
    case: str
    subject: str
    paths: tuple[Path, ...] = field(repr=False)
    local: str = field(repr=False)
    fields: Mapping[str, Path] = field(default_factory=dict, repr=False)
    labels: Mapping[str, int] = field(default_factory=dict)
    split: str = ""
    meta: Mapping[str, float | str] = field(default_factory=dict, repr=False)
    rank: int = 0
    fold: int = -1
    element: int = -1
    other: int = -1
    objects: Objects | None = field(default=None, repr=False, compare=False)
    partners: tuple[int, ...] = ()

    @property
    def labelled(self) -> bool:
        return bool(self.fields or self.labels) or self.objects is not None

    @property
    def suffix(self) -> str:
        """What tells a part from its sample, in names: `#3`, of a pair `#3-8`; '' of a whole sample."""
        return "" if self.element < 0 else f"#{self.element}" + (f"-{self.other}" if self.other >= 0 else "")

    def part(self, element: int, label: int, split: str, other: int = -1) -> Row:
        """A row of its own for one labelled part of this sample, or for a pair of parts: a case and a subject in itself."""
        row = replace(self, element=element, other=other, labels={"class": label}, fields={}, split=split)
        local = f"{self.local}#{element:09d}" + (f"-{other:09d}" if other >= 0 else "")  # in the order of the numbers
        return replace(row, case=self.case + row.suffix, subject=self.subject + row.suffix, local=local)


@dataclass(frozen=True)
class Problem:
    """A file that cannot be used. message: without true names. local: the true name, for `data check --names` only."""

    case: str
    reason: str
    message: str
    remedy: str = ""
    local: str = field(default="", repr=False)


@dataclass(frozen=True)
class Manifest:
    """The samples of a data set.

    class_names: of the rows' `class` label, by index. mask_names: of the mask's values, by value ('' where unknown).
    object_names: of the classes of annotated objects. channel_names: as the data set declares them.
    layout: which one was recognised. problems: what was found but cannot be a row. hash: of relative names, sizes, labels,
    objects and declared splits, the same wherever the data lies. key_id: of the key behind the pseudonyms; those of two
    manifests can only be compared when it is the same. listed: whether a list says which files are samples. blank: column of a
    CSV -> lines that say nothing in it.
    """

    rows: tuple[Row, ...]
    layout: str
    hash: str
    key_id: str
    class_names: tuple[str, ...] = ()
    mask_names: tuple[str, ...] = ()
    object_names: tuple[str, ...] = ()
    channel_names: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()
    listed: bool = False
    blank: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    @classmethod
    def discover(cls, path: str | Path, modality: Modality) -> Manifest:
        """The samples in a folder, a file, an MSD or nnU-Net `dataset.json`, annotated boxes, a CSV, a list or a MedMNIST npz.

        Raises DataError when nothing is found or the description of the data is wrong.
        """
        path = Path(path).expanduser()
        if not path.is_file() and not path.is_dir():  # a pipe would be waited for
            raise DataError("missing", f"no data at {path}", "Give an existing folder, CSV, dataset.json, npz or data file.")
        search = Search(modality)
        try:
            root = _fill(search, path)
            lists.participants(search, root)
        except (*MISSHAPEN, OSError) as error:
            what = f"what describes the data ({search.layout or 'a list or a JSON'}) is not as its format has it"
            raise DataError("unreadable", f"{what}: {type(error).__name__}",
                            "Correct it; `meristem data check --help` tells the formats.") from None
        if not search.found:
            remedy = f"Files end in {', '.join(modality.suffixes)}; see `meristem data check --help` for the layouts."
            listed = f" ({len(search.lost)} set aside, the first: {search.lost[0][2]})" if search.lost else ""
            raise DataError("empty", f"no {modality.name} data found in {path}{listed}", remedy)
        return _manifest(search, root)

    def select(self, split: str | Sequence[str] | None = None, labelled: bool | None = None) -> list[Row]:
        """The rows of a split (or of several), with or without labels; None: whatever."""
        wanted = (split,) if isinstance(split, str) else split
        return [r for r in self.rows if (wanted is None or r.split in wanted) and (labelled is None or r.labelled == labelled)]

    def with_splits(self, splits: Mapping[int, str]) -> Manifest:
        """The same rows with the splits of these row indices replaced; the hash stays: it is of the data."""
        return replace(self, rows=tuple(replace(r, split=splits.get(r.index, r.split)) for r in self.rows))

    def table(self) -> list[dict[str, Any]]:
        """One plain record per row: pseudonyms, split, labels; no true name, no path, no meta."""
        return [{"index": r.index, "case": r.case, "subject": r.subject, "split": r.split, "labels": dict(r.labels),
                 "fields": sorted(r.fields), "channels": len(r.paths)} for r in self.rows]


def _fill(search: Search, path: Path) -> Path:
    """Add the samples of the layout that a place has; returns what their names are relative to. Raises DataError."""
    root = path.resolve() if path.is_dir() else path.resolve().parent
    inside = search.elements(path) if path.is_file() else None
    if inside is not None:
        search.layout = "file of several samples"
        search.within(path.resolve(), path.name, inside)
    elif format_ := format_of(search, path):
        root = format_.read(search, path.resolve())
    elif path.is_file() and lists.is_list(search, path):
        root = lists.read(search, {path.resolve(): ""})
    elif path.name == "dataset.json" or (path / "dataset.json").is_file():
        search.described(root)
    elif path.suffix.lower() == ".npz" and not search.suffix(path.name):
        search.arrays(path.resolve())
    elif path.is_file():
        search.one(path.resolve())
    elif by_split := lists.of_splits(search, root):
        root = lists.read(search, by_split)
    else:
        archives = [f for f in sorted(path.glob("*.npz")) if not search.suffix(f.name) and splits_of(f)]
        if len(archives) == 1:
            search.arrays(archives[0].resolve())
        else:
            search.folder(root)
    return root


def pseudonym(kind: str, name: str, key: bytes) -> str:
    """`kind-` and 12 hex digits of HMAC-SHA256."""
    return f"{kind}-{hmac.new(key, os.fsencode(name), hashlib.sha256).hexdigest()[:12]}"


def user_key() -> bytes:
    """The key behind all pseudonyms: $MERISTEM_KEY, else a random one kept in the user's configuration folder."""
    if value := os.environ.get("MERISTEM_KEY"):
        return value.encode()
    file = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "meristem" / "key"
    try:
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            fresh = file.with_name(f".key-{secrets.token_hex(4)}")
            fresh.touch(mode=0o600)
            fresh.write_text(secrets.token_hex(32))
            try:
                os.link(fresh, file)  # fails where another process was first: its key holds
            except FileExistsError:
                pass
            finally:
                fresh.unlink()
        return file.read_text().strip().encode()
    except OSError as error:
        raise MeristemError(f"the key for pseudonyms cannot be kept in {file}: {error.strerror}",
                            "Make the folder writable, or set MERISTEM_KEY to a secret of your own.") from None


def _manifest(search: Search, root: Path) -> Manifest:
    key = user_key()
    names = search.class_names or tuple(sorted({f.label for f in search.found if f.label is not None}, key=_class_order))
    index = {name: i for i, name in enumerate(names)}
    ranks = {s: i for i, s in enumerate(sorted({f.subject for f in search.found}))} if search.ranked else {}
    rows, lines = [], []
    sizes: dict[Path, str] = {}
    paired = partners(search)
    for i, f in enumerate(search.found):
        files = (*f.paths, *((f.mask,) if f.mask else ()))
        local = [relative(p, root) for p in files]
        for p in files:
            element = split_element(p)
            file = element[0] if element else p
            if file not in sizes:
                inside = [m.stat().st_size for m in member_files(file, search.members)]
                sizes[file] = f"{sum(inside)} in {len(inside)}" if inside else str(file.stat().st_size)
            local.append(sizes[file])
        labels = {} if f.label is None else {"class": index[f.label]}
        lines.append([*local, f.label or "", f.split, f.subject, *_digested(f.objects), *map(str, paired[i])])
        rows.append(Row(i, pseudonym("case", local[0], key), pseudonym("sub", f.subject, key), f.paths, f.local,
                        {"mask": f.mask} if f.mask else {}, labels, f.split, f.meta, ranks.get(f.subject, 0), f.fold,
                        objects=f.objects, partners=paired[i]))
    digest = hashlib.sha256(json.dumps([lines, names, search.mask_names, *search.object_names]).encode()).hexdigest()[:16]
    problems = tuple(Problem(pseudonym("case", local, key), reason, message, remedy, local)
                     for reason, local, message, remedy in search.lost)
    return Manifest(tuple(rows), search.layout, digest, pseudonym("key", "id", key), names, search.mask_names,
                    search.object_names, search.channel_names, problems, search.by_list, search.blank)


def _digested(objects: Objects | None) -> list[str]:
    """What a manifest's hash knows of a sample's objects."""
    if objects is None:
        return []
    parts = [x.tobytes() for x in (objects.box, objects.label, objects.ignore, objects.level)]
    return [hashlib.sha256(b"".join([*parts, *(mask.key() for mask in objects.masks)])).hexdigest()]


def _class_order(name: str) -> tuple[int, float, str]:
    """Numbers by size, before words."""
    value = number(name)
    return (1, 0.0, name) if isinstance(value, str) else (0, value, name)
