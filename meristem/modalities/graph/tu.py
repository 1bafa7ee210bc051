"""Collections of graphs in the two text formats of the TU sets."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from meristem.errors import DataError
from meristem.modalities.base import Element, natural
from meristem.modalities.documents import regular
from meristem.modalities.graph.raw import Contents, Raw

FOLD = re.compile(r"test_idx-(\d+)\.txt")
PARTS = ("graph_indicator", "graph_labels", "graph_attributes", "node_labels", "node_attributes", "edge_labels",
         "edge_attributes")  # of DS_A.txt


def is_collection(lines: list[str]) -> bool:
    """Whether a text begins as the format of DGCNN: the number of graphs, then `nodes label`."""
    head = [line.split() for line in lines[:2]]
    return [len(h) for h in head] == [1, 2] and all(re.fullmatch(r"-?\d+", x) for h in head for x in h)


def read_collection(path: Path, lines: list[str]) -> Contents:
    """The format of DGCNN (Zhang et al. 2018) and GIN: `N`; per graph `n label`, per node `tag degree neighbours… numbers…`.

    Folds are those of `10fold_idx/test_idx-k.txt` beside it. Raises DataError.
    """
    rows = iter(enumerate(lines[1:], 2))
    graphs, labels, tags = [], [], []
    number = 0
    try:
        for _ in range(int(lines[0])):
            number, line = next(rows)
            n, label = line.split()
            ends, tag, given = [], [], []
            for node in range(int(n)):
                number, line = next(rows)
                words = line.split()
                degree = int(words[1])
                near = [int(w) for w in words[2:2 + degree]]
                if len(near) < degree:
                    raise ValueError
                ends += [(node, other) for other in near]
                tag.append(words[0])
                given.append([float(w) for w in words[2 + degree:]])
            graphs.append((np.array(ends, np.int64).reshape(-1, 2).T, given))
            labels.append(label)
            tags.append(tag)
    except StopIteration:
        raise DataError("truncated", f"the file ends within graph {len(graphs)} of {lines[0].strip()}",
                        "Copy it again.") from None
    except (ValueError, IndexError):
        raise DataError("unreadable", f"line {number} is not as the format of DGCNN has it",
                        "Per graph `nodes label`, then per node `tag degree neighbours`.") from None
    names = tuple(sorted({t for tag in tags for t in tag}, key=natural))
    place = {name: i for i, name in enumerate(names)}
    folds = _folds(path.parent / "10fold_idx", len(graphs))
    elements = tuple(Element(f"graph/{i}", label, fold=folds.get(i, -1)) for i, label in enumerate(labels))
    raws: list[Raw | DataError] = []
    for (pairs, given), tag in zip(graphs, tags, strict=True):
        if len({len(g) for g in given}) > 1:
            raws.append(DataError("shape", "its nodes have different counts of numbers", "Complete or remove them."))
            continue
        numbers = np.array(given, np.float32) if given and given[0] else None
        raws.append(Raw(len(tag), pairs, tag=np.array([place[t] for t in tag], np.int64), given=numbers))
    return Contents(raws, elements, names)


def _folds(folder: Path, graphs: int) -> dict[int, int]:
    """Graph -> the fold that tests it."""
    found: dict[int, int] = {}
    for file in sorted(folder.glob("test_idx-*.txt"), key=lambda f: natural(f.name)) if folder.is_dir() else ():
        if match := FOLD.fullmatch(file.name):
            try:
                found |= dict.fromkeys((int(w) for w in regular(file).read_text().split()), int(match[1]) - 1)
            except (ValueError, OSError):
                raise DataError("split", f"{folder.name}/{file.name} is no list of graphs' numbers",
                                "Correct or remove it.") from None
    if any(not 0 <= i < graphs for i in found):
        raise DataError("split", f"{folder.name} numbers graphs beyond the {graphs} of the file", "Correct or remove it.")
    return found


def part_of(path: Path) -> Path | None:
    """The `DS_A.txt` that a file `DS_graph_labels.txt`, … belongs to."""
    for part in PARTS:
        if path.name.endswith(f"_{part}.txt"):
            whole = path.with_name(f"{path.name.removesuffix(f'_{part}.txt')}_A.txt")
            return whole if whole.is_file() else None
    return None


def is_tudataset(path: Path) -> bool:
    return path.name.endswith("_A.txt") and _beside(path, "graph_indicator").is_file()


def _beside(path: Path, part: str) -> Path:
    return path.with_name(f"{path.name.removesuffix('_A.txt')}_{part}.txt")


def parts(path: Path) -> list[Path]:
    """The files that belong to a `DS_A.txt`."""
    return [f for part in PARTS if (f := _beside(path, part)).is_file()]


def read_tudataset(path: Path) -> Contents:
    """`DS_A.txt` (lines `i, j`, from 1), `DS_graph_indicator.txt` and the optional files beside them (Morris et al. 2020).

    Labels of nodes are tags, attributes of nodes numbers, labels of edges types; the first attribute of edges is their weight.
    Raises DataError.
    """
    indicator = _table(_beside(path, "graph_indicator"))[:, 0].astype(np.int64)
    pairs = _table(path).astype(np.int64)
    if pairs.size and pairs.shape[1] != 2:
        raise DataError("shape", f"a line of the edges has {pairs.shape[1]} numbers", "Each must be `i, j`.")
    pairs = pairs.reshape(-1, 2).T - 1
    if pairs.size and (pairs.min() < 0 or pairs.max() >= len(indicator)):
        raise DataError("dangling", f"edges lead to nodes beyond the {len(indicator)} that belong to a graph",
                        "DS_A.txt counts nodes from 1; DS_graph_indicator.txt must have a line for each.")
    if (np.diff(indicator) < 0).any() or (len(indicator) and indicator[0] < 1):
        raise DataError("unreadable", "DS_graph_indicator.txt is not sorted from 1", "Number the graphs from 1, in order.")

    def optional(part: str, rows: int) -> np.ndarray | None:
        file = _beside(path, part)
        table = _table(file) if file.is_file() else None
        if table is not None and len(table) != rows:
            raise DataError("shape", f"…_{part}.txt has {len(table)} lines where {rows} are due", "Copy the files again.")
        return table

    graphs = int(indicator.max(initial=0))
    if graphs > len(indicator):
        raise DataError("unreadable", f"DS_graph_indicator.txt numbers graphs up to {graphs} for {len(indicator)} nodes",
                        "Number the graphs from 1, each of one node at least.")
    labels, tag = optional("graph_labels", graphs), optional("node_labels", len(indicator))
    given, kind = optional("node_attributes", len(indicator)), optional("edge_labels", pairs.shape[1])
    weight = optional("edge_attributes", pairs.shape[1])
    tags, of_node = _names(tag)
    kinds, of_edge = _names(kind)
    first = np.searchsorted(indicator, np.arange(1, graphs + 2))
    owner = indicator[pairs[0]] if pairs.size else np.zeros(0, np.int64)
    if pairs.size and (owner != indicator[pairs[1]]).any():
        raise DataError("dangling", "edges join nodes of different graphs", "Correct DS_A.txt or DS_graph_indicator.txt.")
    order = np.argsort(owner, kind="stable")
    bounds = np.searchsorted(owner[order], np.arange(1, graphs + 2))
    raws = []
    for g in range(graphs):
        nodes, edges = slice(first[g], first[g + 1]), order[bounds[g]:bounds[g + 1]]
        raws.append(Raw(int(first[g + 1] - first[g]), pairs[:, edges] - first[g], None if of_edge is None else of_edge[edges],
                        None if weight is None else weight[edges, 0], None if of_node is None else of_node[nodes],
                        None if given is None else given[nodes].astype(np.float32)))
    elements = tuple(Element(f"graph/{g}", None if labels is None else f"{labels[g, 0]:g}") for g in range(graphs))
    return Contents(raws, elements, tags, kinds)


def _names(table: np.ndarray | None) -> tuple[tuple[str, ...], np.ndarray | None]:
    """Names of the values of a first column, and each row's number among them."""
    if table is None:
        return (), None
    values, at = np.unique(table[:, 0], return_inverse=True)
    return tuple(f"{v:g}" for v in values), at


def _table(path: Path) -> np.ndarray:
    try:
        with path.open() as file:
            return np.array([[float(w) for w in line.replace(",", " ").split()] for line in file if line.strip()], float)
    except (ValueError, OSError):
        raise DataError("unreadable", "a file of the collection is not lines of as many numbers each",
                        "Copy it again.") from None
