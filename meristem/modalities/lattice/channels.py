"""Tokens of single channels: any number of them, in any order, each told by its kind."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from meristem.modalities.base import Tokenizer, View
from meristem.modalities.lattice.tokenizer import LatticeTokenizer
from meristem.modalities.stream import TokenStream


class ChannelEmbedding(nn.Module):
    """Linear on the patch of a channel, the same for all channels, and a learned vector for its kind where that is seen."""

    def __init__(self, size: int, width: int, kinds: int) -> None:
        super().__init__()
        self.linear, self.kind = nn.Linear(size, width), nn.Embedding(kinds, width)
        nn.init.trunc_normal_(self.kind.weight, std=0.02)

    def forward(self, stream: TokenStream) -> Tensor:
        """Stream of n tokens of P elements to (B, n, width)."""
        x: Tensor = self.linear(stream.content)
        return x + self.kind(stream.kind["channel"].clamp_min(0)) if "channel" in stream.kind else x


class ChannelTokenizer(Tokenizer):
    """Cuts every channel of (B, C, *S) into patches: C·N tokens, channel by channel (ChAda-ViT, Bourriez et al. 2024).

    A view's parameter `channel` (B, C) says of what kind each is, −1 where there is none: its tokens are no valid ones. Without
    it the channels are all there, in order. Tokens of one place share their position. kinds: how many there are.
    """

    def __init__(self, kinds: int, patch: tuple[int, ...]) -> None:
        super().__init__()
        self.kinds, self.patches = kinds, LatticeTokenizer(1, patch)
        self.token_size, self.mask_unit = self.patches.token_size, (1, *self.patches.mask_unit)

    def stream(self, view: View) -> TokenStream:
        b, c = view.array.shape[:2]
        whole = self.patches.stream(view)
        assert whole.lattice is not None and whole.position is not None and whole.source is not None
        n = len(whole)
        channel = view.params.get("channel", torch.arange(c, device=view.array.device).expand(b, c)).repeat_interleave(n, 1)

        def split(x: Tensor) -> Tensor:
            """(B, N, C·P) to (B, C·N, P)."""
            return x.unflatten(-1, (c, -1)).transpose(1, 2).flatten(1, 2)

        return TokenStream(split(whole.content), whole.position.repeat(1, c, 1), channel >= 0, view.item,
                           source=whole.source.repeat(1, c, 1), kind={"channel": channel},
                           weight=None if whole.weight is None else split(whole.weight), lattice=(c, *whole.lattice))

    def embedding(self, width: int) -> ChannelEmbedding:
        return ChannelEmbedding(self.token_size, width, self.kinds)

    def fold(self, content: Tensor, lattice: tuple[int, ...]) -> Tensor:
        channels = content.unflatten(1, (lattice[0], -1))
        return self.patches.fold(channels.flatten(0, 1), lattice[1:]).unflatten(0, channels.shape[:2]).squeeze(2)
