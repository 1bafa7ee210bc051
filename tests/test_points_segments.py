"""Scenes are cut into pieces without labels: things that stand apart, and smooth surfaces."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.metrics import adjusted_rand_score

from meristem.modalities.points import Points
from meristem.modalities.points.options import Clusters, PointsOptions, Supervoxels
from meristem.modalities.points.segments import cells, cut, ground, segments

pytestmark = pytest.mark.filterwarnings("error")
BOXES = ((-6, -4, 2), (5, -5, 3), (4, 6, 1.5), (-5, 6, 2.5))


def street(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A sloping ground of 24 × 24 m and four boxes on it: points in metres, and what each belongs to (−1: ground)."""
    rng = np.random.default_rng(seed)
    floor = rng.uniform(-12, 12, (6000, 2))
    parts, owner = [np.column_stack([floor, 0.08 * floor[:, 0] + rng.normal(0, 0.02, 6000)])], [np.full(6000, -1)]
    for i, (x, y, height) in enumerate(BOXES):
        side = rng.uniform((-1, -1, 0.4), (1, 1, height), (900, 3))
        face = rng.integers(0, 2, 900)
        side[np.arange(900), face] = np.sign(side[np.arange(900), face])
        parts.append(side + np.array([x, y, 0.08 * x]))
        owner.append(np.full(900, i))
    return np.concatenate(parts), np.concatenate(owner)


def corner(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A floor and two walls of 2 m that meet in a corner, with a millimetre of noise, and which of them a point is on."""
    rng = np.random.default_rng(seed)
    points = rng.uniform(0, 2, (9000, 3))
    owner = np.repeat(np.arange(3), 3000)
    points[np.arange(9000), owner] = rng.normal(0, 0.001, 9000)
    return points, owner


def test_the_ground_is_the_plane_under_things() -> None:
    xyz, owner = street()
    below = ground(xyz, 0.25, 1.0)
    assert (below[owner < 0]).mean() > 0.999 and not below[owner >= 0].any()
    level = ground(xyz + np.array([7e3, -3e3, 400]), 0.25, 1.0)
    assert np.array_equal(level, below), "wherever the scene lies"
    assert not ground(xyz[:2], 0.25, 1.0).any()


def test_clusters_are_the_things_on_the_ground() -> None:
    xyz, owner = street()
    found = segments(xyz, Clusters(cell=0.25, smallest=20))
    assert found.dtype == np.int16 and set(np.unique(found)) == {-1, 0, 1, 2, 3}
    assert (found[owner < 0] == -1).mean() > 0.999
    on = (owner >= 0) & (found >= 0)
    assert on.sum() > 0.95 * (owner >= 0).sum() and adjusted_rand_score(owner[on], found[on]) == 1
    count = np.bincount(found[found >= 0])
    assert (np.diff(count) <= 0).all(), "numbered by size"


def test_supervoxels_keep_to_one_surface() -> None:
    xyz, owner = corner()
    found = segments(xyz, Supervoxels(cell=0.08, neighbours=12, threshold=0.05, smallest=10))
    inside = (found >= 0) & (np.sort(xyz, 1)[:, 1] > 0.2)  # normals turn where surfaces meet
    assert inside.mean() > 0.7
    pure = [np.bincount(owner[inside & (found == s)]).max() for s in np.unique(found[inside])]
    assert sum(pure) / inside.sum() > 0.99
    assert all(np.bincount(found[inside & (owner == i)]).max() > 0.9 * (inside & (owner == i)).sum() for i in range(3)), \
        "a plane is one piece"


@pytest.mark.parametrize("how", [Clusters(cell=0.25, smallest=20), Supervoxels(cell=0.3, smallest=5)])
def test_the_order_of_points_changes_nothing(how: Clusters | Supervoxels) -> None:
    xyz, _ = street()
    found = segments(xyz, how)
    assert np.array_equal(segments(xyz, how), found)
    order = np.random.default_rng(1).permutation(len(xyz))
    assert adjusted_rand_score(segments(xyz[order], how), found[order]) > 0.999


@pytest.mark.parametrize("how", [Clusters(), Supervoxels()])
@pytest.mark.parametrize("n", [4, 30])
def test_small_clouds_and_clouds_in_one_place_have_pieces_or_none(how: Clusters | Supervoxels, n: int) -> None:
    for xyz in (np.random.default_rng(0).normal(size=(n, 3)), np.zeros((n, 3)), np.eye(3)[np.arange(n) % 3] * (0, 0, 9)):
        found = segments(xyz, how)
        assert found.shape == (n,) and found.min() >= -1 and found.max() < n


def test_cells_hold_the_means_of_their_points() -> None:
    x = np.random.default_rng(0).uniform(-3, 3, (500, 3))
    centres, place = cells(x, 0.7)
    for cell, centre in enumerate(centres):
        np.testing.assert_allclose(centre, x[place == cell].mean(0))
        assert (np.ptp(x[place == cell], axis=0) <= 0.7).all()
    assert len({tuple(k) for k in np.floor((x - x.min(0)) / 0.7).astype(int)}) == len(centres)


def test_a_cut_without_threshold_or_with_all_of_it() -> None:
    rng = np.random.default_rng(0)
    pairs = np.unique(np.sort(rng.integers(0, 60, (70, 2)), 1), axis=0)
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    weight = rng.uniform(0.1, 1, len(pairs))
    graph = coo_array((np.ones(len(pairs)), pairs.T), (60, 60))
    _, whole = connected_components(graph, directed=False)
    assert adjusted_rand_score(cut(60, pairs, weight, 1e9, 1), whole) == 1
    assert len(np.unique(cut(60, pairs, weight, 1e-9, 1))) == 60
    kept = np.bincount(whole)[whole] >= 4
    small = cut(60, pairs, weight, 1e-9, 4)
    assert np.array_equal(small >= 0, kept), "what cannot grow to four nodes is no piece"
    assert min(np.unique(small[kept], return_counts=True)[1]) >= 4


def test_a_cut_by_hand() -> None:
    """Two triangles of light edges and a heavy bridge: with k = 0.5, a triangle's limit is 0.1 + 0.5 / 3 = 0.27."""
    pairs = np.array([[0, 1], [1, 2], [0, 2], [3, 4], [4, 5], [3, 5], [2, 3]])
    for bridge, count in ((0.26, 1), (0.28, 2)):
        found = cut(6, pairs, np.array([0.1] * 6 + [bridge]), 0.5, 1)
        assert len(np.unique(found)) == count and len(set(found[:3])) == len(set(found[3:])) == 1


def test_a_reader_adds_segments_as_a_field(tmp_path: Path) -> None:
    xyz, _ = street()
    xyz[7] = np.nan
    np.savez(tmp_path / "street.npz", points=xyz * 100)
    options = {"unit": 0.01, "nonfinite": "drop", "segments": {"clusters": {"cell": 0.25, "smallest": 20}}}
    sample = Points(PointsOptions.model_validate(options)).read([tmp_path / "street.npz"])
    good = np.isfinite(xyz).all(1)
    assert np.array_equal(sample.fields["segment"], segments(xyz[good], Clusters(cell=0.25, smallest=20)))


def test_segments_are_said_by_name_or_with_numbers() -> None:
    def said(value: object) -> object:
        return PointsOptions.model_validate({"segments": value}).segments

    assert said("none") is None and said(None) is None
    assert said("clusters") == Clusters() and said("supervoxels") == Supervoxels()
    assert said({"supervoxels": {"cell": 0.1}}) == Supervoxels(cell=0.1)
    for options in (PointsOptions(), PointsOptions(segments=Supervoxels(cell=0.1))):
        assert PointsOptions.model_validate(options.model_dump(mode="json")) == options
    with pytest.raises(ValueError, match="clusters"):
        said("watershed")
