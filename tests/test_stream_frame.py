"""The encoder waist: frames, lattice streams and the counter-based random numbers."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from meristem.modalities.frame import Frame
from meristem.modalities.rng import Rng
from meristem.modalities.stream import HIDEABLE, Edges, LatticeStream, TokenStream


def frame(batch: int = 2, shape: tuple[int, ...] = (4, 6, 8), seed: int = 0) -> Frame:
    g = torch.Generator().manual_seed(seed)
    d = len(shape)
    affine = torch.eye(d + 1).repeat(batch, 1, 1)
    affine[:, :d, :d] += 0.3 * torch.randn(batch, d, d, generator=g)
    affine[:, :d, d] = 10 * torch.randn(batch, d, generator=g)
    return Frame(affine, shape, 1 + torch.rand(batch, d, generator=g), ("mm",) * d)


def stream(batch: int = 2, patch: tuple[int, ...] = (2, 3, 4), channels: int = 2) -> LatticeStream:
    f = frame(batch)
    array = torch.randn(batch, channels, *f.shape)
    weight = (torch.rand(batch, 1, *f.shape) > 0.5).float().expand_as(array)
    return LatticeStream(array, patch, f, torch.arange(batch), weight)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([(5, 7), (4, 6, 8)]))
def test_source_and_index_are_inverse(seed: int, shape: tuple[int, ...]) -> None:
    f = frame(3, shape, seed)
    index = torch.rand(3, 20, len(shape)) * torch.tensor(shape) - 0.5
    back, inside = f.from_source(f.to_source(index))
    torch.testing.assert_close(back, index, atol=1e-3, rtol=1e-3)
    assert inside.float().mean() > 0.95  # points drawn on the very edge may round outside


def test_points_outside_the_view_are_told() -> None:
    f = Frame(torch.eye(3)[None], (4, 6), torch.ones(1, 2), ("px", "px"))
    _, inside = f.from_source(torch.tensor([[[-0.5, 0.0], [-0.6, 0.0], [3.5, 5.5], [3.0, 5.6]]]))
    assert inside.tolist() == [[True, False, True, False]]


def test_box_holds_every_voxel_corner() -> None:
    f = frame()
    corners = torch.tensor(list(itertools.product(*((-0.5, n - 0.5) for n in f.shape))))
    points = f.to_source(corners[None].expand(2, -1, -1))
    torch.testing.assert_close(f.boxes(), torch.stack([points.amin(1), points.amax(1)], -1))


def test_composed_frame_is_the_composed_map() -> None:
    outer, inner, index = frame(seed=1), frame(seed=2), torch.rand(2, 5, 3)
    composed = outer.compose(inner.affine, (2, 2, 2))
    torch.testing.assert_close(composed.to_source(index), outer.to_source(inner.to_source(index)), atol=1e-4, rtol=1e-4)
    assert composed.shape == (2, 2, 2)
    assert torch.equal(composed.spacing, outer.spacing)


def test_own_coordinates_depend_on_spacing_only() -> None:
    f = frame()
    moved = f.compose(frame(seed=5).affine)
    index = torch.rand(2, 5, 3)
    assert torch.equal(moved.local(index), f.local(index))


def test_tokens_are_the_patches_of_a_double_loop() -> None:
    s = stream()
    patch, cells = s.patch, list(itertools.product(*(range(g) for g in s.lattice or ())))
    for b in range(2):
        for n, cell in enumerate(cells):
            cut = tuple(slice(c * p, (c + 1) * p) for c, p in zip(cell, patch, strict=True))
            assert torch.equal(s.content[b, n], s.array[(b, slice(None), *cut)].flatten())
            centre = torch.tensor([c * p + (p - 1) / 2 for c, p in zip(cell, patch, strict=True)])
            torch.testing.assert_close(s.position[b, n], centre * s.frame.spacing[b])  # type: ignore[index,union-attr]


def test_taking_tokens_is_indexing_all_of_them() -> None:
    s = stream()
    index = torch.stack([torch.randperm(len(s))[:3] for _ in range(2)])
    taken, rows = s.take(index), torch.arange(2)[:, None]
    for name in ("content", "position", "source", "weight", "valid"):
        assert torch.equal(getattr(taken, name), getattr(s, name)[rows, index]), name


def test_a_remainder_belongs_to_no_token() -> None:
    array = torch.arange(35.0).reshape(1, 1, 5, 7)
    s = LatticeStream(array, (2, 3), None, None)
    assert s.lattice == (2, 2)
    assert torch.equal(s.content, LatticeStream(array[..., :4, :6].clone(), (2, 3), None, None).content)


@pytest.mark.parametrize("sees", [frozenset(s) for n in range(4) for s in itertools.combinations(HIDEABLE[:6], n)])
def test_what_is_not_seen_does_not_exist(sees: frozenset[str]) -> None:
    lazy = stream()
    edges = Edges(torch.tensor([[0, 1], [1, 0]]), torch.zeros(2, dtype=torch.int64), None, *lazy.valid.shape)
    eager = TokenStream(lazy.content, lazy.position, lazy.valid, lazy.item, lazy.source, lazy.content,
                        {"channel": lazy.valid.long()}, {"target": lazy.content}, lazy.weight, edges, lazy.lattice)
    for full in (lazy, eager):
        reduced = full.seen(sees)
        for shown in (reduced, reduced.take(torch.zeros(2, 1, dtype=torch.long)), reduced.seen(frozenset(HIDEABLE))):
            for name in HIDEABLE:
                if name not in sees:
                    assert getattr(shown, name) in (None, {}), name
        assert torch.equal(reduced.content, full.content)


def test_a_position_does_not_tell_where_the_view_was_cut() -> None:
    one, other = stream(), stream()
    one.frame, other.frame = frame(seed=1), replace(frame(seed=2), spacing=frame(seed=1).spacing)
    shown = one.seen(frozenset({"position"})).frame, other.seen(frozenset({"position"})).frame
    assert shown[0] is not None and shown[1] is not None
    assert torch.equal(shown[0].affine, shown[1].affine)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**40), st.lists(st.integers(0, 2**50), min_size=1, max_size=6, unique=True))
def test_draws_do_not_depend_on_batch_mates(seed: int, samples: list[int]) -> None:
    together = Rng.of(seed, torch.tensor(samples), "x")
    for draw in (lambda r: r.uniform("u", 3, 2), lambda r: r.normal("n", 5), lambda r: r.permutation("p", 9),
                 lambda r: r.integers("i", 7, 4), lambda r: r.fork("f").uniform("u", 2)):
        whole = draw(together)
        for row, sample in enumerate(samples):
            assert torch.equal(whole[row], draw(Rng.of(seed, sample, "x"))[0])


def test_streams_differ_by_seed_sample_and_purpose() -> None:
    base = Rng.of(0, 0, "x").bits("p", 4)
    for other in (Rng.of(1, 0, "x").bits("p", 4), Rng.of(0, 1, "x").bits("p", 4), Rng.of(0, 0, "y").bits("p", 4),
                  Rng.of(0, 0, "x").bits("q", 4), Rng.of(0, 0, "x").fork("f").bits("p", 4)):
        assert not (base == other).any()


def test_a_longer_draw_begins_like_a_shorter_one() -> None:
    r = Rng.of(3, torch.arange(4), "x")
    assert torch.equal(r.uniform("u", 10)[:, :4], r.uniform("u", 4))


@pytest.mark.parametrize("draw,distribution", [
    (lambda r: r.uniform("u", 50), stats.uniform()), (lambda r: r.normal("n", 50), stats.norm()),
    (lambda r: r.uniform("w", 50, low=-2.0, high=3.0), stats.uniform(-2, 5))])
def test_draws_follow_their_distribution(draw, distribution) -> None:  # type: ignore[no-untyped-def]
    x = draw(Rng.of(11, torch.arange(400), "d")).numpy()
    assert stats.kstest(x.ravel(), distribution.cdf).pvalue > 1e-3
    assert stats.kstest(x[:, 0], distribution.cdf).pvalue > 1e-3  # over samples, the first number of each
    assert abs(np.corrcoef(x[:, 0], x[:, 1])[0, 1]) < 0.15
    assert abs(np.corrcoef(x[:-1, 0], x[1:, 0])[0, 1]) < 0.15


def test_integers_and_permutations_are_uniform() -> None:
    r = Rng.of(5, torch.arange(3000), "d")
    assert stats.chisquare(torch.bincount(r.integers("i", 6).flatten(), minlength=6).numpy()).pvalue > 1e-3
    orders = r.permutation("p", 4)
    assert torch.equal(orders.sort(1).values, torch.arange(4).expand(3000, 4))
    _, seen = torch.unique(orders, dim=0, return_counts=True)
    assert len(seen) == math.factorial(4)
    assert stats.chisquare(seen.numpy()).pvalue > 1e-3


def test_mixing_is_splitmix64() -> None:
    """The reference implementation's outputs for seed 1234567 (Vigna, splitmix64.c)."""
    wanted = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    from meristem.modalities.rng import _GOLDEN, _mix
    state = 1234567 + torch.arange(1, 6) * _GOLDEN
    assert [int(v) % 2**64 for v in _mix(state)] == wanted


def edges_of(rows: int, size: int, seed: int) -> tuple[Edges, list[tuple[int, int, int]]]:
    """Edges of a random batch, and the same as (row, from, to)."""
    table = torch.rand(rows, size, size, generator=torch.Generator().manual_seed(seed)) < 0.4
    table &= ~torch.eye(size, dtype=torch.bool)
    at, a, b = table.nonzero(as_tuple=True)
    return (Edges(torch.stack([at * size + a, at * size + b]), torch.arange(len(at)), at[:, None].float(), rows, size),
            list(zip(at.tolist(), a.tolist(), b.tolist(), strict=True)))


@pytest.mark.parametrize("seed", range(5))
def test_edges_follow_their_rows_and_elements(seed: int) -> None:
    edges, listed = edges_of(3, 5, seed)
    rows = torch.tensor([2, 0])
    chosen = edges.select(rows)
    assert chosen.index.T.tolist() == [[(rows == r).nonzero().item() * 5 + x for x in (a, b)]
                                       for r, a, b in listed if r in rows]
    assert chosen.rows == 2 and chosen.kind.tolist() == [i for i, (r, *_) in enumerate(listed) if r in rows]
    kept = torch.tensor([[4, 1, 0], [2, 3, 0], [1, 3, 4]])
    taken, place = edges.take(kept), [{int(x): i for i, x in enumerate(row)} for row in kept]
    assert taken.index.T.tolist() == [[3 * r + place[r][a], 3 * r + place[r][b]] for r, a, b in listed
                                      if a in place[r] and b in place[r]]
    dense = edges.dense()
    assert {(r, a, b) for r, b, a in dense.nonzero().tolist()} == set(listed)
    assert all(dense[r, b, a] == i + 1 for i, (r, a, b) in enumerate(listed))
