"""What a modality is: the protocol every kind of data follows, and the registry an outside package can join."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from meristem.errors import RecipeError
from meristem.modalities.frame import Frame
from meristem.modalities.rng import Rng
from meristem.modalities.stream import TokenStream

LOOKS = 64  # of one view and sample that can be told apart: a look's counter is cursor · 64 + number


class Settings(BaseModel):
    """A typed part of a recipe: unknown keys are refused, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True)
class Axis:
    """One coordinate of a modality. finest, coarsest: the range of scales, in `unit`, that rotary frequencies must span."""

    name: str
    unit: str
    finest: float
    coarsest: float


@dataclass(frozen=True)
class Header:
    """What is known of a stored sample without its elements.

    shape: lattice of the stored array, channels first: (C, *S). affine: (D+1, D+1) stored index -> source, in the modality's
    unit. spacing: per axis, size of one lattice step. scale, offset: per channel, stored integer * scale + offset is the
    value an encoder sees (normalisation folded in). pad: the value, per channel and normalised, outside the sample.
    source: what `write` needs to put a prediction back on the file's own grid (shape, affine, resampling, crop); plain JSON.
    anchors: up to 64 stored positions of labelled elements, spread evenly over the classes, for crops that must hold some.
    """

    shape: tuple[int, ...]
    affine: tuple[tuple[float, ...], ...]
    spacing: tuple[float, ...]
    scale: tuple[float, ...] = (1.0,)
    offset: tuple[float, ...] = (0.0,)
    pad: tuple[float, ...] = (0.0,)
    source: Mapping[str, Any] = field(default_factory=dict)
    anchors: tuple[tuple[int, ...], ...] = ()


@dataclass
class Sample:
    """A whole decoded file: array (C, *S), its header, and companions on the same lattice (mask: integers (*S)).

    array None: it stays in its files, whose windows `Modality.fetch` decodes when they are asked for.
    """

    array: np.ndarray | None
    header: Header
    fields: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Draw:
    """One drawn look at a sample, decided before any byte is read.

    start, size: the window in the stored lattice (may reach outside: padded). shape: the view's lattice after resizing.
    params: what augmentation will do to it, by name; also the pretext labels (int64 numbers).
    index: places along the first axis, in the order shown, where that is no plain window (strided, repeated, reversed): as
    many as `shape` says, −1 for nothing (padding). spacing: the view's own, where it is not the sample's.
    """

    start: tuple[int, ...]
    size: tuple[int, ...]
    shape: tuple[int, ...]
    params: Mapping[str, Any] = field(default_factory=dict)
    index: tuple[int, ...] = ()
    spacing: tuple[float, ...] = ()


@dataclass(frozen=True)
class Look:
    """Which look is drawn. number: of the view's `count`. rng: its own random numbers, of one sample. sample: random numbers
    that all looks of all views of that sample share in this step.
    """

    number: int
    rng: Rng
    sample: Rng

    @classmethod
    def of(cls, seed: int, cursor: int, number: int, view: str) -> Look:
        """Look `number` of a view at the sample whose place in the run's stream is `cursor`."""
        return cls(number, Rng.of(seed, cursor * LOOKS + number, view), Rng.of(seed, cursor, "all looks"))


@dataclass
class View:
    """Drawn looks at the items of a batch, all of one name and size.

    array: (B·count, C, *S) float. item: (B·count,) place of the sample in the batch. look: (B·count,) which of the `count`
    looks this is. params: name -> (B·count, …), drawn values; never given to an encoder. fields: companions carried through
    the same geometry (mask: (B·count, *S) int64). weight: (B·count, 1, *S) per element, 0 outside the sample.
    """

    name: str
    array: Tensor
    frame: Frame
    item: Tensor
    look: Tensor
    params: dict[str, Tensor] = field(default_factory=dict)
    fields: dict[str, Tensor] = field(default_factory=dict)
    weight: Tensor | None = None

    def __len__(self) -> int:
        return self.array.shape[0]

    def select(self, rows: Tensor) -> View:
        """The given rows (n,), as a view of the same name."""
        return replace(self, array=self.array[rows], frame=self.frame.select(rows), item=self.item[rows], look=self.look[rows],
                       params={k: v[rows] for k, v in self.params.items()}, fields={k: v[rows] for k, v in self.fields.items()},
                       weight=None if self.weight is None else self.weight[rows])

    def to(self, device: torch.device | str) -> View:
        def move(x: Tensor) -> Tensor:
            return x.to(device, non_blocking=True)

        return replace(self, array=move(self.array), frame=self.frame.to(device), item=move(self.item), look=move(self.look),
                       params={k: move(v) for k, v in self.params.items()}, fields={k: move(v) for k, v in self.fields.items()},
                       weight=None if self.weight is None else move(self.weight))


class Tokenizer(nn.Module):
    """View <-> tokens of one modality."""

    mask_unit: tuple[int, ...]
    token_size: int

    def stream(self, view: View) -> TokenStream:
        raise NotImplementedError

    def embedding(self, width: int) -> nn.Module:
        """A module TokenStream -> (B, n, width); positions are the encoder's business."""
        raise NotImplementedError

    def fold(self, content: Tensor, lattice: tuple[int, ...]) -> Tensor:
        """Token content (B, N, P) of a whole lattice back to an array (B, C, *S); differentiable."""
        raise NotImplementedError


class ViewSettings(Settings):
    """What every modality's view has in common; a modality adds its own size, crop and augmentation keys."""

    count: int = 1

    def plain(self) -> Self:
        """The view of a whole sample as evaluation shows it: nothing random, of the same size; its looks are averaged."""
        raise NotImplementedError


@runtime_checkable
class Modality(Protocol):
    """Reads and writes one kind of data; knows its axes and units. Instances are built from a recipe's `modality` entry.

    Everything but `read`, `fetch` and `write` is pure. suffixes: of its files. members: of files of which a whole folder is one
    sample. `Options` and `ViewOptions` are pydantic models: recipes are validated by them.
    """

    name: str
    suffixes: tuple[str, ...]
    members: tuple[str, ...]
    Options: type[Settings]
    ViewOptions: type[ViewSettings]
    options: Any
    axes: tuple[Axis, ...]
    channels: int

    def __init__(self, options: Settings) -> None: ...

    def read(self, paths: Sequence[Path], fields: Mapping[str, Path] = {}) -> Sample:
        """Decode, validate, orient and resample. paths: one file, or one per channel. Raises DataError."""
        ...

    def statistics(self, array: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """(scale, offset) per channel that normalise this sample's raw values, folded into its header by `read`."""
        ...

    def fetch(self, paths: Sequence[Path], header: Header, draws: Sequence[Draw]) -> list[np.ndarray]:
        """The windows (C, *size) of a sample that `read` left in its files; with an index, its places stand for the first axis.

        Everything is decoded once for all draws. Raises DataError.
        """
        ...

    def draw(self, view: ViewSettings, header: Header, look: Look) -> Draw:
        """Choose window and augmentation for one look."""
        ...

    def load(self, window: np.ndarray, draw: Draw, interpolate: bool) -> Tensor:
        """A window (C, *size), as stored or fetched, to the view's lattice (C, *shape); nearest for labels."""
        ...

    def augment(self, view: View, settings: ViewSettings) -> View:
        """Apply the drawn parameters to a whole batch, on its device, fields and frame included."""
        ...

    def tokenizer(self) -> Tokenizer: ...

    def write(self, prediction: np.ndarray, header: Header, path: Path) -> Path:
        """Write a label map (*S) of the stored lattice on the grid of the source file. Returns the file written."""
        ...


@cache
def modalities() -> dict[str, Any]:
    """name -> entry point of every installed modality; nothing is imported yet."""
    return {e.name: e for e in entry_points(group="meristem.modalities")}


def modality_class(name: str) -> type[Modality]:
    """The class registered under `name`. Raises RecipeError with the nearest names."""
    known = modalities()
    if name not in known:
        near = get_close_matches(name, known) or sorted(known)
        raise RecipeError(f"no modality called '{name}'", f"Installed: {', '.join(near)}.")
    try:
        cls: type[Modality] = known[name].load()
    except (ImportError, AttributeError) as error:
        raise RecipeError(f"the modality '{name}' is installed but cannot be loaded: {error}",
                          "Repair or remove the package that brings it.") from None
    return cls
