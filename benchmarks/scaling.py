"""What a large run would need, from constants measured here: `docs/scaling.md` explains the lines and what is assumed.

    python benchmarks/scaling.py measure [--size large] [--view 128] [--patch 16] > constants.json
    python benchmarks/scaling.py plan constants.json [--volumes 100000] [--gpus 64] [KEY=VALUE ...]

measure: MAE on volumes with a vision transformer; floating-point operations are counted in a real step, files are made ones of
256x256x160 int16 voxels (compressible as scans are), read back by one process. plan: arithmetic alone; each assumption has a
KEY.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from cache import SHAPE, volumes
from torch.utils.flop_counter import FlopCounterMode

from meristem.platform import recipe as recipes
from meristem.platform.assembly import Assembly, total
from meristem.platform.data.loader import loader
from meristem.platform.data.source import open_data
from meristem.platform.training import checkpoint, parts
from meristem.platform.training.pretrain import card
from meristem.tasks.inspection import noise

GIVEN = {  # what cannot be measured on a machine without GPUs: docs/scaling.md has the sources
    "epochs": 1000.0,            # crops drawn of each volume
    "batch": 32.0,               # crops per GPU and step
    "peak": 989e12,              # FLOP/s, dense bf16 of one H100 or H200 SXM
    "utilisation": 0.4,          # of that, reached
    "memory": 141e9,             # bytes of one H200
    "network": 50e9,             # bytes/s per GPU and direction between nodes: 400 Gbit/s
    "cores": 14.0,               # per GPU, for loading
    "disk": 10e9,                # bytes/s that the file system gives all nodes together
    "write": 2e9,                # bytes/s that one process writes
    "every": 500.0,              # steps between checkpoints
}


def recipe(size: str, view: int, patch: int) -> recipes.Recipe:
    return recipes.load("volume/mae", [f"encoder.transformer.size={size}", f"modality.volume.patch=[{patch},{patch},{patch}]",
                                       f"views.x.size=[{view},{view},{view}]", "train.batch=4",
                                       "objectives.pixels.masked.predictor.decoder={depth: 4, width: 512, heads: 8}"])


def step_constants(of: recipes.Recipe) -> dict[str, Any]:
    """Of one crop: operations forward and backward, bytes kept for the backward pass. Of the net: its parameters."""
    torch.manual_seed(0)
    assembly, batch = Assembly(of), noise(of)
    weights = {p.untyped_storage().data_ptr() for p in assembly.parameters()}
    found = {"parameters": sum(p.numel() for p in assembly.parameters())}
    for name in ("kept", "recomputed"):
        storages: dict[int, int] = {}

        def keep(x: torch.Tensor, storages: dict[int, int] = storages) -> torch.Tensor:
            if x.untyped_storage().data_ptr() not in weights:
                storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        if name == "recomputed":
            parts.recomputed(assembly)
        with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = total(assembly(batch, 0.5))
            loss.backward()
        rows = len(batch.items.row)
        found |= {f"flops_{name}": counter.get_total_flops() / rows, f"activations_{name}": sum(storages.values()) / rows}
    return found


def opening(of: recipes.Recipe) -> float:
    """Seconds of one core to open data that are stored, for each volume more: of 200 small ones."""
    taken = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "images").mkdir()
        for count in (50, 250):
            for i in range(count):
                x = np.random.default_rng(i).integers(0, 99, (16, 16, 16)).astype(np.int16)
                nib.save(nib.Nifti1Image(x, np.eye(4)), root / f"images/{i}.nii.gz")
            open_data(root, of.modality, "1,0,0", root / "cache", quiet=True)
            began = time.process_time()
            open_data(root, of.modality, "1,0,0", root / "cache", quiet=True)
            taken.append(time.process_time() - began)
    return (taken[1] - taken[0]) / 200


def data_constants(of: recipes.Recipe, crops: int) -> dict[str, float]:
    """Of one volume: seconds of one core to decode and store it; bytes stored, and on its card. Of one crop: seconds of one
    core, bytes read."""
    with tempfile.TemporaryDirectory() as folder:
        root = volumes(Path(folder))
        began = time.process_time()
        data = open_data(root, of.modality, "1,0,0", root / "cache", quiet=True)
        built = time.process_time() - began
        rows = data.rows("train")
        about = card(of, data, data.identities(rows), "pretraining")
        fewer = card(of, data, data.identities(rows[:1]), "pretraining")
        size = (len(json.dumps(about)) - len(json.dumps(fewer))) / (len(rows) - 1)
        stream = iter(loader(data.cache, rows, of, steps=crops // of.train.batch + 1, workers=0))
        next(stream)
        taken, read = [], _read()
        began = time.process_time()
        for _ in stream:
            taken.append(time.process_time() - began)
            began = time.process_time()
        drawn = len(taken) * of.train.batch
        stored = sum(f.stat().st_size for f in (root / "cache").rglob("*") if f.is_file())
        return {"store_seconds": built / len(rows), "open_seconds": opening(of), "stored_bytes": stored / len(rows),
                "voxels": float(torch.tensor(SHAPE).prod()), "card_bytes": size,
                "crop_seconds": statistics.median(taken) / of.train.batch, "crop_bytes": (_read() - read) / drawn}


def _read() -> int:
    """Bytes that this process has asked the system for so far (Linux)."""
    return int(Path("/proc/self/io").read_text().split()[1])


def checkpoint_bytes(parameters: int) -> float:
    """Bytes on disk for each parameter: weights, and AdamW's two moments; measured on a small net."""
    torch.manual_seed(0)
    net = torch.nn.Linear(1000, 1000)
    optimiser = torch.optim.AdamW(net.parameters())
    net(torch.randn(2, 1000)).sum().backward()
    optimiser.step()
    with tempfile.TemporaryDirectory() as folder:
        made = checkpoint.save(Path(folder), 1, net.state_dict(), {}, {"optimiser": optimiser.state_dict(), "raw": {}}, 1)
        return parameters * sum(f.stat().st_size for f in made.iterdir()) / sum(p.numel() for p in net.parameters())


def plan(c: dict[str, float], g: dict[str, float]) -> list[tuple[str, str]]:
    """What the run comes to, in the order of docs/scaling.md."""
    gpus, batch = g["gpus"], g["batch"]
    step = batch * c["flops_kept"] / (g["peak"] * g["utilisation"])
    rate = gpus * batch / step
    steps = g["volumes"] * g["epochs"] / (gpus * batch)
    ring = (gpus - 1) / gpus * 4 * c["parameters"] / g["network"]  # seconds for each float32 of the net to go round once
    reduced, sharded = 2 * ring, 3 * ring
    states = 16 * c["parameters"]
    saved = c["checkpoint_bytes"] + g["volumes"] * c["card_bytes"]
    needs, backward, window = rate * c["crop_seconds"], 2 * step / 3, g["every"] * step
    opened = g["volumes"] * c["open_seconds"]
    shares = {"compute": 1.0, "the network": reduced / backward, "loading": needs / (gpus * g["cores"]),
              "reading": rate * c["crop_bytes"] / g["disk"]}
    return [
        ("steps", f"{steps:,.0f} of {gpus * batch:,.0f} crops"),
        ("a step, compute alone", f"{1e3 * step:.1f} ms, {rate:,.0f} crops/s"),
        ("a GPU's weights, moments", f"{states / 1e9:.1f} GB of {g['memory'] / 1e9:.0f}; "
                                     f"with train.fsdp {states / gpus / 1e9:.2f}"),
        ("a GPU's activations", f"{batch * c['activations_kept'] / 1e9:.1f} GB; with train.checkpointing "
                                f"{batch * c['activations_recomputed'] / 1e9:.1f}"),
        ("gradients over the network", f"{1e3 * reduced:.1f} ms of {1e3 * backward:.1f} ms backward: "
                                       f"{_used(reduced, backward)}"),
        ("the same with train.fsdp", f"{1e3 * sharded:.1f} ms of {1e3 * step:.1f} ms: {_used(sharded, step)}"),
        ("cores that load", f"{needs:,.0f} of {gpus * g['cores']:,.0f}: {_used(needs, gpus * g['cores'])}"),
        ("reading the cache", f"{rate * c['crop_bytes'] / 1e9:.1f} of {g['disk'] / 1e9:.0f} GB/s: "
                              f"{_used(rate * c['crop_bytes'], g['disk'])}"),
        ("the cache on disk", f"{g['volumes'] * c['stored_bytes'] / 1e12:.1f} TB"),
        ("making the cache", f"{g['volumes'] * c['store_seconds'] / 3600:,.1f} hours of one core"),
        ("opening the data", f"{opened:,.0f} s for a process; all of them, one after another: {gpus * opened / 60:.0f} min"),
        ("the whole run", f"{steps * step / 3600:.1f} h of compute; {max(shares.values()) * steps * step / 3600:.1f} h "
                          f"at the pace of {max(shares, key=lambda name: shares[name])}"),
        ("a checkpoint", f"{saved / 1e9:.2f} GB, {g['volumes'] * c['card_bytes'] / 1e6:.0f} MB of it whom it met; "
                         f"{saved / g['write']:.1f} s of every {window:.0f}: {_used(saved / g['write'], window)}"),
    ]


def _used(need: float, there: float) -> str:
    return f"{need / there:.0%} of what is there" + (" **too much**" if need > there else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_subparsers(dest="what", required=True)
    measuring = what.add_parser("measure")
    measuring.add_argument("--size", default="large")
    measuring.add_argument("--view", type=int, default=128)
    measuring.add_argument("--patch", type=int, default=16)
    measuring.add_argument("--crops", type=int, default=40)
    planning = what.add_parser("plan")
    planning.add_argument("constants", type=Path)
    planning.add_argument("--volumes", type=float, default=1e5)
    planning.add_argument("--gpus", type=float, default=64)
    planning.add_argument("assumed", nargs="*", metavar="KEY=VALUE", help=f"of {', '.join(GIVEN)}")
    options = parser.parse_args()
    if options.what == "measure":
        of = recipe(options.size, options.view, options.patch)
        step = step_constants(of)
        work = f"volume/mae, transformer {options.size}, {options.view}³ voxels in patches of {options.patch}³"
        print(json.dumps({"work": work, **step, "checkpoint_bytes": checkpoint_bytes(step["parameters"]),
                          **data_constants(of, options.crops)}, indent=1, ensure_ascii=False))
        return
    assumed = dict(GIVEN)
    for word in options.assumed:
        key, _, value = word.partition("=")
        if key not in GIVEN:
            parser.error(f"'{key}' is no assumption; there are {', '.join(GIVEN)}")
        assumed[key] = float(value)
    constants = json.loads(options.constants.read_text())
    print(f"{constants['work']}; {options.volumes:,.0f} volumes, {options.gpus:.0f} GPUs")
    for name, line in plan(constants, {**assumed, "volumes": options.volumes, "gpus": options.gpus}):
        print(f"  {name:28s}{line}")


if __name__ == "__main__":
    main()
