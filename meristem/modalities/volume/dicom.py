"""DICOM series as volumes: which files belong together, where their voxels lie, what they mean.

Only the elements listed here are asked for, and of sequences only the items named here. The one of them that says who somebody
is, `PatientID`, keeps the samples of a patient in one split; only a keyed pseudonym of it is shown. Geometry is that of PS3.3
C.7.6.2.1.1; messages name the role of a series, never a file, an identifier or a date.
"""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.errors import InvalidDicomError
from pydicom.filereader import read_partial
from pydicom.pixels import apply_modality_lut
from pydicom.tag import Tag
from pydicom.uid import UID

from meristem.errors import DataError
from meristem.modalities.base import Group, Lost
from meristem.modalities.image.dicom import dataset
from meristem.modalities.volume import suv
from meristem.modalities.volume.opened import Opened, named_dicom

SUFFIX = ".dcm"
MARK = 132  # bytes to the end of the mark `DICM`

VOLUMES = frozenset((
    "CTImageStorage", "EnhancedCTImageStorage", "LegacyConvertedEnhancedCTImageStorage", "MRImageStorage",
    "EnhancedMRImageStorage", "LegacyConvertedEnhancedMRImageStorage", "PositronEmissionTomographyImageStorage",
    "EnhancedPETImageStorage", "LegacyConvertedEnhancedPETImageStorage", "XRay3DAngiographicImageStorage",
    "XRay3DCraniofacialImageStorage", "BreastTomosynthesisImageStorage"))
WHOSE = ("SOPClassUID", "PatientID", "SeriesInstanceUID")
PLANE = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness", "SpacingBetweenSlices",
         "RescaleSlope", "RescaleIntercept")
PIXELS = ("SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration", "NumberOfFrames", "Rows", "Columns",
          "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "ModalityLUTSequence")
TAGS = (*PLANE, *PIXELS, *suv.TAGS, "SOPClassUID", "SeriesInstanceUID", "FrameOfReferenceUID", "Modality", "ImageType",
        "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
GROUPS = {  # of a multi-frame file: where each frame's element lies (PS3.3 C.7.6.16)
    "ImagePositionPatient": "PlanePositionSequence", "ImageOrientationPatient": "PlaneOrientationSequence",
    "PixelSpacing": "PixelMeasuresSequence", "SliceThickness": "PixelMeasuresSequence",
    "SpacingBetweenSlices": "PixelMeasuresSequence", "RescaleSlope": "PixelValueTransformationSequence",
    "RescaleIntercept": "PixelValueTransformationSequence"}

UNIT = 1e-3  # by which direction cosines may miss unit length and a right angle, and differ from slice to slice: rounding
ALONG, ACROSS = 0.05, 0.1  # of a step between slices, and of a pixel, by which a slice may miss its place in the grid: rounding
AGAIN = "Export the series again."


@dataclass(frozen=True)
class Slice:
    """One plane of voxels. frame: its number in the file. position: of its first pixel's centre, LPS millimetres."""

    file: int
    frame: int
    position: np.ndarray
    slope: float
    intercept: float


@dataclass(frozen=True)
class Series:
    """A series whose geometry is settled, and of whose pixels nothing is decoded.

    slices: in their order along the normal. affine: (4, 4) of column, row and slice to RAS millimetres. values: what numbers
    mean. kept: why activity did not become SUV. factor: to SUV, else 1.
    """

    files: tuple[Path, ...]
    headers: tuple[pydicom.Dataset, ...]
    slices: tuple[Slice, ...]
    affine: np.ndarray
    values: str
    kept: str
    factor: float

    @property
    def shape(self) -> tuple[int, int, int]:
        return int(self.headers[0].Columns), int(self.headers[0].Rows), len(self.slices)


def recognised(path: Path) -> bool:
    """Whether a file is DICOM of a kind that volumes are made of."""
    try:
        ds = _head(path)
    except DataError:
        return False
    return ds is not None and UID(ds.get("SOPClassUID") or "").keyword in VOLUMES


def gather(files: Sequence[Path]) -> tuple[list[Group], list[Lost]]:
    """The series in these files, and what looks like DICOM and is no volume; other files are in neither."""
    series: dict[str, list[Path]] = defaultdict(list)
    whose: dict[str, str] = {}
    others: dict[tuple[str, str], list[Path]] = defaultdict(list)
    lost: list[Lost] = []
    for file in sorted(f for f in files if named_dicom(f)):
        try:
            ds = _head(file)
        except DataError as error:
            lost.append(((file,), error))
            continue
        if ds is None:
            continue
        kind, number = UID(ds.get("SOPClassUID") or ""), str(ds.get("SeriesInstanceUID") or "")
        if kind.keyword not in VOLUMES:
            others[kind.keyword and kind.name, number].append(file)
        elif not number:
            lost.append(((file,), DataError("unreadable", "the DICOM file says of no series that it is in it", AGAIN)))
        else:
            series[number].append(file)
            whose.setdefault(number, str(ds.get("PatientID") or "").strip())
    for (name, _), found in others.items():
        what = f"{len(found)} DICOM files are {name or 'of an unknown kind'}, which is no volume"
        lost.append((tuple(found), DataError("kind", what, "Harmless where volumes are wanted; pictures and clips are of the "
                                         "modalities image and video.")))
    return [Group(tuple(found), whose[number]) for number, found in series.items()], lost


def _head(path: Path) -> pydicom.Dataset | None:
    """The elements of `WHOSE`; None of a file that is not DICOM, or only an index of others. Raises DataError."""
    try:
        with path.open("rb") as file:
            marked = file.read(MARK)[128:] == b"DICM"
            if not marked and path.suffix.lower() != SUFFIX:
                return None
            file.seek(0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # they quote the file's values
                ds = read_partial(file, stop_when=_behind, specific_tags=[Tag(name) for name in WHOSE])
                ds.get("SOPClassUID"), ds.get("PatientID"), ds.get("SeriesInstanceUID")
                index = UID(ds.file_meta.get("MediaStorageSOPClassUID") or "").keyword == "MediaStorageDirectoryStorage"
    except InvalidDicomError:
        raise DataError("unreadable", "not a DICOM file: the 'DICM' mark is missing") from None
    except Exception:  # a header may be broken in any way
        raise DataError("truncated", "the DICOM header ends early or is damaged", AGAIN) from None
    return None if index else ds


def _behind(tag: Any, vr: str | None, length: int) -> bool:
    return bool(tag > 0x0020000E)  # SeriesInstanceUID: what follows need not be walked through


# ---- geometry

def open_series(files: Sequence[Path], what: str, most: int) -> Series:
    """The headers of one series. what: its role, for messages. most: voxels that it may claim.

    Raises DataError: unreadable, truncated, localiser, colour, dimensions, orientation, no-affine, size, duplicate, missing,
    irregular, rescale.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        headers = tuple(dataset(f, TAGS, pixels=False) for f in files)
        try:
            return _settled(tuple(files), headers, what, most)
        except DataError:
            raise
        except Exception:  # an element may hold anything
            raise DataError("unreadable", f"an element of the DICOM header of {what} has no usable value", AGAIN) from None


def _settled(files: tuple[Path, ...], headers: tuple[pydicom.Dataset, ...], what: str, most: int) -> Series:
    first = headers[0]
    if any({"LOCALIZER", "SCOUT"} & set(_words(ds.get("ImageType"))) for ds in headers):
        raise DataError("localiser", f"{what} holds localisers, which show where slices were planned",
                        "Leave them out, or move them into a folder of their own that is not read.")
    if any(int(ds.get("SamplesPerPixel") or 1) != 1 or str(ds.get("PhotometricInterpretation")) not in
           ("MONOCHROME1", "MONOCHROME2") for ds in headers):
        raise DataError("colour", f"{what} is coloured", "A volume has one value a voxel: export the original series.")
    sizes = {(int(ds.get("Rows") or 0), int(ds.get("Columns") or 0)) for ds in headers}
    if len(sizes) > 1:
        raise DataError("size", f"the slices of {what} have {len(sizes)} different sizes", "Divide it into series of one size.")
    counts = [int(ds.get("NumberOfFrames") or 1) for ds in headers]
    (rows, columns), total = next(iter(sizes)), sum(counts)
    if min(rows, columns, *counts) < 1:
        raise DataError("dimensions", f"{what} has frames without pixels", AGAIN)
    if rows * columns * total > most:
        raise DataError("dimensions", f"the headers of {what} claim {rows * columns * total:,} voxels",
                        "Raise modality.volume.max_voxels if that is true.")
    if len({str(ds.get("FrameOfReferenceUID") or "") for ds in headers}) > 1:
        raise DataError("orientation", f"the slices of {what} are placed in different frames of reference",
                        "The patient was moved between them: divide the series.")
    planes = [_plane(ds, k, i, n, what) for i, (ds, n) in enumerate(zip(headers, counts, strict=True)) for k in range(n)]
    orientations, spacings = np.array([p[1] for p in planes]), np.array([p[2] for p in planes])
    if np.abs(orientations - orientations[0]).max() > UNIT:
        raise DataError("orientation", f"the slices of {what} have different orientations",
                        "Localisers, or reformatted slices among others? Divide it into series of one orientation.")
    if not np.allclose(spacings, spacings[0], rtol=1e-4):
        raise DataError("size", f"the slices of {what} have pixels of different sizes", "Divide it into series of one size.")
    order, step = _stacked([p[0] for p in planes], orientations[0], spacings[0], planes[0][3], what)
    slices = tuple(planes[i][0] for i in order)
    affine = np.eye(4)
    (dy, dx), (x, y) = spacings[0], orientations[0].reshape(2, 3)
    affine[:3] = np.stack([x * dx, y * dy, step, slices[0].position], 1)
    affine[:2] *= -1  # LPS to RAS
    factor, values, kept = suv.converted(headers) if first.get("Modality") == "PT" else (1.0, "", "")
    values = values or ("HU" if first.get("Modality") == "CT" else "")
    return Series(files, headers, slices, affine, values, kept, factor)


def _words(value: Any) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else [str(v) for v in value]


def _plane(ds: pydicom.Dataset, frame: int, file: int, frames: int, what: str) -> tuple[
        Slice, np.ndarray, np.ndarray, float | None]:
    """A frame as a slice, its direction cosines (6,), its pixels' size (2,) between rows and columns, and its thickness."""
    shared, each = ds.get("SharedFunctionalGroupsSequence") or (), ds.get("PerFrameFunctionalGroupsSequence") or ()
    if (shared or each) and len(each) != frames:
        raise DataError("dimensions", f"{what} describes {len(each)} frames and claims {frames}", AGAIN)

    def said(name: str) -> Any:
        if not (shared or each):
            return ds.get(name)
        for item in (each[frame], *shared):
            if group := item.get(GROUPS[name]):
                return group[0].get(name)
        return None

    position, orientation, spacing = (np.array(said(name) if said(name) is not None else (), np.float64) for name in PLANE[:3])
    if position.shape != (3,) or orientation.shape != (6,) or spacing.shape != (2,):
        raise DataError("no-affine", f"{what} does not say where its slices lie (ImagePositionPatient, "
                        "ImageOrientationPatient, PixelSpacing)",
                        "Positions in millimetres cannot be known: export the original.")
    x, y = orientation.reshape(2, 3)
    if not (np.isfinite(position).all() and np.isfinite(spacing).all() and spacing.min() > 0
            and abs(np.linalg.norm(x) - 1) < UNIT and abs(np.linalg.norm(y) - 1) < UNIT and abs(x @ y) < UNIT):
        raise DataError("orientation", f"{what} has direction cosines that are none, or pixels without a size", AGAIN)
    thickness = said("SpacingBetweenSlices") or said("SliceThickness")
    slope, intercept = (float(default if said(name) is None else said(name)) for name, default in
                        (("RescaleSlope", 1), ("RescaleIntercept", 0)))
    if not np.isfinite([slope, intercept]).all() or slope == 0:
        raise DataError("rescale", f"{what} has slices whose values are rescaled by {slope:g}", AGAIN)
    return Slice(file, frame, position, slope, intercept), orientation, spacing, float(thickness) if thickness else None


def _stacked(slices: Sequence[Slice], orientation: np.ndarray, spacing: np.ndarray, thickness: float | None,
             what: str) -> tuple[np.ndarray, np.ndarray]:
    """Order of the slices along their normal, and the step (3,) from one to the next, which may lean (gantry tilt)."""
    if len(slices) < 2:
        raise DataError("dimensions", f"{what} has one slice", "A single slice is an image: use the modality image.")
    x, y = orientation.reshape(2, 3)
    normal = np.cross(x, y)
    positions = np.array([s.position for s in slices])
    along = positions @ normal
    order = np.argsort(along, kind="stable")
    positions, along = positions[order], along[order]
    gaps = np.diff(along)
    step = float(np.median(gaps[gaps > 0.001])) if (gaps > 0.001).any() else 0.0
    same = int((gaps <= max(0.001, ALONG * step)).sum())
    if same:
        places = len(slices) - same
        times = f"{len(slices) // places} times each: several times, echoes or weightings" if len(slices) % places == 0 else \
            f"{same} of them more than once"
        raise DataError("duplicate", f"the {len(slices)} slices of {what} lie at {places} places, {times}",
                        "Divide it into series that show each place once, or remove the copies.")
    wide = gaps > (1 + 2 * ALONG) * step
    if wide.any():
        lost = np.rint(gaps[wide] / step) - 1
        if (np.abs(gaps[wide] / step - lost - 1) < 2 * ALONG).all() and lost.min() >= 1:
            at = int(np.flatnonzero(wide)[0]) + 1
            raise DataError("missing", f"{what} lacks {int(lost.sum())} of its inner slices, the first behind slice {at} of "
                            f"{len(slices)}", "Fetch the whole series again; it would be stretched if it were read as it is.")
    even = (positions[-1] - positions[0]) / (len(slices) - 1)
    astray = positions - positions[0] - np.arange(len(slices))[:, None] * even
    if np.abs(astray @ normal).max() > ALONG * float(even @ normal):
        raise DataError("irregular", f"the slices of {what} lie {gaps.min():.4g} to {gaps.max():.4g} mm apart",
                        "A volume has one distance: resample it, or divide it into series of one distance.")
    if np.abs(astray @ np.stack([x, y], 1)).max() > ACROSS * spacing.min():
        raise DataError("irregular", f"the slices of {what} do not lie on one straight line", "Export the original series.")
    return order, even


# ---- voxels

def decode(series: Series, what: str) -> np.ndarray:
    """All voxels (X, Y, Z) as float32, each slice rescaled as it says (PS3.3 C.11.1), activity as SUV where that is known.

    Of MONOCHROME1 the values are turned round, so that more is brighter, but where they are of a known unit: then it only says
    how they are shown. Raises DataError: unreadable, truncated.
    """
    columns, rows, count = series.shape
    array = np.empty((count, rows, columns), np.float32)
    wanted: dict[int, list[int]] = defaultdict(list)
    for z, s in enumerate(series.slices):
        wanted[s.file].append(z)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for file, places in wanted.items():
            frames = _stored(series.files[file], what)
            if frames.shape[1:] != (rows, columns):
                raise DataError("truncated", f"the pixels of {what} are not of the size that its header says", AGAIN)
            for z in places:
                s = series.slices[z]
                array[z] = _meant(frames[s.frame], series.headers[file], s, not series.values)
    array *= np.float32(series.factor)
    return array.transpose(2, 1, 0)


def _stored(path: Path, what: str) -> np.ndarray:
    """(frames, rows, columns) as stored."""
    ds = dataset(path, (*PIXELS, "PixelData"))
    if "PixelData" not in ds:
        raise DataError("unreadable", f"a file of {what} holds no pixels", AGAIN)
    try:
        frames = ds.pixel_array
    except (RuntimeError, NotImplementedError):
        name = getattr(ds.file_meta.get("TransferSyntaxUID"), "name", "unknown")
        raise DataError("unreadable", f"no decoder for the transfer syntax '{name}' of {what}, or damaged pixels",
                        "Export it uncompressed, or install pydicom's decoder for it.") from None
    except Exception:  # decoders raise anything on broken data
        raise DataError("truncated", f"the pixels of a file of {what} end early or are damaged", AGAIN) from None
    return frames if frames.ndim == 3 else frames[None]


def _meant(frame: np.ndarray, ds: pydicom.Dataset, s: Slice, shown: bool) -> np.ndarray:
    if ds.get("ModalityLUTSequence"):
        return np.asarray(apply_modality_lut(frame, ds))
    if shown and ds.PhotometricInterpretation == "MONOCHROME1":
        bits = int(ds.BitsStored)
        frame = (-1 if int(ds.get("PixelRepresentation") or 0) else (1 << bits) - 1) - frame.astype(np.int64)
    return np.asarray(frame * s.slope + s.intercept)


def placement(series: Series) -> dict[str, Any]:
    """See `nifti.placement`: predictions are written as NIfTI too. A grid that leans has no qform."""
    axes = series.affine[:3, :3] / np.linalg.norm(series.affine[:3, :3], axis=0)
    leans = np.abs(axes.T @ axes - np.eye(3)).max() > UNIT
    return {"shape": list(series.shape), "unit": "mm", "sform": series.affine.tolist(), "sform_code": 1,
            "qform": series.affine.tolist(), "qform_code": 0 if leans else 1, "files": "dicom"}


def first_series(files: Sequence[Path]) -> list[Path]:
    """The files of the series that the first DICOM file among these belongs to."""
    return _divided([f for f in files if named_dicom(f)], "the source")[0]


def _divided(files: Sequence[Path], what: str) -> list[list[Path]]:
    """By series, in the order of their first files."""
    series: dict[str, list[Path]] = defaultdict(list)
    for file in files:
        ds = _head(file)
        if ds is None:
            raise DataError("unreadable", f"a file of {what} is neither NIfTI nor DICOM", "Export it again.")
        series[str(ds.get("SeriesInstanceUID") or "")].append(file)
    return list(series.values())


def opened(files: Sequence[Path], what: str, most: int) -> list[Opened]:
    """The volumes of these files, one for each series among them."""
    series, found = _divided(files, what), []
    for i, group in enumerate(series):
        name = what if len(series) == 1 else f"channel {i}"
        s = open_series(group, name, most)
        kinds = Counter(f"{'int' if ds.get('PixelRepresentation') else 'uint'}{ds.get('BitsAllocated')}" for ds in s.headers)
        found.append(Opened(s.shape, s.affine, partial(decode, s, name), placement(s), kinds.most_common(1)[0][0],
                            plain=False, values=s.values, kept=s.kept))
    return found
