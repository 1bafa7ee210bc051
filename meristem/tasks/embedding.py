"""Whole samples through an encoder, without augmentation."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from meristem.errors import MeristemError
from meristem.modalities.base import ViewSettings
from meristem.platform.assembly import Assembly
from meristem.platform.data.loader import whole
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


def embed(assembly: Assembly, data: Data, rows: Sequence[Row], by: str = "encoder") -> np.ndarray:
    """(n, D) float32: the summary that the recipe names, which is the one its pretraining trained; its mean over looks."""
    recipe = assembly.recipe
    parts = [over_looks(encoded.summary[recipe.summary].float(), recipe).cpu() for encoded in encode(assembly, data, rows, by)]
    result: np.ndarray = torch.cat(parts).numpy()
    return result


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
