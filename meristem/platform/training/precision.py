"""Low precision where the machine's own arithmetic is not to be trusted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _Sound:
    """A convolution that computes in single precision on maps thinner than its kernel.

    On a CPU with AVX-512, oneDNN (torch 2.11 to 2.15) makes the gradient of a kernel in bf16 of memory that nobody wrote where
    an axis of the map has fewer elements than the kernel: now and then NaN, else wrong.
    """

    kernel_size: tuple[int, ...]

    def _conv_forward(self, x: Tensor, *parameters: Any) -> Tensor:
        plain: Any = super()._conv_forward  # type: ignore[misc]
        if all(size >= kernel for size, kernel in zip(x.shape[2:], self.kernel_size, strict=True)):
            return plain(x, *parameters)
        with torch.autocast("cpu", enabled=False):
            return plain(x.float(), *parameters)


class Conv2d(_Sound, nn.Conv2d):
    pass


class Conv3d(_Sound, nn.Conv3d):
    pass


SOUND: dict[type[nn.Module], type[nn.Module]] = {nn.Conv2d: Conv2d, nn.Conv3d: Conv3d}


def sound(model: nn.Module) -> None:
    """Have every convolution of a model learn rightly in bf16 on a CPU; weights and names stay."""
    for module in model.modules():
        if type(module) in SOUND:
            module.__class__ = SOUND[type(module)]
