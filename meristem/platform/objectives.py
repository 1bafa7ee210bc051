"""What passes between encoders, engines and losses: plans, encodings, units, pairs and losses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meristem.modalities.base import Settings
from meristem.modalities.frame import Frame
from meristem.modalities.rng import Rng
from meristem.modalities.stream import TokenStream

if TYPE_CHECKING:
    from meristem.platform.assembly import Assembly
    from meristem.platform.step import Step


@dataclass(frozen=True)
class Plan:
    """What a masking decided about one stream.

    keep: (B, k) indices of the tokens that enter the encoder, ascending; None when hidden tokens are replaced instead.
    hidden: (B, N) bool, the tokens whose content the encoder does not get. predict: (B, N) weight of each token in the loss.
    decode: (B, m) indices of the places that a decoder predicts, ascending, visible ones among them; None: every hidden one.
    swap: (B, N) number of the token whose content a hidden one shows to the encoder, −1 where it shows a mask token.
    remask: (K, B, N) bool, the tokens whose encoding a decoder is not given, in each of its K passes; None: the hidden ones.
    edges: (E,) bool, the edges of the stream that are hidden.
    fill: (B, N, P) content that hidden tokens show in place of their own, so that an encoder has nothing left to hide.
    unlocated: (B, N) bool, the tokens whose place the encoder is not told.
    order: (B, N) int64, the rank of each token among those of its row: nobody is given a later one.
    group: how many rows that follow each other share one sequence in the encoder. attend: share of a sequence's tokens that
    each token attends to, those whose keys suit its query best; None: all.
    rng: more random numbers of each row, for a predictor that draws some.
    """

    hidden: Tensor
    predict: Tensor
    keep: Tensor | None = None
    decode: Tensor | None = None
    swap: Tensor | None = None
    remask: Tensor | None = None
    edges: Tensor | None = None
    fill: Tensor | None = None
    unlocated: Tensor | None = None
    order: Tensor | None = None
    group: int = 1
    attend: float | None = None
    rng: Rng | None = None

    def shown(self, stream: TokenStream) -> TokenStream:
        """The stream without its hidden edges and with what fills hidden tokens; others are hidden by whoever embeds them."""
        if self.fill is not None:
            stream = stream.showing(self.fill.to(stream.content).where(self.hidden[..., None], stream.content))
        if self.edges is None or stream.edges is None:
            return stream
        return replace(stream, edges=stream.edges.where(~self.edges))


@dataclass
class Encoded:
    """Result of one pass.

    tokens: (B, n, D). summary: name -> (B, D): `mean`, and what else it provides of cls, sum, max. valid: (B, n).
    index: (B, n) which stream tokens these are; None: all of the encoder's own lattice. lattice: that lattice's shape. frame:
    where its cells lie in the sample; the step adds it, no encoder knows it.
    pyramid: feature maps (B, D_i, *S_i), fine to coarse, when wanted. dense: (B, D, *S) map at the array's resolution, when
    wanted. layers: tokens after each block, when wanted. attention: (B, H, n, n) of the last block, when wanted.
    slices: (B, T, D) what each slice alone became, where an encoder works slice by slice.
    told: (B, D) what the encoder made of the number it was told, where it is told one.
    """

    tokens: Tensor
    summary: Mapping[str, Tensor]
    valid: Tensor
    index: Tensor | None = None
    lattice: tuple[int, ...] | None = None
    pyramid: list[Tensor] | None = None
    dense: Tensor | None = None
    layers: list[Tensor] | None = None
    attention: Tensor | None = None
    slices: Tensor | None = None
    frame: Frame | None = None
    told: Tensor | None = None

    def at(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, m, D) at source points (B, m, C), linear between cells' centres, and (B, m) whether these lie inside.

        Of a whole lattice of two or three axes: so maps of any stride, and the looks of one sample, can be compared.
        """
        assert self.frame is not None and self.lattice is not None and self.index is None
        index, inside = self.frame.from_source(points)
        size = torch.tensor(self.lattice, device=index.device, dtype=index.dtype)
        grid = ((2 * index + 1) / size - 1).flip(-1)  # cells' edges lie at ±1, and grid_sample counts axes from the last
        maps = self.tokens.transpose(1, 2).unflatten(2, self.lattice).to(grid.dtype)
        grid = grid[(slice(None), slice(None), *[None] * (len(self.lattice) - 1))]
        sampled = F.grid_sample(maps, grid, mode="bilinear", padding_mode="border", align_corners=False)
        return sampled.flatten(2).transpose(1, 2), inside


@dataclass(frozen=True)
class Units:
    """A flat table of vectors with keys; padding is gone, so heads with batch norm and losses need no masks.

    z: (M, D). key: name -> (M,) int64: always `item` (unique over ranks) and `view` (which look of which view); `token`,
    `slot`, `label`, `subject`, … where they mean something; and `cell`, float: the diagonal, in the sample, of a map's cell.
    weight: (M,) of each unit in a loss. point: (M, C) where each lies in its sample, in source coordinates, where known. cube:
    (M, C+1, C+1) the unit cube to the box that each shows of its sample, in source coordinates, of whole looks at lattices.
    """

    z: Tensor
    key: Mapping[str, Tensor]
    weight: Tensor
    point: Tensor | None = None
    cube: Tensor | None = None

    def __len__(self) -> int:
        return self.z.shape[0]

    def with_z(self, z: Tensor) -> Units:
        return replace(self, z=z)

    def select(self, rows: Tensor) -> Units:
        return Units(self.z[rows], {k: v[rows] for k, v in self.key.items()}, self.weight[rows],
                     None if self.point is None else self.point[rows], None if self.cube is None else self.cube[rows])

    @staticmethod
    def cat(tables: Iterable[Units]) -> Units:
        tables = list(tables)
        keys = set(tables[0].key).intersection(*(t.key for t in tables))

        def joined(some: Iterable[Tensor | None]) -> Tensor | None:
            known = [x for x in some if x is not None]
            return torch.cat(known) if len(known) == len(tables) else None

        return Units(torch.cat([t.z for t in tables]), {k: torch.cat([t.key[k] for t in tables]) for k in sorted(keys)},
                     torch.cat([t.weight for t in tables]), joined(t.point for t in tables), joined(t.cube for t in tables))


@dataclass(frozen=True)
class Pairs:
    """Soft relation of query units to key units: pos, neg (Mq, Mk) >= 0, weights of attraction and of repulsion."""

    pos: Tensor
    neg: Tensor


class Loss(NamedTuple):
    """A sum and a count; the count is reduced over ranks before the division. (A tuple, so that DDP finds the tensors.)"""

    total: Tensor
    count: Tensor | float  # type: ignore[assignment]  # nobody counts in a loss
    weight: float = 1.0


def answered(loss: Tensor, wrong: Tensor, count: int, weight: float) -> dict[str, Loss]:
    """Losses of a classification: a sum over `count` answers, and `error`, of weight 0, the share of wrong ones, for the log.

    Where nothing was asked, nothing is lost.
    """
    n = float(max(count, 1))
    return {"": Loss(loss, n, weight), "error": Loss(wrong, n, 0.0)}


class Objective(nn.Module):
    """Reads a Step, returns named losses. The same class serves pretraining and fine-tuning.

    only_cls: whether it reads nothing of an encoded view but its class token.
    """

    only_cls: bool = False

    def forward(self, step: Step) -> dict[str, Loss]:
        raise NotImplementedError

    def after(self, step: Step) -> None:
        """Once per optimiser step, after it: centres, memories. Never the teacher."""


class ObjectiveSettings(Settings):
    """The typed entry of one objective in a recipe."""

    weight: float = 1.0

    def check(self, recipe: Any) -> list[str]:
        """What is impossible about this objective in this recipe; empty when all is well."""
        return []

    def build(self, assembly: Assembly) -> Objective:
        """The objective with its own modules; encoder, heads and tokenizer of the assembly exist already."""
        raise NotImplementedError


@dataclass(frozen=True)
class Items:
    """Who is in the batch: one entry per sample.

    row: (B,) manifest row. cursor: (B,) place in the run's stream of samples, unique over ranks and steps.
    labels: name -> (B, …) tensors (class index; -1 where unlabelled).
    """

    row: Tensor
    cursor: Tensor
    labels: Mapping[str, Tensor] = field(default_factory=dict)
