"""Clouds from files to optimiser steps, beside Point-MAE written down plainly. Lines of `compare`.

    python benchmarks/pointmae.py [--data FOLDER] [--repeats 3] [--steps 12]

`meristem pretrain points/mae` as a user runs it, beside loops/pointmae.py: farthest points by a loop in torch, neighbours by
all distances, every group embedded before six tenths are hidden. 64 groups of 32 of 1,024 points, batches of 32, six blocks of
width 192 and a decoder of four, fp32, one loading process, one thread each. Checked before: as many groups, as many of them
hidden, parameters within one percent.

--data: a folder of arrays (points, 3), *.npy; without it, made ellipsoids of 8,192 points.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from loops import pointmae
from whole import pretrain, whole

from meristem.modalities.rng import Rng
from meristem.platform import recipe as recipes
from meristem.platform.assembly import Assembly

CLOUDS = 128  # made


def made(folder: Path) -> Path:
    """Dented ellipsoids."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for i in range(CLOUDS):
        x = rng.normal(size=(8192, 3))
        dents = 1 + 0.2 * np.sin(x @ rng.normal(0, 3, (3, 1)))
        x *= rng.uniform(0.3, 1.0, 3) * dents / np.linalg.norm(x, axis=1, keepdims=True)
        np.save(folder / f"{i:03d}.npy", x.astype(np.float32))
    return folder


def same() -> None:
    """Raises AssertionError unless both networks do the same work."""
    recipe = recipes.load("points/mae")
    assembly, theirs, rng = Assembly(recipe), pointmae.PointMAE(), Rng.of(0, torch.arange(2))
    view = recipe.modality.example((pointmae.POINTS,), rng)
    stream = assembly.tokenizer.stream(view)
    plan = recipe.masking["x"].plan(stream, rng, assembly.encoder.mask_unit)
    group, _ = theirs.groups(view.array[:, :3].transpose(1, 2))
    assert group.shape[1:3] == (len(stream), recipe.modality.options.size), "groups differ"
    assert (plan.hidden.sum(1) == int(pointmae.HIDDEN * pointmae.GROUPS)).all(), "as many must be hidden"
    ours, plain = (sum(p.numel() for p in net.parameters()) for net in (assembly, theirs))
    assert abs(ours / plain - 1) < 0.01, f"{ours} and {plain} parameters"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder of clouds (default: made ones)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12, help="that are counted after the first epoch")
    given = parser.parse_args()
    same()
    with tempfile.TemporaryDirectory() as folder:
        data = (given.data or made(Path(folder) / "clouds")).absolute()
        clouds = len(pointmae.Clouds(data))

        def ours(out: Path, steps: int) -> list[str]:
            return pretrain("points/mae", data, out, steps, [f"train.batch={pointmae.BATCH}"])

        whole("Point-MAE", ours, {"plain loop": lambda out, steps: ["pointmae.py", str(data), str(steps)]},
              batch=pointmae.BATCH, epoch=clouds // pointmae.BATCH, steps=given.steps, repeats=given.repeats, targets={},
              clouds=clouds)


if __name__ == "__main__":
    main()
