"""Whether the name of a file, a folder or a column may say whose it is. What it says is counted, never repeated."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath

_YEAR, _MONTH, _DAY = r"(?:19|20)\d\d", r"(?:0[1-9]|1[0-2])", r"(?:0[1-9]|[12]\d|3[01])"
KINDS = {
    "more than 200 characters": re.compile(r"(?s).{201}"),  # first: none of the others is to be sought in a long text
    "a date": re.compile(rf"(?<!\d)(?:{_YEAR}([-_.]?){_MONTH}\1{_DAY}|{_DAY}([-_.]){_MONTH}\2{_YEAR})(?!\d)"),
    "a DICOM UID": re.compile(r"(?<![\d.])[012](?:\.\d+){5,}"),
    "a number of 7 digits or more": re.compile(r"(?<![\d.])0*[1-9]\d{6,}(?![\d.]*\.\d)"),
    "parts divided by ^": re.compile(r"\w\^\w"),
    "an e-mail address": re.compile(r"[\w.+-]+@[\w-]+\.\w"),
}
"""What is suspicious in a name -> its pattern; the first that matches counts. Leading zeros are no digits of a number."""


def telling(name: str) -> str:
    """What is suspicious in a name, or ''."""
    return next((kind for kind, pattern in KINDS.items() if pattern.search(name)), "")


def counted(paths: Iterable[str]) -> dict[str, int]:
    """Kind -> different names of files and folders, along relative paths, that are suspicious so."""
    parts = {part for path in paths for part in PurePosixPath(path.split("#")[0]).parts}
    kinds = [telling(part) for part in parts]
    return {kind: kinds.count(kind) for kind in KINDS if kind in kinds}


PERSONAL = re.compile(r"^name$|(?:first|last|middle|given|family|full|patient|sur)[ _-]?name|birth|(?:^|[ _-])(?:dob|mrn|ssn)$|"
                      r"address|phone|e-?mail|insurance|physician", re.IGNORECASE)


def personal(column: str) -> bool:
    """Whether a column of a table is called as if it held a person's name, birth, number or address."""
    return bool(PERSONAL.search(column))


COMMON = re.compile(
    r"path|file|filename|video|clip|image|subject|patient|group|source|class|label|action|split|fold|mask|pair|site|center|centre|"
    r"hospital|institution|scanner|manufacturer|vendor|sex|gender|age|years|at|scan|date|of|birth|dob|mrn|ssn|first|last|middle|"
    r"given|family|full|sur|surname|name|id|number|address|phone|e|mail|email|insurance|physician|\d+")


def columns(counts: Mapping[str, int]) -> dict[str, int]:
    """Column of a table -> count, in their order: one made of `COMMON` words by its own name, another by its place, from 1."""
    shown = {}
    for place, (name, count) in enumerate(counts.items(), 1):
        words = re.findall(r"[^\W_]+", name.lower())
        shown[name if words and all(map(COMMON.fullmatch, words)) else f"column {place}"] = count
    return shown
