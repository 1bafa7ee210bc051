"""Attentive pooling: a learned query that picks what it needs out of all tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEAD = 64  # channels of an attention head, as in the transformers of the field


class AttentivePool(nn.Module):
    """One learned query attends to all normalised tokens (the attentive probe of Chen et al. 2023, CAE).

    forward(tokens (B, N, D), valid (B, N)) -> (B, D). heads: None takes the most of up to D / 64 that divide D.
    """

    def __init__(self, width: int, heads: int | None = None) -> None:
        super().__init__()
        heads = heads or next(h for h in range(max(width // HEAD, 1), 0, -1) if width % h == 0)
        self.query = nn.Parameter(torch.empty(1, 1, width).normal_(std=0.02))
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, tokens: Tensor, valid: Tensor) -> Tensor:
        return attend([self], tokens, valid)[0]


def attend(pools: Sequence[AttentivePool], tokens: Tensor, valid: Tensor) -> Tensor:
    """What each of G pools of one shape takes out of the same tokens: (G, B, D).

    Equals nn.MultiheadAttention. As there is one query, its keys' matrix is applied to the query, qᵀ(W x) = (Wᵀq)ᵀx, and the
    values' matrix to what was pooled; the keys' bias and the norm's shift add the same to every score, which softmax does not
    see. A token thus costs 2·G·heads·D multiplications in place of 2·G·D².
    """
    def stacked(name: str) -> Tensor:
        return torch.stack([pool.get_parameter(name) for pool in pools])

    count, heads, width = len(pools), pools[0].attention.num_heads, tokens.shape[-1]
    x = F.layer_norm(tokens, (width,), eps=pools[0].norm.eps)
    matrices, biases = stacked("attention.in_proj_weight"), stacked("attention.in_proj_bias")
    to_query, to_key, to_value = matrices.unflatten(1, (3, heads, -1)).unbind(1)  # (G, H, d, D)
    query_bias, _, value_bias = biases.unflatten(1, (3, heads, -1)).unbind(1)  # (G, H, d)
    gain, shift = stacked("norm.weight")[:, None], stacked("norm.bias")[:, None]  # (G, 1, D)
    query = torch.einsum("gc,ghdc->ghd", stacked("query")[:, 0, 0], to_query) + query_bias
    key = torch.einsum("ghd,ghdc->ghc", query, to_key) * gain * (width // heads) ** -0.5
    score = (x @ key.flatten(0, 1).T).masked_fill(~valid[..., None], float("-inf"))  # (B, N, GH)
    pooled = score.softmax(1).transpose(1, 2) @ x
    pooled = pooled.unflatten(1, (count, heads)) * gain + shift  # (B, G, H, D)
    values = torch.einsum("bghc,ghdc->gbhd", pooled, to_value) + value_bias[:, None]
    out, bias = stacked("attention.out_proj.weight"), stacked("attention.out_proj.bias")
    return torch.baddbmm(bias[:, None], values.flatten(2), out.transpose(1, 2))
