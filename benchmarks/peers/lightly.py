"""lightly, as its examples in plain PyTorch go (MAE, SimCLR, DINO): its transforms, modules and losses in a loop."""

from __future__ import annotations

import marks
from peers import work

marks.watch()
told = work.told()

import copy  # noqa: E402  (the imports below count as the peer's)

import torch  # noqa: E402
from lightly.data import LightlyDataset  # noqa: E402
from lightly.models import utils  # noqa: E402
from lightly.models.modules import MaskedVisionTransformerTIMM  # noqa: E402
from timm.models.vision_transformer import VisionTransformer  # noqa: E402
from torch import nn  # noqa: E402

JITTER = {"cj_prob": work.JITTER["probability"], "cj_strength": 1.0, "cj_bright": work.JITTER["brightness"],
          "cj_contrast": work.JITTER["contrast"], "cj_sat": work.JITTER["saturation"], "cj_hue": work.JITTER["hue"],
          "random_gray_scale": work.GREY, "sigmas": work.SIGMA}


def vit() -> VisionTransformer:
    return VisionTransformer(img_size=work.SIZE, patch_size=work.PATCH, embed_dim=work.WIDTH, depth=work.DEPTH,
                             num_heads=work.HEADS, num_classes=0, dynamic_img_size=True)


class MAE(nn.Module):
    def __init__(self) -> None:
        from lightly.models.modules.masked_vision_transformer_decoder_timm import MaskedVisionTransformerDecoderTIMM
        from lightly.transforms import MAETransform

        super().__init__()
        self.transform = MAETransform(input_size=work.SIZE, min_scale=work.MAE["area"][0])
        self.backbone = MaskedVisionTransformerTIMM(vit=vit())
        width, size = work.MAE["width"], work.PATCH**2 * 3
        self.enter = nn.Linear(work.WIDTH, width)
        self.decoder = MaskedVisionTransformerDecoderTIMM(num_patches=self.backbone.sequence_length - 1, embed_dim=width,
                                                          depth=work.MAE["depth"], num_heads=work.MAE["heads"])
        self.head = nn.Linear(width, size)

    def forward(self, views: list[torch.Tensor]) -> torch.Tensor:
        images, length = views[0], self.backbone.sequence_length
        keep, mask = utils.random_token_mask(size=(len(images), length), mask_ratio=work.MAE["hidden"], device=images.device)
        x = self.enter(self.backbone.encode(images=images, idx_keep=keep))
        tokens = utils.repeat_token(self.decoder.mask_token, (len(images), length))
        tokens = utils.set_at_index(tokens, keep, x.type_as(tokens))
        decoded = self.decoder.decode(self.decoder.add_pos_embed(tokens))
        predicted = self.head(utils.get_at_index(decoded, mask))
        target = utils.get_at_index(utils.patchify(images, work.PATCH), mask - 1)
        target = utils.normalize_mean_var(target, dim=-1)
        return nn.functional.mse_loss(predicted, target)


class SimCLR(nn.Module):
    def __init__(self) -> None:
        from lightly.loss import NTXentLoss
        from lightly.models.modules import SimCLRProjectionHead
        from lightly.transforms import SimCLRTransform

        super().__init__()
        self.transform = SimCLRTransform(input_size=work.SIZE, min_scale=work.SIMCLR["area"][0], gaussian_blur=work.BLUR,
                                         **JITTER)
        self.backbone = vit()
        self.head = SimCLRProjectionHead(work.WIDTH, work.SIMCLR["hidden"], work.SIMCLR["out"])
        self.loss = NTXentLoss(work.SIMCLR["temperature"])

    def forward(self, views: list[torch.Tensor]) -> torch.Tensor:
        a, b = (self.head(self.backbone(x)) for x in views)
        return self.loss(a, b)


class DINO(nn.Module):
    def __init__(self) -> None:
        from lightly.loss import DINOLoss
        from lightly.models.modules import DINOProjectionHead
        from lightly.transforms import DINOTransform

        super().__init__()
        d = work.DINO
        self.transform = DINOTransform(
            global_crop_size=work.SIZE, global_crop_scale=d["area"], local_crop_size=d["small"],
            local_crop_scale=d["small_area"], n_local_views=d["smalls"],
            gaussian_blur=(work.BLUR,) * 3, solarization_prob=0.0, **JITTER)
        self.student, head = vit(), (work.WIDTH, d["hidden"], d["bottleneck"], d["prototypes"])
        self.head = DINOProjectionHead(*head, freeze_last_layer=1)
        self.teacher, self.teacher_head = copy.deepcopy(self.student), DINOProjectionHead(*head)
        for module in (self.teacher, self.teacher_head):
            utils.deactivate_requires_grad(module)
        self.loss = DINOLoss(output_dim=d["prototypes"], warmup_teacher_temp_epochs=5)
        self.epoch = 0

    def forward(self, views: list[torch.Tensor]) -> torch.Tensor:
        utils.update_momentum(self.student, self.teacher, m=work.DINO["momentum"])
        utils.update_momentum(self.head, self.teacher_head, m=work.DINO["momentum"])
        with torch.no_grad():
            teacher = [self.teacher_head(self.teacher(x)) for x in views[:2]]
        student = [self.head(self.student(x)) for x in views]
        return self.loss(teacher, student, epoch=self.epoch)


model = {"mae": MAE, "simclr": SimCLR, "dino": DINO}[told.method]()
if told.method == "mae":
    marks.embedding = model.backbone, lambda images: model.backbone.vit.forward_features(images)[:, 1:].mean(1)
dataset = LightlyDataset(str(told.data), transform=model.transform)
loader = torch.utils.data.DataLoader(dataset, batch_size=work.BATCH, shuffle=True, drop_last=True, num_workers=work.WORKERS,
                                     persistent_workers=True)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=work.LR, weight_decay=work.DECAY)
done = 0
while done < told.steps:
    for views, *_ in loader:
        loss = model(views)
        loss.backward()
        if told.method == "dino":
            model.head.cancel_last_layer_gradients(current_epoch=model.epoch)
            torch.nn.utils.clip_grad_norm_(model.parameters(), work.DINO["clip"])
        optimizer.step()
        optimizer.zero_grad()
        done += 1
        if done == told.steps:
            break
    if told.method == "dino":
        model.epoch += 1
