"""The difference page: two reports of one study, before and after, and what changed between them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from meristem.errors import MeristemError
from meristem.platform.evaluation import metrics
from meristem.platform.evaluation.results import (
    PROTOCOLS,
    Labels,
    Model,
    Results,
    Summary,
    difference,
    groups,
    signed,
    summarise,
)
from meristem.platform.evaluation.statistics import REPLICATES, Estimate
from meristem.platform.report import about, figures
from meristem.platform.report.page import render

NAME, DATA = "difference.html", "difference.json"
CHANCE = 0.05  # of intervals that leave zero out where nothing changed


class Change(Model):
    """One figure, after minus before. paired: over the `subjects` that both tested, with the same seeds; else before and after
    are taken as independent, and `subjects` is how many the smaller one tested.
    """

    arm: str
    protocol: str
    labels: Labels
    metric: str
    before: Estimate
    after: Estimate
    difference: Estimate
    paired: bool
    subjects: int

    @property
    def clear(self) -> bool:
        """Whether the interval leaves zero out."""
        return not (math.isnan(self.difference.low) or self.difference.low <= 0 <= self.difference.high)


class Turn(Model):
    """Something that is not as it was: a key of a recipe, the size of a split, a library. None where it was not there."""

    where: str
    what: str
    before: str | None
    after: str | None


class Difference(Model):
    """One study, before and after. gone, new: arms that only one has."""

    task: str
    metric: str
    changes: tuple[Change, ...]
    gone: tuple[str, ...]
    new: tuple[str, ...]
    recipes: tuple[Turn, ...]
    data: tuple[Turn, ...]
    versions: tuple[Turn, ...]
    costs: tuple[Turn, ...]
    no_more: tuple[str, ...]
    warnings: tuple[str, ...]
    doubts: tuple[str, ...]
    verdict: str


class Differences(about.Kept):
    """The file `difference.json`."""

    differences: tuple[Difference, ...]


def read(directory: Path) -> list[Results]:
    """The studies of an evaluated directory, or of one that holds a report of several. Raises MeristemError."""
    file = directory / "report.json"
    if (directory / "results.json").is_file() or not file.is_file():
        return [Results.load(directory / "results.json")]
    try:
        return [Results.model_validate(report["results"]) for report in json.loads(file.read_text())["reports"]]
    except (ValidationError, ValueError, KeyError, TypeError) as error:
        raise MeristemError(f"{file} is no report that can be compared: {type(error).__name__}",
                            "Draw it again with this version: `meristem report`.") from None


def differ(before: Results, after: Results, replicates: int = REPLICATES, seed: int = 0) -> Difference:
    """What changed. Figures are paired where both were tested on cases of one manifest; raises MeristemError where two are not
    of one task and metric.
    """
    if (before.kind, before.metric) != (after.kind, after.metric):
        raise MeristemError(f"{before.task} by {before.metric} and {after.task} by {after.metric} are not one study",
                            "Compare two evaluations of one task.")
    old, new = summarise(before, replicates, seed), summarise(after, replicates, seed)
    changes = tuple(_changes(before, after, old, new, replicates, seed))
    doubts = list(_doubts(before, after, changes))
    return Difference(
        task=after.task, metric=after.metric, changes=changes, doubts=tuple(doubts),
        gone=tuple(arm for arm in before.arms if arm not in after.arms),
        new=tuple(arm for arm in after.arms if arm not in before.arms),
        recipes=tuple(t for name in dict.fromkeys((*before.settings, *after.settings))
                      for t in _turns(name, before.settings.get(name, {}), after.settings.get(name, {}))),
        data=tuple(_turns("data", _data(before), _data(after))),
        versions=tuple(_turns("versions", before.versions, after.versions)),
        costs=tuple(_turns("cost", _costs(before), _costs(after))),
        no_more=tuple(w for w in old.warnings if w not in new.warnings),
        warnings=tuple(w for w in new.warnings if w not in old.warnings), verdict=_verdict(after, changes))


def _changes(before: Results, after: Results, old: Summary, new: Summary, replicates: int, seed: int) -> Iterator[Change]:
    rows = {(r.arm, r.protocol, r.labels, r.metric): r for r in old.rows}
    theirs, mine = groups(before), groups(after)
    same = all(get(before) == get(after) for get in (lambda r: r.dataset.manifest, lambda r: r.classes, lambda r: r.scoring))
    for row in new.rows:
        was = rows.get((row.arm, row.protocol, row.labels, row.metric))
        if was is None:
            continue
        a, b = mine[row.arm, row.protocol, row.labels], theirs[row.arm, row.protocol, row.labels]
        seeds = {c.seed for c in a} & {c.seed for c in b}
        a, b = ([c for c in cells if c.seed in seeds] for cells in (a, b))
        shared = set.intersection(*({case.case for case in c.cases} for c in (*a, *b))) if seeds else set()
        one, two = (results.group(cells, shared) if shared else None for results, cells in ((after, a), (before, b)))
        if same and one is not None and two is not None and one.subjects == two.subjects and \
                (one.target is None or two.target is None or np.array_equal(one.target, two.target)):
            yield Change(arm=row.arm, protocol=row.protocol, labels=row.labels, metric=row.metric, before=was.mean,
                         after=row.mean, difference=difference(one, two, row.metric, replicates, seed), paired=True,
                         subjects=len(one.subjects))
        else:
            yield Change(arm=row.arm, protocol=row.protocol, labels=row.labels, metric=row.metric, before=was.mean,
                         after=row.mean, difference=independent(row.mean, was.mean), paired=False,
                         subjects=min(row.subjects, was.subjects))


def independent(one: Estimate, two: Estimate) -> Estimate:
    """The difference of two independent estimates, its interval recovered from theirs (Zou & Donner 2008):
    d − √((a − a_low)² + (b_high − b)²) to d + √((a_high − a)² + (b − b_low)²).
    """
    d = one.value - two.value
    return Estimate(d, d - math.hypot(one.value - one.low, two.high - two.value),
                    d + math.hypot(one.high - one.value, two.value - two.low))


def _turns(where: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[Turn]:
    old, new = dict(_flat(before)), dict(_flat(after))
    for key in dict.fromkeys((*old, *new)):
        if old.get(key) != new.get(key):
            yield Turn(where=where, what=key, before=old.get(key), after=new.get(key))


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys and their values as text."""
    if isinstance(value, Mapping) and value:
        for name, part in value.items():
            yield from _flat(part, f"{key}.{name}" if key else str(name))
    elif key:
        yield key, str(value)


def _data(results: Results) -> dict[str, Any]:
    data = results.dataset
    return {"manifest": data.manifest, "modality": data.modality, "unusable files": data.quarantined,
            "classes": ", ".join(results.classes),
            **{f"{split}, {what}": n for split, c in data.splits.items() for what, n in dict(c).items()},
            **{f"leakage of {arm}": audit.verdict for arm, audit in results.leakage.items()},
            **{f"weights of {arm}": next(c.init for c in results.cells if c.arm == arm) for arm in results.arms
               if arm not in results.baselines}}


def _costs(results: Results) -> dict[str, str]:
    return {f"{what} of {c.arm}": about.quantity(value) for c in about.costs(results) for what, value in (
        ("pretraining hours", c.pretraining_hours), ("evaluation hours", c.evaluation_hours),
        ("pretraining kWh", c.pretraining_kwh), ("evaluation kWh", c.evaluation_kwh))}


def _doubts(before: Results, after: Results, changes: tuple[Change, ...]) -> Iterator[str]:
    apart = [c for c in changes if not c.paired]
    if before.dataset.manifest != after.dataset.manifest:
        yield (f"The data differ (manifest {before.dataset.manifest} before, {after.dataset.manifest} after), so no case of "
               "the one is known to be a case of the other: before and after are compared as independent samples.")
    elif apart:
        yield f"{len(apart)} of {len(changes)} figures share no seed or case, or no subjects: not paired."
    fewer = {c.arm for c in changes if c.paired and c.subjects < max(_tested(before, c), _tested(after, c))}
    if fewer:
        yield f"{', '.join(sorted(fewer))}: paired over what both tested, which is not all that one of them did."
    for arm in (arm for arm in after.arms if arm in before.arms):
        seeds = [{c.seed for c in r.cells if c.arm == arm} for r in (before, after)]
        if seeds[0] != seeds[1]:
            yield (f"{arm}: seeds differ ({len(seeds[0])} before, {len(seeds[1])} after); paired differences are of the shared "
                   "ones.")


def _tested(results: Results, change: Change) -> int:
    cells = groups(results)[change.arm, change.protocol, change.labels]
    return len(set.intersection(*({case.subject for case in c.cases} for c in cells)))


def _verdict(after: Results, changes: tuple[Change, ...]) -> str:
    """One sentence, over the primary metric."""
    mine = [c for c in changes if c.metric == after.metric]
    label = metrics.LABELS.get(after.metric, after.metric)
    if not mine:
        return f"No arm, protocol and label budget is in both, so no {label} can be compared."
    up = 1 if after.higher[after.metric] else -1
    better, worse = ([c for c in mine if c.clear and c.difference.value * up * side > 0] for side in (1, -1))

    def most(some: list[Change]) -> str:
        c = max(some, key=lambda c: abs(c.difference.value))
        return f"most {told(c)}, {signed(c.difference.value)} [{signed(c.difference.low)}, {signed(c.difference.high)}]"

    parts = [f"{len(some)} {'is' if len(some) == 1 else 'are'} {word} ({most(some)})"
             for some, word in ((better, "better"), (worse, "worse")) if some]
    rest = len(mine) - len(better) - len(worse)
    if not parts:
        return (f"Of {len(mine)} figures in {label} none changed beyond its interval"
                f"{'' if len(mine) > 1 else f', {signed(mine[0].difference.value)}'}.")
    if rest:
        parts[-1] += f"; {rest} did not change beyond the interval"
    return f"Of {len(mine)} figures in {label} {' and '.join(parts)}; of so many {CHANCE * len(mine):.1f} would by chance."


def told(c: Change) -> str:
    """mae, fine-tuned, 5 labels"""
    labels = f", {'all' if c.labels == 'all' else c.labels} labels" if c.labels else ""
    return f"{c.arm}, {PROTOCOLS.get(c.protocol, c.protocol)}{labels}"


class _Shown:
    """A difference as the template reads it."""

    def __init__(self, made: Difference, results: Results) -> None:
        self.made, self.results = made, results
        self.metric, self.higher = figures.metric_label(results, made.metric), results.higher[made.metric]

    @property
    def tables(self) -> list[tuple[str, str, list[tuple[str, Change]]]]:
        """(metric, its label, rows), the primary one first."""
        names = sorted(dict.fromkeys(c.metric for c in self.made.changes), key=lambda name: name != self.made.metric)
        return [(name, figures.metric_label(self.results, name), [(told(c), c) for c in self.made.changes if c.metric == name])
                for name in names]

    @property
    def plot(self) -> figures.Plot | None:
        mine = [c for c in self.made.changes if c.metric == self.made.metric]
        return figures.differences([(told(c), c.difference, c.paired) for c in mine], self.metric) if mine else None


def write_difference(before: list[Results], after: list[Results], out: Path) -> Path:
    """Write `difference.html` and `difference.json` of the studies that both hold; returns the page's path.

    Raises MeristemError where they hold none in common.
    """
    pairs = [(old, new) for new in after for old in before
             if (old.task, old.kind, old.metric) == (new.task, new.kind, new.metric)]
    if not pairs and len(before) == len(after) == 1:
        pairs = [(before[0], after[0])]  # a renamed task is still the same, if its metric is
    if not pairs:
        raise MeristemError("the two reports hold no study of one task and metric", "Compare two evaluations of one task.")
    made = [differ(old, new) for old, new in pairs]
    out.mkdir(parents=True, exist_ok=True)
    shown = [_Shown(d, new) for d, (_, new) in zip(made, pairs, strict=True)]
    (out / NAME).write_text(render(NAME, studies=shown), encoding="utf-8")
    kept = Differences(schema_id=about.schema(Differences), version=version("meristem"), differences=tuple(made))
    (out / DATA).write_text(kept.model_dump_json(indent=1, by_alias=True) + "\n", encoding="utf-8")
    return out / NAME
