"""Where a view's lattice lies in its source sample."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Frame:
    """Geometry of a batch of views.

    affine: (B, C+1, C+1) lattice index -> source coordinate, in `unit`; holds crop, flip, rotation and resize.
    shape: lattice size, C integers.
    spacing: (B, C) the size of one lattice step **as the view presents itself**: the sample's own voxel size, untouched by
        zoom or flip, so that an augmentation cannot be read off positions.
    unit: per axis, mm | px | s | m.
    """

    affine: Tensor
    shape: tuple[int, ...]
    spacing: Tensor
    unit: tuple[str, ...]

    @property
    def dims(self) -> int:
        return len(self.shape)

    def to_source(self, index: Tensor) -> Tensor:
        """Lattice indices (B, N, C) to source coordinates (B, N, C)."""
        linear, origin = self.affine[:, :-1, :-1], self.affine[:, :-1, -1]
        return index @ linear.transpose(1, 2) + origin[:, None]

    def from_source(self, point: Tensor) -> tuple[Tensor, Tensor]:
        """Source coordinates (B, N, C) to lattice indices (B, N, C), and (B, N) whether they lie inside the view."""
        linear, origin = self.affine[:, :-1, :-1], self.affine[:, :-1, -1]
        index = torch.linalg.solve(linear, (point - origin[:, None]).transpose(1, 2)).transpose(1, 2)
        size = torch.tensor(self.shape, device=index.device, dtype=index.dtype)
        return index, ((index >= -0.5) & (index <= size - 0.5)).all(-1)

    def local(self, index: Tensor) -> Tensor:
        """Lattice indices (B, N, C) to the view's own coordinates (B, N, C): what an encoder may be shown."""
        return index * self.spacing[:, None]

    def boxes(self) -> Tensor:
        """(B, C, 2): the axis-aligned box of each view in source coordinates, voxel edges included."""
        corners = torch.cartesian_prod(*(torch.tensor([-0.5, n - 0.5]) for n in self.shape)).reshape(-1, self.dims)
        corners = corners.to(self.affine)[None].expand(len(self.affine), -1, -1)
        points = self.to_source(corners)
        return torch.stack([points.amin(1), points.amax(1)], -1)

    def cubes(self) -> Tensor:
        """(B, C+1, C+1): the unit cube to the source, as the lattice with its voxel edges fills it."""
        inner = torch.diag(torch.tensor([*map(float, self.shape), 1.0]))
        inner[:-1, -1] = -0.5
        return self.affine @ inner.to(self.affine)

    def compose(self, inner: Tensor, shape: tuple[int, ...] | None = None) -> Frame:
        """The frame of a lattice whose index maps to this one's by `inner` (B, C+1, C+1)."""
        return replace(self, affine=self.affine @ inner.to(self.affine), shape=shape or self.shape)

    def coarse(self, stride: tuple[int, ...], shape: tuple[int, ...]) -> Frame:
        """The frame of a map of `shape` cells, each of which covers `stride` elements per axis, from the first element on."""
        step = torch.tensor(stride, device=self.affine.device, dtype=self.affine.dtype)
        inner = torch.cat([step, step.new_ones(1)]).diag()
        inner[:-1, -1] = (step - 1) / 2
        return replace(self.compose(inner[None], shape), spacing=self.spacing * step)

    def centres(self) -> Tensor:
        """(B, N, C): source coordinates of all elements, in raster order."""
        index = torch.cartesian_prod(*(torch.arange(n, device=self.affine.device) for n in self.shape)).reshape(-1, self.dims)
        return self.to_source(index.to(self.affine)[None].expand(len(self.affine), -1, -1))

    def diagonal(self) -> Tensor:
        """(B,): how long an element's diagonal is in the source."""
        return self.affine[:, :-1, :-1].flatten(1).norm(dim=1)

    def select(self, rows: Tensor | slice) -> Frame:
        return replace(self, affine=self.affine[rows], spacing=self.spacing[rows])

    def to(self, device: torch.device | str) -> Frame:
        return replace(self, affine=self.affine.to(device), spacing=self.spacing.to(device))
