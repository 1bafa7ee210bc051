"""Whole samples through an encoder, without augmentation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from meristem.platform.assembly import Assembly
from meristem.platform.data.loader import whole
from meristem.platform.data.manifest import Row
from meristem.platform.data.source import Data
from meristem.platform.objectives import Encoded

BATCH = 64


@torch.no_grad()
def encode(assembly: Assembly, data: Data, rows: Sequence[Row], by: str = "encoder") -> Iterator[Encoded]:
    """Encodings of the rows in order, some at a time; each sample as one plain view of the recipe's first view's size."""
    assembly.eval()
    recipe, device = assembly.recipe, next(assembly.parameters()).device
    encoder = assembly.module(by, "encoder")
    options = next(iter(recipe.views.values())).plain()
    for start in range(0, len(rows), BATCH):
        view = whole(data.cache, rows[start:start + BATCH], recipe.modality, options).to(device)
        view = recipe.modality.augment(view, options)
        yield encoder(assembly.tokenizer.stream(view).seen(recipe.encoder.sees))


def embed(assembly: Assembly, data: Data, rows: Sequence[Row], by: str = "encoder") -> np.ndarray:
    """(n, D) float32: the summary that the recipe names, which is the one its pretraining trained."""
    kind = assembly.recipe.summary
    parts = [encoded.summary[kind].float().cpu() for encoded in encode(assembly, data, rows, by)]
    result: np.ndarray = torch.cat(parts).numpy()
    return result
