"""Whole programs, measured from outside: processor time, wall time, memory, time to the first step.

The measured program calls `marks.watch()` first; the steps between `settled` and `last` give the cost per sample, whatever the
start cost. Memory is the greatest sum, over the program and all its processes, of their proportional set sizes (PSS: a page
that n processes share counts 1/n in each), read twice a second. Linux.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from marks import FILE, STEPS, descendants

EVERY = 0.5  # seconds between looks at memory, each of which takes milliseconds of the kernel


class Failed(Exception):
    """A program that ended badly, with what it said last."""


@dataclass(frozen=True)
class Figures:
    """cpu, wall: seconds per 1,000 samples once settled. first: seconds from the program's start to the end of the first
    optimiser step; first_cpu: those of processors by then. begun, begun_cpu: the same by the step from which it counts as
    settled. peak: MiB.
    """

    cpu: float
    wall: float
    first: float
    first_cpu: float
    peak: float
    begun: float
    begun_cpu: float


def run(command: Sequence[str], batch: int, settled: int, last: int, environment: Mapping[str, str] = {},
        limit: float = 1800.0) -> Figures:
    """Figures of one run. settled, last: the optimiser steps between which its cost is counted, both with data to come, or
    both at the end of an epoch. Raises Failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        marks, peak, began = Path(folder) / "marks", 0.0, time.time()

        def look(pid: int) -> None:
            nonlocal peak
            peak = max(peak, memory(pid))

        said = finished(command, {**environment, FILE: str(marks), STEPS: f"1,{settled},{last}"}, limit, look)
        noted = noted_in(marks)
        if last not in noted:
            raise Failed(f"it took no {last} steps: {said}")
        first, a, b = (noted[n] for n in (1, settled, last))
        samples = (last - settled) * batch / 1000
        return Figures((b["cpu"] - a["cpu"]) / samples, (b["at"] - a["at"]) / samples, first["at"] - began, first["cpu"], peak,
                       a["at"] - began, a["cpu"])


def noted_in(marks: Path) -> dict[int, dict[str, float]]:
    """What a program noted of itself, by step."""
    return {m["step"]: m for m in map(json.loads, marks.read_text().splitlines())} if marks.exists() else {}


def finished(command: Sequence[str], environment: Mapping[str, str], limit: float = 1800.0,
             look: Callable[[int], None] = lambda pid: None) -> str:
    """Run a program to its end, in an empty folder; what it said last. look: at its process, now and then. Raises Failed."""
    with tempfile.TemporaryDirectory() as folder:
        log, began = Path(folder) / "log", time.time()
        with log.open("wb") as file:
            process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=file, stderr=subprocess.STDOUT,
                                       cwd=folder)
        try:
            while process.poll() is None:
                look(process.pid)
                if time.time() - began > limit:
                    raise Failed(f"took more than {limit:.0f} s")
                time.sleep(EVERY)
        finally:
            for pid in reversed(descendants(process.pid)) if process.poll() is None else ():
                os.kill(pid, 9)
            process.wait()
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        said = " | ".join(lines[-3:])[-500:]
        if process.returncode:
            raise Failed(f"exit {process.returncode}: {said}")
        return said


def memory(pid: int) -> float:
    """MiB of a process and its descendants, shared pages divided among those that share them."""
    total = 0
    for one in descendants(pid):
        try:
            lines = Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()
        except OSError:  # it ended just now
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024
