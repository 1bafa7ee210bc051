"""Heads that find upright boxes among the tokens of a point cloud; boxes as in `platform.boxes`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from meristem import pointops
from meristem.modalities.base import Settings
from meristem.modalities.stream import TokenStream
from meristem.platform.boxes import footprint, inside
from meristem.platform.objectives import Encoded, Loss

Count = Annotated[int, Field(ge=1)]
WAVES = tuple(16.0 * 0.5**i for i in range(7))  # lengths, in a view's unit


@dataclass(frozen=True)
class Truth:
    """The boxes (K, 7) of one view, in its frame, and their classes (K,) int64.

    ignore: (K,) bool, those that are neither learned nor wrong to find; None: none.
    """

    box: Tensor
    label: Tensor
    ignore: Tensor | None = None

    @property
    def sought(self) -> Tensor:
        """(K,) bool."""
        return torch.ones_like(self.label, dtype=torch.bool) if self.ignore is None else ~self.ignore


@dataclass(frozen=True)
class Found:
    """Boxes (K, 7), classes (K,) and scores (K,) in [0, 1] of one view, best first."""

    box: Tensor
    label: Tensor
    score: Tensor


class BoxHead(nn.Module):
    """From a pass over a view's tokens to boxes."""

    def forward(self, encoded: Encoded, stream: TokenStream) -> dict[str, Tensor]:
        """What `losses` and `decode` read."""
        raise NotImplementedError

    def losses(self, made: dict[str, Tensor], truth: Sequence[Truth]) -> dict[str, Loss]:
        """Named losses; truth: one entry per view of the batch."""
        raise NotImplementedError

    def decode(self, made: dict[str, Tensor]) -> list[Found]:
        raise NotImplementedError


def _coded(box: Tensor, origin: Tensor) -> Tensor:
    """(…, 7) to the eight numbers that are regressed: offset from `origin` (…, 3), log sides, sine, cosine of the heading."""
    offset = box[..., :3] - origin
    box = box.expand(*offset.shape[:-1], 7)
    return torch.cat([offset, box[..., 3:6].clamp_min(1e-3).log(), box[..., 6:].sin(), box[..., 6:].cos()], -1)


def _decoded(code: Tensor, origin: Tensor) -> Tensor:
    sides = code[..., 3:6].clamp(-7, 7).exp()
    return torch.cat([code[..., :3] + origin, sides, torch.atan2(code[..., 6:7], code[..., 7:8])], -1)


class BoxHeadSettings(Settings):
    """The typed entry of a head in a recipe."""

    def build(self, width: int, classes: int) -> BoxHead:
        """width: of the encoder's tokens."""
        raise NotImplementedError


class Waves(nn.Module):
    """Places (…, 3) as sines and cosines of `WAVES` (…, 42): without them attention hardly tells near from far."""

    def forward(self, place: Tensor) -> Tensor:
        phase = (place[..., None] * (2 * math.pi / torch.tensor(WAVES, device=place.device))).flatten(-2)
        return torch.cat([phase.sin(), phase.cos()], -1)


class Queries(BoxHeadSettings):
    """For rooms: queries that ask all tokens (Misra et al. 2021, 3DETR, section 3).

    queries: how many, tokens spread by farthest-point sampling (Liu et al. 2021, Group-Free 3D: they know what is about them
    from the start). depth, heads: of the decoder, in the encoder's width. background: weight of the class of no object.
    classes, boxes: weights in the matching and in the loss.
    """

    queries: Count = 64
    depth: Count = 3
    heads: Count = 4
    background: float = 0.1
    classes: float = 1.0
    boxes: float = 2.0

    def build(self, width: int, classes: int) -> QueryBoxes:
        return QueryBoxes(self, width, classes)


class QueryBoxes(BoxHead):
    """Each query gives a class, or none, and a box about its place; queries and true boxes are paired by least cost."""

    def __init__(self, settings: Queries, width: int, classes: int) -> None:
        super().__init__()
        self.settings, self.classes = settings, classes
        self.place = nn.Sequential(Waves(), nn.Linear(6 * len(WAVES), width), nn.ReLU(), nn.Linear(width, width))
        layer = nn.TransformerDecoderLayer(width, settings.heads, 2 * width, 0.0, batch_first=True, norm_first=True)
        self.decoder = nn.TransformerDecoder(layer, settings.depth, nn.LayerNorm(width))
        self.out = nn.Linear(width, classes + 1 + 8)

    def forward(self, encoded: Encoded, stream: TokenStream) -> dict[str, Tensor]:
        assert stream.position is not None
        chosen, real = pointops.farthest_point_sampling(stream.position, encoded.valid, self.settings.queries)
        origin = pointops.gather_points(stream.position, chosen)
        memory = encoded.tokens + self.place(stream.position)
        x = self.decoder(pointops.gather_points(memory, chosen), memory, tgt_key_padding_mask=~real,
                         memory_key_padding_mask=~encoded.valid)
        logits, code = self.out(x).float().split([self.classes + 1, 8], -1)
        return {"logits": logits, "code": code, "origin": origin, "real": real}

    def losses(self, made: dict[str, Tensor], truth: Sequence[Truth]) -> dict[str, Loss]:
        label, total, boxes = torch.full_like(made["real"], self.classes, dtype=torch.int64), made["code"].new_zeros(()), 0
        counted = made["real"].clone()
        for b, true in enumerate(truth):
            live = made["real"][b].nonzero().squeeze(1)
            code = _coded(true.box[:, None], made["origin"][b, live][None])  # (K, Q, 8): as seen from every query
            error = F.l1_loss(made["code"][b, live].expand_as(code), code, reduction="none").mean(-1)
            chance = made["logits"][b, live].softmax(-1)[:, true.label].T
            cost = self.settings.boxes * error - self.settings.classes * chance
            k, q = linear_sum_assignment(cost.detach().cpu().numpy())
            k, q = (torch.as_tensor(x, device=live.device) for x in (k, q))
            sought = true.sought[k]
            counted[b, live[q[~sought]]] = False
            k, q = k[sought], q[sought]
            label[b, live[q]] = true.label[k]
            total, boxes = total + error[k, q].sum(), boxes + len(k)
        weight = torch.ones(self.classes + 1, device=label.device)
        weight[-1] = self.settings.background
        each = F.cross_entropy(made["logits"].transpose(1, 2), label, weight, reduction="none") * counted
        return {"class": Loss(each.sum(), (weight[label] * counted).sum(), self.settings.classes),
                "box": Loss(total, max(float(boxes), 1.0), self.settings.boxes)}

    def decode(self, made: dict[str, Tensor]) -> list[Found]:
        box, found = _decoded(made["code"], made["origin"]), []
        for b, p in enumerate(made["logits"].softmax(-1)):
            score, label = p[:, :-1].max(-1)
            order = score.masked_fill(~made["real"][b], -1).argsort(descending=True)[:int(made["real"][b].sum())]
            found.append(Found(box[b, order], label[order], score[order]))
        return found


class Centres(BoxHeadSettings):
    """For LiDAR: peaks of a heat map on the ground (Yin et al. 2021, CenterPoint, section 4).

    low, high: corner to corner of the ground that is searched, x and y of a view. cell: of its grid. width: channels of its
    convolutions, depth: how many. found: most boxes of a view. spread: least radius of a peak in training, in cells.
    boxes: weight of their loss.
    """

    low: tuple[float, float]
    high: tuple[float, float]
    cell: Annotated[float, Field(gt=0)] = 0.8
    width: Count = 64
    depth: Count = 3
    found: Count = 100
    spread: Annotated[float, Field(gt=0)] = 1.0
    boxes: float = 0.25

    @model_validator(mode="after")
    def _has_ground(self) -> Centres:
        if any(high <= low for low, high in zip(self.low, self.high, strict=True)):
            raise ValueError(f"there is no ground between low {list(self.low)} and high {list(self.high)}")
        return self

    def build(self, width: int, classes: int) -> CentreBoxes:
        return CentreBoxes(self, width, classes)


class CentreBoxes(BoxHead):
    """Points are gathered by their place on a grid of the ground, the maximum of a cell (Lang et al. 2019, PointPillars), where
    convolutions draw a heat map of each class and a box about each cell's middle.

    A point brings the token that holds it, its height, its offsets from the middle of its cell and from its token.
    """

    def __init__(self, settings: Centres, width: int, classes: int) -> None:
        super().__init__()
        self.settings, self.classes = settings, classes
        self.size = tuple(math.ceil((h - a) / settings.cell) for a, h in zip(settings.low, settings.high, strict=True))
        self.token, self.point = nn.Linear(width, settings.width), nn.Linear(6, settings.width)
        layers: list[nn.Module] = []
        for _ in range(settings.depth):
            layers += [nn.Conv2d(settings.width, settings.width, 3, padding=1, bias=False),
                       nn.GroupNorm(min(8, settings.width), settings.width), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.heat, self.code = nn.Conv2d(settings.width, classes, 1), nn.Conv2d(settings.width, 8, 1)
        assert self.heat.bias is not None
        nn.init.constant_(self.heat.bias, math.log(0.1 / 0.9))  # a peak is rare (Lin et al. 2017, section 4.1)

    def _cells(self, place: Tensor) -> tuple[Tensor, Tensor]:
        """Cell (…, 2) of each place (…, 2 or more), and whether it lies on the grid."""
        low = torch.tensor(self.settings.low, device=place.device)
        at = ((place[..., :2] - low) / self.settings.cell).floor().long()
        size = torch.tensor(self.size, device=place.device)
        return at, ((at >= 0) & (at < size)).all(-1)

    def _middles(self, like: Tensor) -> Tensor:
        """(X, Y, 3) of the cells, at height 0."""
        x, y = (torch.arange(n, device=like.device) for n in self.size)
        grid = torch.stack([*torch.meshgrid(x, y, indexing="ij"), torch.zeros(self.size, device=like.device)], -1)
        low = torch.tensor([*self.settings.low, 0.0], device=like.device)
        step = torch.tensor([self.settings.cell, self.settings.cell, 0.0], device=like.device)
        return low + (grid + 0.5) * step

    def forward(self, encoded: Encoded, stream: TokenStream) -> dict[str, Tensor]:
        assert stream.position is not None and stream.weight is not None
        b, (nx, ny), there = len(encoded.tokens), self.size, stream.weight > 0
        offset = stream.content.unflatten(-1, (-1, there.shape[-1]))[:, :, :3].transpose(2, 3)  # (B, T, k, 3) from their token
        place = stream.position[:, :, None] + offset
        at, on = self._cells(place)
        row, token, _ = chosen = (on & there & encoded.valid[..., None]).nonzero(as_tuple=True)
        at, place = at[chosen], place[chosen]
        inner = (place[:, :2] - self._middles(place)[at[:, 0], at[:, 1], :2]) / self.settings.cell
        seen = torch.cat([inner, place[:, 2:], offset[chosen]], -1).to(encoded.tokens.dtype)
        x = (self.token(encoded.tokens)[row, token] + self.point(seen)).relu()
        flat = (row * nx + at[:, 0]) * ny + at[:, 1]
        grid = x.new_zeros(b * nx * ny, x.shape[-1]).scatter_reduce(0, flat[:, None].expand_as(x), x, "amax")
        y = self.body(grid.unflatten(0, (b, nx, ny)).permute(0, 3, 1, 2))
        return {"heat": self.heat(y).float(), "code": self.code(y).float().permute(0, 2, 3, 1)}

    def losses(self, made: dict[str, Tensor], truth: Sequence[Truth]) -> dict[str, Loss]:
        target = torch.zeros_like(made["heat"])
        counted = torch.ones_like(target)
        middles, error, boxes = self._middles(target), target.new_zeros(()), 0
        for b, true in enumerate(truth):
            at, on = self._cells(true.box)
            for (i, j), label, box in zip(at[on & true.sought].tolist(), true.label[on & true.sought].tolist(),
                                          true.box[on & true.sought], strict=True):
                span = footprint(box).amax(0) - footprint(box).amin(0)
                radius = max(float(span.min()) / self.settings.cell / 2, self.settings.spread)
                distance = (middles[..., :2] - middles[i, j, :2]).square().sum(-1) / self.settings.cell**2
                target[b, label] = torch.maximum(target[b, label], (-distance / (2 * (radius / 3) ** 2)).exp())
                error = error + F.l1_loss(made["code"][b, i, j], _coded(box, middles[i, j]), reduction="sum")
                boxes += 1
            for label, box in zip(true.label[~true.sought].tolist(), true.box[~true.sought], strict=True):
                level = (middles + box[2] * middles.new_tensor([0.0, 0.0, 1.0])).flatten(0, 1)
                counted[b, label].masked_fill_(inside(level[None], box[None, None])[0].view_as(counted[b, label]), 0.0)
        p = made["heat"].sigmoid().clamp(1e-4, 1 - 1e-4)
        peak = target == 1
        focal = torch.where(peak, (1 - p) ** 2 * p.log(), (1 - target) ** 4 * p**2 * (1 - p).log())  # Law and Deng 2018, eq. 1
        return {"heat": Loss(-(focal * torch.where(peak, 1.0, counted)).sum(), max(float(peak.sum()), 1.0)),
                "box": Loss(error, max(float(boxes), 1.0), self.settings.boxes)}

    def decode(self, made: dict[str, Tensor]) -> list[Found]:
        p = made["heat"].sigmoid()
        p = p * (F.max_pool2d(p, 3, 1, 1) == p)
        box, found = _decoded(made["code"], self._middles(p)).flatten(1, 2), []
        for b, heat in enumerate(p.flatten(2)):
            score, at = heat.flatten().topk(min(self.settings.found, heat.numel()))
            found.append(Found(box[b, at % heat.shape[1]], at // heat.shape[1], score))
        return found


HEADS: dict[str, type[BoxHeadSettings]] = {"centres": Centres, "queries": Queries}
