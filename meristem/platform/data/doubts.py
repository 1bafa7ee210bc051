"""What is wrong or doubtful in a data set, each with what to do about it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from meristem.modalities.base import Modality, member_files, split_element
from meristem.modalities.facts import Doubt
from meristem.modalities.likeness import Likeness
from meristem.platform.data import figures, names
from meristem.platform.data.cache import Digest
from meristem.platform.data.figures import Seen
from meristem.platform.data.findings import Case, Finding, Intake, finding
from meristem.platform.data.lists import LABEL
from meristem.platform.data.manifest import Manifest, Problem, Row

UNUSUAL = 6.0  # robust deviations (of 1.4826 · MAD) from the data set's median that are worth a look
APART = 100.0  # times the median: by so much, or by as little, a note tells of another unit
SPREAD = 0.1  # a tenth of the median is taken as the least deviation, or nearly equal files would all stand out
RARE, USUAL = 0.05, 0.9  # shares of samples: a word that so few have, where so many have another, is worth a look
FEWEST = 5  # subjects that a class should have: with fewer, not every split gets some to learn from and some to test on
BLOCK = 512  # samples that are compared with all at once
FILL_IN = ("split", "mask", "pair", *LABEL)  # columns that may be empty: unlabelled, to be divided, alone


def refused(problems: Sequence[Problem]) -> list[Finding]:
    """One for each reason and remedy."""
    grouped: dict[tuple[str, str], list[Problem]] = defaultdict(list)
    for p in problems:
        grouped[p.reason, p.remedy].append(p)
    order = sorted(grouped.items(), key=lambda item: (-len(item[1]), item[0]))
    found = []
    for (reason, remedy), some in order:
        alike = {p.message for p in some}
        found.append(finding("refused", reason, _one(some[0].message, alike), remedy,
                             [Case(case=p.case, what="" if len(alike) == 1 else p.message)
                              for p in sorted(some, key=lambda p: p.case)]))
    return found


def _one(first: str, alike: set[str]) -> str:
    return first if len(alike) == 1 else f"each in its own way, for example: {first}"


def leaks(rows: Sequence[Row], digests: Mapping[int, Digest]) -> list[Finding]:
    """Subjects, and equal contents, that the data itself puts into several splits."""
    by_subject: dict[str, list[Row]] = defaultdict(list)
    by_content: dict[str, list[Row]] = defaultdict(list)
    for r in rows:
        if r.split:
            by_subject[r.subject].append(r)
            if r.index in digests:
                by_content[digests[r.index][0]].append(r)
    found = []
    torn = [some for some in by_subject.values() if len({r.split for r in some}) > 1]
    if torn:
        found.append(finding("refused", "split", "subjects stand in several splits, so that a test is of patients learnt from",
                             "A subject's files must share a split: correct the split or the subject column.",
                             [Case(case=some[0].subject, what=_in(some)) for some in torn]))
    shared = [some for some in by_content.values() if len({r.split for r in some}) > 1]
    if shared:
        found.append(finding("doubt", "leak", "the same bytes stand in several splits; only the copy to test on is used",
                             "Are they of one subject? Then all its samples belong into one split.",
                             [Case(case=some[0].case, what=_in(some)) for some in shared]))
    return found


def _in(rows: Sequence[Row]) -> str:
    return " and ".join(sorted({r.split for r in rows}))


def copies(rows: Sequence[Row], digests: Mapping[int, Digest]) -> list[Finding]:
    """Equal images whose labels differ."""
    by_content: dict[str, list[Row]] = defaultdict(list)
    for r in rows:
        if r.index in digests and r.labelled:
            by_content[digests[r.index][0]].append(r)
    torn = [some for some in by_content.values() if len({(r.labels.get("class"), digests[r.index][1]) for r in some}) > 1]
    cases = [Case(case=r.case) for some in torn for r in some]
    return [finding("doubt", "contradiction", "equal images have different labels", "Find out which is right; drop the other.",
                    cases)] if torn else []


def near(seen: Sequence[Seen], likeness: Likeness | None) -> list[Finding]:
    """Samples of different subjects that are copies of each other in other bytes: saved again, turned, brightened, trimmed."""
    those = [s for s in seen if s.fingerprint]
    cases = []
    for first in range(0, len(those), BLOCK) if likeness else ():
        block = those[first:first + BLOCK]
        assert likeness is not None
        alike = np.triu(likeness.alike([s.fingerprint for s in block], [s.fingerprint for s in those]), first + 1)
        for s, found in zip(block, alike, strict=True):
            others = [those[j].row for j in np.flatnonzero(found) if those[j].row.subject != s.row.subject]
            if others:
                more = f" and {len(others) - 1} more" if len(others) > 1 else ""
                apart = ", of another split" if any(o.split != s.row.split for o in others) else ""
                cases.append(Case(case=s.row.case, what=f"looks like {others[0].case}{more}{apart}"))
    return [finding("doubt", "alike", "samples look like copies of those of other subjects, though their bytes differ",
                    "Where they are copies, give them one subject or remove one: else a test sample's copy may train.", cases)
            ] if cases else []


def identity(held: Mapping[str, int], manifest: Manifest) -> list[Finding]:
    """held: place in a header -> files that have something there."""
    found = []
    if held:
        found.append(Finding(level="identity", reason="header", count=len(held),
                             what="headers hold what may say whose the files are; places, and files that have something there",
                             parts=dict(sorted(held.items(), key=lambda item: (-item[1], item[0]))),
                             remedy="De-identify the headers, or be sure that it is harmless. Told is the place, never what "
                             "stands there."))
    paths = [r.local for r in manifest.rows] + [f"{p.parent.name}/{p.name}" for r in manifest.rows for p in r.fields.values()]
    if called := names.counted(paths):
        found.append(Finding(level="identity", reason="name", count=sum(called.values()), parts=called,
                             what="names of files or folders may say whose they are; what they hold, and how many do",
                             remedy="Rename them before they are shared. Runs and reports know pseudonyms; predictions go by "
                             "the names of their files."))
    columns = [shown for c, shown in zip(manifest.blank, names.columns(manifest.blank), strict=True) if names.personal(c)]
    if columns:
        found.append(Finding(level="identity", reason="column", what=f"columns tell of persons: {', '.join(columns)}",
                             count=len(columns), remedy="Remove them from the list: no run needs them."))
    return found


def doubts(seen: Sequence[Seen]) -> list[Finding]:
    grouped: dict[str, list[tuple[Row, Doubt]]] = defaultdict(list)
    for s in seen:
        for doubt in s.facts.doubts:
            grouped[doubt.reason].append((s.row, doubt))
    found = []
    for reason, some in sorted(grouped.items(), key=lambda item: (-len(item[1]), item[0])):
        alike = {d.what for _, d in some}
        found.append(finding("doubt", reason, _one(some[0][1].what, alike), some[0][1].remedy,
                             [Case(case=r.case, what="" if len(alike) == 1 else d.what) for r, d in some]))
    return found


def unusual(seen: Sequence[Seen], axes: Sequence[str]) -> list[Finding]:
    """Samples whose measures lie far from those of the others, and those with a word that hardly any other has."""
    cases: dict[str, list[str]] = defaultdict(list)
    for name, (values, those) in figures.columns(seen, axes).items():
        middle = float(np.median(values))
        if name in those[0].notes:  # sizes: they vary by nature, and only another unit is unusual
            other = (values > APART * middle) | ((values > 0) & (values * APART < middle))  # nothing has no unit
            for i in np.flatnonzero(other) if middle > 0 else ():
                cases[those[i].row.case].append(f"{name} is {values[i]:.4g}, the median {middle:.4g}")
        elif name != "labelled extent":
            spread = max(1.4826 * float(np.median(np.abs(values - middle))), SPREAD * abs(middle)) or float(values.std())
            for i in np.flatnonzero(np.abs(values - middle) > UNUSUAL * spread):
                cases[those[i].row.case].append(f"{name} is {values[i]:.4g}, the median {middle:.4g}: "
                                                f"{abs(values[i] - middle) / spread:.0f} robust deviations away")
    for name in dict.fromkeys(w for s in seen for w in s.facts.words):
        those = [s for s in seen if name in s.facts.words]
        mix = Counter(s.facts.words[name] for s in those)
        usual, n = mix.most_common(1)[0]
        for s in those if n >= USUAL * len(those) else ():
            if mix[word := s.facts.words[name]] <= RARE * len(those):
                cases[s.row.case].append(f"{name} is {word}, elsewhere {usual}")
    remedy = "Are they what the others are? Another device, unit or protocol is seen here first."
    return [finding("doubt", "unusual", "samples differ much from the rest", remedy,
                    [Case(case=case, what="; ".join(what)) for case, what in cases.items()])] if cases else []


def classes(intake: Intake, seen: Sequence[Seen], class_names: Sequence[str], objects: Sequence[str], manifest: Manifest
            ) -> list[Finding]:
    """Values that nobody declared, classes that few subjects have, and classes that a split lacks."""
    found = []
    unknown = [v.value for v in intake.labels if v.value and manifest.mask_names and not v.name]
    if unknown:
        cases = [Case(case=s.row.case, what=f"label {', '.join(str(v) for v in unknown if v in s.counts)}")
                 for s in seen if any(v in s.counts for v in unknown)]
        found.append(finding("doubt", "unknown label", "label maps hold values that the data set does not declare: "
                             + ", ".join(map(str, unknown)), "Declare them in dataset.json, or correct the label maps.", cases))
    top = max((v.value for v in intake.labels), default=0)
    if intake.labels and top + 1 > max(2 * len(intake.labels), len(manifest.mask_names)):
        found.append(Finding(level="doubt", reason="label numbers", what="label values are no numbers of classes from 0 on: "
                             + ", ".join(str(v.value) for v in intake.labels), count=len(intake.labels),
                             remedy="Number the classes 0, 1, 2, …, or map the values by the modality's options."))
    holders: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))  # class -> split -> subjects
    mask_names = {v.value: f"label {v.value} {v.name}".strip() for v in intake.labels if v.value > 0}
    for s in seen:
        held = [mask_names[v] for v in s.counts if v in mask_names]
        held += [f"class {class_names[s.row.labels['class']]}"] if "class" in s.row.labels else []
        held += [f"object {objects[c]}" for c in set(s.row.objects.label.tolist())] if s.row.objects is not None else []
        for name in held:
            holders[name][s.row.split].add(s.row.subject)
    few = {name: n for name, by_split in holders.items() if (n := len(set().union(*by_split.values()))) < FEWEST}
    if few and intake.subjects >= FEWEST:
        found.append(Finding(level="doubt", reason="few", what="classes that fewer than "
                             f"{FEWEST} subjects have: {', '.join(f'{name} ({n})' for name, n in few.items())}", count=len(few),
                             remedy="They can hardly be learnt and tested both: find more, or join them with others."))
    declared = [s.name for s in intake.splits if s.name != "open" and s.labelled]
    lacking = [f"{name} in {split}" for name, by_split in holders.items() for split in declared if not by_split.get(split)]
    if len(declared) > 1 and lacking and not any("" in by_split for by_split in holders.values()):
        found.append(Finding(level="doubt", reason="class missing", what=f"classes that a split lacks: {', '.join(lacking)}",
                             count=len(lacking), remedy="Divide the subjects anew, by class."))
    return found


def table(manifest: Manifest, modality: Modality) -> list[Finding]:
    """Lines of a list that leave something open, and files that lie beside the listed ones and in no list."""
    found = []
    lines = len(manifest) + sum(p.reason in ("missing", "line") for p in manifest.problems)
    blank = {column: n for column, n in names.columns(manifest.blank).items() if n and column.lower() not in FILL_IN}
    if blank:
        told = ", ".join(f"{column} ({n} of {lines})" for column, n in blank.items())
        found.append(Finding(level="doubt", reason="blank", what=f"columns without a value in some lines: {told}",
                             count=sum(blank.values()), remedy="A sample without a subject counts as one of its own; "
                             "subgroups leave out what is blank."))
    if manifest.listed:
        listed = {f for r in manifest.rows for p in (*r.paths, *r.fields.values()) for f in files(p, modality)}
        beside, own = getattr(modality, "beside", lambda _: ()), getattr(modality, "recognised", lambda _: True)
        listed |= {Path(f) for file in list(listed) for f in beside(file)}
        lost = {p.local for p in manifest.problems}
        spare = [f for folder in {f.parent for f in listed if f.parent.is_dir()} for f in folder.iterdir()
                 if f.is_file() and f.name.lower().endswith(modality.suffixes) and not f.name.startswith(".")
                 and f not in listed and own(f) and not any(local.endswith(f.name) for local in lost)]
        if spare:
            found.append(Finding(level="doubt", reason="not listed", what="files lie beside the listed ones and are in no list",
                                 count=len(spare), remedy="Add them to the list, or take them away: they are not used."))
    return found


def files(path: Path, modality: Modality) -> list[Path]:
    """The files that a sample's path means: of an element its file, of a folder its members."""
    element = split_element(path)
    file = element[0] if element else path
    return member_files(file, modality.members) or [file]
