"""Objects of a label map: its connected parts, or its values."""

from __future__ import annotations

import itertools
from typing import Literal

import numpy as np
from scipy.ndimage import find_objects, label

from meristem.modalities.base import Header
from meristem.modalities.objects import Objects, Raster


def of_mask(mask: np.ndarray, header: Header, how: Literal["components", "values"] = "components", smallest: int = 1
            ) -> Objects:
    """The objects of a label map (*S) of the stored lattice, in source coordinates, with their masks.

    how: `components`, each connected part of one positive value is an object of class value − 1, elements that touch at a
    corner being connected; `values`, each positive value is one object, all of class 0. Values of 0 and below are none.
    smallest: parts of fewer elements are none. Boxes run along the borders of elements; of a turned lattice they hold its box.
    """
    corners, classes, masks = [], [], []
    for value in np.unique(mask[mask > 0]).tolist():
        own = mask == value
        parts = label(own, np.ones((3,) * mask.ndim))[0] if how == "components" else own.astype(np.int8)
        for number, place in enumerate(find_objects(parts), 1):
            cells = parts[place] == number
            if cells.sum() < smallest:
                continue
            corners.append(list(itertools.product(*((side.start - 0.5, side.stop - 0.5) for side in place))))
            classes.append(value - 1 if how == "components" else 0)
            masks.append(Raster(cells, tuple(side.start for side in place)))
    affine = np.array(header.affine)
    points = np.array(corners).reshape(len(corners), 2**mask.ndim, mask.ndim) @ affine[:-1, :-1].T + affine[:-1, -1]
    return Objects(np.concatenate([points.min(1), points.max(1)], 1), np.array(classes, np.int64), masks=tuple(masks))
