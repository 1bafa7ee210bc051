"""Targets of hidden points, maskings and relations of sets, against closed forms, double loops and the authors' formulas."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import cKDTree
from torch import Tensor

from meristem.errors import RecipeError
from meristem.modalities.base import View
from meristem.modalities.frame import Frame
from meristem.modalities.points import Points
from meristem.modalities.points.options import PointsOptions
from meristem.modalities.rng import Rng
from meristem.modalities.stream import TokenStream
from meristem.platform import recipe as recipes
from meristem.platform.assembly import Assembly
from meristem.platform.contrastive.relations import Relation, parse
from meristem.platform.masked.masking import Nothing, Region
from meristem.platform.masked.targets import Chamfer, Extent, Surface, surface
from meristem.platform.objectives import Units


def turned(seed: int = 0) -> Tensor:
    return torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(seed)))[0]


def step_of(content: Tensor, channels: int, weight: Tensor | None = None, valid: Tensor | None = None) -> Any:
    """A step with one stream of tokens of points (B, n, K, channels)."""
    b, n = content.shape[:2]
    valid = torch.ones(b, n, dtype=torch.bool) if valid is None else valid
    stream = TokenStream(content.transpose(-1, -2).flatten(2), torch.zeros(b, n, 3), valid, None, weight=weight)
    tokenizer = Points(PointsOptions(size=content.shape[2], features=("normal",) if channels == 6 else ())).tokenizer()
    return SimpleNamespace(stream=lambda view: stream, assembly=SimpleNamespace(tokenizer=tokenizer))


# ---- chamfer

def test_chamfer_equals_a_double_loop_without_repeats_and_features() -> None:
    content, made = torch.randn(2, 3, 5, 6), torch.randn(2, 3, 5, 3)
    weight = (torch.rand(2, 3, 5) > 0.3).float()
    weight[..., 0], weight[1, 2] = 1, 0  # a token of nothing
    by_token = torch.rand(2, 3)
    step = step_of(content, 6, weight)
    total, count = Chamfer().compare(step, "x", None, made.transpose(-1, -2).flatten(2), by_token)
    expected, seen = 0.0, 0.0
    for b in range(2):
        for n in range(3):
            true = [content[b, n, k, :3] for k in range(5) if weight[b, n, k]]
            if not true:
                continue
            there = sum(min(float((p - t).square().sum()) for t in true) for p in made[b, n]) / 5
            back = sum(min(float((p - t).square().sum()) for p in made[b, n]) for t in true) / len(true)
            expected, seen = expected + float(by_token[b, n]) * (there + back), seen + float(by_token[b, n])
    assert float(total) == pytest.approx(expected, rel=1e-5)
    assert float(count) == pytest.approx(seen, rel=1e-6)
    assert Chamfer().size(step.assembly.tokenizer, None) == 15  # type: ignore[arg-type]


def test_chamfer_is_point_maes_loss_by_trees() -> None:
    """Full groups: the mean of squared distances both ways over all groups, as the authors' ChamferDistanceL2 gives it."""
    true, made = torch.randn(4, 8, 32, 3) * 0.1, torch.randn(4, 8, 32, 3) * 0.1
    total, count = Chamfer().compare(step_of(true, 3), "x", None, made.transpose(-1, -2).flatten(2), torch.ones(4, 8))
    there, back = [], []
    for p, t in zip(made.flatten(0, 1).numpy(), true.flatten(0, 1).numpy(), strict=True):
        there.append(cKDTree(t).query(p)[0] ** 2)
        back.append(cKDTree(p).query(t)[0] ** 2)
    expected = sum(x.mean() for x in there) / 32 + sum(x.mean() for x in back) / 32
    assert float(total / count) == pytest.approx(expected, rel=1e-5)


def test_the_order_of_predicted_points_does_not_matter_and_the_truth_costs_nothing() -> None:
    true = torch.randn(2, 3, 6, 3)
    made = true[:, :, torch.randperm(6)].clone().requires_grad_()
    total, _ = Chamfer().compare(step_of(true, 3), "x", None, made.transpose(-1, -2).flatten(2), torch.ones(2, 3))
    assert float(total.detach()) == pytest.approx(0, abs=1e-9)
    off = (true + 0.1).requires_grad_()
    Chamfer().compare(step_of(true, 3), "x", None, off.transpose(-1, -2).flatten(2), torch.ones(2, 3))[0].backward()
    assert off.grad is not None
    assert off.grad.abs().sum() > 0


@pytest.mark.parametrize("target", ["chamfer", "surface", "extent"])
def test_targets_of_points_are_refused_elsewhere(target: str) -> None:
    with pytest.raises(RecipeError, match="points"):
        recipes.load("volume/mae", [f"objectives.pixels.masked.target={target}"])


# ---- surface

def test_a_plane_has_its_normal_and_no_variation() -> None:
    flat = torch.randn(50, 40, 3)
    flat[..., 2] = 0
    rotation = turned()
    normal, variation, plain = surface(flat @ rotation.T, torch.ones(50, 40, dtype=torch.bool), 0.02)
    torch.testing.assert_close((normal @ rotation[:, 2]).abs(), torch.ones(50), atol=1e-4, rtol=0)
    torch.testing.assert_close(variation, torch.zeros(50), atol=1e-6, rtol=0)
    assert plain.all()


def test_a_cap_of_a_sphere_varies_as_its_height_says() -> None:
    """Uniform over a cap of height h on the unit sphere: z is uniform, variance h²/12; of x and y the mean of (1 − z²)/2."""
    h, many = 0.3, 200_000
    z = 1 - h * (torch.arange(many) + 0.5).double() / many
    turn = 2.399963 * torch.arange(many).double()
    cap = torch.stack([(1 - z**2).sqrt() * turn.cos(), (1 - z**2).sqrt() * turn.sin(), z], 1).float()
    across = (1 - (1 - h + h**2 / 3)) / 2
    expected = (h**2 / 12) / (h**2 / 12 + 2 * across)
    normal, variation, _ = surface((cap @ turned().T)[None], torch.ones(1, many, dtype=torch.bool), 0.02)
    assert float(variation) == pytest.approx(expected, rel=1e-3)
    assert abs(float(normal[0] @ turned()[:, 2])) == pytest.approx(1, abs=1e-4)


def test_lines_and_balls_have_no_normal() -> None:
    line = torch.randn(30, 20, 1) * torch.tensor([1.0, 2.0, 3.0])
    everything = torch.ones(30, 20, dtype=torch.bool)
    assert not surface(line, everything, 0.02)[2].any()
    ball = torch.cat([torch.eye(3), -torch.eye(3)])[None]
    _, variation, plain = surface(ball, torch.ones(1, 6, dtype=torch.bool), 0.02)
    assert float(variation) == pytest.approx(1 / 3, abs=1e-6)
    assert not plain.any()


def test_surface_ignores_repeats_and_the_sign_of_normals() -> None:
    points = torch.randn(2, 3, 8, 3) * torch.tensor([1.0, 1.0, 0.1])
    weight = torch.ones(2, 3, 8)
    weight[..., 5:] = 0
    moved = points.clone()
    moved[..., 5:, :] += 9
    normal, variation, _ = surface(points, weight > 0, 0.02)
    made = torch.cat([normal, variation[..., None]], -1)
    made = made * torch.tensor([-1.0, -1, -1, 1])
    for content in (points, moved):
        total, count = Surface().compare(step_of(content, 3, weight), "x", None, made, torch.ones(2, 3))
        assert float(total) == pytest.approx(0, abs=1e-6)
        assert float(count) == 6
    weight[0, 0, 3:] = 0  # three points tell no surface
    assert float(Surface().compare(step_of(points, 3, weight), "x", None, made, torch.ones(2, 3))[1]) == 5


# ---- extent

def cuboid(sides: tuple[float, float, float], heading: float, centre: tuple[float, float, float], many: int = 400) -> Tensor:
    """Points of a solid box with its corners, (many + 8, 3)."""
    corners = torch.cartesian_prod(*[torch.tensor([-0.5, 0.5])] * 3)
    inside = torch.rand(many, 3, generator=torch.Generator().manual_seed(0)) - 0.5
    x = torch.cat([corners, inside]) * torch.tensor(sides)
    c, s = math.cos(heading), math.sin(heading)
    return x @ torch.tensor([[c, s, 0.0], [-s, c, 0.0], [0.0, 0.0, 1.0]]) + torch.tensor(centre)


def view_of(points: Tensor, segment: Tensor, weight: Tensor | None = None) -> View:
    b, n = segment.shape
    frame = Frame(torch.eye(4).expand(b, -1, -1), (n,), torch.ones(b, 3), ("m",) * 3)
    return View("x", points.transpose(1, 2), frame, torch.arange(b), torch.zeros(b).long(), fields={"segment": segment},
                weight=weight)


@pytest.mark.parametrize("degrees", [0, 20, 64, 90, 118, 176])
def test_boxes_of_turned_cuboids_are_found(degrees: int) -> None:
    a = cuboid((2.0, 0.7, 0.4), math.radians(degrees), (1.0, -2.0, 0.5))
    b = cuboid((0.9, 0.3, 1.5), math.radians(degrees + 30), (-3.0, 1.0, 2.0))
    segment = torch.tensor([7] * len(a) + [0] * len(b))[None]
    box = Extent().boxes(view_of(torch.cat([a, b])[None], segment), torch.tensor([[0, 7]]))[0]
    torch.testing.assert_close(box[0, :3], torch.tensor([-3.0, 1.0, 2.0]), atol=1e-4, rtol=0)
    torch.testing.assert_close(box[1, :3], torch.tensor([1.0, -2.0, 0.5]), atol=1e-4, rtol=0)
    torch.testing.assert_close(box[:, 3:6].exp(), torch.tensor([[0.9, 0.3, 1.5], [2.0, 0.7, 0.4]]), atol=1e-4, rtol=0)
    for row, angle in ((1, degrees), (0, degrees + 30)):
        expected = torch.tensor([math.sin(math.radians(2 * angle)), math.cos(math.radians(2 * angle))])
        torch.testing.assert_close(box[row, 6:], expected, atol=1e-4, rtol=0)


def test_boxes_depend_on_no_other_row_and_no_padding() -> None:
    a, b = cuboid((2.0, 0.7, 0.4), 0.3, (0.0, 0.0, 0.0)), cuboid((1.0, 0.5, 0.4), 1.0, (1.0, 0.0, 0.0))
    both = view_of(torch.stack([a, b]), torch.full((2, len(a)), 3))
    padded = view_of(torch.cat([a, torch.full((20, 3), 50.0)])[None], torch.full((1, len(a) + 20), 3),
                     torch.cat([torch.ones(len(a)), torch.zeros(20)])[None, None])
    wanted = torch.tensor([[3]])
    alone = Extent().boxes(view_of(a[None], torch.full((1, len(a)), 3)), wanted)
    assert torch.equal(Extent().boxes(both, wanted.expand(2, 1))[:1], alone)
    assert torch.equal(Extent().boxes(padded, wanted), alone)


def test_extent_counts_tokens_of_segments_only() -> None:
    a = cuboid((2.0, 0.7, 0.4), 0.3, (0.5, 0.0, 0.0))
    view = view_of(a[None], torch.full((1, len(a)), 3))
    position = torch.randn(1, 4, 3)
    stream = TokenStream(torch.zeros(1, 4, 3), position, torch.ones(1, 4, dtype=torch.bool), None,
                         kind={"segment": torch.tensor([[3, -1, 3, -1]])})
    step: Any = SimpleNamespace(stream=lambda name: stream, view=lambda name: view)
    box = Extent().boxes(view, torch.tensor([[3]])).expand(1, 4, 8)
    made = torch.cat([box[..., :3] - position, box[..., 3:]], -1)
    made[:, 1::2] += 5
    total, count = Extent().compare(step, "x", None, made, torch.ones(1, 4))
    assert (float(total), float(count)) == (0.0, 16.0)


# ---- maskings of sets

def stream_of(position: Tensor, valid: Tensor) -> TokenStream:
    return TokenStream(torch.zeros(*valid.shape, 2), position, valid, None)


@settings(max_examples=30, deadline=None)
@given(st.integers(6, 60), st.floats(0.2, 0.8), st.integers(1, 5), st.integers(0, 9))
def test_regions_hide_exactly_what_they_should(n: int, ratio: float, regions: int, seed: int) -> None:
    position = torch.randn(3, n, 3, generator=torch.Generator().manual_seed(seed))
    plan = Region(ratio=ratio, regions=regions).plan(stream_of(position, torch.ones(3, n, dtype=torch.bool)),
                                                     Rng.of(seed, torch.arange(3)), (1,))
    wanted = math.floor(n * ratio + 0.5)
    assert plan.hidden.sum(1).tolist() == [wanted] * 3
    assert plan.keep is not None
    assert not plan.hidden.gather(1, plan.keep).any()
    if regions == 1:  # a ball around one of the hidden
        for x, hidden in zip(position, plan.hidden, strict=True):
            d = torch.cdist(x[hidden], x)
            assert (d[:, hidden].amax(1) <= d[:, ~hidden].amin(1)).any()


def test_regions_lie_together_where_random_masks_do_not() -> None:
    position, valid = torch.rand(20, 200, 3), torch.ones(20, 200, dtype=torch.bool)
    hidden = Region(ratio=0.5, regions=2).plan(stream_of(position, valid), Rng.of(0, torch.arange(20)), (1,)).hidden
    near = torch.cdist(position, position).topk(2, largest=False).indices[..., 1]
    share = (hidden.gather(1, near) == hidden).float().mean()
    assert share > 0.85  # of nearest neighbours that share a fate; 0.5 by chance


def test_padding_changes_no_region() -> None:
    position = torch.randn(1, 20, 3)
    alone = Region(ratio=0.5).plan(stream_of(position, torch.ones(1, 20, dtype=torch.bool)), Rng.of(0, 5), (1,))
    longer = torch.cat([position, torch.full((1, 12, 3), torch.nan)], 1)
    valid = (torch.arange(32) < 20)[None]
    padded = Region(ratio=0.5).plan(stream_of(longer, valid), Rng.of(0, 5), (1,))
    assert torch.equal(padded.hidden[:, :20], alone.hidden)
    assert padded.keep is not None
    assert padded.keep.shape[1] == 16
    assert not padded.predict[:, 20:].any()


def test_regions_need_places() -> None:
    bare = TokenStream(torch.zeros(1, 9, 2), None, torch.ones(1, 9, dtype=torch.bool), None)
    with pytest.raises(RecipeError, match="positions"):
        Region().plan(bare, Rng.of(0, 0), (1,))


def test_nothing_hides_nothing() -> None:
    plan = Nothing().plan(stream_of(torch.randn(2, 9, 3), torch.ones(2, 9, dtype=torch.bool)), Rng.of(0, torch.arange(2)), (1,))
    assert not plan.hidden.any()
    assert plan.keep is None


# ---- near

def units(points: Tensor, **keys: list[int]) -> Units:
    return Units(torch.zeros(len(points), 1), {k: torch.tensor(v) for k, v in keys.items()}, torch.ones(len(points)), points)


def test_near_is_a_distance_in_source_coordinates() -> None:
    p = torch.rand(40, 3)
    views, items = torch.randint(0, 2, (40,)).tolist(), torch.randint(0, 3, (40,)).tolist()
    u = units(p, item=items, view=views, token=list(range(40)))
    relation = Relation("near(0.4) & same(item) - same(view)", "~same(view)")
    pairs, matches = relation.pairs(u, u), relation.matches(u, u)
    table = torch.zeros(40, 40)
    table[matches.q, matches.k] = matches.weight
    for i in range(40):
        for j in range(40):
            attracts = math.dist(p[i].tolist(), p[j].tolist()) <= 0.4 and items[i] == items[j] and views[i] != views[j]
            assert (pairs.pos[i, j] > 0) == (table[i, j] > 0) == attracts
            assert (pairs.neg[i, j] > 0) == (views[i] != views[j] and not attracts)


@pytest.mark.parametrize("text", ["near()", "near(item)", "near(-1)", "near(0)", "near(1, 2)", "near('a')", "same(1)"])
def test_wrong_distances_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"term|distance|one key"):
        parse(text)


def test_units_without_places_are_refused_by_name() -> None:
    bare = Units(torch.zeros(2, 1), {"item": torch.zeros(2).long()}, torch.ones(2))
    with pytest.raises(RecipeError, match="no place"):
        Relation("near(1.0)").pairs(bare, bare)


def test_near_needs_tokens_and_no_queue() -> None:
    loss = "objectives.places.contrastive"
    with pytest.raises(RecipeError, match="level: dense"):
        recipes.load("points/pointcontrast", [f"{loss}.level=mean"])
    with pytest.raises(RecipeError, match="queue"):
        recipes.load("points/pointcontrast", [f"{loss}.queue=8", f"{loss}.stop_gradient=true"])


def test_tokens_of_two_looks_meet_where_they_show_one_place() -> None:
    """Turned, stretched looks: units carry the coordinates of the file, so that the same places attract."""
    from meristem.platform.objectives import Items
    from meristem.platform.step import Batch, Step

    assembly = Assembly(recipes.load("points/pointcontrast", [
        "encoder.transformer.width=24", "encoder.transformer.depth=1", "encoder.transformer.heads=2",
        "modality.points.count=8", "modality.points.size=4"]))
    cloud, rotation = torch.rand(64, 3), turned()
    looks = torch.stack([cloud, cloud @ rotation.T * 1.3 + 0.2])
    back = torch.eye(4).repeat(2, 1, 1)
    back[1, :3, :3] = rotation.T / 1.3
    back[1, :3, 3] = -(rotation.T @ torch.full((3,), 0.2)) / 1.3
    frame = Frame(back, (64,), torch.ones(2, 3), ("m",) * 3)
    view = View("v", looks.transpose(1, 2), frame, torch.zeros(2).long(), torch.arange(2))
    step = Step(assembly, Batch(Items(torch.zeros(1).long(), torch.zeros(1).long()), {"v": view}), 0.0, 0)
    table = step.units("v", level="dense")
    assert table.point is not None
    pairs = Relation("near(0.001) & same(item) - same(view)").pairs(table, table)
    assert int((pairs.pos > 0).any(1).sum()) == 16  # farthest-point centres are the same points, seen twice
