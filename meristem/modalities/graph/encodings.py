"""Where a node stands in its graph, told by random walks and by the Laplacian. Both read the edges alone."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from scipy.linalg import eigh
from scipy.sparse import csr_matrix, identity
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import ArpackNoConvergence, eigsh

DENSE = 1000  # nodes up to which a dense solver is faster
BLOCK = 1024  # start nodes whose walks are followed at once


def normalised(pairs: np.ndarray, nodes: int) -> csr_matrix:
    """(N, N) sparse S = D^-½ A D^-½ of undirected edges (2, E); rows of isolated nodes are 0."""
    degree = np.bincount(pairs[0], minlength=nodes)
    scale = 1 / np.sqrt(np.maximum(degree, 1))
    return csr_matrix((scale[pairs[0]] * scale[pairs[1]], (pairs[0], pairs[1])), shape=(nodes, nodes))


def walk(pairs: np.ndarray, nodes: int, steps: int) -> np.ndarray:
    """(steps, N) float32: the probability that a random walk from a node is back there after 1 … `steps` steps.

    The diagonals of P^k, P = D⁻¹A (Dwivedi et al. 2022, equation 7). They are those of S^k, S symmetric, so two half-way
    walks are multiplied: diag S^(i+j) = Σ S^i ∘ S^j. Memory: nodes × 1024 numbers.
    """
    s = normalised(pairs, nodes)
    out = np.zeros((steps, nodes), np.float32)
    for start in range(0, nodes, BLOCK):
        columns = slice(start, min(start + BLOCK, nodes))
        now = np.eye(nodes, columns.stop - start, -start)
        for k in range(1, steps + 1, 2):
            after = s @ now
            out[k - 1, columns] = (now * after).sum(0)
            if k < steps:
                out[k, columns] = (after * after).sum(0)
            now = after
    return out


def laplacian(pairs: np.ndarray, nodes: int, count: int) -> np.ndarray:
    """(2 · count, N) float32: eigenvectors 2 … count + 1 of I − S by ascending eigenvalue, then their eigenvalues at each node.

    Of each connected component by itself: in the whole, an eigenvalue 0 for each would leave room for nothing else, and their
    basis would be arbitrary. Unit length, the entry of largest size positive (Dwivedi et al. 2020, section 3). What a component
    of few nodes lacks is 0.
    """
    s = normalised(pairs, nodes)
    out = np.zeros((2, count, nodes), np.float32)
    parts, member = connected_components(s, directed=False)
    order = np.argsort(member, kind="stable")
    bounds = np.searchsorted(member[order], np.arange(parts + 1))
    for start, stop in pairwise(bounds):
        inside = order[start:stop]
        k = min(count, len(inside) - 1)
        if k:
            value, vector = _smallest(s[inside][:, inside], k + 1)
            vector = vector[:, 1:]
            largest = vector[np.abs(vector).round(6).argmax(0), np.arange(k)]  # rounded: equal sizes, the first of them
            out[0, :k, inside] = vector * np.where(largest < 0, -1, 1)
            out[1, :k, inside] = np.maximum(value[1:], 0)
    return out.reshape(2 * count, nodes)


def _smallest(s: csr_matrix, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The smallest eigenvalues (count,) of I − S, ascending, and their eigenvectors (n, count)."""
    n = s.shape[0]
    if n > max(DENSE, 3 * count):
        start = np.sin(np.arange(1, n + 1))
        try:  # near 0 from below: I − S has no negative eigenvalue, so the shifted matrix is regular
            value, vector = eigsh(identity(n, format="csc") - s.tocsc(), count, sigma=-0.01, which="LM", v0=start)
            order = np.argsort(value, kind="stable")
            return value[order], vector[:, order]
        except ArpackNoConvergence:
            pass  # many equal eigenvalues: all of them, then
    found: tuple[np.ndarray, np.ndarray] = eigh(np.eye(n) - s.toarray(), subset_by_index=(0, count - 1))
    return found
