"""Label maps of a video's frames: a folder of pictures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from meristem.errors import DataError
from meristem.modalities.image.files import decode_labels

UNKNOWN = -1  # label of frames that have none
KINDS = (".png", ".gif", ".bmp", ".tif", ".tiff")
MAX_PIXELS = 1 << 26


def read_masks(folder: Path, names: Sequence[str], size: tuple[int, int]) -> np.ndarray:
    """int16 (T, H, W): the mask named as each frame; −1 throughout for a frame without one.

    names: stems of the frames; of a film, their numbers, which masks may write with any zeros in front. Raises DataError:
    missing, mask, shape and those of pictures.
    """
    if not folder.is_dir():
        raise DataError("missing", "the masks of a video are a folder of one picture per frame, and there is no such folder",
                        "Add it, or correct the list.")
    pictures = sorted(f for f in folder.iterdir() if f.suffix.lower() in KINDS and not f.name.startswith("."))
    files = {plain_number(f.stem): f for f in pictures}
    places = places_of(names)
    strange = files.keys() - places.keys()
    twice = len(files) < len(pictures) or len(places) < len(names)
    if strange or twice or not files:
        what = (f"{len(strange)} masks belong to no frame" if strange else
                "two masks or two frames have one number" if twice else "the folder of masks holds no picture")
        raise DataError("mask", what, "Name masks as their frames are named or numbered.")
    labels = np.full((len(names), *size), UNKNOWN, np.int16)
    for key, file in files.items():
        mask = decode_labels(file, MAX_PIXELS)
        if mask.shape != size:
            raise DataError("shape", f"a mask is {mask.shape[0]}×{mask.shape[1]}, the frames {size[0]}×{size[1]}",
                            "They must cover the same pixels.")
        labels[places[key]] = mask
    return labels


def places_of(names: Sequence[str]) -> dict[str, int]:
    """Frames by the names or plain numbers that companions write."""
    return {plain_number(name): i for i, name in enumerate(names)}


def first_number(names: Sequence[str]) -> int:
    """From which number the frames are counted: 0 unless their names count on from another."""
    keys = [plain_number(name) for name in names]
    first = int(keys[0]) if keys[0].isdecimal() else 0
    return first if keys == [str(first + i) for i in range(len(keys))] else 0


def plain_number(stem: str) -> str:
    """A number without the zeros in front; else the stem."""
    digits = re.fullmatch(r"\D*?(\d+)", stem)
    return str(int(digits[1])) if digits else stem
