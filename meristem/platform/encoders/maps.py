"""Encoders that eat a whole array and give feature maps: convolutions and window transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from meristem.errors import RecipeError
from meristem.modalities.stream import LatticeStream, TokenStream
from meristem.platform.encoders.base import Encoder
from meristem.platform.objectives import Encoded, Plan


def visible_array(stream: TokenStream, plan: Plan | None) -> Tensor:
    """The array (B, C, *S) of a lattice stream, zero where the plan hides a token. Raises RecipeError for other streams."""
    if not isinstance(stream, LatticeStream):
        raise RecipeError("this encoder needs arrays, and this modality's tokens are not cut from one",
                          "Choose encoder: transformer.")
    if plan is None:
        return stream.array
    assert stream.lattice is not None
    hidden = plan.hidden.reshape(-1, 1, *stream.lattice)
    for axis, patch in enumerate(stream.patch):
        hidden = hidden.repeat_interleave(patch, 2 + axis)
    rest = [n - m for n, m in zip(stream.array.shape[2:], hidden.shape[2:], strict=True)]
    return stream.array.masked_fill(F.pad(hidden, [p for n in reversed(rest) for p in (0, n)]), 0)


def _crop(x: Tensor, size: Sequence[int]) -> Tensor:
    """The first `size` elements of each axis of a map (B, D, *S); not a copy."""
    index: tuple[Any, ...] = (..., *map(slice, size))
    return x[index]


class MapEncoder(Encoder):
    """Base of the array encoders; a subclass writes `maps`.

    The array is padded with its edge until `multiple` divides its size, and every map is cropped back: a level of stride s has
    ceil(n / s) elements per axis. `tokens` are the coarsest level in raster order and `lattice` is **that level's** shape,
    the stream's only where the patch is the coarsest stride; dense targets should ask for `dense`.
    `replace` sets hidden elements to zero, the mean of a normalised array; there is no learned token.
    """

    multiple: tuple[int, ...]

    def maps(self, x: Tensor, dense: bool) -> tuple[Sequence[Tensor], Tensor | None]:
        """Array (B, C, *S), S divisible by `multiple`, to the pyramid, fine to coarse, and, if asked, `dense`."""
        raise NotImplementedError

    def grid(self, size: tuple[int, ...], patch: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        strides = self.pyramid_strides[-1]
        return tuple(-(-n // s) for n, s in zip(size, strides, strict=True)), strides

    def forward(self, stream: TokenStream, plan: Plan | None = None, *, want: frozenset[str] = frozenset()) -> Encoded:
        x = visible_array(stream, plan)
        size = x.shape[2:]
        short = [-n % s for n, s in zip(size, self.multiple, strict=True)]
        if any(short):
            x = F.pad(x, [p for n in reversed(short) for p in (0, n)], mode="replicate")
        pyramid, dense = self.maps(x, "dense" in want)
        pyramid = [_crop(level, [-(-n // s) for n, s in zip(size, strides, strict=True)])
                   for level, strides in zip(pyramid, self.pyramid_strides, strict=True)]
        tokens = pyramid[-1].flatten(2).transpose(1, 2)
        return Encoded(tokens, {"mean": tokens.mean(1)}, torch.ones(tokens.shape[:2], dtype=torch.bool, device=x.device),
                       lattice=tuple(pyramid[-1].shape[2:]), pyramid=pyramid if "pyramid" in want else None,
                       dense=None if dense is None else _crop(dense, size))
