"""Detections are scored as the field's own evaluations do: COCO's against pycocotools, the others against loops."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from made_detections import CLASSES, REACH, WIDTHS, boxes, case, study
from pycocotools import mask as coded
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from meristem.modalities.objects import Objects, Raster
from meristem.platform.boxes import iou
from meristem.platform.evaluation.detection import HIT, MET, MISSED, RATES, Detections, figures, overlaps
from meristem.platform.evaluation.folds import pooled
from meristem.platform.evaluation.results import Boxes, Case, Results, join, summarise
from meristem.tasks.base import TaskSettings
from meristem.tasks.detection import _mask_overlap
from meristem.tasks.detectors import Boxed
from meristem.tasks.finetune import mean_scores


def many(scoring: str, seed: int, cases: int = 8, most: int = 6, classes: int = 3, alarms: int = 5) -> list[Case]:
    rng = np.random.default_rng(seed)
    return [case(f"c{i:02d}", f"s{i:02d}", scoring, 1000 * seed + i, rng, rng.random(), most, classes, alarms)
            for i in range(cases)]


def found_by_coco(cases: Sequence[Case], classes: int) -> COCOeval:
    def square(box: Sequence[float]) -> list[float]:
        return [box[0], box[1], box[2] - box[0], box[3] - box[1]]

    truths = [(i, *t) for i, c in enumerate(cases) if c.truth
              for t in zip(c.truth.box, c.truth.label, c.truth.ignore, c.truth.size, strict=True)]
    found = [{"image_id": i + 1, "category_id": k + 1, "score": s, "bbox": square(b)} for i, c in enumerate(cases) if c.found
             for b, k, s in zip(c.found.box, c.found.label, c.found.score, strict=True)]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {"images": [{"id": i + 1} for i in range(len(cases))],
                         "categories": [{"id": k + 1} for k in range(classes)],
                         "annotations": [{"id": n + 1, "image_id": i + 1, "category_id": k + 1, "iscrowd": int(crowd),
                                          "area": size, "bbox": square(b)} for n, (i, b, k, crowd, size) in enumerate(truths)]}
        truth.createIndex()
        made = COCOeval(truth, truth.loadRes(found), "bbox")
        made.evaluate()
        made.accumulate()
        made.summarize()
    return made


@pytest.mark.parametrize("seed", range(12))
def test_coco_metrics_are_those_of_pycocotools(seed: int) -> None:
    rng = np.random.default_rng(seed)
    cases = many("coco", seed, alarms=8 if seed else 260)  # seed 0: more than are looked at
    masked = [c.model_copy(update={"truth": c.truth.model_copy(update={"size": tuple(  # a mask is smaller than its box
        float(rng.uniform(0.4, 1)) * (b[2] - b[0]) * (b[3] - b[1]) for b in c.truth.box)})}) for c in cases if c.truth]
    theirs = found_by_coco(masked, 3)
    mine = figures(masked, CLASSES, "coco", {})
    names = ("ap", "ap50", "ap75", "ap small", "ap medium", "ap large", "ar100")
    expected = np.where(theirs.stats[[0, 1, 2, 3, 4, 5, 8]] < 0, np.nan, theirs.stats[[0, 1, 2, 3, 4, 5, 8]])
    assert [mine[name][""] for name in names] == pytest.approx(expected.tolist(), abs=1e-6, nan_ok=True)
    for k, name in enumerate(CLASSES):
        precision = theirs.eval["precision"][:, :, k, 0, 2]
        assert mine["ap"][name] == pytest.approx(precision.mean() if precision.max() >= 0 else np.nan, abs=1e-6, nan_ok=True)


def test_a_crowd_may_be_found_many_times_and_counts_nowhere() -> None:
    crowd = Boxes(box=((0, 0, 100, 100), (200, 200, 220, 220)), label=(0, 0), ignore=(True, False))
    found = Boxes(box=((10, 10, 20, 20), (40, 40, 60, 60), (200, 200, 220, 220)), label=(0, 0, 0), score=(0.9, 0.8, 0.1))
    assert figures([Case(case="a", subject="a", truth=crowd, found=found)], ("x",), "coco", {})["ap"][""] == pytest.approx(1)


# ---- weights

@pytest.mark.parametrize("scoring", list(WIDTHS))
def test_a_weight_of_two_is_the_case_twice(scoring: str) -> None:
    rng = np.random.default_rng(0)  # no score twice: of equal ones the order decides, as it does in COCO's evaluation
    cases = [c.model_copy(update={"found": c.found.model_copy(update={"score": tuple(rng.random(len(c.found.score)))})})
             for c in many(scoring, 3, cases=6) if c.found]
    weight = np.array([2, 0, 1, 3, 0, 1])
    repeated = [c for c, n in zip(cases, weight, strict=True) for _ in range(n)]
    whole = Detections([cases], CLASSES, scoring, {})
    alone = figures(repeated, CLASSES, scoring, {})
    for name in whole.metrics:
        weighted = whole.values(name, np.stack([np.ones(6), weight]))[0, 1]
        assert weighted == pytest.approx([alone[name][c] for c in CLASSES], nan_ok=True)


# ---- one rule at a time, by loops

def greedy(cases: Sequence[Case], label: int, threshold: float, share, skip=lambda case, k: False) -> tuple[list, int]:
    """(score, hit) of what counts, by falling score, and how many are sought; truths that `skip` names may be taken unseen."""
    told, sought = [], 0
    for c in cases:
        assert c.truth and c.found
        true = [k for k, x in enumerate(c.truth.label) if x == label]
        sought += sum(not skip(c, k) for k in true)
        free = set(true)
        for i in sorted((i for i, x in enumerate(c.found.label) if x == label), key=lambda i: -c.found.score[i]):
            best = max(((not skip(c, k), share(c, i, k), k) for k in free if share(c, i, k) >= threshold), default=None)
            if best is None:
                told.append((c.found.score[i], False))
                continue
            free.discard(best[2])
            if best[0]:
                told.append((c.found.score[i], True))
    return sorted(told, key=lambda t: -t[0]), sought


def precisions(told: list, sought: int) -> list[tuple[float, float]]:
    """(recall, precision) after each found box."""
    hits, points = 0, []
    for n, (_, hit) in enumerate(told, 1):
        hits += hit
        points.append((hits / sought, hits / n))
    return points


def bare(cases: Sequence[Case]) -> list[Case]:
    """None of the truths is ignored."""
    return [c.model_copy(update={"truth": c.truth.model_copy(update={"ignore": ()})}) for c in cases if c.truth]


@pytest.mark.parametrize("seed", range(4))
def test_over_time_precision_is_averaged_under_its_envelope(seed: int) -> None:
    cases = bare(many("temporal", seed))

    def share(c: Case, i: int, k: int) -> float:
        (a, b), (s, e) = c.found.box[i], c.truth.box[k]
        common = max(0.0, min(b, e) - max(a, s))
        return common / (b - a + e - s - common)

    told = []
    for threshold in (0.3, 0.4, 0.5, 0.6, 0.7):
        each = []
        for label in range(3):
            points = precisions(*greedy(cases, label, threshold, share)) if any(label in c.truth.label for c in cases) else None
            if points is not None:
                steps = [0.0, *(r for r, _ in points)]
                each.append(sum((r - before) * max(p for _, p in points[i:]) for i, ((r, _), before)
                                in enumerate(zip(points, steps, strict=False))))
        told.append(np.mean(each))
    mine = figures(cases, CLASSES, "temporal", {})
    assert [mine[f"tmap@{t}"][""] for t in (0.3, 0.4, 0.5, 0.6, 0.7)] == pytest.approx(told)
    assert mine["tmap"][""] == pytest.approx(np.mean(told))


@pytest.mark.parametrize("metric, level, plan", [("ap40 easy", 0, 0), ("ap40", 1, 0), ("ap40 hard", 2, 0), ("ap40 bev", 1, 1)])
def test_kitti_reads_forty_recalls_without_what_is_too_hard(metric: str, level: int, plan: int) -> None:
    cases, own = bare(many("kitti", 5, cases=10)), {"car": 0.4, "van": 0.25}
    tables = {c.case: iou(*(torch.tensor(x.box, dtype=torch.float64).reshape(-1, 7) for x in (c.found, c.truth)))[plan]
              for c in cases}

    each = {}
    for label, name in enumerate(CLASSES):
        told, sought = greedy(cases, label, own.get(name, 0.5), lambda c, i, k: float(tables[c.case][i, k]),
                              lambda c, k: c.truth.level[k] > level)
        points = precisions(told, sought)
        each[name] = np.mean([max((p for r, p in points if r >= n / 40), default=0.0) for n in range(1, 41)])
    mine = figures(cases, CLASSES, "kitti", own)[metric]
    assert [mine[c] for c in CLASSES] == pytest.approx(list(each.values()), abs=1e-6)
    assert mine[""] == pytest.approx(np.mean(list(each.values())), abs=1e-6) and 0 < mine[""] < 1


@pytest.mark.parametrize("seed", range(4))
def test_sensitivity_is_read_off_at_false_alarms_per_case(seed: int) -> None:
    """All thresholds tried: at each, hits and alarms are counted; between two, a straight line."""
    cases = bare(many("volume", seed, cases=7, classes=1, alarms=40))
    made = figures(cases, ("nodule",), "volume", {})

    def share(c: Case, i: int, k: int) -> float:
        return float(overlaps(np.array(c.found.box[i:i + 1]), np.array(c.truth.box[k:k + 1]), np.zeros(1, bool))[0, 0])

    points = [(0.0, 0.0)]
    for cut in sorted({s for c in cases for s in c.found.score}, reverse=True):
        hits = alarms = 0
        for c in cases:
            kept = [i for i, s in enumerate(c.found.score) if s >= cut]
            near = {i: {k for k in range(len(c.truth.box)) if share(c, i, k) >= 0.1} for i in kept}
            free = set(range(len(c.truth.box)))
            for i in sorted(kept, key=lambda i: -c.found.score[i]):
                best = max(near[i] & free, key=lambda k: share(c, i, k), default=None)
                free.discard(best)
                hits += best is not None
                alarms += not near[i]
        points.append((alarms / len(cases), hits / sum(len(c.truth.box) for c in cases)))
    x, y = np.array(points).T
    expected = [y[0] if rate < x[0] else float(np.interp(rate, x, y)) for rate in RATES.values()]
    assert [made[f"sensitivity@{rate}"][""] for rate in RATES] == pytest.approx(expected)
    assert made["froc"][""] == pytest.approx(np.mean(expected)) and len({round(e, 3) for e in expected}) > 2


def test_masks_are_scored_by_their_own_overlap() -> None:
    truth = Boxes(box=((0, 0, 10, 10), (20, 20, 30, 30)), label=(0, 0))
    found = Boxes(box=((0, 0, 10, 10), (20, 20, 30, 30)), label=(0, 0), score=(0.9, 0.8))
    told = figures([Case(case="a", subject="a", truth=truth, found=found, overlap=((0.6, 0), (0, 0.4)))], ("x",), "coco", {})
    assert told["ap50"][""] == pytest.approx(1) and told["mask ap50"][""] == pytest.approx(51 / 101)
    assert "mask ap" not in figures([Case(case="a", subject="a", truth=truth, found=found)], ("x",), "coco", {})


def test_masks_overlap_as_pycocotools_has_it_crowds_included() -> None:
    rng = np.random.default_rng(0)
    found, true = rng.random((5, 30, 40)) < 0.4, rng.random((4, 30, 40)) < 0.5
    ignore = np.array([False, True, False, True])
    objects = Objects(np.zeros((4, 4)), np.zeros(4, np.int64), ignore, masks=tuple(Raster(m, (0, 0)) for m in true))
    mine = _mask_overlap(Boxed(torch.zeros(5, 4), torch.zeros(5, dtype=torch.long), torch.zeros(5), torch.from_numpy(found)),
                         objects, (30, 40))
    theirs = coded.iou(*([coded.encode(np.asfortranarray(m.astype(np.uint8))) for m in several] for several in (found, true)),
                       ignore.tolist())
    assert np.array(mine) == pytest.approx(theirs, abs=1e-6)


@pytest.mark.parametrize("width", [2, 4, 6, 7])
def test_overlap_is_the_share_of_random_places(width: int) -> None:
    rng = np.random.default_rng(width)
    a, b = boxes(rng, 1, width, 1.0), boxes(rng, 1, width, 1.0)
    if width == 7:
        a[:, 2:], b[:, 2:] = a[:, 2:] * 0 + 0.5, b[:, 2:] * 0 + 0.6
        a[:, 6], b[:, 6] = 0, np.pi / 2  # quarter turns: still along the axes
        a[:, 3:5], b[:, 3:5] = (0.5, 0.3), (0.2, 0.4)
        a[:, :2], b[:, :2] = 0.4, 0.5
        corner = [np.concatenate([x[0, :3] - half, x[0, :3] + half]) for x, half in
                  ((a, np.array([0.25, 0.15, 0.25])), (b, np.array([0.2, 0.1, 0.3])))]
    else:
        b = a + 0.3 * np.tile(a[:, width // 2:] - a[:, :width // 2], 2)
        corner = [a[0], b[0]]
    dims = len(corner[0]) // 2
    around = np.stack([np.minimum(*corner)[:dims], np.maximum(*corner)[dims:]])
    places = rng.uniform(*around, (100_000, dims))
    one, two = (((places >= c[:dims]) & (places <= c[dims:])).all(1) for c in corner)
    plain, region = (overlaps(a, b, np.array([shared]))[0, 0] for shared in (False, True))
    assert plain == pytest.approx((one & two).sum() / (one | two).sum(), abs=0.01) and 0 < plain < 1
    assert region == pytest.approx((one & two).sum() / one.sum(), abs=0.02)


# ---- single cases

def test_cases_are_marked_at_the_score_of_the_best_f1() -> None:
    cases = bare(many("coco", 2))
    made = Detections([cases], CLASSES, "coco", {})
    cut = made.cut(0)

    def counts(least: float) -> tuple[int, int, int]:
        shown = [c.model_copy(update={"found": Boxes(**{name: tuple(
            x for x, s in zip(getattr(c.found, name), c.found.score, strict=True) if s >= least)
            for name in ("box", "label", "score")})}) for c in cases]
        marks = [Detections([shown], CLASSES, "coco", {}).marks(0, i) for i in range(len(cases))]
        hits = sum(int((found[:, 2] == HIT).sum()) for found, _ in marks)
        return hits, sum(len(f) for f, _ in marks) - hits, sum(int((t[:, 2] == MISSED).sum()) for _, t in marks)

    def f1(least: float) -> float:
        hits, wrong, missed = counts(least)
        return 2 * hits / (2 * hits + wrong + missed)

    scores = sorted({s for c in cases for s in c.found.score})
    assert f1(cut) == pytest.approx(max(map(f1, scores)))
    hits = sum(int((made.marks(0, i)[0][:, 2] == HIT).sum()) for i in range(len(cases)))
    missed = sum(int((made.marks(0, i)[1][:, 2] == MISSED).sum()) for i in range(len(cases)))
    assert hits + missed == sum(len(c.truth.label) for c in cases)
    assert made.f1()[0] == pytest.approx([one_case(made, i) for i in range(len(cases))])


def one_case(made: Detections, i: int) -> float:
    found, true = (x[:, 2].tolist() for x in made.marks(0, i))
    assert found.count(HIT) == true.count(MET)
    precision, recall = (len(x) and x.count(state) / len(x) for x, state in ((found, HIT), (true, MET)))
    return 2 * precision * recall / (precision + recall) if precision + recall else float(not found and not true)


# ---- results

@pytest.fixture(scope="module")
def volumes() -> Results:
    return study("volume", cases=16, seeds=2, budgets=(5,))


def test_summary_holds_the_figures_of_each_seed_and_finds_the_better_arm(volumes: Results) -> None:
    summary = summarise(volumes, replicates=200)
    for arm in ("scratch", "mae"):
        told = [figures(c.cases, CLASSES, "volume", {}) for c in volumes.cells if c.arm == arm]
        for metric in ("map", "ap10", "froc", "sensitivity@1/8", "sensitivity@8"):
            row = summary.row(arm, "finetune", 5, metric)
            assert row is not None and list(row.seeds.values()) == pytest.approx([t[metric][""] for t in told])
            assert row.mean.value == pytest.approx(np.mean([t[metric][""] for t in told]))
            assert row.classes["car"].value == pytest.approx(np.mean([t[metric]["car"] for t in told]))
            assert row.mean.low < row.mean.value < row.mean.high
    (primary,) = summary.primary()
    assert primary.difference.low > 0 and primary.p is not None and primary.p < 0.05
    assert "adds" in summary.verdict[0] and "mAP" in summary.verdict[0]


def test_arms_that_find_the_same_do_not_differ(volumes: Results) -> None:
    scratch = {c.seed: c.cases for c in volumes.cells if c.arm == "scratch"}
    same = volumes.model_copy(update={"cells": tuple(c.model_copy(update={"cases": scratch[c.seed]}) for c in volumes.cells)})
    (primary,) = summarise(same, replicates=100).primary()
    assert primary.difference == pytest.approx((0, 0, 0)) and primary.p == 1


def test_a_run_writes_the_figures_of_the_report(volumes: Results) -> None:
    class Volumes(TaskSettings):
        kind, metric, scoring = "detection", "map", "volume"

    scores = mean_scores(volumes.cells[0].cases, Volumes(), CLASSES)
    group = volumes.group(volumes.cells[:1])
    assert scores["map"] == pytest.approx(group.per_seed("map")[0], abs=1e-6)
    assert scores["froc/van"] == pytest.approx(float(group.statistic("froc", 1)(np.ones((1, 8)))[0]), abs=1e-6)


def test_folds_and_arms_are_put_together(volumes: Results) -> None:
    halves = [volumes.model_copy(update={"cells": tuple(c.model_copy(update={"cases": c.cases[part]}) for c in volumes.cells)})
              for part in (slice(0, 8), slice(8, 16))]
    assert pooled(halves).cells[0].cases == volumes.cells[0].cases
    arms = [volumes.model_copy(update={"cells": tuple(c for c in volumes.cells if c.arm in names)})
            for names in (("scratch",), ("scratch", "mae"))]
    joined = join(*arms)
    assert joined is not None and len(joined.cells) == len(volumes.cells)
    assert join(volumes, volumes.model_copy(update={"overlaps": {"car": 0.7}})) is None


def damaged(scoring: str = "coco", width: int = 4, label: int = 0, score: tuple[float, ...] = (0.5,)) -> Results:
    made = study("coco", cases=2, seeds=1, budgets=(5,))
    one = Case(case="a", subject="a", truth=Boxes(box=(), label=()),
               found=Boxes(box=((0.0,) * width,), label=(label,), score=score))
    return Results.model_validate({**dict(made), "scoring": scoring, "cells": (made.cells[0].model_copy(
        update={"cases": (one,)}),)})


@pytest.mark.parametrize("change, says", [({"scoring": "room"}, "have no ap"), ({"width": 5}, "of 7 numbers"),
                                          ({"label": 3}, "beyond the 3"), ({"score": ()}, "0 scores for 1")])
def test_inconsistent_detections_are_refused(change: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        damaged(**change)
    assert damaged().cells[0].cases[0].case == "a" and REACH
