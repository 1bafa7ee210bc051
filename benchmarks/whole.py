"""Whole training programs beside each other, from files to optimiser steps: lines of `compare`."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from compare import cannot, compare
from programs import Failed, Figures, run

HERE = Path(__file__).parent
AHEAD = 6  # steps that run beyond the counted ones, so that loaders work ahead at both of their ends
FIGURES = {"cpu": ("processor time", "CPU s / 1,000 samples"), "wall": ("wall time", "s / 1,000 samples"),
           "begun_cpu": ("processor time, from the start to the end of the first epoch", "CPU s"),
           "begun": ("wall time, from the start to the end of the first epoch", "s"),
           "first": ("time to the first step", "s"), "peak": ("memory", "MiB, PSS of all processes")}
Command = Callable[[Path, int], list[str]]
"""(an empty folder, optimiser steps) -> a script of `loops` and its arguments."""


def pretrain(recipe: str, data: Path, out: Path, steps: int, overrides: Sequence[str]) -> list[str]:
    """Ours, with a cache of its own."""
    return ["ours.py", "pretrain", recipe, "--data", str(data), "--out", str(out / "run"), "--cache", str(out / "cache"),
            "--split", "1,0,0", "--quiet", f"train.steps={steps}", *overrides]


def whole(name: str, ours: Command, peers: Mapping[str, Command], *, batch: int, epoch: int, steps: int, repeats: int,
          targets: Mapping[str, str], **more: Any) -> None:
    """One line for each peer and figure. epoch: optimiser steps of the first; steps: counted after it; targets: by figure."""
    found: dict[str, list[Figures]] = {"ours": [], **{peer: [] for peer in peers}}
    for _ in range(repeats):
        for who in list(found):
            try:
                with tempfile.TemporaryDirectory() as folder:
                    script, *arguments = (ours if who == "ours" else peers[who])(Path(folder), epoch + steps + AHEAD)
                    command = [sys.executable, "-P", str(HERE / "loops" / script), *map(str, arguments)]
                    paths = os.pathsep.join(map(str, (HERE, HERE.parent)))
                    found[who].append(run(command, batch, epoch, epoch + steps, {
                        "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": paths}))
            except Failed as failure:
                if who == "ours":
                    raise
                cannot(name, who, str(failure))
                del found[who]
    mine = found.pop("ours")
    for peer, theirs in found.items():
        for figure, (what, unit) in FIGURES.items():
            compare(f"{name}: {what}", peer, unit, [getattr(f, figure) for f in mine], [getattr(f, figure) for f in theirs],
                    target=targets.get(figure, ""), **more)
