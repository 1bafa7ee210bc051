"""Pictures of clouds: which pixel shows which point, against loops over points and pixels and the authors' figures."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from meristem.modalities.points import Points
from meristem.modalities.points.options import PointsOptions
from meristem.modalities.points.pictures import write_pictures
from meristem.projections import Merge, Projection

AXES = ((2, 0, 1), (1, 2, 0), (0, 1, 2))  # along, rows, columns


def cloud(rows: int, n: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, n, 3, generator=torch.Generator().manual_seed(seed)) * torch.tensor([0.3, 0.5, 0.2])


def covered(points: Tensor, size: int, spread: int) -> list[list[list[list[int]]]]:
    """[picture][row][column] the points that cover it, by a loop; each as often as it does."""
    found = []
    for _, r, c in AXES:
        low, high = ([float(f(points[:, a])) for a in (r, c)] for f in (torch.amin, torch.amax))
        pixel = np.float32(max(np.float32(h) - np.float32(w) for h, w in zip(high, low, strict=True))) / np.float32(size - 3)
        last = [math.floor((np.float32(h) - np.float32(w)) / pixel) for h, w in zip(high, low, strict=True)]
        picture: list[list[list[int]]] = [[[] for _ in range(size)] for _ in range(size)]
        for i, p in enumerate(points.numpy()):
            at = [math.floor((p[a] - np.float32(w)) / pixel) + size // 2 - (n + 2) // 2
                  for a, w, n in zip((r, c), low, last, strict=True)]
            for y in range(at[0] - spread, at[0] + spread + 1):
                for x in range(at[1] - spread, at[1] + spread + 1):
                    picture[min(max(y, 0), size - 1)][min(max(x, 0), size - 1)].append(i)
        found.append(picture)
    return found


@pytest.mark.parametrize(("size", "spread"), [(16, 0), (17, 1), (24, 2)])
def test_pixels_show_the_nearest_point_that_covers_them(size: int, spread: int) -> None:
    points, live = cloud(2, 60), torch.ones(2, 60, dtype=torch.bool)
    where = Projection.of(points, live, size)
    shown, nearest, summed = (f(points, live, spread) for f in (
        where.shown, lambda *a: where.pictures(*a, merge="nearest"), where.pictures))
    for row in range(2):
        for k, picture in enumerate(covered(points[row], size, spread)):
            along = points[row][:, AXES[k][0]]
            for y in range(size):
                for x in range(size):
                    there = picture[y][x]
                    first = max(there, key=lambda i, z=along: (float(z[i]), -i), default=-1)  # type: ignore[misc]
                    assert int(shown[row, k, y, x]) == first
                    height = float((along[first] - along.min()) / (along.max() - along.min()))
                    assert float(nearest[row, k, y, x]) == pytest.approx((1 + height) / 2 if there else 0, abs=1e-6)
                    total = sum(float(along[i]) for i in there)
                    assert float(summed[row, k, y, x]) == pytest.approx(1 / (1 + math.exp(-total)), abs=1e-5)


def test_every_point_lies_in_the_pixel_that_it_covers_and_the_longer_side_fills_the_picture() -> None:
    points, live = cloud(3, 200), torch.ones(3, 200, dtype=torch.bool)
    where = Projection.of(points, live, 32)
    pixels = where.pixels(points)
    shown = where.shown(points, live, 0)
    for row in range(3):
        for k in range(3):
            for y, x in pixels[row, k].tolist():
                assert shown[row, k, y, x] >= 0
            extent = (pixels[row, k].amax(0) - pixels[row, k].amin(0)).tolist()
            assert max(extent) in (28, 29)  # of 32, less the margin; rounding decides
            middle = (pixels[row, k].amax(0) + pixels[row, k].amin(0)) / 2
            assert ((middle - 15.5).abs() <= 1).all()
    picked = shown[0, 0].flatten()
    own = where.pixels(points)[0, 0][picked[picked >= 0]]
    assert torch.equal(own[:, 0] * 32 + own[:, 1], (picked >= 0).nonzero()[:, 0])  # from pixel to point and back


def test_maps_are_sampled_as_if_they_had_been_enlarged() -> None:
    points, live = cloud(2, 50), torch.ones(2, 50, dtype=torch.bool)
    where, maps = Projection.of(points, live, 28), torch.randn(2, 3, 5, 7, 7)
    large = F.interpolate(maps.flatten(0, 1), (28, 28), mode="bicubic").unflatten(0, (2, 3))
    pixels, found = where.pixels(points), where.sample(maps, points)
    for row in range(2):
        for k in range(3):
            for i, (y, x) in enumerate(pixels[row, k].tolist()):
                torch.testing.assert_close(found[row, i, k], large[row, k, :, y, x], atol=1e-5, rtol=1e-4)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(0, 30), st.integers(0, 99), st.sampled_from(["sum", "nearest"]))
def test_neither_padding_nor_other_rows_change_a_picture(n: int, more: int, seed: int, merge: Merge) -> None:
    points = cloud(2, n, seed)
    alone = Projection.of(points[:1], torch.ones(1, n, dtype=torch.bool), 20).pictures(
        points[:1], torch.ones(1, n, dtype=torch.bool), 1, merge)
    padded = torch.cat([points, torch.full((2, more, 3), torch.nan)], 1)
    live = (torch.arange(n + more) < n).expand(2, -1)
    both = Projection.of(padded, live, 20).pictures(padded, live, 1, merge)
    assert torch.equal(both[:1], alone)


def test_clouds_of_one_point_or_none_make_pictures() -> None:
    points, live = torch.full((2, 5, 3), 0.7), torch.zeros(2, 5, dtype=torch.bool)
    live[0] = True
    where = Projection.of(points, live, 16)
    assert (where.shown(points, live, 0)[0] >= 0).sum() == 3  # one pixel of each picture
    assert (where.shown(points, live, 0)[1] < 0).all()
    assert torch.equal(where.pictures(points, live)[1], torch.full((3, 16, 16), 0.5))


def test_pictures_and_features_are_the_authors() -> None:
    """ZrrSkywalker/I2P-MAE at 7d4e519: `proj2img` and `I2P` of models/I2P_MAE.py on torch's generator seeded with 0: points
    randn(2, 1024, 3) · (0.3, 0.5, 0.2), then maps randn(2, 3, 8, 14, 14); sampled at every 16th point. Mean and mean square of
    what they printed: the first channel of each picture, normalised as theirs, over all three; and the features.
    """
    g = torch.Generator().manual_seed(0)
    points = torch.randn(2, 1024, 3, generator=g) * torch.tensor([0.3, 0.5, 0.2])
    maps, live = torch.randn(2, 3, 8, 14, 14, generator=g), torch.ones(2, 1024, dtype=torch.bool)
    where = Projection.of(points, live, 224)
    pictures, found = where.pictures(points, live), where.sample(maps, points[:, ::16])
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    for k, theirs in enumerate(((0.2253611833, 0.0969065875, -0.0140781785, 0.8399419785),
                                (0.2192158103, 0.1809586138, -0.0604707330, 0.7084342241),
                                (0.2259572297, 0.1188855320, -0.1241168976, 0.7842108011))):
        normed = (pictures[:, k, None] - mean[:, None, None]) / std[:, None, None]
        seen = found[:, :, k]
        ours = normed.mean(), normed.square().mean(), seen.mean(), seen.square().mean()
        assert [float(x) for x in ours] == pytest.approx(theirs, rel=1e-4, abs=1e-6)


def test_files_hold_the_pictures(tmp_path: Path) -> None:
    points = cloud(1, 300)[0].numpy()
    (tmp_path / "clouds" / "a").mkdir(parents=True)
    np.savez(tmp_path / "clouds" / "a" / "one.npz", points=points)
    files = write_pictures([tmp_path / "clouds/a/one.npz"], tmp_path / "clouds", tmp_path / "out", Points(PointsOptions()), 32)
    assert [f.relative_to(tmp_path / "out").as_posix() for f in files] == ["a/one-z.png", "a/one-y.png", "a/one-x.png"]
    array = Points(PointsOptions()).read([tmp_path / "clouds/a/one.npz"]).array
    assert array is not None
    xyz, live = torch.from_numpy(array[:3].T)[None], torch.ones(1, 300, dtype=torch.bool)
    wanted = Projection.of(xyz, live, 32).pictures(xyz, live, 1)[0]
    for file, picture in zip(files, wanted, strict=True):
        assert np.abs(np.asarray(Image.open(file)) / 255 - picture.numpy()).max() <= 0.5 / 255 + 1e-6
