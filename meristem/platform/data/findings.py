"""What `data check` found: one source for the terminal, the page and the JSON. Cases and subjects are pseudonyms."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

Level = Literal["refused", "identity", "doubt"]
QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)
BINS = 24
SHOWN = 100  # cases that a finding names; all are counted


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Case(_Part):
    """One sample that a finding is about. what: of this one, where samples differ in it."""

    case: str
    what: str = ""


class Finding(_Part):
    """One thing to act on. level: refused: training leaves the samples out, or cannot start; identity: it may say who somebody
    is; doubt: worth a look. reason: a short fixed word. count: of samples, or of what `what` says. cases: the first of them.
    parts: what it consists of -> how many.
    """

    level: Level
    reason: str
    what: str
    remedy: str
    count: int
    cases: tuple[Case, ...] = ()
    parts: Mapping[str, int] = {}


class Measure(_Part):
    """A number that every sample has. quantiles: least, 5 %, median, 95 %, greatest. counts: samples in equal bins from the
    least to the greatest, of as many whole numbers each where all are whole; one bin where all are the same.
    """

    name: str
    samples: int
    quantiles: tuple[float, float, float, float, float]
    counts: tuple[int, ...]

    @classmethod
    def of(cls, name: str, values: np.ndarray) -> Measure:
        """values: (n,)."""
        low, *_, high = quantiles = tuple(float(q) for q in np.quantile(values, QUANTILES))
        bins, start, end = BINS, low, high
        if (values == np.rint(values)).all():
            width = -(-(high - low + 1) // BINS)
            bins, start = int(-(-(high - low + 1) // width)), low - 0.5
            end = start + bins * width
        wide = high - low > 1e-9 * max(abs(low), abs(high))
        counts = np.histogram(values, bins, (start, end))[0].tolist() if wide else [len(values)]
        return cls(name=name, samples=len(values), quantiles=quantiles, counts=tuple(counts))


class Label(_Part):
    """A value of the label maps. name: as the data declares it. subjects, samples: that have it. share: of all elements."""

    value: int
    name: str
    subjects: int
    samples: int
    share: float


class Split(_Part):
    """What a split has of the samples that can be used; `open` is still to be divided. classes: class -> samples."""

    name: str
    subjects: int
    samples: int
    labelled: int
    classes: Mapping[str, int] = {}


class Intake(BaseModel):
    """What is known of a data set before it is used.

    ok: nothing would be refused. samples: found; usable, labelled: of them. mixes: property -> word -> samples. blank: column
    of a list -> lines that say nothing in it. local: true name of each case, for the user's own terminal: in no dump and no
    page. verdict: what to do next, in sentences.
    """

    model_config = ConfigDict(extra="forbid")

    modality: str
    layout: str
    manifest: str
    samples: int
    subjects: int
    usable: int
    labelled: int
    findings: list[Finding] = []
    splits: list[Split] = []
    classes: dict[str, int] = {}
    objects: dict[str, int] = {}
    labels: list[Label] = []
    measures: list[Measure] = []
    mixes: dict[str, dict[str, int]] = {}
    blank: dict[str, int] = {}
    local: dict[str, str] = Field(default={}, exclude=True, repr=False)

    @property
    def ok(self) -> bool:
        return not self.of("refused")

    @property
    def refused(self) -> dict[str, int]:
        """reason -> count."""
        found: Counter[str] = Counter()
        for f in self.of("refused"):
            found[f.reason] += f.count
        return dict(found.most_common())

    def of(self, level: Level) -> list[Finding]:
        return [f for f in self.findings if f.level == level]

    def measure(self, name: str) -> Measure | None:
        return next((m for m in self.measures if m.name == name), None)

    @property
    def verdict(self) -> list[str]:
        refused = ", ".join(f"{n} {reason}" for reason, n in self.refused.items() if reason != "split")
        first = f"{self.usable} of {self.samples} samples can be used" + (f"; refused: {refused}." if refused else ".")
        told = [first]
        if any(f.reason == "split" for f in self.of("refused")):
            told.append("Training will not start while subjects stand in several splits: correct the split or subject column.")
        elif refused:
            told.append("Training goes on without what is refused; repair it, or remove it, so that nobody wonders later.")
        if self.of("identity"):
            told.append("Something here may say who somebody is. Meristem copies none of it into runs or reports, but "
                        "de-identify the files before they leave the place that may hold them.")
        if doubts := self.of("doubt"):
            told.append(f"Look at {_count(len(doubts), 'doubt')} before training; what to do stands with each.")
        if not self.findings:
            told.append("Nothing was found that stands in the way of training.")
        return told

    def dump(self) -> dict[str, object]:
        """Plain data, for JSON."""
        return {"ok": self.ok, "verdict": self.verdict, **self.model_dump(mode="json")}


def finding(level: Level, reason: str, what: str, remedy: str, cases: Sequence[Case]) -> Finding:
    """About these samples, each counted once."""
    return Finding(level=level, reason=reason, what=what, remedy=remedy, count=len(cases), cases=tuple(cases[:SHOWN]))


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'s' if n != 1 else ''}"
