"""DICOM series: where their voxels lie and what they mean, or why they are refused; who belongs together."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from made_dicom import ALONG, change, items, write_enhanced, write_series
from pydicom.uid import JPEG2000Lossless, JPEGLSLossless, RLELossless, generate_uid

from meristem.errors import DataError
from meristem.modalities.volume import Volume, VolumeOptions, dicom
from meristem.platform.data.cache import Cache
from meristem.platform.data.check import check
from meristem.platform.data.guess import guess_modality
from meristem.platform.data.manifest import Manifest
from meristem.platform.data.splits import divide

SHAPE = (9, 12, 7)


def grid(angle: float = 0.2, spacing: tuple[float, float, float] = (0.7, 0.9, 2.5), tilt: float = 0.0) -> np.ndarray:
    """A right-handed oblique grid (4, 4), RAS; tilt: degrees by which slices lean."""
    c, s = np.cos(angle), np.sin(angle)
    affine = np.eye(4)
    turn = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
    affine[:3, :3] = ALONG[:3, :3] @ turn * spacing
    affine[:3, 2] += affine[:3, 1] / spacing[1] * spacing[2] * np.tan(np.radians(tilt))
    affine[:3, 3] = 10.0, -20.0, 5.5
    return affine


def noise(dtype: Any = np.int16, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(0).integers(0 if np.dtype(dtype).kind == "u" else -1000, 1000, shape).astype(dtype)


def volume(**kw: Any) -> Volume:
    return Volume(VolumeOptions(**kw))


def opened(files: list[Path]) -> Any:
    found, = dicom.opened(files, "the volume", 2**31)
    return found


def refused(files: list[Path]) -> DataError:
    with pytest.raises(DataError) as raised:
        volume().read(files)
    return raised.value


@pytest.mark.parametrize("order", [None, range(6, -1, -1), [3, 0, 6, 1, 5, 2, 4]])
def test_slices_are_sorted_along_their_normal_whatever_their_names(tmp_path: Path, order: Any) -> None:
    array = noise()
    found = opened(write_series(tmp_path, array, grid(), order=order))
    assert found.shape == SHAPE and np.allclose(found.affine, grid(), atol=1e-6)
    assert np.array_equal(found.decode(), array)


def test_slices_against_the_normal_are_turned_with_their_affine(tmp_path: Path) -> None:
    affine, array = grid(), noise()
    affine[:3, 2] *= -1  # left-handed: the first slice written is the last along the normal
    found = opened(write_series(tmp_path, array, affine))
    assert np.allclose(found.affine[:3, 2], -affine[:3, 2], atol=1e-6)
    assert np.allclose(found.affine[:3, 3], affine[:3] @ [0, 0, SHAPE[2] - 1, 1], atol=1e-6)
    assert np.array_equal(found.decode(), array[:, :, ::-1])


def test_each_slice_has_its_own_rescale(tmp_path: Path) -> None:
    array = noise(np.uint16)

    def scale(ds: pydicom.Dataset, k: int) -> None:
        ds.RescaleSlope, ds.RescaleIntercept = str(0.5 + k), str(-10 * k)

    values = opened(write_series(tmp_path / "classic", array, grid(), each=scale)).decode()
    wanted = array * (0.5 + np.arange(7)) - 10 * np.arange(7)
    assert np.allclose(values, wanted, rtol=1e-6)
    scaled = [(0.5 + k, -10.0 * k) for k in range(7)]
    order = [4, 2, 6, 0, 1, 3, 5]
    enhanced = opened([write_enhanced(tmp_path / "e.dcm", array, grid(), order=order, scaled=scaled)])
    assert np.allclose(enhanced.decode(), wanted, rtol=1e-6) and np.allclose(enhanced.affine, grid(), atol=1e-6)


def test_bits_signs_and_inverted_slices(tmp_path: Path) -> None:
    array = noise(np.uint16) % 4096
    twelve = write_series(tmp_path / "12", array, grid(), kind="MR", BitsStored=12, HighBit=11)
    assert np.array_equal(opened(twelve).decode(), array)
    dark = write_series(tmp_path / "m1", array, grid(), kind="MR", BitsStored=12, HighBit=11,
                        PhotometricInterpretation="MONOCHROME1")
    assert np.array_equal(opened(dark).decode(), 4095 - array.astype(np.float32))
    signed = noise()
    mr = write_series(tmp_path / "m1s", signed, grid(), kind="MR", PhotometricInterpretation="MONOCHROME1")
    assert np.array_equal(opened(mr).decode(), -1 - signed.astype(np.float32))
    ct = write_series(tmp_path / "ct", signed, grid(), PhotometricInterpretation="MONOCHROME1", RescaleIntercept="-24")
    assert np.array_equal(opened(ct).decode(), signed - 24.0) and opened(ct).values == "HU"


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless])
def test_compressed_slices_are_the_same(tmp_path: Path, syntax: Any) -> None:
    array = noise()
    files = write_series(tmp_path, array, grid())
    for file in files:
        ds = pydicom.dcmread(file)
        ds.compress(syntax)
        ds.save_as(file, enforce_file_format=True)
    assert np.array_equal(opened(files).decode(), array)


def test_a_syntax_without_a_decoder_is_named(tmp_path: Path) -> None:
    files = write_series(tmp_path, noise(), grid())
    ds = pydicom.dcmread(files[2])
    ds.file_meta.TransferSyntaxUID = JPEG2000Lossless
    ds.PixelData = pydicom.encaps.encapsulate([b"\xff\x4f\xff\x51" + bytes(60)])
    ds["PixelData"].is_undefined_length = True
    ds.save_as(files[2], enforce_file_format=True)
    error = refused(files)
    assert error.reason in ("unreadable", "truncated")  # by which decoders are installed


FAULTS = {
    "missing": lambda f: f[3].unlink(), "two missing": lambda f: [f[3].unlink(), f[4].unlink()],
    "duplicate": lambda f: shutil.copy(f[2], f[2].with_name("copy.dcm")),
    "orientation": lambda f: change(f[0], ImageOrientationPatient=["1", "0", "0", "0", "0", "-1"]),
    "size": lambda f: change(f[1], Rows=6, Columns=18), "pixels": lambda f: change(f[1], PixelSpacing=["1", "1"]),
    "localiser": lambda f: change(f[0], ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]),
    "frame": lambda f: change(f[0], FrameOfReferenceUID=generate_uid()),
    "irregular": lambda f: change(f[3], ImagePositionPatient=[v + 0.4 for v in pydicom.dcmread(f[3]).ImagePositionPatient]),
    "no-affine": lambda f: change(f[3], ImagePositionPatient=None), "no spacing": lambda f: change(f[3], PixelSpacing=None),
    "cosines": lambda f: [change(g, ImageOrientationPatient=["1", "0", "0", "0.9", "0.1", "0"]) for g in f],
    "colour": lambda f: change(f[3], PhotometricInterpretation="PALETTE COLOR"),
    "rescale": lambda f: change(f[3], RescaleSlope="0"), "truncated": lambda f: change(f[3], PixelData=bytes(20)),
    "no pixels": lambda f: change(f[3], PixelData=None), "one": lambda f: [g.unlink() for g in f[1:]],
}
REASONS = {"two missing": "missing", "pixels": "size", "frame": "orientation", "no spacing": "no-affine",
           "cosines": "orientation", "no pixels": "unreadable", "one": "dimensions"}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_would_be_stretched_or_guessed_is_refused(tmp_path: Path, fault: str) -> None:
    files = write_series(tmp_path, noise(), grid(), patient="CANARY")
    FAULTS[fault](files)
    error = refused(sorted(tmp_path.iterdir()))
    assert error.reason == REASONS.get(fault, fault)
    assert "CANARY" not in str(error) and ".dcm" not in str(error) and "1.2.826" not in str(error)
    if "missing" in fault:
        assert f"lacks {2 if 'two' in fault else 1} of its inner slices, the first behind slice 3" in str(error)


def test_several_times_at_one_place_are_told_from_copies(tmp_path: Path) -> None:
    number = generate_uid()
    files = [f for t in range(3) for f in write_series(tmp_path / str(t), noise(), grid(), kind="MR", series=number)]
    assert "at 7 places, 3 times each" in str(refused(files))


def test_positions_may_be_rounded(tmp_path: Path) -> None:
    def rounded(ds: pydicom.Dataset, k: int) -> None:
        ds.ImagePositionPatient = [f"{float(v):.2f}" for v in ds.ImagePositionPatient]

    found = opened(write_series(tmp_path, noise(), grid(spacing=(0.7, 0.7, 0.6)), each=rounded))
    assert np.allclose(found.affine, grid(spacing=(0.7, 0.7, 0.6)), atol=0.006)


def test_a_tilted_gantry_is_refused_or_made_upright(tmp_path: Path) -> None:
    affine = grid(tilt=18)
    files = write_series(tmp_path, noise(), affine)
    assert np.allclose(opened(files).affine, affine, atol=1e-6)  # as it is
    error = refused(files)
    assert error.reason == "leaning" and "modality.volume.spacing=[" in error.remedy
    world = np.einsum("ij,jxyz->ixyz", affine[:3], np.stack([*np.indices(SHAPE), np.ones(SHAPE)]))
    ramp = (100 * (world[1] - world[1].min())).astype(np.int16)  # along the world's y
    room = volume(spacing=(0.7, 0.9, 1.0), normalise="window", window=(0, 2000))
    sample = room.read(write_series(tmp_path / "ramp", ramp, affine))
    stored = np.array(sample.header.affine)
    axes = stored[:3, :3] / np.linalg.norm(stored[:3, :3], axis=0)
    assert np.allclose(axes.T @ axes, np.eye(3), atol=1e-6) and np.allclose(sample.header.spacing, (0.7, 0.9, 1.0))
    values = 1000 * (sample.array[0] * sample.header.scale[0] + sample.header.offset[0] + 1)
    index = np.stack([*np.indices(values.shape), np.ones(values.shape)])
    source = np.einsum("ij,jxyz->ixyz", np.linalg.inv(affine) @ stored, index)[:3]
    inside = ((source >= 0) & (source <= np.array(SHAPE).reshape(3, 1, 1, 1) - 1)).all(0)
    wanted = 100 * (np.einsum("ij,jxyz->ixyz", stored[:3], index)[1] - world[1].min())
    assert inside.sum() > 400 and np.abs(values - wanted)[inside].max() < 1.5  # rounding of the ramp, and of storage


def pet(folder: Path, **elements: Any) -> Any:
    return opened(write_series(folder, noise(np.uint16), grid(), kind="PT", each=lambda ds, k: setattr(
        ds, "RescaleSlope", str(1.5 + k)), **elements))


def test_activity_becomes_suv_by_body_weight(tmp_path: Path) -> None:
    found = pet(tmp_path / "whole")
    dose = 350e6 * 2 ** (-3600 / 6586.2)  # injected an hour before the series began
    wanted = noise(np.uint16) * (1.5 + np.arange(7)) * 70_000 / dose
    assert np.allclose(found.decode(), wanted, rtol=1e-5) and found.values == "SUV by body weight" and not found.kept
    night = pet(tmp_path / "night", SeriesTime="003000", AcquisitionTime="003000", RadiopharmaceuticalInformationSequence=items(
        RadionuclideTotalDose="350000000", RadionuclideHalfLife="6586.2", RadiopharmaceuticalStartTime="233000"))
    assert np.allclose(night.decode(), wanted, rtol=1e-5)
    dated = pet(tmp_path / "dated", RadiopharmaceuticalInformationSequence=items(
        RadionuclideTotalDose="350000000", RadionuclideHalfLife="6586.2", RadiopharmaceuticalStartDateTime="20200304091500.00"))
    assert np.allclose(dated.decode(), wanted, rtol=1e-5)
    ready = pet(tmp_path / "gml", Units="GML")
    assert ready.values == "SUV by body weight" and np.allclose(ready.decode(), noise(np.uint16) * (1.5 + np.arange(7)))


@pytest.mark.parametrize("elements, why", [
    ({"Units": "CNTS"}, "unit"), ({"DecayCorrection": "ADMIN"}, "decay"), ({"DecayCorrection": "NONE"}, "decay"),
    ({"PatientWeight": ""}, "weight"), ({"CorrectedImage": ["DECY"]}, "attenuation"), ({"SeriesTime": "113000"}, "processed"),
    ({"SeriesTime": ""}, "when it was taken"), ({"RadiopharmaceuticalInformationSequence": []}, "tracer"),
    ({"RadiopharmaceuticalInformationSequence": items(RadionuclideTotalDose="35", RadionuclideHalfLife="6586.2")}, "given"),
    ({"RadiopharmaceuticalInformationSequence": items(RadionuclideTotalDose="0", RadionuclideHalfLife="6586.2",
                                                      RadiopharmaceuticalStartTime="091500")}, "dose")])
def test_activity_stays_and_is_told_where_something_lacks(tmp_path: Path, elements: dict[str, Any], why: str) -> None:
    found = pet(tmp_path / "s" / "a", **elements)
    assert why in found.kept and np.allclose(found.decode(), noise(np.uint16) * (1.5 + np.arange(7)))
    intake = check(tmp_path / "s", volume())
    assert [f.reason for f in intake.findings if f.reason == "suv"] == ["suv"]
    assert found.values.startswith("PET as stored, in ") and intake.mixes["values"] == {found.values: 1}


def tree(root: Path) -> Path:
    """Two series of CANARY-A in one folder, one over two folders; one of CANARY-B in files without a suffix; a report."""
    write_series(root / "x" / "mixed", noise(), grid(), patient="CANARY-A", names="a{:02d}.dcm")
    write_series(root / "x" / "mixed", noise() + 1, grid(), patient="CANARY-A", names="b{:02d}.dcm", kind="MR")
    for i, file in enumerate(write_series(root / "y" / "one", noise() + 2, grid(), patient="CANARY-A", names="IM{:04d}")):
        if i % 2:
            (root / "y" / "two").mkdir(exist_ok=True)
            file.rename(root / "y" / "two" / file.name)
    write_series(root / "z" / "s1", noise() + 3, grid(), patient="CANARY-B", names="1.2.840.{}")
    write_series(root / "z" / "sr", noise(), grid(), patient="CANARY-B", each=lambda ds, k: ds.update(
        {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.88.11"}))
    (root / "README").write_text("no DICOM")
    (root / "z" / "broken.dcm").write_bytes(b"nothing")
    return root


def test_a_tree_is_a_sample_for_each_series_grouped_by_patient(tmp_path: Path) -> None:
    root = tree(tmp_path / "data")
    assert guess_modality(root) == "volume"
    found = Manifest.discover(root, volume())
    assert sorted((r.local, len(r.paths)) for r in found.rows) == [
        ("x/mixed/a00.dcm", 7), ("x/mixed/b00.dcm", 7), ("y/one/IM0000", 7), ("z/s1", 7)]
    subjects = {r.local: r.subject for r in found.rows}
    assert len({subjects[k] for k in subjects if k != "z/s1"}) == 1 and len(set(subjects.values())) == 2
    assert not found.class_names
    assert sorted((p.reason, p.local) for p in found.problems) == [("kind", "z/sr/000.dcm"), ("unreadable", "z/broken.dcm")]
    divided = divide(found, "0.5,0,0.5")
    assert all(len({r.split for r in divided.rows if r.subject == s}) == 1 for s in subjects.values())


def test_a_folder_stands_for_a_patient_who_is_not_named(tmp_path: Path) -> None:
    for patient in "abc":
        for s in range(2):
            write_series(tmp_path / patient / f"s{s}", noise() + s, grid(), patient="")
    found = Manifest.discover(tmp_path, volume())
    assert len(found) == 6 and len({r.subject for r in found.rows}) == 3 and not found.class_names


def test_classes_are_folders_that_hold_several_patients(tmp_path: Path) -> None:
    for i, name in enumerate(("well", "ill")):
        for p in range(2):
            write_series(tmp_path / name / f"s{p}", noise() + i, grid(), patient=f"P{i}{p}")
    found = Manifest.discover(tmp_path, volume())
    assert found.class_names == ("ill", "well") and len({r.subject for r in found.rows}) == 4


def test_lists_name_folders_of_series(tmp_path: Path) -> None:
    for name in "ab":
        write_series(tmp_path / name, noise(), grid(), patient=f"P{name}")
        write_series(tmp_path / "two", noise() + 1, grid(), names=name + "{}.dcm")
    (tmp_path / "list.csv").write_text("path,class\na,0\nb,1\ntwo,1\n")
    found = Manifest.discover(tmp_path / "list.csv", volume())
    assert [len(r.paths) for r in found.rows] == [7, 7] and len({r.subject for r in found.rows}) == 2
    assert [p.reason for p in found.problems] == ["series"]
    assert guess_modality(tmp_path / "list.csv") == "volume"


def test_channels_may_be_series(tmp_path: Path) -> None:
    write_series(tmp_path / "t1", noise(), grid(), kind="MR")
    write_series(tmp_path / "t2", noise() + 1, grid(), kind="MR")
    (tmp_path / "list.csv").write_text("path_0,path_1\nt1,t2\n")
    room = volume(channels=2)
    row, = Manifest.discover(tmp_path / "list.csv", room).rows
    assert room.read(row.paths).array.shape == (2, *SHAPE)
    write_series(tmp_path / "t2", noise() + 1, grid(angle=0.3), kind="MR")
    row, = Manifest.discover(tmp_path / "list.csv", room).rows
    with pytest.raises(DataError, match="channel 1 differs"):
        room.read(row.paths)


def test_a_cache_and_its_tables_name_nobody(tmp_path: Path) -> None:
    root = tree(tmp_path / "data")
    (root / "x" / "mixed" / "a03.dcm").unlink()  # one that is refused
    manifest = Manifest.discover(root, volume())
    store = Cache.build(manifest, volume(), tmp_path / "cache")
    assert len(store) == 3 and {p.reason for p in store.quarantine} == {"missing", "kind", "unreadable"}
    written = b"".join(f.read_bytes() for f in (tmp_path / "cache").rglob("*") if f.is_file())
    said = written + json.dumps(manifest.table()).encode()
    said += repr([asdict(store.header(i)) for i in store.rows]).encode() + repr(store.quarantine).encode()
    uids = {str(pydicom.dcmread(r.paths[0])[tag].value) for r in manifest.rows
            for tag in ("SeriesInstanceUID", "SOPInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID")}
    for canary in ("CANARY", "Anna", "19500102", "20200304", "broken.dcm", *uids):
        assert canary.encode() not in said
    intake = check(root, volume())
    assert any("DICOM PatientName" in f.parts for f in intake.of("identity")) and "CANARY" not in json.dumps(intake.dump())


@pytest.mark.data
def test_real_series_lie_where_another_reader_puts_them(data_root: Path) -> None:
    sitk = pytest.importorskip("SimpleITK", reason="SimpleITK, an independent reader, is not installed")
    manifest = Manifest.discover(data_root / "dicom-brain-mr", volume())
    assert len(manifest) == 5 and len({r.subject for r in manifest.rows}) == 1
    for row in manifest.rows:
        found = opened(list(row.paths))
        names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(row.paths[0].parent))
        image = sitk.ReadImage(names)
        wanted = np.eye(4)
        wanted[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
        wanted[:3, 3] = image.GetOrigin()
        corners = np.array([[x, y, z, 1] for x in (0, 1) for y in (0, 1) for z in (0, 1)]) * [*np.array(found.shape) - 1, 1]
        assert np.abs((ALONG @ wanted - found.affine) @ corners.T).max() < 1e-3
        assert np.array_equal(sitk.GetArrayFromImage(image).transpose(2, 1, 0), found.decode())


@pytest.mark.data
def test_real_series_lie_where_their_headers_say(data_root: Path) -> None:
    """By the formula of PS3.3 C.7.6.2.1.1, pixel by pixel, from each slice's own header."""
    for row in Manifest.discover(data_root / "dicom-brain-mr", volume()).rows:
        found = opened(list(row.paths))
        values, inverse = found.decode(), np.linalg.inv(found.affine)
        for path in row.paths[::5]:
            ds = pydicom.dcmread(path)
            cosines, (dy, dx) = np.array(ds.ImageOrientationPatient, float).reshape(2, 3), map(float, ds.PixelSpacing)
            for i, j in ((0, 0), (ds.Rows - 1, 7), (11, ds.Columns - 1)):
                lps = np.array(ds.ImagePositionPatient, float) + cosines[0] * dx * j + cosines[1] * dy * i
                index = (inverse @ [-lps[0], -lps[1], lps[2], 1])[:3]
                assert np.abs(index - np.rint(index)).max() < 1e-3
                slope, intercept = float(ds.get("RescaleSlope", 1)), float(ds.get("RescaleIntercept", 0))
                assert values[tuple(np.rint(index).astype(int))] == ds.pixel_array[i, j] * slope + intercept
