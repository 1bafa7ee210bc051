"""The training loop, read from top to bottom: it serves pretraining and fine-tuning, on one device or many."""

from __future__ import annotations

import copy
import logging
import math
import os
import signal
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from meristem.errors import MeristemError
from meristem.platform import norms
from meristem.platform.assembly import Assembly, Teacher
from meristem.platform.contrastive.lights import feature_lights
from meristem.platform.objectives import Loss
from meristem.platform.recipe import TrainSettings
from meristem.platform.step import Batch
from meristem.platform.training import allocator, checkpoint, optim, parts, precision, sharding
from meristem.platform.training.combine import combined
from meristem.platform.training.energy import Meter
from meristem.platform.training.progress import Reporter

PATIENCE = 10  # steps in a row with a loss that is not finite before a run goes back to its last checkpoint
ROLLBACKS = 3  # times that a run goes back before it gives up
LOST = 0.05  # share of steps so skipped above which the user is told

Batches = Callable[[int, int, int], Generator[Batch, None, None]]
"""(first step, rank, world) -> one batch per remaining step: this rank's share."""


Card = Callable[[Assembly], Mapping[str, Any]]
"""The card of an assembly with these weights."""


@dataclass
class Outcome:
    """What a training run came to, over all its sessions.

    assembly: with the weights to use (averaged if the recipe averages). stopped: asked to stop before its last step.
    devices: how many trained at once. joules: what the counters of `metered` tell; None where there is none.
    """

    assembly: Assembly
    steps: int
    seconds: float
    samples: int
    skipped: int = 0
    stopped: bool = False
    devices: int = 1
    joules: float | None = None
    metered: str = ""
    last: dict[str, float] = field(default_factory=dict)


def launch(settings: TrainSettings, accelerator: str = "auto") -> Fabric:
    """Fabric for this process; under torchrun it joins the group."""
    kind = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}[settings.precision]
    if accelerator == "auto" and not torch.cuda.is_available():
        accelerator = "cpu"
    if settings.precision == "fp16" and accelerator == "cpu":
        raise MeristemError("fp16 needs a GPU: gradients are scaled on the device", "Set train.precision=bf16 or fp32.")
    if settings.precision == "fp16" and settings.fsdp:
        raise MeristemError("fp16 scales gradients by what one process sees of them, and train.fsdp leaves each a slice",
                            "Set train.precision=bf16 or fp32.")
    world, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun's
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    strategy: Any = "auto"
    if world > 1 and settings.fsdp:
        strategy = ModelParallelStrategy(sharding.shard, data_parallel_size=world, tensor_parallel_size=1)
    elif world > 1:  # gradients are reduced bucket by bucket while the backward pass goes on
        # a mask token may go unused, which a walk over the graph tells; buffers, queues among them, are alike everywhere
        alike = "forward_sync_buffers" if "forward_sync_buffers" in signature(DistributedDataParallel).parameters \
            else "broadcast_buffers"  # as torch < 2.15 calls it
        strategy = DDPStrategy(find_unused_parameters=True, **{alike: False})
    fabric = Fabric(accelerator=accelerator, devices=local, num_nodes=world // local, strategy=strategy,
                    precision=kind)
    fabric.launch()
    if fabric.device.type == "cpu":
        allocator.keep_freed()
    return fabric


class _StopSignal:
    """Notes a request to stop; the loop then saves and leaves."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> _StopSignal:
        self._old = {}
        for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            try:
                self._old[name] = signal.signal(name, self._note)
            except ValueError:  # not the main thread: whoever owns it decides
                continue
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        signal.signal(number, self._old[signal.Signals(number)])  # a second request takes its usual course

    def __exit__(self, *_: object) -> None:
        for name, old in self._old.items():
            signal.signal(name, old)


@contextmanager
def _memory(settings: TrainSettings) -> Iterator[None]:
    """Running out of memory, of a GPU or of the machine, told with what to change."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch raises its own kind for a GPU, a plain RuntimeError for a processor
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        part = settings.batch // settings.accumulate
        raise MeristemError(f"memory ran out with {part} samples at a time", "Set train.accumulate higher, "
                            "train.checkpointing=true or train.precision=bf16, or take a smaller view or encoder. The last "
                            "checkpoint is intact: `--init` starts a run from its weights.") from None


def reduce(fabric: Fabric, losses: Mapping[str, Loss]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """What of each loss to back-propagate on this rank, weighted, and each one's value over all ranks.

    Data-parallel training averages gradients over ranks, so a rank's share is world · total / (sum of counts).
    """
    device = next(iter(losses.values())).total.device
    table = torch.stack([torch.stack([loss.total.detach().double(), torch.as_tensor(loss.count, device=device).double()])
                         for loss in losses.values()])
    if fabric.world_size > 1:
        table = fabric.all_reduce(table, reduce_op="sum")
    shares = [loss.weight * fabric.world_size * loss.total / table[i, 1].clamp_min(1e-12).to(loss.total.dtype)
              for i, loss in enumerate(losses.values())]
    return shares, {name: table[i, 0] / table[i, 1].clamp_min(1e-12) for i, name in enumerate(losses)}


def train(settings: TrainSettings, assembly: Assembly, batches: Batches, fabric: Fabric, reporter: Reporter, *,
          directory: Path | None = None, card: Card | None = None, resume: Path | None = None) -> Outcome:
    """Train an assembly for settings.steps optimiser steps.

    directory: where checkpoints go (None: none are written). card: what a checkpoint's card says.
    resume: a checkpoint to continue from, exactly.
    """
    raw = assembly
    torch.manual_seed(settings.seed + fabric.global_rank)
    if settings.batch % (fabric.world_size * settings.accumulate):
        raise MeristemError(f"train.batch={settings.batch} cannot be split over {fabric.world_size} processes × "
                            f"{settings.accumulate} accumulation steps", "Choose a multiple.")
    if fabric.world_size > 1 and settings.combine == "pareto":
        raise MeristemError("train.combine=pareto compares gradients on one process, and there are "
                            f"{fabric.world_size}", "Train on one device, or set train.combine=sum.")
    if fabric.world_size > 1:
        raw = norms.synchronised(raw, fabric.device)  # type: ignore[assignment]
    raw = raw.to(fabric.device)
    if settings.precision == "bf16" and fabric.device.type == "cpu":
        precision.sound(raw)
    average = Teacher({"assembly": raw}) if settings.ema is not None else None
    sharded = isinstance(fabric.strategy, ModelParallelStrategy)
    spare = copy.deepcopy(raw).cpu() if sharded else None  # a net of whole weights, for what is said and done with them
    optim.freeze(raw, settings)
    if settings.compile:
        parts.compiled(raw)
    if settings.checkpointing:
        parts.recomputed(raw)
    module = fabric.setup_module(raw)
    if average is not None and isinstance(fabric.strategy, ModelParallelStrategy):
        sharding.shard(average, fabric.strategy.device_mesh)
    optimiser = optim.optimiser(raw, settings)
    optimizer = fabric.setup_optimizers(optimiser)

    def restore(path: Path) -> dict[str, Any]:
        """Weights, averages, optimiser and scaler of a checkpoint; the rest of its state is returned."""
        state, weights = checkpoint.read_state(path), checkpoint.read_weights(path)
        sharding.fill(raw, state["raw"] or weights)
        if average is not None:
            sharding.fill(average.copies["assembly"], weights)
        optimiser.load_state_dict(sharding.sliced(state["optimiser"], (p for g in optimiser.param_groups for p in g["params"])))
        fabric.strategy.precision.load_state_dict(state["precision"])
        return state

    start = skipped = in_a_row = rolled = 0
    told = False
    total, counted = 0.0, 0  # losses since the last checkpoint that was due
    before: float = 0.0
    earlier: float | None = 0.0
    meter = Meter(fabric.device.index if fabric.device.type == "cuda" else None, fabric.local_rank == 0)
    last: dict[str, float] = {}
    shown: dict[str, Tensor] = {}  # the newest value of each loss: in a joint run not every step has all
    if resume is not None:
        state = restore(resume)
        start, skipped, in_a_row, rolled = state["step"], state["skipped"], state["in_a_row"], state["rolled"]
        (total, counted), before, last, earlier = state["losses"], state["seconds"], state["last"], state["joules"]
        if str(fabric.global_rank) in state["generators"]:
            _restore(state["generators"][str(fabric.global_rank)], fabric)

    def usable(keep: bool) -> Assembly:
        """The net with the weights to use, whole. Every process must ask; only where they are kept is it more than a shape."""
        final = average.copies["assembly"] if average is not None else raw
        assert isinstance(final, Assembly)
        if spare is None:
            return final
        weights = sharding.whole(final.state_dict(), keep)
        if keep:
            spare.load_state_dict(weights)
        return spare

    def save(step: int) -> None:
        generators, joules, first = _generators(fabric), _spent(fabric, meter, earlier), fabric.global_rank == 0
        if directory is None:
            return
        final = usable(first)
        state = {"step": step, "skipped": skipped, "in_a_row": in_a_row, "rolled": rolled,
                 "losses": [0.0, 0] if step % settings.checkpoint_every == 0 else [total, counted],
                 "optimiser": sharding.whole(optimiser.state_dict(), first), "generators": generators,
                 "precision": fabric.strategy.precision.state_dict(), "last": last,
                 "joules": joules, "seconds": before + time.perf_counter() - began,
                 "raw": sharding.whole(raw.state_dict(), first) if average is not None else {}}
        if first:
            about = {**(card(final) if card is not None else {}), **({"loss": total / counted} if counted else {})}
            checkpoint.save(directory, step, final.state_dict(), about, state, settings.keep)

    began = time.perf_counter()
    step = start
    saved = start if resume is not None else -1
    waited = window_began = 0.0
    seen_since = 0
    statistics = norms.Statistics(raw)
    reporter.start(start)
    stream = batches(start, fabric.global_rank, fabric.world_size)
    with _StopSignal() as stop, _memory(settings), closing(stream):  # its processes would outlive an error, and be waited for
        module.train()
        window_began = time.perf_counter()
        while step < settings.steps and not _any(fabric, stop.asked):
            asked = time.perf_counter()
            batch = next(stream)
            waited += time.perf_counter() - asked
            progress = step / settings.steps
            rate = optim.schedule(optimiser, settings, step)
            optim.rest(raw, settings, step)

            statistics.keep()
            values: dict[str, Tensor] = {}
            micro = batch.split(settings.accumulate) if settings.accumulate > 1 else [batch]
            for i, part in enumerate(micro):
                part = raw.prepare(part.to(fabric.device))
                with fabric.no_backward_sync(module, enabled=i < len(micro) - 1):
                    losses = module(part, progress)
                    shares, named = reduce(fabric, losses)
                    fabric.backward(combined(settings.combine, shares, raw.encoder) / len(micro))
                for name, value in named.items():
                    values[name] = values.get(name, torch.zeros_like(value)) + value / len(micro)
            shown |= values
            loss = sum(float(v) * losses[n].weight for n, v in values.items())  # one synchronisation a step

            sound = math.isfinite(loss)
            if sound:
                optim.thaw(raw, settings, step)
                norm = fabric.clip_gradients(module, optimizer, max_norm=settings.clip or math.inf, error_if_nonfinite=False)
                norm = sharding.whole(torch.as_tensor(norm), True)
                sound = settings.precision == "fp16" or bool(norm.isfinite())  # fp16: its scaler sees to it
            if sound:
                in_a_row, total, counted = 0, total + loss, counted + 1
                optimizer.step()
                lights = _lights(raw) if (step + 1) % settings.log_every == 0 else {}
                raw.after(progress)
                if average is not None and settings.ema is not None:
                    average.follow({"assembly": raw}, min(settings.ema, (1 + step) / (10 + step)))
            else:  # the update is skipped on every rank alike, since the value is a sum over ranks
                skipped, in_a_row, lights = skipped + 1, in_a_row + 1, {}
                statistics.restore()
                if in_a_row >= PATIENCE:
                    if directory is None or saved < 0 or rolled >= ROLLBACKS:
                        raise MeristemError(_lost(step, rolled), "Lower train.lr, or check the data with `meristem data "
                                            "check`. The last checkpoint is intact.")
                    restore(checkpoint.locate(directory))
                    in_a_row, rolled = 0, rolled + 1
                    reporter.say(f"warning: {_lost(step, 0)}. The model is that of step {saved} again, and learns from what "
                                 f"comes next ({rolled} of {ROLLBACKS} times).")
            optimizer.zero_grad()
            step += 1
            seen_since += settings.batch
            reporter.advance(step)

            if step % settings.log_every == 0 or step == settings.steps:
                elapsed = time.perf_counter() - window_began
                last = {"loss": loss, "lr": rate, "samples_per_s": seen_since / elapsed, "data_wait": waited / elapsed,
                        **lights,
                        **({f"loss/{k}": float(v) for k, v in shown.items()} if len(shown) > 1 else {}),
                        **({"skipped": float(skipped)} if skipped else {}),
                        **({"rolled_back": float(rolled)} if rolled else {})}
                reporter.record(step, last)
                meter.read()
                waited, seen_since, window_began = 0.0, 0, time.perf_counter()
                if not told and skipped > LOST * step and skipped >= min(PATIENCE, LOST * settings.steps):
                    reporter.say(_warning(skipped, step, settings.precision))
                    told = True
            if step % settings.checkpoint_every == 0 and step < settings.steps and in_a_row == 0:
                save(step)
                saved, total, counted = step, 0.0, 0
        if step != saved:
            save(step)
    parts.plain(raw)
    return Outcome(usable(True).to(fabric.device), step, before + time.perf_counter() - began, step * settings.batch, skipped,
                   step < settings.steps, fabric.world_size, _spent(fabric, meter, earlier), meter.of, last)


def _spent(fabric: Fabric, meter: Meter, earlier: float | None) -> float | None:
    """Joules of all ranks, with those of earlier sessions; None where any is not known."""
    mine = meter.read()
    known = math.nan if mine is None else mine
    if fabric.world_size > 1:
        known = float(fabric.all_reduce(torch.tensor(known, dtype=torch.float64, device=fabric.device), reduce_op="sum"))
    return None if earlier is None or math.isnan(known) else earlier + known


def _warning(skipped: int, steps: int, precision: str) -> str:
    """What a user is told of so many steps without an update."""
    remedy = "Lower train.lr" if precision == "fp32" else "Set train.precision=fp32, or lower train.lr"
    return (f"warning: {skipped:,} of {steps:,} steps were skipped because their loss or gradient was not finite; the model "
            f"learns from the others only. {remedy}.")


def _lost(step: int, rolled: int) -> str:
    """What happened to a run whose loss stays away."""
    back = f", although the run went back to its last checkpoint {rolled} times" if rolled else ""
    return f"loss or gradient were not finite for {PATIENCE} steps in a row, at step {step + 1}{back}"


def _any(fabric: Fabric, flag: bool) -> bool:
    """Whether any rank was asked to stop: all leave together."""
    if fabric.world_size == 1:
        return flag
    return bool(fabric.all_reduce(torch.tensor(float(flag), device=fabric.device), reduce_op="sum") > 0)


def _generators(fabric: Fabric) -> dict[str, Tensor]:
    """Every rank's generator states, processor's then GPU's, so that dropout resumes exactly."""
    mine = torch.get_rng_state()
    if fabric.device.type == "cuda":
        mine = torch.cat([mine, torch.cuda.get_rng_state(fabric.device)])
    if fabric.world_size == 1:
        return {"0": mine}
    every = fabric.all_gather(mine.to(fabric.device))
    assert isinstance(every, Tensor)
    return {str(rank): every[rank].cpu().clone() for rank in range(fabric.world_size)}


def _restore(states: Tensor, fabric: Fabric) -> None:
    """The inverse of `_generators`, on this rank. A run that goes on on another device draws anew there."""
    own = len(torch.get_rng_state())
    torch.set_rng_state(states[:own].clone())  # torch reads a slice from the start of its storage
    if fabric.device.type == "cuda" and len(states) > own:
        torch.cuda.set_rng_state(states[own:].clone(), fabric.device)


def _lights(assembly: Assembly) -> dict[str, float]:
    """Collapse lights of this rank's own batch: effective rank and spread of the first pass's summary."""
    assert assembly.last_step is not None
    summary = assembly.last_step.summary()
    return feature_lights(summary.detach().float()) if summary is not None and len(summary) > 1 else {}
