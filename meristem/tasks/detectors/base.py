"""What a detector on a lattice is: a pyramid of feature maps in, boxes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from meristem.modalities.base import Settings
from meristem.platform.objectives import Loss


@dataclass(frozen=True)
class Boxed:
    """The objects of one view.

    box: (K, 2·D) lower and upper corner in lattice steps from the view's corner, so that an element's edges are whole numbers.
    label: (K,) int64 class. score: (K,) in [0, 1] of what was found, best first; None of what is true. masks: (K, *S) bool of
    the view, where there are any.
    """

    box: Tensor
    label: Tensor
    score: Tensor | None = None
    masks: Tensor | None = None

    def __len__(self) -> int:
        return len(self.label)


class Detector(nn.Module):
    """maps: (B, width, *S_i), fine to coarse. size: (*S) of the views."""

    def losses(self, maps: list[Tensor], size: tuple[int, ...], truth: Sequence[Boxed]) -> dict[str, Loss]:
        """Named losses; truth: one entry per view."""
        raise NotImplementedError

    def detect(self, maps: list[Tensor], size: tuple[int, ...]) -> list[Boxed]:
        """What is in each view."""
        raise NotImplementedError


class DetectorSettings(Settings):
    """The typed entry of a detector. dims: lattices that it is for, by their number of axes."""

    dims: ClassVar[int]

    def build(self, width: int, strides: Sequence[tuple[int, ...]], classes: int) -> Detector:
        """width: channels of the maps, strides: of each, per axis, in elements of the view."""
        raise NotImplementedError


DETECTORS: dict[str, type[DetectorSettings]] = {}
