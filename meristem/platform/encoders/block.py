"""The transformer's block: pre-norm attention with rotary positions, then a perceptron (Dosovitskiy et al. 2021)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meristem.modalities.stream import gather
from meristem.platform.encoders.conditioning import Adapted
from meristem.platform.encoders.packing import Packing


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

    def forward(self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None,
                packing: Packing | None = None, only: Tensor | None = None) -> Tensor:
        """x (B, N, D), or packed (1, T, D). rope: (B, 1, N, 2·D / heads). attn_mask: as `scaled_dot_product_attention` takes
        it, of the rows as they were before packing. only: (B, m) the tokens that attend, to all; without mask and packing."""
        q, k, v = self.projected(x, rope)
        if only is not None:
            q = gather(q.transpose(1, 2), only).transpose(1, 2)
        if packing is None:
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        else:
            x = packing.attend(q, k, v, attn_mask)
        return self.proj(x.transpose(1, 2).flatten(2))

    def projected(self, x: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, H, N, D / heads)."""
        qk, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).split((2, 1), 2)  # whose gradients join in one copy
        if rope is not None:
            qk = rotated(qk, rope.transpose(1, 2)[:, :, None])
        q, k, v = (x.transpose(1, 2) for x in (*qk.unbind(2), v.squeeze(2)))
        return q, k, v


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

    def forward(self, x: Tensor, rope: Tensor | None = None, mask: Tensor | None = None, packing: Packing | None = None,
                kept: tuple[Tensor, Tensor] | None = None, told: Tensor | None = None, adapted: Adapted | None = None,
                attend: float | None = None, prefix: int = 0, weigh: bool = False,
                only: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, N, D), and the attention weights (B, H, N, N) if `weigh`. packing: how the tokens (1, T, D) are packed.
        kept: what stochastic depth multiplies attention and perceptron by. adapted: what adapts it to `told` (B, told). only:
        (B, m) the tokens that are made, (B, m, D), of a plain block: neither packed, masked nor adapted.

        All that is asked of a block is asked in one call: whoever shards or compiles it does so by its calls.
        """
        attention: Tensor | None = None
        if attend is not None or weigh:
            entered = self.norm1(x) if adapted is None or told is None else adapted.entered(self, x, told)
            logits, mask = _nearest(_logits(self.attn, entered, rope, mask), mask, attend, prefix)
            attention = logits.softmax(-1) if weigh else None
        if adapted is not None and told is not None:
            return adapted(self, x, told, rope, mask), attention
        y = self.attn(self.norm1(x), rope, mask, packing, only)
        x = x if only is None else gather(x, only)
        x = x + (y if kept is None else y * kept[0])
        y = self.mlp(self.norm2(x))
        return x + (y if kept is None else y * kept[1]), attention

    def drawn(self, x: Tensor, packing: Packing | None) -> tuple[Tensor, Tensor] | None:
        """`kept` for tokens x: all of a row go or stay, packed or not. Drawn out here, it is no part of what is compiled."""
        if self.drop_path1.keep == 1 or not self.training:
            return None
        ones = x.new_ones(len(x) if packing is None else packing.rows, 1, 1)
        first, second = self.drop_path1(ones), self.drop_path2(ones)
        return (first, second) if packing is None else (packing.each(first), packing.each(second))


def _logits(attn: Attention, normed: Tensor, rope: Tensor | None, mask: Tensor | None) -> Tensor:
    """Attention before its softmax (B, H, N, N) of what it is given; fused attention does not return it."""
    q, k, _ = attn.projected(normed, rope)
    logits: Tensor = (q * attn.scale) @ k.transpose(-2, -1)
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask
    return logits


def _nearest(logits: Tensor, mask: Tensor | None, attend: float | None, prefix: int) -> tuple[Tensor, Tensor | None]:
    """Logits (B, H, N, N) and mask of an attention that lets each token attend to its best share of those that it may, and to
    the prefix, which attends to all. attend None: both as they are.
    """
    if attend is None:
        return logits, mask
    best = logits[..., prefix:].topk(max(round(attend * (logits.shape[-1] - prefix)), 1), dim=-1).values[..., -1:]
    chosen = F.pad((logits >= best)[..., prefix:, prefix:], (prefix, 0, prefix, 0), value=True) & (logits > float("-inf"))
    sees = chosen if mask is None or mask.dtype == torch.bool else mask.masked_fill(~chosen, float("-inf"))
    return logits.masked_fill(~chosen, float("-inf")), sees
