"""Graphs from files: every format, what is wrong with them, and what the data settles."""

from __future__ import annotations

import csv
import json
import os
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from meristem.errors import DataError
from meristem.modalities.base import Sample
from meristem.modalities.graph import Graph
from meristem.modalities.graph.molecules import scaffold_split
from meristem.modalities.graph.options import GraphOptions
from meristem.platform.data.check import check
from meristem.platform.data.guess import guess_modality
from meristem.platform.data.manifest import Manifest
from meristem.platform.data.source import Data, open_data


def graph(**options: Any) -> Graph:
    return Graph(GraphOptions(**options))


def opened(path: Path, tmp_path: Path, **options: Any) -> Data:
    return open_data(path, graph(**options), cache=tmp_path / "cache", quiet=True)


def pairs_of(sample: Sample) -> set[tuple[int, int]]:
    return set(zip(*sample.tables["pairs"].tolist(), strict=True))


def both(*edges: tuple[int, int]) -> set[tuple[int, int]]:
    return {pair for a, b in edges for pair in ((a, b), (b, a))}


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


# ---- collections of the TU sets

DGCNN = "3\n3 1\n5 1 1\n2 2 0 2\n5 1 1\n2 -1\n2 1 1\n7 1 0\n1 1\n5 0\n"  # a path, an edge, a node of its own


def test_a_collection_of_dgcnn_with_its_folds(tmp_path: Path) -> None:
    file = write(tmp_path / "TOY" / "TOY.txt", DGCNN)
    write(tmp_path / "TOY" / "10fold_idx" / "test_idx-1.txt", "0\n2\n")
    write(tmp_path / "TOY" / "10fold_idx" / "test_idx-2.txt", "1\n")
    write(tmp_path / "TOY" / "10fold_idx" / "train_idx-1.txt", "1\n")
    data = opened(tmp_path / "TOY", tmp_path)
    assert [row.fold for row in data.manifest.rows] == [0, 1, 0]
    assert data.manifest.class_names == ("-1", "1")
    assert data.modality.options.tags == ("2", "5", "7") and data.modality.channels == 3
    first = data.modality.read(data.manifest.rows[0].paths)
    assert pairs_of(first) == both((0, 1), (1, 2))
    assert first.array is not None and first.array.tolist() == [[0, 1, 0], [1, 0, 1], [0, 0, 0]]
    alone = data.modality.read([Path(f"{file}#graph/2")])
    assert alone.tables["pairs"].shape == (2, 0) and alone.notes["isolated nodes"] == 1


@pytest.mark.parametrize(("text", "reason"), [
    ("2\n2 0\n0 1 1\n0 1 0\n", "truncated"),
    ("1\n2 0\n0 2 1\n0 1 0\n", "unreadable"),  # says two neighbours, names one
    ("1\n2 0\n0 1 x\n0 1 0\n", "unreadable"),
    ("1\n2 0\n0 1 5\n0 1 0\n", "dangling"),
    ("1\n0 0\n", "empty"),
    ("1\n2 0\n0 1 1 0.5\n0 1 0 nan\n", "nan"),
    ("1\n2 0\n0 1 1 0.5\n0 1 0\n", "shape"),
])
def test_what_is_wrong_with_a_collection(tmp_path: Path, text: str, reason: str) -> None:
    report = check(write(tmp_path / "x.txt", text), graph())
    assert report.refused == {reason: 1} and not report.ok


def tudataset(folder: Path, **files: str) -> Path:
    for part, text in files.items():
        write(folder / f"DS_{part}.txt", text)
    return folder


def test_the_layout_of_tudataset(tmp_path: Path) -> None:
    folder = tudataset(tmp_path / "DS", A="1, 2\n2, 1\n4, 3\n3, 4\n3, 5\n5, 3\n", graph_indicator="1\n1\n2\n2\n2\n",
                       graph_labels="-1\n1\n", node_labels="4\n0\n0\n4\n4\n", node_attributes="1, 2\n3, 4\n5, 6\n7, 8\n9, 10\n",
                       edge_labels="3\n3\n3\n3\n8\n8\n", edge_attributes="0.5\n0.5\n1\n1\n2\n2\n")
    data = opened(folder, tmp_path)
    assert len(data.rows()) == 2 and data.manifest.class_names == ("-1", "1")
    assert (data.modality.options.features, data.modality.channels, data.modality.edge_kinds) == ("all", 4, 2)
    second = data.modality.read(data.manifest.rows[1].paths)
    assert second.array is not None
    assert second.array.tolist() == [[5, 7, 9], [6, 8, 10], [1, 0, 0], [0, 1, 1]]
    assert second.tables["pairs"].tolist() == [[0, 0, 1, 2], [1, 2, 0, 0]]
    assert second.tables["kind"].tolist() == [0, 1, 0, 1] and second.tables["value"].ravel().tolist() == [1, 2, 1, 2]


def test_an_edge_between_graphs_of_a_tudataset_is_refused(tmp_path: Path) -> None:
    folder = tudataset(tmp_path / "DS", A="1, 3\n", graph_indicator="1\n1\n2\n")
    assert check(folder, graph()).refused == {"dangling": 1}


@pytest.mark.data
@pytest.mark.parametrize(("name", "graphs", "nodes", "edges", "features", "channels"), [  # as PyTorch Geometric counts them
    ("MUTAG", 188, 3371, 7442, "tags", 7), ("PROTEINS", 1113, 43471, 162088, "tags", 3),
    ("NCI1", 4110, 122747, 265506, "tags", 37), ("IMDBBINARY", 1000, 19773, 193062, "degree", 136)])
def test_the_tu_sets(data_root: Path, name: str, graphs: int, nodes: int, edges: int, features: str, channels: int) -> None:
    manifest = Manifest.discover(data_root / "tu-graphs" / name, graph())
    modality = graph().fitted([p for row in manifest.rows for p in row.paths])
    assert (len(manifest), modality.options.features, modality.channels) == (graphs, features, channels)
    samples = [modality.read(row.paths) for row in manifest.rows]
    assert sum(s.header.shape[1] for s in samples) == nodes
    assert sum(s.tables["pairs"].shape[1] for s in samples) == edges
    assert all(s.array is not None and (s.array.sum(0) == 1).all() for s in samples)
    assert set(Counter(row.fold for row in manifest.rows)) - {-1} == set(range(10))


# ---- Planetoid

def planetoid(folder: Path, **other: Any) -> Path:
    """Seven known nodes, test nodes 8, 7 and 10; 9 is left out. A path 0 … 10 but for 9, with loops and repeats."""
    rng = np.random.default_rng(0)
    words = rng.integers(0, 2, (10, 4)).astype(np.float32)
    words[:, 0] = 1
    classes = np.eye(3, dtype=np.int32)[rng.integers(0, 3, 10)]
    links = {i: [i + 1, i, i + 1] if i not in (8, 9, 10) else [] for i in range(11)}
    parts = {"x": csr_matrix(words[:2]), "y": classes[:2], "allx": csr_matrix(words[:7]), "ally": classes[:7],
             "tx": csr_matrix(words[7:]), "ty": classes[7:], "graph": links, **other}
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        (folder / f"ind.toy.{name}").write_bytes(pickle.dumps(part, protocol=2))
    (folder / "ind.toy.test.index").write_text("8\n7\n10\n")
    np.savez(folder / "truth.npz", words=words, classes=classes.argmax(1))
    return folder / "ind.toy.graph"


def test_planetoid_with_a_gap_in_its_test_index(tmp_path: Path) -> None:
    file = planetoid(tmp_path)
    sample = graph().read([file])
    truth = np.load(tmp_path / "truth.npz")
    order = [*range(7), 8, 7, 10]  # where the stored rows belong
    assert sample.array is not None and sample.array.shape == (4, 11)
    np.testing.assert_allclose(sample.array[:, order].T, truth["words"] / truth["words"].sum(1, keepdims=True), rtol=1e-6)
    assert not sample.array[:, 9].any()
    assert sample.fields["mask"][order].tolist() == truth["classes"].tolist() and sample.fields["mask"][9] == -1
    assert sample.fields["split"].tolist() == [0, 0, 1, 1, 1, 1, 1, 2, 2, -1, 2]
    assert pairs_of(sample) == both(*((i, i + 1) for i in range(8)))
    assert (sample.notes["self-loops"], sample.notes["repeated edges"], sample.notes["isolated nodes"]) == (8, 8, 2)


class Malicious:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, ("touch harmed",)


class Builtin:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return eval, ("open('harmed', 'w')",)


@pytest.mark.parametrize("part", ["x", "graph", "ty"])
@pytest.mark.parametrize("load", [Malicious(), {0: [Builtin()]}, np.array([Malicious()], dtype=object)])
def test_a_pickle_that_would_run_a_program_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str,
                                                      load: Any) -> None:
    file = planetoid(tmp_path, **{part: load})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as error:
        graph().read([file])
    assert error.value.reason == "unsafe" and not (tmp_path / "harmed").exists()


def test_broken_planetoid_files_are_named(tmp_path: Path) -> None:
    file = planetoid(tmp_path)
    (tmp_path / "ind.toy.tx").write_bytes((tmp_path / "ind.toy.tx").read_bytes()[:40])
    with pytest.raises(DataError, match="part tx is no readable pickle"):
        graph().read([file])
    (tmp_path / "ind.toy.tx").unlink()
    with pytest.raises(DataError, match="parts tx are not beside"):
        graph().read([file])
    matrix = csr_matrix(np.eye(7, 4, dtype=np.float32))
    matrix.indices[:] = 10**6  # beyond the columns
    file = planetoid(tmp_path, allx=matrix)
    with pytest.raises(DataError) as error:
        graph().read([file])
    assert error.value.reason == "unreadable"


def test_a_changed_part_makes_a_new_sample(tmp_path: Path) -> None:
    """The cache goes by the content of all eight files."""
    file = planetoid(tmp_path / "data")
    before = opened(file, tmp_path)
    classes = np.eye(3, dtype=np.int32)[[2] * 7]
    planetoid(tmp_path / "data", ally=classes)
    after = opened(file, tmp_path)
    assert after.cache.field(0, "mask")[:7].tolist() == [2] * 7
    assert before.cache.content(0) != after.cache.content(0)


@pytest.mark.data
@pytest.mark.parametrize(("name", "nodes", "features", "edges", "train", "unlabelled"), [  # as PyTorch Geometric counts them
    ("cora", 2708, 1433, 10556, 140, 0), ("citeseer", 3327, 3703, 9104, 120, 15)])
def test_cora_and_citeseer(data_root: Path, name: str, nodes: int, features: int, edges: int, train: int,
                           unlabelled: int) -> None:
    sample = graph().read([data_root / "planetoid-cora-citeseer" / f"ind.{name}.graph"])
    assert sample.array is not None and sample.array.shape == (features, nodes)
    assert sample.tables["pairs"].shape == (2, edges)
    assert np.unique(sample.fields["split"], return_counts=True)[1].tolist()[1:] == [train, 500, 1000]
    assert (sample.fields["mask"] == -1).sum() == unlabelled
    first = sample.fields["mask"][sample.fields["split"] == 0]
    assert set(np.bincount(first)) == {20}  # 20 per class
    total = sample.array.sum(0)
    np.testing.assert_allclose(total[total > 0], 1, rtol=1e-5)


# ---- molecules

def test_molecules_of_a_table(tmp_path: Path) -> None:
    pytest.importorskip("rdkit")
    lines = ["name,smiles,p_np,Class", "a,c1ccccc1C,1,1", "b,CCO,0,0", "c,not a molecule,0,1", 'd,"C#N",0,', "e,c1ccccc1O,1,0"]
    file = write(tmp_path / "m.csv", "\n".join(lines))
    data = opened(file, tmp_path)
    assert [p.reason for p in data.cache.quarantine] == ["smiles"]
    assert [row.labels.get("class") for row in data.manifest.rows] == [1, 0, 1, None, 0]
    toluene = data.modality.read(data.manifest.rows[0].paths)
    assert toluene.array is not None and toluene.array.shape == (171, 7)
    assert toluene.array[5].tolist() == [1] * 7  # carbon
    assert toluene.array[-2:].sum(1).tolist() == [6, 6]  # aromatic, in a ring
    assert (toluene.array.sum(0) == 7 + toluene.array[-2:].sum(0)).all()
    kinds = data.modality.options.kinds
    assert Counter(kinds[k] for k in toluene.tables["kind"]) == {"aromatic": 12, "single": 2}
    assert [kinds[k] for k in data.modality.read(data.manifest.rows[3].paths).tables["kind"]] == ["triple"] * 2
    assert guess_modality(file) == "graph"
    rows = data.manifest.rows
    assert rows[0].subject == rows[4].subject != rows[1].subject == rows[3].subject  # benzene; no ring


def test_scaffolds_are_split_as_by_hu_et_al() -> None:
    """Against a direct transcription of the published rule, on random groups."""
    rng = np.random.default_rng(0)
    for size in (10, 57, 300):
        names = [f"s{i}" for i in rng.zipf(1.4, size) % 40]
        groups: dict[str, list[int]] = {}
        for i, name in enumerate(names):
            groups.setdefault(name, []).append(i)
        train: list[int] = []
        val: list[int] = []
        test: list[int] = []
        for group in sorted(groups.values(), key=lambda g: (len(g), g[0]), reverse=True):
            if len(train) + len(group) > 0.8 * size:
                if len(train) + len(val) + len(group) > 0.9 * size:
                    test += group
                else:
                    val += group
            else:
                train += group
        found = scaffold_split(names)
        assert [[i for i, s in enumerate(found) if s == split] for split in ("train", "val", "test")] == \
            [sorted(train), sorted(val), sorted(test)]


def test_what_is_wrong_with_molecules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "m.csv", "smiles,Class\nCCO,1\n")
    with pytest.raises(DataError, match="no column 'toxic'"):
        graph(label="toxic").read([file])
    monkeypatch.setitem(__import__("sys").modules, "rdkit", None)
    fresh = write(tmp_path / "n.csv", "smiles,Class\nCCO,1\n")
    with pytest.raises(DataError, match=r"(?s)need RDKit.*meristem\[molecules\]"):
        graph().read([fresh])


@pytest.mark.data
@pytest.mark.parametrize(("name", "usable", "split"),
                         [("BBBP.csv", 2039, [1631, 204, 204]), ("bace.csv", 1513, [1210, 151, 152])])
def test_moleculenet(data_root: Path, name: str, usable: int, split: list[int]) -> None:
    """The sizes of the split that the scaffold splitter of Hu et al. gives."""
    pytest.importorskip("rdkit")
    manifest = Manifest.discover(data_root / "moleculenet" / name, graph())
    assert [len(manifest.select(s)) for s in ("train", "val", "test")] == split and sum(split) == usable
    subjects = [{row.subject for row in manifest.select(s)} for s in ("train", "val", "test")]
    assert not (subjects[0] & subjects[1] | subjects[0] & subjects[2] | subjects[1] & subjects[2])
    assert manifest.class_names == ("0", "1")


# ---- tables of edges

def test_a_list_of_edges_alone(tmp_path: Path) -> None:
    file = write(tmp_path / "e.csv", "source,target,weight\nb,a,0.5\na,c,2\nc,c,1\n")
    sample = graph().read([file])
    assert graph().called([file]) == ("a", "b", "c") and pairs_of(sample) == both((0, 1), (0, 2))
    assert sample.tables["value"].ravel().tolist() == [0.5, 2, 0.5, 2]
    assert sample.notes["self-loops"] == 1
    plain = graph(features="constant").read([write(tmp_path / "e.txt", "0 1\n1 0\n1 2\n0 1\n")])
    assert pairs_of(plain) == both((0, 1), (1, 2)) and plain.notes["repeated edges"] == 1
    assert plain.array is not None and plain.array.tolist() == [[1, 1, 1]]


def test_a_list_of_edges_with_a_table_of_nodes(tmp_path: Path) -> None:
    file = write(tmp_path / "g" / "e.tsv", "source\ttarget\ttype\nx\ty\tcites\ny\tz\tknows\n")
    write(tmp_path / "g" / "nodes.csv", "id,age,class,split\nz,3,b,test\ny,2,,val\nx,1,a,train\nlone,4,b,\n")
    data = opened(tmp_path / "g", tmp_path)
    assert len(data.rows()) == 1 and (data.modality.channels, data.modality.edge_kinds) == (1, 2)
    sample = data.modality.read([file])
    assert sample.array is not None and sample.array.tolist() == [[3, 2, 1, 4]]
    assert sample.fields["mask"].tolist() == [1, -1, 0, 1] and sample.fields["split"].tolist() == [2, 1, 0, -1]
    assert pairs_of(sample) == both((2, 1), (1, 0)) and sample.notes["isolated nodes"] == 1
    assert sample.tables["kind"].tolist() == [1, 1, 0, 0]  # z-y knows, y-z knows, y-x cites, x-y cites


@pytest.mark.parametrize(("edges", "nodes", "reason"), [
    ("source,target\na,b\n", "id,v\na,1\n", "dangling"), ("source,target\na,b\n", "id,v\na,1\nb,\n", "nan"),
    ("source,target\na,b\n", "id,v\na,1\na,2\n", "duplicate"), ("source,target\na,b\n", "id,v\na,1\nb,red\n", "format"),
    ("source,target,weight\na,b,\n", None, "nan"), ("source,target,weight\na,b\n", None, "truncated")])
def test_what_is_wrong_with_lists_of_edges(tmp_path: Path, edges: str, nodes: str | None, reason: str) -> None:
    file = write(tmp_path / "e.csv", edges)
    if nodes:
        write(tmp_path / "nodes.csv", nodes)
    with pytest.raises(DataError) as error:
        graph().read([file])
    assert error.value.reason == reason and error.value.remedy


@pytest.mark.parametrize("form", ["json", "graphml"])
def test_graphs_of_networkx(tmp_path: Path, form: str) -> None:
    import networkx

    made = networkx.Graph()
    made.add_node("n1", size=1.5)
    made.add_node("n0", size=2.5)
    made.add_node("n2", size=0.5)
    made.add_edge("n1", "n2", weight=3.0)
    made.add_edge("n0", "n1", weight=1.0)
    file = tmp_path / f"g.{form}"
    if form == "json":
        file.write_text(json.dumps(networkx.node_link_data(made, edges="links")))
        write(tmp_path / "sidecar.json", '{"RepetitionTime": 2}')
    else:
        networkx.write_graphml(made, file)
    data = opened(tmp_path, tmp_path / "c")
    sample = data.modality.read(data.manifest.rows[0].paths)
    assert len(data.manifest) == 1 and sample.array is not None and sample.array.tolist() == [[1.5, 2.5, 0.5]]
    assert pairs_of(sample) == both((0, 2), (0, 1))


# ---- connectomes

def connectome(n: int = 6, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(n, 20))
    return np.corrcoef(x)


def save(path: Path, array: np.ndarray, header: bool = False, names: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, array)
        return path
    delimiter = "," if path.suffix == ".csv" else " "
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        if header:
            writer.writerow([*([""] if names else []), *(f"r{i}" for i in range(len(array)))])
        for i, row in enumerate(array):
            writer.writerow([*([f"r{i}"] if names else []), *(f"{v:.6f}" for v in row)])
    return path


@pytest.mark.parametrize(("name", "header", "names"), [("a.csv", False, False), ("a.csv", True, False), ("a.csv", True, True),
                                                       ("a.txt", False, False), ("a.npy", False, False)])
def test_a_correlation_matrix(tmp_path: Path, name: str, header: bool, names: bool) -> None:
    array = connectome()
    file = save(tmp_path / name, array, header, names)
    sample = graph().read([file])
    assert sample.array is not None
    np.testing.assert_allclose(sample.array, array, atol=1e-6)  # connectivity profiles
    a, b = sample.tables["pairs"]
    assert len(a) == 30 and not (a == b).any()
    np.testing.assert_allclose(sample.tables["value"][:, 0], array[a, b], atol=1e-6)
    assert (sample.tables["kind"] == (array[a, b] > 0)).all()  # negative, positive
    assert graph().called([file]) == (tuple(f"r{i}" for i in range(6)) if header else ())


def test_density_and_threshold(tmp_path: Path) -> None:
    array = connectome(12)
    file = save(tmp_path / "a.csv", array)
    strength = np.abs(array[np.triu_indices(12, 1)])
    for options, least in (({"threshold": 0.2}, 0.2), ({"density": 0.25}, np.sort(strength)[-round(0.25 * 66)])):
        sample = graph(**options).read([file])
        expected = {(i, j) for i in range(12) for j in range(12) if i != j and abs(array[i, j]) >= least - 1e-6}
        assert pairs_of(sample) == expected and 0 < len(expected) < 132
    with pytest.raises(ValueError, match="set one of them"):
        graph(threshold=0.1, density=0.1)


def test_a_matrix_of_counts_as_a_triangle(tmp_path: Path) -> None:
    counts = np.triu(np.random.default_rng(0).poisson(1.0, (8, 8)), 1).astype(float)
    sample = graph(features="strength").read([save(tmp_path / "a.csv", counts)])
    whole = counts + counts.T
    assert pairs_of(sample) == set(zip(*map(np.ndarray.tolist, np.nonzero(whole)), strict=True))
    assert sample.array is not None and sample.array.tolist() == [whole.sum(0).tolist()]
    assert not sample.tables["kind"].any()


def test_connectomes_of_subjects(tmp_path: Path) -> None:
    for i in range(3):
        save(tmp_path / "data" / f"sub-{i:02d}" / "conn" / f"sub-{i:02d}_desc-corr.csv", connectome(seed=i))
    write(tmp_path / "data" / "participants.tsv", "participant_id\tage\nsub-00\t3\n")
    data = opened(tmp_path / "data", tmp_path, features="identity")
    assert len(data.rows()) == 3 and len({row.subject for row in data.rows()}) == 3
    assert data.modality.channels == 6 and data.modality.options.kinds == ("negative", "positive")
    assert guess_modality(tmp_path / "data") == "graph"


def bad(change: str) -> np.ndarray:
    array = connectome()
    if change == "shape":
        return array[:, :5]
    if change == "nan":
        array[1, 2] = array[2, 1] = np.nan
    if change == "asymmetric":
        array[1, 2] += 0.1
    return np.zeros_like(array) if change == "empty" else array


@pytest.mark.parametrize("change", ["shape", "nan", "asymmetric", "empty"])
@pytest.mark.parametrize("name", ["a.csv", "a.npy"])
def test_what_is_wrong_with_matrices(tmp_path: Path, change: str, name: str) -> None:
    with pytest.raises(DataError) as error:
        graph().read([save(tmp_path / name, bad(change))])
    assert error.value.reason == change and error.value.remedy


def test_a_diagonal_of_a_fisher_transform(tmp_path: Path) -> None:
    array = connectome()
    with np.errstate(divide="ignore"):
        fisher = np.arctanh(np.clip(array, -1, 1))
    np.fill_diagonal(fisher, np.inf)
    sample = graph().read([save(tmp_path / "a.npy", fisher)])
    assert sample.array is not None and not np.diag(sample.array).any()
    assert sample.notes["diagonal not finite"] == 6


# ---- what the data settles

def test_unlike_graphs_of_a_folder_are_refused_by_name(tmp_path: Path) -> None:
    save(tmp_path / "d" / "a.csv", connectome(6))
    save(tmp_path / "d" / "b.csv", connectome(5))
    report = check(tmp_path / "d", graph())
    assert report.refused == {"channels": 1}


def test_options_of_a_checkpoint_hold(tmp_path: Path) -> None:
    first = opened(write(tmp_path / "a.txt", DGCNN), tmp_path).modality
    again = Graph(GraphOptions.model_validate(first.options.model_dump(mode="json")))
    assert again.fitted([tmp_path / "nothing"]) is again
    other = write(tmp_path / "b.txt", DGCNN.replace("7 1 0", "9 1 0"))
    rows = Manifest.discover(other, again).rows
    with pytest.raises(DataError, match="tag '9' was not among"):
        again.read(rows[1].paths)
    sample = again.read(rows[0].paths)
    assert sample.array is not None and sample.array.shape == (3, 3)


def test_degrees_above_the_largest_share_a_channel(tmp_path: Path) -> None:
    star = "1\n5 0\n0 4 1 2 3 4\n" + "0 1 0\n" * 4
    file = write(tmp_path / "s.txt", star)
    for most, channels in ((400, 5), (2, 3)):
        modality = graph(max_degree=most).fitted([Path(f"{file}#graph/0")])
        sample = modality.read([Path(f"{file}#graph/0")])
        assert modality.channels == channels and sample.array is not None
        assert sample.array.argmax(0).tolist() == [channels - 1, 1, 1, 1, 1]


@pytest.mark.parametrize(("name", "text"), [("a.txt", "Dear reader,\nthis is prose of many words\n"), ("a.txt", ""),
                                            ("a.csv", "1,2,3,4\n1,2\n"), ("a.npy", "no array")])
def test_files_of_no_graph(tmp_path: Path, name: str, text: str) -> None:
    with pytest.raises(DataError) as error:
        graph().read([write(tmp_path / name, text)])
    assert error.value.remedy


def test_data_check_tells_what_was_found(tmp_path: Path) -> None:
    report = check(write(tmp_path / "a.txt", DGCNN), graph())
    measures = {m.name: m.quantiles for m in report.measures}
    assert report.usable == 3 and measures["nodes"][-1] == 3 and measures["edges"][0] == 0
    assert measures["largest degree"][-1] == 2 and "intensity 50 %" not in measures


@pytest.mark.parametrize("label", ["README.txt", "train_idx-1.txt"])
def test_texts_beside_graphs_are_no_data(tmp_path: Path, label: str) -> None:
    write(tmp_path / "d" / "a.txt", DGCNN)
    write(tmp_path / "d" / label, "1\n2\n")
    assert len(Manifest.discover(tmp_path / "d", graph())) == 3
