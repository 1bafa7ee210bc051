"""A target of slices: what a 2D encoder makes of each alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from meristem.modalities.base import Tokenizer
from meristem.platform.encoders.base import Encoder
from meristem.platform.masked.targets import TargetSettings

if TYPE_CHECKING:
    from meristem.platform.step import Step


class Slices(TargetSettings):
    """The vector that each slice had before any was hidden, as if constant: squared error, averaged over its numbers.

    Source: the masked slice embeddings of Nguyen et al. 2023 (joint 2D and 3D), whose encoder of slices is frozen by then.
    """

    def check(self, recipe: Any) -> list[str]:
        if "slices" in recipe.encoder.provides:
            return []
        return ["the slices target is made by an encoder that works slice by slice; choose encoder: sequence"]

    def size(self, tokenizer: Tokenizer, encoder: Encoder) -> int:
        return encoder.width

    def compare(self, step: Step, view: str, index: Tensor | None, prediction: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        target = step.encode(view, masked=True).slices
        assert target is not None and index is None
        each = weight.unflatten(1, (target.shape[1], -1)).mean(2)  # a slice's tokens are hidden together
        error = (prediction.float() - target.detach().float()).square().mean(-1)
        return (each * error).sum(), each.sum()
