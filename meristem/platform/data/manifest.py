"""Which samples there are: files, subjects, splits and labels, found in the layouts people have, under pseudonyms.

A row's `case` and `subject` are keyed hashes (HMAC-SHA256). The key lies outside every run directory, so an artefact that
names `case-3f9a…` says nothing to whoever lacks it. True names stay in memory, and are shown by `data check` only.
"""

from __future__ import annotations

import csv
import hashlib
import hmac
import json
import os
import re
import secrets
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from meristem.errors import DataError, MeristemError
from meristem.modalities.base import Modality

MASK_FOLDERS = {"images": ("labels", "masks"), "imagestr": ("labelstr",), "imagests": ("labelsts",)}
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val",
          "test": "test", "testing": "test", "imagests": "test"}
MASK_SUFFIXES = (".png", ".gif", ".bmp", ".tif", ".tiff")  # likeliest first: a mask is stored without loss
PAIRED = 0.8  # of a folder's stems must come as image and mask, or the second suffix is just another image


@dataclass(frozen=True)
class Row:
    """One sample of a manifest.

    case, subject: pseudonyms. paths: one file, or one per channel; an element of an array file is `file.npz#key/17`.
    fields: companions by name (mask). labels: class index by name (`class`). split: train | val | test, or '' when open.
    local: the true name relative to the data, for `data check` only. meta: other columns of a CSV; they may identify a
    person, so they are in no table.
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

    @property
    def labelled(self) -> bool:
        return bool(self.fields or self.labels)


@dataclass(frozen=True)
class Problem:
    """A file that cannot be used. message: without true names. local: the true name, for `data check` only."""

    case: str
    reason: str
    message: str
    remedy: str = ""
    local: str = field(default="", repr=False)


@dataclass(frozen=True)
class Manifest:
    """The samples of a data set.

    class_names: of the rows' `class` label, by index. mask_names: of the mask's values, by value ('' where unknown).
    channel_names: as the data set declares them. layout: which one was recognised. problems: what was found but cannot be a
    row. hash: of relative names, sizes, labels and declared splits, the same wherever the data lies. key_id: of the key behind
    the pseudonyms; those of two manifests can only be compared when it is the same.
    """

    rows: tuple[Row, ...]
    layout: str
    hash: str
    key_id: str
    class_names: tuple[str, ...] = ()
    mask_names: tuple[str, ...] = ()
    channel_names: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    @classmethod
    def discover(cls, path: str | Path, modality: Modality) -> Manifest:
        """The samples in a folder, a file, an MSD or nnU-Net `dataset.json`, a CSV or a MedMNIST npz.

        Raises DataError when nothing is found or the description of the data is wrong.
        """
        path = Path(path).expanduser()
        if not path.exists():
            raise DataError("missing", f"no data at {path}", "Give an existing folder, CSV, dataset.json, npz or data file.")
        search = _Search(modality.suffixes)
        root = path.resolve() if path.is_dir() else path.resolve().parent
        if path.suffix.lower() == ".csv":
            root = search.table(path.resolve())
        elif path.name == "dataset.json" or (path / "dataset.json").is_file():
            search.described(root)
        elif path.suffix.lower() == ".npz":
            search.arrays(path.resolve())
        elif path.is_file():
            search.layout = "file"
            search.add((path.resolve(),), path.name, search.stem(path.name))
        else:
            archives = [f for f in sorted(path.glob("*.npz")) if _splits_of(f)]
            if len(archives) == 1:
                search.arrays(archives[0].resolve())
            else:
                search.folder(root)
        if not search.found:
            remedy = f"Files end in {', '.join(modality.suffixes)}; see `meristem data check --help` for the layouts."
            raise DataError("empty", f"no {modality.name} data found in {path}", remedy)
        return search.manifest(root)

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


def pseudonym(kind: str, name: str, key: bytes) -> str:
    """`kind-` and 12 hex digits of HMAC-SHA256."""
    return f"{kind}-{hmac.new(key, name.encode(), hashlib.sha256).hexdigest()[:12]}"


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


def split_element(path: Path) -> tuple[Path, str, int] | None:
    """(file, key, index) of an element path `file.npz#key/17`; None for an ordinary file."""
    file, mark, element = str(path).rpartition(".npz#")
    if not mark:
        return None
    key, _, index = element.rpartition("/")
    return Path(file + ".npz"), key, int(index)


@dataclass
class _Found:
    """A sample on its way to becoming a row."""

    paths: tuple[Path, ...]
    local: str
    subject: str
    mask: Path | None = None
    label: str | None = None
    split: str = ""
    meta: dict[str, float | str] = field(default_factory=dict)


class _Search:
    """Collects samples in one layout, then makes the manifest."""

    def __init__(self, suffixes: Iterable[str]) -> None:
        self.suffixes = sorted((s.lower() for s in suffixes), key=len, reverse=True)
        self.found: list[_Found] = []
        self.lost: list[tuple[str, str, str, str]] = []  # reason, local, message, remedy
        self.layout = ""
        self.class_names: tuple[str, ...] = ()
        self.mask_names: tuple[str, ...] = ()
        self.channel_names: tuple[str, ...] = ()

    def suffix(self, name: str) -> str:
        return next((s for s in self.suffixes if name.lower().endswith(s)), "")

    def stem(self, name: str) -> str:
        suffix = self.suffix(name)
        return name[:-len(suffix)] if suffix else name

    def add(self, paths: tuple[Path, ...], local: str, subject: str, **more: Any) -> None:
        self.found.append(_Found(paths, local, subject, **more))

    def files(self, root: Path) -> list[Path]:
        """All readable files below root, relative to it, sorted; hidden ones (`._scan.nii.gz`) are no data."""
        found, seen = [], set()
        for folder, below, names in os.walk(root, followlinks=True):
            below[:] = sorted(d for d in below if not d.startswith("."))
            if (real := os.path.realpath(folder)) in seen:  # a link that leads back up
                below.clear()
                continue
            seen.add(real)
            found += [Path(folder, n).relative_to(root) for n in names if not n.startswith(".") and self.suffix(n)]
        return sorted(found)

    # ---- layouts

    def folder(self, root: Path) -> None:
        files = self.files(root)
        images, masks = self._beside(files)
        self.layout = "images and masks in sibling folders"
        if not masks:
            images, masks = self._paired(files)
            self.layout = "images and masks paired by name"
        matched = {image: masks.pop(key) for image, key in images.items() if key in masks}
        for mask in masks.values():
            self.lost.append(("label", mask.as_posix(), "a label without an image", "Add the image, or remove the label."))
        classes: dict[Path, str] = {}
        patients = False
        if not matched:
            classes, patients = self._folders(list(images))
            self.layout = "one folder per class" if classes else "one folder per subject" if patients else "folder"
        subjects = self._subjects(list(images), bool(classes), patients)
        for image in images:
            self.add((root / image,), image.as_posix(), subjects[image], label=classes.get(image), split=_split_of(image),
                     mask=root / matched[image] if image in matched else None)

    def _beside(self, files: list[Path]) -> tuple[dict[Path, tuple[str, ...]], dict[tuple[str, ...], Path]]:
        """image -> key, key -> mask, for `images/…` beside `labels/…` or `masks/…`."""
        folders = {f.parts[:i + 1] for f in files for i in range(len(f.parts) - 1)}
        lower = {tuple(p.lower() for p in f) for f in folders}
        images, masks = {}, {}
        partner = {mask: image for image, names in MASK_FOLDERS.items() for mask in names}
        for f in files:
            key, is_mask = (*f.parts[:-1], self.stem(f.name)), False
            for i, part in enumerate(f.parts[:-1]):
                image = partner.get(part.lower())
                if image and (*(p.lower() for p in f.parts[:i]), image) in lower:
                    key, is_mask = (*f.parts[:i], image, *f.parts[i + 1:-1], self.stem(f.name)), True
                elif part.lower() in MASK_FOLDERS:
                    key = (*f.parts[:i], part.lower(), *f.parts[i + 1:-1], self.stem(f.name))
            if is_mask:
                masks[key] = f
            else:
                images[f] = key
        return images, masks

    def _paired(self, files: list[Path]) -> tuple[dict[Path, tuple[str, ...]], dict[tuple[str, ...], Path]]:
        """image -> key, key -> mask, for `001.bmp` with `001.png` in one folder."""
        by_folder: dict[Path, list[Path]] = defaultdict(list)
        for f in files:
            by_folder[f.parent].append(f)
        images, masks = {}, {}
        for folder, inside in by_folder.items():
            suffixes = {self.suffix(f.name) for f in inside}
            mask_suffix = next((s for s in MASK_SUFFIXES if s in suffixes), None) if len(suffixes) == 2 else None
            count = Counter(self.stem(f.name) for f in inside)
            if sum(n == 2 for n in count.values()) < PAIRED * len(count):
                mask_suffix = None
            for f in inside:
                if self.suffix(f.name) == mask_suffix:
                    masks[(*folder.parts, self.stem(f.name))] = f
                else:  # without a pairing, two files of one stem are two images
                    images[f] = (*folder.parts, self.stem(f.name) if mask_suffix else f.name)
        return images, masks

    def _folders(self, files: list[Path]) -> tuple[dict[Path, str], bool]:
        """Where every file lies exactly one folder deep (split folders aside): class by folder, or that folders are patients.

        Patients' folders hold one file each, or the same few names in each of many; a wrong guess would lose labels, or split
        patients and show their names as classes.
        """
        above = {f: [p for p in f.parts[:-1] if p.lower() not in SPLITS] for f in files}
        if any(len(a) != 1 for a in above.values()):
            return {}, False
        inside: dict[str, list[str]] = defaultdict(list)
        for f, (folder,) in above.items():
            inside[folder].append(f.name.replace(folder, ""))
        if len(inside) < 2:
            return {}, False
        sizes = [len(names) for names in inside.values()]
        alike = len({frozenset(names) for names in inside.values()}) == 1 and len(inside) > sizes[0]
        patients = alike or min(sizes) < 2 or any(folder.lower().startswith("sub-") for folder in inside)
        return ({} if patients else {f: a[0] for f, a in above.items()}), patients

    def _subjects(self, files: list[Path], classes: bool, patients: bool) -> dict[Path, str]:
        """`sub-*` of the path; else the folder of a patient; else the stem, made unique."""
        subjects: dict[Path, str] = {}
        stems = Counter(self.stem(f.name) for f in files)
        for f in files:
            named = next((p for p in f.parts[:-1] if p.lower().startswith("sub-")), None)
            in_name = re.match(r"sub-[a-zA-Z0-9]+(?=_)", f.name)
            stem = self.stem(f.name)
            shared = stems[stem] > 1
            above = [p for p in f.parts[:-1] if p.lower() not in SPLITS and p.lower() not in MASK_FOLDERS]
            if named or in_name:
                subjects[f] = named or f.name[:in_name.end()]  # type: ignore[union-attr]
            elif above and (patients or (shared and not classes)):
                subjects[f] = above[0]
            else:
                subjects[f] = f.with_name(stem).as_posix() if shared else stem
        return subjects

    def described(self, root: Path) -> None:
        """MSD or nnU-Net: a folder with `dataset.json`."""
        try:
            about = json.loads((root / "dataset.json").read_text())
            labels = about.get("labels", {})
        except (ValueError, AttributeError) as error:
            raise DataError("unreadable", f"dataset.json is not a JSON object: {error}",
                            "See the nnU-Net or MSD format.") from None
        values = {int(k): str(v) for k, v in labels.items() if k.isdigit()}  # MSD: value -> name
        values |= {v: k for k, v in labels.items() if isinstance(v, int)}  # nnU-Net: name -> value; regions are lists
        if values:
            self.mask_names = tuple(values.get(i, "") for i in range(max(values) + 1))
        channels = about.get("channel_names") or about.get("modality") or {}
        self.channel_names = tuple(str(channels[k]) for k in sorted(channels, key=int))
        if any(self.stem(f.name).endswith("_0000") for f in (root / "imagesTr").glob("*_0000.*")):
            self.layout = "nnU-Net"
            for part, split in (("Tr", ""), ("Ts", "test")):
                self._channels(root, part, split)
            return
        self.layout = "MSD"
        for split, entries in (("", about.get("training", [])), ("test", about.get("test", []))):
            for entry in entries:
                image = entry["image"] if isinstance(entry, dict) else entry
                label = entry.get("label") if isinstance(entry, dict) else None
                self._checked(root, (image,), label, self.stem(Path(image).name), split)

    def _channels(self, root: Path, part: str, split: str) -> None:
        """imagesTr/case_0000.nii.gz … and labelsTr/case.nii.gz."""
        cases: dict[str, dict[int, str]] = defaultdict(dict)
        for f in self.files(root / f"images{part}"):
            case, _, channel = self.stem(f.name).rpartition("_")
            if case and re.fullmatch(r"\d{4}", channel):
                cases[case][int(channel)] = f"images{part}/{f.as_posix()}"
            else:
                remedy = "nnU-Net names images case_0000.nii.gz, case_0001.nii.gz, …"
                self.lost.append(("channel", f.as_posix(), "an image without a channel number", remedy))
        labels = {self.stem(f.name): f"labels{part}/{f.as_posix()}" for f in self.files(root / f"labels{part}")}
        expected = set(range(len(self.channel_names))) or set().union(*cases.values()) if cases else set()
        for case, files in sorted(cases.items()):
            label = labels.pop(case, None)
            if set(files) != expected:
                missing = ", ".join(f"_{c:04d}" for c in sorted(expected - set(files))) or "none"
                message = f"has channels {sorted(files)}, expected {sorted(expected)} (missing: {missing})"
                remedy = "Add the missing channel files, or correct dataset.json."
                self.lost.append(("channel", files[min(files)], message, remedy))
                continue
            self._checked(root, tuple(files[c] for c in sorted(files)), label, case, split)
        for label in labels.values():
            self.lost.append(("label", label, "a label without an image", "Add the image, or remove the label."))

    def _checked(self, root: Path, images: tuple[str, ...], label: str | None, subject: str, split: str,
                 name: str | None = None, meta: dict[str, float | str] | None = None) -> None:
        """Add a listed sample when its files are there."""
        paths = tuple(root / image for image in images)
        mask = root / label if label else None
        local = _relative(paths[0], root)
        for p in (*paths, *((mask,) if mask else ())):
            element = split_element(p)
            if not (element[0] if element else p).is_file():
                remedy = "Correct the list, or add the file."
                self.lost.append(("missing", _relative(p, root), "is listed but does not exist", remedy))
                return
        self.add(paths, local, subject, mask=mask, label=name, split=split, meta=meta or {})

    def table(self, path: Path) -> Path:
        """A CSV with `path` (or `path_0`, `path_1`, …) and perhaps subject, split, mask, class or label. Returns the root."""
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = [c.strip() for c in reader.fieldnames or ()]
            reader.fieldnames = columns
            records = [{k: (v or "").strip() for k, v in r.items() if isinstance(k, str)} for r in reader]
        paths = ["path"] if "path" in columns else sorted((c for c in columns if re.fullmatch(r"path_\d+", c)),
                                                          key=lambda c: int(c[5:]))
        if not paths:
            raise DataError("unreadable", f"{path.name} has no column `path` (or path_0, path_1, …)",
                            f"Its columns: {', '.join(columns) or 'none'}.")
        label = next((c for c in ("class", "label") if c in columns), None)
        known = {*paths, "subject", "split", "mask", label}
        self.layout = "CSV"
        for number, r in enumerate(records, 2):
            split = r.get("split", "").lower()
            if split and split not in SPLITS:
                raise DataError("split", f"{path.name} line {number}: split '{split}' is none of train, val, test",
                                "Correct the column, or leave it empty to have a split drawn.")
            if not all(r[c] for c in paths):
                self.lost.append(("missing", f"{path.name} line {number}", "has no path", "Fill it in, or remove the line."))
                continue
            meta = {k: _number(v) for k, v in r.items() if k not in known and v}
            stem = self.stem(Path(r[paths[0]]).name)
            self._checked(path.parent, tuple(r[c] for c in paths), r.get("mask") or None, r.get("subject") or stem,
                          SPLITS.get(split, ""), (r[label] or None) if label else None, meta)
        if "subject" not in columns:
            self._unique(self.found)
        inside = all(p.is_relative_to(path.parent) for f in self.found for p in f.paths)
        return path.parent if inside or not self.found else Path(os.path.commonpath([f.paths[0].parent for f in self.found]))

    def _unique(self, found: list[_Found]) -> None:
        """Two files of one stem are two subjects unless someone says otherwise."""
        count = Counter(f.subject for f in found)
        for f in found:
            if count[f.subject] > 1:
                f.subject = str(Path(f.local).with_name(f.subject))

    def arrays(self, path: Path) -> None:
        """A MedMNIST-style npz: {train,val,test}_images and _labels; one row per element."""
        splits = _splits_of(path)
        if not splits:
            raise DataError("unreadable", f"{path.name} holds no train_images, val_images or test_images",
                            "Give a MedMNIST-style npz, or a folder of files.")
        self.layout = "MedMNIST npz"
        with np.load(path, allow_pickle=False) as archive:
            for split in splits:
                labels = archive[f"{split}_labels"] if f"{split}_labels" in archive.files else None
                single = labels is not None and labels.reshape(len(labels), -1).shape[1] == 1
                count = len(labels) if labels is not None else len(archive[f"{split}_images"])
                for i in range(count):
                    local = f"{path.name}#{split}_images/{i}"
                    label = str(labels.reshape(-1)[i]) if labels is not None and single else None
                    self.add((path.parent / local,), local, local, label=label, split=split)

    # ---- result

    def manifest(self, root: Path) -> Manifest:
        key = user_key()
        names = self.class_names or tuple(sorted({f.label for f in self.found if f.label is not None}, key=_class_order))
        index = {name: i for i, name in enumerate(names)}
        rows, lines = [], []
        sizes: dict[Path, int] = {}
        for i, f in enumerate(self.found):
            local = [_relative(p, root) for p in (*f.paths, *((f.mask,) if f.mask else ()))]
            for p in (*f.paths, *((f.mask,) if f.mask else ())):
                element = split_element(p)
                file = element[0] if element else p
                if file not in sizes:
                    sizes[file] = file.stat().st_size
                local.append(str(sizes[file]))
            labels = {} if f.label is None else {"class": index[f.label]}
            lines.append([*local, f.label or "", f.split, f.subject])
            rows.append(Row(i, pseudonym("case", _relative(f.paths[0], root), key), pseudonym("sub", f.subject, key), f.paths,
                            f.local, {"mask": f.mask} if f.mask else {}, labels, f.split, f.meta))
        digest = hashlib.sha256(json.dumps([lines, names, self.mask_names]).encode()).hexdigest()[:16]
        problems = tuple(Problem(pseudonym("case", local, key), reason, message, remedy, local)
                         for reason, local, message, remedy in self.lost)
        return Manifest(tuple(rows), self.layout, digest, pseudonym("key", "id", key), names, self.mask_names,
                        self.channel_names, problems)


def _splits_of(path: Path) -> list[str]:
    """Which of train, val, test a MedMNIST-style npz holds."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return [s for s in ("train", "val", "test") if f"{s}_images" in archive.files]
    except (OSError, ValueError):
        return []


def _split_of(path: Path) -> str:
    return next((SPLITS[p.lower()] for p in path.parts[:-1] if p.lower() in SPLITS), "")


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _class_order(name: str) -> tuple[int, float, str]:
    """Numbers by size, before words."""
    value = _number(name)
    return (1, 0.0, name) if isinstance(value, str) else (0, value, name)
