"""Time of a transformer's pass, forward and backward, over rows of several lengths: packed against padded, by share of padding.

The transformer `tiny` (depth 4) on 16 rows of up to 64 tokens, as clouds of patches are, and on 64 of up to 24, as molecules
are. The longest row is full; the others' lengths are drawn evenly around the share. Both arms give one result, to rounding.
A line for each share (compare.py); packing starts where the ratio first falls below 1, at `PAYS`.

    python benchmarks/packing.py [--repeats 7]
"""

from __future__ import annotations

import argparse

import torch
from compare import compare
from timing import turns

from meristem.modalities.base import Axis
from meristem.platform.encoders import packing
from meristem.platform.encoders.transformer import SIZES, Blocks

SHAPES = ((16, 64), (64, 24))
SHARES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7)


def lengths(rows: int, most: int, share: float) -> torch.Tensor:
    """Of rows, on average 1 − share of `most`, at least 1."""
    spread = 2 * min(share, 1 - share)
    drawn = 1 - share + spread * (torch.rand(rows, generator=torch.Generator().manual_seed(0)) - 0.5)
    found = (drawn * most).round().clamp(1, most).long()
    found[0] = most
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    width, _, heads = SIZES["tiny"]
    net = Blocks(width, 4, heads, tuple(Axis(name, "m", 0.02, 2.0) for name in "xyz")).to(device)
    for rows, most in SHAPES:
        x, position = torch.randn(rows, most, width, device=device), torch.randn(rows, most, 3, device=device)
        for share in SHARES:
            valid = (torch.arange(most) < lengths(rows, most, share)[:, None]).to(device)

            def arm(pays: float, valid: torch.Tensor = valid, x: torch.Tensor = x, position: torch.Tensor = position) -> None:
                packing.PAYS = pays
                with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                    net(x, position, valid=valid)[0].float().square().mean().backward()

            packed, padded = ([1e3 * t for t in taken] for taken in
                              turns([lambda: arm(0.0), lambda: arm(2.0)], options.repeats))
            compare(f"{rows} rows of up to {most} tokens, {1 - float(valid.float().mean()):.0%} padding", "padded", "ms",
                    packed, padded, device=device)


if __name__ == "__main__":
    main()
