"""Clips from files to optimiser steps, beside VideoMAE written down plainly. Lines of `compare`.

    python benchmarks/videomae.py [--data FOLDER] [--repeats 3] [--steps 6]

`meristem pretrain video/videomae` as a user runs it, frames left in their files and frames decoded into the cache, and
`video/videomae-v2`, whose decoder fills in half of the tubelets (Wang et al. 2023), beside loops/videomae.py: decord, Pillow
frame by frame, all tubelets embedded before nine tenths are hidden, all decoded. The same films, clips of 16 frames at 8 a
second and 128² pixels, batches of 8, ViT-tiny, a decoder of 4 × 96, fp32, one loading process, one thread each. Checked before:
as many tubelets, as many of them hidden, parameters within one percent.

--data: a folder of films; without it, made ones of two seconds.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from loops import videomae
from video import RESIZE, made
from whole import pretrain, whole

from meristem.modalities.rng import Rng
from meristem.platform import recipe as recipes
from meristem.platform.assembly import Assembly
from meristem.platform.recipe import Recipe

BATCH = videomae.BATCH
DECODED = ["modality.video.store=decoded", f"modality.video.resize={RESIZE}"]
WORKS = {"VideoMAE, frames in their files": ("video/videomae", []),
         "VideoMAE, decoded frames in the cache": ("video/videomae", DECODED),
         "VideoMAE V2 (half of the tubelets decoded), decoded frames in the cache": ("video/videomae-v2", DECODED)}


def same(name: str) -> None:
    """Raises AssertionError unless a recipe's network is as large as the plain one and its encoder is given as much."""
    recipe: Recipe = recipes.load(name)
    assembly, theirs, rng = Assembly(recipe), videomae.VideoMAE(), Rng.of(0, torch.arange(2))
    stream = assembly.tokenizer.stream(recipe.modality.example((videomae.FRAMES, videomae.SIZE, videomae.SIZE), rng))
    plan = recipe.masking["x"].plan(stream, rng, assembly.encoder.mask_unit)
    hidden = theirs.tubes(2)
    assert tuple(recipe.views["x"].size) == (videomae.FRAMES, videomae.SIZE, videomae.SIZE), "clips differ"  # type: ignore[attr-defined]
    assert hidden.shape[1] == len(stream), "tubelets differ"
    assert torch.equal(hidden.sum(1), plan.hidden.sum(1)), "as many must be hidden"
    ours, plain = (sum(p.numel() for p in net.parameters() if p.requires_grad) for net in (assembly, theirs))
    assert abs(ours / plain - 1) < 0.01, f"{ours} and {plain} parameters"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder of films (default: made ones)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help="that are counted after the first epoch")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = (given.data or made(Path(folder) / "films")).absolute()
        films = len(videomae.Clips(data))
        for name, (recipe, changes) in WORKS.items():
            same(recipe)

            def ours(out: Path, steps: int, recipe: str = recipe, changes: list[str] = changes) -> list[str]:
                return pretrain(recipe, data, out, steps, [f"train.batch={BATCH}", *changes])

            whole(name, ours, {"plain loop": lambda out, steps: ["videomae.py", str(data), str(steps)]},
                  batch=BATCH, epoch=films // BATCH, steps=given.steps, repeats=given.repeats,
                  targets=dict.fromkeys(("cpu", "wall"), "<= 0.5"), films=films)


if __name__ == "__main__":
    main()
