"""A residual-encoder U-Net in two or three dimensions (after Isensee et al. 2024, ResEnc)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Self

import torch
from pydantic import model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from meristem.errors import MeristemError, RecipeError
from meristem.modalities.base import Axis, Tokenizer
from meristem.platform.encoders.base import EncoderSettings
from meristem.platform.encoders.maps import MapEncoder

CONV: dict[int, type[Any]] = {2: nn.Conv2d, 3: nn.Conv3d}
UNCONV: dict[int, type[Any]] = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
POOL: dict[int, type[Any]] = {2: nn.AvgPool2d, 3: nn.AvgPool3d}
SLOPE = 0.01


def dimensions(axes: Sequence[Axis]) -> int:
    """2 or 3. Raises RecipeError for arrays of another kind."""
    if len(axes) not in (2, 3):
        raise RecipeError(f"this encoder works on 2D and 3D arrays; the modality has {len(axes)} axes",
                          "Choose encoder: transformer.")
    return len(axes)


class Residual(nn.Module):
    """Two 3-wide convolutions with a shortcut; a stride shrinks both (shortcut by mean pooling, He et al. 2019)."""

    def __init__(self, dims: int, width_in: int, width: int, stride: tuple[int, ...] = ()) -> None:
        super().__init__()
        conv, pool = CONV[dims], POOL[dims]
        # one group per channel is instance normalisation; torch's kernel for it takes half the time of nn.InstanceNorm
        self.conv1, self.norm1 = conv(width_in, width, 3, stride or 1, 1, bias=False), nn.GroupNorm(width, width)
        self.conv2, self.norm2 = conv(width, width, 3, 1, 1, bias=False), nn.GroupNorm(width, width)
        self.shortcut = nn.Sequential(*([pool(stride)] if stride else []))
        if width_in != width:
            self.shortcut.extend([conv(width_in, width, 1, bias=False), nn.GroupNorm(width, width)])

    def forward(self, x: Tensor) -> Tensor:
        y = F.leaky_relu(self.norm1(self.conv1(x)), SLOPE, inplace=True)
        return F.leaky_relu(self.norm2(self.conv2(y)) + self.shortcut(x), SLOPE, inplace=True)


class UNetSettings(EncoderSettings):
    """widths: channels of each stage. blocks: residual blocks of each. strides: of each step between stages, per axis; null: 2.

    decoder: whether it has the way up, and so `dense` with widths[0] channels.
    """

    widths: tuple[int, ...] = (32, 64, 128, 256)
    blocks: tuple[int, ...] = (1, 2, 2, 2)
    strides: tuple[tuple[int, ...], ...] | None = None
    decoder: bool = True

    @property
    def takes(self) -> frozenset[str]:
        return frozenset({"replace"})

    @property
    def provides(self) -> frozenset[str]:
        return frozenset({"mean", "pyramid"} | ({"dense"} if self.decoder else set()))

    @model_validator(mode="after")
    def _stages(self) -> Self:
        if len(self.blocks) != len(self.widths) or min(self.blocks) < 1:
            raise ValueError(f"blocks {self.blocks}: one positive number for each of the {len(self.widths)} widths")
        if self.strides is not None and len(self.strides) != len(self.widths) - 1:
            raise ValueError(f"strides {self.strides}: one entry for each of the {len(self.widths) - 1} steps between stages")
        return self

    def build(self, tokenizer: Tokenizer, axes: tuple[Axis, ...], channels: int) -> ResidualUNet:
        return ResidualUNet(self, dimensions(axes), channels)


class ResidualUNet(MapEncoder):
    """Residual stages down; transposed convolutions, concatenated skips and one residual block per level up.

    Instance norm and leaky ReLU. The pyramid is the encoder's. Raises MeristemError for views so small that the coarsest map
    has a single element, which instance norm would set to zero.
    """

    def __init__(self, settings: UNetSettings, dims: int, channels: int) -> None:
        super().__init__()
        self.takes, self.provides = settings.takes, settings.provides
        widths = self.pyramid_widths = settings.widths
        strides = settings.strides or ((2,) * dims,) * (len(widths) - 1)
        if any(len(s) != dims for s in strides):
            raise RecipeError(f"encoder.strides {strides} must hold {dims} numbers each", "One per axis of the modality.")
        self.width = widths[-1]
        self.pyramid_strides = tuple(tuple(math.prod(s[axis] for s in strides[:level]) for axis in range(dims))
                                     for level in range(len(widths)))
        self.multiple = self.pyramid_strides[-1]
        before: tuple[tuple[int, tuple[int, ...]], ...] = ((channels, ()), *zip(widths, strides, strict=False))
        self.stages = nn.ModuleList(
            nn.Sequential(Residual(dims, below, width, stride), *(Residual(dims, width, width) for _ in range(blocks - 1)))
            for (below, stride), width, blocks in zip(before, widths, settings.blocks, strict=True))
        self.ups, self.merges = nn.ModuleList(), nn.ModuleList()
        if settings.decoder:
            self.dense_width = widths[0]
            for fine, coarse, stride in zip(widths, widths[1:], strides, strict=False):
                self.ups.append(UNCONV[dims](coarse, fine, stride, stride, bias=False))
                self.merges.append(Residual(dims, 2 * fine, fine))
        for module in self.modules():
            if isinstance(module, (CONV[dims], UNCONV[dims])):
                nn.init.kaiming_normal_(module.weight, a=SLOPE)

    def maps(self, x: Tensor, dense: bool) -> tuple[Sequence[Tensor], Tensor | None]:
        if math.prod(x.shape[2:]) <= math.prod(self.pyramid_strides[-1]):
            raise MeristemError(f"a view of {tuple(x.shape[2:])} is a single element at the last stage, whose stride is "
                                f"{self.pyramid_strides[-1]}", "Enlarge the view, or use fewer encoder.widths.")
        pyramid = []
        for stage in self.stages:
            x = stage(x)
            pyramid.append(x)
        if not (dense and self.ups):
            return pyramid, None
        for level in reversed(range(len(self.ups))):
            x = self.merges[level](torch.cat([pyramid[level], self.ups[level](x)], 1))
        return pyramid, x

    def units(self) -> list[nn.Module]:
        return [*self.stages, *self.merges]

    def layer_groups(self) -> list[list[nn.Parameter]]:
        down = [list(stage.parameters()) for stage in self.stages]
        up = [[*a.parameters(), *b.parameters()] for a, b in zip(self.ups, self.merges, strict=True)]
        return down + up[::-1]
