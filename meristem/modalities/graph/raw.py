"""A graph as its file says it, and the edges made of that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from meristem.errors import DataError
from meristem.modalities.base import Element


@dataclass(frozen=True)
class Raw:
    """One graph of a file.

    pairs: (2, E) as listed, in any order, one or both directions. kind: (E,) numbers into the file's kinds. weight: (E,).
    tag: (N,) numbers into the file's tags. given: (N, F) numbers of the nodes, dense or scipy sparse. fields: (N,) int16.
    names: of the nodes, where they are not numbered from 0. notes: what was set right in reading, counted.
    """

    nodes: int
    pairs: np.ndarray
    kind: np.ndarray | None = None
    weight: np.ndarray | None = None
    tag: np.ndarray | None = None
    given: Any = None
    fields: Mapping[str, np.ndarray] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    notes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Contents:
    """What a file holds. graphs: in order; an error in place of one that cannot be read. elements: None where the file is one
    sample. tags, kinds: names of the tags of nodes and the types of edges, in a natural order.
    """

    graphs: Sequence[Raw | DataError]
    elements: tuple[Element, ...] | None = None
    tags: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()

    def graph(self, number: int) -> Raw:
        """Raises DataError."""
        if number >= len(self.graphs):
            raise DataError("element", f"the file holds {len(self.graphs)} graphs, none of number {number}",
                            "Correct the list.")
        raw = self.graphs[number]
        if isinstance(raw, DataError):
            raise raw
        return raw


def both_ways(raw: Raw) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, dict[str, int]]:
    """(pairs (2, E) int32, kind (E,) int16, weight (E, 1) float32 or None, counts): undirected, sorted by source, then target.

    Self-loops go; of an edge listed several times the first stays; an edge listed in one direction stands for both. counts:
    self-loops, repeated edges, nodes without an edge. Raises DataError for an edge to a node that does not exist.
    """
    n, pairs = raw.nodes, np.asarray(raw.pairs, np.int64).reshape(2, -1)
    if n < 1:
        raise DataError("empty", "the graph has no nodes", "Remove it.")
    outside = ((pairs < 0) | (pairs >= n)).any(0)
    if outside.any():
        a, b = pairs[:, outside][:, 0]
        raise DataError("dangling", f"{outside.sum()} edges lead to nodes that do not exist; the first joins {a} and {b} of "
                        f"nodes 0 to {n - 1}", "Correct the edges, or add the nodes.")
    if raw.weight is not None and not np.isfinite(raw.weight).all():
        raise DataError("nan", "weights of edges are NaN or infinite", "Remove those edges, or give them a weight.")
    listed = np.flatnonzero(pairs[0] != pairs[1])
    once = len(np.unique(pairs[0, listed] * n + pairs[1, listed]))
    code = np.concatenate([pairs[0, listed] * n + pairs[1, listed], pairs[1, listed] * n + pairs[0, listed]])
    unique, first = np.unique(code, return_index=True)
    at = np.concatenate([listed, listed])[first]
    kind = np.zeros(len(at), np.int16) if raw.kind is None else raw.kind[at].astype(np.int16)
    weight = None if raw.weight is None else raw.weight[at].astype(np.float32)[:, None]
    ends = np.stack([unique // n, unique % n]).astype(np.int32)
    counts = {"self-loops": pairs.shape[1] - len(listed), "repeated edges": len(listed) - once,
              "isolated nodes": n - len(np.unique(ends[0]))}
    return ends, kind, weight, counts


def heaviest(pairs: np.ndarray, weight: np.ndarray, nodes: int, threshold: float | None, density: float | None) -> np.ndarray:
    """(E,) bool, symmetric: the edges of at least `threshold`, or the `density` share of all pairs, by weight without sign.

    Where several weigh as much as the last that fits, those of the lowest numbers stay.
    """
    size = np.abs(weight[:, 0])
    if threshold is not None:
        kept: np.ndarray = size >= threshold
        return kept
    if density is None:
        return np.ones(len(size), bool)
    low, high = pairs.min(0).astype(np.int64), pairs.max(0)
    code, at = np.unique(low * nodes + high, return_inverse=True)
    of_pair = np.zeros(len(code))
    np.maximum.at(of_pair, at, size)
    chosen = np.zeros(len(code), bool)
    chosen[np.argsort(-of_pair, kind="stable")[:round(density * nodes * (nodes - 1) / 2)]] = True
    return chosen[at]
