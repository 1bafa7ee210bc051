"""Montages: every tile shows its part, comes back with its own keys, and JigClu is the authors'."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from meristem.errors import RecipeError
from meristem.modalities.rng import Rng
from meristem.modalities.stream import TokenStream
from meristem.platform.assembly import Assembly, total
from meristem.platform.derived.montage import Montage
from meristem.platform.encoders.base import Encoder
from meristem.platform.objectives import Encoded, Items, Loss, Plan
from meristem.platform.recipe import load
from meristem.platform.step import Batch, Step

SMALL = ("encoder.unet={widths: [8, 12], blocks: [1, 1], decoder: false}", "views.p.size=[16, 16]",
         "modality.image.patch=[4, 4]", "train.seed=1")
UNCUT = "derived.m.montage={overlap: 0.0, area: [1, 1], aspect: [1, 1], flip: [0, 0]}"  # each tile is its quarter as it is


def assemble(*more: str) -> Assembly:
    torch.manual_seed(0)
    return Assembly(load("image/jigclu", [*SMALL, *more]))


def draw(assembly: Assembly, n: int = 5, first: int = 0) -> Batch:
    rows = 4 * n
    view = assembly.recipe.modality.example((16, 16), Rng.of(first, torch.arange(rows), "p"))
    view = replace(view, item=torch.arange(n).repeat_interleave(4), look=torch.arange(4).repeat(n))
    return Batch(Items(torch.arange(n), torch.arange(first, first + n)), {"p": view})


def mean(loss: Loss) -> float:
    return float(loss.total.detach() / loss.count)


class Raw(Encoder):
    """The array itself, each element a token."""

    width = 5

    def forward(self, stream: TokenStream, plan: Plan | None = None, *, want: frozenset[str] = frozenset()) -> Encoded:
        tokens = stream.array.flatten(2).transpose(1, 2)
        return Encoded(tokens, {"mean": tokens.mean(1)}, torch.ones(tokens.shape[:2], dtype=torch.bool),
                       lattice=tuple(stream.array.shape[2:]))


def jigclu() -> Assembly:
    """Two linear maps to 6 and one to 4, drawn in this order, on means of raw tiles of five channels."""
    assembly = assemble("modality.image.channels=5", "heads.projector.mlp={hidden: 5, out: 6}")
    assembly.encoder, g = Raw(), torch.Generator().manual_seed(0)
    assembly.objectives["location"].classifier = torch.nn.Linear(5, 4)
    layers = assembly.heads["projector"].layers
    layers[0] = torch.nn.Linear(5, 5)
    for linear in (layers[0], layers[2], assembly.objectives["location"].classifier):
        for p in (linear.weight, linear.bias):
            p.data.copy_(torch.randn(p.shape, generator=g))
    return assembly


def test_both_losses_are_the_authors() -> None:
    """dvlab-research/JigsawClustering at 1490f3b: JigClu.forward in one process on the tiles of this batch in this order, with
    `Raw` pooled to 2 × 2 for an encoder, and the linear maps of `jigclu`.
    """
    assembly = jigclu()
    losses = assembly(draw(assembly), 0.0)
    assert mean(losses["clusters"]) == pytest.approx(3.88303995, rel=1e-5)
    assert mean(losses["location"]) == pytest.approx(2.70641828, rel=1e-5)
    assert losses["clusters"].count == losses["location"].count == 20


def tiles(array: Tensor) -> Tensor:
    """(B, C, 16, 16) to (B, 4, C, 8, 8), in raster order."""
    return array.unflatten(3, (2, 8)).unflatten(2, (2, 8)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


@given(st.integers(0, 50), st.integers(1, 6))
@settings(max_examples=15, deadline=None)
def test_every_tile_is_somewhere_once_and_goes_back_to_its_row(first: int, n: int) -> None:
    assembly = assemble(UNCUT)
    batch = draw(assembly, n, first)
    step = Step(assembly, batch, 0.0, 0)
    p, m = step.view("p"), step.view("m")
    rows = m.params["rows"]
    assert m.array.shape == (n, 3, 16, 16) and sorted(rows.flatten().tolist()) == list(range(4 * n))
    cut, quarters = tiles(m.array), tiles(p.array)
    for b in range(n):
        for t in range(4):
            row = int(rows[b, t])
            torch.testing.assert_close(cut[b, t], quarters[row, int(p.look[row])], atol=1e-5, rtol=0)


def test_the_shuffle_is_the_seeds_and_mixes_pictures() -> None:
    assembly = assemble()
    rows = [Step(assembly, draw(assembly, 8), 0.0, seed).view("m").params["rows"] for seed in (0, 0, 1)]
    assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])
    assert any(len(set((r // 4).tolist())) > 1 for r in rows[0])


@given(st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_a_window_lies_in_its_part_and_has_its_share_of_it(seed: int) -> None:
    """Part i of a 2 × 2 grid is 0.8 of each side, from the corner i, with an overlap of 0.3."""
    montage = Montage(of="p", grid=(2, 2), overlap=0.3, area=(0.2, 0.5), flip=(0.0, 1.0))
    windows = montage._windows(torch.arange(8) % 4, Rng.of(seed, torch.arange(8)))
    for i, w in enumerate(windows.double()):
        corners = torch.stack([w @ torch.tensor([x, y, 1.0]).double() for x in (-1, 1) for y in (-1, 1)])
        low, high = (corners.amin(0).flip(0) + 1) / 2, (corners.amax(0).flip(0) + 1) / 2  # rows, columns; 0 to 1
        start = torch.tensor([0.2 * (i % 4 // 2), 0.2 * (i % 2)]).double()
        assert (low >= start - 1e-6).all() and (high <= start + 0.8 + 1e-6).all()
        assert 0.2 - 1e-6 <= float((high - low).prod()) / 0.64 <= 0.5 + 1e-6 or bool((high - low > 0.8 - 1e-6).any())
        assert 0.75 - 1e-6 <= float((high - low)[0] / (high - low)[1]) <= 4 / 3 + 1e-6 or bool((high - low > 0.8 - 1e-6).any())
        assert w[0, 0] < 0 < w[1, 1] and w[0, 1] == w[1, 0] == 0  # mirrored along the columns alone


@given(st.integers(0, 10**6))
@settings(max_examples=15, deadline=None)
def test_a_mirrored_tile_shows_the_same_window_mirrored(seed: int) -> None:
    x = torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(seed))
    plain, mirrored = (Montage(of="p", area=(0.2, 1.0), flip=f)._windows(torch.arange(4), Rng.of(seed, torch.arange(4)))
                       for f in ((0.0, 0.0), (0.0, 1.0)))
    shown = [torch.nn.functional.grid_sample(x, torch.nn.functional.affine_grid(w, [4, 1, 8, 8], align_corners=False),
                                             align_corners=False) for w in (plain, mirrored)]
    torch.testing.assert_close(shown[0].flip(3), shown[1], atol=1e-4, rtol=1e-4)


def test_units_of_tiles_are_means_of_their_share_with_the_keys_of_what_they_show() -> None:
    assembly = jigclu()
    batch = draw(assembly)
    batch.items.labels["label"] = torch.tensor([3, 1, 4, 1, 5])
    step = Step(assembly, batch, 0.0, 0)
    units, rows = step.units("m", level="tiles"), step.view("m").params["rows"].flatten()
    torch.testing.assert_close(units.z, tiles(step.view("m").array).mean((3, 4)).flatten(0, 1), atol=1e-5, rtol=0)
    assert torch.equal(units.key["item"], rows // 4) and torch.equal(units.key["part"], rows % 4)
    assert torch.equal(units.key["label"], batch.items.labels["label"][rows // 4])
    own = step.units("p", level="mean").key["view"]
    assert torch.equal(units.key["view"], own[rows])
    assert set(step.units("m", level="mean").key["view"].tolist()).isdisjoint(own.tolist())
    assert step.stream("m").source is not None and step.stream("m").source.isnan().all()  # a montage is nowhere


def test_one_pass_one_step_and_a_batch_learnt_by_heart() -> None:
    assembly = assemble()
    batch = draw(assembly)
    optimiser = torch.optim.AdamW(assembly.parameters(), lr=3e-3)
    course = []
    for _ in range(25):
        losses = assembly(batch, 0.0)
        assert assembly.last_step is not None and assembly.last_step.passes == ["encoder(m)"]
        course.append({name: mean(loss) for name, loss in losses.items()})
        optimiser.zero_grad()
        total(losses).backward()
        assert all(p.grad is not None for p in assembly.parameters())
        optimiser.step()
        assembly.after(0.0)
    assert course[-1]["clusters"] < 0.7 * course[0]["clusters"] and course[-1]["location"] < 0.9 * course[0]["location"]


def test_keys_of_every_rank_are_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    assembly = assemble()
    batch = draw(assembly)
    other = Step(assembly, draw(assembly, first=50), 0.0, 1).units("m", level="tiles", head="projector")
    alone = mean(assembly(batch, 0.0)["clusters"])
    monkeypatch.setattr(Step, "gather", lambda step, units, even: type(units).cat([units, other]))
    assert mean(assembly(batch, 0.0)["clusters"]) > alone + 0.1


def test_a_transformer_has_tiles_too() -> None:
    assembly = assemble("encoder.transformer={width: 24, depth: 1, heads: 2}", "modality.image.patch=[4, 4]")
    assert assembly(draw(assembly), 0.0)["clusters"].count == 20


@pytest.mark.parametrize(("changes", "says"), [
    (["views.p.count=3"], "set views.p.count=4"),
    (["views.p.size=[15, 16]"], "cannot be as large as 'p', [15, 16]"),
    (["derived.m.montage.grid=[2, 2, 1]"], "a number for each of the 2 axes"),
    (["derived.m.montage.aspect=[0, 1]"], "two positive numbers in order"),
    (["objectives.location.pretext.view=p"], "level tiles needs a montage, and view 'p' is none"),
    (["objectives.clusters.contrastive.queries=[p]"], "level tiles needs a montage, and view 'p' is none"),
    (["masking.m={random: {corruption: replace}}", "objectives.clusters.contrastive.queries=[{view: m, masked: true}]"],
     "do not mask it"),
])
def test_what_cannot_be_is_refused_with_the_reason(changes: Sequence[str], says: str) -> None:
    with pytest.raises(RecipeError) as error:
        load("image/jigclu", changes)
    assert says in str(error.value)


def test_sets_have_no_parts_to_set_side_by_side() -> None:
    with pytest.raises(RecipeError, match="points data are sets"):
        load("points/mae", ["derived={m: {montage: {of: x}}}"])
