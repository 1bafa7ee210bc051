"""What the formats share: lines, subjects, and what is checked of boxes before a sample is opened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from meristem.errors import DataError

SUBJECT = ("subject", "patient", "patient_id", "subject_id")


def lines(file: Path) -> list[str]:
    """Of a text, without empty ones; none where there is no file."""
    text = file.read_text(encoding="utf-8-sig") if file.is_file() else ""
    return [line.strip() for line in text.splitlines() if line.strip()]


def subject_of(entry: Mapping[str, Any]) -> str:
    """Whose sample an entry of a list says it is; '' where it does not."""
    return next((str(entry[key]) for key in SUBJECT if entry.get(key)), "")


def checked(box: Sequence[Sequence[float]], names: Sequence[str]) -> np.ndarray:
    """(K, 2·D) boxes of objects with these names. Raises DataError (box) for one that is not finite or has no extent."""
    table = np.array(box, float).reshape(len(names), -1) if len(names) else np.zeros((0, 4))
    if not np.isfinite(table).all():
        at = int(np.flatnonzero(~np.isfinite(table).all(1))[0])
        raise DataError("box", f"box {at + 1} ({names[at]}) is not made of finite numbers", "Correct or remove it.")
    low, high = np.split(table, 2, axis=1)
    flat = (high <= low).any(1)
    if flat.any():
        at = int(np.flatnonzero(flat)[0])
        raise DataError("box", f"box {at + 1} ({names[at]}) has zero area: {shown(table[at])}", "Correct or remove it.")
    return table


def shown(box: np.ndarray) -> str:
    low, high = np.split(np.asarray(box), 2)
    return " to ".join("(" + ", ".join(f"{x:g}" for x in corner) + ")" for corner in (low, high))


def upright(box: Sequence[Sequence[float]], names: Sequence[str]) -> np.ndarray:
    """(K, 7) boxes as in `platform.boxes`, of objects with these names.

    Raises DataError (box) for one that is not made of seven finite numbers or has a side that is not positive.
    """
    for i, (numbers, name) in enumerate(zip(box, names, strict=True)):
        if len(numbers) != 7 or not np.isfinite(np.array(numbers, float)).all():
            raise DataError("box", f"box {i + 1} ({name}) is not made of seven finite numbers", "Correct or remove it.")
        if min(numbers[3:6]) <= 0:
            raise DataError("box", f"box {i + 1} ({name}) has the sides {', '.join(f'{x:g}' for x in numbers[3:6])}",
                            "All must be positive: correct or remove it.")
    return np.array(box, float).reshape(-1, 7)
