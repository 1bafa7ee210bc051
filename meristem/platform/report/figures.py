"""The report's figures: matplotlib drawings as data URIs, each with the words that say what it shows.

Every figure is one panel of phone width; the page lays panels side by side where there is room.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import Normal, Stroke
from matplotlib.ticker import FixedLocator, NullLocator
from numpy.typing import NDArray
from scipy.ndimage import zoom

from meristem.platform.evaluation import detection, metrics
from meristem.platform.evaluation.results import PROTOCOLS, Group, Labels, Results, Row, Summary, groups, signed
from meristem.platform.evaluation.statistics import Estimate
from meristem.platform.report.pictures import (
    Attention,
    Cloud,
    Embedding,
    FeatureMap,
    Overlay,
    Reconstruction,
    Scene,
    Strip,
    pick_samples,
    sample_groups,
)

Array = NDArray[Any]

BASELINE = ("#6b7280", "#a16207", "#475569")                       # greys: arms from random weights
PRETRAINED = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9")  # Okabe and Ito: told apart by the colour-blind
CONTOURS = ("#ffd166", "#4cc9f0", "#f78fb3", "#80ed99", "#ff9f1c")   # on grey images, one per class
STYLE = {"font.family": "sans-serif", "font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False,
         "axes.edgecolor": "#9ca3af", "axes.labelcolor": "#374151", "text.color": "#1f2937", "xtick.color": "#4b5563",
         "ytick.color": "#4b5563", "axes.grid": True, "grid.color": "#e5e7eb", "grid.linewidth": 0.7, "axes.axisbelow": True,
         "axes.titlesize": 10, "axes.titlelocation": "left", "axes.titleweight": "bold", "legend.frameon": False,
         "svg.hashsalt": "meristem", "figure.facecolor": "white", "lines.linewidth": 1.5}


PANELS = 12  # classes beyond which a panel for each says less than one for all
NAMED = 30  # classes beyond which their names no longer stand beside a figure
MARKS = {detection.HIT: ("#0072b2", "-"), detection.MISSED: ("#cc79a7", "--"), detection.FALSE: ("#d55e00", ":")}
TOLD = 12  # marks of a picture beyond which their classes no longer stand beside them
VIEWPOINT = (-60.0, 25.0)  # azimuth and height, degrees, from which points are seen
SHADES = 12  # classes beyond which colours on a map no longer tell them apart
MARKERS = "osD^vP*X"  # so that colour is not all that tells classes apart
_MANY = 300  # points beyond which a cloud is stored as pixels
_UNKNOWN = np.array([201, 206, 214]) / 255  # light grey


@dataclass(frozen=True)
class Plot:
    """One image of the page.

    source: a data URI. alt: what a reader who cannot see it needs. caption: plain text. wide: it is a strip of frames.
    """

    source: str
    alt: str
    caption: str = ""
    wide: bool = False


def draw(paint: Callable[[Axes], None], alt: str, caption: str = "", size: tuple[float, float] = (3.5, 2.7)) -> Plot:
    """A vector drawing of one axes."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        paint(figure.add_subplot())
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return Plot("data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode(), alt, caption)


def palette(results: Results) -> dict[str, str]:
    """arm -> colour: greys for baselines, hues for pretrained arms."""
    baselines = [a for a in results.arms if a in results.baselines]
    pretrained = [a for a in results.arms if a not in results.baselines]
    return {arm: colours[i % len(colours)] for arms, colours in ((baselines, BASELINE), (pretrained, PRETRAINED))
            for i, arm in enumerate(arms)}


def interval(e: Estimate, sign: bool = False, digits: int = 3) -> str:
    """0.812 [0.795, 0.828]; without the brackets where one subject gives no interval; – where there is no value."""
    value, low, high = (signed(x, digits) if sign else f"{x:.{digits}f}" for x in e)
    if np.isnan(e.low):
        return "–" if np.isnan(e.value) else value
    return f"{value} [{low}, {high}]"


def sentence(text: str) -> str:
    """With a capital in front; abbreviations within stay as they are."""
    return text[:1].upper() + text[1:]


def metric_label(results: Results, name: str) -> str:
    label = metrics.LABELS.get(name, name)
    if name == "hd95":
        label += f" ({results.unit})"
    if name == "nsd" and results.tolerance is not None:
        label += f" at {results.tolerance:g} {results.unit}"
    return label


def chosen(results: Results, protocol: str, labels: Labels) -> dict[str, Group]:
    """arm -> its group at a protocol and label budget."""
    return {a: results.group(cells) for (a, p, n), cells in groups(results).items() if (p, n) == (protocol, labels)}


def _probabilities(group: Group) -> Array:
    assert group.probabilities is not None
    return group.probabilities


def label_efficiency(results: Results, summary: Summary, protocol: str) -> Plot:
    """The primary metric against the number of labelled subjects: means, intervals, and each seed as a dot."""
    metric = summary_metric(summary, protocol)
    rows = [r for r in summary.rows if r.protocol == protocol and r.metric == metric]
    arms = [a for a in results.arms if any(r.arm == a for r in rows)]
    colours = palette(results)
    ticks = sorted({r.labelled_subjects: r.labels for r in rows}.items())

    def paint(ax: Axes) -> None:
        ax.set_xscale("log")
        for i, arm in enumerate(arms):
            mine = sorted((r for r in rows if r.arm == arm), key=lambda r: r.labelled_subjects)
            x = np.array([r.labelled_subjects for r in mine]) * 1.035 ** (i - (len(arms) - 1) / 2)  # no bar hides another
            mean, low, high = (np.array([r.mean[k] for r in mine]) for k in range(3))
            ax.errorbar(x, mean, [mean - low, high - mean], color=colours[arm], marker="o", markersize=4.5, capsize=3,
                        linestyle="--" if arm in results.baselines else "-", label=arm)
            for place, r in zip(x, mine, strict=True):
                ax.plot([place] * len(r.seeds), list(r.seeds.values()), ".", color=colours[arm], alpha=0.35, markersize=5)
        ax.xaxis.set_major_locator(FixedLocator([n for n, _ in ticks]))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_xticklabels([f"{n}\n(all)" if labels == "all" else str(n) for n, labels in ticks])
        if len(ticks) == 1:  # arms of one budget stand side by side
            ax.set_xlim(ticks[0][0] / 1.6, ticks[0][0] * 1.6)
        ax.set_xlabel(f"labelled {results.counted} in training")
        ax.set_ylabel(metric_label(results, metric))
        ax.legend()

    told = "; ".join(f"{r.arm} at {r.labelled_subjects}: {r.mean.value:.3f}" for r in rows)
    how = PROTOCOLS.get(protocol, protocol)
    return draw(paint, f"{metric_label(results, metric)} against labelled {results.counted}, {how}. {told}.",
                f"{sentence(how)}. Points: mean over {results.counted} and seeds. Bars: 95 % interval over test "
                f"{results.counted}. Faint dots: single seeds.", size=(4.6, 3.1))


def means(results: Results, summary: Summary, protocol: str) -> Plot:
    """The protocol's metric of each arm where no label budget varies: means, intervals, and each seed as a dot."""
    metric = summary_metric(summary, protocol)
    rows = [r for r in summary.rows if r.protocol == protocol and r.metric == metric]
    colours = palette(results)

    def paint(ax: Axes) -> None:
        for i, r in enumerate(rows):
            mean, low, high = r.mean
            ax.errorbar(mean, i, xerr=np.nan_to_num([[mean - low], [high - mean]]), color=colours[r.arm], marker="o",
                        markersize=4.5, capsize=3)
            ax.plot(list(r.seeds.values()), [i] * len(r.seeds), ".", color=colours[r.arm], alpha=0.35, markersize=5)
        ax.set_yticks(range(len(rows)), [r.arm for r in rows])
        ax.set_ylim(len(rows) - 0.4, -0.6)
        ax.set_xlabel(metric_label(results, metric))
        ax.grid(axis="y", visible=False)

    told = "; ".join(f"{r.arm}: {r.mean.value:.3f}" for r in rows)
    return draw(paint, f"{metric_label(results, metric)} of each arm: {told}.",
                "Points: mean. Bars: 95 % interval over what was tested. Faint dots: single seeds.",
                size=(4.6, 0.8 + 0.32 * len(rows)))


def differences(several: Sequence[tuple[str, Estimate, bool]], label: str) -> Plot:
    """Changes with their intervals around zero, one below the other; hollow where they are not paired."""
    def paint(ax: Axes) -> None:
        ax.axvline(0, color="#374151", linewidth=0.8)
        for i, (_, e, paired) in enumerate(several):
            clear = not np.isnan(e.low) and not e.low <= 0 <= e.high
            colour = PRETRAINED[0] if clear else BASELINE[0]
            ax.errorbar(e.value, i, xerr=np.nan_to_num([[e.value - e.low], [e.high - e.value]]), color=colour, marker="o",
                        markersize=4.5, capsize=3, markerfacecolor=colour if paired else "white")
        ax.set_yticks(range(len(several)), [name for name, _, _ in several])
        ax.set_ylim(len(several) - 0.4, -0.6)
        ax.set_xlabel(f"difference in {label}, after minus before")
        ax.grid(axis="y", visible=False)

    told = "; ".join(f"{name} {interval(e, sign=True)}" for name, e, _ in several)
    return draw(paint, f"Difference in {label}, after minus before: {told}.",
                "Bars: 95 % interval; blue where it leaves zero out. Hollow: not paired.", size=(5.4, 0.8 + 0.3 * len(several)))


def summary_metric(summary: Summary, protocol: str) -> str:
    """The metric a protocol is compared by: the study's, or where the protocol does not have it the first it has."""
    held = [r.metric for r in summary.rows if r.protocol == protocol]
    return summary.metric if summary.metric in held else held[0]


def per_class(results: Results, protocol: str, labels: Labels) -> list[Plot]:
    """For each class, the values of the primary metric over cases (mean over seeds), one box and its points per arm."""
    made, colours = chosen(results, protocol, labels), palette(results)
    plots = []
    for i, name in enumerate(results.classes):
        values = {arm: group.case_values(results.metric)[:, i].mean(0) for arm, group in made.items()}
        values = {arm: v[~np.isnan(v)] for arm, v in values.items()}
        if not all(len(v) for v in values.values()):
            continue

        def paint(ax: Axes, values: Mapping[str, Array] = values, name: str = name) -> None:
            _boxes(ax, values, colours)
            ax.set_ylabel(metric_label(results, results.metric))
            ax.set_title(name)

        told = "; ".join(f"{arm} median {np.median(v):.3f}, lowest {v.min():.3f}" for arm, v in values.items())
        plots.append(draw(paint, f"Distribution of {metric_label(results, results.metric)} over cases, {name}: {told}."))
    return plots


def true_class(results: Results, protocol: str, labels: Labels) -> list[Plot]:
    """For each class, the probability given to the true class over its cases (mean over seeds), per arm."""
    made, colours = chosen(results, protocol, labels), palette(results)
    plots = []
    for i, name in enumerate(results.classes):
        values = {arm: _probabilities(group)[:, group.target == i, i].mean(0) for arm, group in made.items()}
        values = {arm: v for arm, v in values.items() if len(v)}
        if not values:
            continue

        def paint(ax: Axes, values: Mapping[str, Array] = values, name: str = name) -> None:
            _boxes(ax, values, colours)
            ax.set_ylim(-0.02, 1.02)
            ax.set_ylabel("p(true class)")
            ax.set_title(name)

        told = "; ".join(f"{arm} median {np.median(v):.3f}" for arm, v in values.items())
        plots.append(draw(paint, f"Probability given to the true class over cases of {name}: {told}."))
    return plots


def _boxes(ax: Axes, values: Mapping[str, Array], colours: Mapping[str, str]) -> None:
    jitter = np.random.default_rng(0)
    for i, (arm, v) in enumerate(values.items()):
        ax.plot(i + jitter.uniform(-0.16, 0.16, len(v)), v, ".", color=colours[arm], alpha=0.45, markersize=4, zorder=2,
                rasterized=len(v) > _MANY)
        box = ax.boxplot(v, positions=[i], widths=0.5, showfliers=False, patch_artist=True, manage_ticks=False)
        for part in (*box["boxes"], *box["whiskers"], *box["caps"], *box["medians"]):
            part.set_color(colours[arm])
        for patch in box["boxes"]:
            patch.set_facecolor("none")
    ax.set_xticks(range(len(values)), list(values))
    ax.set_xlim(-0.6, len(values) - 0.4)
    ax.grid(axis="x", visible=False)


def paired(results: Results, summary: Summary, protocol: str, labels: Labels) -> list[Plot]:
    """Each test subject's own difference to the baseline, in order: how many gain, and whether some lose much."""
    cells = groups(results)
    colours = palette(results)
    plots = []
    for c in (c for c in summary.primary() if (c.protocol, c.labels) == (protocol, labels)):
        mine, theirs = cells[c.arm, protocol, labels], cells[c.baseline, protocol, labels]
        seeds = {x.seed for x in mine} & {x.seed for x in theirs}
        shared = {case.case for case in mine[0].cases}.intersection(*({k.case for k in x.cases} for x in (*mine, *theirs)))
        a, b = (results.group([x for x in some if x.seed in seeds], shared) for some in (mine, theirs))
        d = np.sort(a.subject_values(results.metric) - b.subject_values(results.metric))
        gains = int(((d > 0) if results.higher[results.metric] else (d < 0)).sum())

        def paint(ax: Axes, d: Array = d, c: Any = c) -> None:
            ax.bar(range(1, len(d) + 1), d, color=colours[c.arm], width=0.8)
            ax.axhspan(c.difference.low, c.difference.high, color=colours[c.arm], alpha=0.18, linewidth=0)
            ax.axhline(c.difference.value, color=colours[c.arm], linestyle="--", linewidth=1)
            ax.axhline(0, color="#374151", linewidth=0.8)
            ax.set_xlabel(f"test {results.counted}, in order of difference")
            ax.set_ylabel(f"difference in {metric_label(results, results.metric)}")
            ax.set_title(f"{c.arm} − {c.baseline}")
            ax.set_xlim(0.2, len(d) + 0.8)
            ax.grid(axis="x", visible=False)

        plots.append(draw(paint, f"Difference in {metric_label(results, results.metric)} of each test {results.counted[:-1]}, "
                          f"{c.arm} minus {c.baseline}: {gains} of {len(d)} {results.counted} are better with pretraining; "
                          f"mean {signed(c.difference.value)}, band its 95 % interval."))
    return plots


# ---- training

@dataclass(frozen=True)
class Curve:
    """The records of one run's metrics.jsonl.

    stage: its heading (pretraining, fine-tuning). arm: gives its colour. labels: the budget it was tuned on, gives its dash.
    """

    stage: str
    arm: str
    records: Sequence[Mapping[str, Any]]
    labels: str = ""

    @property
    def name(self) -> str:
        return f"{self.arm}, {self.labels} labels" if self.labels else self.arm


AXES = {"lr": "learning rate", "samples_per_s": "samples per second", "data_wait": "share of time waiting for data",
        "rank": "effective rank of features", "std": "standard deviation of features", "skipped": "skipped steps"}
_SKIP = {"step", "dims"}
_DASHES = ("-", "--", ":", "-.")


def curves(results: Results, several: Sequence[Curve]) -> dict[str, list[Plot]]:
    """stage -> one panel per quantity that its records hold, against the step; the loss first."""
    colours = palette(results)
    found: dict[str, list[Plot]] = {}
    for stage in dict.fromkeys(c.stage for c in several):
        mine = [c for c in several if c.stage == stage and c.records]
        names = dict.fromkeys(k for c in mine for r in c.records for k, v in r.items()
                              if k not in _SKIP and isinstance(v, int | float) and not isinstance(v, bool))
        order = sorted(names, key=lambda k: (not k.startswith("loss"), k in AXES, list(names).index(k)))
        plots = [p for p in (_curve(mine, name, stage, colours) for name in order) if p is not None]
        if plots:
            found[stage] = plots
    return found


def _curve(several: Sequence[Curve], name: str, stage: str, colours: Mapping[str, str]) -> Plot | None:
    lines = []
    for c in several:
        points = [(r["step"], r[name]) for r in c.records if "step" in r and isinstance(r.get(name), int | float)]
        points = [(x, y) for x, y in points if np.isfinite(y)]
        if points:
            lines.append((c, np.array(points, dtype=float)))
    if not lines:
        return None
    label = AXES.get(name, name.replace("_", " "))
    spare = iter(PRETRAINED)
    shown = {arm: colours.get(arm) or next(spare, "#374151") for arm in dict.fromkeys(c.arm for c, _ in lines)}
    budgets = sorted({c.labels for c, _ in lines}, key=lambda labels: float(labels) if labels.isdigit() else float("inf"))
    dashes = {labels: _DASHES[i % len(_DASHES)] for i, labels in enumerate(budgets)}
    lines.sort(key=lambda line: (list(shown).index(line[0].arm), budgets.index(line[0].labels)))

    def paint(ax: Axes) -> None:
        labelled = set[str]()
        for c, points in lines:
            ax.plot(points[:, 0], points[:, 1], color=shown[c.arm], linestyle=dashes[c.labels], linewidth=1.1, alpha=0.85,
                    label=None if c.name in labelled else c.name, marker="." if len(points) == 1 else None)
            labelled.add(c.name)
        ax.set_xlabel("step")
        ax.set_title(label)
        if len(labelled) > 1 and name == "loss":  # once for the stage, where lines differ most
            bottom, top = ax.get_ylim()  # room above the lines for the legend
            ax.set_ylim(bottom, top + (top - bottom) * 0.2 * len(labelled))
            ax.legend(loc="upper right")
        if name == "data_wait":
            ax.set_ylim(0, 1)
        elif name in ("samples_per_s", "rank", "std"):  # lights: how far from nothing, not how the last digit moves
            ax.set_ylim(0, 1.15 * ax.get_ylim()[1])

    told = "; ".join(f"{c.name} from {p[0, 1]:.4g} to {p[-1, 1]:.4g}" for c, p in lines[:6])
    tall = 0.2 * max(len({c.name for c, _ in lines}) - 4, 0) if name == "loss" else 0.0  # for a long legend
    return draw(paint, f"{label} over steps, {stage}: {told}{' …' if len(lines) > 6 else ''}.", size=(3.4, 2.3 + tall))


# ---- detection

def found_of(group: Group) -> detection.Detections:
    assert group.detections is not None
    return group.detections


def f1_of_cases(results: Results, protocol: str, labels: Labels) -> Plot:
    """F1 of each case (mean over seeds), one box and its points per arm."""
    values = {arm: found_of(group).f1().mean(0) for arm, group in chosen(results, protocol, labels).items()}
    colours = palette(results)

    def paint(ax: Axes) -> None:
        _boxes(ax, values, colours)
        ax.set_ylim(-0.04, 1.04)
        ax.set_ylabel("F1")

    told = "; ".join(f"{arm} median {np.median(v):.3f}, lowest {v.min():.3f}" for arm, v in values.items())
    return draw(paint, f"Distribution of F1 over cases: {told}.")


def precision_recall(results: Results, protocol: str, labels: Labels) -> list[Plot]:
    """For each class, or for many the mean over them, the envelope of precision against recall per arm, mean over seeds."""
    grid = np.linspace(0, 1, 101)

    def of(group: Group, label: int) -> Array | None:
        found, figure = found_of(group), detection.SHOWN[results.scoring]
        threshold = found.thresholds(figure, label)[0]
        curves = [found.curve(figure, seed, label, threshold) for seed in range(len(found.cases))]
        return np.mean([c.envelope(grid) for c in curves], axis=0) if curves[0].truths.sum() else None

    return _by_class(results, protocol, labels, grid, of, "recall", "precision",
                     "Highest precision at that recall or above, mean over seeds.")


def froc(results: Results, protocol: str, labels: Labels, replicates: int = 500) -> list[Plot]:
    """Sensitivity against false alarms per case, as `precision_recall`, with a pointwise 95 % band over subjects."""
    figure = detection.SCORINGS[results.scoring]["froc"]
    grid = np.geomspace(min(detection.RATES.values()), max(detection.RATES.values()), 25)

    def of(group: Group, label: int) -> Array | None:
        found = found_of(group)
        curves = [found.curve(figure, seed, label, figure.overlaps[0]) for seed in range(len(found.cases))]
        weights = np.concatenate([np.ones((1, len(group.cases))), _resampled(group, replicates)])
        return np.mean([c.sensitivity(weights, grid) for c in curves], axis=0) if curves[0].truths.sum() else None

    return _by_class(results, protocol, labels, grid, of, "false alarms per case", "sensitivity",
                     f"Hits from an IoU of {figure.overlaps[0]:g}; mean over seeds. Band: pointwise 95 % interval over test "
                     f"{results.counted}.")


def _by_class(results: Results, protocol: str, labels: Labels, grid: Array,
              of: Callable[[Group, int], Array | None], x: str, y: str, caption: str) -> list[Plot]:
    """A panel for each class, or one for many, of curves (grid,), or (1 + R, grid) with resampled ones, that `of` tells."""
    made, colours = chosen(results, protocol, labels), palette(results)
    panels = {name: [i] for i, name in enumerate(results.classes)}
    if len(panels) > PANELS:
        panels = {"mean over classes": [*range(len(panels))]}
    plots: list[Plot] = []
    for title, members in panels.items():
        curves = {arm: [c for label in members if (c := of(group, label)) is not None] for arm, group in made.items()}
        means = {arm: np.atleast_2d(np.mean(several, axis=0)) for arm, several in curves.items() if several}
        if not means:
            continue

        def paint(ax: Axes, means: Mapping[str, Array] = means, title: str = title) -> None:
            for arm, table in means.items():
                ax.plot(grid, table[0], color=colours[arm], label=arm, linestyle="--" if arm in results.baselines else "-")
                if len(table) > 1:
                    low, high = np.nanquantile(table[1:], [0.025, 0.975], axis=0)
                    ax.fill_between(grid, low, high, color=colours[arm], alpha=0.16, linewidth=0)
            if grid[0] > 0:
                ax.set_xscale("log", base=2)
                ax.xaxis.set_major_locator(FixedLocator(list(detection.RATES.values())))
                ax.xaxis.set_minor_locator(NullLocator())
                ax.set_xticklabels(list(detection.RATES))
            ax.set_ylim(-0.02, 1.04)
            ax.set_xlabel(x)
            ax.set_ylabel(y)
            ax.set_title(title)
            ax.legend(loc="lower right" if grid[0] > 0 else "lower left")

        middle = len(grid) // 2
        told = "; ".join(f"{arm} {table[0, middle]:.2f} at {grid[middle]:.2g}" for arm, table in means.items())
        plots.append(draw(paint, f"{sentence(y)} against {x}, {title}: {told}.", caption if not plots else ""))
    return plots


def scenes(several: Iterable[Scene]) -> list[tuple[str, list[Plot]]]:
    """(heading, panels) per case: one per arm, with what it found and what it missed."""
    rows = []
    for scene in several:
        panels = []
        for arm, marks in scene.marks.items():
            n = {state: int((marks[:, -1] == state).sum()) for state in MARKS}
            text = f"{arm}, F1 {scene.scores[arm]:.3f}" if arm in scene.scores else arm
            told = ", ".join(f"{n[state]} {name}{'s' * (n[state] != 1 and state != detection.MISSED)}" for state, name in
                             ((detection.HIT, "hit"), (detection.MISSED, "missed"), (detection.FALSE, "false alarm")))
            panels.append(marked(scene, marks, f"{text}: {told}", f"{scene.rank} case {scene.case}, {text}: {told}"))
        rows.append((f"{scene.rank} case", panels))
    return rows


def marked(scene: Scene, marks: Array, caption: str, alt: str) -> Plot:
    """What was found, and what was missed, over the backdrop of a scene: hits solid, misses dashed, false alarms dotted."""
    back, timeline = scene.backdrop, scene.backdrop.ndim == 1
    plan = not timeline and back.shape[1] == 2 and back.ndim == 2 and marks.shape[1] == 7
    with mpl.rc_context(STYLE):
        if timeline:
            return _timeline(scene, marks, caption, alt)
        height, width = (1.0, 1.0) if plan else (back.shape[0] * scene.aspect, back.shape[1])
        inches = 3.0 / max(height, width)
        figure = Figure(figsize=(inches * width, inches * height), dpi=150)
        ax = figure.add_axes((0, 0, 1, 1))
        ax.axis("off")
        shapes = [(_footprint(row[:5]) if plan else _rectangle(row[:4]), int(row[-2]), int(row[-1])) for row in marks]
        if plan:
            everyone = (_footprint(row[:5]) for table in scene.marks.values() for row in table)  # one window for all arms
            everything = np.concatenate([back, *everyone])
            low, high = everything.min(0), everything.max(0)
            reach = 0.53 * max(float((high - low).max()), 1e-6)
            middle = (low + high) / 2
            ax.scatter(back[:, 0], back[:, 1], s=0.6, color="#9ca3af", linewidths=0)
            ax.set(xlim=(middle[0] - reach, middle[0] + reach), ylim=(middle[1] - reach, middle[1] + reach), aspect="equal")
        else:
            ax.imshow(_shade(back, _limits(back), back.ndim == 3), aspect=scene.aspect,
                      extent=(0, back.shape[1], back.shape[0], 0))
            ax.set(xlim=(0, back.shape[1]), ylim=(back.shape[0], 0))
        shown = [shape for shape in shapes if shape[2] in MARKS]
        for corners, label, state in shown:
            colour, dash = MARKS[state]
            outline = ax.plot(*np.concatenate([corners, corners[:1]]).T, color=colour, linestyle=dash, linewidth=1.8)[0]
            outline.set_path_effects([Stroke(linewidth=3.0, foreground="white", alpha=0.75), Normal()])
            if len(shown) <= TOLD:
                top = corners[corners[:, 1].argmax() if plan else corners.sum(1).argmin()]
                ax.text(top[0], top[1], scene.names[label], color=colour, fontsize=8, va="bottom", clip_on=True,
                        path_effects=[Stroke(linewidth=2, foreground="white"), Normal()])
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return Plot("data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode(), alt, caption)


def _rectangle(box: Array) -> Array:
    """Left, top, right, bottom to corners (4, 2)."""
    return box[[[0, 1], [2, 1], [2, 3], [0, 3]]]


def _footprint(box: Array) -> Array:
    """Centre, length, width, heading to corners (4, 2) and the middle of the front, to which its heading points."""
    local = np.array([[1, 0], [1, 1], [-1, 1], [-1, -1], [1, -1], [1, 0], [1.3, 0], [1, 0]]) * box[2:4] / 2
    cos, sin = np.cos(box[4]), np.sin(box[4])
    return np.asarray(local @ np.array([[cos, sin], [-sin, cos]]) + box[:2])


def _timeline(scene: Scene, marks: Array, caption: str, alt: str) -> Plot:
    """A lane for each class that occurs: what is true above, what was found below."""
    lanes = {label: i for i, label in enumerate(sorted({int(x) for m in scene.marks.values() for x in m[:, -2]}))}

    def paint(ax: Axes) -> None:
        for first, last, label, state in marks:
            place = lanes[int(label)]
            if state == detection.MET:
                ax.plot([first, last], [place - 0.16] * 2, color="#9ca3af", linewidth=3, solid_capstyle="butt")
            else:
                colour, dash = MARKS[int(state)]
                level = place - 0.16 if state == detection.MISSED else place + 0.16
                ax.plot([first, last], [level] * 2, color=colour, linewidth=3, solid_capstyle="butt",
                        linestyle={":": (0, (0.6, 0.4)), "--": (0, (2, 0.8))}.get(dash, "-"))
        ax.set_yticks(range(len(lanes)), [scene.names[label] for label in lanes])
        ax.set_ylim(max(len(lanes), 1) - 0.4, -0.6)
        ax.set_xlim(*scene.backdrop.tolist())
        ax.set_xlabel("seconds")
        ax.grid(axis="y", visible=False)

    return draw(paint, alt, caption, size=(7.2, 0.8 + 0.34 * max(len(lanes), 1)))


# ---- classification

def calibration(results: Results, protocol: str, labels: Labels) -> Plot:
    """Accuracy against confidence in the bins of the calibration error; seeds pooled."""
    made, colours = chosen(results, protocol, labels), palette(results)
    bins = {}
    for arm, group in made.items():
        p = _probabilities(group)
        assert group.target is not None
        bins[arm] = metrics.reliability(np.tile(group.target, len(p)), p.reshape(-1, p.shape[-1]))

    def paint(ax: Axes) -> None:
        ax.plot([0, 1], [0, 1], color="#9ca3af", linewidth=1, linestyle=":")
        for arm, found in bins.items():
            x, y, n = map(np.array, zip(*found, strict=True))
            ax.plot(x, y, color=colours[arm], linewidth=1.1, label=arm)
            ax.scatter(x, y, s=6 + 90 * n / n.sum(), color=colours[arm], alpha=0.6, linewidth=0)
        ax.set_xlim(max(0.0, 1 / len(results.classes) - 0.05), 1.02)
        ax.set_ylim(-0.02, 1.04)
        ax.set_xlabel("confidence (largest probability)")
        ax.set_ylabel("accuracy")
        ax.set_title("calibration")
        ax.legend(loc="upper left")

    told = "; ".join(f"{arm}: {len(b)} bins, accuracy {b[-1][1]:.2f} at confidence {b[-1][0]:.2f}" for arm, b in bins.items())
    return draw(paint, f"Calibration, accuracy against confidence: {told}.",
                f"{metrics.BINS} bins of equal width. Dot area: share of cases. Dotted: perfect calibration. Seeds pooled.")


def roc(results: Results, summary: Summary, protocol: str, labels: Labels, replicates: int = 500) -> Plot:
    """ROC curve, mean over seeds, with a pointwise 95 % band over subjects; several classes: macro, one against the rest."""
    made, colours = chosen(results, protocol, labels), palette(results)
    grid = np.linspace(0, 1, 101)
    bands = {arm: _roc_band(group, grid, replicates) for arm, group in made.items()}
    areas = {arm: interval(row.mean) for arm in made if (row := summary.row(arm, protocol, labels, "auroc"))}

    def paint(ax: Axes) -> None:
        ax.plot([0, 1], [0, 1], color="#9ca3af", linewidth=1, linestyle=":")
        for arm, (mean, low, high) in bands.items():
            ax.fill_between(grid, low, high, color=colours[arm], alpha=0.16, linewidth=0)
            ax.plot(grid, mean, color=colours[arm], label=f"{arm} {areas[arm]}")
        ax.set_xlabel("false positive rate")
        ax.set_ylabel("true positive rate")
        ax.set_title("ROC" if len(results.classes) == 2 else "ROC, mean over classes")
        ax.set_xlim(-0.01, 1.01)
        ax.set_ylim(-0.01, 1.02)
        ax.legend(loc="lower right")

    told = "; ".join(f"{arm} AUROC {areas[arm]}, true positive rate {mean[10]:.2f} at 10 % false positives"
                     for arm, (mean, _, _) in bands.items())
    return draw(paint, f"ROC curves: {told}.",
                "Mean over seeds and, for several classes, over classes one against the rest. Band: pointwise 95 % interval "
                f"over test {results.counted}. Legend: AUROC with its interval.")


def _resampled(group: Group, replicates: int) -> Array:
    """(R, cases) weights of the cases of resampled subjects."""
    n = len(group.subjects)
    return np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=replicates)[:, group.owner].astype(float)


def _roc_band(group: Group, grid: Array, replicates: int) -> tuple[Array, Array, Array]:
    target, p = group.target, _probabilities(group)
    assert target is not None
    classes = [1] if p.shape[-1] == 2 else [c for c in range(p.shape[-1]) if (target == c).any()]
    weights = np.concatenate([np.ones((1, len(target))), _resampled(group, replicates)])
    curves = np.zeros((len(weights), len(grid)))
    for seed in p:
        for c in classes:
            order = np.argsort(-seed[:, c], kind="stable")
            last = np.append(np.diff(seed[order, c]) != 0, True)  # ties move together
            plus, minus = (np.cumsum(weights[:, order] * (side[order]), 1)[:, last] for side in (target == c, target != c))
            for i in range(len(weights)):
                if plus[i, -1] and minus[i, -1]:
                    curves[i] += np.interp(grid, np.append(0, minus[i] / minus[i, -1]), np.append(0, plus[i] / plus[i, -1]))
    curves /= len(p) * len(classes)
    low, high = np.quantile(curves[1:], [0.025, 0.975], axis=0)
    return curves[0], low, high


def class_accuracies(results: Results, rows: Sequence[Row]) -> Plot:
    """Accuracy within every class, one row of the summary per arm; few classes by name, many as a curve in order."""
    colours = palette(results)
    estimates = {r.arm: np.array([r.classes[c] for c in results.classes]) for r in rows}  # (K, 3)
    known = {arm: e[~np.isnan(e[:, 0]), 0] for arm, e in estimates.items()}
    order = np.argsort(next(iter(estimates.values()))[:, 0], kind="stable")
    named = len(order) <= NAMED

    def paint(ax: Axes) -> None:
        for i, (arm, e) in enumerate(estimates.items()):
            if named:
                value, low, high = e[order].T
                bars = np.nan_to_num([value - low, high - value])
                ax.errorbar(value, np.arange(len(order)) + 0.16 * (i - (len(estimates) - 1) / 2), xerr=bars, fmt="o",
                            markersize=3.5, elinewidth=1, color=colours[arm], label=arm)
            else:
                ax.plot(np.sort(known[arm]), np.linspace(0, 1, len(known[arm])), color=colours[arm], label=arm)
        ax.set_xlim(-0.02, 1.02)
        ax.set_xlabel("accuracy within the class")
        if named:
            ax.set_yticks(range(len(order)), [results.classes[i] for i in order])
            ax.grid(axis="y", visible=False)
        else:
            ax.set_ylabel("share of classes below")
        figure = ax.figure
        assert isinstance(figure, Figure)
        figure.legend(loc="outside upper center", ncols=3)

    told = "; ".join(f"{arm} median {np.median(v):.3f}, {np.mean(v == 0):.0%} of classes never recognised"
                     for arm, v in known.items())
    return draw(paint, f"Accuracy within each of {len(order)} classes: {told}.",
                f"Bars: 95 % interval over test {results.counted}." if named else "",
                size=(4.6, 1.1 + 0.22 * len(order)) if named else (4.6, 3.1))


def confusion(results: Results, protocol: str, labels: Labels) -> list[Plot]:
    """Counts of truth against prediction per arm, mean over seeds, shaded by the share of the true class.

    Many classes: shares without numbers, then without names, and in words what is confused most.
    """
    plots = []
    size = len(results.classes)
    for arm, group in chosen(results, protocol, labels).items():
        if group.target is None:
            continue
        tables = [metrics.confusion(group.target, seed.argmax(-1), size) for seed in _probabilities(group)]
        table = np.mean(tables, axis=0)
        share = table / np.maximum(table.sum(1, keepdims=True), 1)

        def paint(ax: Axes, table: Array = table, share: Array = share, arm: str = arm) -> None:
            image = ax.imshow(share, cmap="Blues", vmin=0, vmax=1, interpolation="nearest" if size <= NAMED else "auto")
            if size <= 6:
                for i, j in np.ndindex(*table.shape):
                    ax.text(j, i, f"{table[i, j]:.1f}\n{share[i, j]:.0%}", ha="center", va="center",
                            color="white" if share[i, j] > 0.55 else "#1f2937", fontsize=9.5 if size <= 4 else 7)
            else:
                ax.figure.colorbar(image, ax=ax, shrink=0.7, label="share of the true class")
            if size <= NAMED:
                few, points = size <= 4, 9.5 if size <= 4 else 7.5
                ax.set_xticks(range(size), results.classes, rotation=0 if few else 90, fontsize=points)
                ax.set_yticks(range(size), results.classes, va="center", rotation=90 if few else 0, fontsize=points)
            ax.set_xlabel("predicted")
            ax.set_ylabel("true")
            ax.set_title(f"confusion, {arm}")
            ax.grid(visible=False)

        told, caption = "; ".join(f"{share[i, i]:.0%} of {name} recognised" for i, name in enumerate(results.classes)), ""
        if size > 6:
            present = table.sum(1) > 0
            told = f"{size} classes, {np.diag(share)[present].mean():.0%} recognised on average"
            wrong = np.where(np.eye(size, dtype=bool), 0, table)
            worst = [np.unravel_index(i, wrong.shape) for i in np.argsort(-wrong, axis=None, kind="stable")[:5]]
            pairs = [f"{results.classes[i]} as {results.classes[j]} ({wrong[i, j]:.1f} cases)" for i, j in worst if wrong[i, j]]
            caption = f"Most often mistaken: {', '.join(pairs)}." if pairs else ""
        side = 2.9 if size <= 4 else 3.4 if size <= 12 else 5.0
        plots.append(draw(paint, f"Confusion matrix of {arm}: {told}.", caption, size=(1.12 * side, side)))
    return plots


# ---- pictures

def raster(image: Array, aspect: float, caption: str, alt: str, truth: Array | None = None, prediction: Array | None = None,
           classes: Sequence[int] = (), limits: tuple[float, float] | None = None, times: Sequence[float] = (),
           heat: Array | None = None) -> Plot:
    """A slice (H, W) or (H, W, 3) as an image; NaN is light grey. Contours: truth thin and white-edged, prediction in colour.

    times: arrays have a first axis of frames, drawn side by side, each under its second. heat: (n, h, w) of the frames, laid
    over them in colour where it exceeds 1.
    """
    shown = _shade(image, limits or _limits(image), image.ndim - bool(times) == 3)
    if heat is not None:
        shown = _heated(shown, heat)
    if times:
        shown = _side_by_side(shown, 1.0)
        truth, prediction = (None if x is None else _side_by_side(x, 0) for x in (truth, prediction))
    height, width = shown.shape[0] * aspect, shown.shape[1]
    longest = max(height, width)
    scale, head = (7.2, 0.26) if times else (2.1, 0.0)  # inches
    size = (scale * width / longest, scale * height / longest + head)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=size, dpi=130 if times else 170)
        ax = figure.add_axes((0, 0, 1, 1 - head / size[1]))
        ax.axis("off")
        ax.imshow(shown, aspect=aspect)
        for i, second in enumerate(times):
            ax.text((i + 0.5) / len(times), 1.02, _seconds(second, times), transform=ax.transAxes, ha="center", va="bottom",
                    fontsize=11, color="#4b5563")
        thin = 0.6 if times else 1.0
        for i, value in enumerate(classes):
            if truth is not None and (truth == value).any():
                ax.contour(truth == value, [0.5], colors="white", linewidths=1.6 * thin)
                ax.contour(truth == value, [0.5], colors="#111827", linewidths=0.8 * thin, linestyles="dashed")
            if prediction is not None and (prediction == value).any():
                ax.contour(prediction == value, [0.5], colors=CONTOURS[i % len(CONTOURS)], linewidths=1.5 * thin)
        buffer = io.BytesIO()
        if times:  # photographs, and many of them
            figure.savefig(buffer, format="jpeg", pil_kwargs={"quality": 82})
        else:
            figure.savefig(buffer, format="png", metadata={"Software": None})
    kind = "jpeg" if times else "png"
    return Plot(f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}", alt, caption, bool(times))


def _shade(image: Array, limits: tuple[float, float], colour: bool) -> Array:
    """(…, H, W) or, in colour, (…, H, W, 3) to (…, H, W, 3) in 0…1."""
    low, high = limits
    known = np.clip((np.nan_to_num(image) - low) / max(high - low, 1e-12), 0, 1)
    missing = np.isnan(image)
    if not colour:
        known, missing = np.repeat(known[..., None], 3, -1), missing[..., None]
    return np.where(missing, _UNKNOWN, known)


def _heated(shown: Array, heat: Array) -> Array:
    """Frames (n, H, W, 3) under what a map (n, h, w) exceeds 1 by, resampled linearly; its most is opaque to three quarters."""
    fine = np.stack([zoom(h.astype(float), np.array(shown.shape[1:3]) / h.shape, order=1, grid_mode=True, mode="nearest")
                     for h in heat])
    strength = np.clip((fine - 1) / max(float(heat.max()) - 1, 1e-12), 0, 1)[..., None]
    return shown * (1 - 0.75 * strength) + 0.75 * strength * mpl.colormaps["inferno"](0.25 + 0.75 * strength[..., 0])[..., :3]


def _side_by_side(frames: Array, fill: float) -> Array:
    """(n, H, W, …) to (H, n·W + gaps, …)."""
    gap = max(1, round(0.03 * frames.shape[2]))
    padding = [(0, 0), (0, gap), *[(0, 0)] * (frames.ndim - 3)]
    return np.concatenate([np.pad(f, padding, constant_values=fill) for f in frames], 1)[:, :-gap]


def _seconds(second: float, times: Sequence[float]) -> str:
    return f"{second:.{1 if max(times) - min(times) >= 2 else 2}f} s"


def _limits(image: Array) -> tuple[float, float]:
    """Display window: the 0.5th to the 99.5th percentile of what is known."""
    known = image[np.isfinite(image)]
    if not known.size:
        return 0.0, 1.0
    low, high = np.percentile(known, [0.5, 99.5])
    return float(low), float(high) if high > low else float(low) + 1.0


def reconstructions(several: Iterable[Reconstruction]) -> list[list[Plot]]:
    """Rows of original, masked, reconstruction, in one display window per row."""
    rows = []
    for i, r in enumerate(several, 1):
        window = _limits(r.original)
        parts = (("original", r.original), ("masked", r.masked), ("reconstruction", r.reconstruction))
        title = f"Example {i}, {r.label}" if r.label else f"Example {i}"
        rows.append([raster(image, r.aspect, name, f"{title}: {name}{_span(r.times)}", limits=window, times=r.times)
                     for name, image in parts])
    return rows


def _span(times: Sequence[float]) -> str:
    """What the alternative text says of a strip; nothing of a single picture."""
    return f", {len(times)} frames from {_seconds(times[0], times)} to {_seconds(times[-1], times)}" if times else ""


def overlays(several: Iterable[Overlay], metric: str) -> list[tuple[str, list[Plot]]]:
    """(heading, panels) per case: the same slice or strip once per arm, with the contours of the truth and the prediction."""
    rows = []
    for o in several:
        values = [int(v) for v in np.unique(o.truth) if v > 0] or [1]
        values = sorted({*values, *(int(v) for p in o.predictions.values() for v in np.unique(p) if v > 0)})
        panels = []
        for arm, prediction in o.predictions.items():
            score = o.scores.get(arm)
            text = f"{arm}, {metric} {score:.3f}" if score is not None else arm
            panels.append(raster(o.image, o.aspect, text, f"{o.rank} case {o.case}, {text}: contours of truth and prediction"
                                 f"{_span(o.times)}", o.truth, prediction, values, times=o.times))
        rows.append((f"{o.rank} case", panels))
    return rows


def clouds(several: Iterable[Cloud], metric: str) -> list[tuple[str, list[tuple[str, str]], list[Plot]]]:
    """(heading, (name, colour) of the labels, panels) per case: the truth, then what each arm says."""
    rows = []
    for c in several:
        hues = mpl.colormaps["tab10" if len(c.names) <= 10 else "tab20"]
        colours = {value: mpl.colors.to_hex(hues(i % hues.N)) for i, value in enumerate(sorted(c.names))}
        title = f"{c.rank} case{f', {c.category}' if c.category else ''}"
        panels = [scatter(c.points, c.truth, colours, "truth", f"{title}: points coloured by their true label")]
        for arm, prediction in c.predictions.items():
            wrong = (prediction != c.truth) & (c.truth >= 0)
            text = f"{arm}, {metric} {c.scores[arm]:.3f}" if arm in c.scores else arm
            panels.append(scatter(c.points, prediction, colours, text, f"{title}, {text}: points coloured by their predicted "
                                  f"label, {wrong.mean():.0%} of them wrong", wrong))
        rows.append((title, [(c.names[value], colour) for value, colour in colours.items()], panels))
    return rows


def scatter(points: Array, label: Array, colours: Mapping[int, str], caption: str, alt: str,
            wrong: Array | None = None) -> Plot:
    """Points (N, 3) seen from a corner above, z up, the far ones paler; those that are `wrong` are ringed."""
    full = np.array([mpl.colors.to_rgb(colours.get(int(v), "#c9ced6")) for v in label])
    return _seen(points, full, caption, alt, np.zeros(len(points), bool) if wrong is None else wrong)


def _seen(points: Array, full: Array, caption: str, alt: str, ringed: Array) -> Plot:
    """Points (N, 3) in colours (N, 3), drawn as `scatter` does."""
    azimuth, height = np.radians(VIEWPOINT)
    right = np.array([-np.sin(azimuth), np.cos(azimuth), 0])
    near = np.array([np.cos(azimuth) * np.cos(height), np.sin(azimuth) * np.cos(height), np.sin(height)])
    centred = points - (points.min(0) + points.max(0)) / 2
    x, y, depth = centred @ right, centred @ np.cross(near, right), centred @ near
    order = np.argsort(depth)
    pale = (0.45 * (depth.max() - depth) / max(float(np.ptp(depth)), 1e-12))[:, None]
    shown = full * (1 - pale) + pale
    reach = 1.04 * max(float(np.abs(x).max()), float(np.abs(y).max()), 1e-12)
    figure = Figure(figsize=(2.1, 2.1), dpi=170)
    ax = figure.add_axes((0, 0, 1, 1))
    ax.axis("off")
    ax.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
    rings = np.where(ringed, 0.4, 0.0)
    ax.scatter(x[order], y[order], s=6, c=shown[order], edgecolors="#111827", linewidths=rings[order].tolist())
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return Plot("data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode(), alt, caption)


def features(several: Sequence[FeatureMap]) -> list[tuple[str, list[Plot]]]:
    """(heading, panels) per case: the case itself, then what each arm makes of it, in colours."""
    rows = []
    for i, case in enumerate(dict.fromkeys(f.case for f in several), 1):
        mine = [f for f in several if f.case == case]
        first, title = mine[0], f"Sample {i}"
        if first.colours.ndim == 2:
            none = np.zeros(len(first.picture), bool)
            panels = [_seen(first.picture, np.full((len(none), 3), 0.45), "sample", f"{title}: its points", none)]
            panels += [_seen(f.picture, f.colours, f.arm, _mapped(title, f), none) for f in mine]
        else:
            panels = [raster(first.picture, first.aspect, "sample", f"{title}, {case}: as it is{_span(first.times)}",
                             times=first.times)]
            size = first.picture.shape[bool(first.times):][:2]
            panels += [raster(_stretched(f.colours, size), f.aspect, f.arm, _mapped(title, f), limits=(0.0, 1.0), times=f.times)
                       for f in mine]
        rows.append((title, panels))
    return rows


def _mapped(title: str, f: FeatureMap) -> str:
    """In words: how far the sample's tokens differ, of which colours speak."""
    spread = ", ".join(f"{x:.2f}" for x in f.colours.reshape(-1, 3).std(0))
    return (f"{title}, tokens of {f.arm}: first three principal components as red, green and blue{_span(f.times)}; standard "
            f"deviations within the sample {spread} of the colour range")


def _stretched(colours: Array, size: Sequence[int]) -> Array:
    """(…, h, w, 3) to (…, H, W, 3): every token as the block that it covers."""
    for axis, n in zip((-3, -2), size, strict=True):
        cells = colours.shape[axis]
        colours = np.take(colours, (2 * np.arange(n) + 1) * cells // (2 * n), axis)
    return colours


def embeddings(several: Sequence[Embedding], colours: Mapping[str, str]) -> list[Plot]:
    """The first two principal components of the test samples' vectors, a panel per arm; few classes in colour."""
    plots = []
    for e in several:
        present = [v for v in e.names if (e.label == v).any()]
        hues = mpl.colormaps["tab10" if len(present) <= 10 else "tab20"]
        coloured = present if len(present) <= SHADES else []

        def paint(ax: Axes, e: Embedding = e, coloured: Sequence[int] = coloured, hues: Any = hues) -> None:
            rest = ~np.isin(e.label, list(coloured))
            ax.plot(*e.place[rest].T, ".", color=colours.get(e.arm, "#374151"), alpha=0.6, markersize=5)
            for i, value in enumerate(coloured):
                ax.plot(*e.place[e.label == value].T, linestyle="none", marker=MARKERS[i % len(MARKERS)], markersize=4.5,
                        color=hues(i % hues.N), alpha=0.75, markeredgewidth=0, label=e.names[value])
            x, y = (f"{name} component, {share:.0%} of variance"
                    for name, share in zip(("first", "second"), e.share, strict=True))
            ax.set(xticks=[], yticks=[], title=e.arm, xlabel=x, ylabel=y)
            if coloured:
                figure = ax.figure
                assert isinstance(figure, Figure)
                figure.legend(loc="outside lower center", ncols=3 if len(coloured) > 4 else 2, fontsize=8)

        told = "; ".join(f"{e.names[v]} {int((e.label == v).sum())}" for v in present[:SHADES])
        nearest = _neighbours(e)
        plots.append(draw(paint, f"Embedding of {len(e.place)} test samples by {e.arm}, first two principal components, which "
                          f"explain {sum(e.share):.0%} of the variance{f'; samples of each class: {told}' if told else ''}"
                          f"{f'. {nearest}' if nearest else ''}.", nearest and f"{nearest}.", size=(3.5, 3.3)))
    return plots


def _neighbours(e: Embedding) -> str:
    """How often the nearest neighbour on the map is of the same class; '' where there are no classes."""
    known = e.label >= 0
    if len(np.unique(e.label[known])) < 2:
        return ""
    place, label = e.place[known].astype(float), e.label[known]
    distance = ((place[:, None] - place[None]) ** 2).sum(-1)
    np.fill_diagonal(distance, np.inf)
    _, counts = np.unique(label, return_counts=True)
    chance = float((counts * (counts - 1)).sum() / (len(label) * (len(label) - 1)))
    return (f"Nearest neighbour on the map of the same class: {np.mean(label[distance.argmin(1)] == label):.0%} "
            f"(by chance {chance:.0%})")


def sheets(results: Results, strips: Sequence[Strip]) -> list[tuple[str, list[tuple[str, list[Plot]]]]]:
    """(label budget, (arm, strips)): the samples of `pick_samples` with the probabilities that each was given."""
    drawn: dict[str, Plot] = {}
    shown = {strip.case: strip for strip in strips}
    found: dict[str, list[tuple[str, list[Plot]]]] = {}
    for (arm, protocol, labels), group in sample_groups(results).items():
        assert group.target is not None
        p, plots = _probabilities(group).mean(0), []
        for heading, places in pick_samples(group).items():
            for i in places:
                strip = shown.get(group.cases[i])
                if strip is None:
                    continue
                if strip.case not in drawn:
                    drawn[strip.case] = raster(strip.frames, strip.aspect, "", "", times=strip.times)
                top = [int(c) for c in np.argsort(-p[i], kind="stable")[:3]]
                given = ", ".join(f"{results.classes[c]} {p[i, c]:.2f}" for c in dict.fromkeys([*top, int(group.target[i])]))
                text = f"{strip.case}, truly {results.classes[group.target[i]]}; given {given}"
                plots.append(Plot(drawn[strip.case].source, f"{arm}, {heading}, {text}{_span(strip.times)}",
                                  f"{sentence(heading)}: {text}.", wide=True))
        if plots:
            n = next(c.labelled_subjects for c in results.cells if (c.arm, c.protocol, c.labels) == (arm, protocol, labels))
            found.setdefault(f"{PROTOCOLS.get(protocol, protocol)}, {n} labelled {results.counted}", []).append((arm, plots))
    return list(found.items())


def attention(results: Results, several: Sequence[Attention]) -> list[tuple[str, list[Plot], Plot]]:
    """(case, a strip per arm with the attention over it, the arms' curves over time)."""
    colours = palette(results)
    rows = []
    for case in dict.fromkeys(a.case for a in several):
        mine = [a for a in several if a.case == case and a.arm in colours]
        if not mine:
            continue
        strips = [raster(a.frames, a.aspect, a.arm, f"{case}, where {a.arm} attends, in colour{_span(a.times)}", times=a.times,
                         heat=a.heat) for a in mine]

        def paint(ax: Axes, mine: Sequence[Attention] = mine) -> None:
            for a in mine:
                ax.plot(a.seconds, a.curve, color=colours[a.arm], marker=".", label=a.arm)
            ax.axhline(1 / len(mine[0].curve), color="#9ca3af", linewidth=1, linestyle=":")
            ax.set_xlabel("seconds")
            ax.set_ylabel("share of attention")
            ax.set_ylim(0, 1.3 * max(max(a.curve) for a in mine))
            ax.legend(ncols=2, loc="upper left")

        told = "; ".join(f"{a.arm} from {min(a.curve):.3f} to {max(a.curve):.3f}, most at "
                         f"{_seconds(a.seconds[int(np.argmax(a.curve))], a.seconds)}" for a in mine)
        rows.append((case, strips, draw(paint, f"Share of attention over time, {case}: {told}.",
                                        "Dotted: attention spread evenly.", size=(4.6, 2.0))))
    return rows
