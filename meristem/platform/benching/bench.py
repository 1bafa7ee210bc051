"""A recipe, a machine and data: what bounds training, what it reaches, and what to set before a long run."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import psutil
import torch
from pydantic import ValidationError

from meristem.errors import MeristemError
from meristem.platform.assembly import Assembly
from meristem.platform.benching import advice, memory
from meristem.platform.benching.clock import LEAST, Timing, clocked, held
from meristem.platform.benching.flops import matrix_rate, work
from meristem.platform.benching.results import GAIN, Advice, Feed, Size, Training, Variant
from meristem.platform.data.loader import loader
from meristem.platform.data.manifest import Row
from meristem.platform.data.source import Data
from meristem.platform.recipe import Recipe, TrainSettings
from meristem.platform.step import Batch

SECONDS = 8.0  # that the steps of one measurement may take
HELD = 2  # batches that are held in memory
SLOWEST = 20.0  # seconds a step of a larger batch may be expected to take
SMALLER, LARGER = 3, 4  # halvings and doublings of the micro-batch that are tried
BUSY = 0.5  # load of others, per processor, from which on a user is told
SHARE = 0.8  # of the memory that is left, that a step may take

Say = Callable[[str], None]


def bench(recipe: Recipe, data: Data, steps: int, say: Say) -> Training:
    """Measure, `steps` steps each or as many as fit into SECONDS: the recipe as it is, the step on batches in memory, the
    loader and both together by number of workers, precisions, micro-batches; then what is advised, as a whole.

    Compiled and uncompiled are compared where the recipe sets train.compile. Raises MeristemError.
    """
    rows = data.rows("train")
    if not rows:
        raise MeristemError("the training split is empty", "Give more data, or another --split.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise MeristemError("bench measures one process", "Start it without torchrun, with the batch of one device: "
                                                          "train.batch divided by the number of processes.")
    return _Bench(recipe, data, rows, steps, say).measured()


def _changed(recipe: Recipe, **train: Any) -> Recipe:
    """With other settings of training. Raises ValidationError where they do not go together."""
    return recipe.model_copy(update={"train": TrainSettings.model_validate({**recipe.train.model_dump(), **train})})


class _Bench:
    def __init__(self, recipe: Recipe, data: Data, rows: Sequence[Row], steps: int, say: Say) -> None:
        self.recipe, self.data, self.rows, self.steps, self.say = recipe, data, rows, steps, say
        self.train, self.busy = recipe.train, _busy()

    # ---- what is timed

    def loading(self, recipe: Recipe, workers: int) -> Callable[[], Iterator[Batch]]:
        return lambda: iter(loader(self.data.cache, self.rows, recipe, fields=recipe.reads, steps=2**62, workers=workers))

    def held(self, recipe: Recipe) -> Callable[[], Iterator[Batch]]:
        return held(islice(self.loading(recipe, 0)(), HELD))

    def timed(self, recipe: Recipe, source: Callable[[], Iterator[Batch]], assembly: Assembly | None = None,
              parted: bool = False) -> Timing:
        if assembly is None:
            torch.manual_seed(recipe.train.seed)
            assembly = Assembly(recipe)
        return clocked(recipe, assembly, source, self.steps, SECONDS, parted=parted)

    def load_alone(self, workers: int) -> float:
        """Seconds a batch, once all workers are under way."""
        source = self.loading(self.recipe, workers)()
        for _ in range(1 + workers):
            next(source)
        began, done = time.perf_counter(), 0
        while done < max(self.steps, LEAST) and not (done >= LEAST and time.perf_counter() - began > SECONDS):
            for _ in range(max(workers, 1)):  # workers take turns: whole rounds
                next(source)
                done += 1
        return (time.perf_counter() - began) / done

    # ---- the whole

    def measured(self) -> Training:
        recipe, now = self.recipe, self.train.workers
        self.say("the recipe as it is")
        memory.reset_peak()
        began = time.perf_counter()
        torch.manual_seed(self.train.seed)
        assembly = Assembly(recipe)
        made = time.perf_counter() - began
        whole = self.timed(recipe, self.loading(recipe, now), assembly)
        host, gpu = memory.peak(), memory.gpu_peak()

        self.say("the step alone")
        source = self.held(recipe)
        alone = self.timed(recipe, source, assembly, parted=True)
        free = self.timed(recipe, source, assembly) if torch.cuda.is_available() else alone
        self.say("what a step computes")
        plain = work(recipe, assembly, source)
        peaks: dict[str, float] = {self.train.precision: matrix_rate(self.train.precision)}

        feeds = self.feeds(assembly, whole)
        feed = next(f for f in feeds if f.workers == now)
        per_sample = plain.flops / self.train.batch
        precision = self.precisions(free, per_sample, peaks)
        compiled = self.compiled(free) if self.train.compile else ()
        sizes = self.sizes(plain.bytes, free.least, per_sample, peaks[self.train.precision])
        return Training(
            samples=self.train.batch, steps=self.train.steps, feed=feed, feeds=tuple(feeds),
            phases={**alone.phases, "load": feed.seconds - feed.step}, alone=free.least, first=made + whole.first,
            cpu=1000 * whole.cpu, host=host, workers=whole.workers_bytes, gpu=gpu, flops=plain.flops,
            peak=peaks[self.train.precision], precision=precision, compile=compiled, sizes=sizes,
            advice=self.advised(feed, feeds, precision, compiled, sizes))

    def feeds(self, assembly: Assembly, whole: Timing) -> list[Feed]:
        """By number of workers, until the device does not wait: none, one, and doubling up to the processors' cores."""
        now, cores = self.train.workers, _cores()
        counts = sorted({0, 1, *(2**k for k in range(1, cores.bit_length()) if 2**k <= cores), cores, now})
        found: list[Feed] = []
        for workers in counts:
            if found and found[-1].waiting < 0.01 and workers != now:
                continue
            self.say(f"the loader alone, {workers} workers")
            alone = self.load_alone(workers)
            if workers != now:
                self.say(f"both together, {workers} workers")
            timing = whole if workers == now else self.timed(self.recipe, self.loading(self.recipe, workers), assembly)
            found.append(Feed(workers, alone, timing.busy, timing.phases["load"]))
        return found

    def precisions(self, now: Timing, per_sample: float, peaks: dict[str, float]) -> tuple[Variant, ...]:
        """The step alone, from the same weights on the same batches."""
        found = []
        source = self.held(self.recipe)
        for name in ("fp32", "bf16", "fp16"):
            self.say(f"precision {name}")
            try:
                timing = self.timed(_changed(self.recipe, precision=name, compile=False), source)
                peaks[name] = peaks.get(name) or matrix_rate(name)
            except (MeristemError, ValidationError) as error:
                found.append(Variant(name, note=_reason(error)))
                continue
            rate = self.train.batch / timing.least
            found.append(Variant(name, timing.least, timing.first, _loss(timing), rate, per_sample * rate / peaks[name]))
        return tuple(found)

    def compiled(self, now: Timing) -> tuple[Variant, ...]:
        """Uncompiled beside the recipe as it is."""
        self.say("uncompiled")
        without = self.timed(_changed(self.recipe, compile=False), self.held(self.recipe))
        return tuple(Variant(name, t.least, t.first, _loss(t), self.train.batch / t.least)
                     for name, t in (("true", now), ("false", without)))

    def sizes(self, taken: int, seconds: float, per_sample: float, peak: float) -> tuple[Size, ...]:
        """Micro-batches from the recipe's own down and up, until samples a second stop growing or memory is out."""
        micro = self.train.batch // self.train.accumulate
        rest = taken / self.train.accumulate
        most = max(len(self.rows), micro)
        down = [micro // 2**k for k in range(1, SMALLER + 1) if micro % 2**k == 0]
        found: list[Size] = []

        def tried(samples: int) -> Size:
            expected = rest * samples / micro
            if not torch.cuda.is_available() and expected > SHARE * memory.left():
                return Size(samples, note=f"would take {expected / 2**30:.1f} GiB of {memory.left() / 2**30:.1f} that are left")
            self.say(f"batches of {samples}")
            recipe = _changed(self.recipe, batch=samples, accumulate=1, compile=False)
            try:
                memory.reset_peak()
                timing = self.timed(recipe, self.held(recipe))
            except (torch.OutOfMemoryError, MemoryError):
                torch.cuda.empty_cache()
                return Size(samples, note="out of memory")
            gpu = memory.gpu_peak()
            rate = samples / timing.least
            return Size(samples, timing.least, round(expected) if gpu is None else gpu, per_sample * rate / peak)

        for samples in [micro, *down]:
            found.append(tried(samples))
        for samples in (micro * 2**k for k in range(1, LARGER + 1)):
            known = [s for s in found if s.seconds]
            largest = max(known, key=lambda s: s.samples, default=None)
            if samples > most or (largest and largest.seconds * samples / largest.samples > SLOWEST):
                break
            found.append(tried(samples))
            if found[-1].note or (known and found[-1].rate < max(s.rate for s in known) * (1 + GAIN)):
                break
        return tuple(sorted(found, key=lambda s: s.samples))

    def advised(self, feed: Feed, feeds: Sequence[Feed], precision: Sequence[Variant], compiled: Sequence[Variant],
                sizes: Sequence[Size]) -> Advice:
        """What to set; measured once more as a whole, and nothing where that gains less than GAIN."""
        train, changes, words = self.train, dict[str, Any](), list[str]()
        workers = advice.fewest(feeds).workers
        if workers != train.workers:
            changes["workers"] = workers
        best = advice.fastest(precision, train.precision)
        if best.name != train.precision:
            changes["precision"] = best.name
        current = next(v for v in precision if v.name == train.precision)
        words += [f"{v.name} learns otherwise than {current.name} from the same batches: loss {v.loss:.4g} against "
                  f"{current.loss:.4g}; compare a short training before a long one"
                  for v in precision if v.seconds and advice.differs(v, current)]
        if compiled and advice.fastest(compiled, "true").name == "false":
            changes["compile"] = False
        micro = advice.part(sizes, train.batch)
        accumulate = train.batch // micro.samples if micro is not None else train.accumulate
        if accumulate != train.accumulate:
            changes["accumulate"] = accumulate
        before = after = feed.seconds * train.steps / 3600
        if changes:  # one after the other, so that what else the machine does slows both alike
            before, after = (self.hours(_changed(self.recipe, **given), feeds)
                             for given in ({}, changes))
            if after * (1 + GAIN) > before and workers >= train.workers:
                changes, after = {}, before
        if changes.get("accumulate", 0) > train.accumulate:
            words.append("samples of different parts do not repel each other: a contrastive loss has fewer negatives")
        words += self.busy
        overrides = tuple(f"train.{name}={str(value).lower()}" for name, value in changes.items())
        larger, hours = self.larger(sizes, after)
        return Advice(overrides, before, after, larger, hours, tuple(words))

    def hours(self, recipe: Recipe, feeds: Sequence[Feed]) -> float:
        """Of the recipe's steps, with everything in it as advised."""
        self.say(f"once more, with train.workers={recipe.train.workers} train.precision={recipe.train.precision} "
                 f"train.accumulate={recipe.train.accumulate}")
        timing = self.timed(recipe, self.loading(recipe, recipe.train.workers))
        alone = next(f.alone for f in feeds if f.workers == recipe.train.workers)
        return max(timing.mean, alone) * recipe.train.steps / 3600

    def larger(self, sizes: Sequence[Size], after: float) -> tuple[tuple[str, ...], float]:
        """A batch that is worth more samples a second, and the steps that then see as many samples; where there is one."""
        best, now = advice.plateau(sizes), advice.part(sizes, self.train.batch)
        if best is None or now is None or best.samples <= self.train.batch:
            return (), 0.0
        steps = math.ceil(self.train.steps * self.train.batch / best.samples)
        return (f"train.batch={best.samples}", f"train.steps={steps}"), after * now.rate / best.rate


def _cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _busy() -> list[str]:
    """A word of caution where others work on this machine."""
    load, cores = psutil.getloadavg()[0], os.cpu_count() or 1
    if load < BUSY * cores:
        return []
    return [f"others keep this machine busy (load {load:.1f} on {cores} processors): on a quiet one all would be faster, and "
            "the figures more certain"]


def _loss(timing: Timing) -> float:
    """Mean over the first steps that every measurement has."""
    first = timing.losses[:2 * LEAST]
    return sum(first) / len(first)


def _reason(error: Exception) -> str:
    return error.what if isinstance(error, MeristemError) else str(error.errors()[0]["msg"])  # type: ignore[attr-defined]


def machine() -> dict[str, str]:
    """What was measured on."""
    gpu = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    return {"device": name, "processors": str(os.cpu_count()), "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
            "load": f"{psutil.getloadavg()[0]:.1f}", "torch": torch.__version__}
