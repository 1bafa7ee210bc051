"""Whether something in a picture looks like a line of letters: a hint that text was burned in, no proof. Nothing is read."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from meristem.modalities.facts import Doubt

LONG, SHORT = 1024, 48  # pixels: longer sides are shrunk to the first; in pictures under the second no letter can be told
STROKE = 7  # pixels: a stroke is thinner
CONTRAST = 0.45  # of the picture's range, by which strokes stand out from both sides
HEIGHT = (6, 48)  # pixels of a letter
BUSY = 1500  # parts from which a picture is texture, and has letters by chance
LINE = 5  # letters that make a line
EVEN = 0.08  # of the range: letters of a line are as bright as each other
PLACES = (("upper left", "top", "upper right"), ("left", "middle", "right"), ("lower left", "bottom", "lower right"))


def lettering(picture: np.ndarray) -> Doubt | None:
    """picture: (H, W), (C, H, W). The line of most letters, as a doubt; None where there is none.

    Letters are connected parts of thin strokes, bright or dark: what an opening (or closing) with a square wider than a stroke
    takes away. A line is a chain of at least `LINE` of them, about as high as each other, side by side, of one brightness.
    """
    grey = picture.astype(np.float32) if picture.ndim == 2 else picture.astype(np.float32).mean(0)
    if min(grey.shape) < SHORT:
        return None
    if max(grey.shape) > LONG:
        grey = ndimage.zoom(grey, LONG / max(grey.shape), order=1, grid_mode=True, mode="nearest")
    low, high = np.percentile(grey[::2, ::2], (0.1, 99.9))
    if not high > low:
        low, high = float(grey.min()), float(grey.max())
    unit = ((grey - low) / max(high - low, 1e-12)).clip(0, 1)
    lines = [line for x in (unit, 1 - unit) if (line := _line(x)) is not None]
    if not lines:
        return None
    count, y, x = max(lines)
    place = PLACES[min(int(3 * y / grey.shape[0]), 2)][min(int(3 * x / grey.shape[1]), 2)]
    return Doubt("text", f"{count} marks in a row look like letters, {place}",
                 "A hint and no proof: look at these pictures. Text on them (names, dates, places) stays in all that is made "
                 "of them; crop or blacken it in the files.")


def _line(x: np.ndarray) -> tuple[int, float, float] | None:
    """Letters of the longest line of bright strokes in x (H, W) within [0, 1], and its middle."""
    parts, count = ndimage.label(x - ndimage.grey_opening(x, (STROKE, STROKE)) > CONTRAST, np.ones((3, 3)))
    if not LINE <= count <= BUSY:
        return None
    boxes = np.array([[s.start, s.stop, t.start, t.stop] for s, t in ndimage.find_objects(parts)], float)
    high, wide = boxes[:, 1] - boxes[:, 0], boxes[:, 3] - boxes[:, 2]
    bright = ndimage.maximum(x, parts, range(1, count + 1))
    share = np.bincount(parts.ravel(), minlength=count + 1)[1:] / (high * wide)
    letters = (high >= HEIGHT[0]) & (high <= HEIGHT[1]) & (wide <= 1.6 * high) & (share > 0.12) & (share < 0.95)
    boxes, high, bright = boxes[letters], high[letters], np.asarray(bright)[letters]
    order = np.argsort(boxes[:, 2])
    boxes, high, bright = boxes[order], high[order], bright[order]
    best, length = None, np.ones(len(boxes), int)
    start = np.arange(len(boxes))
    for i in range(len(boxes)):  # each goes on the longest chain of those to its left
        gap = boxes[i, 2] - boxes[:i, 3]
        near = (gap > -0.2 * high[i]) & (gap < 0.9 * high[i]) & (np.abs(bright[:i] - bright[i]) < EVEN)
        near &= (np.abs(boxes[:i, 1] - boxes[i, 1]) < 0.35 * high[i]) & (np.abs(np.log2(high[:i] / high[i])) < 0.7)
        if near.any():
            left = int(np.flatnonzero(near)[length[:i][near].argmax()])
            length[i], start[i] = length[left] + 1, start[left]
        if length[i] >= LINE and (best is None or length[i] > best[0]):
            first = boxes[start[i]]
            best = int(length[i]), float(boxes[i, :2].mean()), float((first[2] + boxes[i, 3]) / 2)
    return best
