"""Every backend of the point operations against double loops: ties, duplicates, padding, too few points."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from meristem import pointops

GRID = np.stack(np.meshgrid(*(np.arange(3),) * 3), -1).reshape(-1, 3)


def _clouds() -> dict[str, tuple[Tensor, Tensor]]:
    rng = np.random.default_rng(0)
    x = {"random": rng.normal(size=(2, 40, 3)), "duplicates": np.repeat(rng.normal(size=(2, 7, 3)), 5, 1),
         "integer grid": np.stack([GRID, rng.permutation(GRID)]), "all equal": np.full((2, 9, 3), 0.3),
         "one point": rng.normal(size=(2, 1, 3)), "far away": rng.normal(size=(2, 30, 3)) + 1e4,
         "two of each distance to the mean": np.concatenate([half := rng.normal(size=(8, 9, 3)), -half], 1)}
    clouds = {name: (torch.tensor(c, dtype=torch.float32), torch.ones(c.shape[:2], dtype=torch.bool)) for name, c in x.items()}
    xyz, valid = (y.clone() for y in clouds["random"])
    valid[0, 11:], valid[1, ::3] = False, False
    clouds["padding"] = xyz, valid
    clouds["an empty row"] = xyz, valid & torch.tensor([[True], [False]])
    return clouds


CLOUDS = _clouds()


@pytest.fixture(params=["torch", "tree", "pytorch3d"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "pytorch3d" and pointops._pytorch3d() is None:
        pytest.skip("pytorch3d is not importable")
    return request.param


@pytest.fixture(params=CLOUDS)
def cloud(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor]:
    return CLOUDS[request.param]


def _distance(a: np.ndarray, b: np.ndarray) -> np.float32:
    x, y, z = (a - b) ** 2
    return x + y + z


def _plain_nearest(query: np.ndarray, points: np.ndarray, valid: np.ndarray, k: int) -> list[list[tuple[float, int]]]:
    """(distance, index) of the nearest by loops, as `nearest` documents them."""
    result = []
    for q in query:
        found = sorted((float(_distance(q, p)), j) for j, p in enumerate(points) if valid[j])[:k]
        result.append(found + [(math.inf, found[0][1] if found else 0)] * (k - len(found)))
    return result


def _plain_fps(xyz: np.ndarray, valid: np.ndarray, count: int) -> tuple[list[int], list[bool]]:
    live = [i for i in range(len(xyz)) if valid[i]]
    if not live:
        return [0] * count, [False] * count
    mean = np.array([math.fsum(xyz[live, axis]) / len(live) for axis in range(3)])
    chosen = [max(live, key=lambda i: (_distance(xyz[i].astype(np.float64), mean), -i))]
    while len(chosen) < count:
        far = {i: min(_distance(xyz[i], xyz[j]) for j in chosen) for i in live}
        best = max(live, key=lambda i: (far[i], -i))
        if far[best] == 0:
            break
        chosen.append(best)
    return chosen + chosen[:1] * (count - len(chosen)), [True] * len(chosen) + [False] * (count - len(chosen))


@pytest.mark.parametrize("sampler", ["torch", "pytorch3d"])
@pytest.mark.parametrize("count", [1, 5, 20])
def test_farthest_points_are_those_of_the_plain_loop(cloud: tuple[Tensor, Tensor], count: int, sampler: str) -> None:
    if sampler == "pytorch3d" and pointops._pytorch3d() is None:
        pytest.skip("pytorch3d is not importable")
    xyz, valid = cloud
    index, distinct = pointops.farthest_point_sampling(xyz, valid, count, sampler)
    for b in range(len(xyz)):
        assert (index[b].tolist(), distinct[b].tolist()) == _plain_fps(xyz[b].numpy(), valid[b].numpy(), count)


@pytest.mark.parametrize("k", [1, 4, 12])
def test_neighbours_are_those_of_a_double_loop(cloud: tuple[Tensor, Tensor], k: int, backend: str) -> None:
    xyz, valid = cloud
    query = torch.cat([xyz[:, :6], torch.ones_like(xyz[:, :3])], 1)
    distance, index = pointops.nearest(query, xyz, valid, k, backend)
    for b in range(len(xyz)):
        expected = _plain_nearest(query[b].numpy(), xyz[b].numpy(), valid[b].numpy(), k)
        assert [list(zip(*row, strict=True)) for row in zip(distance[b].tolist(), index[b].tolist(), strict=True)] == expected


def test_parts_and_spare_proposals_change_no_neighbour(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.from_numpy(np.random.default_rng(1).integers(0, 6, (2, 500, 3))).float()  # ties beyond every proposal
    whole = pointops.nearest(x, x, None, 9, "torch")
    monkeypatch.setattr(pointops, "_KEYS", 7000)
    part = pointops.nearest(x, x, None, 9, backend)
    assert torch.equal(whole[0], part[0]) and torch.equal(whole[1], part[1])


def test_large_clouds_take_the_tree_and_get_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.rand(1, 300, 3)
    used = []
    by_tree = pointops._by_tree
    monkeypatch.setattr(pointops, "_by_tree", lambda *given: used.append("tree") or by_tree(*given))
    by_default, plain = pointops.nearest(x, x, None, 5), pointops.nearest(x, x, None, 5, "torch")
    assert used == ["tree"]
    assert torch.equal(by_default[0], plain[0]) and torch.equal(by_default[1], plain[1])


class Otherwise:
    """pytorch3d's interface, with the last of equal distances instead of the first, and no promise after the last point."""

    @staticmethod
    def knn_points(query: Tensor, points: Tensor, lengths2: Tensor, K: int, return_sorted: bool) -> SimpleNamespace:
        found = torch.full((*query.shape[:2], K), -1)
        for b, n in enumerate(lengths2.tolist()):
            distance = (query[b, :, None].double() - points[b, :n].double()).square().sum(-1)
            near = n - 1 - distance.flip(1).argsort(dim=1, stable=True)[:, :K]
            found[b, :, :near.shape[1]] = near.flip(1)
        return SimpleNamespace(idx=found)

    @staticmethod
    def sample_farthest_points(points: Tensor, lengths: Tensor, K: int) -> tuple[Tensor, Tensor]:
        chosen = torch.full((len(points), K), -1)
        for b, n in enumerate(lengths.tolist()):
            chosen[b, 0] = 0
            for i in range(1, min(K, n)):
                far = (points[b, :n, None] - points[b, chosen[b, :i]]).square().sum(-1).amin(1)
                chosen[b, i] = n - 1 - far.flip(0).argmax()
        return points, chosen


def test_another_way_with_ties_is_put_right(cloud: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pointops, "_pytorch3d", lambda: Otherwise)
    for what, operation in (((*cloud, 12), pointops.farthest_point_sampling), ((cloud[0], *cloud, 7), pointops.nearest)):
        for got, expected in zip(operation(*what, "pytorch3d"), operation(*what, "torch"), strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_ends_all_the_same(bad: float, backend: str) -> None:
    x = torch.rand(1, 20, 3)
    x[0, 3, 1] = bad
    valid = torch.ones(1, 20, dtype=torch.bool)
    index, _ = pointops.farthest_point_sampling(x, valid, 8)
    _, near = pointops.nearest(x, x, valid, 4, backend)
    for places in (index, near):
        assert bool(((places >= 0) & (places < 20)).all())


def test_a_ball_holds_the_nearest_within_it(cloud: tuple[Tensor, Tensor], backend: str) -> None:
    xyz, valid = cloud
    distance, index = pointops.ball_query(xyz, xyz, valid, 6, 1.0, backend)
    for b in range(len(xyz)):
        for i, row in enumerate(_plain_nearest(xyz[b].numpy(), xyz[b].numpy(), valid[b].numpy(), 6)):
            inside = [(d, j) for d, j in row if d < 1.0]
            assert list(zip(distance[b, i].tolist(), index[b, i].tolist(), strict=True)) == \
                inside + [(math.inf, row[0][1])] * (6 - len(inside))


floats = st.floats(-4, 4, width=16)
clouds = st.integers(1, 24).flatmap(lambda n: hnp.arrays(np.float32, (n, 3), elements=floats))


@settings(max_examples=60, deadline=None)
@given(clouds, clouds, st.integers(0, 9))
def test_a_row_is_the_same_alone_and_padded_beside_another(a: np.ndarray, b: np.ndarray, more: int) -> None:
    n = max(len(a), len(b)) + more
    batch, valid = torch.full((2, n, 3), 7.0), torch.zeros(2, n, dtype=torch.bool)
    for row, x in enumerate((a, b)):
        batch[row, :len(x)], valid[row, :len(x)] = torch.from_numpy(x), True
    alone = torch.from_numpy(a)[None]
    whole = torch.ones(1, len(a), dtype=torch.bool)
    together = pointops.farthest_point_sampling(batch, valid, 6), pointops.nearest(batch[:, :1], batch, valid, 5)
    by_itself = pointops.farthest_point_sampling(alone, whole, 6), pointops.nearest(alone[:, :1], alone, whole, 5)
    for x, y in zip(together, by_itself, strict=True):
        assert all(torch.equal(p[:1], q) for p, q in zip(x, y, strict=True))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(4, 60))
def test_the_order_of_points_moves_no_sample(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    x, order = torch.from_numpy(rng.normal(size=(1, n, 3))).float(), torch.from_numpy(rng.permutation(n))
    valid = torch.ones(1, n, dtype=torch.bool)
    index, _ = pointops.farthest_point_sampling(x, valid, 4)
    shuffled, _ = pointops.farthest_point_sampling(x[:, order], valid, 4)
    assert torch.equal(index, order[shuffled])


# ---- interpolation, distances of sets

def test_interpolation_is_the_mean_by_inverse_squares() -> None:
    query, points, features = torch.rand(2, 5, 3), torch.rand(2, 8, 3), torch.rand(2, 8, 4, dtype=torch.float64)
    valid = torch.ones(2, 8, dtype=torch.bool)
    valid[1, 2:] = False  # fewer than three
    result = pointops.interpolate(query, points, features, valid)
    for b in range(2):
        for i in range(5):
            distance = ((query[b, i] - points[b]).double() ** 2).sum(-1)
            near = distance.masked_fill(~valid[b], math.inf).argsort()[:min(3, int(valid[b].sum()))]
            weight = 1 / distance[near]
            torch.testing.assert_close(result[b, i], (weight[:, None] * features[b, near]).sum(0) / weight.sum(),
                                       rtol=1e-5, atol=1e-6)


def test_interpolation_gives_points_their_own_features_and_has_gradients() -> None:
    points, features = torch.rand(1, 8, 3), torch.rand(1, 8, 2, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(pointops.interpolate(points, points, features), features)
    query = torch.rand(1, 5, 3)
    assert torch.autograd.gradcheck(lambda f: pointops.interpolate(query, points, f), features)


def _plain_chamfer(a: Tensor, b: Tensor, weight_a: Tensor, weight_b: Tensor, norm: str) -> float:
    total = 0.0
    for x, y, wx, wy in ((a, b, weight_a, weight_b), (b, a, weight_b, weight_a)):
        away = []
        for p in x:
            near = min(math.dist(p.tolist(), q.tolist()) for q, w in zip(y, wy, strict=True) if w > 0)
            away.append(near**2 if norm == "l2" else near)
        total += float(np.average(away, weights=wx.numpy()))
    return total if norm == "l2" else total / 2


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_chamfer_is_that_of_a_double_loop(norm: str) -> None:
    a, b = torch.rand(3, 6, 3), torch.rand(3, 9, 3)
    one = [torch.ones(3, 6), torch.ones(3, 9)]
    some = [torch.rand(3, 6).mul(2).floor(), torch.rand(3, 9)]
    some[0][:, 0] = 1
    for weights in (one, some):
        expected = [_plain_chamfer(a[t], b[t], weights[0][t], weights[1][t], norm) for t in range(3)]
        torch.testing.assert_close(pointops.chamfer(a, b, *weights, norm=norm), torch.tensor(expected))
    torch.testing.assert_close(pointops.chamfer(a, b, norm=norm), pointops.chamfer(a, b, *one, norm=norm))


def test_chamfer_has_the_gradient_of_all_pairs() -> None:
    a, b = torch.rand(2, 6, 3, requires_grad=True), torch.rand(2, 5, 3, requires_grad=True)
    pairs = (a[:, :, None] - b[:, None]).square().sum(-1)
    expected = torch.autograd.grad((pairs.amin(2).mean(1) + pairs.amin(1).mean(1)).sum(), (a, b))
    for got, wanted in zip(torch.autograd.grad(pointops.chamfer(a, b).sum(), (a, b)), expected, strict=True):
        torch.testing.assert_close(got, wanted)


def test_chamfer_of_equal_sets_is_zero_and_so_is_its_gradient() -> None:
    a = torch.rand(1, 6, 3, requires_grad=True)
    for norm in ("l2", "l1"):
        distance = pointops.chamfer(a, a.detach().flip(1), norm=norm)
        assert distance.item() == 0
        assert torch.autograd.grad(distance.sum(), a)[0].abs().max() == 0


def test_chamfer_with_a_set_of_no_points_is_zero() -> None:
    a = torch.rand(1, 4, 3, requires_grad=True)
    distance = pointops.chamfer(a, torch.full((1, 2, 3), math.nan), None, torch.zeros(1, 2))
    assert distance.item() == 0


# ---- order

@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_a_hilbert_curve_visits_every_cell_once_by_steps_of_one(bits: int) -> None:
    cells = torch.cartesian_prod(*(torch.arange(1 << bits),) * 3)
    place = pointops.hilbert(cells, bits)
    order = place.argsort()
    assert torch.equal(place[order], torch.arange(len(cells)))
    assert set((cells[order][1:] - cells[order][:-1]).abs().sum(1).tolist()) == {1}


def test_a_coarser_curve_is_a_finer_one_by_whole_blocks() -> None:
    cells = torch.randint(0, 1 << 16, (5000, 3))
    place = (pointops.hilbert(cells, 16) >> 3 * 13).tolist()
    block = dict(zip(map(tuple, (cells >> 13).tolist()), place, strict=True))
    assert len(set(block.values())) == len(block) == 512
    assert [block[tuple(c)] for c in (cells >> 13).tolist()] == place


# ---- GPU

@pytest.mark.gpu
def test_a_gpu_gives_the_bits_of_a_cpu(cloud: tuple[Tensor, Tensor]) -> None:
    xyz, valid = cloud
    for operation, what in ((pointops.farthest_point_sampling, (xyz, valid, 9)), (pointops.nearest, (xyz, xyz, valid, 7))):
        for name in (None, "torch"):
            here = operation(*what, backend="torch")
            there = operation(*(x.cuda() if isinstance(x, Tensor) else x for x in what), backend=name)
            assert all(torch.equal(a, b.cpu()) for a, b in zip(here, there, strict=True))
    cells = torch.randint(0, 1 << 16, (1000, 3))
    assert torch.equal(pointops.hilbert(cells, 16), pointops.hilbert(cells.cuda(), 16).cpu())
