"""Heads: projectors, predictors and prototypes that a recipe owns and names."""

from __future__ import annotations

from torch import Tensor, nn

from meristem.modalities.base import Settings


class Head(nn.Module):
    """Vectors (M, D) and the look each came from (M,) to vectors (M, K)."""

    def forward(self, z: Tensor, view: Tensor) -> Tensor:
        raise NotImplementedError


class HeadSettings(Settings):
    """The typed entry of a head in a recipe."""

    def build(self, width: int) -> Head:
        """width: of the vectors that come in."""
        raise NotImplementedError


HEADS: dict[str, type[HeadSettings]] = {}
