"""What a recipe says of point clouds and of one view of them."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field

from meristem.modalities.base import Settings, ViewSettings

Feature = Literal["normal", "colour", "intensity", "time"]
WIDTHS: dict[Feature, int] = {"normal": 3, "colour": 3, "intensity": 1, "time": 1}
Range = tuple[float, float]
Probability = Annotated[float, Field(ge=0, le=1)]


class PointsOptions(Settings):
    """How point clouds are read and made into tokens.

    features: what points carry beside x, y, z, in this order; a file without one of them is refused. unit: metres per unit of
    the files. normalise: `sphere`: centred on the mean, the farthest point at distance 1 (a view is then in radii; its frame
    knows the metres); `centre`: centred, in metres; `none`.
    tokens: `groups`: `count` centres by farthest-point sampling, each with its `size` nearest points (Yu et al. 2022,
    Point-BERT); `serial`: consecutive runs of `size` points along a space-filling curve on cells of `cell` (Wu et al. 2024,
    Point Transformer V3), every point in one token, for scenes of 100,000 points and more.
    """

    features: tuple[Feature, ...] = ()
    unit: Annotated[float, Field(gt=0)] = 1.0
    normalise: Literal["sphere", "centre", "none"] = "sphere"
    tokens: Literal["groups", "serial"] = "groups"
    count: Annotated[int, Field(ge=1)] = 64
    size: Annotated[int, Field(ge=1)] = 32
    cell: Annotated[float, Field(gt=0)] = 0.02


class PointsViewOptions(ViewSettings):
    """One view of a cloud.

    size: most points of a view, drawn from the cloud without replacement; a smaller cloud shows all it has. crop: range of the
    share of them that is kept, those nearest to a random one. rotate: greatest angle in degrees about the vertical (`z`) or
    about any axis (`any`). scale: range of magnification, shift: greatest displacement, jitter: std of each coordinate's noise
    and its clip at twice that, in the view's unit. flip: probability for x and for y. drop: range of the share of points left
    out at random.
    """

    size: tuple[Annotated[int, Field(ge=1)]]
    crop: Range = (1.0, 1.0)
    rotate: float = 0.0
    axis: Literal["z", "any"] = "z"
    scale: Range = (1.0, 1.0)
    shift: float = 0.0
    jitter: float = 0.0
    flip: tuple[Probability, Probability] = (0.0, 0.0)
    drop: Range = (0.0, 0.0)

    def plain(self) -> Self:
        """All points up to `size`, spread evenly over the stored order."""
        return type(self)(size=self.size)
