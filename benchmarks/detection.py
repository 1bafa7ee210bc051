"""Seconds and peak memory of searching a whole volume and a whole image, beside MONAI's own RetinaNet on the same backbone.
Lines of `compare`.

    python benchmarks/detection.py [--shape 128 128 96] [--steps 150] [--repeats 3]

A detector of `volume/detection` learns a made volume of bright cuboids by heart (without it there would be nothing to fuse).
`ours` searches it by windows, finds boxes in each and fuses them; `monai` is a RetinaNetDetector of MONAI with its own network,
anchors and sliding-window inferer, which joins the maps of windows before it looks for boxes; encoder, pyramid and heads have
the same weights, windows the same size, overlap, number at a time and precision. Seconds are medians, in turns, from decoded
volume to boxes; peaks are those of processes of their own, less what the process held before. found: cuboids that a box of
a score over 0.3 meets at an IoU over 0.5, of all such boxes.
An image of 480×640 pixels is searched in the same way by the RetinaNet of `image/detection`, torchvision's, and by MONAI's in
two dimensions, whose heads have other weights; nobody taught either, so that no boxes are left to compare.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from compare import compare
from PIL import Image
from timing import turns
from torch import Tensor, nn

import meristem
from meristem.modalities.base import View
from meristem.modalities.frame import Frame
from meristem.platform.assembly import Assembly
from meristem.platform.data.source import Data, open_data
from meristem.tasks import transfer
from meristem.tasks.base import normalised, objective
from meristem.tasks.detection import WINDOWS, DetectionObjective, stored
from meristem.tasks.detectors.fusion import overlap
from meristem.tasks.detectors.monai import CANDIDATES, MonaiRetinaNet
from meristem.tasks.detectors.torchvision import OCTAVE, PostSettings
from meristem.tasks.detectors.torchvision import RetinaNet as RetinaNet2D
from meristem.tasks.finetune import resolve

CUBOIDS = 5
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PLAIN = ["views.x.affine=null", "views.x.noise=null", "views.x.brightness=null", "views.x.contrast=null", "train.lr=3e-3",
         "train.ema=null", "train.workers=0", "train.log_every=20"]
Job = Callable[[], tuple[Tensor, Tensor]]


def made(folder: Path, shape: tuple[int, ...]) -> Path:
    """Noise with cuboids, and the list that says where they are."""
    rng = np.random.default_rng(0)
    array, boxes = rng.normal(100, 20, shape).astype(np.float32), list[list[float]]()
    while len(boxes) < CUBOIDS:
        size = rng.integers(12, 24, 3)
        low = rng.integers(2, np.array(shape) - size - 2)
        if any(all(a < high and b > low_ for a, b, low_, high in zip(low - 4, low + size + 4, box[:3], box[3:], strict=True))
               for box in boxes):
            continue
        array[tuple(map(slice, low, low + size))] += 60
        boxes.append([*map(float, low), *map(float, low + size)])
    folder.mkdir()
    nib.save(nib.Nifti1Image(array, np.eye(4)), folder / "a.nii.gz")
    entry = {"image": "a.nii.gz", "box": (np.array(boxes) - 0.5).tolist(), "label": [0] * CUBOIDS}
    (folder / "boxes.json").write_text(json.dumps({"box_mode": "xyzxyz", "coordinates": "RAS", "training": [entry]}))
    return folder / "boxes.json"


class Backbone(nn.Module):
    """Our encoder and pyramid as MONAI wants them: an image in, maps out."""

    def __init__(self, assembly: Assembly, task: DetectionObjective) -> None:
        super().__init__()
        self.assembly, self.task, self.out_channels = assembly, task, task.settings.width

    def forward(self, x: Tensor) -> list[Tensor]:
        n, shape = len(x), tuple(x.shape[2:])
        dims = len(shape)
        frame = Frame(torch.eye(dims + 1, device=x.device).expand(n, -1, -1), shape, torch.ones(n, dims, device=x.device),
                      tuple(axis.unit for axis in self.assembly.recipe.modality.axes))
        rows = torch.arange(n, device=x.device)
        stream = self.assembly.tokenizer.stream(View("x", x, frame, rows, torch.zeros_like(rows)))
        seen = stream.seen(self.assembly.recipe.encoder.sees)
        return self.task.pyramid(self.assembly.encoder(seen, want=self.task.pyramid.want), stream)  # type: ignore[arg-type]


def both(assembly: Assembly, data: Data, shapes: list[list[float]], weights: Any = None) -> dict[str, Job]:
    """What each way does to the only sample of the data. shapes: of the anchors of the finest map, in elements. weights: a
    detector whose heads MONAI's own are to be; None: they keep their first ones.
    """
    from monai.apps.detection.networks.retinanet_detector import RetinaNetDetector
    from monai.apps.detection.networks.retinanet_network import RetinaNet
    from monai.apps.detection.utils.anchor_utils import AnchorGeneratorWithAnchorShape

    task, recipe, device = objective(assembly), assembly.recipe, next(assembly.parameters()).device
    assert isinstance(task, DetectionObjective) and isinstance(task.settings.detector, PostSettings)
    row, = data.rows()
    sample = normalised(data.cache.array(row.index), data.cache.header(row.index), device)
    options, strides = task.settings.detector, task.pyramid.strides
    network = RetinaNet(len(strides[0]), 1, len(shapes), Backbone(assembly, task), size_divisible=strides[-1])
    if weights is not None:
        network.classification_head.load_state_dict(weights.model.network.classify.state_dict())
        network.regression_head.load_state_dict(weights.model.network.regress.state_dict())
    detector = RetinaNetDetector(network, AnchorGeneratorWithAnchorShape([s[0] / strides[0][0] for s in strides], shapes))
    size: tuple[int, ...] = tuple(recipe.views["x"].size)  # type: ignore[attr-defined]
    detector.set_sliding_window_inferer(size, WINDOWS, task.settings.overlap)
    detector.set_box_selector_parameters(score_thresh=options.score, topk_candidates_per_level=CANDIDATES,
                                         nms_thresh=options.nms, detections_per_img=options.most)
    detector = detector.to(device).eval()

    def ours() -> tuple[Tensor, Tensor]:
        found = task.predict(assembly, data, row)
        assert found.score is not None
        return found.box, found.score

    @torch.no_grad()
    def monai() -> tuple[Tensor, Tensor]:
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.train.precision == "bf16"):
            found, = detector([sample], use_inferer=True)
        return found["boxes"].float(), found["labels_scores"]

    return {"ours": ours, "monai": monai}


def volume_jobs(run: Path, listing: Path, cache: Path) -> tuple[dict[str, Job], Tensor]:
    """Of the trained detector, and the true boxes."""
    assembly, settings, _ = transfer.reload(run)
    assembly = assembly.to(DEVICE).eval()
    task = objective(assembly)
    assert isinstance(task, DetectionObjective) and isinstance(task.settings.detector, MonaiRetinaNet)
    data = open_data(listing, settings.modality, "1,0,0", cache, quiet=True)
    row, = data.rows()
    assert row.objects is not None
    finest = task.pyramid.strides[0]
    shapes = [[a * s for a, s in zip(anchor, finest, strict=True)] for anchor in task.settings.detector.anchors]
    truth = torch.from_numpy(stored(row.objects, data.cache.header(row.index))).float()
    return both(assembly, data, shapes, task.detector), truth


def image_jobs(folder: Path) -> dict[str, Job]:
    """Of a detector that nobody taught, on noise."""
    torch.manual_seed(0)
    recipe = resolve("detection", "image", ["task.detection.detector=retinanet"])
    assembly = recipe.assemble(1).to(DEVICE).eval()
    task = objective(assembly)
    assert isinstance(task, DetectionObjective) and isinstance(task.settings.detector, RetinaNet2D)
    if not folder.is_dir():
        folder.mkdir()
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (480, 640, 3), np.uint8)).save(folder / "a.png")
    shapes = [[task.settings.detector.scale * octave * s * r for s, r in
               zip(task.pyramid.strides[0], (ratio**0.5, ratio**-0.5), strict=True)]
              for octave in OCTAVE for ratio in task.settings.detector.ratios]
    return both(assembly, open_data(folder, recipe.modality, "1,0,0", folder.parent / "cache", quiet=True), shapes)


def hits(found: tuple[Tensor, Tensor], truth: Tensor) -> list[int]:
    box = found[0][found[1] > 0.3].cpu()
    return [int((overlap(truth, box) > 0.5).any(1).sum()), len(box)]


def peak() -> float:
    """MiB held at most since `forget`: of the GPU where there is one, else of the process (Linux)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    lines = Path("/proc/self/status").read_text().splitlines()  # getrusage counts what the parent held when it forked
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**10


def forget() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def compared(kind: str, todo: dict[str, Job], folder: str, repeats: int, **about: Any) -> None:
    """Seconds in turns, and peaks."""
    ours, monai = turns([todo["ours"], todo["monai"]], repeats)
    peer = f"MONAI {version('monai')}"
    compare(f"searching {kind}", peer, "s", ours, monai, **about)
    peaks = []
    for name in ("ours", "monai"):
        command = [sys.executable, __file__, "--arm", f"{kind.split()[1]} {name}", folder]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        peaks.append([float(json.loads(done.stdout.splitlines()[-1]))])
    compare(f"searching {kind}: peak", peer, "MiB", *peaks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=[128, 128, 96])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--arm", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        (kind, name), home = options.arm[0].split(), Path(options.arm[1])
        todo = (image_jobs(home / "images") if kind == "image" else
                volume_jobs(home / "run", home / "data" / "boxes.json", home / "cache")[0])
        forget()
        before = peak()
        todo[name]()
        print(json.dumps(round(peak() - before, 1)))
        return
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        listing = made(home / "data", tuple(options.shape))
        meristem.finetune("volume/detection", listing, home / "run", [*PLAIN, f"train.steps={options.steps}"], split="1,0,0",
                          cache=home / "cache", quiet=True)
        todo, truth = volume_jobs(home / "run", listing, home / "cache")
        found = {name: hits(job(), truth) for name, job in todo.items()}
        compared("a volume", todo, folder, options.repeats, shape=options.shape, cuboids=CUBOIDS, found=found)
        compared("an image", image_jobs(home / "images"), folder, options.repeats, shape=[480, 640])


if __name__ == "__main__":
    main()
