"""VideoMAE's pretraining as its paper and released code go about it, in plain PyTorch: every tubelet is embedded, then hidden.

    python videomae.py FOLDER STEPS

A clip is decoded by decord when it is drawn; its frames become Pillow images, of which one random area is cut, resized and
perhaps mirrored, frame by frame; a stack of them becomes a float tensor, scaled and normalised. A Conv3d embeds all tubelets, a
mask of whole tubes keeps a tenth, fixed sin-cos positions are added; blocks attend by two matrix products and a softmax. The
decoder has mask tokens behind the visible ones, and the loss is the mean square over hidden tubelets of pixels that are
normalised by tubelet and channel (Tong et al. 2022). The sizes are those of `video/videomae`. One loading process, which stays.
"""

from __future__ import annotations

import marks

if __name__ == "__main__":
    marks.watch()

import argparse
import math
import random
from collections.abc import Iterator
from pathlib import Path

import decord
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

FRAMES, RATE, SIZE, PATCH, BATCH = 16, 8, 128, (2, 16, 16), 8
AREA, ASPECT, HIDDEN = (0.5, 1.0), (3 / 4, 4 / 3), 0.9
WIDTH, DEPTH, HEADS, DECODER = 192, 12, 3, (96, 4, 3)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Clips(Dataset[Tensor]):
    """One random clip of each film: (3, FRAMES, SIZE, SIZE)."""

    def __init__(self, folder: Path) -> None:
        self.files = sorted(str(f) for f in folder.rglob("*") if f.suffix in (".mp4", ".avi", ".mkv", ".webm"))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> Tensor:
        film = decord.VideoReader(self.files[i], num_threads=1)
        step = film.get_avg_fps() / RATE
        first = random.uniform(0, max(len(film) - FRAMES * step, 0))
        places = [int(first + k * step) % len(film) for k in range(FRAMES)]
        pictures = [Image.fromarray(frame) for frame in film.get_batch(places).asnumpy()]
        box, mirrored = area(*pictures[0].size), random.random() < 0.5
        pictures = [picture.crop(box).resize((SIZE, SIZE), Image.Resampling.BILINEAR) for picture in pictures]
        if mirrored:
            pictures = [picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for picture in pictures]
        x = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(3, 0, 1, 2).float() / 255
        return (x - torch.tensor(MEAN)[:, None, None, None]) / torch.tensor(STD)[:, None, None, None]


def area(width: int, height: int) -> tuple[int, int, int, int]:
    """A random area of random proportions, as torchvision's RandomResizedCrop draws it."""
    for _ in range(10):
        size = width * height * random.uniform(*AREA)
        ratio = math.exp(random.uniform(*map(math.log, ASPECT)))
        w, h = round(math.sqrt(size * ratio)), round(math.sqrt(size / ratio))
        if w <= width and h <= height:
            x, y = random.randint(0, width - w), random.randint(0, height - h)
            return x, y, x + w, y + h
    return 0, 0, width, height


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.first(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weight = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1)
        x = x + self.out((weight @ v).transpose(1, 2).flatten(2))
        passed: Tensor = x + self.perceptron(self.second(x))
        return passed


def sincos(count: int, width: int) -> Tensor:
    """(1, count, width) of the places 0 to count − 1 (Vaswani et al. 2017)."""
    angle = torch.arange(count)[:, None] / 10000 ** (torch.arange(0, width, 2) / width)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[None]


class VideoMAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        width, depth, heads = DECODER
        self.lattice = (FRAMES // PATCH[0], SIZE // PATCH[1], SIZE // PATCH[2])
        self.embed = nn.Conv3d(3, WIDTH, PATCH, PATCH)
        self.encoder = nn.Sequential(*(Block(WIDTH, HEADS) for _ in range(DEPTH)), nn.LayerNorm(WIDTH))
        self.enter = nn.Linear(WIDTH, width, bias=False)
        self.mask_token = nn.Parameter(torch.randn(width) * 0.02)
        self.decoder = nn.Sequential(*(Block(width, heads) for _ in range(depth)), nn.LayerNorm(width))
        self.head = nn.Linear(width, 3 * math.prod(PATCH))
        count = math.prod(self.lattice)
        self.register_buffer("places", sincos(count, WIDTH))
        self.register_buffer("decoder_places", sincos(count, width))

    def tubes(self, batch: int) -> Tensor:
        """(B, N) bool: hidden, the same places in every frame."""
        frames, *plane = self.lattice
        count = math.prod(plane)
        hidden = torch.rand(batch, count).argsort(1) < round(HIDDEN * count)
        return hidden.repeat(1, frames)

    def forward(self, clip: Tensor) -> Tensor:
        hidden = self.tubes(len(clip))
        x = self.embed(clip).flatten(2).transpose(1, 2) + self.places
        x = self.enter(self.encoder(x[~hidden].unflatten(0, (len(clip), -1))))
        places = self.decoder_places.expand(len(clip), -1, -1)
        seen, missing = (places[chosen].unflatten(0, (len(clip), -1)) for chosen in (~hidden, hidden))
        x = self.decoder(torch.cat([x + seen, self.mask_token + missing], 1))
        predicted = self.head(x[:, -missing.shape[1]:])
        with torch.no_grad():
            target = clip
            for axis, size in enumerate(PATCH):
                target = target.unfold(2 + axis, size, size)
            target = target.permute(0, 2, 3, 4, 1, 5, 6, 7).flatten(5).flatten(1, 3)  # (B, N, 3, pixels)
            target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True).sqrt() + 1e-6)
            target = target.flatten(2)[hidden].unflatten(0, (len(clip), -1))
        return nn.functional.mse_loss(predicted, target)


def forever(loader: DataLoader[Tensor]) -> Iterator[Tensor]:
    while True:
        yield from loader


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("steps", type=int)
    given = parser.parse_args()
    loader = DataLoader(Clips(given.folder), BATCH, shuffle=True, num_workers=1, persistent_workers=True, drop_last=True)
    net = VideoMAE()
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05)
    for _, clip in zip(range(given.steps), forever(loader), strict=False):
        loss = net(clip)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if not loss.isfinite():
            raise ArithmeticError("the loss is not finite")


if __name__ == "__main__":
    main()
