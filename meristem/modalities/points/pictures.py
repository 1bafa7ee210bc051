"""Pictures of clouds as files: what a model of images is pretrained on that shall look at clouds.

    python -m meristem.modalities.points.pictures SOURCE DIRECTORY [--size 64] [--spread 1] [--merge sum]

writes three grey PNGs for each cloud under SOURCE, in the same folders, as `foreign` shows them: NAME-z.png, -y and -x, looking
along these axes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch
from PIL import Image

from meristem.errors import DataError
from meristem.modalities.points.options import PointsOptions
from meristem.modalities.points.points import Points
from meristem.projections import ALONG, Merge, Projection


def write_pictures(clouds: Sequence[Path], root: Path, directory: Path, modality: Points, size: int = 64, spread: int = 1,
                   merge: Merge = "sum", most: int = 1024) -> list[Path]:
    """Of clouds under `root`, each of at most so many points, evenly over the file's order. Raises DataError."""
    written = []
    for path in clouds:
        array = modality.read([path]).array
        assert array is not None
        n = array.shape[1]
        xyz = torch.from_numpy(array[:3, torch.linspace(0, n - 1, min(n, most)).round().long().numpy()]).T[None]
        live = torch.ones(1, xyz.shape[1], dtype=torch.bool)
        pictures = Projection.of(xyz, live, size).pictures(xyz, live, spread, merge)[0]
        for picture, axis in zip((pictures * 255).round().byte(), ALONG, strict=True):
            target = directory / path.relative_to(root).parent / f"{path.stem}-{'xyz'[axis]}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture.numpy()).save(target)
            written.append(target)
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description="Pictures of clouds along the three axes.")
    parser.add_argument("source", type=Path)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--spread", type=int, default=1)
    parser.add_argument("--merge", choices=get_args(Merge), default="sum")
    given = parser.parse_args()
    clouds = sorted(p for p in given.source.rglob("*") if p.name.lower().endswith(Points.suffixes))
    try:
        made = write_pictures(clouds, given.source, given.directory, Points(PointsOptions()), given.size, given.spread,
                              given.merge)
    except DataError as error:
        sys.exit(f"meristem: {error}")
    print(f"{len(made)} pictures of {len(clouds)} clouds in {given.directory}")


if __name__ == "__main__":
    main()
