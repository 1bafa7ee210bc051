"""Video clips."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image as Pillow
from torch import Tensor

from meristem.errors import DataError
from meristem.modalities.base import Axis, Draw, Header, Look, Sample, View, ViewSettings, raw_pad
from meristem.modalities.facts import Facts
from meristem.modalities.image.image import IMAGENET
from meristem.modalities.lattice import Lattice
from meristem.modalities.lattice.drawing import draw as draw_frames
from meristem.modalities.lattice.intensity import SPANNED, blur
from meristem.modalities.lattice.labels import nearest, to_classes, to_values
from meristem.modalities.objects import Objects
from meristem.modalities.video import intake
from meristem.modalities.video.folder import SUFFIXES
from meristem.modalities.video.masks import UNKNOWN, first_number, read_masks
from meristem.modalities.video.moments import ALIKE, Moments
from meristem.modalities.video.options import VideoOptions, VideoViewOptions
from meristem.modalities.video.points import mark, read_points
from meristem.modalities.video.readers import Frames, open_video, scan
from meristem.modalities.video.sampling import duration, times
from meristem.modalities.video.sampling import frames as choose_frames

DECODED = 16  # frames that are held at full size at once
LOOKED_AT = 5  # frames whose brightness is told, and which are searched for text
OVERRUN = 1.0  # s that a segment may reach past the last frame: durations are rounded, and containers count them differently


class Video(Lattice):
    """Films, folders of numbered frames, and multi-frame DICOM cine (ultrasound, angiography), positions in seconds and pixels.

    Lattice (frames, rows, columns). A view's seconds are its own: they say at what rate it plays, and neither where in the
    file it lies nor whether it was sped up, reversed or shuffled.
    """

    name = "video"
    likeness = ALIKE
    suffixes = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".ts", ".dcm")
    members = SUFFIXES
    later = ("patch", "scales", "seconds")
    Options = VideoOptions
    ViewOptions = VideoViewOptions
    grows: Mapping[str, tuple[int, ...]] = {"frames": (0,), "size": (1, 2)}
    options: VideoOptions
    operations = {**SPANNED, "blur": lambda x, sigma: _each_frame(x, sigma)}

    def __init__(self, options: VideoOptions) -> None:
        super().__init__(options)
        self.axes = (Axis("t", "s", *options.seconds), *(Axis(name, options.unit, *options.scales) for name in "yx"))

    def read(self, paths: Sequence[Path], fields: Mapping[str, Path] = {}) -> Sample:
        """See `Modality.read`. Every frame is decoded once, whether it is stored or not, so that damage shows now.

        Raises DataError: missing, empty, truncated, unreadable, frames, bomb, no-spacing, shape, mask.
        """
        options = self.options
        video = open_video(paths[0], options.reader, options.fps, options.max_pixels)
        try:
            if options.unit == "mm" and video.spacing is None:
                raise DataError("no-spacing", "the file does not say how large its pixels are, the recipe wants mm",
                                "Set modality.video.unit=px to work in pixels.")
            source = (len(video.times), *video.size)
            height, width = _short_side(video.size, options.resize)
            kept: list[np.ndarray] = []
            moments = Moments(video.times)

            def keep(part: np.ndarray) -> None:
                moments.see(part)
                if options.store == "decoded":
                    kept.append(_resized(part, (height, width)))

            mean, std = scan(video, keep)
            masks = {name: self._masks(path, video, (height, width)) for name, path in fields.items()}
            shape = (3, source[0], height, width)
            array = np.ascontiguousarray(np.concatenate(kept).transpose(3, 0, 1, 2)) if kept else None
            return Sample(array, self._header(video, shape, mean, std), masks, fingerprint=moments.fingerprint)
        finally:
            video.close()

    def _header(self, video: Frames, shape: tuple[int, ...], mean: np.ndarray, std: np.ndarray) -> Header:
        period, steady = _period(video.times, self.options.fps)
        mm = video.spacing if self.options.unit == "mm" and video.spacing else (1.0, 1.0)
        factor = [n / m for n, m in zip(video.size, shape[2:], strict=True)]
        (dy, y), (dx, x) = ((f * s, (f - 1) / 2 * s) for f, s in zip(factor, mm, strict=True))
        # in pixels a view's step is one pixel of what it shows, however the frames were stored
        spacing = (period, dy, dx) if self.options.unit == "mm" else (period, 1.0, 1.0)
        if self.options.normalise == "imagenet":
            mean, std = (255 * np.array(each) for each in IMAGENET[3])
        elif self.options.normalise == "unit":
            mean, std = np.zeros(3), np.full(3, 255.0)
        scale, offset = _standard(mean, std)
        return Header(
            shape=shape, affine=((period, 0.0, 0.0, 0.0), (0.0, dy, 0.0, y), (0.0, 0.0, dx, x), (0.0, 0.0, 0.0, 1.0)),
            spacing=spacing, scale=scale, offset=offset, pad=(0.0, 0.0, 0.0),
            source={"shape": [len(video.times), *video.size], "unit": self.options.unit, "levels": [0, 255],
                    "reader": video.reader, "first": first_number(video.names),
                    **({} if steady else {"times": video.times.tolist()})})

    def _masks(self, path: Path, video: Frames, size: tuple[int, int]) -> np.ndarray:
        """int16 (T, *size): label maps of a folder of pictures, or points of a file, which know no `mask_values`."""
        if path.is_file():
            return mark(read_points(path, video.names), video.size, size)
        labels = read_masks(path, video.names, video.size)
        labels = to_classes(labels, self.options.mask_values, "modality.video.mask_values", nobody=UNKNOWN)
        return nearest(labels, (len(labels), *size)).astype(np.int16, copy=False)

    def statistics(self, array: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """(scale, offset) per channel, so that array (3, T, H, W) * scale + offset has mean 0 and variance 1."""
        return _standard(array.mean((1, 2, 3), np.float64), array.std((1, 2, 3), np.float64))

    def fetch(self, paths: Sequence[Path], header: Header, draws: Sequence[Draw]) -> list[np.ndarray]:
        """See `Modality.fetch`; frames are cropped and resized as they are decoded, so windows are (3, *shape) already."""
        video = open_video(paths[0], header.source["reader"], self.options.fps, self.options.max_pixels)
        grey = raw_pad(header, "|u1")
        windows = [np.empty((*draw.shape, 3), np.uint8) for draw in draws]
        places = [np.array(draw.index or range(draw.start[0], draw.start[0] + draw.size[0])) for draw in draws]
        places = [np.where((p >= 0) & (p < header.shape[1]), p, -1) for p in places]
        try:
            for window, shown in zip(windows, places, strict=True):
                window[shown < 0] = grey
            wanted = np.unique(np.concatenate(places))
            wanted = wanted[wanted >= 0]
            for first in range(0, len(wanted), DECODED):
                part = wanted[first:first + DECODED]
                decoded = video.read(part.tolist())
                for draw, window, shown in zip(draws, windows, places, strict=True):
                    here = np.flatnonzero(np.isin(shown, part))
                    if len(here):
                        frames, back = np.unique(np.searchsorted(part, shown[here]), return_inverse=True)
                        cut = _cut(decoded, draw.start[1:], draw.size[1:], grey)[frames]
                        window[here] = _resized(cut, draw.shape[1:])[back]
        finally:
            video.close()
        return [window.transpose(3, 0, 1, 2) for window in windows]

    def draw(self, view: ViewSettings, header: Header, look: Look) -> Draw:
        """See `VideoViewOptions`."""
        assert isinstance(view, VideoViewOptions)
        index, step, labels = choose_frames(view, header, look)
        still = replace(header, shape=(header.shape[0], *header.shape[2:]))
        frame = draw_frames(view.of_frames(), still, self.span(header), look)
        start, size = frame.start, frame.size
        if view.grid is not None and view.grid[1] > 1:
            room = np.array(header.shape[2:]) - size
            along, place = int(room.argmax()), look.number % view.grid[1] / (view.grid[1] - 1)
            start = tuple(round(room[a] * place) if a == along and room[a] > 0 else s for a, s in enumerate(start))
        params = dict(frame.params) | {name: np.int64(value) for name, value in labels.items()}
        if "flip" in params:
            params["flip"] = np.concatenate([np.zeros(1, np.float32), params["flip"]])
        first = int(index[index >= 0].min())
        return Draw((first, *start), (int(index.max()) - first + 1, *size), (len(index), *frame.shape), params,
                    tuple(index.tolist()), (step, *header.spacing[1:]))

    def load(self, window: np.ndarray, draw: Draw, interpolate: bool) -> Tensor:
        """Frames as stored (…, n, *size) or fetched (…, n, *shape), to the view's rows and columns."""
        if window.shape[-2:] == draw.shape[1:]:
            return torch.from_numpy(np.ascontiguousarray(window))
        if not interpolate:
            return torch.from_numpy(np.ascontiguousarray(nearest(window, draw.shape[1:])))
        frames = _resized(np.ascontiguousarray(window.transpose(1, 2, 3, 0)), draw.shape[1:])
        return torch.from_numpy(frames).permute(3, 0, 1, 2)

    @torch.no_grad()
    def augment(self, view: View, settings: ViewSettings) -> View:
        """As `Lattice.augment`, then turns, then differences of frames."""
        assert isinstance(settings, VideoViewOptions)
        frames, rows, columns = settings.size
        view = super().augment(view, settings.model_copy(update={"size": (frames + settings.residual, rows, columns)}))
        if settings.turn:
            view = _turned(view)
        return _differences(view) if settings.residual else view

    def placed(self, objects: Objects, header: Header) -> Objects:
        """Segments in seconds, cut to what was decoded, where the i-th frame comes on screen at i times the period of frames.

        Raises DataError (box).
        """
        last = duration(header)
        out = (objects.box[:, 1] > last + OVERRUN) | (objects.box[:, 0] >= last)
        if out.any():
            at = int(np.flatnonzero(out)[0])
            start, end = objects.box[at]
            raise DataError("box", f"segment {at + 1}, from {start:g} to {end:g} s, lies outside the {last:g} s that were "
                            "decoded",
                            "Correct it; was the video cut after it was annotated?")
        seconds, steps = _clock(header)
        return replace(objects, box=np.interp(objects.box, seconds, steps))

    def annotated(self, box: np.ndarray, header: Header) -> np.ndarray:
        """The inverse: (K, 2) in seconds, cut to what was decoded."""
        seconds, steps = _clock(header)
        return np.interp(box, steps, seconds)

    def facts(self, paths: Sequence[Path], sample: Sample) -> Facts:
        """See `Telling`."""
        header = sample.header
        shown = np.linspace(0, header.shape[1] - 1, LOOKED_AT).round().astype(int).tolist()
        if sample.array is None:
            size = (LOOKED_AT, *header.shape[2:])
            frames, = self.fetch(paths, header, [Draw((0, 0, 0), size, size, index=tuple(shown))])
        else:
            frames = sample.array[:, shown]
        return intake.facts(paths[0], frames, times(header), "times" not in header.source, tuple(header.source["shape"][1:]))

    def identity(self, path: Path) -> Sequence[str]:
        """See `Identifying`."""
        return intake.identity(path)

    def write(self, prediction: np.ndarray, header: Header, path: Path) -> Path:
        """Label maps (T, H, W) as a folder of grey PNGs of the source's size, numbered as its frames. Returns the folder."""
        labels = nearest(np.asarray(prediction), tuple(header.source["shape"]))
        labels = to_values(labels, self.options.mask_values, "modality.video.mask_values")
        folder = path.with_suffix("") if path.suffix.lower() in self.suffixes else path
        folder.mkdir(parents=True, exist_ok=True)
        labels = labels.astype(np.uint8 if labels.max() < 256 else np.uint16)
        for i, frame in enumerate(labels, header.source["first"]):
            Pillow.fromarray(frame).save(folder / f"{i:05d}.png")
        return folder


def _clock(header: Header) -> tuple[np.ndarray, np.ndarray]:
    """(T+1,) seconds at which frames come on screen, and the last one leaves it; and the same by the period of frames."""
    return np.append(times(header), duration(header)), np.arange(header.shape[1] + 1) * header.spacing[0]


def _standard(mean: np.ndarray, std: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(scale, offset) that take mean to 0 and std to 1; a channel that does not vary is only moved."""
    std = np.where(std > 0, std, 1.0)
    return tuple((1 / std).tolist()), tuple((-mean / std).tolist())


def _period(times: np.ndarray, fps: float) -> tuple[float, bool]:
    """Seconds from frame to frame, and whether they say when every frame is shown: else they are the most usual ones."""
    if len(times) < 2:
        return 1 / fps, True
    mean = float(times[-1]) / (len(times) - 1)
    if np.abs(times - mean * np.arange(len(times))).max() < mean / 4:
        return mean, True
    return float(np.median(np.diff(times))), False


def _short_side(size: tuple[int, int], short: int | None) -> tuple[int, int]:
    """size with its shorter side shrunk to `short`; never enlarged."""
    factor = 1.0 if short is None else min(short / min(size), 1.0)
    return round(size[0] * factor), round(size[1] * factor)


def _resized(frames: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """uint8 frames (n, H, W, 3) to (n, *size, 3), bilinear with averaging where it shrinks, in integers."""
    if frames.shape[1:3] == tuple(size):
        return frames
    x = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)  # channels last: torch's fast path for uint8
    resized: np.ndarray = F.interpolate(x, tuple(size), mode="bilinear", antialias=True).permute(0, 2, 3, 1).numpy()
    return resized


def _cut(frames: np.ndarray, start: tuple[int, ...], size: tuple[int, ...], pad: np.ndarray) -> np.ndarray:
    """A box of frames (n, H, W, 3); what lies outside is padded."""
    low = [max(a, 0) for a in start]
    high = [min(a + n, whole) for a, n, whole in zip(start, size, frames.shape[1:3], strict=True)]
    inside = frames[:, low[0]:high[0], low[1]:high[1]]
    if inside.shape[1:3] == tuple(size):
        return inside
    out = np.empty((len(frames), *size, 3), frames.dtype)
    out[:] = pad
    y, x = low[0] - start[0], low[1] - start[1]
    out[:, y:y + inside.shape[1], x:x + inside.shape[2]] = inside
    return out


def _each_frame(x: Tensor, sigma: Tensor) -> Tensor:
    """Blur (B, C, T, H, W) within frames."""
    frames = x.transpose(1, 2).flatten(0, 1)
    return blur(frames, sigma.repeat_interleave(x.shape[2])).unflatten(0, (len(x), -1)).transpose(1, 2).contiguous()


def _turned(view: View) -> View:
    """Each clip by its own number of right angles, rows towards columns; the frame with it."""
    turns = view.params["turn"]
    array, weight = view.array.clone(), None if view.weight is None else view.weight.clone()
    fields = {name: x.clone() for name, x in view.fields.items()}
    side = view.array.shape[-1] - 1
    matrix = torch.eye(4, device=array.device).repeat(len(view), 1, 1)
    for k, (linear, corner) in enumerate((([[0, 1], [-1, 0]], [0, side]), ([[-1, 0], [0, -1]], [side, side]),
                                          ([[0, -1], [1, 0]], [side, 0])), 1):
        rows = (turns == k).nonzero()[:, 0]
        for x in (array, *fields.values(), *(() if weight is None else (weight,))):
            x[rows] = x[rows].rot90(k, (-2, -1))
        matrix[rows, 1:3, 1:3] = torch.tensor(linear, dtype=matrix.dtype, device=array.device)
        matrix[rows, 1:3, 3] = torch.tensor(corner, dtype=matrix.dtype, device=array.device)
    return replace(view, array=array, weight=weight, fields=fields, frame=view.frame.compose(matrix))


def _differences(view: View) -> View:
    """Each frame's change to the next, which lies half a step after it; one frame less."""
    matrix = torch.eye(4, device=view.array.device).repeat(len(view), 1, 1)
    matrix[:, 0, 3] = 0.5
    weight = None if view.weight is None else view.weight[:, :, 1:] * view.weight[:, :, :-1]
    shape = (view.array.shape[2] - 1, *view.array.shape[3:])
    return replace(view, array=view.array[:, :, 1:] - view.array[:, :, :-1], weight=weight,
                   fields={name: x[:, :-1] for name, x in view.fields.items()}, frame=view.frame.compose(matrix, shape))
