"""Pictures of clouds along the three axes, and which pixel shows which point.

Orthographic: a picture along an axis has the next axis for its rows and the one after for its columns (z: x and y). A cloud's
longer side there fills the picture, its shorter one is centred; pixels are square. As Zhang et al. 2023 (I2P-MAE, section 3.1,
and the released code). Rows of a batch never influence each other, and padding is in no picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

ALONG = (2, 1, 0)  # the axis that each picture looks along
ROWS, COLUMNS = ([(axis + k) % 3 for axis in ALONG] for k in (1, 2))
_MARGIN = 3  # pixels of a picture's side that the cloud leaves free
Merge = Literal["sum", "nearest"]


@dataclass(frozen=True)
class Projection:
    """Where the points of a cloud lie in its three pictures of size × size pixels.

    low: (B, 3, 2) the cloud's least coordinates along rows and columns. pixel: (B, 3) the edge of a pixel. first: (B, 3, 2) the
    pixel that holds `low`.
    """

    low: Tensor
    pixel: Tensor
    first: Tensor
    size: int

    @classmethod
    def of(cls, xyz: Tensor, live: Tensor, size: int) -> Projection:
        """Of clouds (B, N, 3) whose points count where live (B, N); a row without any is in no picture."""
        flat, here = _flat(xyz), live[:, None, :, None]
        low, high = flat.masked_fill(~here, torch.inf).amin(2), flat.masked_fill(~here, -torch.inf).amax(2)
        low, high = (x.nan_to_num(0, 0, 0) for x in (low, high))
        pixel = ((high - low).amax(-1) / (size - _MARGIN)).clamp_min(torch.finfo(low.dtype).tiny)
        last = ((high - low) / pixel[..., None]).floor().long()
        return cls(low, pixel, size // 2 - (last + 2) // 2, size)

    def pixels(self, xyz: Tensor) -> Tensor:
        """(B, 3, N, 2) row and column of each point (B, N, 3) in each picture; at the edge for those that lie outside."""
        at = ((_flat(xyz) - self.low[:, :, None]) / self.pixel[..., None, None]).floor().nan_to_num(0)
        return (at.clamp(-self.size, self.size).long() + self.first[:, :, None]).clamp(0, self.size - 1)

    def sample(self, maps: Tensor, xyz: Tensor) -> Tensor:
        """What maps (B, 3, D, h, w) over the pictures say at points (B, N, 3): (B, N, 3, D), bicubic at the pixels' centres."""
        b, _, d = maps.shape[:3]
        at = (2 * self.pixels(xyz).flip(-1) + 1) / self.size - 1  # column before row
        found = F.grid_sample(maps.flatten(0, 1).float(), at.flatten(0, 1)[:, None].float(), mode="bicubic",
                              padding_mode="border", align_corners=False)
        return found.reshape(b, 3, d, -1).permute(0, 3, 1, 2)

    def shown(self, xyz: Tensor, live: Tensor, spread: int) -> Tensor:
        """(B, 3, size, size) the point that each pixel shows, −1 for none: of those that cover it the one with the greatest
        coordinate along the line of sight, of equals the first.

        A point covers the pixels that are up to `spread` rows and columns away; at the edge what would lie outside falls on it.
        """
        depth, cells = self._depth(xyz, live), self._cells(xyz, live, spread)
        n = depth.shape[-1]
        number = torch.arange(n - 1, -1, -1, device=xyz.device)
        key = (depth.contiguous().view(torch.int32).long() << 32) | number  # floats ≥ 0 are ordered as their bits
        best = torch.full((*cells.shape[:2], self.size**2 + 1), -1, device=xyz.device)
        best.scatter_reduce_(2, cells.flatten(2), key[..., None].expand_as(cells).flatten(2), "amax")
        point = torch.where(best >= 0, n - 1 - (best & 0xFFFFFFFF), -1)
        return point[..., :-1].unflatten(-1, (self.size, self.size))

    def pictures(self, xyz: Tensor, live: Tensor, spread: int = 2, merge: Merge = "sum") -> Tensor:
        """(B, 3, size, size) pictures of depth, in [0, 1].

        `sum`: the logistic function of the summed coordinates along the line of sight of all points that cover a pixel, ½ where
        there are none (theirs). `nearest`: from 1 where the cloud comes nearest to ½ where it ends, of the point that a pixel
        shows; 0 where there is none.
        """
        if merge == "nearest":
            point, depth = self.shown(xyz, live, spread).flatten(2), self._depth(xyz, live)
            height = depth.gather(2, point.clamp_min(0)) / depth.amax(-1, keepdim=True).clamp_min(1e-12)
            return torch.where(point >= 0, (1 + height) / 2, 0).unflatten(-1, (self.size, self.size))
        cells = self._cells(xyz, live, spread)
        along = xyz[..., list(ALONG)].transpose(1, 2).masked_fill(~live[:, None], 0)[..., None].expand_as(cells)
        summed = along.new_zeros(*cells.shape[:2], self.size**2 + 1).scatter_add(2, cells.flatten(2), along.flatten(2))
        return summed[..., :-1].unflatten(-1, (self.size, self.size)).sigmoid()

    @staticmethod
    def _depth(xyz: Tensor, live: Tensor) -> Tensor:
        """(B, 3, N) how far each point is before the farthest."""
        along = xyz[..., list(ALONG)].transpose(1, 2)
        far = along.masked_fill(~live[:, None], torch.inf).amin(-1, keepdim=True)
        return (along - far).masked_fill(~live[:, None], 0).float()

    def _cells(self, xyz: Tensor, live: Tensor, spread: int) -> Tensor:
        """(B, 3, N, (2·spread + 1)²) the pixels that each point covers, row · size + column; size² for padding."""
        step = torch.arange(-spread, spread + 1, device=xyz.device)
        at = self.pixels(xyz)[:, :, :, None] + torch.cartesian_prod(step, step).reshape(-1, 2)
        row, column = at.clamp(0, self.size - 1).unbind(-1)
        return (row * self.size + column).masked_fill(~live[:, None, :, None], self.size**2)


def _flat(xyz: Tensor) -> Tensor:
    """(B, 3, N, 2) coordinates of points (B, N, 3) along rows and columns of each picture."""
    return torch.stack([xyz[..., ROWS], xyz[..., COLUMNS]], -1).transpose(1, 2)
