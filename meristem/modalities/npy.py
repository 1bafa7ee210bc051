"""Arrays of .npy and .npz files, whose headers are believed only as far as there are bytes for what they claim."""

from __future__ import annotations

import math
import struct
import zipfile
import zlib
from pathlib import Path
from tokenize import TokenError
from typing import IO, Any

import numpy as np

from meristem.errors import DataError

SMALL, RATIO = 1 << 26, 200  # bytes that may unpack from anything; above, times their packed size: numbers pack no better
DAMAGED = (OSError, ValueError, KeyError, EOFError, TypeError, SyntaxError, OverflowError, RecursionError, NotImplementedError,
           RuntimeError, TokenError, struct.error, zipfile.BadZipFile, zlib.error)
AGAIN = "Download or export it again."


def plausible(claimed: int, packed: int, what: str) -> None:
    """Raises DataError (bomb) where so few bytes claim to unpack to so many."""
    if claimed > max(SMALL, RATIO * packed):
        raise DataError("bomb", f"{packed:,} bytes of {what} claim to unpack to {claimed:,}",
                        "Save it uncompressed if that is true.")


def names(path: Path) -> list[str]:
    """Of the arrays in a .npz; none in a .npy. Raises DataError (unreadable)."""
    try:
        if not zipfile.is_zipfile(path):
            return []
        with zipfile.ZipFile(path) as archive:
            return [n.removesuffix(".npy") for n in archive.namelist()]
    except DAMAGED as error:
        raise DataError("unreadable", f"is a damaged archive ({type(error).__name__})", AGAIN) from None


def read(path: Path, name: str = "") -> np.ndarray:
    """An array of numbers: the one of a .npy, or the named one of a .npz.

    Raises DataError (unreadable, truncated, bomb, missing).
    """
    try:
        if not name:
            with path.open("rb") as file:
                return _array(file, path.stat().st_size)
        with zipfile.ZipFile(path) as archive:
            if f"{name}.npy" not in archive.namelist():
                raise DataError("missing", f"the archive has no array called '{name}'", AGAIN)
            about = archive.getinfo(f"{name}.npy")
            plausible(about.file_size, about.compress_size, f"the array '{name}'")
            with archive.open(about) as member:
                return _array(member, about.file_size)
    except DAMAGED as error:
        raise DataError("unreadable", f"is damaged, or holds Python objects ({type(error).__name__})", AGAIN) from None


def shape(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """What the header of a .npy claims. Raises one of `DAMAGED`."""
    version = np.lib.format.read_magic(file)
    read_header = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}[version[0]]
    found, _, kind = read_header(file)
    if kind.hasobject or min(found, default=0) < 0:
        raise ValueError("objects, or a negative length")
    return found, kind


def _array(file: IO[bytes], size: int) -> np.ndarray:
    claimed, kind = shape(file)
    if kind.kind not in "fiub" or kind.itemsize > 8:
        raise DataError("unreadable", f"holds {kind} where numbers are meant",
                        "Save it as integers or floats of up to 64 bits.")
    if math.prod(claimed) * kind.itemsize > size - file.tell():
        raise DataError("truncated", f"announces an array of {'×'.join(map(str, claimed))}, more than there are bytes", AGAIN)
    file.seek(0)
    array: np.ndarray = np.lib.format.read_array(file, allow_pickle=False)
    return array
