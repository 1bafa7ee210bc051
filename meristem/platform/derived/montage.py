"""Patches of many pictures, shuffled and set side by side."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field, field_validator
from torch import Tensor
from torch.nn import functional as F

from meristem.errors import RecipeError
from meristem.modalities.base import View, ViewSettings
from meristem.modalities.frame import Frame
from meristem.modalities.rng import Rng
from meristem.platform.derived.base import Derivation, needs_lattice
from meristem.platform.objectives import Encoded, Units

if TYPE_CHECKING:
    from meristem.platform.step import Step

Share = Annotated[float, Field(ge=0, le=1)]


class Montage(Derivation):
    """A tile of look i of `of` shows part i of it; the tiles of a process's share of the batch are shuffled and fill as many
    montages.

    JigClu (Chen et al. 2021, section 3.1). grid: parts along each axis, and tiles of a montage, which is as large as a look.
    overlap: by so much of the look a part reaches beyond its share on each side. Of a part a tile shows a random window of a
    fraction `area`, its sides stretched by ratios log-uniform in `aspect`, resized; mirrored along each axis with the
    probabilities `flip`. The view's parameter `rows` (B, tiles) says which row of `of` each tile shows; a montage is nobody's,
    and has no place in a sample. The level `tiles` gives each tile the keys of its row, and `part`.
    """

    grid: tuple[Annotated[int, Field(ge=1)], ...] = (2, 2)
    overlap: Share = 0.3
    area: tuple[Share, Share] = (0.2, 1.0)
    aspect: tuple[float, float] = (0.75, 4 / 3)
    flip: tuple[Share, ...] = ()

    @field_validator("aspect")
    @classmethod
    def _positive(cls, aspect: tuple[float, float]) -> tuple[float, float]:
        if not 0 < aspect[0] <= aspect[1]:
            raise ValueError(f"aspect is two positive numbers in order, got {list(aspect)}")
        return aspect

    def check(self, recipe: Any) -> list[str]:
        problems = needs_lattice(recipe, "sets side by side the parts of")
        if problems or self.of not in recipe.looks:
            return problems
        of, tiles = recipe.looks[self.of], math.prod(self.grid)
        if len(self.grid) != len(of.size) or len(self.flip) not in (0, len(of.size)):
            return [f"grid and flip need a number for each of the {len(of.size)} axes"]
        if any(n % g for n, g in zip(of.size, self.grid, strict=True)):
            problems.append(f"a montage of {list(self.grid)} tiles cannot be as large as '{self.of}', {list(of.size)}")
        if of.count != tiles:
            problems.append(f"each of the {tiles} parts is shown by a look of its own; set views.{self.of}.count={tiles}")
        return problems

    def shown(self, of: ViewSettings) -> ViewSettings:
        return of.model_copy(update={"count": 1})

    def derive(self, view: View, name: str, step: Step) -> View:
        rng, tiles = step.rng("montage", self.of), math.prod(self.grid)
        order = rng.bits("place").argsort()  # by a number of each row's own
        rows = order.reshape(-1, tiles)
        size = [n // g for n, g in zip(view.array.shape[2:], self.grid, strict=True)]
        windows = self._windows(view.look, rng)

        def montage(x: Tensor, mode: str = "bilinear") -> Tensor:
            """(B·tiles, C, *S) rows to (B, C, *S) montages."""
            cut = F.grid_sample(x.float(), F.affine_grid(windows, [*x.shape[:2], *size], align_corners=False), mode,
                                "border", align_corners=False)
            cut = cut[rows].unflatten(1, self.grid)  # (B, *grid, C, *size)
            d = len(size)
            cut = cut.permute(0, d + 1, *(axis for i in range(d) for axis in (1 + i, d + 2 + i)))
            return cut.reshape(len(rows), x.shape[1], *x.shape[2:]).to(x.dtype)

        first = view.frame.select(rows[:, 0])
        nowhere = torch.full_like(first.affine, math.nan)
        return View(name, montage(view.array), Frame(nowhere, first.shape, first.spacing, first.unit),
                    torch.arange(len(rows), device=rows.device), torch.zeros_like(rows[:, 0]), {"rows": rows},
                    {n: montage(x[:, None], "nearest")[:, 0] for n, x in view.fields.items()},
                    None if view.weight is None else montage(view.weight))

    def _windows(self, look: Tensor, rng: Rng) -> Tensor:
        """(M, d, d + 1): a tile to what it shows of its look, both from −1 to 1, the last axis first, as affine_grid wants."""
        grid = torch.tensor(self.grid, device=look.device)
        d = len(self.grid)
        cell = torch.stack(torch.unravel_index(look % math.prod(self.grid), self.grid), 1)
        low = (cell / grid - self.overlap).clamp_min(0)
        part = ((cell + 1) / grid + self.overlap).clamp_max(1) - low
        area = rng.uniform("area", 1, low=self.area[0], high=self.area[1])
        stretch = rng.uniform("aspect", d, low=math.log(self.aspect[0]), high=math.log(self.aspect[1]))
        stretch[:, -1] = 0
        side = (area ** (1 / d) * (stretch - stretch.mean(1, keepdim=True)).exp()).clamp_max(1)  # of the part's own
        start = low + rng.uniform("start", d) * (1 - side) * part
        side = side * part
        mirror = torch.ones_like(side)
        if self.flip:
            mirror -= 2 * (rng.uniform("flip", d) < torch.tensor(self.flip, device=side.device))
        centre = 2 * start + side - 1
        return torch.cat([torch.diag_embed(side * mirror).flip((1, 2)), centre.flip(1)[..., None]], 2)

    def tiles(self, step: Step, name: str, encoded: Encoded) -> Units:
        """Means over each tile's share of the encoder's lattice, with the keys of what it shows."""
        if encoded.lattice is None:
            raise RecipeError(f"the tiles of '{name}' are parts of a lattice, and this encoder's tokens have none",
                              "Choose encoder: transformer, unet or timm.")
        rows = step.view(name).params["rows"].flatten()
        keys = step.keys(self.of) | {"part": step.view(self.of).look}
        maps = encoded.tokens.transpose(1, 2).unflatten(2, encoded.lattice)
        pool: Any = F.adaptive_avg_pool2d if len(self.grid) == 2 else F.adaptive_avg_pool3d
        z = pool(maps, self.grid).flatten(2).transpose(1, 2).flatten(0, 1)
        return Units(z, {key: x[rows] for key, x in keys.items()}, torch.ones(len(z), device=z.device))


def needs_montage(recipe: Any, view: str, masked: bool = False) -> list[str]:
    """A problem where the units of a view are to be tiles and it has none, or shows some of itself only."""
    if not isinstance(recipe.derived.get(view), Montage):
        return [f"level tiles needs a montage, and view '{view}' is none; derive one"]
    return [f"the tiles of '{view}' are means over all of its tokens; do not mask it"] if masked else []
