"""Metrics of detection: what was found is matched to what is true, case by case; figures of the set take case weights.

One rule of matching serves all (Lin et al. 2014, as COCO's own evaluation has it): of one class, the surest first, a found box
takes the true one it overlaps most of those that are left and that it overlaps enough. Ignored truths come last; one that is an
ignored region (`Boxes.ignore`) may be taken by many, and overlaps a box by the share of the box that it covers. What took an
ignored truth counts nowhere. At most 100 boxes of a class are looked at in a case.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array

from meristem.platform.boxes import iou

Array = NDArray[Any]

MOST = 100
RATES = {"1/8": 0.125, "1/4": 0.25, "1/2": 0.5, "1": 1.0, "2": 2.0, "4": 4.0, "8": 8.0}  # false alarms per case (LUNA16)
USUAL = 0.5  # overlap of a class for which none is stated
_CHUNK = 1_000_000  # elements of a table of found boxes and resamples held at once
_KEPT = 6000  # curves' values in all resamples that a group remembers
HIT, FALSE, NEITHER = 1, 0, -1  # what was found
MISSED, MET = 2, 3  # what is true


class Objects(Protocol):
    """As `results.Boxes`."""

    @property
    def box(self) -> tuple[tuple[float, ...], ...]: ...
    @property
    def label(self) -> tuple[int, ...]: ...
    @property
    def score(self) -> tuple[float, ...]: ...
    @property
    def ignore(self) -> tuple[bool, ...]: ...
    @property
    def level(self) -> tuple[int, ...]: ...
    @property
    def size(self) -> tuple[float, ...]: ...


@dataclass(frozen=True)
class Figure:
    """One metric, for each class.

    kind: mean precision over recalls, recall of all that was looked at, or sensitivity at rates of false alarms. overlaps: over
    which it is the mean; () for each class's own. recalls: at which precision is read off its envelope; () for the area under
    all of it. size: of the true objects that are sought, both ends in. level: the hardest that is sought. by: what overlaps:
    boxes, their ground plans, or masks.
    """

    kind: Literal["precision", "recall", "froc"] = "precision"
    overlaps: tuple[float, ...] = ()
    recalls: tuple[float, ...] = ()
    rates: tuple[str, ...] = tuple(RATES)
    size: tuple[float, float] = (0.0, np.inf)
    level: int | None = None
    by: Literal["box", "plan", "mask"] = "box"


def _steps(first: float, last: float, count: int) -> tuple[float, ...]:
    return tuple(np.linspace(first, last, count).tolist())


_HUNDRED = _steps(0, 1, 101)  # COCO's
_FORTY = _steps(1 / 40, 1, 40)  # KITTI's since Simonelli et al. 2019, who left out recall 0
_COCO = _steps(0.5, 0.95, 10)
_VOLUME = _steps(0.1, 0.5, 9)  # Baumgartner et al. 2021: volumes are found, not outlined
_TEMPORAL = _steps(0.3, 0.7, 5)  # THUMOS14
_SMALL, _LARGE = 32.0**2, 96.0**2


def _froc(overlap: float) -> dict[str, Figure]:
    return {"froc": Figure("froc", (overlap,))}


SCORINGS: dict[str, dict[str, Figure]] = {  # how a data set of a kind is scored; the primary metric first
    "coco": {"ap": Figure(overlaps=_COCO, recalls=_HUNDRED), "ap50": Figure(overlaps=(0.5,), recalls=_HUNDRED),
             "ap75": Figure(overlaps=(0.75,), recalls=_HUNDRED),
             "ap small": Figure(overlaps=_COCO, recalls=_HUNDRED, size=(0.0, _SMALL)),
             "ap medium": Figure(overlaps=_COCO, recalls=_HUNDRED, size=(_SMALL, _LARGE)),
             "ap large": Figure(overlaps=_COCO, recalls=_HUNDRED, size=(_LARGE, np.inf)),
             "ar100": Figure("recall", _COCO), **_froc(0.5),
             "mask ap": Figure(overlaps=_COCO, recalls=_HUNDRED, by="mask"),
             "mask ap50": Figure(overlaps=(0.5,), recalls=_HUNDRED, by="mask")},
    "volume": {"map": Figure(overlaps=_VOLUME, recalls=_HUNDRED), "ap10": Figure(overlaps=(0.1,), recalls=_HUNDRED),
               "ap50": Figure(overlaps=(0.5,), recalls=_HUNDRED), **_froc(0.1),
               **{f"sensitivity@{name}": Figure("froc", (0.1,), rates=(name,)) for name in RATES}},
    "kitti": {"ap40": Figure(recalls=_FORTY, level=1), "ap40 bev": Figure(recalls=_FORTY, level=1, by="plan"),
              "ap40 easy": Figure(recalls=_FORTY, level=0), "ap40 hard": Figure(recalls=_FORTY, level=2)},
    "room": {"ap50": Figure(overlaps=(0.5,)), "ap25": Figure(overlaps=(0.25,))},  # all points: VOC 2010 (Everingham et al.)
    "temporal": {"tmap": Figure(overlaps=_TEMPORAL), **{f"tmap@{x:g}": Figure(overlaps=(x,)) for x in _TEMPORAL}}}
SHOWN: dict[str, Figure] = {  # by what the page says which boxes are right, and draws its curves
    "coco": SCORINGS["coco"]["ap50"], "volume": SCORINGS["volume"]["ap10"], "kitti": SCORINGS["kitti"]["ap40"],
    "room": SCORINGS["room"]["ap25"], "temporal": SCORINGS["temporal"]["tmap@0.5"]}
SPLITS = {"coco": {"small": "ap small", "medium": "ap medium", "large": "ap large"},  # by what objects are told apart
          "kitti": {"easy": "ap40 easy", "moderate": "ap40", "hard": "ap40 hard"}}


def overlaps(found: Array, true: Array, ignored: Array, plan: bool = False) -> Array:
    """(M, K) intersection over union of boxes found (M, n) and true (K, n); over the found box where a true one is ignored.

    n: 2 segments, 4 and 6 along the axes of a lattice, lower corner first; 7 turned, as in `platform.boxes`. plan: of their
    ground plans.
    """
    if not len(found) or not len(true):
        return np.zeros((len(found), len(true)))
    own, other = sizes(found, plan), sizes(true, plan)
    both = own[:, None] + other
    if found.shape[1] == 7:
        share = iou(torch.from_numpy(found), torch.from_numpy(true))[int(plan)].double().numpy()
        common = share * both / (1 + share)
    else:
        dims = found.shape[1] // 2
        low, high = np.maximum(found[:, None, :dims], true[:, :dims]), np.minimum(found[:, None, dims:], true[:, dims:])
        common = np.clip(high - low, 0, None).prod(-1)
        share = common / np.where(both > common, both - common, 1)
    return np.asarray(np.where(ignored, common / np.where(own > 0, own, 1)[:, None], share))


def sizes(box: Array, plan: bool = False) -> Array:
    """(K,) length, area or volume of boxes (K, n)."""
    if box.shape[1] == 7:
        return np.asarray(box[:, 3:5 if plan else 6].clip(0).prod(1))
    return np.asarray(np.diff(box.reshape(len(box), 2, box.shape[1] // 2), axis=1)[:, 0].clip(0).prod(1))


def match(overlap: Array, threshold: float, ignored: Array, shared: Array) -> Array:
    """(M,) number of the true object that each found one takes, or −1.

    overlap: (M, K), the surest first. ignored: (K,) those taken only by what can take no other. shared: (K,) those that any
    number may take.
    """
    taken = np.full(len(overlap), -1)
    bound, order = min(threshold, 1 - 1e-10), np.argsort(ignored, kind="stable")
    near, left = overlap[:, order] >= bound, np.ones(overlap.shape[1], bool)
    for i in np.flatnonzero(near.any(1)).tolist():
        best, most = -1, bound
        for k in order[near[i]].tolist():
            if not left[k]:
                continue
            if best >= 0 and ignored[k] and not ignored[best]:
                break
            if overlap[i, k] >= most:
                best, most = k, overlap[i, k]
        taken[i] = best
        if best >= 0:
            left[best] = shared[best]
    return taken


@dataclass(frozen=True)
class Curve:
    """What was found of one class at one overlap in all cases, by falling score.

    owner: (n,) its case. hit: (n,) bool. score: (n,). truths: (cases,) how many are sought in each.
    """

    owner: Array
    hit: Array
    score: Array
    truths: Array

    def precision(self, weight: Array, recalls: Sequence[float]) -> Array:
        """(R,) mean of the envelope of precision, under case weights (R, cases); NaN where nothing is sought.

        The envelope at a recall is the highest precision at that recall or above; it can only rise at a hit.
        """
        at, total = np.flatnonzero(self.hit), weight @ self.truths
        hits, seen = self._sums(self.hit, at, weight), self._sums(np.ones_like(self.hit), at, weight)
        recall = hits / np.where(total > 0, total, 1)
        envelope = hits / np.where(seen > 0, seen, 1)
        _accumulate(np.maximum, envelope[::-1])
        passed = _passed(np.array(recalls), recall) / len(recalls) if len(recalls) else recall
        return np.where(total > 0, (envelope * np.diff(passed, axis=0, prepend=0.0)).sum(0), np.nan)

    def envelope(self, grid: Array) -> Array:
        """The highest precision at each recall of a grid or above; 0 beyond the last that is reached."""
        hits = np.cumsum(self.hit)
        precision = np.append(hits / np.arange(1, len(hits) + 1), 0.0)
        return np.asarray(np.maximum.accumulate(precision[::-1])[::-1][np.searchsorted(hits / self.truths.sum(), grid)])

    def recall(self, weight: Array) -> Array:
        """(R,) share of what is sought that is found; NaN where nothing is."""
        total = weight @ self.truths
        found = weight @ np.bincount(self.owner[self.hit], minlength=len(self.truths))
        return np.where(total > 0, found / np.where(total > 0, total, 1), np.nan)

    def sensitivity(self, weight: Array, rates: Sequence[float] | Array) -> Array:
        """(R, rates) share of what is sought that is found at so many false alarms per case.

        Linear between the points of the curve, which are at distinct scores, and level beyond the last, as LUNA16 reads it
        (Setio et al. 2017). NaN where nothing is sought.
        """
        last = np.flatnonzero(np.append(np.diff(self.score) != 0, True))[:len(self.score)]
        step, found = max(1, _CHUNK // max(len(last), 1)), np.zeros((len(weight), len(rates)))
        for start in range(0, len(weight), step):
            some = weight[start:start + step]
            hits, wrong = (np.pad(self._sums(mark, last, some), ((1, 0), (0, 0))) for mark in (self.hit, ~self.hit))
            limits = np.multiply.outer(rates, some.sum(1))
            for j, limit in enumerate(limits):
                next_ = (wrong <= limit + 1e-9).sum(0)
                before, after = (np.clip(i, 0, len(last))[None] for i in (next_ - 1, next_))
                low, high, one, two = (np.take_along_axis(x, i, 0)[0] for x in (wrong, hits) for i in (before, after))
                part = np.clip((limit - low) / np.where(high > low, high - low, 1), 0, 1)
                found[start:start + step, j] = one + part * (two - one)
        total = weight @ self.truths
        return np.where(total[:, None] > 0, found / np.where(total > 0, total, 1)[:, None], np.nan)

    def _sums(self, marked: Array, places: Array, weight: Array) -> Array:
        """(places, R) weight of the marked ones up to each place."""
        stretch = np.searchsorted(places, np.arange(len(marked)))
        kept = marked & (stretch < len(places))
        count = csr_array((np.ones(kept.sum()), (stretch[kept], self.owner[kept])), (len(places), len(self.truths)))
        return _accumulate(np.add, count @ np.ascontiguousarray(weight.T))


def _accumulate(by: np.ufunc, table: Array) -> Array:
    """Of the rows, in place; several times as fast as numpy's own along the first axis."""
    for one, two in itertools.pairwise(table):
        by(one, two, out=two)
    return table


def _passed(grid: Array, value: Array) -> Array:
    """How many of an evenly spaced grid, rising, are no more than each value; a search that vectorises."""
    guess = np.clip((value - grid[0]) * ((len(grid) - 1) / (grid[-1] - grid[0])) + 1, 0, len(grid)).astype(int)
    edges = np.concatenate([[-np.inf], grid, [np.inf]])
    return np.asarray(guess - (edges[guess] > value) + (edges[guess + 1] <= value))


@dataclass
class Pair:
    """The found and the true objects of one class in one case, the surest first."""

    box: Array
    score: Array
    true: Array
    ignore: Array
    level: Array
    size: Array
    masks: Array | None
    rows: Array
    columns: Array
    made: dict[str, Array] = field(default_factory=dict)

    @classmethod
    def of(cls, found: Objects, true: Objects, masks: Array | None, label: int) -> Pair:
        rows = np.flatnonzero(np.array(found.label, int) == label)
        score = np.array(found.score, float)[rows]
        order = np.argsort(-score, kind="stable")[:MOST]
        rows, score, columns = rows[order], score[order], np.flatnonzero(np.array(true.label, int) == label)
        width = max((len(b) for b in (*found.box[:1], *true.box[:1])), default=2)
        box, other = (np.array(x.box, float).reshape(-1, width)[i] for x, i in ((found, rows), (true, columns)))
        n = len(true.label)
        size = np.array(true.size, float)[columns] if true.size else sizes(other)
        return cls(box, score, other, np.array(true.ignore or (False,) * n, bool)[columns],
                   np.array(true.level or (0,) * n, int)[columns], size,
                   None if masks is None else masks[np.ix_(rows, columns)], rows, columns)

    def overlap(self, by: str) -> Array:
        if by == "mask":
            assert self.masks is not None
            return self.masks
        if by not in self.made:
            self.made[by] = overlaps(self.box, self.true, self.ignore, by == "plan")
        return self.made[by]

    def unsought(self, figure: Figure) -> Array:
        """(K,) the true ones that a figure ignores."""
        low, high = figure.size
        level = np.zeros(len(self.level), bool) if figure.level is None else self.level > figure.level
        return np.asarray(self.ignore | level | (self.size < low) | (self.size > high))

    def states(self, figure: Figure, threshold: float) -> tuple[Array, Array]:
        """(M,) HIT, FALSE or NEITHER of each found object, and (M,) the true one it took or −1."""
        ignored, overlap = self.unsought(figure), self.overlap(figure.by)
        taken = match(overlap, threshold, ignored, self.ignore)
        state = np.where(taken < 0, FALSE, np.where(np.append(ignored, False)[taken], NEITHER, HIT))
        if figure.size != (0.0, np.inf):
            own = sizes(self.box)
            state[(taken < 0) & ((own < figure.size[0]) | (own > figure.size[1]))] = NEITHER
        if figure.kind == "froc":  # what hits an object once more is no alarm
            state[(taken < 0) & (overlap[:, ~ignored] >= threshold).any(1)] = NEITHER
        return state, taken


class Detected(Protocol):
    """As `results.Case`."""

    @property
    def truth(self) -> Objects | None: ...
    @property
    def found(self) -> Objects | None: ...
    @property
    def overlap(self) -> tuple[tuple[float, ...], ...]: ...


class Detections:
    """What was found and what is true in the cases of a group, and the metrics of the set.

    cases: of each seed, in one order. own: class -> overlap from which on one of it is right, where classes differ in that.
    """

    def __init__(self, cases: Sequence[Sequence[Detected]], classes: Sequence[str], scoring: str,
                 own: Mapping[str, float]) -> None:
        self.cases, self.classes, self.scoring, self.own = cases, tuple(classes), scoring, own
        self._curves: dict[tuple[object, ...], Curve] = {}
        self._values: dict[tuple[object, ...], Array] = {}  # the same resamples are drawn for a mean, its classes, a difference

    @cached_property
    def metrics(self) -> list[str]:
        """The names of those that these cases have, the primary one first."""
        masks = any(case.overlap for seed in self.cases for case in seed)
        return [name for name, figure in SCORINGS[self.scoring].items() if figure.by != "mask" or masks]

    @cached_property
    def pairs(self) -> list[list[list[Pair]]]:
        """By seed, class and case."""
        def of(case: Detected, label: int) -> Pair:
            assert case.found is not None and case.truth is not None
            shape = len(case.found.label), len(case.truth.label)
            return Pair.of(case.found, case.truth, np.array(case.overlap, float).reshape(shape) if case.overlap else
                           np.zeros(shape), label)

        return [[[of(case, label) for case in seed] for label in range(len(self.classes))] for seed in self.cases]

    @property
    def counts(self) -> list[int]:
        """How many true objects there are of each class, but for ignored ones."""
        return [sum(int((~pair.ignore).sum()) for pair in pairs) for pairs in self.pairs[0]]

    def thresholds(self, figure: Figure, label: int) -> tuple[float, ...]:
        return figure.overlaps or (self.own.get(self.classes[label], USUAL),)

    def curve(self, figure: Figure, seed: int, label: int, threshold: float) -> Curve:
        """What a figure is read off at one overlap."""
        key = figure.kind == "froc", figure.size, figure.level, figure.by, seed, label, threshold
        if key not in self._curves:
            pairs = self.pairs[seed][label]
            truths = np.array([(~pair.unsought(figure)).sum() for pair in pairs], float)
            owner = np.repeat(np.arange(len(pairs)), [len(pair.score) for pair in pairs])
            score = np.concatenate([pair.score for pair in pairs])
            state = np.concatenate([pair.states(figure, threshold)[0] for pair in pairs])
            order = np.argsort(-score, kind="stable")
            order = order[state[order] != NEITHER]
            self._curves[key] = Curve(owner[order], state[order] == HIT, score[order], truths)
        return self._curves[key]

    def values(self, name: str, weight: Array) -> Array:
        """(seeds, R, classes) a metric under case weights (R, cases); NaN for a class of which nothing is sought."""
        figure, drawn = SCORINGS[self.scoring][name], hash((weight.shape, weight.tobytes()))

        def at(seed: int, label: int, threshold: float) -> Array:
            key = figure.kind, figure.recalls, figure.size, figure.level, figure.by, seed, label, threshold, drawn
            if key not in self._values:
                if len(self._values) >= _KEPT:
                    self._values.clear()
                curve = self.curve(figure, seed, label, threshold)
                self._values[key] = curve.sensitivity(weight, tuple(RATES.values())) if figure.kind == "froc" else \
                    curve.recall(weight) if figure.kind == "recall" else curve.precision(weight, figure.recalls)
            found = self._values[key]
            return found[:, [*map([*RATES].index, figure.rates)]].mean(1) if figure.kind == "froc" else found

        return np.stack([np.stack([np.mean([at(seed, label, t) for t in self.thresholds(figure, label)], axis=0)
                                   for label in range(len(self.classes))], -1) for seed in range(len(self.cases))])

    def value(self, name: str, weight: Array, label: int | None = None) -> Array:
        """(seeds, R) the mean over the classes of which something is sought, or of one class."""
        each = self.values(name, weight)
        if label is not None:
            return np.asarray(each[..., label])
        known = ~np.isnan(each)
        with np.errstate(invalid="ignore"):
            return np.asarray(np.where(known, each, 0.0).sum(-1) / known.sum(-1))

    def __add__(self, other: Detections) -> Detections:
        """The cases of both, as different ones."""
        cases = [[*a, *b] for a, b in zip(self.cases, other.cases, strict=True)]
        return Detections(cases, self.classes, self.scoring, self.own)

    # ---- single cases

    def cut(self, seed: int) -> float:
        """The score from which on what was found gives the best F1 over the set, all classes together; inf where none does."""
        figure = SHOWN[self.scoring]
        curves = [self.curve(figure, seed, i, self.thresholds(figure, i)[0]) for i in range(len(self.classes))]
        score, hit = (np.concatenate([getattr(c, name) for c in curves]) for name in ("score", "hit"))
        order = np.argsort(-score, kind="stable")
        last = np.flatnonzero(np.append(np.diff(score[order]) != 0, True))[:len(score)]
        f1 = 2 * np.cumsum(hit[order])[last] / (last + 1 + sum(c.truths.sum() for c in curves)) if len(score) else np.zeros(0)
        return float(score[order][last[f1.argmax()]]) if len(f1) and f1.max() > 0 else np.inf

    def marks(self, seed: int, case: int) -> tuple[Array, Array]:
        """Of one case, found objects (…, 3) from the score `cut` on and true ones (…, 3) that are sought, of all classes.

        Each by its number in `Case.found` or `Case.truth`, its label, and HIT or FALSE, or MET or MISSED.
        """
        figure, cut = SHOWN[self.scoring], self.cut(seed)
        found, true = [np.zeros((0, 3), int)], [np.zeros((0, 3), int)]
        for label in range(len(self.classes)):
            pair = self.pairs[seed][label][case]
            state, taken = pair.states(figure, self.thresholds(figure, label)[0])
            shown, met = pair.score >= cut, np.full(len(pair.columns), MISSED)
            met[taken[shown & (taken >= 0)]] = MET
            for told, rows, states, kept in ((found, pair.rows, state, shown & (state != NEITHER)),
                                             (true, pair.columns, met, ~pair.unsought(figure))):
                told.append(np.stack([rows, np.full(len(rows), label), states], 1)[kept])
        return np.concatenate(found), np.concatenate(true)

    def f1(self) -> Array:
        """(seeds, cases) 2 · hits / (found + true) of each case from the score `cut` on, 1 where neither is anything."""
        table = np.zeros((len(self.cases), len(self.cases[0])))
        for seed, case in np.ndindex(*table.shape):
            found, true = self.marks(seed, case)
            below = len(found) + len(true)
            table[seed, case] = 2 * (found[:, 2] == HIT).sum() / below if below else 1.0
        return table


def figures(cases: Sequence[Detected], classes: Sequence[str], scoring: str, own: Mapping[str, float]
            ) -> dict[str, dict[str, float]]:
    """Of one seed's cases: metric -> {"": over all classes, class: of it alone}; what is undefined is NaN."""
    made, once = Detections([cases], classes, scoring, own), np.ones((1, len(cases)))
    return {name: {"": float(made.value(name, once)[0, 0]), **dict(zip(classes, made.values(name, once)[0, 0].tolist(),
                                                                       strict=True))} for name in made.metrics}
