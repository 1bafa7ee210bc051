"""Time and memory of a step against how much there is of something: size, frames, points, nodes, samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch

from meristem.errors import MeristemError, RecipeError
from meristem.modalities.base import Growing
from meristem.platform.assembly import Assembly
from meristem.platform.benching.clock import clocked, held
from meristem.platform.benching.flops import work
from meristem.platform.benching.growth import exponent
from meristem.platform.benching.memory import left
from meristem.platform.benching.results import Point, Sweep
from meristem.platform.made import noise
from meristem.platform.recipe import Recipe, build

ALL, BATCH = "all", "batch"
MOST, LEAST = 6, 4  # sizes
SECONDS = 6.0  # that a step may take
SHARE = 0.6  # of the memory that is left, that a step may take
SAMPLES = 4  # of a batch on a processor, where the recipe has more: growth is asked for, not the recipe's own cost
HARDER = 2.0  # exponent that a size is expected to cost by, until it is measured


def axes(recipe: Recipe) -> Mapping[str, tuple[int, ...]]:
    """What can grow in a recipe, by name -> which numbers of its views' sizes; none of them for the batch."""
    grows = recipe.modality.grows if isinstance(recipe.modality, Growing) else {}
    return {**grows, BATCH: ()}


def chosen(recipe: Recipe, asked: Sequence[str]) -> list[str]:
    """The names that were asked for, `all` standing for all there are. Raises RecipeError where one is unknown."""
    known = axes(recipe)
    unknown = [name for name in asked if name not in (*known, ALL)]
    if unknown:
        raise RecipeError(f"{recipe.modality.name} data has no '{unknown[0]}' to sweep",
                          f"Choose of {', '.join(known)}; --sweep alone takes all.")
    return list(known) if ALL in asked else list(dict.fromkeys(asked))


def sweep(recipe: Recipe, axis: str, steps: int, say: Callable[[str], None]) -> Sweep:
    """Steps of noise at sizes of which each has about twice the tokens of the one before, from the recipe's own on.

    Batches are made prepared: neither reading nor augmentation is in the figures. There are fewer than MOST sizes where the
    next would take a step more than SECONDS, or memory more than SHARE of what is left; smaller ones than the recipe's then
    join, until there are LEAST. Raises RecipeError where none works.
    """
    points: list[Point] = []
    ended = ""
    for k in range(2 * MOST):  # some are no whole number of tokens larger than the one before
        larger = _grown(recipe, axis, 2.0**k)
        if isinstance(larger, str) or len(points) == MOST:
            ended = larger if isinstance(larger, str) else ""
            break
        if points and _elements(larger) == _elements_of(points[-1]):
            continue
        if points and (ended := _too_much(points, _elements(larger) / _elements_of(points[-1]))):
            break
        say(f"{axis} {_told(larger, axis)}")
        point = _measured(larger, steps)
        if isinstance(point, str):
            ended = point
            break
        points.append(point)
    for k in range(1, 2 * MOST):
        smaller = _grown(recipe, axis, 2.0**-k)
        if not 0 < len(points) < LEAST or isinstance(smaller, str):
            break
        if _elements(smaller) == _elements_of(points[0]):
            continue
        say(f"{axis} {_told(smaller, axis)}")
        point = _measured(smaller, steps)
        if isinstance(point, str):
            break
        points.insert(0, point)
    if not points:
        raise RecipeError(f"nothing of {axis} can be swept: {ended}", "Sweep something else, or start from another size.")
    tokens = [p.tokens for p in points]
    return Sweep(axis, tuple(points), exponent(tokens, [p.seconds for p in points]),
                 exponent(tokens, [p.bytes for p in points]), ended)


def _grown(recipe: Recipe, axis: str, times: float) -> Recipe | str:
    """The recipe with about so many times the tokens in each view, or samples in a batch; or why it cannot be."""
    samples = recipe.train.batch // recipe.train.accumulate
    if not torch.cuda.is_available():
        samples = min(samples, SAMPLES)
    plain = recipe.dump()
    plain["train"] |= {"batch": samples, "accumulate": 1}
    which = axes(recipe)[axis]
    if axis == BATCH:
        if times * samples < 1:
            return "a batch has one sample at least"
        plain["train"]["batch"] = int(samples * times)
    else:
        step = _steps(recipe)
        for view in plain["views"].values():
            size = list(view["size"])
            for i in which:
                grain = step[i] if i < len(step) else 1
                size[i] = max(round(size[i] * times ** (1 / len(which)) / grain), 1) * grain
            view["size"] = size
        modality = recipe.modality.grown(times)
        plain["modality"] = {modality.name: modality.options.model_dump(mode="json")}
    try:
        return build(plain, Recipe)
    except RecipeError as error:
        return error.what


def _steps(recipe: Recipe) -> tuple[int, ...]:
    """Elements by which a view's size can grow, per axis: whole tokens, and whole cells of an encoder's coarsest map."""
    tokenizer = recipe.modality.tokenizer()
    patch: tuple[int, ...] = getattr(tokenizer, "patch", ()) or (getattr(tokenizer, "segment", 1),)
    with torch.device("meta"):
        encoder = recipe.encoder.detached().build(tokenizer, recipe.modality.axes, recipe.modality.channels)
    grain = tuple(p * u for p, u in zip(patch, encoder.mask_unit or (1,) * len(patch), strict=False))
    coarsest = encoder.pyramid_strides[-1] if encoder.pyramid_strides else ()
    return tuple(math.lcm(g, *coarsest[i:i + 1]) for i, g in enumerate(grain))


def _measured(recipe: Recipe, steps: int) -> Point | str:
    """Figures of a size; or why there are none."""
    torch.manual_seed(recipe.train.seed)
    make = recipe.modality.noise if isinstance(recipe.modality, Growing) else None
    batch = noise(recipe, recipe.train.batch, make)
    try:
        assembly = Assembly(recipe)
        tokens = sum(int(assembly.tokenizer.stream(view).valid.sum()) for view in batch.views.values())
        source = held([batch])
        timing = clocked(recipe, assembly, source, steps, SECONDS, warm=1, prepared=True)
        taken = work(recipe, assembly, source, prepared=True).bytes
    except MeristemError as error:  # a view too small for its masks
        return error.what
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return "out of memory"
    return Point(_size(recipe), recipe.train.batch, tokens, timing.least, taken)


def _too_much(points: Sequence[Point], times: float) -> str:
    """Why a size of so many times the elements is not tried; '' where it can be. It is expected to cost as the last two sizes
    tell, and at least in proportion.
    """
    last, growth, fatter = points[-1], HARDER, HARDER
    if len(points) > 1:
        ratio = math.log(last.tokens / points[-2].tokens)
        growth = max(math.log(last.seconds / points[-2].seconds) / ratio, 1.0)
        fatter = max(math.log(last.bytes / points[-2].bytes) / ratio, 1.0)
    if (seconds := last.seconds * times**growth) > SECONDS:
        return f"the next size would take about {seconds:.0f} s a step"
    if (taken := last.bytes * times**fatter) > SHARE * left():
        return f"the next size would take about {taken / 2**30:.1f} GiB"
    return ""


def _size(recipe: Recipe) -> tuple[int, ...]:
    return tuple(next(iter(recipe.views.values())).size)  # type: ignore[attr-defined]


def _elements(recipe: Recipe) -> int:
    """Of the first view of a batch, as its recipe sizes it."""
    return recipe.train.batch * math.prod(_size(recipe))


def _elements_of(point: Point) -> int:
    return point.batch * math.prod(point.size)


def _told(recipe: Recipe, axis: str) -> str:
    return str(recipe.train.batch) if axis == BATCH else " × ".join(map(str, _size(recipe)))
