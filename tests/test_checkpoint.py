"""Checkpoints: written whole, explained by their card, and honest about what was loaded."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from meristem.errors import CheckpointError
from meristem.modalities.base import Axis, Tokenizer
from meristem.modalities.frame import Frame
from meristem.modalities.stream import LatticeStream
from meristem.platform import recipe as recipes
from meristem.platform.assembly import Assembly
from meristem.platform.data.source import open_data
from meristem.platform.encoders.base import Encoder
from meristem.platform.encoders.unet import UNetSettings
from meristem.platform.training import checkpoint
from meristem.platform.training.pretrain import card, reference

TINY = ["encoder.transformer.width=32", "encoder.transformer.depth=2", "encoder.transformer.heads=2", "views.x.size=[16,16,16]",
        "objectives.pixels.masked.predictor.decoder={depth: 1, width: 32, heads: 2}"]


def written(folder: Path, run: Path, name: str = "volume/mae", settings: Sequence[str] = TINY
            ) -> tuple[Assembly, recipes.Recipe]:
    recipe = recipes.load(name, settings)
    data = open_data(folder, recipe.modality, cache=folder.parent / "cache", quiet=True)
    assembly = Assembly(recipe)
    about = {**card(recipe, data, data.identities(data.rows()), "pretraining"), **reference(assembly)}
    checkpoint.save(run, 1, assembly.state_dict(), about, {"step": 1}, keep=2)
    return assembly, recipe


def test_a_card_tells_what_the_weights_expect(volume_folder: Path, tmp_path: Path) -> None:
    _, recipe = written(volume_folder, tmp_path / "run")
    found = checkpoint.read_card(tmp_path / "run")
    assert found["modality"] == "volume" and found["channels"] == 1 and found["recipe_hash"] == recipe.hash
    assert [a["unit"] for a in found["axes"]] == ["mm"] * 3
    assert {"torch", "numpy"} <= found["versions"].keys()
    assert len(found["reference"]["embedding"]) == 32
    assert recipes.build(found["recipe"], recipes.Recipe).hash == recipe.hash


def test_a_card_and_state_name_no_file_and_no_folder(volume_folder: Path, tmp_path: Path) -> None:
    written(volume_folder, tmp_path / "run")
    text = (checkpoint.locate(tmp_path / "run") / "card.json").read_text()
    assert "case_0" not in text and volume_folder.name not in json.loads(text)["manifest"] and str(tmp_path) not in text


def test_the_same_weights_load_whole(volume_folder: Path, tmp_path: Path) -> None:
    assembly, recipe = written(volume_folder, tmp_path / "run")
    fresh = Assembly(recipe)
    report = checkpoint.load_encoder(tmp_path / "run", fresh.encoder, recipe.modality, recipe.encoder.sees)
    assert report.coverage == 1.0 and report.similarity == pytest.approx(1.0, abs=1e-4)
    assert not report.missing and not report.unexpected and not report.mismatched
    for a, b in zip(assembly.encoder.parameters(), fresh.encoder.parameters(), strict=True):
        assert torch.equal(a, b)


def test_weights_that_load_but_mean_something_else_are_refused(volume_folder: Path, tmp_path: Path) -> None:
    """Two axes of every patch swapped: all shapes fit, the reference embedding does not."""
    _, recipe = written(volume_folder, tmp_path / "run")
    file = checkpoint.locate(tmp_path / "run") / "weights.safetensors"
    weights = load_file(file)
    name, = (n for n in weights if n.startswith("encoder.embed") and n.endswith("weight"))
    weights[name] = weights[name].reshape(-1, 8, 8, 8).transpose(1, 3).reshape(weights[name].shape).contiguous()
    save_file(weights, file)
    with pytest.raises(CheckpointError, match="embedded differently"):
        checkpoint.load_encoder(tmp_path / "run", Assembly(recipe).encoder, recipe.modality, recipe.encoder.sees)


def test_too_little_coverage_is_refused(volume_folder: Path, tmp_path: Path) -> None:
    written(volume_folder, tmp_path / "run")
    larger = recipes.load("volume/mae", [*TINY, "encoder.transformer.depth=4"])
    with pytest.raises(CheckpointError, match="covers only"):
        checkpoint.load_encoder(tmp_path / "run", Assembly(larger).encoder, larger.modality, larger.encoder.sees)


@pytest.mark.parametrize(("change", "size"), [("modality.volume.channels=2", 16), ("modality.volume.patch=[4,4,4]", 16),
                                              ("modality.volume.patch=[8,8,4]", 16)])
def test_other_channels_or_patches_are_adapted_and_said(change: str, size: int, volume_folder: Path, tmp_path: Path) -> None:
    """A constant input gives the same embedding before and after: the response is kept."""
    assembly, _ = written(volume_folder, tmp_path / "run")
    other = recipes.load("volume/mae", [*TINY, change])
    fresh = Assembly(other)
    report = checkpoint.load_encoder(tmp_path / "run", fresh.encoder, other.modality, other.encoder.sees)
    assert len(report.adapted) == 1 and report.similarity is None
    a, b = (dict(x.encoder.embed.named_parameters()) for x in (assembly, fresh))
    for name, weight in a.items():
        if weight.ndim == 2:
            assert torch.allclose(weight.sum(1), b[name].sum(1), atol=1e-4)


def test_another_modality_that_does_not_fit_is_refused(volume_folder: Path, tmp_path: Path) -> None:
    written(volume_folder, tmp_path / "run")
    image = recipes.load("image/mae", [*(t for t in TINY if "views" not in t), "encoder.transformer.depth=4"])
    with pytest.raises(CheckpointError, match=r"of modality 'volume', the recipe of 'image': it covers only"):
        checkpoint.load_encoder(tmp_path / "run", Assembly(image).encoder, image.modality, image.encoder.sees)


# ---- between two lattice axes and three

SIZES = ["encoder.transformer.width=48", "encoder.transformer.depth=2", "encoder.transformer.heads=2"]
IMAGE = [*SIZES, "views.x.size=[32,32]", "objectives.pixels.masked.predictor.decoder={depth: 1, width: 32, heads: 2}"]
CLIP = ["views.x.size=[4,32,32]"]


def load(run: Path, name: str, settings: Sequence[str], minimum: float = 0.9) -> tuple[Encoder, checkpoint.LoadReport]:
    """The encoder of a recipe (method aside), loaded with a run's weights."""
    read = recipes.override(recipes.read(name), settings)
    recipe = recipes.build(read, recipes.Recipe)
    torch.manual_seed(7)  # other weights than the run's, wherever a tensor is not loaded
    tokenizer = recipe.modality.tokenizer()
    encoder = recipe.encoder.build(tokenizer, recipe.modality.axes, recipe.modality.channels)
    return encoder.eval(), checkpoint.load_encoder(run, encoder, recipe.modality, recipe.encoder.sees, minimum)


def stream(array: torch.Tensor, patch: tuple[int, ...], unit: tuple[str, ...], spacing: tuple[float, ...]) -> LatticeStream:
    n, dims = len(array), array.ndim - 2
    frame = Frame(torch.eye(dims + 1).expand(n, -1, -1), tuple(array.shape[2:]), torch.tensor(spacing).expand(n, -1), unit)
    return LatticeStream(array, patch, frame, torch.arange(n))


@pytest.fixture
def image_run(image_folder: Path, tmp_path: Path) -> tuple[Path, Encoder]:
    assembly, _ = written(image_folder, tmp_path / "image", "image/mae", IMAGE)
    return tmp_path / "image", assembly.encoder.eval()


@pytest.mark.parametrize("length", [1, 2, 4])
def test_a_static_clip_is_embedded_as_its_frame(length: int, image_run: tuple[Path, Encoder]) -> None:
    run, image = image_run
    clip, report = load(run, "video/base", [*SIZES, *CLIP, f"modality.video.patch=[{length},8,8]"])
    assert report.coverage == 1.0 and not report.missing and not report.unexpected and not report.mismatched
    assert report.inflated == report.adapted == [n for n in dict(clip.named_parameters()) if n == "embed.linear.weight"]
    assert report.positions == "2 -> 3 axes" and report.similarity is None
    assert "1 of them inflated" in report.line() and "positions: 2 -> 3 axes" in report.line()
    frame = torch.randn(2, 3, 32, 32)
    still = frame[:, :, None].expand(-1, -1, 8, -1, -1)
    a = image.embed(stream(frame, (8, 8), ("px", "px"), (1.0, 1.0)))
    b = clip.embed(stream(still, (length, 8, 8), ("s", "px", "px"), (0.1, 1.0, 1.0)))
    assert torch.allclose(b.unflatten(1, (8 // length, -1)), a[:, None].expand(-1, 8 // length, -1, -1), atol=1e-5)


@pytest.mark.parametrize("patch", ["[2,8,8]", "[4,4,8]"])
def test_inflated_and_deflated_again_is_the_same_kernel(patch: str, image_run: tuple[Path, Encoder], tmp_path: Path) -> None:
    """Also for a patch of as many elements as before, whose tensor has the same shape and another meaning."""
    run, image = image_run
    clip, report = load(run, "video/base", [*SIZES, *CLIP, f"modality.video.patch={patch}"])
    assert len(report.inflated) == 1
    about = checkpoint.read_card(run)
    recipe = recipes.build(recipes.override(recipes.read("video/base"), [*SIZES, *CLIP, f"modality.video.patch={patch}"]),
                           recipes.Recipe)
    about |= {"recipe": recipe.dump(), "axes": [{"name": a.name, "unit": a.unit} for a in recipe.modality.axes],
              "modality": "video", "reference": {**about["reference"], "size": list(recipe.views["x"].size)}}
    checkpoint.save(tmp_path / "clip", 1, {f"encoder.{k}": v for k, v in clip.state_dict().items()}, about, {"step": 1}, keep=1)
    back, report = load(tmp_path / "clip", "image/base", [*SIZES, f"modality.image.patch=[{patch[3:]}"])
    assert report.deflated == report.adapted and report.coverage == 1.0 and report.positions == "3 -> 2 axes"
    if patch == "[2,8,8]":
        assert torch.allclose(back.embed.linear.weight, image.embed.linear.weight, atol=1e-6)  # type: ignore[union-attr]
    for name, value in image.state_dict().items():
        if name != "embed.linear.weight":
            assert torch.equal(back.state_dict()[name], value)


def test_a_static_clip_comes_out_close_to_its_image(image_run: tuple[Path, Encoder]) -> None:
    """Positions are shared out among one axis more, so the blocks' answers differ; how little is stated here."""
    run, image = image_run
    clip, _ = load(run, "video/base", [*SIZES, *CLIP, "modality.video.patch=[2,8,8]"])
    other, _ = load(run, "video/base", [*SIZES, *CLIP, "modality.video.patch=[2,8,8]"])
    for module in other.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(module.weight)
    frame = torch.randn(8, 3, 32, 32)
    still = stream(frame[:, :, None].expand(-1, -1, 4, -1, -1), (2, 8, 8), ("s", "px", "px"), (0.1, 1.0, 1.0))
    with torch.no_grad():
        a = image(stream(frame, (8, 8), ("px", "px"), (1.0, 1.0)))
        b, c = clip(still), other(still)
    near, far = (torch.cosine_similarity(a.summary["mean"], x.summary["mean"], dim=1) for x in (b, c))
    assert near.min() > 0.95 and far.max() < 0.5


def test_an_encoder_of_slices_takes_an_image_encoder_whole(image_run: tuple[Path, Encoder]) -> None:
    run, image = image_run
    inner = "{width: 48, depth: 2, heads: 2}"
    slices, report = load(run, "video/base", [*CLIP, f"encoder={{slicewise: {{encoder: {{transformer: {inner}}}}}}}",
                                              "modality.video.patch=[1,8,8]"])
    assert report.coverage == 1.0 and not report.missing and not report.unexpected
    frame = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        a = image(stream(frame, (8, 8), ("px", "px"), (1.0, 1.0)))
        b = slices(stream(frame[:, :, None].expand(-1, -1, 4, -1, -1), (1, 8, 8), ("s", "px", "px"), (0.1, 1.0, 1.0)))
    assert torch.allclose(a.summary["mean"], b.summary["mean"], atol=1e-4)


def test_a_convolutional_encoder_of_images_answers_alike_to_a_static_clip(tmp_path: Path) -> None:
    """Away from the clip's ends, where the padding of convolutions is seen; transposed kernels spread and are not divided."""
    settings = UNetSettings(widths=(4, 8), blocks=(1, 1))
    flat, deep = (settings.build(Tokenizer(), (Axis("a", "px", 1, 8),) * n, 1) for n in (2, 3))
    report = checkpoint.fit(deep, flat.state_dict())
    kernels = [n for n, v in flat.state_dict().items() if v.ndim == 4]
    assert sorted(report.inflated) == sorted(report.adapted) == sorted(kernels) and report.coverage == 1.0
    kept = {n: v.clone() for n, v in flat.state_dict().items()}
    for parameter in flat.parameters():
        torch.nn.init.normal_(parameter)
    report = checkpoint.fit(flat, deep.state_dict())
    assert sorted(report.deflated) == sorted(kernels)
    for name, value in flat.state_dict().items():
        assert torch.allclose(value, kept[name], atol=1e-6)
    frame, convolution, cube = torch.randn(1, 8, 6, 6), flat.ups[0], deep.ups[0]  # type: ignore[index]
    assert torch.allclose(cube(frame[:, :, None].expand(-1, -1, 2, -1, -1))[:, :, 3], convolution(frame), atol=1e-5)
    frame = torch.randn(1, 1, 8, 8)
    a = flat.stages[0][0].conv1(frame)  # type: ignore[index,union-attr]
    b = deep.stages[0][0].conv1(frame[:, :, None].expand(-1, -1, 4, -1, -1))  # type: ignore[index,union-attr]
    assert torch.allclose(b[:, :, 1], a, atol=1e-5)


def test_only_whole_checkpoints_are_ever_seen(volume_folder: Path, tmp_path: Path) -> None:
    """What an interrupted write leaves behind is not found, and the last k are kept."""
    run = tmp_path / "run"
    assembly, _ = written(volume_folder, run)
    about = checkpoint.read_card(run)
    for step in (2, 3):
        checkpoint.save(run, step, assembly.state_dict(), about, {"step": step}, keep=2)
    (run / "checkpoints" / ".step-00000009.tmp").mkdir()
    assert checkpoint.locate(run).name == "step-00000003"
    assert sorted(p.name for p in (run / "checkpoints").glob("step-*")) == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize("name", ["weights.safetensors", "card.json", "state.pt"])
def test_a_damaged_file_is_an_error_with_a_name(name: str, volume_folder: Path, tmp_path: Path) -> None:
    written(volume_folder, tmp_path / "run")
    file = checkpoint.locate(tmp_path / "run") / name
    file.write_bytes(file.read_bytes()[:40])
    reader = {"weights.safetensors": checkpoint.read_weights, "card.json": checkpoint.read_card,
              "state.pt": checkpoint.read_state}
    with pytest.raises(CheckpointError):
        reader[name](tmp_path / "run")


def test_a_pickle_in_state_runs_no_code(volume_folder: Path, tmp_path: Path) -> None:
    written(volume_folder, tmp_path / "run")
    trap = tmp_path / "sprung"

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (trap,)  # type: ignore[return-value]

    torch.save({"step": Evil()}, checkpoint.locate(tmp_path / "run") / "state.pt")
    with pytest.raises(CheckpointError):
        checkpoint.read_state(tmp_path / "run")
    assert not trap.exists()


def test_no_checkpoint_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint"):
        checkpoint.locate(tmp_path)


@pytest.mark.parametrize(("entry", "value"), [
    ("channels", "three"), ("channels", 0), ("transfer", None), ("axes", [{"name": 1}]), ("recipe.modality", {}),
    ("recipe.modality", {"volume": {"patch": "large"}}), ("reference.size", [8, 1 << 18, 1 << 18]), ("reference.embedding", {}),
    ("seen", None), ("recipe_hash", 3)])
def test_a_damaged_card_is_refused_by_what_is_wrong_in_it(volume_folder: Path, tmp_path: Path, entry: str,
                                                          value: object) -> None:
    written(volume_folder, tmp_path / "run")
    file = checkpoint.locate(tmp_path / "run") / "card.json"
    about = json.loads(file.read_text())
    *way, last = entry.split(".")
    inner = about
    for key in way:
        inner = inner[key]
    inner[last] = value
    file.write_text(json.dumps(about))
    with pytest.raises(CheckpointError, match=re.escape(f"card.json is damaged: '{entry}")):
        checkpoint.read_card(tmp_path / "run")


@pytest.mark.parametrize("name", ["weights.safetensors", "card.json", "state.pt"])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(volume_folder: Path, tmp_path: Path, name: str) -> None:
    written(volume_folder, tmp_path / "run")
    folder = checkpoint.locate(tmp_path / "run")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(CheckpointError, match=r"cannot be read|can be read|no checkpoint"):
        checkpoint.read_card(folder if name != "weights.safetensors" else tmp_path / "run")
        checkpoint.read_weights(tmp_path / "run")
        checkpoint.read_state(tmp_path / "run")
