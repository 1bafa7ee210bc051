"""stable-pretraining: its methods (MAE, SimCLR, DINO) in Lightning's trainer, as their documentation tells."""

from __future__ import annotations

import marks
from peers import work

marks.watch()
told = work.told()

import lightning  # noqa: E402  (the imports below count as the peer's)
import stable_pretraining as spt  # noqa: E402
import timm  # noqa: E402
import torch  # noqa: E402
from stable_pretraining import methods  # noqa: E402
from stable_pretraining.data import transforms as T  # noqa: E402
from torchvision.datasets import ImageFolder  # noqa: E402


def view(size: int, area: tuple[float, float], jitter: bool) -> T.Compose:
    j = work.JITTER
    steps = [T.RGB(), T.RandomResizedCrop((size, size), scale=area)]
    if jitter:
        steps += [T.ColorJitter(brightness=j["brightness"], contrast=j["contrast"], saturation=j["saturation"], hue=j["hue"],
                                p=j["probability"]),
                  T.RandomGrayscale(p=work.GREY), T.PILGaussianBlur(sigma=work.SIGMA, p=work.BLUR)]
    steps += [T.RandomHorizontalFlip(p=work.FLIP), T.ToImage(mean=work.MEAN, std=work.STD)]
    return T.Compose(*steps)


def vit() -> torch.nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=work.SIZE, patch_size=work.PATCH, num_classes=0,
                             dynamic_img_size=True)


s, d, m = work.SIMCLR, work.DINO, work.MAE
if told.method == "mae":
    transform = view(work.SIZE, m["area"], False)
    model = methods.MAE(vit(), decoder_embed_dim=m["width"], decoder_depth=m["depth"], decoder_num_heads=m["heads"],
                        mask_ratio=m["hidden"])
    marks.embedding = model.encoder, lambda images: model.encoder.vit.forward_features(images)[:, 1:].mean(1)
elif told.method == "simclr":
    transform = T.MultiViewTransform([view(work.SIZE, s["area"], True)] * 2)
    model = methods.SimCLR(vit(), projector_dims=(s["hidden"], s["out"]), temperature=s["temperature"])
else:
    transform = T.MultiViewTransform([view(work.SIZE, d["area"], True)] * 2 +
                                     [view(d["small"], d["small_area"], True)] * d["smalls"])
    model = methods.DINO(vit(), projector_hidden_dim=d["hidden"], projector_bottleneck_dim=d["bottleneck"],
                         n_prototypes=d["prototypes"], ema_decay_start=d["momentum"])


class Training(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: dict | list, index: int) -> torch.Tensor:
        if told.method == "mae":
            return self.model(batch["image"]).loss
        views = [one["image"] for one in (batch if isinstance(batch, list) else batch["views"])]
        return self.model(*views).loss if told.method == "simclr" else self.model(views[:2], views[2:]).loss

    def on_train_batch_end(self, *_: object) -> None:
        if told.method == "dino":  # its callback TeacherStudentCallback does this for its own module class
            for pair in (self.model.backbone, self.model.projector):
                pair.update_teacher()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=work.LR, weight_decay=work.DECAY)


dataset = spt.data.FromTorchDataset(ImageFolder(str(told.data)), names=["image", "label"], transform=transform)
loader = torch.utils.data.DataLoader(dataset, batch_size=work.BATCH, shuffle=True, drop_last=True, num_workers=work.WORKERS,
                                     persistent_workers=True)
trainer = lightning.Trainer(max_steps=told.steps, accelerator="cpu", logger=False, enable_checkpointing=False,
                            enable_progress_bar=False, gradient_clip_val=d["clip"] if told.method == "dino" else None,
                            default_root_dir=told.out)
trainer.fit(Training(), loader)
