"""Positives that no view showed: keys moved towards prototypes of past ones, as far as they stay what they are."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from meristem.modalities.rng import Rng
from meristem.platform.contrastive.relations import ONLY, Relation
from meristem.platform.contrastive.transforms import Transform, TransformSettings
from meristem.platform.objectives import Units
from meristem.platform.step import Step

Count = Annotated[int, Field(ge=1)]
NEVER = 1 - 1e-6  # cosine beyond which two vectors are one, and there is no way between them


@torch.no_grad()
def clusters(z: Tensor, count: int, iterations: int, rng: Rng) -> Tensor:
    """(count, D) centres of the rows z (M, D), all of unit length: k-means on the sphere (Dhillon and Modha 2001), started as
    k-means++ (Arthur and Vassilvitskii 2007). rng: of one stream. A centre that nothing is near stays where it was."""
    u = rng.uniform("centres", count)[0].double()
    far = torch.ones(len(z), dtype=torch.float64, device=z.device)  # a zero of `far` is never drawn again
    chosen = []
    for i in range(count):
        far = far.clamp_min(1e-12)
        at = torch.searchsorted(far.cumsum(0), (u[i] * far.sum())[None]).clamp_max(len(z) - 1)
        chosen.append(z[at[0]])
        distance = (1 - z @ chosen[-1]).clamp_min(0).double()
        far = torch.minimum(far, distance) if i else distance
    centre = torch.stack(chosen)
    for _ in range(iterations):
        nearest = F.one_hot((z @ centre.T).argmax(1), count).to(z)
        total = nearest.T @ z
        centre = torch.where(nearest.sum(0)[:, None] > 0, F.normalize(total, dim=1), centre)
    return centre


def boundary(k: Tensor, near: Tensor, far: Tensor) -> Tensor:
    """(…) the share t of the arc from k to `far` at which it is as near to `near`, the prototype that k is nearest to, as to
    `far` (Shah et al. 2023, HaLP, section 3.3).

    With ω the angle between k and far and K = (1 − far·near) / k·(near − far), tan(t ω) = sin ω / (K + cos ω). All (…, D), of
    unit length.
    """
    cosine = (k * far).sum(-1).clamp(-NEVER, NEVER)
    omega = cosine.acos()
    ratio = (1 - (far * near).sum(-1)) / (k * (near - far)).sum(-1).clamp_min(1e-8)
    return torch.atan2(omega.sin(), ratio + cosine) / omega


def along(k: Tensor, far: Tensor, t: Tensor) -> Tensor:
    """(…, D) the point at the share t (…) of the arc from k to far (Shoemake 1985, slerp)."""
    omega = (k * far).sum(-1, keepdim=True).clamp(-NEVER, NEVER).acos()
    t = t[..., None]
    return F.normalize(((1 - t) * omega).sin() * k + (t * omega).sin() * far, dim=-1)


class Hallucination(Transform):
    def __init__(self, settings: Hallucinate) -> None:
        super().__init__()
        self.settings = settings

    @torch.no_grad()
    def forward(self, q: Units, k: Units, relation: Relation, step: Step) -> tuple[Units, Units]:
        s, match = self.settings, relation.matches(q, k)
        everyone = step.gather(Units(q.weight, {name: q.key[name] for name in ("item", "view")}, q.weight))
        past = ~torch.isin(k.key["item"], everyone.key["item"])
        z = F.normalize(k.z.float(), dim=1)
        rng = step.rng("hallucinate", q)
        others = z[past]  # none where the queue holds nothing but this step's samples, as of very few
        prototype = clusters(others if len(others) else z, s.prototypes, s.iterations,
                             Rng(step.rng("hallucinate", everyone).key[:1]))
        own, full = z[match.k], len(others) > 0 and (k.weight[past] > 0).all()
        order = (own @ prototype.T).argsort(1, descending=True)
        draw = rng.uniform("towards", s.count)[match.q]
        towards = order.gather(1, 1 + (draw * (s.prototypes - 1)).long().clamp_max(s.prototypes - 2))
        own, near, far = own[:, None], prototype[order[:, :1]], prototype[towards]
        t = rng.uniform("t", s.count, low=s.least)[match.q] * boundary(own, near, far)
        made = along(own, far, t)
        same = (made @ prototype.T).argmax(-1) == order[:, :1]
        parent, query = (x.repeat_interleave(s.count) for x in (match.k, match.q))
        units = k.select(parent)
        weight = units.weight * (same.flatten() & full)
        return q, replace(units, z=made.flatten(0, 1), weight=weight, key={**units.key, ONLY: query})


class Hallucinate(TransformSettings):
    """HaLP: in the place of the keys that a query is drawn to, `count` of each that lie between it and another prototype than
    its nearest, drawn at random; those whose nearest prototype is still the key's weigh, the others do not.

    prototypes: so many centres of the queue's keys, found anew in each step by `iterations` of k-means; there are none before
    the queue is full. least: share of the way to where the nearest prototype changes, from which on positives are made.
    No gradient passes.
    """

    prototypes: Annotated[int, Field(ge=2)] = 20
    count: Count = 100
    iterations: Count = 5
    least: Annotated[float, Field(ge=0, lt=1)] = 0.2

    def check(self, line: Any) -> list[str]:
        if line.queue is None or line.queue < self.prototypes:
            return [f"transform: hallucinate clusters the keys of a queue to {self.prototypes} prototypes; set queue to that "
                    "or more"]
        return [] if "item" in Relation(line.relation).reads else ["transform: hallucinate tells the queue's keys from the "
                                                                  "batch's by item; use a relation like same(item)"]

    def build(self, width: int) -> Transform:
        return Hallucination(self)
