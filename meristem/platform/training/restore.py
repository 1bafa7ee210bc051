"""The encoder of a run, alone."""

from __future__ import annotations

from pathlib import Path

from meristem.platform.assembly import Assembly
from meristem.platform.recipe import TASK_ONLY, Recipe, build
from meristem.platform.training import checkpoint

TRAINING = TASK_ONLY | {"objectives", "heads", "teacher", "masking", "derived", "foreign"}  # not of the encoder


def restored(path: Path) -> Assembly:
    """The encoder that transfers of a run, with its tokenizer and nothing that trained it. Raises CheckpointError."""
    card = checkpoint.read_card(path)
    settings = build({k: v for k, v in card["recipe"].items() if k not in TRAINING}, Recipe)
    assembly = Assembly(settings)
    checkpoint.load_encoder(path, assembly.encoder, settings.modality, settings.encoder.sees)
    return assembly
