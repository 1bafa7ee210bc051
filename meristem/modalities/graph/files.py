"""Which format a file is in, and what it holds. Parsing is kept: every sample of a file of several asks again."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

from meristem.errors import DataError
from meristem.modalities.graph import planetoid, tu
from meristem.modalities.graph.raw import Contents

SUFFIXES = (".graph", ".txt", ".csv", ".tsv", ".npy", ".edges", ".edgelist", ".graphml", ".json")
NO_DATA = re.compile(r"(readme|license|licence|notes?|requirements|changes|changelog)\b.*|(train|test)_idx-\d+\.txt"
                     r"|participants\.tsv|.*_(sessions|scans)\.tsv|nodes\.(csv|tsv)|dataset_description\.json", re.IGNORECASE)


def beside(path: Path) -> list[Path]:
    """The other files of which a graph file is read."""
    if path.suffix == ".graph":
        return planetoid.parts(path)
    if tu.is_tudataset(path):
        return tu.parts(path)
    folds = path.parent / "10fold_idx"
    return sorted(folds.glob("test_idx-*.txt")) if path.suffix == ".txt" and folds.is_dir() else []


def is_data(path: Path) -> bool:
    """Whether a file by its name may hold a graph, and is no index, table or part of another."""
    return not NO_DATA.fullmatch(path.name) and tu.part_of(path) is None


def contents(path: Path, label: str | None) -> Contents:
    """label: column of the class in a table of molecules. Raises DataError."""
    try:
        place = tuple((f.name, s.st_size, s.st_mtime_ns) for f in (path, *beside(path)) if f.is_file() for s in [f.stat()])
        return _contents(path, place, label)
    except OSError as error:
        raise DataError("unreadable", f"the file cannot be read ({error.strerror})", "Check it and its permissions.") from None


@lru_cache(maxsize=4)
def _contents(path: Path, place: tuple[tuple[str, int, int], ...], label: str | None) -> Contents:
    """`place` changes when a file does."""
    if path.suffix == ".graph":
        return planetoid.read_planetoid(path)
    if tu.is_tudataset(path):
        return tu.read_tudataset(path)
    lines = _lines(path)
    if tu.is_collection(path, lines):
        return tu.read_collection(path, lines)
    raise DataError("format", "the file is in no known format of graphs", "See `meristem data check --help`.")


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise DataError("unreadable", "the file is not a text in UTF-8", "Save it as UTF-8.") from None
