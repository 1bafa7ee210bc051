"""Cross-validation: evaluations of disjoint test folds as one, in which every subject was tested once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from meristem.errors import MeristemError
from meristem.platform.evaluation.leakage import Leakage
from meristem.platform.evaluation.results import Cell, Counts, Results, added

WORST = ("contaminated", "unknown", "transductive", "clean")
SAME = ("task", "kind", "metric", "classes", "unit", "tolerance", "scoring", "overlaps", "settings")


def pooled(folds: Sequence[Results]) -> Results:
    """One Results whose cells hold the cases of all folds. Intervals are then over all subjects, each predicted by a model that
    had not met it; models of different folds share training subjects, which no bootstrap of the cases can see.

    Arms go by their names: an arm is the same recipe pretrained once for each fold. Raises MeristemError when the folds differ
    in more than their split, hold other cells, or share a test subject.
    """
    first = folds[0]
    for other in folds[1:]:
        unlike = [name for name in SAME if getattr(other, name) != getattr(first, name)]
        if unlike:
            raise MeristemError(f"the evaluations differ in {', '.join(unlike)}: they are not folds of one",
                                "Evaluate all folds with one recipe, each with its own split: --split every:5:0 … every:5:4.")
    cells = [{(c.arm, c.protocol, c.labels, c.seed): c for c in fold.cells} for fold in folds]
    keys = list(cells[0])
    if any(set(other) != set(keys) for other in cells[1:]):
        raise MeristemError("the folds hold different arms, protocols, label budgets or seeds", "Finish all of them first.")
    tested: set[str] = set()
    for fold in cells:
        subjects = {case.subject for case in fold[keys[0]].cases}
        if tested & subjects:
            raise MeristemError(f"{len(tested & subjects)} test subjects are in more than one fold",
                                "Folds must not share subjects; use --split every:k:fold.")
        tested |= subjects
    parts = [fold.dataset for fold in folds]
    test = [part.splits["test"] for part in parts]
    whole = Counts(subjects=sum(t.subjects for t in test), cases=sum(t.cases for t in test))
    dataset = parts[0].model_copy(update={"name": f"{parts[0].name}, {len(folds)} folds",
                                          "splits": {**parts[0].splits, "test": whole}})
    return first.model_copy(update={
        "cells": tuple(_joined([fold[key] for fold in cells]) for key in keys), "dataset": dataset,
        "traits": {trait: {case: value for fold in folds for case, value in fold.traits.get(trait, {}).items()}
                   for trait in dict.fromkeys(t for fold in folds for t in fold.traits)},
        "leakage": {arm: _worst([fold.leakage[arm] for fold in folds]) for arm in first.leakage},
        "pretraining": {arm: _common([fold.pretraining[arm] for fold in folds]) for arm in first.pretraining},
        "spent": {arm: added([fold.spent[arm] for fold in folds]) for arm in first.spent
                  if all(arm in fold.spent for fold in folds)},
        "cost": _common([fold.cost for fold in folds])})


def _joined(cells: Sequence[Cell]) -> Cell:
    budgets = [cell.budget for cell in cells]
    return cells[0].model_copy(update={
        "init": None if cells[0].init is None else ", ".join(str(cell.init) for cell in cells),
        "labelled_subjects": round(sum(cell.labelled_subjects for cell in cells) / len(cells)),
        "budget": added(budgets),
        "cases": tuple(case for cell in cells for case in cell.cases),
        "chosen": cells[0].chosen if all(cell.chosen == cells[0].chosen for cell in cells) else {}})


def _worst(audits: Sequence[Leakage]) -> Leakage:
    worst = min(audits, key=lambda a: WORST.index(a.verdict))
    return Leakage(verdict=worst.verdict, subjects=sum(a.subjects for a in audits), contents=sum(a.contents for a in audits),
                   near=sum(near) if None not in (near := [a.near for a in audits]) else None,
                   test_subjects=sum(a.test_subjects for a in audits), test_contents=sum(a.test_contents for a in audits),
                   sentence=f"In the worst of {len(audits)} folds: {worst.sentence}")


def _common(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What all folds say alike; what differs, fold by fold."""
    return {key: value if all(r.get(key) == value for r in records) else "; ".join(str(r.get(key)) for r in records)
            for key, value in records[0].items()}
