"""What a recipe says of videos, and of one view of a clip: which frames, which part of them, how they play."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from meristem.modalities.base import Settings
from meristem.modalities.lattice import LatticeOptions, LatticeViewOptions

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
SPATIAL = ("window", "zoom", "area", "aspect", "brightness", "contrast", "saturation", "hue", "grayscale", "gamma", "blur",
           "solarise", "noise")


class VideoOptions(LatticeOptions):
    """How videos are read.

    patch: frames, rows and columns of a tubelet. store: `file` decodes the frames of each look when it is drawn; `decoded`
    keeps all frames in the cache, their short side shrunk to `resize`, which costs disk and spares decoding. normalise:
    `imagenet` (ImageNet's mean and std), `unit` (to [0, 1]), or `zscore` (each channel of each video). reader: who decodes;
    auto takes decord where it is exact, else PyAV. fps: of frame folders and other files that do not tell theirs. max_pixels:
    larger frames are refused. unit: of positions within a frame; mm refuses files that do not know their pixel size.
    mask_values: pixel value of a mask -> class; null: as stored. scales: finest and coarsest length, in `unit`, that the
    encoder must tell apart; seconds: the same of time.
    """

    channels: Literal[3] = 3
    tokens: Literal["patch"] = "patch"
    patch: tuple[Positive, Positive, Positive] = (2, 16, 16)
    store: Literal["file", "decoded"] = "file"
    resize: Positive | None = None
    normalise: Literal["imagenet", "unit", "zscore"] = "imagenet"
    reader: Literal["auto", "decord", "pyav", "torchcodec"] = "auto"
    fps: Annotated[float, Field(gt=0)] = 25.0
    max_pixels: Positive = 1 << 26
    unit: Literal["px", "mm"] = "px"
    mask_values: Mapping[int, int] | None = None
    scales: tuple[float, float] = (4.0, 512.0)
    seconds: tuple[float, float] = (0.02, 20.0)

    @model_validator(mode="after")
    def _stored(self) -> Self:
        if self.resize is not None and self.store == "file":
            raise ValueError("resize is for store: decoded; frames that stay in their files are resized to each view")
        return self


class Dense(Settings):
    """Every `stride`-th frame."""

    stride: Positive = 1


class Rate(Settings):
    """The frames on screen at `fps` times a second, whatever the file's own rate."""

    fps: Annotated[float, Field(gt=0)]


class VideoViewOptions(LatticeViewOptions):
    """One view of a video: a clip of `size` [frames, rows, columns].

    sample: `{stride: 2}` or `{fps: 8}`, from a random start; `uniform`: a random frame of each of as many equal parts of the
    whole video (Wang et al. 2016, TSN). short: what a clip longer than the video shows: the video again from its start
    (loop), its last frame (hold), or nothing, with weight 0 (pad).
    apart: where the second of two looks starts. null: anywhere; `linear`: after an interval whose probability falls linearly
    to 0 at the longest that the video allows (Qian et al. 2021, CVRL); [low, high]: after an interval uniform between these
    fractions of it.
    speed: factors one of which the clip is played at; pace: each look draws its `own`, or takes the one that all views of the
    sample share (`same`), or any `other` one. direction: probability of playing backwards. order: number of parts that
    are shuffled. turn: by any of the four right angles. All but `order` as in `LatticeViewOptions` hold for the whole clip.
    These four are also the pretext labels, as int64 params: which speed, backwards or not, which permutation, how many turns.
    What repeats gives speed and order away without any motion being understood: frames shown twice, because `fps` over the
    file's own rate, or factors under 1, ask for more than there are, and the beginning again, where the video is shorter than
    the clip at its greatest speed.
    residual: show differences of successive frames instead of frames.
    window and intensities: as `LatticeViewOptions`, of the frames, drawn once for a clip; no affine, elastic or margin.
    clips, crops: what `plain` shows: clips evenly spread from the first frame to the last (one: of the middle), each with as
    many crops along the frame's longer side. grid: set by `plain`.
    """

    size: tuple[Positive, Positive, Positive]
    window: Literal["crop", "area", "whole", "cover", "contain"] = "area"
    sample: Dense | Rate | Literal["uniform"] = Dense()
    short: Literal["loop", "hold", "pad"] = "loop"
    apart: Literal["linear"] | tuple[Fraction, Fraction] | None = None
    speed: tuple[Annotated[float, Field(gt=0)], ...] = ()
    pace: Literal["own", "same", "other"] = "own"
    direction: Fraction | None = None
    order: Annotated[int, Field(ge=2, le=4)] | None = None
    turn: bool = False
    residual: bool = False
    clips: Positive = 1
    crops: Literal[1, 3] = 1
    grid: tuple[Positive, Positive] | None = None

    @model_validator(mode="after")
    def _playable(self) -> Self:
        frames, rows, columns = self.size
        if self.affine or self.elastic or self.margin or self.foreground:
            raise ValueError("affine, elastic, margin and foreground are not for clips; use window: area, flip and intensities")
        if self.flip and self.flip[0]:
            raise ValueError("flip is of rows and columns, [0, p, p]; use direction to play backwards")
        if self.turn and rows != columns:
            raise ValueError(f"turn needs square frames, size has {rows}×{columns}")
        if self.order and frames % self.order:
            raise ValueError(f"{frames} frames cannot be shuffled in {self.order} equal parts")
        if self.speed and self.sample == "uniform":
            raise ValueError("speed is for clips with a rate; `sample: uniform` shows the whole video, however long")
        if self.pace == "other" and len(self.speed) < 2:
            raise ValueError("pace: other needs two speeds or more")
        if self.apart is not None and self.apart != "linear" and self.apart[0] > self.apart[1]:
            raise ValueError(f"apart goes from the least to the greatest fraction, got {list(self.apart)}")
        if self.apart is not None and self.count != 2:
            raise ValueError("apart places the second of two looks: set count: 2")
        if self.apart is not None and self.sample == "uniform":
            raise ValueError("apart is for clips with a start; `sample: uniform` shows the whole video")
        return self

    @property
    def permutations(self) -> int:
        return math.factorial(self.order or 1)

    def plain(self) -> Self:
        """Evenly spread clips × crops of the largest windows with the view's proportions, played as they are."""
        return type(self).model_validate({
            "size": self.size, "sample": self.sample, "short": self.short, "residual": self.residual,
            "window": "contain" if self.window == "contain" else "cover", "count": self.clips * self.crops,
            "grid": (self.clips, self.crops)})

    def of_frames(self) -> LatticeViewOptions:
        """What holds for each frame alone."""
        chosen = {name: getattr(self, name) for name in SPATIAL}
        return LatticeViewOptions(size=self.size[1:], flip=self.flip[1:], **chosen)
