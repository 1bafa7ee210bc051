"""How time and memory of a step grow with size, frames, points, nodes and batch: `meristem bench --sweep` of each kind of data.

    python benchmarks/growth.py [RECIPE ...] [--steps 8] [--out docs/performance]

A line of JSON for each thing that grows: the exponents, with their standard errors, of time and memory on the tokens of a
batch, the sizes that were tried and whether a cost grows worse than attention's own. --out: where the figures go, two for each.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch

import meristem
from meristem.platform.benching.growth import Exponent

RECIPES = ("image/mae", "volume/mae", "video/videomae", "points/mae", "graph/mae", "graph/graphmae")


def fitted(exponent: Exponent | None) -> list[float] | None:
    return None if exponent is None else [round(exponent.value, 2), round(exponent.error, 2)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", default=RECIPES)
    parser.add_argument("--steps", type=int, default=8, help="of each measurement")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "docs" / "performance")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for recipe in given.recipes:
        with tempfile.TemporaryDirectory() as folder:
            made = meristem.bench(recipe, sweep=["all"], steps=given.steps, out=folder, quiet=True)
            for sweep in made.sweeps:
                figures = {}
                for cost in ("time", "memory"):
                    name = f"{recipe.replace('/', '-')}-{sweep.axis}-{cost}.svg"
                    (given.out / name).write_bytes((Path(folder) / f"sweep-{sweep.axis}-{cost}.svg").read_bytes())
                    figures[cost] = name
                tokens = [point.tokens for point in sweep.points]
                print(json.dumps({"name": f"{recipe}: {sweep.axis}", "grows": sweep.axis, "tokens": [min(tokens), max(tokens)],
                                  "time": fitted(sweep.time), "memory": fitted(sweep.memory), "worse": list(sweep.worse),
                                  "figures": figures}), flush=True)


if __name__ == "__main__":
    main()
