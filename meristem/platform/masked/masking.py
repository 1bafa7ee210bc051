"""Maskings: which tokens an encoder does not get."""

from __future__ import annotations

from typing import Literal

from meristem.modalities.base import Settings
from meristem.modalities.rng import Rng
from meristem.modalities.stream import TokenStream
from meristem.platform.objectives import Plan


class Masking(Settings):
    """The typed entry of a masking. corruption: hidden tokens are dropped before the encoder, or replaced."""

    corruption: Literal["drop", "replace"] = "drop"

    def plan(self, stream: TokenStream, rng: Rng, unit: tuple[int, ...]) -> Plan:
        """unit: grain, in tokens per lattice axis, at which the encoder can be masked; () for one token."""
        raise NotImplementedError


MASKINGS: dict[str, type[Masking]] = {}
