"""Graphs as a modality: sets of nodes with edges between them."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from scipy.sparse import issparse
from torch import Tensor

from meristem.errors import DataError
from meristem.modalities.base import (
    Axis,
    Draw,
    Element,
    Header,
    Links,
    Look,
    Sample,
    Settings,
    View,
    ViewSettings,
    natural,
    split_element,
)
from meristem.modalities.facts import Facts
from meristem.modalities.frame import Frame
from meristem.modalities.graph import drawing, encodings, files, intake
from meristem.modalities.graph.colours import ALIKE, fingerprint
from meristem.modalities.graph.holdout import hold_out
from meristem.modalities.graph.options import GraphOptions, GraphViewOptions
from meristem.modalities.graph.raw import Contents, Raw, both_ways, heaviest
from meristem.modalities.graph.tokenizer import GraphTokenizer
from meristem.modalities.rng import Rng
from meristem.modalities.stream import Edges


class Graph:
    """Node features and encodings stored as (channels + structure, N), edges as tables `pairs` (2, E), `kind` (E,), `value`
    (E, 1) where they have weights; sorted by source, then target.
    """

    name = "graph"
    version = 2  # of `read`: headers hold no names
    likeness = ALIKE
    suffixes: tuple[str, ...] = files.SUFFIXES
    members: tuple[str, ...] = ()
    Options: type[Settings] = GraphOptions
    ViewOptions: type[ViewSettings] = GraphViewOptions
    axes: tuple[Axis, ...] = ()
    grows: Mapping[str, tuple[int, ...]] = {"nodes": (0,)}
    options: GraphOptions

    def __init__(self, options: GraphOptions) -> None:
        self.options = options
        self.channels = options.channels or 1
        self.edge_kinds, self.edge_values = options.edge_kinds or 1, int(bool(options.weights))

    # ---- files

    def elements(self, path: Path) -> Sequence[Element] | None:
        return files.contents(path, self.options.label).elements if files.is_data(path) else ()

    @staticmethod
    def recognised(path: Path) -> bool:
        """Whether a file of one of its suffixes holds graphs, as far as its beginning tells."""
        return files.recognised(path)

    @staticmethod
    def beside(path: Path) -> list[Path]:
        """The other files that a file is read with."""
        return files.beside(path)

    def fitted(self, paths: Sequence[Path]) -> Self:
        """With features, channels and alphabets settled over all samples. Raises DataError where they cannot be."""
        o = self.options
        if o.channels is not None and o.edge_kinds is not None and o.weights is not None and o.features != "auto":
            return self
        graphs: list[tuple[Raw, Contents]] = []
        for path in paths:
            element = split_element(path)
            try:
                held = files.contents(element[0] if element else path, o.label)
                graphs.append((held.graph(element[2] if element else 0), held))
            except DataError:
                continue  # `read` says why
        if not graphs:
            return self
        tags = o.tags if o.tags is not None else tuple(sorted({t for _, held in graphs for t in held.tags}, key=natural))
        kinds = o.kinds if o.kinds is not None else tuple(sorted({k for _, held in graphs for k in held.kinds}, key=natural))
        given = all(raw.given is not None for raw, _ in graphs)
        features = o.features
        if features == "auto":
            tags = tags if len(tags) > 1 else ()  # one tag for all says nothing
            features = "all" if given and tags else "given" if given else "tags" if tags else "degree"
        update: dict[str, Any] = {"features": features, "kinds": kinds, "edge_kinds": o.edge_kinds or max(len(kinds), 1)}
        update["tags"] = tags if features in ("tags", "all") else ()
        update["weights"] = any(raw.weight is not None for raw, _ in graphs) if o.weights is None else o.weights
        settled = type(self)(o.model_copy(update=update))
        if o.channels is None:
            width = max(settled._width(raw) for raw, _ in graphs)
            settled = type(self)(settled.options.model_copy(update={"channels": width}))
        return settled

    def _width(self, raw: Raw) -> int:
        """Channels that this graph asks for."""
        o, given = self.options, 0 if raw.given is None else raw.given.shape[1]
        if o.features == "degree":
            ends = np.unique(np.sort(np.asarray(raw.pairs, np.int64), 0), axis=1)
            ends = ends[:, ends[0] != ends[1]]
            return min(int(np.bincount(ends.ravel()).max(initial=0)), o.max_degree) + 1
        tags = len(o.tags or ())
        return {"given": given, "tags": tags, "all": given + tags, "identity": raw.nodes}.get(o.features, 1)

    def read(self, paths: Sequence[Path], fields: Mapping[str, Path] = {}) -> Sample:
        element = split_element(paths[0])
        path, number = (element[0], element[2]) if element else (paths[0], 0)
        held = files.contents(path, self.options.label)
        if element is None and held.elements is not None:
            raise DataError("element", f"the file holds {len(held.graphs)} graphs", "Name one of them, as file#graph/0.")
        raw = held.graph(number)
        settled = self.fitted(paths)  # a graph read alone, without its data set
        pairs, kind, weight, notes = both_ways(raw)
        known_by = fingerprint(raw, pairs, kind, weight, held.tags, held.kinds)
        if weight is not None:
            kept = heaviest(pairs, weight, raw.nodes, self.options.threshold, self.options.density)
            pairs, kind, weight = pairs[:, kept], kind[kept], weight[kept]
        if held.kinds:
            kind = _numbers(kind, held.kinds, settled.options.kinds or (), "type of edge")
        links: dict[str, np.ndarray] = {}
        if self.options.hold_out is not None:
            kept, links["links"] = hold_out(pairs, raw.nodes, self.options.hold_out)
            pairs, kind, weight = pairs[:, kept], kind[kept], None if weight is None else weight[kept]
        tables = {"pairs": pairs, "kind": kind, **links} | ({} if weight is None else {"value": weight})
        array = settled._features(raw, held, pairs, weight)
        if structure := self._structure(pairs, raw.nodes):
            array = np.concatenate([array, *structure])
        elif np.isin(array, (0, 1)).all():
            array = array.astype(np.uint8)  # one-hot: a quarter of the space
        degree = np.bincount(pairs[0], minlength=raw.nodes)
        header = Header(array.shape, ((1.0,),), (), source={"nodes": raw.nodes})
        return Sample(array, header, dict(raw.fields), tables,
                      {"nodes": raw.nodes, "edges": pairs.shape[1] / 2, "least degree": float(degree.min()),
                       "mean degree": float(degree.mean()), "largest degree": float(degree.max()), **notes, **raw.notes},
                      known_by)

    def _features(self, raw: Raw, held: Contents, pairs: np.ndarray, weight: np.ndarray | None) -> np.ndarray:
        """(channels, N) float32."""
        o, n = self.options, raw.nodes
        if o.features in ("given", "all") and raw.given is None:
            raise DataError("channels", "the graph's nodes have no numbers", "Set modality.graph.features, e.g. to degree.")
        if o.features in ("tags", "all") and raw.tag is None:
            raise DataError("channels", "the graph's nodes have no tags", "Set modality.graph.features, e.g. to degree.")
        parts: list[np.ndarray] = []
        if o.features in ("given", "all"):
            given = np.asarray(raw.given.toarray() if issparse(raw.given) else raw.given, np.float32)
            if not np.isfinite(given).all():
                raise DataError("nan", f"numbers of {int((~np.isfinite(given)).any(1).sum())} nodes are NaN or infinite",
                                "Remove those nodes, or fill the numbers in.")
            parts.append(given.T)
        if o.features in ("tags", "all") and raw.tag is not None:
            parts.append(_one_hot(_numbers(raw.tag, held.tags, o.tags or (), "tag"), len(o.tags or ())))
        degree = np.bincount(pairs[0], minlength=n)
        if o.features == "degree":
            parts.append(_one_hot(np.minimum(degree, min(o.max_degree, self.channels - 1)), self.channels))
        elif o.features == "strength":
            parts.append(np.bincount(pairs[0], None if weight is None else weight[:, 0], n)[None])
        elif o.features == "identity":
            if n != self.channels:
                raise DataError("channels", f"the graph has {n} nodes, others {self.channels}: a number names no node of all",
                                "Give graphs on the same nodes, or set modality.graph.features.")
            parts.append(np.eye(n))
        elif not parts:
            parts.append(np.ones((1, n)))
        array = np.concatenate(parts).astype(np.float32)
        if len(array) != self.channels:
            raise DataError("channels", f"its nodes have {len(array)} numbers, modality.graph.channels is {self.channels}",
                            "All graphs of a data set must have as many.")
        return array

    def _structure(self, pairs: np.ndarray, nodes: int) -> list[np.ndarray]:
        o = self.options
        if (o.walk or o.laplacian) and nodes > o.encode_up_to:
            raise DataError("size", f"the graph has {nodes} nodes, more than are encoded ({o.encode_up_to})",
                            "Set modality.graph.walk=0 and laplacian=0, or raise modality.graph.encode_up_to.")
        walks = [encodings.walk(pairs, nodes, o.walk)] if o.walk else []
        return [*walks, encodings.laplacian(pairs, nodes, o.laplacian)] if o.laplacian else walks

    def statistics(self, array: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return (1.0,) * len(array), (0.0,) * len(array)

    def fetch(self, paths: Sequence[Path], header: Header, draws: Sequence[Draw]) -> list[np.ndarray]:
        raise NotImplementedError  # `read` leaves nothing in its files

    def facts(self, paths: Sequence[Path], sample: Sample) -> Facts:
        """See `Telling`."""
        element = split_element(paths[0])
        held = files.contents(element[0] if element else paths[0], self.options.label)
        return intake.facts(held.graph(element[2] if element else 0))

    def called(self, paths: Sequence[Path]) -> Sequence[str]:
        """See `Calling`."""
        element = split_element(paths[0])
        return files.contents(element[0] if element else paths[0], self.options.label).graph(element[2] if element else 0).names

    def write(self, prediction: np.ndarray, header: Header, path: Path) -> Path:
        """A CSV `node,class`, in the order of the source file."""
        path = path.with_suffix(".csv")
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("node", "class"))
            writer.writerows(enumerate(prediction.tolist()))
        return path

    # ---- looks

    def draw(self, view: ViewSettings, header: Header, look: Look) -> Draw:
        assert isinstance(view, GraphViewOptions)
        n, (size,) = header.shape[1], view.size
        if n > size and view.window == "whole":
            raise DataError("size", f"a graph has {n} nodes, a view at most {size}",
                            "Raise the view's `size`, or show a part: `window: walk`.")
        index = np.arange(n)
        if n > size:
            index = drawing.walked(header.tables["pairs"], n, size, view.restart, look.rng.fork("walk"), look.about)
        if view.drop_nodes:
            index = drawing.left(index, view.drop_nodes, look.rng.fork("nodes"))
        params: dict[str, Any] = {}
        if view.drop_edges:
            params |= {"drop_edges": view.drop_edges, "edge_key": int(look.rng.fork("edges").key)}
        if view.drop_features or view.mask_nodes:
            params["feature_key"] = int(look.rng.fork("features").key)
        whole = len(index) == n
        return Draw((0,), (n,), (len(index),), params, () if whole else tuple(index.tolist()))

    def edges(self, header: Header, draw: Draw) -> Links | None:
        tables, n = header.tables, header.shape[1]
        value = None
        if self.edge_values:  # a graph without weights among others with: all alike
            value = tables["value"] if "value" in tables else np.ones((tables["pairs"].shape[1], 1), np.float32)
            value = value / np.float32(max(np.abs(value).max(initial=0), 1e-12))
        links = Links(tables["pairs"], tables["kind"], value)
        if "edge_key" in draw.params:
            links = drawing.thinned(links, n, draw.params["drop_edges"], draw.params["edge_key"])
        return drawing.induced(links, np.array(draw.index), n) if draw.index else links

    def load(self, window: np.ndarray, draw: Draw, interpolate: bool) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(window))

    def augment(self, view: View, settings: ViewSettings) -> View:
        assert isinstance(settings, GraphViewOptions)
        view.array = view.array.float()
        if self.options.normalise == "node" and self.channels > 1:
            features, structure = view.array[:, :self.channels], view.array[:, self.channels:]
            size = features.square().mean(1, keepdim=True).sqrt()
            view.array = torch.cat([features / torch.where(size > 0, size, 1.0), structure], 1)
        if settings.drop_features or settings.mask_nodes:
            view.array = drawing.blanked(view.array, self.channels, view.params["feature_key"], settings.drop_features,
                                         settings.mask_nodes)
        return view

    def tokenizer(self) -> GraphTokenizer:
        return GraphTokenizer(self.channels, self.edge_kinds, self.options.walk, self.options.laplacian, self.edge_values)

    def example(self, size: tuple[int, ...], rng: Rng) -> View:
        """Random graphs of up to 64 nodes, two edges each, with normal features and structure."""
        return self.noise((min(size[0], 64),), rng)

    def grown(self, times: float) -> Self:
        return self

    def noise(self, size: tuple[int, ...], rng: Rng) -> View:
        rows, n, device = len(rng.key), size[0], rng.key.device
        extra = self.options.walk + 2 * self.options.laplacian
        array = rng.normal("nodes", self.channels + extra, n)
        a = torch.arange(n, device=device).expand(2, -1)[None].expand(rows, -1, -1).flatten(1)
        b = (a + 1 + rng.integers("edges", max(n - 1, 1), 2 * n)) % n
        place = torch.arange(rows, device=device)[:, None] * n
        pairs = torch.cat([(place + a) * n + b, (place + b) * n + a], 1) if n > 1 else a[:, :0]
        at, source, target = torch.unravel_index(pairs.unique(), (rows, n, n))
        kind = torch.zeros_like(at)
        value = torch.ones(len(at), 1, device=device) if self.edge_values else None
        frame = Frame(torch.ones(rows, 1, 1), (n,), torch.ones(rows, 0), ())
        return View("example", array, frame.to(device), torch.arange(rows, device=device), torch.zeros_like(rng.key),
                    fields={"mask": rng.integers("mask", 2, n)}, index=torch.arange(n, device=device).expand(rows, -1),
                    edges=Edges(torch.stack([at * n + source, at * n + target]), kind, value, rows, n))


def _one_hot(number: np.ndarray, count: int) -> np.ndarray:
    """(count, N)."""
    return (np.arange(count)[:, None] == number).astype(np.float32)


def _numbers(number: np.ndarray, names: Sequence[str], alphabet: Sequence[str], what: str) -> np.ndarray:
    """Numbers into the names of a file, as numbers into an alphabet. Raises DataError where it lacks one."""
    place = {name: i for i, name in enumerate(alphabet)}
    used = np.unique(number).tolist()
    unknown = [names[i] for i in used if names[i] not in place]
    if unknown:
        raise DataError("alphabet", f"the {what} '{unknown[0]}' was not among the {len(place)} of the data it was fitted to",
                        "Pretrain on data that has it, or remove those graphs.")
    table = np.zeros(len(names), np.int64)
    table[used] = [place[names[i]] for i in used]
    moved: np.ndarray = table[number]
    return moved
