"""Point-MAE's pretraining as its paper and released code go about it, in plain PyTorch.

    python pointmae.py FOLDER STEPS

A cloud is an array file, read whole when it is drawn, of which 1,024 random points stay, centred and scaled to the unit ball;
batches are scaled and shifted at random. Farthest-point sampling is the loop over centres in torch that is common where the
CUDA extension is not; neighbours are the smallest of all distances. Every group goes through the small PointNet, batch
normalised, and only then are six tenths of the groups hidden; visible ones are encoded, mask tokens follow them in the decoder,
positions are added before every block; the loss is the Chamfer distance of hidden groups by all pairs of distances (Pang et al.
2022). The sizes are those of `points/mae`. One loading process, which stays.
"""

from __future__ import annotations

import marks

if __name__ == "__main__":
    marks.watch()

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

POINTS, GROUPS, SIZE, HIDDEN, BATCH = 1024, 64, 32, 0.6, 32
WIDTH, DEPTH, HEADS, DECODER_DEPTH, DECODER_HEADS = 192, 6, 3, 4, 6
POINTNET = (64, 128, 256)


class Clouds(Dataset[Tensor]):
    """(POINTS, 3) of each cloud."""

    def __init__(self, folder: Path) -> None:
        self.files = sorted(folder.rglob("*.npy"))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> Tensor:
        cloud = np.load(self.files[i]).astype(np.float32)[:, :3]
        cloud = cloud[np.random.permutation(len(cloud))[:POINTS]]
        cloud = cloud - cloud.mean(0)
        return torch.from_numpy(cloud / np.sqrt((cloud**2).sum(1)).max())


def farthest(xyz: Tensor, count: int) -> Tensor:
    """(B, count): the points that each lie farthest from all before."""
    batch, n, _ = xyz.shape
    chosen = torch.zeros(batch, count, dtype=torch.long, device=xyz.device)
    distance = torch.full((batch, n), 1e10, device=xyz.device)
    last = torch.randint(0, n, (batch,), device=xyz.device)
    rows = torch.arange(batch, device=xyz.device)
    for i in range(count):
        chosen[:, i] = last
        distance = torch.minimum(distance, ((xyz - xyz[rows, last][:, None]) ** 2).sum(-1))
        last = distance.max(-1).indices
    return chosen


class PointNet(nn.Module):
    """Groups (B·G, SIZE, 3) to vectors (B·G, WIDTH)."""

    def __init__(self) -> None:
        super().__init__()
        a, b, c = POINTNET
        self.first = nn.Sequential(nn.Conv1d(3, a, 1), nn.BatchNorm1d(a), nn.ReLU(inplace=True), nn.Conv1d(a, b, 1))
        self.second = nn.Sequential(nn.Conv1d(2 * b, c, 1), nn.BatchNorm1d(c), nn.ReLU(inplace=True), nn.Conv1d(c, WIDTH, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.transpose(1, 2))
        whole = x.max(-1, keepdim=True).values
        x = self.second(torch.cat([whole.expand_as(x), x], 1))
        return x.max(-1).values


class Block(nn.Module):
    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.perceptron = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.first(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weight = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
        x = x + self.out((weight @ v).transpose(1, 2).flatten(2))
        passed: Tensor = x + self.perceptron(self.second(x))
        return passed


def place() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 128), nn.GELU(), nn.Linear(128, WIDTH))


class PointMAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place, self.decoder_place = PointNet(), place(), place()
        self.blocks, self.norm = nn.ModuleList(Block(HEADS) for _ in range(DEPTH)), nn.LayerNorm(WIDTH)
        self.decoder, self.decoder_norm = nn.ModuleList(Block(DECODER_HEADS) for _ in range(DECODER_DEPTH)), nn.LayerNorm(WIDTH)
        self.enter = nn.Linear(WIDTH, WIDTH)
        self.mask_token = nn.Parameter(torch.randn(WIDTH) * 0.02)
        self.head = nn.Linear(WIDTH, 3 * SIZE)

    def groups(self, xyz: Tensor) -> tuple[Tensor, Tensor]:
        """Groups about their centres (B, G, SIZE, 3), and the centres (B, G, 3)."""
        rows = torch.arange(len(xyz), device=xyz.device)[:, None]
        centre = xyz[rows, farthest(xyz, GROUPS)]
        near = torch.cdist(centre, xyz).topk(SIZE, largest=False).indices
        return xyz[rows[..., None], near] - centre[:, :, None], centre

    def forward(self, xyz: Tensor) -> Tensor:
        batch = len(xyz)
        group, centre = self.groups(xyz)
        hidden = torch.rand(batch, GROUPS, device=xyz.device).argsort(1) < int(HIDDEN * GROUPS)
        tokens = self.embed(group.flatten(0, 1)).unflatten(0, (batch, GROUPS))
        x, at = tokens[~hidden].unflatten(0, (batch, -1)), self.place(centre[~hidden].unflatten(0, (batch, -1)))
        for block in self.blocks:
            x = block(x + at)
        x = self.enter(self.norm(x))
        seen, missing = (self.decoder_place(centre[chosen].unflatten(0, (batch, -1))) for chosen in (~hidden, hidden))
        x, at = torch.cat([x, self.mask_token.expand_as(missing)], 1), torch.cat([seen, missing], 1)
        for block in self.decoder:
            x = block(x + at)
        made = self.head(self.decoder_norm(x)[:, -missing.shape[1]:]).flatten(0, 1).unflatten(-1, (SIZE, 3))
        distance = ((made[:, :, None] - group[hidden][:, None]) ** 2).sum(-1)
        return distance.min(1).values.mean() + distance.min(2).values.mean()


def forever(loader: DataLoader[Tensor]) -> Iterator[Tensor]:
    while True:
        yield from loader


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("steps", type=int)
    given = parser.parse_args()
    loader = DataLoader(Clouds(given.folder), BATCH, shuffle=True, num_workers=1, persistent_workers=True, drop_last=True)
    net = PointMAE()
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05)
    for _, cloud in zip(range(given.steps), forever(loader), strict=False):
        scale, shift = torch.empty(BATCH, 1, 3).uniform_(2 / 3, 3 / 2), torch.empty(BATCH, 1, 3).uniform_(-0.2, 0.2)
        loss = net(cloud * scale + shift)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        if not loss.isfinite():
            raise ArithmeticError("the loss is not finite")


if __name__ == "__main__":
    main()
