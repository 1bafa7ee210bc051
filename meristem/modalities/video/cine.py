"""Multi-frame DICOM: ultrasound and angiography. Only the elements listed here are read: nothing that identifies a person."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pydicom
from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi, iter_pixels

from meristem.errors import DataError
from meristem.modalities.documents import opened
from meristem.modalities.image.dicom import DAMAGED, TAGS, dataset, pixel_spacing

TIMES = ("FrameTime", "FrameTimeVector", "CineRate", "RecommendedDisplayFrameRate")
MORE = ("SequenceOfUltrasoundRegions", "WindowCenter", "WindowWidth", "VOILUTFunction", "VOILUTSequence")
CENTIMETRE, PLANE = 3, 1  # PS3.3 C.8.5.5.1.15, C.8.5.5.1.1
AGAIN = "Export the file again."


class Cine:
    """See `Frames`. Frames are decoded one by one as they are asked for.

    More than 8 bits go to 8 by the file's window or VOI table, else by the range of the bits stored. fps: where the file says
    neither times nor a rate.
    """

    reader = "dicom"

    def __init__(self, path: Path, fps: float, max_pixels: int) -> None:
        self.path = path
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they quote the file's values
            self._ds = ds = dataset(path, (*(t for t in TAGS if t != "PixelData"), *TIMES, *MORE), pixels=False)
            try:
                count = int(ds.get("NumberOfFrames") or 1)
                self.size = int(ds.get("Rows") or 0), int(ds.get("Columns") or 0)
                pixels = self.size[0] * self.size[1]
                if pixels == 0:
                    raise DataError("frames", "the DICOM file holds no pixels", AGAIN)
                if pixels > max_pixels:
                    raise DataError("bomb", f"the video claims {pixels:,} pixels a frame, more than the limit of "
                                    f"{max_pixels:,}", "If it is genuine, raise modality.video.max_pixels.")
                self.times = _times(ds, count, fps)
                self.spacing = pixel_spacing(ds) or _region_spacing(ds)
                self._table = _to_bytes(ds)
            except (*DAMAGED, NotImplementedError):
                raise DataError("unreadable", "an element of the DICOM header has no usable value", AGAIN) from None
        self.names: Sequence[str] = [str(i) for i in range(count)]
        self.read([0, count - 1])  # a missing decoder or a cut file shows here

    def read(self, indices: Sequence[int]) -> np.ndarray:
        want, place = np.unique(np.asarray(indices, np.int64), return_inverse=True)
        frames = np.empty((len(want), *self.size, 3), np.uint8)
        for k, frame in enumerate(self._decode(want.tolist())):
            frames[k] = frame
        return frames[place]

    def all(self) -> Iterator[np.ndarray | None]:
        yield from self._decode(range(len(self.times)))

    def close(self) -> None:
        """Nothing stays open between reads."""

    def _decode(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                with opened(self.path) as data:
                    for frame in iter_pixels(data, indices=indices):
                        yield self._rgb(frame)
            except (RuntimeError, NotImplementedError):
                syntax = self._ds.file_meta.get("TransferSyntaxUID")
                raise DataError("unreadable", f"no decoder for the transfer syntax '{getattr(syntax, 'name', 'unknown')}', or "
                                "damaged frames", "Export it uncompressed, or install pydicom's decoder for it.") from None
            except DAMAGED:
                raise DataError("truncated", "the DICOM pixel data end early or are damaged", AGAIN) from None

    def _rgb(self, frame: np.ndarray) -> np.ndarray:
        if str(self._ds.PhotometricInterpretation) == "PALETTE COLOR":
            frame = apply_color_lut(frame, self._ds)
            return (frame >> 8).astype(np.uint8) if frame.dtype.itemsize > 1 else frame
        if frame.ndim == 3:
            return frame if frame.dtype == np.uint8 else (frame >> int(self._ds.BitsStored) - 8).astype(np.uint8)
        low, table = self._table
        grey = table[np.clip(frame.astype(np.int64) - low, 0, len(table) - 1)]
        return np.repeat(grey[..., None], 3, axis=-1)


def _times(ds: pydicom.Dataset, count: int, fps: float) -> np.ndarray:
    """s from the first frame: by the time vector, the frame time (ms), the cine rate or the display rate (PS3.3 C.7.6.5)."""
    vector = ds.get("FrameTimeVector")
    if vector is not None and np.size(vector) == count:
        times = np.cumsum(np.atleast_1d(np.array(vector, np.float64))) / 1000
        if (np.diff(times) <= 0).any():
            raise DataError("unreadable", "the frames' times (FrameTimeVector) do not rise", AGAIN)
        return times - times[0]
    frame_time = float(ds.get("FrameTime") or 0)
    rates = (1000 / frame_time if frame_time > 0 else 0.0, *(float(ds.get(t) or 0) for t in TIMES[2:]))
    return np.arange(count) / next((r for r in rates if r > 0), fps)


def _region_spacing(ds: pydicom.Dataset) -> tuple[float, float] | None:
    """mm along y and x of the largest two-dimensional ultrasound region that is measured in cm (PS3.3 C.8.5.5), or None."""
    best: tuple[float, tuple[float, float] | None] = (0.0, None)
    for region in ds.get("SequenceOfUltrasoundRegions") or ():
        if {region.get("PhysicalUnitsXDirection"), region.get("PhysicalUnitsYDirection")} != {CENTIMETRE}:
            continue
        y, x = (10 * abs(float(region.get(f"PhysicalDelta{axis}") or 0)) for axis in "YX")
        area = float((region.RegionLocationMaxX1 - region.RegionLocationMinX0 + 1)
                     * (region.RegionLocationMaxY1 - region.RegionLocationMinY0 + 1))
        if region.get("RegionSpatialFormat") == PLANE and y > 0 and x > 0 and area > best[0]:
            best = area, (y, x)
    return best[1]


def _to_bytes(ds: pydicom.Dataset) -> tuple[int, np.ndarray]:
    """The lowest storable grey value, and a byte for each from there on."""
    bits, signed = int(ds.BitsStored), bool(ds.get("PixelRepresentation"))
    if bits > 16:
        raise DataError("unreadable", f"frames of {bits} bits are not video", "Read the file as a volume.")
    low = -(1 << bits - 1) if signed else 0
    stored = np.arange(low, low + (1 << bits))
    value = np.asarray(apply_modality_lut(stored, ds), np.float64)
    window = [np.atleast_1d(ds.get(name)) for name in ("WindowCenter", "WindowWidth")]
    if bits > 8 and ds.get("VOILUTSequence"):
        grey = apply_voi(np.rint(value).astype(np.int64), ds).astype(np.float64)
        depth = int(ds.VOILUTSequence[0].LUTDescriptor[2])
        grey /= (1 << depth) - 1
    elif bits > 8 and all(w[0] is not None for w in window):
        grey = _windowed(value, float(window[0][0]), float(window[1][0]), str(ds.get("VOILUTFunction") or "LINEAR"))
    else:
        grey = (value - value.min()) / max(np.ptp(value), 1)
    if str(ds.PhotometricInterpretation) == "MONOCHROME1":
        grey = 1 - grey
    return low, np.rint(255 * grey.clip(0, 1)).astype(np.uint8)


def _windowed(value: np.ndarray, centre: float, width: float, function: str) -> np.ndarray:
    """PS3.3 C.11.2.1.2 and C.11.2.1.3, to [0, 1]."""
    if function == "SIGMOID":
        return np.asarray(1 / (1 + np.exp(-4 * (value - centre) / width)))
    if function == "LINEAR_EXACT":
        return (value - centre) / width + 0.5
    return (value - (centre - 0.5)) / max(width - 1, 1e-6) + 0.5
