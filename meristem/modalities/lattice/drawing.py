"""Draws: which window of a sample is read, and what will be done to it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from meristem.modalities.base import Draw, Header, Look
from meristem.modalities.lattice.intensity import NEUTRAL
from meristem.modalities.lattice.options import LatticeViewOptions
from meristem.modalities.rng import Rng

TRIES = 10  # of an area window, as torchvision


def draw(view: LatticeViewOptions, header: Header, span: tuple[Sequence[float], Sequence[float]], look: Look) -> Draw:
    """One look: a window of the stored lattice and augmentation parameters, each a float32 or int64 array of fixed shape.

    span: black and white per channel, normalised. Parameters exist for the operations the options name; an operation that
    was not chosen has its neutral value.
    """
    rng = look.rng
    start, size = _tile(view, header, look) if view.tiles else _window(view, header, look)
    shape = tuple(n + 2 * view.margin for n in view.size)
    params: dict[str, Any] = {"pad": header.pad, "black": span[0], "white": span[1]}
    params |= _geometry(view, rng) | _intensity(view, rng)
    arrays = {k: np.asarray(v, np.int64 if k.endswith("_key") else np.float32) for k, v in params.items()}
    return Draw(start, size, shape, arrays)


def _window(view: LatticeViewOptions, header: Header, look: Look) -> tuple[tuple[int, ...], tuple[int, ...]]:
    rng, middle = look.rng, look.centre
    whole, want = np.array(header.shape[1:]), np.array(view.size)
    dims = len(want)
    u = rng.uniform("window", 3 + dims)[0].double().numpy()
    place = u[3:]
    if view.window == "crop":
        size = want * (view.zoom[0] + (view.zoom[1] - view.zoom[0]) * u[0])
    elif view.window == "area":
        size = _area(view, whole, rng)
    elif view.window == "whole":
        size, place = want, np.full(dims, 0.5)
    else:
        ratio = whole / want
        size, place = want * (ratio.min() if view.window == "cover" else ratio.max()), np.full(dims, 0.5)
    size = np.maximum(np.round(size).astype(int), 1)
    room = whole - size  # negative where the window is the larger: the sample then lies anywhere inside it
    start = np.minimum(room, 0) + np.floor(place * (np.abs(room) + 1)).astype(int)
    if view.window == "crop" and not middle and header.anchors and u[1] < view.foreground:
        middle = header.anchors[min(int(u[2] * len(header.anchors)), len(header.anchors) - 1)]
    if view.window == "crop" and middle:
        start = np.clip(np.array(middle) - size // 2, np.minimum(room, 0), np.maximum(room, 0))
    margin = np.round(view.margin * size / want).astype(int)
    return tuple((start - margin).tolist()), tuple((size + 2 * margin).tolist())


def _tile(view: LatticeViewOptions, header: Header, look: Look) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A window that goes by tiles of the whole sample."""
    whole, grid = np.array(header.shape[1:]), np.array(view.tiles)
    if view.window == "part":
        size = np.maximum(np.round(whole / grid).astype(int), 1)
        start = np.floor(look.rng.uniform("window", len(grid))[0].double().numpy() * (whole - size + 1)).astype(int)
        return tuple(start.tolist()), tuple(size.tolist())
    cell = np.array(np.unravel_index(look.number, view.tiles))
    start, stop = (np.round((cell + k) * whole / grid).astype(int) for k in (0, 1))
    size = np.maximum(stop - start, 1)
    if view.window == "slice":  # the same of all views: what they show differs by augmentation only
        place = look.sample.fork("slice").uniform(str(look.number), len(grid))[0].double().numpy()
        start, size = (np.where(grid > 1, a, b) for a, b in ((start + np.floor(place * size).astype(int), start), (1, size)))
    return tuple(start.tolist()), tuple(size.tolist())


def _area(view: LatticeViewOptions, whole: np.ndarray, rng: Rng) -> np.ndarray:
    """Sides of an area window: the first of some tries that fits, else the last try cut to the sample."""
    want = np.array(view.size)
    dims = len(want)
    u = rng.uniform("area", TRIES, dims)[0].double().numpy()
    fraction = view.area[0] + (view.area[1] - view.area[0]) * u[:, 0]
    low, high = (math.log(a) for a in view.aspect)
    stretch = np.concatenate([low + (high - low) * u[:, 1:], np.zeros((TRIES, 1))], 1)
    stretch -= stretch.mean(1, keepdims=True)
    base = (fraction * whole.prod() / want.prod()) ** (1 / dims)
    sides = want * base[:, None] * np.exp(stretch)
    fits = np.flatnonzero((np.round(sides) <= whole).all(1))
    return sides[fits[0]] if len(fits) else np.minimum(sides[-1], whole)


def _geometry(view: LatticeViewOptions, rng: Rng) -> dict[str, Any]:
    dims = len(view.size)
    params: dict[str, Any] = {}
    if any(view.flip):
        params["flip"] = rng.uniform("flip", dims)[0] < torch.tensor(view.flip)
    if view.affine is not None:
        a, turns = view.affine, 3 if dims == 3 else 1
        u = rng.uniform("affine", 2 + turns + dims + dims * (dims - 1) // 2)[0].double().numpy()
        signed = 2 * u - 1
        on = float(u[0] < a.probability)
        params["zoom"] = 1 + on * (a.zoom[0] + (a.zoom[1] - a.zoom[0]) * u[1] - 1)
        params["rotate"] = on * np.array(a.rotate) * signed[2:2 + turns]
        params["shift"] = on * np.array(a.shift) * signed[2 + turns:2 + turns + dims]
        params["shear"] = on * a.shear * signed[2 + turns + dims:]
    if view.elastic is not None:
        e = view.elastic
        on, size = rng.uniform("elastic", 2)[0].tolist()
        params["elastic"] = (e.amplitude[0] + (e.amplitude[1] - e.amplitude[0]) * size) * (on < e.probability)
        params["elastic_key"] = rng.fork("elastic").key[0]
    return params


def _intensity(view: LatticeViewOptions, rng: Rng) -> dict[str, Any]:
    params: dict[str, Any] = {}
    if not any(getattr(view, name) for name in NEUTRAL):
        return params
    draws = rng.uniform("intensity", len(NEUTRAL), 2)[0].tolist()
    for (name, neutral), (on, at) in zip(NEUTRAL.items(), draws, strict=True):
        chance = getattr(view, name)
        if isinstance(chance, float):
            if chance > 0:
                params[name] = float(on < chance)
        elif chance is not None:
            low, high = chance.range
            params[name] = low + (high - low) * at if on < chance.probability else neutral
    if "noise" in params:
        params["noise_key"] = rng.fork("noise").key[0]
    return params
