"""`data check` as a lab meets it: faults planted one by one are found and named, clean data give none, and nobody is named."""

from __future__ import annotations

import json
import lzma
import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import av
import nibabel as nib
import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageDraw, ImageFont, PngImagePlugin
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid
from scipy.ndimage import gaussian_filter
from test_video_readers import film

from meristem.api import check_data
from meristem.cli import main
from meristem.modalities.image import identity
from meristem.modalities.image.lettering import lettering
from meristem.platform.data import bar, names
from meristem.platform.data.findings import Intake, Measure
from meristem.platform.report.intake import page

CANARY = "Zebraquagga"
SECRETS = (CANARY, "19500102", "1950-01-02", "1.2.840.99999", "7654321")


def reasons(found: Intake) -> set[str]:
    return {f.reason for f in found.findings}


def named(found: Intake, reason: str) -> set[str]:
    """Last parts of the true names of the cases that a finding is about."""
    return {Path(found.local[c.case]).name for f in found.findings if f.reason == reason for c in f.cases}


def held(found: Intake) -> dict[str, int]:
    """Places in headers that may say whose the files are."""
    return {place: n for f in found.findings if f.reason == "header" for place, n in f.parts.items()}


def picture(seed: int, shape: tuple[int, int] = (120, 160)) -> np.ndarray:
    """Grey, smooth, without an edge."""
    x = gaussian_filter(np.random.default_rng(seed).normal(size=shape), 9)
    return (40 + 150 * (x - x.min()) / np.ptp(x)).astype(np.uint8)


def written(pixels: np.ndarray, text: str, at: tuple[int, int] = (6, 6), size: int = 18) -> np.ndarray:
    image = Image.fromarray(pixels)
    ImageDraw.Draw(image).text(at, text, fill=255, font=ImageFont.load_default(size))
    return np.asarray(image)


# ---- clean data

@pytest.mark.parametrize("folder", ["volume_folder", "mask_folder", "image_folder"])
def test_clean_data_give_no_finding(folder: str, request: pytest.FixtureRequest) -> None:
    found = check_data(request.getfixturevalue(folder))
    assert found.ok and found.findings == [] and found.usable == found.samples
    assert found.verdict[-1].startswith("Nothing was found") and sum(s.samples for s in found.splits) == found.samples


def test_what_volumes_are(volume_folder: Path) -> None:
    found = check_data(volume_folder)
    assert found.mixes["orientation"] == {"RAS": 4, "LAS": 4} and found.mixes["stored as"] == {"int16": 7, "float32": 1}
    assert found.mixes["handedness"] == {"right-handed": 4, "left-handed (radiological)": 4}
    assert found.mixes["unit"] == {"unknown": 8}
    measures = {m.name: m.quantiles for m in found.measures}
    assert measures["spacing y"] == pytest.approx([0.8] * 5) and measures["anisotropy"] == pytest.approx([1.5 / 0.8] * 5)
    assert measures["angle to the world's axes (°)"][4] == 0
    assert [(v.name, v.subjects) for v in found.labels] == [("background", 8), ("shell", 8), ("core", 8)]


# ---- volumes

def spoil(folder: Path, number: int, change: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]],
          part: str = "imagesTr") -> None:
    file = folder / part / f"case_{number:02d}.nii.gz"
    image = nib.load(file)
    array, affine = change(np.asarray(image.dataobj).copy(), image.affine.copy())
    nib.save(nib.Nifti1Image(array, affine), file)


def test_faults_of_volumes_and_their_labels_are_named(volume_folder: Path) -> None:
    def stray(x: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        x[0, 0, 0] = 1
        return x, affine

    def unknown(x: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        x[:2, :2, :2] = 7
        return x, affine

    spoil(volume_folder, 0, stray, "labelsTr")
    spoil(volume_folder, 1, unknown, "labelsTr")
    spoil(volume_folder, 2, lambda x, a: (0 * x, a), "labelsTr")
    c, s = np.cos(np.radians(12)), np.sin(np.radians(12))
    turn = np.array([[c, -s, 0, 0], [s, c, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    for part in ("imagesTr", "labelsTr"):
        spoil(volume_folder, 3, lambda x, a: (x, a @ np.diag([1, 1, 4, 1])), part)
        spoil(volume_folder, 4, lambda x, a: (x, turn @ a), part)
    spoil(volume_folder, 5, lambda x, a: (np.minimum(x, 100), a))
    spoil(volume_folder, 6, lambda x, a: (x[:-1], a), "labelsTr")
    spoil(volume_folder, 7, lambda x, a: (np.full_like(x, 3), a))
    (volume_folder / "imagesTr" / "spare.nii.gz").write_bytes((volume_folder / "imagesTr" / "case_00.nii.gz").read_bytes())
    found = check_data(volume_folder)
    faults = {"stray": 0, "unknown label": 1, "empty mask": 2, "saturated": 5, "shape": 6, "empty": 7}
    assert {reason: named(found, reason) for reason in faults} == {r: {f"case_{i:02d}.nii.gz"} for r, i in faults.items()}
    told = {Path(found.local[c.case]).name: c.what for f in found.of("doubt") if f.reason == "unusual" for c in f.cases}
    assert "spacing z is 6, the median 1.5" in told["case_03.nii.gz"] and "robust deviations" in told["case_03.nii.gz"]
    angle = next(m for m in found.measures if m.name.startswith("angle"))
    assert angle.quantiles[4] == pytest.approx(12, abs=0.01) and found.mixes["oblique"] == {"no": 5, "yes": 1}
    assert "not listed" in reasons(found) and not found.ok
    few = next(f for f in found.findings if f.reason == "few")
    assert "label 7 (1)" in few.what and "label 1 shell" not in few.what
    assert "6 of 8 samples can be used" in found.verdict[0]


def test_texts_of_a_nifti_header_are_named_by_place(volume_folder: Path) -> None:
    file = volume_folder / "imagesTr" / "case_00.nii.gz"
    image = nib.load(file)
    image.header["descrip"], image.header["intent_name"], image.header["aux_file"] = CANARY, CANARY, "none"
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", CANARY.encode()))
    nib.save(image, file)
    label = volume_folder / "labelsTr" / "case_01.nii.gz"  # a program's version says nothing of anybody
    image = nib.load(label)
    image.header["descrip"] = "FSL5.0"
    nib.save(image, label)
    found = check_data(volume_folder)
    assert held(found) == {"NIfTI descrip": 1, "NIfTI intent_name": 1, "NIfTI extension (text or other)": 1}
    assert found.ok and CANARY not in str(found.dump())


# ---- pictures

def dicom(path: Path, pixels: np.ndarray, clean: bool = False, **elements: str) -> None:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = SecondaryCaptureImageStorage, ExplicitVRLittleEndian
    meta.MediaStorageSOPInstanceUID = generate_uid(prefix=None) if clean else "1.2.840.99999.1.2.3"
    ds = FileDataset(path, {}, file_meta=meta, preamble=bytes(128))
    ds.SOPClassUID, ds.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    ds.Rows, ds.Columns = pixels.shape
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME2", 0
    ds.BitsAllocated = ds.BitsStored = 8
    ds.HighBit, ds.Modality, ds.PixelData = 7, "US", pixels.tobytes()
    for name, value in elements.items():
        setattr(ds, name, value)
    if not clean:
        ds.private_block(0x0009, CANARY, create=True).add_new(1, "LO", CANARY)
    ds.save_as(path, enforce_file_format=True)


def test_dicom_elements_are_named_and_never_quoted(tmp_path: Path) -> None:
    for i in range(3):
        dicom(tmp_path / f"{i}.dcm", picture(i), PatientName=f"{CANARY}^Anna", PatientBirthDate="19500102", EchoTime="4.6",
              Manufacturer="Maker", BurnedInAnnotation="YES" if i == 1 else "NO", PatientComments="" if i else CANARY)
    found = check_data(tmp_path, "image")
    assert held(found) == {
        "DICOM PatientName": 3, "DICOM PatientBirthDate": 3, "DICOM PatientComments": 1, "DICOM SOPInstanceUID": 3,
        "DICOM MediaStorageSOPInstanceUID": 3, "DICOM private elements": 3}
    assert named(found, "text") == {"1.dcm"} and found.mixes["BurnedInAnnotation"] == {"NO": 2, "YES": 1}
    assert not any(secret in json.dumps(found.dump()) + page(found) for secret in SECRETS)


def test_a_dicom_that_cannot_be_read_is_still_searched_and_one_that_is_clean_is_not_accused(tmp_path: Path) -> None:
    for i in range(5):
        dicom(tmp_path / f"{i}.dcm", picture(i), clean=True)
    assert check_data(tmp_path, "image").findings == []
    dicom(tmp_path / "5.dcm", picture(5), clean=True, PatientID=CANARY, Rows=9999)
    found = check_data(tmp_path, "image")
    assert found.usable == 5 and held(found) == {"DICOM PatientID": 1}


def test_nested_and_overlay_elements_are_seen(tmp_path: Path) -> None:
    dicom(tmp_path / "a.dcm", picture(0), clean=True)
    ds, item = pydicom.dcmread(tmp_path / "a.dcm"), pydicom.Dataset()
    item.OperatorsName, item.CodeMeaning = CANARY, "Chest"
    ds.RequestAttributesSequence = [item]
    ds.add_new(0x60000010, "US", 8)
    ds.add_new(0x60003000, "OW", b"\1\0")
    ds.save_as(tmp_path / "a.dcm")
    assert identity.of_file(tmp_path / "a.dcm") == ["DICOM OperatorsName", "DICOM OverlayData"]


def test_exif_and_png_texts_are_named(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Artist], exif[ExifTags.Base.Orientation] = CANARY, 1
    exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitude] = (48.0, 1.0, 2.0)
    Image.fromarray(picture(0)).save(tmp_path / "a.jpg", exif=exif, comment=CANARY)
    info = PngImagePlugin.PngInfo()
    info.add_text("Author", CANARY)
    info.add_text(CANARY, "x")
    info.add_text("Software", "Painter")
    Image.fromarray(picture(1)).save(tmp_path / "b.png", pnginfo=info)
    Image.fromarray(picture(2)).save(tmp_path / "c.jpg")
    assert identity.of_file(tmp_path / "a.jpg") == ["EXIF Artist", "EXIF GPSInfo", "JPEG comment"]
    assert identity.of_file(tmp_path / "b.png") == ["PNG text Author", "PNG text of another keyword"]
    assert identity.of_file(tmp_path / "c.jpg") == []


@pytest.mark.parametrize("text", ["DOE^JOHN 1950-01-02", "General Hospital", "MRN 7654321"])
@pytest.mark.parametrize(("at", "place"), [((6, 6), "upper left"), ((430, 440), "lower right")])
def test_text_in_a_picture_is_hinted_at_with_its_place(text: str, at: tuple[int, int], place: str) -> None:
    pictures = [picture(i, (480, 640)) for i in range(3)]
    found = [lettering(written(p, text, at, 20)) for p in pictures]
    assert all(doubt is not None and doubt.what.endswith(place) for doubt in found)
    assert not any(map(lettering, pictures))


@given(st.integers(0, 10_000), st.floats(0, 40))
@settings(max_examples=25, deadline=None)
def test_noise_is_no_text(seed: int, strength: float) -> None:
    noise = np.random.default_rng(seed).normal(0, strength, (96, 96))
    assert lettering((picture(seed, (96, 96)) + noise).clip(0, 255).astype(np.uint8)) is None


def test_faults_of_pictures(image_folder: Path) -> None:
    dark = image_folder / "dark"
    Image.fromarray(np.full((32, 40), 9, np.uint8)).save(dark / "00.png")
    Image.fromarray(np.asarray(Image.open(dark / "01.png")).clip(0, 55)).save(dark / "01.png")
    (image_folder / "light" / "05.png").write_bytes((dark / "02.png").read_bytes())
    Image.fromarray(written(picture(1), "Smith, Anna 1950")).save(dark / "03.png")
    found = check_data(image_folder)
    assert named(found, "constant") == {"00.png"} and named(found, "saturated") == {"01.png"}
    assert named(found, "text") == {"03.png"}
    assert named(found, "contradiction") == {"02.png", "05.png"} and found.refused == {"duplicate": 1}
    assert "03.png" in named(found, "unusual")  # another size


def test_grey_values_for_classes(mask_folder: Path) -> None:
    for file in (mask_folder / "masks").iterdir():
        Image.fromarray(np.asarray(Image.open(file)) * 127).save(file)
    found, = check_data(mask_folder).findings
    assert found.reason == "label numbers" and found.what.endswith("0, 127, 254")


# ---- tables, splits, classes

def test_a_list_with_holes(image_folder: Path) -> None:
    rows = [("dark/00.png", "p1", "dark", "train", "40"), ("dark/01.png", "p1", "dark", "test", "NA"),
            ("dark/02.png", "", "dark", "train", "51"), ("dark/03.png", "p3", "dark", "train", ""),
            ("dark/04.png", "p6", "dark", "train", "60"), ("light/00.png", "p4", "light", "train", "33"),
            ("light/99.png", "p5", "light", "test", "20")]
    table = image_folder / "all.csv"
    table.write_text("\n".join(",".join(r) for r in [("path", "subject", "class", "split", "patient_name"), *rows]))
    found = check_data(table)
    by_reason = {f.reason: f for f in found.findings}
    assert found.refused == {"missing": 1, "split": 1} and not found.ok and "will not start" in " ".join(found.verdict)
    assert found.blank == {"path": 0, "subject": 1, "class": 0, "split": 0, "patient_name": 2}
    assert "subject (1 of 7), patient_name (2 of 7)" in by_reason["blank"].what
    assert by_reason["column"].level == "identity" and by_reason["not listed"].count == 6
    assert by_reason["class missing"].what.endswith("class light in test") and "class light (1)" in by_reason["few"].what
    assert [(s.name, s.subjects, s.samples, dict(s.classes)) for s in found.splits] == [
        ("train", 5, 5, {"dark": 4, "light": 1}), ("test", 1, 1, {"dark": 1})]
    assert by_reason["split"].cases[0].case.startswith("sub-") and by_reason["split"].cases[0].what == "test and train"


def test_equal_bytes_in_two_splits(tmp_path: Path) -> None:
    for split, own in (("train", 98), ("test", 99)):
        for i in (own, 1, 2, 3, 4):
            (tmp_path / split / str(i % 2)).mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture(i, (32, 40))).save(tmp_path / split / str(i % 2) / f"{split}{i}.png")
    found = check_data(tmp_path)
    leak = next(f for f in found.findings if f.reason == "leak")
    assert leak.count == 4 and leak.cases[0].what == "test and train" and found.refused == {"duplicate": 4}


def test_copies_in_other_bytes(tmp_path: Path) -> None:
    for i in range(6):
        Image.fromarray(picture(i)).save(tmp_path / f"{i}.png")
    Image.fromarray((picture(2)[:, ::-1] * 0.8 + 20).astype(np.uint8)).save(tmp_path / "x.jpg", quality=80)
    found = check_data(tmp_path)
    alike = next(f for f in found.findings if f.reason == "alike")
    assert named(found, "alike") == {"2.png"} and found.ok
    assert found.local[alike.cases[0].what.removeprefix("looks like ")] == "x.jpg"


# ---- names

@pytest.mark.parametrize(("name", "kind"), [
    ("scan_19500102.nii.gz", "a date"), ("1950-01-02_a.png", "a date"), ("02.01.1950.png", "a date"),
    ("1.2.840.99999.3.152.235.2.12.187636473", "a DICOM UID"), ("MRN7654321.png", "a number of 7 digits or more"),
    ("DOE^JOHN.dcm", "parts divided by ^"), ("a.b@clinic.org.png", "an e-mail address"), ("case_0012.nii.gz", ""),
    ("000000397133.jpg", ""), ("BloodImage_00001.jpg", ""), ("sub-01_T1w.nii.gz", ""), ("v1.2.3.txt", "")])
def test_names_that_tell(name: str, kind: str) -> None:
    assert names.telling(name) == kind


@pytest.mark.parametrize(("column", "told"), [("patient_name", True), ("DOB", True), ("date_of_birth", True), ("name", True),
                                              ("filename", False), ("class_name", False), ("age", False), ("scanner", False)])
def test_columns_that_tell(column: str, told: bool) -> None:
    assert names.personal(column) == told


@given(st.lists(st.floats(-1e6, 1e6) | st.integers(-500, 500).map(float), min_size=1, max_size=60))
def test_a_histogram_holds_every_sample(values: list[float]) -> None:
    m = Measure.of("x", np.array(values))
    assert sum(m.counts) == m.samples == len(values) and m.quantiles[0] == min(values) and m.quantiles[4] == max(values)


# ---- other kinds

def test_faults_of_clouds(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(8):
        points = rng.uniform(0, 2, (80, 3))
        points = np.repeat(points[:40], 2, 0) if i == 2 else points * (1, 1, 0) if i == 5 else points
        np.savez(tmp_path / f"{i}.npz", points=points, normals=np.tile([0, 0, 1.0], (80, 1)))
    found = check_data(tmp_path, "points")
    assert named(found, "repeated") == {"2.npz"} and named(found, "flat") == {"5.npz"}
    assert found.mixes["attributes"] == {"normal": 8} and found.measure("distance to the next point (m)") is not None


def test_faults_of_graphs(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("3\n3 0\n0 1 1\n0 2 0 2\n0 1 1\n4 1\n0 1 0\n0 0\n0 0\n0 0\n2 0\n0 1 1\n0 1 0\n")
    found = check_data(tmp_path / "a.txt", "graph")
    assert {f.reason: f.count for f in found.of("doubt") if f.reason in ("loops", "isolated")} == {"loops": 1, "isolated": 1}


def test_faults_of_skeletons(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(4):
        rows = np.repeat(rng.normal(0, 0.1, (1, 117)), 12, 0) if i == 1 else rng.normal(0, 0.1, (12, 117))
        with lzma.open(tmp_path / f"walk_{i}.txt.xz", "wt") as file:
            file.write("\n".join(",".join(f"{x:.5f}" for x in row) for row in rows))
    found = check_data(tmp_path, "skeleton")
    case, = next(f for f in found.findings if f.reason == "still").cases
    assert found.local[case.case].startswith("walk_1")
    assert found.mixes["joints"] == {"28": 4} and found.measure("joints not seen") is not None


def test_what_clips_are(tmp_path: Path) -> None:
    for clip in range(3):
        (tmp_path / str(clip)).mkdir()
        for i in range(9):
            frame = picture(10 * clip + i)
            frame = written(frame, "CAM 11  14:55:02") if clip == 1 else frame
            Image.fromarray(frame).save(tmp_path / str(clip) / f"{i:03d}.png")
    found = check_data(tmp_path, "video")
    measures = {m.name: m.quantiles for m in found.measures}
    assert named(found, "text") == {"1"} and measures["shape t"] == (9.0,) * 5
    assert measures["frames per second"][2] == pytest.approx(25) and found.mixes["frame rate"] == {"constant": 3}


def test_films_of_a_varying_rate_and_with_texts_in_their_container(tmp_path: Path) -> None:
    for name, times in (("even", None), ("uneven", np.cumsum(np.arange(40) % 3 * 40 + 20))):
        film(tmp_path / f"{name}.mp4", times=times)
    with av.open(str(tmp_path / "even.mp4")) as source, av.open(str(tmp_path / "told.mp4"), "w") as out:
        out.metadata["artist"], out.metadata["title"] = CANARY, CANARY
        stream = out.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                out.mux(packet)
    (tmp_path / "even.mp4").unlink()
    found = check_data(tmp_path, "video")
    assert named(found, "rate") == {"uneven.mp4"} and found.mixes["frame rate"] == {"constant": 1, "varies": 1}
    assert held(found) == {"video artist": 1, "video title": 1}


# ---- as it is met

class Links(HTMLParser):
    """What a page would load, or run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.headings: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.headings += [tag] if re.fullmatch("h[1-6]", tag) else []
        if tag == "script" or (tag == "svg" and not dict(attrs).get("aria-label")):
            self.found.append(tag)
        self.found += [f"{tag} {value}" for name, value in attrs if name in ("src", "href", "srcset", "data")]


def test_files_and_terminal_name_nobody(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / f"{CANARY}_clinic"
    data.mkdir()
    for i in range(5):
        dicom(data / f"{CANARY}^Anna_19500102_{i}.dcm", written(picture(i), CANARY) if i else picture(i),
              PatientName=f"{CANARY}^Anna", PatientBirthDate="19500102", PatientID="7654321", StudyDate="19500102")
    broken = data / f"{CANARY}_7654321.dcm"
    broken.write_bytes((data / f"{CANARY}^Anna_19500102_0.dcm").read_bytes()[:-3000])

    def call(*more: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["meristem", "data", "check", str(data), "--modality", "image", *map(str, more)])
        with pytest.raises(SystemExit) as left:
            main()
        return int(left.value.code or 0), *capsys.readouterr()

    out = tmp_path / "found"
    status, said, heard = call("--out", out)
    assert status == 1 and "DICOM PatientName" in said and "truncated" in said and "a date" in said
    html, plain = (out / "check.html").read_text(), (out / "check.json").read_text()
    assert not [s for s in SECRETS for text in (said, heard, html, plain) if s in text]
    assert {f["reason"] for f in json.loads(plain)["findings"]} >= {"truncated", "header", "name", "text"}
    assert json.loads(call("--json")[1]) == json.loads(plain) and CANARY in call("--names")[1]
    assert call("--quiet") == (1, "", "")
    seen = Links(html)
    assert seen.found == [] and seen.headings[:2] == ["h1", "h2"] and "<title>" in html and 'lang="en"' in html


def test_plain_lines_of_progress_without_a_terminal(image_folder: Path, capsys: pytest.CaptureFixture[str],
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bar, "SECONDS", 0.0)
    check_data(image_folder, quiet=False)
    assert "reading files: 12 of 12" in capsys.readouterr().err


# ---- real data

@pytest.mark.data
def test_real_volumes(data_root: Path) -> None:
    found = check_data(data_root / "msd-task04-hippocampus", "volume")
    assert found.ok and found.samples == 209 and found.of("identity") == []
    assert found.mixes["orientation"] == {"RAS": 209} and found.mixes["stored as"]["uint8"] > 30
    unusual, = (f for f in found.findings if f.reason == "unusual")  # its scans of another scaling, to 1.7e6
    assert 10 < unusual.count < 40 and "intensity" in unusual.cases[0].what
