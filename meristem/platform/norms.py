"""Normalisation by statistics of a batch: those of all processes, and running ones that a broken batch leaves alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from meristem.platform.step import all_ranks

PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class BatchNorm(nn.modules.batchnorm._BatchNorm):
    """Of vectors (M, D) or maps (M, D, *S), over all rows of all ranks, however many each holds; one rank: nn.BatchNorm1d.

    nn.SyncBatchNorm does the same on GPUs only.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"batch norm of an array of {input.ndim} axes; it needs (M, D) or (M, D, *S)")

    def forward(self, input: Tensor) -> Tensor:
        x = input.float()
        axes = [axis for axis in range(x.ndim) if axis != 1]
        count = x.new_tensor([x.numel() // max(x.shape[1], 1)])
        if not self.training or len(counts := all_ranks(count)) == 1:
            return super().forward(input)
        centre = x.sum(axes) / count.clamp_min(1)
        spread = (x - self._along(centre, x)).square().sum(axes)
        total = counts.sum()
        centres, spreads = all_ranks(centre[None]), all_ranks(spread[None])
        mean = (counts[:, None] * centres).sum(0) / total
        summed = (spreads + counts[:, None] * (centres - mean).square()).sum(0)
        with torch.no_grad():
            if self.running_mean is not None and self.running_var is not None:
                assert self.num_batches_tracked is not None and self.momentum is not None
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(summed / (total - 1), self.momentum)
        x = (x - self._along(mean, x)) * self._along((summed / total + self.eps).rsqrt(), x)
        return x * self._along(self.weight, x) + self._along(self.bias, x) if self.affine else x

    @staticmethod
    def _along(value: Tensor, x: Tensor) -> Tensor:
        """(D,) to the shape that broadcasts to x (M, D, *S)."""
        return value.view(-1, *[1] * (x.ndim - 2))


class Statistics:
    """The running statistics of a module's norms, as they were before a step: its forward pass has moved them already when its
    loss turns out not to be finite."""

    def __init__(self, module: nn.Module) -> None:
        self.live = [x for norm in module.modules() if isinstance(norm, nn.modules.batchnorm._NormBase) for x in norm.buffers()]
        self.kept = [x.clone() for x in self.live]

    def keep(self) -> None:
        for kept, live in zip(self.kept, self.live, strict=True):
            kept.copy_(live)

    def restore(self) -> None:
        for kept, live in zip(self.kept, self.live, strict=True):
            live.copy_(kept)


def synchronised(module: nn.Module, device: torch.device) -> nn.Module:
    """The module with batch norms that have the statistics of all processes in the place of those that have their own's."""
    if device.type == "cuda":
        from timm.layers import convert_sync_batchnorm  # knows timm's norms that hold an activation; torch's would drop it

        converted: nn.Module = convert_sync_batchnorm(module)
        return converted
    for owner in list(module.modules()):
        for name, norm in owner.named_children():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm) and type(norm) in PLAIN:
                made = BatchNorm(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
                made.load_state_dict(norm.state_dict())
                for mine, theirs in zip(made.parameters(), norm.parameters(), strict=True):
                    mine.requires_grad_(theirs.requires_grad)
                setattr(owner, name, made.train(norm.training))
    return module
