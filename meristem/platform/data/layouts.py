"""The layouts people have: which files or folders below a place are samples, and what belongs to each."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from meristem.errors import DataError
from meristem.modalities import npy
from meristem.modalities.base import Element, Gathering, Group, Modality, member_files, natural, split_element
from meristem.modalities.documents import read_json
from meristem.modalities.objects import Objects

IMAGES = ("images", "jpegimages", "frames", "rgb", "velodyne", "points")
PARTNERS = {**dict.fromkeys(("labels", "masks", "annotations"), IMAGES), "labelstr": ("imagestr",), "labelsts": ("imagests",),
            "points_label": ("points",)}
PARTS = "parts.json"  # beside folders of classes: the names of the parts that each class's labels number, {class: [name, …]}
IMAGE_FOLDERS = {image for images in PARTNERS.values() for image in images}
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val",
          "test": "test", "testing": "test", "imagests": "test"}
MASK_SUFFIXES = (".png", ".gif", ".bmp", ".tif", ".tiff")  # likeliest first: a mask is stored without loss
PAIRED = 0.8  # of a folder's stems must come as image and mask, or the second suffix is just another image
NUMBERED = 0.8  # of a folder's members must carry a number, or the folder holds pictures of this and that
LABELS = 1 << 15  # values that a label map of 16 bits can have
SEQUENCE = 8  # members below which a numbered folder does not say of itself that it is one sample


def relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()


def walk(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """(folder relative to root, names of the files in it) of all folders; hidden ones (`._scan.nii.gz`) are no data."""
    seen = set()
    for folder, below, names in os.walk(root, followlinks=True):
        below[:] = sorted(d for d in below if not d.startswith("."))
        if (real := os.path.realpath(folder)) in seen:  # a link that leads back up
            below.clear()
            continue
        seen.add(real)
        yield Path(folder).relative_to(root), [n for n in names if not n.startswith(".")]


def sequences(root: Path, members: Iterable[str]) -> dict[Path, list[str]]:
    """Folder -> its members in natural order, where the folders below root are clearly one sample each; else nothing.

    Clearly: of all folders with members nearly every one holds at least 8, numbered without a gap, and is not called by what
    it holds (images, masks) or by a split.
    """
    ends = tuple(members)
    inside = {root / here: sorted((n for n in names if n.lower().endswith(ends)), key=natural) for here, names in walk(root)}
    inside = {folder: names for folder, names in inside.items() if names}
    plain = {*IMAGE_FOLDERS, *PARTNERS, *SPLITS}
    found = {folder: names for folder, names in inside.items()
             if len(names) >= SEQUENCE and _gapless(names) and folder.name.lower() not in plain}
    return found if len(found) >= NUMBERED * len(inside) else {}


def nested(folders: Iterable[Path]) -> bool:
    """Whether some folders lie deeper than one below what all share, splits aside: such are no classes."""
    places = [Path(*(p for p in f.parts if p.lower() not in SPLITS)) for f in folders]
    shared = len(Path(os.path.commonpath(places)).parts)
    return any(len(p.parts) > shared + 1 for p in places)


def _gapless(names: list[str]) -> bool:
    """Whether the last numbers of the stems are n, n + 1, n + 2, …"""
    numbers = [re.findall(r"\d+", n.rpartition(".")[0])[-1:] for n in names]
    return all(numbers) and [int(n[0]) for n in numbers] == list(range(int(numbers[0][0]), int(numbers[0][0]) + len(names)))


@dataclass
class Found:
    """A sample on its way to becoming a row. subject: '' while only its path can say."""

    paths: tuple[Path, ...]
    local: str
    subject: str
    mask: Path | None = None
    label: str | None = None
    split: str = ""
    fold: int = -1
    meta: dict[str, float | str] = field(default_factory=dict)
    objects: Objects | None = None


class Search:
    """Collects samples in one layout, for a modality whose files, or folders of `members`, they are."""

    def __init__(self, modality: Modality | type[Modality]) -> None:
        self.suffixes = sorted((s.lower() for s in modality.suffixes), key=len, reverse=True)
        self.members = tuple(s.lower() for s in modality.members)
        self._modality = modality
        self.frames: dict[Path, int] = {}  # folder that is a sample, relative to where it was looked for -> files in it
        self.groups: dict[Path, Group] = {}  # files that are a sample together, by the folder they fill or by the first
        self.found: list[Found] = []
        self.lost: list[tuple[str, str, str, str]] = []  # reason, local, message, remedy
        self.pairs: list[tuple[Path, Path]] = []
        self.layout = ""
        self.ranked = False  # a list says whose the samples are
        self.by_list = False  # and which they are
        self.blank: Counter[str] = Counter()  # column of a CSV -> lines that say nothing in it
        self.class_names: tuple[str, ...] = ()
        self.mask_names: tuple[str, ...] = ()
        self.object_names: tuple[str, ...] = ()
        self.channel_names: tuple[str, ...] = ()

    def suffix(self, name: str) -> str:
        return next((s for s in self.suffixes if name.lower().endswith(s)), "")

    def stem(self, name: str) -> str:
        suffix = self.suffix(name)
        return name[:-len(suffix)] if suffix else name

    def add(self, paths: tuple[Path, ...], local: str, subject: str, **more: Any) -> None:
        """A sample; one whose files are none (a pipe, a device, a link to nothing) is set aside, since reading may not end."""
        whole = [(split_element(p) or (p,))[0] for p in (*paths, *filter(None, [more.get("mask")]))]
        if all(f.is_file() or (f.is_dir() and all(m.is_file() for m in member_files(f, self.members))) for f in whole):
            self.found.append(Found(paths, local, subject, **more))
        else:
            self.lost.append(("missing", local, "is no file that can be read, but a link to nothing, a pipe or a device",
                              "Put the file itself there, or remove it."))

    def refuse(self, local: str, error: DataError) -> None:
        """Set aside what an error says cannot be used."""
        self.lost.append((error.reason, local, error.what, error.remedy))

    def elements(self, path: Path) -> Sequence[Element] | None:
        """The samples in a file; None: it is one sample itself. What cannot be looked into is one, and `read` will say why."""
        if isinstance(self._modality, type) or not self.suffix(path.name) or not path.is_file():
            return None
        try:
            return self._modality.elements(path)
        except DataError:
            return None

    def within(self, file: Path, local: str, elements: Sequence[Element], subject: str = "", **more: Any) -> None:
        """Add the samples in a file, which is of `subject`; what an element does not say of itself is `more`."""
        for e in elements:
            said = {key: value for key, value in (("label", e.label), ("split", e.split)) if value}
            place = f"{local}#{e.place}"
            whose = (subject or local) if e.subject is None else e.subject or place
            self.add((file.parent / f"{file.name}#{e.place}",), place, whose, fold=e.fold, meta=dict(e.meta),
                     **{**more, **said})

    def files(self, root: Path) -> list[Path]:
        """All samples below root, relative to it, sorted: readable files, files that belong together by their folder or the
        first of them, and folders of numbered members without one.
        """
        inside = list(walk(root))
        taken = self._gather(root, [root / here / n for here, names in inside for n in names])
        found = list(self.groups)
        for here, names in inside:
            files = [here / n for n in names if self.suffix(n) and root / here / n not in taken]
            if not files and here.name and (count := self._numbered(names)):
                self.frames[here] = count
                files = [here]
            found += files
        return sorted(found)

    def _gather(self, root: Path, files: Sequence[Path]) -> set[Path]:
        """Fill `groups`, and set aside what is of no use; returns the files that are thereby dealt with."""
        self.groups = {}
        if not isinstance(self._modality, Gathering):
            return set()
        groups, lost = self._modality.gather(files)
        fill = Counter(folder for g in groups for folder in {f.parent for f in g.files})
        for g in groups:
            folder = g.files[0].parent
            alone = len(g.files) > 1 and fill[folder] == 1 and all(f.parent == folder for f in g.files)
            place = (folder if folder != root else Path(root.name)) if alone else g.files[0]
            self.groups[place.relative_to(root) if place.is_absolute() else place] = g
        for some, error in lost:
            self.refuse(relative(some[0], root), error)
        return {f for g in groups for f in g.files} | {f for some, _ in lost for f in some}

    def _owner(self, group: Group, root: Path) -> str:
        """Whose a group is, as its files say; else of whom all is below the first folder that is no split and no `images`."""
        above = group.files[0].parent.relative_to(root).parts
        return group.subject or next((p for p in above if p.lower() not in {*SPLITS, *IMAGE_FOLDERS}), root.name)

    def one(self, path: Path) -> None:
        """A single file."""
        self.layout = "file"
        groups: Sequence[Group] = self._modality.gather([path])[0] if isinstance(self._modality, Gathering) else ()
        self.add((path,), path.name, next((g.subject for g in groups if g.subject), self.stem(path.name)))

    def _numbered(self, names: Iterable[str]) -> int:
        """How many members these are; 0 where most have no number."""
        stems = [n.rpartition(".")[0] for n in names if n.lower().endswith(self.members)] if self.members else []
        return len(stems) if sum(bool(re.search(r"\d", s)) for s in stems) >= NUMBERED * len(stems) else 0

    # ---- layouts

    def folder(self, root: Path) -> None:
        files = self.files(root)
        if not files and self._numbered([f.name for f in member_files(root, self.members)]) > 1:
            self.layout = "numbered files"
            self.add((root,), root.name, root.name)
            return
        images, masks = self._beside(files)
        images = {f: key for f, key in images.items() if self.frames.get(f, 2) > 1}  # a mask may be drawn on one frame only
        self.layout = "images and masks in sibling folders"
        if not masks:
            images, masks = self._paired(list(images))
            self.layout = "images and masks paired by name"
        matched = {image: masks.pop(key) for image, key in images.items() if key in masks}
        several = {image: self.elements(root / image) for image in images}
        images = {image: key for image, key in images.items() if several[image] is None or several[image]}
        for mask in masks.values():
            self.lost.append(("label", mask.as_posix(), "a label without an image", "Add the image, or remove the label."))
        classes: dict[Path, str] = {}
        patients = False
        told = any(e.label for inside in several.values() for e in inside or ())  # by the files: folders need not tell
        if not matched and not told:
            classes, patients = self._folders(list(images))
            if self.groups and not self._mixed(classes):
                patients, classes = patients or bool(classes), {}
            self.layout = "one folder per class" if classes else "one folder per subject" if patients else "folder"
        if any(f in self.frames for f in images):
            self.layout += ", numbered files in folders"
        if self.groups and self.layout == "folder":
            self.layout = "series in folders"
        subjects = self._subjects(list(images), bool(classes) or told, patients)
        subjects |= {place: self._owner(g, root) for place, g in self.groups.items()}
        parts = self._parts(root) if classes else {}
        for image in images:
            label, split = classes.get(image), split_of(image)
            if (inside := several[image]) is not None:
                self.within(root / image, image.as_posix(), inside, subjects[image], label=label, split=split)
                continue
            paths = self.groups[image].files if image in self.groups else (root / image,)
            self.add(paths, image.as_posix(), subjects[image], label=label, split=split,
                     mask=root / matched[image] if image in matched else parts.get(label or ""))

    def _mixed(self, classes: dict[Path, str]) -> bool:
        """Whether every folder of a class holds several patients: else the folders are patients, whose names are no classes."""
        whose: dict[str, set[str]] = defaultdict(set)
        for place, label in classes.items():
            whose[label].add(self.groups[place].subject if place in self.groups else place.as_posix())
        return all(len(subjects) > 1 for subjects in whose.values())

    def _parts(self, root: Path) -> dict[str, Path]:
        """Class -> `parts.json#class/first`: where its parts are named, and the number of its first among those of all."""
        if not (root / PARTS).is_file():
            return {}
        try:
            named = {str(name): [str(p) for p in parts] for name, parts in read_json(root / PARTS, PARTS).items()}
        except (AttributeError, TypeError):
            raise DataError("unreadable", f"{PARTS} does not name the parts of classes",
                            '{"chair": ["seat", "leg"], "cup": ["body", "handle"]} is meant.') from None
        self.mask_names = tuple(f"{name}/{part}" for name, parts in named.items() for part in parts)
        first = np.cumsum([0, *map(len, named.values())])
        return {name: root / f"{PARTS}#{name}/{at}" for name, at in zip(named, first, strict=False)}

    def _beside(self, files: list[Path]) -> tuple[dict[Path, tuple[str, ...]], dict[tuple[str, ...], Path]]:
        """image -> key, key -> mask, for `images/…` beside `labels/…`, and the other names that people give the two."""
        inner = {f: f.parts if f in self.frames else f.parts[:-1] for f in files}
        lower = {tuple(p.lower() for p in parts[:i + 1]) for parts in inner.values() for i in range(len(parts))}
        images, masks = {}, {}
        for f in files:
            key, is_mask = (*f.parts[:-1], self.stem(f.name)), False
            for i, part in enumerate(p.lower() for p in inner[f]):
                above = tuple(p.lower() for p in f.parts[:i])
                image = next((name for name in PARTNERS.get(part, ()) if (*above, name) in lower), None)
                if image:
                    key, is_mask = (*key[:i], image, *key[i + 1:]), True
                elif part in IMAGE_FOLDERS:
                    key = (*key[:i], part, *key[i + 1:])
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
            above = [p for p in f.parts[:-1] if p.lower() not in SPLITS and p.lower() not in IMAGE_FOLDERS]
            if named or in_name:
                subjects[f] = named or f.name[:in_name.end()]  # type: ignore[union-attr]
            elif above and (patients or (shared and not classes)):
                subjects[f] = above[0]
            else:
                subjects[f] = f.with_name(stem).as_posix() if shared else stem
        return subjects

    def described(self, root: Path) -> None:
        """MSD or nnU-Net: a folder with `dataset.json`."""
        about = read_json(root / "dataset.json", "dataset.json", "See the nnU-Net or MSD format.")
        labels = about.get("labels", {})
        values = {int(k): str(v) for k, v in labels.items() if k.isdigit()}  # MSD: value -> name
        values |= {v: k for k, v in labels.items() if isinstance(v, int)}  # nnU-Net: name -> value; regions are lists
        if values and not 0 <= min(values) <= max(values) < LABELS:
            raise ValueError(f"a label of {max(values, key=abs)}")
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
                self.listed(root, (image,), label, self.stem(Path(image).name), split)

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
            self.listed(root, tuple(files[c] for c in sorted(files)), label, case, split)
        for label in labels.values():
            self.lost.append(("label", label, "a label without an image", "Add the image, or remove the label."))

    def listed(self, root: Path, images: tuple[str, ...], mask: str | None, subject: str, split: str,
               label: str | None = None, meta: dict[str, float | str] | None = None) -> None:
        """Add a sample that a list names, when its files are there."""
        self.by_list = True
        groups = [self._inside(root / image) for image in images]
        for group in groups:
            if isinstance(group, DataError):
                self.refuse(relative(root / images[0], root), group)
                return
        paths = tuple(f for group in groups if isinstance(group, Group) for f in group.files)
        subject = subject or next((g.subject for g in groups if isinstance(g, Group) and g.subject), "")
        masks = (root / mask,) if mask else ()
        for p in (*paths, *masks):
            element = split_element(p)
            if not (element[0] if element else p).is_file() and not member_files(p, self.members):
                message = "is listed but holds no file of a known kind" if p.is_dir() else "is listed but does not exist"
                self.lost.append(("missing", relative(p, root), message, "Correct the list, or add the file."))
                return
        self.add(paths, relative(root / images[0], root), subject, mask=masks[0] if masks else None, label=label, split=split,
                 meta=meta or {})

    def _inside(self, path: Path) -> Group | DataError:
        """The files of the only group in a folder; the path itself where that is none of groups; or why there is no one."""
        if not isinstance(self._modality, Gathering) or not path.is_dir():
            return Group((path,))
        groups, _ = self._modality.gather([f for f in sorted(path.iterdir()) if f.is_file() and not f.name.startswith(".")])
        if len(groups) > 1:
            return DataError("series", f"is listed, and a folder of {len(groups)} series", "List folders of one series each.")
        return groups[0] if groups else Group((path,))

    def name_subjects(self) -> None:
        """Subjects, by their paths, of the samples that no list gave one."""
        unnamed = [f for f in self.found if not f.subject]
        subjects = self._subjects([Path(f.local) for f in unnamed], classes=True, patients=False)
        for f in unnamed:
            f.subject = subjects[Path(f.local)]

    def arrays(self, path: Path) -> None:
        """A MedMNIST-style npz: {train,val,test}_images and _labels; one row per element."""
        splits = splits_of(path)
        if not splits:
            raise DataError("unreadable", f"{path.name} holds no train_images, val_images or test_images",
                            "Give a MedMNIST-style npz, or a folder of files.")
        self.layout = "MedMNIST npz"
        names = npy.names(path)
        for split in splits:
            labels = npy.read(path, f"{split}_labels") if f"{split}_labels" in names else None
            single = labels is not None and labels.size == len(labels)
            count = len(labels) if labels is not None else len(npy.read(path, f"{split}_images"))
            for i in range(count):
                local = f"{path.name}#{split}_images/{i}"
                label = str(labels.reshape(-1)[i]) if labels is not None and single else None
                self.add((path.parent / local,), local, local, label=label, split=split)


def splits_of(path: Path) -> list[str]:
    """Which of train, val, test a MedMNIST-style npz holds."""
    try:
        names = npy.names(path)
    except DataError:
        return []
    return [s for s in ("train", "val", "test") if f"{s}_images" in names]


def split_of(path: Path) -> str:
    return next((SPLITS[p.lower()] for p in path.parts[:-1] if p.lower() in SPLITS), "")


def split_named(name: str) -> str:
    """train, val or test, of a file or folder that is called so, or starts so (`val2017`); else ''."""
    found = re.match("train|val|test", re.sub("^instances_", "", name.lower()))
    return found[0] if found else ""
