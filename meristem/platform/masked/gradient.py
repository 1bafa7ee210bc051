"""A target of edges: the gradient map of an array."""

from __future__ import annotations

from functools import reduce
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from meristem.modalities.base import Tokenizer
from meristem.modalities.stream import LatticeStream
from meristem.platform.derived.base import needs_lattice
from meristem.platform.encoders.base import Encoder
from meristem.platform.masked.targets import Content, TargetSettings, element_weight

if TYPE_CHECKING:
    from meristem.platform.step import Step

CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


def sobel(x: Tensor) -> Tensor:
    """Length of the gradient of each channel of arrays (B, C, *S), per element step; same shape.

    Along an axis the central difference, smoothed by (1, 2, 1) / 4 along every other one; the edge is repeated.
    """
    dims = x.ndim - 2
    slope, smooth = x.new_tensor([-0.5, 0.0, 0.5]), x.new_tensor([0.25, 0.5, 0.25])
    kernels = [reduce(lambda k, other: k[..., None] * other, [slope if axis == d else smooth for axis in range(dims)])
               if dims > 1 else slope for d in range(dims)]
    padded = F.pad(x.flatten(0, 1)[:, None], (1, 1) * dims, mode="replicate")
    return CONVOLVE[dims](padded, torch.stack(kernels)[:, None]).square().sum(1).sqrt().reshape(x.shape)


def edges(stream: LatticeStream) -> LatticeStream:
    """The same tokens of the gradient map; elements next to one outside the sample weigh nothing."""
    weight = stream.weight_array
    if weight is not None:
        weight = -POOL[weight.ndim - 2](-weight.float(), 3, 1, 1)
    return LatticeStream(sobel(stream.array.float()), stream.patch, stream.frame, stream.item, weight)


class Gradient(TargetSettings):
    """The tokens of the view's gradient map, the length of Sobel's gradient (the second branch of Uni4Eye, Cai et al. 2022).

    normalise: `token` gives every token mean 0 and variance 1, as for the content target. Squared error per element.
    """

    normalise: Literal["none", "token"] = "token"

    def check(self, recipe: Any) -> list[str]:
        return [f"the gradient target: {problem}" for problem in needs_lattice(recipe, "takes the gradient of")]

    def size(self, tokenizer: Tokenizer, encoder: Encoder) -> int:
        return tokenizer.token_size

    def compare(self, step: Step, view: str, index: Tensor | None, prediction: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        stream = step.stream(view)
        assert isinstance(stream, LatticeStream)
        tokens = edges(stream) if index is None else edges(stream).take(index)
        mean, std = Content(normalise=self.normalise).statistics(tokens, step.assembly.recipe.modality.channels)
        w = weight[..., None] * element_weight(tokens)
        return (w * (prediction.float() - (tokens.content - mean) / std).square()).sum(), w.sum()
