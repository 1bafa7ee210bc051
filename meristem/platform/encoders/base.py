"""The encoder contract: one call, one result, for transformers and convolutions alike."""

from __future__ import annotations

from typing import Any, Self

import torch
from pydantic import field_serializer, field_validator
from torch import Tensor, nn

from meristem.modalities.base import Axis, Settings, Tokenizer
from meristem.modalities.stream import HIDEABLE, TokenStream, gather
from meristem.platform.objectives import Encoded, Plan


def replaced(x: Tensor, plan: Plan, token: Tensor) -> Tensor:
    """Tokens x (B, N, D) with `token` (D,) where the plan hides one, or with the other token that the plan swaps in there."""
    if plan.swap is None:
        return torch.where(plan.hidden[..., None], token.to(x.dtype), x)
    shown = torch.where((plan.swap >= 0)[..., None], gather(x, plan.swap.clamp_min(0)), token.to(x.dtype))
    return torch.where(plan.hidden[..., None], shown, x)


class Parted(nn.Module):
    """A net that is computed part after part."""

    def units(self) -> list[nn.Module]:
        """The parts, each of which is only ever called as a whole: it is recomputed, compiled and sharded on its own."""
        return []


class Encoder(Parted):
    """Tokens or arrays in, `Encoded` out.

    width: D of its tokens. takes: how it can be masked, of {drop, replace, swap, unlocated, order, mix}: `drop` encodes the
    plan's kept tokens only, `replace` puts a learned mask token (or zeros, in convolutions) where content is hidden, `swap`
    another token's content at some of them, `unlocated` a learned vector for the place of a token where the plan tells none,
    `order` keeps tokens from attending to later ones, `mix` encodes several rows in one sequence. provides: what it can
    return, of {cls, mean, sum, max, pyramid, dense, layers, attention}. Both are its settings'. mask_unit: grain, in tokens of
    the stream, at which it can be masked.
    pyramid_widths, pyramid_strides: channels and stride (array elements) of each pyramid level, fine to coarse.
    dense_width: channels of `dense`. depth: how many `layers` there are. told: how wide the vector is that it makes of a number
    that it is told; 0 where it is told none.
    """

    width: int
    takes: frozenset[str] = frozenset()
    provides: frozenset[str] = frozenset({"mean"})
    mask_unit: tuple[int, ...] = ()
    pyramid_widths: tuple[int, ...] = ()
    pyramid_strides: tuple[tuple[int, ...], ...] = ()
    dense_width: int = 0
    depth: int = 0
    told: int = 0

    def forward(self, stream: TokenStream, plan: Plan | None = None, *, want: frozenset[str] = frozenset()) -> Encoded:
        """stream: already reduced to what the recipe's `sees` allows. want: of {pyramid, dense, layers, attention}; or
        only_cls: nothing but `summary["cls"]` will be read, and an encoder may spare the rest.
        """
        raise NotImplementedError

    def grid(self, size: tuple[int, ...], patch: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of a view of `size`, cut by `patch`: the lattice of its tokens, and the array elements that each covers, per axis."""
        return tuple(n // p for n, p in zip(size, patch, strict=True)), patch

    def layer_groups(self) -> list[list[nn.Parameter]]:
        """Parameters from input to output, for layer-wise learning-rate decay; each parameter in one group."""
        raise NotImplementedError


class EncoderSettings(Settings):
    """The typed entry of an encoder in a recipe. sees: stream fields beside content that it is given."""

    sees: frozenset[str] = frozenset({"position"})

    @field_validator("sees")
    @classmethod
    def _may_be_seen(cls, sees: frozenset[str]) -> frozenset[str]:
        allowed = set(HIDEABLE) - {"source"}  # where a token lies in its sample answers most pretexts
        if sees - allowed:
            raise ValueError(f"an encoder cannot be given {', '.join(sorted(sees - allowed))}; "
                             f"it may see any of {', '.join(sorted(allowed))}")
        return sees

    @field_serializer("sees")
    def _in_order(self, sees: frozenset[str]) -> list[str]:
        return sorted(sees)  # a set's order changes from process to process, and the recipe's hash with it

    @property
    def takes(self) -> frozenset[str]:
        """`Encoder.takes` of what these settings build, known before anything is built."""
        return frozenset()

    @property
    def provides(self) -> frozenset[str]:
        """`Encoder.provides` of what these settings build, known before anything is built."""
        return frozenset({"mean"})

    @property
    def tells(self) -> str | None:
        """Which number among a view's parameters the encoder is told, as `condition`; None: none."""
        return None

    def detached(self) -> Self:
        """The same modules, without any file that their first weights come from: a checkpoint brings its own."""
        return self

    def lattice(self, modality: Any, size: tuple[int, ...]) -> tuple[int, ...]:
        """Of the tokens of a view of `size`, of a lattice modality; no weights are made."""
        tokenizer = modality.tokenizer()
        with torch.device("meta"):
            return self.detached().build(tokenizer, modality.axes, modality.channels).grid(size, tokenizer.patch)[0]

    def build(self, tokenizer: Tokenizer, axes: tuple[Axis, ...], channels: int) -> Encoder:
        raise NotImplementedError


ENCODERS: dict[str, type[EncoderSettings]] = {}  # filled by the package; here, since an encoder may hold another
