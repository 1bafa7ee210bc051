"""What the report shows of detections: the summary's numbers, and boxes where the objects lie."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from made_detections import CLASSES, WIDTHS, study
from test_report import Page

from meristem.modalities.base import Header
from meristem.platform.data.source import Data
from meristem.platform.evaluation.detection import FALSE, HIT, MISSED, SPLITS
from meristem.platform.evaluation.results import Boxes, Case, Results
from meristem.platform.report import figures
from meristem.platform.report.page import write_report
from meristem.platform.report.pictures import Pictures, pick_cases
from meristem.tasks import pages


def data(stored: np.ndarray, spacing: tuple[float, ...], affine: np.ndarray | None = None, cases: int = 12) -> Data:
    """Samples that all look alike."""
    c = len(stored)
    matrix = np.diag([*spacing, 1.0]) if affine is None else affine
    header = Header(stored.shape, tuple(map(tuple, matrix.tolist())), spacing, (1.0,) * c, (0.0,) * c, (0.0,) * c, {})
    rows = [SimpleNamespace(case=f"case-{i:03d}", index=i) for i in range(cases)]
    return cast(Data, SimpleNamespace(manifest=SimpleNamespace(rows=rows),
                                      cache=SimpleNamespace(header=lambda i: header, array=lambda i: stored)))


def looks(scoring: str) -> Data:
    rng = np.random.default_rng(0)
    if scoring == "coco":
        return data(rng.random((3, 256, 256)), (1.0, 1.0))
    if scoring == "volume":
        return data(rng.random((1, 96, 48, 96)), (1.0, 2.0, 1.0))
    if scoring == "temporal":
        return data(np.zeros((3, 480, 4, 4)), (0.25, 1.0, 1.0))
    return data(60 * rng.random((4, 500)), (1.0, 1.0, 1.0))


@pytest.mark.parametrize("scoring", list(WIDTHS))
def test_page_of_detections_holds_the_summarys_numbers(scoring: str, tmp_path: Path) -> None:
    results = study(scoring, cases=10, seeds=1, budgets=(5,))
    scenes = pages._scenes(results, looks(scoring))
    kept = Pictures.load(Pictures(scenes=scenes).save(tmp_path / "pictures.npz"))
    page = Page(write_report(results, kept, [], tmp_path))
    summary = json.loads((tmp_path / "report.json").read_text())["reports"][0]["summary"]
    rows = {(r["arm"], r["metric"]): r for r in summary["rows"]}
    shown = {(row[0], head): value for row in page.table("per-class")[1:] for head, value in
             zip(page.table("per-class")[0][2:], row[2:], strict=True)}
    label = figures.metric_label(results, results.metric)
    for name in CLASSES:
        value, low, high = rows["mae", results.metric]["classes"][name]
        assert shown[name, f"{label}, mae"] == (f"{value:.3f} [{low:.3f}, {high:.3f}]" if low is not None else f"{value:.3f}")
    counts = np.zeros(3, int)
    for case in results.cells[0].cases:
        assert case.truth is not None
        np.add.at(counts, [k for k, ignored in zip(case.truth.label, case.truth.ignore, strict=True) if not ignored], 1)
    assert [row[1] for row in page.table("per-class")[1:]] == [str(n) for n in counts]
    groups = page.table("per-group")[1:] if scoring in SPLITS else []
    assert [row[0] for row in groups if row[0]] == list(SPLITS.get(scoring, ()))

    alts = " ".join(str(a["alt"]) for a in page.of("img"))
    assert all(f"Precision against recall, {name}" in alts for name in CLASSES)
    assert ("Sensitivity against false alarms" in alts) == (scoring in ("coco", "volume"))
    assert "What was found" in page.text and "every dot is one test case" in page.text and "A hit overlaps" in page.text
    told = r"(worst|median|best) case case-\d+, (scratch|mae), F1 [\d.]+: \d+ hits?, \d+ missed, \d+ false alarm"
    assert len(set(re.findall(told, alts))) == 6


def test_a_case_is_shown_with_all_that_was_hit_missed_and_wrong() -> None:
    results = study("coco", cases=10, seeds=1, budgets=(5,))
    for scene in pages._scenes(results, looks("coco")):
        assert scene.case == pick_cases(results, "finetune", 5)[scene.rank]
        for arm, marks in scene.marks.items():
            case = next(k for c in results.cells if c.arm == arm for k in c.cases if k.case == scene.case)
            assert case.truth is not None and case.found is not None
            hits, missed, wrong = ((marks[:, -1] == state).sum() for state in (HIT, MISSED, FALSE))
            assert hits + missed == len(case.truth.label) - sum(case.truth.ignore) > 0
            assert scene.scores[arm] == pytest.approx(2 * hits / (2 * hits + missed + wrong))
            for mark in marks[marks[:, -1] == FALSE]:  # left, top, right, bottom of rows and columns
                assert tuple(mark[[1, 0, 3, 2]]) in case.found.box


def one_object(results: Results, box: tuple[float, ...], scoring: str) -> Results:
    """Every arm finds the one object there is."""
    case = Case(case="case-000", subject="sub-000", truth=Boxes(box=(box,), label=(1,)),
                found=Boxes(box=(box,), label=(1,), score=(0.7,)))
    return results.model_copy(update={"scoring": scoring, "cells": tuple(
        c.model_copy(update={"cases": (case,)}) for c in results.cells)})


@pytest.mark.parametrize("scoring, box, spacing, shape", [
    ("coco", (5.0, 12.0, 9.0, 30.0), (0.5, 1.5), (30, 40)),
    ("volume", (4.0, 3.0, 20.0, 10.0, 6.0, 35.0), (2.0, 0.5, 5.0), (9, 20, 11))])
def test_a_box_is_drawn_around_its_object(scoring: str, box: tuple[float, ...], spacing: tuple[float, ...],
                                          shape: tuple[int, ...]) -> None:
    stored, dims = np.zeros((1, *shape)), len(shape)
    first, last = ((np.array(b) / spacing).round().astype(int) for b in (box[:dims], box[dims:]))
    stored[(0, *(slice(a, b) for a, b in zip(first, last, strict=True)))] = 1
    results = one_object(study(scoring, cases=2, seeds=1, budgets=(5,)), box, scoring)
    scene = pages._scenes(results, data(stored, spacing))[0]
    left, top, right, bottom = (round(float(x)) for x in scene.marks["mae"][0][:4])
    inside = np.zeros(scene.backdrop.shape, bool)
    inside[top:bottom, left:right] = True
    assert np.array_equal(inside, scene.backdrop == 1) and inside.any()
    assert set(scene.marks["mae"][:, -1]) >= {HIT}


def test_points_are_seen_from_above_in_the_boxes_own_metres() -> None:
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    affine[:3, 3] = (10, -4, 1)
    rng = np.random.default_rng(0)
    box = (12.0, -3.0, 1.0, 4.0, 2.0, 1.0, np.pi / 2)  # its length runs along y
    metres = np.array(box[:3]) + rng.uniform(-0.5, 0.5, (50, 3)) * (2.0, 4.0, 1.0)
    stored = ((metres - affine[:3, 3]) / 2).T
    results = one_object(study("room", cases=2, seeds=1, budgets=(5,)), box, "room")
    scene = pages._scenes(results, data(stored, (1.0,) * 3, affine))[0]
    corners = figures._footprint(scene.marks["mae"][0][:5])[1:5]
    assert scene.backdrop == pytest.approx(metres[:, :2], abs=1e-5)
    assert corners.min(0) == pytest.approx((11, -5)) and corners.max(0) == pytest.approx((13, -1))
    assert (scene.backdrop >= corners.min(0)).all() and (scene.backdrop <= corners.max(0)).all()


def test_cases_with_nothing_to_find_are_not_picked() -> None:
    made = study("temporal", cases=6, seeds=1, budgets=(5,))
    empty = Boxes(box=(), label=())

    def emptied(case: Case, i: int) -> Case:
        return case.model_copy(update={"truth": empty, "found": empty}) if i % 2 else case

    results = made.model_copy(update={"cells": tuple(c.model_copy(update={"cases": tuple(
        emptied(case, i) for i, case in enumerate(c.cases))}) for c in made.cells)})
    objects: dict[str, Any] = {case.case: case.truth for case in results.cells[0].cases}
    assert all(objects[case].label for case in pick_cases(results, "finetune", 5).values())


def test_folds_keep_the_pictures_of_the_cases_that_are_extreme_in_all(tmp_path: Path) -> None:
    whole = study("coco", cases=12, seeds=1, budgets=(5,))
    for name, part in (("a", slice(0, 6)), ("b", slice(6, 12))):
        (tmp_path / name).mkdir()
        fold = whole.model_copy(update={"cells": tuple(c.model_copy(update={"cases": c.cases[part]}) for c in whole.cells)})
        fold.save(tmp_path / name / "results.json")
        Pictures(scenes=pages._scenes(fold, looks("coco"))).save(tmp_path / name / "pictures.npz")
    pages._pool([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    picked = pick_cases(Results.load(tmp_path / "out" / "results.json"), "finetune", 5)
    kept = {scene.rank: scene.case for scene in Pictures.load(tmp_path / "out" / "pictures.npz").scenes}
    assert picked == pick_cases(whole, "finetune", 5)
    assert kept.items() <= picked.items() and kept
