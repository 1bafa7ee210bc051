"""Volumes: what is read, what is refused and why, and the way back to the source grid."""

from __future__ import annotations

import gzip
import itertools
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from pydantic import ValidationError

from meristem.errors import DataError
from meristem.modalities.base import Look, Modality, modality_class
from meristem.modalities.volume import Volume, VolumeOptions, VolumeViewOptions
from meristem.modalities.volume.phantom import phantom, write_phantoms

SHAPE = (9, 11, 7)


def volume(**kw: Any) -> Volume:
    return Volume(VolumeOptions(**kw))


def oblique(spacing: tuple[float, float, float] = (1.0, 0.8, 2.0), angle: float = 0.2) -> np.ndarray:
    c, s = np.cos(angle), np.sin(angle)
    affine = np.eye(4)
    affine[:3, :3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.array([[1, 0, 0], [0, c, -s], [0, s, c]]) * spacing
    affine[:3, 3] = 10.0, -20.0, 5.5
    return affine


def nifti(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    nib.save(nib.Nifti1Image(array, oblique() if affine is None else affine), path)
    return path


def noise(shape: tuple[int, ...] = SHAPE, dtype: Any = np.float32, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(100, 25, shape)).clip(0, 255).astype(dtype)


def blob(shape: tuple[int, ...]) -> np.ndarray:
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
    radius = np.sqrt(((grid - 0.1) ** 2 * np.array([1, 1.4, 1])[:, None, None, None]).sum(0))
    return (radius < 0.7).astype(np.uint8) + (radius < 0.4)


def dequantised(sample: Any) -> np.ndarray:
    each = (slice(None), None, None, None)
    return sample.array * np.array(sample.header.scale)[each] + np.array(sample.header.offset)[each]


def reason(call: Any) -> str:
    with pytest.raises(DataError) as raised:
        call()
    return raised.value.reason


# ---- reading


def test_it_is_registered_and_follows_the_protocol() -> None:
    assert modality_class("volume") is Volume
    assert isinstance(volume(), Modality)
    options = VolumeOptions(labels={3: 1})
    assert VolumeOptions.model_validate(json.loads(options.model_dump_json())) == options


@pytest.mark.parametrize("wrong", [{"orientation": "RAX"}, {"orientation": "RLS"}, {"normalise": "window"}, {"window": (0, 1)},
                                   {"spacing": (1.0, 1.0)}, {"patch": (4, 4)}])
def test_wrong_options_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        VolumeOptions.model_validate(wrong)
    with pytest.raises(ValidationError):
        VolumeViewOptions.model_validate({"size": (8, 8)})


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_values_come_normalised_with_a_bounded_error(tmp_path: Path, suffix: str) -> None:
    array = noise((20, 22, 18)) * 1e4
    sample = volume(clip=(0.0, 100.0)).read([nifti(tmp_path / f"a{suffix}", array)])
    wanted = (array - array.mean()) / array.std()
    assert sample.array.dtype == np.int16
    assert np.abs(dequantised(sample)[0] - wanted).max() < 1e-3
    assert np.allclose(sample.header.affine, oblique(), atol=1e-5)
    assert np.allclose(sample.header.spacing, (1.0, 0.8, 2.0), atol=1e-6)


def test_bytes_stay_bytes(tmp_path: Path) -> None:
    array = noise(dtype=np.uint8)
    sample = volume(clip=(0.0, 100.0)).read([nifti(tmp_path / "a.nii", array)])
    assert sample.array.dtype == np.uint8
    assert np.array_equal(sample.array[0], array)
    assert np.abs(dequantised(sample)[0] - (array - array.mean()) / array.std()).max() < 1e-5


def test_scaled_integers_are_read_as_their_values(tmp_path: Path) -> None:
    image = nib.Nifti1Image(noise(dtype=np.uint8), oblique())
    image.header.set_slope_inter(3.0, -50.0)
    nib.save(image, tmp_path / "a.nii")
    true = nib.load(tmp_path / "a.nii").get_fdata()
    sample = volume(clip=(0, 100)).read([tmp_path / "a.nii"])
    assert np.abs(dequantised(sample)[0] - (true - true.mean()) / true.std()).max() < 1e-3


@pytest.mark.parametrize("dtype", [np.int16, np.uint8])
def test_a_window_maps_to_one_either_side(tmp_path: Path, dtype: Any) -> None:
    array = noise(dtype=dtype)
    sample = volume(normalise="window", window=(60.0, 140.0)).read([nifti(tmp_path / "a.nii", array)])
    wanted = (array.clip(60, 140) - 100.0) / 40.0
    assert np.abs(dequantised(sample)[0] - wanted).max() < 1e-4
    assert sample.header.pad == (-1.0,)
    assert np.allclose(volume().span(sample.header), [[-1.0], [1.0]], atol=1e-4)


def test_percentiles_are_of_the_foreground(tmp_path: Path) -> None:
    array = np.zeros((20, 20, 20), np.float32)
    array[5:15, 5:15, 5:15] = noise((10, 10, 10))
    inside = array[array > 0]
    sample = volume(normalise="percentile", clip=(1, 99), foreground=0.0).read([nifti(tmp_path / "a.nii", array)])
    low, high = np.percentile(inside, (1, 99))
    assert np.abs(dequantised(sample)[0] - ((array.clip(low, high) - low) / (high - low) * 2 - 1)).max() < 1e-3
    scale, offset = volume(foreground=0.0, clip=(0, 100)).statistics(array[None])
    assert np.allclose(inside * scale[0] + offset[0], (inside - inside.mean()) / inside.std(), atol=1e-4)


def test_outliers_are_clipped_and_the_rest_stays_fine(tmp_path: Path) -> None:
    array = noise((20, 20, 20))
    array[0, 0, 0] = 1.7e6
    sample = volume().read([nifti(tmp_path / "a.nii", array)])
    values, wanted = dequantised(sample)[0], (array - np.median(array)) / 25
    assert abs(values.std() - 1) < 0.01
    assert np.corrcoef(values.ravel()[1:], wanted.ravel()[1:])[0, 1] > 0.99


def test_channels_come_from_files_or_from_a_fourth_axis(tmp_path: Path) -> None:
    one, two = noise(seed=1), noise(seed=2) * 50
    files = [nifti(tmp_path / "1.nii", one), nifti(tmp_path / "2.nii", two)]
    several = volume(channels=2).read(files)
    together = volume(channels=2).read([nifti(tmp_path / "12.nii.gz", np.stack([one, two], -1))])
    assert several.array.shape == (2, *SHAPE)
    assert np.array_equal(several.array, together.array)
    assert several.header == together.header
    assert reason(lambda: volume().read(files)) == "dimensions"
    assert reason(lambda: volume(channels=2).read(files[:1])) == "dimensions"
    other = nifti(tmp_path / "3.nii", two, oblique(angle=0.25))
    assert reason(lambda: volume(channels=2).read([files[0], other])) == "shape"


def test_single_trailing_axes_do_not_count(tmp_path: Path) -> None:
    assert volume().read([nifti(tmp_path / "a.nii", noise()[..., None])]).array.shape == (1, *SHAPE)


def test_labels_keep_their_values_or_are_mapped(tmp_path: Path) -> None:
    labels = np.random.default_rng(0).integers(0, 4, SHAPE).astype(np.float64)
    image, mask = nifti(tmp_path / "a.nii", noise()), nifti(tmp_path / "m.nii", labels)
    assert np.array_equal(volume().read([image], {"mask": mask}).fields["mask"], labels)
    mapped = volume(labels={1: 2, 3: 0}).read([image], {"mask": mask}).fields["mask"]
    assert np.array_equal(mapped, np.array([0, 2, 2, 0])[labels.astype(int)])
    sample = volume().read([image], {"mask": mask})
    assert {int(labels[a]) for a in sample.header.anchors} == {1, 2, 3}


def test_millimetres_whatever_the_files_unit(tmp_path: Path) -> None:
    image = nib.Nifti1Image(noise(), np.diag([500.0, 500.0, 800.0, 1.0]))
    image.header.set_xyzt_units("micron")
    nib.save(image, tmp_path / "a.nii")
    sample = volume().read([tmp_path / "a.nii"])
    assert np.allclose(sample.header.spacing, (0.5, 0.5, 0.8))
    back = nib.load(volume().write(np.ones(SHAPE, np.uint8), sample.header, tmp_path / "p.nii"))
    assert np.allclose(back.affine, image.affine)


# ---- refusing


def test_each_fault_has_its_reason(tmp_path: Path) -> None:
    good = nifti(tmp_path / "good.nii.gz", noise())
    faults: dict[str, list[Path]] = {
        "unreadable": [], "truncated": [], "nan": [], "no-affine": [], "empty": [], "dimensions": []}

    whole = good.read_bytes()
    for i, keep in enumerate((0.05, 0.5, 0.95)):
        (tmp_path / f"cut{i}.nii.gz").write_bytes(whole[:int(len(whole) * keep)])
        faults["truncated"].append(tmp_path / f"cut{i}.nii.gz")
    plain = gzip.decompress(whole)
    (tmp_path / "cut.nii").write_bytes(plain[:-100])
    faults["truncated"].append(tmp_path / "cut.nii")

    (tmp_path / "text.nii").write_text("not a volume at all" * 50)
    (tmp_path / "text.nii.gz").write_text("nor this one" * 50)
    (tmp_path / "empty.nii.gz").write_bytes(b"")
    faults["unreadable"] += [tmp_path / "text.nii", tmp_path / "text.nii.gz", tmp_path / "missing.nii"]
    faults["truncated"].append(tmp_path / "empty.nii.gz")

    spotted = noise()
    spotted[3, 3, 3] = np.nan
    endless = noise()
    endless[0, 0, 0] = np.inf
    faults["nan"] += [nifti(tmp_path / "nan.nii", np.full(SHAPE, np.nan, np.float32)), nifti(tmp_path / "spot.nii", spotted),
                      nifti(tmp_path / "inf.nii", endless)]

    nowhere = nib.Nifti1Image(noise(), None)
    nowhere.set_sform(None, 0)
    nowhere.set_qform(None, 0)
    nib.save(nowhere, tmp_path / "nowhere.nii.gz")
    flat = oblique()
    flat[:, 2] = 0
    singular = nib.Nifti1Image(noise(), None)
    singular.header["sform_code"] = 1
    singular.header["srow_x"], singular.header["srow_y"], singular.header["srow_z"] = flat[:3]
    nib.save(singular, tmp_path / "singular.nii")
    faults["no-affine"] += [tmp_path / "nowhere.nii.gz", tmp_path / "singular.nii"]

    faults["empty"].append(nifti(tmp_path / "flat.nii", np.full(SHAPE, 7, np.int16)))
    faults["dimensions"] += [nifti(tmp_path / "2d.nii", noise((9, 11))), nifti(tmp_path / "4d.nii", noise((*SHAPE, 3)))]

    assert volume().read([good]).array.shape == (1, *SHAPE)
    for wanted, files in faults.items():
        for file in files:
            assert reason(lambda file=file: volume().read([file])) == wanted, file.name


def test_messages_name_no_path(tmp_path: Path) -> None:
    for name, content in (("john-doe.nii", b"x" * 400), ("john-doe.nii.gz", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError) as raised:
            volume().read([tmp_path / name])
        assert "john" not in str(raised.value)
        assert raised.value.__cause__ is None


def test_doubtful_files_are_taken_when_told_to(tmp_path: Path) -> None:
    nowhere = nib.Nifti1Image(noise(), None)
    nib.save(nowhere, tmp_path / "nowhere.nii")
    room = volume(assume_affine="identity")
    sample = room.read([tmp_path / "nowhere.nii"])
    assert np.array_equal(sample.header.affine, np.eye(4))
    back = nib.load(room.write(np.ones(SHAPE, int), sample.header, tmp_path / "p.nii"))
    assert (back.header["sform_code"], back.header["qform_code"]) == (0, 0)

    spotted = noise() + 10
    spotted[3, 3, 3] = np.nan
    values = dequantised(volume(nonfinite="lowest").read([nifti(tmp_path / "spot.nii", spotted)]))[0]
    assert values[3, 3, 3] == values.min()


def test_a_header_that_claims_too_much_is_refused_before_it_is_believed(tmp_path: Path) -> None:
    header = nib.Nifti1Header()
    header.set_data_dtype(np.float32)
    header["dim"][:4] = 3, 30000, 30000, 30000
    header["sform_code"], header["magic"] = 1, b"n+1"
    header["srow_x"], header["srow_y"], header["srow_z"] = np.eye(4)[:3]
    header["vox_offset"] = 352
    (tmp_path / "huge.nii").write_bytes(header.binaryblock + bytes(1000))
    (tmp_path / "huge.nii.gz").write_bytes(gzip.compress(header.binaryblock + bytes(1000)))
    for name in ("huge.nii", "huge.nii.gz"):
        assert reason(lambda name=name: volume().read([tmp_path / name])) == "dimensions"
        assert reason(lambda name=name: volume(max_voxels=2**60).read([tmp_path / name])) == "truncated"


@pytest.mark.parametrize("change,wanted", [("shape", "shape"), ("affine", "shape"), ("fraction", "label"), ("nan", "label"),
                                           ("negative", "label"), ("cut", "truncated")])
def test_faults_of_labels(tmp_path: Path, change: str, wanted: str) -> None:
    image, labels, affine = nifti(tmp_path / "a.nii", noise()), blob(SHAPE).astype(np.float32), oblique()
    if change == "shape":
        labels = labels[:-1]
    elif change == "affine":
        affine[0, 3] += 0.5
    elif change == "fraction":
        labels[0, 0, 0] = 0.5
    elif change == "nan":
        labels[0, 0, 0] = np.nan
    elif change == "negative":
        labels[0, 0, 0] = -1
    mask = nifti(tmp_path / "m.nii", labels, affine)
    if change == "cut":
        mask.write_bytes(mask.read_bytes()[:-50])
    assert reason(lambda: volume().read([image], {"mask": mask})) == wanted


def test_a_label_may_differ_by_rounding(tmp_path: Path) -> None:
    affine = oblique()
    affine[:3] += 1e-5
    mask = nifti(tmp_path / "m.nii", blob(SHAPE), affine)
    assert "mask" in volume().read([nifti(tmp_path / "a.nii", noise())], {"mask": mask}).fields


# ---- geometry


ORIENTATIONS = ["".join(flip[i] for i in order) for order in itertools.permutations(range(3))
                for flip in itertools.product("RL", "AP", "SI")]


@pytest.mark.parametrize("crop", [False, True])
def test_every_orientation_comes_back_voxel_for_voxel(tmp_path: Path, crop: bool) -> None:
    array, labels = noise(dtype=np.int16), blob(SHAPE)
    array[:3], array[:, :2] = 0, 0
    path, mask = nifti(tmp_path / "a.nii", array), nifti(tmp_path / "m.nii", labels)
    assert len(set(ORIENTATIONS)) == 48
    for codes in ORIENTATIONS:
        room = volume(orientation=codes, crop_foreground=crop, crop_margin=1)
        sample = room.read([path], {"mask": mask})
        assert "".join(nib.aff2axcodes(np.array(sample.header.affine))) == codes
        assert crop == (sample.array.size < array.size)
        back = nib.load(room.write(sample.fields["mask"], sample.header, tmp_path / "p.nii.gz"))
        outside = labels if not crop else np.where(restored_region(room, sample), labels, 0)
        assert np.array_equal(np.asarray(back.dataobj), outside)
        assert np.allclose(back.affine, oblique(), atol=1e-5)
        index = np.array([2, 4, 3])  # any stored voxel: its header's position is the source voxel's
        point = np.array(sample.header.affine) @ [*index, 1]
        there = np.round(np.linalg.inv(oblique()) @ point)[:3].astype(int)
        assert sample.fields["mask"][tuple(index)] == labels[tuple(there)]


def restored_region(room: Volume, sample: Any) -> np.ndarray:
    return room.restore(np.ones(sample.array.shape[1:], np.uint8), sample.header) > 0


def test_every_source_orientation_is_read_as_one(tmp_path: Path) -> None:
    array, labels = noise(), blob(SHAPE)
    first = None
    for codes in ORIENTATIONS:
        image = nib.Nifti1Image(array, np.diag([1.0, 0.8, 2.0, 1.0]))
        turned = image.as_reoriented(nib.orientations.ornt_transform(
            nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(codes)))
        mask = nib.Nifti1Image(labels, image.affine).as_reoriented(nib.orientations.ornt_transform(
            nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(codes)))
        nib.save(turned, tmp_path / "a.nii")
        nib.save(mask, tmp_path / "m.nii")
        sample = volume().read([tmp_path / "a.nii"], {"mask": tmp_path / "m.nii"})
        first = first or sample
        assert np.array_equal(sample.array, first.array)
        assert np.allclose(sample.header.affine, first.header.affine, atol=1e-5)
        back = nib.load(volume().write(sample.fields["mask"], sample.header, tmp_path / "p.nii"))
        assert np.array_equal(np.asarray(back.dataobj), np.asarray(mask.dataobj))


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.7, 1.1, 1.5)])
def test_resampled_labels_come_back_nearly(tmp_path: Path, spacing: tuple[float, float, float]) -> None:
    shape = (40, 44, 26)
    labels = blob(shape)
    affine = oblique((-1.0, 0.8, 1.3))
    path, mask = nifti(tmp_path / "a.nii", noise(shape), affine), nifti(tmp_path / "m.nii", labels, affine)
    room = volume(spacing=spacing, crop_foreground=True, foreground=30.0)
    sample = room.read([path], {"mask": mask})
    assert np.allclose(sample.header.spacing, spacing, rtol=1e-5)
    classes = np.stack([sample.fields["mask"] == k for k in range(3)]).astype(np.float32)
    for prediction in (sample.fields["mask"], classes):
        back = np.asarray(nib.load(room.write(prediction, sample.header, tmp_path / "p.nii.gz")).dataobj)
        assert back.shape == shape
        for k in (1, 2):
            dice = 2 * ((back == k) & (labels == k)).sum() / ((back == k).sum() + (labels == k).sum())
            assert dice > 0.95


def test_resampling_keeps_positions(tmp_path: Path) -> None:
    """A ramp in millimetres holds the header's positions after orientation, resampling and crop."""
    shape, affine = (20, 24, 12), oblique((-1.0, 0.8, 2.2))
    index = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), -1)
    points = index @ affine[:3, :3].T + affine[:3, 3]
    room = volume(channels=3, spacing=(1.2, 1.0, 1.5), clip=(0.0, 100.0), crop_foreground=True, crop_margin=2, foreground=-1e6)
    sample = room.read([nifti(tmp_path / "a.nii", points.astype(np.float32), affine)])
    values = dequantised(sample)
    index = np.stack(np.meshgrid(*(np.arange(n) for n in values.shape[1:]), indexing="ij"), -1)
    there = np.array(sample.header.affine)
    wanted = (index @ there[:3, :3].T + there[:3, 3])
    core = (slice(3, -3),) * 3
    for axis in range(3):  # undo the normalisation by its own straight line
        x, y = values[axis][core].ravel(), wanted[..., axis][core].ravel()
        slope, intercept = np.polyfit(x, y, 1)
        assert np.abs(slope * x + intercept - y).max() < 0.01
        assert np.corrcoef(x, y)[0, 1] > 0.99999
        assert abs(points[..., axis].std() / slope - 1) < 0.25


def test_a_prediction_keeps_both_forms_and_grows_its_type(tmp_path: Path) -> None:
    image = nib.Nifti1Image(noise(), None)
    image.set_sform(oblique(), 4)
    image.set_qform(oblique(angle=0.1), 1)
    nib.save(image, tmp_path / "a.nii.gz")
    room = volume()
    sample = room.read([tmp_path / "a.nii.gz"])
    assert np.allclose(sample.header.affine, oblique(), atol=1e-5)
    for most, kind in ((3, np.uint8), (300, np.int16)):
        back = nib.load(room.write(np.full(SHAPE, most), sample.header, tmp_path / "p.nii.gz"))
        assert back.get_data_dtype() == kind
        assert (np.asarray(back.dataobj) == most).all()
        assert (back.header["sform_code"], back.header["qform_code"]) == (4, 1)
        assert np.allclose(back.header.get_sform(), image.header.get_sform(), atol=1e-5)
        assert np.allclose(back.header.get_qform(), image.header.get_qform(), atol=1e-4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.nii.gz", "p.nii.gz"]
    with pytest.raises(ValueError, match="lattice"):
        room.restore(np.zeros((2, 2, 2)), sample.header)


def test_headers_are_plain_and_name_nobody(tmp_path: Path) -> None:
    image = nib.Nifti1Image(noise(), oblique())
    image.header["descrip"] = b"JOHN DOE 1970"
    image.header["db_name"] = b"DOE"
    nib.save(image, tmp_path / "doe.nii.gz")
    sample = volume().read([tmp_path / "doe.nii.gz"], {})
    text = json.dumps(asdict(sample.header))
    assert "doe" not in text.lower()
    back = volume().write(np.zeros(SHAPE, int), sample.header, tmp_path / "p.nii")
    assert b"DOE" not in back.read_bytes()


# ---- phantoms


def test_phantoms_are_labelled_volumes(tmp_path: Path) -> None:
    root = write_phantoms(tmp_path / "made", 6, labelled=4, seed=3)
    images, labels = sorted((root / "images").iterdir()), sorted((root / "labels").iterdir())
    assert [p.name for p in images[:4]] == [p.name for p in labels]
    assert len(images) == 6
    for image, label in zip(images, labels, strict=False):
        sample = volume().read([image], {"mask": label})
        counts = np.bincount(sample.fields["mask"].ravel(), minlength=3)
        assert len(counts) == 3
        assert (counts[1:] > 200).all()
        assert counts[0] > 0.9 * counts.sum()
    assert {nib.load(p).get_data_dtype().name for p in images} <= {"float32", "uint8"}


def test_phantoms_are_pure_in_seed_and_subject() -> None:
    a, b = phantom(1, 5), phantom(1, 5)
    assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    other = [phantom(1, 6), phantom(2, 5)]
    assert all((a[1] != o[1]).any() for o in other)
    assert phantom(0, 0, (48, 48, 48))[0].shape == (48, 48, 48)


def test_phantom_parts_cannot_be_told_by_brightness_alone() -> None:
    """The two parts differ by less than the noise, and most of the background's grey is as bright as they are."""
    for i in range(4):
        image, mask, _ = phantom(0, i)
        image = image.astype(np.float32)
        inside = image[mask > 0]
        assert abs(image[mask == 1].mean() - image[mask == 2].mean()) < inside.std()
        low, high = np.percentile(inside, (10, 90))
        alike = (image >= low) & (image <= high)
        dice = 2 * (alike & (mask > 0)).sum() / (alike.sum() + (mask > 0).sum())
        assert dice < 0.5


# ---- the whole way


def test_a_view_of_a_phantom_becomes_tokens_in_millimetres(tmp_path: Path) -> None:
    root = write_phantoms(tmp_path, 1)
    room = volume(patch=(8, 8, 4))
    name = "phantom_000.nii.gz"
    sample = room.read([root / "images" / name], {"mask": root / "labels" / name})
    view = VolumeViewOptions(size=(32, 32, 16), foreground=1.0)
    drawn = room.draw(view, sample.header, Look(0, 0, 0, "x"))
    window = tuple(slice(a, a + n) for a, n in zip(drawn.start, drawn.size, strict=True))
    loaded = room.load(sample.array[(slice(None), *window)], drawn, True)
    assert loaded.shape == (1, 32, 32, 16)
    assert sample.fields["mask"][window].any()
    tokenizer = room.tokenizer()
    assert (tokenizer.token_size, tokenizer.mask_unit) == (256, (1, 1, 1))
    assert torch.equal(torch.tensor(tokenizer.patch), torch.tensor([8, 8, 4]))


@pytest.mark.data
def test_hippocampus_cases_of_both_kinds(data_root: Path, tmp_path: Path) -> None:
    root = data_root / "msd-task04-hippocampus"
    if not root.is_dir():
        pytest.skip("no msd-task04-hippocampus in the data folder")
    files = sorted((root / "images").glob("*.nii.gz"))
    kinds: dict[str, list[Path]] = {}
    for file in files[:40]:
        if (root / "labels" / file.name).exists():
            kinds.setdefault(nib.load(file).get_data_dtype().name, []).append(file)
    assert set(kinds) == {"uint8", "float32"}
    for kind, cases in kinds.items():
        for file in cases[:5]:
            room, label = volume(), root / "labels" / file.name
            sample = room.read([file], {"mask": label})
            assert sample.array.dtype == (np.uint8 if kind == "uint8" else np.int16)
            assert set(np.unique(sample.fields["mask"])) == {0, 1, 2}
            raw = nib.load(file).get_fdata()
            clipped = raw.clip(*np.percentile(raw, (0.5, 99.5)))
            error = np.abs(dequantised(sample)[0] - (clipped - clipped.mean()) / clipped.std())
            assert error.max() < (0.02 if kind == "uint8" else 1e-3)  # the clip limits of bytes are rounded to bytes
            back = nib.load(room.write(sample.fields["mask"], sample.header, tmp_path / "p.nii.gz"))
            assert np.array_equal(np.asarray(back.dataobj), np.asarray(nib.load(label).dataobj))
            assert np.array_equal(back.affine, nib.load(file).affine)
