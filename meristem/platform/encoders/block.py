"""The transformer's block: pre-norm attention with rotary positions, then a perceptron (Dosovitskiy et al. 2021)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def rotated(x: Tensor, rope: Tensor) -> Tensor:
    """x (…, N, D) turned by what `Rotary` gives, (…, N, 2·D): sines, then cosines. Each pair of channels (a, b) becomes
    (a cos − b sin, b cos + a sin), in the table's precision; comes back in that of x.
    """
    sine, cosine = (table[..., ::2] for table in rope.chunk(2, -1))  # a pair's two channels turn alike
    pairs = x.to(torch.promote_types(x.dtype, rope.dtype)).unflatten(-1, (-1, 2))
    if x.is_cpu and not torch.compiler.is_compiling():  # a complex product: the same numbers in a third of the time
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cosine, sine))
    else:
        a, b = pairs.unbind(-1)
        turned = torch.stack([a * cosine - b * sine, b * cosine + a * sine], -1)
    return turned.flatten(-2).type_as(x)


class Attention(nn.Module):
    """Self-attention; queries and keys are rotated together."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.scale = heads, (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None) -> Tensor:
        """x (B, N, D). rope: (B, 1, N, 2·D / heads). attn_mask: as `scaled_dot_product_attention` takes it."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0) if rope is None else (*rotated(qkv[:2], rope).unbind(0), qkv[2])
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        return self.proj(x.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class DropPath(nn.Module):
    """Whole rows of a branch are left out with a probability, the others scaled up (Huang et al. 2016)."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.keep = 1 - probability

    def forward(self, x: Tensor) -> Tensor:
        if self.keep == 1 or not self.training:
            return x
        return x * x.new_empty(len(x), *[1] * (x.ndim - 1)).bernoulli_(self.keep).div_(self.keep)


class Block(nn.Module):
    """Named as timm's blocks are, so that either reads the other's weights."""

    def __init__(self, width: int, heads: int, mlp_ratio: float = 4.0, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.drop_path1 = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.drop_path2 = DropPath(drop_path)

    def forward(self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None) -> Tensor:
        x = x + self.drop_path1(self.attn(self.norm1(x), rope=rope, attn_mask=attn_mask))
        return x + self.drop_path2(self.mlp(self.norm2(x)))
