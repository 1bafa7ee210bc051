"""What a caller hands over to be shown: two-dimensional slices, prepared, and kept beside a run for later reports."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from meristem.errors import MeristemError
from meristem.platform.evaluation.results import Group, Labels, Results, groups

Array = NDArray[Any]
Rank = Literal["worst", "median", "best"]


@dataclass(frozen=True)
class Reconstruction:
    """original, masked, reconstruction: (H, W) or (H, W, 3) on one intensity scale; NaN in `masked` where content was hidden.

    aspect: height of a row over width of a column. label: a word for the caption (the recipe's name).
    """

    original: Array
    masked: Array
    reconstruction: Array
    aspect: float = 1.0
    label: str = ""


@dataclass(frozen=True)
class Overlay:
    """One case: image (H, W) or (H, W, 3), truth (H, W) integers, predictions and scores by arm. case: a pseudonym."""

    case: str
    rank: Rank
    image: Array
    truth: Array
    predictions: Mapping[str, Array]
    scores: Mapping[str, float] = field(default_factory=dict)
    aspect: float = 1.0


@dataclass(frozen=True)
class Pictures:
    reconstructions: Sequence[Reconstruction] = ()
    overlays: Sequence[Overlay] = ()

    def save(self, path: Path) -> Path:
        """One .npz of arrays and a JSON index; no pickle."""
        arrays: dict[str, Array] = {}

        def keep(array: Array) -> str:
            name = f"a{len(arrays)}"
            arrays[name] = np.asarray(array)
            return name

        index = {
            "reconstructions": [{"original": keep(r.original), "masked": keep(r.masked), "aspect": r.aspect, "label": r.label,
                                 "reconstruction": keep(r.reconstruction)} for r in self.reconstructions],
            "overlays": [{"case": o.case, "rank": o.rank, "image": keep(o.image), "truth": keep(o.truth), "aspect": o.aspect,
                          "predictions": {arm: keep(p) for arm, p in o.predictions.items()}, "scores": dict(o.scores)}
                         for o in self.overlays]}
        np.savez_compressed(path, index=np.frombuffer(json.dumps(index).encode(), dtype=np.uint8), **arrays)  # type: ignore[arg-type]
        return path

    @classmethod
    def load(cls, path: Path) -> Pictures:
        """Raises MeristemError when the file is not one of `save`."""
        try:
            with np.load(path, allow_pickle=False) as stored:
                index = json.loads(stored["index"].tobytes())
                return cls([Reconstruction(stored[r["original"]], stored[r["masked"]], stored[r["reconstruction"]], r["aspect"],
                                           r["label"]) for r in index["reconstructions"]],
                           [Overlay(o["case"], o["rank"], stored[o["image"]], stored[o["truth"]],
                                    {arm: stored[p] for arm, p in o["predictions"].items()}, o["scores"], o["aspect"])
                            for o in index["overlays"]])
        except (OSError, ValueError, KeyError) as error:
            raise MeristemError(f"{path} does not hold pictures of a run: {error}", "Evaluate again to make them.") from None


@dataclass(frozen=True)
class Slice:
    """One plane of a lattice, the same for image, truth and prediction. aspect: height of a row over width of a column."""

    axis: int | None
    index: int
    aspect: float

    def of(self, array: Array) -> Array:
        """(*S) or (*S, 3) -> (H, W) or (H, W, 3); planes of volumes are turned so that the second axis points up."""
        if self.axis is None:
            return array
        return np.rot90(np.take(array, self.index, self.axis), axes=(0, 1))


def pick_slice(label: Array, spacing: Sequence[float], axis: int = 2) -> Slice:
    """The plane across `axis` with the largest labelled area; the middle one without labels. A 2D map is its own plane.

    label: (*S) integers, 2D or 3D. spacing: size of a voxel per axis.
    """
    if label.ndim == 2:
        return Slice(None, 0, spacing[0] / spacing[1])
    if label.ndim != 3:
        raise ValueError(f"wanted a label map of two or three axes, got shape {label.shape}")
    axis %= 3
    rest = [a for a in range(3) if a != axis]
    area = np.count_nonzero(label, axis=tuple(rest))
    index = int(area.argmax()) if area.any() else label.shape[axis] // 2
    return Slice(axis, index, spacing[rest[1]] / spacing[rest[0]])  # rows run along the second remaining axis after the turn


def pick_cases(results: Results, protocol: str, labels: Labels) -> dict[Rank, str]:
    """The worst, median and best case by the primary metric, averaged over all arms, seeds and classes: no arm chooses."""
    made = [Group.of(cells, results.classes) for (_, p, n), cells in groups(results).items() if (p, n) == (protocol, labels)]
    shared = sorted(set.intersection(*(set(g.cases) for g in made)))
    score = np.zeros(len(shared))
    for group in made:
        place = [group.cases.index(case) for case in shared]
        score += group.values[results.metric].mean((0, 1))[place]
    order = np.argsort(score if results.higher[results.metric] else -score, kind="stable")
    return {"worst": shared[order[0]], "median": shared[order[len(order) // 2]], "best": shared[order[-1]]}
