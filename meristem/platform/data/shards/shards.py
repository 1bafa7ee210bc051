"""Samples in shards at a URL: fetched ahead into a bounded store, and drawn in an order that reads few of them at a time."""

from __future__ import annotations

import math
import os
import queue
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from meristem.errors import DataError
from meristem.modalities.base import Draw
from meristem.modalities.rng import Rng
from meristem.platform.data.samples import Block, Order, Samples
from meristem.platform.data.shards.index import Index
from meristem.platform.data.shards.remote import Remote
from meristem.platform.data.shards.store import Store

AHEAD = 2  # shards that are fetched before they are needed


class Shards(Samples):
    """The samples of an index. Each process that draws from them has a thread of its own that fetches ahead."""

    def __init__(self, index: Index, remote: Remote, root: Path, room: int) -> None:
        """root: where fetched shards are kept, at most `room` bytes of them. Raises DataError where that is too little."""
        self.store, self.remote = Store(root, f"{index.modality}-{index.digest}", room), remote
        self._shards = {shard.name: shard for shard in index.shards}
        self._digest, self._largest = index.digest, max(shard.size for shard in index.shards)
        self._suffices(1)
        self.store.home.mkdir(parents=True, exist_ok=True)
        super().__init__(self.store.home, index.entries, index.quarantine)
        self._wanted: tuple[int, queue.SimpleQueue[str]] | None = None  # of which process, and what it shall fetch
        self._told: list[str] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_wanted": None, "_told": []}

    def _suffices(self, window: int) -> None:
        """Raises DataError where what is read and what is fetched ahead would drive each other out."""
        need = self._largest * (window + 1 + AHEAD)
        if self.store.room < need:
            raise DataError("room", f"{self.store.room / 1e6:.3g} MB of disk are too little to mix {window} shards of up to "
                            f"{self._largest / 1e6:.3g} MB: {need / 1e6:.3g} MB",
                            f"Give --room {math.ceil(need / 1e6) / 1e3:g} (GB), lower train.window, or write smaller shards.")

    # ---- who comes when

    @property
    def ordering(self) -> str:
        return self._digest

    def order(self, rows: Sequence[int], seed: int, epoch: int, window: int) -> Order:
        """Shards stand in a circle, in an order of the epoch's; the p-th one's samples are spread at random from p to
        p + window, and taken in the order of these places.

        So the shards of any stretch are `window` neighbours, each is read from once and left for good, and a window of all
        shards is a plain shuffle. The shards at which the circle closes are the same in every epoch: it goes over into the
        next one without having to fetch a whole window at once. Those, at most `window`, are read from twice.
        """
        names = sorted({self.entries[row].array.file for row in rows})
        window = min(window, len(names))
        self._suffices(min(window, len(names) - 1 - AHEAD))
        turn, base = Rng.of(seed, epoch, "epoch"), Rng.of(seed, 0, "circle").permutation("shards", len(names))[0]
        circle = torch.cat([_shuffled(base[window:], turn, "rest"), _shuffled(base[:window], turn, "seam")]).tolist()
        place = {names[number]: p for p, number in enumerate(circle)}
        p = torch.tensor([place[self.entries[row].array.file] for row in rows])
        spread = (p + window * turn.uniform("spread", len(rows))[0].double()) % len(names)
        first = spread.argsort(stable=True)
        return Order(first, (p % window)[first])

    def ahead(self, rows: Sequence[int]) -> int:
        shards = len({self.entries[row].array.file for row in rows})
        return math.ceil(AHEAD * len(rows) / shards) if shards else 0

    def expect(self, rows: Sequence[int]) -> None:
        """Fetch in the background; what goes wrong there is met again, and told, where the sample is read."""
        names = dict.fromkeys(self.entries[row].array.file for row in rows)
        if self._wanted is None or self._wanted[0] != os.getpid():  # threads do not follow into a fork
            self._wanted, self._told = (os.getpid(), queue.SimpleQueue()), []
            threading.Thread(target=self._prefetch, args=(self._wanted[1],), daemon=True).start()
        for name in names:
            if name not in self._told and not self.store.use(name):
                self._wanted[1].put(name)
        self._told = list(names)

    def _prefetch(self, wanted: queue.SimpleQueue[str]) -> None:
        while True:
            try:
                self._file(wanted.get())
            except DataError:
                continue

    # ---- where they are

    def _file(self, name: str) -> Path:
        shard = self._shards[name]
        return self.store.get(name, shard.size, lambda into: self.remote.fetch(name, shard.size, shard.sha256, into))

    def _open(self, block: Block) -> Any:
        while True:
            if not self.store.use(block.file):  # removed: what is still open of it would keep the disk full
                for key in [key for key in self._handles if not (self.store.home / key[1]).exists()]:
                    del self._handles[key]
            try:
                return super()._open(block)
            except FileNotFoundError:
                continue  # another process made room between finding the file and opening it

    def _outside(self, row: int, draws: Sequence[Draw]) -> list[np.ndarray]:
        raise AssertionError("a shard holds whole samples")


def _shuffled(x: Tensor, rng: Rng, purpose: str) -> Tensor:
    return x[rng.permutation(purpose, len(x))[0]] if len(x) else x
