"""A modality of .npy lattices for tests of what lies right of the first waist: no format, no augmentation, real geometry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from meristem.errors import DataError
from meristem.modalities.base import Axis, Draw, Header, Look, Sample, Settings, View, ViewSettings
from meristem.modalities.facts import Facts, intensities
from meristem.modalities.rng import Rng

SPACING = (1.0, 2.0, 0.5)
ORIGIN = (-3.0, 7.0, 0.25)


class NpyOptions(Settings):
    scale: float = 0.5


class NpyView(ViewSettings):
    """size: of the view. shrink: a window is this many times larger. reach: how far outside it may start."""

    size: tuple[int, ...] = (4, 4, 4)
    shrink: int = 1
    reach: int = 0


class Npy:
    name = "npy"
    suffixes: tuple[str, ...] = (".npy",)
    members: tuple[str, ...] = ()
    Options, ViewOptions = NpyOptions, NpyView
    axes = tuple(Axis(n, "mm", 1.0, 64.0) for n in "xyz")
    channels = 1
    reads: ClassVar[list[str]] = []

    def __init__(self, options: NpyOptions | None = None) -> None:
        self.options = options or NpyOptions()

    def read(self, paths: Sequence[Path], fields: Mapping[str, Path] = {}) -> Sample:
        self.reads.append(paths[0].stem)
        array = np.stack([np.load(p) for p in paths])
        if array.dtype.kind == "f" and np.isnan(array).any():
            raise DataError("nan", f"{paths[0].name} holds NaN", "Export it again.")
        masks = {name: np.load(p) for name, p in fields.items()}
        affine = np.diag([*SPACING, 1.0])
        affine[:3, 3] = ORIGIN
        c = len(array)
        header = Header(array.shape, tuple(map(tuple, affine.tolist())), SPACING, (self.options.scale,) * c, (-1.0,) * c,
                        tuple(float(i) for i in range(c)), {"shape": list(array.shape)}, ((1, 1, 1),))
        return Sample(array, header, masks)

    def statistics(self, array: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return (self.options.scale,), (-1.0,)

    def fetch(self, paths: Sequence[Path], header: Header, draws: Sequence[Draw]) -> list[np.ndarray]:
        raise NotImplementedError

    def draw(self, view: ViewSettings, header: Header, look: Look) -> Draw:
        assert isinstance(view, NpyView)
        size = tuple(n * view.shrink for n in view.size)
        u = look.rng.uniform("start", len(size))[0].tolist()
        start = tuple(int(x * (s - n + 1 + 2 * view.reach)) - view.reach
                      for x, s, n in zip(u, header.shape[1:], size, strict=True))
        return Draw(start, size, view.size, {"angle": look.rng.uniform("angle")[0], "turn": np.array(u)})

    def load(self, window: np.ndarray, draw: Draw, interpolate: bool) -> Tensor:
        step = draw.size[0] // draw.shape[0]
        x = torch.from_numpy(window)
        if step == 1:
            return x
        return F.avg_pool3d(x.float(), step) if interpolate else x[(slice(None), *[slice(step // 2, None, step)] * 3)]

    def facts(self, paths: Sequence[Path], sample: Sample) -> Facts:
        return intensities(np.load(paths[0]))

    def edges(self, header: Header, draw: Draw) -> None:
        return None

    def elements(self, path: Path) -> None:
        return None

    def fitted(self, paths: Sequence[Path]) -> Npy:
        return self

    def example(self, size: tuple[int, ...], rng: Rng) -> View:
        raise NotImplementedError

    def augment(self, view: View, settings: ViewSettings) -> View:
        return view


def ramp(shape: tuple[int, int, int], extra: int = 0) -> np.ndarray:
    """int16 (*shape): each element tells its own place: 400 x + 20 y + z + extra; sides at most 20."""
    x, y, z = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
    return (400 * x + 20 * y + z + extra).astype(np.int16)
