"""Rows of several lengths, packed, padded or each alone: one result, one gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from meristem.modalities.base import Axis
from meristem.modalities.stream import Edges
from meristem.platform.encoders import packing
from meristem.platform.encoders.packing import Packing
from meristem.platform.encoders.transformer import Blocks

AXES = tuple(Axis(name, "m", 0.1, 2.0) for name in "xyz")
rows = st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=1, max_size=5).map(torch.tensor)


def blocks(drop_path: float = 0.0) -> Blocks:
    torch.manual_seed(0)
    made = Blocks(24, 2, 2, AXES, drop_path)
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return made


def made(valid: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens and places; what padding holds is not to be read."""
    g = torch.Generator().manual_seed(seed)
    x, position = torch.randn(*valid.shape, 24, generator=g), torch.randn(*valid.shape, 3, generator=g)
    return x.masked_fill(~valid[..., None], torch.nan), position.masked_fill(~valid[..., None], torch.nan)


def passed(net: Blocks, valid: Tensor, prefix: int, share: float, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Tokens after both blocks, after the first, and gradients of weights and inputs. share: of padding that makes it pack."""
    x, position = made(valid)
    front = torch.ones(len(x), prefix, 24)
    x.requires_grad_()
    with monkeypatch.context() as patch:
        patch.setattr(packing, "PAYS", share)
        y, layers, _ = net(torch.cat([front, x], 1), position, prefix, valid, frozenset({"layers"}))
    assert layers is not None
    y.square().sum().backward()
    assert x.grad is not None
    grads = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    net.zero_grad()
    return [y.detach(), layers[0].detach(), x.grad, *grads]


@settings(max_examples=25, deadline=None)
@given(valid=rows, prefix=st.sampled_from([0, 1]))
def test_packed_rows_are_padded_rows_and_each_is_itself_alone(valid: Tensor, prefix: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        padded, packed = (passed(blocks(), valid, prefix, share, patch) for share in (2.0, 0.0))
        for a, b in zip(padded, packed, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)
        lived = torch.nn.functional.pad(valid, (prefix, 0), value=True)
        assert not packed[0][~lived].any() and not padded[0][~lived].any()
        x, position = made(valid)
        for i, live in enumerate(valid):
            if live.any() or prefix:
                row = torch.cat([torch.ones(1, prefix, 24), x[i:i + 1, live]], 1)
                alone = blocks()(row, position[i:i + 1, live], prefix)[0]
                torch.testing.assert_close(packed[0][i:i + 1, lived[i]], alone, rtol=1e-4, atol=2e-5)


@settings(max_examples=25, deadline=None)
@given(valid=rows, prefix=st.sampled_from([0, 1]))
def test_edges_weigh_in_packed_rows_as_in_padded_ones(valid: Tensor, prefix: int) -> None:
    row, target, source = (valid[:, :, None] & valid[:, None]).nonzero(as_tuple=True)
    some = (target + 2 * source) % 3 == 0
    index = torch.stack([row * 7 + source, row * 7 + target])[:, some]
    edges = Edges(index, torch.zeros(index.shape[1], dtype=torch.long), None, len(valid), 7)
    found = []
    with pytest.MonkeyPatch.context() as patch:
        for share in (2.0, 0.0):
            patch.setattr(packing, "PAYS", share)
            net, (x, position) = blocks(), made(valid)
            net.bias = torch.nn.Parameter(torch.tensor([[0.0, 0.3], [2.0, -1.0]]))
            x = torch.cat([torch.ones(len(x), prefix, 24), x], 1).requires_grad_()
            y, _, _ = net(x, position, prefix, valid, edges=edges)
            y.square().sum().backward()
            assert x.grad is not None and net.bias.grad is not None
            found.append([y.detach(), x.grad, net.bias.grad])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=5e-5)


def test_stochastic_depth_drops_whole_rows_and_the_same_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    valid = torch.arange(6) < torch.tensor([6, 1, 3, 2])[:, None]
    found = []
    for share in (2.0, 0.0):
        net = blocks(0.5)
        torch.manual_seed(4)
        found.append(passed(net, valid, 0, share, monkeypatch))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)
    whole = passed(blocks(0.5).eval(), valid, 0, 0.0, monkeypatch)
    assert not torch.allclose(whole[0], found[1][0], atol=1e-2)


def test_it_packs_where_it_pays_and_no_table_of_pairs_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(Packing, "attend", lambda self, q, k, v, bias: (asked.append(self.lengths), v)[1])
    valid = torch.arange(8) < torch.tensor([8, 4])[:, None]
    x, position = (made(valid)[0].nan_to_num(), made(valid)[1])
    net = blocks()
    net(x, position, valid=torch.ones_like(valid))
    net(x, position, valid=torch.arange(8) < torch.tensor([8, 7])[:, None])  # 1/16 of it is padding
    net(x, position, valid=valid, order=torch.arange(8).expand(2, -1))
    net(x, position, valid=valid, attend=0.5)
    net(x, position, valid=valid, want=frozenset({"attention"}))
    assert not asked
    net(x, position, valid=valid)
    assert asked == [(8, 4)] * 2


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_a_gpus_kernels_give_the_attention_of_each_row(kind: torch.dtype) -> None:
    valid = (torch.arange(100) < torch.tensor([100, 3, 0, 57])[:, None]).cuda()
    made = Packing.of(valid, tuple(valid.sum(1).tolist()))
    assert made is not None
    q, k, v = (torch.randn(1, 4, len(made.at), 32, device="cuda", dtype=kind, requires_grad=True) for _ in range(3))
    seen = made.attend(q, k, v)
    filled = [n for n in made.lengths if n]
    each = torch.cat([torch.nn.functional.scaled_dot_product_attention(*row)
                      for row in zip(*(x.split(filled, 2) for x in (q, k, v)), strict=True)], 2)
    torch.testing.assert_close(seen, each, rtol=2e-2, atol=2e-2 if kind == torch.bfloat16 else 1e-4)
    for a, b in zip(torch.autograd.grad(seen.square().sum(), (q, k, v)), torch.autograd.grad(each.square().sum(), (q, k, v)),
                    strict=True):
        torch.testing.assert_close(a, b, rtol=5e-2, atol=5e-2 if kind == torch.bfloat16 else 1e-3)
