"""Training speed from files to steps: samples/s of MAE on images and volumes, and the share of time spent waiting for data.

Prints one JSON line each. Run with `python benchmarks/steps.py [--steps N]`; made data, the recipes as they are.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import meristem
from meristem.modalities.volume.phantom import write_phantoms

WARM = 10  # steps not counted: first touches of memory and files


def photographs(folder: Path, count: int, size: int) -> Path:
    """PNG files of smooth colour noise."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        coarse.resize((size, size), Image.Resampling.BICUBIC).save(folder / f"{i:03d}.png")
    return folder


def measure(recipe: str, data: Path, steps: int, out: Path) -> dict[str, object]:
    """The mean over the steps after the warm-up."""
    meristem.pretrain(recipe, data, out, [f"train.steps={WARM + steps}", f"train.log_every={WARM}"], cache=out.parent / "cache",
                      quiet=True)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()][1:]
    settled = {key: float(np.mean([record[key] for record in records])) for key in ("samples_per_s", "data_wait")}
    return {"benchmark": "steps", "recipe": recipe, "steps": steps, "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "samples_per_s": round(settled["samples_per_s"], 1), "data_wait": round(settled["data_wait"], 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        images, volumes = photographs(root / "images", 64, 256), write_phantoms(root / "volumes", 32)
        for recipe, data in (("image/mae", images), ("volume/mae", volumes), ("volume/mae-unet", volumes)):
            print(json.dumps(measure(recipe, data, steps, root / recipe.replace("/", "-"))), flush=True)


if __name__ == "__main__":
    main()
