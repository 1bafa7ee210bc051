"""A clock of the training loop: it runs `training.loop.train` as a run does, and cuts each step where the work changes."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import psutil
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from meristem.platform.assembly import Assembly, total
from meristem.platform.recipe import Recipe, TrainSettings
from meristem.platform.step import Batch
from meristem.platform.training import parts
from meristem.platform.training.loop import launch, train
from meristem.platform.training.progress import Reporter

PHASES = ("load", "augment", "forward", "backward", "optimiser", "teacher")
WARM, LEAST = 3, 3  # steps that do not count: first touches of memory and files; and steps that must


@dataclass(frozen=True)
class Timing:
    """Steps of the loop, after its warm-up.

    seconds: of each optimiser step. phases: mean seconds of each part of a step: `load`: waiting for the batch; `augment`:
    bringing it to the device and what is done to it there; `forward` with losses; `backward`; `optimiser` with clipping;
    `teacher`: moving averages and memories. Of the device's own time only where it was asked to finish each part (`parted`).
    samples: of one step. first: seconds from the call to the end of the first step. cpu: processor seconds per sample, of this
    process and its loaders. workers_bytes: what the loaders hold of their own. losses: of every step, warm-up included.
    """

    seconds: tuple[float, ...]
    phases: dict[str, float]
    samples: int
    first: float
    cpu: float
    workers_bytes: int
    losses: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.seconds)

    @property
    def least(self) -> float:
        """Of the step that others disturbed least: the same work takes longer only where a machine does something else."""
        return min(self.seconds)

    @property
    def busy(self) -> float:
        """Mean seconds of a step without the wait for its batch."""
        return self.mean - self.phases["load"]


class _Enough(Exception):
    """All steps that were asked for are measured: a run that is timed ends before its schedule does."""


class _Clock(Reporter):
    """Hears of each step's end from the loop, and of its parts from `mark`. parted: wait for the device at each mark."""

    def __init__(self, device: torch.device, steps: int, limit: float, warm: int, parted: bool, began: float) -> None:
        super().__init__("", 0, None, quiet=True)
        self.wait = parted and device.type == "cuda"
        self.steps, self.limit, self.warm = steps, limit, warm
        self.done: list[dict[str, float]] = []
        self.current: dict[str, float] = defaultdict(float)
        self.losses: list[Tensor] = []
        self.first = self.cpu = self.window = 0.0
        self.workers_bytes = 0
        self.began, self.at = began, time.perf_counter()

    def mark(self, phase: str) -> None:
        """What was done since the last mark was of this phase."""
        if self.wait:
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.current[phase] += now - self.at
        self.at = now

    def advance(self, step: int) -> None:
        self.mark("teacher")
        self.done.append(dict(self.current))
        self.current.clear()
        if len(self.done) == 1:
            self.first = self.at - self.began
        if len(self.done) == self.warm:
            self.cpu, self.window = _processor(), self.at

    @property
    def enough(self) -> bool:
        counted = len(self.done) - self.warm
        if counted < min(LEAST, self.steps):
            return False
        return counted >= self.steps or self.at - self.window >= self.limit

    def close(self) -> None:
        """Read what can be read only while the loaders live."""
        self.cpu = _processor() - self.cpu
        self.workers_bytes = sum(_own(child) for child in psutil.Process().children(recursive=True))


def _processor() -> float:
    """Seconds that processors worked for this process and those it started, which still live."""
    seconds = 0.0
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.Error:  # it ended between the two questions
            continue
        seconds += times.user + times.system
    return seconds


def _own(process: psutil.Process) -> int:
    """Bytes that a process shares with no other."""
    try:
        return int(process.memory_full_info().uss)
    except psutil.Error:
        return 0


def held(batches: Iterable[Batch]) -> Callable[[], Generator[Batch, None, None]]:
    """A source that hands out the same few batches for ever."""
    kept = list(batches)

    def source() -> Generator[Batch, None, None]:
        yield from cycle(kept)

    return source


def clocked(recipe: Recipe, assembly: Assembly, source: Callable[[], Iterator[Batch]], steps: int, limit: float, *,
            warm: int = WARM, parted: bool = False, prepared: bool = False) -> Timing:
    """Train an assembly on what a source gives for `steps` steps that count, or as many as fit into `limit` seconds.

    The schedule is that of the recipe's own beginning. warm: steps before, that do not count. parted: see `Timing.phases`.
    prepared: batches are augmented already.
    Nothing is written. Raises what the loop raises, MeristemError and torch.OutOfMemoryError; KeyboardInterrupt where it was
    asked to stop.
    """
    began = time.perf_counter()
    settings: TrainSettings = recipe.train.model_copy(update={
        "steps": max(recipe.train.steps, warm + steps + 1), "log_every": 10**9, "checkpoint_every": 10**9})
    fabric = launch(settings)
    clock = _Clock(fabric.device, steps, limit, warm, parted, began)

    def batches(first: int, rank: int, world: int) -> Generator[Batch, None, None]:
        with closing(_generated(source())) as stream:
            while not clock.enough:
                clock.mark("between")
                batch = next(stream)
                clock.mark("load")
                yield batch
            clock.close()
        raise _Enough

    with _cut(assembly, fabric, clock, prepared), suppress(_Enough):
        train(settings, assembly, batches, fabric, clock)
        raise KeyboardInterrupt  # the loop leaves by itself only where it was asked to stop
    counted = clock.done[warm:]
    seconds = tuple(sum(step.values()) for step in counted)
    phases = {phase: statistics.fmean(step.get(phase, 0.0) for step in counted) for phase in PHASES}
    samples = recipe.train.batch
    return Timing(seconds, phases, samples, clock.first, clock.cpu / (samples * len(counted)), clock.workers_bytes,
                  tuple(float(loss) for loss in clock.losses))


def _generated(batches: Iterator[Batch]) -> Generator[Batch, None, None]:
    yield from batches


@contextmanager
def _cut(assembly: Assembly, fabric: Fabric, clock: _Clock, prepared: bool) -> Generator[None, None, None]:
    """Marks at the borders of a step's parts, while the loop runs."""
    def told(module: nn.Module, given: Any, losses: Any) -> None:
        clock.mark("forward")
        clock.losses.append(total(losses).detach())

    def marked(plain: Callable[..., Any]) -> Callable[..., Any]:
        def backward(*given: Any, **named: Any) -> None:
            plain(*given, **named)
            clock.mark("backward")
        return backward

    hooks = [assembly.register_forward_pre_hook(lambda module, given: clock.mark("augment")),
             assembly.register_forward_hook(told),
             register_optimizer_step_post_hook(lambda optimiser, given, named: clock.mark("optimiser"))]
    replaced = {"backward": (fabric, marked(fabric.backward))}
    if prepared:
        replaced["prepare"] = (assembly, lambda batch: batch)
    for name, (owner, other) in replaced.items():
        setattr(owner, name, other)
    try:
        yield
    finally:
        parts.plain(assembly)  # so that it can be timed again
        for name, (owner, _) in replaced.items():
            delattr(owner, name)  # the class's own is behind it
        for hook in hooks:
            hook.remove()
