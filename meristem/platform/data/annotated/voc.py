"""Pascal VOC: an XML for each image, in `Annotations` or beside it, and lists of the splits in `ImageSets/Main`."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from meristem.errors import DataError
from meristem.modalities.objects import Objects
from meristem.platform.data.annotated.boxes import checked, lines
from meristem.platform.data.layouts import Search, relative, split_of, walk

NAMES = ("classes.txt", "labels.txt", "predefined_classes.txt")  # a class a line, where somebody says which there are
LARGEST = 1 << 24  # bytes of an XML of boxes: more is none


def recognised(search: Search, path: Path) -> bool:
    return path.is_dir() and any(map(search.suffix, (n for _, names in walk(path) for n in names))) and bool(_files(path))


def _files(root: Path) -> list[Path]:
    """All annotations below a folder, where the first file is one."""
    found = sorted(root / here / name for here, names in walk(root) for name in names if name.lower().endswith(".xml"))
    first = next((file for file in found if file.is_file()), None)
    return found if first is not None and b"<annotation" in first.open("rb").read(256) else []


def read(search: Search, path: Path) -> Path:
    search.layout = "Pascal VOC"
    images = {(f.parent, search.stem(f.name)): f for f in map(path.joinpath, search.files(path))}
    by_stem: dict[str, list[Path]] = {}
    for (_, stem), f in images.items():
        by_stem.setdefault(stem, []).append(f)
    splits = _splits(path)
    listed = next((root_names for name in NAMES if (root_names := lines(path / name))), [])
    trees: dict[Path, list[tuple[str, list[float], bool]]] = {}
    for file in _files(path):
        local = relative(file, path)
        beside = images.get((file.parent, file.stem))
        others = by_stem.get(file.stem, [])
        image = beside or (others[0] if len(others) == 1 else
                           next((f for f in others if f.parent.parent == file.parent.parent), None))
        if image is None:
            search.lost.append(("missing", local, "annotates an image that is not there", "Add the image, or remove the file."))
            continue
        try:
            trees[image] = _annotated(file)
        except DataError as error:
            search.refuse(relative(image, path), error)
    search.object_names = tuple(listed or sorted({name for objects in trees.values() for name, *_ in objects}))
    number = {name: i for i, name in enumerate(search.object_names)}
    for image in images.values():
        local = relative(image, path)
        search.add((image,), local, "", split=splits.get(search.stem(image.name), split_of(Path(local))),
                   objects=_objects(search, local, trees[image], number) if image in trees else None)
    search.name_subjects()
    return path


def _annotated(file: Path) -> list[tuple[str, list[float], bool]]:
    """(name, [top, left, bottom, right] in pixels from the corner, difficult) of each object.

    VOC's numbers are 1-based and inclusive, so the first pixel's box is (0, 1); where a file holds a 0 they are taken as they
    are.
    """
    if not file.is_file():  # a pipe would be waited for
        raise DataError("unreadable", "its annotation is no file", "Put the XML itself there.")
    if file.stat().st_size > LARGEST:
        raise DataError("unreadable", "the XML is too large for one of boxes", "Export it again.")
    try:
        tree = ElementTree.fromstring(file.read_bytes())
        found = []
        for item in tree.iter("object"):
            box = item.find("bndbox")
            assert box is not None
            left, top, right, bottom = (float(box.findtext(k, "")) for k in ("xmin", "ymin", "xmax", "ymax"))
            found.append((item.findtext("name", "").strip(), [top, left, bottom, right], item.findtext("difficult") == "1"))
    except (ElementTree.ParseError, ValueError, AssertionError):
        raise DataError("unreadable", "the XML is damaged, or an object has no box of four numbers",
                        "Export it again.") from None
    first = 1.0 if all(min(box) >= 1 for _, box, _ in found) else 0.0
    return [(name, [box[0] - first, box[1] - first, *box[2:]], difficult) for name, box, difficult in found]


def _objects(search: Search, local: str, objects: list[tuple[str, list[float], bool]], number: dict[str, int]
             ) -> Objects | None:
    try:
        unknown = [name for name, *_ in objects if name not in number]
        if unknown:
            raise DataError("class", f"an object is of the unknown class '{unknown[0]}'",
                            f"Known: {', '.join(number)}. Add it to the list of classes, or correct it.")
        box = checked([box for _, box, _ in objects], [name for name, *_ in objects])
    except DataError as error:
        search.refuse(local, error)
        return None
    return Objects(box, np.array([number[name] for name, *_ in objects], np.int64),
                   np.array([difficult for *_, difficult in objects], bool))


def _splits(root: Path) -> dict[str, str]:
    """Stem -> split, of the lists train.txt, val.txt and test.txt in `ImageSets/Main`."""
    found: dict[str, str] = {}
    for folder in sorted(root.rglob("ImageSets/Main")):
        for name in ("train", "val", "test"):
            found |= {line.split()[0]: name for line in lines(folder / f"{name}.txt")}
    return found

