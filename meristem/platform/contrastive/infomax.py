"""Mutual information between the tokens of a sample and the sample as a whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meristem.platform.objectives import Loss, Objective, ObjectiveSettings, answered

if TYPE_CHECKING:
    from meristem.platform.assembly import Assembly
    from meristem.platform.step import Step


class Infomax(ObjectiveSettings):
    """Tell a sample's tokens from those of the same sample with its contents exchanged, by a summary of the sample.

    DGI (Veličković et al. 2019, section 3): s = σ(mean of the tokens), score h W s, binary cross-entropy; the pass of the view
    `encode` without its masking against the pass with it, which must be `shuffle`.
    """

    encode: str

    def check(self, recipe: Any) -> list[str]:
        if self.encode not in recipe.looks:
            return [f"encode names '{self.encode}': there is no such view (views: {', '.join(recipe.looks)})"]
        if self.encode not in recipe.masking or recipe.masking[self.encode].hides != "the order of tokens":
            return [f"view '{self.encode}' has no counterpart with exchanged contents; set masking.{self.encode}: shuffle"]
        return []

    def build(self, assembly: Assembly) -> Objective:
        return InfomaxObjective(self, assembly.encoder.width)


class InfomaxObjective(Objective):
    """`error`, of weight 0, is the share of wrong answers, for the log."""

    def __init__(self, settings: Infomax, width: int) -> None:
        super().__init__()
        self.settings = settings
        self.matrix = nn.Parameter(torch.empty(width, width))
        nn.init.xavier_uniform_(self.matrix)

    def forward(self, step: Step) -> dict[str, Loss]:
        view = self.settings.encode
        true, false = step.encode(view), step.encode(view, masked=True)
        against = true.summary["mean"].sigmoid() @ self.matrix.T  # (B, D)

        def scores(tokens: Tensor) -> Tensor:
            return torch.einsum("bnd,bd->bn", tokens, against)[true.valid].float()

        logits = torch.cat([scores(true.tokens), scores(false.tokens)])
        truth = (torch.arange(len(logits), device=logits.device) < len(logits) // 2).float()
        loss = F.binary_cross_entropy_with_logits(logits, truth, reduction="sum")
        return answered(loss, ((logits > 0) != truth.bool()).float().sum(), len(logits), self.settings.weight)
