"""What the files of one sample say of themselves, for `data check`: measures, properties, doubts; nothing names anybody."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

SEEN = 1 << 16  # elements that percentiles are taken from
SATURATED = 0.25  # share of all elements at the highest value from which one wonders what was cut off


@dataclass(frozen=True)
class Doubt:
    """Something in a sample that can be read, and may yet be wrong. reason: a short fixed word. what: without true names."""

    reason: str
    what: str
    remedy: str


@dataclass
class Facts:
    """numbers: measure, with its unit in brackets -> value; samples that lie far from the others are named. words: property ->
    which of few it has (orientation -> LPS); the rare ones are named.
    """

    numbers: dict[str, float] = field(default_factory=dict)
    words: dict[str, str] = field(default_factory=dict)
    doubts: list[Doubt] = field(default_factory=list)


def intensities(values: np.ndarray) -> Facts:
    """Of raw elements of any shape, all finite: percentiles and the share that has the highest value of all."""
    flat = values.reshape(-1)
    low, middle, high = np.percentile(flat[::max(len(flat) // SEEN, 1)], (1, 50, 99))
    top = float(np.mean(flat == flat.max()))
    facts = Facts({"intensity 1 %": float(low), "intensity 50 %": float(middle), "intensity 99 %": float(high)})
    if flat.min() == flat.max():
        facts.doubts.append(Doubt("constant", "has the same value everywhere", "Export it again, or leave it out."))
    elif top > SATURATED:
        facts.doubts.append(Doubt("saturated", f"{top:.0%} of its elements have its highest value",
                                  "Was it cut at too low a value when it was exported? A white background is harmless."))
    return facts
