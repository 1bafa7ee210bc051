"""`meristem data check`: read every file as training would, and tell what is in it, what is wrong and what is doubtful."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch.utils.data import DataLoader, Dataset

from meristem.errors import DataError
from meristem.modalities.base import Identifying, Modality, Placing, Telling
from meristem.modalities.facts import Doubt, Facts
from meristem.platform.data import doubts, figures, names
from meristem.platform.data.cache import Progress, contents, decode, distinct
from meristem.platform.data.figures import Seen
from meristem.platform.data.findings import Intake
from meristem.platform.data.manifest import Manifest, Problem, Row
from meristem.platform.data.workers import lose_nothing

SOLID, STRAY = 50, 1000  # elements from which a part is meant; a part that is so many times smaller is not, or a lone element


def check(path: str | Path, modality: Modality, *, workers: int = 0, progress: Progress | None = None) -> Intake:
    """Read every file of a data set as training would. Raises DataError when there is none.

    progress: called with (done, total), first while contents are compared, then while samples are read. Of each sample only
    figures are kept.
    """
    manifest = Manifest.discover(path, modality)
    modality = modality.fitted([p for row in manifest.rows for p in row.paths])
    problems = list(manifest.problems)
    digests = contents(manifest.rows, problems, workers, members=modality.members, beside=getattr(modality, "beside", None),
                       progress=progress)
    kept = distinct([r for r in manifest.rows if r.index in digests], digests, problems)
    seen: list[Seen] = []
    held: Counter[str] = Counter()
    axes = [a.name for a in modality.axes]
    reading = DataLoader(_Reading(manifest.rows, kept, modality), batch_size=None, num_workers=workers, collate_fn=_same,
                         generator=torch.Generator(), worker_init_fn=lose_nothing)
    for done, (result, named) in enumerate(reading, 1):
        if isinstance(result, Problem):
            problems.append(result)
        elif result is not None:
            seen.append(result)
        held.update(named)
        if progress:
            progress(done, len(manifest))
    used = [s.row for s in seen]
    classes, objects, masks = map(figures.shown, (manifest.class_names, manifest.object_names, manifest.mask_names))
    intake = Intake(modality=modality.name, layout=manifest.layout, manifest=manifest.hash, samples=len(manifest),
                    subjects=len({r.subject for r in manifest.rows}), usable=len(seen), labelled=sum(r.labelled for r in used),
                    splits=figures.splits(used, classes), blank=names.columns(manifest.blank),
                    labels=figures.labels(seen, masks), mixes=figures.mixes(seen), measures=figures.measures(seen, axes))
    intake.local = {p.case: p.local for p in manifest.problems} | {r.case: r.local for r in manifest.rows}
    intake.classes = figures.counted((r.labels["class"] for r in used if "class" in r.labels), classes)
    intake.objects = figures.counted((c for r in used if r.objects is not None for c in r.objects.label.tolist()), objects)
    intake.findings = [*doubts.refused(problems), *doubts.leaks(manifest.rows, digests), *doubts.identity(held, manifest),
                       *doubts.doubts(seen), *doubts.unusual(seen, axes), *doubts.copies(manifest.rows, digests),
                       *doubts.near(seen, getattr(modality, "likeness", None)),
                       *doubts.classes(intake, seen, classes, objects, manifest), *doubts.table(manifest, modality)]
    return intake


class _Reading(Dataset[Any]):
    """Row -> what was seen of it, None where nothing new is to be seen; places in its files that may say whose it is.

    A file that several samples are in is looked at with the first of them.
    """

    def __init__(self, rows: Sequence[Row], kept: Sequence[Row], modality: Modality) -> None:
        self.rows, self.kept, self.modality = rows, {r.index for r in kept}, modality
        taken: set[Path] = set()
        self.files: list[list[Path]] = []
        for row in rows:
            files = dict.fromkeys(f for p in (*row.paths, *row.fields.values()) for f in doubts.files(p, modality))
            self.files.append([f for f in files if f not in taken])
            taken.update(files)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[Seen | Problem | None, list[str]]:
        named = [n for f in self.files[i] for n in self.modality.identity(f)] if isinstance(self.modality, Identifying) else []
        return self._seen(self.rows[i]) if self.rows[i].index in self.kept else None, named

    def _seen(self, row: Row) -> Seen | Problem:
        sample = decode(row, self.modality)
        if isinstance(sample, Problem):
            return sample
        h, mask = sample.header, sample.fields.get("mask")
        try:
            if row.objects is not None and isinstance(self.modality, Placing):
                self.modality.placed(row.objects, h)
            facts = self.modality.facts(row.paths, sample) if isinstance(self.modality, Telling) else Facts()
        except DataError as error:
            return Problem(row.case, error.reason, error.what, error.remedy, row.local)
        counts = {} if mask is None else {int(v): int(n) for v, n in zip(*np.unique(mask, return_counts=True), strict=True)}
        if mask is not None and mask.ndim == len(self.modality.axes):  # a set has no neighbours
            facts.doubts += _of_mask(mask, counts)
        return Seen(row, tuple(h.shape[1:]), tuple(h.spacing), counts, sample.notes, facts, sample.fingerprint)


def _same(x: Any) -> Any:
    return x


def _of_mask(mask: np.ndarray, counts: Mapping[int, int]) -> list[Doubt]:
    """Of a label map (*S): whether it is empty, and whether it has parts that nobody meant to draw."""
    if not any(value > 0 for value in counts):
        return [Doubt("empty mask", "its mask is empty", "Harmless where there was nothing to find; else draw it, or take it "
                      "away, so that the sample counts as unlabelled.")]
    small = {}
    for value, box in enumerate(ndimage.find_objects(mask), 1):
        if box is not None:
            parts, _ = ndimage.label(mask[box] == value, np.ones((3,) * mask.ndim))
            sizes = np.bincount(parts.ravel())[1:]
            if sizes.max() >= SOLID and (n := int((sizes <= max(sizes.max() // STRAY, 1)).sum())):
                small[value] = n
    told = ", ".join(f"{n} of label {value}" for value, n in small.items())
    return [Doubt("stray", f"tiny parts, far smaller than the rest: {told}", "Stray elements of drawing? Remove them, unless "
                  "they are meant.")] if small else []
