"""Pieces of a scene, found without labels when it is read."""

from __future__ import annotations

import numpy as np

from meristem.modalities.points.options import Clusters, Supervoxels

MOST = np.iinfo(np.int16).max  # pieces: further ones, the smallest, are −1


def segments(xyz: np.ndarray, how: Clusters | Supervoxels) -> np.ndarray:
    """(N, 3) metres -> (N,) int16: piece of every point, from 0 by falling number of points, −1 for none. Nothing is random."""
    found = _clusters(xyz, how) if isinstance(how, Clusters) else _supervoxels(xyz, how)
    names, place, count = np.unique(found, return_inverse=True, return_counts=True)
    number = np.empty(len(names), np.int64)
    number[np.argsort(np.where(names < 0, 0, -count), kind="stable")] = np.arange(len(names))
    number[(names < 0) | (number >= MOST)] = -1
    return number[place].astype(np.int16)


def ground(xyz: np.ndarray, height: float, column: float) -> np.ndarray:
    """(N,) bool: no higher than `height` over the plane through most of the columns' lowest points; none where no plane fits.

    RANSAC (Fischler and Bolles 1981) on z = ax + by + c, so that the lowest points of high things are outvoted.
    """
    from sklearn.linear_model import RANSACRegressor

    _, place = cells(xyz[:, :2], column)
    order = np.lexsort((xyz[:, 2], place))
    lowest = xyz[order[np.unique(place[order], return_index=True)[1]]]
    if len(lowest) < 3:
        return np.zeros(len(xyz), bool)
    middle = xyz[:, :2].mean(0)
    try:
        plane = RANSACRegressor(residual_threshold=height, min_samples=3, random_state=0)
        plane.fit(lowest[:, :2] - middle, lowest[:, 2])
    except ValueError:  # no three of them span one
        return np.zeros(len(xyz), bool)
    below: np.ndarray = xyz[:, 2] - plane.predict(xyz[:, :2] - middle) <= height
    return below


def cells(x: np.ndarray, edge: float) -> tuple[np.ndarray, np.ndarray]:
    """(N, D) -> means (M, D) of the points in each occupied cell, (N,) cell of each point."""
    _, place, count = np.unique(np.floor((x - x.min(0)) / edge).astype(np.int64), axis=0, return_inverse=True,
                                return_counts=True)
    place = place.reshape(-1)
    sums = np.stack([np.bincount(place, values) for values in x.T], 1)
    return sums / count[:, None], place


def _clusters(xyz: np.ndarray, how: Clusters) -> np.ndarray:
    """HDBSCAN (Campello et al. 2013) on cells of what is left without the ground."""
    from sklearn.cluster import HDBSCAN

    labels = np.full(len(xyz), -1)
    above = ~ground(xyz, how.ground, how.column)
    if not above.any():
        return labels
    centres, place = cells(xyz[above], how.cell)
    if len(centres) >= how.smallest:
        labels[above] = HDBSCAN(min_cluster_size=how.smallest, copy=True).fit_predict(centres)[place]
    return labels


def _supervoxels(xyz: np.ndarray, how: Supervoxels) -> np.ndarray:
    from scipy.spatial import cKDTree

    centres, place = cells(xyz, how.cell)
    if len(centres) <= how.neighbours:
        return np.zeros(len(xyz), int) if len(centres) >= how.smallest else np.full(len(xyz), -1)
    distance, near = cKDTree(centres).query(centres, how.neighbours + 1)
    around = centres[near] - centres[near].mean(1, keepdims=True)
    normal = np.linalg.eigh(np.einsum("nki,nkj->nij", around, around))[1][:, :, 0]
    a, b = np.repeat(np.arange(len(centres)), how.neighbours), near[:, 1:].reshape(-1)
    touching = (distance[:, 1:].reshape(-1) <= 2 * how.cell) & (a != b)
    pairs = np.unique(np.sort(np.stack([a, b], 1)[touching], 1), axis=0)
    weight = 1 - np.abs((normal[pairs[:, 0]] * normal[pairs[:, 1]]).sum(1))
    return cut(len(centres), pairs, weight, how.threshold, how.smallest)[place]


def cut(nodes: int, pairs: np.ndarray, weight: np.ndarray, threshold: float, smallest: int) -> np.ndarray:
    """(nodes,) piece of each node, −1 in a component of fewer than `smallest` (Felzenszwalb and Huttenlocher 2004).

    pairs (E, 2), weight (E,) unlikeness. By rising weight, two pieces join unless the edge is heavier than the heaviest edge
    that made either of them, and threshold / its size; then those under `smallest` join along their lightest edge.
    """
    parent, size, limit = list(range(nodes)), [1] * nodes, [threshold] * nodes

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    order = np.argsort(weight, kind="stable")
    edges = list(zip(*pairs[order].T.tolist(), weight[order].tolist(), strict=True))
    for last in (False, True):
        for i, j, w in edges:
            a, b = root(i), root(j)
            if a == b or (min(size[a], size[b]) >= smallest if last else w > min(limit[a], limit[b])):
                continue
            parent[b] = a
            size[a] += size[b]
            limit[a] = w + threshold / size[a]
    return np.array([r if size[r] >= smallest else -1 for r in map(root, range(nodes))])
