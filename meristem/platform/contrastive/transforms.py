"""Changes of units in feature space, after the heads and before the loss."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from meristem.modalities.base import Settings
from meristem.modalities.rng import Rng
from meristem.platform.contrastive.losses import cosines
from meristem.platform.contrastive.relations import ONLY, Relation
from meristem.platform.objectives import Units
from meristem.platform.step import Step


class Transform(nn.Module):
    """Queries and keys as the loss shall see them.

    It may move units, weigh them anew, and add keys. Added ones are units like any other, and attract and repel by their keys:
    whoever makes them copies the keys of the unit they stand for, and says with `added` which query alone meets them.
    The keys given are those of all ranks and of the queue, where empty places weigh nothing; the queue itself takes the batch's
    own as they were. What a transform makes is constant for the gradient, unless it says that gradient passes.
    """

    def forward(self, q: Units, k: Units, relation: Relation, step: Step) -> tuple[Units, Units]:
        raise NotImplementedError

    def after(self) -> None:
        """Once per optimiser step."""


class TransformSettings(Settings):
    """The typed entry of a transform in a recipe."""

    def check(self, line: Any) -> list[str]:
        """What is impossible about it in this contrastive objective."""
        return []

    def build(self, width: int) -> Transform:
        """width: of the units."""
        raise NotImplementedError


def added(k: Units, own: Units, query: Tensor) -> Units:
    """Keys k, whom every query meets, and `own`, each of which the query number query[n] alone meets."""
    everyone = torch.full_like(query[:1], -1).expand(len(k))
    return Units.cat([replace(k, key={**k.key, ONLY: k.key.get(ONLY, everyone)}), replace(own, key={**own.key, ONLY: query})])


@torch.no_grad()
def mixtures(q: Tensor, k: Tensor, repels: Tensor, hardest: int, pairs: int, with_query: int,
             rng: Rng) -> tuple[Tensor, Tensor, Tensor]:
    """Harder negatives than there are: on the sphere between two of a query's hardest ones, and between it and one of them.

    n: the `hardest` keys that repel the query most alike to it. h = α n_i + (1 − α) n_j with α ~ U(0, 1) and i ≠ j, `pairs` of
    them; h' = β q + (1 − β) n_i with β ~ U(0, 0.5), `with_query` of them; all of unit length (Kalantidis et al. 2020, equations
    4 and 5).

    q: (Mq, D), k: (Mk, D), repels: (Mq, Mk) weights. rng: a stream for each query.
    Returns (Mq, S, D) mixtures, (Mq, S) the number of the key n_i in each, and (Mq, S) weights: the product of its parents'.
    """
    q, k = F.normalize(q.float(), dim=-1), F.normalize(k.float(), dim=-1)
    near = cosines(q, k).masked_fill(repels == 0, -torch.inf).topk(min(hardest, len(k)), dim=1).indices
    n = near.shape[1]
    first = rng.integers("first", n, pairs + with_query)
    second = (first[:, :pairs] + 1 + rng.integers("second", max(n - 1, 1), pairs)) % n
    share = torch.cat([rng.uniform("alpha", pairs), 1 - rng.uniform("beta", with_query, high=0.5)], 1)[..., None]
    first, second = near.gather(1, first), near.gather(1, second)
    other = torch.cat([k[second], q[:, None].expand(-1, with_query, -1)], 1)
    weight = repels.gather(1, first)
    weight = torch.cat([weight[:, :pairs] * repels.gather(1, second), weight[:, pairs:]], 1)
    return F.normalize(share * k[first] + (1 - share) * other, dim=-1), first, weight


class Mixing(Transform):
    def __init__(self, settings: Mix) -> None:
        super().__init__()
        self.settings = settings

    def forward(self, q: Units, k: Units, relation: Relation, step: Step) -> tuple[Units, Units]:
        s = self.settings
        z, parent, weight = mixtures(q.z, k.z, relation.pairs(q, k).neg, s.hardest, s.pairs, s.with_query, step.rng("mix", q))
        own = replace(k.select(parent.flatten()), z=z.flatten(0, 1), weight=weight.flatten())
        return q, added(k, own, torch.arange(len(q), device=z.device).repeat_interleave(parent.shape[1]))


class Mix(TransformSettings):
    """MoCHi: negatives made for each query of its `hardest` ones, `pairs` of two of them, `with_query` of the query and one.

    No gradient passes. The table of cosines has queries² × (pairs + with_query) entries more.
    """

    hardest: Annotated[int, Field(ge=2)] = 64
    pairs: Annotated[int, Field(ge=0)] = 64
    with_query: Annotated[int, Field(ge=0)] = 8

    def check(self, line: Any) -> list[str]:
        return [] if line.loss.repels else ["transform: mix makes negatives, and this loss does not repel; leave it out"]

    def build(self, width: int) -> Transform:
        return Mixing(self)
