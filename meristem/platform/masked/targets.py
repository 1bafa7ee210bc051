"""Targets of masked prediction: what should have been predicted, and the loss against it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from meristem import pointops
from meristem.errors import RecipeError
from meristem.modalities.base import Settings, Tokenizer, View
from meristem.modalities.stream import TokenStream, gather
from meristem.platform.encoders.base import Encoder

if TYPE_CHECKING:
    from meristem.platform.assembly import Assembly
    from meristem.platform.step import Step

ElementLoss = Literal["mse", "l1", "smooth_l1"]


class TargetSettings(Settings):
    """The typed entry of a target: it makes the target, which has no gradient, and owns the loss.

    whole: whether it compares views as wholes, and so asks for a prediction of every token.
    placeless: whether it would be answered by the places of tokens, so that no predictor may be told them.
    """

    whole: ClassVar[bool] = False
    placeless: ClassVar[bool] = False

    def check(self, recipe: Any) -> list[str]:
        """What is impossible about this target in this recipe; empty when all is well."""
        return []

    def fits(self, recipe: Any, view: str) -> list[str]:
        """What is impossible about it for tokens of a view; where that is more than `check` knows."""
        return self.check(recipe)

    def size(self, tokenizer: Tokenizer, encoder: Encoder) -> int:
        """Numbers per token that a predictor must give."""
        raise NotImplementedError

    def size_in(self, assembly: Assembly, view: str) -> int:
        """The same for tokens of a view in an assembly; for targets whose size more than tokenizer and encoder decide."""
        return self.size(assembly.tokenizer, assembly.encoder)

    def prepare(self, step: Step, view: str) -> None:
        """Make the passes that the target needs; called before the student's."""

    def compare(self, step: Step, view: str, index: Tensor | None, prediction: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """index: (B, n) which tokens of the view were predicted, None for all; prediction: (B, n, P); weight: (B, n).

        Returns (sum, count).
        """
        raise NotImplementedError


def _error(loss: ElementLoss, prediction: Tensor, target: Tensor, beta: float) -> Tensor:
    if loss == "mse":
        return F.mse_loss(prediction, target, reduction="none")
    if loss == "l1":
        return F.l1_loss(prediction, target, reduction="none")
    return F.smooth_l1_loss(prediction, target, reduction="none", beta=beta)


def element_weight(stream: TokenStream) -> Tensor:
    """(B, n, P) weight of each element of each token's content; one weight serves all channels of a voxel."""
    if stream.weight is None:
        return torch.ones_like(stream.content)
    return stream.weight.repeat(1, 1, stream.content.shape[-1] // stream.weight.shape[-1])


class Content(TargetSettings):
    """The tokens' own content: voxels of a patch.

    normalise: `token` gives every token mean 0 and variance 1 over its elements (He et al. 2022, section 4.1: (x − mean) /
    sqrt(var + eps), var with n − 1 as the authors' code has it); elements of weight 0 (outside the sample) count in neither.
    `channel` does so for each channel of a token by itself, which takes its colour out of the target (as the authors' code of
    VideoMAE, Tong et al. 2022).
    loss: of each element; beta: where `smooth_l1` turns from square to straight. The sum runs over elements, weighted by token
    and element, and the count is the sum of those weights: with `l1` the loss of SimMIM (Xie et al. 2022, equation 1).
    """

    normalise: Literal["none", "token", "channel"] = "none"
    eps: float = 1e-6
    loss: ElementLoss = "mse"
    beta: Annotated[float, Field(gt=0)] = 1.0

    def size(self, tokenizer: Tokenizer, encoder: Encoder) -> int:
        return tokenizer.token_size

    def statistics(self, stream: TokenStream, channels: int) -> tuple[Tensor, Tensor]:
        """(mean, std) of each token's elements, (B, n, P) or (B, n, 1), that its content (channels first) is normalised by."""
        x = stream.content.float()
        if self.normalise == "none":
            return torch.zeros_like(x[..., :1]), torch.ones_like(x[..., :1])
        groups = channels if self.normalise == "channel" else 1
        x = x.unflatten(-1, (groups, -1))
        if stream.weight is None:
            mean = x.mean(-1, keepdim=True)  # torch.var_mean takes five times as long on a processor
            var = (x - mean).square_().sum(-1, keepdim=True) / max(x.shape[-1] - 1, 1)
        else:
            w = (element_weight(stream) > 0).to(x).unflatten(-1, (groups, -1))
            n = w.sum(-1, keepdim=True)
            mean = (w * x).sum(-1, keepdim=True) / n.clamp_min(1)
            var = (w * (x - mean).square()).sum(-1, keepdim=True) / (n - 1).clamp_min(1)
        return mean.expand_as(x).flatten(2), (var + self.eps).sqrt().expand_as(x).flatten(2)

    def compare(self, step: Step, view: str, index: Tensor | None, prediction: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        stream = step.stream(view) if index is None else step.stream(view).take(index)
        mean, std = self.statistics(stream, step.assembly.recipe.modality.channels)
        error = _error(self.loss, prediction.float(), (stream.content.float() - mean).div_(std), self.beta)
        if stream.weight is None:
            return (weight * error.sum(-1)).sum(), weight.sum() * error.shape[-1]
        w = weight[..., None] * element_weight(stream)
        return (w * error).sum(), w.sum()


class Cosine(TargetSettings):
    """The direction of the tokens' content: scaled cosine error (1 − cos(prediction, content))^exponent (Hou et al. 2022,
    GraphMAE, equation 2). Content that is all 0 has none: cos is 0."""

    exponent: Annotated[float, Field(ge=1)] = 2.0

    def size(self, tokenizer: Tokenizer, encoder: Encoder) -> int:
        return tokenizer.token_size

    def compare(self, step: Step, view: str, index: Tensor | None, prediction: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        stream = step.stream(view).seen(frozenset())
        content = (stream if index is None else stream.take(index)).content.float()
        cosine = (F.normalize(prediction.float(), dim=-1) * F.normalize(content, dim=-1)).sum(-1)
        return (weight * (1 - cosine).clamp_min(0).pow(self.exponent)).sum(), weight.sum()


class Features(TargetSettings):
    """The tokens that the teacher makes of the whole view, nothing hidden (V-JEPA, Bardes et al. 2024, section 3).

    by: the teacher, or the encoder itself, through which no gradient then flows. masked: of the tokens that the view's masking
    shows, alone. norm: `layer` gives every target token mean 0 and variance 1 over its channels, without parameters (appendix
    of the same). loss: of each channel; beta: where `smooth_l1` turns from square to straight. With `l1` the loss is their
    equation 1.
    """

    by: Literal["teacher", "encoder"] = "teacher"
    masked: bool = False
    norm: Literal["none", "layer"] = "layer"
    loss: ElementLoss = "l1"
    beta: Annotated[float, Field(gt=0)] = 1.0

    def check(self, recipe: Any) -> list[str]:
        problems = []
        if self.by == "teacher" and recipe.teacher is None:
            problems.append("the features target is made by a teacher, and there is none; add `teacher: {of: [encoder]}`")
        elif self.by == "teacher" and "encoder" not in recipe.teacher.of:
            problems.append("the features target is made by the teacher's encoder; add `encoder` to teacher.of")
        if "drop" not in recipe.encoder.takes:
            problems.append("the features target is one vector per token, and this encoder's tokens are not those of the view; "
                            "choose one that can be masked token by token")
        return problems

    def fits(self, recipe: Any, view: str) -> list[str]:
        missing = self.masked and view not in recipe.masking
        return [*self.check(recipe), *([f"the features target is of '{view}' masked; set masking.{view}"] if missing else [])]

    def size(self, tokenizer: Tokenizer, encoder: Encoder) -> int:
        return encoder.width

    def prepare(self, step: Step, view: str) -> None:
        step.encode(view, by=self.by, masked=self.masked)

    def compare(self, step: Step, view: str, index: Tensor | None, prediction: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        encoded = step.encode(view, by=self.by, masked=self.masked)
        target = encoded.tokens.detach()
        if encoded.index is not None:  # of some tokens: those it lacks do not count
            there = encoded.index[..., None].expand_as(target)
            lacks = torch.ones_like(step.stream(view).valid).scatter(1, encoded.index, False)
            target = target.new_zeros(*lacks.shape, target.shape[2]).scatter(1, there, target)
            weight = weight.masked_fill(lacks if index is None else gather(lacks, index), 0)
        target = (target if index is None else gather(target, index)).float()
        if self.norm == "layer":
            target = F.layer_norm(target, target.shape[-1:])
        error = _error(self.loss, prediction.float(), target, self.beta)
        return (weight[..., None] * error).sum(), weight.sum() * target.shape[-1]


def token_points(stream: TokenStream, channels: int) -> tuple[Tensor, Tensor]:
    """The coordinates of each token's points (B, n, K, 3), relative to its position, and (B, n, K) which of them count."""
    points = stream.content.float().unflatten(-1, (channels, -1))[..., :3, :].transpose(-1, -2)
    live = element_weight(stream).unflatten(-1, (channels, -1))[..., 0, :] > 0
    return points, live & stream.valid[..., None]


def _of_points(recipe: Any, name: str) -> list[str]:
    coordinates = recipe.modality.tokenizer().coordinates
    return [] if coordinates == 3 else [f"the {name} target needs tokens whose content is points (x, y, z); choose `content`"]


class Chamfer(TargetSettings):
    """The points of a token as a set: every predicted point has a true one near it, and the other way round.

    Source: Pang et al. 2022 (Point-MAE), equation 6. L = 1/|P| Σ_p min_t |p − t|² + 1/|T| Σ_t min_p |p − t|² for each token, P
    as many points as a token holds; T without the points that only fill a token up. Coordinates relative to the token's
    position, in the view's unit.
    """

    def check(self, recipe: Any) -> list[str]:
        return _of_points(recipe, "chamfer")

    def size(self, tokenizer: Tokenizer, encoder: Encoder) -> int:
        return tokenizer.token_size // tokenizer.channels * 3

    def compare(self, step: Step, view: str, index: Tensor | None, prediction: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        stream = step.stream(view) if index is None else step.stream(view).take(index)
        true, live = token_points(stream, step.assembly.tokenizer.channels)
        made = prediction.float().unflatten(-1, (3, -1)).transpose(-1, -2)
        weight = weight * live.any(-1)
        distance = pointops.chamfer(made.flatten(0, 1), true.flatten(0, 1), weight_b=live.flatten(0, 1).to(made))
        return (weight * distance.unflatten(0, weight.shape)).sum(), weight.sum()


class Surface(TargetSettings):
    """How the surface lies and bends at a token: normal and surface variation (Yan et al. 2023, MaskFeat3D).

    Both come of the covariance of the token's points, eigenvalues λ0 ≤ λ1 ≤ λ2: the eigenvector of λ0, whose sign means
    nothing, and λ0 / (λ0 + λ1 + λ2) (Pauly et al. 2002), from 0 of a plane to 1/3 of a ball. As their code: 1 − |cos(m, n)| +
    0.1 (|m| − 1)² of the normal n told as m, and the absolute error of the variation, with the weight `variation`. flat: a
    token has a normal where λ1 − λ0 is more than this share of the sum; three points or fewer have neither.
    """

    variation: float = 1.0
    flat: Annotated[float, Field(ge=0, lt=1)] = 0.02

    def check(self, recipe: Any) -> list[str]:
        return _of_points(recipe, "surface")

    def size(self, tokenizer: Tokenizer, encoder: Encoder) -> int:
        return 4

    def compare(self, step: Step, view: str, index: Tensor | None, prediction: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        stream = step.stream(view) if index is None else step.stream(view).take(index)
        points, live = token_points(stream, step.assembly.tokenizer.channels)
        normal, variation, plain = surface(points, live, self.flat)
        made, bend = prediction.float().split([3, 1], -1)
        turned = 1 - F.cosine_similarity(made, normal, dim=-1).abs()
        normals = (turned + 0.1 * (torch.linalg.vector_norm(made, dim=-1) - 1).square()) * plain
        bends = (bend[..., 0] - variation).abs()
        weight = weight * (live.sum(-1) > 3)
        return (weight * (normals + self.variation * bends)).sum(), weight.sum()


def surface(points: Tensor, live: Tensor, flat: float) -> tuple[Tensor, Tensor, Tensor]:
    """Normals (…, 3), surface variation (…) and (…) bool whether there is a normal, of points (…, K, 3) where live (…, K)."""
    weight = live.to(points)[..., None]
    count = weight.sum(-2, keepdim=True).clamp_min(1)
    centred = (points - (points * weight).sum(-2, keepdim=True) / count) * weight
    values, vectors = torch.linalg.eigh(centred.transpose(-1, -2) @ centred / count)
    total = values.sum(-1).clamp_min(torch.finfo(values.dtype).tiny)
    return vectors[..., 0], values[..., 0].clamp_min(0) / total, values[..., 1] - values[..., 0] > flat * total


class Extent(TargetSettings):
    """The box of the segment that a token lies in, in the view's frame: where it is, how large, how it is turned.

    Source: the pose- and size-aware head of PSA-SSL (Nisar and Waslander 2025). Eight numbers: from the token's position to the
    box's centre (3), the logarithms of length, width and height (3, length ≥ width, height along z), and sine and cosine of
    twice the heading about z (2), as a box without front and back has it. The box is that of least area among `headings`
    upright ones (Zhang et al. 2017, criterion of area). Tokens of no segment (−1) do not count. loss, beta: as in `features`;
    least: of a side, in the view's unit.
    """

    loss: ElementLoss = "smooth_l1"
    beta: Annotated[float, Field(gt=0)] = 1.0
    headings: Annotated[int, Field(ge=2)] = 45
    least: Annotated[float, Field(gt=0)] = 0.01

    def check(self, recipe: Any) -> list[str]:
        missing = [] if "segment" in recipe.reads else ["the extent target needs segments; set reads: [segment]"]
        return _of_points(recipe, "extent") + missing

    def size(self, tokenizer: Tokenizer, encoder: Encoder) -> int:
        return 8

    def compare(self, step: Step, view: str, index: Tensor | None, prediction: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        stream = step.stream(view)
        if "segment" not in stream.kind or stream.position is None:
            raise RecipeError("the extent target needs tokens that know their segment", "Choose tokens of points.")
        segment = stream.kind["segment"]
        box = self.boxes(step.view(view), segment)
        target = torch.cat([box[..., :3] - stream.position.float(), box[..., 3:]], -1)
        known = segment >= 0
        if index is not None:
            target, known = gather(target, index), gather(known, index)
        error = _error(self.loss, prediction.float(), target, self.beta)
        weight = weight * known
        return (weight[..., None] * error).sum(), weight.sum() * 8

    def boxes(self, view: View, wanted: Tensor) -> Tensor:
        """(B, n, 8): centre, log sides, sine and cosine of twice the heading, of the segments `wanted` (B, n) of each row."""
        segment = view.fields["segment"]
        if view.weight is not None:
            segment = torch.where(view.weight[:, 0] > 0, segment, -1)
        numbers = torch.unique(torch.cat([segment, wanted], 1))
        place, asked = (torch.searchsorted(numbers, x.contiguous()) for x in (segment, wanted))
        rows = torch.arange(len(segment), device=segment.device)[:, None] * len(numbers)
        place, asked = (place + rows).flatten(), (asked + rows).flatten()
        angle = torch.arange(self.headings, device=segment.device) * (math.pi / 2 / self.headings)
        x, y, z = view.array[:, :3].float().transpose(0, 1).flatten(1)
        along = x[:, None] * angle.cos() + y[:, None] * angle.sin()
        across = y[:, None] * angle.cos() - x[:, None] * angle.sin()
        measured = torch.cat([along, across, z[:, None]], 1)  # (B·N, 2·headings + 1)
        to = place[:, None].expand_as(measured)
        empty = measured.new_zeros(len(segment) * len(numbers), measured.shape[1])
        low = empty.scatter_reduce(0, to, measured, "amin", include_self=False)[asked]
        high = empty.scatter_reduce(0, to, measured, "amax", include_self=False)[asked]
        side = (high - low).clamp_min(self.least)
        best = (side[:, :self.headings] * side[:, self.headings:-1]).argmin(1)
        both = torch.stack([best, best + self.headings], 1)
        middle, (a, b), theta = ((low + high) / 2), side.gather(1, both).unbind(1), angle[best]
        u, v = middle.gather(1, both).unbind(1)
        centre = torch.stack([u * theta.cos() - v * theta.sin(), u * theta.sin() + v * theta.cos(), middle[:, -1]], 1)
        heading = 2 * torch.where(a >= b, theta, theta + math.pi / 2)
        sides = torch.stack([torch.maximum(a, b), torch.minimum(a, b), side[:, -1]], 1).log()
        box = torch.cat([centre, sides, heading.sin()[:, None], heading.cos()[:, None]], 1)
        return box.unflatten(0, wanted.shape)
