"""How many images a masked autoencoder must see for features of the same worth: ours beside other packages' programs.

    python benchmarks/accuracy.py --data FOLDER [--steps 16 32 64 128 256] [--seeds 0 1 2] [--peers lightly stable_pretraining]

FOLDER: holds `pneumoniamnist_union.npz` (chest X-rays of 28×28 pixels: 4,708 to train on, 524 to choose by, 624 to test).
The programs are those of images.py, with patches of 4 pixels: same network, batch, crops, masking ratio, rate and decay; what
each package decides itself (its targets, masks, start values, schedule of the rate) is its own. After each of `--steps` the
frozen encoder's mean tokens are taken and a logistic regression learns from those of 500 training pictures, its penalty chosen
on the validation split: `worth` is its balanced accuracy on the test split. Lines of `compare`, paired by seed: the images that
each needs, on the logarithmic scale between the points where it was measured, for the highest worth that both come to.
`curve`: images and mean worth.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from compare import cannot, compare
from images import HERE, HOME, PEERS, command, environment
from marks import FEATURES, FILE, SEED, STEPS, vectors
from peers import work
from PIL import Image
from programs import Failed, finished

from meristem.modalities.base import View
from meristem.modalities.frame import Frame
from meristem.platform.evaluation.metrics import balanced_accuracy
from meristem.platform.evaluation.probes import Linear, Split
from meristem.platform.training.restore import restored

SIZE, PATCH, LABELS = 28, 4, 500
SPLITS = ("train", "val", "test")
Curve = Mapping[int, float]
"""Images seen -> worth."""


def written(data: Mapping[str, np.ndarray], folder: Path) -> Path:
    """The training pictures as files."""
    (folder / "all").mkdir(parents=True)
    for i, picture in enumerate(data["train_images"]):
        Image.fromarray(picture).convert("RGB").save(folder / "all" / f"{i:04d}.png")
    return folder


def features(name: str, pictures: Path, images: np.ndarray, steps: Sequence[int], seed: int) -> dict[int, np.ndarray]:
    """Vectors of the images (n, H, W, 3) after each of the steps of one training. Raises Failed."""
    python = Path(sys.executable) if name == "ours" else environment(name, HOME)
    with tempfile.TemporaryDirectory() as out:
        folder = Path(out)
        np.save(folder / "images.npy", images)
        every = math.gcd(*steps)
        finished(command(name, python, "mae", pictures, folder, max(steps)), {
            FEATURES: str(folder), FILE: str(folder / "marks"), STEPS: ",".join(map(str, steps)), SEED: str(seed),
            "BENCHMARK_SIZE": f"{SIZE},{PATCH}", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore",
            "BENCHMARK_OVERRIDES": f"train.seed={seed} train.checkpoint_every={every} train.keep={max(steps) + 8}",
            "PYTHONPATH": os.pathsep.join([str(HERE), *([str(HERE.parent)] if name == "ours" else [])])})
        if name == "ours":
            return {step: embedded(folder / "run" / "checkpoints" / f"step-{step:08d}", images) for step in steps}
        return {step: np.load(folder / f"{step}.npy") for step in steps}


def embedded(checkpoint: Path, images: np.ndarray) -> np.ndarray:
    """The mean tokens of our encoder of a checkpoint."""
    assembly = restored(checkpoint).eval()

    def mean(some: torch.Tensor) -> torch.Tensor:
        n, size = len(some), tuple(some.shape[2:])
        rows = torch.arange(n)
        frame = Frame(torch.eye(3).expand(n, -1, -1), size, torch.ones(n, 2), ("px", "px"))
        stream = assembly.tokenizer.stream(View("x", some, frame, rows, torch.zeros_like(rows)))
        found: torch.Tensor = assembly.encoder(stream.seen(assembly.recipe.encoder.sees)).summary["mean"]
        return found

    return vectors(mean, images)


def worth(found: np.ndarray, targets: Mapping[str, np.ndarray]) -> float:
    """Balanced accuracy on the test split. found: vectors of all splits, one after the other."""
    ends = np.cumsum([len(targets[split]) for split in SPLITS])
    train, val, test = np.split(found, ends[:-1])
    probed = Linear()(Split(train, targets["train"]), Split(val, targets["val"]), test, 2)
    return float(balanced_accuracy(targets["test"], probed.probabilities))


def needed(curve: Curve, level: float) -> float:
    """Images with which a curve first comes to a level, linear in their logarithm between its points."""
    points = sorted(curve.items())
    for (a, low), (b, high) in pairwise(points):
        if high >= level > low:
            return float(math.exp(math.log(a) + (level - low) / (high - low) * math.log(b / a)))
    return float(points[0][0])  # it begins there


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = Path(os.environ.get("MERISTEM_DATA", HERE.parent.parent / "shared" / "data"))
    parser.add_argument("--data", type=Path, default=shared / "pneumoniamnist")
    parser.add_argument("--steps", type=int, nargs="+", default=[16, 32, 64, 128, 256])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--peers", nargs="+", default=["lightly", "stable_pretraining"])
    parser.add_argument("--jobs", type=int, default=2, help="programs at a time: nothing here is timed")
    given = parser.parse_args()
    with np.load(given.data / "pneumoniamnist_union.npz") as file:
        data = {name: file[name] for name in file.files}
    some = {split: slice(LABELS) if split == "train" else slice(None) for split in SPLITS}  # they are in no order
    images = np.concatenate([data[f"{split}_images"][some[split]] for split in SPLITS])
    images = np.repeat(images[..., None], 3, -1)
    targets = {split: data[f"{split}_labels"].ravel().astype(int)[some[split]] for split in SPLITS}
    torch.set_num_threads(1)
    for name in given.peers:
        environment(name, HOME)  # one after the other
    curves: dict[str, dict[int, Curve]] = {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(given.jobs) as pool:
        pictures = written(data, Path(folder) / "pictures")

        def curve(name: str, seed: int) -> Curve:
            return {step * work.BATCH: worth(x, targets)
                    for step, x in features(name, pictures, images, given.steps, seed).items()}

        running = {name: {seed: pool.submit(curve, name, seed) for seed in given.seeds} for name in ("ours", *given.peers)}
        for name, runs in running.items():
            try:
                curves[name] = {seed: run.result() for seed, run in runs.items()}
            except Failed as failure:
                if name == "ours":
                    raise
                cannot("image mae: images to the same worth", PEERS[name].label, str(failure))
    mine = curves.pop("ours")
    for name, theirs in curves.items():
        level = min(np.mean([max(curve.values()) for curve in whose.values()]) for whose in (mine, theirs))
        reached = [min(float(level), *(max(c.values()) for c in (mine[s], theirs[s]))) for s in given.seeds]
        ours, peer = ([needed(whose[s], at) for s, at in zip(given.seeds, reached, strict=True)] for whose in (mine, theirs))
        compare("image mae: images to the same worth", PEERS[name].label, "images", ours, peer, target="<= 1",
                curve={who: {n: round(float(np.mean([c[n] for c in whose.values()])), 4) for n in next(iter(whose.values()))}
                       for who, whose in (("ours", mine), ("theirs", theirs))})


if __name__ == "__main__":
    main()
