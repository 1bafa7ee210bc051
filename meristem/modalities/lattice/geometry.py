"""Geometric augmentation of a batch: one resampling for flip, affine and elastic deformation."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from meristem.modalities.rng import Rng


def inner(params: Mapping[str, Tensor], spacing: Tensor, size: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """(B, D+1, D+1): index in the augmented lattice `size` -> index in the given lattice `shape`.

    i' = c' + S⁻¹ (R H / zoom) S F (i − c) + shift, with centres c, spacing S, rotation R, shear H, flips F. Rotations are
    rigid in physical units.
    """
    batch, dims = spacing.shape
    matrix = torch.eye(dims, device=spacing.device).expand(batch, -1, -1).clone()
    if "rotate" in params:
        matrix = rotation(params["rotate"] * (math.pi / 180), dims)
        shear = torch.eye(dims, device=spacing.device).expand(batch, -1, -1).clone()
        rows, columns = torch.triu_indices(dims, dims, 1)
        shear[:, rows, columns] = params["shear"]
        matrix = matrix @ shear / params["zoom"][:, None, None]
    matrix = matrix / spacing[:, :, None] * spacing[:, None, :]
    if "flip" in params:
        matrix = matrix * (1 - 2 * params["flip"])[:, None, :]
    result = torch.eye(dims + 1, device=spacing.device).expand(batch, -1, -1).clone()
    here, there = (torch.tensor([(n - 1) / 2 for n in s], device=spacing.device) for s in (size, shape))
    result[:, :dims, :dims] = matrix
    result[:, :dims, dims] = there - matrix @ here + params.get("shift", 0)
    return result


def rotation(angle: Tensor, dims: int) -> Tensor:
    """Radians (B, 3) about each axis in turn, or (B, 1) in the plane, to matrices (B, D, D)."""
    planes = [(1, 2), (0, 2), (0, 1)] if dims == 3 else [(0, 1)]
    matrix = torch.eye(dims, device=angle.device).expand(len(angle), -1, -1)
    for turn, (i, j) in zip(angle.unbind(1), planes, strict=True):
        one = torch.eye(dims, device=angle.device).expand(len(angle), -1, -1).clone()
        one[:, i, i] = one[:, j, j] = turn.cos()
        one[:, i, j], one[:, j, i] = -turn.sin(), turn.sin()
        matrix = matrix @ one
    return matrix


def elastic(amplitude: Tensor, key: Tensor, cells: int, size: tuple[int, ...]) -> Tensor:
    """Displacements (B, D, *size) in lattice steps, at most `amplitude` (B,): uniform control points, cubic B-splines."""
    dims = len(size)
    points = Rng(key).uniform("points", dims, *[cells + 3] * dims, low=-1, high=1) * amplitude.reshape(-1, *[1] * (dims + 1))
    for n in size:
        points = torch.tensordot(points, spline(n, cells).to(points), ([2], [1]))  # the next axis moves to place 2
    return points


def spline(n: int, cells: int) -> Tensor:
    """(n, cells + 3): weights of uniform cubic B-splines at the centres of n elements over `cells` cells; rows sum to 1."""
    at = (torch.arange(n) + 0.5) / n * cells + 1  # control point k sits at k − 1 cells
    t = (at[:, None] - torch.arange(cells + 3)).abs()
    return torch.where(t < 1, 2 / 3 - t**2 + t**3 / 2, (2 - t).clamp_min(0) ** 3 / 6)


def grid(matrix: Tensor, displacement: Tensor | None, size: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """The sampling grid (B, *size, D) of `torch.nn.functional.grid_sample` for index maps (B, D+1, D+1)."""
    dims, device = len(size), matrix.device

    n, m = (torch.tensor([float(e) for e in extent], device=device) for extent in (size, shape))
    # voxel edges lie at ±1: index i of n is at (2 i + 1) / n − 1
    linear = matrix[:, :dims, :dims] * n / m[:, None]
    origin = (2 * (matrix[:, :dims, :dims] @ ((n - 1) / 2) + matrix[:, :dims, dims]) + 1) / m - 1
    theta = torch.cat([linear, origin[:, :, None]], 2)
    turned = torch.cat([theta[:, :, :dims].flip(2), theta[:, :, dims:]], 2).flip(1)  # grid_sample counts axes from the last
    points = F.affine_grid(turned, [len(matrix), 1, *size], align_corners=False)
    if displacement is not None:
        step = torch.tensor([2 / n for n in shape], device=device).reshape(-1, *[1] * dims)
        points = points + (displacement * step).flip(1).movedim(1, -1)
    return points


def sample(x: Tensor, points: Tensor, mode: str) -> Tensor:
    """x (B, C, *S) at the grid points, zero outside."""
    return F.grid_sample(x, points, mode=mode, padding_mode="zeros", align_corners=False)


def trim(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """The centre of the last axes."""
    for axis, n in enumerate(size, x.ndim - len(size)):
        x = x.narrow(axis, (x.shape[axis] - n) // 2, n)
    return x.contiguous()
