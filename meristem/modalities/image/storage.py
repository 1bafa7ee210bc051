"""Numbers of any type as the cache's small integers."""

from __future__ import annotations

import numpy as np

from meristem.errors import DataError

LEVELS = 65535


def to_integers(array: np.ndarray) -> tuple[np.ndarray, float, float]:
    """uint8 or int16 (C, *S), and scale and offset with array = integers * scale + offset.

    Lossless for whole numbers that span at most 65535; else a uniform quantiser of the whole range. Raises DataError `range`
    where its step would exceed a hundredth of the spread of the middle 90 % of the values.
    """
    if array.dtype in (np.uint8, np.int16):
        return np.ascontiguousarray(array), 1.0, 0.0
    low, high = array.min(), array.max()
    span = float(high) - float(low)
    if span <= LEVELS and (array.dtype.kind in "iu" or (array == np.rint(array)).all()):
        offset = 0 if low >= -32768 and high <= 32767 else int(low) + 32768
        wide = array.astype(np.int64) if array.dtype.kind in "iu" else np.rint(array).astype(np.int64)
        return (wide - offset).astype(np.int16), 1.0, float(offset)
    step = span / LEVELS
    bulk = np.subtract(*np.percentile(array, (95, 5)))
    if step > bulk / 100 > 0:
        raise DataError("range", f"a few values are so far out ({low:.3g} to {high:.3g}) that 16 bits cannot hold the others",
                        "Clip the image before, or set modality.image.normalise.window.")
    return np.rint((array.astype(np.float64) - low) / step - 32768).astype(np.int16), step, float(low) + 32768 * step
