"""Models trained elsewhere, frozen, with a tokenizer of their own: what they make of a view is given to guides and targets."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from meristem.errors import CheckpointError, RecipeError
from meristem.modalities.base import Settings, View
from meristem.modalities.frame import Frame
from meristem.platform.encoders.base import Encoder
from meristem.projections import Merge, Projection

if TYPE_CHECKING:
    from meristem.platform.assembly import Assembly

Normalise = Callable[[Tensor], Tensor]  # pictures (M, C, H, W) in [0, 1] to what a model was trained on


@dataclass(frozen=True)
class Sight:
    """What a model of images made of the pictures of clouds.

    features: (B, 3, D, h, w) of its tokens. summary: (B, 3, D) of whole pictures, by its class token if that was trained to
    stand for them, else by the mean of tokens. saliency: (B, 3, h, w) the attention that tokens get from the class token, or
    from all tokens, mean over the heads of the last block; 1 where all get the same. where: the pixels that show a point.
    """

    features: Tensor
    saliency: Tensor
    summary: Tensor
    where: Projection

    def features_at(self, xyz: Tensor) -> Tensor:
        """(B, N, 3, D) at points (B, N, 3) of the clouds."""
        return self.where.sample(self.features, xyz)

    def saliency_at(self, xyz: Tensor) -> Tensor:
        """(B, N) at points (B, N, 3), the mean over the pictures."""
        return self.where.sample(self.saliency[:, :, None], xyz)[..., 0].mean(-1)


class Onlooker:
    """A frozen model of images that sees clouds by their pictures along the three axes.

    No module of the run: it is neither trained nor averaged nor saved, and copies of what holds it share it.
    """

    def __init__(self, settings: Foreign, assembly: Assembly, normalise: Normalise) -> None:
        assert isinstance(assembly.encoder, Encoder)
        self.encoder = assembly.encoder.eval().requires_grad_(False)
        self.tokenizer, self.modality, self.sees = assembly.tokenizer, assembly.recipe.modality, assembly.recipe.encoder.sees
        self.settings, self.normalise, self.width = settings, normalise, assembly.encoder.width
        self.summary = assembly.recipe.summary
        if "attention" not in self.encoder.provides:
            raise RecipeError("a foreign model must tell what it attends to, and this one has no attention",
                              "Choose a vision transformer, or a run of encoder: transformer.")
        patch = tuple(self.modality.options.patch)
        if any(settings.size % p for p in patch):
            raise RecipeError(f"pictures of {settings.size} pixels are no whole patches of {'×'.join(map(str, patch))}",
                              "Set foreign.….size to a multiple.")

    def __deepcopy__(self, memo: dict[int, Any]) -> Onlooker:
        return self

    @torch.no_grad()
    def look(self, view: View) -> Sight:
        """At clouds (B, C, N), coordinates first."""
        xyz, size = view.array[:, :3].transpose(1, 2).float(), self.settings.size
        live = torch.ones_like(xyz[..., 0], dtype=torch.bool) if view.weight is None else view.weight[:, 0] > 0
        where = Projection.of(xyz, live, size)
        pictures = where.pictures(xyz, live, self.settings.spread, self.settings.merge).flatten(0, 1)
        rows, device = len(pictures), pictures.device
        array = self.normalise(pictures[:, None].expand(-1, self.modality.channels, -1, -1))
        frame = Frame(torch.eye(3, device=device).expand(rows, -1, -1), (size, size), torch.ones(rows, 2, device=device),
                      tuple(a.unit for a in self.modality.axes))
        shown = View("pictures", array, frame, torch.arange(rows, device=device), torch.zeros_like(view.look).repeat(3))
        self.encoder.to(device)
        made = self.encoder(self.tokenizer.stream(shown).seen(self.sees), want=frozenset({"attention"}))
        assert made.attention is not None and made.lattice is not None
        lattice, n = tuple(made.lattice), made.tokens.shape[1]
        heads = made.attention.float().mean(1)
        before = heads.shape[1] - n  # class and register tokens
        attended = (heads[:, :1] if self.summary == "cls" else heads[:, before:])[..., before:].mean(1) * n
        return Sight(made.tokens.float().transpose(1, 2).unflatten(2, lattice).unflatten(0, (-1, 3)),
                     attended.unflatten(1, lattice).unflatten(0, (-1, 3)),
                     made.summary[self.summary].float().unflatten(0, (-1, 3)), where)


@lru_cache(maxsize=16)
def _digest(file: Path, modified: int, size: int) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:16]


class Foreign(Settings):
    """The typed entry of a foreign model: of images, it looks at pictures of clouds (see `projections`).

    weights: a place on this machine. identity: 16 hex digits of the SHA-256 of the weights, which is what a run keeps of them
    in place of the place; given beside it, both must agree. size, spread, merge: of the pictures.
    """

    weights: Path | None = None
    identity: str = ""
    size: Annotated[int, Field(ge=8)] = 64
    spread: Annotated[int, Field(ge=0)] = 1
    merge: Merge = "sum"

    def file(self) -> Path:
        """That holds the weights. Raises CheckpointError."""
        raise NotImplementedError

    def opened(self) -> tuple[Assembly, Normalise]:
        """An assembly that holds the encoder with its weights, and what normalises pictures for it. Raises CheckpointError."""
        raise NotImplementedError

    def check(self, recipe: Any) -> list[str]:
        """What is impossible about it in this recipe; empty when all is well."""
        if recipe.modality.tokenizer().coordinates != 3:
            return [f"it looks at pictures of clouds, and {recipe.modality.name} data are none"]
        try:
            return [] if self.weights is None else self._disagreement()
        except CheckpointError as error:
            return [f"{error.what}. {error.remedy}"]

    def recorded(self) -> Self:
        """The same model by what it is, without where it lies."""
        return self if self.weights is None else self.model_copy(update={"weights": None, "identity": self._own()})

    def build(self, name: str) -> Onlooker:
        """Raises RecipeError without weights, CheckpointError for those that do not fit."""
        if self.weights is None:
            what = f", the one whose weights have the SHA-256 {self.identity}…" if self.identity else ""
            kind = next(n for n, part in FOREIGN.items() if part is type(self))
            raise RecipeError(f"foreign model '{name}' is a model of images trained elsewhere{what}, and none was given",
                              f"Set foreign.{name}.{kind}.weights to it.")
        return Onlooker(self, *self.opened())

    def _own(self) -> str:
        file = self.file()
        state = file.stat()
        return _digest(file, state.st_mtime_ns, state.st_size)

    def _disagreement(self) -> list[str]:
        own = self._own()
        return [] if self.identity in ("", own) else [f"its weights have the SHA-256 {own}…, not {self.identity}…"]


def named(recipe: Any, name: str) -> list[str]:
    """A problem where a recipe has no foreign model of this name."""
    has = ", ".join(recipe.foreign) or "none"
    return [] if name in recipe.foreign else [f"there is no foreign model '{name}' (foreign: {has})"]


class Run(Foreign):
    """A run that pretrained an encoder of images, e.g. `image/mae` on pictures of clouds. weights: its directory."""

    def file(self) -> Path:
        from meristem.platform.training import checkpoint  # knows recipes, of which this is a part

        assert self.weights is not None
        return checkpoint.locate(self.weights) / "weights.safetensors"

    def opened(self) -> tuple[Assembly, Normalise]:
        from meristem.platform.training.restore import restored

        assert self.weights is not None
        assembly = restored(self.weights)
        modality = assembly.recipe.modality
        if modality.name != "image":
            raise CheckpointError(f"a foreign model is one of images, and the run is of modality '{modality.name}'",
                                  "Give a run of an image recipe.")
        if modality.options.normalise == "zscore":
            return assembly, _standardised
        scale, offset = modality.statistics(np.zeros((modality.channels, 1, 1), np.uint8))
        return assembly, _affine([255 * x for x in scale], offset)


class Timm(Foreign):
    """One of timm's vision transformers, as its own configuration normalises images. model: its name. weights: a local file."""

    model: str = "vit_base_patch16_224"

    def file(self) -> Path:
        assert self.weights is not None
        if not self.weights.is_file():
            raise CheckpointError(f"no weights file {self.weights}", "Give a local file of timm weights.")
        return self.weights

    def opened(self) -> tuple[Assembly, Normalise]:
        from timm.models import get_pretrained_cfg

        from meristem.platform.assembly import Assembly
        from meristem.platform.encoders.timm import patch_of
        from meristem.platform.recipe import Recipe, build

        net = {"timm": {"model": self.model, "pretrained": str(self.file()), "sees": []}}
        cfg = get_pretrained_cfg(self.model)
        recipe = build({"name": self.model, "modality": {"image": {"patch": list(patch_of(self.model))}}, "encoder": net,
                        "views": {"x": {"size": [self.size] * 2}}}, Recipe)
        summary = "cls" if "cls" in recipe.encoder.provides else "mean"
        mean, std = cfg.mean, cfg.std
        return (Assembly(recipe.model_copy(update={"summary": summary})),
                _affine([1 / x for x in std], [-m / x for m, x in zip(mean, std, strict=True)]))


def _standardised(pictures: Tensor) -> Tensor:
    """Each picture (M, C, H, W) to mean 0 and variance 1; an empty one to 0."""
    std = pictures.std((2, 3), correction=0, keepdim=True)
    return (pictures - pictures.mean((2, 3), keepdim=True)) / torch.where(std > 0, std, 1)


def _affine(scale: Sequence[float], offset: Sequence[float]) -> Normalise:
    a, b = (torch.tensor(x, dtype=torch.float32).reshape(-1, 1, 1) for x in (scale, offset))
    return lambda pictures: pictures * a.to(pictures) + b.to(pictures)


FOREIGN: dict[str, type[Foreign]] = {"run": Run, "timm": Timm}
