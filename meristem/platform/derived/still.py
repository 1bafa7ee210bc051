"""A single frame of a clip."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from meristem.modalities.base import View
from meristem.modalities.stream import LatticeStream
from meristem.platform.derived.base import Derivation, needs_time

if TYPE_CHECKING:
    from meristem.platform.step import Step


class Still(Derivation):
    """A frame of each clip, drawn at random and held for as long as one token, so that it is a picture to the same encoder.

    The parameter `time` says which of the clip's tokens along time shows that frame.
    """

    def check(self, recipe: Any) -> list[str]:
        return needs_time(recipe, "takes frames out of")

    def derive(self, view: View, name: str, step: Step) -> View:
        stream = step.stream(self.of)
        assert isinstance(stream, LatticeStream) and stream.lattice is not None
        thick, rows = stream.patch[0], torch.arange(len(view), device=view.array.device)
        frame = step.rng(f"still {name}", self.of).integers("frame", stream.lattice[0] * thick)

        def held(x: Tensor) -> Tensor:
            """x (B, ·, T, *S) at each row's own frame, over and over."""
            return x[rows, :, frame][:, :, None].expand(-1, -1, thick, *x.shape[3:])

        inner = torch.eye(view.frame.dims + 1, device=view.array.device).repeat(len(view), 1, 1)
        inner[:, 0, -1] = frame - (thick - 1) / 2
        return replace(view, name=name, array=held(view.array), weight=None if view.weight is None else held(view.weight),
                       fields={key: held(x[:, None])[:, 0] for key, x in view.fields.items()},
                       params={**view.params, "time": frame // thick},
                       frame=view.frame.compose(inner, (thick, *view.frame.shape[1:])))
