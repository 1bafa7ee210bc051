"""What a recipe comes to: every key, its size, and the passes of one step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from meristem.platform import joint
from meristem.platform.assembly import Assembly
from meristem.platform.made import CLASSES, noise
from meristem.platform.recipe import Recipe, build, override, read
from meristem.tasks.base import TaskRecipe


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
