"""Graphs as a modality: sets of nodes with edges between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from meristem.modalities.base import Axis, Draw, Element, Header, Links, Look, Sample, Settings, View, ViewSettings
from meristem.modalities.frame import Frame
from meristem.modalities.graph.options import GraphOptions, GraphViewOptions
from meristem.modalities.graph.tokenizer import GraphTokenizer
from meristem.modalities.rng import Rng
from meristem.modalities.stream import Edges


class Graph:
    """Node features and encodings stored as (channels + structure, N), edges as tables `pairs` (2, E), `kind` (E,)."""

    name = "graph"
    suffixes: tuple[str, ...] = (".graph", ".txt", ".csv")
    members: tuple[str, ...] = ()
    Options: type[Settings] = GraphOptions
    ViewOptions: type[ViewSettings] = GraphViewOptions
    axes: tuple[Axis, ...] = ()
    options: GraphOptions

    def __init__(self, options: GraphOptions) -> None:
        self.options = options
        self.channels = options.channels or 1
        self.edge_kinds = options.edge_kinds or 1

    def read(self, paths: Sequence[Path], fields: Mapping[str, Path] = {}) -> Sample:
        raise NotImplementedError

    def statistics(self, array: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return (1.0,) * len(array), (0.0,) * len(array)

    def fetch(self, paths: Sequence[Path], header: Header, draws: Sequence[Draw]) -> list[np.ndarray]:
        raise NotImplementedError  # `read` leaves nothing in its files

    def elements(self, path: Path) -> Sequence[Element] | None:
        return None

    def draw(self, view: ViewSettings, header: Header, look: Look) -> Draw:
        n = header.shape[1]
        return Draw((0,), (n,), (n,))

    def edges(self, header: Header, draw: Draw) -> Links | None:
        return Links(header.tables["pairs"], header.tables["kind"])

    def load(self, window: np.ndarray, draw: Draw, interpolate: bool) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(window))

    def augment(self, view: View, settings: ViewSettings) -> View:
        view.array = view.array.float()
        return view

    def tokenizer(self) -> GraphTokenizer:
        return GraphTokenizer(self.channels, self.edge_kinds, self.options.walk, self.options.laplacian)

    def example(self, size: tuple[int, ...], rng: Rng) -> View:
        """Random graphs of up to 64 nodes, two edges each, with normal features and structure."""
        rows, n, device = len(rng.key), min(size[0], 64), rng.key.device
        extra = self.options.walk + 2 * self.options.laplacian
        array = rng.normal("nodes", self.channels + extra, n)
        a = torch.arange(n, device=device).expand(2, -1)[None].expand(rows, -1, -1).flatten(1)
        b = (a + 1 + rng.integers("edges", max(n - 1, 1), 2 * n)) % n
        table = torch.zeros(rows, n, n, dtype=torch.bool, device=device)
        row = torch.arange(rows, device=device)[:, None]
        table[row, a, b] = table[row, b, a] = n > 1
        at, source, target = table.nonzero(as_tuple=True)
        kind = torch.zeros_like(at)
        frame = Frame(torch.ones(rows, 1, 1), (n,), torch.ones(rows, 0), ())
        return View("example", array, frame.to(device), torch.arange(rows, device=device), torch.zeros_like(rng.key),
                    fields={"mask": rng.integers("mask", 2, n)}, index=torch.arange(n, device=device).expand(rows, -1),
                    edges=Edges(torch.stack([at * n + source, at * n + target]), kind, None, rows, n))

    def write(self, prediction: np.ndarray, header: Header, path: Path) -> Path:
        raise NotImplementedError
