"""DICOM SEG out: the same voxels on the same grid, what the standard asks for, references to every source."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import highdicom as hd
import nibabel as nib
import numpy as np
import pydicom
import pytest
from made_dicom import ALONG, change, write_enhanced, write_series
from pydicom.dataset import Dataset
from test_dicom_series import SHAPE, grid, noise, volume
from test_privacy import found_in
from test_tasks import QUICK, UNET

import meristem
from meristem.errors import DataError
from meristem.modalities.volume import dicom, seg
from meristem.platform.data.manifest import Manifest

NAMES = {0: "background", 1: "Liver", 2: "edema", 3: "Zone 7"}
TYPE_1 = {  # of the Segmentation IOD (PS3.3 A.51): attributes that must be there and hold something, by where they stand
    "": ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "SeriesNumber", "InstanceNumber", "Modality",
         "FrameOfReferenceUID", "Manufacturer", "ManufacturerModelName", "DeviceSerialNumber", "SoftwareVersions", "ImageType",
         "ContentLabel", "SegmentationType", "SamplesPerPixel", "PhotometricInterpretation", "Rows", "Columns", "BitsAllocated",
         "BitsStored", "LossyImageCompression", "NumberOfFrames", "ContentDate", "ContentTime", "PixelData",
         "DimensionOrganizationSequence", "DimensionIndexSequence", "SharedFunctionalGroupsSequence",
         "PerFrameFunctionalGroupsSequence", "SegmentSequence", "ReferencedSeriesSequence"),
    "SegmentSequence": ("SegmentNumber", "SegmentLabel", "SegmentAlgorithmType", "SegmentAlgorithmName",
                        "SegmentedPropertyCategoryCodeSequence", "SegmentedPropertyTypeCodeSequence"),
    "SegmentSequence.SegmentedPropertyTypeCodeSequence": ("CodeValue", "CodingSchemeDesignator", "CodeMeaning"),
    "SegmentSequence.SegmentedPropertyCategoryCodeSequence": ("CodeValue", "CodingSchemeDesignator", "CodeMeaning"),
    "ReferencedSeriesSequence": ("SeriesInstanceUID", "ReferencedInstanceSequence"),
    "ReferencedSeriesSequence.ReferencedInstanceSequence": ("ReferencedSOPClassUID", "ReferencedSOPInstanceUID"),
    "SharedFunctionalGroupsSequence": ("PixelMeasuresSequence", "PlaneOrientationSequence"),
    "PerFrameFunctionalGroupsSequence": ("FrameContentSequence", "PlanePositionSequence", "SegmentIdentificationSequence",
                                         "DerivationImageSequence"),
    "PerFrameFunctionalGroupsSequence.FrameContentSequence": ("DimensionIndexValues",),
    "PerFrameFunctionalGroupsSequence.PlanePositionSequence": ("ImagePositionPatient",),
    "PerFrameFunctionalGroupsSequence.DerivationImageSequence": ("SourceImageSequence", "DerivationCodeSequence"),
}


def at(ds: Dataset, place: str) -> list[Dataset]:
    found = [ds]
    for part in filter(None, place.split(".")):
        assert all(part in d for d in found), part
        found = [item for d in found for item in d[part].value]
    return found


def conforms(path: Path) -> Dataset:
    """What every SEG must hold, in pydicom's reading; and dciodvfy finds no error, where dicom3tools is installed."""
    ds = pydicom.dcmread(path)
    for place, names in TYPE_1.items():
        for item in at(ds, place):
            for name in names:
                shared = place == "PerFrameFunctionalGroupsSequence" and name in ds.SharedFunctionalGroupsSequence[0]
                assert shared or (name in item and not item[name].is_empty), f"{place}.{name}"
    assert all(name in ds for name in ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime",
                                       "ReferringPhysicianName", "StudyID", "AccessionNumber"))  # type 2: may be empty
    assert not pydicom.dataset.validate_file_meta(ds.file_meta)
    if tool := shutil.which("dciodvfy"):
        said = subprocess.run([tool, "-new", str(path)], capture_output=True, text=True, check=False).stderr
        assert "Error" not in said, said
    return ds


def labels(shape: Sequence[int] = SHAPE) -> np.ndarray:
    made = np.random.default_rng(1).integers(0, 4, tuple(shape)).astype(np.uint8)
    made[:, :, 2] = 0  # a slice without any label has no frame of its own
    return made


@pytest.mark.parametrize("order", [None, [3, 0, 6, 1, 5, 2, 4]])
def test_single_frames_come_back_voxel_for_voxel(tmp_path: Path, order: list[int] | None) -> None:
    files = write_series(tmp_path / "s", noise(), grid(), order=order, patient="P7")
    source, wanted = dicom.open_series(files, "the source", 2**31), labels()
    ds = conforms(seg.save(wanted, source.affine, files, NAMES, "abc123", tmp_path / "a.seg.dcm"))
    made, first = hd.seg.segread(tmp_path / "a.seg.dcm"), pydicom.dcmread(files[0])
    uids = [str(pydicom.dcmread(files[s.file]).SOPInstanceUID) for s in source.slices]
    read = made.get_pixels_by_source_instance(uids, combine_segments=True, assert_missing_frames_are_empty=True)
    assert np.array_equal(read.transpose(2, 1, 0), wanted)
    geometry = made.get_volume(combine_segments=True)
    move = np.linalg.inv(source.affine) @ ALONG @ geometry.affine  # index of slice, row, column -> of the source
    assert np.allclose(move, np.rint(move), atol=1e-4) and np.allclose(np.abs(move[:3, :3]).sum(0), 1, atol=1e-4)
    index = np.rint(np.einsum("ij,jabc->iabc", move, np.stack([*np.indices(geometry.shape), np.ones(geometry.shape)])))[:3]
    assert np.array_equal(geometry.array, wanted[tuple(index.astype(int))])
    for name in ("PatientID", "PatientName", "PatientBirthDate", "StudyInstanceUID", "FrameOfReferenceUID", "AccessionNumber"):
        assert ds[name].value == first[name].value
    assert ds.SeriesInstanceUID != first.SeriesInstanceUID and ds.DeviceSerialNumber == "abc123"
    referenced = {i.ReferencedSOPInstanceUID for i in ds.ReferencedSeriesSequence[0].ReferencedInstanceSequence}
    assert referenced == set(uids)
    algorithm = ds.SegmentSequence[0].SegmentationAlgorithmIdentificationSequence[0]
    assert (algorithm.AlgorithmName, algorithm.AlgorithmVersion) == ("meristem", version("meristem"))


def test_frames_of_one_file_come_back_in_its_own_order(tmp_path: Path) -> None:
    order = [4, 2, 6, 0, 1, 3, 5]
    file = write_enhanced(tmp_path / "e.dcm", noise(), grid(), order=order)
    source, wanted = dicom.open_series([file], "the source", 2**31), labels()
    conforms(seg.save(wanted, source.affine, [file], NAMES, "abc", tmp_path / "e.seg.dcm"))
    made = hd.seg.segread(tmp_path / "e.seg.dcm")
    read = made.get_pixels_by_source_frame(pydicom.dcmread(file).SOPInstanceUID, range(1, 8), combine_segments=True,
                                           assert_missing_frames_are_empty=True)
    assert np.array_equal(read.transpose(2, 1, 0), wanted[:, :, order])


def test_nothing_found_is_said_too(tmp_path: Path) -> None:
    files = write_series(tmp_path / "s", noise(), grid())
    source = dicom.open_series(files, "the source", 2**31)
    ds = conforms(seg.save(np.zeros(SHAPE, np.uint8), source.affine, files, NAMES, "abc", tmp_path / "a.seg.dcm"))
    assert not ds.pixel_array.any() and [s.SegmentLabel for s in ds.SegmentSequence] == ["Liver", "edema", "Zone 7"]


def test_names_are_coded_where_snomed_has_them() -> None:
    category, kind = seg.coded("liver")
    assert (kind.value, kind.scheme_designator, category.meaning) == ("10200004", "SCT", "Anatomical Structure")
    assert seg.coded("Edema")[1].value == "79654002" and seg.coded("Edema")[0].value == "49755003"
    private = seg.coded("Zone 7")[1]
    assert private.scheme_designator == "99MERISTEM" and private.meaning == "Zone 7" and len(private.value) == 16
    assert private == seg.coded("Zone 7")[1] != seg.coded("Zone 8")[1]


def test_a_source_that_changed_or_lacks_something_is_refused(tmp_path: Path) -> None:
    files = write_series(tmp_path / "s", noise(), grid(), patient="CANARY")
    affine = dicom.open_series(files, "the source", 2**31).affine
    with pytest.raises(DataError) as raised:
        seg.save(labels(), affine + np.eye(4), files, NAMES, "abc", tmp_path / "a.seg.dcm")
    assert raised.value.reason == "shape"
    for file in files:
        change(file, StudyInstanceUID=None)
    with pytest.raises(DataError) as raised:
        seg.save(labels(), affine, files, NAMES, "abc", tmp_path / "a.seg.dcm")
    assert raised.value.reason == "archive" and "StudyInstanceUID is missing" in str(raised.value)
    assert "CANARY" not in str(raised.value) and not list(tmp_path.glob("*.dcm")) and not list(tmp_path.glob(".partial*"))


CANARIES = ("CANARY", "Anna", "19500102", "20200304")


def test_series_train_and_their_predictions_go_back_to_the_archive(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "data"
    (root / "labels").mkdir(parents=True)
    for i in range(6):
        array = noise(shape=(16, 18, 16))
        mask = np.zeros(array.shape, np.uint8)
        mask[4:9, 5:10, 3 + i:8 + i] = 1
        write_series(root / "images" / f"s{i}", array + np.int16(1500) * mask + np.int16(i), grid(), patient=f"CANARY{i}")
        affine = dicom.open_series(sorted((root / "images" / f"s{i}").iterdir()), "", 2**31).affine
        nib.save(nib.Nifti1Image(mask, affine), root / "labels" / f"s{i}.nii.gz")
    found = Manifest.discover(root, volume())
    assert len(found) == 6 and all(r.labelled for r in found.rows) and len({r.subject for r in found.rows}) == 6
    meristem.finetune("segmentation", root, tmp_path / "run", [*UNET, *QUICK, "train.steps=2", "modality.volume.patch=[4,4,4]"],
                      cache=tmp_path / "cache")
    change(root / "images" / "s5" / "003.dcm", PatientID=None, StudyInstanceUID=None)  # trains, but no SEG can be made of it
    written = meristem.predict(tmp_path / "run", root / "images", tmp_path / "predicted")
    said = capfd.readouterr()
    assert sorted(p.name for p in written) == sorted([f"s{i}.nii.gz" for i in range(6)] + [f"s{i}.seg.dcm" for i in range(5)])
    assert "6 samples predicted; 1 without a DICOM SEG" in said.err
    assert "archive" in (tmp_path / "predicted" / "quarantine.csv").read_text()
    for i in range(5):
        ds, image = conforms(tmp_path / "predicted" / f"s{i}.seg.dcm"), nib.load(tmp_path / "predicted" / f"s{i}.nii.gz")
        assert ds.PatientID == f"CANARY{i}"
        source = dicom.open_series(sorted((root / "images" / f"s{i}").iterdir()), "", 2**31)
        uids = [str(pydicom.dcmread(source.files[s.file]).SOPInstanceUID) for s in source.slices]
        read = hd.seg.segread(tmp_path / "predicted" / f"s{i}.seg.dcm").get_pixels_by_source_instance(
            uids, combine_segments=True, assert_missing_frames_are_empty=True)
        assert np.array_equal(read.transpose(2, 1, 0), np.asarray(image.dataobj)) and np.allclose(image.affine, source.affine)
    assert found_in(tmp_path / "run", *CANARIES) == [] == found_in(tmp_path / "cache", *CANARIES)
    assert not any(canary in said.err + said.out for canary in CANARIES)


@pytest.mark.data
def test_a_real_series_comes_back(data_root: Path, tmp_path: Path) -> None:
    for folder in sorted((data_root / "dicom-brain-mr" / "Study3").iterdir()):
        files = sorted(folder.iterdir())
        source = dicom.open_series(files, "the source", 2**31)
        wanted = labels(source.shape)
        conforms(seg.save(wanted, source.affine, files, NAMES, "abc", tmp_path / "a.seg.dcm"))
        uids = [str(pydicom.dcmread(files[s.file]).SOPInstanceUID) for s in source.slices]
        read = hd.seg.segread(tmp_path / "a.seg.dcm").get_pixels_by_source_instance(
            uids, combine_segments=True, assert_missing_frames_are_empty=True)
        assert np.array_equal(read.transpose(2, 1, 0), wanted)
