"""Label maps: on another lattice, and between the values that files hold and classes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from meristem.errors import DataError


def nearest(labels: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """labels (…, *S) on `size` over the same field of view: of the element in which each new centre lies."""
    for axis, m in enumerate(size, labels.ndim - len(size)):
        n = labels.shape[axis]
        if n != m:
            labels = labels.take(((np.arange(m) + 0.5) * n / m).astype(int), axis)
    return labels


def to_classes(labels: np.ndarray, values: Mapping[int, int] | None, option: str, nobody: int | None = None) -> np.ndarray:
    """Values that files hold to classes (value -> class; None: alike). nobody: what marks that nobody labelled; it stays.

    Raises DataError (mask) that names `option` for values without a class, and for classes that do not fit 16 bits.
    """
    if values is not None:
        found, where = np.unique(labels, return_inverse=True)
        unknown = [int(v) for v in found if int(v) not in values and v != nobody]
        if unknown:
            more = ", …" if len(unknown) > 8 else ""
            raise DataError("mask", f"the mask holds {', '.join(map(str, unknown[:8]))}{more}, not in mask_values",
                            f"Add what they mean to {option}.")
        labels = np.array([values.get(int(v), int(v)) for v in found])[where.reshape(labels.shape)]
    if labels.min() < -32768 or labels.max() > 32767:
        raise DataError("mask", f"the mask holds {labels.max()}, too large for a class", f"Map it by {option}.")
    return labels


def to_values(classes: np.ndarray, values: Mapping[int, int] | None, option: str) -> np.ndarray:
    """Classes to the values that files hold (value -> class; None: alike), of several for one class the smallest.

    Raises DataError (mask) that names `option` for a class without a value.
    """
    if values is None:
        return classes
    back = {c: v for v, c in sorted(values.items(), reverse=True)}
    found, where = np.unique(classes, return_inverse=True)
    missing = [int(c) for c in found if int(c) not in back]
    if missing:
        raise DataError("mask", f"class {missing[0]} was predicted but has no pixel value", f"Add it to {option}.")
    return np.array([back[int(c)] for c in found])[where.reshape(classes.shape)]
