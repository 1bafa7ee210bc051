"""The short form of `python tests/round_trips.py`: labels through the pipeline and back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from round_trips import ORIENTATIONS

from meristem.errors import DataError
from meristem.modalities.volume import Volume, VolumeOptions
from meristem.modalities.volume.nifti import same_grid, turned
from meristem.modalities.volume.volume import lean, upright


def test_labels_come_back_the_same_or_are_refused() -> None:
    script = Path(__file__).with_name("round_trips.py")
    ended = subprocess.run([sys.executable, "-W", "ignore", script, "--count", "40", "--seed", "5"], capture_output=True,
                           text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ended.returncode == 0, ended.stderr
    counts = json.loads(ended.stdout.splitlines()[-1])
    assert counts["round_trips"] == counts["same"] + counts["refused"] == 40 and counts["lost"] == 0
    assert counts["same"] >= 15 and set(counts["kinds"]) == {"NIfTI", "series", "multi-frame"}


@pytest.mark.parametrize("code", ORIENTATIONS)
def test_a_label_with_turned_axes_is_of_the_same_voxels(code: str) -> None:
    rng = np.random.default_rng(0)
    values, affine = rng.integers(0, 9, (4, 5, 6)), np.diag([0.7, 0.9, 2.0, 1.0])
    affine[:3, 3] = 5, -3, 8
    order = nib.orientations.axcodes2ornt(code)
    stored = nib.orientations.apply_orientation(values, order)
    there = affine @ nib.orientations.inv_ornt_aff(order, values.shape)
    back, place = turned(stored, there, affine)
    assert np.array_equal(back, values) and np.allclose(place, affine)
    with pytest.raises(DataError, match="mm apart"):  # another grid stays another
        moved, elsewhere = turned(stored, there + 0.3 * np.eye(4)[:, :1] @ np.eye(4)[3:], affine)
        same_grid(moved.shape, elsewhere, values.shape, affine, "the label", "the volume")


def test_an_upright_grid_holds_every_voxel_of_one_that_leans() -> None:
    affine = np.diag([0.7, 0.9, 2.5, 1.0])
    affine[1, 2], shape = 0.8, (9, 12, 7)
    assert lean(affine, shape) == pytest.approx(0.8 / 0.9 * 6) and lean(np.diag([0.7, 0.9, 2.5, 1.0]), shape) == 0
    straight, wide = upright(affine, affine, shape, (0.7, 0.9, 1.0))
    assert np.allclose(straight[:3, :3], np.diag([0.7, 0.9, 1.0])) and wide == (9, 17, 16)  # 11 + 0.8 · 6 / 0.9 steps along y
    assert np.allclose(straight[:3, 3], [0, (11 * 0.9 + 6 * 0.8 - 16 * 0.9) / 2, 0])  # their middles are the same


def test_a_sheared_file_is_refused_or_made_upright(tmp_path: Path) -> None:
    affine = np.diag([1.0, 1, 2, 1])
    affine[0, 2], label = 0.5, np.zeros((8, 8, 8), np.uint8)
    label[2:5, 3:6, 1:6] = 1
    for name, array in (("image", label * 100 + np.arange(8)), ("label", label)):
        nib.save(nib.Nifti1Image(array.astype(np.int16), affine), tmp_path / f"{name}.nii")
    with pytest.raises(DataError) as raised:
        Volume(VolumeOptions()).read([tmp_path / "image.nii"])
    assert raised.value.reason == "leaning" and "spacing=[1, 1, 2.06]" in raised.value.remedy
    sample = Volume(VolumeOptions(spacing=(0.4, 0.4, 0.4))).read([tmp_path / "image.nii"], {"mask": tmp_path / "label.nii"})
    centre = np.array(sample.header.affine) @ [*np.argwhere(sample.fields["mask"]).mean(0), 1]
    assert np.allclose(centre, affine @ [*np.argwhere(label).mean(0), 1], atol=0.2)
    volume = sample.fields["mask"].sum() * 0.4**3
    assert volume == pytest.approx(label.sum() * 2, rel=0.1)
