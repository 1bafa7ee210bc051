"""The shared transformer: pre-norm blocks (Dosovitskiy et al. 2021) with rotary positions in physical units."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from meristem.modalities.base import Axis, Tokenizer
from meristem.modalities.stream import Edges, LatticeStream, TokenStream, gather
from meristem.platform.encoders.base import Encoder, EncoderSettings, Parted, replaced
from meristem.platform.encoders.block import Block
from meristem.platform.encoders.conditioning import Adapted, Told
from meristem.platform.encoders.packing import Packing
from meristem.platform.encoders.rotary import Rotary
from meristem.platform.objectives import Encoded, Plan

SIZES = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}
"""width, depth, heads (Touvron et al. 2021; Dosovitskiy et al. 2021)."""


def start_linear(modules: Iterable[nn.Module]) -> None:
    """Linear layers among the modules as He et al. 2022 start theirs: Xavier's uniform weights, no bias."""
    for module in modules:
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)


def even_heads(width: int, heads: int) -> None:
    """Raises ValueError unless each head gets a whole, even number of channels, as rotary positions need."""
    if width % heads or width // heads % 2:
        raise ValueError(f"width {width} in {heads} heads: each head needs a whole, even number of channels")


class Blocks(Parted):
    """`depth` blocks of attention and perceptron with a final norm; encoders and decoders are built of it.

    axes: of the positions it will be given. drop_path: stochastic depth of the last block, rising linearly from 0. tokenizer:
    of tokens that have edges or `structure`: an edge of each type, and its weight, add to each head's attention (Ying et
    al. 2021, Graphormer, section 3.1.2, for edges instead of distances), and what `structure` says is added to the tokens.
    told: numbers of a vector that adapts every block, where there is one. packs: may leave padding out. spares: may leave out
    of the last block what is not read.
    """

    packs = True
    spares = True

    def __init__(self, width: int, depth: int, heads: int, axes: Sequence[Axis], drop_path: float = 0.0,
                 mlp_ratio: float = 4.0, tokenizer: Tokenizer | None = None, told: int = 0) -> None:
        super().__init__()
        self.rotary = Rotary(width // heads, axes) if axes else None
        self.places = tokenizer.places(width) if tokenizer is not None else None
        kinds = tokenizer.edge_kinds if tokenizer is not None else 0
        self.bias = nn.Parameter(torch.zeros(1 + kinds, heads)) if kinds else None  # first: no edge
        values = tokenizer.edge_values if tokenizer is not None else 0
        self.slope = nn.Parameter(torch.zeros(values, heads)) if values else None
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio, drop_path * i / max(depth - 1, 1)) for i in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        start_linear(self.modules())
        self.adapted = nn.ModuleList(Adapted(told, width) for _ in range(depth)) if told else None

    def forward(self, x: Tensor, position: Tensor | None, prefix: int = 0, valid: Tensor | None = None,
                want: frozenset[str] = frozenset(), structure: Tensor | None = None,
                edges: Edges | None = None, order: Tensor | None = None, attend: float | None = None,
                told: Tensor | None = None,
                only: Tensor | None = None) -> tuple[Tensor, list[Tensor] | None, Tensor | None]:
        """Encode tokens x (B, prefix + n, D).

        position: (B, n, C), or None for a set without positions. prefix: tokens in front that have none. valid: (B, n), False
        for padding, which no other token attends to; None where there is none, which is faster. structure: (B, n, S).
        order: (B, n) ranks: a token attends to itself, to those before it and to the prefix, and the prefix to itself.
        attend: the share of the n tokens, those whose keys suit its query best, that a token attends to beside the prefix.
        told: (B, told) the vector that each block goes by. only: (B, m) numbers of the tokens that are read, among prefix + n:
        the last block makes no others, where nothing else is wanted.
        Returns the normed tokens (B, prefix + n, D), or (B, m, D), 0 for padding; if `layers` is wanted the tokens after each
        block, before the norm; if `attention` is wanted the weights (B, H, prefix + n, prefix + n) of the last block.
        """
        if self.places is not None and structure is not None:
            x = x + F.pad(self.places(structure).to(x.dtype), (0, 0, prefix, 0))
        mask = packing = padding = None
        if valid is not None:
            valid = F.pad(valid, (prefix, 0), value=True)
            lengths = tuple(valid.sum(1).tolist())
            pairs = order is not None or attend is not None or "attention" in want  # a table of them is made
            if self.packs and not pairs and told is None:
                packing = Packing.of(valid, lengths)
            if packing is None and sum(lengths) < valid.numel():
                padding = ~valid[..., None]
        if packing is not None:
            x, position = packing.pack(x), None if position is None else packing.pack(F.pad(position, (0, 0, prefix, 0)))
        elif padding is not None and valid is not None:
            x = x.masked_fill(padding, 0)  # 0 · NaN is NaN: what padding holds must not pass through the values
            mask = (valid | ~valid.any(1, keepdim=True))[:, None, None]  # an empty row attends to itself rather than to nothing
            position = None if position is None else position.masked_fill(padding[:, prefix:], 0)
        if order is not None:
            before = F.pad(order[:, :, None] >= order[:, None], (0, 0, prefix, 0))
            before = F.pad(before, (prefix, 0), value=True)[:, None]
            mask = before if mask is None else before & mask | torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
        if self.bias is not None and edges is not None:
            bias = self.bias[edges.dense()]
            if self.slope is not None and edges.value is not None:
                bias = bias + edges.dense_value() @ self.slope
            bias = F.pad(bias.permute(0, 3, 1, 2), (prefix, 0, prefix, 0)).to(x.dtype)
            if packing is not None and valid is not None:
                mask = (valid | ~valid.any(1, keepdim=True))[:, None, None]
            mask = bias if mask is None else bias.masked_fill(~mask, float("-inf"))
        rope = None
        if position is not None and self.rotary is not None:
            rope = self.rotary(position, prefix if packing is None else 0)

        def placed(x: Tensor) -> Tensor:
            """Tokens at their places (B, prefix + n, D), 0 where padding is."""
            return packing.unpack(x) if packing is not None else x if padding is None else x.masked_fill(padding, 0)

        layers: list[Tensor] = []
        attention: Tensor | None = None
        plain = mask is None and packing is None and padding is None and attend is None and self.adapted is None
        spare = self.spares and plain and not want
        block: Any
        for i, block in enumerate(self.blocks):
            weigh = "attention" in want and i == len(self.blocks) - 1
            adapted = None if self.adapted is None else self.adapted[i]
            kept = block.drawn(x, packing) if adapted is None else None
            asked = only if spare and i == len(self.blocks) - 1 else None
            x, attention = block(x, rope, mask, packing, kept, told, adapted, attend, prefix, weigh, asked)
            if "layers" in want:
                layers.append(placed(x))
        x = placed(self.norm(x))
        x = x if only is None or spare else gather(x, only)
        return x, layers if "layers" in want else None, attention

    def units(self) -> list[nn.Module]:
        return list(self.blocks)


def _together(x: Tensor, group: int) -> Tensor:
    """(B, n, …) to (B / group, group · n, …): rows that follow each other become one sequence."""
    return x if group == 1 else x.unflatten(0, (-1, group)).flatten(1, 2)


def _apart(x: Tensor, group: int) -> Tensor:
    """The inverse: each row gets its own tokens back."""
    return x if group == 1 else x.unflatten(1, (group, -1)).flatten(0, 1)


class TransformerSettings(EncoderSettings):
    """size: a named size; width, depth, heads override it. cls: has a class token. drop_path: of the last block. unlocated:
    can be kept from knowing the places of tokens. condition: the number among a view's parameters that it is told, 0 for views
    that have none.
    """

    size: Literal["tiny", "small", "base", "large"] = "small"
    width: int | None = None
    depth: int | None = None
    heads: int | None = None
    cls: bool = True
    drop_path: float = 0.0
    mlp_ratio: float = 4.0
    unlocated: bool = False
    condition: str | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(width, depth, heads)."""
        width, depth, heads = SIZES[self.size]
        return self.width or width, self.depth or depth, self.heads or heads

    @property
    def takes(self) -> frozenset[str]:
        return frozenset({"drop", "replace", "swap", "order", "mix"} | ({"unlocated"} if self.unlocated else set()))

    @property
    def provides(self) -> frozenset[str]:
        return frozenset({"mean", "max", "layers", "attention"} | ({"cls"} if self.cls else set()))

    @property
    def tells(self) -> str | None:
        return self.condition

    @model_validator(mode="after")
    def _divides(self) -> Self:
        width, _, heads = self.shape
        even_heads(width, heads)
        return self

    def build(self, tokenizer: Tokenizer, axes: tuple[Axis, ...], channels: int) -> Transformer:
        return Transformer(self, tokenizer, axes)


class Transformer(Encoder):
    """Tokens of any modality. `drop` embeds and encodes the kept tokens only; `replace` puts a learned token for hidden ones.

    A token that the plan does not locate is not rotated, and a learned vector on its content says so. Rows that the plan puts
    into one sequence share its class token; `mean` and `max` are of a row's own tokens.

    `layers` are tokens after each block without the class token; `attention` holds the class token first.
    """

    def __init__(self, settings: TransformerSettings, tokenizer: Tokenizer, axes: tuple[Axis, ...]) -> None:
        super().__init__()
        self.takes, self.provides = settings.takes, settings.provides
        self.width, self.depth, heads = settings.shape
        self.embed = tokenizer.embedding(self.width)
        self.told = self.width if settings.condition is not None else 0
        self.blocks = Blocks(self.width, self.depth, heads, axes, settings.drop_path, settings.mlp_ratio, tokenizer, self.told)
        self.mask_token = nn.Parameter(torch.randn(self.width) * 0.02)
        self.cls = nn.Parameter(torch.randn(1, 1, self.width) * 0.02) if settings.cls else None
        self.nowhere = nn.Parameter(torch.randn(self.width) * 0.02) if settings.unlocated else None
        self.condition = Told(self.width) if self.told else None

    def forward(self, stream: TokenStream, plan: Plan | None = None, *, want: frozenset[str] = frozenset(),
                condition: Tensor | None = None) -> Encoded:
        keep = None if plan is None else plan.keep
        tokens = stream if keep is None else stream.take(keep)
        x = self.embed(tokens)
        if plan is not None and keep is None:
            x = replaced(x, plan, self.mask_token)
        position = tokens.position
        if plan is not None and plan.unlocated is not None and self.nowhere is not None:
            lost = (plan.unlocated if keep is None else gather(plan.unlocated, keep))[..., None]
            x = torch.where(lost, x + self.nowhere.to(x.dtype), x)
            position = None if position is None else position.masked_fill(lost, 0)  # turned by nothing, wherever it lies
        prefix, group = 0, 1 if plan is None else plan.group
        x, position = _together(x, group), None if position is None else _together(position, group)
        if self.cls is not None:
            prefix = 1
            x = torch.cat([self.cls.to(x.dtype).expand(x.shape[0], -1, -1), x], 1)
        # a lattice has no padding; knowing it spares the device a round trip
        valid = None if isinstance(stream, LatticeStream) else tokens.valid
        told = None if self.condition is None else self.condition(x.new_zeros(len(x)) if condition is None else condition)
        order = None if plan is None or plan.order is None else plan.order if keep is None else gather(plan.order, keep)
        only = x.new_zeros(len(x), 1, dtype=torch.int64) if prefix and "only_cls" in want else None
        attend = None if plan is None else plan.attend
        x, layers, attention = self.blocks(x, position, prefix, valid, want - {"only_cls"}, tokens.structure, tokens.edges,
                                           order, attend, told, only)
        if only is not None:
            return Encoded(x[:, :0], {"cls": x[:, 0].repeat_interleave(group, 0)}, tokens.valid[:, :0], told=told)
        summary = {"cls": x[:, 0].repeat_interleave(group, 0)} if prefix else {}
        x = _apart(x[:, prefix:], group)
        weight = tokens.valid[..., None].to(x.dtype)
        summary["mean"] = (x * weight).sum(1) / weight.sum(1).clamp_min(1)
        summary["max"] = x.masked_fill(~tokens.valid[..., None], torch.finfo(x.dtype).min).amax(1)
        return Encoded(x, summary, tokens.valid, index=keep, lattice=stream.lattice, attention=attention, told=told,
                       layers=None if layers is None else [_apart(layer[:, prefix:], group) for layer in layers])

    def layer_groups(self) -> list[list[nn.Parameter]]:
        stem = [*self.embed.parameters(), self.mask_token, *(p for p in (self.cls, self.nowhere) if p is not None),
                *(() if self.condition is None else self.condition.parameters())]
        groups = [stem, *(list(block.parameters()) for block in self.blocks.blocks)]
        for group, adapted in zip(groups[1:], self.blocks.adapted or (), strict=False):
            group += adapted.parameters()
        groups[-1] += self.blocks.norm.parameters()
        return groups
