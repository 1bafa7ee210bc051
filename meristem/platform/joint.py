"""One encoder for several kinds of data: recipes whose members share a trunk, each with its own tokens and its own losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Self

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from meristem.errors import RecipeError
from meristem.modalities.base import Settings
from meristem.modalities.rng import Rng
from meristem.platform import recipe as recipes
from meristem.platform.assembly import Assembly
from meristem.platform.encoders.base import Encoder
from meristem.platform.encoders.transformer import Transformer
from meristem.platform.objectives import Loss
from meristem.platform.recipe import Recipe, TrainSettings
from meristem.platform.slots import validated
from meristem.platform.step import Batch, Step


class Member(Settings):
    """One kind of data in a joint run. ratio: how often it has a step, relative to the others. weight: of its losses."""

    recipe: Recipe
    ratio: Annotated[float, Field(gt=0)] = 1.0
    weight: Annotated[float, Field(gt=0)] = 1.0

    @field_validator("recipe", mode="before")
    @classmethod
    def _whole(cls, value: Any) -> Any:
        return validated(Recipe, value) if isinstance(value, Mapping) else value


class Joint(Settings):
    """A recipe of several: all members share the blocks, the norm, the class and the mask token of one transformer, or all of
    another net, which then gets arrays of as many axes and channels from each. It may stand inside a member's encoder, as the
    encoder of slices does.

    Embeddings of tokens, encodings of structure, biases of edges, decoders and heads are each member's own. train: of the whole
    run; a member's own batch size holds. Every step belongs to one member, drawn by `ratio` from (seed, step): on all ranks
    the same, and known beforehand, so that a run resumes exactly.
    """

    name: str
    follows: str = ""
    departs: str = ""
    status: str = "expressible"
    train: TrainSettings
    members: Annotated[dict[str, Member], Field(min_length=1)]

    @model_validator(mode="after")
    def _share(self) -> Self:
        for name, member in self.members.items():
            if self._shape(member) != self._shape(self._first):
                raise ValueError(f"member '{name}' has another encoder than '{next(iter(self.members))}'; all share one, set "
                                 "by the joint recipe's `encoder`")
        if self.train.compile:
            raise ValueError("train.compile: the members' shapes differ from step to step; leave it off")
        return self

    @property
    def _first(self) -> Member:
        return next(iter(self.members.values()))

    @staticmethod
    def _shape(member: Member) -> Any:
        trunk = member.recipe.encoder
        while hasattr(trunk, "encoder"):
            trunk = trunk.encoder
        return type(trunk), trunk.model_dump(exclude={"sees"})

    @property
    def hash(self) -> str:
        """Of the resolved recipe; 12 hex digits."""
        return recipes.digest(self.dump())

    def dump(self) -> dict[str, Any]:
        """Plain data."""
        members = {n: {"ratio": m.ratio, "weight": m.weight, "recipe": m.recipe.dump()} for n, m in self.members.items()}
        return self.model_dump(mode="json", exclude={"members"}) | {"members": members}

    def turns(self) -> list[str]:
        """Whose each step of the run is."""
        names, share = list(self.members), np.cumsum([m.ratio for m in self.members.values()])
        u = Rng.of(self.train.seed, torch.arange(self.train.steps), "member").uniform("turn").double().numpy()
        return [names[i] for i in np.searchsorted(share / share[-1], u, side="right").clip(max=len(names) - 1)]


def build(data: Mapping[str, Any], wanted: Sequence[str] = ()) -> Joint:
    """A joint recipe of plain data, of the members that are wanted (none named: of all).

    A member is the name of a recipe under `extends` and what is laid over it. The joint recipe's `encoder` takes the place of
    its encoder, or of the encoder named inside that, but for what it sees; `train` is laid over it, and the member's own
    `train` on top. Raises RecipeError that names each wrong key.
    """
    members = data.get("members")
    if not isinstance(members, Mapping):
        raise RecipeError("members of a joint recipe are not a mapping", "E.g. members: {image: {extends: image/mae}}.")
    unknown = [name for name in wanted if name not in members]
    if unknown:
        raise RecipeError(f"the joint recipe has no member '{unknown[0]}'", f"Members: {', '.join(members)}.")
    title, chosen = f"joint-{data.get('name', 'mae')}", {}
    for name in wanted or members:
        entry = dict(members[name] or {})
        how = {key: entry.pop(key) for key in ("ratio", "weight") if key in entry}
        bases = entry.pop("extends", f"{name}/{data.get('name', 'mae')}")
        plain = recipes.read(bases)
        plain["encoder"] = _replaced(plain.get("encoder", {"": {}}), data.get("encoder", {"transformer": {}}))
        for over in ({"train": data.get("train", {})}, entry):
            plain = recipes.merge(plain, over)
        chosen[name] = {**how, "recipe": {**plain, "name": title}}
    rest = {key: value for key, value in data.items() if key not in ("members", "encoder")}
    return recipes.build({**rest, "name": title, "members": chosen}, Joint)


def _replaced(encoder: Mapping[str, Any], trunk: Mapping[str, Any]) -> dict[str, Any]:
    """An encoder's plain data with `trunk` in the place of its innermost part, which keeps what it sees."""
    (kind, own), = encoder.items()
    own = own or {}
    if "encoder" in own:
        return {kind: {**own, "encoder": _replaced(own["encoder"], trunk)}}
    (kind, arguments), = trunk.items()
    return {kind: {**(arguments or {}), **{key: own[key] for key in ("sees",) if key in own}}}


class JointAssembly(Assembly):
    """The assemblies of all members over one trunk. A batch says whose it is."""

    def __init__(self, recipe: Joint) -> None:
        nn.Module.__init__(self)
        self.joint = recipe
        self.members = nn.ModuleDict({name: Assembly(member.recipe) for name, member in recipe.members.items()})
        self.names = list(recipe.members)
        for name in self.names[1:]:
            self._share(name)
        self._active = self.names[0]
        self.register_state_dict_post_hook(_once)
        self.register_load_state_dict_pre_hook(_everywhere)

    def _share(self, name: str) -> None:
        """Put the first member's trunk in the place of another's. Raises RecipeError."""
        (_, first), (outer, trunk) = _trunk(self.of(self.names[0])), _trunk(self.of(name))
        if isinstance(trunk, Transformer):
            assert isinstance(first, Transformer)
            trunk.blocks.blocks, trunk.blocks.norm = first.blocks.blocks, first.blocks.norm
            trunk.cls, trunk.mask_token = first.cls, first.mask_token
        elif [x.shape for x in first.state_dict().values()] != [x.shape for x in trunk.state_dict().values()]:
            raise RecipeError(f"member '{name}' gives its encoder arrays of other axes or channels than '{self.names[0]}' does",
                              "Make their channels equal, and read volumes slice by slice beside images.")
        elif outer is None:
            self.of(name).encoder = first
        else:
            outer.inner = first

    def of(self, name: str) -> Assembly:
        member = self.members[name]
        assert isinstance(member, Assembly)
        return member

    @property
    def last_step(self) -> Step | None:  # type: ignore[override]
        return self.of(self._active).last_step

    @property
    def encoder(self) -> Any:  # type: ignore[override]
        return self.of(self.names[0]).encoder

    def prepare(self, batch: Batch) -> Batch:
        return self.of(batch.member).prepare(batch)

    def train(self, mode: bool = True) -> JointAssembly:
        nn.Module.train(self, mode)
        return self

    def forward(self, batch: Batch, progress: float) -> dict[str, Loss]:
        self._active = batch.member
        weight = self.joint.members[batch.member].weight
        return {f"{batch.member}.{name}": loss._replace(weight=loss.weight * weight)
                for name, loss in self.of(batch.member)(batch, progress).items()}

    @torch.no_grad()
    def after(self, progress: float) -> None:
        self.of(self._active).after(progress)


def _trunk(member: Assembly) -> tuple[Encoder | None, Encoder]:
    """The innermost encoder of a member, and the one that holds it."""
    outer, inner = None, member.encoder
    while isinstance(held := getattr(inner, "inner", None), Encoder):
        outer, inner = inner, held
    return outer, inner


def _shared(assembly: nn.Module) -> dict[str, str]:
    """Name of every weight of the trunk in members after the first -> its name in the first."""
    assert isinstance(assembly, JointAssembly)
    first, *others = assembly.names

    def weights(name: str) -> dict[str, Tensor]:
        encoder, prefix = assembly.of(name).encoder, f"members.{name}.encoder."
        return {prefix + n: x for named in (encoder.named_parameters, encoder.named_buffers)
                for n, x in named(remove_duplicate=False)}

    names = {id(x): n for n, x in weights(first).items()}
    return {n: names[id(x)] for other in others for n, x in weights(other).items() if id(x) in names}


def _once(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    for name in _shared(module):
        state.pop(prefix + name, None)


def _everywhere(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    for name, first in _shared(module).items():
        if prefix + first in state:
            state[prefix + name] = state[prefix + first]
