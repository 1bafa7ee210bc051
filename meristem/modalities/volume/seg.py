"""Label maps as DICOM SEG, for the archive that their series came from: same patient, study, frame of reference and grid.

What says who the patient is is copied from the source's files while the SEG is written, and kept nowhere else. A label whose
name SNOMED CT has among the segmentation types that pydicom lists is coded by it; any other by a code of the private scheme
99MERISTEM, which is a hash of its name.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import highdicom as hd
import numpy as np
import pydicom
from highdicom.sr.coding import CodedConcept
from pydicom.sr._cid_dict import cid_concepts
from pydicom.sr._concepts_dict import concepts
from pydicom.sr.codedict import codes

from meristem.errors import DataError
from meristem.modalities.volume import dicom
from meristem.modalities.volume.nifti import same_grid

SCHEME = "99MERISTEM"
UNKNOWN = ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID", "AccessionNumber",
           "ReferringPhysicianName", "PositionReferenceIndicator")  # of type 2: empty where the source lacks them
SERIES = 10_000  # added to the source's series number
CATEGORIES = {  # context group of property types (PS3.16) -> category of what is in it; the first that has a type counts
    7159: codes.SCT.MorphologicallyAbnormalStructure, 7166: codes.SCT.Tissue, 7157: codes.SCT.PhysicalObject,
    **dict.fromkeys((7140, 7152, 7153, 7154, 7155, 7156, 7160, 7192), codes.SCT.AnatomicalStructure)}


def coded(name: str) -> tuple[CodedConcept, CodedConcept]:
    """Category and type of the segments of a label: by SNOMED CT where a context group of segmentation types has its name."""
    plain = _plain(name)
    for group, category in CATEGORIES.items():
        for keyword in cid_concepts[group].get("SCT", ()):
            if _plain(keyword) == plain:
                value, (meaning, _) = next(iter(concepts["SCT"][keyword].items()))
                return CodedConcept.from_code(category), CodedConcept(value, "SCT", meaning)
    value = hashlib.sha256(name.encode()).hexdigest()[:16].upper()
    return CodedConcept("CLASS", SCHEME, "Class of a trained model"), CodedConcept(value, SCHEME, name[:64])


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def save(labels: np.ndarray, affine: np.ndarray, paths: Sequence[Path], names: Mapping[int, str], recipe: str,
         path: Path) -> Path:
    """Labels (X, Y, Z) on the grid of a series, as a SEG with a binary segment for each class above 0.

    affine: of the grid when it was read. paths: of the sample; of several series the first is the source. names: value ->
    class, of all from 1 on. recipe: its hash, written as the device's serial number. Written whole or not at all. Raises
    DataError: `archive` where the source lacks what a SEG has to say, `shape` where it is not what it was.
    """
    source = dicom.open_series(dicom.first_series(paths), "the source", labels.size)
    same_grid(labels.shape, affine, source.shape, source.affine, "the prediction", "its source")
    frames = labels.transpose(2, 1, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they quote the file's values
        try:
            made = _segmentation(frames, source, names, recipe)
            partial = path.with_name(f".partial-{path.name}")
            made.save_as(partial)
        except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
            raise DataError("archive", f"no DICOM SEG could be made of it ({_lacking(error)}); its NIfTI file is there",
                            "The source's header is incomplete: export the series again with all that the archive "
                            "knows.") from None
    return partial.replace(path)


def _lacking(error: Exception) -> str:
    """The element that is said to be missing, by its name; never a value."""
    named = re.search(r"attribute '([A-Z][A-Za-z]+)'", str(error))
    return f"{named[1]} is missing" if named else type(error).__name__


def _header(path: Path) -> pydicom.Dataset:
    ds = pydicom.dcmread(path, stop_before_pixels=True)
    for name in UNKNOWN:
        if name not in ds:
            setattr(ds, name, "")
    return ds


def _segmentation(frames: np.ndarray, source: dicom.Series, names: Mapping[int, str], recipe: str) -> hd.seg.Segmentation:
    order = [s.file for s in source.slices]
    if len(source.files) == 1:
        images = [_header(source.files[0])]
        frames = frames[np.argsort([s.frame for s in source.slices])]
    elif len(set(order)) == len(order):
        images = [_header(source.files[i]) for i in order]
    else:
        raise ValueError("several files of several frames")
    first = images[0]
    release = version("meristem")
    algorithm = hd.AlgorithmIdentificationSequence("meristem", codes.DCM.ArtificialIntelligence, release,
                                                   parameters={"recipe": recipe})
    segments = []
    for value in range(1, max(names) + 1):
        category, kind = coded(names[value])
        segments.append(hd.seg.SegmentDescription(
            value, names[value][:64], category, kind, hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC, algorithm))
    step = float(np.linalg.norm(source.affine[:3, 2]))
    spacing = [float(np.linalg.norm(source.affine[:3, axis])) for axis in (1, 0)]
    measures = None if len(source.files) == 1 else hd.PixelMeasuresSequence(
        spacing, float(first.get("SliceThickness") or step), step)
    return hd.seg.Segmentation(
        images, frames.astype(np.uint8 if max(names) < 256 else np.uint16), hd.seg.SegmentationTypeValues.BINARY, segments,
        series_instance_uid=hd.UID(), series_number=int(first.get("SeriesNumber") or 0) + SERIES, sop_instance_uid=hd.UID(),
        instance_number=1, manufacturer="Meristem", manufacturer_model_name="meristem", software_versions=release,
        device_serial_number=recipe, content_label="SEGMENTATION", content_description="Segmentation by a trained model",
        pixel_measures=measures, omit_empty_frames=bool(frames.any()), series_description="Segmentation by meristem")
