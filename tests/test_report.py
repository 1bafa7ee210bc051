"""Results, their summary and the page: every number on the page is one of the summary's; the page needs nothing but itself."""

from __future__ import annotations

import base64
import itertools
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from pydantic import create_model

from meristem.errors import MeristemError
from meristem.platform import recipe as recipes
from meristem.platform.assembly import Assembly
from meristem.platform.data.source import open_data
from meristem.platform.evaluation.leakage import audit
from meristem.platform.evaluation.results import (
    SMALL,
    Budget,
    Case,
    Cell,
    Counts,
    Dataset,
    Group,
    Model,
    Results,
    Spent,
    Summary,
    _hidden,
    join,
    summarise,
)
from meristem.platform.evaluation.statistics import bootstrap, crossed, mean_of
from meristem.platform.objectives import Encoded
from meristem.platform.report import about, figures
from meristem.platform.report.figures import Curve
from meristem.platform.report.page import write_report
from meristem.platform.report.pictures import (
    Attention,
    Overlay,
    Pictures,
    Reconstruction,
    Strip,
    pick_cases,
    pick_samples,
    pick_slice,
    sample_groups,
)
from meristem.platform.training import checkpoint
from meristem.platform.training.pretrain import card, reference
from meristem.tasks import pages
from meristem.tasks.base import TaskRecipe
from meristem.tasks.pages import attended
from meristem.tasks.transfer import Entrant

CLASSES = ("anterior", "posterior")
BUDGETS: dict[int | str, int] = {5: 5, 10: 10, "all": 160}


def segmentation(subjects: int = 42, gain: float = 0.03, seeds: tuple[int, ...] = (0, 1, 2)) -> Results:
    """Like a small hippocampus study: the gain shrinks with labels; every seventh subject has two scans."""
    cells = []
    scans = [(f"case-{i:03d}{part}", f"sub-{i:03d}") for i in range(subjects) for part in ("a", "b")[:1 + (i % 7 == 0)]]
    difficulty = np.random.default_rng(0).beta(6, 1.5, len(scans))
    for (labels, n), level, share in zip(BUDGETS.items(), (0.76, 0.81, 0.885), (1.0, 0.5, 0.02), strict=True):
        for arm, init, shift in (("scratch", None, 0.0), ("mae", "9f2c31ab77de", gain * share),
                                 ("simclr", "51d0c4e2f0aa", 0.4 * gain * share)):
            for seed in seeds:
                rng = np.random.default_rng([seed, n, len(arm)])
                cases = []
                for (case, subject), easy in zip(scans, difficulty, strict=True):
                    dice = np.clip(level + shift + 0.12 * (easy - 0.8) + rng.normal(0, [0.012, 0.02], 2), 0, 1)
                    by_class = dict(zip(CLASSES, map(float, dice), strict=True))
                    cases.append(Case(case=case, subject=subject, metrics={
                        "dice": by_class, "hd95": {c: 12 * (1 - d) for c, d in by_class.items()},
                        "nsd": {c: min(1.0, d + 0.1) for c, d in by_class.items()}}))
                cells.append(Cell(arm=arm, init=init, protocol="finetune", labels=labels, labelled_subjects=n, seed=seed,
                                  budget=Budget(steps=1200, batch=8, trainable=4_812_300, seconds=95.0 + 3 * seed),
                                  cases=tuple(cases), encoder="vit3d-small"))
    test = [s for _, s in scans]
    return Results(
        task="hippocampus segmentation", kind="segmentation", metric="dice", classes=CLASSES, tolerance=1.0,
        dataset=Dataset(name="MSD Task04 hippocampus", manifest="b31f90ac22d4", quarantined=1,
                        splits={"train": Counts(subjects=160, cases=160), "val": Counts(subjects=50, cases=50),
                                "test": Counts(subjects=subjects, cases=len(scans))}),
        cells=tuple(cells),
        pretraining={"mae": {"recipe": "volume/mae", "recipe_hash": "0b6e9a1d22cc", "steps": 5000, "subjects": 160,
                             "licence": "CC-BY-SA 4.0"}},
        leakage={"mae": audit(test, test, ["sub-900"], ["x"]), "simclr": audit(test, test, ["sub-900", "sub-001"], ["x"])},
        versions={"meristem": "0.1.0", "torch": "2.15.0", "monai": "1.6.1", "numpy": "2.4.6"},
        cost={"pretraining (mae)": "11.2 min on 2 CPU cores", "fine-tuning, 27 runs": "43.6 min on 2 CPU cores",
              "peak memory": "3.1 GB"},
        settings={"volume/mae": {"masking": {"x": {"random": 0.75}}, "train": {"steps": 5000, "lr": 1e-3}}})


def classification(n: int = 90, classes: int = 2, seeds: tuple[int, ...] = (0, 1, 2)) -> Results:
    names = ("normal", "bacterial", "viral", *(f"kind {i}" for i in range(3, classes)))[:classes]
    cells = []
    target = (np.arange(n) * 7 // 3) % classes
    for labels, signal in ((20, 0.9), ("all", 2.0)):
        for arm, init, shift in (("scratch", None, 0.0), ("dino", "77ab90ffcc01", 0.9 if labels == 20 else 0.2)):
            for seed in seeds:
                rng = np.random.default_rng([seed, len(arm), int(10 * signal)])
                logits = rng.normal(size=(n, classes)) + (signal + shift) * np.eye(classes)[target]
                p = np.exp(logits)
                p /= p.sum(1, keepdims=True)
                cases = tuple(Case(case=f"case-{i:03d}", subject=f"sub-{i // 2:03d}", target=int(target[i]),
                                   probabilities=tuple(map(float, p[i]))) for i in range(n))
                cells.append(Cell(arm=arm, init=init, protocol="linear", labels=labels, seed=seed, cases=cases,
                                  labelled_subjects=20 if labels == 20 else 4708, chosen={"C": 0.1},
                                  budget=Budget(steps=0, batch=0, trainable=770, seconds=2.0)))
    return Results(task="chest X-ray pneumonia", kind="classification", metric="auroc", classes=names, unit="px",
                   dataset=Dataset(name="PneumoniaMNIST", manifest="77d1", splits={"test": Counts(subjects=n // 2, cases=n)}),
                   cells=tuple(cells), leakage={"dino": audit(["a"], ["b"], None, None)})


def edited(results: Results, change: Callable[[Cell], Cell | None]) -> Results:
    return results.model_copy(update={"cells": tuple(c for cell in results.cells if (c := change(cell)) is not None)})


@pytest.fixture(scope="module")
def study() -> Results:
    return segmentation()


@pytest.fixture(scope="module")
def summary(study: Results) -> Summary:
    return summarise(study)


# ---- the summary

def by_hand(results: Results, arm: str, labels: int | str, metric: str = "dice") -> dict[str, float]:
    """Subject -> mean over its cases of the mean over seeds and classes; by loops."""
    found: dict[str, dict[str, list[float]]] = {}
    for cell in results.cells:
        if (cell.arm, cell.labels) == (arm, labels):
            for case in cell.cases:
                value = sum(case.metrics[metric].values()) / len(case.metrics[metric])
                found.setdefault(case.subject, {}).setdefault(case.case, []).append(value)
    return {s: float(np.mean([np.mean(v) for v in cases.values()])) for s, cases in sorted(found.items())}


def test_row_is_mean_over_seeds_then_cases_then_subjects(study: Results, summary: Summary) -> None:
    values = by_hand(study, "mae", 5)
    row = summary.row("mae", "finetune", 5)
    assert row is not None
    assert row.mean == pytest.approx(bootstrap(mean_of(np.array(list(values.values()))), len(values)))
    assert row.mean.value == pytest.approx(np.mean(list(values.values())))
    assert (row.subjects, sorted(row.seeds)) == (42, [0, 1, 2])
    assert row.seed_sd == pytest.approx(np.std(list(row.seeds.values()), ddof=1))
    assert np.mean(list(row.seeds.values())) == pytest.approx(row.mean.value)
    assert np.mean([row.classes[c].value for c in CLASSES]) == pytest.approx(row.mean.value)


def test_difference_is_paired_and_direction_is_arm_minus_baseline(study: Results, summary: Summary) -> None:
    a, b = by_hand(study, "mae", 5), by_hand(study, "scratch", 5)
    d = np.array([a[s] - b[s] for s in a])
    c = next(c for c in summary.comparisons if (c.arm, c.labels, c.metric) == ("mae", 5, "dice"))
    assert c.difference.value == pytest.approx(d.mean())
    half = 2.02 * d.std(ddof=1) / np.sqrt(len(d))
    assert c.difference.high - c.difference.low == pytest.approx(2 * half, rel=0.2)
    assert c.p is not None and c.p_holm is not None and c.p <= c.p_holm < 0.05
    assert (c.seeds, c.subjects, c.equal_budget) == (3, 42, True)


def test_holm_runs_over_all_primary_comparisons(summary: Summary) -> None:
    primary = summary.primary()
    assert len(primary) == 6  # two arms, three budgets
    smallest = min(primary, key=lambda c: c.p or 0)
    assert smallest.p_holm == pytest.approx(6 * (smallest.p or 0))
    assert all(c.p is None and c.p_holm is None for c in summary.comparisons if c.metric != "dice")


def test_verdict_states_gain_interval_seeds_and_subjects(summary: Summary) -> None:
    c = next(c for c in summary.primary() if (c.arm, c.labels) == ("mae", 5))
    text = next(v for v in summary.verdict if "mae" in v)
    value, low, high = c.difference
    assert text.startswith(f"At 5 labelled subjects mae pretraining adds +{value:.3f} Dice [+{low:.3f}, +{high:.3f}] over "
                           "scratch (3 seeds, 42 test subjects). At 10 it adds +0.0")
    assert "; at all 160 it makes no clear difference, −0.0" in text  # the budget without a gain is not left out


def test_no_gain_and_harm_are_said() -> None:
    small = {"subjects": 24, "seeds": (0, 1)}
    none = summarise(segmentation(gain=0.0, **small), replicates=400)  # type: ignore[arg-type]
    assert "adds" not in none.verdict[0] and "no clear difference" in none.verdict[0]
    harm = summarise(segmentation(gain=-0.05, **small), replicates=400)  # type: ignore[arg-type]
    assert "pretraining harms, −0.0" in harm.verdict[0] and "adds" not in harm.verdict[0]
    assert any("Fewer than three seeds" in w for w in none.warnings)


def test_lower_is_better_turns_the_verdict_not_the_number(study: Results) -> None:
    s = summarise(study.model_copy(update={"metric": "hd95"}), replicates=400)
    assert "pretraining gains −0." in s.verdict[0]


def test_unequal_budgets_are_found(study: Results) -> None:
    assert not any("unequal" in w for w in summarise(study, replicates=100).warnings)
    longer = edited(study, lambda c: c.model_copy(update={"budget": c.budget.model_copy(update={"steps": 2400})})
                    if c.arm == "mae" and c.labels == 5 else c)
    s = summarise(longer, replicates=100)
    assert [w for w in s.warnings if "optimiser steps (2400 against 1200)" in w and "mae" in w and "5 labelled" in w]
    assert {(c.arm, c.labels) for c in s.comparisons if not c.equal_budget} == {("mae", 5)}
    others = edited(study, lambda c: c.model_copy(update={"drawn": "a" if c.arm == "mae" and c.seed == 1 else "b"}))
    said = [w for w in summarise(others, replicates=50).warnings if "unequal budgets" in w]
    assert len(said) == 3 and all("labelled subjects of other draws" in w and "mae" in w for w in said)


def test_missing_seed_case_or_baseline_is_a_warning_and_pairs_stay_paired(study: Results) -> None:
    fewer = edited(study, lambda c: None if c.arm == "scratch" and c.labels == 5 and c.seed == 2 else c)
    s = summarise(fewer, replicates=100)
    assert any("same seeds" in w for w in s.warnings)
    assert next(c for c in s.comparisons if (c.arm, c.labels) == ("mae", 5)).seeds == 2
    short = edited(study, lambda c: c.model_copy(update={"cases": c.cases[2:]}) if c.arm == "mae" else c)
    s = summarise(short, replicates=100)
    assert any("different cases" in w for w in s.warnings)
    assert next(c for c in s.comparisons if c.arm == "mae").subjects == 41  # the first subject's two scans are gone
    alone = summarise(edited(study, lambda c: None if c.arm == "scratch" else c), replicates=100)
    assert alone.comparisons == () and "nothing can be said" in alone.verdict[0]


def test_two_subjects_for_one_case_are_refused(study: Results) -> None:
    odd = edited(study, lambda c: c.model_copy(update={"cases": (c.cases[0].model_copy(update={"subject": "sub-zzz"}),
                                                                 *c.cases[1:])}) if c.arm == "mae" else c)
    with pytest.raises(MeristemError, match="another subject"):
        summarise(odd, replicates=100)


@pytest.mark.parametrize("classes", [2, 3])
def test_classification_summary_is_the_set_metric_of_each_seed(classes: int) -> None:
    from sklearn.metrics import roc_auc_score

    results = classification(classes=classes)
    s = summarise(results, replicates=200)
    expected = []
    for cell in (c for c in results.cells if (c.arm, c.labels) == ("dino", 20)):
        p = np.array([case.probabilities for case in cell.cases])
        y = [case.target for case in cell.cases]
        expected.append(roc_auc_score(y, p[:, 1]) if classes == 2 else roc_auc_score(y, p, multi_class="ovr"))
    row = s.row("dino", "linear", 20)
    assert row is not None and row.mean.value == pytest.approx(np.mean(expected))
    assert list(row.seeds.values()) == pytest.approx(expected)
    assert row.mean.low < row.mean.value < row.mean.high and row.subjects == 45
    assert set(row.classes) == (set(results.classes) if classes > 2 else set())
    c = next(c for c in s.primary() if c.labels == 20)
    assert c.difference.low > 0 and c.p is not None and c.p < 0.01
    assert s.row("dino", "linear", 20, "brier") is not None


@pytest.mark.parametrize(("classes", "metric", "shown"), [(30, "accuracy", True), (31, "accuracy", False), (31, "auroc", True)])
def test_of_many_classes_areas_under_curves_are_shown_only_if_they_are_the_headline(classes: int, metric: str,
                                                                                    shown: bool) -> None:
    results = classification(n=40, classes=classes, seeds=(0,)).model_copy(update={"metric": metric})
    assert ("auroc" in {row.metric for row in summarise(results, replicates=3).rows}) == shown


def test_auroc_interval_resamples_subjects_with_all_their_images() -> None:
    results = classification(n=60)
    group = Group.of([c for c in results.cells if (c.arm, c.labels) == ("dino", 20)], results.classes)
    weight = np.zeros((1, 30))
    weight[0, :10] = 2
    keep = np.isin(group.owner, range(10))
    from meristem.platform.evaluation.metrics import auroc
    assert group.target is not None and group.probabilities is not None
    expected = auroc(group.target[keep], group.probabilities[:, keep]).mean()
    assert group.statistic("auroc")(weight)[0] == pytest.approx(expected)


# ---- the file

# ---- effect sizes, seeds, rankings, subgroups

def test_effect_size_is_of_the_differences_within_subjects(study: Results, summary: Summary) -> None:
    mae, scratch = by_hand(study, "mae", 10), by_hand(study, "scratch", 10)
    d = np.array([mae[s] - scratch[s] for s in mae])
    c = next(c for c in summary.primary() if (c.arm, c.labels) == ("mae", 10))
    assert c.size is not None and c.better is not None
    assert c.size.value == pytest.approx(d.mean() / d.std(ddof=1) * (1 - 3 / (4 * (len(d) - 1) - 1)), rel=1e-3)
    assert c.size.low < c.size.value < c.size.high and c.better.value == pytest.approx((d > 0).mean())
    distance = next(c for c in summary.comparisons if (c.arm, c.labels, c.metric) == ("mae", 10, "hd95"))
    assert distance.size is not None and distance.size.value < 0, "the sign is that of the difference"
    assert distance.better is not None and distance.better.value > 0.5, "a smaller distance is better"


def test_figures_of_a_whole_set_have_no_effect_size_of_subjects() -> None:
    found = {c.metric: c for c in summarise(classification(n=40), replicates=100).comparisons}
    assert found["auroc"].size is None and found["auroc"].better is None
    assert found["accuracy"].size is not None and found["brier"].better is not None


def test_seeds_are_kept_apart_from_subjects(study: Results, summary: Summary) -> None:
    row, c = summary.row("mae", "finetune", 10), next(c for c in summary.primary() if (c.arm, c.labels) == ("mae", 10))
    assert row is not None and row.spread is not None and c.spread is not None
    half = (row.mean.high - row.mean.low) / 2
    assert row.spread.subjects * 2.02 == pytest.approx(half, rel=0.1), "of subjects: the interval that speaks of them alone"
    assert row.spread.interval.value == pytest.approx(row.mean.value)
    # runs that differ by a constant differ by nothing else
    shifted = edited(study, lambda k: k.model_copy(update={"cases": tuple(
        case.model_copy(update={"metrics": {m: {c: v + 0.02 * k.seed * (k.arm == "mae") for c, v in of.items()}
                                            for m, of in case.metrics.items()}}) for case in k.cases)}))
    again = summarise(shifted, replicates=200)
    wider = next(k for k in again.primary() if (k.arm, k.labels) == ("mae", 10))
    assert wider.spread is not None and wider.spread.seeds == pytest.approx(0.02 / np.sqrt(3), rel=0.15)
    assert wider.difference.low > 0 > wider.spread.interval.low
    assert any("not where the seeds too are others: mae, finetune, 5" in w for w in again.warnings)
    two = edited(study, lambda k: k if k.seed < 2 else None)
    assert all(r.spread is None for r in summarise(two, replicates=50).rows)


def test_statistics_by_seed_are_those_of_each_seed_alone(study: Results) -> None:
    for results, metric in ((study, "dice"), (classification(n=60, classes=3), "auroc"), (classification(n=60), "accuracy")):
        cells = [c for c in results.cells if c.arm != "scratch" and c.labels in (10, 20)]
        cells = [c for c in cells if c.arm == cells[0].arm]
        weight = np.random.default_rng(0).integers(0, 3, (7, len({k.subject for k in cells[0].cases}))).astype(float)
        together = results.group(cells).by_seed(metric)(weight)
        for found, cell in zip(together, cells, strict=True):
            assert found == pytest.approx(results.group([cell]).statistic(metric)(weight))
        assert results.group(cells).statistic(metric)(weight) == pytest.approx(together.mean(0))


def test_rankings_count_places_over_the_same_resamples(summary: Summary) -> None:
    few, _, every = summary.rankings
    assert few.arms == ("mae", "simclr", "scratch") and few.by_subject[0][0] == 1.0 and few.tau_subjects == 1.0
    assert every.labels == "all" and 0.05 < max(row[0] for row in every.by_subject) < 1 and every.tau_subjects < 0.9
    for shares in (every.by_subject, every.by_seed):
        assert np.sum(shares, 0) == pytest.approx(1) and np.sum(shares, 1) == pytest.approx(1)
    assert {round(3 * x) / 3 for row in every.by_seed for x in row} == {x for row in every.by_seed for x in row}


def test_where_low_is_good_the_lowest_is_first(study: Results) -> None:
    ranking = summarise(study.model_copy(update={"metric": "hd95"}), replicates=50).rankings[0]
    assert ranking.arms == ("mae", "simclr", "scratch")


def test_two_arms_have_no_ranking(study: Results) -> None:
    assert summarise(edited(study, lambda c: c if c.arm != "mae" else None), replicates=50).rankings == ()


def divided(study: Results, sizes: dict[str, int], trait: str = "site") -> Results:
    """The study with its subjects in groups of these sizes; the rest is not known."""
    values = [value for value, n in sizes.items() for _ in range(n)]
    subjects = sorted({case.subject for case in study.cells[0].cases})
    of = dict(zip(subjects, values, strict=False))
    table = {case.case: of[case.subject] for case in study.cells[0].cases if case.subject in of}
    return study.model_copy(update={"traits": {trait: table}})


def test_a_subgroup_is_what_its_subjects_alone_would_give(study: Results) -> None:
    results = divided(study, {"1": 20, "2": 22})
    first, second = (g for g in summarise(results, replicates=300).subgroups if g.labels == 10)
    assert (first.subjects, second.subjects) == (20, 22)
    own = edited(study, lambda c: c.model_copy(update={"cases": tuple(
        case for case in c.cases if results.traits["site"][case.case] == "2")}))
    alone = summarise(own, replicates=300)
    for arm, mean in second.means.items():
        row = alone.row(arm, "finetune", 10)
        assert row is not None and mean == pytest.approx(row.mean)
    for c in alone.primary():
        if c.labels == 10:
            assert second.differences[c.arm][c.baseline] == pytest.approx(c.difference)


def test_a_subgroup_compares_arms_with_random_weights_of_their_own_network(study: Results) -> None:
    two = edited(divided(study, {"1": 20, "2": 22}), lambda c: c.model_copy(update={"network": "b" * (c.arm == "simclr")}))
    own = edited(two, lambda c: c if c.arm == "scratch" else None)
    cells = (*two.cells, *(c.model_copy(update={"arm": "scratch simclr", "network": "b"}) for c in own.cells))
    first = summarise(two.model_copy(update={"cells": cells}), replicates=50).subgroups[0]
    assert {arm: list(rivals) for arm, rivals in first.differences.items()} == {
        "mae": ["scratch"], "simclr": ["scratch simclr"]}


@pytest.mark.parametrize("sizes, hidden", [
    ({"a": 20, "b": 22}, {}),
    ({"a": 20, "b": 18, "c": 4}, {"c": "few", "b": "others"}),  # 42 − 20 − 18 would tell c
    ({"a": 20, "b": 16, "c": 3, "d": 3}, {"c": "few", "d": "few"}),
    ({"a": 20, "b": 19, "c": 2, "d": 1}, {"c": "few", "d": "few", "b": "others"}),  # three together are few as well
    ({"a": 3, "b": 2}, {"a": "few", "b": "few"}),
])
def test_few_are_not_told_nor_can_be_worked_out(sizes: dict[str, int], hidden: dict[str, str]) -> None:
    assert {value: why for value, why in _hidden(sizes).items() if why} == hidden


def test_hidden_subgroups_say_nothing(study: Results) -> None:
    subgroups = summarise(divided(study, {"1": 20, "2": 13, "3": SMALL}), replicates=50).subgroups  # and four not known
    at = {g.value: g for g in subgroups if g.labels == 5}
    assert list(at) == ["1", "2", "3", ""] and at["1"].subjects == 20 and at["2"].means
    assert (at[""].hidden, at["3"].hidden) == ("few", "others")
    for value in ("3", ""):
        assert at[value].subjects is None and not at[value].means and not at[value].differences
    assert summarise(divided(study, {str(i): 1 for i in range(42)}), replicates=50).subgroups == ()


def test_a_subgroup_that_goes_the_other_way_is_a_warning(study: Results) -> None:
    results = divided(study, {"female": 14, "male": 28}, "sex")

    def turned(cell: Cell) -> Cell:
        if (cell.arm, cell.labels) != ("mae", 5):
            return cell
        return cell.model_copy(update={"cases": tuple(case.model_copy(update={"metrics": {
            m: {c: v - 0.06 for c, v in of.items()} for m, of in case.metrics.items()}})
            if results.traits["sex"][case.case] == "female" else case for case in cell.cases)})

    said = [w for w in summarise(edited(results, turned), replicates=200).warnings if "the other way" in w]
    assert len(said) == 1 and "mae, finetune, 5 labelled subjects: sex female (14 test subjects)" in said[0]
    assert not any("the other way" in w for w in summarise(results, replicates=200).warnings)


def test_the_page_shows_effects_ranks_and_subgroups(study: Results, tmp_path: Path) -> None:
    results = divided(study, {"1": 20, "2": 18})
    page = Page(write_report(results, Pictures(), [], tmp_path))
    summary = summarise(results)
    effects = page.table("effects-finetune")
    assert effects[0][2:] == ["to", "Difference, other seeds too", "Seeds' share", "Effect size g", "Subjects better"]
    c = next(c for c in summary.primary() if (c.arm, c.labels) == ("mae", 5))
    assert c.size is not None and c.better is not None and c.spread is not None
    assert effects[1][:3] == ["5", "mae", "scratch"] and effects[1][5].startswith(f"+{c.size.value:.2f} [")
    assert effects[1][6].startswith(f"{100 * c.better.value:.0f} % [")
    assert [float(x.replace("−", "-")) for x in re.findall(r"[+−][\d.]+", effects[1][3])] == \
        pytest.approx(c.spread.interval, abs=6e-4)
    ranks = page.table("ranking-finetune")
    assert ranks[0][2:] == ["Place 1", "Place 2", "Place 3"] and ranks[1][:3] == ["5", "mae", "100 % (100 %)"]
    assert "Kendall's τ with that order, 1 where it never changes: 1.00 (1.00) at 5;" in page.text
    table = {row[1]: row[2:] for row in page.table("subgroups")[1:]}
    assert table["not known"][0] == f"fewer than {SMALL}" and table["2"][0] == "withheld" and table["1"][0] == "20"
    first = next(g for g in summary.subgroups if (g.value, g.labels) == ("1", 5))
    assert table["1"][1] == figures.interval(first.means["scratch"])
    assert set(table["2"][1:]) == set(table["not known"][1:]) == {"–"}
    (report,) = json.loads((tmp_path / "report.json").read_text())["reports"]
    assert report["results"]["traits"] == {} and Summary.model_validate(report["summary"]) == summary


def test_an_interval_over_seeds_of_an_area_is_that_of_its_pseudo_values() -> None:
    results = classification(n=60)
    cells = [c for c in results.cells if (c.arm, c.labels) == ("dino", 20)]
    group, n = results.group(cells), 30
    row = summarise(results, replicates=50).row("dino", "linear", 20)
    assert row is not None and row.spread == crossed(group.by_seed("auroc"), n)
    left = np.array([group.statistic("auroc")((np.arange(n) != i).astype(float)[None])[0] for i in range(n)])
    assert row.spread is not None and row.spread.subjects == pytest.approx(np.sqrt((n - 1) * left.var()), rel=1e-6)


def test_results_survive_json(study: Results, tmp_path: Path) -> None:
    assert Results.load(study.save(tmp_path / "results.json")) == study


@pytest.mark.parametrize("damage, message", [
    (lambda r: {**r, "cells": []}, "no cell"),
    (lambda r: {**r, "cells": r["cells"] + r["cells"][:1]}, "tell them apart"),
    (lambda r: {**r, "metric": "hausdorff"}, "higher"),
    (lambda r: {**r, "classes": ["anterior"]}, "not of anterior"),
])
def test_inconsistent_results_are_refused(study: Results, tmp_path: Path, damage: Callable[[dict], dict], message: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(damage(json.loads(study.model_dump_json()))))
    with pytest.raises(MeristemError, match=message):
        Results.load(path)
    with pytest.raises(MeristemError, match="no results"):
        Results.load(tmp_path / "nowhere.json")


def test_join_takes_arms_of_one_study_only(study: Results) -> None:
    mae = edited(study, lambda c: c if c.arm != "simclr" else None)
    simclr = edited(study, lambda c: c if c.arm != "mae" else None)  # scratch occurs in both and agrees
    joined = join(mae, simclr)
    assert joined is not None and joined.arms == ["scratch", "mae", "simclr"] and len(joined.cells) == len(study.cells)
    other = edited(simclr, lambda c: c.model_copy(update={"cases": c.cases[::-1]}) if c.arm == "scratch" else c)
    assert join(mae, other) is None  # another scratch under the same name: not to be mixed
    assert join(study, classification()) is None


# ---- pictures and curves

def brain(seed: int, shape: tuple[int, int, int] = (36, 48, 32)) -> tuple[np.ndarray, np.ndarray]:
    """A smooth volume with two bright neighbouring ellipsoids, and their labels."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))

    def inside(centre: tuple[float, ...], radius: tuple[float, ...]) -> np.ndarray:
        return sum(((g - c) / r) ** 2 for g, c, r in zip(grid, centre, radius, strict=True)) < 1

    label = np.zeros(shape, dtype=np.int64)
    label[inside((0.1, 0.35, 0), (0.35, 0.35, 0.4))] = 1
    label[inside((0.0, -0.3, 0.05), (0.3, 0.4, 0.35)) & (label == 0)] = 2
    image = 0.5 + 0.2 * np.sin(3 * grid[0] + seed) * np.cos(4 * grid[1]) + 0.3 * (label > 0) + 0.05 * rng.normal(size=shape)
    return image, label


def pictures() -> Pictures:
    shown, overlays = [], []
    for i in range(2):
        image, label = brain(i)
        plane = pick_slice(label, (1, 1, 1)).of(image)
        hidden = np.kron(np.random.default_rng(i).random((6, 6)) < 0.7, np.ones((8, 6))).astype(bool)
        smooth = np.where(hidden, 0.6 * plane + 0.4 * plane.mean(), plane)
        shown.append(Reconstruction(plane, np.where(hidden, np.nan, plane), smooth, label="mae"))
    for rank, shift in (("worst", 4), ("median", 2), ("best", 1)):
        image, label = brain(7 + shift)
        cut = pick_slice(label, (1.0, 1.0, 1.2), axis=2)
        guesses = {arm: cut.of(np.roll(label, by, axis=1)) for arm, by in (("scratch", shift), ("mae", shift // 2))}
        overlays.append(Overlay(f"case-{shift:03d}", rank, cut.of(image), cut.of(label), guesses,  # type: ignore[arg-type]
                                {"scratch": 0.7, "mae": 0.8}, cut.aspect))
    return Pictures(shown, overlays)


def curves() -> list[Curve]:
    def records(seed: int, steps: int, floor: float, lights: bool) -> list[dict[str, float]]:
        rng = np.random.default_rng(seed)
        return [{"step": i, "loss": floor + 0.6 * np.exp(-i / steps * 5) + 0.01 * rng.normal(),
                 "samples_per_s": 110 + rng.normal(), "data_wait": 0.03 + 0.01 * rng.random(),
                 "lr": 1e-3 * np.cos(i / steps * 1.5),
                 **({"rank": 40 + 20 * i / steps, "std": 0.9, "dims": 192.0} if lights else {})}
                for i in range(20, steps + 1, max(20, steps // 60))]

    return [Curve("pretraining", "mae", records(0, 5000, 0.31, True)),
            *(Curve("fine-tuning", arm, records(seed, 1200, floor, False))
              for arm, floor in (("scratch", 0.3), ("mae", 0.2)) for seed in range(3))]


class Page(HTMLParser):
    """What the tests ask of a page: tags with attributes, tables as text, all text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[tuple[str, list[list[str]]]] = []
        self.text, self._cell, self._open = "", None, []
        self.feed(path.read_text(encoding="utf-8"))
        assert self._open == [], f"unclosed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self._open.append(tag)
        if tag == "table":
            self.tables.append((dict(attrs).get("class") or "", []))
        if tag == "tr":
            self.tables[-1][1].append([])
        if tag in ("td", "th"):
            self.tables[-1][1][-1].append("")
            self._cell = tag

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        if tag == self._cell:
            self._cell = None

    def handle_data(self, data: str) -> None:
        if self._open[-1:] != ["style"]:
            self.text += data
        if self._cell:
            self.tables[-1][1][-1][-1] += data.strip()

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]

    def table(self, kind: str) -> list[list[str]]:
        return next(rows for name, rows in self.tables if name == kind)


@pytest.fixture(scope="module")
def written(study: Results, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(study, pictures(), curves(), tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def page(written: Path) -> Page:
    return Page(written)


def test_page_needs_nothing_but_itself(page: Page, written: Path) -> None:
    text = written.read_text()
    for _, attrs in page.tags:
        for name in ("src", "srcset", "action", "data", "poster"):
            assert (attrs.get(name) or "data:").startswith("data:")
        assert (attrs.get("href") or "#").startswith("#")
    style = text[text.index("<style>"):text.index("</style>")]
    assert "url(" not in style and "@import" not in style
    assert not page.of("script") and not page.of("link") and not page.of("iframe")
    assert len(text) < 5_000_000


def test_drawings_load_nothing(page: Page) -> None:
    """No reference out of the inlined drawings either; namespaces are names, not addresses to load."""
    drawings = [src for img in page.of("img") if (src := img["src"] or "").startswith("data:image/svg+xml;base64,")]
    assert len(drawings) > 8
    for src in drawings:
        root = ElementTree.fromstring(base64.b64decode(src.split(",", 1)[1]))
        for element in root.iter():
            for name, value in element.attrib.items():
                if name.endswith(("href", "src")):
                    assert value.startswith(("#", "data:")), (element.tag, value)


def test_page_reads_well_to_machines(page: Page) -> None:
    for img in page.of("img"):
        assert len(img["alt"] or "") > 20
    levels = [int(tag[1]) for tag, _ in page.tags if tag in ("h1", "h2", "h3")]
    assert levels[0] == 1 and all(b - a <= 1 for a, b in itertools.pairwise(levels))
    assert ("html", {"lang": "en"}) in page.tags
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_tables_and_regions_are_named_for_those_who_hear_them(page: Page, written: Path) -> None:
    text = written.read_text()
    tables = re.findall(r"<table.*?</table>", text, re.S)
    assert len(tables) == len(page.of("table")) > 6
    for table in tables:
        assert re.match(r"<table[^>]*><caption class=\"unseen\">[^<]{4,}</caption>", table)
        assert re.search(r'<th scope="(col|row)"', table) and "<th>" not in table
    for attrs in page.of("div"):
        if attrs.get("role") == "region":
            assert attrs["aria-label"] and attrs["tabindex"] == "0"
    for landmark in ("header", "main"):
        assert len(page.of(landmark)) == 1
    for attrs in page.of("img"):
        assert attrs["alt"]


def test_text_stands_out_from_its_ground(written: Path) -> None:
    """WCAG 2.1's contrast ratio, 4.5 or more, of every colour that text has, on white and on both tinted grounds."""
    def luminance(colour: str) -> float:
        channel = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channel]
        return float(np.dot([0.2126, 0.7152, 0.0722], linear))

    text = written.read_text()
    style = text[text.index("<style>"):text.index("</style>")]
    names = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", style))
    inks = {names.get(name, name) for name in re.findall(r"[;{ ]color: (?:var\(--(\w+)\))", style)}
    inks |= set(re.findall(r"[;{ ]color: (#[0-9a-f]{6})", style))
    inks |= {str(v) for k, v in figures.STYLE.items() if k in ("axes.labelcolor", "text.color", "xtick.color", "ytick.color")}
    assert len(inks) > 5
    for ink in inks:
        for ground in ("#ffffff", names["wash"], "#fdf6ec"):
            light, dark = sorted((luminance(ink), luminance(ground)), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (ink, ground)


def test_numbers_on_the_page_are_the_summarys(page: Page, summary: Summary) -> None:
    rows, labels = {}, ""
    for row in page.table("arms")[1:]:  # the number of labels stands in the first row of its group
        labels = row[0] or labels
        rows[labels, row[1]] = row
    names: dict[int | str, str] = {5: "5", 10: "10", "all": "160 (all)"}
    assert len(rows) == 9
    for r in (r for r in summary.rows if r.metric == "dice"):
        row = rows[names[r.labels], r.arm]
        assert row[2] == f"{r.mean.value:.3f} [{r.mean.low:.3f}, {r.mean.high:.3f}]"
        assert r.seed_sd is not None and row[3] == f"{r.seed_sd:.3f}"
    for c in summary.primary():
        row = rows[names[c.labels], c.arm]
        assert [float(x.replace("−", "-")) for x in re.findall(r"[+−][\d.]+", row[4])] == pytest.approx(c.difference, abs=6e-4)
        assert row[5] == "scratch" and c.p_holm is not None
        assert row[6] == ("<0.001" if c.p_holm < 0.001 else f"{c.p_holm:.3f}")
    for sentence in summary.verdict:
        assert sentence in page.text
    details = page.table("metrics")
    column = details[0].index("HD95 (mm), posterior")
    r = summary.row("mae", "finetune", 10, "hd95")
    assert r is not None
    shown = details[next(i for i, row in enumerate(details) if row[0] == "10") + 1]  # scratch, then mae
    assert shown[1] == "mae"
    assert shown[column].startswith(f"{r.classes['posterior'].value:.3f} [")


def test_everything_asked_for_is_on_the_page_in_order(page: Page) -> None:
    headings = ["does pretraining help?", "At 5 labelled subjects", "Label efficiency", "Arms compared", "Cases",
                "Training curves", "Reconstructions", "Segmentations", "Data, split and leakage", "Settings",
                "Cost and versions", "Provenance", "Limits and intended use"]
    places = [page.text.index(h) for h in headings]
    assert places == sorted(places)
    for words in ("random: 0.75", "2.15.0", "11.2 min on 2 CPU cores", "b31f90ac22d4", "Not a medical device", "4,812,300",
                  "1 unusable file left out"):
        assert words in page.text
    assert ["test", "42", "48"] in page.table("facts split")
    alts = " ".join(img["alt"] or "" for img in page.of("img"))
    for words in ("effective rank", "share of time waiting", "learning rate", "worst case", "median case", "best case",
                  "masked", "posterior", "samples per second"):
        assert words in alts
    assert "dims" not in alts


def test_leakage_is_said_at_the_top_and_in_its_place(page: Page) -> None:
    top = page.text[:page.text.index("Label efficiency")]
    assert "simclr: Transductive: 1 subject and 0 images" in top
    assert "mae: Clean" not in top and "Clean:" in page.text


def test_json_beside_the_page_holds_the_same(written: Path, page: Page, study: Results, summary: Summary) -> None:
    kept = about.Reports.model_validate_json((written.parent / "report.json").read_text())
    (report,) = kept.reports
    assert report.results == study and report.summary == summary and kept.schema_id == about.schema(about.Reports)
    for text in (*report.purpose, *report.limits, report.evaluation):
        assert text in page.text
    costs = {row[0]: row[1:] for row in page.table("costs")[1:]}
    for c in report.costs:
        assert costs[c.arm][1] == f"{c.evaluation_hours:.3g}" and costs[c.arm][2] == str(c.runs) == "9"
    assert len(report.curves) == 7 and report.curves[0].records[0]["step"] == 20


def test_a_schema_is_known_by_its_fields_not_by_its_words() -> None:
    one = create_model("One", __base__=Model, __doc__="A word.", x=(int, 0))
    same = create_model("One", __base__=Model, __doc__="Another.", x=(int, 0))
    other = create_model("One", __base__=Model, x=(float, 0))
    assert about.schema(one) == about.schema(same) != about.schema(other)


def test_cost_is_counted_by_hand_and_what_no_counter_told_is_not_guessed(study: Results) -> None:
    def metered(cell: Cell) -> Cell:
        joules = 1800.0 if cell.arm != "simclr" or cell.seed else None
        budget = cell.budget.model_copy(update={"joules": joules, "devices": 2, "metered": "GPU"})
        return cell.model_copy(update={"budget": budget})

    spent = Spent(steps=10, samples=20, seconds=7200, devices=4, joules=3.6e6, metered="GPU and processors")
    scratch, mae, simclr = about.costs(edited(study, metered).model_copy(update={"spent": {"mae": spent}}))
    hours = sum(c.budget.seconds for c in study.cells if c.arm == "mae") * 2 / 3600
    assert (mae.pretraining_hours, mae.pretraining_kwh, mae.runs) == (8.0, 1.0, 9)
    assert mae.evaluation_hours == pytest.approx(hours) and mae.evaluation_kwh == pytest.approx(9 * 1800 / 3.6e6)
    assert mae.metered == "GPU, GPU and processors"
    assert (simclr.evaluation_kwh, simclr.pretraining_hours) == (None, None) and about.quantity(None) == "not measured"
    assert (scratch.pretraining_hours, scratch.pretraining_kwh) == (0.0, 0.0)


def test_limits_are_facts_of_the_data(study: Results, summary: Summary) -> None:
    told = " ".join(about.limits(study, summary))
    for words in ("42 test subjects with 48 cases of its test split", "50 subjects) is not scored", "1 file was unusable",
                  "fine-tuned only, with 3 seeds; label budgets: 5, 10, 160 subjects", "vit3d-small", "simclr: Transductive"):
        assert words in told
    assert "mae: Clean" not in told and "recalibration" not in told
    other = classification(n=30)
    told = " ".join(about.limits(other, summarise(other, replicates=50)))
    assert "unusable" not in told and "is not scored" not in told and "no recalibration" in told
    assert "better than random weights beyond doubt in" in " ".join(about.purpose(study, summary))


def test_the_model_card_is_read_by_hubs(written: Path, study: Results, summary: Summary) -> None:
    from huggingface_hub import ModelCard, ModelCardData
    from huggingface_hub.repocard_data import model_index_to_eval_results

    text = (written.parent / "card.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert [entry["name"] for entry in front["model-index"]] == ["mae", "simclr"]
    name, found = model_index_to_eval_results(front["model-index"][:1])
    assert name == "mae" and {(e.task_type, e.dataset_revision) for e in found} == {("segmentation", "b31f90ac22d4")}
    for row in (r for r in summary.rows if r.arm == "mae"):
        (mine,) = [e for e in found if e.metric_type == row.metric and e.metric_args["labels"] == row.labels]
        assert mine.metric_value == pytest.approx(row.mean.value, abs=1e-6)
        assert mine.metric_args["interval 95 %"] == pytest.approx([row.mean.low, row.mean.high], abs=1e-6)
    assert len(found) == sum(r.arm == "mae" for r in summary.rows)
    card = ModelCard(text)
    assert isinstance(card.data, ModelCardData) and card.data.library_name == "meristem"
    row = summary.row("mae", "finetune", 5)
    assert row is not None and f"| 5 | mae | {figures.interval(row.mean)} |" in text
    for sentence in summary.verdict:
        assert re.sub(r"([\[\]<>])", r"\\\1", sentence) in text
    for line in text.splitlines():  # tables are whole
        if line.startswith("|"):
            assert line.endswith("|")


def test_markdown_in_names_is_text(tmp_path: Path) -> None:
    named = {"mae": "a|b *c*", "scratch": "scratch"}
    small = edited(segmentation(subjects=8, seeds=(0,)), lambda c: c.model_copy(update={"arm": named[c.arm]})
                   if c.arm in named else None)
    write_report(small.model_copy(update={"leakage": {}}), Pictures(), [], tmp_path)
    text = (tmp_path / "card.md").read_text()
    assert r"| a\|b \*c\* |" in text and yaml.safe_load(text.split("---\n")[1])["model-index"][0]["name"] == "a|b *c*"


def test_markup_in_names_is_text(tmp_path: Path) -> None:
    small = segmentation(subjects=8, seeds=(0,))
    odd = edited(small, lambda c: c.model_copy(update={"arm": "<script>x</script>"}) if c.arm == "mae" else None
                 if c.arm == "simclr" or c.labels != 5 else c)
    odd = odd.model_copy(update={"cells": tuple(c for c in odd.cells if c.labels == 5), "leakage": {}, "settings": {}})
    page = Page(write_report(odd, Pictures(), [], tmp_path))
    assert not page.of("script") and "<script>x</script>" in page.text
    assert "overlap of pretraining data and test data was not checked" in page.text
    assert "Only 8 test subjects" in page.text
    for absent in ("Training curves", "Reconstructions", "Segmentations"):
        assert absent not in page.text


@pytest.mark.parametrize("classes", [2, 3])
def test_classification_page(tmp_path: Path, classes: int) -> None:
    results = edited(classification(n=60, classes=classes), lambda c: c if c.labels == 20 else None)
    page = Page(write_report(results, Pictures(), [], tmp_path))
    report = json.loads((tmp_path / "report.json").read_text())["reports"][0]
    row = next(r for r in report["summary"]["rows"] if (r["arm"], r["labels"], r["metric"]) == ("dino", 20, "auroc"))
    alts = [img["alt"] or "" for img in page.of("img")]
    roc = next(a for a in alts if a.startswith("ROC"))
    assert f"dino AUROC {row['mean'][0]:.3f} [{row['mean'][1]:.3f}, {row['mean'][2]:.3f}]" in roc
    assert sum(a.startswith("Confusion matrix") for a in alts) == 2
    cells = [c for c in results.cells if (c.arm, c.labels) == ("dino", 20)]
    hits = [np.mean([np.argmax(k.probabilities) == 0 for k in c.cases if k.target == 0]) for c in cells]
    assert f"Confusion matrix of dino: {np.mean(hits):.0%} of normal recognised" in " ".join(alts)
    assert any(a.startswith("Calibration") for a in alts)
    assert "C = 0.1" in page.text and "Unknown:" in page.text


def test_several_runs_are_joined_where_they_belong_together(tmp_path: Path) -> None:
    small = edited(segmentation(subjects=12, seeds=(0,)), lambda c: c if c.labels == 10 else None)
    mae = edited(small, lambda c: c if c.arm != "simclr" else None)
    simclr = edited(small, lambda c: c if c.arm != "mae" else None)
    other = edited(classification(n=20, seeds=(0,)), lambda c: c if c.labels == 20 else None)
    page = Page(write_report([mae, other, simclr], [Pictures(), Pictures(), pictures()], [[], [], []], tmp_path))
    assert len(page.of("article")) == 2
    assert {a["href"] for a in page.of("a")} == {"#study-1", "#study-2"}
    assert {row[1] for row in page.table("arms")[1:]} == {"scratch", "mae", "simclr"}
    assert len(json.loads((tmp_path / "report.json").read_text())["reports"]) == 2


def test_pictures_survive_the_file_and_others_are_refused(tmp_path: Path) -> None:
    kept = Pictures.load(pictures().save(tmp_path / "pictures.npz"))
    for a, b in zip(kept.overlays, pictures().overlays, strict=True):
        assert (a.case, a.rank, a.scores, a.aspect) == (b.case, b.rank, b.scores, b.aspect)
        assert np.array_equal(a.truth, b.truth) and np.array_equal(a.predictions["mae"], b.predictions["mae"])
    assert np.array_equal(kept.reconstructions[1].masked, pictures().reconstructions[1].masked, equal_nan=True)
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(MeristemError, match="pictures"):
        Pictures.load(tmp_path / "other.npz")


@pytest.mark.parametrize("axis, best, aspect", [(0, 2, 3.0 / 2.0), (1, 4, 3.0 / 1.0), (2, 1, 2.0 / 1.0)])
def test_slice_of_largest_area_and_anisotropic_spacing(axis: int, best: int, aspect: float) -> None:
    label = np.zeros((5, 6, 7), int)
    label[tuple(best if a == axis else slice(1, 4) for a in range(3))] = 1
    label[tuple(best - 1 if a == axis else 2 for a in range(3))] = 1
    cut = pick_slice(label, (1.0, 2.0, 3.0), axis)
    assert (cut.index, cut.aspect) == (best, pytest.approx(aspect))
    rest = [a for a in range(3) if a != axis]
    plane = cut.of(np.arange(label.size).reshape(label.shape))
    assert plane.shape == (label.shape[rest[1]], label.shape[rest[0]])
    origin = [0, 0, 0]
    origin[axis] = best
    assert plane[-1, 0] == np.ravel_multi_index(origin, label.shape)  # the origin lies at the bottom left


def test_slice_of_plane_and_of_empty_volume() -> None:
    flat = np.zeros((4, 9), int)
    assert pick_slice(flat, (2.0, 1.0)).of(flat) is flat
    assert pick_slice(np.zeros((4, 5, 6), int), (1, 1, 1)).index == 3


def test_overlay_shows_what_differs_and_no_window_hides_a_bad_reconstruction() -> None:
    image, label = brain(1)
    cut = pick_slice(label, (1, 1, 1))
    same = Overlay("case-1", "best", cut.of(image), cut.of(label), {"a": cut.of(label), "b": np.zeros_like(cut.of(label))})
    ((_, (right, empty)),) = figures.overlays([same], "Dice")
    assert right.source != empty.source
    plane = cut.of(image)
    ((original, _, bad),) = figures.reconstructions([Reconstruction(plane, plane, 3 * plane)])
    assert original.source != bad.source  # one window for the row: a wrong scale is seen


def test_cases_are_picked_by_the_mean_over_arms(study: Results) -> None:
    picked = pick_cases(study, "finetune", 5)
    score: dict[str, list[float]] = {}
    for cell in (c for c in study.cells if c.labels == 5):
        for case in cell.cases:
            score.setdefault(case.case, []).append(sum(case.metrics["dice"].values()))
    order = sorted(score, key=lambda k: np.mean(score[k]))
    assert picked == {"worst": order[0], "median": order[len(order) // 2], "best": order[-1]}


# ---- sequences

TIMES = (0.0, 0.5, 1.0, 1.5)


def clip(seed: int) -> np.ndarray:
    """(4, 24, 32, 3) uint8: a spot that wanders over a pattern of its own."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:24, :32]
    base = 90 + 40 * np.sin(x / 5 + seed) + rng.normal(0, 3, (4, 24, 32))
    spot = np.stack([(y - 12) ** 2 + (x - 6 - 6 * t) ** 2 < 20 for t in range(4)])
    return np.where(spot[..., None], (220, 60, 60), base[..., None] * (1, 0.8, 0.6)).clip(0, 255).astype(np.uint8)


def actions(classes: int, n: int = 60, arms: tuple[str, ...] = ("scratch", "mae")) -> Results:
    """Accuracy, few labels and all; odd cases are hard. Only the last arm is pretrained."""
    target = np.arange(n) % classes
    cells = []
    for labels, signal in ((10, 2.0), ("all", 4.0)):
        for arm in arms:
            rng = np.random.default_rng([len(arm), int(signal)])
            strength = signal + (arm == arms[-1]) - np.arange(n) % 2
            z = rng.normal(size=(n, classes)) + strength[:, None] * np.eye(classes)[target]
            p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
            cases = tuple(Case(case=f"case-{i:03d}", subject=f"sub-{i:03d}", target=int(target[i]),
                               probabilities=tuple(p[i].tolist())) for i in range(n))
            cells.append(Cell(arm=arm, init="5d" if arm == arms[-1] else None, protocol="knn", labels=labels, seed=0,
                              cases=cases, labelled_subjects=10 if labels == 10 else 90,
                              budget=Budget(steps=0, batch=0, trainable=0, seconds=1.0)))
    return Results(task="actions", kind="classification", metric="accuracy", cells=tuple(cells),
                   dataset=Dataset(name="films", manifest="1", splits={}),
                   classes=tuple(f"act {i:03d}" for i in range(classes)))


def moving(results: Results) -> Pictures:
    """Strips of every case, a reconstruction, attention of two cases."""
    recon = clip(50).astype(float)
    hidden = np.where(np.arange(32)[None, None, :, None] > 9, np.nan, recon)
    heat = np.random.default_rng(0).gamma(1.0, 1.0, (4, 3, 4))
    curve = tuple((heat.sum((1, 2)) / heat.sum()).tolist())
    return Pictures([Reconstruction(recon, hidden, 0.9 * recon, 1.0, "mae", TIMES)], [],
                    [Strip(case.case, clip(i), TIMES) for i, case in enumerate(results.cells[0].cases)],
                    [Attention(f"case-{i:03d}", "mae", clip(i), TIMES, heat, curve, TIMES) for i in range(2)])


def test_samples_are_picked_by_confidence_and_none_twice() -> None:
    group = sample_groups(actions(3))["mae", "knn", 10]
    assert group.target is not None and group.probabilities is not None
    p, target = group.probabilities.mean(0), group.target
    right = [i for i in range(60) if p[i].argmax() == target[i]]
    wrong = [i for i in range(60) if i not in right]
    picked = pick_samples(group)
    assert picked["most confident right"] == sorted(right, key=lambda i: -p[i].max())[:2]
    assert picked["worst wrong"] == sorted(wrong, key=lambda i: p[i, target[i]])[:2]
    rest = [i for i in range(60) if i not in picked["most confident right"] + picked["worst wrong"]]
    assert picked["least confident"] == sorted(rest, key=lambda i: p[i].max())[:2]


def test_contact_sheets_say_what_each_arm_gave(tmp_path: Path) -> None:
    results = actions(3, arms=("metadata", "scratch", "mae"))
    page = Page(write_report(results, moving(results), [], tmp_path))
    groups = sample_groups(results)
    assert set(groups) == {(arm, "knn", labels) for arm in ("scratch", "mae") for labels in (10, "all")}
    alts = [img["alt"] or "" for img in page.of("img")]
    strips = [alt for alt in alts if re.match(r"(scratch|mae|metadata), (most|least|worst)", alt)]
    assert len(strips) == sum(len(places) for g in groups.values() for places in pick_samples(g).values())
    for (arm, _, _), group in groups.items():
        assert group.target is not None and group.probabilities is not None
        for heading, places in pick_samples(group).items():
            for i in places:
                p = group.probabilities[:, i].mean(0)
                given = ", ".join(f"{results.classes[c]} {p[c]:.2f}" for c in np.argsort(-p))
                text = f"{group.cases[i]}, truly {results.classes[group.target[i]]}; given {given}"
                assert f"{heading.capitalize()}: {text}." in page.text
                assert f"{arm}, {heading}, {text}, 4 frames from 0.00 s to 1.50 s" in strips


def test_the_arm_of_headers_is_explained_and_compared(tmp_path: Path) -> None:
    results = actions(3, arms=("metadata", "scratch", "mae"))
    summary = summarise(results)
    c = next(c for c in summary.primary() if (c.baseline, c.labels) == ("metadata", "all"))
    verb = "beats" if c.difference.low > 0 else "does not beat"
    text = Page(write_report(results, Pictures(), [], tmp_path)).text
    assert text.count("knows what the files' headers say") == 1
    assert f"mae {verb} it by nearest neighbours at 90 labelled subjects ({figures.interval(c.difference, sign=True)})" in text
    other = actions(3)
    assert "knows what the files" not in Page(write_report(other, Pictures(), [], tmp_path / "b")).text


def test_strips_of_reconstructions_and_attention(tmp_path: Path) -> None:
    results = actions(2)
    shown = moving(results)
    page = Page(write_report(results, shown, [], tmp_path))
    alts = [img["alt"] or "" for img in page.of("img")]
    for part in ("original", "masked", "reconstruction"):
        assert f"Example 1, mae: {part}, 4 frames from 0.00 s to 1.50 s" in alts
    a = shown.attention[0]
    most = TIMES[int(np.argmax(a.curve))]
    told = f"mae from {min(a.curve):.3f} to {max(a.curve):.3f}, most at {most:.2f} s"
    assert f"Share of attention over time, case-000: {told}." in alts
    assert sum(alt.startswith("case-00") and "where mae attends" in alt for alt in alts) == 2
    assert all((img["src"] or "").startswith("data:image/") for img in page.of("img"))


def test_strips_survive_the_file_and_older_files_have_none(tmp_path: Path) -> None:
    shown = moving(actions(2))
    kept = Pictures.load(shown.save(tmp_path / "pictures.npz"))
    assert [s.case for s in kept.strips] == [s.case for s in shown.strips]
    assert np.array_equal(kept.strips[3].frames, shown.strips[3].frames) and kept.strips[3].times == TIMES
    assert kept.reconstructions[0].times == TIMES and np.array_equal(kept.attention[1].heat, shown.attention[1].heat)
    assert (kept.attention[0].curve, kept.attention[0].seconds) == (shown.attention[0].curve, TIMES)
    assert len((kept + shown).strips) == len(shown.strips) and len((kept + shown).attention) == 4
    stored = dict(np.load(tmp_path / "pictures.npz"))
    index = json.loads(stored.pop("index").tobytes())
    old = {"reconstructions": [{k: v for k, v in index["reconstructions"][0].items() if k != "times"}], "overlays": []}
    np.savez(tmp_path / "old.npz", index=np.frombuffer(json.dumps(old).encode(), np.uint8), **stored)
    assert Pictures.load(tmp_path / "old.npz").strips == []


def test_colour_lies_where_attention_exceeds_an_even_spread() -> None:
    shown = np.full((2, 8, 8, 3), 0.5)
    heat = np.ones((2, 2, 2))
    assert np.array_equal(figures._heated(shown, heat), shown)
    heat[1, 0, 0] = 3.0
    drawn = figures._heated(shown, heat)
    assert np.array_equal(drawn[0], shown[0])
    assert (drawn[1, 0, 0] != 0.5).any() and np.array_equal(drawn[1, 7, 7], shown[1, 7, 7])


@pytest.mark.parametrize("classes", [8, 40])
def test_many_classes_stay_readable(classes: int, tmp_path: Path) -> None:
    """Per-class table and confusions agree with counting by hand; beyond 12 classes one panel stands for all."""
    results = edited(actions(classes, n=80), lambda c: c if c.labels == 10 else None)
    path = write_report(results, Pictures(), [], tmp_path)
    page = Page(path)
    rows = {row[0]: row for row in page.table("per-class")[1:]}
    assert len(rows) == classes and path.stat().st_size < 3_000_000
    heads = page.table("per-class")[0]
    for cell in results.cells:
        column = heads.index(f"accuracy, {cell.arm}")
        for k in (0, classes - 1):
            hits = [int(np.argmax(c.probabilities)) == k for c in cell.cases if c.target == k]
            row = rows[results.classes[k]]
            assert row[1] == str(len(hits)) and row[column].startswith(f"{np.mean(hits):.3f}")
        table = np.zeros((classes, classes))
        for c in cell.cases:
            table[c.target, int(np.argmax(c.probabilities))] += 1  # type: ignore[index]
        np.fill_diagonal(table, 0)
        i, j = np.unravel_index(table.argmax(), table.shape)
        assert f"Most often mistaken: {results.classes[i]} as {results.classes[j]} ({table[i, j]:.1f} cases)" in page.text
    alts = [img["alt"] or "" for img in page.of("img")]
    panels = [a for a in alts if a.startswith("Probability given to the true class")]
    one = [a for a in alts if a.startswith(f"Accuracy within each of {classes} classes")]
    assert (len(panels), len(one)) == ((classes, 0) if classes <= 12 else (0, 1))


def test_retrieval_is_shown_in_its_own_metrics(tmp_path: Path) -> None:
    cells = []
    for arm, init, level in (("scratch", None, 0.4), ("mae", "ab", 0.7)):
        hit = np.random.default_rng(1).random(30)
        cases = tuple(Case(case=f"case-{i}", subject=f"sub-{i}",
                           metrics={f"R@{k}": {"queries": float(h < level * k**0.1)} for k in (1, 5)})
                      for i, h in enumerate(hit))
        cells.append(Cell(arm=arm, init=init, protocol="retrieval", labels="all", labelled_subjects=80, seed=0, cases=cases,
                          budget=Budget(steps=0, batch=0, trainable=0, seconds=1.0)))
    results = Results(task="retrieval", kind="retrieval", metric="R@1", classes=("queries",), cells=tuple(cells),
                      dataset=Dataset(name="films", manifest="1", splits={}))
    page = Page(write_report(results, Pictures(), [], tmp_path))
    table = page.table("metrics")
    assert table[0][2:] == ["R@1", "R@5"]
    for row, cell in zip(table[1:], results.cells, strict=True):
        assert row[1] == cell.arm
        for name, shown in zip(table[0][2:], row[2:], strict=True):
            assert shown.startswith(f"{np.mean([c.metrics[name]['queries'] for c in cell.cases]):.3f} [")
    assert "Calibration" not in page.text and "Contact sheets" not in page.text


def carried() -> Results:
    cells = []
    for arm, init, level in (("scratch", None, 0.3), ("mae", "ab", 0.5)):
        rng = np.random.default_rng(2)
        cases = []
        for i in range(5):
            j, f = (float(x) for x in level + 0.1 * rng.random(2))
            cases.append(Case(case=f"case-{i}", subject=f"sub-{i}",
                              metrics={"J&F": {"objects": (j + f) / 2}, "J": {"objects": j}, "F": {"objects": f}}))
        cells.append(Cell(arm=arm, init=init, protocol="propagate", labels="all", labelled_subjects=0, seed=0,
                          cases=tuple(cases), budget=Budget(steps=0, batch=0, trainable=0, seconds=1.0)))
    return Results(task="propagation", kind="propagation", metric="J&F", classes=("objects",), cells=tuple(cells),
                   dataset=Dataset(name="films", manifest="1", splits={}), unit="px")


def test_carried_labels_are_told_by_sequence(tmp_path: Path) -> None:
    results = carried()
    truth = np.zeros((4, 24, 32), int)
    truth[:, 6:18, 8:20] = 1
    truth[2] = -1  # nobody labelled this frame
    overlay = Overlay("case-1", "worst", clip(1), truth, {"scratch": np.roll(truth, 5, 2), "mae": truth},
                      {"scratch": 0.3, "mae": 0.5}, 1.0, TIMES)
    page = Page(write_report(results, Pictures([], [overlay]), [], tmp_path))
    summary = summarise(results)
    table = page.table("sequences")
    assert table[0] == ["Sequence", "Arm", "J&F", "J (region)", "F (contour)"]
    rows, case = {}, ""
    for row in table[1:]:
        case = row[0] or case
        rows[case, row[1]] = row[2:]
    for cell in results.cells:
        r = summary.row(cell.arm, "propagate", "all")
        assert r is not None and rows["mean", cell.arm][0] == figures.interval(r.mean)
        for c in cell.cases:
            assert rows[c.case, cell.arm] == [f"{c.metrics[m]['objects']:.3f}" for m in ("J&F", "J", "F")]
    assert "Carried labels" in page.text and "Label efficiency" not in page.text and "Arms at a glance" in page.text
    alts = [img["alt"] or "" for img in page.of("img")]
    assert "worst case case-1, mae, J&F 0.500: contours of truth and prediction, 4 frames from 0.00 s to 1.50 s" in alts
    assert "labels of the first frame" in page.text and "no recalibration" not in page.text


# ---- what is gathered of a run

TINY = ["encoder.transformer.width=24", "encoder.transformer.depth=2", "encoder.transformer.heads=2", "views.x.size=[4,96,96]",
        "modality.video.fps=10"]
MASKED = "objectives.pixels.masked.predictor.decoder={depth: 1, width: 24, heads: 2}"


@pytest.mark.parametrize("cls", [True, False])
def test_attention_is_what_the_class_token_gives_or_all_give_on_average(cls: bool) -> None:
    weight = torch.rand(2, 3, 5 + cls, 5 + cls).softmax(-1)
    valid = torch.ones(2, 5, dtype=torch.bool)
    valid[1, 4] = False
    tokens = torch.zeros(2, 5, 8)
    encoded = Encoded(tokens, {"mean": tokens[:, 0], **({"cls": tokens[:, 0]} if cls else {})}, valid, attention=weight)
    given = attended(encoded)
    for b in range(2):
        n = int(valid[b].sum())
        by_hand = np.zeros(5)
        for i in range(n):
            for h in range(3):
                by_hand[i] += float(weight[b, h, 0, 1 + i]) if cls else sum(float(weight[b, h, j, i]) for j in range(5))
        np.testing.assert_allclose(given[b].numpy(), by_hand / by_hand.sum(), rtol=1e-5)


def test_pictures_of_sequences_are_their_frames_at_their_seconds(tmp_path: Path) -> None:
    """Folders of frames, one of which says which it is; a checkpoint without training; results by hand."""
    for i in range(4):
        place = tmp_path / "data" / ("ab"[i % 2]) / f"canary{i}"
        place.mkdir(parents=True)
        for t in range(12):
            frame = np.full((100, 120, 3), (20 * t, 40 * i, 90), np.uint8)
            frame[30:60, 8 * t:8 * t + 20] = 255 - 20 * t
            Image.fromarray(frame).save(place / f"{t:03d}.png")
    recipe = recipes.load("video/videomae", [*TINY, MASKED])
    data = open_data(tmp_path / "data", recipe.modality, split="0,0,1", cache=tmp_path / "cache", quiet=True)
    rows = data.rows("test")
    assert len(rows) == 4
    assembly = Assembly(recipe)
    about = {**card(recipe, data, data.identities(rows), "pretraining"), **reference(assembly)}
    checkpoint.save(tmp_path / "run", 1, assembly.state_dict(), about, {"step": 1}, keep=1)
    out = tmp_path / "out"
    out.mkdir()
    task = recipes.build(recipes.override(recipes.read("video/classification"), TINY), TaskRecipe)
    (out / "recipe.yaml").write_text(yaml.safe_dump(task.dump()))
    cases = tuple(Case(case=r.case, subject=r.subject, target=r.labels["class"], probabilities=(0.6, 0.4)) for r in rows)
    cell = Cell(arm="videomae", init="ab", protocol="knn", labels="all", labelled_subjects=4, seed=0, cases=cases,
                budget=Budget(steps=0, batch=0, trainable=0, seconds=1.0))
    Results(task="actions", kind="classification", metric="accuracy", classes=("a", "b"), cells=(cell,),
            dataset=Dataset(name="films", manifest="1", splits={})).save(out / "results.json")
    pages.gather(out, [Entrant(str(tmp_path / "run"), task, data)])
    shown = Pictures.load(out / "pictures.npz")

    assert {s.case for s in shown.strips} == {r.case for r in rows}
    for strip in shown.strips:
        assert strip.frames.shape == (6, 100, 120, 3) and strip.frames.dtype == np.uint8
        frame = strip.frames[:, 0, 0, 0] / 20  # as red as it is late
        np.testing.assert_allclose(strip.times, frame / 10, atol=1e-6)
        assert strip.times[0] == 0 and strip.times[-1] == pytest.approx(1.1)
    assert len(shown.reconstructions) == 4
    for r in shown.reconstructions:
        known = ~np.isnan(r.masked)
        assert r.original.shape == (4, 96, 96, 3) and len(r.times) == 4 and 0 < known.mean() < 0.2
        np.testing.assert_allclose(r.masked[known], r.original[known])
        assert np.nanmin(r.original) > -0.5 and 100 < np.nanmax(r.original) < 255.5  # as stored, not as normalised
    assert {f.arm for f in shown.features} == {"videomae", "scratch"} and len(shown.features) == 6
    assert all(f.picture.shape[:3] == (2, 96, 96) and f.colours.shape[0] == len(f.times) == 2 for f in shown.features)
    assert {e.arm for e in shown.embeddings} == {"videomae", "scratch"} and len(shown.embeddings[0].place) == 4
    assert len(shown.attention) == 3 and {a.arm for a in shown.attention} == {"videomae"}
    for a in shown.attention:
        assert sum(a.curve) == pytest.approx(1) and len(a.curve) == len(a.seconds) == 2 and a.frames.shape == (2, 96, 96, 3)
        assert a.heat.mean() == pytest.approx(1) and np.allclose(a.heat.sum((1, 2)) / a.heat.sum(), a.curve, atol=1e-6)
        assert a.seconds[1] - a.seconds[0] == pytest.approx(2 / 8)  # two frames at 8 a second
    text = pages.report([out], out).read_text()
    assert "canary" not in text and "canary" not in str(dict(np.load(out / "pictures.npz"))["index"].tobytes())
