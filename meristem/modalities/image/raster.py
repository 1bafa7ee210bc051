"""What a decoded picture file holds, before any normalisation."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from meristem.errors import DataError
from meristem.modalities.likeness import Likeness, cosines, scores, thinned, turns

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
WAVES = 16  # cosines along each side in a fingerprint
SHOWN = 256  # pixels along a side that are enough for them
ALIKE = Likeness("cosines 1", WAVES ** 2 - 1, within=36, turns=turns(WAVES, 2))
"""Signs of a picture's lowest cosines, the same at any brightness and contrast; 32 bytes.

Measured in all 8 orientations: the nearest of 2.9 million pairs of PneumoniaMNIST's test and training images (28×28, other
patients) differ in 50 of 255 signs, the nearest of 44,850 pairs of white cells (wbc-dataset1) in 62, of 66,066 pairs of blood
smears (BCCD) in 88; but for one pair of equal cells, three of cells and one of smears that show the same moved by a few pixels
(34 at most). Known again of 300 each: all that were saved as JPEG of quality 90, enlarged twice or of gamma 0.6; of quality 50
all cells and smears and 92 % of the tiny X-rays; at 60 % of the size 99.7 % or more; contrast × 1.3, which whitens the cells'
background, 98 % of X-rays, 99.7 % of smears, 45 % of cells. A picture that was cropped by more than a few pixels is not.
"""


@dataclass(frozen=True)
class Raster:
    """array (C, H, W) as the file stores it; its meaning is array * slope + intercept.

    limits: lowest and highest number the encoding can hold, or None for floats and wide integers. inverted: low means bright.
    colour: the first three channels are red, green, blue. alpha: the last channel is opacity. spacing: mm along y and x.
    """

    array: np.ndarray
    slope: float = 1.0
    intercept: float = 0.0
    limits: tuple[float, float] | None = None
    inverted: bool = False
    colour: bool = False
    alpha: bool = False
    spacing: tuple[float, float] | None = None

    def upright(self, orientation: object) -> Raster:
        """Rotated and mirrored as the EXIF (or TIFF) orientation 1–8 asks; as it is for anything else."""
        a = self.array
        if not isinstance(orientation, int) or not 1 < orientation <= 8:
            return self
        if orientation >= 5:
            a = a.swapaxes(-1, -2)
        if orientation in (3, 4, 7, 8):
            a = a[..., ::-1, :]
        if orientation in (2, 3, 6, 7):
            a = a[..., ::-1]
        spacing = self.spacing[::-1] if self.spacing is not None and orientation >= 5 else self.spacing
        return replace(self, array=np.ascontiguousarray(a), spacing=spacing)

    @property
    def bare(self) -> Raster:
        """The same picture without opacity."""
        return replace(self, array=self.array[:-1], alpha=False) if self.alpha else self

    def with_channels(self, want: int) -> Raster:
        """The same picture in `want` channels: opacity dropped, grey replicated to 3, colour to grey by luma."""
        array = self.array
        if len(array) != want and self.alpha:
            array = array[:-1]
        if len(array) == 1 and want == 3:
            array = np.repeat(array, 3, axis=0)
        elif len(array) == 3 and want == 1 and self.colour:
            grey = np.tensordot(np.array(LUMA), array.astype(np.float64), 1)[None]
            array = (grey if array.dtype.kind == "f" else np.rint(grey)).astype(array.dtype)
        elif len(array) != want:
            raise DataError("channels", f"the file has {len(array)} channels, the recipe wants {want}",
                            f"Set modality.image.channels={len(array)}, or leave such files out.")
        return replace(self, array=array, alpha=False)


def signs(picture: np.ndarray, most: int = SHOWN) -> np.ndarray:
    """(1, 255) whose signs are the code of a picture (C, H, W), of any number type; none, (0, 255), of one without detail.

    most: pixels along a side that are looked at, up to twice as many.
    """
    shown = thinned(picture, most)
    shown = np.tensordot(np.array(LUMA, np.float32), shown, 1)[None] if len(shown) == 3 else shown
    seen = np.sum([scores(channel) for channel in shown], axis=0)
    return cosines(seen, WAVES)[:int(seen.any())]


def dtype_limits(dtype: np.dtype) -> tuple[float, float] | None:
    """The range of an integer type of at most 16 bits."""
    if dtype.kind not in "iu" or dtype.itemsize > 2:
        return None
    return int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)


def check_size(pixels: int, limit: int) -> None:
    """Refuse a picture before it is decoded: nothing in it (`empty`) or more than memory is meant for (`bomb`)."""
    if pixels == 0:
        raise DataError("empty", "the image has no pixels", "Export it again.")
    if pixels > limit:
        raise DataError("bomb", f"the image claims {pixels:,} pixels, more than the limit of {limit:,}",
                        "If it is genuine, raise modality.image.max_pixels.")
