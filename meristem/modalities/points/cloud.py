"""A cloud as its file has it, and what its columns are called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from meristem.errors import DataError
from meristem.modalities.points.options import Feature

SYNONYMS = {"normal_x": "nx", "normal_y": "ny", "normal_z": "nz", "normalx": "nx", "normaly": "ny", "normalz": "nz",
            "r": "red", "g": "green", "b": "blue", "i": "intensity", "reflectance": "intensity", "reflectivity": "intensity",
            "remission": "intensity", "t": "time", "gps_time": "time", "gpstime": "time", "timestamp": "time",
            "class": "label", "classification": "label", "part": "label", "seg": "label", "semantic": "label"}
COLUMNS: dict[Feature, tuple[str, ...]] = {"normal": ("nx", "ny", "nz"), "colour": ("red", "green", "blue"),
                                           "intensity": ("intensity",), "time": ("time",)}
FULL = (1.0, 255.0, 65535.0)  # what white or full reflectance may be
UNIT_LENGTH = 0.02  # by which a stored normal may miss it (float16, three decimals)


@dataclass
class Cloud:
    """xyz: (N, 3) float64, in the file's unit. features: (N, width) as stored. label: (N,) numbers. sampled: from a surface."""

    xyz: np.ndarray
    features: dict[Feature, np.ndarray] = field(default_factory=dict)
    label: np.ndarray | None = None
    sampled: bool = False

    def __len__(self) -> int:
        return len(self.xyz)


def canonical(name: str) -> str:
    """The one name of a column: `scalar_GpsTime` of CloudCompare, `diffuse_red` of MeshLab, `gps_time` of LAS."""
    name = name.strip().lower().removeprefix("scalar_").removeprefix("diffuse_")
    return SYNONYMS.get(name, name)


def of_columns(columns: Mapping[str, np.ndarray]) -> Cloud:
    """From columns (N,) by name, canonical or not. Raises DataError without x, y and z."""
    named: dict[str, np.ndarray] = {}
    for name, values in columns.items():
        named.setdefault(canonical(name), values)
    missing = [name for name in "xyz" if name not in named]
    if missing:
        raise DataError("columns", f"has no column {', '.join(missing)}, but {', '.join(columns) or 'none'}",
                        "Name the columns by modality.points.columns, or export x, y and z.")
    features = {f: np.stack([named[c] for c in needs], 1) for f, needs in COLUMNS.items() if all(c in named for c in needs)}
    return Cloud(np.stack([named[c] for c in "xyz"], 1).astype(np.float64), features, named.get("label"))


def of_table(table: np.ndarray, names: Sequence[str]) -> Cloud:
    """From numbers (N, k) without names, or with the recipe's. Raises DataError when they do not fit."""
    if table.ndim != 2 or table.shape[1] < 3:
        shape = "×".join(map(str, table.shape)) or "one"
        raise DataError("shape", f"holds {shape} numbers, no points", "One row per point: x, y, z and what else there is.")
    names = names or guess_columns(table)
    if len(names) != table.shape[1]:
        raise DataError("columns", f"has {table.shape[1]} columns, the recipe names {len(names)}",
                        "Correct modality.points.columns; give any name to columns that are not wanted.")
    return of_columns({name: table[:, i] for i, name in enumerate(names)})


def guess_columns(table: np.ndarray) -> tuple[str, ...]:
    """Names for the columns of a table that has none: see `PointsOptions.columns`."""
    k = table.shape[1]
    if k < 6:
        return ("x", "y", "z", *("intensity", "label")[:k - 3])
    length = np.linalg.norm(table[:, 3:6].astype(np.float64), axis=1)
    normals = np.mean(np.abs(length - 1) < UNIT_LENGTH) > 0.9
    rest = ("label", "instance")[:k - 6] if k < 9 else [f"column {i}" for i in range(7, k + 1)]
    return ("x", "y", "z", *(COLUMNS["normal"] if normals else COLUMNS["colour"]), *rest)


def scaled(values: np.ndarray, what: str, full: float | None = None) -> np.ndarray:
    """Colours or intensities from [0, full] to [−1, 1], float32. Raises DataError for values that are neither.

    full: None: 1 (not for integers), 255 or 65535, the least that holds them all.
    """
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    limit = full or next((f for f in FULL[values.dtype.kind in "iu":] if high <= f), 0.0)
    if low < 0 or high > limit:
        raise DataError(what, f"the column taken for {what} goes from {low:.4g} to {high:.4g}",
                        "Name the file's columns by modality.points.columns, or full reflectance by modality.points.intensity.")
    return (values.astype(np.float64) * (2 / limit) - 1).astype(np.float32)


def channels(cloud: Cloud, feature: Feature, intensity: float | None) -> np.ndarray:
    """(width, N) float32, as an encoder sees them. Raises DataError for a feature the cloud lacks."""
    if feature not in cloud.features:
        has = ", ".join(cloud.features) or "nothing beside x, y, z"
        raise DataError("feature", f"points have no {feature} (they have {has})",
                        "Leave it out of modality.points.features, or name the file's columns by modality.points.columns.")
    values = cloud.features[feature]
    if feature == "normal":
        vectors = values.astype(np.float64)
        length = np.linalg.norm(vectors, axis=1, keepdims=True)
        values = (vectors / np.where(length > 0, length, 1)).astype(np.float32)
    elif feature == "time":
        seconds = values.astype(np.float64)
        values = (seconds - seconds.min()).astype(np.float32)
    else:
        values = scaled(values, feature, intensity if feature == "intensity" else None)
    return np.ascontiguousarray(values.T)
