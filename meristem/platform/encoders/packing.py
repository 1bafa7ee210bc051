"""Rows of several lengths behind each other, without their padding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

PAYS = 1 / 8  # share of padding from which packing is faster on a CPU: benchmarks/packing.py


@dataclass(frozen=True)
class Packing:
    """The T tokens that are no padding, of B rows of N places, row after row.

    valid: (B, N) bool. at: (T,) number of each token among the B·N places. row: (T,) whose it is. ends: (B + 1,) int32, where
    rows begin and end. lengths: of each row.
    """

    valid: Tensor
    at: Tensor
    row: Tensor
    ends: Tensor
    lengths: tuple[int, ...]

    @staticmethod
    def of(valid: Tensor, lengths: tuple[int, ...]) -> Packing | None:
        """The packing of tokens (B, N) that are `valid`, of rows of these lengths; None where it does not pay."""
        if not 0 < sum(lengths) <= (1 - PAYS) * valid.numel():
            return None
        at = torch.nonzero_static(valid.flatten(), size=sum(lengths))[:, 0]
        return Packing(valid, at, at // valid.shape[1], F.pad(valid.sum(1).cumsum(0), (1, 0)).int(), lengths)

    @property
    def rows(self) -> int:
        return len(self.valid)

    def pack(self, x: Tensor) -> Tensor:
        """(B, N, …) to (1, T, …)."""
        return x.flatten(0, 1)[self.at][None]

    def unpack(self, x: Tensor) -> Tensor:
        """The inverse, 0 where padding is."""
        return x.new_zeros(self.valid.numel(), *x.shape[2:]).index_copy(0, self.at, x[0]).unflatten(0, self.valid.shape)

    def each(self, x: Tensor) -> Tensor:
        """Numbers of rows (B, 1, 1) to those of their tokens, (1, T, 1)."""
        return x[self.row, 0][None]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        """Attention of each row's tokens to each other; q, k, v and the result: (1, H, T, d).

        bias: (B, H, N, N) to add to the logits, −inf for padding. With one, all rows are padded again, since linear layers are
        most of the work. Without, on a GPU one kernel for all rows where it has one, of 16 bits, else padded; on a CPU row by
        row, which is faster than any other way.
        """
        if bias is None and _flashes(q):
            from torch.nn.attention.varlen import varlen_attn

            most, (q, k, v) = self.valid.shape[1], (x[0].transpose(0, 1) for x in (q, k, v))
            seen: Any = varlen_attn(q, k, v, self.ends, self.ends, most, most)
            return seen.transpose(0, 1)[None]
        if bias is not None or q.is_cuda:
            q, k, v = (self.unpack(x.transpose(1, 2)).transpose(1, 2) for x in (q, k, v))
            mask = (self.valid | ~self.valid.any(1, keepdim=True))[:, None, None] if bias is None else bias
            return self.pack(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)).transpose(1, 2)
        filled = [n for n in self.lengths if n]
        rows = zip(*(x.split(filled, 2) for x in (q, k, v)), strict=True)
        return torch.cat([F.scaled_dot_product_attention(*row) for row in rows], 2)


def _flashes(q: Tensor) -> bool:
    """Whether flash attention of rows of several lengths takes such queries, here."""
    return (q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
            and torch.cuda.get_device_capability(q.device) >= (8, 0))
