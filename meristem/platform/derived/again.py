"""The same view, a second time."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from meristem.modalities.base import View
from meristem.platform.derived.base import Derivation

if TYPE_CHECKING:
    from meristem.platform.step import Step


class Again(Derivation):
    """As it is, so that it can be masked in a second way."""

    def derive(self, view: View, name: str, step: Step) -> View:
        return replace(view, name=name)
