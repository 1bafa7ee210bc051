"""A window of another view."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from meristem.modalities.base import View
from meristem.platform.derived.base import Derivation, needs_lattice

if TYPE_CHECKING:
    from meristem.platform.step import Step

Share = Annotated[float, Field(ge=0, le=1)]
Area = Annotated[float, Field(gt=0, le=1)]


class Crop(Derivation):
    """A random window of each row, resized: what it shows lies inside the other view (CropMAE, Eymaël et al. 2024).

    size: of the new view; null: the other's. area: range of the window's share of the other view. aspect: its sides are
    stretched by ratios log-uniform in this range about the proportions of the other view, and cut to it. flip: probability for
    each axis, or () for none.
    """

    size: tuple[int, ...] | None = None
    area: tuple[Area, Area] = (0.3, 0.6)
    aspect: tuple[Annotated[float, Field(gt=0)], float] = (0.75, 4 / 3)
    flip: tuple[Share, ...] = ()

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        if self.area[0] > self.area[1] or self.aspect[0] > self.aspect[1]:
            raise ValueError("area and aspect go from low to high")
        return self

    def check(self, recipe: Any) -> list[str]:
        if problems := needs_lattice(recipe, "cuts windows out of"):
            return problems
        dims = len(recipe.modality.axes)
        return [f"{name} has {len(given)} entries for {dims} axes" for name, given in (("size", self.size), ("flip", self.flip))
                if given and len(given) != dims]

    def derive(self, view: View, name: str, step: Step) -> View:
        shape = tuple(view.array.shape[2:])
        size, dims, whole = self.size or shape, len(shape), view.frame.spacing.new_tensor(shape)
        rng = step.rng(f"crop {name}", self.of)
        area = rng.uniform("area", 1, low=self.area[0], high=self.area[1])
        low, high = map(math.log, self.aspect)
        stretch = torch.cat([rng.uniform("aspect", dims - 1, low=low, high=high), area.new_zeros(len(area), 1)], 1)
        side = (whole * area ** (1 / dims) * (stretch - stretch.mean(1, keepdim=True)).exp()).minimum(whole)
        first = rng.uniform("place", dims) * (whole - side)
        back = rng.uniform("flip", dims) < area.new_tensor(self.flip or (0.0,) * dims)
        stride = side / side.new_tensor(size) * torch.where(back, -1, 1)  # elements of the other view, for one of the new
        origin = torch.where(back, first + side, first) - 0.5 + 0.5 * stride
        array, weight, fields = view.array, view.weight, dict(view.fields)
        for axis, count in enumerate(size):
            place = origin[:, axis, None] + stride[:, axis, None] * torch.arange(count, device=origin.device)
            table = _linear(place, stride[:, axis].abs().clamp_min(1), shape[axis])
            array = _along(array, table, axis + 2)
            weight = None if weight is None else _along(weight, table, axis + 2)
            nearest = place.round().long().clamp(0, shape[axis] - 1)
            fields = {key: _picked(x, nearest, axis + 1) for key, x in fields.items()}
        inner = torch.diag_embed(torch.cat([stride, torch.ones_like(stride[:, :1])], 1))
        inner[:, :-1, -1] = origin
        return replace(view, name=name, array=array, weight=weight, fields=fields, frame=view.frame.compose(inner, size))


def _linear(place: Tensor, width: Tensor, n: int) -> Tensor:
    """(B, m, n) weights of n elements at the places (B, m): linear over `width` (B,), and of the last one beyond the ends."""
    near = 1 - (place.clamp(0, n - 1)[..., None] - torch.arange(n, device=place.device)).abs() / width[:, None, None]
    table = near.clamp_min(0)
    return table / table.sum(-1, keepdim=True)


def _along(x: Tensor, table: Tensor, axis: int) -> Tensor:
    """x (B, …, n, …) times table (B, m, n) along an axis: (B, …, m, …)."""
    rows = x.movedim(axis, -1)
    made = rows.flatten(1, -2) @ table.mT.to(rows)
    return made.unflatten(1, rows.shape[1:-1]).movedim(-1, axis)


def _picked(x: Tensor, index: Tensor, axis: int) -> Tensor:
    """x (B, …, n, …) at index (B, m) along an axis."""
    shape = [1] * x.ndim
    shape[0], shape[axis] = index.shape
    wanted = list(x.shape)
    wanted[axis] = index.shape[1]
    return x.gather(axis, index.reshape(shape).expand(wanted))
