"""Tokens of a lattice: patches."""

from __future__ import annotations

import math

from torch import Tensor, nn

from meristem.modalities.base import Tokenizer, View
from meristem.modalities.stream import LatticeStream, TokenStream, fold


class PatchEmbedding(nn.Module):
    """Linear on raw patch content; on all tokens, a convolution whose stride is its kernel."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, width)

    def forward(self, stream: TokenStream) -> Tensor:
        """Stream of n tokens of P elements to (B, n, width)."""
        embedded: Tensor = self.linear(stream.content)
        return embedded


class LatticeTokenizer(Tokenizer):
    """Cuts (B, C, *S) into patches of `patch` elements per axis; a remainder at the far end belongs to no token."""

    def __init__(self, channels: int, patch: tuple[int, ...]) -> None:
        super().__init__()
        self.channels, self.patch = channels, patch
        self.token_size = channels * math.prod(patch)
        self.mask_unit = (1,) * len(patch)

    def stream(self, view: View) -> LatticeStream:
        weight = view.weight
        if weight is not None:
            weight = weight.expand_as(view.array)
        return LatticeStream(view.array, self.patch, view.frame, view.item, weight)

    def embedding(self, width: int) -> PatchEmbedding:
        return PatchEmbedding(self.token_size, width)

    def fold(self, content: Tensor, lattice: tuple[int, ...]) -> Tensor:
        return fold(content, lattice, self.patch)
