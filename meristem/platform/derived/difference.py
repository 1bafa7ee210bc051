"""What changes in an array from one step of time to the next."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field

from meristem.modalities.base import View
from meristem.platform.derived.base import Derivation, timed

if TYPE_CHECKING:
    from meristem.platform.step import Step


class Difference(Derivation):
    """x[t + stride] − x[t] along the first axis, which must be time; 0 in the last `stride` places, where nothing comes next
    (the motion of MAMP, Mao et al. 2023, section 3.2). What is missing on either side weighs nothing.

    It lies on the lattice of the view that it is made of, so that its tokens are of the same places.
    """

    stride: Annotated[int, Field(ge=1)] = 1

    def check(self, recipe: Any) -> list[str]:
        return [] if timed(recipe) else [
            f"it compares moments, and {recipe.modality.name} data has no axis of time; leave it out"]

    def derive(self, view: View, name: str, step: Step) -> View:
        n, weight = view.array.shape[2] - self.stride, view.weight
        change = torch.zeros_like(view.array)
        if n > 0:
            change[:, :, :n] = view.array[:, :, self.stride:] - view.array[:, :, :n]
        if weight is not None and n > 0:
            weight = torch.cat([weight[:, :, :n] * weight[:, :, self.stride:], weight[:, :, n:]], 2)
            change = change * (weight > 0)
        return replace(view, name=name, array=change, weight=weight)
