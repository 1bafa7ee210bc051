"""The masked engine's objective: masking × predictor × readouts."""

from __future__ import annotations

from meristem.platform.objectives import ObjectiveSettings


class Masked(ObjectiveSettings):
    """Predict what was hidden in a view."""

    encode: str
