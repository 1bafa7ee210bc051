"""An encoder in the formats that others read: a torch program, ONNX, timm weights, a MONAI bundle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from meristem.errors import MeristemError, RecipeError
from meristem.modalities.base import View
from meristem.modalities.frame import Frame
from meristem.modalities.rng import Rng
from meristem.modalities.stream import LatticeStream
from meristem.platform.encoders.base import Encoder
from meristem.platform.encoders.timm import TimmPyramid, TimmSettings, TimmViT
from meristem.platform.recipe import Recipe
from meristem.platform.training import checkpoint
from meristem.platform.training.restore import restored

INPUTS, OUTPUTS = ("array", "spacing"), ("embedding", "tokens")


class Embedder(nn.Module):
    """An encoder of arrays as a function of tensors alone.

    forward(array (B, C, *size), normalised as the recipe's modality does; spacing (B, D), size of an element along each axis in
    the modality's unit) -> embedding (B, width), the recipe's summary; tokens (B, N, width), unmasked, in raster order.
    """

    def __init__(self, encoder: Encoder, recipe: Recipe, size: tuple[int, ...]) -> None:
        super().__init__()
        self.encoder, self.tokenizer = encoder, recipe.modality.tokenizer()
        self.sees, self.summary, self.size = recipe.encoder.sees, recipe.summary, size
        self.unit = tuple(axis.unit for axis in recipe.modality.axes)

    def forward(self, array: Tensor, spacing: Tensor) -> tuple[Tensor, Tensor]:
        rows = torch.zeros_like(spacing[:, 0], dtype=torch.int64)
        affine = torch.diag_embed(torch.cat([spacing, torch.ones_like(spacing[:, :1])], 1))
        view = View("x", array, Frame(affine, self.size, spacing, self.unit), rows, rows)
        encoded = self.encoder(self.tokenizer.stream(view).seen(self.sees))
        return encoded.summary[self.summary], encoded.tokens


def embedder(run: Path, size: tuple[int, ...] | None = None) -> tuple[Embedder, Recipe, tuple[Tensor, Tensor]]:
    """The encoder of a run that transfers, its recipe, and an example of its input (two rows of noise).

    size: of the arrays; None: of the recipe's first view. Raises MeristemError.
    """
    assembly = restored(run)
    recipe = assembly.recipe
    size = size or tuple(next(iter(recipe.views.values())).size)  # type: ignore[attr-defined]
    if len(size) != len(recipe.modality.axes):
        raise RecipeError(f"{recipe.modality.name} data are sets, and an exported encoder takes arrays of one size",
                          "Use `meristem embed`, or load the checkpoint in Python.")
    view = recipe.modality.example(size, Rng.of(0, torch.arange(2), "reference"))
    stream = assembly.tokenizer.stream(view)
    assert isinstance(stream, LatticeStream)
    return Embedder(assembly.encoder, recipe, size).eval(), recipe, (view.array, view.frame.spacing)


def about(recipe: Recipe, run: Path, example: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """What whoever imports the encoder must know; nothing of the machine or the data's names."""
    card = checkpoint.read_card(run)
    return {"recipe": recipe.name, "recipe_hash": card["recipe_hash"], "follows": recipe.follows, "step": card["step"],
            "modality": recipe.modality.name, "options": recipe.modality.options.model_dump(mode="json"),
            "axes": card["axes"], "input": {"array": ["batch", *example[0].shape[1:]], "spacing": ["batch", len(card["axes"])]},
            "output": {"embedding": f"the encoder's {recipe.summary} vector", "tokens": "in raster order"},
            "licence": card["licence"], "versions": card["versions"]}


def program(model: Embedder, example: tuple[Tensor, Tensor]) -> torch.export.ExportedProgram:
    """The embedder as a graph of torch operators that needs no code of ours; any number of rows."""
    rows = torch.export.Dim("batch", min=1)
    with torch.no_grad():
        return torch.export.export(model, example, dynamic_shapes=({0: rows}, {0: rows}), strict=False)


def to_torch(model: Embedder, recipe: Recipe, example: tuple[Tensor, Tensor], facts: Mapping[str, Any], out: Path) -> None:
    """model.pt2, for torch.export.load(…).module()."""
    torch.export.save(program(model, example), out / "model.pt2")


def to_onnx(model: Embedder, recipe: Recipe, example: tuple[Tensor, Tensor], facts: Mapping[str, Any], out: Path) -> None:
    """model.onnx, with the weights inside."""
    try:
        import onnxscript  # noqa: F401
    except ImportError:
        raise MeristemError("ONNX files are written by the package onnxscript, which is not installed",
                            "pip install meristem[onnx]") from None
    rows = torch.export.Dim("batch", min=1)
    with torch.no_grad():
        made = torch.onnx.export(model, example, input_names=INPUTS, output_names=OUTPUTS, dynamo=True, verbose=False,
                                 dynamic_shapes=({0: rows}, {0: rows}), external_data=False)
    assert made is not None
    made.save(out / "model.onnx")


def to_timm(model: Embedder, recipe: Recipe, example: tuple[Tensor, Tensor], facts: Mapping[str, Any], out: Path) -> None:
    """model.safetensors and config.json, for timm.create_model("local-dir:…", pretrained=True)."""
    encoder, settings = model.encoder, recipe.encoder
    if not isinstance(settings, TimmSettings) or not isinstance(encoder, TimmViT | TimmPyramid):
        raise RecipeError(f"timm has no model like this recipe's encoder ({next(iter(recipe.dump()['encoder']))})",
                          "Pretrain with encoder: timm, or export as torch or onnx.")
    import timm

    weights = encoder.net.state_dict()
    arguments: dict[str, Any] = {"in_chans": recipe.modality.channels}
    if isinstance(encoder, TimmViT):
        # as many learned positions as the encoder has; timm would make them fit `input_size` once and for all
        arguments |= {"dynamic_img_size": True, "img_size": list(encoder.net.patch_embed.img_size)}
    whole = timm.create_model(settings.model, num_classes=0, **arguments).state_dict()
    flat = {name.replace(".", "_"): value for name, value in weights.items()}  # as the names of a net of maps are, in part
    # what timm puts behind tokens and maps (a norm before the classifier, a pool) was not pretrained: as timm starts it
    weights = {name: flat.get(name.replace(".", "_"), value).contiguous().clone() for name, value in whole.items()}
    save_file(weights, out / "model.safetensors")
    shape = [recipe.modality.channels, *model.size]
    config = {"architecture": settings.model, "num_classes": 0, "num_features": encoder.width, "model_args": arguments,
              "pretrained_cfg": {"input_size": shape, "num_classes": 0, "classifier": None, "first_conv": None,
                                 "fixed_input_size": False}}
    checkpoint.write_text(out / "config.json", json.dumps(config, indent=1))


def to_monai(model: Embedder, recipe: Recipe, example: tuple[Tensor, Tensor], facts: Mapping[str, Any], out: Path) -> None:
    """A bundle whose `network_def` is the torch program."""
    import monai
    import numpy as np

    for folder in ("configs", "models", "docs"):
        (out / folder).mkdir()
    torch.export.save(program(model, example), out / "models" / "model.pt2")
    dims = "channels, " + ", ".join(axis["name"] for axis in facts["axes"])
    array = {"type": "image", "format": "magnitude", "modality": "n/a", "num_channels": recipe.modality.channels,
             "spatial_shape": list(model.size), "dtype": "float32", "value_range": [], "is_patch_data": True,
             "channel_def": {str(i): "image" for i in range(recipe.modality.channels)}}
    tokens = {"type": "feature", "format": "embedding", "num_channels": model.encoder.width, "spatial_shape": [], "dtype":
              "float32", "value_range": [], "is_patch_data": False, "channel_def": {"0": "embedding"}}
    metadata = {
        "schema": "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json",
        "version": "1.0.0", "changelog": {"1.0.0": "exported"}, "monai_version": monai.__version__,
        "pytorch_version": torch.__version__, "numpy_version": np.__version__, "required_packages_version": {},
        "task": "embedding", "description": f"{recipe.name}: {recipe.follows}", "authors": "", "copyright": "",
        "intended_use": "Features for further training; not for diagnosis.", "data_type": recipe.modality.name,
        "network_data_format": {"inputs": {"array": array, "spacing": {"type": "tuples", "format": "raw", "num_channels": 1,
                                "spatial_shape": [len(model.size)], "dtype": "float32", "value_range": [],
                                "is_patch_data": False, "channel_def": {"0": f"size of an element: {dims}"}}},
                                "outputs": {"embedding": tokens}},
        "meristem": dict(facts)}
    checkpoint.write_text(out / "configs" / "metadata.json", json.dumps(metadata, indent=1))
    network = {"imports": ["$import torch"], "bundle_root": ".",
               "network_def": "$torch.export.load(@bundle_root + '/models/model.pt2').module()"}
    checkpoint.write_text(out / "configs" / "inference.json", json.dumps(network, indent=1))
    checkpoint.write_text(out / "docs" / "README.md", f"# {recipe.name}\n\n{recipe.follows}\n\n{facts['licence']}\n")


FORMATS: dict[str, Callable[[Embedder, Recipe, tuple[Tensor, Tensor], Mapping[str, Any], Path], None]] = {
    "torch": to_torch, "onnx": to_onnx, "timm": to_timm, "monai": to_monai}


def export(run: Path, out: Path, form: str, size: Sequence[int] | None = None) -> Path:
    """Write the encoder of a run that transfers into a new folder `out`, whole or not at all; about.json says what it wants.

    Raises MeristemError.
    """
    if form not in FORMATS:
        raise MeristemError(f"there is no export as '{form}'", f"Choose of {', '.join(FORMATS)}.")
    if out.exists():
        raise MeristemError(f"{out} exists already", "Choose another --out.")
    model, recipe, example = embedder(run, None if size is None else tuple(size))
    facts, making = about(recipe, run, example), out.with_name(f".{out.name}.tmp")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    try:
        FORMATS[form](model, recipe, example, facts, making)
        checkpoint.write_text(making / "about.json", json.dumps(facts, indent=1))
        making.rename(out)
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return out
