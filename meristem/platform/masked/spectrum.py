"""Frequencies as a target: what a filter took out of a view, predicted as an array and compared as a spectrum."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from meristem.modalities.base import Tokenizer
from meristem.platform.derived.frequency import Frequency
from meristem.platform.encoders.base import Encoder
from meristem.platform.masked.targets import TargetSettings

if TYPE_CHECKING:
    from meristem.platform.step import Step


class Spectrum(TargetSettings):
    """The frequencies that the derived view `missing_in` lacks of the one it was made of (MFM, Xie et al. 2023, equation 4).

    |F(prediction) − F(target)| of each bin and channel, F orthonormal over all axes of an array, as in their code with
    loss_gamma 1 and no weighting of bins (focal frequency loss, Jiang et al. 2021); summed over the missing bins. Bins are no
    places: tokens have no weight here, and all are predicted.
    """

    whole = True
    missing_in: str
    eps: float = 1e-12

    def check(self, recipe: Any) -> list[str]:
        if not isinstance(recipe.derived.get(self.missing_in), Frequency):
            return [f"the spectrum target asks what '{self.missing_in}' lacks, which is no view derived by `frequency`"]
        patch, size = recipe.modality.tokenizer().patch, recipe.looks[self.missing_in].size
        if any(n % p for n, p in zip(size, patch, strict=True)):
            return [f"the spectrum target is of whole views, and patches of {list(patch)} leave a rest of {list(size)}; choose "
                    "a size that they divide"]
        return []

    def size(self, tokenizer: Tokenizer, encoder: Encoder) -> int:
        return tokenizer.token_size

    def compare(self, step: Step, view: str, index: Tensor | None, prediction: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        filtering, lattice = step.assembly.recipe.derived[self.missing_in], step.stream(self.missing_in).lattice
        assert isinstance(filtering, Frequency) and lattice is not None  # checked
        error = step.assembly.tokenizer.fold(prediction.float(), lattice) - step.view(filtering.of).array.float()
        spectrum = torch.fft.fftn(error, dim=tuple(range(2, error.ndim)), norm="ortho")  # of a difference: F is linear
        missing = ~filtering.kept(step.view(self.missing_in))[:, None]
        distance = (spectrum.real.square() + spectrum.imag.square() + self.eps).sqrt()
        return (distance * missing).sum(), missing.sum() * error.shape[1]
