"""Groups of neighbouring tokens that show what does not belong where they are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from meristem.modalities.rng import Rng
from meristem.modalities.stream import TokenStream
from meristem.platform.derived.base import needs_lattice
from meristem.platform.masked.masking import (
    Fraction,
    Masking,
    Unit,
    enough_boxes,
    feasible,
    first_covered,
    in_cells,
    informative,
    rounded,
    to_tokens,
)
from meristem.platform.objectives import Plan

Kind = Literal["noise", "zeros", "other"]


class Groups(Masking):
    """Overlapping boxes of cells that show noise, nothing or another sample: group masked model learning (GMML, Atito et al.
    2022, and its code).

    shows: what a row may show where it is hidden, and the fraction that it then hides, or the range of it: `noise`, standard
    normal; `zeros`; `other`, what a row drawn from the batch has at the same places. Each row shows one of them, as often as
    each of the others. largest: a box's sides are uniform between one cell and this part of the view's. unit: as in `Random`.
    """

    shows: Annotated[Mapping[Kind, Fraction | tuple[Fraction, Fraction]], Field(min_length=1)] = {
        "noise": (0.5, 0.75), "other": 0.3}
    largest: Fraction = 0.3
    unit: Unit = 1
    corruption: Literal["replace"] = "replace"

    def check(self, recipe: Any) -> list[str]:
        swapped = ["swap: what is hidden shows something already; leave it out"] if self.swap else []
        return [*super().check(recipe), *swapped, *needs_lattice(recipe, "hides boxes of")]

    def plan(self, stream: TokenStream, rng: Rng, unit: tuple[int, ...]) -> Plan:
        grain, cells = in_cells(stream, self.unit, unit)
        ranges = torch.tensor([x if isinstance(x, tuple) else (x, x) for x in self.shows.values()], device=rng.key.device)
        m, top = math.prod(cells), float(ranges.max())
        feasible(rounded(m, top), m, top)
        kind = rng.integers("kind", len(ranges))
        low, high = ranges[kind].unbind(1)
        hide = (m * (low + (high - low) * rng.uniform("ratio")).double() + 0.5).floor()
        long = [max(int(n * self.largest), 1) for n in cells]
        boxes = enough_boxes(top, math.prod((n + 1) / 2 for n in long) / m)
        side = 1 + (rng.uniform("side", boxes, len(cells)) * torch.tensor(long, device=hide.device)).floor()
        rank = first_covered(rng, cells, side).argsort(dim=1, stable=True).argsort(dim=1)
        hidden = to_tokens(rank < hide[:, None], cells, grain)
        return Plan(hidden, (hidden & informative(stream)).float(), fill=self._fill(stream, rng, kind))

    def _fill(self, stream: TokenStream, rng: Rng, kind: Tensor) -> Tensor:
        """(B, N, P)."""
        content = stream.content
        made = {"noise": lambda: rng.normal("noise", *content.shape[1:]), "zeros": lambda: torch.zeros_like(content),
                "other": lambda: content[rng.integers("other", len(content))]}
        shown = torch.stack([made[name]().to(content) for name in self.shows])
        return shown[kind, torch.arange(len(content), device=kind.device)]
