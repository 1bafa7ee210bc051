"""Encoders: one contract for all, and each against an independent reference."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor

from meristem.errors import CheckpointError, MeristemError, RecipeError
from meristem.modalities.base import Axis
from meristem.modalities.frame import Frame
from meristem.modalities.lattice import LatticeTokenizer
from meristem.modalities.stream import LatticeStream, TokenStream, gather
from meristem.platform.encoders import ENCODERS, Encoder
from meristem.platform.encoders.block import Block, rotated
from meristem.platform.encoders.rotary import Rotary
from meristem.platform.encoders.transformer import Blocks
from meristem.platform.objectives import Encoded, Plan

EVERYTHING = frozenset({"pyramid", "dense", "layers", "attention"})
CASES: dict[str, tuple[int, str, dict[str, Any]]] = {
    "transformer-2d": (2, "transformer", {"width": 48, "depth": 2, "heads": 3, "cls": True}),
    "transformer-3d": (3, "transformer", {"width": 48, "depth": 2, "heads": 3, "cls": False}),
    "unet-2d": (2, "unet", {"widths": (8, 16, 24), "blocks": (1, 2, 1)}),
    "unet-3d": (3, "unet", {"widths": (8, 16, 24), "blocks": (1, 1, 1), "strides": ((1, 2, 2), (2, 2, 2))}),
    "unet-3d-encoder": (3, "unet", {"widths": (8, 16), "blocks": (1, 1), "decoder": False}),
    "segresnet-2d": (2, "segresnet", {"width": 8, "down": (1, 1, 1), "up": (1, 1)}),
    "segresnet-3d": (3, "segresnet", {"width": 8, "down": (1, 1, 1), "up": (1, 1)}),
    "swin-2d": (2, "swin", {"width": 12, "depths": (1, 1, 1, 1), "heads": (1, 2, 2, 2)}),
    "swin-3d": (3, "swin", {"width": 12, "depths": (2, 1, 1, 1), "heads": (1, 2, 2, 2)}),
    "timm-vit": (2, "timm", {"model": "test_vit"}),
    "timm-vit-mean": (2, "timm", {"model": "test_vit2"}),
    "timm-resnet": (2, "timm", {"model": "resnet18"}),
    "timm-convnext": (2, "timm", {"model": "convnext_atto"}),
}
CHANNELS = 2
SIZE = {2: (37, 50), 3: (17, 22, 18)}  # no multiple of anything
PATCH = {2: (16, 16), 3: (8, 8, 8)}


def axes(dims: int) -> tuple[Axis, ...]:
    return tuple(Axis(name, "mm", 2.0, 50.0) for name in "tzyx"[-dims:])


def tokenizer(dims: int) -> LatticeTokenizer:
    return LatticeTokenizer(CHANNELS, PATCH[dims])


@cache
def encoder(case: str) -> Encoder:
    torch.manual_seed(1)
    dims, name, options = CASES[case]
    return ENCODERS[name](**options).build(tokenizer(dims), axes(dims), CHANNELS).eval()


def stream(case: str, batch: int = 2) -> LatticeStream:
    dims = CASES[case][0]
    array = torch.randn(batch, CHANNELS, *SIZE[dims])
    affine = torch.eye(dims + 1).expand(batch, -1, -1)
    frame = Frame(affine, SIZE[dims], torch.ones(batch, dims) + torch.arange(batch)[:, None], ("mm",) * dims)
    return LatticeStream(array, PATCH[dims], frame, torch.arange(batch))


def plan(n: int, batch: int = 2, keep: bool = False) -> Plan:
    """Hides half of the tokens, other ones in each row."""
    kept = torch.stack([torch.randperm(n)[:(n + 1) // 2].sort().values for _ in range(batch)])
    hidden = torch.ones(batch, n, dtype=torch.bool).scatter(1, kept, False)
    return Plan(hidden, hidden.float(), kept if keep else None)


def outputs(encoded: Encoded) -> list[Tensor]:
    every = [encoded.tokens, *encoded.summary.values(), *(encoded.pyramid or []), *(encoded.layers or [])]
    return every + [x for x in (encoded.dense, encoded.attention) if x is not None]


def corruptions(model: Encoder, n: int) -> list[Plan | None]:
    return [None, *(plan(n, keep=how == "drop") for how in sorted(model.takes))]


@pytest.mark.parametrize("case", CASES)
def test_it_returns_what_it_provides_in_the_shapes_it_declares(case: str) -> None:
    model, tokens = encoder(case), stream(case)
    array = tokens.array.shape[2:]
    encoded = model(tokens, want=EVERYTHING)
    assert encoded.tokens.shape == (2, math.prod(encoded.lattice or ()), model.width)
    assert encoded.valid.shape == encoded.tokens.shape[:2] and encoded.valid.all()
    given = {name for name in EVERYTHING if getattr(encoded, name) is not None} | set(encoded.summary)
    assert given == model.provides
    assert all(z.shape == (2, model.width) for z in encoded.summary.values())
    for level, width, stride in zip(encoded.pyramid or [], model.pyramid_widths, model.pyramid_strides, strict=True):
        assert level.shape == (2, width, *(math.ceil(n / s) for n, s in zip(array, stride, strict=True)))
    if encoded.dense is not None:
        assert encoded.dense.shape == (2, model.dense_width, *array)
    assert len(encoded.layers or []) == model.depth
    if encoded.layers is not None:
        assert all(layer.shape == encoded.tokens.shape for layer in encoded.layers)
    unasked = model(tokens)
    assert [unasked.pyramid, unasked.dense, unasked.layers, unasked.attention] == [None] * 4
    assert torch.allclose(unasked.tokens, encoded.tokens, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_what_is_not_seen_and_what_is_hidden_cannot_be_told(case: str) -> None:
    model, tokens = encoder(case), stream(case)
    other = replace(tokens.frame, spacing=torch.rand(2, len(tokens.patch)) + 3, affine=torch.randn_like(tokens.frame.affine))
    moved = LatticeStream(tokens.array, tokens.patch, other, tokens.item.flip(0), torch.rand_like(tokens.array))
    for masking in corruptions(model, len(tokens)):
        blind = model(tokens.seen(frozenset()), masking)
        assert torch.equal(blind.tokens, model(moved.seen(frozenset()), masking).tokens)
        if masking is None:
            continue
        noise = torch.randn_like(tokens.content)
        content = torch.where(masking.hidden[..., None], noise, tokens.content)
        array = tokens.array.clone()
        inner = [slice(g * p) for g, p in zip(tokens.lattice, tokens.patch, strict=True)]
        array[(..., *inner)] = tokenizer(len(tokens.patch)).fold(content, tokens.lattice)
        for a, b in zip(outputs(model(tokens, masking)), outputs(model(tokens.with_array(array), masking)), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("case", CASES)
def test_a_row_does_not_depend_on_its_batch_mates(case: str) -> None:
    model, tokens = encoder(case), stream(case, 3)
    for masking in corruptions(model, len(tokens)):
        rows = None if masking is None else Plan(*(x.repeat(2, 1)[:3] for x in (masking.hidden, masking.predict)),
                                                  keep=None if masking.keep is None else masking.keep.repeat(2, 1)[:3])
        together = outputs(model(tokens, rows, want=model.provides))
        for i in range(3):
            one = LatticeStream(tokens.array[i:i + 1], tokens.patch, tokens.frame.select(slice(i, i + 1)), tokens.item[i:i + 1])
            row = None if rows is None else Plan(rows.hidden[i:i + 1], rows.predict[i:i + 1],
                                                 None if rows.keep is None else rows.keep[i:i + 1])
            for a, b in zip(together, outputs(model(one, row, want=model.provides)), strict=True):
                torch.testing.assert_close(a[i:i + 1], b, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_learns_and_stands_in_one_layer_group(case: str) -> None:
    model, tokens = deepcopy(encoder(case)), stream(case)
    for p in model.parameters():  # some nets start with branches at zero, through which nothing flows
        p.data += 0.02 * torch.randn_like(p)
    loss = sum(x.square().mean() for masking in corruptions(model, len(tokens))
               for x in outputs(model(tokens, masking, want=model.provides)))
    loss.backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # a Swin stage reduced to one token has no relative positions
    assert not [name for name in dead if not name.endswith("relative_position_bias_table")]
    grouped = [id(p) for group in model.layer_groups() for p in group]
    assert sorted(grouped) == sorted(map(id, model.parameters())) and all(model.layer_groups())


@pytest.mark.parametrize("case", CASES)
def test_mixed_precision_stays_near(case: str) -> None:
    model, tokens = encoder(case), stream(case)
    with torch.no_grad():
        exact = outputs(model(tokens, want=model.provides))
        with torch.autocast("cpu", torch.bfloat16):
            mixed = outputs(model(tokens, want=model.provides))
    for a, b in zip(exact, mixed, strict=True):
        assert (a - b.float()).norm() < 0.1 * a.norm()


@pytest.mark.parametrize("case", CASES)
def test_settings_know_before_building_what_is_built(case: str) -> None:
    _, name, options = CASES[case]
    chosen = ENCODERS[name](**options)
    assert (chosen.takes, chosen.provides) == (encoder(case).takes, encoder(case).provides)
    assert ENCODERS[name].model_validate(chosen.model_dump(mode="json")) == chosen


def test_seen_fields_are_written_in_one_order() -> None:
    sees = ENCODERS["transformer"](sees={"position", "kind", "edges"}).model_dump(mode="json")["sees"]
    assert sees == ["edges", "kind", "position"]


# rotary positions

def test_rotary_table_turns_pairs_as_complex_numbers() -> None:
    rotary = Rotary(8, [Axis("x", "mm", 2.0, 54.0)])
    position, q = torch.randn(2, 5, 1) * 20, torch.randn(2, 3, 5, 8)
    scale = torch.tensor([2.0, 6.0, 18.0, 54.0])
    turned = torch.view_as_complex(q.reshape(2, 3, 5, 4, 2)) * torch.exp(1j * position[:, None] / scale)
    expected = torch.view_as_real(turned).flatten(-2)
    torch.testing.assert_close(rotated(q, rotary(position)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_a_block_reads_timms_weights_and_does_what_timm_does(drop_path: float) -> None:
    from timm.models.eva import EvaBlock

    theirs = EvaBlock(24, 2, num_prefix_tokens=0, attn_type="rope", drop_path=drop_path)
    block = Block(24, 2, drop_path=drop_path)
    block.load_state_dict(theirs.state_dict())
    x, rope = torch.randn(4, 5, 24), Rotary(12, axes(2))(torch.rand(4, 5, 2) * 40)
    mask = torch.rand(4, 1, 5, 5) > 0.3
    mask |= torch.eye(5, dtype=torch.bool)
    torch.manual_seed(1)
    expected = theirs(x, rope=rope, attn_mask=mask)
    torch.manual_seed(1)
    torch.testing.assert_close(block(x, rope, mask, kept=block.drawn(x, None))[0], expected)


def test_rotation_is_the_same_on_every_way(monkeypatch: pytest.MonkeyPatch) -> None:
    x, rope = torch.randn(2, 3, 5, 8), Rotary(8, axes(2))(torch.rand(2, 5, 2) * 40)
    on_processor = rotated(x, rope)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(rotated(x, rope), on_processor)
    assert rotated(x.bfloat16(), rope).dtype == torch.bfloat16


def test_prefix_and_leftover_channels_are_not_rotated() -> None:
    table = Rotary(16, axes(3))(torch.randn(2, 5, 3), prefix=2)  # 8 pairs: 2 per axis, 2 left over
    assert table.shape == (2, 1, 7, 32)
    x = torch.randn(2, 1, 7, 16)
    y = rotated(x, table)
    assert torch.equal(y[:, :, :2], x[:, :, :2]) and torch.equal(y[..., 12:], x[..., 12:])
    assert not torch.isclose(y[:, :, 2:, :12], x[:, :, 2:, :12]).all(-1).any()


@settings(max_examples=15, deadline=None)
@given(dims=st.integers(1, 4), seed=st.integers(0, 99), shift=st.lists(st.floats(-60, 60, width=32), min_size=4, max_size=4))
def test_blocks_depend_on_position_differences_only(dims: int, seed: int, shift: list[float]) -> None:
    torch.manual_seed(seed)
    blocks = Blocks(32, 2, 2, axes(dims)).eval()
    x, position = torch.randn(2, 6, 32), torch.rand(2, 6, dims) * 40
    there, _, _ = blocks(x, position)
    torch.testing.assert_close(blocks(x, position + torch.tensor(shift[:dims]))[0], there, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(blocks(x, position * 1.5)[0], there, atol=1e-3)
    assert not torch.allclose(blocks(x, None)[0], there, atol=1e-3)


@pytest.mark.parametrize("case", ["whole", "padded", "packed", "ordered", "layers"])
def test_tokens_that_alone_are_read_are_what_they_would_be_among_all(case: str) -> None:
    torch.manual_seed(0)
    blocks, x, position = Blocks(24, 3, 2, axes(2)), torch.randn(4, 7, 24), torch.rand(4, 6, 2) * 40
    blocks.packs = case == "packed"
    only = torch.tensor([[0, 3], [5, 2], [4, 4], [1, 6]])
    options: dict[str, Any] = {}
    if case in ("padded", "packed"):
        options["valid"] = torch.arange(6) < torch.tensor([[3], [6], [4], [6]])
    if case == "ordered":
        options["order"] = torch.argsort(torch.rand(4, 6), 1)
    if case == "layers":
        options["want"] = frozenset({"layers"})
    made: list[Tensor] = []
    for block in blocks.blocks:
        block.register_forward_hook(lambda module, inputs, output: made.append(output[0]))
    every, alone = blocks(x, position, 1, **options)[0], blocks(x, position, 1, only=only, **options)[0]
    torch.testing.assert_close(alone, gather(every, only))
    assert [y.shape[1] for y in made[3:]] == ([7, 7, 2] if case == "whole" else [y.shape[1] for y in made[:3]])
    of_every, of_alone = (torch.autograd.grad((y * torch.arange(24)).sum(), blocks.parameters())
                          for y in (gather(every, only), alone))
    for a, b in zip(of_every, of_alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


def test_too_narrow_heads_are_refused() -> None:
    with pytest.raises(RecipeError, match="2 channels per head"):
        Rotary(2, axes(3))
    with pytest.raises(ValidationError, match="even number of channels"):
        ENCODERS["transformer"](width=50, heads=4)


# the transformer

def test_padding_never_reaches_valid_tokens() -> None:
    blocks, prefix = Blocks(32, 2, 2, axes(2)).eval(), 1
    x, position = torch.randn(3, prefix + 6, 32), torch.rand(3, 6, 2) * 40
    lengths = [6, 3, 0]
    valid = torch.arange(6) < torch.tensor(lengths)[:, None]
    x[:, prefix:][~valid] = float("nan")
    position[~valid] = float("inf")
    y, layers, attention = blocks(x, position, prefix, valid, frozenset({"layers", "attention"}))
    for row, n in enumerate(lengths):
        alone, _, weights = blocks(x[row:row + 1, :prefix + n], position[row:row + 1, :n], prefix,
                                   want=frozenset({"attention"}))
        torch.testing.assert_close(y[row:row + 1, :prefix + n], alone, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(attention[row:row + 1, :, :prefix + n, :prefix + n], weights, atol=1e-5, rtol=1e-5)
    assert torch.isfinite(y).all() and len(layers) == 2
    assert torch.isfinite(blocks(x[:, prefix:], position, 0, valid)[0]).all()


def test_attention_is_what_the_last_block_used() -> None:
    blocks = Blocks(32, 3, 2, axes(2)).eval()
    x, position = torch.randn(2, 5, 32), torch.rand(2, 5, 2) * 40
    _, layers, attention = blocks(x, position, want=frozenset({"layers", "attention"}))
    attn, before = blocks.blocks[-1].attn, blocks.blocks[-1].norm1(layers[1])
    values = attn.qkv(before)[..., 64:].reshape(2, 5, 2, 16).transpose(1, 2)
    mixed = attn.proj((attention @ values).transpose(1, 2).reshape(2, 5, 32))
    torch.testing.assert_close(mixed, attn(before, rope=blocks.rotary(position)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", ["transformer-2d", "transformer-3d"])
def test_dropping_embeds_and_encodes_the_kept_tokens_only(case: str) -> None:
    model, tokens = encoder(case), stream(case)
    masking = plan(len(tokens), keep=True)
    sizes: list[int] = []
    hook = model.embed.register_forward_hook(lambda module, args, result: sizes.append(result.shape[1]))
    dropped = model(tokens, masking, want=model.provides)
    hook.remove()
    assert sizes == [masking.keep.shape[1]] and torch.equal(dropped.index, masking.keep)
    rows = torch.arange(2)[:, None]
    subset = TokenStream(tokens.content[rows, masking.keep], tokens.position[rows, masking.keep],
                         torch.ones_like(masking.keep, dtype=torch.bool), tokens.item)
    for a, b in zip(outputs(dropped), outputs(model(subset, want=model.provides)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_mean_leaves_padding_out() -> None:
    model = encoder("transformer-2d")
    content, position = torch.randn(1, 4, math.prod(PATCH[2]) * CHANNELS), torch.rand(1, 4, 2) * 9
    short = TokenStream(content[:, :3], position[:, :3], torch.ones(1, 3, dtype=torch.bool), None)
    padded = TokenStream(content, position, torch.tensor([[True, True, True, False]]), None)
    torch.testing.assert_close(model(padded).summary["mean"], model(short).summary["mean"], atol=1e-5, rtol=1e-5)


# arrays

def test_array_encoders_refuse_streams_without_an_array() -> None:
    points = TokenStream(torch.randn(1, 4, 9), None, torch.ones(1, 4, dtype=torch.bool), None)
    with pytest.raises(RecipeError, match="needs arrays"):
        encoder("unet-2d")(points)


def test_unet_refuses_what_it_cannot_do() -> None:
    tiny = LatticeStream(torch.randn(2, CHANNELS, 4, 4), (4, 4), None, None)
    with pytest.raises(MeristemError, match="single element"):
        encoder("unet-2d")(tiny)
    with pytest.raises(ValidationError, match="one positive number for each"):
        ENCODERS["unet"](widths=(8, 16), blocks=(1,))
    with pytest.raises(RecipeError, match="must hold 3 numbers"):
        ENCODERS["unet"](widths=(8, 16), blocks=(1, 1), strides=((2, 2),)).build(tokenizer(3), axes(3), 1)
    with pytest.raises(RecipeError, match="2D and 3D"):
        ENCODERS["unet"]().build(tokenizer(3), axes(4), 1)


# timm

@pytest.mark.parametrize("model", ["vit_tiny_patch16_224", "test_vit2", "test_vit3"])
def test_timm_vit_equals_timm(model: str) -> None:
    ours = ENCODERS["timm"](model=model).build(tokenizer(2), axes(2), CHANNELS).eval()
    theirs = timm.create_model(model, in_chans=CHANNELS, num_classes=0, dynamic_img_size=True).eval()
    theirs.load_state_dict(ours.net.state_dict(), strict=model != "test_vit3")  # ours has no attention pooling
    x = torch.randn(2, CHANNELS, 48, 64)
    expected = theirs.forward_features(x)
    got = ours(LatticeStream(x, (16, 16), None, None))
    torch.testing.assert_close(got.tokens, expected[:, theirs.num_prefix_tokens:], atol=1e-5, rtol=1e-5)
    if theirs.has_class_token:
        torch.testing.assert_close(got.summary["cls"], expected[:, 0], atol=1e-5, rtol=1e-5)
    if theirs.global_pool == "avg":
        torch.testing.assert_close(got.summary["mean"], theirs.forward_head(expected), atol=1e-5, rtol=1e-5)


def test_timm_vit_drop_keeps_tokens_at_their_places() -> None:
    model, tokens = encoder("timm-vit"), stream("timm-vit")
    everything = torch.arange(len(tokens)).expand(2, -1)
    hidden = torch.zeros(2, len(tokens), dtype=torch.bool)
    whole = model(tokens, want=model.provides)
    for a, b in zip(outputs(model(tokens, Plan(hidden, hidden.float(), everything), want=model.provides)), outputs(whole),
                    strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    shuffled = torch.tensor([[3, 0], [1, 2]])
    masked = Plan(hidden.clone().fill_(True).scatter(1, shuffled, False), hidden.float(), shuffled)
    a, b = model(tokens, masked), model(tokens, replace(masked, keep=shuffled.flip(1)))
    torch.testing.assert_close(a.tokens, b.tokens.flip(1), atol=1e-5, rtol=1e-5)


def test_timm_resnet_equals_timm() -> None:
    ours = encoder("timm-resnet")
    theirs = timm.create_model("resnet18", in_chans=CHANNELS, num_classes=0).eval()
    theirs.load_state_dict(ours.net.state_dict())
    x = torch.randn(2, CHANNELS, 64, 96)
    expected = theirs.forward_features(x)
    got = ours(LatticeStream(x, (16, 16), None, None), want=frozenset({"pyramid"}))
    torch.testing.assert_close(got.pyramid[-1], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.summary["mean"], theirs.forward_head(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_timm_weights_load_for_other_channels_and_sizes(tmp_path: Path, suffix: str) -> None:
    published = timm.create_model("vit_tiny_patch16_224")
    path = tmp_path / f"weights.{suffix}"
    if suffix == "pth":
        torch.save(published.state_dict(), path)
    else:
        save_file(published.state_dict(), path)
    grey = LatticeTokenizer(1, (16, 16))
    ours = ENCODERS["timm"](model="vit_tiny_patch16_224", pretrained=path, size=(64, 64)).build(grey, axes(2), 1).eval()
    assert torch.equal(ours.net.blocks[3].attn.qkv.weight, published.blocks[3].attn.qkv.weight)
    summed = published.patch_embed.proj.weight.sum(1, keepdim=True)
    torch.testing.assert_close(ours.net.patch_embed.proj.weight, summed)
    assert ours.net.pos_embed.shape == (1, 17, 192)
    x = torch.randn(1, 1, 64, 64)
    same = timm.create_model("vit_tiny_patch16_224", pretrained=True, pretrained_cfg_overlay={"file": str(path)},
                             in_chans=1, num_classes=0, img_size=64).eval()
    torch.testing.assert_close(ours(LatticeStream(x, (16, 16), None, None)).tokens, same.forward_features(x)[:, 1:],
                               atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model", ["resnet18", "convnext_atto"])
def test_timm_pyramids_load_weights(tmp_path: Path, model: str) -> None:
    published = timm.create_model(model)
    save_file(published.state_dict(), tmp_path / "weights.safetensors")
    ours = ENCODERS["timm"](model=model, pretrained=tmp_path / "weights.safetensors").build(tokenizer(2), axes(2), 3).eval()
    published.eval()
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(ours(LatticeStream(x, (16, 16), None, None), want=EVERYTHING).pyramid[-1],
                               published.forward_features(x), atol=1e-5, rtol=1e-5)


def test_timm_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    kind = ENCODERS["timm"]
    with pytest.raises(ValidationError, match="did you mean resnet18"):
        kind(model="resnt18")
    with pytest.raises(RecipeError, match="works on 2D images"):
        kind(model="resnet18").build(tokenizer(3), axes(3), 1)
    with pytest.raises(RecipeError, match=r"Set the modality's patch to \[16, 16\]"):
        kind(model="vit_tiny_patch16_224").build(LatticeTokenizer(1, (8, 8)), axes(2), 1)
    with pytest.raises(RecipeError, match=r"Set the modality's patch to \[16, 16\]"):
        encoder("timm-vit")(LatticeStream(torch.randn(1, CHANNELS, 64, 64), (8, 32), None, None))
    with pytest.raises(RecipeError, match="no pyramid"):
        kind(model="eva02_tiny_patch14_224").build(tokenizer(2), axes(2), 1)
    with pytest.raises(CheckpointError, match="no weights file"):
        kind(model="resnet18", pretrained=tmp_path / "none.pth").build(tokenizer(2), axes(2), 1)
    save_file({"something": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="does not fit"):
        kind(model="vit_tiny_patch16_224", pretrained=tmp_path / "other.safetensors").build(tokenizer(2), axes(2), CHANNELS)
