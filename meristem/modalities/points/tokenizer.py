"""Tokens of a point cloud: small sets of neighbouring points."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from meristem.modalities.base import Tokenizer, View
from meristem.modalities.points.options import PointsOptions
from meristem.modalities.stream import TokenStream


class PointNet(nn.Module):
    """A shared perceptron on each point of a token, and the maximum over them, twice (Yu et al. 2022, section 3.1)."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.channels = channels
        self.first = nn.Sequential(nn.Linear(channels, 128), nn.LayerNorm(128), nn.GELU(), nn.Linear(128, 256))
        self.second = nn.Sequential(nn.Linear(512, 512), nn.LayerNorm(512), nn.GELU(), nn.Linear(512, width))

    def forward(self, stream: TokenStream) -> Tensor:
        """Stream of n tokens of channels × points numbers to (B, n, width)."""
        x = self.first(stream.content.unflatten(-1, (self.channels, -1)).transpose(-1, -2))
        x = self.second(torch.cat([x.amax(-2, keepdim=True).expand_as(x), x], -1))
        embedded: Tensor = x.amax(-2)
        return embedded


class PointTokenizer(Tokenizer):
    """content: (channels, points) of each token, flattened; its coordinates relative to the token's position."""

    def __init__(self, channels: int, options: PointsOptions) -> None:
        super().__init__()
        self.channels, self.options = channels, options
        self.token_size = channels * options.size
        self.mask_unit = (1,)
        self.coordinates = 3

    def stream(self, view: View) -> TokenStream:
        x = view.array
        live = torch.ones_like(x[:, 0], dtype=torch.bool) if view.weight is None else view.weight[:, 0] > 0
        xyz = x[:, :3].transpose(1, 2)
        chosen = torch.zeros(len(x), self.options.count, dtype=torch.int64, device=x.device)
        far = torch.full_like(xyz[..., 0], torch.inf).masked_fill(~live, -1.0)
        at = (xyz - (xyz * live[..., None]).sum(1, keepdim=True) / live.sum(1).clamp_min(1)[:, None, None]).square().sum(-1)
        nearest = at.masked_fill(~live, -1.0).argmax(1)
        for i in range(self.options.count):
            chosen[:, i] = nearest
            here = xyz.gather(1, nearest[:, None, None].expand(-1, 1, 3))
            far = torch.minimum(far, (xyz - here).square().sum(-1))
            nearest = far.argmax(1)
        centre = xyz.gather(1, chosen[..., None].expand(-1, -1, 3))
        distance = torch.cdist(centre, xyz).masked_fill(~live[:, None], torch.inf)
        near = distance.topk(self.options.size, dim=-1, largest=False).indices  # (B, G, k)
        content = x.gather(2, near.flatten(1)[:, None].expand(-1, self.channels, -1)).unflatten(2, near.shape[1:])
        content = content.permute(0, 2, 1, 3).clone()  # (B, G, C, k)
        content[:, :, :3] -= centre[..., None]
        kind = {} if view.index is None else {"place": view.index.gather(1, chosen)}
        return TokenStream(content.flatten(2), centre, torch.ones_like(chosen, dtype=torch.bool), view.item,
                           view.frame.to_source(centre), kind=kind)

    def embedding(self, width: int) -> PointNet:
        return PointNet(self.channels, width)

    def fold(self, content: Tensor, lattice: tuple[int, ...]) -> Tensor:
        raise NotImplementedError  # points of several tokens overlap
