"""NIfTI files, checked: what is read is whole, finite and placed in space, or refused with the reason.

Messages name the role of a file, never its path: the caller knows the case's pseudonym.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
from isal import igzip_lib, isal_zlib
from nibabel.arrayproxy import ArrayProxy
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError, HeaderTypeError
from nibabel.volumeutils import apply_read_scaling

from meristem.errors import DataError
from meristem.modalities.documents import MISSHAPEN
from meristem.modalities.volume.opened import Opened

TO_MM = {"meter": 1000.0, "micron": 0.001}
DAMAGED = (*MISSHAPEN, ImageFileError, HeaderDataError, HeaderTypeError, EOFError, OSError, ArithmeticError,
           RuntimeError, struct.error, zlib.error)  # what nibabel makes of a broken file
DEFLATE = 1032  # greatest expansion of deflate (zlib's technical notes)


def open_nifti(path: Path, what: str, assume: Literal["identity"] | None, most: int) -> tuple[Any, np.ndarray]:
    """A file's image, nothing of its voxels decoded, and its affine (4, 4) in millimetres.

    what: its role, for messages. most: voxels it may claim. Raises DataError: unreadable, truncated, dimensions, no-affine.
    """
    try:
        size = path.stat().st_size
        image = nib.load(path)
        shape = tuple(int(n) for n in image.shape)
        bytes_claimed = math.prod(shape) * image.get_data_dtype().itemsize
    except FileNotFoundError:
        raise DataError("unreadable", f"{what} does not exist", "Restore the file, or remove the case.") from None
    except DAMAGED:
        if _headless(path):
            raise DataError("truncated", f"{what} ends before its header does", "Copy or download it again.") from None
        raise DataError("unreadable", f"{what} is not a NIfTI file", "Export it again as .nii or .nii.gz.") from None
    if not isinstance(image, nib.Nifti1Image):
        raise DataError("unreadable", f"{what} is not a NIfTI file", "Export it again as .nii or .nii.gz.")
    if image.get_data_dtype().kind not in "iuf":
        raise DataError("unreadable", f"{what} holds {image.get_data_dtype()} voxels", "Export it as integers or floats.")
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) not in (3, 4) or min(shape) < 1:
        raise DataError("dimensions", f"{what} has shape {shape}", "Wanted are three axes, or four with channels last.")
    if math.prod(shape) > most:
        raise DataError("dimensions", f"the header of {what} claims {math.prod(shape):,} voxels",
                        "Raise modality.volume.max_voxels if that is true.")
    if bytes_claimed > (DEFLATE if path.suffix == ".gz" else 1) * size:
        raise DataError("truncated", f"{what} is too small for the {bytes_claimed:,} bytes of voxels its header claims",
                        "Copy or download it again.")
    return image, _affine(image, what, assume)


def opened(path: Path, what: str, assume: Literal["identity"] | None, most: int) -> Opened:
    """See `open_nifti`."""
    image, affine = open_nifti(path, what, assume, most)
    shape = tuple(int(n) for n in image.shape)
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    kind = image.get_data_dtype()
    plain = kind == np.uint8 and image.dataobj.slope == 1 and image.dataobj.inter == 0
    return Opened(shape, affine, partial(decode, image, what), placement(image), kind.name, plain)


def _headless(path: Path) -> bool:
    """Whether a file is shorter than a NIfTI-1 header."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            return len(file.read(348)) < 348
    except EOFError:
        return True
    except (OSError, zlib.error):
        return False


def _affine(image: Any, what: str, assume: Literal["identity"] | None) -> np.ndarray:
    header, affine = image.header, np.asarray(image.affine, np.float64)
    if header["sform_code"] == 0 and header["qform_code"] == 0:
        problem = "no valid affine (sform and qform codes are both 0)"
    elif not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        problem = "no valid affine (it is singular)"
    else:
        try:
            unit = header.get_xyzt_units()[0]
        except KeyError:
            raise DataError("no-affine", f"{what}: the unit of its affine is of no known code ({int(header['xyzt_units'])})",
                            "Correct xyzt_units in its header: 2 says millimetres.") from None
        return np.diag([TO_MM.get(unit, 1.0)] * 3 + [1.0]) @ affine
    if assume == "identity":
        return np.eye(4)
    raise DataError("no-affine", f"{what}: {problem}",
                    "Positions in millimetres cannot be known. Re-export with an orientation, or pass "
                    "modality.volume.assume_affine=identity to accept voxels as 1 mm RAS.")


def decode(image: Any, what: str) -> np.ndarray:
    """All voxels as float32, (X, Y, Z) or (X, Y, Z, C). Raises DataError: truncated."""
    try:
        array = _unpacked(image.dataobj)
        if array is None:
            array = np.asarray(image.dataobj, np.float32)
    except DAMAGED:
        raise DataError("truncated", f"the voxels of {what} cannot be decoded to their end",
                        "Copy or download it again.") from None
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    return array


def _unpacked(proxy: Any) -> np.ndarray | None:
    """The voxels of a gzip file in one go, which nibabel reads in pieces of 8 KiB: 3 to 4 times as fast.

    None of what is left to nibabel: other files, gzip of several members, what is damaged.
    """
    if not isinstance(proxy, ArrayProxy) or Path(proxy.file_like).suffix != ".gz":
        return None
    count = math.prod(proxy.shape)
    needed = proxy.offset + count * proxy.dtype.itemsize
    try:
        held = isal_zlib.decompressobj(isal_zlib.MAX_WBITS | 16).decompress(Path(proxy.file_like).read_bytes(), needed)
    except igzip_lib.IsalError:  # type: ignore[misc]  # its stubs call the class an instance
        return None
    if len(held) < needed:
        return None
    raw = np.frombuffer(held, proxy.dtype, count, proxy.offset).reshape(proxy.shape, order=proxy.order)
    return apply_read_scaling(raw, proxy.slope, proxy.inter).astype(np.float32, copy=False)


def as_labels(values: np.ndarray, what: str, classes: Mapping[int, int]) -> np.ndarray:
    """Decoded label values to classes, uint8 or int32. Raises DataError: label."""
    if not np.isfinite(values).all():
        raise DataError("label", f"{what} holds NaN or infinite values", "Labels are whole numbers from 0.")
    whole = np.round(values).astype(np.int32)
    if np.abs(values - whole).max() > 1e-3:
        raise DataError("label", f"{what} holds values that are not whole numbers", "Labels are whole numbers from 0.")
    if classes:
        found, place = np.unique(whole, return_inverse=True)
        whole = np.array([classes.get(int(v), int(v)) for v in found], np.int32)[place].reshape(whole.shape)
    if whole.min() < 0:
        raise DataError("label", f"{what} holds negative values", "Give them a class by modality.volume.labels.")
    return whole.astype(np.uint8) if whole.max() < 256 else whole


def turned(values: np.ndarray, affine: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An array (X, Y, Z) with its axes in the order and direction of those of another affine, and its own affine then.

    Whoever converts a DICOM series turns some axes; a label drawn on that is still of the same voxels.
    """
    order = nib.orientations.io_orientation(np.linalg.inv(wanted) @ affine)
    if np.isnan(order).any() or values.ndim != 3:
        return values, affine
    return nib.orientations.apply_orientation(values, order), affine @ nib.orientations.inv_ornt_aff(order, values.shape)


def same_grid(shape: tuple[int, ...], affine: np.ndarray, other: tuple[int, ...], other_affine: np.ndarray, what: str,
              whole: str) -> None:
    """Raises DataError `shape` unless both grids agree to a hundredth of a voxel at every corner."""
    if shape != other:
        raise DataError("shape", f"{what} has shape {shape} but {whole} has {other}",
                        "Both must lie on one grid: resample one.")
    corners = np.array(np.meshgrid(*((0, n - 1) for n in shape), [1], indexing="ij")).reshape(4, -1)
    apart = np.linalg.norm((affine - other_affine)[:3] @ corners, axis=0).max()
    if apart > 0.01 * np.linalg.norm(affine[:3, :3], axis=0).min() + 1e-3:
        raise DataError("shape", f"the affine of {what} differs from that of {whole}: corners are up to {apart:.3g} mm apart",
                        "Both must lie on one grid: resample one, or copy the right affine.")


def save(labels: np.ndarray, source: Mapping[str, Any], path: Path) -> Path:
    """Labels (X, Y, Z) on the source file's grid, with its sform and qform. Written whole or not at all."""
    kind = np.uint8 if labels.max(initial=0) < 256 else np.int16
    image = nib.Nifti1Image(labels.astype(kind), None)
    image.header.set_xyzt_units(source["unit"])
    image.set_sform(np.array(source["sform"]), source["sform_code"])
    image.set_qform(np.array(source["qform"]), source["qform_code"])
    partial = path.with_name(f".partial-{path.name}")
    nib.save(image, partial)
    return partial.replace(path)


def placement(image: Any) -> dict[str, Any]:
    """What `save` needs of a source file, as plain data."""
    header = image.header
    return {"shape": [int(n) for n in image.shape[:3]], "unit": header.get_xyzt_units()[0],
            "sform": header.get_sform().tolist(), "sform_code": int(header["sform_code"]),
            "qform": header.get_qform().tolist(), "qform_code": int(header["qform_code"])}
