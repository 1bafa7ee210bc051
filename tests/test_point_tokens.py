"""Tokens of point clouds: which points they hold, what they depend on, and what they must not."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from meristem.modalities.base import View
from meristem.modalities.frame import Frame
from meristem.modalities.points import Points
from meristem.modalities.points.options import PointsOptions
from meristem.modalities.points.tokenizer import PointTokenizer
from meristem.modalities.rng import Rng
from meristem.modalities.stream import TokenStream
from meristem.platform.encoders.transformer import TransformerSettings
from meristem.platform.masked.masking import Random

KINDS = ("groups", "serial")


def tokenizer(**options: Any) -> PointTokenizer:
    return Points(PointsOptions(**{"count": 8, "size": 5, "cell": 0.1, **options})).tokenizer()


def view_of(*clouds: np.ndarray, padding: int = 0) -> View:
    """Clouds (n, C) as the loader pads them: weight 0, index −1; a segment number on every point."""
    n = max(map(len, clouds)) + padding
    array, weight = torch.zeros(len(clouds), clouds[0].shape[1], n), torch.zeros(len(clouds), 1, n)
    index, segment = torch.full((2, len(clouds), n), -1)
    for row, cloud in enumerate(clouds):
        here = slice(0, len(cloud))
        array[row, :, here], weight[row, :, here] = torch.from_numpy(cloud.T).float(), 1
        index[row, here], segment[row, here] = torch.arange(len(cloud)) + 100, torch.arange(len(cloud)) % 4
    affine = torch.diag(torch.tensor([2.0, 2.0, 2.0, 1.0])).repeat(len(clouds), 1, 1)
    rows = torch.arange(len(clouds))
    return View("x", array, Frame(affine, (n,), torch.ones(len(clouds), 3), ("m",) * 3), rows, torch.zeros_like(rows),
                fields={"segment": segment, "mask": segment, "height": array[:, 2]}, weight=weight, index=index)


def blob(seed: int, n: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.4, (n, channels)).astype(np.float32)


def held(stream: TokenStream) -> list[list[set[int]]]:
    """Which points of the view each valid token of each row holds."""
    return [[set(p[w > 0].tolist()) for p, w, v in zip(*row, strict=True) if v]
            for row in zip(stream.aux["points"], stream.weight, stream.valid, strict=True)]


@pytest.mark.parametrize("tokens", KINDS)
def test_content_is_the_points_relative_to_the_position(tokens: str) -> None:
    view, t = view_of(blob(0, 43, 6), blob(1, 30, 6)), tokenizer(tokens=tokens, features=("normal",))
    stream = t.stream(view)
    assert stream.content.shape[-1] == t.token_size == 30
    content = stream.content.unflatten(-1, (6, 5))
    assert t.coordinates == 3
    for b, n in zip(*stream.valid.nonzero(as_tuple=True), strict=True):
        points = view.array[b][:, stream.aux["points"][b, n]]
        torch.testing.assert_close(content[b, n, :3] + stream.position[b, n, :, None], points[:3])
        torch.testing.assert_close(content[b, n, 3:], points[3:], rtol=0, atol=0)
    torch.testing.assert_close(stream.source, 2 * stream.position)


def test_groups_are_the_nearest_of_a_centre() -> None:
    cloud = blob(0, 43)
    stream = tokenizer().stream(view_of(cloud))
    assert stream.valid.all() and bool((stream.weight == 1).all())
    for position, points in zip(stream.position[0].numpy(), held(stream)[0], strict=True):
        assert points == set(np.linalg.norm(cloud - position, axis=1).argsort()[:5].tolist())


def test_groups_without_a_point_of_their_own_are_padding() -> None:
    few = np.repeat(blob(0, 3), 4, 0)  # 12 points, 3 of them distinct
    stream = tokenizer().stream(view_of(few, blob(1, 20)))
    assert stream.valid.sum(1).tolist() == [3, 8]
    assert {tuple(p) for p in stream.position[0][stream.valid[0]].tolist()} == {tuple(p) for p in few.tolist()}
    assert not stream.weight[0, 3:].any()
    assert (stream.kind["place"][0, 3:] == -1).all() and (stream.kind["segment"][0, 3:] == -1).all()


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("tokens", KINDS)
def test_a_cloud_smaller_than_a_token_repeats_points_with_weight_0(tokens: str, n: int) -> None:
    stream = tokenizer(tokens=tokens).stream(view_of(blob(0, n)))
    assert int(stream.weight[0, 0].sum()) == n
    assert set(stream.aux["points"][0, 0].tolist()) == held(stream)[0][0] == set(range(n))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.integers(1, 7), st.sampled_from([0.01, 0.3, 5.0]))
def test_runs_hold_every_point_once(seed: int, n: int, size: int, cell: float) -> None:
    stream = tokenizer(tokens="serial", size=size, cell=cell).stream(view_of(blob(seed, n), blob(seed, 25)))
    for tokens, count in zip(held(stream), (n, 25), strict=True):
        assert len(tokens) == -(-count // size)
        assert sorted(p for token in tokens for p in token) == list(range(count))
    for b, t in zip(*stream.valid.nonzero(as_tuple=True), strict=True):
        assert set(stream.weight[b, t].tolist()) <= {0.0, 1.0}


def test_a_run_lies_at_the_mean_of_its_points() -> None:
    cloud = blob(0, 43)
    stream = tokenizer(tokens="serial").stream(view_of(cloud))
    for position, points in zip(stream.position[0].numpy(), held(stream)[0], strict=True):
        np.testing.assert_allclose(position, cloud[list(points)].mean(0), atol=1e-6)


def test_runs_are_of_neighbours() -> None:
    cloud = np.random.default_rng(0).uniform(size=(4000, 3)).astype(np.float32)
    stream = tokenizer(tokens="serial", size=8, cell=0.01).stream(view_of(cloud))
    spread = np.mean([np.ptp(cloud[list(points)], axis=0).max() for points in held(stream)[0]])
    assert spread < 2 * (8 / 4000) ** (1 / 3)  # edge of the cube that holds 8 of them


def test_the_curve_spans_clouds_of_any_extent() -> None:
    cloud = np.concatenate([blob(0, 20), blob(1, 20) + np.float32(1e5)])
    stream = tokenizer(tokens="serial", cell=1e-3).stream(view_of(cloud))
    assert [{p // 20 for p in points} for points in held(stream)[0]] == [{0}] * 4 + [{1}] * 4


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 40), st.integers(0, 9), st.sampled_from(KINDS))
def test_a_cloud_is_the_same_alone_and_beside_others(seed: int, n: int, m: int, padding: int, tokens: str) -> None:
    cloud, t = blob(seed, n), tokenizer(tokens=tokens)
    alone, together = t.stream(view_of(cloud)), t.stream(view_of(blob(seed + 1, m), cloud, padding=padding))
    k = len(alone)
    assert not together.valid[1, k:].any()
    for name in ("content", "position", "valid", "weight", "source"):
        assert torch.equal(getattr(alone, name)[0], getattr(together, name)[1, :k])
    for name in alone.kind:
        assert torch.equal(alone.kind[name][0], together.kind[name][1, :k])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(10, 50))
def test_the_order_of_points_changes_no_group(seed: int, n: int) -> None:
    cloud, order, t = blob(seed, n), np.random.default_rng(seed).permutation(n), tokenizer()
    stored, shuffled = t.stream(view_of(cloud)), t.stream(view_of(cloud[order]))
    assert torch.equal(stored.position, shuffled.position)
    assert held(stored)[0] == [{int(order[p]) for p in points} for points in held(shuffled)[0]]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_groups_move_with_the_cloud(seed: int) -> None:
    rng = np.random.default_rng(seed)
    turn, shift = np.linalg.qr(rng.normal(size=(3, 3)))[0], rng.normal(size=3)
    cloud = rng.normal(0, 0.4, (40, 3))
    still, moved = (tokenizer().stream(view_of(x)) for x in (cloud, cloud @ turn.T + shift))
    assert held(still) == held(moved)
    matrix, vector = torch.from_numpy(turn).float(), torch.from_numpy(shift).float()
    torch.testing.assert_close(moved.position, still.position @ matrix.T + vector, rtol=1e-4, atol=1e-5)
    local = still.content.unflatten(-1, (3, 5)).transpose(-1, -2) @ matrix.T
    torch.testing.assert_close(moved.content.unflatten(-1, (3, 5)).transpose(-1, -2), local, rtol=1e-4, atol=1e-5)


def test_runs_move_with_the_cloud() -> None:
    cloud = np.round(blob(0, 50) * 1024) / 1024  # so that the shift rounds nothing
    still, moved = (tokenizer(tokens="serial").stream(view_of(x)) for x in (cloud, cloud + np.float32([4, -2, 1])))
    assert held(still) == held(moved)
    torch.testing.assert_close(still.content, moved.content, rtol=0, atol=1e-6)


def test_kinds_are_those_of_the_centre_and_the_mask_is_no_kind() -> None:
    cloud = blob(0, 30)
    for tokens in KINDS:
        stream = tokenizer(tokens=tokens).stream(view_of(cloud, blob(1, 17)))
        assert set(stream.kind) == {"place", "segment"}
        place, segment = (stream.kind[name][stream.valid] for name in ("place", "segment"))
        assert torch.equal((place - 100) % 4, segment)
        inside = (stream.aux["points"] == stream.kind["place"][..., None] - 100) & (stream.weight > 0)
        assert torch.equal(inside.sum(-1), stream.valid.long())
        if tokens == "groups":
            assert torch.equal(torch.from_numpy(cloud)[stream.kind["place"][0] - 100], stream.position[0])


@pytest.mark.parametrize("tokens", KINDS)
def test_what_tokens_say_is_spread_to_points(tokens: str) -> None:
    view, t = view_of(blob(0, 43), blob(1, 30)), tokenizer(tokens=tokens)
    stream = t.stream(view)
    said = torch.randn(*stream.valid.shape, 2, requires_grad=True)
    points = t.spread(said, stream, view)
    assert points.shape == (2, 43, 2)
    if tokens == "serial":
        for b, row in enumerate(held(stream)):
            for number, members in enumerate(row):
                assert all(torch.equal(points[b, p], said[b, number]) for p in members)
    else:
        for b, p in ((0, 3), (1, 20)):
            distance = (view.array[b, :, p] - stream.position[b]).square().sum(-1)
            near = distance.topk(3, largest=False)
            weight = (1 / near.values.clamp_min(1e-12))
            torch.testing.assert_close(points[b, p], (weight[:, None] * said[b, near.indices]).sum(0) / weight.sum())
    live = view.weight[:, 0] > 0
    gradient, = torch.autograd.grad(points[live].sum(), said)
    assert torch.equal(gradient.abs().sum(-1) > 0, stream.valid)


# ---- embedding

def test_repeats_change_no_embedding() -> None:
    embed = tokenizer().embedding(16)
    content = torch.randn(1, 4, 3, 5)
    repeated = torch.cat([content, content[..., [0, 3, 3]]], -1)[..., torch.randperm(8)]
    whole = TokenStream(content.flatten(2), None, torch.ones(1, 4, dtype=torch.bool), None)
    more = TokenStream(repeated.flatten(2), None, whole.valid, None)
    torch.testing.assert_close(embed(whole), embed(more))


def test_embedding_is_the_published_network() -> None:
    embed = tokenizer().embedding(16)
    content = torch.randn(2, 4, 3, 5)
    x = embed.first(content.transpose(-1, -2) / PointsOptions().scales[0])
    both = torch.cat([x.amax(-2, keepdim=True).expand_as(x), x], -1)  # Point-MAE concatenates, then multiplies
    x = both @ torch.cat([embed.whole.weight, embed.point.weight], 1).T + embed.point.bias
    expected = embed.second(x).amax(-2)
    stream = TokenStream(content.flatten(2), None, torch.ones(2, 4, dtype=torch.bool), None)
    torch.testing.assert_close(embed(stream), expected)


@pytest.mark.parametrize("tokens", KINDS)
def test_hidden_tokens_are_not_embedded(tokens: str) -> None:
    view, t = view_of(blob(0, 40), blob(1, 40)), tokenizer(tokens=tokens)
    axes = Points(PointsOptions()).axes
    encoder = TransformerSettings(width=32, depth=1, heads=2).build(t, axes, 3)
    embedded = []
    encoder.embed.register_forward_hook(lambda module, given, result: embedded.append(result.shape[1]))
    stream = t.stream(view)
    plan = Random(ratio=0.75).plan(stream, Rng.of(0, torch.arange(2)), t.mask_unit)
    encoder(stream.seen(frozenset({"position"})), plan)
    assert embedded == [len(stream) // 4]


@pytest.mark.parametrize("tokens", KINDS)
def test_an_encoder_says_the_same_of_a_cloud_alone_and_beside_a_larger_one(tokens: str) -> None:
    t = tokenizer(tokens=tokens, count=16)
    encoder = TransformerSettings(width=32, depth=2, heads=2).build(t, Points(PointsOptions()).axes, 3).eval()
    cloud, sees = blob(0, 13), frozenset({"position"})
    alone = encoder(t.stream(view_of(cloud)).seen(sees))
    together = encoder(t.stream(view_of(cloud, blob(1, 90), padding=7)).seen(sees))
    k = int(alone.valid.sum())
    assert int(together.valid[0].sum()) == k
    torch.testing.assert_close(together.tokens[0, :k], alone.tokens[0, :k], rtol=1e-4, atol=1e-5)
    for name, summary in alone.summary.items():
        torch.testing.assert_close(together.summary[name][0], summary[0], rtol=1e-4, atol=1e-5)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
        return result


def test_a_million_points_need_memory_for_a_million_points() -> None:
    n = 1_000_000
    points = Points(PointsOptions(tokens="serial", size=32, cell=0.02))
    view = points.example((n,), Rng.of(0, torch.arange(1)))
    with Largest() as largest:
        stream = points.tokenizer().stream(view)
    assert len(stream) == math.ceil(n / 32) and bool(stream.valid.all())
    assert largest.elements <= 3.01 * n


@pytest.mark.data
@pytest.mark.parametrize("tokens", KINDS)
def test_the_parts_of_shapes_survive_their_tokens(data_root: Path, tokens: str) -> None:
    folders = sorted(f for f in (data_root / "psb-labeled-points").iterdir() if f.is_dir())
    files = [next(iter(sorted(folder.glob("*.npz")))) for folder in folders]
    assert len(files) == 19
    shapes = [dict(np.load(file)) for file in files]
    clouds = [x["points"] - x["points"].mean(0) for x in shapes]
    view = view_of(*(x / np.linalg.norm(x, axis=1).max() for x in clouds))
    view.fields["part"] = torch.from_numpy(np.stack([x["part"] for x in shapes]).astype(np.int64))
    t = tokenizer(tokens=tokens, count=128, size=16, cell=0.02)
    stream = t.stream(view)
    said = torch.nn.functional.one_hot(stream.kind["part"], int(view.fields["part"].max()) + 1).float()
    told = t.spread(said, stream, view).argmax(-1)
    assert (told == view.fields["part"]).float().mean() > 0.9
