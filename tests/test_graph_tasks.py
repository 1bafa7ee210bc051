"""Tasks on graphs: nodes and pairs of nodes as cases, edges that are held out, windows that cover a graph."""

from __future__ import annotations

import csv
import json
import pickle
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix

import meristem
from meristem import api
from meristem.errors import DataError, RecipeError
from meristem.modalities.graph.holdout import hold_out
from meristem.platform.assembly import Assembly
from meristem.platform.data.loader import loader
from meristem.platform.data.manifest import Manifest, Row
from meristem.platform.data.source import Data, open_data
from meristem.platform.data.splits import divide
from meristem.platform.evaluation.leakage import audit
from meristem.platform.evaluation.results import Results
from meristem.tasks.base import TaskRecipe, objective
from meristem.tasks.embedding import embed, windows
from meristem.tasks.finetune import choose, resolve

NODES, CLASSES, WORDS = 120, 3, 12
TRAIN, TEST = 9, 30
SMALL = ["encoder.message_passing.width=16", "encoder.message_passing.heads=2", "encoder.message_passing.dropout=0.0",
         "train.workers=0"]


def blocks(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(features (N, F), edges (2, E) once each, class (N,)): classes that cluster, and words that tell them, noisily."""
    rng = np.random.default_rng(seed)
    label = np.arange(NODES) % CLASSES
    a, b = np.triu_indices(NODES, 1)
    there = rng.random(len(a)) < np.where(label[a] == label[b], 0.2, 0.01)
    words = (rng.random((NODES, WORDS)) < np.where(np.arange(WORDS) % CLASSES == label[:, None], 0.5, 0.2)).astype(np.float32)
    words[:, 0] = 1
    return words, np.stack([a[there], b[there]]), label


def planetoid(folder: Path, seed: int = 0) -> Path:
    """Its files: the first 9 nodes train, 500 after them (so all others but the last 30) validate, the last 30 test."""
    folder.mkdir(parents=True)
    words, edges, label = blocks(seed)
    x, y, rest = csr_matrix(words), np.eye(CLASSES, dtype=np.int32)[label], NODES - TEST
    lists = {k: [] for k in range(NODES)}
    for a, b in edges.T.tolist():
        lists[a].append(b)
        lists[b].append(a)
    parts = {"x": x[:TRAIN], "y": y[:TRAIN], "allx": x[:rest], "ally": y[:rest], "tx": x[rest:], "ty": y[rest:], "graph": lists}
    for name, part in parts.items():
        (folder / f"ind.made.{name}").write_bytes(pickle.dumps(part, protocol=4))
    (folder / "ind.made.test.index").write_text("".join(f"{k}\n" for k in range(rest, NODES)))
    return folder


@pytest.fixture
def made(tmp_path: Path) -> Path:
    return planetoid(tmp_path / "made")


def recipe(task: str, *assignments: str) -> TaskRecipe:
    return resolve(f"graph/{task}", "graph", [*(a for a in SMALL if task == "node-classification" or "heads" not in a),
                                              *assignments])


def opened(path: Path, of: TaskRecipe, cache: Path) -> Data:
    return open_data(path, of.modality, "auto", cache, quiet=True)


# ---- windows


def test_windows_cover_what_is_asked_once_and_are_no_larger_than_a_view() -> None:
    _, edges, _ = blocks()
    tables = {"pairs": np.concatenate([edges, edges[::-1]], 1)}
    for asked in (np.arange(NODES), np.array([3, 50, 119])):
        for size in (7, 20, NODES):
            found = list(windows(NODES, size, asked, tables))
            assert sorted(k for _, core in found for k in core) == asked.tolist()
            assert all(set(core) <= set(index) and len(index) <= size and list(index) == sorted(set(index))
                       for index, core in found if index)
            assert len(found) <= -(-len(asked) // max(size // 2, 1))
            assert (found[0][0] == ()) == (size == NODES)


def test_a_window_holds_the_whole_neighbourhood_where_it_has_room() -> None:
    """On a path, a window of 12 for nodes 20 to 25 reaches three further to each side."""
    path = np.stack([np.arange(49), np.arange(1, 50)])
    tables = {"pairs": np.concatenate([path, path[::-1]], 1)}
    (index, core), = windows(50, 12, np.arange(20, 26), tables)
    assert index == tuple(range(17, 29))
    assert sorted(core) == list(range(20, 26))


def test_a_training_window_of_a_larger_graph_is_about_a_node_that_teaches(made: Path, tmp_path: Path) -> None:
    settings = recipe("node-classification", "views.x.size=[6]", "train.batch=4", "task.nodes.dropout=0")
    data = opened(made, settings, tmp_path / "cache")
    settings = settings.of(data.modality)
    assembly = settings.assemble(CLASSES)
    rows = settings.task.cases(data, "train")
    learnt = objective(assembly).learn_from(data, rows)
    assert {row.element for row in learnt} == set(range(TRAIN))
    for batch in loader(data.cache, learnt, settings, steps=6, workers=0):
        shown = batch.views["x"].index
        assert shown.shape == (4, 6) and ((shown >= 0) & (shown < TRAIN)).any(1).all()
    whole = recipe("node-classification").of(data.modality).assemble(CLASSES)
    assert [row.element for row in objective(whole).learn_from(data, rows)] == [-1]


def test_windows_reach_isolated_nodes() -> None:
    found = list(windows(10, 4, np.arange(10), {"pairs": np.empty((2, 0), int)}))
    assert sorted(k for _, core in found for k in core) == list(range(10))


def test_nodes_in_windows_that_hold_their_neighbourhood_are_encoded_as_in_the_whole_graph(made: Path, tmp_path: Path) -> None:
    """With one layer of attention, those whose neighbours a window holds come out alike."""
    whole = recipe("node-classification", "encoder.message_passing.depth=1")
    data = opened(made, whole, tmp_path / "cache")
    whole = whole.of(data.modality)
    torch.manual_seed(0)
    assembly = Assembly(whole)
    rows = whole.task.cases(data, "test")
    expected = embed(assembly, data, rows)
    cut = Assembly(whole.model_copy(update={"views": {"x": whole.views["x"].model_copy(update={"size": (110,)})}}))
    cut.load_state_dict(assembly.state_dict())
    found = embed(cut, data, rows)
    tables = data.cache.tables(0)
    kept = {k for index, core in windows(NODES, 110, np.array([r.element for r in rows]), tables) for k in core
            if set(tables["pairs"][1, tables["pairs"][0] == k]) <= set(index)}
    same = np.array([row.element in kept for row in rows])
    assert same.sum() > 5
    np.testing.assert_allclose(found[same], expected[same], atol=1e-5)


# ---- nodes


def test_a_node_is_a_case_of_its_own_in_the_split_the_data_declares(made: Path, tmp_path: Path) -> None:
    task = recipe("node-classification")
    data = opened(made, task, tmp_path / "cache")
    label, (graph,) = blocks()[2], data.rows()
    split = {name: task.task.cases(data, name) for name in ("train", "val", "test")}
    assert {name: [r.element for r in rows] for name, rows in split.items()} == {
        "train": list(range(TRAIN)), "val": list(range(TRAIN, NODES - TEST)), "test": list(range(NODES - TEST, NODES))}
    rows = [row for rows in split.values() for row in rows]
    assert all(row.labels["class"] == label[row.element] and row.index == graph.index for row in rows)
    assert all(row.case == f"{graph.case}#{row.element}" and row.subject == f"{graph.subject}#{row.element}" for row in rows)
    assert [r.element for r in task.task.cases(data, ("train", "val"))] == list(range(NODES - TEST))
    assert task.task.scope(data).scored == ("class 0", "class 1", "class 2")


def test_a_label_budget_counts_nodes_and_takes_as_many_of_each_class(made: Path, tmp_path: Path) -> None:
    task = recipe("node-classification")
    data = opened(made, task, tmp_path / "cache")
    pool = task.task.cases(data, "val")
    small, large = choose(pool, "12", 0, data), choose(pool, "30", 0, data)
    assert {row.element for row in small} < {row.element for row in large}
    assert Counter(row.labels["class"] for row in small) == {0: 4, 1: 4, 2: 4}


def test_without_a_declared_split_nodes_are_drawn_by_class_or_follow_their_graph(tmp_path: Path, made: Path,
                                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    task = recipe("node-classification")
    data = opened(made, task, tmp_path / "cache")
    entry = data.cache.entries[0]
    monkeypatch.delitem(entry.fields, "split")
    split = {name: task.task.cases(data, name) for name in ("train", "val", "test")}
    assert [len(split[name]) for name in ("train", "val", "test")] == [72, 24, 24]
    for rows in split.values():
        assert len(set(Counter(row.labels["class"] for row in rows).values())) == 1
    assert sorted(row.element for rows in split.values() for row in rows) == list(range(NODES))
    assert split == {name: task.task.cases(data, name) for name in split}
    tested = Data(data.manifest.with_splits({0: "test"}), data.cache, data.modality)
    assert [len(task.task.cases(tested, name)) for name in ("train", "val", "test")] == [0, 0, NODES]


def test_the_loss_reads_the_labels_of_the_nodes_it_was_given_and_no_others(made: Path, tmp_path: Path) -> None:
    task = recipe("node-classification", "task.nodes.dropout=0.0")
    data = opened(made, task, tmp_path / "cache")
    task = task.of(data.modality)
    torch.manual_seed(0)
    assembly = task.assemble(CLASSES).eval()
    rows = task.task.cases(data, "train")
    graphs = objective(assembly).learn_from(data, rows)
    assert [row.index for row in graphs] == [0]
    batch = assembly.prepare(next(iter(loader(data.cache, graphs, task, steps=1))))
    assert set(batch.views["x"].fields) == set()
    loss = assembly(batch, 0.0)["task"]
    vectors = torch.from_numpy(embed(assembly, data, rows))
    logits = assembly.objectives["task"].out(vectors)
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor([r.labels["class"] for r in rows]), reduction="sum")
    assert int(loss.count) == TRAIN
    torch.testing.assert_close(loss.total, expected, atol=1e-4, rtol=1e-4)


def test_the_page_of_nodes_compares_arms_and_says_it_is_transductive(made: Path, tmp_path: Path) -> None:
    few = ["train.steps=3", "train.workers=0", "encoder.message_passing.width=16"]
    meristem.pretrain(str(_pretraining(tmp_path)), made, tmp_path / "run", few, cache=tmp_path / "cache", quiet=True)
    page = meristem.evaluate("graph/node-classification", made, tmp_path / "out", ["train.workers=0"],
                             inits=[str(tmp_path / "run")], labels=["6", "all"], seeds=2, protocols=["linear", "knn"],
                             cache=tmp_path / "cache", quiet=True)
    text = page.read_text()
    assert "Transductive by nature" in text and "30 test nodes" in text
    assert not re.search("test subject|labelled subject|over subjects|other patients", text)
    results = Results.load(tmp_path / "out" / "results.json")
    assert {c.arm for c in results.cells} == {"scratch", "pretraining"} and len(results.cells) == 2 * 2 * 2 * 2
    assert all(len(cell.cases) == TEST for cell in results.cells)
    assert {cell.labelled_subjects for cell in results.cells} == {6, TRAIN}
    assert {name: c.cases for name, c in results.dataset.splits.items()} == {"train": 9, "val": 81, "test": 30}
    assert results.leakage["pretraining"].verdict == "transductive"


def test_fine_tuning_on_nodes_beats_chance_and_predicts_every_node(made: Path, tmp_path: Path) -> None:
    steps = [*SMALL, "train.steps=40", "train.ema=0.9", "task.nodes.dropout=0.0"]
    meristem.finetune("graph/node-classification", made, tmp_path / "run", steps, cache=tmp_path / "cache", quiet=True)
    scores = json.loads((tmp_path / "run" / "metrics.json").read_text())["test"]
    assert scores["accuracy"] > 0.6
    api.predict(tmp_path / "run", made, tmp_path / "out", quiet=True)
    with (tmp_path / "out" / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["node"]) for row in rows] == list(range(NODES))
    right = np.mean([row["class"] == f"class {c}" for row, c in zip(rows, blocks()[2], strict=True)])
    assert right > 0.6


def test_a_graph_larger_than_a_view_is_learned_and_tested_by_windows(made: Path, tmp_path: Path) -> None:
    few = [*SMALL, "train.steps=3", "views.x.size=[40]"]
    meristem.finetune("graph/node-classification", made, tmp_path / "run", few, cache=tmp_path / "cache", quiet=True)
    assert len(json.loads((tmp_path / "run" / "cases.json").read_text())) == TEST


def test_classifying_nodes_is_refused_where_there_are_none() -> None:
    with pytest.raises(RecipeError, match="needs graphs"):
        resolve("image/classification", "image", ["task={nodes: {}}"])
    with pytest.raises(RecipeError, match="does not sum to 1"):
        recipe("node-classification", "task.nodes.split=[0.5,0.2,0.2]")


def _pretraining(folder: Path, **graph: object) -> Path:
    file = folder / "pretraining.yaml"
    file.write_text(json.dumps({
        "modality": {"graph": graph}, "views": {"x": {"size": [8192]}},
        "masking": {"x": {"random": {"ratio": 0.5, "corruption": "replace"}}},
        "encoder": {"message_passing": {"conv": "gcn", "width": 16, "depth": 2, "norm": "none"}},
        "objectives": {"nodes": {"masked": {"encode": "x", "predictor": "linear", "target": "content"}}},
        "train": {"steps": 3, "batch": 1}}))
    return file


# ---- links


def _made_pairs() -> np.ndarray:
    _, edges, _ = blocks()
    return np.concatenate([edges, edges[::-1]], 1)


def test_held_edges_are_gone_and_pairs_are_balanced_and_apart() -> None:
    pairs = _made_pairs()
    kept, links = hold_out(pairs, NODES, (0.05, 0.1))
    edges = {tuple(sorted(p)) for p in pairs.T.tolist()}
    asked = {(split, edge): [(a, b) for a, b, s, e in links.T.tolist() if (s, e) == (split, edge)]
             for split in (0, 1, 2) for edge in (0, 1)}
    for split, share in ((1, 0.05), (2, 0.1)):
        assert len(asked[split, 1]) == len(asked[split, 0]) == round(share * len(edges))
        assert set(asked[split, 1]) <= edges and not set(asked[split, 0]) & edges
    every = [pair for some in asked.values() for pair in some]
    assert len(every) == len(set(every)) and all(a < b for a, b in every)
    assert {tuple(sorted(p)) for p in pairs[:, kept].T.tolist()} == set(asked[0, 1])
    assert {(b, a) for a, b in pairs[:, kept].T.tolist()} == {(a, b) for a, b in pairs[:, kept].T.tolist()}
    assert len(asked[0, 0]) == len(asked[0, 1])
    again = hold_out(pairs, NODES, (0.05, 0.1))
    assert (again[0] == kept).all() and (again[1] == links).all()


def test_graphs_too_small_or_dense_to_hold_edges_out_are_refused() -> None:
    path = np.array([[0, 1, 1, 2], [1, 0, 2, 1]])
    with pytest.raises(DataError, match="none can be held out"):
        hold_out(path, 3, (0.05, 0.1))
    a, b = np.nonzero(~np.eye(12, dtype=bool))
    with pytest.raises(DataError, match=r"no \d+ more pairs"):
        hold_out(np.stack([a, b]), 12, (0.1, 0.1))


def test_no_view_and_no_encoding_knows_a_held_edge(made: Path, tmp_path: Path) -> None:
    """The same stored graph comes of a file that never had the held edges."""
    task = recipe("link-prediction", "modality.graph.walk=4", "modality.graph.laplacian=3")
    data = opened(made, task, tmp_path / "cache")
    links = data.cache.tables(0)["links"]
    held = {(a, b) for a, b, split, edge in links.T.tolist() if split > 0 and edge}
    batch = next(iter(loader(data.cache, data.rows(), task.of(data.modality), steps=1, workers=0)))
    seen = {tuple(sorted(pair)) for pair in batch.views["x"].edges.index.T.tolist()}
    assert held and not held & seen
    assert seen == {(a, b) for a, b, split, edge in links.T.tolist() if split == 0 and edge}
    graph = pickle.loads((made / "ind.made.graph").read_bytes())
    without = {a: [b for b in near if tuple(sorted((a, b))) not in held] for a, near in graph.items()}
    (made / "ind.made.graph").write_bytes(pickle.dumps(without, protocol=4))
    bare = recipe("node-classification", "modality.graph.walk=4", "modality.graph.laplacian=3")
    never = opened(made, bare, tmp_path / "cache")
    np.testing.assert_array_equal(never.cache.array(0), data.cache.array(0))
    np.testing.assert_array_equal(never.cache.tables(0)["pairs"], data.cache.tables(0)["pairs"])


def test_pairs_are_embedded_as_products_of_their_nodes(made: Path, tmp_path: Path) -> None:
    task = recipe("link-prediction")
    data = opened(made, task, tmp_path / "cache")
    task = task.of(data.modality)
    assembly = Assembly(task)
    pairs, (graph,) = task.task.cases(data, "test"), data.rows()
    nodes = embed(assembly, data, [graph.part(k, -1, "") for k in range(NODES)])
    expected = np.stack([nodes[pair.element] * nodes[pair.other] for pair in pairs])
    np.testing.assert_allclose(embed(assembly, data, pairs), expected, rtol=1e-5, atol=1e-6)


def test_the_loss_is_of_the_pairs_whose_nodes_are_both_in_view(made: Path, tmp_path: Path) -> None:
    task = recipe("link-prediction", "views.x.size=[60]")
    data = opened(made, task, tmp_path / "cache")
    task = task.of(data.modality)
    assembly = task.assemble(2).eval()
    rows = task.task.cases(data, "train")
    graphs = objective(assembly).learn_from(data, rows)
    batch = assembly.prepare(next(iter(loader(data.cache, graphs, task, steps=1, workers=0))))
    inside = set(batch.views["x"].index[0].tolist())
    linked = {(row.element, row.other) for row in rows if row.labels["class"] and {row.element, row.other} <= inside}
    seen: list[torch.Tensor] = []
    objective(assembly).out.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    loss = assembly(batch, 0.0)["task"]
    nodes = assembly.last_step.encode("x").tokens[0]
    place = {k: i for i, k in enumerate(batch.views["x"].index[0].tolist())}
    products = torch.stack([nodes[place[a]] * nodes[place[b]] for a, b in sorted(linked)])
    assert len(linked) < int(loss.count) == len(seen[0]) <= 2 * len(linked)
    ours = torch.cdist(products, seen[0][:len(linked)]).amin(1)
    torch.testing.assert_close(ours, torch.zeros_like(ours), atol=1e-3, rtol=0.0)


def test_links_are_predicted_better_than_chance_by_probe_and_by_fine_tuning(made: Path, tmp_path: Path) -> None:
    few = [*SMALL[-1:], "train.steps=200", "encoder.message_passing={width: 16, dropout: 0.0}", "train.ema=0.9"]
    meristem.evaluate("graph/link-prediction", made, tmp_path / "out", few, inits=["scratch"], seeds=1,
                      protocols=["linear", "finetune"], cache=tmp_path / "cache", quiet=True)
    metrics = {m["protocol"]: m["auroc"] for m in json.loads((tmp_path / "out" / "metrics.json").read_text())}
    assert metrics["finetune"] > 0.7 and metrics["linear"] > 0.6


def test_pretraining_that_saw_the_held_edges_is_called_contaminated(made: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for name, graph in (("seen", {}), ("held", {"hold_out": [0.05, 0.1]})):
        meristem.pretrain(str(_pretraining(tmp_path, **graph)), made, tmp_path / name, ["train.workers=0"], cache=cache,
                          quiet=True)
    with pytest.raises(RecipeError, match="in pretraining too"):
        meristem.evaluate("graph/link-prediction", made, tmp_path / "no", inits=[str(tmp_path / "seen")], cache=cache,
                          quiet=True)
    for name, verdict in (("seen", "contaminated"), ("held", "transductive")):
        meristem.evaluate("graph/link-prediction", made, tmp_path / f"of {name}", ["modality.graph.hold_out=[0.05,0.1]"],
                          inits=[str(tmp_path / name)], seeds=1, protocols=["linear"], cache=cache, quiet=True)
        assert Results.load(tmp_path / f"of {name}" / "results.json").leakage["pretraining"].verdict == verdict


# ---- the audit


def test_parts_are_audited_by_their_sample_and_by_themselves() -> None:
    tested = (["s#1", "s#2"], ["c#1", "c#2"])
    assert audit(*tested, ["s"], ["c"]).verdict == "transductive"
    assert audit(*tested, ["t"], ["d"]).verdict == "clean"
    beside = audit(*tested, ["t"], ["d"], ["s#3"], ["c#3"])
    assert beside.verdict == "transductive" and "not in pretraining" in beside.sentence
    both = audit(*tested, ["s"], ["c"], ["s#3"], ["c#3"])
    assert both.sentence.startswith("Transductive by nature") and "2 test cases in 1 sample" in both.sentence
    assert audit(*tested, ["s"], ["c"], ["s#2"], ["c#2"]).verdict == "contaminated"
    assert audit(*tested, ["s"], ["c"], spoiled="it saw them").verdict == "contaminated"
    assert audit(*tested, ["t"], ["d"], spoiled="it saw them").verdict == "clean"


# ---- folds


def test_a_declared_fold_tests_the_next_validates_and_what_is_in_none_trains() -> None:
    rows = tuple(Row(i, f"case-{i}", f"sub-{i}", (), f"{i:02d}", labels={"class": i % 2}, fold=i % 4 if i < 12 else -1)
                 for i in range(15))
    divided = divide(Manifest(rows, "", "", ""), "fold:3").rows
    assert [r.split for r in divided] == ["val", "train", "train", "test"] * 3 + ["train"] * 3
    alone = divide(Manifest(rows, "", "", ""), "fold:3:only").rows
    assert [r.split for r in alone] == ["test" if r.fold == 3 else "train" for r in rows]
    for wrong in ("fold:4", "fold:1:val"):
        with pytest.raises(RecipeError, match="folds fold:0 to fold:3"):
            divide(Manifest(rows, "", "", ""), wrong)
    with pytest.raises(DataError, match="does not declare folds"):
        divide(Manifest(tuple(replace(r, fold=-1) for r in rows), "", "", ""), "fold:0")
