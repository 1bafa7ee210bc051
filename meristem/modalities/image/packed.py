"""Pictures packed in arrays, as MedMNIST ships them: `file.npz#train_images/17` is row 17 of `train_images`."""

from __future__ import annotations

import math
import re
import zipfile
from functools import lru_cache
from pathlib import Path

import numpy as np

from meristem.errors import DataError
from meristem.modalities import npy
from meristem.modalities.image.raster import check_size

_PACKED = re.compile(r"^(?P<file>.+\.npz)#(?P<member>[^/#]+)/(?P<row>\d+)$", re.IGNORECASE)


def split(path: Path) -> tuple[Path, str, int] | None:
    """(file, member, row) of a packed path; None for an ordinary one."""
    match = _PACKED.match(path.as_posix())
    return (Path(match["file"]), match["member"], int(match["row"])) if match else None


@lru_cache(maxsize=8)
def _array(file: Path, member: str, modified: int, size: int, max_pixels: int) -> np.ndarray:
    """A whole array, read once per process and version of the file; read-only, so threads and callers may share it."""
    with zipfile.ZipFile(file) as archive, archive.open(f"{member}.npy") as stream:
        shape, _ = npy.shape(stream)
    check_size(math.prod(shape[1:]), max_pixels)
    array = npy.read(file, member)
    if not array.ndim:
        raise ValueError("no pictures")
    array.flags.writeable = False
    return array


def row(path: Path, max_pixels: int) -> np.ndarray:
    """The picture (H, W) or (H, W, C) at a packed path. Raises DataError."""
    found = split(path)
    assert found is not None
    file, member, index = found
    try:
        state = file.stat()
        array = _array(file, member, state.st_mtime_ns, state.st_size, max_pixels)
    except FileNotFoundError:
        raise DataError("missing", "the archive does not exist", "Put it back.") from None
    except KeyError:
        raise DataError("missing", f"the archive has no array called '{member}'", "Correct the list.") from None
    except npy.DAMAGED:
        raise DataError("unreadable", f"the archive or its array '{member}' is damaged, or holds Python objects",
                        "Download or export it again.") from None
    if index >= len(array):
        raise DataError("missing", f"'{member}' has {len(array)} rows, row {index} was asked for",
                        "Correct the list.")
    picture: np.ndarray = array[index]
    return picture
