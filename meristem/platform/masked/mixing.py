"""Several samples in one sequence (MixedAE)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from meristem.errors import RecipeError
from meristem.modalities.rng import Rng
from meristem.modalities.stream import TokenStream
from meristem.platform.derived.base import needs_lattice
from meristem.platform.masked.masking import Masking, informative
from meristem.platform.objectives import Plan


class Mixture(Masking):
    """Rows that follow each other share one sequence, in which each place of the lattice is filled by one of them: what a row
    keeps is what the others lose (Chen et al. 2023, MixedAE, section 3.1).

    group: how many rows share one; each keeps 1/group of its tokens, rounded down, and the places that remain belong to none.
    attend: share of a sequence's tokens that each token attends to, those whose keys suit its query best: their homologous
    attention (section 3.2). null: all.
    """

    group: Annotated[int, Field(ge=2)] = 4
    attend: Annotated[float, Field(gt=0, le=1)] | None = None
    corruption: Literal["drop"] = "drop"

    def check(self, recipe: Any) -> list[str]:
        problems = super().check(recipe) + needs_lattice(recipe, "mixes the lattices of")
        if "mix" not in recipe.encoder.takes:
            problems.append("it puts several samples into one sequence, which this encoder cannot take; choose a transformer")
        parts = self.group * recipe.train.accumulate
        if recipe.train.batch % parts:
            problems.append(f"groups of {self.group} do not fill a batch of {recipe.train.batch}, worked in "
                            f"{recipe.train.accumulate}; set train.batch to a multiple of {parts}")
        problems += [f"view '{name}' has several looks, and a group would mix a sample with itself; set views.{name}.count: 1"
                     for name, masking in recipe.masking.items() if masking is self and recipe.looks[name].count > 1]
        return problems

    def plan(self, stream: TokenStream, rng: Rng, unit: tuple[int, ...]) -> Plan:
        n, share = len(stream), len(stream) // self.group
        if stream.batch % self.group:
            raise RecipeError(f"{stream.batch} samples on this device are no whole number of groups of {self.group}",
                              "Choose a train.batch of which each device's part is a multiple of the group.")
        if not share:
            raise RecipeError(f"{n} tokens cannot be shared by {self.group} samples",
                              "Choose a larger view or a smaller patch.")
        drawn = Rng(rng.key[::self.group]).permutation("mixture", n)[:, :share * self.group]
        keep = drawn.reshape(stream.batch, share).sort(dim=1).values
        hidden = torch.ones_like(stream.valid).scatter(1, keep, False)
        predict = (hidden & informative(stream)).float()
        return Plan(hidden=hidden, predict=predict, keep=keep, group=self.group, attend=self.attend)
