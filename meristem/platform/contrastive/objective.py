"""The contrastive engine's objective: level × relation × loss."""

from __future__ import annotations

from meristem.platform.objectives import ObjectiveSettings


class Contrastive(ObjectiveSettings):
    """Relate units of views to each other."""
