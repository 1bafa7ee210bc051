"""What a recipe says of one view of a lattice: window, geometry, intensity."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from meristem.modalities.base import Settings, ViewSettings

Range = tuple[float, float]


class Chance(Settings):
    """With `probability`, a value uniform in `range`; else the operation's neutral value."""

    range: Range
    probability: float = 1.0


class Affine(Settings):
    """A random affine about the view's centre, in its physical units, with `probability`.

    rotate: greatest angle in degrees, one for each axis turned about (one number in 2D; a single number serves all axes).
    zoom: range of magnification, over 1 enlarges. shear: greatest slope. shift: greatest displacement in lattice steps.
    """

    probability: float = 1.0
    rotate: float | tuple[float, ...] = 0.0
    zoom: Range = (1.0, 1.0)
    shear: float = 0.0
    shift: float | tuple[float, ...] = 0.0


class Elastic(Settings):
    """A free-form deformation (Rueckert et al. 1999): cubic B-splines on `cells` cells along each axis.

    amplitude: range of the greatest displacement of a control point, in lattice steps. No point of the view moves further;
    the frame's affine does not know of the displacement.
    """

    amplitude: Range
    cells: int = 3
    probability: float = 1.0


class LatticeViewOptions(ViewSettings):
    """One view of an image or a volume.

    size: the view's lattice. window: what of the sample is shown:
      crop     a random window of `size` elements times a factor uniform in `zoom`, resized to `size`;
      area     a random window of a fraction `area` of the sample, its sides stretched by ratios log-uniform in `aspect`
               about the proportions of `size`, resized to `size` (Szegedy et al. 2015, RandomResizedCrop);
      whole    the centre `size` elements, padded where the sample is smaller;
      cover    the largest centred window with the proportions of `size` that lies inside the sample, resized;
      contain  the smallest one that holds the whole sample, padded and resized;
      tile     look i shows tile i of the whole sample, cut into as many along each axis as `tiles` says, resized;
      part     a random window as large as a tile, resized;
      slice    of tile i one element, drawn for all views alike, along the axes that are cut; resized along the others.
    margin: elements read beyond each side of `size`, so that a rotated view shows the sample and not padding.
    foreground: probability that a crop is centred on one of the sample's anchors.
    flip: probability for each axis, or () for none.
    Then on the device: affine, elastic; and in this order brightness, contrast, saturation, hue (factors and turns as in
    torchvision, within the sample's black and white), grayscale (probability), gamma (exponent), blur (sigma in elements),
    solarise (threshold between black 0 and white 1), noise (std, in normalised units). Colour operations leave anything but
    three channels as it is.
    """

    size: tuple[int, ...]
    window: Literal["crop", "area", "whole", "cover", "contain", "tile", "part", "slice"] = "crop"
    tiles: tuple[Annotated[int, Field(ge=1)], ...] = ()
    zoom: Range = (1.0, 1.0)
    area: Range = (0.2, 1.0)
    aspect: Range = (0.75, 4 / 3)
    margin: int = 0
    foreground: float = 0.0
    flip: tuple[float, ...] = ()
    affine: Affine | None = None
    elastic: Elastic | None = None
    brightness: Chance | None = None
    contrast: Chance | None = None
    saturation: Chance | None = None
    hue: Chance | None = None
    grayscale: float = 0.0
    gamma: Chance | None = None
    blur: Chance | None = None
    solarise: Chance | None = None
    noise: Chance | None = None

    def plain(self) -> Self:
        """The whole sample: covered where training draws areas of it, else its centre at the sample's own scale."""
        window = self.window if self.window in ("cover", "contain") else "cover" if self.window == "area" else "whole"
        return type(self).model_validate({"size": self.size, "window": window})

    @model_validator(mode="after")
    def _axes(self) -> Self:
        dims = len(self.size)
        if min(self.size, default=0) < 1:
            raise ValueError(f"size needs a positive number for each axis, got {list(self.size)}")
        if bool(self.tiles) != (self.window in ("tile", "part", "slice")) or (self.tiles and len(self.tiles) != dims):
            raise ValueError(f"tiles: {dims} numbers go with the windows tile, part and slice, and with no other")
        if self.tiles and self.margin:
            raise ValueError("a window of tiles has no margin")
        if self.window in ("tile", "slice") and self.count != math.prod(self.tiles):
            raise ValueError(f"count: {self.count} looks for {math.prod(self.tiles)} tiles, {list(self.tiles)}")
        if self.flip and len(self.flip) != dims:
            raise ValueError(f"flip has {len(self.flip)} probabilities for {dims} axes")
        turns = 3 if dims == 3 else 1
        if self.affine and isinstance(self.affine.rotate, tuple) and len(self.affine.rotate) != turns:
            raise ValueError(f"affine.rotate has {len(self.affine.rotate)} angles, wants one number or {turns}")
        if self.affine and isinstance(self.affine.shift, tuple) and len(self.affine.shift) != dims:
            raise ValueError(f"affine.shift has {len(self.affine.shift)} numbers for {dims} axes")
        return self
