"""The work that every driver of this folder does, in numbers; and what it is told on the command line.

A driver trains `method` on the folder `data` for `steps` optimiser steps, in its own package's way. All: a ViT-tiny with
patches of 16 on crops of 96 pixels (or as the environment says), batches of 64, one loading process, one thread, fp32, AdamW.
Standard library only.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

SIZE, PATCH = map(int, os.environ.get("BENCHMARK_SIZE", "96,16").split(","))
BATCH, WORKERS = 64, 1
WIDTH, DEPTH, HEADS = 192, 12, 3  # ViT-tiny
LR, DECAY = 5e-4, 0.05
MAE = {"hidden": 0.75, "depth": 4, "width": 192, "heads": 6, "area": (0.2, 1.0)}  # of the decoder
SIMCLR = {"hidden": 512, "out": 128, "temperature": 0.2, "area": (0.2, 1.0)}  # of the projector
DINO = {"hidden": 512, "bottleneck": 128, "prototypes": 1024, "momentum": 0.99, "clip": 3.0,
        "area": (0.4, 1.0), "small": 48, "smalls": 4, "small_area": (0.1, 0.4)}
JITTER = {"probability": 0.8, "brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1}
GREY, BLUR, SIGMA, FLIP = 0.2, 0.5, (0.1, 1.0), 0.5  # probabilities; of the blur in pixels
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def told() -> argparse.Namespace:
    """method, data, out, steps."""
    parser = argparse.ArgumentParser()
    parser.add_argument("method", choices=("mae", "simclr", "dino"))
    for name, kind in (("data", Path), ("out", Path), ("steps", int)):
        parser.add_argument(name, type=kind)
    return parser.parse_args()
