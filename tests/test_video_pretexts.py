"""Speed, order, direction and turn of clips of white noise cannot be told, unless something gives them away."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binom
from test_contract import TEST, TRAIN, accuracy, looks, made
from torch import Tensor

from meristem.modalities.base import Modality, View

SIDE = 24  # frames, rows and columns: clips at double speed, and one frame more for differences, leave places to start
DRAWS: dict[str, Any] = {"speed": [1, 2], "direction": 0.5, "order": 2, "turn": True}
NONE: dict[str, Any] = {"speed": (), "direction": None, "order": None, "turn": False}


@pytest.fixture(scope="module")
def video() -> Modality:
    return made("video", patch=(2, 4, 4))


def clips(modality: Modality, first: int, films: int, side: int = SIDE, **keys: Any) -> View:
    options = modality.ViewOptions.model_validate({"size": [8, 8, 8], "window": "crop", **DRAWS, **keys})
    return looks(modality, options, side, first, films)


def both(modality: Modality, **keys: Any) -> tuple[View, View]:
    """Clips to learn from and clips to be asked about."""
    return clips(modality, 0, TRAIN, **keys), clips(modality, TRAIN, TEST, **keys)


def labels(view: View) -> Tensor:
    """(B, n) bool: every drawn number as bits."""
    drawn = {name: view.params[name] for name in DRAWS if name in view.params}
    return torch.stack([(x >> bit) % 2 > 0 for name, x in drawn.items() for bit in range(2 if name == "turn" else 1)], 1)


@pytest.mark.parametrize("side", [SIDE, 6])
@pytest.mark.parametrize("keys", [
    {}, {"sample": {"stride": 3}}, {"sample": {"fps": 2.0}}, {"sample": "uniform", "speed": ()}, {"residual": True},
    {"window": "area", "flip": [0, 0.5, 0.5]}, {"short": "hold"}, {"pace": "other", "count": 2, "apart": "linear"}])
def test_beside_its_pixels_every_clip_is_alike(video: Modality, keys: dict[str, Any], side: int) -> None:
    """Whatever was drawn, and also where the clip is longer than the film: one table of positions for all."""
    view = clips(video, 0, 24, side, **{"window": "whole", **keys} if side == 6 else keys)
    assert labels(view).float().std(0).min() > 0
    stream = video.tokenizer().stream(view).seen(frozenset({"position"}))
    assert stream.position is not None
    assert torch.equal(stream.position, stream.position[:1].expand_as(stream.position))
    assert stream.source is stream.weight is stream.item is None


@pytest.mark.parametrize("keys", [{}, {"sample": {"fps": 1.0}, "residual": True}])
def test_pretexts_on_white_noise_stay_at_chance(video: Modality, keys: dict[str, Any]) -> None:
    """Frames; and differences of the frames on screen at the film's own rate."""
    right = accuracy(video, *both(video, **keys), labels, leak=False)
    low, high = np.array(binom.interval(1 - 1e-4, TEST, 0.5)) / TEST
    assert len(right) == 5
    assert ((right >= low) & (right <= high)).all(), right


def test_source_places_would_give_order_away(video: Modality) -> None:
    """Not so direction and turn: a set of tokens of white noise is the same backwards and turned, places and all."""
    assert (accuracy(video, *both(video, **{**NONE, "order": 2}), labels, leak=True) > 0.75).all()


def test_seconds_of_the_file_would_give_speed_away(video: Modality) -> None:
    """What the view's own seconds are for."""
    def played(view: View) -> View:
        spacing = view.frame.spacing.clone()
        spacing[:, 0] *= 1 + view.params["speed"]
        return replace(view, frame=replace(view.frame, spacing=spacing))

    train, test = both(video, **{**NONE, "speed": [1, 2]})
    assert (accuracy(video, played(train), played(test), labels, leak=False) > 0.75).all()


def test_repeated_frames_would_give_speed_away(video: Modality) -> None:
    """At a rate over the file's own frames are shown twice, less often at double speed: the options say so."""
    view = clips(video, 0, 64, **{**NONE, "speed": [1, 2]}, sample={"fps": 2.0})
    repeats = (view.array[:, :, 1:] == view.array[:, :, :-1]).flatten(3).all(3).all(1).any(1)
    assert torch.equal(repeats, view.params["speed"] == 0)
