"""The figures of `data check`: what was seen of each sample, and what that is in sum."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from meristem.modalities.facts import Facts
from meristem.platform.data import names
from meristem.platform.data.findings import Label, Measure, Split
from meristem.platform.data.manifest import Row
from meristem.platform.data.splits import NAMES


@dataclass
class Seen:
    """One sample. counts: mask value -> elements. fingerprint: by which a copy of it is known again."""

    row: Row
    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    counts: dict[int, int]
    notes: dict[str, float]
    facts: Facts = field(default_factory=Facts)
    fingerprint: bytes = b""


def measures(seen: Sequence[Seen], axes: Sequence[str]) -> list[Measure]:
    return [Measure.of(name, values) for name, (values, _) in columns(seen, axes).items()]


def columns(seen: Sequence[Seen], axes: Sequence[str]) -> dict[str, tuple[np.ndarray, list[Seen]]]:
    """Measure -> its values, and the samples that have it; geometry, facts, notes of the reader."""
    found: dict[str, tuple[list[float], list[Seen]]] = defaultdict(lambda: ([], []))
    for s in seen:
        lattice = len(s.shape) == len(s.spacing) == len(axes)  # a set has none
        geometry = {f"{what} {a}": n for what, side in (("shape", s.shape), ("spacing", s.spacing))
                    for a, n in zip(axes, side, strict=True)} if lattice else {}
        labelled = sum(n for v, n in s.counts.items() if v > 0) * float(np.prod(s.spacing))
        foreground = {"labelled extent": labelled} if s.counts and lattice else {}
        for name, value in {**geometry, **s.facts.numbers, **s.notes, **foreground}.items():
            found[name][0].append(value)
            found[name][1].append(s)
    return {name: (np.array(values, float), those) for name, (values, those) in found.items()}


def labels(seen: Sequence[Seen], given: Sequence[str]) -> list[Label]:
    masked = [s for s in seen if s.counts]
    total = sum(sum(s.counts.values()) for s in masked)
    found = []
    for value in sorted({v for s in masked for v in s.counts}):
        those = [s for s in masked if value in s.counts]
        found.append(Label(value=value, name=given[value] if 0 <= value < len(given) else "", samples=len(those),
                           subjects=len({s.row.subject for s in those}), share=sum(s.counts[value] for s in those) / total))
    return found


def splits(used: Sequence[Row], classes: Sequence[str]) -> list[Split]:
    found = []
    for name in (*NAMES, ""):
        rows = [r for r in used if r.split == name]
        if rows:
            found.append(Split(name=name or "open", subjects=len({r.subject for r in rows}), samples=len(rows),
                               labelled=sum(r.labelled for r in rows),
                               classes=counted((r.labels["class"] for r in rows if "class" in r.labels), classes)))
    return found


def counted(numbers: Iterable[int], given: Sequence[str]) -> dict[str, int]:
    return {given[number]: n for number, n in sorted(Counter(numbers).items())}


def shown(given: Sequence[str]) -> list[str]:
    """Names of classes; a number for one that may say whose it is, as where folders of patients were taken for classes."""
    return [f"class {i}" if names.telling(name) else name for i, name in enumerate(given)]


def mixes(seen: Sequence[Seen]) -> dict[str, dict[str, int]]:
    """Property -> word -> samples, the commonest first."""
    words = dict.fromkeys(word for s in seen for word in s.facts.words)
    return {word: dict(Counter(s.facts.words[word] for s in seen if word in s.facts.words).most_common()) for word in words}
