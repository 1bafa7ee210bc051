"""Several processes compute what one does: every family of losses, data-parallel and sharded; runs move between both."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from processes import CASES, SHARDED
from torch import nn

import meristem
from meristem.errors import MeristemError
from meristem.platform import norms
from meristem.platform.recipe import TrainSettings
from meristem.platform.training import checkpoint
from meristem.platform.training.loop import launch

TINY = ["encoder.transformer={width: 32, depth: 2, heads: 2, drop_path: 0.0}", "views.x={count: 2, size: [16,16,16]}",
        "objectives.pixels.masked.predictor.decoder={depth: 1, width: 32, heads: 2}", "train.steps=4", "train.batch=4",
        "heads.projector.mlp={layers: 2, hidden: 32, out: 16, norm: layer}", "train.workers=0", "train.ema=0.9",
        "train.checkpoint_every=2"]


def torchrun(*command: str) -> None:
    """Two processes; one thread each, whose sums do not depend on the machine."""
    ended = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *command],
                           env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr[-4000:]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    out = tmp_path_factory.mktemp("two") / "found.pt"
    torchrun(processes.__file__, str(out))
    found: dict[Any, Any] = torch.load(out, weights_only=True)
    return found


@pytest.mark.parametrize("name", CASES)
def test_two_processes_learn_what_one_does(two: dict[Any, Any], name: str) -> None:
    one = processes.work(name, False)
    largest = max(float(g.abs().max()) for g in one["gradients"].values())
    for fsdp in (False, True) if name in SHARDED else (False,):
        other = two[name, fsdp]
        for mine, theirs in zip(one["losses"], other["losses"], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-6)
        assert one["gradients"].keys() == other["gradients"].keys()
        for part, tolerance in (("gradients", 5e-4 * largest), ("weights", 1e-4)):
            for key, value in one[part].items():
                torch.testing.assert_close(value, other[part][key], rtol=1e-4, atol=tolerance, msg=lambda m, k=key: f"{k}: {m}")


def test_runs_go_on_sharded_or_not_with_other_numbers_of_processes(volume_folder: Path, tmp_path: Path) -> None:
    """Two processes, data-parallel and sharded, give one's weights, averages and optimiser; checkpoints are one's too."""
    cache = tmp_path / "cache"

    def run(out: str, fsdp: bool, resume: bool = False) -> None:
        meristem.pretrain("volume/mae+simclr", volume_folder, tmp_path / out, [*TINY, f"train.fsdp={str(fsdp).lower()}"],
                          cache=cache, quiet=True, resume=resume)

    def cut(of: str, to: str) -> None:
        shutil.copytree(tmp_path / of, tmp_path / to)
        shutil.rmtree(tmp_path / to / "checkpoints" / "step-00000004")

    run("one", True)
    cut("one", "one-then-two")
    script = tmp_path / "two.py"
    script.write_text("import functools, meristem, pathlib, torch\n"
                      "torch.compile = functools.partial(torch.compile, backend='eager', fullgraph=True)\n"
                      "parts = ['train.compile=true', 'train.checkpointing=true', 'train.fsdp=true']\n"
                      "for out, more, resume in (('ddp', ['train.fsdp=false'], False), ('fsdp', ['train.fsdp=true'], False),\n"
                      "                          ('one-then-two', ['train.fsdp=true'], True), ('parts', parts, False)):\n"
                      f"    meristem.pretrain('volume/mae+simclr', {str(volume_folder)!r}, {str(tmp_path)!r} + '/' + out, \n"
                      f"                      [*{TINY!r}, *more], quiet=True, resume=resume,\n"
                      f"                      cache=pathlib.Path({str(cache)!r}))\n")
    torchrun(str(script))
    cut("fsdp", "two-then-one")
    run("two-then-one", True, resume=True)
    loss = json.loads((tmp_path / "one" / "metrics.json").read_text())["loss"]
    weights, state = checkpoint.read_weights(tmp_path / "one"), checkpoint.read_state(tmp_path / "one")
    for out in ("ddp", "fsdp", "parts", "one-then-two", "two-then-one"):
        assert json.loads((tmp_path / out / "metrics.json").read_text())["loss"] == pytest.approx(loss, abs=2e-5)
        other = checkpoint.read_state(tmp_path / out)
        assert other["optimiser"]["param_groups"] == state["optimiser"]["param_groups"]
        for mine, theirs in ((weights, checkpoint.read_weights(tmp_path / out)), (state["raw"], other["raw"]),
                             *((state["optimiser"]["state"][i], other["optimiser"]["state"][i])
                               for i in state["optimiser"]["state"])):
            assert mine.keys() == theirs.keys()
            assert all(torch.allclose(torch.as_tensor(mine[k]), torch.as_tensor(theirs[k]), atol=1e-4) for k in mine)
    cards = [checkpoint.read_card(tmp_path / out)["reference"]["embedding"] for out in ("one", "fsdp")]
    assert cards[0] == pytest.approx(cards[1], abs=1e-3)


def test_a_batch_norm_of_one_process_is_torchs() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 4),
                          nn.BatchNorm1d(4, affine=False))
    plain[1].weight.requires_grad_(False)
    x, own = torch.randn(5, 2, 4, 4), norms.synchronised(copy.deepcopy(plain), torch.device("cpu"))
    assert list(own.state_dict()) == list(plain.state_dict()) and [type(own[i]) for i in (1, 4)] == [norms.BatchNorm] * 2
    assert not own[1].weight.requires_grad and own[1].bias.requires_grad
    assert torch.equal(own(x), plain(x)) and torch.equal(own[1].running_var, plain[1].running_var)


def test_scaled_gradients_cannot_be_sharded() -> None:
    with pytest.raises(MeristemError, match="fp16"):
        launch(TrainSettings(precision="fp16", fsdp=True), "cuda")
