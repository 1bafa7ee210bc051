"""Upright boxes in any clouds, rooms among them: a JSON beside the clouds, called `boxes.json`.

    {"classes": ["chair", "table"],
     "scenes": [{"file": "office/1.ply", "split": "train", "subject": "office",
                 "boxes": [[x, y, z, length, width, height, heading], …], "labels": ["chair", …]}, …]}

Centres and sides are in the unit of the clouds' coordinates; the heading is in radians about z from the x axis, and the length
lies along it. A scene without `boxes` is unlabelled, one with an empty list has nothing in it. `split` (train, val, test) and
`subject` may be left out: scenes of one subject are never divided. Predictions are written alike, with `scores`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from meristem.errors import DataError
from meristem.modalities.documents import MISSHAPEN, read_json
from meristem.modalities.objects import Objects
from meristem.platform.data.annotated.boxes import upright
from meristem.platform.data.layouts import Search, split_named

NAME = "boxes.json"


def recognised(search: Search, path: Path) -> bool:
    file = path / NAME if path.is_dir() else path
    if file.name != NAME or not file.is_file():
        return False
    try:
        return any(search.suffix(str(scene["file"])) for scene in read_json(file, NAME)["scenes"])
    except (DataError, *MISSHAPEN):
        return False


def read(search: Search, path: Path) -> Path:
    search.layout = "boxes in scenes"
    root = path if path.is_dir() else path.parent
    about = read_json(root / NAME, NAME)
    try:
        search.object_names = tuple(str(name) for name in about["classes"])
        for scene in about["scenes"]:
            _scene(search, root, scene)
    except MISSHAPEN as error:
        raise DataError("unreadable", f"{NAME} does not describe scenes: {type(error).__name__}",
                        '{"classes": ["chair"], "scenes": [{"file": "1.ply", "labels": ["chair"], "boxes": '
                        '[[x, y, z, length, width, height, heading]]}]} is meant.') from None
    search.name_subjects()
    return root


def _scene(search: Search, root: Path, scene: Mapping[str, Any]) -> None:
    local = str(scene["file"])
    if not (root / local).is_file():
        search.lost.append(("missing", local, "is listed but does not exist", "Correct the list, or add the file."))
        return
    subject = str(scene.get("subject") or "")
    search.ranked |= bool(subject)
    objects = None
    try:
        if "boxes" in scene:
            objects = _objects(scene["boxes"], list(map(str, scene["labels"])), search.object_names)
    except DataError as error:
        search.refuse(local, error)
    search.add((root / local,), local, subject, split=split_named(str(scene.get("split") or "")), objects=objects)


def _objects(box: Sequence[Sequence[float]], names: Sequence[str], known: Sequence[str]) -> Objects:
    if len(box) != len(names):
        raise DataError("box", f"has {len(box)} boxes and {len(names)} labels", "Give every box its label.")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise DataError("class", f"an object is of the unknown class '{unknown[0]}'",
                        f"Known: {', '.join(known)}. Add it to the classes, or correct it.")
    return Objects(upright(box, names), np.array([known.index(name) for name in names], np.int64))


def described(file: str, box: np.ndarray, names: Sequence[str], score: Sequence[float]) -> dict[str, Any]:
    """One scene of a file of predictions: boxes (K, 7) in the unit of its cloud."""
    return {"file": file, "boxes": box.round(4).tolist(), "labels": list(names), "scores": [round(float(s), 4) for s in score]}
