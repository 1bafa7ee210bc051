"""Ways to train on labels: protocols of an evaluation that lay something over a task's recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from meristem.platform.encoders.lora import Lora
from meristem.tasks.base import TaskRecipe


def _trained(recipe: TaskRecipe, **changed: Any) -> TaskRecipe:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=changed)})


WAYS: Mapping[str, Callable[[TaskRecipe], TaskRecipe]] = {
    "finetune": lambda recipe: recipe,
    # the schedules that Wald et al. 2025 (OpenMind) compare; a fifth of the run is the recipes' `head_first`
    "frozen": lambda recipe: _trained(recipe, schedule="cosine", freeze={**recipe.train.freeze, "encoder": 1.0}),
    "warmup": lambda recipe: _trained(recipe, schedule="cosine", warmup=recipe.train.head_first),
    "sawtooth": lambda recipe: _trained(recipe, schedule="sawtooth"),
    "lora": lambda recipe: recipe.model_copy(update={"lora": recipe.lora or Lora()})}


def kept(protocol: str, arm: str, labels: object) -> str:
    """The name, but for its suffix, of what is kept of a cell for the report: its way of training, the arm, the budget."""
    return f"{'fine-tuning' if protocol == 'finetune' else protocol} {arm}, {labels} labels"
