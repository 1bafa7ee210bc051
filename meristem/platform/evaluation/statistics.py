"""Uncertainty over subjects and over seeds: intervals, effect sizes, paired exchange tests, corrections, rankings.

A statistic is a function of subject weights (R, n) -> (R,): a resample is a row of counts, leaving a subject out is a row with
a zero. Cases of one subject share its weight, so the patient stays the unit, for means and for set metrics such as AUROC alike.
Of several seeds or arms at once it is (R, n) -> (S, R).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln
from scipy.stats import norm, t

Array = NDArray[Any]
Statistic = Callable[[Array], Array]

REPLICATES = 2000
SEEDS = 3           # fewest of which a spread between runs can be told
_CHUNK = 400_000    # elements of a weight matrix evaluated at once
_LEFT_OUT = 500     # groups of the jackknife: beyond so many subjects, several are left out together


class Estimate(NamedTuple):
    value: float
    low: float
    high: float


class Spread(NamedTuple):
    """What a mean over seeds and subjects is uncertain by.

    interval: over new seeds and new subjects alike. subjects, seeds: standard error that the choice of each leaves in it.
    """

    interval: Estimate
    subjects: float
    seeds: float


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
    Rank statistics (AUROC) resample with enough spread and want it off; the tests measure the coverage: 93 to 97 % from 8
    subjects on, 90 % of 5. Resamples in which the statistic is undefined (NaN: a class is missing) are left out. One subject
    has no interval: (NaN, NaN).
    """
    value = float(statistic(np.ones((1, n)))[0])
    if n < 2 or np.isnan(value):
        return Estimate(value, np.nan, np.nan)
    draws = resampled(statistic, n, replicates, seed)
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


def resampled(statistic: Statistic, n: int, replicates: int = REPLICATES, seed: int = 0) -> Array:
    """(…, R) the statistic of resamples of n subjects; one seed draws the same ones for whatever statistic."""
    return np.concatenate([statistic(w) for w in _resamples(np.random.default_rng(seed), n, replicates)], -1)


def _resamples(rng: np.random.Generator, n: int, replicates: int) -> Iterator[Array]:
    chunk = max(1, _CHUNK // n)
    for start in range(0, replicates, chunk):
        rows = min(chunk, replicates - start)
        drawn = rng.integers(n, size=(rows, n)) + n * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n).astype(float)


def _left_out(statistic: Statistic, n: int) -> Array:
    """(…, groups) the statistic without each subject in turn, or without each of 500 groups of them."""
    groups = min(n, _LEFT_OUT)
    mine = np.arange(n) % groups
    rows = max(1, _CHUNK // n)
    return np.concatenate([statistic((mine[None] != np.arange(a, min(a + rows, groups))[:, None]).astype(float))
                           for a in range(0, groups, rows)], -1)


def _acceleration(statistic: Statistic, n: int) -> float:
    """Efron's acceleration from the (delete-a-group) jackknife: Σd³ / (6 (Σd²)^{3/2}), d = mean − leave-out value."""
    left = _left_out(statistic, n)
    d = np.nanmean(left) - left[~np.isnan(left)]
    spread = float((d**2).sum())
    return float((d**3).sum() / (6 * spread**1.5)) if spread > 0 else 0.0


def crossed(statistic: Statistic, n: int, level: float = 0.95) -> Spread | None:
    """Seeds kept apart from subjects. statistic: (R, n) -> (S, R), of each seed. None for fewer than three seeds.

    Every seed was tested on the same subjects: y_si = μ + seed_s + subject_i + rest_si, of the jackknife's pseudo-values (Tukey
    1958), which are a mean's own values and make a set metric a mean; as readers and cases are kept apart in the evaluation
    of diagnostic tests (Dorfman, Berbaum and Metz 1992). With mean squares A of seeds, B of subjects, E of the rest, S × m
    values: subjects leave the variance B / Sm, seeds max(A − E, 0) / Sm. Each counts in the interval by a t quantile of its own
    degrees of freedom (Howe 1974), since three seeds tell little: it covers 94 to 97 %, and up to 98 % of three seeds
    where both variances are alike. NaN where the statistic needs a subject that is left out.
    """
    each = statistic(np.ones((1, n)))
    seeds = len(each)
    if seeds < SEEDS or n < 2:
        return None
    left = _left_out(statistic, n)
    m = left.shape[1]
    y = m * each - (m - 1) * left
    of_seed, of_subject, mean = y.mean(1, keepdims=True), y.mean(0, keepdims=True), y.mean()
    a = m * ((of_seed - mean) ** 2).sum() / (seeds - 1)
    b = seeds * ((of_subject - mean) ** 2).sum() / (m - 1)
    rest = ((y - of_seed - of_subject + mean) ** 2).sum() / ((seeds - 1) * (m - 1))
    subjects, runs = (np.sqrt(v / (seeds * m)) for v in (b, max(a - rest, 0.0) if not np.isnan(a) else a))
    tail = (1 + level) / 2
    half = np.hypot(t.ppf(tail, m - 1) * subjects, t.ppf(tail, seeds - 1) * runs)
    value = float(each.mean())
    return Spread(Estimate(value, float(value - half), float(value + half)), float(subjects), float(runs))


def standardised(difference: Array) -> Statistic:
    """Hedges' g of paired differences (n,) as a function of subject weights: J · mean / SD.

    J = Γ((n−1)/2) / (√((n−1)/2) Γ((n−2)/2)) takes out the bias of a small sample (Hedges 1981). NaN where all differ alike. Its
    bootstrap interval covers 93 to 97 % from 30 subjects on, but about 91 % where differences are as skewed as an exponential.
    """
    nu = len(difference) - 1
    small = np.exp(gammaln(nu / 2) - gammaln((nu - 1) / 2)) / np.sqrt(nu / 2) if nu > 1 else np.nan

    def g(weight: Array) -> Array:
        total = weight.sum(1)
        mean = weight @ difference / total
        spread = (weight @ (difference - difference.mean())**2 / total - (mean - difference.mean())**2) * total
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(spread > 1e-20, small * mean / np.sqrt(spread / (total - 1)), np.nan)

    return g


def superiority(difference: Array, level: float = 0.95) -> Estimate:
    """Share of subjects with a positive difference (n,), ties counted half: the probability that one fares better.

    Wilson's (1927) interval, which also says something where all are better; with many ties it is wider than need be.
    """
    n, share = len(difference), float(((np.sign(difference) + 1) / 2).mean())
    z2 = float(norm.ppf((1 + level) / 2)) ** 2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = np.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    return Estimate(share, float(max(middle - half, 0.0)), float(min(middle + half, 1.0)))


def rank_shares(values: Array) -> Array:
    """How often each arm takes each place. values: (arms, R), high is better. Returns (arms, places); all sums are 1.

    Arms that are level share the places they take. Draws in which an arm has no value are left out.
    """
    known = values[:, ~np.isnan(values).any(0)]
    better, level = ((f(known[None], known[:, None])).sum(1) for f in (np.greater, np.equal))  # (arms, R); level with itself
    places = np.arange(len(values))[None, :, None]
    taken = (places >= better[:, None]) & (places < (better + level)[:, None])
    return np.asarray((taken / level[:, None]).mean(-1))


def kendall(values: Array, whole: Array) -> float:
    """Kendall's τ-b between each draw's values (arms, R) and those of the whole set (arms,), mean over draws, NaN without."""
    one, two = np.triu_indices(len(whole), 1)
    a, b = np.sign(values[one] - values[two]), np.sign(whole[one] - whole[two])[:, None]
    with np.errstate(invalid="ignore", divide="ignore"):
        tau = (a * b).sum(0) / np.sqrt((a**2).sum(0) * (b**2).sum(0))
    return float(tau[~np.isnan(tau)].mean()) if (~np.isnan(tau)).any() else float("nan")


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
