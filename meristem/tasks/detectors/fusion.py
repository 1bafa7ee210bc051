"""One box for each object that several windows show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from meristem.tasks.detectors.base import Boxed

Fusion = Literal["nms", "cluster"]
RIM = 0.1  # weight of a box whose middle lies on the border of its window


def fuse(found: Sequence[Boxed], window: Tensor, threshold: float, how: Fusion, most: int) -> Boxed:
    """What windows found, each object once, the best `most`. found: per window, on one lattice. window: (W, 2·D) where they lie.

    nms: of boxes of one class whose IoU exceeds `threshold` the best stays. cluster: they become one, best first, its corners
    the means weighted by score × how central each box is in its window, its score the mean weighted by how central, in which
    windows that show the middle of the best but found nothing there count as 0 (Baumgartner et al. 2021, nnDetection, weighted
    box clustering). Masks are those of the best.
    """
    box, label = torch.cat([x.box for x in found]), torch.cat([x.label for x in found])
    score = torch.cat([x.score for x in found if x.score is not None])
    masks = torch.cat([x.masks for x in found if x.masks is not None]) if found[0].masks is not None else None
    if how == "nms" or len(found) == 1:
        keep = suppress(box, score, label, threshold) if len(found) > 1 else score.argsort(descending=True, stable=True)
        keep = keep[:most]
        return Boxed(box[keep], label[keep], score[keep], None if masks is None else masks[keep])
    numbers = torch.arange(len(found), device=box.device)
    of = numbers.repeat_interleave(torch.tensor([len(x) for x in found], device=box.device))
    window = window.to(box)
    middle = box.unflatten(1, (2, -1)).mean(1)
    weight = central(middle, window[of]).clamp_min(RIM)
    left, best, boxes, scores = score.argsort(descending=True, stable=True), [], [], []
    while len(left):
        first = left[0]
        own = (label[left] == label[first]) & (iou(box[first, None], box[left])[0] > threshold)
        own[0] = True
        some, left = left[own], left[~own]
        shares = score[some] * weight[some]
        boxes.append((box[some] * shares[:, None]).sum(0) / shares.sum())
        seen = central(middle[first].expand(len(window), -1), window)
        silent = seen[torch.isin(numbers, of[some], invert=True)].sum()
        scores.append(shares.sum() / (weight[some].sum() + silent))
        best.append(first)
    if not best:
        return Boxed(box, label, score, masks)
    fused, keep = torch.stack(scores), torch.stack(best)
    order = fused.argsort(descending=True, stable=True)[:most]
    return Boxed(torch.stack(boxes)[order], label[keep][order], fused[order], None if masks is None else masks[keep][order])


def suppress(box: Tensor, score: Tensor, label: Tensor, threshold: float) -> Tensor:
    """Numbers of the boxes (K, 2·D) that no better one of their class overlaps by more than `threshold`, best first."""
    if box.shape[1] == 4:
        from torchvision.ops import batched_nms

        return batched_nms(box, score, label, threshold)
    from monai.data.box_utils import batched_nms as batched_nms_3d

    return batched_nms_3d(box, score, label, threshold)


def central(point: Tensor, window: Tensor) -> Tensor:
    """(K,) how central points (K, D) lie in windows (K, 2·D): 1 in the inner half, falling to `RIM` at the border, 0 outside."""
    low, high = window.unflatten(1, (2, -1)).unbind(1)
    away = ((point - (low + high) / 2).abs() / ((high - low) / 2)).amax(1)
    return torch.where(away > 1, 0.0, (2 * (1 - away)).clamp(RIM, 1))


def iou(a: Tensor, b: Tensor) -> Tensor:
    """(K, L) intersection over union of boxes (K, 2·D) and (L, 2·D)."""
    dims = a.shape[1] // 2
    sides = a[:, None, dims:].minimum(b[:, dims:]) - a[:, None, :dims].maximum(b[:, :dims])
    common = sides.clamp_min(0).prod(2)
    size = [(x[:, dims:] - x[:, :dims]).prod(1) for x in (a, b)]
    return common / (size[0][:, None] + size[1] - common)
