"""What encoders make of test samples before any label: their tokens as colours, their vectors as a map."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from meristem.modalities.base import Modality, View
from meristem.platform.assembly import Assembly
from meristem.platform.data.loader import whole
from meristem.platform.data.manifest import Row
from meristem.platform.data.source import Data
from meristem.platform.objectives import Encoded
from meristem.platform.origin import METADATA
from meristem.platform.report.pictures import Embedding, FeatureMap, pick_slice
from meristem.tasks.embedding import embed, plain
from meristem.tasks.looks import POINTS, picture, spread, thin, timed, varied
from meristem.tasks.probing import untrained
from meristem.tasks.transfer import Arm, seeded

COLOURED = 3  # samples whose tokens are shown
MAPPED = 256  # vectors on a map

Array = np.ndarray


def gather(contestants: Sequence[Arm]) -> tuple[list[FeatureMap], list[Embedding]]:
    """Of every arm that has an encoder, as it was before fine-tuning: maps of some test samples where they have places, and
    one map of many. Arms from random weights are drawn as the first seed draws them.
    """
    maps: list[FeatureMap] = []
    vectors: list[Embedding] = []
    for arm in (arm for arm in contestants if arm.name != METADATA):
        recipe, data = seeded(arm.recipe, 0), arm.data
        assembly = untrained(recipe, arm.init).eval()
        rows = recipe.task.cases(data, "test")
        many = [rows[i] for i in sorted(np.random.default_rng(0).permutation(len(rows))[:MAPPED])]  # of all arms the same
        maps += _maps(assembly, arm.name, data, varied(data.samples(rows), COLOURED))
        if len(many) > 2:
            vectors.append(_map(assembly, arm.name, data, many, getattr(recipe.task, "features", ())))
    return maps, vectors


def components(x: Array, n: int) -> tuple[Array, Array]:
    """Principal components (m, n) of vectors (m, D), and the share of the variance (n,) that each explains.

    The vector farthest along each lies on its positive side, so that signs do not hang on the solver.
    """
    centred = x.astype(np.float64) - x.mean(0, dtype=np.float64)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    u, s = (np.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, max(0, n - len(s)))])[..., :n] for a in (u, s))
    scores = u * s
    sign = np.where(scores.max(0) >= -scores.min(0), 1.0, -1.0)
    return scores * sign, s**2 / max(float((centred**2).sum()), 1e-300)


def _map(assembly: Assembly, arm: str, data: Data, rows: Sequence[Row], summaries: Sequence[str]) -> Embedding:
    place, share = components(embed(assembly, data, rows, summaries=summaries), 2)
    labels = np.array([row.labels.get("class", -1) for row in rows])
    names = data.manifest.class_names
    return Embedding(arm, place.astype(np.float32), tuple(share.tolist()), labels,
                     {int(v): names[v] if v < len(names) else f"class {v}" for v in np.unique(labels) if v >= 0})


@torch.no_grad()
def _maps(assembly: Assembly, arm: str, data: Data, rows: Sequence[Row]) -> list[FeatureMap]:
    """The first three principal components of the tokens of some samples, all together, as red, green and blue.

    As Oquab et al. 2023 (DINOv2) draw them, but with no background taken away. None of samples without places.
    """
    recipe = assembly.recipe
    device = next(assembly.parameters()).device
    options = plain(recipe).model_copy(update={"count": 1})
    looks: list[tuple[Row, View, Encoded, Tensor | None]] = []
    for row in rows:
        view = recipe.modality.augment(whole(data.cache, [row], recipe.modality, options).to(device), options)
        stream = assembly.tokenizer.stream(view)
        looks.append((row, view, assembly.encoder(stream.seen(recipe.encoder.sees)), stream.position))
    if not looks:
        return []
    shown = components(np.concatenate([_tokens(encoded) for _, _, encoded, _ in looks]), 3)[0]
    low, high = np.percentile(shown, [2, 98], axis=0)
    colours = np.clip((shown - low) / np.maximum(high - low, 1e-12), 0, 1).astype(np.float32)
    found: list[FeatureMap] = []
    first = 0
    for row, view, encoded, position in looks:
        n = len(_tokens(encoded))
        mine, first = colours[first:first + n], first + n
        found += _coloured(arm, row, view, encoded, position, mine, recipe.modality)
    return found


def _tokens(encoded: Encoded) -> Array:
    """(n, D) of the one row."""
    tokens: Array = encoded.tokens[0][encoded.valid[0]].float().cpu().numpy()
    return tokens


def _coloured(arm: str, row: Row, view: View, encoded: Encoded, position: Tensor | None, colours: Array,
              modality: Modality) -> Iterator[FeatureMap]:
    """One look with the colours (n, 3) of its tokens; nothing where they lie in no plane and no space."""
    array, spacing = view.array[0].float().cpu().numpy(), view.frame.spacing[0].tolist()
    lattice = encoded.lattice or ()
    if len(lattice) == len(modality.axes) > 1 and np.prod(lattice) == len(colours):  # each axis is a place
        cells = colours.reshape(*lattice, 3)
        if timed(modality):
            assert position is not None
            picks = spread(0, lattice[0] - 1)
            frames = [(2 * t + 1) * array.shape[1] // (2 * lattice[0]) for t in picks]
            yield FeatureMap(row.case, arm, picture(thin(array[:, frames])), cells[picks], spacing[1] / spacing[2],
                             tuple(spacing[0] * t for t in frames))
            return
        plane = pick_slice(np.zeros(array.shape[1:], np.uint8), spacing)
        level = replace(plane, index=(2 * plane.index + 1) * lattice[-1] // (2 * array.shape[-1]))
        yield FeatureMap(row.case, arm, plane.of(picture(array)), level.of(cells), plane.aspect)
    elif view.index is not None and position is not None and position.shape[-1] == 3 and encoded.index is None:
        there = view.index[0].cpu().numpy() >= 0
        points = array[:3, there].T
        points = points[np.linspace(0, len(points) - 1, min(len(points), POINTS)).round().astype(int)]
        _, nearest = cKDTree(position[0][encoded.valid[0]].cpu().numpy()).query(points)
        yield FeatureMap(row.case, arm, points, colours[nearest])
