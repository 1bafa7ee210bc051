"""Masked autoencoding of volumes by MONAI's own parts, put together as its documentation puts them together.

    python monai_mae.py persistent|cache FOLDER CACHE STEPS --batch 32 --size 32

Files are listed as dictionaries; LoadImaged to SpatialPadd are deterministic, so that PersistentDataset keeps their result on
disk and CacheDataset in memory; the random crop and flip follow. MONAI has no loss for its MaskedAutoEncoderViT: the one here
is that of He et al. 2022, the mean square over hidden patches, each normalised to mean 0 and variance 1. MONAI's own attention,
embedding and masking are as they come. One loading process, which stays.
"""

from __future__ import annotations

import marks

if __name__ == "__main__":
    marks.watch()

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from monai.data import CacheDataset, DataLoader, PersistentDataset
from monai.networks.nets import MaskedAutoEncoderViT
from monai.transforms import (
    ClipIntensityPercentilesd,
    Compose,
    EnsureChannelFirstd,
    LoadImaged,
    NormalizeIntensityd,
    Orientationd,
    RandFlipd,
    RandSpatialCropd,
    Spacingd,
    SpatialPadd,
)
from torch import Tensor
from torch.utils.data import Dataset

PATCH, HIDDEN = 8, 0.75
WIDTH, DEPTH, HEADS = 192, 12, 3  # of the encoder: ViT-tiny
DECODER_DEPTH, DECODER_HEADS = 4, 6  # and its width is the encoder's


def network(size: int) -> MaskedAutoEncoderViT:
    return MaskedAutoEncoderViT(1, (size,) * 3, PATCH, WIDTH, 4 * WIDTH, DEPTH, HEADS, HIDDEN, WIDTH, 4 * WIDTH, DECODER_DEPTH,
                                DECODER_HEADS, qkv_bias=True)


def patches(x: Tensor) -> Tensor:
    """(B, 1, *S) to (B, N, PATCH³), in raster order."""
    for axis in range(3):
        x = x.unfold(2 + axis, PATCH, PATCH)
    return x.flatten(5).flatten(1, 4)


def data(kind: str, folder: Path, cache: Path, size: int) -> Dataset[dict[str, Tensor]]:
    files = [{"image": str(file)} for file in sorted((folder / "images").glob("*.nii*"))]
    transform = Compose([
        LoadImaged("image"), EnsureChannelFirstd("image"), Orientationd("image", axcodes="RAS", labels=None),
        Spacingd("image", pixdim=(1.0, 1.0, 1.0), mode="bilinear"), ClipIntensityPercentilesd("image", lower=0.5, upper=99.5),
        NormalizeIntensityd("image"), SpatialPadd("image", (size,) * 3),
        RandSpatialCropd("image", (size,) * 3, random_size=False), RandFlipd("image", prob=0.5, spatial_axis=0)])
    return PersistentDataset(files, transform, cache) if kind == "persistent" else CacheDataset(files, transform, num_workers=1)


def forever(loader: DataLoader) -> Iterator[Tensor]:
    while True:
        for batch in loader:
            yield batch["image"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("persistent", "cache"))
    for name, kind in (("folder", Path), ("cache", Path), ("steps", int)):
        parser.add_argument(name, type=kind)
    for name in ("batch", "size"):
        parser.add_argument(f"--{name}", type=int, default=32)
    given = parser.parse_args()
    loader = DataLoader(data(given.kind, given.folder, given.cache, given.size), batch_size=given.batch, shuffle=True,
                        num_workers=1, persistent_workers=True, drop_last=True)
    net = network(given.size)
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05)
    for _, image in zip(range(given.steps), forever(loader), strict=False):
        predicted, mask = net(image)
        target = patches(image)
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        loss = ((predicted - target).square().mean(-1) * mask).sum() / mask.sum()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        if not loss.isfinite():
            raise ArithmeticError("the loss is not finite")


if __name__ == "__main__":
    main()
