"""How several losses become one: their sum, or a direction that serves all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

Combination = Literal["sum", "pareto"]


def min_norm(gram: np.ndarray) -> np.ndarray:
    """(n,) convex weights w of the shortest vector Σ w_i g_i, from the inner products (n, n) of the g_i.

    The problem of MGDA (Désidéri 2012; Sener and Koltun 2018, equation 3), which they solve by Frank and Wolfe's steps; exact
    here: x ≥ 0 that minimises |Gx|² + (Σ x − 1)² is a multiple of w (Lawson and Hanson 1974, chapter 23).
    """
    from scipy.optimize import nnls  # a second that runs of one loss need not wait for

    scale = np.abs(gram).max()
    if scale == 0:
        return np.full(len(gram), 1 / len(gram))
    values, vectors = np.linalg.eigh(gram / scale)
    root = np.sqrt(values.clip(min=0))[:, None] * vectors.T
    x = nnls(np.vstack([root, np.ones(len(gram))]), np.append(np.zeros(len(gram)), 1.0))[0]
    return np.asarray(x / x.sum())


def pareto(losses: Sequence[Tensor], shared: Sequence[nn.Parameter]) -> Tensor:
    """One loss whose gradient on the shared parameters lowers all losses, until none can fall without another rising.

    Gradients are normalised before their shortest convex combination is taken, so that no loss wins by its scale (as Ju et al.
    2023, ParetoGNN): Σ w_i s / |g_i| · L_i, s = Σ w_j |g_j|. Its gradient d fulfils d · g_i ≥ |d|² |g_i| / s for all i. Losses
    that do not move the shared parameters enter as they are. Cost: a backward pass of the shared part for each.
    """
    moving: list[Tensor] = []
    gradients: list[Tensor] = []
    rest = [loss for loss in losses if not loss.requires_grad]
    for loss in (loss for loss in losses if loss.requires_grad):
        parts = torch.autograd.grad(loss, shared, retain_graph=True, allow_unused=True)
        gradient = torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten()
                              for g, p in zip(parts, shared, strict=True)])
        moves = bool(gradient.isfinite().all() and gradient.any())  # whoever calls deals with a loss that is not finite
        (moving if moves else rest).append(loss)
        gradients += [gradient] if moves else []
    if moving:
        norms = torch.stack([g.norm() for g in gradients])
        units = torch.stack([g / n for g, n in zip(gradients, norms, strict=True)])
        weight = torch.from_numpy(min_norm((units @ units.T).double().cpu().numpy())).to(norms)
        rest += list((weight * (weight * norms).sum() / norms) * torch.stack(moving))
    return torch.stack(rest).sum()


def combined(how: Combination, losses: Sequence[Tensor], encoder: nn.Module) -> Tensor:
    """One loss of several, weighted already."""
    if how == "sum":
        return torch.stack(list(losses)).sum()
    return pareto(losses, [p for p in encoder.parameters() if p.requires_grad])
