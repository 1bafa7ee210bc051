"""Made detections of every scoring, whose arms find the better the more they learned."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from meristem.platform.evaluation.detection import SCORINGS
from meristem.platform.evaluation.results import Boxes, Budget, Case, Cell, Counts, Dataset, Results

WIDTHS = {"coco": 4, "volume": 6, "kitti": 7, "room": 7, "temporal": 2}
REACH = {"coco": 256.0, "volume": 96.0, "kitti": 60.0, "room": 8.0, "temporal": 120.0}
CLASSES = ("car", "van", "bicycle")


def boxes(rng: np.random.Generator, count: int, width: int, reach: float) -> NDArray[np.float64]:
    """(count, width) boxes within a cube of that reach."""
    dims = 3 if width == 7 else width // 2
    low, side = rng.uniform(0, 0.8 * reach, (count, dims)), reach * np.exp(rng.uniform(-3.2, -1.2, (count, dims)))
    if width == 7:
        return np.concatenate([low, side, rng.uniform(-np.pi, np.pi, (count, 1))], 1)
    return np.concatenate([low, np.minimum(low + side, reach)], 1)


def shaken(rng: np.random.Generator, box: NDArray[np.float64], amount: float) -> NDArray[np.float64]:
    """The boxes, each moved by that share of its sides."""
    dims = 3 if box.shape[1] == 7 else box.shape[1] // 2
    side = box[:, 3:6] if box.shape[1] == 7 else box[:, dims:] - box[:, :dims]
    shift = rng.normal(0, amount, side.shape) * side
    rest = np.zeros((len(box), 4)) if box.shape[1] == 7 else shift
    return box + np.concatenate([shift, rest], 1)


def case(name: str, subject: str, scoring: str, truth_seed: int, rng: np.random.Generator, skill: float, most: int = 6,
         classes: int = 3, alarms: int = 4) -> Case:
    """Truth drawn by its seed alone, found by the skill of an arm, 0 to 1."""
    width, reach = WIDTHS[scoring], REACH[scoring]
    fixed = np.random.default_rng(truth_seed)
    count = int(fixed.integers(0, most + 1))
    true, label = boxes(fixed, count, width, reach), fixed.integers(0, classes, count)
    ignore, level = fixed.random(count) < 0.1, fixed.integers(0, 4, count)
    seen = np.flatnonzero(rng.random(2 * count) < 0.3 + 0.35 * skill) % max(count, 1)
    found = np.concatenate([shaken(rng, true[seen], 0.25 * (1 - skill) + 0.03),
                            boxes(rng, wrong := int(rng.integers(0, alarms)), width, reach)])
    guess = np.where(rng.random(len(seen)) < 0.9, label[seen], rng.integers(0, classes, len(seen)))
    labels = np.concatenate([guess, rng.integers(0, classes, wrong)]).astype(int)
    score = np.concatenate([rng.beta(4, 2, len(seen)), rng.beta(2, 3, wrong)]).round(2)
    return Case(case=name, subject=subject,
                truth=Boxes(box=true.tolist(), label=label.tolist(), ignore=ignore.tolist(), level=level.tolist()),
                found=Boxes(box=found.tolist(), label=labels.tolist(), score=score.tolist()))


def study(scoring: str, cases: int = 30, seeds: int = 3, skills: tuple[float, float] = (0.3, 0.7), most: int = 6,
          alarms: int = 4, budgets: tuple[int, ...] = (5, 20)) -> Results:
    """Two arms at each budget; two cases of a subject."""
    cells = []
    for n in budgets:
        for arm, init, skill in (("scratch", None, skills[0]), ("mae", "9f2c31ab77de", skills[1])):
            for seed in range(seeds):
                rng = np.random.default_rng([seed, n, len(arm)])
                found = tuple(case(f"case-{i:03d}", f"sub-{i // 2:03d}", scoring, i, rng, min(skill + 0.01 * n, 1), most,
                                   alarms=alarms) for i in range(cases))
                cells.append(Cell(arm=arm, init=init, protocol="finetune", labels=n, labelled_subjects=n, seed=seed,
                                  cases=found, budget=Budget(steps=100, batch=4, trainable=1000, seconds=9.0)))
    return Results(task=f"{scoring} detection", kind="detection", metric=next(iter(SCORINGS[scoring])), classes=CLASSES,
                   scoring=scoring, overlaps={"car": 0.4} if scoring == "kitti" else {}, unit="px", cells=tuple(cells),
                   dataset=Dataset(name="made objects", manifest="0", splits={"test": Counts(subjects=15, cases=cases)}))
