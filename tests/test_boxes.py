"""Upright boxes against clipping by hand, and heads that learn a scene by heart."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from meristem.modalities.base import View, modality_class
from meristem.modalities.frame import Frame
from meristem.platform import boxes
from meristem.platform.assembly import total
from meristem.platform.encoders.transformer import TransformerSettings
from meristem.tasks.detectors.points import BoxHead, Centres, Found, Queries, Truth

NUMBER = st.floats(-3, 3, allow_nan=False)
BOX = st.tuples(NUMBER, NUMBER, NUMBER, *[st.floats(0.1, 4)] * 3, st.floats(-7, 7))


def clipped(subject: list[tuple[float, float]], window: list[tuple[float, float]]) -> float:
    """Area of a convex polygon cut by another's half-planes, one after the other (Sutherland and Hodgman 1974)."""
    def side(p: Any, a: Any, b: Any) -> float:
        return (b[0] - a[0]) * (p[1] - a[1]) - (b[1] - a[1]) * (p[0] - a[0])

    for a, b in zip(window, window[1:] + window[:1], strict=True):
        kept = []
        for p, q in zip(subject, subject[1:] + subject[:1], strict=True):
            sp, sq = side(p, a, b), side(q, a, b)
            if sp >= 0:
                kept.append(p)
            if sp * sq < 0:
                t = sp / (sp - sq)
                kept.append((p[0] + t * (q[0] - p[0]), p[1] + t * (q[1] - p[1])))
        subject = kept
        if not subject:
            return 0.0
    return sum(p[0] * q[1] - p[1] * q[0] for p, q in zip(subject, subject[1:] + subject[:1], strict=True)) / 2


def plan(box: tuple[float, ...]) -> list[tuple[float, float]]:
    x, y, _, length, width, _, turn = box
    cos, sin = math.cos(turn), math.sin(turn)
    return [(x + cos * a - sin * b, y + sin * a + cos * b) for a, b in
            ((length / 2, width / 2), (-length / 2, width / 2), (-length / 2, -width / 2), (length / 2, -width / 2))]


@settings(max_examples=200, deadline=None)
@given(BOX, BOX)
def test_overlap_equals_clipping_by_hand(a: tuple[float, ...], b: tuple[float, ...]) -> None:
    volume, flat = boxes.iou(torch.tensor([a], dtype=torch.float64), torch.tensor([b], dtype=torch.float64))
    common = clipped(plan(a), plan(b))
    assert float(flat) == pytest.approx(common / (a[3] * a[4] + b[3] * b[4] - common), abs=1e-5)
    height = max(min(a[2] + a[5] / 2, b[2] + b[5] / 2) - max(a[2] - a[5] / 2, b[2] - b[5] / 2), 0)
    union = a[3] * a[4] * a[5] + b[3] * b[4] * b[5] - common * height
    assert float(volume) == pytest.approx(common * height / union, abs=1e-5)


@pytest.mark.parametrize("turn", [0.0, math.pi / 2, math.pi, 0.3, -2.0])
@pytest.mark.parametrize("far", [0.0, 1e4])
def test_a_box_overlaps_itself_wholly_and_a_neighbour_that_touches_not_at_all(turn: float, far: float) -> None:
    box = torch.tensor([[far, -far, 1.0, 4.0, 2.0, 1.5, turn]], dtype=torch.float64)
    again = box.clone()
    again[0, 6] += math.pi
    beside = box.clone()
    beside[0, 0] += 4 * math.cos(turn)
    beside[0, 1] += 4 * math.sin(turn)
    volume, flat = boxes.iou(box, torch.cat([box, again, beside]))
    assert volume[0].tolist() == pytest.approx([1, 1, 0], abs=1e-6) and flat[0].tolist() == pytest.approx([1, 1, 0], abs=1e-6)


def test_nothing_overlaps_nothing() -> None:
    assert boxes.iou(torch.zeros(2, 7), torch.zeros(3, 7))[0].eq(0).all()
    assert boxes.iou(torch.zeros(0, 7), torch.zeros(3, 7))[0].shape == (0, 3)


def test_corners_hold_the_points_inside() -> None:
    box = torch.tensor([1.0, -2.0, 0.5, 3.0, 1.0, 2.0, 0.7])
    corner = boxes.corners(box)
    assert corner.mean(0).tolist() == pytest.approx([1.0, -2.0, 0.5], abs=1e-6)
    assert (corner[4:, 2] - corner[:4, 2]).tolist() == pytest.approx([2.0] * 4)
    middle = box[:3]
    assert boxes.inside((middle + 0.98 * (corner - middle))[None], box[None, None]).all()
    assert not boxes.inside((middle + 1.02 * (corner - middle))[None], box[None, None]).any()


def scene(seed: int) -> tuple[View, Truth]:
    """The shells of three boxes of two classes (long, tall) on a floor of 12 m, 1024 points."""
    rng = np.random.default_rng(seed)
    spots = np.array([[-4.0, -3.0], [3.0, -2.0], [0.0, 4.0]]) + rng.uniform(-0.5, 0.5, (3, 2))
    label = np.array([0, 1, 0])
    sides = np.where(label[:, None] == 0, [3.0, 1.5, 1.0], [1.0, 0.8, 2.0]) * rng.uniform(0.9, 1.1, (3, 3))
    box = np.column_stack([spots, sides[:, 2] / 2, sides, rng.uniform(-1.2, 1.2, 3)])
    clouds = [np.column_stack([rng.uniform(-6, 6, (424, 2)), rng.normal(0, 0.01, 424)])]
    for x, y, z, *side, turn in box:
        u = rng.uniform(-0.5, 0.5, (200, 3))
        face = rng.integers(0, 3, 200)
        u[np.arange(200), face] = np.sign(u[np.arange(200), face]) / 2
        local = u * side
        cos, sin = math.cos(turn), math.sin(turn)
        clouds.append(np.column_stack([local[:, 0] * cos - local[:, 1] * sin + x, local[:, 0] * sin + local[:, 1] * cos + y,
                                       local[:, 2] + z]))
    points = torch.from_numpy(np.concatenate(clouds)).float().T[None]
    frame = Frame(torch.eye(4)[None], (1024,), torch.ones(1, 3), ("m",) * 3)
    return (View("x", points, frame, torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)),
            Truth(torch.from_numpy(box).float(), torch.from_numpy(label)))


@pytest.mark.parametrize("settings_", [Queries(queries=24, depth=2, heads=2),
                                       Centres(low=(-6, -6), high=(6, 6), cell=0.6, width=32)], ids=["queries", "centres"])
def test_a_head_learns_a_scene_by_heart(settings_: Any) -> None:
    """Every box is found with its class and an IoU over 0.5, above every false one."""
    torch.manual_seed(0)
    kind = modality_class("points")
    room: Any = kind(kind.Options.model_validate({"normalise": "none", "count": 96, "size": 8}))
    tokenizer = room.tokenizer()
    view, truth = scene(0)
    stream = tokenizer.stream(view)
    encoder = TransformerSettings(width=48, depth=2, heads=2, cls=False).build(tokenizer, room.axes, room.channels)
    head: BoxHead = settings_.build(48, 2)
    optimiser = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=3e-3)
    for step in range(100):
        for group in optimiser.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 15) * (1 if step < 75 else 0.2)
        loss = total(head.losses(head(encoder(stream.seen(frozenset({"position"}))), stream), [truth]))
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*encoder.parameters(), *head.parameters()], 1.0)
        optimiser.step()
    with torch.no_grad():
        found, = head.decode(head(encoder(stream.seen(frozenset({"position"}))), stream))
    assert_found(found, truth)


def assert_found(found: Found, truth: Truth) -> None:
    best = Found(found.box[:3], found.label[:3], found.score[:3])
    overlap = boxes.iou(truth.box, best.box)[0] * (truth.label[:, None] == best.label[None])
    assert overlap.amax(1).min() > 0.5, overlap
    assert len(found.score) == 3 or found.score[3] < 0.5 * found.score[2]


def test_a_box_outside_the_ground_costs_nothing_and_a_scene_without_boxes_can_be_learnt() -> None:
    kind = modality_class("points")
    room: Any = kind(kind.Options.model_validate({"normalise": "none", "count": 32, "size": 8}))
    view, truth = scene(1)
    tokenizer = room.tokenizer()
    stream = tokenizer.stream(view)
    encoder = TransformerSettings(width=24, depth=1, heads=2).build(tokenizer, room.axes, room.channels)
    encoded = encoder(stream.seen(frozenset({"position"})))
    nothing = Truth(torch.zeros(0, 7), torch.zeros(0, dtype=torch.int64))
    away = Truth(truth.box + torch.tensor([100.0, 0, 0, 0, 0, 0, 0]), truth.label)
    head = Centres(low=(-6, -6), high=(6, 6)).build(24, 2)
    made = head(encoded, stream)
    assert value(head.losses(made, [nothing])["heat"].total) == value(head.losses(made, [away])["heat"].total)
    queries = Queries(queries=8, depth=1, heads=2).build(24, 2)
    assert value(queries.losses(queries(encoded, stream), [nothing])["box"].total) == 0


def value(x: Tensor) -> float:
    return float(x.detach())
