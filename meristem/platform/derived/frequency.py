"""Parts of the spectrum of an array."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from meristem.modalities.base import View
from meristem.platform.derived.base import Derivation, needs_lattice

if TYPE_CHECKING:
    from meristem.platform.step import Step


def radius(shape: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    """(*shape) distance of each bin of torch.fft.fftn from the constant one, in cycles per view."""
    axes = [torch.fft.fftfreq(n, 1 / n, device=device) for n in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij")).square().sum(0).sqrt()


class Frequency(Derivation):
    """Only the low or only the high frequencies (MFM, Xie et al. 2023, section 3.2).

    radius: cycles per view on either side of which they are told apart (16 at 224 pixels), as their code a circle around the
    constant. low: share of the rows whose low ones are kept, drawn for each row (0.5 for their transformer, 0.3 for their
    ResNet). The parameter `kept` is 0 where the low ones were kept and 1 where the high ones were.
    """

    radius: Annotated[float, Field(gt=0)] = 16.0
    low: Annotated[float, Field(ge=0, le=1)] = 0.5

    def check(self, recipe: Any) -> list[str]:
        return needs_lattice(recipe, "filters the frequencies of")

    def derive(self, view: View, name: str, step: Step) -> View:
        high = (step.rng("frequency", self.of).uniform("kept") >= self.low).long()
        made, axes = replace(view, name=name, params={**view.params, "kept": high}), tuple(range(2, view.array.ndim))
        spectrum = torch.fft.fftn(view.array.float(), dim=axes) * self.kept(made)[:, None]
        return replace(made, array=torch.fft.ifftn(spectrum, dim=axes).real.to(view.array))

    def kept(self, view: View) -> Tensor:
        """(B, *S) bool: the bins of torch.fft.fftn that a view derived here has of the one it was made of."""
        shape = tuple(view.array.shape[2:])
        return (radius(shape, view.array.device) < self.radius) ^ (view.params["kept"] > 0).reshape(-1, *[1] * len(shape))
