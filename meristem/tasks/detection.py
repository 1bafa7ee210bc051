"""Detection of objects in images and volumes: boxes, and in images their masks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from meristem.modalities.base import Draw, Header, Placing
from meristem.modalities.frame import Frame
from meristem.modalities.objects import Objects
from meristem.modalities.stream import LatticeStream
from meristem.platform.assembly import Assembly
from meristem.platform.data.loader import shown
from meristem.platform.data.manifest import Row
from meristem.platform.data.source import Data
from meristem.platform.evaluation.results import Boxes, Case
from meristem.platform.objectives import Loss
from meristem.platform.slots import Slot
from meristem.platform.step import Step
from meristem.tasks.base import Keep, ObjectSettings, Scope, TaskObjective, TaskRecipe
from meristem.tasks.detectors import DETECTORS, Boxed, DetectorSettings
from meristem.tasks.detectors.fusion import Fusion, together
from meristem.tasks.detectors.instances import of_mask
from meristem.tasks.detectors.pyramid import pyramid
from meristem.tasks.segmentation import label_values

WINDOWS = 4  # predicted at once
Count = Annotated[int, Field(ge=1)]


class DetectionObjective(TaskObjective):
    """A detector on a pyramid of the encoder's maps; predicts by overlapping windows, whose boxes are fused."""

    def __init__(self, assembly: Assembly, settings: Detection, classes: int) -> None:
        super().__init__()
        self.settings = settings
        self.pyramid = pyramid(assembly, settings.levels, settings.width)
        self.detector = settings.detector.build(settings.width, self.pyramid.strides, classes)
        self.known: dict[int, tuple[Objects, Tensor]] = {}  # manifest row -> what is annotated, and source -> stored index

    def learn_from(self, data: Data, rows: Sequence[Row]) -> list[Row]:
        for row in rows:
            affine = torch.tensor(data.cache.header(row.index).affine)
            self.known[row.index] = self.settings.truth(data, row), torch.linalg.inv(affine.double())
        return list(rows)

    def forward(self, step: Step) -> dict[str, Loss]:
        view, stream = step.batch.views["x"], step.stream("x")
        assert isinstance(stream, LatticeStream)
        maps = self.pyramid(step.encode("x", want=self.pyramid.want), stream)
        truth = []
        for i, row in enumerate(step.batch.items.row[view.item].tolist()):
            nothing = Objects(np.zeros((0, 2 * view.frame.dims)), np.zeros(0, np.int64)), torch.eye(view.frame.dims + 1)
            objects, inverse = self.known.get(row, nothing)  # nothing of a recipe that is looked at, without data
            truth.append(in_view(objects, view.frame.select(slice(i, i + 1)), inverse, self.settings.visible))
        return self.detector.losses(maps, tuple(view.array.shape[2:]), truth)

    @torch.no_grad()
    def predict(self, assembly: Assembly, data: Data, row: Row) -> Boxed:
        """What is in a whole sample, in steps of its stored lattice from its corner."""
        recipe, device = assembly.recipe, next(assembly.parameters()).device
        options = recipe.views["x"].plain().model_copy(update={"count": 1})
        view_size: tuple[int, ...] = tuple(options.size)  # type: ignore[attr-defined]
        zoom = math.sqrt(math.prod(getattr(recipe.views["x"], "zoom", (1.0, 1.0))))
        size = tuple(max(round(n * zoom), 1) for n in view_size)
        header = data.cache.header(row.index)
        starts = windows(header.shape[1:], size, self.settings.overlap)
        found: list[Boxed] = []
        fast = torch.autocast(device.type, torch.bfloat16, enabled=recipe.train.precision == "bf16")
        with torch.autocast(device.type, enabled=False):  # which keeps the weights that `fast` has cast
            for first in range(0, len(starts), WINDOWS):
                some = starts[first:first + WINDOWS]
                draws = [Draw(start, size, view_size, {"pad": np.array(header.pad, np.float32)}) for start in some]
                view = recipe.modality.augment(shown(data.cache, row, recipe.modality, options, draws).to(device), options)
                stream = assembly.tokenizer.stream(view)
                assert isinstance(stream, LatticeStream)
                with fast:
                    maps = self.pyramid(assembly.encoder(stream.seen(recipe.encoder.sees), want=self.pyramid.want), stream)
                    each = self.detector.detect(maps, view_size)
                found += [_moved(x, start, size, view_size, header.shape[1:]) for x, start in zip(each, some, strict=True)]
        return together(found, starts, size, header.shape[1:], self.settings.fuse, self.settings.most,
                        self.settings.fusion)

    def test(self, assembly: Assembly, data: Data, rows: Sequence[Row], scope: Scope, keep: Keep | None = None) -> list[Case]:
        """Boxes in the stored lattice's own axes and unit, true and found."""
        assembly.eval()
        cases = []
        for row in rows:
            header, found = data.cache.header(row.index), self.predict(assembly, data, row)
            objects = self.settings.truth(data, row)
            spacing = np.tile(header.spacing, 2)
            true = stored(objects, header) * spacing
            sides = np.diff(true.reshape(len(true), 2, len(header.spacing)), axis=1)[:, 0]
            size = [float(m.cells.sum() * np.prod(header.spacing)) for m in objects.masks] or sides.prod(1).tolist()
            assert found.score is not None
            cases.append(Case(
                case=row.case, subject=row.subject,
                truth=Boxes(box=_rows(true), label=tuple(objects.label.tolist()), ignore=tuple(objects.ignore.tolist()),
                            level=tuple(objects.level.tolist()), size=tuple(size)),
                found=Boxes(box=_rows(found.box.cpu().double().numpy() * spacing), label=tuple(found.label.tolist()),
                            score=tuple(found.score.tolist())),
                overlap=_mask_overlap(found, objects, header.shape[1:])))
        return cases

    def write(self, assembly: Assembly, data: Data, rows: Sequence[Row], scope: Scope, out: Path) -> list[Path]:
        """predictions.json, in the format that annotations of this kind of data have, with scores."""
        from meristem.tasks.detectors.files import save

        assembly.eval()
        assert isinstance(data.modality, Placing)
        found = []
        for row in rows:
            header, boxed = data.cache.header(row.index), self.predict(assembly, data, row)
            corner = boxed.box.cpu().double().numpy()
            found.append((row, header, data.modality.annotated(source(corner, header), header), boxed))
        return [save(found, scope, out / "predictions.json")]


def _rows(table: np.ndarray) -> tuple[tuple[float, ...], ...]:
    return tuple(map(tuple, table.tolist()))


def corners(box: np.ndarray) -> np.ndarray:
    """(K, 2·D) to all corners (K, 2^D, D)."""
    dims = box.shape[1] // 2
    pick = np.array(list(itertools.product((0, 1), repeat=dims))) * dims + np.arange(dims)
    return box[:, pick]


def hull(points: np.ndarray) -> np.ndarray:
    """(K, P, D) to the boxes (K, 2·D) that hold all points."""
    return np.concatenate([points.min(1), points.max(1)], 1) if len(points) else np.zeros((0, 2 * points.shape[2]))


def stored(objects: Objects, header: Header) -> np.ndarray:
    """(K, 2·D) boxes in steps of the stored lattice from its corner, cut to it."""
    inverse = np.linalg.inv(np.array(header.affine))
    box = hull(corners(objects.box) @ inverse[:-1, :-1].T + inverse[:-1, -1] + 0.5)
    return np.clip(box, 0, np.tile(header.shape[1:], 2))


def source(box: np.ndarray, header: Header) -> np.ndarray:
    """The inverse of `stored`: (K, 2·D) in source coordinates."""
    affine = np.array(header.affine)
    return hull((corners(box) - 0.5) @ affine[:-1, :-1].T + affine[:-1, -1])


def in_view(objects: Objects, frame: Frame, inverse: Tensor, visible: float) -> Boxed:
    """What teaches of the objects of a sample in a view of it, the only row of `frame`: those of which at least the share
    `visible` can be seen, cut to the view. inverse: (D+1, D+1) source -> stored index, for masks.
    """
    device, dims = frame.affine.device, frame.dims
    objects = objects.select(~objects.ignore)
    points = torch.from_numpy(corners(objects.box)).to(device, torch.float64)
    exact = Frame(frame.affine.double(), frame.shape, frame.spacing, frame.unit)
    index, _ = exact.from_source(points.reshape(1, -1, dims))
    index = index.reshape(len(objects), 2**dims, dims) + 0.5
    size = torch.tensor(frame.shape, device=device, dtype=torch.float64)
    low, high = index.amin(1), index.amax(1)
    inside = low.clamp_min(0).minimum(size), high.clamp_min(0).minimum(size)
    share = ((inside[1] - inside[0]) / (high - low)).prod(1)
    kept = (share >= max(visible, 1e-6)) & (inside[1] - inside[0] > 0.1).all(1)
    box, label = torch.cat(inside, 1)[kept].float(), torch.from_numpy(objects.label).to(device)[kept]
    masks = None
    if objects.masks:
        at = [torch.arange(n, device=device, dtype=torch.float64) for n in frame.shape]
        grid = torch.stack(torch.meshgrid(*at, indexing="ij"), -1).reshape(1, -1, dims)
        inverse = inverse.to(device, torch.float64)
        place = (exact.to_source(grid)[0] @ inverse[:-1, :-1].T + inverse[:-1, -1]).round().long()
        masks = torch.stack([_cells(objects.masks[i].cells, objects.masks[i].start, place).reshape(frame.shape)
                             for i in kept.nonzero()[:, 0].tolist()] or [torch.zeros(frame.shape, dtype=torch.bool)])
        masks = masks[:len(box)].to(device)
    return Boxed(box, label, None, masks)


def _cells(cells: np.ndarray, start: tuple[int, ...], place: Tensor) -> Tensor:
    """(P,) bool: whether an object's cells cover the stored elements `place` (P, D)."""
    at = place - torch.tensor(start, device=place.device)
    size = torch.tensor(cells.shape, device=place.device)
    inside = ((at >= 0) & (at < size)).all(1)
    found = torch.zeros(len(place), dtype=torch.bool, device=place.device)
    found[inside] = torch.from_numpy(cells).to(place.device)[tuple(at[inside].unbind(1))]
    return found


def windows(shape: Sequence[int], size: Sequence[int], overlap: float) -> list[tuple[int, ...]]:
    """Where windows of `size` start that cover a lattice, neighbours sharing at least `overlap`; centred on a smaller one."""
    lines = []
    for n, w in zip(shape, size, strict=True):
        count = 1 if n <= w else math.ceil((n - w) / max(w * (1 - overlap), 1)) + 1
        lines.append([-((w - n) // 2)] if count == 1 else np.linspace(0, n - w, count).round().astype(int).tolist())
    return list(itertools.product(*lines))


def _moved(found: Boxed, start: Sequence[int], size: Sequence[int], view: Sequence[int], shape: Sequence[int]) -> Boxed:
    """What was found in a window, on the stored lattice that it is of, cut to it."""
    device = found.box.device
    step = torch.tensor([n / m for n, m in zip(size, view, strict=True)] * 2, device=device)
    box = found.box * step + torch.tensor(tuple(start) * 2, device=device)
    limit = torch.tensor(tuple(shape) * 2, device=device)
    masks = None
    if found.masks is not None:
        whole = torch.nn.functional.interpolate(found.masks[:, None].float(), tuple(size), mode="bilinear")[:, 0] >= 0.5
        masks = torch.zeros(len(found), *shape, dtype=torch.bool, device=device)
        inside = [slice(max(a, 0), min(a + n, m)) for a, n, m in zip(start, size, shape, strict=True)]
        own = [slice(s.start - a, s.stop - a) for s, a in zip(inside, start, strict=True)]
        masks[(slice(None), *inside)] = whole[(slice(None), *own)]
    box = box.clamp_min(0).minimum(limit.to(box.dtype))
    return Boxed(box, found.label, found.score, masks)


def _mask_overlap(found: Boxed, objects: Objects, shape: Sequence[int]) -> tuple[tuple[float, ...], ...]:
    """Overlap of the masks of what was found (rows) and what is true, as `Case` has it; () where either has none."""
    if found.masks is None or not objects.masks:
        return ()
    true = np.zeros((len(objects), *shape), bool)
    for row, mask in zip(true, objects.masks, strict=True):
        row[tuple(slice(a, a + n) for a, n in zip(mask.start, mask.cells.shape, strict=True))] = mask.cells
    a, b = found.masks.cpu().flatten(1).float(), torch.from_numpy(true).flatten(1).float()
    common = a @ b.T
    union = a.sum(1)[:, None] + b.sum(1)[None] - common
    whole = torch.where(torch.from_numpy(objects.ignore), a.sum(1)[:, None], union)
    return _rows((common / whole.clamp_min(1)).numpy())


class Detection(ObjectSettings):
    """objects: `annotated` ones of the data's boxes; or of its masks `components`, each connected part of a value an object of
    that class, or `values`, each value one object; with at least `smallest` elements.
    levels: of the feature pyramid, width: its channels. visible: share of an object that a view must show of it to teach it.
    overlap: of neighbouring windows at prediction; fuse: IoU from which on boxes of two windows are one object, and fusion how
    they become one; most: of a whole sample. by: the metric that arms are compared by; null: the usual one.
    """

    lacking: ClassVar[tuple[str, str]] = (
        "no sample has annotated objects",
        "Give a COCO JSON, Pascal VOC XMLs or MONAI's JSON of boxes; or masks of the objects, and set "
        "task.detection.objects=components.")
    detector: Annotated[DetectorSettings, Slot("detector", DETECTORS)]
    objects: Literal["annotated", "components", "values"] = "annotated"
    smallest: Count = 1
    levels: Annotated[int, Field(ge=2)] = 3
    width: Annotated[int, Field(ge=32, multiple_of=32)] = 64
    visible: Annotated[float, Field(ge=0, le=1)] = 0.4
    overlap: Annotated[float, Field(ge=0, lt=1)] = 0.25
    fuse: Annotated[float, Field(gt=0, lt=1)] = 0.5
    fusion: Fusion = "nms"
    most: Count = 100
    by: Literal["ap", "ap50", "map", "ap10", "froc"] | None = None

    @property
    def scoring(self) -> str:  # type: ignore[override]
        return "coco" if self.detector.dims == 2 else "volume"

    @property
    def metric(self) -> str:  # type: ignore[override]
        return self.by or ("ap" if self.detector.dims == 2 else "map")

    def check(self, recipe: TaskRecipe) -> list[str]:
        if not hasattr(recipe.modality.options, "patch") or len({axis.unit for axis in recipe.modality.axes}) > 1:
            return [f"boxes along the axes are for images and volumes, not {recipe.modality.name}: points have detection3d, "
                    "videos temporal"]
        if recipe.modality.tokenizer().kinds:
            return ["a detector needs one token for each place; set modality.….tokens: patch"]
        problems, dims = [], len(recipe.modality.axes)
        if self.detector.dims != dims:
            name = next(n for n, kind in DETECTORS.items() if kind is type(self.detector))
            fit = ", ".join(n for n, kind in DETECTORS.items() if kind.dims == dims)
            problems.append(f"detector: {name} is for {self.detector.dims} axes, {recipe.modality.name} has {dims}; "
                            f"use {fit or 'another task'}")
        view = recipe.views["x"]
        if getattr(view, "elastic", None) is not None:
            problems.append("views.x.elastic: boxes cannot follow it; leave it out")
        if getattr(view, "window", "crop") != "crop":
            problems.append("views.x.window: whole samples are searched in windows of the size of crops; use crop, and zoom to "
                            "show more of a sample at once")
        if not recipe.encoder.provides & {"pyramid", "layers"}:
            problems.append("this encoder has neither a pyramid of maps nor tokens on a lattice")
        return problems

    def labelled(self, rows: Sequence[Row]) -> list[Row]:
        if self.objects != "annotated":
            return [row for row in rows if "mask" in row.fields]
        return super().labelled(rows)

    def truth(self, data: Data, row: Row) -> Objects:
        """What is annotated in a sample, in source coordinates."""
        if self.objects != "annotated":
            return of_mask(data.cache.field(row.index, "mask"), data.cache.header(row.index), self.objects, self.smallest)
        assert row.objects is not None
        return row.objects

    def scope(self, data: Data) -> Scope:
        if self.objects == "values":
            return Scope({0: "object"}, ("object",), data.modality.axes[0].unit)
        if self.objects == "components":
            names = tuple(name for value, name in label_values(data, self.labelled(data.rows())).items() if value > 0)
            return Scope(dict(enumerate(names)), names, data.modality.axes[0].unit)
        return super().scope(data)

    def build(self, assembly: Assembly, classes: int) -> DetectionObjective:
        return DetectionObjective(assembly, self, classes)
