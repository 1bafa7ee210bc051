"""What images and volumes share: everything of a modality but its files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from meristem.modalities.base import Axis, Draw, Element, Header, Links, Look, Sample, Settings, Tokenizer, View, ViewSettings
from meristem.modalities.frame import Frame
from meristem.modalities.lattice import geometry
from meristem.modalities.lattice.channels import ChannelTokenizer
from meristem.modalities.lattice.drawing import draw
from meristem.modalities.lattice.intensity import NEUTRAL, SPANNED
from meristem.modalities.lattice.labels import nearest
from meristem.modalities.lattice.options import LatticeViewOptions
from meristem.modalities.lattice.tokenizer import LatticeTokenizer
from meristem.modalities.rng import Rng


class LatticeOptions(Settings):
    """What every lattice modality is told.

    channels: of the array. patch: elements of a token along each axis. tokens: of all channels of a patch, or of each `channel`
    by itself, whose kind an encoder may see (`kind`).
    """

    channels: int = 1
    patch: tuple[int, ...]
    tokens: Literal["patch", "channel"] = "patch"


class Lattice:
    """A modality whose samples are dense arrays (C, *S). Subclasses read, write and give statistics.

    A header's `source["levels"]` holds the stored integers that mean black and white (default 0 and 255): the span in which
    brightness, contrast, colour, gamma and solarisation work.
    """

    name: str
    suffixes: tuple[str, ...]
    members: tuple[str, ...] = ()
    later: tuple[str, ...] = ("patch",)
    Options: type[Settings] = LatticeOptions
    ViewOptions: type[ViewSettings] = LatticeViewOptions
    axes: tuple[Axis, ...]
    grows: Mapping[str, tuple[int, ...]]
    options: LatticeOptions
    operations = SPANNED

    def __init__(self, options: LatticeOptions) -> None:
        self.options = options
        self.channels = options.channels

    def read(self, paths: Sequence[Path], fields: Mapping[str, Path] = {}) -> Sample:
        raise NotImplementedError

    def statistics(self, array: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
        raise NotImplementedError

    def write(self, prediction: np.ndarray, header: Header, path: Path) -> Path:
        raise NotImplementedError

    def span(self, header: Header) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Black and white of each channel, normalised."""
        black, white = (tuple(level * s + o for s, o in zip(header.scale, header.offset, strict=True))
                        for level in header.source.get("levels", (0, 255)))
        return black, white

    def fetch(self, paths: Sequence[Path], header: Header, draws: Sequence[Draw]) -> list[np.ndarray]:
        raise NotImplementedError  # `read` leaves nothing in its files

    def edges(self, header: Header, draw: Draw) -> Links | None:
        return None

    def elements(self, path: Path) -> Sequence[Element] | None:
        return None

    def fitted(self, paths: Sequence[Path]) -> Self:
        return self

    def example(self, size: tuple[int, ...], rng: Rng) -> View:
        """Smooth noise: normal numbers on a lattice four times as coarse, interpolated; spacing 1."""
        rows, dims, device = len(rng.key), len(size), rng.key.device
        coarse = rng.normal("field", self.channels, *(max(n // 4, 2) for n in size))
        array = F.interpolate(coarse, size=size, mode="bilinear" if dims == 2 else "trilinear", align_corners=False)
        frame = Frame(torch.eye(dims + 1).expand(rows, -1, -1), size, torch.ones(rows, dims), tuple(a.unit for a in self.axes))
        return View("example", array, frame.to(device), torch.arange(rows, device=device), torch.zeros_like(rng.key),
                    fields={"mask": rng.integers("mask", 2, *size)})

    def grown(self, times: float) -> Self:
        return self

    def noise(self, size: tuple[int, ...], rng: Rng) -> View:
        return self.example(size, rng)

    def draw(self, view: ViewSettings, header: Header, look: Look) -> Draw:
        """See `LatticeViewOptions`."""
        assert isinstance(view, LatticeViewOptions)
        drawn = draw(view, header, self.span(header), look)
        if (have := header.source.get("channels")) is None:
            return drawn
        kinds = np.arange(self.channels)
        return replace(drawn, params={**drawn.params, "channel": np.where(kinds < have, kinds, -1)})

    def load(self, window: np.ndarray, draw: Draw, interpolate: bool) -> Tensor:
        """A stored window (…, *size) to the view's lattice (…, *shape), of the same integer type.

        Linear, averaging where it shrinks; or the nearest element, for labels. An exact window is not touched.
        """
        if draw.size == draw.shape:
            return torch.from_numpy(np.ascontiguousarray(window))
        if not interpolate:
            return torch.from_numpy(np.ascontiguousarray(nearest(window, draw.shape)))
        x = torch.from_numpy(np.ascontiguousarray(window, np.float32))
        if len(draw.size) == 2 and draw.size[1] > 1:
            flat = F.interpolate(x.reshape(1, -1, *draw.size), draw.shape, mode="bilinear", antialias=True)
            x = flat.reshape(*x.shape[:-2], *draw.shape)
        else:  # torch averages in 2D only, and wrongly in columns one element wide: axis by axis, along rows
            for axis, (n, m) in enumerate(zip(draw.size, draw.shape, strict=True), window.ndim - len(draw.size)):
                if n != m:
                    rows = x.movedim(axis, -1)
                    flat = F.interpolate(rows.reshape(1, 1, -1, n), (rows.numel() // n, m), mode="bilinear", antialias=True)
                    x = flat.reshape(*rows.shape[:-1], m).movedim(-1, axis)
        x = x.contiguous()
        if np.issubdtype(window.dtype, np.integer):
            x = x.round_().to(torch.from_numpy(np.empty(0, window.dtype)).dtype)
        return x

    @torch.no_grad()
    def augment(self, view: View, settings: ViewSettings) -> View:
        """Dequantise, deform, change intensities; each row by its own parameters, so no row depends on another.

        A row without affine or elastic change is not resampled: flips and exact windows keep their values.
        """
        assert isinstance(settings, LatticeViewOptions)
        params = view.params
        each = (slice(None), slice(None), *[None] * (view.array.ndim - 2))
        x = (view.array.float() * params["scale"][each]).add_(params["offset"][each])
        rows = _active(params, len(view))
        view = self._deform(replace(view, array=x), settings, rows)
        x = view.array
        touched = rows["spanned"]
        if len(touched):
            black, white = (params[name][touched][each] for name in ("black", "white"))
            span = torch.where(white > black, white - black, torch.ones_like(black))
            unit = (x[touched] - black) / span
            for name, change in self.operations.items():
                if name in rows and len(rows[name]):
                    mine = torch.searchsorted(touched, rows[name])
                    unit[mine] = change(unit[mine], params[name][rows[name]])
            x[touched] = unit * span + black
        noisy = rows.get("noise", ())
        if len(noisy):
            noise = Rng(params["noise_key"][noisy]).normal("noise", *x.shape[1:])
            x[noisy] += noise * params["noise"][noisy].reshape(-1, *[1] * (x.ndim - 1))
        return view

    def _deform(self, view: View, settings: LatticeViewOptions, rows: dict[str, Tensor]) -> View:
        """The view's array is this function's own; fields and weight are the loader's."""
        params, shape, size = view.params, view.frame.shape, settings.size
        matrix = geometry.inner(params, view.frame.spacing, size, shape)
        frame = view.frame.compose(matrix, size)
        warped = rows["warped"]

        def exact(x: Tensor, own: bool = False) -> Tensor:
            x = geometry.trim(x, size)
            out = x.clone() if not own and any(len(rows.get(f"flip{a}", ())) for a in range(len(size))) else x
            for axis in range(len(size)):
                flipped = rows.get(f"flip{axis}", ())
                if len(flipped):
                    out[flipped] = out[flipped].flip(axis - len(size))
            return out

        fields = {name: exact(x) for name, x in view.fields.items()}
        array = exact(view.array, own=True)
        weight = None if view.weight is None else exact(view.weight)
        if len(warped):
            displacement = None
            if "elastic" in params:
                assert settings.elastic is not None
                displacement = geometry.elastic(params["elastic"][warped], params["elastic_key"][warped],
                                                settings.elastic.cells, size)
            points = geometry.grid(matrix[warped], displacement, size, shape)
            pad = params["pad"][warped].reshape(len(warped), -1, *[1] * len(size))
            inside = torch.ones_like(view.array[:, :1]) if view.weight is None else view.weight
            sampled = geometry.sample(torch.cat([view.array[warped] - pad, inside[warped]], 1), points, "bilinear")
            weight = torch.ones_like(array[:, :1]) if weight is None else weight.clone()
            array[warped], weight[warped] = sampled[:, :-1] + pad, sampled[:, -1:]
            for name, x in view.fields.items():
                labels = x[warped][:, None].float()
                around = labels.flatten(1).amin(1).clamp(max=0).reshape(-1, 1, *[1] * len(size))  # -1 where none are known
                labels = geometry.sample(labels - around, points, "nearest") + around
                fields[name] = fields[name].clone()
                fields[name][warped] = labels[:, 0].to(x.dtype)
        return replace(view, array=array, fields=fields, weight=weight, frame=frame)

    def tokenizer(self) -> Tokenizer:
        make = LatticeTokenizer if self.options.tokens == "patch" else ChannelTokenizer
        return make(self.channels, self.options.patch)


def anchors(mask: np.ndarray, most: int = 64) -> tuple[tuple[int, ...], ...]:
    """Up to `most` positions of labelled elements of mask (*S), as many of each class as of any other, evenly spread."""
    labels = [label for label in np.unique(mask) if label > 0]
    chosen: list[tuple[int, ...]] = []
    for label in labels:
        places = np.flatnonzero(mask == label)
        places = places[np.linspace(0, len(places) - 1, min(most // len(labels), len(places))).astype(int)]
        chosen += [tuple(int(i) for i in index) for index in zip(*np.unravel_index(places, mask.shape), strict=True)]
    return tuple(chosen)


def _active(params: Mapping[str, Tensor], batch: int) -> dict[str, Tensor]:
    """Name -> rows for which an operation does something; asked of the device once."""
    flags: dict[str, Tensor] = {name: params[name] != neutral for name, neutral in NEUTRAL.items() if name in params}
    warps = [params[name].reshape(batch, -1).ne(neutral).any(1)
             for name, neutral in (("rotate", 0), ("zoom", 1), ("shear", 0), ("shift", 0), ("elastic", 0)) if name in params]
    if warps:
        flags["warped"] = torch.stack(warps).any(0)
    if "flip" in params:
        exact = ~flags["warped"] if warps else True
        flags |= {f"flip{axis}": (on > 0) & exact for axis, on in enumerate(params["flip"].unbind(1))}
    if not flags:
        return dict.fromkeys(("warped", "spanned"), torch.empty(0, dtype=torch.long))
    device = next(iter(flags.values())).device
    on = dict(zip(flags, torch.stack(list(flags.values())).cpu(), strict=True))
    nothing = torch.zeros(batch, dtype=torch.bool)
    on.setdefault("warped", nothing)
    on["spanned"] = torch.stack([nothing, *(on[name] for name in SPANNED if name in on)]).any(0)
    return {name: row.nonzero()[:, 0].to(device, non_blocking=True) for name, row in on.items()}
