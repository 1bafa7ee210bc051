"""A head that finds segments of time in a sequence of features, without anchors; and soft suppression of repeated ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meristem.platform.objectives import Loss

PRIOR = 0.01  # probability of an action at a point before anything is learned (Lin et al. 2017)
CENTRE = 1.5  # steps of its level from an action's middle within which a point answers for it
REACH = 4  # steps of the finest level that the farther end of an action may be away from one of its points, at that level
FAINT = 1e-3  # score below which nothing was found


@dataclass(frozen=True)
class Segments:
    """Of one sequence: span (K, 2) start and end, in its steps; label (K,) int64 class; score (K,) of what was found."""

    span: Tensor
    label: Tensor
    score: Tensor | None = None


@dataclass(frozen=True)
class Level:
    """One level of the pyramid: T_l points `stride` steps apart.

    scores: (B, T_l, K) logits. reach: (B, T_l, 2) steps back to the start and on to the end. valid: (B, T_l).
    """

    scores: Tensor
    reach: Tensor
    valid: Tensor
    stride: int

    @property
    def place(self) -> Tensor:
        """(T_l,) where the points lie, in steps of the sequence."""
        return torch.arange(self.valid.shape[1], device=self.valid.device, dtype=torch.float32) * self.stride


class TemporalHead(nn.Module):
    """Zhang et al. 2022 (ActionFormer): a transformer pyramid over time; each point scores every class and says how far an
    action's start and end are. Departs: attention over the whole sequence instead of a neighbourhood of each point.
    """

    def __init__(self, inputs: int, width: int, levels: int, classes: int) -> None:
        super().__init__()
        self.project = nn.ModuleList([_Convolution(inputs, width), _Convolution(width, width)])
        self.blocks = nn.ModuleList([_Block(width, 2 if i else 1) for i in range(levels)])
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(levels)])
        self.classify = nn.ModuleList([_Convolution(width, width), _Convolution(width, width)])
        self.regress = nn.ModuleList([_Convolution(width, width), _Convolution(width, width)])
        self.score, self.ends = nn.Linear(width, classes), nn.Linear(width, 2)
        self.scale = nn.Parameter(torch.ones(levels))
        nn.init.constant_(self.score.bias, -math.log((1 - PRIOR) / PRIOR))

    def forward(self, x: Tensor, valid: Tensor) -> list[Level]:
        """x: (B, T, inputs), valid: (B, T); fine to coarse."""
        for layer in self.project:
            x = layer(x, valid)
        levels = []
        for i, (block, norm) in enumerate(zip(self.blocks, self.norms, strict=True)):
            x, valid = block(x, valid)
            a = b = norm(x)
            for layer in self.classify:
                a = layer(a, valid)
            for layer in self.regress:
                b = layer(b, valid)
            reach = F.softplus(self.ends(b).float() * self.scale[i]) * 2**i
            levels.append(Level(self.score(a).float(), reach, valid, 2**i))
        return levels


class _Convolution(nn.Module):
    """Over three neighbours, normalised, rectified; padding stays 0."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv1d(inputs, width, 3, padding=1, bias=False), nn.LayerNorm(width)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        x = self.convolution((x * valid[..., None]).transpose(1, 2)).transpose(1, 2)
        return F.relu(self.norm(x)) * valid[..., None]


class _Block(nn.Module):
    """A depthwise convolution, which tells what is before and after, and may halve the sequence; then a transformer layer."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.convolution = nn.Conv1d(width, width, 3, stride, padding=1, groups=width)
        self.layer = nn.TransformerEncoderLayer(width, max(width // 32, 1), 4 * width, 0.0, "gelu", batch_first=True,
                                                norm_first=True)

    def forward(self, x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        mixed = self.convolution((x * valid[..., None]).transpose(1, 2)).transpose(1, 2)
        valid = F.max_pool1d(valid.float()[:, None], self.stride, ceil_mode=True)[:, 0] > 0
        out = self.layer(mixed + x[:, ::self.stride], src_key_padding_mask=~valid)
        return out * valid[..., None], valid


def targets(place: Tensor, stride: int, span: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Which action (T,) each point answers for, −1 for none, and the steps (T, 2) to its start and end.

    A point within `CENTRE` strides of an action's middle, and inside it, answers for it where the farther of its ends is at
    least `low` and less than `high` steps away; of several the shortest.
    """
    if not len(span):
        return torch.full_like(place, -1, dtype=torch.int64), place.new_zeros(len(place), 2)
    reach = torch.stack([place[:, None] - span[:, 0], span[:, 1] - place[:, None]], -1)
    middle, length = span.mean(1), span[:, 1] - span[:, 0]
    farther = reach.amax(-1)
    fits = (reach.amin(-1) > 0) & ((place[:, None] - middle).abs() <= CENTRE * stride) & (farther >= low) & (farther < high)
    lengths = torch.where(fits, length, torch.inf)
    chosen = lengths.argmin(1)
    return torch.where(fits.any(1), chosen, -1), reach[torch.arange(len(place), device=place.device), chosen]


def losses(levels: Sequence[Level], truth: Sequence[Segments], silent: Sequence[Tensor]) -> dict[str, Loss]:
    """Focal loss of the classes (Lin et al. 2017) and `distance_loss`, both over the points that answer for an action.

    truth: of each sequence. silent: spans (M, 2) of each in which no point need say that there is nothing.
    """
    from torchvision.ops import sigmoid_focal_loss  # torchvision takes seconds to import

    focal = distance = levels[0].scores.sum() * 0
    count = torch.zeros((), device=levels[0].scores.device)
    for i, level in enumerate(levels):
        low = 0.0 if i == 0 else REACH * 2.0**(i - 1)
        high = math.inf if i == len(levels) - 1 else REACH * 2.0**i
        place = level.place
        for scores, reach, valid, true, quiet in zip(level.scores, level.reach, level.valid, truth, silent, strict=True):
            chosen, wanted = targets(place, level.stride, true.span, low, high)
            found = valid & (chosen >= 0)
            hushed = ((place[:, None] > quiet[:, 0]) & (place[:, None] < quiet[:, 1])).any(1) & (chosen < 0)
            target = torch.zeros_like(scores)
            target[found, true.label[chosen[found]]] = 1
            focal = focal + sigmoid_focal_loss(scores, target)[valid & ~hushed].sum()
            distance = distance + distance_loss(reach[found], wanted[found]).sum()
            count = count + found.sum()
    count = count.clamp_min(1)
    return {"class": Loss(focal, count), "span": Loss(distance, count)}


def distance_loss(reach: Tensor, wanted: Tensor) -> Tensor:
    """(n,) 1 − IoU + (distance of the middles / length of what holds both)², of segments around one point (Zheng et al. 2020).

    reach, wanted: (n, 2) how far their starts and ends are from the point.
    """
    common, hull = torch.minimum(reach, wanted).sum(1), torch.maximum(reach, wanted).sum(1).clamp_min(1e-6)
    union = (reach.sum(1) + wanted.sum(1) - common).clamp_min(1e-6)
    middles = ((reach[:, 1] - reach[:, 0]) - (wanted[:, 1] - wanted[:, 0])) / 2
    return 1 - common / union + (middles / hull)**2


def decode(levels: Sequence[Level], most: int) -> list[Segments]:
    """What each sequence holds, best first, at most so many."""
    found = []
    for b in range(len(levels[0].valid)):
        scores = torch.cat([level.scores[b].sigmoid() * level.valid[b, :, None] for level in levels])
        span = torch.cat([torch.stack([level.place - level.reach[b, :, 0], level.place + level.reach[b, :, 1]], 1)
                          for level in levels])
        best, at = scores.flatten().topk(min(most, scores.numel()))
        at, best = at[best > FAINT], best[best > FAINT]
        found.append(Segments(span[at // scores.shape[1]], at % scores.shape[1], best))
    return found


def suppress(span: np.ndarray, label: np.ndarray, score: np.ndarray, sigma: float, most: int
             ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Soft-NMS (Bodla et al. 2017): the best stays, others of its class lose by exp(−IoU² / sigma), and so on.

    span: (K, 2). Returns spans, labels and what is left of the scores, best first, at most so many.
    """
    left, kept, scores = score.astype(float).copy(), [], []
    for _ in range(min(most, len(left))):
        best = int(left.argmax())
        if left[best] <= FAINT:
            break
        kept.append(best)
        scores.append(left[best])
        left[best] = 0
        common = np.minimum(span[:, 1], span[best, 1]) - np.maximum(span[:, 0], span[best, 0])
        union = (span[:, 1] - span[:, 0]) + (span[best, 1] - span[best, 0]) - common.clip(0)
        overlap = common.clip(0) / np.maximum(union, 1e-9)
        left *= np.where(label == label[best], np.exp(-overlap**2 / sigma), 1.0)
    return span[kept], label[kept], np.array(scores)
