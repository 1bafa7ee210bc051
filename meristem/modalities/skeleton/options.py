"""What a recipe says of skeleton sequences and of one view of them."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from meristem.modalities.base import Settings, ViewSettings
from meristem.modalities.skeleton.layouts import LAYOUTS, Layout, Name

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, le=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
Degrees = Annotated[float, Field(ge=0, le=180)]


class Windows(Settings):
    """A long recording as several samples of `frames` frames, one each `step` frames, the last flush with its end; a shorter
    one is a single sample. All are of one subject."""

    frames: Count
    step: Count


class SkeletonOptions(Settings):
    """How skeleton sequences are read and made into tokens.

    layout: which joints: `ntu` (25 of Kinect v2, x, y, z in metres), `openpose` (18, x and y as shares of the picture) or `cmu`
    (28 of CMU mocap, in metres); null: that of the files, settled on opening them. bodies: people in a sample, those that move
    most (`ntu`) or are surest in a frame (`openpose`); a place that nobody takes is missing. fps: null: what is usual of the
    layout. centre: the origin is the middle of the first person (spine, neck, pelvis) when it is first seen; else the camera's.
    windows: see `Windows`; null: a file is a sample. labels: `told`: by the file (Kinetics) or its name (NTU's A001; of
    CMU mocap all before the number: walking_3), else by its folder; or by its `folder` alone.
    segment: frames of a token, which is one joint through so many of them. seconds: finest and coarsest time that the encoder
    must tell apart.
    """

    layout: Name | None = None
    bodies: Count = 2
    fps: Annotated[float, Field(gt=0)] | None = None
    centre: bool = True
    windows: Windows | None = None
    labels: Literal["told", "folder"] = "told"
    segment: Count = 4
    seconds: tuple[float, float] = (0.05, 10.0)

    @property
    def joints(self) -> Layout:
        return LAYOUTS[self.layout or "ntu"]

    @property
    def people(self) -> int:
        return min(self.bodies, self.joints.people)


class Jitter(Settings):
    """Joint jittering (Thoker et al. 2021): so many `joints`, drawn for each view, are multiplied by one random matrix of
    entries up to `amount`; with probability `drop` they are taken away instead."""

    joints: Count
    amount: Annotated[float, Field(ge=0)] = 1.0
    drop: Probability = 0.0


class SkeletonViewOptions(ViewSettings):
    """One view of a sequence.

    size: frames of the view. crop: range of the share of the sample's frames that is shown, at least `least` of them (or all),
    resized to `size` in time; the view plays at the files' rate whatever was cropped. show: places of `joint`s, `bone`s from
    each joint's parent to it, or `motion` from a frame to the next.
    flip: probability of the mirror image, left joints changing places with right ones. rotate: greatest angle in degrees about
    each axis (x, y, z; a single number serves all). shear: greatest slope of each coordinate along each other one. jitter: see
    `Jitter`. noise: std of each coordinate's, in its unit. In this order.
    """

    size: tuple[Count]
    crop: tuple[Share, Share] = (1.0, 1.0)
    least: Count = 1
    show: Literal["joint", "bone", "motion"] = "joint"
    flip: Probability = 0.0
    rotate: Degrees | tuple[Degrees, Degrees, Degrees] = 0.0
    shear: Annotated[float, Field(ge=0)] = 0.0
    jitter: Jitter | None = None
    noise: Annotated[float, Field(ge=0)] = 0.0

    @model_validator(mode="after")
    def _rising(self) -> Self:
        if self.crop[0] > self.crop[1]:
            raise ValueError(f"crop goes from the least to the greatest share, got {list(self.crop)}")
        return self

    def plain(self) -> Self:
        """The whole sample, resized in time."""
        return type(self)(size=self.size, show=self.show)
