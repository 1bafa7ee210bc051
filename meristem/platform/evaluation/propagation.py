"""Labels of a sequence's first frame carried through it by feature similarity: no head, no training.

What matters beside the features (McKee et al. 2022, Transfer of Representations to Video Label Propagation): their layer and
stride, the temperature, k, the neighbourhood, the context, and how labels change resolution. All are arguments here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 8  # side, in tokens, of the squares of queries that are worked at once: bounds memory whatever the frame's size


@torch.no_grad()
def propagate(features: Iterable[Tensor], first: Tensor, *, context: int, radius: int | None, top_k: int, temperature: float
              ) -> Tensor:
    """Soft labels of every frame (T, C, h, w), the first as given.

    features: T maps (D, h, w), e.g. one tensor (T, D, h, w); taken one after another, `context` + 1 of them are held.
    first: (C, h, w) soft labels of the first frame.

    Each token q of frame t looks at the tokens p of the first frame and of the `context` frames before t (each frame once)
    that lie at most `radius` rows and columns away (None: anywhere). Of these the `top_k` most similar, and whatever ties with
    the last of them, give it their labels (Jabri et al. 2020; Caron et al. 2021):
        y_q = Σ_p a_p y_p,  a = softmax(cos(f_q, f_p) / temperature).
    Soft labels are carried, not decisions. Raises ValueError when features and labels are not on one grid.
    """
    labels = [first]
    start: Tensor | None = None
    recent: deque[tuple[Tensor, Tensor]] = deque(maxlen=context)
    for frame in features:
        if frame.shape[1:] != first.shape[1:]:
            raise ValueError(f"features {tuple(frame.shape)} and labels {tuple(first.shape)} are not on one grid")
        frame = F.normalize(frame.float(), dim=0)
        if start is None:
            start = frame
            continue
        keys = torch.stack([start, *(f for f, _ in recent)])
        known = torch.stack([first, *(y for _, y in recent)]).to(frame)
        labels.append(_carry(frame, keys, known, radius, top_k, temperature).to(first))
        recent.append((frame, labels[-1]))
    if start is None:
        raise ValueError("there is no frame")
    return torch.stack(labels)


def _carry(query: Tensor, keys: Tensor, labels: Tensor, radius: int | None, top_k: int, temperature: float) -> Tensor:
    """Labels (C, h, w) of unit features query (D, h, w) from those of keys (m, D, h, w) with labels (m, C, h, w)."""
    h, w = query.shape[1:]
    reach = max(h, w) if radius is None else radius
    row, column = torch.arange(h, device=query.device), torch.arange(w, device=query.device)
    found = query.new_empty(labels.shape[1], h, w)
    for y in range(0, h, TILE):
        for x in range(0, w, TILE):
            mine = slice(y, y + TILE), slice(x, x + TILE)
            near = slice(max(y - reach, 0), y + TILE + reach), slice(max(x - reach, 0), x + TILE + reach)
            q, k, v = query[:, *mine], keys[..., *near], labels[..., *near]
            similarity = torch.einsum("dyx,mdvu->yxmvu", q, k) / temperature
            far = (row[mine[0], None] - row[near[0]]).abs().gt(reach)[:, None, None, :, None]
            far = far | (column[mine[1], None] - column[near[1]]).abs().gt(reach)[None, :, None, None, :]
            logits = similarity.masked_fill_(far, float("-inf")).flatten(2)
            least = logits.topk(min(top_k, logits.shape[2])).values[..., -1:]
            weight = logits.masked_fill_(logits < least, float("-inf")).softmax(2)
            found[:, *mine] = torch.einsum("yxn,cn->cyx", weight, v.transpose(0, 1).flatten(1))
    return found


def label_maps(mask: Tensor, values: Sequence[int], grid: tuple[int, int]) -> Tensor:
    """mask (H, W) integers to soft labels (C, h, w): the share of each value among the elements of a token."""
    planes = torch.stack([mask == value for value in values]).float()
    shares: Tensor = F.interpolate(planes[None], grid, mode="area")[0]
    return shares


def decide(labels: Tensor, size: tuple[int, int], normalise: bool) -> Tensor:
    """Soft labels (C, h, w) to the winning channel (H, W) int64 of each element of a frame, upsampled linearly.

    normalise: each channel is first spread over [0, 1] (Caron et al. 2021): a small object, whose soft labels are diluted by
    averaging, is not lost to the background.
    """
    fine: Tensor = F.interpolate(labels[None].float(), size, mode="bilinear", align_corners=False)[0]
    if normalise:
        low, high = fine.amin((1, 2), keepdim=True), fine.amax((1, 2), keepdim=True)
        fine = torch.where(high > low, (fine - low) / (high - low).clamp_min(torch.finfo(fine.dtype).tiny), fine)
    return fine.max(0).indices


def keypoint_maps(points: Tensor, grid: tuple[int, int], sigma: float) -> Tensor:
    """Soft labels (K, h, w) of points (K, 2), (row, column) in tokens: exp(−d² / 2σ²) at each token's centre.

    A point that is not there is NaN and has a map of zeros. sigma: in tokens.
    """
    y, x = (torch.arange(n, device=points.device, dtype=points.dtype) for n in grid)
    square = (y[None, :, None] - points[:, 0, None, None]) ** 2 + (x[None, None] - points[:, 1, None, None]) ** 2
    return torch.exp(-square / (2 * sigma**2)).nan_to_num(0.0)


def keypoints(labels: Tensor, top_k: int) -> Tensor:
    """Soft labels (…, K, h, w) to points (…, K, 2), (row, column) in tokens: the mean of the `top_k` strongest places weighted
    by their labels (Jabri et al. 2020). NaN where a map is zero everywhere.
    """
    weight, place = labels.flatten(-2).topk(min(top_k, labels.shape[-1] * labels.shape[-2]))
    points = torch.stack([place // labels.shape[-1], place % labels.shape[-1]], -1).to(labels)
    total = weight.sum(-1, keepdim=True)
    return torch.where(total > 0, (weight[..., None] * points).sum(-2) / total, torch.nan)
