"""Image pretraining beside other packages: whole programs, from a folder of photographs to optimiser steps.

    python benchmarks/images.py [--data FOLDER] [--repeats 2] [--images 512] [--methods mae simclr dino] [--peers lightly ...]

The work is in peers/work.py, each package's way of doing it in a file beside that. Each peer has a virtual environment of its
own, made on first use in the user's cache with the torch that ours runs on. For every method ours and each peer take turns.
Lines of `compare`: processor and wall seconds per 1,000 images once the first epoch is over, seconds from the start of
the process to the end of the first optimiser step (ours decodes and caches all photographs before it), and the greatest
memory of all processes together. `best` is, of each figure, the peer whose median is least. `torch alone` trains one number
without data: no program on torch starts sooner or takes less memory.

--data: a folder of folders of images; without it, made photographs.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from compare import cannot, compare
from PIL import Image
from programs import Failed, Figures, run

HERE = Path(__file__).parent
BATCH = 64  # as peers/work.py has it
HOME = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "meristem" / "peers"  # of their environments


@dataclass(frozen=True)
class Peer:
    """Where a package comes from and which methods it has; why it lacks one. overrides: versions other than it asks for."""

    requirement: str
    lacks: dict[str, str]
    more: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    note: str = ""

    @property
    def label(self) -> str:
        return self.requirement.replace("==", " ")


PEERS = {
    "lightly": Peer("lightly==1.6.0", {}, ("timm",)),
    "lightly_train": Peer("lightly-train==0.18.0", {"mae": "it has no masked autoencoder"}, ("timm",)),
    "solo_learn": Peer("solo-learn==1.0.2", {
        "mae": "this release has no masked autoencoder", "dino": "its DINO has no small crops in this release"},
        ("setuptools<81",), ("pytorch-lightning==1.9.5",),
        "its own requirements are torch 1.9.1 and Lightning 1.4.7; here torch is ours and Lightning 1.9.5; it trains an online "
        "classifier as well, which cannot be switched off"),
    "stable_pretraining": Peer("stable-pretraining==0.1.8", {}),
}
UNITS = {"cpu": ("processor time", "CPU s / 1,000 images", "<= 0.87"), "wall": ("wall time", "s / 1,000 images", ""),
         "first": ("time to the first step", "s", "<= 0.5"), "first_cpu": ("processor time to the first step", "CPU s", ""),
         "peak": ("memory", "MiB, PSS of all processes", "<= 0.6")}


NOTHING, ALONE = "nothing", "torch alone"


def environment(name: str, home: Path) -> Path:
    """The Python of a peer's virtual environment; made where it is missing."""
    peer, place = PEERS[name], home / PEERS[name].requirement
    python, ready = place / "bin" / "python", place / "ready"
    if not ready.exists():
        import torch
        import torchvision

        home.mkdir(parents=True, exist_ok=True)
        same = [f"{module.__name__}=={module.__version__.partition('+')[0]}" for module in (torch, torchvision)]
        (pins := home / f"{name}.txt").write_text("\n".join([*same, *peer.overrides]) + "\n")
        shutil.rmtree(place, ignore_errors=True)
        uv, kind = [sys.executable, "-m", "uv"], "--override" if peer.overrides else "--constraint"
        subprocess.run([*uv, "venv", "--quiet", "--python", sys.executable, place], check=True)
        subprocess.run([*uv, "pip", "install", "--quiet", "--python", python, kind, pins, peer.requirement, *peer.more],
                       check=True)
        ready.touch()
    return python


def photographs(folder: Path, count: int) -> Path:
    """JPEG files of 320×240 pixels: smooth colours, edges and grain, in one class folder."""
    rng = np.random.default_rng(0)
    (folder / "all").mkdir(parents=True)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        picture = np.asarray(coarse.resize((320, 240), Image.Resampling.BICUBIC)).astype(np.int16)
        picture[rng.integers(0, 200):, rng.integers(0, 280):] += rng.integers(-60, 60, 3, dtype=np.int16)
        picture += rng.normal(0, 6, picture.shape).astype(np.int16)
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(folder / "all" / f"{i:04d}.jpg", quality=90)
    return folder


def command(name: str, python: Path, method: str, data: Path, out: Path, steps: int) -> list[str]:
    """A driver's."""
    return [str(python), "-P", str(HERE / "peers" / f"{name}.py"), method, str(data), str(out), str(steps)]


def measure(name: str, python: Path, method: str, data: Path, epoch: int, steps: int) -> Figures:
    """One run of a driver. epoch: steps of one; the cost is that of the steps after the first epoch."""
    with tempfile.TemporaryDirectory() as out:
        paths = [str(HERE), *([str(HERE.parent)] if name == "ours" else [])]
        return run(command(name, python, method, data, Path(out), epoch + steps), BATCH, epoch, epoch + steps, {
            "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": os.pathsep.join(paths)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder of folders of images (default: made photographs)")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--images", type=int, default=512, help="that are counted in each run")
    parser.add_argument("--methods", nargs="+", default=["mae", "simclr", "dino"])
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--home", type=Path, default=HOME, help="where the peers' environments are")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = (options.data or photographs(Path(folder) / "photographs", 512)).absolute()
        count = sum(path.suffix.lower() in (".jpg", ".jpeg", ".png") for path in data.rglob("*"))
        epoch = count // BATCH
        steps = -(-options.images // (epoch * BATCH)) * epoch  # whole epochs
        for method in options.methods:
            able = {}
            for name in options.peers:
                if why := PEERS[name].lacks.get(method):
                    cannot(f"image {method}", PEERS[name].label, why)
                else:
                    able[name] = environment(name, options.home)
            compared(method, able, data, epoch, steps, options.repeats)


def compared(method: str, able: dict[str, Path], data: Path, epoch: int, steps: int, repeats: int) -> None:
    able = {**able, NOTHING: Path(sys.executable)}
    found: dict[str, list[Figures]] = {"ours": [], **{name: [] for name in able}}
    for _ in range(repeats):
        for name in list(found):
            python = Path(sys.executable) if name == "ours" else able[name]
            try:
                found[name].append(measure(name, python, method, data, epoch, steps))
            except Failed as failure:
                if name in ("ours", NOTHING):
                    raise
                cannot(f"image {method}", PEERS[name].label, str(failure))
                del found[name]
    ours, nothing = found.pop("ours"), found.pop(NOTHING)
    for figure, (what, unit, target) in UNITS.items():
        def of(runs: Sequence[Figures], figure: str = figure) -> list[float]:
            return [getattr(one, figure) for one in runs]

        if figure not in ("cpu", "wall"):
            compare(f"image {method}: {what}", ALONE, unit, of(ours), of(nothing))
        if not found:
            continue
        best = min(found, key=lambda name: statistics.median(of(found[name])))
        for name, theirs in found.items():
            note = {"note": PEERS[name].note} if PEERS[name].note else {}
            compare(f"image {method}: {what}", PEERS[name].label, unit, of(ours), of(theirs),
                    target=target if name == best else "", **({"best": True} if name == best else {}), **note)


if __name__ == "__main__":
    main()
