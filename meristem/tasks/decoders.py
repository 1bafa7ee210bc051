"""Decoders: what an encoder returns to logits for every element of the array, in 2D and 3D."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meristem.modalities.stream import LatticeStream
from meristem.platform.assembly import Assembly
from meristem.platform.encoders.unet import CONV, UNCONV, Residual
from meristem.platform.objectives import Encoded


class UpPath(nn.Module):
    """Maps of falling resolution, fine to coarse, merged from the coarsest up: upsample, concatenate, residual block.

    widths: channels of each map. factors: upsampling per axis from map i+1 to map i.
    """

    def __init__(self, dims: int, widths: list[int], factors: list[tuple[int, ...]], classes: int) -> None:
        super().__init__()
        self.up = nn.ModuleList(UNCONV[dims](coarse, fine, factor, factor)
                                for fine, coarse, factor in zip(widths[:-1], widths[1:], factors, strict=True))
        self.merge = nn.ModuleList(Residual(dims, 2 * fine, fine) for fine in widths[:-1])
        self.out = CONV[dims](widths[0], classes, 1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        x = maps[-1]
        for i in reversed(range(len(self.up))):
            x = self.up[i](x)
            skip = maps[i]
            x = x[(..., *(slice(0, n) for n in skip.shape[2:]))]  # a padded coarse map may come up a voxel too large
            x = self.merge[i](torch.cat([x, skip], 1))
        logits: Tensor = self.out(x)
        return logits


class Decoder(nn.Module):
    """Logits (B, classes, *S) from one pass. want: what the pass must return."""

    want: frozenset[str] = frozenset()

    def forward(self, encoded: Encoded, stream: LatticeStream) -> Tensor:
        raise NotImplementedError


class DenseDecoder(Decoder):
    """A 1×1 convolution on an encoder's own full-resolution map."""

    want = frozenset({"dense"})

    def __init__(self, dims: int, width: int, classes: int) -> None:
        super().__init__()
        self.out = CONV[dims](width, classes, 1)

    def forward(self, encoded: Encoded, stream: LatticeStream) -> Tensor:
        logits: Tensor = self.out(encoded.dense)
        return logits


class PyramidDecoder(Decoder):
    """A U-Net's decoder on the pyramid of a hierarchical encoder, with a stem at full resolution (Ronneberger et al. 2015)."""

    want = frozenset({"pyramid"})

    def __init__(self, dims: int, channels: int, widths: tuple[int, ...], strides: tuple[tuple[int, ...], ...], base: int,
                 classes: int) -> None:
        super().__init__()
        levels = [(base, (1,) * dims), *zip(widths, strides, strict=True)]
        levels = [level for i, level in enumerate(levels) if i == 0 or level[1] != levels[i - 1][1]]
        self.stem = Residual(dims, channels, base)
        self.squeeze = nn.ModuleList(CONV[dims](width, min(width, base * 2 ** (i + 1)), 1)
                                     for i, (width, _) in enumerate(levels[1:]))
        shown = [base, *(min(width, base * 2 ** (i + 1)) for i, (width, _) in enumerate(levels[1:]))]
        factors = [tuple(c // f for f, c in zip(fine, coarse, strict=True))
                   for (_, fine), (_, coarse) in itertools.pairwise(levels)]
        self.path = UpPath(dims, shown, factors, classes)
        self.skip_first = len(widths) - (len(levels) - 1)

    def forward(self, encoded: Encoded, stream: LatticeStream) -> Tensor:
        assert encoded.pyramid is not None
        maps = [squeeze(x) for squeeze, x in zip(self.squeeze, encoded.pyramid[self.skip_first:], strict=True)]
        logits: Tensor = self.path([self.stem(stream.array), *maps])
        return logits


class UnetrDecoder(Decoder):
    """UNETR (Hatamizadeh et al. 2022): layers of a plain transformer brought to falling strides, then a U-Net's decoder.

    Level s lies at stride min(2^s, patch) per axis; level 0 is a stem on the array, the last is the final tokens.
    """

    want = frozenset({"layers"})

    def __init__(self, dims: int, channels: int, width: int, depth: int, patch: tuple[int, ...], base: int,
                 classes: int) -> None:
        super().__init__()
        levels = max(int(math.log2(p)) for p in patch)
        strides = [tuple(min(2**s, p) for p in patch) for s in range(levels + 1)]
        factors = [tuple(c // f for f, c in zip(fine, coarse, strict=True))
                   for fine, coarse in itertools.pairwise(strides)]
        widths = [min(base * 2**s, 8 * base) for s in range(levels + 1)]
        self.layers = [round(depth * s / levels) - 1 for s in range(1, levels + 1)]
        self.stem = Residual(dims, channels, base)
        self.lift = nn.ModuleList()
        for s in range(1, levels + 1):
            steps: list[nn.Module] = [CONV[dims](width, widths[levels], 1)]
            for t in reversed(range(s, levels)):
                steps += [UNCONV[dims](widths[t + 1], widths[t], factors[t], factors[t]), Residual(dims, widths[t], widths[t])]
            self.lift.append(nn.Sequential(*steps))
        self.path = UpPath(dims, widths, factors, classes)

    def forward(self, encoded: Encoded, stream: LatticeStream) -> Tensor:
        assert encoded.layers is not None and encoded.lattice is not None
        maps = [self.stem(stream.array)]
        for index, lift in zip(self.layers, self.lift, strict=True):
            tokens = encoded.tokens if index == len(encoded.layers) - 1 else encoded.layers[index]
            maps.append(lift(tokens.transpose(1, 2).reshape(len(tokens), -1, *encoded.lattice)))
        logits: Tensor = self.path(maps)
        return logits


class LightDecoder(Decoder):
    """Each token writes `base` channels over its patch; one residual block sees them beside the array."""

    def __init__(self, dims: int, channels: int, width: int, patch: tuple[int, ...], base: int, classes: int) -> None:
        super().__init__()
        self.write = UNCONV[dims](width, base, patch, patch)
        self.merge = Residual(dims, base + channels, base)
        self.out = CONV[dims](base, classes, 1)

    def forward(self, encoded: Encoded, stream: LatticeStream) -> Tensor:
        assert encoded.lattice is not None
        grid = encoded.tokens.transpose(1, 2).reshape(len(encoded.tokens), -1, *encoded.lattice)
        logits: Tensor = self.out(self.merge(torch.cat([self.write(grid), stream.array], 1)))
        return logits


class LinearDecoder(Decoder):
    """A 1×1 convolution of an encoder's tokens, or of each level of its pyramid and of its own full-resolution map, enlarged
    linearly and summed: a probe of what the encoder knows, to which the array itself is not shown. Batch norm without scale and
    shift goes before it, since features of different pretraining differ in size (He et al. 2022, appendix A).
    """

    def __init__(self, dims: int, widths: Sequence[int], want: frozenset[str], classes: int) -> None:
        super().__init__()
        self.want = want
        norm = nn.BatchNorm3d if dims == 3 else nn.BatchNorm2d
        self.out = nn.ModuleList(nn.Sequential(norm(width, affine=False), CONV[dims](width, classes, 1)) for width in widths)
        self.mode = "trilinear" if dims == 3 else "bilinear"

    def forward(self, encoded: Encoded, stream: LatticeStream) -> Tensor:
        assert encoded.lattice is not None
        maps = [*encoded.pyramid] if encoded.pyramid else [encoded.tokens.transpose(1, 2).unflatten(2, encoded.lattice)]
        if encoded.dense is not None:
            maps.append(encoded.dense)
        logits = [F.interpolate(out(x), size=stream.array.shape[2:], mode=self.mode)
                  for out, x in zip(self.out, maps, strict=True)]
        return torch.stack(logits).sum(0)


Kind = Literal["auto", "light", "unetr", "linear"]


def decoder(assembly: Assembly, kind: Kind, base: int, classes: int) -> Decoder:
    """The decoder for an assembly's encoder. auto: its own dense map, else its pyramid, else UNETR."""
    encoder, channels = assembly.encoder, assembly.recipe.modality.channels
    patch: tuple[int, ...] = assembly.recipe.modality.options.patch
    dims = len(assembly.recipe.modality.axes)
    if kind == "linear":
        want = encoder.provides & {"pyramid", "dense"}
        widths = (*(encoder.pyramid_widths or (encoder.width,)), *([encoder.dense_width] if "dense" in want else ()))
        return LinearDecoder(dims, widths, want, classes)
    if kind == "auto" and "dense" in encoder.provides:
        return DenseDecoder(dims, encoder.dense_width, classes)
    if "pyramid" in encoder.provides:
        return PyramidDecoder(dims, channels, encoder.pyramid_widths, encoder.pyramid_strides, base, classes)
    if kind == "light":
        return LightDecoder(dims, channels, encoder.width, patch, base, classes)
    return UnetrDecoder(dims, channels, encoder.width, encoder.depth, patch, base, classes)
