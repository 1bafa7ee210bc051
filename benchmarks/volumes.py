"""Volumes from files to optimiser steps, and from files to label files, beside MONAI. Lines of `compare`.

    python benchmarks/volumes.py [--data FOLDER] [--repeats 3] [--steps 6] [--size 32]

pretraining: `meristem pretrain volume/mae` as a user runs it, beside MONAI's MaskedAutoEncoderViT on its PersistentDataset and
on its CacheDataset (loops/monai_mae.py): volumes turned to RAS, 1 mm voxels, clipped at their percentiles 0.5 and 99.5, mean 0
and variance 1, a random crop and flip; ViT-tiny, patches of 8³, 75 % hidden, batches of 32, fp32, one loading process, one
thread each. Checked before: as many tokens, as many of them hidden, parameters within one percent. MONAI's network does not run
in bf16 (1.6.1: its decoder mixes types under autocast).
prediction: label files of a small U-Net, from files: `meristem predict`'s way (which calls MONAI's sliding_window_inference on
its own store) beside LoadImaged … sliding_window_inference … Invertd, SaveImaged with the same net, windows and blending.

--data: a folder with `images/*.nii.gz`; without it, made volumes of 256 × 256 × 160 voxels, int16, as benchmarks/cache.py has
them, and for the predictions phantoms of 96 × 112 × 96.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import cache
import nibabel as nib
import numpy as np
import torch
from compare import compare
from loops import monai_mae
from torch import Tensor
from whole import pretrain, whole

from meristem.modalities.base import View
from meristem.modalities.frame import Frame
from meristem.modalities.rng import Rng
from meristem.modalities.volume.phantom import write_phantoms
from meristem.platform import recipe as recipes
from meristem.platform.assembly import Assembly
from meristem.platform.data.source import open_data
from meristem.platform.recipe import Recipe
from meristem.tasks.base import Scope, objective
from meristem.tasks.finetune import resolve
from meristem.tasks.segmentation import WINDOWS, SegmentationObjective

BATCH, MONAI = 32, f"MONAI {version('monai')}"
TARGETS = dict.fromkeys(("cpu", "wall", "begun_cpu", "begun"), "<= 0.5")


def options(size: int) -> list[str]:
    return [f"views.x.size=[{size},{size},{size}]", "modality.volume.spacing=[1.0,1.0,1.0]", f"train.batch={BATCH}"]


def same(size: int) -> None:
    """Raises AssertionError unless both networks do the same work."""
    recipe: Recipe = recipes.load("volume/mae", options(size))
    assembly, theirs = Assembly(recipe), monai_mae.network(size)
    stream = assembly.tokenizer.stream(recipe.modality.example((size,) * 3, Rng.of(0, torch.arange(2))))
    plan = recipe.masking["x"].plan(stream, Rng.of(0, torch.arange(2)), assembly.encoder.mask_unit)
    predicted, mask = theirs(torch.zeros(2, 1, *(size,) * 3))
    assert predicted.shape[1] == len(stream), "tokens differ"
    assert torch.equal(mask.sum(1).long(), plan.hidden.sum(1)), "as many must be hidden"
    ours, monai = (sum(p.numel() for p in net.parameters() if p.requires_grad) for net in (assembly, theirs))
    assert abs(ours / monai - 1) < 0.01, f"{ours} and {monai} parameters"


def pretraining(folder: Path, what: str, size: int, steps: int, repeats: int) -> None:
    count = len(list((folder / "images").glob("*.nii*")))

    def ours(out: Path, steps: int) -> list[str]:
        return pretrain("volume/mae", folder, out, steps, options(size))

    def monai(kind: str) -> Callable[[Path, int], list[str]]:
        more = [f"--batch={BATCH}", f"--size={size}"]
        return lambda out, steps: ["monai_mae.py", kind, str(folder), str(out), str(steps), *more]

    same(size)
    for kind, dataset, targets in (("persistent", "PersistentDataset", TARGETS), ("cache", "CacheDataset", {})):
        whole(f"MAE of {size}³ crops of {what}", ours, {f"{MONAI}, {dataset}": monai(kind)}, batch=BATCH, epoch=count // BATCH,
              steps=steps, repeats=repeats, targets=targets, volumes=count)


# ---- prediction

def prediction(folder: Path, what: str, volumes: int, repeats: int) -> None:
    from monai.inferers import sliding_window_inference
    from monai.transforms import (
        ClipIntensityPercentilesd,
        Compose,
        EnsureChannelFirstd,
        Invertd,
        LoadImaged,
        NormalizeIntensityd,
        Orientationd,
        SaveImaged,
        Spacingd,
    )

    torch.manual_seed(0)
    window = (64, 64, 64)
    settings = resolve("volume/segmentation", "volume", ["views.x.size=[64,64,64]", "modality.volume.spacing=[1.0,1.0,1.0]",
                                                         "encoder.unet.widths=[8,16,32,64]", "train.precision=fp32"], None)
    assembly = Assembly(settings, {"task": lambda assembly: settings.task.build(assembly, 3)}).eval()
    task, scope = objective(assembly), Scope({0: "background", 1: "one", 2: "two"}, ("one", "two"), "mm")
    assert isinstance(task, SegmentationObjective)
    files = sorted((folder / "images").glob("*.nii*"))[:volumes]

    def net(x: Tensor) -> Tensor:
        n = len(x)
        frame = Frame(torch.eye(4).expand(n, -1, -1), window, torch.ones(n, 3), ("mm",) * 3)
        stream = assembly.tokenizer.stream(View("x", x, frame, torch.arange(n), torch.zeros(n, dtype=torch.long)))
        seen = stream.seen(settings.encoder.sees)
        return task.decoder(assembly.encoder(seen, want=task.decoder.want), stream)  # type: ignore[arg-type, no-any-return]

    def ours(out: Path) -> None:
        found = open_data(out / "in", settings.modality, "auto", out / "cache", True, labels=False)
        task.write(assembly, found, found.rows(), scope, out / "labels")

    def monai(out: Path) -> None:
        before = Compose([
            LoadImaged("image"), EnsureChannelFirstd("image"), Orientationd("image", axcodes="RAS", labels=None),
            Spacingd("image", pixdim=(1.0, 1.0, 1.0), mode="bilinear"),
            ClipIntensityPercentilesd("image", lower=0.5, upper=99.5), NormalizeIntensityd("image")])
        after = Compose([
            Invertd("pred", transform=before, orig_keys="image", nearest_interp=True, to_tensor=True),
            SaveImaged("pred", output_dir=out / "labels", output_postfix="", separate_folder=False, output_dtype=np.uint8,
                       print_log=False)])
        for file in sorted((out / "in" / "images").iterdir()):
            case = before({"image": str(file)})
            with torch.no_grad():
                logits = sliding_window_inference(case["image"][None], window, WINDOWS, net, task.settings.overlap, "gaussian")
            case["pred"] = logits[0].softmax(0).argmax(0, keepdim=True)
            after(case)

    seconds: dict[str, list[float]] = {"ours": [], "monai": []}
    for _ in range(repeats):
        labels = {}
        for name, job in (("ours", ours), ("monai", monai)):
            with tempfile.TemporaryDirectory() as out:
                (place := Path(out) / "in" / "images").mkdir(parents=True)
                for file in files:
                    (place / file.name).symlink_to(file)
                began = time.perf_counter()
                job(Path(out))
                seconds[name].append((time.perf_counter() - began) / len(files))
                labels[name] = [np.asarray(nib.load(f).dataobj) for f in sorted((Path(out) / "labels").rglob("*.nii.gz"))]
        agree = float(np.mean([(a == b).mean() for a, b in zip(labels["ours"], labels["monai"], strict=True)]))
        assert agree > 0.99, f"only {agree:.4f} of the voxels have the same label"
    compare(f"label files of {what}, windows of 64³", f"{MONAI}, sliding_window_inference", "s a volume", seconds["ours"],
            seconds["monai"], same_labels=round(agree, 5), threads=torch.get_num_threads())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder with images/*.nii.gz (default: made volumes)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help="that are counted after the first epoch")
    parser.add_argument("--volumes", type=int, default=32, help="that are made")
    parser.add_argument("--size", type=int, default=32, help="of the crops")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data, what = given.data, given.data and given.data.name
        if data is None:
            data, what = cache.volumes(Path(folder), given.volumes), f"made {'×'.join(map(str, cache.SHAPE))} volumes"
        data = data.absolute()
        pretraining(data, what, given.size, given.steps, given.repeats)
        if given.data is None:
            data, what = write_phantoms(Path(folder) / "phantoms", 2, shape=(96, 112, 96)), "96×112×96 phantoms"
        prediction(data, what, 2, given.repeats)


if __name__ == "__main__":
    main()
