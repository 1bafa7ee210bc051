"""What a downstream task is: an objective with labels, a test on held-out rows, and predictions in files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import model_validator
from torch import Tensor

from meristem.errors import DataError
from meristem.modalities.base import Header, Settings
from meristem.platform.assembly import Assembly
from meristem.platform.data.manifest import Row
from meristem.platform.data.source import Data
from meristem.platform.encoders.lora import Lora
from meristem.platform.evaluation.results import Case
from meristem.platform.objectives import Objective
from meristem.platform.recipe import Recipe
from meristem.platform.slots import Slot

Keep = Callable[[Row, np.ndarray], None]
"""Called with a row and its predicted label map, or points, for whoever draws pictures."""


@dataclass(frozen=True)
class Scope:
    """What the data says of a task. values: label value -> class name, of all classes in the order of the logits.

    scored: names of the classes that are scored. unit: of distances.
    """

    values: Mapping[int, str]
    scored: tuple[str, ...]
    unit: str

    @property
    def classes(self) -> int:
        return max(self.values) + 1


class TaskObjective(Objective):
    """The supervised objective of an assembly."""

    def learn_from(self, data: Data, rows: Sequence[Row]) -> list[Row]:
        """The samples to train on for these labelled cases; what they are labelled with is kept."""
        return list(rows)

    def test(self, assembly: Assembly, data: Data, rows: Sequence[Row], scope: Scope, keep: Keep | None = None) -> list[Case]:
        """Predict labelled rows and score them, case by case."""
        raise NotImplementedError

    def write(self, assembly: Assembly, data: Data, rows: Sequence[Row], scope: Scope, out: Path) -> list[Path]:
        """Predict rows into files."""
        raise NotImplementedError


class TaskSettings(Settings):
    """The typed entry of a task in a recipe. fields: companions of a sample it trains on.

    protocols: how encoders are compared by it, the usual one first; one that has no `finetune` trains on no labels. counted:
    what is drawn, tested and resampled: subjects with all their samples, or parts of samples. scoring: of detections, as
    `Results.scoring`.
    """

    kind: ClassVar[Literal["segmentation", "classification", "propagation", "parts", "semantic", "detection"]]
    metric: ClassVar[str]
    protocols: ClassVar[tuple[str, ...]] = ("finetune",)
    fields: ClassVar[tuple[str, ...]] = ()
    counted: ClassVar[Literal["subjects", "nodes", "pairs"]] = "subjects"
    scoring: ClassVar[str] = ""

    @property
    def parts(self) -> bool:
        """Whether its cases are parts of samples."""
        return self.counted != "subjects"

    @property
    def learns(self) -> bool:
        return "finetune" in self.protocols

    def scope(self, data: Data) -> Scope:
        """The classes of this data. Raises DataError when it has no labels for the task."""
        raise NotImplementedError

    def check(self, recipe: TaskRecipe) -> list[str]:
        """What is impossible about this task in this recipe; empty when all is well."""
        return []

    def labelled(self, rows: Sequence[Row]) -> list[Row]:
        """The rows that have this task's labels."""
        raise NotImplementedError

    def cases(self, data: Data, split: str | Sequence[str]) -> list[Row]:
        """What is labelled of a split, or of several: samples, or parts of them."""
        return self.labelled(data.rows(split))

    def spoiled(self, recipe: TaskRecipe, pretraining: Mapping[str, Any]) -> str:
        """Why weights of this pretraining recipe know what is tested, where they met the test samples; '' where they do not."""
        return ""

    def build(self, assembly: Assembly, classes: int) -> TaskObjective:
        raise NotImplementedError


class ObjectSettings(TaskSettings):
    """Of a task that finds annotated objects. lacking: what is said, and advised, of data without any."""

    kind = "detection"
    lacking: ClassVar[tuple[str, str]]

    def labelled(self, rows: Sequence[Row]) -> list[Row]:
        return [row for row in rows if row.objects is not None]

    def scope(self, data: Data) -> Scope:
        names = data.manifest.object_names
        if not names or not any(row.objects is not None and len(row.objects) for row in data.rows()):
            raise DataError("label", *self.lacking)
        return Scope(dict(enumerate(names)), names, data.modality.axes[0].unit)


TASKS: dict[str, type[TaskSettings]] = {}


class TaskRecipe(Recipe):
    """A recipe with a task. probe: the encoder stays as it is and only the head learns. lora: it learns by low-rank parts."""

    task: Annotated[TaskSettings, Slot("task", TASKS)]
    probe: bool = False
    lora: Lora | None = None

    @model_validator(mode="after")
    def _trains_on_x(self) -> Any:
        if "x" not in self.views:
            raise ValueError("a task recipe trains on a view called 'x'; add it under views")
        patch, size = getattr(self.modality.options, "patch", ()), getattr(self.views["x"], "size", ())
        if any(n % p for n, p in zip(size, patch, strict=False)):
            raise ValueError(f"views.x.size {list(size)} is not a multiple of the patch {list(patch)}")
        if self.probe and self.lora is not None:
            raise ValueError("probe: true leaves the encoder as it is, and lora adapts it; leave one out")
        if problems := self.task.check(self):
            raise ValueError("; ".join(problems))
        return self

    def assemble(self, classes: int) -> Assembly:
        """The root module, task included."""
        return Assembly(self, {"task": lambda assembly: self.task.build(assembly, classes)}, frozen=self.probe)


def objective(assembly: Assembly) -> TaskObjective:
    """The task of an assembly."""
    task = assembly.objectives["task"]
    assert isinstance(task, TaskObjective)
    return task


def normalised(stored: np.ndarray, header: Header, device: torch.device) -> Tensor:
    """A stored integer array (C, *S) as an encoder sees it."""
    each = (-1, *(1,) * (stored.ndim - 1))
    scale, offset = (torch.tensor(x, dtype=torch.float32, device=device).reshape(each) for x in (header.scale, header.offset))
    return torch.from_numpy(np.ascontiguousarray(stored)).to(device).float() * scale + offset
