"""The derived views that a recipe may name."""

from __future__ import annotations

from meristem.platform.derived.again import Again
from meristem.platform.derived.base import Derivation
from meristem.platform.derived.channels import Channels
from meristem.platform.derived.crop import Crop
from meristem.platform.derived.difference import Difference
from meristem.platform.derived.diffusion import Diffused, Noise, Part
from meristem.platform.derived.frequency import Frequency
from meristem.platform.derived.look import Look
from meristem.platform.derived.montage import Montage
from meristem.platform.derived.still import Still

DERIVATIONS: dict[str, type[Derivation]] = {
    "frequency": Frequency,
    "montage": Montage,
    "again": Again,
    "crop": Crop,
    "look": Look,
    "difference": Difference,
    "channels": Channels,
    "still": Still,
    "part": Part,
    "noise": Noise,
    "diffused": Diffused,
}
