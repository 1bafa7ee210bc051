"""Models trained elsewhere: what they see of clouds, what stays visible for it, what is told of it, and how they are named."""

from __future__ import annotations

import json
import math
import shutil
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import meristem
from meristem.errors import CheckpointError, MeristemError, RecipeError
from meristem.modalities.rng import Rng
from meristem.modalities.stream import TokenStream
from meristem.platform import recipe as recipes
from meristem.platform.assembly import Assembly
from meristem.platform.foreign import Run, Timm
from meristem.platform.masked.guides import Guided, Saliency
from meristem.platform.recipe import Recipe
from meristem.platform.step import Step
from meristem.platform.training import checkpoint
from meristem.tasks.inspection import inspect, noise

NET = ["encoder.transformer={width: 24, depth: 2, heads: 2}", "train.workers=0", "train.batch=4", "train.steps=1"]


@pytest.fixture(scope="module")
def eye(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `image/mae` on pictures of 32×32 in patches of 8, one channel."""
    root, rng = tmp_path_factory.mktemp("eye"), np.random.default_rng(0)
    (root / "pictures").mkdir()
    for i in range(4):
        Image.fromarray(rng.integers(0, 255, (32, 32), dtype=np.uint8)).save(root / "pictures" / f"{i}.png")
    meristem.pretrain("image/mae", root / "pictures", root / "run", [
        *NET, "modality.image.channels=1", "views.x.size=[32,32]",
        "objectives.pixels.masked.predictor.decoder={depth: 1, width: 24, heads: 2}"], cache=root / "cache", quiet=True)
    return root / "run"


@pytest.fixture(scope="module")
def clouds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, rng = tmp_path_factory.mktemp("data") / "clouds", np.random.default_rng(0)
    for i in range(10):
        file = root / "ab"[i % 2] / f"{i}.npz"
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(file, points=rng.normal(size=(300, 3)).astype(np.float32))
    return root


def small(name: str, eye: Path, *more: str) -> list[str]:
    inner = "encoder.reader.encoder.transformer" if name == "points/recon" else "encoder.transformer"
    return [f"{inner}.width=24", f"{inner}.depth=1", f"{inner}.heads=2", "modality.points.count=16", "modality.points.size=8",
            "views.x.size=[128]", "objectives.points.masked.predictor.decoder={depth: 1, width: 24, heads: 2}",
            f"foreign.eye.run.weights={eye}", "foreign.eye.run.size=32", "train.workers=0", "train.batch=4", "train.steps=2",
            "train.log_every=1", *([] if name == "points/i2p-mae" else ["encoder.reader.heads=2"]), *more]


def step_of(recipe: Recipe) -> Step:
    torch.manual_seed(0)
    assembly = Assembly(recipe)
    assembly(noise(recipe), 0.0)
    assert assembly.last_step is not None
    return assembly.last_step


# ---- what it sees

def test_a_run_sees_each_picture_as_it_was_trained_to(eye: Path) -> None:
    """Its own modality, tokenizer, normalisation and encoder, on pictures written as files, give the same features."""
    from meristem.modalities.base import View
    from meristem.modalities.frame import Frame
    from meristem.platform.training.restore import restored

    step = step_of(recipes.load("points/i2p-mae", small("points/i2p-mae", eye)))
    sight, view, run = step.sight("eye", "x"), step.view("x"), restored(eye)
    xyz = view.array[:, :3].transpose(1, 2)
    pictures = sight.where.pictures(xyz, torch.ones_like(xyz[..., 0], dtype=torch.bool), 1)
    for row in range(len(xyz)):
        for k in range(3):
            array = pictures[row, k][None].numpy().astype(np.float64)
            scale, offset = run.recipe.modality.statistics(array)
            normed = torch.from_numpy(array * scale[0] + offset[0]).float()[None]
            shown = View("p", normed, Frame(torch.eye(3)[None], (32, 32), torch.ones(1, 2), ("px", "px")),
                         torch.zeros(1).long(), torch.zeros(1).long())
            with torch.no_grad():
                made = run.encoder.eval()(run.tokenizer.stream(shown).seen(run.recipe.encoder.sees),
                                          want=frozenset({"attention"}))
            torch.testing.assert_close(sight.features[row, k].flatten(1).T, made.tokens[0], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(sight.summary[row, k], made.summary["mean"][0], atol=1e-4, rtol=1e-4)
            received = made.attention[0, :, 1:, 1:].mean((0, 1)) * 16
            torch.testing.assert_close(sight.saliency[row, k].flatten(), received, atol=1e-4, rtol=1e-4)


def test_timms_models_see_as_their_configuration_says_and_by_their_class_token(tmp_path: Path) -> None:
    net = timm.create_model("vit_tiny_patch16_224", num_classes=0).eval()
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    onlooker = Timm(model="vit_tiny_patch16_224", weights=tmp_path / "w.safetensors", size=224).build("eye")
    recipe = recipes.load("points/mae")
    view = noise(recipe).views["x"]
    sight = onlooker.look(view)
    xyz = view.array[:, :3].transpose(1, 2)
    pictures = sight.where.pictures(xyz, torch.ones_like(xyz[..., 0], dtype=torch.bool), 1).flatten(0, 1)
    with torch.no_grad():
        theirs = net.forward_features((pictures[:, None].expand(-1, 3, -1, -1) - 0.5) / 0.5)
    torch.testing.assert_close(sight.summary.flatten(0, 1), theirs[:, 0], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(sight.features.flatten(0, 1).flatten(2).transpose(1, 2), theirs[:, 1:], atol=1e-4, rtol=1e-3)
    block, seen = net.blocks[-1], []
    block.attn.fused_attn = False
    block.attn.attn_drop.register_forward_hook(lambda module, given, out: seen.append(out))
    with torch.no_grad():
        net.forward_features((pictures[:, None].expand(-1, 3, -1, -1) - 0.5) / 0.5)
    attended = seen[0][:, :, 0, 1:].mean(1) * 196
    torch.testing.assert_close(sight.saliency.flatten(0, 1).flatten(1), attended, atol=1e-4, rtol=1e-3)


# ---- what stays visible

def stream_of(b: int, n: int, valid: Tensor | None = None) -> TokenStream:
    valid = torch.ones(b, n, dtype=torch.bool) if valid is None else valid
    return TokenStream(torch.zeros(b, n, 2), torch.zeros(b, n, 3), valid, None)


def test_what_stays_is_drawn_by_saliency_without_replacement() -> None:
    """Of 5 tokens 2 stay: a pair as often as drawing by the softmax, twice, gives it."""
    score, rows = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0]), 40_000
    guide, rng = Saliency(by="eye"), Rng.of(0, torch.arange(rows))
    masking = Guided(guide=guide, hide="lowest", ratio=0.6)
    plan = masking.follow(guide.drawn(score.expand(rows, -1), rng), stream_of(rows, 5), rng, (1,))
    assert plan.keep is not None and plan.keep.shape == (rows, 2)
    assert torch.equal(plan.hidden.sum(1), torch.full((rows,), 3))
    odds = score.exp().tolist()
    for a, b in permutations(range(5), 2):
        if a < b:
            expected = sum(odds[x] / sum(odds) * odds[y] / (sum(odds) - odds[x]) for x, y in ((a, b), (b, a)))
            share = float(((plan.keep == torch.tensor([a, b])).all(1)).float().mean())
            assert share == pytest.approx(expected, abs=4 * math.sqrt(expected / rows))


def test_at_a_low_temperature_the_most_salient_stay_and_padding_counts_for_nothing() -> None:
    score = torch.randn(6, 20)
    guide, rng = Saliency(by="eye", temperature=1e-4), Rng.of(0, torch.arange(6))
    masking = Guided(guide=guide, hide="lowest", ratio=0.8)
    plan = masking.follow(guide.drawn(score, rng), stream_of(6, 20), rng, (1,))
    assert torch.equal(~plan.hidden, score >= score.topk(4, 1).values[:, -1:])
    valid = (torch.arange(30) < 20).expand(6, -1)
    more = guide.drawn(torch.cat([score, torch.full((6, 10), 9.0)], 1), rng)
    longer = masking.follow(more, stream_of(6, 30, valid), rng, (1,))
    assert torch.equal(longer.hidden[:, :20], plan.hidden)
    assert longer.keep is not None and longer.keep.shape == (6, 6)
    assert not longer.predict[:, 20:].any()


def test_tokens_are_as_salient_as_the_pixels_that_show_them(eye: Path) -> None:
    sharp = "masking.x.guided.guide.saliency.temperature=1.0e-5"
    step = step_of(recipes.load("points/i2p-mae", small("points/i2p-mae", eye, sharp)))
    stream, sight = step.stream("x"), step.sight("eye", "x")
    assert stream.position is not None
    pixels, score = sight.where.pixels(stream.position), torch.zeros(2, 16)
    large = torch.nn.functional.interpolate(sight.saliency, (32, 32), mode="bicubic")
    for row in range(2):
        for i in range(16):
            score[row, i] = sum(large[row, k, y, x] for k, (y, x) in enumerate(pixels[row, :, i].tolist())) / 3
    hidden = step.plan("x").hidden
    assert hidden.sum(1).tolist() == [13, 13]
    assert (score.masked_fill(hidden, torch.inf).amin(1) >= score.masked_fill(~hidden, -torch.inf).amax(1)).all()


# ---- what is told

def test_visible_tokens_tell_the_mean_of_what_their_points_show(eye: Path) -> None:
    step = step_of(recipes.load("points/i2p-mae", small("points/i2p-mae", eye)))
    target = step.assembly.recipe.objectives["points"].readouts["features"].target  # type: ignore[attr-defined]
    assert target.size_in(step.assembly, "x") == 3 * 24
    stream, view, sight = step.stream("x"), step.view("x"), step.sight("eye", "x")
    points = stream.aux["points"]
    pixels = sight.where.pixels(view.array[:, :3].transpose(1, 2))
    large = torch.nn.functional.interpolate(sight.features.flatten(0, 1), (32, 32), mode="bicubic").unflatten(0, (2, 3))
    made, weight = torch.randn(2, 16, 72), (~step.plan("x").hidden).float()
    expected = 0.0
    for row in range(2):
        for t in range(16):
            there = [torch.cat([large[row, k, :, y, x] for k, (y, x) in enumerate(pixels[row, :, p].tolist())])
                     for p in points[row, t].tolist()]
            expected += float(weight[row, t]) * float((made[row, t] - torch.stack(there).mean(0)).square().sum())
    total, count = target.compare(step, "x", None, made, weight)
    assert float(total) == pytest.approx(expected, rel=1e-4)
    assert float(count) == 2 * 3 * 72


def test_the_image_query_is_told_the_mean_vector_of_the_pictures_and_the_tokens_hear_nothing_of_it(eye: Path) -> None:
    recipe = recipes.load("points/recon", small("points/recon", eye))
    step = step_of(recipe)
    losses = step.assembly(step.batch, 0.0)
    line, objective = losses["pictures"], step.assembly.objectives["pictures"]
    last = step.assembly.last_step
    assert last is not None and last.passes == ["encoder(x, plan)", "eye(x)"]
    made = objective.head(last.encode("x", masked=True).summary["image"])  # type: ignore[operator]
    true = last.sight("eye", "x").summary.mean(1)
    apart = (made - true).abs()
    expected = torch.where(apart < 1, apart.square() / 2, apart - 0.5).mean()
    assert float((line.total / line.count).detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    tokens = [*step.assembly.encoder.get_submodule("inner").parameters()]
    query = step.assembly.encoder.get_parameter("query")
    *none, some = torch.autograd.grad(line.total, [*tokens, query], allow_unused=True)
    assert all(g is None or not g.any() for g in none)
    assert not some[0, 0].any() and some[0, 1].any()  # of its own query alone: none reads another


# ---- recipes

@pytest.mark.parametrize("name", ["points/i2p-mae", "points/recon"])
def test_a_recipe_trains_resumes_and_keeps_no_path(name: str, eye: Path, clouds: Path, tmp_path: Path) -> None:
    laid, cache = small(name, eye), tmp_path / "cache"
    meristem.pretrain(name, clouds, tmp_path / "whole", laid, cache=cache, quiet=True)
    for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines():
        assert all(math.isfinite(v) for v in json.loads(line).values())
    moved = tmp_path / "elsewhere"
    shutil.copytree(eye, moved)
    kept = ["train.checkpoint_every=1", "train.keep=5"]
    meristem.pretrain(name, clouds, tmp_path / "parts", [*laid, *kept], cache=cache, quiet=True)
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "step-00000002")
    again = [*small(name, moved), *kept]  # the same model from another place
    meristem.pretrain(name, clouds, tmp_path / "parts", again, cache=cache, quiet=True, resume=True)
    a, b = (checkpoint.read_weights(tmp_path / run) for run in ("whole", "parts"))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not any("foreign" in key for key in a)
    for file in (tmp_path / "whole" / "recipe.yaml", checkpoint.locate(tmp_path / "whole") / "card.json"):
        assert str(eye) not in file.read_text() and Run(weights=eye).recorded().identity in file.read_text()
    page = meristem.evaluate("points/classification", clouds, tmp_path / "probed", ["views.x.size=[128]", "train.workers=0"],
                             inits=[str(tmp_path / "whole")], protocols=["knn"], seeds=1, cache=cache, quiet=True)
    assert page.is_file()  # the model is no longer asked for
    assert (meristem.embed(tmp_path / "whole", clouds, tmp_path / "vectors", quiet=True)).is_file()


def test_passes_are_shared(eye: Path) -> None:
    assert inspect("points/i2p-mae", small("points/i2p-mae", eye))["passes"] == ["eye(x)", "encoder(x, plan)"]


def test_a_foreign_model_is_no_part_of_the_run(eye: Path) -> None:
    recipe = recipes.load("points/i2p-mae", small("points/i2p-mae", eye))
    assembly = Assembly(recipe)
    theirs = {id(p) for p in assembly.foreign["eye"].encoder.parameters()}
    assert theirs.isdisjoint(id(p) for p in assembly.parameters())
    assert not any(p.requires_grad for p in assembly.foreign["eye"].encoder.parameters())
    assembly.train()
    assert not assembly.foreign["eye"].encoder.training


def test_what_is_missing_or_does_not_fit_is_refused(eye: Path, clouds: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="none was given"):
        Assembly(recipes.load("points/i2p-mae"))
    with pytest.raises(RecipeError, match="no checkpoint in"):
        recipes.load("points/i2p-mae", ["foreign.eye.run.weights=/nowhere"])
    with pytest.raises(RecipeError, match="no weights file"):
        recipes.load("points/i2p-mae", ["foreign.eye={timm: {weights: /nowhere.pth}}"])
    with pytest.raises(RecipeError, match="image data are none"):
        recipes.load("image/mae", ["foreign={eye: {run: {}}}"])
    with pytest.raises(RecipeError, match="no foreign model 'other'"):
        recipes.load("points/i2p-mae", ["masking.x.guided.guide.saliency.by=other"])
    with pytest.raises(RecipeError, match="no vector 'image'"):
        recipes.load("points/recon", ["encoder.reader.queries=[cls]"])
    with pytest.raises(RecipeError, match="not 0123456789abcdef"):
        recipes.load("points/i2p-mae", small("points/i2p-mae", eye, "foreign.eye.run.identity=0123456789abcdef"))
    with pytest.raises(RecipeError, match="no whole patches"):
        Assembly(recipes.load("points/i2p-mae", small("points/i2p-mae", eye, "foreign.eye.run.size=30")))
    meristem.pretrain("points/mae", clouds, tmp_path / "points", [
        "encoder.transformer={width: 24, depth: 1, heads: 2}", "modality.points.count=8", "modality.points.size=4",
        "train.steps=1", "train.workers=0", "train.batch=2"], cache=tmp_path / "cache", quiet=True)
    with pytest.raises(CheckpointError, match="modality 'points'"):
        Run(weights=tmp_path / "points").build("eye")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(MeristemError, match="does not fit"):
        Timm(model="vit_tiny_patch16_224", weights=tmp_path / "other.safetensors").build("eye")
