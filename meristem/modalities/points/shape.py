"""By which shape a cloud is known again."""

from __future__ import annotations

import numpy as np

from meristem.modalities.likeness import Likeness, turns

WAVES = 8  # cosines along each axis
REACH = 2.0  # half a wave of the lowest one, in root mean square distances from the middle
LOUD = 0.5  # a larger mean counts as this one
MOST = 1 << 15  # points, spread over the stored order, that are enough
ALIKE = Likeness("cosines of points 1", WAVES ** 3 - 1, within=0.14 / LOUD, turns=turns(WAVES, 3), levels=True)
"""Means of the lowest cosines over a cloud's points, its empirical characteristic function (Feuerverger and Mureika 1977),
about their middle and in their own size: no order, place or scale is left. 511 bytes; what points carry beside places does not
count.

Measured on 380 shapes of 2048 points (PSB), in any of 48 orientations: the nearest of 72,010 pairs lie 0.154 apart, rings of
one class. Shuffled, moved and scaled, turned by right angles or with noise of 1 % of the spread: all are known again. Fewer
points are another sample of the shape: by three quarters of them 91 % are known again, by half 4 %; from n to m points the
distance is about 8.6 √(1/m − 1/n), so that of 8192 half are enough. Turns by other angles are not undone.
"""


def fingerprint(xyz: np.ndarray) -> bytes:
    """Of places (3, N); none where all are one."""
    x = xyz[:, ::max(xyz.shape[1] // MOST, 1)].astype(np.float32)
    x = x - x.mean(1, keepdims=True)
    size = float(np.sqrt((x ** 2).sum(0).mean()))
    if not size > 0:
        return b""
    phase = np.pi / 2 * (x / size / REACH + 1)
    a, b, c = np.cos(phase[:, None] * np.arange(WAVES, dtype=np.float32)[:, None])  # each (WAVES, N)
    means = (a[:, None] * b).reshape(WAVES ** 2, -1) @ c.T / x.shape[1]
    return ALIKE.pack(means.reshape(1, -1)[:, 1:] / LOUD)
