"""Percentiles, moments and integers of large volumes are those of the plain ways."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meristem.modalities.volume import Volume, VolumeOptions
from meristem.modalities.volume.values import SAMPLE, moments, percentiles, quantised

SHAPE = (80, 72, 90)  # more than four samples


def scan(seed: int, air: float, order: str) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.normal(200, 40, SHAPE)
    x[rng.random(SHAPE) < air] = 0
    return np.asarray(x, np.float32, order=order)  # type: ignore[call-overload, no-any-return]


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31), air=st.sampled_from([0.0, 0.004, 0.006, 0.5, 0.999]), order=st.sampled_from("CF"),
       at=st.lists(st.floats(0, 100), min_size=1, max_size=3))
def test_percentiles_are_numpys(seed: int, air: float, order: str, at: list[float]) -> None:
    x = scan(seed, air, order)
    assert x.size > 4 * SAMPLE
    np.testing.assert_allclose(percentiles(x, [0.5, 99.5, *at]), np.percentile(x, [0.5, 99.5, *at]), rtol=1e-6, atol=1e-6)


def test_percentiles_of_sorted_and_of_few_numbers() -> None:
    ordered = np.arange(np.prod(SHAPE), dtype=np.float32)
    for x in (ordered, ordered[::-1], ordered[:7], np.ones_like(ordered)):
        np.testing.assert_allclose(percentiles(x, (0, 0.5, 99.5, 100)), np.percentile(x, (0, 0.5, 99.5, 100)), rtol=1e-6)


@pytest.mark.parametrize("order", ["C", "F"])
def test_moments_and_integers_are_numpys(order: str) -> None:
    x = scan(0, 0.3, order)[::-1].transpose(1, 0, 2)  # a turned view, as of a file in another orientation
    low, high = 0.0, 290.0
    clipped = np.clip(x, low, high)
    mean, std = moments(x, low, high)
    assert mean == pytest.approx(clipped.mean(dtype=np.float64), rel=1e-12)
    assert std == pytest.approx(clipped.std(dtype=np.float64), rel=1e-9)
    stored = np.empty(x.shape, np.int16)
    quantised(x, low, high, stored)
    assert np.array_equal(stored, np.round((clipped - low) / ((high - low) / 65535) - 32768).astype(np.int16))
    assert (stored.min(), stored.max()) == (-32768, 32767)


@pytest.mark.parametrize("slope", [1.0, 0.25])
def test_gzip_is_read_as_nibabel_reads_it(tmp_path: Path, slope: float) -> None:
    rng = np.random.default_rng(0)
    image = nib.Nifti1Image(rng.integers(-500, 500, (12, 11, 10)).astype(np.int16), np.eye(4))
    image.header.set_slope_inter(slope, -3.0)
    nib.save(image, tmp_path / "one.nii.gz")
    raw = gzip.decompress((tmp_path / "one.nii.gz").read_bytes())
    (tmp_path / "plain.nii").write_bytes(raw)
    (tmp_path / "members.nii.gz").write_bytes(gzip.compress(raw[:1000]) + gzip.compress(raw[1000:]))
    volume = Volume(VolumeOptions())
    plain, *others = (volume.read([tmp_path / name]) for name in ("plain.nii", "one.nii.gz", "members.nii.gz"))
    for other in others:
        assert other.array is not None and plain.array is not None
        assert np.array_equal(other.array, plain.array)
        assert other.header == plain.header
