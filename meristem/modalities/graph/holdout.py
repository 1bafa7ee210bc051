"""Edges that are held out of a graph for link prediction, and pairs of nodes that have none."""

from __future__ import annotations

import numpy as np

from meristem.errors import DataError
from meristem.modalities.rng import Rng

TRIES = 100  # draws for each pair wanted, before a graph counts as too dense


def hold_out(pairs: np.ndarray, nodes: int, shares: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """(kept (E,) bool, links (4, M) int32): the edges that stay in the graph, and the pairs that a link is predicted for.

    pairs: (2, E), both directions of every edge. shares: of the edges held out to validate and to test. links: two nodes, 0 the
    first; split, 0 train, 1 val, 2 test; 1 an edge, 0 none. Of each split as many without an edge as with one, sampled at
    random (Kipf and Welling 2016). Held pairs without an edge have none in the whole graph; those to train on have none among
    the edges that stay and are no held pairs, so that training says nothing of which of these have one. The same at every call.
    Raises DataError where the graph is too small or too dense.
    """
    low, high = pairs.min(0).astype(np.int64), pairs.max(0)
    code = low * nodes + high
    edges = np.unique(code)
    held = [round(share * len(edges)) for share in shares]
    if min(held) < 1 or sum(held) >= len(edges):
        raise DataError("size", f"of {len(edges)} edges none can be held out to validate or to test, or none is left to train",
                        "Leave the graph out, or hold out a larger share.")
    rng = Rng.of(0, 0, "links")
    order = edges[rng.permutation("edges", len(edges))[0].numpy()]
    val, test, train = np.split(order, np.cumsum(held))
    no_val, no_test = np.split(_others(edges, nodes, sum(held), rng.fork("held")), [held[0]])
    no_train = _others(np.concatenate([edges, no_val, no_test]), nodes, len(train), rng.fork("train"))
    groups = ((train, 0, 1), (no_train, 0, 0), (val, 1, 1), (no_val, 1, 0), (test, 2, 1), (no_test, 2, 0))
    links = np.concatenate([np.stack([c // nodes, c % nodes, np.full(len(c), split), np.full(len(c), edge)])
                            for c, split, edge in groups], 1)
    return np.isin(code, train), links.astype(np.int32)


def _others(known: np.ndarray, nodes: int, count: int, rng: Rng) -> np.ndarray:
    """(count,) codes of distinct pairs that are not among the known ones, ascending only by chance."""
    found = np.empty(0, np.int64)
    for attempt in range(TRIES):
        a, b = rng.integers(f"pairs {attempt}", nodes, 2, 2 * count)[0].numpy()
        code = np.minimum(a, b) * nodes + np.maximum(a, b)
        code = np.concatenate([found, code[(a != b) & ~np.isin(code, known)]])
        found = code[np.sort(np.unique(code, return_index=True)[1])][:count]
        if len(found) == count:
            return found
    raise DataError("size", f"a graph of {nodes} nodes has no {count} more pairs without an edge", "Leave it out.")
