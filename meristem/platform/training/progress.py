"""What a run says while it runs: a progress bar or plain lines, metrics.jsonl, TensorBoard."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn


def _clock(seconds: float) -> str:
    minutes, s = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{s:02d}" if hours else f"{minutes}:{s:02d}"


def _kept(records: Path, step: int) -> int:
    """Bytes of the lines of steps up to this one, before any that a kill cut short. What is kept is not written again: a kill
    meanwhile would lose it."""
    size = 0
    with records.open("rb") as lines:
        for line in lines:
            try:
                if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                    break
            except ValueError:
                break
            size += len(line)
    return size


class Reporter:
    """One run's voice. Records go to metrics.jsonl and TensorBoard; the terminal gets a bar, or plain lines if it is none.

    Silent on ranks other than 0 (directory None) and, on the terminal, when quiet.
    """

    def __init__(self, title: str, total: int, directory: Path | None, quiet: bool = False) -> None:
        self.title, self.total, self.quiet = title, total, quiet or directory is None
        self._file = (directory / "metrics.jsonl").open("a+") if directory is not None else None
        self._board: Any = None
        self._directory = directory
        self._bar: Progress | None = None
        if not self.quiet and sys.stderr.isatty():
            columns = (TextColumn("[bold]{task.description}"), TextColumn("step {task.completed:,.0f}/{task.total:,.0f}"),
                       BarColumn(bar_width=24), TextColumn("{task.fields[line]}"))
            self._bar = Progress(*columns, console=Console(stderr=True), refresh_per_second=4)
            self._task = self._bar.add_task(title, total=total, line="")
        self._began, self._first = time.perf_counter(), 0

    def __enter__(self) -> Reporter:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()
        if self._file:
            self._file.close()
        if self._board is not None:
            self._board.close()

    def start(self, step: int) -> None:
        """Begin, or go on, after `step` steps: what a killed run recorded beyond its checkpoint will be recorded again."""
        self._began, self._first = time.perf_counter(), step
        if self._file:
            self._file.truncate(_kept(Path(self._file.name), step))
        if self._bar:
            self._bar.update(self._task, completed=step)

    def advance(self, step: int) -> None:
        if self._bar:
            self._bar.update(self._task, completed=step)

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """step: steps done. values: loss, losses by name, samples_per_s, data_wait (fraction), lr, rank, …"""
        if self._file:
            plain = {k: round(v, 6) if math.isfinite(v) else None for k, v in values.items()}  # JSON has no NaN
            self._file.write(json.dumps({"step": step, **plain}) + "\n")
            self._file.flush()
            if self._board is None and self._directory is not None:
                from torch.utils.tensorboard import SummaryWriter
                self._board = SummaryWriter(str(self._directory / "tensorboard"), purge_step=self._first + 1)
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        if self.quiet:
            return
        pace = (time.perf_counter() - self._began) / max(step - self._first, 1)
        losses = {k.removeprefix("loss/"): v for k, v in values.items() if k.startswith("loss/")}
        parts = f" ({', '.join(f'{k} {v:.3f}' for k, v in losses.items())})" if losses else ""
        line = (f"loss {values['loss']:.3f}{parts}  {values['samples_per_s']:.0f} samples/s  "
                f"data wait {values['data_wait']:.0%}")
        if "rank" in values:
            line += f"  rank {values['rank']:.1f}/{values['dims']:.0f}"
        line += f"  ETA {_clock(pace * (self.total - step))}"
        if self._bar:
            self._bar.update(self._task, completed=step, line=line)
        else:
            print(f"{self.title}  step {step:,}/{self.total:,}  {line}", file=sys.stderr, flush=True)

    def say(self, line: str) -> None:
        """A line that is not a metric."""
        if self.quiet:
            return
        if self._bar:
            self._bar.console.print(line)
        else:
            print(line, file=sys.stderr, flush=True)
