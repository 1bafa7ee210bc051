"""What is done to a net part by part before it is trained: compiled, then recomputed; whoever shards it does so after that."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from meristem.errors import RecipeError
from meristem.platform.assembly import Assembly
from meristem.platform.encoders.base import Parted
from meristem.platform.encoders.maps import MapEncoder
from meristem.platform.encoders.transformer import Blocks


def units(module: nn.Module) -> list[nn.Module]:
    """Every part of every net inside a module, once."""
    found = (unit for net in module.modules() if isinstance(net, Parted) for unit in net.units())
    return list({id(unit): unit for unit in found}.values())


def compiled(assembly: Assembly) -> None:
    """Compile the parts of encoder, teacher and predictors; a net of maps without parts as a whole.

    Blocks are alike, so that one of them is compiled for all; names of weights stay as they are. On a CPU, rows of several
    lengths stay padded: a loop over them would be compiled anew for the lengths of every step. The last block makes all tokens:
    alone among its kind it would be compiled again for every view. Raises RecipeError for nets that would break into pieces.
    """
    if not units(assembly.encoder) and not isinstance(assembly.encoder, MapEncoder):
        raise RecipeError("train.compile compiles an encoder part by part, and this one is made in one piece, which it "
                          "would break up", "Leave compile out.")
    for net in assembly.modules():
        if isinstance(net, Blocks):
            net.packs, net.spares = next(net.parameters()).is_cuda, False
    for unit in units(assembly) if units(assembly.encoder) else [assembly.encoder]:
        unit.forward = torch.compile(unit.forward)


def recomputed(assembly: Assembly) -> None:
    """Keep of each part only what enters it, and compute it again in the backward pass (Chen et al. 2016, Training deep nets
    with sublinear memory cost): to the same bits, random numbers included. Raises RecipeError for encoders without parts."""
    if not units(assembly.encoder):
        raise RecipeError("train.checkpointing recomputes an encoder part by part, and this one is made in one piece",
                          "Choose encoder: transformer, unet, segresnet, swin or timm's vit_*, or leave checkpointing out.")
    for unit in units(assembly):
        unit.forward = partial(checkpoint, unit.forward, use_reentrant=False)


def plain(assembly: Assembly) -> None:
    """Undo both."""
    for module in assembly.modules():
        module.__dict__.pop("forward", None)
        if isinstance(module, Blocks):
            module.packs = module.spares = True
