"""Two-dimensional images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image as Pillow
from pydantic import Field, field_validator, model_validator

from meristem.errors import DataError
from meristem.modalities.base import Axis, Header, Sample, Settings
from meristem.modalities.facts import Facts
from meristem.modalities.image import identity, intake
from meristem.modalities.image.files import decode, decode_labels
from meristem.modalities.image.raster import ALIKE, Raster, dtype_limits, signs
from meristem.modalities.image.storage import to_integers
from meristem.modalities.lattice import Lattice, LatticeOptions, LatticeViewOptions, anchors
from meristem.modalities.lattice.labels import nearest, to_classes, to_values
from meristem.modalities.objects import Objects

IMAGENET = {1: ((0.449,), (0.226,)), 3: ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))}  # one channel: the three's mean
SLACK = 1.0  # pixels by which a box may stick out, as those of tools that count from 1 do
ENCODING = ("slope", "intercept", "limits", "inverted", "spacing")


class Window(Settings):
    """Values (after a DICOM's rescale) are cut to `window` and mapped to [0, 1]."""

    window: tuple[float, float]

    @field_validator("window")
    @classmethod
    def _rising(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[0] >= value[1]:
            raise ValueError(f"the window's low end must lie under its high end, got {list(value)}")
        return value


class ImageOptions(LatticeOptions):
    """How images are read.

    channels: grey files are replicated to 3, colour files become luma for 1; any other number must be the files' own, of one
    file or of one file per channel. With tokens: channel files may have fewer, which are the first kinds. normalise: `zscore`
    (each channel of each image), `unit` (the encoding's range, or a float image's own, to [0, 1]), `imagenet` (unit, then
    ImageNet's mean and std), or `window: [low, high]`. spacing: mm to resample to, along y and x; files that do not know theirs
    are refused. mask_values: pixel value -> class; null: as stored. max_pixels: larger files are refused before they are
    decoded. scales: finest and coarsest length, in the positions' unit, that the encoder must tell apart.
    """

    channels: int = Field(3, ge=1)
    patch: tuple[int, int] = (8, 8)
    normalise: Literal["zscore", "unit", "imagenet"] | Window = "zscore"
    spacing: float | tuple[float, float] | None = None
    mask_values: Mapping[int, int] | None = None
    max_pixels: int = 1 << 26
    scales: tuple[float, float] = (4.0, 512.0)

    @field_validator("patch", mode="before")
    @classmethod
    def _square(cls, value: object) -> object:
        return (value, value) if isinstance(value, int) else value

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.normalise == "imagenet" and self.channels not in IMAGENET:
            raise ValueError(f"imagenet normalisation is for 1 or 3 channels, not {self.channels}; use zscore or unit")
        if self.normalise == "imagenet" and self.tokens == "channel":
            raise ValueError("imagenet normalisation is for red, green and blue; with tokens: channel use zscore or unit")
        return self


class ImageViewOptions(LatticeViewOptions):
    """One view of an image; see `LatticeViewOptions`."""

    size: tuple[int, int]


class Image(Lattice):
    """PNG, JPEG, TIFF, BMP, single DICOM frames, and rows of packed arrays (`file.npz#train_images/17`).

    Positions are in mm where the file says how large its pixels are (DICOM; TIFF written by OME or ImageJ), else in pixels.
    The source grid is the picture as it is looked at: EXIF orientation is applied to images and masks.
    """

    name = "image"
    later = ("patch", "scales")
    likeness = ALIKE
    suffixes = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".dcm")
    Options = ImageOptions
    ViewOptions = ImageViewOptions
    grows: Mapping[str, tuple[int, ...]] = {"size": (0, 1)}
    options: ImageOptions

    def __init__(self, options: ImageOptions) -> None:
        super().__init__(options)
        unit = "px" if options.spacing is None else "mm"
        self.axes = tuple(Axis(name, unit, *options.scales) for name in "yx")

    def read(self, paths: Sequence[Path], fields: Mapping[str, Path] = {}) -> Sample:
        """See `Modality.read`. Raises DataError.

        Reasons: missing, empty, truncated, unreadable, bomb, frames, multi-frame, channels, shape, nan, range, mask,
        no-spacing.
        """
        raster = self._raster(paths)
        have = len(raster.array)
        array, spacing = raster.array, raster.spacing or (1.0, 1.0)
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise DataError("nan", f"{1 - np.isfinite(array).mean():.2%} of the pixels are NaN or infinite",
                            "Export the image again, or leave it out.")
        fingerprint = ALIKE.pack(-signs(array) if raster.inverted else signs(array))  # before the recipe's window
        source = array.shape[1:]
        masks = {name: self._mask(path, source) for name, path in fields.items()}
        limits = raster.limits
        if isinstance(self.options.normalise, Window):
            low, high = self.options.normalise.window
            limits = ((low - raster.intercept) / raster.slope, (high - raster.intercept) / raster.slope)
            array = _clip(array, *limits)
        if raster.inverted:
            array = _invert(array, limits)
        if self.options.spacing is not None:
            if raster.spacing is None:
                raise DataError("no-spacing", "the file does not say how large its pixels are, the recipe resamples to mm",
                                "Set modality.image.spacing=null to work in pixels.")
            array, masks = self._resample(array, masks, raster.spacing)
        scale, offset = self._statistics(array, limits)
        stored, a, b = to_integers(array)
        missing = self.channels - have  # with tokens: channel; what is not there holds nothing
        if missing:
            stored = np.concatenate([stored, np.zeros((missing, *stored.shape[1:]), stored.dtype)])
            scale, offset = (*scale, *[1.0] * missing), (*offset, *[0.0] * missing)
        exact = limits if stored.dtype == np.uint8 or isinstance(self.options.normalise, Window) else None
        black, white = exact or (float(array.min()), float(array.max()))
        factor = [n / m for n, m in zip(source, stored.shape[1:], strict=True)]
        (dy, y), (dx, x) = ((f * s, (f - 1) / 2 * s) for f, s in zip(factor, spacing, strict=True))
        header = Header(
            shape=stored.shape, affine=((dy, 0.0, y), (0.0, dx, x), (0.0, 0.0, 1.0)), spacing=(dy, dx),
            scale=tuple(a * s for s in scale), offset=tuple(b * s + o for s, o in zip(scale, offset, strict=True)),
            pad=(0.0,) * len(stored),
            source={"shape": list(source), "unit": "px" if raster.spacing is None else "mm",
                    "levels": [(black - b) / a, (white - b) / a],
                    **({"channels": have} if self.options.tokens == "channel" else {})},
            anchors=anchors(masks["mask"]) if "mask" in masks else ())
        return Sample(stored, header, masks, fingerprint=fingerprint)

    def statistics(self, array: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """(scale, offset) per channel, so that array (C, H, W) * scale + offset is normalised."""
        window = self.options.normalise
        return self._statistics(array, window.window if isinstance(window, Window) else dtype_limits(array.dtype))

    def _statistics(self, array: np.ndarray, limits: tuple[float, float] | None) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """limits: what becomes 0 and 1; None: the image's own range."""
        how, count = self.options.normalise, len(array)
        if how == "zscore":
            flat = np.array(array, np.float64, order="C").reshape(count, -1)  # np.std takes long over pixels of three channels
            mean = flat.mean(1)
            flat -= mean[:, None]
            std = np.sqrt(np.einsum("cp,cp->c", flat, flat) / flat.shape[1])
            std = np.where(std > 0, std, 1.0)
        else:
            low, high = limits or (float(array.min()), float(array.max()))
            width = high - low if high > low else 1.0
            centre, spread = IMAGENET[count] if how == "imagenet" else ((0.0,) * count, (1.0,) * count)
            mean, std = low + width * np.array(centre), width * np.array(spread)
        return tuple((1 / std).tolist()), tuple((-mean / std).tolist())

    def _raster(self, paths: Sequence[Path]) -> Raster:
        """One file, or the single-channel files of all channels joined."""
        want, limit = self.options.channels, self.options.max_pixels
        if len(paths) == 1:
            raster = decode(paths[0], want, limit)
            few = self.options.tokens == "channel" and len(raster.bare.array) < want
            return raster.bare if few else raster.with_channels(want)
        if len(paths) > want or (len(paths) < want and self.options.tokens == "patch"):
            raise DataError("channels", f"{len(paths)} files for {want} channels", "Give one file, or one per channel.")
        parts = [decode(path, 1, limit).with_channels(1) for path in paths]
        first = parts[0]
        for i, part in enumerate(parts[1:], 2):
            if part.array.shape != first.array.shape:
                sizes = f"{_size(part.array.shape[1:])}, the first {_size(first.array.shape[1:])}"
                raise DataError("shape", f"channel file {i} is {sizes}", "They must cover the same pixels.")
            if any(getattr(part, name) != getattr(first, name) for name in ENCODING):
                raise DataError("channels", f"channel file {i} differs from the first in encoding, rescale or pixel size",
                                "Export the channels alike.")
        return replace(first, array=np.concatenate([part.array for part in parts]))

    def _mask(self, path: Path, shape: tuple[int, ...]) -> np.ndarray:
        labels = decode_labels(path, self.options.max_pixels)
        if labels.shape != shape:
            raise DataError("shape", f"the mask is {_size(labels.shape)}, the image {_size(shape)}",
                            "They must cover the same pixels.")
        labels = to_classes(labels, self.options.mask_values, "modality.image.mask_values")
        return labels.astype(np.uint8 if labels.min() >= 0 and labels.max() < 256 else np.int16)

    def _resample(self, array: np.ndarray, masks: dict[str, np.ndarray], spacing: tuple[float, float]) -> tuple[
            np.ndarray, dict[str, np.ndarray]]:
        """To the recipe's spacing over the same field of view; labels by the nearest pixel."""
        target = np.broadcast_to(np.array(self.options.spacing, float), 2)
        size = tuple(max(round(n * s / float(t)), 1) for n, s, t in zip(array.shape[1:], spacing, target, strict=True))
        if size == array.shape[1:]:
            return array, masks
        values = torch.from_numpy(array.astype(np.float64))[None]
        smooth = F.interpolate(values, size, mode="bilinear", antialias=True)[0].numpy()
        resized = (smooth if array.dtype.kind == "f" else np.rint(smooth)).astype(array.dtype)
        return resized, {name: nearest(mask, size) for name, mask in masks.items()}

    def placed(self, objects: Objects, header: Header) -> Objects:
        """Pixels from the picture's corner to the positions' unit, where the first pixel's centre is 0. Raises DataError."""
        size = np.array(header.source["shape"], float)
        low, high = np.split(objects.box, 2, axis=1)
        out = (low < -SLACK) | (high > size + SLACK)
        if out.any():
            at = int(np.flatnonzero(out.any(1))[0])
            top, left, bottom, right = objects.box[at]
            raise DataError("box", f"box {at + 1}, from ({left:g}, {top:g}) to ({right:g}, {bottom:g}), reaches outside the "
                            f"image of {size[1]:g}×{size[0]:g} pixels",
                            "Correct it; was the image turned or resized after it was annotated?")
        pixel = self._pixel(header)
        corner = [(np.clip(x, 0, size) - 0.5) * pixel for x in (low, high)]
        return replace(objects, box=np.concatenate(corner, 1))

    def annotated(self, box: np.ndarray, header: Header) -> np.ndarray:
        """(K, 4) in source coordinates, as annotations have them: pixels of the source picture from its corner."""
        pixel = self._pixel(header)
        return np.clip(box / np.tile(pixel, 2) + 0.5, 0, np.tile(header.source["shape"], 2))

    @staticmethod
    def _pixel(header: Header) -> np.ndarray:
        """(2,) size of a pixel of the source file, in the positions' unit."""
        return np.array(header.spacing) * np.array(header.shape[1:]) / np.array(header.source["shape"])

    def facts(self, paths: Sequence[Path], sample: Sample) -> Facts:
        """See `Telling`."""
        return intake.facts(paths, self.options.channels if len(paths) == 1 else 1, self.options.max_pixels)

    def identity(self, path: Path) -> Sequence[str]:
        """See `Identifying`."""
        return identity.of_file(path)

    def write(self, prediction: np.ndarray, header: Header, path: Path) -> Path:
        """A grey PNG of the source's size with the recipe's mask values; the suffix becomes .png.

        Where several pixel values mean one class, the smallest is written.
        """
        labels = nearest(np.asarray(prediction), tuple(header.source["shape"]))
        labels = to_values(labels, self.options.mask_values, "modality.image.mask_values")
        if labels.min() < 0 or labels.max() > 65535:
            raise DataError("mask", f"labels from {labels.min()} to {labels.max()} do not fit a PNG",
                            "Number the classes from 0.")
        path = path.with_suffix(".png") if path.suffix.lower() in self.suffixes else path.with_name(f"{path.name}.png")
        Pillow.fromarray(labels.astype(np.uint8 if labels.max() < 256 else np.uint16)).save(path)
        return path


def _fit(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """As `dtype` if its range holds all values."""
    info = np.iinfo(dtype)
    return array.astype(dtype) if array.min() >= info.min and array.max() <= info.max else array


def _clip(array: np.ndarray, low: float, high: float) -> np.ndarray:
    if array.dtype.kind == "f":
        return array.clip(low, high)
    return _fit(array.astype(np.int64).clip(round(low), round(high)), array.dtype)


def _invert(array: np.ndarray, limits: tuple[float, float] | None) -> np.ndarray:
    """Low becomes high within the limits (or the image's own range)."""
    low, high = limits or (array.min(), array.max())
    if array.dtype.kind == "f":
        return (low + high - array).astype(array.dtype)
    return _fit(round(low + high) - array.astype(np.int64), array.dtype)


def _size(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))
