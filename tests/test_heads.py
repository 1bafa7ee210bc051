"""Heads: shapes, normalisation per look, unit-norm prototypes, statistics over ranks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meristem.platform import norms
from meristem.platform.heads import Mlp, Prototypes
from meristem.platform.norms import BatchNorm

VIEW = torch.tensor([0, 1, 2]).repeat(6)


@pytest.mark.parametrize("norm", ["batch", "layer", "none"])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_perceptron_has_the_layers_and_norms_it_was_told(layers: int, norm: str) -> None:
    head = Mlp(layers=layers, hidden=10, out=7, norm=norm, last_norm=norm != "none").build(5)
    linear = [m for m in head.modules() if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linear] == [(5, 7)] if layers == 1 else (
        [(5, 10), *[(10, 10)] * (layers - 2), (10, 7)])
    assert sum(isinstance(m, BatchNorm | nn.LayerNorm) for m in head.modules()) == (0 if norm == "none" else layers)
    assert head(torch.randn(18, 5), VIEW).shape == (18, 7) and head.width == 7


def test_a_last_batch_norm_without_scale_standardises_the_output() -> None:
    out = Mlp(layers=2, hidden=8, out=4, norm="batch", last_norm=True).build(5)(torch.randn(18, 5) * 3 + 2, VIEW)
    assert torch.allclose(out.mean(0), torch.zeros(4), atol=1e-5)
    assert torch.allclose(out.var(0, correction=0), torch.ones(4), atol=1e-2)


def test_per_view_is_a_pass_for_each_look() -> None:
    head = Mlp(layers=2, hidden=8, out=4, per_view=True, last_norm=True).build(5)
    z = torch.randn(18, 5) + VIEW[:, None]
    out = head(z, VIEW)
    whole = Mlp(layers=2, hidden=8, out=4, last_norm=True).build(5)
    whole.load_state_dict(head.state_dict())
    for look in range(3):
        assert torch.allclose(out[look == VIEW], whole(z[look == VIEW], VIEW[look == VIEW]), atol=1e-5)
    assert not torch.allclose(out, whole(z, VIEW), atol=1e-2)
    assert torch.equal(head.eval()(z, VIEW), head(z, 0 * VIEW))  # running statistics know no look


def test_prototype_scores_are_cosines() -> None:
    head = Prototypes(layers=2, hidden=16, out=6, count=11).build(5)
    z = torch.randn(18, 5)
    bottleneck = head.body(z, VIEW)
    expected = F.cosine_similarity(bottleneck[:, None], head.last.weight[None], dim=-1)
    assert torch.allclose(head(z, VIEW), expected, atol=1e-6) and head.width == 11
    with torch.no_grad():
        head.last.weight.mul_(7)  # only directions count
    assert torch.allclose(head(z, VIEW), expected, atol=1e-6)


def test_the_last_layer_is_torchs_weight_norm_on_unit_vectors() -> None:
    head = Prototypes(layers=1, out=6, count=9, gain=True).build(6)
    reference = nn.utils.parametrizations.weight_norm(nn.Linear(6, 9, bias=False))
    with torch.no_grad():
        head.last.gain.uniform_(0.5, 2)
        reference.parametrizations.weight.original0.copy_(head.last.gain[:, None])
        reference.parametrizations.weight.original1.copy_(head.last.weight)
    z = torch.randn(18, 6)
    assert torch.allclose(head.last(z), reference(F.normalize(z, dim=-1)), atol=1e-6)
    head.last(z).square().sum().backward()
    reference(F.normalize(z, dim=-1)).square().sum().backward()
    assert torch.allclose(head.last.weight.grad, reference.parametrizations.weight.original1.grad, atol=1e-4)


def test_batch_norm_over_ranks_is_batch_norm_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(12, 4) * 5 + 100  # far from 0: the variance must not be a difference of squares
    whole, ours = nn.BatchNorm1d(4), BatchNorm(4)
    expected = whole(x)
    parts = x[:8], x[8:]
    mean = parts[1].mean(0)
    queue = iter([torch.tensor([4.0]), mean[None], (parts[1] - mean).square().sum(0)[None]])

    def gathered(mine: Tensor) -> Tensor:
        return torch.cat([mine, next(queue)])

    monkeypatch.setattr(norms, "all_ranks", gathered)
    assert torch.allclose(ours(parts[0]), expected[:8], atol=1e-5)
    for name, buffer in whole.named_buffers():
        assert torch.allclose(ours.get_buffer(name), buffer, rtol=1e-5)
    ours.eval()
    assert torch.allclose(ours(x), whole.eval()(x), atol=1e-5)  # asks no rank
