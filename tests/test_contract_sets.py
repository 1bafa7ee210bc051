"""The waist's two guards for sets: what is hidden has no influence, and noise teaches nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binom
from test_contract import assert_equal, plans, scrambled
from torch import Tensor, nn

from meristem.catalogue import names
from meristem.errors import RecipeError
from meristem.modalities.base import Modality, View, modality_class
from meristem.modalities.rng import Rng
from meristem.modalities.stream import TokenStream
from meristem.platform import recipe as recipes
from meristem.platform.assembly import Assembly
from meristem.platform.encoders import ENCODERS, Encoder
from meristem.platform.objectives import Items
from meristem.platform.step import Batch

SETS: dict[str, dict[str, Any]] = {
    "points": {"count": 12, "size": 6, "places": True},
    "graph": {"channels": 5, "walk": 4, "laplacian": 3},
    "skeleton": {"layout": "ntu", "segment": 8},
}
SIZE = 40
BOTH = ["position", "structure", "edges"]


def made(name: str) -> Modality:
    kind = modality_class(name)
    return kind(kind.Options.model_validate(SETS[name]))


def built(encoder: str, modality: Modality, sees: list[str]) -> Encoder:
    """A small encoder; skips one that cannot take sets, which must say so."""
    small = {"width": 24, "depth": 2, "heads": 2}
    options: dict[str, Any] = {
        "transformer": {**small, "sees": sees}, "message_passing": {"sees": sees},
        "reader": {"heads": 2, "sees": sees, "encoder": {"transformer": {**small, "sees": sees}}}}.get(encoder, {})
    torch.manual_seed(0)
    try:
        net = ENCODERS[encoder].model_validate(options).build(modality.tokenizer(), modality.axes, modality.channels).eval()
        with torch.no_grad():
            net(modality.tokenizer().stream(example(modality)).seen(frozenset(sees)))
    except RecipeError as refusal:
        pytest.skip(refusal.what)
    return net


def example(modality: Modality, rows: int = 3) -> View:
    return modality.example((SIZE,), Rng.of(0, torch.arange(rows)))


def scrambled_view(view: View) -> View:
    """The same elements and edges with every companion changed: where they were, whose, by which draw."""
    affine = torch.eye(view.frame.affine.shape[-1]).repeat(len(view), 1, 1)
    affine[:, :-1] += torch.randn_like(affine[:, :-1])
    return replace(view, frame=replace(view.frame, affine=affine), item=view.item.flip(0) + 7, look=view.look + 3,
                   index=None if view.index is None else view.index + 100,
                   fields={k: torch.randint_like(v, 9) for k, v in view.fields.items()})


@pytest.mark.parametrize("modality", SETS)
@pytest.mark.parametrize("encoder", ["transformer", "reader", "message_passing"])
def test_what_an_encoder_of_sets_does_not_see_does_not_change_it(encoder: str, modality: str) -> None:
    kind = made(modality)
    net, view = built(encoder, kind, BOTH), example(kind)
    sees = frozenset(BOTH)
    plain, other = (kind.tokenizer().stream(v) for v in (view, scrambled_view(view)))
    torch.manual_seed(1)
    with torch.no_grad():
        for plan in plans(net, len(view), len(plain)):
            assert_equal(net(plain.seen(sees), plan), net(other.seen(sees), plan))


@pytest.mark.parametrize("modality", SETS)
@pytest.mark.parametrize("sees", [[], ["position"], ["structure"], ["edges"], BOTH])
def test_a_field_reaches_the_encoder_when_it_is_seen_and_only_then(modality: str, sees: list[str]) -> None:
    kind = made(modality)
    net, stream, allowed = built("transformer", kind, sees), kind.tokenizer().stream(example(kind)), frozenset(sees)
    with torch.no_grad():
        if (bias := getattr(net.blocks, "bias", None)) is not None:
            bias.copy_(torch.randn_like(bias))  # starts at 0, where edges say nothing
        plain = net(stream.seen(allowed)).tokens
        for field in BOTH:
            there = getattr(stream, field)
            if there is None:
                continue
            new = there.where(torch.arange(len(there)) % 2 == 0) if field == "edges" else torch.randn_like(there)
            changed = net(replace(stream, **{field: new}).seen(allowed)).tokens
            assert torch.equal(changed, plain) == (field not in sees), field
        if modality == "points":
            hidden = replace(scrambled(stream, allowed), edges=None)
            assert torch.equal(net(hidden.seen(allowed)).tokens, plain)


@pytest.mark.parametrize("modality", ["points", "graph"])  # skeletons: see there
def test_padding_and_batch_mates_change_no_token(modality: str) -> None:
    """A row alone and the same row beside another, with elements of weight 0 behind it."""
    kind = made(modality)
    view, extra = example(kind), 7
    net = built("transformer", kind, BOTH)
    weight = nn.functional.pad(torch.ones(3, 1, SIZE), (0, extra))
    longer = replace(view, array=nn.functional.pad(view.array, (0, extra), value=3.0), weight=weight,
                     index=None if view.index is None else nn.functional.pad(view.index, (0, extra), value=-1),
                     fields={k: nn.functional.pad(v, (0, extra), value=-1) for k, v in view.fields.items()},
                     frame=replace(view.frame, shape=(SIZE + extra,)))
    if view.edges is not None:
        row = view.edges.index // SIZE
        longer = replace(longer, edges=replace(view.edges, index=view.edges.index + extra * row, size=SIZE + extra))
    tokenizer = kind.tokenizer()
    with torch.no_grad():
        alone = net(tokenizer.stream(view.select(torch.tensor([1]))).seen(frozenset(BOTH)))
        beside = net(tokenizer.stream(longer).seen(frozenset(BOTH)))
    n = alone.tokens.shape[1]
    torch.testing.assert_close(beside.tokens[1:2, :n], alone.tokens, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(beside.summary["mean"][1:2], alone.summary["mean"], atol=1e-5, rtol=1e-4)


BLIND = [name for name in names() if name.startswith("points/") and name.split("/")[1] in
         {"mae", "maskfeat3d", "3d-jepa", "simclr", "dino", "recon-alone"}]


@pytest.mark.parametrize("name", BLIND)
def test_losses_of_points_know_nothing_of_where_clouds_lay(name: str) -> None:
    """Whole recipes stay bit-equal for other source geometry; those with `near` or segments ask for it."""
    inner = "encoder.reader.encoder.transformer" if name.endswith("recon-alone") else "encoder.transformer"
    recipe = recipes.load(name, [f"{inner}.{key}" for key in ("depth=1", "width=24", "heads=2")])
    torch.manual_seed(0)
    assembly = Assembly(recipe).eval()
    views = {}
    for view, settings in recipe.views.items():
        look = recipe.modality.example((256,), Rng.of(0, torch.arange(2 * settings.count), view))
        views[view] = replace(look, name=view, item=torch.arange(2).repeat_interleave(settings.count),
                              look=torch.arange(settings.count).repeat(2))
    items = Items(torch.arange(2), torch.arange(2))
    moved = {k: replace(v, frame=scrambled_view(v).frame) for k, v in views.items()}
    with torch.no_grad():
        ours, theirs = assembly(Batch(items, views), 0.5), assembly(Batch(items, moved), 0.5)
    for line, a in ours.items():
        assert torch.equal(torch.as_tensor(a.total), torch.as_tensor(theirs[line].total)), line


# ---- nothing is learned from noise

STEPS, RATE, TRAIN, TEST = 40, 6e-3, 600, 400


def mirrored(first: int, count: int) -> tuple[Modality, View]:
    """Gaussian blobs as a view shows them, mirrored at random in x and in y; a blob's mirror image is as likely as itself."""
    kind = made("points")
    rng = Rng.of(7, torch.arange(first, first + count))
    view = kind.example((SIZE,), rng)
    sign = torch.where(rng.uniform("flip", 2) < 0.5, -1.0, 1.0)
    options = kind.ViewOptions.model_validate({"size": [SIZE], "flip": [0.5, 0.5]})
    one, zero = torch.ones(count), torch.zeros(count)
    whole = one.long() * SIZE
    params = {"kept": whole, "left": whole, "centre": zero, "flip": sign, "rotate": torch.zeros(count, 3), "zoom": one,
              "move": torch.zeros(count, 3), "key": torch.arange(count)}
    return kind, kind.augment(replace(view, params=params), options)


def accuracy(kind: Modality, train: View, test: View, leak: bool) -> np.ndarray:
    """Held-out accuracy of telling both flips; leak: the encoder's places are those in the source."""
    torch.manual_seed(0)
    settings = ENCODERS["transformer"].model_validate({"width": 48, "depth": 2, "heads": 2, "sees": ["position", "structure"]})
    tokenizer = kind.tokenizer()
    encoder = settings.build(tokenizer, kind.axes, kind.channels)
    head = nn.Linear(encoder.width, 2)

    def predict(view: View) -> Tensor:
        stream: TokenStream = tokenizer.stream(view)
        if leak:
            stream = replace(stream, position=stream.source, structure=stream.source)
        return head(encoder(stream.seen(settings.sees)).summary["mean"])

    optimiser = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, STEPS, pct_start=0.2)
    for step in range(STEPS):
        batch = train.select(Rng.of(0, step).integers("rows", len(train), 64)[0])
        loss = nn.functional.binary_cross_entropy_with_logits(predict(batch), (batch.params["flip"] > 0).float())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    with torch.no_grad():
        right: np.ndarray = ((predict(test) > 0) == (test.params["flip"] > 0)).float().mean(0).numpy()
    return right


def test_a_pretext_on_blobs_stays_at_chance() -> None:
    """Whether a cloud was mirrored. Control: places in the source beside contents of the view tell it."""
    (kind, train), (_, test) = mirrored(0, TRAIN), mirrored(TRAIN, TEST)
    low, high = np.array(binom.interval(1 - 1e-4, TEST, 0.5)) / TEST
    honest = accuracy(kind, train, test, leak=False)
    assert ((honest >= low) & (honest <= high)).all(), honest
    assert (accuracy(kind, train, test, leak=True) > 0.75).all()
