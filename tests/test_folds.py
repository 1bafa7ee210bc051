"""Folds of a cross-validation become one evaluation in which every subject was tested once."""

from __future__ import annotations

import pytest

from meristem.errors import MeristemError
from meristem.platform.evaluation.folds import pooled
from meristem.platform.evaluation.leakage import audit
from meristem.platform.evaluation.results import Budget, Case, Cell, Counts, Dataset, Results, summarise


def fold(number: int, subjects: int = 3, *, seen: int = 0, metric: str = "accuracy", seeds: int = 1) -> Results:
    names = [f"sub-{number}-{i}" for i in range(subjects)]

    def cell(arm: str, right: int, seed: int) -> Cell:
        cases = tuple(Case(case=f"{n}-{j}", subject=n, target=1, probabilities=(0.2, 0.8) if i < right else (0.8, 0.2))
                      for i, n in enumerate(names) for j in range(2))
        return Cell(arm=arm, init=None if arm == "scratch" else f"weights-{number}", protocol="linear", labels="all",
                    labelled_subjects=8 + number, seed=seed, budget=Budget(steps=0, batch=0, trainable=1, seconds=1.5),
                    cases=cases, chosen={"C": float(number)})

    cells = tuple(cell(arm, right, seed) for seed in range(seeds) for arm, right in (("scratch", 1), ("mae", 2)))
    leakage = {"mae": audit(names, names, names[:seen], names[:seen])}
    return Results(task="t", kind="classification", metric=metric, classes=("a", "b"),
                   dataset=Dataset(name="d", manifest="m", splits={"test": Counts(subjects=subjects, cases=2 * subjects)}),
                   cells=cells, leakage=leakage, pretraining={"mae": {"recipe": "mae", "steps": number}})


def test_every_case_of_every_fold_is_scored_once() -> None:
    folds = [fold(i, subjects=2 + i) for i in range(3)]
    together = pooled(folds)
    assert [len(c.cases) for c in together.cells] == [2 * (2 + 3 + 4)] * 2 and together.dataset.splits["test"].subjects == 9
    assert {c.labelled_subjects for c in together.cells} == {9} and together.cells[0].budget.seconds == 4.5
    row = summarise(together).row("mae", "linear", "all")
    assert row is not None and row.subjects == 9 and row.mean.value == pytest.approx((2 + 2 + 2) / 9)
    assert together.pretraining["mae"] == {"recipe": "mae", "steps": "0; 1; 2"} and together.cells[1].chosen == {}


def test_one_fold_that_met_its_test_set_marks_all() -> None:
    assert pooled([fold(0), fold(1)]).leakage["mae"].verdict == "clean"
    mixed = pooled([fold(0), fold(1, seen=2)]).leakage["mae"]
    assert mixed.verdict == "transductive" and mixed.subjects == 2 and mixed.test_subjects == 6


@pytest.mark.parametrize(("other", "says"), [(fold(0), "more than one fold"), (fold(1, metric="auroc"), "differ in metric"),
                                             (fold(1, seeds=2), "different arms")])
def test_what_are_no_folds_of_one_evaluation_is_refused(other: Results, says: str) -> None:
    with pytest.raises(MeristemError, match=says):
        pooled([fold(0), other])


def test_traits_of_all_folds_are_kept() -> None:
    folds = [fold(i).model_copy(update={"traits": {"site": {f"sub-{i}-0-0": "1"}} if i else {}}) for i in range(3)]
    assert pooled(folds).traits == {"site": {"sub-1-0-0": "1", "sub-2-0-0": "1"}}
