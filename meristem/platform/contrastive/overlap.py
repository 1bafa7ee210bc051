"""Overlap: which share of one look's box another's covers, and the prediction of that share (VoCo)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from meristem.platform.objectives import Loss, Objective, ObjectiveSettings, Units

if TYPE_CHECKING:
    from meristem.platform.assembly import Assembly
    from meristem.platform.step import Step

EPS = 1e-6  # as the authors' code


def overlap(q: Tensor, k: Tensor) -> Tensor:
    """The share of box q's volume that lies in box k, 0 to 1; q, k: `Units.cube` (…, C+1, C+1), of shapes that broadcast.

    Exact where the boxes have common axes, however those lie in the source (flips and quarter turns included); of boxes turned
    against each other it is that of q's bounding box along the axes of k.
    """
    move = torch.linalg.solve(k.double(), q.double())  # from q's unit cube to k's
    edges, low = move[..., :-1, :-1], move[..., :-1, -1]
    high = low + edges.clamp_min(0).sum(-1)
    low = low + edges.clamp_max(0).sum(-1)
    common = (high.clamp_max(1) - low.clamp_min(0)).clamp_min(0)
    return (common / (high - low)).prod(-1).to(q)


def turned(view: Any) -> bool:
    """Whether a view's looks may be boxes along other axes than their sample's, or no boxes at all."""
    affine, elastic = getattr(view, "affine", None), getattr(view, "elastic", None)
    angles = () if affine is None else affine.rotate if isinstance(affine.rotate, tuple) else (affine.rotate,)
    return elastic is not None or any(angles) or (affine is not None and affine.shear > 0)


def boxes(recipe: Any, view: str) -> list[str]:
    """A problem where the looks of a view are no boxes of their samples."""
    if len(recipe.looks[view].size) != len(recipe.modality.axes):
        return [f"it compares boxes, and {recipe.modality.name} data are sets, which fill none"]
    if turned(recipe.looks[view]):
        return [f"it compares boxes, and view '{view}' is turned or deformed; leave rotation, shear and elastic out of it"]
    return []


def voco(predicted: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """The losses of one item's predicted shares (Wu et al. 2024, section 3, as their code has them): near and far, each (B,).

    near = Σ −y log(1 − |y − p|) / Σ y over all pairs; far = Σ p² / n over the n pairs with y = 0.

    predicted p, share y: (B, r, K) of r random crops and K base crops of an item, 0 to 1.
    """
    apart = (share == 0).to(predicted)
    near = -(share * (1 - (share - predicted).abs() + EPS).log()).sum((1, 2)) / (share.sum((1, 2)) + EPS)
    return near, (apart * predicted.square()).sum((1, 2)) / (apart.sum((1, 2)) + EPS)


def alike(bases: Tensor) -> Tensor:
    """(B,) mean of relu(cos(b_i, b_j))² over the pairs i < j of an item's base crops (B, K, D); b_j as if constant."""
    z = F.normalize(bases, dim=-1)
    i, j = torch.triu_indices(z.shape[1], z.shape[1], 1)
    return (z[:, i] * z[:, j].detach()).sum(-1).relu().square().mean(1)


class Overlap(ObjectiveSettings):
    """Regress which share of a random crop lies in each of some base crops, by the cosines of their vectors (VoCo).

    queries: the view of random crops; keys: that of base crops, of the same items. The prediction is the mean of student's
    queries with teacher's keys and teacher's queries with student's keys. level, head: of both; batch norm of the head has the
    statistics of both views together.
    """

    queries: str
    keys: str
    level: Literal["global", "cls", "mean"] = "global"
    head: str | None = None

    def check(self, recipe: Any) -> list[str]:
        problems = [f"there is no view '{view}' (views: {', '.join(recipe.looks)})"
                    for view in (self.queries, self.keys) if view not in recipe.looks]
        if self.head is not None and self.head not in recipe.heads:
            problems.append(f"there is no head '{self.head}' (heads: {', '.join(recipe.heads) or 'none'})")
        if problems:
            return problems
        if self.level == "cls" and "cls" not in recipe.encoder.provides:
            problems.append("level cls needs an encoder with a class token; use level: global or mean")
        if recipe.looks[self.keys].count < 2:
            problems.append(f"one base crop tells no place from another; set views.{self.keys}.count to 2 or more")
        copied = recipe.teacher.of if recipe.teacher is not None else ()
        problems += [f"half of the prediction is the teacher's: add '{name}' to teacher.of"
                     for name in ("encoder", *chain(recipe, self.head)) if name not in copied]
        return [*problems, *dict.fromkeys(boxes(recipe, self.queries) + boxes(recipe, self.keys))]

    def build(self, assembly: Assembly) -> OverlapObjective:
        return OverlapObjective(self, chain(assembly.recipe, self.head))


def chain(recipe: Any, head: str | None) -> list[str]:
    """A head's name behind those that it stands on, the lowest first."""
    names: list[str] = []
    while head is not None and head in recipe.heads and head not in names:  # the recipe checks input
        names.insert(0, head)
        head = recipe.heads[head].input
    return names


class OverlapObjective(Objective):
    """`near`: shares of crops that overlap; `far`: no likeness of those that do not; `bases`: base crops differ."""

    def __init__(self, settings: Overlap, heads: list[str]) -> None:
        super().__init__()
        self.settings, self.heads = settings, heads

    def forward(self, step: Step) -> dict[str, Loss]:
        s = self.settings
        q, k = self._units(step, "encoder")
        with torch.no_grad():
            tq, tk = self._units(step, "teacher")
        assert q.cube is not None and k.cube is not None
        share = overlap(self._of_items(step, s.queries, q.cube)[:, :, None], self._of_items(step, s.keys, k.cube)[:, None])
        with torch.autocast(q.z.device.type, enabled=False):
            zq, ztq = (F.normalize(self._of_items(step, s.queries, x.z.float()), dim=-1) for x in (q, tq))
            zk, ztk = (F.normalize(self._of_items(step, s.keys, x.z.float()), dim=-1) for x in (k, tk))
            predicted = ((zq @ ztk.mT).relu() + (ztq @ zk.mT).relu()) / 2
            near, far = voco(predicted, share)
            lines = {"near": near, "far": far, "bases": alike(zk)}
        return {name: Loss(x.sum(), float(len(x)), s.weight) for name, x in lines.items()}

    def _units(self, step: Step, by: str) -> tuple[Units, Units]:
        q, k = (step.units(view, by, self.settings.level) for view in (self.settings.queries, self.settings.keys))
        both = Units.cat([q, k])
        for head in self.heads:
            both = both.with_z(step.assembly.module(by, head)(both.z, both.key["view"], both.key["item"]))
        rows = torch.arange(len(both), device=both.z.device)
        return both.select(rows[:len(q)]), both.select(rows[len(q):])

    def _of_items(self, step: Step, view: str, x: Tensor) -> Tensor:
        """Rows of a view, item by item, to (B, looks, …)."""
        return x.unflatten(0, (-1, step.assembly.recipe.looks[view].count))
