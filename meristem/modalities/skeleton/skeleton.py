"""Skeleton sequences as a modality: joints of people on a lattice of frames and joints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from meristem.errors import DataError
from meristem.modalities.base import (
    Axis,
    Draw,
    Element,
    Header,
    Links,
    Look,
    Sample,
    Settings,
    View,
    ViewSettings,
    split_element,
)
from meristem.modalities.facts import Facts
from meristem.modalities.frame import Frame
from meristem.modalities.lattice.labels import nearest
from meristem.modalities.rng import Rng
from meristem.modalities.skeleton import drawing, files, intake, poses
from meristem.modalities.skeleton.options import SkeletonOptions, SkeletonViewOptions
from meristem.modalities.skeleton.tokenizer import SkeletonTokenizer

CLIP = "frames"  # `file#frames/120`: the sample that starts at frame 120


class Skeleton:
    """People stored as float32 (dims, T, people · joints), NaN where a joint was not seen; a person's joints stand together.

    One axis is a coordinate: seconds, of a sample those of its recording. Which joint comes next to which means nothing, so
    that joints have no position but a name; see `SkeletonTokenizer`.
    """

    name = "skeleton"
    version = 1
    suffixes: tuple[str, ...] = files.SUFFIXES
    members: tuple[str, ...] = ()
    later = ("segment", "seconds")
    Options: type[Settings] = SkeletonOptions
    ViewOptions: type[ViewSettings] = SkeletonViewOptions
    grows: Mapping[str, tuple[int, ...]] = {"frames": (0,)}
    options: SkeletonOptions

    def __init__(self, options: SkeletonOptions) -> None:
        self.options, self.layout = options, options.joints
        self.channels = self.layout.dims
        self.likeness = poses.alike(options.layout or "ntu")
        self.axes = (Axis("t", "s", *options.seconds),)

    def read(self, paths: Sequence[Path], fields: Mapping[str, Path] = {}) -> Sample:
        """One recording, or a window of one. Raises DataError.

        Reasons: missing, unreadable, truncated, bodies, joints, frames, nan, empty, layout, several.
        """
        if len(paths) != 1:
            raise DataError("several", f"a sequence of {len(paths)} files", "Give one file per sequence.")
        element = split_element(paths[0])
        found = files.recording(element[0] if element else paths[0])
        settled = self if self.options.layout is not None else self.fitted(paths)  # a file read alone, without its data set
        if found.layout is not settled.layout:
            raise DataError("layout", f"its people have {len(found.layout)} joints, those of the recipe {len(settled.layout)}",
                            "Keep recordings of different devices apart, or correct modality.skeleton.layout.")
        first, count = self._window(len(found.place), element[2] if element else 0)
        return settled._sample(found, first, count)

    def _sample(self, found: files.Recording, first: int, count: int) -> Sample:
        people, layout = self.options.people, self.layout
        place = found.place[first:first + count, :people]
        if np.isnan(place).all():
            raise DataError("empty", "nobody is seen in this part of the recording", "Leave it out.")
        if self.options.centre:
            place = place - _middle(place, layout.centre)
        seen = np.full((layout.dims, count, people, len(layout)), np.nan, np.float32)
        seen[:, :, :place.shape[1]] = place.transpose(3, 0, 1, 2)
        array = seen.reshape(layout.dims, count, -1)
        period = 1 / (self.options.fps or layout.fps)
        affine = ((period, 0.0, first * period), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
        c = layout.dims
        header = Header(array.shape, affine, (period, 1.0), (1.0,) * c, (0.0,) * c, (float("nan"),) * c,
                        {"frames": len(found.place), "first": first})
        return Sample(array, header, notes={"frames": float(count), "seconds": count * period,
                                            "joints not seen": float(np.isnan(array[0]).mean())},
                      fingerprint=poses.fingerprint(array, len(layout), period, self.likeness))

    def _window(self, total: int, first: int) -> tuple[int, int]:
        w = self.options.windows
        return (first, total - first) if w is None else (first, min(w.frames, total - first))

    def statistics(self, array: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Nothing is left to do: coordinates stay in their unit."""
        return (1.0,) * len(array), (0.0,) * len(array)

    def fetch(self, paths: Sequence[Path], header: Header, draws: Sequence[Draw]) -> list[np.ndarray]:
        raise NotImplementedError  # `read` leaves nothing in its files

    def edges(self, header: Header, draw: Draw) -> Links | None:
        return None

    def elements(self, path: Path) -> Sequence[Element] | None:
        """The windows of a recording, or the recording itself, with the action and the performer that it or its name tells.

        None where nothing is told and nothing divided; none in a file that holds no skeletons.
        """
        if not files.recognised(path):
            return []
        label, subject = files.told(path)
        label, w = label if self.options.labels == "told" else None, self.options.windows
        if w is None:
            return None if label is None and subject is None else [Element(f"{CLIP}/0", label, subject)]
        starts = files.starts(len(files.recording(path).place), w.frames, w.step)
        return [Element(f"{CLIP}/{start}", label, subject) for start in starts]

    def fitted(self, paths: Sequence[Path]) -> Self:
        """With the layout of the first file, where the recipe names none."""
        if self.options.layout is not None or not paths:
            return self
        element = split_element(paths[0])
        return type(self)(self.options.model_copy(update={"layout": files.kind(element[0] if element else paths[0])}))

    @staticmethod
    def recognised(path: Path) -> bool:
        """Whether a file of one of its suffixes holds skeletons."""
        return files.recognised(path)

    def draw(self, view: ViewSettings, header: Header, look: Look) -> Draw:
        """See `drawing.draw`."""
        assert isinstance(view, SkeletonViewOptions)
        return drawing.draw(view, header, look, self.layout)

    def load(self, window: np.ndarray, draw: Draw, interpolate: bool) -> Tensor:
        """A window (C, n, J) at the frames of the view (C, T, J): linear in time between the two frames beside each, not seen
        where one of them was not; or the nearest, for labels."""
        (n, _), (frames, _) = draw.size, draw.shape
        if n == frames:
            return torch.from_numpy(np.ascontiguousarray(window))
        if not interpolate:
            return torch.from_numpy(np.ascontiguousarray(nearest(window, draw.shape)))
        at = np.clip((np.arange(frames) + 0.5) * n / frames - 0.5, 0, n - 1)
        low = np.minimum(at.astype(int), n - 1)
        share = (at - low).astype(np.float32)[:, None]
        below, above = window[:, low], window[:, np.minimum(low + 1, n - 1)]
        return torch.from_numpy(np.where(share > 0, below + share * (above - below), below))

    @torch.no_grad()
    def augment(self, view: View, settings: ViewSettings) -> View:
        """See `drawing.augment`."""
        assert isinstance(settings, SkeletonViewOptions)
        return drawing.augment(view, settings, self.layout)

    def tokenizer(self) -> SkeletonTokenizer:
        return SkeletonTokenizer(self.layout.dims, len(self.layout), self.options.people, self.options.segment)

    def example(self, size: tuple[int, ...], rng: Rng) -> View:
        """A random walk of every joint, all seen."""
        rows, device, shape = len(rng.key), rng.key.device, (size[0], self.options.people * len(self.layout))
        array = rng.normal("start", self.channels, 1, shape[1]) + rng.normal("steps", self.channels, *shape).cumsum(2) / 20
        period = 1 / (self.options.fps or self.layout.fps)
        frame = Frame(torch.diag(torch.tensor([period, 1, 1])).expand(rows, -1, -1), shape,
                      torch.tensor([[period, 1.0]]).expand(rows, -1), ("s",))
        return View("example", array, frame.to(device), torch.arange(rows, device=device), torch.zeros_like(rng.key),
                    fields={"mask": rng.integers("mask", 2, *shape)}, weight=torch.ones(rows, 1, *shape, device=device))

    def grown(self, times: float) -> Self:
        return self

    def noise(self, size: tuple[int, ...], rng: Rng) -> View:
        return self.example(size, rng)

    def facts(self, paths: Sequence[Path], sample: Sample) -> Facts:
        """See `Telling`."""
        element = split_element(paths[0])
        return intake.facts(files.recording(element[0] if element else paths[0]), self.options.fps)

    def write(self, prediction: np.ndarray, header: Header, path: Path) -> Path:
        """Labels (T, people · joints) as .npy, a row for each frame of the file; −1 where the sample is only a part of it."""
        labels = np.full((header.source["frames"], prediction.shape[1]), -1, np.int16)
        labels[header.source["first"]:header.source["first"] + len(prediction)] = prediction
        suffix = files.suffix(path)
        path = path.with_name(f"{path.name[:-len(suffix)] if suffix else path.name}.npy")
        np.save(path, labels)
        return path


def _middle(place: np.ndarray, centre: int) -> np.ndarray:
    """(D,) where the first person's centre is first seen, or the middle of all that is seen if it never is."""
    seen = np.flatnonzero(~np.isnan(place[:, 0, centre]).any(-1))
    middle: np.ndarray = place[seen[0], 0, centre] if len(seen) else np.nanmean(place, (0, 1, 2))
    return middle
