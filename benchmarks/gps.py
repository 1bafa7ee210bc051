"""A thousand graphs forward and backward, beside torch-geometric's own networks. Lines of `compare`.

    python benchmarks/gps.py [--data COLLECTION] [--repeats 5] [--batch 32]

transformer: our blocks with a bias for edges, beside GPSConv (Rampášek et al. 2022) on GINConv; width 192, six layers, three
heads, a perceptron such that both have as many parameters, walk encodings of 8 steps and four eigenvectors of the Laplacian.
message passing: our GIN beside torch-geometric's GIN, width 256, three layers, batch norm, no dropout. Both sides read prepared
graphs (ours from its cache, theirs Data objects in memory), batch them with their own loader in this process, and take the
gradient of the mean square of the graphs' mean vectors. Checked: as many graphs, nodes and edges in every epoch, parameters
within two percent.

--data: a file of a TU collection in the format of DGCNN, as PROTEINS.txt; without it, made graphs of 10 to 70 nodes.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compare import compare
from torch import Tensor, nn

from meristem.platform import recipe as recipes
from meristem.platform.assembly import Assembly
from meristem.platform.data.loader import loader
from meristem.platform.data.source import Data, open_data
from meristem.platform.recipe import Recipe

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # of torch.jit, at its import
    from torch_geometric import nn as geometric
    from torch_geometric.data import Data as Graph
    from torch_geometric.loader import DataLoader

PEER = f"torch-geometric {version('torch-geometric')}"
WIDTH, DEPTH, HEADS = 192, 6, 3
MADE = 600


def made(folder: Path) -> Path:
    """Random trees with some more edges, node tags of three kinds, in the format of DGCNN."""
    rng, lines = np.random.default_rng(0), [str(MADE)]
    for i in range(MADE):
        n = int(rng.integers(10, 71))
        pairs = {(int(rng.integers(0, k)), k) for k in range(1, n)}
        pairs |= {(int(a), int(b)) for a, b in rng.integers(0, n, (n, 2)) if a < b}
        near: list[list[int]] = [[] for _ in range(n)]
        for a, b in sorted(pairs):
            near[a].append(b)
            near[b].append(a)
        lines += [f"{n} {i % 2}", *(f"{rng.integers(0, 3)} {len(x)} {' '.join(map(str, x))}" for x in near)]
    folder.mkdir()
    (folder / "MADE.txt").write_text("\n".join(lines) + "\n")
    return folder / "MADE.txt"


def prepared(data: Data) -> list[Any]:
    """The cached graphs as torch-geometric's, encodings included."""
    graphs = []
    channels = data.modality.channels
    for row in data.rows("train"):
        array, tables = torch.from_numpy(data.cache.array(row.index)).t().float(), data.cache.tables(row.index)
        graphs.append(Graph(x=array[:, :channels], structure=array[:, channels:],
                            edge_index=torch.from_numpy(np.array(tables["pairs"])).long()))
    return graphs


class GPS(nn.Module):
    """As the example of torch-geometric's GPSConv, with our encodings of structure."""

    def __init__(self, assembly: Assembly) -> None:
        super().__init__()
        self.embed = nn.Linear(assembly.tokenizer.channels, WIDTH)  # type: ignore[arg-type]
        self.places = assembly.tokenizer.places(WIDTH)
        self.layers = nn.ModuleList(
            geometric.GPSConv(WIDTH, geometric.GINConv(geometric.MLP([WIDTH, WIDTH, WIDTH], norm=None)), HEADS,
                              attn_type="multihead") for _ in range(DEPTH))

    def forward(self, batch: Any) -> Tensor:
        x = self.embed(batch.x)
        if self.places is not None:
            x = x + self.places(batch.structure)
        for layer in self.layers:
            x = layer(x, batch.edge_index, batch.batch)
        pooled: Tensor = geometric.global_mean_pool(x, batch.batch)
        return pooled


class GIN(nn.Module):
    """torch-geometric's ready-made network, and behind its last layer the norm and activation that ours has there."""

    def __init__(self, assembly: Assembly) -> None:
        super().__init__()
        self.net = geometric.GIN(assembly.tokenizer.channels, assembly.encoder.width, assembly.encoder.depth, act="prelu",
                                 norm="batch_norm")  # type: ignore[arg-type]
        self.after = nn.Sequential(nn.BatchNorm1d(assembly.encoder.width), nn.PReLU())

    def forward(self, batch: Any) -> Tensor:
        pooled: Tensor = geometric.global_mean_pool(self.after(self.net(batch.x, batch.edge_index)), batch.batch)
        return pooled


def epoch_of_ours(assembly: Assembly, data: Data) -> tuple[int, int, int]:
    """Graphs, nodes and edges that went forward and backward."""
    recipe, seen = assembly.recipe, [0, 0, 0]
    rows = data.rows("train")
    for batch in loader(data.cache, rows, recipe, steps=len(rows) // recipe.train.batch, workers=0):
        stream = assembly.tokenizer.stream(assembly.prepare(batch).views["x"])
        assembly.encoder(stream.seen(recipe.encoder.sees)).summary["mean"].square().mean().backward()
        assembly.encoder.zero_grad()
        seen = [a + b for a, b in zip(seen, (stream.batch, int(stream.valid.sum()), len(stream.edges or ())), strict=True)]
    return tuple(seen)  # type: ignore[return-value]


def epoch_of_theirs(net: nn.Module, graphs: list[Any], batch_size: int) -> tuple[int, int, int]:
    seen = [0, 0, 0]
    for batch in DataLoader(graphs, batch_size, shuffle=True, drop_last=True):
        net(batch).square().mean().backward()
        net.zero_grad()
        seen = [a + b for a, b in zip(seen, (batch.num_graphs, batch.num_nodes, batch.num_edges), strict=True)]
    return tuple(seen)  # type: ignore[return-value]


def beside(name: str, recipe: Recipe, place: Path, home: Path, peer: Callable[[Assembly], nn.Module], whose: str,
           repeats: int) -> None:
    data = open_data(place, recipe.modality, "1,0,0", home, True)
    rows = data.rows("train")
    whole = len(rows) // recipe.train.batch * recipe.train.batch
    torch.manual_seed(0)
    assembly = Assembly(recipe.of(data.modality))
    net, graphs = peer(assembly), prepared(data)
    ours, theirs = (sum(p.numel() for p in part.parameters()) for part in (assembly.encoder, net))
    assert abs(ours / theirs - 1) < 0.02, f"{ours} and {theirs} parameters"
    jobs = {"ours": lambda: epoch_of_ours(assembly, data), "theirs": lambda: epoch_of_theirs(net, graphs, recipe.train.batch)}
    figures: dict[str, dict[str, list[float]]] = {unit: {who: [] for who in jobs} for unit in ("CPU s", "s")}
    for repeat in range(repeats + 1):
        for who, job in jobs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            seen = job()
            assert seen[0] == whole, "as many graphs must be seen"
            if len(rows) == whole:  # else which are left out is chance
                assert seen[1:] == (sum(g.num_nodes for g in graphs), sum(g.num_edges for g in graphs)), "nodes or edges differ"
            if repeat:  # the first warms up
                figures["CPU s"][who].append((time.process_time() - cpu) * 1000 / whole)
                figures["s"][who].append((time.perf_counter() - wall) * 1000 / whole)
    for unit, taken in figures.items():
        compare(f"{name}, forward and backward", f"{PEER}, {whose}", f"{unit} / 1,000 graphs", taken["ours"], taken["theirs"],
                graphs=whole, parameters=[ours, theirs], threads=torch.get_num_threads())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a collection (default: made graphs)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, default=32)
    given = parser.parse_args()
    torch.set_num_threads(1)
    transformer = recipes.load("graph/mae", [
        f"encoder.transformer={{width: {WIDTH}, depth: {DEPTH}, heads: {HEADS}, mlp_ratio: 3.0}}",
        f"train.batch={given.batch}"])
    gin = recipes.load("graph/graphmae", [
        "encoder.message_passing={width: 256, dropout: 0.0}", f"train.batch={given.batch}"])
    with tempfile.TemporaryDirectory() as folder:
        place = given.data or made(Path(folder) / "graphs")
        home = Path(folder) / "cache"
        beside("graph transformer", transformer, place, home, GPS, "GPSConv", given.repeats)
        beside("message passing", gin, place, home, GIN, "GIN", given.repeats)


if __name__ == "__main__":
    main()
