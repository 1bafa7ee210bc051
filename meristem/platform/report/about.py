"""What the report says beside its figures, all of it read off the results: cost, provenance, use and limits."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ConfigDict, Field

from meristem.platform.evaluation import metrics
from meristem.platform.evaluation.results import PROTOCOLS, Labels, Model, Results, Summary, groups
from meristem.platform.origin import METADATA
from meristem.platform.report.figures import Curve

MISSING = "not measured"  # a figure that no counter told; never estimated


class Cost(Model):
    """What an arm took: hours of one device each (elapsed time × devices), kWh of all that its counters (`metered`) read.

    pretraining: None where the run's own record is missing, 0 from random weights. evaluation: of all its cells, training and
    testing. runs: how many those are.
    """

    arm: str
    pretraining_hours: float | None
    pretraining_kwh: float | None
    evaluation_hours: float
    evaluation_kwh: float | None
    runs: int
    metered: str


def costs(results: Results) -> list[Cost]:
    """Of every arm, in their order."""
    found = []
    for arm in results.arms:
        spent, random = results.spent.get(arm), arm in results.baselines
        budgets = [c.budget for c in results.cells if c.arm == arm]
        joules = [b.joules for b in budgets if b.joules is not None]
        metered = [b.metered for b in budgets] + ([] if spent is None else [spent.metered])
        found.append(Cost(
            arm=arm, runs=len(budgets), evaluation_hours=sum(b.seconds * b.devices for b in budgets) / 3600,
            evaluation_kwh=sum(joules) / 3.6e6 if len(joules) == len(budgets) else None,
            pretraining_hours=0.0 if random else None if spent is None else spent.seconds * spent.devices / 3600,
            pretraining_kwh=0.0 if random else None if spent is None or spent.joules is None else spent.joules / 3.6e6,
            metered=", ".join(dict.fromkeys(name for name in metered if name))))
    return found


def quantity(value: float | None) -> str:
    """Three digits that count, or that it was not measured."""
    if value is None:
        return MISSING
    return "0" if value == 0 else f"{value:.{2 if value >= 1 else 3}g}" if value < 100 else f"{value:,.0f}"


def purpose(results: Results, summary: Summary) -> list[str]:
    """What the figures may be used for."""
    kind = f"{results.dataset.modality} data" if results.dataset.modality else "this kind of data"
    pretrained = [arm for arm in results.arms if arm not in results.baselines]
    label = metrics.LABELS.get(results.metric, results.metric)
    told = [f"Research on pretraining: to judge whether pretraining helps {results.task} of {kind}, by {label}, where few "
            f"{results.counted} are labelled. Not a medical device, not for diagnosis or treatment."]
    gains = [c for c in summary.primary() if c.equal_budget]
    clear = [c for c in gains if (c.difference.low > 0 if results.higher[c.metric] else c.difference.high < 0)]
    if gains:
        told.append(f"The arms that were pretrained ({', '.join(pretrained)}) are better than random weights beyond doubt in "
                    f"{len(clear)} of {len(gains)} comparisons at equal budget; elsewhere nothing is claimed.")
    return told


def limits(results: Results, summary: Summary) -> list[str]:
    """What was tested, and what was not: nothing that is not in the data."""
    data, told = results.dataset, []
    subjects = max(r.subjects for r in summary.rows)
    test = data.splits.get("test")
    told.append(f"One data set was tested ({data.name}, manifest {data.manifest}): "
                f"{subjects} {results.tested}{f' with {test.cases} cases' if test and results.counted == 'subjects' else ''}"
                f"{' of its test split' if test else ''}. No other site, scanner, protocol or population was.")
    if "val" in data.splits and data.splits["val"].cases:
        chosen = ", ".join(sorted({name for c in results.cells for name in c.chosen}))
        told.append(f"The validation split ({data.splits['val'].subjects} subjects) is not scored"
                    f"{f'; {chosen} was chosen on it' if chosen else ''}.")
    if data.quarantined:
        told.append(f"{data.quarantined} file{'s were' if data.quarantined != 1 else ' was'} unusable and left out: nothing is "
                    "known of how the arms do on such.")
    seeds = sorted({len(cells) for cells in groups(results).values()})
    ways = [protocol for protocol in dict.fromkeys(c.protocol for c in results.cells)]
    told.append(f"Compared by {', '.join(PROTOCOLS.get(p, p) for p in ways)} only, with {_span(seeds)} "
                f"seed{'s' if seeds != [1] else ''}; {_budgets(results)}.")
    encoders = sorted({c.encoder for c in results.cells if c.encoder})
    if encoders:
        told.append(f"One architecture per arm ({', '.join(encoders)}); others may gain more or less.")
    told.append("Arms are compared at equal budgets after pretraining: what pretraining itself cost stands under cost.")
    told.append(f"Intervals reflect the sampling of {results.tested}; the choice of labelled {results.counted} and the "
                "randomness of training enter only through the spread over seeds and, from three on, the intervals over both.")
    unchecked = [a for a in results.arms if a not in results.baselines and a not in results.leakage]
    if unchecked:
        told.append(f"Whether {', '.join(unchecked)} met the test data in pretraining was not checked.")
    told += [f"{arm}: {audit.sentence}" for arm, audit in results.leakage.items() if audit.verdict != "clean"]
    if all(arm == METADATA for arm in results.baselines):
        told.append("There is no arm from random weights.")
    return [*told, *_conventions(results), *summary.warnings]


def _span(counts: list[int]) -> str:
    return str(counts[0]) if counts[0] == counts[-1] else f"{counts[0]} to {counts[-1]}"


def _budgets(results: Results) -> str:
    counts: dict[int, Labels] = {c.labelled_subjects: c.labels for c in results.cells}
    if set(counts) == {0}:
        return "nothing was trained on labels"
    return f"label budgets: {', '.join(str(n) for n in sorted(counts))} {results.counted}, none between or beyond"


def _conventions(results: Results) -> list[str]:
    """How the metric deals with what it leaves open."""
    if results.kind == "segmentation":
        return ["Where a structure is missing in both truth and prediction the case counts as perfect, where it is missing in "
                "one as a complete miss with the image's diagonal as distance."]
    if results.kind == "parts":
        return ["A part of its category that a shape neither has nor is given counts as perfect."]
    if results.metric == "J&F":
        return ["Where an object is missing in both truth and prediction of a frame it counts as perfect, where it is missing "
                "in one as a miss."]
    if results.kind == "detection":
        return ["A class of which the test set has no object is left out of the means. Of one class at most 100 objects are "
                "looked at in a case, the surest; objects marked to be ignored are neither sought nor wrong to find. Scores "
                "are as the model gives them."]
    if results.kind == "classification":
        return ["Probabilities are as the model gives them; no recalibration was made."]
    return []


class Origin(Model):
    """How one arm came to be. weights: what tells its checkpoint from all others; '' from random ones. recipe, recipe_hash: of
    its pretraining. command: with the resolved recipe of the page in a file.
    """

    arm: str
    weights: str
    recipe: str
    recipe_hash: str
    manifest: str
    command: str


def origins(results: Results) -> list[Origin]:
    found = []
    for arm in results.arms:
        weights = next(c.init for c in results.cells if c.arm == arm) or ""
        about = results.pretraining.get(arm, {})
        made = "steps" in about  # not random, nor from elsewhere
        found.append(Origin(arm=arm, weights=weights, recipe=str(about.get("recipe", "")),
                            recipe_hash=str(about.get("recipe hash", "")), manifest=str(about.get("data manifest", "")),
                            command=f"meristem pretrain {_file(arm)} --data DATA --out {_word(arm)}" if made else ""))
    return found


def evaluation(results: Results) -> str:
    """The command that repeats the evaluation, once the task's resolved recipe is in a file; it adds random weights itself."""
    labels = dict.fromkeys(c.labels for c in results.cells)
    seeds = max(len(cells) for cells in groups(results).values())
    protocols = dict.fromkeys(c.protocol for c in results.cells)
    inits = [_word(arm) for arm in results.arms if arm not in results.baselines] + \
        [METADATA] * (METADATA in results.arms)
    learns = not all(c.labelled_subjects == 0 for c in results.cells)
    return " ".join([f"meristem evaluate {_file(results.task)} --data DATA", *(f"--init {x}" for x in inits),
                     *(f"--labels {x}" for x in labels if learns), *(f"--protocol {p}" for p in protocols),
                     f"--seeds {seeds} --out OUT"])


def _word(name: str) -> str:
    return name.replace(" ", "-")


def _file(name: str) -> str:
    return f"{_word(name)}.yaml"


class Trained(Model):
    """The records of one run's log, as `figures.Curve`."""

    stage: str
    arm: str
    labels: str
    records: tuple[dict[str, float], ...]


def trained(curve: Curve) -> Trained:
    return Trained(stage=curve.stage, arm=curve.arm, labels=curve.labels, records=tuple(
        {k: v for k, v in record.items() if isinstance(v, int | float)} for record in curve.records))


class Report(Model):
    """One study of the page. evaluation: the command that repeats it."""

    summary: Summary
    results: Results
    costs: tuple[Cost, ...]
    purpose: tuple[str, ...]
    limits: tuple[str, ...]
    origins: tuple[Origin, ...]
    evaluation: str
    curves: tuple[Trained, ...] = ()


class Kept(Model):
    """A file beside a page. schema: of its fields, as `schema` tells it: what reads one reads all that have the same. version:
    of this package.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    schema_id: str = Field(alias="schema")
    version: str


class Reports(Kept):
    """The file `report.json`: every number of the page; undefined ones are null."""

    reports: tuple[Report, ...]


def index(studies: Sequence[tuple[Results, Summary]]) -> list[dict[str, Any]]:
    """The model-index of a model card: every pretrained arm with its means on each task, data set, protocol and budget."""
    found: dict[str, list[dict[str, Any]]] = {}
    for results, summary in studies:
        for arm in (arm for arm in results.arms if arm not in results.baselines):
            listed = [{"type": row.metric, "value": round(row.mean.value, 6),
                       "name": f"{metrics.LABELS.get(row.metric, row.metric)}, {PROTOCOLS.get(row.protocol, row.protocol)}"
                               + (f", {row.labelled_subjects} labelled {results.counted}" if row.labelled_subjects else ""),
                       "args": {"protocol": row.protocol, "labels": row.labels, "seeds": len(row.seeds), "tested": row.subjects,
                                **({} if math.isnan(row.mean.low) else {"interval 95 %": [round(row.mean.low, 6),
                                                                                            round(row.mean.high, 6)]})}}
                      for row in summary.rows if row.arm == arm and not math.isnan(row.mean.value)]
            found.setdefault(arm, []).append({
                "task": {"type": results.kind, "name": results.task},
                "dataset": {"type": results.dataset.modality or "data", "name": results.dataset.name, "split": "test",
                            "revision": results.dataset.manifest}, "metrics": listed})
    return [{"name": arm, "results": several} for arm, several in found.items()]


def schema(model: type[Model]) -> str:
    """What tells one shape of a file from another: 12 hex digits over its fields, their types and nothing else."""
    def bare(node: Any) -> Any:
        if isinstance(node, Mapping):
            return {k: bare(v) for k, v in node.items() if k not in ("description", "title")}
        return [bare(x) for x in node] if isinstance(node, list) else node

    return hashlib.sha256(json.dumps(bare(model.model_json_schema()), sort_keys=True).encode()).hexdigest()[:12]
