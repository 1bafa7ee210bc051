"""Views made of drawn ones on the device, over the whole batch: filtered, corrupted, mixed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from meristem.modalities.base import Settings, View, ViewSettings

if TYPE_CHECKING:
    from meristem.platform.objectives import Encoded, Units
    from meristem.platform.step import Step


class Derivation(Settings):
    """The typed entry of a derived view. of: the view, drawn or derived before it, that it is made of."""

    of: str

    def check(self, recipe: Any) -> list[str]:
        """What is impossible about it in this recipe; empty when all is well."""
        return []

    def shown(self, of: ViewSettings) -> ViewSettings:
        """How many looks it has, and of what size; of: those that it is made of."""
        return of

    def derive(self, view: View, name: str, step: Step) -> View:
        """A new view called `name`; `view` stays as it is. Random numbers: step.rng(purpose, self.of)."""
        raise NotImplementedError

    def tiles(self, step: Step, name: str, encoded: Encoded) -> Units:
        """The units of the level `tiles`: what was encoded, by the parts that the view called `name` is put together of."""
        raise NotImplementedError


def needs_lattice(recipe: Any, what: str) -> list[str]:
    """A problem where `what` is done to arrays, and an axis of the recipe's data is no coordinate: of sets, of joints."""
    by_name = recipe.modality.tokenizer().structure > 0  # tokens differ by more than where they lie
    if not by_name and all(len(view.size) == len(recipe.modality.axes) for view in recipe.views.values()):
        return []
    return [f"it {what} arrays, and {recipe.modality.name} data are sets, which have none"]


def timed(recipe: Any) -> bool:
    """Whether the first axis of the recipe's data is time."""
    axes = recipe.modality.axes
    return bool(axes) and axes[0].unit == "s"


def needs_time(recipe: Any, what: str) -> list[str]:
    """A problem where the recipe's data are no arrays whose first axis is time."""
    return needs_lattice(recipe, what) or ([] if timed(recipe) else [
        f"it {what} clips, and {recipe.modality.name} data have no time"])
