"""Made maps of known places, for tests of dense losses."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from meristem.modalities.base import View
from meristem.modalities.frame import Frame
from meristem.platform.assembly import Assembly
from meristem.platform.objectives import Items, Units
from meristem.platform.step import Batch


def rand(*shape: int, seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def boxed(boxes: Tensor, size: tuple[int, int], flipped: tuple[bool, ...] = ()) -> Frame:
    """Frames of `size` elements over boxes (B, 4) of x, y, x, y, low and high, as the authors have them; mirrored or not."""
    low, high = boxes[:, [1, 0]], boxes[:, [3, 2]]
    step = (high - low) / torch.tensor(size)
    affine = torch.eye(3).repeat(len(boxes), 1, 1)
    affine[:, :2, :2], affine[:, :2, 2] = step.diag_embed(), low + step / 2
    for row, flip in enumerate(flipped):
        if flip:
            affine[row, 1, 1], affine[row, 1, 2] = -step[row, 1], high[row, 1] - step[row, 1] / 2
    return Frame(affine, size, torch.ones(len(boxes), 2), ("px", "px"))


def cells(z: Tensor, frame: Frame, look: int) -> Units:
    """Maps (B, D, H, W) over frames of the same lattice as a table of units."""
    b, d, n = len(z), z.shape[1], z[0, 0].numel()
    key = {"item": torch.arange(b).repeat_interleave(n), "view": torch.full((b * n,), look),
           "token": torch.arange(n).repeat(b), "cell": frame.diagonal().repeat_interleave(n)}
    return Units(z.flatten(2).transpose(1, 2).reshape(-1, d), key, torch.ones(b * n), frame.centres().reshape(-1, 2))


def batch(assembly: Assembly, n: int = 4, seed: int = 0) -> Batch:
    """Two random windows of each of n pictures of noise, smooth enough to be sampled."""
    g = torch.Generator().manual_seed(seed)
    size = assembly.recipe.views["v"].size
    low = torch.rand(2 * n, 2, generator=g) * 16
    high = low + 24 + 8 * torch.rand(2 * n, 2, generator=g)
    frame = boxed(torch.cat([low, high], 1), size, tuple(i % 3 == 0 for i in range(2 * n)))
    axes = frame.centres().unflatten(1, size)
    waves = torch.rand(n, 3, 2, generator=g).repeat_interleave(2, 0) / 3
    array = torch.sin(torch.einsum("bhwc,bkc->bkhw", axes, waves))
    view = View("v", array[:, :assembly.recipe.modality.channels], frame, torch.arange(n).repeat_interleave(2),
                torch.arange(2).repeat(n))
    return Batch(Items(torch.arange(n), torch.arange(n)), {"v": view})
