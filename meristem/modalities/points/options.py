"""What a recipe says of point clouds and of one view of them."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field

from meristem.modalities.base import Settings, ViewSettings

Feature = Literal["normal", "colour", "intensity", "time"]
WIDTHS: dict[Feature, int] = {"normal": 3, "colour": 3, "intensity": 1, "time": 1}
Range = tuple[float, float]
Probability = Annotated[float, Field(ge=0, le=1)]
Length = Annotated[float, Field(gt=0)]


class Clusters(Settings):
    """What stands on the ground, apart; the ground itself and noise are −1 (PSA-SSL, Nisar et al. 2025: Patchwork++ there, one
    plane here).

    ground: metres from the plane under which a point is ground. column: edge in metres of the columns whose lowest points may
    be ground. cell: metres within which points are told apart no further. smallest: cells of the smallest cluster.
    """

    method: Literal["clusters"] = "clusters"
    ground: Length = 0.25
    column: Length = 1.0
    cell: Length = 0.2
    smallest: Annotated[int, Field(ge=2)] = 10


class Supervoxels(Settings):
    """Smooth pieces by a graph cut (Felzenszwalb and Huttenlocher 2004) on the angles between normals; −1: too small alone.

    cell: as above. neighbours: of a cell, in the graph and for its normal. threshold: the larger, the larger the pieces.
    smallest: cells of the smallest piece; smaller ones join their likest neighbour.
    """

    method: Literal["supervoxels"] = "supervoxels"
    cell: Length = 0.05
    neighbours: Annotated[int, Field(ge=3)] = 12
    threshold: Length = 0.05
    smallest: Annotated[int, Field(ge=1)] = 20


def _named(value: Any) -> Any:
    """`clusters`, or `{clusters: {cell: 0.3}}`."""
    if isinstance(value, str):
        return None if value == "none" else {"method": value}
    if isinstance(value, dict) and len(value) == 1 and isinstance(inner := next(iter(value.values())), dict):
        return {"method": next(iter(value)), **inner}
    return value


Segments = Annotated[Annotated[Clusters | Supervoxels, Field(discriminator="method")] | None, BeforeValidator(_named)]


class PointsOptions(Settings):
    """How point clouds are read and made into tokens.

    features: what points carry beside x, y, z, in this order; a file without one of them is refused. Normals are unit vectors;
    colour and intensity are scaled to [−1, 1]; time is in seconds since the earliest point. unit: metres per unit of the files.
    normalise: `sphere`: centred on the mean, the farthest point at distance 1 (a view is then in radii; its frame knows the
    metres); `centre`: centred, in metres; `none`.
    columns: names of the columns of files that do not tell (.bin, text, plain arrays): x y z nx ny nz red green blue intensity
    time label; any other is left out. Without: .bin is x y z intensity, .pcd.bin has a ring beside; of text and arrays columns
    4 to 6 are normals where they are unit vectors, else colours, a seventh is a label; a fourth alone is intensity.
    intensity: the files' value for full reflectance; null: the least of 1, 255 and 65535 that a file does not exceed.
    nonfinite: points that are NaN or infinite make a file unusable, or are left out and counted.
    sector: degrees to either side of x beyond which points are left out and counted: of KITTI's frames only what the camera
    sees is labelled.
    mesh: files with faces are sampled uniformly over their surface, `sampled` points, the same whenever read; or their
    vertices are taken.
    segments: pieces found without labels when a file is read, as the field `segment`: none, clusters, supervoxels.
    tokens: `groups`: `count` centres by farthest-point sampling, each with its `size` nearest points (Yu et al. 2022,
    Point-BERT); `serial`: consecutive runs of `size` points along a space-filling curve on cells of `cell` (Wu et al. 2024,
    Point Transformer V3), every point in one token, for scenes of 100,000 points and more. places: a small perceptron on the
    position of a token is added to it, in encoder and decoder (Pang et al. 2022, Point-MAE), if the encoder sees `structure`.
    """

    features: tuple[Feature, ...] = ()
    unit: Length = 1.0
    normalise: Literal["sphere", "centre", "none"] = "sphere"
    columns: tuple[str, ...] = ()
    intensity: Length | None = None
    nonfinite: Literal["refuse", "drop"] = "refuse"
    sector: Annotated[float, Field(gt=0, lt=180)] | None = None
    mesh: Literal["surface", "vertices"] = "surface"
    sampled: Annotated[int, Field(ge=4)] = 8192
    segments: Segments = None
    tokens: Literal["groups", "serial"] = "groups"
    count: Annotated[int, Field(ge=1)] = 64
    size: Annotated[int, Field(ge=1)] = 32
    cell: Length = 0.02
    places: bool = False

    @property
    def scales(self) -> tuple[float, float]:
        """The finest and the coarsest scale of coordinates, in a view's unit."""
        return (0.05, 4.0) if self.normalise == "sphere" else (0.1, 200.0)


class PointsViewOptions(ViewSettings):
    """One view of a cloud.

    size: most points of a view; a smaller cloud shows all it has. take: which: drawn at `random` without replacement, or spread
    `even`ly over the stored order. crop: range of the share of them that is kept, those nearest to a random one. drop: range of
    the share of points then left out at random.
    flip: probability for x and for y. rotate: greatest angle in degrees about the vertical (`z`) or about any axis (`any`).
    scale: range of magnification, shift: greatest displacement, jitter: std of each coordinate's noise and its clip at twice
    that, in the view's unit. In this order. Noise is all that `Frame` does not know of.
    """

    size: tuple[Annotated[int, Field(ge=1)]]
    take: Literal["random", "even"] = "random"
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
        return type(self)(size=self.size, take="even")
