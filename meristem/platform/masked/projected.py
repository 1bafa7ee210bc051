"""A target that a foreign model sees in pictures of a cloud (I2P-MAE, Zhang et al. 2023)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn import functional as F

from meristem.platform.foreign import named
from meristem.platform.masked.targets import TargetSettings, token_points

if TYPE_CHECKING:
    from meristem.platform.assembly import Assembly
    from meristem.platform.step import Step


class Projected(TargetSettings):
    """What a foreign model makes of the pixels that show a token's points, in each of the three pictures; mean squared error.

    by: the model. Of a token 3 · D numbers, the mean over its points (theirs tell those of each point: Zhang et al. 2023,
    section 3.3).
    """

    by: str

    def check(self, recipe: Any) -> list[str]:
        return named(recipe, self.by)

    def size_in(self, assembly: Assembly, view: str) -> int:
        return 3 * assembly.foreign[self.by].width

    def prepare(self, step: Step, view: str) -> None:
        step.sight(self.by, view)

    def compare(self, step: Step, view: str, index: Tensor | None, prediction: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        stream = step.stream(view) if index is None else step.stream(view).take(index)
        assert stream.position is not None
        points, live = token_points(stream, step.assembly.tokenizer.channels)
        xyz = points + stream.position[:, :, None]
        seen = step.sight(self.by, view).features_at(xyz.flatten(1, 2)).flatten(2).unflatten(1, xyz.shape[1:3])
        share = live / live.sum(-1, keepdim=True).clamp_min(1)
        error = F.mse_loss(prediction.float(), (seen * share[..., None]).sum(2), reduction="none")
        weight = weight * live.any(-1)
        return (weight[..., None] * error).sum(), weight.sum() * error.shape[-1]
