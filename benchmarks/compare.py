"""What every comparison prints: one JSON line of ours, theirs, their ratio and its spread.

Ours and the peer take turns in one run (`timing.turns`, `programs.turns`), so that a busy machine slows both; the ratio is the
median of the paired ratios ours / theirs, the spread their least and greatest. A target is a bound on the ratio.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from typing import Any


def compare(name: str, peer: str, unit: str, ours: Sequence[float], theirs: Sequence[float], *, target: str = "",
            **more: Any) -> dict[str, Any]:
    """Print and return the line of one comparison.

    name: what was done. peer: who else did it, with the version. unit: of both figures. ours, theirs: a figure of each repeat,
    paired. target: `<= 0.87` or `>= 2`, where one is set. more: whatever else tells how the work was done.
    """
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    ratio = statistics.median(ratios)
    line = {"name": name, "peer": peer, "unit": unit, "ours": _short(statistics.median(ours)),
            "theirs": _short(statistics.median(theirs)), "ratio": _short(ratio),
            "spread": [_short(min(ratios)), _short(max(ratios))], "repeats": len(ratios)}
    if target:
        line |= {"target": target, "met": within(ratio, target)}
    return _print(line | more)


def cannot(name: str, peer: str, why: str) -> dict[str, Any]:
    """Print and return the line of a peer that cannot do the work, or did not come through it."""
    return _print({"name": name, "peer": peer, "cannot": why})


def within(ratio: float, target: str) -> bool:
    sign, bound = target.split()
    return ratio <= float(bound) if sign == "<=" else ratio >= float(bound)


def _short(x: float) -> float:
    """To four significant digits."""
    return float(f"{x:.4g}")


def _print(line: dict[str, Any]) -> dict[str, Any]:
    print(json.dumps(line, ensure_ascii=False), flush=True)
    return line
