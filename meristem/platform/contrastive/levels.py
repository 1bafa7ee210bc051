"""Levels of units that are made of a whole map: places that looks have in common, slots."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from meristem.modalities.base import Settings
from meristem.modalities.frame import Frame
from meristem.platform.derived.base import needs_lattice, needs_time
from meristem.platform.heads import Prototypes
from meristem.platform.objectives import Units
from meristem.platform.schedules import Scalar

if TYPE_CHECKING:
    from meristem.platform.step import Step


class LevelSettings(Settings):
    """The typed entry of such a level. keys: that its units have beside item and view.

    heads: of the recipe that it needs beside the objective's own. whole: whether it needs every cell of a map.
    """

    what: ClassVar[str]
    keys: ClassVar[tuple[str, ...]]
    whole: ClassVar[bool] = True

    @property
    def heads(self) -> tuple[str, ...]:
        return ()

    def check(self, recipe: Any, views: Collection[str], head: str | None) -> list[str]:
        """What is impossible about it in this recipe; empty when all is well. views: that it is of; head: the objective's."""
        return [f"level {self.what}: {problem}" for problem in needs_lattice(recipe, "takes its units from maps of")]

    def units(self, step: Step, view: str, by: str, head: str | None, masked: bool) -> Units:
        raise NotImplementedError


def shared_places(frame: Frame, item: Tensor, points: int) -> tuple[Tensor, Tensor]:
    """Source points (B, n, C) in the middle of equal parts, `points` along each axis, of the box where all rows of an item
    overlap, and (B, n) whether all of them show that point. item: (B,) whose each row is.
    """
    group = torch.unique(item, return_inverse=True)[1]

    def over(x: Tensor, how: str) -> Tensor:
        """The greatest or least of x (B, n) over the rows of the same item."""
        index = group[:, None].expand_as(x)
        return torch.zeros_like(x).scatter_reduce(0, index, x, how, include_self=False)[group]

    low, high = frame.boxes().unbind(-1)
    low, high = over(low, "amax"), over(high, "amin")
    share = (torch.arange(points, device=low.device) + 0.5) / points
    grid = torch.cartesian_prod(*[share] * frame.dims).reshape(-1, frame.dims)
    at = low[:, None] + (high - low)[:, None] * grid
    shown = frame.from_source(at)[1] & (high > low).all(1, keepdim=True)
    return at, over(shown.to(at), "amin") > 0


class Common(LevelSettings):
    """What the head makes of the map at the places that all looks of a sample show, `points` along each axis of their overlap.

    Key `token`: the number of the place. Cells go through the head first and are sampled then, linear between their centres;
    looks without a common place have no units.
    """

    what = "common"
    keys = ("token",)
    points: Annotated[int, Field(ge=1)] = 7

    def check(self, recipe: Any, views: Collection[str], head: str | None) -> list[str]:
        alone = [f"level common: view '{name}' has one look, which has nothing to share; set views.{name}.count=2"
                 for name in sorted(views) if recipe.looks[name].count < 2]
        return super().check(recipe, views, head) + alone

    def units(self, step: Step, view: str, by: str, head: str | None, masked: bool) -> Units:
        cells, looks = step.units(view, by, "dense", head, masked), step.view(view)
        places, shown = shared_places(looks.frame, looks.item, self.points)
        mapped = replace(step.encode(view, by, masked), tokens=cells.z.unflatten(0, (len(looks), -1)))
        key = {name: x[:, None].expand_as(shown)[shown] for name, x in _rows(cells, len(looks)).items()}
        key["token"] = torch.arange(shown.shape[1], device=shown.device).expand_as(shown)[shown]
        return Units(mapped.at(places)[0][shown], key, torch.ones(len(key["token"]), device=shown.device), places[shown])


class Slots(LevelSettings):
    """One unit of each map for each prototype of the head `groups`, which stands on the objective's own: the mean of the map's
    cells, weighted by how much of each the prototype gets in a softmax over all of them (SlotCon, Wen et al. 2022, equation 4).

    Key `slot`: the prototype. A slot that wins no cell of its map has weight 0. temperature: of the softmax.
    """

    what = "slots"
    keys = ("slot",)
    groups: str
    temperature: Scalar = 0.07

    @property
    def heads(self) -> tuple[str, ...]:
        return (self.groups,)

    def check(self, recipe: Any, views: Collection[str], head: str | None) -> list[str]:
        if super().check(recipe, views, head):
            return super().check(recipe, views, head)
        problems = []
        groups = recipe.heads.get(self.groups)
        if not isinstance(groups, Prototypes) or groups.input != head:
            problems.append(f"level slots: groups must name a head of `prototypes` on '{head}'; '{self.groups}' is none")
        problems += [f"level slots: the map of view '{name}' is one cell, which leaves slots nothing to share out; enlarge "
                     f"views.{name}.size or choose an encoder of smaller stride" for name in sorted(views)
                     if math.prod(recipe.encoder.lattice(recipe.modality, recipe.looks[name].size)) < 2]
        return problems

    def units(self, step: Step, view: str, by: str, head: str | None, masked: bool) -> Units:
        cells, rows = step.units(view, by, "dense", head, masked), len(step.view(view))
        scores = step.units(view, by, "dense", self.groups, masked).z.unflatten(0, (rows, -1))
        z, wins = pooled(cells.z.unflatten(0, (rows, -1)), scores, step.value(self.temperature))
        key = {name: x[:, None].expand_as(wins).flatten() for name, x in _rows(cells, rows).items()}
        key["slot"] = torch.arange(wins.shape[1], device=wins.device).expand_as(wins).flatten()
        return Units(z.flatten(0, 1), key, wins.flatten().float())


class Frames(LevelSettings):
    """One unit for each step along time: the mean of what the head makes of its tokens, those that are not hidden.

    Key `time`: the step, of a view that shows a part of another clip counted in that one.
    """

    what = "frames"
    keys = ("time",)
    whole = False

    def check(self, recipe: Any, views: Collection[str], head: str | None) -> list[str]:
        return [f"level frames: {problem}" for problem in needs_time(recipe, "takes its units from")]

    def units(self, step: Step, view: str, by: str, head: str | None, masked: bool) -> Units:
        cells, lattice = step.units(view, by, "dense", head, masked), step.stream(view).lattice
        assert lattice is not None
        time = cells.key["token"] // math.prod(lattice[1:]) + cells.key.get("time", torch.zeros_like(cells.key["token"]))
        group = torch.unique(torch.stack([cells.key["item"], cells.key["view"], time]), dim=1, return_inverse=True)[1]
        count = int(group.max()) + 1
        size = torch.bincount(group, minlength=count)
        z = cells.z.new_zeros(count, cells.z.shape[1]).index_add(0, group, cells.z) / size[:, None]
        first = torch.zeros(count, dtype=torch.int64, device=group.device).scatter_reduce(
            0, group, torch.arange(len(group), device=group.device), "amin", include_self=False)
        key = {name: x[first] for name, x in {**cells.key, "time": time}.items() if name not in ("token", "cell", "hidden")}
        return Units(z, key, torch.ones(count, device=z.device))


def pooled(x: Tensor, scores: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Slots of maps x (B, N, D) by scores (B, N, K): (B, K, D), and (B, K) whether one has the highest score of a cell.

    a_nk = softmax_k(s_nk / τ) + 1e-6 ; slot_k = Σ_n a_nk x_n / Σ_n a_nk, as in the authors' code.
    """
    with torch.autocast(x.device.type, enabled=False):
        share = (scores.float() / temperature).softmax(-1) + 1e-6
        share = share / share.sum(1, keepdim=True)
        return share.transpose(1, 2) @ x.float(), F.one_hot(scores.argmax(-1), scores.shape[-1]).any(1)


def _rows(cells: Units, rows: int) -> dict[str, Tensor]:
    """The keys of whole maps (rows,), from those of their cells."""
    return {name: x.unflatten(0, (rows, -1))[:, 0] for name, x in cells.key.items() if name not in ("token", "cell", "hidden")}
