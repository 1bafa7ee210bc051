"""Every pretraining recipe of clips runs on films; a run cut short goes on to the same bits."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from test_training import same

import meristem
from meristem.catalogue import names
from meristem.platform import recipe as recipes
from meristem.platform.training import checkpoint, loop

RECIPES = [name for name in names() if name.startswith("video/") and recipes.read(name).get("objectives")]
TUBES = {"video/videomae", "video/videomae-v2", "video/v-jepa"}


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six films of 40 frames of 48 × 64: a picture that drifts."""
    root, rng = tmp_path_factory.mktemp("data") / "films", np.random.default_rng(0)
    root.mkdir()
    for i in range(6):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8))
        picture = np.asarray(coarse.resize((128, 96), Image.Resampling.BICUBIC))
        with av.open(str(root / f"{i}.mp4"), "w") as container:
            stream = container.add_stream("libx264", 25)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            for t in range(40):
                frame = np.ascontiguousarray(picture[t:t + 48, t:t + 64])
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
            container.mux(stream.encode())
    return root


def tiny(name: str) -> list[str]:
    """The recipe made small: frames of 6 × 6 tokens where tubes need places to hide, else as few as its patch allows."""
    plain = recipes.read(name)
    (kind, _), = plain["encoder"].items()
    encoder = "encoder.slicewise.encoder.transformer" if kind == "slicewise" else "encoder.transformer"
    patch = plain["modality"]["video"]["patch"]
    side = 6 * patch[2] if name in TUBES else 32
    changes = [f"{encoder}.width=24", f"{encoder}.depth=1", f"{encoder}.heads=2", "train.workers=0", "train.batch=4",
               "train.steps=2", "train.log_every=1", "train.checkpoint_every=1"]
    changes += [f"views.{view}.size=[{4 if patch[0] > 1 else 1}, {side}, {side}]" for view in plain["views"]]
    if any("masked" in objective for objective in plain["objectives"].values()):
        for key, objective in plain["objectives"].items():
            for predictor in objective.get("masked", {}).get("predictor", ()):
                changes.append(f"objectives.{key}.masked.predictor.{predictor}={{depth: 1, width: 24, heads: 2}}")
    return changes


def run(name: str, data: Path, out: Path, *more: str, resume: bool = False) -> dict[str, torch.Tensor]:
    meristem.pretrain(name, data, out, [*tiny(name), *more], cache=data.parent / "cache", quiet=True, resume=resume)
    return checkpoint.read_weights(out)


def test_the_recipes_of_the_issue_are_there() -> None:
    wanted = {"videomae", "videomae-v2", "v-jepa", "saycam-videomae", "cvrl", "rspnet", "vfs", "pcl-pretext-contrast"}
    assert {f"video/{name}" for name in wanted} <= set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_on_films(name: str, films: Path, tmp_path: Path) -> None:
    weights = run(name, films, tmp_path / "run")
    assert all(torch.isfinite(w).all() for w in weights.values())
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [v for line in lines for key, v in line.items() if "loss" in key]
    assert len(lines) == 2
    assert losses
    assert all(math.isfinite(v) for v in losses)
    figures = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (figures["samples"], figures["quarantined"]) == (8, 0)


def test_a_run_cut_short_goes_on_to_the_same_bits(films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a queue of keys, a teacher, and three views of each film."""
    name, more = "video/rspnet", ("train.steps=4", "objectives.appearance.contrastive.queue=32")
    whole = run(name, films, tmp_path / "whole", *more)
    advance = loop.Reporter.advance

    def cut(self: Any, step: int, *rest: Any) -> None:
        advance(self, step, *rest)
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(loop.Reporter, "advance", cut)
        run(name, films, tmp_path / "cut", *more)
    assert json.loads((tmp_path / "cut" / "metrics.json").read_text())["stopped_early"]
    assert checkpoint.read_card(tmp_path / "cut")["step"] == 2
    assert same(whole, run(name, films, tmp_path / "cut", *more, resume=True))
