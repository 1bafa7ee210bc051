"""Which frames a look at a video shows, and how fast they play."""

from __future__ import annotations

import math
from itertools import permutations
from typing import Any

import numpy as np

from meristem.modalities.base import Header, Look
from meristem.modalities.video.options import Rate, VideoViewOptions


def times(header: Header) -> np.ndarray:
    """(T,) seconds at which each frame of the file comes on screen."""
    known = header.source.get("times")
    return np.array(known) if known else np.arange(header.shape[1]) * header.spacing[0]


def duration(header: Header) -> float:
    """Seconds that the file plays: its last frame stays on screen as long as any."""
    return float(times(header)[-1]) + header.spacing[0]


def frames(view: VideoViewOptions, header: Header, look: Look) -> tuple[np.ndarray, float, dict[str, Any]]:
    """The frames of one look (n,), −1 where there is none; seconds between them as the view plays; the pretext labels.

    n is the view's, and one more where it shows differences. The seconds do not tell speed, direction or order.
    """
    n, total = view.size[0] + view.residual, header.shape[1]
    labels, speed = _speed(view, look)
    if view.sample == "uniform":
        clip = (_clip(view, look) + 0.5) / view.grid[0] if view.grid else 0.0
        u = np.full(n, clip) if view.grid else look.rng.uniform("segments", n)[0].double().numpy()
        index = np.minimum(((np.arange(n) + u) * total / n).astype(int), total - 1)
        step = total / n * header.spacing[0]
    elif isinstance(view.sample, Rate):
        shown, step = times(header), 1 / view.sample.fps
        at = np.arange(n) * step * speed
        length = duration(header)
        low, high = _room(look, max(length - (at[-1] + step * speed), 0.0), at[-1], shown)
        at += low + _place(view, look) * (high - low)
        index = _wrapped(at, length, shown, view.short)
    else:
        step = view.sample.stride * header.spacing[0]
        at = np.arange(n) * view.sample.stride * speed
        first, last = map(int, _room(look, max(math.ceil(total - at[-1]) - 1, 0), at[-1], np.arange(total)))
        at += min(first + int(_place(view, look) * (last - first + 1)), last)
        index = _wrapped(at, total, np.arange(total), view.short)
    if view.direction is not None:
        labels["direction"] = int(look.rng.uniform("direction")[0] < view.direction)
        index = index[::-1] if labels["direction"] else index
    if view.order is not None:
        labels["order"] = int(look.rng.integers("order", view.permutations)[0])
        parts = np.split(index[:view.size[0]], view.order)
        index = np.concatenate([*(parts[i] for i in list(permutations(range(view.order)))[labels["order"]]),
                                index[view.size[0]:]])
    if view.turn:
        labels["turn"] = int(look.rng.integers("turn", 4)[0])
    return index, step, labels


def _speed(view: VideoViewOptions, look: Look) -> tuple[dict[str, Any], float]:
    if not view.speed:
        return {}, 1.0
    count = len(view.speed)
    rng = look.rng if view.pace == "own" else look.sample
    which = int(rng.integers("speed", count)[0])
    if view.pace == "other":
        which = (which + 1 + int(look.rng.integers("other speed", count - 1)[0])) % count
    return {"speed": which}, view.speed[which]


def _clip(view: VideoViewOptions, look: Look) -> int:
    return look.number // view.grid[1] if view.grid else 0


def _place(view: VideoViewOptions, look: Look) -> float:
    """Where the look starts, from 0 (the earliest that is possible) to 1 (the latest)."""
    if view.grid is not None:
        return _clip(view, look) / (view.grid[0] - 1) if view.grid[0] > 1 else 0.5
    if view.apart is None:
        return float(look.rng.uniform("start")[0])
    first, u = look.sample.uniform("apart", 2)[0].tolist()
    low, high = (0.0, 1.0) if view.apart == "linear" else view.apart
    if view.apart == "linear":
        u = 1 - (1 - u) ** 0.5  # the inverse of the distribution function of the density 2 (1 − x)
    gap = low + (high - low) * u
    return float((1 - gap) * first + look.number * gap)


def _room(look: Look, latest: float, span: float, shown: np.ndarray) -> tuple[float, float]:
    """The earliest and latest start, of a look that spans so much: any, or such that it shows the frame it is about."""
    if look.about < 0:
        return 0.0, latest
    at = float(shown[look.about])
    return min(max(at - span, 0.0), latest), min(at, latest)


def _wrapped(at: np.ndarray, length: float, shown: np.ndarray, short: str) -> np.ndarray:
    """The frame on screen at each place of a video of that length; shown: where each frame comes on screen."""
    outside = at >= length
    if short == "loop":
        at = np.mod(at, length)
    index = np.searchsorted(shown, at + 1e-6, side="right") - 1
    index = np.clip(index, 0, len(shown) - 1)
    return np.where(outside, -1, index) if short == "pad" else index
