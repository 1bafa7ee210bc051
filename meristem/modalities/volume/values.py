"""Percentiles, moments and integers of large arrays, a few at a time where they fit into a processor's cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

BLOCK = 1 << 16  # elements that are worked on at once
SAMPLE = 1 << 16  # elements that a percentile is first guessed from


def percentiles(x: np.ndarray, at: Sequence[float]) -> list[float]:
    """As numpy.percentile of finite numbers, of which only those beyond a first guess are ordered."""
    flat = x.ravel("K")
    if flat.size <= 4 * SAMPLE:
        return [float(p) for p in np.percentile(flat, at)]
    sample = np.sort(flat[::flat.size // SAMPLE])
    found = []
    for share in at:
        place = share / 100 * (flat.size - 1)
        lower = int(place)
        a, b = _ordered(flat, sample, lower, min(lower + 1, flat.size - 1))
        found.append(a + (b - a) * (place - lower))
    return found


def _ordered(flat: np.ndarray, sample: np.ndarray, first: int, second: int) -> tuple[float, float]:
    """The first-th and the second-th smallest (from 0). sample: some of them, sorted."""
    upper = 2 * first > flat.size
    at = first / flat.size * len(sample)
    spare = 4 * np.sqrt(at * (1 - first / flat.size)) + 4  # standard deviations by which the guess may be off
    bound = sample[int(np.clip(at - spare if upper else at + spare, 0, len(sample) - 1))]
    tail = flat[flat > bound] if upper else flat[flat < bound]
    shift = flat.size - len(tail) if upper else 0
    if not shift <= first <= second < shift + len(tail):
        equal = np.count_nonzero(flat == bound)  # air, of which half a volume may be
        start = shift - equal if upper else len(tail)
        if start <= first <= second < start + equal:
            return float(bound), float(bound)
        tail, shift = flat, 0  # a bad guess
    tail = np.partition(tail, (first - shift, second - shift))
    return float(tail[first - shift]), float(tail[second - shift])


def moments(x: np.ndarray, low: float, high: float) -> tuple[float, float]:
    """Mean and standard deviation of x clipped to [low, high], in float64."""
    middle, total, square = (low + high) / 2, 0.0, 0.0
    for block in _blocks(x):
        away = np.clip(block, low, high).astype(np.float64)
        away -= middle
        total += float(away.sum())
        square += float(np.square(away, out=away).sum())
    mean = total / x.size
    return middle + mean, float(np.sqrt(max(square / x.size - mean**2, 0.0)))


def quantised(x: np.ndarray, low: float, high: float, out: np.ndarray) -> None:
    """x clipped to [low, high] as int16 into `out`, of the same shape: low becomes −32768, high 32767."""
    step = (high - low) / 65535
    rows = max(BLOCK // max(x[:1].size, 1), 16)  # of either order in memory, whole lines of it
    for i in range(0, len(x), rows):
        y = np.clip(x[i:i + rows], low, high)
        y -= low
        y /= step
        y -= 32768
        out[i:i + rows] = np.round(y, out=y)


def _blocks(x: np.ndarray) -> Iterator[np.ndarray]:
    """All elements, in the order of memory."""
    flat = x.ravel("K")
    return (flat[i:i + BLOCK] for i in range(0, flat.size, BLOCK))
