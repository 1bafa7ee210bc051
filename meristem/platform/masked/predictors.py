"""Predictors: from an encoded, masked view to the content of its tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from pydantic import model_validator
from torch import Tensor, nn

from meristem.modalities.base import Axis, Settings, Tokenizer
from meristem.modalities.stream import LatticeStream, TokenStream, gather
from meristem.platform.encoders.base import Encoder, EncoderSettings
from meristem.platform.encoders.message_passing import Convolution, LayerSettings, Nodes, Norm
from meristem.platform.encoders.transformer import Blocks, even_heads, start_linear
from meristem.platform.masked.masking import Masking, Positive
from meristem.platform.objectives import Encoded, Plan

CONVOLUTIONS: Mapping[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@dataclass(frozen=True)
class Prediction:
    """value: (B, n, P). index: (B, n) which tokens of the stream these are; None: all, in order."""

    value: Tensor
    index: Tensor | None = None


def blind(stream: TokenStream) -> TokenStream:
    """The same tokens without their content: what a predictor may know of the places it fills."""
    if isinstance(stream, LatticeStream):
        return stream.with_array(stream.array.new_zeros(()).expand_as(stream.array))
    return replace(stream, content=torch.zeros_like(stream.content))


def hidden_places(plan: Plan) -> Tensor:
    """(B, n) the numbers of the tokens that a masking dropped, ascending."""
    assert plan.keep is not None
    hidden = plan.hidden.shape[1] - plan.keep.shape[1]
    return (~plan.hidden).to(torch.uint8).argsort(dim=1, stable=True)[:, :hidden]


class Predictor(nn.Module):
    """Has one head per readout, named as the readouts are, and the named outputs of its settings, which have none."""

    def forward(self, encoded: Encoded, stream: TokenStream, plan: Plan) -> dict[str, Prediction]:
        """stream: blind, and with nothing but the fields that the recipe's encoder sees."""
        raise NotImplementedError


class PredictorSettings(Settings):
    """The typed entry of a predictor. corruption: the kind of masking it works on. want: what it needs of the encoder.

    remasks: whether it works on tokens as the encoder made them, some of which a masking may keep from it. outputs: what it
    gives beside its heads', vectors of the encoder's width, for readouts that name them. everywhere: whether it can predict
    where nothing is hidden. context: whether it looks at another view, as `cross` does. placeless: whether it tells its tokens
    nothing of where they lie. orders: whether it predicts each token from those before it.
    """

    corruption: ClassVar[str]
    want: ClassVar[frozenset[str]] = frozenset()
    remasks: ClassVar[bool] = False
    outputs: ClassVar[frozenset[str]] = frozenset()
    everywhere: ClassVar[bool] = True
    context: ClassVar[bool] = False
    placeless: ClassVar[bool] = False
    orders: ClassVar[bool] = False

    def check(self, name: str, encoder: EncoderSettings, masking: Masking) -> list[str]:
        """What is impossible about it with this encoder and masking; name: as the recipe calls it."""
        problems = [f"the {name} predictor needs `{need}`, which this encoder does not provide"
                    for need in sorted(self.want - encoder.provides)]
        if masking.corruption != self.corruption:
            problems.append(f"the {name} predictor works on masked tokens that are "
                            f"{'dropped' if self.corruption == 'drop' else 'replaced'}; set the masking's corruption to "
                            f"{self.corruption}, or choose another predictor")
        if masking.orders and not self.orders:
            problems.append(f"the {name} predictor would be shown what it predicts, as tokens are ordered and none is hidden; "
                            "choose predictor: autoregressive")
        if self.orders and not masking.orders:
            problems.append(f"the {name} predictor goes by an order, and this masking decides none; use `order`")
        if masking.remask is not None and not self.remasks:
            problems.append(f"the {name} predictor is given all encoded tokens; take remask out of the masking, or choose "
                            "predictor: graph")
        return problems

    def build(self, encoder: Encoder, tokenizer: Tokenizer, axes: tuple[Axis, ...], channels: int, sizes: Mapping[str, int],
              everywhere: bool) -> Predictor:
        """channels: of the array; sizes: output -> numbers per token; everywhere: also where nothing is hidden."""
        raise NotImplementedError


class LinearPredictor(Predictor):
    """Each encoder token to the content of the array cell it covers.

    A token that covers more than one patch (stride 32 over patches of 4) predicts its whole cell, which is then cut into the
    stream's tokens: a 1×1 convolution and a pixel shuffle, as in SimMIM, in any dimension.
    """

    def __init__(self, encoder: Encoder, voxels: int, sizes: Mapping[str, int]) -> None:
        super().__init__()
        own = () if "drop" in encoder.takes or not encoder.pyramid_strides else encoder.pyramid_strides[-1]
        self.stride = own  # array elements per token on each axis; (): one token of the encoder for each of the stream
        self.heads = nn.ModuleDict({name: nn.Linear(encoder.width, size // voxels * math.prod(own) if own else size)
                                    for name, size in sizes.items()})

    def forward(self, encoded: Encoded, stream: TokenStream, plan: Plan) -> dict[str, Prediction]:
        return {name: Prediction(self._to_tokens(head(encoded.tokens), encoded, stream)) for name, head in self.heads.items()}

    def _to_tokens(self, x: Tensor, encoded: Encoded, stream: TokenStream) -> Tensor:
        if not self.stride:
            return x
        assert isinstance(stream, LatticeStream) and encoded.lattice is not None
        d = len(self.stride)
        cells = x.reshape(len(x), *encoded.lattice, -1, *self.stride)  # (B, *lattice, C, *stride)
        order = [n for axis in range(d) for n in (1 + axis, d + 2 + axis)]
        covered = (n * s for n, s in zip(encoded.lattice, self.stride, strict=True))
        array = cells.permute(0, d + 1, *order).reshape(len(x), -1, *covered)
        for axis, n in enumerate(stream.array.shape[2:]):
            array = array.narrow(2 + axis, 0, n)  # the encoder may have padded the view
        return stream.with_array(array).content


class Linear(PredictorSettings):
    """One linear layer per readout (SimMIM, Xie et al. 2022)."""

    corruption = "replace"

    def build(self, encoder: Encoder, tokenizer: Tokenizer, axes: tuple[Axis, ...], channels: int, sizes: Mapping[str, int],
              everywhere: bool) -> Predictor:
        return LinearPredictor(encoder, tokenizer.token_size // channels, sizes)


class DecoderPredictor(Predictor):
    """Visible tokens and mask tokens through transformer blocks; hidden tokens are read out, or those of the plan's `decode`.

    The decoder knows where a token lies by the view-frame positions that the encoder sees, and by nothing else.
    """

    def __init__(self, settings: Decoder, encoder: Encoder, tokenizer: Tokenizer, axes: tuple[Axis, ...],
                 sizes: Mapping[str, int], everywhere: bool) -> None:
        super().__init__()
        self.everywhere = everywhere
        self.enter = nn.Linear(encoder.width, settings.width)
        self.mask_token = nn.Parameter(torch.empty(settings.width).normal_(std=0.02))
        self.blocks = settings.blocks(axes, tokenizer, encoder.told)
        self.heads = nn.ModuleDict({name: nn.Linear(settings.width, size) for name, size in sizes.items()})
        start_linear([self.enter, *self.heads.values()])

    def forward(self, encoded: Encoded, stream: TokenStream, plan: Plan) -> dict[str, Prediction]:
        assert plan.keep is not None
        seen = self.enter(encoded.tokens)
        if plan.decode is not None:
            return self._some(seen, stream, plan.keep, plan.decode, encoded.told)
        index = None if self.everywhere else hidden_places(plan)
        x, _, _ = self.blocks(self._filled(seen, plan), stream.position, valid=padding(stream), structure=stream.structure,
                              edges=stream.edges, told=encoded.told, only=index)
        return {name: Prediction(head(x), index) for name, head in self.heads.items()}

    def _filled(self, seen: Tensor, plan: Plan) -> Tensor:
        """Entered tokens in their places (B, N, D), mask tokens in all others."""
        assert plan.keep is not None
        x = self.mask_token.to(seen).expand(*plan.hidden.shape, -1)
        return x.scatter(1, plan.keep[..., None].expand_as(seen), seen)

    def _some(self, seen: Tensor, stream: TokenStream, keep: Tensor, decode: Tensor,
              told: Tensor | None) -> dict[str, Prediction]:
        """As `forward`, with mask tokens at `decode` (B, m) and nowhere else: the cost is that of k + m tokens."""
        x = torch.cat([seen, self.mask_token.to(seen).expand(*decode.shape, -1)], 1)
        places = torch.cat([keep, decode], 1)
        position = None if stream.position is None else gather(stream.position, places)
        valid = None if isinstance(stream, LatticeStream) else gather(stream.valid, places)
        last = torch.arange(keep.shape[1], places.shape[1], device=x.device).expand_as(decode)
        x, _, _ = self.blocks(x, position, valid=valid, told=told, only=last)
        return {name: Prediction(head(x), decode) for name, head in self.heads.items()}


def padding(stream: TokenStream) -> Tensor | None:
    """`valid` where there may be padding: a lattice has none, and knowing it spares the device a round trip."""
    return None if isinstance(stream, LatticeStream) else stream.valid


class Decoder(PredictorSettings):
    """A light transformer over visible and mask tokens (MAE, He et al. 2022, section 3). depth, width, heads: of its blocks."""

    corruption = "drop"
    depth: int = 4
    width: int = 256
    heads: int = 8

    @model_validator(mode="after")
    def _divides(self) -> Self:
        even_heads(self.width, self.heads)
        return self

    def check(self, name: str, encoder: EncoderSettings, masking: Masking) -> list[str]:
        problems = super().check(name, encoder, masking)
        if not encoder.sees & {"position", "structure"}:
            problems.append(f"the {name} predictor cannot tell mask tokens apart without positions or structure; add one to "
                            "encoder.….sees")
        return problems

    def blocks(self, axes: tuple[Axis, ...], tokenizer: Tokenizer, told: int) -> nn.Module:
        """told: numbers of the vector that the encoder makes of a number it is told."""
        return Blocks(self.width, self.depth, self.heads, axes, tokenizer=tokenizer, told=told)

    def build(self, encoder: Encoder, tokenizer: Tokenizer, axes: tuple[Axis, ...], channels: int, sizes: Mapping[str, int],
              everywhere: bool) -> Predictor:
        return DecoderPredictor(self, encoder, tokenizer, axes, sizes, everywhere)


class DensePredictor(Predictor):
    """A 1×1 convolution on the encoder's map at the array's resolution, cut into the stream's tokens."""

    def __init__(self, encoder: Encoder, dims: int, voxels: int, sizes: Mapping[str, int]) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({name: CONVOLUTIONS[dims](encoder.dense_width, size // voxels, 1)
                                    for name, size in sizes.items()})

    def forward(self, encoded: Encoded, stream: TokenStream, plan: Plan) -> dict[str, Prediction]:
        assert isinstance(stream, LatticeStream) and encoded.dense is not None
        return {name: Prediction(stream.with_array(head(encoded.dense)).content) for name, head in self.heads.items()}


class Dense(PredictorSettings):
    """Reconstruction at full resolution by a network that has its own decoder (a U-Net)."""

    corruption = "replace"
    want = frozenset({"dense"})

    def build(self, encoder: Encoder, tokenizer: Tokenizer, axes: tuple[Axis, ...], channels: int, sizes: Mapping[str, int],
              everywhere: bool) -> Predictor:
        return DensePredictor(encoder, len(axes), tokenizer.token_size // channels, sizes)


class GraphPredictor(Predictor):
    """Encoded nodes, mapped, with 0 or a learned token in the place of those it is not given, through message-passing layers.

    It is given no hidden node as the encoder made it, or in each of several passes not those that the plan's `remask` names:
    each pass predicts all hidden nodes.
    """

    def __init__(self, settings: Graph, encoder: Encoder, tokenizer: Tokenizer, sizes: Mapping[str, int],
                 everywhere: bool) -> None:
        super().__init__()
        self.everywhere, self.edges = everywhere, (tokenizer.edge_kinds, tokenizer.edge_values)
        self.sizes = dict(sizes)
        self.enter = nn.Linear(encoder.width, encoder.width, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(encoder.width)) if settings.token else None
        self.layers = settings.layers(encoder.width, tokenizer, out=sum(sizes.values()))

    def forward(self, encoded: Encoded, stream: TokenStream, plan: Plan) -> dict[str, Prediction]:
        nodes, entered = Nodes(stream, *self.edges), self.enter(encoded.tokens)
        index = torch.arange(len(stream), device=plan.hidden.device).expand_as(plan.hidden)
        if not self.everywhere:
            most = int(plan.hidden.sum(1).max())
            index = (~plan.hidden).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
        instead = entered.new_zeros(()) if self.mask_token is None else self.mask_token.to(entered)
        decoded = []
        for gone in plan.hidden[None] if plan.remask is None else plan.remask:
            x = nodes.flat(torch.where(gone[..., None], instead, entered))
            for layer in self.layers:
                x = layer(x, nodes)
            decoded.append(gather(nodes.back(x), index))
        outputs, index = torch.cat(decoded, 1).split(list(self.sizes.values()), -1), index.repeat(1, len(decoded))
        return {name: Prediction(x, index) for name, x in zip(self.sizes, outputs, strict=True)}


class Graph(LayerSettings, PredictorSettings):
    """Message passing among encoded nodes, hidden ones masked a second time (GraphMAE, Hou et al. 2022, section 3).

    token: a learned vector stands in their place (their text; GraphMAE2), or 0 (their code of GraphMAE: on Cora a learned one
    fits faster and leaves features that are worse).
    """

    corruption = "replace"
    remasks = True
    conv: Convolution = "gat"
    depth: Positive = 1
    norm: Norm = "none"
    token: bool = False

    def check(self, name: str, encoder: EncoderSettings, masking: Masking) -> list[str]:
        problems = super().check(name, encoder, masking)
        if "edges" not in encoder.sees:
            problems.append(f"the {name} predictor passes messages along edges; add edges to encoder.….sees")
        return problems

    def build(self, encoder: Encoder, tokenizer: Tokenizer, axes: tuple[Axis, ...], channels: int, sizes: Mapping[str, int],
              everywhere: bool) -> Predictor:
        return GraphPredictor(self, encoder, tokenizer, sizes, everywhere)
