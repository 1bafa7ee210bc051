"""KITTI's 3D objects: clouds in `velodyne`, a text of objects in `label_2` and one of matrices in `calib` for each of them.

The three lie in the folder itself or in `training`; what lies in `testing` has no labels and tests. `ImageSets/{train,val,
test}.txt` list numbers of frames (`test.txt` those of `testing`, where there is one); where no labels of test frames are known,
as KITTI's are not, the frames of `val.txt` test. Without lists every frame is drawn for itself, though frames of one drive are
alike.

A label is a line of a name and 14 numbers: class, truncation, occlusion, alpha, left, top, right, bottom in the image, height,
width, length, x, y, z of the middle of the bottom in the rectified camera, and the turn about its y axis; a fifteenth is a
score (Geiger et al. 2012, devkit). `classes.txt`, where there is one, names the classes that are sought, one a line. Of KITTI's
others, vans are then ignored beside cars and sitting people beside pedestrians, as its benchmark does; the rest is no object.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from meristem.errors import DataError
from meristem.modalities.objects import Objects
from meristem.platform.boxes import corners
from meristem.platform.data.annotated.boxes import lines, upright
from meristem.platform.data.layouts import Search, relative, split_of

LAYOUT = "KITTI"
CLASSES = ("Car", "Van", "Truck", "Pedestrian", "Person_sitting", "Cyclist", "Tram", "Misc")
DONT_CARE = "DontCare"
NEIGHBOURS = {"Van": "Car", "Person_sitting": "Pedestrian"}
GRADES = ((40, 0, 0.15), (25, 1, 0.30), (25, 2, 0.50))  # easy, moderate, hard: least height, most occlusion, truncation
LISTED = "classes.txt"
NEAREST = 0.1  # metres before the camera from which on a corner is projected


@dataclass(frozen=True)
class Calibration:
    """camera: (4, 4) LiDAR to the rectified camera, metres. image: (3, 4) that to pixels of the left colour camera."""

    camera: np.ndarray
    image: np.ndarray


@dataclass(frozen=True)
class Label:
    """A line: its class, and its 14 numbers in their order."""

    name: str
    numbers: np.ndarray

    @property
    def level(self) -> int:
        """0 easy, 1 moderate, 2 hard; 3: harder than the benchmark asks for."""
        truncated, occluded, _, _, top, _, bottom = self.numbers[:7]
        return next((i for i, (height, occlusion, truncation) in enumerate(GRADES) if bottom - top >= height
                     and occluded <= occlusion and truncated <= truncation), len(GRADES))

    @property
    def solid(self) -> bool:
        """Whether it has a box in space; most of those nobody cares for have none."""
        return self.name != DONT_CARE or bool((self.numbers[7:10] > 0).all())


def recognised(search: Search, path: Path) -> bool:
    return bool(search.suffix("0.bin")) and bool(_bases(path))


def _bases(root: Path) -> list[Path]:
    return [base for base in (root, root / "training", root / "testing")
            if (base / "velodyne").is_dir() and ((base / "label_2").is_dir() or (base / "calib").is_dir())]


def read(search: Search, path: Path) -> Path:
    search.layout = LAYOUT
    bases = _bases(path)
    apart = any(base.name == "testing" for base in bases)
    frames, labels = [], {}
    for base in bases:
        inside = sorted(f for f in (base / "velodyne").iterdir() if f.name.lower().endswith(".bin"))
        frames += inside
        texts = {f.stem: f for f in sorted((base / "label_2").glob("*.txt"))}
        for frame in (f for f in inside if f.stem in texts):
            try:
                labels[frame] = _labels(texts.pop(frame.stem))
            except DataError as error:
                search.refuse(relative(frame, path), error)
        search.lost += [("missing", relative(text, path), "labels a cloud that is not there", "Add it, or remove the file.")
                        for text in texts.values()]
    wanted = next((names for base in (path, *bases) if (names := lines(base / LISTED))), [])
    occur = {label.name for found in labels.values() for label in found if label.solid} - {DONT_CARE}
    search.object_names = tuple(wanted or sorted(occur, key=lambda name: ([*CLASSES, name].index(name), name)))
    listed = {stem: name for name in ("train", "val", "test") if not (apart and name == "test")
              for place in (path, *bases) for stem in lines(place / "ImageSets" / f"{name}.txt")}
    splits = {f: "test" if split_of(Path(relative(f, path))) == "test" else listed.get(f.stem, "") for f in frames}
    blind = not any(split == "test" and frame in labels for frame, split in splits.items())
    for frame in frames:
        local, split = relative(frame, path), splits[frame]
        search.add((frame,), local, "", split="test" if blind and split == "val" else split,
                   objects=_objects(search, frame, local, labels[frame]) if frame in labels else None)
    search.name_subjects()
    return path


def _labels(file: Path) -> list[Label]:
    found = []
    for i, line in enumerate(lines(file)):
        name, *words = line.split()
        if len(words) not in (14, 15):
            raise DataError("columns", f"line {i + 1} of its label has {len(words) + 1} columns, not 15 or, with a score, 16",
                            "Correct the file: class, truncation, occlusion, alpha, 2D box, h, w, l, x, y, z, rotation.")
        try:
            numbers = np.array(words[:14], float)
        except ValueError:
            raise DataError("columns", f"line {i + 1} of its label holds something else than numbers behind its class",
                            "Correct the file.") from None
        if not np.isfinite(numbers).all():
            raise DataError("box", f"object {i + 1} ({name}) is not made of finite numbers", "Correct or remove it.")
        found.append(Label(name, numbers))
    return found


def calibration(frame: Path) -> Calibration | None:
    """Of a cloud in `velodyne`, from `calib` beside that; None where that has no file. Raises DataError (calibration)."""
    file = frame.parent.parent / "calib" / f"{frame.stem}.txt"
    if not file.is_file():
        return None
    found = {}
    for line in lines(file):
        name, _, numbers = line.partition(":")
        found[name] = numbers.split()
    try:
        image, rectified, sensor = (np.array(found[name], float).reshape(3, -1) for name in ("P2", "R0_rect", "Tr_velo_to_cam"))
        camera = np.eye(4)
        camera[:3] = rectified @ sensor
        turns = np.abs(camera[:3, :3] @ camera[:3, :3].T - np.eye(3)).max() < 1e-2
        if image.shape != (3, 4) or not np.isfinite(image).all() or not turns:
            raise ValueError
    except (KeyError, ValueError):
        raise DataError("calibration", "its file in `calib` does not hold P2 (3×4), R0_rect (3×3) and Tr_velo_to_cam (3×4), "
                        "the latter two turns without stretch", "Download it again.") from None
    return Calibration(camera, image)


def _objects(search: Search, frame: Path, local: str, labels: Sequence[Label]) -> Objects | None:
    number = {name: i for i, name in enumerate(search.object_names)}
    try:
        unknown = [x.name for x in labels if x.name not in (*number, *CLASSES, DONT_CARE)]
        if unknown:
            raise DataError("class", f"an object is of the unknown class '{unknown[0]}'",
                            f"Known: {', '.join(number)}. Add it to {LISTED}, or correct it.")
        kept: list[tuple[Label, int, bool]] = []
        for x in (x for x in labels if x.solid):
            if x.name in number:
                kept.append((x, number[x.name], False))
            elif NEIGHBOURS.get(x.name) in number:
                kept.append((x, number[NEIGHBOURS[x.name]], True))
            elif x.name == DONT_CARE:
                kept += [(x, label, True) for label in number.values()]
        known = calibration(frame)
        if known is None and kept:
            raise DataError("calibration", "has no file in `calib`, so where its objects are cannot be told", "Add the file.")
        box = to_lidar(np.array([x.numbers for x, *_ in kept]), known).tolist() if known and kept else []
        box = upright(box, [x.name for x, *_ in kept])
    except DataError as error:
        search.refuse(local, error)
        return None
    return Objects(box, np.array([label for _, label, _ in kept], np.int64), np.array([ignore for *_, ignore in kept], bool),
                   np.array([x.level for x, *_ in kept], np.int64))


def to_lidar(labels: np.ndarray, known: Calibration) -> np.ndarray:
    """(K, 14) numbers of labels to boxes (K, 7) as in `platform.boxes`, upright in the LiDAR's frame on their bottom's middle.

    At turn r an object's length points along (cos r, 0, −sin r) of the camera; its heading is where that points on the LiDAR's
    ground: −(r + π/2) for a camera that looks along the LiDAR's x and stands upright on it.
    """
    height, width, length, x, y, z, turn = labels[:, 7:14].T
    bottom = (np.stack([x, y, z], 1) - known.camera[:3, 3]) @ np.linalg.inv(known.camera[:3, :3]).T
    ahead = np.stack([np.cos(turn), 0 * turn, -np.sin(turn)], 1) @ known.camera[:3, :3]
    heading = np.arctan2(ahead[:, 1], ahead[:, 0])
    return np.column_stack([bottom[:, :2], bottom[:, 2] + height / 2, length, width, height, heading])


def text(box: np.ndarray, names: Sequence[str], score: Sequence[float], known: Calibration) -> str:
    """Boxes (K, 7) in the LiDAR's frame as the lines of a label file, with their scores; the inverse of `to_lidar`.

    Truncation and occlusion are −1, unknown. The box in the image is that around the corners before the camera, cut at the
    image's left and upper edge: its size is in no file of the layout.
    """
    bottom = box[:, :3] - np.outer(box[:, 5] / 2, [0.0, 0.0, 1.0])
    place = bottom @ known.camera[:3, :3].T + known.camera[:3, 3]
    ahead = np.stack([np.cos(box[:, 6]), np.sin(box[:, 6]), 0 * box[:, 6]], 1) @ known.camera[:3, :3].T
    lines = []
    for i, (x, y, z) in enumerate(place):
        turn = math.atan2(-ahead[i, 2], ahead[i, 0])
        alpha = math.remainder(turn - math.atan2(x, z), 2 * math.pi)
        corner = corners(torch.from_numpy(box[i])).numpy() @ known.camera[:3, :3].T + known.camera[:3, 3]
        seen = np.concatenate([corner, np.ones((8, 1))], 1)[corner[:, 2] > NEAREST] @ known.image.T
        flat = seen[:, :2] / seen[:, 2:]
        image = [*flat.min(0).clip(0), *flat.max(0).clip(0)] if len(flat) else [-1.0] * 4
        length, width, height = box[i, 3:6]
        numbers = [alpha, *image, height, width, length, x, y, z, turn]
        lines.append(f"{names[i]} -1 -1 {' '.join(f'{n:.2f}' for n in numbers)} {score[i]:.4f}\n")
    return "".join(lines)
