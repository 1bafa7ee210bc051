"""What images and volumes share: windows, loading, geometry, intensity, patches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torchvision.transforms.v2 import functional as tv

from meristem.errors import DataError
from meristem.modalities.base import Draw, Header, Look, View
from meristem.modalities.frame import Frame
from meristem.modalities.lattice import Lattice, LatticeOptions, LatticeTokenizer, LatticeViewOptions, anchors
from meristem.modalities.lattice import intensity as ops
from meristem.modalities.lattice.labels import to_classes


def header(*shape: int, spacing: tuple[float, ...] | None = None, **kw: Any) -> Header:
    spacing = spacing or (1.0,) * len(shape)
    affine = np.diag([*spacing, 1.0])
    return Header((1, *shape), tuple(map(tuple, affine.tolist())), spacing, **kw)


def lattice(dims: int, channels: int = 1) -> Lattice:
    return Lattice(LatticeOptions(patch=(2,) * dims, channels=channels))


def view(array: np.ndarray, head: Header, options: LatticeViewOptions, count: int, mask: np.ndarray | None = None,
         first: int = 0) -> View:
    """`count` looks at one sample, cut, resized and collated as the loader does."""
    room = lattice(array.ndim - 1, len(array))
    arrays, masks, weights, affines, draws = [], [], [], [], []
    for i in range(first, first + count):
        d = room.draw(options, head, Look(0, i, 0, "x"))
        arrays.append(room.load(cut(array, d, 0), d, True))
        weights.append(room.load(cut(np.ones_like(array[:1]), d, 0), d, False))
        if mask is not None:
            masks.append(room.load(cut(mask[None], d, 0), d, False)[0])
        scale = np.array(d.size) / d.shape
        step = np.diag([*scale, 1.0])
        step[:-1, -1] = 0.5 * scale - 0.5 + np.array(d.start)
        affines.append(np.array(head.affine) @ step)
        draws.append(d)
    params = {k: torch.from_numpy(np.stack([d.params[k] for d in draws])) for k in draws[0].params}
    params |= {"scale": torch.tensor([head.scale] * count), "offset": torch.tensor([head.offset] * count)}
    frame = Frame(torch.tensor(np.stack(affines), dtype=torch.float32), draws[0].shape,
                  torch.tensor([head.spacing] * count), ("mm",) * len(head.spacing))
    return View("x", torch.stack(arrays), frame, torch.arange(count), torch.zeros(count, dtype=torch.long), params,
                {"mask": torch.stack(masks).long()} if masks else {}, torch.stack(weights).float())


def cut(array: np.ndarray, d: Draw, fill: int) -> np.ndarray:
    pads = [(max(-a, 0), max(a + n - m, 0)) for a, n, m in zip(d.start, d.size, array.shape[1:], strict=True)]
    padded = np.pad(array, [(0, 0), *pads], constant_values=fill)
    return padded[(slice(None), *(slice(a + p[0], a + p[0] + n) for a, n, p in zip(d.start, d.size, pads, strict=True)))]


def coordinates(head: Header) -> np.ndarray:
    """The source coordinate of each stored element as an image of D channels."""
    index = np.stack(np.meshgrid(*(np.arange(n) for n in head.shape[1:]), indexing="ij"), -1)
    affine = np.array(head.affine)
    return np.moveaxis(index @ affine[:-1, :-1].T + affine[:-1, -1], -1, 0).astype(np.float32)


EVERYTHING: dict[str, Any] = {
    "flip": True, "affine": {"rotate": 40.0, "zoom": (0.8, 1.3), "shear": 0.2, "shift": 3.0, "probability": 0.7},
    "brightness": {"range": (0.6, 1.4), "probability": 0.8}, "contrast": {"range": (0.6, 1.4), "probability": 0.8},
    "saturation": {"range": (0.6, 1.4), "probability": 0.8}, "hue": {"range": (-0.1, 0.1), "probability": 0.8},
    "grayscale": 0.3, "gamma": {"range": (0.7, 1.5), "probability": 0.5}, "blur": {"range": (0.1, 2.0), "probability": 0.5},
    "solarise": {"range": (0.5, 0.5), "probability": 0.2}, "noise": {"range": (0.0, 0.2), "probability": 0.5},
    "elastic": {"amplitude": (0.5, 2.0), "probability": 0.5}}


def options(size: tuple[int, ...], *names: str, **kw: Any) -> LatticeViewOptions:
    chosen = {name: EVERYTHING[name] for name in names}
    if "flip" in chosen:
        chosen["flip"] = (0.5,) * len(size)
    return LatticeViewOptions(size=size, **chosen, **kw)


# ---- windows


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["crop", "area", "whole", "cover", "contain"]), st.lists(st.integers(5, 60), min_size=2, max_size=3),
       st.data())
def test_windows_lie_where_they_should(window: str, shape: list[int], data: st.DataObject) -> None:
    size = tuple(data.draw(st.integers(4, 40)) for _ in shape)
    o = LatticeViewOptions(size=size, window=window, zoom=(0.7, 1.4))  # type: ignore[arg-type]
    d = lattice(len(shape)).draw(o, header(*shape), Look(0, data.draw(st.integers(0, 999)), 0, "x"))
    assert d.shape == size
    for start, n, whole, want in zip(d.start, d.size, shape, size, strict=True):
        assert n >= 1
        if n <= whole:
            assert 0 <= start <= whole - n
        else:
            assert whole - n <= start <= 0  # the whole sample is inside the window
        if window == "crop":
            assert round(0.7 * want - 0.51) <= n <= round(1.4 * want + 0.51)
        if window == "area":
            assert n <= whole
        if window == "whole":
            assert n == want
            assert abs(start + n / 2 - whole / 2) <= 0.5
        if window == "cover":
            assert n <= whole
        if window == "contain":
            assert n >= whole


def test_random_places_are_uniform() -> None:
    o, head = options((8, 8)), header(10, 30)
    starts = np.array([lattice(2).draw(o, head, Look(1, i, 0, "x")).start for i in range(600)])
    assert set(starts[:, 0]) == {0, 1, 2}
    assert set(starts[:, 1]) == set(range(23))
    assert abs(starts[:, 1].mean() - 11) < 0.9


def test_area_windows_have_the_area_and_ratio_asked_for() -> None:
    o, head = options((24, 24), window="area", area=(0.1, 0.5), aspect=(0.5, 2.0)), header(200, 240)
    sizes = np.array([lattice(2).draw(o, head, Look(1, i, 0, "x")).size for i in range(400)])
    fraction, ratio = sizes.prod(1) / (200 * 240), sizes[:, 0] / sizes[:, 1]
    assert 0.095 < fraction.min() < 0.13
    assert 0.45 < fraction.max() < 0.51
    assert 0.49 < ratio.min() < 0.6
    assert 1.7 < ratio.max() < 2.05
    assert abs(np.log(ratio).mean()) < 0.08


def test_foreground_crops_are_centred_on_anchors() -> None:
    head = header(40, 40, anchors=((9, 12), (30, 31), (0, 39)))
    seen = set()
    for i in range(60):
        d = lattice(2).draw(options((8, 10), foreground=1.0), head, Look(0, i, 0, "x"))
        seen.add((d.start[0] + 4, d.start[1] + 5))
    assert seen == {(9, 12), (30, 31), (4, 35)}  # the last as near as the sample's edge lets it


def test_anchors_are_labelled_and_even() -> None:
    mask = np.zeros((20, 20), int)
    mask[2:4], mask[10, 3:6] = 1, 2
    places = anchors(mask)
    labels = [int(mask[p]) for p in places]
    assert labels.count(1) == 32
    assert labels.count(2) == 3
    assert anchors(np.zeros((3, 3), int)) == ()


def test_draws_are_pure_and_all_collate() -> None:
    o, head = options((8, 8, 8), *EVERYTHING), header(12, 9, 15)
    draws = [lattice(3).draw(o, head, Look(0, i, 0, "x")) for i in range(20)]
    again = lattice(3).draw(o, head, Look(0, 7, 0, "x"))
    assert (again.start, again.size, again.shape) == (draws[7].start, draws[7].size, draws[7].shape)
    for name in draws[0].params:
        assert np.array_equal(again.params[name], draws[7].params[name])
        stacked = np.stack([d.params[name] for d in draws])
        assert stacked.dtype in (np.float32, np.int64)
    assert len({float(d.params["brightness"]) for d in draws}) > 10


def test_an_operation_added_last_changes_no_other_draw() -> None:
    head = header(20, 20)
    few, many = options((8, 8), "flip", "gamma"), options((8, 8), *EVERYTHING)
    for i in range(10):
        a, b = (lattice(2).draw(o, head, Look(0, i, 0, "x")) for o in (few, many))
        assert a.start == b.start
        assert all(np.array_equal(a.params[k], b.params[k]) for k in a.params)


@pytest.mark.parametrize("wrong", [{"size": ()}, {"size": (0, 4)}, {"flip": (0.5,)}, {"affine": {"rotate": (1.0, 2.0)}},
                                   {"affine": {"shift": (1.0,)}}, {"blurr": None}])
def test_wrong_options_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        LatticeViewOptions.model_validate({"size": (4, 4), **wrong})


# ---- loading


def test_an_exact_window_is_not_touched() -> None:
    window = np.random.default_rng(0).integers(-30000, 30000, (2, 5, 6), dtype=np.int16)
    loaded = lattice(2).load(window, Draw((0, 0), (5, 6), (5, 6)), True)
    assert loaded.dtype == torch.int16
    assert np.array_equal(loaded.numpy(), window)


@pytest.mark.parametrize("size,shape", [((20, 31), (10, 31)), ((9, 7), (20, 16)), ((30, 8), (11, 21))])
def test_resizing_is_torchvisions(size: tuple[int, int], shape: tuple[int, int]) -> None:
    window = np.random.default_rng(0).integers(0, 256, (3, *size), dtype=np.uint8)
    mine = lattice(2).load(window, Draw((0, 0), size, shape), True)
    theirs = tv.resize(torch.from_numpy(window).float(), list(shape), antialias=True).round()
    assert mine.dtype == torch.uint8
    assert (mine.float() - theirs).abs().max() <= 1  # ties of the rounding


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=2, max_size=3))
def test_labels_take_the_nearest_element(pairs: list[tuple[int, int]]) -> None:
    size, shape = tuple(p[0] for p in pairs), tuple(p[1] for p in pairs)
    window = np.random.default_rng(0).integers(0, 5, size).astype(np.uint8)
    loaded = lattice(len(size)).load(window, Draw((0,) * len(size), size, shape), False).numpy()
    for index in np.ndindex(*shape):
        at = tuple(int((i + 0.5) * n / m) for i, n, m in zip(index, size, shape, strict=True))
        assert loaded[index] == window[at]


# ---- geometry


@pytest.mark.parametrize("spacing", [(1.0, 1.0), (0.7, 2.0), (1.0, 1.0, 1.0), (0.8, 1.0, 2.5)])
@pytest.mark.parametrize("window,zoom", [("crop", (1.0, 1.0)), ("crop", (0.8, 1.3)), ("area", (1.0, 1.0)),
                                         ("cover", (1.0, 1.0))])
@pytest.mark.parametrize("margin", [0, 3])
def test_the_frame_tells_where_every_element_came_from(spacing: tuple[float, ...], window: str, zoom: tuple[float, float],
                                                         margin: int) -> None:
    """A coordinate image through window, resize, flip and affine holds the source positions that the frame gives."""
    dims = len(spacing)
    shape = (30, 26, 22)[:dims]
    head = header(*shape, spacing=spacing)
    head = replace(head, shape=(dims, *shape), scale=(1.0,) * dims, offset=(0.0,) * dims, pad=(0.0,) * dims)
    o = options((14, 12, 10)[:dims], "flip", "affine", window=window, zoom=zoom, margin=margin)
    made = view(coordinates(head), head, o, 12)
    result = lattice(dims, dims).augment(made, o)
    assert result.frame.shape == o.size == tuple(result.array.shape[2:])
    assert torch.equal(result.frame.spacing, made.frame.spacing)
    index = torch.stack(torch.meshgrid(*(torch.arange(n) for n in o.size), indexing="ij"), -1).reshape(1, -1, dims).float()
    told = result.frame.to_source(index.expand(len(result), -1, -1))
    held = result.array.flatten(2).transpose(1, 2)
    assert result.weight is not None
    # at the edge of the window or of the sample a resized element holds an average of what is there, not of both sides
    made_index, _ = made.frame.from_source(told)
    windows = torch.tensor(made.frame.shape)
    steps, near = told / torch.tensor(spacing), 4
    inside = (result.weight.flatten(1) > 0.999) & ((made_index >= 1.5) & (made_index <= windows - 2.5)).all(-1)
    inside &= ((steps > near) & (steps < torch.tensor(shape) - 1 - near)).all(-1)
    assert inside.float().mean() > 0.1
    exact = window == "crop" and zoom == (1.0, 1.0)  # an averaging filter keeps a ramp to a tenth of an element only
    assert (told - held)[inside].abs().max() < (1e-4 if exact else 0.2 * max(spacing))


def test_rows_without_change_keep_their_values() -> None:
    """Flips and exact windows are bit-exact whatever the others of the batch do."""
    array = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 16), dtype=np.uint8)
    head = header(16, 16, 16, scale=(0.02,), offset=(-1.0,))
    o = options((16, 16, 16), "flip", affine={"rotate": 20.0, "probability": 0.5})
    result = lattice(3).augment(made := view(array, head, o, 16), o)
    plain = torch.from_numpy(array[0]).float() * 0.02 - 1.0
    still = (made.params["rotate"] == 0).all(1)
    assert 3 < still.sum() < 13
    for row in range(16):
        axes = made.params["flip"][row].nonzero()[:, 0].tolist()
        assert torch.equal(result.array[row, 0], plain.flip(axes)) == bool(still[row])


def test_rotation_turns_the_picture() -> None:
    array = np.random.default_rng(0).integers(0, 256, (1, 9, 9), dtype=np.uint8)
    o = options((9, 9), affine={"rotate": 90.0})
    made = view(array, header(9, 9), o, 1)
    made.params["rotate"] = torch.tensor([[90.0]])
    turned = lattice(2).augment(made, o).array[0, 0]
    wanted = [torch.rot90(torch.from_numpy(array[0]).float(), k) for k in (1, 3)]
    assert min((turned - w).abs().max() for w in wanted) < 0.01


def test_rotation_is_rigid_in_millimetres() -> None:
    o = options((12, 20), affine={"rotate": 90.0})
    made = view(np.zeros((1, 12, 20), np.uint8), header(12, 20, spacing=(3.0, 0.5)), o, 1)
    made.params["rotate"] = torch.tensor([[37.0]])
    frame = lattice(2).augment(made, o).frame
    index = torch.tensor([[[2.0, 3.0], [7.0, 11.0]]])
    points, own = frame.to_source(index)[0], frame.local(index)[0]
    torch.testing.assert_close((points[0] - points[1]).norm(), (own[0] - own[1]).norm())


def test_outside_the_sample_lies_the_pad_value_with_no_weight() -> None:
    array = np.full((2, 10, 10), 100, np.uint8)
    head = Header((2, 10, 10), header(10, 10).affine, (1.0, 1.0), (0.01, 0.02), (0.0, 0.0), (-3.0, 5.0))
    o = options((10, 10), affine={"shift": 6.0, "zoom": (0.5, 0.5)})
    result = lattice(2, 2).augment(view(array, head, o, 3), o)
    assert result.weight is not None
    for channel, (pad, value) in enumerate([(-3.0, 1.0), (5.0, 2.0)]):
        assert torch.allclose(result.array[:, channel][result.weight[:, 0] == 0], torch.tensor(pad))
        assert torch.allclose(result.array[:, channel][result.weight[:, 0] > 0.999], torch.tensor(value))
    assert 0.1 < result.weight.mean() < 0.5


def test_labels_follow_their_picture() -> None:
    mask = np.zeros((24, 24, 24), np.uint8)
    mask[6:17, 8:15, 5:20] = 1
    mask[6:10, 8:15, 5:20] = 2
    o = options((24, 24, 24), "flip", "affine", "elastic")
    result = lattice(3).augment(view(mask[None] * 50, header(24, 24, 24), o, 6, mask), o)
    labels = result.fields["mask"]
    assert labels.dtype == torch.int64
    assert set(labels.unique().tolist()) == {0, 1, 2}
    assert ((result.array[:, 0] / 50 - labels).abs() < 0.51).float().mean() > 0.98  # linear and nearest part at borders only


def test_unknown_labels_stay_unknown() -> None:
    o = options((10, 10), affine={"shift": 6.0, "zoom": (0.5, 0.5)})
    made = view(np.zeros((1, 10, 10), np.uint8), header(10, 10), o, 2, np.ones((10, 10), np.uint8))
    made.fields["mask"][1] = -1
    labels = lattice(2).augment(made, o).fields["mask"]
    assert set(labels[0].unique().tolist()) == {0, 1}
    assert (labels[1] == -1).all()


def test_elastic_moves_by_no_more_than_its_amplitude() -> None:
    head = header(20, 20)
    head = replace(head, shape=(2, 20, 20), scale=(1.0, 1.0), offset=(0.0, 0.0), pad=(0.0, 0.0))
    o = options((12, 12), elastic={"amplitude": (2.0, 2.0), "cells": 3}, window="whole")
    result = lattice(2, 2).augment(view(coordinates(head), head, o, 8), o)
    index = torch.stack(torch.meshgrid(torch.arange(12.0), torch.arange(12.0), indexing="ij"))
    moved = (result.array - (index + 4))[:, :, 3:-3, 3:-3]
    assert moved.abs().max() <= 2.0
    assert moved.std() > 0.3
    assert moved.diff(dim=2).abs().max() < 1.0  # no folding


# ---- intensity


def pictures(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("mine,theirs,factors", [
    (ops.brightness, tv.adjust_brightness, (0.3, 1.0, 1.7)), (ops.contrast, tv.adjust_contrast, (0.3, 1.0, 1.7)),
    (ops.saturation, tv.adjust_saturation, (0.0, 0.5, 1.8)), (ops.hue, tv.adjust_hue, (-0.5, -0.2, 0.0, 0.1, 0.4)),
    (ops.gamma, tv.adjust_gamma, (0.5, 1.0, 2.2)), (ops.solarise, tv.solarize, (0.2, 0.5)),
    (ops.grayscale, lambda x, _: tv.rgb_to_grayscale(x, 3), (1.0,))])
def test_colour_operations_are_torchvisions(mine, theirs, factors) -> None:  # type: ignore[no-untyped-def]
    x = pictures(len(factors), 3, 9, 11)
    wanted = torch.stack([theirs(picture, factor) for picture, factor in zip(x, factors, strict=True)])
    torch.testing.assert_close(mine(x, torch.tensor(factors)), wanted, atol=2e-5, rtol=1e-4)


def test_hue_keeps_grey() -> None:
    grey = torch.full((1, 3, 2, 2), 0.4)
    assert torch.equal(ops.hue(grey, torch.tensor([0.3])), grey)


@pytest.mark.parametrize("name", ["saturation", "hue", "grayscale"])
def test_colour_operations_leave_other_channels_alone(name: str) -> None:
    x = pictures(2, 2, 5, 5)
    assert torch.equal(ops.SPANNED[name](x, torch.tensor([0.5, 0.2])), x)


def test_blur_is_a_gaussian() -> None:
    from scipy.ndimage import gaussian_filter
    x = torch.zeros(2, 1, 31, 29, 27)
    x[:, :, 15, 14, 13] = 1
    blurred = ops.blur(x, torch.tensor([1.0, 2.5]))
    for row, sigma in enumerate((1.0, 2.5)):
        wanted = gaussian_filter(x[row, 0].numpy(), sigma, truncate=8)
        assert np.abs(blurred[row, 0].numpy() - wanted).max() < 1e-6
    torch.testing.assert_close(ops.blur(torch.ones(1, 2, 7, 5), torch.tensor([3.0])), torch.ones(1, 2, 7, 5))


def test_noise_has_the_drawn_strength() -> None:
    o = options((40, 40), noise={"range": (0.5, 0.5)})
    result = lattice(2).augment(view(np.zeros((1, 40, 40), np.uint8), header(40, 40), o, 4), o).array
    assert abs(result.std() - 0.5) < 0.02
    assert abs(np.corrcoef(result.flatten(1).numpy()) - np.eye(4)).max() < 0.1  # each its own


@pytest.mark.parametrize("dims,channels", [(2, 3), (3, 1), (3, 2)])
def test_a_samples_result_does_not_depend_on_its_batch_mates(dims: int, channels: int) -> None:
    shape = (18, 20, 16)[:dims]
    array = np.random.default_rng(0).integers(0, 256, (channels, *shape), dtype=np.uint8)
    mask = (array[0] > 128).astype(np.uint8)
    head = Header((channels, *shape), header(*shape).affine, (1.0,) * dims, (0.02,) * channels, (-2.0,) * channels,
                  (-2.0,) * channels)
    o = options((12,) * dims, *EVERYTHING, zoom=(0.9, 1.2))
    made, room = view(array, head, o, 12, mask), lattice(dims, channels)
    together = room.augment(made, o)
    for rows in ([3], [11, 0, 5]):
        alone = room.augment(made.select(torch.tensor(rows)), o)
        torch.testing.assert_close(alone.array, together.array[rows], atol=1e-5, rtol=1e-5)
        assert torch.equal(alone.fields["mask"], together.fields["mask"][rows])
        torch.testing.assert_close(alone.frame.affine, together.frame.affine[rows])  # some processors round by the batch's size
        assert alone.weight is not None
        assert together.weight is not None
        torch.testing.assert_close(alone.weight, together.weight[rows])


def test_augmenting_leaves_its_input_as_it_was() -> None:
    o = options((8, 8), *EVERYTHING)
    made = view(np.random.default_rng(0).integers(0, 256, (1, 12, 12), dtype=np.uint8), header(12, 12), o, 8)
    before = (made.array.clone(), made.frame.affine.clone(), made.weight.clone() if made.weight is not None else None)
    lattice(2).augment(made, o)
    assert torch.equal(made.array, before[0])
    assert torch.equal(made.frame.affine, before[1])
    assert made.weight is not None
    assert before[2] is not None
    assert torch.equal(made.weight, before[2])


def test_a_plain_view_is_the_normalised_array() -> None:
    array = np.random.default_rng(0).integers(-30000, 30000, (2, 6, 7), dtype=np.int16)
    head = Header((2, 6, 7), header(6, 7).affine, (1.0, 1.0), (1e-4, 2e-4), (0.5, -0.25), (0.0, 0.0))
    o = options((6, 7))
    made = view(array, head, o, 1)
    made.weight = None
    result = lattice(2, 2).augment(made, o)
    assert result.weight is None
    torch.testing.assert_close(result.array[0], torch.from_numpy(array).float() * torch.tensor([1e-4, 2e-4])[:, None, None]
                               + torch.tensor([0.5, -0.25])[:, None, None])


# ---- tokens


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3)), min_size=2, max_size=3), st.integers(1, 3))
def test_folding_undoes_cutting(axes: list[tuple[int, int]], channels: int) -> None:
    patch, cells = tuple(a[0] for a in axes), tuple(a[1] for a in axes)
    array = torch.randn(2, channels, *(p * c for p, c in zip(patch, cells, strict=True)), requires_grad=True)
    tokenizer = LatticeTokenizer(channels, patch)
    d = len(patch)
    frame = Frame(torch.eye(d + 1).repeat(2, 1, 1), tuple(array.shape[2:]), torch.ones(2, d), ("px",) * d)
    s = tokenizer.stream(View("x", array, frame, torch.arange(2), torch.zeros(2), weight=torch.ones_like(array[:, :1])))
    assert s.content.shape[2] == tokenizer.token_size
    assert s.weight is not None
    assert s.weight.shape == s.content.shape
    folded = tokenizer.fold(s.content, cells)
    assert torch.equal(folded, array)
    folded.square().sum().backward()
    assert torch.equal(array.grad, 2 * array.detach())  # type: ignore[arg-type]


@pytest.mark.parametrize("patch", [(2, 4), (2, 3, 4)])
def test_embedding_is_a_strided_convolution(patch: tuple[int, ...]) -> None:
    d, channels = len(patch), 2
    array = torch.randn(2, channels, *(3 * p for p in patch))
    tokenizer = LatticeTokenizer(channels, patch)
    embedding = tokenizer.embedding(5)
    frame = Frame(torch.eye(d + 1).repeat(2, 1, 1), tuple(array.shape[2:]), torch.ones(2, d), ("px",) * d)
    s = tokenizer.stream(View("x", array, frame, torch.arange(2), torch.zeros(2)))
    convolution = torch.nn.functional.conv2d if d == 2 else torch.nn.functional.conv3d
    weight = embedding.linear.weight.reshape(5, channels, *patch)
    wanted = convolution(array, weight, embedding.linear.bias, stride=patch).flatten(2).transpose(1, 2)
    torch.testing.assert_close(embedding(s), wanted, atol=1e-5, rtol=1e-4)
    kept = torch.tensor([[0, 4], [7, 2]])
    chosen = wanted.gather(1, kept[..., None].expand(-1, -1, 5))
    torch.testing.assert_close(embedding(s.take(kept)), chosen, atol=1e-5, rtol=1e-4)


def test_taking_tokens_never_cuts_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    array = torch.randn(1, 1, 8, 8)
    s = LatticeTokenizer(1, (2, 2)).stream(
        View("x", array, Frame(torch.eye(3)[None], (8, 8), torch.ones(1, 2), ("px",) * 2), torch.arange(1), torch.zeros(1)))
    s.take(torch.tensor([[0, 3]]))
    assert "content" not in s.__dict__  # made on demand, and there was none


def test_what_nobody_labelled_stays_and_any_other_negative_value_is_refused() -> None:
    labels = np.array([[-1, 0], [128, 255]], np.int16)
    assert to_classes(labels, {0: 0, 128: 1, 255: 2}, "o", nobody=-1).tolist() == [[-1, 0], [1, 2]]
    with pytest.raises(DataError, match="-1, not in mask_values"):
        to_classes(labels, {0: 0, 128: 1, 255: 2}, "o")
    with pytest.raises(DataError, match="too large"):
        to_classes(labels, {-1: -1, 0: 0, 128: 1, 255: 40_000}, "o")
