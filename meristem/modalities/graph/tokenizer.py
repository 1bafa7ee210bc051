"""Tokens of a graph: its nodes."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meristem.modalities.base import Tokenizer, View
from meristem.modalities.stream import TokenStream, mostly_zero


class NodeEmbedding(nn.Module):
    """Linear on node features, whether they are a table with many zeros or not."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, width)

    def forward(self, stream: TokenStream) -> Tensor:
        x, weight, bias = stream.content, self.linear.weight, self.linear.bias
        if x.requires_grad or torch.is_autocast_enabled("cpu") or not mostly_zero(x):
            return F.linear(x, weight, bias)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that compressed rows are new in torch
            rows = x.flatten(0, 1).to_sparse_csr()
        embedded = rows @ weight.t()
        return (embedded if bias is None else embedded + bias).unflatten(0, x.shape[:2])


class Encodings(nn.Module):
    """Linear on the walk encoding, and φ(v) + φ(−v) summed over eigenvectors: a sign that is flipped changes nothing.

    Source: Lim et al. 2022, SignNet, equation 3. structure: (B, n, walk + 2·laplacian): walks, eigenvectors, eigenvalues.
    """

    def __init__(self, walk: int, laplacian: int, width: int) -> None:
        super().__init__()
        self.walk, self.laplacian = walk, laplacian
        self.line = nn.Linear(walk, width) if walk else None
        self.phi = nn.Sequential(nn.Linear(2, 32), nn.GELU(), nn.Linear(32, width)) if laplacian else None

    def forward(self, structure: Tensor) -> Tensor:
        out = structure.new_zeros(())
        if self.line is not None:
            out = out + self.line(structure[..., :self.walk])
        if self.phi is not None:
            vector, value = structure[..., self.walk:].unflatten(-1, (2, self.laplacian)).unbind(-2)
            out = out + sum(self.phi(torch.stack([s * vector, value], -1)) for s in (1, -1)).sum(-2)
        return out


class GraphTokenizer(Tokenizer):
    """content: a node's features. structure: its encodings, the channels of the array after `channels`."""

    def __init__(self, channels: int, edge_kinds: int, walk: int, laplacian: int, edge_values: int = 0) -> None:
        super().__init__()
        self.channels, self.walk, self.laplacian = channels, walk, laplacian
        self.token_size = channels
        self.mask_unit = (1,)
        self.structure = walk + 2 * laplacian
        self.edge_kinds, self.edge_values = edge_kinds, edge_values

    def stream(self, view: View) -> TokenStream:
        x = view.array.transpose(1, 2)
        live = torch.ones_like(x[..., 0], dtype=torch.bool) if view.weight is None else view.weight[:, 0] > 0
        return TokenStream(x[..., :self.channels], None, live, view.item,
                           structure=x[..., self.channels:] if self.structure else None,
                           kind={} if view.index is None else {"place": view.index}, edges=view.edges)

    def embedding(self, width: int) -> NodeEmbedding:
        return NodeEmbedding(self.channels, width)

    def places(self, width: int) -> Encodings | None:
        return Encodings(self.walk, self.laplacian, width) if self.structure else None

    def fold(self, content: Tensor, lattice: tuple[int, ...]) -> Tensor:
        return content.transpose(1, 2)
