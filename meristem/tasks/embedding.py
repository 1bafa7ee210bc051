"""Whole samples, and parts of them, through an encoder, without augmentation."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor

from meristem.errors import MeristemError
from meristem.modalities.base import Draw, ViewSettings
from meristem.platform.assembly import Assembly
from meristem.platform.data.loader import shown, whole
from meristem.platform.data.manifest import Row
from meristem.platform.data.source import Data
from meristem.platform.evaluation.probes import Features
from meristem.platform.objectives import Encoded
from meristem.platform.recipe import Recipe

BATCH = 64  # looks that are encoded at once


def plain(recipe: Recipe) -> ViewSettings:
    """How evaluation shows a sample: the recipe's first view without chance, `count` fixed looks at each sample."""
    return next(iter(recipe.views.values())).plain()


@torch.no_grad()
def encode(assembly: Assembly, data: Data, rows: Sequence[Row], by: str = "encoder") -> Iterator[Encoded]:
    """Encodings of the plain looks at the rows, some rows at a time: all looks at the first, all at the second, …"""
    assembly.eval()
    recipe, device = assembly.recipe, next(assembly.parameters()).device
    encoder, options = assembly.module(by, "encoder"), plain(recipe)
    several = max(BATCH // options.count, 1)
    for start in range(0, len(rows), several):
        view = whole(data.cache, rows[start:start + several], recipe.modality, options).to(device)
        view = recipe.modality.augment(view, options)
        yield encoder(assembly.tokenizer.stream(view).seen(recipe.encoder.sees))


def over_looks(x: Tensor, recipe: Recipe) -> Tensor:
    """Mean over the looks at each sample: (n·looks, …) of `encode` -> (n, …)."""
    return x.unflatten(0, (-1, plain(recipe).count)).mean(1)


def embed(assembly: Assembly, data: Data, rows: Sequence[Row], by: str = "encoder", summaries: Sequence[str] = ()
          ) -> np.ndarray:
    """(n, D) float32: the summary that the recipe names, which is the one its pretraining trained; its mean over looks.

    summaries: others instead, side by side. Of parts of samples: their tokens, multiplied element by element for a pair.
    """
    recipe = assembly.recipe
    if rows and rows[0].element >= 0:
        product: np.ndarray = parts(assembly, data, rows, lambda encoded: encoded.tokens.float(), by).prod(1).numpy()
        return product
    names = tuple(summaries) or (recipe.summary,)
    some = [over_looks(torch.cat([encoded.summary[name].float() for name in names], 1), recipe).cpu()
            for encoded in encode(assembly, data, rows, by)]
    result: np.ndarray = torch.cat(some).numpy()
    return result


def parts(assembly: Assembly, data: Data, rows: Sequence[Row], of: Callable[[Encoded], Tensor], by: str = "encoder") -> Tensor:
    """(n, 1, …), of pairs (n, 2, …), on the CPU: what `of` an encoding (B, N, …) of the plain look is at each row's element.

    A sample that is larger than a look is encoded in windows that cover what is asked.
    """
    index = np.array([row.index for row in rows])
    ends = np.array([(row.element, row.other) if row.other >= 0 else (row.element,) for row in rows])
    place = np.zeros(ends.shape, int)
    found: list[Tensor] = []
    filled = 0
    for sample in {row.index: row for row in rows}.values():
        mine = index == sample.index
        asked = np.unique(ends[mine])
        place[mine] = np.searchsorted(asked, ends[mine]) + filled
        filled += len(asked)
        found.append(_encoded(assembly, data, sample, asked, of, by))
    return torch.cat(found)[torch.from_numpy(place)]


@torch.no_grad()
def _encoded(assembly: Assembly, data: Data, row: Row, asked: np.ndarray, of: Callable[[Encoded], Tensor], by: str) -> Tensor:
    """(n, …) for the elements `asked` (n,) of one sample, ascending."""
    assembly.eval()
    recipe, device = assembly.recipe, next(assembly.parameters()).device
    options = plain(recipe).model_copy(update={"count": 1})
    encoder, out = assembly.module(by, "encoder"), torch.empty(0)
    tables = data.cache.tables(row.index)
    elements = data.cache.header(row.index).shape[1]
    (size,) = options.size  # type: ignore[attr-defined]
    for index, core in windows(elements, size, asked, tables):
        draw = Draw((0,), (len(index) or elements,), (len(index) or elements,), index=index)
        view = recipe.modality.augment(shown(data.cache, row, recipe.modality, options, [draw]).to(device), options)
        assert view.index is not None
        read = of(encoder(assembly.tokenizer.stream(view).seen(recipe.encoder.sees)))[0].cpu()
        place = np.zeros(elements, int)
        place[view.index[0].cpu().numpy()] = np.arange(view.index.shape[1])
        if not len(out):
            out = read.new_empty(len(asked), *read.shape[1:])
        out[np.searchsorted(asked, core)] = read[place[core]]
    return out


def windows(elements: int, size: int, asked: np.ndarray, tables: Mapping[str, np.ndarray]
            ) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """(elements of a window, those that it is for): windows of at most `size` that cover what is asked; () for the whole.

    Half of a window is for what is asked, neighbours together; the rest is what lies around that, the nearest first.
    """
    if elements <= size:
        yield (), asked
        return
    pairs = tables["pairs"]
    graph = csr_matrix((np.ones(pairs.shape[1], np.int8), (pairs[0], pairs[1])), shape=(elements, elements))
    waiting = np.zeros(elements, bool)
    waiting[asked] = True
    seeds = iter(asked)
    while waiting.any():
        core = np.empty(0, int)
        while len(core) < max(size // 2, 1):
            seed = next((s for s in seeds if waiting[s]), None)
            if seed is None:
                break
            ball = _ball(graph, np.array([seed]), max(size // 2, 1) - len(core), waiting)
            waiting[ball] = False
            core = np.concatenate([core, ball])
        yield tuple(np.sort(_ball(graph, core, size, np.ones(elements, bool))).tolist()), core


def _ball(graph: csr_matrix, start: np.ndarray, size: int, allowed: np.ndarray) -> np.ndarray:
    """Up to `size` elements, `start` and the allowed ones that can be reached from it, nearest first."""
    free = allowed.copy()
    free[start] = False
    found, edge = [start], start
    left = size - len(start)
    while left > 0 and len(edge):
        around = np.unique(graph[edge].indices)
        edge = around[free[around]][:left]
        free[edge] = False
        found.append(edge)
        left -= len(edge)
    return np.concatenate(found)


def features(assembly: Assembly, data: Data, rows: Sequence[Row], memory: float, directory: Path) -> Features:
    """All tokens of the rows' plain looks, half precision; beyond `memory` GiB in a nameless file on the disk of `directory`.

    Raises MeristemError when the disk has no room for them.
    """
    looks, tokens, valid, filled = plain(assembly.recipe).count, torch.empty(0), torch.empty(0), 0
    for encoded in encode(assembly, data, rows):
        if not filled:
            shape = (len(rows) * looks, *encoded.tokens.shape[1:])
            tokens, valid = _room(shape, memory, directory), torch.empty(shape[:2], dtype=torch.bool)
        end = filled + len(encoded.tokens)
        tokens[filled:end], valid[filled:end] = encoded.tokens, encoded.valid
        filled = end
    return Features(tokens, valid, looks)


def _room(shape: tuple[int, ...], memory: float, directory: Path) -> Tensor:
    size = 2 * int(np.prod(shape))
    if size <= memory * 2**30:
        return torch.empty(shape, dtype=torch.float16)
    free = shutil.disk_usage(directory).free
    if size > 0.95 * free:
        raise MeristemError(f"the features of all tokens take {size / 2**30:.1f} GiB, and the disk has {free / 2**30:.1f} free",
                            "Free some, take fewer looks or smaller views, or use the linear probe.")
    with tempfile.TemporaryFile(dir=directory) as file:  # the mapping keeps it until the last tensor is gone
        return torch.from_numpy(np.memmap(file, np.float16, "w+", shape=shape))


def facts(data: Data, rows: Sequence[Row]) -> np.ndarray:
    """(n, F + 1): what the headers say of samples before any pixel: stored size, spacing, size in the file.

    Their logarithms (lengths, rates and proportions are linear in them), standardised over the training split. The last
    column is the same large number for all, so that neighbours by angle are neighbours by distance.
    """
    def numbers(row: Row) -> list[float]:
        header = data.cache.header(row.index)
        return [*header.shape, *header.spacing, *header.source.get("shape", ())]

    known = np.log([numbers(row) for row in data.rows("train") or rows])
    x = (np.log([numbers(row) for row in rows]) - known.mean(0)) / np.where(known.std(0) > 1e-9, known.std(0), 1.0)
    return np.concatenate([x, np.full((len(x), 1), 10 * np.sqrt(len(x.T)))], 1)
