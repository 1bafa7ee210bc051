"""Where processor time goes in the works whose targets are missed, ours and the best peer's, by torch's profiler.

    python benchmarks/profiles.py [NAME ...] [--steps 16]

The programs are those of images.py (all methods), volumes.py (hippocampus, PersistentDataset) and videomae.py (frames in their
files); counted are the steps after the first epoch, in processor seconds per 1,000 samples. `products alone`: the same matrix
products of the same shapes, run one after the other by a loop that does nothing else: what no program of that architecture on
this library can go below. Their shapes come from a second, shorter run, since recording them slows all else down. A line of
JSON for each program.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import images
import torch
import videomae
import volumes
from compare import cannot
from loops import videomae as plain
from marks import FILE, PROFILE, SHAPES, STEPS
from programs import Failed, finished, noted_in
from whole import AHEAD, pretrain

HERE = Path(__file__).parent
PRODUCTS = {"aten::mm": torch.mm, "aten::bmm": torch.bmm, "aten::addmm": lambda bias, a, b: torch.addmm(bias, a, b)}
FAMILIES: Mapping[str, tuple[str, ...]] = {  # parts of operators' names
    "matrix products": ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm", "convolution"),
    "attention": ("attention",),
    "normalisation": ("_norm",),
    "activations": ("gelu", "softmax", "relu"),
    "optimiser": ("adam", "optimizer", "_foreach"),
    "indexing and copies": ("copy_", "cat", "gather", "index", "scatter", "take", "clone", "stack", "fill_", "zero_", "slice"),
}
Program = tuple[Sequence[str], int, int]
"""Its command, samples in a batch, steps of an epoch."""


class Profile(NamedTuple):
    """own, all: processor seconds, of the process and with its loading ones. samples: thousands that went through."""

    operators: Sequence[Mapping[str, Any]]
    own: float
    all: float
    samples: float


def family(operator: str) -> str:
    lower = operator.lower()
    return next((name for name, parts in FAMILIES.items() if any(part in lower for part in parts)), "other operators")


def alone(operators: Sequence[Mapping[str, Any]]) -> float:
    """Processor seconds of the matrix products among them, by themselves."""
    total = 0.0
    for one in operators:
        product = PRODUCTS.get(one["operator"])
        if product is None:
            continue
        arrays = [torch.randn(shape) for shape in one["shapes"] if shape][:3 if one["operator"] == "aten::addmm" else 2]
        seconds = []
        for _ in range(5):
            began = time.process_time()
            product(*arrays)
            seconds.append(time.process_time() - began)
        total += statistics.median(seconds) * one["count"]
    return total


def profiled(program: Program, steps: int, shapes: bool) -> Profile:
    """Of some steps after the first epoch. shapes: operators by what they were given. Raises Failed."""
    command, batch, epoch = program
    with tempfile.TemporaryDirectory() as folder:
        marks, profile = Path(folder) / "marks", Path(folder) / "profile"
        finished(command, {FILE: str(marks), STEPS: f"1,{epoch},{epoch + steps}", PROFILE: str(profile), "OMP_NUM_THREADS": "1",
                           "PYTHONWARNINGS": "ignore", "PYTHONPATH": os.pathsep.join(map(str, (HERE, HERE.parent))),
                           **({SHAPES: "1"} if shapes else {})})
        noted, operators = noted_in(marks), json.loads(profile.read_text())
    own, all_ = (noted[epoch + steps][key] - noted[epoch][key] for key in ("own", "cpu"))
    return Profile(operators, own, all_, steps * batch / 1000)


def parts(plain: Profile, shaped: Profile) -> dict[str, float]:
    """Processor seconds per 1,000 samples, by what they were spent on."""
    found = Counter[str]()
    for one in plain.operators:
        if "DataLoader" not in one["operator"]:  # it waits, which takes no processor time
            found[family(one["operator"])] += one["seconds"]
    found["between operators"] = plain.own - found.total()
    found["loading processes"] = plain.all - plain.own
    return {name: round(seconds, 3) for name, seconds in
            [*((name, seconds / plain.samples) for name, seconds in found.most_common()), ("all", plain.all / plain.samples),
             ("products alone", alone(shaped.operators) / shaped.samples)]}


def image(method: str, peer: str, folder: Path, out: Path, steps: int) -> dict[str, Program]:
    data = images.photographs(folder, 512)
    whose = {"ours": ("ours", Path(sys.executable)),
             images.PEERS[peer].label: (peer, images.environment(peer, images.HOME))}
    epoch, found = 512 // images.BATCH, {}
    for who, (name, python) in whose.items():
        (place := out / name).mkdir()
        found[who] = images.command(name, python, method, data, place, epoch + steps), images.BATCH, epoch
    return found


def volume_mae(folder: Path, out: Path, steps: int) -> dict[str, Program]:
    data = Path(os.environ.get("MERISTEM_DATA", HERE.parent.parent / "shared" / "data")) / "msd-task04-hippocampus"
    epoch = len(list((data / "images").glob("*.nii*"))) // volumes.BATCH
    count = epoch + steps + AHEAD
    ours = pretrain("volume/mae", data, out / "ours", count, volumes.options(32))
    theirs = ["monai_mae.py", "persistent", str(data), str(out / "theirs"), str(count), f"--batch={volumes.BATCH}", "--size=32"]
    return {who: ([sys.executable, "-P", str(HERE / "loops" / script), *more], volumes.BATCH, epoch)
            for who, (script, *more) in (("ours", ours), (f"MONAI {version('monai')}", theirs))}


def video_mae(folder: Path, out: Path, steps: int) -> dict[str, Program]:
    data = videomae.made(folder)
    epoch = len(plain.Clips(data)) // plain.BATCH
    count = epoch + steps + AHEAD
    ours = pretrain("video/videomae", data, out / "ours", count, [f"train.batch={plain.BATCH}"])
    return {who: ([sys.executable, "-P", str(HERE / "loops" / script), *more], plain.BATCH, epoch)
            for who, (script, *more) in (("ours", ours), ("plain loop", ["videomae.py", str(data), str(count)]))}


WORKS: dict[str, Callable[[Path, Path, int], dict[str, Program]]] = {
    "image mae": partial(image, "mae", "lightly"), "image simclr": partial(image, "simclr", "lightly"),
    "image dino": partial(image, "dino", "lightly"),
    "volume MAE of hippocampus": volume_mae, "VideoMAE": video_mae}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(WORKS)}")
    parser.add_argument("--steps", type=int, default=16)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for name in given.names or WORKS:
        found: dict[str, list[Profile]] = {}
        failed: dict[str, str] = {}
        for shapes, steps in ((False, given.steps), (True, 2)):
            with tempfile.TemporaryDirectory() as root:
                (out := Path(root) / "out").mkdir()
                for who, program in WORKS[name](Path(root) / "data", out, steps).items():
                    try:
                        found.setdefault(who, []).append(profiled(program, steps, shapes))
                    except Failed as failure:
                        failed[who] = str(failure)
        for who, profiles in found.items():
            if who in failed:
                cannot(name, who, failed[who])
            else:
                line = {"name": name, "who": who, "unit": "CPU s / 1,000 samples", "parts": parts(*profiles)}
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
