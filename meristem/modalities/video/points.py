"""Points of a video's frames, from one file, as label maps in which the value k + 1 marks point k."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from meristem.errors import DataError
from meristem.modalities.video.masks import UNKNOWN, places_of, plain_number

COLUMNS = ("frame", "point", "x", "y")
LAYOUTS = ("Give an .npy (frames, points, 2) of x and y with NaN for absent, a .csv with the columns frame, point, x, y, or "
           "JHMDB's joint_positions.mat.")
MOST = np.iinfo(np.int16).max - 1


def read_points(file: Path, names: Sequence[str]) -> np.ndarray:
    """float64 (T, K, 2): x and y of each point in pixels, 0 the centre of the first; NaN where a frame lacks it.

    .npy: that array. .csv: frames by the names or numbers of their files (of a film: counted from 0), points from 0; what has
    no line, or no x and y, is absent. .mat: JHMDB's `pos_img` (2, K, T), counted from 1. Raises DataError: mask, unreadable,
    shape.
    """
    readers = {".npy": _npy, ".csv": _csv, ".mat": _mat}
    if file.suffix.lower() not in readers:
        raise DataError("mask", "the mask of a video is neither a folder of pictures nor a file of points", LAYOUTS)
    try:
        points = readers[file.suffix.lower()](file, names)
    except DataError:
        raise
    except Exception as error:  # whatever a broken file makes numpy, scipy or csv raise
        raise DataError("unreadable", f"the file of points cannot be read ({type(error).__name__})", LAYOUTS) from None
    if points.ndim != 3 or points.shape[2] != 2 or points.dtype.kind not in "fiu":
        raise DataError("shape", f"the points are {points.dtype} of shape {points.shape}, not numbers (frames, points, 2)",
                        LAYOUTS)
    if len(points) != len(names):
        raise DataError("shape", f"there are points of {len(points)} frames, the video has {len(names)}",
                        "They must be of the same frames.")
    if not 0 < points.shape[1] <= MOST:
        raise DataError("shape", f"there are {points.shape[1]} points, wanted 1 to {MOST}", "Name fewer points.")
    if np.isinf(points).any():
        raise DataError("mask", "a point lies at infinity", "Write NaN for points that are absent.")
    points = points.astype(np.float64)
    return np.where(np.isnan(points).any(-1, keepdims=True), np.nan, points)


def mark(points: np.ndarray, source: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """int16 (T, *size): k + 1 at the element nearest to point k of (T, K, 2), −1 throughout where a frame shows none.

    points: as of `read_points`, in frames of `source` rows and columns. Each has one element, whatever the size: it is moved
    by its coordinates, and where its element is taken by an earlier one it gets the nearest that is free. Points outside the
    frame are absent. Raises DataError (shape) for more points than elements.
    """
    if points.shape[1] > size[0] * size[1]:
        raise DataError("shape", f"{points.shape[1]} points do not fit on {size[0]}×{size[1]} elements", "Resize to more.")
    factor = np.array(size) / source
    wanted = (points[..., ::-1] + 0.5) * factor - 0.5  # row, column
    inside = np.all((wanted >= -0.5) & (wanted < np.array(size) - 0.5), -1)
    labels = np.full((len(points), *size), UNKNOWN, np.int16)
    labels[np.any(inside, 1)] = 0
    for t, k in np.argwhere(inside):
        y, x = np.floor(wanted[t, k] + 0.5).astype(int)
        if labels[t, y, x]:
            free = np.argwhere(labels[t] == 0)
            y, x = free[np.linalg.norm(free - wanted[t, k], axis=1).argmin()]
        labels[t, y, x] = k + 1
    return labels


def _npy(file: Path, names: Sequence[str]) -> np.ndarray:
    return np.asarray(np.load(file, allow_pickle=False))


def _mat(file: Path, names: Sequence[str]) -> np.ndarray:
    from scipy.io import loadmat  # slow to import, and few runs need it

    stored: dict[str, Any] = loadmat(file, variable_names=["pos_img"])
    if "pos_img" not in stored:
        raise DataError("mask", "the .mat file has no `pos_img`", LAYOUTS)
    return np.asarray(stored["pos_img"], np.float64).T - 1


def _csv(file: Path, names: Sequence[str]) -> np.ndarray:
    places = places_of(names)
    if len(places) < len(names):
        raise DataError("mask", "two frames have one number", "Name frames so that the table can tell them apart.")
    found: dict[tuple[int, int], tuple[float, float]] = {}
    with file.open(newline="", encoding="utf-8-sig") as text:
        reader = csv.DictReader(text)
        reader.fieldnames = [c.strip().lower() for c in reader.fieldnames or ()]
        if not set(COLUMNS) <= set(reader.fieldnames):
            raise DataError("mask", f"the table of points lacks {', '.join(c for c in COLUMNS if c not in reader.fieldnames)}",
                            LAYOUTS)
        for line in reader:
            frame, point, x, y = ((line[c] or "").strip() for c in COLUMNS)
            at = f"line {reader.line_num} of the points"
            if plain_number(frame) not in places:
                raise DataError("mask", f"{at} belongs to no frame", "Name frames as their files are named or numbered.")
            if not point.isdecimal() or int(point) >= MOST:
                raise DataError("mask", f"{at}: the point is not a number from 0 to {MOST - 1}", "Number the points from 0.")
            key = places[plain_number(frame)], int(point)
            if key in found:
                raise DataError("mask", f"{at} is the second of one point in one frame", "Leave one line.")
            try:
                found[key] = float(x or "nan"), float(y or "nan")
            except ValueError:
                raise DataError("mask", f"{at}: x or y is not a number",
                                "Leave both empty where the point is absent.") from None
    points = np.full((len(names), max((k + 1 for _, k in found), default=0), 2), np.nan)
    for key, place in found.items():
        points[key] = place
    return points
