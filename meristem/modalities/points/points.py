"""Point clouds as a modality: sets of points (x, y, z, features…)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from meristem.errors import DataError
from meristem.modalities.base import Axis, Draw, Element, Header, Links, Look, Sample, Settings, View, ViewSettings
from meristem.modalities.facts import Facts
from meristem.modalities.frame import Frame
from meristem.modalities.objects import Objects
from meristem.modalities.points import drawing, files, intake
from meristem.modalities.points.cloud import Cloud, channels
from meristem.modalities.points.options import WIDTHS, PointsOptions, PointsViewOptions
from meristem.modalities.points.segments import segments
from meristem.modalities.points.shape import ALIKE, fingerprint
from meristem.modalities.points.tokenizer import PointTokenizer
from meristem.modalities.rng import Rng

FEWEST = 4  # points: fewer have no shape
FAR = 8192.0  # metres from the origin up to which float32 tells millimetres apart


class Points:
    """Clouds stored as float32 (3 + features, N), coordinates first, in a view's unit.

    Source coordinates are metres as in the file (times `unit`), from `header.source["origin"]` on: whole metres, not 0 where
    the file counts from so far away (UTM) that float32 would lose millimetres. header.source: points, of the file; left_out:
    [first, count] of runs of its points that are not stored; sampled: whether they are no points of the file but its surface's.
    """

    name = "points"
    likeness = ALIKE
    version = 1
    suffixes: tuple[str, ...] = files.SUFFIXES
    members: tuple[str, ...] = ()
    later = ("tokens", "count", "size", "cell", "places")
    Options: type[Settings] = PointsOptions
    ViewOptions: type[ViewSettings] = PointsViewOptions
    grows: Mapping[str, tuple[int, ...]] = {"points": (0,)}
    options: PointsOptions

    def __init__(self, options: PointsOptions) -> None:
        self.options = options
        self.channels = 3 + sum(WIDTHS[f] for f in options.features)
        finest, coarsest = options.scales
        self.axes = tuple(Axis(name, "m", finest, coarsest) for name in "xyz")

    def read(self, paths: Sequence[Path], fields: Mapping[str, Path] = {}) -> Sample:
        """One file. Raises DataError.

        Reasons: missing, empty, truncated, unreadable, columns, points, shape, feature, colour, intensity, nan, few,
        degenerate, faces, precision, label, several.
        """
        if len(paths) != 1:
            raise DataError("several", f"a cloud of {len(paths)} files", "Give one file per cloud.")
        cloud = files.read_cloud(paths[0], self.options)
        n = len(cloud)
        companions = self._companions(cloud, fields)
        cloud, good = self._usable(cloud)
        if len(cloud) < FEWEST:
            raise DataError("empty" if not n else "few", f"holds {len(cloud)} points that can be used", f"At least {FEWEST}.")
        xyz = cloud.xyz * self.options.unit
        origin = np.zeros(3)
        if np.abs(xyz).max() > FAR:
            if self.options.normalise == "none":
                raise DataError("precision", f"points lie up to {np.abs(xyz).max():.0f} m from the origin, where float32 loses "
                                "millimetres", "Set modality.points.normalise=centre, or modality.points.unit to the metres of "
                                "the file's unit.")
            origin = np.round(xyz.mean(0))
            xyz = xyz - origin
        companions = {name: x[good] for name, x in companions.items()}
        if self.options.segments is not None:
            companions["segment"] = segments(xyz, self.options.segments)
        centre, radius = np.zeros(3), 1.0
        if self.options.normalise != "none":
            centre = xyz.mean(0)
        if self.options.normalise == "sphere":
            radius = float(np.linalg.norm(xyz - centre, axis=1).max())
            if not radius > 0:
                raise DataError("degenerate", f"all {len(cloud)} points are one and the same", "Leave the file out.")
        columns = [channels(cloud, f, self.options.intensity) for f in self.options.features]
        array = np.concatenate([((xyz - centre) / radius).T.astype(np.float32), *columns])
        affine = np.diag([radius] * 3 + [1.0])
        affine[:3, 3] = centre
        c = len(array)
        source = {"points": n, "left_out": _runs(~good), "sampled": cloud.sampled, "origin": origin.tolist()}
        header = Header(array.shape, tuple(map(tuple, affine.tolist())), (1.0,) * 3, (1.0,) * c, (0.0,) * c, (0.0,) * c, source)
        notes = {"points": float(len(xyz)), **{f"extent {a} (m)": float(w) for a, w in zip("xyz", np.ptp(xyz, 0), strict=True)}}
        if not good.all():
            notes["points left out"] = float((~good).sum())
        return Sample(array, header, companions, notes=notes, fingerprint=fingerprint(array[:3]))

    def _companions(self, cloud: Cloud, fields: Mapping[str, Path]) -> dict[str, np.ndarray]:
        """A number for every point of the file: its own labels, those of a file beside it, or its own renumbered by one."""
        found = {} if cloud.label is None else {"mask": cloud.label}
        for name, path in fields.items():
            if not files.names_parts(path):
                found[name] = files.read_numbers(path, len(cloud))
            elif name in found:
                found[name] = files.part_numbers(path, found[name])
        return found

    def _usable(self, cloud: Cloud) -> tuple[Cloud, np.ndarray]:
        """Without the points that are not finite, where they may go, and those outside the sector; (N,) bool which stay."""
        parts = [cloud.xyz, *(cloud.features[f] for f in self.options.features if f in cloud.features)]
        good = np.logical_and.reduce([np.isfinite(p).all(1) for p in parts])
        if not good.all() and self.options.nonfinite == "refuse":
            raise DataError("nan", f"{(~good).sum()} of {len(good)} points are NaN or infinite",
                            "Export the file again, or set modality.points.nonfinite=drop to leave them out.")
        if self.options.sector is not None:
            good &= np.abs(np.arctan2(cloud.xyz[:, 1], cloud.xyz[:, 0])) <= np.radians(self.options.sector)
        if good.all():
            return cloud, good
        return Cloud(cloud.xyz[good], {f: x[good] for f, x in cloud.features.items()}, None, cloud.sampled), good

    def statistics(self, array: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Nothing is left to do: `read` scales."""
        return (1.0,) * len(array), (0.0,) * len(array)

    def fetch(self, paths: Sequence[Path], header: Header, draws: Sequence[Draw]) -> list[np.ndarray]:
        raise NotImplementedError  # `read` leaves nothing in its files

    def edges(self, header: Header, draw: Draw) -> Links | None:
        return None

    def elements(self, path: Path) -> Sequence[Element] | None:
        """The clouds of an HDF5 list; none in a text or an archive that holds no points, and in labels of other files."""
        return files.elements(path)

    def fitted(self, paths: Sequence[Path]) -> Self:
        return self

    @staticmethod
    def recognised(path: Path) -> bool:
        """Whether a file of one of its suffixes holds points, as far as its beginning tells."""
        return files.recognised(path)

    def draw(self, view: ViewSettings, header: Header, look: Look) -> Draw:
        """See `drawing.draw`."""
        assert isinstance(view, PointsViewOptions)
        return drawing.draw(view, header, look)

    def load(self, window: np.ndarray, draw: Draw, interpolate: bool) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(window))

    def augment(self, view: View, settings: ViewSettings) -> View:
        """See `drawing.augment`."""
        assert isinstance(settings, PointsViewOptions)
        before = self.options.features.index("normal") if "normal" in self.options.features else -1
        first = 3 + sum(WIDTHS[f] for f in self.options.features[:before])
        return drawing.augment(view, settings, slice(first, first + 3) if before >= 0 else None)

    def tokenizer(self) -> PointTokenizer:
        return PointTokenizer(self.channels, self.options)

    def example(self, size: tuple[int, ...], rng: Rng) -> View:
        """Points of a Gaussian blob with normal features."""
        rows, n, device = len(rng.key), size[0], rng.key.device
        array = rng.normal("points", self.channels, n)
        array[:, :3] *= 0.4
        frame = Frame(torch.eye(4).expand(rows, -1, -1), (n,), torch.ones(rows, 3), tuple(a.unit for a in self.axes))
        return View("example", array, frame.to(device), torch.arange(rows, device=device), torch.zeros_like(rng.key),
                    fields={"mask": rng.integers("mask", 2, n)}, index=torch.arange(n, device=device).expand(rows, -1))

    def grown(self, times: float) -> Self:
        """With as many times the groups, so that each point is in as many of them as before."""
        return type(self)(self.options.model_copy(update={"count": max(round(self.options.count * times), 1)}))

    def noise(self, size: tuple[int, ...], rng: Rng) -> View:
        return self.example(size, rng)

    def placed(self, objects: Objects, header: Header) -> Objects:
        """Upright boxes in the file's unit to metres from the sample's origin. Raises DataError."""
        if objects.box.shape[1] != 7:
            raise DataError("box", f"boxes of {objects.box.shape[1]} numbers are no boxes among points",
                            "Give centre, length, width, height and heading.")
        return replace(objects, box=objects.box * self._metres() - self._origin(header))

    def annotated(self, box: np.ndarray, header: Header) -> np.ndarray:
        """(K, 7) in source coordinates, as annotations have them: in the file's unit."""
        return (box + self._origin(header)) / self._metres()

    def _metres(self) -> np.ndarray:
        return np.array([self.options.unit] * 6 + [1.0])

    @staticmethod
    def _origin(header: Header) -> np.ndarray:
        return np.array([*header.source["origin"], 0.0, 0.0, 0.0, 0.0])

    def facts(self, paths: Sequence[Path], sample: Sample) -> Facts:
        """See `Telling`."""
        return intake.facts(files.read_cloud(paths[0], self.options), self.options.unit)

    def write(self, prediction: np.ndarray, header: Header, path: Path) -> Path:
        """Labels (N,) of the stored points as .npy, one for every point of the file in its order; −1 where none is stored."""
        labels = np.full(header.source["points"], -1, np.int64)
        labels[_kept(header.source)] = prediction
        suffix = files.suffix(path)
        path = path.with_name(f"{path.name[:-len(suffix)] if suffix else path.name}.npy")
        np.save(path, labels.astype(np.int16 if abs(labels).max() < 32768 else np.int64))
        return path


def _runs(mask: np.ndarray) -> list[list[int]]:
    """[first, count] of every run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(np.int8), [0]])))
    return [[int(a), int(b - a)] for a, b in edges.reshape(-1, 2)]


def _kept(source: Mapping[str, Any]) -> np.ndarray:
    kept = np.ones(source["points"], bool)
    for first, count in source["left_out"]:
        kept[first:first + count] = False
    return kept
