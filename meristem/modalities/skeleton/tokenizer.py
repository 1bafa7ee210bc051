"""Tokens of a sequence: one joint through a segment of frames."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meristem.modalities.base import Tokenizer, View
from meristem.modalities.lattice.tokenizer import PatchEmbedding
from meristem.modalities.stream import TokenStream


class SkeletonTokenizer(Tokenizer):
    """content: (coordinates, frames) of one joint, flattened; 0 where it was not seen. position, source: seconds of a token's
    middle. Which joint it is, and whose, is no coordinate: `structure` says it one-hot, `kind` (joint, body) by number.

    Tokens lie on the lattice (segments, people · joints). Those of which nothing was seen are padding. A remainder of frames
    smaller than a segment belongs to no token.
    """

    def __init__(self, dims: int, joints: int, people: int, segment: int) -> None:
        super().__init__()
        self.channels, self.joints, self.people, self.segment = dims, joints, people, segment
        self.token_size = dims * segment
        self.mask_unit = (1, 1)
        self.structure = joints + (people if people > 1 else 0)

    def stream(self, view: View) -> TokenStream:
        lattice = (view.array.shape[2] // self.segment, view.array.shape[3])
        weight = torch.ones_like(view.array[:, :1]) if view.weight is None else view.weight
        content, weight = self._cut(view.array, lattice), self._cut(weight, lattice)
        rows, place = len(content), torch.arange(lattice[1], device=content.device)
        middle = torch.arange(lattice[0], device=content.device) * self.segment + (self.segment - 1) / 2
        centre = torch.cartesian_prod(middle, place.to(middle)).expand(rows, -1, -1)
        kind = {"joint": place % self.joints, "body": place // self.joints}
        who = F.one_hot(kind["joint"], self.joints)
        if self.people > 1:
            who = torch.cat([who, F.one_hot(kind["body"], self.people)], 1)
        return TokenStream(
            content, view.frame.local(centre)[..., :1], (weight > 0).any(-1), view.item, view.frame.to_source(centre)[..., :1],
            structure=who.to(content).repeat(lattice[0], 1).expand(rows, -1, -1),
            kind={name: x.repeat(lattice[0]).expand(rows, -1) for name, x in kind.items()}, weight=weight, lattice=lattice)

    def _cut(self, x: Tensor, lattice: tuple[int, int]) -> Tensor:
        """(B, C, T, J) to (B, N, C · segment)."""
        cells = x[:, :, :lattice[0] * self.segment].unflatten(2, (lattice[0], self.segment))
        return cells.permute(0, 2, 4, 1, 3).flatten(3).flatten(1, 2)

    def fold(self, content: Tensor, lattice: tuple[int, ...]) -> Tensor:
        cells = content.unflatten(-1, (-1, self.segment)).unflatten(1, lattice)
        return cells.permute(0, 3, 1, 4, 2).flatten(2, 3)

    def embedding(self, width: int) -> PatchEmbedding:
        return PatchEmbedding(self.token_size, width)

    def places(self, width: int) -> nn.Module:
        """A learned vector for each joint and, of several, each person."""
        return nn.Linear(self.structure, width)
