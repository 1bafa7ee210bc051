"""The transfer report: one self-contained HTML page and the same numbers as JSON."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from meristem.platform.evaluation.detection import SCORINGS, SHOWN, SPLITS, USUAL
from meristem.platform.evaluation.metrics import BY_CATEGORY, LABELS
from meristem.platform.evaluation.results import (
    PROTOCOLS,
    SMALL,
    Comparison,
    Labels,
    Ranking,
    Results,
    Row,
    Summary,
    groups,
    join,
    signed,
    summarise,
)
from meristem.platform.evaluation.statistics import Estimate, Spread
from meristem.platform.origin import METADATA
from meristem.platform.report import about, figures
from meristem.platform.report.figures import PANELS, Curve, Plot, interval, metric_label, summary_metric
from meristem.platform.report.pictures import Pictures

NAME, DATA, CARD = "report.html", "report.json", "card.md"
HIDDEN = {"few": f"fewer than {SMALL}", "others": "withheld"}  # why nothing is said of a subgroup
Parts = tuple[Results, Pictures, Sequence[Curve]]


@dataclass(frozen=True)
class Line:
    """One row of the table of arms, all text."""

    labels: str
    arm: str
    baseline: bool
    mean: str
    spread: str
    differences: tuple[tuple[str, str, str], ...]  # baseline, difference, corrected p


class Study:
    """One task on one data set, as the template reads it."""

    def __init__(self, results: Results, pictures: Pictures, curves: Sequence[Curve]) -> None:
        self.results, self.pictures, self.records = results, pictures, curves
        self.summary: Summary = summarise(results)
        self.protocol, self.labels = _headline(results, self.summary)

    @property
    def metric(self) -> str:
        return metric_label(self.results, self.results.metric)

    @cached_property
    def colours(self) -> dict[str, str]:
        return figures.palette(self.results)

    @property
    def at(self) -> str:
        n = next(c.labelled_subjects for c in self.results.cells if (c.protocol, c.labels) == (self.protocol, self.labels))
        return PROTOCOLS.get(self.protocol, self.protocol) + (f", {n} labelled {self.results.counted}" if self.budgeted else "")

    @property
    def doubts(self) -> list[str]:
        """What a reader must know before believing the verdict."""
        found = [f"{arm}: {audit.sentence}" for arm, audit in self.results.leakage.items() if audit.verdict != "clean"]
        unchecked = [a for a in self.results.arms if a not in self.results.leakage and a not in self.results.baselines]
        if unchecked:
            found.append(f"{', '.join(unchecked)}: overlap of pretraining data and test data was not checked.")
        return [*found, *self.summary.warnings]

    @property
    def protocols(self) -> list[str]:
        return list(dict.fromkeys(r.protocol for r in self.summary.rows))

    @property
    def budgeted(self) -> bool:
        """Whether training labels are what the arms were given more or less of."""
        return self.results.kind != "propagation"

    @cached_property
    def efficiency(self) -> list[Plot]:
        plot = figures.label_efficiency if self.budgeted else figures.means
        return [plot(self.results, self.summary, p) for p in self.protocols]

    @property
    def facts(self) -> str:
        """What the arm that sees no pixel says of the others; empty where there is none."""
        if METADATA not in self.results.arms:
            return ""
        found = [c for c in self.summary.primary() if c.baseline == METADATA]
        last = {(c.arm, c.protocol): c for c in found}  # most labels last
        told = []
        for c in last.values():
            beaten = c.difference.low > 0 if self.results.higher[c.metric] else c.difference.high < 0
            told.append(f"{c.arm} {'beats' if beaten else 'does not beat'} it by {PROTOCOLS.get(c.protocol, c.protocol)} at "
                        f"{c.labelled_subjects} labelled {self.results.counted} ({interval(c.difference, sign=True)})")
        return (f"The arm “{METADATA}” knows what the files' headers say (size, length, spacing) and no pixel, so what it "
                f"reaches can be had without looking: {'; '.join(told) or 'no learned arm was compared with it'}.")

    def lines(self, protocol: str) -> list[Line]:
        """The table of arms of one protocol, in the metric it is compared by."""
        lines, metric = [], summary_metric(self.summary, protocol)
        for row in self.summary.rows:
            if (row.protocol, row.metric) != (protocol, metric):
                continue
            against = tuple((c.baseline, interval(c.difference, sign=True), p_value(c.p_holm)) for c in self.summary.comparisons
                            if (c.arm, c.protocol, c.labels, c.metric) == (row.arm, protocol, row.labels, metric))
            lines.append(Line(_labels(row), row.arm, row.arm in self.results.baselines, interval(row.mean),
                              "–" if row.seed_sd is None else f"{row.seed_sd:.3f}", against))
        return lines

    def effects(self, protocol: str) -> tuple[list[str], list[tuple[str, str, list[str]]]]:
        """Heads and rows (labels, arm, values): how large the differences are, and what they are uncertain by."""
        found = [c for c in self.summary.primary() if c.protocol == protocol]
        sized, crossed = any(c.size for c in found), any(c.spread for c in found)
        heads = ["to", *(["Difference, other seeds too", "Seeds' share"] if crossed else []),
                 *(["Effect size g", f"{self._units} better"] if sized else [])]
        rows = []
        for c in found if sized or crossed else ():
            spread = [interval(c.spread.interval, sign=True), _share(c.spread)] if c.spread else ["–", "–"]
            size = [interval(c.size, sign=True, digits=2) if c.size else "–", _percents(c.better) if c.better else "–"]
            rows.append((_labels(c), c.arm, [c.baseline, *(spread if crossed else []), *(size if sized else [])]))
        return heads, rows

    @property
    def _units(self) -> str:
        return figures.sentence("trials" if self.results.kind == "few-shot" else self.results.counted)

    def ranking(self, protocol: str) -> tuple[list[str], list[tuple[str, str, list[str]]]]:
        """Heads and rows (labels, arm, values): how often each arm takes each place, over resamples and, behind it, seeds."""
        found = [r for r in self.summary.rankings if r.protocol == protocol]
        most = max((len(r.arms) for r in found), default=0)
        rows = []
        for r in found:
            for arm, *shares in zip(r.arms, r.by_subject, r.by_seed, strict=True):
                told = [_percent(x) + (f" ({_percent(y)})" if r.seeds > 1 else "") for x, y in zip(*shares, strict=True)]
                rows.append((_labels(r), arm, [*told, *["–"] * (most - len(told))]))
        return [f"Place {i + 1}" for i in range(most)], rows

    def agreement(self, protocol: str) -> str:
        """Kendall's τ of the resampled orders with the order shown."""
        told = [f"{r.tau_subjects:.2f}" + (f" ({r.tau_seeds:.2f})" if r.seeds > 1 else "") + f" at {_labels(r)}"
                for r in self.summary.rankings if r.protocol == protocol and not np.isnan(r.tau_subjects)]
        return "; ".join(told)

    @cached_property
    def subgroups(self) -> tuple[list[str], list[tuple[str, str, list[str]]]]:
        """Heads and rows (trait, value, values) of the headline's protocol and labels: subjects, means, differences."""
        found = [g for g in self.summary.subgroups if (g.protocol, g.labels) == (self.protocol, self.labels)]
        told = next((g for g in found if not g.hidden), None)
        if told is None:
            return [], []
        pairs = [(arm, rival) for arm, rivals in told.differences.items() for rival in rivals]
        rows = []
        for g in found:
            values = [interval(e) for e in g.means.values()]
            values += [interval(e, sign=True) for rivals in g.differences.values() for e in rivals.values()]
            rows.append((figures.sentence(g.trait), g.value or "not known",
                         [HIDDEN.get(g.hidden, str(g.subjects)), *(values or ["–"] * (len(told.means) + len(pairs)))]))
        return [self._units, *told.means, *(f"{arm} − {rival}" for arm, rival in pairs)], rows

    def metric_of(self, protocol: str) -> str:
        return metric_label(self.results, summary_metric(self.summary, protocol))

    def details(self, protocol: str) -> tuple[list[str], list[tuple[str, str, list[str]]]]:
        """Heads and rows (labels, arm, values) of every metric, and of every class where they have no table of their own."""
        rows = [r for r in self.summary.rows if r.protocol == protocol]
        split = self.results.kind not in ("classification", "detection") and len(self.results.classes) > 1
        columns = list(dict.fromkeys((r.metric, c) for r in rows for c in ("", *(r.classes if split else ()))))
        heads = [f"{metric_label(self.results, m)}{f', {c}' if c else ''}" for m, c in columns]
        table = []
        for arm, labels in dict.fromkeys((r.arm, r.labels) for r in rows):
            mine = {r.metric: r for r in rows if (r.arm, r.labels) == (arm, labels)}
            first = next(iter(mine.values()))
            values = [_value(mine[m], c) if m in mine else "–" for m, c in columns]
            table.append((_labels(first), arm, values))
        return heads, table

    def _detailed(self) -> list[Row]:
        """The rows of the headline's protocol and labels that tell classes apart."""
        return [r for r in self.summary.rows if (r.protocol, r.labels) == (self.protocol, self.labels) and r.classes]

    @cached_property
    def classes(self) -> tuple[list[str], list[tuple[str, str, list[str]]]]:
        """Heads and rows (class, test cases, values) of the metrics of each class, arms side by side; of shapes by category."""
        if self.results.kind == "parts":
            return self._categories()
        if self.results.kind == "detection":
            return self._sought()
        rows = self._detailed() if self.results.kind == "classification" else []
        rows.sort(key=lambda r: (r.metric != "accuracy", r.metric))
        if not rows:
            return [], []
        group = next(iter(figures.chosen(self.results, self.protocol, self.labels).values()))
        assert group.target is not None
        counts = np.bincount(group.target, minlength=len(self.results.classes))
        heads = [f"{metric_label(self.results, r.metric)}, {r.arm}" for r in rows]
        return heads, [(c, str(counts[i]), [interval(r.classes[c]) for r in rows])
                       for i, c in enumerate(self.results.classes)]

    def _categories(self) -> tuple[list[str], list[tuple[str, str, list[str]]]]:
        rows = [r for r in self._detailed() if r.metric in BY_CATEGORY]
        group = next(iter(figures.chosen(self.results, self.protocol, self.labels).values()))
        names, counts = np.unique(group.categories, return_counts=True)
        if len(names) < 2:
            return [], []
        heads = [f"{metric_label(self.results, self.results.metric)}, {r.arm}" for r in rows]
        return heads, [(name, str(n), [interval(r.classes[name]) for r in rows])
                       for name, n in zip(names.tolist(), counts.tolist(), strict=True)]

    def _sought(self) -> tuple[list[str], list[tuple[str, str, list[str]]]]:
        """Of detection: the primary metric, and the one whose hits are drawn, of each class with its true objects."""
        shown = next(name for name, figure in SCORINGS[self.results.scoring].items() if figure == SHOWN[self.results.scoring])
        rows = [r for name in dict.fromkeys((self.results.metric, shown)) for r in self._detailed() if r.metric == name]
        group = next(iter(figures.chosen(self.results, self.protocol, self.labels).values()))
        heads = [f"{metric_label(self.results, r.metric)}, {r.arm}" for r in rows]
        return heads, [(c, str(n), [interval(r.classes[c]) for r in rows])
                       for c, n in zip(self.results.classes, figures.found_of(group).counts, strict=True)]

    @property
    def splits(self) -> tuple[list[str], list[tuple[str, str, list[str]]]]:
        """Heads and rows (size or difficulty, arm, values) of the metrics of detection that tell objects apart."""
        told = SPLITS.get(self.results.scoring, {})
        rows = {(r.arm, r.metric): interval(r.mean) for r in self._detailed()} if told else {}
        arms = list(dict.fromkeys(arm for arm, _ in rows))
        return ([LABELS[self.results.metric]],
                [(name, arm, [rows[arm, metric]]) for name, metric in told.items() for arm in arms])

    @property
    def right(self) -> str:
        """Of detection: which of what was found is right, in what is drawn of it."""
        figure, own = SHOWN[self.results.scoring], self.results.overlaps
        least = f"{figure.overlaps[0] if figure.overlaps else USUAL:g}"
        if not figure.overlaps and own:
            least = ", ".join(f"{own.get(c, USUAL):g} ({c})" for c in self.results.classes)
        return (f"A hit overlaps a true object of its class, that no surer one has, by an IoU of {least} or more; shown is "
                "what was found from that score on at which F1 over the set is best, of all classes together")

    @cached_property
    def sequences(self) -> tuple[list[str], list[tuple[str, str, list[str]]]]:
        """Heads and rows (sequence, arm, values) of every metric, the mean over sequences with its interval first."""
        if self.results.kind != "propagation":
            return [], []
        means = {(r.arm, r.metric): interval(r.mean) for r in self.summary.rows
                 if (r.protocol, r.labels) == (self.protocol, self.labels)}
        names = list(dict.fromkeys(metric for _, metric in means))
        chosen = figures.chosen(self.results, self.protocol, self.labels)
        cases = sorted({case for group in chosen.values() for case in group.cases})
        rows = [("mean", arm, [means[arm, name] for name in names]) for arm in chosen]
        for case in cases:
            for arm, group in chosen.items():
                if case in group.cases:
                    at = group.cases.index(case)
                    rows.append((case, arm, [f"{group.values[name][:, :, at].mean():.3f}" for name in names]))
        return [metric_label(self.results, name) for name in names], rows

    @cached_property
    def distributions(self) -> list[Plot]:
        at = self.protocol, self.labels
        if self.results.kind == "classification":
            if len(self.results.classes) <= PANELS:
                return figures.true_class(self.results, *at)
            accuracy = [r for r in self._detailed() if r.metric == "accuracy"]
            return [figures.class_accuracies(self.results, accuracy)] if accuracy else []
        if self.results.kind == "detection":
            return [figures.f1_of_cases(self.results, *at)]
        boxes = figures.per_class(self.results, *at) if self.results.kind != "retrieval" else []
        return [*boxes, *figures.paired(self.results, self.summary, *at)]

    @property
    def drawn(self) -> str:
        """What a mark in the figures of the cases stands for."""
        kind = self.results.kind
        trial = kind == "few-shot"
        dots = f"; every dot is one {'trial' if trial else 'test case'}, mean over seeds"
        bars = f"; every bar is one {'trial' if trial else f'test {self.results.counted[:-1]}'}"
        if kind == "classification":
            return dots if len(self.results.classes) <= PANELS else ""
        if kind == "detection":
            return f"{dots}. F1 is 2 · hits / (found + true). {self.right}"
        return bars if kind == "retrieval" else dots + bars

    @cached_property
    def diagnostics(self) -> list[Plot]:
        at = self.protocol, self.labels
        if self.results.kind == "detection":
            alarms = figures.froc(self.results, *at) if "froc" in SCORINGS[self.results.scoring] else []
            return [*alarms, *figures.precision_recall(self.results, *at)] if self.results.scoring == "volume" else \
                [*figures.precision_recall(self.results, *at), *alarms]
        if self.results.kind != "classification":
            return []
        curve = [figures.roc(self.results, self.summary, *at)] if len(self.results.classes) <= PANELS else []
        return [*curve, figures.calibration(self.results, *at), *figures.confusion(self.results, *at)]

    @cached_property
    def curves(self) -> dict[str, list[Plot]]:
        return figures.curves(self.results, self.records)

    @cached_property
    def sheets(self) -> list[tuple[str, list[tuple[str, list[Plot]]]]]:
        return figures.sheets(self.results, self.pictures.strips)

    @cached_property
    def attention(self) -> list[tuple[str, list[Plot], Plot]]:
        return figures.attention(self.results, self.pictures.attention)

    @cached_property
    def reconstructions(self) -> list[list[Plot]]:
        return figures.reconstructions(self.pictures.reconstructions)

    @cached_property
    def overlays(self) -> list[tuple[str, list[Plot]]]:
        return figures.overlays(self.pictures.overlays, LABELS.get(self.results.metric, self.results.metric))

    @cached_property
    def clouds(self) -> list[tuple[str, list[tuple[str, str]], list[Plot]]]:
        return figures.clouds(self.pictures.clouds, LABELS.get(self.results.metric, self.results.metric))

    @cached_property
    def scenes(self) -> list[tuple[str, list[Plot]]]:
        return figures.scenes(self.pictures.scenes)

    @cached_property
    def features(self) -> list[tuple[str, list[Plot]]]:
        return figures.features([f for f in self.pictures.features if f.arm in self.colours])

    @cached_property
    def embeddings(self) -> list[Plot]:
        return figures.embeddings([e for e in self.pictures.embeddings if e.arm in self.colours], self.colours)

    @property
    def contour_colours(self) -> list[tuple[str, str]]:
        return list(zip(self.results.classes, figures.CONTOURS, strict=False)) if self.pictures.overlays else []

    @property
    def budgets(self) -> list[tuple[str, ...]]:
        """arm, protocol, labels, encoder, steps, batch, trainable parameters, seconds a run, what was chosen on validation."""
        table: list[tuple[str, ...]] = []
        for (arm, protocol, labels), cells in groups(self.results).items():
            c, b = cells[0], cells[0].budget
            seconds = sum(x.budget.seconds for x in cells) / len(cells)
            values = {k: sorted({x.chosen[k] for x in cells if k in x.chosen}) for k in c.chosen}
            chosen = "; ".join(f"{k} = {', '.join(f'{v:g}' for v in found)}" for k, found in values.items())
            table.append((arm, PROTOCOLS.get(protocol, protocol), "all" if labels == "all" else str(labels), c.encoder or "–",
                          f"{b.steps:,}", f"{b.batch:,}", f"{b.trainable:,}", f"{seconds:,.0f}", chosen or "–"))
        return table

    @cached_property
    def report(self) -> about.Report:
        """What the page says, as data, without the traits of single cases."""
        r, s = self.results, self.summary
        return about.Report(
            summary=s, results=r.model_copy(update={"traits": {}}), costs=tuple(about.costs(r)),
            purpose=tuple(about.purpose(r, s)), limits=tuple(about.limits(r, s)), origins=tuple(about.origins(r)),
            evaluation=about.evaluation(r), curves=tuple(map(about.trained, self.records)))

    @property
    def costs(self) -> list[tuple[str, ...]]:
        """arm, hours of pretraining, hours of evaluation, runs, energy of pretraining, of evaluation, what was metered."""
        return [(c.arm, *map(about.quantity, (c.pretraining_hours, c.evaluation_hours)), str(c.runs),
                 *map(about.quantity, (c.pretraining_kwh, c.evaluation_kwh)), c.metered or "–") for c in self.report.costs]

    @property
    def cost(self) -> dict[str, str]:
        return {k: str(v) for k, v in self.results.cost.items()}

    @property
    def settings(self) -> dict[str, str]:
        return {name: yaml.safe_dump(_plain(value), sort_keys=False, allow_unicode=True).rstrip()
                for name, value in self.results.settings.items()}

    @property
    def cards(self) -> dict[str, dict[str, str]]:
        return {arm: {k: v if isinstance(v, str) else yaml.safe_dump(_plain(v), default_flow_style=True, width=10_000,
                                                                     allow_unicode=True).removesuffix("...\n").strip()
                      for k, v in card.items()} for arm, card in self.results.pretraining.items()}

    @property
    def subjects(self) -> int:
        return max(r.subjects for r in self.summary.rows)


def _value(row: Row, name: str) -> str:
    """A row's estimate, or that of one of its classes; of few shots with the spread over trials."""
    told = interval(row.classes[name] if name else row.mean)
    return f"{told} ± {row.trial_sd[name]:.3f}" if name in row.trial_sd else told


def _share(spread: Spread) -> str:
    """What share of a variance is of seeds."""
    total = spread.subjects**2 + spread.seeds**2
    return _percent(spread.seeds**2 / total) if total > 0 else "–"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _percents(e: Estimate) -> str:
    return f"{_percent(e.value)} [{100 * e.low:.0f}, {100 * e.high:.0f}]"


def p_value(p: float | None) -> str:
    """0.012, <0.001, – when there is none."""
    if p is None:
        return "–"
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _labels(row: Row | Comparison | Ranking) -> str:
    if not row.labelled_subjects:
        return "none"
    return f"{row.labelled_subjects} (all)" if row.labels == "all" else str(row.labelled_subjects)


def _plain(value: Any) -> Any:
    """Tuples and the like as YAML knows them."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _headline(results: Results, summary: Summary) -> tuple[str, Labels]:
    """Where labels are scarcest, in the first protocol compared: what the detailed figures are drawn for."""
    found = [(c.protocol, c.labels) for c in summary.primary()] or [(r.protocol, r.labels) for r in summary.rows]
    numbers = [labels for protocol, labels in found if protocol == found[0][0] and labels != "all"]
    return found[0][0], min(numbers) if numbers else "all"


def captioned(table: str, caption: str) -> Markup:
    """A table's markup with a caption for those who hear it; on the page its heading says the same."""
    return Markup(str(table).replace(">", f'><caption class="unseen">{escape(caption)}</caption>', 1))


def render(template: str, **names: Any) -> str:
    """A page of this folder's templates."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"signed": signed, "sentence": figures.sentence, "captioned": captioned, "interval": interval}
    return environment.get_template(template).render(**names)


def card(studies: Sequence[Study]) -> str:
    """A model card: Markdown whose front matter lists the figures as model hubs index them."""
    front = yaml.safe_dump({"library_name": "meristem", "tags": ["self-supervised"], "model-index": about.index(
        [(s.results, s.summary) for s in studies])}, sort_keys=False, allow_unicode=True)
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True,
                              lstrip_blocks=True)
    environment.filters |= {"plain": _unmarked, "sentence": figures.sentence}
    return environment.get_template("card.md").render(front=front.rstrip(), studies=studies)


def _unmarked(text: Any) -> str:
    """Text in which Markdown finds no markup."""
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", str(text)).replace("\n", " ")


def write_report(results: Results | Sequence[Results], pictures: Pictures | Sequence[Pictures],
                 curves: Sequence[Curve] | Sequence[Sequence[Curve]], out_dir: Path) -> Path:
    """Write `report.html`, and from the same numbers `report.json` and the model card, into `out_dir`; returns the page's path.

    One Results with its pictures and curves, or sequences of each, one per run: runs of one task on one data set are joined so
    that their arms are compared, others follow one another on the page.
    """
    if isinstance(results, Results):
        given = [cast(Parts, (results, pictures, curves))]
    else:
        given = [cast(Parts, parts) for parts in zip(results, cast(Sequence[Pictures], pictures), curves, strict=True)]
    joined: list[Parts] = []
    for r, p, c in given:
        for i, (old, shown, drawn) in enumerate(joined):
            both = join(old, r)
            if both is not None:
                joined[i] = both, shown + p, [*drawn, *c]
                break
        else:
            joined.append((r, p, c))
    studies = [Study(*parts) for parts in joined]
    out_dir.mkdir(parents=True, exist_ok=True)
    page = out_dir / NAME
    page.write_text(render(NAME, studies=studies, protocol_names=PROTOCOLS, small=SMALL), encoding="utf-8")
    kept = about.Reports(schema_id=about.schema(about.Reports), version=version("meristem"),
                         reports=tuple(s.report for s in studies))
    (out_dir / DATA).write_text(kept.model_dump_json(indent=1, by_alias=True) + "\n", encoding="utf-8")
    (out_dir / CARD).write_text(card(studies), encoding="utf-8")
    return page
