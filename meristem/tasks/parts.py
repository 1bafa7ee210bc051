"""Labels of single points: the parts of shapes, and what the points of scenes are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from meristem.errors import RecipeError
from meristem.modalities.base import View
from meristem.modalities.rng import Rng
from meristem.modalities.stream import TokenStream
from meristem.platform.assembly import Assembly
from meristem.platform.data.loader import whole
from meristem.platform.data.manifest import Row
from meristem.platform.data.source import Data
from meristem.platform.evaluation.metrics import part_iou, point_counts
from meristem.platform.evaluation.results import SHAPES, Case
from meristem.platform.objectives import Encoded, Loss
from meristem.platform.recipe import Count, Share
from meristem.platform.step import Step
from meristem.tasks.base import Keep, Scope, TaskObjective, TaskRecipe, TaskSettings
from meristem.tasks.embedding import plain
from meristem.tasks.segmentation import label_values, places

POINTS = 8192  # predicted at once


class PointHead(nn.Module):
    """Logits of every point from an encoder's tokens (Pang et al. 2022, Point-MAE, appendix; Qi et al. 2017, PointNet++).

    Tokens of several layers, normed and concatenated, are interpolated to the points and seen beside the points' own channels;
    their maximum, their mean and the category of the shape are the same for all points of it.
    """

    def __init__(self, assembly: Assembly, settings: PointSettings, classes: int) -> None:
        super().__init__()
        encoder, width = assembly.encoder, settings.width
        self.classes = classes
        self.layers = _spread(encoder.depth, settings.layers) if "layers" in encoder.provides else []
        self.want = frozenset({"layers"} if self.layers else ())
        self.norms = nn.ModuleList(nn.LayerNorm(encoder.width) for _ in self.layers or [0])
        tokens = encoder.width * len(self.norms)
        self.local = nn.Sequential(nn.Linear(tokens + assembly.recipe.modality.channels, width), nn.LayerNorm(width), nn.GELU())
        self.shape = nn.Linear(2 * tokens + settings.categories, width)
        self.out = nn.Sequential(nn.LayerNorm(width), nn.GELU(), nn.Linear(width, width), nn.LayerNorm(width), nn.GELU(),
                                 nn.Dropout(settings.dropout), nn.Linear(width, classes))
        self.mix = nn.Linear(width, width)

    def forward(self, assembly: Assembly, encoded: Encoded, stream: TokenStream, view: View, category: Tensor) -> Tensor:
        """(B, N, classes) of the points of a view. category: (B, categories), a row of zeros where it is not told."""
        several = [encoded.tokens] if encoded.layers is None else [encoded.layers[i] for i in self.layers]
        tokens = torch.cat([norm(x) for norm, x in zip(self.norms, several, strict=True)], -1)
        spread = assembly.tokenizer.spread(tokens, stream, view)
        local = self.local(torch.cat([spread, view.array.transpose(1, 2).to(spread.dtype)], -1))
        known = encoded.valid[..., None]
        most = tokens.masked_fill(~known, float("-inf")).amax(1)
        mean = (tokens * known).sum(1) / known.sum(1).clamp_min(1)
        shape = self.shape(torch.cat([most, mean, category.to(mean.dtype)], -1))
        logits: Tensor = self.out(self.mix(local) + shape[:, None])
        return logits


def _spread(depth: int, count: int) -> list[int]:
    """Blocks evenly over the depth, the last among them: 3, 7, 11 of 12."""
    return sorted({math.ceil(depth * (i + 1) / count) - 1 for i in range(count)})


class PointObjective(TaskObjective):
    """Cross-entropy over labelled points; predicts every stored point of a cloud in looks of the training view's size."""

    def __init__(self, assembly: Assembly, settings: PointSettings, classes: int) -> None:
        super().__init__()
        self.settings = settings
        self.head = PointHead(assembly, settings, classes)

    def _category(self, label: Tensor) -> Tensor:
        """(B, categories) one-hot of class labels (B,); zeros for −1."""
        known = label.clamp_min(0)[:, None] == torch.arange(self.settings.categories, device=label.device)
        return (known & (label >= 0)[:, None]).float()

    def forward(self, step: Step) -> dict[str, Loss]:
        view, stream = step.batch.views["x"], step.stream("x")
        label = step.batch.items.labels.get("class", torch.full_like(step.batch.items.row, -1))[view.item]
        told = step.rng("category", "x").uniform("told", 1)[:, 0] < self.settings.told
        category = self._category(torch.where(told, label, -1))
        logits = self.head(step.assembly, step.encode("x", want=self.head.want), stream, view, category)
        target = view.fields["mask"]
        total = F.cross_entropy(logits.float().flatten(0, 1), target.flatten(), ignore_index=-1, reduction="sum",
                                label_smoothing=self.settings.smoothing)
        return {"": Loss(total, (target >= 0).sum())}

    @torch.no_grad()
    def predict(self, assembly: Assembly, data: Data, row: Row, allowed: Sequence[int] = ()) -> np.ndarray:
        """(N,) the class of every stored point of a row. allowed: values to choose from; none: all."""
        recipe, device = assembly.recipe, next(assembly.parameters()).device
        size, count = recipe.views["x"].size[0], data.cache.header(row.index).shape[1]  # type: ignore[attr-defined]
        options = plain(recipe).model_copy(update={"size": (count,), "count": 1})
        view = recipe.modality.augment(whole(data.cache, [row], recipe.modality, options).to(device), options)
        label = torch.tensor([row.labels.get("class", -1) if self.settings.told else -1], device=device)
        total = torch.zeros(count, self.head.classes, dtype=torch.float64, device=device)
        for index in _looks(count, size).split(max(POINTS // size, 1)):
            look = _shown(view, index.to(device))
            stream = assembly.tokenizer.stream(look)
            encoded = assembly.encoder(stream.seen(recipe.encoder.sees), want=self.head.want)
            logits = self.head(assembly, encoded, stream, look, self._category(label.expand(len(index))))
            total.index_add_(0, index.flatten().to(device), logits.double().softmax(-1).flatten(0, 1))
        assert view.index is not None
        if allowed:
            total = total.masked_fill(~torch.isin(torch.arange(total.shape[1], device=device),
                                                  torch.tensor(allowed, device=device)), -1)
        found = np.zeros(count, np.int32)
        found[view.index[0].cpu().numpy()] = total.argmax(1).cpu().numpy()
        return found

    def test(self, assembly: Assembly, data: Data, rows: Sequence[Row], scope: Scope, keep: Keep | None = None) -> list[Case]:
        assembly.eval()
        parts = self.settings.allowed(data)
        cases = []
        for row in (row for row in rows if any(value >= 0 for value in data.cache.counts(row.index))):
            allowed = parts.get(row.labels.get("class", -1), ())
            found, truth = self.predict(assembly, data, row, allowed), data.cache.field(row.index, "mask").astype(int)
            cases.append(Case(case=row.case, subject=row.subject, category=self.settings.category(data, row),
                              metrics=self.settings.scores(found, truth, scope, allowed)))
            if keep is not None:
                keep(row, found)
        return cases

    def write(self, assembly: Assembly, data: Data, rows: Sequence[Row], scope: Scope, out: Path) -> list[Path]:
        """A label for each point of the source file, in a file of its name (`segmentation.places`)."""
        assembly.eval()
        parts = self.settings.allowed(data)
        written = []
        for row, place in zip(rows, places(rows, data), strict=True):
            path = out / place
            path.parent.mkdir(parents=True, exist_ok=True)
            found = self.predict(assembly, data, row, parts.get(row.labels.get("class", -1), ()))
            written.append(data.modality.write(found, data.cache.header(row.index), path))
        return written


def _looks(count: int, size: int) -> Tensor:
    """(L, size) places among `count` that together hold all: parts of one fixed random order, spread as training views are."""
    order = Rng.of(0, 0, "looks").permutation("points", count)[0]
    starts = np.linspace(0, max(count - size, 0), math.ceil(count / size)).round().astype(int)
    return torch.stack([order[a:a + size] for a in starts])


def _shown(view: View, index: Tensor) -> View:
    """The elements `index` (L, n) of the only row of a view, as L rows."""
    rows = view.select(torch.zeros(len(index), dtype=torch.int64, device=index.device))

    def pick(x: Tensor) -> Tensor:
        return x.gather(-1, index.reshape(len(index), *[1] * (x.ndim - 2), -1).expand(*x.shape[:-1], -1))

    return replace(rows, array=pick(rows.array), frame=replace(rows.frame, shape=(index.shape[1],)),
                   fields={k: pick(v) for k, v in rows.fields.items()},
                   weight=None if rows.weight is None else pick(rows.weight),
                   index=None if rows.index is None else pick(rows.index))


class PointSettings(TaskSettings):
    """What both tasks on points have in common.

    layers: of the encoder's blocks that the head sees, evenly over its depth; an encoder that does not tell them shows its
    tokens. width: of the head. categories: most classes of shapes that the head can be told, 0 for none. told: share of the
    training shapes whose class it is told, where labels have one; unless that is 0, at a test it is told whenever it is known.
    smoothing: of labels.
    """

    fields: ClassVar[tuple[str, ...]] = ("mask",)
    layers: Count = 3
    width: Count = 256
    categories: Annotated[int, Field(ge=0)] = 0
    told: Share = 0.0
    dropout: Share = 0.5
    smoothing: Share = 0.0

    def check(self, recipe: TaskRecipe) -> list[str]:
        if not hasattr(recipe.modality.tokenizer(), "spread"):
            return [f"{self.kind}: a modality of points is needed, {recipe.modality.name} has no tokens that lie among points"]
        return []

    def labelled(self, rows: Sequence[Row]) -> list[Row]:
        return [row for row in rows if "mask" in row.fields]

    def allowed(self, data: Data) -> Mapping[int, tuple[int, ...]]:
        """Class -> the values that its points can have, where classes differ in that."""
        return {}

    def category(self, data: Data, row: Row) -> str:
        """Name of the class of a row over which scores are averaged first; '' for none."""
        return ""

    def scores(self, found: np.ndarray, truth: np.ndarray, scope: Scope, allowed: Sequence[int]) -> dict[str, dict[str, float]]:
        """Of one cloud: `Case.metrics` of the found and the true class of each point (N,)."""
        raise NotImplementedError

    def build(self, assembly: Assembly, classes: int) -> PointObjective:
        return PointObjective(assembly, self, classes)


class PartSegmentation(PointSettings):
    """Which part of a shape each point belongs to, the class of the shape given (Yi et al. 2016, ShapeNetPart).

    The parts of a class are the labels that occur in any of its shapes; a shape's IoU is the mean over them, a part that is
    neither predicted nor there counting 1. Instance mIoU is the mean over shapes, class mIoU over classes of their means.
    """

    kind = "parts"
    metric: ClassVar[str] = "instance_miou"
    categories: Annotated[int, Field(ge=0)] = 32
    told: Share = 0.9

    def scope(self, data: Data) -> Scope:
        known = len(data.manifest.class_names)
        if 0 < self.categories < known:
            raise RecipeError(f"the data has {known} classes of shapes, the head can be told {self.categories}",
                              f"Set task.parts.categories={known}.")
        return Scope(label_values(data, self.labelled(data.rows())), (SHAPES,), data.modality.axes[0].unit)

    def allowed(self, data: Data) -> Mapping[int, tuple[int, ...]]:
        found: dict[int, set[int]] = {}
        for row in self.labelled(data.rows()):
            found.setdefault(row.labels.get("class", -1), set()).update(v for v in data.cache.counts(row.index) if v >= 0)
        return {label: tuple(sorted(values)) for label, values in found.items()}

    def category(self, data: Data, row: Row) -> str:
        return data.manifest.class_names[row.labels["class"]] if "class" in row.labels else "unnamed"

    def scores(self, found: np.ndarray, truth: np.ndarray, scope: Scope, allowed: Sequence[int]) -> dict[str, dict[str, float]]:
        iou, right = part_iou(found, truth, allowed), float((found == truth)[truth >= 0].mean())
        return {"instance_miou": {SHAPES: iou}, "class_miou": {SHAPES: iou}, "point_accuracy": {SHAPES: right}}


class SemanticSegmentation(PointSettings):
    """What each point of a scene is: mIoU over classes of the sums over all scenes, and accuracies (S3DIS, SemanticKITTI)."""

    kind = "semantic"
    metric: ClassVar[str] = "miou"

    def scope(self, data: Data) -> Scope:
        values = label_values(data, self.labelled(data.rows()))
        return Scope(values, tuple(values.values()), data.modality.axes[0].unit)

    def scores(self, found: np.ndarray, truth: np.ndarray, scope: Scope, allowed: Sequence[int]) -> dict[str, dict[str, float]]:
        return point_counts(found, truth, scope.values)
