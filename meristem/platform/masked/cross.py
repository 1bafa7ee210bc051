"""Predictors that look at another encoded view."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import nn

from meristem.modalities.base import Axis, Tokenizer
from meristem.modalities.stream import TokenStream, gather
from meristem.platform.encoders.base import Encoder, EncoderSettings
from meristem.platform.encoders.cross import CrossBlocks
from meristem.platform.masked.masking import Masking
from meristem.platform.masked.predictors import Decoder, DecoderPredictor, Prediction, Predictor, hidden_places, padding
from meristem.platform.objectives import Encoded, Plan


class Context(NamedTuple):
    """Another view, encoded whole, that a predictor may look at. stream: its tokens, blind, with what the encoder sees."""

    encoded: Encoded
    stream: TokenStream


class CrossPredictor(DecoderPredictor):
    """As `DecoderPredictor`, whose tokens look at another encoded view too: what is hidden here may be visible there.

    Of the context, too, it knows places in the view's own frame only. With places in the sample it would look up the answer.
    """

    def forward(self, encoded: Encoded, stream: TokenStream, plan: Plan,
                context: Context | None = None) -> dict[str, Prediction]:
        assert context is not None
        x, there = self._filled(self.enter(encoded.tokens), plan), context.stream
        x = self.blocks(x, stream.position, padding(stream), self.enter(context.encoded.tokens), there.position, padding(there))
        index = None if self.everywhere else hidden_places(plan)
        x = x if index is None else gather(x, index)
        return {name: Prediction(head(x), index) for name, head in self.heads.items()}


class Cross(Decoder):
    """A decoder with cross-attention to another view, the objective's `context` (CroCo, Weinzaepfel et al. 2022, section 3.2).

    One linear layer takes the tokens of both views to the decoder's width, as their code.
    """

    context = True

    def check(self, name: str, encoder: EncoderSettings, masking: Masking) -> list[str]:
        problems = super().check(name, encoder, masking)
        if "position" not in encoder.sees:
            problems.append(f"the {name} predictor relates the places of two views; add position to encoder.….sees")
        if masking.decode is not None:
            problems.append(f"the {name} predictor fills in every place; take decode out of the masking")
        return problems

    def blocks(self, axes: tuple[Axis, ...], tokenizer: Tokenizer, told: int) -> nn.Module:
        return CrossBlocks(self.width, self.depth, self.heads, axes)

    def build(self, encoder: Encoder, tokenizer: Tokenizer, axes: tuple[Axis, ...], channels: int, sizes: Mapping[str, int],
              everywhere: bool) -> Predictor:
        return CrossPredictor(self, encoder, tokenizer, axes, sizes, everywhere)
