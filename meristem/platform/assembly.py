"""A recipe made into one root module: what data-parallel wrappers wrap and what a checkpoint holds."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from meristem.errors import RecipeError
from meristem.platform.heads import Head
from meristem.platform.objectives import Loss, Objective
from meristem.platform.recipe import Recipe
from meristem.platform.schedules import value
from meristem.platform.step import Batch, Step


class Teacher(nn.Module):
    """Copies of recipe modules that follow them by an exponential moving average and never get a gradient.

    Parameters: t <- m·t + (1 − m)·s. Buffers are copied.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.copies = nn.ModuleDict({name: copy.deepcopy(module) for name, module in modules.items()})
        self.requires_grad_(False)

    @torch.no_grad()
    def follow(self, modules: Mapping[str, nn.Module], momentum: float) -> None:
        for name, mine in self.copies.items():
            ours: list[Tensor] = list(mine.parameters())
            theirs: list[Tensor] = list(modules[name].parameters())
            if ours:
                torch._foreach_lerp_(ours, theirs, 1 - momentum)
            for a, b in zip(mine.buffers(), modules[name].buffers(), strict=True):
                a.copy_(b)


class Assembly(nn.Module):
    """Encoder, heads, objectives and teacher of a recipe, under one root.

    forward(batch, progress) -> named losses. extra: objectives that are not in the recipe's own table (a task with labels).
    frozen: the encoder stays as it is, statistics included (a probe). only_cls: of an encoded view nothing is read but its
    class token.
    """

    def __init__(self, recipe: Recipe, extra: Mapping[str, Callable[[Assembly], Objective]] = {}, frozen: bool = False) -> None:
        super().__init__()
        self.frozen = frozen
        self.recipe = recipe
        self.tokenizer = recipe.modality.tokenizer()
        self.encoder = recipe.encoder.build(self.tokenizer, recipe.modality.axes, recipe.modality.channels)
        self.encoder.requires_grad_(not frozen)
        self.heads = nn.ModuleDict()
        for name, head in recipe.heads.items():
            self.heads[name] = head.build(self.head_width(head.input))
        self.foreign = {name: settings.build(name) for name, settings in recipe.foreign.items()}  # no modules of the run
        self.objectives = nn.ModuleDict()
        for name, settings in recipe.objectives.items():
            self.objectives[name] = settings.build(self)
        for name, make in extra.items():
            self.objectives[name] = make(self)
        readers = self.objectives.values()
        self.only_cls = "cls" in self.encoder.provides and len(readers) > 0 and all(o.only_cls for o in readers)
        self.teacher: Teacher | None = None
        if recipe.teacher is not None:
            self.teacher = Teacher({name: self.module("encoder", name) for name in recipe.teacher.of})
        self.look_offset, total = {}, 0
        for name, view in recipe.looks.items():
            self.look_offset[name] = total
            total += view.count
        self.last_step: Step | None = None

    def head_width(self, name: str | None) -> int:
        """Width of the vectors that come out of a head; None: of the encoder."""
        if name is None:
            return self.encoder.width
        head = self.heads[name]
        assert isinstance(head, Head)
        return head.width

    def module(self, by: str, name: str) -> nn.Module:
        """The module `name` (encoder or a head) of the student (`by` = encoder) or of the teacher."""
        if by != "encoder":
            if self.teacher is None:
                raise RecipeError(f"an objective encodes by '{by}' but the recipe has no teacher", "Add a `teacher:` entry.")
            if name not in self.teacher.copies:
                has = ", ".join(self.teacher.copies)
                raise RecipeError(f"the teacher has no copy of '{name}'", f"Add it to teacher.of (now: {has}).")
            return self.teacher.copies[name]
        return self.encoder if name == "encoder" else self.heads[name]

    def prepare(self, batch: Batch) -> Batch:
        """Augment every view of a batch, on its device."""
        views = {name: self.recipe.modality.augment(view, self.recipe.views[name]) for name, view in batch.views.items()}
        return Batch(batch.items, views, batch.member)

    def train(self, mode: bool = True) -> Assembly:
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self

    def forward(self, batch: Batch, progress: float) -> dict[str, Loss]:
        step = Step(self, batch, progress, self.recipe.train.seed)
        losses: dict[str, Loss] = {}
        for name, objective in self.objectives.items():
            for line, loss in objective(step).items():
                losses[name if line == "" else f"{name}.{line}"] = loss
        self.last_step = step
        return losses

    @torch.no_grad()
    def after(self, progress: float) -> None:
        """Once per optimiser step: the objectives' buffers, then the teacher."""
        assert self.last_step is not None
        for objective in self.objectives.values():
            assert isinstance(objective, Objective)
            objective.after(self.last_step)
        self.last_step = None
        if self.teacher is not None and self.recipe.teacher is not None:
            students = {name: self.module("encoder", name) for name in self.recipe.teacher.of}
            self.teacher.follow(students, value(self.recipe.teacher.momentum, progress))


def total(losses: Mapping[str, Loss]) -> Tensor:
    """The weighted sum of (total / count) on this rank; the loop reduces counts over ranks first."""
    return torch.stack([loss.weight * loss.total / loss.count for loss in losses.values()]).sum()
