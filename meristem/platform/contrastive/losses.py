"""Losses over related units: pure functions, then the parts that a recipe names.

All are computed in fp32, whatever precision the encoder runs in.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from meristem.modalities.base import Settings
from meristem.platform.contrastive.relations import Matches, Relation
from meristem.platform.objectives import Loss, Pairs, Units
from meristem.platform.schedules import Scalar
from meristem.platform.step import Step, all_ranks


def cosines(q: Tensor, k: Tensor) -> Tensor:
    """(Mq, Mk) cosines of rows q (Mq, D) and k (Mk, D)."""
    return F.normalize(q.float(), dim=-1) @ F.normalize(k.float(), dim=-1).T


def infonce(q: Units, k: Units, pairs: Pairs, temperature: float, own: bool = False, together: bool = False) -> Loss:
    """InfoNCE with any number of positives, averaged outside the logarithm, or `together`, summed inside it.

    s_ij = cos(q_i, k_j) / τ
    L_i = − Σ_j pos_ij (s_ij − log Z_ij) / Σ_j pos_ij
    Z_ij = Σ_m (pos_im + neg_im) exp s_im; own: pos_ij exp s_ij + Σ_m neg_im exp s_im, each positive against the negatives alone
    together: L_i = − log (Σ_j pos_ij exp s_ij / Z_i)
    total = Σ_i w_i L_i and count = Σ_i w_i over the queries that have a positive, w the query's weight.

    q: (Mq, D), k: (Mk, D). One positive per query and keys = queries: NT-Xent (Chen et al. 2020, eq. 1). Several: L_out of
    SupCon (Khosla et al. 2020, eq. 2); own: the positives in turn, as the A-VID of RSPNet (Chen et al. 2021);
    together: PixContrast (Xie et al. 2021, equation 2).
    """
    with torch.autocast(q.z.device.type, enabled=False):
        s = cosines(q.z, k.z) / temperature
        attraction = pairs.pos.sum(1, keepdim=True)
        has = attraction > 0
        share = pairs.pos / torch.where(has, attraction, 1.0)
        if own:
            repelled = (pairs.neg > 0).any(1, keepdim=True)
            against = (s + torch.where(repelled, pairs.neg, 1.0).log()).logsumexp(1, keepdim=True)
            mine = s + torch.where(pairs.pos > 0, pairs.pos, 1.0).log()
            each = (share * (torch.logaddexp(mine, against.masked_fill(~repelled, -torch.inf)) - s)).sum(1)
        else:
            mass = torch.where(has, pairs.pos + pairs.neg, 1.0)  # a row of nothing would have a NaN for a gradient
            mine = (s + torch.where(has, pairs.pos, 1.0).log()).logsumexp(1) if together else (share * s).sum(1)
            each = (s + mass.log()).logsumexp(1) - mine
        weight = q.weight * has[:, 0]
        return Loss((weight * each).sum(), weight.sum())


def ranking(q: Units, k: Units, pairs: Pairs, margin: float) -> Loss:
    """A positive must be nearer than a negative by a margin: the triplet loss on cosines, over all pairs of both.

    L_i = Σ_jm pos_ij neg_im max(0, margin − (cos(q_i, k_j) − cos(q_i, k_m))) / Σ_jm pos_ij neg_im
    total = Σ_i w_i L_i and count = Σ_i w_i over the queries that have a positive and a negative, w the query's weight.

    q: (Mq, D), k: (Mk, D). Source: the relative speed perception of RSPNet (Chen et al. 2021).
    """
    with torch.autocast(q.z.device.type, enabled=False):
        s = cosines(q.z, k.z)
        i, j = pairs.pos.nonzero(as_tuple=True)  # a table of all triplets would be (Mq, Mk, Mk)
        weight = pairs.pos[i, j, None] * pairs.neg[i]
        hinge = (margin - s[i, j, None] + s[i]).relu()
        over = torch.zeros(2, len(q), device=s.device).index_add(1, i, torch.stack([(weight * hinge).sum(1), weight.sum(1)]))
        has = over[1] > 0
        each = q.weight * has
        return Loss((each * over[0] / torch.where(has, over[1], 1.0)).sum(), each.sum())


def attraction(q: Units, k: Units, matches: Matches) -> Loss:
    """L = Σ_n weight_n (2 − 2 cos(q_n, k_n)) ; count = Σ_n weight_n.

    q: (Mq, D), k: (Mk, D). BYOL (Grill et al. 2020, eq. 2); twice SimSiam's −cos (Chen and He 2021, eq. 1) but for a constant.
    """
    with torch.autocast(q.z.device.type, enabled=False):
        each = 2 - 2 * F.cosine_similarity(q.z.float()[matches.q], k.z.float()[matches.k], dim=-1)
        return Loss((matches.weight * each).sum(), matches.weight.sum().clamp_min(1e-12))  # where nothing attracts: 0


def evened(q: Units, matches: Matches) -> Matches:
    """The same matches, weighted so that those of each map, a look at a sample, count 1 together."""
    maps = torch.unique(torch.stack([q.key["item"], q.key["view"]])[:, matches.q], dim=1, return_inverse=True)[1]
    sums = matches.weight.new_zeros(len(matches.q)).index_add(0, maps, matches.weight)
    return Matches(matches.q, matches.k, matches.weight / sums[maps])


def cross_entropy(q: Units, target: Tensor, matches: Matches, temperature: float) -> Loss:
    """Predict the assignment of a matched key from the query.

    L = − Σ_n weight_n Σ_c target[k_n, c] · log softmax(q[q_n] / τ)_c ; count = Σ_n weight_n.

    q: logits (Mq, K). target: (Mk, K), rows sum to one, without gradient. The loss of DINO (Caron et al. 2021, eq. 1–3), of
    iBOT's class and patch lines (Zhou et al. 2022, eq. 2, 3) and of SwAV (Caron et al. 2020, eq. 2).
    """
    with torch.autocast(q.z.device.type, enabled=False):
        log_p = F.log_softmax(q.z.float() / temperature, dim=-1)
        each = -(target[matches.k] * log_p[matches.q]).sum(-1)
        return Loss((matches.weight * each).sum(), matches.weight.sum())


def decorrelation(q: Units, k: Units, matches: Matches, weight: float) -> Loss:
    """Matched units agree, and the dimensions of either side tell different things.

    Zq, Zk: (n, D) matched units, every dimension with mean 0 and a sum of squares of 1 over the matches.
    L = |Zq − Zk|² + λ (|ZqᵀZq − I|² + |ZkᵀZk − I|²) (Zhang et al. 2021, CCA-SSG, equations 5 and 6), λ = `weight`; count = Σ_n
    weight_n, total = L · count, over the matches of all ranks: each has its own part of the first term, and an equal one of the
    second.
    """
    with torch.autocast(q.z.device.type, enabled=False):
        own = matches.weight.sum()
        counts = all_ranks(own[None])
        count = counts.sum()
        share = (matches.weight / count.clamp_min(1e-12))[:, None]

        def over(x: Tensor) -> Tensor:
            return all_ranks(x[None]).sum(0)

        def whitened(z: Tensor) -> Tensor:
            z = z - over((share * z).sum(0))
            return share.sqrt() * z * (over((share * z.square()).sum(0)) + 1e-12).rsqrt()

        a, b = whitened(q.z.float()[matches.q]), whitened(k.z.float()[matches.k])
        unit = torch.eye(a.shape[1], device=a.device)
        apart = sum((over(z.T @ z) - unit).square().sum() for z in (a, b)) / len(counts)
        return Loss(count * ((a - b).square().sum() + weight * apart), own)


@torch.no_grad()
def centred(z: Tensor, centre: Tensor, temperature: float) -> Tensor:
    """softmax((z − c) / τ): DINO's teacher. z: logits (M, K), centre: (K,). Returns (M, K) without gradient."""
    return F.softmax((z.float() - centre) / temperature, dim=-1)


@torch.no_grad()
def sinkhorn(z: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Soft codes that use all prototypes equally over the samples of all ranks: Sinkhorn and Knopp's algorithm.

    Source: Caron et al. 2020, eq. 3–5. Q ∝ exp(z / ε), alternately scaled so that each prototype gets 1/K of the mass, then
    each sample 1/M; M·Q is returned. z: scores (M, K), M on each rank. Rows of the result sum to one exactly, columns to M/K
    (over all ranks) as `iterations` grow. In the log domain, so that no ε underflows. No gradient.
    """
    q = z.float() / epsilon
    for _ in range(iterations):
        q = q - all_ranks(q.logsumexp(0, keepdim=True)).logsumexp(0)
        q = q - q.logsumexp(1, keepdim=True)
    return q.exp()


class ContrastiveLoss(nn.Module):
    """A loss with its numbers and, where it has any, its buffers."""

    def forward(self, q: Units, k: Units, relation: Relation, step: Step) -> Loss:
        raise NotImplementedError

    def after(self) -> None:
        """Once per optimiser step."""


class LossSettings(Settings):
    """The typed entry of a contrastive loss in a recipe.

    needs_prototypes: its units must be scores of prototypes. repels: reads negatives, so that keys of all ranks, and of a
    queue, matter to it. collapses: at its best when all units are alike, unless keys come without gradient.
    """

    needs_prototypes: ClassVar[bool] = False
    repels: ClassVar[bool] = False
    collapses: ClassVar[bool] = False

    def build(self, width: int) -> ContrastiveLoss:
        """width: of the units."""
        raise NotImplementedError


class InfoNCELoss(ContrastiveLoss):
    def __init__(self, settings: InfoNCE) -> None:
        super().__init__()
        self.settings = settings

    def forward(self, q: Units, k: Units, relation: Relation, step: Step) -> Loss:
        own, together = self.settings.denominator == "own", self.settings.positives == "together"
        return infonce(q, k, relation.pairs(q, k), step.value(self.settings.temperature), own, together)


class MarginLoss(ContrastiveLoss):
    def __init__(self, settings: Margin) -> None:
        super().__init__()
        self.settings = settings

    def forward(self, q: Units, k: Units, relation: Relation, step: Step) -> Loss:
        return ranking(q, k, relation.pairs(q, k), step.value(self.settings.margin))


class CosineLoss(ContrastiveLoss):
    def __init__(self, settings: Cosine) -> None:
        super().__init__()
        self.settings = settings

    def forward(self, q: Units, k: Units, relation: Relation, step: Step) -> Loss:
        matches = relation.matches(q, k)
        return attraction(q, k, evened(q, matches) if self.settings.mean == "maps" else matches)


class DecorrelationLoss(ContrastiveLoss):
    def __init__(self, settings: Decorrelation) -> None:
        super().__init__()
        self.settings = settings

    def forward(self, q: Units, k: Units, relation: Relation, step: Step) -> Loss:
        return decorrelation(q, k, relation.matches(q, k), step.value(self.settings.weight))


class DINOLoss(ContrastiveLoss):
    """centre: (K,) moving average of the keys' mean logits over all ranks and micro-batches."""

    centre: Tensor

    def __init__(self, settings: DINO, width: int) -> None:
        super().__init__()
        self.settings = settings
        self.register_buffer("centre", torch.zeros(width))
        self._seen: Tensor | None = None  # (K + 1,): sum and count of this optimiser step; as a buffer DDP would broadcast it
        self._progress = -1.0

    def forward(self, q: Units, k: Units, relation: Relation, step: Step) -> Loss:
        if self.training:
            logits = k.z.detach().float()
            seen = torch.cat([logits.sum(0), logits.new_tensor([len(k)])])
            self._seen = self._seen + seen if self._seen is not None and self._progress == step.progress else seen
            self._progress = step.progress
        target = centred(k.z, self.centre, step.value(self.settings.teacher_temperature))
        return cross_entropy(q, target, relation.matches(q, k), step.value(self.settings.temperature))

    @torch.no_grad()
    def after(self) -> None:
        if self._seen is not None:
            seen = all_ranks(self._seen[None]).sum(0)
            share = (seen[-1] > 0) * (1 - self.settings.centre_momentum)  # asking here would wait for the device
            self.centre.lerp_(seen[:-1] / seen[-1].clamp_min(1), share.to(self.centre))
            self._seen = None


class SwAVLoss(ContrastiveLoss):
    def __init__(self, settings: SwAV) -> None:
        super().__init__()
        self.settings = settings

    def forward(self, q: Units, k: Units, relation: Relation, step: Step) -> Loss:
        codes = torch.empty_like(k.z, dtype=torch.float32)
        for view in k.key["view"].unique():  # as the authors do: the looks of one view are spread over the prototypes
            rows = torch.nonzero(k.key["view"] == view).squeeze(1)
            codes[rows] = sinkhorn(k.z[rows], self.settings.epsilon, self.settings.iterations)
        return cross_entropy(q, codes, relation.matches(q, k), step.value(self.settings.temperature))


class InfoNCE(LossSettings):
    """SimCLR, MoCo, SupCon. temperature: τ. denominator: shared by a query's positives, or each positive has its own.

    positives: `each` has a logarithm of its own, and these are averaged, or one is taken of all `together` (PixContrast).
    """

    repels: ClassVar[bool] = True
    temperature: Scalar = 0.1
    denominator: Literal["shared", "own"] = "shared"
    positives: Literal["each", "together"] = "each"

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.denominator == "own" and self.positives == "together":
            raise ValueError("positives together have one denominator; set denominator: shared")
        return self

    def build(self, width: int) -> ContrastiveLoss:
        return InfoNCELoss(self)


class Margin(LossSettings):
    """Ranking of positives over negatives. margin: between their cosines."""

    repels: ClassVar[bool] = True
    margin: Scalar

    def build(self, width: int) -> ContrastiveLoss:
        return MarginLoss(self)


class Cosine(LossSettings):
    """BYOL, SimSiam: attraction alone. mean: over all pairs, or over the mean pairs of each look's map (PixPro)."""

    collapses: ClassVar[bool] = True
    mean: Literal["pairs", "maps"] = "pairs"

    def build(self, width: int) -> ContrastiveLoss:
        return CosineLoss(self)


class Decorrelation(LossSettings):
    """CCA-SSG. weight: of the decorrelation of dimensions against the agreement of units."""

    weight: Scalar = 1e-3

    def build(self, width: int) -> ContrastiveLoss:
        return DecorrelationLoss(self)


class DINO(LossSettings):
    """DINO, iBOT. temperature: of the queries; teacher_temperature: of the keys; centre_momentum: of the keys' centre."""

    needs_prototypes: ClassVar[bool] = True
    temperature: Scalar = 0.1
    teacher_temperature: Scalar = 0.04
    centre_momentum: float = 0.9

    def build(self, width: int) -> ContrastiveLoss:
        return DINOLoss(self, width)


class SwAV(LossSettings):
    """SwAV. temperature: of the prediction; epsilon, iterations: of Sinkhorn and Knopp's algorithm on the keys' scores."""

    needs_prototypes: ClassVar[bool] = True
    temperature: Scalar = 0.1
    epsilon: float = 0.05
    iterations: int = 3

    def build(self, width: int) -> ContrastiveLoss:
        return SwAVLoss(self)
