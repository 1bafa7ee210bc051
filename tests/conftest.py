"""Made data, the real data's folder, and the same seeds for every test."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

torch.set_num_threads(1)  # tiny tensors: a second thread only waits, and sums would round by the machine's core count


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real data sets; skips where there is none."""
    root = Path(os.environ.get("MERISTEM_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not root.is_dir():
        pytest.skip("no real data: set MERISTEM_DATA to the folder that holds the data sets")
    return root


def _blobs(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Integers (*shape): 0 around, 1 a ball, 2 its core."""
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"))
    centre = np.array([rng.uniform(0.4, 0.6) * n for n in shape]).reshape(-1, *(1,) * len(shape))
    distance = np.sqrt(((grid - centre) ** 2).sum(0)) / (rng.uniform(0.25, 0.35) * min(shape))
    return (distance < 1).astype(np.uint8) + (distance < 0.5)


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """12 grey PNGs of 32x40 in two class folders: `images/dark/00.png` … `images/light/05.png`."""
    rng, root = np.random.default_rng(1), tmp_path / "images"
    for name, level in (("dark", 60), ("light", 160)):
        (root / name).mkdir(parents=True)
        for i in range(6):
            pixels = rng.normal(level, 20, (32, 40)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i:02d}.png")
    return root


@pytest.fixture
def mask_folder(tmp_path: Path) -> Path:
    """8 RGB PNGs of 32x40 and their label maps (values 0, 1, 2): `pairs/images/00.png`, `pairs/masks/00.png`, …"""
    rng, root = np.random.default_rng(2), tmp_path / "pairs"
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    for i in range(8):
        mask = _blobs(rng, (32, 40))
        pixels = 40 + 70 * mask[..., None] + rng.normal(0, 10, (32, 40, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / "images" / f"{i:02d}.png")
        Image.fromarray(mask).save(root / "masks" / f"{i:02d}.png")
    return root


@pytest.fixture
def volume_folder(tmp_path: Path) -> Path:
    """8 labelled NIfTI volumes of 20x24x16 in MSD's layout: `volumes/{imagesTr,labelsTr}/case_00.nii.gz`, `dataset.json`.

    Anisotropic (1.0, 0.8, 1.5 mm), half of them stored left to right reversed, one as float32.
    """
    rng, root, shape = np.random.default_rng(3), tmp_path / "volumes", (20, 24, 16)
    (root / "imagesTr").mkdir(parents=True)
    (root / "labelsTr").mkdir()
    listed = []
    for i in range(8):
        mask = _blobs(rng, shape)
        pixels = (100 + 150 * mask + rng.normal(0, 20, shape)).clip(0).astype(np.float32 if i == 3 else np.int16)
        flip = -1 if i % 2 else 1
        affine = np.diag([flip * 1.0, 0.8, 1.5, 1.0])
        affine[:3, 3] = (19.0 if i % 2 else 0.0, -5.0, 3.0)
        name = f"case_{i:02d}.nii.gz"
        nib.save(nib.Nifti1Image(pixels, affine), root / "imagesTr" / name)
        nib.save(nib.Nifti1Image(mask, affine), root / "labelsTr" / name)
        listed.append({"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"})
    description = {"name": "made", "modality": {"0": "MRI"}, "labels": {"0": "background", "1": "shell", "2": "core"},
                   "numTraining": len(listed), "numTest": 0, "training": listed, "test": []}
    (root / "dataset.json").write_text(json.dumps(description))
    return root
