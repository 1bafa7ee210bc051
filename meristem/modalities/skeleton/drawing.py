"""How a view of a sequence is drawn, and what is done to a batch of them on its device."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from meristem.modalities.base import Draw, Header, Look, View
from meristem.modalities.lattice.geometry import rotation
from meristem.modalities.rng import Rng
from meristem.modalities.skeleton.layouts import Layout
from meristem.modalities.skeleton.options import SkeletonViewOptions


def draw(view: SkeletonViewOptions, header: Header, look: Look, layout: Layout) -> Draw:
    """Which frames, and every number of the augmentation; operations that the view does not name have no params.

    flip: 1 for the mirror image. matrix: (D, D), of every joint. jitter: (joints,) 1 for those that jitter; spoil: (D, D) of
    those; gone: 1 where they are taken away. noise_key: of the element-wise noise.
    """
    rng, (_, frames, joints) = look.rng, header.shape
    if view == view.plain():
        return Draw((0, 0), (frames, joints), (*view.size, joints))
    u = rng.uniform("crop", 2)[0].tolist()
    share = view.crop[0] + (view.crop[1] - view.crop[0]) * u[0]
    n = min(max(round(frames * share), view.least, 1), frames)
    dims, params = layout.dims, dict[str, Any]()
    if view.flip:
        params["flip"] = float(rng.uniform("flip")[0] < view.flip)
    if view.rotate or view.shear:
        params["matrix"] = _matrix(view, rng, dims)
    if view.jitter is not None:
        chosen = rng.permutation("jitter", joints)[0] < view.jitter.joints
        params["jitter"] = chosen.numpy()
        params["spoil"] = rng.uniform("spoil", dims, dims, low=-view.jitter.amount, high=view.jitter.amount)[0].numpy()
        params["gone"] = float(rng.uniform("gone")[0] < view.jitter.drop)
    arrays: dict[str, Any] = {name: np.asarray(value, np.float32) for name, value in params.items()}
    if view.noise:
        arrays["noise_key"] = rng.fork("noise").key[0]
    return Draw((int(u[1] * (frames - n + 1)), 0), (n, joints), (*view.size, joints), arrays)


def _matrix(view: SkeletonViewOptions, rng: Rng, dims: int) -> np.ndarray:
    """Rotation after shear; in the picture plane where there are but two coordinates."""
    limit = torch.tensor(view.rotate).expand(3) * (math.pi / 180)
    angles = (rng.uniform("rotate", 3, low=-1, high=1) * limit)[:, 3 - (3 if dims == 3 else 1):]
    slopes = rng.uniform("shear", dims, dims, low=-view.shear, high=view.shear)[0].fill_diagonal_(1)
    matrix: np.ndarray = (rotation(angles, dims)[0] @ slopes).numpy()
    return matrix


def augment(view: View, settings: SkeletonViewOptions, layout: Layout) -> View:
    """What `draw` decided, each row by its own params. What is NaN was not seen: it is 0 and weighs 0."""
    x, p, people = view.array.float(), view.params, view.array.shape[-1] // len(layout)
    seen = ~x.isnan().any(1, keepdim=True)
    seen = seen if view.weight is None else seen & (view.weight > 0)
    fields = dict(view.fields)

    def across(joint: tuple[int, ...]) -> Tensor:
        """Of every joint of every person, the number of another one of the same person."""
        return torch.tensor([m * len(layout) + j for m in range(people) for j in joint], device=x.device)

    if "flip" in p:
        swap = across(layout.mirror)

        def mirrored(y: Tensor) -> Tensor:
            return torch.where(p["flip"].reshape(-1, *[1] * (y.ndim - 1)) > 0, y[..., swap], y)

        x, seen, fields = mirrored(x), mirrored(seen), {name: mirrored(y) for name, y in fields.items()}
        x = torch.cat([x[:, :1] * (1 - 2 * p["flip"])[:, None, None, None], x[:, 1:]], 1)
    if "matrix" in p:
        x = torch.einsum("bij,bjtv->bitv", p["matrix"], x)
    if "jitter" in p:
        chosen = p["jitter"][:, None, None] > 0
        x = torch.where(chosen, torch.einsum("bij,bjtv->bitv", p["spoil"], x), x)
        seen = seen & ~(chosen & (p["gone"][:, None, None, None] > 0))
    if "noise_key" in p:
        x = x + settings.noise * Rng(p["noise_key"]).normal("noise", *x.shape[1:])
    if settings.show == "bone":
        parent = across(layout.parent)
        x, seen = x - x[..., parent], seen & seen[..., parent]
    elif settings.show == "motion":  # the last frame has none
        x, seen = (torch.cat([y, torch.zeros_like(y[:, :, :1])], 2) for y in (x.diff(dim=2), seen[:, :, 1:] & seen[:, :, :-1]))
    return replace(view, array=x.masked_fill(~seen, 0), weight=seen.float(), fields=fields)
