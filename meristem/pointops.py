"""Operations on sets of points: sampling, neighbours, interpolation, Chamfer distance, order along a curve.

Rows of a batch never influence each other, and padding changes nothing: a row of a padded batch gives the bits that it gives
alone. Distances are squared Euclidean, float32, summed from the differences of coordinates; of equal distances the lowest index
comes first. pytorch3d (on a GPU, where importable) and scipy's k-d tree (on a CPU) only propose: what they propose is ranked
again by those distances, and where that settles nothing all points are, so that every backend gives the same answer.
"""

from __future__ import annotations

from functools import cache, partial
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor

Backend = Literal["torch", "tree", "pytorch3d"]

_KEYS = 2**23  # pairs of points that are compared at a time
_TREE = 2**16  # pairs of one row from which a k-d tree is worth its building on a CPU (benchmarks/points.py)
_SPARE = 8  # neighbours beyond k that a backend proposes, so that rounding cannot lose one of the k
_MARGIN = 1e-5  # relative; rounding moves a squared distance by less than 1e-6
_FIXED_POINT = 40  # bits of a coordinate in exact sums, which leaves room for 2²² of them


@cache
def _pytorch3d() -> Any:
    """pytorch3d's operations, None where it is not installed, does not fit this torch, or was built without the GPU."""
    try:
        from pytorch3d import ops

        point = torch.zeros(1, 1, 3, device="cuda" if torch.cuda.is_available() else "cpu")
        ops.knn_points(point, point)
    except (ImportError, RuntimeError):
        return None
    return ops


def _squared(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances of points a (…, 3) and b (…, 3), broadcast; the same bits wherever a pair stands."""
    x, y, z = ((p - q).square_() for p, q in zip(a.unbind(-1), b.unbind(-1), strict=True))
    return x.add_(y).add_(z)


def gather_points(x: Tensor, index: Tensor) -> Tensor:
    """Rows `index` (B, …) of x (B, N, D) -> (B, …, D)."""
    flat = index.flatten(1)[..., None].expand(-1, -1, x.shape[-1])
    return x.gather(1, flat).unflatten(1, index.shape[1:])


# ---- sampling

def _start(xyz: Tensor, valid: Tensor) -> Tensor:
    """(B,) the valid point farthest from their mean, which is summed exactly: neither order nor padding moves it."""
    x = xyz.masked_fill(~valid[..., None], 0).double()
    step = 2.0 ** (torch.frexp(x.abs().amax((1, 2))).exponent[:, None, None].double() - _FIXED_POINT)
    total = (x / step).round().long().sum(1, keepdim=True)
    mean = total * step / valid.sum(1).clamp_min(1)[:, None, None]
    return _squared(x, mean).masked_fill(~valid, -1).argmax(1)


def farthest_point_sampling(xyz: Tensor, valid: Tensor, count: int, backend: Backend | None = None) -> tuple[Tensor, Tensor]:
    """Points that each lie farthest from all chosen before (Eldar et al. 1997; Qi et al. 2017, PointNet++, section 3.2).

    xyz: (B, N, 3); valid: (B, N), False for padding. The first is the one farthest from the mean. Returns their indices
    (B, count) int64, and (B, count) which of them are further distinct points; the others repeat the first.
    backend: `torch` or `pytorch3d`; None: pytorch3d on a GPU where importable.
    """
    xyz = xyz.detach().float()
    first = _start(xyz, valid)
    if backend is None:
        backend = "pytorch3d" if xyz.is_cuda and len(xyz) * count * xyz.shape[1] <= 16 * _KEYS and _pytorch3d() else "torch"
    if backend == "pytorch3d":
        return _sampled_by_pytorch3d(xyz, valid, first, count)
    x, y, z = xyz.permute(2, 0, 1).contiguous()
    far = torch.full_like(x, torch.inf).masked_fill_(~valid, -1)
    chosen, distinct, at = [], [], first[:, None]
    more = valid.any(1, keepdim=True)
    for _ in range(count):
        chosen.append(at)
        distinct.append(more)
        distance = (x - x.gather(1, at)).square_()
        distance.add_((y - y.gather(1, at)).square_()).add_((z - z.gather(1, at)).square_())
        torch.minimum(far, distance, out=far)
        farthest, at = far.max(1, keepdim=True)
        more = more & (farthest > 0)
    index, ok = torch.cat(chosen, 1), torch.cat(distinct, 1)
    return torch.where(ok, index, first[:, None]), ok


def _sampled_by_pytorch3d(xyz: Tensor, valid: Tensor, first: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """pytorch3d's choice, checked step by step; rows in which it broke a tie or rounded otherwise are chosen again."""
    rank = (~valid).long() + 1
    rank.scatter_(1, first[:, None], 0)  # it starts with the first point
    order = rank.argsort(dim=1, stable=True)
    length = valid.sum(1)
    index = _pytorch3d().sample_farthest_points(gather_points(xyz, order), length.clamp_min(1), count)[1]
    index = order.gather(1, index.clamp_min(0))
    distance = _squared(gather_points(xyz, index)[:, :, None], xyz[:, None])  # (B, count, N)
    far, next_ = distance.cummin(1).values.masked_fill_(~valid[:, None], -1).max(-1)
    true = torch.cat([valid.any(1, keepdim=True), far[:, :-1] > 0], 1)
    agrees = ((index[:, 1:] == next_[:, :-1]) | ~true[:, 1:]).all(1)
    index = torch.where(true, index, first[:, None])
    if not bool(agrees.all()):
        index[~agrees], true[~agrees] = farthest_point_sampling(xyz[~agrees], valid[~agrees], count, "torch")
    return index, true


# ---- neighbours

def nearest(query: Tensor, points: Tensor, valid: Tensor | None, k: int,
            backend: Backend | None = None) -> tuple[Tensor, Tensor]:
    """The k nearest of points (B, N, 3) to each of query (B, M, 3); those that are not `valid` (B, N) are no one's neighbours.

    Returns squared distances and indices (B, M, k), nearest first. Where there are fewer than k, the remaining places have
    distance inf and repeat the nearest. backend None: pytorch3d on a GPU where importable, a k-d tree for many points on a CPU.
    Not differentiable: gather the points again for that.
    """
    query, points = query.detach().float(), points.detach().float()
    if valid is None:
        valid = torch.ones_like(points[..., 0], dtype=torch.bool)
    m, n = query.shape[1], points.shape[1]
    if backend is None:
        backend = "pytorch3d" if query.is_cuda and _pytorch3d() else "torch"
        if query.device.type == "cpu" and m * n >= _TREE:
            backend = "tree"
    finite = backend == "torch" or bool((points.isfinite().all(-1) | ~valid).all() & query.isfinite().all())
    find = _compared if backend == "torch" or not finite else partial(_proposed, backend=backend)
    distance, index = find(query, points, valid, min(k, n))
    short = max(k - n, 0)
    distance = torch.cat([distance, distance.new_full((*distance.shape[:-1], short), torch.inf)], -1)
    index = torch.cat([index, index[..., :1].expand(*index.shape[:-1], short)], -1)
    return distance, torch.where(distance < torch.inf, index, index[..., :1])


def _ranked(query: Tensor, points: Tensor, valid: Tensor, k: int, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(distance, index) of the k nearest by (distance, index). query (…, M, 3), points (…, M or 1, N, 3), index (…, N)."""
    distance = _squared(query[..., None, :], points).masked_fill_(~valid, torch.inf)
    if index is None:
        index = torch.arange(points.shape[-2], device=points.device)
    key = distance.view(torch.int32).long().bitwise_left_shift_(32).bitwise_or_(index)  # floats ≥ 0 are ordered as their bits
    key = key.amin(-1, keepdim=True) if k == 1 else key.topk(k, largest=False).values
    return (key >> 32).int().view(torch.float32), key & 0xFFFFFFFF


def _compared(query: Tensor, points: Tensor, valid: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`nearest` by comparing each query with all points."""
    (b, m), n = query.shape[:2], points.shape[1]
    distance, index = query.new_empty(b, m, k), valid.new_empty(b, m, k, dtype=torch.int64)
    rows, queries = max(_KEYS // max(m * n, 1), 1), max(_KEYS // n, 1)
    for i, j in product(range(0, b, rows), range(0, m, queries)):
        at = slice(i, i + rows), slice(j, j + queries)
        distance[at], index[at] = _ranked(query[at], points[at[0], None], valid[at[0], None], k)
    return distance, index


def _proposed(query: Tensor, points: Tensor, valid: Tensor, k: int, backend: Backend) -> tuple[Tensor, Tensor]:
    """`nearest` from a backend's proposals, and from all points where those do not settle it."""
    (b, m), n = query.shape[:2], points.shape[1]
    some, length = min(k + _SPARE, n), valid.sum(1)
    there = torch.arange(some, device=points.device) < length[:, None, None]
    found = (_by_tree if backend == "tree" else _by_pytorch3d)(query, points, valid, some).masked_fill_(~there, 0)
    distance, index = query.new_empty(b, m, k), torch.empty_like(found[..., :k])
    settled = valid.new_empty(b, m)
    step = max(_KEYS // (b * some), 1)
    for i in range(0, m, step):
        part = slice(i, i + step)
        d, at = _ranked(query[:, part], gather_points(points, found[:, part]), there, some, found[:, part])
        distance[:, part], index[:, part] = d[..., :k], at[..., :k]
        settled[:, part] = (d[..., -1] * (1 - _MARGIN) > d[..., k - 1]) | (length <= some)[:, None]
    row, place = (~settled).nonzero(as_tuple=True)
    step = max(_KEYS // n, 1)
    for i in range(0, len(row), step):
        r, p = row[i:i + step], place[i:i + step]
        distance[r, p], index[r, p] = _ranked(query[r, p], points[r], valid[r], k)
    return distance, index


def _by_pytorch3d(query: Tensor, points: Tensor, valid: Tensor, k: int) -> Tensor:
    """(B, M, k) the k nearest in any order, but for ties and rounding; anything after the last of fewer than k."""
    order = (~valid).byte().argsort(dim=1, stable=True)
    found = _pytorch3d().knn_points(query, gather_points(points, order), lengths2=valid.sum(1), K=k, return_sorted=False).idx
    return order.gather(1, found.clamp(0, points.shape[1] - 1).flatten(1)).unflatten(1, found.shape[1:])


def _by_tree(query: Tensor, points: Tensor, valid: Tensor, k: int) -> Tensor:
    from scipy.spatial import cKDTree

    found = torch.zeros(*query.shape[:2], k, dtype=torch.int64)
    for row, q, x, there in zip(found, query.cpu().numpy(), points.cpu().numpy(), valid.cpu().numpy(), strict=True):
        live = there.nonzero()[0]
        some = min(k, len(live))
        if some:
            near = cKDTree(x[live]).query(q, k=range(1, some + 1))[1]
            row[:, :some] = torch.from_numpy(live[near])
    return found.to(query.device)


def ball_query(query: Tensor, points: Tensor, valid: Tensor | None, k: int, radius: float,
               backend: Backend | None = None) -> tuple[Tensor, Tensor]:
    """As `nearest`, of the points nearer than `radius`: where there are fewer than k, distance inf and the nearest again.

    Qi et al. 2017 (PointNet++, section 3.3) take any k of them; the k nearest do not depend on the order of the points.
    """
    distance, index = nearest(query, points, valid, k, backend)
    outside = distance >= radius**2
    return distance.masked_fill(outside, torch.inf), torch.where(outside, index[..., :1], index)


def interpolate(query: Tensor, points: Tensor, features: Tensor, valid: Tensor | None = None, k: int = 3) -> Tensor:
    """Features (B, N, D) of points (B, N, 3) at query (B, M, 3), (B, M, D): mean of the k nearest by 1 / distance².

    Qi et al. 2017 (PointNet++), equation 2 with p = 2; a query that lies on a point gets that point's features. Differentiable
    in them.
    """
    distance, index = nearest(query, points, valid, k)
    ratio = distance[..., :1] / distance  # free of scale, and no division of 1 by 0
    weight = torch.where(distance == 0, 1.0, ratio).nan_to_num(0.0)
    weight = (weight / weight.sum(-1, keepdim=True).clamp_min(1)).to(features.dtype)
    return sum((weight[..., i, None] * gather_points(features, index[..., i]) for i in range(k)), features.new_zeros(()))


# ---- distances of sets

def chamfer(a: Tensor, b: Tensor, weight_a: Tensor | None = None, weight_b: Tensor | None = None,
            norm: Literal["l2", "l1"] = "l2") -> Tensor:
    """Chamfer distance of sets of points a (T, M, 3) and b (T, N, 3): (T,).

    `l2`: mean over a of the squared distance to the nearest of b, plus the same from b to a (Fan et al. 2017, equation 1, with
    means; Pang et al. 2022, Point-MAE, equation 6). `l1`: half the sum of the mean distances, not squared (Yu et al. 2021,
    PoinTr, equation 3, whose code halves it).
    weight_a (T, M), weight_b (T, N): of points in the means; one of weight 0 is not there, for the other set neither. A set
    without points makes the distance 0. Differentiable in both.
    """
    # 0 · NaN is NaN: what stands where no point is must not pass
    a = a if weight_a is None else a.masked_fill((weight_a == 0)[..., None], 0)
    b = b if weight_b is None else b.masked_fill((weight_b == 0)[..., None], 0)
    both = _one_way(a, b, weight_a, weight_b, norm) + _one_way(b, a, weight_b, weight_a, norm)
    return both if norm == "l2" else both / 2


def _one_way(a: Tensor, b: Tensor, weight_a: Tensor | None, weight_b: Tensor | None, norm: str) -> Tensor:
    distance, index = nearest(a, b, None if weight_b is None else weight_b > 0, 1, "torch")
    difference = a - gather_points(b, index[..., 0])
    away = difference.square().sum(-1) if norm == "l2" else torch.linalg.vector_norm(difference, dim=-1)
    weight = torch.ones_like(away) if weight_a is None else weight_a.to(away)
    weight = weight.masked_fill(distance[..., 0] == torch.inf, 0)
    return (weight * away).sum(-1) / weight.sum(-1).clamp_min(torch.finfo(away.dtype).tiny)


# ---- order

def hilbert(cells: Tensor, bits: int) -> Tensor:
    """Place (…) int64 of each cell (…, 3), whole numbers in [0, 2^bits), bits ≤ 20, on a Hilbert curve.

    Successive places are cells that share a face. Skilling 2004, Programming the Hilbert curve.
    """
    x = list(cells.int().unbind(-1))
    for bit in range(bits - 1, 0, -1):
        low = (1 << bit) - 1
        for i in range(3):
            swap = torch.where(x[i] >> bit & 1 == 1, 0, (x[0] ^ x[i]) & low)
            invert = torch.where(x[i] >> bit & 1 == 1, low, 0)
            x[0] = x[0] ^ swap ^ invert
            if i:
                x[i] = x[i] ^ swap
    x[1] = x[1] ^ x[0]
    x[2] = x[2] ^ x[1]
    flip = torch.zeros_like(x[0])
    for bit in range(bits - 1, 0, -1):
        flip = torch.where(x[2] >> bit & 1 == 1, flip ^ ((1 << bit) - 1), flip)
    place = torch.zeros_like(x[0], dtype=torch.int64)
    for bit in range(bits - 1, -1, -1):
        for axis in x:
            place = place.bitwise_left_shift_(1).bitwise_or_((axis ^ flip) >> bit & 1)
    return place
