"""What a graph knows of itself: non-edges, distances in hops, degrees, clustering. Pure functions of `Edges`, without gradient.

Every row of a batch is a graph of its own; what is said of a row never depends on the others. An edge in either direction
links its two nodes; self-loops and edges of several types between the same nodes count once.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from meristem.modalities.rng import Rng
from meristem.modalities.stream import Edges


def linked(edges: Edges) -> Tensor:
    """(2, M) places a < b, row · size + element, of the linked pairs, ordered by row, then by a, then by b."""
    low, high = edges.index.amin(0), edges.index.amax(0)
    code = (low * edges.size + high % edges.size)[low != high].unique()
    a = code // edges.size
    return torch.stack([a, a // edges.size * edges.size + code % edges.size])


def unlinked(edges: Edges, valid: Tensor, count: Tensor, rng: Rng) -> Tensor:
    """(2, M) places of pairs of distinct valid nodes without an edge, uniform with replacement, `count` (rows,) of each row.

    Exact for any density: the r-th pair that is no edge is found by bisection among the sorted edges, nothing is rejected. A
    row in which all nodes are linked has none. Memory: of edges and draws. valid: (rows, size) bool.
    """
    device, rows, size = valid.device, edges.rows, edges.size
    nodes = valid.sum(1)
    rank = (valid.cumsum(1) - 1).flatten()  # of each node among its row's valid ones
    a, b = linked(edges)
    row, most = a // size, size * (size - 1) // 2 + 1
    low, high = torch.minimum(rank[a], rank[b]), torch.maximum(rank[a], rank[b])
    number, order = (row * most + high * (high - 1) // 2 + low).sort()  # pairs low < high of a row, counted by high
    row = row[order]
    links = torch.bincount(row, minlength=rows)
    first = links.cumsum(0) - links
    before = number - torch.arange(len(number), device=device) + first[row]  # row · most + non-edges in front of each edge
    free = nodes * (nodes - 1) // 2 - links
    count = torch.where(free > 0, count, 0)
    of = torch.repeat_interleave(torch.arange(rows, device=device), count)
    place = torch.arange(len(of), device=device) - (count.cumsum(0) - count)[of]
    drawn = (rng.bits("non-edges", max(int(count.max()), 1)) & (2**63 - 1))[of, place] % free[of].clamp_min(1)
    pair = drawn + torch.searchsorted(before, of * most + drawn, right=True) - first[of]
    high = ((1 + (1 + 8 * pair.double()).sqrt()) / 2).long()
    high = high - (high * (high - 1) // 2 > pair).long()  # the root may have been rounded up, or down
    high = high + (high * (high + 1) // 2 <= pair).long()
    low = pair - high * (high - 1) // 2
    node = (~valid).to(torch.uint8).argsort(dim=1, stable=True)  # (rows, size): the valid ones first, in order
    return torch.stack([node[of, low], node[of, high]]) + of * size


def hops(edges: Edges, source: Tensor, limit: int) -> Tensor:
    """(rows, size, S) int64: edges on the shortest path from sources (rows, S), limit + 1 where it is longer or there is none.

    Breadth first, all sources at once: time and memory O((edges + rows · size) · S) a hop.
    """
    a, b = linked(edges)
    begin, end = torch.cat([a, b]), torch.cat([b, a])
    distance = torch.full((edges.rows, edges.size, source.shape[1]), limit + 1, device=source.device)
    distance.scatter_(1, source[:, None], 0)
    distance = distance.flatten(0, 1)
    for hop in range(1, limit + 1):
        front = (distance[begin] == hop - 1).float()
        met = torch.zeros(distance.shape, device=source.device).index_add_(0, end, front) > 0
        distance = torch.where(met & (distance > limit), hop, distance)
    return distance.unflatten(0, (edges.rows, edges.size))


def degree(edges: Edges) -> Tensor:
    """(rows, size) float: linked nodes of each node."""
    count = torch.bincount(linked(edges).flatten(), minlength=edges.rows * edges.size)
    return count.float().unflatten(0, (edges.rows, edges.size))


def clustering(edges: Edges) -> Tensor:
    """(rows, size) float: the share of a node's pairs of neighbours that are linked (Watts and Strogatz 1998); 0 below two."""
    from scipy.sparse import coo_array  # a second that runs without this property need not wait for

    a, b = linked(edges).cpu().numpy()
    n = edges.rows * edges.size
    table = coo_array((np.ones(2 * len(a)), (np.concatenate([a, b]), np.concatenate([b, a]))), (n, n)).tocsr()
    closed = torch.from_numpy((table @ table).multiply(table).sum(1)).to(edges.index.device).float()  # twice the triangles
    d = degree(edges).flatten()
    return (closed / (d * (d - 1)).clamp_min(1)).unflatten(0, (edges.rows, edges.size))
