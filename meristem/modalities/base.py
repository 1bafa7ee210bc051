"""What a modality is: the protocol every kind of data follows, and the registry an outside package can join."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cache, cached_property
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from meristem.errors import DataError, RecipeError
from meristem.modalities.facts import Facts
from meristem.modalities.frame import Frame
from meristem.modalities.objects import Objects
from meristem.modalities.rng import Rng
from meristem.modalities.stream import Edges, TokenStream

EXCLUDED = "excluded"  # a stored companion, 1 where an element of a sample counts in no loss of pretraining
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

    shape: lattice of the stored array, channels first: (C, *S); a set (points, nodes) is a lattice of one axis. affine:
    (D+1, D+1) stored index -> source, in the modality's unit; where elements carry coordinates: those -> source. spacing: per
    axis, size of one lattice step. scale, offset: per channel, stored integer * scale + offset is the value an encoder sees
    (normalisation folded in). pad: the value, per channel and normalised, outside the sample.
    source: what `write` needs to put a prediction back on the file's own grid (shape, affine, resampling, crop); plain JSON.
    anchors: up to 64 stored positions of labelled elements, spread evenly over the classes, for crops that must hold some.
    tables: what is stored beside the lattice (`Sample.tables`), for draws that follow it; given to `draw` and `edges` only.
    """

    shape: tuple[int, ...]
    affine: tuple[tuple[float, ...], ...]
    spacing: tuple[float, ...]
    scale: tuple[float, ...] = (1.0,)
    offset: tuple[float, ...] = (0.0,)
    pad: tuple[float, ...] = (0.0,)
    source: Mapping[str, Any] = field(default_factory=dict)
    anchors: tuple[tuple[int, ...], ...] = ()
    tables: Mapping[str, np.ndarray] = field(default_factory=dict, compare=False)


@dataclass
class Sample:
    """A whole decoded file: array (C, *S), its header, and companions on the same lattice (mask: integers (*S)).

    array None: it stays in its files, whose windows `Modality.fetch` decodes when they are asked for. tables: arrays of other
    shapes (the edges of a graph). notes: what `data check` says of it beside its shape, by name. fingerprint: by which a copy
    of it is known again (`likeness`); empty where there is none.
    """

    array: np.ndarray | None
    header: Header
    fields: dict[str, np.ndarray] = field(default_factory=dict)
    tables: dict[str, np.ndarray] = field(default_factory=dict)
    notes: dict[str, float] = field(default_factory=dict)
    fingerprint: bytes = b""


@dataclass(frozen=True)
class Draw:
    """One drawn look at a sample, decided before any byte is read.

    start, size: the window in the stored lattice (may reach outside: padded). shape: the view's lattice after resizing.
    params: what augmentation will do to it, by name; also the pretext labels (int64 numbers).
    index: places along the first axis, in the order shown, where that is no plain window (strided, repeated, reversed): as
    many as `shape` says, −1 for nothing (padding). spacing: the view's own, where it is not the sample's.
    The views of a set may differ in `shape`: a batch is padded to its longest.
    """

    start: tuple[int, ...]
    size: tuple[int, ...]
    shape: tuple[int, ...]
    params: Mapping[str, Any] = field(default_factory=dict)
    index: tuple[int, ...] = ()
    spacing: tuple[float, ...] = ()


@dataclass(frozen=True)
class Look:
    """Which look is drawn: `number` of the view's `count`, at the sample whose place in the run's stream is `cursor`.

    about: the element of the sample that the look should show, −1 where any will do. centre: the stored place of a lattice that
    a crop should have in its middle, () where any will do.
    """

    seed: int
    cursor: int
    number: int
    view: str
    about: int = -1
    centre: tuple[int, ...] = ()

    @cached_property
    def rng(self) -> Rng:
        """Its own random numbers, of one sample."""
        return Rng.of(self.seed, self.cursor * LOOKS + self.number, self.view)

    @cached_property
    def sample(self) -> Rng:
        """Random numbers that all looks of all views of that sample share in this step."""
        return Rng.of(self.seed, self.cursor, "all looks")


@dataclass
class Links:
    """The edges of one look: pairs (2, E) places in the view, kind (E,), value (E, K) or None, as in `Edges`; numpy."""

    pairs: np.ndarray
    kind: np.ndarray
    value: np.ndarray | None = None


@dataclass
class View:
    """Drawn looks at the items of a batch, all of one name and size.

    array: (B·count, C, *S) float. item: (B·count,) place of the sample in the batch. look: (B·count,) which of the `count`
    looks this is. params: name -> (B·count, …), drawn values; never given to an encoder. fields: companions carried through
    the same geometry (mask: (B·count, *S) int64). weight: (B·count, 1, *S) per element, 0 outside the sample.
    index: (B·count, N) of a set: which stored element each is, −1 for padding. edges: between the elements of a set.
    """

    name: str
    array: Tensor
    frame: Frame
    item: Tensor
    look: Tensor
    params: dict[str, Tensor] = field(default_factory=dict)
    fields: dict[str, Tensor] = field(default_factory=dict)
    weight: Tensor | None = None
    index: Tensor | None = None
    edges: Edges | None = None

    def __len__(self) -> int:
        return self.array.shape[0]

    def select(self, rows: Tensor) -> View:
        """The given rows (n,), as a view of the same name."""
        return replace(self, array=self.array[rows], frame=self.frame.select(rows), item=self.item[rows], look=self.look[rows],
                       params={k: v[rows] for k, v in self.params.items()}, fields={k: v[rows] for k, v in self.fields.items()},
                       weight=None if self.weight is None else self.weight[rows],
                       index=None if self.index is None else self.index[rows],
                       edges=None if self.edges is None else self.edges.select(rows))

    def to(self, device: torch.device | str) -> View:
        def move(x: Tensor) -> Tensor:
            return x.to(device, non_blocking=True)

        return replace(self, array=move(self.array), frame=self.frame.to(device), item=move(self.item), look=move(self.look),
                       params={k: move(v) for k, v in self.params.items()}, fields={k: move(v) for k, v in self.fields.items()},
                       weight=None if self.weight is None else move(self.weight),
                       index=None if self.index is None else move(self.index),
                       edges=None if self.edges is None else self.edges.to(device))


class Tokenizer(nn.Module):
    """View <-> tokens of one modality.

    token_size: numbers of a token's content, of so many `channels`, channels first. structure: modules for
    `TokenStream.structure` are made by `places`; 0 where a stream has none. edge_kinds: types of edges, 0 where there are no
    edges; edge_values: numbers that each edge has. coordinates: how many of the first channels of a token are coordinates
    relative to its position, in the view's frame. kinds: of channels,
    where a token is of one channel (`TokenStream.kind`); 0 where it is of all.
    """

    mask_unit: tuple[int, ...]
    token_size: int
    channels: int = 1
    structure: int = 0
    edge_kinds: int = 0
    edge_values: int = 0
    coordinates: int = 0
    kinds: int = 0

    def stream(self, view: View) -> TokenStream:
        raise NotImplementedError

    def embedding(self, width: int) -> nn.Module:
        """A module TokenStream -> (B, n, width); positions are the encoder's business."""
        raise NotImplementedError

    def places(self, width: int) -> nn.Module | None:
        """A module `TokenStream.structure` (B, n, S) -> (B, n, width), added to tokens; None where there is none."""
        return None

    def fold(self, content: Tensor, lattice: tuple[int, ...]) -> Tensor:
        """Token content (B, N, P) of a whole lattice back to an array (B, C, *S); differentiable."""
        raise NotImplementedError


class ViewSettings(Settings):
    """What every modality's view has in common; a modality adds its own size, crop and augmentation keys.

    partner: shows not the sample itself but the other one of a pair with it; of several one that is drawn for each step.
    """

    count: int = 1
    partner: bool = False

    def plain(self) -> Self:
        """The view of a whole sample as evaluation shows it: nothing random, of the same size; its looks are averaged."""
        raise NotImplementedError


@dataclass(frozen=True)
class Group:
    """Files that are one sample together. subject: whose they say they are, '' where they do not."""

    files: tuple[Path, ...]
    subject: str = ""


Lost = tuple[tuple[Path, ...], DataError]
"""Files that cannot be used, and why."""


@dataclass(frozen=True)
class Element:
    """One sample of a file that holds several. place: `name/number` in it. subject: '' for one of its own, None: that of its
    file. split: as declared.

    fold: which fold of a declared cross-validation tests it, −1 where none is declared. meta: other columns.
    """

    place: str
    label: str | None = None
    subject: str | None = ""
    split: str = ""
    fold: int = -1
    meta: Mapping[str, float | str] = field(default_factory=dict)


@runtime_checkable
class Modality(Protocol):
    """Reads and writes one kind of data; knows its axes and units. Instances are built from a recipe's `modality` entry.

    Everything but `read`, `fetch` and `write` is pure. suffixes: of its files. members: of files of which a whole folder is one
    sample. `Options` and `ViewOptions` are pydantic models: recipes are validated by them.
    A class may add `version` (a number; another one makes cached samples stale), `later` (names of the options that `read` and
    `fetch` never look at, so that samples serve whatever these say), `beside(path)` (the other files that one is read with), a
    static `recognised(path) -> bool` (whether a file of a suffix that others have too is its own), `likeness` (how the
    fingerprints that its `read` gives to samples are compared; without, copies are known by their bytes alone) and `grows` (see
    `Growing`).
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

    def edges(self, header: Header, draw: Draw) -> Links | None:
        """The edges among what a look shows, of samples that have `tables`."""
        ...

    def load(self, window: np.ndarray, draw: Draw, interpolate: bool) -> Tensor:
        """A window (C, *size), as stored or fetched, to the view's lattice (C, *shape); nearest for labels."""
        ...

    def augment(self, view: View, settings: ViewSettings) -> View:
        """Apply the drawn parameters to a whole batch, on its device, fields and frame included."""
        ...

    def tokenizer(self) -> Tokenizer: ...

    def example(self, size: tuple[int, ...], rng: Rng) -> View:
        """Noise in the shape of a plain view of this size, a row for each key of `rng`, with a mask of two classes.

        Item of each row: its number; look 0. The card's reference input is made of it, so it must never change.
        """
        ...

    def elements(self, path: Path) -> Sequence[Element] | None:
        """The samples in a file that holds several; none where it is no data (an index, a label file); None: it is one sample.

        `read` gets an element as the path `file#name/number`, `Element.place` behind the mark. Raises DataError.
        """
        ...

    def fitted(self, paths: Sequence[Path]) -> Self:
        """With the options that these samples settle (how many channels a node has); itself where all are settled."""
        ...

    def write(self, prediction: np.ndarray, header: Header, path: Path) -> Path:
        """Write a label map (*S) of the stored lattice on the grid of the source file. Returns the file written."""
        ...


@runtime_checkable
class Placing(Protocol):
    """A modality whose samples may have annotated objects."""

    def placed(self, objects: Objects, header: Header) -> Objects:
        """Objects as files have them, in the source coordinates of their sample. Raises DataError (box) for one that cannot be
        in it.
        """
        ...

    def annotated(self, box: np.ndarray, header: Header) -> np.ndarray:
        """The inverse, of boxes: (K, n) in source coordinates, as files have them."""
        ...


@runtime_checkable
class Growing(Protocol):
    """A modality that says how its views can be made larger, so that the growth of cost can be measured.

    grows: what there can be more of, by name (frames, points) -> which numbers of a view's `size` count it.
    """

    grows: Mapping[str, tuple[int, ...]]

    def grown(self, times: float) -> Modality:
        """With the options for views of so many times the elements; itself where tokens follow from a view alone."""
        ...

    def noise(self, size: tuple[int, ...], rng: Rng) -> View:
        """As `example`, of any size; nothing depends on what it holds."""
        ...


@runtime_checkable
class Telling(Protocol):
    """A modality that says more of its files to `data check` than a sample holds."""

    def facts(self, paths: Sequence[Path], sample: Sample) -> Facts:
        """Of the files as they are, before anything is oriented, clipped or normalised. sample: what `read` made of them."""
        ...


@runtime_checkable
class Identifying(Protocol):
    """A modality whose files have headers that may say whose they are."""

    def identity(self, path: Path) -> Sequence[str]:
        """Places in a file, usable or not, that hold what may say whose it is: names of header elements, never their values."""
        ...


@runtime_checkable
class Calling(Protocol):
    """A modality whose files give the elements of a sample names. They may be people's: they are read where predictions are
    written, and kept nowhere.
    """

    def called(self, paths: Sequence[Path]) -> Sequence[str]:
        """Of the elements in their order; nothing where the file numbers them from 0."""
        ...


@runtime_checkable
class Gathering(Protocol):
    """A modality of which several files may be one sample, wherever they lie: it is in the files who belongs together."""

    @staticmethod
    def gather(files: Sequence[Path]) -> tuple[list[Group], list[Lost]]:
        """The samples in these files; and files that look like it and are none, with the reason. Others are in neither list."""
        ...


@runtime_checkable
class Archiving(Protocol):
    """A modality whose samples may come from an archive that predictions go back to, with references to their source."""

    def archive(self, prediction: np.ndarray, header: Header, paths: Sequence[Path], names: Mapping[int, str], recipe: str,
                path: Path) -> Path | None:
        """`write`, in the archive's own format beside it; None where the sample came from none.

        paths: of the sample, whose identity is copied from there. names: value -> class. recipe: hash of the recipe that the
        prediction was made by. Raises DataError where the source lacks what the archive wants.
        """
        ...


DIGITS = 4000  # of a number, more than which Python makes none of


def natural(name: str) -> list[str | int]:
    """A key that sorts frame_2 before frame_10."""
    return [int(part[:DIGITS]) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def member_files(folder: Path, members: Iterable[str]) -> list[Path]:
    """The files of one sample that is a folder, in natural order; hidden ones are no data."""
    if not folder.is_dir():
        return []
    ends = tuple(members)
    return sorted((f for f in folder.iterdir() if not f.name.startswith(".") and f.name.lower().endswith(ends)),
                  key=lambda f: natural(f.name))


def split_element(path: Path) -> tuple[Path, str, int] | None:
    """(file, name, number) of an element's path `file#name/number`; None for an ordinary file."""
    found = re.fullmatch(r"(.*\.[^/#]+)#([^/#]+)/(\d+)", str(path))
    return (Path(found[1]), found[2], int(found[3])) if found else None


def raw_pad(header: Header, dtype: str) -> np.ndarray:
    """(C,) stored values nearest to the header's pad."""
    raw = (np.array(header.pad) - np.array(header.offset)) / np.array(header.scale)
    kind = np.dtype(dtype)
    if np.issubdtype(kind, np.integer):
        info = np.iinfo(kind)
        raw = np.clip(np.rint(raw), info.min, info.max)
    return raw.astype(kind)


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
