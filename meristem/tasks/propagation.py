"""Masks and points carried through sequences by frozen features: nothing is trained, the first frame's are the labels."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Annotated, ClassVar, Self

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
from meristem.platform.evaluation.metrics import ALPHAS, pck, tracking
from meristem.platform.evaluation.propagation import decide, keypoint_maps, keypoints, label_maps, propagate
from meristem.platform.evaluation.results import Case
from meristem.platform.objectives import Encoded, Loss
from meristem.platform.recipe import Count
from meristem.platform.step import Step
from meristem.tasks.base import Keep, Scope, TaskObjective, TaskRecipe, TaskSettings, normalised

FRAMES = 8  # read and encoded at once


class Carrier(TaskObjective):
    """Carries what a sequence's first label says through it; has no parameters and no loss."""

    def __init__(self, settings: Carrying) -> None:
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
    def soft(self, assembly: Assembly, data: Data, row: Row, places: range, first: Callable[[tuple[int, int]], Tensor]
             ) -> Tensor:
        """(T, C, h, w) soft labels of the frames at `places`. first: those (C, h, w) of the first on a token grid."""
        settings, maps = self.settings, self.features(assembly, data, row, places)
        one = next(maps)
        return propagate(chain([one], maps), first((one.shape[1], one.shape[2])).to(one.device), context=settings.context,
                         radius=settings.radius, top_k=settings.top_k, temperature=settings.temperature)

    def carried(self, assembly: Assembly, data: Data, row: Row) -> np.ndarray:
        """What the first label becomes in every frame."""
        raise NotImplementedError

    def scores(self, data: Data, row: Row, found: np.ndarray) -> dict[str, float]:
        raise NotImplementedError

    def test(self, assembly: Assembly, data: Data, rows: Sequence[Row], scope: Scope, keep: Keep | None = None) -> list[Case]:
        """The scores of each sequence."""
        assembly.eval()
        cases, (scored,) = [], scope.scored
        for row in rows:
            found = self.carried(assembly, data, row)
            scores = {name: {scored: value} for name, value in self.scores(data, row, found).items()}
            cases.append(Case(case=row.case, subject=row.subject, metrics=scores))
            if keep is not None:
                keep(row, found)
        return cases

    def write(self, assembly: Assembly, data: Data, rows: Sequence[Row], scope: Scope, out: Path) -> list[Path]:
        """See `Carrying.save`."""
        assembly.eval()
        return [self.settings.save(data, row, self.carried(assembly, data, row), out) for row in rows]


class PropagationObjective(Carrier):
    """Carries the objects of a sequence's first mask."""

    settings: Propagation

    def carried(self, assembly: Assembly, data: Data, row: Row) -> np.ndarray:
        """(T, H, W) propagated object ids on the stored lattice, −1 before the first frame that shows an object."""
        truth = data.cache.field(row.index, "mask")
        start, size = _first(truth), truth.shape[1:]
        values = [0, *_objects(truth[start])]
        first = torch.from_numpy(truth[start].astype(np.int64))
        soft = self.soft(assembly, data, row, range(start, len(truth)), lambda grid: label_maps(first, values, grid))
        found = np.full(truth.shape, -1, np.int32)
        found[start] = truth[start]
        for t, labels in enumerate(soft[1:], start + 1):
            found[t] = np.array(values)[decide(labels, size, self.settings.normalise).cpu().numpy()]
        return found

    def scores(self, data: Data, row: Row, found: np.ndarray) -> dict[str, float]:
        """J and F, means over the objects of the first mask; see `metrics.tracking`."""
        truth = data.cache.field(row.index, "mask").astype(np.int32)
        start = _first(truth)
        return tracking(found[start:], truth[start:], _objects(truth[start]))


class KeypointObjective(Carrier):
    """Carries the points of the first frame that shows any."""

    settings: Keypoints

    def carried(self, assembly: Assembly, data: Data, row: Row) -> np.ndarray:
        """(T, K, 2) row and column of each point on the stored lattice; NaN before the first frame that shows any, and
        throughout for a point that it does not show.
        """
        field = data.cache.field(row.index, "mask")
        truth, start, size = points_of(field), _first(field), field.shape[1:]
        first = torch.from_numpy(truth[start]).float()
        soft = self.soft(assembly, data, row, range(start, len(truth)),
                         lambda grid: keypoint_maps(_moved(first, size, grid), grid, self.settings.sigma))
        found = np.full(truth.shape, np.nan)
        found[start:] = _moved(keypoints(soft.cpu(), self.settings.strongest), soft.shape[2:], size).numpy()
        found[start] = truth[start]
        return found

    def scores(self, data: Data, row: Row, found: np.ndarray) -> dict[str, float]:
        """PCK over the points of the first frame that shows any; see `metrics.pck`. Raises DataError when none comes back."""
        field = data.cache.field(row.index, "mask")
        start = _first(field)
        truth = points_of(field)[start:]
        truth[:, np.isnan(truth[0]).any(-1)] = np.nan
        if np.isnan(truth[1:]).all():
            raise DataError("label", f"{row.case} shows points in one frame only", "Leave it out.")
        return {f"PCK@{alpha}": pck(found[start:], truth, alpha) for alpha in ALPHAS}


def points_of(labels: np.ndarray) -> np.ndarray:
    """(T, K, 2) row and column of the elements that hold 1 to K in label maps (T, H, W); NaN where a frame has none.

    Raises DataError (label) where one has several.
    """
    t, y, x = np.nonzero(labels > 0)
    k = labels[t, y, x].astype(int) - 1
    points = np.full((len(labels), k.max(initial=-1) + 1, 2), np.nan)
    points[t, k] = np.stack([y, x], -1)
    if int(np.isfinite(points[..., 0]).sum()) < len(t):
        raise DataError("label", "a mask marks several elements with one value, so it is of regions, not of points",
                        "Use the task propagation.")
    return points


def dots(points: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Label maps (T, H, W) of points (T, K, 2), k + 1 on a square that a picture can show; −1 where a frame has none."""
    there = np.isfinite(points).all(-1)
    labels = np.where(there.any(1), 0, -1).astype(np.int16)[:, None, None].repeat(shape[1], 1).repeat(shape[2], 2)
    reach = max(shape[1:]) // 80
    for t, k in np.argwhere(there):
        y, x = np.rint(points[t, k]).astype(int)
        labels[t, max(y - reach, 0):y + reach + 1, max(x - reach, 0):x + reach + 1] = k + 1
    return labels


def _moved(points: Tensor, source: Sequence[int], size: Sequence[int]) -> Tensor:
    """Points (…, 2), places on one lattice, on another of the same field of view."""
    return (points + 0.5) * (torch.tensor(size) / torch.tensor(source)) - 0.5


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


class Carrying(TaskSettings):
    """Label propagation with frozen features (Jabri et al. 2020; Caron et al. 2021): see `platform.evaluation.propagation`.

    size: short side of the frames as encoded, in pixels. layer: block (or level of the pyramid) whose tokens are compared; −1:
    the encoder's output. context: frames before each, beside the first. radius: of the neighbourhood, in tokens; null:
    everywhere. top_k, temperature: of the affinity.
    """

    kind = "propagation"
    protocols = ("propagate",)
    fields: ClassVar[tuple[str, ...]] = ("mask",)
    carries: ClassVar[str]
    missing: ClassVar[tuple[str, str]]
    size: Count
    layer: Annotated[int, Field(ge=-1)] = -1
    context: Annotated[int, Field(ge=0)]
    radius: Annotated[int, Field(ge=0)] | None
    top_k: Count
    temperature: Annotated[float, Field(gt=0)]

    def want(self, provides: frozenset[str]) -> frozenset[str]:
        """What the encoder is asked for."""
        return frozenset({"layers" if "layers" in provides else "pyramid"} if self.layer >= 0 else ())

    def check(self, recipe: TaskRecipe) -> list[str]:
        if recipe.modality.axes[0].unit != "s":
            return [f"propagation follows {self.carries} through time; the modality '{recipe.modality.name}' has no axis in "
                    "seconds"]
        if self.layer >= 0 and not recipe.encoder.provides & {"layers", "pyramid"}:
            return ["layer: this encoder gives its output only; set layer: -1"]
        return []

    def labelled(self, rows: Sequence[Row]) -> list[Row]:
        return [row for row in rows if "mask" in row.fields]

    def scope(self, data: Data) -> Scope:
        rows = [row for row in self.labelled(data.rows()) if "mask" in data.cache.fields(row.index)]
        if not rows:
            raise DataError("label", *self.missing)
        self.suits(data, rows)
        return Scope({0: "background", 1: self.carries}, (self.carries,), data.modality.axes[1].unit)

    def suits(self, data: Data, rows: Sequence[Row]) -> None:
        """Raises DataError where a sequence has nothing to carry."""
        raise NotImplementedError

    def save(self, data: Data, row: Row, found: np.ndarray, out: Path) -> Path:
        """Write what was carried through a sequence, under its pseudonym."""
        raise NotImplementedError

    def fits(self, assembly: Assembly) -> Self:
        """Itself. Raises RecipeError where the encoder has no such layer."""
        known = assembly.encoder.depth if "layers" in assembly.encoder.provides else len(assembly.encoder.pyramid_widths)
        if self.layer >= known:
            raise RecipeError(f"layer {self.layer} does not exist, the encoder has {known}",
                              f"Set the task's layer to at most {known - 1}, or -1 for its output.")
        return self


class Propagation(Carrying):
    """Masks. normalise: spread each object's soft labels over [0, 1] before deciding. The rest as in `Carrying`."""

    metric = "J&F"
    carries = "objects"
    missing = ("no sequence has masks",
               "Put a folder of masks for each in `Annotations` beside `JPEGImages`, or `masks` beside `images`.")
    normalise: bool = True

    def suits(self, data: Data, rows: Sequence[Row]) -> None:
        empty = [row.case for row in rows if not any(value > 0 for value in data.cache.counts(row.index))]
        if empty:
            raise DataError("label", f"{len(empty)} sequences show no object in any mask, the first is {empty[0]}",
                            "Leave them out.")

    def save(self, data: Data, row: Row, found: np.ndarray, out: Path) -> Path:
        """Label maps (T, H, W), as the modality writes them."""
        return data.modality.write(np.maximum(found, 0), data.cache.header(row.index), out / row.case)

    def build(self, assembly: Assembly, classes: int) -> PropagationObjective:
        return PropagationObjective(self.fits(assembly))


class Keypoints(Carrying):
    """Points, as masks that mark point k with one element of k + 1. The rest as in `Carrying`.

    sigma: of the bell, in tokens, that a point of the first frame is spread over. strongest: tokens whose mean, weighted by
    their soft labels, is where a point is found.
    """

    metric = "PCK@0.1"
    carries = "points"
    missing = ("no sequence has points", "List sequences in a CSV whose column `mask` names a file of points for each.")
    sigma: Annotated[float, Field(gt=0)]
    strongest: Count

    def suits(self, data: Data, rows: Sequence[Row]) -> None:
        """PCK is measured by the extent of several points."""
        for row in rows:
            counts = [n for value, n in data.cache.counts(row.index).items() if value > 0]
            if len(counts) < 2:
                raise DataError("label", f"{row.case} has {len(counts)} points; PCK is measured by the extent of two or more",
                                "Leave it out.")
            if max(counts) > data.cache.header(row.index).shape[1]:
                raise DataError("label", f"the mask of {row.case} is of regions, not of points", "Use the task propagation.")

    def save(self, data: Data, row: Row, found: np.ndarray, out: Path) -> Path:
        """A CSV of frame, point, x, y of points (T, K, 2) in pixels of the source, frames numbered as its own."""
        header = data.cache.header(row.index)
        source, first = header.source["shape"], header.source.get("first", 0)
        places = _moved(torch.from_numpy(found), header.shape[2:], source[1:]).numpy()
        out.mkdir(parents=True, exist_ok=True)
        file = out / f"{row.case}.csv"
        with file.open("w", newline="") as text:
            writer = csv.writer(text)
            writer.writerow(("frame", "point", "x", "y"))
            writer.writerows((first + t, k, f"{places[t, k, 1]:.2f}", f"{places[t, k, 0]:.2f}")
                             for t, k in np.argwhere(np.isfinite(places).all(-1)))
        return file

    def build(self, assembly: Assembly, classes: int) -> KeypointObjective:
        return KeypointObjective(self.fits(assembly))
