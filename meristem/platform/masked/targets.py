"""Targets of masked prediction: what should have been predicted, and the loss against it."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from meristem.modalities.base import Settings, Tokenizer
from meristem.modalities.stream import TokenStream


class TargetSettings(Settings):
    """The typed entry of a target: it makes the target and owns the loss."""

    def size(self, tokenizer: Tokenizer) -> int:
        """Numbers per token that a predictor must give."""
        raise NotImplementedError

    def compare(self, stream: TokenStream, prediction: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """stream: the tokens predicted, with all their fields; prediction: (B, n, P); weight: (B, n). Returns (sum, count)."""
        raise NotImplementedError


def element_weight(stream: TokenStream) -> Tensor:
    """(B, n, P) weight of each element of each token's content; one weight serves all channels of a voxel."""
    if stream.weight is None:
        return torch.ones_like(stream.content)
    return stream.weight.repeat(1, 1, stream.content.shape[-1] // stream.weight.shape[-1])


class Content(TargetSettings):
    """The tokens' own content: voxels of a patch.

    normalise: `token` gives every token mean 0 and variance 1 over its elements (He et al. 2022, section 4.1: (x − mean) /
    sqrt(var + eps), var with n − 1 as the authors' code has it); elements of weight 0 (outside the sample) count in neither.
    loss: of each element; beta: where `smooth_l1` turns from square to straight. The sum runs over elements, weighted by token
    and element, and the count is the sum of those weights: with `l1` the loss of SimMIM (Xie et al. 2022, equation 1).
    """

    normalise: Literal["none", "token"] = "none"
    eps: float = 1e-6
    loss: Literal["mse", "l1", "smooth_l1"] = "mse"
    beta: Annotated[float, Field(gt=0)] = 1.0

    def size(self, tokenizer: Tokenizer) -> int:
        return tokenizer.token_size

    def statistics(self, stream: TokenStream) -> tuple[Tensor, Tensor]:
        """(mean, std) of each token, (B, n, 1), that its content is normalised by."""
        x = stream.content.float()
        if self.normalise == "none":
            return torch.zeros_like(x[..., :1]), torch.ones_like(x[..., :1])
        w = (element_weight(stream) > 0).to(x)
        n = w.sum(-1, keepdim=True)
        mean = (w * x).sum(-1, keepdim=True) / n.clamp_min(1)
        var = (w * (x - mean).square()).sum(-1, keepdim=True) / (n - 1).clamp_min(1)
        return mean, (var + self.eps).sqrt()

    def compare(self, stream: TokenStream, prediction: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = self.statistics(stream)
        target, prediction = (stream.content.float() - mean) / std, prediction.float()
        if self.loss == "mse":
            error = F.mse_loss(prediction, target, reduction="none")
        elif self.loss == "l1":
            error = F.l1_loss(prediction, target, reduction="none")
        else:
            error = F.smooth_l1_loss(prediction, target, reduction="none", beta=self.beta)
        w = weight[..., None] * element_weight(stream)
        return (w * error).sum(), w.sum()


TARGETS: dict[str, type[TargetSettings]] = {"content": Content}
