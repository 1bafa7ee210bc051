"""solo-learn (SimCLR), as its main_pretrain.py goes: its method, its transforms and its loader in Lightning's trainer."""

from __future__ import annotations

import marks
from peers import work

marks.watch()
told = work.told()

import pytorch_lightning as pl  # noqa: E402  (the imports below count as the peer's)
from solo.methods import METHODS  # noqa: E402
from solo.utils.pretrain_dataloader import (  # noqa: E402
    prepare_dataloader,
    prepare_datasets,
    prepare_n_crop_transform,
    prepare_transform,
)

s, j = work.SIMCLR, work.JITTER
model = METHODS["simclr"](
    proj_output_dim=s["out"], proj_hidden_dim=s["hidden"], temperature=s["temperature"], encoder="vit_tiny",
    num_classes=1, backbone_args={"patch_size": work.PATCH, "img_size": work.SIZE}, max_epochs=10_000, batch_size=work.BATCH,
    optimizer="adamw", lars=False, lr=work.LR, weight_decay=work.DECAY, classifier_lr=work.LR, exclude_bias_n_norm=False,
    accumulate_grad_batches=1, extra_optimizer_args={}, scheduler="none", min_lr=0.0, warmup_start_lr=0.0, warmup_epochs=0,
    num_large_crops=2, num_small_crops=0)
crop = prepare_transform("custom", brightness=j["brightness"], contrast=j["contrast"], saturation=j["saturation"], hue=j["hue"],
                         color_jitter_prob=j["probability"], gray_scale_prob=work.GREY, horizontal_flip_prob=work.FLIP,
                         gaussian_prob=work.BLUR, solarization_prob=0.0, min_scale=s["area"][0], max_scale=s["area"][1],
                         crop_size=work.SIZE, mean=work.MEAN, std=work.STD)
transform = prepare_n_crop_transform([crop], num_crops_per_aug=[2])
dataset = prepare_datasets("custom", transform, data_dir=str(told.data.parent), train_dir=told.data.name, no_labels=False)
loader = prepare_dataloader(dataset, batch_size=work.BATCH, num_workers=work.WORKERS)
trainer = pl.Trainer(max_steps=told.steps, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
                     enable_progress_bar=False, default_root_dir=str(told.out))
trainer.fit(model, loader)
