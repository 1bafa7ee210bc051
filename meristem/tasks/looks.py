"""How samples of any modality are shown on paper: which, and what of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from meristem.modalities.base import Modality
from meristem.platform.data.manifest import Row

FRAMES = 6  # of a strip
POINTS = 2048  # of a cloud that is drawn
SIDE = 240  # elements along the longer side of a strip's frame


def varied(rows: Sequence[Row], count: int) -> list[Row]:
    """Up to `count` of the rows, one of each class as far as that goes."""
    first = [*{row.labels.get("class"): row for row in reversed(rows)}.values()][::-1]
    return [*first, *(row for row in rows if row not in first)][:count]


def picture(values: np.ndarray) -> np.ndarray:
    """(C, *S) -> (*S, 3) of three channels, else the first."""
    return np.moveaxis(values, 0, -1) if len(values) == 3 else np.asarray(values[0])


def timed(modality: Modality) -> bool:
    """Whether samples are sequences: their first axis is in seconds."""
    return len(modality.axes) == 3 and modality.axes[0].unit == "s"


def thin(x: np.ndarray) -> np.ndarray:
    """Every n-th row and column of (…, H, W), so that at most `SIDE` are left."""
    step = -(-max(x.shape[-2:]) // SIDE)
    return x[..., ::step, ::step]


def spread(first: int, last: int) -> list[int]:
    """Up to `FRAMES` whole numbers from first to last, evenly spread."""
    return sorted({round(x) for x in np.linspace(first, last, FRAMES).tolist()})
