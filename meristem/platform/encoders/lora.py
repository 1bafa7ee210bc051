"""Low-rank adaptation: an encoder that stays as it is, with a few trained numbers beside each matrix (Hu et al. 2022, LoRA)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import parametrize

from meristem.errors import RecipeError
from meristem.modalities.base import Settings

MARK = ".parametrizations.weight."


class Lora(Settings):
    """rank: of what is added to each matrix. alpha: it is multiplied by alpha / rank."""

    rank: Annotated[int, Field(ge=1)] = 8
    alpha: Annotated[float, Field(gt=0)] = 16.0


class LowRank(nn.Module):
    """W + α/r · up · down (Hu et al. 2022, equation 3). down: (r, in), normal. up: (out, r), zero: at first W is as it was."""

    scale: Tensor

    def __init__(self, out: int, into: int, settings: Lora) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(settings.rank, into) * into**-0.5)
        self.up = nn.Parameter(torch.zeros(out, settings.rank))
        self.register_buffer("scale", torch.tensor(settings.alpha / settings.rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.scale * (self.up @ self.down)


def adapt(encoder: nn.Module, settings: Lora) -> None:
    """Freeze an encoder, and give every linear layer a trained low-rank part. Raises RecipeError where it has none."""
    linear = [module for module in encoder.modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise RecipeError("LoRA adapts linear layers, and this encoder has none", "Use a transformer, or another protocol.")
    encoder.requires_grad_(False)
    for module in linear:
        parametrize.register_parametrization(module, "weight", LowRank(module.out_features, module.in_features, settings))


def merged(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of an adapted module as those of a plain one."""
    found = {name: value for name, value in weights.items() if MARK not in name}
    for name, value in weights.items():
        base, mark, part = name.partition(MARK)
        if mark and part == "original":
            scale, up, down = (weights[f"{base}{MARK}0.{n}"] for n in ("scale", "up", "down"))
            found[f"{base}.weight"] = value + scale * (up @ down)
    return found
