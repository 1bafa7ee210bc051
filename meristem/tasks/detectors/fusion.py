"""One box for each object that several windows show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from meristem.tasks.detectors.base import Boxed

Fusion = Literal["nms", "cluster"]
EDGE = 2.0  # steps from the border of a window within which a box may have been cut by it
MOSTLY = 0.7  # of a cut box: the other one that covers so much of it is of the same object
RIM = 0.1  # weight of a box whose middle lies on the border of its window
BLOCK = 256  # boxes whose overlaps with all worse ones are in memory at once


def together(found: Sequence[Boxed], starts: Sequence[Sequence[int]], size: Sequence[int], shape: Sequence[int], iou: float,
             most: int, how: Fusion = "nms") -> Boxed:
    """What windows of `size`, that start there on a lattice of that shape, found in it: the best `most` objects, each once.

    A box that its window's inner border cuts gives way to one of another window that covers most of it. Of what is left, boxes
    of one class with an IoU over `iou` become one:
      nms      the best stays;
      cluster  its corners are the means, weighted by score × how central each box is in its window; its score is the mean
               weighted by how central, for which windows that show the whole of the best but found nothing there count as 0
               (Baumgartner et al. 2021, nnDetection, weighted box clustering). The mask is that of the best.
    """
    box, label = torch.cat([x.box for x in found]), torch.cat([x.label for x in found])
    score = torch.cat([x.score for x in found if x.score is not None])
    masks = torch.cat([x.masks for x in found if x.masks is not None]) if found[0].masks is not None else None
    if len(found) == 1:
        keep = score.argsort(descending=True)
    else:
        number = torch.cat([torch.full_like(x.label, i) for i, x in enumerate(found)])
        low = torch.tensor(starts, device=box.device)
        window = torch.cat([low, low + torch.tensor(tuple(size), device=box.device)], 1)
        low, high = window[number].chunk(2, 1)
        inner = torch.cat([low > 0, high < torch.tensor(tuple(shape), device=box.device)], 1)
        cut = (inner & ((box - window[number]).abs() <= EDGE)).any(1)
        a, b = cut.nonzero()[:, 0], (~cut).nonzero()[:, 0]
        other = (label[a, None] == label[b]) & (number[a, None] != number[b])
        gone = (other & (covered(box[a], box[b]) > MOSTLY)).any(1)
        left = torch.cat([a[~gone], b]).sort().values
        if how == "nms":
            keep = left[suppress(box[left], score[left], label[left], iou)]
        else:
            best, box_, score_ = cluster(box[left], score[left], label[left], number[left], window, iou)
            keep = left[best]
            box, score = box.index_copy(0, keep, box_), score.index_copy(0, keep, score_)
    keep = keep[:most]
    return Boxed(box[keep], label[keep], score[keep], None if masks is None else masks[keep])


def cluster(box: Tensor, score: Tensor, label: Tensor, number: Tensor, window: Tensor, threshold: float
            ) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted clusters of boxes (K, 2·D) of the windows `number` (K,): the best of each, its box and score, best first.

    window: (W, 2·D) where windows lie.
    """
    window = window.to(box)
    middle = box.unflatten(1, (2, -1)).mean(1)
    weight = central(middle, window[number]).clamp_min(RIM)
    best, group = groups(box, score, label, threshold)
    shares, nothing = score * weight, box.new_zeros(len(best))
    total = nothing.index_add(0, group, shares)
    fused = nothing[:, None].expand(-1, box.shape[1]).index_add(0, group, box * shares[:, None]) / total[:, None]
    showing = box.new_zeros(len(best), len(window)).index_put((group, number), box.new_ones(()))
    missing = (covered(box[best], window) > 1 - 1e-6) & (showing == 0)
    each, there = missing.nonzero(as_tuple=True)
    missed = nothing.index_add(0, each, central(middle[best[each]], window[there]))
    fair = total / (nothing.index_add(0, group, weight) + missed)
    order = fair.argsort(descending=True, stable=True)
    return best[order], fused[order], fair[order]


def suppress(box: Tensor, score: Tensor, label: Tensor, threshold: float, most: int | None = None) -> Tensor:
    """Numbers of the boxes (K, 2·D) that no better one of their class overlaps by more than `threshold`, best first; the best
    `most`, or all.
    """
    if box.shape[1] == 4:
        from torchvision.ops import batched_nms

        return batched_nms(box, score, label, threshold)[:most]
    return groups(box, score, label, threshold, most)[0]


def groups(box: Tensor, score: Tensor, label: Tensor, threshold: float, most: int | None = None) -> tuple[Tensor, Tensor]:
    """Boxes (K, 2·D) go to the best one left of their class that they overlap by more than `threshold`: numbers of the best,
    best first, and of each box's group (K,). With `most`, no more groups, and −1 for boxes of none.
    """
    best, group = list[int](), np.full(len(box), -1)
    left = score.argsort(descending=True, stable=True)
    while len(left) and (most is None or len(best) < most):
        some = left[:BLOCK]
        near = ((overlap(box[some], box[left]) > threshold) & (label[some, None] == label[left])).cpu().numpy()
        order = left.cpu().numpy()
        for number, own in zip(order, near, strict=False):
            if group[number] < 0 and len(best) != most:
                group[order[own & (group[order] < 0)]] = len(best)
                group[number] = len(best)  # of a box without size, too, which overlaps nothing
                best.append(int(number))
        left = left[torch.from_numpy(group[order] < 0).to(left.device)]
    return torch.tensor(best, dtype=torch.int64, device=box.device), torch.from_numpy(group).to(box.device)


def central(point: Tensor, window: Tensor) -> Tensor:
    """(K,) how central points (K, D) are in windows (K, 2·D): 1 in the inner half, `RIM` at the border, 0 outside."""
    low, high = window.unflatten(1, (2, -1)).unbind(1)
    away = ((point - (low + high) / 2).abs() / ((high - low) / 2)).amax(1)
    return torch.where(away > 1, 0.0, (2 * (1 - away)).clamp(RIM, 1))


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """(M, N) intersection over union of boxes (M, 2·D) and (N, 2·D)."""
    common, size = _common(a, b), _size(b)
    return common / (_size(a)[:, None] + size - common)


def covered(a: Tensor, b: Tensor) -> Tensor:
    """(M, N) share of each box a (M, 2·D) that each box b (N, 2·D) covers."""
    return _common(a, b) / _size(a).clamp_min(1e-9)[:, None]


def _common(a: Tensor, b: Tensor) -> Tensor:
    dims = a.shape[1] // 2
    low, high = torch.maximum(a[:, None, :dims], b[None, :, :dims]), torch.minimum(a[:, None, dims:], b[None, :, dims:])
    return (high - low).clamp_min(0).prod(-1)


def _size(box: Tensor) -> Tensor:
    low, high = box.chunk(2, 1)
    return (high - low).prod(1)
