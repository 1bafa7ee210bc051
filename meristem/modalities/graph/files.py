"""Which format a file is in, and what it holds. Parsing is kept: every sample of a file of several asks again."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

import numpy as np

from meristem.errors import DataError
from meristem.modalities import npy
from meristem.modalities.documents import MISSHAPEN
from meristem.modalities.graph import molecules, planetoid, tables, tu
from meristem.modalities.graph.raw import Contents

SUFFIXES = (".graph", ".txt", ".csv", ".tsv", ".npy", ".edges", ".edgelist", ".graphml", ".json")
NO_DATA = re.compile(r"(readme|license|licence|notes?|requirements|changes|changelog)\b.*|(train|test)_idx-\d+\.txt"
                     r"|participants\.tsv|.*_(sessions|scans)\.tsv|(.*_)?nodes\.(csv|tsv)", re.IGNORECASE)


def beside(path: Path) -> list[Path]:
    """The other files of which a graph file is read."""
    if path.suffix == ".graph":
        return planetoid.parts(path)
    if tu.is_tudataset(path):
        return tu.parts(path)
    if (nodes := tables.nodes_of(path)) is not None:
        return [nodes]
    folds = path.parent / "10fold_idx"
    return sorted(folds.glob("test_idx-*.txt")) if path.suffix == ".txt" and folds.is_dir() else []


def is_data(path: Path) -> bool:
    """Whether a file by its name may hold a graph, and is no index, table or part of another."""
    if path.suffix == ".json":
        return tables.is_node_link(path)
    return not NO_DATA.fullmatch(path.name) and tu.part_of(path) is None


def recognised(path: Path) -> bool:
    """Whether a file of one of `SUFFIXES` holds a graph, as far as its name and its first lines tell."""
    if not is_data(path) or path.suffix in (".graph", ".graphml", ".edges", ".edgelist", ".json"):
        return is_data(path)
    try:
        if path.suffix == ".npy":
            with path.open("rb") as array:
                shape, _ = npy.shape(array)
            return len(shape) == 2 and shape[0] == shape[1] > 3
        with path.open(encoding="utf-8-sig") as file:
            lines = [line for line in (file.readline() for _ in range(20)) if line.strip()]
        return tu.is_tudataset(path) or tu.is_collection(lines) or tables.recognised(lines) or (
            bool(lines) and molecules.is_table(tables.cells(lines)[0]))
    except (*MISSHAPEN, *npy.DAMAGED):
        return False


def contents(path: Path, label: str | None) -> Contents:
    """label: column of the class in a table of molecules. Raises DataError."""
    try:
        place = tuple((f.name, s.st_size, s.st_mtime_ns) for f in (path, *beside(path)) if f.is_file() for s in [f.stat()])
        return _contents(path, place, label)
    except OSError as error:
        raise DataError("unreadable", f"the file cannot be read ({error.strerror})", "Check it and its permissions.") from None
    except MISSHAPEN as error:
        raise DataError("unreadable", f"the file is not as its format has it ({type(error).__name__})",
                        "Export it again.") from None


@lru_cache(maxsize=4)
def _contents(path: Path, place: tuple[tuple[str, int, int], ...], label: str | None) -> Contents:
    """`place` changes when a file does."""
    if path.suffix == ".graph":
        return planetoid.read_planetoid(path)
    if tu.is_tudataset(path):
        return tu.read_tudataset(path)
    if path.suffix == ".npy":
        return tables.matrix(_array(path))
    if path.suffix == ".graphml":
        return tables.read_graphml(path)
    if path.suffix == ".json":
        return tables.read_node_link(path)
    lines = _lines(path)
    if not lines:
        raise DataError("empty", "the file holds nothing", "Export it again.")
    if tu.is_collection(lines):
        return tu.read_collection(path, lines)
    rows = tables.cells(lines)
    return molecules.read_smiles(rows, label) if molecules.is_table(rows[0]) else tables.read_table(path, rows)


def _array(path: Path) -> np.ndarray:
    return npy.read(path)


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise DataError("unreadable", "the file is not a text in UTF-8", "Save it as UTF-8.") from None
