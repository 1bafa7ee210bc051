"""The encoder waist: a set of tokens, and which of its fields an encoder may see."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from meristem.modalities.frame import Frame

HIDEABLE = ("position", "source", "structure", "kind", "aux", "weight", "edges", "item")


def gather(x: Tensor, index: Tensor) -> Tensor:
    """Rows `index` (B, n) of x (B, N, …) -> (B, n, …)."""
    shape = index.shape + (1,) * (x.ndim - 2)
    return torch.gather(x, 1, index.reshape(shape).expand(*index.shape, *x.shape[2:]))


def fold(content: Tensor, lattice: tuple[int, ...], patch: tuple[int, ...]) -> Tensor:
    """Content (B, N, C·prod(patch)) of a whole lattice of tokens to the array (B, C, *S) they are cut from."""
    d = len(lattice)
    cells = content.reshape(len(content), *lattice, -1, *patch)
    order = [0, d + 1, *(axis for i in range(d) for axis in (1 + i, d + 2 + i))]
    return cells.permute(order).reshape(len(content), -1, *(g * p for g, p in zip(lattice, patch, strict=True)))


def mostly_zero(x: Tensor) -> bool:
    """Whether so few numbers are not 0 (bags of words) that a processor is faster when it deals with those alone."""
    return x.device.type == "cpu" and int(x.count_nonzero()) < 0.1 * x.numel()


@dataclass(frozen=True)
class Edges:
    """Directed edges between the elements of each row of a batch; an undirected one is both of its directions. No self-loops.

    index: (2, E) int64, places row · size + element; a message goes from index[0] to index[1]. kind: (E,) int64, the type, 0
    where there is one type. value: (E, K) float, features of edges, or None. rows, size: of the batch (rows, size, …) that the
    places are counted in.
    """

    index: Tensor
    kind: Tensor
    value: Tensor | None
    rows: int
    size: int

    def __len__(self) -> int:
        return self.index.shape[1]

    def where(self, chosen: Tensor) -> Edges:
        """The edges `chosen` ((E,) bool, or their numbers)."""
        return replace(self, index=self.index[:, chosen], kind=self.kind[chosen],
                       value=None if self.value is None else self.value[chosen])

    def select(self, rows: Tensor) -> Edges:
        """Those of the given rows (n,), distinct, as a batch of its own."""
        place = torch.full((self.rows,), -1, dtype=torch.int64, device=rows.device)
        place[rows] = torch.arange(len(rows), device=rows.device)
        inside = self.where(place[self.index[0] // self.size] >= 0)
        moved = place[inside.index // self.size] * self.size + inside.index % self.size
        return replace(inside, index=moved, rows=len(rows))

    def take(self, index: Tensor) -> Edges:
        """Those among the elements `index` (B, n), distinct, of each row."""
        n = index.shape[1]
        flat = index + torch.arange(self.rows, device=index.device)[:, None] * self.size
        place = torch.full((self.rows * self.size,), -1, dtype=torch.int64, device=index.device)
        place[flat.flatten()] = torch.arange(flat.numel(), device=index.device)
        moved = place[self.index]
        inside = (moved >= 0).all(0)
        return replace(self.where(inside), index=moved[:, inside], size=n)

    def dense(self) -> Tensor:
        """(rows, size, size) int64, [b, target, source]: type + 1 of the edge, 0 where there is none; the last of several."""
        table = torch.zeros(self.rows * self.size, self.size, dtype=torch.int64, device=self.index.device)
        table[self.index[1], self.index[0] % self.size] = self.kind + 1
        return table.unflatten(0, (self.rows, self.size))

    def dense_value(self) -> Tensor:
        """(rows, size, size, K), [b, target, source]: the edge's features, 0 where there is none."""
        assert self.value is not None
        table = self.value.new_zeros(self.rows * self.size, self.size, self.value.shape[1])
        table[self.index[1], self.index[0] % self.size] = self.value
        return table.unflatten(0, (self.rows, self.size))

    def to(self, device: torch.device | str) -> Edges:
        def move(x: Tensor) -> Tensor:
            return x.to(device, non_blocking=True)

        return replace(self, index=move(self.index), kind=move(self.kind),
                       value=None if self.value is None else move(self.value))


@dataclass
class TokenStream:
    """Tokens of a batch, before any embedding.

    content: (B, N, P) raw content of each token.
    position: (B, N, C) centre of each token in the view's own frame, in the modality's unit.
    source: (B, N, C) where the token lies in the source sample. For objectives only, never for an encoder.
    valid: (B, N) bool; False for padding.
    item: (B,) which sample of the batch each row shows.
    structure: (B, N, S) encodings of each token's place among the others (walks, eigenvectors of a graph); not its content.
    kind: name -> (B, N) int64 (channel, segment, place in the sample, …). aux: name -> (B, N, …) fields for targets only.
    weight: (B, N, P) weight of each element in a loss (0 for padding or defaced voxels), or None.
    edges: between tokens.
    lattice: the token grid's shape when the tokens lie on one, in raster order.
    """

    content: Tensor
    position: Tensor | None
    valid: Tensor
    item: Tensor | None
    source: Tensor | None = None
    structure: Tensor | None = None
    kind: Mapping[str, Tensor] = field(default_factory=dict)
    aux: Mapping[str, Tensor] = field(default_factory=dict)
    weight: Tensor | None = None
    edges: Edges | None = None
    lattice: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return self.valid.shape[1]

    @property
    def batch(self) -> int:
        return self.valid.shape[0]

    def take(self, index: Tensor) -> TokenStream:
        """The tokens `index` (B, n) of each row."""
        def pick(x: Tensor | None) -> Tensor | None:
            return None if x is None else gather(x, index)

        return TokenStream(gather(self.content, index), pick(self.position), gather(self.valid, index), self.item,
                           pick(self.source), pick(self.structure), {k: gather(v, index) for k, v in self.kind.items()},
                           {k: gather(v, index) for k, v in self.aux.items()}, pick(self.weight),
                           None if self.edges is None else self.edges.take(index))

    def showing(self, content: Tensor) -> TokenStream:
        """The same tokens with other content (B, N, P)."""
        return replace(self, content=content)

    def seen(self, sees: frozenset[str]) -> TokenStream:
        """What an encoder is given: content, validity, and only the named fields; the rest is gone, not merely ignored."""
        empty: dict[str, Any] = {"kind": {}, "aux": {}}
        gone: dict[str, Any] = {name: empty.get(name) for name in HIDEABLE if name not in sees}
        return replace(self, **gone)


class LatticeStream(TokenStream):
    """Tokens cut from a dense array (B, C, *shape) by a patch size; made lazily, and only those asked for.

    content of a token is its patch flattened as (channel, *patch). `array` is kept for encoders that eat it whole.
    """

    def __init__(self, array: Tensor, patch: tuple[int, ...], frame: Frame | None, item: Tensor | None,
                 weight_array: Tensor | None = None, aux: Mapping[str, Tensor] | None = None,
                 visible: frozenset[str] | None = None) -> None:
        self.array: Tensor = array
        self.patch, self.frame, self.item = patch, frame, item
        self.weight_array, self.aux, self.kind, self.structure, self.edges = weight_array, aux or {}, {}, None, None
        self.lattice = tuple(n // p for n, p in zip(array.shape[2:], patch, strict=True))
        self._visible = visible

    # the eager fields of the base class, computed on demand; a field that is not visible does not exist
    @cached_property
    def content(self) -> Tensor:  # type: ignore[override]
        return self._cut(self.array, None)

    @cached_property
    def position(self) -> Tensor | None:  # type: ignore[override]
        return self.frame.local(self._centres(None)) if self.frame is not None and self._may("position") else None

    @cached_property
    def source(self) -> Tensor | None:  # type: ignore[override]
        return self.frame.to_source(self._centres(None)) if self.frame is not None and self._may("source") else None

    @cached_property
    def weight(self) -> Tensor | None:  # type: ignore[override]
        return self._cut(self.weight_array, None) if self.weight_array is not None and self._may("weight") else None

    @cached_property
    def valid(self) -> Tensor:  # type: ignore[override]
        n = 1
        for g in self.lattice or ():
            n *= g
        return torch.ones(self.array.shape[0], n, dtype=torch.bool, device=self.array.device)

    def _may(self, name: str) -> bool:
        return self._visible is None or name in self._visible

    def _centres(self, index: Tensor | None) -> Tensor:
        """Lattice indices (B, n, C) of the token centres."""
        device, batch = self.array.device, self.array.shape[0]
        if index is None:
            index = torch.arange(self.valid.shape[1], device=device)[None].expand(batch, -1)
        assert self.lattice is not None
        grid = torch.stack(torch.unravel_index(index, self.lattice), -1).to(torch.float32)
        patch = torch.tensor(self.patch, device=device, dtype=torch.float32)
        return grid * patch + (patch - 1) / 2

    def _cut(self, array: Tensor, index: Tensor | None) -> Tensor:
        """Patches of `array` (B, C, *shape): (B, n, C·prod(patch)), copying the chosen ones only."""
        assert self.lattice is not None
        b, c = array.shape[:2]
        d = len(self.patch)
        for axis, (g, p) in enumerate(zip(self.lattice, self.patch, strict=True)):
            array = array.narrow(2 + axis, 0, g * p)  # a remainder smaller than a patch belongs to no token
        split = [n for pair in zip(self.lattice, self.patch, strict=True) for n in pair]
        cells = array.reshape(b, c, *split).permute(0, *range(2, 2 + 2 * d, 2), 1, *range(3, 3 + 2 * d, 2))
        if index is None:
            return cells.reshape(b, -1, c * cells.shape[d + 2:].numel())
        rows = torch.arange(b, device=array.device)[:, None]
        return cells[(rows, *torch.unravel_index(index, self.lattice))].flatten(2)

    def take(self, index: Tensor) -> TokenStream:
        frame = self.frame
        centres = self._centres(index) if frame is not None else None
        return TokenStream(
            content=self._cut(self.array, index),
            position=frame.local(centres) if frame is not None and centres is not None and self._may("position") else None,
            valid=gather(self.valid, index), item=self.item,
            source=frame.to_source(centres) if frame is not None and centres is not None and self._may("source") else None,
            aux={k: gather(v, index) for k, v in self.aux.items()},
            weight=self._cut(self.weight_array, index) if self.weight_array is not None and self._may("weight") else None)

    def seen(self, sees: frozenset[str]) -> LatticeStream:
        if self._visible is not None:
            sees &= self._visible  # what is gone stays gone
        frame = self.frame if sees & {"position", "source"} else None
        if frame is not None and "source" not in sees:
            own = torch.cat([frame.spacing, torch.ones_like(frame.spacing[:, :1])], 1)
            frame = replace(frame, affine=torch.diag_embed(own))
        return LatticeStream(self.array, self.patch, frame, self.item if "item" in sees else None,
                             self.weight_array if "weight" in sees else None, self.aux if "aux" in sees else None, sees)

    def showing(self, content: Tensor) -> LatticeStream:
        """The same tokens with other content (B, N, P); what belongs to no token stays."""
        assert self.lattice is not None
        array, made = self.array.clone(), fold(content, self.lattice, self.patch)
        covered: tuple[Any, ...] = (..., *map(slice, made.shape[2:]))
        array[covered] = made.to(array)
        return self.with_array(array)

    def with_array(self, array: Tensor) -> LatticeStream:
        """The same tokens with other content (a corrupted copy)."""
        return LatticeStream(array, self.patch, self.frame, self.item, self.weight_array, self.aux, self._visible)
