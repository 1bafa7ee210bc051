"""Keys of past steps."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from meristem.platform.objectives import Units


class Queue(nn.Module):
    """The last `size` keys, first in, first out (He et al. 2020, section 3.1). Empty places weigh nothing.

    z: (size, width). key: (names, size). weight: (size,). place: where the next key goes. All are saved with the run; keys are
    noted over the micro-batches of an optimiser step and enter together after it, the same on every rank.
    """

    z: Tensor
    key: Tensor
    weight: Tensor
    place: Tensor

    def __init__(self, size: int, width: int, names: tuple[str, ...]) -> None:
        super().__init__()
        self.names = names
        self.register_buffer("z", torch.zeros(size, width))
        self.register_buffer("key", torch.full((len(names), size), -1))
        self.register_buffer("weight", torch.zeros(size))
        self.register_buffer("place", torch.zeros((), dtype=torch.int64))
        self._fresh: list[Units] = []
        self._progress = -1.0

    def units(self) -> Units:
        return Units(self.z, dict(zip(self.names, self.key, strict=True)), self.weight)

    def note(self, keys: Units, progress: float) -> None:
        """Keys of all ranks of one micro-batch; those of a step that was skipped are forgotten."""
        if progress != self._progress:
            self._fresh, self._progress = [], progress
        self._fresh.append(keys.with_z(keys.z.detach().float()))

    @torch.no_grad()
    def after(self) -> None:
        if not self._fresh:
            return
        fresh, size = Units.cat(self._fresh), len(self.z)
        fresh = fresh.select(torch.arange(max(len(fresh) - size, 0), len(fresh), device=self.z.device))
        at = (self.place + torch.arange(len(fresh), device=self.z.device)) % size
        self.z[at], self.weight[at] = fresh.z, fresh.weight
        self.key[:, at] = torch.stack([fresh.key[name] for name in self.names])
        self.place.copy_((self.place + len(fresh)) % size)
        self._fresh = []
