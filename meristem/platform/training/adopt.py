"""Weights that were trained elsewhere become a run like any other: fine-tuned, evaluated, embedded and exported alike."""

from __future__ import annotations

import hashlib
import pickle
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from meristem.errors import CheckpointError, MeristemError
from meristem.platform.assembly import Assembly
from meristem.platform.encoders.timm import TimmSettings
from meristem.platform.recipe import Recipe
from meristem.platform.training import checkpoint
from meristem.platform.training.pretrain import describe, reference

LEAST = 0.9  # share of the encoder's weights that a file must hold


def adopt(recipe: Recipe, weights: Path, directory: Path) -> checkpoint.LoadReport:
    """Write a run whose encoder has the weights of a file: of timm, where the recipe's encoder is timm's, or of MONAI, or any
    state dict whose names end as the encoder's do.

    What the weights have met is not known, and the card says so. Raises MeristemError where a run is there already, and
    CheckpointError where the file cannot be read or does not fit.
    """
    if (directory / "recipe.yaml").exists():
        raise MeristemError(f"{directory} already holds a run", "Choose another --out.")
    if not weights.is_file():
        raise CheckpointError(f"no weights file {weights}", "Give a local .safetensors file, or a state dict that torch saved.")
    torch.manual_seed(recipe.train.seed)  # of what the file does not hold: a mask token, positions of ours
    assembly = Assembly(recipe)
    if isinstance(recipe.encoder, TimmSettings):  # it knows how its own weights are resized and renamed
        settings = recipe.encoder.model_copy(update={"pretrained": weights})
        found = settings.build(assembly.tokenizer, recipe.modality.axes, recipe.modality.channels).state_dict()
        channels = recipe.modality.channels
    else:
        found = _matched(read(weights), assembly.encoder.state_dict())
        channels = _channels(found, assembly.encoder, recipe.modality.channels)
    report = checkpoint.fit(assembly.encoder, found, (channels, recipe.modality.channels))
    if report.coverage < LEAST:
        raise CheckpointError(f"the file covers only {report.coverage:.1%} of the encoder's weights ({report.line()})",
                              f"Missing: {', '.join((report.missing + report.mismatched)[:4])} …. Set encoder.… to what the "
                              "weights were trained with.")
    content = hashlib.sha256(weights.read_bytes()).hexdigest()
    card = {**describe(recipe, "pretraining"), "manifest": "", "samples": 0, "weights": content,
            "seen": {"subjects": None, "contents": None, "key_id": ""},
            "licence": "Weights from elsewhere: their authors' terms hold, and those of the data they were trained on."}
    directory.mkdir(parents=True, exist_ok=True)
    checkpoint.save(directory, 0, assembly.state_dict(), {**card, **reference(assembly)}, {}, keep=1)
    checkpoint.write_text(directory / "recipe.yaml", yaml.safe_dump(recipe.record(), sort_keys=False, allow_unicode=True))
    return report


def read(file: Path) -> dict[str, Tensor]:
    """The state dict of a file: of safetensors, or saved by torch, at any depth of its dicts. Nothing but tensors and plain
    values is unpickled. Raises CheckpointError.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        held = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, zipfile.BadZipFile, EOFError, ValueError) as error:
        raise CheckpointError(f"{file.name} cannot be read: {str(error).splitlines()[0]}", "Give the whole file.") from None
    except pickle.UnpicklingError:
        raise CheckpointError(f"{file.name} is no plain state dict: loading it could run code that it holds",
                              "Save model.state_dict() alone, best as .safetensors.") from None
    states = list(_states(held))
    if not states:
        raise CheckpointError(f"{file.name} holds no state dict", "Save model.state_dict(), best as .safetensors.")
    return max(states, key=len)


def _states(held: Any) -> Any:
    """Dicts of tensors by name, wherever they are in nested dicts."""
    if isinstance(held, Mapping):
        tensors = {name: x for name, x in held.items() if isinstance(name, str) and isinstance(x, Tensor)}
        if tensors:
            yield tensors
        for below in held.values():
            yield from _states(below)


def _matched(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the names of an encoder: theirs and ours differ in what stands before them (module., swinViT., net.)."""
    wrapped = len({name.partition(".")[0] for name in own}) == 1
    names = {name: name for name in own} | ({name.partition(".")[2]: name for name in own} if wrapped else {})
    before = Counter(name[:-len(end)] for name in weights for end in names
                     if name == end or name.endswith(f".{end}"))
    for prefix, _ in before.most_common(1):
        return {names[end]: value for name, value in weights.items()
                if name.startswith(prefix) and (end := name.removeprefix(prefix)) in names}
    return {}


def _channels(weights: Mapping[str, Tensor], encoder: nn.Module, want: int) -> int:
    """How many channels the weights' input had: where a kernel of ours takes `want`, theirs took as many."""
    return next((weights[name].shape[1] for name, x in encoder.state_dict().items()
                 if x.ndim > 2 and x.shape[1] == want and name in weights and weights[name].ndim == x.ndim), want)
