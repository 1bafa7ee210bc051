"""Which nodes and edges a look at a graph shows, and what is done to their features."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from meristem.modalities.base import Links
from meristem.modalities.rng import Rng

PATIENCE = 16  # steps of all walkers without a new node before they move


def walked(pairs: np.ndarray, nodes: int, size: int, restart: float, rng: Rng, about: int = -1) -> np.ndarray:
    """(size,) ascending: the nodes that random walkers with restart meet first, all from one node: `about`, or a random one.

    About √size walkers step together. Where they find nothing new for a while they move to a random node whose neighbours
    they have not all met, or, when there is none (the component is used up), to another random node. pairs: sorted by source.
    rng: of one sample.
    """
    degree = np.bincount(pairs[0], minlength=nodes)
    first = np.cumsum(degree) - degree
    met = np.zeros(nodes, bool)
    count, idle, step = 0, PATIENCE, 0
    walkers = math.isqrt(size) + 1
    starts = rng.permutation("start", nodes)[0].numpy()
    if about >= 0:
        starts = np.append(about, starts)
    tried = 0
    at = home = starts[:1].repeat(walkers)
    while count < size:
        if idle >= PATIENCE:
            border = pairs[0][met[pairs[0]] & ~met[pairs[1]]]
            if len(border):
                start = border[int(rng.integers(f"border {step}", len(border)))]
            else:
                while met[starts[tried]]:
                    tried += 1
                start = starts[tried]
            at = home = np.full(walkers, start)
            idle = 0
        else:
            chance = rng.uniform(f"step {step}", 2, walkers)[0].numpy()
            moves = (degree[at] > 0) & (chance[1] >= restart)
            turn = np.minimum((chance[0] * degree[at]).astype(np.int64), degree[at] - 1)
            onward = home.copy()
            onward[moves] = pairs[1][(first[at] + turn)[moves]]
            at = onward
            step += 1
        unique, seen = np.unique(at, return_index=True)
        fresh = unique[np.argsort(seen)]
        fresh = fresh[~met[fresh]][:size - count]
        met[fresh] = True
        count += len(fresh)
        idle = 0 if len(fresh) else idle + 1
    return np.flatnonzero(met)


def left(index: np.ndarray, share: float, rng: Rng) -> np.ndarray:
    """`index` without a random `share` of it, at least one, ascending."""
    keep = max(len(index) - round(share * len(index)), 1)
    chosen: np.ndarray = index[np.sort(rng.permutation("left", len(index))[0].numpy()[:keep])]
    return chosen


def induced(links: Links, index: np.ndarray, nodes: int) -> Links:
    """The edges among the nodes `index` (n,), distinct, which get the places 0 … n − 1."""
    place = np.full(nodes, -1, np.int32)
    place[index] = np.arange(len(index), dtype=np.int32)
    moved = place[links.pairs]
    inside = (moved >= 0).all(0)
    return Links(moved[:, inside], links.kind[inside], None if links.value is None else links.value[inside])


def thinned(links: Links, nodes: int, share: float, key: int) -> Links:
    """Without a random `share` of the edges; the fate of an edge is of its nodes and `key`, so both directions go together."""
    low, high = links.pairs.min(0).astype(np.int64), links.pairs.max(0).astype(np.int64)
    stays = (Rng.of(key, torch.from_numpy(low * nodes + high)).uniform("stays") >= share).numpy()
    return Links(links.pairs[:, stays], links.kind[stays], None if links.value is None else links.value[stays])


def blanked(x: Tensor, channels: int, keys: Tensor, drop: float, mask: float) -> Tensor:
    """x (B, C, N) with the first `channels` set to 0: `drop` of the channels for all nodes, `mask` of the nodes.

    A row's draws are of its key (B,) and of the place of a channel or node, so padding and batch mates change nothing.
    """
    rng = Rng(keys)
    gone = rng.uniform("features", channels)[..., None] < drop
    gone = gone | (rng.uniform("nodes", x.shape[2])[:, None] < mask)
    return torch.cat([x[:, :channels].masked_fill(gone, 0.0), x[:, channels:]], 1)
