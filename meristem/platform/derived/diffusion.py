"""Parts of a batch, noise, and noised views (diffusion)."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from meristem.errors import RecipeError
from meristem.modalities.base import View
from meristem.platform.derived.base import Derivation, needs_lattice

if TYPE_CHECKING:
    from meristem.platform.step import Step


class Part(Derivation):
    """The rows of a process's share of the batch from one share to another, as they are: [0, 0.5] is its first half."""

    share: tuple[Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0, le=1)]]

    @model_validator(mode="after")
    def _some(self) -> Self:
        if self.share[0] >= self.share[1]:
            raise ValueError(f"share: from the lower to the higher, got {list(self.share)}")
        return self

    def derive(self, view: View, name: str, step: Step) -> View:
        first, end = (math.floor(len(view) * share) for share in self.share)
        if first == end:
            raise RecipeError(f"of {len(view)} rows the part {list(self.share)} has none", "Choose a larger train.batch.")
        return replace(view.select(torch.arange(first, end, device=view.array.device)), name=name)


def drawn_noise(view: str, step: Step) -> Tensor:
    """(B, C, *S) standard normal numbers of a view: the same whoever asks in a step."""
    return step.rng("noise", view).normal("element", *step.view(view).array.shape[1:])


class Noise(Derivation):
    """Nothing of the view but standard normal noise: what `diffused` adds to it in the same step."""

    def check(self, recipe: Any) -> list[str]:
        return needs_lattice(recipe, "puts noise on")

    def derive(self, view: View, name: str, step: Step) -> View:
        return replace(view, name=name, array=drawn_noise(self.of, step).to(view.array))


@cache
def remaining(schedule: str, steps: int) -> Tensor:
    """(steps,) float64 ᾱ: the share of the variance that is left of a picture after each step of diffusion.

    `cosine`: β_i = 1 − f(i + 1) / f(i), at most 0.999, f(i) = cos²((i / T + 0.008) / 1.008 · π / 2) (Nichol and Dhariwal 2021,
    equation 17). `linear`: β from 0.1 / T to 20 / T in equal steps (Ho et al. 2020, for any T).
    """
    if schedule == "linear":
        beta = torch.linspace(0.1 / steps, 20 / steps, steps, dtype=torch.float64)
    else:
        left = ((torch.arange(steps + 1, dtype=torch.float64) / steps + 0.008) / 1.008 * math.pi / 2).cos().square()
        beta = (1 - left[1:] / left[:-1]).clamp_max(0.999)
    return (1 - beta).cumprod(0)


class Diffused(Derivation):
    """A view with noise on it, as much as after a number of steps that is drawn for each row: √ᾱ x + √(1 − ᾱ) n (Ho et al.
    2020, equation 4).

    The parameter `timestep` is that number, 1 … steps; a view that has none is one at 0, without noise.
    """

    steps: Annotated[int, Field(ge=1)] = 1000
    schedule: Literal["cosine", "linear"] = "cosine"

    def check(self, recipe: Any) -> list[str]:
        return needs_lattice(recipe, "puts noise on")

    def derive(self, view: View, name: str, step: Step) -> View:
        drawn = step.rng("diffusion", self.of).integers("timestep", self.steps)
        left = remaining(self.schedule, self.steps).to(drawn.device)[drawn].reshape(-1, *[1] * (view.array.ndim - 1))
        array = left.sqrt() * view.array + (1 - left).sqrt() * drawn_noise(self.of, step)
        return replace(view, name=name, array=array.to(view.array), params={**view.params, "timestep": drawn + 1})
