"""Blocks whose tokens also look at those of another encoded view: self-attention, cross-attention, perceptron."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from meristem.modalities.base import Axis
from meristem.platform.encoders.base import Parted
from meristem.platform.encoders.block import Block, rotated
from meristem.platform.encoders.rotary import Rotary
from meristem.platform.encoders.transformer import start_linear


class CrossAttention(nn.Module):
    """Queries x (B, n, D) attend to a memory (B, m, D). rope, memory_rope: tables of `Rotary` (None: no positions)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.kv, self.proj = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, memory: Tensor, rope: Tensor | None = None, memory_rope: Tensor | None = None,
                mask: Tensor | None = None) -> Tensor:
        """mask: (B, 1, 1 or n, m) bool, False where nothing may look; None: everywhere."""
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(memory).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q = q if rope is None else rotated(q, rope)
        k = k if memory_rope is None else rotated(k, memory_rope)
        seen: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))
        return seen


class CrossBlock(nn.Module):
    """Self-attention, cross-attention to a memory, perceptron, each after a norm."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.own = Block(width, heads, mlp_ratio)
        self.cross = CrossAttention(width, heads)
        self.norm, self.memory_norm = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor, rope: Tensor | None, mask: Tensor | None, memory: Tensor, memory_rope: Tensor | None,
                memory_mask: Tensor | None) -> Tensor:
        x = x + self.own.attn(self.own.norm1(x), rope=rope, attn_mask=mask)
        x = x + self.cross(self.norm(x), self.memory_norm(memory), rope, memory_rope, memory_mask)
        mixed: Tensor = x + self.own.mlp(self.own.norm2(x))
        return mixed


class CrossBlocks(Parted):
    """`depth` blocks whose tokens look at each other and at a memory, which stays as it is; then a norm.

    Source: the decoder of CroCo (Weinzaepfel et al. 2022, section 3.2); every block norms the memory anew, as their code.
    Positions of either view turn the queries and keys of its own tokens (CroCo v2, 2023): of both only what each view's own
    frame says, so that where the two lie in their sample is for the attention to find out.
    """

    def __init__(self, width: int, depth: int, heads: int, axes: Sequence[Axis], mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.rotary = Rotary(width // heads, axes)
        self.blocks = nn.ModuleList(CrossBlock(width, heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        start_linear(self.modules())

    def forward(self, x: Tensor, position: Tensor | None, valid: Tensor | None, memory: Tensor,
                memory_position: Tensor | None, memory_valid: Tensor | None) -> Tensor:
        """x (B, n, D), memory (B, m, D); positions (B, ·, C) or None; valid (B, ·), None: no padding. Returns (B, n, D)."""
        own, other = self._ready(x, position, valid), self._ready(memory, memory_position, memory_valid)
        x, rope, mask = own
        for block in self.blocks:
            x = block(x, rope, mask, *other)
        normed: Tensor = self.norm(x)
        return normed

    def units(self) -> list[nn.Module]:
        return list(self.blocks)

    def _ready(self, x: Tensor, position: Tensor | None, valid: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Tokens without what padding holds, their rotary table, and the mask of whom others may attend to."""
        mask = None
        if valid is not None and not bool(valid.all()):
            x = x.masked_fill(~valid[..., None], 0)
            mask = (valid | ~valid.any(1, keepdim=True))[:, None, None]
            position = None if position is None else position.masked_fill(~valid[..., None], 0)
        return x, None if position is None else self.rotary(position), mask
