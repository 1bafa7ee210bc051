"""Pyramids of feature maps for detectors, of any encoder on a lattice, in two and three dimensions."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from meristem.modalities.stream import LatticeStream
from meristem.platform.assembly import Assembly
from meristem.platform.encoders.unet import CONV, POOL, UNCONV
from meristem.platform.objectives import Encoded


class Pyramid(nn.Module):
    """Maps (B, width, *S_i), fine to coarse, from one pass. want: what the pass must return. strides: of each, per axis."""

    want: frozenset[str] = frozenset()
    strides: tuple[tuple[int, ...], ...]

    def forward(self, encoded: Encoded, stream: LatticeStream) -> list[Tensor]:
        raise NotImplementedError


def _norm(width: int) -> nn.Module:
    return nn.GroupNorm(1, width)  # over channels and places: the same for every batch


class SimplePyramid(Pyramid):
    """From the last tokens of a plain transformer alone: transposed convolutions for finer maps, pooling for a coarser one
    (Li et al. 2022, ViTDet, section 3).

    Level i lies at the patch's stride times 2^(i − levels + 2): with four levels a quarter, a half, one and two patches.
    """

    def __init__(self, dims: int, tokens: int, patch: tuple[int, ...], levels: int, width: int) -> None:
        super().__init__()
        powers = [i - levels + 2 for i in range(levels)]
        self.strides = tuple(tuple(p * 2**k if k >= 0 else p // 2**-k for p in patch) for k in powers)
        self.scale, self.out = nn.ModuleList(), nn.ModuleList()
        for k in powers:
            steps: list[nn.Module] = []
            channels = tokens
            for step in range(max(-k, 0)):
                finer = max(channels // 2, width)
                steps += [UNCONV[dims](channels, finer, 2, 2), *([_norm(finer), nn.GELU()] if step < -k - 1 else [])]
                channels = finer
            if k > 0:
                steps.append(POOL[dims](2**k, 2**k, ceil_mode=True))
            self.scale.append(nn.Sequential(*steps))
            self.out.append(nn.Sequential(CONV[dims](channels, width, 1, bias=False), _norm(width),
                                          CONV[dims](width, width, 3, padding=1, bias=False), _norm(width)))

    def forward(self, encoded: Encoded, stream: LatticeStream) -> list[Tensor]:
        assert encoded.lattice is not None
        grid = encoded.tokens.transpose(1, 2).reshape(len(encoded.tokens), -1, *encoded.lattice)
        return [out(scale(grid)) for scale, out in zip(self.scale, self.out, strict=True)]


class FeaturePyramid(Pyramid):
    """The coarsest levels of a hierarchical encoder, each joined by the next one (Lin et al. 2017, FPN, section 3)."""

    want = frozenset({"pyramid"})

    def __init__(self, dims: int, widths: tuple[int, ...], strides: tuple[tuple[int, ...], ...], levels: int,
                 width: int) -> None:
        super().__init__()
        self.levels = levels = min(levels, len(widths))
        self.strides = strides[-levels:]
        self.lateral = nn.ModuleList(CONV[dims](n, width, 1) for n in widths[-levels:])
        self.out = nn.ModuleList(CONV[dims](width, width, 3, padding=1) for _ in range(levels))

    def forward(self, encoded: Encoded, stream: LatticeStream) -> list[Tensor]:
        assert encoded.pyramid is not None
        maps = [lateral(x) for lateral, x in zip(self.lateral, encoded.pyramid[-self.levels:], strict=True)]
        for i in reversed(range(self.levels - 1)):
            maps[i] = maps[i] + F.interpolate(maps[i + 1], maps[i].shape[2:], mode="nearest")
        return [out(x) for out, x in zip(self.out, maps, strict=True)]


def pyramid(assembly: Assembly, levels: int, width: int) -> Pyramid:
    """The pyramid for an assembly's encoder: of its own maps where it has some, else of its tokens."""
    encoder, dims = assembly.encoder, len(assembly.recipe.modality.axes)
    if "pyramid" in encoder.provides:
        return FeaturePyramid(dims, encoder.pyramid_widths, encoder.pyramid_strides, levels, width)
    return SimplePyramid(dims, encoder.width, assembly.recipe.modality.options.patch, levels, width)

