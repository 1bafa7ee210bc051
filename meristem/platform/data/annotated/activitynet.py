"""ActivityNet: a JSON of untrimmed videos and the segments of time in which something happens (Caba Heilbron et al. 2015)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from meristem.errors import DataError
from meristem.modalities.documents import MISSHAPEN, read_json
from meristem.modalities.objects import Objects
from meristem.platform.data.layouts import SPLITS, Search, relative, split_of, walk

HEAD = 1 << 20  # bytes in which a file that is none is told
OVERRUN = 1.0  # s that a segment may reach past the end: durations are rounded, and containers count them differently
REMEDY = "Correct or remove it."


def recognised(search: Search, path: Path) -> bool:
    if not any(map(search.suffix, ("a.mp4", "a.avi", "a.mkv", "a.webm"))):
        return False
    return _database(path) is not None if path.is_file() else bool(_files(path))


def _files(root: Path) -> list[Path]:
    return [f for f in sorted([*root.glob("*.json"), *root.glob("annotations/*.json")]) if _database(f) is not None]


def _database(path: Path) -> dict[str, Any] | None:
    """What the file says; None where it is no ActivityNet file."""
    if path.suffix.lower() != ".json" or not path.is_file():
        return None
    with path.open("rb") as file:
        if b'"database"' not in file.read(HEAD):  # the key stands first, or behind the version and the taxonomy
            return None
    try:
        about = read_json(path, path.name)
    except DataError:
        return None
    return about if isinstance(about, dict) and isinstance(about.get("database"), dict) else None


def read(search: Search, path: Path) -> Path:
    search.layout = "ActivityNet"
    files = [path] if path.is_file() else _files(path)
    root = files[0].parent.parent if files[0].parent.name == "annotations" else files[0].parent
    database: dict[str, Mapping[str, Any]] = {}
    declared: list[str] = []
    for file in files:
        about = _database(file)
        try:
            if about is None:
                raise TypeError("it has no database of videos")
            declared += [name for name in _declared(about) if name not in declared]
            database |= {str(name): dict(entry) for name, entry in about["database"].items()}
        except MISSHAPEN as error:
            raise DataError("unreadable", f"{file.name} is not an ActivityNet file: {type(error).__name__}",
                            'It wants {"database": {"video": {"subset", "duration", "annotations": [{"label", "segment"}]}}}.'
                            ) from None
    search.object_names = tuple(declared or sorted({str(a.get("label")) for entry in database.values()
                                                    for a in _annotations(entry) if a.get("label")}))
    number = {name: i for i, name in enumerate(search.object_names)}
    videos: dict[str, list[Path]] = defaultdict(list)
    for place in (here / n for here, names in walk(root) for n in names if search.suffix(n)):
        videos[search.stem(place.name)].append(place)
    for folder in (here for here in search.files(root) if here in search.frames):
        videos[folder.name].append(folder)
    for name, entry in sorted(database.items()):
        split = SPLITS.get(str(entry.get("subset", "")).lower(), "")
        found = next((videos[n] for n in (name, f"v_{name}", name.removeprefix("v_")) if videos.get(n)), None)
        if found is None:
            search.lost.append(("missing", name, "is listed but there is no video of that name",
                                "Put it beside the list, in `videos`, or in a folder named by its subset."))
            continue
        place = next((f for f in found if split and split_of(f) == split), found[0])
        local = relative(root / place, root)
        search.add((root / place,), local, "", split=split, objects=_objects(search, local, entry, number, split))
    search.name_subjects()
    return root


def _declared(about: Mapping[str, Any]) -> list[str]:
    """The classes that a file says there are: in a list, or as the leaves of its taxonomy."""
    if about.get("classes"):
        return [str(name) for name in about["classes"]]
    nodes = about.get("taxonomy") or []
    inner = {node.get("parentName") for node in nodes}
    return sorted({str(node["nodeName"]) for node in nodes if node["nodeName"] not in inner})


def _annotations(entry: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return list(entry.get("annotations") or [])


def _objects(search: Search, local: str, entry: Mapping[str, Any], number: Mapping[str, int], split: str) -> Objects | None:
    """The segments of a video, in seconds; None where it is not annotated, or wrongly. A hidden test set lists none."""
    annotations = _annotations(entry)
    if "annotations" not in entry or (split == "test" and not annotations):
        return None
    try:
        duration = entry.get("duration")
        box = np.array([_segment(i, a, number, None if duration is None else float(duration))
                        for i, a in enumerate(annotations, 1)], float).reshape(-1, 2)
    except DataError as error:
        search.refuse(local, error)
        return None
    return Objects(box, np.array([number[str(a["label"])] for a in annotations], np.int64))


def _segment(i: int, annotation: Mapping[str, Any], number: Mapping[str, int], duration: float | None) -> tuple[float, float]:
    """First and last second of the i-th annotation. Raises DataError (box, class)."""
    name = str(annotation.get("label"))
    if name not in number:
        known = ", ".join(list(number)[:8]) + (", …" if len(number) > 8 else "")
        raise DataError("class", f"segment {i} has the unknown label {name}",
                        f"Known: {known}. Add it to the classes, or remove it.")
    try:
        start, end = (float(x) for x in annotation["segment"])
    except (KeyError, TypeError, ValueError):
        raise DataError("box", f"segment {i} ({name}) is not a pair of seconds", REMEDY) from None
    if not np.isfinite((start, end)).all():
        raise DataError("box", f"segment {i} ({name}) is not made of finite numbers", REMEDY)
    if end <= start:
        raise DataError("box", f"segment {i} ({name}) ends before it starts: {start:g} to {end:g} s", REMEDY)
    last = np.inf if duration is None else duration
    if start < -OVERRUN or end > last + OVERRUN or start >= last:
        raise DataError("box", f"segment {i} ({name}), {start:g} to {end:g} s, lies outside the video's {last:g} s",
                        "Correct the segment or the duration.")
    return max(start, 0.0), min(end, float(last))
