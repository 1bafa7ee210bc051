"""The encoder waist's two guards: what is hidden has no influence, and where there is nothing to learn nothing is learned."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binom
from torch import Tensor, nn

from meristem.errors import RecipeError
from meristem.modalities.base import Draw, Header, Modality, View, ViewSettings, modality_class
from meristem.modalities.frame import Frame
from meristem.modalities.rng import Rng
from meristem.modalities.stream import HIDEABLE, Edges, TokenStream
from meristem.platform import recipe as recipes
from meristem.platform.assembly import Assembly
from meristem.platform.data.loader import whole
from meristem.platform.encoders import ENCODERS, Encoder
from meristem.platform.objectives import Items, Plan
from meristem.platform.step import Batch

SPACE = {"image": 2, "volume": 3, "video": 3}
SMALL: dict[str, dict[str, Any]] = {  # anything that is not named here is built as it comes
    "transformer": {"width": 24, "depth": 2, "heads": 2},
    "unet": {"widths": [8, 16], "blocks": [1, 1]},
    "segresnet": {"width": 8, "down": [1, 1], "up": [1]},
    "swin": {"width": 12, "depths": [1, 1, 1, 1], "heads": [1, 2, 2, 4], "window": 2},
    "timm": {"model": "vit_tiny_patch16_224", "size": [32, 32]},
}


def made(name: str, **options: Any) -> Modality:
    kind = modality_class(name)
    return kind(kind.Options.model_validate({"channels": 3 if name == "video" else 1, **options}))


# ---- hidden unless seen

def scrambled_view(view: View) -> View:
    """The same array with every companion changed: where it was cut, from whom, by which draw, how much it weighs."""
    b, dims = len(view), view.frame.dims
    affine = torch.eye(dims + 1).repeat(b, 1, 1)
    affine[:, :dims] += torch.randn(b, dims, dims + 1)
    return replace(view, frame=replace(view.frame, affine=affine), item=view.item.flip(0) + 7, look=view.look + 3,
                   params={k: torch.randn_like(v.float()) for k, v in view.params.items()},
                   weight=torch.rand(b, 1, *view.frame.shape))


def random_edges(rows: int, size: int) -> Edges:
    index = torch.randint(0, size, (2, 3 * rows)) + torch.arange(rows).repeat(3) * size
    return Edges(index, torch.zeros(3 * rows, dtype=torch.int64), None, rows, size)


def scrambled(stream: TokenStream, keep: frozenset[str]) -> TokenStream:
    """Random values in every hideable field that is not in `keep`."""
    new: dict[str, Any] = {
        "position": torch.randn_like(stream.position), "source": torch.randn_like(stream.source),
        "kind": {"segment": torch.randint(0, 9, stream.valid.shape)}, "aux": {"flow": torch.randn(*stream.valid.shape, 2)},
        "weight": torch.rand_like(stream.content), "structure": torch.randn(*stream.valid.shape, 3),
        "edges": random_edges(*stream.valid.shape),
        "item": torch.randint(0, 99, (stream.batch,))}
    assert new.keys() == set(HIDEABLE), "a new field of the stream must be scrambled here"
    return replace(stream, **{k: v for k, v in new.items() if k not in keep})


def noise_view(modality: Modality, size: int, batch: int = 3) -> View:
    dims = len(modality.axes)
    shape = (size,) * dims
    frame = Frame(torch.eye(dims + 1).repeat(batch, 1, 1), shape, torch.ones(batch, dims), tuple(a.unit for a in modality.axes))
    return View("x", torch.randn(batch, modality.channels, *shape), frame, torch.arange(batch), torch.zeros(batch).long(),
                {"flip": torch.zeros(batch, dims)})


def built(name: str, modality: Modality) -> tuple[Encoder, frozenset[str], frozenset[str]]:
    """(encoder, what it sees, what it can be asked for); skips a combination that is refused."""
    settings = ENCODERS[name].model_validate(SMALL.get(name, {}))
    try:
        encoder = settings.build(modality.tokenizer(), modality.axes, modality.channels)
    except RecipeError as refusal:
        pytest.skip(refusal.what)
    return encoder.eval(), settings.sees, settings.provides & {"pyramid", "dense", "layers", "attention"}


def tensors(result: Any) -> list[Tensor]:
    """All tensors of an `Encoded`, in order."""
    if isinstance(result, Tensor):
        return [result]
    parts = result.values() if isinstance(result, dict) else result if isinstance(result, list | tuple) else \
        vars(result).values() if hasattr(result, "__dict__") else ()
    return [t for part in parts for t in tensors(part)]


def assert_equal(a: Any, b: Any) -> None:
    ours, theirs = tensors(a), tensors(b)
    assert len(ours) == len(theirs) > 0
    for x, y in zip(ours, theirs, strict=True):
        assert torch.equal(x, y)


def plans(net: Encoder, rows: int, n: int) -> list[Plan | None]:
    """Every way in which an encoder can be masked, none among them; half of n tokens are hidden."""
    order = Rng.of(0, torch.arange(rows)).permutation("hide", n)
    hidden = torch.zeros(rows, n, dtype=torch.bool).scatter(1, order[:, n // 2:], True)
    made: list[Plan | None] = [None]
    if "replace" in net.takes:
        made.append(Plan(hidden, hidden.float()))
    if "drop" in net.takes:
        made.append(Plan(hidden, hidden.float(), order[:, :n // 2].sort(1).values))
    return made


@pytest.mark.parametrize("modality", SPACE)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_what_an_encoder_does_not_see_does_not_change_it(encoder: str, modality: str) -> None:
    vit = encoder == "timm"
    kind = made(modality, patch=(16 if vit else 4,) * SPACE[modality])
    net, sees, want = built(encoder, kind)
    view = noise_view(kind, 32 if vit or encoder == "swin" else 16)
    tokenizer = kind.tokenizer()
    plain, other = tokenizer.stream(view), tokenizer.stream(scrambled_view(view))
    with torch.no_grad():
        for plan in plans(net, len(view), len(plain)):
            assert_equal(net(plain.seen(sees), plan, want=want), net(other.seen(sees), plan, want=want))


@pytest.mark.parametrize("field", ["source", "positon"])
def test_source_places_and_misspelt_fields_are_refused(field: str) -> None:
    with pytest.raises(RecipeError, match=field):
        recipes.load("image/mae", [f"encoder.transformer.sees=[{field}]"])


@pytest.mark.parametrize("modality", SPACE)
@pytest.mark.parametrize("sees", [(), ("position",), ("position", "weight", "item")])
def test_a_set_of_tokens_gives_only_what_is_seen(modality: str, sees: tuple[str, ...]) -> None:
    """The same for streams that are not lattices, with every field filled; and the test can fail."""
    kind = made(modality, patch=(4,) * SPACE[modality])
    net, _, want = built("transformer", kind)
    stream = kind.tokenizer().stream(noise_view(kind, 8))
    full = scrambled(stream.take(torch.arange(len(stream)).expand(stream.batch, -1)), frozenset())
    other, allowed = scrambled(full, frozenset(sees)), frozenset(sees)
    with torch.no_grad():
        assert_equal(net(full.seen(allowed), want=want), net(other.seen(allowed), want=want))
        if "position" in sees:
            moved = replace(other, position=other.position + torch.randn_like(other.position))
            assert not torch.equal(net(full.seen(allowed)).tokens, net(moved.seen(allowed)).tokens)


@pytest.mark.parametrize("name", ["image/mae", "image/simmim", "volume/mae", "image/simclr", "video/videomae",
                                  "video/v-jepa"])
def test_losses_of_recipes_know_nothing_of_where_views_were_cut(name: str) -> None:
    """Whole recipes: masking, encoder, predictor and target of a content loss stay bit-equal for other source geometry."""
    side = {"image": 32, "volume": 16, "video": 48}[name.split("/")[0]]
    views = [f"views.{view}.size={[side] * SPACE[name.split('/')[0]]}" for view in recipes.read(name)["views"]]
    recipe = recipes.load(name, [*views, "encoder.transformer.depth=1"])
    assembly = Assembly(recipe).eval()
    batch = Batch(Items(torch.arange(3), torch.arange(3)), {})
    for view, settings in recipe.views.items():
        look = noise_view(recipe.modality, side, 3 * settings.count)
        batch.views[view] = replace(look, name=view, item=torch.arange(3).repeat_interleave(settings.count),
                                    look=torch.arange(settings.count).repeat(3))
    other = Batch(batch.items, {k: replace(v, frame=scrambled_view(v).frame) for k, v in batch.views.items()})
    with torch.no_grad():
        for (line, a), b in zip(assembly(batch, 0.5).items(), assembly(other, 0.5).values(), strict=True):
            assert torch.equal(torch.as_tensor(a.total), torch.as_tensor(b.total)), line


# ---- nothing is learned from noise

class Noise:
    """A cache of white noise: every sample its own, of `channels` and `side` elements per axis."""

    def __init__(self, dims: int, side: int, channels: int) -> None:
        affine = tuple(tuple(float(i == j) for j in range(dims + 1)) for i in range(dims + 1))
        self._header = Header((channels, *[side] * dims), affine, (1.0,) * dims, (1 / 74,) * channels,
                              (-127.5 / 74,) * channels, (0.0,) * channels)

    def tables(self, row: int) -> dict[str, np.ndarray]:
        return {}

    def fields(self, row: int) -> tuple[str, ...]:
        return ()

    def header(self, row: int) -> Header:
        return self._header

    def windows(self, row: int, draws: list[Draw]) -> list[np.ndarray]:
        sample = np.random.default_rng(row).integers(0, 256, self._header.shape, np.uint8)
        windows = [[slice(a, a + n) for a, n in zip(d.start, d.size, strict=True)] for d in draws]
        return [sample[(slice(None), list(d.index) if d.index else w[0], *w[1:])] for d, w in zip(draws, windows, strict=True)]


def looks(modality: Modality, options: ViewSettings, side: int, first: int, count: int) -> View:
    """Views of white noise as the loader draws and the device augments them."""
    rows: Any = [SimpleNamespace(index=i) for i in range(first, first + count)]
    cache: Any = Noise(len(modality.axes), side, modality.channels)
    return modality.augment(whole(cache, rows, modality, options), options)


def accuracy(modality: Modality, train: View, test: View, labels: Any, leak: bool) -> np.ndarray:
    """Held-out accuracy, per binary pretext, of a small transformer; leak: it is given source places as positions."""
    torch.manual_seed(0)
    settings = ENCODERS["transformer"].model_validate({"width": 48, "depth": 2, "heads": 2})
    tokenizer = modality.tokenizer()
    encoder = settings.build(tokenizer, modality.axes, modality.channels)
    head = nn.Linear(2 * encoder.width, labels(test).shape[1])

    def predict(view: View) -> Tensor:
        stream: TokenStream = tokenizer.stream(view)
        if leak:
            everything = stream.take(torch.arange(len(stream)).expand(stream.batch, -1))
            stream = replace(everything, position=everything.source)
        summary = encoder(stream.seen(settings.sees)).summary
        return head(torch.cat([summary["cls"], summary["mean"]], -1))

    optimiser = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, STEPS, pct_start=0.2)
    for step in range(STEPS):
        batch = train.select(Rng.of(0, step).integers("rows", len(train), 64)[0])
        loss = nn.functional.binary_cross_entropy_with_logits(predict(batch), labels(batch).float())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    with torch.no_grad():
        return ((predict(test) > 0) == labels(test)).float().mean(0).numpy()


STEPS, RATE, TRAIN, TEST = 100, 6e-3, 800, 600


def crop_labels(view: View) -> Tensor:
    """(B, C) in which half of the sample, along each axis, the crop starts; then (B, C) whether each axis is mirrored."""
    centre = view.frame.to_source(torch.tensor([(n - 1) / 2 for n in view.frame.shape]).expand(len(view), 1, -1))[:, 0]
    return torch.cat([centre > (SIDE - 1) / 2, view.params["flip"] > 0], 1)


def affine_labels(view: View) -> Tensor:
    """(B, 1 + turns) whether the view is enlarged, and the sense of each rotation."""
    return torch.cat([view.params["zoom"][:, None] > 1, view.params["rotate"] > 0], 1)


SIDE = 19  # 12 leaves eight places to start on each axis: four in either half


@pytest.mark.parametrize("name,pretext", [("image", "crop"), ("volume", "crop"), ("image", "affine")])
def test_a_pretext_on_white_noise_stays_at_chance(name: str, pretext: str) -> None:
    """Where a crop lies and whether it is mirrored; how far a view is turned and enlarged.

    Crops keep their noise. Turning interpolates it, which shows in its texture, so that noise is drawn afresh: what remains
    is what the geometry tells. Control: source places as positions give the first labels away.
    """
    kind = made(name, patch=(4,) * SPACE[name])
    chance = {"window": "crop", "size": [12] * SPACE[name], "flip": [0.5] * SPACE[name]}
    if pretext == "affine":
        chance |= {"affine": {"rotate": 30.0, "zoom": [0.5, 1.5]}}
    options = kind.ViewOptions.model_validate(chance)
    train, test = (looks(kind, options, SIDE, first, count) for first, count in ((0, TRAIN), (TRAIN, TEST)))
    labels, told = (crop_labels, SPACE[name]) if pretext == "crop" else (affine_labels, 1)
    if pretext == "affine":
        train, test = (replace(v, array=torch.randn_like(v.array), weight=None) for v in (train, test))
    low, high = np.array(binom.interval(1 - 1e-4, TEST, 0.5)) / TEST
    honest = accuracy(kind, train, test, labels, leak=False)
    assert ((honest >= low) & (honest <= high)).all(), honest
    assert (accuracy(kind, train, test, labels, leak=True)[:told] > 0.75).all()
