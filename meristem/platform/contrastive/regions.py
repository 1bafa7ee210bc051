"""Regions of a decoder's map as a level of units."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from meristem.modalities.stream import LatticeStream
from meristem.platform.contrastive.levels import LevelSettings
from meristem.platform.objectives import Units

if TYPE_CHECKING:
    from meristem.platform.step import Step


class Regions(LevelSettings):
    """The encoder's dense map, averaged over the patch of each token of the view. Key `token`: its number."""

    what = "regions"
    keys = ("token",)

    def check(self, recipe: Any, views: Collection[str], head: str | None) -> list[str]:
        problems = super().check(recipe, views, head)
        if "dense" not in recipe.encoder.provides:
            problems.append("level regions: this encoder has no dense map; use level: dense, or encoder: unet")
        if head is not None:
            problems.append(f"level regions: head '{head}' is made for the width of tokens, not of the dense map; leave it out")
        return problems

    def units(self, step: Step, view: str, by: str, head: str | None, masked: bool) -> Units:
        dense, stream = step.encode(view, by, masked, frozenset({"dense"})).dense, step.stream(view)
        assert dense is not None and isinstance(stream, LatticeStream)
        pool = F.avg_pool3d if dense.ndim == 5 else F.avg_pool2d
        z = pool(dense, stream.patch).flatten(2).transpose(1, 2)
        b, n = z.shape[:2]
        key = {name: x[:, None].expand(b, n).flatten() for name, x in step.keys(view).items()}
        key["token"] = torch.arange(n, device=z.device).repeat(b)
        source = stream.source
        return Units(z.flatten(0, 1), key, torch.ones(b * n, device=z.device), None if source is None else source.flatten(0, 1))
