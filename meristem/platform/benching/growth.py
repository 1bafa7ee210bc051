"""How a cost grows with the number of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import linregress

ATTENTION = 2.0  # exponent of attention between all tokens
SETTLED = 2.0  # a cost of so many times the smallest one is no longer mostly what every step costs
UNSURE = 0.25  # a larger standard error than this says that the measurement was disturbed
FEWEST = 3  # points that a line is fitted to


@dataclass(frozen=True)
class Exponent:
    """Cost ∝ tokens^value. error: its standard error. points: of the largest sizes that it was fitted to. factor: cost of one
    token on the fitted line.
    """

    value: float
    error: float
    points: int
    factor: float

    @property
    def sure(self) -> bool:
        return self.error <= UNSURE

    @property
    def worse(self) -> bool:
        """Than attention's own, by more than the error."""
        return self.value > ATTENTION + self.error


def exponent(tokens: Sequence[float], cost: Sequence[float]) -> Exponent | None:
    """The slope of log cost on log tokens by least squares, over the sizes from which on the cost is at least SETTLED times the
    smallest one's, below which it is mostly overhead; at least over the FEWEST largest. None where there are fewer.
    """
    order = np.argsort(tokens)
    n, y = np.array(tokens, float)[order], np.array(cost, float)[order]
    if len(n) < FEWEST or y.min() <= 0:
        return None
    below = np.flatnonzero(y < SETTLED * y.min())
    first = min(int(below[-1]) + 1, len(n) - FEWEST)
    line = linregress(np.log(n[first:]), np.log(y[first:]))
    return Exponent(float(line.slope), float(line.stderr), len(n) - first, float(np.exp(line.intercept)))
