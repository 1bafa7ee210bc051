"""Meristem's command line on the common work."""

from __future__ import annotations

import os
import sys

import marks
from peers import work

marks.watch()
told = work.told()


def view(size: int, area: tuple[float, float], jitter: bool) -> str:
    """A view's settings as one override."""
    options = f"size: [{size}, {size}], window: area, area: [{area[0]}, {area[1]}], flip: [0.0, {work.FLIP}]"
    if jitter:
        for name in ("brightness", "contrast", "saturation"):
            a = work.JITTER[name]
            options += f", {name}: {{range: [{1 - a}, {1 + a}], probability: {work.JITTER['probability']}}}"
        hue = work.JITTER["hue"]
        options += (f", hue: {{range: [{-hue}, {hue}], probability: {work.JITTER['probability']}}}, grayscale: {work.GREY}, "
                    f"blur: {{range: [{work.SIGMA[0]}, {work.SIGMA[1]}], probability: {work.BLUR}}}, solarise: null")
    return f"{{{options}}}"


m, s, d = work.MAE, work.SIMCLR, work.DINO
OVERRIDES = {
    "mae": [f"views.x={view(work.SIZE, m['area'], False)}", f"masking.x.random.ratio={m['hidden']}",
            f"objectives.pixels.masked.predictor.decoder={{depth: {m['depth']}, width: {m['width']}, heads: {m['heads']}}}"],
    "simclr": ["objectives.contrast.contrastive.level=cls", f"views.v={view(work.SIZE, s['area'], True)}", "views.v.count=2",
               f"heads.projector.mlp={{layers: 2, hidden: {s['hidden']}, out: {s['out']}}}"],
    "dino": [f"views.g={view(work.SIZE, d['area'], True)}", "views.g.count=2",
             f"views.l={view(d['small'], d['small_area'], True)}", f"views.l.count={d['smalls']}",
             f"heads.head.prototypes={{hidden: {d['hidden']}, out: {d['bottleneck']}, count: {d['prototypes']}}}"],
}
sys.argv = ["meristem", "pretrain", f"image/{told.method}", "--data", str(told.data), "--out", str(told.out / "run"),
            "--cache", str(told.out / "cache"), "--split", "1,0,0", "--quiet",
            f"modality.image.patch={work.PATCH}", "modality.image.normalise=imagenet", f"train.batch={work.BATCH}",
            f"train.workers={work.WORKERS}", f"train.steps={told.steps + 8}",  # so that it loads ahead up to the last mark
            f"train.lr={work.LR}", f"train.weight_decay={work.DECAY}", *OVERRIDES[told.method],
            *os.environ.get("BENCHMARK_OVERRIDES", "").split()]

from meristem.cli import main  # noqa: E402  (after the marks: its imports count)

main()
