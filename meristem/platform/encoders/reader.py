"""Global queries beside an encoder: they read the tokens of every layer, and change nothing of how they are made."""

from __future__ import annotations

from typing import Annotated, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from meristem.modalities.base import Axis, Tokenizer
from meristem.modalities.stream import TokenStream
from meristem.platform.encoders.base import ENCODERS, Encoder, EncoderSettings
from meristem.platform.encoders.transformer import TransformerSettings
from meristem.platform.objectives import Encoded, Plan
from meristem.platform.slots import Slot


class ReaderSettings(EncoderSettings):
    """Learned queries read each layer of `encoder` by cross-attention (the global queries of ReCon, Qi et al. 2023, section 3).

    encoder: what they read; it sees what both its `sees` and this one's name. queries: by name, each a vector of the whole;
    none attends to another, and `cls` stands in place of the encoder's own. apart: what they learn does not reach the encoder
    (stop-gradient; for fine-tuning set it to false). heads: of their attention.
    """

    encoder: Annotated[EncoderSettings, Slot("encoder", ENCODERS)] = TransformerSettings(cls=False)
    queries: Annotated[tuple[str, ...], Field(min_length=1)] = ("cls",)
    apart: bool = True
    heads: int = 6
    mlp_ratio: float = 4.0

    @model_validator(mode="after")
    def _has_layers(self) -> Self:
        if "layers" not in self.encoder.provides:
            raise ValueError("encoder: a reader needs one that gives its layers, e.g. transformer")
        return self

    @property
    def takes(self) -> frozenset[str]:
        return self.encoder.takes

    @property
    def provides(self) -> frozenset[str]:
        return self.encoder.provides | set(self.queries)

    def detached(self) -> Self:
        return self.model_copy(update={"encoder": self.encoder.detached()})

    def build(self, tokenizer: Tokenizer, axes: tuple[Axis, ...], channels: int) -> Reader:
        return Reader(self, self.encoder.build(tokenizer, axes, channels))


class _Reading(nn.Module):
    """Queries (B, Q, D) attend to tokens (B, n, D), then pass a perceptron; both with residuals, normed before."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm, self.tokens = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        inner = int(width * mlp_ratio)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))

    def forward(self, query: Tensor, tokens: Tensor, padding: Tensor) -> Tensor:
        tokens = self.tokens(tokens)
        query = query + self.attention(self.norm(query), tokens, tokens, key_padding_mask=padding, need_weights=False)[0]
        read: Tensor = query + self.mlp(query)
        return read


class Reader(Encoder):
    """inner: the encoder that is read; all but the queries' vectors is its result."""

    def __init__(self, settings: ReaderSettings, inner: Encoder) -> None:
        super().__init__()
        self.takes, self.provides = settings.takes, settings.provides
        self.inner, self.sees, self.apart = inner, settings.encoder.sees, settings.apart
        self.width, self.depth, self.dense_width, self.mask_unit = inner.width, inner.depth, inner.dense_width, inner.mask_unit
        self.pyramid_widths, self.pyramid_strides = inner.pyramid_widths, inner.pyramid_strides
        self.names = settings.queries
        self.query = nn.Parameter(torch.randn(1, len(self.names), self.width) * 0.02)
        self.readings = nn.ModuleList(_Reading(self.width, settings.heads, settings.mlp_ratio) for _ in range(self.depth))
        self.norm = nn.LayerNorm(self.width)

    def forward(self, stream: TokenStream, plan: Plan | None = None, *, want: frozenset[str] = frozenset()) -> Encoded:
        encoded: Encoded = self.inner(stream.seen(self.sees), plan, want=want | {"layers"})
        assert encoded.layers is not None
        valid = encoded.valid
        padding = ~(valid | ~valid.any(1, keepdim=True))  # an empty row reads itself rather than nothing
        query = self.query.to(encoded.tokens.dtype).expand(len(valid), -1, -1)
        for reading, layer in zip(self.readings, encoded.layers, strict=True):
            layer = layer.masked_fill(~valid[..., None], 0)  # 0 · NaN is NaN
            query = reading(query, layer.detach() if self.apart else layer, padding)
        encoded.summary = {**encoded.summary, **dict(zip(self.names, self.norm(query).unbind(1), strict=True))}
        if "layers" not in want:
            encoded.layers = None
        return encoded

    def grid(self, size: tuple[int, ...], patch: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self.inner.grid(size, patch)

    def layer_groups(self) -> list[list[nn.Parameter]]:
        groups = self.inner.layer_groups()
        groups[-1] += [self.query, *self.readings.parameters(), *self.norm.parameters()]
        return groups
