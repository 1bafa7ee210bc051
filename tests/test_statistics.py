"""Intervals that cover, tests that hold their level, against closed forms, scipy and brute force."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from meristem.platform.evaluation import metrics
from meristem.platform.evaluation.statistics import (
    Estimate,
    bootstrap,
    crossed,
    exchange,
    holm,
    kendall,
    mean_of,
    per_subject,
    rank_shares,
    resampled,
    sign_flip,
    standardised,
    superiority,
)


def covered(made: Callable[[np.random.Generator, int], Estimate], truth: float, trials: int) -> float:
    """Share of seeded trials whose interval holds the truth. Of 1000 whose intervals cover 95 % it is within 93 to 97 %."""
    found = (made(np.random.default_rng(i), i) for i in range(trials))
    return float(np.mean([e.low <= truth <= e.high for e in found]))


@pytest.mark.parametrize("draw, truth", [
    (lambda rng: rng.normal(0.3, 1.0, 40), 0.3),
    (lambda rng: rng.beta(8, 2, 40), 0.8),  # skewed to the left, as Dice is
    (lambda rng: rng.beta(8, 2, 8), 0.8),   # a small subgroup
], ids=["normal", "beta", "subgroup"])
def test_interval_of_a_mean_covers(draw: Callable[[np.random.Generator], np.ndarray], truth: float) -> None:
    def made(rng: np.random.Generator, i: int) -> Estimate:
        values = draw(rng)
        return bootstrap(mean_of(values), len(values), replicates=500, seed=i)

    assert 0.93 <= covered(made, truth, 1200) <= 0.97


def test_intervals_of_few_subjects_cover_less() -> None:
    """As the page says of subgroups that are just large enough to be told of."""
    def made(rng: np.random.Generator, i: int) -> Estimate:
        return bootstrap(mean_of(rng.normal(size=5)), 5, replicates=400, seed=i)

    assert 0.88 <= covered(made, 0.0, 800) <= 0.93


def test_interval_of_a_paired_difference_covers_with_several_cases_a_subject() -> None:
    owner = np.repeat(np.arange(36), 3)

    def made(rng: np.random.Generator, i: int) -> Estimate:
        shared = rng.normal(size=36)[owner]  # how hard a subject is, for both arms
        gain = 0.2 + 0.5 * rng.normal(size=36)[owner]
        one, two = (per_subject(shared + g + 0.5 * rng.normal(size=108), owner) for g in (gain, 0.0))
        return bootstrap(lambda w: mean_of(one)(w) - mean_of(two)(w), 36, replicates=400, seed=i)

    assert 0.93 <= covered(made, 0.2, 1000) <= 0.97


def test_interval_of_auroc_covers() -> None:
    def made(rng: np.random.Generator, i: int) -> Estimate:
        target = rng.random(60) < 0.5
        score = rng.normal(size=60) + 1.2 * target
        return bootstrap(lambda w: metrics.binary_auroc(target, score, w), 60, replicates=400, seed=i, widen=False)

    assert 0.93 <= covered(made, stats.norm.cdf(1.2 / np.sqrt(2)), 800) <= 0.97


def test_interval_of_a_difference_of_areas_covers_with_two_images_a_subject() -> None:
    owner = np.repeat(np.arange(40), 2)

    def made(rng: np.random.Generator, i: int) -> Estimate:
        target, shared = np.repeat(rng.random(40) < 0.4, 2), np.repeat(rng.normal(size=40), 2)
        one, two = (skill * target + shared + rng.normal(size=80) for skill in (1.5, 0.8))
        area = metrics.binary_auroc
        return bootstrap(lambda w: area(target, one, w[:, owner]) - area(target, two, w[:, owner]), 40, replicates=300, seed=i,
                         widen=False)

    assert 0.93 <= covered(made, stats.norm.cdf(1.5 / 2) - stats.norm.cdf(0.8 / 2), 500) <= 0.97


def test_interval_of_a_ratio_of_sums_covers() -> None:
    """As of the mIoU of a set: sizes differ from case to case, and two classes are averaged."""
    def made(rng: np.random.Generator, i: int) -> Estimate:
        union = 20 + 100 * rng.gamma(2, size=(40, 2))
        inter = union * rng.beta([8, 6], [3, 2], (40, 2))
        return bootstrap(lambda w: metrics.ratio(w @ inter, w @ union), 40, replicates=400, seed=i)

    assert 0.93 <= covered(made, (8 / 11 + 6 / 8) / 2, 1000) <= 0.97


@pytest.mark.parametrize("draw, truth", [
    (lambda rng: rng.normal(0.5, 1.0, 40), 0.5),
    (lambda rng: rng.beta(8, 2, 40) - rng.beta(6, 2, 40), 0.05 / np.sqrt(16 / 1100 + 12 / 576)),  # of two Dice
    (lambda rng: 0.3 + rng.standard_t(5, 40), 0.3 / np.sqrt(5 / 3)),
], ids=["normal", "beta", "heavy tails"])
def test_interval_of_an_effect_size_covers(draw: Callable[[np.random.Generator], np.ndarray], truth: float) -> None:
    assert 0.93 <= covered(lambda rng, i: bootstrap(standardised(draw(rng)), 40, replicates=500, seed=i), truth, 1000) <= 0.97


def test_effect_size_is_unbiased_and_hedges() -> None:
    values = np.random.default_rng(0).normal(0.8, 1.0, (40_000, 6))
    found = [standardised(v)(np.ones((1, 6)))[0] for v in values[:8000]]
    assert np.mean(found) == pytest.approx(0.8, abs=0.02)  # without the correction 0.95
    v = values[0]
    assert found[0] == pytest.approx(v.mean() / v.std(ddof=1) * (1 - 3 / (4 * 5 - 1)), rel=2e-3)
    assert np.isnan(standardised(np.ones(5))(np.ones((1, 5)))[0])


@pytest.mark.parametrize("share", [0.5, 0.8])
def test_share_of_subjects_that_are_better_covers(share: float) -> None:
    assert 0.93 <= covered(lambda rng, i: superiority(rng.random(42) - 1 + share), share, 4000) <= 0.97


def test_share_of_subjects_counts_ties_half_and_all_is_not_certain() -> None:
    assert superiority(np.array([1.0, 0.0, -1.0, 2.0])).value == pytest.approx(0.625)
    everyone = superiority(np.ones(20))
    assert everyone.value == everyone.high == 1.0 and 0.8 < everyone.low < 0.9
    few = stats.binomtest(13, 20).proportion_ci(method="wilson")
    assert superiority(np.where(np.arange(20) < 13, 1.0, -1.0))[1:] == pytest.approx((few.low, few.high))


# ---- seeds beside subjects

def runs(rng: np.random.Generator, seeds: int, of_seed: float, rest: float, n: int = 40) -> np.ndarray:
    """(seeds, n) values of the same subjects by several training runs; subjects differ with standard deviation 1."""
    return of_seed * rng.normal(size=(seeds, 1)) + rng.normal(size=n) + rest * rng.normal(size=(seeds, n))


def each(values: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    return lambda w: values @ w.T / w.sum(1)


@pytest.mark.parametrize("of_seed", [0.0, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("rest", [0.3, 1.0])
@pytest.mark.parametrize("seeds", [3, 5])
def test_interval_over_seeds_and_subjects_covers(seeds: int, of_seed: float, rest: float) -> None:
    def made(rng: np.random.Generator, i: int) -> Estimate:
        spread = crossed(each(runs(rng, seeds, of_seed, rest)), 40)
        assert spread is not None
        return spread.interval

    # three seeds whose variance is like that of the subjects: wider than need be
    assert 0.93 <= covered(made, 0.0, 1000) <= (0.98 if seeds == 3 and 0 < of_seed < 1 else 0.97)


def test_interval_over_subjects_alone_says_nothing_of_other_seeds() -> None:
    def made(rng: np.random.Generator, i: int) -> Estimate:
        return bootstrap(mean_of(runs(rng, 5, 0.3, 0.3).mean(0)), 40, replicates=200, seed=i)

    assert covered(made, 0.0, 300) < 0.87


def test_interval_of_auroc_over_seeds_and_subjects_covers() -> None:
    target = np.arange(45) % 3 == 0
    skills = 1.2 + 0.3 * np.random.default_rng(0).normal(size=100_000)

    def made(rng: np.random.Generator, i: int) -> Estimate:
        scores = (1.2 + 0.3 * rng.normal(size=(5, 1))) * target + rng.normal(size=45) + 0.7 * rng.normal(size=(5, 45))
        spread = crossed(lambda w: np.stack([metrics.binary_auroc(target, s, w) for s in scores]), 45)
        assert spread is not None
        return spread.interval

    assert 0.93 <= covered(made, stats.norm.cdf(skills / np.sqrt(2 * 1.49)).mean(), 400) <= 0.97


def test_components_are_those_of_the_analysis_of_variance() -> None:
    rng = np.random.default_rng(0)
    spreads = [crossed(each(runs(rng, 4, 0.3, 0.8)), 40) for _ in range(1500)]
    seeds, subjects = (np.mean([getattr(s, name) ** 2 for s in spreads]) for name in ("seeds", "subjects"))
    assert subjects == pytest.approx(1 / 40 + 0.8**2 / 160, rel=0.03)
    assert seeds == pytest.approx(0.3**2 / 4, rel=0.1)
    alike = crossed(each(np.tile(rng.normal(size=30), (3, 1))), 30)
    assert alike is not None and alike.seeds == pytest.approx(0, abs=1e-9)
    half = stats.t.ppf(0.975, 29) * alike.subjects
    assert alike.interval == pytest.approx((alike.interval.value, alike.interval.value - half, alike.interval.value + half))
    assert crossed(each(rng.normal(size=(2, 30))), 30) is None


# ---- rankings

def test_places_and_orders_equal_those_counted_one_by_one() -> None:
    rng = np.random.default_rng(3)
    values = rng.integers(0, 5, (4, 200)).astype(float)  # with ties
    whole = np.array([3.0, 1.0, 2.0, 2.0])
    shares = np.zeros((4, 4))
    for draw in values.T:
        for arm in range(4):
            places = range(sum(draw > draw[arm]), sum(draw >= draw[arm]))
            shares[arm, places] += 1 / len(places)
    assert rank_shares(values) == pytest.approx(shares / 200)
    assert rank_shares(values).sum(0) == pytest.approx(1) and rank_shares(values).sum(1) == pytest.approx(1)
    told = [stats.kendalltau(draw, whole).statistic for draw in values.T if np.ptp(draw)]
    assert kendall(values, whole) == pytest.approx(np.mean(told))
    values[:, 0] = np.nan
    assert rank_shares(values) == pytest.approx(rank_shares(values[:, 1:]))


def test_ranks_are_unsure_where_arms_are_alike_and_sure_where_not() -> None:
    rng = np.random.default_rng(0)
    subjects = rng.normal(size=50)  # shared by the arms: a ranking resamples the same for all
    values = [subjects + shift + 0.1 * rng.normal(size=50) for shift in (0.0, 0.0, 1.0)]
    shares = rank_shares(np.stack([resampled(mean_of(v), 50, 1000) for v in values]))
    assert shares[2, 0] == 1.0 and 0.05 < shares[0, 1] < 0.95


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
    assert 0.035 <= np.mean(np.array(null) <= 0.05) <= 0.065
    assert sign_flip(np.random.default_rng(0).normal(1.0, 0.5, 40)) == pytest.approx(1 / 2000)


def test_exchange_of_areas_holds_its_level() -> None:
    target, owner = np.arange(60) % 4 < 2, np.arange(60) // 2
    rejected = 0
    for i in range(800):
        rng = np.random.default_rng(i)
        shared = rng.normal(size=30)[owner] + target
        a, b = (stats.rankdata(shared + rng.normal(size=60)) for _ in range(2))
        p = exchange(lambda f, a=a, b=b: metrics.binary_auroc(target, np.where(f[:, owner], b, a))  # type: ignore[misc]
                     - metrics.binary_auroc(target, np.where(f[:, owner], a, b)), 30, 200, i)
        rejected += p <= 0.05
    assert 0.035 <= rejected / 800 <= 0.065


def test_holm_keeps_the_error_of_a_whole_family() -> None:
    plain = corrected = 0
    for i in range(400):
        rng = np.random.default_rng(i)
        values = rng.normal(size=(7, 24))
        p = [sign_flip(arm - values[0], 200, i) for arm in values[1:]]  # six arms against one baseline, nothing to find
        plain += min(p) <= 0.05
        corrected += min(holm(p)) <= 0.05
    assert corrected / 400 <= 0.065 and plain / 400 > 0.12


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
