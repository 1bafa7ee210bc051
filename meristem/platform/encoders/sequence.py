"""Slices of a volume as a sequence: a 2D encoder makes a vector of each, a transformer reads them together."""

from __future__ import annotations

from typing import Annotated, Self

import torch
from torch import Tensor, nn

from meristem.errors import RecipeError
from meristem.modalities.base import Axis, Tokenizer
from meristem.modalities.stream import LatticeStream, TokenStream
from meristem.platform.encoders.base import ENCODERS, Encoder, EncoderSettings
from meristem.platform.encoders.slicewise import SlicewiseSettings, slices_of
from meristem.platform.encoders.transformer import Blocks, TransformerSettings
from meristem.platform.objectives import Encoded, Plan
from meristem.platform.slots import Slot


class SequenceSettings(EncoderSettings):
    """encoder: of one slice, of which its mean vector is taken; depth, heads: of the transformer over the slices.

    Masked by whole slices: `replace` puts a learned vector in the place of a slice's own.
    """

    encoder: Annotated[EncoderSettings, Slot("encoder", ENCODERS)] = TransformerSettings()
    depth: int = 4
    heads: int = 4

    @property
    def takes(self) -> frozenset[str]:
        return frozenset({"replace"})

    @property
    def provides(self) -> frozenset[str]:
        return frozenset({"mean", "cls", "slices"})

    def detached(self) -> Self:
        return self.model_copy(update={"encoder": self.encoder.detached()})

    def build(self, tokenizer: Tokenizer, axes: tuple[Axis, ...], channels: int) -> Sequence:
        inner = SlicewiseSettings(encoder=self.encoder, sees=self.sees).build(tokenizer, axes, channels).inner
        if inner.width % self.heads or inner.width // self.heads % 2:
            raise RecipeError(f"a slice's vector has {inner.width} numbers, which {self.heads} heads cannot share evenly",
                              "Set encoder.sequence.heads so that each has a whole, even number of them.")
        return Sequence(self, inner, axes)


class Sequence(Encoder):
    """One token for each slice along the first axis of arrays (B, C, T, H, W), after all have been read together.

    slices: what each alone became, before it was hidden and before the others were read. summary: `cls`, the volume's vector,
    of a learned token that reads the slices; `mean` of the tokens. inner: the encoder of one slice.
    """

    def __init__(self, settings: SequenceSettings, inner: Encoder, axes: tuple[Axis, ...]) -> None:
        super().__init__()
        self.takes, self.provides = settings.takes, settings.provides
        self.inner, self.sees, self.width, self.depth = inner, settings.encoder.sees, inner.width, settings.depth
        self.blocks = Blocks(self.width, settings.depth, settings.heads, axes[:1])
        self.mask_token = nn.Parameter(torch.randn(self.width) * 0.02)
        self.cls = nn.Parameter(torch.randn(1, 1, self.width) * 0.02)

    def forward(self, stream: TokenStream, plan: Plan | None = None, *, want: frozenset[str] = frozenset()) -> Encoded:
        if not isinstance(stream, LatticeStream) or stream.lattice is None:
            raise RecipeError("encoder: sequence needs arrays, and this modality's tokens are not cut from one",
                              "Choose encoder: transformer.")
        b, t = len(stream.array), stream.lattice[0]
        alone: Tensor = self.inner(slices_of(stream).seen(self.sees)).summary["mean"].unflatten(0, (b, t))
        x = alone
        if plan is not None:
            hidden = plan.hidden.unflatten(1, (t, -1))
            if bool((hidden.any(2) != hidden.all(2)).any()):
                raise RecipeError("encoder: sequence hides whole slices, and the masking hides parts of some",
                                  "Set masking.….unit=[1, null, null].")
            x = torch.where(hidden.all(2)[..., None], self.mask_token.to(x.dtype), x)
        x = torch.cat([self.cls.to(x.dtype).expand(b, -1, -1), x], 1)
        place = None if stream.position is None else stream.position.unflatten(1, (t, -1))[:, :, 0, :1]
        x, _, _ = self.blocks(x, place, 1)
        valid = torch.ones(b, t, dtype=torch.bool, device=x.device)
        return Encoded(x[:, 1:], {"cls": x[:, 0], "mean": x[:, 1:].mean(1)}, valid, lattice=(t, 1, 1), slices=alone)

    def grid(self, size: tuple[int, ...], patch: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (size[0], 1, 1), (1, *size[1:])

    def layer_groups(self) -> list[list[nn.Parameter]]:
        groups = [*self.inner.layer_groups(), *(list(block.parameters()) for block in self.blocks.blocks)]
        groups[0] += [self.mask_token, self.cls]
        groups[-1] += self.blocks.norm.parameters()
        return groups
