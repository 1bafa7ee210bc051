"""DICOM series as scanners write them, made: classic CT, MR and PET slices, and enhanced multi-frame files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian, generate_uid

CLASSES = {"CT": "1.2.840.10008.5.1.4.1.1.2", "MR": "1.2.840.10008.5.1.4.1.1.4", "PT": "1.2.840.10008.5.1.4.1.1.128",
           "enhanced CT": "1.2.840.10008.5.1.4.1.1.2.1", "enhanced MR": "1.2.840.10008.5.1.4.1.1.4.1",
           "enhanced PT": "1.2.840.10008.5.1.4.1.1.130"}
ALONG = np.diag([-1.0, -1, 1, 1])  # RAS to LPS and back


def items(**elements: Any) -> list[Dataset]:
    ds = Dataset()
    for name, value in elements.items():
        setattr(ds, name, value)
    return [ds]


def base(kind: str, array: np.ndarray, patient: str) -> Dataset:
    """All but geometry and pixels."""
    ds, word = Dataset(), kind.removeprefix("enhanced ")
    meta = ds.file_meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = meta.MediaStorageSOPClassUID = UID(CLASSES[kind])
    ds.Modality, ds.ImageType = word, ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.PatientID, ds.PatientName, ds.PatientBirthDate, ds.PatientSex = patient, f"{patient}^Anna", "19500102", "F"
    ds.StudyInstanceUID = generate_uid(entropy_srcs=[patient, "study"])
    ds.FrameOfReferenceUID = generate_uid(entropy_srcs=[patient, "frame"])
    ds.StudyID, ds.AccessionNumber, ds.ReferringPhysicianName = "7", "A1", ""
    ds.StudyDate, ds.StudyTime, ds.SeriesNumber = "20200304", "101500", 3
    ds.Manufacturer, ds.PositionReferenceIndicator, ds.Laterality = "Made", "", ""
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.Rows, ds.Columns = array.shape[1], array.shape[0]
    ds.BitsAllocated = ds.BitsStored = 8 * array.dtype.itemsize
    ds.HighBit, ds.PixelRepresentation = ds.BitsStored - 1, int(array.dtype.kind == "i")
    return ds


def planes(affine: np.ndarray, shape: Sequence[int]) -> tuple[list[list[float]], list[float], list[float]]:
    """Positions of the slices, direction cosines and pixel spacing (rows, columns) of a RAS grid of x, y and slices."""
    lps = ALONG @ affine
    size = np.linalg.norm(lps[:3, :3], axis=0)
    cosines = np.concatenate([lps[:3, 0] / size[0], lps[:3, 1] / size[1]])
    return [(lps[:3, 3] + k * lps[:3, 2]).tolist() for k in range(shape[2])], cosines.tolist(), [size[1], size[0]]


def text(values: Sequence[float]) -> list[str]:
    """Decimal strings of at most 16 characters, as exact as they can be."""
    return [next(s for digits in range(12, 0, -1) if len(s := f"{v:.{digits}g}") <= 16) for v in values]


def write_series(folder: Path, array: np.ndarray, affine: np.ndarray, kind: str = "CT", patient: str = "P1",
                 names: str = "{:03d}.dcm", order: Sequence[int] | None = None, each: Any = None, series: str | None = None,
                 **elements: Any) -> list[Path]:
    """A file per slice of an array (X, Y, Z) on a RAS grid. order: of the slices in the file names. each: changes slice k."""
    folder.mkdir(parents=True, exist_ok=True)
    positions, cosines, spacing = planes(affine, array.shape)
    number, files = series or generate_uid(), []
    for i, k in enumerate(range(array.shape[2]) if order is None else order):
        ds = base(kind, array, patient)
        ds.SeriesInstanceUID, ds.InstanceNumber = number, i + 1
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        ds.ImagePositionPatient, ds.ImageOrientationPatient = text(positions[k]), text(cosines)
        ds.PixelSpacing, ds.SliceThickness = text(spacing), text([np.linalg.norm(affine[:3, 2])])[0]
        ds.RescaleSlope, ds.RescaleIntercept = "1", "0"
        if kind == "PT":
            ds.Units, ds.SeriesDate, ds.SeriesTime, ds.AcquisitionDate = "BQML", "20200304", "101500", "20200304"
            ds.AcquisitionTime, ds.DecayCorrection, ds.CorrectedImage = f"1015{i:02d}", "START", ["ATTN", "DECY", "SCAT"]
            ds.PatientWeight = "70"
            ds.RadiopharmaceuticalInformationSequence = items(
                RadionuclideTotalDose="350000000", RadionuclideHalfLife="6586.2", RadiopharmaceuticalStartTime="091500")
        ds.PixelData = np.ascontiguousarray(array[:, :, k].T).tobytes()
        for name, value in elements.items():
            setattr(ds, name, value)
        if each is not None:
            each(ds, k)
        path = folder / names.format(i)
        ds.save_as(path, enforce_file_format=True)
        files.append(path)
    return files


def write_enhanced(path: Path, array: np.ndarray, affine: np.ndarray, kind: str = "enhanced MR", patient: str = "P1",
                   order: Sequence[int] | None = None, scaled: Sequence[tuple[float, float]] | None = None) -> Path:
    """One file of all slices. order: of the frames. scaled: slope and intercept of each slice."""
    path.parent.mkdir(parents=True, exist_ok=True)
    positions, cosines, spacing = planes(affine, array.shape)
    ds = base(kind, array, patient)
    order = list(range(array.shape[2])) if order is None else list(order)
    ds.SeriesInstanceUID, ds.InstanceNumber, ds.NumberOfFrames = generate_uid(), 1, len(order)
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    step = text([np.linalg.norm(affine[:3, 2])])[0]
    ds.SharedFunctionalGroupsSequence = items(
        PixelMeasuresSequence=items(PixelSpacing=text(spacing), SliceThickness=step, SpacingBetweenSlices=step),
        PlaneOrientationSequence=items(ImageOrientationPatient=text(cosines)))
    frames = []
    for k in order:
        slope, intercept = text(scaled[k] if scaled else (1.0, 0.0))
        frames += items(PlanePositionSequence=items(ImagePositionPatient=text(positions[k])),
                        FrameContentSequence=items(DimensionIndexValues=[1, k + 1]),
                        PixelValueTransformationSequence=items(RescaleSlope=slope, RescaleIntercept=intercept,
                                                               RescaleType="US"))
    ds.PerFrameFunctionalGroupsSequence = frames
    ds.PixelData = b"".join(np.ascontiguousarray(array[:, :, k].T).tobytes() for k in order)
    ds.save_as(path, enforce_file_format=True)
    return path


def change(path: Path, **elements: Any) -> None:
    """Rewrite elements of a file; None takes one away."""
    ds = pydicom.dcmread(path)
    for name, value in elements.items():
        if value is None:
            delattr(ds, name)
        else:
            setattr(ds, name, value)
    ds.save_as(path, enforce_file_format=True)
