"""Maskings that follow a score of each token: how much somebody attends to it, how much it moves, or noise of a colour."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from meristem.errors import RecipeError
from meristem.modalities.base import Settings
from meristem.modalities.rng import Rng
from meristem.modalities.stream import TokenStream
from meristem.platform import foreign
from meristem.platform.derived.base import needs_lattice
from meristem.platform.masked.masking import (
    Fraction,
    Shares,
    feasible,
    first,
    in_cells,
    informative,
    rounded,
    to_cells,
    to_tokens,
)
from meristem.platform.masked.targets import element_weight
from meristem.platform.objectives import Plan
from meristem.platform.slots import Slot

if TYPE_CHECKING:
    from meristem.platform.step import Step

Positive = Annotated[float, Field(gt=0)]


class Guide(Settings):
    """The typed entry of a guide."""

    def check(self, recipe: Any) -> list[str]:
        """What is impossible about it in this recipe; empty when all is well."""
        return []

    def score(self, step: Step, view: str) -> Tensor:
        """(B, N) of each token of a view. It may make passes, but none of the masked view."""
        raise NotImplementedError


class Attention(Guide):
    """How much the teacher's class token attends to each token in the last block, mean over its heads, nothing hidden (AttMask,
    Kakogeorgiou et al. 2022, section 3.2). Its pass serves the losses that compare with the same teacher."""

    def check(self, recipe: Any) -> list[str]:
        problems = [f"it follows attention, and this encoder gives no {need}; choose encoder: transformer with cls: true, or "
                    "masking: random" for need in ("attention", "cls") if need not in recipe.encoder.provides][:1]
        if recipe.teacher is None or "encoder" not in recipe.teacher.of:
            problems.append("it follows the attention of a teacher, and there is none; add `teacher: {of: [encoder]}`")
        return problems

    def score(self, step: Step, view: str) -> Tensor:
        attention = step.encode(view, by="teacher", want=frozenset({"attention"})).attention
        assert attention is not None
        return attention[:, :, 0, 1:].mean(1)


class Noise(Guide):
    """White noise W through a filter, the same for whatever it masks (ColorMAE, Hinojosa et al. 2024, section 3).

    colour: `red` G_wide∗W (blobs), `blue` W − G_narrow∗W (apart from each other), `green` (G_narrow − G_wide)∗W (blobs of one
    size), `purple` W − green. G: Gaussians of the deviations narrow and wide, in tokens. The noise is wider than the lattice by
    six deviations per axis, so that its ends know nothing of each other.
    """

    colour: Literal["red", "blue", "green", "purple"] = "green"
    narrow: Positive = 0.5
    wide: Positive = 1.5

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.narrow >= self.wide:
            raise ValueError(f"narrow {self.narrow:g} must be less than wide {self.wide:g}")
        return self

    def check(self, recipe: Any) -> list[str]:
        return needs_lattice(recipe, "follows noise on the lattices of")

    def gain(self, shape: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
        """(*shape) of the filter, at each bin of torch.fft.fftn."""
        axes = torch.meshgrid(*(torch.fft.fftfreq(n, device=device) for n in shape), indexing="ij")
        square = torch.stack(axes).square().sum(0)
        narrow, wide = (torch.exp(-2 * (math.pi * s) ** 2 * square) for s in (self.narrow, self.wide))
        return {"red": wide, "blue": 1 - narrow, "green": narrow - wide, "purple": 1 - (narrow - wide)}[self.colour]

    def score(self, step: Step, view: str) -> Tensor:
        lattice = step.stream(view).lattice
        assert lattice is not None  # checked
        return self.noise(lattice, step.rng("guide", view)).flatten(1)

    def noise(self, lattice: tuple[int, ...], rng: Rng) -> Tensor:
        """(B, *lattice)."""
        shape = tuple(n + math.ceil(6 * self.wide) for n in lattice)
        axes = tuple(range(1, len(shape) + 1))
        white = torch.fft.fftn(rng.normal("noise", *shape), dim=axes)
        made = torch.fft.ifftn(white * self.gain(shape, rng.key.device), dim=axes).real
        for axis, n in enumerate(lattice, 1):
            made = made.narrow(axis, 0, n)
        return made


def drawn(odds: Tensor, rng: Rng) -> Tensor:
    """Logarithms of odds (B, N) with Gumbel noise: the order of such sums is that of draws without replacement."""
    return odds - (-rng.uniform("drawn", odds.shape[1]).clamp_min(2.0**-25).log()).log()


class Saliency(Guide):
    """How much a foreign model attends to the pixels that show a token's position, the mean over its pictures (I2P-MAE, Zhang
    et al. 2023, section 3.2, with hide: lowest).

    by: the model. temperature: tokens then score highest as if drawn one after another, without replacement, with odds
    exp(saliency / temperature); saliency is 1 where all get the same attention (in their code it sums to 1 over the 196 tokens
    of a picture and the temperature is 1, here 196: the draw is all but uniform).
    """

    by: str
    temperature: Positive = 1.0

    def check(self, recipe: Any) -> list[str]:
        return foreign.named(recipe, self.by)

    def score(self, step: Step, view: str) -> Tensor:
        position = step.stream(view).position
        assert position is not None  # clouds have one
        return self.drawn(step.sight(self.by, view).saliency_at(position), step.rng("guide", view))

    def drawn(self, saliency: Tensor, rng: Rng) -> Tensor:
        return drawn(saliency / self.temperature, rng)


def motion(stream: TokenStream) -> Tensor:
    """(B, N) how much each token differs from the one before it in time, which is the first axis of its lattice.

    The mean of the absolute differences of their elements, of those that both have; the first has what the second has.
    """
    lattice = stream.lattice
    if lattice is None or lattice[0] < 2:
        raise RecipeError("motion is told from tokens of one place at several moments, and there are none",
                          "Choose a longer view or shorter tokens, or masking: random.")
    x, weight = (y.unflatten(1, lattice) for y in (stream.content.float(), element_weight(stream)))
    both = (weight[:, 1:] > 0) & (weight[:, :-1] > 0)
    change = ((x[:, 1:] - x[:, :-1]).abs() * both).sum(-1) / both.sum(-1).clamp_min(1)
    return torch.cat([change[:, :1], change], 1).flatten(1)


class Motion(Guide):
    """How much a token moves, and chance (MAMP, Mao et al. 2023, section 3.3).

    Tokens score highest as if drawn one after another, without replacement, with odds exp(motion / (temperature · greatest
    motion of the row)).
    """

    temperature: Annotated[float, Field(gt=0)] = 0.8

    def check(self, recipe: Any) -> list[str]:
        axes = recipe.modality.axes
        timed = bool(axes) and axes[0].unit == "s"
        return [] if timed else [f"it follows motion, and {recipe.modality.name} data has no axis of time; use masking: random"]

    def score(self, step: Step, view: str) -> Tensor:
        return self.drawn(step.stream(view), step.rng("guide", view))

    def drawn(self, stream: TokenStream, rng: Rng) -> Tensor:
        moves = motion(stream)
        greatest = moves.masked_fill(~informative(stream), 0).amax(1, keepdim=True)
        return drawn(moves / (greatest * self.temperature + 1e-10), rng)


GUIDES: dict[str, type[Guide]] = {"attention": Attention, "noise": Noise, "saliency": Saliency,
                                 "motion": Motion}


class Guided(Shares):
    """The cells of the highest score.

    guide: what gives the score; a cell's is the mean of its tokens'. hide: the highest or the lowest. hints: of the cells that
    score highest, this share, some are shown again, drawn at random: as large a part of them as the row hides of all (AttMask,
    its Hints). The ratio holds among informative tokens and among the rest separately, as in `Random`.
    """

    guide: Annotated[Guide, Slot("guide", GUIDES)]
    hide: Literal["highest", "lowest"] = "highest"
    hints: Fraction | None = None

    @model_validator(mode="after")
    def _shows(self) -> Self:
        if self.hints is not None and self.corruption == "drop":
            raise ValueError("hints: rows then hide different numbers of tokens, which cannot be dropped; set corruption: "
                             "replace")
        return self

    def check(self, recipe: Any) -> list[str]:
        return [*super().check(recipe), *self.guide.check(recipe)]

    def decide(self, step: Step, view: str) -> Plan:
        return self.follow(self.guide.score(step, view), step.stream(view), step.rng("mask", view),
                           step.assembly.encoder.mask_unit)

    def follow(self, score: Tensor, stream: TokenStream, rng: Rng, unit: tuple[int, ...]) -> Plan:
        """score: (B, N)."""
        if score.shape != stream.valid.shape:
            raise RecipeError(f"the guide scores {score.shape[1]} tokens, and the view has {len(stream)}",
                              "Choose an encoder whose tokens are those of the view, or masking: random.")
        grain, cells = in_cells(stream, self.unit, unit)
        live = informative(stream)
        live_cell, scored = to_cells(live, cells, grain).any(-1), to_cells(score.float(), cells, grain).mean(-1)
        m = scored.shape[1]
        most = rounded(m, self._top)
        feasible(most, m, self._top)
        order = (scored if self.hide == "lowest" else -scored).masked_fill(~live_cell, torch.inf).argsort(dim=1, stable=True)
        share = self._shares(rng)[:, None]
        hide, hide_live = ((count * share + 0.5).floor().long() for count in (m, live_cell.sum(1, keepdim=True)))
        chosen = first(order, live_cell, hide, hide_live)
        if self.hints is not None:
            top = rounded(m, self.hints)
            drawn = rng.uniform("hints", top).argsort(dim=1, stable=True).argsort(dim=1) < (top * share + 0.5).floor()
            chosen = chosen.scatter(1, order[:, :top], chosen.gather(1, order[:, :top]) & ~drawn)
        return self._finish(stream, rng, to_tokens(chosen, cells, grain), live, (m - most) * math.prod(grain))
