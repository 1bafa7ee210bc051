"""Views of clouds: what is drawn, how it moves, and that the frame, the fields and the index move with it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from meristem.modalities.base import View
from meristem.modalities.points import Points
from meristem.modalities.points.drawing import rotation
from meristem.modalities.points.options import PointsOptions, PointsViewOptions
from meristem.platform.data.cache import Cache
from meristem.platform.data.loader import _Batches
from meristem.platform.data.manifest import Manifest

SIZES = (50, 300, 120)
EVERYTHING = {"crop": (0.5, 0.9), "drop": (0.1, 0.3), "rotate": 180.0, "axis": "any", "scale": (0.5, 2.0), "shift": 3.0,
              "flip": (0.5, 0.5)}


@pytest.fixture(scope="module")
def clouds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clouds of 50, 300 and 120 points in metres, far from round, with normals and a label: the point's own number."""
    root, rng = tmp_path_factory.mktemp("clouds"), np.random.default_rng(0)
    for i, n in enumerate(SIZES):
        points = rng.normal(size=(n, 3)) * (4, 2, 1) + (10, -20, 3)
        normals = rng.normal(size=(n, 3))
        normals /= np.linalg.norm(normals, axis=1, keepdims=True)
        np.savez(root / f"{i}.npz", points=points.astype(np.float32), normals=normals.astype(np.float32), part=np.arange(n))
    return root


@pytest.fixture(scope="module")
def batches(clouds: Path, tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """view options, rows -> the batch of looks at these clouds, drawn, before anything is done to it."""
    points = Points(PointsOptions(features=("normal",)))
    cache = Cache.build(Manifest.discover(clouds, points), points, tmp_path_factory.mktemp("cache"))

    def make(view: PointsViewOptions, rows: Sequence[int] = (0, 1, 2), seed: int = 3) -> View:
        made = _Batches(cache, [], {}, points, {"x": view}, ("mask",), seed, len(rows), 0, 1)
        return made.collate("x", view, [(row, -1, row, i, look) for i, row in enumerate(rows) for look in range(view.count)])

    return make


def view(size: int = 256, **more: Any) -> PointsViewOptions:
    return PointsViewOptions(size=(size,), **more)


def augmented(batches: Any, options: PointsViewOptions, rows: Sequence[int] = (0, 1, 2), seed: int = 3) -> View:
    moved: View = Points(PointsOptions(features=("normal",))).augment(batches(options, rows, seed), options)
    return moved


def stored(clouds: Path, row: int) -> tuple[np.ndarray, np.ndarray]:
    with np.load(clouds / f"{row}.npz") as archive:
        return archive["points"], archive["normals"]


def live(x: View, row: int) -> np.ndarray:
    assert x.index is not None
    return (x.index[row] >= 0).numpy()


def test_a_plain_view_shows_the_cloud_and_is_the_same_always(batches, clouds: Path) -> None:  # type: ignore[no-untyped-def]
    a, b = augmented(batches, view().plain(), seed=1), augmented(batches, view().plain(), seed=2)
    assert torch.equal(a.array, b.array) and a.array.shape == (3, 6, 256)
    for row, n in enumerate(SIZES):
        points, normals = stored(clouds, row)
        shown = a.index[row][live(a, row)].numpy()  # type: ignore[index]
        assert len(shown) == min(n, 256) and len(set(shown)) == len(shown) and (np.diff(shown) > 0).all()
        metres = a.frame.to_source(a.array[:, :3].transpose(1, 2))[row][live(a, row)]
        np.testing.assert_allclose(metres, points[shown], atol=1e-4)
        np.testing.assert_allclose(a.array[row, 3:].T[live(a, row)], normals[shown], atol=1e-6)
        radius = a.array[row, :3].norm(dim=0)[live(a, row)]
        assert 0.7 < float(radius.max()) <= 1 + 1e-6
    one, other = (augmented(batches, view(), seed=seed).index for seed in (1, 2))
    assert one is not None and other is not None and not torch.equal(one, other)  # in training, other points each time


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(["all", "crop", "drop", "rotate", "scale", "shift", "flip"]))
def test_the_frame_knows_the_metres_whatever_is_done(batches, clouds: Path, seed: int, what: str) -> None:  # type: ignore[no-untyped-def]
    options = view(**(EVERYTHING if what == "all" else {what: EVERYTHING[what]}))
    moved = augmented(batches, options, seed=seed)
    metres = moved.frame.to_source(moved.array[:, :3].transpose(1, 2))
    for row in range(3):
        points, normals = stored(clouds, row)
        shown = moved.index[row][live(moved, row)].numpy()  # type: ignore[index]
        assert len(set(shown)) == len(shown)
        np.testing.assert_allclose(metres[row][live(moved, row)], points[shown], atol=2e-3)
        back = moved.frame.affine[row, :3, :3].double().numpy()
        turned = moved.array[row, 3:, live(moved, row)].T.double().numpy() @ back.T
        np.testing.assert_allclose(turned / np.linalg.norm(turned, axis=1, keepdims=True), normals[shown], atol=1e-4)


def test_fields_and_weights_go_with_their_points_and_padding_stays(batches) -> None:  # type: ignore[no-untyped-def]
    moved = augmented(batches, view(**EVERYTHING, jitter=0.1))
    assert moved.weight is not None and moved.index is not None
    assert moved.frame.shape == moved.array.shape[2:] == moved.weight.shape[2:]
    there = moved.index >= 0
    assert torch.equal(moved.fields["mask"], moved.index), "a point's label is its number, that of padding −1"
    assert torch.equal(moved.weight[:, 0] > 0, there)
    assert moved.array.transpose(1, 2)[~there].eq(0).all() and not there.all()
    assert (there.int().diff(dim=1) <= 0).all(), "padding is last"


@pytest.mark.parametrize("options", [view(**EVERYTHING, jitter=0.1), view(64, rotate=90.0), view()])
def test_a_look_does_not_depend_on_its_batch_mates(batches, options: PointsViewOptions) -> None:  # type: ignore[no-untyped-def]
    together = augmented(batches, options)
    for row in range(3):
        alone = augmented(batches, options, rows=(row,))
        n = int(live(alone, 0).sum())
        assert n == int(live(together, row).sum())
        assert torch.equal(together.array[row, :, :n], alone.array[0, :, :n])
        assert torch.equal(together.index[row, :n], alone.index[0, :n])  # type: ignore[index]
        assert torch.equal(together.frame.affine[row], alone.frame.affine[0])


def test_a_crop_is_the_points_nearest_to_one_of_them(batches) -> None:  # type: ignore[no-untyped-def]
    whole = batches(view(crop=(0.4, 0.4)))
    cut = augmented(batches, view(crop=(0.4, 0.4)))
    for row, n in enumerate(min(s, 256) for s in SIZES):
        kept = set(cut.index[row][live(cut, row)].tolist())  # type: ignore[index]
        assert len(kept) == round(0.4 * n)
        xyz, numbers = whole.array[row, :3, :n].double().T, whole.index[row, :n].tolist()
        nearest = torch.cdist(xyz, xyz).argsort(1)[:, :len(kept)]
        assert kept in [{numbers[i] for i in some} for some in nearest.tolist()]


def test_drop_leaves_as_many_as_it_says_and_not_the_same(batches) -> None:  # type: ignore[no-untyped-def]
    left = [{*augmented(batches, view(drop=(0.25, 0.25)), rows=(1,), seed=s).index[0].tolist()} for s in (1, 2)]  # type: ignore[index]
    assert len(left[0]) == len(left[1]) == 192 and left[0] != left[1]


def test_turns_about_the_vertical_leave_heights(batches) -> None:  # type: ignore[no-untyped-def]
    plain, turned = batches(view(rotate=180.0)), augmented(batches, view(rotate=180.0))
    assert torch.equal(plain.array[:, 2], turned.array[:, 2])
    assert (plain.array[:, :2] - turned.array[:, :2]).abs().max() > 0.1
    torch.testing.assert_close(plain.array[:, :2].norm(dim=1), turned.array[:, :2].norm(dim=1))


def test_noise_is_clipped_and_only_on_points(batches) -> None:  # type: ignore[no-untyped-def]
    plain, noisy = batches(view(jitter=0.01)), augmented(batches, view(jitter=0.01))
    off = (noisy.array - plain.array)[:, :3].transpose(1, 2)
    there = plain.index >= 0
    assert off[~there].eq(0).all() and off.abs().max() <= 0.02 + 1e-6
    assert 0.007 < float(off[there].std()) < 0.011
    assert torch.equal(noisy.frame.affine, plain.frame.affine)


def test_looks_at_one_cloud_differ_and_the_drawn_points_are_without_repeat(batches) -> None:  # type: ignore[no-untyped-def]
    x = batches(view(64, rotate=90.0, count=2), rows=(1,))
    a, b = (set(row.tolist()) for row in x.index)
    assert len(a) == len(b) == 64 and a != b and a & b


def test_rotations_are_scipys() -> None:
    vectors = torch.cat([torch.randn(20, 3), torch.zeros(1, 3), torch.tensor([[np.pi, 0, 0]]).float()])
    expected = Rotation.from_rotvec(vectors.double().numpy()).as_matrix()
    np.testing.assert_allclose(rotation(vectors), expected, atol=2e-6)
