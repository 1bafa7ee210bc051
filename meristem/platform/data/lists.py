"""Samples that a text file names: a CSV with a header, or lines of `path label`."""

from __future__ import annotations

import csv
import io
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from meristem.errors import DataError
from meristem.platform.data.layouts import SPLITS, Search
from meristem.platform.data.pairs import join_subjects

PATH = ("path", "file", "filename", "video", "clip")  # names of a column, likeliest first
SUBJECT = ("subject", "patient", "group", "source")
LABEL = ("class", "label", "action")
SUFFIXES = (".csv", ".txt", ".list")
PARTICIPANTS = "participants.tsv"  # of BIDS: a line for each subject, by the name of its folder
NOTHING = ("", "na", "n/a", "nan", "none", "null", "?", "-", "--", "unknown")  # what people write where they know nothing


def is_list(search: Search, path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and (not search.suffix(path.name) or _names_samples(search, path))


def folders(text: str, base: Path) -> list[Path]:
    """The existing folders that the lines of a list name."""
    pieces = [{*re.split(r"[,\t]", line), line.rsplit(None, 1)[0], line.rsplit(None, 2)[0]}
              for line in text.split("\n") if line.strip()]
    return [base / _bare(p) for some in pieces for p in sorted(some) if _there(base, p) == "folder"]


def of_splits(search: Search, folder: Path) -> dict[Path, str]:
    """The lists of a folder by what they are for, e.g. train.csv, val.csv and test.csv; none without one to train on."""
    found = {}
    for f in sorted(folder.iterdir()):
        split = re.match("train|val|test", f.name.lower())
        if split and f.is_file() and is_list(search, f) and _names_samples(search, f) and not _moved(search, f):
            found[f] = split[0]
    return found if "train" in found.values() else {}


def read(search: Search, splits: Mapping[Path, str]) -> Path:
    """Add what the lists name, with the split of each list where a line has none. Returns the root of the names.

    Raises DataError for a list that cannot be read, and for samples in two splits.
    """
    search.layout = "list"
    for path, split in splits.items():
        text = _text(path)
        if _header(text):
            _table(search, path, text, split)
        else:
            _lines(search, path, text, split)
    several = Counter(local for local, _ in {(f.local, f.split) for f in search.found})
    torn = sum(n > 1 for n in several.values())
    if torn and len(splits) > 1:
        raise DataError("split", f"the lists name {torn} samples for more than one split",
                        "Are they folds? Put the lists of one fold into a folder of their own.")
    search.name_subjects()
    if search.pairs and not search.ranked:
        join_subjects(search)
    root = next(iter(splits)).parent
    inside = all(p.is_relative_to(root) for f in search.found for p in f.paths)
    return root if inside or not search.found else Path(os.path.commonpath([f.paths[0].parent for f in search.found]))


def participants(search: Search, root: Path) -> None:
    """Add what `participants.tsv` says of each subject to its samples; `n/a` says nothing."""
    if not (root / PARTICIPANTS).is_file():
        return
    lines = csv.DictReader(io.StringIO(_text(root / PARTICIPANTS)), delimiter="\t")
    said = {line.pop("participant_id", None): {k: number(v.strip()) for k, v in line.items() if k and v and v.strip() != "n/a"}
            for line in lines}
    for f in search.found:
        f.meta = {**said.get(f.subject, {}), **f.meta}


def number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise DataError("unreadable", f"{path.name} is not a text in UTF-8", "Save it as UTF-8.") from None


def _header(text: str) -> list[str]:
    """The columns' names; none where the first line is none of names."""
    try:
        columns = [c.strip() for c in next(csv.reader(text.split("\n", 1)[:1]), [])]
    except csv.Error:
        return []
    return columns if any(c.lower() in PATH or re.fullmatch(r"path_\d+", c.lower()) for c in columns) else []


def _names_samples(search: Search, path: Path) -> bool:
    try:
        text = _text(path)
    except DataError:
        return False
    return bool(_header(text) or _entry(search, text.lstrip().split("\n", 1)[0].strip(), path.parent))


def _moved(search: Search, path: Path) -> bool:
    """Whether a list without labels names, by their place elsewhere, files that lie beside it: they speak for themselves."""
    entry = _entry(search, _text(path).lstrip().split("\n", 1)[0].strip(), path.parent)
    return bool(entry and not entry[1] and not _there(path.parent, entry[0]) and _there(path.parent, Path(entry[0]).name))


def _table(search: Search, path: Path, text: str, default: str) -> None:
    """A header with `path` (or `path_0`, `path_1`, …, or a synonym) and perhaps subject, split, mask, class, pair.

    pair: another sample that shows the same scene; one that no line is about is added. Where it may differ from line to line, a
    sample may have several lines: all but the first only name another pair of it.
    """
    reader = csv.DictReader(io.StringIO(text))
    columns = [c.strip() for c in reader.fieldnames or ()]
    reader.fieldnames = columns
    lower = {c.lower(): c for c in reversed(columns)}

    def first(names: tuple[str, ...]) -> str | None:
        return next((lower[n] for n in names if n in lower), None)

    numbered = sorted((c for c in columns if re.fullmatch(r"path_\d+", c.lower())), key=lambda c: int(c[5:]))
    one = first(PATH)
    paths = numbered if numbered and "path" not in lower else [one] if one else []
    subject, label, split, mask, pair = (first(names) for names in (SUBJECT, LABEL, ("split",), ("mask",), ("pair",)))
    known = {*paths, subject, label, split, mask, pair}
    others: dict[str, tuple[str, str]] = {}  # what is named as a pair -> subject and split of the first line that does
    seen: set[tuple[str, ...]] = set()
    search.layout = f"CSV, subjects by column `{subject}`" if subject else "CSV"
    search.ranked |= subject is not None
    for line in reader:
        r = {k: (v or "").strip() for k, v in line.items() if isinstance(k, str)}
        search.blank.update({k: int(v.lower() in NOTHING) for k, v in r.items()})
        said = r[split].lower() if split else ""
        if said and said not in SPLITS:
            raise DataError("split", f"{path.name} line {reader.line_num}: its split is none of train, val, test",
                            "Correct the column, or leave it empty to have a split drawn.")
        if not all(r[c] for c in paths):
            search.lost.append(("missing", f"{path.name} line {reader.line_num}", "has no path",
                                "Fill it in, or remove the line."))
            continue
        meta = {k: number(v) for k, v in r.items() if k not in known and v}
        names, whose, where = tuple(r[c] for c in paths), r[subject] if subject else "", SPLITS.get(said, default)
        if pair and r[pair]:
            search.pairs.append((path.parent / names[0], path.parent / r[pair]))
            others.setdefault(r[pair], (whose, where))
        if pair and names in seen:
            continue
        seen.add(names)
        search.listed(path.parent, names, (r[mask] or None) if mask else None, whose, where,
                      (r[label] or None) if label else None, meta)
    for other, (whose, where) in others.items():
        if (other,) not in seen:
            search.listed(path.parent, (other,), None, whose, where)


def _lines(search: Search, path: Path, text: str, split: str) -> None:
    """A sample a line: `path`, `path label` or, for a folder, `path count label`, separated by comma, tab or blanks."""
    entries = [(i, _entry(search, line.strip(), path.parent)) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    if path.suffix.lower() == ".csv" and not (entries and entries[0][1]):
        raise DataError("unreadable", f"{path.name} has no column `path` (or path_0, path_1, …)",
                        "Its first line must name the columns, or be `path label`.")
    for i, entry in entries:
        if entry:
            search.listed(path.parent, (entry[0],), None, "", split, entry[1] or None)
        else:
            search.lost.append(("line", f"{path.name} line {i}", f"line {i} names no file of a known kind and no folder",
                                "Write `path label`, separated by a comma, a tab or a blank."))


def _entry(search: Search, line: str, base: Path) -> tuple[str, str] | None:
    """(path, label) of a line; the label is what follows the last separator, the path may hold blanks and commas."""
    if not line:
        return None
    if search.suffix(_bare(line)) or _there(base, line):
        return _bare(line), ""
    for separator in ("\t", ",", None):
        path, *label = line.rsplit(separator, 1)
        if label and (search.suffix(_bare(path)) or _there(base, path)):
            return _bare(path), _bare(label[0])
        path, *count = path.rsplit(separator, 1) or [""]
        if label and count and count[0].strip().isdecimal() and _there(base, path) == "folder":
            return _bare(path), _bare(label[0])
    return None


def _there(base: Path, name: str) -> str:
    """`folder`, `file` or ''; a line of prose is no path, however long."""
    try:
        return "" if not _bare(name) else "folder" if (base / _bare(name)).is_dir() else "file" * (base / _bare(name)).is_file()
    except OSError:
        return ""


def _bare(text: str) -> str:
    return text.strip().strip('"')
