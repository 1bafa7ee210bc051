"""MONAI: a JSON of volumes and the boxes in each, as the LUNA16 detection tutorial of MONAI has them.

    {"training": [{"image": "a.nii.gz", "box": [[x, y, z, w, h, d], …], "label": [0, …]}, …], "validation": […], "test": […]}

Boxes are world millimetres. Beside the lists it may say `box_mode`: cccwhd (centre and sizes, if it does not say) or xyzxyz
(corners); `coordinates`: LPS (if it does not say) or RAS; `labels`: {"0": "nodule", …}. A sample without `box` was not looked
at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from meristem.errors import DataError
from meristem.modalities.documents import MISSHAPEN, read_json
from meristem.modalities.objects import Objects
from meristem.platform.data.annotated.boxes import checked, subject_of
from meristem.platform.data.layouts import Search, relative

LISTS = {"training": "train", "validation": "val", "test": "test", "testing": "test"}
FOLDERS = ("", "images", "imagesTr", "imagesTs")  # where images may lie below the JSON
MODES, COORDINATES = ("cccwhd", "xyzxyz"), ("LPS", "RAS")
HEAD = 1 << 20  # bytes in which a file without boxes is told


def recognised(search: Search, path: Path) -> bool:
    return bool(_files(search, path))


def _files(search: Search, path: Path) -> list[Path]:
    places = [path] if path.is_file() else sorted(path.glob("*.json"))
    return [f for f in places if f.suffix.lower() == ".json" and f.is_file() and _lists_boxes(search, f)]


def _lists_boxes(search: Search, file: Path) -> bool:
    with file.open("rb") as opened:
        if b'"box"' not in opened.read(HEAD):
            return False
    try:
        entries = _entries(read_json(file, file.name))
        return any("box" in entry and search.suffix(_images(entry)[0]) for _, entry in entries)
    except (DataError, *MISSHAPEN):
        return False


def _entries(about: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    return [(split, entry) for name, split in LISTS.items() for entry in about.get(name, []) if isinstance(entry, dict)]


def _images(entry: Mapping[str, Any]) -> list[str]:
    return [entry["image"]] if isinstance(entry["image"], str) else list(entry["image"])


def read(search: Search, path: Path) -> Path:
    search.layout = "MONAI boxes"
    files = _files(search, path)
    if len(files) > 1:
        raise DataError("split", f"{len(files)} JSON files list boxes: {', '.join(f.name for f in files[:4])}",
                        "Are they folds? Give the path of one of them.")
    file, = files
    about = read_json(file, file.name)
    for key, known in (("box_mode", MODES), ("coordinates", COORDINATES)):
        if about.setdefault(key, known[0]) not in known:
            raise DataError("unreadable", f"{file.name} says {key}: {about[key]}", f"Known: {', '.join(known)}.")
    entries = _entries(about)
    try:
        given = {int(k): str(v) for k, v in about.get("labels", {}).items()}
        used = {int(label) for _, entry in entries for label in entry.get("label", ()) if "box" in entry}
    except (ValueError, TypeError, AttributeError):
        raise DataError("unreadable", f"{file.name} has labels that are no numbers",
                        'Give each box a whole number as its label, and their names as "labels": {"0": "nodule"}.') from None
    names = given or {label: f"class {label}" for label in sorted(used)}
    number = {label: i for i, label in enumerate(sorted(names))}
    search.object_names = tuple(names[label] for label in sorted(names))
    root = file.parent
    seen = set()
    for split, entry in entries:
        images = [_place(root, image) for image in _images(entry)]
        if None in images:
            search.lost.append(("missing", _images(entry)[images.index(None)], "is listed but does not exist",
                                "Correct the list, or add the file."))
            continue
        paths = tuple(f for f in images if f is not None)
        local = relative(paths[0], root)
        if local in seen:
            raise DataError("split", f"{file.name} lists an image more than once", "List each once, in one split.")
        seen.add(local)
        subject = subject_of(entry)
        search.ranked |= bool(subject)
        search.add(paths, local, subject, split=split, objects=_objects(search, local, entry, about, number))
    search.name_subjects()
    return root


def _place(root: Path, image: str) -> Path | None:
    return next((place for folder in FOLDERS if (place := root / folder / image).is_file()), None)


def _objects(search: Search, local: str, entry: Mapping[str, Any], about: Mapping[str, Any], number: Mapping[int, int]
             ) -> Objects | None:
    if "box" not in entry:
        return None
    try:
        labels = [int(label) for label in entry.get("label", ())]
        if len(labels) != len(entry["box"]):
            raise DataError("class", f"{len(entry['box'])} boxes have {len(labels)} labels", "Give one label per box.")
        unknown = [label for label in labels if label not in number]
        if unknown:
            raise DataError("class", f"a box is of the unknown class {unknown[0]}",
                            f"Known: {', '.join(map(str, number))}. Add it to the labels, or correct it.")
        box = ras(entry["box"], about["box_mode"], about["coordinates"])
        label = [number[i] for i in labels]
        if labels:
            checked(box.tolist(), [search.object_names[i] for i in label])
    except DataError as error:
        search.refuse(local, error)
        return None
    return Objects(box, np.array(label, np.int64))


def ras(box: Sequence[Sequence[float]], mode: str, coordinates: str) -> np.ndarray:
    """(K, 6) lower and upper corners in RAS millimetres. Raises DataError (box) for rows that are not six numbers."""
    try:
        table = np.array(box, float).reshape(len(box), 6)
    except (ValueError, TypeError):
        raise DataError("box", "a box is not made of six numbers", "Correct or remove it.") from None
    low, high = np.split(table, 2, axis=1)
    if mode == "cccwhd":
        low, high = low - high / 2, low + high / 2
    if coordinates == "LPS":
        turn = np.array([-1.0, -1.0, 1.0])
        low, high = np.where(turn < 0, -high, low), np.where(turn < 0, -low, high)
    return np.concatenate([low, high], 1)
