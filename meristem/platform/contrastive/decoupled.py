"""InfoNCE without the positive in its denominator."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field

from meristem.platform.contrastive.losses import ContrastiveLoss, LossSettings, cosines
from meristem.platform.contrastive.relations import Relation
from meristem.platform.objectives import Loss, Pairs, Units
from meristem.platform.schedules import Scalar
from meristem.platform.step import Step, all_ranks


def decoupled(q: Units, k: Units, pairs: Pairs, temperature: float, sigma: float | None = None) -> Loss:
    """Decoupled contrastive loss (Yeh et al. 2022, equation 6), with any number of positives.

    s_ij = cos(q_i, k_j)
    L_i = − Σ_j pos_ij w_ij s_ij / τ / Σ_j pos_ij + log Σ_m neg_im exp(s_im / τ)
    w_ij = 1, or with `sigma` 2 − exp(s_ij / σ) / E exp(s / σ), the mean over the attracted pairs of all ranks; constant for the
    gradient, and 1 on average (DCLW): pairs that agree already weigh less.
    total = Σ_i w_i L_i and count = Σ_i w_i over the queries that have a positive and a negative, w the query's weight.

    q: (Mq, D), k: (Mk, D).
    """
    with torch.autocast(q.z.device.type, enabled=False):
        s = cosines(q.z, k.z)
        attraction, repelled = pairs.pos.sum(1), (pairs.neg > 0).any(1)
        drawn = pairs.pos if sigma is None else pairs.pos * _weights(s.detach(), pairs.pos, sigma)
        has = (attraction > 0) & repelled
        mass = torch.where(has[:, None], pairs.neg, 1.0)  # a row of nothing would have a NaN for a gradient
        pull = (drawn * s).sum(1) / torch.where(has, attraction, 1.0) / temperature
        each = (s / temperature + mass.log()).logsumexp(1) - pull
        weight = q.weight * has
        return Loss((weight * each).sum(), weight.sum())


@torch.no_grad()
def _weights(s: torch.Tensor, pos: torch.Tensor, sigma: float) -> torch.Tensor:
    """(Mq, Mk) of each pair: 2 − its share of the mean of exp(s / σ) over attracted pairs."""
    e = ((s - 1) / sigma).exp()
    total, count = all_ranks(torch.stack([(pos * e).sum(), pos.sum()])[None]).sum(0)
    return 2 - e * count / total.clamp_min(1e-12)


class DecoupledLoss(ContrastiveLoss):
    def __init__(self, settings: Decoupled) -> None:
        super().__init__()
        self.settings = settings

    def forward(self, q: Units, k: Units, relation: Relation, step: Step) -> Loss:
        return decoupled(q, k, relation.pairs(q, k), step.value(self.settings.temperature), self.settings.sigma)


class Decoupled(LossSettings):
    """DCL. temperature: τ. sigma: of the weights of DCLW (theirs 0.5); null: all weigh 1."""

    repels: ClassVar[bool] = True
    temperature: Scalar = 0.1
    sigma: Annotated[float, Field(gt=0)] | None = None

    def build(self, width: int) -> ContrastiveLoss:
        return DecoupledLoss(self)
