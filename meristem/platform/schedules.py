"""Numbers that change over a run: any scalar of a recipe may be one."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import BeforeValidator

from meristem.modalities.base import Settings


class Ramp(Settings):
    """From `start` to `end` over the first `over` fraction of the run, then constant; cosine or straight."""

    start: float
    end: float
    over: float = 1.0
    shape: str = "cosine"

    def at(self, progress: float) -> float:
        t = min(progress / self.over, 1.0) if self.over > 0 else 1.0
        blend = t if self.shape == "linear" else (1 - math.cos(math.pi * t)) / 2
        return self.start + (self.end - self.start) * blend


def _parse(value: object) -> object:
    if isinstance(value, dict) and len(value) == 1 and next(iter(value)) in ("cosine", "linear"):
        (shape, numbers), = value.items()
        start, end, *over = numbers
        return Ramp(start=start, end=end, over=over[0] if over else 1.0, shape=shape)
    return value


Scalar = Annotated[float | Ramp, BeforeValidator(_parse)]
"""A number, or `{cosine: [start, end]}`, or `{linear: [start, end, fraction of the run]}`."""


def value(x: float | Ramp, progress: float) -> float:
    """The number now; progress in [0, 1]."""
    return x.at(progress) if isinstance(x, Ramp) else x
