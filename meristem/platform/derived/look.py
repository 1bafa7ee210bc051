"""One look of another view."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field

from meristem.modalities.base import View, ViewSettings
from meristem.platform.derived.base import Derivation

if TYPE_CHECKING:
    from meristem.platform.step import Step


class Look(Derivation):
    """One of the looks of a view, its `number` from 0, as a view of its own: two frames of one clip as a pair."""

    number: Annotated[int, Field(ge=0)]

    def check(self, recipe: Any) -> list[str]:
        count = recipe.looks[self.of].count
        return [] if self.number < count else [f"'{self.of}' has {count} looks, and none of number {self.number}"]

    def shown(self, of: ViewSettings) -> ViewSettings:
        return of.model_copy(update={"count": 1})

    def derive(self, view: View, name: str, step: Step) -> View:
        one = view.select((view.look == self.number).nonzero()[:, 0])
        return replace(one, name=name, look=torch.zeros_like(one.look))
