"""What another masking left."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from meristem.platform.masked.masking import Masking, informative
from meristem.platform.objectives import Plan

if TYPE_CHECKING:
    from meristem.platform.step import Step


class Complement(Masking):
    """Hides the tokens that the masking of the view `of` shows, and shows those that it hides."""

    of: str

    def check(self, recipe: Any) -> list[str]:
        problems = super().check(recipe)
        if self.of not in recipe.masking or recipe.masking[self.of].hides != "tokens":
            return [*problems, f"it shows what masking.{self.of} hides, which is no token; give {self.of} a masking of tokens"]
        if recipe.masking[self.of].corruption != self.corruption:
            problems.append(f"masking.{self.of} does not {self.corruption} tokens; set the same corruption for both")
        if isinstance(recipe.masking[self.of], Complement):
            problems.append(f"masking.{self.of} is a complement itself; name the view that it is one of")
        return problems

    def decide(self, step: Step, view: str) -> Plan:
        other, stream = step.plan(self.of), step.stream(view)
        kept = 0 if other.keep is None else len(stream) - other.keep.shape[1]
        return self._finish(stream, step.rng("mask", view), ~other.hidden, informative(stream), kept)
