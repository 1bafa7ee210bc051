"""A whole sample's vector told to agree with what a foreign model makes of pictures of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field
from torch import nn
from torch.nn import functional as F

from meristem.platform.foreign import named
from meristem.platform.objectives import Loss, Objective, ObjectiveSettings

if TYPE_CHECKING:
    from meristem.platform.assembly import Assembly
    from meristem.platform.step import Step


class Distil(ObjectiveSettings):
    """Cross-modal contrast of ReCon (Qi et al. 2023, section 3.2): smooth-L1 between a linear map of a vector of the encoder
    and a foreign model's vector, the mean over the three pictures (of one picture in their code). Nothing repels.

    encode: the view, with its masking where it has one. vector: which of the encoder's. by: the foreign model. beta: where
    squared turns into straight.
    """

    encode: str
    vector: str
    by: str
    beta: Annotated[float, Field(gt=0)] = 1.0

    def check(self, recipe: Any) -> list[str]:
        problems = []
        if self.encode not in recipe.looks:
            problems.append(f"there is no view '{self.encode}' (views: {', '.join(recipe.looks)})")
        problems += named(recipe, self.by)
        if self.vector not in recipe.encoder.provides:
            problems.append(f"this encoder has no vector '{self.vector}'; add it to encoder.reader.queries, or choose another")
        return problems

    def build(self, assembly: Assembly) -> Objective:
        return DistilObjective(self, assembly)


class DistilObjective(Objective):
    def __init__(self, settings: Distil, assembly: Assembly) -> None:
        super().__init__()
        self.settings = settings
        self.masked = settings.encode in assembly.recipe.masking
        self.head = nn.Linear(assembly.encoder.width, assembly.foreign[settings.by].width)

    def forward(self, step: Step) -> dict[str, Loss]:
        s = self.settings
        made = self.head(step.encode(s.encode, masked=self.masked).summary[s.vector]).float()
        true = step.sight(s.by, s.encode).summary.mean(1)
        return {"": Loss(F.smooth_l1_loss(made, true, reduction="sum", beta=s.beta), float(true.numel()), s.weight)}
