"""Reading and writing of pictures: every number that goes in comes out, and what cannot be read is refused by its reason."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pydicom
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image as Pillow
from PIL import ImageOps
from pydantic import ValidationError
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

from meristem.errors import DataError
from meristem.modalities.base import Header, Modality, Sample, modality_class
from meristem.modalities.image import Image, ImageOptions

H, W = 12, 17
CANARY = "Canary^Patient"


def image(**options: object) -> Image:
    return Image(ImageOptions(**{"channels": 1, "normalise": "unit", **options}))


def values(sample: Sample) -> np.ndarray:
    """What an encoder would see, (C, H, W)."""
    each = (slice(None), None, None)
    return sample.array * np.array(sample.header.scale)[each] + np.array(sample.header.offset)[each]


def reason(call: Callable[[], object]) -> str:
    with pytest.raises(DataError) as caught:
        call()
    return caught.value.reason


def noise(*shape: int, dtype: type = np.uint8, high: int = 256) -> np.ndarray:
    return np.random.default_rng(0).integers(0, high, shape).astype(dtype)


def deep_png(array: np.ndarray) -> bytes:
    """A 16-bit PNG of (H, W, C), by the specification."""
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[array.shape[2]]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", array.shape[1], array.shape[0], 16, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def dicom(path: Path, array: np.ndarray, **tags: object) -> Path:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = SecondaryCaptureImageStorage, generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    ds.PatientName, ds.PatientID, ds.StudyDate = CANARY, "canary-17", "19700101"
    ds.SOPClassUID, ds.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.Rows, ds.Columns = array.shape[-2:]
    ds.BitsAllocated = ds.BitsStored = 8 * array.dtype.itemsize
    ds.HighBit, ds.PixelRepresentation = ds.BitsStored - 1, int(array.dtype.kind == "i")
    ds.PixelData = array.tobytes()
    for name, value in tags.items():
        setattr(ds, name, value)
    ds.save_as(path)
    return path


def test_is_a_registered_modality() -> None:
    cls = modality_class("image")
    made = cls(cls.Options.model_validate({"patch": 4}))
    assert cls is Image and isinstance(made, Modality) and made.options.patch == (4, 4)


# ---- reading

@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif"])
@pytest.mark.parametrize("channels", [1, 3])
def test_eight_bit_values_are_kept(tmp_path: Path, suffix: str, channels: int) -> None:
    pixels = noise(H, W) if channels == 1 else noise(H, W, 3)
    Pillow.fromarray(pixels).save(tmp_path / f"a{suffix}")
    sample = image(channels=channels).read([tmp_path / f"a{suffix}"])
    assert sample.array.dtype == np.uint8 and sample.header.shape == (channels, H, W)
    assert (sample.array == (pixels[None] if channels == 1 else np.moveaxis(pixels, -1, 0))).all()
    assert np.allclose(values(sample), sample.array / 255)


def test_jpeg_reads_as_pillow_does(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Pillow.fromarray(noise(H, W, 3)).save(path)
    assert (image(channels=3).read([path]).array == np.moveaxis(np.asarray(Pillow.open(path)), -1, 0)).all()


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_sixteen_bit_png_loses_nothing(tmp_path: Path, channels: int) -> None:
    pixels = noise(H, W, channels, dtype=np.uint16, high=65536)
    (tmp_path / "a.png").write_bytes(deep_png(pixels))
    colour = 3 if channels > 2 else 1
    sample = image(channels=colour).read([tmp_path / "a.png"])
    assert sample.array.dtype == np.int16
    assert np.allclose(values(sample) * 65535, np.moveaxis(pixels, -1, 0)[:colour], atol=1e-6)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pixels=arrays(np.uint16, st.tuples(st.integers(1, 9), st.integers(1, 9))))
def test_any_sixteen_bit_grey_round_trips(tmp_path: Path, pixels: np.ndarray) -> None:
    for suffix, save in ((".png", lambda p: Pillow.fromarray(pixels).save(p)), (".tif", lambda p: tifffile.imwrite(p, pixels))):
        save(tmp_path / f"a{suffix}")
        assert (np.rint(values(image().read([tmp_path / f"a{suffix}"]))[0] * 65535) == pixels).all()


def test_opacity_is_dropped_and_palettes_become_colours(tmp_path: Path) -> None:
    grey, alpha, colour = noise(H, W), noise(H, W) // 2, noise(H, W, 3)
    Pillow.merge("LA", [Pillow.fromarray(grey), Pillow.fromarray(alpha)]).save(tmp_path / "la.png")
    assert (image().read([tmp_path / "la.png"]).array[0] == grey).all()
    Pillow.fromarray(np.dstack([colour, alpha])).save(tmp_path / "rgba.png")
    assert (image(channels=3).read([tmp_path / "rgba.png"]).array == np.moveaxis(colour, -1, 0)).all()
    table = noise(4, 3)
    palette = Pillow.fromarray(noise(H, W, high=4), "P")
    palette.putpalette(table.tobytes())
    palette.save(tmp_path / "p.png")
    assert (image(channels=3).read([tmp_path / "p.png"]).array == np.moveaxis(table[np.asarray(palette)], -1, 0)).all()
    Pillow.fromarray(grey > 99).save(tmp_path / "one.png")
    assert (image().read([tmp_path / "one.png"]).array[0] == (grey > 99) * 255).all()


def test_grey_is_replicated_and_colour_becomes_luma(tmp_path: Path) -> None:
    grey, colour = noise(H, W), noise(H, W, 3)
    Pillow.fromarray(grey).save(tmp_path / "g.png")
    Pillow.fromarray(colour).save(tmp_path / "c.png")
    assert (image(channels=3).read([tmp_path / "g.png"]).array == grey).all()
    luma = np.rint(colour @ np.array([0.299, 0.587, 0.114]))
    assert (image(channels=1).read([tmp_path / "c.png"]).array[0] == luma).all()
    assert np.abs(luma - np.asarray(Pillow.open(tmp_path / "c.png").convert("L"), float)).max() <= 1
    assert reason(lambda: image(channels=5).read([tmp_path / "c.png"])) == "channels"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_orientation_is_honoured(tmp_path: Path, orientation: int, suffix: str) -> None:
    stored, path = Pillow.fromarray(noise(H, W)), tmp_path / f"a{suffix}"
    exif = Pillow.Exif()
    exif[0x0112] = orientation
    stored.save(path, exif=exif)
    stored.getexif()[0x0112] = orientation
    wanted = np.asarray(ImageOps.exif_transpose(stored))
    sample = image().read([path])
    assert (sample.array[0] == wanted).all() and tuple(sample.header.source["shape"]) == wanted.shape


@pytest.mark.parametrize("channels,shape,axes", [(5, (5, H, W), "CYX"), (5, (H, W, 5), "YXC"), (5, (5, H, W), None),
                                                 (5, (H, W, 5), None), (2, (2, H, W), "CYX"), (3, (3, H, W), "CYX"),
                                                 (3, (H, W, 3), None)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_many_channel_tiff(tmp_path: Path, channels: int, shape: tuple[int, ...], axes: str | None, dtype: type) -> None:
    pixels = noise(*shape, dtype=dtype, high=250)
    tifffile.imwrite(tmp_path / "a.tif", pixels, metadata={"axes": axes} if axes else None)
    sample = image(channels=channels).read([tmp_path / "a.tif"])
    wanted = pixels if shape[0] == channels else np.moveaxis(pixels, -1, 0)
    assert np.allclose(values(sample) * np.iinfo(dtype).max, wanted)


def test_compressed_and_white_is_zero_tiff(tmp_path: Path) -> None:
    pixels = noise(H, W)
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits"):
        Pillow.fromarray(pixels).save(tmp_path / "a.tif", compression=compression)
        assert (image().read([tmp_path / "a.tif"]).array[0] == pixels).all()
    tifffile.imwrite(tmp_path / "w.tif", pixels, photometric="miniswhite")
    assert (image().read([tmp_path / "w.tif"]).array[0] == 255 - pixels).all()


def test_one_file_per_channel(tmp_path: Path) -> None:
    planes = noise(4, H, W)
    paths = [tmp_path / f"{i}.png" for i in range(4)]
    for path, plane in zip(paths, planes, strict=True):
        Pillow.fromarray(plane).save(path)
    modality = image(channels=4)
    assert (modality.read(paths).array == planes).all()
    assert reason(lambda: modality.read(paths[:3])) == "channels"
    Pillow.fromarray(planes[0, 1:]).save(paths[2])
    assert reason(lambda: modality.read(paths)) == "shape"
    Pillow.fromarray(planes[0].astype(np.uint16)).save(paths[2])
    assert reason(lambda: modality.read(paths)) == "channels"


def test_float_tiff_is_held_to_its_quantiser(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).normal(3, 2, (H, W)).astype(np.float32)
    tifffile.imwrite(tmp_path / "a.tif", pixels)
    sample = image(normalise="zscore").read([tmp_path / "a.tif"])
    assert sample.array.dtype == np.int16
    step = np.ptp(pixels) / 65535
    assert np.abs(values(sample)[0] * pixels.std() + pixels.mean() - pixels).max() <= 0.51 * step
    pixels[0, 0] = 1e9
    tifffile.imwrite(tmp_path / "a.tif", pixels)
    assert reason(lambda: image().read([tmp_path / "a.tif"])) == "range"
    pixels[0, 0] = np.nan
    tifffile.imwrite(tmp_path / "a.tif", pixels)
    assert reason(lambda: image().read([tmp_path / "a.tif"])) == "nan"


def test_pixel_size_of_microscopes_is_trusted_that_of_printers_is_not(tmp_path: Path) -> None:
    pixels, path = noise(H, W), tmp_path / "a.tif"
    tifffile.imwrite(path, pixels, resolution=(10, 5), imagej=True, metadata={"unit": "mm"})
    assert image().read([path]).header.spacing == pytest.approx((0.2, 0.1))
    tifffile.imwrite(path, pixels, ome=True, metadata={"PhysicalSizeX": 0.5, "PhysicalSizeXUnit": "µm", "PhysicalSizeY": 2.0,
                                                       "PhysicalSizeYUnit": "µm"})
    sample = image().read([path])
    assert sample.header.spacing == pytest.approx((2e-3, 5e-4)) and sample.header.source["unit"] == "mm"
    tifffile.imwrite(path, pixels, resolution=(300, 300), resolutionunit="inch")
    sample = image().read([path])
    assert sample.header.spacing == (1.0, 1.0) and sample.header.source["unit"] == "px"
    assert reason(lambda: image(spacing=0.5).read([path])) == "no-spacing"


def test_packed_rows(tmp_path: Path) -> None:
    grey, colour = noise(4, H, W), noise(4, H, W, 3)
    np.savez(tmp_path / "x.npz", train_images=grey, val_images=colour, labels=np.array([{}], dtype=object))
    row = Path(f"{tmp_path / 'x.npz'}#train_images/2")
    assert (image().read([row], {"mask": row}).fields["mask"] == grey[2]).all()
    assert (image(channels=3).read([Path(f"{tmp_path / 'x.npz'}#val_images/3")]).array == np.moveaxis(colour[3], -1, 0)).all()
    for name, why in (("train_images/4", "missing"), ("test_images/0", "missing"), ("labels/0", "unreadable")):
        assert reason(lambda name=name: image().read([Path(f"{tmp_path / 'x.npz'}#{name}")])) == why
    np.savez(tmp_path / "x.npz", train_images=grey[::-1])
    assert (image().read([row]).array[0] == grey[1]).all(), "a file that changed must be read again"


# ---- DICOM

def test_dicom_values_geometry_and_identity(tmp_path: Path) -> None:
    raw = noise(H, W, dtype=np.int16, high=3000) - np.int16(1000)
    path = dicom(tmp_path / "a.dcm", raw, RescaleSlope="2", RescaleIntercept="-24", PixelSpacing=["0.5", "0.25"])
    sample = image(normalise="zscore").read([path])
    hounsfield = raw * 2.0 - 24
    assert np.allclose(values(sample)[0], (hounsfield - hounsfield.mean()) / hounsfield.std(), atol=1e-9)
    assert sample.header.spacing == (0.5, 0.25) and sample.header.affine == ((0.5, 0, 0), (0, 0.25, 0), (0, 0, 1))
    assert "anary" not in repr(sample) and "1970" not in json.dumps(asdict(sample.header))


def test_dicom_window_is_cut_in_rescaled_values(tmp_path: Path) -> None:
    raw = noise(H, W, dtype=np.int16, high=3000) - np.int16(1000)
    window = {"window": [-160, 240]}
    path = dicom(tmp_path / "a.dcm", raw, RescaleSlope="1", RescaleIntercept="-24")
    wanted = ((raw - 24.0).clip(-160, 240) + 160) / 400
    sample = image(normalise=window).read([path])
    assert np.allclose(values(sample)[0], wanted)
    black, white = image(normalise=window).span(sample.header)
    assert np.allclose([black, white], [[0], [1]])
    inverse = dicom(tmp_path / "b.dcm", raw, RescaleSlope="1", RescaleIntercept="-24", PhotometricInterpretation="MONOCHROME1")
    assert np.allclose(values(image(normalise=window).read([inverse]))[0], 1 - wanted)


def test_dicom_encodings(tmp_path: Path) -> None:
    raw = noise(H, W, dtype=np.uint16, high=4096)
    sample = image().read([dicom(tmp_path / "a.dcm", raw, BitsStored=12, HighBit=11)])
    assert np.allclose(values(sample)[0], raw / 4095) and sample.header.source["unit"] == "px"
    sample = image().read([dicom(tmp_path / "b.dcm", raw, BitsStored=12, HighBit=11, PhotometricInterpretation="MONOCHROME1",
                                 ImagerPixelSpacing=["0.2", "0.2"])])
    assert np.allclose(values(sample)[0], 1 - raw / 4095) and sample.header.spacing == (0.2, 0.2)
    colour = noise(H, W, 3)
    sample = image(channels=3).read([dicom(tmp_path / "c.dcm", colour, Rows=H, Columns=W, SamplesPerPixel=3,
                                           PlanarConfiguration=0, PhotometricInterpretation="RGB")])
    assert (sample.array == np.moveaxis(colour, -1, 0)).all()


def test_dicom_refusals(tmp_path: Path) -> None:
    raw = noise(3, H, W)
    frames = dicom(tmp_path / "a.dcm", raw, NumberOfFrames=3)
    assert reason(lambda: image().read([frames])) == "multi-frame"
    whole = dicom(tmp_path / "b.dcm", raw[0]).read_bytes()
    for cut, why in ((len(whole) - 40, "truncated"), (160, "unreadable"), (100, "unreadable")):
        (tmp_path / "b.dcm").write_bytes(whole[:cut])
        assert reason(lambda: image().read([tmp_path / "b.dcm"])) in (why, "truncated")
    bomb = dicom(tmp_path / "c.dcm", raw[0], Rows=60000, Columns=60000)
    assert reason(lambda: image().read([bomb])) == "bomb"


def test_resampling_to_mm(tmp_path: Path) -> None:
    """A ramp stays the same function of mm, and the affine says where each pixel went."""
    y, x = np.mgrid[:40, :60]
    path = dicom(tmp_path / "a.dcm", (100 * y + 10 * x).astype(np.uint16), PixelSpacing=["0.5", "0.25"])
    labels = (y // 10 + 4 * (x >= 28)).astype(np.uint8)
    Pillow.fromarray(labels).save(tmp_path / "m.png")
    modality = image(spacing=1.0)
    sample = modality.read([path], {"mask": tmp_path / "m.png"})
    assert sample.array.shape == (1, 20, 15) == sample.header.shape and sample.header.spacing == (1.0, 1.0)
    index = np.stack(np.meshgrid(np.arange(20), np.arange(15), indexing="ij")).reshape(2, -1)
    mm = np.array(sample.header.affine)[:2, :2] @ index + np.array(sample.header.affine)[:2, 2:]
    ramp = (200 * mm[0] + 40 * mm[1]).reshape(20, 15)
    inside = (slice(3, -3), slice(3, -3))
    assert np.allclose((values(sample)[0] * 65535)[inside], ramp[inside], atol=0.6)
    back = modality.write(sample.fields["mask"], sample.header, tmp_path / "back.png")
    assert (np.asarray(Pillow.open(back)) == labels).all()


# ---- damage

@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".tif"])
def test_truncated_files_are_named_so(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"Canary{suffix}"
    Pillow.fromarray(noise(80, 90, 3)).save(path)
    whole = path.read_bytes()
    for part in (0.95, 0.5, 0.1):
        path.write_bytes(whole[:int(len(whole) * part)])
        with pytest.raises(DataError) as caught:
            image(channels=3).read([path])
        assert caught.value.reason == "truncated"
        assert "Canary" not in str(caught.value) and caught.value.__suppress_context__, "the file's name must not reach a log"


def test_other_damage(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    assert reason(lambda: image().read([path])) == "missing"
    path.write_bytes(b"")
    assert reason(lambda: image().read([path])) == "empty"
    path.write_bytes(b"no picture at all" * 20)
    assert reason(lambda: image().read([path])) == "unreadable"
    Pillow.fromarray(noise(H, W)).save(path)
    assert reason(lambda: image(max_pixels=H * W - 1).read([path])) == "bomb"
    path.write_bytes(deep_png(noise(H, W, 3, dtype=np.uint16)))
    assert reason(lambda: image(channels=3, max_pixels=10).read([path])) == "bomb"
    path.write_bytes(deep_png(noise(H, W, 3, dtype=np.uint16))[:80])
    assert reason(lambda: image(channels=3).read([path])) == "truncated"
    tifffile.imwrite(tmp_path / "z.tif", noise(4, H, W), metadata={"axes": "ZYX"})
    assert reason(lambda: image(channels=4).read([tmp_path / "z.tif"])) == "frames"
    claim = bytearray(deep_png(noise(1, 1, 1, dtype=np.uint16)))
    claim[16:24] = struct.pack(">II", 50000, 50000)
    claim[29:33] = struct.pack(">I", zlib.crc32(bytes(claim[12:29])))
    path.write_bytes(claim)
    assert reason(lambda: image().read([path])) == "bomb"


# ---- normalisation

def test_normalisations(tmp_path: Path) -> None:
    colour = noise(H, W, 3)
    Pillow.fromarray(colour).save(tmp_path / "a.png")
    planes = np.moveaxis(colour, -1, 0).astype(float)
    seen = values(image(channels=3, normalise="zscore").read([tmp_path / "a.png"]))
    assert np.allclose(seen.mean((1, 2)), 0) and np.allclose(seen.std((1, 2)), 1)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    seen = values(image(channels=3, normalise="imagenet").read([tmp_path / "a.png"]))
    assert np.allclose(seen, (planes / 255 - mean[:, None, None]) / std[:, None, None])
    modality = image(channels=3, normalise="zscore")
    scale, offset = modality.statistics(np.moveaxis(colour, -1, 0))
    assert modality.read([tmp_path / "a.png"]).header.scale == pytest.approx(scale) and len(offset) == 3
    for wrong in ({"channels": 2, "normalise": "imagenet"}, {"normalise": {"window": [3, 3]}}, {"channels": 0}):
        with pytest.raises(ValidationError):
            image(**wrong)


def test_constant_image_is_finite(tmp_path: Path) -> None:
    Pillow.fromarray(np.full((H, W), 7, np.uint8)).save(tmp_path / "a.png")
    assert (values(image(normalise="zscore").read([tmp_path / "a.png"])) == 0).all()


# ---- masks

@pytest.mark.parametrize(("value", "values"), [(-1, {0: 0, 1: 1}), (2, {0: 0, 1: 1}), (1, {0: 0, 1: 40_000})])
def test_a_mask_with_a_value_or_class_that_is_none_is_refused(value: int, values: dict[int, int], tmp_path: Path) -> None:
    Pillow.fromarray(noise(H, W)).save(tmp_path / "a.png")
    mask = np.zeros((H, W), np.int16)
    mask[0, 0] = value
    tifffile.imwrite(tmp_path / "m.tif", mask)
    with pytest.raises(DataError) as error:
        image(mask_values=values).read([tmp_path / "a.png"], {"mask": tmp_path / "m.tif"})
    assert error.value.reason == "mask" and "modality.image.mask_values" in error.value.remedy


def test_mask_values_there_and_back(tmp_path: Path) -> None:
    pixels, stored = noise(H, W), np.array([0, 128, 255], np.uint8)[noise(H, W, high=3)]
    Pillow.fromarray(pixels).save(tmp_path / "a.png")
    Pillow.fromarray(stored).save(tmp_path / "m.png")
    modality = image(mask_values={0: 0, 128: 1, 255: 2})
    sample = modality.read([tmp_path / "a.png"], {"mask": tmp_path / "m.png"})
    assert (sample.fields["mask"] == np.searchsorted([0, 128, 255], stored)).all()
    assert {sample.fields["mask"][place] for place in sample.header.anchors} == {1, 2} and len(sample.header.anchors) <= 64
    written = modality.write(sample.fields["mask"], sample.header, tmp_path / "out")
    assert written.suffix == ".png" and (np.asarray(Pillow.open(written)) == stored).all()
    stored[0, 0] = 77
    Pillow.fromarray(stored).save(tmp_path / "m.png")
    with pytest.raises(DataError, match="77"):
        modality.read([tmp_path / "a.png"], {"mask": tmp_path / "m.png"})
    with pytest.raises(DataError, match="class 3"):
        modality.write(np.full((H, W), 3), sample.header, tmp_path / "out")


def test_palette_masks_are_indices_and_colour_masks_are_refused(tmp_path: Path) -> None:
    labels, a, m = noise(H, W, high=4), tmp_path / "a.png", tmp_path / "m.png"
    Pillow.fromarray(noise(H, W)).save(a)
    palette = Pillow.fromarray(labels, "P")
    palette.putpalette(noise(4, 3).tobytes())
    palette.save(m)
    assert (image().read([a], {"mask": m}).fields["mask"] == labels).all()
    Pillow.fromarray(np.dstack([labels] * 3)).save(m)
    assert (image().read([a], {"mask": m}).fields["mask"] == labels).all()
    Pillow.fromarray(noise(H, W, 3)).save(m)
    assert reason(lambda: image().read([a], {"mask": m})) == "mask"
    Pillow.fromarray(labels[:-1]).save(m)
    assert reason(lambda: image().read([a], {"mask": m})) == "shape"
    Pillow.fromarray(labels).save(tmp_path / "m.jpg")
    assert reason(lambda: image().read([a], {"mask": tmp_path / "m.jpg"})) == "mask"


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(labels=arrays(np.int64, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.integers(0, 300)))
def test_any_label_map_round_trips(tmp_path: Path, labels: np.ndarray) -> None:
    modality, h, w = image(), *labels.shape
    header = Header((1, h, w), ((1, 0, 0), (0, 1, 0), (0, 0, 1)), (1.0, 1.0), source={"shape": [h, w]})
    path = modality.write(labels, header, tmp_path / "m.png")
    Pillow.fromarray(np.zeros((h, w), np.uint8)).save(tmp_path / "a.png")
    assert (modality.read([tmp_path / "a.png"], {"mask": path}).fields["mask"] == labels).all()


# ---- real data

@pytest.mark.data
def test_pneumoniamnist(data_root: Path) -> None:
    file = data_root / "pneumoniamnist" / "pneumoniamnist_union.npz"
    with np.load(file) as archive:
        wanted = archive["test_images"][[0, 17, 623]]
    got = [image().read([Path(f"{file}#test_images/{i}")]).array[0] for i in (0, 17, 623)]
    assert (np.stack(got) == wanted).all()


@pytest.mark.data
def test_white_cells(data_root: Path) -> None:
    folder = data_root / "wbc-dataset1" / "Dataset 1"
    modality = image(channels=3, mask_values={0: 0, 128: 1, 255: 2})
    for path in sorted(folder.glob("*.bmp"))[::30]:
        mask = path.with_suffix(".png")
        sample = modality.read([path], {"mask": mask})
        back = np.array([0, 128, 255])[sample.fields["mask"]]
        assert (back == np.asarray(Pillow.open(mask))).all() and sample.array.dtype == np.uint8


@pytest.mark.data
def test_brain_slices(data_root: Path) -> None:
    for path in sorted((data_root / "dicom-brain-mr").rglob("*.dcm"))[::25]:
        ds, sample = pydicom.dcmread(path), image(normalise="zscore").read([path])
        raw = ds.pixel_array.astype(float) * float(ds.get("RescaleSlope", 1)) + float(ds.get("RescaleIntercept", 0))
        assert np.allclose(values(sample)[0], (raw - raw.mean()) / raw.std(), atol=1e-6)
        assert sample.header.spacing == pytest.approx(tuple(ds.PixelSpacing))
