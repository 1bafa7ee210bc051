"""Single DICOM frames. Only the tags listed here are read: nothing that identifies a person reaches memory."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pydicom
from pydicom.errors import BytesLengthException
from pydicom.pixels import apply_color_lut, apply_modality_lut

from meristem.errors import DataError
from meristem.modalities.documents import MISSHAPEN, opened
from meristem.modalities.image.raster import Raster, check_size

TAGS = ("SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration", "NumberOfFrames", "Rows", "Columns",
        "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelSpacing", "ImagerPixelSpacing",
        "NominalScannedPixelSpacing", "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence",
        "RedPaletteColorLookupTableDescriptor", "GreenPaletteColorLookupTableDescriptor",
        "BluePaletteColorLookupTableDescriptor", "RedPaletteColorLookupTableData", "GreenPaletteColorLookupTableData",
        "BluePaletteColorLookupTableData", "PixelData")
DAMAGED = (*MISSHAPEN, OSError, EOFError, ArithmeticError, BytesLengthException, struct.error)  # what pydicom makes of damage


def pixel_spacing(ds: pydicom.Dataset) -> tuple[float, float] | None:
    """mm between rows and between columns (PS3.3 10.7.1.3), or None."""
    for tag in ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing"):
        value = ds.get(tag)
        if value is not None and len(value) == 2:
            y, x = float(value[0]), float(value[1])
            if y > 0 and x > 0:
                return y, x
    return None


def dataset(path: Path, tags: Sequence[str], pixels: bool = True) -> pydicom.Dataset:
    """The named elements of a file, without its pixels where they are not wanted. Raises DataError."""
    try:
        with opened(path) as data:
            return pydicom.dcmread(data, specific_tags=list(tags), stop_before_pixels=not pixels)
    except pydicom.errors.InvalidDicomError:
        raise DataError("unreadable", "not a DICOM file: the 'DICM' mark is missing", "Export it again.") from None
    except (*DAMAGED, NotImplementedError):
        raise DataError("truncated", "the DICOM header ends early or is damaged", "Export the file again.") from None


def decode(path: Path, max_pixels: int) -> Raster:
    """A frame with its rescale (PS3.3 C.11.1) and spacing. Raises DataError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they quote the file's values
        ds = dataset(path, TAGS)
        if "PixelData" not in ds:
            raise DataError("unreadable", "the DICOM file holds no pixels (or lost them)", "Export the image again.")
        try:
            return _raster(ds, max_pixels)
        except (RuntimeError, NotImplementedError):
            syntax = ds.file_meta.get("TransferSyntaxUID")
            raise DataError("unreadable", f"no decoder for the transfer syntax '{getattr(syntax, 'name', 'unknown')}'",
                            "Export it uncompressed, or install pydicom's decoder for it.") from None
        except DAMAGED:
            raise DataError("truncated", "the DICOM header or its pixels are damaged, or end early",
                            "Export the file again.") from None


def _raster(ds: pydicom.Dataset, max_pixels: int) -> Raster:
    frames = int(ds.get("NumberOfFrames") or 1)
    if frames > 1:
        raise DataError("multi-frame", f"the DICOM file holds {frames} frames, an image is one",
                        "Split it into single frames, or read it as a volume.")
    check_size(int(ds.get("Rows") or 0) * int(ds.get("Columns") or 0), max_pixels)
    photometric = str(ds.get("PhotometricInterpretation", ""))
    array = ds.pixel_array
    if photometric == "PALETTE COLOR":
        array = apply_color_lut(array, ds)
    elif "ModalityLUTSequence" in ds:
        array = apply_modality_lut(array, ds)
    array = np.moveaxis(array, -1, 0) if array.ndim == 3 else array[None]
    if len(array) == 3 or "ModalityLUTSequence" in ds:
        return Raster(array, colour=len(array) == 3, spacing=pixel_spacing(ds), inverted=photometric == "MONOCHROME1",
                      limits=(0, 65535 if array.dtype.itemsize > 1 else 255))
    bits, signed = int(ds.BitsStored), bool(ds.PixelRepresentation)
    slope, intercept = float(ds.get("RescaleSlope", 1) or 1), float(ds.get("RescaleIntercept", 0) or 0)
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    if slope < 0:
        array, slope, low, high = -array.astype(np.int32), -slope, -high, -low
    return Raster(array, slope, intercept, (low, high), photometric == "MONOCHROME1", spacing=pixel_spacing(ds))
