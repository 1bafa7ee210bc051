"""One step as objectives see it: named views, plans, passes made once and shared."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from meristem.modalities.base import LOOKS, View
from meristem.modalities.rng import Rng
from meristem.modalities.stream import LatticeStream, TokenStream, gather
from meristem.platform import schedules
from meristem.platform.objectives import Encoded, Items, Plan, Units

if TYPE_CHECKING:
    from meristem.platform.assembly import Assembly
    from meristem.platform.foreign import Sight


class Batch:
    """Everything one step may use: who, and the drawn views by name. member: whose step it is, in a joint run."""

    def __init__(self, items: Items, views: dict[str, View], member: str = "") -> None:
        self.items, self.views, self.member = items, views, member

    def to(self, device: torch.device | str) -> Batch:
        items = Items(self.items.row.to(device), self.items.cursor.to(device),
                      {k: v.to(device) for k, v in self.items.labels.items()})
        return Batch(items, {k: v.to(device) for k, v in self.views.items()}, self.member)

    def split(self, parts: int) -> list[Batch]:
        """Micro-batches of equal size, in order."""
        size = len(self.items.row) // parts
        result = []
        for start in range(0, size * parts, size):
            rows = slice(start, start + size)
            items = Items(self.items.row[rows], self.items.cursor[rows], {k: v[rows] for k, v in self.items.labels.items()})
            views = {}
            for name, view in self.views.items():
                chosen = view.select(torch.nonzero((view.item >= start) & (view.item < start + size)).squeeze(1))
                chosen.item = chosen.item - start
                views[name] = chosen
            result.append(Batch(items, views, self.member))
        return result


def drawn_labels(view: View) -> dict[str, Tensor]:
    """What was drawn for each row that a pretext may ask for: the whole numbers (B,) among a view's parameters, but seeds."""
    return {name: x for name, x in view.params.items() if x.ndim == 1 and x.dtype == torch.int64 and not name.endswith("_key")}


class _Gather(torch.autograd.Function):
    """All ranks' rows in rank order; the gradient of a row is summed over the ranks that used it."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def first_rank() -> bool:
    """Whether this process is the one that writes and speaks, known before it joins the others."""
    return int(os.environ.get("RANK", "0")) == 0


def all_ranks(x: Tensor) -> Tensor:
    """Rows (M, …) of every rank in rank order, differentiable; every rank must hold as many. One process: x itself."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return x
    gathered: Tensor = _Gather.apply(x)
    return gathered


class Step:
    """What an objective reads. A pass is keyed by (who encodes, view, masked) and made once, whoever asks first.

    progress: fraction of the run done, for schedules. `passes` lists the passes made, in order, as `recipes show` prints them.
    """

    def __init__(self, assembly: Assembly, batch: Batch, progress: float, seed: int) -> None:
        self.assembly, self.batch, self.progress, self._seed = assembly, batch, progress, seed
        self.passes: list[str] = []
        self._views = dict(batch.views)
        self._streams: dict[str, TokenStream] = {}
        self._plans: dict[str, Plan] = {}
        self._encoded: dict[tuple[str, str, bool, frozenset[str]], Encoded] = {}
        self._sights: dict[tuple[str, str], Sight] = {}
        self._made_units: dict[tuple[str, str, str, str | None, bool], Units] = {}

    def view(self, name: str) -> View:
        """A view of the batch, or one derived from those."""
        if name not in self._views:
            derivation = self.assembly.recipe.derived[name]
            self._views[name] = derivation.derive(self.view(derivation.of), name, self)
        return self._views[name]

    def value(self, x: float | schedules.Ramp) -> float:
        return schedules.value(x, self.progress)

    def rng(self, purpose: str, of: str | Units) -> Rng:
        """Randomness for each row of a view, or for each unit: pure in (seed, sample, look, token, purpose)."""
        if isinstance(of, Units):
            place = of.key["item"] * LOOKS + of.key["view"]
            return Rng.of(self._seed, place * 2**20 + of.key["token"] if "token" in of.key else place, purpose)
        v = self.view(of)
        return Rng.of(self._seed, self.batch.items.cursor[v.item] * LOOKS + v.look, purpose)

    def stream(self, view: str) -> TokenStream:
        if view not in self._streams:
            self._streams[view] = self.assembly.tokenizer.stream(self.view(view))
        return self._streams[view]

    def plan(self, view: str) -> Plan:
        if view not in self._plans:
            masking = self.assembly.recipe.masking[view]
            self._plans[view] = replace(masking.decide(self, view), rng=self.rng("predict", view))
        return self._plans[view]

    def sight(self, by: str, view: str) -> Sight:
        """What the foreign model `by` makes of a view."""
        key = (by, view)
        if key not in self._sights:
            self.passes.append(f"{by}({view})")
            self._sights[key] = self.assembly.foreign[by].look(self.view(view))
        return self._sights[key]

    def encode(self, view: str, by: str = "encoder", masked: bool = False, want: frozenset[str] = frozenset()) -> Encoded:
        """One pass of a view through `encoder` or `teacher`; masked: with the view's plan.

        A pass that was asked for more serves those who want less of it; want only_cls (`Encoder`) is the least.
        """
        def serves(made: frozenset[str]) -> bool:
            return made == want or ("only_cls" not in made and want - {"only_cls"} <= made)

        key = next((k for k in self._encoded if k[:3] == (by, view, masked) and serves(k[3])), (by, view, masked, want))
        if key not in self._encoded:
            encoder = self.assembly.module(by, "encoder")
            plan = self.plan(view) if masked else None
            stream = self.stream(view).seen(self.assembly.recipe.encoder.sees)
            stream = stream if plan is None else plan.shown(stream)
            number = self.assembly.recipe.encoder.tells
            told = {} if number is None else {"condition": self.view(view).params.get(number)}
            self.passes.append(f"{by}({view}{', plan' if masked else ''})")
            with torch.set_grad_enabled(torch.is_grad_enabled() and by == "encoder"):
                encoded: Encoded = encoder(stream, None if plan is None or plan.fill is not None else plan, want=want, **told)
            if encoded.lattice is not None and isinstance(stream, LatticeStream):
                frame = self.view(view).frame
                encoded.frame = frame.coarse(self.assembly.encoder.grid(frame.shape, stream.patch)[1], encoded.lattice)
            self._encoded[key] = encoded
        return self._encoded[key]

    def summary(self) -> Tensor | None:
        """The vectors (B, D) of the first pass of the student, if it made one: means, or class tokens where these are all."""
        first = next((e.summary for (by, *_), e in self._encoded.items() if by == "encoder"), None)
        return None if first is None else first.get("mean", first.get("cls"))

    def units(self, view: str, by: str = "encoder", level: str = "global", head: str | None = None,
              masked: bool = False) -> Units:
        """Encoded view to a table of vectors, through a named head and those that it stands on.

        level: `cls`, `mean`, `sum`, `max`, `global` (cls where there is one, else mean), `dense` (every encoded token),
        `slices` (each alone) or `tiles` (of a montage).
        """
        key = (by, view, level, head, masked)
        if key not in self._made_units:
            if head is None:
                self._made_units[key] = self._units(by, view, level, masked)
            else:
                below = self.units(view, by, level, self.assembly.recipe.heads[head].input, masked)
                with torch.set_grad_enabled(torch.is_grad_enabled() and by == "encoder"):
                    z = self.assembly.module(by, head)(below.z, below.key["view"], below.key["item"])
                self._made_units[key] = below.with_z(z)
        return self._made_units[key]

    def _units(self, by: str, view: str, level: str, masked: bool) -> Units:
        alone = self.assembly.only_cls and level in ("global", "cls")
        encoded = self.encode(view, by, masked, frozenset({"only_cls"} if alone else ()))
        if level == "tiles":
            return self.assembly.recipe.derived[view].tiles(self, view, encoded)
        if level == "global":
            level = "cls" if "cls" in encoded.summary else "mean"
        keys, looks = self.keys(view), self.view(view)
        weight = looks.params.get("pair", torch.ones(len(looks), device=encoded.tokens.device))  # 0: no match was found for it
        point = cube = None
        if level in ("dense", "slices"):
            b, n = encoded.valid.shape
            weight = weight[:, None].expand(b, n)[encoded.valid]
            index = encoded.index
            if index is None:
                index = torch.arange(n, device=encoded.tokens.device)[None].expand(b, -1)
            keys = {k: v[:, None].expand(b, n)[encoded.valid] for k, v in keys.items()}
            keys["token"] = index[encoded.valid]
            kinds = {name: x if encoded.index is None else gather(x, index) for name, x in self.stream(view).kind.items()}
            keys |= {name: x[encoded.valid] for name, x in kinds.items() if x.shape == (b, n)}
            group = self._plans[view].group if masked else 1
            if group > 1:  # who shares a sequence, by the first of them
                first = torch.arange(b, device=index.device) // group * group
                keys["group"] = self.batch.items.cursor[looks.item[first]][:, None].expand(b, n)[encoded.valid]
            if view in self._plans and (masked or by != "encoder") and self._plans[view].hidden.shape == (b, n):
                keys["hidden"] = self._plans[view].hidden[encoded.valid].long()
            source = self.stream(view).source if encoded.frame is None else encoded.frame.centres()
            source = source if source is None or encoded.index is None else gather(source, index)
            if source is not None and source.shape[:2] == (b, n):
                point = source[encoded.valid]
            if encoded.frame is not None:
                keys["cell"] = encoded.frame.diagonal()[:, None].expand(b, n)[encoded.valid]
            each = encoded.tokens if level == "dense" else encoded.slices
            assert each is not None
            z = each[encoded.valid]
        else:
            z = encoded.summary[level]
            if looks.frame.affine.shape[-1] == looks.frame.dims + 1:  # elements of a set carry their own coordinates
                cube = looks.frame.cubes()
        return Units(z, keys, weight, point, cube)

    def keys(self, view: str) -> dict[str, Tensor]:
        """Keys (B,) of the rows of a view: whose, which look, labels, and what was drawn."""
        looks = self.view(view)
        keys = {name: label[looks.item] for name, label in self.batch.items.labels.items()
                if label.ndim == 1 and not label.is_floating_point()}
        keys |= drawn_labels(looks)
        return keys | {"item": self.batch.items.cursor[looks.item], "row": self.batch.items.row[looks.item],
                       "look": looks.look, "view": looks.look + self.assembly.look_offset[view]}

    def gather(self, units: Units, even: bool = False) -> Units:
        """The same units of every rank, in rank order. even: every rank holds as many, which need not be asked then."""
        sizes = [len(units)] if even else all_ranks(torch.tensor([len(units)], device=units.z.device)).tolist()
        most = max(sizes)

        def gathered(x: Tensor) -> Tensor:
            x = all_ranks(F.pad(x, (0, 0) * (x.ndim - 1) + (0, most - len(x))))
            return torch.cat([part[:n] for part, n in zip(x.split(most), sizes, strict=True)]) if min(sizes) < most else x

        return Units(gathered(units.z), {k: gathered(v) for k, v in units.key.items()}, gathered(units.weight),
                     None if units.point is None else gathered(units.point),
                     None if units.cube is None else gathered(units.cube))
