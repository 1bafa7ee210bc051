"""Volumes in NIfTI files and DICOM series: MR, CT, PET and the like, one or many channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Literal, Self

import numpy as np
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
from pydantic import model_validator
from scipy.ndimage import affine_transform

from meristem.errors import DataError
from meristem.modalities.base import EXCLUDED, Axis, Group, Header, Lost, Sample
from meristem.modalities.facts import Facts
from meristem.modalities.lattice import Lattice, LatticeOptions, LatticeViewOptions, anchors
from meristem.modalities.likeness import Likeness, cosines, ranks, thinned, turns
from meristem.modalities.objects import Objects
from meristem.modalities.volume import intake, nifti
from meristem.modalities.volume.nifti import as_labels, same_grid, save, turned
from meristem.modalities.volume.opened import Opened, named_dicom
from meristem.modalities.volume.values import moments, percentiles, quantised

WAVES = 8  # cosines along each axis in a fingerprint
SHOWN = 96  # voxels along an axis that are enough for them
ALIKE = Likeness("ranked cosines 1", WAVES ** 3 - 1, within=64, turns=turns(WAVES, 3))
"""Signs of the lowest cosines of each voxel's rank, so that any rising window leaves them as they are; 64 bytes.

Measured on 209 hippocampus crops of MSD at 1 mm, by which the limit was chosen: the nearest of 21,736 pairs differ in 103 of
511 signs, in any of 48 orientations. Saved again as 8 bits, at gamma 0.5 or 2, or windowed to the middle 90 %: in 6 at most; to
the middle 70 % of values: 22; to the upper 60 %: 47; resampled to 80 or 150 %, or along one axis to 60 %: 44. A volume that was
cropped, by a recipe's `crop_foreground` too, is not known again.
"""
SLACK = 0.05  # of a voxel, by which rounded numbers may lie outside
SURE = 1e-3  # of a voxel, by which a grid is rather made too long than too short
LEAN = 0.5  # of a voxel, by which opposite faces of an upright volume may be shifted against each other


class VolumeOptions(LatticeOptions):
    """How volumes are read.

    channels: files or DICOM series per case, or length of a 4D file's last axis. spacing: mm per axis to resample to, None
    keeps the file's; grids that lean (gantry tilt) are then refused, since encoders see upright ones. orientation: axis codes
    of the stored array. normalise:
      zscore      clip to the percentiles `clip`, then mean 0 and std 1;
      window      `window` = (low, high) to (−1, 1), as CT is shown;
      percentile  the percentiles `clip` to (−1, 1).
    foreground: only values above it count in these statistics; None counts all. crop_foreground: cut to the box of values
    above `foreground` (0 when None) in any channel, with crop_margin voxels around it. assume_affine: `identity` takes files
    without orientation as 1 mm RAS. nonfinite: `lowest` replaces single NaN or infinite voxels by the lowest finite value.
    labels: file's label -> class; others stay. excluded: voxels of exactly this value in every channel, as defacing leaves
    them, count in no loss of pretraining. max_voxels: a header that claims more is refused.
    """

    patch: tuple[int, int, int] = (8, 8, 8)
    spacing: tuple[float, float, float] | None = None
    orientation: str = "RAS"
    normalise: Literal["zscore", "window", "percentile"] = "zscore"
    clip: tuple[float, float] = (0.5, 99.5)
    window: tuple[float, float] | None = None
    foreground: float | None = None
    crop_foreground: bool = False
    crop_margin: int = 4
    assume_affine: Literal["identity"] | None = None
    nonfinite: Literal["refuse", "lowest"] = "refuse"
    labels: Mapping[int, int] = {}
    excluded: float | None = None
    max_voxels: int = 2**31

    @model_validator(mode="after")
    def _sound(self) -> Self:
        if (self.normalise == "window") != (self.window is not None):
            raise ValueError("`window: [low, high]` goes with `normalise: window`, and only with it")
        codes = set(self.orientation)
        if len(self.orientation) != 3 or any(len(codes & set(pair)) != 1 for pair in ("LR", "AP", "IS")):
            raise ValueError(f"orientation names one of L/R, A/P and I/S each, such as RAS; got {self.orientation!r}")
        return self


class VolumeViewOptions(LatticeViewOptions):
    """One view of a volume; see `LatticeViewOptions`."""

    size: tuple[int, int, int]


class Volume(Lattice):
    """NIfTI and DICOM volumes in a common orientation, optionally resampled and cropped, positions in millimetres.

    Stored as int16 over the clipped range, so a value is wrong by at most 1/131070 of that range: under 1e-3 of the standard
    deviation unless the range spans more than 130 of them. uint8 files that are not resampled stay as they are.
    """

    name = "volume"
    version = 2
    suffixes = (".nii", ".nii.gz", ".dcm")
    Options = VolumeOptions
    ViewOptions = VolumeViewOptions
    axes = tuple(Axis(name, "mm", 0.5, 512.0) for name in "xyz")
    grows: Mapping[str, tuple[int, ...]] = {"size": (0, 1, 2)}
    likeness = ALIKE
    options: VolumeOptions

    def read(self, paths: Sequence[Path], fields: Mapping[str, Path] = {}) -> Sample:
        """One file (3D, or 4D with channels last) or one per channel, a DICOM series counting as one; fields are label files on
        the same grid.

        Raises DataError: unreadable, truncated, dimensions, no-affine, shape, nan, empty, label, leaning; of DICOM also those
        of `dicom.open_series`.
        """
        options = self.options
        opened = self._opened(paths)
        source, affine, grid = opened[0], opened[0].affine, opened[0].shape[:3]
        for i, other in enumerate(opened[1:], 1):
            same_grid(other.shape[:3], other.affine, grid, affine, f"channel {i}", "channel 0")
        decoded = [each.decode() for each in opened]
        several = [np.moveaxis(a, 3, 0) if a.ndim == 4 else a[None] for a in decoded]
        array = several[0] if len(several) == 1 else np.concatenate(several)
        if len(array) != self.channels:
            raise DataError("dimensions", f"the case has {len(array)} channels, not {self.channels}",
                            f"Set modality.volume.channels={len(array)} or give other files.")
        array = self._sound(array)
        masks = {} if options.excluded is None else {EXCLUDED: (array == options.excluded).all(0).astype(np.uint8)}
        for name, path in fields.items():
            label = nifti.opened(path, f"the {name}", options.assume_affine, options.max_voxels)
            values, place = turned(label.decode(), label.affine, affine)
            same_grid(values.shape, place, grid, affine, f"the {name}", "the volume")
            masks[name] = as_labels(values, f"the {name}", options.labels)

        array, stored, resampled = self._place(array, affine, "bilinear")
        masks = {name: self._place(mask[None], affine, "nearest")[0][0].astype(mask.dtype) for name, mask in masks.items()}
        if options.crop_foreground:
            box = self._foreground(array)
            stored[:3, 3] += stored[:3, :3] @ [side.start for side in box]
            array, masks = array[(slice(None), *box)], {name: mask[box] for name, mask in masks.items()}
        whole = not resampled and all(each.plain for each in opened)
        array, scale, offset, pad, levels = self._quantise(array, whole)
        header = Header(
            array.shape, tuple(tuple(row) for row in stored.tolist()), tuple(np.linalg.norm(stored[:3, :3], axis=0).tolist()),
            scale, offset, pad, {**source.placement, "affine": affine.tolist(), "levels": levels},
            anchors(masks["mask"]) if "mask" in masks else ())
        ranked = np.sum([ranks(channel) for channel in thinned(array, SHOWN)], axis=0)
        return Sample(array, header, {name: np.ascontiguousarray(mask) for name, mask in masks.items()},
                      fingerprint=ALIKE.pack(cosines(ranked, WAVES)))

    def _opened(self, paths: Sequence[Path]) -> list[Opened]:
        """What is known of the files before their voxels are decoded: a NIfTI file or a DICOM series each."""
        options, found = self.options, list[Opened]()
        for is_dicom, some in groupby(paths, named_dicom):
            files = list(some)
            if is_dicom:
                from meristem.modalities.volume import dicom  # pydicom is slow to import

                found += dicom.opened(files, "the volume", options.max_voxels)
            else:
                found += [nifti.opened(f, "the volume" if len(paths) == 1 else f"channel {len(found) + i}",
                                       options.assume_affine, options.max_voxels) for i, f in enumerate(files)]
        return found

    @staticmethod
    def gather(files: Sequence[Path]) -> tuple[list[Group], list[Lost]]:
        """See `Gathering`: DICOM series."""
        if not any(map(named_dicom, files)):
            return [], []
        from meristem.modalities.volume import dicom

        return dicom.gather(files)

    @staticmethod
    def recognised(path: Path) -> bool:
        """Of DICOM files, whether they are slices of volumes."""
        if not named_dicom(path):
            return True
        from meristem.modalities.volume import dicom

        return dicom.recognised(path)

    def _sound(self, array: np.ndarray) -> np.ndarray:
        """Finite and not constant, or DataError."""
        if not np.isfinite([array.min(), array.max()]).all():
            bad = ~np.isfinite(array)
            if bad.all():
                raise DataError("nan", "every voxel is NaN or infinite", "Export it again.")
            if self.options.nonfinite == "refuse":
                raise DataError("nan", f"{bad.sum():,} of {bad.size:,} voxels are NaN or infinite",
                                "Export it again, or pass modality.volume.nonfinite=lowest to set them to the lowest value.")
            array = np.where(bad, array[~bad].min(), array)
        for i, channel in enumerate(array):
            if channel.min() == channel.max():
                raise DataError("empty", f"channel {i} has the same value everywhere", "Remove the case, or export it again.")
        return array

    def _place(self, array: np.ndarray, affine: np.ndarray, mode: str) -> tuple[np.ndarray, np.ndarray, bool]:
        """(C, *S) to the wanted orientation and spacing; its affine there; whether it was resampled, else it is a view."""
        wanted, leaning = self.options.spacing, lean(affine, array.shape[1:]) > LEAN
        if leaning and wanted is None:
            found = np.linalg.norm(affine[:3, :3], axis=0)
            raise DataError("leaning", "its axes are not at right angles (gantry tilt, or a sheared affine)",
                            "Have it resampled onto an upright grid: "
                            f"modality.volume.spacing=[{', '.join(f'{mm:.3g}' for mm in found)}], or as finely as you like.")
        turn = ornt_transform(io_orientation(affine), axcodes2ornt(self.options.orientation))
        stored = affine @ inv_ornt_aff(turn, array.shape[1:])
        array = np.moveaxis(apply_orientation(np.moveaxis(array, 0, 3), turn), 3, 0)
        if wanted is None or (not leaning and np.allclose(np.linalg.norm(stored[:3, :3], axis=0), wanted, rtol=1e-3)):
            return array, stored, False
        grid, shape = upright(affine, stored, array.shape[1:], wanted)
        how = {"order": 0 if mode == "nearest" else 1,  # no label lies beside a volume that leans
               "mode": "grid-constant" if mode == "nearest" and leaning else "nearest"}
        move = np.linalg.inv(stored) @ grid
        moved = [affine_transform(each.astype(np.float32), move, output_shape=shape, **how) for each in array]
        return np.stack(moved), grid, True

    def _foreground(self, array: np.ndarray) -> tuple[slice, ...]:
        from monai.transforms.utils import generate_spatial_bounding_box

        threshold = self.options.foreground or 0.0
        start, stop = generate_spatial_bounding_box(np.ascontiguousarray(array), lambda x: x > threshold, allow_smaller=True,
                                                    margin=self.options.crop_margin)
        box = tuple(slice(max(a, 0), min(b, n)) for a, b, n in zip(start, stop, array.shape[1:], strict=True))
        if any(side.stop <= side.start for side in box):
            raise DataError("empty", f"no voxel lies above the foreground threshold {threshold:g}",
                            "Lower modality.volume.foreground or turn crop_foreground off.")
        return box

    def _normal(self, channel: np.ndarray) -> tuple[float, float, float, float]:
        """(low, high, scale, offset): clip raw values to [low, high], then times scale plus offset is normal."""
        options = self.options
        counted = channel
        if options.foreground is not None:
            counted = channel[channel > options.foreground]
            if counted.size == 0 or counted.min() == counted.max():
                counted = channel
        if options.window is not None:
            low, high = options.window
        else:
            low, high = percentiles(counted, options.clip)
            if low == high:
                low, high = float(counted.min()), float(counted.max())
        if options.normalise == "zscore":
            mean, std = moments(counted, low, high)
            return low, high, 1 / std, -mean / std
        return low, high, 2 / (high - low), -(high + low) / (high - low)

    def statistics(self, array: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """(scale, offset) per channel of raw values (C, *S) clipped as `VolumeOptions.normalise` says."""
        normal = [self._normal(channel) for channel in array]
        return tuple(n[2] for n in normal), tuple(n[3] for n in normal)

    def _quantise(self, array: np.ndarray, whole: bool) -> tuple[
            np.ndarray, tuple[float, ...], tuple[float, ...], tuple[float, ...], list[int]]:
        """Raw values to integers, with scale, offset and pad per channel, and the integers that are black and white."""
        normal = [self._normal(channel) for channel in array]
        pad = tuple(0.0 if self.options.normalise == "zscore" and self.options.foreground is None else low * scale + offset
                    for low, _, scale, offset in normal)
        if whole:
            limits = [(max(round(low), 0), min(round(high), 255)) for low, high, _, _ in normal]
            stored = np.stack([np.clip(c, *limit).astype(np.uint8) for c, limit in zip(array, limits, strict=True)])
            return (stored, tuple(n[2] for n in normal), tuple(n[3] for n in normal), pad,
                    [min(low for low, _ in limits), max(high for _, high in limits)])
        stored, scales, offsets = np.empty(array.shape, np.int16), [], []
        for i, (low, high, scale, offset) in enumerate(normal):
            step = (high - low) / 65535
            quantised(array[i], low, high, stored[i])
            scales.append(step * scale)
            offsets.append((low + 32768 * step) * scale + offset)
        return stored, tuple(scales), tuple(offsets), pad, [-32768, 32767]

    def restore(self, prediction: np.ndarray, header: Header) -> np.ndarray:
        """A prediction on the stored lattice to labels (X, Y, Z) on the grid of the source file; 0 outside what was stored.

        prediction: labels (*S), moved by the nearest voxel; or class probabilities (K, *S), interpolated linearly before the
        most probable class is taken.
        """
        if prediction.shape[-3:] != header.shape[1:]:
            raise ValueError(f"prediction of shape {prediction.shape} for a stored lattice {header.shape[1:]}")
        shape = tuple(header.source["shape"])
        move = np.linalg.inv(np.array(header.affine)) @ np.array(header.source["affine"])  # source index -> stored index
        near = np.round(move)
        exact = np.allclose(move, near, atol=1e-3)  # turned, flipped and cropped only
        move = near if exact else move
        if prediction.ndim == 4 and exact:
            prediction = prediction.argmax(0)
        if prediction.ndim == 3:
            return affine_transform(prediction, move, output_shape=shape, order=0, mode="grid-constant")
        best, labels = np.full(shape, -np.inf, np.float32), np.zeros(shape, np.int16)
        for label, probability in enumerate(prediction):
            here = affine_transform(probability.astype(np.float32), move, output_shape=shape, order=1, mode="nearest")
            labels[here > best] = label
            np.maximum(best, here, out=best)
        stored = np.ones(prediction.shape[1:], np.uint8)
        inside = affine_transform(stored, move, output_shape=shape, order=0, mode="grid-constant")
        return labels * inside

    def placed(self, objects: Objects, header: Header) -> Objects:
        """World millimetres are the source coordinates. Raises DataError for a box whose centre lies outside of the volume."""
        middle = objects.box.reshape(-1, 2, 3).mean(1)
        inverse = np.linalg.inv(np.array(header.affine))
        index = middle @ inverse[:3, :3].T + inverse[:3, 3]
        out = (index < -0.5 - SLACK) | (index > np.array(header.shape[1:]) - 0.5 + SLACK)
        if out.any():
            at = int(np.flatnonzero(out.any(1))[0])
            raise DataError("box", f"the centre of box {at + 1}, ({', '.join(f'{x:.1f}' for x in middle[at])}) mm in RAS, lies "
                            f"outside of the volume as it is read, {' × '.join(map(str, header.shape[1:]))} voxels",
                            'Are the boxes in the system that the file says? "coordinates": "LPS" or "RAS" beside the lists, '
                            "LPS where it says nothing. With modality.volume.crop_foreground, raise crop_margin.")
        return objects

    def annotated(self, box: np.ndarray, header: Header) -> np.ndarray:
        """(K, 6) in source coordinates, as annotations have them: RAS millimetres."""
        return box

    def facts(self, paths: Sequence[Path], sample: Sample) -> Facts:
        """See `Telling`."""
        return intake.facts(self._opened(paths))

    def identity(self, path: Path) -> Sequence[str]:
        """See `Identifying`."""
        return intake.identity(path)

    def write(self, prediction: np.ndarray, header: Header, path: Path) -> Path:
        """`restore`, then a NIfTI of uint8 or int16 labels with the source's affine. Returns the file written."""
        if not path.name.lower().endswith((".nii", ".nii.gz")):
            path = path.with_name(f"{stem(path)}.nii.gz")
        return save(self.restore(prediction, header), header.source, path)

    def archive(self, prediction: np.ndarray, header: Header, paths: Sequence[Path], names: Mapping[int, str], recipe: str,
                path: Path) -> Path | None:
        """See `Archiving`: of DICOM series, a DICOM SEG beside the NIfTI."""
        if header.source.get("files") != "dicom":
            return None
        from meristem.modalities.volume import seg

        return seg.save(self.restore(prediction, header), np.array(header.source["affine"]), paths, names, recipe,
                        path.with_name(f"{stem(path)}.seg.dcm"))


def lean(affine: np.ndarray, shape: Sequence[int]) -> float:
    """Voxels by which the far end of an axis is shifted along another, where axes are not at right angles: the most of all."""
    axes = affine[:3, :3]
    size = np.linalg.norm(axes, axis=0)
    shift = np.abs(axes.T @ axes) / size[:, None] ** 2 * (np.array(shape) - 1)
    return float((shift - np.diag(np.diag(shift))).max())


def upright(source: np.ndarray, turned: np.ndarray, shape: Sequence[int], spacing: Sequence[float]) -> tuple[
        np.ndarray, tuple[int, ...]]:
    """A grid at right angles with the voxels of one that may lean, and all of them on it: its affine and shape.

    source: affine of the given grid, whose first axis and the plane of whose first two are kept. turned: the same grid's, its
    axes in the order and direction that are wanted; shape: of that. spacing: mm along the wanted axes.
    """
    kept, upper = np.linalg.qr(source[:3, :3])
    kept = kept * np.sign(np.diag(upper))
    sides, wanted = (a[:3, :3] / np.linalg.norm(a[:3, :3], axis=0) for a in (source, turned))
    alike = sides.T @ wanted
    which = np.abs(alike).argmax(0)
    axes = kept[:, which] * np.sign(alike[which, range(3)]) * np.array(spacing)
    corners = np.array(np.meshgrid(*((0, n - 1) for n in shape), [1], indexing="ij")).reshape(4, -1)
    places = np.linalg.inv(axes) @ (turned @ corners)[:3]
    wide = np.floor(np.ptp(places, axis=1) + 0.5 + SURE)
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = axes, axes @ (places.min(1) + places.max(1) - wide) / 2  # both in the same middle
    return affine, tuple(int(n) + 1 for n in wide)


def stem(path: Path) -> str:
    return path.name[:-4] if path.name.lower().endswith(".dcm") else path.name
