"""The same on a GPU: losses, training, heads and predictions. Run with `pytest -m gpu` on a machine that has one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import meristem
from meristem.modalities.objects import Objects, Raster
from meristem.modalities.rng import Rng
from meristem.platform import recipe as recipes
from meristem.platform.assembly import Assembly, total
from meristem.tasks.base import objective
from meristem.tasks.detection import DetectionObjective
from meristem.tasks.finetune import resolve
from meristem.tasks.inspection import noise

pytestmark = pytest.mark.gpu
METHODS = ["mae", "simmim", "simclr", "moco-v3", "dino", "ibot", "swav", "mae+simclr"]
SMALL = ["encoder={transformer: {width: 64, depth: 2, heads: 2}}"]


def test_random_numbers_are_those_of_the_cpu() -> None:
    key = torch.arange(7)
    here, there = Rng.of(3, key, "x").uniform("u", 11), Rng.of(3, key.cuda(), "x").uniform("u", 11)
    assert torch.equal(here, there.cpu())


@pytest.mark.parametrize("method", METHODS)
def test_a_step_gives_the_losses_of_the_cpu(method: str) -> None:
    recipe = recipes.load(f"volume/{method}", SMALL)
    torch.manual_seed(0)
    assembly = Assembly(recipe)
    batch = noise(recipe)
    here = {k: float(v.total / v.count) for k, v in assembly(batch, 0.0).items()}
    there = {k: float(v.total / v.count) for k, v in assembly.cuda()(batch.to("cuda"), 0.0).items()}
    assert here == pytest.approx(there, rel=1e-3)


@pytest.mark.parametrize(("kind", "detector"), [("image", "fcos"), ("image", "mask-rcnn"), ("volume", "monai-retinanet")])
def test_a_detector_learns_and_finds_on_a_gpu(kind: str, detector: str) -> None:
    recipe = resolve("detection", kind, [f"task.detection.detector={detector}"])
    assembly, batch = recipe.assemble(2).cuda(), noise(recipe).to("cuda")
    task, dims = objective(assembly), len(recipe.modality.axes)
    assert isinstance(task, DetectionObjective)
    cells = np.ones((16,) * dims, bool)
    objects = Objects(np.array([[8.0] * dims + [24.0] * dims]), np.ones(1, np.int64), masks=(Raster(cells, (8,) * dims),))
    task.known = {int(row): (objects, torch.eye(dims + 1)) for row in batch.items.row}
    loss = total(assembly(batch, 0.0))
    loss.backward()
    assert torch.isfinite(loss)
    step = assembly.last_step
    assert step is not None
    maps = task.pyramid(step.encode("x", want=task.pyramid.want), step.stream("x"))  # type: ignore[arg-type]
    with torch.no_grad():
        found = task.detector.detect(maps, tuple(batch.views["x"].array.shape[2:]))
    assert len(found) == len(batch.items.row) and all(x.box.is_cuda for x in found)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_whole_job_on_a_gpu(precision: str, volume_folder: Path, tmp_path: Path) -> None:
    cache, quick = tmp_path / "c", ["train.batch=2", f"train.precision={precision}", "train.workers=1"]
    unet = ["encoder={unet: {widths: [8, 16], blocks: [1, 1]}}", "views.x.size=[16,16,16]"]
    meristem.pretrain("volume/mae-unet", volume_folder, tmp_path / "pre", [*unet, *quick, "train.steps=5"], cache=cache,
                      quiet=True)
    meristem.finetune("segmentation", volume_folder, tmp_path / "fine", [*quick, "views.x.size=[16,16,16]", "train.steps=60"],
                      init=str(tmp_path / "pre"), cache=cache, quiet=True)
    assert json.loads((tmp_path / "fine" / "metrics.json").read_text())["test"]["dice"] > 0.5
    assert len(meristem.predict(tmp_path / "fine", volume_folder / "imagesTr", tmp_path / "out", quiet=True)) == 8
