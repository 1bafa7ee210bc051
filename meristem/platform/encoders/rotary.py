"""Rotary positions from continuous coordinates (Su et al. 2021, RoFormer; several axes as Heo et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meristem.errors import RecipeError
from meristem.modalities.base import Axis


class Rotary(nn.Module):
    """Positions (B, n, C) in the modality's units to the table timm's rotary attention multiplies queries and keys by.

    Each axis owns P = head_dim // 2C pairs of channels; pair i of an axis turns by position / s_i radians, the scales s_i
    log-spaced from the axis's `finest` (i = 0) to its `coarsest`. Channels left over are not rotated. The inner product of
    a rotated query and a rotated key depends on the difference of their positions only.
    Raises RecipeError where head_dim is odd or too small for the axes.
    """

    scale: Tensor

    def __init__(self, head_dim: int, axes: Sequence[Axis]) -> None:
        super().__init__()
        self.pairs = head_dim // 2
        pairs = self.pairs // max(len(axes), 1)
        if head_dim % 2 or not pairs:
            raise RecipeError(f"{head_dim} channels per head cannot hold rotary positions of {len(axes)} axes",
                              f"Choose encoder width and heads so that width / heads is even and at least {2 * len(axes)}.")
        steps = torch.linspace(0, 1, pairs)
        scale = torch.stack([a.finest * (a.coarsest / a.finest) ** steps for a in axes]) if axes else torch.ones(0, pairs)
        self.register_buffer("scale", scale, persistent=False)  # (C, P); made from the axes, so not part of the weights

    def forward(self, position: Tensor, prefix: int = 0) -> Tensor:
        """(B, 1, prefix + n, 2·head_dim) float32: sines, then cosines, each repeated for the two channels of a pair.

        The `prefix` tokens in front have no position and are not rotated.
        """
        angle = (position.float()[..., None] / self.scale).flatten(2)
        angle = F.pad(angle, (0, self.pairs - angle.shape[-1], prefix, 0))
        return torch.cat([angle.sin().repeat_interleave(2, -1), angle.cos().repeat_interleave(2, -1)], -1)[:, None]
