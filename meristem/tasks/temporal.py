"""Temporal action detection: from when to when something happens in an untrimmed video."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from meristem.modalities.base import Header, Look, Placing, View
from meristem.modalities.frame import Frame
from meristem.modalities.objects import Objects
from meristem.modalities.video.options import Rate, VideoViewOptions
from meristem.platform.assembly import Assembly
from meristem.platform.data.loader import shown
from meristem.platform.data.manifest import Row
from meristem.platform.data.source import Data
from meristem.platform.evaluation.results import Boxes, Case
from meristem.platform.objectives import Loss
from meristem.platform.step import Step
from meristem.tasks.base import Keep, ObjectSettings, Scope, TaskObjective, TaskRecipe
from meristem.tasks.detectors.temporal import Segments, TemporalHead, decode, losses, suppress
from meristem.tasks.segmentation import places

WINDOWS = 4  # predicted at once
PER_WINDOW = 500  # segments, the best, of each before they are joined
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]


class TemporalObjective(TaskObjective):
    """A view is a window of the video. The encoder reads it clip by clip, as it was pretrained; the means over space of its
    tokens, at each of their times, are the sequence in which the head finds segments. So the usual training serves, encoder
    included or not, and a long video is searched in windows whose segments are joined.
    """

    def __init__(self, assembly: Assembly, settings: Temporal, classes: int) -> None:
        super().__init__()
        self.settings = settings
        self.head = TemporalHead(assembly.encoder.width, settings.width, settings.levels, classes)
        self.known: dict[int, Objects] = {}

    def learn_from(self, data: Data, rows: Sequence[Row]) -> list[Row]:
        """A window anywhere in each video, and one for each of its actions that shows the middle of it."""
        samples = []
        for row in rows:
            assert row.objects is not None
            self.known[row.index] = row.objects
            header = data.cache.header(row.index)
            middle = row.objects.box[~row.objects.ignore].mean(1) / header.spacing[0]
            frames = np.clip(middle.astype(int), 0, header.shape[1] - 1).tolist()
            samples += [row, *(replace(row, element=frame) for frame in frames)]
        return samples

    def sequence(self, assembly: Assembly, view: View) -> tuple[Tensor, Tensor]:
        """Features (B, T, D) of a view at the times of its tokens, and which of them (B, T) lie in the video."""
        b, frames, rows, columns = len(view), *view.frame.shape
        clip = self.settings.clip or frames
        n = frames // clip

        def cut(x: Tensor) -> Tensor:
            """(B, C, T, H, W) to (B·n, C, clip, H, W)."""
            return x.unflatten(2, (n, clip)).transpose(1, 2).flatten(0, 1)

        each = torch.arange(b, device=view.array.device).repeat_interleave(n)
        matrix = torch.eye(4, device=view.array.device).repeat(b * n, 1, 1)
        matrix[:, 0, 3] = torch.arange(n, device=view.array.device).repeat(b) * clip
        frame = view.frame.select(each).compose(matrix, (clip, rows, columns))
        clips = View(view.name, cut(view.array), frame, view.item[each], view.look[each],
                     weight=None if view.weight is None else cut(view.weight))
        encoded = assembly.encoder(assembly.tokenizer.stream(clips).seen(assembly.recipe.encoder.sees))
        assert encoded.lattice is not None
        x = encoded.tokens.unflatten(1, (encoded.lattice[0], -1)).mean(2).reshape(b, n * encoded.lattice[0], -1)
        if view.weight is None:
            return x, torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        return x, F.adaptive_max_pool1d(view.weight.amax((3, 4)), x.shape[1])[:, 0] > 0

    def forward(self, step: Step) -> dict[str, Loss]:
        view = step.batch.views["x"]
        x, valid = self.sequence(step.assembly, view)
        nothing = Objects(np.zeros((0, 2)), np.zeros(0, np.int64))  # of a recipe that is looked at, without data
        both = [in_view(self.known.get(row, nothing), view.frame.select(slice(i, i + 1)), x.shape[1], self.settings.visible)
                for i, row in enumerate(step.batch.items.row[view.item].tolist())]
        return losses(self.head(x, valid), [true for true, _ in both], [silent for _, silent in both])

    @torch.no_grad()
    def predict(self, assembly: Assembly, data: Data, row: Row) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Segments (K, 2) in seconds of a whole video, their classes and scores, best first.

        A window answers for segments whose middle is nearer to its own than to any other's: what its border cuts is another's.
        """
        recipe, device = assembly.recipe, next(assembly.parameters()).device
        header, options = data.cache.header(row.index), recipe.views["x"].plain()
        assert isinstance(options, VideoViewOptions)
        count = _windows(options, header, self.settings.overlap)
        options = options.model_copy(update={"clips": count, "count": count, "grid": (count, 1)})
        draws = [recipe.modality.draw(options, header, Look(0, 0, number, "x")) for number in range(count)]
        fast = torch.autocast(device.type, torch.bfloat16, enabled=recipe.train.precision == "bf16")
        spans, labels, scores = [], [], []
        middles: list[float] = []  # of the windows
        window: list[np.ndarray] = []  # that each segment was found in
        for first in range(0, count, WINDOWS):
            view = shown(data.cache, row, recipe.modality, options, draws[first:first + WINDOWS]).to(device)
            view = recipe.modality.augment(view, options)
            with fast:
                x, valid = self.sequence(assembly, view)
                each = decode(self.head(x, valid), PER_WINDOW)
            for i, found in enumerate(each):
                assert found.score is not None
                frame = view.frame.select(slice(i, i + 1))
                middles.append(float(to_source(torch.tensor([[0.0, x.shape[1] - 1.0]]), frame, x.shape[1]).mean()))
                window.append(np.full(len(found.label), len(window)))
                spans.append(to_source(found.span, frame, x.shape[1]))
                labels.append(found.label.cpu().numpy())
                scores.append(found.score.cpu().double().numpy())
        assert isinstance(data.modality, Placing)
        span, label, score = np.concatenate(spans), np.concatenate(labels), np.concatenate(scores)
        mine = np.abs(span.mean(1)[:, None] - np.array(middles)).argmin(1) == np.concatenate(window)
        span = data.modality.annotated(span, header)
        some = mine & (span[:, 1] > span[:, 0])
        return suppress(span[some], label[some], score[some], self.settings.sigma, self.settings.most)

    def test(self, assembly: Assembly, data: Data, rows: Sequence[Row], scope: Scope, keep: Keep | None = None) -> list[Case]:
        """Segments in seconds, true and found."""
        assembly.eval()
        cases = []
        for row in rows:
            assert row.objects is not None and isinstance(data.modality, Placing)
            span, label, score = self.predict(assembly, data, row)
            true = data.modality.annotated(row.objects.box, data.cache.header(row.index))
            cases.append(Case(
                case=row.case, subject=row.subject,
                truth=Boxes(box=tuple(map(tuple, true.tolist())), label=tuple(row.objects.label.tolist()),
                            ignore=tuple(row.objects.ignore.tolist())),
                found=Boxes(box=tuple(map(tuple, span.tolist())), label=tuple(label.tolist()), score=tuple(score.tolist()))))
        return cases

    def write(self, assembly: Assembly, data: Data, rows: Sequence[Row], scope: Scope, out: Path) -> list[Path]:
        """predictions.json, in the format that ActivityNet's results have."""
        assembly.eval()
        names = [place.as_posix().removesuffix(place.suffix) for place in places(rows, data)]
        bare = [name.removeprefix("v_") for name in names]
        results = {}
        for name, row in zip(bare if len(set(bare)) == len(bare) else names, rows, strict=True):
            results[name] = [{"label": scope.values[c], "score": round(p, 6), "segment": [round(t, 4) for t in span]}
                             for span, c, p in zip(*(x.tolist() for x in self.predict(assembly, data, row)), strict=True)]
        path = out / "predictions.json"
        path.write_text(json.dumps({"version": "VERSION 1.3", "results": results, "external_data": {}}, indent=1))
        return [path]


def _windows(options: VideoViewOptions, header: Header, overlap: float) -> int:
    """How many looks, evenly spread, cover a video with neighbours sharing at least `overlap` of their length."""
    assert options.sample != "uniform"
    step = 1 / options.sample.fps if isinstance(options.sample, Rate) else options.sample.stride * header.spacing[0]
    window, whole = options.size[0] * step, header.shape[1] * header.spacing[0]
    return 1 if whole <= window else math.ceil((whole - window) / (window * (1 - overlap)) - 1e-6) + 1


def _line(frame: Frame, steps: int) -> tuple[float, float]:
    """(a, b): step t of a sequence of so many along a view, the only row of `frame`, lies at a·t + b of the source's time."""
    length = frame.shape[0] / steps  # frames of the view to a step
    rate, start = frame.affine[0, 0, 0].double().item(), frame.affine[0, 0, 3].double().item()
    return rate * length, start + rate * (length - 1) / 2


def to_source(span: Tensor, frame: Frame, steps: int) -> np.ndarray:
    """(K, 2) segments in steps of a sequence along a view, in source time; of a view played backwards, turned round."""
    a, b = _line(frame, steps)
    return np.sort(span.cpu().double().numpy() * a + b, 1)


def in_view(objects: Objects, frame: Frame, steps: int, visible: float) -> tuple[Segments, Tensor]:
    """What teaches in a view, the only row of `frame`, in steps of a sequence of so many along it; and the spans (M, 2) in
    which nothing is asked: actions to ignore, and those of which the view shows less than the share `visible`. All are cut to
    it.
    """
    a, b = _line(frame, steps)
    whole = np.sort((objects.box - b) / a, 1)
    span = np.clip(whole, -0.5, steps - 0.5)
    length = span[:, 1] - span[:, 0]
    some, clear = length > 0, length >= visible * (whole[:, 1] - whole[:, 0])
    taught = some & clear & ~objects.ignore
    device = frame.affine.device
    return (Segments(torch.tensor(span[taught], dtype=torch.float32, device=device),
                     torch.tensor(objects.label[taught], device=device)),
            torch.tensor(span[some & ~taught], dtype=torch.float32, device=device))


class Temporal(ObjectSettings):
    """clip: frames that the encoder reads at once, as many as in pretraining; null: the whole view. width, levels: of the
    pyramid of the head, each level half as long as the one before. visible: share of an action that a view must show of it to
    teach it. overlap: of neighbouring windows at prediction. sigma: of soft suppression. most: segments of a video.
    """

    lacking: ClassVar[tuple[str, str]] = ("no video has annotated segments", "Give an ActivityNet JSON beside the videos.")
    metric = "tmap"
    scoring: ClassVar[str] = "temporal"
    clip: Count | None = None
    width: Annotated[int, Field(ge=32, multiple_of=32)] = 128
    levels: Count = 4
    visible: Share = 0.5
    overlap: Share = 0.5
    sigma: Annotated[float, Field(gt=0)] = 0.5
    most: Count = 200

    def check(self, recipe: TaskRecipe) -> list[str]:
        view, problems = recipe.views["x"], []
        if not isinstance(view, VideoViewOptions):
            return [f"temporal is for videos; {recipe.modality.name} has no axis of time"]
        frames, tubelet = view.size[0], recipe.modality.options.patch[0]
        if view.sample == "uniform":
            problems.append("views.x.sample: uniform shows the whole video, however long; use a rate, {fps: 8}")
        if view.short != "pad":
            problems.append("views.x.short: what a video shows again has no time of its own; use pad")
        if view.order or view.residual:
            problems.append("views.x: order and residual are for pretexts; leave them out")
        if self.clip and (frames % self.clip or self.clip % tubelet):
            problems.append(f"clip: {self.clip} frames must divide the view's {frames} and be a multiple of the patch's "
                            f"{tubelet}")
        return problems

    def build(self, assembly: Assembly, classes: int) -> TemporalObjective:
        return TemporalObjective(assembly, self, classes)
