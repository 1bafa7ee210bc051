"""Pretexts: tell what was drawn for a view from what the encoder makes of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F

from meristem.errors import RecipeError
from meristem.platform.derived.montage import needs_montage
from meristem.platform.objectives import Loss, Objective, ObjectiveSettings, answered

if TYPE_CHECKING:
    from meristem.platform.assembly import Assembly
    from meristem.platform.step import Step


class Pretext(ObjectiveSettings):
    """Classify what was drawn for each row of a view: its turn, speed, order, direction.

    label: the drawn number, of 0 … classes − 1. level: of the units: mean, cls, global (cls where there is one) or tiles (of a
    montage, which have the label `part` beside those of what they show). head: a named head between them and the linear
    classifier.
    """

    view: str
    label: str
    classes: Annotated[int, Field(ge=2)]
    level: Literal["global", "cls", "mean", "tiles"] = "global"
    head: str | None = None

    def check(self, recipe: Any) -> list[str]:
        problems = []
        if self.view not in recipe.looks:
            problems.append(f"there is no view '{self.view}' (views: {', '.join(recipe.looks)})")
        if self.head is not None and self.head not in recipe.heads:
            problems.append(f"there is no head '{self.head}' (heads: {', '.join(recipe.heads) or 'none'})")
        if self.level == "cls" and "cls" not in recipe.encoder.provides:
            problems.append("level cls needs an encoder with a class token; use level: global or mean")
        return problems + (needs_montage(recipe, self.view) if self.level == "tiles" else [])

    def build(self, assembly: Assembly) -> PretextObjective:
        return PretextObjective(self, assembly.head_width(self.head))


class PretextObjective(Objective):
    """Softmax cross-entropy of a linear classifier; `error`, of weight 0, is the share of wrong answers, for the log."""

    def __init__(self, settings: Pretext, width: int) -> None:
        super().__init__()
        self.settings = settings
        self.classifier = nn.Linear(width, settings.classes)

    def forward(self, step: Step) -> dict[str, Loss]:
        s = self.settings
        units = step.units(s.view, level=s.level, head=s.head)
        known = ("item", "row", "view", "look", *step.batch.items.labels)  # all but what was drawn
        drawn = {name: key for name, key in units.key.items() if name not in known}
        if s.label not in drawn:
            raise RecipeError(f"view '{s.view}' draws no '{s.label}' for a pretext",
                              f"It draws {', '.join(drawn)}." if drawn else f"Set an option of views.{s.view} that draws one.")
        target = drawn[s.label]
        low, high = torch.stack(target.aminmax()).tolist()
        if low < 0 or high >= s.classes:
            remedy = f"set classes to at least {high + 1}." if low >= 0 else f"'{s.label}' cannot be a pretext's label."
            raise RecipeError(f"view '{s.view}' drew {s.label} {min(low, 0) or high}, and the pretext has {s.classes} classes",
                              f"Classes are numbered from 0: {remedy}")
        logits = self.classifier(units.z).float()
        wrong = (logits.argmax(1) != target).float().sum()
        return answered(F.cross_entropy(logits, target, reduction="sum"), wrong, len(target), s.weight)
