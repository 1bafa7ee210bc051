"""A sanity set for detection: labelled structures of real scans, pasted into made volumes.

Each structure (all positive labels of a scan together) is cut out with a few voxels of its surroundings, brought to the
brightness of the tissue that is made there, and blended into it, one to four in a volume and in some none, besides blobs of the
same brightness, noise and blending that are not sought: it is told by shape and texture, not by brightness. Volumes are
stored in every orientation. Structures of one scan are pasted into volumes of one split only.

What is found here says that a detector learns, that boxes, windows and millimetres are right, and how arms compare. It says
nothing of a clinical task: the place of a structure means nothing, its seams can be told, and its surroundings are made.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, ornt_transform
from scipy.ndimage import distance_transform_edt, gaussian_filter

from meristem.errors import DataError
from meristem.modalities.volume.phantom import FLUID, GREY, WHITE, smooth

SHARES = {"training": 0.6, "validation": 0.2, "test": 0.2}  # of volumes, and of the scans that they are made of
EMPTY = 0.1  # share of volumes without a structure
MARGIN = 4  # voxels of surroundings that are pasted too, ever fainter
APART = 3  # voxels between pasted things at least
TRIES = 60


def write_pasted(source: Path, directory: Path, count: int = 40, seed: int = 0, shape: Sequence[int] = (96, 96, 64)) -> Path:
    """Write `images/pasted_000.nii.gz`, … and `boxes.json`, which lists them in MONAI's format. Returns that.

    source: a folder with scans in `images` and label maps of the same names in `labels` (MSD: `imagesTr`, `labelsTr`), of one
    voxel size. shape: voxels per axis. Volume i depends on (source, seed, i, count, shape) only. Raises DataError without any.
    """
    pairs = [(image, labels / image.name) for images, labels in
             ((source / "images", source / "labels"), (source / "imagesTr", source / "labelsTr"))
             for image in sorted(images.glob("[!.]*.nii*")) if (labels / image.name).is_file()]
    if len(pairs) < len(SHARES):
        raise DataError("empty", f"{len(pairs)} scans with labels, {len(SHARES)} at least are needed",
                        "Give a folder with images and labels (or imagesTr and labelsTr) of the same names.")
    order = np.random.default_rng(seed).permutation(len(pairs))
    ends = np.cumsum(list(SHARES.values()))
    (directory / "images").mkdir(parents=True, exist_ok=True)
    lists: dict[str, list[dict[str, object]]] = {name: [] for name in SHARES}
    for i in range(count):
        part = int(np.searchsorted(ends, (i + 0.5) / count))
        first, last = np.r_[0, (ends * len(pairs)).round()].astype(int)[part:part + 2]
        pool = [pairs[k] for k in order[first:max(last, first + 1)]]
        image, box = pasted(pool, seed, i, shape)
        name = f"images/pasted_{i:03d}.nii.gz"
        nib.save(image, directory / name)
        lists[list(SHARES)[part]].append({"image": name, "box": box.round(3).tolist(), "label": [0] * len(box)})
    listing = directory / "boxes.json"
    listing.write_text(json.dumps({"box_mode": "xyzxyz", "coordinates": "RAS", "labels": {"0": "structure"}, **lists}))
    return listing


def pasted(pool: Sequence[tuple[Path, Path]], seed: int, number: int, shape: Sequence[int]
           ) -> tuple[nib.Nifti1Image, np.ndarray]:
    """One volume, and the boxes (K, 6) of its structures: lower and upper corners in RAS millimetres."""
    rng, shape = np.random.default_rng((seed, number)), tuple(shape)
    folds = smooth(rng, shape, 9) + 0.4 * smooth(rng, shape, 17)
    tissue = np.where(folds > rng.normal(0.1, 0.15), WHITE, GREY)
    tissue = np.where(smooth(rng, shape, 9) > rng.normal(1.3, 0.1), FLUID, tissue)
    tissue = gaussian_filter(tissue.astype(np.float32), rng.uniform(0.6, 0.9))
    taken, boxes, spacing = np.zeros(shape, bool), [], np.ones(3)
    wanted = 0 if rng.random() < EMPTY else int(rng.integers(1, 5))
    for k in range(wanted + int(rng.integers(1, 5))):
        values, mask, spacing = _structure(pool, rng)
        if k >= wanted:
            values, mask = _blob(values, mask, rng)
        place = _free(taken, mask.shape, rng)
        if place is None:
            continue
        own = values[mask]
        blend = np.clip(1 - distance_transform_edt(~mask) / MARGIN, 0, 1)
        even = tissue[place].mean() + (values - values.mean()) * tissue[place].std() / max(float(own.std()), values.std(), 1e-6)
        tissue[place] = blend * even + (1 - blend) * tissue[place]
        taken[place] = True
        if k < wanted:
            inside = [np.flatnonzero(mask.any(tuple({0, 1, 2} - {axis}))) for axis in range(3)]
            boxes.append([(s.start + a[0], s.start + a[-1] + 1) for s, a in zip(place, inside, strict=True)])
    tissue += rng.normal(0, 0.05, shape).astype(np.float32)
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -spacing * np.array(shape) / 2 + rng.uniform(-30, 30, 3)
    edges = np.array(boxes, float).reshape(-1, 3, 2).transpose(0, 2, 1)  # in voxels from the corner
    world = ((edges - 0.5) * spacing + affine[:3, 3]).reshape(-1, 6)
    image = ((tissue - tissue.min()) * rng.uniform(100, 1000)).astype(np.float32)
    codes = [rng.choice(list(pair)) for pair in ("LR", "PA", "IS")]
    turn = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt("".join(codes[k] for k in rng.permutation(3))))
    return nib.Nifti1Image(nib.orientations.apply_orientation(image, turn), affine @ inv_ornt_aff(turn, shape)), world


def _structure(pool: Sequence[tuple[Path, Path]], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of one scan in RAS, mirrored or not: intensities and the structure (*S) with its margin; voxel size (3,) in mm."""
    paths = pool[int(rng.integers(len(pool)))]
    scan, label = (nib.as_closest_canonical(nib.load(path)) for path in paths)
    mask = np.asarray(label.dataobj) > 0
    if not mask.any():
        raise DataError("label", "a label map is empty", "Remove it and its scan.")
    values = np.asarray(scan.dataobj, np.float32)
    low, high = np.percentile(values, (1, 99))
    inside = np.argwhere(mask)
    box = tuple(slice(max(a - MARGIN, 0), b + MARGIN) for a, b in zip(inside.min(0), inside.max(0) + 1, strict=True))
    values, mask = np.clip(values, low, high)[box], mask[box]
    if rng.random() < 0.5:
        values, mask = values[::-1], mask[::-1]
    return values, mask, np.array(scan.header.get_zooms()[:3], float)


def _blob(values: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Something of the structure's brightness and size that it is not: a turned ellipsoid of smooth noise around its mean."""
    side = max(round(np.cbrt(mask.sum()) * 1.2), 6) + 2 * MARGIN
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, side),) * 3, indexing="ij"))
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    reach = rng.uniform(0.5, 0.9, 3) * (side - 2 * MARGIN) / side
    inner = (np.einsum("ij,jxyz->ixyz", turn, grid) / reach[:, None, None, None])
    own = values[mask]
    noise = smooth(rng, (side,) * 3, 6)
    return own.mean() + own.std() * noise.astype(np.float32), (inner**2).sum(0) < 1


def _free(taken: np.ndarray, size: Sequence[int], rng: np.random.Generator) -> tuple[slice, ...] | None:
    """A place for something of this size, apart from what is there; None where a few tries find none."""
    if any(n >= m for n, m in zip(size, taken.shape, strict=True)):
        return None
    for _ in range(TRIES):
        start = [int(rng.integers(0, m - n)) for n, m in zip(size, taken.shape, strict=True)]
        around = tuple(slice(max(a - APART, 0), a + n + APART) for a, n in zip(start, size, strict=True))
        if not taken[around].any():
            return tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))
    return None


def main() -> None:
    """`python -m meristem.modalities.volume.pasted SOURCE DIRECTORY [--count N] [--seed N]`."""
    parser = argparse.ArgumentParser(description="Paste labelled structures of real scans into made volumes.")
    parser.add_argument("source", type=Path)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    print(write_pasted(given.source, given.directory, given.count, given.seed))


if __name__ == "__main__":
    main()
