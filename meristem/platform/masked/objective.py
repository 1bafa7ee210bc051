"""The masked engine's objective: masking × predictor × readouts."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from meristem.errors import RecipeError
from meristem.modalities.base import Settings
from meristem.modalities.stream import TokenStream
from meristem.platform.masked.cross import Context
from meristem.platform.masked.masking import informative
from meristem.platform.masked.parts import PREDICTORS, TARGETS
from meristem.platform.masked.predictors import Prediction, PredictorSettings, blind
from meristem.platform.masked.targets import Content, TargetSettings
from meristem.platform.objectives import Loss, Objective, ObjectiveSettings, Plan
from meristem.platform.slots import Slot

if TYPE_CHECKING:
    from meristem.platform.assembly import Assembly
    from meristem.platform.step import Step


class Readout(Settings):
    """One line of a masked objective: predicted by its own head, compared with a target, in a region, with a weight.

    output: the predictor's output of this name in place of a head of its own. encode: the view that is encoded for it, by the
    same encoder and predictor; null: the objective's. of: the view that the target is made of, whose tokens lie as those of the
    encoded one do; null: the encoded one itself.
    """

    target: Annotated[TargetSettings, Slot("target", TARGETS)]
    output: str | None = None
    encode: str | None = None
    of: str | None = None
    region: Literal["hidden", "visible", "all", "unlocated"] = "hidden"
    weight: float = 1.0


class Masked(ObjectiveSettings):
    """Predict what was hidden in the view `encode`, which must have an entry under `masking`.

    context: another view of as many looks, encoded whole, that the predictor may look at (`cross`): the i-th looks of a sample
    are pairs. readouts: by a name of the user's, which is also the name of the loss. `target: …` alone is short for one readout
    of the hidden region.
    """

    encode: str
    context: str | None = None
    predictor: Annotated[PredictorSettings, Slot("predictor", PREDICTORS)]
    readouts: Annotated[dict[str, Readout], Field(min_length=1)]

    @model_validator(mode="before")
    @classmethod
    def _short(cls, data: Any) -> Any:
        if not isinstance(data, dict) or "target" not in data:
            return data
        if "readouts" in data:
            raise ValueError("give `target` (one readout) or `readouts`, not both")
        return {k: v for k, v in data.items() if k != "target"} | {"readouts": {"content": {"target": data["target"]}}}

    @property
    def encodes(self) -> list[str]:
        """The views that are encoded, in the order of their first readouts."""
        return list(dict.fromkeys(readout.encode or self.encode for readout in self.readouts.values()))

    def check(self, recipe: Any) -> list[str]:
        name = next(n for n, part in PREDICTORS.items() if part is type(self.predictor))
        problems = []
        for view in dict.fromkeys([self.encode, *self.encodes]):
            if view not in recipe.looks:
                return [f"encode names '{view}': there is no such view (views: {', '.join(recipe.looks)})"]
            if view not in recipe.masking:
                return [f"view '{view}' has no masking, so that nothing is hidden; add masking.{view}"]
            if recipe.modality.tokenizer().kinds:
                return ["tokens of channels lie several at one place, and a predictor is told places alone; set "
                        f"modality.{recipe.modality.name}.tokens: patch"]
            if recipe.masking[view].hides != "tokens":
                return [f"masking.{view} hides {recipe.masking[view].hides} and no token's content; use `random`"]
            problems += self.predictor.check(name, recipe.encoder, recipe.masking[view])
        problems += self._check_context(name, recipe)
        for line, readout in self.readouts.items():
            view = readout.encode or self.encode
            of, masking = readout.of or view, recipe.masking[view]
            problems += readout.target.fits(recipe, of)
            if readout.output is not None and readout.output not in self.predictor.outputs:
                problems.append(f"readout '{line}' is of output '{readout.output}', which the {name} predictor does not have "
                                f"(outputs: {', '.join(sorted(self.predictor.outputs)) or 'none'})")
            if readout.region != "hidden" and not self.predictor.everywhere:
                problems.append(f"readout '{line}' is of the {readout.region} region, and the {name} predictor fills in "
                                "what is hidden alone; set its region to hidden")
            if of not in recipe.looks:
                problems.append(f"readout '{line}' is of '{of}': there is no such view (views: {', '.join(recipe.looks)})")
            elif any(getattr(recipe.looks[of], x) != getattr(recipe.looks[view], x) for x in ("size", "count")):
                problems.append(f"readout '{line}' is of '{of}', whose tokens are not those of '{view}'; choose a view "
                                "of its size and count")
            if readout.target.whole and readout.region != "all":
                problems.append(f"readout '{line}' compares whole views; set its region to all")
            if readout.region == "unlocated" and not masking.unlocated:
                problems.append(f"readout '{line}' is of the tokens whose place is dropped, and none is; set masking."
                                f"{view}.….unlocated")
            if readout.target.placeless and not (self.predictor.placeless and readout.region == "unlocated"):
                problems.append(f"readout '{line}' asks where tokens lie, which may be asked only where it is not told; set "
                                "its region: unlocated, and predictor: placeless")
            if masking.decode is not None and readout.region != "hidden":
                problems.append(f"readout '{line}' is of the {readout.region} region, but only some places are decoded; set "
                                f"its region to hidden, or masking.{view}.….decode to null")
        return problems

    def _check_context(self, name: str, recipe: Any) -> list[str]:
        if self.context is None:
            return [f"the {name} predictor looks at another view; name it as context"] if self.predictor.context else []
        if not self.predictor.context:
            return [f"the {name} predictor looks at no other view; leave context out, or choose predictor: cross"]
        if self.context == self.encode:
            return ["context is the view whose tokens are hidden; name another one"]
        if self.context not in recipe.looks:
            return [f"context names '{self.context}': there is no such view (views: {', '.join(recipe.looks)})"]
        mine, other = (recipe.looks[view].count for view in (self.encode, self.context))
        return [] if mine == other else [f"'{self.encode}' has {mine} looks, its context '{self.context}' {other}; pairs take "
                                         "as many of either"]

    def build(self, assembly: Assembly) -> Objective:
        return MaskedObjective(self, assembly)


class MaskedObjective(Objective):
    """Encodes each masked view once, predicts, and compares with every readout's target.

    The predictor is given the places of the tokens and nothing of their content; of the context, what the encoder made of it.
    """

    def __init__(self, settings: Masked, assembly: Assembly) -> None:
        super().__init__()
        recipe = assembly.recipe
        self.settings, self.sees = settings, recipe.encoder.sees
        sizes = {name: readout.target.size_in(assembly, readout.of or readout.encode or settings.encode)
                 for name, readout in settings.readouts.items()}
        for name in [name for name, readout in settings.readouts.items() if readout.output is not None]:
            if (size := sizes.pop(name)) != assembly.encoder.width:
                raise RecipeError(f"readout '{name}' compares {size} numbers per token with an output of "
                                  f"{assembly.encoder.width}", "Leave its output out, or choose target: features.")
        everywhere = any(readout.region != "hidden" for readout in settings.readouts.values())
        self.predictor = settings.predictor.build(assembly.encoder, assembly.tokenizer, recipe.modality.axes,
                                                  recipe.modality.channels, sizes, everywhere)

    def forward(self, step: Step) -> dict[str, Loss]:
        for readout in self.settings.readouts.values():
            readout.target.prepare(step, readout.of or readout.encode or self.settings.encode)
        predictions = {view: self._predict(step, step.plan(view), view) for view in self.settings.encodes}
        losses = {}
        for name, readout in self.settings.readouts.items():
            view = readout.encode or self.settings.encode
            prediction = predictions[view][readout.output or name]
            weight = _region(readout.region, step.stream(view), step.plan(view))
            if prediction.index is not None:
                weight = weight.gather(1, prediction.index)
            total, count = readout.target.compare(step, readout.of or view, prediction.index, prediction.value, weight)
            # a batch may have no masked row when rows are masked with a probability: no loss then, not 0/0
            losses["" if len(self.settings.readouts) == 1 else name] = Loss(
                total, count.clamp_min(1e-12), self.settings.weight * readout.weight)
        return losses

    def _predict(self, step: Step, plan: Plan, view: str) -> dict[str, Prediction]:
        encoded = step.encode(view, masked=True, want=self.settings.predictor.want)
        other = self.settings.context
        context = () if other is None else (Context(step.encode(other), blind(step.stream(other).seen(self.sees))),)
        predictions: dict[str, Prediction] = self.predictor(encoded, blind(step.stream(view).seen(self.sees)), plan, *context)
        return predictions

    @torch.no_grad()
    def reconstruct(self, step: Step) -> dict[str, Tensor]:
        """Pictures of what the first readout of content makes of the view, as arrays (B, C, *S) of whole tokens.

        original; masked: hidden tokens are NaN; prediction: hidden tokens as predicted (a normalised one is given the true
        token's mean and deviation back; every one, also those that training does not decode), visible ones as they are. Empty
        when no readout predicts content.
        """
        view = self.settings.encode
        stream, plan = step.stream(view), replace(step.plan(view), decode=None)
        if stream.lattice is None or not any(isinstance(r.target, Content) for r in self.settings.readouts.values()):
            return {}
        predictions = self._predict(step, plan, view)
        for name, readout in self.settings.readouts.items():
            target, prediction = readout.target, predictions[readout.output or name]
            if isinstance(target, Content) and readout.encode in (None, view):
                stream = stream if readout.of is None else step.stream(readout.of)
                mean, std = target.statistics(stream, step.assembly.recipe.modality.channels)
                hidden, content = plan.hidden[..., None], stream.content
                value = prediction.value.to(content)
                if prediction.index is not None:
                    value = content.scatter(1, prediction.index[..., None].expand_as(value), value)
                value = torch.where(hidden, value * std + mean, content)
                pictures = {"original": content, "masked": content.masked_fill(hidden, torch.nan), "prediction": value}
                return {key: step.assembly.tokenizer.fold(x, stream.lattice) for key, x in pictures.items()}
        return {}


def _region(region: str, stream: TokenStream, plan: Plan) -> Tensor:
    """(B, N) weight of each token in a readout."""
    if region == "hidden":
        return plan.predict
    live = informative(stream)
    if region == "unlocated":
        return (live if plan.unlocated is None else live & plan.unlocated).float()
    return (live if region == "all" else live & ~plan.hidden).float()
