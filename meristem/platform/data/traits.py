"""What divides subjects into the groups that a report tells apart: of a table's columns only these, and coarsely."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from meristem.modalities.base import natural
from meristem.platform.data.manifest import Row

COLUMNS = {"site": ("site", "center", "centre", "hospital", "institution"), "scanner": ("scanner", "manufacturer", "vendor"),
           "sex": ("sex", "gender"), "age": ("age", "age_years", "age_at_scan")}  # names of a column, likeliest first
SEXES = {"f": "female", "female": "female", "woman": "female", "m": "male", "male": "male", "man": "male", "o": "other",
         "other": "other"}
OLDEST = 80  # years from which on all are one band: so few are older that an age would tell who they are


def traits(rows: Sequence[Row], tested: Sequence[Row]) -> dict[str, dict[str, str]]:
    """Trait -> case -> value, of the tested ones whose table gives it; a trait that none has is left out.

    Sites and scanners are numbered in the order of their names in all rows, since a name may hold anything; sexes are words of
    a list; ages are bands of ten years. Whatever else stands there is not known.
    """
    found = {}
    for trait in COLUMNS:
        given = {_given(row, trait) for row in rows} - {""}
        number = {value: f"{i}" for i, value in enumerate(sorted(given, key=natural), 1)}
        coarse: Callable[[str], str] = {"sex": _sex, "age": _band}.get(trait, lambda value, n=number: n[value])  # type: ignore[misc]
        values = {row.case: coarse(value) for row in tested if (value := _given(row, trait))}
        if any(values.values()):
            found[trait] = {case: value for case, value in values.items() if value}
    return found


def _given(row: Row, trait: str) -> str:
    said = {name.strip().lower(): value for name, value in row.meta.items()}
    value = next((said[name] for name in COLUMNS[trait] if name in said), "")
    text = str(value).strip()
    return "" if text.lower() in ("n/a", "na", "nan", "unknown") else text


def _sex(value: str) -> str:
    return SEXES.get(value.lower(), "")


def _band(value: str) -> str:
    """`60–69` of 63, 63.4 years, `063Y` and `63+`; '' of what is no age in years (months, weeks and days: the first band)."""
    age = re.fullmatch(r"(\d+)(?:\.\d+)?\s*([YMWD]?)\+?", value.upper())
    years = -1 if age is None else int(age[1]) if age[2] in ("", "Y") else int(age[1]) // {"M": 12, "W": 52, "D": 365}[age[2]]
    if not 0 <= years <= 130:
        return ""
    return f"{OLDEST} and over" if years >= OLDEST else f"{years // 10 * 10}–{years // 10 * 10 + 9}"
