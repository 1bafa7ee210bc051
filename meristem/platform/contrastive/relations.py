"""Relations: which units attract and which repel each other, from an expression over their keys.

An expression combines terms with `&` (and), `|` (or), `-` (and not) and `~` (not), with Python's precedence:
`same(item) - same(view)` pairs the looks of a sample, `same(item) & same(view) & same(token) & hidden` a hidden token with
itself, `near(0.1) & same(item) - same(view)` tokens of two looks that show one place. A term may hold in part, from 0 to 1,
as `overlap` does: `&` multiplies, `|` takes the larger, `~` what is left to 1.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches

import torch
from torch import Tensor

from meristem.errors import RecipeError
from meristem.platform.contrastive.overlap import overlap
from meristem.platform.objectives import Pairs, Units

Keys = Mapping[str, Tensor]
IDENTITY = ("item", "view", "token", "slot")  # what tells one unit from another
ONLY = "only"  # of a key unit that was made for one query: that query's number; −1: all meet it


@dataclass(frozen=True)
class Term:
    """A predicate of a query and a key unit.

    holds: keys of queries and of keys, of shapes that broadcast, to bool, or to a share from 0 to 1. joins: keys that are equal
    wherever it holds. reads: keys that it needs.
    """

    holds: Callable[[Keys, Keys], Tensor]
    joins: frozenset[str]
    reads: frozenset[str]


def same(*keys: str) -> Term:
    """All of these keys are equal, and known: a negative label is nobody's."""
    if not keys or not all(isinstance(key, str) for key in keys):
        raise ValueError("same(…) needs one key or more, e.g. same(item)")

    def holds(q: Keys, k: Keys) -> Tensor:
        equal = [(q[name] == k[name]) & (q[name] >= 0) for name in keys]
        return torch.stack(torch.broadcast_tensors(*equal)).all(0) if len(equal) > 1 else equal[0]

    return Term(holds, frozenset(keys), frozenset(keys))


def hidden(*keys: str) -> Term:
    """The query's content was hidden from the encoder."""
    if keys:
        raise ValueError("hidden takes no key")
    def holds(q: Keys, k: Keys) -> Tensor:
        return (q["hidden"] > 0) & torch.ones_like(k["item"], dtype=torch.bool)

    return Term(holds, frozenset(), frozenset({"hidden"}))


def near(*arguments: str | float) -> Term:
    """Their places in the samples' own coordinates are at most so far apart: in the modality's unit, millimetres or metres.

    near(r, cell): in diagonals of the larger of the two cells of their maps (PixPro, Xie et al. 2021, equation 1).
    """
    radius, cells = arguments[0] if arguments else "", arguments[1:] == ("cell",)
    if isinstance(radius, str) or not 0 < radius < math.inf or not (cells or len(arguments) == 1):
        raise ValueError("near(…) needs one distance, e.g. near(0.1), or near(0.7, cell) for cells of maps")

    def holds(q: Keys, k: Keys) -> Tensor:
        axes = zip(q["point"].unbind(-1), k["point"].unbind(-1), strict=True)  # a table (Mq, Mk, C) of them would be large
        squares = [(a - b).square_() for a, b in axes]
        distance = squares[0]
        for square in squares[1:]:
            distance = distance + square
        return distance <= ((radius * torch.maximum(q["cell"], k["cell"])) ** 2 if cells else radius**2)

    return Term(holds, frozenset(), frozenset({"point", "cell"} if cells else {"point"}))


def overlapping(*keys: str) -> Term:
    """The share of the box that the query shows of their sample which the key shows too."""
    if keys:
        raise ValueError("overlap takes no key")
    return Term(lambda q, k: overlap(q["cube"], k["cube"]), frozenset(), frozenset({"cube"}))


TERMS: dict[str, Callable[..., Term]] = {"same": same, "hidden": hidden, "near": near, "overlap": overlapping}


def _and(a: Tensor, b: Tensor) -> Tensor:
    return a & b if a.dtype == b.dtype == torch.bool else a * b


def _or(a: Tensor, b: Tensor) -> Tensor:
    return a | b if a.dtype == b.dtype == torch.bool else torch.maximum(a.float(), b.float())


def _not(a: Tensor) -> Tensor:
    return ~a if a.dtype == torch.bool else 1 - a


def _term(node: ast.expr) -> Term:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert):
        inner = _term(node.operand)
        return Term(lambda q, k: _not(inner.holds(q, k)), frozenset(), inner.reads)
    if isinstance(node, ast.BinOp):
        a, b = _term(node.left), _term(node.right)
        if isinstance(node.op, ast.BitAnd):
            return Term(lambda q, k: _and(a.holds(q, k), b.holds(q, k)), a.joins | b.joins, a.reads | b.reads)
        if isinstance(node.op, ast.BitOr):
            return Term(lambda q, k: _or(a.holds(q, k), b.holds(q, k)), a.joins & b.joins, a.reads | b.reads)
        if isinstance(node.op, ast.Sub):
            return Term(lambda q, k: _and(a.holds(q, k), _not(b.holds(q, k))), a.joins, a.reads | b.reads)
    name, arguments = node, []
    if isinstance(node, ast.Call) and not node.keywords:
        name, arguments = node.func, node.args
    if not isinstance(name, ast.Name) or not all(map(_is_argument, arguments)):
        raise ValueError(f"'{ast.unparse(node)}' is not a term; write terms like same(item), joined by & | - ~")
    if name.id not in TERMS:
        near = get_close_matches(name.id, TERMS) or list(TERMS)
        raise ValueError(f"no term called '{name.id}'; did you mean {' or '.join(near)}?")
    return TERMS[name.id](*(a.id if isinstance(a, ast.Name) else ast.literal_eval(a) for a in arguments))


def _is_argument(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) or (isinstance(node, ast.Constant) and type(node.value) in (int, float))


def parse(text: str) -> Term:
    """An expression to a predicate; nothing is executed. Raises ValueError that names the wrong part."""
    try:
        return _term(ast.parse(text.strip(), mode="eval").body)
    except SyntaxError:
        raise ValueError(f"'{text}' is not an expression; write terms like same(item), joined by & | - ~") from None


@dataclass(frozen=True)
class Matches:
    """A relation's attraction as a list: query q[n] is drawn to key k[n] with weight[n]; all (n,)."""

    q: Tensor
    k: Tensor
    weight: Tensor


class Relation:
    """What attracts, and what may repel: everything that does not attract, but the unit itself.

    text: expression of attraction. negatives: expression that what repels must also meet; null: no condition.
    Raises ValueError.
    """

    def __init__(self, text: str, negatives: str | None = None) -> None:
        self.text = text
        self.attracts = parse(text)
        self.repels = None if negatives is None else parse(negatives)
        self.reads = self.attracts.reads | (self.repels.reads if self.repels is not None else frozenset())

    def pairs(self, q: Units, k: Units) -> Pairs:
        """All pairs: pos, neg (Mq, Mk), weighted by the key unit's weight."""
        self._need(q, k, self.reads)
        rows, columns = {n: x[:, None] for n, x in _keys(q).items()}, {n: x[None] for n, x in _keys(k).items()}
        pos = self.attracts.holds(rows, columns)
        itself = same(*(n for n in IDENTITY if n in q.key and n in k.key)).holds(rows, columns)
        neg = (pos == 0) & ~itself
        if self.repels is not None:
            neg = _and(neg, self.repels.holds(rows, columns))
        if ONLY in k.key:
            met = _met(k, torch.arange(len(q), device=pos.device)[:, None])
            pos, neg = pos & met, neg & met
        return Pairs(pos * k.weight, neg * k.weight)

    def matches(self, q: Units, k: Units) -> Matches:
        """Attraction alone, as a list ordered by query; no (Mq, Mk) table where the expression demands equal keys."""
        self._need(q, k, self.attracts.reads)
        i, j = _join(q, k, sorted(self.attracts.joins))
        holds = self.attracts.holds({n: x[i] for n, x in _keys(q).items()}, {n: x[j] for n, x in _keys(k).items()})
        i, j = i[holds], j[holds]
        if ONLY in k.key:
            met = _met(k.select(j), i)
            i, j = i[met], j[met]
        return Matches(i, j, q.weight[i] * k.weight[j])

    def _need(self, q: Units, k: Units, reads: frozenset[str]) -> None:
        ours, theirs = _keys(q), _keys(k)
        if "cube" in reads and not ("cube" in ours and "cube" in theirs):
            raise RecipeError(f"the relation '{self.text}' asks which box of its sample a unit shows, and these show none",
                              "Use whole looks at images or volumes: level: global or mean, and no queue.")
        lacking = sorted(n for n in reads if n not in ours or (n not in theirs and n != "hidden"))
        if {"point", "cell"}.intersection(lacking):
            raise RecipeError(f"the relation '{self.text}' asks where units lie, and these have no place in their sample",
                              "Use tokens with positions, and an encoder that keeps them.")
        if lacking:
            raise RecipeError(f"the relation '{self.text}' needs the key '{lacking[0]}', which these units do not have",
                              f"They have {', '.join(sorted(q.key))}; level: dense adds token, and hidden where masked.")


def _met(k: Units, query: Tensor) -> Tensor:
    """Whether the queries of these numbers meet the key units."""
    return (k.key[ONLY] < 0) | (k.key[ONLY] == query)


def _keys(units: Units) -> dict[str, Tensor]:
    """By name: the keys (M,) of units and, where they have any, their points (M, C) and cubes (M, C+1, C+1)."""
    places = {"point": units.point, "cube": units.cube}
    return {**units.key, **{name: x for name, x in places.items() if x is not None}}


def _join(q: Units, k: Units, names: list[str]) -> tuple[Tensor, Tensor]:
    """Indices (n,), (n,) of the pairs whose keys `names` are equal, ordered by query; all pairs without names."""
    ids = torch.zeros(len(q) + len(k), dtype=torch.int64, device=q.z.device)
    for name in names:
        values = torch.unique(torch.cat([q.key[name], k.key[name]]), return_inverse=True)[1]
        ids = torch.unique(ids * (len(q) + len(k)) + values, return_inverse=True)[1]
    mine, theirs = ids[:len(q)], ids[len(q):]
    theirs, order = theirs.sort(stable=True)
    first, end = torch.searchsorted(theirs, mine), torch.searchsorted(theirs, mine, right=True)
    count = end - first
    i = torch.repeat_interleave(torch.arange(len(q), device=ids.device), count)
    place = torch.arange(len(i), device=ids.device) - (count.cumsum(0) - count)[i]
    return i, order[first[i] + place]
