"""Collapse lights: what the loss of a contrastive run does not show."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


@torch.no_grad()
def feature_lights(z: Tensor) -> dict[str, float]:
    """Of features z (M, D), not centred, so that a collapse to one vector shows as rank 1.

    rank: effective rank exp(− Σ p log p), p = σ / Σ σ of the singular values (Roy and Vetterli 2007); at most min(M, D).
    std: √D × the mean over features of the standard deviation of z/|z| (Chen and He 2021): 1 when isotropic, 0 when collapsed.
    dims: D. All NaN but dims where z is not finite.
    """
    z = z.float()
    if not z.isfinite().all():
        return {"rank": math.nan, "std": math.nan, "dims": float(z.shape[1])}
    sigma = torch.linalg.svdvals(z)
    p = sigma / sigma.sum().clamp_min(torch.finfo(z.dtype).tiny)
    std = F.normalize(z, dim=1).std(0, correction=0).mean() * math.sqrt(z.shape[1])
    return {"rank": float(torch.special.entr(p).sum().exp()), "std": float(std), "dims": float(z.shape[1])}
