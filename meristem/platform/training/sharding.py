"""Weights, gradients and optimiser states shared out over processes: fully sharded data parallelism, PyTorch's FSDP2.

Every process holds a slice of each parameter; a part of the net is put together for as long as it is computed, the next part
fetched meanwhile, and gradients are reduced to slices part after part (Zhao et al. 2023, PyTorch FSDP; Rajbhandari et al. 2020,
ZeRO, stage 3). What is outside of parts, embeddings and heads, stays whole from the forward to the backward pass (stage 2).
Checkpoints hold whole tensors, so that a run goes on with any number of processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
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


def fill(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load whole tensors into a module that may hold slices of its own."""
    own = module.state_dict()
    module.load_state_dict({name: _slice(x, own[name]) if name in own else x for name, x in weights.items()})


def sliced(state: dict[str, Any], parameters: Iterable[nn.Parameter]) -> dict[str, Any]:
    """An optimiser's state dict with this process's slices in the place of whole tensors; parameters: in the optimiser's order.

    The inverse of `whole`.
    """
    found = dict(enumerate(parameters))
    states = {i: {name: _slice(x, found[i]) for name, x in of.items()} for i, of in state["state"].items()}
    return {**state, "state": states}


def _slice(x: Any, like: Tensor) -> Any:
    """This process's part of a whole tensor, where `like` is such a part of one of its shape; else what was given."""
    if not (isinstance(x, Tensor) and isinstance(like, DTensor) and x.shape == like.shape):
        return x  # a count of steps
    return distribute_tensor(x.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
