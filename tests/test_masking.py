"""Maskings: exact counts, pure draws, whole cells, blocks that are blocks, nothing predicted where there is nothing."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from meristem.errors import RecipeError
from meristem.modalities.rng import Rng
from meristem.modalities.stream import LatticeStream, TokenStream
from meristem.platform.masked.masking import Block, Masking, Random, RunningCell, informative
from meristem.platform.masked.parts import MASKINGS
from meristem.platform.recipe import Recipe, build, load, override, read


def lattice(shape: tuple[int, ...], batch: int = 3, weight: torch.Tensor | None = None) -> LatticeStream:
    """A stream with one element per token."""
    return LatticeStream(torch.zeros(batch, 1, *shape), (1,) * len(shape), None, torch.arange(batch), weight)


def ragged(valid: torch.Tensor) -> TokenStream:
    return TokenStream(torch.zeros(*valid.shape, 2), None, valid, torch.arange(len(valid)))


def rng(batch: int, seed: int = 0) -> Rng:
    return Rng.of(seed, torch.arange(batch), "mask")


def whole_cells(hidden: torch.Tensor, shape: tuple[int, ...], unit: tuple[int, ...]) -> bool:
    """Every cell is hidden as a whole or not at all, by looking at each token's cell corner."""
    grid = hidden.reshape(-1, *shape)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in shape)).reshape(-1, len(shape)).tolist():
        corner = [p // u * u for p, u in zip(place, unit, strict=True)]
        if not torch.equal(grid[(slice(None), *place)], grid[(slice(None), *corner)]):
            return False
    return True


@settings(max_examples=40, deadline=None)
@given(cells=st.lists(st.integers(2, 5), min_size=1, max_size=3), own=st.integers(1, 3), other=st.integers(1, 2),
       ratio=st.floats(0.3, 0.7), name=st.sampled_from(("block", "random")), seed=st.integers(0, 99))
def test_dropping_keeps_the_same_exact_number_in_every_row(
        cells: list[int], own: int, other: int, ratio: float, name: str, seed: int) -> None:
    grain = math.lcm(own, other)
    shape = tuple(n * grain for n in cells)
    masking: Masking = MASKINGS[name].model_validate({"ratio": ratio, "unit": (own,) * len(cells)})
    plan = masking.plan(lattice(shape), rng(3, seed), (other,) * len(cells))
    m, n = math.prod(cells), math.prod(shape)
    hide = math.floor(m * ratio + 0.5)
    assert (plan.hidden.sum(1) == hide * grain ** len(cells)).all()
    assert whole_cells(plan.hidden, shape, (grain,) * len(cells))
    assert plan.keep is not None and plan.keep.shape == (3, n - hide * grain ** len(cells))
    assert (plan.keep.diff(dim=1) > 0).all()
    assert not plan.hidden.gather(1, plan.keep).any()
    assert torch.equal(plan.predict, plan.hidden.float())


@pytest.mark.parametrize("masking", [Random(ratio=0.6), Block(ratio=(0.1, 0.5), prob=0.5, corruption="replace")])
def test_a_rows_mask_depends_on_its_own_key_alone(masking: Masking) -> None:
    key = rng(8).key
    together = masking.plan(lattice((6, 6), 8), Rng(key), ())
    alone = masking.plan(lattice((6, 6), 1), Rng(key[5:6]), ())
    again = masking.plan(lattice((6, 6), 8), Rng(key), ())
    assert torch.equal(together.hidden[5:6], alone.hidden)
    assert torch.equal(together.hidden, again.hidden)
    assert len({tuple(row.tolist()) for row in together.hidden if row.any()}) == int(together.hidden.any(1).sum()) > 2


def test_random_hides_every_token_equally_often() -> None:
    rows = 4000
    plan = Random(ratio=0.75).plan(lattice((4, 4), rows), rng(rows), ())
    often = plan.hidden.float().mean(0)
    assert (often - 0.75).abs().max() < 5 * math.sqrt(0.75 * 0.25 / rows)
    pairs = (plan.hidden[:, 0] & plan.hidden[:, 1]).float().mean()  # without replacement: 12/16 · 11/15
    assert abs(pairs - 0.75 * 11 / 15) < 5 * math.sqrt(0.25 / rows)


def test_padding_is_not_predicted_and_does_not_change_the_ratio() -> None:
    valid = torch.arange(40)[None] < torch.tensor([[40], [20], [8], [0]])
    plan = Random(ratio=0.75).plan(ragged(valid), rng(4), ())
    assert plan.keep is not None and plan.keep.shape == (4, 10)
    assert (plan.hidden & valid).sum(1).tolist() == [30, 15, 6, 0]
    assert torch.equal(plan.predict, (plan.hidden & valid).float())
    shorter = Random(ratio=0.75).plan(ragged(valid[1:2, :32]), Rng(rng(4).key[1:2]), ())
    assert int((shorter.hidden & valid[1:2, :32]).sum()) == 15  # a longer batch mate hides no more and no less


def test_tokens_outside_the_sample_are_not_predicted() -> None:
    weight = torch.ones(2, 1, 8, 8)
    weight[1, :, :, 4:] = 0
    stream = LatticeStream(torch.zeros(2, 3, 8, 8), (2, 2), None, torch.arange(2), weight)
    live = informative(stream)
    assert live.sum(1).tolist() == [16, 8]
    for masking in (Random(ratio=0.5), Block(ratio=0.5)):
        plan = masking.plan(stream, rng(2), ())
        assert (plan.predict[~live] == 0).all()
        assert torch.equal(plan.predict[live], plan.hidden[live].float())
    assert int(Random(ratio=0.5).plan(stream, rng(2), ()).predict[1].sum()) == 4


def agreement(hidden: torch.Tensor, shape: tuple[int, ...]) -> float:
    """Of neighbouring pairs with a hidden token, the share in which both are."""
    grid = hidden.reshape(-1, *shape)
    pairs = [(grid.narrow(1 + a, 1, s - 1), grid.narrow(1 + a, 0, s - 1)) for a, s in enumerate(shape)]
    return sum((x & y).sum().item() for x, y in pairs) / sum((x | y).sum().item() for x, y in pairs)


@pytest.mark.parametrize("shape", [(16, 16), (8, 8, 8), (40,)])
def test_blocks_are_connected_and_favour_no_corner(shape: tuple[int, ...]) -> None:
    rows, n = 2000, math.prod(shape)
    stream = lattice(shape, rows)
    blocks, single = (m.plan(stream, rng(rows), ()).hidden for m in (Block(ratio=0.4, min_block=n // 16), Random(ratio=0.4)))
    assert agreement(blocks, shape) > 2 * agreement(single, shape)
    often = blocks.float().mean(0).reshape(shape)
    assert often.min() > 0.01
    for axis in range(len(shape)):
        assert (often - often.flip(axis)).abs().max() < 7 * math.sqrt(0.25 * 2 / rows)


def sequential_boxes(generator: random.Random, side: int, wanted: int, least: int, aspect: float) -> torch.Tensor:
    """The published algorithm, box by box: each adds at least one cell and none too many, or is drawn again."""
    mask = torch.zeros(side, side, dtype=torch.bool)
    for _ in range(100):
        left = wanted - int(mask.sum())
        if left < least:
            break
        area, ratio = generator.uniform(least, left), math.exp(generator.uniform(math.log(aspect), -math.log(aspect)))
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if h >= side or w >= side:
            continue
        top, start = generator.randint(0, side - h), generator.randint(0, side - w)
        trial = mask.clone()
        trial[top:top + h, start:start + w] = True
        if mask.sum() < trial.sum() <= wanted:
            mask = trial
    return mask


def test_blocks_look_like_those_of_the_published_algorithm() -> None:
    generator, shape = random.Random(0), (14, 14)
    theirs = torch.stack([sequential_boxes(generator, 14, 75, 16, 0.3) for _ in range(400)])
    ours = Block(ratio=75 / 196, min_block=16).plan(lattice(shape, 2000), rng(2000), ()).hidden.reshape(-1, *shape)
    assert abs(agreement(ours, shape) - agreement(theirs, shape)) < 0.06
    assert (ours.float().mean(0) - theirs.float().mean(0) * 75 * len(theirs) / theirs.sum()).abs().max() < 0.18


def test_one_block_that_fills_the_count_is_a_box() -> None:
    """With the least box as large as what is wanted, the first box is most of the mask; the rest tops it up."""
    plan = Block(ratio=0.25, min_block=64, aspect=1.0).plan(lattice((16, 16), 50), rng(50), ())
    for row in plan.hidden.reshape(50, 16, 16):
        y, x = torch.nonzero(row, as_tuple=True)
        assert (int(y.max() - y.min()), int(x.max() - x.min())) == (7, 7)  # 64 cells, sides 8 × 8


def test_aspect_bounds_the_sides_of_a_box() -> None:
    plan = Block(ratio=0.05, min_block=51, aspect=0.25).plan(lattice((32, 32), 400), rng(400), ())
    sides = []
    for row in plan.hidden.reshape(400, 32, 32):
        y, x = torch.nonzero(row, as_tuple=True)
        sides.append((int(y.max() - y.min()) + 1, int(x.max() - x.min()) + 1))
    assert min(h / w for h, w in sides) < 0.5 and max(h / w for h, w in sides) > 2
    boxes = [h / w for h, w in sides if h * w < 60]  # nothing but the first box
    assert len(boxes) > 100 and min(boxes) > 0.2 and max(boxes) < 5


def test_a_range_and_a_probability() -> None:
    masking = Block(ratio=(0.1, 0.5), prob=0.5, corruption="replace")
    plan = masking.plan(lattice((10, 10), 2000), rng(2000), ())
    count = plan.hidden.sum(1)
    assert plan.keep is None
    assert abs((count > 0).float().mean() - 0.5) < 0.06
    some = count[count > 0]
    assert some.min() >= 10 and some.max() <= 50 and abs(some.float().mean() - 30) < 2
    with pytest.raises(ValidationError, match="corruption: replace"):
        Block(ratio=0.4, prob=0.5)
    with pytest.raises(ValidationError, match="corruption: replace"):
        Block(ratio=(0.1, 0.5))


def test_what_cannot_be_masked_is_refused_with_the_reason() -> None:
    with pytest.raises(RecipeError, match="6×6 tokens cannot be masked in units of 4×4"):
        Random(ratio=0.5).plan(lattice((6, 6)), rng(3), (4, 4))
    with pytest.raises(RecipeError, match="has 3 axes"):
        Random(ratio=0.5, unit=(1, 1, 2)).plan(lattice((6, 6)), rng(3), ())
    with pytest.raises(RecipeError, match="no lattice"):
        Random(ratio=0.5).plan(ragged(torch.ones(2, 8, dtype=torch.bool)), rng(2), (2,))
    with pytest.raises(RecipeError, match="lie on none"):
        Block(ratio=0.5).plan(ragged(torch.ones(2, 8, dtype=torch.bool)), rng(2), ())
    with pytest.raises(RecipeError, match="hides 1 of them"):
        Random(ratio=0.75).plan(lattice((4, 4)), rng(3), (4, 4))
    with pytest.raises(ValidationError):
        Random(ratio=1.0)


@settings(max_examples=40, deadline=None)
@given(shape=st.lists(st.integers(3, 6), min_size=2, max_size=3), axis=st.integers(0, 2),
       name=st.sampled_from(("block", "random")), seed=st.integers(0, 99))
def test_a_unit_as_long_as_an_axis_hides_the_same_everywhere_along_it(
        shape: list[int], axis: int, name: str, seed: int) -> None:
    axis %= len(shape)
    unit = [None if a == axis else 1 for a in range(len(shape))]
    plan = MASKINGS[name].model_validate({"ratio": 0.5, "unit": unit}).plan(lattice(tuple(shape)), rng(3, seed), ())
    grid = plan.hidden.reshape(3, *shape).movedim(1 + axis, 1).flatten(2)
    assert torch.equal(grid, grid[:, :1].expand_as(grid))
    n = math.prod(shape) // shape[axis]
    assert (grid[:, 0].sum(1) == math.floor(n * 0.5 + 0.5)).all()
    assert plan.keep is not None and plan.keep.shape[1] == math.prod(shape) - int(plan.hidden[0].sum())


@pytest.mark.parametrize("masking", [Block(ratio=0.5, min_block=9), Random(ratio=0.5)])
def test_tubes_are_the_masks_of_a_lattice_without_that_axis(masking: Masking) -> None:
    flat = masking.plan(lattice((8, 6), 20), rng(20), ()).hidden.reshape(20, 1, 8, 6)
    tubes = masking.model_copy(update={"unit": (None, 1, 1)}).plan(lattice((5, 8, 6), 20), rng(20), ()).hidden
    assert torch.equal(tubes.reshape(20, 5, 8, 6), flat.expand(-1, 5, -1, -1))


def test_a_whole_axis_and_the_encoders_own_grain_are_both_honoured() -> None:
    plan = Random(ratio=0.5, unit=(None, 1, 2)).plan(lattice((4, 6, 4)), rng(3), (2, 3, 1))
    assert whole_cells(plan.hidden, (4, 6, 4), (4, 3, 2)) and (plan.hidden.sum(1) == 48).all()
    with pytest.raises(RecipeError, match="unit of all×1 tokens was asked of tokens that lie on no lattice"):
        Random(ratio=0.5, unit=(None, 1)).plan(ragged(torch.ones(2, 8, dtype=torch.bool)), rng(2), ())


@settings(max_examples=40, deadline=None)
@given(cell=st.lists(st.integers(1, 3), min_size=1, max_size=2).filter(lambda c: math.prod(c) > 1), axis=st.integers(0, 2),
       times=st.integers(1, 3), steps=st.integers(1, 9), skipped=st.integers(1, 8), seed=st.integers(0, 99))
def test_a_running_cell_decodes_every_place_equally_often(
        cell: list[int], axis: int, times: int, steps: int, skipped: int, seed: int) -> None:
    places, axis = math.prod(cell), axis % (len(cell) + 1)
    skipped = 1 + skipped % (places - 1)
    sizes = [times * c for c in cell]
    shape = (*sizes[:axis], steps, *sizes[axis:])
    running = RunningCell(ratio=skipped / places, cell=(*cell[:axis], None, *cell[axis:]))
    index = running.decode(lattice(shape, 7), rng(7, seed))
    n = math.prod(shape)
    assert index.shape == (7, n * (places - skipped) // places) and (index.diff(dim=1) > 0).all()
    decoded = torch.zeros(7, n, dtype=torch.long).scatter(1, index, 1).reshape(7, *shape)
    for row in decoded.movedim(1 + axis, 1):  # (steps, *sizes)
        seen = []  # each step's pattern of one cell, as a list of places
        for at in row:
            patterns = set()
            for corner in torch.cartesian_prod(*(torch.arange(0, s, c) for s, c in zip(sizes, cell, strict=True))).reshape(
                    -1, len(cell)).tolist():
                window = tuple(slice(p, p + c) for p, c in zip(corner, cell, strict=True))
                patterns.add(tuple(at[window].flatten().tolist()))
            assert len(patterns) == 1  # all cells of a step are alike
            seen += patterns
        for pattern, following in itertools.pairwise(seen):
            assert following == (*pattern[1:], pattern[0])  # runs on by one place
        assert all(sum(pattern) == places - skipped for pattern in seen)
        for start in range(steps - places + 1):
            often = {sum(pattern[p] for pattern in seen[start:start + places]) for p in range(places)}
            assert often == {places - skipped}


def test_running_cells_start_anywhere_and_a_row_by_itself() -> None:
    masking = Random(ratio=0.75, unit=(None, 1, 1), decode=RunningCell(ratio=0.5, cell=(None, 2, 2)))
    stream = lattice((8, 4, 4), 64)
    plan = masking.plan(stream, rng(64), ())
    assert plan.decode is not None and plan.keep is not None
    first = [tuple(row[row < 16].tolist()) for row in plan.decode]
    assert {first.count(pattern) > 4 for pattern in set(first)} == {True} and len(set(first)) == 4
    alone = masking.plan(lattice((8, 4, 4), 1), Rng(rng(64).key[9:10]), ())
    assert alone.decode is not None and torch.equal(alone.decode, plan.decode[9:10])
    plain = masking.model_copy(update={"decode": None}).plan(stream, rng(64), ())
    assert plain.decode is None and torch.equal(plain.hidden, plan.hidden) and torch.equal(plain.predict, plan.predict)


def test_running_cells_that_cannot_be_are_refused() -> None:
    for wrong, why in (({"cell": [1, 2, 2]}, "exactly one axis is null"), ({"cell": [None, None, 2]}, "exactly one axis"),
                       ({"ratio": 0.3}, "not a whole number"), ({"cell": [None, 1, 1]}, "not a whole number")):
        with pytest.raises(ValidationError, match=why):
            RunningCell.model_validate(wrong)
    with pytest.raises(ValidationError, match="set corruption: drop"):
        Random(ratio=0.5, corruption="replace", decode=RunningCell())
    with pytest.raises(RecipeError, match="cannot be masked in units of 1×2×2"):
        RunningCell().decode(lattice((4, 5, 4)), rng(3))
    with pytest.raises(RecipeError, match="has 3 axes, the tokens 2"):
        RunningCell().decode(lattice((4, 4)), rng(3))
    with pytest.raises(RecipeError, match="lie on none"):
        RunningCell().decode(ragged(torch.ones(2, 8, dtype=torch.bool)), rng(2))


def test_a_recipe_names_whole_axes_and_running_cells() -> None:
    words = ["masking.x.random.unit=[null, 1, 1]", "masking.x.random.decode={running_cell: {ratio: 0.5, cell: [null, 2, 2]}}"]
    recipe = load("volume/mae", words)
    assert recipe.masking["x"] == Random(ratio=0.75, unit=(None, 1, 1), decode=RunningCell(ratio=0.5, cell=(None, 2, 2)))
    assert build(recipe.dump(), Recipe).hash == recipe.hash != load("volume/mae").hash
    with pytest.raises(RecipeError, match="no decoder masking called 'runing_cell'; did you mean running_cell"):
        build(override(read("volume/mae"), ["masking.x.random.decode=runing_cell"]), Recipe)


def test_a_range_from_high_to_low_is_refused() -> None:
    with pytest.raises(ValidationError, match="from low to high"):
        Block(ratio=(0.5, 0.1), corruption="replace")
