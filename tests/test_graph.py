"""Looks at graphs: encodings against libraries and closed forms, windows, dropped nodes, edges and features, writing."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from meristem.errors import DataError
from meristem.modalities.base import Draw, Header, Links, Look, View
from meristem.modalities.graph import Graph, encodings
from meristem.modalities.graph.drawing import walked
from meristem.modalities.graph.options import GraphOptions, GraphViewOptions
from meristem.modalities.graph.raw import Raw, both_ways
from meristem.modalities.rng import Rng
from meristem.platform.data.loader import whole
from meristem.platform.data.source import Data, open_data


def random_pairs(n: int, edges: int, seed: int = 0) -> np.ndarray:
    """(2, E) undirected, sorted; few nodes may be isolated."""
    rng = np.random.default_rng(seed)
    return both_ways(Raw(n, rng.integers(0, n, (2, edges))))[0]


def dense(pairs: np.ndarray, n: int) -> np.ndarray:
    out = np.zeros((n, n))
    out[pairs[0], pairs[1]] = 1
    return out


def of_torch_geometric(transform: str, pairs: np.ndarray, n: int, **options: Any) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch_geometric import transforms
        from torch_geometric.data import Data as Torch

        made = Torch(edge_index=torch.from_numpy(pairs).long(), num_nodes=n)
        out: np.ndarray = getattr(transforms, transform)(attr_name="pe", **options)(made).pe.numpy()
        return out


def path_graph(n: int) -> np.ndarray:
    a = np.arange(n - 1)
    return both_ways(Raw(n, np.stack([a, a + 1])))[0]


# ---- edges

@given(st.integers(1, 12), st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11)), max_size=30))
@settings(max_examples=60, deadline=None)
def test_edges_are_the_symmetric_closure_without_loops(n: int, listed: list[tuple[int, int]]) -> None:
    listed = [(a % n, b % n) for a, b in listed]
    pairs, kind, weight, counts = both_ways(Raw(n, np.array(listed, np.int64).reshape(-1, 2).T))
    expected = sorted({p for a, b in listed if a != b for p in ((a, b), (b, a))})
    assert list(zip(*pairs.tolist(), strict=True)) == expected and weight is None and not kind.any()
    assert counts["self-loops"] == sum(a == b for a, b in listed)
    assert counts["isolated nodes"] == n - len({a for a, _ in expected})


@pytest.mark.parametrize("pair", [(0, 3), (-1, 0)])
def test_dangling_edges_are_refused(pair: tuple[int, int]) -> None:
    with pytest.raises(DataError, match=f"joins {pair[0]} and {pair[1]} of nodes 0 to 2"):
        both_ways(Raw(3, np.array([[0, pair[0]], [1, pair[1]]])))


# ---- encodings

@pytest.mark.parametrize(("n", "edges", "steps"), [(12, 15, 7), (30, 20, 4), (1, 0, 3), (1200, 2500, 5)])
def test_walks_are_diagonals_of_powers(n: int, edges: int, steps: int) -> None:
    pairs = random_pairs(n, edges)
    found = encodings.walk(pairs, n, steps)
    adjacency = dense(pairs, n)
    step = adjacency / np.maximum(adjacency.sum(1, keepdims=True), 1)
    power, expected = np.eye(n), []
    for _ in range(steps):
        power = power @ step
        expected.append(np.diag(power))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    if edges:
        np.testing.assert_allclose(found.T, of_torch_geometric("AddRandomWalkPE", pairs, n, walk_length=steps), atol=1e-6)


@pytest.mark.parametrize(("n", "k"), [(20, 4), (1300, 3)])
def test_eigenvectors_of_a_connected_graph_are_those_of_torch_geometric(n: int, k: int) -> None:
    extra = random_pairs(n, n // 2)
    pairs = both_ways(Raw(n, np.concatenate([path_graph(n), extra], 1)))[0]
    vector, value = encodings.laplacian(pairs, n, k).reshape(2, k, n)
    expected = of_torch_geometric("AddLaplacianEigenvectorPE", pairs, n, k=k).T
    overlap = np.abs((vector * expected).sum(1))
    np.testing.assert_allclose(overlap, 1, atol=1e-4)
    laplacian = np.eye(n) - np.diag(dense(pairs, n).sum(1) ** -0.5) @ dense(pairs, n) @ np.diag(dense(pairs, n).sum(1) ** -0.5)
    np.testing.assert_allclose(vector @ laplacian, value * vector, atol=1e-4)
    assert (np.diff(value[:, 0]) >= 0).all() and (vector[np.arange(k), np.abs(vector).argmax(1)] > 0).all()


def test_eigenvectors_are_of_each_component_and_padded() -> None:
    one, two = path_graph(5), path_graph(2) + 5
    both = encodings.laplacian(np.concatenate([one, two], 1), 8, 6).reshape(2, 6, 8)  # node 7 is isolated
    alone = encodings.laplacian(one, 5, 6).reshape(2, 6, 5)
    np.testing.assert_allclose(both[:, :, :5], alone, atol=1e-6)
    np.testing.assert_allclose(both[1, 0, 5:7], [2, 2], atol=1e-6)  # of one edge: 1 − (−1)
    assert not both[:, 1:, 5:7].any() and not both[:, :, 7].any() and not both[:, 4:, :5].any()


def test_a_sign_that_is_flipped_changes_nothing() -> None:
    torch.manual_seed(0)
    places = Graph(GraphOptions(walk=2, laplacian=3)).tokenizer().places(16)
    assert places is not None
    structure = torch.randn(2, 9, 8)
    flipped = structure.clone()
    flipped[0, :, 3] *= -1
    flipped[1, :, [2, 4]] *= -1
    torch.testing.assert_close(places(flipped), places(structure))
    flipped[..., 6] *= -1  # an eigenvalue
    assert not torch.allclose(places(flipped), places(structure))


# ---- looks

def header(n: int, edges: int, seed: int = 0, kinds: int = 1) -> Header:
    pairs = random_pairs(n, edges, seed)
    code = pairs.min(0) + pairs.max(0)
    return Header((3, n), ((1.0,),), (), tables={"pairs": pairs, "kind": (code % kinds).astype(np.int16)})


def look(cursor: int = 0, number: int = 0) -> Look:
    return Look(0, cursor, number, "x")


def options(size: int, **more: Any) -> GraphViewOptions:
    return GraphViewOptions(size=(size,), **more)


GRAPH = Graph(GraphOptions(channels=3, edge_kinds=1, features="given"))


def test_a_plain_look_is_the_graph() -> None:
    h = header(20, 30)
    draw = GRAPH.draw(options(20, drop_edges=0.5, window="walk").plain(), h, look())
    links = GRAPH.edges(h, draw)
    assert draw == Draw((0,), (20,), (20,)) and links is not None and (links.pairs == h.tables["pairs"]).all()
    with pytest.raises(DataError, match=r"(?s)20 nodes, a view at most 19.*window: walk"):
        GRAPH.draw(options(19, window="walk").plain(), h, look())


def test_walks_show_a_connected_part_of_the_size_asked() -> None:
    pairs = path_graph(400)
    h = replace(header(400, 10), tables={"pairs": pairs, "kind": np.zeros(pairs.shape[1], np.int16)})
    seen = set()
    for cursor in range(10):
        draw = GRAPH.draw(options(30, window="walk"), h, look(cursor))
        assert draw.shape == (30,) and list(draw.index) == list(range(draw.index[0], draw.index[0] + 30))  # a piece of the path
        assert draw == GRAPH.draw(options(30, window="walk"), h, look(cursor))
        links = GRAPH.edges(h, draw)
        assert links is not None and links.pairs.shape == (2, 58)
        seen.add(draw.index[0])
    assert len(seen) > 5


def test_walks_go_on_elsewhere_where_a_component_ends() -> None:
    triangles = np.concatenate([np.array([[0, 1, 2], [1, 2, 0]]) + 3 * i for i in range(20)], 1)
    pairs = both_ways(Raw(70, triangles))[0]  # and ten isolated nodes
    for size in (1, 7, 69):
        found = walked(pairs, 70, size, 0.2, Rng.of(0, 3))
        assert len(set(found.tolist())) == size and (np.diff(found) > 0).all()
    assert all(k in walked(pairs, 70, size, 0.2, Rng.of(0, 3), about=k) for k in range(70))
    assert walked(np.zeros((2, 0), np.int32), 5, 4, 0.2, Rng.of(0, 0)).shape == (4,)


def test_induced_edges_are_those_between_nodes_shown() -> None:
    h = header(40, 120, kinds=3)
    draw = GRAPH.draw(options(40, drop_nodes=0.4), h, look())
    assert draw.shape == (24,) and len(draw.index) == 24
    links = GRAPH.edges(h, draw)
    assert links is not None
    place = {node: i for i, node in enumerate(draw.index)}
    expected = [(place[a], place[b], k) for a, b, k in zip(*h.tables["pairs"].tolist(), h.tables["kind"].tolist(), strict=True)
                if a in place and b in place]
    assert list(zip(*links.pairs.tolist(), links.kind.tolist(), strict=True)) == expected


def undirected(links: Links | None) -> set[tuple[int, int]]:
    assert links is not None
    pairs = set(zip(*links.pairs.tolist(), strict=True))
    assert pairs == {(b, a) for a, b in pairs}
    return pairs


def test_dropped_edges_go_in_both_directions_and_are_drawn_anew() -> None:
    h = header(100, 1500)
    whole_graph, kept = undirected(GRAPH.edges(h, Draw((0,), (100,), (100,)))), []
    for number in range(3):
        draw = GRAPH.draw(options(100, drop_edges=0.3), h, look(number=number))
        kept.append(undirected(GRAPH.edges(h, draw)))
        assert kept[-1] < whole_graph and abs(len(kept[-1]) / len(whole_graph) - 0.7) < 0.05
    assert kept[0] != kept[1] != kept[2]
    # the fate of an edge is its own: the same with some of the nodes gone
    draw = GRAPH.draw(options(100, drop_edges=0.3), h, look())
    some = replace(draw, index=tuple(range(50)), shape=(50,))
    assert undirected(GRAPH.edges(h, some)) == {(a, b) for a, b in kept[0] if a < 50 and b < 50}


@pytest.fixture
def data(tmp_path: Path) -> Data:
    """Five graphs of 4 to 24 nodes with three numbers each."""
    rng, lines = np.random.default_rng(0), ["5"]
    for n in (4, 24, 9, 15, 6):
        pairs = random_pairs(n, 2 * n, seed=n)
        lines.append(f"{n} {n % 2}")
        for i in range(n):
            near = pairs[1][pairs[0] == i].tolist()
            lines.append(" ".join(map(str, [0, len(near), *near, *rng.normal(size=3).round(3)])))
    (tmp_path / "g.txt").write_text("\n".join(lines))
    return open_data(tmp_path / "g.txt", Graph(GraphOptions(features="given", walk=3, laplacian=2)), cache=tmp_path / "c",
                     quiet=True)


def shown(data: Data, rows: list[int], view: GraphViewOptions) -> View:
    """Row i is drawn at cursor i of the batch, so the first row alone is drawn as in any batch that it begins."""
    made = whole(data.cache, [data.manifest.rows[i] for i in rows], data.modality, view)
    return data.modality.augment(made, view)


def edges_of(view: View, row: int) -> set[tuple[int, int]]:
    """In stored numbers."""
    assert view.edges is not None and view.index is not None
    at = view.edges.index[:, view.edges.index[0] // view.edges.size == row] % view.edges.size
    return set(zip(*view.index[row][at].tolist(), strict=True))


@pytest.mark.parametrize("more", [{}, {"drop_nodes": 0.3, "drop_edges": 0.3}, {"drop_features": 0.4, "mask_nodes": 0.3}])
def test_batch_mates_change_nothing(data: Data, more: dict[str, float]) -> None:
    view = options(24, **more)
    alone, among = shown(data, [2], view), shown(data, [2, 1, 0], view)
    n = alone.array.shape[2]
    assert among.array.shape[2] > n
    assert torch.equal(among.array[0, :, :n], alone.array[0]) and not among.array[0, :, n:].any()
    assert among.index is not None and alone.index is not None and among.weight is not None
    assert torch.equal(among.index[0, :n], alone.index[0]) and (among.index[0, n:] == -1).all()
    assert torch.equal(among.weight[0, 0] > 0, among.index[0] >= 0)
    assert edges_of(among, 0) == edges_of(alone, 0)
    stream = data.modality.tokenizer().stream(among)
    assert stream.valid.sum(1).tolist() == [(row >= 0).sum() for row in among.index]


def test_features_of_a_node_can_have_one_size_and_structure_keeps_its_own(data: Data) -> None:
    plain = shown(data, [1, 2], options(24))
    modality = Graph(data.modality.options.model_copy(update={"normalise": "node"}))
    plain.array[0, :3, 5] = 0  # a node without features stays so
    sized = modality.augment(replace(plain, array=plain.array.clone()), options(24)).array
    there = plain.weight[:, 0] > 0  # type: ignore[index]
    there[0, 5] = False
    features, before = sized[:, :3].transpose(1, 2), plain.array[:, :3].transpose(1, 2)
    torch.testing.assert_close(features[there].square().mean(-1), torch.ones(int(there.sum())))
    torch.testing.assert_close(torch.nn.functional.normalize(features, dim=-1), torch.nn.functional.normalize(before, dim=-1))
    assert not features[~there].any() and torch.equal(sized[:, 3:], plain.array[:, 3:])
    alone = Graph(modality.options.model_copy(update={"channels": 1}))
    assert torch.equal(alone.augment(replace(plain), options(24)).array, plain.array)


def test_dropped_nodes_keep_their_numbers_and_features(data: Data) -> None:
    plain, dropped = shown(data, [1], options(24)), shown(data, [1], options(24, drop_nodes=0.25))
    assert dropped.index is not None and dropped.array.shape[2] == 18
    kept = dropped.index[0]
    assert torch.equal(dropped.array[0], plain.array[0][:, kept])
    inside = set(kept.tolist())
    assert edges_of(dropped, 0) == {(a, b) for a, b in edges_of(plain, 0) if a in inside and b in inside}


def zeroed(data: Data, view: GraphViewOptions) -> Tensor:
    """(channels, N) bool: what is 0 of the features, the encodings being untouched."""
    plain, changed = shown(data, [1], options(24)), shown(data, [1], view)
    assert torch.equal(plain.array[:, 3:], changed.array[:, 3:])
    gone = changed.array[0, :3] == 0
    assert torch.equal(changed.array[0, :3][~gone], plain.array[0, :3][~gone])
    return gone


def test_features_and_nodes_are_blanked_whole(data: Data) -> None:
    nodes = zeroed(data, options(24, mask_nodes=0.5))
    assert (nodes.all(0) == nodes.any(0)).all() and 4 <= nodes.all(0).sum() <= 20
    features = zeroed(data, options(24, drop_features=0.7))
    assert (features.all(1) == features.any(1)).all() and features.any()


def test_a_graph_too_large_for_encodings_says_so(data: Data) -> None:
    small = Graph(data.modality.options.model_copy(update={"encode_up_to": 10}))
    with pytest.raises(DataError, match=r"(?s)24 nodes.*encode_up_to"):
        small.read(data.manifest.rows[1].paths)


def test_predictions_come_back_in_the_order_of_the_file_which_alone_holds_the_names(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text("source,target\nb,a\na,c\n")
    modality = Graph(GraphOptions())
    sample = modality.read([tmp_path / "e.csv"])
    written = modality.write(np.array([2, 0, 1]), sample.header, tmp_path / "out.nii.gz")
    assert written.read_text().split() == ["node,class", "0,2", "1,0", "2,1"]
    assert list(modality.called([tmp_path / "e.csv"])) == ["a", "b", "c"]


@pytest.mark.parametrize("encoder", ["transformer", "message_passing"])
def test_the_weights_of_a_connectome_reach_the_encoder(encoder: str, tmp_path: Path) -> None:
    """Two brains with the same edges and other weights are told apart; their strongest edges alone say nothing of scale."""
    import meristem

    def brain(name: str, matrix: np.ndarray) -> None:
        np.savetxt(tmp_path / f"sub-{name}_connectome.csv", matrix, delimiter=",")

    rng = np.random.default_rng(0)
    matrix = rng.uniform(0.1, 1.0, (12, 12))
    matrix = (matrix + matrix.T) * (1 - np.eye(12))
    other = rng.uniform(0.1, 1.0, (12, 12))
    for name, m in (("01", matrix), ("02", 1000 * matrix), ("03", (other + other.T) * (1 - np.eye(12)))):
        brain(name, m)
    settings_ = {"transformer": "encoder.transformer={width: 24, depth: 2, heads: 2, sees: [edges, structure]}",
                 "message_passing": "encoder.message_passing={conv: gin, width: 24, depth: 2, norm: none}"}[encoder]
    recipe = "graph/mae" if encoder == "transformer" else "graph/graphmae"
    meristem.pretrain(recipe, tmp_path, tmp_path / "run", [
        settings_, "summary=mean", "modality.graph.features=identity", "modality.graph.walk=2", "modality.graph.laplacian=0",
        "train.steps=3", "train.batch=3", "train.workers=0", "train.lr=0.01"], cache=tmp_path / "cache", quiet=True)
    z = np.load(meristem.embed(tmp_path / "run", tmp_path, tmp_path / "out", quiet=True))["embedding"]
    same, other = np.abs(z[0] - z[1]).max(), np.abs(z[0] - z[2]).max()
    assert same < 1e-5 < other and other > 10 * same  # the transformer's slope began at 0, three steps ago
