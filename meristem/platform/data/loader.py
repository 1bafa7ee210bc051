"""Batches of drawn views of stored samples, by a counter: any batch can be made again, alone, on any rank, in any worker."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from meristem.errors import DataError, MeristemError, RecipeError
from meristem.modalities.base import EXCLUDED, LOOKS, Draw, Header, Links, Look, Modality, View, ViewSettings
from meristem.modalities.frame import Frame
from meristem.modalities.rng import Rng
from meristem.modalities.stream import Edges
from meristem.platform.data.composer import Matching
from meristem.platform.data.manifest import Row
from meristem.platform.data.samples import Order, Samples
from meristem.platform.data.workers import DEATH, killed, lose_nothing, notice_deaths_where_waited
from meristem.platform.objectives import Items
from meristem.platform.recipe import Recipe
from meristem.platform.step import Batch

DEATHS = 3  # of loading processes that a run outlives
IGNORED = -1  # label of what has none, class or mask


class Loader:
    """Iterates the batches of one rank. waited: seconds spent waiting for them so far."""

    def __init__(self, batches: _Batches, start: int, steps: int, workers: int) -> None:
        self._batches, self._start, self._steps, self._workers = batches, start, steps, workers
        self.waited = 0.0

    def __len__(self) -> int:
        return max(self._steps - self._start, 0)

    def __iter__(self) -> Iterator[Batch]:
        done = deaths = 0
        stream = self._stream(self._start)
        while True:
            asked = time.perf_counter()
            try:
                batch = next(stream, None)
            except DEATH as error:
                if not killed(error):
                    raise
                deaths += 1
                if deaths > DEATHS:
                    raise MeristemError(f"the processes that load data were killed {deaths} times", "Memory may be short: "
                                        "lower train.workers or the size of views. --resume goes on.") from None
                print("a process that loads data was killed, and is started again: memory may be short", file=sys.stderr)
                stream = self._stream(self._start + done)
                continue
            finally:
                self.waited += time.perf_counter() - asked
            if batch is None:
                return
            if isinstance(batch, DataError):
                raise batch
            done += 1
            yield batch

    def _stream(self, start: int) -> Iterator[Batch | DataError]:
        # a generator of its own: DataLoader would draw a seed from the global one, and a resumed run would differ
        stream = iter(DataLoader(self._batches, batch_size=None, sampler=range(start, self._steps),
                                 num_workers=self._workers, collate_fn=_same, generator=torch.Generator(),
                                 worker_init_fn=_leave_to_the_loop,
                                 pin_memory=torch.cuda.is_available(), prefetch_factor=4 if self._workers else None))
        if self._workers:
            notice_deaths_where_waited()
        return stream


def loader(cache: Samples, rows: Sequence[Row], recipe: Recipe, *, fields: Sequence[str] = (), start: int = 0, steps: int,
           rank: int = 0, world: int = 1, workers: int | None = None, labels: Sequence[str] | None = None) -> Loader:
    """Batches of steps start … steps − 1: recipe.train.batch samples a step over all ranks, this rank's part of them.

    rows: who is drawn from; those in quarantine are left out. Each is seen once per epoch, as `Samples.order` says. fields:
    companions to load with every view (mask; all −1 for a row that has none). labels: which row labels go into `Items.labels`
    (None: all; −1 where unlabelled). workers: processes (None: recipe.train.workers; 0: this one).
    Looks are item-major: rows item0 look0, item0 look1, …; item1 look0, ….
    Raises RecipeError when the batch does not divide by the ranks, DataError when no row is left.
    """
    train = recipe.train
    usable = [r for r in rows if r.index in cache]
    if not usable:
        raise DataError("empty", f"none of {len(rows)} rows can be used", "`meristem data check` names what is wrong.")
    if train.batch % world:
        raise RecipeError(f"train.batch={train.batch} cannot be divided among {world} processes",
                          f"Choose a multiple of {world}.")
    many = [name for name, view in recipe.views.items() if view.count > LOOKS]
    if many:
        raise RecipeError(f"view '{many[0]}' has more than {LOOKS} looks", f"Set views.{many[0]}.count to at most {LOOKS}.")
    here = {r.index for r in usable}
    partners = [sorted(here.intersection(r.partners)) for r in usable]  # of the same split: what is tested is nobody's partner
    matching = None
    if recipe.compose is not None:
        if len({r.subject for r in usable}) < 2:
            raise DataError("pairs", "the partner of a sample is of another subject, and all are of one", "Give more data.")
        matching = recipe.compose.build(cache, [r.index for r in usable], recipe.views, train.seed)
    elif any(view.partner for view in recipe.views.values()):
        usable, partners = [r for r, others in zip(usable, partners, strict=True) if others], [p for p in partners if p]
        if not usable:
            raise DataError("pairs", f"a view shows the partner of a sample, and none of {len(rows)} rows has one",
                            "Give a CSV whose column `pair` names the other one, or take partner out of the view.")
    names = sorted({name for r in usable for name in r.labels}) if labels is None else labels
    table = {name: torch.tensor([r.labels.get(name, IGNORED) for r in usable]) for name in names}
    batches = _Batches(cache, [(r.index, r.element) for r in usable], table, recipe.modality, recipe.views, tuple(fields),
                       train.seed, train.batch, rank, world, partners, matching, [r.subject for r in usable], train.window,
                       -(-cache.ahead([r.index for r in usable]) // train.batch))
    return Loader(batches, start, steps, train.workers if workers is None else workers)


def _leave_to_the_loop(worker: int) -> None:
    """A request to stop that reaches the whole process group, as Ctrl-C's, is the training loop's to answer, and it leaves
    without waiting for the batches that are on their way.
    """
    lose_nothing()
    sys.excepthook = lambda kind, error, trace: (None if issubclass(kind, ConnectionError | EOFError)
                                                 else sys.__excepthook__(kind, error, trace))
    for name in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(name, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))  # a second one ends the worker


class _PinnedBatch(Batch):
    """A batch that DataLoader's pinning thread knows how to pin."""

    def pin_memory(self) -> Batch:
        def pin(table: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {k: v.pin_memory() for k, v in table.items()}

        for view in self.views.values():
            view.array, view.params, view.fields = view.array.pin_memory(), pin(view.params), pin(view.fields)
            view.weight = None if view.weight is None else view.weight.pin_memory()
            view.index = None if view.index is None else view.index.pin_memory()
        return self


class _Batches(Dataset[Batch | DataError]):
    """Step -> this rank's batch, collated where it is made, or why it cannot be: a worker can raise built-in errors only."""

    def __init__(self, cache: Samples, rows: Sequence[tuple[int, int]], labels: Mapping[str, Tensor], modality: Modality,
                 views: Mapping[str, ViewSettings], fields: tuple[str, ...], seed: int, batch: int, rank: int,
                 world: int, partners: Sequence[Sequence[int]] = (), matching: Matching | None = None,
                 subjects: Sequence[str] = (), window: int = 1, ahead: int = 0) -> None:
        self.cache, self.rows, self.labels, self.modality, self.views = cache, list(rows), labels, modality, views
        self.fields, self.seed, self.batch, self.rank, self.share = fields, seed, batch, rank, batch // world
        self.partners, self.matching, self.subjects = partners, matching, subjects
        self.samples, self.window, self.ahead = [row for row, _ in self.rows], window, ahead
        self._orders: dict[int, Order] = {}
        self._expected = 0  # the first step that was not announced

    def __getitem__(self, step: int) -> Batch | DataError:
        try:
            return self._batch(step)
        except DataError as error:
            return error

    def _batch(self, step: int) -> Batch:
        self._announce(step)
        cursors = self._cursors(step)
        places = [self._place(c) for c in cursors]
        items = Items(torch.tensor([self.rows[p][0] for p in places]), torch.tensor(cursors),
                      {name: x[places] for name, x in self.labels.items()})
        return _PinnedBatch(items, {name: self._view(name, settings, places, cursors) for name, settings in self.views.items()})

    def _cursors(self, step: int) -> list[int]:
        """The cursors of this rank: neighbours in lane go together, so that a rank reads few of the files a batch is of."""
        cursors = sorted(range(step * self.batch, (step + 1) * self.batch), key=self._lane)
        return cursors[self.rank * self.share:(self.rank + 1) * self.share]

    def _announce(self, step: int) -> None:
        """Tell the samples who will be drawn soon."""
        for soon in range(max(self._expected, step), step + self.ahead + 1):
            self.cache.expect([self.samples[self._place(c)] for c in self._cursors(soon)])
        self._expected = step + self.ahead + 1

    def _order(self, cursor: int) -> tuple[Order, int]:
        """The order of an epoch, and where in it the cursor is."""
        epoch, at = divmod(cursor, len(self.rows))
        if epoch not in self._orders:
            self._orders = {e: order for e, order in self._orders.items() if abs(e - epoch) == 1}
            self._orders[epoch] = self.cache.order(self.samples, self.seed, epoch, self.window)
        return self._orders[epoch], at

    def _place(self, cursor: int) -> int:
        order, at = self._order(cursor)
        return int(order.place[at])

    def _lane(self, cursor: int) -> int:
        order, at = self._order(cursor)
        return int(order.lane[at])

    def _view(self, name: str, settings: ViewSettings, places: Sequence[int], cursors: Sequence[int]) -> View:
        shown = [self._partner(p, c) if settings.partner else self.rows[p] for p, c in zip(places, cursors, strict=True)]
        looks = [(*row, c, i, look) for i, (row, c) in enumerate(zip(shown, cursors, strict=True))
                 for look in range(settings.count)]
        return self.collate(name, settings, looks)

    def _partner(self, place: int, cursor: int) -> tuple[int, int]:
        if self.matching is not None:
            (order, _), at = self._order(cursor)
            earlier = (int(order[at - k]) for k in range(1, len(order)))  # in this epoch, and round from its end
            return self.rows[next(p for p in earlier if self.subjects[p] != self.subjects[place])]
        others = self.partners[place]
        return others[int(Rng.of(self.seed, cursor, "partner").integers("which", len(others))[0])], -1

    def collate(self, name: str, settings: ViewSettings, looks: Sequence[tuple[int, int, int, int, int]],
                given: Sequence[Draw] = ()) -> View:
        """The view of some looks, each (manifest row, its element or −1, cursor, place in the batch, look). given: what each
        shows; else drawn.
        """
        arrays, affines, spacings, params, weights, drawn, links = [], [], [], [], [], [], []
        fields: dict[str, list[Tensor]] = {field: [] for field in self.fields}
        for (row, element, cursor), of_item in groupby(looks, key=lambda look: look[:3]):  # one reading serves all looks
            header = self.cache.header(row)
            if tables := self.cache.tables(row):
                header = replace(header, tables=tables)
            centre, found = self._match(name, cursor)
            draws = [given[number] if given
                     else self.modality.draw(settings, header, Look(self.seed, cursor, number, name, element, centre))
                     for *_, number in of_item]
            for draw, window in zip(draws, self.cache.windows(row, draws), strict=True):
                arrays.append(self.modality.load(window, draw, interpolate=True))
                affines.append(torch.from_numpy(affine(header, draw)))
                spacings.append(torch.tensor(draw.spacing or header.spacing, dtype=torch.float32))
                params.append({**draw.params, **found, "scale": header.scale, "offset": header.offset})
                weights.append(self._counted(row, draw, inside(header, draw)))
                drawn.append(draw)
                links.append(self.modality.edges(header, draw) if tables else None)
                for field, values in fields.items():
                    values.append(self._field(row, field, draw))
        shape = max(tuple(a.shape[1:]) for a in arrays)
        if any(a.shape[1:] != shape for a in arrays):  # sets of several sizes
            weights = [torch.ones(1, *a.shape[1:]) if w is None else w for a, w in zip(arrays, weights, strict=True)]
        frame = Frame(torch.stack(affines).float(), shape, torch.stack(spacings), tuple(a.unit for a in self.modality.axes))
        weight = None
        if any(w is not None for w in weights):
            weight = _stack([torch.ones(1, *shape) if w is None else w for w in weights], shape)
        return View(name, _stack(arrays, shape), frame, torch.tensor([i for *_, i, _ in looks]),
                    torch.tensor([look for *_, look in looks]),
                    {key: torch.stack([_number(p[key]) for p in params]) for key in params[0]},
                    {field: _stack(values, shape, IGNORED) for field, values in fields.items()}, weight,
                    _places(drawn, shape[0]) if len(shape) == 1 else None, _edges(links, shape[0]))

    def _match(self, name: str, cursor: int) -> tuple[tuple[int, ...], dict[str, float]]:
        """On which stored place the crops of a composed view are centred, and their weight in losses of pairs."""
        if self.matching is None or name not in self.matching.crops:
            return (), {}
        place = self._place(cursor)
        centres, score = self.matching.places(cursor, self.rows[place][0], self._partner(place, cursor)[0])
        return centres[name], {"pair": float(score >= self.matching.settings.least)}

    def _counted(self, row: int, draw: Draw, weight: Tensor | None) -> Tensor | None:
        """The weight of a view's elements, without those that their sample excludes."""
        if EXCLUDED not in self.cache.fields(row):
            return weight
        window = self.cache.field_window(row, EXCLUDED, draw)[None]
        counted = 1 - self.modality.load(window, draw, interpolate=False).float()
        return counted if weight is None else weight * counted

    def _field(self, row: int, name: str, draw: Draw) -> Tensor:
        if name not in self.cache.fields(row):
            return torch.full(draw.shape, IGNORED, dtype=torch.int64)
        window = self.cache.field_window(row, name, draw)[None]
        return self.modality.load(window, draw, interpolate=False)[0].long()


def whole(cache: Samples, rows: Sequence[Row], modality: Modality, options: ViewSettings) -> View:
    """The looks at each row in order, as evaluation needs them; options should draw nothing at random."""
    batches = _Batches(cache, [], {}, modality, {"x": options}, (), 0, len(rows), 0, 1)
    looks = [(r.index, -1, i, i, look) for i, r in enumerate(rows) for look in range(options.count)]
    return batches.collate("x", options, looks)


def shown(cache: Samples, row: Row, modality: Modality, options: ViewSettings, draws: Sequence[Draw]) -> View:
    """Looks at one row that were decided elsewhere."""
    batches = _Batches(cache, [], {}, modality, {"x": options}, (), 0, 1, 0, 1)
    return batches.collate("x", options, [(row.index, -1, 0, 0, look) for look in range(len(draws))], draws)


def affine(header: Header, draw: Draw) -> np.ndarray:
    """(D+1, D+1) view index -> source: the header's affine after i -> (i + ½) · size / shape − ½ + start; float64.

    Along an index, the place it shows. The header's own where elements carry coordinates.
    """
    if len(header.affine) != len(draw.size) + 1:
        return np.array(header.affine, float)
    step = np.array(draw.size) / np.array(draw.shape)
    start = 0.5 * step - 0.5 + np.array(draw.start)
    if draw.index:  # the straight line through its first and last place
        shown = np.flatnonzero(np.array(draw.index) >= 0)
        (i, j), (a, b) = shown[[0, -1]], np.array(draw.index)[shown[[0, -1]]]
        step[0] = (b - a) / (j - i) if j > i else 1.0
        start[0] = a - i * step[0]
    window = np.diag([*step, 1.0])
    window[:-1, -1] = start
    product: np.ndarray = np.array(header.affine) @ window
    return product


def inside(header: Header, draw: Draw) -> Tensor | None:
    """(1, *shape) 1 where a view's elements lie in the sample, else 0; None when all do."""
    weight = None
    for axis, (a, n, m, stored) in enumerate(zip(draw.start, draw.size, draw.shape, header.shape[1:], strict=True)):
        index = draw.index if axis == 0 else ()
        outside = min(index) < 0 if index else a < 0 or a + n > stored
        if outside:
            at = np.array(index) if index else (np.arange(m) + 0.5) * n / m - 0.5 + a
            line = torch.from_numpy((at >= -0.5) & (at <= stored - 0.5)).float()
            line = line.reshape(-1, *[1] * (len(draw.shape) - axis - 1)).expand(1, *draw.shape)
            weight = line.clone() if weight is None else weight * line
    return weight


def _places(draws: Sequence[Draw], length: int) -> Tensor:
    """(B, length) which stored element of a set each is; −1 for padding."""
    places = [torch.tensor(d.index) if d.index else torch.arange(d.start[0], d.start[0] + d.size[0]) for d in draws]
    return _stack(places, (length,), IGNORED)


def _edges(links: Sequence[Links | None], length: int) -> Edges | None:
    """The edges of all looks, in a batch whose rows are `length` long; of all looks or of none."""
    some = [x for x in links if x is not None]
    if not some:
        return None
    offset = np.repeat(np.arange(len(some)) * length, [x.pairs.shape[1] for x in some])
    value = None if some[0].value is None else torch.from_numpy(np.concatenate([x.value for x in some if x.value is not None]))
    pairs = np.concatenate([x.pairs for x in some], 1).astype(np.int64) + offset
    kind = np.concatenate([x.kind for x in some]).astype(np.int64)
    return Edges(torch.from_numpy(pairs), torch.from_numpy(kind), value, len(some), length)


def _stack(rows: Sequence[Tensor], shape: Sequence[int], value: int = 0) -> Tensor:
    """Rows of one type, as a data set may hold 8 and 16 bit samples; shorter ones, of sets, are filled up to `shape`."""
    kinds = {x.dtype for x in rows}
    if len(kinds) > 1:
        kind = rows[0].dtype
        for other in kinds:
            kind = torch.promote_types(kind, other)
        rows = [x.to(kind) for x in rows]
    if all(x.shape[-1] == shape[-1] for x in rows):
        return torch.stack(list(rows))
    table = rows[0].new_full((len(rows), *rows[0].shape[:-1], shape[-1]), value)
    for whole, row in zip(table.unbind(), rows, strict=True):
        whole[..., :row.shape[-1]] = row
    return table


def _number(x: Any) -> Tensor:
    tensor = torch.as_tensor(x)
    return tensor.float() if tensor.dtype == torch.float64 else tensor


def _same(x: Any) -> Any:
    return x
