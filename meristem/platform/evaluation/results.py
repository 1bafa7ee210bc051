"""The one data model of an evaluation: every trained-and-tested combination, and what may be concluded from them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, FiniteFloat, ValidationError, model_validator
from scipy.stats import rankdata

from meristem.errors import MeristemError
from meristem.modalities.base import natural
from meristem.platform.evaluation import metrics
from meristem.platform.evaluation.detection import SCORINGS, Detections
from meristem.platform.evaluation.leakage import Leakage
from meristem.platform.evaluation.statistics import (
    REPLICATES,
    Estimate,
    Spread,
    Statistic,
    bootstrap,
    crossed,
    exchange,
    holm,
    kendall,
    mean_of,
    per_subject,
    rank_shares,
    resampled,
    sign_flip,
    standardised,
    superiority,
)
from meristem.platform.origin import METADATA

Array = NDArray[Any]
Labels = int | Literal["all"]


class Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Budget(Model):
    """What training and testing one cell cost. trainable: parameters that got a gradient. A probe without training has steps 0.

    devices: that worked at once. joules: as the counters of what is `metered` (GPU, processors) tell, of all that ran there
    meanwhile; None where there is none.
    """

    steps: int
    batch: int
    trainable: int
    seconds: FiniteFloat
    devices: int = 1
    joules: FiniteFloat | None = None
    metered: str = ""


class Spent(Model):
    """What pretraining an arm cost, as `Budget` says of a cell."""

    steps: int
    samples: int
    seconds: FiniteFloat
    devices: int = 1
    joules: FiniteFloat | None = None
    metered: str = ""


Cost = TypeVar("Cost", Budget, Spent)


def added(several: Sequence[Cost]) -> Cost:
    """One that took as long, and as much, as all together; the rest, of each alike, is the first's."""
    joules = [c.joules for c in several if c.joules is not None]
    return several[0].model_copy(update={"seconds": round(sum(c.seconds for c in several), 2),
                                         "joules": sum(joules) if len(joules) == len(several) else None})


class Boxes(Model):
    """Objects of one case. box: (K, n) as in `modalities.objects`, in the stored sample's own axes and unit. label: class of
    each, by number in `Results.classes`. score: of each that was found. ignore, level: of true ones, as there. size: area or
    volume of each true one, of its mask where it has one.
    """

    box: tuple[tuple[FiniteFloat, ...], ...]
    label: tuple[int, ...]
    score: tuple[FiniteFloat, ...] = ()
    ignore: tuple[bool, ...] = ()
    level: tuple[int, ...] = ()
    size: tuple[FiniteFloat, ...] = ()

    @model_validator(mode="after")
    def _as_many(self) -> Self:
        n = len(self.box)
        if len(self.label) != n or any(x and len(x) != n for x in (self.score, self.ignore, self.level, self.size)):
            raise ValueError(f"{n} boxes have another number of labels, scores, levels or sizes")
        if len({len(b) for b in self.box}) > 1 or min(self.label, default=0) < 0:
            raise ValueError("boxes are not of as many numbers each, or a class is negative")
        return self


class Case(Model):
    """One tested case under pseudonyms: `metrics` (name -> class -> value), or `target` and `probabilities`, or `truth` and
    `found`.

    metrics: those of `metrics.RATIOS` are given as the counts they are made of. category: of a shape with parts. overlap: of
    the masks of what was found (rows) and what is true, where both have masks; of ignored ones, over the found mask alone.
    """

    case: str
    subject: str
    category: str = ""
    metrics: dict[str, dict[str, FiniteFloat]] = {}
    target: int | None = None
    probabilities: tuple[FiniteFloat, ...] = ()
    truth: Boxes | None = None
    found: Boxes | None = None
    overlap: tuple[tuple[FiniteFloat, ...], ...] = ()

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if bool(self.probabilities) != (self.target is not None) or (self.truth is None) != (self.found is None):
            raise ValueError("target and probabilities go together, and so do truth and found")
        if bool(self.metrics) + bool(self.probabilities) + (self.truth is not None) != 1:
            raise ValueError("a case has metrics, or target and probabilities, or truth and found")
        if self.truth is not None and self.found is not None:
            if len(self.found.score) != len(self.found.label):
                raise ValueError(f"{self.case} has {len(self.found.score)} scores for {len(self.found.label)} objects found")
            if len({len(box) for box in (*self.truth.box, *self.found.box)} - {2, 4, 6, 7}) or \
                    len({len(box) for box in (*self.truth.box, *self.found.box)}) > 1:
                raise ValueError(f"the boxes of {self.case} are not all of 2, of 4, of 6 or of 7 numbers")
            if self.overlap and [len(row) for row in self.overlap] != [len(self.truth.label)] * len(self.found.label):
                raise ValueError(f"the overlaps of {self.case} are not of all found with all true objects")
        return self


class Cell(Model):
    """One trained-and-tested combination.

    arm: its name on the page. init: hash of the checkpoint it started from; None: random weights, or no pixel at all
    (`METADATA`): the arm is a baseline. protocol: finetune | attentive | linear | knn | retrieval | propagate | …. labels: the
    budget as asked for; labelled_subjects: what it came to. chosen: what was picked on validation (k, C, lr, …). encoder: name
    of the architecture; network: what tells its settings from others', so that an arm meets random weights of its own. drawn:
    hash of who was labelled; '' where nobody noted it.
    """

    arm: str
    init: str | None
    protocol: str
    labels: Labels
    labelled_subjects: int
    seed: int
    budget: Budget
    cases: tuple[Case, ...]
    encoder: str = ""
    network: str = ""
    drawn: str = ""
    chosen: dict[str, FiniteFloat] = {}


class Counts(Model):
    subjects: int
    cases: int


class Dataset(Model):
    """name: without any path. modality: what kind of data. splits: train | val | test -> counts. manifest: its hash.
    quarantined: files left out.
    """

    name: str
    manifest: str
    splits: dict[str, Counts]
    quarantined: int = 0
    modality: str = ""


class Results(Model):
    """One task on one data set, with all its cells. The file `results.json`.

    metric: the primary one, by which arms are compared. classes: those scored (segmentation: foreground; classification: all,
    in the order of the probabilities; retrieval: `QUERIES` alone; parts: `SHAPES` alone; few-shot: its
    settings). unit: of distances (mm | px). tolerance: of the NSD.
    pretraining: arm -> excerpt of its card. leakage: arm -> audit. spent: arm -> cost of its pretraining, where known. cost:
    anything else of it worth printing, by name. settings: the resolved recipes, by name. counted: what is drawn for training,
    tested and resampled. scoring: how detections are scored; overlaps: class -> IoU from which on one is right, where classes
    differ in that. traits: trait (site, age, …) -> test case -> its value; case by case they may single a person out, so a
    report holds groups of them only.
    """

    task: str
    kind: Literal["segmentation", "classification", "retrieval", "propagation", "parts", "semantic", "few-shot", "detection"]
    metric: str
    classes: tuple[str, ...]
    dataset: Dataset
    cells: tuple[Cell, ...]
    higher: dict[str, bool] = metrics.HIGHER
    counted: Literal["subjects", "nodes", "pairs"] = "subjects"
    scoring: str = ""
    overlaps: dict[str, FiniteFloat] = {}
    traits: dict[str, dict[str, str]] = {}
    unit: str = "mm"
    tolerance: FiniteFloat | None = None
    pretraining: dict[str, dict[str, Any]] = {}
    leakage: dict[str, Leakage] = {}
    versions: dict[str, str] = {}
    spent: dict[str, Spent] = {}
    cost: dict[str, Any] = {}
    settings: dict[str, Any] = {}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.cells:
            raise ValueError("there is no cell")
        if self.metric not in self.higher:
            raise ValueError(f"whether '{self.metric}' is better high or low is not stated in `higher`")
        if self.kind == "detection" and self.metric not in SCORINGS.get(self.scoring, ()):
            raise ValueError(f"detections scored as '{self.scoring}' have no {self.metric}")
        keys = [(c.arm, c.protocol, c.labels, c.seed) for c in self.cells]
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f"two cells are {key}: arm, protocol, labels and seed must tell them apart")
        for arm in {c.arm for c in self.cells}:
            if len({c.init is None for c in self.cells if c.arm == arm}) > 1:
                raise ValueError(f"arm '{arm}' starts from a checkpoint in some cells and from random weights in others")
        for cell in self.cells:
            if not cell.cases:
                raise ValueError(f"the cell {cell.arm}, {cell.protocol}, {cell.labels} labels, seed {cell.seed} has no case")
            for case in cell.cases:
                if self.kind == "classification" and len(case.probabilities) != len(self.classes):
                    raise ValueError(f"{case.case} has {len(case.probabilities)} probabilities for {len(self.classes)} classes")
                for name, by_class in case.metrics.items():
                    if set(by_class) != set(self.classes):
                        raise ValueError(f"{case.case} has {name} of {', '.join(by_class)}, not of {', '.join(self.classes)}")
                if (self.kind == "detection") != (case.truth is not None):
                    raise ValueError(f"{case.case} has {'no boxes' if case.truth is None else 'boxes'} in a {self.kind}")
                if case.truth is not None and case.found is not None and \
                        max((*case.truth.label, *case.found.label), default=0) >= len(self.classes):
                    raise ValueError(f"{case.case} has an object of a class beyond the {len(self.classes)} of the study")
                needed = metrics.RATIOS.get(self.metric, (self.metric,))[:2]
                if self.kind not in ("classification", "detection") and not {*needed} <= set(case.metrics):
                    raise ValueError(f"{case.case} has no {self.metric}")
        return self

    @property
    def tested(self) -> str:
        """What is resampled for the intervals."""
        return "trials" if self.kind == "few-shot" else f"test {self.counted}"

    @property
    def arms(self) -> list[str]:
        """Baselines first, each in the order met."""
        baselines = self.baselines
        return sorted(dict.fromkeys(c.arm for c in self.cells), key=lambda arm: arm not in baselines)

    @property
    def baselines(self) -> frozenset[str]:
        return frozenset(c.arm for c in self.cells if c.init is None)

    def group(self, cells: Iterable[Cell], only: set[str] | None = None) -> Group:
        """Some of its cells, of one arm × protocol × labels, as arrays."""
        return Group.of(cells, self.classes, only, self.scoring, self.overlaps)

    def save(self, path: Path) -> Path:
        path.write_text(self.model_dump_json(indent=1) + "\n")
        return path

    @classmethod
    def load(cls, path: Path) -> Self:
        """Raises MeristemError when the file is missing or is not a Results."""
        if not path.is_file():
            raise MeristemError(f"no results at {path}", "Give the directory of a `meristem evaluate` run.")
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise MeristemError(f"{path} is not a results file: {error.errors()[0]['msg']}",
                                "Evaluate again with this version.") from None


class Row(Model):
    """An arm at one protocol and label budget, in one metric. seeds: seed -> its own mean; seed_sd: their spread (n − 1).

    trial_sd: of the settings of few shots, the spread over trials (n − 1). spread: what the mean is uncertain by; primary
    metric, from three seeds on.
    """

    arm: str
    protocol: str
    labels: Labels
    labelled_subjects: int
    metric: str
    mean: Estimate
    classes: dict[str, Estimate]
    seeds: dict[int, float]
    seed_sd: float | None
    subjects: int
    trial_sd: dict[str, float] = {}
    spread: Spread | None = None


class Comparison(Model):
    """A pretrained arm minus a baseline over the same subjects and seeds. p, p_holm, spread: primary metric only.

    equal_budget: both were trained alike, so that the difference is due to the weights; never so of `METADATA`. size: Hedges' g
    of the subjects' differences. better: share of subjects with whom the arm does better. Both of means over subjects only: an
    area or a ratio over the set has no value of a subject, and is itself the size of the effect.
    """

    arm: str
    baseline: str
    protocol: str
    labels: Labels
    labelled_subjects: int
    metric: str
    difference: Estimate
    subjects: int
    seeds: int
    equal_budget: bool
    p: float | None = None
    p_holm: float | None = None
    size: Estimate | None = None
    better: Estimate | None = None
    spread: Spread | None = None


class Ranking(Model):
    """How sure the order of three arms or more is, in the primary metric (Wiesenfarth et al. 2021).

    arms: best first. by_subject, by_seed: of each arm, how often it takes each place among them, over resamples of the subjects
    (the same for all arms) and over the seeds one by one. tau_subjects, tau_seeds: Kendall's τ of those orders with this one.
    """

    protocol: str
    labels: Labels
    labelled_subjects: int
    arms: tuple[str, ...]
    by_subject: tuple[tuple[float, ...], ...]
    by_seed: tuple[tuple[float, ...], ...]
    tau_subjects: float
    tau_seeds: float
    subjects: int
    seeds: int


class Subgroup(Model):
    """The test cases that share a trait, in the primary metric. value: '' of those of which it is not known.

    hidden: why nothing is said of it: `few`, it has fewer than `SMALL` subjects, or `others`, it would tell those of another.
    differences: arm -> baseline -> arm minus baseline.
    """

    trait: str
    value: str
    protocol: str
    labels: Labels
    subjects: int | None = None
    hidden: Literal["", "few", "others"] = ""
    means: dict[str, Estimate] = {}
    differences: dict[str, dict[str, Estimate]] = {}


class Summary(Model):
    """What the page says in numbers. warnings: whatever makes a comparison less than fair. verdict: one sentence per arm."""

    metric: str
    rows: tuple[Row, ...]
    comparisons: tuple[Comparison, ...]
    warnings: tuple[str, ...]
    verdict: tuple[str, ...]
    rankings: tuple[Ranking, ...] = ()
    subgroups: tuple[Subgroup, ...] = ()

    def row(self, arm: str, protocol: str, labels: Labels, metric: str | None = None) -> Row | None:
        key = (arm, protocol, labels, metric or self.metric)
        return next((r for r in self.rows if (r.arm, r.protocol, r.labels, r.metric) == key), None)

    def primary(self) -> list[Comparison]:
        return [c for c in self.comparisons if c.metric == self.metric]


@dataclass
class Group:
    """The cells of one arm × protocol × labels as arrays over the cases they share.

    cases, owner: case names and, for each, the index in `subjects`. values: metric -> (seeds, classes, cases), of scored cases;
    target (cases,) and probabilities (seeds, cases, K), classification. categories: name of each case's, '' where it has none.
    detections: of the cases, detection.
    """

    seeds: list[int]
    cases: list[str]
    subjects: list[str]
    owner: Array
    values: dict[str, Array]
    target: Array | None
    probabilities: Array | None
    categories: Array
    detections: Detections | None = None

    @classmethod
    def of(cls, cells: Iterable[Cell], classes: Sequence[str], only: set[str] | None = None, scoring: str = "",
           overlaps: Mapping[str, float] | None = None) -> Group:
        """only: case names to keep. Cases that a seed lacks are left out. scoring, overlaps: of detections, as in `Results`."""
        cells = sorted(cells, key=lambda c: c.seed)
        tables = [{case.case: case for case in cell.cases} for cell in cells]
        shared = set.intersection(*(set(t) for t in tables))
        cases = sorted(shared if only is None else shared & only)
        rows = [[t[name] for name in cases] for t in tables]
        subjects = sorted({case.subject for case in rows[0]})
        place = {name: i for i, name in enumerate(subjects)}
        owner = np.array([place[case.subject] for case in rows[0]], dtype=int)
        shown = set.intersection(*(set(case.metrics) for row in rows for case in row)) if cases else set()
        names = [name for name in rows[0][0].metrics if name in shown] if cases else []
        values = {m: np.array([[[case.metrics[m][c] for case in row] for c in classes] for row in rows]) for m in names}
        target = probabilities = None
        if cases and rows[0][0].target is not None:
            target = np.array([case.target for case in rows[0]])
            probabilities = np.array([[case.probabilities for case in row] for row in rows])
        categories = np.array([case.category for case in rows[0]])
        detections = Detections(rows, classes, scoring, overlaps or {}) if cases and rows[0][0].truth is not None else None
        return cls([c.seed for c in cells], cases, subjects, owner, values, target, probabilities, categories, detections)

    @property
    def metrics(self) -> list[str]:
        if self.probabilities is not None:
            return list(metrics.set_metrics(self.probabilities.shape[-1]))
        if self.detections is not None:
            return self.detections.metrics
        made = list(metrics.RATIOS) if set(metrics.COUNTS) <= set(self.values) else []
        return [*made, *(name for name in self.values if not (made and name in metrics.COUNTS))]

    def case_values(self, metric: str) -> Array:
        """(seeds, classes, cases) of each case by itself; NaN where a ratio has nothing below. Detection: F1, one class."""
        if self.detections is not None:
            return self.detections.f1()[:, None]
        if metric not in metrics.RATIOS:
            return self.values[metric]
        above, below, _ = metrics.RATIOS[metric]
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(self.values[above] / self.values[below])

    def sums(self, metric: str, weight: Array, label: int | None = None) -> Array:
        """(seeds, R) a ratio of sums over the set, or a metric of detection, by case weights (R, cases). label: one class."""
        if self.detections is not None:
            return self.detections.value(metric, weight, label)
        above, below, pooled = metrics.RATIOS[metric]
        one, two = (np.einsum("rn,scn->src", weight, self.values[name]) for name in (above, below))
        return metrics.ratio(one, two, pooled) if label is None else metrics.ratio(*(x[..., [label]] for x in (one, two)))

    def subject_values(self, metric: str, label: int | None = None) -> Array:
        """Scored cases: one value per subject, the mean over seeds, classes (or of one class) and the subject's cases.

        Of a ratio: that of the subject's own sums.
        """
        if metric in metrics.RATIOS:
            return self.sums(metric, np.eye(len(self.subjects))[:, self.owner], label).mean(0)
        v = self.values[metric].mean(0)
        return per_subject(v.mean(0) if label is None else v[label], self.owner)

    def subject_means(self, metric: str) -> Array | None:
        """One value per subject (n,), mean over seeds, of a metric that is a mean of its cases' values; else None."""
        if metric in metrics.CASE_METRICS and self.target is not None and self.probabilities is not None:
            return per_subject(metrics.CASE_METRICS[metric](self.target, self.probabilities).mean(0), self.owner)
        of_set = self.target is not None or self.pooled(metric) or metric in metrics.BY_CATEGORY
        return None if of_set else self.subject_values(metric)

    def statistic(self, metric: str, label: int | None = None) -> Statistic:
        """The mean over seeds as a function of subject weights (R, n) -> (R,).

        label: of one class: its own scores, itself against the rest (rank metrics), its recall (accuracy).
        """
        each = self.by_seed(metric, label)
        return lambda w: each(w).mean(0)

    def by_seed(self, metric: str, label: int | None = None) -> Statistic:
        """Of each seed by itself: (R, n) -> (seeds, R)."""
        owner = self.owner
        if self.pooled(metric):
            return lambda w: self.sums(metric, w[:, owner], label)
        if metric in metrics.BY_CATEGORY:
            member, value = self._members(), self.values[metric].mean(1)
            return lambda w: np.stack([metrics.ratio(w[:, owner] @ (member * v[:, None]), w[:, owner] @ member) for v in value])
        if self.target is None:
            scores = self.values[metric].mean(1) if label is None else self.values[metric][:, label]
            of_subject = np.stack([per_subject(v, owner) for v in scores])
            return lambda w: of_subject @ w.T / w.sum(1)
        target, probabilities = self.target, self.probabilities
        assert probabilities is not None
        if label is None and metric in metrics.CASE_METRICS:
            values = metrics.CASE_METRICS[metric](target, probabilities)
            return lambda w: values @ w[:, owner].T / w[:, owner].sum(1)
        if label is None:
            function = metrics.SET_METRICS[metric]
            return lambda w: np.stack([function(target, p, w[:, owner]) for p in probabilities])
        if metric == "accuracy":
            return lambda w: np.stack([metrics.recall(target, p, label, w[:, owner]) for p in probabilities])
        binary = {"auroc": metrics.binary_auroc, "auprc": metrics.binary_auprc}[metric]
        return lambda w: np.stack([binary(target == label, p[:, label], w[:, owner]) for p in probabilities])

    def _members(self) -> Array:
        """(cases, categories) 1 where a case is of a category."""
        return np.asarray((self.categories[:, None] == np.unique(self.categories)).astype(float))

    def of_category(self, metric: str, category: str) -> tuple[Statistic, int]:
        """The mean over the cases of one category as a function of weights of its own subjects, and how many they are."""
        mine = self.categories == category
        values = self.values[metric].mean((0, 1))[mine]
        _, owner = np.unique(self.owner[mine], return_inverse=True)
        return mean_of(per_subject(values, owner)), int(owner.max()) + 1

    def pooled(self, metric: str) -> bool:
        """Whether it is one of the set, with no value of a case that it is the mean of, and no probabilities."""
        return metric in metrics.RATIOS or self.detections is not None

    def per_seed(self, metric: str) -> dict[int, float]:
        values = self.by_seed(metric)(np.ones((1, len(self.subjects))))[:, 0]
        return {seed: float(v) for seed, v in zip(self.seeds, values, strict=True)}


PROTOCOLS = {"finetune": "fine-tuned", "attentive": "attentive probe", "linear": "linear probe",
             "svm": "support vector machine", "few-shot": "few-shot support vector machine", "knn": "nearest neighbours",
             "retrieval": "retrieval", "propagate": "label propagation", "frozen": "training on a frozen encoder",
             "warmup": "fine-tuning after a warm-up", "sawtooth": "fine-tuning after the head", "lora": "LoRA fine-tuning"}
TRAINED = ("finetune", "frozen", "warmup", "sawtooth", "lora")  # protocols whose seeds are trainings
MANY = 30  # classes, beyond which the areas under their curves take minutes to resample
QUERIES = "queries"  # the one class of retrieval: all of them
FEW = "few-shot"  # the metric of that protocol
SMALL = 5  # subjects below which a subgroup is not told: whoever knows them could recognise them, and so few say nothing
SHAPES = "shapes"  # the one class of part segmentation: all of them, whatever their parts


def groups(results: Results) -> dict[tuple[str, str, Labels], list[Cell]]:
    """(arm, protocol, labels) -> its cells: baselines first, few labels first."""
    found: dict[tuple[str, str, Labels], list[Cell]] = defaultdict(list)
    for cell in results.cells:
        found[cell.arm, cell.protocol, cell.labels].append(cell)
    protocols = list(dict.fromkeys(c.protocol for c in results.cells))
    order = sorted(found, key=lambda k: (protocols.index(k[1]), _size(k[2]), results.arms.index(k[0])))
    return {key: found[key] for key in order}


def _shown(group: Group, results: Results) -> list[str]:
    """The group's metrics; areas under curves of many classes, each against the rest in every resample, only if primary."""
    many = group.target is not None and len(results.classes) > MANY
    return [m for m in group.metrics if not (many and m in metrics.RANK_METRICS and m != results.metric)]


def _size(labels: Labels) -> float:
    return float("inf") if labels == "all" else float(labels)


def summarise(results: Results, replicates: int = REPLICATES, seed: int = 0) -> Summary:
    """Means with 95 % intervals per arm, paired differences to every baseline, and what limits them.

    Seeds are averaged within a case first, then subjects are resampled: an interval speaks of other patients, not of other
    seeds; the spread over seeds stands beside it, and in the primary metric an interval over both. Differences are taken within
    a case over the seeds and subjects both arms have. p by exchanging the arms within subjects (segmentation: sign flips),
    Holm-corrected over all comparisons in the primary metric. Equality of training budgets is checked; what differs is a
    warning.
    """
    cells = groups(results)
    made = {key: results.group(mine) for key, mine in cells.items()}
    warnings: list[str] = []
    rows: list[Row] = []
    for key, group in made.items():
        where = _where(results, *key)
        lost = max(len(c.cases) for c in cells[key]) - len(group.cases)
        if lost:
            warnings.append(f"{where}: {lost} cases were not tested for every seed and are left out.")
        if not group.cases:
            raise MeristemError(f"{where}: the seeds share no test case", "Test all seeds of an arm on the same split.")
        rows += [_row(results, key, cells[key], group, metric, replicates, seed) for metric in _shown(group, results)]
    comparisons: list[Comparison] = []
    for (arm, protocol, labels), mine in cells.items():
        if arm in results.baselines:
            continue
        rivals = [key for key, theirs in cells.items() if key[0] in results.baselines and key[1:] == (protocol, labels)
                  and (key[0] == METADATA or theirs[0].network == mine[0].network)]
        if all(key[0] == METADATA for key in rivals):
            warnings.append(f"{_where(results, arm, protocol, labels)}: there is no arm from random weights to compare with.")
        for rival in rivals:
            found, said = compare(results, mine, cells[rival], replicates, seed, made)
            comparisons += found
            warnings += said
    tested = [c for c in comparisons if c.p is not None]
    corrected = dict(zip(map(id, tested), holm([c.p for c in tested if c.p is not None]), strict=True))
    comparisons = [c.model_copy(update={"p_holm": corrected.get(id(c))}) for c in comparisons]
    subgroups = _subgroups(results, cells, comparisons, replicates, seed)
    warnings += [*_unsteady(results, comparisons), *_contrary(results, comparisons, subgroups), *_shortcuts(results, rows),
                 *_thin(made, results.tested)]
    return Summary(metric=results.metric, rows=tuple(rows), comparisons=tuple(comparisons), warnings=tuple(warnings),
                   verdict=tuple(_verdict(results, comparisons)), subgroups=tuple(subgroups),
                   rankings=tuple(_rankings(results, cells, made, replicates, seed)))


def _where(results: Results, arm: str, protocol: str, labels: Labels) -> str:
    return f"{arm}, {protocol}, {'all labels' if labels == 'all' else f'{labels} labelled {results.counted}'}"


def _shortcuts(results: Results, rows: Sequence[Row]) -> list[str]:
    """How far the labels can be read off the way samples were acquired."""
    found = {r.protocol: r for r in sorted(rows, key=lambda r: _size(r.labels))  # with the most labels, where it reads best
             if r.arm == METADATA and r.metric == results.metric}
    name = metrics.LABELS.get(results.metric, results.metric)
    return [f"{_where(results, METADATA, r.protocol, r.labels)}: what the files' headers say, without a pixel, reaches {name} "
            f"{r.mean.value:.3f} [{r.mean.low:.3f}, {r.mean.high:.3f}]; an arm that is no better may have learned how samples "
            "were acquired." for r in found.values()]


def _thin(made: Mapping[tuple[str, str, Labels], Group], tested: str) -> list[str]:
    """Too few seeds or subjects to conclude much."""
    said = []
    single = [key for key, group in made.items() if len(group.seeds) < 3 and key[1] in TRAINED]
    if single:
        said.append(f"Fewer than three seeds in {len(single)} of {len(made)} rows: the spread between runs is not known there.")
    fewest = min(len(group.subjects) for group in made.values())
    if fewest < 20:
        said.append(f"Only {fewest} {tested}: intervals are wide, and their coverage is not assured below about 20.")
    return said


def _row(results: Results, key: tuple[str, str, Labels], cells: Sequence[Cell], group: Group, metric: str, replicates: int,
         seed: int) -> Row:
    n, widen = len(group.subjects), metric not in metrics.RANK_METRICS

    def interval(label: int | None = None) -> Estimate:
        return bootstrap(group.statistic(metric, label), n, replicates=replicates, seed=seed, widen=widen)

    ranked = metric in metrics.RANK_METRICS and len(results.classes) > 2  # of two classes one's area is the other's
    split = results.kind in ("segmentation", "semantic", "few-shot", "detection") or ranked or metric == "accuracy"
    classes = {c: interval(i) for i, c in enumerate(results.classes)} if split else {}
    if metric in metrics.BY_CATEGORY:
        classes = {c: bootstrap(*group.of_category(metric, c), replicates=replicates, seed=seed)
                   for c in np.unique(group.categories).tolist()}
    seeds = group.per_seed(metric)
    spread = crossed(group.by_seed(metric), n) if metric == results.metric else None
    return Row(arm=key[0], protocol=key[1], labels=key[2], labelled_subjects=cells[0].labelled_subjects, metric=metric,
               mean=interval(), classes=classes, seeds=seeds,
               seed_sd=float(np.std(list(seeds.values()), ddof=1)) if len(seeds) > 1 else None, subjects=n,
               trial_sd=dict(zip(results.classes, group.values[FEW].mean(0).std(-1, ddof=1).tolist(), strict=True))
               if results.kind == "few-shot" else {}, spread=spread)


def compare(results: Results, mine: Sequence[Cell], theirs: Sequence[Cell], replicates: int = REPLICATES, seed: int = 0,
            made: Mapping[tuple[str, str, Labels], Group] | None = None) -> tuple[list[Comparison], list[str]]:
    """One arm's cells minus another's at one protocol and budget, in every metric; and what makes it less than fair.

    made: groups that are made already; where the arms share all seeds and cases, theirs serve.
    """
    a, b = mine[0], theirs[0]
    where, warnings = f"{_where(results, a.arm, a.protocol, a.labels)} against {b.arm}", []
    seeds = {c.seed for c in mine} & {c.seed for c in theirs}
    if len(seeds) < max(len(mine), len(theirs)):
        warnings.append(f"{where}: the arms were not run with the same seeds; the difference is over the {len(seeds)} shared.")
    if not seeds:
        return [], warnings
    mine, theirs = ([c for c in cells if c.seed in seeds] for cells in (mine, theirs))
    unequal = [f"{what} ({', '.join(map(str, sorted(x)))} against {', '.join(map(str, sorted(y)))})"
               for what, x, y in ((what, {get(c) for c in mine}, {get(c) for c in theirs}) for what, get in _EQUAL.items())
               if x != y and b.arm != METADATA]
    whom = [{c.seed: c.drawn for c in cells} for cells in (mine, theirs)]
    if b.arm != METADATA and any(whom[0][s] != whom[1][s] for s in seeds if whom[0][s] and whom[1][s]):
        unequal.append("labelled subjects of other draws")
    if unequal:
        warnings.append(f"{where}: unequal budgets, so the difference is not due to pretraining alone: {'; '.join(unequal)}.")
    tested = [{case.case for case in cell.cases} for cell in (*mine, *theirs)]
    shared = set.intersection(*tested)
    if any(t != shared for t in tested):
        warnings.append(f"{where}: the arms were tested on different cases; the difference is over {len(shared)} of them.")
    if not shared:
        return [], warnings

    one, two = _alike(results, (mine, theirs), made)
    if one.subjects != two.subjects or (one.target is not None and (one.target != two.target).any()):
        raise MeristemError(f"{where}: the same test case has another subject or target in the two arms",
                            "The arms were tested on different data under the same names; evaluate them together.")
    found = []
    for metric in (m for m in _shown(one, results) if m in two.metrics):
        primary, means = metric == results.metric, (one.subject_means(metric), two.subject_means(metric))
        size = better = None
        if means[0] is not None and means[1] is not None and len(one.subjects) > 1:
            d = means[0] - means[1]
            size = bootstrap(standardised(d), len(d), replicates=replicates, seed=seed)
            better = superiority(d if results.higher[metric] else -d)
        found.append(Comparison(arm=a.arm, baseline=b.arm, protocol=a.protocol, labels=a.labels, metric=metric,
                                labelled_subjects=a.labelled_subjects, subjects=len(one.subjects), seeds=len(seeds),
                                difference=difference(one, two, metric, replicates, seed), size=size, better=better,
                                p=_test(one, two, metric, replicates, seed) if primary else None,
                                spread=crossed(_minus(one.by_seed(metric), two.by_seed(metric)), len(one.subjects))
                                if primary else None, equal_budget=not unequal and b.arm != METADATA))
    return found, warnings


def _alike(results: Results, arms: Sequence[Sequence[Cell]], made: Mapping[tuple[str, str, Labels], Group] | None = None,
           only: set[str] | None = None) -> list[Group]:
    """A group of each arm's cells over the seeds and cases that all have; none where they share nothing.

    made: groups that serve where they hold just these. only: case names to keep.
    """
    seeds = set.intersection(*({c.seed for c in cells} for cells in arms))
    kept = [[c for c in cells if c.seed in seeds] for cells in arms]
    shared = set.intersection(*({case.case for case in cell.cases} for cells in kept for cell in cells)) if seeds else set()
    shared = shared if only is None else shared & only
    groups_ = []
    for cells in kept if shared else ():
        known = (made or {}).get((cells[0].arm, cells[0].protocol, cells[0].labels))
        whole = known is not None and set(known.cases) == shared and set(known.seeds) == seeds
        groups_.append(known if known is not None and whole else results.group(cells, shared))
    return groups_


def _minus(one: Statistic, two: Statistic) -> Statistic:
    return lambda w: one(w) - two(w)


def difference(one: Group, two: Group, metric: str, replicates: int, seed: int) -> Estimate:
    """One arm minus another over the same subjects."""
    return bootstrap(_minus(one.statistic(metric), two.statistic(metric)), len(one.subjects), replicates=replicates, seed=seed,
                     widen=metric not in metrics.RANK_METRICS)


def _at(cells: Mapping[tuple[str, str, Labels], list[Cell]]) -> dict[tuple[str, Labels], list[list[Cell]]]:
    """(protocol, labels) -> the cells of each arm."""
    found: dict[tuple[str, Labels], list[list[Cell]]] = defaultdict(list)
    for (_, protocol, labels), mine in cells.items():
        found[protocol, labels].append(mine)
    return found


def _rankings(results: Results, cells: Mapping[tuple[str, str, Labels], list[Cell]],
              made: Mapping[tuple[str, str, Labels], Group], replicates: int, seed: int) -> list[Ranking]:
    found = []
    for (protocol, labels), arms in _at(cells).items():
        alike = _alike(results, arms, made) if len(arms) > 2 else []
        if not alike:
            continue
        better, n = 1 if results.higher[results.metric] else -1, len(alike[0].subjects)
        draws = np.stack([better * resampled(g.statistic(results.metric), n, replicates, seed) for g in alike])
        each = np.stack([better * np.array(list(g.per_seed(results.metric).values())) for g in alike])
        whole = each.mean(1)
        order = np.argsort(-whole, kind="stable")
        found.append(Ranking(
            protocol=protocol, labels=labels, labelled_subjects=arms[0][0].labelled_subjects,
            arms=tuple(arms[i][0].arm for i in order), by_subject=tuple(map(tuple, rank_shares(draws)[order].tolist())),
            by_seed=tuple(map(tuple, rank_shares(each)[order].tolist())), tau_subjects=kendall(draws, whole),
            tau_seeds=kendall(each, whole), subjects=n, seeds=each.shape[1]))
    return found


def _subgroups(results: Results, cells: Mapping[tuple[str, str, Labels], list[Cell]], comparisons: Sequence[Comparison],
               replicates: int, seed: int) -> list[Subgroup]:
    """Of every trait that divides the test cases, each value's cases by themselves; one that would tell of few is hidden."""
    found, metric = [], results.metric
    for (protocol, labels), arms in _at(cells).items():
        pairs = [(c.arm, c.baseline) for c in comparisons if (c.protocol, c.labels, c.metric) == (protocol, labels, metric)]
        owner = {case.case: case.subject for mine in arms for cell in mine for case in cell.cases}
        for trait, values in results.traits.items():
            members: dict[str, set[str]] = defaultdict(set)
            for case in owner:
                members[values.get(case, "")].add(case)
            hidden = _hidden({value: len({owner[case] for case in mine}) for value, mine in members.items()})
            if len(hidden) < 2 or all(hidden.values()):
                continue
            for value in sorted(members, key=lambda v: (not v, natural(v))):
                told = {"trait": trait, "value": value, "protocol": protocol, "labels": labels, "hidden": hidden[value]}
                alike = [] if hidden[value] else _alike(results, arms, only=members[value])
                by_arm = {mine[0].arm: group for mine, group in zip(arms, alike, strict=False)}
                n = len(alike[0].subjects) if alike else 0
                means = {arm: bootstrap(group.statistic(metric), n, replicates=replicates, seed=seed,
                                        widen=metric not in metrics.RANK_METRICS) for arm, group in by_arm.items()}
                differences: dict[str, dict[str, Estimate]] = {arm: {} for arm, _ in pairs if by_arm}
                for arm, rival in pairs if by_arm else ():
                    differences[arm][rival] = difference(by_arm[arm], by_arm[rival], metric, replicates, seed)
                found.append(Subgroup.model_validate({**told, "subjects": n if alike else None, "means": means,
                                                      "differences": differences}))
    return found


def _hidden(sizes: Mapping[str, int]) -> dict[str, str]:
    """Value -> why it must not be told: it has few subjects, or what is told of all would leave few to be worked out."""
    hidden = {value: "few" if n < SMALL else "" for value, n in sizes.items()}
    while any(hidden.values()) and not all(hidden.values()):
        if sum(map(bool, hidden.values())) > 1 and sum(sizes[v] for v, why in hidden.items() if why) >= SMALL:
            break
        hidden[min((v for v, why in hidden.items() if not why), key=sizes.__getitem__)] = "others"
    return hidden


def _unsteady(results: Results, comparisons: Sequence[Comparison]) -> list[str]:
    """What holds for other subjects but, as far as the seeds tell, not for other training runs too."""
    unsure = [f"{_where(results, c.arm, c.protocol, c.labels)} against {c.baseline} "
              f"([{signed(c.spread.interval.low)}, {signed(c.spread.interval.high)}])"
              for c in comparisons if c.spread and not c.difference.low <= 0 <= c.difference.high
              and c.spread.interval.low <= 0 <= c.spread.interval.high]
    clear = f"Clear over other {results.counted}, but not where the seeds too are others"
    return [f"{clear}: {'; '.join(unsure)}."] if unsure else []


def _contrary(results: Results, comparisons: Sequence[Comparison], subgroups: Sequence[Subgroup]) -> list[str]:
    """Subgroups whose difference clearly has the other sign than that of all."""
    said = []
    whole = {(c.arm, c.baseline, c.protocol, c.labels): c.difference.value for c in comparisons if c.metric == results.metric}
    for g in subgroups:
        for arm, rivals in g.differences.items():
            for rival, part in rivals.items():
                sign = float(part.low > 0) - float(part.high < 0)
                if sign * whole.get((arm, rival, g.protocol, g.labels), 0.0) < 0:
                    said.append(f"{_where(results, arm, g.protocol, g.labels)}: {g.trait} {g.value or 'not known'} "
                                f"({g.subjects} {results.tested}) differs from {rival} the other way than all together, by "
                                f"{signed(part.value)} [{signed(part.low)}, {signed(part.high)}]; of many subgroups some do "
                                "so by chance.")
    return said


_EQUAL: dict[str, Callable[[Cell], int | str]] = {
    "optimiser steps": lambda c: c.budget.steps, "batch size": lambda c: c.budget.batch,
    "trainable parameters": lambda c: c.budget.trainable, "labelled subjects": lambda c: c.labelled_subjects,
    "encoder": lambda c: c.encoder}


def _test(one: Group, two: Group, metric: str, replicates: int, seed: int) -> float:
    if one.pooled(metric):
        both = replace(one, values={k: np.concatenate([v, two.values[k]], -1) for k, v in one.values.items()},
                       detections=one.detections and two.detections and one.detections + two.detections)

        def traded(flips: Array) -> Array:
            swap = flips[:, one.owner].astype(float)
            a, b = (both.sums(metric, np.concatenate(w, -1)) for w in ((1 - swap, swap), (swap, 1 - swap)))
            return np.asarray((a - b).mean(0))

        return exchange(traded, len(one.subjects), replicates, seed)
    if one.target is None:
        return sign_flip(one.subject_values(metric) - two.subject_values(metric), replicates, seed)
    a, b = one.probabilities, two.probabilities
    assert a is not None and b is not None
    if metric in metrics.RANK_METRICS:  # only order matters within an arm; between arms scores must be made comparable first
        a, b = rankdata(a, axis=1), rankdata(b, axis=1)
    function, target, owner = metrics.SET_METRICS[metric], one.target, one.owner

    def difference(flips: Array) -> Array:
        swap = flips[:, None, owner, None]
        return (function(target, np.where(swap, b, a)) - function(target, np.where(swap, a, b))).mean(1)

    return exchange(difference, len(one.subjects), replicates, seed)


def signed(value: float, digits: int = 3) -> str:
    """+0.031, −0.004."""
    return f"{value:+.{digits}f}".replace("-", "−")


def _verdict(results: Results, comparisons: Sequence[Comparison]) -> list[str]:
    """One sentence per pretrained arm and protocol, against its fairest baseline: fewest labels first, no budget left out."""
    told: dict[tuple[str, str], list[Comparison]] = defaultdict(list)
    for c in comparisons:
        if c.metric == results.metric:
            told[c.arm, c.protocol].append(c)
    sentences = []
    for (arm, protocol), mine in told.items():
        rival = min(mine, key=lambda c: (not c.equal_budget, c.baseline == METADATA)).baseline
        first, *more = sorted((c for c in mine if c.baseline == rival), key=lambda c: _size(c.labels))
        by = f" by {PROTOCOLS.get(protocol, protocol)}" if protocol != "finetune" else ""
        counts = f"({first.seeds} seed{'s' * (first.seeds != 1)}, {first.subjects} {results.tested})"
        where = f"{'all ' * (first.labels == 'all')}{first.labelled_subjects} labelled {results.counted}"
        where = f"At {where}" if first.labels else "Untrained,"
        text = f"{where} {arm} pretraining {_effect(results, first, rival)}{by} {counts}."
        parts = [f"t {'all ' * (c.labels == 'all')}{c.labelled_subjects} it {_effect(results, c)}" for c in more]
        sentences.append(text + (f" A{'; a'.join(parts)}." if parts else ""))
    return sentences or ["No pretrained arm was compared with one from random weights: nothing can be said about the gain."]


def _effect(results: Results, c: Comparison, rival: str = "") -> str:
    """adds +0.031 Dice [+0.012, +0.049] over scratch."""
    better = 1 if results.higher[c.metric] else -1
    value, low, high = c.difference
    size = f"{signed(value)} {metrics.LABELS.get(c.metric, c.metric)} [{signed(low)}, {signed(high)}]"
    if np.isnan(low) or low <= 0 <= high:
        return f"makes no clear difference{f' to {rival}' if rival else ''}, {size}"
    gain = value * better > 0
    verb = ("adds" if better > 0 else "gains") if gain else "harms,"
    text = f"{verb} {size}{f' over {rival}' if rival else ''}"
    if c.p_holm is not None and c.p_holm > 0.05:
        text += f", which does not survive correction for several comparisons (p = {c.p_holm:.2f})"
    return text


def join(old: Results, new: Results) -> Results | None:
    """Results of one task on one data set made one, so that their arms can be compared; None where they cannot be.

    Cells that occur in both are kept once if they agree; if they disagree, the two are not joined.
    """
    def same(r: Results) -> tuple[object, ...]:
        return r.task, r.kind, r.metric, r.classes, r.dataset, r.counted, r.unit, r.tolerance, r.scoring, r.overlaps

    if same(old) != same(new):
        return None
    cells = {(c.arm, c.protocol, c.labels, c.seed): c for c in old.cells}
    for cell in new.cells:
        known = cells.setdefault((cell.arm, cell.protocol, cell.labels, cell.seed), cell)
        if known.cases != cell.cases or known.init != cell.init:
            return None
    tables = ("pretraining", "leakage", "versions", "spent", "cost", "settings")
    both = {name: {**getattr(old, name), **getattr(new, name)} for name in tables}
    return Results.model_validate({**dict(old), **both, "cells": tuple(cells.values())})
