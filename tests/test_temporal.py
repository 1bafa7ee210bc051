"""Segments of time in untrimmed videos: how they are read, where they lie in views, how they are found."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

import meristem
from meristem.errors import RecipeError
from meristem.modalities.base import Header, Look, modality_class
from meristem.modalities.frame import Frame
from meristem.modalities.objects import Objects
from meristem.platform.data.manifest import Manifest
from meristem.platform.data.source import open_data
from meristem.tasks.finetune import resolve
from meristem.tasks.temporal import in_view, to_source
from meristem.tasks.temporal_head import Level, TemporalHead, decode, distance_loss, losses, suppress, targets

SEGMENTS = [("sweep", 2.0, 5.0), ("flash", 7.0, 9.0), ("sweep", 11.5, 14.5), ("flash", 17.0, 20.0)]
SECONDS, RATE = 22, 8
SMALL = ["modality.video.patch=[2,16,16]", "views.x.size=[64,32,32]", "views.x.window=cover", "views.x.area=null",
         "views.x.flip=null", "views.x.brightness=null", "views.x.contrast=null", "train.layer_decay=1",
         "encoder={transformer: {width: 64, depth: 2, heads: 2}}", "task.temporal.width=64", "task.temporal.levels=4"]


def untrimmed(path: Path) -> Path:
    """A film of a dim street with a bar that sweeps through it, and flashes, at the seconds of SEGMENTS."""
    rng = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", RATE)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for i in range(SECONDS * RATE):
            pixels = rng.integers(60, 80, (32, 32, 3), dtype=np.uint8)
            for name, start, end in SEGMENTS:
                if start <= i / RATE < end:
                    if name == "flash":
                        pixels[::, :, 0] = 255 if i % 2 else 120
                    else:
                        pixels[:, 4 * i % 32:4 * i % 32 + 8] = (20, 200, 250)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        container.mux(stream.encode())
    return path


def listed(root: Path, **entries: Any) -> Path:
    path = root / "annotations.json"
    path.write_text(json.dumps({"version": "1.3", "database": entries}))
    return path


def entry(subset: str = "training", segments: Any = SEGMENTS, duration: float = SECONDS) -> dict[str, Any]:
    return {"subset": subset, "duration": duration,
            "annotations": [{"label": name, "segment": [start, end]} for name, start, end in segments]}


def video(**options: Any) -> Any:
    cls = modality_class("video")
    return cls(cls.Options(**options))
