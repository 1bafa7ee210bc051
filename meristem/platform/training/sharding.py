"""Weights, gradients and optimiser states shared out over processes: fully sharded data parallelism, PyTorch's FSDP2.

Every process holds a slice of each parameter; a part of the net is put together for as long as it is computed, the next part
fetched meanwhile, and gradients are reduced to slices part after part (Zhao et al. 2023, PyTorch FSDP; Rajbhandari et al. 2020,
ZeRO, stage 3). What is outside of parts, embeddings and heads, stays whole from the forward to the backward pass (stage 2).
Checkpoints hold whole tensors, so that a run goes on with any number of processes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

from meristem.platform.training.parts import units


def shard(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Shard a module in place, over all processes."""
    flat = mesh["data_parallel"]
    for unit in (*units(module), module):
        fully_shard(unit, mesh=flat)
    return module


def whole(state: Any, keep: bool) -> Any:
    """A state dict with whole tensors, on the processor, in the place of slices. Every process must call it; those that do not
    `keep` it get empty ones."""
    def joined(x: Any) -> Any:
        if not isinstance(x, DTensor):
            return x
        full = x.full_tensor()
        return full.cpu() if keep else full.new_empty(0)

    return tree_map(joined, state)


def sliced(state: dict[str, Any], parameters: Iterable[nn.Parameter]) -> dict[str, Any]:
    """An optimiser's state dict with this process's slices in the place of whole tensors; parameters: in the optimiser's order.

    The inverse of `whole`.
    """
    def slice_of(x: Any, like: nn.Parameter) -> Any:
        if not (isinstance(x, torch.Tensor) and isinstance(like, DTensor) and x.shape == like.shape):
            return x  # a count of steps
        return distribute_tensor(x.to(like.device), like.device_mesh, like.placements, src_data_rank=None)

    found = dict(enumerate(parameters))
    states = {i: {name: slice_of(x, found[i]) for name, x in of.items()} for i, of in state["state"].items()}
    return {**state, "state": states}
