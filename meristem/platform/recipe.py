"""A recipe is data: a YAML file, typed, extended from a base, overridable by `key.sub=value`, hashed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import Field, SerializeAsAny, ValidationError, ValidationInfo, field_serializer, field_validator, model_validator

from meristem.catalogue import CONFIGS, like, names
from meristem.errors import RecipeError
from meristem.modalities.base import Modality, Settings, ViewSettings, modality_class
from meristem.platform.contrastive.infomax import Infomax
from meristem.platform.contrastive.objective import Contrastive
from meristem.platform.contrastive.overlap import Overlap
from meristem.platform.contrastive.words import BagOfWords
from meristem.platform.data.composer import COMPOSERS, Matched
from meristem.platform.derived.base import Derivation
from meristem.platform.derived.parts import DERIVATIONS
from meristem.platform.distil import Distil
from meristem.platform.encoders import ENCODERS
from meristem.platform.encoders.base import EncoderSettings
from meristem.platform.foreign import FOREIGN, Foreign
from meristem.platform.heads import HEADS, HeadSettings
from meristem.platform.masked.masking import Masking
from meristem.platform.masked.objective import Masked
from meristem.platform.masked.parts import MASKINGS
from meristem.platform.objectives import ObjectiveSettings
from meristem.platform.pretext import Pretext
from meristem.platform.relational.objective import Hops, Links, Property
from meristem.platform.schedules import Scalar
from meristem.platform.slots import Slot, validated

# keys that hold a part, `name: {arguments}`
LARGEST, DEEPEST = 100_000, 64  # values of a recipe, and levels of them: more is none
PARTS = ("modality", "encoder", "predictor", "target", "loss", "transform", "task", "sample", "detector", "guide", "compose")
NAMED = {"views": "names", "readouts": "names", "masking": "parts", "heads": "parts", "objectives": "parts",
         "derived": "parts", "foreign": "parts"}  # the user's names
TASK_ONLY = frozenset({"task", "probe", "lora"})  # keys of a task's recipe that a plain one lacks
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
OBJECTIVES: dict[str, type[ObjectiveSettings]] = {
    "masked": Masked,
    "contrastive": Contrastive, "infomax": Infomax, "bag_of_words": BagOfWords, "overlap": Overlap,
    "pretext": Pretext,
    "links": Links, "hops": Hops, "property": Property,
    "distil": Distil}


class TeacherSettings(Settings):
    """of: module names that are copied (encoder, heads). momentum: of the moving average, per optimiser step."""

    of: tuple[str, ...] = ("encoder",)
    momentum: Scalar = 0.996


class TrainSettings(Settings):
    """How long, how fast, in what precision.

    steps: optimiser steps. batch: samples per optimiser step, over all ranks and accumulation. accumulate: parts it is worked
    in, one after another; samples of different parts do not repel each other. optimiser: `adamw`, or `adam`, whose weight decay
    is part of the gradient: the less the loss asks of a weight, the harder it decays (Loshchilov and Hutter 2019, section 2).
    lr: peak learning rate, at this batch. warmup: fraction of the steps. schedule: `cosine` to `floor`·lr; `sawtooth`: the head
    alone for the first `head_first` fraction, then everything, each with its own warm-up and decay. layer_decay: factor on lr
    per layer from the output down. freeze: module path prefix -> fraction of the run for which it stays frozen. ema: weights
    averaged over steps with this decay are the ones saved for use. combine: several objectives by their weighted `sum`, or by
    `pareto`, a direction that lowers all of them whatever their scale (on one process, in fp32). compile: the
    parts of nets by torch.compile, which takes minutes once. checkpointing: of activations, which are computed again part by
    part in the backward pass instead of being kept. fsdp: several processes share out weights, gradients and optimiser states,
    where each would hold all of them. keep: the last so many checkpoints stay, and the best. window: of samples that are
    streamed, how many shards are mixed at any time; as many as there are make it a plain shuffle.
    """

    steps: Count = 1000
    batch: Count = 32
    accumulate: Count = 1
    optimiser: Literal["adamw", "adam"] = "adamw"
    lr: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    betas: tuple[Share, Share] = (0.9, 0.95)
    warmup: Share = 0.1
    schedule: Literal["cosine", "sawtooth"] = "cosine"
    head_first: Share = 0.2
    floor: Share = 0.01
    clip: Annotated[float, Field(ge=0)] = 1.0
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    freeze: Mapping[str, Share] = {}
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    combine: Literal["sum", "pareto"] = "sum"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    compile: bool = False
    checkpointing: bool = False
    fsdp: bool = False
    seed: int = 0
    log_every: Count = 20
    checkpoint_every: Count = 500
    keep: Count = 2
    workers: Annotated[int, Field(ge=0)] = 1
    window: Count = 8

    @model_validator(mode="after")
    def _comparable(self) -> Self:
        if self.combine == "pareto" and (self.accumulate > 1 or self.precision != "fp32" or self.compile):
            raise ValueError("combine: pareto compares gradients of a whole batch in fp32, uncompiled; set accumulate: 1, "
                             "precision: fp32 and compile: false")
        return self


class Recipe(Settings):
    """Everything a run needs but the data. See `configs/` for examples.

    follows: what it implements; departs: where it differs. status: verified | tested | expressible. transfer: whose encoder
    is taken downstream. summary: which of its vectors stands for a whole sample there: the one that pretraining trained.
    derived: views that are made of these on the device, by name. foreign: models trained elsewhere that look at them, by name.
    compose: who meets whom in a batch, where that is not chance alone.
    reads: companions of a sample (of those its modality finds) that every view carries, for objectives.
    """

    name: Annotated[str, Field(pattern=r"^[^/\\]+$")]
    follows: str = ""
    departs: str = ""
    status: Literal["verified", "tested", "expressible"] = "expressible"
    modality: Any
    views: dict[str, SerializeAsAny[ViewSettings]]
    derived: dict[str, Annotated[Derivation, Slot("derived view", DERIVATIONS)]] = {}
    foreign: dict[str, Annotated[Foreign, Slot("foreign model", FOREIGN)]] = {}
    compose: Annotated[Matched, Slot("composer", COMPOSERS)] | None = None
    reads: tuple[str, ...] = ()
    masking: dict[str, Annotated[Masking, Slot("masking", MASKINGS)]] = {}
    encoder: Annotated[EncoderSettings, Slot("encoder", ENCODERS)]
    heads: dict[str, Annotated[HeadSettings, Slot("head", HEADS)]] = {}
    teacher: TeacherSettings | None = None
    transfer: Literal["encoder", "teacher"] = "encoder"
    summary: Literal["mean", "cls", "sum", "max"] = "mean"
    objectives: dict[str, Annotated[ObjectiveSettings, Slot("objective", OBJECTIVES)]] = {}
    train: TrainSettings = TrainSettings()

    @field_validator("modality", mode="before")
    @classmethod
    def _modality(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = {value: {}}
        if isinstance(value, Modality):
            return value
        if not isinstance(value, Mapping) or len(value) != 1:
            raise ValueError(f"a modality is `name` or `name: {{…}}`; got {value!r}")
        (name, options), = value.items()
        try:
            kind = modality_class(name)
        except RecipeError as error:
            raise ValueError(f"{error.what}. {error.remedy}") from None
        return kind(validated(kind.Options, options or {}, name))

    @field_serializer("modality")
    def _dump_modality(self, modality: Any) -> dict[str, Any]:
        return {modality.name: modality.options.model_dump(mode="json")}

    @field_validator("views", mode="before")
    @classmethod
    def _views(cls, value: Any, info: ValidationInfo) -> Any:
        modality: Modality | None = info.data.get("modality")
        if modality is None:
            return {}  # its own error is enough
        if not isinstance(value, Mapping):
            return value
        return {name: validated(modality.ViewOptions, options or {}, name) for name, options in value.items()}

    @model_validator(mode="after")
    def _fits(self) -> Self:
        problems = []
        for i, (name, view) in enumerate(self.derived.items()):
            if name in self.views:
                problems.append(f"derived view '{name}' has the name of a drawn one; give it another")
            if view.of not in (*self.views, *list(self.derived)[:i]):
                problems.append(f"derived view '{name}' is made of '{view.of}', which is no view before it")
                continue
            problems += [f"derived view '{name}': {problem}" for problem in view.check(self)]
        for name, model in self.foreign.items():
            problems += [f"foreign model '{name}': {problem}" for problem in model.check(self)]
        if self.modality.tokenizer().kinds and "drop" not in self.encoder.takes:
            problems.append("tokens of channels are no array, which this encoder needs; choose encoder: transformer")
        if problems:
            raise ValueError("; ".join(problems))
        problems = [f"masking of '{name}': there is no such view (views: {', '.join(self.looks)})"
                    for name in self.masking if name not in self.looks]
        if self.compose is not None:
            problems += [f"compose: {problem}" for problem in self.compose.check(self.views, len(self.modality.axes))]
        for name, masking in self.masking.items():
            if masking.corruption not in self.encoder.takes:
                problems.append(f"masking of '{name}' would {masking.corruption} tokens, but this encoder can only take "
                                f"{' or '.join(sorted(self.encoder.takes)) or 'whole views'}; set masking.{name}.….corruption")
            problems += [f"masking of '{name}': {problem}" for problem in masking.check(self)]
        for i, (name, head) in enumerate(self.heads.items()):
            if head.input is not None and head.input not in list(self.heads)[:i]:
                problems.append(f"head '{name}' stands on '{head.input}', which is not among the heads before it")
        for name, objective in self.objectives.items():
            problems += [f"objective '{name}': {problem}" for problem in objective.check(self)]
        for name in self.teacher.of if self.teacher else ():
            if name != "encoder" and name not in self.heads:
                problems.append(f"teacher.of names '{name}', which is neither the encoder nor a head")
        if self.summary not in self.encoder.provides:
            problems.append(f"summary: this encoder has no {self.summary} vector; set summary: mean")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def looks(self) -> dict[str, ViewSettings]:
        """Every view, derived ones too, and how what it shows was drawn."""
        found = dict(self.views)
        for name, view in self.derived.items():
            if view.of in found:
                found[name] = view.shown(found[view.of])
        return found

    def of(self, modality: Modality) -> Self:
        """The same recipe for a modality whose options the data settled."""
        return self.model_copy(update={"modality": modality})

    def dump(self) -> dict[str, Any]:
        """Plain data that loads back to the same recipe."""
        return self.model_dump(mode="json")

    def record(self) -> dict[str, Any]:
        """Plain data for artefacts: of the same modules, without a file of this machine that they were started from."""
        return self.model_copy(update={"encoder": self.encoder.detached()})._by_identity().dump()

    def _by_identity(self) -> Self:
        """The same recipe, its foreign models by what they are and not by where they lie."""
        return self.model_copy(update={"foreign": {name: model.recorded() for name, model in self.foreign.items()}})

    @property
    def hash(self) -> str:
        """Of the resolved recipe; 12 hex digits."""
        return digest(self._by_identity().dump())


AnyRecipe = TypeVar("AnyRecipe", bound=Settings)


def digest(plain: Any) -> str:
    """12 hex digits of a plain value's SHA-256."""
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:12]


def merge(base: Mapping[str, Any], over: Mapping[str, Any], level: str = "keys") -> dict[str, Any]:
    """`over` laid on `base`. A part is replaced by another part, and its arguments merged with its own; null removes a key.

    level: what the keys of these mappings are: keys; a part (its one key is its name); names or parts (the user's names, of
    mappings or of parts).
    """
    if level == "part" and base.keys() != over.keys():
        return dict(over)
    result = dict(base)
    for key, value in over.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, Mapping) and isinstance(result.get(key), Mapping):
            below = "part" if level == "parts" or (level == "keys" and key in PARTS) else "keys"
            result[key] = merge(result[key], value, NAMED.get(key, below) if level == "keys" else below)
        else:
            result[key] = value
    return result


def find(name: str | Path) -> Path:
    """`volume/mae` among the built-in recipes, or the path of a YAML file. Raises RecipeError with the nearest names."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if path.is_file():
            return path
        raise RecipeError(f"no recipe file {path}", "Give the path of an existing YAML file.")
    built_in = CONFIGS / f"{name}.yaml"
    if built_in.is_file():
        return built_in
    inside = sorted((n for n in names() if str(name) in n), key=lambda n: n.split("/")[1] != str(name))  # `mae`: image/mae
    near = get_close_matches(str(name), names()) or inside or names()
    raise RecipeError(f"no recipe called '{name}'", f"Did you mean {' or '.join(near[:6])}? `meristem recipes list` shows all.")


def read(name: str | Path, within: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A recipe's plain data with its bases merged in, in the order of `extends`. within: the recipes that extend this one."""
    path = find(name)
    if path in within:
        raise RecipeError(f"{path.name} extends itself", f"The circle: {' -> '.join(p.name for p in (*within, path))}.")
    try:
        data = _plain(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise RecipeError(f"{path.name} is not YAML: {error}", "Correct the line, or quote the value.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path.name} cannot be read: {getattr(error, 'strerror', None) or 'it is not UTF-8 text'}",
                          "Give a readable YAML file.") from None
    if not isinstance(data, dict):
        raise RecipeError(f"{path.name} must be a mapping of keys", "See `meristem recipes show volume/mae`.")
    bases = data.pop("extends", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise RecipeError(f"extends of {path.name} is not the name of a recipe, or a list of names",
                          "E.g. extends: volume/base.")
    merged: dict[str, Any] = {}
    for base in bases:
        merged = merge(merged, read(base, (*within, path)))
    own = {"name": path.stem, "status": "expressible"}  # what was shown of a base says nothing of what changes it
    return merge(merged, {**own, **data})


def _plain(text: str) -> Any:
    """The values of a YAML text. Raises YAMLError, also for what no recipe has: endless depth, or aliases that multiply."""
    nested = accumulate((c in "[{") - (c in "]}") for c in text)
    if max(nested, default=0) > DEEPEST:  # PyYAML takes minutes to find out
        raise yaml.YAMLError(f"it is nested deeper than {DEEPEST}")
    try:
        found = yaml.safe_load(text)
    except (ValueError, RecursionError) as error:
        raise yaml.YAMLError(f"a value cannot be read ({type(error).__name__})") from None
    left, count = [(found, 0)], 0
    while left:
        value, depth = left.pop()
        count += 1
        if count > LARGEST or depth > DEEPEST:
            raise yaml.YAMLError(f"it holds more than {LARGEST:,} values, or is nested deeper than {DEEPEST}")
        inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        left += [(v, depth + 1) for v in inside]
    return found


def override(data: Mapping[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Lay `key.sub=value` on plain data; values are YAML."""
    result = dict(data)
    for assignment in assignments:
        key, sign, text = assignment.partition("=")
        if not sign or not key:
            raise RecipeError(f"'{assignment}' is not an override", "Write key.sub=value, e.g. train.steps=200.")
        try:
            value: Any = _plain(text)
            if key.count(".") > DEEPEST:
                raise yaml.YAMLError
        except yaml.YAMLError:
            raise RecipeError(f"the value of '{assignment}' is not YAML", "Quote it, e.g. 'views.x.size=[32,32,32]'.") from None
        for part in reversed(key.split(".")):
            value = {part: value}
        result = merge(result, value)
    return result


def build(data: Mapping[str, Any], kind: type[AnyRecipe]) -> AnyRecipe:
    """Validate plain data. Raises RecipeError that names each wrong key."""
    try:
        return validated(kind, data)
    except ValidationError as error:
        lines = [": ".join(filter(None, (".".join(map(str, e["loc"])), e["msg"]))) for e in error.errors()]
        what = f"recipe '{data.get('name', 'recipe')}' is wrong: " + "\n  ".join(lines)
        raise RecipeError(what, "`meristem recipes show NAME` lists every key." + _instead(data, error)) from None


def _instead(data: Mapping[str, Any], error: ValidationError) -> str:
    """The recipes that would work, where every key is right and its parts do not fit each other or the data."""
    modality = data.get("modality")
    kind = next(iter(modality)) if isinstance(modality, Mapping) and modality else modality
    if any(e["loc"] for e in error.errors()) or not data.get("objectives"):
        return ""
    near = like(str(kind), data["objectives"])
    return f" These fit {kind} data: {', '.join(near)}." if near else ""


def load(name: str | Path, assignments: Sequence[str] = ()) -> Recipe:
    """A built-in recipe or a file, with overrides, validated."""
    return build(override(read(name), assignments), Recipe)
