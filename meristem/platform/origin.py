"""Where the weights of a training come from."""

from __future__ import annotations

from pathlib import Path

from meristem.errors import RecipeError

SCRATCH, METADATA = "scratch", "metadata"  # random weights; no weights: what files say before any pixel


def origin(init: str) -> Path | None:
    """The run whose weights a training starts from; None: from random ones. Raises RecipeError for `METADATA`."""
    if init == METADATA:
        raise RecipeError(f"{METADATA} is what files say before any pixel: there are no weights to fine-tune",
                          "Compare it with encoders: `meristem evaluate --init metadata --protocol knn`.")
    return None if init == SCRATCH else Path(init)
