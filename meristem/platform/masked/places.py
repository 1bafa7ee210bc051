"""Where a token was taken from, asked of an encoder that was not told (DropPos)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from meristem.modalities.base import Axis, Tokenizer
from meristem.modalities.rng import Rng
from meristem.modalities.stream import LatticeStream, TokenStream
from meristem.platform.derived.base import needs_lattice
from meristem.platform.encoders.base import Encoder
from meristem.platform.encoders.transformer import Blocks, start_linear
from meristem.platform.masked.predictors import Decoder, Prediction, Predictor
from meristem.platform.masked.targets import TargetSettings
from meristem.platform.objectives import Encoded, Plan
from meristem.platform.schedules import Scalar

if TYPE_CHECKING:
    from meristem.platform.assembly import Assembly
    from meristem.platform.encoders.base import EncoderSettings
    from meristem.platform.masked.masking import Masking
    from meristem.platform.step import Step


class PlacelessPredictor(Predictor):
    """Encoded tokens through transformer blocks that know no position; each is read out; there are no mask tokens."""

    def __init__(self, settings: Placeless, encoder: Encoder, sizes: Mapping[str, int]) -> None:
        super().__init__()
        self.enter = nn.Linear(encoder.width, settings.width)
        self.blocks = Blocks(settings.width, settings.depth, settings.heads, axes=())
        self.heads = nn.ModuleDict({name: nn.Linear(settings.width, size) for name, size in sizes.items()})
        start_linear([self.enter, *self.heads.values()])

    def forward(self, encoded: Encoded, stream: TokenStream, plan: Plan) -> dict[str, Prediction]:
        valid = None if isinstance(stream, LatticeStream) else encoded.valid
        x, _, _ = self.blocks(self.enter(encoded.tokens), None, valid=valid)
        return {name: Prediction(head(x), encoded.index) for name, head in self.heads.items()}


class Placeless(Decoder):
    """A light transformer over the encoded tokens as a set (Wang et al. 2023, DropPos, section 3.2). depth, width, heads: of
    its blocks."""

    placeless = True
    depth: int = 2

    def check(self, name: str, encoder: EncoderSettings, masking: Masking) -> list[str]:
        return super(Decoder, self).check(name, encoder, masking)

    def build(self, encoder: Encoder, tokenizer: Tokenizer, axes: tuple[Axis, ...], channels: int, sizes: Mapping[str, int],
              everywhere: bool) -> Predictor:
        return PlacelessPredictor(self, encoder, sizes)


def soft_places(lattice: tuple[int, ...], sigma: float, device: torch.device | str = "cpu") -> Tensor:
    """(N, N): of each place of a lattice, how much every place counts as right: exp(−d²/σ²), d in tokens, rows of sum 1."""
    grid = torch.stack(torch.unravel_index(torch.arange(math.prod(lattice), device=device), lattice), -1).float()
    far = (grid[:, None] - grid[None]).square().sum(-1)
    return (-far / max(sigma, 1e-3) ** 2).softmax(-1)


class Place(TargetSettings):
    """The place of a token among all places of its lattice: softmax cross-entropy (Wang et al. 2023, DropPos, equation 4).

    smoothing: σ of their position smoothing, in tokens, which counts near places as partly right (equation 5): 0 for none.
    attention: the temperature of their attentive reconstruction, null for none: a token's loss is weighted by the softmax over
    all tokens of cos(class token, token) / temperature (equation 6), of the teacher's pass over the whole view, and weights of
    the tokens that the student sees sum to 1.
    """

    placeless: ClassVar[bool] = True
    smoothing: Scalar = 0.0
    attention: Annotated[float, Field(gt=0)] | None = None

    def fits(self, recipe: Any, view: str) -> list[str]:
        problems = needs_lattice(recipe, "numbers the places of tokens in")
        if self.attention is not None and (recipe.teacher is None or "encoder" not in recipe.teacher.of):
            problems.append("the place target weighs tokens by a teacher's class token, and there is none; add `teacher: {of: "
                            "[encoder]}`, or set attention: null")
        if self.attention is not None and "cls" not in recipe.encoder.provides:
            problems.append("the place target weighs tokens by a class token, and this encoder has none; set attention: null")
        return problems

    def size_in(self, assembly: Assembly, view: str) -> int:
        modality = assembly.recipe.modality
        shown = modality.example(tuple(assembly.recipe.looks[view].size), Rng.of(0, 0))  # type: ignore[attr-defined]
        return len(assembly.tokenizer.stream(shown))

    def prepare(self, step: Step, view: str) -> None:
        if self.attention is not None:
            step.encode(view, by="teacher")

    def compare(self, step: Step, view: str, index: Tensor | None, prediction: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        lattice = step.stream(view).lattice
        assert lattice is not None  # checked
        right = soft_places(lattice, step.value(self.smoothing), prediction.device)
        right = right.expand(len(prediction), -1, -1) if index is None else right[index]
        loss = -(right * F.log_softmax(prediction.float(), dim=-1)).sum(-1)
        if self.attention is not None:
            whole = step.encode(view, by="teacher")
            alike = F.cosine_similarity(whole.summary["cls"][:, None].float(), whole.tokens.float(), dim=-1)
            share = (alike / self.attention).softmax(1)
            share = share if index is None else share.gather(1, index)
            weight = weight * share / share.sum(1, keepdim=True)
        return (weight * loss).sum(), weight.sum()
