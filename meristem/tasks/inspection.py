"""What a recipe comes to: every key, its size, and the passes of one step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from meristem.modalities.rng import Rng
from meristem.platform import joint
from meristem.platform.assembly import Assembly
from meristem.platform.objectives import Items
from meristem.platform.recipe import Recipe, build, override, read
from meristem.platform.step import Batch
from meristem.tasks.base import TaskRecipe

SAMPLES, CLASSES = 2, 2  # of the made batch: enough for contrast and for batch norm


def noise(recipe: Recipe) -> Batch:
    """A batch of noise in the shape of a recipe's views, with labels and companions of two classes."""
    items = Items(torch.arange(SAMPLES), torch.arange(SAMPLES), {"class": torch.arange(SAMPLES) % CLASSES})
    views = {}
    for name, options in recipe.views.items():
        size: tuple[int, ...] = tuple(options.size)  # type: ignore[attr-defined]
        rng = Rng.of(0, torch.arange(SAMPLES * options.count), name)
        view = recipe.modality.example(size, rng)
        companions = {field: rng.integers(field, CLASSES, *view.array.shape[2:]) for field in recipe.reads}
        views[name] = replace(view, name=name, item=torch.arange(SAMPLES).repeat_interleave(options.count),
                              look=torch.arange(options.count).repeat(SAMPLES), fields=view.fields | companions)
    return Batch(items, views)


def inspect(name: str, assignments: Sequence[str] = ()) -> dict[str, Any]:
    """recipe: plain data with every key. hash. parameters: of the student. passes: of one step, in the order they are made."""
    data = override(read(name), assignments)
    if "members" in data:
        return _inspect_joint(joint.build(data))
    recipe: Recipe
    if "task" in data:
        recipe = task = build(data, TaskRecipe)
        assembly = task.assemble(CLASSES)
    else:
        recipe = build(data, Recipe)
        assembly = Assembly(recipe)
    with torch.no_grad():
        assembly(noise(recipe), 0.0)
    step = assembly.last_step
    assert step is not None
    return {"recipe": recipe.dump(), "hash": recipe.hash, "passes": step.passes,
            "parameters": sum(p.numel() for n, p in assembly.named_parameters() if not n.startswith("teacher."))}


def _inspect_joint(recipe: joint.Joint) -> dict[str, Any]:
    assembly = joint.JointAssembly(recipe)
    passes = []
    for name, member in recipe.members.items():
        with torch.no_grad():
            assembly.of(name)(noise(member.recipe), 0.0)
        step = assembly.of(name).last_step
        assert step is not None
        passes += [f"{name}: {made}" for made in step.passes]
    return {"recipe": recipe.dump(), "hash": recipe.hash, "passes": passes,
            "parameters": sum(p.numel() for n, p in assembly.named_parameters() if ".teacher." not in n)}
