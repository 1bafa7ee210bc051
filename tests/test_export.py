"""An exported encoder, imported again by others' code, embeds as ours does."""

from __future__ import annotations

import json
from pathlib import Path

import onnxruntime
import pytest
import timm
import torch
from monai.bundle import ConfigParser
from test_tasks import QUICK

import meristem
from meristem.errors import MeristemError, RecipeError
from meristem.platform.export import embedder

SMALL = ["encoder.transformer={width: 48, depth: 2, heads: 4}", *QUICK]
CASES = {  # recipe, data fixture, overrides
    "vit": ("image/mae", "image_folder", [*SMALL, "views.x.size=[32,32]"]),
    "volume": ("volume/mae", "volume_folder", [*SMALL, "views.x.size=[16,16,16]"]),
    "unet": ("volume/mae-unet", "volume_folder", [*QUICK, "encoder.unet={widths: [4, 8, 8, 8], blocks: [1, 1, 1, 1]}",
                                                  "views.x.size=[16,16,16]", "modality.volume.patch=[4,4,4]"])}


def _run(case: str, request: pytest.FixtureRequest, out: Path) -> Path:
    recipe, data, overrides = CASES[case]
    meristem.pretrain(recipe, request.getfixturevalue(data), out, [*overrides, "train.steps=2"], quiet=True)
    return out


def _expected(run: Path, rows: int) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """Input of so many rows, with spacings that differ, and what our own encoder makes of it."""
    model, _, (array, spacing) = embedder(run)
    array = torch.randn(rows, *array.shape[1:])
    spacing = torch.rand(rows, spacing.shape[1]) + 0.5
    with torch.no_grad():
        return (array, spacing), model(array, spacing)


@pytest.mark.parametrize("case", CASES)
def test_programs_and_bundles_embed_as_the_run_does(case: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    run = _run(case, request, tmp_path / "run")
    inputs, expected = _expected(run, 3)
    meristem.export(run, tmp_path / "program")
    meristem.export(run, tmp_path / "bundle", "monai")
    program = torch.export.load(tmp_path / "program" / "model.pt2").module()
    parser = ConfigParser()
    parser.read_config(tmp_path / "bundle" / "configs" / "inference.json")
    parser.read_meta(tmp_path / "bundle" / "configs" / "metadata.json")
    parser["bundle_root"] = str(tmp_path / "bundle")
    for network in (program, parser.get_parsed_content("network_def")):
        torch.testing.assert_close(network(*inputs), expected)
    about = json.loads((tmp_path / "program" / "about.json").read_text())
    assert about["modality"] == CASES[case][0].split("/")[0] and about["step"] == 2
    assert str(tmp_path) not in (tmp_path / "program" / "about.json").read_text()


@pytest.mark.parametrize("case", ["vit", "unet"])
def test_onnx_embeds_as_the_run_does(case: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    run = _run(case, request, tmp_path / "run")
    inputs, expected = _expected(run, 3)
    meristem.export(run, tmp_path / "onnx", "onnx")
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx")
    named = {i.name: x.numpy() for i, x in zip(session.get_inputs(), inputs, strict=False)}  # a U-Net ignores spacing
    for got, want in zip(session.run(None, named), expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(got), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("model", ["test_vit", "resnet10t", "convnext_atto"])
def test_timm_loads_the_weights_and_embeds_as_the_run_does(model: str, image_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    meristem.pretrain("image/simclr", image_folder, run, [f"encoder={{timm: {{model: {model}}}}}", *QUICK, "train.steps=2",
                                                          "views.v.size=[64,64]", "modality.image.patch=16"], quiet=True)
    (array, _), (_, tokens) = _expected(run, 2)
    meristem.export(run, tmp_path / "timm", "timm")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    with torch.no_grad():
        features = theirs.forward_features(array)
    if features.ndim == 4:
        features = features.flatten(2).transpose(1, 2)
    torch.testing.assert_close(features[:, -tokens.shape[1]:], tokens, atol=1e-5, rtol=1e-5)


def test_what_cannot_be_exported_is_refused_and_leaves_nothing(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    run = _run("vit", request, tmp_path / "run")
    with pytest.raises(RecipeError, match="timm has no model like this recipe's encoder"):
        meristem.export(run, tmp_path / "out", "timm")
    with pytest.raises(MeristemError, match="no export as 'onxn'"):
        meristem.export(run, tmp_path / "out", "onxn")
    assert sorted(p.name for p in tmp_path.iterdir() if "out" in p.name) == []
    (tmp_path / "out").mkdir()
    with pytest.raises(MeristemError, match="exists already"):
        meristem.export(run, tmp_path / "out")
