"""Runs that go on from a checkpoint in the middle, beside the same ones undisturbed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from meristem.platform.training import checkpoint


def goes_on_to_the_same_bits(run: Callable[[Path, bool], object], folder: Path, middle: int, last: int) -> dict[str, Tensor]:
    """run(directory, resume) makes a run of `last` steps that keeps its checkpoint of step `middle`. Returns its weights, which
    those of a copy that goes on from there must equal, and which must not be those of the middle.
    """
    whole, cut = folder / "whole", folder / "cut"
    run(whole, False)
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints" / f"step-{last:08d}")
    run(cut, True)
    a, b = checkpoint.read_weights(whole), checkpoint.read_weights(cut)
    start = checkpoint.read_weights(whole / "checkpoints" / f"step-{middle:08d}")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert any(not torch.equal(a[k], start[k]) for k in a)
    return a
