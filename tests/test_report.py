"""Results, their summary and the page: every number on the page is one of the summary's; the page needs nothing but itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from meristem.errors import MeristemError
from meristem.platform.evaluation.leakage import audit
from meristem.platform.evaluation.results import Budget, Case, Cell, Counts, Dataset, Group, Results, Summary, merge, summarise
from meristem.platform.evaluation.statistics import bootstrap, mean_of

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
    names = ("normal", "bacterial", "viral")[:classes]
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
    assert text.startswith(f"At 5 labelled subjects pretraining adds +{c.difference.value:.3f} Dice [+{c.difference.low:.3f}, ")
    assert "over scratch" in text and "3 seeds, 42 test subjects" in text
    assert "160 labelled subjects (all) no clear difference" in text  # the budget without a gain is not left out


def test_no_gain_and_harm_are_said() -> None:
    small = {"subjects": 24, "seeds": (0, 1)}
    none = summarise(segmentation(gain=0.0, **small), replicates=400)  # type: ignore[arg-type]
    assert "adds" not in none.verdict[0] and "no clear difference" in none.verdict[0]
    harm = summarise(segmentation(gain=-0.05, **small), replicates=400)  # type: ignore[arg-type]
    assert "pretraining harms: −0.0" in harm.verdict[0] and "adds" not in harm.verdict[0]
    assert any("Fewer than three seeds" in w for w in none.warnings)


def test_lower_is_better_turns_the_verdict_not_the_number(study: Results) -> None:
    s = summarise(study.model_copy(update={"metric": "hd95"}), replicates=400)
    assert "pretraining gains −0." in s.verdict[0]


def test_unequal_budgets_are_found(study: Results) -> None:
    assert not summarise(study, replicates=100).warnings
    longer = edited(study, lambda c: c.model_copy(update={"budget": c.budget.model_copy(update={"steps": 2400})})
                    if c.arm == "mae" and c.labels == 5 else c)
    s = summarise(longer, replicates=100)
    assert [w for w in s.warnings if "optimiser steps (2400 against 1200)" in w and "mae" in w and "5 labelled" in w]
    assert {(c.arm, c.labels) for c in s.comparisons if not c.equal_budget} == {("mae", 5)}


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
    s = summarise(results, replicates=300)
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


def test_merge_joins_arms_of_one_study_only(study: Results) -> None:
    mae = edited(study, lambda c: c if c.arm != "simclr" else None)
    simclr = edited(study, lambda c: c if c.arm != "mae" else None)  # scratch occurs in both and agrees
    (joined,) = merge([mae, simclr])
    assert joined.arms == ["scratch", "mae", "simclr"] and len(joined.cells) == len(study.cells)
    other = edited(simclr, lambda c: c.model_copy(update={"cases": c.cases[::-1]}) if c.arm == "scratch" else c)
    assert len(merge([mae, other])) == 2  # another scratch under the same name: not to be mixed
    assert len(merge([study, classification()])) == 2
