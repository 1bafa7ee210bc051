"""Optimiser groups and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from meristem.errors import RecipeError
from meristem.platform.assembly import Assembly
from meristem.platform.recipe import TrainSettings

# learned vectors and tables that do not decay
VECTORS = ("token", "cls", "query", "pos_embed", "position_bias_table", "blocks.bias", "blocks.slope")


def groups(assembly: Assembly, settings: TrainSettings) -> list[dict[str, object]]:
    """Parameter groups of an optimiser.

    Weight decay on matrices and kernels only, not on tokens, queries and tables of positions. `scale` is a factor on the
    learning rate: layer_decay ** (layers above) inside the encoder, 1 elsewhere (Clark et al. 2020, eq. in §3). `part` is
    encoder or head. Raises RecipeError when `freeze` names no module.
    """
    scale, encoder = {}, set()
    layers = assembly.encoder.layer_groups()
    for depth, layer in enumerate(layers):
        for p in layer:
            scale[p] = settings.layer_decay ** (len(layers) - depth)
            encoder.add(p)
    names = [name for name, _ in assembly.named_parameters()]
    for prefix in settings.freeze:
        if not any(_under(name, (prefix,)) for name in names):
            raise RecipeError(f"train.freeze names '{prefix}', but no module is called so",
                              f"Modules: {', '.join(dict.fromkeys('.'.join(n.split('.')[:2]) for n in names))}.")
    table: dict[tuple[float, bool, str], list[nn.Parameter]] = {}
    for name, p in assembly.named_parameters():
        if not p.requires_grad:
            continue
        decays = p.ndim > 1 and not name.endswith(VECTORS)
        table.setdefault((scale.get(p, 1.0), decays, "encoder" if p in encoder else "head"), []).append(p)
    return [{"params": params, "scale": s, "part": part, "weight_decay": settings.weight_decay if decays else 0.0}
            for (s, decays, part), params in table.items()]


def freeze(assembly: Assembly, settings: TrainSettings) -> None:
    """What is frozen for the whole run gets no gradient, which spares its computation."""
    for name, p in assembly.named_parameters():
        if _under(name, [module for module, until in settings.freeze.items() if until == 1]):
            p.requires_grad_(False)


def optimiser(assembly: Assembly, settings: TrainSettings) -> torch.optim.Optimizer:
    kind = torch.optim.Adam if settings.optimiser == "adam" else torch.optim.AdamW
    fused = settings.precision != "fp16"  # fused, it would unscale before the clipping
    return kind(groups(assembly, settings), lr=settings.lr, betas=settings.betas, fused=fused or None)


def _tooth(t: float, warmup: float, floor: float) -> float:
    """One linear warm-up and cosine decay over t in [0, 1]."""
    if t < warmup:
        return t / warmup
    return floor + (1 - floor) * (1 + math.cos(math.pi * (t - warmup) / max(1 - warmup, 1e-9))) / 2


def factor(settings: TrainSettings, step: int, part: str) -> float:
    """The learning-rate factor of a part (encoder | head) at a step.

    sawtooth: the head alone for the first `head_first` of the run, then everything, each phase with its own warm-up and decay.
    """
    t = (step + 1) / settings.steps
    if settings.schedule == "cosine":
        return _tooth(t, settings.warmup, settings.floor)
    if t <= settings.head_first:
        return _tooth(t / settings.head_first, settings.warmup, settings.floor) if part == "head" else 0.0
    return _tooth((t - settings.head_first) / (1 - settings.head_first), settings.warmup, settings.floor)


def schedule(optimiser: torch.optim.Optimizer, settings: TrainSettings, step: int) -> float:
    """Set every group's learning rate for a step; returns the unscaled rate of the head."""
    for group in optimiser.param_groups:
        group["lr"] = settings.lr * group["scale"] * factor(settings, step, group["part"])
    return settings.lr * factor(settings, step, "head")


def _frozen(settings: TrainSettings, step: int) -> list[str]:
    """The modules that are frozen at a step."""
    frozen = [prefix for prefix, until in settings.freeze.items() if step < until * settings.steps]
    if settings.schedule == "sawtooth" and (step + 1) / settings.steps <= settings.head_first:
        frozen.append("encoder")
    return frozen


def rest(assembly: Assembly, settings: TrainSettings, step: int) -> None:
    """Modules that are frozen at this step work as in a test: they gather no statistics and drop nothing."""
    if settings.freeze or settings.schedule == "sawtooth":
        frozen = _frozen(settings, step)
        assembly.train()
        for name, module in assembly.named_modules():
            if _under(name, frozen):
                module.eval()


def thaw(assembly: Assembly, settings: TrainSettings, step: int) -> None:
    """Drop the gradients of modules that are frozen at this step, so that the optimiser leaves them alone."""
    if frozen := _frozen(settings, step):
        for name, p in assembly.named_parameters():
            if _under(name, frozen):
                p.grad = None


def _under(name: str, modules: Sequence[str]) -> bool:
    """Whether a parameter belongs to one of the modules (or is one of these names)."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)
