"""Semantic segmentation of images and volumes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, combinations
from pathlib import Path, PurePosixPath
from typing import Annotated, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from meristem.errors import DataError
from meristem.modalities.base import Archiving, Header, View
from meristem.modalities.frame import Frame
from meristem.modalities.stream import LatticeStream
from meristem.platform.assembly import Assembly
from meristem.platform.data.manifest import Problem, Row
from meristem.platform.data.source import Data
from meristem.platform.evaluation.metrics import segmentation
from meristem.platform.evaluation.results import Case
from meristem.platform.objectives import Loss
from meristem.platform.step import Step
from meristem.tasks.base import Keep, Scope, TaskObjective, TaskRecipe, TaskSettings, normalised
from meristem.tasks.decoders import Kind, decoder

WINDOWS = 4  # predicted at once


class SegmentationObjective(TaskObjective):
    """Soft Dice + cross-entropy on a decoder's logits; predicts by overlapping windows."""

    def __init__(self, assembly: Assembly, settings: Segmentation, classes: int) -> None:
        from monai.losses import DiceCELoss  # importing monai takes seconds

        super().__init__()
        self.settings, self.classes = settings, classes
        self.decoder = decoder(assembly, settings.decoder, settings.width, classes)
        self.loss = DiceCELoss(to_onehot_y=True, softmax=True, include_background=False, batch=settings.batch_dice)

    def forward(self, step: Step) -> dict[str, Loss]:
        view, stream = step.batch.views["x"], step.stream("x")
        assert isinstance(stream, LatticeStream)
        logits = self.decoder(step.encode("x", want=self.decoder.want), stream)
        total = self.loss(logits.float(), view.fields["mask"][:, None]) * len(view)
        return {"": Loss(total, len(view))}

    @torch.no_grad()
    def predict(self, assembly: Assembly, array: Tensor, header: Header) -> Tensor:
        """Class probabilities (K, *S) of a whole normalised sample (C, *S).

        Windows of the training view's size, blended with Gaussian weights, averaged over flips.
        """
        from monai.inferers import sliding_window_inference

        recipe = assembly.recipe
        size, unit = recipe.views["x"].size, tuple(a.unit for a in recipe.modality.axes)  # type: ignore[attr-defined]
        spacing = torch.tensor(header.spacing, device=array.device, dtype=torch.float32)[None]

        def logits(window: Tensor) -> Tensor:
            n, dims = len(window), window.ndim - 2
            frame = Frame(torch.eye(dims + 1, device=window.device).expand(n, -1, -1), tuple(window.shape[2:]),
                          spacing.expand(n, -1), unit)
            rows = torch.arange(n, device=window.device)
            stream = assembly.tokenizer.stream(View("x", window, frame, rows, torch.zeros_like(rows)))
            assert isinstance(stream, LatticeStream)
            encoded = assembly.encoder(stream.seen(recipe.encoder.sees), want=self.decoder.want)
            out: Tensor = self.decoder(encoded, stream).float()
            return out

        fast = torch.autocast(array.device.type, torch.bfloat16, enabled=recipe.train.precision == "bf16")

        mirrors = list(chain.from_iterable(combinations(self.settings.flips, k) for k in range(len(self.settings.flips) + 1)))
        total = torch.zeros((), device=array.device)
        for axes in mirrors:
            dims = [axis + 2 for axis in axes]
            turned = torch.flip(array[None], dims)
            with fast:
                out = sliding_window_inference(turned, size, WINDOWS, logits, self.settings.overlap, "gaussian")
            assert isinstance(out, Tensor)
            total = total + torch.flip(out, dims).softmax(1)
        return total[0] / len(mirrors)

    def _labels(self, assembly: Assembly, data: Data, row: Row) -> np.ndarray:
        """The predicted label map (*S) of a row, on its stored lattice."""
        header, device = data.cache.header(row.index), next(assembly.parameters()).device
        probabilities = self.predict(assembly, normalised(data.cache.array(row.index), header, device), header)
        return probabilities.argmax(0).to(torch.uint8).cpu().numpy()

    def test(self, assembly: Assembly, data: Data, rows: Sequence[Row], scope: Scope, keep: Keep | None = None) -> list[Case]:
        """Dice, HD95 and NSD of each row, on the stored lattice (the recipe's orientation and spacing)."""
        assembly.eval()
        cases = []
        foreground = {value: name for value, name in scope.values.items() if name in scope.scored}
        for row in rows:
            labels = self._labels(assembly, data, row)
            scores = segmentation(labels, data.cache.field(row.index, "mask"), data.cache.header(row.index).spacing, foreground,
                                  self.settings.tolerance)
            cases.append(Case(case=row.case, subject=row.subject, metrics=scores))
            if keep is not None:
                keep(row, labels)
        return cases

    def write(self, assembly: Assembly, data: Data, rows: Sequence[Row], scope: Scope, out: Path) -> list[Path]:
        """One label file per row, on the source file's grid, under the source file's name (`places`).

        Beside it one for the archive that a sample comes from; a sample of which that cannot be made is among the quarantined.
        """
        assembly.eval()
        written: list[Path] = []
        for row, place in zip(rows, places(rows, data), strict=True):
            path = out / place
            path.parent.mkdir(parents=True, exist_ok=True)
            labels, header = self._labels(assembly, data, row), data.cache.header(row.index)
            written.append(data.modality.write(labels, header, path))
            if isinstance(data.modality, Archiving):
                try:
                    archived = data.modality.archive(labels, header, row.paths, scope.values, assembly.recipe.hash, path)
                    written += [archived] if archived else []
                except DataError as error:
                    data.cache.quarantine += (Problem(row.case, error.reason, error.what, error.remedy, row.local),)
        return written


def places(rows: Sequence[Row], data: Data) -> list[Path]:
    """Where the prediction of each row goes, relative to the results: distinct whatever the suffix becomes.

    The file's name; with its folders where two files share one; with its suffix made part of the stem where that is all they
    differ in. An nnU-Net case is called without its channel number.
    """
    def split(path: PurePosixPath) -> tuple[str, str]:
        suffix = max((s for s in data.modality.suffixes if path.name.lower().endswith(s)), key=len, default="")
        end = len(path.name) - len(suffix)
        stem, suffix = path.name[:end], path.name[end:]
        return (stem.removesuffix("_0000") if data.manifest.layout == "nnU-Net" else stem), suffix

    found = [PurePosixPath(row.local) for row in rows]
    inside = [PurePosixPath(*(part for part in path.parts if part not in (path.anchor, ".."))) for path in found]
    names = [split(path) for path in found]
    if len({stem for stem, _ in names}) == len(names):
        return [Path(stem + suffix) for stem, suffix in names]
    if len({(path.parent, stem) for path, (stem, _) in zip(inside, names, strict=True)}) == len(names):
        return [Path(path.parent, stem + suffix) for path, (stem, suffix) in zip(inside, names, strict=True)]
    return [Path(path.parent, stem + suffix.replace(".", "_") + suffix)
            for path, (stem, suffix) in zip(inside, names, strict=True)]


def label_values(data: Data, rows: Sequence[Row]) -> dict[int, str]:
    """Value -> name of the classes that the masks of the rows hold, from 0 to the largest.

    Raises DataError when no row has a mask, or when its values are no class numbers.
    """
    rows = [row for row in rows if "mask" in data.cache.fields(row.index)]
    if not rows:
        raise DataError("label", "no sample has a label mask", "Put them in a folder `labels` beside `images`, same names.")
    found = sorted({value for row in rows for value in data.cache.counts(row.index) if value >= 0})
    names = data.manifest.mask_names
    top, known = max(found, default=0), len(names)
    if top + 1 > max(2 * len(found), known):  # more gaps than classes: grey values, not class numbers
        shown = ", ".join(map(str, found[:8])) + (", …" if len(found) > 8 else "")
        options = type(data.modality.options).model_fields
        mapping = ", ".join(f"{value}: {i}" for i, value in enumerate(found[:8]))
        raise DataError("mask", f"the masks hold the values {shown}, which are not class numbers 0, 1, 2, …",
                        f"Say what they mean: 'modality.{data.modality.name}.mask_values={{{mapping}}}'."
                        if "mask_values" in options else "Number the classes 0, 1, 2, …, or name them in a dataset.json.")
    return {v: (names[v] if v < known and names[v] else f"class {v}") for v in range(top + 1)}


class Segmentation(TaskSettings):
    """decoder: auto takes the encoder's own dense map, or its pyramid, or UNETR; light is one block; linear, with
    train.freeze={encoder: 1.0}, is a probe. width: channels at full resolution. overlap: of neighbouring windows at prediction.
    flips: axes mirrored and averaged at prediction (only where the training flips them too). batch_dice: Dice over the whole
    batch instead of per sample. tolerance: of the NSD, in the modality's unit.
    """

    kind = "segmentation"
    metric = "dice"
    fields: ClassVar[tuple[str, ...]] = ("mask",)
    decoder: Kind = "auto"
    width: int = 24
    overlap: Annotated[float, Field(ge=0, lt=1)] = 0.5
    flips: tuple[int, ...] = ()
    batch_dice: bool = False
    tolerance: float = 1.0

    def check(self, recipe: TaskRecipe) -> list[str]:
        problems, provides = [], recipe.encoder.provides
        dims = len(recipe.modality.axes)
        if recipe.modality.tokenizer().kinds:
            problems.append("a decoder needs one token for each place; set modality.….tokens: patch")
        if any(not 0 <= axis < dims for axis in self.flips):
            problems.append(f"flips {list(self.flips)} are not among the axes 0 to {dims - 1}")
        if self.decoder in ("light", "unetr") and "layers" not in provides:
            problems.append(f"decoder: {self.decoder} needs a plain transformer; this encoder has its own pyramid, use auto")
        unetr = self.decoder == "unetr" or (self.decoder == "auto" and not provides & {"dense", "pyramid"})
        patch: tuple[int, ...] = getattr(recipe.modality.options, "patch", ())
        if unetr and any(p & (p - 1) for p in patch):
            problems.append(f"UNETR's decoder doubles the resolution, and the patch {list(patch)} is no power of two; "
                            "use decoder: light")
        return problems

    def labelled(self, rows: Sequence[Row]) -> list[Row]:
        return [row for row in rows if "mask" in row.fields]

    def scope(self, data: Data) -> Scope:
        values = label_values(data, self.labelled(data.rows()))
        return Scope(values, tuple(name for v, name in values.items() if v > 0), data.modality.axes[0].unit)

    def build(self, assembly: Assembly, classes: int) -> SegmentationObjective:
        return SegmentationObjective(assembly, self, classes)
