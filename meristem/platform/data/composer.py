"""Who meets whom in a batch beyond chance; pure in rows, seed and cursor, so that ranks agree and resume is exact."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch.nn import functional as F

from meristem.modalities.base import Header, Settings
from meristem.modalities.rng import Rng
from meristem.platform.data.samples import Samples

VERSION = 1  # of stored embeddings


class Matched(Settings):
    """The partner of a sample is the next one before it in the run's stream that is of another subject; the crops `view` of the
    sample and `other` of its partner are centred on places that match.

    A place is drawn in the sample and the nearest one looked up in its partner, by embeddings of both that were stored before
    any crop is read; of `tries` draws the first whose cosine is `least` or more is taken (Alice, Jiang et al. 2023, section
    3.1). If there is none, the best, and the units of both crops have weight 0: their drawn number `pair`, else 1.
    stride: of the embeddings, in stored elements; reach: how many such steps away the surroundings lie that they hold.
    """

    view: str
    other: str
    least: Annotated[float, Field(ge=-1, le=1)] = 0.7
    tries: Annotated[int, Field(ge=1)] = 100
    stride: Annotated[int, Field(ge=1)] = 4
    reach: Annotated[int, Field(ge=1)] = 2

    def check(self, views: Mapping[str, Any], dims: int) -> list[str]:
        """What is impossible about it with these views; empty when all is well."""
        problems = [f"there is no view '{name}' (views: {', '.join(views)})"
                    for name in (self.view, self.other) if name not in views]
        if problems:
            return problems
        both = (views[self.view], views[self.other])
        if any(len(view.size) != dims or getattr(view, "window", "") != "crop" for view in both):
            problems.append("it centres crops of arrays; the views must be of images or volumes, with window: crop")
        if [view.partner for view in both] != [False, True]:
            problems.append(f"'{self.view}' shows the sample and '{self.other}' its partner; set views.{self.other}.partner")
        return problems

    def build(self, cache: Samples, rows: Sequence[int], views: Mapping[str, Any], seed: int) -> Matching:
        return Matching(self, cache, rows, {name: crop(views[name]) for name in (self.view, self.other)}, seed)


def crop(view: Any) -> tuple[int, ...]:
    """The largest window of a view, in stored elements."""
    return tuple(round(n * view.zoom[1]) for n in view.size)


def surroundings(array: np.ndarray, header: Header, stride: int, reach: int) -> np.ndarray:
    """(D, *cells) float16 embedding of a stored array (C, *S), cells `stride` wide: the mean values of the cell and of those
    `reach` cells away in every direction, axis-wise and diagonal, less their own mean, of length 1.

    The dot product of two is the correlation of their surroundings, coarse as they are: brightness and contrast do not matter.
    """
    dims = array.ndim - 1
    each = (-1, *[1] * dims)
    x = array.astype(np.float32) * np.reshape(header.scale, each) + np.reshape(header.offset, each)
    pool = F.avg_pool3d if dims == 3 else F.avg_pool2d
    kernel = [min(stride, n) for n in array.shape[1:]]
    cells = F.pad(pool(torch.from_numpy(x).float()[None], kernel), [reach] * 2 * dims, mode="replicate")[0]
    size = [n - 2 * reach for n in cells.shape[1:]]
    around = [cells[(slice(None), *(slice(a, a + n) for a, n in zip(step, size, strict=True)))]
              for step in (np.array(i) * reach for i in np.ndindex(*[3] * dims))]
    context = torch.cat(around)
    return F.normalize(context - context.mean(0), dim=0).half().numpy()


class Matching:
    """A composer at work on rows of a cache. Embeddings are stored beside the cache, under the content of what they are of."""

    def __init__(self, settings: Matched, cache: Samples, rows: Sequence[int], crops: Mapping[str, tuple[int, ...]],
                 seed: int) -> None:
        self.settings, self.cache, self.crops, self.seed = settings, cache, dict(crops), seed
        self.home = cache.directory / f"surroundings-{VERSION}-{settings.stride}-{settings.reach}"
        self.home.mkdir(parents=True, exist_ok=True)
        for row in rows:
            if not self._file(row).exists():
                made = surroundings(cache.array(row), cache.header(row), settings.stride, settings.reach)
                with tempfile.NamedTemporaryFile(dir=self.home, suffix=".tmp", delete=False) as file:
                    np.save(file, made)
                Path(file.name).replace(self._file(row))

    def _file(self, row: int) -> Path:
        return self.home / f"{self.cache.content(row)}.npy"

    def _cells(self, row: int, view: str) -> tuple[np.ndarray, np.ndarray]:
        """(D, n) embeddings and (n, dims) stored elements in the middle of the cells around which the view's crop fits."""
        stored, shape = np.load(self._file(row)), self.cache.header(row).shape[1:]
        axes: list[np.ndarray] = []
        for n, cells, size in zip(shape, stored.shape[1:], self.crops[view], strict=True):
            at = np.arange(cells) * self.settings.stride + self.settings.stride // 2
            fits = (at >= size // 2) & (at <= n - size + size // 2)
            axes.append(np.flatnonzero(fits) if fits.any() else np.arange(cells))
        index = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(axes))
        found = stored[(slice(None), *index.T)].astype(np.float32)
        found /= np.linalg.norm(found, axis=0).clip(1e-6)  # what rounding changed
        return found, index * self.settings.stride + self.settings.stride // 2

    @lru_cache(maxsize=512)  # noqa: B019  # of one loader, as long-lived as its process
    def places(self, cursor: int, row: int, other: int) -> tuple[dict[str, tuple[int, ...]], float]:
        """By view, the stored element on which the crop is centred, in `row` and in its partner; and their cosine."""
        s = self.settings
        (mine, here), (theirs, there) = self._cells(row, s.view), self._cells(other, s.other)
        drawn = Rng.of(self.seed, cursor, "match").integers("cells", len(here), s.tries)[0].numpy()
        score = mine[:, drawn].T @ theirs
        best = score.max(1)
        attempt = int(np.flatnonzero(best >= s.least)[0]) if (best >= s.least).any() else int(best.argmax())
        return ({s.view: tuple(here[drawn[attempt]].tolist()), s.other: tuple(there[score[attempt].argmax()].tolist())},
                float(best[attempt]))


COMPOSERS: dict[str, type[Matched]] = {"matched": Matched}
