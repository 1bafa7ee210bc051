"""A 2D encoder on the slices of 3D lattices: against the 2D encoder itself."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from meristem.errors import RecipeError
from meristem.modalities.base import Axis, View
from meristem.modalities.frame import Frame
from meristem.modalities.lattice import LatticeTokenizer
from meristem.modalities.stream import LatticeStream
from meristem.platform.assembly import Assembly, total
from meristem.platform.encoders import ENCODERS, Encoder
from meristem.platform.encoders.slicewise import Slicewise
from meristem.platform.objectives import Encoded, Items, Plan
from meristem.platform.recipe import load
from meristem.platform.step import Batch

B, T, CHANNELS, SIZE, PATCH = 2, 3, 2, (35, 50), (16, 16)
EVERYTHING = frozenset({"pyramid", "dense", "layers", "attention"})
CASES: dict[str, dict[str, Any]] = {
    "transformer": {"width": 48, "depth": 2, "heads": 3},
    "unet": {"widths": [8, 16, 24], "blocks": [1, 1, 1]},
    "timm": {"model": "test_vit"},
    "timm-resnet": {"model": "resnet18"},
}


def axes(dims: int) -> tuple[Axis, ...]:
    return (Axis("t", "s", 0.1, 9.0), Axis("y", "mm", 1.0, 99.0), Axis("x", "mm", 1.0, 99.0))[-dims:]


def build(case: str, **options: Any) -> Encoder:
    name = case.split("-")[0]
    chosen = ENCODERS["slicewise"].model_validate({"encoder": {name: CASES[case]}, **options})
    return chosen.build(LatticeTokenizer(CHANNELS, (1, *PATCH)), axes(3), CHANNELS).eval()


@cache
def encoder(case: str) -> Slicewise:
    torch.manual_seed(1)
    model = build(case)
    assert isinstance(model, Slicewise)
    return model


def stream(shift: float = 0.0) -> LatticeStream:
    """Spacings differ from row to row and from axis to axis."""
    array = torch.randn(B, CHANNELS, T, *SIZE, generator=torch.Generator().manual_seed(0))
    spacing = torch.tensor([[0.5, 1.0, 2.0], [0.25, 1.5, 0.75]])
    affine = torch.diag_embed(torch.cat([spacing, torch.ones(B, 1)], 1))
    affine[:, :3, 3] += shift
    frame = Frame(affine, (T, *SIZE), spacing, ("s", "mm", "mm"))
    return LatticeStream(array, (1, *PATCH), frame, torch.arange(B)).seen(frozenset({"position"}))


def single(t: int) -> LatticeStream:
    """Slice t of every row as a 2D stream of its own."""
    whole = stream()
    assert whole.frame is not None
    spacing = whole.frame.spacing[:, 1:]
    frame = Frame(torch.eye(3).expand(B, -1, -1), SIZE, spacing, ("mm", "mm"))
    return LatticeStream(whole.array[:, :, t], PATCH, frame, torch.arange(B)).seen(frozenset({"position"}))


def plan(n: int) -> Plan:
    hidden = torch.rand(B, n, generator=torch.Generator().manual_seed(3)) < 0.5
    return Plan(hidden, hidden.float())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_2d_encoder_slice_by_slice(case: str, masked: bool) -> None:
    model, whole = encoder(case), stream()
    hidden = plan(len(whole)) if masked else None
    with torch.no_grad():
        got = model(whole, hidden, want=EVERYTHING)
        alone: list[Encoded] = []
        for t in range(T):
            one = None
            if hidden is not None:
                mine = hidden.hidden.unflatten(1, (T, -1))[:, t]
                one = Plan(mine, mine.float())
            alone.append(model.inner(single(t), one, want=EVERYTHING - {"attention"}))

    def equal(x: Tensor, y: Tensor) -> None:
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)  # some processors round by the batch's size

    def same(x: Tensor, parts: list[Tensor]) -> None:
        equal(x, torch.cat(parts, 1))

    same(got.tokens, [e.tokens for e in alone])
    assert got.valid.all() and got.valid.shape == got.tokens.shape[:2]
    assert alone[0].lattice is not None and got.lattice == (T, *alone[0].lattice)
    assert got.summary.keys() == alone[0].summary.keys() - {"max"} == model.provides & {"mean", "cls"}
    for name, z in got.summary.items():
        equal(z, torch.stack([e.summary[name] for e in alone], 1).mean(1))
    for mine, theirs in zip(got.layers or [], zip(*(e.layers or [] for e in alone), strict=True), strict=True):
        same(mine, list(theirs))
    maps = [*(got.pyramid or []), *([got.dense] if got.dense is not None else [])]
    for t, e in enumerate(alone):
        for mine, flat in zip(maps, [*(e.pyramid or []), *([e.dense] if e.dense is not None else [])], strict=True):
            equal(mine[:, :, t], flat)
    assert got.attention is None
    given = {name for name in EVERYTHING if getattr(got, name) is not None} | set(got.summary)
    assert given == model.provides


@pytest.mark.parametrize("case", CASES)
def test_maps_have_the_shapes_it_declares_at_stride_one_along_the_slices(case: str) -> None:
    model = encoder(case)
    encoded = model(stream(), want=EVERYTHING)
    assert len(encoded.pyramid or []) == len(model.pyramid_widths)
    for level, width, stride in zip(encoded.pyramid or [], model.pyramid_widths, model.pyramid_strides, strict=True):
        assert level.shape == (B, width, *(-(-n // s) for n, s in zip((T, *SIZE), stride, strict=True)))
    if encoded.dense is not None:
        assert encoded.dense.shape == (B, model.dense_width, T, *SIZE)
    assert len(encoded.layers or []) == model.depth


def test_the_order_of_slices_and_their_distance_cannot_be_told() -> None:
    model, whole = encoder("transformer"), stream()
    backwards = whole.with_array(whole.array.flip(2))
    with torch.no_grad():
        tokens = model(whole).tokens.unflatten(1, (T, -1))
        assert torch.equal(model(backwards).tokens.unflatten(1, (T, -1)).flip(1), tokens)
        assert torch.equal(model(stream(shift=7.0)).tokens, tokens.flatten(1, 2))
        assert whole.frame is not None
        frame = replace(whole.frame, spacing=whole.frame.spacing * torch.tensor([3.0, 1, 1]))
        faster = LatticeStream(whole.array, whole.patch, frame, None, visible=frozenset({"position"}))
        assert torch.equal(model(faster).tokens, tokens.flatten(1, 2))


def test_it_sees_no_more_than_both_recipes_allow() -> None:
    blind = ENCODERS["slicewise"].model_validate({"encoder": {"transformer": {**CASES["transformer"], "sees": []}}})
    torch.manual_seed(0)
    model = blind.build(LatticeTokenizer(CHANNELS, (1, *PATCH)), axes(3), CHANNELS).eval()
    flat = stream()
    flat.array = torch.ones_like(flat.array)  # tokens that differ in nothing but their place
    with torch.no_grad():
        tokens = model(flat).tokens
        assert torch.allclose(tokens, tokens[:, :1].expand_as(tokens), atol=1e-6)
        seeing = encoder("transformer")(flat).tokens
        assert not torch.allclose(seeing, seeing[:, :1].expand_as(seeing), atol=1e-3)
        assert torch.allclose(encoder("transformer")(flat.seen(frozenset())).tokens.std(1), torch.zeros(()), atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_layer_groups_pass_through_and_settings_know_what_is_built(case: str) -> None:
    model = encoder(case)
    grouped = [id(p) for group in model.layer_groups() for p in group]
    assert sorted(grouped) == sorted(map(id, model.parameters()))
    chosen = ENCODERS["slicewise"].model_validate({"encoder": {case.split("-")[0]: CASES[case]}})
    assert (chosen.takes, chosen.provides) == (model.takes, model.provides) and model.takes == {"replace"}
    assert ENCODERS["slicewise"].model_validate(chosen.model_dump(mode="json")) == chosen


@pytest.mark.parametrize(("dims", "patch", "says"), [
    (2, (8, 8), "cuts 3D arrays into slices"), (3, (2, 16, 16), r"patch is \[2, 16, 16\](.|\n)*patch to \[1, 16, 16\]"),
])
def test_what_cannot_be_sliced_is_refused(dims: int, patch: tuple[int, ...], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        ENCODERS["slicewise"]().build(LatticeTokenizer(1, patch), axes(dims), 1)


SLICED = ["encoder={slicewise: {encoder: {transformer: {width: 24, depth: 2, heads: 2}}}}", "views.x.size=[4, 16, 16]",
          "modality.volume.patch=[1, 8, 8]"]


def test_a_volume_recipe_trains_with_it_and_dropping_tokens_is_refused() -> None:
    recipe = load("volume/simmim", SLICED)
    assembly = Assembly(recipe)
    frame = Frame(torch.eye(4).expand(2, -1, -1), (4, 16, 16), torch.ones(2, 3), ("mm",) * 3)
    view = View("x", torch.randn(2, 1, 4, 16, 16), frame, torch.arange(2), torch.zeros(2, dtype=torch.int64))
    total(assembly(Batch(Items(torch.arange(2), torch.arange(2)), {"x": view}), 0.0)).backward()
    assert all(p.grad is not None for name, p in assembly.encoder.named_parameters() if name != "inner.cls")
    with pytest.raises(RecipeError, match="would drop tokens, but this encoder can only take replace"):
        load("volume/mae", SLICED)
    with pytest.raises(RecipeError, match="did you mean transformer"):
        load("volume/simmim", ["encoder={slicewise: {encoder: transformr}}"])


def test_a_file_that_weights_came_from_is_not_recorded() -> None:
    data = {"encoder": {"timm": {"model": "test_vit", "pretrained": "weights.safetensors"}}}
    recorded = ENCODERS["slicewise"].model_validate(data).detached().model_dump(mode="json")
    assert recorded["encoder"]["timm"]["pretrained"] is False
