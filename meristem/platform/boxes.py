"""Upright boxes in space: their corners, and exactly how much two of them overlap.

A box is seven numbers in a view's frame: centre (x, y, z), length along its heading, width, height, and the heading, in radians
about z from the x axis.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CORNERS = torch.tensor([[0.5, 0.5], [-0.5, 0.5], [-0.5, -0.5], [0.5, -0.5]])  # counter-clockwise, in lengths and widths


def footprint(box: Tensor) -> Tensor:
    """(…, 7) to the corners of its ground plan (…, 4, 2), counter-clockwise."""
    local = _CORNERS.to(box) * box[..., None, 3:5]
    cos, sin = box[..., 6].cos(), box[..., 6].sin()
    turn = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)
    return local @ turn.transpose(-1, -2) + box[..., None, :2]


def corners(box: Tensor) -> Tensor:
    """(…, 7) to (…, 8, 3): the ground plan at the bottom, then at the top."""
    plan = footprint(box)
    half = box[..., 5, None] / 2
    levels = [torch.cat([plan, (box[..., 2, None] + side * half)[..., None].expand(*plan.shape[:-1], 1)], -1)
              for side in (-1, 1)]
    return torch.cat(levels, -2)


def moved(box: Tensor, affine: Tensor) -> Tensor:
    """Boxes (K, 7) where a map (4, 4) that keeps them upright puts them: turns about z, mirrors, one scale, shifts."""
    linear = affine[:3, :3]
    ahead = torch.stack([box[:, 6].cos(), box[:, 6].sin(), torch.zeros_like(box[:, 6])], -1) @ linear.T
    side = box[:, 3:6] * linear.det().abs() ** (1 / 3)
    return torch.cat([box[:, :3] @ linear.T + affine[:3, 3], side, torch.atan2(ahead[:, 1:2], ahead[:, :1])], -1)


def distinct(box: Tensor, label: Tensor, most: float, flat: bool) -> Tensor:
    """(K,) bool: which of boxes (K, 7), best first, no better one that is kept of their class overlaps by more than `most`.

    flat: seen from above, else in space.
    """
    near = iou(box, box)[flat] > most
    near &= label[:, None] == label
    keep = torch.ones(len(box), dtype=torch.bool)
    for i, others in enumerate(near.cpu()):
        if keep[i]:
            keep[i + 1:] &= ~others[i + 1:]
    return keep.to(box.device)


def inside(points: Tensor, box: Tensor) -> Tensor:
    """(B, N, K) whether each of points (B, N, 3) lies in each of boxes (B, K, 7)."""
    offset = points[:, :, None] - box[:, None, :, :3]
    cos, sin = box[:, None, :, 6].cos(), box[:, None, :, 6].sin()
    x, y, z = offset.unbind(-1)
    local = torch.stack([x * cos + y * sin, y * cos - x * sin, z], -1)
    return (local.abs() <= box[:, None, :, 3:6] / 2).all(-1)


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """(P,) area that convex polygons a (P, m, 2) and b (P, n, 2), counter-clockwise, have in common.

    The common polygon's corners are those of either that lie in the other, and the crossings of their sides; in their order
    around their mean they give its area.
    """
    side_a, side_b = a.roll(-1, 1) - a, b.roll(-1, 1) - b

    def cross(u: Tensor, v: Tensor) -> Tensor:
        return u[..., 0] * v[..., 1] - u[..., 1] * v[..., 0]

    scale = torch.cat([a, b], 1).flatten(1).abs().amax(1).clamp_min(1)[:, None, None]
    slack = 1e-9 * scale**2  # a corner on a side is in
    a_in = (cross(side_b[:, None], a[:, :, None] - b[:, None]) >= -slack).all(-1)
    b_in = (cross(side_a[:, None], b[:, :, None] - a[:, None]) >= -slack).all(-1)
    turn = cross(side_a[:, :, None], side_b[:, None])  # 0 of parallel sides, which cross nowhere
    gap = b[:, None] - a[:, :, None]
    parallel = turn.abs() < slack
    turn = torch.where(parallel, 1.0, turn)
    t, u = cross(gap, side_b[:, None]) / turn, cross(gap, side_a[:, :, None]) / turn
    meets = ~parallel & (t >= 0) & (t <= 1) & (u >= 0) & (u <= 1)
    crossing = a[:, :, None] + t[..., None] * side_a[:, :, None]
    points = torch.cat([a, b, crossing.flatten(1, 2)], 1)
    there = torch.cat([a_in, b_in, meets.flatten(1)], 1)
    count = there.sum(1, keepdim=True).clamp_min(1)
    middle = (points * there[..., None]).sum(1, keepdim=True) / count[..., None]
    points = torch.where(there[..., None], points, middle) - middle
    order = torch.atan2(points[..., 1], points[..., 0]).masked_fill(~there, torch.inf).argsort(1)
    points = points.gather(1, order[..., None].expand_as(points))
    last = torch.arange(points.shape[1], device=a.device) >= there.sum(1, keepdim=True)
    points = torch.where(last[..., None], points[:, :1], points)  # what is no corner repeats the first
    return cross(points, points.roll(-1, 1)).sum(1).clamp_min(0) / 2


def iou(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection over union of every pair of boxes a (M, 7) and b (N, 7): (M, N) of volumes, and (M, N) of ground plans.

    Exact for any headings; boxes without extent overlap nothing. Not differentiable.
    """
    a, b = a.detach().double(), b.detach().double()
    m, n = len(a), len(b)
    plan_a, plan_b = footprint(a), footprint(b)
    pairs_a, pairs_b = plan_a[:, None].expand(m, n, 4, 2).flatten(0, 1), plan_b[None].expand(m, n, 4, 2).flatten(0, 1)
    origin = pairs_a.mean(1, keepdim=True)  # differences of far places lose digits
    common = overlap(pairs_a - origin, pairs_b - origin).unflatten(0, (m, n)) if m * n else a.new_zeros(m, n)
    area_a, area_b = (x[:, 3].clamp_min(0) * x[:, 4].clamp_min(0) for x in (a, b))
    low = torch.maximum((a[:, 2] - a[:, 5] / 2)[:, None], (b[:, 2] - b[:, 5] / 2)[None])
    high = torch.minimum((a[:, 2] + a[:, 5] / 2)[:, None], (b[:, 2] + b[:, 5] / 2)[None])
    volume = common * (high - low).clamp_min(0)
    union = (area_a * a[:, 5].clamp_min(0))[:, None] + (area_b * b[:, 5].clamp_min(0))[None] - volume
    flat = area_a[:, None] + area_b[None] - common
    return tuple(torch.where(whole > 0, part / whole.clamp_min(1e-300), 0.0).clamp(0, 1).float()  # type: ignore[return-value]
                 for part, whole in ((volume, union), (common, flat)))
