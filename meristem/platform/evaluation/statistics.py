"""Uncertainty over subjects: bootstrap intervals, paired exchange tests, correction for several comparisons.

A statistic is a function of subject weights (R, n) -> (R,): a resample is a row of counts, leaving a subject out is a row with
a zero. Cases of one subject share its weight, so the patient stays the unit, for means and for set metrics such as AUROC alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, t

Array = NDArray[Any]
Statistic = Callable[[Array], Array]

REPLICATES = 2000
_CHUNK = 400_000    # elements of a weight matrix evaluated at once
_LEFT_OUT = 500     # groups of the jackknife: beyond so many subjects, several are left out together


class Estimate(NamedTuple):
    value: float
    low: float
    high: float


def per_subject(values: Array, owner: Array) -> Array:
    """Mean over the cases of each subject. values: (n,). owner: (n,) subject index. Returns (subjects,)."""
    return np.asarray(np.bincount(owner, values) / np.bincount(owner))


def mean_of(values: Array) -> Statistic:
    """The weighted mean of one value per subject (n,)."""
    return lambda weight: weight @ values / weight.sum(1)


def bootstrap(statistic: Statistic, n: int, level: float = 0.95, replicates: int = REPLICATES, seed: int = 0,
              widen: bool = True) -> Estimate:
    """The statistic of n subjects with a two-sided interval at `level`.

    BCa bootstrap (Efron 1987) over subjects. `widen`: the tails are expanded as by Hesterberg (2015), because means of
    resamples of n subjects spread too little, by (n−1)/n, and σ is estimated: α/2 -> Φ(−√(n/(n−1)) t_{α/2, n−1}).
    Rank statistics (AUROC) resample with enough spread and want it off; the tests measure the coverage. Resamples in which the
    statistic is undefined (NaN: a class is missing) are left out. One subject has no interval: (NaN, NaN).
    """
    value = float(statistic(np.ones((1, n)))[0])
    if n < 2 or np.isnan(value):
        return Estimate(value, np.nan, np.nan)
    rng = np.random.default_rng(seed)
    draws = np.concatenate([statistic(w) for w in _resamples(rng, n, replicates)])
    draws = draws[~np.isnan(draws)]
    if not len(draws):
        return Estimate(value, np.nan, np.nan)
    if np.ptp(draws) <= 1e-12 * max(1.0, abs(value)):
        return Estimate(value, value, value)
    below = ((draws < value).mean() + (draws <= value).mean()) / 2
    bias = float(norm.ppf(np.clip(below, 1 / (2 * len(draws)), 1 - 1 / (2 * len(draws)))))
    skew = _acceleration(statistic, n)
    tail = np.sqrt(n / (n - 1)) * t.ppf((1 - level) / 2, n - 1) if widen else norm.ppf((1 - level) / 2)
    z = tail * np.array([1.0, -1.0])
    room = 1 - skew * (bias + z)
    ends = norm.cdf(bias + (bias + z) / np.maximum(room, 1e-6))
    low, high = np.quantile(draws, ends)
    return Estimate(value, float(low), float(high))


def _resamples(rng: np.random.Generator, n: int, replicates: int) -> Iterator[Array]:
    chunk = max(1, _CHUNK // n)
    for start in range(0, replicates, chunk):
        rows = min(chunk, replicates - start)
        drawn = rng.integers(n, size=(rows, n)) + n * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n).astype(float)


def _acceleration(statistic: Statistic, n: int) -> float:
    """Efron's acceleration from the (delete-a-group) jackknife: Σd³ / (6 (Σd²)^{3/2}), d = mean − leave-out value."""
    groups = min(n, _LEFT_OUT)
    mine = np.arange(n) % groups
    rows = max(1, _CHUNK // n)
    left = np.concatenate([statistic((mine[None] != np.arange(a, min(a + rows, groups))[:, None]).astype(float))
                           for a in range(0, groups, rows)])
    d = np.nanmean(left) - left[~np.isnan(left)]
    spread = float((d**2).sum())
    return float((d**3).sum() / (6 * spread**1.5)) if spread > 0 else 0.0


def sign_flip(difference: Array, replicates: int = REPLICATES, seed: int = 0) -> float:
    """Two-sided p of "the paired differences are symmetric about 0". difference: (n,), one per subject.

    All 2ⁿ sign patterns when they are no more than `replicates`, else as many at random, the observed one counted among them.
    """
    flips, exact = _flips(len(difference), replicates, seed)
    drawn = np.abs((1 - 2 * flips) @ difference)
    return _p(drawn, abs(float(difference.sum())), exact)


def exchange(statistic: Callable[[Array], Array], n: int, replicates: int = REPLICATES, seed: int = 0) -> float:
    """Two-sided p of "the two arms are exchangeable within each subject", for differences that are not means of one value.

    statistic: (R, n) bool, which subjects trade their predictions -> (R,) difference of the arms. Same draws as `sign_flip`.
    """
    flips, exact = _flips(n, replicates, seed)
    chunk = max(1, _CHUNK // n)
    drawn = np.concatenate([np.abs(statistic(flips[a:a + chunk])) for a in range(0, len(flips), chunk)])
    observed = abs(float(statistic(np.zeros((1, n), dtype=bool))[0]))
    return _p(drawn[~np.isnan(drawn)], observed, exact)


def _flips(n: int, replicates: int, seed: int) -> tuple[Array, bool]:
    if 2**n <= replicates:
        return (np.arange(2**n)[:, None] >> np.arange(n) & 1).astype(bool), True
    return np.random.default_rng(seed).random((replicates - 1, n)) < 0.5, False


def _p(drawn: Array, observed: float, exact: bool) -> float:
    extreme = int((drawn >= observed * (1 - 1e-9) - 1e-12).sum())
    return extreme / len(drawn) if exact else (extreme + 1) / (len(drawn) + 1)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's (1979) step-down adjusted p values, in the order given."""
    order = np.argsort(p, kind="stable")
    ranked = np.asarray(p, dtype=float)[order] * (len(p) - np.arange(len(p)))
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(ranked), 1.0)
    return [float(x) for x in adjusted]
