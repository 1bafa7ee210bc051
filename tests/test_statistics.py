"""Intervals that cover, tests that hold their level, against closed forms, scipy and brute force."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from meristem.platform.evaluation import metrics
from meristem.platform.evaluation.statistics import bootstrap, exchange, holm, mean_of, per_subject, sign_flip


@pytest.mark.parametrize("draw, truth", [
    (lambda rng: rng.normal(0.3, 1.0, 40), 0.3),
    (lambda rng: rng.beta(8, 2, 40), 0.8),  # skewed to the left, as Dice is
], ids=["normal", "beta"])
def test_interval_of_a_mean_covers(draw: object, truth: float) -> None:
    trials = 1200
    inside = 0
    for i in range(trials):
        estimate = bootstrap(mean_of(draw(np.random.default_rng(i))), 40, replicates=500, seed=i)  # type: ignore[operator]
        inside += estimate.low <= truth <= estimate.high
    assert 0.93 <= inside / trials <= 0.97


def test_interval_of_auroc_covers() -> None:
    trials, inside, shift = 600, 0, 1.2
    truth = stats.norm.cdf(shift / np.sqrt(2))
    for i in range(trials):
        rng = np.random.default_rng(i)
        target = rng.random(60) < 0.5
        score = rng.normal(size=60) + shift * target
        estimate = bootstrap(lambda w, t=target, s=score: metrics.binary_auroc(t, s, w), 60,
                             replicates=400, seed=i, widen=False)
        inside += estimate.low <= truth <= estimate.high
    assert 0.93 <= inside / trials <= 0.975


def test_clusters_widen_the_interval_as_theory_says() -> None:
    """Cases of a subject that are copies carry no information: the interval is that of the subjects, not of the cases."""
    rng = np.random.default_rng(0)
    subject_value = rng.normal(size=200)
    owner = np.repeat(np.arange(200), 5)
    cases = subject_value[owner]
    estimate = bootstrap(mean_of(per_subject(cases, owner)), 200)
    half = (estimate.high - estimate.low) / 2
    assert half == pytest.approx(1.97 * subject_value.std(ddof=1) / np.sqrt(200), rel=0.06)
    set_level = bootstrap(lambda w: (w[:, owner] * cases).sum(1) / w[:, owner].sum(1), 200)
    assert set_level == pytest.approx(estimate)


def test_agrees_with_scipy_bca() -> None:
    values = np.random.default_rng(4).gamma(2.0, size=30)
    mine = bootstrap(mean_of(values), 30, replicates=20_000, widen=False)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=20_000, rng=np.random.default_rng(1)).confidence_interval
    assert (mine.low, mine.high) == pytest.approx(tuple(theirs), abs=0.02)


def test_grouped_jackknife_and_chunks_change_little() -> None:
    values = np.random.default_rng(1).exponential(size=1501)
    estimate = bootstrap(mean_of(values), 1501)
    se = values.std(ddof=1) / np.sqrt(1501)
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * se, rel=0.08)


def test_degenerate_samples() -> None:
    assert bootstrap(mean_of(np.full(12, 0.7)), 12) == pytest.approx((0.7, 0.7, 0.7))
    one = bootstrap(mean_of(np.array([0.7])), 1)
    assert one.value == 0.7 and np.isnan(one.low)
    target, score = np.zeros(5, bool), np.arange(5.0)
    assert np.isnan(bootstrap(lambda w: metrics.binary_auroc(target, score, w), 5).value)


def test_same_seed_same_interval() -> None:
    f = mean_of(np.random.default_rng(0).normal(size=25))
    assert bootstrap(f, 25, seed=3) == bootstrap(f, 25, seed=3) != bootstrap(f, 25, seed=4)


def test_sign_flip_equals_enumeration() -> None:
    d = np.random.default_rng(2).normal(0.4, 1.0, 9)
    patterns = [abs(sum(s * x for s, x in zip(signs, d, strict=True))) for signs in product((1, -1), repeat=9)]
    assert sign_flip(d) == pytest.approx(np.mean([x >= abs(d.sum()) - 1e-12 for x in patterns]))
    assert exchange(lambda flips: ((1 - 2 * flips) * d).mean(1), 9) == pytest.approx(sign_flip(d))


def test_sign_flip_holds_its_level_and_finds_effects() -> None:
    null = [sign_flip(np.random.default_rng(i).normal(size=25), replicates=300, seed=i) for i in range(800)]
    assert 0.03 <= np.mean(np.array(null) <= 0.05) <= 0.07
    assert sign_flip(np.random.default_rng(0).normal(1.0, 0.5, 40)) == pytest.approx(1 / 2000)


def test_exchange_of_auroc_is_null_for_equal_arms() -> None:
    rng = np.random.default_rng(1)
    target = np.arange(50) % 2 == 1
    good, bad = rng.normal(size=50) + 2.0 * target, rng.normal(size=50)

    def p(a: np.ndarray, b: np.ndarray) -> float:
        area = metrics.binary_auroc
        return exchange(lambda f: area(target, np.where(f, b, a)) - area(target, np.where(f, a, b)), 50)

    assert p(good, bad) < 0.01
    assert p(good, good) == 1.0


def test_holm_worked_example() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == [] and holm([0.2]) == [0.2]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_rejects_what_the_step_down_procedure_rejects(p: list[float]) -> None:
    adjusted = holm(p)
    order, rejected = sorted(range(len(p)), key=p.__getitem__), set()
    for step, i in enumerate(order):
        if p[i] * (len(p) - step) > 0.05:
            break
        rejected.add(i)
    assert {i for i, x in enumerate(adjusted) if x <= 0.05} == rejected
