"""Propagation of masks through sequences by frozen features: nothing is trained, the first frame's mask is the label."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from meristem.errors import DataError, RecipeError
from meristem.modalities.base import Draw, View
from meristem.modalities.frame import Frame
from meristem.platform.assembly import Assembly
from meristem.platform.data.manifest import Row
from meristem.platform.data.source import Data
from meristem.platform.evaluation.metrics import tracking
from meristem.platform.evaluation.propagation import decide, label_maps, propagate
from meristem.platform.evaluation.results import Case
from meristem.platform.objectives import Encoded, Loss
from meristem.platform.recipe import Count
from meristem.platform.step import Step
from meristem.tasks.base import Keep, Scope, TaskObjective, TaskRecipe, TaskSettings, normalised

FRAMES = 8  # read and encoded at once
OBJECTS = "objects"


class PropagationObjective(TaskObjective):
    """Carries the objects of a sequence's first mask through it; has no parameters and no loss."""

    def __init__(self, settings: Propagation) -> None:
        super().__init__()
        self.settings = settings

    def forward(self, step: Step) -> dict[str, Loss]:
        return {}

    @torch.no_grad()
    def features(self, assembly: Assembly, data: Data, row: Row, places: range) -> Iterator[Tensor]:
        """Maps (D, h, w) of single frames, each shown alone, for as long as a token lasts, and at its own aspect ratio.

        The frame is resized so that its short side is `size` and then down to whole tokens.
        """
        recipe, header, device = assembly.recipe, data.cache.header(row.index), next(assembly.parameters()).device
        frames, *patch = recipe.modality.options.patch
        whole = header.shape[2:]
        factor = self.settings.size / min(whole)
        size = tuple(max(round(n * factor) // p, 1) * p for n, p in zip(whole, patch, strict=True))
        look = Draw((0,) * 3, (1, *whole), (frames, *size))
        spacing = torch.tensor(header.spacing, device=device)[None]
        fast = torch.autocast(device.type, torch.bfloat16, enabled=recipe.train.precision == "bf16")
        for first in range(places.start, places.stop, FRAMES):
            draws = [replace(look, index=(t,) * frames) for t in range(first, min(first + FRAMES, places.stop))]
            shown = torch.stack([normalised(recipe.modality.load(window, draw, interpolate=True).numpy(), header, device)
                                 for window, draw in zip(data.cache.windows(row.index, draws), draws, strict=True)])
            n = len(shown)
            frame = Frame(torch.eye(4, device=device).expand(n, -1, -1), look.shape, spacing.expand(n, -1),
                          tuple(axis.unit for axis in recipe.modality.axes))
            rows = torch.arange(n, device=device)
            stream = assembly.tokenizer.stream(View("x", shown, frame, rows, torch.zeros_like(rows)))
            with fast:
                encoded = assembly.encoder(stream.seen(recipe.encoder.sees), want=self.settings.want(recipe.encoder.provides))
            yield from _maps(encoded, self.settings.layer)

    @torch.no_grad()
    def labels(self, assembly: Assembly, data: Data, row: Row) -> np.ndarray:
        """(T, H, W) propagated object ids on the stored lattice, −1 before the first frame that shows an object."""
        settings, truth = self.settings, data.cache.field(row.index, "mask")
        start = _first(truth)
        device, size = next(assembly.parameters()).device, truth.shape[1:]
        values = [0, *_objects(truth[start])]
        maps = self.features(assembly, data, row, range(start, len(truth)))
        one = next(maps)
        first = label_maps(torch.from_numpy(truth[start].astype(np.int64)).to(device), values, (one.shape[1], one.shape[2]))
        soft = propagate(chain([one], maps), first, context=settings.context, radius=settings.radius, top_k=settings.top_k,
                         temperature=settings.temperature)
        found = np.full(truth.shape, -1, np.int32)
        found[start] = truth[start]
        for t, labels in enumerate(soft[1:], start + 1):
            found[t] = np.array(values)[decide(labels, size, settings.normalise).cpu().numpy()]
        return found

    def test(self, assembly: Assembly, data: Data, rows: Sequence[Row], scope: Scope, keep: Keep | None = None) -> list[Case]:
        """J and F of each sequence, means over the objects of its first mask; see `metrics.tracking`."""
        assembly.eval()
        cases = []
        for row in rows:
            truth = data.cache.field(row.index, "mask").astype(np.int32)
            start, found = _first(truth), self.labels(assembly, data, row)
            scores = tracking(found[start:], truth[start:], _objects(truth[start]))
            cases.append(Case(case=row.case, subject=row.subject, metrics={name: {OBJECTS: v} for name, v in scores.items()}))
            if keep is not None:
                keep(row, found)
        return cases

    def write(self, assembly: Assembly, data: Data, rows: Sequence[Row], scope: Scope, out: Path) -> list[Path]:
        """See `write_masks`."""
        assembly.eval()
        return [write_masks(data, row, self.labels(assembly, data, row), out) for row in rows]


def write_masks(data: Data, row: Row, labels: np.ndarray, out: Path) -> Path:
    """Propagated labels (T, H, W) as the modality writes label maps, under the sequence's pseudonym."""
    return data.modality.write(np.maximum(labels, 0), data.cache.header(row.index), out / row.case)


def _maps(encoded: Encoded, layer: int) -> Tensor:
    """(B, D, h, w) of one layer, averaged along the first axis of its lattice."""
    if layer < 0:
        tokens, lattice = encoded.tokens, encoded.lattice
    elif encoded.layers is not None:
        tokens, lattice = encoded.layers[layer], encoded.lattice
    else:
        assert encoded.pyramid is not None
        return encoded.pyramid[layer].mean(2)
    assert lattice is not None
    return tokens.transpose(1, 2).unflatten(2, lattice).mean(2)


def _first(truth: np.ndarray) -> int:
    """The first frame that shows an object."""
    return int((truth > 0).any((1, 2)).argmax())


def _objects(mask: np.ndarray) -> list[int]:
    return [int(v) for v in np.unique(mask) if v > 0]


class Propagation(TaskSettings):
    """Label propagation with frozen features (Jabri et al. 2020; Caron et al. 2021): see `platform.evaluation.propagation`.

    size: short side of the frames as encoded, in pixels. layer: block (or level of the pyramid) whose tokens are compared; −1:
    the encoder's output. context: frames before each, beside the first. radius: of the neighbourhood, in tokens; null:
    everywhere. top_k, temperature: of the affinity. normalise: spread each object's soft labels over [0, 1] before deciding.
    """

    kind = "propagation"
    metric = "J&F"
    protocols = ("propagate",)
    fields: ClassVar[tuple[str, ...]] = ("mask",)
    size: Count
    layer: Annotated[int, Field(ge=-1)] = -1
    context: Annotated[int, Field(ge=0)]
    radius: Annotated[int, Field(ge=0)] | None
    top_k: Count
    temperature: Annotated[float, Field(gt=0)]
    normalise: bool = True

    def want(self, provides: frozenset[str]) -> frozenset[str]:
        """What the encoder is asked for."""
        return frozenset({"layers" if "layers" in provides else "pyramid"} if self.layer >= 0 else ())

    def check(self, recipe: TaskRecipe) -> list[str]:
        if recipe.modality.axes[0].unit != "s":
            return [f"propagation follows objects through time; the modality '{recipe.modality.name}' has no axis in seconds"]
        if self.layer >= 0 and not recipe.encoder.provides & {"layers", "pyramid"}:
            return ["layer: this encoder gives its output only; set layer: -1"]
        return []

    def labelled(self, rows: Sequence[Row]) -> list[Row]:
        return [row for row in rows if "mask" in row.fields]

    def scope(self, data: Data) -> Scope:
        rows = [row for row in self.labelled(data.rows()) if "mask" in data.cache.fields(row.index)]
        if not rows:
            raise DataError("label", "no sequence has masks",
                            "Put a folder of masks for each in `Annotations` beside `JPEGImages`, or `masks` beside `images`.")
        empty = [row.case for row in rows if not any(value > 0 for value in data.cache.counts(row.index))]
        if empty:
            raise DataError("label", f"{len(empty)} sequences show no object in any mask, the first is {empty[0]}",
                            "Leave them out.")
        return Scope({0: "background", 1: OBJECTS}, (OBJECTS,), data.modality.axes[1].unit)

    def build(self, assembly: Assembly, classes: int) -> PropagationObjective:
        known = assembly.encoder.depth if "layers" in assembly.encoder.provides else len(assembly.encoder.pyramid_widths)
        if self.layer >= known:
            raise RecipeError(f"layer {self.layer} does not exist, the encoder has {known}",
                              f"Set task.propagation.layer to at most {known - 1}, or -1 for its output.")
        return PropagationObjective(self)
