"""Checkpoints: written whole, explained by their card, and honest about what was loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from meristem.errors import CheckpointError
from meristem.platform import recipe as recipes
from meristem.platform.assembly import Assembly
from meristem.platform.data.source import open_data
from meristem.platform.training import checkpoint
from meristem.platform.training.loop import _reference
from meristem.platform.training.pretrain import card

TINY = ["encoder.transformer.width=32", "encoder.transformer.depth=2", "encoder.transformer.heads=2", "views.x.size=[16,16,16]",
        "objectives.pixels.masked.predictor.decoder={depth: 1, width: 32, heads: 2}"]


def written(folder: Path, run: Path) -> tuple[Assembly, recipes.Recipe]:
    recipe = recipes.load("volume/mae", TINY)
    data = open_data(folder, recipe.modality, cache=folder.parent / "cache", quiet=True)
    assembly = Assembly(recipe)
    about = {**card(recipe, data, data.identities(data.rows()), "pretraining"), **_reference(recipe, assembly)}
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


def test_another_modality_is_refused(volume_folder: Path, tmp_path: Path) -> None:
    written(volume_folder, tmp_path / "run")
    image = recipes.load("image/mae", [t for t in TINY if "views" not in t])
    with pytest.raises(CheckpointError, match="of modality 'volume'"):
        checkpoint.load_encoder(tmp_path / "run", Assembly(image).encoder, image.modality, image.encoder.sees)


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
