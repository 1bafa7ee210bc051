"""LightlyTrain's pretrain() (SimCLR, DINO). Its usage events are off, as its documentation tells."""

from __future__ import annotations

import os

import marks
from peers import work

marks.watch()
told = work.told()
os.environ["LIGHTLY_TRAIN_EVENTS_DISABLED"] = "1"

import lightly_train  # noqa: E402  (its imports count as the peer's)

jitter = {"prob": work.JITTER["probability"], "strength": 1.0,
          **{name: work.JITTER[name] for name in ("brightness", "contrast", "saturation", "hue")}}
blur = {"prob": work.BLUR, "sigmas": work.SIGMA}
area = work.SIMCLR["area"] if told.method == "simclr" else work.DINO["area"]
transform = {"image_size": (work.SIZE, work.SIZE), "random_resize": {"min_scale": area[0], "max_scale": area[1]},
             "color_jitter": jitter, "gaussian_blur": blur, "random_gray_scale": work.GREY}
if told.method == "simclr":
    s = work.SIMCLR
    arguments = {"hidden_dim": s["hidden"], "output_dim": s["out"], "temperature": s["temperature"]}
else:
    d = work.DINO
    arguments = {"hidden_dim": d["hidden"], "bottleneck_dim": d["bottleneck"], "output_dim": d["prototypes"],
                 "momentum_start": d["momentum"]}
    transform |= {"global_view_1": {"gaussian_blur": blur, "solarize": None},
                  "local_view": {"num_views": d["smalls"], "view_size": (d["small"], d["small"]), "gaussian_blur": blur,
                                 "random_resize": {"min_scale": d["small_area"][0], "max_scale": d["small_area"][1]}}}
lightly_train.pretrain(
    out=told.out / "run", data=told.data, model="timm/vit_tiny_patch16_224", method=told.method, method_args=arguments,
    model_args={"img_size": work.SIZE, "dynamic_img_size": True}, transform_args=transform, batch_size=work.BATCH,
    num_workers=work.WORKERS, accelerator="cpu", precision="32-true", optim="adamw",
    optim_args={"lr": work.LR, "weight_decay": work.DECAY}, epochs=10_000, trainer_args={"max_steps": told.steps},
    loggers={"tensorboard": None})
