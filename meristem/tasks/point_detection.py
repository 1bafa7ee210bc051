"""Detection of upright boxes in clouds: street scenes of a LiDAR, and rooms."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from meristem.modalities.base import Placing
from meristem.modalities.objects import Objects
from meristem.platform import boxes
from meristem.platform.assembly import Assembly
from meristem.platform.data.annotated import kitti, scenes
from meristem.platform.data.loader import whole
from meristem.platform.data.manifest import Row
from meristem.platform.data.source import Data
from meristem.platform.evaluation.results import Boxes, Case
from meristem.platform.objectives import Loss
from meristem.platform.recipe import Count, Share
from meristem.platform.slots import Slot
from meristem.platform.step import Step
from meristem.tasks.base import Keep, ObjectSettings, Scope, TaskObjective, TaskRecipe
from meristem.tasks.detectors.points import HEADS, BoxHeadSettings, Centres, Found, Truth
from meristem.tasks.embedding import plain
from meristem.tasks.segmentation import places

FAINT = 0.01  # score below which nothing is said to be found


class PointDetectionObjective(TaskObjective):
    """The losses of a head on boxes; predicts from one plain look of up to the training view's size at each cloud."""

    def __init__(self, assembly: Assembly, settings: PointDetection, classes: int) -> None:
        super().__init__()
        self.settings = settings
        self.head = settings.head.build(assembly.encoder.width, classes)
        self.objects: dict[int, Objects] = {}

    def learn_from(self, data: Data, rows: Sequence[Row]) -> list[Row]:
        self.objects = {row.index: row.objects for row in rows if row.objects is not None}
        return list(rows)

    def forward(self, step: Step) -> dict[str, Loss]:
        view, rows = step.batch.views["x"], step.batch.items.row.tolist()
        points = view.array[:, :3].transpose(1, 2)
        live = torch.ones_like(points[..., 0], dtype=torch.bool) if view.weight is None else view.weight[:, 0] > 0
        truth = [self._truth(self.objects.get(rows[item]), view.frame.affine[i], points[i, live[i]])
                 for i, item in enumerate(view.item.tolist())]
        return self.head.losses(self.head(step.encode("x"), step.stream("x")), truth)

    def _truth(self, objects: Objects | None, affine: Tensor, points: Tensor) -> Truth:
        """The objects of a look that shows enough points (N, 3) of them, in its frame. affine: (4, 4) look -> source."""
        if objects is None:  # a recipe that is looked at, without data
            return Truth(points.new_zeros(0, 7), torch.zeros(0, dtype=torch.int64, device=points.device))
        box = boxes.moved(torch.from_numpy(objects.box).to(points), torch.linalg.inv(affine).to(points))
        shown = boxes.inside(points[None], box[None])[0].sum(0) >= self.settings.least
        ignore, label = (torch.from_numpy(x).to(points.device) for x in (objects.ignore, objects.label))
        return Truth(box[shown], label[shown], ignore[shown])

    @torch.no_grad()
    def predict(self, assembly: Assembly, data: Data, row: Row) -> Found:
        """What is found in a row, in source coordinates, best first; of two of a class that overlap the better."""
        recipe, device = assembly.recipe, next(assembly.parameters()).device
        options = plain(recipe)
        view = recipe.modality.augment(whole(data.cache, [row], recipe.modality, options).to(device), options)
        stream = assembly.tokenizer.stream(view)
        found, = self.head.decode(self.head(assembly.encoder(stream.seen(recipe.encoder.sees)), stream))
        box = boxes.moved(found.box, view.frame.affine[0].to(found.box))
        kept = found.score >= FAINT
        box, label, score = box[kept], found.label[kept], found.score[kept]
        alone = boxes.distinct(box, label, self.settings.overlap, flat=self.settings.scene == "street")
        return Found(box[alone].cpu(), label[alone].cpu(), score[alone].cpu())

    def test(self, assembly: Assembly, data: Data, rows: Sequence[Row], scope: Scope, keep: Keep | None = None) -> list[Case]:
        assembly.eval()
        cases = []
        for row in rows:
            assert row.objects is not None
            found, objects = self.predict(assembly, data, row), row.objects
            truth = Boxes(box=_rows(objects.box), label=tuple(objects.label.tolist()), ignore=tuple(objects.ignore.tolist()),
                          level=tuple(objects.level.tolist()), size=tuple(objects.box[:, 3:6].prod(1).round(4).tolist()))
            cases.append(Case(case=row.case, subject=row.subject, truth=truth,
                              found=Boxes(box=_rows(found.box.numpy()), label=tuple(found.label.tolist()),
                                          score=tuple(found.score.double().numpy().round(6).tolist()))))
        return cases

    def write(self, assembly: Assembly, data: Data, rows: Sequence[Row], scope: Scope, out: Path) -> list[Path]:
        """Of KITTI's frames with a calibration a label file each (`kitti.text`); of all others one `boxes.json` (`scenes`)."""
        assembly.eval()
        assert isinstance(data.modality, Placing)
        written: list[Path] = []
        described = []
        for row, place in zip(rows, places(rows, data), strict=True):
            found = self.predict(assembly, data, row)
            box = data.modality.annotated(found.box.double().numpy(), data.cache.header(row.index))
            names, score = [scope.values[label] for label in found.label.tolist()], found.score.tolist()
            known = kitti.calibration(row.paths[0]) if data.manifest.layout == kitti.LAYOUT else None
            if known is None:
                described.append(scenes.described(row.local, box, names, score))
                continue
            path = (out / place).with_suffix(".txt")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(kitti.text(box, names, score, known))
            written.append(path)
        if described:
            written.append(out / scenes.NAME)
            written[-1].write_text(json.dumps({"classes": list(scope.values.values()), "scenes": described}, indent=1))
        return written


def _rows(box: np.ndarray) -> tuple[tuple[float, ...], ...]:
    return tuple(map(tuple, box.astype(float).round(4).tolist()))


class PointDetection(ObjectSettings):
    """head: `centres` on the ground for streets, `queries` for rooms. scene: scored as KITTI's streets, or as rooms are.
    overlaps: class -> IoU from which on one is right, as KITTI has them; of other classes and rooms by the metric alone.
    least: points of an object that a training look must show for it to be learned. overlap: of two found of a class, seen from
    above in streets and in space in rooms, from which on the worse is dropped.
    """

    lacking: ClassVar[tuple[str, str]] = ("no object is annotated in any cloud",
                                          "Give a folder in KITTI's layout, or a boxes.json.")
    head: Annotated[BoxHeadSettings, Slot("head", HEADS)]
    scene: Literal["street", "room"] = "street"
    overlaps: Mapping[str, Annotated[float, Field(gt=0, lt=1)]] = {}
    least: Count = 1
    overlap: Share = 0.1

    @property
    def metric(self) -> str:  # type: ignore[override]
        return "ap40" if self.scene == "street" else "ap50"

    @property
    def scoring(self) -> str:  # type: ignore[override]
        return "kitti" if self.scene == "street" else "room"

    def check(self, recipe: TaskRecipe) -> list[str]:
        if recipe.modality.name != "points":
            return [f"upright boxes are found among points; the modality is {recipe.modality.name}"]
        problems = []
        if recipe.views["x"].rotate and recipe.views["x"].axis != "z":  # type: ignore[attr-defined]
            problems.append("boxes stay upright only in views that turn about z: set views.x.axis=z")
        if isinstance(self.head, Centres) and recipe.modality.options.normalise == "sphere":
            problems.append("centres are sought on a ground in metres, and every cloud is scaled to a sphere of its own: set "
                            "modality.points.normalise=none, in pretraining too")
        return problems

    def build(self, assembly: Assembly, classes: int) -> PointDetectionObjective:
        return PointDetectionObjective(assembly, self, classes)
