"""Intensity operations on a batch, each pure in a sample's own parameters."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

NEUTRAL = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0, "grayscale": 0.0, "gamma": 1.0, "blur": 0.0,
           "solarise": math.inf, "noise": 0.0}
"""Operation -> the value that changes nothing; the order of application. New ones go last: draws are by place."""

LUMA = (0.2989, 0.587, 0.114)  # ITU-R BT.601, as torchvision


def _like(value: Tensor, x: Tensor) -> Tensor:
    return value.reshape(-1, *[1] * (x.ndim - 1))


def _grey(x: Tensor) -> Tensor:
    """(B, 3, *S) to (B, 1, *S)."""
    return torch.einsum("bc...,c->b...", x, x.new_tensor(LUMA))[:, None]


def brightness(x: Tensor, factor: Tensor) -> Tensor:
    return (x * _like(factor, x)).clamp(0, 1)


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the mean: of the grey image for three channels, else of each channel."""
    mean = (_grey(x) if x.shape[1] == 3 else x).mean(tuple(range(2, x.ndim)), keepdim=True)
    return torch.lerp(mean.expand_as(x), x, _like(factor, x)).clamp(0, 1)


def saturation(x: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(_grey(x).expand_as(x), x, _like(factor, x)).clamp(0, 1) if x.shape[1] == 3 else x


def hue(x: Tensor, turn: Tensor) -> Tensor:
    """Rotate the hue of HSV by `turn` of the circle; value and saturation stay (Smith 1978)."""
    if x.shape[1] != 3:
        return x
    red, green, blue = x.unbind(1)
    top, arg = x.max(1)
    chroma = top - x.amin(1)
    safe = torch.where(chroma > 0, chroma, torch.ones_like(chroma))
    sector = torch.stack([(green - blue) / safe, (blue - red) / safe + 2, (red - green) / safe + 4], 1)
    h = sector.gather(1, arg[:, None])[:, 0] + 6 * _like(turn, top)
    channels = []
    for n in (5, 3, 1):
        k = torch.remainder(n + h, 6)
        channels.append(top - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, 1)


def grayscale(x: Tensor, on: Tensor) -> Tensor:
    return _grey(x).expand_as(x) if x.shape[1] == 3 else x


def gamma(x: Tensor, exponent: Tensor) -> Tensor:
    return x.clamp_min(0) ** _like(exponent, x)


def blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian along every axis, its weights renormalised at the borders; a matrix product per axis."""
    for axis in range(2, x.ndim):
        i = torch.arange(x.shape[axis], device=x.device, dtype=x.dtype)
        kernel = torch.exp(-0.5 * ((i[:, None] - i) / sigma[:, None, None]) ** 2)
        kernel = kernel / kernel.sum(-1, keepdim=True)
        moved = x.movedim(axis, 1)
        x = torch.bmm(kernel, moved.flatten(2)).reshape(moved.shape).movedim(1, axis)
    return x.contiguous()


def solarise(x: Tensor, threshold: Tensor) -> Tensor:
    return torch.where(x >= _like(threshold, x), 1 - x, x)


SPANNED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "brightness": brightness, "contrast": contrast, "saturation": saturation, "hue": hue, "grayscale": grayscale,
    "gamma": gamma, "blur": blur, "solarise": solarise}
"""Operations on values of which 0 is black and 1 is white: x (B, C, *S), parameter (B,) -> (B, C, *S)."""
