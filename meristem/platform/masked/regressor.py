"""Prediction of latents, and reconstruction from what was predicted alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import torch
from pydantic import model_validator
from torch import nn

from meristem.modalities.base import Axis, Tokenizer
from meristem.modalities.stream import LatticeStream, TokenStream, gather
from meristem.platform.encoders.base import Encoder, EncoderSettings
from meristem.platform.encoders.cross import CrossBlocks
from meristem.platform.encoders.transformer import Blocks, even_heads, start_linear
from meristem.platform.masked.masking import Masking, Positive
from meristem.platform.masked.predictors import Prediction, Predictor, PredictorSettings, hidden_places
from meristem.platform.objectives import Encoded, Plan


class RegressorPredictor(Predictor):
    """Mask tokens that look at visible ones become latents in the encoder's own space; the decoder is given those and their
    places, and nothing of what is visible."""

    def __init__(self, settings: Regressor, encoder: Encoder, axes: tuple[Axis, ...], sizes: Mapping[str, int]) -> None:
        super().__init__()
        width = settings.width
        self.enter, self.leave, self.decode = (nn.Linear(a, b) for a, b in (
            (encoder.width, width), (width, encoder.width), (encoder.width, width)))
        self.mask_token = nn.Parameter(torch.empty(width).normal_(std=0.02))
        self.regressor = CrossBlocks(width, settings.depth, settings.heads, axes)
        self.decoder = Blocks(width, settings.decoder, settings.heads, axes)
        self.heads = nn.ModuleDict({name: nn.Linear(width, size) for name, size in sizes.items()})
        start_linear([self.enter, self.leave, self.decode, *self.heads.values()])

    def forward(self, encoded: Encoded, stream: TokenStream, plan: Plan) -> dict[str, Prediction]:
        assert plan.keep is not None and stream.position is not None  # checked
        index = hidden_places(plan) if plan.decode is None else plan.decode
        queries = self.mask_token.to(encoded.tokens).expand(*index.shape, -1)
        (place, valid), (there, seen) = ((gather(stream.position, at), None if isinstance(stream, LatticeStream) else
                                          gather(stream.valid, at)) for at in (index, plan.keep))
        latent = self.leave(self.regressor(queries, place, valid, self.enter(encoded.tokens), there, seen))
        x, _, _ = self.decoder(self.decode(latent), place, valid=valid)
        return {"latent": Prediction(latent, index)} | {name: Prediction(head(x), index) for name, head in self.heads.items()}


class Regressor(PredictorSettings):
    """A latent contextual regressor and a decoder (CAE, Chen et al. 2022, section 3). Output `latent`: what the encoder would
    have made of the hidden tokens. depth: blocks of the regressor; decoder: of the decoder; width, heads: of both."""

    corruption = "drop"
    outputs = frozenset({"latent"})
    everywhere = False
    depth: Positive = 4
    decoder: Positive = 4
    width: Positive = 256
    heads: Positive = 8

    @model_validator(mode="after")
    def _divides(self) -> Self:
        even_heads(self.width, self.heads)
        return self

    def check(self, name: str, encoder: EncoderSettings, masking: Masking) -> list[str]:
        problems = super().check(name, encoder, masking)
        if "position" not in encoder.sees:
            problems.append(f"the {name} predictor cannot tell mask tokens apart without positions; add position to "
                            "encoder.….sees")
        return problems

    def build(self, encoder: Encoder, tokenizer: Tokenizer, axes: tuple[Axis, ...], channels: int, sizes: Mapping[str, int],
              everywhere: bool) -> Predictor:
        return RegressorPredictor(self, encoder, axes, sizes)
