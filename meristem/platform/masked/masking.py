"""Maskings: which tokens an encoder does not get."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from meristem.errors import RecipeError
from meristem.modalities.base import Settings
from meristem.modalities.rng import Rng
from meristem.modalities.stream import TokenStream, gather
from meristem.platform.objectives import Plan
from meristem.platform.slots import Slot

if TYPE_CHECKING:
    from meristem.platform.step import Step

Positive = Annotated[int, Field(ge=1)]
Unit = Positive | tuple[Positive | None, ...]  # tokens per axis; None: as many as the axis has
Fraction = Annotated[float, Field(gt=0, lt=1)]


class RunningCell(Settings):
    """Which places are decoded: a pattern that repeats from cell to cell and moves on by one place with each step along one
    axis (MAR, Qing et al. 2022, section 3.2; as a decoder's masking, VideoMAE V2, Wang et al. 2023, section 3.2).

    ratio: of a cell's places, the fraction that is not decoded, a whole number of them. cell: its places per axis; null marks
    the one axis along which it runs. Each step decodes equally many places, and each place is decoded equally often over as
    many steps as a cell has places. The first step's pattern is drawn for each row.
    """

    ratio: Fraction = 0.5
    cell: tuple[Positive | None, ...] = (None, 2, 2)

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.cell.count(None) != 1:
            raise ValueError(f"cell: exactly one axis is null, the one along which it runs; got {list(self.cell)}")
        skipped = self._places * self.ratio
        if not math.isclose(skipped, round(skipped)) or not 0 < round(skipped) < self._places:
            raise ValueError(f"ratio: {self.ratio:g} of a cell of {self._places} places is not a whole number of them")
        return self

    @property
    def _places(self) -> int:
        return math.prod(n for n in self.cell if n is not None)

    def decode(self, stream: TokenStream, rng: Rng) -> Tensor:
        """(B, m) indices of the places to decode, ascending."""
        if stream.lattice is None:
            raise RecipeError("a running cell needs tokens on a lattice, and these lie on none",
                              "Leave masking.….decode out.")
        if len(self.cell) != len(stream.lattice):
            raise RecipeError(f"a running cell has {len(self.cell)} axes, the tokens {len(stream.lattice)}: {stream.lattice}",
                              "Give masking.….decode.running_cell.cell one entry per axis, null for the one it runs along.")
        in_cells(stream, tuple(n or 1 for n in self.cell))  # whole cells only: all rows decode equally many places
        token = torch.arange(math.prod(stream.lattice), device=rng.key.device)
        step = place = torch.zeros_like(token)  # along the axis it runs; number within the cell
        for at, n in zip(torch.unravel_index(token, stream.lattice), self.cell, strict=True):
            if n is None:
                step = at
            else:
                place = place * n + at % n
        places, skipped = self._places, round(self._places * self.ratio)
        skip = (place + step + rng.integers("decode", places)[:, None]) % places < skipped  # (B, N)
        return skip.to(torch.uint8).argsort(dim=1, stable=True)[:, :len(token) // places * (places - skipped)]


DECODINGS: dict[str, type[Settings]] = {"running_cell": RunningCell}


class Remask(Settings):
    """What a decoder is not given of the encoded tokens, drawn anew for each of its `passes`: the share `ratio` of them, hidden
    from the encoder or not (GraphMAE2, Hou et al. 2023, section 3.2)."""

    passes: Positive = 3
    ratio: Fraction = 0.5


class Masking(Settings):
    """The typed entry of a masking.

    corruption: hidden tokens are dropped before the encoder, or replaced. decode: which places a decoder predicts; null: every
    hidden one. With `decode` it is given a mask token for each of those places, visible ones too, and for no other; the loss
    counts the hidden ones among them. swap: share of the replaced tokens that show the content of another one, drawn among all,
    in place of a mask token (Hou et al. 2022, GraphMAE, section 3). remask: what the predictor does not get of what the encoder
    made of tokens; null: as it works. unlocated: share of the tokens that are not hidden whose place the encoder is not told,
    drawn among those that show anything (Wang et al. 2023, DropPos, section 3.1). hides: of what, in a word.
    orders: whether it decides an order, so that tokens are predicted from those before them.
    """

    hides: ClassVar[str] = "tokens"
    orders: ClassVar[bool] = False
    corruption: Literal["drop", "replace"] = "drop"
    decode: Annotated[RunningCell, Slot("decoder masking", DECODINGS)] | None = None
    swap: Annotated[float, Field(ge=0, lt=1)] = 0.0
    remask: Remask | None = None
    unlocated: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @model_validator(mode="after")
    def _decodes(self) -> Self:
        if self.decode is not None and self.corruption != "drop":
            raise ValueError("decode: only a decoder over dropped tokens has places to leave out; set corruption: drop")
        if self.swap and self.corruption != "replace":
            raise ValueError("swap: a token that is dropped shows nothing; set corruption: replace")
        return self

    def check(self, recipe: Any) -> list[str]:
        """What is impossible about it in this recipe; empty when all is well."""
        problems, sees = [], recipe.encoder.sees
        if self.swap and "swap" not in recipe.encoder.takes:
            problems.append("it swaps contents of tokens, which this encoder cannot take; set swap: 0")
        if self.unlocated and "unlocated" not in recipe.encoder.takes:
            problems.append("it drops places of tokens, which this encoder cannot take; set encoder.transformer.unlocated: "
                            "true, or unlocated: 0")
        if self.unlocated and ("position" not in sees or sees & {"structure", "edges", "kind"}):
            problems.append(f"it drops places of tokens, which this encoder is to be told by position alone; it sees "
                            f"{', '.join(sorted(sees)) or 'nothing'}: set encoder.….sees: [position]")
        return problems

    def decide(self, step: Step, view: str) -> Plan:
        """The plan of a view in this step: of its stream alone, unless a masking looks at more than that."""
        return self.plan(step.stream(view), step.rng("mask", view), step.assembly.encoder.mask_unit)

    def plan(self, stream: TokenStream, rng: Rng, unit: tuple[int, ...]) -> Plan:
        """unit: grain, in tokens per lattice axis, at which the encoder can be masked; () for one token."""
        raise NotImplementedError

    def _finish(self, stream: TokenStream, rng: Rng, hidden: Tensor, live: Tensor, kept: int) -> Plan:
        """hidden, live: (B, N) bool; kept: tokens of each row that are not hidden, the same in every row when dropping."""
        keep = hidden.to(torch.uint8).argsort(dim=1, stable=True)[:, :kept] if self.corruption == "drop" else None
        decode = None if self.decode is None else self.decode.decode(stream, rng)
        return Plan(hidden=hidden, predict=(hidden & live).float(), keep=keep, decode=decode,
                    swap=self._swapped(rng, live) if self.swap else None,
                    remask=None if self.remask is None else self._remasked(rng, live, self.remask),
                    unlocated=_drawn(rng, "unlocated", live & ~hidden, self.unlocated) if self.unlocated else None)

    def _swapped(self, rng: Rng, live: Tensor) -> Tensor:
        n = live.shape[1]
        places = (~live).to(torch.uint8).argsort(dim=1, stable=True)
        drawn = (rng.uniform("swap with", n).double() * live.sum(1, keepdim=True)).long()
        return torch.where(live & (rng.uniform("swap", n) < self.swap), places.gather(1, drawn), -1)

    @staticmethod
    def _remasked(rng: Rng, live: Tensor, remask: Remask) -> Tensor:
        return torch.stack([_drawn(rng, f"remask {k}", live, remask.ratio) for k in range(remask.passes)])


def informative(stream: TokenStream) -> Tensor:
    """(B, N) bool: the tokens that show anything: not padding, and with an element whose weight is not 0."""
    weight = stream.weight
    return stream.valid if weight is None else stream.valid & (weight > 0).any(-1)


def _drawn(rng: Rng, purpose: str, among: Tensor, ratio: float) -> Tensor:
    """(B, N) bool: the share `ratio` of the tokens `among` (B, N), rounded to the nearest, drawn in each row."""
    draw = rng.uniform(purpose, among.shape[1]).masked_fill(~among, 2)  # the others come last
    few = (among.sum(1, keepdim=True).double() * ratio + 0.5).floor()
    return draw.argsort(dim=1, stable=True).argsort(dim=1) < few


def rounded(count: int, ratio: float) -> int:
    return math.floor(count * ratio + 0.5)


def in_cells(stream: TokenStream, *units: int | tuple[int | None, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The common multiple of the units, in tokens per axis (one number: of each), and the lattice of cells that it makes.

    A set of tokens without a lattice is one axis of cells of one token. Raises RecipeError when cells do not fill the lattice.
    """
    coarse = [unit for unit in units if (unit > 1 if isinstance(unit, int) else any(n != 1 for n in unit))]
    if stream.lattice is None:
        if coarse:
            asked = coarse[0] if isinstance(coarse[0], int) else "×".join(str(n or "all") for n in coarse[0])
            raise RecipeError(f"a mask unit of {asked} tokens was asked of tokens that lie on no lattice",
                              "Leave masking.….unit out, or choose an encoder that can be masked token by token.")
        return (1,), (len(stream),)
    lattice = stream.lattice
    unit = (1,) * len(lattice)
    for other in coarse:
        other = (other,) * len(lattice) if isinstance(other, int) else other
        if len(other) != len(lattice):
            raise RecipeError(f"a mask unit has {len(other)} axes, the tokens have {len(lattice)}: {lattice}",
                              "Give masking.….unit one number, or one for each axis.")
        unit = tuple(math.lcm(a, b or n) for a, b, n in zip(unit, other, lattice, strict=True))
    if any(n % u for n, u in zip(lattice, unit, strict=True)):
        raise RecipeError(f"a lattice of {'×'.join(map(str, lattice))} tokens cannot be masked in units of "
                          f"{'×'.join(map(str, unit))}", "Choose a view size that is a multiple of patch × unit on every axis.")
    return unit, tuple(n // u for n, u in zip(lattice, unit, strict=True))


def to_cells(tokens: Tensor, cells: tuple[int, ...], unit: tuple[int, ...]) -> Tensor:
    """(B, N) per token to (B, M, tokens of a cell)."""
    split = [n for pair in zip(cells, unit, strict=True) for n in pair]
    grid = tokens.reshape(-1, *split).permute(0, *range(1, len(split), 2), *range(2, len(split) + 1, 2))
    return grid.reshape(len(tokens), math.prod(cells), -1)


def to_tokens(cell: Tensor, cells: tuple[int, ...], unit: tuple[int, ...]) -> Tensor:
    """(B, M) per cell to (B, N) per token."""
    grid = cell.reshape(-1, *cells)
    for axis, u in enumerate(unit):
        if u > 1:
            grid = grid.repeat_interleave(u, dim=1 + axis)
    return grid.flatten(1)


def first(order: Tensor, live: Tensor, hide: Tensor, hide_live: Tensor) -> Tensor:
    """(B, M) bool: the first `hide_live` (B, 1) of a row's live cells (B, M) in `order` (B, M), which names them before the
    others, and the first of those, so that there are `hide` (B, 1) in all."""
    rank = torch.zeros_like(order).scatter_(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))
    return torch.where(live, rank < hide_live, rank - live.sum(1, keepdim=True) < hide - hide_live)


def feasible(hidden: int, cells: int, ratio: float) -> None:
    if not 0 < hidden < cells:
        raise RecipeError(f"masking {ratio:g} of {cells} cells hides {hidden} of them",
                          "Choose a larger view, a smaller patch or mask unit, or another ratio.")


class Random(Masking):
    """Cells drawn uniformly without replacement (MAE, He et al. 2022, section 3; SimMIM, Xie et al. 2022, section 3.2).

    ratio: hidden fraction, rounded to the nearest cell. unit: grain of the mask in tokens, one number or one per axis, null
    for a whole axis: [null, 1, 1] masks tubes (VideoMAE, Tong et al. 2022, section 3.2); the encoder's own is honoured with it
    (their least common multiple). Every row keeps equally many tokens. The ratio holds among informative tokens and among the
    rest (padding, outside the sample) separately, so that neither a row's padding nor its batch mates change how much of its
    content is hidden; nothing is predicted where there is nothing.
    """

    ratio: Fraction = 0.75
    unit: Unit = 1

    def plan(self, stream: TokenStream, rng: Rng, unit: tuple[int, ...]) -> Plan:
        grain, cells = in_cells(stream, self.unit, unit)
        live = informative(stream)
        live_cell = to_cells(live, cells, grain).any(-1)
        m = live_cell.shape[1]
        hide = rounded(m, self.ratio)
        feasible(hide, m, self.ratio)
        # rank of each cell: the informative ones first, in random order; then the others, in random order
        draw = rng.uniform("cells", m) + (~live_cell).float()
        order = draw.argsort(dim=1, stable=True)
        hide_live = (live_cell.sum(1, keepdim=True).double() * self.ratio + 0.5).floor().long()  # rounds as `hide` does
        hidden = to_tokens(first(order, live_cell, torch.full_like(hide_live, hide), hide_live), cells, grain)
        return self._finish(stream, rng, hidden, live, (m - hide) * math.prod(grain))


class Shares(Masking):
    """A masking whose rows may differ in how much they hide.

    ratio: hidden fraction, or a range it is drawn from for each row. prob: of a row being masked at all. unit: as in `Random`.
    A range or prob < 1 makes the count differ from row to row, which only `replace` can take.
    """

    ratio: Fraction | tuple[Fraction, Fraction] = 0.4
    prob: Annotated[float, Field(gt=0, le=1)] = 1.0
    unit: Unit = 1

    @model_validator(mode="after")
    def _same_count(self) -> Self:
        if isinstance(self.ratio, tuple) and self.ratio[0] > self.ratio[1]:
            raise ValueError(f"ratio: a range goes from low to high, got {list(self.ratio)}")
        if self.corruption == "drop" and (isinstance(self.ratio, tuple) or self.prob < 1):
            raise ValueError("a range of ratios, or prob < 1, hides a different number of tokens in each row, which cannot be "
                             "dropped; set corruption: replace, or one ratio and prob: 1")
        return self

    @property
    def _top(self) -> float:
        return self.ratio[1] if isinstance(self.ratio, tuple) else self.ratio

    def _shares(self, rng: Rng) -> Tensor:
        """(B,) what each row hides of its cells; 0 where it is not masked."""
        if isinstance(self.ratio, tuple):
            ratio = rng.uniform("ratio", low=self.ratio[0], high=self.ratio[1])
        else:
            ratio = torch.full_like(rng.key, self.ratio, dtype=torch.float64)
        return ratio.where(rng.uniform("masked") < self.prob, 0.0)


class Block(Shares):
    """Boxes of cells until the wanted number is reached exactly (BEiT, Bao et al. 2022, algorithm 1; iBOT, Zhou et al. 2022).

    min_block: least cells of a box; its volume is uniform between this and the wanted number. aspect: the ratio of any two
    sides lies in [aspect, 1/aspect]. Departs from BEiT: the last box is cut to fit where BEiT rejects those that do not, and
    works in any dimension; an axis that is one cell long (unit null) is not one of them.
    """

    ratio: Fraction | tuple[Fraction, Fraction] = 0.4
    min_block: Positive = 4
    aspect: Annotated[float, Field(gt=0, le=1)] = 0.3

    def plan(self, stream: TokenStream, rng: Rng, unit: tuple[int, ...]) -> Plan:
        if stream.lattice is None:
            raise RecipeError("block masking needs tokens on a lattice, and these lie on none", "Use `random` masking.")
        grain, cells = in_cells(stream, self.unit, unit)
        m = math.prod(cells)
        most = rounded(m, self._top)
        feasible(most, m, self._top)
        hide = (m * self._shares(rng) + 0.5).floor().long()
        when = self._first_covered(rng, tuple(n for n in cells if n > 1), hide)
        order = when.argsort(dim=1, stable=True)
        rank = torch.zeros_like(order).scatter_(1, order, torch.arange(m, device=order.device).expand_as(order))
        hidden = to_tokens(rank < hide[:, None], cells, grain)
        return self._finish(stream, rng, hidden, informative(stream), (m - most) * math.prod(grain))

    def _first_covered(self, rng: Rng, cells: tuple[int, ...], hide: Tensor) -> Tensor:
        """(B, M): when each cell is hidden."""
        d, boxes = len(cells), enough_boxes(self._top, self.min_block / math.prod(cells))
        least = torch.full_like(hide, self.min_block)
        volume = least[:, None] + rng.uniform("volume", boxes) * (hide - least).clamp_min(0)[:, None]
        stretch = (rng.uniform("aspect", boxes, d) - 0.5) * -math.log(self.aspect)  # any two differ by at most −log aspect
        return first_covered(rng, cells, volume[..., None].pow(1 / d) * (stretch - stretch.mean(-1, keepdim=True)).exp())


def enough_boxes(ratio: float, volume: float) -> int:
    """So many boxes that if all were of this volume, their expected union would exceed the ratio; both parts of the whole."""
    return math.ceil(2 * math.log(1 - ratio) / math.log(1 - min(volume, 0.5))) + 4


def first_covered(rng: Rng, cells: tuple[int, ...], side: Tensor) -> Tensor:
    """(B, M): when boxes at random places, of sides (B, boxes, d), cover each cell: the number of the first box over it; within
    a box, from one of its corners on."""
    m, boxes, device = math.prod(cells), side.shape[1], side.device
    number = torch.arange(boxes, device=device)[None, :, None]
    depth = torch.zeros((), device=device)  # (B, boxes, M): how far from that corner, in sides of the box
    inside = torch.ones((), dtype=torch.bool, device=device)
    for axis, (n, grid) in enumerate(zip(cells, torch.unravel_index(torch.arange(m, device=device), cells), strict=True)):
        length = side[..., axis].round().clamp(1, n)
        start = (rng.uniform(f"start{axis}", boxes) * (n - length + 1)).floor()
        along = (grid + 0.5 - start[..., None]) / length[..., None]
        inside = inside & (along > 0) & (along < 1)
        far = rng.integers(f"corner{axis}", 2, boxes)[..., None]
        depth = torch.maximum(depth, (along - far).abs())
    never = boxes + rng.uniform("rest", m)  # what no box reached is hidden one by one, at random
    return torch.minimum(torch.where(inside, number + depth.clamp(0, 1), torch.inf).amin(1), never)


class HiddenEdges(Masking):
    """Edges drawn uniformly without replacement within each graph, of every type, both directions together; no token.

    ratio: hidden fraction of the linked pairs, rounded to the nearest (EdgeMask, Jin et al. 2020, section 3.2.1).
    """

    hides: ClassVar[str] = "edges"
    ratio: Fraction = 0.1
    corruption: Literal["replace"] = "replace"

    def check(self, recipe: Any) -> list[str]:
        if not recipe.modality.tokenizer().edge_kinds:
            return [f"it hides edges, and {recipe.modality.name} data has none; use it with graphs"]
        sees = recipe.encoder.sees
        if "edges" not in sees:
            return ["it hides edges, and this encoder is not given any; add edges to encoder.….sees"]
        if "structure" in sees:
            return ["encodings of structure are made of all edges and would tell the hidden ones; take structure out of "
                    "encoder.….sees"]
        return []

    def plan(self, stream: TokenStream, rng: Rng, unit: tuple[int, ...]) -> Plan:
        edges = stream.edges
        assert edges is not None  # checked
        ends = edges.index % edges.size
        code = (edges.index[0] // edges.size * edges.size + ends.amin(0)) * edges.size + ends.amax(0)
        linked, pair = code.unique(return_inverse=True)  # ordered by row
        row = linked // edges.size**2
        count = torch.bincount(row, minlength=edges.rows)
        number = torch.arange(len(linked), device=row.device) - (count.cumsum(0) - count)[row]
        drawn = rng.uniform("edges", max(int(count.max()), 1))[row, number]
        order = (row + drawn.double()).argsort(stable=True)  # a row's pairs keep their places among all
        rank = torch.empty_like(number).scatter_(0, order, number)
        chosen = (rank < (count.double() * self.ratio + 0.5).floor()[row])[pair]
        hidden = torch.zeros_like(stream.valid)
        return Plan(hidden=hidden, predict=hidden.float(), edges=chosen)


class Shuffle(Masking):
    """Every token shows the content of another one of its sample, drawn at random: what a sample is not (the corruption of DGI,
    Veličković et al. 2019, section 3.4)."""

    hides: ClassVar[str] = "the order of tokens"
    corruption: Literal["replace"] = "replace"

    def check(self, recipe: Any) -> list[str]:
        return [] if "swap" in recipe.encoder.takes else ["it exchanges the contents of tokens, which this encoder cannot take"]

    def plan(self, stream: TokenStream, rng: Rng, unit: tuple[int, ...]) -> Plan:
        padding = (~stream.valid).float()
        places = padding.argsort(dim=1, stable=True)
        drawn = (rng.uniform("order", len(stream)) + padding).argsort(dim=1, stable=True)
        swap = torch.zeros_like(places).scatter_(1, places, drawn)
        return Plan(hidden=stream.valid, predict=torch.zeros_like(padding), swap=swap)


class Region(Masking):
    """The tokens around a few of them: contiguous masks for sets.

    Source: with one region the block masks of Point-MAE (Pang et al. 2022, section 4.4); with several for those of 3D-JEPA
    (Locate 3D, Arnaud et al. 2025), which are runs along a curve through space.

    ratio: hidden fraction, rounded to the nearest token and kept among informative tokens and among the rest separately, as in
    `Random`. regions: how many tokens are drawn; those nearest to any of them, by their positions in the view, are hidden.
    """

    ratio: Fraction = 0.6
    regions: Positive = 4

    def plan(self, stream: TokenStream, rng: Rng, unit: tuple[int, ...]) -> Plan:
        if math.prod(in_cells(stream, 1, unit)[0]) > 1:
            raise RecipeError("region masking hides single tokens, and this encoder is masked in units of several",
                              "Use `block` masking.")
        if stream.position is None:
            raise RecipeError("region masking needs tokens with positions, and these have none", "Use `random` masking.")
        live, m = informative(stream), len(stream)
        hide = rounded(m, self.ratio)
        feasible(hide, m, self.ratio)
        order = (rng.uniform("regions", m) + (~live).float()).argsort(dim=1, stable=True)
        centre = order[:, :self.regions]
        far = (stream.position[:, :, None] - gather(stream.position, centre)[:, None]).square().sum(-1)
        far = far.masked_fill(~gather(live, centre)[:, None], torch.inf).amin(-1)  # fewer informative tokens than regions
        # the informative ones first, from near to far
        nearest = torch.where(live, far, torch.inf).argsort(dim=1, stable=True)
        hide_live = (live.sum(1, keepdim=True).double() * self.ratio + 0.5).floor().long()  # rounds as `hide` does
        return self._finish(stream, rng, first(nearest, live, torch.full_like(hide_live, hide), hide_live), live, m - hide)


class Nothing(Masking):
    """No token is hidden: for readouts of all tokens of a whole view (region: all)."""

    corruption: Literal["drop", "replace"] = "replace"

    def plan(self, stream: TokenStream, rng: Rng, unit: tuple[int, ...]) -> Plan:
        hidden = torch.zeros_like(stream.valid)
        return self._finish(stream, rng, hidden, informative(stream), len(stream))
