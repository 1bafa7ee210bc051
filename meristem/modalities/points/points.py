"""Point clouds as a modality: sets of points (x, y, z, features…)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from meristem.errors import DataError
from meristem.modalities.base import Axis, Draw, Element, Header, Links, Look, Sample, Settings, View, ViewSettings
from meristem.modalities.frame import Frame
from meristem.modalities.points.options import WIDTHS, PointsOptions, PointsViewOptions
from meristem.modalities.points.tokenizer import PointTokenizer
from meristem.modalities.rng import Rng


class Points:
    """Clouds stored as float32 (3 + features, N), coordinates first, in a view's unit."""

    name = "points"
    suffixes: tuple[str, ...] = (".npz", ".npy")
    members: tuple[str, ...] = ()
    Options: type[Settings] = PointsOptions
    ViewOptions: type[ViewSettings] = PointsViewOptions
    options: PointsOptions

    def __init__(self, options: PointsOptions) -> None:
        self.options = options
        self.channels = 3 + sum(WIDTHS[f] for f in options.features)
        finest, coarsest = (0.05, 4.0) if options.normalise == "sphere" else (0.1, 200.0)
        self.axes = tuple(Axis(name, "m", finest, coarsest) for name in "xyz")

    def read(self, paths: Sequence[Path], fields: Mapping[str, Path] = {}) -> Sample:
        with np.load(paths[0], allow_pickle=False) as archive:
            xyz = archive["points"].astype(np.float64) * self.options.unit
            columns = [archive["normals"].T.astype(np.float32)] if "normal" in self.options.features else []
            masks = {"mask": archive["part"]} if "part" in archive.files else {}
        if not np.isfinite(xyz).all():
            raise DataError("nan", "coordinates are NaN or infinite", "Remove those points.")
        centre = xyz.mean(0) if self.options.normalise != "none" else np.zeros(3)
        radius = float(np.linalg.norm(xyz - centre, axis=1).max()) if self.options.normalise == "sphere" else 1.0
        array = np.concatenate([((xyz - centre) / radius).T.astype(np.float32), *columns])
        affine = np.diag([radius] * 3 + [1.0])
        affine[:3, 3] = centre
        c = len(array)
        header = Header(array.shape, tuple(map(tuple, affine.tolist())), (1.0, 1.0, 1.0), (1.0,) * c, (0.0,) * c, (0.0,) * c)
        return Sample(array, header, masks)

    def statistics(self, array: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return (1.0,) * len(array), (0.0,) * len(array)

    def fetch(self, paths: Sequence[Path], header: Header, draws: Sequence[Draw]) -> list[np.ndarray]:
        raise NotImplementedError  # `read` leaves nothing in its files

    def edges(self, header: Header, draw: Draw) -> Links | None:
        return None

    def elements(self, path: Path) -> Sequence[Element] | None:
        return None

    def draw(self, view: ViewSettings, header: Header, look: Look) -> Draw:
        assert isinstance(view, PointsViewOptions)
        whole = header.shape[1]
        n = min(view.size[0], whole)
        if view == view.plain():
            index = np.linspace(0, whole - 1, n).round().astype(int)
        else:
            index = look.rng.permutation("points", whole)[0, :n].numpy()
        return Draw((0,), (whole,), (n,), {}, tuple(index.tolist()))

    def load(self, window: np.ndarray, draw: Draw, interpolate: bool) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(window))

    def augment(self, view: View, settings: ViewSettings) -> View:
        return replace(view, array=view.array.float())

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

    def write(self, prediction: np.ndarray, header: Header, path: Path) -> Path:
        raise NotImplementedError
