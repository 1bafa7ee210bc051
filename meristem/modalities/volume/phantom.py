"""Anatomical phantoms: made volumes that stand in for a labelled MR data set where none is at hand.

A subject is a crop of a head around a structure of two touching parts, anterior (1) and posterior (2), as the hippocampus
has: a bent, tapering, deformed tube of grey matter, sheathed in white matter on some sides and open to grey matter of the same
brightness on others, among folds and fluid, under a bias field, noise and a scanner's own intensity scale. The parts differ in
brightness by less than the noise: where one ends is told by shape, and only a part of the outline by contrast.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy.ndimage import distance_transform_edt, gaussian_filter

from meristem.modalities.lattice.geometry import spline

FLUID, GREY, WHITE = 0.25, 0.70, 1.10


def write_phantoms(directory: Path, subjects: int, labelled: int | None = None, seed: int = 0,
                   shape: Sequence[int] = (40, 52, 36)) -> Path:
    """Write `images/phantom_000.nii.gz`, …, and for the first `labelled` subjects (None: all) `labels/` of the same names.

    Subject i depends on (seed, i, shape) only. Returns the directory.
    """
    (directory / "images").mkdir(parents=True, exist_ok=True)
    (directory / "labels").mkdir(exist_ok=True)
    for i in range(subjects):
        image, mask, affine = phantom(seed, i, shape)
        name = f"phantom_{i:03d}.nii.gz"
        nib.save(nib.Nifti1Image(image, affine), directory / "images" / name)
        if labelled is None or i < labelled:
            nib.save(nib.Nifti1Image(mask, affine), directory / "labels" / name)
    return directory


def phantom(seed: int, subject: int, shape: Sequence[int] = (40, 52, 36)) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One subject: intensities (X, Y, Z), float32 or for some uint8; labels uint8; affine (4, 4) of 1 mm voxels."""
    rng = np.random.default_rng((seed, subject))
    shape = tuple(shape)
    place = np.stack(np.meshgrid(*(np.linspace(-1, 1, n, dtype=np.float32) for n in shape), indexing="ij"))
    mask = _structure(place + 0.05 * smooth(rng, (3, *shape), 4), rng)

    folds = smooth(rng, shape, 7) + 0.4 * smooth(rng, shape, 13)
    tissue = np.where(folds > rng.normal(0.1, 0.15), WHITE, GREY)
    tissue = np.where(smooth(rng, shape, 7) > rng.normal(1.5, 0.1), FLUID, tissue)
    away = distance_transform_edt(mask == 0)
    sheath = rng.uniform(1.0, 2.5) * (smooth(rng, shape, 4) + rng.normal(0.5, 0.2))  # voxels thick; none where negative
    tissue = np.where(away <= sheath, WHITE, tissue)
    own = GREY + rng.normal(0, 0.03)
    tissue = np.where(mask > 0, own + (mask == 2) * rng.normal(0.04, 0.02), tissue)
    tissue = np.where((place**2).sum(0) < rng.uniform(2.2, 2.9), tissue, 0.05)

    image = gaussian_filter(tissue.astype(np.float32), rng.uniform(0.5, 0.8))  # partial volume
    image += 0.04 * smooth(rng, shape, 14)
    image *= np.exp(rng.uniform(0.05, 0.15) * smooth(rng, shape, 1))
    image = (image + rng.normal(0, rng.uniform(0.03, 0.07), shape)).clip(0).astype(np.float32)

    affine = np.eye(4)
    affine[:3, 3] = -np.array(shape) / 2 + rng.uniform(-4, 4, 3)
    if rng.random() < 0.25:
        return (image / image.max() * 255).astype(np.uint8), mask, affine
    return (image * 10 ** rng.uniform(2, 5)).astype(np.float32), mask, affine


def _structure(place: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Labels of a tube about a bent axis along y, wide in front and narrow behind. place: (3, *S), edges at ±1."""
    bend, tilt, phase = rng.normal(0.35, 0.10), rng.normal(0.25, 0.12), rng.normal(0, 0.3)
    length, girth, flat = rng.normal(0.72, 0.05), rng.normal(0.36, 0.03), rng.normal(1.15, 0.10)
    x, y, z = place - rng.normal(0, 0.06, (3, 1, 1, 1)).astype(np.float32)
    along = y / length  # −1 behind, 1 in front
    off_x = x - bend * (along + 0.3 * phase) ** 2 + 0.15
    off_z = z - tilt * along + 0.12 * np.sin(2 * along + phase)
    radius = girth * (0.85 + 0.25 * along) * np.clip(1 - along**2, 0, None) ** 0.3
    tube = (off_x / flat) ** 2 + (off_z * flat) ** 2 < radius**2
    border = rng.normal(0.12, 0.08) + rng.normal(0, 0.2) * off_x + 0.4 * off_z
    return np.where(tube, np.where(along > border, 1, 2), 0).astype(np.uint8)


def smooth(rng: np.random.Generator, shape: tuple[int, ...], cells: int) -> np.ndarray:
    """A smooth random field of zero mean and unit variance with about `cells` bumps along each of the last three axes."""
    field = rng.normal(size=(*shape[:-3], *[cells + 3] * 3)).astype(np.float32)
    for n in shape[-3:]:
        field = np.tensordot(field, spline(n, cells).numpy(), ([len(shape) - 3], [1]))  # the next axis moves to its place
    field -= field.mean()
    field /= field.std()
    return field


def main() -> None:
    """`python -m meristem.modalities.volume.phantom DIRECTORY [--subjects N] [--labelled N] [--seed N]`."""
    parser = argparse.ArgumentParser(description="Write anatomical phantoms as NIfTI images and labels.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--subjects", type=int, default=60)
    parser.add_argument("--labelled", type=int, default=None, help="how many get a label (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    write_phantoms(given.directory, given.subjects, given.labelled, given.seed)


if __name__ == "__main__":
    main()
