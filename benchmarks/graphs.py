"""What pretraining on graphs is worth: one JSON line for each set and encoder, beside random weights and the published figure.

    python benchmarks/graphs.py --data ../shared/data [--sets cora mutag …] [--encoders message-passing transformer] [--seeds 3]
    python benchmarks/graphs.py --memory [--nodes 1000 10000 100000]

citation graphs: pretrained on the whole graph, a linear probe on the public split, accuracy on its test nodes; transductive, as
published. collections: pretrained on all graphs without labels, as published; a support vector machine on each of the declared
ten folds, its penalty chosen by five folds of the other nine, as published; accuracy, the mean over folds. molecules:
pretrained on the training scaffolds of the set itself (published: on two million others), then fine-tuned, AUROC on the test
scaffolds. The transformer has four blocks, its decoder two.
mean, sd: over seeds of pretraining. sd_folds: over the folds, of the first seed. random_init: the mean of the same protocol on
random weights, over as many seeds. published: of message passing by GraphMAE (Hou et al. 2022). authors_probe: of the same
features by the probe of their code for nodes, logistic regression by 300 steps of Adam: after the last step, and after the one
that is best on the validation nodes; the mean over seeds. steps: of pretraining, of which
--steps allows so many at most. seconds: of everything.
--quick: a tenth of the steps, two folds.
memory: MiB that a process holds at most, beyond what it held before, while one graph of so many nodes (ten neighbours each, 64
features) is drawn and a GIN of 3 × 256 takes one step on what is drawn: all of it, or a window of 2048 nodes by random walks.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from runs import finished

import meristem
from meristem.modalities.base import Draw, Header, Look, View
from meristem.modalities.frame import Frame
from meristem.modalities.graph import Graph
from meristem.modalities.graph.options import GraphOptions, GraphViewOptions
from meristem.modalities.stream import Edges
from meristem.platform.data.source import Data, open_data
from meristem.platform.encoders.message_passing import MessagePassingSettings
from meristem.platform.evaluation.results import Results
from meristem.platform.origin import SCRATCH
from meristem.tasks import transfer
from meristem.tasks.base import TaskRecipe
from meristem.tasks.finetune import mean_scores, resolve
from meristem.tasks.probing import Frozen, targets

FOLDS = 10


@dataclass(frozen=True)
class Set:
    """recipe: of message passing. published: GraphMAE's mean, in percent."""

    path: str
    recipe: str
    task: str
    protocol: str
    metric: str
    published: float
    decay: float | None = None  # of the authors' probe

    @property
    def folded(self) -> bool:
        return self.protocol == "svm"


SETS = {
    "cora": Set("planetoid-cora-citeseer/ind.cora.graph", "graphmae-cora", "node-classification", "linear", "accuracy", 84.2,
                decay=1e-4),
    "citeseer": Set("planetoid-cora-citeseer/ind.citeseer.graph", "graphmae-citeseer", "node-classification", "linear",
                    "accuracy", 73.4, decay=1e-2),
    "mutag": Set("tu-graphs/MUTAG", "graphmae-mutag", "classification", "svm", "accuracy", 88.2),
    "proteins": Set("tu-graphs/PROTEINS", "graphmae", "classification", "svm", "accuracy", 75.3),
    "nci1": Set("tu-graphs/NCI1", "graphmae-nci1", "classification", "svm", "accuracy", 80.4),
    "imdb-b": Set("tu-graphs/IMDBBINARY", "graphmae-imdb", "classification", "svm", "accuracy", 75.5),
    "bbbp": Set("moleculenet/BBBP.csv", "graphmae", "classification", "finetune", "auroc", 72.0),
    "bace": Set("moleculenet/bace.csv", "graphmae", "classification", "finetune", "auroc", 83.1)}
ENCODERS = ("message-passing", "transformer")
NODES_AT_ONCE = 256  # of a citation graph that the transformer sees, by random walks: it attends between all of them


def pretraining(chosen: Set, encoder: str, most: int | None, quick: bool) -> tuple[str, int, list[str]]:
    """The recipe, its steps and what is laid over it."""
    recipe = f"graph/{chosen.recipe if encoder == 'message-passing' else 'mae'}"
    steps = meristem.show_recipe(recipe)["recipe"]["train"]["steps"] // (10 if quick else 1)
    steps = min(steps, most or steps)
    laid = ["train.workers=0", f"train.steps={steps}"]
    if encoder == "transformer":
        laid += ["encoder.transformer.depth=4", "objectives.pixels.masked.predictor.decoder.depth=2", "views.x.size=[1024]"]
        if chosen.task == "node-classification":
            laid += [f"views.x.size=[{NODES_AT_ONCE}]", "views.x.window=walk", "train.batch=8"]
    return recipe, steps, laid


def scores(results: Results, metric: str) -> dict[str, list[float]]:
    """Percent of each cell, by arm: `scratch` and whatever was pretrained."""
    found: dict[str, list[float]] = {}
    for cell in results.cells:
        found.setdefault("scratch" if cell.arm == SCRATCH else "pretrained", []).append(100 * mean_scores(cell.cases)[metric])
    return found


def measure(name: str, encoder: str, root: Path, seeds: int, most: int | None, quick: bool, out: Path) -> dict[str, object]:
    chosen, began = SETS[name], time.perf_counter()
    data, cache, runs = root / chosen.path, out / "cache", []
    recipe, steps, pretrained = pretraining(chosen, encoder, most, quick)
    for seed in range(seeds):
        laid = [*pretrained, f"train.seed={seed}"]
        runs.append(out / f"{name}-{encoder}-{seed}")
        if not finished(runs[-1]):
            split = "1,0,0" if chosen.folded else "auto"
            meristem.pretrain(recipe, data, runs[-1], laid, split=split, cache=cache, resume=runs[-1].is_dir(), quiet=True)
    laid = [f"task.{_task(chosen)}.metric={chosen.metric}", "train.workers=0"]
    if encoder == "transformer" and chosen.task == "node-classification":
        laid += [f"views.x.size=[{NODES_AT_ONCE}]"]
    if quick and chosen.protocol == "finetune":
        laid.append("train.steps=40")
    extra: dict[str, object] = {}
    table: dict[str, list[list[float]]] = {"scratch": [], "pretrained": []}  # arm -> seeds of each fold
    for fold in range(2 if quick else FOLDS) if chosen.folded else [-1]:
        settings = resolve(f"graph/{chosen.task}", "graph", laid, runs[0])
        found = open_data(data, settings.modality, f"fold:{fold}:only" if fold >= 0 else "auto", cache, quiet=True)
        settings, folder = settings.of(found.modality), out / f"{name}-{encoder}-of-fold-{fold}"
        random = compared(SCRATCH, settings, found, folder, seeds, chosen.protocol)
        table["scratch"].append(scores(random, chosen.metric)["scratch"])
        table["pretrained"].append([])
        for run in runs:  # finished cells of random weights are not run again
            one = compared(str(run), settings, found, folder, 1, chosen.protocol)
            table["pretrained"][-1] += scores(one, chosen.metric)["pretrained"]
        if chosen.decay is not None:
            theirs = np.mean([authors_probe(settings, found, run, chosen.decay, folder) for run in runs], 0)
            extra = {"authors_probe": dict(zip(("last", "best_on_validation"), theirs.round(2).tolist(), strict=True))}
    ours, random_init = (np.array(table[arm]) for arm in ("pretrained", "scratch"))  # (folds, seeds)
    means = ours.mean(0)
    return {"benchmark": "graphs", "set": name, "encoder": encoder, "protocol": chosen.protocol, "metric": chosen.metric,
            "mean": round(float(means.mean()), 2), "sd": round(statistics.stdev(means), 2) if seeds > 1 else None,
            "sd_folds": round(float(ours[:, 0].std(ddof=1)), 2) if chosen.folded else None,
            "random_init": round(float(random_init.mean()), 2), "published": chosen.published, **extra, "seeds": seeds,
            "steps": steps, "quick": quick,
            "transductive": chosen.protocol != "finetune", "seconds": round(time.perf_counter() - began, 1),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"}


def compared(init: str, settings: TaskRecipe, data: Data, folder: Path, seeds: int, protocol: str) -> Results:
    results = transfer.evaluate([transfer.Entrant(init, settings, data)], folder, ["all"], seeds, [protocol], quiet=True)
    assert results is not None
    return results


def authors_probe(settings: TaskRecipe, data: Data, run: Path, decay: float, folder: Path) -> tuple[float, float]:
    """Test accuracy in percent after the last step and after the best on validation (the latest of equals)."""
    splits = [settings.task.cases(data, name) for name in ("train", "val", "test")]
    frozen = Frozen(settings, data, run, [row for rows in splits for row in rows], folder)
    (x, y), *held = [(torch.from_numpy(frozen.vectors(rows)), torch.from_numpy(targets(rows))) for rows in splits]
    torch.manual_seed(0)
    linear = torch.nn.Linear(x.shape[1], settings.task.scope(data).classes)
    optimiser = torch.optim.Adam(linear.parameters(), lr=0.01, weight_decay=decay)
    best, chosen, test = 0.0, 0.0, 0.0
    for _ in range(300):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(linear(x), y).backward()
        optimiser.step()
        validation, test = (100 * (linear(e).argmax(1) == t).float().mean().item() for e, t in held)
        if validation >= best:
            best, chosen = validation, test
    return test, chosen


def _task(chosen: Set) -> str:
    return "nodes" if chosen.task == "node-classification" else "classification"


# ---- memory

def _peak() -> float:
    """Bytes held at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def arm(nodes: int, window: str, size: int) -> None:
    """One process: a step on what is drawn of a random graph."""
    rng = np.random.default_rng(0)
    ends = rng.integers(0, nodes, (2, 5 * nodes))
    code = np.unique(np.concatenate([ends[0] * nodes + ends[1], ends[1] * nodes + ends[0]])[np.tile(ends[0] != ends[1], 2)])
    pairs, kind = np.stack([code // nodes, code % nodes]).astype(np.int32), np.zeros(len(code), np.int16)
    features = rng.normal(size=(64, nodes)).astype(np.float32)
    modality = Graph(GraphOptions(channels=64, edge_kinds=1, features="given", tags=(), kinds=()))
    encoder = MessagePassingSettings(conv="gin", width=256, depth=3).build(modality.tokenizer(), (), 64)
    _step(modality, encoder, {"pairs": pairs[:, :0], "kind": kind[:0]}, features[:, :64], "whole", 64)
    held, began = _peak(), time.perf_counter()
    shown = _step(modality, encoder, {"pairs": pairs, "kind": kind}, features, window, size)
    print(json.dumps({"benchmark": "graphs memory", "nodes": nodes, "edges": len(code) // 2, "window": window, "shown": shown,
                      "mib": round((_peak() - held) / 2**20, 1), "seconds": round(time.perf_counter() - began, 3)}), flush=True)


def _step(modality: Graph, encoder: torch.nn.Module, tables: dict[str, np.ndarray], features: np.ndarray, window: str, size: int
          ) -> int:
    """Draw, encode and go back; how many nodes were shown."""
    header = Header(features.shape, ((1.0,),), (), tables=tables)
    draw: Draw = modality.draw(GraphViewOptions(size=(size,), window=window), header, Look(0, 0, 0, "x"))
    links, n = modality.edges(header, draw), draw.shape[0]
    assert links is not None
    chosen = np.array(draw.index) if draw.index else slice(None)
    edges = Edges(torch.from_numpy(links.pairs.astype(np.int64)), torch.from_numpy(links.kind.astype(np.int64)), None, 1, n)
    one = torch.zeros(1, dtype=torch.int64)
    frame = Frame(torch.ones(1, 1, 1), (n,), torch.ones(1, 0), ())
    view = View("x", torch.from_numpy(features[:, chosen])[None], frame, one, one, edges=edges)
    encoder(modality.tokenizer().stream(view)).tokens.square().mean().backward()
    return n


def memory(nodes: list[int]) -> None:
    for n in nodes:
        for window, size in (("whole", n), ("walk", 2048)):
            command = [sys.executable, __file__, "--arm", str(n), window, str(min(size, n))]
            print(subprocess.run(command, check=True, capture_output=True, text=True).stdout, end="", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder that holds the data sets")
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--encoders", nargs="+", choices=ENCODERS, default=list(ENCODERS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--nodes", nargs="+", type=int, default=[1_000, 10_000, 100_000])
    parser.add_argument("--out", type=Path, help="where runs are kept; finished ones are not run again")
    parser.add_argument("--arm", nargs=3, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.arm:
        arm(int(a.arm[0]), a.arm[1], int(a.arm[2]))
        return
    if a.memory or a.data is None:
        memory(a.nodes)
    if a.data is not None:
        with tempfile.TemporaryDirectory() as folder:
            for name in a.sets:
                for encoder in a.encoders:
                    line = measure(name, encoder, a.data, a.seeds, a.steps, a.quick, a.out or Path(folder))
                    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
