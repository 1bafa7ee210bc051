"""What a caller hands over to be shown: slices, or strips of frames, prepared, and kept beside a run for later reports.

Where a picture has `times`, each of its arrays has a first axis of as many frames, shown side by side at those seconds.
"""

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
from meristem.platform.origin import METADATA

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
    times: tuple[float, ...] = ()


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
    times: tuple[float, ...] = ()


@dataclass(frozen=True)
class Cloud:
    """One case of points: points (N, 3), truth (N,) integers, predictions (N,) and scores by arm. case: a pseudonym.

    names: of the values that occur. category: of the shape, '' where there is none.
    """

    case: str
    rank: Rank
    points: Array
    truth: Array
    predictions: Mapping[str, Array]
    names: Mapping[int, str]
    scores: Mapping[str, float] = field(default_factory=dict)
    category: str = ""


@dataclass(frozen=True)
class Scene:
    """One case with what every arm found in it, and what is true. case: a pseudonym.

    backdrop, and the n numbers of a box on it: an image (H, W) or (H, W, 3), left, top, right, bottom in its elements from its
    corner; points from above (N, 2), centre, length, width, heading; first and last second (2,), of segments too.
    marks: by arm (K, n + 2), box, label, and state as in `evaluation.detection`. names: of the labels.
    """

    case: str
    rank: Rank
    backdrop: Array
    marks: Mapping[str, Array]
    names: Mapping[int, str]
    scores: Mapping[str, float] = field(default_factory=dict)
    aspect: float = 1.0


@dataclass(frozen=True)
class Strip:
    """What a sample shows over time: frames (n, H, W) or (n, H, W, 3). case: a pseudonym."""

    case: str
    frames: Array
    times: tuple[float, ...]
    aspect: float = 1.0


@dataclass(frozen=True)
class Attention:
    """Where an arm's encoder looks in a case.

    frames: (n, H, W) or (n, H, W, 3). heat: (n, h, w) attention of the tokens at those frames, 1 where it is spread evenly.
    curve: (T,) share of the attention at each token time, summing to 1; seconds: (T,) those times.
    """

    case: str
    arm: str
    frames: Array
    times: tuple[float, ...]
    heat: Array
    curve: tuple[float, ...]
    seconds: tuple[float, ...]
    aspect: float = 1.0


@dataclass(frozen=True)
class FeatureMap:
    """What an arm's encoder, untuned, makes of the places in a case, as colours 0…1. case: a pseudonym.

    picture: (H, W), (H, W, 3), or with `times` (n, …) of either; colours: (h, w, 3) or (n, h, w, 3), of tokens that cover it.
    Of a cloud: picture (N, 3) points, colours (N, 3).
    """

    case: str
    arm: str
    picture: Array
    colours: Array
    aspect: float = 1.0
    times: tuple[float, ...] = ()


@dataclass(frozen=True)
class Embedding:
    """What an arm's encoder, untuned, makes of whole samples: place (n, 2) along the first two principal components.

    share: of the variance that each explains. label: (n,) integers, −1 where there is none. names: of those that occur.
    """

    arm: str
    place: Array
    share: tuple[float, ...]
    label: Array
    names: Mapping[int, str]


@dataclass(frozen=True)
class Pictures:
    reconstructions: Sequence[Reconstruction] = ()
    overlays: Sequence[Overlay] = ()
    strips: Sequence[Strip] = ()
    attention: Sequence[Attention] = ()
    clouds: Sequence[Cloud] = ()
    scenes: Sequence[Scene] = ()
    features: Sequence[FeatureMap] = ()
    embeddings: Sequence[Embedding] = ()

    def __add__(self, other: Pictures) -> Pictures:
        """Those of both; a case's strip once, and what an arm makes of a case or of all."""
        known, mapped = {strip.case for strip in self.strips}, {(f.case, f.arm) for f in self.features}
        placed = {e.arm for e in self.embeddings}
        return Pictures([*self.reconstructions, *other.reconstructions], [*self.overlays, *other.overlays],
                        [*self.strips, *(strip for strip in other.strips if strip.case not in known)],
                        [*self.attention, *other.attention], [*self.clouds, *other.clouds], [*self.scenes, *other.scenes],
                        [*self.features, *(f for f in other.features if (f.case, f.arm) not in mapped)],
                        [*self.embeddings, *(e for e in other.embeddings if e.arm not in placed)])

    def save(self, path: Path) -> Path:
        """One .npz of arrays and a JSON index; no pickle."""
        arrays: dict[str, Array] = {}

        def keep(array: Array) -> str:
            name = f"a{len(arrays)}"
            arrays[name] = np.asarray(array)
            return name

        index = {
            "reconstructions": [{"original": keep(r.original), "masked": keep(r.masked), "aspect": r.aspect, "label": r.label,
                                 "reconstruction": keep(r.reconstruction), "times": r.times} for r in self.reconstructions],
            "overlays": [{"case": o.case, "rank": o.rank, "image": keep(o.image), "truth": keep(o.truth), "aspect": o.aspect,
                          "predictions": {arm: keep(p) for arm, p in o.predictions.items()}, "scores": dict(o.scores),
                          "times": o.times} for o in self.overlays],
            "strips": [{"case": s.case, "frames": keep(s.frames), "times": s.times, "aspect": s.aspect} for s in self.strips],
            "attention": [{"case": a.case, "arm": a.arm, "frames": keep(a.frames), "times": a.times, "heat": keep(a.heat),
                           "curve": a.curve, "seconds": a.seconds, "aspect": a.aspect} for a in self.attention],
            "clouds": [{"case": c.case, "rank": c.rank, "points": keep(c.points), "truth": keep(c.truth),
                        "predictions": {arm: keep(p) for arm, p in c.predictions.items()}, "names": list(c.names.items()),
                        "scores": dict(c.scores), "category": c.category} for c in self.clouds],
            "scenes": [{"case": c.case, "rank": c.rank, "backdrop": keep(c.backdrop), "names": list(c.names.items()),
                        "marks": {arm: keep(m) for arm, m in c.marks.items()}, "scores": dict(c.scores), "aspect": c.aspect}
                       for c in self.scenes],
            "features": [{"case": f.case, "arm": f.arm, "picture": keep(f.picture), "colours": keep(f.colours),
                          "aspect": f.aspect, "times": f.times} for f in self.features],
            "embeddings": [{"arm": e.arm, "place": keep(e.place), "share": e.share, "label": keep(e.label),
                            "names": list(e.names.items())} for e in self.embeddings]}
        np.savez_compressed(path, index=np.frombuffer(json.dumps(index).encode(), dtype=np.uint8), **arrays)  # type: ignore[arg-type]
        return path

    @classmethod
    def load(cls, path: Path) -> Pictures:
        """Raises MeristemError when the file is not one of `save`."""
        try:
            with np.load(path, allow_pickle=False) as stored:
                index = json.loads(stored["index"].tobytes())
                return cls([Reconstruction(stored[r["original"]], stored[r["masked"]], stored[r["reconstruction"]], r["aspect"],
                                           r["label"], tuple(r.get("times", ()))) for r in index["reconstructions"]],
                           [Overlay(o["case"], o["rank"], stored[o["image"]], stored[o["truth"]],
                                    {arm: stored[p] for arm, p in o["predictions"].items()}, o["scores"], o["aspect"],
                                    tuple(o.get("times", ()))) for o in index["overlays"]],
                           [Strip(s["case"], stored[s["frames"]], tuple(s["times"]), s["aspect"])
                            for s in index.get("strips", ())],
                           [Attention(a["case"], a["arm"], stored[a["frames"]], tuple(a["times"]), stored[a["heat"]],
                                      tuple(a["curve"]), tuple(a["seconds"]), a["aspect"]) for a in index.get("attention", ())],
                           [Cloud(c["case"], c["rank"], stored[c["points"]], stored[c["truth"]],
                                  {arm: stored[p] for arm, p in c["predictions"].items()}, dict(c["names"]), c["scores"],
                                  c["category"]) for c in index.get("clouds", ())],
                           [Scene(c["case"], c["rank"], stored[c["backdrop"]],
                                  {arm: stored[m] for arm, m in c["marks"].items()}, dict(c["names"]), c["scores"],
                                  c["aspect"]) for c in index.get("scenes", ())],
                           [FeatureMap(f["case"], f["arm"], stored[f["picture"]], stored[f["colours"]], f["aspect"],
                                       tuple(f["times"])) for f in index.get("features", ())],
                           [Embedding(e["arm"], stored[e["place"]], tuple(e["share"]), stored[e["label"]], dict(e["names"]))
                            for e in index.get("embeddings", ())])
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


def pick_samples(group: Group, each: int = 2) -> dict[str, list[int]]:
    """Heading -> places, in the group's cases, of the `each` extreme ones by the probabilities (mean over seeds), none twice.

    Right with the highest probability; wrong with the lowest of the true class; of the others, the lowest largest probability.
    """
    assert group.target is not None and group.probabilities is not None
    p = group.probabilities.mean(0)
    confidence, right = p.max(-1), p.argmax(-1) == group.target
    true = p[np.arange(len(p)), group.target]

    def first(score: Array, among: Array) -> list[int]:
        return [int(i) for i in np.argsort(score, kind="stable") if among[i]][:each]

    sure, wrong = first(-confidence, right), first(true, ~right)
    rest = ~np.isin(np.arange(len(p)), [*sure, *wrong])
    return {"most confident right": sure, "least confident": first(confidence, rest), "worst wrong": wrong}


def sample_groups(results: Results) -> dict[tuple[str, str, Labels], Group]:
    """(arm, protocol, labels) -> group, of the first protocol that gives probabilities, at its fewest and its most labels.

    Arms that look at samples only.
    """
    found = {key: cells for key, cells in groups(results).items()
             if key[0] != METADATA and cells[0].cases[0].target is not None}
    protocol = next((protocol for _, protocol, _ in found), None)
    budgets = [labels for _, p, labels in found if p == protocol]  # few labels first
    return {key: results.group(cells) for key, cells in found.items()
            if key[1] == protocol and key[2] in (budgets[0], budgets[-1])}


def pick_cases(results: Results, protocol: str, labels: Labels) -> dict[Rank, str]:
    """The worst, median and best case by the primary metric, averaged over all arms, seeds and classes: no arm chooses.

    Detection: by the F1 of each case in which there is something to find.
    """
    made = [results.group(cells) for (_, p, n), cells in groups(results).items() if (p, n) == (protocol, labels)]
    shared = sorted(set.intersection(*(set(g.cases) for g in made)))
    if made[0].detections is not None:
        sought = {name for name, case in zip(made[0].cases, made[0].detections.cases[0], strict=True)
                  if case.truth is not None and not all(case.truth.ignore or (not case.truth.label,))}
        shared = [case for case in shared if case in sought] or shared
    score = np.zeros(len(shared))
    for group in made:
        place = [group.cases.index(case) for case in shared]
        score += np.nanmean(group.case_values(results.metric), (0, 1))[place]
    order = np.argsort(score if results.higher[results.metric] else -score, kind="stable")
    return {"worst": shared[order[0]], "median": shared[order[len(order) // 2]], "best": shared[order[-1]]}
