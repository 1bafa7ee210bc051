"""Batches of noise, for looking at what a recipe does where there is no data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from meristem.modalities.base import View
from meristem.modalities.rng import Rng
from meristem.platform.objectives import Items
from meristem.platform.recipe import Recipe
from meristem.platform.step import Batch

SAMPLES, CLASSES = 2, 2  # enough for contrast and for batch norm


def noise(recipe: Recipe, samples: int = SAMPLES, make: Callable[[tuple[int, ...], Rng], View] | None = None) -> Batch:
    """A batch in the shape of a recipe's views, prepared already, with labels and companions of two classes.

    make: a view of a size, a row for each key; None: the modality's example.
    """
    items = Items(torch.arange(samples), torch.arange(samples), {"class": torch.arange(samples) % CLASSES})
    views = {}
    for name, options in recipe.views.items():
        size: tuple[int, ...] = tuple(options.size)  # type: ignore[attr-defined]
        rng = Rng.of(0, torch.arange(samples * options.count), name)
        view: View = (make or recipe.modality.example)(size, rng)
        companions = {field: rng.integers(field, CLASSES, *view.array.shape[2:]) for field in recipe.reads}
        views[name] = replace(view, name=name, item=torch.arange(samples).repeat_interleave(options.count),
                              look=torch.arange(options.count).repeat(samples), fields=view.fields | companions)
    return Batch(items, views)
