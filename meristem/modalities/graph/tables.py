"""Graphs of tables: lists of edges with or without a table of nodes, matrices of connections, GraphML and node-link JSON."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from meristem.errors import DataError
from meristem.modalities.base import natural
from meristem.modalities.documents import read_json
from meristem.modalities.graph.raw import Contents, Raw

SOURCE = ("source", "from", "src", "node1", "u")  # names of a column, likeliest first
TARGET = ("target", "to", "dst", "dest", "node2", "v")
WEIGHT = ("weight", "value", "strength")
TYPE = ("type", "kind", "relation", "edge_type", "label")
ID = ("id", "node", "name")
CLASS = ("class", "label", "y")
TAG = ("tag", "type", "kind")
SPLITS = {"train": 0, "training": 0, "val": 1, "valid": 1, "validation": 1, "dev": 1, "test": 2, "testing": 2}
ROUNDING = 1e-4  # of the largest weight: how far a matrix may be from symmetric, as printed numbers are
NONE = -1


def cells(lines: Sequence[str]) -> list[list[str]]:
    """Rows of a table whose cells are parted by commas, semicolons, tabs or blanks, whichever its first line has."""
    found = next((d for d in ",;\t" if d in lines[0]), None) if lines else None
    rows = list(csv.reader(lines, delimiter=found)) if found else [line.split() for line in lines]
    return [[cell.strip() for cell in row] for row in rows]


def nodes_of(path: Path) -> Path | None:
    """The table of nodes beside a list of edges: `STEM_nodes.csv` or `nodes.csv`, or .tsv."""
    names = [f"{stem}nodes{end}" for stem in (f"{path.stem}_", "") for end in (".csv", ".tsv")]
    return next((f for name in names if (f := path.with_name(name)).is_file()), None)


def read_table(path: Path, rows: list[list[str]]) -> Contents:
    """A list of edges `source, target[, weight or type]`, or a square matrix of weights. Raises DataError."""
    head = [c.lower() for c in rows[0]] if rows else []
    numbers = [row for row in rows if all(_is_number(c) for c in row)]
    if _first(head, SOURCE) is not None and _first(head, TARGET) is not None:
        return _edge_list(rows[1:], head, nodes_of(path))
    width = len(rows[-1]) if rows else 0
    square = len(numbers) == len(rows) == width and {len(row) for row in rows} == {width}
    if width in (2, 3) and {len(row) for row in rows} == {width} and not (
            square and _symmetric(np.array([[float(c or "nan") for c in row] for row in rows]))):
        return _edge_list(rows, ["source", "target", *(["weight"] if len(numbers) == len(rows) else ["type"])][:width],
                          nodes_of(path))
    return matrix(*_square(rows))


def recognised(lines: Sequence[str]) -> bool:
    """Whether first lines look like a list of edges with its header, or like a matrix of more than three columns: no fewer of
    them than lines, clouds of points are taller.
    """
    rows = cells(lines)
    head = [c.lower() for c in rows[0]] if rows else []
    if _first(head, SOURCE) is not None and _first(head, TARGET) is not None:
        return True
    return len(rows) > 2 and len(rows[2]) >= max(4, len(rows) - 1) and all(map(_is_number, rows[2][1:]))


def _square(rows: list[list[str]]) -> tuple[np.ndarray, tuple[str, ...]]:
    """The numbers of a matrix and the names of its rows, if it has a first line or column of them."""
    names: tuple[str, ...] = ()
    if rows and not all(_is_number(c) for c in rows[0]):
        names, rows = tuple(rows[0]), rows[1:]
    if rows and len(rows[0]) == len(rows) + 1:
        names, rows = tuple(row[0] for row in rows), [row[1:] for row in rows]
    if len({len(row) for row in rows}) > 1:
        raise DataError("shape", "the lines have different counts of cells", "Give a square matrix, or `source,target` lines.")
    try:
        array = np.array([[float(c) if c else np.nan for c in row] for row in rows], float)
    except ValueError:
        raise DataError("format", "the table is neither a list of edges nor a matrix of numbers nor one of molecules",
                        "A list's columns are `source,target[,weight]`; of molecules one is called `smiles`.") from None
    return array, names if len(names) == len(rows) else ()


def matrix(array: np.ndarray, names: tuple[str, ...] = ()) -> Contents:
    """A connectome: weights (N, N) of undirected edges, 0 for none; a triangle stands for both.

    given: each node's row (its connectivity profile); kinds: the sign, where some are negative. A diagonal that is not finite,
    as a Fisher transform leaves it, is set to 0. Raises DataError: shape, nan, asymmetric, empty.
    """
    if array.ndim != 2 or array.shape[0] != array.shape[1] or not len(array):
        raise DataError("shape", f"a connectome is a square matrix, this is {' × '.join(map(str, array.shape))}",
                        "Export connections between the same regions, one line each.")
    array = array.astype(np.float64)
    diagonal = np.diag_indices(len(array))
    broken = ~np.isfinite(array[diagonal])
    array[diagonal] = np.where(broken, 0, array[diagonal])
    if not np.isfinite(array).all():
        regions = int((~np.isfinite(array)).any(1).sum())
        raise DataError("nan", f"connections of {regions} of {len(array)} regions are NaN, infinite or missing",
                        "Leave those regions out of all matrices, or set what is not connected to 0.")
    if not np.tril(array, -1).any() or not np.triu(array, 1).any():
        array = array + array.T - np.diag(array[diagonal])
    if not array[~np.eye(len(array), dtype=bool)].any():
        raise DataError("empty", "all connections are 0", "Export the matrix again.")
    if not _symmetric(array):
        raise DataError("asymmetric", "the matrix is not symmetric, so its connections have a direction",
                        "Average it with its transpose, if the direction means nothing.")
    pairs = np.stack(np.nonzero(np.triu(array, 1)))
    weight = array[pairs[0], pairs[1]]
    signed = bool((weight < 0).any())
    raw = Raw(len(array), pairs, (weight > 0).astype(np.int64) if signed else None, weight, given=array.astype(np.float32),
              names=names, notes={"diagonal not finite": int(broken.sum())})
    return Contents([raw], kinds=("negative", "positive") if signed else ("positive",))


def _symmetric(array: np.ndarray) -> bool:
    return bool(np.abs(array - array.T).max() <= ROUNDING * max(np.abs(array).max(), 1e-30))


def _edge_list(rows: list[list[str]], head: list[str], nodes: Path | None) -> Contents:
    source, target, weight, kind = (_first(head, names) for names in (SOURCE, TARGET, WEIGHT, TYPE))
    assert source is not None and target is not None
    if any(len(row) < len(head) for row in rows):
        raise DataError("truncated", "a line has fewer cells than the others", "Complete or remove it.")
    table: dict[str, list[str]] = {}
    if nodes is not None:
        lines = [line for line in nodes.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        first, *rest = cells(lines)
        table = {name.lower(): [row[i] if i < len(row) else "" for row in rest] for i, name in enumerate(first)}
    edges = [(row[source], row[target]) for row in rows]
    return assembled(table, edges, None if weight is None else [row[weight] for row in rows],
                     None if kind is None else [row[kind] for row in rows])


def assembled(nodes: Mapping[str, Sequence[str]], edges: Sequence[tuple[str, str]], weight: Sequence[str] | None,
              kind: Sequence[str] | None) -> Contents:
    """One graph of columns. nodes: by lower-case name; one is `id`, or the nodes are those that the edges name, in order.

    class and split become fields, tag the tag, all other columns numbers. Raises DataError.
    """
    column = {name: values for name, values in nodes.items() if name}
    key = next((name for name in ID if name in column), None)
    names = tuple(column.pop(key)) if key else ()
    if not names:
        count = len(next(iter(column.values()), ()))
        names = tuple(map(str, range(count))) if count else tuple(sorted({e for edge in edges for e in edge}, key=natural))
    if any(len(values) != len(names) for values in column.values()):
        raise DataError("shape", f"the table of nodes has not a line for each of the {len(names)} that edges name",
                        "Complete it, or remove it.")
    place = {name: i for i, name in enumerate(names)}
    if len(place) < len(names):
        raise DataError("duplicate", "two nodes have one name", "Give every node a name of its own.")
    lost = [e for edge in edges for e in edge if e not in place]
    if lost:
        raise DataError("dangling", f"{len(lost)} ends of edges are no nodes of the table",
                        "Add the nodes, or remove the edges.")
    pairs = np.array([(place[a], place[b]) for a, b in edges], np.int64).reshape(-1, 2).T
    fields: dict[str, np.ndarray] = {}
    if (named := next((n for n in CLASS if n in column), None)) is not None:
        fields["mask"] = _coded(column.pop(named), NONE)[0].astype(np.int16)
    if "split" in column:
        fields["split"] = np.array([SPLITS.get(s.lower(), NONE) for s in column.pop("split")], np.int16)
    tag: np.ndarray | None = None
    tags: tuple[str, ...] = ()
    if (named := next((n for n in TAG if n in column), None)) is not None:
        tag, tags = _coded(column.pop(named))
    of_edge, kinds = (None, ()) if kind is None else _coded(kind)
    at = {name: i for i, name in enumerate(nodes, 1)}  # names of columns are not repeated in messages
    given = np.stack([_floats(v, f"column {at[n]} of the nodes") for n, v in column.items()], 1) if column else None
    raw = Raw(len(names), pairs, of_edge, None if weight is None else _floats(weight, "the weight of an edge"), tag, given,
              fields, names)
    return Contents([raw], None, tags, kinds)


def read_graphml(path: Path) -> Contents:
    """GraphML, by networkx; attributes as in `assembled`."""
    import networkx  # type: ignore[import-untyped]

    try:
        graph = networkx.read_graphml(path)
    except Exception as error:  # the parser raises what it likes
        raise DataError("unreadable", f"the file is no readable GraphML ({type(error).__name__})", "Export it again.") from None
    return _records([{"id": n, **d} for n, d in graph.nodes(data=True)],
                    [{"source": a, "target": b, **d} for a, b, d in graph.edges(data=True)])


def is_node_link(path: Path) -> bool:
    """Whether a JSON file looks like a graph; others beside the data are no data."""
    try:
        data = read_json(path, path.name)
    except DataError:
        return False
    parts = (data.get("nodes"), data.get("links", data.get("edges"))) if isinstance(data, dict) else (None,)
    return all(isinstance(part, list) for part in parts)


def read_node_link(path: Path) -> Contents:
    """`{"nodes": [{"id": …}], "links": [{"source": …, "target": …}]}`, as networkx and D3 write it."""
    data = read_json(path, "the file")
    return _records(data["nodes"], data.get("links", data.get("edges")))


def _records(nodes: Sequence[Mapping[str, object]], edges: Sequence[Mapping[str, object]]) -> Contents:
    try:
        columns = {str(k).lower(): k for n in nodes for k in n}
        table = {low: [str(n.get(k, "")) for n in nodes] for low, k in columns.items()}
        has = {str(k).lower(): k for e in edges for k in e}
        pairs = [(str(e["source"]), str(e["target"])) for e in edges]
    except (KeyError, AttributeError, TypeError):
        raise DataError("unreadable", "a node has no `id`, or an edge no `source` and `target`", "Export it again.") from None

    def column(names: tuple[str, ...]) -> list[str] | None:
        key = next((has[n] for n in names if n in has), None)
        return None if key is None else [str(e.get(key, "")) for e in edges]

    return assembled(table, pairs, column(WEIGHT), column(TYPE))


def _coded(values: Sequence[str], empty: int | None = None) -> tuple[np.ndarray, tuple[str, ...]]:
    """Numbers of the values among their distinct ones in natural order; `empty` for '', where it is given."""
    names = tuple(sorted({v for v in values if v or empty is None}, key=natural))
    place = {name: i for i, name in enumerate(names)}
    return np.array([place.get(v, empty) for v in values], np.int64), names


def _floats(values: Sequence[str], what: str) -> np.ndarray:
    try:
        return np.array([float(v) if v else np.nan for v in values], np.float32)
    except ValueError:
        raise DataError("format", f"{what} holds words", "Call a column of words `tag` (nodes) or `type` (edges).") from None


def _first(head: Sequence[str], names: tuple[str, ...]) -> int | None:
    return next((head.index(n) for n in names if n in head), None)


def _is_number(text: str) -> bool:
    return not text or re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?(nan|inf)", text.lower()) is not None
