"""The parts of the contrastive engine that a recipe may name."""

from __future__ import annotations

from meristem.platform.contrastive.alignment import Align
from meristem.platform.contrastive.decoupled import Decoupled
from meristem.platform.contrastive.hallucination import Hallucinate
from meristem.platform.contrastive.levels import Common, Frames, LevelSettings, Slots
from meristem.platform.contrastive.losses import DINO, Cosine, Decorrelation, InfoNCE, LossSettings, Margin, SwAV
from meristem.platform.contrastive.regions import Regions
from meristem.platform.contrastive.sorting import Ordering
from meristem.platform.contrastive.transforms import Mix, TransformSettings

LOSSES: dict[str, type[LossSettings]] = {
    "infonce": InfoNCE,
    "margin": Margin,
    "cosine": Cosine,
    "decorrelation": Decorrelation,
    "dino": DINO,
    "swav": SwAV,
    "decoupled": Decoupled,
    "ordering": Ordering,
}

LEVELS: dict[str, type[LevelSettings]] = {
    "common": Common,
    "regions": Regions,
    "slots": Slots,
    "frames": Frames,
}

TRANSFORMS: dict[str, type[TransformSettings]] = {
    "align": Align,
    "mix": Mix,
    "hallucinate": Hallucinate,
}
