"""COCO: a JSON of images, annotations and categories (Lin et al. 2014), one file or one per split."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from meristem.errors import DataError
from meristem.modalities.documents import MISSHAPEN, read_json
from meristem.modalities.objects import Objects, Raster
from meristem.platform.data.annotated.boxes import checked, subject_of
from meristem.platform.data.layouts import Search, relative, split_named

KEYS = ("images", "annotations", "categories")
HEAD = 1 << 20  # bytes in which a file that is no COCO is told


class Outline(Raster):
    """An object's polygons or run lengths, drawn when they are asked for."""

    def __init__(self, segmentation: Any, height: int, width: int) -> None:
        self._drawn: Raster | None = None
        self._from = segmentation, height, width

    def _raster(self) -> Raster:
        if self._drawn is None:
            from pycocotools import mask as api

            outline, height, width = self._from
            if isinstance(outline, list):
                runs = api.merge(api.frPyObjects(outline, height, width))
            else:
                runs = api.frPyObjects(outline, height, width) if isinstance(outline["counts"], list) else outline
            cells = api.decode(runs).astype(bool)
            rows, columns = np.flatnonzero(cells.any(1)), np.flatnonzero(cells.any(0))
            if not len(rows):
                return Raster(np.zeros((0, 0), bool), (0, 0))
            start = int(rows[0]), int(columns[0])
            self._drawn = Raster(cells[start[0]:rows[-1] + 1, start[1]:columns[-1] + 1], start)
        return self._drawn

    @property
    def cells(self) -> np.ndarray:
        return self._raster().cells

    @property
    def start(self) -> tuple[int, ...]:
        return self._raster().start

    def key(self) -> bytes:
        return json.dumps(self._from, sort_keys=True).encode()


def recognised(search: Search, path: Path) -> bool:
    files = [path] if path.is_file() else _files(path)
    return any(search.suffix(name) for file in files for name in _named(file))


def _named(path: Path) -> tuple[str, ...]:
    """Names of some files that a COCO file lists; none where it is none."""
    if path.suffix.lower() != ".json" or not path.is_file():
        return ()
    about = path.stat()
    return _names(path, about.st_size, about.st_mtime_ns)


@lru_cache(maxsize=64)  # every modality asks, and a file may be half a gigabyte
def _names(path: Path, size: int, changed: int) -> tuple[str, ...]:
    with path.open("rb") as file:
        head = file.read(HEAD)
    if not any(f'"{key}"'.encode() in head for key in KEYS):
        return ()
    try:
        about = read_json(path, path.name)
        if not isinstance(about, dict) or any(not isinstance(about.get(key), list) for key in KEYS):
            return ()
        return tuple(str(image["file_name"]) for image in about["images"][:8])
    except (DataError, *MISSHAPEN):
        return ()


def _files(root: Path) -> list[Path]:
    """The COCO files of a folder: in itself, in `annotations`, or one in each split's folder."""
    places = [*root.glob("*.json"), *root.glob("annotations/*.json"), *root.glob("*/_annotations.coco.json")]
    return sorted(f for f in places if _named(f))


def read(search: Search, path: Path) -> Path:
    search.layout = "COCO"
    files = [path] if path.is_file() else _files(path)
    root = path.parent if path.is_file() else path
    for file in files:
        try:
            about = read_json(file, file.name)
            _read(search, root, file, about, len(files) > 1)
        except MISSHAPEN as error:
            raise DataError("unreadable", f"{file.name} is not a COCO file: {type(error).__name__}",
                            "It wants images (id, file_name), annotations (image_id, category_id, bbox), categories.") from None
    search.name_subjects()
    return root


def _read(search: Search, root: Path, file: Path, about: Mapping[str, Any], several: bool) -> None:
    """several: whether the file is one of some, each of a split."""
    split = split_named(file.stem) or split_named(file.parent.name)
    names = tuple(str(c["name"]) for c in sorted(about["categories"], key=lambda c: c["id"]))
    if search.object_names and names != search.object_names:
        raise DataError("class", f"{file.name} has the categories {', '.join(names)}, another file "
                        f"{', '.join(search.object_names)}",
                        "Give all files of a data set the same categories.")
    search.object_names = names
    number = {c["id"]: i for i, c in enumerate(sorted(about["categories"], key=lambda c: c["id"]))}
    of_image: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
    for annotation in about["annotations"]:
        of_image[annotation["image_id"]].append(annotation)
    folder = file.parent
    above = folder.parent if folder.name == "annotations" else folder
    bases = [folder, above, above / "images", *sorted(d for d in above.iterdir() if d.is_dir() and split
                                                      and split_named(d.name) == split), *sorted(above.glob("images/*/"))]
    for image in about["images"]:
        name = str(image["file_name"])
        place = next((base / name for base in bases if (base / name).is_file()), None)
        if place is None:
            search.lost.append(("missing", name, "is listed but does not exist", "Correct the list, or add the file."))
            continue
        local = relative(place, root)
        subject = subject_of(image)
        search.ranked |= bool(subject)
        objects = _objects(search, local, image, of_image[image["id"]], number)
        search.add((place,), local, subject, split=split if several else "", objects=objects,
                   meta={"image_id": image["id"]})
    known = {image["id"] for image in about["images"]}
    for lost in sorted(map(str, of_image.keys() - known)):
        search.lost.append(("box", f"{file.name} image {lost}", "has annotations but is not among the images",
                            "Add the image to the list, or remove its annotations."))


def _objects(search: Search, local: str, image: Mapping[str, Any], annotations: list[Mapping[str, Any]],
             number: Mapping[Any, int]) -> Objects | None:
    try:
        unknown = [a["category_id"] for a in annotations if a["category_id"] not in number]
        if unknown:
            raise DataError("class", f"an annotation is of the unknown category {unknown[0]}",
                            f"Known: {', '.join(map(str, number))}. Add it to the categories, or remove it.")
        label = [number[a["category_id"]] for a in annotations]
        corners = [(y, x, y + h, x + w) for x, y, w, h in (a["bbox"] for a in annotations)]
        box = checked(corners, [search.object_names[i] for i in label])
    except DataError as error:
        search.refuse(local, error)
        return None
    outlined = bool(annotations) and all(a.get("segmentation") for a in annotations)
    masks = tuple(Outline(a["segmentation"], image["height"], image["width"]) for a in annotations) if outlined else ()
    return Objects(box, np.array(label, np.int64), np.array([bool(a.get("iscrowd")) for a in annotations], bool), masks=masks)
