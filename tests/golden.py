"""A tiny seeded training of each modality, summed up: what the same code on the same numbers must give again.

    python tests/golden.py --renew              # after a change that is meant to change numbers: review the difference in git
    python tests/golden.py [--out FILE]         # compare, and close with one JSON line; exit status 1 where something moved
    python tests/golden.py --digests            # sha256 of each training's weights, bit for bit

Stored in tests/golden/NAME.json. Other processors and versions of torch round otherwise, hence `TOLERANCE`: kernels without
vector instructions (ATEN_CPU_CAPABILITY=default) move the losses of image/dino by 6e-5, the other trainings by less than 1e-5.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from made_files import MADE, NET

import meristem
from meristem.platform.training import checkpoint

FOLDER = Path(__file__).with_name("golden")
TOLERANCE = 2e-4  # relative
STEPS = 8
TRAIN = [NET, f"train.steps={STEPS}", "train.batch=4", "train.log_every=1", "train.precision=fp32", "train.warmup=0.25"]


def trained(name: str, folder: Path, workers: int = 0, over: tuple[str, ...] = ()) -> Path:
    """The run directory of a modality's training in an empty folder."""
    files, run = folder / name, folder / f"{name}-run"
    files.mkdir(parents=True)
    MADE[name].write(files)
    meristem.pretrain(MADE[name].recipe, files, run, [*MADE[name].over, *TRAIN, f"train.workers={workers}", *over],
                      cache=folder / "cache", quiet=True)
    return run


def summary(run: Path) -> dict[str, Any]:
    """The loss of every step, the Euclidean norm of each part's weights, and the card's reference embedding."""
    weights = checkpoint.read_weights(run)
    parts = sorted({key.split(".")[0] for key in weights})
    norms = {part: sum(float(x.double().square().sum()) for key, x in weights.items() if key.split(".")[0] == part) ** 0.5
             for part in parts}
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    embedding = checkpoint.read_card(checkpoint.locate(run))["reference"]["embedding"]
    return {"losses": losses, "norms": {k: float(f"{v:.8g}") for k, v in norms.items()},
            "embedding": [float(f"{x:.6g}") for x in embedding[:8]]}


def digest(run: Path) -> str:
    """sha256 of all weights."""
    weights = checkpoint.read_weights(run)
    return hashlib.sha256(b"".join(key.encode() + weights[key].contiguous().numpy().tobytes() for key in sorted(weights))
                          ).hexdigest()


def moved(now: Mapping[str, Any], then: Mapping[str, Any], tolerance: float = TOLERANCE) -> list[str]:
    """What differs between two summaries by more than the tolerance, each number relative to the greatest of its kind."""
    flat = [{f"{kind} {k}": v for kind in ("losses", "norms", "embedding")
             for k, v in (x[kind].items() if isinstance(x[kind], dict) else enumerate(x[kind]))} for x in (now, then)]
    if flat[0].keys() != flat[1].keys():
        return sorted(flat[0].keys() ^ flat[1].keys())
    scale = {key: abs(value) if key.startswith("norms") else
             max(abs(v) for k, v in flat[1].items() if k.split()[0] == key.split()[0]) for key, value in flat[1].items()}
    return [f"{key}: {flat[0][key]:.8g}, was {value:.8g}" for key, value in flat[1].items()
            if not abs(flat[0][key] - value) <= tolerance * scale[key]]  # a NaN has moved


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--renew", action="store_true", help="store what comes out now")
    parser.add_argument("--digests", action="store_true", help="print weights' digests only")
    parser.add_argument("--out", type=Path, help="a file for the counts too")
    given = parser.parse_args()
    torch.set_num_threads(1)
    began, changed, digests = time.monotonic(), {}, {}
    with tempfile.TemporaryDirectory(prefix="golden-") as folder:
        for name in MADE:
            run = trained(name, Path(folder))
            digests[name] = digest(run)
            file = FOLDER / f"{name}.json"
            if given.renew:
                FOLDER.mkdir(exist_ok=True)
                file.write_text(json.dumps(summary(run), indent=1) + "\n")
            elif not given.digests:
                changed[name] = moved(summary(run), json.loads(file.read_text()))
    if given.renew:
        return
    if given.digests:
        print(json.dumps(digests))
        return
    for name, lines in changed.items():
        for text in lines:
            print(f"{name}: {text}", file=sys.stderr)
    line = {"golden": len(changed), "moved": sum(map(bool, changed.values())), "tolerance": TOLERANCE, "steps": STEPS,
            "modalities": list(changed), "seconds": round(time.monotonic() - began)}
    print(json.dumps(line))
    if given.out is not None:
        given.out.write_text(json.dumps(line, indent=1) + "\n")
    if line["moved"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
