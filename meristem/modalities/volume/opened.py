"""A volume whose header is known and whose voxels are not decoded yet, of whatever format."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

DICOM = re.compile(r".*\.(dcm|dicom|ima)|[^.]+|.*\.\d+", re.IGNORECASE)  # archives call files IM0001, or by a UID


def named_dicom(path: Path) -> bool:
    """Whether a file's name is one that DICOM files have."""
    return bool(DICOM.fullmatch(path.name))


@dataclass(frozen=True)
class Opened:
    """shape: (X, Y, Z), or (X, Y, Z, C) with channels last. affine: (4, 4) to RAS millimetres. decode: float32 of that shape.

    placement: what writes a prediction back, plain data. dtype: as stored. plain: those are bytes that need no scaling.
    values: what they mean, where that is known. kept: why they are not what they usually become.
    """

    shape: tuple[int, ...]
    affine: np.ndarray
    decode: Callable[[], np.ndarray]
    placement: Mapping[str, Any]
    dtype: str
    plain: bool
    values: str = ""
    kept: str = ""
