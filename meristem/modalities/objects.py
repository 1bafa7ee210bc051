"""What is annotated in a sample, object by object: boxes, boxes of points, segments of time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np


@dataclass(frozen=True)
class Raster:
    """The elements of one object: cells (*S) bool of its sample's own lattice, the first of them at `start`."""

    cells: np.ndarray
    start: tuple[int, ...]

    def key(self) -> bytes:
        """What tells it from others."""
        return self.cells.tobytes()


@dataclass(frozen=True)
class Objects:
    """The objects of one sample, K of them.

    box: (K, n) float64. Along the D axes of a lattice n = 2·D, the lower corner before the upper one; of points n = 7, as in
    `platform.boxes`; of an untrimmed clip n = 2, first and last second. As files are read: images top, left, bottom, right in
    pixels from the picture's corner; volumes world millimetres, RAS; points the unit of their file. Once a sample is opened
    (`Placing.placed`): its source coordinates, as `Frame` has them.
    label: (K,) int64 number among the data's object names. ignore: (K,) bool, neither sought nor wrong to find (COCO's crowds,
    VOC's difficult ones, KITTI's DontCare). level: (K,) int64 how hard it is to find, 0 easiest, where a benchmark grades that.
    masks: of each object, its own elements; () where there are none.
    """

    box: np.ndarray
    label: np.ndarray
    ignore: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    level: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    masks: Sequence[Raster] = ()

    def __post_init__(self) -> None:
        for name, kind in (("ignore", bool), ("level", np.int64)):
            if len(getattr(self, name)) != len(self.label):
                object.__setattr__(self, name, np.zeros(len(self.label), kind))

    def __len__(self) -> int:
        return len(self.label)

    def select(self, rows: np.ndarray) -> Objects:
        """Those of the given rows: numbers, or bool."""
        at = np.arange(len(self))[rows]
        return replace(self, box=self.box[at], label=self.label[at], ignore=self.ignore[at], level=self.level[at],
                       masks=tuple(self.masks[i] for i in at) if self.masks else ())
