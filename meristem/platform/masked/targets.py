"""Targets of masked prediction: what should have been predicted, and the loss against it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from meristem.modalities.base import Settings, Tokenizer
from meristem.modalities.stream import TokenStream, gather
from meristem.platform.encoders.base import Encoder

if TYPE_CHECKING:
    from meristem.platform.step import Step

ElementLoss = Literal["mse", "l1", "smooth_l1"]


class TargetSettings(Settings):
    """The typed entry of a target: it makes the target, which has no gradient, and owns the loss."""

    def check(self, recipe: Any) -> list[str]:
        """What is impossible about this target in this recipe; empty when all is well."""
        return []

    def size(self, tokenizer: Tokenizer, encoder: Encoder) -> int:
        """Numbers per token that a predictor must give."""
        raise NotImplementedError

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
        x, w = (y.unflatten(-1, (groups, -1)) for y in (x, (element_weight(stream) > 0).to(x)))
        n = w.sum(-1, keepdim=True)
        mean = (w * x).sum(-1, keepdim=True) / n.clamp_min(1)
        var = (w * (x - mean).square()).sum(-1, keepdim=True) / (n - 1).clamp_min(1)
        return mean.expand_as(x).flatten(2), (var + self.eps).sqrt().expand_as(x).flatten(2)

    def compare(self, step: Step, view: str, index: Tensor | None, prediction: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        stream = step.stream(view) if index is None else step.stream(view).take(index)
        mean, std = self.statistics(stream, step.assembly.recipe.modality.channels)
        error = _error(self.loss, prediction.float(), (stream.content.float() - mean) / std, self.beta)
        w = weight[..., None] * element_weight(stream)
        return (w * error).sum(), w.sum()


class Features(TargetSettings):
    """The tokens that the teacher makes of the whole view, nothing hidden (V-JEPA, Bardes et al. 2024, section 3).

    norm: `layer` gives every target token mean 0 and variance 1 over its channels, without parameters (appendix of the same).
    loss: of each channel; beta: where `smooth_l1` turns from square to straight. With `l1` the loss is their equation 1.
    """

    by: Literal["teacher"] = "teacher"
    norm: Literal["none", "layer"] = "layer"
    loss: ElementLoss = "l1"
    beta: Annotated[float, Field(gt=0)] = 1.0

    def check(self, recipe: Any) -> list[str]:
        problems = []
        if recipe.teacher is None:
            problems.append("the features target is made by a teacher, and there is none; add `teacher: {of: [encoder]}`")
        elif "encoder" not in recipe.teacher.of:
            problems.append("the features target is made by the teacher's encoder; add `encoder` to teacher.of")
        if "drop" not in recipe.encoder.takes:
            problems.append("the features target is one vector per token, and this encoder's tokens are not those of the view; "
                            "choose one that can be masked token by token")
        return problems

    def size(self, tokenizer: Tokenizer, encoder: Encoder) -> int:
        return encoder.width

    def prepare(self, step: Step, view: str) -> None:
        step.encode(view, by=self.by)

    def compare(self, step: Step, view: str, index: Tensor | None, prediction: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        target = step.encode(view, by=self.by).tokens.detach()
        target = (target if index is None else gather(target, index)).float()
        if self.norm == "layer":
            target = F.layer_norm(target, target.shape[-1:])
        error = _error(self.loss, prediction.float(), target, self.beta)
        return (weight[..., None] * error).sum(), weight.sum() * target.shape[-1]


TARGETS: dict[str, type[TargetSettings]] = {"content": Content, "features": Features}
