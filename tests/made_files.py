"""A small set of files of each modality, as its users have them, and a recipe small enough to train on it in seconds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from made_skeletons import mocap
from PIL import Image

NET = "encoder={transformer: {width: 24, depth: 1, heads: 2, drop_path: 0.2}}"
DECODER = "objectives.{}.masked.predictor.decoder={{depth: 1, width: 24, heads: 2}}"


def images(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(8):
        Image.fromarray(rng.integers(0, 255, (24, 32), np.uint8)).save(folder / f"{i}.png")


def volumes(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(6):
        array = (100 + 20 * rng.standard_normal((16, 18, 14))).astype(np.int16)
        nib.save(nib.Nifti1Image(array, np.diag([1.0, 0.8, 1.5, 1.0])), folder / f"{i}.nii.gz")


def films(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(6):
        (folder / str(i)).mkdir()
        for t in range(8):
            Image.fromarray(rng.integers(0, 255, (24, 32, 3), np.uint8)).save(folder / str(i) / f"{t}.png")


def clouds(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(8):
        np.save(folder / f"{i}.npy", rng.standard_normal((80, 3)).astype(np.float32))


def graphs(folder: Path) -> None:
    """Rings of several lengths with a tag on each node, in TUDataset's layout."""
    edges, owner, tags, first = [], [], [], 1
    for i in range(8):
        nodes = 5 + i
        edges += [(first + a, first + b) for k in range(nodes) for a, b in ((k, (k + 1) % nodes), ((k + 1) % nodes, k))]
        owner += [i + 1] * nodes
        tags += [k % 3 for k in range(nodes)]
        first += nodes
    for part, lines in (("A", [f"{a}, {b}" for a, b in edges]), ("graph_indicator", owner), ("node_labels", tags)):
        (folder / f"{folder.name}_{part}.txt").write_text("\n".join(map(str, lines)) + "\n")


def skeletons(folder: Path) -> None:
    (folder / "walking").mkdir()
    for i in range(6):
        mocap(folder / "walking" / f"walking_{i}.txt", 60, seed=i)


@dataclass(frozen=True)
class Made:
    """write: the files, into an empty folder. recipe, over: what trains on them."""

    write: Callable[[Path], None]
    recipe: str
    over: tuple[str, ...]


MADE = {
    "image": Made(images, "image/dino", ("modality.image={channels: 1, patch: 8}", "views.g.size=[16,16]",
                                         "views.l={size: [8,8], count: 1}",
                                         "heads.head.prototypes={hidden: 16, out: 8, count: 12}")),
    "volume": Made(volumes, "volume/mae", ("modality.volume.patch=[4,4,4]", "views.x.size=[8,8,8]", DECODER.format("pixels"))),
    "video": Made(films, "video/videomae", ("modality.video.patch=[2,8,8]", "masking.x.random.ratio=0.5",
                                            "views.x={size: [4,16,16], sample: {stride: 1}}",
                                            DECODER.format("pixels"))),
    "points": Made(clouds, "points/mae", ("modality.points={count: 8, size: 8}", "views.x.size=[64]",
                                          DECODER.format("points"))),
    "graph": Made(graphs, "graph/mae", (DECODER.format("pixels"),)),
    "skeleton": Made(skeletons, "skeleton/mae", ("views.x.size=[32]", "modality.skeleton.segment=8", DECODER.format("pixels"))),
}
