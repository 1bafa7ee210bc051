"""Tokens predicted one after another, each from those before it, in an order of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from meristem.errors import RecipeError
from meristem.modalities.base import Axis, Tokenizer
from meristem.modalities.rng import Rng
from meristem.modalities.stream import TokenStream, gather
from meristem.platform.encoders.base import Encoder, EncoderSettings
from meristem.platform.encoders.cross import CrossAttention
from meristem.platform.encoders.rotary import Rotary
from meristem.platform.encoders.transformer import start_linear
from meristem.platform.masked.masking import Masking, informative
from meristem.platform.masked.predictors import Prediction, Predictor, PredictorSettings
from meristem.platform.objectives import Encoded, Plan

if TYPE_CHECKING:
    from meristem.platform.step import Step


class Order(Masking):
    """No token is hidden, but each is kept from those that come after it, and all are predicted.

    by: `semantic`: nearest first to the token that is most like the class token, as the teacher sees the whole view (Song et
    al. 2024, SemAIM, section 3.2); or `random`, an order drawn for each row.
    """

    orders: ClassVar[bool] = True
    by: Literal["semantic", "random"] = "semantic"
    corruption: Literal["replace"] = "replace"

    def check(self, recipe: Any) -> list[str]:
        problems = [] if "order" in recipe.encoder.takes else ["it keeps tokens from seeing later ones, which this encoder "
                                                               "cannot take; choose a transformer"]
        if self.by == "semantic":
            if recipe.teacher is None or "encoder" not in recipe.teacher.of:
                problems.append("a semantic order follows a teacher, and there is none; add `teacher: {of: [encoder]}`")
            if "cls" not in recipe.encoder.provides or "position" not in recipe.encoder.sees:
                problems.append("a semantic order goes by a class token and positions; set encoder.….cls: true and sees: "
                                "[position], or by: random")
        return problems

    def decide(self, step: Step, view: str) -> Plan:
        stream, rng = step.stream(view), step.rng("mask", view)
        if self.by == "random":
            return self.plan(stream, rng, step.assembly.encoder.mask_unit)
        whole, live = step.encode(view, by="teacher"), informative(stream)
        alike = F.cosine_similarity(whole.summary["cls"][:, None].float(), whole.tokens.float(), dim=-1)
        return self._plan(stream, nearest_first(stream, alike.masked_fill(~live, -torch.inf).argmax(1), rng))

    def plan(self, stream: TokenStream, rng: Rng, unit: tuple[int, ...]) -> Plan:
        return self._plan(stream, rng.uniform("order", len(stream)))

    @staticmethod
    def _plan(stream: TokenStream, late: Tensor) -> Plan:
        order = late.masked_fill(~stream.valid, torch.inf).argsort(dim=1, stable=True).argsort(dim=1)
        return Plan(hidden=torch.zeros_like(stream.valid), predict=informative(stream).float(), order=order)


def nearest_first(stream: TokenStream, centre: Tensor, rng: Rng) -> Tensor:
    """(B, N): how late each token comes: its distance from the token `centre` (B,); equal ones in an order drawn."""
    assert stream.position is not None  # checked
    far = (stream.position - gather(stream.position, centre[:, None])).float().square().sum(-1).sqrt()
    return far + 1e-3 * far.amax(1, keepdim=True) * rng.uniform("ties", far.shape[1])


class QueryBlock(nn.Module):
    """Cross-attention, then a perceptron, each after a norm; queries and content share one, as the authors' code of SemAIM."""

    def __init__(self, width: int, heads: int) -> None:
        from timm.layers import Mlp  # see Blocks

        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.cross, self.mlp = CrossAttention(width, heads), Mlp(width, 4 * width)

    def forward(self, x: Tensor, content: Tensor, rope: Tensor, content_rope: Tensor, mask: Tensor) -> Tensor:
        x = x + self.cross(self.norm1(x), self.norm1(content), rope, content_rope, mask)
        made: Tensor = x + self.mlp(self.norm2(x))
        return made


class AutoregressivePredictor(Predictor):
    """The query stream of two (Yang et al. 2019, XLNet, section 2.3).

    A query for each token knows the token's place, and in each block looks at what the encoder's own block made of the tokens
    before it, and at a learned vector before all.
    """

    def __init__(self, settings: Autoregressive, encoder: Encoder, axes: tuple[Axis, ...], sizes: Mapping[str, int]) -> None:
        super().__init__()
        width, heads, depth = encoder.width, settings.heads, settings.depth or encoder.depth
        if encoder.depth % depth or width % heads or width // heads % 2:
            raise RecipeError(f"{depth} blocks of {heads} heads cannot stand beside an encoder of {encoder.depth} "
                              f"blocks and width {width}",
                              "Choose a depth that divides the encoder's, and heads of an even width.")
        self.every = encoder.depth // depth
        self.rotary = Rotary(width // heads, axes)
        self.query, self.first = (nn.Parameter(torch.randn(1, 1, width) * 0.02) for _ in range(2))
        self.blocks = nn.ModuleList(QueryBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.heads = nn.ModuleDict({name: nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, size))
                                    for name, size in sizes.items()})
        start_linear(self.modules())

    def forward(self, encoded: Encoded, stream: TokenStream, plan: Plan) -> dict[str, Prediction]:
        assert encoded.layers is not None and plan.order is not None and stream.position is not None
        before = (plan.order[:, None] < plan.order[:, :, None]) & stream.valid[:, None]
        before = F.pad(before, (1, 0), value=True)[:, None]
        rope = self.rotary(stream.position.masked_fill(~stream.valid[..., None], 0), prefix=1)
        x = self.query.to(encoded.tokens).expand(*plan.order.shape, -1)
        first = self.first.to(encoded.tokens).expand(len(x), -1, -1)
        for block, content in zip(self.blocks, encoded.layers[self.every - 1::self.every], strict=True):
            content = torch.cat([first, content.masked_fill(~stream.valid[..., None], 0)], 1)
            x = block(x, content, rope[:, :, 1:], rope, before)
        x = self.norm(x)
        return {name: Prediction(head(x)) for name, head in self.heads.items()}


class Autoregressive(PredictorSettings):
    """Predicts each token from those before it in the masking's order (Song et al. 2024, SemAIM, section 3.3).

    depth, heads: of its blocks, which are as wide as the encoder's and stand beside every n-th of them; null: beside each. It
    reads out by perceptrons of two layers.
    """

    corruption = "replace"
    want = frozenset({"layers"})
    orders = True
    depth: Annotated[int, Field(ge=1)] | None = None
    heads: Annotated[int, Field(ge=1)] = 3

    def check(self, name: str, encoder: EncoderSettings, masking: Masking) -> list[str]:
        told = [] if "position" in encoder.sees else [f"the {name} predictor cannot tell places apart without positions; add "
                                                      "position to encoder.….sees"]
        return super().check(name, encoder, masking) + told

    def build(self, encoder: Encoder, tokenizer: Tokenizer, axes: tuple[Axis, ...], channels: int, sizes: Mapping[str, int],
              everywhere: bool) -> Predictor:
        return AutoregressivePredictor(self, encoder, axes, sizes)
