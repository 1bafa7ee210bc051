"""A predictor that is not sure of the places it fills (stochastic positional embeddings)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from meristem.modalities.base import Axis, Tokenizer
from meristem.modalities.stream import LatticeStream, TokenStream, gather
from meristem.platform.encoders.base import Encoder, EncoderSettings
from meristem.platform.encoders.transformer import Blocks, start_linear
from meristem.platform.masked.masking import Masking
from meristem.platform.masked.predictors import Decoder, Prediction, Predictor
from meristem.platform.objectives import Encoded, Plan


class SinCos(nn.Module):
    """Positions (B, n, C) in the modality's units to vectors (B, n, width) that are added to tokens.

    Each axis owns P = width // 2C sines, then as many cosines, of position / s_i, the scales s_i log-spaced from the axis's
    `finest` to its `coarsest`; numbers left over are 0.
    """

    scale: Tensor

    def __init__(self, width: int, axes: Sequence[Axis]) -> None:
        super().__init__()
        self.width = width
        steps = torch.linspace(0, 1, width // (2 * len(axes)))
        scale = torch.stack([a.finest * (a.coarsest / a.finest) ** steps for a in axes])
        self.register_buffer("scale", scale, persistent=False)

    def forward(self, position: Tensor) -> Tensor:
        angle = position.float()[..., None] / self.scale
        made = torch.cat([angle.sin(), angle.cos()], -1).flatten(2)
        return F.pad(made, (0, self.width - made.shape[-1]))


class StochasticPredictor(Predictor):
    """Encoded tokens and, for each place to predict, its position with noise on it, through blocks without rotary ones.

    A token enters as A s + b + ψ, ψ the vector of its position; a query is ψ + A n + b with n ~ N(0, σ²) as wide as a token. As
    the same A takes in the context, the noise cannot be learned away (Bar et al. 2024, section 3.2).
    """

    def __init__(self, settings: Stochastic, encoder: Encoder, axes: tuple[Axis, ...], sizes: Mapping[str, int],
                 everywhere: bool) -> None:
        super().__init__()
        self.std, self.everywhere = settings.std, everywhere
        self.enter = nn.Linear(encoder.width, settings.width)
        self.place = SinCos(settings.width, axes)
        self.blocks = Blocks(settings.width, settings.depth, settings.heads, axes=())
        self.heads = nn.ModuleDict({name: nn.Linear(settings.width, size) for name, size in sizes.items()})
        start_linear([self.enter, *self.heads.values()])

    def forward(self, encoded: Encoded, stream: TokenStream, plan: Plan) -> dict[str, Prediction]:
        assert plan.keep is not None and stream.position is not None and plan.rng is not None
        n = plan.hidden.shape[1]
        order = (~plan.hidden).to(torch.uint8).argsort(dim=1, stable=True)
        index = plan.decode if plan.decode is not None else order if self.everywhere else order[:, :n - plan.keep.shape[1]]
        noise = self.std * plan.rng.normal("stochastic places", index.shape[1], encoded.tokens.shape[-1])
        places = torch.cat([plan.keep, index], 1)
        x = self.enter(torch.cat([encoded.tokens, noise.to(encoded.tokens)], 1))
        x = x + self.place(gather(stream.position, places)).to(x)
        valid = None if isinstance(stream, LatticeStream) else gather(stream.valid, places)
        x, _, _ = self.blocks(x, None, valid=valid)
        x = x[:, plan.keep.shape[1]:]
        return {name: Prediction(head(x), index) for name, head in self.heads.items()}


class Stochastic(Decoder):
    """A light transformer over visible tokens and queries at stochastic places (Bar et al. 2024, StoP; FlexPredict in its first
    version). std: σ of the noise, in the space of the encoder's tokens. depth, width, heads: of its blocks."""

    std: Annotated[float, Field(ge=0)] = 0.25

    def check(self, name: str, encoder: EncoderSettings, masking: Masking) -> list[str]:
        told = [] if "position" in encoder.sees else [f"the {name} predictor puts noise on positions; add position to "
                                                      "encoder.….sees"]
        return super(Decoder, self).check(name, encoder, masking) + told

    def build(self, encoder: Encoder, tokenizer: Tokenizer, axes: tuple[Axis, ...], channels: int, sizes: Mapping[str, int],
              everywhere: bool) -> Predictor:
        return StochasticPredictor(self, encoder, axes, sizes, everywhere)
