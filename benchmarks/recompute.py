"""Memory and time of a training step with and without `train.checkpointing`: activations kept, or computed again.

MAE's encoder without its masking: the transformer `small` on `--batch` volumes of one channel and 64³ voxels, patches of 8³
(512 tokens), forward and backward. Each arm is a process of its own, so that its peak is its own. Lines of compare.py,
recomputed beside kept: of memory what weights, their gradients and one block's activations leave, of time up to 4/3.

    python benchmarks/recompute.py [--batch 8] [--repeats 3]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from compare import compare
from timing import turns
from visible_only import peak

from meristem.platform import recipe as recipes
from meristem.platform.assembly import Assembly
from meristem.platform.training import parts
from meristem.tasks.inspection import noise


def arm(recompute: bool, batch: int, repeats: int) -> dict[str, list[float]]:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    recipe = recipes.load("volume/mae", ["encoder.transformer.size=small", "modality.volume.patch=[8,8,8]",
                                         "views.x.size=[64,64,64]"])
    assembly = Assembly(recipe).to(device)
    if recompute:
        parts.recomputed(assembly)
    view = noise(recipe).to(device).views["x"]
    rows = torch.arange(batch, device=device) % len(view)

    def step() -> None:
        assembly.zero_grad()
        stream = assembly.tokenizer.stream(view.select(rows)).seen(recipe.encoder.sees)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            assembly.encoder(stream).tokens.float().square().mean().backward()

    before = peak()
    took, = turns([step], repeats)
    return {"step, s": took, "peak, MiB": [peak() - before]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--arm", choices=("kept", "recomputed"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm is not None:
        print(json.dumps(arm(options.arm == "recomputed", options.batch, options.repeats)))
        return
    arms = {}
    for name in ("kept", "recomputed"):
        given = ["--arm", name, "--batch", options.batch, "--repeats", options.repeats]
        done = subprocess.run([sys.executable, Path(__file__), *map(str, given)], check=True, stdout=subprocess.PIPE, text=True)
        arms[name] = json.loads(done.stdout.splitlines()[-1])
    for figure in arms["kept"]:
        what, _, unit = figure.partition(", ")
        compare(f"transformer's forward and backward: {what}", "activations kept", unit, arms["recomputed"][figure],
                arms["kept"][figure], batch=options.batch)


if __name__ == "__main__":
    main()
