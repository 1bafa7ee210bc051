"""Some of a view's channels, in a random order."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field

from meristem.modalities.base import View
from meristem.platform.derived.base import Derivation

if TYPE_CHECKING:
    from meristem.platform.step import Step

Count = Annotated[int, Field(ge=1)]


class Channels(Derivation):
    """Each row keeps a random number of its channels, from `least` to `most` (null: all), drawn and put in order at random.

    Rows with fewer are padded: their parameter `channel` is −1 there. As the mixed batches of ChAda-ViT (Bourriez et al. 2024)
    where every sample has channels of its own.
    """

    least: Count = 1
    most: Count | None = None

    def check(self, recipe: Any) -> list[str]:
        kinds = recipe.modality.tokenizer().kinds
        if not kinds:
            return ["it leaves channels out, and a token here holds all channels of a patch; set "
                    f"modality.{recipe.modality.name}.tokens: channel"]
        if not self.least <= (self.most or kinds) <= kinds:
            return [f"it keeps {self.least} to {self.most or kinds} of {kinds} channels"]
        return []

    def derive(self, view: View, name: str, step: Step) -> View:
        b, c = view.array.shape[:2]
        channel = view.params.get("channel", torch.arange(c, device=view.array.device).expand(b, c))
        rng, there = step.rng(f"channels {name}", self.of), channel >= 0
        order = rng.uniform("order", c).masked_fill(~there, 2).argsort(dim=1, stable=True)[:, :self.most]
        high = there.sum(1).clamp_max(order.shape[1])
        low = high.clamp_max(self.least)
        count = low + (rng.uniform("count").double() * (high - low + 1)).long()
        kept = torch.arange(order.shape[1], device=order.device) < count[:, None]
        rows = torch.arange(b, device=order.device)[:, None]
        array = view.array[rows, order] * kept.reshape(*kept.shape, *[1] * (view.array.ndim - 2))
        return replace(view, name=name, array=array,
                       params={**view.params, "channel": channel.gather(1, order).masked_fill(~kept, -1)})
