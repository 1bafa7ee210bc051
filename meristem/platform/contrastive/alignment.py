"""Conditional alignment of two encodings of a view (Alice, Jiang et al. 2023)."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from meristem.errors import RecipeError
from meristem.platform.contrastive.transforms import Transform, TransformSettings
from meristem.platform.objectives import Units
from meristem.platform.step import Step


class CrossAttention(nn.Module):
    """A block in which queries (B, n, D) look at a context (B, m, D): attention and perceptron, each added and then normed.

    As the authors' code: no biases in the attention, ReLU, norms of eps 1e-6 behind; without its dropout.
    """

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.enter, self.leave = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=1e-6) for _ in range(2))

    def forward(self, q: Tensor, context: Tensor) -> Tensor:
        def split(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        seen = F.scaled_dot_product_attention(split(self.query(q)), split(self.key(context)), split(self.value(context)))
        x = self.norms[0](q + self.out(seen.transpose(1, 2).flatten(2)))
        y: Tensor = self.norms[1](x + self.leave(self.enter(x).relu()))
        return y


class Aligning(Transform):
    def __init__(self, settings: Align, width: int) -> None:
        super().__init__()
        if width % settings.heads:
            raise RecipeError(f"{width} numbers cannot be shared by {settings.heads} heads", "Change transform.align.heads.")
        self.block = CrossAttention(width, settings.heads, settings.hidden)

    def forward(self, q: Units, k: Units, relation: Any, step: Step) -> tuple[Units, Units]:
        n = int(q.key["token"].max()) + 1  # of every row: nothing was dropped
        ours, theirs = q.z.unflatten(0, (-1, n)), k.z.unflatten(0, (-1, n))
        with torch.no_grad():
            target = self.block(ours, theirs)
        return q.with_z(self.block(ours, ours).flatten(0, 1)), k.with_z(target.flatten(0, 1))


class Align(TransformSettings):
    """What the student's masked tokens find in its own encoding of a view, and in the teacher's of the whole view, by
    cross-attention with the former as queries of both; then the two are compared. Gradient passes through the queries.

    heads, hidden: of the block.
    """

    heads: Annotated[int, Field(ge=1)] = 4
    hidden: Annotated[int, Field(ge=1)] = 512

    def check(self, line: Any) -> list[str]:
        if line.level != "dense" or [x.view for x in line.queries] != [x.view for x in line.keys] or line.sample is not None:
            return ["transform: align compares two encodings of the same tokens; set level: dense, and the views of the keys "
                    "to those of the queries, without sample"]
        return []

    def build(self, width: int) -> Transform:
        return Aligning(self, width)
