"""How a view of a cloud is drawn, and what is done to a batch of them on its device."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from meristem.modalities.base import Draw, Header, Look, View
from meristem.modalities.points.options import PointsViewOptions
from meristem.modalities.rng import Rng
from meristem.modalities.stream import gather


def draw(view: PointsViewOptions, header: Header, look: Look) -> Draw:
    """Which points, and every number of the augmentation; a plain view has no params.

    kept: points left by the crop about the point at `centre` (a share of them), left: and by dropping; flip (2,) ±1, rotate
    (3,) axis × angle in radians, zoom, move (3,) in the view's unit, key of the point-wise noise.
    """
    whole = header.shape[1]
    n = min(view.size[0], whole)
    rng = look.rng
    even = view.take == "even"
    index = np.linspace(0, whole - 1, n).round().astype(int) if even else rng.permutation("points", whole)[0, :n].numpy()
    if even and view == view.plain():
        return Draw((0,), (whole,), (n,), {}, tuple(index.tolist()))

    def one(purpose: str, low: float, high: float) -> float:
        return float(rng.uniform(purpose, low=low, high=high))

    kept = max(round(n * one("crop", *view.crop)), 1)
    axis = np.array([0.0, 0.0, 1.0]) if view.axis == "z" else rng.normal("axis", 3)[0].double().numpy()
    turn = axis / max(float(np.linalg.norm(axis)), 1e-12) * one("rotate", -view.rotate, view.rotate) * math.pi / 180
    params: dict[str, Any] = {
        "kept": kept, "left": max(round(kept * (1 - one("drop", *view.drop))), 1), "centre": one("centre", 0, 1),
        "flip": tuple(-1.0 if one(f"flip {a}", 0, 1) < p else 1.0 for a, p in zip("xy", view.flip, strict=True)),
        "rotate": tuple(turn.tolist()), "zoom": one("scale", *view.scale),
        "move": tuple(rng.uniform("shift", 3, low=-view.shift, high=view.shift)[0].tolist()),
        "key": int(rng.bits("noise", 1))}
    return Draw((0,), (whole,), (n,), params, tuple(index.tolist()))


def augment(view: View, settings: PointsViewOptions, normals: slice | None) -> View:
    """What `draw` decided, each row by its own params; rows that lose points are shortened, padded to the longest.

    normals: channels that turn with the cloud.
    """
    if "zoom" not in view.params:
        return replace(view, array=view.array.float())
    view = _left(replace(view, array=view.array.float()))
    p, live = view.params, alive(view)
    turn = rotation(p["rotate"]) * torch.cat([p["flip"], torch.ones_like(p["flip"][:, :1])], 1)[:, None]  # flip, then rotate
    zoom, move = p["zoom"][:, None, None], p["move"][..., None]
    array = view.array.clone()
    xyz = apply(turn, array[:, :3]) * zoom + move
    if settings.jitter:
        noise = Rng(p["key"]).normal("jitter", live.shape[1], 3).transpose(1, 2) * settings.jitter
        xyz = xyz + noise.clamp(-2 * settings.jitter, 2 * settings.jitter)
    array[:, :3] = torch.where(live[:, None], xyz, array[:, :3])
    if normals is not None:
        array[:, normals] = apply(turn, array[:, normals])
    back = torch.eye(4, device=array.device).repeat(len(array), 1, 1)
    back[:, :3, :3] = turn.transpose(1, 2) / zoom
    back[:, :3, 3] = -apply(back[:, :3, :3], move)[..., 0]
    return replace(view, array=array, frame=view.frame.compose(back))


def alive(view: View) -> Tensor:
    """(B, N) bool: no padding."""
    return torch.ones_like(view.array[:, 0], dtype=torch.bool) if view.weight is None else view.weight[:, 0] > 0


def apply(matrix: Tensor, x: Tensor) -> Tensor:
    """(B, 3, 3) on (B, 3, N): summed in one order whatever N is, so that a row does not depend on how it is padded."""
    return matrix[:, :, :1] * x[:, :1] + matrix[:, :, 1:2] * x[:, 1:2] + matrix[:, :, 2:] * x[:, 2:]


def rotation(vector: Tensor) -> Tensor:
    """Axis × angle (B, 3) to matrices (B, 3, 3) (Rodrigues)."""
    angle = vector.square().sum(-1).sqrt()[:, None, None]
    x, y, z = (vector / angle[:, 0].clamp_min(1e-12)).unbind(-1)
    o = torch.zeros_like(x)
    cross = torch.stack([o, -z, y, z, o, -x, -y, x, o], -1).unflatten(-1, (3, 3))
    return torch.eye(3, device=vector.device) + angle.sin() * cross + (1 - angle.cos()) * (cross @ cross)


def _left(view: View) -> View:
    """Without the points that crop and drop leave out, the others in their order at the front."""
    p, live = view.params, alive(view)
    count = live.sum(1)
    if bool((p["left"] >= count).all()):
        return view
    here = torch.arange(len(live), device=live.device)
    centre = view.array[here, :3, (p["centre"] * count).long().clamp_max(count - 1)]
    distance = (view.array[:, :3] - centre[..., None]).square().sum(1).masked_fill(~live, torch.inf)
    kept = _rank(distance) < p["kept"][:, None]
    chance = Rng(p["key"]).uniform("drop", live.shape[1]).masked_fill(~(kept & live), torch.inf)
    left = _rank(chance) < torch.minimum(p["left"], count)[:, None]
    order = (~left).long().argsort(dim=1, stable=True)[:, :int(p["left"].max())]
    here = gather(left, order)
    index = None if view.index is None else gather(view.index, order).masked_fill(~here, -1)
    fields = {name: gather(x, order).masked_fill(~here, -1) for name, x in view.fields.items()}
    array = gather(view.array.transpose(1, 2), order).transpose(1, 2) * here[:, None]
    weight = None if view.weight is None else gather(view.weight[:, 0], order)[:, None]
    if not bool(here.all()):
        weight = (torch.ones_like(array[:, :1]) if weight is None else weight) * here[:, None]
    return replace(view, array=array, index=index, fields=fields, weight=weight,
                   frame=replace(view.frame, shape=(order.shape[1],)))


def _rank(x: Tensor) -> Tensor:
    """(B, N) place of every number among its row's, the earlier first where they are equal."""
    return x.argsort(dim=1, stable=True).argsort(dim=1)
