"""Two steps of several recipes on made batches, shared by however many processes there are: losses, gradients and weights.

    torchrun --nproc-per-node=2 tests/processes.py OUT
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric

from meristem.modalities.rng import Rng
from meristem.platform import norms
from meristem.platform import recipe as recipes
from meristem.platform.assembly import Assembly
from meristem.platform.objectives import Items
from meristem.platform.recipe import Recipe
from meristem.platform.step import Batch
from meristem.platform.training import sharding
from meristem.platform.training.loop import launch, reduce

STEPS, SAMPLES = 2, 4

SMALL = "encoder.transformer={width: 48, depth: 2, heads: 4}"
GRAPH = "encoder.message_passing={width: 64, depth: 2, dropout: 0.0}"
LOOK, LOOKS = "views.v.size=[32,32]", ["views.g.size=[32,32]", "views.l.size=[16,16]"]
LINE = "objectives.contrast.contrastive"
MIXED = [f"{LINE}.queue=12", f"{LINE}.transform={{mix: {{hardest: 6, pairs: 4, with_query: 2}}}}"]  # the queue overflows
CASES: dict[str, list[str]] = {
    "volume/mae+simclr": [SMALL, "views.x={count: 2, size: [16,16,16]}"],
    "image/dino": [SMALL, *LOOKS],
    "image/swav": [SMALL, *LOOKS],
    "image/dcl": [SMALL, LOOK, f"{LINE}.loss={{decoupled: {{sigma: 0.5}}}}"],
    "image/groco": [SMALL, LOOK],
    "image/mochi": [SMALL, LOOK, *MIXED],
    "image/pixpro": [SMALL, LOOK],
    "image/slotcon": [SMALL, LOOK],  # slots that nothing fills: ranks hold unequal numbers of them
    "skeleton/halp": [SMALL, "objectives.halp.contrastive.queue=8",
                      "objectives.halp.contrastive.transform={hallucinate: {prototypes: 3, count: 4, least: 0.2}}"],
    "video/rspnet": [SMALL],
    "points/mae": [SMALL],
    "graph/grace": [GRAPH, "objectives.nodes.contrastive.sample=100"],
    "graph/paretognn": [GRAPH, "train.combine=sum"],  # decorrelation, infomax, links, a batch norm over nodes
}
SHARDED = ("volume/mae+simclr", "image/dino", "image/mochi", "points/mae")


def batch(recipe: Recipe, step: int) -> Batch:
    """The global batch of a step; of sets, each has a size of its own."""
    cursor, views = torch.arange(SAMPLES) + step * SAMPLES, {}
    for name, options in recipe.views.items():
        size: tuple[int, ...] = tuple(options.size)  # type: ignore[attr-defined]
        item, look = torch.arange(SAMPLES).repeat_interleave(options.count), torch.arange(options.count).repeat(SAMPLES)
        number = (item + step * SAMPLES) * 8 + look
        view = recipe.modality.example(size, Rng.of(0, number, name))
        if view.index is not None:
            live = torch.arange(view.index.shape[1]) < view.index.shape[1] - number[:, None] % 3 * 5
            view.index, view.weight = view.index.masked_fill(~live, -1), live[:, None].float()
        drawn = {"speed": number % 2, "turn": number % 4}
        view.params |= {label: x for label, x in drawn.items() if getattr(options, label, None)}
        views[name] = replace(view, name=name, item=item, look=look)
    return Batch(Items(cursor, cursor, {"class": cursor % 2}), views)


def work(name: str, fsdp: bool) -> dict[str, Any]:
    """What comes of steps of plain gradient descent, which makes no whole step of what rounding leaves near 0."""
    recipe = recipes.load(name, [*CASES[name], f"train.fsdp={str(fsdp).lower()}"])
    fabric: Fabric = launch(recipe.train, "cpu")
    torch.manual_seed(0)
    raw = Assembly(recipe)
    if fabric.world_size > 1:
        norms.synchronised(raw, fabric.device)
    module: Any = fabric.setup_module(raw)
    losses, gradients = [], {}
    for step in range(STEPS):
        mine = batch(recipe, step).split(fabric.world_size)[fabric.global_rank]
        shares, named = reduce(fabric, module(mine, step / STEPS))
        fabric.backward(torch.stack(shares).sum())
        losses.append({line: float(value) for line, value in named.items()})
        gradients = {n: p.grad.detach().clone() for n, p in raw.named_parameters() if p.grad is not None}
        with torch.no_grad():
            for p in raw.parameters():
                if p.grad is not None:
                    p.sub_(p.grad, alpha=0.01)
                    p.grad = None
        raw.after(step / STEPS)
    return {"losses": losses, "gradients": sharding.whole(gradients, True), "weights": sharding.whole(raw.state_dict(), True)}


def main(out: Path) -> None:
    torch.set_num_threads(1)
    found = {(name, fsdp): work(name, fsdp) for fsdp in (False, True) for name in (SHARDED if fsdp else CASES)}
    if torch.distributed.get_rank() == 0:
        torch.save(found, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
