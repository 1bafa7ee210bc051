"""Tokens of a point cloud: small sets of neighbouring points."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from meristem import pointops
from meristem.modalities.base import Tokenizer, View
from meristem.modalities.points.options import PointsOptions
from meristem.modalities.stream import TokenStream

BITS = 16  # of a cell's number along each axis


class PointNet(nn.Module):
    """A shared perceptron on each point of a token and the maximum over them, twice (Pang et al. 2022, Point-MAE, section 3.1).

    Their batch normalisation is layer normalisation here: a token's embedding depends on no other sample. unit: coordinates are
    divided by it first, since a layer's shift would drown those of small groups. The layers are in proportion to `width`; at
    theirs, 384, they are 128, 256 and 512 wide. Fixed ones would cost more than all blocks of a small encoder.
    """

    unit: Tensor

    def __init__(self, channels: int, width: int, unit: float) -> None:
        super().__init__()
        self.channels = channels
        self.register_buffer("unit", torch.tensor([unit] * 3 + [1.0] * (channels - 3)), persistent=False)
        a, b, c = (max(width * k // 3, 8) for k in (1, 2, 4))
        self.first = nn.Sequential(nn.Linear(channels, a), nn.LayerNorm(a), nn.ReLU(), nn.Linear(a, b))
        self.point, self.whole = nn.Linear(b, c), nn.Linear(b, c, bias=False)
        self.second = nn.Sequential(nn.LayerNorm(c), nn.ReLU(), nn.Linear(c, width))

    def forward(self, stream: TokenStream) -> Tensor:
        """Stream of n tokens of channels × points numbers to (B, n, width)."""
        x = self.first(stream.content.unflatten(-1, (self.channels, -1)).transpose(-1, -2) / self.unit)
        # one layer on each point beside the maximum, which is multiplied once for all of them
        x = self.second(self.point(x) + self.whole(x.amax(-2, keepdim=True)))
        embedded: Tensor = x.amax(-2)
        return embedded


class PointTokenizer(Tokenizer):
    """content: (channels, points) of each token, flattened; its coordinates relative to the token's position.

    `groups`: the position of a token is that of its centre. There are fewer than `count` where the cloud has fewer distinct
    points. `serial`: runs along a Hilbert curve on cubic cells from the cloud's lowest corner (larger than `cell` where 2^16
    of them do not span the cloud); the position is the mean of the run; every point of the view is in one token.
    A token with fewer points than `size` repeats one of them, with weight 0. There is no lattice to fold tokens to.
    kind: `place` (the stored element) and each field of whole numbers but the mask, at the centre or the middle of the run; −1
    where a token is padding. aux: `points` (B, N, size), which points of the view a token holds.
    """

    def __init__(self, channels: int, options: PointsOptions) -> None:
        super().__init__()
        self.channels, self.options = channels, options
        self.token_size = channels * options.size
        self.mask_unit = (1,)
        self.coordinates = 3
        self.structure = 3 if options.places else 0

    def stream(self, view: View) -> TokenStream:
        x = view.array.transpose(1, 2)  # (B, N, C)
        xyz = x[..., :3]
        live = torch.ones_like(x[..., 0], dtype=torch.bool) if view.weight is None else view.weight[:, 0] > 0
        if self.options.tokens == "groups":
            at, valid = pointops.farthest_point_sampling(xyz, live, self.options.count)
            position = pointops.gather_points(xyz, at)
            distance, points = pointops.nearest(position, xyz, live, self.options.size)
            there = (distance < torch.inf) & valid[..., None]
            content = pointops.gather_points(x, points)  # (B, T, k, C)
        else:
            points, there = self._runs(xyz, live)
            valid = there[..., 0]
            at = points.gather(-1, there.sum(-1, keepdim=True) // 2).squeeze(-1)
            content = pointops.gather_points(x, points)
            share = there / there.sum(-1, keepdim=True).clamp_min(1)
            position = (content[..., :3] * share[..., None]).sum(-2)
        content = torch.cat([content[..., :3] - position[:, :, None], content[..., 3:]], -1)
        fields = {name: y for name, y in view.fields.items()
                  if name != "mask" and y.shape == live.shape and not y.is_floating_point()}
        if view.index is not None:
            fields["place"] = view.index
        kind = {name: y.gather(1, at).masked_fill(~valid, -1) for name, y in fields.items()}
        return TokenStream(content.transpose(-1, -2).flatten(2), position, valid, view.item, view.frame.to_source(position),
                           structure=position if self.structure else None, kind=kind,
                           aux={"points": points}, weight=there.to(x.dtype))

    def _runs(self, xyz: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, size) points in order along the curve, and which of these places hold one."""
        low = xyz.masked_fill(~live[..., None], torch.inf).amin(1, keepdim=True)
        high = xyz.masked_fill(~live[..., None], -torch.inf).amax(1, keepdim=True)
        cell = ((high - low).amax(-1, keepdim=True) / (2**BITS - 1)).clamp_min(self.options.cell)
        cells = ((xyz - low) / cell).nan_to_num(0).clamp(0, 2**BITS - 1).int()
        place = pointops.hilbert(cells, BITS).masked_fill(~live, 1 << 3 * BITS)
        order = place.argsort(dim=1, stable=True)
        size, count = self.options.size, live.sum(1, keepdim=True)
        number = torch.arange(-(-xyz.shape[1] // size) * size, device=xyz.device)
        points = order.gather(1, torch.minimum(number, (count - 1).clamp_min(0)))
        return points.unflatten(1, (-1, size)), (number < count).unflatten(1, (-1, size))

    def spread(self, tokens: Tensor, stream: TokenStream, view: View) -> Tensor:
        """What tokens (B, T, D) of a whole stream of the view say at each of its points (B, N, D); differentiable in tokens.

        `groups`: by `pointops.interpolate` from the three nearest centres; `serial`: the point's own token.
        """
        xyz = view.array[:, :3].transpose(1, 2)
        if self.options.tokens == "groups":
            assert stream.position is not None
            return pointops.interpolate(xyz, stream.position, tokens, stream.valid)
        assert stream.weight is not None
        there = stream.weight > 0
        row, number, _ = there.nonzero(as_tuple=True)
        own = torch.zeros(xyz.shape[:2], dtype=torch.int64, device=tokens.device)
        own[row, stream.aux["points"][there]] = number
        return pointops.gather_points(tokens, own)

    def embedding(self, width: int) -> PointNet:
        return PointNet(self.channels, width, self.options.scales[0])

    def places(self, width: int) -> nn.Module | None:
        return nn.Sequential(nn.Linear(3, 128), nn.GELU(), nn.Linear(128, width)) if self.structure else None
