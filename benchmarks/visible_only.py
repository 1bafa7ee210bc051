"""Time and peak memory of an MAE encoder pass at 75 % masking against 0 %: only visible tokens are embedded and encoded.

Forward and backward of the transformer `small` on one channel of 64³ voxels, patches of 8³ (512 tokens). Each arm is a process
of its own, so that its peak is its own. Lines of `compare`, masked / whole: 0.25 is what tokens alone would give, attention
pulls it down, weights and their gradients, which no masking spares, up.

    python benchmarks/visible_only.py [--batch 8] [--repeats 5]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys

import torch
from compare import compare
from timing import turns

from meristem.modalities.base import Axis
from meristem.modalities.frame import Frame
from meristem.modalities.lattice import LatticeTokenizer
from meristem.modalities.rng import Rng
from meristem.modalities.stream import LatticeStream
from meristem.platform.encoders.transformer import TransformerSettings
from meristem.platform.masked.masking import Random

SIZE, PATCH = (64, 64, 64), (8, 8, 8)


def peak() -> float:
    """MiB held at most so far: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def arm(ratio: float, batch: int, repeats: int) -> dict[str, list[float]]:
    """Figures of one masking ratio; 0: no masking at all."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    axes = tuple(Axis(name, "mm", 8.0, 256.0) for name in "zyx")
    tokenizer = LatticeTokenizer(1, PATCH)
    encoder = TransformerSettings(size="small").build(tokenizer, axes, 1).to(device)
    frame = Frame(torch.eye(4).expand(batch, -1, -1), SIZE, torch.ones(batch, 3), ("mm",) * 3).to(device)
    stream = LatticeStream(torch.randn(batch, 1, *SIZE, device=device), PATCH, frame, torch.arange(batch, device=device))
    rng = Rng.of(0, torch.arange(batch, device=device))
    plan = Random(ratio=ratio).plan(stream, rng, tokenizer.mask_unit) if ratio else None
    embedded = []

    def embed() -> None:
        fresh = stream.with_array(stream.array)  # nothing cut before is kept
        embedded.append(encoder.embed(fresh if plan is None else fresh.take(plan.keep)).shape[1])

    def whole() -> None:
        encoder.zero_grad()
        encoder(stream.with_array(stream.array), plan).tokens.square().mean().backward()

    before = peak()
    embedding, step = ([1e3 * t for t in turns([job], repeats)[0]] for job in (embed, whole))
    return {"tokens": [float(embedded[0])], "embedding, ms": embedding, "pass, ms": step, "peak, MiB": [peak() - before]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--arm", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm is not None:
        print(json.dumps(arm(options.arm, options.batch, options.repeats)))
        return
    arms = []
    for ratio in (0.0, 0.75):
        given = ["--arm", ratio, "--batch", options.batch, "--repeats", options.repeats]
        done = subprocess.run([sys.executable, __file__, *map(str, given)], check=True, stdout=subprocess.PIPE, text=True)
        arms.append(json.loads(done.stdout.splitlines()[-1]))
    whole, masked = arms
    for figure in whole:
        what, _, unit = figure.partition(", ")
        compare(f"MAE encoder, 75 % hidden: {what}", "nothing hidden", unit or "per volume", masked[figure], whole[figure],
                batch=options.batch)


if __name__ == "__main__":
    main()
