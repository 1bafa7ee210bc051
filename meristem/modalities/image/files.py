"""Picture files to rasters and label maps: PNG, JPEG, BMP, TIFF, DICOM, rows of .npz arrays."""

from __future__ import annotations

import math
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import tifffile
import torch
from PIL import Image as Pillow
from PIL import TiffImagePlugin, UnidentifiedImageError

from meristem.errors import DataError
from meristem.modalities.documents import MISSHAPEN
from meristem.modalities.image import packed, png
from meristem.modalities.image.raster import Raster, check_size, dtype_limits

FORMATS = ("PNG", "JPEG", "BMP", "GIF", TiffImagePlugin.TiffImageFile.format)  # Pillow's other plugins stay shut
PNG, JPEG, TIFF = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
MAGIC = (PNG, JPEG, b"BM", b"GIF8", *TIFF)
DAMAGED = (*MISSHAPEN, OSError, EOFError, SyntaxError, ArithmeticError, NotImplementedError, RuntimeError, struct.error,
           zlib.error)
MILLIMETRE = {"mm": 1.0, "cm": 10.0, "um": 1e-3, "µm": 1e-3, "μm": 1e-3, "\\u00b5m": 1e-3, "micron": 1e-3, "microns": 1e-3,
              "nm": 1e-6}
AGAIN = "Copy or export the file again."


def decode(path: Path, want: int, max_pixels: int, indices: bool = False) -> Raster:
    """A picture of any supported kind, upright.

    want: channels, to tell channel-first from channel-last where the file does not say. indices: palette files give their
    indices, two-level ones 0 and 1. Raises DataError (missing, empty, truncated, unreadable, bomb, frames, multi-frame).
    """
    if packed.split(path):
        return _from_array(packed.row(path, max_pixels), want)
    head = _head(path)
    if head[128:132] == b"DICM" or path.suffix.lower() == ".dcm":
        from meristem.modalities.image import dicom  # pydicom is slow to import

        return dicom.decode(path, max_pixels)
    if head.startswith(TIFF):
        return _tiff(path, want, max_pixels, indices)
    if head.startswith(PNG) and len(head) > 25 and head[24] == 16 and head[25] != 0:
        return _deep_png(path, max_pixels)
    return _pillow(path, head, max_pixels, indices)


def decode_labels(path: Path, max_pixels: int) -> np.ndarray:
    """A label map (H, W) of whole numbers as stored; palette files give their indices. Raises DataError."""
    if not packed.split(path) and _head(path).startswith(JPEG):
        raise DataError("mask", "the mask is a JPEG, whose compression changes label values", "Export masks as PNG or TIFF.")
    raster = decode(path, 1, max_pixels, indices=True)
    array = raster.array[:-1] if raster.alpha else raster.array
    if (array != array[:1]).any():
        raise DataError("mask", "the mask is colour-coded", "Give one number per class: a grey or palette PNG.")
    labels: np.ndarray = array[0]
    if labels.dtype.kind == "f":
        if not np.isfinite(labels).all() or (labels != np.rint(labels)).any():
            raise DataError("mask", "the mask holds fractions or NaN", "Masks hold one whole number per pixel.")
        labels = labels.astype(np.int64)
    return labels


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            head = file.read(132)
    except OSError:
        raise DataError("missing", "the file does not exist or cannot be opened", "Check it and its permissions.") from None
    if not head:
        raise DataError("empty", "the file is empty (0 bytes)", AGAIN)
    return head


def _from_array(array: np.ndarray, want: int) -> Raster:
    """(H, W), (H, W, C) or (C, H, W); the channel axis is the one of `want`, 1, 3 or 4."""
    if array.ndim == 2:
        array = array[None]
    elif array.ndim == 3:
        sizes = [n for n in (want, 3, 1, 4) if n in (array.shape[-1], array.shape[0])]
        if sizes and array.shape[-1] == sizes[0]:
            array = np.moveaxis(array, -1, 0)
    else:
        raise DataError("shape", f"a row of the array has {array.ndim} axes, a picture has 2 or 3", AGAIN)
    array = array.astype(np.uint8) if array.dtype == bool else array
    array = np.ascontiguousarray(array)
    return Raster(array, limits=dtype_limits(array.dtype), colour=len(array) in (3, 4), alpha=len(array) == 4)


@contextmanager
def _quiet() -> Iterator[None]:
    """Warnings of the decoders quote the file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _pillow(path: Path, head: bytes, max_pixels: int, indices: bool) -> Raster:
    with _quiet(), path.open("rb") as handle:  # given a path, Pillow 13 maps the file and garbles turned TIFFs
        try:
            opened = Pillow.open(handle, formats=FORMATS)
        except Pillow.DecompressionBombError:
            raise DataError("bomb", "the image claims more pixels than Pillow's own limit", AGAIN) from None
        except UnidentifiedImageError:
            known = head.startswith(MAGIC)
            raise DataError("truncated" if known else "unreadable", "the header is cut off or damaged" if known else
                            "not a PNG, JPEG, TIFF, BMP or DICOM file", AGAIN) from None
        except DAMAGED:
            raise DataError("truncated", "the header is cut off or damaged", AGAIN) from None
        with opened as image:
            check_size(image.width * image.height, max_pixels)
            try:
                image.load()
                orientation = _orientation(image)
                array, mode = _array(image, indices)
            except DAMAGED:
                raise DataError("truncated", "the image data end early or are damaged", AGAIN) from None
    array = np.moveaxis(array, -1, 0) if array.ndim == 3 else array[None]
    raster = Raster(array, limits=dtype_limits(array.dtype), colour=mode in ("RGB", "RGBA"), alpha=mode in ("LA", "RGBA"))
    return raster.upright(orientation)


def _orientation(image: Pillow.Image) -> object:
    try:
        return image.getexif().get(0x0112)
    except DAMAGED:
        return None  # damaged EXIF says nothing of how the camera was held


def _array(image: Pillow.Image, indices: bool) -> tuple[np.ndarray, str]:
    """Pixels of a loaded image and the mode they are in."""
    mode = image.mode
    if mode == "1":
        array = np.asarray(image, np.uint8)
        return (array if indices else array * 255), "L"
    if mode == "P" and indices:
        return np.asarray(image), "L"
    if mode in ("P", "PA"):
        mode = "RGBA" if "transparency" in image.info or mode == "PA" else "RGB"
    elif mode not in ("L", "LA", "RGB", "RGBA", "F") and not mode.startswith("I"):
        mode = "RGB"  # CMYK, YCbCr, LAB, HSV
    array = np.asarray(image if mode == image.mode else image.convert(mode))
    return array.astype(array.dtype.newbyteorder("=")), mode


def _deep_png(path: Path, max_pixels: int) -> Raster:
    """16-bit colour or grey with opacity: Pillow would cut it to 8 bits."""
    from torchvision.io import ImageReadMode, decode_png  # slow to import, and rarely needed

    data = path.read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    check_size(width * height, max_pixels)
    try:
        array = decode_png(torch.frombuffer(bytearray(png.sound(data)), dtype=torch.uint8), ImageReadMode.UNCHANGED).numpy()
        with _quiet(), Pillow.open(path, formats=FORMATS) as image:
            orientation = _orientation(image)
    except (*DAMAGED, Pillow.DecompressionBombError):
        raise DataError("truncated", "the image data end early or are damaged", AGAIN) from None
    return Raster(array, limits=(0, 65535), colour=len(array) >= 3, alpha=len(array) in (2, 4)).upright(orientation)


def _tiff(path: Path, want: int, max_pixels: int, indices: bool) -> Raster:
    """One picture of one or many channels; photometric, axes, orientation and calibration as the tags say."""
    try:
        with _quiet(), path.open("rb") as handle, tifffile.TiffFile(handle, name="image") as file:  # it logs its name
            if len(file.series) != 1:
                raise DataError("frames", f"the TIFF holds {len(file.series)} pictures of different sizes, an image is one",
                                "Split it into files of one picture each.")
            series, page = file.series[0], file.pages[0]
            shape, axes = _squeeze(series.shape, series.axes)
            channel = _channel_axis(shape, axes, want)
            check_size(math.prod(n for i, n in enumerate(shape) if i != channel), max_pixels)
            photometric, depth = page.photometric.name, series.dtype.itemsize
            if photometric not in ("MINISBLACK", "MINISWHITE", "RGB"):
                return _pillow(path, TIFF[0], max_pixels, indices)
            try:
                array = series.asarray().reshape(shape)
            except ValueError as error:
                if "imagecodecs" not in str(error):
                    raise
                if depth > 1 and channel is not None:
                    raise DataError("unreadable", f"no decoder for {page.compression.name}-compressed TIFF of this depth",
                                    "Save it uncompressed or with deflate, or install imagecodecs.") from None
                array = None
            spacing, orientation = _calibration(file), getattr(page.tags.get(274), "value", None)
            opaque = not page.extrasamples or photometric == "RGB"
    except DataError:
        raise
    except (tifffile.TiffFileError, *DAMAGED):
        raise DataError("truncated", "the TIFF ends early or is damaged", AGAIN) from None
    if array is None:
        return replace(_pillow(path, TIFF[0], max_pixels, indices), spacing=spacing)  # LZW, JPEG: Pillow has libtiff
    array = array[None] if channel is None else np.moveaxis(array, channel, 0)
    array = array.astype(np.uint8) if array.dtype == bool else array
    return Raster(array, limits=dtype_limits(array.dtype), inverted=photometric == "MINISWHITE", spacing=spacing,
                  colour=photometric == "RGB" and len(array) in (3, 4),
                  alpha=(photometric == "RGB" and len(array) == 4) or (not opaque and len(array) == 2)).upright(orientation)


def _squeeze(shape: tuple[int, ...], axes: str) -> tuple[tuple[int, ...], str]:
    kept = [i for i, (n, axis) in enumerate(zip(shape, axes, strict=True)) if n != 1 or axis in "YX"]
    return tuple(shape[i] for i in kept), "".join(axes[i] for i in kept)


def _channel_axis(shape: tuple[int, ...], axes: str, want: int) -> int | None:
    """Which axis counts channels; None for a single one. Raises DataError where planes are depth or time."""
    others = [i for i, axis in enumerate(axes) if axis not in "YX"]
    if not others:
        return None
    if len(others) > 1 or axes[others[0]] not in "CSIQ":
        raise DataError("frames", f"the TIFF is a stack of planes (axes {axes}), an image is one plane",
                        "Split it, or read it as a volume.")
    if axes[others[0]] in "QI" and shape[0] != want and shape[-1] == want:
        return len(shape) - 1  # axes were guessed when it was written; the recipe says which is meant
    return others[0]


def _calibration(file: tifffile.TiffFile) -> tuple[float, float] | None:
    """mm along y and x where a microscope's software wrote them (OME, ImageJ); the plain resolution tags are printing sizes."""
    if file.ome_metadata:
        pixels = next((e for e in ElementTree.fromstring(file.ome_metadata).iter() if e.tag.endswith("}Pixels")), None)
        if pixels is not None and {"PhysicalSizeX", "PhysicalSizeY"} <= pixels.attrib.keys():
            known = {a: MILLIMETRE.get(pixels.attrib.get(f"PhysicalSize{a}Unit", "µm"), 0.0) for a in "YX"}
            y, x = (float(pixels.attrib[f"PhysicalSize{a}"]) * mm for a, mm in known.items())
            return (y, x) if min(y, x) > 0 else None
    unit = MILLIMETRE.get(str((file.imagej_metadata or {}).get("unit", "")).lower())
    tags = file.pages[0].tags
    if unit is None or not {"XResolution", "YResolution"} <= {tag.name for tag in tags}:
        return None
    (ny, dy), (nx, dx) = tags["YResolution"].value, tags["XResolution"].value
    return (unit * dy / ny, unit * dx / nx) if min(ny, dy, nx, dx) > 0 else None
