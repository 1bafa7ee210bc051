"""`meristem data check`: read every file, name each problem, sum up the rest. For the user's own terminal: true names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from meristem.errors import DataError
from meristem.modalities.base import Draw, Modality, Placing
from meristem.platform.data.cache import Progress, contents, decode, distinct
from meristem.platform.data.manifest import Manifest, Problem, Row

if TYPE_CHECKING:
    from rich.console import Console

CASE = re.compile(r"case-[0-9a-f]{12}")
QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)
SAMPLE = 1 << 16  # elements of a sample that its intensity figures are taken from
UNUSUAL = 6.0  # robust deviations (of 1.4826 · MAD) from the data set's median that are worth a look
APART = 100.0  # times the median: by so much, or by as little, a note tells of another unit
SPREAD = 0.1  # a tenth of the median is taken as the least deviation, or nearly equal files would all stand out


@dataclass(frozen=True)
class Suspect:
    """A file that can be used but differs from the rest."""

    case: str
    local: str
    what: str


@dataclass
class Report:
    """What was found. ok: nothing would be refused.

    shape, spacing, intensity, foreground: name of an axis or figure -> its quantiles (0, 5, 50, 95, 100 %) over samples.
    intensity: of the values an encoder would see. notes: of what the reader says beside (nodes and edges of a graph). labels:
    mask value -> samples that hold it and share of all elements.
    """

    path: str
    modality: str
    layout: str
    hash: str
    rows: int
    subjects: int
    ok: bool = False
    usable: int = 0
    labelled: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    suspects: list[Suspect] = field(default_factory=list)
    splits: dict[str, int] = field(default_factory=dict)
    classes: dict[str, int] = field(default_factory=dict)
    objects: dict[str, int] = field(default_factory=dict)
    shape: dict[str, list[float]] = field(default_factory=dict)
    spacing: dict[str, list[float]] = field(default_factory=dict)
    intensity: dict[str, list[float]] = field(default_factory=dict)
    notes: dict[str, list[float]] = field(default_factory=dict)
    labels: dict[str, dict[str, float]] = field(default_factory=dict)
    foreground: list[float] = field(default_factory=list)

    def dump(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    def print(self, console: Console) -> None:
        """For people."""
        from rich.markup import escape

        for p in self.problems:
            console.print(f"[red]{p.reason}[/]  {escape(p.local)}: {escape(p.message)}", highlight=False, soft_wrap=True)
            if p.remedy:
                console.print(f"    {escape(p.remedy)}", style="dim", highlight=False, soft_wrap=True)
        for s in self.suspects:
            console.print(f"[yellow]unusual[/]  {escape(s.local)}: {escape(s.what)}", highlight=False, soft_wrap=True)
        lines = [("layout", self.layout), ("samples", f"{self.rows}, {self.labelled} labelled, {self.subjects} subjects"),
                 *(("shape " + k, _span(v)) for k, v in self.shape.items()),
                 *(("spacing " + k, _span(v)) for k, v in self.spacing.items()),
                 *(("intensity " + k, _span(v)) for k, v in self.intensity.items()),
                 *((k, _span(v)) for k, v in self.notes.items()),
                 *(("label " + k, f"in {v['samples']:.0f} samples, {v['share']:.2%} of elements")
                   for k, v in self.labels.items()),
                 *([("foreground", _span(self.foreground))] if self.foreground else []),
                 *(("class " + k, str(n)) for k, n in self.classes.items()),
                 *(("objects " + k, str(n)) for k, n in self.objects.items()),
                 *(("split " + k, str(n)) for k, n in self.splits.items())]
        width = max(20, *(len(name) + 2 for name, _ in lines))
        for name, text in lines:
            console.print(f"{name:<{width}}{escape(text)}", highlight=False, soft_wrap=True)
        refused = ", ".join(f"{n} {reason}" for reason, n in self.reasons.items())
        console.print(f"{self.usable} of {self.rows} samples can be used" + (f"; refused: {refused}" if refused else ""),
                      style="green" if self.ok else "bold red", highlight=False, soft_wrap=True)


def check(path: str | Path, modality: Modality, *, workers: int = 0, progress: Progress | None = None) -> Report:
    """Read every file of a data set as training would. Raises DataError when there is none."""
    manifest = Manifest.discover(path, modality)
    modality = modality.fitted([p for row in manifest.rows for p in row.paths])
    problems = list(manifest.problems)
    digests = contents(manifest.rows, problems, workers, members=modality.members, beside=getattr(modality, "beside", None))
    kept = distinct([r for r in manifest.rows if r.index in digests], digests, problems)
    figures: list[_Figures] = []
    reading = DataLoader(_Reading(kept, modality), batch_size=None, num_workers=workers, collate_fn=_same,
                         generator=torch.Generator())
    for done, result in enumerate(reading, len(manifest) - len(kept) + 1):
        if isinstance(result, Problem):
            problems.append(result)
        else:
            figures.append(result)
        if progress:
            progress(done, len(manifest))
    used = [f.row for f in figures]
    report = Report(str(path), modality.name, manifest.layout, manifest.hash, len(manifest),
                    len({r.subject for r in manifest.rows}), not problems, len(figures), sum(r.labelled for r in used))
    names = {r.case: r.local for r in manifest.rows}
    report.problems = sorted((replace(p, message=CASE.sub(lambda m: names.get(m[0], m[0]), p.message)) for p in problems),
                             key=lambda p: (p.reason, p.local))
    report.reasons = dict(Counter(p.reason for p in report.problems).most_common())
    report.splits = dict(Counter(r.split or "open" for r in used))
    classes = Counter(r.labels["class"] for r in used if "class" in r.labels)
    report.classes = {manifest.class_names[c]: n for c, n in sorted(classes.items())}
    objects = Counter(label for r in used if r.objects is not None for label in r.objects.label.tolist())
    report.objects = {manifest.object_names[c]: n for c, n in sorted(objects.items())}
    if figures:
        _sum_up(report, figures, [a.name for a in modality.axes], manifest.mask_names)
    return report


@dataclass
class _Figures:
    """Of one sample. intensity: mean, deviation, 1st and 99th percentile, first channel."""

    row: Row
    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    intensity: tuple[float, ...]
    counts: dict[int, int]
    elements: int
    notes: dict[str, float]


class _Reading(Dataset[Any]):
    def __init__(self, rows: Sequence[Row], modality: Modality) -> None:
        self.rows, self.modality = rows, modality

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> _Figures | Problem:
        row = self.rows[i]
        sample = decode(row, self.modality)
        if isinstance(sample, Problem):
            return sample
        h = sample.header
        try:
            if row.objects is not None and isinstance(self.modality, Placing):
                self.modality.placed(row.objects, h)
        except DataError as error:
            return Problem(row.case, error.reason, error.what, error.remedy, row.local)
        array = sample.array
        if array is None:  # it stayed in its files: the middle along the first axis tells enough
            size = (1, *h.shape[2:])
            array, = self.modality.fetch(row.paths, h, [Draw((h.shape[1] // 2, *(0,) * (len(size) - 1)), size, size)])
        values = array[0].reshape(-1)
        values = values[::max(len(values) // SAMPLE, 1)].astype(np.float64) * h.scale[0] + h.offset[0]
        intensity = (values.mean(), values.std(), *np.percentile(values, (1, 99)))
        mask = sample.fields.get("mask")
        counts = {} if mask is None else {int(v): int(n) for v, n in zip(*np.unique(mask, return_counts=True), strict=True)}
        return _Figures(row, tuple(h.shape[1:]), tuple(h.spacing), tuple(float(x) for x in intensity), counts,
                        int(np.prod(h.shape[1:])), sample.notes)


def _same(x: Any) -> Any:
    return x


def _sum_up(report: Report, figures: Sequence[_Figures], axes: Sequence[str], names: Sequence[str]) -> None:
    shape, spacing = np.array([f.shape for f in figures], float), np.array([f.spacing for f in figures])
    intensity = np.array([f.intensity for f in figures])
    axes = axes if shape.shape[1] == len(axes) else ()  # a set has no lattice: its notes say what it is
    report.shape = {axis: _quantiles(shape[:, i]) for i, axis in enumerate(axes)}
    report.spacing = {axis: _quantiles(spacing[:, i]) for i, axis in enumerate(axes)}
    if axes:  # the first number of a point or node is no brightness
        report.intensity = {name: _quantiles(intensity[:, i]) for i, name in enumerate(("mean", "deviation", "1 %", "99 %"))}
    names_of = dict.fromkeys(name for f in figures for name in f.notes)
    report.notes = {name: _quantiles(np.array([f.notes.get(name, 0.0) for f in figures])) for name in names_of}
    masked = [f for f in figures if f.counts]
    total = sum(f.elements for f in masked)
    for value in sorted({v for f in masked for v in f.counts}):
        name = names[value] if 0 <= value < len(names) and names[value] else ""
        report.labels[f"{value} {name}".strip()] = {"samples": float(sum(value in f.counts for f in masked)),
                                                   "share": sum(f.counts.get(value, 0) for f in masked) / total}
    volumes = [sum(n for v, n in f.counts.items() if v > 0) * float(np.prod(f.spacing)) for f in masked]
    if volumes and axes:
        report.foreground = _quantiles(np.array(volumes))
    looks = [(f"{name} {a}", table[:, i]) for name, table in (("shape", shape), ("spacing", spacing))
             for i, a in enumerate(axes)]
    looks += [("intensity at 99 %", intensity[:, 3]), ("deviation of intensity", intensity[:, 1])] if axes else []
    for name, values in looks:
        middle = float(np.median(values))
        spread = max(1.4826 * float(np.median(np.abs(values - middle))), SPREAD * abs(middle), 1e-6)
        for i in np.flatnonzero(np.abs(values - middle) > UNUSUAL * spread):
            row = figures[int(i)].row
            report.suspects.append(Suspect(row.case, row.local, f"{name} is {values[i]:.4g}, the median {middle:.4g}"))
    for name in names_of:
        values = np.array([f.notes.get(name, 0.0) for f in figures])
        middle = float(np.median(values))
        for i in np.flatnonzero((values > APART * middle) | (values * APART < middle)) if middle > 0 else ():
            row = figures[int(i)].row
            report.suspects.append(Suspect(row.case, row.local, f"{name} is {values[i]:.4g}, the median {middle:.4g}"))
    for f in masked if axes else ():
        if not any(v > 0 for v in f.counts):
            report.suspects.append(Suspect(f.row.case, f.row.local, "its mask is empty"))


def _quantiles(values: np.ndarray) -> list[float]:
    return [float(q) for q in np.quantile(values, QUANTILES)]


def _span(q: Sequence[float]) -> str:
    return f"{q[2]:.4g}  ({q[0]:.4g} to {q[-1]:.4g})"
