"""Contrast by sorting: all positives before all negatives."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from meristem.platform.contrastive.losses import ContrastiveLoss, LossSettings, cosines
from meristem.platform.contrastive.relations import Relation
from meristem.platform.objectives import Loss, Pairs, Units
from meristem.platform.schedules import Scalar
from meristem.platform.step import Step


def odd_even_sort(x: Tensor, steepness: float) -> tuple[Tensor, Tensor]:
    """Rows of x (B, n) in ascending order, softly: an odd-even sorting network of n layers (Petersen et al. 2021 and 2022).

    Each layer compares neighbours a, b, in turn from the first and from the second on: they are in order with α = ½ +
    arctan(β (b − a)) / π, and are replaced by α a + (1 − α) b and (1 − α) a + α b. β: steepness; as it grows, x is sorted.
    Returns the soft order (B, n) and the doubly stochastic P (B, n, n): how much of x_i lies at place j.
    """
    n = x.shape[1]
    p = torch.eye(n, dtype=x.dtype, device=x.device).expand(len(x), -1, -1)
    for layer in range(n):
        start = layer % 2
        end = start + (n - start) // 2 * 2

        def exchanged(table: Tensor, order: Tensor, start: int = start, end: int = end) -> Tensor:
            a, b = table[..., start:end:2], table[..., start + 1:end:2]
            low = order * a + (1 - order) * b
            between = torch.stack([low, a + b - low], -1).flatten(-2)
            return torch.cat([table[..., :start], between, table[..., end:]], -1)

        alpha = torch.atan(steepness * (x[:, start + 1:end:2] - x[:, start:end:2])) / math.pi + 0.5
        x, p = exchanged(x, alpha), exchanged(p, alpha[:, None])
    return x, p


def ordering(q: Units, k: Units, pairs: Pairs, steepness: float, hardest: int) -> Loss:
    """Group ordering constraints (Shvetsova et al. 2023): a query's positives belong behind its negatives in ascending order.

    x: cosines of the query with the `hardest` keys that repel it most alike to it, ascending, and with those that attract it,
    ascending. P: how they are sorted, `odd_even_sort`. y_i: 1 for positives, p_i = Σ_j P_ij over as many last places as there
    are positives. L = mean_i − y_i log p_i − (1 − y_i) log(1 − p_i).
    total = Σ w L and count = Σ w over the queries that have a positive and a negative, w the query's weight. Weights of pairs
    only tell whether they count.

    q: (Mq, D), k: (Mk, D).
    """
    with torch.autocast(q.z.device.type, enabled=False):
        s = cosines(q.z, k.z)
        counts = torch.stack([(pairs.pos > 0).sum(1), (pairs.neg > 0).sum(1).clamp(max=hardest)], 1)
        rows = torch.nonzero((counts > 0).all(1)).squeeze(1)
        total, count = s.sum() * 0, q.weight[rows].sum()
        for positives, negatives in counts[rows].unique(dim=0).tolist():  # one network for all that sort as many
            mine = rows[(counts[rows] == counts.new_tensor([positives, negatives])).all(1)]
            near = s[mine].masked_fill(pairs.pos[mine] == 0, torch.inf).sort(1).values[:, :positives]
            hard = s[mine].masked_fill(pairs.neg[mine] == 0, -torch.inf).topk(negatives, 1).values.flip(1)
            p = odd_even_sort(torch.cat([hard, near], 1), steepness)[1][..., negatives:].sum(2).clamp(0, 1)
            y = torch.arange(negatives + positives, device=s.device).ge(negatives).to(p).expand_as(p)
            total = total + (q.weight[mine] * F.binary_cross_entropy(p, y, reduction="none").mean(1)).sum()
        return Loss(total, count)


class OrderingLoss(ContrastiveLoss):
    def __init__(self, settings: Ordering) -> None:
        super().__init__()
        self.settings = settings

    def forward(self, q: Units, k: Units, relation: Relation, step: Step) -> Loss:
        return ordering(q, k, relation.pairs(q, k), step.value(self.settings.steepness), self.settings.hardest)


class Ordering(LossSettings):
    """GroCo. steepness: β of the sorting network. hardest: how many of the negatives are sorted."""

    repels: ClassVar[bool] = True
    steepness: Scalar = 1.0
    hardest: Annotated[int, Field(ge=1)] = 10

    def build(self, width: int) -> ContrastiveLoss:
        return OrderingLoss(self)
