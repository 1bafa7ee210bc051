"""A folder whose pictures are the frames of one video, in the natural order of their names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from meristem.errors import DataError
from meristem.modalities.base import member_files
from meristem.modalities.image.files import decode
from meristem.modalities.image.raster import Raster

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff")


class Folder:
    """See `Frames`. fps: pictures do not say when they were taken."""

    reader = "folder"

    def __init__(self, path: Path, fps: float, max_pixels: int) -> None:
        self._files = member_files(path, SUFFIXES)
        if not self._files:
            raise DataError("frames", f"the folder holds no picture ({', '.join(SUFFIXES)})", "Leave it out.")
        self._max_pixels = max_pixels
        first = decode(self._files[0], 3, max_pixels)
        self.size: tuple[int, int] = first.array.shape[1:]
        self.spacing = first.spacing
        self.times = np.arange(len(self._files)) / fps
        self.names: Sequence[str] = [f.stem for f in self._files]

    def read(self, indices: Sequence[int]) -> np.ndarray:
        want, place = np.unique(np.asarray(indices, np.int64), return_inverse=True)
        frames = np.empty((len(want), *self.size, 3), np.uint8)
        for k, i in enumerate(want):
            frames[k] = self._frame(int(i))
        return frames[place]

    def all(self) -> Iterator[np.ndarray | None]:
        """An unreadable picture raises: its own reason says more than that it is damaged."""
        for i in range(len(self._files)):
            yield self._frame(i)

    def close(self) -> None:
        """Nothing stays open between reads."""

    def _frame(self, i: int) -> np.ndarray:
        try:
            raster = decode(self._files[i], 3, self._max_pixels).with_channels(3)
        except DataError as error:
            raise DataError(error.reason, f"frame {i} of {len(self._files)}: {error.what}", error.remedy) from None
        if raster.array.shape[1:] != self.size:
            h, w = raster.array.shape[1:]
            raise DataError("unreadable", f"frame {i} is {h}×{w}, the first {self.size[0]}×{self.size[1]}",
                            "The frames of one video are of one size.")
        return np.moveaxis(_bytes(raster), 0, -1)


def _bytes(raster: Raster) -> np.ndarray:
    """8 bits from the range of the encoding."""
    array, limits = raster.array, raster.limits
    if limits is None:
        raise DataError("unreadable", "the frame is stored as floats or wide integers, whose range is not known",
                        "Save frames with 8 or 16 bits.")
    if array.dtype != np.uint8:
        low, high = limits
        array = np.rint((array - low) * (255 / (high - low))).astype(np.uint8)
    return 255 - array if raster.inverted else array
