"""Heads: projectors, predictors and prototypes that a recipe owns and names."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meristem.modalities.base import Settings
from meristem.platform.norms import BatchNorm


class Head(nn.Module):
    """Vectors (M, D) to vectors (M, width). view, item: (M,) the look and the sample each came from; both name a map."""

    width: int

    def forward(self, z: Tensor, view: Tensor, item: Tensor | None = None) -> Tensor:
        raise NotImplementedError


class HeadSettings(Settings):
    """The typed entry of a head in a recipe. input: name of the head that it stands on; null: the encoder."""

    input: str | None = None

    def build(self, width: int) -> Head:
        """width: of the vectors that come in."""
        raise NotImplementedError


NORMS: dict[str, Callable[[int, bool], nn.Module]] = {
    "batch": lambda width, affine: BatchNorm(width, affine=affine),
    "layer": lambda width, affine: nn.LayerNorm(width, elementwise_affine=affine),
}


class Perceptron(Head):
    """Linear layers with a norm and an activation between them. per_view: each look goes through on its own."""

    def __init__(self, layers: nn.Sequential, width: int, per_view: bool) -> None:
        super().__init__()
        self.layers, self.width, self.per_view = layers, width, per_view

    def forward(self, z: Tensor, view: Tensor, item: Tensor | None = None) -> Tensor:
        if not (self.per_view and self.training):
            return self.layers(z)
        order = view.argsort(stable=True)
        sizes = view.unique(return_counts=True)[1].tolist()
        return torch.cat([self.layers(look) for look in z[order].split(sizes)])[order.argsort()]


class Mlp(HeadSettings):
    """A multi-layer perceptron.

    layers: linear layers, 0 for none at all; hidden: width between them, out: width at the end. norm: after every layer but the
    last; last_norm: also after the last, without scale and shift. per_view: batch-norm statistics of each look of its own, as
    when each look is a pass of its own (MoCo v3); else those of all looks of a view together (SimCLR).
    """

    layers: int = 2
    hidden: int = 512
    out: int = 128
    norm: Literal["batch", "layer", "none"] = "batch"
    last_norm: bool = False
    activation: Literal["relu", "gelu"] = "relu"
    per_view: bool = False

    def build(self, width: int) -> Head:
        parts: list[nn.Module] = []
        sizes = [width, *[self.hidden] * (self.layers - 1), self.out] if self.layers else [width]
        for depth, (a, b) in enumerate(itertools.pairwise(sizes), start=1):
            last = depth == self.layers
            normed = self.norm != "none" and (self.last_norm or not last)
            parts.append(nn.Linear(a, b, bias=not normed))  # a norm subtracts what a bias adds
            if normed:
                parts.append(NORMS[self.norm](b, not last))
            if not last:
                parts.append(nn.ReLU() if self.activation == "relu" else nn.GELU())
        return Perceptron(nn.Sequential(*parts), sizes[-1], self.per_view)


class UnitRows(nn.Module):
    """Cosines, times a gain where it is learned, of vectors (M, D) with `count` directions: (M, count).

    y_j = g_j · (x/|x|)·(w_j/|w_j|): L2-normalisation and a weight-normalised linear map without bias. gain: False keeps g = 1.
    """

    def __init__(self, width: int, count: int, gain: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, width).uniform_(-(width**-0.5), width**-0.5))
        self.gain = nn.Parameter(torch.ones(count)) if gain else None

    def forward(self, z: Tensor) -> Tensor:
        with torch.autocast(z.device.type, enabled=False):  # logits are divided by small temperatures
            y = F.linear(F.normalize(z.float(), dim=-1), F.normalize(self.weight.float(), dim=-1))
            return y if self.gain is None else y * self.gain


class PrototypeHead(Head):
    """A perceptron to a bottleneck, then cosines with prototypes."""

    def __init__(self, body: Head, last: UnitRows) -> None:
        super().__init__()
        self.body, self.last, self.width = body, last, len(last.weight)

    def forward(self, z: Tensor, view: Tensor, item: Tensor | None = None) -> Tensor:
        return self.last(self.body(z, view, item))


class Prototypes(Mlp):
    """The head of DINO and iBOT (norm none, gelu, three layers) and of SwAV (norm batch, relu, two layers).

    out: width of the bottleneck; count: prototypes. gain: learn the length of the last layer's rows (DINO: norm_last_layer
    false); else they have unit length. Sources: Caron et al. 2021, section 3 and appendix C; Caron et al. 2020.
    """

    count: int = 1024
    layers: int = 3
    norm: Literal["batch", "layer", "none"] = "none"
    activation: Literal["relu", "gelu"] = "gelu"
    gain: bool = False

    def build(self, width: int) -> Head:
        body = super().build(width)
        return PrototypeHead(body, UnitRows(body.width, self.count, self.gain))


class Propagate(Head):
    """Every unit becomes a sum over its map, weighted by how alike the units are."""

    def __init__(self, width: int, sharpness: float) -> None:
        super().__init__()
        self.width, self.sharpness = width, sharpness
        self.value = nn.Linear(width, width)

    def forward(self, z: Tensor, view: Tensor, item: Tensor | None = None) -> Tensor:
        assert item is not None
        sample = torch.unique(item, return_inverse=True)[1]
        maps, size = torch.unique(sample * (int(view.max()) + 1) + view, return_inverse=True, return_counts=True)[1:]
        order = maps.argsort(stable=True)
        row = maps[order]
        place = torch.arange(len(z), device=z.device) - (size.cumsum(0) - size)[row]

        def table(x: Tensor) -> Tensor:
            """(maps, most units of one, D); rows of 0, which are like nothing, fill it up."""
            return x.new_zeros(len(size), int(size.max()), x.shape[1]).index_put((row, place), F.normalize(x[order], dim=-1))

        x = table(z)
        alike = (x @ x.transpose(1, 2)).clamp_min(0).pow(self.sharpness)
        spread = (alike @ table(self.value(z)))[row, place]
        return torch.empty_like(spread).index_put((order,), spread)


class Propagation(HeadSettings):
    """Pixel propagation: y_i = Σ_j max(cos(x_i, x_j), 0)^γ · g(x_j) over the units j of i's own map, γ = `sharpness`.

    Xie et al. 2021 (PixPro), equations 3 and 4; g is a linear map whose results have unit length, as in their code.
    """

    sharpness: float = 2.0

    def build(self, width: int) -> Head:
        return Propagate(width, self.sharpness)


HEADS: dict[str, type[HeadSettings]] = {"mlp": Mlp, "prototypes": Prototypes, "propagation": Propagation}
