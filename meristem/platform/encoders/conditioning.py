"""Transformer blocks that are told a number, such as how noisy their input is (adaptive norms)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


class Told(nn.Module):
    """Numbers (B,) to the vectors (B, width) that blocks go by: sines and cosines, scales log-spaced from 1 to 10⁴, and a
    perceptron of twice the width (Hansen et al. 2024, UMD, as their code, after Peebles and Xie 2023, DiT)."""

    scale: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.register_buffer("scale", torch.exp(torch.arange(half) * (math.log(10000) / (half - 1))), persistent=False)
        self.trunk = nn.Sequential(nn.Linear(2 * half, 2 * width), nn.SiLU(), nn.Linear(2 * width, width), nn.SiLU())

    def forward(self, number: Tensor) -> Tensor:
        angle = number.to(self.scale)[:, None] / self.scale
        vector: Tensor = self.trunk(torch.cat([angle.sin(), angle.cos()], -1))
        return vector


class Adapted(nn.Module):
    """A block's shift, scale and gate before and behind its attention and its perceptron, of the vector it is told: adaLN-Zero
    (Peebles and Xie 2023, DiT, section 3.2). All are 0 at first, so that a block starts as the identity."""

    def __init__(self, told: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(told, 6 * width)
        self.reset()

    def reset(self) -> None:
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def entered(self, block: Any, x: Tensor, vector: Tensor) -> Tensor:
        """What a block's attention is given of tokens x (B, N, D)."""
        shift, scale, *_ = self.linear(vector)[:, None].chunk(6, -1)
        return _modulated(block.norm1(x), shift, scale)

    def forward(self, block: Any, x: Tensor, vector: Tensor, rope: Tensor | None, mask: Tensor | None) -> Tensor:
        """The block on x (B, N, D), told vector (B, told)."""
        enter_shift, enter_scale, gate, shift, scale, last = self.linear(vector)[:, None].chunk(6, -1)
        entered = _modulated(block.norm1(x), enter_shift, enter_scale)
        x = x + block.drop_path1(gate * block.attn(entered, rope=rope, attn_mask=mask))
        x = x + block.drop_path2(last * block.mlp(_modulated(block.norm2(x), shift, scale)))
        return x


def _modulated(normed: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return normed * (1 + scale) + shift
