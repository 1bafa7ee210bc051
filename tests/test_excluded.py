"""Voxels that defacing left empty: they stay out of the loss, wherever the volume is turned."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from meristem.modalities.volume import Volume
from meristem.modalities.volume.volume import VolumeOptions
from meristem.platform.assembly import Assembly
from meristem.platform.data.loader import loader
from meristem.platform.data.source import Data, open_data
from meristem.platform.recipe import Recipe, build, override, read
from meristem.platform.step import Batch, Step

FACE = (slice(0, 8), slice(9, 16), slice(None))  # of a volume of 16³: tokens of 4³ are cut by it


@pytest.fixture
def defaced(tmp_path: Path) -> Path:
    """Six volumes of noise of which a corner was set to 0, stored left to right reversed."""
    root = tmp_path / "defaced"
    root.mkdir()
    for i in range(6):
        array = np.random.default_rng(i).normal(500, 50, (16, 16, 16)).astype(np.int16)
        array[FACE] = 0
        nib.save(nib.Nifti1Image(array, np.diag([-1.0, 1, 1, 1])), root / f"{i}.nii.gz")
    return root


def opened(root: Path, *changes: str) -> tuple[Recipe, Data]:
    plain = override(read("volume/mae"), [
        "encoder={transformer: {width: 24, depth: 1, heads: 2}}", "views.x={size: [16,16,16], window: whole, flip: []}",
        "objectives.pixels.masked.predictor.decoder={depth: 1, width: 24, heads: 2}",
        "modality.volume={patch: [4,4,4], excluded: 0, foreground: 0}", "train.batch=4", *changes])
    recipe = build(plain, Recipe)
    return recipe, open_data(root, recipe.modality, cache=root.parent / "cache", quiet=True)


def batch(recipe: Recipe, data: Data) -> Batch:
    return next(iter(loader(data.cache, data.rows(), recipe, steps=1, workers=0)))


def test_their_weight_is_nought_wherever_the_volume_is_turned(defaced: Path) -> None:
    recipe, data = opened(defaced)
    weight = batch(recipe, data).views["x"].weight
    expected = torch.ones(16, 16, 16)
    expected[8:, 9:] = 0  # RAS: the other way round
    assert weight is not None and all(torch.equal(w[0], expected) for w in weight)
    assert not any(row.labelled for row in data.manifest.rows)  # what is excluded is no label


def test_crops_that_reach_beyond_the_volume_exclude_both(defaced: Path) -> None:
    recipe, data = opened(defaced, "views.x={size: [24,24,24], window: whole, flip: []}")
    weight = batch(recipe, data).views["x"].weight
    assert weight is not None and weight[0].sum() == 16 ** 3 - 8 * 7 * 16


def test_augmentation_carries_them_along(defaced: Path) -> None:
    recipe, data = opened(defaced, "views.x={size: [16,16,16], window: whole, flip: [1,1,1]}")
    view = Assembly(recipe).prepare(batch(recipe, data)).views["x"]
    mirrored = torch.ones(16, 16, 16)
    mirrored[:8, :7] = 0
    assert view.weight is not None and all(torch.equal(w[0], mirrored) for w in view.weight)
    assert all(x[w == 0].unique().numel() == 1 for x, w in zip(view.array, view.weight, strict=True))


def test_the_loss_knows_nothing_of_them(defaced: Path) -> None:
    recipe, data = opened(defaced)
    torch.manual_seed(0)
    assembly = Assembly(recipe).eval()
    made = assembly.prepare(batch(recipe, data))
    view = made.views["x"]
    assert view.weight is not None
    hidden = Step(assembly, made, 0.5, 0).plan("x").hidden.reshape(-1, 1, 4, 4, 4)
    for axis in (2, 3, 4):
        hidden = hidden.repeat_interleave(4, axis)
    left_out, counted = hidden & (view.weight == 0), hidden & (view.weight > 0)
    assert left_out.any() and counted.any()

    def loss(array: torch.Tensor) -> dict[str, float]:
        with torch.no_grad():
            losses = assembly(Batch(made.items, {"x": replace(view, array=array)}), 0.5)
        return {name: float(x.total) for name, x in losses.items()}

    plain, noise = loss(view.array), torch.randn_like(view.array)
    assert loss(view.array + noise * left_out) == plain != loss(view.array + noise * counted)


def test_without_the_option_all_voxels_count(defaced: Path) -> None:
    recipe, data = opened(defaced, "modality.volume.excluded=null")
    assert batch(recipe, data).views["x"].weight is None
    sample = Volume(VolumeOptions()).read([defaced / "0.nii.gz"])
    assert sample.fields == {}
